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
