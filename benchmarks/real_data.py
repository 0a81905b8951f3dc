"""Real human preferences from start to end, beside a TF-IDF baseline; docs/real-data.md reads it.

    python -m benchmarks.real_data --backbone new --out runs/real-new \\
        --hh data/helpful-base-test.jsonl.gz --pku data/safety-pairs.jsonl --sft data/pku-safe.json

Every stage is `hcrlhf fit --config configs/real/….yaml` with paths put in place; only splitting,
the baseline (scikit-learn, which nothing else here needs) and the table are this file's own. What
is finished in --out is not run again, so the same command resumes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray
from scipy import stats

from datamodules.preferences import Label, read_pairs
from hcrlhf import cli
from hcrlhf.examples import Pair, prompt_key, user_turn
from hcrlhf.preferences import proportion
from hcrlhf.rows import parse_dialogue, read_rows
from hcrlhf.stages import FILE as STAGE_FILE

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "real"
FOLDS = 5
LABELS: dict[str, Label] = {"reward": "better", "cost": "safer"}
# Percent of the prompts that no earlier stage may see; the rest is for training.
RESERVED = {"safety": 15, "validation": 4, "evaluation": 6}
# For a look at whether everything runs: a few rows, one epoch, three updates.
QUICK_ROWS = 300
QUICK: dict[str, dict[str, Any]] = {
    "sft": {"trainer.max_epochs": 1},
    "reward": {"trainer.max_epochs": 1},
    "cost": {"trainer.max_epochs": 1},
    "policy": {
        "data.init_args.updates": 3,
        "data.init_args.prompts_per_update": 8,
        "model.init_args.constraints": (
            '[{"estimand": "mean", "threshold": 0.0, "safety_prompts": 10}]'
        ),
    },
}

Row = dict[str, Any]
Bools = NDArray[np.bool_]


# -- files -----------------------------------------------------------------------------------------


def fold_of(key: str) -> int:
    """The prompt's SHA-256 as an integer, modulo 5."""
    return int(key, 16) % FOLDS


def part_of(key: str) -> str:
    """What a prompt is for in the policy run: a fixed function of the prompt alone."""
    place = int(hashlib.sha256(f"part/{key}".encode()).hexdigest(), 16) % 100
    for name, percent in RESERVED.items():
        if place < percent:
            return name
        place -= percent
    return "train"


def row_key(row: Row, path: str, index: int) -> str:
    """The key of a row's prompt or first human turn, whatever its form."""
    if "prompt" in row:
        return prompt_key(user_turn(row["prompt"]))
    return prompt_key(parse_dialogue(row["chosen"], path, index)[:1])


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@dataclass(frozen=True)
class Data:
    """Rows and the keys of their prompts, per source."""

    rows: dict[str, list[Row]]
    keys: dict[str, list[str]]

    @staticmethod
    def read(paths: Mapping[str, str], limit: int | None) -> Data:
        rows = {name: list(islice(read_rows(path), limit)) for name, path in paths.items()}
        keys = {
            name: [row_key(row, paths[name], i) for i, row in enumerate(rows[name])]
            for name in rows
        }
        return Data(rows, keys)

    def write(self, folder: Path) -> dict[str, Any]:
        """Fold files, demonstrations and prompt files; returns what was counted."""
        for task, source in (("reward", "hh"), ("cost", "pku")):
            pairs = list(zip(self.rows[source], self.keys[source], strict=True))
            write_rows(folder / f"{task}.jsonl.gz", self.rows[source])
            for fold in range(FOLDS):
                held = [row for row, key in pairs if fold_of(key) == fold]
                rest = [row for row, key in pairs if fold_of(key) != fold]
                write_rows(folder / f"{task}-held-{fold}.jsonl.gz", held)
                write_rows(folder / f"{task}-rest-{fold}.jsonl.gz", rest)
        compared = {*self.keys["hh"], *self.keys["pku"]}
        sft = list(zip(self.rows["sft"], self.keys["sft"], strict=True))
        # A demonstration may be one of two compared responses: to keep it would tell the label.
        fresh = [(row, key) for row, key in sft if key not in compared]
        kept = [row for row, key in fresh if part_of(key) == "train"]
        write_rows(folder / "sft.jsonl", kept)
        return {
            "sft rows": len(sft),
            "sft rows left out: prompt is in the preference data": len(sft) - len(fresh),
            "sft rows left out: prompt is reserved": len(fresh) - len(kept),
            **self._write_prompts(folder, compared),
        }

    def _write_prompts(self, folder: Path, compared: set[str]) -> dict[str, int]:
        parts: dict[str, dict[str, str]] = {name: {} for name in ("train", *RESERVED)}
        for source in self.rows:
            if source == "hh":
                continue  # dialogues, not prompts
            for row, key in zip(self.rows[source], self.keys[source], strict=True):
                part = "train" if key in compared else part_of(key)
                parts[part].setdefault(key, row["prompt"])
        for name, prompts in parts.items():
            write_rows(folder / f"{name}.jsonl", ({"prompt": text} for text in prompts.values()))
        return {f"{name} prompts": len(prompts) for name, prompts in parts.items()}


# -- stages ----------------------------------------------------------------------------------------


class HeldOutScores(Callback):
    """Writes scores.json at each validation: which held-out pairs fit, and (higher, lower)."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.scores: list[list[float]] = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.scores += pl_module.predict_step(batch, batch_idx).tolist()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        pairs = trainer.datamodule.validation  # type: ignore[attr-defined]
        fitting = [i for i, pair in enumerate(pairs) if module.encode(pair) is not None]
        record = {"pairs": len(pairs), "index": fitting, "scores": self.scores}
        (Path(trainer.default_root_dir) / "scores.json").write_text(json.dumps(record))


class Runs:
    """The stages of one benchmark in its folder; each is run once, and its seconds are kept."""

    def __init__(self, out: Path, quick: bool) -> None:
        self.out, self.quick = out, quick
        self.times_file = out / "seconds.json"

    @property
    def seconds(self) -> dict[str, dict[str, float]]:
        """Wall-clock and processor seconds of what is finished."""
        return json.loads(self.times_file.read_text()) if self.times_file.is_file() else {}

    def once(self, name: str, work: Callable[[], None]) -> None:
        """Does the work unless an earlier call of this benchmark has finished it."""
        if name in self.seconds:
            return
        print(f"\n== {name}", flush=True)
        wall, cpu = time.monotonic(), time.process_time()
        work()
        spent = {"wall": time.monotonic() - wall, "cpu": time.process_time() - cpu}
        times = self.seconds | {name: {k: round(v, 1) for k, v in spent.items()}}
        self.times_file.write_text(json.dumps(times, indent=2) + "\n")

    def fit(self, name: str, config: str, settings: Mapping[str, Any], *more: str) -> None:
        def work() -> None:
            shutil.rmtree(self.out / name, ignore_errors=True)  # of an interrupted run
            code = self.call("fit", config, name, settings, *more)
            finished = self.out / name / ("verdict.json" if config == "policy" else STAGE_FILE)
            if code not in (cli.PASSED, cli.NO_SOLUTION) or not finished.is_file():
                raise SystemExit(f"{name} ended with exit code {code}")

        self.once(name, work)

    def call(
        self, command: str, config: str, name: str, settings: Mapping[str, Any], *more: str
    ) -> int:
        """hcrlhf COMMAND --config configs/real/CONFIG.yaml with the settings in place."""
        every = {"trainer.default_root_dir": self.out / name, **settings}
        every |= QUICK[config] if self.quick else {}
        arguments = [command, "--config", str(CONFIGS / f"{config}.yaml"), *more]
        for key, value in every.items():
            arguments += [f"--{key}", str(value)]
        return cli.main(arguments)


def make_backbone(folder: Path, texts: Sequence[str], seed: int = 0) -> None:
    """A byte-level BPE tokenizer of 4,000 pieces learnt on the texts, and an untrained Llama."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>")
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    tokenizer.save_pretrained(folder)
    LlamaForCausalLM(config).save_pretrained(folder)


# -- measuring -------------------------------------------------------------------------------------


def baseline_margins(training: Sequence[Pair], held: Sequence[Pair]) -> NDArray[np.float64]:
    """Logistic regression on differences of TF-IDF vectors (1-2-grams) of the two responses.

    Each pair is trained on in both orders, so the model has no intercept to learn.

    Returns:
        log-odds (n,) that the held-out pair is ordered as labelled.
    """
    from scipy.sparse import vstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    tfidf = TfidfVectorizer(ngram_range=(1, 2))
    tfidf.fit([text for pair in training for text in (pair.higher, pair.lower)])

    def differences(pairs: Sequence[Pair]) -> Any:
        higher, lower = [p.higher for p in pairs], [p.lower for p in pairs]
        return tfidf.transform(higher) - tfidf.transform(lower)

    x = differences(training)
    model = LogisticRegression(max_iter=1000, fit_intercept=False)
    model.fit(vstack([x, -x]), np.repeat([1, 0], len(training)))
    margins: NDArray[np.float64] = model.decision_function(differences(held))
    return margins


@dataclass(frozen=True)
class FoldResult:
    """Held-out pairs of one fold, and who ordered them as labelled."""

    rows: int
    pairs: list[Pair]
    fits: Bools  # (n,), True where the prompt is short enough for the model
    scores: NDArray[np.float64]  # (fits.sum(), 2): higher, lower
    baseline: Bools  # (n,)


def measure_fold(out: Path, task: str, fold: int) -> FoldResult:
    held_file, rest_file = (
        str(out / "data" / f"{task}-{part}-{fold}.jsonl.gz") for part in ("held", "rest")
    )
    held = read_pairs(held_file, LABELS[task])
    record = json.loads((out / f"{task}-{fold}" / "scores.json").read_text())
    stage = json.loads((out / f"{task}-{fold}" / STAGE_FILE).read_text())
    scores = np.array(record["scores"])
    accuracy = float((scores[:, 0] > scores[:, 1]).mean())
    if record["pairs"] != len(held) or abs(accuracy - stage["metrics"]["accuracy"]) > 1e-6:
        raise SystemExit(f"{task}-{fold} was not measured on the pairs of {held_file}")
    fits = np.zeros(len(held), dtype=bool)
    fits[record["index"]] = True
    margins = baseline_margins(read_pairs(rest_file, LABELS[task]), held)
    return FoldResult(len(read_rows(held_file)), held, fits, scores, margins > 0)


def accuracy(right: Bools) -> dict[str, float]:
    interval = proportion(int(right.sum()), len(right))
    return {
        "value": interval.value,
        "low": interval.low,
        "high": interval.high,
        "pairs": len(right),
    }


def compare(ours: Bools, theirs: Bools, keys: Sequence[str]) -> dict[str, float]:
    """Difference of two accuracies on the same pairs.

    Its 95% interval resamples prompts, since the pairs of one prompt are not independent; the
    p-value is McNemar's exact one, which takes them to be.
    """
    _, groups = np.unique(np.array(keys), return_inverse=True)
    counts = np.bincount(groups)
    gains = np.bincount(groups, weights=ours.astype(float) - theirs)
    draws = np.random.default_rng(0).integers(0, len(counts), (2000, len(counts)))
    resampled = gains[draws].sum(axis=1) / counts[draws].sum(axis=1)
    only_ours, only_theirs = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    low, high = np.quantile(resampled, [0.025, 0.975])
    return {
        "value": float(ours.mean() - theirs.mean()),
        "low": float(low),
        "high": float(high),
        "only model right": only_ours,
        "only baseline right": only_theirs,
        "mcnemar p": float(stats.binomtest(only_ours, only_ours + only_theirs).pvalue),
    }


def summarise(task: str, folds: Sequence[FoldResult]) -> dict[str, Any]:
    """All folds pooled."""
    pairs = [p for f in folds for p in f.pairs]
    fits = np.concatenate([f.fits for f in folds])
    scores = np.concatenate([f.scores for f in folds])
    baseline = np.concatenate([f.baseline for f in folds])
    scored = [p for p, fit in zip(pairs, fits, strict=True) if fit]
    model = scores[:, 0] > scores[:, 1]
    longer = np.array([len(p.higher) > len(p.lower) for p in scored])
    rows = sum(f.rows for f in folds)
    result: dict[str, Any] = {
        "rows": rows,
        "rows left out: equal or empty responses": rows - len(pairs),
        "pairs left out: prompt too long for the model": int((~fits).sum()),
        "prompts": len({p.key for p in scored}),
        "accuracy": accuracy(model),
        "accuracy per fold": [float((f.scores[:, 0] > f.scores[:, 1]).mean()) for f in folds],
        "baseline accuracy": accuracy(baseline[fits]),
        "baseline accuracy, too long ones too": accuracy(baseline),
        "accuracy of: the longer one": accuracy(longer),
        "difference": compare(model, baseline[fits], [p.key for p in scored]),
    }
    if task == "cost":
        result |= summarise_signs(scores, scored)
    return result


def summarise_signs(scores: NDArray[np.float64], pairs: Sequence[Pair]) -> dict[str, Any]:
    """Sign accuracy and calibration of the costs, one response at a time."""
    import torch
    from torchmetrics.functional.classification import binary_calibration_error

    harmful = np.array([[p.higher_harmful, p.lower_harmful] for p in pairs], dtype=bool)
    costs = torch.from_numpy(scores.ravel())
    ece = binary_calibration_error(costs.sigmoid(), torch.from_numpy(harmful.ravel()).long(), 15)
    return {
        "sign accuracy": accuracy(((scores > 0) == harmful).ravel()),
        "calibration error": float(ece),
        "harmful share": float(harmful.mean()),
    }


def read_predictions(path: Path) -> dict[str, Any]:
    """Means over the evaluation prompts, with the half-width of a 95% Student-t interval."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    figures: dict[str, Any] = {"prompts": len(rows)}
    for name in ("reward", "cost", "kl"):
        x = np.array([row[name] for row in rows])
        width = float(stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
        figures[name] = {"mean": float(x.mean()), "plus or minus": width}
    figures["cost > 0"] = float(np.mean([row["cost"] > 0 for row in rows]))
    figures["truncated"] = float(np.mean([row["truncated"] for row in rows]))
    return figures


def table(results: Mapping[str, Any]) -> str:
    """The figures as a Markdown table."""

    def percent(x: Mapping[str, float]) -> str:
        return f"{x['value']:.3f} ({x['low']:.3f} to {x['high']:.3f})"

    reward, cost, policy = results["reward"], results["cost"], results["policy"]
    rows: list[tuple[str, ...]] = [("", "HH-RLHF, reward model", "PKU-SafeRLHF, cost model")]
    rows += [
        (name, *(percent(task[key]) for task in (reward, cost)))
        for name, key in (
            ("pair accuracy (95% Wilson)", "accuracy"),
            ("TF-IDF on the same pairs", "baseline accuracy"),
            ("TF-IDF on all pairs", "baseline accuracy, too long ones too"),
            ("the longer response", "accuracy of: the longer one"),
            ("model minus TF-IDF (95%, by prompt)", "difference"),
        )
    ]
    rows += [
        ("McNemar p", *(f"{task['difference']['mcnemar p']:.2g}" for task in (reward, cost))),
        ("pairs scored", *(str(task["accuracy"]["pairs"]) for task in (reward, cost))),
        ("sign accuracy", "", percent(cost["sign accuracy"])),
        ("calibration error (15 bins)", "", f"{cost['calibration error']:.3f}"),
    ]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---|---|---|")
    wall, cpu = (sum(s[kind] for s in results["seconds"].values()) for kind in ("wall", "cpu"))
    lines += [
        "",
        f"verdict: {policy['verdict']}; {wall:.0f} s, of which {cpu:.0f} s processor time",
    ]
    return "\n".join(lines)


# -- the whole -------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--hh", required=True, help="file of chosen and rejected dialogues")
    parser.add_argument("--pku", required=True, help="file of PKU-SafeRLHF pairs")
    parser.add_argument("--sft", required=True, help="file of prompts and safe responses")
    parser.add_argument(
        "--prompts", nargs="*", default=[], help="more prompts for the policy run, beside sft's"
    )
    parser.add_argument("--backbone", required=True, help='a model folder, or "new"')
    parser.add_argument("--out", required=True, type=Path, help="folder for data, runs, results")
    parser.add_argument("--quick", action="store_true", help="a few rows and steps: does it run?")
    return parser.parse_args()


def main() -> None:
    options = parse()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    sources = {"hh": options.hh, "pku": options.pku, "sft": options.sft}
    sources |= {f"prompts {i}": path for i, path in enumerate(options.prompts)}
    data = Data.read(sources, QUICK_ROWS if options.quick else None)
    counts = data.write(out / "data")
    backbone = options.backbone
    runs = Runs(out, options.quick)
    if backbone == "new":
        backbone = str(out / "backbone")
        rows = read_rows(str(out / "data" / "sft.jsonl"))
        texts = [row[field] for row in rows for field in ("prompt", "response")]
        runs.once("backbone", lambda: make_backbone(Path(backbone), texts))
    train(runs, backbone)
    results = {
        "backbone": "new" if options.backbone == "new" else Path(backbone).name,
        "backbone parameters": count_parameters(backbone),
        "counts": counts,
        **{t: summarise(t, [measure_fold(out, t, k) for k in range(FOLDS)]) for t in LABELS},
        "policy": {
            "verdict": json.loads((out / "policy" / "verdict.json").read_text())["verdict"],
            "evaluation, sft": read_predictions(out / "answers-sft" / "predictions.jsonl"),
            "evaluation, policy": read_predictions(out / "answers-policy" / "predictions.jsonl"),
        },
        "seconds": runs.seconds,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, no GPU used",
        "versions": {
            name: version(name)
            for name in ("torch", "transformers", "peft", "lightning", "scikit-learn")
        }
        | {"python": platform.python_version()},
    }
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print("\n" + table(results))


def train(runs: Runs, backbone: str) -> None:
    """SFT; five folds and a final model for reward and cost; the policy and its answers."""
    out, data = runs.out, runs.out / "data"
    sft = {"model.init_args.model": backbone, "data.init_args.path": data / "sft.jsonl"}
    runs.fit("sft", "sft", sft)
    for task in LABELS:
        start = {"model.init_args.sft": out / "sft"}
        for fold in range(FOLDS):
            files = {
                "data.init_args.path": data / f"{task}-rest-{fold}.jsonl.gz",
                "data.init_args.validation": data / f"{task}-held-{fold}.jsonl.gz",
            }
            callback = "--trainer.callbacks+=benchmarks.real_data.HeldOutScores"
            runs.fit(f"{task}-{fold}", task, start | files, callback)
        runs.fit(task, task, start | {"data.init_args.path": data / f"{task}.jsonl.gz"})
    policy = {f"model.init_args.{stage}": out / stage for stage in ("sft", "reward", "cost")}
    policy |= {f"data.init_args.{name}": data / f"{name}.jsonl" for name in ("train", *RESERVED)}
    runs.fit("policy", "policy", policy)
    for name in ("sft", "policy"):
        more = ["--trainer.callbacks", "callbacks.Completions"]
        if name == "policy":
            more += ["--ckpt_path", str(out / "policy" / "checkpoints" / "last.ckpt")]
        folder = f"answers-{name}"
        runs.once(folder, lambda f=folder, m=more: answer(runs, f, policy, m))  # type: ignore[misc]


def answer(runs: Runs, folder: str, policy: Mapping[str, Any], more: Sequence[str]) -> None:
    """Responses to the evaluation prompts; without a checkpoint the policy is still the SFT."""
    if runs.call("predict", "policy", folder, policy, *more) != cli.PASSED:
        raise SystemExit(f"{folder} failed")


def count_parameters(folder: str) -> int:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


if __name__ == "__main__":
    main()
