"""The bounds as objects that a constraint holds and YAML swaps by class_path. No torch.

Each names its class, what it assumes and what it needs. A method has options but no range: the
range of the cost is a fact about the cost function and comes from the constraint.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike

from hcrlhf.betting import (
    Strategy,
    betting_upper,
    log_wealth,
    portfolio_path,
    portfolio_running_upper,
)
from hcrlhf.bounds import (
    clopper_pearson_upper,
    empirical_bernstein_upper,
    hall_t_upper,
    hoeffding_bentkus_upper,
    hoeffding_upper,
    student_t_factor,
    student_t_upper,
)
from hcrlhf.errors import InputError
from hcrlhf.samples import Floats, finite_sample, has_spread

Kind = Literal["exact", "asymptotic"]
MEANS = ("mean", "cvar")


@dataclass(frozen=True)
class Range:
    """Where the averaged values can lie, as declared; None = not declared."""

    lower: float | None = None
    upper: float | None = None


class Bound(ABC):
    """How the safety test bounds the mean of `values` (n,), one per prompt, in committed order."""

    name: ClassVar[str]
    kind: ClassVar[Kind]
    assumptions: ClassVar[str]
    estimands: ClassVar[tuple[str, ...]]
    needs: ClassVar[tuple[str, ...]] = ()  # of "lower", "upper"
    anytime: ClassVar[bool] = False  # holds at every stopping time

    @property
    def reads_in_order(self) -> bool:
        """Whether the values' order matters, which then must not depend on the values."""
        return self.anytime

    @abstractmethod
    def upper(self, values: ArrayLike, delta: float, within: Range) -> float:
        """The upper confidence bound U."""

    def log_e_value(
        self, values: ArrayLike, threshold: float, delta: float, within: Range
    ) -> float | None:
        """ln of the evidence against "threshold or more", where the bound is one by betting."""
        return None

    def passes(self, values: ArrayLike, threshold: float, delta: float, within: Range) -> bool:
        """The decision: U <= threshold; where there is evidence, that it has reached 1/δ."""
        evidence = self.log_e_value(values, threshold, delta, within)
        if evidence is None:
            return self.upper(values, delta, within) <= threshold
        return evidence >= -math.log(delta)

    def forecast(self, values: ArrayLike, n: int, delta: float, within: Range) -> float:
        """The bound that n fresh prompts would give if their values were spread like these.

        The median over 25 samples of n, drawn with replacement.
        """
        return float(np.median([self.upper(s, delta, within) for s in resamples(values, n, 25)]))

    def missing(self, within: Range) -> list[str]:
        """What the bound needs to know of the range and is not declared."""
        return [name for name in self.needs if getattr(within, name) is None]


def resamples(values: ArrayLike, n: int, count: int) -> list[Floats]:
    """`count` samples of n values, drawn with replacement; the same ones on each call."""
    x = finite_sample(values)
    generator = np.random.default_rng(0)
    return [x[generator.integers(x.size, size=n)] for _ in range(count)]


def _ends(within: Range) -> tuple[float, float]:
    assert within.lower is not None and within.upper is not None  # `missing` was asked before
    return within.lower, within.upper


@dataclass(frozen=True)
class StudentT(Bound):
    """`student_t_upper`: the paper's bound. Rare severe harm breaks it."""

    name: ClassVar[str] = "student_t"
    kind: ClassVar[Kind] = "asymptotic"
    assumptions: ClassVar[str] = "independent prompts, nearly normal mean cost"
    estimands: ClassVar[tuple[str, ...]] = MEANS

    def upper(self, values: ArrayLike, delta: float, within: Range) -> float:
        return student_t_upper(values, delta)

    def forecast(self, values: ArrayLike, n: int, delta: float, within: Range) -> float:
        """x̄ + s · t_{1-δ, n-1} / √n, s from these values and n from the safety set."""
        x = finite_sample(values)
        if not has_spread(x):
            return math.inf  # as the test itself would say, also of a single value
        return float(x.mean() + x.std(ddof=1) * student_t_factor(n, delta))


@dataclass(frozen=True)
class HallT(Bound):
    """`hall_t_upper`: Student-t corrected for skewness, for costs without a cap."""

    name: ClassVar[str] = "hall_t"
    kind: ClassVar[Kind] = "asymptotic"
    assumptions: ClassVar[str] = "independent prompts, a cost with a third moment, no lattice"
    estimands: ClassVar[tuple[str, ...]] = MEANS

    def upper(self, values: ArrayLike, delta: float, within: Range) -> float:
        return hall_t_upper(values, delta)


@dataclass(frozen=True)
class Hoeffding(Bound):
    """`hoeffding_upper`."""

    name: ClassVar[str] = "hoeffding"
    kind: ClassVar[Kind] = "exact"
    assumptions: ClassVar[str] = "independent prompts, costs within the declared range"
    estimands: ClassVar[tuple[str, ...]] = ("mean", "cvar", "harm_rate")
    needs: ClassVar[tuple[str, ...]] = ("lower", "upper")

    def upper(self, values: ArrayLike, delta: float, within: Range) -> float:
        return hoeffding_upper(values, delta, *_ends(within))


@dataclass(frozen=True)
class EmpiricalBernstein(Bound):
    """`empirical_bernstein_upper`."""

    name: ClassVar[str] = "empirical_bernstein"
    kind: ClassVar[Kind] = "exact"
    assumptions: ClassVar[str] = "independent prompts, costs within the declared range"
    estimands: ClassVar[tuple[str, ...]] = ("mean", "cvar", "harm_rate")
    needs: ClassVar[tuple[str, ...]] = ("lower", "upper")

    def upper(self, values: ArrayLike, delta: float, within: Range) -> float:
        return empirical_bernstein_upper(values, delta, *_ends(within))


@dataclass(frozen=True)
class HoeffdingBentkus(Bound):
    """`hoeffding_bentkus_upper`."""

    name: ClassVar[str] = "hoeffding_bentkus"
    kind: ClassVar[Kind] = "exact"
    assumptions: ClassVar[str] = "independent prompts, costs within the declared range"
    estimands: ClassVar[tuple[str, ...]] = ("mean", "cvar", "harm_rate")
    needs: ClassVar[tuple[str, ...]] = ("lower", "upper")

    def upper(self, values: ArrayLike, delta: float, within: Range) -> float:
        return hoeffding_bentkus_upper(values, delta, *_ends(within))


@dataclass(frozen=True)
class Betting(Bound):
    """`betting_upper`: the exact bound to take where the cost has a cap.

    Args:
        strategy: "star" (default), "wsr", or "portfolio", whose wealth does not depend on the
            order of the prompts.
        c: star and wsr never stake more than this share of the wealth.
    """

    strategy: Strategy = "star"
    c: float = 0.75

    name: ClassVar[str] = "betting"
    kind: ClassVar[Kind] = "exact"
    assumptions: ClassVar[str] = "independent prompts, costs at most the declared cap"
    estimands: ClassVar[tuple[str, ...]] = ("mean", "cvar", "harm_rate")

    def __post_init__(self) -> None:
        if self.strategy not in ("star", "wsr", "portfolio"):
            raise InputError(f"strategy is star, wsr or portfolio, got {self.strategy!r}")
        if not 0 < self.c < 1:
            raise InputError(f"c is the largest share of the wealth to stake, got {self.c}")

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("upper",) if self.strategy == "portfolio" else ("lower", "upper")

    @property
    def reads_in_order(self) -> bool:
        return self.strategy != "portfolio"

    def upper(self, values: ArrayLike, delta: float, within: Range) -> float:
        assert within.upper is not None
        return betting_upper(
            values,
            delta,
            upper=within.upper,
            lower=within.lower,
            strategy=self.strategy,
            c=self.c,
        )

    def log_e_value(
        self, values: ArrayLike, threshold: float, delta: float, within: Range
    ) -> float | None:
        assert within.upper is not None
        return log_wealth(
            values,
            threshold,
            delta,
            upper=within.upper,
            lower=within.lower,
            strategy=self.strategy,
            c=self.c,
        )


@dataclass(frozen=True)
class EProcess(Bound):
    """The portfolio's wealth on the way: may be looked at after every prompt, and continued.

    Decides by the largest wealth so far, reports the smallest U so far.
    """

    name: ClassVar[str] = "portfolio_e_process"
    kind: ClassVar[Kind] = "exact"
    assumptions: ClassVar[str] = "independent prompts, costs at most the declared cap"
    estimands: ClassVar[tuple[str, ...]] = ("mean", "cvar", "harm_rate")
    needs: ClassVar[tuple[str, ...]] = ("upper",)
    anytime: ClassVar[bool] = True

    def upper(self, values: ArrayLike, delta: float, within: Range) -> float:
        assert within.upper is not None
        return portfolio_running_upper(values, delta, within.upper)

    def log_e_value(
        self, values: ArrayLike, threshold: float, delta: float, within: Range
    ) -> float | None:
        assert within.upper is not None
        return float(portfolio_path(values, threshold, within.upper).max())


@dataclass(frozen=True)
class ClopperPearson(Bound):
    """`clopper_pearson_upper` on a rate: every value is 0 or 1."""

    name: ClassVar[str] = "clopper_pearson"
    kind: ClassVar[Kind] = "exact"
    assumptions: ClassVar[str] = "independent prompts"
    estimands: ClassVar[tuple[str, ...]] = ("harm_rate",)

    def upper(self, values: ArrayLike, delta: float, within: Range) -> float:
        x = finite_sample(values)
        if not np.isin(x, (0.0, 1.0)).all():
            raise InputError("Clopper-Pearson bounds a rate and needs values 0 or 1")
        return clopper_pearson_upper(int(x.sum()), x.size, delta)

    def forecast(self, values: ArrayLike, n: int, delta: float, within: Range) -> float:
        """The bound at the same rate of harm among n prompts, rounded up to a whole number."""
        x = finite_sample(values)
        return clopper_pearson_upper(-(-int(x.sum()) * n // x.size), n, delta)


METHODS: dict[str, type[Bound]] = {
    cls.name: cls
    for cls in (
        *(StudentT, HallT, Hoeffding, EmpiricalBernstein, HoeffdingBentkus, Betting),
        *(EProcess, ClopperPearson),
    )
}


def method(name: str, options: dict[str, object] | None = None) -> Bound:
    """The bound of that name, as `Constraint.describe` wrote it.

    Raises:
        InputError: no such bound, or options that it does not have.
    """
    if name not in METHODS:
        raise InputError(f"no bound {name!r}; expected one of {', '.join(METHODS)}")
    try:
        return METHODS[name](**(options or {}))
    except TypeError as error:
        raise InputError(f"the bound {name} does not take these options: {options}") from error
