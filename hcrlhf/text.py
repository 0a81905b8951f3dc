"""Text to token ids and back: one rendering for training, scoring, the safety test and export.

A sequence is a prompt (padded on the left) followed by a response (padded on the right), so that
every prompt of a batch ends, and every response begins, in the same column. Masks are True where
a token counts; they come from positions and never from token values, so a tokenizer whose padding
token is its EOS token is no special case.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from hcrlhf.errors import InputError
from hcrlhf.examples import Message
from hcrlhf.hashing import json_hash

# For tokenizers that bring no chat template. The newline after "Assistant:" keeps the first word
# of a response a word of its own in every tokenizer.
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}"
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] }}\n\n"
    "{% elif m['role'] == 'user' %}Human: {{ m['content'] }}\n\n"
    "{% else %}Assistant:\n{{ m['content'] }}{{ eos_token }}\n\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)


def refuse_clock(template: str, source: str, setting: str) -> None:
    """
    Args:
        source: whose template it is. setting: the key that takes another.

    Raises:
        InputError: what the template renders depends on the day.
    """
    if "strftime_now" in template:
        raise InputError(
            f"the chat template of {source} writes today's date into every prompt, so that what is "
            f"tested today is not what is used tomorrow; set {setting} to one that does not "
            "(configs/models has an example)"
        )


@dataclass(frozen=True)
class ChatFormat:
    """How dialogues become tokens. Set once, by the supervised stage; later stages read it.

    Args:
        max_prompt_tokens: longer prompts are left out of the data (and counted), never cut.
        max_response_tokens: longer responses are cut here, without EOS; also the sampling limit.
        system_prompt: put before every dialogue; None for none.
        chat_template: Jinja template; None takes the tokenizer's own, or a plain
            "Human: ... Assistant:" form where it has none.
        stop_tokens: tokens beside EOS with which a response ends, as chat models have them
            ("<|eot_id|>"); training data end with EOS.
    """

    max_prompt_tokens: int = 256
    max_response_tokens: int = 256
    system_prompt: str | None = None
    chat_template: str | None = None
    stop_tokens: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_tokens", tuple(self.stop_tokens))  # a list, where read
        for name in ("max_prompt_tokens", "max_response_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is a number of tokens >= 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Tokens:
    """Padded sequences of one batch: prompts of P columns, then responses of T columns.

    Attributes:
        input_ids: (B, P + T), long.
        attention_mask: (B, P + T), True for real tokens.
        prompt_length: P.
        truncated: (B,), True where the response was cut before its stop token.
    """

    input_ids: Tensor
    attention_mask: Tensor
    prompt_length: int
    truncated: Tensor

    @property
    def response_ids(self) -> Tensor:
        """(B, T)"""
        return self.input_ids[:, self.prompt_length :]

    @property
    def response_mask(self) -> Tensor:
        """(B, T), True for response tokens, the stop token included."""
        return self.attention_mask[:, self.prompt_length :]

    @property
    def position_ids(self) -> Tensor:
        """(B, P + T): 0 for the first real token, so that padding does not move a sequence."""
        return (self.attention_mask.long().cumsum(-1) - 1).clamp(min=0)

    @property
    def lengths(self) -> Tensor:
        """(B,), real tokens of each sequence."""
        return self.attention_mask.sum(dim=1)

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: Any, non_blocking: bool = False) -> Tokens:
        return Tokens(
            self.input_ids.to(device, non_blocking=non_blocking),
            self.attention_mask.to(device, non_blocking=non_blocking),
            self.prompt_length,
            self.truncated.to(device, non_blocking=non_blocking),
        )

    def without_common_padding(self) -> Tokens:
        """The same sequences without the columns before the longest prompt."""
        first = int(self.attention_mask.any(dim=0).int().argmax())
        return Tokens(
            self.input_ids[:, first:],
            self.attention_mask[:, first:],
            self.prompt_length - first,
            self.truncated,
        )

    def by_length(self, size: int | None) -> list[Tensor]:
        """Rows in groups of at most `size` (None: all in one), those of similar length together.

        A group is padded to its longest sequence, so that mixed lengths would be work for nothing.
        """
        order = self.lengths.argsort(stable=True).cpu()
        return list(order.split(size or len(self)))

    def rows(self, index: Tensor | slice) -> Tokens:
        """The sequences at `index`, with all columns."""
        return Tokens(
            self.input_ids[index],
            self.attention_mask[index],
            self.prompt_length,
            self.truncated[index],
        )


@dataclass(frozen=True)
class Encoded:
    """One prompt and one response (empty for a bare prompt) as token ids."""

    prompt: list[int]
    response: list[int]
    truncated: bool = False


def collate(sequences: Sequence[Encoded], pad_id: int) -> Tokens:
    """Pads prompts on the left and responses on the right into one `Tokens`."""
    prompt_length = max(len(s.prompt) for s in sequences)
    length = prompt_length + max(len(s.response) for s in sequences)
    input_ids = torch.full((len(sequences), length), pad_id, dtype=torch.long)
    mask = torch.zeros((len(sequences), length), dtype=torch.bool)
    for i, s in enumerate(sequences):
        start, stop = prompt_length - len(s.prompt), prompt_length + len(s.response)
        input_ids[i, start:stop] = torch.tensor(s.prompt + s.response, dtype=torch.long)
        mask[i, start:stop] = True
    truncated = torch.tensor([s.truncated for s in sequences], dtype=torch.bool)
    return Tokens(input_ids, mask, prompt_length, truncated)


def join(parts: Sequence[Tokens], pad_id: int) -> Tokens:
    """The sequences of several batches in one, padded to common lengths."""
    prompt = max(p.prompt_length for p in parts)
    response = max(p.response_ids.shape[1] for p in parts)
    margins = [(prompt - p.prompt_length, response - p.response_ids.shape[1]) for p in parts]
    return Tokens(
        torch.cat([pad(p.input_ids, m, value=pad_id) for p, m in zip(parts, margins, strict=True)]),
        torch.cat([pad(p.attention_mask, m) for p, m in zip(parts, margins, strict=True)]),
        prompt,
        torch.cat([p.truncated for p in parts]),
    )


class TextEncoder:
    """A tokenizer and a `ChatFormat`: the only place where text and ids meet.

    Raises:
        InputError: the tokenizer has no EOS token, or does not know a stop token.
    """

    def __init__(self, tokenizer: Any, chat: ChatFormat) -> None:
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"the tokenizer {tokenizer.name_or_path!r} has no EOS token, so no response could "
                "ever end; set eos_token in its tokenizer_config.json"
            )
        if tokenizer.pad_token_id is None:
            warnings.warn(
                "the tokenizer has no padding token; EOS is used (masks go by position)",
                stacklevel=2,
            )
            tokenizer.pad_token = tokenizer.eos_token
        self.tokenizer = tokenizer
        self.chat = chat
        self.template = chat.chat_template or tokenizer.chat_template or PLAIN_TEMPLATE
        refuse_clock(self.template, f"{tokenizer.name_or_path!r}", "chat.chat_template")
        self.eos_id: int = tokenizer.eos_token_id
        self.pad_id: int = tokenizer.pad_token_id
        self.stop_ids = [self.eos_id, *map(self._stop_id, chat.stop_tokens)]

    def identity(self) -> str:
        """SHA-256 of what makes tokens of dialogues: the template, and the tokenizer's rules."""
        return json_hash([self.template, tokenizer_rules(self.tokenizer)])

    def _stop_id(self, token: str) -> int:
        found: Any = self.tokenizer.get_vocab().get(token)
        if found is None:
            raise InputError(
                f"chat.stop_tokens: {token!r} is no single token of the tokenizer "
                f"{self.tokenizer.name_or_path!r}; name tokens of its vocabulary"
            )
        return int(found)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the dialogue up to where the assistant's next response begins."""
        return self._ids(self._rendered(messages))

    def _rendered(self, messages: Sequence[Message]) -> str:
        dialogue = [dict(m) for m in messages]
        if self.chat.system_prompt is not None:
            dialogue.insert(0, {"role": "system", "content": self.chat.system_prompt})
        try:
            text: str = self.tokenizer.apply_chat_template(
                dialogue,
                chat_template=self.template,
                add_generation_prompt=True,
                tokenize=False,
            )
        except Exception as error:  # Jinja raises its own and the template's exceptions
            raise InputError(
                f"the chat template cannot render {dialogue[0]['role']!r} as first turn: {error}"
            ) from error
        return text

    def encode(self, messages: Sequence[Message], response: str | None) -> Encoded | None:
        """Ids of prompt and response (None: a bare prompt), or None where the prompt is too long.

        A response that fits is followed by EOS; a cut one is not.
        """
        text = self._rendered(messages)
        prompt = self._ids(text)
        if len(prompt) > self.chat.max_prompt_tokens:
            return None
        if response is None:
            return Encoded(prompt, [])
        # In its place: SentencePiece begins a text of its own with a space that is not in it.
        whole = self._ids(text + response)
        joined = whole[: len(prompt)] == prompt
        ids = [*(whole[len(prompt) :] if joined else self._ids(response)), self.eos_id]
        limit = self.chat.max_response_tokens
        return Encoded(prompt, ids[:limit], truncated=len(ids) > limit)

    def decode(self, tokens: Tokens) -> list[str]:
        """The responses as text, without special tokens."""
        ids = [
            row[mask].tolist()
            for row, mask in zip(tokens.response_ids, tokens.response_mask, strict=True)
        ]
        texts = self.tokenizer.batch_decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return [text.strip() for text in texts]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def tokenizer_rules(tokenizer: Any) -> dict[str, Any]:
    """How texts become tokens; padding and truncation are set by each use."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = {} if backend is None else json.loads(backend.to_str())
    return {name: rule for name, rule in rules.items() if name not in ("padding", "truncation")}


def load_tokenizer(folder: str, revision: str | None = None) -> Any:
    """The tokenizer of a Hugging Face folder or hub id.

    Raises:
        InputError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, revision=revision)
    except Exception as error:  # OSError, ValueError, KeyError, depending on what is missing
        raise InputError(
            f"no tokenizer could be read from {folder!r} ({one_line(error)}); expected a Hugging "
            "Face model folder with tokenizer.json"
        ) from error


def one_line(error: BaseException, limit: int = 200) -> str:
    """An exception's message folded into one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
