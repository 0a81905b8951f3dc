"""What keeps a policy's training steady: KL control, score shaping, guarded gradients."""

import math
import warnings
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hcrlhf.constraint import Constraint
from hcrlhf.errors import InputError
from hcrlhf.kl import AdaptiveKL
from hcrlhf.multiplier import MultiplierState, ProjectedMultiplier
from hcrlhf.ppo import PPO
from tests.test_rloo import rollout_of


def policy(**options: Any) -> Any:
    from lightning_modules.policy import Policy

    return Policy("sft", "reward", "cost", [Constraint("mean", 0.0)], **options)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.5),  # on target
        (6.6, 0.5 * 1.01),  # a tenth above: a tenth of the gain
        (60.0, 0.5 * 1.02),  # never more than a fifth of the gain
        (0.0, 0.5 * 0.98),
        (-3.0, 0.5 * 0.98),  # the k1 estimate of one rollout may be negative
    ],
)
def test_the_kl_coefficient_follows_the_kl_slowly(kl: float, expected: float) -> None:
    assert AdaptiveKL(target=6.0).update(0.5, kl) == pytest.approx(expected)


def test_with_a_minimum_the_target_is_a_limit() -> None:
    limit = AdaptiveKL(target=6.0, minimum=0.5)
    assert limit.update(0.5, 2.0) == 0.5
    assert limit.update(0.5, 60.0) == pytest.approx(0.51)
    assert limit.update(0.6, 2.0) == pytest.approx(0.6 * 0.98)  # back to where it began
    assert limit.update(0.505, 2.0) == 0.5


@pytest.mark.parametrize(
    "options", [{"target": 0.0}, {"target": math.nan}, {"gain": -1.0}, {"minimum": -1.0}]
)
def test_a_controller_out_of_range_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match="of the adaptive KL is (positive|>= 0)"):
        AdaptiveKL(**{"target": 1.0, **options})


def test_a_gain_with_which_the_coefficient_falls_to_zero_for_good_is_refused() -> None:
    assert AdaptiveKL(target=6.0, gain=4.9).update(0.5, 0.0) > 0
    with pytest.raises(InputError, match="gain of the adaptive KL is below 5, got 5.0"):
        AdaptiveKL(target=6.0, gain=5.0)


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [("constant", [0.0, 0.5, 1.0, 1.0, 1.0]), ("linear", [0.0, 0.5, 1.0, 0.5, 0.0])],
)
def test_every_schedule_begins_with_the_warm_up(schedule: Any, factors: list[float]) -> None:
    module = policy(schedule=schedule, warmup=0.5, learning_rate=2.0)
    module._trainer = SimpleNamespace(estimated_stepping_batches=4)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = module.scheduled(optimizer)["lr_scheduler"]["scheduler"]
    rates = []
    for _ in factors:
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == [2 * factor for factor in factors]


def test_scores_are_clamped_and_cut_responses_pay_and_costs_stay_what_they_are() -> None:
    rollout = rollout_of(["a", "b", "c"], [[0.0]] * 3, [1, 1, 1])
    tokens = replace(rollout.tokens, truncated=torch.tensor([False, True, True]))
    rollout = replace(rollout, tokens=tokens, rewards=torch.tensor([9.0, 1.0, -9.0]))
    rollout = replace(rollout, costs=np.array([8.0, -8.0, 0.5]))
    shaped = policy(score_clip=2.0, truncation_penalty=0.5)
    streams, _ = shaped._constrain(rollout)
    assert streams[0].tolist() == [2.0, 0.5, -2.5]
    plain, _ = policy()._constrain(rollout)
    assert plain[0].tolist() == [9.0, 1.0, -9.0]
    assert streams[1].tolist() == plain[1].tolist()


def test_a_gradient_that_is_not_finite_is_skipped_and_ten_in_a_row_end_the_run() -> None:
    module = policy()
    good, bad = torch.tensor(1.0), torch.tensor(math.nan)
    assert module._usable(good)
    for _ in range(9):
        assert not module._usable(bad)
    assert module._usable(good)  # the count begins anew
    for _ in range(9):
        assert not module._usable(torch.tensor(math.inf))
    with pytest.raises(FloatingPointError, match="10 gradients in a row"):
        module._usable(bad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score_clip": 0.0}, "score_clip is positive"),
        ({"truncation_penalty": -1.0}, "truncation_penalty is >= 0"),
        ({"truncation_penalty": math.inf}, "truncation_penalty is >= 0"),
        ({"kl_coefficient": math.nan}, "kl_coefficient is >= 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is positive, got 0.0; .inf"),
        ({"critic_learning_rate": 0.0}, "critic_learning_rate is positive or null, got 0.0"),
        ({"kl_coefficient": 0.0, "adaptive_kl": AdaptiveKL(1.0)}, "so that it stays 0"),
        (
            {"kl_coefficient": 0.1, "adaptive_kl": AdaptiveKL(1.0, minimum=0.2)},
            "kl_coefficient 0.1 lies below the minimum 0.2 of adaptive_kl",
        ),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        policy(**options)


def test_after_the_warm_up_multipliers_and_kl_coefficient_are_steered() -> None:
    module = policy(adaptive_kl=AdaptiveKL(target=1.0), critic_warmup=1)
    assert module._warming_up
    rollout = rollout_of(["a", "b"], [[0.5]] * 2, [1, 1])
    before = (module.kl_coefficient, module.dual.multipliers)
    module.updates = 1
    assert not module._warming_up
    module._steer(rollout, [1.0])
    assert module.kl_coefficient != before[0]
    assert module.dual.multipliers[0] > before[1][0]


@pytest.mark.parametrize(
    ("multiplier", "violations", "words"),
    [
        # At its cap from the third step on, for 50 of them.
        (
            ProjectedMultiplier(1.0, 0.0, maximum=3.0),
            [1.0] * 52,
            "at its cap 3 for 50 updates",
        ),
        # Far from it, and the limit was never kept.
        (
            ProjectedMultiplier(0.01, 0.0),
            [1.0] * 50,
            "target for 50 updates, λ is 0.5",
        ),
        (ProjectedMultiplier(1.0, 0.0), [*[1.0] * 49, -1.0, *[1.0] * 49], None),
        # Only the margin to the limit is missing: the last cost is what the forecast is made of.
        (ProjectedMultiplier(0.01, 0.0), [0.1] * 50, None),
    ],
)
def test_a_limit_that_may_not_be_reachable_is_said_once(
    multiplier: ProjectedMultiplier, violations: list[float], words: str | None
) -> None:
    module = policy(multiplier=multiplier)
    costs = np.array([1.0, 3.0]) if violations[0] == 1.0 else np.array([-9.0, -9.1])
    rollout = replace(rollout_of(["a", "b"], [[0.0]] * 2, [1, 1]), costs=costs)
    said = []
    for g in violations:
        module.dual.step([g])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module._warn_unreachable(rollout)
        said += [str(w.message) for w in caught]
    if words is None:
        assert said == []
    else:
        assert words in said[-1] and "may not be reachable" in said[-1] and "limit 0" in said[-1]
        assert len([s for s in said if words in s]) == 1


def test_a_policy_needs_the_prompts_of_a_data_module() -> None:
    module = policy()
    module._trainer = SimpleNamespace(datamodule=None)
    with pytest.raises(InputError, match="a data module like datamodules.Prompts.*got NoneType"):
        module._data_module()


def test_prompts_that_a_scorer_knows_only_once_it_is_loaded_are_asked_for_again() -> None:
    module, key = policy(), "ab" * 16
    module.folders, known = {}, set()
    module.scorers = {"cost": SimpleNamespace(training_prompt_keys=lambda: frozenset(known))}
    assert module.training_prompt_keys() == frozenset()
    known.add(key)
    assert module.training_prompt_keys() == {key}


def test_a_margin_that_punishes_safe_responses_is_said_once() -> None:
    from lightning_modules.policy import Policy

    module = Policy("sft", "reward", "cost", [Constraint("mean", 0.0, pessimism=1.5)])
    costs, keys = np.array([*[0.0] * 17, *[-5.0] * 3]), [str(row) for row in range(20)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start = module.dual.states
        module.dual.states = [MultiplierState(0.0)]
        module.dual.judge(costs, keys)
        module._warn_reversed()
        assert not caught  # nothing is punished while λ is 0
        module.dual.states = start
        for _ in range(3):
            module.dual.judge(costs, keys)
            module._warn_reversed()
    assert len(caught) == 1
    assert "15% of the responses are so safe that the margin of k = 1.5" in str(caught[0].message)


@pytest.mark.parametrize(
    ("prompts", "minibatches", "processes", "refused"),
    [(8, 4, 2, False), (8, 5, 2, True), (2, 8, 2, True), (8, 4, 3, True), (1, 1, 1, False)],
)
def test_a_minibatch_is_not_shared_by_more_processes_than_it_has_responses(
    prompts: int, minibatches: int, processes: int, refused: bool
) -> None:
    module = policy(learner=PPO(minibatches=minibatches))
    data = SimpleNamespace(prompts_per_update=prompts)
    module._trainer = SimpleNamespace(world_size=processes, datamodule=data)
    refusal = pytest.raises(InputError, match="cannot be shared by") if refused else nullcontext()
    with refusal:
        module._check_minibatches()
