"""Pairs of responses with human labels, for reward and cost models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader

from datamodules.files import EncodedLoading, check_batch_size
from hcrlhf.errors import InputError
from hcrlhf.examples import Message, Pair, user_turn
from hcrlhf.rows import Row, parse_dialogue, read_rows, text_field
from hcrlhf.splits import split_by_prompt

Label = Literal["better", "safer"]


class Preferences(EncodedLoading):
    """Pairs in the PKU-SafeRLHF form, as HH-RLHF dialogues, or as prompt, chosen, rejected.

    The form is recognised by its columns:
      - prompt, response_0, response_1 with better_response_id or safer_response_id, and, if
        present, is_response_0_safe and is_response_1_safe (PKU-SafeRLHF);
      - chosen, rejected: whole dialogues "\\n\\nHuman: … \\n\\nAssistant: …" (HH-RLHF);
      - prompt, chosen, rejected.

    Args:
        path: file (.json, .jsonl, .csv, .gz of these, .parquet) or hub id, as of
            `hcrlhf.rows.hub_source` (a commit behind @ keeps it the same).
        label: "better": the pair's order is by helpfulness, for a reward model. "safer": by
            harmlessness, for a cost model, where the less safe response scores higher. The last
            two forms hold one label only and take it for "better".
        batch_size: pairs per step.
        validation: file of held-out pairs in the same form; None holds out a share of `path`.
            Pairs whose prompt is also trained on are left out of it, and counted.
        validation_fraction: share of the prompts that is held out, by a hash of the first turn.
        split: of a hub data set.
        seed: of the order of training.
    """

    def __init__(
        self,
        path: str,
        label: Label,
        batch_size: int = 32,
        validation: str | None = None,
        validation_fraction: float = 0.1,
        split: str = "train",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.path = path
        self.label = label
        self.batch_size = check_batch_size(batch_size)
        self.validation_path = validation
        self.validation_fraction = validation_fraction
        self.split = split
        self.seed = seed

    def setup(self, stage: str) -> None:
        module = self.trainer.lightning_module if self.trainer is not None else None
        role = getattr(module, "role", None)
        expected = {"reward": "better", "cost": "safer"}.get(str(role), self.label)
        if expected != self.label:
            raise InputError(
                f"a {role} model learns from label: {expected}, got label: {self.label}; change "
                "data.init_args.label or model.init_args.role"
            )
        pairs = read_pairs(self.path, self.label, self.split)
        if self.validation_path is None:
            self.training, self.validation = split_by_prompt(
                pairs, self.validation_fraction, self.path
            )
            return
        self.training = pairs
        trained = {pair.key for pair in pairs}
        held_out = read_pairs(self.validation_path, self.label, self.split)
        self.validation = [pair for pair in held_out if pair.key not in trained]
        if not self.validation:
            raise InputError(
                f"every prompt of {self.validation_path} is also in {self.path}, so nothing is "
                "held out; give other validation pairs, or leave validation out"
            )
        if len(self.validation) < len(held_out):
            rank_zero_info(
                f"{self.validation_path}: {len(held_out) - len(self.validation)} of "
                f"{len(held_out)} pairs left out, their prompts are trained on"
            )

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader(self.training, "training", self.batch_size, seed=self.seed)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader(self.validation, "validation", self.batch_size, shared=True)

    test_dataloader = predict_dataloader = val_dataloader


def read_pairs(path: str, label: Label, split: str = "train") -> list[Pair]:
    """The usable pairs of a file; what is left out is counted and said.

    Raises:
        InputError: no form is recognised, a column is wrong, or no pair is left.
    """
    rows = read_rows(path, split)
    columns = set(rows[0])
    if {"response_0", "response_1"} <= columns:
        pairs = [_from_pku(row, label, path, i) for i, row in enumerate(rows)]
    elif {"chosen", "rejected"} <= columns:
        if label == "safer":
            raise InputError(
                f"{path} has chosen and rejected responses, which say what is better, not what is "
                "safer; label: safer needs safer_response_id"
            )
        read = _from_columns if "prompt" in columns else _from_dialogues
        pairs = [read(row, path, i) for i, row in enumerate(rows)]
    else:
        raise InputError(
            f"{path} has the columns {', '.join(sorted(columns))}; expected prompt, response_0, "
            "response_1, better_response_id or safer_response_id, or chosen and rejected"
        )
    usable = [pair for pair in pairs if pair is not None]
    if len(usable) < len(rows):
        rank_zero_info(
            f"{path}: {len(rows) - len(usable)} of {len(rows)} pairs left out (equal or empty "
            "responses, or dialogues that differ before the last turn)"
        )
    if not usable:
        raise InputError(f"{path} has no pair of two different responses to one prompt")
    return usable


def _pair(
    messages: Sequence[Message],
    higher: str,
    lower: str,
    harmful: tuple[bool | None, bool | None] = (None, None),
) -> Pair | None:
    higher, lower = higher.strip(), lower.strip()
    if not higher or not lower or higher == lower:
        return None
    return Pair(tuple(messages), higher, lower, *harmful)


def _from_pku(row: Row, label: Label, path: str, index: int) -> Pair | None:
    field = f"{label}_response_id"
    if field not in row:
        raise InputError(
            f"{path} has no column {field!r}, which label: {label} needs; its columns are "
            f"{', '.join(row)}"
        )
    if row[field] not in (0, 1):
        raise InputError(f"{path}, row {index + 1}: {field} is {row[field]!r}, expected 0 or 1")
    chosen = int(row[field])
    # Positive cost = harmful: for a cost model the response that is *not* safer scores higher.
    higher = chosen if label == "better" else 1 - chosen
    responses = [text_field(row, f"response_{i}", path, index) for i in (0, 1)]
    harmful = [_harmful(row, i, path, index) for i in (0, 1)]
    prompt = text_field(row, "prompt", path, index)
    if not prompt.strip():
        raise InputError(f"{path}, row {index + 1}: the prompt is empty")
    return _pair(
        user_turn(prompt),
        responses[higher],
        responses[1 - higher],
        (harmful[higher], harmful[1 - higher]),
    )


def _harmful(row: Row, response: int, path: str, index: int) -> bool | None:
    field = f"is_response_{response}_safe"
    safe = row.get(field)
    if safe is None:
        return None
    if safe not in (True, False):
        raise InputError(f"{path}, row {index + 1}: {field} is {safe!r}, expected true or false")
    return not safe


def _from_columns(row: Row, path: str, index: int) -> Pair | None:
    prompt, chosen, rejected = (
        text_field(row, field, path, index) for field in ("prompt", "chosen", "rejected")
    )
    if not prompt.strip():
        raise InputError(f"{path}, row {index + 1}: the prompt is empty")
    return _pair(user_turn(prompt), chosen, rejected)


def _from_dialogues(row: Row, path: str, index: int) -> Pair | None:
    chosen = parse_dialogue(text_field(row, "chosen", path, index), path, index)
    rejected = parse_dialogue(text_field(row, "rejected", path, index), path, index)
    if chosen[:-1] != rejected[:-1]:
        return None
    return _pair(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])
