"""The ledger: what a test costs is written down, and no later change of it goes unnoticed."""

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from hcrlhf import ledger as ledgers
from hcrlhf.cli import BAD_INPUT, PASSED, main
from hcrlhf.errors import InputError
from hcrlhf.hashing import canonical, sealed_hash

ROOT = Path(__file__).resolve().parent.parent
DELTA = 0.1


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory of its own for every test, for those that go through the command too."""
    folder = tmp_path / "state"
    monkeypatch.setenv("HCRLHF_STATE_DIR", str(folder))
    return folder


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "claim" / "ledger.jsonl"


def keys(*numbers: int) -> list[str]:
    """Prompt keys as the gate gives them: 64 hex digits."""
    return [hashlib.sha256(str(i).encode()).hexdigest() for i in numbers]


def open_one(path: Path, plan: str, prompts: list[str], schedule: Any = "halving") -> int:
    with ledgers.locked(path, DELTA, schedule) as ledger:
        return ledgers.open_test(ledger, plan, prompts).tests[-1].number


def close(path: Path, test: int, verdict: str, certificate: str | None = None) -> None:
    with ledgers.locked(path, DELTA, "halving") as ledger:
        ledgers.close_test(ledger, test, verdict, certificate)


def carry_on(path: Path, test: int, plan: str, prompts: list[str]) -> None:
    with ledgers.locked(path, DELTA, "halving") as ledger:
        ledgers.continue_test(ledger, test, plan, prompts)


def burn(path: Path, test: int) -> None:
    with ledgers.locked(path, DELTA, "halving") as ledger:
        ledgers.append(ledger, {"kind": "burn", "test": test})


def full_life(path: Path) -> Path:
    """A ledger with a line of every kind: a continued and passed test, a burnt and an open one."""
    assert open_one(path, "plan one", keys(1, 2)) == 1
    close(path, 1, "NO_SOLUTION_FOUND")
    carry_on(path, 1, "plan one, continued", keys(3))
    close(path, 1, "PASS", "c" * 64)
    assert open_one(path, "plan two", keys(4)) == 2
    close(path, 2, "NO_SOLUTION_FOUND")
    burn(path, 2)
    assert open_one(path, "plan three", keys(5)) == 3
    return path


def rewritten(path: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """What somebody does who knows the format: changes records and recomputes the whole chain."""
    records = [json.loads(line) for line in path.read_bytes().splitlines()]
    change(records)
    previous = ledgers.NO_LINE
    for number, record in enumerate(records, start=1):
        record.update(number=number, previous=previous)
        previous = record["hash"] = sealed_hash(record)
    path.write_bytes(b"".join(canonical(record).encode() + b"\n" for record in records))


# -- the chain -------------------------------------------------------------------------------------


def test_every_line_holds_the_hash_of_the_one_before_and_any_tool_can_recompute_it(
    path: Path,
) -> None:
    previous = "0" * 64
    for number, raw in enumerate(full_life(path).read_text().splitlines(), start=1):
        line = json.loads(raw)
        assert (line["number"], line["previous"]) == (number, previous)
        body = {key: value for key, value in line.items() if key != "hash"}
        text = json.dumps(body, sort_keys=True, separators=(",", ":"))
        assert line["hash"] == hashlib.sha256(text.encode()).hexdigest()
        previous = line["hash"]
    assert number == 9
    assert ledgers.read(path).head == previous


def test_every_byte_of_a_ledger_matters(path: Path) -> None:
    assert open_one(path, "plan", keys(1)) == 1
    close(path, 1, "NO_SOLUTION_FOUND")
    content = path.read_bytes()
    for position, byte in enumerate(content):
        for other in {byte ^ 1, byte ^ 0x20, byte ^ 0x80, ord("\n"), ord(" "), ord("0")} - {byte}:
            changed = content[:position] + bytes([other]) + content[position + 1 :]
            with pytest.raises(InputError, match=r"line \d|middle of line"):
                ledgers.parse(changed, path)


def test_a_thousand_random_changes_of_bytes_are_all_noticed(path: Path) -> None:
    content = full_life(path).read_bytes()
    draw = random.Random(0)
    for _ in range(1000):
        changed = bytearray(content)
        position = draw.randrange(len(content))
        changed[position] = draw.choice([b for b in range(256) if b != content[position]])
        path.write_bytes(changed)
        with pytest.raises(InputError):
            ledgers.read(path)
    path.write_bytes(content)
    ledgers.read(path)


def test_inserted_and_removed_bytes_are_noticed(path: Path) -> None:
    content = full_life(path).read_bytes()
    draw = random.Random(1)
    for position in draw.sample(range(len(content)), 200):
        for changed in (
            content[:position] + content[position + 1 :],
            content[:position] + bytes([draw.randrange(256)]) + content[position:],
        ):
            with pytest.raises(InputError):
                ledgers.parse(changed, path)


def test_a_line_that_was_removed_moved_or_doubled_is_noticed(path: Path, state: Path) -> None:
    lines = full_life(path).read_bytes().splitlines(keepends=True)
    damaged = [lines[:i] + lines[i + 1 :] for i in range(len(lines))]
    damaged += [[*lines[:i], lines[i], *lines[i:]] for i in range(len(lines))]
    damaged += [
        [*lines[:i], lines[i + 1], lines[i], *lines[i + 2 :]] for i in range(len(lines) - 1)
    ]
    for number, remaining in enumerate(damaged):
        path.write_bytes(b"".join(remaining))
        with pytest.raises(InputError) as error:
            ledgers.read(path, state)
        last_gone = number == len(lines) - 1
        assert ("its tail is missing" in str(error.value)) == last_gone


def test_a_line_whose_own_hash_was_made_to_fit_does_not_fit_the_next(path: Path) -> None:
    lines = full_life(path).read_bytes().splitlines()
    for number in range(1, len(lines)):
        record = json.loads(lines[number - 1]) | {"time": "2020-01-01T00:00:00+00:00"}
        record["hash"] = sealed_hash(record)
        changed = [*lines[: number - 1], canonical(record).encode(), *lines[number:]]
        with pytest.raises(InputError, match=f"line {number + 1}: does not follow the line before"):
            ledgers.parse(b"\n".join(changed) + b"\n", path)


def test_a_line_that_says_the_same_in_other_bytes_is_noticed(path: Path) -> None:
    open_one(path, "plan", keys(1))
    first, second = path.read_bytes().splitlines()
    for other in (
        second + b" ",
        second + b"\r",
        b"\xef\xbb\xbf" + second,
        second[:-1] + b',"x":1}',
    ):
        with pytest.raises(InputError, match="line 2: not what was written"):
            ledgers.parse(first + b"\n" + other + b"\n", path)


@pytest.mark.parametrize(
    "garbage", [b"\n", b"{}\n", b"[]\n", b"null\n", b"\xff\xfe\n", b"NaN\n", b"[" * 9999 + b"\n"]
)
def test_a_file_that_is_no_ledger_is_refused(path: Path, garbage: bytes) -> None:
    with pytest.raises(InputError, match="line 1: not what was written"):
        ledgers.parse(garbage, path)


def test_another_schema_is_refused(path: Path) -> None:
    open_one(path, "plan", keys(1))
    rewritten(path, lambda records: records[0].update(schema=2))
    with pytest.raises(InputError, match="not a ledger of schema 1"):
        ledgers.parse(path.read_bytes(), path)


def test_a_chain_without_a_first_line_of_a_ledger_is_refused(path: Path) -> None:
    open_one(path, "plan", keys(1))
    rewritten(path, lambda records: records.pop(0))
    with pytest.raises(InputError, match="not a ledger of schema 1"):
        ledgers.parse(path.read_bytes(), path)


@pytest.mark.parametrize("line", [0, 1])
@pytest.mark.parametrize("value", [None, 5, [[]], {}, "gone"])
def test_a_chain_with_odd_fields_is_refused_in_one_line(path: Path, line: int, value: Any) -> None:
    open_one(path, "plan", keys(1))

    def change(records: list[dict[str, Any]]) -> None:
        field = ("delta", "prompts")[line]
        if value == "gone":
            del records[line][field]
        else:
            records[line][field] = value

    rewritten(path, change)
    ledger = None
    try:
        ledger = ledgers.Ledger(path, ledgers.parse(path.read_bytes(), path))
        ledger.delta + len(ledger.spent() & set(keys(1)))
    except InputError:
        return
    # A number for δ, or a list of texts for prompts, is what they may be; nothing here is.
    raise TypeError("odd fields were read")


# -- a line that was not written whole -------------------------------------------------------------


def test_a_last_line_torn_at_any_byte_is_noticed_and_cut_without_touching_the_rest(
    path: Path, state: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledgers, "WRITING", 0)
    open_one(path, "one", keys(1))
    whole = path.read_bytes()
    kept = (state / "ledgers.json").read_bytes()
    close(path, 1, "NO_SOLUTION_FOUND")
    longer = path.read_bytes()
    for end in range(len(whole) + 1, len(longer)):
        # The process died before it could remember the new head.
        (state / "ledgers.json").write_bytes(kept)
        path.write_bytes(longer[:end])
        with pytest.raises(InputError, match="middle of line 3.*--drop-torn-line"):
            ledgers.read(path)
        with (
            pytest.raises(InputError, match="middle of line 3"),
            ledgers.locked(path, DELTA, "halving"),
        ):
            pass
        assert path.read_bytes() == longer[:end]
        assert main(["ledger", str(path), "--drop-torn-line"]) == PASSED
        assert f"cut {end - len(whole)} bytes" in capsys.readouterr().out
        assert path.read_bytes() == whole


def test_a_line_that_another_process_is_writing_is_awaited(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = full_life(path).read_bytes()
    path.write_bytes(content[:-9])

    def write_the_rest(seconds: float) -> None:
        path.write_bytes(content)

    monkeypatch.setattr("hcrlhf.ledger.time.sleep", write_the_rest)
    assert ledgers.read(path).path.read_bytes() == content


def test_nothing_is_cut_from_a_ledger_that_is_whole(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = full_life(path).read_bytes()
    assert main(["ledger", str(path), "--drop-torn-line"]) == PASSED
    assert "cut 0 bytes" in capsys.readouterr().out
    assert path.read_bytes() == content


def test_cutting_a_torn_line_does_not_hide_other_damage(path: Path) -> None:
    content = full_life(path).read_bytes()
    torn = content.replace(b"plan one", b"plan One", 1)[:-5]
    path.write_bytes(torn)
    with pytest.raises(InputError, match="line 2: not what was written"):
        ledgers.drop_torn_line(path)
    assert path.read_bytes() == torn


def test_tearing_off_a_line_that_was_once_whole_is_no_way_to_lose_it(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path.write_bytes(full_life(path).read_bytes()[:-5])
    assert main(["ledger", str(path), "--drop-torn-line"]) == BAD_INPUT
    assert "its tail is missing" in capsys.readouterr().err


def test_a_torn_first_line_can_be_repaired(path: Path) -> None:
    open_one(path, "one", keys(1))
    first = path.read_bytes().splitlines()[0]
    (Path(os.environ["HCRLHF_STATE_DIR"]) / "ledgers.json").unlink()
    path.write_bytes(first[:50])
    ledgers.drop_torn_line(path)
    assert open_one(path, "one", keys(1)) == 1


def test_cutting_in_a_file_that_is_not_there_is_bad_input(path: Path) -> None:
    assert main(["ledger", str(path), "--drop-torn-line"]) == BAD_INPUT


def test_cutting_waits_for_the_process_that_is_writing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_life(path)
    taken: list[str] = []
    acquire = FileLock.acquire

    def watched(self: FileLock, *arguments: Any, **options: Any) -> Any:
        taken.append(Path(self.lock_file).name)
        return acquire(self, *arguments, **options)

    monkeypatch.setattr(FileLock, "acquire", watched)
    ledgers.drop_torn_line(path)
    assert ".ledger.jsonl.lock" in taken


# -- what is granted -------------------------------------------------------------------------------


def test_halving_grants_a_half_a_quarter_an_eighth_and_never_more_than_everything() -> None:
    shares = [ledgers.granted_share("halving", k) for k in range(1, 1075)]
    assert shares[:3] == [0.5, 0.25, 0.125]
    assert sum(shares[:50]) < 1
    assert all(share > 0 for share in shares[:1070])


def test_once_grants_everything_to_the_first_and_says_why_there_is_no_second(path: Path) -> None:
    assert ledgers.granted_share("once", 1) == 1.0
    assert open_one(path, "one", keys(1), "once") == 1
    content = path.read_bytes()
    with pytest.raises(InputError, match="granted to one test, which has been opened; a further"):
        open_one(path, "two", keys(2), "once")
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("delta", "schedule", "fits"),
    [
        (DELTA, "halving", True),
        (DELTA / 2, "halving", True),  # the ledger promises as much and more
        (DELTA * 1.0000001, "halving", False),
        (DELTA, "once", False),
    ],
)
def test_a_ledger_serves_its_own_claim_only(
    path: Path, delta: float, schedule: Any, fits: bool
) -> None:
    content = full_life(path).read_bytes()
    if fits:
        with ledgers.locked(path, delta, schedule) as ledger:
            assert (ledger.delta, ledger.schedule) == (DELTA, "halving")
    else:
        with (
            pytest.raises(InputError, match="belongs to a claim with delta 0.1 by schedule halv"),
            ledgers.locked(path, delta, schedule),
        ):
            pass
    assert path.read_bytes() == content


# -- the life of a test ----------------------------------------------------------------------------


def test_what_a_ledger_tells_of_its_tests(path: Path) -> None:
    one, two, three = ledgers.read(full_life(path)).tests
    assert (one.number, one.plans) == (1, ("plan one", "plan one, continued"))
    assert (one.verdict, one.certificate, one.burnt) == ("PASS", "c" * 64, True)
    assert one.prompts == {key[:32] for key in keys(1, 2, 3)}
    assert (two.verdict, two.certificate, two.burnt) == ("NO_SOLUTION_FOUND", None, True)
    assert (three.verdict, three.certificate, three.burnt) == (None, None, False)


def test_a_pass_publishes_its_costs_and_burns_the_test(path: Path) -> None:
    open_one(path, "one", keys(1))
    assert not ledgers.read(path).tests[0].burnt
    close(path, 1, "PASS", "c" * 64)
    assert ledgers.read(path).tests[0].burnt


def test_a_test_is_found_by_each_of_its_plans(path: Path) -> None:
    ledger = ledgers.read(full_life(path))
    found = [ledger.find(p) for p in ("plan one", "plan one, continued", "plan two", "plan 9")]
    assert [test.number if test else None for test in found] == [1, 1, 2, None]


def test_prompts_are_spent_by_every_test(path: Path) -> None:
    ledger = ledgers.read(full_life(path))
    assert ledger.spent() == {key[:32] for key in keys(1, 2, 3, 4, 5)}


def test_prompts_that_a_test_never_came_to_are_fresh_again_once_it_is_closed(path: Path) -> None:
    open_one(path, "one", keys(1, 2, 3))
    with pytest.raises(InputError, match="1 of 1 safety prompts are spent"):
        open_one(path, "two", keys(3))
    with ledgers.locked(path, DELTA, "halving") as ledger:
        ledgers.close_test(ledger, 1, "PASS", "c" * 64, unused=keys(3))
    assert ledgers.read(path).spent() == {key[:32] for key in keys(1, 2)}
    assert open_one(path, "two", keys(3)) == 2
    with pytest.raises(InputError, match="1 of 1 safety prompts are spent"):
        open_one(path, "three", keys(2))


@pytest.mark.parametrize("old", [1, 2, 3, 4, 5])
def test_a_prompt_of_any_test_open_closed_or_continued_is_refused_elsewhere(
    path: Path, old: int
) -> None:
    content = full_life(path).read_bytes()
    with pytest.raises(InputError, match=r"1 of 3 safety prompts are spent: test 1, 2, 3 of"):
        open_one(path, "four", keys(100, old, 101))
    assert path.read_bytes() == content
    assert open_one(path, "four", keys(100, 101)) == 4


def test_a_continuation_takes_fresh_prompts_only(path: Path) -> None:
    open_one(path, "one", keys(1))
    close(path, 1, "NO_SOLUTION_FOUND")
    content = path.read_bytes()
    with pytest.raises(InputError, match="1 of 2 safety prompts are spent"):
        carry_on(path, 1, "one, continued", keys(1, 2))
    assert path.read_bytes() == content


def test_only_an_undecided_test_that_nobody_looked_at_goes_on(path: Path) -> None:
    open_one(path, "one", keys(1))
    with pytest.raises(InputError, match="test 1 of .* cannot be continued"):
        carry_on(path, 1, "more", keys(2))  # still open
    close(path, 1, "NO_SOLUTION_FOUND")
    burn(path, 1)
    with pytest.raises(InputError, match="cannot be continued; a further look is a new test"):
        carry_on(path, 1, "more", keys(2))
    open_one(path, "two", keys(2))
    close(path, 2, "PASS", "c" * 64)
    with pytest.raises(InputError, match="test 2 of .* cannot be continued"):
        carry_on(path, 2, "more", keys(3))


def test_the_same_end_twice_adds_nothing_and_another_end_is_refused(path: Path) -> None:
    open_one(path, "one", keys(1))
    close(path, 1, "PASS", "c" * 64)
    content = path.read_bytes()
    close(path, 1, "PASS", "c" * 64)
    for verdict, certificate in (("PASS", "d" * 64), ("NO_SOLUTION_FOUND", None)):
        with pytest.raises(InputError, match="says PASS for test 1, and this run found another"):
            close(path, 1, verdict, certificate)
    assert path.read_bytes() == content


OPEN = {"kind": "open", "plan": "p", "prompts": []}
MORE = {"kind": "continue", "plan": "q", "prompts": []}
FAIL = {
    "kind": "close",
    "verdict": "NO_SOLUTION_FOUND",
    "certificate": None,
    "sealed": "s",
    "unused": [],
}
PASS = {"kind": "close", "verdict": "PASS", "certificate": "c", "sealed": None, "unused": []}
BURN = {"kind": "burn"}
LABELS = {"kind": "labels", "labels": "d" * 64}
LEGAL: list[list[tuple[dict[str, Any], Any]]] = [
    [(OPEN, 1), (OPEN, 2), (FAIL, 2), (FAIL, 1), (OPEN, 3)],
    [(OPEN, 1), (FAIL, 1), (MORE, 1), (FAIL, 1), (MORE, 1), (PASS, 1)],
    [(OPEN, 1), (FAIL, 1), (BURN, 1), (BURN, 1)],
    [(OPEN, 1), (PASS, 1), (BURN, 1)],
    [(OPEN, 1), (PASS, 1), (LABELS, 1)],
]
ILLEGAL: list[list[tuple[dict[str, Any], Any]]] = [
    [(FAIL, 1)],
    [(MORE, 1)],
    [(BURN, 1)],
    [(OPEN, 2)],
    [(OPEN, 0)],
    [(OPEN, None)],
    [(OPEN, "1")],
    [(OPEN, 1), (OPEN, 1)],
    [(OPEN, 1), (OPEN, 3)],
    [(OPEN, 1), (MORE, 1)],
    [(OPEN, 1), (BURN, 1)],
    [(OPEN, 1), (FAIL, 2)],
    [(OPEN, 1), (FAIL, 1), (FAIL, 1)],
    [(OPEN, 1), (FAIL, 1), (PASS, 1)],
    [(OPEN, 1), (PASS, 1), (FAIL, 1)],
    [(OPEN, 1), (PASS, 1), (MORE, 1)],
    [(OPEN, 1), (FAIL, 1), (BURN, 1), (MORE, 1)],
    [(OPEN, 1), (LABELS, 1)],
    [(OPEN, 1), (FAIL, 1), (LABELS, 1)],
    [(OPEN, 1), (PASS, 1), (LABELS, 1), (LABELS, 1)],
    [(OPEN, 1), ({"kind": "ledger"}, 1)],
    [(OPEN, 1), ({"kind": None}, 1)],
]


def written(path: Path, steps: list[tuple[dict[str, Any], Any]]) -> bytes:
    """A well-chained ledger of these lines, whether they may stand there or not."""
    with ledgers.locked(path, DELTA, "halving"):
        pass
    rewritten(path, lambda records: records.extend({**f, "test": test} for f, test in steps))
    return path.read_bytes()


@pytest.mark.parametrize("steps", LEGAL)
def test_lines_that_may_follow_one_another(
    path: Path, steps: list[tuple[dict[str, Any], Any]]
) -> None:
    assert len(ledgers.parse(written(path, steps), path)) == 1 + len(steps)


@pytest.mark.parametrize("steps", ILLEGAL)
def test_a_line_that_cannot_follow_is_refused_though_its_hash_fits(
    path: Path, steps: list[tuple[dict[str, Any], Any]]
) -> None:
    content = written(path, steps)
    with pytest.raises(InputError, match=f"line {len(steps) + 1}: .* cannot stand there"):
        ledgers.parse(content, path)


# -- the state directory ---------------------------------------------------------------------------


def test_a_ledger_without_its_tail_is_refused_on_the_machine_that_saw_it(
    path: Path, state: Path, tmp_path: Path
) -> None:
    lines = full_life(path).read_bytes().splitlines(keepends=True)
    for kept in range(1, len(lines)):
        path.write_bytes(b"".join(lines[:kept]))
        with pytest.raises(InputError, match=f"has {kept} lines and lacks the last one"):
            ledgers.read(path, state)
        with (
            pytest.raises(InputError, match="lacks the last"),
            ledgers.locked(path, 0.1, "halving"),
        ):
            pass
        # Another machine cannot know.
        assert len(ledgers.read(path, tmp_path / "other").lines) == kept


def test_a_ledger_that_was_shortened_and_went_on_is_refused(path: Path, state: Path) -> None:
    open_one(path, "one", keys(1))
    whole = path.read_bytes()
    open_one(path, "two", keys(2))
    path.write_bytes(whole)
    other = state.with_name("another machine")
    with ledgers.locked(path, DELTA, "halving", other) as ledger:
        ledgers.open_test(ledger, "three", keys(3), other)
    with pytest.raises(InputError, match="its tail is missing"):
        ledgers.read(path, state)


def test_a_moved_ledger_is_still_known_by_its_identity(path: Path, tmp_path: Path) -> None:
    lines = full_life(path).read_bytes().splitlines(keepends=True)
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(InputError, match="its tail is missing"):
        ledgers.read(moved)


def test_a_ledger_that_vanished_is_asked_for_until_it_is_forgotten(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full_life(path).unlink()
    with pytest.raises(InputError, match="held spent tests .* and is gone.*--forget"):
        open_one(path, "plan", keys(9))
    assert not path.exists()
    assert main(["ledger", str(path), "--forget"]) == PASSED
    assert "forgotten" in capsys.readouterr().out
    assert open_one(path, "plan", keys(9)) == 1
    assert main(["ledger", str(path.with_name("other.jsonl")), "--forget"]) == PASSED
    assert "this machine knows no ledger there" in capsys.readouterr().out


def test_a_ledger_that_is_there_cannot_be_forgotten(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full_life(path)
    assert main(["ledger", str(path), "--forget"]) == BAD_INPUT
    assert "is still there" in capsys.readouterr().err
    assert ledgers.remembered_head(ledgers.read(path).identity) is not None


def test_forgetting_one_ledger_keeps_the_others(path: Path, tmp_path: Path) -> None:
    other = full_life(tmp_path / "other" / "ledger.jsonl")
    full_life(path).unlink()
    assert ledgers.forget(path)
    kept = ledgers.read(other)
    assert ledgers.remembered_head(kept.identity) == kept.head


def test_a_ledger_in_which_nothing_was_spent_may_vanish(path: Path) -> None:
    with ledgers.locked(path, DELTA, "halving"):
        pass
    path.unlink()
    assert open_one(path, "plan", keys(1)) == 1


def test_where_the_state_cannot_be_written_the_ledger_goes_without(
    path: Path, tmp_path: Path
) -> None:
    nowhere = tmp_path / "a file"
    nowhere.write_text("")
    with ledgers.locked(path, DELTA, "halving", nowhere) as ledger:
        ledger = ledgers.open_test(ledger, "one", keys(1), nowhere)
    assert ledgers.read(path, nowhere).head == ledger.head
    assert ledgers.remembered_head(ledger.identity, nowhere) is None


def test_the_state_directory_follows_its_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCRLHF_STATE_DIR", "/own")
    monkeypatch.setenv("XDG_STATE_HOME", "/xdg")
    assert ledgers.state_directory() == Path("/own")
    monkeypatch.delenv("HCRLHF_STATE_DIR")
    assert ledgers.state_directory() == Path("/xdg/hcrlhf")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert ledgers.state_directory() == Path("/home/somebody/.local/state/hcrlhf")


def test_where_there_is_no_home_the_ledger_goes_without(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unknown(user: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {user}")

    for name in ("HCRLHF_STATE_DIR", "XDG_STATE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)  # a container under a user id of its own
    assert ledgers.state_directory() is None
    ledger = ledgers.read(full_life(path))
    assert ledgers.remembered_head(ledger.identity) is None
    assert main(["ledger", str(path)]) == PASSED
    path.unlink()
    ledgers.refuse_vanished(path)
    assert main(["ledger", str(path), "--forget"]) == PASSED
    assert "this machine knows no ledger there" in capsys.readouterr().out


# -- several processes -----------------------------------------------------------------------------

OPENER = """
import sys
from pathlib import Path
from hcrlhf import ledger as ledgers
from hcrlhf.hashing import sha256

path, name = Path(sys.argv[1]), sys.argv[2]
input()  # all begin at once
for i in range(6):
    with ledgers.locked(path, 0.1, "halving") as ledger:
        ledger = ledgers.open_test(ledger, f"plan {name} {i}", [sha256(name, str(i))])
        print(ledger.tests[-1].number, flush=True)
"""


def python(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_processes_that_open_tests_at_once_get_different_numbers(path: Path) -> None:
    processes = [python(OPENER, str(path), name) for name in "abcd"]
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    numbers = [int(n) for process in processes for n in process.communicate(timeout=60)[0].split()]
    assert all(process.returncode == 0 for process in processes)
    assert sorted(numbers) == list(range(1, 25))
    ledger = ledgers.read(path)
    assert [len(test.prompts) for test in ledger.tests] == [1] * 24
    assert len(ledger.spent()) == 24
    assert ledgers.remembered_head(ledger.identity) == ledger.head


RUNNER = """
import sys
from pathlib import Path
from hcrlhf import ledger as ledgers
with ledgers.running(ledgers.read(Path(sys.argv[1])), 1):
    print("running", flush=True)
    input()
"""


def test_a_test_that_another_process_runs_is_refused_and_free_when_that_ends(path: Path) -> None:
    open_one(path, "one", keys(1))
    open_one(path, "two", keys(2))
    ledger = ledgers.read(path)
    process = python(RUNNER, str(path))
    assert process.stdout and process.stdout.readline() == "running\n"
    with (
        pytest.raises(InputError, match=f"another process is running test 1 of {path}"),
        ledgers.running(ledger, 1),
    ):
        pass
    with ledgers.running(ledger, 2):  # another test may run
        pass
    process.communicate("\n", timeout=60)
    with ledgers.running(ledger, 1):
        pass


def test_a_process_that_was_killed_leaves_its_test_free(path: Path) -> None:
    open_one(path, "one", keys(1))
    process = python(RUNNER, str(path))
    assert process.stdout and process.stdout.readline() == "running\n"
    process.kill()
    process.communicate(timeout=60)
    with ledgers.running(ledgers.read(path), 1):
        pass


def test_two_processes_cannot_run_a_test_while_a_third_lets_it_go(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_one(path, "one", keys(1))
    ledger = ledgers.read(path)
    unlink = Path.unlink

    def late(self: Path, missing_ok: bool = False) -> None:
        monkeypatch.setattr(Path, "unlink", unlink)
        with pytest.raises(InputError, match="another process"), ledgers.running(ledger, 1):
            pass  # while the first lets go
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", late)
    with ledgers.running(ledger, 1):
        pass
    with (
        ledgers.running(ledger, 1),
        pytest.raises(InputError, match="another process"),
        ledgers.running(ledger, 1),
    ):
        pass


def test_a_line_that_another_run_adds_during_a_look_is_no_missing_tail(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_life(path)
    read_bytes, read_state = Path.read_bytes, ledgers._read_state
    waiting = ["plan four"]

    def other_run() -> None:
        if waiting:
            open_one(path, waiting.pop(), keys(6))

    def bytes_and_then(self: Path) -> bytes:
        content = read_bytes(self)
        if self == path:
            other_run()
        return content

    def state_and_then(state: Path | None) -> dict[str, dict[str, Any]]:
        heads = read_state(state)
        other_run()
        return heads

    # Whichever of the two is read first, the other run writes between them.
    monkeypatch.setattr(Path, "read_bytes", bytes_and_then)
    monkeypatch.setattr(ledgers, "_read_state", state_and_then)
    ledger = ledgers.read(path)
    assert not waiting
    assert [test.number for test in ledger.tests] == [1, 2, 3, 4]
    path.write_bytes(b"".join(read_bytes(path).splitlines(keepends=True)[:-1]))
    with pytest.raises(InputError, match="its tail is missing"):
        ledgers.read(path)


# -- links -----------------------------------------------------------------------------------------


@pytest.fixture
def link(path: Path, tmp_path: Path) -> Path:
    """A link to a ledger with tests of every kind, by way of another link."""
    full_life(path)
    (tmp_path / "between.jsonl").symlink_to(path)
    (tmp_path / "linked.jsonl").symlink_to("between.jsonl")
    return tmp_path / "linked.jsonl"


def test_who_comes_by_a_link_meets_the_same_locks(
    path: Path, link: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Path] = []
    acquire = FileLock.acquire

    def watched(self: FileLock, *arguments: Any, **options: Any) -> Any:
        taken.append(Path(self.lock_file))
        return acquire(self, *arguments, **options)

    monkeypatch.setattr(FileLock, "acquire", watched)
    with ledgers.locked(link, DELTA, "halving"):
        pass
    ledgers.drop_torn_line(link)
    of_the_ledger = [lock for lock in taken if "ledgers.json" not in lock.name]
    assert set(of_the_ledger) == {path.with_name(".ledger.jsonl.lock")}
    with (
        ledgers.running(ledgers.read(path), 3),
        pytest.raises(InputError, match="another process is running test 3"),
        ledgers.running(ledgers.read(link), 3),
    ):
        pass


def test_what_is_written_through_a_link_goes_into_the_ledger_itself(path: Path, link: Path) -> None:
    assert open_one(link, "plan four", keys(6)) == 4
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind')
    assert main(["ledger", str(link), "--drop-torn-line"]) == PASSED
    assert link.is_symlink() and not path.is_symlink()
    assert path.read_bytes() == whole


def test_a_link_whose_ledger_is_yet_to_be_made_leads_to_it(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "linked.jsonl"
    link.symlink_to(path)  # in a folder that is not there
    assert open_one(link, "plan one", keys(1)) == 1
    assert link.is_symlink() and len(ledgers.read(path).tests) == 1


def test_a_link_to_itself_is_no_ledger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    link = tmp_path / "linked.jsonl"
    link.symlink_to(link)
    assert main(["ledger", str(link)]) == BAD_INPUT
    assert capsys.readouterr().err.count("\n") == 1


# -- the command -----------------------------------------------------------------------------------


def test_the_command_lists_tests_and_what_is_left(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ledger", str(full_life(path))]) == PASSED
    lines = capsys.readouterr().out.splitlines()
    assert "δ = 0.1 by schedule halving, 9 lines" in lines[0]
    assert lines[1:] == [
        "  test 1: pass, burnt; 3 prompts, δ = 0.05",
        "  test 2: no solution found, burnt; 1 prompts, δ = 0.025",
        "  test 3: open, spent; 1 prompts, δ = 0.0125",
        "the next test is granted δ = 0.00625",
    ]


def test_the_command_says_when_nothing_is_left(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_one(path, "one", keys(1), "once")
    assert main(["ledger", str(path)]) == PASSED
    assert capsys.readouterr().out.endswith("nothing of δ is left\n")


def test_a_missing_empty_or_damaged_ledger_is_bad_input_in_one_line(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = full_life(path).read_bytes()
    for damaged in (b"", content[:-3], content[3:], content.replace(b"halving", b"halvinG", 1)):
        path.write_bytes(damaged)
        assert main(["ledger", str(path)]) == BAD_INPUT
        assert capsys.readouterr().err.count("\n") == 1
    for missing in (path.with_name("missing.jsonl"), path.parent):
        assert main(["ledger", str(missing)]) == BAD_INPUT
        assert capsys.readouterr().err.count("\n") == 1


def test_what_this_machine_remembers_may_be_damaged(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    for content in ('{"a": {"path": 3}}', '{"a": 1}', "[1]", "{", '{"a": {"path": "/x"}}'):
        (state / "ledgers.json").write_text(content)
        with ledgers.locked(tmp_path / "ledger.jsonl", 0.05, "once", state) as ledger:
            assert ledger.delta == 0.05
        assert ledgers.remembered_head(ledger.identity, state) == ledger.head
