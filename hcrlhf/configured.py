"""What a config says before anything is made of it: its stages, base model, limits and gate.

Configs come in as Lightning's parser reads them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from hcrlhf.backbone import LoraOptions
from hcrlhf.constraint import Constraint
from hcrlhf.errors import InputError
from hcrlhf.gate import Gate
from hcrlhf.human import HumanLabels
from hcrlhf.pessimism import PaperPessimism
from hcrlhf.preferences import squash_range
from hcrlhf.stages import FILE as STAGE_FILE
from hcrlhf.stages import (
    BackboneSource,
    ClassifierStage,
    Role,
    Stage,
    read_classifier_stage,
    read_stage,
)
from hcrlhf.text import ChatFormat

INNER: tuple[Role, ...] = ("reward", "cost")

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Base:
    """What the supervised stage settles for all that follow."""

    source: BackboneSource
    chat: ChatFormat
    lora: LoraOptions | None  # of its adapter; None where it trained the whole model


def base_of(config: Config, sft: Config | None) -> Base:
    """
    Args:
        config: of the stage in question. sft: of the supervised stage, where it has not been run.

    Raises:
        InputError: neither the supervised folder nor its config is there.
    """
    model = config["model"]["init_args"]
    if kind(config) == "Supervised":
        source = BackboneSource(
            model["model"], model["quantization"], model["dtype"], model["revision"]
        )
        return Base(source, ChatFormat(**model["chat"]), lora_of(model["lora"]))
    folder = model["sft"]
    if (Path(folder) / STAGE_FILE).is_file():
        stage = read_stage(folder, "sft", "sft")
        lora = None
        if stage.adapter:
            record = json.loads((Path(folder) / "adapter_config.json").read_text())
            lora = LoraOptions(record["r"], record["lora_alpha"], record["target_modules"])
        source = stage.backbone
        if kind(config) == "Policy" and not stage.adapter:
            # A fully tuned model may be quantised afterwards, as reward and cost model have it.
            stages, _ = stages_of(config)
            for role in INNER:
                if isinstance(own := stages.get(role), Stage):
                    kept = own.backbone
                    source = replace(source, quantization=kept.quantization, dtype=kept.dtype)
                    break
        base = Base(source, stage.chat, lora)
    elif sft is not None:
        base = base_of(sft, None)
    else:
        raise InputError(
            f"sft: {folder} holds no {STAGE_FILE} yet, so its base model is not known; add --sft "
            "CONFIG.yaml, the config of the supervised stage"
        )
    changes = {
        name: model[name] for name in ("quantization", "dtype") if model.get(name) is not None
    }
    return replace(base, source=replace(base.source, **changes))


def lora_of(options: Mapping[str, Any] | None) -> LoraOptions | None:
    return None if options is None else LoraOptions(**options)


def kind(config: Config) -> str:
    """Supervised, Preference or Policy.

    Raises:
        InputError: another class, whose memory is not foretold.
    """
    name = str(config["model"]["class_path"]).rpartition(".")[2]
    if name not in ("Supervised", "Preference", "Policy"):
        raise InputError(
            f"the memory of {name} is not foretold; expected lightning_modules.Supervised, "
            "Preference or Policy"
        )
    return name


def folders_of(config: Config) -> dict[Role, str]:
    """Of each role that this config names its folder; a scorer's where it is a model of its own."""
    model, roles = config["model"]["init_args"], ("sft", *INNER)
    named: dict[Role, Any] = {role: model.get(role) for role in roles}
    for role, value in named.items():
        if isinstance(value, Mapping):
            named[role] = (value.get("init_args") or {}).get("model")
    return {role: folder for role, folder in named.items() if isinstance(folder, str)}


def stages_of(
    config: Config,
) -> tuple[dict[Role, Stage | ClassifierStage], list[tuple[str, InputError]]]:
    """The earlier stages that are there, each in its place; other folders, with what is wrong."""
    model = config["model"]["init_args"]
    stages: dict[Role, Stage | ClassifierStage] = {}
    wrong = []
    for role, folder in folders_of(config).items():
        read = read_stage if isinstance(model[role], str) else read_classifier_stage
        try:
            if (stage := read(folder, role, role)) is not None:
                stages[role] = stage
        except InputError as error:
            wrong.append((folder, error))
    return stages, wrong


def built(described: Mapping[str, Any]) -> Any:
    """The object of a class_path with init_args."""
    module, _, name = described["class_path"].rpartition(".")
    return getattr(import_module(module), name)(**(described.get("init_args") or {}))


def constraints_of(config: Config) -> list[Constraint]:
    plain = [dict(c) for c in config["model"]["init_args"]["constraints"]]
    for options in plain:
        if (bound := options.get("bound")) is not None:
            options["bound"] = built(bound)
        if isinstance(pessimism := options.get("pessimism"), Mapping):
            options["pessimism"] = PaperPessimism(**pessimism)
    return [Constraint(**options) for options in plain]


def callbacks_of(config: Config) -> list[Config]:
    """The trainer's callbacks; a single one need not stand in a list."""
    given = config["trainer"].get("callbacks") or []
    return given if isinstance(given, list) else [given]


def gate_of(config: Config) -> Gate | None:
    """The gate of the config's safety test; None without one."""
    for callback in callbacks_of(config):
        if callback["class_path"].rpartition(".")[2] == "SafetyTest":
            options = dict(callback.get("init_args") or {})
            known = ("ledger", "schedule", "sequential", "continues")
            given = {name: options[name] for name in known if name in options}
            if labels := options.get("human"):
                given["human"] = HumanLabels(**labels)
            folder = Path(config["trainer"]["default_root_dir"]).expanduser()
            return Gate.configured(folder, **given)
    return None


def granted(config: Config, cost: Stage | None = None) -> tuple[Constraint, ...]:
    """The constraints of a policy's config, with the δ that its safety test would be granted now.

    Args:
        cost: stage of the cost model, which knows the range of its costs; None: not known yet.

    Raises:
        InputError: they cannot be judged, or nothing is left of δ.
    """
    constraints = constraints_of(config)
    if cost is not None:
        within = squash_range(cost.squash)
        constraints = [(c.with_range(*within) if within else c).ready() for c in constraints]
    gate = gate_of(config)
    return tuple(constraints) if gate is None else gate.grant(constraints)
