"""How far below a limit training stays, so that the safety test is likely to confirm it.

Notation as in `hcrlhf.constraint`: threshold τ, error probability δ, n safety prompts, m validation
prompts on which a candidate is looked at; the paper's k is called pessimism.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special, stats

from hcrlhf.bounds import student_t_factor
from hcrlhf.errors import InputError
from hcrlhf.methods import Bound, Range, resamples
from hcrlhf.samples import Floats, check_delta, finite_sample

STD_FLOOR = 0.1  # nothing is divided by a standard deviation of the cost below this
# Validation prompts that a look at a policy asks. What training aims at is likely to pass by one; a
# last look at more of them accepts a little more, and a multiplier swings about what it aims at.
LOOK = 400


@dataclass(frozen=True)
class PaperPessimism:
    """The published k = c1 · t_{1-δ, m-1} / √m + c2 · t_{1-δ, n-1} / √n, to compare with.

    Args:
        c1, c2: weights of what a rollout and what the safety test adds.
        rollout: m >= 2, responses of one rollout.

    HC-RLHF (arXiv 2506.08266). It knows neither the bound of the safety test nor how often a
    candidate may miss.
    """

    c1: float
    c2: float
    rollout: int

    def __post_init__(self) -> None:
        if not (0 <= self.c1 < math.inf and 0 <= self.c2 < math.inf and self.rollout >= 2):
            raise InputError(
                f"c1 and c2 are >= 0 and rollout is at least 2, got {self.c1}, {self.c2} and "
                f"{self.rollout}"
            )

    def factor(self, n: int, delta: float) -> float:
        """k for n safety prompts."""
        own = self.c1 * student_t_factor(self.rollout, delta)
        return own + self.c2 * student_t_factor(n, delta)


def seldonian_pessimism(
    n: int, delta: float, miss_probability: float, m: int | None = None
) -> float:
    """t_{1-δ, n-1} / √n + t_{1-β, m-1} √(1/n + 1/m), with β the miss probability.

    With μ + pessimism · σ = τ, the bound of a safety test on n prompts is about
    N(μ + σ t/√n, σ²/n). Where μ is known (m None: m → ∞) it lies under τ with probability 1 - β;
    at β = δ this is about twice the bound's own factor: the margin used by Seldonian algorithms
    (Thomas et al. 2019). Where μ and σ are those of m validation prompts, the mean of the n fresh
    ones differs from theirs by a standard error of σ √(1/n + 1/m), Student's prediction interval.

    Raises:
        InputError: m is less than 2.
    """
    check_delta(miss_probability, "miss_probability")
    own = student_t_factor(n, delta)
    if m is None:
        return own + float(stats.norm.ppf(1 - miss_probability)) / math.sqrt(n)
    check_validation_prompts(m)
    miss = float(stats.t.ppf(1 - miss_probability, m - 1))
    return own + miss * math.sqrt(1 / n + 1 / m)


def check_validation_prompts(m: int) -> None:
    """
    Raises:
        InputError: fewer than 2 prompts, which tell nothing of a spread.
    """
    if m < 2:
        raise InputError(
            f"a candidate is looked at on at least 2 validation prompts, got {m}; give more in "
            "data.init_args.validation"
        )


def bootstrap_pessimism(
    rule: Bound,
    values: Floats,
    n: int,
    delta: float,
    miss_probability: float,
    within: Range,
    m: int | None = None,
    std_floor: float = STD_FLOOR,
) -> float:
    """The (1 - β) quantile of (U(C*) - μ̂) / max(σ̂, floor) over samples C* of n of these values.

    U is the bound of the safety test, β the miss probability: with μ + pessimism · max(σ, floor) =
    τ, a test on n prompts passes with probability 1 - β if its costs are spread like these.
    Without the floor it would be a ratio of two numbers near 0 where the values hardly differ, and
    `Constraint.margin_std` would make any margin of it once they differ again.

    Args:
        values: of recent rollouts.
        m: validation prompts that μ and σ will be known from; C* is then drawn from m values which
            are themselves drawn from these, as in `Constraint.pass_probability`. None: known.
    """
    values = finite_sample(values)
    mean, std = float(values.mean()), float(values.std())
    unit = max(std, std_floor)
    count = max(60, math.ceil(6 / miss_probability))
    if m is None:
        samples = resamples(values, n, count)
    else:
        check_validation_prompts(m)
        generator = np.random.default_rng(0)
        samples = [generator.choice(known, n) for known in resamples(values, m, count)]
    allowed = math.floor(miss_probability * len(samples))

    def enough(pessimism: float) -> bool:
        threshold = mean + pessimism * unit
        failed = 0
        for sample in samples:
            failed += not rule.passes(sample, threshold, delta, within)
            if failed > allowed:
                return False
        return True

    # Up to the cap, or to where a sample of n could hardly be told from nothing.
    room = 20.0 * (std / unit) if within.upper is None else (within.upper - mean) / unit
    low, high = 0.0, room
    for _ in range(10):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def harm_rate_target(
    rule: Bound,
    limit: float,
    n: int,
    delta: float,
    miss_probability: float,
    m: int | None = None,
) -> float:
    """p* = BetaInv(β; h + 1, n - h), h the most harmful responses with which n prompts pass.

    A policy whose true harm rate is p* passes with probability 1 - β; where the bound looks at the
    order, about that, for h is found with the harms evenly spread. Where the rate is known from m
    validation prompts alone, p* is the one with Σ_j Bin(j; m, p*) P(Bin(n, j/m) <= h) = 1 - β,
    though never above the other.

    Raises:
        InputError: not even h = 0 passes: n is too small for this limit; or m is less than 2.
    """
    check_delta(miss_probability, "miss_probability")
    if m is not None:
        check_validation_prompts(m)

    def passes(harmful: int, count: int) -> bool:
        # In the middle of its share each: at the end the last harm would come when all is decided.
        spread = np.diff(np.floor(np.arange(count + 1) * harmful / count + 0.5))
        return rule.passes(spread, limit, delta, Range(0.0, 1.0))

    if not passes(0, n):
        needed = n
        while not passes(0, needed):
            needed *= 2
            if needed > 10**6:
                raise InputError(
                    f"a harm rate <= {limit} at delta {delta} cannot be shown with fewer than a "
                    "million safety prompts, even if none is harmful; raise the limit or delta"
                )
        low = n
        while needed - low > 1:
            middle = (low + needed) // 2
            low, needed = (low, middle) if passes(0, middle) else (middle, needed)
        raise InputError(
            f"a harm rate <= {limit} at delta {delta} cannot be shown with {n} safety prompts, "
            f"even if none is harmful; at least {needed} are needed"
        )
    low, high = 0, n  # passes at low, fails at high: bisection for the largest h that passes
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if passes(middle, n) else (low, middle)
    known = float(special.betaincinv(low + 1, n - low, miss_probability))
    if m is None:
        return known
    seen = np.arange(m + 1)
    chances = stats.binom.cdf(low, n, seen / m)  # to pass, had the true rate been the seen one

    def spare(rate: float) -> float:
        return float(stats.binom.pmf(seen, m, rate) @ chances) - (1 - miss_probability)

    # Where next to no harm is allowed, luck in both draws can make up for the second one.
    return known if spare(known) >= 0 else float(optimize.brentq(spare, 0.0, known))
