"""The bounds as objects that a constraint holds."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcrlhf.bounds import clopper_pearson_upper, student_t_upper
from hcrlhf.errors import InputError
from hcrlhf.methods import ClopperPearson, StudentT

seeded = settings(deadline=None, derandomize=True, max_examples=50)

deltas = st.floats(0.001, 0.999)
# Whole numbers / 8: exact in binary, so that a sample has spread or has none, and nothing between.
samples = st.lists(st.integers(-800, 800), min_size=2, max_size=30).map(
    lambda x: np.array(x, dtype=np.float64) / 8
)
spread_samples = samples.filter(lambda x: x.min() < x.max())


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


def test_student_t_is_called_asymptotic() -> None:
    assert StudentT.kind == "asymptotic"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bound", [StudentT(), ClopperPearson()])
def test_a_cost_that_is_not_finite_gets_no_bound(
    bound: StudentT | ClopperPearson, bad: float
) -> None:
    for call in (bound.upper, lambda x, delta: bound.forecast(x, 10, delta)):
        with pytest.raises(InputError, match="1 of 4 costs are not finite"):
            call([0.0, 1.0, bad, 1.0], 0.05)
