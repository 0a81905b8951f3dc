"""A gradient that is found at once is the one that a backward pass would have added."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hcrlhf.errors import is_out_of_memory
from hcrlhf.gradients import known_gradient


def weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(3, 2, generator=generator)) for _ in range(3)]


@pytest.mark.parametrize(
    "loss",
    [
        lambda a, b: (a * b).sum(),
        lambda a, b: ((a + b) * 2).tanh().sum(),  # one tensor is the gradient of both
        lambda a, b: a.sum() + b.mean(),  # and here one number is that of every entry
    ],
)
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_a_known_gradient_is_added_as_a_backward_pass_would(
    loss: Callable[[Tensor, Tensor], Tensor], share: float
) -> None:
    plain, known = weights(), weights()
    for _ in range(2):  # the second is added to the first
        (share * loss(*plain[:2])).backward()
        found = known_gradient(lambda: loss(*known[:2]), known)
        assert found.detach() == loss(*known[:2])
        before = [None if w.grad is None else w.grad.clone() for w in known]
        (share * found).backward()
        for w, old, other in zip(known[:2], before, plain, strict=False):
            assert w.grad is not None and other.grad is not None
            torch.testing.assert_close(w.grad, other.grad)
            assert old is None or not torch.equal(w.grad, old)
    assert known[2].grad is None  # without influence


def test_a_loss_that_breaks_off_leaves_what_the_weights_have() -> None:
    (weight, *_) = weights()
    weight.grad = torch.ones(3, 2)

    def breaks(_: Tensor) -> None:
        raise torch.OutOfMemoryError

    def loss() -> Tensor:
        middle = weight * 2
        middle.register_hook(breaks)
        return (middle + weight).sum()

    with pytest.raises(torch.OutOfMemoryError):
        known_gradient(loss, [weight])
    assert torch.equal(weight.grad, torch.ones(3, 2))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("CUDA error: out of memory"), False),
        (MemoryError(), False),
    ],
)
def test_a_lack_of_memory_is_known_whoever_says_it(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected
