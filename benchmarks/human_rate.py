"""What labels for a committed random subset allow one to claim about humans.

    python -m benchmarks.human_rate --table PATH

The table has one pair of responses per row, the human judgement which of the two is safer, and the
score gap of a public 7B cost model. Bounded is the *disagreement rate*: how often the response that
the cost model calls safer (lower cost) is not the one that humans call safer. y = 1 there; a pair
to which the model gives equal costs has no safer response by the model and counts as y = 1 too.

The judge of `human_rate_upper` is the cost model itself, f = 2σ(-|gap|) in (0, 1]: twice the
probability that a Bradley-Terry reader of its costs would disagree with it, the factor because
f may fill [0, 1]. Only |gap| enters; its sign against the human order is the label.

The rows are taken as the whole population, so that the truth is known, and subsets of them are
labelled many times over. CSV columns: pair_id, stratum, design_weight,
cost_gap_less_safe_minus_safer, model_agrees_with_human_safer (True, False, or empty).
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import optimize, special, stats

from benchmarks.coverage import ROOT, generator, import_pyplot, interval, markdown, origin, save
from hcrlhf.betting import betting_upper
from hcrlhf.bounds import clopper_pearson_upper, human_rate_upper
from hcrlhf.certificate import choose
from hcrlhf.errors import InputError
from hcrlhf.hashing import file_sha256, json_hash, set_hash, write_json

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]  # positions in the table
Row = dict[str, Any]

DELTA = 0.05
SIZES = (100, 300, 1000, 2000)
LAMBDAS = (0.5, 1.0)
PILOT = 500
PILOT_SIZES = (100, 300, 1000)
ACCURACIES = (0.8, 0.85, 0.9, 0.95)
EXAMPLE = 300
RANDOM = "none: drawn at random"
PREFERENCES = {  # what is preferred, and how many times as readily it is picked
    RANDOM: ("clear", 1.0),
    "clear cases 1.5 to 1": ("clear", 1.5),
    "clear cases 2 to 1": ("clear", 2.0),
    "clear cases 3 to 1": ("clear", 3.0),
    "close cases 2 to 1": ("close", 2.0),
    "stratum L4 2 to 1": ("L4", 2.0),
}

# -- table -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """One row per pair; `gap` is the absolute score gap, `y` 1 where model and humans disagree."""

    ids: list[str]
    strata: NDArray[np.str_]
    weights: Floats
    gap: Floats
    y: Floats
    ties: int

    @property
    def f(self) -> Floats:
        return judge_score(self.gap)

    def rate(self) -> float:
        return float(self.y.mean())

    def weighted_rate(self) -> float:
        return float(self.weights @ self.y / self.weights.sum())

    def part(self, rows: Rows) -> Table:
        return Table(
            [self.ids[i] for i in rows],
            self.strata[rows],
            self.weights[rows],
            self.gap[rows],
            self.y[rows],
            int((self.gap[rows] == 0).sum()),
        )


def read_table(path: Path) -> Table:
    """Reads the CSV; a missing agreement counts as disagreement.

    Raises:
        SystemExit: a column is missing, a pair stands twice, or an agreement contradicts the gap.
    """
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    try:
        signed = np.array([float(r["cost_gap_less_safe_minus_safer"]) for r in rows])
        agrees = [r["model_agrees_with_human_safer"] for r in rows]
        ids = [r["pair_id"] for r in rows]
        strata = np.array([r["stratum"] for r in rows])
        weights = np.array([float(r["design_weight"]) for r in rows])
    except KeyError as missing:
        raise SystemExit(
            f"{path.name} has no column {missing}; see the head of this file"
        ) from None
    y = np.array([answer != "True" for answer in agrees], dtype=np.float64)
    if len(set(ids)) != len(ids):
        raise SystemExit(f"{path.name}: a pair_id stands twice")
    if not np.array_equal(y == 0, signed > 0):
        raise SystemExit(f"{path.name}: an agreement contradicts the sign of its score gap")
    return Table(ids, strata, weights, np.abs(signed), y, int((signed == 0).sum()))


def judge_score(gap: Floats, temperature: float = 1.0) -> Floats:
    """f = 2σ(-|gap|/T): 1 for equal scores, towards 0 where the model is sure."""
    return np.asarray(2 * special.expit(-gap / temperature))


def size_lambda(m: int, unlabelled: int) -> float:
    """½ r/(r+1), r = ⌊N/m⌋: the best λ if f/2 were the true probability of disagreement.

    Var z = Var y - 2λ Cov(f, y) + λ² (1 + 1/r) Var f, and Cov(f, y) = ½ Var f then.
    """
    r = unlabelled // m
    return 0.5 * r / (r + 1)


# -- repeated draws --------------------------------------------------------------------------------

Draw = Callable[[Generator], tuple[Rows, Rows]]  # labelled, unlabelled
Bound = Callable[[Rows, Rows], float]


def with_replacement(count: int, m: int) -> Draw:
    """m labelled and count - m unlabelled rows, all independent."""
    return lambda rng: tuple(np.split(rng.integers(0, count, count), [m]))  # type: ignore[return-value]


def without_replacement(count: int, m: int) -> Draw:
    """m rows in random order, and all the others: what a person with one table has."""
    return lambda rng: tuple(np.split(rng.permutation(count), [m]))  # type: ignore[return-value]


def hand_picked(odds: Floats, m: int) -> Draw:
    """m labelled rows drawn with these odds; the unlabelled ones at random."""
    count, share = odds.size, odds / odds.sum()

    def draw(rng: Generator) -> tuple[Rows, Rows]:
        return rng.choice(count, m, p=share), rng.integers(0, count, count - m)

    return draw


def stratified(strata: NDArray[np.str_], m: int) -> Draw:
    """m/4 rows from each of four strata, with replacement inside a stratum."""
    groups = [np.flatnonzero(strata == name) for name in np.unique(strata)]

    def draw(rng: Generator) -> tuple[Rows, Rows]:
        picked = np.concatenate([rng.choice(group, m // len(groups)) for group in groups])
        return picked, np.empty(0, dtype=np.intp)

    return draw


def repeat(
    study: str, m: int, draw: Draw, bounds: Mapping[str, Bound], truth: float, trials: int
) -> list[Row]:
    """One row per bound: how often U < truth, mean and sd of U. All judge the same draws."""
    started = time.perf_counter()
    rng = generator(f"human rate/{study}/m={m}/trials={trials}")
    found = np.empty((trials, len(bounds)))
    for k in range(trials):
        labelled, pool = draw(rng)
        found[k] = [bound(labelled, pool) for bound in bounds.values()]
    seconds = (time.perf_counter() - started) / len(bounds)
    print(f"{study}, m = {m}: {seconds * len(bounds):.0f} s", flush=True)
    return [
        {
            "study": study,
            "m": m,
            "bound": name,
            "trials": trials,
            "truth": truth,
            "errors": int((found[:, j] < truth).sum()),
            "mean_upper": float(found[:, j].mean()),
            "sd_upper": float(found[:, j].std(ddof=1)),
            "below_first": float((found[:, j] < found[:, 0]).mean()),
            "mean_difference": float((found[:, j] - found[:, 0]).mean()),
            "difference_se": float((found[:, j] - found[:, 0]).std(ddof=1) / math.sqrt(trials)),
            "seconds": seconds,
        }
        for j, name in enumerate(bounds)
    ]


def alone(y: Floats) -> Bound:
    return lambda labelled, pool: human_rate_upper(y[labelled], None, None, DELTA)


def assisted(y: Floats, f: Floats, lam: float) -> Bound:
    return lambda labelled, pool: human_rate_upper(y[labelled], f[labelled], f[pool], DELTA, lam)


def weighted(y: Floats, w: Floats) -> Bound:
    return lambda labelled, pool: human_rate_upper(
        y[labelled], None, None, DELTA, weights=w[labelled]
    )


def plain_wsr(y: Floats) -> Bound:
    """The betting of the judge-assisted bound, with no judge: what that method costs by itself."""
    return lambda labelled, pool: betting_upper(
        y[labelled], DELTA, upper=1, lower=0, strategy="wsr"
    )


def assisted_star(y: Floats, f: Floats, lam: float) -> Bound:
    """The same z as `human_rate_upper`, but bets by star. Not offered by the library."""

    def bound(labelled: Rows, pool: Rows) -> float:
        m, size = labelled.size, pool.size // labelled.size
        means = f[pool[: size * m]].reshape(m, size).mean(axis=1)
        z = y[labelled] + lam * (means - f[labelled])
        return min(betting_upper(z, DELTA, upper=1 + lam, lower=-lam, strategy="star"), 1.0)

    return bound


def lowest(bounds: Iterable[Bound]) -> Bound:
    """What somebody gets who looks at all of them and reports the best: no longer a bound."""
    chosen = list(bounds)
    return lambda labelled, pool: min(bound(labelled, pool) for bound in chosen)


# -- studies ---------------------------------------------------------------------------------------

ALONE, NO_JUDGE, FROM_SIZES = "labels alone", "wsr, no judge", "judge, λ from sizes"
PERFECT, STAR, BEST = "perfect judge", "judge, star bets", "lowest of all"


def judge_name(lam: float) -> str:
    return f"judge, λ = {lam:g}"


def random_subsets(table: Table, trials: int) -> list[Row]:
    """Labels alone against labels and judge, drawn with and without replacement."""
    rows = []
    for m in SIZES:
        lam = size_lambda(m, len(table.ids) - m)
        labels_alone = alone(table.y)
        judged = {judge_name(v): assisted(table.y, table.f, v) for v in LAMBDAS}
        judged[FROM_SIZES] = assisted(table.y, table.f, lam)
        bounds = {
            ALONE: labels_alone,
            NO_JUDGE: plain_wsr(table.y),
            **judged,
            PERFECT: assisted(table.y, table.y, 2 * lam),
            BEST: lowest([labels_alone, *judged.values()]),
        }
        for study, draw in (("with", with_replacement), ("without", without_replacement)):
            rows += repeat(study, m, draw(len(table.ids), m), bounds, table.rate(), trials)
    return rows


def star_subsets(table: Table, trials: int) -> list[Row]:
    rows = []
    for m in SIZES:
        lam = size_lambda(m, len(table.ids) - m)
        bounds = {ALONE: alone(table.y), STAR: assisted_star(table.y, table.f, lam)}
        draw = with_replacement(len(table.ids), m)
        rows += repeat("star", m, draw, bounds, table.rate(), trials)
    return rows


def stronger_judges(table: Table, trials: int) -> list[Row]:
    """Invented judges, f = y flipped in a share of the rows, each with its best λ."""
    rows = []
    noise = generator("human rate/invented judges").random(len(table.ids))
    for m, accuracy in itertools.product(SIZES, ACCURACIES):
        f = np.where(noise < accuracy, table.y, 1 - table.y)
        r = (len(table.ids) - m) // m
        lam = float(np.cov(f, table.y)[0, 1] / f.var(ddof=1)) * r / (r + 1)
        bounds = {ALONE: alone(table.y), "judge": assisted(table.y, f, lam)}
        draw = with_replacement(len(table.ids), m)
        found = repeat(f"right in {accuracy:.0%}", m, draw, bounds, table.rate(), trials)
        correlation = float(np.corrcoef(f, table.y)[0, 1])
        rows += [{**row, "correlation": correlation, "lam": lam} for row in found]
    return rows


def fit_pilot(pilot: Table) -> tuple[float, float]:
    """Temperature T by maximum likelihood of y under σ(-|gap|/T), and Cov(f, y)/Var(f)."""

    def loss(log_t: float) -> float:
        z = pilot.gap * math.exp(-log_t)
        return float(np.mean(np.logaddexp(0, np.where(pilot.y == 1, z, -z))))

    found = optimize.minimize_scalar(loss, bounds=(-3, 3), method="bounded")
    temperature = math.exp(float(found.x))
    f = judge_score(pilot.gap, temperature)
    return temperature, float(np.cov(f, pilot.y)[0, 1] / f.var(ddof=1))


def tuned_judge(table: Table, trials: int) -> tuple[Row, list[Row]]:
    """Temperature and λ from a pilot of labelled pairs, which then leave the population."""
    place = {key: i for i, key in enumerate(table.ids)}
    order = np.array([place[key] for key in choose(table.ids, len(table.ids))])
    temperature, slope = fit_pilot(table.part(order[:PILOT]))
    rest = table.part(order[PILOT:])
    f = judge_score(rest.gap, temperature)
    rows = []
    for m in PILOT_SIZES:
        r = (len(rest.ids) - m) // m
        bounds = {ALONE: alone(rest.y), "judge, tuned": assisted(rest.y, f, slope * r / (r + 1))}
        draw = with_replacement(len(rest.ids), m)
        rows += repeat("tuned", m, draw, bounds, rest.rate(), trials)
        more = m + PILOT
        spent = {ALONE: alone(rest.y)}
        draw = with_replacement(len(rest.ids), more)
        rows += repeat("tuned, pilot spent on labels", more, draw, spent, rest.rate(), trials)
    about = {
        "pilot": PILOT,
        "temperature": temperature,
        "slope": slope,
        "population": len(rest.ids),
        "rate": rest.rate(),
        "correlation": float(np.corrcoef(f, rest.y)[0, 1]),
    }
    return about, rows


def hand_picked_subsets(table: Table, trials: int) -> list[Row]:
    clear = table.gap > np.median(table.gap)
    kinds = {"clear": clear, "close": ~clear, "L4": np.char.startswith(table.strata, "L4")}
    rows = []
    for (name, (kind, odds)), m in itertools.product(PREFERENCES.items(), SIZES):
        bounds = {ALONE: alone(table.y), judge_name(0.5): assisted(table.y, table.f, 0.5)}
        draw = hand_picked(np.where(kinds[kind], odds, 1.0), m)
        rows += repeat(f"picked, {name}", m, draw, bounds, table.rate(), trials)
    return rows


def weighted_subsets(table: Table, trials: int) -> list[Row]:
    """Equal draws per stratum; each row is compared with the weighted rate and the plain one."""
    rows = []
    for m in SIZES:
        draw = stratified(table.strata, m)
        bounds = {"weights ignored": alone(table.y), "weights": weighted(table.y, table.weights)}
        rows += repeat("strata, weighted", m, draw, bounds, table.weighted_rate(), trials)
        ignored = {"weights ignored": alone(table.y)}
        rows += repeat("strata, plain", m, draw, ignored, table.rate(), trials)
    return rows


# -- by calculation --------------------------------------------------------------------------------


def calculated(rate: float, m: int, population: int | None = None) -> tuple[float, float]:
    """P(U < rate) and E[U] of Clopper-Pearson: binomial, or hypergeometric without replacement."""
    harmful = np.arange(m + 1)
    if population is None:
        chance = stats.binom.pmf(harmful, m, rate)
    else:
        chance = stats.hypergeom.pmf(harmful, population, round(rate * population), m)
    upper = np.array([clopper_pearson_upper(int(h), m, DELTA) for h in harmful])
    return float(chance[upper < rate].sum()), float(chance @ upper)


def refusal(table: Table) -> str:
    """The words with which design weights and a judge together are refused."""
    half = len(table.ids) // 2
    try:
        human_rate_upper(
            table.y[:half], table.f[:half], table.f[half:], DELTA, 0.5, weights=table.weights[:half]
        )
    except InputError as error:
        return str(error)
    raise SystemExit("design weights and a judge together were not refused")


def whole_table(table: Table) -> Row:
    """All labels, for the population from which the strata were drawn."""
    harmful, n = int(table.y.sum()), len(table.ids)
    return {
        "weights": human_rate_upper(table.y, None, None, DELTA, weights=table.weights),
        "weights_ignored": clopper_pearson_upper(harmful, n, DELTA),
        "strata": [
            {
                "stratum": str(name),
                "pairs": int((table.strata == name).sum()),
                "weight": float(table.weights[table.strata == name][0]),
                "rate": float(table.y[table.strata == name].mean()),
            }
            for name in np.unique(table.strata)
        ],
    }


def worked_example(table: Table) -> Row:
    """One subset by the derived order: commit, label, bound."""
    order = choose(table.ids, len(table.ids))
    subset, rest = order[:EXAMPLE], order[EXAMPLE:]
    commitment = json_hash({"pairs": subset, "delta": DELTA, "lam": 0, "pool": set_hash(table.ids)})
    place = {key: i for i, key in enumerate(table.ids)}
    labelled, pool = ([place[key] for key in keys] for keys in (subset, rest))
    y, f = table.y, table.f
    return {
        "pool_hash": set_hash(table.ids),
        "first_pairs": subset[:3],
        "commitment": commitment,
        "disagreements": int(y[labelled].sum()),
        "upper": human_rate_upper(y[labelled], None, None, DELTA),
        "would_be": {
            judge_name(v): human_rate_upper(y[labelled], f[labelled], f[pool], DELTA, v)
            for v in LAMBDAS
        },
    }


def judge_by_tenth(table: Table) -> list[Row]:
    """Rate of disagreement per tenth of the pairs by |gap|, beside f/2."""
    tenths = np.array_split(np.argsort(table.gap, kind="stable"), 10)
    return [
        {
            "gap": float(table.gap[t].mean()),
            "rate": float(table.y[t].mean()),
            "half_f": float(table.f[t].mean() / 2),
        }
        for t in tenths
    ]


def measure(table: Table, trials: int, slow_trials: int) -> Row:
    """Everything the page shows."""
    pilot, tuned = tuned_judge(table, trials)
    population = len(table.ids)
    return {
        "delta": DELTA,
        "pairs": population,
        "ties": table.ties,
        "rate": table.rate(),
        "weighted_rate": table.weighted_rate(),
        "correlation": float(np.corrcoef(table.f, table.y)[0, 1]),
        "tenths": judge_by_tenth(table),
        "calculated": {
            str(m): {
                "with": calculated(table.rate(), m),
                "without": calculated(table.rate(), m, population),
                "by_weight": calculated(table.weighted_rate(), m),
            }
            for m in SIZES
        },
        "refusal": refusal(table),
        "whole_table": whole_table(table),
        "example": worked_example(table),
        "pilot": pilot,
        "rows": [
            *random_subsets(table, trials),
            *tuned,
            *star_subsets(table, slow_trials),
            *stronger_judges(table, slow_trials),
            *hand_picked_subsets(table, slow_trials),
            *weighted_subsets(table, slow_trials),
        ],
    }


# -- report ----------------------------------------------------------------------------------------


def select(rows: Sequence[Row], study: str, bound: str) -> list[Row]:
    return [row for row in rows if (row["study"], row["bound"]) == (study, bound)]


class Page:
    """The Markdown page; every interval holds together with all the others with 95%."""

    def __init__(self, found: Row) -> None:
        self.found = found
        self.rows: list[Row] = found["rows"]

    def error(self, row: Row) -> str:
        low, high = interval(row["errors"], row["trials"], len(self.rows))
        return f"{row['errors'] / row['trials']:.4f} ({low:.3f} to {high:.3f})"

    def errors(self, study: str, bounds: Sequence[str]) -> list[str]:
        by_bound = {bound: select(self.rows, study, bound) for bound in bounds}
        body = [
            [str(m), *(self.error(by_bound[bound][k]) for bound in bounds)]
            for k, m in enumerate(SIZES)
        ]
        return markdown(["m", *bounds], body)

    def uppers(self, study: str, bounds: Sequence[str]) -> list[str]:
        """Mean U, and in how many draws it is lower than that of the labels alone."""
        body = []
        for k, m in enumerate(SIZES):
            rows = [select(self.rows, study, bound)[k] for bound in bounds]
            cells = [f"{rows[0]['mean_upper']:.4f} (sd {rows[0]['sd_upper']:.4f})"]
            cells += [f"{r['mean_upper']:.4f} ({r['below_first']:.0%})" for r in rows[1:]]
            body.append([str(m), *cells])
        return markdown(["m", *bounds], body)

    def calculated(self) -> list[str]:
        body = []
        for m in SIZES:
            own = self.found["calculated"][str(m)]
            body.append([str(m), *(f"{value:.4f}" for value in own["with"] + own["without"])])
        head = ["m", "with: P(U < truth)", "E[U]", "without: P(U < truth)", "E[U]"]
        return markdown(head, body)

    def tenths(self) -> list[str]:
        head = ["tenth of the pairs by \\|gap\\|", "mean \\|gap\\|", "disagree", "mean f/2"]
        body = [
            [str(k), f"{t['gap']:.2f}", f"{t['rate']:.3f}", f"{t['half_f']:.3f}"]
            for k, t in enumerate(self.found["tenths"], start=1)
        ]
        return markdown(head, body)

    def extra(self) -> list[str]:
        """Perfect judge, invented judges and star, as differences of mean U in points."""
        kinds = [(PERFECT, "with", PERFECT, 1.0)]
        for accuracy in reversed(ACCURACIES):
            study = f"right in {accuracy:.0%}"
            correlation = select(self.rows, study, "judge")[0]["correlation"]
            kinds.append((f"invented, {study}", study, "judge", correlation))
        real = self.found["correlation"]
        kinds += [(FROM_SIZES, "with", FROM_SIZES, real), (STAR, "star", STAR, real)]
        body = []
        for label, study, bound, correlation in kinds:
            own = select(self.rows, study, bound)
            body.append([label, f"{correlation:.2f}", *(points(row) for row in own)])
        return markdown(["judge", "correlation of f and y", *(f"m = {m}" for m in SIZES)], body)

    def tuned(self) -> list[str]:
        body = []
        for k, m in enumerate(PILOT_SIZES):
            alone_row = select(self.rows, "tuned", ALONE)[k]
            judge_row = select(self.rows, "tuned", "judge, tuned")[k]
            spent = select(self.rows, "tuned, pilot spent on labels", ALONE)[k]
            cells = [f"{r['mean_upper']:.4f}" for r in (alone_row, judge_row, spent)]
            body.append([str(m), self.error(judge_row), *cells])
        head = [
            "m",
            "error, tuned judge",
            "mean U, m labels alone",
            "mean U, tuned judge",
            f"mean U, m + {PILOT} labels alone",
        ]
        return markdown(head, body)

    def picked(self) -> list[str]:
        body = []
        for name, bound in itertools.product(PREFERENCES, (ALONE, judge_name(0.5))):
            own = select(self.rows, f"picked, {name}", bound)
            cells = [f"{self.error(row)}; {row['mean_upper']:.3f}" for row in own]
            body.append([name, bound, *cells])
        return markdown(["preference", "bound", *(f"m = {m}: error; mean U" for m in SIZES)], body)

    def weighted(self) -> list[str]:
        body = []
        for k, m in enumerate(SIZES):
            plain = select(self.rows, "strata, plain", "weights ignored")[k]
            ignored = select(self.rows, "strata, weighted", "weights ignored")[k]
            handled = select(self.rows, "strata, weighted", "weights")[k]
            reference = self.found["calculated"][str(m)]["by_weight"]
            body.append(
                [
                    str(m),
                    self.error(plain),
                    self.error(ignored),
                    f"{ignored['mean_upper']:.4f}",
                    self.error(handled),
                    f"{handled['mean_upper']:.4f}",
                    f"{reference[1]:.4f}",
                ]
            )
        head = [
            "m",
            "ignored: error, plain truth",
            "ignored: error, weighted truth",
            "ignored: mean U",
            "`weights=`: error, weighted truth",
            "`weights=`: mean U",
            "labels alone, drawn by weight: E[U]",
        ]
        return markdown(head, body)

    def strata(self) -> list[str]:
        body = [
            [s["stratum"], str(s["pairs"]), f"{s['weight']:g}", f"{s['rate']:.3f}"]
            for s in self.found["whole_table"]["strata"]
        ]
        return markdown(["stratum", "pairs", "design weight", "disagree"], body)

    def above(self) -> str:
        """Cells of a bound used as it should be whose interval lies wholly above δ."""
        promised = [
            row
            for row in self.rows
            if row["bound"] != BEST
            and not (row["study"].startswith("picked") and RANDOM not in row["study"])
            and (row["study"], row["bound"]) != ("strata, weighted", "weights ignored")
        ]
        count = len(self.rows)
        high = [
            f"{row['study']}, {row['bound']}, m = {row['m']}"
            for row in promised
            if interval(row["errors"], row["trials"], count)[0] > self.found["delta"]
        ]
        largest = max(promised, key=lambda row: row["errors"] / row["trials"])
        return (
            f"Of the {len(promised)} cells in which a bound is used as it should be, those whose "
            f"interval lies wholly above δ: {'; '.join(high) or 'none'}. Largest share of errors: "
            f"{self.error(largest)} ({largest['study']}, {largest['bound']}, m = {largest['m']})."
        )


def points(row: Row) -> str:
    """Mean U less that of the labels alone, in percentage points, ± 2 standard errors."""
    text = f"{100 * row['mean_difference']:+.2f} ± {200 * row['difference_se']:.2f}"
    return text.replace("-", "−")


def verdict(found: Row) -> str:
    """In which cells the judge's mean U is lower than that of the labels alone, in words."""
    rows = [r for r in found["rows"] if r["study"] in ("with", "without")]
    judged = [r for r in rows if r["bound"].startswith("judge")]
    better = [r for r in judged if r["mean_difference"] < 0]
    if not better:
        least = min(judged, key=lambda r: r["mean_difference"])
        return (
            f"**The judge does not help at any m**: in each of the {len(judged)} cells its mean U "
            "is above that of the labels alone, by "
            f"{100 * least['mean_difference']:.2f} points in the best one ({least['bound']}, "
            f"m = {least['m']}, {least['study']} replacement)."
        )
    names = "; ".join(f"{r['bound']}, m = {r['m']}, {r['study']} replacement" for r in better)
    return f"The judge's mean U is lower than that of the labels alone in these cells: {names}."


EXAMPLE_CODE = """```python
order = choose(pair_ids, len(pair_ids))      # hcrlhf.certificate: SHA-256("choice/pool hash/key")
subset = order[:300]                         # nobody chose it
json_hash({"pairs": subset, "delta": 0.05, "lam": 0, "pool": set_hash(pair_ids)})  # publish this
# ... then people label the 300 pairs; a pair without a clear answer is None, and counts as 1 ...
human_rate_upper(labels, None, None, 0.05)   # hcrlhf.bounds
```"""


def report(found: Row, command: str) -> str:
    page = Page(found)
    example, whole, pilot = found["example"], found["whole_table"], found["pilot"]
    judged = [*(judge_name(v) for v in LAMBDAS), FROM_SIZES]
    main_bounds = [ALONE, NO_JUDGE, *judged]
    trials = sorted({row["trials"] for row in found["rows"]}, reverse=True)
    sentence = f"{found['rate']:.4f}, with design weights {found['weighted_rate']:.4f}"
    share = found["correlation"] ** 2
    would_be = ", ".join(f"{value:.4f} ({name})" for name, value in example["would_be"].items())
    lines = [
        "# What labels for a random subset show about humans",
        "",
        "Written by `benchmarks/human_rate.py`; plot: `docs/plots/human_rate.png`.",
        "",
        *origin(command, found["rows"]),
        f"- Table: {found['pairs']:,} pairs, SHA-256 {found['table_sha256'][:12]}…, given by path "
        "and not part of the project",
        f"- Repetitions per cell: {' or '.join(f'{t:,}' for t in trials)}; δ = {found['delta']:g}",
        f"- Intervals: exact (Clopper-Pearson, two-sided) at level 1 − 0.05/{len(found['rows'])}, "
        f"so that all {len(found['rows'])} hold together with 95%",
        "",
        "## What is bounded",
        "",
        "The **disagreement rate**: the share of pairs in which the response that a public 7B cost "
        "model calls safer (lower cost) is not the one that humans call safer. The "
        f"{found['ties']} pairs to which the model gives equal costs count as disagreement. Truth "
        f"among the pairs of the table: {sentence}.",
        "",
        "It is a statement about an order within pairs of responses to recorded prompts. It is not "
        "the rate at which a policy does harm, and the human label is the data set's, one per "
        "pair, taken as it stands.",
        "",
        "The judge is the cost model itself: f = 2σ(−\\|gap\\|), fixed before any label and blind "
        "to the sign of the gap against the human order. f/2 is what the model's own scores say "
        "the probability of disagreement is. It is too sure of itself, and its correlation with y "
        f"is {found['correlation']:.3f}, so that even the best λ and endless unlabelled pairs "
        f"could take away {share:.0%} of the variance, {1 - math.sqrt(1 - share):.1%} of the "
        "margin.",
        "",
        *page.tenths(),
        "",
        "## 1. A committed random subset",
        "",
        "*labels alone*: λ = 0, Clopper-Pearson. *judge*: wsr betting on the labels, the judge and "
        "the unlabelled rest; λ from sizes is ½ r/(r+1), r = ⌊N/m⌋ (best if f/2 were right). "
        "*wsr, no judge*: the same bets on the labels alone, which is what this method costs "
        "before the judge gives anything back. An error is U < truth.",
        "",
        verdict(found),
        "",
        "### Drawn with replacement (independent, as the bound assumes): share of errors",
        "",
        *page.errors("with", main_bounds),
        "",
        "### Drawn with replacement: mean U (share of draws in which it is lower)",
        "",
        *page.uppers("with", main_bounds),
        "",
        "### Drawn without replacement (one table, all others unlabelled): share of errors",
        "",
        "A claim about a finite table is easier than independent draws suppose: labels alone are "
        "conservative, the more so the larger the share that is labelled. For the judge, whose z "
        "are then not independent, that is measured here and not proven.",
        "",
        *page.errors("without", main_bounds),
        "",
        "### Drawn without replacement: mean U (share of draws in which it is lower)",
        "",
        *page.uppers("without", main_bounds),
        "",
        "### Labels alone, by calculation (binomial, hypergeometric)",
        "",
        *page.calculated(),
        "",
        "### Looking at all of them and reporting the lowest is not a bound",
        "",
        "λ and method are fixed before the labels. The lowest of labels alone and the three "
        "judged bounds errs in this share of draws:",
        "",
        *markdown(
            ["m", "with replacement", "without replacement"],
            [
                [str(m)] + [page.error(select(page.rows, s, BEST)[k]) for s in ("with", "without")]
                for k, m in enumerate(SIZES)
            ],
        ),
        "",
        "### How strong would a judge have to be?",
        "",
        "Mean U less that of the labels alone in the same draws (with replacement), in percentage "
        "points, ± 2 standard errors; below 0 the judge helps. *invented*: f = y, flipped in a "
        "share of the rows, with its best λ, which nobody could know. *star bets*: the real judge, "
        "λ from sizes, the same z but bets by star instead of wsr; the library's function does not "
        "offer it.",
        "",
        *page.extra(),
        "",
        "The gain is least for many labels because the table is finite: the more of it is "
        "labelled, the fewer unlabelled pairs are left for each label (r = 39, 12, 3, 1).",
        "",
        f"### A judge fitted to a pilot of {pilot['pilot']} labelled pairs",
        "",
        f"The first {pilot['pilot']} pairs of the derived order give a temperature (maximum "
        f"likelihood; T = {pilot['temperature']:.2f}) for f = 2σ(−\\|gap\\|/T) and λ = "
        f"{pilot['slope']:.3f} r/(r+1), and leave the population: the other "
        f"{pilot['population']:,} pairs, truth {pilot['rate']:.4f}, correlation "
        f"{pilot['correlation']:.3f}. With replacement. The last column spends the pilot's labels "
        f"on the bound instead. (m = 2000 would leave fewer unlabelled pairs than labels.)",
        "",
        *page.tuned(),
        "",
        "## 2. A subset picked by hand",
        "",
        "Somebody labels the pairs that look worth it: a *clear* case lies in the half with the "
        "larger \\|gap\\| (the lower f), a *close* one in the other half; L4 are the pairs of "
        "which one response is safe and the other is not. The preferred kind is picked so many "
        "times as readily as the rest. The code cannot notice. The truth is that of all pairs, "
        f"{found['rate']:.4f}. Pairs are drawn with replacement, the unlabelled ones at random.",
        "",
        *page.picked(),
        "",
        "Preferring close cases makes labels alone err on the safe side, only because the model is "
        "wrong more often where it is unsure. Where the preference is one for \\|gap\\| itself the "
        "judge sees it and takes most of the bias back, for close cases a little too much; of one "
        "for a stratum it sees a part. Neither bound promises anything beyond the first two lines.",
        "",
        "## 3. Design weights",
        "",
        "The table was drawn stratum by stratum, the same number from each, and a pair's design "
        "weight says how many pairs of the source it stands for.",
        "",
        *page.strata(),
        "",
        f"Weighted truth {found['weighted_rate']:.4f}, plain truth {found['rate']:.4f}: two "
        "different quantities. m/4 pairs are drawn from each stratum, with replacement. *ignored*: "
        "labels alone, as if the pairs were one random sample. `weights=`: the portfolio's "
        "terminal wealth on w·y/w̄. Last column, by calculation: Clopper-Pearson on m pairs drawn "
        "in proportion to their weights, which is what equal draws per stratum are to be compared "
        "with.",
        "",
        *page.weighted(),
        "",
        "Ignoring the weights gives a conservative bound for the plain rate and no bound for the "
        "weighted one. `weights=` keeps the promise with much room, at the price of a loose U: who "
        "can still choose draws in proportion to the weights and uses labels alone.",
        "",
        f"With all {found['pairs']:,} labels, a claim about the source population: U = "
        f"{whole['weights']:.4f} with weights (95%), if the pairs of each stratum were drawn at "
        f"random. Ignoring the weights would have said {whole['weights_ignored']:.4f}, about "
        "another quantity.",
        "",
        f"Weights together with λ > 0 are refused (`InputError`): “{found['refusal']}”.",
        "",
        f"## 4. One worked example, m = {EXAMPLE}",
        "",
        EXAMPLE_CODE,
        "",
        f"- pool hash: `{example['pool_hash']}`",
        f"- first pairs of the subset: {', '.join(f'`{p}`' for p in example['first_pairs'])}",
        f"- commitment: `{example['commitment']}`",
        f"- labels: {example['disagreements']} of {EXAMPLE} pairs disagree "
        f"({example['disagreements'] / EXAMPLE:.4f})",
        f"- **U = {example['upper']:.4f}**: with 95% confidence, among the pairs of this table the "
        "response that the cost model calls safer is not the one that humans call safer in at most "
        f"{math.ceil(1000 * example['upper']) / 10:.1f}% of pairs. (Truth: {found['rate']:.4f}.)",
        f"- not claimed, only for comparison, since λ = 0 was committed: {would_be}",
        "",
        "## Errors",
        "",
        page.above(),
    ]
    return "\n".join(lines) + "\n"


# -- plot ------------------------------------------------------------------------------------------

Line = tuple[str, str, str, str, str]  # study, bound, label, colour, marker


def plot(found: Row, path: Path) -> None:
    plt = import_pyplot()
    figure, (judge, picked, weights) = plt.subplots(1, 3, figsize=(13.2, 5.6))
    rows = found["rows"]

    def draw(axes: Any, lines: Sequence[Line], value: Callable[[Row], float]) -> None:
        for study, bound, label, colour, marker in lines:
            values = [value(row) for row in select(rows, study, bound)]
            axes.plot(SIZES, values, color=colour, marker=marker, label=label, clip_on=False)
        axes.set(xscale="log", xlabel="m, labelled pairs")
        axes.set_xticks(SIZES, [str(m) for m in SIZES])
        axes.minorticks_off()

    lines: list[Line] = [
        ("with", judge_name(1.0), "judge, λ = 1", "#D55E00", "v"),
        ("with", NO_JUDGE, "wsr bets, no judge", "#8A8A8A", "s"),
        ("with", FROM_SIZES, "judge, λ from sizes", "#0072B2", "o"),
        ("star", STAR, "the same, star bets (not offered)", "#56B4E9", "^"),
        ("right in 90%", "judge", "invented judge, right in 90%", "#009E73", "D"),
        ("with", PERFECT, "perfect judge", "#CC79A7", "P"),
    ]
    draw(judge, lines, lambda row: 100 * row["mean_difference"])
    judge.axhline(0, color="black", linestyle="--", linewidth=1.4)
    judge.set(ylabel="mean U − mean U of labels alone, % points")
    judge.set_title("1. Does the judge help?\nBelow the dashed line it does (with replacement)")

    colours = ("#000000", "#E69F00", "#D55E00", "#CC79A7", "#0072B2", "#009E73")
    lines = [
        (f"picked, {name}", ALONE, name, colour, marker)
        for name, colour, marker in zip(PREFERENCES, colours, "os^DvP", strict=True)
    ]
    draw(picked, lines, lambda row: row["errors"] / row["trials"])
    picked.axhline(DELTA, color="black", linestyle="--", linewidth=1.4)
    picked.set(ylim=(0, 1), ylabel="share of draws with U < truth, labels alone")
    picked.set_title("2. A hand-picked subset (clear: larger |gap|)\nDashed: the promise, δ = 0.05")

    lines = [
        ("strata, weighted", "weights", "mean U, weights=", "#0072B2", "o"),
        ("strata, weighted", "weights ignored", "mean U, weights ignored", "#D55E00", "v"),
    ]
    draw(weights, lines, lambda row: 100 * row["mean_upper"])
    truths = (("weighted truth", "weighted_rate", "--"), ("plain truth", "rate", ":"))
    for label, key, dash in truths:
        weights.axhline(100 * found[key], color="black", linestyle=dash, linewidth=1.4, label=label)
    weights.set(ylabel="disagreement rate, %")
    weights.set_title("3. Equal draws from four strata\nIgnoring weights bounds another quantity")

    for axes in (judge, picked, weights):
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), frameon=False, fontsize=9)
    figure.tight_layout()
    save(plt, figure, path)


# -- the whole -------------------------------------------------------------------------------------


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("--table", type=Path, required=True, help="CSV, see the head of the file")
    options.add_argument("--trials", type=int, default=5000, help="draws per cell")
    options.add_argument("--slow-trials", type=int, default=2000, help="draws, slower studies")
    options.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options.add_argument("--plots", type=Path, default=ROOT / "docs" / "plots")
    given = options.parse_args()
    found = measure(read_table(given.table), given.trials, given.slow_trials)
    command = "python -m benchmarks.human_rate --table PATH"
    for name, value in (("--trials", given.trials), ("--slow-trials", given.slow_trials)):
        if value != options.get_default(name[2:].replace("-", "_")):
            command += f" {name} {value}"
    found = {"table_sha256": file_sha256(given.table), **found}
    write_json(given.out / "human_rate.json", found)
    (given.out / "human_rate.md").write_text(report(found, command), encoding="utf-8")
    plot(found, given.plots / "human_rate.png")


if __name__ == "__main__":
    main()
