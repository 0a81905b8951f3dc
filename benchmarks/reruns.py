"""Someone who runs again until it passes: how often is an unsafe policy released at last?

    python -m benchmarks.reruns

Every attempt is a new policy whose true mean cost lies at or slightly above the limit τ, and up to
20 of them are tested one after another; the first PASS releases a policy that should not be. A
prompt harms with a probability of its own that all policies share in part, so that a lucky set of
prompts stays lucky.

Without a ledger every attempt has all of δ, on the same set or on a fresh one. With the ledger
attempt k is granted δ·2^-k, and prompts that were used are refused; these runs go through the
project's own gate and ledger. Two adversaries tune their policy on the one set that they test it
on: the first sees only the reported bound U, the second the cost of every prompt.

Seeds are the SHA-256 of names. What stands in reruns.jsonl is not run again.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from benchmarks.coverage import (
    MARKERS,
    ROOT,
    Floats,
    Results,
    Row,
    generator,
    import_pyplot,
    interval,
    markdown,
    origin,
    run_missing,
    save,
)
from benchmarks.promise import CODE, code_line, memory, samples_of
from hcrlhf.constraint import Constraint
from hcrlhf.errors import InputError
from hcrlhf.gate import Gate, Population
from hcrlhf.hashing import sha256
from hcrlhf.ledger import granted_share

DELTA = 0.05
N = 300  # safety prompts of a test
FILE = 1000  # prompts of the file that one of them keeps using
ATTEMPTS = 20
LOW, HIGH = -1.0, 3.0  # cost of a harmless and of a harmful response
RATE = 0.1  # harm rate at which the mean cost is the limit
TAU = LOW + RATE * (HIGH - LOW)
SD = (HIGH - LOW) * (RATE * (1 - RATE)) ** 0.5
SHARED = 0.7  # how much of a prompt's harm is the prompt's own, whatever the policy
STYLES = 8  # ways of answering among which an adversary chooses
KINDS = 15  # of prompts, which the first adversary tells apart
EXCESS = {"at the limit": (0.0, 0.0), "0.02 to 0.1 sd above": (0.02, 0.1)}
AFTER = (1, 2, 3, 5, 10, 20)

LIMIT = Constraint("mean", TAU, DELTA, N, lower=-4.0, upper=4.0)

Ints = NDArray[np.int64]

# -- policies and prompts --------------------------------------------------------------------------


def harm_rate(rng: Generator, excess: str) -> float:
    """True harm rate of a new policy, its mean cost `excess` standard deviations above τ."""
    return RATE + float(rng.uniform(*EXCESS[excess])) * SD / (HIGH - LOW)


def prompts(rng: Generator, shape: int | tuple[int, int]) -> Floats:
    """What of its harm is a prompt's own: Beta(0.1, 0.9), mean 0.1, mostly near 0 or near 1."""
    return np.asarray(rng.beta(RATE, 1 - RATE, shape))


def respond(rng: Generator, rate: float, own: Floats) -> Floats:
    """One cost per prompt; its mean over all prompts is that of the harm rate, exactly."""
    rest = (rate - SHARED * RATE) / (1 - SHARED)
    return np.where(rng.random(own.shape) < (1 - SHARED) * rest + SHARED * own, HIGH, LOW)


def passes(costs: Floats, share: float = 1.0) -> bool:
    return LIMIT.rule.passes(costs, TAU, DELTA * share, LIMIT.within)


# -- one run: at which attempt something is released -----------------------------------------------


@dataclass
class Run:
    """Up to 20 attempts of one person."""

    rng: Generator
    excess: str
    name: str
    words: Counter[str] = field(default_factory=Counter)
    opened: int = 0

    def until_release(self, attempt: Callable[[int], bool]) -> int:
        """The attempt that passed, or one more than there are."""
        return next((k for k in range(1, ATTEMPTS + 1) if attempt(k)), ATTEMPTS + 1)

    # -- without a ledger --------------------------------------------------------------------------

    def same_set(self) -> int:
        own = prompts(self.rng, N)
        return self.until_release(
            lambda _: passes(respond(self.rng, harm_rate(self.rng, self.excess), own))
        )

    def fresh_set(self) -> int:
        def attempt(_: int) -> bool:
            rate = harm_rate(self.rng, self.excess)
            return passes(respond(self.rng, rate, prompts(self.rng, N)))

        return self.until_release(attempt)

    def sees_bound(self) -> int:
        """Fits a policy to the one set by the reported U alone.

        Answers are deterministic, in several ways, each with a fixed cost per prompt. Every attempt
        answers one kind of prompts (a fifteenth of them) in another way and keeps the change if U
        did not grow. All ways harm equally often, so the true mean of every one of these policies
        is the same; only the set's own prompts get better.
        """
        harms = self.rng.random((N, STYLES)) < harm_rate(self.rng, self.excess)
        costs = np.where(harms, HIGH, LOW)
        kept, lowest = np.zeros(N, dtype=np.int64), np.inf

        def attempt(k: int) -> bool:
            nonlocal kept, lowest
            way = kept.copy()
            if k > 1:
                way[(k - 2) % KINDS :: KINDS] += 1
            judged = LIMIT.judge(costs[np.arange(N), way])
            if judged.upper <= lowest:
                kept, lowest = way, judged.upper
            return judged.passed

        return self.until_release(attempt)

    def sees_costs(self) -> int:
        """Fits a policy to the one set by its costs: another way wherever the last one harmed."""
        own = prompts(self.rng, (N, STYLES))
        way = np.zeros(N, dtype=np.int64)

        def attempt(_: int) -> bool:
            rate = harm_rate(self.rng, self.excess)
            costs = respond(self.rng, rate, own[np.arange(N), way])
            way[costs > 0] = (way[costs > 0] + 1) % STYLES
            return passes(costs)

        return self.until_release(attempt)

    # -- with the ledger ---------------------------------------------------------------------------

    def halving(self) -> int:
        """A fresh set each time and δ·2^-k: the decisions of the ledger's tests, without files."""

        def attempt(k: int) -> bool:
            rate = harm_rate(self.rng, self.excess)
            costs = respond(self.rng, rate, prompts(self.rng, N))
            return passes(costs, granted_share("halving", k))

        return self.until_release(attempt)

    def ledger_fresh(self) -> int:
        """A fresh file of prompts each time, through the gate."""
        return self._ledger(lambda k: self._file(k, N))

    def ledger_same(self) -> int:
        """The same file of prompts each time, through the gate."""
        file = self._file(0, FILE)
        return self._ledger(lambda _: file)

    def _file(self, k: int, size: int) -> dict[str, float]:
        own = prompts(self.rng, size)
        return {sha256("prompt", self.name, str(k), str(i)): own[i] for i in range(size)}

    def _ledger(self, file_of: Callable[[int], dict[str, float]]) -> int:
        folder = Path(tempfile.mkdtemp(dir=memory()))
        try:
            return self.until_release(lambda k: self._attempt(folder, k, file_of(k)))
        finally:
            shutil.rmtree(folder)

    def _attempt(self, folder: Path, k: int, file: dict[str, float]) -> bool:
        """One run of the project: grant, training (here a draw), test, verdict."""
        gate = Gate(folder / f"run-{k}", folder / "ledger.jsonl", state=folder / "state")
        population = Population(list(file))
        try:
            granted = gate.grant([LIMIT])
            gate.require_fresh(population, N)
        except InputError as error:
            self.words[str(error).replace(str(folder), "…")] += 1
            return False
        self.opened += 1
        rate = harm_rate(self.rng, self.excess)
        files = {"policy.safetensors": sha256(self.name, str(k))}
        with gate.test([LIMIT], population, files, {}) as trial:
            keys = trial.next(N)
            costs = respond(self.rng, rate, np.array([file[key] for key in keys]))
            trial.record(samples_of(keys, costs, 1))
            passed = trial.passed()
            if passed:
                trial.certify({}, {})
            else:
                trial.fail()
            trial.release()
        share = granted_share("halving", self.opened)
        if granted[0].delta != DELTA * share or passed != passes(costs, share):
            raise SystemExit(f"{self.name}: the gate decided otherwise than at δ·2^-{self.opened}")
        return passed


@dataclass(frozen=True)
class Scenario:
    """What somebody does again and again."""

    says: str
    run: Callable[[Run], int]
    through_gate: bool
    colour: str


SCENARIOS = {
    "same set, no ledger": Scenario(
        "(a) the same prompts each time, responses redrawn, all of δ",
        Run.same_set,
        False,
        "#E69F00",
    ),
    "fresh set, no ledger": Scenario(
        "(b) fresh prompts each time, all of δ", Run.fresh_set, False, "#D55E00"
    ),
    "ledger, fresh sets": Scenario(
        "(c) fresh prompts each time, attempt k granted δ·2^-k, through the gate",
        Run.ledger_fresh,
        True,
        "#0072B2",
    ),
    "δ·2^-k, fresh sets": Scenario(
        "(c') the same decisions without files, in more runs", Run.halving, False, "#56B4E9"
    ),
    "ledger, same file": Scenario(
        f"(d) the same file of {FILE:,} prompts each time, through the gate",
        Run.ledger_same,
        True,
        "#009E73",
    ),
    "tuned on U, no ledger": Scenario(
        "(e) tunes on one set and sees U, all of δ; deterministic answers",
        Run.sees_bound,
        False,
        "#CC79A7",
    ),
    "tuned on costs, no ledger": Scenario(
        "(e') tunes on one set and sees every cost, all of δ", Run.sees_costs, False, "#000000"
    ),
}

# -- jobs ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """Some of the runs of one scenario."""

    scenario: str
    excess: str
    first: int
    runs: int

    @property
    def name(self) -> str:
        return f"reruns/{self.scenario}/{self.excess}/{self.first}+{self.runs}"


def run_job(job: Job) -> list[Row]:
    started = time.perf_counter()
    released: Counter[int] = Counter()
    words: Counter[str] = Counter()
    opened = 0
    for k in range(job.first, job.first + job.runs):
        name = f"reruns/{job.scenario}/{job.excess}/{k}"
        run = Run(generator(name), job.excess, name)
        released[SCENARIOS[job.scenario].run(run)] += 1
        words += run.words
        opened += run.opened
    return [
        {
            "job": job.name,
            "code": CODE,
            "scenario": job.scenario,
            "excess": job.excess,
            "runs": job.runs,
            "released at": [released[k] for k in range(1, ATTEMPTS + 1)],
            "tests opened": opened,
            "refusals": sum(words.values()),
            "words": dict(words.most_common()),
            "seconds": round(time.perf_counter() - started, 3),
        }
    ]


def all_jobs(runs: int, gate_runs: int) -> list[Job]:
    jobs = []
    for excess in EXCESS:
        for name, scenario in SCENARIOS.items():
            total, chunk = (gate_runs, 50) if scenario.through_gate else (runs, 500)
            if scenario.through_gate and excess == "at the limit":
                total //= 3  # (c') has the same decisions in more runs
            for first in range(0, total, chunk):
                jobs.append(Job(name, excess, first, min(chunk, total - first)))
    return jobs


# -- report ----------------------------------------------------------------------------------------


def rows_of(rows: Sequence[Row], scenario: str, excess: str) -> list[Row]:
    return [row for row in rows if (row["scenario"], row["excess"]) == (scenario, excess)]


def released(rows: Sequence[Row], scenario: str, excess: str) -> tuple[Ints, int]:
    """How many runs had released an unsafe policy after attempt 1, .., 20; and of how many."""
    own = rows_of(rows, scenario, excess)
    counts = np.cumsum(np.sum([row["released at"] for row in own], axis=0))
    return counts, sum(row["runs"] for row in own)


def table(rows: Sequence[Row], excess: str) -> list[str]:
    """Share of runs with a release after so many attempts; the last with its interval."""
    cells = len(SCENARIOS) * len(EXCESS)

    def line(scenario: str) -> list[str]:
        counts, runs = released(rows, scenario, excess)
        shares = [f"{counts[k - 1] / runs:.4f}" for k in AFTER]
        low, high = interval(int(counts[-1]), runs, cells)
        return [scenario, f"{runs:,}", *shares[:-1], f"{shares[-1]} ({low:.4f} to {high:.4f})"]

    head = ["scenario", "runs", *(f"after {k}" for k in AFTER)]
    return markdown(head, map(line, SCENARIOS))


def refusal_lines(rows: Sequence[Row]) -> list[str]:
    """How often the ledger refused, and in which words."""
    lines = []
    for scenario in ("ledger, fresh sets", "ledger, same file"):
        own = [row for row in rows if row["scenario"] == scenario]
        runs, opened = (sum(row[key] for row in own) for key in ("runs", "tests opened"))
        refused = sum(row["refusals"] for row in own)
        words = sum((Counter(row["words"]) for row in own), Counter[str]())
        lines.append(
            f"- {scenario}: {opened:,} tests opened and {refused:,} attempts refused in {runs} runs"
        )
        lines += [f"  - {count:,} times: “{text}”" for text, count in words.most_common()]
    return lines


def report(rows: Sequence[Row], command: str) -> str:
    lines = [
        "# Running again until it passes",
        "",
        "Written by `benchmarks/reruns.py`.",
        "",
        *origin(command, rows),
        f"- {code_line(rows)}",
        "",
        f"Limit: mean cost ≤ τ = {TAU:g}, δ = {DELTA:g}, {N} safety prompts, betting star. A "
        f"response costs {HIGH:g} where it harms and {LOW:g} where not; at τ one in ten harms. "
        "No policy that is tested here is safer than τ; those exactly at it stand for policies the "
        f"least bit worse. So every release is an error. Up to {ATTEMPTS} attempts; who passes "
        "stops.",
        "",
        *(f"- **{name}**: {scenario.says}" for name, scenario in SCENARIOS.items()),
        "",
        "Where runs go through the gate, every decision was checked against the same bound at the "
        "δ granted. Intervals (of the last column) are exact and hold together with 95%.",
    ]
    for excess in EXCESS:
        title = f"## True mean {excess}: share of runs that have released a policy"
        lines += ["", title, "", *table(rows, excess)]
    lines += [
        "",
        "Each adversary's policy is fitted to the very prompts it is tested on; for all other "
        "prompts it is as harmful as before. With the ledger neither gets a second look at a "
        "prompt.",
        "",
        "## Refused",
        "",
        "Before training, so nothing is spent. Of the same file only whole tests can be drawn.",
        "",
        *refusal_lines(rows),
    ]
    return "\n".join(lines).replace("= -", "= −").replace(" -1 ", " −1 ") + "\n"


# -- plot ------------------------------------------------------------------------------------------


def plot(rows: Sequence[Row], path: Path) -> None:
    """Share of runs that have released an unsafe policy, over the attempts."""
    plt = import_pyplot()
    figure, panels = plt.subplots(
        1, len(EXCESS), figsize=(9.4, 5.4), sharey=True, layout="constrained"
    )
    attempts = np.arange(1, ATTEMPTS + 1)
    for axes, excess in zip(panels, EXCESS, strict=True):
        for k, (name, scenario) in enumerate(SCENARIOS.items()):
            counts, runs = released(rows, name, excess)
            ends = np.array([interval(int(count), runs, 1) for count in counts]).T
            axes.fill_between(attempts, *ends, color=scenario.colour, alpha=0.13, linewidth=0)
            axes.plot(
                attempts,
                counts / runs,
                color=scenario.colour,
                marker=MARKERS[k],
                markersize=4,
                markevery=(k % 3, 3),
                linewidth=1.4,
                linestyle="--" if "no ledger" in name else "-",
                label=name,
            )
        axes.axhline(DELTA, color="black", linestyle=":", linewidth=1.6, label=f"δ = {DELTA:g}")
        axes.set(xlim=(1, ATTEMPTS), ylim=(0, 1), xlabel="attempts")
        axes.set_xticks([1, 5, 10, 15, 20])
        axes.set_title(f"true mean {excess}")
    panels[0].set_ylabel("share of runs that have released an unsafe policy")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    save(plt, figure, path)


# -- the whole -------------------------------------------------------------------------------------


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("--runs", type=int, default=2000, help="runs without files")
    options.add_argument("--gate-runs", type=int, default=300, help="runs through the gate")
    options.add_argument("--workers", type=int, default=1, help="processes")
    options.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options.add_argument("--plots", type=Path, default=ROOT / "docs" / "plots")
    chosen = options.parse_args()
    jobs = all_jobs(chosen.runs, chosen.gate_runs)
    rows = run_missing(Results(chosen.out / "reruns.jsonl"), jobs, run_job, chosen.workers)
    command = " ".join(["python -m benchmarks.reruns", *sys.argv[1:]])
    text = report(rows, command)
    (chosen.out / "reruns.md").write_text(text, encoding="utf-8")
    print(text)
    plot(rows, chosen.plots / "reruns.png")


if __name__ == "__main__":
    main()
