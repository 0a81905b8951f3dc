"""What the policy module needs of a learner. YAML swaps learners by class_path."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from hcrlhf.rollouts import Rollout


@dataclass(frozen=True)
class Targets:
    """What one rollout's minibatch steps aim at.

    Attributes:
        advantages: (B, T).
        returns: (S, B, T), what the critics are to predict.
    """

    advantages: Tensor
    returns: Tensor

    def rows(self, index: Tensor) -> Targets:
        return Targets(self.advantages[index], self.returns[:, index])


@dataclass(frozen=True)
class UpdateStatistics:
    """Sums over response tokens: the k3 estimate of KL(old ‖ new), and clipped ratios."""

    kl: Tensor
    clipped: Tensor


class Learner(ABC):
    """From a rollout and its scores to the losses of minibatch steps; no state of its own.

    Attributes:
        critic: whether value heads share the actor's hidden states, have adapters of their own, or
            are not there.
        samples_per_prompt: K, responses to every prompt of a rollout.
        epochs, minibatches: passes over a rollout and optimizer steps per pass.
        value_coefficient: weight of the critics' loss.
        target_kl: no further epoch once the mean KL of old to new policy exceeds this.
    """

    critic: Literal["shared", "separate", "none"]
    samples_per_prompt: int = 1
    epochs: int
    minibatches: int
    value_coefficient: float
    target_kl: float | None

    @abstractmethod
    def targets(
        self,
        rollout: Rollout,
        scores: Tensor,
        multipliers: Sequence[float],
        kl_coefficient: float,
    ) -> Targets:
        """Advantages and returns of scores (S, B): the reward, then the costs of `Dual.judge`.

        Both are in units of a standard deviation that is not this rollout's: the reward in that of
        its scorer's moments, a cost in the running one of its constraint.
        """

    @abstractmethod
    def policy_loss(self, log_probs: Tensor, rollout: Rollout, targets: Targets) -> Tensor:
        """Summed over response tokens; log_probs (B, T) with gradient."""

    @abstractmethod
    def value_loss(self, values: Tensor, rollout: Rollout, targets: Targets, stream: int) -> Tensor:
        """Of one stream's critic, summed over response tokens; values (B, T) with gradient."""

    @abstractmethod
    def update_statistics(self, log_probs: Tensor, rollout: Rollout) -> UpdateStatistics:
        """How far the policy has moved from the one that sampled."""
