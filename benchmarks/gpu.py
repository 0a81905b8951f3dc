"""Memory and speed of all roles of a 1.5 to 3B model on one card: foretold, and measured on CUDA.

    python -m benchmarks.gpu predict                # anywhere: what each stage takes, no weights
    python -m benchmarks.gpu measure                # on a CUDA machine: all models, all stages
    python -m benchmarks.gpu measure --memory 12 8  # and once more in so many GiB of a larger card
    python -m benchmarks.gpu report

Models have their real shapes and random weights, built from the configuration class: nothing is
downloaded, and neither memory nor speed depends on what the weights are. The sizes are those of
configs/large and configs/cards: up to 256 + 256 tokens, LoRA rank 8 on all linear layers,
bf16-mixed.

`measure` builds each model once, gives it the roles of one stage after the other, and makes the
passes of one update of each with the project's own backbone, sampling and log-probabilities. Every
pass is made twice, the first time to warm the kernels, and the second one counts. Results are
printed and written after every stage: what was measured before an error or an end stays. Rates are
of the card that it runs on; with --memory they are still that card's.

Peaks are max_memory_allocated; beside them stand the allocator's reserved bytes and what the card
lacks beside these (CUDA's context and its libraries). `--memory` limits what the allocator reserves
to that many GiB less doctor's allowance for the rest.

Bounds: a decoding step reads every weight once, so that tokens/s <= rows x bandwidth / bytes of
weights; an update does about 3 x weights x tokens multiply-adds (forward, recomputed forward,
backward through frozen weights), against the card's own matmul rate. samples/s: of an update of
rollout_rows responses, its rollout, scoring and steps together.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import re
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from hcrlhf import machine, optimizers
from hcrlhf.backbone import Backbone, LoraOptions
from hcrlhf.doctor import ALLOWANCE
from hcrlhf.footprint import Footprint, Sizes, footprint
from hcrlhf.gradients import known_gradient
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
# In an order in which every stage has the roles of the ones before it.
ROLES = replace(BASE, score_rows=4, rollout_rows=32, test_rows=32, frozen=3)
STAGES: dict[str, Sizes] = {
    "supervised": replace(BASE, stage="supervised", accumulated=True),
    "reward or cost": replace(BASE, stage="preference", rows=8, accumulated=True),
    "RLOO": ROLES,
    "RLOO, unpacked rollouts": replace(ROLES, unpacked=True),
    "PPO, shared critics": replace(ROLES, shared_heads=3),
    "PPO, separate critics": replace(ROLES, critics=3),
    "PPO, separate critics, adamw_8bit": replace(ROLES, critics=3, optimizer="adamw_8bit"),
}
LIMITED = "PPO, shared critics"  # what is measured within the limits of smaller cards
WITHOUT_ROLLOUT = ("PPO, separate critics", "PPO, separate critics, adamw_8bit")  # as the one above
PHASES = ("rollout", "score", "update", "step", "test")
WARM = 8  # tokens of a response that only warms kernels


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


def random_model(name: str, device: torch.device) -> Any:
    """A model with random weights on the device, its linear layers packed in 4 bits one by one."""
    import bitsandbytes as bnb
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(
            configuration(name), dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    compute = torch.bfloat16 if device.type == "cuda" else torch.float32
    parents = list(model.named_modules())
    while parents:
        _, parent = parents.pop()
        for key, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not model.get_output_embeddings():
                packed = bnb.nn.Linear4bit(
                    child.in_features,
                    child.out_features,
                    bias=child.bias is not None,
                    compute_dtype=compute,
                    quant_type="nf4",
                    device="meta",  # its own weight would be drawn for nothing
                )
                packed.weight = bnb.nn.Params4bit(
                    child.weight.data.cpu() if device.type == "cpu" else child.weight.data,
                    requires_grad=False,
                    quant_type="nf4",
                )
                packed.bias = child.bias
                setattr(parent, key, packed.to(device))
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model.is_loaded_in_4bit = True  # PEFT asks
    model.gradient_checkpointing_enable({"use_reentrant": False})
    release(device)
    return model


def release(device: torch.device) -> None:
    """Gives back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass
class Meter:
    """Of each phase, in its last run: bytes (on CUDA) and seconds."""

    device: torch.device
    peaks: dict[str, int] = field(default_factory=dict)
    reserved: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, name: str, work: Callable[[], object]) -> None:
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
            self.peaks[name] = torch.cuda.max_memory_allocated()
            self.reserved[name] = torch.cuda.max_memory_reserved()
        self.seconds[name] = time.perf_counter() - begin


def tokens(rows: int, response: int, vocabulary: int, shortest: int = PROMPT) -> Tokens:
    """Prompts of `shortest` to PROMPT tokens, padded on the left, and responses of full length."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocabulary, (rows, PROMPT + response), generator=generator).tolist()
    cut = [(PROMPT - shortest) * i // rows for i in range(rows)]
    return collate(
        [Encoded(x[n:PROMPT], x[PROMPT:]) for n, x in zip(cut, ids, strict=True)], pad_id=0
    )


def passes(sizes: Sizes) -> int:
    """Backward passes of an update that is measured; two stand for many that add up."""
    return 2 if sizes.passes_add_up else 1


class Bench:
    """One model on a device, and the passes of an update with the roles that a stage needs.

    Roles are only added: every stage asks for those of the stages before it, and some.
    """

    def __init__(self, model: str, device: torch.device) -> None:
        self.model, self.device = model, device
        self.vocabulary: int = SHAPES[model][1]["vocab_size"]
        self.own = Backbone(random_model(model, device), quantized=True)

    def give(self, sizes: Sizes) -> tuple[list[str], list[str]]:
        """Adds what is missing of a stage's roles and heads; the critics, and the shared heads."""
        critics = [f"critic{i}" for i in range(sizes.critics)]
        heads = [f"shared{i}" for i in range(sizes.shared_heads)]
        heads += ["score"] if sizes.stage == "preference" else []
        for role in ["policy", *(f"frozen{i}" for i in range(sizes.frozen)), *critics]:
            if role not in self.own.roles:
                frozen = role.startswith("frozen")
                self.own.add_role(role, sizes.lora, trainable=not frozen)
        for head in [*heads, *critics]:
            if head not in self.own.heads:
                self.own.add_head(head, trainable=True)
        self.own.to(self.device)
        return critics, heads

    def draw(self, count: int, length: int) -> None:
        prompts = tokens(count, 0, self.vocabulary, PROMPT // 2).to(self.device)
        with self.own.merged("policy"):
            # No token stops a response, so that all have full length.
            found = sample(self.own, prompts, list(range(count)), Decoding(), length, [-1], 0)
        assert found.response_ids.shape == (count, length)

    def passes(self, sizes: Sizes) -> dict[str, Callable[[int], None]]:
        """Those of a stage's update, in their order, by how many tokens a response has."""
        own, device = self.own, self.device
        critics, shared = self.give(sizes)
        # As Lightning does it: a weight is cast for each use, and no copy is kept.
        autocast = torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
        trained = [p for _, p in own.trained_parameters()]
        optimizer = adamw(cast(optimizers.Name, sizes.optimizer), trained, 1e-5, 0.0)
        batch = tokens(sizes.rows, RESPONSE, self.vocabulary).to(device)

        def rollout(length: int) -> None:
            with autocast, own.unpacked() if sizes.unpacked else nullcontext():
                self.draw(sizes.rollout_rows, length)

        def test(length: int) -> None:  # packed, without mixed precision
            self.draw(sizes.test_rows, length)

        def score(length: int) -> None:
            frozen = [role for role in own.roles if role.startswith("frozen")]
            readers: dict[str, Any] = dict.fromkeys([*frozen, *critics], lambda h, t: h[:, -1])
            readers["policy"] = own.log_probs
            with autocast, own.inference():
                found = own.read([batch], readers)
            assert bool(found["policy"][0].isfinite().all())

        read = own.scores if sizes.stage == "preference" else own.values

        def loss(role: str) -> Tensor:
            with autocast:
                hidden = own.hidden(batch)
                heads = shared if role == "policy" else [role]
                losses = [read(head, hidden, batch).sum() for head in heads]
                if role == "policy" and sizes.stage != "preference":
                    losses.append(own.log_probs(hidden, batch).sum())
                return torch.stack(losses).sum()

        def update(length: int) -> None:
            own.train()
            own.restore_trainable()
            for role in ["policy", *critics] * passes(sizes):
                with own.role(role):
                    if sizes.stage == "policy":
                        result = loss(role)
                    else:  # batches that add up
                        result = known_gradient(partial(loss, role), trained)
                    result.backward()

        def step(length: int) -> None:
            optimizer.step()
            optimizer.zero_grad()

        found: dict[str, Callable[[int], None]] = {"update": update, "step": step}
        if sizes.stage == "policy":
            found = {"score": score, **found}
        return {"rollout": rollout, **found, "test": test} if sizes.rollout_rows else found

    def measured(self, stage: str) -> dict[str, Any]:
        """A stage's update, after a short one that warms kernels and makes optimizer states."""
        sizes, meter = STAGES[stage], Meter(self.device)
        if stage in WITHOUT_ROLLOUT:
            sizes = replace(sizes, rollout_rows=0)
        work = self.passes(sizes)
        if stage != LIMITED:
            work.pop("test", None)  # the same everywhere, and slow
        for length in (WARM, RESPONSE):
            for name, run in work.items():
                release(self.device)  # what a phase reserves is its own
                meter.run(name, partial(run, length))
        seconds, rows = meter.seconds, sizes.rows
        seconds["update"] /= passes(sizes)
        read = {"score": 1 + sizes.frozen + sizes.critics, "update": 1 + sizes.critics}
        speed = {n: rows * sizes.width * k / seconds[n] for n, k in read.items() if n in work}
        row: dict[str, Any] = {
            "peaks": meter.peaks,
            "reserved": meter.reserved,
            "outside": outside(self.device),
            "seconds": seconds,
            "tokens/s": speed,
        }
        if "rollout" in work:
            count = sizes.rollout_rows
            speed["rollout"] = count * RESPONSE / seconds["rollout"]
            each = (seconds["score"] + seconds["update"]) / rows
            row["samples/s"] = count / (seconds["rollout"] + count * each + seconds["step"])
        return row


def outside(device: torch.device) -> int:
    """Bytes of the card that are neither free nor the allocator's: contexts and libraries."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info()
    return int(total - free - torch.cuda.memory_reserved())


def rates(device: torch.device) -> dict[str, float]:
    """The card's own: bytes/s of a copy (read and written), multiply-adds/s of bf16 products."""
    x = torch.empty(2**28 if device.type == "cuda" else 2**24, dtype=torch.bfloat16, device=device)
    a = torch.randn(4096 if device.type == "cuda" else 512, device=device).to(torch.bfloat16)
    a = a[:, None] * a[None, :]
    meter = Meter(device)
    for _ in range(2):
        meter.run("copy", lambda: [x.clone() for _ in range(5)])
        meter.run("matmul", lambda: [a @ a for _ in range(20)])
    return {
        "bytes/s": 5 * 2 * x.numel() * 2 / meter.seconds["copy"],
        "multiply-adds/s": 20 * len(a) ** 3 / meter.seconds["matmul"],
    }


def measure(models: list[str], limits: list[float], device: torch.device, folder: Path) -> None:
    """Every stage of every model, and LIMITED once more within each limit in GiB."""
    machine.choose_attention()
    folder.mkdir(parents=True, exist_ok=True)
    card = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    path = folder / f"gpu-{re.sub('[^a-z0-9]+', '-', card.lower())}.json"
    found: dict[str, Any] = {"card": card, **versions(device), "rates": rates(device), "rows": []}
    print(json.dumps(found), flush=True)
    if path.is_file():
        before = json.loads(path.read_text())
        if all(before[name] == found[name] for name in found if name not in ("rates", "rows")):
            found["rows"] = before["rows"]
    release(device)
    for model in models:
        bench: Bench | None = None
        for stage, memory in [(s, m) for s in STAGES for m in (None, *limits)]:
            if memory is not None and stage != LIMITED:
                continue
            row: dict[str, Any] = {"model": model, "stage": stage, "memory": memory}
            try:
                limit(memory, device)
                bench = bench or Bench(model, device)
                row |= bench.measured(stage)
            except Exception as error:  # what the others have found stays
                row["error"] = traceback.format_exception_only(error)[-1].strip()
                traceback.print_exc()
            # Not before the error is gone, whose frames hold what was allocated.
            limit(None, device)
            release(device)
            keys = ("model", "stage", "memory")
            others = [r for r in found["rows"] if any(r[k] != row[k] for k in keys)]
            found["rows"] = [*others, row]
            print(json.dumps(row), flush=True)
            path.write_text(json.dumps(found, indent=1) + "\n")
        del bench
        release(device)
    print("\n".join(tables(found)))


def limit(memory: float | None, device: torch.device) -> None:
    """What the allocator may reserve: that many GiB less what a card needs besides; None: all."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        allowed = total if memory is None else memory * GIB - ALLOWANCE
        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total))


def versions(device: torch.device) -> dict[str, str]:
    import bitsandbytes
    import peft
    import transformers

    modules: dict[str, Any] = {
        "torch": torch,
        "transformers": transformers,
        "peft": peft,
        "bitsandbytes": bitsandbytes,
    }
    cuda = str(torch.version.cuda) if device.type == "cuda" else "none"
    return {name: str(module.__version__) for name, module in modules.items()} | {"cuda": cuda}


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
        f"| model | stage | stays | {' | '.join(PHASES)} | peak |",
        "|---|---|---" + "|---" * len(PHASES) + "|---|",
    ]
    for row in (r for r in rows if "stage" in r):
        phases = row["phases"]
        cells = [gib(phases[p]) if p in phases else "" for p in PHASES]
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
    return [line for path in files for line in tables(json.loads(path.read_text()))]


def tables(found: dict[str, Any]) -> list[str]:
    """What was measured on one card, beside what was foretold where that is known."""
    names = ("torch", "cuda", "transformers", "peft", "bitsandbytes")
    lines = [
        f"**Measured** on {found['card']} ({', '.join(f'{n} {found[n]}' for n in names)}); a copy "
        f"moves {found['rates']['bytes/s'] / 1e9:,.0f} GB/s, a bf16 product makes "
        f"{found['rates']['multiply-adds/s'] / 1e12:,.1f}e12 multiply-adds/s:",
        "",
        "| model | stage | within, GiB | phase | peak, GiB | foretold | reserved | tokens/s | "
        "share of the bound | samples/s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    memory = RESULTS / "memory.json"
    rows = json.loads(memory.read_text()) if memory.is_file() else []
    known = {(row["model"], row["stage"]): row for row in rows if "stage" in row}
    for row in found["rows"]:
        within = "all" if row["memory"] is None else f"{row['memory']:g}"
        start = f"| {row['model']} | {row['stage']} | {within} |"
        if "error" in row:
            lines.append(f"{start} {row['error'][:80]} | | | | | | |")
            continue
        told = known.get((row["model"], row["stage"]))
        for phase in row["seconds"]:
            cells = [phase]
            cells += [gib(row[x][phase]) if row[x] else "" for x in ("peaks",)]
            cells += [gib(told["phases"][phase]) if told else ""]
            cells += [gib(row["reserved"][phase]) if row["reserved"] else ""]
            speed = row["tokens/s"].get(phase)
            cells += [f"{speed:,.0f}" if speed else ""]
            share = share_of_bound(row, phase, told, found["rates"]) if told and speed else None
            cells += [f"{share:.1%}" if share else ""]
            cells += [f"{row['samples/s']:.2f}" if phase == "rollout" else ""]
            lines.append(f"{start} {' | '.join(cells)} |")
    outsides = [row["outside"] for row in found["rows"] if row.get("outside")]
    if outsides:
        lines += ["", f"Beside the allocator the card lacks at most {gib(max(outsides))} GiB."]
    return [*lines, ""]


def share_of_bound(
    row: dict[str, Any], phase: str, told: dict[str, Any], own: dict[str, float]
) -> float:
    weights, speed = told["parameters"], float(row["tokens/s"][phase])
    if phase == "rollout":
        sizes = STAGES[row["stage"]]
        read = 2 * weights if sizes.unpacked else told["parts"]["backbone"]
        return speed / (sizes.rollout_rows * own["bytes/s"] / read)
    return speed / (own["multiply-adds/s"] / ({"score": 1, "update": 3}[phase] * weights))


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and speed of 1.5 to 3B models.")
    parser.add_argument("command", choices=["predict", "measure", "report"])
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(LARGE))
    parser.add_argument("--memory", type=float, nargs="*", default=[], help="GiB of smaller cards")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of what is measured")
    options = parser.parse_args()
    if options.command == "predict":
        predict(options.models)
    elif options.command == "report":
        report()
    else:
        if options.device == "cuda" and not torch.cuda.is_available():
            raise SystemExit("no CUDA device; --device cpu --models tiny tries the code")
        if options.device != "cuda" and options.out == RESULTS:
            raise SystemExit("no results of a CPU beside those of cards; name another --out")
        measure(options.models, options.memory, torch.device(options.device), options.out)


if __name__ == "__main__":
    main()
