"""Which policy of a run is tested: the best one that is likely to pass."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from callbacks import BestCandidate
from hcrlhf.constraint import Constraint
from hcrlhf.errors import InputError
from hcrlhf.examples import Prompt, user_turn
from hcrlhf.methods import StudentT

pytestmark = pytest.mark.filterwarnings("ignore")

# -- how likely a policy is to pass ----------------------------------------------------------------


@pytest.mark.parametrize("harmful", [15, 25, 36, 45])
def test_the_forecast_of_a_harm_rate_agrees_with_a_beta_binomial(harmful: int) -> None:
    limit = Constraint("harm_rate", 0.15, safety_prompts=500)
    costs = np.where(np.arange(400) < harmful, 1.0, -1.0)
    most = max(h for h in range(100) if stats.beta.ppf(0.95, h + 1, 500 - h) <= 0.15)
    expected = stats.betabinom(500, harmful + 0.5, 400 - harmful + 0.5).cdf(most)
    # 400 trials: three standard errors, and what the two ways to not know p differ by.
    assert limit.pass_probability(costs) == pytest.approx(expected, abs=0.075 + 0.02)


def test_the_forecast_of_a_mean_agrees_with_the_normal_law() -> None:
    limit = Constraint("mean", 0.0, safety_prompts=300, bound=StudentT())
    costs = np.random.default_rng(1).normal(size=200)
    costs = (costs - costs.mean()) / costs.std() - 0.15
    wide = np.sqrt(1 / 300 + 1 / 200)  # the test's own luck, and not knowing the policy
    factor = stats.t.ppf(0.95, 299) / np.sqrt(300)
    expected = stats.norm.cdf((0.15 - factor) / wide)
    assert 0.6 < expected < 0.9
    assert limit.pass_probability(costs) == pytest.approx(expected, abs=0.075)


def test_far_from_the_limit_the_forecast_is_certain_and_a_bad_cost_is_never_safe() -> None:
    limit = Constraint("mean", 0.0, safety_prompts=100, bound=StudentT())
    spread = np.linspace(-0.1, 0.1, 50)
    assert limit.pass_probability(spread - 5) == 1.0
    assert limit.pass_probability(spread + 5) == 0.0
    assert limit.pass_probability(np.append(spread - 5, np.nan)) == 0.0


# -- the choice ------------------------------------------------------------------------------------


class Run:
    """A policy whose rewards and costs after each update are given; weights are their number."""

    def __init__(self, looks: dict[int, tuple[float, float]], updates: int) -> None:
        self.looks, self.updates, self.candidate = looks, 0, None
        self.again = dict(looks)  # with other random numbers
        self.constraints = (Constraint("mean", 0.0, safety_prompts=50, bound=StudentT()),)
        self.weights = torch.zeros(1)
        self.training_costs: list[float] = []
        self.asked: list[int] = []
        prompts = [Prompt(user_turn(str(i))) for i in range(30)]
        data = SimpleNamespace(updates=updates, validation_prompts=prompts)
        self.trainer = SimpleNamespace(datamodule=data, fast_dev_run=0)
        self.device = torch.device("cpu")

    def encode(self, prompt: Prompt) -> int | None:
        return None if prompt.text == "29" else int(prompt.text)  # one does not fit

    def collate(self, encoded: list[int]) -> torch.Tensor:
        return torch.tensor(encoded)

    def answers(self, batch: torch.Tensor, purpose: str) -> list[dict[str, Any]]:
        update = int(self.weights.item())
        reward, cost = (self.again if "confirm" in purpose else self.looks)[update]
        self.asked += batch.tolist()
        return [{"reward": reward, "cost": cost + 0.01 * (i % 3)} for i in batch.tolist()]

    def policy_state(self) -> dict[str, torch.Tensor]:
        return {"w": self.weights.clone()}

    def load_policy_state(self, state: dict[str, torch.Tensor], update: int) -> None:
        self.weights, self.candidate = state["w"], update

    def fit(self, callback: BestCandidate, begin: int = 0, end: int | None = None) -> None:
        """Args: end: the last update, where it is not the one that was planned."""
        end = self.trainer.datamodule.updates if end is None else end
        self.updates = begin
        callback.on_train_start(self.trainer, self)  # type: ignore[arg-type]
        self.began_with = self.weights.item()
        for update in range(begin + 1, end + 1):
            self.updates = update
            self.weights = torch.tensor([float(update)])
            callback.on_train_batch_end(self.trainer, self, None, None, update - 1)  # type: ignore[arg-type]
        callback.on_train_epoch_end(self.trainer, self)  # type: ignore[arg-type]


def test_the_best_policy_that_is_likely_to_pass_is_the_candidate() -> None:
    # A better one breaks the limit, a safer one is worse, the last one is neither.
    run = Run({4: (1.0, -1.0), 6: (2.0, -1.0), 8: (9.0, 1.0), 9: (1.5, -2.0)}, updates=9)
    run.fit(BestCandidate(every_n_updates=2, start=0.4, batch_size=8, prompts=20))
    assert (run.candidate, run.weights.item()) == (6, 6.0)
    # A look asks so many; the one that confirms asks every prompt that fits.
    assert run.asked == [*range(20)] * 4 + [*range(29)]


@pytest.mark.parametrize(
    ("again", "candidate"),
    [
        ({}, 6),
        ({6: 1.0}, 9),  # luck: the next best is taken
        ({6: 1.0, 9: 1.0}, 4),
        ({6: 1.0, 9: 1.0, 4: 2.0}, 2),
        # None is likely: the one that comes nearest.
        ({6: 1.0, 9: -0.0119, 4: 2.0, 2: 1.0}, 9),
    ],
)
def test_the_best_of_many_looks_has_to_pass_another_one(
    again: dict[int, float], candidate: int
) -> None:
    looks = {2: (0.5, -1.0), 4: (1.0, -1.0), 6: (2.0, -1.0), 8: (9.0, 1.0), 9: (1.5, -2.0)}
    run = Run(looks, updates=9)
    run.again |= {update: (0.0, cost) for update, cost in again.items()}
    run.fit(BestCandidate(every_n_updates=2, start=0.0))
    assert (run.candidate, run.weights.item()) == (candidate, float(candidate))


def test_a_reward_that_is_not_a_number_is_never_the_best_one() -> None:
    nan = math.nan
    run = Run({2: (0.5, -1.0), 4: (nan, -1.0), 6: (2.0, -1.0), 8: (nan, -1.0)}, updates=8)
    run.fit(BestCandidate(every_n_updates=2, start=0.0))
    assert run.candidate == 6


def test_without_one_that_has_a_chance_the_last_policy_stays() -> None:
    run = Run({2: (1.0, 1.0), 4: (2.0, 1.0)}, updates=4)
    run.fit(BestCandidate(every_n_updates=2, start=0.0))
    assert (run.candidate, run.weights.item()) == (None, 4.0)


def test_where_none_is_likely_enough_the_one_that_comes_nearest_is_the_candidate() -> None:
    # Chances of about 50% and 70%: a later and better one, and the last one, have none.
    looks = {2: (1.0, -0.0119), 4: (0.5, -0.0125), 6: (2.0, 1.0), 8: (3.0, 1.0)}
    run = Run(looks, updates=8)
    run.fit(BestCandidate(every_n_updates=2, start=0.0))
    assert (run.candidate, run.weights.item()) == (4, 4.0)
    # A likely one comes before any that is not, whatever the reward.
    run = Run({**looks, 6: (0.1, -1.0)}, updates=8)
    run.fit(BestCandidate(every_n_updates=2, start=0.0))
    assert (run.candidate, run.weights.item()) == (6, 6.0)


def test_a_look_forgives_what_the_last_one_decides() -> None:
    # After update 2 a chance between 80% and 95%, and above that where the policy is known.
    looks = {2: (1.0, -0.0141), 4: (0.5, -1.0)}
    run = Run(looks, updates=4)
    run.fit(BestCandidate(every_n_updates=2, start=0.0))
    assert run.candidate == 4
    run = Run(looks, updates=4)
    # Of so many prompts next to no doubt of the policy is left.
    many = [Prompt(user_turn(str(i))) for i in range(100, 700)]
    run.trainer.datamodule.validation_prompts = many
    run.fit(BestCandidate(every_n_updates=2, start=0.0, prompts=30))
    assert run.candidate == 2


@pytest.mark.parametrize(
    ("cost", "chance", "candidate"), [(-0.0115, 0.465, 4), (-0.0125, 0.675, 2)]
)
def test_less_than_an_even_chance_is_never_forgiven(
    cost: float, chance: float, candidate: int
) -> None:
    """Four times this miss are 80%, so that a chance of 20% would do."""
    run = Run({2: (1.0, cost), 4: (0.5, -1.0)}, updates=4)
    run.constraints = (replace(run.constraints[0], miss_probability=0.2),)
    looked_at = [cost + 0.01 * (i % 3) for i in range(29)]
    assert run.constraints[0].pass_probability(looked_at) == pytest.approx(chance, abs=0.02)
    run.again[2] = (1.0, -1.0)
    run.fit(BestCandidate(every_n_updates=2, start=0.0))
    assert run.candidate == candidate


def test_a_run_that_is_cut_short_before_the_first_look_is_looked_at_all_the_same() -> None:
    run = Run({2: (2.0, -1.0)}, updates=100)
    run.fit(BestCandidate(start=0.6, every_n_updates=2), end=2)
    assert run.candidate == 2
    tried = Run({1: (2.0, -1.0)}, updates=100)
    tried.trainer.fast_dev_run = 1
    tried.fit(BestCandidate(every_n_updates=1), end=1)
    assert tried.asked == [] and tried.candidate is None


def test_the_candidate_survives_a_checkpoint() -> None:
    looks = {2: (3.0, -1.0), 4: (1.0, -1.0)}
    broken, whole = Run(looks, updates=2), Run(looks, updates=4)
    before = BestCandidate(every_n_updates=2, start=0.0)
    broken.fit(before)
    after = BestCandidate(every_n_updates=2, start=0.0)
    after.load_state_dict(before.state_dict())
    whole.fit(after, begin=2)
    assert (whole.candidate, whole.weights.item()) == (2, 2.0)


def test_a_finished_run_with_more_updates_goes_on_from_its_last_policy_not_from_the_candidate() -> (
    None
):
    looks = {2: (3.0, -1.0), 4: (1.0, -1.0), 6: (2.0, -1.0)}
    first, longer, again = Run(looks, updates=4), Run(looks, updates=6), Run(looks, updates=4)
    callback = BestCandidate(every_n_updates=2, start=0.0)
    first.fit(callback)
    assert (first.candidate, first.weights.item()) == (2, 2.0)
    resumed = BestCandidate(every_n_updates=2, start=0.0)
    resumed.load_state_dict(callback.state_dict())
    longer.weights = first.weights
    longer.fit(resumed, begin=4)
    assert longer.began_with == 4.0
    assert (longer.candidate, longer.weights.item()) == (2, 2.0)
    # Nothing more to train, as where only the test is pending: the candidate stays.
    resumed.load_state_dict(callback.state_dict())
    again.weights = first.weights
    again.updates = 4
    resumed.on_train_start(again.trainer, again)  # type: ignore[arg-type]
    assert again.weights.item() == 2.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_updates": 0}, "every_n_updates is a whole number"),
        ({"batch_size": 0}, "batch_size is a whole number"),
        ({"prompts": 0}, "prompts is a whole number"),
        ({"start": 1.5}, r"share of the run in \[0, 1\]"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BestCandidate(**options)


def test_a_stage_without_a_policy_is_refused() -> None:
    with pytest.raises(InputError, match="object is none; remove callbacks.BestCandidate"):
        BestCandidate().setup(SimpleNamespace(), object(), "fit")  # type: ignore[arg-type]
