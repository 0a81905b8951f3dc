"""Hashes of texts, JSON values and files, and JSON files written whole. No torch."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hcrlhf.errors import InputError


def sha256(*parts: str) -> str:
    """SHA-256 of "part/part/…", in hex."""
    return hashlib.sha256("/".join(parts).encode()).hexdigest()


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: one value, one text. NaN is refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def json_hash(value: Any) -> str:
    """SHA-256 of the value's canonical JSON."""
    return sha256(canonical(value))


def sealed_hash(record: dict[str, Any]) -> str:
    """SHA-256 of a record without its own `hash`."""
    return json_hash({key: value for key, value in record.items() if key != "hash"})


def set_hash(keys: Sequence[str]) -> str:
    """The identity of a set of prompts, whatever its order."""
    return sha256(*sorted(keys))


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def source_file(thing: Any) -> Path | None:
    """The Python file of a module, a class, a function, or of the class of any other object."""
    thing = inspect.unwrap(thing) if callable(thing) else thing
    plain = inspect.isclass(thing) or inspect.isroutine(thing) or inspect.ismodule(thing)
    try:
        path = inspect.getsourcefile(thing if plain else type(thing))
    except TypeError:  # a built-in one
        return None
    return Path(path).resolve() if path and Path(path).is_file() else None


def folder_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in the folder, by its path relative to it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}


def require_writable(folder: Path, key: str) -> None:
    """
    Args:
        key: of the setting that names it, for the message.

    Raises:
        InputError: the folder is not there, and could not be made; or nothing could be put in it.
    """
    above = folder.absolute()
    try:
        while not above.exists():
            above = above.parent
    except OSError as error:  # a name that is too long
        raise InputError(f"{key} {_cut(folder)}: {error.strerror}; give another place") from error
    if not above.is_dir():
        raise InputError(f"{key} {_cut(folder)}: {_cut(above)} is a file; give another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"{key} {_cut(folder)}: {_cut(above)} is not yours to write to")


def require_empty(folder: Path) -> None:
    """
    Raises:
        InputError: something is in the folder, or it cannot be made.
    """
    require_writable(folder, "folder")
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty; give a new folder")


def _cut(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 100 else text[:99] + "…"


def write_json(path: Path, value: Any) -> None:
    """Writes the whole file or nothing."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes the whole file or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    replace_durably(temporary, path)


def replace_durably(source: Path, target: Path) -> None:
    """Puts a written file in the place of another; a crash leaves the one or the other, whole."""
    _sync(source)
    os.replace(source, target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> Any:
    """The value of a JSON file, in which no key may stand twice.

    Raises:
        ValueError: it is not JSON, or a key is repeated.
        OSError: it cannot be read.
    """
    return parse_json(path.read_bytes())


def parse_json(text: bytes) -> Any:
    """The value of JSON in which no key stands twice and no number is NaN; else a ValueError."""
    return json.loads(text, object_pairs_hook=unique_keys, parse_constant=_no_constant)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON's object, for `object_pairs_hook`; a ValueError where a key stands twice."""
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("a key stands twice")
    return record


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")
