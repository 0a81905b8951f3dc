"""`hcrlhf doctor`: will this config run, and on which card? Before a weight is loaded.

Configs come in as Lightning's parser reads them; of a model config.json, generation_config.json and
the tokenizer are read, of data what lies here.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hcrlhf.backbone import LoraOptions
from hcrlhf.constraint import Constraint
from hcrlhf.errors import InputError
from hcrlhf.examples import Prompt
from hcrlhf.footprint import Footprint, Sizes, footprint
from hcrlhf.gate import Gate, Population
from hcrlhf.machine import model_config
from hcrlhf.pessimism import LOOK, PaperPessimism
from hcrlhf.preferences import squash_range
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
    read_classifier_stage,
    read_prompt_keys,
    read_stage,
    require_same_base,
)
from hcrlhf.text import ChatFormat, TextEncoder, load_tokenizer

GIB = 2**30
# Beside PyTorch's allocator, which is what is foretold: CUDA's context, cuBLAS and kernels, and
# memory that the allocator holds in pieces that fit nothing. An allowance, not a measurement.
ALLOWANCE = 0.75 * GIB
TOO_LARGE, FITS = 2, 0
INNER: tuple[Role, ...] = ("reward", "cost")
ENCODED = 1000  # of a stage's examples, to see whether they suit it: all of them would take minutes

Config = Mapping[str, Any]
Parse = Callable[[Sequence[str]], Config]


@dataclass(frozen=True)
class Base:
    """What the supervised stage settles for all that follow."""

    source: BackboneSource
    chat: ChatFormat
    lora: LoraOptions | None  # of its adapter; None where it trained the whole model


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


# -- from a config to sizes ------------------------------------------------------------------------


def _test_rows(callbacks: Sequence[Config], most: int | None) -> int:
    """Responses that the safety test, or a look at a candidate, draws together."""
    drawing = [c for c in callbacks if c["class_path"].endswith((".SafetyTest", ".BestCandidate"))]
    rows: list[int] = [callback["init_args"]["batch_size"] for callback in drawing]
    return min(max(rows, default=0), most or max(rows, default=0))


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
        return Base(source, ChatFormat(**model["chat"]), _lora(model["lora"]))
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
            stages, _ = _stages(config)
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


def _lora(options: Mapping[str, Any] | None) -> LoraOptions | None:
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


def sizes_of(config: Config, base: Base) -> Sizes:
    """What the memory of this stage depends on."""
    model, data, trainer = (
        config["model"]["init_args"],
        config["data"]["init_args"],
        config["trainer"],
    )
    lora = base.lora or _lora(model.get("lora"))
    if lora is None and kind(config) != "Supervised":
        lora = LoraOptions()  # only the supervised stage can train a whole model
    on_cpu = trainer.get("accelerator") == "cpu"
    plain = base.source.quantization == "none" and base.source.dtype == "float32"
    common = {
        "quantization": base.source.quantization,
        "dtype": base.source.dtype,
        "mixed": str(trainer.get("precision")) == "bf16-mixed",
        "lora": lora,
        "prompt": base.chat.max_prompt_tokens,
        "response": base.chat.max_response_tokens,
        "checkpointing": bool(model["gradient_checkpointing"]),
        "optimizer": model["optimizer"],
    }
    if kind(config) != "Policy":
        pairs = kind(config) == "Preference"
        batch = data["batch_size"] * (2 if pairs else 1)
        rows = min(model["group_size"] or batch, batch)
        return Sizes(
            "preference" if pairs else "supervised",
            rows=rows,
            batch=-(-batch // rows),
            accumulated=trainer.get("accumulate_grad_batches", 1) > 1,
            **common,
        )
    learner = model["learner"]
    options = learner.get("init_args") or {}
    responses = data["prompts_per_update"] * options.get("samples_per_prompt", 1)
    rows = model["micro_batch_size"]
    critics = 1 + len(model["constraints"])
    critic = options.get("critic", "none")
    inner = sum(isinstance(model[slot], str) for slot in ("reward", "cost"))
    return Sizes(
        "policy",
        rows=min(rows or responses, -(-responses // options["minibatches"])),
        score_rows=min(rows or responses, responses),
        rollout_rows=min(model["rollout_batch_size"] or responses, responses),
        frozen=inner + (base.lora is not None),
        shared_heads=critics if critic == "shared" else 0,
        critics=critics if critic == "separate" else 0,
        merged=on_cpu and plain,
        unpacked=model["unpacked_rollouts"],
        test_rows=_test_rows(trainer.get("callbacks") or [], model["rollout_batch_size"]),
        **common,
    )


def require_card(config: Config, total: int) -> str | None:
    """What to say of a card that may be too small for a stage; None where it is not.

    Args:
        total: bytes of the card.

    Raises:
        InputError: it does not hold what stays, whatever the passes take.
    """
    try:
        base = base_of(config, None)
        told = footprint(model_config(base.source), sizes_of(config, base))
    except Exception:  # a model that cannot be foretold may well run
        return None
    stays = sum(told.parts.values())
    words = (
        f"foretold are {_size(stays)} that stay, {_size(told.peak)} at the peak and about "
        f"{_size(ALLOWANCE)} beside them, on a card of {_size(total)}; hcrlhf doctor, with this "
        "config and --memory, names keys to change"
    )
    if stays > total:
        raise InputError(f"this stage does not fit: {words}")
    # Passes are made smaller where memory runs out, so that the peak alone refuses nothing.
    return f"this stage may not fit: {words}" if told.peak + ALLOWANCE > total else None


# -- what would make it fit ------------------------------------------------------------------------


def remedies(sizes: Sizes) -> dict[str, Sizes]:
    """Settings that take less, by the key that a user would change; no two change the same."""
    found: dict[str, Sizes] = {}
    if sizes.quantization == "none" and sizes.lora is not None:
        smaller = replace(sizes, quantization="nf4", dtype="bfloat16", merged=False)
        found["quantization: nf4, dtype: bfloat16 (supervised stage)"] = smaller
    if not sizes.checkpointing:
        found["gradient_checkpointing: true"] = replace(sizes, checkpointing=True)
    if sizes.stage == "policy":
        if sizes.unpacked:
            found["unpacked_rollouts: false"] = replace(sizes, unpacked=False)
        if sizes.critics:
            shared = replace(sizes, critics=0, shared_heads=sizes.critics)
            found["learner critic: shared (or hcrlhf.rloo.RLOO, without critics)"] = shared
        if max(sizes.rollout_rows, sizes.test_rows) > 1:
            half = max(sizes.rollout_rows, sizes.test_rows) // 2
            fewer = replace(
                sizes,
                rollout_rows=min(sizes.rollout_rows, half),
                test_rows=min(sizes.test_rows, half),
            )
            found[f"rollout_batch_size: {half}"] = fewer
        if max(sizes.rows, sizes.score_rows) > 1:
            half = max(sizes.rows, sizes.score_rows) // 2
            fewer = replace(
                sizes, rows=min(sizes.rows, half), score_rows=min(sizes.score_rows, half)
            )
            found[f"micro_batch_size: {half}"] = fewer
    elif sizes.rows * sizes.batch > 1:
        half = sizes.rows * sizes.batch // 2
        rows = min(sizes.rows, half)
        unit = 2 if sizes.stage == "preference" else 1
        name = (
            f"data batch_size: {max(half // unit, 1)} (and accumulate_grad_batches twice as many)"
        )
        found[name] = replace(sizes, rows=rows, batch=-(-half // rows), accumulated=True)
    for name, tokens in (("response", sizes.response), ("prompt", sizes.prompt)):
        if tokens > 64:
            key = f"chat.max_{name}_tokens: {tokens // 2} (supervised stage)"
            shorter = {name: tokens // 2}
            found[key] = replace(sizes, **shorter)  # type: ignore[arg-type]
    if sizes.lora is not None and sizes.lora.r > 4:
        half = sizes.lora.r // 2
        found[f"lora.r: {half}"] = replace(sizes, lora=replace(sizes.lora, r=half))
    if sizes.optimizer == "adamw":
        found["optimizer: adamw_8bit"] = replace(sizes, optimizer="adamw_8bit")
    return found


# Of a size, the phases that it makes smaller; one that is not here makes all of them so.
ONLY_IN = {
    "rollout_rows": "rollout",
    "test_rows": "test",
    "unpacked": "rollout",
    "score_rows": "score",
    "rows": "update",
    "batch": "update",
    "accumulated": "update",
    "checkpointing": "update",
}


def best_remedies(
    sizes: Sizes, told: Footprint, foretell: Callable[[Sizes], Footprint], count: int = 3
) -> tuple[list[tuple[str, int]], Footprint]:
    """The keys that help most, with the peak of each; and what is foretold of them together.

    Each footprint takes seconds: none is made of a key that leaves the largest phase as it is.
    """
    largest = _largest(told)
    changes = {key: _changes(sizes, smaller) for key, smaller in remedies(sizes).items()}
    with_each = {
        key: foretell(replace(sizes, **change))
        for key, change in changes.items()
        if any(ONLY_IN.get(name, largest) == largest for name in change)
    }
    peaks = sorted((with_it.peak, key) for key, with_it in with_each.items())
    best = [(key, peak) for peak, key in peaks if peak < told.peak][:count]
    if len(best) < 2:
        return best, with_each[best[0][0]] if best else told
    together = {name: value for key, _ in best for name, value in changes[key].items()}
    return best, foretell(replace(sizes, **together))


def _largest(told: Footprint) -> str:
    return max(told.phases, key=lambda phase: told.phases[phase])


def _changes(sizes: Sizes, smaller: Sizes) -> dict[str, Any]:
    pairs = ((f.name, getattr(sizes, f.name), getattr(smaller, f.name)) for f in fields(sizes))
    return {name: new for name, old, new in pairs if new != old}


# -- checks beside memory --------------------------------------------------------------------------


def checks(config: Config, base: Base) -> list[Finding]:
    """Tokenizer, earlier stages, data and the limits, as far as they can be looked at from here."""
    encoder, found = _tokenizer(base)
    stages, of_stages = _stages(config)
    found += [*of_stages, *_one_base(stages, base)]
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


# -- earlier stages --------------------------------------------------------------------------------


def _folders(config: Config) -> dict[Role, str]:
    """Of each role that this config names its folder; a scorer's where it is a model of its own."""
    model, roles = config["model"]["init_args"], ("sft", *INNER)
    named: dict[Role, Any] = {role: model.get(role) for role in roles}
    for role, value in named.items():
        if isinstance(value, Mapping):
            named[role] = (value.get("init_args") or {}).get("model")
    return {role: folder for role, folder in named.items() if isinstance(folder, str)}


def _stages(config: Config) -> tuple[dict[Role, Stage | ClassifierStage], list[Finding]]:
    """The earlier stages that are there, each in its place; and what is to be said of others."""
    model = config["model"]["init_args"]
    stages: dict[Role, Stage | ClassifierStage] = {}
    found = []
    for role, folder in _folders(config).items():
        read = read_stage if isinstance(model[role], str) else read_classifier_stage
        try:
            if (stage := read(folder, role, role)) is not None:
                stages[role] = stage
        except InputError as error:
            there = (Path(folder) / STAGE_FILE).is_file()
            seen = str(error) if there else f"{error}; until then fit refuses"
            found.append(Finding("stages", False if there else None, seen))
    return stages, found


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


# -- data and limits -------------------------------------------------------------------------------


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
    folders = _folders(config)
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
    if (gate := _gate(config)) is None:
        return
    if prompts.safety_prompts is None:
        raise InputError(
            "SafetyTest needs data.init_args.safety, a file of prompts that nothing else uses"
        )
    pool = _fitting(prompts.safety_prompts, encoder)
    gate.require_fresh(Population(pool), constraints[0].safety_prompts)


def built(described: Mapping[str, Any]) -> Any:
    """The object of a class_path with init_args."""
    module, _, name = described["class_path"].rpartition(".")
    return getattr(import_module(module), name)(**(described.get("init_args") or {}))


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
    gate = _gate(config)
    return tuple(constraints) if gate is None else gate.grant(constraints)


def _gate(config: Config) -> Gate | None:
    """The gate of the config's safety test; None without one."""
    for callback in config["trainer"].get("callbacks") or []:
        if callback["class_path"].rpartition(".")[2] == "SafetyTest":
            options = dict(callback.get("init_args") or {})
            known = ("ledger", "schedule", "sequential", "continues")
            given = {name: options[name] for name in known if name in options}
            return Gate.configured(Path(config["trainer"]["default_root_dir"]), **given)
    return None


def constraints_of(config: Config) -> list[Constraint]:
    plain = [dict(c) for c in config["model"]["init_args"]["constraints"]]
    for options in plain:
        if (bound := options.get("bound")) is not None:
            options["bound"] = built(bound)
        if isinstance(pessimism := options.get("pessimism"), Mapping):
            options["pessimism"] = PaperPessimism(**pessimism)
    return [Constraint(**options) for options in plain]


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


# -- the command -----------------------------------------------------------------------------------


def read_memory(text: str) -> int:
    """Bytes of "12GB" or "12GiB": 12 · 2³⁰ in both, as on the box of a card; "900MB" likewise.

    Raises:
        InputError: it is not a size.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([GM])i?B?\s*", text, re.IGNORECASE)
    if not found or not float(found[1]) > 0:
        raise InputError(f"--memory {text}: expected a size such as 12GB")
    return round(float(found[1]) * (GIB if found[2].upper() == "G" else 2**20))


def main(arguments: Sequence[str], parse: Parse) -> int:
    """
    Args:
        parse: reads --config arguments as `hcrlhf fit` would.
    """
    parser = argparse.ArgumentParser(
        "hcrlhf doctor",
        description="Foretell the memory of a stage and check its config, before weights load.",
    )
    parser.add_argument("--config", action="append", required=True, help="as for hcrlhf fit")
    parser.add_argument("--sft", action="append", help="config of the supervised stage, if not run")
    parser.add_argument("--memory", help="of the card, for example 12GB")
    options, more = parser.parse_known_args(arguments)
    available = read_memory(options.memory) if options.memory else None
    config = parse([*_flags(options.config), *more])
    sft = parse(_flags(options.sft)) if options.sft else None
    base = base_of(config, sft)
    sizes = sizes_of(config, base)
    own = model_config(base.source)
    on_cpu = config["trainer"].get("accelerator") == "cpu"

    def foretold(sizes: Sizes) -> Footprint:
        return footprint(own, sizes, "cpu" if on_cpu else "cuda")

    told = foretold(sizes)
    print(report(config, base, sizes, told))
    findings = checks(config, base)
    for finding in findings:
        print(f"{MARKS[finding.good]} {finding.name}: {finding.seen}")
    fits = True
    if available is not None:
        fits = told.peak + ALLOWANCE <= available
        print(f"\n{options.memory}: {'fits' if fits else 'DOES NOT FIT'}")
        if not fits:
            best, together = best_remedies(sizes, told, foretold)
            for key, peak in best:
                print(f"  {key}  -> {(peak + ALLOWANCE) / GIB:.2f} GiB")
            print(f"  {suffice(together, available, len(best))}")
    return FITS if fits and all(f.good is not False for f in findings) else TOO_LARGE


def suffice(together: Footprint, available: int, keys: int) -> str:
    """Whether the keys that were named are enough, all of them together."""
    if keys == 0:
        return "no key of this config takes less; take a smaller model"
    needed = together.peak + ALLOWANCE
    words = f"{'together' if keys > 1 else 'alone'}  -> {needed / GIB:.2f} GiB: "
    if needed <= available:
        return words + "fits"
    return words + (
        f"DOES NOT FIT, by its {_largest(together)} phase; set what is named and ask again, or "
        "take a smaller model"
    )


def _flags(paths: Sequence[str]) -> list[str]:
    return [part for path in paths for part in ("--config", path)]


def report(config: Config, base: Base, sizes: Sizes, told: Footprint) -> str:
    """The table of parts and phases."""
    kept = {"nf4": "4 bits (NF4, double quantisation)", "none": base.source.dtype}
    lines = [
        f"{kind(config)} on {base.source.model}: {told.parameters / 1e6:,.1f} million weights in "
        f"{kept[base.source.quantization]}, {told.trained / 1e6:,.2f} million trained",
        "",
        "stays     " + ", ".join(f"{name} {_size(n)}" for name, n in told.parts.items()),
        "",
        f"{'phase':10}{'beside that':>14}{''.join(f'{x:>12}' for x in SHARES)}{'peak':>12}",
    ]
    notes = {
        "rollout": f"{sizes.rollout_rows} responses of {sizes.width} tokens together",
        "score": f"{sizes.score_rows} sequences per pass",
        "update": f"{sizes.rows * sizes.batch} sequences per backward pass"
        + ("" if sizes.checkpointing else ", no gradient checkpointing"),
        "step": f"of {sizes.optimizer}",
        "test": f"{sizes.test_rows} responses of the safety test, without mixed precision",
    }
    parts = shares(sizes, told)
    for name, peak in told.phases.items():
        own = parts.get(name, {})
        columns = "".join(f"{_size(own[x]) if x in own else '':>12}" for x in SHARES)
        beside = f"{_size(told.working[name]):>14}"
        lines.append(f"{name:10}{beside}{columns}{_size(peak):>12}   {notes[name]}")
    lines += [
        "KV cache, logits, gradients: at their most; activations: what is left then, at least",
        "",
        f"peak {_size(told.peak)} of PyTorch's allocator; with an allowance of {_size(ALLOWANCE)} "
        f"for CUDA and fragments, {_size(told.peak + ALLOWANCE)}",
    ]
    if external := [s for s in ("reward", "cost") if _is_external(config, s)]:
        lines.append(f"not counted: the scorers of {' and '.join(external)}, models of their own")
    return "\n".join(lines) + "\n"


SHARES = ("KV cache", "logits", "gradients", "activations")


def shares(sizes: Sizes, told: Footprint) -> dict[str, dict[str, int]]:
    """Bytes of what a phase needs beside the parts that stay, by SHARES, where they are known.

    Cache, logits and gradients are whole, and need not all live at the peak: with them taken off,
    what is left is the least that activations and other temporaries take.
    """
    logits = {"logits": told.logits}
    update = {"gradients": 4 * told.trained}
    found = {"update": update if sizes.stage == "preference" else update | logits}
    if sizes.stage == "policy":
        found["rollout"] = {"KV cache": told.cache}
        if sizes.score_rows == sizes.rows:
            found["score"] = logits
        # Without mixed precision keys and values are of the backbone's type.
        if sizes.test_rows and (not sizes.mixed or sizes.dtype == "bfloat16"):
            found["test"] = {"KV cache": told.cache * sizes.test_rows // sizes.rollout_rows}
    for name, known in found.items():
        rest = max(told.working[name] - sum(known.values()), 0)
        found[name] = known | {"activations": rest}
    return found | {"step": update}


def _is_external(config: Config, slot: str) -> bool:
    return kind(config) == "Policy" and not isinstance(config["model"]["init_args"][slot], str)


def _size(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if count >= 0.1 * GIB else f"{count / 2**20:.1f} MiB"
