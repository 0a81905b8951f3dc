"""`hcrlhf doctor`: will this config run, and on which card? Before a weight is loaded.

Configs come in as Lightning's parser reads them; of a model only its config.json is read.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from hcrlhf.backbone import LoraOptions
from hcrlhf.constraint import Constraint
from hcrlhf.errors import InputError
from hcrlhf.footprint import Footprint, Sizes, footprint
from hcrlhf.gate import Gate
from hcrlhf.machine import model_config
from hcrlhf.pessimism import LOOK, PaperPessimism
from hcrlhf.stages import FILE as STAGE_FILE
from hcrlhf.stages import BackboneSource, Role, read_stage
from hcrlhf.text import ChatFormat, TextEncoder, load_tokenizer

GIB = 2**30
# Beside PyTorch's allocator, which is what is foretold: CUDA's context, cuBLAS and kernels, and
# memory that the allocator holds in pieces that fit nothing. An allowance, not a measurement.
ALLOWANCE = 0.75 * GIB
TOO_LARGE, FITS = 2, 0
INNER: tuple[Role, ...] = ("reward", "cost")

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
    """One check: what was looked at, whether it is well, and what was seen."""

    name: str
    good: bool
    seen: str


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
            for role in INNER:
                if isinstance(model[role], str) and (Path(model[role]) / STAGE_FILE).is_file():
                    own = read_stage(model[role], role, role).backbone
                    source = replace(source, quantization=own.quantization, dtype=own.dtype)
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
    """Settings that take less, by the key that a user would change."""
    found: dict[str, Sizes] = {}
    if sizes.quantization == "none" and sizes.lora is not None:
        smaller = replace(sizes, quantization="nf4", dtype="bfloat16", merged=False)
        found["quantization: nf4, dtype: bfloat16 (supervised stage)"] = smaller
    if not sizes.checkpointing:
        found["gradient_checkpointing: true"] = replace(sizes, checkpointing=True)
    if sizes.stage == "policy":
        if sizes.unpacked:
            found["unpacked_rollouts: false"] = replace(sizes, unpacked=False)
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
    if sizes.response > 64:
        half = sizes.response // 2
        found[f"chat.max_response_tokens: {half}"] = replace(sizes, response=half)
    if sizes.optimizer == "adamw":
        found["optimizer: adamw_8bit"] = replace(sizes, optimizer="adamw_8bit")
    return found


def best_remedies(
    sizes: Sizes, told: Footprint, foretell: Callable[[Sizes], Footprint], count: int = 3
) -> list[tuple[str, int]]:
    """The keys that help most, and the peak with each."""
    peaks = {key: foretell(smaller).peak for key, smaller in remedies(sizes).items()}
    best = sorted((peak, key) for key, peak in peaks.items() if peak < told.peak)[:count]
    return [(key, peak) for peak, key in best]


# -- checks beside memory --------------------------------------------------------------------------


def checks(config: Config, base: Base) -> list[Finding]:
    """Template, EOS, data and the limits, as far as they can be looked at from here."""
    encoder, finding = _tokenizer(base)
    found = [finding]
    if kind(config) == "Policy":
        prompts, validation = _prompts(config["data"], encoder)
        found.append(prompts)
        try:
            found += _reach(granted(config), validation)
        except InputError as error:
            found.append(Finding("safety test", False, str(error)))
    else:
        found.append(_file(config["data"]["init_args"]["path"]))
    return found


def _tokenizer(base: Base) -> tuple[TextEncoder | None, Finding]:
    try:
        encoder = TextEncoder(load_tokenizer(base.source.model, base.source.revision), base.chat)
        length = len(encoder.prompt_ids(({"role": "user", "content": "How are you?"},)))
    except InputError as error:
        return None, Finding("tokenizer", False, str(error))
    names = encoder.tokenizer.convert_ids_to_tokens([encoder.eos_id, encoder.pad_id])
    own = "its own template" if encoder.tokenizer.chat_template else "the plain template"
    return encoder, Finding(
        "tokenizer",
        True,
        f"{own}; a response ends with {names[0]!r}, padding is {names[1]!r}; "
        f"'How are you?' takes {length} tokens",
    )


def _file(path: str) -> Finding:
    local = Path(path)
    if local.is_file():
        return Finding("data", True, f"{path}, {local.stat().st_size / 2**20:.1f} MiB")
    if local.suffix or local.is_absolute():
        return Finding("data", False, f"{path} does not exist")
    return Finding(
        "data", True, f"{path}: no file here, so a data set id of the hub (not looked up)"
    )


def _prompts(data: Mapping[str, Any], encoder: TextEncoder | None) -> tuple[Finding, int | None]:
    """What is said of the prompts; and on how many a candidate is looked at, where it is known:
    those for validation that are not too long.
    """
    try:
        prompts = built(data)
        prompts.setup("fit")
    except InputError as error:
        return Finding("prompts", False, str(error)), None
    counts = ", ".join(f"{len(x)} {name}" for name, x in prompts.prompts.items())
    finding = Finding("prompts", True, f"{counts}; the safety prompts are in no other file")
    messages = [prompt.messages for prompt in prompts.validation_prompts]
    fit = [m for m in messages if encoder is None or encoder.encode(m, None) is not None]
    return finding, min(len(fit), LOOK)


def built(described: Mapping[str, Any]) -> Any:
    """The object of a class_path with init_args."""
    module, _, name = described["class_path"].rpartition(".")
    return getattr(import_module(module), name)(**(described.get("init_args") or {}))


def granted(config: Config) -> tuple[Constraint, ...]:
    """The constraints of a policy's config, with the δ that its safety test would be granted now.

    Raises:
        InputError: they cannot be judged, or nothing is left of δ.
    """
    constraints = constraints_of(config)
    for callback in config["trainer"].get("callbacks") or []:
        if callback["class_path"].rpartition(".")[2] == "SafetyTest":
            options = dict(callback.get("init_args") or {})
            known = ("ledger", "schedule", "sequential", "continues")
            given = {name: options[name] for name in known if name in options}
            gate = Gate.configured(Path(config["trainer"]["default_root_dir"]), **given)
            return gate.grant(constraints)
    return tuple(constraints)


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
        head = f"to pass on {constraint.safety_prompts} prompts training aims at "
        if constraint.estimand == "harm_rate":
            target = constraint.training_target(len(constraints), validation)
            tail = f"{target:.3f} for a limit of {constraint.threshold:g}"
        else:
            margin = constraint.training_pessimism(len(constraints), None, validation)
            tail = f"about {margin:.2f} standard deviations below {constraint.threshold:g}"
        found.append(Finding(constraint.label, True, head + tail))
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
        print(f"{'ok  ' if finding.good else 'NOT '} {finding.name}: {finding.seen}")
    fits = True
    if available is not None:
        fits = told.peak + ALLOWANCE <= available
        print(f"\n{options.memory}: {'fits' if fits else 'DOES NOT FIT'}")
        if not fits:
            for key, peak in best_remedies(sizes, told, foretold):
                print(f"  {key}  -> {(peak + ALLOWANCE) / GIB:.2f} GiB")
    return FITS if fits and all(f.good for f in findings) else TOO_LARGE


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
        f"{'phase':10}{'beside that':>14}{'peak':>12}",
    ]
    notes = {
        "rollout": f"{sizes.rollout_rows} responses of {sizes.width} tokens together, "
        f"KV cache {_size(told.cache)}",
        "score": f"{sizes.score_rows} sequences per pass",
        "update": f"{sizes.rows * sizes.batch} sequences per backward pass"
        + ("" if sizes.checkpointing else ", no gradient checkpointing")
        + ("" if kind(config) == "Preference" else f", logits {_size(told.logits)} at a time"),
        "step": f"gradients, and {sizes.optimizer}",
        "test": f"{sizes.test_rows} responses of the safety test, without mixed precision",
    }
    for name, peak in told.phases.items():
        beside = _size(told.working[name])
        lines.append(f"{name:10}{beside:>14}{_size(peak):>12}   {notes[name]}")
    lines += [
        "",
        f"peak {_size(told.peak)} of PyTorch's allocator; with an allowance of {_size(ALLOWANCE)} "
        f"for CUDA and fragments, {_size(told.peak + ALLOWANCE)}",
    ]
    if external := [s for s in ("reward", "cost") if _is_external(config, s)]:
        lines.append(f"not counted: the scorers of {' and '.join(external)}, models of their own")
    return "\n".join(lines) + "\n"


def _is_external(config: Config, slot: str) -> bool:
    return kind(config) == "Policy" and not isinstance(config["model"]["init_args"][slot], str)


def _size(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if count >= 0.1 * GIB else f"{count / 2**20:.1f} MiB"
