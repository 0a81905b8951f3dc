"""Stages 2 and 3: a reward or a cost model from pairs of responses."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torchmetrics import CatMetric
from torchmetrics.functional import pearson_corrcoef
from torchmetrics.functional.classification import binary_calibration_error

from hcrlhf import preferences
from hcrlhf.backbone import LoraOptions, load_head
from hcrlhf.errors import InputError
from hcrlhf.examples import Pair
from hcrlhf.stages import (
    ScoreMoments,
    Stage,
    fingerprint,
    read_prompt_keys,
    read_stage,
    write_stage,
)
from hcrlhf.text import Encoded, TextEncoder, Tokens, collate, load_tokenizer
from lightning_modules.adapter_module import AdapterModule, Schedule, add_trained_role

UNKNOWN = -1


@dataclass(frozen=True)
class EncodedPair:
    higher: Encoded
    lower: Encoded
    harmful: tuple[int, int]  # 1 harmful, 0 safe, UNKNOWN


@dataclass(frozen=True)
class PairBatch:
    """B pairs as 2B sequences: the B higher ones first. `harmful` is (2B,)."""

    tokens: Tokens
    harmful: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> PairBatch:
        return PairBatch(self.tokens.to(device, non_blocking), self.harmful.to(device))


class Preference(AdapterModule):
    """A scalar score per response: an adapter and a float32 head on the supervised backbone.

    Args:
        role: "reward" (Bradley-Terry) or "cost" (Bradley-Terry and sign terms; positive =
            harmful).
        sft: folder of the supervised stage.
        lora: adapter of this role; only where the supervised stage trained the whole model
            (otherwise the role starts as a copy of the supervised adapter).
        sign_weight: of the cost model's sign terms; 0 leaves Bradley-Terry alone, whose zero is
            arbitrary.
        penalty: ρ of ρ · mean(s_higher² + s_lower²).
        squash: S of a cost model: policy and safety test see c' = S tanh(c / S), which no response
            can push above S, so that an exact bound on its mean exists. The loss sees c.
        quantization, dtype: of the backbone; None takes those of the supervised stage.
        learning_rate, weight_decay, schedule, warmup, gradient_checkpointing: `AdapterModule`.
    """

    def __init__(
        self,
        role: Literal["reward", "cost"],
        sft: str,
        lora: LoraOptions | None = None,
        sign_weight: float = 1.0,
        penalty: float = 1e-3,
        squash: float | None = None,
        quantization: Literal["none", "nf4"] | None = None,
        dtype: Literal["float32", "bfloat16"] | None = None,
        learning_rate: float = 2e-4,
        weight_decay: float = 0.0,
        schedule: Schedule = "linear",
        warmup: float = 0.05,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(learning_rate, weight_decay, schedule, warmup, gradient_checkpointing)
        if squash is not None and not (role == "cost" and 0 < squash < math.inf):
            raise InputError(
                f"squash is the positive cap of a cost model, got {squash} for a {role} model"
            )
        self.role = role
        self.squash = squash
        self.sft = sft
        self.lora = lora
        self.sign_weight = sign_weight
        self.penalty = penalty
        self.quantization = quantization
        self.dtype_name = dtype
        # Scores and labels of the held-out responses, in pairs: higher, then lower.
        self.higher, self.lower = CatMetric(), CatMetric()
        self.harmful, self.lengths = CatMetric(), CatMetric()
        self.report: dict[str, float] = {}
        self.moments: ScoreMoments | None = None
        self.calibration: preferences.Calibration | None = None
        self._seen_keys: set[str] = set()
        self._probe: Tokens | None = None

    # -- what this stage stands on -------------------------------------------------------------

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.finished = self.read_own_stage(stage, self.role)
        sft = read_stage(self.sft, "sft", "sft")
        if sft.adapter and (self.quantization or self.dtype_name):
            raise InputError(
                "quantization and dtype are fixed by the supervised adapter, which was trained on "
                f"{sft.backbone.quantization}/{sft.backbone.dtype}; remove them from this config"
            )
        if fingerprint(sft.backbone.model) != sft.fingerprint:
            raise InputError(
                f"sft: the weights in {sft.backbone.model} are not those that {self.sft} was "
                "trained on; run the supervised stage again"
            )
        self.sft_stage = sft
        self.source = replace(
            sft.backbone,
            quantization=self.quantization or sft.backbone.quantization,
            dtype=self.dtype_name or sft.backbone.dtype,
        )
        self.encoder = TextEncoder(load_tokenizer(self.sft), sft.chat)
        if stage == "fit" and self.trainer.limit_val_batches == 0:
            raise InputError(
                "limit_val_batches is 0: the score's moments and calibration are measured on "
                "held-out pairs; leave validation on"
            )

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

    # -- data ----------------------------------------------------------------------------------

    def encode(self, example: Pair) -> EncodedPair | None:
        if self.role == "cost" and self.sign_weight > 0 and example.higher_harmful is None:
            raise InputError(
                "the cost model's sign terms need is_response_0_safe and is_response_1_safe, "
                "which this data lacks; set sign_weight: 0 or give data with safety labels"
            )
        higher = self.encoder.encode(example.messages, example.higher)
        lower = self.encoder.encode(example.messages, example.lower)
        if higher is None or lower is None:
            return None
        self._seen_keys.add(example.key)
        labels = [
            UNKNOWN if label is None else int(label)
            for label in (example.higher_harmful, example.lower_harmful)
        ]
        return EncodedPair(higher, lower, (labels[0], labels[1]))

    def collate(self, encoded: list[EncodedPair]) -> PairBatch:
        sequences = [e.higher for e in encoded] + [e.lower for e in encoded]
        harmful = [e.harmful[0] for e in encoded] + [e.harmful[1] for e in encoded]
        return PairBatch(collate(sequences, self.encoder.pad_id), torch.tensor(harmful))

    # -- training ------------------------------------------------------------------------------

    def forward(self, tokens: Tokens) -> Tensor:
        """Scores (B,) float32."""
        with self.backbone.role(self.role):
            hidden = self.backbone.hidden(tokens)
        scores: Tensor = self.backbone.scores(self.role, hidden, tokens)
        return scores

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        scores = self(batch.tokens)
        higher, lower = scores.chunk(2)
        loss = preferences.bradley_terry_loss(higher, lower)
        loss = loss + self.penalty * preferences.score_penalty(higher, lower)
        known = batch.harmful != UNKNOWN
        if self.role == "cost" and self.sign_weight > 0 and known.any():
            signs = preferences.sign_loss(scores[known], batch.harmful[known] == 1)
            # Per pair, as the paper: two responses, two sign terms.
            loss = loss + 2 * self.sign_weight * signs
        self.log("loss", loss.detach(), prog_bar=True, batch_size=len(higher))
        accuracy = preferences.correct_pairs(higher, lower) / len(higher)
        self.log("accuracy", accuracy, prog_bar=True, batch_size=len(higher))
        return loss

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        scores = self(batch.tokens)
        higher, lower = scores.chunk(2)
        self.higher.update(higher)
        self.lower.update(lower)
        # Columns, so that the pairs keep their order: (B, 2) is [higher, lower] per pair.
        self.harmful.update(torch.stack(batch.harmful.float().chunk(2), dim=1))
        lengths = batch.tokens.response_mask.sum(dim=1).float()
        self.lengths.update(torch.stack(lengths.chunk(2), dim=1))
        if self._probe is None:
            self._probe = batch.tokens

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:
            for metric in (self.higher, self.lower, self.harmful, self.lengths):
                metric.reset()
            return
        self._measure()
        for name, value in self.report.items():
            self.log(f"val/{name}", value, prog_bar=name in ("accuracy", "sign_accuracy"))

    test_step = validation_step

    def on_test_epoch_end(self) -> None:
        self._measure()
        for name, value in self.report.items():
            self.log(f"test/{name}", value)

    def predict_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Scores (B, 2): higher, lower."""
        return torch.stack(self(batch.tokens).chunk(2), dim=1)

    def _measure(self) -> None:
        """Held-out figures; moments and calibration, which `hcrlhf.json` keeps."""
        higher, lower = _take(self.higher), _take(self.lower)
        harmful, lengths = _take(self.harmful).reshape(-1, 2), _take(self.lengths).reshape(-1, 2)
        scores = torch.stack([higher, lower], dim=1)
        pairs = preferences.proportion(preferences.correct_pairs(higher, lower), len(higher))
        self.moments = ScoreMoments(float(scores.mean()), float(scores.std()), scores.numel())
        self.report = {
            "accuracy": pairs.value,
            "accuracy_low": pairs.low,
            "accuracy_high": pairs.high,
            "pairs": float(len(higher)),
            "score_mean": self.moments.mean,
            "score_std": self.moments.std,
            "length_correlation": _correlation(scores.flatten(), lengths.flatten()),
        }
        known = harmful != UNKNOWN
        if self.role == "cost" and known.any():
            self._measure_signs(scores[known], harmful[known])

    def _measure_signs(self, scores: Tensor, harmful: Tensor) -> None:
        right = int(((scores > 0) == (harmful == 1)).sum())
        signs = preferences.proportion(right, len(scores))
        ece = binary_calibration_error(scores.sigmoid(), harmful.long(), n_bins=15)
        self.report |= {
            "sign_accuracy": signs.value,
            "sign_accuracy_low": signs.low,
            "sign_accuracy_high": signs.high,
            "calibration_error": float(ece),
            "harmful_share": float(harmful.mean()),
        }
        self.calibration = preferences.platt(scores.double().numpy(), harmful.double().numpy())

    # -- the end -------------------------------------------------------------------------------

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            self.save_stage()

    def save_stage(self) -> None:
        """Writes adapter, head, tokenizer and `hcrlhf.json`, and scores with what was written.

        Raises:
            RuntimeError: the reloaded weights score differently.
        """
        if self.moments is None:
            raise RuntimeError("no validation ran, so the score has no held-out moments")
        folder = self.run_folder
        folder.mkdir(parents=True, exist_ok=True)
        self.backbone.save_role(self.role, folder, self.source.model)
        self.backbone.save_head(self.role, folder)
        self.encoder.tokenizer.save_pretrained(str(folder))
        self._compare_with_disk()
        stage = Stage(
            role=self.role,
            backbone=self.source,
            fingerprint=self.sft_stage.fingerprint,
            adapter=True,
            chat=self.sft_stage.chat,
            moments=self.moments,
            calibration=asdict(self.calibration) if self.calibration else None,
            squash=self.squash,
            metrics={k: v for k, v in self.report.items() if math.isfinite(v)},
        )
        write_stage(folder, stage, self._seen_keys | read_prompt_keys(self.sft))

    def _compare_with_disk(self) -> None:
        if self._probe is None:
            return
        folder = str(self.run_folder)
        self.backbone.load_role("reloaded", folder, trainable=False)
        self.backbone.add_head("reloaded", trainable=False, state=load_head(folder))
        self.backbone.heads["reloaded"].to(self.device)
        with self.backbone.inference():
            ours = self(self._probe)
            with self.backbone.role("reloaded"):
                hidden = self.backbone.hidden(self._probe)
            theirs = self.backbone.scores("reloaded", hidden, self._probe)
        self.backbone.drop_role("reloaded")
        difference = float((ours - theirs).abs().max())
        if difference > 1e-5 * max(1.0, float(ours.abs().max())):
            raise RuntimeError(f"the model reloaded from {folder} scores {difference} differently")


def _take(metric: CatMetric) -> Tensor:
    """What the metric collected, on the CPU; and empties it."""
    values = metric.compute()
    metric.reset()
    return torch.as_tensor(values).detach().cpu()


def _correlation(scores: Tensor, lengths: Tensor) -> float:
    if float(scores.std()) == 0 or float(lengths.std()) == 0:
        return math.nan
    return float(pearson_corrcoef(scores, lengths))
