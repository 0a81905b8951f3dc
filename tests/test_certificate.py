"""Plan, verdict and certificate: what a third party can check without the model."""

import copy
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcrlhf.bounds import StudentT
from hcrlhf.certificate import (
    NOT_COVERED,
    certificate_page,
    claim_sentence,
    json_hash,
    judge,
    make_certificate,
    make_plan,
    response_seed_text,
    safety_order,
    set_hash,
    sha256,
    verdict_record,
    write_json,
)
from hcrlhf.constraint import Constraint
from hcrlhf.errors import InputError
from hcrlhf.examples import prompt_key, user_turn
from hcrlhf.safety import CostSamples

seeded = settings(deadline=None, derandomize=True, max_examples=50)

N = 40
MEAN = Constraint(threshold=0.0, delta=0.05, safety_prompts=N)
RATE = Constraint("harm_rate", threshold=0.3, delta=0.1, safety_prompts=N)
KEYS = tuple(prompt_key(user_turn(f"question number {i}")) for i in range(N))
POOL = (*KEYS, *(prompt_key(user_turn(f"spare {i}")) for i in range(10)))
PROVENANCE = {"backbone": "b" * 64, "decoding": {"temperature": 1.0}, "seed": 3}


def samples(costs: np.ndarray | None = None) -> CostSamples:
    """One response to each of N prompts, two cost columns."""
    if costs is None:
        costs = np.random.default_rng(0).normal(-1.0, 0.8, size=(N, 1, 2)) / 3
    truncated = np.zeros(costs.shape[:2], dtype=np.bool_)
    truncated[:3] = True
    return CostSamples(KEYS[: len(costs)], costs, (("text",),) * len(costs), truncated)


def plan_of(**changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "constraints": [MEAN, RATE],
        "pool": POOL,
        "chosen": KEYS,
        "left_out": 2,
        "policy_hash": "a" * 64,
        "provenance": PROVENANCE,
    }
    return make_plan(**given | changes)


def certificate() -> dict[str, Any]:
    judgements = judge([MEAN, RATE], samples())
    assert all(j.passed for j in judgements)
    return make_certificate([MEAN, RATE], judgements, samples(), plan_of())


# -- hashes ----------------------------------------------------------------------------------------


def test_hashes_are_those_of_any_other_tool() -> None:
    # printf 'a/b' | sha256sum; printf '{"a":[1,2],"b":"\u00e9"}' | sha256sum
    assert sha256("a", "b") == "c14cddc033f64b9dea80ea675cf280a015e672516090a5626781153dc68fea11"
    assert json_hash({"b": 1, "a": 2}) == sha256('{"a":2,"b":1}')
    assert json_hash({"b": "é", "a": [1, 2]}) == sha256('{"a":[1,2],"b":"\\u00e9"}')


@seeded
@given(st.permutations(KEYS[:8]))
def test_order_and_identity_do_not_depend_on_the_order_that_was_given(keys: list[str]) -> None:
    assert safety_order(keys) == safety_order(KEYS[:8])
    assert set_hash(keys) == set_hash(KEYS[:8])
    assert response_seed_text("policy", keys) == response_seed_text("policy", KEYS[:8])


def test_the_order_is_a_permutation_that_another_set_would_change() -> None:
    assert sorted(safety_order(KEYS)) == sorted(KEYS)
    assert safety_order(KEYS) not in (list(KEYS), sorted(KEYS))
    # The same prompts in a larger pool come in another order: nobody can pick the first ones.
    larger = [key for key in safety_order([*KEYS, "f" * 64]) if key in KEYS]
    assert larger != safety_order(KEYS)


def test_seeds_follow_from_the_policy_and_the_set() -> None:
    texts = {
        response_seed_text(policy, keys) for policy in ("p", "q") for keys in (KEYS, KEYS[:-1])
    }
    assert len(texts) == 4


def test_a_set_with_another_prompt_has_another_hash() -> None:
    assert len({set_hash(KEYS), set_hash(KEYS[:-1]), set_hash([*KEYS, "f" * 64])}) == 3


# -- the plan --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OtherBound(StudentT):
    name = "other"


@pytest.mark.parametrize(
    "changes",
    [
        {"constraints": [replace(MEAN, threshold=-1e-9), RATE]},
        {"constraints": [replace(MEAN, delta=0.050000001), RATE]},
        {"constraints": [replace(MEAN, safety_prompts=N + 1), RATE]},
        {"constraints": [replace(MEAN, bound=OtherBound()), RATE]},
        {"constraints": [replace(RATE, threshold=0.29), RATE]},
        {"constraints": [MEAN, MEAN]},
        {"constraints": [MEAN]},
        {"pool": POOL[:-1]},
        {"pool": (*POOL[:-1], "f" * 64)},
        {"chosen": KEYS[:-1]},
        {"chosen": (*KEYS[:-1], POOL[-1])},
        {"left_out": 3},
        {"policy_hash": "a" * 63 + "b"},
        {"provenance": PROVENANCE | {"seed": 4}},
        {"provenance": PROVENANCE | {"decoding": {"temperature": 0.9}}},
        {"provenance": PROVENANCE | {"more": None}},
        {"provenance": {}},
    ],
)
def test_another_plan_has_another_hash(changes: dict[str, Any]) -> None:
    assert json_hash(plan_of(**changes)) != json_hash(plan_of())


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*path, key))
    else:
        yield path


def test_no_field_of_a_plan_can_be_edited_without_changing_its_hash() -> None:
    plan = plan_of()
    hashes = {json_hash(plan)}
    paths = list(leaves(plan))
    for path in paths:
        edited = copy.deepcopy(plan)
        place = edited
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = f"{place[path[-1]]}?"
        hashes.add(json_hash(edited))
    assert len(hashes) == 1 + len(paths) > 25


def test_a_plan_does_not_depend_on_the_order_of_prompts_and_survives_its_file(
    tmp_path: Path,
) -> None:
    plan = plan_of()
    assert json_hash(plan_of(pool=POOL[::-1], chosen=KEYS[::-1])) == json_hash(plan)
    write_json(tmp_path / "plan.json", plan)
    assert json_hash(json.loads((tmp_path / "plan.json").read_text())) == json_hash(plan)


def test_a_plan_counts_prompts_and_names_none_of_them() -> None:
    plan = plan_of()
    assert plan["safety_set"]["pool"] == N + 10
    assert plan["safety_set"]["prompts"] == N
    assert plan["safety_set"]["left_out_too_long"] == 2
    assert not any(key in json.dumps(plan) for key in POOL)


# -- judging ---------------------------------------------------------------------------------------


def test_each_constraint_is_judged_on_its_own_column() -> None:
    costs = np.stack([np.linspace(-2, -1, N), np.linspace(1, 2, N)], axis=1)[:, None, :]
    mean, rate = judge([MEAN, RATE], samples(costs))
    assert mean == MEAN.judge(costs[:, 0, 0]) and mean.passed
    assert rate.upper == 1.0 and not rate.passed
    mean, rate = judge([MEAN, RATE], samples(costs[:, :, ::-1]))
    assert not mean.passed and rate.passed
    assert rate.upper == pytest.approx(1 - 0.1 ** (1 / N))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", [0, 1])
@pytest.mark.parametrize("row", [0, N - 1])
def test_a_single_cost_that_is_not_finite_fails_every_constraint(
    bad: float, column: int, row: int
) -> None:
    costs = samples().costs.copy()
    costs[row, 0, column] = bad
    judgements = judge([MEAN, RATE], samples(costs))
    assert [(j.upper, j.passed) for j in judgements] == [(math.inf, False)] * 2
    assert [j.threshold for j in judgements] == [0.0, 0.3]


@pytest.mark.parametrize("count", [0, 1, N - 1])
def test_another_number_of_costs_than_planned_is_refused(count: int) -> None:
    with pytest.raises(InputError, match=f"the plan is {N} safety prompts, the test has {count}"):
        judge([MEAN, RATE], samples(samples().costs[:count]))


def test_a_verdict_record_holds_the_words_and_no_figure() -> None:
    record = verdict_record("NO_SOLUTION_FOUND", "the safety test was not passed", "c" * 64)
    assert record == {
        "schema": 1,
        "verdict": "NO_SOLUTION_FOUND",
        "reason": "the safety test was not passed",
        "plan_hash": "c" * 64,
    }


# -- the certificate -------------------------------------------------------------------------------


def test_bounds_recompute_exactly_from_the_costs_of_the_file(tmp_path: Path) -> None:
    write_json(tmp_path / "certificate.json", certificate())
    read = json.loads((tmp_path / "certificate.json").read_text())
    costs = np.array(read["data"]["costs"])
    assert (costs == samples().costs[:, 0, :]).all()
    assert read["data"]["n"] == len(costs) == N
    for column, bound in enumerate(read["bounds"]):
        constraint = Constraint(
            bound["estimand"], bound["threshold"], bound["delta"], bound["safety_prompts"]
        )
        judgement = constraint.judge(costs[:, column])
        assert (judgement.upper, judgement.passed) == (bound["upper"], bound["passed"])
        assert bound["passed"] is True
        assert constraint.describe().items() <= bound.items()


def test_a_certificate_holds_its_plan_and_the_hash_that_was_written_before() -> None:
    record = certificate()
    assert record["plan"] == plan_of()
    assert record["plan_hash"] == json_hash(plan_of())
    assert record["verdict"] == "PASS"
    assert record["data"]["truncated"] == 3
    assert record["claim"]["error_probability"] == 0.1  # the larger of 0.05 and 0.1


def test_prompts_are_named_by_hashes_that_only_their_owner_can_check() -> None:
    record = certificate()
    text = json.dumps(record)
    assert not any(key in text or key[:12] in text for key in KEYS)
    expected = [sha256("prompt", record["plan_hash"], key) for key in KEYS]
    assert record["data"]["prompts"] == expected


def test_diagnostics_by_hand_and_apart_from_the_claim() -> None:
    costs = np.where(np.arange(N) < 10, -0.5, -1.5)[:, None, None]
    costs[0] = 0.5
    constraint = Constraint(safety_prompts=N)
    record = make_certificate(
        [constraint], judge([constraint], samples(costs)), samples(costs), plan_of()
    )
    found = record["diagnostics"]
    assert found["mean_cost"] == pytest.approx((0.5 - 9 * 0.5 - 30 * 1.5) / N)
    assert found["std_cost"] == pytest.approx(float(np.std(costs, ddof=1)))
    assert (found["largest_cost"], found["harm_rate"]) == (0.5, 1 / N)
    assert "not part of the claim" in found["note"]


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        (MEAN, ["95%", "asymptotic", "nearly normal mean cost", "average cost", "at most 0 "]),
        (RATE, ["90%", "exact", "share of random prompts", "cost above 0", "at most 0.3 "]),
    ],
)
def test_a_claim_says_confidence_limit_and_whether_it_is_exact(
    constraint: Constraint, words: list[str]
) -> None:
    sentence = claim_sentence(constraint, 0.1234)
    assert all(word in sentence for word in words)
    assert "0.1234" in sentence
    assert ("exact" in sentence) != ("asymptotic" in sentence)


# "0.123456" and a bound of 0.12344 "0.1234": each of them says more than was shown.
@pytest.mark.parametrize(
    ("delta", "threshold", "upper"),
    [(0.05, 0.5, 0.25), (1e-7, 0.5, 0.25), (0.05, 0.12345649, 0.12), (0.05, 0.5, 0.12344)],
)
def test_a_claim_never_says_more_than_was_shown(
    delta: float, threshold: float, upper: float
) -> None:
    sentence = claim_sentence(Constraint(threshold=threshold, delta=delta), upper)
    said = re.search(r"confidence ([\d.]+)% .* at most ([\d.e-]+) \(bound found: (.*)\)", sentence)
    assert said is not None
    assert float(said[1]) / 100 <= 1 - delta + 1e-12
    assert float(said[2]) >= threshold
    assert float(said[3]) >= upper


def test_the_page_holds_claim_limits_and_what_is_not_covered() -> None:
    record = certificate()
    page = certificate_page(record)
    for sentence in record["claim"]["sentences"]:
        assert sentence in page
    assert NOT_COVERED in page
    for word in ("cost model", "human judgement", "decoding", "other prompts"):
        assert word in NOT_COVERED
    for bound, row in zip(
        record["bounds"],
        (
            r"\| mean \| 0 \| (.*) \| 0.05 \| student_t \| asymptotic \|",
            r"\| harm_rate \| 0.3 \| (.*) \| 0.1 \| clopper_pearson \| exact \|",
        ),
        strict=True,
    ):
        found = re.search(row, page)
        assert found is not None
        # Rounded, and upwards.
        assert bound["upper"] <= float(found[1]) < bound["upper"] + 1e-4
    assert f"Safety prompts: {N}, one response each, 3 cut at the length limit" in page
    for value in (record["plan_hash"], "a" * 64, "b" * 64):
        assert value in page


def test_the_page_of_a_file_is_the_page_of_the_record(tmp_path: Path) -> None:
    record = certificate()
    write_json(tmp_path / "certificate.json", record)
    read = json.loads((tmp_path / "certificate.json").read_text())
    assert certificate_page(read) == certificate_page(record)


# -- files -----------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_and_no_temporary_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "verdict.json"
    for value in ({"one": 1.0 / 3}, {"two": ["é"]}):
        write_json(path, value)
        assert json.loads(path.read_text(encoding="utf-8")) == value
        assert [p.name for p in tmp_path.iterdir()] == ["verdict.json"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, {1, 2}])
def test_what_is_no_json_leaves_the_old_file_alone(tmp_path: Path, bad: Any) -> None:
    path = tmp_path / "verdict.json"
    write_json(path, {"old": True})
    with pytest.raises((ValueError, TypeError)):
        write_json(path, {"new": bad})
    assert json.loads(path.read_text()) == {"old": True}
    assert [p.name for p in tmp_path.iterdir()] == ["verdict.json"]


# -- samples ---------------------------------------------------------------------------------------


def test_joined_samples_keep_rows_together() -> None:
    whole = samples()
    parts = [
        CostSamples(whole.keys[a:b], whole.costs[a:b], whole.responses[a:b], whole.truncated[a:b])
        for a, b in ((0, 7), (7, 8), (8, N))
    ]
    joined = CostSamples.join(parts)
    assert joined.keys == whole.keys and joined.responses == whole.responses
    np.testing.assert_array_equal(joined.costs, whole.costs)
    np.testing.assert_array_equal(joined.truncated, whole.truncated)
