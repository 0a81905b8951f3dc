"""The plain values that data modules hand to training modules, and the two sides' contract."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict, runtime_checkable

from hcrlhf.errors import InputError


class Message(TypedDict):
    """One turn of a dialogue; role is "system", "user" or "assistant"."""

    role: str
    content: str


def user_turn(text: str) -> tuple[Message, ...]:
    return (Message(role="user", content=text),)


def prompt_key(messages: Sequence[Message]) -> str:
    """The identity of a prompt: SHA-256 of its first user turn, lower-cased, spaces folded.

    Dialogues that share an opening share a key, so that a split by key never puts the same
    conversation on both sides.
    """
    first = next((m["content"] for m in messages if m["role"] == "user"), None)
    if first is None:
        raise InputError("a prompt needs a user turn, and this dialogue has none")
    return hashlib.sha256(" ".join(first.lower().split()).encode()).hexdigest()


@dataclass(frozen=True)
class Prompt:
    messages: tuple[Message, ...]

    @property
    def key(self) -> str:
        return prompt_key(self.messages)

    @property
    def text(self) -> str:
        """The last user turn, for people to read."""
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Demonstration(Prompt):
    response: str


@dataclass(frozen=True)
class Pair(Prompt):
    """Two responses to one prompt; `higher` is the one whose score should be higher.

    For a reward model that is the better one, for a cost model the more harmful one. The harm
    labels are None where the data has none.
    """

    higher: str
    lower: str
    higher_harmful: bool | None = None
    lower_harmful: bool | None = None


def require_kind(example: Any, kind: type[Prompt], source: str) -> None:
    """
    Raises:
        InputError: a stage is given the data of another one.
    """
    if not isinstance(example, kind):
        raise InputError(
            f"this stage learns from a {kind.__name__} and was given a {type(example).__name__}; "
            f"set data.class_path to {source}, or model.class_path to a stage for this data"
        )


@runtime_checkable
class EncodesExamples(Protocol):
    """What a data module needs from the training module: its tokenizer's view of an example."""

    def encode(self, example: Any) -> Any | None:
        """The example as token ids; None where its prompt does not fit."""

    def collate(self, encoded: list[Any]) -> Any:
        """A batch of encoded examples."""
