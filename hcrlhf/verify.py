"""Checks of a certificate that need no model: recompute what it says. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hcrlhf import certificate as cert
from hcrlhf import human
from hcrlhf import ledger as ledgers
from hcrlhf.constraint import Constraint
from hcrlhf.errors import InputError
from hcrlhf.gate import RESPONSES_FILE
from hcrlhf.hashing import (
    file_sha256,
    folder_hashes,
    json_hash,
    parse_json,
    read_json,
    sealed_hash,
)
from hcrlhf.safety import CostSamples
from hcrlhf.tables import (
    Table,
    published_names,
    require_aggregate,
)

Outcome = Literal["ok", "FAILED", "not checked"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    what: str
    outcome: Outcome
    detail: str = ""


def verify(
    path: Path,
    ledger: Path | None = None,
    policy: Path | None = None,
    costs: Table | None = None,
    state: Path | None = None,
) -> list[Check]:
    """Every check of the certificate in `path`, including those that could not be made.

    Args:
        ledger, policy: None looks where a run leaves them, beside the certificate.
        costs: the table that a retrospective certificate was made from.
        state: the state directory; None takes the user's.

    Raises:
        InputError: the file cannot be read, or is of a schema that this version does not know.
    """
    if path.is_dir():
        path = path / cert.CERTIFICATE_FILE
    try:
        record = read_json(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        return [Check("the file is JSON", "FAILED", str(error))]
    schema = record.get("schema") if isinstance(record, dict) else None
    if isinstance(record, dict) and record.get("kind") == "human":
        return _run([lambda: _human(record, path, ledger, state)])
    if isinstance(record, dict) and {"safety_set", "reason"} & record.keys():  # plan or verdict
        raise InputError(f"{path} is no certificate; expected a run's {cert.CERTIFICATE_FILE}")
    if schema != cert.SCHEMA:
        detail = f"schema {_short(repr(schema))}; expected {cert.SCHEMA}"
        return [Check("the schema is known", "FAILED", detail)]
    checks: list[Callable[[], list[Check]]] = [
        lambda: [_same("the certificate's own hash", record["hash"], sealed_hash(record))],
        lambda: _shape(record),
        lambda: _bounds(record),
        lambda: _words(record, path),
    ]
    if record.get("kind") == "retrospective":
        checks += [lambda: _retrospective(record, costs)]
    else:
        checks += [
            lambda: _plan(record, path),
            lambda: _ledger(record, path, ledger, state),
            lambda: _policy(record, path, policy),
        ]
    return [
        *_run(checks),
        Check(
            "that the costs are what the cost model says of the policy's responses",
            "not checked",
            "needs both models; the plan's hashes say which",
        ),
    ]


def _run(checks: list[Callable[[], list[Check]]]) -> list[Check]:
    """The results of all; a certificate that lacks what a check reads fails it."""
    results: list[Check] = []
    for check in checks:
        try:
            results += check()
        except InputError as error:
            results.append(Check("the certificate is consistent", "FAILED", str(error)))
        except Exception as error:  # whatever a file of unknown origin makes go wrong
            detail = _short(f"{type(error).__name__}: {error}")
            results.append(Check("the certificate is complete", "FAILED", detail))
    return results


def _same(what: str, said: Any, found: Any) -> Check:
    if said == found and type(said) is type(found):
        return Check(what, "ok")
    return Check(what, "FAILED", f"says {_short(said)}, found {_short(found)}")


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def _close(said: float | None, found: float | None) -> bool:
    if said is None or found is None:
        return said is None and (found is None or math.isinf(found))
    return math.isclose(said, found, rel_tol=1e-9, abs_tol=1e-9)


KEYS = {
    *("schema", "kind", "verdict", "claim", "bounds", "data", "diagnostics", "plan", "plan_hash"),
    *("ledger", "environment", "hash"),
}


def _shape(record: Mapping[str, Any]) -> list[Check]:
    """The parts that a certificate of its kind has, and no others."""
    committed = [record[key] is not None for key in ("plan", "plan_hash", "ledger")]
    kinds = {"committed": all(committed), "retrospective": not any(committed)}
    right = set(record) == KEYS and kinds.get(record["kind"], False)
    return [Check("the parts of its kind", "ok" if right else "FAILED", _short(record["kind"]))]


# -- what the costs say ----------------------------------------------------------------------------


def _samples(record: Mapping[str, Any]) -> CostSamples:
    data = record["data"]
    costs = np.asarray(data["costs"], dtype=np.float64)
    if costs.ndim != 2:
        raise InputError(f"expected costs as prompts x constraints, got shape {costs.shape}")
    keys = tuple(data["prompts"])
    return CostSamples(
        keys,
        costs[:, None, :],
        tuple(("",) for _ in keys),
        np.zeros((len(keys), 1), dtype=np.bool_),
    )


def _constraints(records: Any, n: int) -> list[Constraint]:
    """The constraints of a certificate, once it is certain that reading them takes no memory."""
    for record in records:
        size = record["safety_prompts"]
        if not isinstance(size, int) or size > max(10**6, n):
            raise InputError(f"safety_prompts is {_short(size)}, with {n} costs")
    return [Constraint.read(record).ready() for record in records]


def _bounds(record: Mapping[str, Any]) -> list[Check]:
    """Bounds, e-values and verdict, recomputed from the costs."""
    samples = _samples(record)
    constraints = _constraints(record["bounds"], len(samples.keys))
    alike = all(cost == row[0] for row in record["data"]["costs"] for cost in row)
    results = [
        _same("n is the number of costs", record["data"]["n"], len(samples.keys)),
        _same("every prompt stands once", len(samples.keys), len(set(samples.keys))),
        _same("every constraint judges the same costs", alike, True),
    ]
    judgements = cert.judge(constraints, samples)
    recomputed = cert.describe_bounds(constraints, judgements)
    for said, found in zip(record["bounds"], recomputed, strict=True):
        a, b = said["found"], found["found"]
        what = f"{found['estimand']} <= {cert.plain(found['threshold'])}: {found['bound']}"
        right = (
            a["passed"] is b["passed"]
            and _close(a["upper"], b["upper"])
            and _close(a["log_e_value"], b["log_e_value"])
        )
        verdict = "passed" if b["passed"] else "not passed"
        detail = f"upper bound {cert.number(b['upper'])}, {verdict}"
        if not right:
            detail = f"says {a}, found {b}"
        results.append(Check(what, "ok" if right else "FAILED", detail))
        results.append(
            _same(
                f"{found['estimand']}: class and assumptions of the bound",
                {k: v for k, v in said.items() if k != "found"},
                {k: v for k, v in found.items() if k != "found"},
            )
        )
    passed = "PASS" if all(j.passed for j in judgements) else "NO_SOLUTION_FOUND"
    results.append(_same("the verdict follows from the costs", record["verdict"], passed))
    return results


def _words(record: Mapping[str, Any], path: Path) -> list[Check]:
    """The claim, the diagnostics and the page say what the bounds say."""
    constraints = _constraints(record["bounds"], len(record["data"]["prompts"]))
    claim = cert.make_claim(constraints, record["plan"], record["data"])
    found = cert.diagnose(constraints, _samples(record).costs[:, 0, 0])
    said = record["diagnostics"]
    agrees = set(said) == set(found) and all(_agree(said[key], found[key]) for key in found)
    results = [
        _same("the claim's words follow from the bounds", record["claim"], claim),
        Check("the diagnostics", "ok" if agrees else "FAILED"),
    ]
    return [*results, _page(path.with_name(cert.PAGE_FILE), cert.certificate_page(record))]


def _page(page: Path, written: str) -> Check:
    """The page of a record, whose line ends may have become those of another system."""
    what = f"the page {page.name}"
    if not page.is_file():
        return Check(what, "not checked", "not beside the certificate")
    return _same(what, page.read_bytes().replace(b"\r\n", b"\n"), written.encode())


def _agree(said: Any, found: Any) -> bool:
    if isinstance(found, list):
        return len(said) == len(found) and all(map(_agree, said, found))
    return _close(said, found) if isinstance(found, float) else bool(said == found)


# -- what was committed to -------------------------------------------------------------------------


def _plan(record: Mapping[str, Any], path: Path) -> list[Check]:
    """The plan's hash, and that bounds, order and number of prompts are those of the plan."""
    plan, data = record["plan"], record["data"]
    described = [{k: v for k, v in b.items() if k != "found"} for b in record["bounds"]]
    results = [
        _same("the hash of the plan", record["plan_hash"], json_hash(plan)),
        _same("the bounds are those of the plan", described, plan["constraints"]),
        _same(
            "the policy's hash is that of its files",
            plan["policy"]["hash"],
            json_hash(plan["policy"]["files"]),
        ),
        _same("one response to each prompt", data["responses_per_prompt"], 1),
        *_parts(data, plan),
    ]
    if plan["stopping"] != cert.SEQUENTIAL_STOP:
        planned = plan["safety_set"]["prompts"]
        results.append(_same("all planned prompts were used", len(data["prompts"]), planned))
    return [
        *results,
        *_beside(record, path),
        Check(
            "that no training stage saw a safety prompt",
            "not checked",
            "needs the prompts; the plan says with how many keys they were compared",
        ),
    ]


def _parts(data: Mapping[str, Any], plan: Mapping[str, Any]) -> list[Check]:
    """Each part of the test (one, unless it was continued): its seed and its order."""
    keys, start = data["prompts"], 0
    plans = [*data["earlier_plans"], plan]
    results = [_same("one plan for each part of the test", len(plans), len(data["seeds"]))]
    for number, (part_plan, (seed, count)) in enumerate(zip(plans, data["seeds"], strict=True)):
        part = keys[start : start + count]
        start += count
        order = sorted(part, key=lambda key, s=seed: cert.order_key(s, key))  # type: ignore[misc]
        before = json_hash(plans[number - 1]) if number else None
        weights = cert.weights_hash(part_plan["policy"]["files"])
        derived = cert.response_seed_text(
            weights, part_plan["safety_set"]["hash"], part_plan["ledger"]["test"]
        )
        results += [
            _same("the seed is derived from policy, set and ledger", seed, derived),
            _same("the prompts stand in the derived order", part, order),
            _same("the plan goes on with the one before", part_plan["continues"], before),
            _same("the constraints are the same", part_plan["constraints"], plan["constraints"]),
            _same("the policy's weights are the same", weights, plan["policy"]["weights"]),
        ]
    return [*results, _same("every prompt belongs to a part of the test", start, len(keys))]


def _beside(record: Mapping[str, Any], path: Path) -> list[Check]:
    """The files that a run leaves beside its certificate say the same."""
    results = []
    beside = path.with_name(cert.PLAN_FILE)
    if beside.is_file():
        results.append(_same(f"{beside.name} is the plan", read_json(beside), record["plan"]))
    verdict = path.with_name(cert.VERDICT_FILE)
    if verdict.is_file():
        expected = cert.verdict_record("PASS", cert.PASS_REASON, record["plan_hash"])
        results.append(_same(f"{verdict.name} says the same", read_json(verdict), expected))
    responses = path.with_name(RESPONSES_FILE)
    if responses.is_file():
        rows = [parse_json(line) for line in responses.read_bytes().splitlines()]
        said, costs = record["data"]["responses_sha256"], record["data"]["costs"]
        results += [
            _same(f"prompts and responses in {responses.name}", json_hash(rows), said),
            _same(
                f"the costs in {responses.name}",
                [row["cost"] for row in rows],
                [row[0] for row in costs],
            ),
        ]
    return results


def _ledger(
    record: Mapping[str, Any], path: Path, given: Path | None, state: Path | None
) -> list[Check]:
    """The chain, this test's lines, the δ it was granted, and the head that others remember."""
    said = record["ledger"]
    planned = record["plan"]["ledger"]
    results = [
        _same(
            "the certificate's ledger is that of the plan",
            {key: said[key] for key in planned},
            planned,
        )
    ]
    share = ledgers.granted_share(said["schedule"], said["test"])
    granted = record["claim"]["error_probability"]
    if not granted <= said["delta"] * share * (1 + 1e-12):
        results.append(
            Check("the δ that the ledger grants", "FAILED", f"used {granted}, granted {share}·δ")
        )
    file = given or path.parent / said["file"]
    if not file.is_file():
        detail = f"no {file}; name it with --ledger"
        return [*results, Check("the ledger's chain", "not checked", detail)]
    try:
        ledger = ledgers.read(file, state)
    except InputError as error:
        return [*results, Check("the ledger's chain", "FAILED", str(error))]
    results.append(Check("the ledger's chain", "ok", f"{len(ledger.lines)} lines"))
    results.append(_same("it is the certificate's ledger", said["id"], ledger.identity))
    opened = next((x for x in ledger.lines if x.get("plan") == record["plan_hash"]), {})
    results += [
        _same("the line by which the test was opened", said["line"], opened.get("hash")),
        _same("the ledger's head before it", planned["head"], opened.get("previous")),
    ]
    test = ledger.find(record["plan_hash"])
    if test is None:
        return [*results, Check("the ledger knows this plan", "FAILED")]
    results += [
        _same(
            "the test has no part that the certificate leaves out",
            [json_hash(plan) for plan in [*record["data"]["earlier_plans"], record["plan"]]],
            list(test.plans),
        ),
        _same("the number of the test", said["test"], test.number),
        _same("the ledger's claim: δ", said["delta"], ledger.delta),
        _same("the ledger's claim: schedule", said["schedule"], ledger.schedule),
        _same("the ledger's verdict", test.verdict, record["verdict"]),
        _same("the ledger names this certificate", test.certificate, record["hash"]),
    ]
    head = ledgers.remembered_head(ledger.identity, state)
    results.append(
        Check(
            "the ledger's tail",
            "ok" if head else "not checked",
            "" if head else "this machine has not seen the ledger before",
        )
    )
    return results


def _policy(record: Mapping[str, Any], path: Path, given: Path | None) -> list[Check]:
    """The shipped files are those that were tested, each of them and no other."""
    folder = given or path.parent / "policy"
    what = "the policy's files"
    if not folder.is_dir():
        detail = f"no {folder}; name it with --policy"
        return [Check(what, "not checked", detail)]
    said, found = record["plan"]["policy"]["files"], folder_hashes(folder)
    differing = sorted(name for name in {*said, *found} if said.get(name) != found.get(name))
    if differing:
        return [Check(what, "FAILED", f"{folder}: differing {', '.join(differing)}")]
    return [Check(what, "ok", f"{len(found)} files in {folder}")]


# -- a table of costs ------------------------------------------------------------------------------


def _retrospective(record: Mapping[str, Any], costs: Table | None) -> list[Check]:
    """The order is the derived one; the table, where it is given, is the one that was judged."""
    data = record["data"]
    names, column = data["prompts"], [row[0] for row in data["costs"]]
    results = [_same("the costs stand in the order of their prompts", names, sorted(names))]
    if data["prompt_column"] is None:
        ordered = any(c.rule.reads_in_order for c in _constraints(record["bounds"], len(names)))
        results.append(_same("rows without ids are read in no order", ordered, False))
    require_aggregate([bound["estimand"] for bound in record["bounds"]], data["aggregate"])
    if costs is None:
        detail = "name the table with --costs"
        return [*results, Check(f"the table {data['file']}", "not checked", detail)]
    results.append(_same("the table's hash", data["file_sha256"], file_sha256(costs.path)))
    theirs = dict(zip(published_names(costs.prompts), costs.costs.tolist(), strict=True))
    ours = dict(zip(names, column, strict=True))
    results.append(Check("the table's costs", "ok" if ours == theirs else "FAILED"))
    how = costs.describe()
    return results + [_same(f"how the table was read: {key}", data[key], how[key]) for key in how]


# -- people's labels -------------------------------------------------------------------------------


def _human(
    record: Mapping[str, Any], path: Path, given: Path | None, state: Path | None
) -> list[Check]:
    """The claim about people, recomputed from the labels and the certificate beside it."""
    results = [_same("the record's own hash", record["hash"], sealed_hash(dict(record)))]
    beside = path.with_name(cert.CERTIFICATE_FILE)
    if not beside.is_file():
        detail = f"needs {cert.CERTIFICATE_FILE} beside it"
        return [*results, Check("the certificate that it goes with", "FAILED", detail)]
    base = read_json(beside)
    results += [
        _same("it goes with the certificate beside it", record["certificate"], base["hash"]),
        _same("that certificate is intact", base["hash"], sealed_hash(base)),
    ]
    _, ids = human.committed(base)
    results.append(
        _same("the labels are of the committed subset", [k for k, _ in record["labels"]], ids)
    )
    labels = [math.nan if y is None else float(y) for _, y in record["labels"]]
    found = human.judge_labels(base, labels)
    right = _close(record["upper"], found["upper"])
    detail = f"upper bound {cert.round_up(found['upper'])}"
    results.append(Check("the bound", "ok" if right else "FAILED", detail))
    results += [
        _same(key, record[key], found[key])
        for key in ("verdict", "claim", "asked", "harmful", "unclear_counted_as_harmful", "method")
    ]
    results.append(_page(path.with_name(human.PAGE_FILE), human.page(record)))
    file = given or path.parent / base["ledger"]["file"]
    if not file.is_file():
        return [*results, Check("the ledger", "not checked", f"no {file}; name it with --ledger")]
    try:
        lines = ledgers.read(file, state).lines
    except InputError as error:
        return [*results, Check("the ledger's chain", "FAILED", str(error))]
    known = any(x["kind"] == "labels" and x["labels"] == record["hash"] for x in lines)
    results.append(Check("the ledger names these labels", "ok" if known else "FAILED"))
    return results
