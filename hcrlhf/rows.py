"""Rows of files and of data sets on the hub, and the texts in them."""

from __future__ import annotations

import glob
import re
import tempfile
from pathlib import Path
from typing import Any

from hcrlhf.errors import InputError
from hcrlhf.examples import Message
from hcrlhf.text import one_line

Row = dict[str, Any]

TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
FORMATS = {"json": "json", "jsonl": "json", "csv": "csv", "parquet": "parquet"}


def read_rows(source: str, split: str = "train", expected: str = "a file of examples") -> list[Row]:
    """The rows of a local file, or of a data set on the hub.

    Args:
        source: path of a .json, .jsonl, .csv (each also .gz) or .parquet file, or a data set on the
            hub, as of `hub_source`.
        split: of a hub data set.
        expected: what the error says of a file that is not there.

    Raises:
        InputError: it does not exist, cannot be parsed or has no rows.
    """
    import datasets

    path = Path(source)
    suffixes = [s.lstrip(".") for s in path.suffixes if s != ".gz"]
    suffix = suffixes[-1] if suffixes else ""
    if suffix in FORMATS and not path.is_file():
        raise InputError(f"{source} does not exist; expected {expected}")
    if path.is_file() and suffix not in FORMATS:
        raise InputError(f"{source} is of no known kind; expected one of {', '.join(FORMATS)}")
    if path.is_file() and path.stat().st_size == 0:
        raise InputError(f"{source} has no rows")
    if path.is_dir():
        raise InputError(f"{source} is a folder; expected a file of examples in it")
    datasets.disable_progress_bars()
    try:
        if path.is_file():
            # A cache of our own for the moment: a file that was changed in place is read again.
            with tempfile.TemporaryDirectory() as cache:
                loaded = datasets.load_dataset(
                    FORMATS[suffix],
                    data_files=glob.escape(str(path)),  # a name, and no pattern
                    split="train",
                    cache_dir=cache,
                )
                rows: list[Row] = loaded.to_list()
        else:
            hub_id, folder, revision = hub_source(source)
            given = {"data_dir": folder, "revision": revision}
            options = {key: value for key, value in given.items() if value}
            rows = datasets.load_dataset(hub_id, split=split, **options).to_list()
    except Exception as error:  # the library raises its own, pyarrow's, fsspec's and the hub's
        cause = error.__cause__ or error
        what = "cannot be parsed" if path.is_file() else "is neither a file nor a readable data set"
        raise InputError(f"{source} {what} ({one_line(cause)})") from error
    if not rows:
        raise InputError(f"{source} has no rows")
    return rows


def hub_source(source: str) -> tuple[str, str, str]:
    """Data set id, folder in it and revision of "OWNER/NAME[/FOLDER][@REVISION]".

    The revision is a commit, tag or branch; without it the hub's main branch is read, which its
    owner may change at any time. What is missing is "".
    """
    name, _, revision = source.partition("@")
    parts = name.split("/", 2)
    return "/".join(parts[:2]), "".join(parts[2:]), revision


def text_field(row: Row, field: str, source: str, index: int) -> str:
    """row[field], which must be a text.

    Raises:
        InputError: it is missing or not a text.
    """
    if field not in row:
        raise InputError(f"{source} has no column {field!r}; its columns are {', '.join(row)}")
    value = row[field]
    if not isinstance(value, str):
        raise InputError(
            f"{source}, row {index + 1}: {field!r} is {type(value).__name__}, expected a text"
        )
    return value


def parse_dialogue(text: str, path: str, index: int) -> tuple[Message, ...]:
    """The turns of "\\n\\nHuman: … \\n\\nAssistant: …"; the last one is the assistant's.

    Two turns of one speaker in a row are one turn; what stands before the first is left out.

    Raises:
        InputError: its first turn is not Human's, or its last not Assistant's.
    """
    parts = TURN.split(text)
    turns: list[Message] = []
    for speaker, content in zip(parts[1::2], parts[2::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += "\n\n" + content.strip()
        else:
            turns.append(Message(role=role, content=content.strip()))
    if len(turns) < 2 or turns[0]["role"] != "user" or turns[-1]["role"] != "assistant":
        raise InputError(
            f"{path}, row {index + 1}: expected a dialogue from '\\n\\nHuman:' to "
            f"'\\n\\nAssistant:', got {text[:40]!r}…"
        )
    return tuple(turns)
