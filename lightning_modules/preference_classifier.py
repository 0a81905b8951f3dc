"""Stages 2 and 3 on a model of its own: any Hugging Face encoder or decoder."""

from __future__ import annotations

from typing import Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from hcrlhf import optimizers
from hcrlhf.classifier import Classifier, Text, TextBatch, load_classifier
from hcrlhf.examples import Pair
from hcrlhf.stages import (
    ClassifierStage,
    fingerprint,
    read_classifier_stage,
    read_prompt_keys,
    write_classifier_stage,
)
from lightning_modules.adapter_module import Schedule
from lightning_modules.pair_module import PairModule, require_same_scores


class PreferenceClassifier(PairModule):
    """A sequence classifier with one label as a reward or cost model.

    The run folder becomes a plain Hugging Face folder; a policy reads it as
    `hcrlhf.scorers.SequenceClassifier`. Texts that are too long are cut, not left out.

    Args:
        role: "reward" or "cost" (`PairModule`).
        model: Hugging Face folder or hub id to start from; it gets a new head if it has none.
        max_tokens: of prompt and response together; None takes what the model reads.
        chat_template: None takes the tokenizer's; without any, an encoder reads text pairs and a
            decoder a plain "Human: … Assistant:" form, which is saved with it.
        train_layers: how many of the last layers are trained; None trains everything.
        sign_weight, penalty, squash: `PairModule`.
        learning_rate, weight_decay, schedule, warmup, gradient_checkpointing, optimizer:
            `StageModule`.
    """

    def __init__(
        self,
        role: Literal["reward", "cost"],
        model: str,
        max_tokens: int | None = None,
        chat_template: str | None = None,
        train_layers: int | None = None,
        sign_weight: float = 1.0,
        penalty: float = 1e-3,
        squash: float | None = None,
        learning_rate: float = 5e-5,
        weight_decay: float = 0.01,
        schedule: Schedule = "linear",
        warmup: float = 0.1,
        gradient_checkpointing: bool = False,
        optimizer: optimizers.Name = "adamw",
    ) -> None:
        super().__init__(
            role,
            sign_weight,
            penalty,
            squash,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            schedule=schedule,
            warmup=warmup,
            gradient_checkpointing=gradient_checkpointing,
            optimizer=optimizer,
        )
        self.source = model
        self.max_tokens = max_tokens
        self.chat_template = chat_template
        self.train_layers = train_layers
        self.classifier: Classifier
        self._texts = self._cut = 0

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.finished = self.read_own_stage(stage, self.role, read_classifier_stage)

    def configure_model(self) -> None:
        if hasattr(self, "classifier"):
            return
        self.classifier = load_classifier(
            str(self.run_folder) if self.finished else self.source,
            self.max_tokens,
            chat_template=self.chat_template,
            new_head=not self.finished,
        )
        if self.train_layers is not None:
            self.classifier.train_last(self.train_layers)
        if self.gradient_checkpointing:
            self.classifier.model.gradient_checkpointing_enable({"use_reentrant": False})

    def encode_response(self, example: Pair, response: str) -> Text:
        text = self.classifier.encode(example.messages, response)
        self._texts += 1
        self._cut += text.cut
        return text

    def collate_responses(self, encoded: list[Text]) -> tuple[TextBatch, Tensor]:
        batch = self.classifier.collate(encoded)
        return batch, batch.response_lengths

    def forward(self, tokens: TextBatch) -> Tensor:
        """Scores (B,) float32; outside training as a policy will see them, without autocast."""
        mixed = self.training and torch.is_autocast_enabled(self.device.type)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=mixed):
            scores: Tensor = self.classifier(tokens)
        return scores

    def on_train_start(self) -> None:
        self.classifier.train()  # Hugging Face models arrive in evaluation mode
        rank_zero_info(
            f"{self._cut} of {self._texts} texts are longer than {self.classifier.max_tokens} "
            "tokens: the beginning of the prompt is not read"
        )
        super().on_train_start()

    def save_stage(self) -> None:
        """Writes model, tokenizer and `hcrlhf.json`, and scores with what was written.

        Raises:
            RuntimeError: the reloaded weights score differently.
        """
        measured = self.measured()
        folder = self.run_folder
        folder.mkdir(parents=True, exist_ok=True)
        self.classifier.save(folder)
        self._compare_with_disk()
        stage = ClassifierStage(
            role=self.role,
            fingerprint=fingerprint(str(folder)),
            max_tokens=self.classifier.max_tokens,
            **measured,
        )
        write_classifier_stage(folder, stage, self._seen_keys | read_prompt_keys(self.source))
        self.say_written(stage)

    def _compare_with_disk(self) -> None:
        if self._probe is None:
            return
        folder = str(self.run_folder)
        reloaded = load_classifier(folder, self.classifier.max_tokens).to(self.device)
        self.eval()
        with torch.no_grad():
            ours = self(self._probe)
            with torch.autocast(self.device.type, enabled=False):
                theirs = reloaded(self._probe)
        require_same_scores(ours, theirs, folder)
