"""The gate, with costs from a function instead of a model: what a run may see, spend and resume."""

import json
import math
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hcrlhf.commands
from hcrlhf import ledger as ledgers
from hcrlhf.certificate import PASS_REASON, VERDICT_FILE, choose, safety_order, verdict_record
from hcrlhf.cli import BAD_INPUT, PASSED, main
from hcrlhf.constraint import Constraint
from hcrlhf.errors import InputError
from hcrlhf.gate import PARTIAL_FILE, SEALED_FILE, Gate, Population, SafetyTrial
from hcrlhf.hashing import folder_hashes, read_json, sha256, write_json
from hcrlhf.methods import Betting, HallT
from hcrlhf.safety import CostSamples
from hcrlhf.verify import verify

KEYS = tuple(sha256("prompt number", str(i)) for i in range(200))
N = 24
MEAN = Constraint("mean", 0.0, safety_prompts=N, lower=-1.0, upper=1.0)
RATE = Constraint("harm_rate", 0.3, safety_prompts=N)
CVAR = Constraint(
    "cvar", 0.5, safety_prompts=N, lower=-1.0, upper=1.0, alpha=0.5, eta=0.0, bound=Betting("wsr")
)
PROVENANCE = {"backbone": "b" * 64, "decoding": {"temperature": 1.0}}
FILES = {"adapter_model.safetensors": "1" * 64, "adapter_config.json": "2" * 64}
OTHER_FILES = {"adapter_model.safetensors": "3" * 64, "adapter_config.json": "2" * 64}

# (seed, key) -> cost, as a cost model would answer: always the same for the same response.
Cost = Callable[[str, str], float]


def harmless(seed: str, key: str) -> float:
    """Costs in [-0.9, -0.5], all different."""
    return -0.9 + 0.4 * int(sha256("cost", seed, key)[:12], 16) / 16**12


def harmful(seed: str, key: str) -> float:
    """Costs in [0.1, 0.5]."""
    return harmless(seed, key) + 1.0


@dataclass
class Lab:
    """A folder of runs that share a ledger, and how often each prompt was asked."""

    root: Path
    asked: list[str] = field(default_factory=list)

    def gate(self, name: str, **options: Any) -> Gate:
        return Gate(
            self.root / name, self.root / "ledger.jsonl", state=self.root / "state", **options
        )

    @property
    def ledger(self) -> ledgers.Ledger:
        return ledgers.read(self.root / "ledger.jsonl", self.root / "state")

    def samples(self, seed: str, keys: Sequence[str], cost: Cost, columns: int) -> CostSamples:
        self.asked += keys
        costs = np.array([[[cost(seed, key)] * columns] for key in keys])
        responses = tuple((f"answer to {key[:8]}",) for key in keys)
        return CostSamples(tuple(keys), costs, responses, np.zeros((len(keys), 1), dtype=np.bool_))

    def run(
        self,
        name: str,
        cost: Cost = harmless,
        constraints: Sequence[Constraint] = (MEAN,),
        *,
        files: Mapping[str, str] = FILES,
        pool: Sequence[str] = KEYS,
        provenance: Mapping[str, Any] = PROVENANCE,
        batch: int = 10,
        **options: Any,
    ) -> str:
        """What callbacks.SafetyTest does, without a model; returns the verdict."""
        gate = self.gate(name, **options)
        gate.grant(constraints)
        gate.require_fresh(Population(pool), constraints[0].safety_prompts)
        with gate.test(constraints, Population(pool), files, provenance) as trial:
            while keys := trial.next(batch):
                trial.record(self.samples(trial.seed, keys, cost, len(constraints)))
            passed = trial.passed()
            if passed:
                trial.certify({key: f"prompt {key[:8]}" for key in KEYS}, {"numpy": "2"})
            else:
                trial.fail()
            verdict: Any = "PASS" if passed else "NO_SOLUTION_FOUND"
            write_json(
                gate.folder / VERDICT_FILE, verdict_record(verdict, PASS_REASON, trial.plan_hash)
            )
            trial.release()
        return str(verdict)

    def certificate(self, name: str) -> dict[str, Any]:
        record: dict[str, Any] = read_json(self.root / name / "certificate.json")
        return record


class Clock:
    @staticmethod
    def now(zone: Any) -> datetime:
        return datetime(2026, 1, 2, tzinfo=UTC)


@pytest.fixture(autouse=True)
def still(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One identity and one time for every ledger, so that runs can be compared byte for byte."""
    monkeypatch.setenv("HCRLHF_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr("hcrlhf.ledger.datetime", Clock)
    monkeypatch.setattr("hcrlhf.ledger.secrets.token_hex", lambda n: "5" * 2 * n)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def contents(folder: Path, *left_out: str) -> dict[str, bytes]:
    paths = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in left_out]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


class Crash(BaseException):
    """Not an error that anybody catches: the process dies."""


# -- one test --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cost", "verdict"), [(harmless, "PASS"), (harmful, "NO_SOLUTION_FOUND")])
def test_a_test_opens_asks_decides_and_closes(lab: Lab, cost: Cost, verdict: str) -> None:
    assert lab.run("run", cost, (MEAN, RATE)) == verdict
    assert len(lab.asked) == len(set(lab.asked)) == N
    (test,) = lab.ledger.tests
    assert (test.number, test.verdict) == (1, verdict)
    assert test.prompts == {key[:32] for key in lab.asked}
    found = set(contents(lab.root / "run"))
    assert found == {"plan.json", "verdict.json"} | (
        {"certificate.json", "certificate.md", "responses.jsonl"}
        if verdict == "PASS"
        else {"sealed.json"}
    )


def test_prompts_and_their_order_are_derived_and_not_the_order_of_the_file(
    tmp_path: Path,
) -> None:
    asked = []
    for name, pool in (("a", KEYS), ("b", KEYS[::-1])):
        lab = Lab(tmp_path / name)
        lab.run("run", pool=pool)
        asked.append(lab.asked)
    assert asked[0] == asked[1]
    assert set(asked[0]) == set(choose(KEYS, N))
    assert asked[0] not in (sorted(asked[0]), choose(KEYS, N))


def test_runs_beside_each_other_share_a_ledger_however_their_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "x"
    run.mkdir(parents=True)
    monkeypatch.chdir(run)
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in (Path("."), Path("../x"), run):
        assert Gate.configured(folder).ledger == tmp_path / "runs" / "ledger.jsonl"
    assert Gate.configured(run, "~/claim.jsonl").ledger == tmp_path / "claim.jsonl"


def test_the_plan_stands_in_the_ledger_before_the_first_prompt_is_handed_out(lab: Lab) -> None:
    gate = lab.gate("run")
    with gate.test((MEAN,), Population(KEYS), FILES, PROVENANCE) as trial:
        (test,) = lab.ledger.tests
        assert test.plans == (trial.plan_hash,) and test.verdict is None
        assert test.prompts == {key[:32] for key in trial.next(N)}
        assert read_json(gate.folder / "plan.json") == trial.plan
        assert trial.order == safety_order(trial.next(N), trial.seed)


def test_only_the_prompts_that_were_handed_out_are_taken(lab: Lab) -> None:
    with lab.gate("run").test((MEAN,), Population(KEYS), FILES, PROVENANCE) as trial:
        keys = trial.next(3)
        for wrong in (keys[::-1], keys[1:], [*keys[:2], KEYS[0]]):
            with pytest.raises(RuntimeError, match="not the prompts that the test handed out"):
                trial.record(lab.samples(trial.seed, wrong, harmless, 1))
        trial.record(lab.samples(trial.seed, keys, harmless, 1))
        with pytest.raises(RuntimeError, match="not the prompts"):
            trial.record(lab.samples(trial.seed, keys, harmless, 1))
        assert trial.done == 3


def test_no_certificate_is_written_for_costs_that_do_not_pass(lab: Lab) -> None:
    with lab.gate("run").test((MEAN,), Population(KEYS), FILES, PROVENANCE) as trial:
        trial.record(lab.samples(trial.seed, trial.next(N), harmful, 1))
        with pytest.raises(RuntimeError, match="costs that do not pass"):
            trial.certify({}, {})
    assert "certificate.json" not in contents(lab.root / "run")
    assert lab.ledger.tests[0].verdict is None


def test_a_test_with_too_few_costs_is_no_pass(lab: Lab) -> None:
    with lab.gate("run").test((MEAN,), Population(KEYS), FILES, PROVENANCE) as trial:
        trial.record(lab.samples(trial.seed, trial.next(N - 1), harmless, 1))
        with pytest.raises(InputError):
            trial.passed()
        with pytest.raises(InputError):
            trial.certify({}, {})


@pytest.mark.parametrize(
    "constraint",
    [MEAN, RATE, CVAR, replace(MEAN, bound=HallT()), replace(MEAN, bound=Betting("portfolio"))],
    ids=["star", "clopper_pearson", "cvar", "hall_t", "portfolio"],
)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_single_cost_that_is_not_finite_is_never_a_pass(
    lab: Lab, constraint: Constraint, bad: float
) -> None:
    seen: list[str] = []

    def cost(seed: str, key: str) -> float:
        seen.append(key)
        return bad if len(seen) == 5 else harmless(seed, key)

    assert lab.run("run", cost, (constraint,), batch=4) == "NO_SOLUTION_FOUND"
    assert len(seen) == N


def test_a_cost_that_is_not_finite_survives_a_crash_as_such(lab: Lab) -> None:
    with lab.gate("run").test((MEAN,), Population(KEYS), FILES, PROVENANCE) as trial:
        trial.record(lab.samples(trial.seed, trial.next(5), lambda seed, key: math.nan, 1))
    assert lab.run("run") == "NO_SOLUTION_FOUND"
    assert len(lab.asked) == N


# -- what δ is granted -----------------------------------------------------------------------------

# Clopper-Pearson for 1 harm in 100: U = 0.0466 at δ = .05 and 0.0545 at δ = .025.
FIVE_PERCENT = Constraint("harm_rate", 0.05, delta=0.05, safety_prompts=100)


def one_harm() -> Cost:
    seen: list[str] = []

    def cost(seed: str, key: str) -> float:
        seen.append(key)
        return 1.0 if len(seen) == 7 else -1.0

    return cost


def test_the_judge_uses_half_of_delta_on_the_first_of_several_tests(lab: Lab) -> None:
    assert lab.run("run", one_harm(), (FIVE_PERCENT,)) == "NO_SOLUTION_FOUND"
    (bound,) = read_json(lab.root / "run" / SEALED_FILE)["bounds"]
    assert bound["delta"] == 0.025
    assert bound["found"]["upper"] == pytest.approx(0.05446, abs=5e-5)


def test_the_judge_uses_all_of_delta_where_there_is_one_test(lab: Lab) -> None:
    assert lab.run("run", one_harm(), (FIVE_PERCENT,), schedule="once") == "PASS"
    (bound,) = lab.certificate("run")["bounds"]
    assert bound["delta"] == 0.05
    assert bound["found"]["upper"] == pytest.approx(0.04656, abs=5e-5)


def test_a_certificate_claims_what_was_granted_and_not_what_was_configured(lab: Lab) -> None:
    constraints = (replace(MEAN, delta=0.2), replace(RATE, delta=0.1, threshold=0.5))
    for number in (1, 2, 3):
        files = {"w.safetensors": str(number)}
        assert lab.run(f"run {number}", constraints=constraints, files=files) == "PASS"
        record = lab.certificate(f"run {number}")
        assert record["ledger"]["test"] == number
        assert [b["delta"] for b in record["bounds"]] == [0.2 / 2**number, 0.1 / 2**number]
        assert record["claim"]["error_probability"] == 0.2 / 2**number
        assert f"at most {100 * 0.2 / 2**number:g}%." in record["claim"]["sentence"]


def test_training_is_told_the_delta_that_the_test_will_use(lab: Lab) -> None:
    assert lab.gate("a").grant((MEAN,))[0].delta == 0.025
    lab.run("a", harmful)
    assert lab.gate("b").grant((MEAN,))[0].delta == 0.0125
    # A run that comes back keeps what its own test was granted.
    assert lab.gate("a").grant((MEAN,))[0].delta == 0.025
    with pytest.raises(InputError, match="belongs to a claim with delta 0.05"):
        lab.gate("b").grant((replace(MEAN, delta=0.06),))
    with pytest.raises(InputError, match="belongs to a claim"):
        lab.gate("b", schedule="once").grant((MEAN,))
    with pytest.raises(InputError, match=r"different numbers of safety prompts \[24, 25\]"):
        lab.gate("b").grant((MEAN, replace(RATE, safety_prompts=25)))


def test_once_means_once(lab: Lab) -> None:
    assert lab.run("a", harmful, schedule="once") == "NO_SOLUTION_FOUND"
    before = contents(lab.root)
    sentence = "granted to one test, which has been opened; a further test is a new claim"
    with pytest.raises(InputError, match=sentence):
        lab.gate("b", schedule="once").grant((MEAN,))
    with pytest.raises(InputError, match=sentence):
        lab.run("b", schedule="once", files=OTHER_FILES)
    assert contents(lab.root) == before
    assert len(lab.asked) == N


def test_a_limit_that_the_granted_delta_cannot_reach_opens_no_test(lab: Lab) -> None:
    tight = replace(MEAN, threshold=-0.5)
    for number in (1, 2, 3):
        lab.run(f"run {number}", harmful, (tight,), files={"w.safetensors": str(number)})
    with pytest.raises(InputError, match="cannot be shown with 24 safety prompts"):
        lab.run("run 4", harmful, (tight,), files={"w.safetensors": "4"})
    # 24 costs of -1 multiply the wealth by 1.25 each: 1.25^24 = 212 < 2^k/0.05 from k = 4 on.
    assert len(lab.ledger.tests) == 3


# -- several tests ---------------------------------------------------------------------------------


def test_another_policy_gets_another_test_half_the_delta_and_fresh_prompts(lab: Lab) -> None:
    lab.run("a", harmful)
    first, lab.asked = lab.asked, []
    assert lab.run("b", files=OTHER_FILES) == "PASS"
    assert not set(first) & set(lab.asked)
    assert [t.number for t in lab.ledger.tests] == [1, 2]
    assert [b["delta"] for b in lab.certificate("b")["bounds"]] == [0.0125]


def test_the_same_policy_in_another_folder_is_a_new_test_with_fresh_prompts(lab: Lab) -> None:
    assert lab.run("a", harmful) == "NO_SOLUTION_FOUND"
    first, lab.asked = lab.asked, []
    lab.run("b")
    assert not set(first) & set(lab.asked)
    assert lab.certificate("b")["ledger"]["test"] == 2


def test_a_closed_test_run_again_in_its_folder_stays_what_it_was(lab: Lab) -> None:
    lab.run("a", harmful)
    lab.run("b", harmless, files=OTHER_FILES)
    before = contents(lab.root)
    assert lab.run("a", harmful) == "NO_SOLUTION_FOUND"
    assert lab.run("b", harmless, files=OTHER_FILES) == "PASS"
    assert contents(lab.root) == before


def test_a_closed_test_that_now_finds_another_result_is_refused(lab: Lab) -> None:
    lab.run("a", harmful)
    before = (lab.root / "ledger.jsonl").read_bytes()
    with pytest.raises(InputError, match="says NO_SOLUTION_FOUND for test 1, and this run found"):
        lab.run("a", harmless)
    assert (lab.root / "ledger.jsonl").read_bytes() == before


def test_a_refused_result_leaves_no_certificate_behind(lab: Lab) -> None:
    lab.run("a", harmful)
    with pytest.raises(InputError, match="found another result"):
        lab.run("a", harmless)
    assert not (lab.root / "a" / "certificate.json").exists()


def test_a_pool_that_is_used_up_is_refused_with_what_to_do(lab: Lab) -> None:
    pool = KEYS[: 2 * N + 5]
    for number in (1, 2):
        lab.run(f"run {number}", harmful, pool=pool, files={"w.safetensors": str(number)})
    before = contents(lab.root)
    sentence = "53 different prompts that fit, but 48 of them are spent .*: give fresh prompts"
    with pytest.raises(InputError, match=sentence):
        lab.run("run 3", pool=pool, files=OTHER_FILES)
    with pytest.raises(InputError, match=r"48 of them are spent .* safety_prompts is 24"):
        lab.gate("run 3").require_fresh(Population(pool), N)
    assert contents(lab.root) == before
    lab.gate("run 3").require_fresh(Population(pool), 5)
    lab.gate("run 1").require_fresh(Population(pool), N)  # goes on with its own


def test_a_set_that_is_too_small_is_no_matter_of_the_ledger(lab: Lab) -> None:
    with pytest.raises(InputError, match="has 10 different prompts that fit, .* give more prompts"):
        lab.gate("run").require_fresh(Population(KEYS[:10]), N)


def test_a_running_test_is_refused_to_a_second_process(lab: Lab) -> None:
    with lab.gate("a").test((MEAN,), Population(KEYS), FILES, PROVENANCE) as trial:
        with pytest.raises(InputError, match="another process is running test 1"):
            lab.run("a")
        # Another folder with the same plan is the same test.
        with pytest.raises(InputError, match="another process is running test 1"):
            lab.run("b")
        assert lab.run("c", files=OTHER_FILES) == "PASS"
        trial.record(lab.samples(trial.seed, trial.next(N), harmless, 1))
        assert trial.passed()


def test_a_damaged_ledger_stops_a_run_before_a_prompt_is_asked(lab: Lab) -> None:
    lab.run("a", harmful)
    path = lab.root / "ledger.jsonl"
    content = path.read_bytes()
    lab.asked.clear()
    for damaged in (content[:-1], content[1:], content[: content[:-1].rfind(b"\n") + 1]):
        path.write_bytes(damaged)
        with pytest.raises(InputError):
            lab.gate("b").grant((MEAN,))
        with pytest.raises(InputError):
            lab.run("b", files=OTHER_FILES)
    path.unlink()
    with pytest.raises(InputError, match="and is gone"):
        lab.gate("b").grant((MEAN,))
    assert lab.asked == []


# -- crashes ---------------------------------------------------------------------------------------


def died_after(lab: Lab, answered: int, batch: int = 4, **options: Any) -> SafetyTrial:
    """A run that breaks off when so many prompts have been answered."""
    gate = lab.gate("run", **options)
    with gate.test((MEAN,), Population(KEYS), FILES, PROVENANCE) as trial:
        while trial.done < answered:
            trial.record(lab.samples(trial.seed, trial.next(batch), harmless, 1))
    return trial  # it was neither passed nor failed


@pytest.mark.parametrize("answered", [0, 4, 12, N])
def test_a_run_that_broke_goes_on_and_asks_nothing_twice(tmp_path: Path, answered: int) -> None:
    whole, broken = Lab(tmp_path / "whole"), Lab(tmp_path / "broken")
    assert whole.run("run") == "PASS"
    died_after(broken, answered)
    assert broken.run("run") == "PASS"
    assert broken.asked == whole.asked
    assert contents(broken.root, "ledgers.json") == contents(whole.root, "ledgers.json")


def test_a_batch_that_was_not_written_whole_is_drawn_again(tmp_path: Path) -> None:
    whole = Lab(tmp_path / "whole")
    whole.run("run")
    broken = Lab(tmp_path / "broken")
    died_after(broken, 8)
    partial = broken.root / "run" / PARTIAL_FILE
    content = partial.read_bytes()
    heading, first, _, _ = content.split(b"\n")
    starts = len(heading) + 1, len(heading) + len(first) + 2
    for end in range(0, len(content) + 1, 7):
        lab = Lab(broken.root)
        partial.write_bytes(content[:end])
        with lab.gate("run").test((MEAN,), Population(KEYS), FILES, PROVENANCE) as trial:
            known = 0 if end < starts[1] - 1 else 4 if end < len(content) - 1 else 8
            assert trial.done == known
            trial.record(lab.samples(trial.seed, trial.next(N), harmless, 1))
            assert trial.passed()
        assert lab.asked == whole.asked[known:]
        # What was torn does not hide the batches that were written after it.
        with lab.gate("run").test((MEAN,), Population(KEYS), FILES, PROVENANCE) as trial:
            assert trial.done == N
    assert Lab(broken.root).run("run") == "PASS"
    assert contents(broken.root, "ledgers.json") == contents(whole.root, "ledgers.json")


@pytest.mark.parametrize(
    "rest", [b"\x00" * 50, b"\xff\xfe", b"5\n", b"[]\n", b"{}\n", b'{"keys": ["x"]}\n']
)
def test_rubbish_behind_the_costs_is_no_cost(lab: Lab, rest: bytes) -> None:
    died_after(lab, 8)
    partial = lab.root / "run" / PARTIAL_FILE
    partial.write_bytes(partial.read_bytes() + rest)
    assert lab.run("run") == "PASS"
    assert lab.asked[:8] == lab.asked[8:16] or len(lab.asked) == N
    assert len(lab.certificate("run")["data"]["costs"]) == N


def test_costs_of_another_plan_are_not_taken(lab: Lab) -> None:
    died_after(lab, 8)
    partial = lab.root / "run" / PARTIAL_FILE
    content = partial.read_bytes()
    partial.write_bytes(content.replace(json.loads(content.split(b"\n")[0])["plan"].encode(), b"x"))
    with lab.gate("run").test((MEAN,), Population(KEYS), FILES, PROVENANCE) as trial:
        assert trial.done == 0


def test_a_broken_run_of_another_policy_finds_its_test_spent(lab: Lab) -> None:
    died_after(lab, 8)
    lab.asked, first = [], lab.asked
    assert lab.run("run", files=OTHER_FILES) == "PASS"
    assert not set(first) & set(lab.asked)
    assert [t.verdict for t in lab.ledger.tests] == [None, "PASS"]
    assert lab.certificate("run")["ledger"]["test"] == 2


class Bomb:
    """Kills the process at the k-th time that something reaches the disk, before or after it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int | None, before: bool) -> None:
        self.count = 0
        for owner, name in ((os, "fsync"), (os, "replace"), (Path, "unlink")):
            monkeypatch.setattr(owner, name, self.armed(getattr(owner, name), at, before))

    def armed(self, act: Callable[..., Any], at: int | None, before: bool) -> Callable[..., Any]:
        def bomb(*arguments: Any, **options: Any) -> Any:
            if any(".lock" in str(a) for a in arguments):
                return act(*arguments, **options)
            self.count += 1
            if self.count == at and before:
                raise Crash
            result = act(*arguments, **options)
            if self.count == at:
                raise Crash
            return result

        return bomb


@pytest.mark.parametrize(("cost", "verdict"), [(harmless, "PASS"), (harmful, "NO_SOLUTION_FOUND")])
@pytest.mark.parametrize("sequential", [False, True])
def test_a_crash_at_any_write_changes_nothing_in_what_comes_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cost: Cost, verdict: str, sequential: bool
) -> None:
    def run(lab: Lab, at: int | None = None, before: bool = False) -> int:
        with monkeypatch.context() as patch:
            bomb = Bomb(patch, at, before)
            assert lab.run("run", cost, (MEAN,), sequential=sequential) == verdict
        return bomb.count

    whole = Lab(tmp_path / "whole")
    steps = run(whole)
    expected = contents(whole.root, "ledgers.json", "ledgers.tmp")
    assert steps > 15
    for at in range(1, steps + 1):
        for before in (True, False):
            lab = Lab(tmp_path / f"{at} {before}")
            with pytest.raises(Crash):
                run(lab, at, before)
            run(lab)
            assert contents(lab.root, "ledgers.json", "ledgers.tmp") == expected
            assert len(lab.ledger.tests) == 1


# -- no solution found: only the words leave -------------------------------------------------------


@pytest.mark.parametrize("sequential", [False, True])
def test_after_no_solution_found_nothing_but_the_sealed_file_depends_on_the_costs(
    tmp_path: Path, sequential: bool
) -> None:
    def nearly(seed: str, key: str) -> float:
        return harmless(seed, key) / 30

    found = []
    for name, cost in (("a", harmful), ("b", nearly), ("c", lambda seed, key: math.nan)):
        lab = Lab(tmp_path / name)
        assert lab.run("run", cost, (MEAN, RATE), sequential=sequential) == "NO_SOLUTION_FOUND"
        assert "costs" in (lab.root / "run" / SEALED_FILE).read_text()
        found.append(contents(lab.root, SEALED_FILE, "ledgers.json"))
        found[-1] = {k: v for k, v in found[-1].items() if not k.endswith(".lock")}
        # The ledger keeps one hash over all texts and costs, so that sealed.json cannot be edited.
        ledger = [json.loads(line) for line in found[-1]["ledger.jsonl"].splitlines()]
        assert len(ledger[-1].pop("sealed")) == 64
        del ledger[-1]["hash"]
        found[-1]["ledger.jsonl"] = json.dumps(ledger).encode()
    assert found[0] == found[1] == found[2]
    assert set(found[0]) == {"ledger.jsonl", "run/plan.json", "run/verdict.json"}


@pytest.mark.parametrize("sequential", [False, True])
def test_an_error_during_a_test_carries_no_cost(lab: Lab, sequential: bool) -> None:
    def above(seed: str, key: str) -> float:
        return 7.654321

    with pytest.raises(InputError, match="cannot be judged: a cost lies outside") as error:
        lab.run("run", above, sequential=sequential)
    shown = "".join(traceback.format_exception(error.value))
    assert not any(digits in shown for digits in ("7.65", "7.7", "8 "))
    # The test is spent, and not decided.
    assert lab.ledger.tests[0].verdict is None
    assert "certificate.json" not in contents(lab.root / "run")


def test_a_cost_above_the_cap_does_not_pass_however_low_the_others_are(lab: Lab) -> None:
    seen: list[str] = []

    def cost(seed: str, key: str) -> float:
        seen.append(key)
        return 1.0000001 if len(seen) == N else -1.0

    with pytest.raises(InputError, match="the cap is not a fact of this cost model"):
        lab.run("run", cost)


# -- sequential tests ------------------------------------------------------------------------------


def e_process(costs: np.ndarray, threshold: float, cap: float) -> np.ndarray:
    """The largest wealth so far of 64 constant bets, after every cost; multiplied out plainly."""
    shares = [math.sin((j + 0.5) * math.pi / 128) ** 2 for j in range(64)]
    paths = [np.cumprod([1 - c + c * (cap - x) / (cap - threshold) for x in costs]) for c in shares]
    return np.maximum.accumulate(np.mean(paths, axis=0))


@pytest.mark.parametrize("batch", [1, 3, 10])
def test_a_sequential_test_stops_as_soon_as_every_e_process_has_decided(
    lab: Lab, batch: int
) -> None:
    # Of 80 planned prompts; one of four answers is harmful, which slows the harm rate's e-process.
    constraints = (
        replace(MEAN, safety_prompts=80),
        Constraint("harm_rate", 0.6, safety_prompts=80),
    )

    def cost(seed: str, key: str) -> float:
        return 0.1 if int(sha256("harm", key)[:8], 16) % 4 == 0 else harmless(seed, key)

    assert lab.run("run", cost, constraints, batch=batch, sequential=True) == "PASS"
    record = lab.certificate("run")
    costs = np.array([cost(record["data"]["seeds"][0][0], key) for key in lab.asked])
    mean = e_process(costs, 0.0, 1.0) >= 1 / 0.025
    rate = e_process((costs > 0).astype(float), 0.6, 1.0) >= 1 / 0.025
    decided = [i + 1 for i in range(len(costs)) if mean[i] and rate[i]]
    assert len(costs) == -(-decided[0] // batch) * batch < 80
    assert len(decided) == len(costs) - decided[0] + 1
    assert min(np.flatnonzero(mean)[0], np.flatnonzero(rate)[0]) + 1 < decided[0]
    assert record["data"]["n"] == len(costs)
    assert all(b["found"]["log_e_value"] >= math.log(40) for b in record["bounds"])
    # What it did not come to stays fresh.
    assert lab.ledger.spent() == {key[:32] for key in lab.asked}


def test_a_sequential_test_ends_undecided_at_the_planned_number(lab: Lab) -> None:
    assert lab.run("run", lambda seed, key: -0.01, sequential=True) == "NO_SOLUTION_FOUND"
    assert len(lab.asked) == N


def test_a_bound_for_a_fixed_number_is_refused_in_a_sequential_test(lab: Lab) -> None:
    with pytest.raises(InputError, match="betting does not allow"):
        lab.gate("run", sequential=True).grant((replace(MEAN, bound=Betting()),))


# With a cost of -0.2 the e-process needs more than 24 prompts and fewer than 48.
def slow(seed: str, key: str) -> float:
    return -0.2


def undecided(lab: Lab, name: str = "first", **options: Any) -> Path:
    assert lab.run(name, slow, sequential=True, **options) == "NO_SOLUTION_FOUND"
    return lab.root / name


def test_an_undecided_test_goes_on_with_fresh_prompts_and_keeps_its_wealth(lab: Lab) -> None:
    folder = undecided(lab)
    first, lab.asked = lab.asked, []
    assert lab.run("second", slow, sequential=True, continues=folder, batch=1) == "PASS"
    assert not set(first) & set(lab.asked)
    wealth = e_process(np.full(200, -0.2), 0.0, 1.0)
    needed = int(np.flatnonzero(wealth >= 1 / 0.025)[0]) + 1
    assert N < len(first) + len(lab.asked) == needed < 2 * N
    record = lab.certificate("second")
    assert record["claim"]["error_probability"] == 0.025  # the δ of test 1, which it still is
    assert record["data"]["n"] == needed
    assert [count for _, count in record["data"]["seeds"]] == [N, needed - N]
    (test,) = lab.ledger.tests
    assert (test.number, len(test.plans), test.verdict) == (1, 2, "PASS")
    checks = verify(lab.root / "second" / "certificate.json", state=lab.root / "state")
    assert not [check for check in checks if check.outcome == "FAILED"]


def test_a_sealed_test_that_broke_off_before_its_verdict_is_not_drawn_again(lab: Lab) -> None:
    with lab.gate("run").test((MEAN,), Population(KEYS), FILES, PROVENANCE) as trial:
        while keys := trial.next(10):
            trial.record(lab.samples(trial.seed, keys, harmful, 1))
        trial.fail()
    asked = list(lab.asked)
    assert lab.run("run", harmful) == "NO_SOLUTION_FOUND"
    assert lab.asked == asked
    assert not (lab.root / "run" / "sealed.partial.jsonl").exists()


def test_a_continuation_that_crashes_goes_on(tmp_path: Path) -> None:
    results = []
    for name, crash in (("whole", False), ("broken", True)):
        lab = Lab(tmp_path / name)
        gate = lab.gate("second", sequential=True, continues=undecided(lab))
        if crash:
            with gate.test((MEAN,), Population(KEYS), FILES, PROVENANCE) as trial:
                trial.record(lab.samples(trial.seed, trial.next(2), slow, 1))
        assert lab.run("second", slow, sequential=True, continues=gate.continues, batch=1) == "PASS"
        results.append((lab.asked, contents(lab.root, "ledgers.json")))
    assert results[0] == results[1]


def test_a_test_may_go_on_more_than_once(lab: Lab) -> None:
    def slower(seed: str, key: str) -> float:
        return -0.06

    folder = None
    for name in ("one", "two", "three", "four", "five", "six"):
        options = {"continues": folder} if folder else {}
        verdict = lab.run(name, slower, sequential=True, **options)
        folder = lab.root / name
        if verdict == "PASS":
            break
    assert verdict == "PASS" and name not in ("one", "two")
    assert len(lab.ledger.tests) == 1
    checks = verify(folder / "certificate.json", state=lab.root / "state")
    assert not [check for check in checks if check.outcome == "FAILED"]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"files": OTHER_FILES}, "policy"),
        ({"constraints": (replace(MEAN, threshold=0.1),)}, "constraints"),
        ({"constraints": (replace(MEAN, delta=0.04),)}, "constraints"),
        ({"constraints": (replace(MEAN, safety_prompts=25),)}, "constraints"),
        ({"constraints": (MEAN, RATE)}, "constraints"),
        ({"provenance": {**PROVENANCE, "decoding": {"temperature": 0.5}}}, "provenance"),
    ],
)
def test_only_the_same_policy_limits_and_decoding_go_on(
    lab: Lab, changes: dict[str, Any], word: str
) -> None:
    folder = undecided(lab)
    before = contents(lab.root)
    with pytest.raises(InputError, match=f"continues: {word} differs"):
        lab.run("second", slow, sequential=True, continues=folder, **changes)
    assert contents(lab.root) == before


def test_what_cannot_go_on_is_refused(lab: Lab) -> None:
    lab.run("fixed", harmful)
    for gate in (
        lab.gate("x", sequential=True, continues=lab.root / "fixed"),
        lab.gate("x", continues=lab.root / "fixed"),
        lab.gate("x", sequential=True, continues=lab.root / "nowhere"),
    ):
        with pytest.raises(InputError, match="continues"):
            gate.grant((MEAN,))
        with (
            pytest.raises(InputError, match="continues"),
            gate.test((MEAN,), Population(KEYS), FILES, PROVENANCE),
        ):
            pass
    stranger = Lab(lab.root / "stranger")
    folder = undecided(stranger)
    with pytest.raises(InputError, match="does not know the test in"):
        lab.run("x", slow, sequential=True, continues=folder)


def test_a_passed_test_does_not_go_on(lab: Lab) -> None:
    folder = undecided(lab)
    assert lab.run("second", slow, sequential=True, continues=folder) == "PASS"
    with pytest.raises(InputError):
        lab.run("third", slow, sequential=True, continues=folder)


def test_a_test_whose_numbers_were_seen_does_not_go_on(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = undecided(lab)
    assert main(["unseal", str(folder)]) == PASSED
    assert "24 prompts: mean cost -0.2, 0 with a cost above 0" in capsys.readouterr().out
    with pytest.raises(InputError, match="were unsealed, so it is burnt"):
        lab.run("second", slow, sequential=True, continues=folder)


def test_a_bad_continuation_cannot_be_left_out(lab: Lab) -> None:
    folder = undecided(lab)
    bad = lab.run("second", lambda seed, key: 0.9, sequential=True, continues=folder)
    assert bad == "NO_SOLUTION_FOUND"
    with pytest.raises(InputError):
        lab.run("third", slow, sequential=True, continues=folder)


def test_a_certificate_that_leaves_out_a_continuation_is_not_verified(lab: Lab) -> None:
    folder = undecided(lab)
    lab.run("second", lambda seed, key: 0.9, sequential=True, continues=folder)
    try:
        lab.run("third", slow, sequential=True, continues=folder)
    except InputError:
        return  # refused earlier, which is better
    checks = verify(lab.root / "third" / "certificate.json", state=lab.root / "state")
    assert [check for check in checks if check.outcome == "FAILED"]


# -- unsealing -------------------------------------------------------------------------------------


def test_unsealing_says_burnt_before_it_says_a_number(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.run("run", harmful)
    shown: list[str] = []

    def say(text: str) -> None:
        shown.append(text)
        assert lab.ledger.tests[0].burnt

    monkeypatch.setattr(hcrlhf.commands, "print", say, raising=False)
    assert main(["unseal", str(lab.root / "run")]) == PASSED
    assert any("24 with a cost above 0" in text for text in shown)
    before = (lab.root / "ledger.jsonl").read_bytes()
    assert main(["unseal", str(lab.root / "run")]) == PASSED
    assert (lab.root / "ledger.jsonl").read_bytes() == before


def test_nothing_is_unsealed_where_the_ledger_cannot_be_marked(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    lab.run("run", harmful)
    path = lab.root / "ledger.jsonl"
    content = path.read_bytes()
    for damaged in (content[:-1], content[:-9], content.replace(b"close", b"clos3")):
        path.write_bytes(damaged)
        assert main(["unseal", str(lab.root / "run")]) == BAD_INPUT
        assert capsys.readouterr().out == ""
    path.unlink()
    assert main(["unseal", str(lab.root / "run")]) == BAD_INPUT
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("sealed", [None, "", "{}", "[]", '{"plans": []}', '{"plans": [1]}', "5"])
def test_unsealing_what_is_not_sealed_is_bad_input(
    lab: Lab, capsys: pytest.CaptureFixture[str], sealed: str | None
) -> None:
    lab.run("run", harmful)
    path = lab.root / "run" / SEALED_FILE
    path.unlink() if sealed is None else path.write_text(sealed)
    assert main(["unseal", str(lab.root / "run")]) == BAD_INPUT
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("continued", [False, True])
def test_unsealing_a_test_that_is_open_does_not_break_the_ledger(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, continued: bool
) -> None:
    if continued:
        gate = lab.gate("second", sequential=True, continues=undecided(lab))
        with gate.test((MEAN,), Population(KEYS), FILES, PROVENANCE):
            main(["unseal", str(lab.root / "first")])
    else:
        with monkeypatch.context() as patch:
            patch.setattr(SafetyTrial, "_close", die)
            with pytest.raises(Crash):
                lab.run("run", harmful)
        main(["unseal", str(lab.root / "run")])
    assert len(lab.ledger.tests) == 1


def die(*arguments: Any) -> Iterator[None]:
    raise Crash


def test_a_policy_folder_is_hashed_file_by_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_bytes(b"abc")
    # printf abc | sha256sum
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert folder_hashes(tmp_path) == {"sub/a.txt": expected}


# -- what stands where -----------------------------------------------------------------------------


def uneven(seed: str, key: str) -> float:
    """About -0.2, every prompt another cost."""
    return harmless(seed, key) + 0.5


def test_the_costs_of_a_continued_test_stand_beside_their_prompts(lab: Lab) -> None:
    assert lab.run("first", uneven, sequential=True) == "NO_SOLUTION_FOUND"
    first = lab.root / "first"
    assert lab.run("second", uneven, sequential=True, continues=first, batch=1) == "PASS"
    data = lab.certificate("second")["data"]
    seeds = [seed for seed, count in data["seeds"] for _ in range(count)]
    expected = [[uneven(s, key)] for s, key in zip(seeds, lab.asked, strict=True)]
    assert data["costs"] == expected


def test_prompts_that_another_ledger_has_used_are_known_on_this_machine(lab: Lab) -> None:
    lab.run("first")
    gate = Gate(
        lab.root / "new" / "run", lab.root / "new" / "ledger.jsonl", state=lab.root / "state"
    )
    own = lab.root / "ledger.jsonl"
    assert gate.used_elsewhere(Population(KEYS)) == {str(own.resolve()): len(lab.asked)}
    assert gate.used_elsewhere(Population(["f" * 64])) == {}
    assert lab.gate("second").used_elsewhere(Population(KEYS)) == {}  # its own ledger knows them
    own.unlink()
    assert gate.used_elsewhere(Population(KEYS)) == {}


def test_a_sealed_file_that_was_edited_does_not_go_on(lab: Lab) -> None:
    folder = undecided(lab)
    sealed = read_json(folder / SEALED_FILE)
    sealed["parts"][0][1]["costs"][0] = [[-1.0]]
    write_json(folder / SEALED_FILE, sealed)
    with pytest.raises(InputError, match="not what the ledger says was sealed"):
        lab.run("second", slow, sequential=True, continues=folder)


def test_the_ledger_promises_the_largest_delta(lab: Lab) -> None:
    lab.run("run", constraints=(replace(MEAN, delta=0.2), replace(RATE, delta=0.1, threshold=0.5)))
    assert lab.ledger.delta == 0.2
    checks = verify(lab.root / "run" / "certificate.json", state=lab.root / "state")
    assert not [c for c in checks if c.outcome == "FAILED"]


def test_a_failed_test_that_fails_otherwise_keeps_its_first_numbers(lab: Lab) -> None:
    lab.run("run", harmful)
    before = (lab.root / "run" / SEALED_FILE).read_bytes()
    with pytest.raises(InputError, match="found another"):
        lab.run("run", lambda seed, key: harmful(seed, key) + 0.1)
    assert (lab.root / "run" / SEALED_FILE).read_bytes() == before


def test_the_certificate_names_the_line_that_opened_its_test(lab: Lab) -> None:
    lab.run("a", harmful)
    lab.run("b", files=OTHER_FILES)
    record = lab.certificate("b")
    (line,) = [x for x in lab.ledger.lines if x.get("plan") == record["plan_hash"]]
    assert record["ledger"]["line"] == line["hash"]


def test_the_same_plan_in_another_folder_leaves_its_plan_there(lab: Lab) -> None:
    with lab.gate("a").test((MEAN,), Population(KEYS), FILES, PROVENANCE):
        pass
    assert lab.run("b") == "PASS"
    assert read_json(lab.root / "b" / "plan.json") == lab.certificate("b")["plan"]
