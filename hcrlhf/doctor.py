"""`hcrlhf doctor`: will this config run, and on which card? Before a weight is loaded.

Memory is foretold from a model's config.json alone; what else is looked at stands in checks.py.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

from hcrlhf.backbone import LoraOptions
from hcrlhf.checks import MARKS, checks
from hcrlhf.configured import Base, Config, base_of, callbacks_of, kind, lora_of
from hcrlhf.errors import InputError
from hcrlhf.footprint import Footprint, Sizes, footprint
from hcrlhf.machine import model_config

GIB = 2**30
# Beside PyTorch's allocator, which is what is foretold: CUDA's context, cuBLAS and kernels, and
# memory that the allocator holds in pieces that fit nothing. An allowance, not a measurement.
ALLOWANCE = 0.75 * GIB
TOO_LARGE, FITS = 2, 0

Parse = Callable[[Sequence[str]], Config]


# -- from a config to sizes ------------------------------------------------------------------------


def _test_rows(callbacks: Sequence[Config], most: int | None) -> int:
    """Responses that the safety test, or a look at a candidate, draws together."""
    drawing = [c for c in callbacks if c["class_path"].endswith((".SafetyTest", ".BestCandidate"))]
    rows: list[int] = [callback["init_args"]["batch_size"] for callback in drawing]
    return min(max(rows, default=0), most or max(rows, default=0))


def sizes_of(config: Config, base: Base) -> Sizes:
    """What the memory of this stage depends on."""
    model, data, trainer = (
        config["model"]["init_args"],
        config["data"]["init_args"],
        config["trainer"],
    )
    lora = base.lora or lora_of(model.get("lora"))
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
        test_rows=_test_rows(callbacks_of(config), model["rollout_batch_size"]),
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
