"""Stages 2 and 3: a reward or a cost model from pairs of responses."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from hcrlhf import optimizers
from hcrlhf.backbone import LoraOptions, load_head
from hcrlhf.errors import InputError
from hcrlhf.examples import Pair
from hcrlhf.stages import (
    Stage,
    fingerprint,
    read_prompt_keys,
    read_stage,
    require_tokens,
    write_stage,
)
from hcrlhf.text import Encoded, TextEncoder, Tokens, collate, load_tokenizer
from lightning_modules.adapter_module import AdapterModule, Schedule, add_trained_role, check_size
from lightning_modules.pair_module import PairModule, require_same_scores


class Preference(PairModule, AdapterModule):
    """A scalar score per response: an adapter and a float32 head on the supervised backbone.

    Args:
        role: "reward" or "cost" (`PairModule`).
        sft: folder of the supervised stage.
        lora: adapter of this role; only where the supervised stage trained the whole model
            (otherwise the role starts as a copy of the supervised adapter).
        sign_weight, penalty, squash: `PairModule`.
        group_size: sequences that share a forward pass, those of similar length together, so that
            less of it is padding; None takes a whole batch.
        quantization, dtype: of the backbone; None takes those of the supervised stage.
        learning_rate, weight_decay, schedule, warmup, gradient_checkpointing, optimizer:
            `StageModule`.
    """

    def __init__(
        self,
        role: Literal["reward", "cost"],
        sft: str,
        lora: LoraOptions | None = None,
        sign_weight: float = 1.0,
        penalty: float = 1e-3,
        squash: float | None = None,
        group_size: int | None = None,
        quantization: Literal["none", "nf4"] | None = None,
        dtype: Literal["float32", "bfloat16"] | None = None,
        learning_rate: float = 2e-4,
        weight_decay: float = 0.0,
        schedule: Schedule = "linear",
        warmup: float = 0.05,
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
        self.sft = sft
        self.lora = lora
        self.group_size = check_size(group_size, "group_size")
        self.quantization = quantization
        self.dtype_name = dtype

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.finished = self.read_own_stage(stage, self.role)
        sft = read_stage(self.sft, "sft", "sft")
        if sft.adapter and (self.quantization or self.dtype_name):
            raise InputError(
                "quantization and dtype are fixed by the supervised adapter, which was trained on "
                f"{sft.backbone.quantization}/{sft.backbone.dtype}; remove them from this config"
            )
        self.sft_stage = sft
        self.source = replace(
            sft.backbone,
            quantization=self.quantization or sft.backbone.quantization,
            dtype=self.dtype_name or sft.backbone.dtype,
        )
        begun = None if sft.adapter else self.lora or LoraOptions()
        self.require_machine(self.source, sft.chat, begun)
        if fingerprint(sft.backbone.folder) != sft.fingerprint:
            raise InputError(
                f"sft: the weights in {sft.backbone.model} are not those that {self.sft} was "
                "trained on; run the supervised stage again"
            )
        self.encoder = TextEncoder(load_tokenizer(self.sft), sft.chat)
        require_tokens(sft, self.encoder.identity(), "sft")

    def configure_model(self) -> None:
        if hasattr(self, "backbone"):
            return
        self.backbone = self.build_backbone(self.source)
        if self.finished:
            folder = str(self.run_folder)
            self.backbone.load_role(self.role, folder, trainable=True)
            self.backbone.add_head(self.role, trainable=True, state=load_head(folder))
            return
        adapter = self.sft if self.sft_stage.adapter else None
        add_trained_role(self.backbone, self.role, adapter, self.lora)
        self.backbone.add_head(self.role, trainable=True)

    def encode_response(self, example: Pair, response: str) -> Encoded | None:
        return self.encoder.encode(example.messages, response)

    def collate_responses(self, encoded: list[Encoded]) -> tuple[Tokens, Tensor]:
        tokens = collate(encoded, self.encoder.pad_id)
        return tokens, tokens.response_mask.sum(dim=1)

    def forward(self, tokens: Tokens) -> Tensor:
        """Scores (B,) float32."""
        return self._scores_of(self.role, tokens)

    def _scores_of(self, role: str, tokens: Tokens) -> Tensor:
        def score(part: Tokens) -> Tensor:
            return self.backbone.scores(role, self.backbone.hidden(part), part)

        with self.backbone.role(role):
            return self.in_groups(tokens, score)

    def save_stage(self) -> None:
        """Writes adapter, head, tokenizer and `hcrlhf.json`, and scores with what was written.

        Raises:
            RuntimeError: the reloaded weights are others, or score differently.
        """
        measured = self.measured()
        folder = self.run_folder
        folder.mkdir(parents=True, exist_ok=True)
        self.backbone.save_role(self.role, folder, self.source.model, self.source.revision)
        self.backbone.save_head(self.role, folder)
        self.encoder.tokenizer.save_pretrained(str(folder))
        self._compare_with_disk()
        stage = Stage(
            role=self.role,
            backbone=self.source,
            fingerprint=self.sft_stage.fingerprint,
            adapter=True,
            chat=self.sft_stage.chat,
            tokens=self.encoder.identity(),
            **measured,
        )
        write_stage(folder, stage, self._seen_keys | read_prompt_keys(self.sft))
        self.say_written(stage)

    def _compare_with_disk(self) -> None:
        if self._probe is None:
            return
        folder = str(self.run_folder)
        self.backbone.load_role("reloaded", folder, trainable=False)
        self.backbone.add_head("reloaded", trainable=False, state=load_head(folder))
        self.backbone.heads["reloaded"].to(self.device)
        with self.backbone.inference():
            # In the same groups: bfloat16 rounds otherwise where shapes differ.
            ours, theirs = (self._scores_of(r, self._probe) for r in (self.role, "reloaded"))
        own, saved = (self.backbone.adapter_state(r) for r in (self.role, "reloaded"))
        self.backbone.drop_role("reloaded")
        if not all(torch.equal(saved[name], tensor) for name, tensor in own.items()):
            raise RuntimeError(f"the adapter reloaded from {folder} is not the trained one")
        # Products in bfloat16 need not round alike in two passes on a GPU, and no training must end
        # by that.
        exact = self.source.dtype == "float32" and self.source.quantization == "none"
        require_same_scores(ours, theirs, folder, 1e-5 if exact else 1e-2)
