"""Memory and speed of all roles of a 1.5 to 3B model on one card: foretold, and measured on CUDA.

    python -m benchmarks.gpu predict              # anywhere: what each stage will take, no weights
    python -m benchmarks.gpu measure              # on a CUDA machine: all models, PPO and RLOO
    python -m benchmarks.gpu measure --memory 12  # the same in 12 GiB of a larger card
    python -m benchmarks.gpu report

Models have their real shapes and random weights, built from the configuration class: nothing is
downloaded, and neither memory nor speed depends on what the weights are. The sizes are those of
configs/large and configs/cards: 256 + 256 tokens, LoRA rank 8 on all linear layers, bf16-mixed.

`measure` makes the passes of one PPO update with the project's own backbone, sampling and
log-probabilities, and reads max_memory_allocated after each. Rates are of the card that it runs on;
with --memory they are still that card's. Bounds: a decoding step reads every weight once, so that
tokens/s <= rows x bandwidth / bytes of weights; an update does about 8 x weights x tokens products
(forward, recomputed forward, backward through frozen weights), against the card's own matmul rate.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hcrlhf.backbone import Backbone, LoraOptions
from hcrlhf.footprint import Footprint, Sizes, footprint
from hcrlhf.optimizers import adamw
from hcrlhf.rollouts import Decoding, sample
from hcrlhf.text import Encoded, Tokens, collate

RESULTS = Path(__file__).resolve().parent / "results"
GIB = 2**30
PROMPT = RESPONSE = 256
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2-1.5B": (
        "Qwen2Config",
        {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
        | {"num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936},
    ),
    "Qwen2.5-3B": (
        "Qwen2Config",
        {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36}
        | {"num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936},
    ),
    "Llama-3.2-3B": (
        "LlamaConfig",
        {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "head_dim": 128}
        | {"num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 128256},
    ),
    "tiny": (
        "Qwen2Config",
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000},
    ),
}
LARGE = tuple(name for name in SHAPES if name != "tiny")
BASE = Sizes(
    "policy", "nf4", "bfloat16", True, LoraOptions(8, 16), PROMPT, RESPONSE, 4, checkpointing=True
)
# The policy's frozen adapters: reference, reward and cost. Two constraints, so three critics.
STAGES: dict[str, Sizes] = {
    "supervised": replace(BASE, stage="supervised"),
    "reward or cost": replace(BASE, stage="preference", rows=8),
    "PPO, shared critics": replace(BASE, score_rows=4, rollout_rows=32, frozen=3, shared_heads=3),
    "PPO, separate critics": replace(BASE, score_rows=4, rollout_rows=32, frozen=3, critics=3),
    "RLOO": replace(BASE, score_rows=4, rollout_rows=32, frozen=3),
    "RLOO, unpacked rollouts": replace(
        BASE, score_rows=4, rollout_rows=32, frozen=3, unpacked=True
    ),
}


def configuration(name: str) -> Any:
    import transformers

    kind, options = SHAPES[name]
    return getattr(transformers, kind)(tie_word_embeddings=True, **options)


# -- foretold --------------------------------------------------------------------------------------


def predict(models: list[str]) -> None:
    rows = []
    for model in models:
        for stage, sizes in STAGES.items():
            begin = time.monotonic()
            told = footprint(configuration(model), sizes)
            rows.append({"model": model, "stage": stage, **described(told)})
            print(
                f"{model}, {stage}: {told.peak / GIB:.2f} GiB ({time.monotonic() - begin:.0f} s)",
                flush=True,
            )
        for rank in (8, 16):
            rows += roles(model, rank)
    (RESULTS / "memory.json").write_text(json.dumps(rows, indent=1) + "\n")


def described(told: Footprint) -> dict[str, Any]:
    return {**asdict(told), "peak": told.peak}


def roles(model: str, rank: int) -> list[dict[str, Any]]:
    """What one more role costs, as a share of the backbone: bytes that stay, gradients included."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        own = AutoModelForCausalLM.from_config(configuration(model))
    linear = [m for n, m in own.named_modules() if type(m) is nn.Linear and "lm_head" not in n]
    weights = sum(rank * (m.in_features + m.out_features) for m in linear)
    packed = sum(m.in_features * m.out_features for m in linear) * (0.5 + 1 / 64 + 4 / 64 / 256)
    others = sum(p.numel() for p in own.parameters()) - sum(m.weight.numel() for m in linear)
    backbone = packed + 2 * others
    kinds = {"frozen": 4.0, "trained, adamw": 16.0, "trained, adamw_8bit": 10.03}
    return [
        {"model": model, "role": kind, "rank": rank, "share": weights * bytes_ / backbone}
        for kind, bytes_ in kinds.items()
    ]


# -- measured --------------------------------------------------------------------------------------


def random_backbone(name: str, sizes: Sizes, device: torch.device) -> Backbone:
    """The roles of `sizes` on a model with random weights, 4-bit ones packed layer by layer."""
    import bitsandbytes as bnb
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(configuration(name), dtype=torch.bfloat16)
    compute = torch.bfloat16 if device.type == "cuda" else torch.float32
    for parent in list(model.modules()):
        for key, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not model.get_output_embeddings():
                packed = bnb.nn.Linear4bit(
                    child.in_features,
                    child.out_features,
                    bias=child.bias is not None,
                    compute_dtype=compute,
                    quant_type="nf4",
                )
                packed.weight = bnb.nn.Params4bit(
                    child.weight.data, requires_grad=False, quant_type="nf4"
                )
                packed.bias = child.bias
                setattr(parent, key, packed.to(device))
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model.to(device)
    model.is_loaded_in_4bit = True  # PEFT asks
    model.gradient_checkpointing_enable({"use_reentrant": False})
    backbone = Backbone(model, quantized=True)
    assert sizes.lora is not None
    backbone.add_role("policy", sizes.lora, trainable=True)
    for i in range(sizes.critics):
        backbone.add_role(f"critic{i}", sizes.lora, trainable=True)
    for i in range(sizes.frozen):
        backbone.add_role(f"frozen{i}", sizes.lora, trainable=False)
    for i in range(sizes.shared_heads + sizes.critics):
        backbone.add_head(f"critic{i}", trainable=True)
    backbone.heads.to(device)
    return backbone


class Meter:
    """Peak memory and seconds of each phase."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peaks: dict[str, int] = {}
        self.seconds: dict[str, float] = {}

    def run(self, name: str, work: Callable[[], None]) -> None:
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
            self.peaks[name] = torch.cuda.max_memory_allocated()
        self.seconds[name] = time.perf_counter() - begin


def tokens(rows: int, response: int, vocabulary: int) -> Tokens:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocabulary, (rows, PROMPT + response), generator=generator).tolist()
    return collate([Encoded(x[:PROMPT], x[PROMPT:]) for x in ids], pad_id=0)


def measure_one(name: str, stage: str, device: torch.device) -> dict[str, Any]:
    """One update's passes, twice: the first one warms kernels and makes the optimizer's states."""
    sizes = STAGES[stage]
    own = random_backbone(name, sizes, device)
    optimizer = adamw("adamw", [p for _, p in own.trained_parameters()], 1e-5, 0.0)
    vocabulary = SHAPES[name][1]["vocab_size"]
    meter = Meter(device)
    for _ in range(2):
        passes(own, sizes, optimizer, vocabulary, meter)
    told = footprint(configuration(name), sizes)
    rows, width = sizes.rows, sizes.width
    return {
        "model": name,
        "stage": stage,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "peaks": meter.peaks,
        "foretold": told.phases,
        "seconds": meter.seconds,
        "tokens/s": {
            "rollout": sizes.rollout_rows * RESPONSE / meter.seconds["rollout"],
            "score": (1 + sizes.frozen + sizes.critics) * rows * width / meter.seconds["score"],
            "update": rows * width * (1 + sizes.critics) / meter.seconds["update"],
        },
        "weights": told.parameters,
        "bytes": told.parts["backbone"],
    }


def passes(own: Backbone, sizes: Sizes, optimizer: Any, vocabulary: int, meter: Meter) -> None:
    device = meter.device
    autocast = torch.autocast(device.type, torch.bfloat16)
    prompts = tokens(sizes.rollout_rows, 0, vocabulary).to(device)
    batch = tokens(sizes.rows, RESPONSE, vocabulary).to(device)

    def rollout() -> None:
        copies = own.unpacked() if sizes.unpacked else nullcontext()
        with autocast, own.merged("policy"), copies:
            # No token stops a response, so that all have full length.
            sample(own, prompts, list(range(len(prompts))), Decoding(), RESPONSE, [-1], 0)

    def score() -> None:
        with autocast, own.inference():
            readers: dict[str, Any] = dict.fromkeys(own.roles, lambda h, t: h[:, -1])
            readers["policy"] = lambda h, t: own.log_probs(h, t)
            own.read([batch], readers)

    def update() -> None:
        own.train()
        own.restore_trainable()
        for role in ["policy", *(r for r in own.roles if r.startswith("critic"))]:
            with own.role(role):
                with autocast:
                    hidden = own.hidden(batch)
                    heads = [role] if role != "policy" else list(own.heads)[: sizes.shared_heads]
                    values = [own.values(head, hidden, batch).sum() for head in heads]
                    if role == "policy":
                        values.append(own.log_probs(hidden, batch).sum())
                    loss = torch.stack(values).sum()
                loss.backward()

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    for work in (rollout, score, update, step):
        meter.run(work.__name__, work)


def rates(device: torch.device) -> dict[str, float]:
    """The card's own: bytes/s of a copy (read and written), multiply-adds/s of bf16 products."""
    x = torch.empty(2**28 if device.type == "cuda" else 2**24, dtype=torch.bfloat16, device=device)
    a = torch.randn(4096 if device.type == "cuda" else 512, device=device).to(torch.bfloat16)
    a = a[:, None] * a[None, :]
    meter = Meter(device)
    for _ in range(2):
        meter.run("copy", lambda: [x.clone() for _ in range(5)] and None)
        meter.run("matmul", lambda: [a @ a for _ in range(20)] and None)
    return {
        "bytes/s": 5 * 2 * x.numel() * 2 / meter.seconds["copy"],
        "multiply-adds/s": 20 * len(a) ** 3 / meter.seconds["matmul"],
    }


def measure(models: list[str], memory: float | None, device: torch.device) -> None:
    if memory is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(memory * GIB / total)
    found: dict[str, Any] = {"memory": memory, **versions(device), "rates": rates(device)}
    found["rows"] = []
    for model in models:
        for stage in ("PPO, shared critics", "RLOO", "RLOO, unpacked rollouts"):
            row = measure_one(model, stage, device)
            found["rows"].append(row)
            print(json.dumps(row), flush=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if models != ["tiny"]:
        name = "gpu.json" if memory is None else f"gpu-{memory:g}gb.json"
        (RESULTS / name).write_text(json.dumps(found, indent=1) + "\n")


def versions(device: torch.device) -> dict[str, str]:
    import bitsandbytes
    import peft
    import transformers

    modules = {"torch": torch, "transformers": transformers, "peft": peft}
    names = {name: str(module.__version__) for name, module in modules.items()}  # type: ignore[attr-defined]
    card = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    return {**names, "bitsandbytes": str(bitsandbytes.__version__), "card": card}


# -- the page --------------------------------------------------------------------------------------


def gib(count: float) -> str:
    return f"{count / GIB:.2f}"


def report() -> None:
    rows = json.loads((RESULTS / "memory.json").read_text())
    lines = [
        "# Memory of 1.5 to 3B models on one card",
        "",
        "Written by `benchmarks/gpu.py report`; its docstring says what is run. 256 + 256 tokens, "
        "NF4 with double quantisation, LoRA rank 8 on all linear layers, bf16-mixed, gradient "
        "checkpointing, passes of 4 sequences (4 pairs for reward and cost), 32 responses "
        "generated together, float32 AdamW.",
        "",
        "**Foretold** (GiB of PyTorch's allocator, by running the passes on tensors without "
        "memory; against counted bytes of small models on a CPU it is within 10%, "
        "tests/test_footprint.py):",
        "",
        "| model | stage | stays | rollout | score | update | step | peak |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in (r for r in rows if "stage" in r):
        phases = row["phases"]
        cells = [
            gib(phases[p]) if p in phases else "" for p in ("rollout", "score", "update", "step")
        ]
        stays = gib(sum(row["parts"].values()))
        lines.append(
            f"| {row['model']} | {row['stage']} | {stays} | {' | '.join(cells)} | "
            f"**{gib(row['peak'])}** |"
        )
    lines += [
        "",
        "**One more role**, as a share of the backbone's bytes (an adapter in float32; a trained "
        "one with its gradient and the optimizer's states):",
        "",
        "| model | LoRA rank | frozen | trained, adamw | trained, adamw_8bit |",
        "|---|---|---|---|---|",
    ]
    shares = {(r["model"], r["rank"], r["role"]): r["share"] for r in rows if "role" in r}
    for model in LARGE:
        for rank in (8, 16):
            cells = [
                f"{shares[model, rank, k]:.1%}"
                for k in ("frozen", "trained, adamw", "trained, adamw_8bit")
            ]
            lines.append(f"| {model} | {rank} | {' | '.join(cells)} |")
    lines += ["", *measured()]
    (RESULTS / "memory.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def measured() -> list[str]:
    """What was measured on CUDA, if anything was."""
    files = sorted(RESULTS.glob("gpu*.json"))
    if not files:
        return ["**Measured on CUDA: not yet.** The command is `python -m benchmarks.gpu measure`."]
    lines = []
    for path in files:
        found = json.loads(path.read_text())
        limit = "" if found["memory"] is None else f", held to {found['memory']:g} GiB"
        names = ", ".join(f"{n} {found[n]}" for n in ("torch", "transformers", "bitsandbytes"))
        lines += [
            f"**Measured** on {found['card']}{limit} ({names}):",
            "",
            "| model | stage | phase | peak, GiB | foretold | tokens/s | share of the bound |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in found["rows"]:
            for phase in ("rollout", "score", "update"):
                lines.append(
                    f"| {row['model']} | {row['stage']} | {phase} | {gib(row['peaks'][phase])} | "
                    f"{gib(row['foretold'][phase])} | {row['tokens/s'][phase]:,.0f} | "
                    f"{share_of_bound(row, phase, found['rates']):.1%} |"
                )
        lines.append("")
    return lines


def share_of_bound(row: dict[str, Any], phase: str, own: dict[str, float]) -> float:
    if phase == "rollout":
        rows = STAGES[row["stage"]].rollout_rows
        return float(row["tokens/s"][phase] / (rows * own["bytes/s"] / row["bytes"]))
    products = {"score": 1, "update": 3}[phase] * row["weights"]
    return float(row["tokens/s"][phase] / (own["multiply-adds/s"] / products))


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and speed of 1.5 to 3B models.")
    parser.add_argument("command", choices=["predict", "measure", "report"])
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(LARGE))
    parser.add_argument("--memory", type=float, help="GiB of the card that may be used")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    if options.command == "predict":
        predict(options.models)
    elif options.command == "report":
        report()
    else:
        if options.device == "cuda" and not torch.cuda.is_available():
            raise SystemExit("no CUDA device; --device cpu --models tiny tries the code")
        measure(options.models, options.memory, torch.device(options.device))


if __name__ == "__main__":
    main()
