"""RLOO: the baseline by hand, the gradient by enumeration of a tiny policy."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hcrlhf.errors import InputError
from hcrlhf.learner import Targets
from hcrlhf.rloo import RLOO, leave_one_out
from hcrlhf.rollouts import Rollout
from hcrlhf.text import Tokens

seeded = settings(deadline=None, derandomize=True, max_examples=50)


def rollout_of(keys: list[str], kl: list[list[float]], lengths: list[int]) -> Rollout:
    """Responses of these lengths after a prompt of two tokens, with this KL per token."""
    tokens = max(lengths)
    attention = torch.zeros(len(keys), 2 + tokens, dtype=torch.bool)
    for row, length in enumerate(lengths):
        attention[row, : 2 + length] = True
    ids = torch.ones_like(attention, dtype=torch.long)
    reference = torch.full((len(keys), tokens), -1.0)
    return Rollout(
        tokens=Tokens(ids, attention, 2, torch.zeros(len(keys), dtype=torch.bool)),
        keys=tuple(keys),
        log_probs=reference + torch.tensor(kl),
        reference_log_probs=reference,
        rewards=torch.zeros(len(keys)),
        costs=np.zeros(len(keys)),
        values=torch.zeros(0, len(keys), tokens),
    )


def test_each_response_is_compared_with_the_others_of_its_prompt() -> None:
    returns = torch.tensor([1.0, 10.0, 2.0, 20.0, 6.0])
    found = leave_one_out(returns, ["a", "b", "a", "b", "a"])
    # a: 1 - (2 + 6)/2, 2 - (1 + 6)/2, 6 - (1 + 2)/2; b: 10 - 20, 20 - 10.
    assert found.tolist() == [-3.0, -10.0, -1.5, 10.0, 4.5]


@seeded
@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.floats(-10, 10)), min_size=2, max_size=10),
    st.floats(-100, 100),
)
def test_a_prompts_own_level_does_not_matter(rows: list[tuple[str, float]], shift: float) -> None:
    rows = [*rows, ("a", 0.0), ("a", 1.0), ("b", 0.0), ("b", 1.0)]
    keys, values = zip(*rows, strict=True)
    returns = torch.tensor(values, dtype=torch.float64)
    moved = returns + torch.tensor([shift if key == "a" else 0.0 for key in keys])
    np.testing.assert_allclose(leave_one_out(moved, keys), leave_one_out(returns, keys), atol=1e-9)
    # Over the responses to one prompt the advantages sum to zero.
    advantages = leave_one_out(returns, keys)
    for name in "ab":
        assert sum(advantages[i] for i, key in enumerate(keys) if key == name) == pytest.approx(
            0, abs=1e-9
        )


def test_a_single_response_has_nothing_to_be_compared_with() -> None:
    with pytest.raises(InputError, match="at least 2 responses"):
        leave_one_out(torch.tensor([1.0, 2.0, 3.0]), ["a", "a", "b"])


def test_advantages_by_hand() -> None:
    # G = (r - 3 c) / 4 - 0.5 Σ KL: (4 - 0)/4 - 0.5 · 0.4 = 0.8 and (0 - 12)/4 - 0 = -3.
    rollout = rollout_of(["p", "p"], [[0.2, 0.2], [0.0, 9.0]], [2, 1])
    scores = torch.tensor([[4.0, 0.0], [0.0, 4.0]])
    targets = RLOO(standardise=False).targets(rollout, scores, [3.0], 0.5)
    expected = torch.tensor([[3.8, 3.8], [-3.8, 0.0]])  # the second response has one token
    torch.testing.assert_close(targets.advantages, expected)
    scaled = RLOO().targets(rollout, scores, [3.0], 0.5).advantages
    assert float(scaled[0, 0]) == pytest.approx(3.8 / math.sqrt(2 * 3.8**2))


def test_the_weight_of_the_kl_does_not_depend_on_the_multiplier() -> None:
    rollout = rollout_of(["p", "p"], [[1.0], [0.0]], [1, 1])
    scores = torch.zeros(2, 2)
    for multiplier in (0.0, 5.0):
        advantages = RLOO(standardise=False).targets(rollout, scores, [multiplier], 0.5).advantages
        assert advantages[:, 0].tolist() == pytest.approx([-0.5, 0.5])


@pytest.mark.parametrize("samples", [2, 3])
def test_the_gradient_is_that_of_the_mean_without_bias(samples: int) -> None:
    # All 4^K rollouts of one prompt under a softmax policy over four one-token responses.
    logits = torch.tensor([0.3, -0.2, 1.1, -0.9], dtype=torch.float64)
    reward = torch.tensor([1.0, -0.5, 0.2, 3.0], dtype=torch.float64)
    cost = torch.tensor([0.0, 2.0, -1.0, 4.0], dtype=torch.float64)
    learner, multiplier = RLOO(samples, standardise=False), 0.7

    variable = logits.clone().requires_grad_()
    goal = (variable.softmax(0) * (reward - multiplier * cost)).sum() / (1 + multiplier)
    goal.backward()

    probabilities = logits.softmax(0)
    total = torch.zeros(4, dtype=torch.float64)
    for drawn in itertools.product(range(4), repeat=samples):
        y = list(drawn)
        old = probabilities.log()[y]
        rollout = rollout_of(["p"] * samples, [[0.0]] * samples, [1] * samples)
        rollout = Rollout(
            **{**vars(rollout), "log_probs": old[:, None], "reference_log_probs": old[:, None]}
        )
        targets = learner.targets(rollout, torch.stack([reward[y], cost[y]]), [multiplier], 0.1)
        variable2 = logits.clone().requires_grad_()
        log_probs = variable2.log_softmax(0)[y][:, None]
        (-learner.policy_loss(log_probs, rollout, targets) / samples).backward()
        assert variable2.grad is not None
        total += probabilities[y].prod() * variable2.grad
    assert variable.grad is not None
    torch.testing.assert_close(total, variable.grad, rtol=0, atol=1e-10)


def test_with_one_response_per_prompt_the_other_prompts_are_the_baseline_without_bias() -> None:
    # All 2^3 rollouts of three prompts, each with a policy and scores of its own.
    logits = torch.tensor([[0.3, -0.2], [1.1, 0.4], [-0.7, 0.9]], dtype=torch.float64)
    reward = torch.tensor([[1.0, -0.5], [4.0, 3.0], [0.0, 2.0]], dtype=torch.float64)
    cost = torch.tensor([[0.0, 2.0], [-1.0, 0.5], [3.0, -2.0]], dtype=torch.float64)
    learner, multiplier = RLOO(1, standardise=False), 0.7
    prompts = torch.arange(3)

    variable = logits.clone().requires_grad_()
    goal = (variable.softmax(1) * (reward - multiplier * cost)).sum() / (1 + multiplier)
    goal.backward()

    total = torch.zeros_like(logits)
    for drawn in itertools.product(range(2), repeat=3):
        y = torch.tensor(drawn)
        old = logits.log_softmax(1)[prompts, y]
        rollout = rollout_of(["a", "b", "c"], [[0.0]] * 3, [1] * 3)
        rollout = Rollout(
            **{**vars(rollout), "log_probs": old[:, None], "reference_log_probs": old[:, None]}
        )
        scores = torch.stack([reward[prompts, y], cost[prompts, y]])
        targets = learner.targets(rollout, scores, [multiplier], 0.1)
        variable2 = logits.clone().requires_grad_()
        log_probs = variable2.log_softmax(1)[prompts, y][:, None]
        (-learner.policy_loss(log_probs, rollout, targets)).backward()
        assert variable2.grad is not None
        total += old.exp().prod() * variable2.grad
    assert variable.grad is not None
    torch.testing.assert_close(total, variable.grad, rtol=0, atol=1e-10)
    # By hand: G = (r - 0.7 c) / 1.7 of the first actions is 1, 4.7 and -2.1 over 1.7.
    rollout = rollout_of(["a", "b", "c"], [[0.0]] * 3, [1] * 3)
    targets = learner.targets(rollout, torch.stack([reward[:, 0], cost[:, 0]]), [multiplier], 0.1)
    expected = torch.tensor([1 - 2.6 / 2, 4.7 + 1.1 / 2, -2.1 - 5.7 / 2]) / 1.7
    torch.testing.assert_close(targets.advantages[:, 0], expected, check_dtype=False)


def test_equal_returns_teach_nothing() -> None:
    rollout = rollout_of(["p", "p"], [[0.0], [0.0]], [1, 1])
    scores = torch.full((2, 2), 7.0)
    assert RLOO().targets(rollout, scores, [0.3], 0.1).advantages.abs().max() == 0
    targets = Targets(torch.zeros(2, 1), rollout.values)
    assert float(RLOO().policy_loss(rollout.log_probs, rollout, targets)) == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples_per_prompt": 0}, "samples_per_prompt of RLOO is a whole number >= 1, got 0"),
        ({"epochs": 0}, "epochs of RLOO"),
        ({"minibatches": 0}, "minibatches of RLOO"),
        ({"clip": 0.0}, "clip of RLOO is positive"),
        ({"target_kl": 0.0}, "target_kl is positive"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RLOO(**options)
