"""What the safety test, a training module and a data module know of one another. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from hcrlhf.constraint import Constraint
from hcrlhf.examples import Prompt
from hcrlhf.samples import Floats


@dataclass(frozen=True)
class CostSamples:
    """Costs of sampled responses, for the safety test.

    Attributes:
        keys: n prompt keys, in the order of the rows.
        costs: (n, K, C) float64, K responses per prompt, C constraints.
        responses: n lists of K texts.
        truncated: (n, K), True where a response reached the length limit.
    """

    keys: tuple[str, ...]
    costs: Floats
    responses: tuple[tuple[str, ...], ...]
    truncated: np.ndarray[Any, np.dtype[np.bool_]]

    @staticmethod
    def join(parts: Sequence[CostSamples]) -> CostSamples:
        return CostSamples(
            tuple(key for part in parts for key in part.keys),
            np.concatenate([part.costs for part in parts]),
            tuple(texts for part in parts for texts in part.responses),
            np.concatenate([part.truncated for part in parts]),
        )


@runtime_checkable
class SafetyTestable(Protocol):
    """What the safety test needs of a module: draw, score, say what was promised, ship."""

    constraints: tuple[Constraint, ...]
    updates: int  # done so far

    @property
    def training_costs(self) -> Sequence[float]:
        """Of the last rollouts of training, oldest first; none where there was no training."""

    def sample_costs(self, batch: Any, seed: str) -> CostSamples:
        """One response per prompt of the batch, seeded by `seed` and the prompt's key."""

    def completed(self, constraints: Sequence[Constraint]) -> tuple[Constraint, ...]:
        """The constraints with what the cost model knows of its range."""

    def save_policy(self, folder: Any) -> None:
        """Writes the policy for use; the same bytes whenever it is called."""

    def provenance(self) -> dict[str, Any]:
        """Hashes and settings that the plan of a safety test commits to."""

    def training_prompt_keys(self) -> frozenset[str]:
        """Keys (first 32 hex digits) of every prompt that an earlier stage was trained on."""

    @property
    def checkpoint_prompts(self) -> frozenset[str]:
        """Keys of what the policy of a loaded checkpoint has seen; of these a plan says nothing, so
        that `test` finds the plan that `fit` began."""


@runtime_checkable
class OffersCandidates(Protocol):
    """What choosing a candidate among the policies of a run needs of a module."""

    constraints: tuple[Constraint, ...]

    @property
    def training_costs(self) -> Sequence[float]:
        """As `SafetyTestable`."""

    def answers(self, batch: Any, purpose: str) -> list[dict[str, Any]]:
        """A record with reward and cost per prompt; `purpose` names the random numbers."""

    def policy_state(self) -> dict[str, Any]:
        """A copy of the policy's weights, by name."""

    def load_policy_state(self, state: dict[str, Any], update: int) -> None:
        """Makes those weights the policy; `update` is the one after which they were copied."""


@runtime_checkable
class HoldsSafetyPrompts(Protocol):
    """What the safety test needs of a data module."""

    updates: int  # of the whole run

    @property
    def safety_prompts(self) -> list[Prompt] | None:
        """The pool to draw from; None where the config names no safety file."""

    @property
    def validation_prompts(self) -> list[Prompt]:
        """Prompts on which a candidate is judged before the safety set is touched."""

    @property
    def safety_source(self) -> str:
        """Where the pool comes from, for people."""

    @property
    def training_keys(self) -> frozenset[str]:
        """Keys of the prompts that training or validation uses."""
