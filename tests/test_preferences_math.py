"""Losses of reward and cost models, intervals and calibration."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hcrlhf.preferences import (
    bradley_terry_loss,
    correct_pairs,
    platt,
    proportion,
    score_penalty,
    sign_loss,
    squashed,
)

seeded = settings(deadline=None, derandomize=True, max_examples=50)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def test_bradley_terry_loss_is_minus_the_log_probability_of_the_label() -> None:
    # Differences log 3 and 0 mean probabilities 3/4 and 1/2.
    loss = bradley_terry_loss(vector(math.log(3), 5.0), vector(0.0, 5.0))
    assert loss.item() == pytest.approx(-(math.log(3 / 4) + math.log(1 / 2)) / 2)


def test_bradley_terry_gradient_is_the_probability_of_the_other_label() -> None:
    higher, lower = vector(math.log(3)), vector(0.0)
    bradley_terry_loss(higher, lower).backward()
    assert higher.grad is not None and lower.grad is not None
    assert higher.grad.item() == pytest.approx(-1 / 4)
    assert lower.grad.item() == pytest.approx(1 / 4)


@seeded
@given(st.floats(-50, 50), st.floats(-50, 50), st.floats(-50, 50))
def test_bradley_terry_only_sees_the_difference(one: float, two: float, shift: float) -> None:
    moved = bradley_terry_loss(vector(one + shift), vector(two + shift))
    assert moved.item() == pytest.approx(bradley_terry_loss(vector(one), vector(two)).item())


def test_sign_loss_wants_harmful_costs_positive_and_safe_costs_negative() -> None:
    # σ(log 3) = 3/4: harmful at +log 3 is labelled well, safe at +log 3 badly.
    scores = vector(math.log(3), math.log(3), -math.log(3))
    loss = sign_loss(scores, torch.tensor([True, False, False]))
    expected = -(math.log(3 / 4) + math.log(1 / 4) + math.log(3 / 4)) / 3
    assert loss.item() == pytest.approx(expected)


def test_sign_loss_gradient_pushes_each_score_to_its_own_side() -> None:
    scores = vector(0.0, 0.0)
    sign_loss(scores, torch.tensor([True, False])).backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == pytest.approx([-1 / 4, 1 / 4])


@pytest.mark.parametrize("wrong_by", [200.0, 1e4])
def test_losses_of_wildly_wrong_scores_are_finite_and_linear(wrong_by: float) -> None:
    higher = torch.tensor([-wrong_by], requires_grad=True)
    loss = bradley_terry_loss(higher, torch.zeros(1)) + sign_loss(higher, torch.tensor([True]))
    loss.backward()
    assert loss.item() == pytest.approx(2 * wrong_by)
    assert higher.grad is not None and higher.grad.item() == pytest.approx(-2.0)


def test_score_penalty_is_the_mean_over_pairs_of_both_squares() -> None:
    assert score_penalty(vector(1.0, 2.0), vector(-3.0, 0.0)).item() == pytest.approx(7.0)


@pytest.mark.parametrize(
    ("higher", "lower", "expected"),
    [([1.0, 2.0], [0.0, 3.0], 1), ([1.0], [1.0], 0), ([-1.0], [-2.0], 1), ([], [], 0)],
)
def test_a_tie_is_no_correct_pair(higher: list, lower: list, expected: int) -> None:
    assert correct_pairs(torch.tensor(higher), torch.tensor(lower)) == expected


def test_pairs_whose_scores_are_not_numbers_are_not_correct() -> None:
    nan = torch.tensor([math.nan, 1.0, math.nan])
    assert correct_pairs(nan, torch.tensor([0.0, math.nan, math.nan])) == 0


def test_wilson_interval_of_eight_in_ten_is_the_published_one() -> None:
    interval = proportion(8, 10)
    assert interval.value == 0.8
    assert (interval.low, interval.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)


@seeded
@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_limits_are_the_rates_that_a_z_test_just_accepts(count: tuple[int, int]) -> None:
    k, n = count
    interval = proportion(k, n)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1
    # Multiplied out, (k/n - p)² = z² p (1 - p) / n at both ends; z = 1.96 to two decimals.
    for p in (interval.low, interval.high):
        assert (k / n - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / n, abs=1e-6)


def test_the_proportion_of_nothing_is_not_a_number() -> None:
    interval = proportion(0, 0)
    assert all(math.isnan(x) for x in (interval.value, interval.low, interval.high))


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_platt_on_separated_classes_stops_at_the_smoothed_targets(scale: float) -> None:
    # Nine harmful at +scale, nine safe at -scale: by symmetry b = 0, and σ(a · scale) = 10/11.
    scores = scale * np.repeat([1.0, -1.0], 9)
    fit = platt(scores, np.repeat([1.0, 0.0], 9))
    assert fit is not None
    assert fit.slope * scale == pytest.approx(math.log(10), abs=1e-3)
    assert fit.intercept == pytest.approx(0.0, abs=1e-3)


def test_platt_gives_the_smoothed_frequency_at_each_of_two_scores() -> None:
    # Two scores, two parameters: the fit meets both averages of the targets exactly. Of 4 harmful
    # (target 5/6) and 4 safe (1/6), score 0 has 1 and 3, score 2 has 3 and 1.
    scores = np.array([0.0, 0, 0, 0, 2, 2, 2, 2])
    harmful = np.array([1.0, 0, 0, 0, 1, 1, 1, 0])
    low, high = (5 / 6 + 3 / 6) / 4, (3 * 5 / 6 + 1 / 6) / 4
    fit = platt(scores, harmful)
    assert fit is not None
    intercept = math.log(low / (1 - low))
    assert fit.intercept == pytest.approx(intercept, abs=1e-3)
    assert fit.slope == pytest.approx((math.log(high / (1 - high)) - intercept) / 2, abs=1e-3)


def test_platt_recovers_the_curve_that_the_labels_were_drawn_from() -> None:
    random = np.random.default_rng(0)
    scores = random.normal(size=20_000)
    harmful = (random.random(20_000) < 1 / (1 + np.exp(-(2 * scores - 1)))).astype(float)
    fit = platt(scores, harmful)
    assert fit is not None
    # Standard errors at this n are near 0.03.
    assert (fit.slope, fit.intercept) == pytest.approx((2.0, -1.0), abs=0.12)


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_platt_needs_both_classes(label: float) -> None:
    assert platt(np.array([0.5, 1.5]), np.full(2, label)) is None


# -- a cost with a cap -----------------------------------------------------------------------------

limits = st.floats(0.01, 1000)
costs = st.floats(allow_nan=False, allow_infinity=False, width=32)


def test_squashed_costs_by_hand() -> None:
    # 4 tanh(½ ln 3) = 4 (3 - 1)/(3 + 1) = 2, and tanh(ln 2) = 3/5.
    found = squashed(np.array([0.0, 2 * math.log(3), -2 * math.log(3), 4 * math.log(2)]), 4.0)
    np.testing.assert_allclose(found, [0.0, 2.0, -2.0, 2.4], rtol=1e-14)


@seeded
@given(st.lists(costs, min_size=1, max_size=10), limits)
def test_a_squashed_cost_never_leaves_its_range_and_never_grows(x: list, limit: float) -> None:
    found = squashed(np.array(x), limit)
    assert found.dtype == np.float64
    assert (np.abs(found) <= limit).all()
    assert (np.abs(found) <= np.abs(x) * (1 + 1e-12)).all()


@pytest.mark.parametrize("limit", [0.1, 3.7, 1e6])
def test_the_largest_costs_of_all_reach_the_cap_and_not_a_bit_more(limit: float) -> None:
    largest = float(np.finfo(np.float32).max)
    assert squashed(np.array([largest, -largest]), limit).tolist() == [limit, -limit]


@seeded
@given(st.lists(costs, min_size=1, max_size=10), limits)
def test_squashing_keeps_every_sign_and_so_the_harm_rate(x: list, limit: float) -> None:
    np.testing.assert_array_equal(np.sign(squashed(np.array(x), limit)), np.sign(x))


@seeded
@given(st.lists(costs, min_size=2, max_size=10), limits)
def test_squashing_keeps_the_order(x: list, limit: float) -> None:
    found = squashed(np.sort(np.array(x)), limit)
    assert (np.diff(found) >= 0).all()
    near = np.linspace(-3 * limit, 3 * limit, 100)
    assert (np.diff(squashed(near, limit)) > 0).all()


def test_small_costs_are_nearly_unchanged() -> None:
    # tanh x = x - x³/3 + ...
    assert squashed(np.array([0.01]), 4.0)[0] == pytest.approx(0.01 - 0.01**3 / 48, rel=1e-9)


@seeded
@given(st.lists(costs, min_size=1, max_size=10))
def test_without_a_limit_a_cost_is_itself_in_float64(x: list) -> None:
    found = squashed(np.array(x, dtype=np.float32), None)
    assert found.dtype == np.float64
    assert found.tolist() == x


def test_a_cost_that_is_no_number_stays_none() -> None:
    assert math.isnan(squashed(np.array([math.nan]), 4.0)[0])
