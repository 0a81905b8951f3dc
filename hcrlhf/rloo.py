"""RLOO: REINFORCE with K samples per prompt, each the others' baseline. No critics.

Streams as in ppo.py: index 0 the reward, index 1 + j by how much constraint j's pessimistic cost
exceeds its target. The target cancels, as every constant does, in the baseline.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hcrlhf.errors import InputError
from hcrlhf.learner import Targets
from hcrlhf.ppo import ClippedPolicy, lagrangian_advantage
from hcrlhf.rollouts import Rollout


def leave_one_out(returns: Tensor, keys: Sequence[str]) -> Tensor:
    """G_i - mean of G over the other responses to the same prompt, (B,).

    Args:
        returns: G (B,). keys: B prompt keys.

    Raises:
        InputError: a prompt with a single response has nothing to be compared with.

    Kool, van Hoof, Welling (2019); for RLHF: Ahmadian et al. (arXiv 2402.14740).
    """
    index = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    group = torch.tensor([index[key] for key in keys], device=returns.device)
    count = torch.bincount(group, minlength=len(index))
    if bool((count < 2).any()):
        raise InputError("leave-one-out needs at least 2 responses to every prompt of a rollout")
    total = torch.zeros(len(index), dtype=returns.dtype, device=returns.device)
    total = total.index_add(0, group, returns)
    others = (total[group] - returns) / (count[group] - 1)
    return returns - others


@dataclass(frozen=True)
class RLOO(ClippedPolicy):
    """REINFORCE with a leave-one-out baseline; the algorithm of HC-RLHF (arXiv 2506.08266).

    G_i = (r_i - Σ_j λ_j c̃_ij) / (1 + Σ_j λ_j) - β Σ_t KL_t, one advantage per response, shared by
    its tokens. With one epoch and one minibatch the ratio is 1 and this is plain REINFORCE.

    Args:
        samples_per_prompt: K responses to every prompt of a rollout, whose others are the baseline.
            With K = 1 these are the responses to the other prompts: more noise, more prompts.
        epochs, minibatches: passes over a rollout and optimizer steps per pass.
        clip: ε of the probability ratio, where a rollout is used more than once.
        standardise: divide all advantages of a rollout by their standard deviation (never per
            prompt, never reward and cost apart); a heuristic that keeps the step size.
        target_kl: no further epoch once the mean KL of old to new policy (k3) exceeds this.

    Raises:
        InputError: a value is out of its range.
    """

    samples_per_prompt: int = 4
    epochs: int = 1
    minibatches: int = 1
    clip: float = 0.2
    standardise: bool = True
    target_kl: float | None = None

    # Not settings: without a type they are no fields of the dataclass.
    critic = "none"
    value_coefficient = 0.0

    def __post_init__(self) -> None:
        for name in ("samples_per_prompt", "epochs", "minibatches"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"{name} of RLOO is a whole number >= 1, got {getattr(self, name)}"
                )
        if not 0 < self.clip < math.inf:
            raise InputError(f"clip of RLOO is positive, got {self.clip}")
        if self.target_kl is not None and not self.target_kl > 0:
            raise InputError(f"target_kl is positive or null, got {self.target_kl}")

    def targets(
        self,
        rollout: Rollout,
        scores: Tensor,
        multipliers: Sequence[float],
        kl_coefficient: float,
    ) -> Targets:
        """One advantage per response, on each of its tokens; no returns."""
        mask = rollout.tokens.response_mask
        returns = lagrangian_advantage(scores, multipliers) - kl_coefficient * rollout.kl.sum(dim=1)
        # Other prompts' responses do not depend on this one either. Their pessimistic costs do,
        # with K = 1: a share of 1 / (B - 1) of the spread's gradient is lost with the baseline.
        keys = rollout.keys if self.samples_per_prompt > 1 else ("",) * len(rollout.keys)
        advantages = leave_one_out(returns, keys)
        if self.standardise:
            # Equal returns stay zero: the floor is above what rounding makes of them.
            floor = 1e-4 * returns.abs().amax() + 1e-8
            advantages = advantages / torch.maximum(advantages.std(), floor)
        return Targets(advantages[:, None] * mask, rollout.values)

    def value_loss(self, values: Tensor, rollout: Rollout, targets: Targets, stream: int) -> Tensor:
        raise NotImplementedError("RLOO has no critics")
