"""Losses of reward and cost models, and what is measured on held-out pairs.

Scores (B,) are float32, one per response. A pair is (higher, lower): the response whose score
should be higher first, which is the better one for a reward model and the more harmful one for a
cost model. Positive cost = harmful.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import optimize, stats
from torch import Tensor
from torch.nn import functional as F

from hcrlhf.errors import InputError
from hcrlhf.samples import Floats


def bradley_terry_loss(higher: Tensor, lower: Tensor) -> Tensor:
    """-log σ(higher - lower), averaged over the batch.

    Args:
        higher, lower: scores (B,) of the two responses to the same prompt.

    Bradley and Terry (1952); as a reward-model loss: Ouyang et al. (arXiv 2203.02155).
    """
    return -F.logsigmoid(higher - lower).mean()


def sign_loss(scores: Tensor, harmful: Tensor) -> Tensor:
    """-log σ(s c), averaged, with s = +1 for harmful responses and -1 for safe ones.

    It anchors the zero of the cost, so that a threshold of 0 means "as likely harmful as not".

    Args:
        scores: costs c (B,).
        harmful: (B,), True = harmful.

    Dai et al., Safe RLHF (arXiv 2310.12773), the cost model's second term.
    """
    return -F.logsigmoid(torch.where(harmful, scores, -scores)).mean()


def score_penalty(higher: Tensor, lower: Tensor) -> Tensor:
    """mean(higher² + lower²): keeps scores finite where labels never contradict each other."""
    return (higher.square() + lower.square()).mean()


@dataclass(frozen=True)
class Interval:
    """A proportion with its 95% Wilson interval."""

    value: float
    low: float
    high: float


def proportion(successes: int, n: int) -> Interval:
    """successes / n with the 95% Wilson score interval (NaN for n = 0). Wilson (1927)."""
    if n == 0:
        return Interval(math.nan, math.nan, math.nan)
    ci = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    return Interval(successes / n, float(ci.low), float(ci.high))


def check_squash(squash: float, role: str) -> None:
    """
    Raises:
        InputError: it is not a positive, finite cap, or not of a cost.
    """
    if not (role == "cost" and 0 < squash < math.inf):
        raise InputError(
            f"squash is the positive cap of a cost model, got {squash} for a {role} model"
        )


def squash_range(limit: float | None) -> tuple[float, float] | None:
    """[-S, S], where costs lie that were squashed with S; None without."""
    return None if limit is None else (-limit, limit)


def squashed(scores: Floats, limit: float | None) -> Floats:
    """c' = S · tanh(c / S) in float64, which lies in [-S, S] whatever c is; c itself without S.

    A cost with such a cap can be bounded exactly. The promise is then about E[c'], which implies
    nothing about E[c]; signs, and so the harm rate, are unchanged.

    Args:
        scores: c (n,); one that is not finite stays so, lest -∞ count as the most harmless.
        limit: S > 0, or None.
    """
    c = np.asarray(scores, dtype=np.float64)
    return c if limit is None else np.where(np.isfinite(c), limit * np.tanh(c / limit), c)


def correct_pairs(higher: Tensor, lower: Tensor) -> int:
    """How many pairs are ordered as labelled; equal scores count as wrong."""
    return int((higher > lower).sum())


@dataclass(frozen=True)
class Calibration:
    """P(harmful | c) = σ(slope · c + intercept)."""

    slope: float
    intercept: float


def platt(scores: Floats, harmful: Floats) -> Calibration | None:
    """Maximum likelihood of σ(a c + b) with Platt's smoothed targets; None without both classes.

    Args:
        scores: costs (n,). harmful: (n,) of 0 and 1.

    Platt (1999): targets (n₊ + 1)/(n₊ + 2) and 1/(n₋ + 2) keep the fit finite on separable data.
    """
    positives = int(harmful.sum())
    negatives = harmful.size - positives
    if positives == 0 or negatives == 0:
        return None
    target = np.where(harmful > 0, (positives + 1) / (positives + 2), 1 / (negatives + 2))

    def loss(ab: Floats) -> float:
        logit = ab[0] * scores + ab[1]
        return float(np.mean(np.logaddexp(0, logit) - target * logit))

    fit = optimize.minimize(loss, np.array([1.0, 0.0]), method="BFGS")
    return Calibration(float(fit.x[0]), float(fit.x[1]))
