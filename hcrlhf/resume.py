"""Going on with a run that broke off: from which checkpoint, and under whose settings.

A checkpoint holds the settings that it was written under, and is never asked for one: the config
of the new command holds. `fit` compares the two. What does not change what the run is may differ
and is said (`may_change`); anything else is refused, limits and safety test above all: a run whose
first half aimed at another limit is not the run that its config.yaml describes.
"""

from __future__ import annotations

import importlib
import json
import pickle
import random
import sysconfig
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hcrlhf.backbone import SCALE_SETTINGS
from hcrlhf.errors import InputError
from hcrlhf.hashing import file_sha256, json_hash, read_json, source_file
from hcrlhf.stages import FILE as STAGE_FILE
from hcrlhf.text import one_line

FILE = Path("checkpoints", "last.ckpt")  # in the run folder
KEY = "run"  # of the checkpoint: what `describe` says
INSTALLED = ("stdlib", "platstdlib", "purelib", "platlib")  # not in editable form
OWN = frozenset({"hcrlhf", "lightning_modules", "datamodules", "callbacks"})

# Learning rates, memory, and what only later commands read. β only where it is not steered.
MAY_CHANGE = frozenset(
    f"model.init_args.{name}"
    for name in (
        *("learning_rate", "critic_learning_rate", "schedule", "warmup", "weight_decay"),
        *("max_grad_norm", "kl_coefficient", "ptx_coefficient", "gradient_checkpointing"),
        *("micro_batch_size", "rollout_batch_size", "unpacked_rollouts", "group_size"),
    )
) | {"data.init_args.updates", "data.init_args.evaluation"}
STEERED = frozenset({"model.init_args.kl_coefficient"})
# Of the trainer all may change but what a position in the data is counted by.
TRAINER_KEPT = frozenset(
    f"trainer.{name}"
    for name in (
        *("max_epochs", "max_steps", "limit_train_batches", "overfit_batches"),
        *("accumulate_grad_batches", "devices", "num_nodes"),
    )
)
# Files and folders are compared by what is in them, so that a run may be moved.
PATHS = [f"model.init_args.{name}" for name in ("model", "sft", "reward", "cost")] + [
    *(f"model.init_args.{slot}.init_args.model" for slot in ("reward", "cost")),
    *(
        f"data.init_args.{name}"
        for name in ("path", "train", "validation", "safety", "demonstrations")
    ),
]

# Their options may change, but they may not go: only they keep the checkpoint of the end, and the
# policy that training left.
NOT_REMOVED = frozenset({"trainer.callbacks.Checkpoint", "trainer.callbacks.BestCandidate"})

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Change:
    """A setting that differs; None = not set."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.old)} → {_shown(self.new)}"


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else text[:99] + "…"


# -- settings --------------------------------------------------------------------------------------


def describe(config: Settings) -> dict[str, Any]:
    """What a run is, as plain data: its settings, and hashes of what they name on disk.

    Args:
        config: the whole config, every default filled in.
    """
    parts = {name: config.get(name) for name in ("seed_everything", "model", "data", "trainer")}
    trainer = dict(parts["trainer"] or {})
    trainer["callbacks"] = _by_class(trainer.get("callbacks"))
    trainer.pop("default_root_dir", None)  # a checkpoint belongs to the folder that it lies in
    settings = {**parts, "trainer": trainer}
    paths = {key: _get(settings, key) for key in PATHS}
    hashes = {key: identity(Path(path)) for key, path in paths.items() if isinstance(path, str)}
    hashes |= {key: source_identity(name) for key, name in named_code(settings)}
    return {"settings": settings, "inputs": {k: h for k, h in hashes.items() if h is not None}}


def named_code(settings: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Where the settings name classes and functions, and which."""
    children = enumerate(settings) if isinstance(settings, list) else ()
    for name, value in settings.items() if isinstance(settings, Mapping) else children:
        place = f"{key}.{name}".lstrip(".")
        if name in ("class_path", "function") and isinstance(value, str):
            yield place, value
        else:
            yield from named_code(value, place)


def source_identity(name: str) -> str | None:
    """A hash of a user's class or function: its name, and the file that defines it.

    None: it is this project's, Python's or of an installed package; or there is no file.
    """
    module, _, own = name.rpartition(".")
    if name.partition(".")[0] in OWN:
        return None
    try:
        home = importlib.import_module(module)
        # Where the name stands for an object (a functools.partial), its module says what is in it.
        files = {source_file(getattr(home, own)), source_file(home)}
    except (Exception, SystemExit):  # whoever makes an object of it says what is wrong
        return None
    hashes = [file_sha256(file) for file in files if file is not None and not _installed(file)]
    return json_hash([name, *sorted(hashes)]) if hashes else None


def _installed(file: Path) -> bool:
    return any(file.is_relative_to(Path(sysconfig.get_path(p)).resolve()) for p in INSTALLED)


def _by_class(callbacks: Any) -> dict[str, Any]:
    """Callbacks by the name of their class, for their order says nothing.

    Those of others have their class_path beside their options. One that is derived from one of
    ours goes by the name of ours: a safety test is one, whoever has written it.
    """
    named: dict[str, Any] = {}
    for callback in callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []:
        path, options = callback["class_path"], callback.get("init_args") or {}
        name = _base_of_ours(path)
        while name in named:
            name += "'"
        own = path.partition(".")[0] in OWN
        named[name] = options if own else {"class_path": path, **options}
    return named


def _base_of_ours(class_path: str) -> str:
    """The name of the class, or of the class of `callbacks` that it is derived from."""
    module, _, own = class_path.rpartition(".")
    try:
        bases = getattr(importlib.import_module(module), own).__mro__
    except (Exception, SystemExit):  # whoever makes an object of it says what is wrong
        return own
    ours = (base for base in bases if base.__module__.partition(".")[0] == "callbacks")
    return next((base.__name__ for base in ours), own)


def _get(settings: Settings, key: str) -> Any:
    value: Any = settings
    for name in key.split("."):
        if isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            value = value.get(name) if isinstance(value, Mapping) else None
    return value


def identity(path: Path) -> str | None:
    """A hash of a file, or of what tells a stage or model folder from another; None: neither.

    Of a folder's weights only adapter and head are read, and what scales the adapter. A stage
    compares the hash of its backbone by itself, and the weights of a base model count here by name
    and size.
    """
    if path.is_file():
        return file_sha256(path)
    if not path.is_dir():
        return None
    names = (STAGE_FILE, "config.json", "adapter_model.safetensors", "head.safetensors")
    content = {n: file_sha256(path / n) for n in names if (path / n).is_file()}
    if (path / "adapter_config.json").is_file():
        record = read_json(path / "adapter_config.json")
        content["scale"] = json_hash({key: record.get(key) for key in SCALE_SETTINGS})
    sizes = {p.name: p.stat().st_size for p in [*path.glob("*.safetensors"), *path.glob("*.bin")]}
    return json_hash({"content": content, "sizes": sizes})


def differences(old: Any, new: Any, key: str = "") -> list[Change]:
    """What differs, key by key.

    Null and a key that is not there are the same. Lists are compared by position; of two different
    classes only the names, since their options have nothing to do with one another.
    """
    if isinstance(old, list) and isinstance(new, list):
        old, new = ({str(i): value for i, value in enumerate(v)} for v in (old, new))
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names: Sequence[str] = list(dict.fromkeys([*old, *new]))
        if old.get("class_path") != new.get("class_path"):
            names = ["class_path"]
        return [
            change
            for name in names
            for change in differences(old.get(name), new.get(name), f"{key}.{name}".lstrip("."))
        ]
    return [] if old == new else [Change(key, old, new)]


def changes(old: Settings, new: Settings) -> list[Change]:
    """What differs between two runs that `describe` described; files by their content."""
    before, now = old["inputs"], new["inputs"]
    compared = before.keys() & now.keys()
    found = [
        change
        for change in differences(old["settings"], new["settings"])
        if change.key not in compared or before[change.key] != now[change.key]
    ]
    said = {change.key for change in found}
    for key in sorted(compared - said):
        if before[key] != now[key]:
            path = _get(new["settings"], key)
            found.append(Change(key, path, "other content in the same place"))
    return found


def may_change(key: str, settings: Settings) -> bool:
    """Whether a run may go on although this setting differs."""
    if key in STEERED and _get(settings, "model.init_args.adaptive_kl") is not None:
        return False  # β has long left where it began
    part, _, _ = key.partition(".")
    if part == "trainer":
        removed = key in NOT_REMOVED and _get(settings, key) is None
        return key not in TRAINER_KEPT and "SafetyTest" not in key and not removed
    return key in MAY_CHANGE


# -- checkpoints -----------------------------------------------------------------------------------


def find(given: str | None, folder: Path, command: str) -> Path | None:
    """The checkpoint that --ckpt_path names; None where it is not given, or not there yet.

    Raises:
        InputError: no such file; or none to measure; or one of another run folder to go on with.
    """
    if given is None:
        return None
    path = folder / FILE if given == "last" else Path(given)
    if not path.is_file():
        if given == "last" and command == "fit":
            return None
        expected = "callbacks.Checkpoint writes it" if given == "last" else "or --ckpt_path last"
        raise InputError(
            f"--ckpt_path {given}: {path} does not exist; expected a checkpoint file ({expected})"
        )
    if command == "fit" and path.resolve().parent != (folder / FILE).resolve().parent:
        raise InputError(
            f"--ckpt_path {given} does not lie in {(folder / FILE).parent}, so it is of another "
            f"run than trainer.default_root_dir {folder}; a run goes on in its own folder: give "
            "that one, or --ckpt_path last"
        )
    return path


def read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint.

    Raises:
        InputError: it was cut off, or is something else.
    """
    try:
        # Memory-mapped: nobody asks for the weights here.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{path} is not readable as a checkpoint ({one_line(error)}); restore it from a copy, "
            "or remove it to begin the run anew"
        ) from error
    if not isinstance(checkpoint, dict) or "pytorch-lightning_version" not in checkpoint:
        raise InputError(
            f"{path} is not a checkpoint of a run; expected what callbacks.Checkpoint wrote"
        )
    return checkpoint


def check(path: Path, run: Settings, command: str) -> list[Change]:
    """What has changed since the checkpoint was written, once nothing forbids to use it.

    Args:
        run: what the new command's config says, by `describe`.

    Raises:
        InputError: the checkpoint cannot be read, is of another stage, or (`fit`) its run was
            begun under other settings that may not change.
    """
    checkpoint = read(path)
    if (old := checkpoint.get(KEY)) is None:
        if command != "fit":
            return []
        raise InputError(
            f"{path} does not say under which settings it was written, so the run cannot go on "
            "from it; begin a new one in another trainer.default_root_dir"
        )
    for key in ("model.class_path", "model.init_args.role"):
        theirs, ours = _get(old["settings"], key), _get(run["settings"], key)
        if theirs != ours:
            raise InputError(
                f"{path} is of another stage ({Change(key, theirs, ours)}); give a checkpoint of "
                "this stage"
            )
    if command != "fit":
        return []
    found = changes(old, run)
    if refused := [c for c in found if not may_change(c.key, run["settings"])]:
        raise InputError(
            f"{path} was written under other settings ({'; '.join(map(str, refused))}); a run "
            "keeps them to its end: change them back, or begin a new run in another "
            "trainer.default_root_dir"
        )
    done = checkpoint.get("policy", {}).get("updates", 0)
    updates = _get(run["settings"], "data.init_args.updates")
    # In the middle of a run Lightning would begin another pass of so many updates.
    if updates is not None and updates < done + (not is_over(checkpoint)):
        raise InputError(
            f"data.init_args.updates is {updates}, and {path} has {done} behind it; give "
            f"{'at least as many' if is_over(checkpoint) else 'more'}"
        )
    return found


def is_over(checkpoint: Mapping[str, Any]) -> bool:
    """Whether it was written at the end of a policy run, which is one epoch."""
    return bool(checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])


def packed_keys(keys: Collection[str]) -> torch.Tensor:
    """The first 32 hex digits of prompt keys as bytes, (N, 16): a checkpoint holds many of them."""
    digits = "".join(sorted({key[:32] for key in keys}))
    return torch.from_numpy(np.frombuffer(bytearray.fromhex(digits), np.uint8)).reshape(-1, 16)


def unpacked_keys(packed: torch.Tensor) -> frozenset[str]:
    """The inverse of `packed_keys`."""
    return frozenset(row.tobytes().hex() for row in packed.cpu().numpy())


# -- global random generators ----------------------------------------------------------------------


def rng_state(device: torch.device) -> dict[str, Any]:
    """The state of every global generator, as plain data and tensors.

    Nothing here draws from them while training (`response_seed`), but dropout does, and so may a
    learner or a scorer that a user has written.
    """
    version, words, gauss = random.getstate()
    name, keys, place, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [str(name), np.asarray(keys).tolist(), int(place), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    """The inverse of `rng_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
