"""The files beside the weights by which a released policy answers as it was tested.

Whoever loads a policy folder with transformers takes tokenizer and chat template from it, and of a
whole model the decoding (an adapter's is read by GenerationConfig.from_pretrained(folder));
other ones there would make another policy of the same weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hcrlhf.errors import InputError
from hcrlhf.rollouts import Decoding
from hcrlhf.text import TextEncoder, load_tokenizer, one_line, tokenizer_rules

GENERATION_FILE = "generation_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
# Keys of a generation config that do not change which answer comes out.
WITHOUT_EFFECT = {"pad_token_id", "bos_token_id", "transformers_version", "max_length", "use_cache"}


def generation_keys(decoding: Decoding, encoder: TextEncoder) -> dict[str, Any]:
    """What generation_config.json has to say for answers to be drawn and to end as in the test."""
    stops = encoder.stop_ids
    return decoding.generation_config(encoder.chat.max_response_tokens) | {
        "eos_token_id": stops if len(stops) > 1 else stops[0],
        "pad_token_id": encoder.pad_id,
    }


def require_same_answers(folder: Path, decoding: Decoding, encoder: TextEncoder) -> None:
    """Of the folder of a policy that was made elsewhere, before it is tested.

    Raises:
        InputError: its tokenizer, template or decoding are not those of the test.
    """
    # An adapter may come without; a whole model (config.json) has to say what its ids mean.
    if _has_tokenizer(folder) or (folder / "config.json").is_file():
        _require_same_tokenizer(folder, encoder)
    if (folder / GENERATION_FILE).is_file():
        _require_same_decoding(folder, decoding, encoder)


def complete(folder: Path, decoding: Decoding, encoder: TextEncoder) -> None:
    """Writes the test's tokenizer and decoding to the folder of a policy, where it has none."""
    if not _has_tokenizer(folder):
        encoder.tokenizer.chat_template = encoder.template
        encoder.tokenizer.save_pretrained(str(folder))
    generation = folder / GENERATION_FILE
    if not generation.is_file():
        text = json.dumps(generation_keys(decoding, encoder), indent=2)
        generation.write_text(text + "\n", encoding="utf-8")


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _require_same_tokenizer(folder: Path, encoder: TextEncoder) -> None:
    own = load_tokenizer(str(folder))
    tested = encoder.tokenizer.name_or_path
    if own.get_vocab() != encoder.tokenizer.get_vocab():
        raise InputError(
            f"policy: the tokenizer in {folder} has another vocabulary than that of {tested}, "
            "whose cost model would read other tokens"
        )
    if changed := _differing(tokenizer_rules(own), tokenizer_rules(encoder.tokenizer)):
        raise InputError(
            f"policy: the tokenizer in {folder} reads texts otherwise than that of {tested} "
            f"({', '.join(changed)} differ), so that it would see other prompts than in the test; "
            f"save the tokenizer of {tested} in it"
        )
    if own.chat_template != encoder.template:
        raise InputError(
            f"policy: the tokenizer in {folder} has another chat template than the test asks with; "
            f"save the tokenizer of {tested} in it, or name a supervised stage with that template"
        )


def _differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]


def _require_same_decoding(folder: Path, decoding: Decoding, encoder: TextEncoder) -> None:
    from transformers import GenerationConfig

    try:
        own = GenerationConfig.from_pretrained(str(folder)).to_dict()
    except Exception as error:  # of JSON, of types, of values that exclude one another
        raise InputError(
            f"policy: {folder / GENERATION_FILE} cannot be read ({one_line(error)})"
        ) from error
    tested = GenerationConfig(**generation_keys(decoding, encoder)).to_dict()
    names = [name for name in _differing(own, tested) if name not in WITHOUT_EFFECT]
    pairs = {name: (own.get(name), tested.get(name)) for name in names}
    others = [
        f"{name} {a} (tested: {b})"
        for name, (a, b) in pairs.items()
        if name != "eos_token_id" or _ids(a) != _ids(b)
    ]
    if others:
        raise InputError(
            f"policy: {folder / GENERATION_FILE} lets it answer otherwise than it is tested: "
            f"{'; '.join(others)}. Delete that file, and the decoding of the test is shipped; or "
            "set model.init_args.decoding and the chat of the supervised stage likewise"
        )


def _ids(value: Any) -> set[int]:
    """Of one id, several or none."""
    return {value} if isinstance(value, int) else set(value or ())
