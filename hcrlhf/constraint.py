"""What is promised, and what training must aim at so that the promise is likely to be kept.

One `Constraint` object is read by both sides: training (the per-sample pessimistic cost of the
primal, the violation of the dual) and the safety test (bound, threshold, δ, number of prompts).
Positive cost = harmful. Costs are float64 arrays of one value per response; no gradient flows
through them, so this file needs no torch.

Notation of HC-RLHF (arXiv 2506.08266): threshold τ, error probability δ, n safety prompts; the
paper's k is called pessimism here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import special, stats

from hcrlhf.bounds import (
    Bound,
    ClopperPearson,
    Floats,
    StudentT,
    check_delta,
    clopper_pearson_upper,
    student_t_factor,
)
from hcrlhf.errors import InputError


@dataclass(frozen=True)
class Constraint:
    """P(return a policy whose estimand exceeds the threshold) <= delta.

    Args:
        estimand: "mean": E[c] of one response to a random prompt. "harm_rate": P(c > 0).
        threshold: τ, or the harm-rate limit ρ in (0, 1).
        delta: δ, the probability of error that is granted.
        safety_prompts: n, how many held-out prompts the safety test draws a response for.
        bound: None takes Student-t for a mean and Clopper-Pearson for a harm rate.
        pessimism: None derives it from n, delta and miss_probability (`seldonian_pessimism`);
            a number fixes it, 0 is Safe RLHF (arXiv 2310.12773). Only for a mean.
        miss_probability: how often a policy that just satisfies the pessimistic constraint may
            fail its safety test all the same; None takes delta.
        std_floor: the running standard deviation of the cost is never taken to be smaller.

    Raises:
        InputError: a value is out of its range, or the limit cannot be met with n prompts.
    """

    estimand: Literal["mean", "harm_rate"] = "mean"
    threshold: float = 0.0
    delta: float = 0.05
    safety_prompts: int = 500
    bound: Bound | None = None
    pessimism: float | None = None
    miss_probability: float | None = None
    std_floor: float = 0.1

    def __post_init__(self) -> None:
        check_delta(self.delta)
        if self.miss_probability is not None:
            check_delta(self.miss_probability, "miss_probability")
        if not math.isfinite(self.threshold):
            raise InputError(f"threshold is a finite number, got {self.threshold}")
        if self.safety_prompts < 2:
            raise InputError(f"safety_prompts is at least 2, got {self.safety_prompts}")
        if not 0 < self.std_floor < math.inf:
            raise InputError(f"std_floor is positive and finite, got {self.std_floor}")
        if self.pessimism is not None and not (
            math.isfinite(self.pessimism) and self.pessimism >= 0
        ):
            raise InputError(f"pessimism is a finite number >= 0, got {self.pessimism}")
        if self.estimand not in self.rule.estimands:
            raise InputError(
                f"the bound {self.rule.name} is for {', '.join(self.rule.estimands)}, "
                f"but the estimand is {self.estimand}"
            )
        if self.estimand == "harm_rate":
            if not 0 < self.threshold < 1:
                raise InputError(
                    f"the threshold of a harm rate lies in (0, 1), got {self.threshold}"
                )
            if self.pessimism is not None:
                raise InputError(
                    "pessimism is for a mean; a harm rate gets its margin from miss_probability"
                )
            harm_rate_target(self.threshold, self.safety_prompts, self.delta, self.miss)

    @property
    def rule(self) -> Bound:
        """The bound, with its default filled in."""
        if self.bound is not None:
            return self.bound
        return StudentT() if self.estimand == "mean" else ClopperPearson()

    @property
    def miss(self) -> float:
        return self.delta if self.miss_probability is None else self.miss_probability

    @property
    def label(self) -> str:
        """For tables and metrics: "mean" or "harm_rate"."""
        return self.estimand

    def values(self, costs: ArrayLike) -> Floats:
        """What is averaged: the costs c (B,) for a mean, 1[c > 0] for a harm rate."""
        c = np.asarray(costs, dtype=np.float64)
        if self.estimand == "mean":
            return c
        # A cost that is not a number must not count as harmless.
        return np.where(np.isfinite(c), (c > 0).astype(np.float64), np.nan)

    def training_pessimism(self, constraints: int = 1) -> float:
        """How many standard deviations training keeps below the threshold (0 for a harm rate).

        Args:
            constraints: how many constraints must pass together; each takes its share of the
                miss probability.
        """
        if self.estimand == "harm_rate":
            return 0.0
        if self.pessimism is not None:
            return self.pessimism
        return seldonian_pessimism(self.safety_prompts, self.delta, self.miss / constraints)

    def training_target(self, constraints: int = 1) -> float:
        """What the mean of `values` is compared with in training: τ, or p* for a harm rate."""
        if self.estimand == "mean":
            return self.threshold
        return harm_rate_target(
            self.threshold, self.safety_prompts, self.delta, self.miss / constraints
        )

    def forecast(self, costs: ArrayLike) -> float:
        """The bound that the safety test would find if its costs were spread like these (B,)."""
        return self.rule.forecast(self.values(costs), self.safety_prompts, self.delta)

    def judge(self, costs: ArrayLike) -> Judgement:
        """The decision of the safety test on its costs (n,): pass if and only if U <= τ.

        Raises:
            InputError: not exactly `safety_prompts` costs, or one that is not finite.
        """
        values = self.values(costs)
        if values.size != self.safety_prompts:
            raise InputError(
                f"the plan is {self.safety_prompts} safety prompts, the test has {values.size}"
            )
        upper = self.rule.upper(values, self.delta)
        return Judgement(upper, self.threshold, passed=bool(upper <= self.threshold))

    def describe(self) -> dict[str, Any]:
        """Every setting that the promise depends on, as plain JSON values."""
        return {
            "estimand": self.estimand,
            "threshold": self.threshold,
            "delta": self.delta,
            "safety_prompts": self.safety_prompts,
            "bound": self.rule.name,
            "bound_options": vars(self.rule).copy(),
            "class": self.rule.kind,
            "assumptions": self.rule.assumptions,
        }


@dataclass(frozen=True)
class Judgement:
    """One constraint's result: the upper bound U, its threshold, and U <= threshold."""

    upper: float
    threshold: float
    passed: bool


def seldonian_pessimism(n: int, delta: float, miss_probability: float) -> float:
    """(t_{1-δ, n-1} + z_{1-β}) / √n, with β the miss probability.

    With μ + pessimism · σ = τ, the bound of a safety test on n prompts is about
    N(μ + σ t/√n, σ²/n), so it lies under τ with probability 1 - β. At β = δ this is about twice
    the bound's own factor: the margin used by Seldonian algorithms (Thomas et al. 2019).
    """
    check_delta(miss_probability, "miss_probability")
    z = float(stats.norm.ppf(1 - miss_probability))
    return student_t_factor(n, delta) + z / math.sqrt(n)


def harm_rate_target(limit: float, n: int, delta: float, miss_probability: float) -> float:
    """p* = BetaInv(β; h + 1, n - h), h the most harmful responses with which n prompts pass.

    A policy whose true harm rate is p* passes with probability 1 - β.

    Raises:
        InputError: not even h = 0 passes: n is too small for this limit.
    """
    check_delta(miss_probability, "miss_probability")
    if clopper_pearson_upper(0, n, delta) > limit:
        needed = max(n + 1, math.floor(math.log(delta) / math.log1p(-limit)))
        while clopper_pearson_upper(0, needed, delta) > limit:
            needed += 1
        raise InputError(
            f"a harm rate <= {limit} at delta {delta} cannot be shown with {n} safety prompts, "
            f"even if none is harmful; at least {needed} are needed"
        )
    low, high = 0, n  # passes at low, fails at high: bisection for the largest h that passes
    while high - low > 1:
        middle = (low + high) // 2
        if clopper_pearson_upper(middle, n, delta) <= limit:
            low = middle
        else:
            high = middle
    return float(special.betaincinv(low + 1, n - low, miss_probability))


def pairwise_spread(costs: ArrayLike, keys: Sequence[str]) -> Floats:
    """v_i = mean over j of other prompts of (c_i - c_j)², so that mean(v) / 2 is the variance.

    Args:
        costs: (B,).
        keys: B prompt keys; responses to one prompt are not compared with each other.

    Raises:
        InputError: fewer than two different prompts.
    """
    c = np.asarray(costs, dtype=np.float64)
    if len(set(keys)) < 2:
        raise InputError("a rollout needs at least 2 different prompts to know its cost variance")
    k = np.asarray(keys)
    other = k[:, None] != k[None, :]
    squares = (c[:, None] - c[None, :]) ** 2 * other
    return np.asarray(squares.sum(axis=1) / other.sum(axis=1))


def pessimistic_costs(costs: ArrayLike, spread: ArrayLike, pessimism: float, std: float) -> Floats:
    """c̃_i = c_i + pessimism · v_i / (2 σ̄), all (B,).

    Its mean is μ̂ + pessimism · s²/σ̄, and E[c̃ ∇log π] = ∇(μ + pessimism · σ) where σ̄ is the
    true σ: the derivative of σ = √variance is that of the variance over 2σ, and v_i is the
    contribution of response i to twice the variance, counted once as i and once as j.
    """
    return np.asarray(costs, dtype=np.float64) + pessimism * np.asarray(spread) / (2 * std)


def violation(mean: float, std: float, pessimism: float, target: float) -> float:
    """g = (μ̂ + pessimism · σ̄ - τ) / σ̄: what the multiplier sees; positive = violated.

    σ̄ is the running value, not this batch's: dividing by the batch's own standard deviation
    moves the fixed point above τ where harm is rare.
    """
    return (mean + pessimism * std - target) / std


@dataclass
class RunningVariance:
    """σ̄²: exponential mean of the sample variances of earlier rollouts, floored.

    The first rollout has none before it and uses its own variance. State is two plain floats, to
    be checkpointed.
    """

    floor: float
    decay: float = 0.9
    mean: float = 0.0
    weight: float = 0.0

    def std(self, current: float) -> float:
        """σ̄ for a rollout whose own sample variance is `current`."""
        variance = self.mean / self.weight if self.weight > 0 else current
        return max(math.sqrt(variance), self.floor)

    def update(self, current: float) -> None:
        self.mean = self.decay * self.mean + (1 - self.decay) * current
        self.weight = self.decay * self.weight + (1 - self.decay)
