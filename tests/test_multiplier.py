"""Multipliers: hand-worked steps, range and monotonicity."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcrlhf.errors import InputError
from hcrlhf.multiplier import FixedMultiplier, LogMultiplier, Multiplier, ProjectedMultiplier

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
