"""Samples per second beside TRL on the same machine, a profile, and how cost grows.

    python -m venv trl19  && trl19/bin/pip install torch==2.13.0 trl==1.9.0 peft datasets
    python -m venv trl116 && trl116/bin/pip install torch==2.13.0 trl==1.16.0 peft datasets
    OMP_NUM_THREADS=2 python -m benchmarks.throughput --pairs data/helpful-base-test.jsonl.gz \\
        --trl-ppo trl19/bin/python --trl trl116/bin/python

A Qwen2 of 6.8 million random weights (timing only: nothing is learnt), prompts of at most 64 tokens
and pairs of at most 256 from an HH-RLHF file, LoRA of rank 8 on all linear layers on both sides.
TRL's PPO runs four models (policy, reference, reward, value); ours six roles (policy, reference,
reward, cost, and a critic for reward and cost on the policy's own hidden states). Ours and theirs
alternate, each run in a process of its own. Random weights almost never stop by themselves, so
responses have the full length on both sides.

Shipped cells take what learns from configs/demo as the recipe check runs it: learner,
multiplier, both limits (a third critic, so seven roles) and size of passes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
VOCABULARY, HIDDEN, LAYERS = 8000, 256, 6
MAX_PROMPT, NEW_TOKENS, MAX_PAIR = 64, 64, 256
TURN = "\n\nAssistant:"
# Dialogues are text already: no turn markers are added on either side.
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"

SHIPPED = {"epochs": 1, "minibatches": 4, "shipped": True}  # what the recipe check runs
CELLS: list[dict[str, Any]] = [
    {"kind": "ppo", "batch": 32, "epochs": 1, "minibatches": 1},
    {"kind": "ppo", "batch": 64, "epochs": 1, "minibatches": 1},
    {"kind": "ppo", "batch": 64, "epochs": 2, "minibatches": 2},
    {"kind": "ppo", "batch": 32, "micro_batch": 8, **SHIPPED},
    {"kind": "ppo", "batch": 64, "micro_batch": 16, **SHIPPED},
    {"kind": "rloo", "batch": 32, "epochs": 1, "minibatches": 1},
    {"kind": "rloo", "batch": 64, "epochs": 1, "minibatches": 1},
    {"kind": "rloo", "batch": 32, "micro_batch": 8, "samples": 4, **SHIPPED},
    {"kind": "rloo", "batch": 64, "micro_batch": 16, "samples": 4, **SHIPPED},
    {"kind": "reward", "batch": 16, "epochs": 1, "minibatches": 1},
]


# -- the same model and data for both ----------------------------------------------------------


def prepare(folder: Path, pairs: Path) -> None:
    """Model, tokenizer, score models, prompts and pairs; nothing if they are there."""
    if (folder / "done").is_file():
        return
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification

    folder.mkdir(parents=True, exist_ok=True)
    opener = gzip.open if pairs.suffix == ".gz" else open
    with opener(pairs, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    tokenizer = make_tokenizer(row["chosen"] for row in rows)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HIDDEN // 32,
        num_key_value_heads=HIDDEN // 64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 1
    model.save_pretrained(folder / "lm")
    tokenizer.save_pretrained(folder / "lm")
    config.num_labels = 1
    Qwen2ForSequenceClassification(config).save_pretrained(folder / "reward-trl")
    tokenizer.save_pretrained(folder / "reward-trl")

    def length(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    prompts, usable = [], []
    for row in rows:
        split = row["chosen"].rfind(TURN) + len(TURN)
        prompt, chosen = row["chosen"][:split], row["chosen"][split:]
        if not row["rejected"].startswith(prompt):
            continue
        rejected = row["rejected"][split:]
        if length(prompt) <= MAX_PROMPT:
            prompts.append({"prompt": prompt})
        if chosen.strip() and rejected.strip() and chosen.strip() != rejected.strip():
            # One token of room: our responses end with EOS.
            longest = max(length(prompt + chosen), length(prompt + rejected)) + 1
            if longest <= MAX_PAIR:
                usable.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    unique = list({p["prompt"]: p for p in prompts}.values())
    write_lines(folder / "train.jsonl", unique[:400])
    write_lines(folder / "validation.jsonl", unique[400:410])
    write_lines(folder / "pairs.jsonl", usable)
    make_stages(folder)
    (folder / "done").touch()


def make_tokenizer(texts: Iterator[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def make_stages(folder: Path) -> None:
    """Our stage folders: the model as supervised policy; random adapters as reward and cost."""
    from transformers import AutoTokenizer

    from hcrlhf.backbone import Backbone, LoraOptions, load_causal_lm
    from hcrlhf.stages import BackboneSource, ScoreMoments, Stage, fingerprint, write_stage
    from hcrlhf.text import ChatFormat

    source = BackboneSource(str(folder / "lm"))
    chat = ChatFormat(MAX_PAIR, NEW_TOKENS, chat_template=TEMPLATE)
    mark = fingerprint(source.model)
    tokenizer = AutoTokenizer.from_pretrained(folder / "lm")
    (folder / "sft").mkdir()
    tokenizer.save_pretrained(folder / "sft")
    write_stage(folder / "sft", Stage("sft", source, mark, False, chat), [])
    for role in ("reward", "cost"):
        backbone = Backbone(load_causal_lm(source))
        backbone.add_role(role, LoraOptions(8, 16), trainable=True)
        backbone.add_head(role, trainable=True)
        with torch.no_grad():
            for _, parameter in backbone.trained_parameters():
                parameter.normal_(0, 0.02)
        (folder / role).mkdir()
        backbone.save_role(role, folder / role, source.model)
        backbone.save_head(role, folder / role)
        tokenizer.save_pretrained(folder / role)
        stage = Stage(
            role,  # type: ignore[arg-type]
            source,
            mark,
            adapter=True,
            chat=chat,
            moments=ScoreMoments(0.0, 1.0, 100),
            squash=4.0 if role == "cost" else None,
        )
        write_stage(folder / role, stage, [])


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# -- ours, in a process of its own -------------------------------------------------------------


def ours(kind: str, folder: Path, c: dict[str, Any]) -> dict[str, Any]:
    """Seconds of every update (or step), and where they went."""
    from lightning.pytorch import Callback, Trainer

    seconds: list[float] = []
    parts: list[dict[str, float]] = []

    class Clock(Callback):
        """From batch to batch, data loading and logging included."""

        def on_train_start(self, *_: Any) -> None:
            self.mark = time.perf_counter()

        def on_train_batch_end(self, *_: Any) -> None:
            now = time.perf_counter()
            seconds.append(now - self.mark)
            self.mark = now
            parts.append(dict(SPENT))
            SPENT.clear()

    module, data = (preference if kind == "reward" else policy)(kind, folder, c)
    trainer = Trainer(
        default_root_dir=str(folder / "ours-out"),
        accelerator="cpu" if not torch.cuda.is_available() else "gpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0 if kind != "reward" else 1,
        check_val_every_n_epoch=1000,
        callbacks=[Clock()],
    )
    with timed():
        try:
            trainer.fit(module, data)
        except RuntimeError as error:  # a preference stage without validation ends like this
            if "held-out moments" not in str(error):
                raise
    return {"seconds": seconds, "parts": parts}


def policy(kind: str, folder: Path, c: dict[str, Any]) -> tuple[Any, Any]:
    from datamodules import Prompts
    from hcrlhf.backbone import LoraOptions
    from hcrlhf.constraint import Constraint
    from hcrlhf.ppo import PPO
    from hcrlhf.rloo import RLOO
    from lightning_modules import Policy

    steps = {"epochs": c["epochs"], "minibatches": c["minibatches"]}
    learner: Any = PPO(critic="shared", target_kl=None, **steps)
    if kind == "rloo":
        learner = RLOO(samples_per_prompt=2, **steps)
    limits = [Constraint(estimand="mean", threshold=-0.5, safety_prompts=500)]
    options: dict[str, Any] = {"learner": learner, "micro_batch_size": c["micro_batch"]}
    if "shipped" in c:
        options = shipped_options(kind)
        learner, limits = options["learner"], options.pop("constraints")
        assert (learner.epochs, learner.minibatches) == (c["epochs"], c["minibatches"])
    set_response_tokens(folder, c["new_tokens"])
    module = Policy(
        *(str(folder / role) for role in ("sft", "reward", "cost")),
        constraints=limits,
        lora=LoraOptions(8, 16),
        learning_rate=1e-5,
        **options,
    )
    data = Prompts(
        str(folder / "train.jsonl"),
        str(folder / "validation.jsonl"),
        prompts_per_update=c["batch"] // learner.samples_per_prompt,
        updates=c["steps"],
    )
    return module, data


def shipped_options(kind: str) -> dict[str, Any]:
    """What of the configs of the recipe check decides how much work an update is."""
    from hcrlhf.configured import built, constraints_of
    from hcrlhf.lightning_cli import parse

    configs = ("policy", "rloo", "long") if kind == "rloo" else ("policy", "long")
    files = [HERE.parent / "configs" / "demo" / f"{name}.yaml" for name in configs]
    config = parse([part for file in files for part in ("--config", str(file))])
    options = config["model"]["init_args"]
    return {
        "constraints": constraints_of(config),
        **{name: built(options[name]) for name in ("learner", "multiplier")},
        **{name: options[name] for name in ("micro_batch_size", "kl_coefficient")},
    }


def set_response_tokens(folder: Path, count: int) -> None:
    """Writes the length limit into the stage folders, from which the policy reads it."""
    for role in ("sft", "reward", "cost"):
        path = folder / role / "hcrlhf.json"
        record = json.loads(path.read_text())
        record["chat"]["max_response_tokens"] = count
        path.write_text(json.dumps(record))


def preference(kind: str, folder: Path, c: dict[str, Any]) -> tuple[Any, Any]:
    from datamodules import Preferences
    from hcrlhf.backbone import LoraOptions
    from lightning_modules import Preference

    set_response_tokens(folder, MAX_PAIR)
    lines = (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    count = c["batch"] * c["steps"]
    (folder / "pairs-train.jsonl").write_text("".join(lines[:count]))
    (folder / "pairs-held-out.jsonl").write_text("".join(lines[-16:]))
    module = Preference(
        role="reward",
        sft=str(folder / "sft"),
        lora=LoraOptions(8, 16),
        learning_rate=1e-5,
        group_size=c["micro_batch"],
    )
    data = Preferences(
        str(folder / "pairs-train.jsonl"),
        "better",
        batch_size=c["batch"],
        validation=str(folder / "pairs-held-out.jsonl"),
    )
    return module, data


SPENT: dict[str, float] = {}


@contextmanager
def timed() -> Iterator[None]:
    """Measures generation, forward, backward and optimizer steps while they run."""
    from hcrlhf import rollouts
    from hcrlhf.backbone import Backbone
    from lightning_modules import Policy, scored_policy

    nested = [0]

    def measured(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nested[0] += 1
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                nested[0] -= 1
                if nested[0] == 0:  # what runs inside another part is that part's
                    SPENT[name] = SPENT.get(name, 0.0) + time.perf_counter() - begin

        return call

    places: list[tuple[Any, str, str]] = [
        (scored_policy, "sample", "generation"),
        *((Backbone, m, "forward") for m in ("read", "hidden", "log_probs")),
        *((Backbone, m, "forward") for m in ("values", "scores")),
        (Policy, "manual_backward", "backward"),
        (torch.optim.AdamW, "step", "optimizer"),
    ]
    kept = [(place, name, getattr(place, name)) for place, name, _ in places]
    try:
        for place, name, part in places:
            setattr(place, name, measured(part, getattr(place, name)))
        yield
    finally:
        for place, name, function in kept:
            setattr(place, name, function)
        assert scored_policy.sample is rollouts.sample


# -- both in turn ------------------------------------------------------------------------------


def run(side: str, cell: dict[str, Any], folder: Path, pythons: Mapping[str, str]) -> Any:
    """One process; what its last line says."""
    kind = cell["kind"]
    if side == "trl":
        python = pythons["ppo" if kind == "ppo" else "other"]
        command = [python, str(HERE / "trl_peers.py"), kind, str(folder), json.dumps(cell)]
    else:
        command = [sys.executable, "-m", "benchmarks.throughput", "--child", kind]
        command += ["--folder", str(folder), "--cell", json.dumps(cell)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def steady(record: Mapping[str, Any]) -> float:
    """Seconds per step: the median of all but the first, which also warms up."""
    return median(record["seconds"][1:])


def full_cell(cell: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """What both sides are told: TRL's example splits a batch into four micro-batches, so do we."""
    micro = cell.get("micro_batch", max(cell["batch"] // 4 // cell["minibatches"], 8))
    lengths = {"new_tokens": NEW_TOKENS, "max_tokens": MAX_PAIR}
    return {"samples": 2, "micro_batch": micro, **lengths, "steps": steps, **cell}


def chosen(options: argparse.Namespace) -> list[dict[str, Any]]:
    return [
        cell
        for cell in CELLS
        if (not options.only or cell["kind"] in options.only)
        and options.minibatches in (None, cell["minibatches"])
    ]


def compare(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    pythons = {"ppo": options.trl_ppo, "other": options.trl}
    rows = []
    for cell in chosen(options):
        c = full_cell(cell, options.steps)
        times: dict[str, list[float]] = {"ours": [], "trl": []}
        for _ in range(options.repeats):
            for side in times:
                times[side].append(steady(run(side, c, folder, pythons)))
                print(f"{c['kind']} batch {c['batch']} {side}: {times[side][-1]:.3f} s", flush=True)
        ratios = [t / o for o, t in zip(times["ours"], times["trl"], strict=True)]
        rows.append({**c, "seconds": times, "ratio": median(ratios), "ratios": ratios})
        rows[-1]["machine"] = machine()
    return rows


def merged(before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of now in the place of those of the same cell, which keep their order in CELLS."""
    rows = [*before, *now]
    last = [[r for r in rows if r.items() >= cell.items()][-1:] for cell in CELLS]
    return [row for found in last for row in found]


def profile(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Shares of an update's time."""
    rows = []
    for cell in chosen(options):
        if cell["kind"] == "reward":
            continue
        c = full_cell(cell, options.steps)
        record = run("ours", c, folder, {})
        total = sum(record["seconds"][1:])
        shares = {
            part: sum(p.get(part, 0.0) for p in record["parts"][1:]) / total
            for part in ("generation", "forward", "backward", "optimizer")
        }
        rows.append({**c, "shares": {**shares, "rest": 1 - sum(shares.values())}})
        rows[-1]["machine"] = machine()
        print(rows[-1]["kind"], rows[-1]["batch"], rows[-1]["shares"], flush=True)
    return rows


def growth(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds per update against batch size and response length, everything else equal."""
    rows = []
    base = {"kind": "ppo", "epochs": 1, "minibatches": 1, "micro_batch": 8}
    points = [{"batch": b, "new_tokens": NEW_TOKENS} for b in (16, 32, 64, 128)]
    points += [{"batch": 32, "new_tokens": t} for t in (16, 32, 128, 192)]
    for point in points:
        c = full_cell({**base, **point}, options.steps)
        rows.append({**c, "seconds": steady(run("ours", c, folder, {}))})
        print(rows[-1]["batch"], rows[-1]["new_tokens"], rows[-1]["seconds"], flush=True)
    return rows


# -- the page ----------------------------------------------------------------------------------


def page(record: Mapping[str, Any]) -> str:
    lines = [
        "# Throughput",
        "",
        "Written by `benchmarks/throughput.py`; its docstring says what is compared.",
        "",
        "Alternating pairs of runs; a run's figure is the median of its steps after the first, the "
        "table's the median of the runs. Compare the two sides of a row, and not rows of different "
        "machines, each of which ran the code of its day:",
        "",
    ]
    measured = [*record["comparison"], *record["profile"]]
    machines = list(dict.fromkeys(described(row["machine"]) for row in measured))
    lines += [f"- {number}: {words}" for number, words in enumerate(machines, start=1)]
    lines += [
        "",
        "| | batch | epochs × minibatches | ours, s | TRL, s | ours, samples/s | TRL, samples/s | "
        "ratio (each pair) | machine |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    names = {
        ("ppo", False): "PPO-Lagrangian, six roles, against PPO of TRL 1.9",
        ("ppo", True): "the same as shipped (`long.yaml`): two limits, seven roles",
        ("rloo", False): "RLOO, K = 2, with cost, against RLOO of TRL 1.16",
        ("rloo", True): "the same as shipped (`rloo.yaml`, `long.yaml`): K = 4, two limits",
        ("reward", False): "reward model (pairs), against RewardTrainer of TRL 1.16",
    }
    for row in record["comparison"]:
        a, b = (median(row["seconds"][side]) for side in ("ours", "trl"))
        each = ", ".join(f"{r:.2f}" for r in row["ratios"])
        name, passes = (
            names[row["kind"], "shipped" in row],
            f"{row['epochs']} × {row['minibatches']}",
        )
        lines.append(
            f"| {name} | {row['batch']} | {passes} | "
            f"{a:.2f} | {b:.2f} | {row['batch'] / a:.1f} | {row['batch'] / b:.1f} | "
            f"**{row['ratio']:.2f}** ({each}) | {machines.index(described(row['machine'])) + 1} |"
        )
    lines += [
        "",
        "Where the time of one of our updates goes:",
        "",
        "| | batch | epochs × minibatches | generation | forward | backward | optimizer | rest | "
        "machine |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["profile"]:
        shares = " | ".join(f"{share:.1%}" for share in row["shares"].values())
        passes = f"{row['epochs']} × {row['minibatches']}"
        kind = f"{row['kind']}, as shipped" if "shipped" in row else row["kind"]
        number = machines.index(described(row["machine"])) + 1
        lines.append(f"| {kind} | {row['batch']} | {passes} | {shares} | {number} |")
    lines += ["", "![seconds per update](../../docs/plots/throughput.png)", ""]
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    return {
        "cpu": cpu_name(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }


def described(machine: Mapping[str, Any]) -> str:
    return (
        f"{machine['threads']} threads of {machine['cpu']}, {machine['system']}; torch "
        f"{machine['torch']}, transformers {machine['transformers']}, peft {machine['peft']}"
    )


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Seconds per update against responses and against their length, with a straight line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=False)
    for axis, key, other, label in (
        (axes[0], "batch", "new_tokens", "responses per update"),
        (axes[1], "new_tokens", "batch", "new tokens per response"),
    ):
        fixed = 64 if other == "new_tokens" else 32
        chosen = sorted((r for r in rows if r[other] == fixed), key=lambda r: r[key])
        x = np.array([r[key] for r in chosen], dtype=float)
        y = np.array([r["seconds"] for r in chosen])
        slope, start = np.polyfit(x, y, 1)
        axis.plot(x, y, "o", color="#1f6f8b")
        axis.plot(x, start + slope * x, "-", color="#999999", lw=1)
        unit = "tokens" if other == "new_tokens" else "responses"
        axis.set(xlabel=label, ylabel="seconds per update", ylim=(0, None), xlim=(0, None))
        axis.set_title(f"{fixed} {unit}: {start:.2f} s + {slope * 1000:.1f} ms each", fontsize=10)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--pairs", type=Path, help="an HH-RLHF file of dialogues")
    parser.add_argument("--trl-ppo", help="python of an environment with trl 1.9")
    parser.add_argument("--trl", help="python of an environment with trl 1.16")
    parser.add_argument("--folder", type=Path, default=Path("runs/throughput"))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=["ppo", "rloo", "reward"])
    parser.add_argument("--minibatches", type=int, help="compare only the cells with as many")
    parser.add_argument("--parts", nargs="*", default=["comparison", "profile", "growth"])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--cell", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(ours(options.child, options.folder, options.cell)))
        return
    if options.pairs is None:
        parser.error("--pairs FILE is needed: an HH-RLHF file with chosen and rejected dialogues")
    folder = options.folder.resolve()
    prepare(folder, options.pairs)
    path = RESULTS / "throughput.json"
    record = json.loads(path.read_text()) if path.is_file() else {}
    if "comparison" in options.parts:
        record["comparison"] = merged(record.get("comparison", []), compare(folder, options))
    if "profile" in options.parts:
        record["profile"] = merged(record.get("profile", []), profile(folder, options))
    if "growth" in options.parts:
        record["growth"] = growth(folder, options)
    path.write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "throughput.md").write_text(page(record), encoding="utf-8")
    plot(record["growth"], HERE.parent / "docs" / "plots" / "throughput.png")
    shutil.rmtree(folder / "ours-out", ignore_errors=True)


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
