"""Bounds by betting against a slow second reading of the formulas, and against exact sums."""

import itertools
import math
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from hcrlhf.betting import (
    STRATEGIES,
    betting_upper,
    log_wealth,
    portfolio_path,
    portfolio_running_upper,
)
from hcrlhf.errors import InputError

seeded = settings(deadline=None, derandomize=True, max_examples=40)

deltas = st.floats(0.001, 0.5)
# Sixteenths, exact in binary: a shift or a scale by whole numbers then changes no digit.
samples = st.lists(st.integers(0, 16), min_size=1, max_size=25).map(lambda x: np.array(x) / 16)
ADAPTIVE = ("star", "wsr")


# -- a second implementation -----------------------------------------------------------------------


def variances_before(u: list[float]) -> list[float]:
    """v_0 .. v_{n-1}: of the costs seen so far and one fake cost of 1/2 with variance 1/4."""
    total, squares, out = 0.5, 0.25, []
    for seen, value in enumerate(u, start=1):
        out.append(squares / seen)
        total += value
        squares += (value - total / (seen + 1)) ** 2
    return out


def slowly_rejected(u: list[float], m: float, delta: float, strategy: str, c: float) -> bool:
    """One gamble after the other, the wealth itself rather than its logarithm."""
    wealth, n = 1.0, len(u)
    for past, (value, v) in enumerate(zip(u, variances_before(u), strict=True)):
        if strategy == "wsr":
            bet = math.sqrt(2 * math.log(1 / delta) / (n * v))
        else:  # what is still to be won, over the n - past costs still to come
            bet = math.sqrt(2 * max(math.log(1 / (delta * wealth)), 0) / ((n - past) * v))
        wealth *= 1 - min(bet, c / (1 - m)) * (value - m)
        if wealth >= 1 / delta:
            return True
    return False


def slow_portfolio_wealths(x: np.ndarray, m: float, upper: float) -> np.ndarray:
    """The wealth after every cost: the mean over 64 constant bets of their plain products."""
    share = (1 - np.cos((2 * np.arange(64) + 1) * math.pi / 128)) / 2  # sin² by the half angle
    with np.errstate(over="ignore"):  # a wealth of infinity is large enough
        factors = 1 - share[:, None] + share[:, None] * ((upper - x) / (upper - m))[None, :]
        return np.cumprod(factors, axis=1).sum(axis=0) / 64


def last_accepted(rejected: Callable[[float], bool], low: float, high: float) -> float:
    if low == high:
        return high
    for _ in range(44):
        middle = (low + high) / 2
        low, high = (low, middle) if rejected(middle) else (middle, high)
    return high


def slow_upper(
    x: np.ndarray, delta: float, lower: float, upper: float, strategy: str, c: float = 0.75
) -> float:
    if strategy == "portfolio":
        return last_accepted(
            lambda m: slow_portfolio_wealths(x, m, upper)[-1] >= 1 / delta, x.min(), upper
        )
    u = ((x - lower) / (upper - lower)).tolist()
    m = last_accepted(lambda m: slowly_rejected(u, m, delta, strategy, c), min(u), 1.0)
    return lower + (upper - lower) * m


def shaped_costs(shape: str, n: int, lower: float, upper: float) -> np.ndarray:
    generator = np.random.default_rng([n, len(shape)])
    u = {
        "bathtub": generator.beta(0.3, 0.6, size=n),
        "rare harm": (generator.random(n) < 0.05).astype(float),
        "narrow": generator.uniform(0.4, 0.45, size=n),
        "rising": np.sort(generator.random(n)),
        "no harm": np.full(n, 0.25),
        "mostly harm": 1 - 0.9 * (generator.random(n) < 0.1),
    }[shape]
    return lower + (upper - lower) * u


SHAPES = ("bathtub", "rare harm", "narrow", "rising", "no harm", "mostly harm")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("lower", "upper"), [(0.0, 1.0), (-3.0, 2.0)])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bound_is_what_a_slow_gambler_finds(
    shape: str, lower: float, upper: float, strategy: str
) -> None:
    for n, delta in itertools.product((2, 3, 10, 51, 300), (0.001, 0.05, 0.5)):
        x = shaped_costs(shape, n, lower, upper)
        fast = betting_upper(x, delta, upper=upper, lower=lower, strategy=strategy)
        slow = slow_upper(x, delta, lower, upper, strategy)
        assert fast == pytest.approx(slow, abs=1e-9 * (upper - lower)), (n, delta)


@pytest.mark.parametrize("strategy", ADAPTIVE)
@pytest.mark.parametrize("c", [0.1, 0.5, 0.9])
def test_the_largest_stake_can_be_set(strategy: str, c: float) -> None:
    for shape in ("bathtub", "no harm"):
        x = shaped_costs(shape, 40, 0.0, 1.0)
        fast = betting_upper(x, 0.05, upper=1.0, lower=0.0, strategy=strategy, c=c)
        assert fast == pytest.approx(slow_upper(x, 0.05, 0.0, 1.0, strategy, c), abs=1e-9)


def test_the_default_is_star_with_three_quarters_at_stake() -> None:
    x = shaped_costs("no harm", 40, 0.0, 1.0)  # here the stake of 3/4 binds
    assert betting_upper(x, 0.05, upper=1, lower=0) == pytest.approx(
        slow_upper(x, 0.05, 0.0, 1.0, "star", 0.75), abs=1e-9
    )
    assert log_wealth(x, 0.5, 0.05, upper=1, lower=0) == log_wealth(
        x, 0.5, 0.05, upper=1, lower=0, strategy="star", c=0.75
    )


@pytest.mark.parametrize("strategy", ADAPTIVE)
def test_one_cost_by_hand(strategy: str) -> None:
    # The first bet is c/(1 - m): √(2 ln 2 / ¼) = 2.35 is more than 0.75/(1 - m) below m = 0.68.
    # A cost of 0 multiplies the wealth by 1 + 0.75 m/(1 - m) = 2 at m = 4/7.
    assert betting_upper([0.0], 0.5, upper=1, lower=0, strategy=strategy) == pytest.approx(4 / 7)
    at_one_half = log_wealth([0.0], 0.5, 0.5, upper=1, lower=0, strategy=strategy)
    assert at_one_half == pytest.approx(math.log(1.75))


def test_two_costs_by_hand() -> None:
    # L = ln 1.2, costs 0.5, 0.5 at m = 0.6. Before the first v = 1/4, after it v = (1/4)/2 = 1/8.
    goal = math.log(1.2)
    first = math.log(1 + 0.1 * math.sqrt(2 * goal / (2 / 4)))
    wsr = first + math.log(1 + 0.1 * math.sqrt(2 * goal / (2 / 8)))
    star = first + math.log(1 + 0.1 * math.sqrt(2 * (goal - first) / (1 / 8)))
    for strategy, expected in (("wsr", wsr), ("star", star)):
        found = log_wealth([0.5, 0.5], 0.6, 1 / 1.2, upper=1, lower=0, strategy=strategy)
        assert found == pytest.approx(expected, rel=1e-12)


def test_the_portfolio_of_one_harmless_cost_by_hand() -> None:
    # The 64 bets are ½ on average, so the wealth after a cost of 0 is ½ + ½/(1 - m) = 20 at 38/39.
    assert betting_upper([0.0], 0.05, upper=1, strategy="portfolio") == pytest.approx(38 / 39)
    assert portfolio_path([0.0], 38 / 39, 1.0) == pytest.approx([math.log(20)])


@pytest.mark.parametrize(("harmful", "n"), [(0, 1), (1, 5), (4, 40), (60, 120), (0, 120)])
def test_the_portfolio_of_harms_is_covers_mixture_in_closed_form(harmful: int, n: int) -> None:
    # 64 midpoints of the arcsine law integrate every polynomial up to degree 127 exactly, so the
    # wealth is the integral of (1 - c)^h (1 + c m/(1 - m))^(n - h) over that law (Euler).
    for m in (0.05, 0.3, 0.8):
        euler = special.hyp2f1(harmful - n, 0.5, harmful + 1, -m / (1 - m))
        expected = math.log(special.beta(0.5, harmful + 0.5) / math.pi * euler)
        x = np.arange(n) < harmful
        found = log_wealth(x, m, 0.05, upper=1, strategy="portfolio")
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_portfolios_path_is_the_wealth_after_every_cost(shape: str) -> None:
    x = shaped_costs(shape, 120, -3.0, 2.0)
    for mean in (-2.5, -1.0, 0.5, 1.9):
        expected = np.log(slow_portfolio_wealths(x, mean, 2.0))
        np.testing.assert_allclose(portfolio_path(x, mean, 2.0), expected, rtol=1e-9, atol=1e-9)
        terminal = log_wealth(x, mean, 0.05, upper=2.0, strategy="portfolio")
        assert terminal == pytest.approx(expected[-1], rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_running_bound_is_the_best_bound_of_all_looks(shape: str) -> None:
    x = shaped_costs(shape, 40, -3.0, 2.0)
    looks = [slow_upper(x[:t], 0.05, -3.0, 2.0, "portfolio") for t in range(1, 41)]
    assert portfolio_running_upper(x, 0.05, 2.0) == pytest.approx(min(looks), abs=5e-9)


# -- exact error by enumeration --------------------------------------------------------------------

# Two outcomes, a middle one, and rare severe harm among small differences.
SUPPORTS = {(0.0, 1.0): 8, (0.0, 0.5, 1.0): 4, (0.0, 0.01, 1.0): 4}


def every_sample(support: tuple[float, ...], n: int) -> tuple[np.ndarray, np.ndarray]:
    """All len(support)^n samples (S, n), and how often each value of the support is in them."""
    index = np.array(list(itertools.product(range(len(support)), repeat=n)))
    counts = (index[:, :, None] == np.arange(len(support))).sum(axis=1)
    return np.array(support)[index], counts


def laws(support: tuple[float, ...], uppers: np.ndarray) -> np.ndarray:
    """Probabilities of the support: a grid, and laws whose mean is just above each bound."""
    k = len(support)
    steps = itertools.product(np.arange(1, 13) / 13, repeat=k)
    grid = [law for law in steps if math.isclose(sum(law), 1)]
    tight = [u + 1e-9 for u in np.unique(uppers.round(12)) if u + 1e-9 < 1]
    if k == 2:
        return np.array(grid + [(1 - p, p) for p in tight])
    mixed = [
        (1 - q - p, q, p) for q in (1e-6, 0.1, 0.6) for u in tight for p in [u - q * support[1]]
    ]
    return np.array(grid + [law for law in mixed if min(law) > 0])


def of_samples(law: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.prod(law[None, :] ** counts, axis=1)


@pytest.mark.parametrize("delta", [0.02, 0.2, 0.5])
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("strategy", [*STRATEGIES, "running"])
def test_over_all_samples_the_bound_misses_the_true_mean_as_seldom_as_granted(
    strategy: str, support: tuple[float, ...], delta: float
) -> None:
    x, counts = every_sample(support, SUPPORTS[support])
    if strategy == "running":
        uppers = np.array([portfolio_running_upper(row, delta, 1.0) for row in x])
    else:
        uppers = np.array(
            [betting_upper(row, delta, upper=1, lower=0, strategy=strategy) for row in x]
        )
    errors = []
    for law in laws(support, uppers):
        missed = uppers < law @ support
        errors.append(of_samples(law, counts)[missed].sum())
    assert max(errors) <= delta
    if delta == 0.5:
        assert max(errors) > 0.05  # the enumeration does reach samples that are missed


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_over_all_samples_the_decision_at_the_true_mean_errs_as_seldom_as_granted(
    strategy: str,
) -> None:
    for support, delta in itertools.product(SUPPORTS, (0.05, 0.3)):
        x, counts = every_sample(support, SUPPORTS[support])
        for law in laws(support, np.array([0.1, 0.3, 0.5, 0.7, 0.9]))[::7]:
            mean = float(law @ support)
            wealth = [
                log_wealth(row, mean, delta, upper=1, lower=0, strategy=strategy) for row in x
            ]
            passed = np.array(wealth) >= -math.log(delta)
            assert of_samples(law, counts)[passed].sum() <= delta


@pytest.mark.parametrize("support", SUPPORTS)
def test_over_all_samples_the_portfolio_at_the_true_mean_is_a_fair_game(
    support: tuple[float, ...],
) -> None:
    # A martingale of mean 1 at every look, whose largest value is as rarely large as Ville says.
    x, counts = every_sample(support, SUPPORTS[support])
    for law in laws(support, np.array([0.02, 0.3, 0.9]))[::9]:
        mean = float(law @ support)
        probability = of_samples(law, counts)
        paths = np.array([portfolio_path(row, mean, 1.0) for row in x])
        np.testing.assert_allclose(probability @ np.exp(paths), 1.0, rtol=1e-12)
        for delta in (0.02, 0.1, 0.3, 0.5):
            ever = paths.max(axis=1) >= -math.log(delta)
            assert probability[ever].sum() <= delta


@pytest.mark.parametrize("n", [30, 200])
@pytest.mark.parametrize("delta", [0.01, 0.05, 0.3])
def test_the_portfolio_of_many_harms_misses_as_seldom_as_granted(n: int, delta: float) -> None:
    # Free of order, so that the number of harms says all: exact, at rates just above each bound.
    uppers = np.array(
        [
            betting_upper(np.arange(n) < h, delta, upper=1, strategy="portfolio")
            for h in range(n + 1)
        ]
    )
    rates = np.minimum(uppers[:-1] + 1e-9, 1 - 1e-12)
    pmf = stats.binom.pmf(np.arange(n + 1)[None, :], n, rates[:, None])
    errors = np.where(uppers[None, :] < rates[:, None], pmf, 0.0).sum(axis=1)
    assert delta / 50 < errors.max() <= delta


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_hundred_prompts_with_rare_severe_harm_err_as_seldom_as_granted(strategy: str) -> None:
    # Where Student-t passes in a third of all cases: harm of 1 once in 100, else about 0.
    generator = np.random.default_rng(5)
    repeats, delta = 1000, 0.1
    harm = generator.random((repeats, 100)) < 0.01
    x = np.where(harm, 1.0, generator.uniform(0, 0.01, size=harm.shape))
    mean = 0.01 + 0.99 * 0.005
    passes = sum(
        log_wealth(row, mean, delta, upper=1, lower=0, strategy=strategy) >= -math.log(delta)
        for row in x
    )
    assert passes <= stats.binom.ppf(1 - 1e-6, repeats, delta)


# -- properties ------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@seeded
@given(samples, deltas, deltas)
def test_the_bound_falls_as_more_error_is_granted(
    strategy: str, x: np.ndarray, one: float, two: float
) -> None:
    strict, lax = sorted((one, two))
    upper = [betting_upper(x, d, upper=1, lower=0, strategy=strategy) for d in (strict, lax)]
    assert upper[0] >= upper[1] - 1e-11


@pytest.mark.parametrize("strategy", STRATEGIES)
@seeded
@given(samples, deltas, st.integers(-40, 40), st.sampled_from([0.125, 1, 3, 64]))
def test_the_bound_shifts_and_scales_with_costs_and_range(
    strategy: str, x: np.ndarray, delta: float, shift: int, scale: float
) -> None:
    still = betting_upper(x, delta, upper=1.25, lower=-0.5, strategy=strategy)
    moved = betting_upper(
        scale * x + shift,
        delta,
        upper=1.25 * scale + shift,
        lower=-0.5 * scale + shift,
        strategy=strategy,
    )
    assert moved == pytest.approx(scale * still + shift, abs=1e-10 * max(scale, 1))


def test_a_cap_of_zero_is_a_cap_like_any_other() -> None:
    x = np.array([-1.0, -0.5, -0.25, 0.0])
    moved = betting_upper(x, 0.3, upper=0.0, strategy="portfolio")
    assert moved == pytest.approx(betting_upper(x + 1, 0.3, upper=1.0, strategy="portfolio") - 1)


def test_a_running_bound_under_a_cap_of_zero_is_the_shifted_one() -> None:
    x = np.array([-1.0, -0.5, -0.25, 0.0])
    moved = portfolio_running_upper(x, 0.3, 0.0)
    assert moved == pytest.approx(portfolio_running_upper(x + 1, 0.3, 1.0) - 1)


@pytest.mark.parametrize("strategy", STRATEGIES)
@seeded
@given(samples, deltas)
def test_the_bound_lies_between_the_smallest_cost_and_the_cap(
    strategy: str, x: np.ndarray, delta: float
) -> None:
    assert x.min() <= betting_upper(x, delta, upper=1.5, lower=0, strategy=strategy) <= 1.5


@seeded
@given(samples, deltas)
def test_the_portfolios_bound_is_at_least_the_mean(x: np.ndarray, delta: float) -> None:
    # Not so for star, wsr and the running portfolio, which may reach 1/δ before the harm comes.
    assert betting_upper(x, delta, upper=1, strategy="portfolio") >= x.mean()


@pytest.mark.parametrize("strategy", [*STRATEGIES, "running"])
@pytest.mark.parametrize("value", [-1.0, 0.0, 0.3, 0.9])
@pytest.mark.parametrize("n", [1, 5, 60, 400])
def test_equal_costs_never_say_more_than_that_harm_was_not_drawn(
    strategy: str, value: float, n: int
) -> None:
    # The cost may be the cap with probability p: not seen with probability (1 - p)^n > δ.
    x = np.full(n, value)
    for delta in (0.001, 0.05, 0.5):
        least = value + (1 - value) * (1 - delta ** (1 / n))
        if strategy == "running":
            assert portfolio_running_upper(x, delta, 1.0) >= least
        else:
            assert betting_upper(x, delta, upper=1, lower=-1, strategy=strategy) >= least


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_costs_at_the_cap_are_bounded_by_the_cap(strategy: str) -> None:
    assert betting_upper([1.0] * 9, 0.05, upper=1, lower=0, strategy=strategy) == 1.0
    assert betting_upper([1.0] * 9 + [0.0], 0.05, upper=1, lower=0, strategy=strategy) <= 1.0
    assert portfolio_running_upper([1.0] * 9, 0.05, 1.0) == 1.0


@seeded
@given(samples, deltas, st.data())
def test_the_portfolios_bounds_rise_with_every_cost(
    x: np.ndarray, delta: float, data: st.DataObject
) -> None:
    # Not so for star and wsr: a larger first cost leaves less variance before the later bets. With
    # x = .02 .93 .93 .88 .40 .78 .61 and δ = .05, raising .02 to .43 lowers star's U by .007.
    worse = x.copy()
    index = data.draw(st.integers(0, x.size - 1))
    worse[index] += data.draw(st.integers(0, 16)) / 16 * (1 - x[index])
    before = betting_upper(x, delta, upper=1, strategy="portfolio")
    assert betting_upper(worse, delta, upper=1, strategy="portfolio") >= before - 1e-11
    running = portfolio_running_upper(x, delta, 1.0)
    assert portfolio_running_upper(worse, delta, 1.0) >= running - 1e-11


@seeded
@given(samples, deltas, st.randoms(use_true_random=False))
def test_the_portfolio_does_not_depend_on_the_order_of_prompts(
    x: np.ndarray, delta: float, random
) -> None:
    shuffled = x.tolist()
    random.shuffle(shuffled)
    expected = betting_upper(x, delta, upper=1, strategy="portfolio")
    assert betting_upper(shuffled, delta, upper=1, strategy="portfolio") == pytest.approx(
        expected, abs=1e-11
    )
    assert log_wealth(shuffled, 0.99, delta, upper=1, strategy="portfolio") == pytest.approx(
        log_wealth(x, 0.99, delta, upper=1, strategy="portfolio"), rel=1e-12, abs=1e-12
    )


@pytest.mark.parametrize("strategy", ADAPTIVE)
def test_star_and_wsr_depend_on_the_order_of_prompts(strategy: str) -> None:
    harmless_first = [0.0] * 20 + [1.0] * 20
    first = betting_upper(harmless_first, 0.05, upper=1, lower=0, strategy=strategy)
    last = betting_upper(harmless_first[::-1], 0.05, upper=1, lower=0, strategy=strategy)
    assert first < 0.25 < 0.7 < last  # the mean is 0.5 both times


@pytest.mark.parametrize("strategy", STRATEGIES)
@seeded
@given(samples, deltas, st.sampled_from([1.0, 1.25, 4.0]))
def test_the_decision_at_a_threshold_is_the_bound_compared_with_it(
    strategy: str, x: np.ndarray, delta: float, upper: float
) -> None:
    goal = -math.log(delta)
    bound = betting_upper(x, delta, upper=upper, lower=0, strategy=strategy)

    def wealth(mean: float) -> float:
        return log_wealth(x, mean, delta, upper=upper, lower=0, strategy=strategy)

    assert wealth(bound - 1e-9) < goal
    assert bound == upper or wealth(bound) >= goal
    assert bound + 1e-9 >= upper or wealth(bound + 1e-9) >= goal
    for threshold in np.linspace(-1, upper, 15)[:-1]:
        if abs(threshold - bound) > 1e-9:
            assert (wealth(threshold) >= goal) == (bound < threshold)


@seeded
@given(samples, deltas)
def test_the_running_bound_never_grows_and_never_exceeds_the_bound_at_the_end(
    x: np.ndarray, delta: float
) -> None:
    running = [portfolio_running_upper(x[:t], delta, 1.0) for t in range(1, x.size + 1)]
    assert (np.diff(running) <= 1e-11).all()
    assert running[-1] <= betting_upper(x, delta, upper=1, strategy="portfolio") + 1e-11


@pytest.mark.parametrize("strategy", ADAPTIVE)
def test_betting_stops_once_the_goal_is_reached(strategy: str) -> None:
    # Harm that comes after the wealth reached 1/δ does not undo the decision.
    x = [0.0] * 40
    goal = -math.log(0.05)
    for costs in (x, x + [1.0] * 5):
        assert log_wealth(costs, 0.5, 0.05, upper=1, lower=0, strategy=strategy) >= goal


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_costs_below_the_lower_end_do_not_harm(strategy: str) -> None:
    x = shaped_costs("bathtub", 60, 0.0, 1.0)
    x[30:40] = -5.0
    bound = betting_upper(x, 0.05, upper=1, lower=0, strategy=strategy)
    slow = slow_upper(x, 0.05, 0.0, 1.0, strategy)
    assert bound == pytest.approx(slow, abs=1e-9 * 6)


def test_the_portfolio_needs_no_lower_end() -> None:
    x = shaped_costs("bathtub", 60, 0.0, 1.0)
    expected = betting_upper(x, 0.05, upper=1, strategy="portfolio")
    assert betting_upper(x, 0.05, upper=1, lower=-7, strategy="portfolio") == expected


@pytest.mark.parametrize("strategy", [*STRATEGIES, "running"])
def test_costs_are_taken_as_float64_however_they_come(strategy: str) -> None:
    x = np.array([0, 1, 0, 0, 0, 1, 0, 0])

    def bound(costs) -> float:
        if strategy == "running":
            return portfolio_running_upper(costs, 0.2, 1)
        return betting_upper(costs, 0.2, upper=1, lower=0, strategy=strategy)

    forms = (x, x == 1, x.astype(np.float32), x.tolist())
    assert len({bound(costs) for costs in forms}) == 1


# -- refusals --------------------------------------------------------------------------------------


def every_call(strategy: str, costs, delta=0.05, upper=1.0, lower=0.0) -> list[Callable]:
    bet = {"upper": upper, "lower": lower, "strategy": strategy}
    calls = [
        lambda: betting_upper(costs, delta, **bet),
        lambda: log_wealth(costs, 0.5, delta, **bet),
    ]
    if strategy == "portfolio":
        calls.append(lambda: portfolio_running_upper(costs, delta, upper))
    return calls


def assert_refused(call: Callable, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_costs_that_are_not_a_finite_vector_under_the_cap_are_refused(strategy: str) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        for call in every_call(strategy, [0.1, bad, 0.2]):
            assert_refused(call, "1 of 3 costs are not finite")
    for costs, shape in (([], r"\(0,\)"), ([[0.1, 0.2]], r"\(1, 2\)"), (0.5, r"\(\)")):
        for call in every_call(strategy, costs):
            assert_refused(call, f"one per prompt, got shape {shape}")
    for call in every_call(strategy, [0.1, 1.25, 0.2]):
        assert_refused(call, "a cost of 1.25 lies above the declared cap 1:.*never clipped")
    for upper in (math.nan, math.inf):
        for call in every_call(strategy, [0.1, 0.2], upper=upper):
            assert_refused(call, f"cap of the cost is a finite number, got {upper}|threshold")


def test_the_path_refuses_what_the_bound_refuses() -> None:
    assert_refused(lambda: portfolio_path([0.1, math.nan], 0.5, 1.0), "1 of 2 costs are not finite")
    assert_refused(lambda: portfolio_path([], 0.5, 1.0), r"got shape \(0,\)")
    assert_refused(lambda: portfolio_path([0.1, 3.5], 0.5, 1.0), "cost of 3.5 .* declared cap 1:")
    for mean in (1.0, 1.5, math.nan):
        call = lambda m=mean: portfolio_path([0.1], m, 1.0)  # noqa: E731
        assert_refused(call, f"below the cap 1, got {mean:g}")


@pytest.mark.parametrize("delta", [0, 1, -0.1, 5, math.nan, math.inf])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_delta_outside_zero_and_one_is_refused(strategy: str, delta: float) -> None:
    for call in every_call(strategy, [0.1, 0.2], delta=delta):
        assert_refused(call, rf"delta .* lies in \(0, 1\), got {delta}")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("mean", [1.0, 1.5, math.nan])
def test_a_threshold_at_or_above_the_cap_is_refused(strategy: str, mean: float) -> None:
    assert_refused(
        lambda: log_wealth([0.1, 0.2], mean, 0.05, upper=1, lower=0, strategy=strategy),
        f"a threshold of {mean:g} at or above the cap 1 .*expected a lower",
    )


@pytest.mark.parametrize("strategy", ADAPTIVE)
def test_star_and_wsr_refuse_a_missing_or_impossible_lower_end(strategy: str) -> None:
    for call in every_call(strategy, [0.1, 0.2], lower=None):
        assert_refused(call, f"{strategy} needs `lower`.*portfolio does without")
    for lower in (1.0, 2.0, math.nan, -math.inf):
        for call in every_call(strategy, [0.1, 0.2], lower=lower):
            assert_refused(call, "expected a range lower < upper")


@pytest.mark.parametrize("strategy", ADAPTIVE)
@pytest.mark.parametrize("c", [0, 1, -0.5, 2, math.nan])
def test_a_stake_of_nothing_or_of_everything_is_refused(strategy: str, c: float) -> None:
    assert_refused(
        lambda: betting_upper([0.1], 0.05, upper=1, lower=0, strategy=strategy, c=c),
        rf"in \(0, 1\), got {c}",
    )
    assert_refused(
        lambda: log_wealth([0.1], 0.5, 0.05, upper=1, lower=0, strategy=strategy, c=c),
        rf"in \(0, 1\), got {c}",
    )


def test_an_unknown_strategy_is_refused_with_the_list_of_known_ones() -> None:
    for call in every_call("kelly", [0.1, 0.2]):
        assert_refused(call, "strategies are star, wsr, portfolio, got 'kelly'")


# -- speed -----------------------------------------------------------------------------------------
# The limits are about ten times what was measured, since machines have slow days; work that grows
# with the square of the costs, or a Python loop over them in each bisection, exceeds them by far.


def quickest_of_three(call: Callable) -> float:
    """Seconds."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ten_thousand_costs_take_a_blink(strategy: str) -> None:
    x = np.random.default_rng(0).beta(0.5, 2.0, size=10_000)
    bet = {"upper": 1, "lower": 0, "strategy": strategy}
    assert quickest_of_three(lambda: betting_upper(x, 0.05, **bet)) < 2
    assert quickest_of_three(lambda: log_wealth(x, x.mean() + 0.001, 0.05, **bet)) < 0.2


def test_the_running_portfolio_over_ten_thousand_costs_takes_a_moment() -> None:
    x = np.random.default_rng(0).beta(0.5, 2.0, size=10_000)
    assert quickest_of_three(lambda: portfolio_path(x, 0.21, 1.0)) < 1
    start = time.perf_counter()
    portfolio_running_upper(x, 0.05, 1.0)
    assert time.perf_counter() - start < 30
