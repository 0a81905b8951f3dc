"""PPO-Lagrangian by hand, by explicit sums and by autograd."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hcrlhf.constraint import Constraint
from hcrlhf.errors import InputError
from hcrlhf.learner import Targets
from hcrlhf.ppo import (
    PPO,
    at_last_token,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    generalized_advantages,
    k3,
    lagrangian_advantage,
    masked_mean,
    token_rewards,
    whiten,
)
from hcrlhf.rollouts import Rollout
from hcrlhf.text import Tokens

seeded = settings(deadline=None, derandomize=True, max_examples=40)

LENGTHS = (3, 1, 4, 2)
B, T, S = len(LENGTHS), max(LENGTHS), 3
MASK = torch.arange(T)[None, :] < torch.tensor(LENGTHS)[:, None]
SCORES = torch.tensor([[1.0, -0.5, 2.0, 0.25], [0.5, 3.0, -1.0, 0.0], [-2.0, 1.0, 0.5, 4.0]])

multiplier_pairs = st.tuples(st.floats(0, 1e6), st.floats(0, 1e6))


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_rollout(log_probs: Tensor, reference: Tensor, values: Tensor) -> Rollout:
    """Four responses of 3, 1, 4 and 2 tokens to different prompts of two tokens."""
    attention = torch.cat([torch.ones(B, 2, dtype=torch.bool), MASK], dim=1)
    tokens = Tokens(torch.ones(B, 2 + T, dtype=torch.long), attention, 2, torch.zeros(B).bool())
    return Rollout(
        tokens=tokens,
        keys=("a", "b", "c", "d"),
        log_probs=log_probs,
        reference_log_probs=reference,
        rewards=SCORES[0].double(),
        costs=SCORES[1].double().numpy(),
        values=values,
    )


def random_rollout() -> Rollout:
    return make_rollout(noise(0, B, T), noise(1, B, T), noise(2, S, B, T))


def outside(x: Tensor, rubbish: Tensor) -> Tensor:
    """x with rubbish wherever there is no response token."""
    return torch.where(MASK, x, rubbish)


# -- rewards ---------------------------------------------------------------------------------------


def test_scores_stand_on_the_last_token_of_each_response() -> None:
    placed = at_last_token(torch.tensor([1.0, 2.0, 3.0, 4.0]), MASK)
    assert placed.tolist() == [[0, 0, 1, 0], [2, 0, 0, 0], [0, 0, 0, 3], [0, 4, 0, 0]]


def test_a_response_of_one_column_is_scored_there() -> None:
    assert at_last_token(torch.tensor([5.0]), torch.tensor([[True]])).tolist() == [[5.0]]


def test_token_rewards_charge_the_kl_to_the_reward_and_add_it_to_the_cost() -> None:
    mask = torch.tensor([[True, True, False]])
    kl = torch.tensor([[2.0, -1.0, 9.0]])
    scores = torch.tensor([[10.0], [3.0]])
    assert token_rewards(scores, kl, 0.5, mask).tolist() == [[[-1.0, 10.5, 0.0]], [[1.0, 2.5, 0.0]]]


@seeded
@given(multiplier_pairs)
def test_the_weighted_sum_holds_the_kl_with_weight_beta_whatever_the_multipliers_are(
    multipliers: tuple[float, float],
) -> None:
    kl, beta = noise(3, B, T), 0.05
    combined = lagrangian_advantage(token_rewards(SCORES.double(), kl, beta, MASK), multipliers)
    without = lagrangian_advantage(token_rewards(SCORES.double(), kl, 0.0, MASK), multipliers)
    torch.testing.assert_close(combined - without, -beta * kl * MASK, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("streams", "multipliers", "expected"),
    [
        ([2.0, 4.0], [0.0], 2.0),
        ([2.0, 4.0], [3.0], (2 - 12) / 4),
        ([5.0, 1.0, 2.0], [1.0, 2.0], 0.0),
        ([2.0], [], 2.0),
        ([7.0, -1.0], [1e9], 1.0),  # a huge multiplier leaves the safe direction, not a huge step
    ],
)
def test_lagrangian_advantage_by_hand(
    streams: list[float], multipliers: list[float], expected: float
) -> None:
    combined = lagrangian_advantage(torch.tensor(streams)[:, None], multipliers)
    assert combined.item() == pytest.approx(expected, rel=1e-6)


def test_the_dual_never_sees_the_kl() -> None:
    from lightning_modules.policy import Policy

    far = random_rollout()
    near = replace(far, reference_log_probs=far.log_probs)
    assert far.kl.abs().sum() > 1 and near.kl.abs().sum() == 0
    found = []
    for rollout in (far, near):
        scores, violations = Policy("sft", "reward", "cost", [Constraint("mean", 0.0)])._constrain(
            rollout
        )
        found.append((scores.tolist(), violations))
    assert found[0] == found[1]


# -- advantages ------------------------------------------------------------------------------------


def test_advantages_and_returns_by_hand() -> None:
    # δ = (1 + 1 - 0.5, 2 - 1) = (1.5, 1); A = (1.5 + 0.5 · 1, 1); returns A + V = (2.5, 2).
    mask = torch.tensor([[True, True, False]])
    rewards = torch.tensor([[1.0, 2.0, 7.0]])
    values = torch.tensor([[0.5, 1.0, 7.0]])
    advantages = generalized_advantages(rewards, values, mask, 0.5)
    assert advantages.tolist() == [[2.0, 1.0, 0.0]]
    # A discount of one half: δ = (1 + 0.5 - 0.5, 1) = (1, 1), A = (1 + 0.25, 1).
    assert generalized_advantages(rewards, values, mask, 0.5, 0.5).tolist() == [[1.25, 1.0, 0.0]]


@pytest.mark.parametrize("gae_lambda", [0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_advantages_are_the_explicit_double_sum_over_each_ragged_row(
    gae_lambda: float, discount: float
) -> None:
    rewards, values = noise(4, S, B, T), noise(5, S, B, T)
    found = generalized_advantages(rewards, values, MASK, gae_lambda, discount)
    for s in range(S):
        for b, length in enumerate(LENGTHS):
            r, v = rewards[s, b, :length].tolist(), [*values[s, b, :length].tolist(), 0.0]
            deltas = [r[t] + discount * v[t + 1] - v[t] for t in range(length)]
            expected = [
                sum((discount * gae_lambda) ** k * deltas[t + k] for k in range(length - t))
                for t in range(length)
            ] + [0.0] * (T - length)
            assert found[s, b].tolist() == pytest.approx(expected)


def test_advantages_at_lambda_one_are_the_rewards_to_come_minus_the_value() -> None:
    rewards, values = noise(6, S, B, T), noise(7, S, B, T)
    found = generalized_advantages(rewards, values, MASK, 1.0)
    for b, length in enumerate(LENGTHS):
        for t in range(length):
            to_come = rewards[:, b, t:length].sum(dim=1)
            torch.testing.assert_close(found[:, b, t], to_come - values[:, b, t])


def test_whitening_by_hand() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    x = torch.tensor([[1.0, 2.0, 50.0], [3.0, -9.0, 0.0]])
    assert whiten(x, mask).tolist() == [[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]


def test_whitened_entries_have_mean_zero_and_variance_one_whatever_they_were() -> None:
    for scale, shift in ((1.0, 0.0), (1e-3, 5.0), (100.0, -40.0)):
        inside = whiten(scale * noise(8, B, T) + shift, MASK)[MASK]
        assert inside.mean().item() == pytest.approx(0.0, abs=1e-9)
        assert inside.var(correction=1).item() == pytest.approx(1.0)


@pytest.mark.parametrize("value", [0.0, 0.5, -8.0])
def test_a_single_advantage_whitens_to_zero(value: float) -> None:
    assert whiten(torch.tensor([[value, 3.0]]), torch.tensor([[True, False]])).tolist() == [[0, 0]]


# size.
@pytest.mark.parametrize("value", [0.5, 0.1, 3.3])
def test_equal_advantages_whiten_to_nearly_zero(value: float) -> None:
    whitened = whiten(torch.full((1, 11), value), torch.ones(1, 11, dtype=torch.bool))
    assert whitened.abs().max() < 0.01


def test_masked_mean_by_hand() -> None:
    mask = torch.tensor([[True, False, True]])
    assert masked_mean(torch.tensor([[1.0, 100.0, 4.0]]), mask).item() == 2.5


# -- clipped losses --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        # ε = 0.2. The gradient is by the log-probability: -ρA, or 0 where the clip has taken over.
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.4, 0.0),  # already better by more than the clip: no further reward
        (0.5, 2.0, -1.0, -1.0),  # worse than before: always corrected
        (1.0, -2.0, 2.0, 2.0),
        (0.9, -2.0, 1.8, 1.8),
        (0.5, -2.0, 1.6, 0.0),
        (1.5, -2.0, 3.0, 3.0),
        (3.0, 0.0, 0.0, 0.0),
    ],
)
def test_the_clipped_policy_loss_on_both_sides_of_the_clip(
    ratio: float, advantage: float, loss: float, gradient: float
) -> None:
    old = torch.tensor([-1.7], dtype=torch.float64)
    new = (old + math.log(ratio)).requires_grad_()
    found = clipped_policy_loss(new, old, torch.tensor([advantage], dtype=torch.float64), 0.2)
    found.sum().backward()
    assert new.grad is not None
    assert found.item() == pytest.approx(loss)
    assert new.grad.item() == pytest.approx(gradient)


@pytest.mark.parametrize(
    ("value", "loss", "gradient"),
    [
        # Old value 0, return 3, clip 1.
        (0.0, 4.5, -3.0),
        (0.5, 3.125, -2.5),
        (2.0, 2.0, 0.0),  # moved toward the return by more than the clip: (1 - 3)² / 2
        (-0.5, 6.125, -3.5),
        (-2.0, 12.5, -5.0),  # moved away from it: the unclipped error counts
        (6.0, 4.5, 3.0),  # far beyond it: the unclipped error counts
    ],
)
def test_the_clipped_value_loss_by_hand(value: float, loss: float, gradient: float) -> None:
    new = torch.tensor([value], requires_grad=True)
    found = clipped_value_loss(new, torch.zeros(1), torch.tensor([3.0]), 1.0)
    found.sum().backward()
    assert new.grad is not None
    assert found.item() == pytest.approx(loss)
    assert new.grad.item() == pytest.approx(gradient)


# -- the learner -----------------------------------------------------------------------------------


def test_targets_combine_the_streams_and_whiten_once() -> None:
    # Without values and at λ_GAE = 1 the advantage is what is still to come, per token:
    # (r - λ·c̃) / (1 + Σλ) - β (KL of this and later tokens).
    beta, multipliers = 0.1, (0.5, 2.0)
    rollout = replace(random_rollout(), values=torch.zeros(S, B, T, dtype=torch.float64))
    targets = PPO(gae_lambda=1.0).targets(rollout, SCORES.double(), multipliers, beta)
    raw = torch.zeros(B, T, dtype=torch.float64)
    for b, length in enumerate(LENGTHS):
        r, c, d = SCORES[:, b].tolist()
        kl = (rollout.log_probs - rollout.reference_log_probs)[b].tolist()
        for t in range(length):
            raw[b, t] = (r - 0.5 * c - 2 * d) / 3.5 - beta * sum(kl[t:length])
    inside = raw[MASK]
    expected = (inside - inside.mean()) / inside.std()
    torch.testing.assert_close(targets.advantages[MASK], expected)
    assert (targets.advantages[~MASK] == 0).all()


def test_returns_at_lambda_one_do_not_depend_on_the_values() -> None:
    learner, rollout = PPO(gae_lambda=1.0), random_rollout()
    other = replace(rollout, values=noise(9, S, B, T))
    one = learner.targets(rollout, SCORES.double(), (1.0, 1.0), 0.1).returns
    two = learner.targets(other, SCORES.double(), (1.0, 1.0), 0.1).returns
    torch.testing.assert_close(one[:, MASK], two[:, MASK])
    # The last token's return is its reward: the score, -β KL for the reward and +β KL for a cost.
    b, last = 2, LENGTHS[2] - 1
    kl = (rollout.log_probs - rollout.reference_log_probs)[b, last].item()
    expected = [2.0 - 0.1 * kl, -1.0 + 0.1 * kl, 0.5 + 0.1 * kl]
    assert one[:, b, last].tolist() == pytest.approx(expected)


def test_returns_below_lambda_one_are_advantage_plus_value() -> None:
    # One stream, the values of the hand-worked row above for "b" and "d", no KL.
    rollout = random_rollout()
    values = torch.zeros(1, B, T, dtype=torch.float64)
    values[0, 1, 0], values[0, 3, :2] = 3.0, torch.tensor([0.5, 1.0])
    rollout = replace(rollout, reference_log_probs=rollout.log_probs, values=values)
    scores = torch.tensor([[0.0, 7.0, 0.0, 2.0]], dtype=torch.float64)
    returns = PPO(gae_lambda=0.5).targets(rollout, scores, (), 0.1).returns
    # "d": δ = (0 + 1 - 0.5, 2 - 1) = (0.5, 1), A = (1, 1). "b" has one token: its score.
    assert returns[0, 3, :2].tolist() == [1.5, 2.0]
    assert returns[0, 1, 0].item() == 7.0


def test_one_step_at_ratio_one_is_the_policy_gradient() -> None:
    rollout, learner = random_rollout(), PPO()
    targets = learner.targets(rollout, SCORES.double(), (1.0, 0.0), 0.1)
    new = rollout.log_probs.clone().requires_grad_()
    learner.policy_loss(new, rollout, targets).backward()
    assert new.grad is not None
    torch.testing.assert_close(new.grad, -targets.advantages)


def test_losses_are_sums_over_response_tokens_and_each_critic_has_its_own_stream() -> None:
    learner, rollout = PPO(clip=0.2, value_clip=1.0), random_rollout()
    count = sum(LENGTHS)
    targets = Targets(
        advantages=torch.full((B, T), 2.0),
        returns=rollout.values + torch.tensor([3.0, 4.0, -8.0])[:, None, None],
    )
    policy_loss = learner.policy_loss(rollout.log_probs, rollout, targets)
    assert policy_loss.item() == pytest.approx(-2.0 * count)
    for stream, (kept, moved) in enumerate([(4.5, 2.0), (8.0, 4.5), (32.0, 50.0)]):
        old = rollout.values[stream]
        found = learner.value_loss(old, rollout, targets, stream)
        assert found.item() == pytest.approx(kept * count)
        # Two units up, of which the clip lets one count where they help, and all where they do not.
        found = learner.value_loss(old + 2, rollout, targets, stream)
        assert found.item() == pytest.approx(moved * count)


def test_a_rollout_without_harm_leaves_the_loss_of_its_critic_in_proportion() -> None:
    # A harm rate where no response is harmful: the scores do not vary, and the critic is a bit off.
    rollout, scores = random_rollout(), SCORES.double().clone()
    scores[2] = 0.3
    rollout = replace(
        rollout,
        reference_log_probs=rollout.log_probs,
        values=torch.full_like(rollout.values, 0.5) * rollout.tokens.response_mask,
    )
    learner = PPO(gae_lambda=1.0)
    targets = learner.targets(rollout, scores, (1.0, 1.0), 0.1)
    found = learner.value_loss(rollout.values[2], rollout, targets, 2)
    assert found.item() == pytest.approx(0.5 * (0.5 - 0.3) ** 2 * sum(LENGTHS))


def test_rows_of_targets_and_rollouts_belong_to_the_same_responses() -> None:
    learner, rollout = PPO(), random_rollout()
    targets = learner.targets(rollout, SCORES.double(), (1.0, 1.0), 0.1)
    new, index = rollout.log_probs + 0.3 * noise(10, B, T), torch.tensor([2, 0])
    rest = torch.tensor([3, 1])
    whole = learner.policy_loss(new, rollout, targets)
    parts = [learner.policy_loss(new[i], rollout.rows(i), targets.rows(i)) for i in (index, rest)]
    assert sum(parts).item() == pytest.approx(whole.item())
    values = noise(11, B, T)
    whole = learner.value_loss(values, rollout, targets, 1)
    parts = [
        learner.value_loss(values[i], rollout.rows(i), targets.rows(i), 1) for i in (index, rest)
    ]
    assert sum(parts).item() == pytest.approx(whole.item())
    assert rollout.rows(index).keys == ("c", "a")


def statistics_of(old: Sequence[float], new: Sequence[float], clip: float) -> tuple[float, int]:
    length = len(old)
    attention = torch.ones(1, 1 + length, dtype=torch.bool)
    tokens = Tokens(torch.ones(1, 1 + length).long(), attention, 1, torch.tensor([False]))
    before = torch.tensor([old], dtype=torch.float64).log()
    rollout = Rollout(
        tokens, ("a",), before, before, torch.zeros(1), np.zeros(1), torch.zeros(1, 1, length)
    )
    after = torch.tensor([new], dtype=torch.float64).log()
    found = PPO(clip=clip).update_statistics(after, rollout)
    return found.kl.item(), int(found.clipped)


def test_the_update_kl_is_the_exact_divergence_where_tokens_come_as_often_as_likely() -> None:
    # Eight tokens of an alphabet of four, in the old policy's own proportions.
    counts, after = (4, 2, 1, 1), (0.25, 0.25, 0.25, 0.25)
    old = [k / 8 for k in counts for _ in range(k)]
    new = [q for q, k in zip(after, counts, strict=True) for _ in range(k)]
    divergence = sum(k / 8 * math.log(k / 8 / q) for k, q in zip(counts, after, strict=True))
    kl, clipped = statistics_of(old, new, 0.2)
    assert kl / 8 == pytest.approx(divergence)
    assert clipped == 6  # all but the two tokens whose probability stays 1/4


@seeded
@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=2))
def test_the_update_kl_of_a_token_is_never_negative(probabilities: list[float]) -> None:
    kl, _ = statistics_of(probabilities[:1], probabilities[1:], 0.2)
    assert kl >= 0


@pytest.mark.parametrize(("new", "clipped"), [(0.59, 0), (0.61, 1), (0.41, 0), (0.39, 1)])
def test_a_ratio_is_clipped_beyond_either_end(new: float, clipped: int) -> None:
    assert statistics_of([0.5], [new], 0.2)[1] == clipped


# -- outside the mask ------------------------------------------------------------------------------


def results(rollout: Rollout, new: Tensor, values: Tensor) -> list[Any]:
    """Everything the learner computes from a rollout, where there is a response token."""
    learner = PPO()
    targets = learner.targets(rollout, SCORES.double(), (0.5, 2.0), 0.1)
    statistics = learner.update_statistics(new, rollout)
    return [
        targets.advantages.tolist(),
        targets.returns[:, MASK].tolist(),
        learner.policy_loss(new, rollout, targets).item(),
        *(learner.value_loss(values[s], rollout, targets, s).item() for s in range(S)),
        statistics.kl.item(),
        int(statistics.clipped),
    ]


def with_rubbish(rubbish: Tensor) -> tuple[Rollout, Tensor, Tensor]:
    """The random rollout and its new policy and critics, each with other rubbish outside."""
    rollout = random_rollout()
    dirty = replace(
        rollout,
        log_probs=outside(rollout.log_probs, rubbish[0]),
        reference_log_probs=outside(rollout.reference_log_probs, rubbish[1]),
        values=outside(rollout.values, rubbish[2]),
    )
    new = outside(rollout.log_probs + 0.3 * noise(10, B, T), rubbish[3])
    return dirty, new, outside(rollout.values + noise(11, S, B, T), rubbish[4])


NO_RUBBISH = torch.zeros(5, B, T, dtype=torch.float64)


@seeded
@given(st.lists(st.floats(-300, 300), min_size=5 * B * T, max_size=5 * B * T))
def test_a_value_outside_the_mask_never_changes_anything(rubbish: list[float]) -> None:
    dirty = with_rubbish(torch.tensor(rubbish, dtype=torch.float64).view(5, B, T))
    assert results(*dirty) == results(*with_rubbish(NO_RUBBISH))


# advantage or the zero mask is nan.
@pytest.mark.parametrize("rubbish", [1e3, math.nan])
def test_not_even_an_overflow_or_nan_outside_the_mask_changes_anything(rubbish: float) -> None:
    dirty = NO_RUBBISH.clone()
    dirty[3] = rubbish
    assert results(*with_rubbish(dirty)) == results(*with_rubbish(NO_RUBBISH))


@seeded
@given(st.lists(st.floats(-1e6, 1e6), min_size=B * T, max_size=B * T))
def test_pure_functions_ignore_what_is_outside_the_mask(rubbish: list[float]) -> None:
    x = noise(12, B, T)
    dirty = outside(x, torch.tensor(rubbish, dtype=torch.float64).view(B, T))
    clean = outside(x, torch.zeros(B, T, dtype=torch.float64))
    assert whiten(dirty, MASK).tolist() == whiten(clean, MASK).tolist()
    assert masked_mean(dirty, MASK) == masked_mean(clean, MASK)
    for gae_lambda in (0.0, 0.95):
        found = generalized_advantages(dirty, dirty, MASK, gae_lambda)
        assert found.tolist() == generalized_advantages(clean, clean, MASK, gae_lambda).tolist()
    scores = SCORES.double()
    found = token_rewards(scores, dirty, 0.1, MASK)
    assert found.tolist() == token_rewards(scores, clean, 0.1, MASK).tolist()


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings_given", "message"),
    [
        ({"epochs": 0}, "epochs of PPO is a whole number >= 1, got 0"),
        ({"minibatches": -1}, "minibatches of PPO is a whole number >= 1, got -1"),
        ({"gae_lambda": -0.1}, r"gae_lambda lies in \[0, 1\], got -0.1"),
        ({"gae_lambda": 1.1}, r"gae_lambda lies in \[0, 1\], got 1.1"),
        ({"gae_lambda": math.nan}, r"gae_lambda lies in \[0, 1\], got nan"),
        ({"clip": 0}, "clip of PPO is positive, got 0"),
        ({"clip": -0.2}, "clip of PPO is positive, got -0.2"),
        ({"value_clip": 0.0}, "value_clip of PPO is positive, got 0.0"),
        ({"clip": math.nan}, "clip .*got nan"),
        ({"value_clip": math.nan}, "value_clip .*got nan"),
        ({"value_coefficient": -0.5}, "value_coefficient .*got -0.5"),
        ({"target_kl": -0.1}, "target_kl .*got -0.1"),
    ],
)
def test_settings_out_of_range_are_refused_with_what_was_given(
    settings_given: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        PPO(**settings_given)


@pytest.mark.parametrize("gae_lambda", [0, 1])
def test_both_ends_of_gae_lambda_are_allowed(gae_lambda: float) -> None:
    assert PPO(gae_lambda=gae_lambda).gae_lambda == gae_lambda


# -- what is watched ---------------------------------------------------------------------------


def test_k3_is_what_the_ratio_exceeds_its_tangent_by() -> None:
    # ρ = 2: 2 - 1 - log 2; ρ = 1/2: 1/2 - 1 + log 2; ρ = 1: nothing.
    found = k3(torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64).log())
    assert found.tolist() == pytest.approx([1 - math.log(2), math.log(2) - 0.5, 0])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 2.0, 3.0, 6.0], 1.0),
        ([9.0, 9.0, 9.0, 9.0], 0.0),  # a constant, even a wrong one, explains nothing
        ([0.0, 1.0, 2.0, 5.0], 1.0),  # nor does a constant error spoil it
        # Errors 0, 0, 0, 4 have variance 3; returns 1, 2, 3, 6 have 3.5.
        ([1.0, 2.0, 3.0, 2.0], 1 - 3 / 3.5),
        ([-1.0, -2.0, -3.0, -6.0], -3.0),  # errors of twice the returns
    ],
)
def test_the_explained_variance_counts_response_tokens_only(
    values: list[float], expected: float
) -> None:
    returns = torch.tensor([[1.0, 2.0, 99.0], [3.0, 6.0, -99.0]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    predicted = torch.tensor([[values[0], values[1], 7.0], [values[2], values[3], 7.0]])
    assert float(explained_variance(returns, predicted, mask)) == pytest.approx(expected)


def test_returns_that_do_not_vary_leave_nothing_to_explain() -> None:
    same = torch.ones(2, 3)
    found = explained_variance(same, torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool))
    assert math.isnan(float(found))
