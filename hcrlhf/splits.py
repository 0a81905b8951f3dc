"""Disjoint splits: always by prompt, never by row."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from typing import TypeVar

from hcrlhf.errors import InputError
from hcrlhf.examples import Prompt

Example = TypeVar("Example", bound=Prompt)


def in_validation(key: str, fraction: float) -> bool:
    """Whether the prompt with this key is held out: a fixed function of the prompt alone."""
    digest = hashlib.sha256(f"validation/{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def split_by_prompt(
    examples: Sequence[Example], fraction: float, source: str
) -> tuple[list[Example], list[Example]]:
    """(training, validation), with about `fraction` of the prompts in validation.

    Raises:
        InputError: the fraction is not in (0, 1), or one side is empty.
    """
    if not 0 < fraction < 1:
        raise InputError(f"validation_fraction lies in (0, 1), got {fraction}")
    training = [e for e in examples if not in_validation(e.key, fraction)]
    validation = [e for e in examples if in_validation(e.key, fraction)]
    if not training or not validation:
        empty = "validation" if training else "training"
        raise InputError(
            f"{source}: the {empty} split is empty ({len(examples)} examples, validation_fraction "
            f"{fraction}); give more prompts or another fraction"
        )
    return training, validation


def require_disjoint(
    ours: Collection[str], theirs: Collection[str], our_name: str, their_name: str
) -> None:
    """Both are prompt keys; compared by their first 32 hex digits.

    Raises:
        InputError: they share a prompt. The text of the prompt is not shown: it may be a safety
            prompt.
    """
    shared = {key[:32] for key in ours} & {key[:32] for key in theirs}
    if shared:
        raise InputError(
            f"{len(shared)} of {len(ours)} {our_name} prompts are also {their_name} prompts (key "
            f"{min(shared)[:12]}… is one); the safety test is only valid on prompts that training "
            "never saw: remove them from one of the two"
        )
