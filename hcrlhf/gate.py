"""The one way to a verdict: ledger, plan, costs, decision, release. No torch, no Lightning.

`Gate.grant` is asked before training (what δ this run will get, whether there are enough fresh
prompts), `Gate.test` afterwards. In between lies whatever draws responses and scores them: a
language model through callbacks.SafetyTest, a table of numbers in a study of the promise itself.

Everything that happens survives a crash: the open line of the ledger stands before the first
response, costs are written batch by batch, and a run that comes back with the same plan goes on
where the broken one was. Any other run finds its δ and its prompts spent.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hcrlhf import certificate as cert
from hcrlhf import ledger as ledgers
from hcrlhf.constraint import Constraint, Judgement, require_etas, with_etas
from hcrlhf.errors import InputError
from hcrlhf.hashing import (
    json_hash,
    read_json,
    require_writable,
    set_hash,
    write_json,
    write_text,
)
from hcrlhf.human import FORM_FILE, HumanLabels, committed, form_rows, write_form
from hcrlhf.ledger import FILE as LEDGER_FILE
from hcrlhf.ledger import Ledger, Schedule, Test
from hcrlhf.safety import CostSamples

PARTIAL_FILE, SEALED_FILE, RESPONSES_FILE = "sealed.partial.jsonl", "sealed.json", "responses.jsonl"


@dataclass(frozen=True)
class Population:
    """The prompts that a test may draw from, and what they were compared with.

    Attributes:
        keys: every different prompt of the safety set that fits.
        left_out: how many were too long.
        compared_with: names of other sets of prompts -> how many keys; none overlaps.
        source: the name of the file, for people.
    """

    keys: Sequence[str]
    left_out: int = 0
    compared_with: Mapping[str, int] = field(default_factory=dict)
    source: str = ""

    def describe(self, fresh: int) -> dict[str, Any]:
        return {
            "source": self.source,
            "pool": len(self.keys),
            "pool_hash": set_hash(self.keys),
            "fresh": fresh,
            "left_out_too_long": self.left_out,
            "disjoint_from": dict(self.compared_with),
        }


@dataclass(frozen=True)
class Gate:
    """Where a run keeps its ledger, and how its safety test stops.

    Args:
        folder: the run's folder.
        ledger: the claim's ledger file.
        schedule: "halving": test k is granted δ·2^-k. "once": the first test is granted all of δ,
            and there is no second.
        sequential: look after every batch, and stop as soon as every e-process has decided.
        continues: folder of a run whose sequential test was undecided; this one goes on with
            fresh prompts.
        human: labels by people that the plan commits to; None claims nothing about people.
        state: the state directory; None takes the user's.
    """

    folder: Path
    ledger: Path
    schedule: Schedule = "halving"
    sequential: bool = False
    continues: Path | None = None
    human: HumanLabels | None = None
    state: Path | None = None

    @staticmethod
    def configured(
        folder: Path,
        ledger: str | None = None,
        schedule: Schedule = "halving",
        sequential: bool = False,
        continues: str | None = None,
        human: HumanLabels | None = None,
    ) -> Gate:
        """The gate of the run in `folder`, by the options of its `callbacks.SafetyTest`."""
        # The parent of "." is "." and a linked folder's is where the link lies.
        beside = Path(os.path.abspath(folder)).parent / LEDGER_FILE
        path = Path(ledger).expanduser() if ledger else beside
        earlier = Path(continues).expanduser() if continues else None
        return Gate(folder, path, schedule, sequential, earlier, human)

    # -- before training -----------------------------------------------------------------------

    def grant(self, constraints: Sequence[Constraint]) -> tuple[Constraint, ...]:
        """The constraints with the δ that this run's test will be granted as things stand.

        Raises:
            InputError: nothing is left of δ, the ledger is damaged, cannot be written or belongs to
                another claim, or the constraints cannot be judged in this mode.
        """
        require_writable(self.ledger.parent, "callbacks.SafetyTest, ledger")
        if self.ledger.exists() and not os.access(self.ledger, os.W_OK):
            raise InputError(f"the ledger {self.ledger} is not yours to write to")
        sizes = {c.safety_prompts for c in constraints}
        if len(sizes) > 1:
            raise InputError(
                f"the constraints name different numbers of safety prompts {sorted(sizes)}; one "
                "test draws one set, so give all the same"
            )
        if self.human is not None:
            if self.sequential:
                raise InputError(
                    "a sequential test stops where its costs say so, which leaves no random subset "
                    "for human labels; set sequential: false"
                )
            self.human.check(constraints[0].safety_prompts)
        if self.continues is not None:
            number = self._earlier(self._read()).test.number
        elif (ledger := self._read()) is None:
            number = 1
        else:
            begun = self._begun(ledger)
            number = begun.number if begun else ledger.next_test
            ledgers.check_claim(ledger, _delta(constraints), self.schedule)
        return self._granted(constraints, number)

    def _granted(self, constraints: Sequence[Constraint], number: int) -> tuple[Constraint, ...]:
        share = ledgers.granted_share(self.schedule, number)
        if self.human is not None:
            self.human.granted(share)  # refuses a limit that so many labels cannot show
        mode = [c.sequential() if self.sequential else c for c in constraints]
        return tuple(c.granted(c.delta * share) for c in mode)

    def _read(self) -> Ledger | None:
        if self.ledger.exists():
            return ledgers.read(self.ledger, self.state)
        ledgers.refuse_vanished(self.ledger, self.state)
        return None

    def has_begun(self) -> bool:
        """Whether this folder's plan stands in the ledger: its test was opened, if not ended."""
        ledger = self._read()
        return ledger is not None and self._begun(ledger) is not None

    def _begun(self, ledger: Ledger) -> Test | None:
        """The test that this folder's plan opened, which a resumed run would go on with."""
        try:
            return ledger.find(json_hash(read_json(self.folder / cert.PLAN_FILE)))
        except (OSError, ValueError):
            return None

    def require_fresh(self, population: Population, needed: int) -> None:
        """
        Raises:
            InputError: fewer fresh prompts than a test needs.
        """
        ledger = self._read()
        spent = ledger.spent() if ledger and not self.has_begun() else frozenset()
        _fresh_prompts(population, spent, needed, self.ledger)

    def used_elsewhere(self, population: Population) -> dict[str, int]:
        """`ledgers.used_elsewhere` of the safety set."""
        return ledgers.used_elsewhere(population.keys, self.ledger, self.state)

    # -- the test ------------------------------------------------------------------------------

    @contextmanager
    def test(
        self,
        constraints: Sequence[Constraint],
        population: Population,
        policy_files: Mapping[str, str],
        provenance: Mapping[str, Any],
        training_costs: Sequence[float] = (),
        keep_other: bool = False,
    ) -> Iterator[SafetyTrial]:
        """Opens this plan's test in the ledger, or goes on with it where it is open already.

        Args:
            constraints: as configured, δ of the whole claim.
            policy_files: SHA-256 of every file of the policy.
            training_costs: from which an η is taken that is not configured, for the δ that is
                granted.
            keep_other: refuse to put this plan in the place of another test's.

        Raises:
            InputError: δ or prompts are spent, an η is missing, or another process runs this test.
        """
        if not training_costs:
            require_etas(constraints)
        asked = _Asked(constraints, population, policy_files, provenance, training_costs)
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            with ledgers.locked(
                self.ledger, _delta(constraints), self.schedule, self.state
            ) as ledger:
                earlier = self._earlier(ledger) if self.continues else None
                planned = self._known(ledger, earlier, asked)
                if planned is None:
                    if keep_other:
                        self._refuse_another_plan(ledger)
                    number = earlier.test.number if earlier else ledger.next_test
                    planned = self._plan(ledger, number, earlier, asked)
                    arguments = (json_hash(planned.plan), planned.order, self.state)
                    # Before the ledger's line: who finds that line has to find the plan it names.
                    write_json(self.folder / cert.PLAN_FILE, planned.plan)
                    if earlier:
                        ledger = ledgers.continue_test(ledger, number, *arguments)
                    else:
                        ledger = ledgers.open_test(ledger, *arguments)
                held.enter_context(ledgers.running(ledger, planned.plan["ledger"]["test"]))
                write_json(self.folder / cert.PLAN_FILE, planned.plan)
            yield SafetyTrial(self, planned, earlier, ledger)

    def _known(self, ledger: Ledger, earlier: _Earlier | None, asked: _Asked) -> _Planned | None:
        """This run's plan as an earlier attempt wrote it, if its test is still to be finished.

        A test that was closed is finished here only if this folder began it: the same policy in
        another folder is a new test with fresh prompts.
        """
        begun = self._begun(ledger)
        for line in reversed(ledger.lines[1:]):
            if line["kind"] not in ("open", "continue"):
                continue
            test = ledger.tests[line["test"] - 1]
            if test.verdict is not None and test != begun:
                continue
            before = Ledger(ledger.path, ledger.lines[: line["number"] - 1])
            try:
                planned = self._plan(before, line["test"], earlier, asked)
            except InputError:
                continue  # not enough fresh prompts then: it was not this plan
            if json_hash(planned.plan) == line["plan"]:
                return planned
        return None

    def _refuse_another_plan(self, ledger: Ledger) -> None:
        """
        Raises:
            InputError: the folder holds the plan of another test, which would be written over.
        """
        if (begun := self._begun(ledger)) is not None:
            raise InputError(
                f"{self.folder} holds the plan of test {begun.number} of {self.ledger}, which was "
                "for another policy, other limits or other settings; end that one by the command "
                "that began it, and run this one in another folder"
            )

    def _plan(
        self, ledger: Ledger, number: int, earlier: _Earlier | None, asked: _Asked
    ) -> _Planned:
        """The plan of test `number`, on the ledger as it stands before the test's own line."""
        granted = with_etas(self._granted(asked.constraints, number), asked.training_costs)
        share = ledgers.granted_share(self.schedule, number)
        human = self.human.granted(share) if self.human else None
        for constraint in granted:
            constraint.ready()
        needed = granted[0].safety_prompts
        fresh = _fresh_prompts(asked.population, ledger.spent(), needed, self.ledger)
        chosen = cert.choose(fresh, needed)
        plan = cert.make_plan(
            granted,
            asked.policy_files,
            chosen,
            asked.population.describe(len(fresh)),
            {
                "id": ledger.identity,
                "test": number,
                "head": ledger.head,
                "schedule": ledger.schedule,
                "delta": ledger.delta,
            },
            asked.provenance,
            self.sequential,
            json_hash(earlier.plans[-1]) if earlier else None,
            human.describe() if human else None,
        )
        if earlier:
            earlier.require_same(plan)
        seed = cert.response_seed_text(
            plan["policy"]["weights"], plan["safety_set"]["hash"], number
        )
        return _Planned(plan, granted, seed, cert.safety_order(chosen, seed))

    def _earlier(self, ledger: Ledger | None) -> _Earlier:
        """The undecided test that `continues` names.

        Raises:
            InputError: there is none, or it may not be continued.
        """
        assert self.continues is not None
        if not self.sequential:
            raise InputError("continues is for sequential tests; set sequential: true")
        path = self.continues / SEALED_FILE
        try:
            sealed = read_json(path)
            plans, parts = sealed["plans"], [(s, _samples(p)) for s, p in sealed["parts"]]
            hashes = [json_hash(plan) for plan in plans]
            last = plans[-1]
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise InputError(
                f"continues: {path} is not the sealed result of a test ({type(error).__name__}); "
                "expected the folder of a run whose sequential test was undecided"
            ) from error
        test = ledger.find(hashes[-1]) if ledger else None
        if test is None:
            raise InputError(f"continues: {self.ledger} does not know the test in {self.continues}")
        # All of its parts: one that is left out would take its evidence with it. The last may be
        # this run's own, which an earlier attempt opened.
        known = list(test.plans)
        if hashes != known and not (hashes == known[:-1] and test.verdict is None):
            raise InputError(
                f"continues: test {test.number} went on elsewhere after {self.continues}; name the "
                "folder of its last part"
            )
        if test.sealed != json_hash(sealed["parts"]):
            raise InputError(
                f"continues: {path} is not what the ledger says was sealed; restore it from a copy"
            )
        if last["stopping"] != cert.SEQUENTIAL_STOP:
            raise InputError(
                f"continues: the test in {self.continues} was for a fixed number of prompts, which "
                "may not be continued; a further look is a new test"
            )
        if test.burnt:
            raise InputError(
                f"continues: the numbers of test {test.number} were unsealed, so it is burnt; a "
                "further look is a new test"
            )
        return _Earlier(test, plans, parts)


def _fresh_prompts(
    population: Population, spent: frozenset[str], needed: int, ledger: Path
) -> list[str]:
    """The keys of the pool that no test has used.

    Raises:
        InputError: there are fewer than needed.
    """
    fresh = [key for key in population.keys if key[:32] not in spent]
    if len(fresh) >= needed:
        return fresh
    count, used = len(population.keys), len(population.keys) - len(fresh)
    if used:
        raise InputError(
            f"the safety set has {count} different prompts that fit, but {used} of them are spent "
            f"(tests in {ledger}), and the constraint's safety_prompts is {needed}; a set that was "
            "looked at tells nothing new: give fresh prompts"
        )
    raise InputError(
        f"the safety set has {count} different prompts that fit, but the constraint's "
        f"safety_prompts is {needed}; give more prompts, or lower it"
    )


def _delta(constraints: Sequence[Constraint]) -> float:
    return max(c.delta for c in constraints)


@dataclass(frozen=True)
class _Asked:
    constraints: Sequence[Constraint]
    population: Population
    policy_files: Mapping[str, str]
    provenance: Mapping[str, Any]
    training_costs: Sequence[float]


@dataclass(frozen=True)
class _Planned:
    plan: dict[str, Any]
    constraints: tuple[Constraint, ...]
    seed: str
    order: list[str]


@dataclass(frozen=True)
class _Earlier:
    """What an undecided test left: its plans, and the seed and samples of each of its parts."""

    test: Test
    plans: list[dict[str, Any]]
    parts: list[tuple[str, CostSamples]]

    def require_same(self, plan: Mapping[str, Any]) -> None:
        """
        Raises:
            InputError: policy, limits, scorers or decoding are not those of the undecided test.
        """
        before = self.plans[-1]
        plan = json.loads(json.dumps(plan))  # as it would be read: tuples are lists
        # Of the policy the weights: its other files name the backbone relative to their folder.
        pairs = {"policy": (before["policy"]["weights"], plan["policy"]["weights"])}
        pairs |= {n: (before[n], plan[n]) for n in ("constraints", "provenance", "stopping")}
        for name, (old, new) in pairs.items():
            if old != new:
                raise InputError(
                    f"continues: {name} differs from the undecided test's; only the same policy, "
                    "limits, cost model and decoding may go on with it"
                )


class SafetyTrial:
    """One open test: hands out prompts, takes costs, and ends in PASS or no solution found.

    Attributes:
        constraints: with the δ granted.
        seed: of every response, together with its prompt's key.
    """

    def __init__(
        self, gate: Gate, planned: _Planned, earlier: _Earlier | None, ledger: Ledger
    ) -> None:
        self.gate = gate
        self.plan = planned.plan
        self.plan_hash = json_hash(planned.plan)
        self.constraints = planned.constraints
        self.seed = planned.seed
        self.order = planned.order
        self.earlier = earlier
        self.ledger = ledger
        self._parts = _read_partial(self._partial, self.plan_hash, self.order)

    @property
    def _partial(self) -> Path:
        return self.gate.folder / PARTIAL_FILE

    @property
    def total(self) -> int:
        return len(self.order)

    @property
    def done(self) -> int:
        """How many prompts have been answered: all that may be shown while a test runs."""
        return sum(len(part.keys) for part in self._parts)

    def next(self, count: int) -> list[str]:
        """Keys of the next prompts to be answered; none once the test has ended."""
        if self.gate.sequential and self._parts and self._passes():
            return []
        return self.order[self.done : self.done + count]

    def record(self, part: CostSamples) -> None:
        """Takes the costs of the prompts that `next` handed out, and writes them down."""
        if list(part.keys) != self.order[self.done : self.done + len(part.keys)]:
            raise RuntimeError("these are not the prompts that the test handed out")
        new = not self._parts
        self._parts.append(part)
        with self._partial.open("w" if new else "a", encoding="utf-8") as file:
            if new:
                file.write(json.dumps({"plan": self.plan_hash}) + "\n")
            file.write(json.dumps(_record(part)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _drawn(self) -> list[tuple[str, CostSamples]]:
        """Seed and samples of every part in the order of the test, this run's own last."""
        before = self.earlier.parts if self.earlier else []
        return [*before, (self.seed, CostSamples.join(self._parts))]

    def _samples(self) -> CostSamples:
        return CostSamples.join([samples for _, samples in self._drawn()])

    def _passes(self) -> bool:
        return all(j.passed for j in self._judge())

    def _judge(self) -> list[Judgement]:
        """
        Raises:
            InputError: a cost lies outside its declared range; without saying which.
        """
        try:
            return cert.judge(self.constraints, self._samples())
        except InputError:
            # While the set is sealed not even an error text may carry a cost.
            raise InputError(
                "the safety test cannot be judged: a cost lies outside the range that its "
                "constraint declares, so the cap is not a fact of this cost model"
            ) from None

    def passed(self) -> bool:
        """The decision, once `next` has no more prompts to hand out."""
        return self._passes()

    # -- the end -------------------------------------------------------------------------------

    def fail(self) -> None:
        """No solution found: seals the numbers, closes the test."""
        parts = self._drawn()
        judgements = self._judge()
        written = [[seed, _record(samples)] for seed, samples in parts]
        sealed = json_hash(written)
        self._require_same_result("NO_SOLUTION_FOUND", None, sealed)
        write_json(
            self.gate.folder / SEALED_FILE,
            {
                "note": "the numbers of a test that was not passed; `hcrlhf unseal` shows them "
                "and marks the set as burnt in the ledger",
                "ledger": self._ledger_file(),
                "plans": self._plans(),
                "parts": written,
                "bounds": cert.describe_bounds(self.constraints, judgements),
            },
        )
        self._close("NO_SOLUTION_FOUND", None, sealed)

    def certify(
        self, texts: Mapping[str, str], package_versions: Mapping[str, str]
    ) -> dict[str, Any]:
        """PASS: writes certificate, page and responses, closes the test; returns the certificate.

        Args:
            texts: prompt key -> prompt, for the file of responses.

        Raises:
            RuntimeError: the costs do not pass.
        """
        samples = self._samples()
        parts = self._drawn()
        published = [cert.published_key(s, key) for s, part in parts for key in part.keys]
        rows = [
            {"prompt": p, "text": texts.get(key, ""), "response": t[0], "cost": float(c)}
            for p, key, t, c in zip(
                published, samples.keys, samples.responses, samples.costs[:, 0, 0], strict=True
            )
        ]
        line = next(x for x in self.ledger.lines if x.get("plan") == self.plan_hash)
        record = cert.make_certificate(
            self.constraints,
            samples,
            published,
            self.plan,
            {**self.plan["ledger"], "line": line["hash"], "file": self._ledger_file()},
            {
                "seeds": [[seed, len(part.keys)] for seed, part in parts],
                "responses_sha256": json_hash(rows),
                "earlier_plans": self._plans()[:-1],
            },
            package_versions,
        )
        if record["verdict"] != "PASS":
            raise RuntimeError("a certificate was asked for costs that do not pass")
        self._require_same_result("PASS", record["hash"], None)
        self._write_pass(record, rows)
        self._close("PASS", record["hash"], None)
        return record

    def _write_pass(self, record: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """Responses, the form for people if the plan asks for one, certificate and page."""
        folder = self.gate.folder
        write_text(folder / RESPONSES_FILE, "".join(json.dumps(row) + "\n" for row in rows))
        if self.plan["human"]:
            _, ids = committed(record)
            answered = {row["prompt"]: (row["text"], row["response"]) for row in rows}
            write_form(folder / FORM_FILE, form_rows(ids, answered))
        write_json(folder / cert.CERTIFICATE_FILE, record)
        write_text(folder / cert.PAGE_FILE, cert.certificate_page(record))

    def release(self) -> None:
        """Once the verdict is written: the costs are in the certificate, or sealed.

        Not earlier: a run that broke off in between would draw all of them anew, and on a GPU they
        are never the same to the last digit.
        """
        self._partial.unlink(missing_ok=True)

    def _plans(self) -> list[dict[str, Any]]:
        return [*(self.earlier.plans if self.earlier else []), self.plan]

    def _ledger_file(self) -> str:
        return os.path.relpath(self.gate.ledger.resolve(), self.gate.folder.resolve())

    @property
    def _number(self) -> int:
        return int(self.plan["ledger"]["test"])

    def _require_same_result(self, *result: Any) -> None:
        ledgers.require_same_result(self.ledger, self._number, *result)

    def _close(self, verdict: str, certificate: str | None, sealed: str | None) -> None:
        gate = self.gate
        with ledgers.locked(
            gate.ledger, self.ledger.delta, self.ledger.schedule, gate.state
        ) as ledger:
            unused = self.order[self.done :]
            self.ledger = ledgers.close_test(
                ledger, self._number, verdict, certificate, sealed, unused, gate.state
            )


# -- costs on disk ---------------------------------------------------------------------------------


def _record(part: CostSamples) -> dict[str, Any]:
    costs = part.costs.astype(object)
    costs[~np.isfinite(part.costs)] = None  # JSON has no NaN; null is read as one
    return {
        "keys": list(part.keys),
        "costs": costs.tolist(),
        "responses": [list(texts) for texts in part.responses],
        "truncated": part.truncated.tolist(),
    }


def _samples(record: Mapping[str, Any]) -> CostSamples:
    return CostSamples(
        tuple(record["keys"]),
        np.asarray(record["costs"], dtype=np.float64),
        tuple(tuple(texts) for texts in record["responses"]),
        np.asarray(record["truncated"], dtype=np.bool_),
    )


def _read_partial(path: Path, plan_hash: str, order: Sequence[str]) -> list[CostSamples]:
    """The batches that a broken run of this plan has written; a torn last one is drawn again."""
    try:
        first, *rest = path.read_text(encoding="utf-8").split("\n")
        if json.loads(first) != {"plan": plan_hash}:
            return []
    except (OSError, ValueError):
        return []
    parts: list[CostSamples] = []
    done = 0
    for line in rest:
        try:
            part = _samples(json.loads(line))
        except (ValueError, KeyError, TypeError):
            break
        if list(part.keys) != list(order[done : done + len(part.keys)]):
            break
        parts.append(part)
        done += len(part.keys)
    if parts:
        # Without what is torn, so that the next batch begins on a line of its own.
        lines = [json.dumps({"plan": plan_hash}), *(json.dumps(_record(p)) for p in parts)]
        write_text(path, "".join(f"{line}\n" for line in lines))
    return parts
