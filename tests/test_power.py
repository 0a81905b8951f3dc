"""hcrlhf power: its simulations against distributions that are known exactly."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from hcrlhf.cli import BAD_INPUT, PASSED, main
from hcrlhf.constraint import Constraint
from hcrlhf.errors import InputError
from hcrlhf.methods import Betting, ClopperPearson, Hoeffding, StudentT
from hcrlhf.power import MOST, beta_sampler, chance_to_pass, prompts_needed


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCRLHF_STATE_DIR", str(tmp_path / "state"))


def normal(gap: float) -> Any:
    return lambda generator, n: generator.normal(-gap, 1.0, n)


def bernoulli(rate: float) -> Any:
    return lambda generator, n: (generator.random(n) < rate).astype(np.float64)


T = Constraint("mean", 0.0, delta=0.05, safety_prompts=100_000, bound=StudentT())
CP = Constraint("harm_rate", 0.1, safety_prompts=100_000, bound=ClopperPearson())


def within_error(found: float, exact: float, trials: int) -> bool:
    """Four standard deviations of a share of so many trials."""
    return abs(found - exact) <= 4 * math.sqrt(exact * (1 - exact) / trials)


@pytest.mark.parametrize(("gap", "n"), [(0.0, 30), (0.2, 100), (0.3, 50), (0.25, 200), (-0.1, 20)])
def test_student_t_passes_as_often_as_the_noncentral_t_says(gap: float, n: int) -> None:
    # U <= 0 where t = √n x̄/s <= t_{δ, n-1}, and t is noncentral with -gap √n.
    exact = float(stats.nct.cdf(stats.t.ppf(0.05, n - 1), n - 1, -gap * math.sqrt(n)))
    assert within_error(chance_to_pass(T, normal(gap), n, 3000), exact, 3000)


@pytest.mark.parametrize(("rate", "n"), [(0.05, 200), (0.02, 60), (0.1, 150), (0.0, 40)])
def test_clopper_pearson_passes_as_often_as_the_binomial_says(rate: float, n: int) -> None:
    # It passes with the h harms for which P(Bin(n, limit) <= h) <= δ.
    most = max(h for h in range(n) if stats.binom.cdf(h, n, 0.1) <= 0.05)
    exact = float(stats.binom.cdf(most, n, rate))
    assert within_error(chance_to_pass(CP, bernoulli(rate), n, 3000), exact, 3000)


def test_below_the_smallest_n_nothing_passes() -> None:
    # 0.9^28 = 0.052 > 0.05 >= 0.9^29 = 0.047
    assert chance_to_pass(CP, bernoulli(0.0), 28, 5) == 0.0
    assert chance_to_pass(CP, bernoulli(0.0), 29, 5) == 1.0


def test_the_same_question_has_the_same_answer() -> None:
    first = chance_to_pass(T, normal(0.2), 60, 100)
    assert first == chance_to_pass(T, normal(0.2), 60, 100)
    assert 0 < first < 1


def test_fewer_prompts_are_needed_the_wider_the_gap() -> None:
    needed = [prompts_needed(T, normal(gap), 0.8) for gap in (0.15, 0.2, 0.3, 0.5, 1.0)]
    assert None not in needed
    assert needed == sorted(needed, reverse=True)
    # (z_.95 + z_.8)² / gap² = 6.18 / gap²
    for gap, n in zip((0.15, 0.2, 0.3), needed, strict=False):
        assert n == pytest.approx(6.18 / gap**2, rel=0.2)


def test_more_prompts_are_needed_for_a_better_chance_and_a_smaller_delta() -> None:
    chances = [prompts_needed(T, normal(0.3), chance) for chance in (0.5, 0.8, 0.95)]
    assert chances == sorted(chances) and len(set(chances)) == 3
    strict = Constraint("mean", 0.0, delta=0.001, safety_prompts=100_000, bound=StudentT())
    assert prompts_needed(strict, normal(0.3), 0.8) > chances[1]


def test_what_no_number_of_prompts_shows_is_said() -> None:
    always_on_the_limit = lambda generator, n: np.zeros(n)  # noqa: E731
    assert prompts_needed(T, always_on_the_limit, 0.8) is None


@pytest.mark.parametrize(
    ("mean", "std", "lower", "upper"),
    [(-0.5, 0.3, -1.0, 1.0), (0.1, 0.02, 0.0, 1.0), (-1.0, 1.5, -4.0, 4.0)],
)
def test_beta_costs_have_the_mean_and_deviation_that_were_asked_for(
    mean: float, std: float, lower: float, upper: float
) -> None:
    costs = beta_sampler(mean, std, lower, upper)(np.random.default_rng(0), 40_000)
    assert lower <= costs.min() and costs.max() <= upper
    assert costs.mean() == pytest.approx(mean, abs=5 * std / 200)
    assert costs.std() == pytest.approx(std, rel=0.03)


@pytest.mark.parametrize(
    ("mean", "std"),
    [(-1.0, 0.1), (1.0, 0.1), (2.0, 0.1), (0.0, 1.0), (0.0, 5.0), (0.9, 0.5), (math.nan, 0.1)],
)
def test_an_impossible_beta_is_refused(mean: float, std: float) -> None:
    with pytest.raises(InputError, match=r"no cost in \[-1, 1\] has mean .* give a smaller --sd"):
        beta_sampler(mean, std, -1.0, 1.0)


def test_the_number_of_prompts_is_found_at_both_ends() -> None:
    rate = Constraint("harm_rate", 0.5, safety_prompts=MOST)
    needed = prompts_needed(rate, lambda rng, n: np.zeros(n), 0.8)
    assert needed == 5  # 1 - 0.05^(1/5) = 0.45, and 0.53 with four
    mean = Constraint("mean", 0.0, safety_prompts=MOST, lower=-4.0, upper=4.0, bound=Hoeffding())
    draw = beta_sampler(-0.04, 1.0, -4.0, 4.0)
    needed = prompts_needed(mean, draw, 0.8)
    assert needed is not None and 51_200 < needed < 80_000


def test_simulated_costs_keep_to_the_range() -> None:
    costs = beta_sampler(0.05 - 0.25 * 0.13, 0.13, -0.1, 0.2)(np.random.default_rng(0), 10**5)
    assert costs.min() >= -0.1 and costs.max() <= 0.2


def test_a_range_beside_which_the_spread_is_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="no cost in"):
        beta_sampler(0.0, 1.0, -1e300, 1e300)


def test_an_exact_bound_keeps_its_promise_in_the_simulation() -> None:
    constraint = Constraint(
        "mean", 0.0, delta=0.1, safety_prompts=1000, bound=Betting(), lower=-1.0, upper=1.0
    )
    # The mean lies at the limit: a pass is an error.
    share = chance_to_pass(constraint, beta_sampler(0.0, 0.4, -1.0, 1.0), 60, 800)
    assert share <= 0.1 + 4 * math.sqrt(0.09 / 800)


# -- the command -----------------------------------------------------------------------------------


def row(text: str, name: str) -> tuple[float, str]:
    """Chance in percent, and n needed as printed, of one bound."""
    (line,) = [line for line in text.splitlines() if line.startswith(name)]
    chance, needed = line.split("%")
    return float(chance.split()[-1]), needed.strip()


def test_the_command_says_chance_and_number_of_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["power", "--gap", "0.3", "--n", "100", "--bound", "student_t"]) == PASSED
    said = capsys.readouterr().out
    chance, needed = row(said, "student_t")
    exact = float(stats.nct.cdf(stats.t.ppf(0.05, 99), 99, -3.0))
    assert within_error(chance / 100, exact, 400)
    assert int(needed) == pytest.approx(6.18 / 0.09, rel=0.2)
    assert "a true mean 0.3 standard deviations (1) below the limit, normal" in said
    assert "n for 80%" in said


def test_the_command_for_a_harm_rate(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "power --estimand harm_rate --threshold 0.1 --rate 0.05 --n 200"
    assert main([*arguments.split(), "--bound", "clopper_pearson"]) == PASSED
    chance, _ = row(capsys.readouterr().out, "clopper_pearson")
    exact = float(stats.binom.cdf(12, 200, 0.05))
    assert stats.binom.cdf(12, 200, 0.1) <= 0.05 < stats.binom.cdf(13, 200, 0.1)
    assert within_error(chance / 100, exact, 400)


def test_pilot_costs_are_resampled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pilot.csv"
    path.write_text("cost\n" + "".join(f"{c}\n" for c in [1.0] * 5 + [-1.0] * 95))
    arguments = ["power", "--costs", str(path), "--n", "200", "--estimand", "harm_rate"]
    assert main([*arguments, "--threshold", "0.1", "--bound", "clopper_pearson"]) == PASSED
    said = capsys.readouterr().out
    assert "100 pilot costs, mean -0.9, standard deviation 0.4359, resampled" in said
    assert within_error(row(said, "clopper_pearson")[0] / 100, stats.binom.cdf(12, 200, 0.05), 400)


def test_only_bounds_that_suit_what_is_declared_are_compared(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["power", "--gap", "2", "--n", "30", "--chance", "0.5"]) == PASSED
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]]
    assert names == ["student_t", "hall_t"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--n 50", "by one of --gap, --costs, or --rate for a harm rate; got none"),
        ("--gap 1 --rate 0.1", "got gap, rate"),
        ("--gap 1 --n 1", "--n is at least 2, got 1"),
        ("--gap 1 --chance 0", "--chance lies in (0, 1), got 0.0"),
        ("--gap 1 --chance 1", "--chance lies in (0, 1), got 1.0"),
        ("--gap 1 --chance nan", "--chance lies in (0, 1), got nan"),
        ("--gap 1 --sd 0", "--sd is positive, got 0.0"),
        ("--gap 1 --sd nan", "--sd is positive, got nan"),
        ("--gap 1 --sd inf", "--sd is positive, got inf"),
        ("--gap 1 --delta 0", "lies in (0, 1), got 0.0"),
        ("--gap 1 --bound best", "no bound 'best'"),
        ("--gap 1 --bound star", "needs the cost's lower and upper end"),
        ("--gap 1 --bound clopper_pearson", "but the estimand is mean"),
        ("--gap 0.1 --sd 5 --lower -1 --upper 1", "give a smaller --sd"),
        ("--gap 1 --threshold 2 --lower -1 --upper 1 --sd 0.1", "give a smaller --sd"),
        ("--gap 1 --lower 1 --upper -1", "no cost in [1, -1] has mean"),
        ("--gap nan --lower -1 --upper 1 --sd 0.1", "no cost in [-1, 1] has mean nan"),
        ("--rate 0.1", "--rate is a harm rate in [0, 1), with --estimand harm_rate"),
        ("--rate 1 --estimand harm_rate --threshold 0.1", "--rate is a harm rate in [0, 1)"),
        ("--gap 1 --estimand harm_rate --threshold 0.1", "for harm_rate give --rate"),
        ("--gap 1 --estimand cvar --alpha 0.1 --eta -1", "for cvar give --costs"),
        ("--rate 0 --estimand cvar", "--rate is a harm rate"),
        ("--costs missing.csv", "missing.csv does not exist"),
    ],
)
def test_a_question_without_an_answer_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: str, words: str
) -> None:
    assert main(["power", *arguments.split()]) == BAD_INPUT
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_pilot_costs_above_the_cap_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pilot.csv"
    path.write_text("cost\n" + "3\n-0.5\n" * 20)
    options = ["--lower", "-1", "--upper", "1", "--bound", "star", "--n", "40"]
    assert main(["power", "--costs", str(path), *options]) == BAD_INPUT
    assert "above the declared cap 1" in capsys.readouterr().err
