"""A gradient that is found before it is added to others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor


class _Known(torch.autograd.Function):
    """A loss whose gradient is known; the backward pass hands it on, once."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradient: list[Tensor], *weights: Tensor) -> Tensor:
        ctx.gradient = gradient
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> Any:
        # One after the other, and nothing else holds them: no more than one is there twice. Not in
        # place, for two weights may have been given the same tensor.
        gradient, ctx.gradient = ctx.gradient, []
        return None, None, *(gradient.pop(0) * outer for _ in range(len(gradient)))


def known_gradient(loss: Callable[[], Tensor], weights: Sequence[torch.nn.Parameter]) -> Tensor:
    """loss() with d loss / d weights found at once, and nothing but the result's backward pass adds
    it to what the weights have: a pass that runs out of memory leaves them as they were.

    Args:
        loss: a scalar in float32, made anew.
        weights: what it is made of; one without influence keeps the gradient that it has.
    """
    value = loss()
    # Backward passes are none of autocast's, which is on in a training step.
    with torch.autocast(value.device.type, enabled=False):
        found = torch.autograd.grad(value, weights, allow_unused=True)
    used = [(weight, g) for weight, g in zip(weights, found, strict=True) if g is not None]
    gradient = [g for _, g in used]
    return cast(Tensor, _Known.apply(value.detach(), gradient, *(weight for weight, _ in used)))
