"""Looking after every prompt: how often a test errs that stops when it likes, and when it stops.

    python -m benchmarks.sequential

The portfolio's e-process passes a constraint once its wealth has reached 1/δ at some time up to
now; "both" passes once the mean and the harm rate P(C > 0) each have. With the true values exactly
at their limits every pass is an error. Beside it stand Student-t and Clopper-Pearson, whose bounds
hold at one fixed n, asked again after every prompt. Where the policy is safe, the prompts until
the pass stand beside the fixed n that Student-t needs.

Distributions, seeds and files are those of benchmarks/coverage.py; what stands in sequential.jsonl
is not run again.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from benchmarks.coverage import (
    CAP,
    COLOURS,
    DISTRIBUTIONS,
    ERROR_OF_STUDY,
    GAPS,
    Floats,
    Results,
    Row,
    check_distributions,
    generator,
    import_pyplot,
    interval,
    markdown,
    origin,
    parser,
    run_missing,
    save,
)
from hcrlhf import betting, bounds

N_MAX = 1000
FIRST_PEEK = 10  # Student-t and Clopper-Pearson look from this prompt on; the e-process from 1
DELTAS = (0.1, 0.05)
RULES = ("mean", "harm rate", "both")
PEEKS = ("student_t", "clopper_pearson")
POWERS = (0.8, 0.9)
SPOT_CHECKS = 100  # runs per distribution and δ whose running U is computed
CHECKED_PEEKS = 2  # runs per job and δ in which every look is taken by the project's functions too

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

# -- one job ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """Runs of N_MAX prompts of one distribution, the threshold `gap` sd above the truth."""

    distribution: str
    gap: float
    trials: int

    @property
    def name(self) -> str:
        return f"sequential/{self.distribution}/gap={self.gap:g}/trials={self.trials}"


def first_reach(path: Floats, goal: float) -> int:
    """The prompt after which the path first stands at the goal or above; N_MAX + 1 if never."""
    reached = path >= goal
    return int(reached.argmax()) + 1 if reached.any() else N_MAX + 1


def stopping_times(costs: Floats, tau: float, rho: float) -> dict[float, dict[str, Ints]]:
    """Per δ and rule the prompts until the pass, (trials,)."""
    stops = {d: {rule: np.zeros(len(costs), dtype=np.int64) for rule in RULES} for d in DELTAS}
    for k, x in enumerate(costs):
        mean_path = betting.portfolio_path(x, tau, CAP)
        harm_path = betting.portfolio_path((x > 0).astype(np.float64), rho, 1.0)
        for delta, of in stops.items():
            goal = -math.log(delta)
            of["mean"][k] = first_reach(mean_path, goal)
            of["harm rate"][k] = first_reach(harm_path, goal)
            of["both"][k] = max(of["mean"][k], of["harm rate"][k])
    return stops


def peek_student_t(costs: Floats, tau: float, delta: float) -> Bools:
    """Whether Student-t says U <= τ after prompt FIRST_PEEK, .., N_MAX: (trials, looks).

    All runs at once; `check_peeks` holds it against the project's function.
    """
    n = np.arange(1, costs.shape[1] + 1)
    sums = np.cumsum(costs - tau, axis=1)
    squares = np.cumsum((costs - tau) ** 2, axis=1)
    deviation = np.sqrt(np.maximum(squares - sums**2 / n, 0) / np.maximum(n - 1, 1))
    spread = np.maximum.accumulate(costs, axis=1) > np.minimum.accumulate(costs, axis=1)
    looks = slice(FIRST_PEEK - 1, None)
    factors = [bounds.student_t_factor(int(k), delta) for k in n[looks]]
    passed: Bools = (sums / n)[:, looks] + deviation[:, looks] * factors <= 0
    return passed & spread[:, looks]


def most_harmful(rho: float, delta: float) -> Ints:
    """The largest count of harms with which Clopper-Pearson passes, at each look; -1: none."""
    limits = []
    harmful = -1
    for n in range(FIRST_PEEK, N_MAX + 1):
        while harmful < n and bounds.clopper_pearson_upper(harmful + 1, n, delta) <= rho:
            harmful += 1
        limits.append(harmful)
    return np.array(limits)


def peek_clopper_pearson(costs: Floats, rho: float, delta: float) -> Bools:
    """Whether Clopper-Pearson says U <= ρ at each look, (trials, looks)."""
    harmful = np.cumsum(costs > 0, axis=1)[:, FIRST_PEEK - 1 :]
    return np.asarray(harmful <= most_harmful(rho, delta))


def check_peeks(x: Floats, tau: float, rho: float, delta: float, t: Bools, cp: Bools) -> None:
    """Every look of one run, by the project's functions on the costs so far."""
    for k, n in enumerate(range(FIRST_PEEK, N_MAX + 1)):
        harmful = int((x[:n] > 0).sum())
        expected = (
            bounds.student_t_upper(x[:n], delta) <= tau,
            bounds.clopper_pearson_upper(harmful, n, delta) <= rho,
        )
        if (bool(t[k]), bool(cp[k])) != expected:
            raise SystemExit(f"a look by vectors contradicts the bound at n = {n}")


def peeking(costs: Floats, tau: float, rho: float, delta: float) -> dict[str, int]:
    """How many runs ever pass under the fixed-n bounds."""
    t = peek_student_t(costs, tau, delta)
    cp = peek_clopper_pearson(costs, rho, delta)
    for k in range(min(CHECKED_PEEKS, len(costs))):
        check_peeks(costs[k], tau, rho, delta, t[k], cp[k])
    return {
        "student_t": int(t.any(axis=1).sum()),
        "clopper_pearson": int(cp.any(axis=1).sum()),
    }


def spot_check(costs: Floats, mean: float, delta: float, stops: Ints) -> dict[str, int]:
    """In how many of the first runs the portfolio's running U ends below the true mean.

    The threshold is the mean here, so U <= mean and "the run passed" are the same statement.
    """
    misses = 0
    runs = min(SPOT_CHECKS, len(costs))
    for x, stop in zip(costs[:runs], stops, strict=False):
        u = betting.portfolio_running_upper(x, delta, CAP)
        if (u <= mean) != (stop <= N_MAX):
            raise SystemExit(f"running U = {u!r} contradicts the path at {mean!r}")
        misses += u < mean
    return {"runs": runs, "misses": misses}


def stop_figures(stops: Ints) -> dict[str, Any]:
    """Prompts spent: on average up to N_MAX, and with the N_MAX that gives a power of 80%, 90%."""
    ordered = np.sort(stops)
    figures: dict[str, Any] = {"mean": float(np.minimum(stops, N_MAX).mean())}
    for power in POWERS:
        by = int(ordered[math.ceil(power * len(stops)) - 1])
        spent = float(np.minimum(stops, by).mean())
        figures[f"{power:g}"] = None if by > N_MAX else {"n_max": by, "mean": spent}
    return figures


def means_at_stop(costs: Floats, stops: Ints, mean: float, sd: float) -> dict[str, float]:
    """Of the runs that passed: share whose sample mean lies below the truth; bias in sd."""
    passed = np.flatnonzero(stops <= N_MAX)
    at_stop = np.array([costs[k, : stops[k]].mean() for k in passed])
    if at_stop.size == 0:
        return {"runs": 0, "below": math.nan, "bias": math.nan}
    return {
        "runs": int(at_stop.size),
        "below": float((at_stop < mean).mean()),
        "bias": float((at_stop.mean() - mean) / sd),
    }


def run_job(job: Job) -> list[Row]:
    """One row per δ; runs in a worker."""
    started = time.perf_counter()
    d = DISTRIBUTIONS[job.distribution]
    tau, rho = d.threshold(job.gap), d.rate_limit(job.gap)
    rng = generator(job.name)
    costs = np.stack([d.draw(rng, N_MAX) for _ in range(job.trials)])
    rows: list[Row] = []
    for delta, stops in stopping_times(costs, tau, rho).items():
        row: Row = {
            "job": job.name,
            "distribution": job.distribution,
            "gap": job.gap,
            "delta": delta,
            "trials": job.trials,
            "passes": {rule: int((stops[rule] <= N_MAX).sum()) for rule in RULES},
        }
        if job.gap == 0:
            row["peeking"] = peeking(costs, tau, rho, delta)
            row["running U"] = spot_check(costs, d.mean, delta, stops["mean"])
        else:
            row["prompts"] = {rule: stop_figures(stops[rule]) for rule in RULES}
            row["mean at stop"] = means_at_stop(costs, stops["mean"], d.mean, d.sd)
        rows.append(row)
    seconds = round((time.perf_counter() - started) / len(rows), 3)
    return [{**row, "seconds": seconds} for row in rows]


# -- report ----------------------------------------------------------------------------------------


def fixed_n_student_t(gap: float, delta: float, power: float) -> int:
    """The smallest n at which a t test of normal costs, `gap` sd below τ, has this power."""
    n = 2
    while stats.nct.cdf(stats.t.ppf(delta, n - 1), n - 1, -gap * math.sqrt(n)) < power:
        n += 1
    return n


def error_table(rows: Sequence[Row], delta: float) -> list[str]:
    """Share of runs that ever pass although every value lies at its limit."""
    cells = len(RULES) * len(DELTAS) * len(DISTRIBUTIONS)

    def line(row: Row) -> list[str]:
        texts = [row["distribution"]]
        for count in (*row["passes"].values(), *row["peeking"].values()):
            low, high = interval(count, row["trials"], cells)
            texts.append(f"{count / row['trials']:.4f} ({low:.3f} to {high:.3f})")
        return texts

    head = ["distribution", *(f"e-process, {rule}" for rule in RULES)]
    head += [f"peeking, {name}" for name in PEEKS]
    return markdown(head, (line(r) for r in rows if (r["gap"], r["delta"]) == (0, delta)))


def cells_above(rows: Sequence[Row]) -> str:
    """The cells of an e-process that are above δ beyond chance."""
    cells = len(RULES) * len(DELTAS) * len(DISTRIBUTIONS)
    found = [
        f"{row['distribution']}, {rule}, δ = {row['delta']:g}"
        for row in rows
        if row["gap"] == 0
        for rule in RULES
        if interval(row["passes"][rule], row["trials"], cells)[0] > row["delta"]
    ]
    listed = "; ".join(found) if found else "none"
    return f"Cells of an e-process whose interval lies wholly above δ: {listed}."


def running_line(rows: Sequence[Row], delta: float) -> str:
    spots = [row["running U"] for row in rows if (row["gap"], row["delta"]) == (0, delta)]
    misses, runs = (sum(spot[key] for spot in spots) for key in ("misses", "runs"))
    low, high = interval(misses, runs, len(DELTAS))
    return (
        f"- δ = {delta:g}: the running U ends below the true mean in {misses} of {runs} runs, "
        f"{misses / runs:.3f} ({low:.3f} to {high:.3f})"
    )


def prompts_table(rows: Sequence[Row], gap: float, delta: float) -> list[str]:
    """Prompts until the pass, mean constraint and both, and the sample mean at the stop."""

    def spent(figures: Row) -> list[str]:
        budgets = [figures[f"{power:g}"] for power in POWERS]
        texts = ["—" if b is None else f"{b['mean']:.0f} of {b['n_max']}" for b in budgets]
        return [f"{figures['mean']:.0f}", *texts]

    def line(row: Row) -> list[str]:
        stop = row["mean at stop"]
        return [
            row["distribution"],
            f"{row['passes']['mean'] / row['trials']:.3f}",
            *spent(row["prompts"]["mean"]),
            f"{row['passes']['both'] / row['trials']:.3f}",
            *spent(row["prompts"]["both"]),
            f"{stop['below']:.2f}",
            f"{stop['bias']:+.3f}",
        ]

    power = [f"{p:.0%} power" for p in POWERS]
    head = ["distribution"]
    for rule in ("mean", "both"):
        head += [f"{rule}: passes", "prompts", *power]
    head += ["sample mean at stop below truth", "its bias, sd"]
    return markdown(head, (line(r) for r in rows if (r["gap"], r["delta"]) == (gap, delta)))


def fixed_line(gap: float, delta: float) -> str:
    needs = [f"{fixed_n_student_t(gap, delta, p)} for {p:.0%}" for p in POWERS]
    return (
        f"Student-t at a fixed n needs n = {' and '.join(needs)} power, if costs are normal; for "
        "skewed ones its error is not δ."
    )


def report(rows: Sequence[Row], command: str) -> str:
    null, safe = ([r for r in rows if (r["gap"] == 0) == at_limit] for at_limit in (True, False))
    cells = len(RULES) * len(DELTAS) * len(DISTRIBUTIONS)
    lines = [
        "# Looking after every prompt",
        "",
        "Written by `benchmarks/sequential.py`; the distributions stand in [coverage.md]"
        "(coverage.md).",
        "",
        *origin(command, rows),
        f"- Runs per line: {null[0]['trials']:,} for errors, {safe[0]['trials']:,} for power, each "
        f"of at most {N_MAX} prompts",
        "",
        "## Errors: every true value lies at its limit, a run that ever passes errs",
        "",
        "The e-process looks after every prompt; so do Student-t (mean) and Clopper-Pearson (harm "
        f"rate) from prompt {FIRST_PEEK} on. Intervals are exact at level 1 − {ERROR_OF_STUDY:g}/"
        f"{cells}, so that those of the {cells} cells of e-processes hold together with 95%.",
        "",
        cells_above(rows),
    ]
    for delta in DELTAS:
        lines += ["", f"### δ = {delta:g}", "", *error_table(rows, delta)]
    lines += ["", "## The running U", ""]
    lines += [running_line(rows, delta) for delta in DELTAS]
    lines += [
        "",
        "In every one of these runs U ≤ τ exactly where the e-process passed, so the shares of the "
        '"mean" column above speak for U too.',
        "",
        "## Prompts until the pass where the policy is safe",
        "",
        f"prompts: mean over all runs, {N_MAX} where a run does not pass. 80% power: a test with "
        "the smallest committed n_max that passes 80% of the runs spends … prompts on average, of "
        "at most n_max. Last columns: runs that passed the mean constraint.",
    ]
    for gap in GAPS:
        for delta in DELTAS:
            lines += ["", f"### True values {gap:g} sd below their limits, δ = {delta:g}", ""]
            lines += [fixed_line(gap, delta), "", *prompts_table(rows, gap, delta)]
    return "\n".join(lines) + "\n"


# -- plot ------------------------------------------------------------------------------------------


def plot(rows: Sequence[Row], path: Path, delta: float = 0.05, gap: float = GAPS[0]) -> None:
    """Left: share of runs that ever err. Right: prompts until the pass of a safe policy."""
    plt = import_pyplot()
    figure, (errors, prompts) = plt.subplots(1, 2, figsize=(9.4, 6.2), sharey=True)
    places = np.arange(len(DISTRIBUTIONS))[::-1]
    errors.set_yticks(places, list(DISTRIBUTIONS))
    own = {(r["distribution"], r["gap"]): r for r in rows if r["delta"] == delta}
    draw_errors(errors, [own[name, 0] for name in DISTRIBUTIONS], places, delta)
    draw_prompts(prompts, [own[name, gap] for name in DISTRIBUTIONS], places, delta, gap)
    for axes in (errors, prompts):
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
    figure.tight_layout()
    save(plt, figure, path)


def draw_errors(axes: Any, rows: Sequence[Row], places: Ints, delta: float) -> None:
    series: list[tuple[str, Callable[[Row], int], str, str]] = [
        ("e-process, mean", lambda r: r["passes"]["mean"], COLOURS[5], "o"),
        ("e-process, harm rate", lambda r: r["passes"]["harm rate"], COLOURS[2], "s"),
        ("e-process, both", lambda r: r["passes"]["both"], COLOURS[3], "D"),
        ("Student-t (mean), peeking", lambda r: r["peeking"]["student_t"], COLOURS[4], "v"),
        (
            "Clopper-Pearson (harm rate), peeking",
            lambda r: r["peeking"]["clopper_pearson"],
            COLOURS[1],
            "X",
        ),
    ]
    for k, (label, count, colour, marker) in enumerate(series):
        share = [max(count(row) / row["trials"], 0.001) for row in rows]
        at = places + 0.15 * (2 - k)
        axes.scatter(share, at, color=colour, marker=marker, s=30, label=label, zorder=3)
    axes.axvline(delta, color="black", linestyle="--", linewidth=1.4, label=f"δ = {delta:g}")
    axes.axvspan(delta, 1, color="#D55E00", alpha=0.08, linewidth=0)
    axes.set(xscale="log", xlim=(0.001, 1), xlabel=f"share of runs that ever pass, by n = {N_MAX}")
    axes.set_xticks([0.001, 0.01, 0.05, 0.2, 1], ["≤ 0.001", "0.01", "0.05", "0.2", "1"])
    axes.minorticks_off()
    axes.set_title("True values at their limits: a pass is an error")


def draw_prompts(axes: Any, rows: Sequence[Row], places: Ints, delta: float, gap: float) -> None:
    for rule, colour, marker, shift in (
        ("mean", COLOURS[5], "o", 0.13),
        ("both", COLOURS[3], "D", -0.13),
    ):
        figures = [row["prompts"][rule] for row in rows]
        late = [f["0.9"]["n_max"] if f["0.9"] else N_MAX for f in figures]
        at = places + shift
        average = [f["mean"] for f in figures]
        label = f"e-process, {rule}: average"
        axes.scatter(average, at, color=colour, marker=marker, s=34, label=label, zorder=3)
        axes.hlines(at, 0, late, color=colour, linewidth=1.2, alpha=0.6)
        label = f"e-process, {rule}: 90% of the runs have passed"
        axes.scatter(late, at, color=colour, marker="|", s=70, label=label)
    for power, style in zip(POWERS, (":", "--"), strict=True):
        n = fixed_n_student_t(gap, delta, power)
        label = f"Student-t at fixed n, normal costs, {power:.0%} power: n = {n}"
        axes.axvline(n, color="black", linestyle=style, linewidth=1.3, label=label)
    axes.set(xlim=(0, None), xlabel="prompts until the pass")
    axes.set_title(f"True values {gap:g} sd below their limits, δ = {delta:g}")


# -- the whole -------------------------------------------------------------------------------------


def main() -> None:
    options = parser((__doc__ or "").split("\n\n")[0], trials=5000, power_trials=2000).parse_args()
    check_distributions()
    results = Results(options.out / "sequential.jsonl")
    jobs = [
        Job(name, gap, options.power_trials if gap else options.trials)
        for gap in (0.0, *GAPS)
        for name in DISTRIBUTIONS
    ]
    rows = run_missing(results, jobs, run_job, options.workers)
    command = " ".join(["python -m benchmarks.sequential", *sys.argv[1:]])
    text = report(rows, command)
    (options.out / "sequential.md").write_text(text, encoding="utf-8")
    print(text)
    plot(rows, options.plots / "sequential.png")


if __name__ == "__main__":
    main()
