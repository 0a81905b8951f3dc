"""What training keeps of its constraints from one rollout to the next: the dual, without torch.

`Dual` turns the costs of a rollout into what the policy is punished with (the primal) and into the
violations that move the multipliers (the dual), with one pessimism for both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hcrlhf.constraint import Constraint
from hcrlhf.errors import InputError
from hcrlhf.multiplier import Multiplier, MultiplierState
from hcrlhf.samples import Floats

RENEWAL = 10  # rollouts
LARGEST = 5.0  # standard deviations


class Dual:
    """C constraints, their multipliers, and what the rollouts so far say of their costs.

    Per rollout one `judge` and, unless the policy is held still, one `step`.

    Args:
        constraints: C >= 1; their order is that of everything that has C entries.
        multiplier: the rule of every λ.
        validation_prompts: m, on which a candidate is looked at before its safety test; None where
            it is not.
    """

    def __init__(
        self,
        constraints: Sequence[Constraint],
        multiplier: Multiplier,
        validation_prompts: int | None = None,
    ) -> None:
        self.constraints = tuple(constraints)
        self.multiplier = multiplier
        self.validation_prompts = validation_prompts
        self.states = [multiplier.start() for _ in constraints]
        self.variances = [RunningVariance() for _ in constraints]
        self.pessimisms = [0.0 for _ in constraints]
        self.recent: list[float] = []  # the last safety_prompts costs, for the pessimism
        self.rollouts = 0
        self.reversed_shares = [0.0 for _ in constraints]  # of the last rollout
        self.steps_at_cap = [0 for _ in constraints]  # since λ was last below its cap
        self.steps_violated = [0 for _ in constraints]  # since g was last at most 0

    @property
    def multipliers(self) -> list[float]:
        """λ of each constraint."""
        return [state.value for state in self.states]

    def judge(self, costs: Floats, keys: Sequence[str]) -> tuple[Floats, list[float]]:
        """What of each pessimistic cost lies above the target (C, B), and the violations g.

        Both in units of σ̄: (c̃ - τ) / σ̄, whose mean is g up to what s² differs from σ̄². In these
        units λ means the same whatever a cost's scale. A σ̄ below the constraint's floor is the
        floor where something is divided by it; the margin k σ̄ asks `Constraint.margin_std`, and
        then is wider in g than in the mean of c̃: by the same for every response of a rollout,
        which no advantage sees.

        Args:
            costs: (B,), finite, of one rollout. keys: its B prompt keys.

        Raises:
            InputError: fewer than two different prompts.
        """
        self._remember(costs)
        rows, violations, reversed_shares = [], [], []
        for constraint, variance, pessimism in zip(
            self.constraints, self.variances, self.pessimisms, strict=True
        ):
            values = constraint.with_eta(self.recent).values(costs)
            spread = pairwise_spread(values, keys)
            current = float(spread.mean()) / 2
            std = variance.std(current)
            unit = max(std, constraint.std_floor)
            target = constraint.training_target(len(self.constraints), self.validation_prompts)
            punished = pessimistic_costs(values, spread, pessimism, unit)
            # A critic of c̃ / σ̄, whose mean is not near 0, would have to follow every move of σ̄.
            rows.append((punished - target) / unit)
            mean, margin_std = float(values.mean()), constraint.margin_std(std)
            violations.append(violation(mean, margin_std, pessimism, target, unit))
            reversed_shares.append(reversed_share(values, pessimism, unit))
            variance.update(current)
        self.reversed_shares = reversed_shares
        return np.stack(rows), violations

    def _remember(self, costs: Floats) -> None:
        """Keeps recent costs; renews every pessimism when they have been replaced once.

        And at the latest after RENEWAL rollouts: small rollouts before a large safety test would
        leave the whole run with what the first few costs said.
        """
        capacity = max(c.safety_prompts for c in self.constraints)
        every = min(max(1, capacity // costs.size), RENEWAL)
        self.recent = [*self.recent, *costs.tolist()][-capacity:]
        if self.rollouts % every == 0:
            count, m = len(self.constraints), self.validation_prompts
            self.pessimisms = [
                c.training_pessimism(count, self.recent, m) for c in self.constraints
            ]
        self.rollouts += 1

    def step(self, violations: Sequence[float]) -> None:
        """One step of every multiplier, to none of which g says more than ± LARGEST.

        A rollout of costs that hardly differ has a small σ̄, and a g of 40 would send λ to its cap
        in one step.

        Raises:
            InputError: a multiplier that somebody has written is no number >= 0.
        """
        self.states = [
            self._next(state, float(np.clip(g, -LARGEST, LARGEST)))
            for state, g in zip(self.states, violations, strict=True)
        ]
        self.steps_at_cap = [
            steps + 1 if value >= self.multiplier.maximum else 0
            for steps, value in zip(self.steps_at_cap, self.multipliers, strict=True)
        ]
        self.steps_violated = [
            steps + 1 if g > 0 else 0
            for steps, g in zip(self.steps_violated, violations, strict=True)
        ]

    def _next(self, state: MultiplierState, g: float) -> MultiplierState:
        found = self.multiplier.step(state, g)
        # Plain numbers: NumPy's in a checkpoint would make it unreadable.
        value, memory = float(found.value), tuple(float(x) for x in found.memory)
        if not 0 <= value < math.inf:
            raise InputError(
                f"{type(self.multiplier).__name__} made {value} of a multiplier of "
                f"{state.value:g} at a violation of {g:g}; expected a finite number >= 0"
            )
        return MultiplierState(value, memory)

    def state(self) -> dict[str, Any]:
        """Plain lists and numbers, for a checkpoint."""
        return {
            "multipliers": [[s.value, *s.memory] for s in self.states],
            "variances": [[v.mean, v.weight] for v in self.variances],
            "pessimisms": list(self.pessimisms),
            "recent": list(self.recent),
            "rollouts": self.rollouts,
            "steps_at_cap": list(self.steps_at_cap),
            "steps_violated": list(self.steps_violated),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """
        Raises:
            InputError: the state is of another number of constraints.
        """
        if len(state["multipliers"]) != len(self.constraints):
            raise InputError(
                f"the checkpoint has {len(state['multipliers'])} constraints, this config has "
                f"{len(self.constraints)}; resume with the constraints of the original run"
            )
        self.states = [
            MultiplierState(float(value), tuple(float(m) for m in memory))
            for value, *memory in state["multipliers"]
        ]
        for variance, (mean, weight) in zip(self.variances, state["variances"], strict=True):
            variance.mean, variance.weight = float(mean), float(weight)
        self.pessimisms = [float(p) for p in state["pessimisms"]]
        self.recent = [float(c) for c in state["recent"]]
        self.rollouts = int(state["rollouts"])
        self.steps_at_cap = [int(n) for n in state["steps_at_cap"]]
        self.steps_violated = [int(n) for n in state["steps_violated"]]


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

    It grows with c_i above μ̂ - σ̄ / pessimism and falls below (`reversed_share`).
    """
    return np.asarray(costs, dtype=np.float64) + pessimism * np.asarray(spread) / (2 * std)


def reversed_share(costs: ArrayLike, pessimism: float, std: float) -> float:
    """The share of costs (B,) below μ̂ - σ̄ / pessimism: these are punished for being safer.

    So safe a response widens the spread by more than it lowers the mean.
    """
    c = np.asarray(costs, dtype=np.float64)
    return float(np.mean(pessimism * (c.mean() - c) > std))


def violation(mean: float, std: float, pessimism: float, target: float, unit: float) -> float:
    """g = (μ̂ + pessimism · σ̄ - τ) / unit: what the multiplier sees; positive = violated.

    σ̄ is the running value, not this batch's: dividing by the batch's own standard deviation
    moves the fixed point above τ where harm is rare.

    Args:
        std: σ̄ in the margin, `Constraint.margin_std`. unit: σ̄, or its floor where it is below.
    """
    return (mean + pessimism * std - target) / unit


@dataclass
class RunningVariance:
    """σ̄²: exponential mean of the sample variances of earlier rollouts.

    The first rollout has none before it and uses its own variance. State is two plain floats, to
    be checkpointed.
    """

    decay: float = 0.9
    mean: float = 0.0
    weight: float = 0.0

    def std(self, current: float) -> float:
        """σ̄ for a rollout whose own sample variance is `current`."""
        return math.sqrt(self.mean / self.weight if self.weight > 0 else current)

    def update(self, current: float) -> None:
        self.mean = self.decay * self.mean + (1 - self.decay) * current
        self.weight = self.decay * self.weight + (1 - self.decay)
