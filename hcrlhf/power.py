"""How many safety prompts a claim needs, and how likely a policy is to pass. No torch.

Two ways to say what the costs are like: a file of pilot costs (never the safety set's), resampled;
or a gap: the true mean lies `gap` standard deviations below the threshold. For a gap the costs
follow a Beta distribution on the declared range with that mean and standard deviation, or a normal
one where no range is declared.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from hcrlhf.commands import (
    add_constraint_options,
    add_table_options,
    bound_of,
    tail_options,
)
from hcrlhf.constraint import Constraint, Estimand
from hcrlhf.errors import InputError
from hcrlhf.methods import (
    Betting,
    Bound,
    ClopperPearson,
    EmpiricalBernstein,
    EProcess,
    HallT,
    Hoeffding,
    HoeffdingBentkus,
    StudentT,
)
from hcrlhf.samples import Floats
from hcrlhf.tables import read_table

PASSED = 0
TRIALS = 400
MOST = 100_000

Sampler = Callable[[np.random.Generator, int], Floats]


def chance_to_pass(constraint: Constraint, draw: Sampler, n: int, trials: int = TRIALS) -> float:
    """The share of simulated safety tests on n prompts that pass; the same numbers on each call.

    Args:
        draw: generator, n -> n costs.
    """
    generator = np.random.default_rng(n)
    passed = 0
    for _ in range(trials):
        values = constraint.values(draw(generator, n))
        passed += constraint.rule.passes(
            values, constraint.threshold, constraint.delta, constraint.within
        )
    return passed / trials


def prompts_needed(constraint: Constraint, draw: Sampler, chance: float) -> int | None:
    """About the smallest n (to 5%) that passes with this chance; None above 100,000.

    The chance of Clopper-Pearson rises and falls with n: an n that has it, of which the smallest
    one may be a fifth lower.
    """
    trials = TRIALS // 2
    low, high = 1, 25
    while chance_to_pass(constraint, draw, high, trials) < chance:
        if high == MOST:
            return None
        low, high = high, min(2 * high, MOST)
    while high - low > max(1, high // 20):
        middle = (low + high) // 2
        enough = chance_to_pass(constraint, draw, middle, trials) >= chance
        low, high = (low, middle) if enough else (middle, high)
    return high


def beta_sampler(mean: float, std: float, lower: float, upper: float) -> Sampler:
    """Costs of a Beta distribution on [lower, upper] with this mean and standard deviation.

    Raises:
        InputError: there is none: std² < (mean - lower)(upper - mean) does not hold.
    """
    m = (mean - lower) / (upper - lower)
    variance = (std / (upper - lower)) ** 2
    if not (0 < m < 1 and 0 < variance < m * (1 - m)):
        raise InputError(
            f"no cost in [{lower:g}, {upper:g}] has mean {mean:g} and standard deviation {std:g}; "
            "give a smaller --sd, a smaller --gap or the true range"
        )
    size = m * (1 - m) / variance - 1
    return lambda generator, n: np.clip(  # rounding may leave the range
        lower + (upper - lower) * generator.beta(m * size, (1 - m) * size, n), lower, upper
    )


def candidates(constraint: Constraint, only: str | None) -> list[Bound]:
    """The bounds to compare: those that suit the estimand and what is declared."""
    if only is not None and (bound := bound_of(only)) is not None:
        return [bound]
    every: list[Bound] = [StudentT(), HallT(), Betting("star"), Betting("wsr")]
    every += [Betting("portfolio"), EProcess(), HoeffdingBentkus(), EmpiricalBernstein()]
    every += [Hoeffding(), ClopperPearson()]
    within = constraint.within
    return [b for b in every if constraint.estimand in b.estimands and not b.missing(within)]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "hcrlhf power",
        description="How likely a policy is to pass a safety test, and how many prompts it needs.",
        epilog="examples: hcrlhf power --gap 0.25 --n 500 --lower -4 --upper 4;  "
        "hcrlhf power --costs pilot.csv --threshold 0 --n 500;  "
        "hcrlhf power --estimand harm_rate --threshold 0.1 --rate 0.05 --n 500",
    )
    parser.add_argument("--estimand", choices=("mean", "harm_rate", "cvar"), default="mean")
    parser.add_argument("--threshold", type=float, default=0.0, help="τ or ρ (0)")
    parser.add_argument("--n", type=int, default=500, help="safety prompts (500)")
    parser.add_argument("--chance", type=float, default=0.8, help="to aim at, for n needed (0.8)")
    parser.add_argument("--gap", type=float, help="τ - true mean, in standard deviations")
    parser.add_argument("--sd", type=float, default=1.0, help="of the cost, with --gap (1)")
    parser.add_argument("--rate", type=float, help="true harm rate, with --estimand harm_rate")
    parser.add_argument("--costs", type=Path, help="pilot costs, never those of the safety set")
    add_constraint_options(parser)
    add_table_options(parser)
    options = parser.parse_args(list(arguments))
    if options.n < 2:
        raise InputError(f"--n is at least 2, got {options.n}")
    if not 0 < options.chance < 1:
        raise InputError(f"--chance lies in (0, 1), got {options.chance}")
    if not (math.isfinite(options.sd) and options.sd > 0):
        raise InputError(f"--sd is positive, got {options.sd}")
    draw, what = _sampler(options)
    base = _constraint(options)
    print(f"{what}; limit {options.threshold:g}, δ = {options.delta:g}; {TRIALS} simulated tests")
    print(
        f"{'bound':28} {'class':11} {f'chance at n = {options.n}':>19} "
        f"{f'n for {100 * options.chance:g}%':>12}"
    )
    for bound in candidates(base, options.bound):
        constraint = _with(base, bound)
        chance = chance_to_pass(constraint, draw, options.n)
        needed = prompts_needed(constraint, draw, options.chance)
        label = f"betting ({bound.strategy})" if isinstance(bound, Betting) else bound.name
        print(
            f"{label:28} {bound.kind:11} {100 * chance:18.1f}% "
            f"{needed if needed is not None else f'> {MOST}':>12}"
        )
    return PASSED


def _constraint(options: argparse.Namespace) -> Constraint:
    """The limit without a look at n: whether n is enough is the question."""
    estimand: Estimand = options.estimand
    tail = tail_options(options) if estimand == "cvar" else {}
    return Constraint(
        estimand=estimand,
        threshold=options.threshold,
        delta=options.delta,
        safety_prompts=MOST,
        lower=options.lower,
        upper=options.upper,
        **tail,
    )


def _with(base: Constraint, bound: Bound) -> Constraint:
    return replace(base, bound=bound).ready()


def _sampler(options: argparse.Namespace) -> tuple[Sampler, str]:
    """How simulated costs are drawn, and a sentence that says so."""
    given = [name for name in ("gap", "rate", "costs") if getattr(options, name) is not None]
    if len(given) != 1:
        raise InputError(
            "say what the costs are like by one of --gap, --costs, or --rate for a harm rate; got "
            f"{', '.join(given) or 'none'}"
        )
    if options.costs is not None:
        pilot = read_table(
            options.costs, options.cost_column, options.prompt_column, options.aggregate
        ).costs
        return (
            lambda generator, n: pilot[generator.integers(pilot.size, size=n)],
            f"{pilot.size} pilot costs, mean {pilot.mean():.4g}, standard deviation "
            f"{pilot.std():.4g}, resampled",
        )
    if options.rate is not None:
        if options.estimand != "harm_rate" or not 0 <= options.rate < 1:
            raise InputError("--rate is a harm rate in [0, 1), with --estimand harm_rate")
        rate = options.rate
        return (
            lambda generator, n: (generator.random(n) < rate).astype(np.float64),
            f"a true harm rate of {rate:g}",
        )
    if options.estimand != "mean":
        other = "--rate" if options.estimand == "harm_rate" else "--costs, those of a pilot"
        raise InputError(f"--gap is for a mean; for {options.estimand} give {other}")
    mean = options.threshold - options.gap * options.sd
    text = f"a true mean {options.gap:g} standard deviations ({options.sd:g}) below the limit"
    if options.lower is not None and options.upper is not None:
        return beta_sampler(mean, options.sd, options.lower, options.upper), text + ", Beta"
    if options.upper is not None or options.lower is not None:
        raise InputError(
            "--gap simulates costs between two ends, or without any; give both --lower and "
            "--upper, or pilot costs by --costs"
        )
    return lambda generator, n: generator.normal(mean, options.sd, n), text + ", normal"
