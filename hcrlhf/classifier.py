"""Hugging Face sequence classifiers, encoders and decoders: a dialogue and a response, one score.

A model with a `score` layer is a decoder that scores the last token; it is pooled here by the
attention mask, because transformers' own pooling looks for the padding token and reads another
token where that is the EOS token. Anything else is an encoder with a pooling of its own.

Masks are True where a token counts. Rows are padded on the right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hcrlhf.errors import InputError
from hcrlhf.examples import Message
from hcrlhf.text import PLAIN_TEMPLATE, load_tokenizer, one_line, refuse_clock

MOST_TOKENS = 2048  # where neither the user nor the model names a limit

Dtype = Literal["float32", "bfloat16"]
SPECIAL, PROMPT, RESPONSE = None, 0, 1


@dataclass(frozen=True)
class Text:
    """One dialogue with its response as token ids; `cut` where something did not fit."""

    ids: list[int]
    types: list[int]
    response_tokens: int
    cut: bool


@dataclass(frozen=True)
class TextBatch:
    """B texts: (B, T) ids, mask and token types, and (B,) numbers of response tokens."""

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor
    response_lengths: Tensor

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: Any, non_blocking: bool = False) -> TextBatch:
        return TextBatch(
            self.input_ids.to(device, non_blocking=non_blocking),
            self.attention_mask.to(device, non_blocking=non_blocking),
            self.token_type_ids.to(device, non_blocking=non_blocking),
            self.response_lengths.to(device, non_blocking=non_blocking),
        )


def kept(parts: Sequence[int | None], limit: int) -> list[int]:
    """Which tokens of an over-long text are read: the beginning of the prompt goes first.

    Then, only where the response alone does not fit, its end. Special tokens stay.

    Args:
        parts: SPECIAL, PROMPT or RESPONSE of each token.
        limit: how many tokens may stay.
    """
    excess = max(0, len(parts) - limit)
    prompt = [i for i, part in enumerate(parts) if part == PROMPT]
    response = [i for i, part in enumerate(parts) if part == RESPONSE]
    dropped = set(prompt[:excess])
    rest = excess - len(dropped)
    dropped |= set(response[len(response) - rest :] if rest else [])
    return [i for i in range(len(parts)) if i not in dropped]


def plain_dialogue(messages: Sequence[Message]) -> str:
    """The dialogue before the response, for an encoder that reads (prompt, response).

    A single user turn is its text alone; of several each names its speaker.
    """
    if len(messages) == 1:
        return messages[0]["content"]
    names = {"system": "", "user": "Human: ", "assistant": "Assistant: "}
    return "\n\n".join(names[m["role"]] + m["content"] for m in messages)


def log_odds(logits: Tensor, label: int, independent: bool) -> Tensor:
    """z_k - log Σ_{j≠k} exp z_j: log-odds (B,) of label k against all others, zero at even odds.

    With a single label, or labels that do not exclude one another, the logit z_k itself.

    Args:
        logits: (B, L). independent: each label is a question of its own (multi-label).
    """
    if independent or logits.shape[1] == 1:
        return logits[:, label]
    others = [j for j in range(logits.shape[1]) if j != label]
    return logits[:, label] - logits[:, others].logsumexp(dim=1)


def most_positions(model: nn.Module) -> float:
    """How many tokens a model has positions for; infinity where it does not say.

    RoBERTa and its kin begin to count behind the padding's number: of 514 positions 512 are read.
    """
    positions = getattr(model.config, "max_position_embeddings", None) or math.inf
    tables = [m for name, m in model.named_modules() if name.endswith("position_embeddings")]
    padding = [i for table in tables if (i := getattr(table, "padding_idx", None)) is not None]
    return positions - max((i + 1 for i in padding), default=0)


class Classifier(nn.Module):
    """A sequence classifier and its tokenizer.

    Args:
        model: of Hugging Face's AutoModelForSequenceClassification. tokenizer: its own.
        source: where both are from, for error messages.
        max_tokens: of one text; None takes what the model reads, at most `MOST_TOKENS`.
        label: name or number of the label whose log-odds are the score; None where there is one.
        chat_template: None takes the tokenizer's; without any, an encoder reads text pairs.

    Raises:
        InputError: model and tokenizer do not fit each other or these settings.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        source: str,
        max_tokens: int | None = None,
        label: int | str | None = None,
        chat_template: str | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.source = source
        self.pools_last_token = is_decoder(model)
        self.template: str | None = chat_template or tokenizer.chat_template
        self.label = chosen_label(model.config, label, source)
        self.independent = model.config.problem_type == "multi_label_classification"
        self.max_tokens = self._token_limit(max_tokens)
        self._check()
        # Masked and to the right of everything that is read, so any id will do for a decoder.
        self.pad_id: int = tokenizer.pad_token_id or 0

    def _token_limit(self, asked: int | None) -> int:
        longest = min(most_positions(self.model), self.tokenizer.model_max_length)
        if asked is None:
            return int(min(longest, MOST_TOKENS))
        if not 8 <= asked <= longest:
            raise InputError(f"{self.source} reads 8 to {longest:g} tokens, got max_tokens {asked}")
        return asked

    def _check(self) -> None:
        if self.model.config.is_encoder_decoder:
            raise InputError(
                f"{self.source} is an encoder-decoder; expected an encoder or a decoder"
            )
        if not self.tokenizer.is_fast:
            raise InputError(
                f"{self.source} has a slow tokenizer, which does not say where its tokens lie in "
                "the text; save it with a tokenizer.json"
            )
        if len(self.tokenizer) > (rows := self.model.get_input_embeddings().num_embeddings):
            raise InputError(
                f"{self.source}: the tokenizer has {len(self.tokenizer)} tokens, the model {rows}; "
                "they do not belong together"
            )
        if self.pools_last_token and self.template is None:
            raise InputError(
                f"{self.source} is a decoder without a chat template, so how it wants to see a "
                "dialogue is not known; set chat_template"
            )
        if self.template is not None:
            refuse_clock(self.template, self.source, "chat_template")
        if not self.pools_last_token and self.tokenizer.pad_token_id is None:
            raise InputError(f"{self.source} has no padding token; set pad_token in its tokenizer")

    # -- texts ---------------------------------------------------------------------------------

    def encode(self, messages: Sequence[Message], response: str) -> Text:
        """The dialogue and its response, cut to `max_tokens` (`kept`)."""
        if self.template is not None:
            ids, types, parts = self._from_template(messages, response)
        else:
            pair = self.tokenizer(plain_dialogue(messages), response, verbose=False)
            ids, parts = pair["input_ids"], pair.sequence_ids()
            types = pair.get("token_type_ids") or [0] * len(ids)
        keep = kept(parts, self.max_tokens)
        return Text(
            [ids[i] for i in keep],
            [types[i] for i in keep],
            sum(parts[i] == RESPONSE for i in keep),
            cut=len(keep) < len(ids),
        )

    def _from_template(
        self, messages: Sequence[Message], response: str
    ) -> tuple[list[int], list[int], list[int | None]]:
        """Ids, types and parts; the response begins where the rendered prompt ends."""
        turns = [dict(m) for m in messages]
        prompt = self._render(turns, add_generation_prompt=True)
        text = self._render([*turns, {"role": "assistant", "content": response}])
        # Some templates put more between prompt and response than their generation prompt shows.
        split = next(
            (i for i, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b),
            min(len(prompt), len(text)),
        )
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids = encoded["input_ids"]
        parts: list[int | None] = [
            PROMPT if start < split else RESPONSE for start, _ in encoded["offset_mapping"]
        ]
        if ids and ids[0] == self.tokenizer.bos_token_id:
            parts[0] = SPECIAL
        return ids, [0] * len(ids), parts

    def _render(self, turns: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                turns,
                chat_template=self.template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except Exception as error:  # Jinja raises its own and the template's exceptions
            raise InputError(
                f"the chat template of {self.source} cannot render a dialogue ({one_line(error)})"
            ) from error
        return text

    def collate(self, texts: Sequence[Text]) -> TextBatch:
        longest = max(len(text.ids) for text in texts)

        def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
            return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])

        return TextBatch(
            padded([text.ids for text in texts], self.pad_id),
            padded([[1] * len(text.ids) for text in texts], 0).bool(),
            padded([text.types for text in texts], 0),
            torch.tensor([text.response_tokens for text in texts]),
        )

    # -- scores --------------------------------------------------------------------------------

    def forward(self, batch: TextBatch) -> Tensor:
        """Scores (B,) float32."""
        inputs: dict[str, Any] = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask.long(),
        }
        if self.pools_last_token:
            hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state
            last = batch.attention_mask.sum(dim=1) - 1
            state = hidden[torch.arange(len(batch), device=last.device), last]
            # Outside autocast: a score in bfloat16 has three digits.
            with torch.autocast(state.device.type, enabled=False):
                logits = nn.functional.linear(
                    state.float(),
                    self.model.score.weight.float(),
                    None if self.model.score.bias is None else self.model.score.bias.float(),
                )
        else:
            if "token_type_ids" in self.tokenizer.model_input_names:
                inputs["token_type_ids"] = batch.token_type_ids
            logits = self.model(**inputs).logits.float()
        return log_odds(logits, self.label, self.independent)

    def train_last(self, layers: int) -> None:
        """Freezes embeddings and all but the last `layers` layers; what follows them is trained.

        Raises:
            InputError: the model has not so many layers.
        """
        total = self.model.config.num_hidden_layers
        if not 1 <= layers <= total:
            raise InputError(f"{self.source} has {total} layers, got train_layers {layers}")
        base = self.model.base_model
        blocks = next(
            (m for m in base.modules() if isinstance(m, nn.ModuleList) and len(m) == total), None
        )
        if blocks is None:
            raise InputError(
                f"{self.source}: its layers cannot be found; leave train_layers out to train all"
            )
        for child in base.children():
            child.requires_grad_(False)
            if any(module is blocks for module in child.modules()):
                break
        blocks[total - layers :].requires_grad_(True)

    def save(self, folder: Any) -> None:
        """Model and tokenizer in Hugging Face form, with the template that was used."""
        self.model.save_pretrained(str(folder))
        self.tokenizer.chat_template = self.template
        self.tokenizer.save_pretrained(str(folder))


def is_decoder(model: Any) -> bool:
    """Whether a sequence classifier scores the last token of a text, by a layer called `score`."""
    return isinstance(getattr(model, "score", None), nn.Linear)


def chosen_label(config: Any, label: int | str | None, source: str) -> int:
    """The number of the label that is the score.

    Raises:
        InputError: there are several and none is named, or there is no such label.
    """
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    if label is None:
        if len(names) == 1:
            return 0
        raise InputError(
            f"{source} has {len(names)} labels ({', '.join(names)}); say whose log-odds are the "
            f"score, e.g. label: {names[0]}"
        )
    if label in names:
        return names.index(str(label))
    if isinstance(label, int) and 0 <= label < len(names):
        return label
    raise InputError(f"{source} has no label {label!r}; its labels are {', '.join(names)}")


def load_classifier(
    source: str,
    max_tokens: int | None = None,
    label: int | str | None = None,
    chat_template: str | None = None,
    dtype: Dtype = "float32",
    new_head: bool = False,
) -> Classifier:
    """The classifier in a Hugging Face folder or hub id, in evaluation mode.

    Args:
        new_head: to be trained: one label, its head as it comes or new; a decoder without a chat
            template gets the plain one.

    Raises:
        InputError: it cannot be read, is no classifier, or does not fit (`Classifier`).
    """
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    if (Path(source) / "adapter_config.json").is_file():
        raise InputError(
            f"{source} holds an adapter and not a whole model; merge it first (hcrlhf export), or "
            "name its base model"
        )
    _require_tokenizer_files(source)
    tokenizer = load_tokenizer(source)
    options: dict[str, Any] = {"num_labels": 1} if new_head else {}
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # of a new head it would make a report of many lines
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            source, dtype=getattr(torch, dtype), output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(
            f"the model {source!r} cannot be loaded ({one_line(error)}); expected a Hugging Face "
            "sequence-classification folder or hub id"
        ) from error
    finally:
        logging.set_verbosity(level)
    missing = sorted(info["missing_keys"])
    if missing and not new_head:
        raise InputError(
            f"{source} holds no weights for {', '.join(missing[:3])}, so its scores would be "
            "random; expected a model that was trained as a sequence classifier"
        )
    if new_head:
        if is_decoder(model) and tokenizer.chat_template is None:
            chat_template = chat_template or PLAIN_TEMPLATE
        if tokenizer.pad_token is not None:
            model.config.pad_token_id = tokenizer.pad_token_id
    return Classifier(model, tokenizer, source, max_tokens, label, chat_template).eval()


def _require_tokenizer_files(source: str) -> None:
    """
    Raises:
        InputError: a local folder holds none: transformers would make an empty tokenizer up.
    """
    folder = Path(source)
    names = ("tokenizer.json", "vocab.*", "*.model", "tekken.json")
    if folder.is_dir() and not any(any(folder.glob(name)) for name in names):
        raise InputError(
            f"{source} holds no tokenizer; save the model's own beside it (tokenizer.json)"
        )
