"""`hcrlhf demo`: the shipped demo configs one after the other, then a table a person can read.

The demo has no code path of its own through training: each stage is `hcrlhf fit --config …`, as
anyone can run it by hand, with the run's folder put in place of runs/demo.
"""

from __future__ import annotations

import argparse
import json
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from hcrlhf.certificate import PLAN_FILE
from hcrlhf.cli import NO_SOLUTION, NOT_TESTED, PASSED
from hcrlhf.configured import granted
from hcrlhf.constraint import Constraint
from hcrlhf.errors import InputError
from hcrlhf.hashing import read_json
from hcrlhf.ledger import FILE as LEDGER_FILE
from hcrlhf.ledger import forget
from hcrlhf.preferences import squash_range
from hcrlhf.stages import read_stage
from hcrlhf.tables import retrospective_order
from hcrlhf.world import WorldSizes, answer_kind, true_cost, true_reward, write_world

RunTrainer = Callable[[Sequence[str]], int]

# The configs lie beside this package: the project is run from its checkout.
CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "demo"

POLICIES = {
    "sft": "supervised (SFT)",
    "unconstrained": "RLHF, no constraint",
    "policy": "hcrlhf, constrained",
}


def main(arguments: Sequence[str], run_trainer: RunTrainer) -> int:
    """Parses the demo's own options and runs it; returns the exit code."""
    parser = argparse.ArgumentParser(
        "hcrlhf demo",
        description="SFT, reward model, cost model, policies and safety test on the embedded "
        "world, on a CPU.",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the world, its data and every run")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where to make the folder")
    options = parser.parse_args(list(arguments))
    folder = fresh_folder(options.runs)
    return Demo(folder, options.seed, run_trainer).run()


def fresh_folder(parent: Path) -> Path:
    """parent/demo, or the first parent/demo-N that does not exist: no run sees another's data."""
    folder, number = parent / "demo", 1
    while folder.exists():
        number += 1
        folder = parent / f"demo-{number}"
    return folder


@dataclass(frozen=True)
class Row:
    """One policy on the evaluation prompts."""

    name: str
    reward: float  # mean of the reward model, standardised
    cost: float  # mean of the cost model, squashed; positive = harmful
    harm: float  # share of responses with cost > 0
    bounds: tuple[float, ...]  # upper confidence bounds, one per limit
    true_reward: float
    true_harm: float  # share of responses that the world knows to be harmful


class Demo:
    """One run of the demo in a folder of its own.

    Args:
        overrides: more command-line arguments per stage (tests make every stage smaller).
    """

    def __init__(
        self,
        folder: Path,
        seed: int,
        run_trainer: RunTrainer,
        sizes: WorldSizes | None = None,
        overrides: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.folder = folder
        self.seed = seed
        self.run_trainer = run_trainer
        self.sizes = sizes or WorldSizes()
        self.overrides = overrides or {}

    def run(self) -> int:
        """Every stage, the table, three examples; 0 when all ended as intended."""
        start = time.monotonic()
        world = self.folder / "world"
        self._say(1, "the embedded world: model, demonstrations, preferences, prompts", world)
        write_world(world, self.seed, self.sizes)
        # Data that was just made has no past: a ledger that once lay here told of other data.
        forget(self.folder / LEDGER_FILE)
        titles = {
            "sft": "supervised fine-tuning",
            "reward": "reward model",
            "cost": "cost model",
            "unconstrained": "a policy without the constraint, to compare",
            "policy": "the policy under the pessimistic constraint, and its safety test",
        }
        codes = {}
        for number, (stage, title) in enumerate(titles.items(), start=2):
            self._say(number, title, self.folder / stage)
            begin = time.monotonic()
            codes[stage] = self._fit(stage)
            print(f"  {time.monotonic() - begin:.0f} s", flush=True)
        self._say(7, "all three policies answer the evaluation prompts", self.folder / "evaluation")
        answers = {name: self._predict(name) for name in POLICIES}
        limits = self._limits()
        rows = [summarise(title, answers[name], limits) for name, title in POLICIES.items()]
        verdict = json.loads((self.folder / "policy" / "verdict.json").read_text())
        report = self._report(rows, limits, answers, verdict, time.monotonic() - start)
        (self.folder / "report.txt").write_text(report, encoding="utf-8")
        print("\n" + report)
        return PASSED if self._as_intended(codes) else NO_SOLUTION

    def _limits(self) -> list[Constraint]:
        """As they were tested; where no test was opened, as they would have been."""
        folder = self.folder / "policy"
        if (folder / PLAN_FILE).is_file():
            return [Constraint.read(c) for c in read_json(folder / PLAN_FILE)["constraints"]]
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        squash = read_stage(str(self.folder / "cost"), "cost", "cost").squash
        ends = squash_range(squash)
        return [c.with_range(*ends) if ends else c for c in granted(config)]

    @staticmethod
    def _as_intended(codes: Mapping[str, int]) -> bool:
        # The policy without the constraint is never tested, and its exit code says so.
        expected = dict.fromkeys(("sft", "reward", "cost", "policy"), PASSED)
        return dict(codes) == expected | {"unconstrained": NOT_TESTED}

    def _say(self, number: int, title: str, folder: Path) -> None:
        print(f"\n[{number}/7] {title} -> {folder}", flush=True)

    # -- stages --------------------------------------------------------------------------------

    def _arguments(self, stage: str) -> list[str]:
        """The config of a stage with this run's folder in place of runs/demo."""
        f = self.folder
        data = f / "world"
        prompts = data / "prompts"
        policy = {
            "model.init_args.sft": f / "sft",
            "model.init_args.reward": f / "reward",
            "model.init_args.cost": f / "cost",
            "model.init_args.seed": self.seed,
            "data.init_args.train": prompts / "train.jsonl",
            "data.init_args.validation": prompts / "validation.jsonl",
            "data.init_args.safety": prompts / "safety.jsonl",
            "data.init_args.evaluation": prompts / "evaluation.jsonl",
            "data.init_args.seed": self.seed,
        }
        preference = {
            "model.init_args.sft": f / "sft",
            "data.init_args.path": data / "preferences.jsonl",
            "data.init_args.seed": self.seed,
        }
        settings: dict[str, dict[str, Any]] = {
            "sft": {
                "model.init_args.model": data / "model",
                "data.init_args.path": data / "demonstrations.jsonl",
                "data.init_args.seed": self.seed,
            },
            "reward": preference,
            "cost": preference,
            "unconstrained": policy,
            "policy": policy,
        }
        configs = ["policy", "unconstrained"] if stage == "unconstrained" else [stage]
        arguments = [a for name in configs for a in ("--config", str(CONFIGS / f"{name}.yaml"))]
        arguments += ["--seed_everything", str(self.seed)]
        for key, value in settings[stage].items():
            arguments += [f"--{key}", str(value)]
        return [*arguments, *self.overrides.get(stage, [])]

    def _fit(self, stage: str) -> int:
        root = ["--trainer.default_root_dir", str(self.folder / stage)]
        code = self.run_trainer(["fit", *self._arguments(stage), *root])
        if code not in (PASSED, NO_SOLUTION, NOT_TESTED):
            raise InputError(f"the stage {stage} ended with exit code {code}")
        return code

    def _predict(self, name: str) -> list[dict[str, Any]]:
        """Responses to the evaluation prompts; SFT is the policy before its first update."""
        stage = "policy" if name == "sft" else name
        folder = self.folder / "evaluation" / name
        arguments = ["predict", *self._arguments(stage), "--trainer.default_root_dir", str(folder)]
        arguments += ["--trainer.callbacks", "callbacks.Completions"]
        arguments += ["--trainer.enable_progress_bar", "false"]
        if name != "sft":
            checkpoint = self.folder / name / "checkpoints" / "last.ckpt"
            arguments += ["--ckpt_path", str(checkpoint)]
        self.run_trainer(arguments)
        lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    # -- the report ----------------------------------------------------------------------------

    def _report(
        self,
        rows: Sequence[Row],
        limits: Sequence[Constraint],
        answers: Mapping[str, list[dict[str, Any]]],
        verdict: Mapping[str, Any],
        seconds: float,
    ) -> str:
        passed = verdict["verdict"] == "PASS"
        words = "PASS" if passed else verdict["verdict"].replace("_", " ").lower()
        n = len(answers["policy"])
        parts = [
            f"On {n} evaluation prompts, which no stage was trained on:",
            table(rows, limits),
            "reward, cost: means by the learnt models; harm: share of responses with cost > 0.\n"
            "U: upper confidence bound, to be at most the limit below it.\n"
            "true reward, true harm: what the world itself knows; no policy was told.",
            f"Safety test of the constrained policy, on the safety split that nothing else "
            f"touches:\n  {words}: {verdict['reason']}",
            *(example(answers, index) for index in pick_examples(answers)),
            self._places(passed),
            f"seed {self.seed}; {seconds:.0f} s",
        ]
        return "\n\n".join(parts) + "\n"

    def _places(self, passed: bool) -> str:
        f = self.folder
        lines = [f"Written to {f}:"]
        if passed:
            lines += [
                "  policy/policy/            the released policy, a LoRA adapter for sft/",
                "  policy/certificate.md     what was promised, and on what data",
            ]
        lines += [
            "  policy/verdict.json       the verdict",
            "  */config.yaml, metrics.csv  what was run, and how it went",
            "  evaluation/               every answer to the evaluation prompts",
        ]
        if passed:
            lines.append(f"Check it without a model: hcrlhf verify {f}/policy/certificate.json")
        return "\n".join(lines)


def summarise(name: str, answers: Sequence[Mapping[str, Any]], limits: Sequence[Constraint]) -> Row:
    """The table's row for one policy's answers; its bounds are those of the safety test."""
    n = len(answers)
    costs = np.array([a["cost"] for a in answers])
    # Betting depends on the order; that of the file is nobody's random one.
    costs = costs[retrospective_order([a["prompt"] for a in answers])]
    harmful = sum(true_cost(a["prompt"], a["response"]) > 0 for a in answers)
    return Row(
        name,
        reward=sum(a["reward"] for a in answers) / n,
        cost=float(costs.mean()),
        harm=float((costs > 0).mean()),
        bounds=tuple(c.rule.upper(c.values(costs), c.delta, c.within) for c in limits),
        true_reward=sum(true_reward(a["prompt"], a["response"]) for a in answers) / n,
        true_harm=harmful / n,
    )


def table(rows: Sequence[Row], limits: Sequence[Constraint]) -> str:
    """The rows as aligned text, the limits under the bounds."""
    heads = "".join(f"{f'U({c.label})':>14}" for c in limits)
    lines = [
        f"{'policy':<22}{'reward':>7}{'cost':>7}{'harm':>7}{heads}{'true reward':>13}"
        f"{'true harm':>11}"
    ]
    for r in rows:
        bounds = "".join(f"{u:>14.2f}" for u in r.bounds)
        lines.append(
            f"{r.name:<22}{r.reward:>7.2f}{r.cost:>7.2f}{r.harm:>7.1%}{bounds}"
            f"{r.true_reward:>13.2f}{r.true_harm:>11.1%}"
        )
    ends = "".join(f"{c.threshold:>14.2f}" for c in limits)
    lines.append(f"{'limit':<43}{ends}")
    return "\n".join(lines)


def pick_examples(answers: Mapping[str, list[dict[str, Any]]], count: int = 3) -> list[int]:
    """The first prompts on which the policies differ in kind: what the constraint changed."""
    kinds = [
        [answer_kind(a["prompt"], a["response"]) for a in row]
        for row in zip(*answers.values(), strict=True)
    ]
    differing = [i for i, row in enumerate(kinds) if len(set(row)) > 1]
    rest = [i for i in range(len(kinds)) if i not in set(differing)]
    return [*differing, *rest][:count]


def example(answers: Mapping[str, list[dict[str, Any]]], index: int) -> str:
    """One prompt and the policies' answers under one another."""
    prompt = answers["policy"][index]["prompt"]
    lines = [f"> {prompt}"]
    for name, title in POLICIES.items():
        response = answers[name][index]["response"] or "(nothing)"
        wrapped = textwrap.wrap(response, 72)
        lines.append(f"  {title + ':':<22}{wrapped[0]}")
        lines += [" " * 24 + line for line in wrapped[1:]]
    return "\n".join(lines)
