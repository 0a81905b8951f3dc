"""Lagrange multipliers: how λ answers to the violation g of its constraint.

A multiplier is a rule without state: `update(λ, g)` gives the next λ. The policy module keeps one λ
per constraint, in its checkpoint. One step per rollout.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from hcrlhf.errors import InputError


class Multiplier(ABC):
    """What the policy module needs of a multiplier. YAML swaps multipliers by class_path."""

    initial: float

    @abstractmethod
    def update(self, value: float, violation: float) -> float:
        """The next λ >= 0 after a rollout with this violation g (positive = violated)."""


def _check(learning_rate: float, initial: float, maximum: float, minimum: float = 0.0) -> None:
    if not 0 <= learning_rate < math.inf:
        raise InputError(f"a multiplier's learning_rate is >= 0, got {learning_rate}")
    if not 0 <= minimum <= initial <= maximum:
        raise InputError(
            f"a multiplier needs 0 <= minimum <= initial <= maximum, "
            f"got {minimum} <= {initial} <= {maximum}"
        )


@dataclass(frozen=True)
class ProjectedMultiplier(Multiplier):
    """λ ← clip(λ + η g, 0, λ_max): projected dual ascent."""

    learning_rate: float = 0.1
    initial: float = 1.0
    maximum: float = 100.0

    def __post_init__(self) -> None:
        _check(self.learning_rate, self.initial, self.maximum)

    def update(self, value: float, violation: float) -> float:
        return min(max(value + self.learning_rate * violation, 0.0), self.maximum)


@dataclass(frozen=True)
class LogMultiplier(Multiplier):
    """log λ ← log λ + η g, kept in [λ_min, λ_max]: relative steps, always positive.

    The floor matters: without it a long feasible phase drives λ so low that it takes as long to
    come back.
    """

    learning_rate: float = 0.1
    initial: float = 1.0
    minimum: float = 0.01
    maximum: float = 100.0

    def __post_init__(self) -> None:
        if self.minimum <= 0:
            raise InputError(f"a log multiplier's minimum is positive, got {self.minimum}")
        _check(self.learning_rate, self.initial, self.maximum, self.minimum)

    def update(self, value: float, violation: float) -> float:
        # The exponent is capped before exp() so that one wild violation cannot overflow.
        step = min(max(self.learning_rate * violation, -50.0), 50.0)
        return min(max(value * math.exp(step), self.minimum), self.maximum)


@dataclass(frozen=True)
class FixedMultiplier(Multiplier):
    """λ stays what it is; 0 trains without the constraint (and still measures it)."""

    initial: float = 0.0

    def __post_init__(self) -> None:
        _check(0.0, self.initial, math.inf)

    def update(self, value: float, violation: float) -> float:
        return value
