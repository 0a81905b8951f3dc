"""Lagrange multipliers: how λ answers to the violation g of its constraint.

A multiplier is a rule without state of its own: `step(state, g)` gives the next state, whose value
is λ. The policy module keeps one state per constraint, in its checkpoint. One step per rollout.

λ is the price of one standard deviation of its constraint, in standard deviations of the reward:
both what it weighs and the violation that steers it are divided by the running σ̄
(`dual.RunningVariance`), so that one start and one rate serve constraints of any scale.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from hcrlhf.errors import InputError


@dataclass(frozen=True)
class MultiplierState:
    """λ, and what its rule remembers beside it."""

    value: float
    memory: tuple[float, ...] = ()


class Multiplier(ABC):
    """What the policy module needs of a multiplier. YAML swaps multipliers by class_path.

    Attributes:
        initial: λ before the first rollout. maximum: its cap.
    """

    initial: float
    maximum: float = math.inf

    def start(self) -> MultiplierState:
        return MultiplierState(self.initial)

    @abstractmethod
    def step(self, state: MultiplierState, violation: float) -> MultiplierState:
        """The next state, with λ >= 0, after a rollout with violation g (positive = violated)."""


class Memoryless(Multiplier):
    """A rule whose next λ follows from λ and g alone."""

    @abstractmethod
    def update(self, value: float, violation: float) -> float:
        """The next λ."""

    def step(self, state: MultiplierState, violation: float) -> MultiplierState:
        return MultiplierState(self.update(state.value, violation))


def _check(learning_rate: float, initial: float, maximum: float, minimum: float = 0.0) -> None:
    if not 0 <= learning_rate < math.inf:
        raise InputError(f"a multiplier's learning_rate is >= 0, got {learning_rate}")
    if not 0 <= minimum <= initial <= maximum:
        raise InputError(
            f"a multiplier needs 0 <= minimum <= initial <= maximum, "
            f"got {minimum} <= {initial} <= {maximum}"
        )


@dataclass(frozen=True)
class ProjectedMultiplier(Memoryless):
    """λ ← clip(λ + η g, 0, λ_max): projected dual ascent."""

    learning_rate: float = 0.1
    initial: float = 1.0
    maximum: float = 100.0

    def __post_init__(self) -> None:
        _check(self.learning_rate, self.initial, self.maximum)

    def update(self, value: float, violation: float) -> float:
        return min(max(value + self.learning_rate * violation, 0.0), self.maximum)


@dataclass(frozen=True)
class LogMultiplier(Memoryless):
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
class SoftplusMultiplier(Multiplier):
    """λ = softplus(ν), ν ← ν + η g: gradient ascent without a corner at 0.

    ν stays where softplus is below λ_max, so that a long violated phase is not remembered beyond
    the cap, and above softplus⁻¹(λ_min), so that a long feasible one is not either.
    """

    learning_rate: float = 0.1
    initial: float = 1.0
    minimum: float = 0.01
    maximum: float = 100.0

    def __post_init__(self) -> None:
        if not self.minimum > 0:
            raise InputError(f"a softplus multiplier's minimum is positive, got {self.minimum}")
        _check(self.learning_rate, self.initial, self.maximum, self.minimum)

    def start(self) -> MultiplierState:
        return MultiplierState(self.initial, (inverse_softplus(self.initial),))

    def step(self, state: MultiplierState, violation: float) -> MultiplierState:
        (place,) = state.memory
        low, high = inverse_softplus(self.minimum), inverse_softplus(self.maximum)
        place = min(max(place + self.learning_rate * violation, low), high)
        value = max(place, 0.0) + math.log1p(math.exp(-abs(place)))
        return MultiplierState(min(max(value, self.minimum), self.maximum), (place,))


def inverse_softplus(value: float) -> float:
    """ln(e^λ - 1) = λ + ln(1 - e^{-λ})."""
    return value + math.log(-math.expm1(-value))


@dataclass(frozen=True)
class PIDMultiplier(Multiplier):
    """λ = clip(I + K_P ḡ + K_D (ḡ - ḡ_before)₊, 0, λ_max), I ← clip(I + K_I g, 0, λ_max).

    The integral finds the level, the proportional part answers at once and damps the oscillation
    of a plain integrator, the derivative acts on worsening only. ḡ is an exponential mean of g. The
    integral itself is clipped, so that it never winds up beyond what λ can be.

    Args:
        proportional, integral, derivative: K_P, K_I, K_D.
        smoothing: share of the old ḡ that is kept, in [0, 1).
        initial: of the integral. maximum: λ_max.

    Stooke, Achiam, Abbeel (2020), "Responsive Safety in Reinforcement Learning by PID Lagrangian
    Methods".
    """

    proportional: float = 0.2
    integral: float = 0.05
    derivative: float = 0.0
    smoothing: float = 0.5
    initial: float = 0.3
    maximum: float = 100.0

    def __post_init__(self) -> None:
        for name in ("proportional", "integral", "derivative"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"a PID multiplier's {name} is >= 0, got {getattr(self, name)}")
        if not 0 <= self.smoothing < 1:
            raise InputError(f"smoothing lies in [0, 1), got {self.smoothing}")
        _check(self.integral, self.initial, self.maximum)

    def start(self) -> MultiplierState:
        return MultiplierState(self.initial, (self.initial,))

    def step(self, state: MultiplierState, violation: float) -> MultiplierState:
        # One wild violation must not overflow.
        g = min(max(violation, -1e6), 1e6)
        integral, *before = state.memory
        old = before[0] if before else g
        smooth = self.smoothing * old + (1 - self.smoothing) * g
        integral = min(max(integral + self.integral * g, 0.0), self.maximum)
        rise = self.derivative * max(smooth - old, 0.0)
        value = min(max(integral + self.proportional * smooth + rise, 0.0), self.maximum)
        return MultiplierState(value, (integral, smooth))


@dataclass(frozen=True)
class FixedMultiplier(Memoryless):
    """λ stays what it is; 0 trains without the constraint (and still measures it)."""

    initial: float = 0.0

    def __post_init__(self) -> None:
        _check(0.0, self.initial, math.inf)

    def update(self, value: float, violation: float) -> float:
        return value
