"""Multipliers: hand-worked steps, range and monotonicity."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcrlhf.errors import InputError
from hcrlhf.multiplier import (
    FixedMultiplier,
    LogMultiplier,
    Multiplier,
    MultiplierState,
    PIDMultiplier,
    ProjectedMultiplier,
    SoftplusMultiplier,
)

seeded = settings(deadline=None, derandomize=True, max_examples=100)

PROJECTED = ProjectedMultiplier(learning_rate=0.5, initial=1.0, maximum=4.0)
LOG = LogMultiplier(learning_rate=0.5, initial=1.0, minimum=0.25, maximum=4.0)

rules = st.sampled_from([PROJECTED, LOG])
values = st.floats(0.25, 4.0)
violations = st.floats(allow_nan=False)  # the infinite ones and 1e308 as well


@pytest.mark.parametrize(
    ("value", "violation", "expected"),
    [
        (1.0, 2.0, 2.0),
        (1.0, -1.0, 0.5),
        (1.0, 0.0, 1.0),
        (1.0, -2.0, 0.0),
        (1.0, -9.0, 0.0),
        (0.0, -1.0, 0.0),
        (0.0, 1.0, 0.5),  # zero is no trap
        (3.9, 1.0, 4.0),
    ],
)
def test_projected_ascent_adds_the_step_and_stays_in_range(
    value: float, violation: float, expected: float
) -> None:
    assert PROJECTED.update(value, violation) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "violation", "expected"),
    [
        (1.0, 2 * math.log(2), 2.0),  # exp(0.5 · 2 log 2) = 2
        (2.0, -2 * math.log(2), 1.0),
        (1.0, 0.0, 1.0),
        (0.5, -10.0, 0.25),
        (2.0, 10.0, 4.0),
    ],
)
def test_log_multiplier_takes_relative_steps_between_floor_and_cap(
    value: float, violation: float, expected: float
) -> None:
    assert LOG.update(value, violation) == pytest.approx(expected)


@seeded
@given(rules, values, violations)
def test_a_multiplier_stays_in_its_range(rule: Multiplier, value: float, violation: float) -> None:
    updated = rule.update(value, violation)
    assert (0.25 if rule is LOG else 0.0) <= updated <= 4.0


@seeded
@given(rules, values, violations, violations)
def test_a_larger_violation_never_gives_a_smaller_multiplier(
    rule: Multiplier, value: float, one: float, two: float
) -> None:
    less, more = sorted((one, two))
    assert rule.update(value, less) <= rule.update(value, more)


@seeded
@given(rules, values, violations)
def test_a_violation_never_lowers_the_multiplier_and_slack_never_raises_it(
    rule: Multiplier, value: float, violation: float
) -> None:
    change = rule.update(value, violation) - value
    assert change >= 0 if violation >= 0 else change <= 0


def test_a_log_multiplier_at_its_floor_comes_back_after_a_long_feasible_phase() -> None:
    value = 4.0
    for _ in range(1000):
        value = LOG.update(value, -1.0)
    assert value == 0.25
    # Each violated rollout multiplies by exp(0.5): 0.25 · exp(0.5 · 3) = 1.12 after three.
    for _ in range(3):
        value = LOG.update(value, 1.0)
    assert value == pytest.approx(0.25 * math.exp(1.5))


@pytest.mark.parametrize("violation", [-1e308, -1.0, 0.0, 3.0, math.inf])
def test_a_fixed_multiplier_stays_what_it_is(violation: float) -> None:
    assert FixedMultiplier(0.7).update(0.7, violation) == 0.7
    assert FixedMultiplier().update(0.0, violation) == 0.0


ORDER = "0 <= minimum <= initial <= maximum, got {} <= {} <= {}"


@pytest.mark.parametrize(
    ("rule", "settings_given", "message"),
    [
        (ProjectedMultiplier, {"learning_rate": -0.1}, "learning_rate is >= 0, got -0.1"),
        (LogMultiplier, {"learning_rate": -2}, "learning_rate is >= 0, got -2"),
        (ProjectedMultiplier, {"initial": -1}, ORDER.format(0.0, -1, 100.0)),
        (ProjectedMultiplier, {"initial": 5, "maximum": 4}, ORDER.format(0.0, 5, 4)),
        (ProjectedMultiplier, {"initial": math.nan}, ORDER.format(0.0, math.nan, 100.0)),
        (ProjectedMultiplier, {"maximum": math.nan}, ORDER.format(0.0, 1.0, math.nan)),
        (LogMultiplier, {"initial": 0.001}, ORDER.format(0.01, 0.001, 100.0)),
        (LogMultiplier, {"initial": 101}, ORDER.format(0.01, 101, 100.0)),
        (LogMultiplier, {"minimum": 0}, "minimum is positive, got 0"),
        (LogMultiplier, {"minimum": -1}, "minimum is positive, got -1"),
        (LogMultiplier, {"minimum": math.nan}, ORDER.format(math.nan, 1.0, 100.0)),
        (FixedMultiplier, {"initial": -0.5}, ORDER.format(0.0, -0.5, math.inf)),
        (FixedMultiplier, {"initial": math.nan}, ORDER.format(0.0, math.nan, math.inf)),
        (ProjectedMultiplier, {"learning_rate": math.nan}, "learning_rate .*got nan"),
        (LogMultiplier, {"learning_rate": math.nan}, "learning_rate .*got nan"),
    ],
)
def test_settings_out_of_range_are_refused_with_what_was_given(
    rule: type[Multiplier], settings_given: dict[str, float], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        rule(**settings_given)


# -- rules that remember ---------------------------------------------------------------------------

PID = PIDMultiplier(0.5, 0.25, 2.0, smoothing=0.5, initial=1.0, maximum=4.0)
SOFTPLUS = SoftplusMultiplier(learning_rate=1.0, initial=1.0, minimum=0.01, maximum=4.0)


def run(rule: Multiplier, violations: list[float]) -> list[float]:
    state, values = rule.start(), []
    for violation in violations:
        state = rule.step(state, violation)
        values.append(state.value)
    return values


def test_pid_by_hand() -> None:
    # ḡ: 1, then (1 + 2)/2 = 1.5, then (1.5 - 1)/2 = 0.25. I: 1.25, 1.75, 1.5.
    # λ: 1.25 + 0.5; 1.75 + 0.75 + 2 · 0.5; 1.5 + 0.125 (a fall has no derivative part).
    assert run(PID, [1.0, 2.0, -1.0]) == pytest.approx([1.75, 3.5, 1.625])


def test_pid_without_proportion_and_derivative_is_projected_ascent() -> None:
    plain = PIDMultiplier(0.0, 0.5, 0.0, initial=1.0, maximum=4.0)
    violations = [2.0, -1.0, 5.0, 5.0, -3.0, -9.0, 1.0]
    value, expected = 1.0, []
    for violation in violations:
        value = PROJECTED.update(value, violation)
        expected.append(value)
    assert run(plain, violations) == pytest.approx(expected)


def test_an_integral_does_not_wind_up_beyond_the_cap() -> None:
    values = run(PID, [3.0] * 200 + [-1.0] * 3)
    assert values[199] == 4.0
    # Three steps of -0.25 from the cap, and -0.5 times the smoothed violation.
    assert values[-1] < 4.0 - 3 * 0.25 + 0.01


def test_softplus_by_hand() -> None:
    # ν starts at ln(e - 1); two steps of 0.5 lead to ln(e - 1) + 1.
    start = math.log(math.e - 1)
    found = run(SOFTPLUS, [0.5, 0.5])[-1]
    assert found == pytest.approx(math.log1p(math.exp(start + 1)))
    assert SOFTPLUS.start().value == 1.0


def test_softplus_forgets_what_lies_beyond_its_ends() -> None:
    values = run(SOFTPLUS, [-1.0] * 1000 + [1.0] * 5)
    assert values[999] == pytest.approx(0.01)
    assert values[-1] > 0.5  # ν = ln(e^0.01 - 1) + 5 = 0.4
    assert run(SOFTPLUS, [9.0] * 50)[-1] == pytest.approx(4.0)


@seeded
@given(st.sampled_from([PID, SOFTPLUS]), st.lists(violations, max_size=20))
def test_a_rule_that_remembers_stays_in_its_range(rule: Multiplier, given_: list[float]) -> None:
    assert all(0.0 <= value <= 4.0 for value in run(rule, given_))


@seeded
@given(st.sampled_from([PID, SOFTPLUS]), st.lists(st.floats(-3, 3), max_size=8), violations)
def test_a_larger_violation_never_gives_a_smaller_multiplier_whatever_came_before(
    rule: Multiplier, before: list[float], violation: float
) -> None:
    assert run(rule, [*before, violation])[-1] <= run(rule, [*before, abs(violation)])[-1]


def test_the_state_of_a_rule_goes_through_plain_floats() -> None:
    for rule in (PID, SOFTPLUS, PROJECTED, LOG):
        state = rule.step(rule.start(), 0.3)
        again = MultiplierState(float(state.value), tuple(float(m) for m in state.memory))
        assert rule.step(again, -0.2) == rule.step(state, -0.2)


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (PIDMultiplier, {"proportional": -1.0}, "proportional is >= 0, got -1.0"),
        (PIDMultiplier, {"derivative": math.nan}, "derivative is >= 0, got nan"),
        (PIDMultiplier, {"smoothing": 1.0}, "smoothing lies in"),
        (PIDMultiplier, {"initial": 200.0}, ORDER.format(0.0, 200.0, 100.0)),
        (SoftplusMultiplier, {"minimum": 0.0}, "minimum is positive, got 0.0"),
        (SoftplusMultiplier, {"initial": 101}, ORDER.format(0.01, 101, 100.0)),
    ],
)
def test_settings_of_a_rule_that_remembers_are_refused(
    rule: type[Multiplier], options: dict[str, float], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        rule(**options)
