"""Will `fit` take this config? Tokenizer, earlier stages, data and limits, before a weight loads.

Of a model generation_config.json and the tokenizer are read, of data what lies here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hcrlhf.configured import Base, Config, built, folders_of, gate_of, granted, kind, stages_of
from hcrlhf.constraint import Constraint
from hcrlhf.errors import InputError
from hcrlhf.examples import Prompt
from hcrlhf.gate import Population
from hcrlhf.machine import (
    beyond_positions,
    learnt_positions,
    model_config,
    require_plain_base,
)
from hcrlhf.pessimism import LOOK
from hcrlhf.rows import FORMATS
from hcrlhf.safety import HoldsSafetyPrompts
from hcrlhf.splits import require_disjoint
from hcrlhf.stages import FILE as STAGE_FILE
from hcrlhf.stages import (
    PROMPTS_FILE,
    BackboneSource,
    ClassifierStage,
    Role,
    Stage,
    read_prompt_keys,
    require_same_base,
)
from hcrlhf.text import TextEncoder, load_tokenizer

ENCODED = 1000  # of a stage's examples, to see whether they suit it: all of them would take minutes


@dataclass(frozen=True)
class Finding:
    """One check: what was looked at, whether it is well, and what was seen.

    Attributes:
        good: None where `fit` does not mind, or will not once an earlier stage has been run.
    """

    name: str
    good: bool | None
    seen: str


MARKS = {True: "ok  ", False: "NOT ", None: "note"}


def checks(config: Config, base: Base) -> list[Finding]:
    """Tokenizer, earlier stages, data and the limits, as far as they can be looked at from here."""
    encoder, found = _tokenizer(base)
    try:
        own = model_config(base.source)
        require_plain_base(base.source, own)
        if (said := beyond_positions(own, base.chat)) is not None:
            found.append(Finding("base model", False if learnt_positions(own) else None, said))
    except InputError as error:
        found.append(Finding("base model", False, str(error)))
    stages, wrong = stages_of(config)
    found += [*_unfinished(wrong), *_one_base(stages, base)]
    if kind(config) != "Policy":
        return [*found, _examples(config, encoder)]
    prompts, finding = _prompts(config)
    found.append(finding)
    look = None if prompts is None else len(_fitting(prompts.validation_prompts, encoder))
    try:
        cost = stages.get("cost")  # a model of its own may be given another range by the config
        constraints = granted(config, cost if isinstance(cost, Stage) else None)
        found += _reach(constraints, None if look is None else min(look, LOOK))
        if prompts is not None:
            _require_safety_prompts(config, prompts, encoder, constraints)
    except InputError as error:
        found.append(Finding("safety test", False, str(error)))
    return found


def _tokenizer(base: Base) -> tuple[TextEncoder | None, list[Finding]]:
    try:
        encoder = TextEncoder(load_tokenizer(base.source.model, base.source.revision), base.chat)
        length = len(encoder.prompt_ids(({"role": "user", "content": "How are you?"},)))
    except InputError as error:
        return None, [Finding("tokenizer", False, str(error))]
    own = "its own template" if encoder.tokenizer.chat_template else "the plain template"
    template = "the template of chat.chat_template" if base.chat.chat_template else own
    seen = (
        f"{template}; a response ends with {_named(encoder, encoder.stop_ids)}, padding is "
        f"{_named(encoder, [encoder.pad_id])}; 'How are you?' takes {length} tokens"
    )
    found = [Finding("tokenizer", True, seen)]
    if others := sorted(_own_stops(base.source) - set(encoder.stop_ids)):
        seen = (
            f"the model's own generation_config.json also ends answers with "
            f"{_named(encoder, others)} (eos_token_id {', '.join(map(str, others))}), after which "
            "a response would go on here; add it to chat.stop_tokens of the supervised stage"
        )
        found.append(Finding("stop tokens", None, seen))
    return encoder, found


def _named(encoder: TextEncoder, ids: Sequence[int]) -> str:
    return " or ".join(map(repr, encoder.tokenizer.convert_ids_to_tokens(ids)))


def _own_stops(source: BackboneSource) -> set[int]:
    """What a model ends its answers with by its generation_config.json, where it has one."""
    from transformers import GenerationConfig

    try:
        ids = GenerationConfig.from_pretrained(
            source.model, revision=source.revision or "main"
        ).eos_token_id
    except (OSError, ValueError):
        return set()
    return {ids} if isinstance(ids, int) else set(ids or ())


def _unfinished(wrong: Sequence[tuple[str, InputError]]) -> list[Finding]:
    """Of earlier stages that cannot be read: one that is not there yet may still be run."""
    return [
        Finding("stages", False, str(error))
        if (Path(folder) / STAGE_FILE).is_file()
        else Finding("stages", None, f"{error}; until then fit refuses")
        for folder, error in wrong
    ]


def _one_base(stages: Mapping[Role, Stage | ClassifierStage], base: Base) -> list[Finding]:
    """Whether the stages that share a backbone share one."""
    shared: dict[str, Stage] = {r: stage for r, stage in stages.items() if isinstance(stage, Stage)}
    if not shared:
        return []
    if "sft" in shared:  # quantised afterwards, perhaps
        shared["sft"] = replace(shared["sft"], backbone=base.source)
    try:
        require_same_base(shared)
    except InputError as error:
        return [Finding("stages", False, str(error))]
    return [Finding("stages", True, f"{', '.join(shared)}: finished, on the same base model")]


def _of_hub(described: Config, *keys: str) -> str | None:
    """Of the first that is no file but an id of the hub, what is said: nothing is downloaded."""
    for key in keys:
        path = Path(described["init_args"].get(key) or "")
        known = path.is_absolute() or {suffix[1:] for suffix in path.suffixes} & FORMATS.keys()
        if not (known or path.exists()):
            return f"{path}: no file here, so a data set id of the hub (not looked up)"
    return None


def _examples(config: Config, encoder: TextEncoder | None) -> Finding:
    """The examples of a supervised, reward or cost stage, as `fit` reads and encodes them."""
    if (hub := _of_hub(config["data"], "path", "validation")) is not None:
        return Finding("data", True, hub)
    try:
        module, data = built(config["model"]), built(config["data"])
        data.trainer = SimpleNamespace(lightning_module=module)  # all that is asked of it
        data.setup("fit")
        parts = {name: getattr(data, name, []) for name in ("training", "validation")}
        if encoder is not None:
            module.encoder = encoder
            for name, examples in parts.items():
                setattr(data, name, examples[:ENCODED])
            data.train_dataloader()
            data.val_dataloader()
    except InputError as error:
        return Finding("data", False, str(error))
    counts = " and ".join(f"{len(examples)} {name}" for name, examples in parts.items())
    return Finding("data", True, f"{counts} examples in {config['data']['init_args'].get('path')}")


def _prompts(config: Config) -> tuple[Any, Finding]:
    """The data module of a policy, where its files can be read, and what is said of it."""
    files = ("train", "validation", "safety", "evaluation", "demonstrations")
    if (hub := _of_hub(config["data"], *files)) is not None:
        return None, Finding("prompts", True, hub)
    folders = folders_of(config)
    try:
        prompts = built(config["data"])
        prompts.setup("fit")
        if not isinstance(prompts, HoldsSafetyPrompts):
            raise InputError(
                f"a policy is trained on prompts, and {type(prompts).__name__} holds none; set "
                "data.class_path to datamodules.Prompts"
            )
        safety = [prompt.key for prompt in prompts.safety_prompts or ()]
        for role, folder in folders.items():
            require_disjoint(safety, read_prompt_keys(folder), "safety", f"the {role} stage's")
    except InputError as error:
        return None, Finding("prompts", False, str(error))
    seen = ", ".join(f"{len(x)} {name}" for name, x in getattr(prompts, "prompts", {}).items())
    if safety:
        seen += "; the safety prompts are in no other file"
        if known := [r for r, folder in folders.items() if (Path(folder) / PROMPTS_FILE).is_file()]:
            seen += f", nor among what {', '.join(known)} learnt from"
    return prompts, Finding("prompts", True, seen)


def _fitting(prompts: Sequence[Prompt], encoder: TextEncoder | None) -> list[str]:
    """Keys of the prompts that are not too long, as far as that is known."""
    return [
        p.key for p in prompts if encoder is None or encoder.encode(p.messages, None) is not None
    ]


def _require_safety_prompts(
    config: Config, prompts: Any, encoder: TextEncoder | None, constraints: Sequence[Constraint]
) -> None:
    """
    Raises:
        InputError: a safety test that has no file, or too few prompts that no test has used.
    """
    if (gate := gate_of(config)) is None:
        return
    if prompts.safety_prompts is None:
        raise InputError(
            "SafetyTest needs data.init_args.safety, a file of prompts that nothing else uses"
        )
    pool = _fitting(prompts.safety_prompts, encoder)
    gate.require_fresh(Population(pool), constraints[0].safety_prompts)


def _reach(constraints: Sequence[Constraint], validation: int | None) -> list[Finding]:
    """What training has to reach so that the test is likely to be passed.

    Args:
        validation: prompts that a candidate is looked at on.
    """
    found = []
    for constraint in constraints:
        n, good = constraint.safety_prompts, True
        if constraint.estimand == "harm_rate":
            target = constraint.training_target(len(constraints), validation)
            good = target * n >= 1
            tail = f"{target:{'.3f' if good else '.2g'}} for a limit of {constraint.threshold:g}"
            if not good:
                tail += (
                    f": less than one harmful response in {n}, which training can neither see nor "
                    "aim at; give more safety_prompts or a higher threshold (hcrlhf power says how "
                    "likely a rate is to pass)"
                )
        else:
            margin = constraint.training_pessimism(len(constraints), None, validation)
            tail = f"about {margin:.2f} standard deviations below {constraint.threshold:g}"
        head = f"to pass on {n} prompts training aims at "
        found.append(Finding(constraint.label, good, head + tail))
    return found
