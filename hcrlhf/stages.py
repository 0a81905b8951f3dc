"""`hcrlhf.json`: what a finished stage says of itself, and how the next one reads and checks it.

A stage folder holds weights (a LoRA adapter, or a whole model after full supervised tuning), a
score head where the role has one, the tokenizer and this file. Later stages are given the folder
and nothing else: base model, template, system prompt and lengths are read here and compared.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from hcrlhf.errors import InputError
from hcrlhf.hashing import file_sha256, write_text
from hcrlhf.text import ChatFormat, one_line

FORMAT = 1
FILE = "hcrlhf.json"
PROMPTS_FILE, PROMPTS_HASH = "training_prompts.txt", "training_prompts_sha256"
CLASSIFIER = "sequence_classifier"
# Of a hub snapshot: weights once, in the format that runs no code, and what a tokenizer needs.
SNAPSHOT = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]

Role = Literal["sft", "reward", "cost", "policy"]


@dataclass(frozen=True)
class BackboneSource:
    """Which frozen weights the adapters of a run sit on.

    Args:
        model: Hugging Face folder or hub id. In `hcrlhf.json` a local folder is stored relative
            to the stage folder.
        revision: commit, tag or branch of a hub id; None is its main branch.
        quantization: "none" or "nf4" (bitsandbytes 4-bit NormalFloat, double quantisation).
        dtype: of the weights that are not quantised.
    """

    model: str
    quantization: Literal["none", "nf4"] = "none"
    dtype: Literal["float32", "bfloat16"] = "float32"
    revision: str | None = None

    @property
    def folder(self) -> str:
        """Where the weights lie, downloaded if need be (`local_model`)."""
        return local_model(self.model, self.revision)


@dataclass(frozen=True)
class ScoreMoments:
    """Mean and standard deviation (ddof 1) of the scores of held-out responses."""

    mean: float
    std: float
    count: int


@dataclass(frozen=True)
class Stage:
    """The content of `hcrlhf.json`.

    Attributes:
        role: what the weights are for.
        backbone: the frozen weights; its model is an absolute path or a hub id once read.
        fingerprint: SHA-256 of those weights and their config.
        adapter: True where the folder holds a LoRA adapter, False where it is a whole model.
        chat: template, system prompt and lengths.
        tokens: `TextEncoder.identity` of its tokenizer and template; None: not known.
        moments: of the scores, where the role scores.
        calibration: slope and intercept of P(harmful) = σ(a c + b), for a cost model.
        squash: S of the cost c' = S tanh(c / S) that policy and safety test see; None: c itself.
        sign_weight: of a cost model's sign terms; 0 leaves its zero arbitrary. None: not known.
        metrics: what was measured on held-out data.
    """

    role: Role
    backbone: BackboneSource
    fingerprint: str
    adapter: bool
    chat: ChatFormat
    tokens: str | None = None
    moments: ScoreMoments | None = None
    calibration: dict[str, float] | None = None
    squash: float | None = None
    sign_weight: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ClassifierStage:
    """The content of `hcrlhf.json` beside a reward or cost model that is a model of its own.

    Attributes:
        role: "reward" or "cost".
        fingerprint: SHA-256 of the weights and config in the same folder.
        max_tokens: of prompt and response together.
        moments, calibration, squash, sign_weight, metrics: `Stage`.
    """

    role: Role
    fingerprint: str
    max_tokens: int
    moments: ScoreMoments | None = None
    calibration: dict[str, float] | None = None
    squash: float | None = None
    sign_weight: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)


def held_out(metrics: Mapping[str, float]) -> str:
    """What a stage has measured on held-out examples, in words."""
    if "loss" in metrics:
        return f"held out: loss {metrics['loss']:.3f}"
    if "accuracy" not in metrics:
        return "nothing was held out"
    low, high = metrics["accuracy_low"], metrics["accuracy_high"]
    doubt = ", not told from chance" if low <= 0.5 <= high else ""
    return (
        f"held out: accuracy {metrics['accuracy']:.3f} ({low:.3f} to {high:.3f}) on "
        f"{metrics['pairs']:.0f} pairs{doubt}"
    )


def require_tokens(stage: Stage, identity: str, slot: str) -> None:
    """
    Args:
        identity: `TextEncoder.identity` of the tokenizer that lies in the stage's folder.

    Raises:
        InputError: it is not the one that the stage was trained with.
    """
    if stage.tokens is not None and stage.tokens != identity:
        raise InputError(
            f"{slot}: the tokenizer or chat template in its folder is not the one that this stage "
            "was trained with; restore it, or run the stages again"
        )


def write_stage(folder: Path, stage: Stage, prompt_keys: Collection[str]) -> None:
    """Writes `hcrlhf.json` and the keys of the prompts that the stage was trained on.

    The keys are what lets a policy run refuse a safety set that an earlier stage has seen.
    """
    record = asdict(stage)
    model = stage.backbone.model
    if os.path.isdir(model):
        # Both real: a relative path out of a folder that is a link would lead somewhere else.
        real = os.path.relpath(os.path.realpath(model), os.path.realpath(folder))
        record["backbone"]["model"] = real
    _write(folder, record, prompt_keys)


def write_classifier_stage(
    folder: Path, stage: ClassifierStage, prompt_keys: Collection[str]
) -> None:
    """The same for a sequence classifier."""
    _write(folder, {"kind": CLASSIFIER, **asdict(stage)}, prompt_keys)


def _write(folder: Path, record: Mapping[str, Any], prompt_keys: Collection[str]) -> None:
    prompts = folder / PROMPTS_FILE
    prompts.write_text("".join(f"{key}\n" for key in sorted({key[:32] for key in prompt_keys})))
    whole = {"format": FORMAT, **record, PROMPTS_HASH: file_sha256(prompts)}
    # Last of all, and whole: where it stands the stage is finished.
    write_text(folder / FILE, json.dumps(whole, indent=2) + "\n")


def read_stage(folder: str, expected: Role, slot: str) -> Stage:
    """Reads the stage in `folder` for the configuration key `slot`.

    Raises:
        InputError: no finished stage there, another role, or another backbone than it was
            trained on.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise InputError(
            f"{slot}: {folder} holds no {FILE}; expected the folder of a finished {expected} stage"
            f" (hcrlhf fit with the {expected} config writes it)"
        )
    with _readable(slot, path, expected):
        record = _read(slot, path)
        if record.get("kind") == CLASSIFIER:
            raise InputError(
                f"{slot}: {folder} is a model of its own, not an adapter; write {slot}: "
                f"{{class_path: hcrlhf.scorers.SequenceClassifier, init_args: {{model: {folder}}}}}"
            )
        backbone = BackboneSource(**record["backbone"])
        stage = Stage(
            role=record["role"],
            backbone=replace(backbone, model=_resolve(folder, backbone.model)),
            fingerprint=record["fingerprint"],
            adapter=record["adapter"],
            chat=ChatFormat(**record["chat"]),
            tokens=record.get("tokens"),
            **_of_scores(record),
        )
    _require_role(slot, folder, stage.role, expected)
    return stage


def read_classifier_stage(folder: str, expected: Role, slot: str) -> ClassifierStage | None:
    """What `lightning_modules.PreferenceClassifier` left in `folder`; None in any other folder.

    Raises:
        InputError: it has another role, or is an adapter on the shared backbone.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    with _readable(slot, path, expected):
        record = _read(slot, path)
        if record.get("kind") != CLASSIFIER:
            raise InputError(
                f"{slot}: {folder} is a stage on the shared backbone; write {slot}: {folder}"
            )
        stage = ClassifierStage(
            role=record["role"],
            fingerprint=record["fingerprint"],
            max_tokens=record["max_tokens"],
            **_of_scores(record),
        )
    _require_role(slot, folder, stage.role, expected)
    return stage


@contextmanager
def _readable(slot: str, path: Path, expected: Role) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{slot}: {path} is not readable ({type(error).__name__}: {error}); "
            f"run the {expected} stage again"
        ) from error


def _read(slot: str, path: Path) -> Mapping[str, Any]:
    record: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if record["format"] != FORMAT:
        raise InputError(
            f"{slot}: {path} has format {record['format']}, this version reads {FORMAT}"
        )
    return record


def _of_scores(record: Mapping[str, Any]) -> dict[str, Any]:
    """What every record of a model that scores has."""
    return {
        "moments": ScoreMoments(**record["moments"]) if record["moments"] else None,
        "calibration": record["calibration"],
        "squash": record["squash"],
        "sign_weight": record["sign_weight"],
        "metrics": record["metrics"],
    }


def _require_role(slot: str, folder: str, role: Role, expected: Role) -> None:
    if role != expected:
        raise InputError(f"{slot}: {folder} is a {role} model; expected a {expected} model there")


def _resolve(folder: str, model: str) -> str:
    local = Path(folder, model)
    return str(local.resolve()) if local.is_dir() else model


def read_prompt_keys(folder: str) -> frozenset[str]:
    """Keys (first 32 hex digits) of the prompts that the stage in `folder` was trained on.

    Empty where the folder holds no list and is no stage.

    Raises:
        InputError: a stage without its list, which would read as one that saw no prompt, or with
            another one than it wrote.
    """
    path, of_stage = Path(folder) / PROMPTS_FILE, Path(folder) / FILE
    if not path.is_file() and of_stage.is_file():
        raise InputError(
            f"{folder} has no {PROMPTS_FILE}, by which a safety test knows what the stage was "
            "trained on; copy the folder whole, or train the stage again"
        )
    if not path.is_file():
        return frozenset()
    # Only a stage writes the hash, a merged export does not.
    if of_stage.is_file() and read_record(of_stage).get(PROMPTS_HASH) != file_sha256(path):
        raise InputError(
            f"{path} is not the list that the stage wrote, and a safety test could not know what "
            "it was trained on; restore the file from a copy, or train the stage again"
        )
    return frozenset(path.read_text().split())


def read_record(path: Path) -> Mapping[str, Any]:
    """A file that holds a JSON object; one of anything else reads as empty.

    Raises:
        InputError: it cannot be read.
    """
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable ({one_line(error)})") from error
    return record if isinstance(record, Mapping) else {}


def require_same_base(stages: Mapping[str, Stage]) -> Stage:
    """The first stage, once all agree on backbone, quantisation, template and lengths.

    Args:
        stages: configuration slot -> stage.

    Raises:
        InputError: two of them differ; names both slots and values.
    """
    (first_slot, first), *rest = stages.items()
    for slot, stage in rest:
        # The path may differ (a moved run folder): the fingerprint is the identity.
        for name, ours, theirs in [
            ("backbone weights", first.fingerprint[:12], stage.fingerprint[:12]),
            ("quantization", first.backbone.quantization, stage.backbone.quantization),
            ("dtype", first.backbone.dtype, stage.backbone.dtype),
            *((key, value, getattr(stage.chat, key)) for key, value in asdict(first.chat).items()),
        ]:
            if ours != theirs:
                raise InputError(
                    f"{first_slot} and {slot} differ in {name}: {ours!r} and {theirs!r}; "
                    f"train {slot} again on the backbone of {first_slot}"
                )
        if None not in (first.tokens, stage.tokens) and first.tokens != stage.tokens:
            raise InputError(
                f"{first_slot} and {slot} were trained with another tokenizer or chat template "
                f"(that of the base model has changed); train {slot} again after {first_slot}"
            )
    return first


def local_model(model: str, revision: str | None = None) -> str:
    """The folder itself, or that of a hub id's snapshot: the cache's, else downloaded now.

    Raises:
        InputError: neither a folder nor a model that can be had.
    """
    if Path(model).is_dir():
        return model
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise InputError(f"the model folder {model!r} does not exist")
    from huggingface_hub import snapshot_download

    download = partial(snapshot_download, model, revision=revision, allow_patterns=SNAPSHOT)
    try:
        cached = str(download(local_files_only=True))
        if _holds_weights(Path(cached)):  # `hcrlhf doctor` leaves config.json and the tokenizer
            return cached
    except Exception:  # nothing of it is in the cache
        pass
    try:
        return str(download())
    except Exception as error:
        raise hub_refusal(model, revision, error) or InputError(
            f"the model {model!r} is neither a folder nor in the Hugging Face cache, and the hub "
            f"could not be reached ({type(error).__name__}); give the folder of a model, or "
            "download it where there is a network"
        ) from error


def hub_refusal(model: str, revision: str | None, error: BaseException | None) -> InputError | None:
    """Why the hub does not give a model, however a library wrapped that; None: it did not say."""
    from huggingface_hub import errors

    while error is not None:
        if isinstance(error, errors.GatedRepoError):
            return InputError(
                f"the hub asks who you are before it gives {model}: accept the model's licence on "
                f"https://huggingface.co/{model}, then `hf auth login`, or give a local folder"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return InputError(f"the hub has no revision {revision!r} of {model}")
        if isinstance(error, errors.RepositoryNotFoundError):
            return InputError(
                f"the hub has no model {model!r} that you may read; check the id, or "
                "`hf auth login`"
            )
        error = error.__cause__
    return None


def _holds_weights(folder: Path) -> bool:
    """Whether all weight files are there, by the index where there are several."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return all((folder / file).is_file() for file in files)
    return any(folder.glob("*.safetensors"))


def require_own_base(folder: Path, source: BackboneSource, own: str) -> None:
    """Of a plain PEFT adapter, which will be loaded on the model that its own config names.

    Args:
        folder: of the adapter.
        source, own: the backbone that it would be tested on, and its fingerprint.

    Raises:
        InputError: its base model has other weights, or cannot be found to be compared.
    """
    config = read_record(folder / "adapter_config.json")
    named, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(named, str):
        raise InputError(
            f"policy: the adapter in {folder} does not say which model it was made for; write a "
            "folder or hub id of it as base_model_name_or_path into its adapter_config.json"
        )
    if (named, revision) == (source.model, source.revision):
        return
    place = named if Path(named).is_dir() else _resolve(str(folder), named)
    try:
        theirs = fingerprint(place, revision)
    except InputError as error:
        raise InputError(
            f"policy: the adapter in {folder} names {named!r} as its base model, which cannot be "
            f"compared with {source.model} ({error}); write a folder of that model as "
            "base_model_name_or_path into its adapter_config.json"
        ) from error
    if theirs != own:
        raise InputError(
            f"policy: the adapter in {folder} was made for {named}, whose config or weight "
            f"files are not those of {source.model}; it would be tested on the one and used on the "
            "other. Where they are the same model, write that folder as base_model_name_or_path "
            "into its adapter_config.json"
        )


def fingerprint(model: str, revision: str | None = None) -> str:
    """SHA-256 over the config and weight files of a model folder, or of a hub snapshot.

    Raises:
        InputError: no such folder, or no weights in it.
    """
    folder = Path(local_model(model, revision))
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    if not files or not (folder / "config.json").is_file():
        raise InputError(
            f"{model} is not a Hugging Face model folder: expected config.json and *.safetensors"
        )
    digest = hashlib.sha256()
    for path in [folder / "config.json", *files]:
        digest.update(path.name.encode() + b"\0" + file_sha256(path).encode())
    return digest.hexdigest()
