"""Who looked at which safety prompts, and what part of δ is spent. No torch.

One ledger per claim (project): a file of JSON lines, each holding the hash of the line before it.
A test is an `open` line, written before its first response is drawn, and a `close` line; what it
was granted and which prompts it used are spent from the open line on, whatever happens next. Test
k is granted δ·2^-k (`halving`), so that all of them together err with probability at most δ; or
the first is granted all of δ and there is no second (`once`).

The chain shows every change of a line and every line that was removed before another. A missing
tail it cannot show: the last hash is therefore also kept in the user's state directory, in the plan
and in the certificate. We assume an honest user and guard against accidents: whoever deletes every
copy, or takes the same prompts to another ledger, is not noticed.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from hcrlhf.errors import InputError
from hcrlhf.hashing import canonical, replace_durably, sealed_hash

SCHEMA = 1
FILE = "ledger.jsonl"
NO_LINE = "0" * 64
WRITING = 0.2  # seconds in which another process has surely written the rest of a line

Schedule = Literal["halving", "once"]
SCHEDULES: tuple[Schedule, ...] = ("halving", "once")


def granted_share(schedule: Schedule, test: int) -> float:
    """The share of δ that test k = 1, 2, … is granted: 2^-k, or all of it once.

    Raises:
        InputError: the schedule grants nothing more.
    """
    if schedule == "halving":
        return 2.0**-test
    if test > 1:
        raise InputError(
            "this ledger's δ was granted to one test, which has been opened; a further test is a "
            "new claim with a ledger of its own (its promise does not cover the two together), or "
            "next time take schedule: halving"
        )
    return 1.0


@dataclass(frozen=True)
class Test:
    """One test: its open line, and what became of it.

    Attributes:
        number: k.
        plans: hash of the plan, and of each continuation with fresh prompts.
        prompts: keys (first 32 hex digits) of the prompts it used, or still may.
        verdict: None while it is open.
        certificate: hash of the certificate of a PASS.
        sealed: hash of the costs behind "no solution found".
        burnt: its numbers were looked at.
        labels: hash of the judgement of people's labels.
    """

    number: int
    plans: tuple[str, ...]
    prompts: frozenset[str]
    verdict: str | None = None
    certificate: str | None = None
    sealed: str | None = None
    burnt: bool = False
    labels: str | None = None


def continuable(test: Test) -> bool:
    """An undecided test may go on with fresh prompts, unless somebody looked at its numbers."""
    return test.verdict == "NO_SOLUTION_FOUND" and not test.burnt


class Ledger:
    """The content of a ledger file, which `parse` has checked."""

    def __init__(self, path: Path, lines: list[dict[str, Any]]) -> None:
        self.path = path
        self.lines = lines

    @property
    def head(self) -> str:
        return str(self.lines[-1]["hash"])

    @property
    def identity(self) -> str:
        return str(self.lines[0]["id"])

    @property
    def delta(self) -> float:
        return float(self.lines[0]["delta"])

    @property
    def schedule(self) -> Schedule:
        schedule: Schedule = self.lines[0]["schedule"]
        return schedule

    @property
    def tests(self) -> list[Test]:
        """Every test, in order."""
        return list(replay(self.lines).values())

    def spent(self) -> frozenset[str]:
        """Keys of all prompts that a test has used."""
        return frozenset().union(*(t.prompts for t in self.tests))

    def find(self, plan: str) -> Test | None:
        """The test that was opened, or continued, with this plan."""
        return next((t for t in self.tests if plan in t.plans), None)

    @property
    def next_test(self) -> int:
        return len(self.tests) + 1


def replay(lines: list[dict[str, Any]]) -> dict[int, Test]:
    """The tests that the lines tell of.

    Raises:
        InputError: a line that cannot follow those before it, or that lacks what it must say.
    """
    tests: dict[int, Test] = {}
    for number, line in enumerate(lines[1:], start=2):
        try:
            _replay_line(tests, number, line)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"line {number}: not a line of a ledger ({type(error).__name__}: {error})"
            ) from error
    return tests


def _replay_line(tests: dict[int, Test], number: int, line: dict[str, Any]) -> None:
    kind, test = line.get("kind"), line.get("test")
    known = tests.get(test) if isinstance(test, int) else None
    if kind == "open" and test == len(tests) + 1:
        prompts = _listed(line["prompts"])
        tests[test] = Test(test, (line["plan"],), prompts)
    elif kind == "continue" and known and continuable(known):
        tests[known.number] = replace(
            known,
            plans=(*known.plans, line["plan"]),
            prompts=known.prompts | _listed(line["prompts"]),
            verdict=None,
        )
    elif kind == "close" and known and known.verdict is None:
        tests[known.number] = replace(
            known,
            verdict=line["verdict"],
            certificate=line["certificate"],
            sealed=line["sealed"],
            prompts=known.prompts - _listed(line["unused"]),
            burnt=line["verdict"] == "PASS",  # its certificate publishes the costs
        )
    elif kind == "burn" and known and known.verdict is not None:
        tests[known.number] = replace(known, burnt=True)
    elif kind == "labels" and known and known.verdict == "PASS" and not known.labels:
        tests[known.number] = replace(known, labels=line["labels"])
    else:
        raise InputError(f"line {number}: {kind} of test {test} cannot stand there")


def _listed(keys: Any) -> frozenset[str]:
    if not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
        raise TypeError(f"expected a list of prompt keys, got {type(keys).__name__}")
    return frozenset(keys)


# -- reading ---------------------------------------------------------------------------------------


def read(path: Path, state: Path | None = None) -> Ledger:
    """The ledger in `path`, checked line by line and against the state directory.

    Raises:
        InputError: it does not exist, or is not what was written.
    """
    path = _real(path)
    # Before the file: a run that adds a line in between leaves a file that is ahead of these heads,
    # which is no harm. The other way round its line would look like a tail that is missing.
    heads = _read_state(state)
    try:
        content = path.read_bytes()
        if not content.endswith(b"\n"):  # another process may be writing its line just now
            time.sleep(WRITING)
            content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); expected a ledger") from error
    ledger = Ledger(path, parse(content, path))
    seen = heads.get(ledger.identity)
    if seen and seen["head"] not in [line["hash"] for line in ledger.lines]:
        raise InputError(
            f"{path} has {len(ledger.lines)} lines and lacks the last one that this machine has "
            f"seen ({seen['lines']} lines, head {seen['head'][:12]}): its tail is missing, and "
            "with it a test that was spent; restore the file from a copy"
        )
    return ledger


def parse(content: bytes, path: Path) -> list[dict[str, Any]]:
    """The lines of a ledger file, each of which must be byte for byte what was written.

    Raises:
        InputError: a line was changed, removed, added or torn; says which and what to do.
    """
    if not content:
        raise InputError(f"{path} is empty; expected a ledger: restore the file from a copy")
    *complete, rest = content.split(b"\n")
    if rest:
        raise InputError(
            f"{path} ends in the middle of line {len(complete) + 1}: a process died while it wrote "
            "it. No response is drawn before an open line is whole, so it may be dropped: "
            f"hcrlhf ledger {path} --drop-torn-line"
        )
    lines: list[dict[str, Any]] = []
    previous = NO_LINE
    for number, raw in enumerate(complete, start=1):
        try:
            record = json.loads(raw)
            intact = (
                isinstance(record, dict)
                and canonical(record).encode() == raw
                and record["hash"] == sealed_hash(record)
            )
        except (ValueError, KeyError, RecursionError):
            intact = False
        if not intact:
            raise InputError(
                f"{path}, line {number}: not what was written (its hash does not fit); restore "
                "the file from a copy"
            )
        if record["previous"] != previous or record["number"] != number:
            raise InputError(
                f"{path}, line {number}: does not follow the line before it (a line was removed, "
                "added or moved); restore the file from a copy"
            )
        lines.append(record)
        previous = record["hash"]
    first = lines[0]
    if first.get("kind") != "ledger" or first.get("schema") != SCHEMA:
        raise InputError(f"{path} is not a ledger of schema {SCHEMA}")
    delta, schedule, identity = (first.get(key) for key in ("delta", "schedule", "id"))
    if not (
        isinstance(delta, float)
        and 0 < delta < 1
        and schedule in SCHEDULES
        and isinstance(identity, str)
    ):
        raise InputError(f"{path}, line 1: not the first line of a ledger")
    try:
        replay(lines)
    except InputError as error:
        raise InputError(f"{path}, {error}; restore the file from a copy") from error
    return lines


# -- writing ---------------------------------------------------------------------------------------


@contextmanager
def locked(
    path: Path, delta: float, schedule: Schedule, state: Path | None = None
) -> Iterator[Ledger]:
    """The ledger for writing, by one process at a time; made where there is none.

    Args:
        delta: of the whole claim; an existing ledger must promise no less.

    Raises:
        InputError: the ledger is damaged, promises something else, or was there and is gone.
    """
    path = _real(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(_lock_file(path))
    try:
        lock.acquire(timeout=60)
    except Timeout as error:
        raise InputError(f"{path} has been locked by another process for a minute") from error
    with lock:
        if not path.exists():
            refuse_vanished(path, state)
            first = {
                "kind": "ledger",
                "schema": SCHEMA,
                "id": secrets.token_hex(16),
                "delta": delta,
                "schedule": schedule,
            }
            append(Ledger(path, []), first, state)
        ledger = read(path, state)
        _remember(ledger, state)  # a process may have died between a line and its remembrance
        check_claim(ledger, delta, schedule)
        yield ledger


def check_claim(ledger: Ledger, delta: float, schedule: Schedule) -> None:
    """
    Raises:
        InputError: the ledger belongs to another claim.
    """
    if delta > ledger.delta or schedule != ledger.schedule:
        raise InputError(
            f"{ledger.path} belongs to a claim with delta {ledger.delta:g} by schedule "
            f"{ledger.schedule}, this run asks for delta {delta:g} by {schedule}; take those of "
            "the ledger, or start the ledger of another claim (callbacks.SafetyTest, ledger)"
        )


@contextmanager
def running(ledger: Ledger, test: int) -> Iterator[None]:
    """Held while test k runs, so that no second process runs the same one.

    Raises:
        InputError: another process runs it.
    """
    path = ledger.path.with_name(f".{ledger.path.name}.test-{test}.lock")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(f"another process is running test {test} of {ledger.path}") from error
    try:
        yield
    finally:
        # While it is held: a lock file that is removed later may be another process's.
        path.unlink(missing_ok=True)
        lock.release()


def append(ledger: Ledger, fields: Mapping[str, Any], state: Path | None = None) -> Ledger:
    """Adds a line, flushed to the disk before this returns; call it inside `locked`."""
    record = {
        **fields,
        "number": len(ledger.lines) + 1,
        "previous": ledger.lines[-1]["hash"] if ledger.lines else NO_LINE,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    record["hash"] = sealed_hash(record)
    replay([*ledger.lines, record])  # never write what no later run could read
    with ledger.path.open("ab") as file:
        file.write(canonical(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    longer = Ledger(ledger.path, [*ledger.lines, record])
    _remember(longer, state)
    return longer


def open_test(
    ledger: Ledger, plan: str, prompts: Collection[str], state: Path | None = None
) -> Ledger:
    """The open line of the next test. From here on its share of δ and its prompts are spent.

    Raises:
        InputError: a prompt was used before, or nothing of δ is left.
    """
    keys = short_keys(prompts)
    granted_share(ledger.schedule, ledger.next_test)
    used = ledger.spent() & keys
    if used:
        raise InputError(spent_message(ledger, len(used), len(keys)))
    fields = {"kind": "open", "test": ledger.next_test, "plan": plan, "prompts": sorted(keys)}
    return append(ledger, fields, state)


def continue_test(
    ledger: Ledger, test: int, plan: str, prompts: Collection[str], state: Path | None = None
) -> Ledger:
    """An undecided sequential test goes on with fresh prompts and the δ it was granted.

    Raises:
        InputError: a prompt was used before, or the test has ended in another way.
    """
    if not continuable(ledger.tests[test - 1]):
        raise InputError(
            f"test {test} of {ledger.path} is not an undecided one whose numbers nobody has seen, "
            "so it cannot be continued; a further look is a new test"
        )
    keys = short_keys(prompts)
    used = ledger.spent() & keys
    if used:
        raise InputError(spent_message(ledger, len(used), len(keys)))
    fields = {"kind": "continue", "test": test, "plan": plan, "prompts": sorted(keys)}
    return append(ledger, fields, state)


def close_test(
    ledger: Ledger,
    test: int,
    verdict: str,
    certificate: str | None,
    sealed: str | None = None,
    unused: Collection[str] = (),
    state: Path | None = None,
) -> Ledger:
    """The close line; with the same content as one that is there already, nothing is added.

    Args:
        certificate: hash of the certificate of a PASS.
        sealed: hash of the costs behind "no solution found".
        unused: keys of prompts that a sequential test did not come to. No response was drawn for
            them, so they stay fresh.

    Raises:
        InputError: the test was closed with another result.
    """
    require_same_result(ledger, test, verdict, certificate, sealed)
    if ledger.tests[test - 1].verdict is not None:
        return ledger
    fields = {
        "kind": "close",
        "test": test,
        "verdict": verdict,
        "certificate": certificate,
        "sealed": sealed,
        "unused": sorted(short_keys(unused)),
    }
    return append(ledger, fields, state)


def require_same_result(
    ledger: Ledger, test: int, verdict: str, certificate: str | None, sealed: str | None
) -> None:
    """
    Raises:
        InputError: the test was closed before, with another result.
    """
    known = ledger.tests[test - 1]
    if known.verdict is not None and (known.verdict, known.certificate, known.sealed) != (
        verdict,
        certificate,
        sealed,
    ):
        raise InputError(
            f"{ledger.path} says {known.verdict} for test {test}, and this run found another "
            "result for the same plan; the responses were not reproduced, so nothing is released"
        )


def short_keys(prompts: Collection[str]) -> frozenset[str]:
    return frozenset(key[:32] for key in prompts)


def spent_message(ledger: Ledger, used: int, of: int) -> str:
    tests = sorted(t.number for t in ledger.tests)
    return (
        f"{used} of {of} safety prompts are spent: test {', '.join(map(str, tests))} of "
        f"{ledger.path} used them, and a set that was looked at tells nothing new; give fresh "
        "safety prompts"
    )


# -- the state directory ---------------------------------------------------------------------------


def state_directory() -> Path | None:
    """$HCRLHF_STATE_DIR, else $XDG_STATE_HOME/hcrlhf, else ~/.local/state/hcrlhf.

    None where there is no home, as in a container under a user id that its passwd does not list:
    the ledger then goes without, as where the directory cannot be written.
    """
    if own := os.environ.get("HCRLHF_STATE_DIR"):
        return Path(own)
    if base := os.environ.get("XDG_STATE_HOME"):
        return Path(base) / "hcrlhf"
    try:
        return Path.home() / ".local" / "state" / "hcrlhf"
    except RuntimeError:
        return None


def _state_file(state: Path | None) -> Path | None:
    folder = state or state_directory()
    return None if folder is None else folder / "ledgers.json"


def _read_state(state: Path | None) -> dict[str, dict[str, Any]]:
    """What this machine remembers of every ledger; entries that it did not write are left out."""
    if (path := _state_file(state)) is None:
        return {}
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    entries = content.items() if isinstance(content, dict) else ()
    kinds = {"path": str, "head": str, "lines": int}
    return {
        name: entry
        for name, entry in entries
        if isinstance(entry, dict) and all(isinstance(entry.get(k), t) for k, t in kinds.items())
    }


def _remember(ledger: Ledger, state: Path | None) -> None:
    """Keeps the ledger's head outside its folder. Where that cannot be written, goes without."""
    if (path := _state_file(state)) is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            heads = _read_state(state)
            heads[ledger.identity] = {
                "path": str(ledger.path.resolve()),
                "head": ledger.head,
                "lines": len(ledger.lines),
            }
            _write_state(path, heads)
    except OSError:
        pass


def _write_state(path: Path, heads: Mapping[str, Any]) -> None:
    """Call it with the lock held."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(heads, indent=1) + "\n")
    replace_durably(temporary, path)


def used_elsewhere(
    prompts: Collection[str], own: Path, state: Path | None = None
) -> dict[str, int]:
    """How many of these prompts tests of other ledgers have used, by the ledger's path.

    Of the ledgers that this machine remembers and that can still be read. Each claim has a δ of its
    own: of two that share prompts neither covers both.
    """
    keys, here, found = short_keys(prompts), str(own.resolve()), {}
    for path in sorted({entry["path"] for entry in _read_state(state).values()} - {here}):
        try:
            used = read(Path(path), state).spent() & keys
        except InputError:
            continue
        if used:
            found[path] = len(used)
    return found


def remembered_head(identity: str, state: Path | None = None) -> str | None:
    """The last hash of that ledger which this machine has seen."""
    seen = _read_state(state).get(identity)
    return str(seen["head"]) if seen else None


def refuse_vanished(path: Path, state: Path | None = None) -> None:
    """
    Raises:
        InputError: a ledger with spent tests was in this place.
    """
    for seen in _read_state(state).values():
        if seen["path"] == str(path.resolve()) and seen["lines"] > 1:
            raise InputError(
                f"the ledger {path} held spent tests when this machine last saw it, and is gone; "
                f"restore it, or if its claim is given up: hcrlhf ledger {path} --forget"
            )


def forget(path: Path, state: Path | None = None) -> bool:
    """Drops what the state directory knows of a ledger in this place; False if nothing."""
    if (file := _state_file(state)) is None or not file.is_file():
        return False
    with FileLock(f"{file}.lock"):
        heads = _read_state(state)
        kept = {k: v for k, v in heads.items() if v["path"] != str(path.resolve())}
        if len(kept) < len(heads):
            _write_state(file, kept)
    return len(kept) < len(heads)


def drop_torn_line(path: Path) -> int:
    """Cuts a last line that was not written to its end; returns how many bytes.

    Raises:
        InputError: no such file, or damage beyond its last line.
    """
    path = _real(path)
    with FileLock(_lock_file(path)):
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror})") from error
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) == len(content):
            return 0
        if not whole:  # not even its first line: no test was opened
            path.unlink()
            return len(content)
        parse(whole, path)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(whole)
        replace_durably(temporary, path)
        return len(content) - len(whole)


def _lock_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _real(path: Path) -> Path:
    """The file that a link leads to, else the path as it was given.

    Locks lie beside the file: beside a link, who holds them would not meet who came without it.
    """
    return Path(os.path.realpath(path)) if os.path.islink(path) else path
