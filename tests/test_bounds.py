"""Upper bounds against hand-worked numbers, scipy's own intervals and exact sums."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hcrlhf.bounds import (
    ClopperPearson,
    StudentT,
    check_delta,
    clopper_pearson_upper,
    finite_sample,
    student_t_factor,
    student_t_upper,
)
from hcrlhf.errors import InputError

seeded = settings(deadline=None, derandomize=True, max_examples=50)

deltas = st.floats(0.001, 0.999)
# Whole numbers / 8: exact in binary, so that a sample has spread or has none, and nothing between.
samples = st.lists(st.integers(-800, 800), min_size=2, max_size=30).map(
    lambda x: np.array(x, dtype=np.float64) / 8
)
spread_samples = samples.filter(lambda x: x.min() < x.max())

BAD_PROBABILITIES = (0, 1, -0.1, 5, math.nan, math.inf)


# -- Student-t -------------------------------------------------------------------------------------


def test_student_t_bound_of_one_two_three_four_is_the_hand_worked_number() -> None:
    # Mean 2.5, s = sqrt(5/3), t_{0.95, 3} = 2.3534 in every table.
    expected = 2.5 + math.sqrt(5 / 3) * 2.3534 / math.sqrt(4)
    assert student_t_upper([1, 2, 3, 4], 0.05) == pytest.approx(expected, abs=1e-4)


def test_student_t_factor_of_two_costs_is_the_cauchy_quantile() -> None:
    # Student-t with 1 degree of freedom is Cauchy: its quantile is tan(pi (q - 1/2)).
    assert student_t_factor(2, 0.05) == pytest.approx(math.tan(0.45 * math.pi) / math.sqrt(2))


@seeded
@given(spread_samples, deltas)
def test_student_t_bound_is_the_one_sided_interval_of_scipy(x: np.ndarray, delta: float) -> None:
    interval = stats.ttest_1samp(x, 0.0, alternative="less").confidence_interval(1 - delta)
    assert student_t_upper(x, delta) == pytest.approx(interval.high, rel=1e-9, abs=1e-9)


@seeded
@given(spread_samples, deltas, st.integers(-50, 50), st.integers(1, 50))
def test_student_t_bound_shifts_and_scales_with_the_costs(
    x: np.ndarray, delta: float, shift: int, scale: int
) -> None:
    moved = student_t_upper(scale * x + shift, delta)
    assert moved == pytest.approx(scale * student_t_upper(x, delta) + shift, rel=1e-9, abs=1e-9)


@seeded
@given(spread_samples, deltas, deltas)
def test_student_t_bound_rises_as_less_error_is_granted(
    x: np.ndarray, one: float, two: float
) -> None:
    strict, lax = sorted((one, two))
    assert student_t_upper(x, strict) >= student_t_upper(x, lax)


@seeded
@given(spread_samples, st.randoms(use_true_random=False))
def test_student_t_bound_does_not_depend_on_the_order_of_prompts(x: np.ndarray, random) -> None:
    shuffled = x.tolist()
    random.shuffle(shuffled)
    assert student_t_upper(shuffled, 0.05) == pytest.approx(student_t_upper(x, 0.05), rel=1e-12)


def test_student_t_bound_at_delta_one_half_is_the_mean() -> None:
    assert student_t_upper([1, 2, 6], 0.5) == pytest.approx(3.0)


@pytest.mark.parametrize("value", [-3.0, 0.0, 0.1, 1e6])
@pytest.mark.parametrize("n", [2, 7, 500])
def test_a_sample_without_spread_never_gets_a_finite_student_t_bound(value: float, n: int) -> None:
    assert student_t_upper(np.full(n, value), 0.05) == math.inf


def test_student_t_needs_two_costs() -> None:
    with pytest.raises(InputError, match="at least 2 costs, got 1"):
        student_t_upper([1.0], 0.05)


@pytest.mark.parametrize("delta", [0.05, 0.2])
def test_student_t_errs_on_normal_costs_as_often_as_granted(delta: float) -> None:
    repeats, n = 20_000, 5
    x = np.random.default_rng(0).normal(size=(repeats, n))
    upper = x.mean(axis=1) + x.std(axis=1, ddof=1) * student_t_factor(n, delta)
    tolerance = 4 * math.sqrt(delta * (1 - delta) / repeats)
    assert (upper < 0).mean() == pytest.approx(delta, abs=tolerance)


def test_student_t_errs_far_more_often_than_granted_where_harm_is_rare_and_severe() -> None:
    # A cost is 100 once in 100 prompts, else within 0.01 of 0, so that the mean is 1. A share of
    # 0.99^100 = 37% of all safety sets holds no harm at all, and every such set is bounded near 0.
    harmless = np.random.default_rng(0).uniform(-0.01, 0.01, size=(200, 100))
    assert all(student_t_upper(x, 0.05) < 1 for x in harmless)
    assert StudentT.kind == "asymptotic"


# -- Clopper-Pearson -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("harmful", "n", "delta", "expected"),
    [
        (0, 1, 0.05, 0.95),
        (0, 59, 0.05, 1 - 0.05 ** (1 / 59)),  # no harm: (1 - p)^n = delta
        (0, 300, 0.01, 1 - 0.01 ** (1 / 300)),
        (1, 2, 0.05, math.sqrt(0.95)),  # all but one: 1 - p^n = delta
        (9, 10, 0.1, 0.9**0.1),
        (7, 7, 0.05, 1.0),
        (1, 1, 0.5, 1.0),
    ],
)
def test_clopper_pearson_where_the_binomial_can_be_inverted_by_hand(
    harmful: int, n: int, delta: float, expected: float
) -> None:
    assert clopper_pearson_upper(harmful, n, delta) == pytest.approx(expected, rel=1e-12)


@seeded
@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), deltas)
def test_clopper_pearson_is_the_exact_binomial_test_of_scipy(
    count: tuple[int, int], delta: float
) -> None:
    harmful, n = count
    test = stats.binomtest(harmful, n, alternative="less")
    expected = test.proportion_ci(confidence_level=1 - delta, method="exact").high
    assert clopper_pearson_upper(harmful, n, delta) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("delta", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("n", [1, 2, 10, 59, 200])
def test_clopper_pearson_never_errs_more_often_than_granted(n: int, delta: float) -> None:
    uppers = np.array([clopper_pearson_upper(h, n, delta) for h in range(n + 1)])
    # The worst rates lie just above a bound: there the error comes as close to delta as it can.
    rates = np.concatenate([np.linspace(0.001, 0.999, 97), uppers[:-1] + 1e-9])
    pmf = stats.binom.pmf(np.arange(n + 1)[None, :], n, rates[:, None])
    errors = np.where(uppers[None, :] < rates[:, None], pmf, 0.0).sum(axis=1)
    assert errors.max() <= delta
    np.testing.assert_allclose(errors[97:], delta, rtol=1e-4)


@seeded
@given(st.integers(1, 200), deltas, deltas, st.data())
def test_clopper_pearson_rises_with_harm_and_with_confidence(
    n: int, one: float, two: float, data: st.DataObject
) -> None:
    strict, lax = sorted((one, two))
    less, more = sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))
    assert clopper_pearson_upper(less, n, lax) <= clopper_pearson_upper(more, n, lax)
    assert clopper_pearson_upper(less, n, lax) <= clopper_pearson_upper(less, n, strict)
    assert clopper_pearson_upper(less, n + 1, lax) <= clopper_pearson_upper(less, n, lax)


@pytest.mark.parametrize(("harmful", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_clopper_pearson_refuses_impossible_counts(harmful: int, n: int) -> None:
    with pytest.raises(InputError, match=f"0 <= harmful <= n .*got harmful={harmful}, n={n}"):
        clopper_pearson_upper(harmful, n, 0.05)


# -- the classes -----------------------------------------------------------------------------------


def test_student_t_class_gives_the_bound_of_the_function() -> None:
    assert StudentT().upper([1, 2, 3, 4], 0.1) == student_t_upper([1, 2, 3, 4], 0.1)


def test_clopper_pearson_class_counts_the_ones() -> None:
    assert ClopperPearson().upper([0, 1, 0, 1, 0], 0.1) == clopper_pearson_upper(2, 5, 0.1)


@pytest.mark.parametrize("value", [0.5, 2.0, -1.0])
def test_clopper_pearson_class_refuses_what_is_not_a_rate(value: float) -> None:
    with pytest.raises(InputError, match="needs values 0 or 1"):
        ClopperPearson().upper([0.0, 1.0, value], 0.05)


def test_student_t_forecast_takes_the_spread_from_here_and_the_number_from_there() -> None:
    # Mean 2.5, s = sqrt(5/3) of four values; the quantile is that of 101 prompts, t = 1.6602.
    expected = 2.5 + math.sqrt(5 / 3) * 1.6602 / math.sqrt(101)
    assert StudentT().forecast([1, 2, 3, 4], 101, 0.05) == pytest.approx(expected, abs=1e-5)


@seeded
@given(spread_samples, deltas)
def test_a_forecast_for_the_same_number_of_prompts_is_the_bound(
    x: np.ndarray, delta: float
) -> None:
    assert StudentT().forecast(x, x.size, delta) == pytest.approx(student_t_upper(x, delta))
    harmful = (x > 0).astype(float)
    expected = ClopperPearson().upper(harmful, delta)
    assert ClopperPearson().forecast(harmful, x.size, delta) == pytest.approx(expected)


def test_a_sample_without_spread_forecasts_no_finite_bound_either() -> None:
    assert StudentT().forecast([1.0, 1.0, 1.0], 100, 0.05) == math.inf


@pytest.mark.parametrize(
    ("harmful", "seen", "n", "expected"),
    [(1, 3, 10, 4), (0, 3, 10, 0), (3, 3, 10, 10), (2, 4, 10, 5), (1, 1000, 10, 1)],
)
def test_clopper_pearson_forecast_rounds_the_number_of_harmful_responses_up(
    harmful: int, seen: int, n: int, expected: int
) -> None:
    values = np.arange(seen) < harmful
    forecast = ClopperPearson().forecast(values, n, 0.05)
    assert forecast == clopper_pearson_upper(expected, n, 0.05)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("delta", BAD_PROBABILITIES)
def test_a_delta_outside_zero_and_one_is_refused_everywhere(delta: float) -> None:
    message = rf"delta is a probability of error and lies in \(0, 1\), got {delta}"
    for call in (
        lambda: check_delta(delta),
        lambda: student_t_factor(5, delta),
        lambda: student_t_upper([1, 2], delta),
        lambda: clopper_pearson_upper(0, 5, delta),
        lambda: clopper_pearson_upper(5, 5, delta),
    ):
        with pytest.raises(InputError, match=message):
            call()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bound", [StudentT(), ClopperPearson()])
def test_a_cost_that_is_not_finite_gets_no_bound(
    bound: StudentT | ClopperPearson, bad: float
) -> None:
    for call in (bound.upper, lambda x, delta: bound.forecast(x, 10, delta)):
        with pytest.raises(InputError, match="1 of 4 costs are not finite"):
            call([0.0, 1.0, bad, 1.0], 0.05)


@pytest.mark.parametrize(("costs", "shape"), [([], r"\(0,\)"), ([[1.0, 2.0]], r"\(1, 2\)")])
def test_a_bound_needs_a_vector_of_costs(costs: list, shape: str) -> None:
    with pytest.raises(InputError, match=f"one per prompt, got shape {shape}"):
        finite_sample(costs)
