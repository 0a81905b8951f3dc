"""Upper bounds against hand-worked numbers, slow second readings of the formulas and exact sums."""

import itertools
import math
import time
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hcrlhf.betting import betting_upper
from hcrlhf.bounds import (
    bernoulli_divergence,
    clopper_pearson_upper,
    cvar_upper,
    empirical_bernstein_upper,
    hall_t_upper,
    hoeffding_bentkus_upper,
    hoeffding_upper,
    human_rate_upper,
    quantile_upper,
    student_t_factor,
    student_t_upper,
    tail_costs,
)
from hcrlhf.errors import InputError
from hcrlhf.samples import check_delta, finite_sample

seeded = settings(deadline=None, derandomize=True, max_examples=50)

deltas = st.floats(0.001, 0.999)
small_deltas = st.floats(0.001, 0.5)
# Whole numbers / 8: exact in binary, so that a sample has spread or has none, and nothing between.
samples = st.lists(st.integers(-800, 800), min_size=2, max_size=30).map(
    lambda x: np.array(x, dtype=np.float64) / 8
)
spread_samples = samples.filter(lambda x: x.min() < x.max())
unit_samples = st.lists(st.integers(0, 16), min_size=2, max_size=30).map(lambda x: np.array(x) / 16)

BAD_PROBABILITIES = (0, 1, -0.1, 5, math.nan, math.inf)

RANGE_BOUNDS = {
    "hoeffding": hoeffding_upper,
    "empirical_bernstein": empirical_bernstein_upper,
    "hoeffding_bentkus": hoeffding_bentkus_upper,
}
# All with the same arguments: costs, δ, lower, upper.
MEAN_BOUNDS = RANGE_BOUNDS | {
    "student_t": lambda x, delta, lower, upper: student_t_upper(x, delta),
    "hall_t": lambda x, delta, lower, upper: hall_t_upper(x, delta),
}


# -- second implementations ------------------------------------------------------------------------


def where_it_turns(rejected: Callable[[float], bool], low: float, high: float) -> float:
    """Between a `low` that is not rejected and a `high` that is."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if rejected(middle) else (middle, high)
    return high


def binomial_cdf(k: int, n: int, p: float) -> float:
    return math.fsum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))


def two_sided_moments(x: np.ndarray) -> tuple[float, float]:
    """Mean and variance with n - 1, by Python's exact fractions."""
    values = [Fraction(v) for v in x.tolist()]
    mean = sum(values) / len(values)
    return float(mean), float(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def slow_hall(x: np.ndarray, delta: float) -> float:
    n = x.size
    mean, variance = two_sided_moments(x)
    gamma = float(stats.skew(x, bias=True))

    def g(t: float) -> float:
        cubic = t + gamma * t**2 / (3 * math.sqrt(n)) + gamma**2 * t**3 / (27 * n)
        return cubic + gamma / (6 * math.sqrt(n))

    t = float(stats.t.ppf(delta, n - 1))
    inverse = where_it_turns(lambda value: g(value) > t, -1e4, 1e4)
    step = math.sqrt(variance / n)
    return max(mean - step * t, mean - step * inverse)


def slow_hoeffding_bentkus(x: np.ndarray, delta: float, lower: float, upper: float) -> float:
    n = x.size
    a, width = Fraction(lower), Fraction(upper) - Fraction(lower)
    total = sum((Fraction(v) - a) / width for v in x.tolist())
    mean, whole = float(total / n), math.ceil(total - Fraction(1, 10**9))

    def divergence(p: float, q: float) -> float:
        first = p * math.log(p / q) if p > 0 else 0.0
        return first + ((1 - p) * math.log((1 - p) / (1 - q)) if p < 1 else 0.0)

    def rejected(m: float) -> bool:
        hoeffding = math.exp(-n * divergence(mean, m))
        return min(hoeffding, math.e * stats.binom.cdf(whole, n, m)) <= delta

    if mean >= 1:
        return upper
    return lower + (upper - lower) * where_it_turns(rejected, mean, 1 - 1e-15)


def shaped_costs(shape: str, n: int, lower: float, upper: float) -> np.ndarray:
    generator = np.random.default_rng([n, len(shape)])
    u = {
        "bathtub": generator.beta(0.3, 0.6, size=n),
        "coin": (generator.permutation(n) < max(1, n // 6)).astype(float),
        "narrow": generator.uniform(0.4, 0.45, size=n),
        "left-skewed": 1 - generator.beta(0.5, 4.0, size=n),
        "sixteenths": generator.integers(0, 17, size=n) / 16,
    }[shape]
    return lower + (upper - lower) * u


SHAPES = ("bathtub", "coin", "narrow", "left-skewed", "sixteenths")
GRID = list(itertools.product((2, 3, 10, 51, 300), (0.001, 0.01, 0.05, 0.2, 0.5)))


@pytest.mark.parametrize(("lower", "upper"), [(0.0, 1.0), (-3.0, 2.0)])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bounds_are_what_a_second_reading_of_the_formulas_gives(
    shape: str, lower: float, upper: float
) -> None:
    for n, delta in GRID:
        x = shaped_costs(shape, n, lower, upper)
        mean, variance = two_sided_moments(x)
        expected = {
            "student_t": mean + math.sqrt(variance / n) * float(stats.t.ppf(1 - delta, n - 1)),
            "hall_t": slow_hall(x, delta),
            "hoeffding": mean + (upper - lower) * math.sqrt(math.log(1 / delta) / (2 * n)),
            "empirical_bernstein": mean
            + math.sqrt(2 * variance * math.log(2 / delta) / n)
            + 7 / 3 * (upper - lower) * math.log(2 / delta) / (n - 1),
            "hoeffding_bentkus": slow_hoeffding_bentkus(x, delta, lower, upper),
        }
        for name, value in expected.items():
            found = MEAN_BOUNDS[name](x, delta, lower, upper)
            scale = max(upper - lower, abs(value))
            assert found == pytest.approx(value, abs=1e-9 * scale), (name, n, delta)


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


def test_a_quantile_that_is_too_far_out_for_scipy_bounds_nothing() -> None:
    assert student_t_upper([0.0, 1.0, 2.0, 5.0], 1e-300) == math.inf
    assert hall_t_upper([0.0, 1.0, 2.0, 5.0], 1e-300) == math.inf


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


# -- Hall's t --------------------------------------------------------------------------------------


@seeded
@given(spread_samples, small_deltas)
def test_halls_bound_is_never_below_student_t(x: np.ndarray, delta: float) -> None:
    assert hall_t_upper(x, delta) >= student_t_upper(x, delta)


def test_halls_bound_is_student_t_where_nothing_is_skewed() -> None:
    x = [-3.0, -1.0, 0.0, 1.0, 3.0]
    assert hall_t_upper(x, 0.05) == pytest.approx(student_t_upper(x, 0.05), rel=1e-12)


def test_halls_bound_lies_above_student_t_where_harm_is_rare_and_never_below() -> None:
    rare_harm = np.array([0.0] * 57 + [1.0] * 3)
    student = student_t_upper(rare_harm, 0.05)
    assert hall_t_upper(rare_harm, 0.05) > 1.1 * student
    # Mirrored, Hall alone would fall below Student-t.
    assert hall_t_upper(1 - rare_harm, 0.05) == student_t_upper(1 - rare_harm, 0.05)


@pytest.mark.parametrize("value", [-3.0, 0.0, 0.1, 1e6])
@pytest.mark.parametrize("n", [2, 7, 500])
def test_a_sample_without_spread_never_gets_a_finite_hall_bound(value: float, n: int) -> None:
    assert hall_t_upper(np.full(n, value), 0.05) == math.inf


def test_halls_bound_needs_two_costs() -> None:
    with pytest.raises(InputError, match="at least 2 costs, got 1"):
        hall_t_upper([1.0], 0.05)


# -- costs in a declared range ---------------------------------------------------------------------


def test_hoeffdings_bound_by_hand() -> None:
    # Mean 1 of 8 costs in [-1, 3], δ = e^-4: 1 + 4 √(4/16) = 3.
    assert hoeffding_upper([0, 2] * 4, math.exp(-4), -1, 3) == pytest.approx(3.0)


def test_the_empirical_bernstein_bound_by_hand() -> None:
    # Mean 1/2, s² = 1/6, ln(2/0.1) = 2.995732: .5 + √(2.995732/12) + 7 · 2.995732/9.
    found = empirical_bernstein_upper([0, 0.5, 0.5, 1], 0.1, 0, 1)
    assert found == pytest.approx(0.5 + 0.499644 + 2.330014, abs=2e-6)


def test_the_empirical_bernstein_bound_needs_two_costs() -> None:
    with pytest.raises(InputError, match="at least 2 costs, got 1"):
        empirical_bernstein_upper([0.5], 0.05, 0, 1)


@pytest.mark.parametrize("n", [1, 10, 300])
def test_the_hoeffding_bentkus_bound_without_any_cost_is_the_exact_one(n: int) -> None:
    # KL(0 ‖ m) = -ln(1 - m), so that (1 - m)^n = δ as in Clopper-Pearson.
    found = hoeffding_bentkus_upper(np.full(n, -2.0), 0.05, -2, 3)
    assert found == pytest.approx(-2 + 5 * (1 - 0.05 ** (1 / n)), abs=1e-9)


def test_the_hoeffding_bentkus_bound_where_bentkus_is_the_smaller() -> None:
    # All but 2 of 100 costs are 1: e (1 - m^100 - 100 m^99 (1 - m)) = δ.
    found = hoeffding_bentkus_upper(np.arange(100) < 98, 0.05, 0, 1)
    tail = 1 - found**100 - 100 * found**99 * (1 - found)
    assert math.e * tail == pytest.approx(0.05, rel=1e-8)
    assert 100 * bernoulli_divergence(0.98, found) < math.log(1 / 0.05)


def test_a_sum_that_is_whole_but_for_rounding_is_not_rounded_up() -> None:
    # 21 times a seventh of the way in [0.1, 1.3] is 3 + 2^-51 in float64: 3 harms, not 4.
    sevenths = np.full(21, 0.1 + (1.3 - 0.1) * 1 / 7)
    assert math.fsum((sevenths - 0.1) / (1.3 - 0.1)) > 3
    three_harms = np.array([0.1] * 18 + [1.3] * 3)
    for delta in (0.001, 0.05):
        found = hoeffding_bentkus_upper(sevenths, delta, 0.1, 1.3)
        expected = hoeffding_bentkus_upper(three_harms, delta, 0.1, 1.3)
        assert found == pytest.approx(expected, abs=1e-9)


def test_a_sum_that_is_not_whole_is_rounded_up() -> None:
    # Far from the mean Bentkus counts, and it sees ⌈Σu⌉ = 60 of 120 for every sum in (59, 60].
    x = np.array([1.0] * 59 + [0.0] * 61)
    x[-1] = 0.5
    found = hoeffding_bentkus_upper(x, 0.001, 0, 1)
    assert math.e * stats.binom.cdf(60, 120, found) == pytest.approx(0.001, rel=1e-8)


@pytest.mark.parametrize(("p", "q"), [(0.2, 0.3), (0.0, 0.4), (1.0, 0.4), (0.5, 0.5)])
def test_the_bernoulli_divergence_is_scipys_relative_entropy(p: float, q: float) -> None:
    expected = stats.entropy([p, 1 - p], [q, 1 - q])
    assert bernoulli_divergence(p, q) == pytest.approx(float(expected), abs=1e-15)


# -- properties of the bounds on a mean ------------------------------------------------------------


@pytest.mark.parametrize("name", MEAN_BOUNDS)
@seeded
@given(unit_samples, deltas, deltas)
def test_a_bound_falls_as_more_error_is_granted(
    name: str, x: np.ndarray, one: float, two: float
) -> None:
    strict, lax = sorted((one, two))
    bound = MEAN_BOUNDS[name]
    assert bound(x, strict, 0, 1) >= bound(x, lax, 0, 1) - 1e-11


@pytest.mark.parametrize("name", MEAN_BOUNDS)
@seeded
@given(unit_samples, small_deltas, st.integers(-40, 40), st.sampled_from([0.125, 1, 3, 64]))
def test_a_bound_shifts_and_scales_with_costs_and_range(
    name: str, x: np.ndarray, delta: float, shift: int, scale: float
) -> None:
    bound = MEAN_BOUNDS[name]
    moved = bound(scale * x + shift, delta, -0.5 * scale + shift, 1.25 * scale + shift)
    expected = scale * bound(x, delta, -0.5, 1.25) + shift
    # Relative too: with two costs and a small δ, Hall's bound lies thousands of ranges away.
    assert moved == pytest.approx(expected, rel=1e-7, abs=1e-9 * max(scale, 1))


@pytest.mark.parametrize("name", MEAN_BOUNDS)
@seeded
@given(unit_samples, small_deltas)
def test_a_bound_is_at_least_the_mean(name: str, x: np.ndarray, delta: float) -> None:
    assert MEAN_BOUNDS[name](x, delta, 0, 1) >= x.mean() - 1e-12


@seeded
@given(unit_samples, deltas, st.sampled_from([1.0, 1.5, 8.0]))
def test_the_hoeffding_bentkus_bound_is_at_most_the_cap(
    x: np.ndarray, delta: float, upper: float
) -> None:
    # Hoeffding's and Bernstein's formulas leave the range where n is small, and are not cut.
    assert hoeffding_bentkus_upper(x, delta, 0, upper) <= upper
    assert hoeffding_bentkus_upper(np.full(4, upper), delta, 0, upper) == upper


@pytest.mark.parametrize("name", ["hoeffding", "hoeffding_bentkus"])
@seeded
@given(unit_samples, small_deltas, st.data())
def test_bounds_through_the_sum_alone_rise_with_every_cost(
    name: str, x: np.ndarray, delta: float, data: st.DataObject
) -> None:
    # Not so for student_t, hall_t, empirical_bernstein: a larger smallest cost leaves less spread.
    worse = x.copy()
    index = data.draw(st.integers(0, x.size - 1))
    worse[index] += data.draw(st.integers(0, 16)) / 16 * (1 - x[index])
    bound = MEAN_BOUNDS[name]
    assert bound(worse, delta, 0, 1) >= bound(x, delta, 0, 1) - 1e-11


def test_a_bound_through_the_spread_can_fall_as_a_cost_rises() -> None:
    x, worse = [0.0] + [0.5] * 300, [0.5] * 299 + [0.5, 0.51]
    for name in ("student_t", "hall_t", "empirical_bernstein"):
        assert MEAN_BOUNDS[name](worse, 0.05, 0, 1) < MEAN_BOUNDS[name](x, 0.05, 0, 1)


@pytest.mark.parametrize("name", MEAN_BOUNDS)
@seeded
@given(unit_samples, small_deltas, st.randoms(use_true_random=False))
def test_a_bound_does_not_depend_on_the_order_of_prompts(
    name: str, x: np.ndarray, delta: float, random
) -> None:
    shuffled = x.tolist()
    random.shuffle(shuffled)
    bound = MEAN_BOUNDS[name]
    assert bound(shuffled, delta, 0, 1) == pytest.approx(bound(x, delta, 0, 1), rel=1e-7)


@pytest.mark.parametrize("name", MEAN_BOUNDS)
@pytest.mark.parametrize("value", [-1.0, 0.0, 0.3, 0.9])
@pytest.mark.parametrize("n", [2, 5, 60, 400])
def test_equal_costs_never_say_more_than_that_harm_was_not_drawn(
    name: str, value: float, n: int
) -> None:
    # The cost may be the cap with probability p: not seen with probability (1 - p)^n > δ.
    for delta in (0.001, 0.05, 0.5):
        least = value + (1 - value) * (1 - delta ** (1 / n))
        assert MEAN_BOUNDS[name](np.full(n, value), delta, -1, 1) >= least - 1e-12


# -- exact error by enumeration --------------------------------------------------------------------


def every_multiset(support: tuple[float, ...], n: int) -> tuple[np.ndarray, np.ndarray]:
    """All samples of n up to their order (S, n), and their counts (S, len(support))."""
    index = np.array(list(itertools.combinations_with_replacement(range(len(support)), n)))
    counts = (index[:, :, None] == np.arange(len(support))).sum(axis=1)
    return np.array(support)[index], counts


def laws(size: int) -> np.ndarray:
    """Probabilities of a support, in twentieths and around rare outcomes."""
    steps = itertools.product([0.002, 0.02, *np.arange(1, 20) / 20], repeat=size - 1)
    return np.array([(1 - sum(law), *law) for law in steps if sum(law) < 1])


@pytest.mark.parametrize("delta", [0.02, 0.2, 0.5])
@pytest.mark.parametrize("name", RANGE_BOUNDS)
@pytest.mark.parametrize("support", [(0.0, 1.0), (0.0, 0.5, 1.0), (0.0, 0.01, 1.0)])
def test_over_all_samples_an_exact_bound_misses_as_seldom_as_granted(
    support: tuple[float, ...], name: str, delta: float
) -> None:
    x, counts = every_multiset(support, 8)
    uppers = np.array([RANGE_BOUNDS[name](row, delta, 0, 1) for row in x])
    for law in laws(len(support)):
        missed = uppers < law @ support
        assert stats.multinomial.pmf(counts, 8, law)[missed].sum() <= delta


@pytest.mark.parametrize("delta", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("name", RANGE_BOUNDS)
@pytest.mark.parametrize("n", [30, 200])
def test_over_all_counts_of_harm_an_exact_bound_misses_as_seldom_as_granted(
    n: int, name: str, delta: float
) -> None:
    harms = np.arange(n + 1)
    uppers = np.array([RANGE_BOUNDS[name](np.arange(n) < h, delta, 0, 1) for h in harms])
    # The worst rates lie just above a bound: there the error comes as close to delta as it can.
    rates = np.minimum(uppers[uppers < 1] + 1e-9, 1 - 1e-12)
    pmf = stats.binom.pmf(harms[None, :], n, rates[:, None])
    errors = np.where(uppers[None, :] < rates[:, None], pmf, 0.0).sum(axis=1)
    assert errors.max() <= delta
    if name == "hoeffding_bentkus":
        assert errors.max() > delta / 6  # a factor e, at most, is given away


def test_over_all_samples_student_t_and_hall_miss_rare_severe_harm_many_times_too_often() -> None:
    # What an exact bound would not do: the enumeration above would find it out.
    support, delta = (0.0, 0.01, 1.0), 0.05
    x, counts = every_multiset(support, 8)
    law = np.array([0.49, 0.49, 0.02])
    probability = stats.multinomial.pmf(counts, 8, law)
    for bound in (student_t_upper, hall_t_upper):
        uppers = np.array([bound(row, delta) for row in x])
        assert probability[uppers < law @ support].sum() > 10 * delta


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


@pytest.mark.parametrize("n", [1, 4, 40, 300])
def test_clopper_pearson_solves_the_binomial_tail(n: int) -> None:
    for harmful in {0, 1 % n, n // 5, n // 2, n - 1}:
        for delta in (0.001, 0.05, 0.5):
            slow = where_it_turns(lambda p: binomial_cdf(harmful, n, p) <= delta, 0.0, 1.0)  # noqa: B023
            assert clopper_pearson_upper(harmful, n, delta) == pytest.approx(slow, abs=1e-9)


def test_clopper_pearson_stays_below_one_where_delta_is_tiny() -> None:
    # 1 - δ is 1 in float64; the bound 1 - δ^(1/n) is not.
    assert clopper_pearson_upper(0, 1000, 1e-30) == pytest.approx(1 - 1e-30 ** (1 / 1000))


# -- quantiles -------------------------------------------------------------------------------------


def test_wilks_needs_59_costs_for_a_95_percent_bound_on_the_95_percent_quantile() -> None:
    x = np.random.default_rng(0).normal(size=59)
    assert quantile_upper(x, 0.05, 0.95) == x.max()
    assert quantile_upper(x[:58], 0.05, 0.95) == math.inf


@pytest.mark.parametrize("q", [0.06, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("delta", [0.001, 0.05, 0.5])
def test_the_quantile_bound_is_the_first_order_statistic_that_is_likely_enough(
    q: float, delta: float
) -> None:
    for n in (1, 2, 7, 60, 300):
        x = np.random.default_rng(n).normal(size=n)
        ranks = [r for r in range(1, n + 1) if binomial_cdf(r - 1, n, q) >= 1 - delta]
        expected = sorted(x)[ranks[0] - 1] if ranks else math.inf
        assert quantile_upper(x, delta, q) == expected


@pytest.mark.parametrize("q", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("delta", [0.02, 0.2, 0.5])
def test_over_all_samples_the_quantile_bound_misses_as_seldom_as_granted(
    q: float, delta: float
) -> None:
    support = (0.0, 0.5, 1.0)
    x, counts = every_multiset(support, 8)
    uppers = np.array([quantile_upper(row, delta, q) for row in x])
    for law in laws(3):
        quantile = support[int(np.argmax(np.cumsum(law) >= q - 1e-12))]
        missed = uppers < quantile
        assert stats.multinomial.pmf(counts, 8, law)[missed].sum() <= delta


@seeded
@given(samples, small_deltas, st.floats(0.01, 0.99), st.data())
def test_the_quantile_bound_rises_with_every_cost_with_confidence_and_with_q(
    x: np.ndarray, delta: float, q: float, data: st.DataObject
) -> None:
    before = quantile_upper(x, delta, q)
    worse = x.copy()
    worse[data.draw(st.integers(0, x.size - 1))] += data.draw(st.integers(0, 1000))
    assert quantile_upper(worse, delta, q) >= before
    assert quantile_upper(x, delta / 2, q) >= before
    assert quantile_upper(x, delta, (1 + q) / 2) >= before
    assert quantile_upper(2 * x + 3, delta, q) == 2 * before + 3
    assert quantile_upper(x[::-1], delta, q) == before


@pytest.mark.parametrize("q", [0, 1, -0.5, 1.5, math.nan])
def test_a_quantile_outside_zero_and_one_is_refused(q: float) -> None:
    with pytest.raises(InputError, match=rf"a quantile lies in \(0, 1\), got {q}"):
        quantile_upper([1.0, 2.0], 0.05, q)


# -- the worst share -------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.25, 1.0])
def test_the_tail_costs_average_to_the_worst_share_at_the_best_eta_and_above_at_any_other(
    alpha: float,
) -> None:
    population = np.sort(np.random.default_rng(3).gamma(0.5, size=1000))
    worst = population[1000 - round(alpha * 1000) :]
    assert tail_costs(population, alpha, worst[0]).mean() == pytest.approx(worst.mean())
    for eta in np.quantile(population, np.linspace(0, 1, 41)) + 0.001:
        assert tail_costs(population, alpha, eta).mean() >= worst.mean() - 1e-12


def test_the_bound_on_the_worst_share_is_a_mean_bound_on_the_tail_costs() -> None:
    # α = 1/2, η = 2: costs 0, 2, 3, 6 become 2, 2, 4, 10.
    assert tail_costs([0, 2, 3, 6], 0.5, 2.0).tolist() == [2, 2, 4, 10]
    x, tail = [0, 2, 3, 6], [2, 2, 4, 10]
    assert cvar_upper(x, 0.1, 0.5, 2.0) == hall_t_upper(tail, 0.1)
    assert cvar_upper(x, 0.1, 0.5, 2.0, student_t_upper) == student_t_upper(tail, 0.1)
    assert cvar_upper(x, 0.1, 1.0, -1.0, student_t_upper) == student_t_upper(x, 0.1)


def test_over_all_samples_the_bound_on_the_worst_share_misses_as_seldom_as_granted() -> None:
    support, alpha, delta = (0.0, 0.5, 1.0), 0.4, 0.3
    x, counts = every_multiset(support, 8)
    for eta in (0.0, 0.5, 0.7):
        cap = eta + (1 - eta) / alpha

        def bound(z: np.ndarray, delta: float, eta: float = eta, cap: float = cap) -> float:
            return hoeffding_bentkus_upper(z, delta, eta, cap)

        uppers = np.array([cvar_upper(row, delta, alpha, eta, bound) for row in x])
        for law in laws(3):
            worst = min(alpha, law[2]) + 0.5 * min(max(alpha - law[2], 0), law[1])
            missed = uppers < worst / alpha - 1e-12
            assert stats.multinomial.pmf(counts, 8, law)[missed].sum() <= delta


@pytest.mark.parametrize("alpha", [0, -0.1, 1.01, math.nan])
def test_a_share_outside_zero_and_one_is_refused(alpha: float) -> None:
    with pytest.raises(InputError, match=rf"lies in \(0, 1\], got {alpha}"):
        cvar_upper([1.0, 2.0], 0.05, alpha, 0.0)


@pytest.mark.parametrize("eta", [math.nan, math.inf])
def test_an_eta_that_is_not_finite_is_refused(eta: float) -> None:
    with pytest.raises(InputError, match=f"eta is a finite number, got {eta}"):
        cvar_upper([1.0, 2.0], 0.05, 0.5, eta)


# -- human labels ----------------------------------------------------------------------------------


def test_labels_alone_are_bounded_by_clopper_pearson_and_a_missing_one_is_harmful() -> None:
    assert human_rate_upper([1, 0, 0, 1, 0], None, None, 0.1) == clopper_pearson_upper(2, 5, 0.1)
    missing = [1, 0, math.nan, 0, None]
    assert human_rate_upper(missing, None, None, 0.1) == clopper_pearson_upper(3, 5, 0.1)
    assert human_rate_upper([True, False], [0.5, 0.5], [0.5] * 9, 0.1, 0.0) == (
        clopper_pearson_upper(1, 2, 0.1)
    )


@pytest.mark.parametrize("lam", [0.3, 1.0, 2.0])
@pytest.mark.parametrize(("n", "pool"), [(5, 5), (7, 20), (50, 499)])
def test_a_judge_enters_as_the_mean_of_its_own_group_of_unlabelled_scores(
    n: int, pool: int, lam: float
) -> None:
    generator = np.random.default_rng(n)
    y = (generator.random(n) < 0.3).astype(float)
    y[1] = math.nan
    f, unlabelled = generator.random(n), generator.random(pool)
    size = pool // n
    z = []
    for i in range(n):
        group = unlabelled.tolist()[i * size : (i + 1) * size]
        label = 1.0 if math.isnan(y[i]) else y[i]
        z.append(label + lam * (sum(group) / size - f[i]))
    # betting_upper is itself held against a slow gambler in test_betting.py.
    expected = min(betting_upper(z, 0.1, upper=1 + lam, lower=-lam, strategy="wsr"), 1.0)
    assert human_rate_upper(y, f, unlabelled, 0.1, lam) == pytest.approx(expected, abs=1e-9)
    assert expected < 1.0 or n < 50


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_a_perfect_judge_helps_and_a_worthless_one_does_not(rate: float) -> None:
    generator = np.random.default_rng(0)
    n, pool = 2000, 40_000
    y = (generator.permutation(n) < rate * n).astype(float)
    unlabelled = (generator.random(pool) < rate).astype(float)
    alone = human_rate_upper(y, None, None, 0.05)
    perfect = human_rate_upper(y, y, unlabelled, 0.05, 1.0)
    worthless = human_rate_upper(y, np.full(n, 0.5), np.full(pool, 0.5), 0.05, 1.0)
    assert rate < perfect < rate + 0.6 * (alone - rate)
    assert worthless > rate


@pytest.mark.parametrize("kind", ["constant", "upside down"])
def test_over_all_samples_a_worthless_judge_misses_as_seldom_as_granted(kind: str) -> None:
    # Labels and as many unlabelled responses, all enumerated; the judge sees 1 - y or nothing.
    n, delta, lam = 4, 0.4, 0.5
    rates = np.array([0.05, 0.3, 0.6, 0.9, 0.97])
    errors = np.zeros_like(rates)
    outcomes = np.array(list(itertools.product((0, 1), repeat=2 * n)))
    for outcome in outcomes:
        f = np.full(2 * n, 0.5) if kind == "constant" else 1.0 - outcome
        upper = human_rate_upper(outcome[:n], f[:n], f[n:], delta, lam)
        harmful = outcome.sum()
        errors += np.where(upper < rates, rates**harmful * (1 - rates) ** (2 * n - harmful), 0)
    assert errors.max() <= delta
    assert errors.max() > 0 or kind == "upside down"


@pytest.mark.parametrize("share", [0.5, 0.8, 0.97])
@pytest.mark.parametrize("delta", [0.05, 0.3])
def test_over_all_stratified_draws_the_weighted_bound_misses_as_seldom_as_granted(
    share: float, delta: float
) -> None:
    # 12 labels from each of two strata, whose shares of the population are `share` and the rest.
    each = 12
    weights = np.repeat([share, 1 - share], each) / 0.5
    counts = list(itertools.product(range(each + 1), repeat=2))
    uppers = np.array(
        [
            human_rate_upper(
                np.concatenate([np.arange(each) < first, np.arange(each) < second]),
                None,
                None,
                delta,
                weights=weights,
            )
            for first, second in counts
        ]
    ).reshape(each + 1, each + 1)
    assert uppers.max() <= 1.0
    grid = [0.0, 0.02, 0.1, 0.2, 0.35, 0.5, 0.8, 0.98, 1.0]
    errors = []
    for one, two in itertools.product(grid, repeat=2):
        first = stats.binom.pmf(np.arange(each + 1), each, one)
        second = stats.binom.pmf(np.arange(each + 1), each, two)
        missed = uppers < share * one + (1 - share) * two - 1e-12
        errors.append((np.outer(first, second) * missed).sum())
    assert max(errors) <= delta
    assert max(errors) > 0.02 * delta


def test_the_weighted_bound_counts_a_stratum_by_its_share_and_not_by_its_labels() -> None:
    # Half of the labels come from a stratum of 2% where everything is harmful: the rate is 0.02.
    y = np.repeat([0.0, 1.0], 200)
    weights = np.repeat([0.98, 0.02], 200) / 0.5
    assert human_rate_upper(y, None, None, 0.05) > 0.5
    assert 0.02 < human_rate_upper(y, None, None, 0.05, weights=weights) < 0.1
    # Any scale of the weights.
    assert human_rate_upper(y, None, None, 0.05, weights=50 * weights) == pytest.approx(
        human_rate_upper(y, None, None, 0.05, weights=weights)
    )


def test_equal_weights_are_the_portfolio_on_the_labels() -> None:
    y = np.array([0.0] * 28 + [1.0, math.nan])
    expected = betting_upper([0.0] * 28 + [1.0, 1.0], 0.05, upper=1, strategy="portfolio")
    assert human_rate_upper(y, None, None, 0.05, weights=[0.3] * 30) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [0, 1, 0.5]}, r"labels are 1 \(harmful\), 0 \(not\) or missing"),
        ({"labels": [0, 1, 2]}, "labels are 1"),
        ({"labels": [0, 1, -1], "lam": 0.0}, "labels are 1"),
        ({"labels": []}, r"got shape \(0,\)"),
        ({"labels": [0, 1, math.inf]}, "1 of 3 labels are not finite"),
        ({"lam": -0.1}, "lam is a finite number >= 0, got -0.1"),
        ({"lam": math.nan}, "lam is a finite number >= 0, got nan"),
        ({"lam": math.inf}, "lam is a finite number >= 0, got inf"),
        ({"scores": None}, "needs the judge's scores of labelled and unlabelled"),
        ({"unlabelled_scores": None}, "needs the judge's scores of labelled and unlabelled"),
        ({"scores": [0.1, 0.2, 1.01]}, r"scores lie in \[0, 1\]"),
        ({"scores": [0.1, -0.01, 1]}, r"scores lie in \[0, 1\]"),
        ({"unlabelled_scores": [0.1, 0.2, 0.3, 1.5]}, r"scores lie in \[0, 1\]"),
        ({"unlabelled_scores": [0.1, 0.2, 0.3, -1]}, r"scores lie in \[0, 1\]"),
        ({"scores": [0.1, math.nan, 0.2]}, "1 of 3 scores are not finite"),
        ({"scores": [0.1, 0.2]}, "got 3 labels, 2 scores, 4 unlabelled"),
        ({"unlabelled_scores": [0.1, 0.2]}, "got 3 labels, 3 scores, 2 unlabelled"),
        ({"weights": [1, 1, 1]}, "weights and a judge together"),
        ({"weights": [1, 1], "lam": 0.0}, "positive, one per label"),
        ({"weights": [1, 1, 0], "lam": 0.0}, "positive, one per label"),
        ({"weights": [1, 1, -1], "lam": 0.0}, "positive, one per label"),
        ({"weights": [1, 1, math.nan], "lam": 0.0}, "1 of 3 weights are not finite"),
        ({"delta": 0.0}, "delta is a probability of error"),
        ({"delta": 1.0, "lam": 0.0}, "delta is a probability of error"),
        ({"delta": -1, "lam": 0.0, "weights": [1, 1, 1]}, "delta is a probability of error"),
    ],
)
def test_human_labels_that_say_nothing_are_refused(change: dict, message: str) -> None:
    given = {
        "labels": [0, 1, 0],
        "scores": [0.1, 0.8, 0.2],
        "unlabelled_scores": [0.1, 0.2, 0.3, 0.4],
        "delta": 0.05,
        "lam": 0.5,
    }
    assert human_rate_upper(**given) <= 1
    assert_refused(lambda: human_rate_upper(**given | change), message)


# -- refusals --------------------------------------------------------------------------------------


def assert_refused(call: Callable, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("delta", BAD_PROBABILITIES)
def test_a_delta_outside_zero_and_one_is_refused_everywhere(delta: float) -> None:
    message = rf"delta is a probability of error and lies in \(0, 1\), got {delta}"
    for call in (
        lambda: check_delta(delta),
        lambda: student_t_factor(5, delta),
        lambda: student_t_upper([1, 2], delta),
        lambda: student_t_upper([1, 1], delta),
        lambda: hall_t_upper([1, 2], delta),
        lambda: hoeffding_upper([1, 2], delta, 0, 2),
        lambda: empirical_bernstein_upper([1, 2], delta, 0, 2),
        lambda: hoeffding_bentkus_upper([1, 2], delta, 0, 2),
        lambda: quantile_upper([1, 2], delta, 0.5),
        lambda: cvar_upper([1, 2], delta, 0.5, 1.0),
        lambda: clopper_pearson_upper(0, 5, delta),
        lambda: clopper_pearson_upper(5, 5, delta),
    ):
        assert_refused(call, message)


@pytest.mark.parametrize(("costs", "shape"), [([], r"\(0,\)"), ([[1.0, 2.0]], r"\(1, 2\)")])
def test_a_bound_needs_a_vector_of_costs(costs: list, shape: str) -> None:
    message = f"one per prompt, got shape {shape}"
    assert_refused(lambda: finite_sample(costs), message)
    for bound in MEAN_BOUNDS.values():
        assert_refused(lambda bound=bound: bound(costs, 0.05, 0, 2), message)
    assert_refused(lambda: quantile_upper(costs, 0.05, 0.5), message)
    assert_refused(lambda: cvar_upper(costs, 0.05, 0.5, 0.5), message)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_cost_that_is_not_finite_gets_no_bound(bad: float) -> None:
    costs, message = [0.0, 1.0, bad, 1.0], "1 of 4 costs are not finite"
    for bound in MEAN_BOUNDS.values():
        assert_refused(lambda bound=bound: bound(costs, 0.05, 0, 1), message)
    assert_refused(lambda: quantile_upper(costs, 0.05, 0.5), message)
    assert_refused(lambda: cvar_upper(costs, 0.05, 0.5, 0.5), message)


@pytest.mark.parametrize("name", RANGE_BOUNDS)
def test_a_cost_outside_the_declared_range_is_an_error_and_never_clipped(name: str) -> None:
    bound = RANGE_BOUNDS[name]
    assert_refused(
        lambda: bound([0.5, 1.25], 0.05, 0, 1),
        "a cost of 1.25 lies above the declared cap 1: .*never clipped",
    )
    assert_refused(
        lambda: bound([0.5, -0.25], 0.05, 0, 1),
        "a cost of -0.25 lies below the declared lower end 0",
    )
    for lower, upper in ((2.0, 2.0), (3.0, 2.0), (math.nan, 2.0), (-math.inf, 2.0)):
        assert_refused(
            lambda a=lower, b=upper: bound([1.0, 2.0], 0.05, a, b), "expected a range lower < upper"
        )
    for upper in (math.nan, math.inf):
        assert_refused(
            lambda b=upper: bound([1.0, 2.0], 0.05, 0, b), f"cap .* finite number, got {upper}"
        )


# -- speed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*MEAN_BOUNDS, "quantile", "cvar", "human"])
def test_ten_thousand_costs_take_a_blink(name: str) -> None:
    x = np.random.default_rng(0).beta(0.5, 2.0, size=10_000)
    others: dict[str, Callable] = {
        "quantile": lambda: quantile_upper(x, 0.05, 0.9),
        "cvar": lambda: cvar_upper(x, 0.05, 0.1, 0.5),
        "human": lambda: human_rate_upper(x > 0.5, x, x, 0.05, 1.0),
    }
    call = others.get(name) or (lambda: MEAN_BOUNDS[name](x, 0.05, 0, 1))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    assert min(times) < 2  # ten times what it takes: machines have slow days
