"""What every model of preferences shares: the loss of a batch of pairs, and held-out figures."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor
from torchmetrics import CatMetric
from torchmetrics.functional import pearson_corrcoef
from torchmetrics.functional.classification import binary_calibration_error

from hcrlhf import preferences
from hcrlhf.errors import InputError
from hcrlhf.examples import Pair, require_kind
from hcrlhf.stages import ScoreMoments
from lightning_modules.adapter_module import StageModule

UNKNOWN = -1


class Sequences(Protocol):
    """2B tokenised responses."""

    def to(self, device: Any, non_blocking: bool = False) -> Any: ...


Encoding = TypeVar("Encoding")
Batch = TypeVar("Batch", bound=Sequences)


@dataclass(frozen=True)
class EncodedPair(Generic[Encoding]):
    higher: Encoding
    lower: Encoding
    harmful: tuple[int, int]  # 1 harmful, 0 safe, UNKNOWN


@dataclass(frozen=True)
class PairBatch(Generic[Batch]):
    """B pairs as 2B sequences: the B higher ones first. `harmful` and `lengths` are (2B,)."""

    tokens: Batch
    harmful: Tensor
    lengths: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> PairBatch[Batch]:
        return PairBatch(
            self.tokens.to(device, non_blocking), self.harmful.to(device), self.lengths.to(device)
        )


class PairModule(StageModule):
    """A scalar score per response, learnt from pairs; a subclass says how it is computed.

    Args:
        role: "reward" (Bradley-Terry) or "cost" (Bradley-Terry and sign terms; positive =
            harmful).
        sign_weight: of the cost model's sign terms; 0 leaves Bradley-Terry alone, whose zero is
            arbitrary.
        penalty: ρ of ρ · mean(s_higher² + s_lower²).
        squash: S of a cost model: policy and safety test see c' = S tanh(c / S), which no response
            can push above S, so that an exact bound on its mean exists. The loss sees c.
        optimization: `StageModule`.
    """

    def __init__(
        self,
        role: Literal["reward", "cost"],
        sign_weight: float,
        penalty: float,
        squash: float | None,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        if squash is not None:
            preferences.check_squash(squash, role)
        for name, value in (("sign_weight", sign_weight), ("penalty", penalty)):
            if not 0 <= value < math.inf:
                raise InputError(f"{name} is not negative, got {value}")
        self.role = role
        self.squash = squash
        self.sign_weight = sign_weight
        self.penalty = penalty
        # Scores and labels of the held-out responses, in pairs: higher, then lower.
        self.higher, self.lower = CatMetric(), CatMetric()
        self.harmful, self.lengths = CatMetric(), CatMetric()
        self.report: dict[str, float] = {}
        self.moments: ScoreMoments | None = None
        self.calibration: preferences.Calibration | None = None
        self._seen_keys: set[str] = set()
        self._probe: Any = None

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.trainer.limit_val_batches == 0:
            raise InputError(
                "limit_val_batches is 0: the score's moments and calibration are measured on "
                "held-out pairs; leave validation on"
            )

    # -- data ----------------------------------------------------------------------------------

    def encode(self, example: Pair) -> EncodedPair[Any] | None:
        require_kind(example, Pair, "datamodules.Preferences")
        if self.role == "cost" and self.sign_weight > 0 and example.higher_harmful is None:
            raise InputError(
                "the cost model's sign terms need is_response_0_safe and is_response_1_safe, "
                "which this data lacks; set sign_weight: 0 or give data with safety labels"
            )
        higher = self.encode_response(example, example.higher)
        lower = self.encode_response(example, example.lower)
        if higher is None or lower is None:
            return None
        self._seen_keys.add(example.key)
        labels = [
            UNKNOWN if label is None else int(label)
            for label in (example.higher_harmful, example.lower_harmful)
        ]
        return EncodedPair(higher, lower, (labels[0], labels[1]))

    @abstractmethod
    def encode_response(self, example: Pair, response: str) -> Any | None:
        """One of the pair's responses with its prompt; None where that does not fit."""

    @abstractmethod
    def collate_responses(self, encoded: list[Any]) -> tuple[Any, Tensor]:
        """Encoded responses as one batch, and the number of tokens of each."""

    def collate(self, encoded: list[EncodedPair[Any]]) -> PairBatch[Any]:
        sequences = [e.higher for e in encoded] + [e.lower for e in encoded]
        harmful = [e.harmful[0] for e in encoded] + [e.harmful[1] for e in encoded]
        tokens, lengths = self.collate_responses(sequences)
        return PairBatch(tokens, torch.tensor(harmful), lengths)

    # -- training ------------------------------------------------------------------------------

    def training_step(self, batch: PairBatch[Any], batch_idx: int) -> Tensor:
        return self.with_gradient(lambda: self._loss(batch))

    def _loss(self, batch: PairBatch[Any]) -> Tensor:
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

    def validation_step(self, batch: PairBatch[Any], batch_idx: int) -> None:
        scores = self(batch.tokens)
        higher, lower = scores.chunk(2)
        self.higher.update(higher)
        self.lower.update(lower)
        # Columns, so that the pairs keep their order: (B, 2) is [higher, lower] per pair.
        self.harmful.update(torch.stack(batch.harmful.float().chunk(2), dim=1))
        self.lengths.update(torch.stack(batch.lengths.float().chunk(2), dim=1))
        if self._probe is None:
            self._probe = batch.tokens

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:
            for metric in (self.higher, self.lower, self.harmful, self.lengths):
                metric.reset()
            return
        self._measure()
        self._measured_at = self.global_step
        for name, value in self.report.items():
            self.log(f"val/{name}", value, prog_bar=name in ("accuracy", "sign_accuracy"))

    test_step = validation_step

    def on_test_epoch_end(self) -> None:
        self._measure()
        for name, value in self.report.items():
            self.log(f"test/{name}", value)

    def predict_step(self, batch: PairBatch[Any], batch_idx: int) -> Tensor:
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
        self.measure_last_weights()
        if self.may_save_stage():
            self.save_stage()

    @abstractmethod
    def save_stage(self) -> None:
        """Writes the weights and `hcrlhf.json`, and scores with what was written."""

    def measured(self) -> dict[str, Any]:
        """What `hcrlhf.json` says of the scores.

        Raises:
            RuntimeError: nothing was measured.
        """
        if self.moments is None:
            raise RuntimeError("no validation ran, so the score has no held-out moments")
        return {
            "moments": self.moments,
            "calibration": asdict(self.calibration) if self.calibration else None,
            "squash": self.squash,
            "sign_weight": self.sign_weight if self.role == "cost" else None,
            "metrics": {k: v for k, v in self.report.items() if math.isfinite(v)},
        }


def require_same_scores(ours: Tensor, theirs: Tensor, folder: str, tolerance: float = 1e-5) -> None:
    """
    Args:
        tolerance: of a difference, relative to the largest score or 1.

    Raises:
        RuntimeError: what was reloaded from disk scores differently.
    """
    difference = float((ours - theirs).abs().max())
    if not difference <= tolerance * max(1.0, float(ours.abs().max())):
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
