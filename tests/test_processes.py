"""Who does what among several processes; what they do together is seen in tests/test_run.py."""

import pytest
import torch

from hcrlhf import processes


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_shares_are_every_row_once_and_can_be_put_back_in_order(
    monkeypatch: pytest.MonkeyPatch, count: int, size: int
) -> None:
    shares = []
    for rank in range(size):
        monkeypatch.setattr(processes, "rank_and_size", lambda rank=rank: (rank, size))
        shares.append(processes.share(count))
    together = torch.cat(shares)
    assert sorted(together.tolist()) == list(range(count))
    assert together[processes.in_order(count)].tolist() == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_weight_that_no_process_has_a_gradient_for_keeps_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both, theirs, none = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    both.grad = torch.tensor([1.0, 2.0])
    # What the other process puts in: gradients of the first two, and how many have one.
    other = torch.tensor([10.0, 20.0, 3.0, 4.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    monkeypatch.setattr(processes, "rank_and_size", lambda: (0, 2))
    monkeypatch.setattr(processes.distributed, "all_reduce", lambda flat: flat.add_(other))
    processes.sum_gradients([both, theirs, none])
    assert both.grad.tolist() == [11.0, 22.0]
    assert theirs.grad is not None and theirs.grad.tolist() == [3.0, 4.0]
    assert none.grad is None  # AdamW would count a zero as a step, and decay the weight
