"""Several processes with one copy of the model each (data parallel): who does what, and together.

Every process holds every prompt of a batch and answers its share; then all exchange what they
found and go on with the same whole. So a decision (pessimism, violation, advantages, multiplier)
is made from all responses, the same one everywhere, and equals that of one process.

Rank: number of a process, 0 to size - 1. In a single process everything here is the identity.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")


def rank_and_size() -> tuple[int, int]:
    """This process's rank and how many there are; (0, 1) where none were started."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def share(count: int) -> Tensor:
    """Which of `count` rows are this process's: rank, rank + size, rank + 2 size, …"""
    rank, size = rank_and_size()
    return torch.arange(count)[rank::size]  # none where there are fewer rows than processes


def in_order(count: int) -> Tensor:
    """Sorts rows that stand as `gathered` shares of `count` rows back into their own order."""
    _, size = rank_and_size()
    return torch.cat([torch.arange(count)[rank::size] for rank in range(size)]).argsort()


def gathered(value: T) -> list[T]:
    """What every process holds, by rank. All processes must call it; values travel pickled."""
    _, size = rank_and_size()
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    distributed.all_gather_object(values, value)
    return values


def from_first(value: T) -> T:
    """What rank 0 holds. All processes must call it."""
    if rank_and_size()[1] == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replaces every gradient by its sum over all processes, in one exchange.

    A parameter that this process has no gradient for counts as zero; one that no process has any
    for keeps none, so that the optimizer passes it over, as with one process.
    """
    if rank_and_size()[1] == 1:
        return
    trained = list(parameters)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    found = torch.tensor([float(p.grad is not None) for p in trained]).to(gradients[0])
    flat = torch.cat([*(gradient.reshape(-1) for gradient in gradients), found])
    distributed.all_reduce(flat)
    *totals, found = flat.split([*(gradient.numel() for gradient in gradients), len(trained)])
    for parameter, gradient, total, holders in zip(
        trained, gradients, totals, found.tolist(), strict=True
    ):
        parameter.grad = gradient.copy_(total.view_as(gradient)) if holders else None


def summed(values: dict[str, float]) -> dict[str, float]:
    """Each figure summed over all processes."""
    parts = gathered(values)
    return {name: sum(part[name] for part in parts) for name in values}
