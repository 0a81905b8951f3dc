"""The weight of the KL to the reference: fixed, or steered towards a target. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hcrlhf.errors import InputError


@dataclass(frozen=True)
class AdaptiveKL:
    """β ← max(β (1 + gain · clip(KL / target - 1, -0.2, 0.2)), minimum) after every rollout.

    Args:
        target: KL to the reference per response, in nats (the sum over its tokens, averaged).
        gain: how fast β follows; at 0.1 it changes by at most 2% per rollout.
        minimum: β never falls below it. With kl_coefficient here the target is a limit: the KL is
            held back above it, and not sought below.

    Ziegler et al. (arXiv 1909.08593), section 2.2; the minimum is ours.
    """

    target: float
    gain: float = 0.1
    minimum: float = 0.0

    def __post_init__(self) -> None:
        for name in ("target", "gain"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(
                    f"{name} of the adaptive KL is positive, got {getattr(self, name)}"
                )
        if self.gain >= 5:
            raise InputError(
                f"gain of the adaptive KL is below 5, got {self.gain}: β is multiplied with "
                "1 - 0.2 gain where the KL is small, as it is at the start, and would be 0 for good"
            )
        if not 0 <= self.minimum < math.inf:
            raise InputError(f"minimum of the adaptive KL is >= 0, got {self.minimum}")

    def check_start(self, coefficient: float) -> None:
        """
        Raises:
            InputError: β would begin where this rule cannot be.
        """
        if coefficient == 0:
            raise InputError(
                "kl_coefficient is 0 and adaptive_kl multiplies it, so that it stays 0; set "
                "kl_coefficient above 0, or adaptive_kl: null"
            )
        if coefficient < self.minimum:
            raise InputError(
                f"kl_coefficient {coefficient} lies below the minimum {self.minimum} of "
                "adaptive_kl; raise the one or lower the other"
            )

    def update(self, coefficient: float, kl: float) -> float:
        """The next β, after a rollout with this KL per response."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        return max(coefficient * (1 + self.gain * error), self.minimum)
