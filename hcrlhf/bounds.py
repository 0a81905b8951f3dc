"""Upper confidence bounds U with P(U < true mean) <= δ over the draw of the sample. No torch.

x_1..x_n are costs, one per prompt, float64. `exact`: holds at every n for every distribution that
meets the assumption. `asymptotic`: only as n grows; for rare severe harm it can err far more often
than δ, and so must never be called a guarantee without that word.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from hcrlhf.errors import InputError

Floats = NDArray[np.float64]


def check_delta(delta: float, name: str = "delta") -> float:
    if not 0 < delta < 1:
        raise InputError(f"{name} is a probability of error and lies in (0, 1), got {delta}")
    return float(delta)


def finite_sample(costs: ArrayLike) -> Floats:
    """The costs as a float64 vector.

    Raises:
        InputError: not a vector, empty, or with a value that is not finite.
    """
    x = np.asarray(costs, dtype=np.float64)
    if x.ndim != 1 or x.size == 0:
        raise InputError(f"a bound needs a vector of costs, one per prompt, got shape {x.shape}")
    if not np.isfinite(x).all():
        raise InputError(f"{int((~np.isfinite(x)).sum())} of {x.size} costs are not finite")
    return x


def student_t_factor(n: int, delta: float) -> float:
    """t_{1-δ, n-1} / √n: how many standard deviations the bound lies above the mean."""
    if n < 2:
        raise InputError(f"Student-t needs at least 2 costs, got {n}")
    return float(stats.t.ppf(1 - check_delta(delta), n - 1)) / math.sqrt(n)


def student_t_upper(costs: ArrayLike, delta: float) -> float:
    """x̄ + s/√n · t_{1-δ, n-1}, with s the standard deviation (ddof 1); +∞ where s = 0.

    Assumes independent costs whose mean is nearly normal; asymptotic otherwise. A sample without
    any spread says nothing about rare harm, so it never gives a finite bound.

    Student (1908); the bound of HC-RLHF (arXiv 2506.08266).
    """
    x = finite_sample(costs)
    factor = student_t_factor(x.size, delta)
    if x.min() == x.max():
        return math.inf
    return float(x.mean() + x.std(ddof=1) * factor)


def clopper_pearson_upper(harmful: int, n: int, delta: float) -> float:
    """The (1-δ) quantile of Beta(h + 1, n - h); 1 at h = n. Exact for independent 0/1 outcomes.

    Args:
        harmful: h, the number of harmful responses among n.

    Clopper and Pearson (1934).
    """
    check_delta(delta)
    if not (n >= 1 and 0 <= harmful <= n):
        raise InputError(f"expected 0 <= harmful <= n and n >= 1, got harmful={harmful}, n={n}")
    if harmful == n:
        return 1.0
    return float(stats.beta.ppf(1 - delta, harmful + 1, n - harmful))


Kind = Literal["exact", "asymptotic"]


class Bound(ABC):
    """What a constraint needs of a bound. YAML swaps bounds by class_path."""

    name: ClassVar[str]
    kind: ClassVar[Kind]
    assumptions: ClassVar[str]
    estimands: ClassVar[tuple[str, ...]]

    @abstractmethod
    def upper(self, values: ArrayLike, delta: float) -> float:
        """The bound on the mean of `values` (n,)."""

    @abstractmethod
    def forecast(self, values: ArrayLike, n: int, delta: float) -> float:
        """The bound that n fresh prompts would give if their values were spread like these."""


@dataclass(frozen=True)
class StudentT(Bound):
    """`student_t_upper` on the mean cost."""

    name: ClassVar[str] = "student_t"
    kind: ClassVar[Kind] = "asymptotic"
    assumptions: ClassVar[str] = "independent prompts, nearly normal mean cost"
    estimands: ClassVar[tuple[str, ...]] = ("mean",)

    def upper(self, values: ArrayLike, delta: float) -> float:
        return student_t_upper(values, delta)

    def forecast(self, values: ArrayLike, n: int, delta: float) -> float:
        """x̄ + s · t_{1-δ, n-1} / √n, s from these values and n from the safety set."""
        x = finite_sample(values)
        if x.min() == x.max():
            return math.inf  # as the test itself would say, also of a single value
        return float(x.mean() + x.std(ddof=1) * student_t_factor(n, delta))


@dataclass(frozen=True)
class ClopperPearson(Bound):
    """`clopper_pearson_upper` on a rate: every value is 0 or 1."""

    name: ClassVar[str] = "clopper_pearson"
    kind: ClassVar[Kind] = "exact"
    assumptions: ClassVar[str] = "independent prompts"
    estimands: ClassVar[tuple[str, ...]] = ("harm_rate",)

    def upper(self, values: ArrayLike, delta: float) -> float:
        x = finite_sample(values)
        if not np.isin(x, (0.0, 1.0)).all():
            raise InputError("Clopper-Pearson bounds a rate and needs values 0 or 1")
        return clopper_pearson_upper(int(x.sum()), x.size, delta)

    def forecast(self, values: ArrayLike, n: int, delta: float) -> float:
        """The bound at the same rate of harm among n prompts, rounded up to a whole number."""
        x = finite_sample(values)
        return clopper_pearson_upper(-(-int(x.sum()) * n // x.size), n, delta)
