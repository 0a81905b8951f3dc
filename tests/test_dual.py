"""The dual side: the pessimistic gradient by enumeration, spread, violation, and its own state."""

import itertools
import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hcrlhf.constraint import Constraint
from hcrlhf.dual import (
    Dual,
    RunningVariance,
    pairwise_spread,
    pessimistic_costs,
    reversed_share,
    violation,
)
from hcrlhf.errors import InputError
from hcrlhf.multiplier import MultiplierState, PIDMultiplier, ProjectedMultiplier

seeded = settings(deadline=None, derandomize=True, max_examples=50)

cost_vectors = st.lists(st.floats(-100, 100), min_size=2, max_size=12)


def different_prompts(n: int) -> list[str]:
    return [f"prompt {i}" for i in range(n)]


# -- the pessimistic gradient ----------------------------------------------------------------------

COSTS = np.array([-1.5, 0.25, 0.5, 4.0])
LOGITS = torch.tensor([0.3, -0.2, 1.1, -0.9], dtype=torch.float64)


def pessimistic_mean_gradient(pessimism: float) -> tuple[np.ndarray, float]:
    """∇(μ + pessimism · σ) of the softmax policy by autograd, and σ."""
    logits = LOGITS.clone().requires_grad_()
    p, c = logits.softmax(0), torch.from_numpy(COSTS)
    mean = (p * c).sum()
    std = ((p * c.square()).sum() - mean.square()).sqrt()
    (mean + pessimism * std).backward()
    assert logits.grad is not None
    return logits.grad.numpy(), std.item()


def score_functions() -> np.ndarray:
    """∇ log π(y) of each of the four responses, one per row: one-hot minus probabilities."""
    return np.eye(4) - LOGITS.softmax(0).numpy()


@pytest.mark.parametrize("pessimism", [0.0, 0.15, 2.0])
def test_the_pessimistic_cost_has_the_gradient_of_mean_plus_pessimism_times_std(
    pessimism: float,
) -> None:
    expected, std = pessimistic_mean_gradient(pessimism)
    p = LOGITS.softmax(0).numpy()
    # v_i is here its expectation over an independent second draw.
    spread = np.array([sum(p[j] * (COSTS[i] - COSTS[j]) ** 2 for j in range(4)) for i in range(4)])
    costs = pessimistic_costs(COSTS, spread, pessimism, std)
    np.testing.assert_allclose((p * costs) @ score_functions(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("pessimism", [0.0, 0.15, 2.0])
@pytest.mark.parametrize("keys", [["a", "b"], ["a", "b", "c"], ["a", "a", "b"]])
def test_small_rollouts_give_that_gradient_without_bias(pessimism: float, keys: list[str]) -> None:
    # All 4^B rollouts, each weighted by its probability: nothing is lost to a small batch.
    expected, std = pessimistic_mean_gradient(pessimism)
    p, gradients = LOGITS.softmax(0).numpy(), score_functions()
    total = np.zeros(4)
    for drawn in itertools.product(range(4), repeat=len(keys)):
        y = list(drawn)
        costs = pessimistic_costs(COSTS[y], pairwise_spread(COSTS[y], keys), pessimism, std)
        total += p[y].prod() * (costs[:, None] * gradients[y]).mean(axis=0)
    np.testing.assert_allclose(total, expected, rtol=0, atol=1e-10)


def test_pessimistic_costs_by_hand() -> None:
    # c + k v / (2 σ̄) = 1 + 0.5 · 8 / 4 and 3 + 0.5 · 4 / 4.
    assert pessimistic_costs([1.0, 3.0], [8.0, 4.0], 0.5, 2.0).tolist() == [2.0, 3.5]


@seeded
@given(cost_vectors, st.floats(0.1, 3.0), st.floats(0.5, 5.0))
def test_a_cost_is_reversed_where_its_pessimistic_cost_falls_as_it_grows(
    costs: list[float], pessimism: float, std: float
) -> None:
    mean = np.mean(costs)
    c = np.array([*costs, *costs])  # v_i towards the mean of all: own pairs add nothing to a slope
    slopes = 1 + pessimism * (c - mean) / std
    if np.abs(slopes).min() > 1e-6:
        assert reversed_share(c, pessimism, std) == pytest.approx(np.mean(slopes < 0))
    assert reversed_share(c, 0.0, std) == 0.0


# -- spread ----------------------------------------------------------------------------------------


def test_spread_by_hand() -> None:
    assert pairwise_spread([0.0, 1.0, 3.0], ["a", "b", "c"]).tolist() == [5.0, 2.5, 6.5]
    # "a" twice: its two responses are compared with "b" alone.
    assert pairwise_spread([0.0, 1.0, 3.0], ["a", "a", "b"]).tolist() == [9.0, 4.0, 6.5]


@seeded
@given(cost_vectors)
def test_half_the_mean_spread_of_different_prompts_is_the_sample_variance(
    costs: list[float],
) -> None:
    spread = pairwise_spread(costs, different_prompts(len(costs)))
    assert spread.mean() / 2 == pytest.approx(np.var(costs, ddof=1), abs=1e-9)


@seeded
@given(st.lists(st.tuples(st.floats(-100, 100), st.sampled_from("abcd")), min_size=2, max_size=12))
def test_spread_leaves_out_pairs_of_one_prompt(rows: list[tuple[float, str]]) -> None:
    if len({key for _, key in rows}) < 2:
        return
    for (cost, key), found in zip(rows, pairwise_spread(*zip(*rows, strict=True)), strict=True):
        others = [(cost - c) ** 2 for c, k in rows if k != key]
        assert found == pytest.approx(sum(others) / len(others))


def test_spread_is_unbiased_with_several_responses_per_prompt() -> None:
    # A cost is a prompt's ±1 plus a response's ±1: variance 2. Two prompts with two responses
    # each, all 2^6 outcomes; the usual sample variance misses some of the prompts' share.
    usual, found = [], []
    for a, b, *noise in itertools.product((-1, 1), repeat=6):
        costs = np.array([a, a, b, b]) + np.array(noise)
        usual.append(np.var(costs, ddof=1))
        found.append(pairwise_spread(costs, ["a", "a", "b", "b"]).mean() / 2)
    assert np.mean(found) == pytest.approx(2.0, abs=1e-12)
    assert np.mean(usual) == pytest.approx(5 / 3, abs=1e-12)


@seeded
@given(cost_vectors, st.floats(-50, 50))
def test_spread_does_not_move_with_the_zero_of_the_cost(costs: list[float], shift: float) -> None:
    keys = different_prompts(len(costs))
    moved = pairwise_spread(np.array(costs) + shift, keys)
    np.testing.assert_allclose(moved, pairwise_spread(costs, keys), atol=1e-8)


@pytest.mark.parametrize("keys", [["a"], ["a", "a", "a"], []])
def test_spread_needs_two_different_prompts(keys: list[str]) -> None:
    with pytest.raises(InputError, match="at least 2 different prompts"):
        pairwise_spread(np.zeros(len(keys)), keys)


# -- running variance and violation ----------------------------------------------------------------


def test_the_first_rollout_uses_its_own_variance_and_later_ones_only_earlier_rollouts() -> None:
    running = RunningVariance(decay=0.5)
    assert running.std(9.0) == 3.0
    running.update(4.0)
    assert running.std(9.0) == 2.0
    running.update(1.0)
    # Weights 1/4 and 1/2 of 3/4: (4 + 2 · 1) / 3 = 2.
    assert running.std(9.0) == pytest.approx(math.sqrt(2))


@seeded
@given(st.lists(st.floats(0, 100), min_size=1, max_size=20), st.floats(0, 1, exclude_max=True))
def test_the_running_variance_is_a_weighted_mean_of_the_earlier_ones(
    variances: list[float], decay: float
) -> None:
    running = RunningVariance(decay=decay)
    for variance in variances:
        running.update(variance)
    weights = [decay ** (len(variances) - 1 - i) for i in range(len(variances))]
    expected = np.average(variances, weights=weights)
    assert running.std(1e6) == pytest.approx(math.sqrt(expected), rel=1e-6)


def test_violation_by_hand() -> None:
    assert violation(0.3, std=0.5, pessimism=0.2, target=0.1, unit=0.5) == pytest.approx(0.6)
    assert violation(-1.0, std=2.0, pessimism=0.5, target=0.0, unit=2.0) == 0.0
    assert violation(-2.0, std=2.0, pessimism=0.5, target=0.0, unit=2.0) == pytest.approx(-0.5)
    # Where σ is below its floor of 0.1 the margin is still 2 · 0.03.
    assert violation(0.0, std=0.03, pessimism=2.0, target=0.1, unit=0.1) == pytest.approx(-0.4)


@seeded
@given(
    *[st.floats(-10, 10)] * 2, st.floats(0.1, 10), st.floats(0, 3), st.floats(0.1, 10),
    st.floats(-10, 10),
)  # fmt: skip
def test_violation_has_no_unit_and_no_zero_of_its_own(
    mean: float, target: float, std: float, pessimism: float, scale: float, shift: float
) -> None:
    own = violation(mean, std, pessimism, target, std)
    std *= scale
    moved = violation(scale * mean + shift, std, pessimism, scale * target + shift, std)
    assert moved == pytest.approx(own, abs=1e-6)


# -- from one rollout to the next ------------------------------------------------------------------

MEAN = Constraint("mean", -0.5, lower=-4.0, upper=4.0, pessimism=0.25, safety_prompts=100)
RATE = Constraint("harm_rate", 0.3, safety_prompts=100)


def rollout(seed: int, mean: float = 0.0) -> np.ndarray:
    return np.clip(np.random.default_rng(seed).normal(mean, 1.0, 20), -4.0, 4.0)


def test_a_rollout_is_judged_by_the_means_and_variances_of_its_constraints() -> None:
    dual, costs, keys = Dual([MEAN, RATE], ProjectedMultiplier()), rollout(0), different_prompts(20)
    rows, violations = dual.judge(costs, keys)
    for row, g, c in zip(rows, violations, (MEAN, RATE), strict=True):
        values = c.values(costs)
        std = values.std(ddof=1)  # the first rollout has no other
        k = 0.25 if c is MEAN else 0.0
        punished = pessimistic_costs(values, pairwise_spread(values, keys), k, std)
        np.testing.assert_allclose(row, (punished - c.training_target(2)) / std)
        # mean(c̃) = μ̂ + k s²/σ̄: on the first rollout s is σ̄, and the mean of c̃ - τ is g.
        expected = (values.mean() + k * std - c.training_target(2)) / std
        assert [row.mean(), g] == pytest.approx([expected, expected])


def test_costs_that_hardly_vary_are_not_punished_where_their_test_is_sure_to_be_passed() -> None:
    # As a classifier's probability of harm where harm is rare: σ is 0.03, its floor 0.1.
    limit = Constraint("mean", 0.03, lower=0.0, upper=1.0, safety_prompts=500)
    dual = Dual([limit], ProjectedMultiplier(initial=1.0), validation_prompts=500)
    generator = np.random.default_rng(0)
    seen = generator.beta(0.1, 9.9, (30, 64))
    for costs in seen:
        rows, violations = dual.judge(costs, different_prompts(64))
        dual.step(violations)
    assert limit.pass_probability(seen.ravel()[:500]) > 0.99
    assert violations[0] < 0 and dual.multipliers[0] < 1.0
    assert np.abs(rows).max() < 10 + seen.max() / 0.1  # in units of the floor, not of σ


def test_costs_that_begin_to_differ_do_not_meet_the_margin_of_those_that_did_not() -> None:
    # The first rollouts are all alike, as of a policy that refuses everything. With k in units of
    # their spread the sixth had a g of 480 and a pessimistic cost of 120,000 units.
    limit = Constraint("mean", 0.0, lower=-4.0, upper=4.0, safety_prompts=500)
    dual = Dual([limit], ProjectedMultiplier())
    generator = np.random.default_rng(0)
    for number in range(30):
        spread = 1e-4 if number < 5 else 1.0
        costs = np.clip(generator.normal(-1.0, spread, 64), -4.0, 4.0)
        rows, violations = dual.judge(costs, different_prompts(64))
        assert violations[0] < 0 and np.abs(rows).max() < 200
    # No margin at all would be as wrong: a test of equal costs is not passed at the limit itself.
    alike = Dual([limit], ProjectedMultiplier())
    assert alike.judge(np.full(20, -1e-3), different_prompts(20))[1][0] > 0
    assert limit.pass_probability(np.full(400, -1e-3)) == 0


def test_costs_that_do_not_vary_have_a_finite_unit() -> None:
    dual = Dual([MEAN], ProjectedMultiplier())
    rows, violations = dual.judge(np.full(20, -1.0), different_prompts(20))
    np.testing.assert_allclose(rows[0], (-1.0 - -0.5) / MEAN.std_floor)
    assert violations == [pytest.approx((-1.0 - -0.5) / MEAN.std_floor)]


@seeded
@given(st.floats(0.1, 10.0), st.integers(0, 100))
def test_a_cost_in_other_units_is_the_same_constraint(scale: float, seed: int) -> None:
    scaled = Constraint(
        "mean", scale * -0.5, lower=scale * -4.0, upper=scale * 4.0, pessimism=0.25, std_floor=1e-3
    )
    found = []
    for constraint, factor in ((MEAN, 1.0), (scaled, scale)):
        dual = Dual([constraint], ProjectedMultiplier())
        for number in range(3):
            rows, violations = dual.judge(factor * rollout(seed + number), different_prompts(20))
            dual.step(violations)
        found.append([*(rows[0] - rows[0].mean()), *violations, *dual.multipliers])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-9, atol=1e-9)


def test_the_pessimism_is_renewed_when_the_recent_costs_were_replaced_once() -> None:
    derived = Constraint("mean", -0.5, lower=-4.0, upper=4.0, safety_prompts=60)
    dual, seen = Dual([derived], ProjectedMultiplier()), []
    for number in range(7):
        dual.judge(rollout(number), different_prompts(20))
        seen.append(dual.pessimisms[0])
    assert seen[0] == seen[1] == seen[2] != seen[3] == seen[4] == seen[5] != seen[6]
    assert dual.recent == [cost for number in (4, 5, 6) for cost in rollout(number)]


def test_few_validation_prompts_make_training_aim_lower() -> None:
    derived = [
        Constraint(e, t, lower=-4.0, upper=4.0) for e, t in (("mean", 0.5), ("harm_rate", 0.3))
    ]
    costs, keys = rollout(0), different_prompts(20)
    known, seen = (Dual(derived, ProjectedMultiplier(), m) for m in (None, 50))
    violations = [dual.judge(costs, keys)[1] for dual in (known, seen)]
    assert all(b > a for a, b in zip(*violations, strict=True))
    assert seen.pessimisms == [derived[0].training_pessimism(2, costs, 50), 0.0]
    std = math.sqrt(((costs > 0).astype(float)).var(ddof=1))
    target = derived[1].training_target(2, 50)
    assert violations[1][1] == pytest.approx(((costs > 0).mean() - target) / std)


def test_a_dual_goes_on_from_its_state_as_if_it_had_not_stopped() -> None:
    rule = PIDMultiplier(maximum=0.4)
    whole, first = (Dual([MEAN, RATE], rule) for _ in range(2))

    def advance(dual: Dual, begin: int, end: int) -> list[object]:
        found: list[object] = []
        for number in range(begin, end):
            rows, violations = dual.judge(rollout(number, mean=1.0), different_prompts(20))
            dual.step(violations)
            found += [rows.tolist(), violations, dual.multipliers, dual.pessimisms]
        return found

    advance(whole, 0, 7)
    advance(first, 0, 7)
    second = Dual([MEAN, RATE], rule)
    second.load(json.loads(json.dumps(first.state())))
    assert advance(second, 7, 12) == advance(whole, 7, 12)
    assert second.state() == whole.state()
    assert second.steps_at_cap[0] > 7  # counted on, not anew
    with pytest.raises(InputError, match="has 2 constraints, this config has 1"):
        Dual([MEAN], rule).load(first.state())


def test_the_eta_of_a_worst_share_follows_the_recent_costs() -> None:
    tail = Constraint("cvar", 3.0, alpha=0.2, lower=-4.0, upper=4.0, safety_prompts=40)
    dual, seen = Dual([tail], ProjectedMultiplier()), []
    for number in range(4):
        seen.append(rollout(number, mean=0.5 * number))
        rows, _ = dual.judge(seen[-1], different_prompts(20))
        recent = np.concatenate(seen[-2:])  # the last safety_prompts costs
        values = np.maximum(seen[-1] - np.quantile(recent, 0.8), 0.0)
        # Up to scale and zero the row is the tail costs and what the pessimism adds of them.
        spread = pairwise_spread(values, different_prompts(20))
        parts = np.stack([np.ones(20), values, spread])
        residual = np.linalg.lstsq(parts.T, rows[0], rcond=None)[1]
        assert residual[0] < 1e-18


def test_the_count_at_the_cap_begins_anew_when_a_multiplier_leaves_it() -> None:
    dual = Dual([MEAN, RATE], ProjectedMultiplier(learning_rate=1.0, maximum=2.0))
    counts = []
    for g in (5.0, 5.0, -0.5, 5.0):
        dual.step([g, -1.0])
        counts.append(dual.steps_at_cap)
    assert counts == [[1, 0], [2, 0], [0, 0], [1, 0]]


def test_small_rollouts_before_a_large_test_renew_the_pessimism_too() -> None:
    derived = Constraint("mean", -0.5, lower=-4.0, upper=4.0, safety_prompts=2000)
    dual, seen = Dual([derived], ProjectedMultiplier()), []
    for number in range(11):
        dual.judge(rollout(number), different_prompts(20))
        seen.append(dual.pessimisms[0])
    assert len(set(seen[:10])) == 1 and seen[10] != seen[9]
    assert len(dual.recent) == 220


def test_one_rollout_does_not_send_a_multiplier_to_its_cap() -> None:
    dual = Dual([MEAN, MEAN], ProjectedMultiplier(learning_rate=0.1, initial=1.0))
    dual.step([40.0, -40.0])
    assert dual.multipliers == [1.5, 0.5]


# -- multipliers of one's own ----------------------------------------------------------------------


@dataclass(frozen=True)
class Rule(ProjectedMultiplier):
    """Adds the same to λ whatever is violated, in a number of NumPy's."""

    own: float = 0.0

    def step(self, state: MultiplierState, violation: float) -> MultiplierState:
        return MultiplierState(np.float64(state.value + self.own), (np.float64(violation),))


def test_a_multiplier_of_ones_own_is_kept_in_plain_numbers() -> None:
    dual = Dual([MEAN], Rule(own=0.5))
    dual.step([0.25])
    assert dual.state()["multipliers"] == [[1.5, 0.25]]
    assert {type(x) for x in dual.state()["multipliers"][0]} == {float}


@pytest.mark.parametrize("step", [-2.0, math.nan, math.inf])
def test_a_multiplier_that_is_no_number_from_zero_on_is_refused(step: float) -> None:
    with pytest.raises(InputError, match="Rule made .* of a multiplier of 1 at a violation of 0.2"):
        Dual([MEAN], Rule(own=step)).step([0.2])
