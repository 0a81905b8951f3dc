"""`hcrlhf split`: four disjoint files of prompts, and stage data without the held-out ones.

A safety test is only valid on prompts that no stage has seen. This command draws them before the
first stage, and takes them out of everything that is trained on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from hcrlhf.errors import InputError
from hcrlhf.examples import Message, prompt_key, user_turn
from hcrlhf.hashing import require_empty, sha256, write_json
from hcrlhf.rows import Row, hub_source, parse_dialogue, read_rows, text_field

COLUMNS = ("prompt", "instruction", "question")  # of prompts, the first one that is there
HELD_OUT = ("safety", "validation", "evaluation")


def opening(row: Row, field: str | None, source: str, index: int) -> Message:
    """The first user turn of a row: a column of prompts, or of the `chosen` dialogue.

    Raises:
        InputError: there is no such column, or it holds no text.
    """
    columns = [field] if field is not None else [name for name in COLUMNS if name in row]
    if not columns and "chosen" in row:
        return parse_dialogue(text_field(row, "chosen", source, index), source, index)[0]
    if not columns:
        raise InputError(
            f"{source} has the columns {', '.join(row)}; expected one of {', '.join(COLUMNS)} or "
            "chosen, or name the column of prompts with --field"
        )
    return user_turn(text_field(row, columns[0], source, index))[0]


def drawn(
    prompts: Mapping[str, str], sizes: Mapping[str, int], train: int | None, seed: int
) -> dict[str, list[str]]:
    """Keys of the prompts of each file: a function of the seed and of the set of prompts alone.

    Args:
        prompts: text by key.
        sizes: how many of safety, validation and evaluation. train: at most so many of the rest.

    Raises:
        InputError: there are not enough, or two files would share a prompt.
    """
    if min(sizes.values()) < 1 or (train is not None and train < 1):
        raise InputError(f"each file has at least one prompt, got {dict(sizes)}, train {train}")
    needed = sum(sizes.values())
    if len(prompts) <= needed:
        raise InputError(
            f"{len(prompts)} different prompts are not enough for {needed} held-out ones and some "
            "to train on; give more data or ask for fewer"
        )
    order = sorted(prompts, key=lambda key: sha256("split", str(seed), key))
    found, begin = {}, 0
    for name in HELD_OUT:
        found[name] = order[begin : begin + sizes[name]]
        begin += sizes[name]
    return {"train": order[begin:][:train], **found}


def split(
    sources: Sequence[str],
    also: Sequence[str],
    folder: Path,
    sizes: Mapping[str, int],
    train: int | None = None,
    field: str | None = None,
    hub_split: str = "train",
    seed: int = 0,
) -> dict[str, int]:
    """Writes prompts/{train,safety,validation,evaluation}.jsonl, and NAME.jsonl of every source.

    Args:
        sources: files or hub ids (as of `hub_source`); their prompts are what is drawn from.
        also: further data that a stage trains on; the held-out prompts are taken out of it too.
        folder: new or empty.

    Returns:
        Rows of each file written, by its path in the folder.

    Raises:
        InputError: a source cannot be read, prompts do not suffice, or the folder is in use.
    """
    everything = [*sources, *also]
    names = [_name(source) for source in everything]
    if len(set(names)) < len(names):
        raise InputError(f"two sources would be written to one file: {', '.join(names)}")
    require_empty(folder)
    rows = {source: read_rows(source, hub_split) for source in everything}
    turns = {
        source: [opening(row, field, source, i) for i, row in enumerate(its)]
        for source, its in rows.items()
    }
    prompts: dict[str, str] = {}
    for source in sources:
        for turn in turns[source]:
            if turn["content"].strip():
                prompts.setdefault(prompt_key([turn]), turn["content"])
    files = drawn(prompts, sizes, train, seed)
    held_out = {key for name in HELD_OUT for key in files[name]}

    contents: dict[str, list[Row]] = {
        f"prompts/{name}.jsonl": [{"prompt": prompts[key]} for key in keys]
        for name, keys in files.items()
    }
    for source, name in zip(everything, names, strict=True):
        pairs = zip(rows[source], turns[source], strict=True)
        kept = [row for row, turn in pairs if prompt_key([turn]) not in held_out]
        if not kept:
            raise InputError(f"every row of {source} has a held-out prompt; ask for fewer of them")
        contents[f"{name}.jsonl"] = kept

    (folder / "prompts").mkdir(parents=True, exist_ok=True)
    for name, lines in contents.items():
        _write(folder / name, lines)
    written = {name: len(lines) for name, lines in contents.items()}
    write_json(
        folder / "split.json",
        {"sources": list(sources), "also": list(also), "seed": seed, "rows": written},
    )
    return written


def _name(source: str) -> str:
    """ "hh-rlhf-base" of "Anthropic/hh-rlhf/base@main", "x" of "data/x.jsonl.gz"."""
    if Path(source).is_file():
        return Path(source).name.split(".")[0]
    hub_id, folder, _ = hub_source(source)
    return "-".join(part for part in (hub_id.split("/")[-1], *folder.split("/")) if part)


def _write(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("hcrlhf split", description=__doc__)
    parser.add_argument(
        "sources",
        nargs="+",
        help="files or hub ids (OWNER/NAME[/FOLDER][@REVISION]) to draw prompts from",
    )
    parser.add_argument("--out", type=Path, required=True, help="a new or empty folder")
    parser.add_argument("--also", nargs="+", default=[], help="further data of some stage")
    parser.add_argument("--safety", type=int, default=1000, help="prompts of the safety file")
    parser.add_argument(
        "--validation",
        type=int,
        default=400,
        help="to look at policies; a last look is the surer the more",
    )
    parser.add_argument("--evaluation", type=int, default=400)
    parser.add_argument("--train", type=int, help="at most so many; default: all that are left")
    parser.add_argument("--field", help="column of prompts, if not " + ", ".join(COLUMNS))
    parser.add_argument("--split", default="train", help="of hub data sets")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    sizes = {name: getattr(options, name) for name in HELD_OUT}
    written = split(
        options.sources,
        options.also,
        options.out,
        sizes,
        options.train,
        options.field,
        options.split,
        options.seed,
    )
    for name, count in written.items():
        print(f"{count:8,}  {options.out / name}")
    print("Train every stage on these files: the held-out prompts are in no other one.")
