"""Stage 1: supervised fine-tuning on demonstrations; its result is the reference policy."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torchmetrics import MeanMetric

from hcrlhf import machine, optimizers
from hcrlhf.backbone import LoraOptions
from hcrlhf.errors import InputError
from hcrlhf.examples import Demonstration, require_kind
from hcrlhf.stages import BackboneSource, Stage, fingerprint, read_prompt_keys, write_stage
from hcrlhf.text import ChatFormat, Encoded, TextEncoder, Tokens, collate, load_tokenizer
from lightning_modules.adapter_module import AdapterModule, Schedule, check_size


class Supervised(AdapterModule):
    """Maximises log π(response | prompt) on response tokens only.

    Args:
        model: Hugging Face folder or hub id of the base model.
        chat: template, system prompt and lengths, for this stage and all that follow.
        lora: adapter to train; None trains the whole model.
        group_size: sequences that share a forward pass, those of similar length together, so that
            less of it is padding; None takes a whole batch.
        quantization: of the base model, "nf4" for 4-bit (needs `lora`).
        dtype: of the weights that are not quantised.
        revision: of a hub id: a commit, so that it stays the same; None takes its main branch.
            Later stages compare the weights themselves, by their hash.
        learning_rate, weight_decay, schedule, warmup, gradient_checkpointing, optimizer:
            `StageModule`.
    """

    def __init__(
        self,
        model: str,
        chat: ChatFormat = ChatFormat(),  # noqa: B008 (frozen)
        lora: LoraOptions | None = None,
        group_size: int | None = None,
        quantization: Literal["none", "nf4"] = "none",
        dtype: Literal["float32", "bfloat16"] = "float32",
        revision: str | None = None,
        learning_rate: float = 2e-4,
        weight_decay: float = 0.0,
        schedule: Schedule = "linear",
        warmup: float = 0.05,
        gradient_checkpointing: bool = False,
        optimizer: optimizers.Name = "adamw",
    ) -> None:
        super().__init__(
            learning_rate, weight_decay, schedule, warmup, gradient_checkpointing, optimizer
        )
        if lora is None and (quantization != "none" or dtype != "float32"):
            raise InputError(
                f"quantization {quantization}, dtype {dtype}: the whole model is trained in "
                "float32; give lora: {r: 8} to train an adapter on a smaller backbone"
            )
        self.chat = chat
        self.lora = lora
        self.group_size = check_size(group_size, "group_size")
        self.source = BackboneSource(model, quantization, dtype, revision)
        self.validation_loss = MeanMetric()
        self._held_out: float | None = None  # on held-out demonstrations, as measured last
        self._seen_keys: set[str] = set()

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.finished = self.read_own_stage(stage, "sft")
        self.require_machine(self.source, self.chat, self.lora)
        self.encoder = TextEncoder(load_tokenizer(self.source.folder), self.chat)
        machine.require_vocabulary(machine.model_config(self.source), self.encoder)
        self.fingerprint = fingerprint(self.source.folder)

    def configure_model(self) -> None:
        if hasattr(self, "backbone"):
            return
        folder = str(self.run_folder)
        if self.lora is None:
            source = BackboneSource(folder) if self.finished else self.source
            self.backbone = self.build_backbone(source, full=True)
            return
        self.backbone = self.build_backbone(self.source)
        if self.finished:
            self.backbone.load_role("sft", folder, trainable=True)
        else:
            self.backbone.add_role("sft", self.lora, trainable=True)

    def encode(self, example: Demonstration) -> Encoded | None:
        require_kind(example, Demonstration, "datamodules.Demonstrations")
        encoded = self.encoder.encode(example.messages, example.response)
        if encoded is not None:
            self._seen_keys.add(example.key)
        return encoded

    def collate(self, encoded: list[Encoded]) -> Tokens:
        return collate(encoded, self.encoder.pad_id)

    def forward(self, tokens: Tokens) -> Tensor:
        """log π of the response tokens, (B, T)."""
        return self.in_groups(tokens, self._log_probs)

    def _log_probs(self, tokens: Tokens) -> Tensor:
        return self.backbone.log_probs(self.backbone.hidden(tokens), tokens)

    def _loss(self, tokens: Tokens) -> Tensor:
        """Mean negative log-likelihood of the response tokens, in nats."""
        return -self(tokens).sum() / tokens.response_mask.sum()

    def training_step(self, batch: Tokens, batch_idx: int) -> Tensor:
        loss = self.with_gradient(lambda: self._loss(batch))
        self.log("loss", loss.detach(), prog_bar=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: Tokens, batch_idx: int) -> None:
        self.validation_loss.update(self._loss(batch), batch.response_mask.sum())
        self.log("val/loss", self.validation_loss, prog_bar=True, batch_size=len(batch))

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self._held_out = float(self.validation_loss.compute())
            self._measured_at = self.global_step

    test_step = validation_step

    def predict_step(self, batch: Tokens, batch_idx: int) -> Tensor:
        """log π(response | prompt), (B,)."""
        return self(batch).sum(dim=1)

    def on_train_end(self) -> None:
        self.measure_last_weights()
        if self.may_save_stage():
            self.save_stage()

    def save_stage(self) -> None:
        """Writes the adapter or the whole model, the tokenizer and `hcrlhf.json`."""
        folder = self.run_folder
        folder.mkdir(parents=True, exist_ok=True)
        source = self.source
        if self.lora is not None:
            self.backbone.save_role("sft", folder, source.model, source.revision)
        else:
            self.backbone.save_full(folder)
            source = BackboneSource(str(folder))
        self.encoder.tokenizer.save_pretrained(str(folder))
        stage = Stage(
            role="sft",
            backbone=source,
            fingerprint=fingerprint(str(folder)) if self.lora is None else self.fingerprint,
            adapter=self.lora is not None,
            chat=self.chat,
            tokens=self.encoder.identity(),
            metrics={} if self._held_out is None else {"loss": self._held_out},
        )
        write_stage(folder, stage, self._seen_keys | read_prompt_keys(self.source.folder))
        self.say_written(stage)
