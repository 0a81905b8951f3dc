"""The constraint: margins by simulation and exact sums, estimands, ranges, reachability."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hcrlhf.bounds import clopper_pearson_upper, tail_costs
from hcrlhf.constraint import Constraint, suffixes
from hcrlhf.errors import InputError
from hcrlhf.methods import (
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
)
from hcrlhf.pessimism import (
    PaperPessimism,
    bootstrap_pessimism,
    harm_rate_target,
    seldonian_pessimism,
)

seeded = settings(deadline=None, derandomize=True, max_examples=50)


def student(threshold: float = 0.0, **settings_given: Any) -> Constraint:
    """A mean judged as in the paper."""
    return Constraint("mean", threshold, bound=StudentT(), **settings_given)


def capped(threshold: float = 0.0, **settings_given: Any) -> Constraint:
    """A mean of a cost that lies in [-4, 4], as that of a squashed cost model."""
    return Constraint("mean", threshold, **{"lower": -4.0, "upper": 4.0} | settings_given)


def refusal(call: Callable[[], object]) -> str:
    """The message with which `call` refuses: one line."""
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- the margin of a mean --------------------------------------------------------------------------


def test_pessimism_by_hand() -> None:
    # t_{0.95, 100} = 1.6602 and z_{0.95} = 1.6449, both over √101.
    assert seldonian_pessimism(101, 0.05, 0.05) == pytest.approx(3.3051 / math.sqrt(101), abs=1e-5)
    # A miss probability of one half adds nothing to the bound's own factor.
    assert seldonian_pessimism(101, 0.05, 0.5) == pytest.approx(1.6602 / math.sqrt(101), abs=1e-5)


def test_pessimism_of_a_mean_known_from_validation_prompts_by_hand() -> None:
    # t_{0.95, 100} = 1.6602 for both; √(1/101 + 1/101) = √2/√101.
    expected = 1.6602 * (1 + math.sqrt(2)) / math.sqrt(101)
    assert seldonian_pessimism(101, 0.05, 0.05, 101) == pytest.approx(expected, abs=1e-5)
    known = seldonian_pessimism(101, 0.05, 0.05)
    assert seldonian_pessimism(101, 0.05, 0.05, 10**9) == pytest.approx(known, abs=1e-8)


@pytest.mark.parametrize("m", [20, 400])
def test_a_candidate_seen_at_its_target_on_validation_prompts_passes_as_often_as_promised(
    m: int,
) -> None:
    n, repeats, miss, std = 200, 5000, 0.1, 3.0
    generator = np.random.default_rng(1)
    constraint = student(0.0, safety_prompts=n, miss_probability=miss)
    pessimism = constraint.training_pessimism(1, None, m)
    # Whatever the true mean is (0 here), the threshold lies at μ̂ + k σ̂ of the m prompts.
    seen = generator.normal(0.0, std, size=(repeats, m))
    thresholds = seen.mean(axis=1) + pessimism * seen.std(axis=1, ddof=1)
    tests = generator.normal(0.0, std, size=(repeats, n))
    factor = stats.t.ppf(0.95, n - 1) / math.sqrt(n)
    passed = tests.mean(axis=1) + factor * tests.std(axis=1, ddof=1) <= thresholds
    tolerance = 4 * math.sqrt(miss * (1 - miss) / repeats) + 0.1 / m
    assert passed.mean() == pytest.approx(1 - miss, abs=tolerance)


def test_a_candidate_is_looked_at_on_at_least_two_prompts() -> None:
    for call in (
        lambda: seldonian_pessimism(100, 0.05, 0.05, 1),
        lambda: harm_rate_target(ClopperPearson(), 0.1, 100, 0.05, 0.05, 1),
        lambda: bootstrap_pessimism(Betting(), np.arange(9.0), 100, 0.05, 0.1, Range(), 0),
    ):
        with pytest.raises(InputError, match="at least 2 validation prompts, got"):
            call()


@pytest.mark.parametrize("miss", [0.05, 0.3])
@pytest.mark.parametrize("delta", [0.05, 0.2])
def test_a_policy_at_its_pessimistic_target_passes_as_often_as_promised(
    delta: float, miss: float
) -> None:
    n, repeats, threshold, std = 200, 5000, 0.7, 3.0
    pessimism = student(delta=delta, miss_probability=miss, safety_prompts=n).training_pessimism()
    mean = threshold - pessimism * std
    costs = np.random.default_rng(1).normal(mean, std, size=(repeats, n))
    constraint = student(threshold, delta=delta, safety_prompts=n)
    passed = [constraint.judge(row).passed for row in costs]
    tolerance = 4 * math.sqrt(miss * (1 - miss) / repeats)
    assert np.mean(passed) == pytest.approx(1 - miss, abs=tolerance)


@pytest.mark.parametrize("n", [50, 500, 5000])
def test_the_chance_to_pass_by_the_noncentral_t_distribution(n: int) -> None:
    # x̄ + s t/√n <= μ + kσ if and only if √n (x̄ - μ - kσ)/s <= -t: noncentral t, shifted by -k√n.
    delta, miss = 0.05, 0.1
    pessimism = seldonian_pessimism(n, delta, miss)
    t = stats.t.ppf(1 - delta, n - 1)
    chance = stats.nct.cdf(-t, n - 1, -pessimism * math.sqrt(n))
    assert chance == pytest.approx(1 - miss, abs=0.1 / n)


@pytest.mark.parametrize("estimand", ["mean", "harm_rate"])
def test_constraints_that_must_pass_together_share_the_miss_probability(estimand: Any) -> None:
    together = Constraint(estimand, threshold=0.1, safety_prompts=300, miss_probability=0.2)
    alone = replace(together, miss_probability=0.05)
    assert together.training_pessimism(4) == alone.training_pessimism()
    assert together.training_target(4) == alone.training_target()


def test_the_miss_probability_is_delta_unless_it_is_said() -> None:
    assert student(delta=0.03).miss == 0.03
    assert student(delta=0.03, miss_probability=0.4).miss == 0.4
    assert student(delta=0.03).training_pessimism() == seldonian_pessimism(500, 0.03, 0.03)


def test_the_bootstrap_knows_that_validation_prompts_are_few() -> None:
    # Near-normal costs and Student-t: the formula is an independent route.
    seen = np.random.default_rng(0).normal(-1.0, 0.5, size=500)
    for m in (30, 200, None):
        found = bootstrap_pessimism(StudentT(), seen, 200, 0.05, 0.1, Range(), m)
        assert found == pytest.approx(seldonian_pessimism(200, 0.05, 0.1, m), rel=0.25)


def test_a_fixed_pessimism_is_taken_as_it_is() -> None:
    recent = np.random.default_rng(0).normal(size=50)
    for pessimism in (0.0, 1.5):
        for build in (student, capped):
            fixed = build(pessimism=pessimism)
            assert fixed.training_pessimism(3) == fixed.training_pessimism(3, recent) == pessimism


def test_a_mean_aims_at_its_threshold_and_a_harm_rate_has_no_pessimism() -> None:
    assert student(-0.3).training_target() == capped(-0.3).training_target() == -0.3
    rate = Constraint("harm_rate", threshold=0.1)
    assert rate.training_pessimism() == rate.training_pessimism(2, [-1.0, 2.0, 3.0]) == 0.0
    assert 0 < rate.training_target() < 0.1


# -- the margin of other bounds --------------------------------------------------------------------


def recent_costs(random: np.random.Generator) -> np.ndarray:
    """Mostly harmless, 5% severe, in [-4, 4]."""
    costs = 4 * np.tanh(random.normal(-1, 1, size=300) / 4) + 3 * (random.random(300) < 0.05)
    return np.minimum(costs, 4.0)


@pytest.mark.parametrize("miss", [0.1, 0.3])
@pytest.mark.parametrize(
    ("rule", "within"), [(Betting(), Range(-4.0, 4.0)), (HallT(), Range())], ids=["star", "hall_t"]
)
def test_a_policy_at_its_bootstrap_target_passes_about_as_often_as_promised(
    rule: Bound, within: Range, miss: float
) -> None:
    # The threshold is placed by 40 samples: one policy's chance varies by √(β(1 - β)/40) around
    # 1 - β, the mean of 20 policies by √20 less; the grid of thresholds adds a little.
    random = np.random.default_rng(3)
    chances = []
    for _ in range(20):
        seen = recent_costs(random)
        pessimism = bootstrap_pessimism(rule, seen, 200, 0.05, miss, within)
        threshold = seen.mean() + pessimism * seen.std()
        tests = [random.choice(seen, 200) for _ in range(60)]
        chances.append(np.mean([rule.passes(t, threshold, 0.05, within) for t in tests]))
    tolerance = 4 * math.sqrt(miss * (1 - miss) * (1 / 40 + 1 / 60) / 20) + 0.01
    assert np.mean(chances) == pytest.approx(1 - miss, abs=tolerance)


@pytest.mark.parametrize("spread", [0.0, 1e-16, 1e-3])
def test_costs_that_hardly_differ_keep_the_margin_of_a_bound_that_knows_their_range(
    spread: float,
) -> None:
    seen = -1.0 + spread * np.random.default_rng(0).normal(size=200)
    limit = capped(threshold=0.0, safety_prompts=200)
    k = limit.training_pessimism(1, seen)
    margin = k * limit.margin_std(float(seen.std()))
    # U of a test on such costs, up to the grid of 1024 thresholds up to the cap of 4.
    known = limit.rule.upper(np.full(200, -1.0), limit.delta, limit.within) + 1.0
    assert known > 0.03
    assert margin == pytest.approx(known, abs=5 / 1024 + 10 * spread)
    # Once they differ again the margin is of their own size, not 200 times it.
    assert k * limit.margin_std(1.0) < 3.0


def test_costs_without_spread_have_no_margin_by_a_t_statistic() -> None:
    for seen in (np.full(50, -1.0), np.full(448, 0.7)):  # whose mean is not 0.7
        assert bootstrap_pessimism(HallT(), seen, 100, 0.05, 0.1, Range()) < 1e-12


def test_a_normal_cost_has_nearly_the_same_margin_by_bootstrap_as_by_formula() -> None:
    seen = np.random.default_rng(5).normal(size=4000)
    expected = seldonian_pessimism(200, 0.05, 0.2)
    found = bootstrap_pessimism(StudentT(), seen, 200, 0.05, 0.2, Range())
    # The 80% quantile of 40 samples has a standard error of 1.43 · 0.4/√40 σ, σ = 1/√200.
    assert found == pytest.approx(expected, abs=4 * 1.43 * 0.4 / math.sqrt(40 * 200) + 0.02)


def test_the_bootstrap_margin_grows_as_less_is_allowed_to_fail() -> None:
    seen = recent_costs(np.random.default_rng(0))
    within = Range(-4.0, 4.0)

    def margin(n: int = 200, delta: float = 0.05, miss: float = 0.2) -> float:
        return bootstrap_pessimism(Betting(), seen, n, delta, miss, within)

    assert margin(miss=0.05) > margin(miss=0.2) > margin(miss=0.5) > 0
    assert margin(delta=0.01) > margin(delta=0.05) > margin(delta=0.3)
    assert margin(n=100) > margin(n=200) > margin(n=1000)


def test_student_t_keeps_the_seldonian_margin_and_other_bounds_look_at_recent_costs() -> None:
    seen = recent_costs(np.random.default_rng(1))
    given: dict[str, Any] = {"safety_prompts": 200, "delta": 0.05, "miss_probability": 0.2}
    seldonian = seldonian_pessimism(200, 0.05, 0.1)  # two constraints share the miss probability
    assert student(**given).training_pessimism(2, seen) == seldonian
    assert student(**given).training_pessimism(2) == seldonian
    star = capped(**given)
    assert star.training_pessimism(2) == seldonian  # nothing seen yet
    expected = bootstrap_pessimism(Betting(), seen, 200, 0.05, 0.1, Range(-4.0, 4.0))
    assert star.training_pessimism(2, seen) == expected != seldonian
    tail = Constraint("cvar", 3.0, alpha=0.2, eta=0.5, lower=-4.0, upper=4.0, **given)
    expected = bootstrap_pessimism(
        Betting(), tail_costs(seen, 0.2, 0.5), 200, 0.05, 0.2, Range(0.5, 18.0)
    )
    assert tail.training_pessimism(1, seen) == expected


# -- the margin of a harm rate ---------------------------------------------------------------------


@pytest.mark.parametrize("miss", [0.01, 0.05, 0.5])
def test_the_harm_rate_target_where_no_harm_at_all_is_allowed(miss: float) -> None:
    # 59 prompts show 5% only without any harm, which happens with (1 - p)^59 = 1 - miss.
    expected = 1 - (1 - miss) ** (1 / 59)
    assert harm_rate_target(ClopperPearson(), 0.05, 59, 0.05, miss) == pytest.approx(
        expected, rel=1e-10
    )


@pytest.mark.parametrize("rule", [Betting("star"), Betting("wsr"), EProcess()])
def test_at_the_harm_rate_target_a_bound_that_reads_in_order_passes_about_as_often(
    rule: Bound,
) -> None:
    target = harm_rate_target(rule, 0.05, 150, 0.025, 0.05)
    rng = np.random.default_rng(0)
    draws = (rng.random((600, 150)) < target).astype(float)
    missed = np.mean([not rule.passes(x, 0.05, 0.025, Range(0.0, 1.0)) for x in draws])
    assert missed < 0.08  # h one too large, with each harm at the end of its share, misses 0.14


@pytest.mark.parametrize(("limit", "n"), [(0.05, 59), (0.1, 300), (0.5, 20), (0.9, 2000)])
@pytest.mark.parametrize("miss", [0.05, 0.3])
def test_at_the_harm_rate_target_the_binomial_passes_with_one_minus_the_miss_probability(
    limit: float, n: int, miss: float
) -> None:
    target = harm_rate_target(ClopperPearson(), limit, n, 0.05, miss)
    uppers = np.array([clopper_pearson_upper(h, n, 0.05) for h in range(n + 1)])
    chance = stats.binom.pmf(np.arange(n + 1), n, target)[uppers <= limit].sum()
    assert chance == pytest.approx(1 - miss, abs=1e-9)


@pytest.mark.parametrize(("limit", "n", "m"), [(0.15, 500, 400), (0.1, 300, 50)])
@pytest.mark.parametrize("miss", [0.025, 0.3])
def test_a_rate_known_from_validation_prompts_is_that_of_two_binomial_draws(
    limit: float, n: int, m: int, miss: float
) -> None:
    target = harm_rate_target(ClopperPearson(), limit, n, 0.05, miss, m)
    assert 0 < target < harm_rate_target(ClopperPearson(), limit, n, 0.05, miss)
    allowed = max(h for h in range(n) if clopper_pearson_upper(h, n, 0.05) <= limit)
    generator, repeats = np.random.default_rng(3), 200_000
    seen = generator.binomial(m, target, repeats)
    passed = generator.binomial(n, seen / m) <= allowed
    tolerance = 4 * math.sqrt(miss * (1 - miss) / repeats)
    assert passed.mean() == pytest.approx(1 - miss, abs=tolerance)


def test_many_validation_prompts_are_as_good_as_knowing_the_rate() -> None:
    known = harm_rate_target(ClopperPearson(), 0.15, 500, 0.05, 0.025)
    found = harm_rate_target(ClopperPearson(), 0.15, 500, 0.05, 0.025, 10**6)
    assert found == pytest.approx(known, abs=2e-5)


@pytest.mark.parametrize("m", [2, 2000])
def test_the_target_is_never_above_that_of_a_known_rate(m: int) -> None:
    # Without any harm allowed E (1 - j/m)^n exceeds (1 - p)^n: the second draw would be welcome.
    known = harm_rate_target(ClopperPearson(), 0.05, 59, 0.05, 0.05)
    assert harm_rate_target(ClopperPearson(), 0.05, 59, 0.05, 0.05, m) == known


def test_simulated_policies_at_the_harm_rate_target_pass_as_often_as_promised() -> None:
    n, repeats, miss = 300, 20_000, 0.1
    constraint = Constraint("harm_rate", threshold=0.1, safety_prompts=n, miss_probability=miss)
    passes = np.array(
        [constraint.judge(np.where(np.arange(n) < h, 2.0, -3.0)).passed for h in range(n + 1)]
    )
    harmful = np.random.default_rng(2).random((repeats, n)) < constraint.training_target()
    tolerance = 4 * math.sqrt(miss * (1 - miss) / repeats)
    assert passes[harmful.sum(axis=1)].mean() == pytest.approx(1 - miss, abs=tolerance)


def test_a_policy_above_the_limit_passes_no_more_often_than_delta() -> None:
    n, limit, delta = 300, 0.1, 0.05
    uppers = np.array([clopper_pearson_upper(h, n, delta) for h in range(n + 1)])
    for rate in (limit + 1e-9, 0.11, 0.2):
        pmf = stats.binom.pmf(np.arange(n + 1), n, rate)
        assert pmf[uppers <= limit].sum() <= delta


@pytest.mark.parametrize(
    ("limit", "delta", "needed"),
    [
        (0.05, 0.05, 59),  # the numbers of the books on sampling
        (0.01, 0.05, 299),
        (0.1, 0.05, 29),
        (0.01, 0.01, 459),
        (0.5, 0.25, 2),  # met exactly: 1 - 0.25^(1/2) = 0.5
        (0.7, 0.0081, 4),  # met exactly: 0.3^4 = 0.0081
    ],
)
def test_an_impossible_limit_is_refused_with_the_number_of_prompts_that_is_needed(
    limit: float, delta: float, needed: int
) -> None:
    if needed > 2:
        message = (
            f"a harm rate <= {limit} at delta {delta} cannot be shown with {needed - 1} safety "
            f"prompts, even if none is harmful; at least {needed} are needed"
        )
        with pytest.raises(InputError, match=message):
            Constraint("harm_rate", threshold=limit, delta=delta, safety_prompts=needed - 1)
    Constraint("harm_rate", threshold=limit, delta=delta, safety_prompts=needed)


@pytest.mark.parametrize(
    ("bound", "needed"),
    [
        # Every bet of star and wsr is c/(1 - m): 1 + 0.75 · 0.05/0.95, and 78 of them make 20.
        (Betting(), 78),
        (Betting("wsr"), 78),
        # L/2n <= 0.0025, so n >= 2.99573/0.005.
        (Hoeffding(), 600),
        # 7 ln 40/(3(n - 1)) <= 0.05: n >= 1 + 172.15.
        (EmpiricalBernstein(), 174),
        # The Chernoff part is (1 - m)^n as that of Clopper-Pearson.
        (HoeffdingBentkus(), 59),
        (ClopperPearson(), 59),
    ],
)
def test_a_bound_needs_its_own_number_of_prompts_for_five_percent(
    bound: Bound, needed: int
) -> None:
    message = refusal(lambda: Constraint("harm_rate", 0.05, 0.05, needed - 1, bound))
    assert message == (
        f"a harm rate <= 0.05 at delta 0.05 cannot be shown with {needed - 1} safety prompts, "
        f"even if none is harmful; at least {needed} are needed"
    )
    Constraint("harm_rate", 0.05, 0.05, needed, bound)


@pytest.mark.parametrize("bound", [Betting("portfolio"), EProcess()])
def test_the_portfolio_needs_a_few_prompts_more(bound: Bound) -> None:
    # Wealth Σ_j (1 + c_j 0.05/0.95)^n / 64 of n harmless responses.
    nodes = np.sin((np.arange(64) + 0.5) * math.pi / 128) ** 2
    needed = next(n for n in range(1, 200) if np.mean((1 + nodes * 0.05 / 0.95) ** n) >= 20)
    message = refusal(lambda: Constraint("harm_rate", 0.05, 0.05, needed - 1, bound))
    assert message.endswith(f"at least {needed} are needed")
    Constraint("harm_rate", 0.05, 0.05, needed, bound)


def test_a_number_of_prompts_that_is_named_is_enough() -> None:
    # ln(1e-6)/ln(1 - 1e-6) is 13.8 million.
    message = refusal(lambda: Constraint("harm_rate", 1e-6, 1e-6))
    named = re.search(r"at least (\d+) are needed", message)
    assert named is None or int(named[1]) >= 13_815_503


@pytest.mark.parametrize("strategy", ["star", "wsr", "portfolio"])
@pytest.mark.parametrize(("limit", "n"), [(0.1, 300), (0.3, 200)])
def test_simulated_policies_at_the_harm_rate_target_of_a_bet_pass_about_as_often(
    strategy: Any, limit: float, n: int
) -> None:
    bound, miss, repeats = Betting(strategy), 0.1, 1500
    target = harm_rate_target(bound, limit, n, 0.05, miss)
    assert 0 < target < harm_rate_target(ClopperPearson(), limit, n, 0.05, miss)
    harmful = (np.random.default_rng(6).random((repeats, n)) < target).astype(float)
    passed = [bound.passes(row, limit, 0.05, Range(0.0, 1.0)) for row in harmful]
    # "Evenly spread" stands for all orders of the same harms: an approximation for star and wsr.
    order = 0.0 if strategy == "portfolio" else 0.04
    tolerance = 4 * math.sqrt(miss * (1 - miss) / repeats) + order
    assert np.mean(passed) == pytest.approx(1 - miss, abs=tolerance)


def test_the_harm_rate_target_of_a_constraint_is_that_of_its_own_bound() -> None:
    for bound in (ClopperPearson(), Betting(), HoeffdingBentkus(), EProcess()):
        constraint = Constraint("harm_rate", 0.1, 0.05, 300, bound, miss_probability=0.2)
        assert constraint.training_target(2) == harm_rate_target(bound, 0.1, 300, 0.05, 0.1)


# -- limits of a mean that cannot be shown ---------------------------------------------------------


@pytest.mark.parametrize(
    ("bound", "needed"),
    [
        # All at -4 in [-4, 4], limit 0, so u = 0 and m = 1/2; L = 2.99573.
        (Betting(), 6),  # every bet 1 + 0.75: 1.75^5 = 16.4, 1.75^6 = 28.7
        (Hoeffding(), 6),  # L/2n <= 1/4: n >= 5.99
        (HoeffdingBentkus(), 5),  # 0.5^4 = 0.0625, 0.5^5 = 0.031
        (EmpiricalBernstein(), 19),  # 7 · 3.68888/(3(n - 1)) <= 1/2: n >= 18.2
    ],
)
def test_a_mean_that_cannot_be_shown_with_so_few_prompts_is_refused(
    bound: Bound, needed: int
) -> None:
    message = refusal(lambda: capped(safety_prompts=needed - 1, bound=bound))
    assert message == (
        f"a mean <= 0.0 at delta 0.05 cannot be shown with {needed - 1} safety prompts and "
        f"{bound.name}, even if every cost were -4.0; give more prompts (hcrlhf power says how "
        "many)"
    )
    lowest = np.full(needed, -4.0)
    assert capped(safety_prompts=needed, bound=bound).judge(lowest).passed


def test_a_limit_at_or_below_the_lowest_cost_is_refused_for_any_number_of_prompts() -> None:
    for threshold in (-4.0, -5.0):
        for bound in (None, Betting("portfolio"), Hoeffding(), EProcess()):
            message = refusal(lambda t=threshold, b=bound: capped(t, safety_prompts=5000, bound=b))
            assert "cannot be shown with 5000 safety prompts" in message


def test_a_tail_limit_that_cannot_be_shown_is_refused() -> None:
    given: dict[str, Any] = {"alpha": 0.5, "eta": -2.0, "upper": 4.0}
    # The range is [-2, 10], so m = 1/4 and every bet is 0.75/0.75: 1.25^13 = 18.2, 1.25^14 = 22.7.
    message = refusal(lambda: Constraint("cvar", 1.0, safety_prompts=13, **given))
    assert "a cvar <= 1.0 at delta 0.05 cannot be shown with 13 safety prompts" in message
    Constraint("cvar", 1.0, safety_prompts=14, **given)


def test_the_refusal_of_a_tail_limit_names_the_lowest_tail_cost() -> None:
    given: dict[str, Any] = {"alpha": 0.1, "eta": 0.5, "upper": 4.0}
    message = refusal(lambda: Constraint("cvar", 1.0, safety_prompts=50, **given))
    assert "None" not in message


# -- the verdict -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build", [lambda u: student(u, safety_prompts=5, delta=0.1),
              lambda u: student(u, safety_prompts=5, delta=0.1, lower=-4.0, upper=4.0),
              lambda u: replace(student(u, safety_prompts=5, delta=0.1), bound=HallT()),
              lambda u: replace(student(u, safety_prompts=5, delta=0.1), bound=Hoeffding(),
                                lower=-2.0, upper=1.0),
              lambda u: Constraint("harm_rate", threshold=u, safety_prompts=5, delta=0.1)]
)  # fmt: skip
def test_a_bound_equal_to_its_threshold_passes_and_the_next_number_above_does_not(
    build: Callable[[float], Constraint],
) -> None:
    costs = [-1.0, -0.5, -0.25, 0.5, -2.0]
    upper = build(0.9).judge(costs).upper
    judgement = build(upper).judge(costs)
    assert (judgement.upper, judgement.threshold, judgement.passed) == (upper, upper, True)
    assert not build(math.nextafter(upper, -math.inf)).judge(costs).passed


def test_the_verdict_of_a_mean_is_that_of_its_bound_and_not_of_the_mean() -> None:
    costs = [-1.0, 0.0, 0.5]  # mean -1/6, bound 1.1
    assert not student(0.0, safety_prompts=3).judge(costs).passed
    assert student(1.2, safety_prompts=3).judge(costs).passed


def test_the_bound_of_a_constraint_can_be_replaced() -> None:
    assert student(safety_prompts=4).judge([1, 2, 3, 4]).upper == pytest.approx(4.019, abs=1e-3)
    # x̄ + 8 √(ln 20 / 8)
    hoeffding = Constraint("mean", 3.0, 0.05, 40, Hoeffding(), lower=-4.0, upper=4.0)
    expected = 1.5 + 8 * math.sqrt(math.log(20) / 80)
    assert hoeffding.judge(np.tile([0.0, 1.0, 2.0, 3.0], 10)).upper == pytest.approx(expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("estimand", ["mean", "harm_rate", "cvar"])
@pytest.mark.parametrize("count", [1, 100])
def test_costs_that_are_not_finite_are_never_judged(estimand: Any, bad: float, count: int) -> None:
    tail = {"alpha": 0.1, "eta": -1.0} if estimand == "cvar" else {}
    constraint = Constraint(estimand, threshold=0.9, safety_prompts=100, **tail)
    if estimand == "cvar" and bad == -math.inf:
        return  # below
    costs = np.where(np.arange(100) < count, bad, -1.0 - np.arange(100))
    with pytest.raises(InputError, match=f"{count} of 100 costs are not finite"):
        constraint.judge(costs)


def test_a_cost_of_minus_infinity_is_not_harmless_in_the_tail() -> None:
    constraint = Constraint("cvar", 2.0, 0.05, 100, alpha=0.5, eta=0.5, lower=-4.0, upper=4.0)
    assert "100 of 100" in refusal(lambda: constraint.judge(np.full(100, -math.inf)))


@pytest.mark.parametrize("value", [-1e9, -1.0, 0.0])
@pytest.mark.parametrize("bound", [StudentT(), HallT()])
def test_costs_without_spread_never_pass_a_t_test(bound: Bound, value: float) -> None:
    constraint = replace(student(safety_prompts=50), bound=bound)
    judgement = constraint.judge(np.full(50, value))
    assert judgement.upper == math.inf and not judgement.passed


@pytest.mark.parametrize("given_costs", [0, 1, 9, 11])
@pytest.mark.parametrize("estimand", ["mean", "harm_rate"])
def test_another_number_of_costs_than_planned_is_refused(estimand: Any, given_costs: int) -> None:
    constraint = Constraint(estimand, threshold=0.9, safety_prompts=10)
    message = f"the plan is 10 safety prompts, the test has {given_costs}"
    with pytest.raises(InputError, match=message):
        constraint.judge(np.linspace(-2, -1, given_costs))


def test_several_responses_per_prompt_are_not_taken_for_several_prompts() -> None:
    with pytest.raises(InputError, match=r"one per prompt, got shape \(5, 2\)"):
        student(safety_prompts=10).judge(np.arange(10.0).reshape(5, 2))


def test_harm_is_a_cost_above_zero_and_what_is_no_number_is_never_harmless() -> None:
    costs = [-1.0, 0.0, 5e-324, 3.0, math.nan, math.inf, -math.inf]
    values = Constraint("harm_rate", threshold=0.5).values(costs)
    np.testing.assert_array_equal(values, [0, 0, 1, 1, math.nan, math.nan, math.nan])
    np.testing.assert_array_equal(student().values(costs), costs)


def test_a_forecast_is_made_for_the_number_of_safety_prompts() -> None:
    mean = student(safety_prompts=101).forecast([1.0, 2.0, 3.0, 4.0])
    assert mean == pytest.approx(2.5 + math.sqrt(5 / 3) * 1.6602 / math.sqrt(101), abs=1e-5)
    rate = Constraint("harm_rate", threshold=0.5, safety_prompts=100).forecast([-1.0, 2.0])
    assert rate == clopper_pearson_upper(50, 100, 0.05)


ANY_BOUND: list[Constraint] = [
    student(safety_prompts=30),
    *(
        capped(safety_prompts=30, bound=bound)
        for bound in (
            HallT(), Hoeffding(), EmpiricalBernstein(), HoeffdingBentkus(), Betting(),
            Betting("wsr"), Betting("portfolio"), EProcess(),
        )
    ),
    Constraint("harm_rate", 0.3, safety_prompts=30),
    *(
        Constraint("harm_rate", 0.4, 0.05, 30, bound)
        for bound in (Betting(), Betting("portfolio"), HoeffdingBentkus(), EProcess())
    ),
    Constraint("cvar", 1.0, safety_prompts=30, alpha=0.5, eta=-2.0),
    Constraint("cvar", 1.0, safety_prompts=30, alpha=0.5, eta=-2.0, lower=-4.0, upper=4.0),
]  # fmt: skip


def name_of(constraint: Constraint) -> str:
    return f"{constraint.estimand}-{constraint.rule!r}"


@pytest.mark.parametrize("constraint", ANY_BOUND, ids=name_of)
@seeded
@given(st.lists(st.integers(-32, 32).map(lambda i: i / 8), min_size=30, max_size=30))
def test_the_reported_bound_always_agrees_with_the_decision(
    constraint: Constraint, costs: list[float]
) -> None:
    costs = sorted(costs)[:25] + [-4.0] * 5 if costs[0] < 1 else costs  # some pass, some do not
    judgement = constraint.judge(costs)
    assert judgement.passed == (judgement.upper <= constraint.threshold)
    assert judgement.threshold == constraint.threshold
    if judgement.log_e_value is not None:
        assert judgement.passed == (judgement.log_e_value >= -math.log(constraint.delta))


@pytest.mark.parametrize("bound", [Betting(), Betting("wsr"), Betting("portfolio"), EProcess()])
def test_a_bet_passes_at_its_own_bound_and_not_below(bound: Bound) -> None:
    costs = recent_costs(np.random.default_rng(8))[:100]
    upper = capped(3.5, safety_prompts=100, bound=bound).judge(costs).upper
    judgement = capped(upper, safety_prompts=100, bound=bound).judge(costs)
    assert (judgement.passed, judgement.upper) == (True, upper)
    # By search, a few 2^-40 of the range above the last mean that is not rejected.
    below = capped(upper - 8 * 2**-38, safety_prompts=100, bound=bound).judge(costs)
    assert not below.passed and below.upper > below.threshold


@dataclass(frozen=True)
class Undecided(HallT):
    """A bound whose search and decision differ by rounding."""

    passing: bool = False

    def upper(self, values: Any, delta: float, within: Range) -> float:
        return 0.5 + 1e-15 if self.passing else 0.5 - 1e-15

    def passes(self, values: Any, threshold: float, delta: float, within: Range) -> bool:
        return self.passing


def test_where_search_and_decision_differ_the_reported_bound_follows_the_decision() -> None:
    for passing, upper in ((True, 0.5), (False, math.nextafter(0.5, 1))):
        constraint = student(0.5, safety_prompts=3)
        object.__setattr__(constraint, "bound", Undecided(passing))  # no bound of the project's
        assert constraint.judge([0.0, 1.0, 2.0]).upper == upper


def test_the_committed_order_matters_to_star_and_not_to_the_portfolio() -> None:
    costs = recent_costs(np.random.default_rng(9))[:100]
    orders = [costs, costs[::-1], np.sort(costs), np.sort(costs)[::-1]]
    star = [capped(safety_prompts=100).judge(order) for order in orders]
    assert len({j.upper for j in star}) == len({j.log_e_value for j in star}) == 4
    portfolio = [
        capped(safety_prompts=100, bound=Betting("portfolio")).judge(o).upper for o in orders
    ]
    np.testing.assert_allclose(portfolio, portfolio[0], rtol=1e-9)


def test_a_sequential_test_takes_what_there_is() -> None:
    process = capped(safety_prompts=200).sequential()
    costs = np.linspace(-3, -1, 40)
    early, late = process.judge(costs[:3]), process.judge(costs)
    assert not early.passed and early.upper > 0.0
    assert late.passed and late.upper < 0.0
    with pytest.raises(InputError, match="the plan is 200 safety prompts, the test has 40"):
        capped(safety_prompts=200).judge(costs)
    with pytest.raises(InputError, match=r"got shape \(0,\)"):
        process.judge([])


def test_the_granted_share_of_delta_decides() -> None:
    # Six of 100 harmful: Clopper-Pearson gives 0.1146 at 0.05 and more at an eighth of it.
    rate = Constraint("harm_rate", 0.12, 0.05, 100)
    costs = np.where(np.arange(100) < 6, 1.0, -1.0)
    assert replace(rate.granted(0.05), miss_probability=None) == rate
    assert rate.judge(costs).passed
    assert not rate.granted(0.05 / 8).judge(costs).passed
    star = capped(safety_prompts=100, threshold=-0.25)
    costs = recent_costs(np.random.default_rng(10))[:100]
    assert star.judge(costs).passed
    assert not star.granted(1e-6).judge(costs).passed
    assert replace(star.granted(1e-6), delta=0.05, miss_probability=None) == star
    # How often a candidate may miss is no share of δ.
    assert rate.granted(0.05 / 8).miss == 0.05
    assert replace(rate, miss_probability=0.2).granted(0.05 / 8).miss == 0.2


def test_a_grant_that_is_too_small_for_the_number_of_prompts_is_refused() -> None:
    # ln 0.025 / ln 0.95 = 71.9.
    rate = Constraint("harm_rate", 0.05, 0.05, 59)
    message = refusal(lambda: rate.granted(0.025))
    assert "at delta 0.025 cannot be shown with 59" in message
    assert message.endswith("at least 72 are needed")
    with pytest.raises(InputError, match=r"\(0, 1\), got 0"):
        rate.granted(0)


def test_a_cost_above_the_declared_cap_is_an_error() -> None:
    for constraint in (capped(safety_prompts=30), capped(safety_prompts=30).sequential()):
        message = refusal(lambda c=constraint: c.judge([-1.0] * 29 + [4.1]))
        assert "a cost of 4.1 lies above the declared cap 4:" in message
        assert "costs are never clipped" in message
    tail = Constraint("cvar", 2.0, 0.05, 30, lower=-4.0, upper=4.0, alpha=0.5, eta=-2.0)
    assert "above the declared cap" in refusal(lambda: tail.judge([-1.0] * 29 + [4.1]))
    assert tail.judge([-1.0] * 29 + [4.0]).passed  # the cap itself is allowed


@pytest.mark.parametrize("estimand", ["mean", "harm_rate"])
def test_a_cost_above_the_declared_cap_is_an_error_for_every_bound(estimand: Any) -> None:
    bound = StudentT() if estimand == "mean" else ClopperPearson()
    constraint = Constraint(estimand, 0.9, 0.05, 30, bound, lower=-4.0, upper=4.0)
    refusal(lambda: constraint.judge([*np.linspace(-3, -1, 29), 4.1]))


# -- declarations ----------------------------------------------------------------------------------


def test_the_bound_follows_from_what_is_declared() -> None:
    assert Constraint("harm_rate", 0.1).rule == ClopperPearson()
    assert Constraint("harm_rate", 0.1, lower=-4.0, upper=4.0).rule == ClopperPearson()
    assert Constraint("mean", 0.0).rule == HallT()
    assert Constraint("mean", 0.0, upper=4.0).rule == Betting("portfolio")  # needs no lower end
    assert Constraint("mean", 0.0, lower=-4.0).rule == HallT()
    assert capped().rule == Betting("star", 0.75)
    # The tail costs start at η: a cap is all that is missing.
    assert Constraint(**CVAR).rule == HallT()
    assert Constraint(**CVAR, upper=4.0).rule == Betting("star")
    for bound in (StudentT(), Hoeffding(), EProcess()):
        assert capped(bound=bound).rule == bound


def test_the_bound_never_follows_from_the_costs() -> None:
    random = np.random.default_rng(0)
    shapes = [
        random.normal(size=50),
        (random.random(50) < 0.1).astype(float),  # binary
        random.random(50),  # within [0, 1]
        np.append(np.zeros(49), 3.9),  # rare severe harm
    ]
    for constraint in (capped(1.0, safety_prompts=50), Constraint("mean", 1.0, 0.05, 50)):
        rule = constraint.rule
        for costs in shapes:
            expected = rule.upper(costs, 0.05, constraint.within)
            judgement = constraint.judge(costs)
            assert constraint.rule == rule
            assert judgement.passed == rule.passes(costs, 1.0, 0.05, constraint.within)
            assert judgement.upper == pytest.approx(expected, abs=1e-9)


def test_tail_values_and_their_range_by_hand() -> None:
    constraint = Constraint("cvar", 3.0, alpha=0.25, eta=0.5, lower=-4.0, upper=4.0)
    # η + (c - η)₊/α: 0.5 + 0.5/0.25 = 2.5, 0.5 + 3.5/0.25 = 14.5 at the cap.
    found = constraint.values([-3.0, 0.5, 1.0, 4.0])
    assert found.tolist() == [0.5, 0.5, 2.5, 14.5]
    assert constraint.within == Range(0.5, 14.5)
    assert Constraint("cvar", 3.0, alpha=0.25, eta=0.5).within == Range(0.5, None)
    # The whole tail: α = 1 and η at the bottom is the mean.
    whole = Constraint("cvar", 3.0, alpha=1.0, eta=-4.0, lower=-4.0, upper=4.0)
    assert whole.values([-3.0, 2.0]).tolist() == [-3.0, 2.0]
    assert whole.within == Range(-4.0, 4.0)


@seeded
@given(st.lists(st.floats(-4, 4), min_size=5, max_size=60), st.floats(0.05, 1.0))
def test_eta_of_a_sample_gives_the_lowest_bound_on_its_worst_share(
    costs: list[float], alpha: float
) -> None:
    def tail_mean(eta: float) -> float:
        return float(tail_costs(costs, alpha, eta).mean())

    eta = Constraint("cvar", 1e6, alpha=alpha).with_eta(costs).eta
    assert eta is not None
    # Convex in η: no sample point is better than the quantile, up to its interpolation.
    gaps = np.diff(np.sort(costs))
    assert tail_mean(eta) <= min(map(tail_mean, costs)) + max(gaps, default=0.0) / alpha


def test_an_eta_that_is_not_given_is_the_quantile_of_costs_and_never_above_the_limit() -> None:
    costs = np.linspace(-1.0, 1.0, 101)
    left = Constraint("cvar", 2.0, safety_prompts=200, alpha=0.25, lower=-4.0, upper=4.0)
    assert left.needs_eta and left.with_eta(costs).eta == pytest.approx(0.5)
    assert left.rule == left.with_eta(costs).rule == Betting("star")
    low = Constraint("cvar", 0.2, safety_prompts=200, alpha=0.25)  # Hall's t
    assert low.with_eta(costs).eta == 0.2
    given = replace(left, eta=-1.0)
    assert not given.needs_eta and given.with_eta(costs) is given
    # Forecasts and the margin of training are those of the constraint with that η.
    fixed = left.with_eta(costs)
    assert left.forecast(costs) == fixed.forecast(costs)
    assert left.pass_probability(costs) == fixed.pass_probability(costs)
    assert left.training_pessimism(1, costs) == fixed.training_pessimism(1, costs)
    assert left.pass_probability([math.nan, 0.0]) == 0.0
    # A judgement is asked of a fixed one alone.
    assert "eta is not fixed" in refusal(lambda: replace(left, safety_prompts=101).judge(costs))


def test_an_eta_is_lowered_to_where_a_test_can_still_be_passed_or_refused_before_training() -> None:
    def tail(threshold: float) -> Constraint:
        return Constraint("cvar", threshold, 0.05, 100, alpha=0.25, lower=-4.0, upper=4.0)

    high = np.full(50, 3.0)
    eta = tail(1.0).with_eta(high).eta
    assert eta is not None and -4.0 < eta < 1.0
    # All costs at or below η: U is the limit itself, so a larger η could never be passed.
    bound = tail(1.0).with_eta(high).judge(np.full(100, eta))
    assert bound.passed and bound.upper == pytest.approx(1.0, abs=1e-6)
    assert "cannot be shown with 100 safety prompts" in refusal(lambda: tail(-3.5))
    # A cap alone: the cost model will bring the lower end.
    capped_tail = Constraint("cvar", 2.0, 0.05, 500, alpha=0.25, upper=4.0)
    assert capped_tail.with_range(-4.0, 4.0).needs_eta


def test_the_range_of_a_mean_is_the_declared_one_and_that_of_a_rate_is_known() -> None:
    assert capped().within == Range(-4.0, 4.0)
    assert Constraint("mean", 0.0).within == Range(None, None)
    assert Constraint("harm_rate", 0.1, lower=-4.0, upper=4.0).within == Range(0.0, 1.0)


def test_the_bound_of_the_worst_share_is_a_bound_on_its_tail_values() -> None:
    costs = recent_costs(np.random.default_rng(2))[:200]
    constraint = Constraint("cvar", 3.9, 0.05, 200, alpha=0.25, eta=0.5, lower=-4.0, upper=4.0)
    z = 0.5 + np.maximum(costs - 0.5, 0) / 0.25
    expected = Betting().upper(z, 0.05, Range(0.5, 14.5))
    assert constraint.judge(costs).upper == pytest.approx(expected, abs=1e-9)
    worst = np.sort(costs)[-50:].mean()
    assert constraint.judge(costs).upper > worst


def test_a_cost_model_brings_its_range_and_so_an_exact_bound() -> None:
    completed = Constraint("mean", 0.0).with_range(-3.0, 3.0)
    assert completed == Constraint("mean", 0.0, lower=-3.0, upper=3.0)
    assert completed.rule == Betting()
    # Something wider was declared, which is true as well: the narrower one is taken.
    assert capped().with_range(-3.0, 3.0) == completed
    assert capped().with_range(-4.0, 4.0) == capped()
    tail = Constraint(**CVAR).with_range(-4.0, 4.0)
    assert (tail.rule, tail.within) == (Betting(), Range(0.5, 35.5))


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        ({"lower": -1.0}, r"costs in \[-1.0, None\]"),
        ({"upper": 3.9}, r"costs in \[None, 3.9\]"),
        ({"lower": -5.0, "upper": 1.0}, r"costs in \[-5.0, 1.0\]"),
        ({"lower": -3.9, "upper": 4.0}, r"costs in \[-3.9, 4.0\]"),
    ],
)
def test_a_declared_range_that_the_cost_model_could_leave_is_refused(
    declared: dict[str, float], words: str
) -> None:
    message = refusal(lambda: Constraint("mean", 0.0, **declared).with_range(-4.0, 4.0))
    assert re.search(words, message)
    assert r"model's lie in [-4, 4]; remove lower and upper from the constraint" in message


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (Constraint("mean", 5.0), "threshold of 5.0 at or above the cap 4.0"),
        (Constraint("mean", 0.0, safety_prompts=5), "cannot be shown with 5 safety prompts"),
        (Constraint("cvar", 9.0, alpha=0.1, eta=4.0), "at or above the cap 4.0"),
    ],
)
def test_a_range_that_comes_later_is_checked_like_a_declared_one(
    constraint: Constraint, message: str
) -> None:
    assert message in refusal(lambda: constraint.with_range(-4.0, 4.0))


@pytest.mark.parametrize(
    ("bound", "given_range", "ends"),
    [
        (Hoeffding(), {}, "lower and upper end"),
        (Hoeffding(), {"upper": 4.0}, "lower end"),
        (Betting(), {"lower": -4.0}, "upper end"),
        (Betting("portfolio"), {}, "upper end"),
        (EProcess(), {}, "upper end"),
    ],
)
def test_a_bound_without_its_range_is_not_ready(
    bound: Bound, given_range: dict[str, float], ends: str
) -> None:
    constraint = Constraint("mean", 0.0, bound=bound, **given_range)
    message = refusal(constraint.ready)
    assert f"the bound {bound.name} needs the cost's {ends}, which nothing declares" in message
    assert "train the cost model with squash" in message
    completed = constraint.with_range(-4.0, 4.0)
    assert completed.ready() is completed


def test_what_needs_no_range_is_ready() -> None:
    for constraint in (Constraint("mean", 0.0), student(), capped(), Constraint("harm_rate", 0.1)):
        assert constraint.ready() is constraint


@pytest.mark.parametrize(
    "constraint",
    [
        student(),
        capped(bound=Betting()),
        capped(bound=Betting("portfolio")),
        capped(bound=Hoeffding()),
        Constraint("harm_rate", 0.1, bound=ClopperPearson()),
    ],
    ids=name_of,
)
def test_a_bound_for_a_fixed_number_of_prompts_decides_no_sequential_test(
    constraint: Constraint,
) -> None:
    message = refusal(constraint.sequential)
    assert f"after every batch, which {constraint.rule.name} does not allow" in message
    assert "remove `bound` or take hcrlhf.methods.EProcess" in message


def test_a_sequential_test_is_decided_by_an_e_process_whatever_the_default_would_be() -> None:
    for constraint in (
        capped(), Constraint("mean", 0.0), Constraint("harm_rate", 0.1), Constraint(**CVAR),
        capped(bound=EProcess()),
    ):  # fmt: skip
        assert constraint.sequential() == replace(constraint, bound=EProcess())
    # The e-process needs a few prompts more than Clopper-Pearson, and says so.
    message = refusal(Constraint("harm_rate", 0.05, 0.05, 59).sequential)
    assert "at least 82 are needed" in message


# -- settings --------------------------------------------------------------------------------------


class Own(StudentT):
    """A bound that somebody has derived, which goes by another's name."""


MEAN: dict[str, Any] = {"estimand": "mean", "threshold": 0.0}
CAPPED: dict[str, Any] = {**MEAN, "lower": -4.0, "upper": 4.0}
RATE: dict[str, Any] = {"estimand": "harm_rate", "threshold": 0.1}
CVAR: dict[str, Any] = {"estimand": "cvar", "threshold": 1.0, "alpha": 0.1, "eta": 0.5}


@pytest.mark.parametrize(
    ("settings_given", "message"),
    [
        ({**MEAN, "delta": 5}, r"delta is a probability of error and lies in \(0, 1\), got 5"),
        ({**MEAN, "delta": 0.0}, r"delta .*\(0, 1\), got 0.0"),
        ({**MEAN, "delta": 1.0}, r"delta .*\(0, 1\), got 1.0"),
        ({**MEAN, "delta": math.nan}, r"delta .*\(0, 1\), got nan"),
        ({**MEAN, "miss_probability": 0}, r"miss_probability .*\(0, 1\), got 0"),
        ({**MEAN, "miss_probability": 1.5}, r"miss_probability .*\(0, 1\), got 1.5"),
        ({**RATE, "miss_probability": -1}, r"miss_probability .*\(0, 1\), got -1"),
        ({**MEAN, "threshold": math.nan}, "threshold is a finite number, got nan"),
        ({**MEAN, "threshold": math.inf}, "threshold is a finite number, got inf"),
        ({**MEAN, "threshold": -math.inf}, "threshold is a finite number, got -inf"),
        ({**RATE, "threshold": math.nan}, "threshold is a finite number, got nan"),
        ({**MEAN, "safety_prompts": 1}, "safety_prompts is at least 2, got 1"),
        ({**MEAN, "safety_prompts": -5}, "safety_prompts is at least 2, got -5"),
        ({**MEAN, "std_floor": 0}, "std_floor is positive and finite, got 0"),
        ({**MEAN, "std_floor": -0.1}, "std_floor is positive and finite, got -0.1"),
        ({**MEAN, "std_floor": math.nan}, "std_floor .*got nan"),
        ({**MEAN, "std_floor": math.inf}, "std_floor .*got inf"),
        ({**MEAN, "pessimism": -1}, "pessimism is a finite number >= 0, got -1"),
        ({**MEAN, "pessimism": math.nan}, "pessimism is a finite number >= 0, got nan"),
        ({**MEAN, "pessimism": math.inf}, "pessimism is a finite number >= 0, got inf"),
        ({**RATE, "pessimism": 0.5}, "pessimism is for a mean; .* from miss_probability"),
        ({**RATE, "threshold": 0.0}, r"harm rate lies in \(0, 1\), got 0.0"),
        ({**RATE, "threshold": 1}, r"harm rate lies in \(0, 1\), got 1"),
        ({**RATE, "threshold": -0.2}, r"harm rate lies in \(0, 1\), got -0.2"),
        ({**MEAN, "bound": ClopperPearson()}, "clopper_pearson is for harm_rate, but .* is mean"),
        ({**CVAR, "bound": ClopperPearson()}, "clopper_pearson is for harm_rate, but .* is cvar"),
        ({**MEAN, "bound": Own()}, "the bound is Own, which hcrlhf verify could not recompute"),
        ({**RATE, "bound": StudentT()}, "student_t is for mean, cvar, but .* is harm_rate"),
        ({**RATE, "bound": HallT()}, "hall_t is for mean, cvar, but .* is harm_rate"),
        (
            {"estimand": "median", "threshold": 0.0, "bound": HallT()},
            "estimand is mean, harm_rate or cvar",
        ),
        ({**MEAN, "lower": math.nan}, "lower is a finite number, got nan"),
        ({**MEAN, "lower": -math.inf}, "lower is a finite number, got -inf"),
        ({**MEAN, "upper": math.inf}, "upper is a finite number, got inf"),
        ({**MEAN, "upper": math.nan}, "upper is a finite number, got nan"),
        ({**CAPPED, "lower": 4.0}, r"range is lower < upper, got \[4.0, 4.0\]"),
        ({**RATE, "lower": 5, "upper": 4}, r"range is lower < upper, got \[5, 4\]"),
        # A threshold that every policy meets says nothing.
        ({**CAPPED, "threshold": 4.0}, "threshold of 4.0 at or above the cap 4.0 .* lower thresh"),
        ({**CAPPED, "threshold": 4.5}, "threshold of 4.5 at or above the cap 4.0"),
        ({**MEAN, "upper": -1.0}, "threshold of 0.0 at or above the cap -1.0"),
        ({**MEAN, "upper": 0.0, "bound": HallT()}, "threshold of 0.0 at or above the cap 0.0"),
        ({**CVAR, "upper": 1.0}, "threshold of 1.0 at or above the cap 1.0"),
        ({**CVAR, "alpha": None}, "cvar needs alpha, the share of worst responses"),
        ({**CVAR, "alpha": 0.0}, r"alpha.* lies in \(0, 1\], got 0.0"),
        ({**CVAR, "alpha": 1.1}, r"alpha.* lies in \(0, 1\], got 1.1"),
        ({**CVAR, "alpha": math.nan}, r"alpha.* lies in \(0, 1\], got nan"),
        ({**CVAR, "eta": math.inf}, "eta is a finite number, got inf"),
        ({**CVAR, "eta": math.nan}, "eta is a finite number, got nan"),
        ({**CVAR, "eta": 2.0, "upper": 2.0}, "eta 2.0 lies at or above the cap 2.0"),
        ({**CVAR, "eta": 1.5}, "never below eta 1.5, so a threshold of 1.0 cannot be met; lower"),
        ({**MEAN, "alpha": 0.1}, "alpha and eta are for the estimand cvar, not for mean"),
        ({**MEAN, "eta": 0.1}, "alpha and eta are for the estimand cvar, not for mean"),
        ({**RATE, "alpha": 0.1, "eta": 0.0}, "for the estimand cvar, not for harm_rate"),
    ],
)
def test_settings_out_of_range_are_refused_in_one_line_with_what_was_given(
    settings_given: dict[str, Any], message: str
) -> None:
    assert re.search(message, refusal(lambda: Constraint(**settings_given)))


def test_an_unknown_estimand_is_refused_also_without_a_bound() -> None:
    assert "median" in refusal(lambda: Constraint("median", 0.0))  # type: ignore[arg-type]


@pytest.mark.parametrize("missing", ["estimand", "threshold"])
def test_every_limit_is_said_and_never_a_default(missing: str) -> None:
    with pytest.raises(TypeError, match=f"missing 1 required positional argument: '{missing}'"):
        Constraint(**{key: value for key, value in MEAN.items() if key != missing})


@pytest.mark.parametrize("miss", [0, 1, -1, math.nan])
def test_margins_refuse_a_miss_probability_outside_zero_and_one(miss: float) -> None:
    rate = ClopperPearson()
    for call in (seldonian_pessimism, lambda n, d, m: harm_rate_target(rate, 0.1, n, d, m)):
        message = rf"miss_probability .*\(0, 1\), got {miss}"
        with pytest.raises(InputError, match=message):
            call(100, 0.05, miss)


def test_a_description_is_plain_json_and_names_the_bound_and_its_assumptions() -> None:
    described = student(-0.2, delta=0.1, safety_prompts=64).describe()
    assert (
        json.loads(json.dumps(described))
        == described
        == {
            "estimand": "mean",
            "threshold": -0.2,
            "delta": 0.1,
            "safety_prompts": 64,
            "bound": "student_t",
            "bound_options": {},
            "lower": None,
            "upper": None,
            "alpha": None,
            "eta": None,
            "class": "asymptotic",
            "assumptions": "independent prompts, nearly normal mean cost",
        }
    )
    rate = Constraint("harm_rate", threshold=0.1).describe()
    assert (rate["bound"], rate["class"]) == ("clopper_pearson", "exact")


@pytest.mark.parametrize(
    "constraint",
    [
        *ANY_BOUND,
        capped(bound=Betting("wsr", 0.5), delta=0.0123),
        capped(-1.25, safety_prompts=77, bound=Betting(c=0.25)),
        Constraint("harm_rate", 0.125, 0.01, 400, Betting("wsr", c=0.9)),
        Constraint("cvar", 1.0, 0.1, 30, StudentT(), alpha=0.5, eta=-2.0),
    ],
    ids=name_of,
)
def test_what_is_read_from_a_description_judges_alike(constraint: Constraint) -> None:
    described = json.loads(json.dumps(constraint.describe()))
    read = Constraint.read(described)
    assert read.describe() == described == constraint.describe()
    assert (read.rule, read.within) == (constraint.rule, constraint.within)
    costs = np.resize(recent_costs(np.random.default_rng(11)), constraint.safety_prompts)
    assert read.judge(costs) == constraint.judge(costs)


def test_a_description_names_options_range_and_tail() -> None:
    described = Constraint(
        "cvar", 3.0, bound=Betting("wsr", 0.5), alpha=0.25, eta=0.5, lower=-4.0, upper=4.0
    ).describe()
    assert described["bound_options"] == {"strategy": "wsr", "c": 0.5}
    assert [described[k] for k in ("lower", "upper", "alpha", "eta")] == [-4.0, 4.0, 0.25, 0.5]
    assert described["assumptions"] == "independent prompts, costs at most the declared cap"


@pytest.mark.parametrize(
    "edit",
    [
        lambda record: record.pop("threshold"),
        lambda record: record.pop("bound"),
        lambda record: record.pop("bound_options"),
        lambda record: record.update(threshold="0"),
        lambda record: record.update(threshold=None),
        lambda record: record.update(delta=0),
        lambda record: record.update(delta="0.05"),
        lambda record: record.update(safety_prompts=None),
        lambda record: record.update(estimand="median"),
        lambda record: record.update(estimand=["mean"]),
        lambda record: record.update(estimand=None),
        lambda record: record.update(bound="bootstrap"),
        lambda record: record.update(bound=["betting"]),
        lambda record: record.update(bound_options={"c": 2}),
        lambda record: record.update(bound_options={"stake": 0.5}),
        lambda record: record.update(bound_options=[1]),
        lambda record: record.update(upper="4"),
        lambda record: record.update(upper=-5.0),
        lambda record: record.update(alpha=0.5),
    ],
)
def test_what_is_no_description_is_refused_in_one_line(edit: Callable[[dict], Any]) -> None:
    record = capped().describe()
    edit(record)
    refusal(lambda: Constraint.read(record))


@pytest.mark.parametrize("record", [None, [], "mean", 3, {}])
def test_what_is_no_record_at_all_is_refused(record: Any) -> None:
    assert "not a constraint" in refusal(lambda: Constraint.read(record))


def test_the_papers_pessimism_adds_a_factor_for_the_rollout_and_one_for_the_test() -> None:
    # t_{0.95, 9} = 1.83311 and t_{0.95, 99} = 1.66039: 2 * 1.83311 / sqrt(10) + 1.66039 / 10.
    paper = PaperPessimism(c1=2.0, c2=1.0, rollout=10)
    constraint = Constraint("mean", 0.0, 0.05, 100, bound=StudentT(), pessimism=paper)
    assert constraint.training_pessimism() == pytest.approx(1.15936 + 0.166039, abs=1e-5)
    # Fixed as it is: it asks neither the number of constraints nor the costs.
    assert constraint.training_pessimism(3, [0.0, 1.0]) == constraint.training_pessimism()


@pytest.mark.parametrize("given", [(-1.0, 1.0, 10), (1.0, math.inf, 10), (1.0, 1.0, 1)])
def test_a_pessimism_of_the_paper_that_makes_no_sense_is_refused(
    given: tuple[float, float, int],
) -> None:
    with pytest.raises(InputError, match="c1 and c2"):
        PaperPessimism(*given)


def test_metrics_of_two_constraints_of_one_kind_have_names_of_their_own() -> None:
    rate, worst = Constraint("harm_rate", 0.1), Constraint("cvar", 1.0, alpha=0.1)
    assert suffixes([rate]) == [""]
    assert suffixes([worst, rate]) == ["_cvar", "_harm_rate"]
    wider = Constraint("cvar", 1.0, alpha=0.2)
    assert suffixes([worst, rate, wider]) == ["_cvar_1", "_harm_rate", "_cvar_2"]
