"""The bounds as objects that a constraint holds."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcrlhf.betting import betting_upper, log_wealth, portfolio_path, portfolio_running_upper
from hcrlhf.bounds import (
    clopper_pearson_upper,
    empirical_bernstein_upper,
    hall_t_upper,
    hoeffding_bentkus_upper,
    hoeffding_upper,
    student_t_upper,
)
from hcrlhf.errors import InputError
from hcrlhf.methods import (
    METHODS,
    Betting,
    Bound,
    ClopperPearson,
    EmpiricalBernstein,
    EProcess,
    HallT,
    Hoeffding,
    HoeffdingBentkus,
    Range,
    StudentT,
    method,
    resamples,
)

seeded = settings(deadline=None, derandomize=True, max_examples=50)

NOWHERE = Range()
UNIT = Range(0.0, 1.0)
WIDE = Range(-2.0, 3.0)

EVERY: list[Bound] = [
    StudentT(),
    HallT(),
    Hoeffding(),
    EmpiricalBernstein(),
    HoeffdingBentkus(),
    Betting(),
    Betting("wsr"),
    Betting("portfolio"),
    Betting("star", c=0.5),
    EProcess(),
    ClopperPearson(),
]
BETS: list[Any] = [bound for bound in EVERY if isinstance(bound, Betting | EProcess)]

deltas = st.floats(0.001, 0.999)
# Whole numbers / 8: exact in binary, so that a sample has spread or has none, and nothing between.
samples = st.lists(st.integers(-800, 800), min_size=2, max_size=30).map(
    lambda x: np.array(x, dtype=np.float64) / 8
)
spread_samples = samples.filter(lambda x: x.min() < x.max())
unit_samples = st.lists(st.integers(0, 8), min_size=2, max_size=20).map(
    lambda x: np.array(x, dtype=np.float64) / 8
)


# -- each class gives the bound of its function ----------------------------------------------------

# Few, skewed, worst last: skewness, the largest stake and the looks on the way make a difference.
COSTS = np.append(np.random.default_rng(0).exponential(0.5, size=60) - 1.5, 2.0)


@pytest.mark.parametrize(
    ("bound", "expected"),
    [
        (StudentT(), lambda x, d: student_t_upper(x, d)),
        (HallT(), lambda x, d: hall_t_upper(x, d)),
        (Hoeffding(), lambda x, d: hoeffding_upper(x, d, -2, 3)),
        (EmpiricalBernstein(), lambda x, d: empirical_bernstein_upper(x, d, -2, 3)),
        (HoeffdingBentkus(), lambda x, d: hoeffding_bentkus_upper(x, d, -2, 3)),
        (Betting(), lambda x, d: betting_upper(x, d, upper=3, lower=-2, strategy="star")),
        (Betting("wsr"), lambda x, d: betting_upper(x, d, upper=3, lower=-2, strategy="wsr")),
        (Betting("portfolio"), lambda x, d: betting_upper(x, d, upper=3, strategy="portfolio")),
        (Betting(c=0.3), lambda x, d: betting_upper(x, d, upper=3, lower=-2, c=0.3)),
        (EProcess(), lambda x, d: portfolio_running_upper(x, d, 3)),
    ],
)
@pytest.mark.parametrize("delta", [0.3, 0.01])
def test_a_class_gives_the_bound_of_its_function(
    bound: Bound, expected: Callable[..., float], delta: float
) -> None:
    assert bound.upper(COSTS, delta, WIDE) == expected(COSTS, delta)


def test_the_bounds_of_one_sample_are_all_different() -> None:
    found = [b.upper(COSTS, 0.05, WIDE) for b in EVERY if not isinstance(b, ClopperPearson)]
    assert len(set(found)) == len(found)


def test_student_t_class_gives_the_bound_of_the_function() -> None:
    assert StudentT().upper([1, 2, 3, 4], 0.1, NOWHERE) == student_t_upper([1, 2, 3, 4], 0.1)


def test_clopper_pearson_class_counts_the_ones() -> None:
    found = ClopperPearson().upper([0, 1, 0, 1, 0], 0.1, UNIT)
    assert found == clopper_pearson_upper(2, 5, 0.1)


@pytest.mark.parametrize("value", [0.5, 2.0, -1.0])
def test_clopper_pearson_class_refuses_what_is_not_a_rate(value: float) -> None:
    with pytest.raises(InputError, match="needs values 0 or 1"):
        ClopperPearson().upper([0.0, 1.0, value], 0.05, UNIT)


# -- what a bound says of itself -------------------------------------------------------------------


def test_only_the_bounds_that_hold_at_every_n_are_called_exact() -> None:
    assert {name: cls.kind for name, cls in METHODS.items()} == {
        "student_t": "asymptotic",
        "hall_t": "asymptotic",
        "hoeffding": "exact",
        "empirical_bernstein": "exact",
        "hoeffding_bentkus": "exact",
        "betting": "exact",
        "portfolio_e_process": "exact",
        "clopper_pearson": "exact",
    }


def test_student_t_is_called_asymptotic() -> None:
    assert StudentT.kind == "asymptotic"


def test_every_bound_can_be_found_by_its_name() -> None:
    assert set(METHODS.values()) == set(Bound.__subclasses__()) == {type(b) for b in EVERY}
    assert all(METHODS[bound.name] is type(bound) for bound in EVERY)


def test_only_the_e_process_may_be_looked_at_on_the_way() -> None:
    assert [type(bound) for bound in EVERY if bound.anytime] == [EProcess]


@pytest.mark.parametrize(
    ("bound", "needed"),
    [
        (StudentT(), []),
        (HallT(), []),
        (ClopperPearson(), []),
        (Hoeffding(), ["lower", "upper"]),
        (EmpiricalBernstein(), ["lower", "upper"]),
        (HoeffdingBentkus(), ["lower", "upper"]),
        (Betting(), ["lower", "upper"]),
        (Betting("wsr"), ["lower", "upper"]),
        (Betting("portfolio"), ["upper"]),
        (EProcess(), ["upper"]),
    ],
)
def test_a_bound_names_the_ends_of_the_range_that_it_lacks(bound: Bound, needed: list[str]) -> None:
    assert bound.missing(NOWHERE) == needed
    assert bound.missing(Range(0.0, None)) == [name for name in needed if name == "upper"]
    assert bound.missing(Range(None, 0.0)) == [name for name in needed if name == "lower"]
    assert bound.missing(Range(0.0, 1.0)) == []


def test_a_harm_rate_has_no_asymptotic_bound_and_a_mean_no_binomial_one() -> None:
    for bound in EVERY:
        assert ("harm_rate" in bound.estimands) == (bound.kind == "exact")
        assert ("mean" in bound.estimands) == ("cvar" in bound.estimands)
        assert ("mean" in bound.estimands) == (not isinstance(bound, ClopperPearson))


# -- the decision ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", EVERY, ids=repr)
@seeded
@given(unit_samples, st.integers(1, 15), st.sampled_from([0.01, 0.1, 0.4]))
def test_the_decision_is_the_bound_compared_with_the_threshold(
    bound: Bound, x: np.ndarray, sixteenths: int, delta: float
) -> None:
    if isinstance(bound, ClopperPearson):
        x = (x > 0.5).astype(float)
    threshold, upper = sixteenths / 16, bound.upper(x, delta, UNIT)
    if abs(upper - threshold) > 1e-9:  # a bound by search lies a little above the decision
        assert bound.passes(x, threshold, delta, UNIT) == (upper <= threshold)
    if upper < 1:
        assert bound.passes(x, upper, delta, UNIT)
        assert not bound.passes(x, upper - 1e-9, delta, UNIT)


@pytest.mark.parametrize("bound", [b for b in EVERY if b not in BETS], ids=repr)
def test_a_bound_that_is_no_bet_has_no_evidence(bound: Bound) -> None:
    assert bound.log_e_value([0.0, 1.0, 0.0], 0.5, 0.05, UNIT) is None


@pytest.mark.parametrize("strategy", ["star", "wsr", "portfolio"])
def test_the_evidence_of_a_bet_is_its_log_wealth(strategy: Any) -> None:
    found = Betting(strategy, c=0.6).log_e_value(COSTS, 1.0, 0.05, WIDE)
    assert found == log_wealth(COSTS, 1.0, 0.05, upper=3, lower=-2, strategy=strategy, c=0.6)


@pytest.mark.parametrize("bound", BETS, ids=repr)
def test_a_bet_passes_once_its_evidence_reaches_one_over_delta(bound: Bound) -> None:
    evidence = bound.log_e_value(COSTS, 0.2, 1e-9, WIDE)
    assert evidence is not None and 0 < evidence < -math.log(1e-9)
    if bound == EProcess() or bound == Betting("portfolio"):  # star and wsr bet by δ
        assert bound.passes(COSTS, 0.2, math.exp(-evidence * (1 - 1e-12)), WIDE)
        assert not bound.passes(COSTS, 0.2, math.exp(-evidence * (1 + 1e-12)), WIDE)
    assert not bound.passes(COSTS, 0.2, 1e-9, WIDE)


def test_the_wealth_of_one_harmless_cost_by_hand() -> None:
    # u = 0, m = 1/2: the portfolio's nodes average to 1/2, so 1 + c(2 - 1) averages to 1.5.
    for bound in (Betting("portfolio"), EProcess()):
        assert bound.log_e_value([0.0], 0.5, 0.5, UNIT) == pytest.approx(math.log(1.5))
        assert bound.passes([0.0], 0.5, 0.67, UNIT)  # 1/0.67 = 1.493
        assert not bound.passes([0.0], 0.5, 0.66, UNIT)  # 1/0.66 = 1.515


def test_an_e_process_that_has_once_passed_stays_passed_whatever_comes() -> None:
    harmless, then_harm = np.zeros(30), np.concatenate([np.zeros(30), np.ones(200)])
    process, fixed = EProcess(), Betting("portfolio")
    for bound in (process, fixed):
        assert bound.passes(harmless, 0.3, 0.01, UNIT)
    assert process.passes(then_harm, 0.3, 0.01, UNIT)
    assert not fixed.passes(then_harm, 0.3, 0.01, UNIT)
    assert process.upper(then_harm, 0.01, UNIT) <= process.upper(harmless, 0.01, UNIT)
    evidence = process.log_e_value(then_harm, 0.3, 0.01, UNIT)
    assert evidence == pytest.approx(portfolio_path(then_harm, 0.3, 1.0)[29])


def test_the_e_process_decides_as_any_look_so_far_would_have() -> None:
    random = np.random.default_rng(4)
    for _ in range(20):
        x = (random.random(60) < 0.15).astype(float)
        looks = [Betting("portfolio").passes(x[:k], 0.3, 0.1, UNIT) for k in range(1, 61)]
        found = [EProcess().passes(x[:k], 0.3, 0.1, UNIT) for k in range(1, 61)]
        assert found == [any(looks[:k]) for k in range(1, 61)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bound", EVERY, ids=repr)
def test_a_cost_that_is_not_finite_gets_no_bound(bound: Bound, bad: float) -> None:
    for call in (
        lambda x: bound.upper(x, 0.05, UNIT),
        lambda x: bound.passes(x, 0.5, 0.05, UNIT),
        lambda x: bound.forecast(x, 10, 0.05, UNIT),
    ):
        with pytest.raises(InputError, match="1 of 4 costs are not finite"):
            call([0.0, 1.0, bad, 1.0])


@pytest.mark.parametrize("bound", [b for b in EVERY if b.needs], ids=repr)
def test_a_cost_above_the_cap_is_an_error_and_never_clipped(bound: Bound) -> None:
    message = "a cost of 1.01 lies above the declared cap 1: .* costs are never clipped"
    costs = [0.0, 0.5, 1.01]
    for call in (
        lambda: bound.upper(costs, 0.05, UNIT),
        lambda: bound.passes(costs, 0.5, 0.05, UNIT),
    ):
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


# -- forecasts -------------------------------------------------------------------------------------


def test_student_t_forecast_takes_the_spread_from_here_and_the_number_from_there() -> None:
    # Mean 2.5, s = sqrt(5/3) of four values; the quantile is that of 101 prompts, t = 1.6602.
    expected = 2.5 + math.sqrt(5 / 3) * 1.6602 / math.sqrt(101)
    found = StudentT().forecast([1, 2, 3, 4], 101, 0.05, NOWHERE)
    assert found == pytest.approx(expected, abs=1e-5)


@seeded
@given(spread_samples, deltas)
def test_a_forecast_for_the_same_number_of_prompts_is_the_bound(
    x: np.ndarray, delta: float
) -> None:
    found = StudentT().forecast(x, x.size, delta, NOWHERE)
    assert found == pytest.approx(student_t_upper(x, delta))
    harmful = (x > 0).astype(float)
    expected = ClopperPearson().upper(harmful, delta, UNIT)
    assert ClopperPearson().forecast(harmful, x.size, delta, UNIT) == pytest.approx(expected)


def test_a_sample_without_spread_forecasts_no_finite_t_bound_either() -> None:
    for bound in (StudentT(), HallT()):
        assert bound.forecast([1.0, 1.0, 1.0], 100, 0.05, NOWHERE) == math.inf


@pytest.mark.parametrize(
    ("harmful", "seen", "n", "expected"),
    [(1, 3, 10, 4), (0, 3, 10, 0), (3, 3, 10, 10), (2, 4, 10, 5), (1, 1000, 10, 1)],
)
def test_clopper_pearson_forecast_rounds_the_number_of_harmful_responses_up(
    harmful: int, seen: int, n: int, expected: int
) -> None:
    values = np.arange(seen) < harmful
    forecast = ClopperPearson().forecast(values, n, 0.05, UNIT)
    assert forecast == clopper_pearson_upper(expected, n, 0.05)


def test_forecasts_of_equal_costs_by_hand() -> None:
    # L = ln 20 = 2.99573 and ln 40 = 3.68888; 401 prompts forecast from 3.
    half = [0.5, 0.5, 0.5]
    hoeffding = Hoeffding().forecast(half, 401, 0.05, WIDE)
    assert hoeffding == pytest.approx(0.5 + 5 * math.sqrt(2.99573 / 802), abs=1e-5)
    bernstein = EmpiricalBernstein().forecast(half, 401, 0.05, WIDE)
    assert bernstein == pytest.approx(0.5 + 7 * 5 * 3.68888 / 1200, abs=1e-5)
    # No harm at all among n: (1 - m)^n = δ.
    bentkus = HoeffdingBentkus().forecast([0.0, 0.0], 401, 0.05, UNIT)
    assert bentkus == pytest.approx(1 - 0.05 ** (1 / 401), abs=1e-9)


@pytest.mark.parametrize("bound", BETS, ids=repr)
def test_a_bet_forecasts_from_equal_costs_the_bound_of_n_such_costs(bound: Bound) -> None:
    found = bound.forecast([0.25, 0.25], 120, 0.05, UNIT)
    assert found == bound.upper(np.full(120, 0.25), 0.05, UNIT)


@pytest.mark.parametrize("bound", EVERY, ids=repr)
def test_a_forecast_lies_in_the_middle_of_the_bounds_that_tests_would_find(bound: Bound) -> None:
    # Between their quartiles: the median of 25 has a standard error of a quarter of a σ.
    random = np.random.default_rng(7)
    seen = random.beta(0.5, 2.0, size=300)
    if isinstance(bound, ClopperPearson):
        seen = (seen > 0.5).astype(float)
    found = [bound.upper(random.choice(seen, 150), 0.05, UNIT) for _ in range(200)]
    low, high = np.quantile(found, [0.25, 0.75])
    assert low <= bound.forecast(seen, 150, 0.05, UNIT) <= high
    # More prompts, a better bound; and the same call says the same.
    assert bound.forecast(seen, 600, 0.05, UNIT) < bound.forecast(seen, 150, 0.05, UNIT)
    assert bound.forecast(seen, 99, 0.05, UNIT) == bound.forecast(seen, 99, 0.05, UNIT)


def test_resamples_are_drawn_with_replacement_from_all_values_and_always_the_same() -> None:
    drawn = resamples([1.0, 2.0, 3.0], 3, 200)
    assert len(drawn) == 200 and all(s.shape == (3,) for s in drawn)
    assert {tuple(sorted(s)) for s in drawn} == {
        (a, b, c) for a in (1, 2, 3) for b in (1, 2, 3) for c in (1, 2, 3) if a <= b <= c
    }
    for one, other in zip(drawn, resamples([1.0, 2.0, 3.0], 3, 200), strict=True):
        np.testing.assert_array_equal(one, other)


# -- by name ---------------------------------------------------------------------------------------


def test_a_bound_is_made_by_name_and_options() -> None:
    assert method("betting", {"strategy": "wsr", "c": 0.5}) == Betting("wsr", 0.5)
    assert method("betting") == method("betting", {}) == Betting("star", 0.75)
    assert method("hall_t", None) == HallT()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("student", {}, "no bound 'student'; expected one of student_t, hall_t, hoeffding, "),
        ("", {}, "no bound ''"),
        ("student_t", {"c": 0.5}, r"student_t does not take these options: {'c': 0.5}"),
        ("betting", {"stake": 1}, "betting does not take these options"),
        ("betting", {"strategy": "kelly"}, "strategy is star, wsr or portfolio, got 'kelly'"),
        ("betting", {"c": 0.0}, "largest share of the wealth to stake, got 0.0"),
        ("betting", {"c": 1}, "largest share of the wealth to stake, got 1"),
        ("betting", {"c": math.nan}, "largest share of the wealth to stake, got nan"),
        ("betting", {"c": "0.5"}, "betting does not take these options"),
    ],
)
def test_an_unknown_bound_or_option_is_refused_in_one_line(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        method(name, options)
    assert "\n" not in str(caught.value)
