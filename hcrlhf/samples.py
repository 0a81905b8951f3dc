"""What every bound does first and last: check its costs, find the smallest rejected mean."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hcrlhf.errors import InputError

Floats = NDArray[np.float64]


def check_delta(delta: float, name: str = "delta") -> float:
    if not 0 < delta < 1:
        raise InputError(f"{name} is a probability of error and lies in (0, 1), got {delta}")
    return float(delta)


def finite_sample(costs: ArrayLike, at_least: int = 1, name: str = "costs") -> Floats:
    """The costs (or what `name` says) as a float64 vector.

    Raises:
        InputError: not a vector, fewer than `at_least`, or with a value that is not finite.
    """
    x = np.asarray(costs, dtype=np.float64)
    if x.ndim != 1 or x.size == 0:
        raise InputError(f"a bound needs a vector of {name}, one per prompt, got shape {x.shape}")
    if x.size < at_least:
        raise InputError(f"this bound needs at least {at_least} {name}, got {x.size}")
    if not np.isfinite(x).all():
        raise InputError(f"{int((~np.isfinite(x)).sum())} of {x.size} {name} are not finite")
    return x


def has_spread(x: Floats) -> bool:
    """Whether the values differ by more than rounding; without that a t statistic says nothing."""
    return bool(x.max() - x.min() > 1e-12 * np.abs(x).max())


def check_cap(x: Floats, upper: float) -> None:
    """
    Raises:
        InputError: the cap is not finite, or a cost lies above it.
    """
    if not math.isfinite(upper):
        raise InputError(f"the cap of the cost is a finite number, got {upper}")
    if x.max() > upper:
        raise InputError(
            f"a cost of {x.max():g} lies above the declared cap {upper:g}: the cap is not a fact "
            "of this cost function, so no bound that rests on it holds; costs are never clipped"
        )


def check_range(x: Floats, lower: float, upper: float) -> None:
    """
    Raises:
        InputError: not lower < upper, or a cost outside [lower, upper].
    """
    check_cap(x, upper)
    if not (math.isfinite(lower) and lower < upper):
        raise InputError(f"expected a range lower < upper, got [{lower}, {upper}]")
    check_floor(x, lower)


def check_floor(x: Floats, lower: float) -> None:
    """
    Raises:
        InputError: a cost lies below the lower end of the range.
    """
    if x.min() < lower:
        raise InputError(
            f"a cost of {x.min():g} lies below the declared lower end {lower:g}: the range is not "
            "a fact of this cost function"
        )


def smallest_rejected(rejected: Callable[[float], bool], low: float, high: float) -> float:
    """sup of the means in [low, high] that are not rejected, from above; `high` if none is.

    Args:
        rejected: false, then true, as the mean grows.

    The last bracket is 2^-40 of the first: what is returned was rejected itself.
    """
    for _ in range(40):
        middle = 0.5 * (low + high)
        if rejected(middle):
            high = middle
        else:
            low = middle
    return high
