"""How often each bound errs, and how often it passes what is safe: fixed n, known truth.

    python -m benchmarks.coverage

Coverage: the true mean lies exactly at the threshold τ, so every pass is an error, and a bound
keeps its promise where the share of errors is at most δ. Power: the same distributions with τ 0.25
or 0.5 standard deviations above the true mean. Clopper-Pearson answers for the harm rate
P(C > 0) instead of the mean, with its limit placed in the same way.

Every bound judges the same samples. A cell is one distribution, n, gap and δ; the δ of one
(distribution, n, gap) share their samples, whose seed is the SHA-256 of that name. What stands in
coverage.jsonl is not run again, so the same command resumes; delete the file after a change of a
bound.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import integrate, special, stats

from hcrlhf import betting, bounds

Floats = NDArray[np.float64]
Row = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
CAP = 4.0  # every cost lies in [-4, 4], and every bound is told so
SIZES = (30, 100, 300, 1000, 3000)
POWER_SIZES = SIZES[1:]
DELTAS = (0.1, 0.05, 0.01)
POWER_DELTA = 0.05
GAPS = (0.25, 0.5)  # (τ - true mean) / sd
ASYMPTOTIC = ("student_t", "hall_t")
EXACT = (
    "hoeffding",
    "empirical_bernstein",
    "hoeffding_bentkus",
    "betting star",
    "betting wsr",
    "betting portfolio",
    "clopper_pearson",
)
BOUNDS = ASYMPTOTIC + EXACT
ERROR_OF_STUDY = 0.05  # probability that any interval of the whole study misses

# Okabe and Ito's colours, told apart by colour-blind readers too, and a marker each.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#8A8A8A")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

BOUND_COLOURS = {
    "student_t": "#D55E00",
    "hall_t": "#E69F00",
    "hoeffding": "#8A8A8A",  # one grey for the three that need many costs; the markers differ
    "empirical_bernstein": "#8A8A8A",
    "hoeffding_bentkus": "#8A8A8A",
    "betting star": "#0072B2",
    "betting wsr": "#56B4E9",
    "betting portfolio": "#009E73",
    "clopper_pearson": "#CC79A7",
}

# -- distributions ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Distribution:
    """A cost in [-4, 4]; harm is a cost above 0.

    mean and harm_rate are exact but for rounding, never estimated: every cell rests on them.
    """

    name: str
    formula: str
    mean: float
    sd: float
    harm_rate: float
    draw: Callable[[Generator, int], Floats]

    def threshold(self, gap: float) -> float:
        """τ, `gap` standard deviations above the true mean."""
        return self.mean + gap * self.sd

    def rate_limit(self, gap: float) -> float:
        """ρ, `gap` standard deviations of the 0/1 harm above its true rate."""
        return self.harm_rate + gap * math.sqrt(self.harm_rate * (1 - self.harm_rate))


def squash_variance(scale: float) -> float:
    """Var tanh(Z / scale), Z standard normal, whose mean is 0 by symmetry."""

    def integrand(z: float) -> float:
        return math.tanh(z / scale) ** 2 * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)

    return 2 * float(integrate.quad(integrand, 0, 12)[0])


def squashed_normal() -> Distribution:
    """-1 + 3 tanh(Z/3): symmetric about its mean of -1."""
    return Distribution(
        name="near-normal",
        formula="−1 + 3 tanh(Z/3), Z standard normal",
        mean=-1.0,
        sd=3 * math.sqrt(squash_variance(3)),
        harm_rate=float(special.ndtr(-3 * math.atanh(1 / 3))),
        draw=lambda rng, n: -1 + 3 * np.tanh(rng.standard_normal(n) / 3),
    )


def beta(name: str, a: float, b: float, low: float, high: float) -> Distribution:
    """low + (high - low) Beta(a, b)."""
    width = high - low
    return Distribution(
        name=name,
        formula=f"{low:g} + {width:g} Beta({a:g}, {b:g})".replace("-", "−"),
        mean=low + width * a / (a + b),
        sd=width * math.sqrt(a * b / (a + b + 1)) / (a + b),
        harm_rate=float(special.betaincc(a, b, -low / width)),
        draw=lambda rng, n: low + width * rng.beta(a, b, n),
    )


def two_point(name: str, rate: float, low: float, high: float) -> Distribution:
    """`high` with probability `rate`, else `low` < 0."""
    return Distribution(
        name=name,
        formula=f"{high:g} with probability {rate:g}, else {low:g}".replace("-", "−"),
        mean=low + rate * (high - low),
        sd=(high - low) * math.sqrt(rate * (1 - rate)),
        harm_rate=rate,
        draw=lambda rng, n: np.where(rng.random(n) < rate, high, low),
    )


def harmful_mixture(rate: float, low: float = -1.0, high: float = 3.0) -> Distribution:
    """A harmless cost around `low` and, at the given rate, a severe one around `high`."""

    def draw(rng: Generator, n: int) -> Floats:
        noise = np.tanh(rng.standard_normal(n))
        return np.where(rng.random(n) < rate, high, low) + 0.5 * noise

    return Distribution(
        name=f"{rate:.0%} harmful mixture",
        formula=f"{high:g} with probability {rate:g}, else {low:g}; + ½ tanh Z".replace("-", "−"),
        mean=low + rate * (high - low),
        sd=math.sqrt((high - low) ** 2 * rate * (1 - rate) + 0.25 * squash_variance(1)),
        harm_rate=rate,
        draw=draw,
    )


DISTRIBUTIONS = {
    d.name: d
    for d in (
        squashed_normal(),
        beta("right-skewed", 0.5, 4.5, -1.0, 4.0),
        beta("left-skewed", 4.5, 0.5, -4.0, 0.25),
        harmful_mixture(0.05),
        two_point("2% two-point", 0.02, -1.0, 3.0),
        two_point("0.5% at the cap", 0.005, -1.0, CAP),
        two_point("50/50 two-point", 0.5, -1.0, 1.0),
        beta("U-shaped", 0.5, 0.5, -CAP, CAP),
    )
}


def check_distributions() -> None:
    """Mean, sd and harm rate of a million draws agree with what is declared, within 6 σ."""
    count = 1_000_000
    for name, d in DISTRIBUTIONS.items():
        x = d.draw(generator(f"check/{name}"), count)
        off = abs(float(x.mean()) - d.mean) / d.sd
        off_rate = abs(float((x > 0).mean()) - d.harm_rate)
        if np.abs(x).max() > CAP or max(off, 2 * off_rate) > 6 / math.sqrt(count):
            raise SystemExit(f"{name} does not have the mean, range or harm rate that it declares")
        if abs(float(x.std()) / d.sd - 1) > 0.02:
            raise SystemExit(f"{name} does not have the standard deviation that it declares")


# -- one cell --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """Cells that share their samples: one distribution, n and gap, several δ."""

    distribution: str
    n: int
    gap: float  # 0: coverage
    deltas: tuple[float, ...]
    trials: int

    @property
    def name(self) -> str:
        return f"{self.distribution}/n={self.n}/gap={self.gap:g}/trials={self.trials}"


def generator(name: str) -> Generator:
    """Random numbers that depend on the name alone."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()))


def passes(x: Floats, tau: float, rho: float, delta: float, final: float) -> dict[str, bool]:
    """Which bounds call the sample safe: U <= τ, or a wealth of 1/δ at τ.

    Args:
        rho: limit on the harm rate, for Clopper-Pearson.
        final: ln of the portfolio's wealth at τ, which does not depend on δ.
    """
    goal = -math.log(delta)
    harmful = int((x > 0).sum())

    def bet(strategy: betting.Strategy) -> bool:
        return betting.log_wealth(x, tau, delta, upper=CAP, lower=-CAP, strategy=strategy) >= goal

    return {
        "student_t": bounds.student_t_upper(x, delta) <= tau,
        "hall_t": bounds.hall_t_upper(x, delta) <= tau,
        "hoeffding": bounds.hoeffding_upper(x, delta, -CAP, CAP) <= tau,
        "empirical_bernstein": bounds.empirical_bernstein_upper(x, delta, -CAP, CAP) <= tau,
        "hoeffding_bentkus": bounds.hoeffding_bentkus_upper(x, delta, -CAP, CAP) <= tau,
        "betting star": bet("star"),
        "betting wsr": bet("wsr"),
        "betting portfolio": final >= goal,
        "clopper_pearson": bounds.clopper_pearson_upper(harmful, x.size, delta) <= rho,
    }


def check_reported_upper(x: Floats, tau: float, delta: float, decided: Mapping[str, bool]) -> None:
    """The U that betting reports lies at or below τ exactly where the wealth rejects τ."""
    for strategy in betting.STRATEGIES:
        u = betting.betting_upper(x, delta, upper=CAP, lower=-CAP, strategy=strategy)
        if (u <= tau) != decided[f"betting {strategy}"]:
            raise SystemExit(f"betting {strategy}: U = {u!r} contradicts the wealth at {tau!r}")


def run_job(job: Job) -> list[Row]:
    """Counts of passes, one row per δ; runs in a worker."""
    started = time.perf_counter()
    distribution = DISTRIBUTIONS[job.distribution]
    tau, rho = distribution.threshold(job.gap), distribution.rate_limit(job.gap)
    rng = generator(job.name)
    counts: dict[float, Counter[str]] = {delta: Counter() for delta in job.deltas}
    for trial in range(job.trials):
        x = distribution.draw(rng, job.n)
        final = betting.log_wealth(x, tau, job.deltas[0], upper=CAP, strategy="portfolio")
        for delta in job.deltas:
            decided = passes(x, tau, rho, delta, final)
            counts[delta].update(name for name, passed in decided.items() if passed)
            if trial < 5:
                check_reported_upper(x, tau, delta, decided)
    seconds = (time.perf_counter() - started) / len(job.deltas)
    return [
        {
            "job": job.name,
            "distribution": job.distribution,
            "n": job.n,
            "gap": job.gap,
            "delta": delta,
            "trials": job.trials,
            "passes": {name: counts[delta][name] for name in BOUNDS},
            "seconds": round(seconds, 3),
        }
        for delta in job.deltas
    ]


def all_jobs(trials: int, power_trials: int) -> list[Job]:
    return [
        *(Job(name, n, 0.0, DELTAS, trials) for name in DISTRIBUTIONS for n in SIZES),
        *(
            Job(name, n, gap, (POWER_DELTA,), power_trials)
            for gap in GAPS
            for name in DISTRIBUTIONS
            for n in POWER_SIZES
        ),
    ]


# -- files, also for benchmarks/sequential.py ------------------------------------------------------


class Results:
    """Rows of a JSON-lines file; all rows of a job are there, or none is counted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.jobs: dict[str, list[Row]] = {}
        if path.is_file():
            for group in self._complete(path.read_text(encoding="utf-8").split("\n")):
                self.jobs[group[0]["job"]] = group
            self._rewrite()  # without what a killed run left half-written

    @staticmethod
    def _complete(lines: Iterable[str]) -> Iterator[list[Row]]:
        groups: dict[str, list[Row]] = {}
        for line in lines:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            groups.setdefault(row["job"], []).append(row)
        yield from (group for group in groups.values() if len(group) == group[0]["of"])

    def _rewrite(self) -> None:
        text = "".join(self._lines(group) for group in self.jobs.values())
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.path)

    @staticmethod
    def _lines(rows: Sequence[Row]) -> str:
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def add(self, rows: Sequence[Row]) -> None:
        group = [{**row, "of": len(rows)} for row in rows]
        self.jobs[group[0]["job"]] = group
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(self._lines(group))


def run_missing(
    results: Results, jobs: Sequence[Any], work: Callable[[Any], list[Row]], workers: int
) -> list[Row]:
    """The rows of all the jobs; those whose name stands in the results are not run again."""
    missing = [job for job in jobs if job.name not in results.jobs]
    print(f"{len(jobs) - len(missing)} of {len(jobs)} jobs are in {results.path}", flush=True)

    def store(finished: Iterable[list[Row]]) -> None:
        for k, rows in enumerate(finished, start=1):
            results.add(rows)
            print(f"{k}/{len(missing)} {rows[0]['job']}", flush=True)

    if workers == 1:
        store(map(work, missing))
    else:
        with multiprocessing.Pool(workers) as pool:
            store(pool.imap_unordered(work, missing))
    return [row for job in jobs for row in results.jobs[job.name]]


def origin(command: str, rows: Sequence[Row]) -> list[str]:
    """Where the figures come from: command, machine, versions, processor time."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("numpy", "scipy"))
    machine = platform.machine().replace("_", "-")
    sources = "; ".join(
        f"{name} {hashlib.sha256((ROOT / 'hcrlhf' / name).read_bytes()).hexdigest()[:12]}"
        for name in ("samples.py", "bounds.py", "betting.py")
    )
    return [
        f"- Command: `{command}`",
        f"- Machine: {os.cpu_count()}-core {machine} machine, {platform.system()}, "
        f"Python {platform.python_version()}, {packages}",
        f"- Time taken: {sum(row['seconds'] for row in rows) / 60:.1f} min, one process "
        "(sum over the cells)",
        f"- SHA-256 of the code when this page was written: {sources}",
    ]


def interval(count: int, trials: int, cells: int) -> tuple[float, float]:
    """Exact two-sided binomial interval; all `cells` of a study hold together with 95%."""
    level = 1 - ERROR_OF_STUDY / cells
    exact = stats.binomtest(count, trials).proportion_ci(level, method="exact")
    return float(exact.low), float(exact.high)


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table, its first column left and the others right-aligned."""
    rule = ["---", *("---:" for _ in head[1:])]
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *body)]


def import_pyplot() -> Any:
    """matplotlib, which only the plots need."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise SystemExit(
            "the tables are written; the plots need matplotlib: pip install matplotlib"
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.titlesize": 10.5, "axes.grid": True})
    plt.rcParams.update({"grid.alpha": 0.25, "axes.spines.top": False})
    plt.rcParams.update({"axes.spines.right": False, "savefig.dpi": 110})
    return plt


# -- report ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """The errors of one bound in one cell of the coverage study."""

    bound: str
    distribution: str
    n: int
    delta: float
    error: float
    low: float
    high: float

    @property
    def ratio(self) -> float:
        return self.error / self.delta

    @property
    def above(self) -> bool:
        """The whole interval lies above δ: the promise is broken beyond chance."""
        return self.low > self.delta

    def __str__(self) -> str:
        return f"{self.distribution}, n = {self.n}, δ = {self.delta:g}"


def coverage_cells(rows: Sequence[Row]) -> list[Cell]:
    """Errors with intervals that hold together over all cells of all exact bounds."""
    at_threshold = [row for row in rows if row["gap"] == 0]
    count = len(EXACT) * len(at_threshold)
    cells = []
    for row in at_threshold:
        for bound in BOUNDS:
            k, trials = row["passes"][bound], row["trials"]
            place = (row["distribution"], row["n"], row["delta"])
            cells.append(Cell(bound, *place, k / trials, *interval(k, trials, count)))
    return cells


def summary_table(cells: Sequence[Cell]) -> list[str]:
    def line(bound: str) -> list[str]:
        own = [cell for cell in cells if cell.bound == bound]
        worst = max(own, key=lambda cell: cell.ratio)
        return [
            bound,
            "asymptotic" if bound in ASYMPTOTIC else "exact",
            f"{sum(cell.above for cell in own)} of {len(own)}",
            f"{worst.ratio:.2f}",
            f"{worst.error:.4f} ({worst.low:.4f} to {worst.high:.4f})",
            str(worst),
        ]

    head = ["bound", "class", "cells above δ", "worst error/δ", "error there (interval)", "where"]
    return markdown(head, map(line, BOUNDS))


def exact_cells_above(cells: Sequence[Cell]) -> list[str]:
    found = [cell for cell in cells if cell.bound in EXACT and cell.above]
    if not found:
        return ["Cells of an exact bound whose interval lies wholly above δ: none."]
    return ["Cells of an exact bound whose interval lies wholly above δ:", ""] + [
        f"- {c.bound}: {c}: error {c.error:.4f} ({c.low:.4f} to {c.high:.4f})" for c in found
    ]


def share_table(rows: Sequence[Row], gap: float, delta: float) -> list[str]:
    """Share of passes of every bound, one line per distribution and n."""
    body = [
        [f"{row['distribution']}, {row['n']}"]
        + [f"{row['passes'][bound] / row['trials']:.4f}" for bound in BOUNDS]
        for row in rows
        if (row["gap"], row["delta"]) == (gap, delta)
    ]
    return markdown(["distribution, n", *BOUNDS], body)


def distribution_table() -> list[str]:
    body = [
        [d.name, d.formula, f"{d.mean:.4g}", f"{d.sd:.3f}", f"{d.harm_rate:.4g}"]
        for d in DISTRIBUTIONS.values()
    ]
    return markdown(["distribution", "cost", "mean", "sd", "harm rate P(C > 0)"], body)


def report(rows: Sequence[Row], command: str) -> str:
    cells = coverage_cells(rows)
    trials = sorted({row["trials"] for row in rows if row["gap"] == 0})
    power_trials = sorted({row["trials"] for row in rows if row["gap"] > 0})
    intervals = len(EXACT) * len(cells) // len(BOUNDS)
    lines = [
        "# Coverage and power of the bounds at a fixed n",
        "",
        "Written by `benchmarks/coverage.py`.",
        "",
        *origin(command, rows),
        f"- Samples per cell: {trials[0]:,} for coverage, {power_trials[0]:,} for power",
        "",
        f"Every bound is told that costs lie in [−{CAP:g}, {CAP:g}]. Clopper-Pearson bounds the "
        "harm rate, the others the mean. student_t and hall_t never pass a sample without spread, "
        "so samples without any harm pass none of the rare two-point cells.",
        "",
        *distribution_table(),
        "",
        "## Coverage: the true value lies at the threshold, a pass is an error",
        "",
        f"Intervals are exact (Clopper-Pearson, two-sided) at level 1 − {ERROR_OF_STUDY:g}/"
        f"{intervals}, so that those of the {intervals} cells of exact bounds hold together with "
        "95%. A cell counts as above δ where its whole interval does.",
        "",
        *summary_table(cells),
        "",
        *exact_cells_above(cells),
    ]
    for delta in DELTAS:
        lines += ["", f"### Share of errors, δ = {delta:g}", "", *share_table(rows, 0, delta)]
    lines += ["", "## Power: share of passes where the policy is safe"]
    for gap in GAPS:
        title = f"### True value {gap:g} sd below the threshold, δ = {POWER_DELTA:g}"
        lines += ["", title, "", *share_table(rows, gap, POWER_DELTA)]
    return "\n".join(lines) + "\n"


# -- plots -----------------------------------------------------------------------------------------


def plot_coverage(cells: Sequence[Cell], path: Path) -> None:
    """error/δ over n, one panel per bound, one line per distribution, the worst of the three δ."""
    plt = import_pyplot()
    figure, grid = plt.subplots(3, 3, figsize=(9.4, 8.6), sharex=True, sharey=True)
    floor = 0.01
    for axes, bound in zip(grid.flat, BOUNDS, strict=True):
        for k, name in enumerate(DISTRIBUTIONS):
            worst = [
                max(c.ratio for c in cells if (c.bound, c.distribution, c.n) == (bound, name, n))
                for n in SIZES
            ]
            axes.plot(
                SIZES,
                np.maximum(worst, floor),
                color=COLOURS[k],
                marker=MARKERS[k],
                markersize=7 if MARKERS[k] == "*" else 4.5,
                linewidth=1.2,
                label=name,
                clip_on=False,
            )
        axes.axhline(1, color="black", linewidth=1.4, linestyle="--")
        axes.axhspan(1, 100, color="#D55E00", alpha=0.08, linewidth=0)
        kind = "asymptotic" if bound in ASYMPTOTIC else "exact"
        of = ", harm rate" if bound == "clopper_pearson" else ""
        axes.set_title(f"{bound} ({kind}{of})")
        axes.set(xscale="log", yscale="log", ylim=(floor, 100))
        own = [cell.above for cell in cells if cell.bound == bound]
        text = f"{sum(own)} of {len(own)} cells above"
        axes.text(0.97, 0.93, text, transform=axes.transAxes, ha="right", va="top", fontsize=9)
        axes.set_xticks(SIZES, [str(n) for n in SIZES])
        axes.minorticks_off()
        axes.set_yticks([0.01, 0.1, 1, 10, 100], ["≤ 0.01", "0.1", "1", "10", "100"])
    figure.supylabel("share of errors / δ, worst of δ = 0.1, 0.05, 0.01", fontsize=11)
    figure.supxlabel("n, costs in the sample (one per prompt)", fontsize=11, y=0.075)
    figure.suptitle(
        "Above the dashed line a bound errs more often than it promises.\n"
        "Cells above: those whose interval (95% for all together) lies wholly above the line",
        fontsize=11,
    )
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    save(plt, figure, path)


def plot_power(rows: Sequence[Row], path: Path, gap: float = GAPS[0]) -> None:
    """Share of passes over n, one panel per distribution, one line per bound."""
    plt = import_pyplot()
    figure, grid = plt.subplots(2, 4, figsize=(9.4, 6.0), sharex=True, sharey=True)
    for axes, name in zip(grid.flat, DISTRIBUTIONS, strict=True):
        own = {r["n"]: r for r in rows if r["distribution"] == name and r["gap"] == gap}
        for k, bound in enumerate(BOUNDS):
            axes.plot(
                POWER_SIZES,
                [own[n]["passes"][bound] / own[n]["trials"] for n in POWER_SIZES],
                color=BOUND_COLOURS[bound],
                marker=(*MARKERS, "h")[k],
                markersize=4.5,
                linewidth=1.3,
                linestyle="--" if bound in ASYMPTOTIC else "-",
                label=bound,
                clip_on=False,
            )
        axes.set_title(name)
        axes.set(xscale="log", ylim=(0, 1))
        axes.set_xticks(POWER_SIZES, [str(n) for n in POWER_SIZES])
        axes.minorticks_off()
    figure.supylabel(f"share of samples that pass, δ = {POWER_DELTA:g}", fontsize=11)
    figure.supxlabel("n, costs in the sample (one per prompt)", fontsize=11, y=0.115)
    figure.suptitle(
        f"True mean {gap:g} sd below the threshold (clopper_pearson: harm rate). Dashed: asymptotic"
    )
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=5, frameon=False)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    save(plt, figure, path)


def save(plt: Any, figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


# -- the whole -------------------------------------------------------------------------------------


def parser(summary: str, trials: int, power_trials: int) -> argparse.ArgumentParser:
    """The options that both simulations have."""
    options = argparse.ArgumentParser(description=summary)
    options.add_argument("--trials", type=int, default=trials, help="samples per coverage cell")
    options.add_argument("--power-trials", type=int, default=power_trials)
    options.add_argument("--workers", type=int, default=1, help="processes")
    options.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options.add_argument("--plots", type=Path, default=ROOT / "docs" / "plots")
    return options


def main() -> None:
    options = parser((__doc__ or "").split("\n\n")[0], trials=5000, power_trials=1500).parse_args()
    check_distributions()
    results = Results(options.out / "coverage.jsonl")
    jobs = all_jobs(options.trials, options.power_trials)
    rows = run_missing(results, jobs, run_job, options.workers)
    command = " ".join(["python -m benchmarks.coverage", *sys.argv[1:]])
    text = report(rows, command)
    (options.out / "coverage.md").write_text(text, encoding="utf-8")
    print(text)
    plot_coverage(coverage_cells(rows), options.plots / "coverage.png")
    plot_power(rows, options.plots / "power.png")


if __name__ == "__main__":
    main()
