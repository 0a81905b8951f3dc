"""PPO-Lagrangian: token rewards, advantages and clipped losses, one stream per critic.

Streams: index 0 is the reward, index 1 + j is by how much constraint j's pessimistic cost exceeds
its target (`Dual.judge`). Tensors are (B, T) per stream or (S, B, T); `mask` is True for response
tokens (the stop token included), and every mask row is a prefix: True up to the last token, then
False.
KL is E_policy[log π_θ - log π_ref] and is estimated per token by the k1 estimator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hcrlhf.errors import InputError
from hcrlhf.learner import Learner, Targets, UpdateStatistics
from hcrlhf.rollouts import Rollout


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Σ x·mask / Σ mask."""
    return (x * mask).sum() / mask.sum()


def k3(log_ratio: Tensor) -> Tensor:
    """ρ - 1 - log ρ per token, ρ = q / p of a token that was sampled from p.

    Unbiased for KL(p ‖ q) and never negative; it is watched, not optimised
    (http://joschu.net/blog/kl-approx.html).

    Args:
        log_ratio: log q - log p.
    """
    return log_ratio.exp() - 1 - log_ratio


def explained_variance(returns: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(R - V) / Var(R) over the masked entries: a scalar; NaN where R does not vary.

    1: the critic knows every return; 0: no better than a constant; below 0: worse.

    Args:
        returns, values, mask: (B, T).
    """
    aim, error = returns[mask], (returns - values)[mask]
    total = aim.var(correction=0)
    return torch.where(total > 0, 1 - error.var(correction=0) / total, torch.nan)


def at_last_token(scores: Tensor, mask: Tensor) -> Tensor:
    """(B,) scores placed on the last response token of each row, zero elsewhere: (B, T)."""
    last = mask & ~torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    return scores[:, None] * last


def token_rewards(scores: Tensor, kl: Tensor, kl_coefficient: float, mask: Tensor) -> Tensor:
    """What each stream's critic predicts: r·1[t = T] - β KL_t and c̃_j·1[t = T] + β KL_t.

    Args:
        scores: (S, B), the reward first, then the pessimistic costs less their targets.
        kl: (B, T), log π_θ - log π_ref of each sampled token.

    Returns:
        (S, B, T). The cost streams carry +β KL so that the weighted sum
        (r̂ - Σ λ_j ĉ_j) / (1 + Σ λ_j) holds the KL with weight β whatever λ is.
    """
    sign = torch.ones(scores.shape[0], device=scores.device)
    sign[0] = -1.0
    penalty = kl_coefficient * kl * mask
    ends = torch.stack([at_last_token(s, mask) for s in scores])
    return ends + sign[:, None, None] * penalty


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gae_lambda: float, discount: float = 1.0
) -> Tensor:
    """A_t = Σ_l (γλ)^l δ_{t+l} with δ_t = r_t + γ V_{t+1} - V_t and V = 0 after the last token.

    Args:
        rewards, values: (..., B, T). mask: (B, T).

    Returns:
        (..., B, T), zero outside the mask. Returns (critic targets) are A + values.

    Schulman et al. (arXiv 1506.02438), eq. 16.
    """
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[..., 0])
    next_value = torch.zeros_like(rewards[..., 0])
    for t in reversed(range(rewards.shape[-1])):
        inside = mask[:, t]
        delta = rewards[..., t] + discount * next_value - values[..., t]
        running = torch.where(inside, delta + discount * gae_lambda * running, 0.0)
        next_value = torch.where(inside, values[..., t], 0.0)
        advantages[..., t] = running
    return advantages


def lagrangian_advantage(streams: Tensor, multipliers: Sequence[float]) -> Tensor:
    """(A_r - Σ_j λ_j A_j) / (1 + Σ_j λ_j).

    Args:
        streams: (1 + C, ...), the reward's first.

    Dai et al., Safe RLHF (arXiv 2310.12773); the denominator keeps the step size, and with
    `token_rewards` the weight of the KL, independent of λ.
    """
    weights = torch.tensor([1.0, *(-m for m in multipliers)], dtype=streams.dtype)
    weights = weights.to(streams.device) / (1 + sum(multipliers))
    return torch.tensordot(weights, streams, dims=1)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """(x - mean) / std over the masked entries (ddof 1), zero outside the mask."""
    count = mask.sum()
    mean = masked_mean(x, mask)
    variance = ((x - mean).square() * mask).sum() / (count - 1).clamp(min=1)
    # Equal entries stay zero: the floor is above what rounding makes of them.
    floor = 1e-4 * (x * mask).abs().amax() + 1e-8
    return (x - mean) / torch.maximum(variance.sqrt(), floor) * mask


def clipped_policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip: float
) -> Tensor:
    """-min(ρ A, clip(ρ, 1 - ε, 1 + ε) A) per token, ρ = exp(log_probs - old_log_probs).

    Schulman et al. (arXiv 1707.06347), eq. 7.
    """
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def clipped_value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """½ max((V - R)², (V_clipped - R)²) per token, V_clipped within ± clip of the old value."""
    near_old = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (near_old - returns).square())


class ClippedPolicy(Learner):
    """A learner whose policy loss is the clipped ratio times an advantage per token.

    Attributes:
        clip: ε of the probability ratio.
    """

    clip: float

    def policy_loss(self, log_probs: Tensor, rollout: Rollout, targets: Targets) -> Tensor:
        """`clipped_policy_loss` summed over response tokens."""
        # Selected, not multiplied by the mask: an overflow outside it would become 0 · ∞.
        mask = rollout.tokens.response_mask
        return clipped_policy_loss(
            log_probs[mask], rollout.log_probs[mask], targets.advantages[mask], self.clip
        ).sum()

    def update_statistics(self, log_probs: Tensor, rollout: Rollout) -> UpdateStatistics:
        """How far the policy has moved from the one that sampled: `k3` of old to new."""
        mask = rollout.tokens.response_mask
        log_ratio = (log_probs - rollout.log_probs).masked_fill(~mask, 0.0)
        clipped = ((log_ratio.exp() - 1).abs() > self.clip) & mask
        return UpdateStatistics(k3(log_ratio).sum(), clipped.sum())


@dataclass(frozen=True)
class PPO(ClippedPolicy):
    """Proximal policy optimisation with one critic per stream.

    Args:
        critic: "shared": value heads on the actor's own hidden states, one forward and backward
            for everything. "separate": an adapter and a head per critic, the adapters copies of the
            reward and cost model; slower, and the critics do not disturb the actor.
        epochs, minibatches: passes over a rollout and optimizer steps per pass.
        clip: ε of the probability ratio. value_clip: the same for the critics, in the unit of
            their stream's scores (standard deviations).
        gae_lambda: λ of generalised advantage estimation; the discount is 1.
        value_coefficient: weight of the critics' loss. Shared critics write into the states that
            the policy reads, and too much of it costs the policy.
        target_kl: no further epoch once the mean KL of old to new policy (k3) exceeds this. The
            mean is over an epoch's minibatches, each before its step: that of the first step is 0.

    Raises:
        InputError: a value is out of its range.
    """

    critic: Literal["shared", "separate"] = "separate"
    epochs: int = 1
    minibatches: int = 1
    clip: float = 0.2
    value_clip: float = 1.0
    gae_lambda: float = 0.95
    value_coefficient: float = 0.02
    target_kl: float | None = 0.1

    def __post_init__(self) -> None:
        for name in ("epochs", "minibatches"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} of PPO is a whole number >= 1, got {getattr(self, name)}")
        if not 0 <= self.gae_lambda <= 1:
            raise InputError(f"gae_lambda lies in [0, 1], got {self.gae_lambda}")
        for name in ("clip", "value_clip"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} of PPO is positive, got {getattr(self, name)}")
        if not 0 <= self.value_coefficient < math.inf:
            raise InputError(f"value_coefficient is finite and >= 0, got {self.value_coefficient}")
        if self.target_kl is not None and not self.target_kl > 0:
            raise InputError(f"target_kl is positive or null, got {self.target_kl}")

    def targets(
        self,
        rollout: Rollout,
        scores: Tensor,
        multipliers: Sequence[float],
        kl_coefficient: float,
    ) -> Targets:
        """Advantages and returns of a rollout with values (S, B, T).

        Args:
            scores: (S, B), the reward first, then the pessimistic costs less their targets.
        """
        mask = rollout.tokens.response_mask
        rewards = token_rewards(scores, rollout.kl, kl_coefficient, mask)
        streams = generalized_advantages(rewards, rollout.values, mask, self.gae_lambda)
        combined = lagrangian_advantage(streams, multipliers)
        return Targets(whiten(combined, mask), streams + rollout.values)

    def value_loss(self, values: Tensor, rollout: Rollout, targets: Targets, stream: int) -> Tensor:
        """`clipped_value_loss` of one stream, summed over response tokens.

        In the unit of the scores, which is a running one: the standard deviation of this rollout's
        would be 0 where none of its responses is harmful, and the critics' error beyond measure.
        """
        old, returns = rollout.values[stream], targets.returns[stream]
        loss = clipped_value_loss(values, old, returns, self.value_clip)
        return (loss * rollout.tokens.response_mask).sum()
