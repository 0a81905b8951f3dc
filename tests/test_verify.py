"""hcrlhf verify: what an honest certificate looks like, and every way to make another of it."""

import copy
import io
import json
import random
import shutil
from collections.abc import Callable, Iterator
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hcrlhf import certificate as cert
from hcrlhf.cli import BAD_INPUT, PASSED, main
from hcrlhf.commands import FAILED
from hcrlhf.constraint import Constraint
from hcrlhf.gate import Gate, Population
from hcrlhf.hashing import folder_hashes, json_hash, read_json, sealed_hash, sha256, write_json
from hcrlhf.safety import CostSamples
from hcrlhf.verify import Check, verify

DATA = Path(__file__).parent / "data"
N = 30
KEYS = tuple(sha256("prompt number", str(i)) for i in range(100))
MEAN = Constraint("mean", 0.0, safety_prompts=N, lower=-1.0, upper=1.0)
RATE = Constraint("harm_rate", 0.25, safety_prompts=N)
Record = dict[str, Any]


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HCRLHF_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


def passed_run(root: Path, name: str, offset: float = 0.0, clear: bool = False) -> Path:
    """A run that passed, through the gate: policy, certificate, page, responses, plan, verdict."""
    run = root / name
    policy = run / "policy"
    policy.mkdir(parents=True)
    (policy / "adapter_model.safetensors").write_bytes(bytes(range(64)) + name.encode())
    (policy / "adapter_config.json").write_text('{"r": 8, "base": "../sft"}\n')
    gate = Gate(run, root / "ledger.jsonl")
    provenance = {"backbone": "b" * 64, "decoding": {"temperature": 1.0}}
    with gate.test((MEAN, RATE), Population(KEYS), folder_hashes(policy), provenance) as trial:
        keys = trial.next(N)
        costs = -0.5 + offset + 0.01 * np.arange(N) * np.where(np.arange(N) % 2, 1, -1)
        trial.record(
            CostSamples(
                tuple(keys),
                np.repeat(costs[:, None, None], 2, axis=2),
                tuple((f"answer {i}",) for i in range(N)),
                np.zeros((N, 1), dtype=np.bool_),
            )
        )
        assert trial.passed()
        trial.certify({key: f"prompt {key[:6]}" for key in keys}, {"numpy": "2"})
        write_json(
            run / cert.VERDICT_FILE,
            cert.verdict_record("PASS", "every bound is within its limit", trial.plan_hash),
        )
        trial.release()
    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return passed_run(tmp_path, "run")


@pytest.fixture
def record(run: Path) -> Record:
    found: Record = read_json(run / "certificate.json")
    return found


def failures(run: Path, **options: Any) -> list[str]:
    return [c.what for c in verify(run / "certificate.json", **options) if c.outcome == "FAILED"]


def resealed(run: Path, record: Record) -> None:
    """What a forger does: the certificate with a hash and a page that fit it again."""
    record["hash"] = sealed_hash(record)
    write_json(run / "certificate.json", record)
    (run / "certificate.md").write_text(cert.certificate_page(record), encoding="utf-8")


def elsewhere(root: Path) -> Path:
    """A folder for a certificate that comes alone: no ledger lies beside it."""
    folder = root / "another place" / "run"
    folder.mkdir(parents=True)
    return folder


def outcome(checks: list[Check], what: str) -> str:
    (found,) = {check.outcome for check in checks if check.what == what}
    return found


# -- an honest certificate -------------------------------------------------------------------------


def test_an_honest_certificate_is_verified_in_every_part(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = verify(run / "certificate.json")
    assert {check.outcome for check in checks} == {"ok", "not checked"}
    assert [check.what for check in checks if check.outcome == "not checked"] == [
        "that no training stage saw a safety prompt",
        "that the costs are what the cost model says of the policy's responses",
    ]
    assert main(["verify", str(run / "certificate.json")]) == PASSED
    assert (
        f"verified: {len(checks) - 2} checks hold, 2 could not be made" in capsys.readouterr().out
    )


def test_a_pass_is_said_with_what_was_found(record: Record) -> None:
    upper = [cert.round_up(bound["found"]["upper"]) for bound in record["bounds"]]
    assert cert.pass_figures(record) == (
        f"mean: U {upper[0]}, limit 0; harm_rate: U {upper[1]}, limit 0.25; "
        "0 of 30 responses cut at the length limit"
    )


def test_the_folder_of_a_run_will_do_and_other_files_are_no_certificates(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(run)]) == PASSED
    for name in (cert.PLAN_FILE, cert.VERDICT_FILE):
        assert main(["verify", str(run / name)]) == BAD_INPUT
        assert f"{name} is no certificate; expected a run's" in capsys.readouterr().err


def test_it_stays_verified_after_later_tests_in_the_same_ledger(run: Path, tmp_path: Path) -> None:
    other = passed_run(tmp_path, "other", offset=-0.01)
    assert failures(run) == failures(other) == []


def test_what_is_not_there_is_named_and_not_silently_fine(run: Path, tmp_path: Path) -> None:
    alone = elsewhere(tmp_path) / "certificate.json"
    shutil.copy(run / "certificate.json", alone)
    checks = verify(alone)
    assert {check.outcome for check in checks} == {"ok", "not checked"}
    for what in ("the ledger's chain", "the policy's files", "the page certificate.md"):
        assert outcome(checks, what) == "not checked"
    named = verify(alone, ledger=tmp_path / "ledger.jsonl", policy=run / "policy")
    assert outcome(named, "the ledger's chain") == outcome(named, "the policy's files") == "ok"


def test_another_machine_says_that_it_cannot_know_the_ledgers_tail(
    run: Path, tmp_path: Path
) -> None:
    checks = verify(run / "certificate.json", state=tmp_path / "another machine")
    assert outcome(checks, "the ledger's tail") == "not checked"
    assert outcome(verify(run / "certificate.json"), "the ledger's tail") == "ok"


def test_exit_codes_say_verified_failed_and_unreadable(
    run: Path, record: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "certificate.json"
    assert main(["verify", str(path)]) == PASSED == 0
    record["bounds"][0]["found"]["upper"] -= 0.01
    write_json(path, record)
    assert main(["verify", str(path)]) == FAILED == 5
    assert "NOT VERIFIED: " in capsys.readouterr().out
    for bad in (run.parent, run / "missing.json", run / "missing" / "certificate.json"):
        assert main(["verify", str(bad)]) == BAD_INPUT == 2
        assert capsys.readouterr().err.count("\n") == 1


# -- bytes -----------------------------------------------------------------------------------------


def byte_changes(content: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    draw = random.Random(seed)
    for _ in range(count):
        changed = bytearray(content)
        position = draw.randrange(len(content))
        changed[position] = draw.choice([b for b in range(256) if b != content[position]])
        yield bytes(changed)


def same_json(one: bytes, two: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(two))
    except ValueError:
        return False


def test_a_thousand_random_bytes_of_the_certificate(run: Path) -> None:
    path = run / "certificate.json"
    content = path.read_bytes()
    harmless = 0
    for number, changed in enumerate(byte_changes(content, 1000)):
        path.write_bytes(changed)
        if same_json(content, changed):
            harmless += 1
            assert failures(run) == []
        else:
            assert failures(run), changed
            if number % 50 == 0:
                assert main(["verify", str(path)]) == FAILED
    assert 0 < harmless < 300  # spaces for other spaces


@pytest.mark.parametrize(
    "name", ["plan.json", "policy/adapter_model.safetensors", "policy/adapter_config.json"]
)
def test_random_bytes_of_the_files_beside_it(run: Path, name: str) -> None:
    path = run / name
    content = path.read_bytes()
    for changed in byte_changes(content, 100):
        path.write_bytes(changed)
        harmless = name == "plan.json" and same_json(content, changed)
        assert (failures(run) == []) == harmless, changed


def test_every_byte_of_the_verdict_and_the_plan_hash_in_verdict_json(run: Path) -> None:
    path = run / "verdict.json"
    content = path.read_bytes()
    for value in ("PASS", read_json(path)["plan_hash"]):
        start = content.index(value.encode())
        for position in range(start, start + len(value), 5 if len(value) > 5 else 1):
            path.write_bytes(content[:position] + b"~" + content[position + 1 :])
            assert failures(run) == ["verdict.json says the same"]


def test_random_bytes_of_verdict_json(run: Path) -> None:
    path = run / "verdict.json"
    content = path.read_bytes()
    for changed in byte_changes(content, 100):
        path.write_bytes(changed)
        assert (failures(run) == []) == same_json(content, changed), changed


def test_random_bytes_of_the_page(run: Path) -> None:
    path = run / "certificate.md"
    content = path.read_bytes()
    for changed in byte_changes(content, 150):
        path.write_bytes(changed)
        assert failures(run) or b"\r" in changed, changed


def test_another_line_end_on_the_page_is_noticed(run: Path) -> None:
    path = run / "certificate.md"
    path.write_bytes(path.read_bytes()[:-1] + b"\r")
    assert failures(run)


def rows_of(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path: Path, rows: list[Record]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("column", ["prompt", "response", "cost"])
def test_a_changed_prompt_response_or_cost_in_the_file_of_responses(run: Path, column: str) -> None:
    path = run / "responses.jsonl"
    rows = rows_of(path)
    for i in (0, N // 2, N - 1):
        changed = copy.deepcopy(rows)
        changed[i][column] = -0.7 if column == "cost" else changed[i][column] + "!"
        write_rows(path, changed)
        assert failures(run)
    for changed in (rows[::-1], rows[1:], [*rows, rows[-1]], [rows[1], rows[0], *rows[2:]]):
        write_rows(path, changed)
        assert failures(run)
    path.write_text("")
    assert failures(run)


def test_random_bytes_of_the_file_of_responses(run: Path) -> None:
    path = run / "responses.jsonl"
    content = path.read_bytes()
    rows = rows_of(path)
    for changed in byte_changes(content, 100):
        path.write_bytes(changed)
        try:
            same = rows_of(path) == rows
        except ValueError:
            same = False
        assert (failures(run) == []) == same, changed


def test_a_file_more_or_less_in_the_policy_folder_is_noticed(run: Path) -> None:
    extra = run / "policy" / "sub" / "more.bin"
    extra.parent.mkdir()
    extra.write_text("")
    assert failures(run) == ["the policy's files"]
    extra.unlink()
    assert failures(run) == []
    (run / "policy" / "adapter_config.json").unlink()
    assert failures(run) == ["the policy's files"]


# -- forgeries with all hashes of the certificate recomputed ---------------------------------------


def lower_u(record: Record) -> None:
    record["bounds"][0]["found"]["upper"] -= 1e-6


def better_e_value(record: Record) -> None:
    record["bounds"][0]["found"]["log_e_value"] += 1e-3


def other_words(record: Record) -> None:
    record["claim"]["sentence"] = record["claim"]["sentence"].replace("at most 0", "at most -1")


def better_class(record: Record) -> None:
    record["bounds"][1]["assumptions"] = "nothing"


def human_judgement(record: Record) -> None:
    record["claim"]["not_covered"] = "Nothing."


def smaller_delta(record: Record) -> None:
    record["claim"]["error_probability"] = 0.001


def better_mean(record: Record) -> None:
    record["diagnostics"]["mean_cost"] -= 0.1


def no_harm(record: Record) -> None:
    record["diagnostics"]["harm_rate"] = 0.01


def one_prompt_more(record: Record) -> None:
    record["data"]["n"] += 1


def swapped_prompts(record: Record) -> None:
    prompts = record["data"]["prompts"]
    prompts[0], prompts[1] = prompts[1], prompts[0]


def swapped_rows(record: Record) -> None:
    for column in ("prompts", "costs"):
        rows = record["data"][column]
        rows[0], rows[-1] = rows[-1], rows[0]


def doubled_prompt(record: Record) -> None:
    record["data"]["prompts"][1] = record["data"]["prompts"][0]


def doubled_row(record: Record) -> None:
    for column in ("prompts", "costs"):
        record["data"][column][1] = record["data"][column][0]


def dropped_row(record: Record) -> None:
    for column in ("prompts", "costs"):
        del record["data"][column][0]
    record["data"]["n"] -= 1
    record["data"]["seeds"][0][1] -= 1


def other_seed(record: Record) -> None:
    record["data"]["seeds"][0][0] = "0" * 64


def other_policy(record: Record) -> None:
    record["plan"]["policy"]["files"]["adapter_model.safetensors"] = "0" * 64


def more_delta(record: Record) -> None:
    record["ledger"]["delta"] = 0.5


def first_test(record: Record) -> None:
    record["ledger"]["test"] = 0


def all_of_delta(record: Record) -> None:
    record["ledger"]["schedule"] = "once"


NOTICED_ALONE = {
    lower_u: "mean <= 0: betting",
    better_e_value: "mean <= 0: betting",
    other_words: "the claim's words follow from the bounds",
    better_class: "harm_rate: class and assumptions of the bound",
    human_judgement: "the claim's words follow from the bounds",
    smaller_delta: "the claim's words follow from the bounds",
    better_mean: "the diagnostics",
    no_harm: "the diagnostics",
    one_prompt_more: "n is the number of costs",
    swapped_prompts: "the prompts stand in the derived order",
    swapped_rows: "the prompts stand in the derived order",
    doubled_prompt: "every prompt stands once",
    doubled_row: "every prompt stands once",
    dropped_row: "the certificate is consistent",
    other_seed: "the seed is derived from policy, set and ledger",
    other_policy: "the hash of the plan",
    more_delta: "the certificate's ledger is that of the plan",
    first_test: "the certificate's ledger is that of the plan",
    all_of_delta: "the certificate's ledger is that of the plan",
}


@pytest.mark.parametrize("forge", list(NOTICED_ALONE), ids=lambda f: f.__name__)
def test_a_forgery_is_noticed_by_the_certificate_alone(
    run: Path, record: Record, tmp_path: Path, forge: Callable[[Record], None]
) -> None:
    forge(record)
    alone = elsewhere(tmp_path)
    resealed(alone, record)
    found = failures(alone)
    assert "the certificate's own hash" not in found
    # A duplicated prompt shows in its own check or in the shape that the judge wants.
    assert NOTICED_ALONE[forge] in found or (
        "doubled" in forge.__name__ and "the certificate is consistent" in found
    )
    resealed(run, record)
    assert "the ledger names this certificate" in failures(run)


def honest_again(record: Record) -> None:
    """Everything that a forger can compute from costs, bounds and plan, computed again."""
    constraints = [Constraint.read(bound) for bound in record["bounds"]]
    data = record["data"]
    costs = np.array(data["costs"])
    samples = CostSamples(
        tuple(data["prompts"]), costs[:, None, :], (("",),) * len(costs), np.zeros((len(costs), 1))
    )
    record["bounds"] = cert.describe_bounds(constraints, cert.judge(constraints, samples))
    record["plan"]["constraints"] = [c.describe() for c in constraints]
    record["claim"] = cert.make_claim(constraints, record["plan"], record["data"])
    record["diagnostics"] = cert.diagnose(constraints, costs[:, 0])
    record["plan_hash"] = json_hash(record["plan"])


def kinder_limit(record: Record) -> None:
    record["bounds"][0]["threshold"] = -0.2


def kinder_delta(record: Record) -> None:
    for bound in record["bounds"]:
        bound["delta"] = 0.02


def better_costs(record: Record) -> None:
    record["data"]["costs"] = [[cost - 0.05 for cost in row] for row in record["data"]["costs"]]


def luckier_order(record: Record) -> None:
    record["data"]["costs"].sort()


def other_ledger(record: Record) -> None:
    record["ledger"]["id"] = record["plan"]["ledger"]["id"] = "f" * 32


def other_backbone(record: Record) -> None:
    record["plan"]["provenance"]["backbone"] = "f" * 64


@pytest.mark.parametrize(
    "forge",
    [kinder_limit, kinder_delta, better_costs, luckier_order, other_ledger, other_backbone],
    ids=lambda f: f.__name__,
)
def test_a_complete_forgery_fits_itself_and_is_noticed_by_the_ledger(
    run: Path, record: Record, tmp_path: Path, forge: Callable[[Record], None]
) -> None:
    forge(record)
    honest_again(record)
    alone = elsewhere(tmp_path)
    resealed(alone, record)
    checks = verify(alone / "certificate.json")
    assert {check.outcome for check in checks} == {"ok", "not checked"}
    assert outcome(checks, "the ledger's chain") == "not checked"
    resealed(run, record)
    (run / "plan.json").unlink()
    (run / "verdict.json").unlink()
    (run / "responses.jsonl").unlink()
    assert set(failures(run)) & {
        "the ledger names this certificate",
        "the ledger knows this plan",
        "it is the certificate's ledger",
    }


def test_costs_taken_from_another_certificate_are_noticed(run: Path, tmp_path: Path) -> None:
    other = read_json(passed_run(tmp_path, "other", offset=-0.1) / "certificate.json")
    mine = read_json(run / "certificate.json")
    mine["data"]["costs"] = other["data"]["costs"]
    resealed(run, mine)
    found = failures(run)
    assert "mean <= 0: betting" in found and "the ledger names this certificate" in found
    honest_again(mine)
    resealed(run, mine)
    assert failures(run) == ["the costs in responses.jsonl", "the ledger names this certificate"]


def test_a_file_of_responses_of_another_run_is_noticed(run: Path, tmp_path: Path) -> None:
    other = passed_run(tmp_path, "other", offset=-0.1)
    shutil.copy(other / "responses.jsonl", run)
    assert failures(run) == [
        "prompts and responses in responses.jsonl",
        "the costs in responses.jsonl",
    ]


def test_the_certificate_of_another_policy_is_noticed(run: Path, tmp_path: Path) -> None:
    other = passed_run(tmp_path, "other", offset=-0.1)
    shutil.rmtree(run / "policy")
    shutil.copytree(other / "policy", run / "policy")
    assert failures(run) == ["the policy's files"]
    for name in ("certificate.json", "certificate.md"):
        shutil.copy(run / name, other / name)
    found = failures(other)
    assert {"plan.json is the plan", "verdict.json says the same"} <= set(found)


def test_a_retrospective_certificate_is_no_committed_one(run: Path, record: Record) -> None:
    for kind in ("retrospective", "Committed", None):
        resealed(run, {**record, "kind": kind})
        assert failures(run)


def test_a_retrospective_certificate_cannot_dress_up_as_a_committed_one(
    record: Record, tmp_path: Path
) -> None:
    constraints = [Constraint.read(bound) for bound in record["bounds"]]
    table = tmp_path / "table.jsonl"
    rows = [{"prompt_id": i, "cost": -0.5 - i / 1000} for i in range(N)]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--constraint", "mean:0", "--lower", "-1", "--upper", "1"]
    out = tmp_path / "out"
    assert main(["certify", str(table), *arguments, "--out", str(out)]) == PASSED
    forged = read_json(out / "certificate.json")
    forged |= {name: record[name] for name in ("plan", "plan_hash", "ledger")}
    assert len(constraints) == 2
    resealed(out, forged)
    assert "(retrospective)" not in (out / "certificate.md").read_text()
    assert failures(out)


@pytest.mark.parametrize("addition", [{"kind": "approved"}, {"endorsed_by": "an authority"}])
def test_words_that_no_version_writes_are_noticed_without_a_ledger(
    record: Record, tmp_path: Path, addition: Record
) -> None:
    alone = elsewhere(tmp_path)
    resealed(alone, record | addition)
    assert failures(alone)


# -- the ledger ------------------------------------------------------------------------------------


def test_a_ledger_that_was_changed_shortened_or_replaced_is_noticed(
    run: Path, tmp_path: Path
) -> None:
    path = tmp_path / "ledger.jsonl"
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    for damaged in (content[:-1], b"", lines[0] + lines[2], b"".join(lines[:-1])):
        path.write_bytes(damaged)
        assert failures(run) == ["the ledger's chain"]
    for changed in byte_changes(content, 50):
        path.write_bytes(changed)
        assert failures(run) == ["the ledger's chain"]
    path.unlink()
    assert main(["ledger", str(path), "--forget"]) == PASSED
    passed_run(tmp_path, "later")
    assert "it is the certificate's ledger" in failures(run)


def test_without_its_last_line_the_ledger_names_no_certificate(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    found = failures(run, state=tmp_path / "another machine")
    assert found == ["the ledger's verdict", "the ledger names this certificate"]


# -- garbage ---------------------------------------------------------------------------------------

GARBAGE: list[Any] = [None, "", [], {}, -1, 0, 1.5, True, "x", [[]], 10**400, 1e308, "1e400"]


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every leaf and every subtree; of a list the first and the last."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from paths_of(item, (*path, key))
    elif isinstance(value, list):
        for index in sorted({0, len(value) - 1} if value else ()):
            yield from paths_of(value[index], (*path, index))


def replaced(record: Record, path: tuple[Any, ...], value: Any) -> Record:
    changed = copy.deepcopy(record)
    place: Any = changed
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return changed


def without(record: Record, path: tuple[Any, ...]) -> Record:
    changed = copy.deepcopy(record)
    place: Any = changed
    for step in path[:-1]:
        place = place[step]
    del place[path[-1]]
    return changed


def write_forged(path: Path, record: Any) -> None:
    if isinstance(record, dict):
        record["hash"] = sealed_hash(record)
    path.write_text(json.dumps(record))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_garbage_anywhere_in_the_certificate_is_noticed(run: Path) -> None:
    honest = read_json(run / "certificate.json")
    draw = random.Random(0)
    count = 0
    for place in paths_of(honest):
        for value in draw.sample([*GARBAGE, ...], 5):
            forged = without(honest, place) if value is ... else replaced(honest, place, value)
            if place == ("hash",) or forged == honest:
                continue
            write_forged(run / "certificate.json", forged)
            assert failures(run), (place, value)
            count += 1
    assert count > 500


# What a certificate alone cannot show to be otherwise: the ledger and the responses can.
UNSEEN = [
    *(("environment",), ("ledger", "line"), ("ledger", "file")),
    *(("data", name) for name in ("truncated", "responses_sha256", "earlier_plans")),
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_without_its_ledger_a_certificate_still_shows_garbage(run: Path, tmp_path: Path) -> None:
    honest, alone = read_json(run / "certificate.json"), elsewhere(tmp_path)
    draw = random.Random(0)
    count = 0
    for place in paths_of(honest):
        if place == ("hash",) or any(place[: len(unseen)] == unseen for unseen in UNSEEN):
            continue
        for value in draw.sample([*GARBAGE, ...], 5):
            forged = without(honest, place) if value is ... else replaced(honest, place, value)
            old = reduce(getitem, place, honest)
            rounded = isinstance(old, float) and value == 0 and abs(old) < 1e-9
            if forged != honest and not rounded:
                write_forged(alone / "certificate.json", forged)
                assert failures(alone), (place, value)
                count += 1
    assert count > 500


def test_more_delta_than_was_granted_is_noticed_without_the_ledger(
    run: Path, record: Record, tmp_path: Path
) -> None:
    for bound in record["bounds"]:
        bound["delta"] = 0.05  # of the whole claim: the first test is granted half
    honest_again(record)
    alone = elsewhere(tmp_path)
    resealed(alone, record)
    assert failures(alone) == ["the δ that the ledger grants"]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("claim", "error_probability"), None),
        (("claim", "error_probability"), "x"),
        (("bounds", 0, "found", "upper"), "x"),
        (("bounds", 0, "found", "upper"), 10**400),
        (("ledger", "delta"), []),
        (("bounds", 0, "upper"), None),
        (("bounds", 0, "safety_prompts"), 10**15),
        (("bounds", 1, "safety_prompts"), 10**15),
        (("ledger", "file"), "x" * 5000),
    ],
)
def test_no_garbage_ends_in_a_traceback(
    run: Path, record: Record, place: tuple[Any, ...], value: Any
) -> None:
    write_forged(run / "certificate.json", replaced(record, place, value))
    assert main(["verify", str(run / "certificate.json")]) == FAILED


def test_what_cannot_be_printed_is_no_traceback(
    run: Path, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_forged(run / "certificate.json", record | {"verdict": "\ud800"})
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert main(["verify", str(run / "certificate.json")]) == FAILED


@pytest.mark.parametrize("depth", [300, 900, 2000, 50_000])
def test_deep_nesting_is_noticed(run: Path, depth: int) -> None:
    path = run / "certificate.json"
    path.write_text(path.read_text().rstrip()[:-1] + ', "x": ' + "[" * depth + "]" * depth + "}")
    assert main(["verify", str(path)]) == FAILED


@pytest.mark.parametrize(
    "text",
    ["", "null", "5", "[]", "{}", "NaN", '"x"', '{"schema": 2}', '{"schema": true}', "\x00"]
    + [f'{{"schema": {schema}}}' for schema in ("0", "3", "null", '"2"', "[2]", "1e400", "-1")]
    + ['{"schema": 1}', '{"schema": 2, "kind": "retrospective"}', '{"schema": 2, "kind": "human"}'],
)
def test_what_is_no_certificate_or_of_no_known_schema_fails(tmp_path: Path, text: str) -> None:
    path = tmp_path / "certificate.json"
    path.write_text(text)
    assert main(["verify", str(path)]) == FAILED


@pytest.mark.parametrize("key", ["verdict", "claim", "upper", "hash"])
def test_a_key_that_stands_twice_is_refused_though_the_last_one_is_right(
    run: Path, key: str
) -> None:
    path = run / "certificate.json"
    text = path.read_text()
    assert text.count(f'"{key}": ')
    path.write_text(text.replace(f'"{key}": ', f'"{key}": 0, "{key}": ', 1))
    checks = verify(path)
    assert [(c.outcome, c.detail) for c in checks] == [("FAILED", "a key stands twice")]


def test_a_key_that_stands_twice_in_plan_or_verdict_is_refused(run: Path) -> None:
    for name in ("plan.json", "verdict.json"):
        path = run / name
        text = path.read_text()
        path.write_text(text.replace('"schema": ', '"schema": 9, "schema": ', 1))
        assert failures(run)
        path.write_text(text)
    assert failures(run) == []


def test_a_certificate_cannot_write_lines_of_the_report(
    run: Path, record: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = elsewhere(tmp_path)
    resealed(alone, replaced(record, ("ledger", "file"), "x\nok           the ledger's chain"))
    assert main(["verify", str(alone / "certificate.json")]) == PASSED
    assert "\nok           the ledger's chain" not in capsys.readouterr().out


# -- other and pinned certificates -----------------------------------------------------------------


def test_a_certificate_of_another_schema_is_not_verified(run: Path, record: Record) -> None:
    for schema in (1, True, 3, "2", None):
        resealed(run, record | {"schema": schema})
        assert main(["verify", str(run / "certificate.json")]) == FAILED


# tests/data/v2 was written once, by this version's gate, from the root of the repository:
#
#   import os; os.environ["HCRLHF_STATE_DIR"] = "/tmp/state"
#   import sys; sys.path[:0] = [".", "tests"]
#   from test_verify import write_pinned; write_pinned()
#
# It must not be written again to make a test pass: whoever holds a certificate of schema 2 wants it
# verified by later versions too. Other fields or other words are another schema.
def write_pinned(folder: Path = DATA / "v2") -> None:
    n = 40
    policy = folder / "policy"
    policy.mkdir(parents=True)
    (policy / "adapter_model.safetensors").write_text("not a model, but as good as one here\n")
    (policy / "adapter_config.json").write_text('{"r": 8}\n')
    constraints = (
        Constraint("mean", -0.25, safety_prompts=n, lower=-4.0, upper=4.0),
        Constraint("harm_rate", 0.2, safety_prompts=n),
    )
    provenance = {
        "hcrlhf": "0.1.0",
        "backbone": "b" * 64,
        "cost_model": {"adapter_model.safetensors": "c" * 64, "head.safetensors": "d" * 64},
        "decoding": {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
    }
    population = Population(KEYS, 2, {"training and validation prompts": 900}, "safety.jsonl")
    gate = Gate(folder, folder / "ledger.jsonl")
    with gate.test(constraints, population, folder_hashes(policy), provenance) as trial:
        keys = trial.next(n)
        # Between -2.4 and -0.85, to six places, without any pattern in the order.
        costs = [-2.4 + round(1.55 * int(sha256("cost", k)[:6], 16) / 16**6, 6) for k in keys]
        trial.record(
            CostSamples(
                tuple(keys),
                np.repeat(np.round(costs, 6)[:, None, None], 2, axis=2),
                tuple((f"answer {i}",) for i in range(n)),
                np.arange(n)[:, None] == 3,
            )
        )
        trial.certify({key: f"question {i}" for i, key in enumerate(keys)}, {"hcrlhf": "0.1.0"})
        write_json(
            folder / cert.VERDICT_FILE,
            cert.verdict_record("PASS", "every bound is within its limit", trial.plan_hash),
        )
        trial.release()


def test_a_certificate_of_schema_2_that_was_written_once_stays_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(DATA / "v2", tmp_path / "v2")
    checks = verify(tmp_path / "v2" / "certificate.json")
    assert [check for check in checks if check.outcome == "FAILED"] == []
    # On a machine that has never seen this ledger its tail is a third thing that is not known.
    assert sum(check.outcome == "not checked" for check in checks) == 3
    assert main(["verify", str(tmp_path / "v2" / "certificate.json")]) == PASSED
    assert "verified: " in capsys.readouterr().out


def test_the_pinned_certificate_passes_by_a_bound_worked_out_otherwise() -> None:
    record = read_json(DATA / "v2" / "certificate.json")
    mean, rate = record["bounds"]
    costs = [row[0] for row in record["data"]["costs"]]
    assert (len(costs), mean["delta"], rate["delta"]) == (40, 0.025, 0.025)
    # No harm in 40: Clopper-Pearson is 1 - δ^(1/n).
    assert max(costs) < 0
    assert rate["found"]["upper"] == pytest.approx(1 - 0.025 ** (1 / 40))
    # star, by its formula (Waudby-Smith & Ramdas 2024), against the threshold itself.
    u = [(cost + 4) / 8 for cost in costs]
    m, log_goal, wealth, total, squares = (-0.25 + 4) / 8, np.log(1 / 0.025), 0.0, 0.5, 0.25
    for i, x in enumerate(u, start=1):
        bet = np.sqrt(2 * (log_goal - wealth) / ((40 - i + 1) * squares / i))
        wealth += np.log1p(-min(bet, 0.75 / (1 - m)) * (x - m))
        if wealth >= log_goal:
            break
        total += x
        squares += (x - total / (i + 1)) ** 2
    assert wealth >= log_goal
    assert mean["found"]["log_e_value"] == pytest.approx(wealth)
    assert mean["found"]["upper"] <= -0.25
