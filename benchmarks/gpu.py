"""Memory and speed of all roles of a 1.5 to 3B model on one card: foretold, and measured on CUDA.

    python -m benchmarks.gpu predict                # anywhere: what each stage takes, no weights
    python -m benchmarks.gpu measure                # on a CUDA machine: all models, all stages
    python -m benchmarks.gpu measure --memory 12 8  # and once more in so many GiB of a larger card
    python -m benchmarks.gpu measure --minutes 20   # no stage begins after so many (8 by default)
    python -m benchmarks.gpu report

Models have their real shapes and random weights, built from the configuration class: nothing is
downloaded, and neither memory nor speed depends on what the weights are. The sizes are those of
configs/large and configs/cards: up to 256 + 256 tokens, LoRA rank 8 on all linear layers,
bf16-mixed.

`measure` builds each model once, gives it the roles of one stage after the other, and makes the
passes of one update of each with the project's own backbone, sampling and log-probabilities. Every
pass is made twice: the first time, with short responses, to warm kernels and the allocator, and the
second one counts. Results are printed and written after every stage: what was measured before an
error or an end stays. Rates are of the card that it runs on; with --memory they are still that
card's.

Peaks are max_memory_allocated. Beside them stand what the allocator reserved in the whole stage,
whose cache is emptied before it and not between its passes, as no run empties it; and what the card
lacks beside these (CUDA's context, its libraries, other processes). `--memory` limits what the
allocator reserves to that many GiB less doctor's allowance for the rest.

Bounds: the least seconds that the card's own rates allow, over those that were measured. A decoding
step reads every weight once. An update makes 3 multiply-adds per token and weight of the linear
layers (forward, recomputed forward, backward through frozen weights), and 2 per response token and
weight of the output layer (log-probabilities and their gradient). Scoring makes 1 for each role,
and 1 of the output layer for the policy and the reference. Attention and adapters are left out, so
that shares are a little too low.

Samples per second are those of whole updates: rollout, scoring, passes and the step together, BATCH
samples to a step.
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
from dataclasses import asdict, replace
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from hcrlhf import machine, optimizers
from hcrlhf.backbone import Backbone, LoraOptions
from hcrlhf.doctor import ALLOWANCE
from hcrlhf.errors import InputError
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
BATCH = 32  # samples of an optimizer step: demonstrations, pairs, responses of one rollout
UNITS = {"supervised": "demonstrations", "preference": "pairs", "policy": "responses"}
FROZEN = ("reference", "reward", "cost")  # the policy's frozen adapters
# Two constraints, so three critics. In an order in which every stage has the roles of the ones
# before it.
ROLES = replace(BASE, score_rows=4, rollout_rows=BATCH, test_rows=BATCH, frozen=len(FROZEN))
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
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


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
            found = footprint(configuration(model), sizes)
            rows.append({"model": model, "stage": stage, **described(found)})
            print(
                f"{model}, {stage}: {found.peak / GIB:.2f} GiB ({time.monotonic() - begin:.0f} s)",
                flush=True,
            )
        for rank in (8, 16):
            rows += roles(model, rank)
    told = {"versions": versions("torch", "transformers"), "rows": rows}
    (RESULTS / "memory.json").write_text(json.dumps(told, indent=1) + "\n")


def versions(*packages: str) -> dict[str, str]:
    return {name: str(import_module(name).__version__) for name in packages}


def described(told: Footprint) -> dict[str, Any]:
    return {**asdict(told), "peak": told.peak}


def roles(model: str, rank: int) -> list[dict[str, Any]]:
    """What one more role costs, as a share of the backbone: bytes that stay, gradients included."""
    own, linear = without_memory(model)
    weights = sum(rank * (m.in_features + m.out_features) for m in linear)
    count = sum(m.weight.numel() for m in linear)
    others = sum(p.numel() for p in own.parameters()) - count
    backbone = count * (0.5 + 1 / 64 + 4 / 64 / 256) + 2 * others
    kinds = {"frozen": 4.0, "trained, adamw": 16.0, "trained, adamw_8bit": 10.03}
    return [
        {"model": model, "role": kind, "rank": rank, "share": weights * bytes_ / backbone}
        for kind, bytes_ in kinds.items()
    ]


@cache
def without_memory(model: str) -> tuple[nn.Module, list[nn.Linear]]:
    """The model without weights, and its linear layers; the output layer is none of them."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        own = AutoModelForCausalLM.from_config(configuration(model))
    modules = own.named_modules()
    return own, [m for name, m in modules if type(m) is nn.Linear and "lm_head" not in name]


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
        torch.cuda.synchronize()  # what went wrong before is raised here
        torch.cuda.empty_cache()


class Cost(NamedTuple):
    """Of one call: seconds, and the most bytes allocated and reserved; on a CPU these are 0."""

    seconds: float
    peak: int
    reserved: int


def cost(work: Callable[[], object], device: torch.device) -> Cost:
    if device.type != "cuda":
        begin = time.perf_counter()
        work()
        return Cost(time.perf_counter() - begin, 0, 0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    work()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    return Cost(seconds, torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())


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
        frozen = FROZEN[: sizes.frozen]
        for role in ["policy", *frozen, *critics]:
            if role not in self.own.roles:
                self.own.add_role(role, sizes.lora, trainable=role not in FROZEN)
        for head in [*heads, *frozen[1:], *critics]:
            if head not in self.own.heads:
                self.own.add_head(head, trainable=head not in FROZEN)
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

        def actor(hidden: Tensor, part: Tokens) -> Tensor:
            values = [own.values(head, hidden, part) for head in shared]
            return torch.stack([own.log_probs(hidden, part), *values], dim=1)

        def score(length: int) -> None:  # reads what a policy's update reads of a rollout
            readers: dict[str, Any] = {"policy": actor, "reference": own.log_probs}
            readers |= {role: partial(own.scores, role) for role in FROZEN[1:]}
            readers |= {role: partial(own.values, role) for role in critics}
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
        """A stage's update, after a short one that warms kernels and makes optimizer states.

        A long rollout is made once and gives both figures, for it is nearly all of the time. So the
        cache is emptied before the short update alone: peaks do not depend on it, and while time
        runs the card is asked for no more memory than the full length of a response adds.
        """
        sizes, found = STAGES[stage], dict[str, Cost]()
        if stage in WITHOUT_ROLLOUT:
            sizes = replace(sizes, rollout_rows=0)
        work = self.passes(sizes)
        if stage != LIMITED:
            work.pop("test", None)  # the same everywhere, and slow
        release(self.device)
        for length in (WARM, RESPONSE):
            for name, run in work.items():
                found[name] = cost(partial(run, length), self.device)
        seconds = {name: x.seconds for name, x in found.items()}
        seconds["update"] /= passes(sizes)
        return {
            "peaks": {name: x.peak for name, x in found.items()},
            "reserved": max(x.reserved for x in found.values()),
            "outside": outside(self.device),
            "seconds": seconds,
        }


def outside(device: torch.device) -> int:
    """Bytes that are neither free nor the allocator's: contexts, libraries, other processes."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info()
    return int(total - free - torch.cuda.memory_reserved())


def rates(device: torch.device) -> dict[str, float]:
    """The card's own: bytes/s of a copy (read and written), multiply-adds/s of bf16 products."""
    count, side = (2**28, 8192) if device.type == "cuda" else (2**20, 64)
    x = torch.randn(count, dtype=torch.bfloat16, device=device)
    a = torch.randn(side, side, dtype=torch.bfloat16, device=device)
    y, b = torch.empty_like(x), torch.empty_like(a)
    return {
        "bytes/s": 2 * 2 * count / least_seconds(lambda: y.copy_(x), device),
        "multiply-adds/s": side**3 / least_seconds(lambda: torch.mm(a, a, out=b), device),
    }


def least_seconds(work: Callable[[], object], device: torch.device, calls: int = 20) -> float:
    """Of one call, the best of three timings; before them it runs until an idle card's clocks rise.

    The host waits for the device after that many calls, not after each.
    """
    rise, long = (0.5, 0.2) if device.type == "cuda" else (0.0, 0.0)

    def timed(least: float) -> float:
        seconds = list[float]()
        while not seconds or sum(seconds) < least:
            seconds.append(cost(lambda: [work() for _ in range(calls)], device).seconds)
        return sum(seconds) / len(seconds) / calls

    timed(rise)
    return min(timed(long) for _ in range(3))


def measure(
    models: list[str], limits: list[float], device: torch.device, folder: Path, minutes: float = 8.0
) -> None:
    """Every stage of every model, and LIMITED once more within each limit in GiB.

    None begins after that many minutes, nor when an error has left the device unusable.

    Raises:
        InputError: bitsandbytes is missing, or does not work on the device.
    """
    end = time.monotonic() + 60 * minutes
    machine.choose_attention()
    found, path = begun(device, folder)
    wanted = [(s, m) for s in STAGES for m in (None, *limits) if m is None or s == LIMITED]
    stopped, left = "", list[str]()
    for model in models:
        bench: Bench | None = None
        for stage, memory in wanted:
            if not stopped and time.monotonic() >= end:
                stopped = f"{minutes:g} minutes are over"
            if stopped:
                left.append(f"{model}, {stage}" + (f" in {memory:g} GiB" if memory else ""))
                continue
            row: dict[str, Any] = {"model": model, "stage": stage, "memory": memory}
            try:
                limit(memory, device)
                bench = bench or Bench(model, device)
                row |= bench.measured(stage)
            except Exception as error:  # what the others have found stays
                row["error"] = traceback.format_exception_only(error)[0].splitlines()[0]
                traceback.print_exc()
            keep(row, found, path)
            # Not before the error is gone, whose frames hold what was allocated.
            if not cleared(device):
                stopped = "the device answers nothing but errors"
        del bench
        cleared(device)
        own = [row for row in found["rows"] if row["model"] == model]
        if own:
            print("\n".join(tables(found | {"rows": own})), flush=True)
    if left:
        print(f"Left out, since {stopped}: {'; '.join(left)}. --models names what to begin with.")


def begun(device: torch.device, folder: Path) -> tuple[dict[str, Any], Path]:
    """What is known before the first row, and the rows of a call before this one; their file."""
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # statistics and limits are the current device's
    machine.require_four_bits(device)
    card = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    found: dict[str, Any] = {"card": card, **versions(*PACKAGES), "cuda": str(torch.version.cuda)}
    path = folder / f"gpu-{re.sub('[^a-z0-9]+', '-', card.lower())}.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    same = all(before.get(name) == found[name] for name in found)
    rows = [row for row in before["rows"] if row["stage"] in STAGES] if same else []
    found |= {"rates": rates(device), "rows": rows}
    print(json.dumps(found | {"rows": []}), flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    release(device)
    return found, path


def keep(row: dict[str, Any], found: dict[str, Any], path: Path) -> None:
    """Adds a row, in the place of one of a call before, and writes them all."""
    keys = ("model", "stage", "memory")
    others = [r for r in found["rows"] if any(r[k] != row[k] for k in keys)]
    found["rows"] = [*others, row]
    print(json.dumps(row), flush=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


def cleared(device: torch.device) -> bool:
    """Lifts a limit and releases memory; False where that fails, as after an illegal access."""
    try:
        limit(None, device)
        release(device)
    except RuntimeError:  # CUDA repeats such an error at every call until the process ends
        return False
    return True


def limit(memory: float | None, device: torch.device) -> None:
    """What the allocator may reserve: that many GiB less what a card needs besides; None: all."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        allowed = total if memory is None else memory * GIB - ALLOWANCE
        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total))


# -- the page --------------------------------------------------------------------------------------


def gib(count: float) -> str:
    return f"{count / GIB:.2f}"


def report() -> None:
    told = json.loads((RESULTS / "memory.json").read_text())
    rows = told["rows"]
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
        f"tests/test_footprint.py; {named(told['versions'])}):",
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


def named(packages: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in packages.items())


def tables(found: dict[str, Any]) -> list[str]:
    """What was measured on one card, beside what was foretold where that is known."""
    path = RESULTS / "memory.json"
    told = json.loads(path.read_text()) if path.is_file() else {"versions": {}, "rows": []}
    known = {(row["model"], row["stage"]): row for row in told["rows"] if "stage" in row}
    lines = [
        f"**Measured** on {found['card']} ({named({x: found[x] for x in (*PACKAGES, 'cuda')})}); "
        f"a copy moves {found['rates']['bytes/s'] / 1e9:,.0f} GB/s, a bf16 product makes "
        f"{found['rates']['multiply-adds/s'] / 1e12:,.1f}e12 multiply-adds/s. Foretold with "
        f"{named(told['versions'])}. Reserved and samples/s are of the whole stage; separate "
        "critics are given the seconds of the shared ones' rollout, which is the same:",
        "",
        "| model | stage | within, GiB | phase | peak, GiB | foretold | tokens/s | "
        "share of the bound | reserved, GiB | samples/s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        within = "all" if row["memory"] is None else f"{row['memory']:g}"
        start = f"| {row['model']} | {row['stage']} | {within} |"
        if "error" in row:
            lines.append(f"{start} {row['error'][:80]} | | | | | | |")
            continue
        whole = [gib(row["reserved"]) if row["reserved"] else "", samples(row, found["rows"])]
        expected = known.get((row["model"], row["stage"]))
        for phase, seconds in row["seconds"].items():
            count = tokens_of(STAGES[row["stage"]], phase)
            share = share_of_bound(row, phase, expected, found["rates"])
            cells = [
                phase,
                gib(row["peaks"][phase]) if row["peaks"][phase] else "",
                gib(expected["phases"][phase]) if expected else "",
                f"{count / seconds:,.0f}" if count else "",
                f"{share:.1%}" if share else "",
                *whole,
            ]
            lines.append(f"{start} {' | '.join(cells)} |")
            whole = ["", ""]  # said beside the first phase
    outsides = [row["outside"] for row in found["rows"] if row.get("outside")]
    if outsides:
        most = f"Beside the allocator the card lacks at most {gib(max(outsides))} GiB"
        lines += ["", f"{most}, what other processes hold included."]
    return [*lines, ""]


def tokens_of(sizes: Sizes, phase: str) -> int:
    """Tokens that a rollout draws, or that a pass reads, once for each role; 0 of other phases."""
    if phase == "rollout":
        return sizes.rollout_rows * sizes.response
    if phase not in ("score", "update"):
        return 0
    roles = 1 + sizes.critics + (sizes.frozen if phase == "score" else 0)
    return sizes.rows * sizes.width * roles


def multiply_adds(model: str, sizes: Sizes, phase: str) -> int:
    """Of one pass of scoring or an update, with frozen weights; the module's docstring counts them.

    Log-probabilities are made of the policy, and in scoring of the reference too.
    """
    _, linear = without_memory(model)
    each = sum(layer.weight.numel() for layer in linear)
    output = SHAPES[model][1]["vocab_size"] * SHAPES[model][1]["hidden_size"]
    times = {"score": 1, "update": 3}[phase]
    log_probs = 0 if sizes.stage == "preference" else 2  # two roles, or a product and its gradient
    responses = sizes.rows * sizes.response
    return times * each * tokens_of(sizes, phase) + log_probs * output * responses


def share_of_bound(
    row: dict[str, Any], phase: str, told: dict[str, Any] | None, own: dict[str, float]
) -> float | None:
    """The least seconds by the card's own rates, over a phase's; None where no bound is known."""
    sizes = STAGES[row["stage"]]
    if phase in ("score", "update"):
        least = multiply_adds(row["model"], sizes, phase) / own["multiply-adds/s"]
    elif phase == "rollout" and told:
        read = 2 * told["parameters"] if sizes.unpacked else told["parts"]["backbone"]
        least = sizes.response * read / own["bytes/s"]
    else:
        return None
    return least / float(row["seconds"][phase])


def samples(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Samples per second of an update of BATCH, and what they are; empty without a rollout's time.

    Args:
        rows: all; among them may be the one whose rollout stands for that of WITHOUT_ROLLOUT.
    """
    sizes, seconds = STAGES[row["stage"]], row["seconds"]
    if row["stage"] in WITHOUT_ROLLOUT:
        same = {"model": row["model"], "stage": LIMITED, "memory": None}
        others = [r["seconds"] for r in rows if same.items() <= r.items() and "error" not in r]
        if not others:
            return ""
        seconds = seconds | {"rollout": others[0]["rollout"]}
    together = sizes.rows / (2 if sizes.stage == "preference" else 1)
    passes = (seconds.get("score", 0) + seconds["update"]) * BATCH / together
    speed = BATCH / (seconds.get("rollout", 0) + passes + seconds["step"])
    return f"{speed:.2f} {UNITS[sizes.stage]}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and speed of 1.5 to 3B models.")
    parser.add_argument("command", choices=["predict", "measure", "report"])
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(LARGE))
    parser.add_argument("--memory", type=float, nargs="*", default=[], help="GiB of smaller cards")
    parser.add_argument("--minutes", type=float, default=8.0, help="no stage begins after so many")
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of what is measured")
    options = parser.parse_args()
    if options.command == "predict":
        predict(options.models)
    elif options.command == "report":
        report()
    else:
        device = options.device
        if device.type == "cuda" and not torch.cuda.is_available():
            raise SystemExit("no CUDA device; --device cpu --models tiny tries the code")
        if device.type != "cuda" and options.out == RESULTS:
            raise SystemExit("no results of a CPU beside those of cards; name another --out")
        try:
            measure(options.models, options.memory, device, options.out, options.minutes)
        except InputError as error:
            raise SystemExit(f"all is measured in 4 bits: {error}") from None


if __name__ == "__main__":
    main()
