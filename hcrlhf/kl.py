"""The weight of the KL to the reference: fixed, or steered towards a target. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hcrlhf.errors import InputError


@dataclass(frozen=True)
class AdaptiveKL:
    """β ← β (1 + gain · clip(KL / target - 1, -0.2, 0.2)) after every rollout.

    Args:
        target: KL to the reference per response, in nats (the sum over its tokens, averaged).
        gain: how fast β follows; at 0.1 it changes by at most 2% per rollout.

    Ziegler et al. (arXiv 1909.08593), section 2.2.
    """

    target: float
    gain: float = 0.1

    def __post_init__(self) -> None:
        for name in ("target", "gain"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(
                    f"{name} of the adaptive KL is positive, got {getattr(self, name)}"
                )

    def update(self, coefficient: float, kl: float) -> float:
        """The next β, after a rollout with this KL per response."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        return coefficient * (1 + self.gain * error)
