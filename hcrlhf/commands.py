"""The commands that need no GPU and no torch: certify, verify, unseal, ledger, human."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hcrlhf import certificate as cert
from hcrlhf import human
from hcrlhf import ledger as ledgers
from hcrlhf.constraint import Constraint
from hcrlhf.errors import InputError
from hcrlhf.gate import SEALED_FILE
from hcrlhf.hashing import json_hash, read_json, sealed_hash, write_json, write_text
from hcrlhf.methods import METHODS, Betting, Bound
from hcrlhf.tables import certify, read_table
from hcrlhf.verify import verify

PASSED, NO_SOLUTION, FAILED = 0, 3, 5

BOUNDS = (*METHODS, "star", "wsr", "portfolio")


def bound_of(name: str | None) -> Bound | None:
    """A bound by its name; star, wsr and portfolio are betting's strategies; None is auto."""
    if name is None or name == "auto":
        return None
    if name in ("star", "wsr", "portfolio"):
        return Betting(name)  # type: ignore[arg-type]
    if name not in METHODS:
        raise InputError(f"no bound {name!r}; expected auto or one of {', '.join(BOUNDS)}")
    return METHODS[name]()


def tail_options(options: argparse.Namespace) -> dict[str, Any]:
    """
    Raises:
        InputError: what a cvar needs is missing.
    """
    if options.alpha is None or options.eta is None:
        raise InputError("a cvar needs --alpha and --eta, both fixed before the costs were seen")
    return {"alpha": options.alpha, "eta": options.eta}


def read_constraint(text: str, options: argparse.Namespace, n: int) -> Constraint:
    """`mean:0`, `harm_rate:0.1` or `cvar:1`, each with `:BOUND` behind it if auto will not do.

    Raises:
        InputError: it is not of that form, or cannot be met with n prompts.
    """
    parts = text.split(":")
    if len(parts) not in (2, 3) or parts[0] not in ("mean", "harm_rate", "cvar"):
        raise InputError(
            f"--constraint {text}: expected ESTIMAND:LIMIT[:BOUND], for example mean:0, "
            "harm_rate:0.1 or mean:0:star"
        )
    try:
        limit = float(parts[1])
    except ValueError:
        raise InputError(f"--constraint {text}: {parts[1]!r} is not a number") from None
    tail = tail_options(options) if parts[0] == "cvar" else {}
    constraint = Constraint(
        estimand=parts[0],  # type: ignore[arg-type]
        threshold=limit,
        delta=options.delta,
        safety_prompts=n,
        bound=bound_of(parts[2] if len(parts) == 3 else options.bound),
        lower=options.lower,
        upper=options.upper,
        **tail,
    )
    if missing := constraint.rule.missing(constraint.within):
        raise InputError(
            f"--constraint {text}: the bound {constraint.rule.name} needs "
            f"{' and '.join('--' + name for name in missing)}, a fact about the cost function that "
            "was known before the costs; or take another bound"
        )
    return constraint


def add_constraint_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--delta", type=float, default=0.05, help="probability of error (0.05)")
    parser.add_argument("--bound", help=f"auto (default), {', '.join(BOUNDS)}")
    parser.add_argument("--lower", type=float, help="lowest cost there can be, known beforehand")
    parser.add_argument("--upper", type=float, help="cap of the cost, known beforehand")
    parser.add_argument("--alpha", type=float, help="of cvar: share of the worst responses")
    parser.add_argument("--eta", type=float, help="of cvar: fixed before the costs were seen")


def add_table_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cost-column", default="cost")
    parser.add_argument(
        "--prompt-column",
        type=lambda name: None if name == "none" else name,
        default="prompt_id",
        help="which prompt a row answers (prompt_id); none: every row is a prompt of its own",
    )
    parser.add_argument("--aggregate", choices=("mean", "max"), help="of rows of one prompt")


# -- certify ---------------------------------------------------------------------------------------


def certify_main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "hcrlhf certify",
        description="Bounds a table of costs that exists already. The certificate is marked "
        "retrospective: nothing was committed to before the costs were seen.",
    )
    parser.add_argument("table", type=Path, help=".csv, .jsonl (also .gz) or .parquet")
    parser.add_argument(
        "--constraint",
        action="append",
        required=True,
        metavar="ESTIMAND:LIMIT[:BOUND]",
        help="mean:0, harm_rate:0.1, cvar:1; may be given several times",
    )
    add_constraint_options(parser)
    add_table_options(parser)
    parser.add_argument("--out", type=Path, help="folder for certificate.json and .md on a PASS")
    options = parser.parse_args(list(arguments))
    if options.out:
        require_no_run(options.out)
    table = read_table(options.table, options.cost_column, options.prompt_column, options.aggregate)
    constraints = [read_constraint(text, options, table.costs.size) for text in options.constraint]
    record = certify(constraints, table)
    for limit, bound in zip(record["claim"]["limits"], record["bounds"], strict=True):
        mark = "passed" if bound["found"]["passed"] else "NOT passed"
        print(f"{mark}: {limit}")
        print(
            f"  upper bound {cert.number(bound['found']['upper'])} by {bound['bound']} "
            f"({bound['class']}), δ = {cert.plain(bound['delta'])}, n = {record['data']['n']}"
        )
    if any(bound["class"] == "asymptotic" for bound in record["bounds"]):
        print(
            "note: an asymptotic bound holds only as the number of prompts grows and errs for rare "
            "severe harm; where the cost has a range that was known before the costs, --lower and "
            "--upper allow an exact one"
        )
    if record["verdict"] != "PASS":
        print("no solution found: a limit is not shown")
        if options.out and (options.out / cert.CERTIFICATE_FILE).is_file():
            print(f"{options.out / cert.CERTIFICATE_FILE} is an earlier one, not of these figures")
        return NO_SOLUTION
    print(f"PASS, retrospective, class {record['claim']['class']}")
    if options.out:
        try:
            options.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {options.out} is no folder ({error.strerror})") from error
        write_json(options.out / cert.CERTIFICATE_FILE, record)
        write_text(options.out / cert.PAGE_FILE, cert.certificate_page(record))
        print(f"wrote {options.out / cert.CERTIFICATE_FILE} and {cert.PAGE_FILE}")
    return PASSED


def require_no_run(folder: Path) -> None:
    """A retrospective certificate may be made anew in its folder; a run's verdict stands alone.

    Raises:
        InputError: the folder is a run's, or holds a certificate of another kind.
    """
    found = [n for n in (cert.VERDICT_FILE, cert.PLAN_FILE) if os.path.lexists(folder / n)]
    certificate = folder / cert.CERTIFICATE_FILE
    if os.path.lexists(certificate) and not _is_retrospective(certificate):
        found.append(cert.CERTIFICATE_FILE)
    if found:
        raise InputError(
            f"--out {folder} holds {' and '.join(found)}, which certify did not write; beside a "
            "run's files the certificate of a table would be taken for the run's, so give another "
            "folder"
        )


def _is_retrospective(path: Path) -> bool:
    try:
        return bool(read_json(path)["kind"] == "retrospective")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


# -- verify ----------------------------------------------------------------------------------------


def verify_main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "hcrlhf verify",
        description="Recomputes a certificate from its costs, without a model; exit code 5 if "
        "anything is not as it says.",
    )
    parser.add_argument("certificate", type=Path)
    parser.add_argument("--ledger", type=Path, help="where it is not beside the run's folder")
    parser.add_argument("--policy", type=Path, help="where it is not beside the certificate")
    parser.add_argument("--costs", type=Path, help="the table of a retrospective certificate")
    add_table_options(parser)
    options = parser.parse_args(list(arguments))
    table = None
    if options.costs:
        table = read_table(
            options.costs, options.cost_column, options.prompt_column, options.aggregate
        )
    checks = verify(options.certificate, options.ledger, options.policy, table)
    width = max(len(check.outcome) for check in checks)
    for check in checks:
        detail = f" ({check.detail})" if check.detail else ""
        print(f"{check.outcome:{width}}  {printable(check.what + detail)}")
    failed = sum(check.outcome == "FAILED" for check in checks)
    open_ = sum(check.outcome == "not checked" for check in checks)
    if failed:
        print(f"NOT VERIFIED: {failed} of {len(checks)} checks failed")
        return FAILED
    print(f"verified: {len(checks) - open_} checks hold, {open_} could not be made here")
    return PASSED


def printable(text: str) -> str:
    """One line without control characters: a file of unknown origin does not write our report."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


# -- unseal ----------------------------------------------------------------------------------------


def unseal_main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "hcrlhf unseal",
        description='Shows the numbers behind a "no solution found". The ledger says "burnt" '
        "first: the test can then not be continued.",
    )
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--ledger", type=Path)
    options = parser.parse_args(list(arguments))
    path = options.run / SEALED_FILE
    try:
        sealed: dict[str, Any] = read_json(path)
        plan = json_hash(sealed["plans"][-1])
        ledger_path = options.ledger or options.run / sealed["ledger"]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(
            f"{path} is not the sealed result of a test ({type(error).__name__}); expected the "
            "folder of a run that ended in no solution found"
        ) from error
    ledger = ledgers.read(ledger_path)
    test = ledger.find(plan)
    if test is None:
        raise InputError(f"{ledger_path} does not know the test in {options.run}")
    if test.verdict is None:
        raise InputError(
            f"test {test.number} of {ledger_path} is still open; end it first, by the command that "
            "began it (with --ckpt_path last)"
        )
    if not test.burnt:
        with ledgers.locked(ledger_path, ledger.delta, ledger.schedule) as held:
            ledgers.append(held, {"kind": "burn", "test": test.number})
        print(f"test {test.number} of {ledger_path} is marked as burnt")
    drawn = [row[0][0] for _, part in sealed["parts"] for row in part["costs"]]
    costs = [cost for cost in drawn if cost is not None]
    if len(costs) < len(drawn):
        print(f"{len(drawn) - len(costs)} costs were not finite, which alone fails a test")
    if costs:
        harmful = sum(cost > 0 for cost in costs)
        mean = sum(costs) / len(costs)
        print(f"{len(costs)} prompts: mean cost {mean:.4g}, {harmful} with a cost above 0")
    for bound in sealed["bounds"]:
        found = bound["found"]
        print(
            f"{bound['estimand']} <= {cert.plain(bound['threshold'])}: upper bound "
            f"{cert.number(found['upper'])} by {bound['bound']} at δ = {cert.plain(bound['delta'])}"
            f", {'passed' if found['passed'] else 'not passed'}"
        )
    print(f"every response and cost: {path}")
    return PASSED


# -- human -----------------------------------------------------------------------------------------


def human_main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "hcrlhf human",
        description="Turns people's labels of the committed subset into a claim about people. The "
        "ledger takes one set of labels per test.",
    )
    parser.add_argument("run", type=Path, help="folder of a run that passed")
    parser.add_argument("labels", type=Path, help=f"{human.FORM_FILE} with its last column filled")
    parser.add_argument("--ledger", type=Path)
    options = parser.parse_args(list(arguments))
    path = options.run / cert.CERTIFICATE_FILE
    try:
        record: dict[str, Any] = read_json(path)
        intact = record["hash"] == sealed_hash(record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a certificate ({type(error).__name__})") from error
    if not intact:
        raise InputError(f"{path} was changed: its hash does not fit; see hcrlhf verify")
    _, ids = human.committed(record)
    result = human.judge_labels(record, human.read_labels(options.labels, ids))
    ledger_path = options.ledger or options.run / record["ledger"]["file"]
    ledger = ledgers.read(ledger_path)
    with ledgers.locked(ledger_path, ledger.delta, ledger.schedule) as held:
        test = held.find(record["plan_hash"])
        if test is None or test.certificate != record["hash"]:
            raise InputError(f"{ledger_path} does not know this certificate")
        if test.labels not in (None, result["hash"]):
            raise InputError(
                f"the labels of test {test.number} were judged before; other labels of the same "
                "responses are a second look, which the claim does not cover"
            )
        if test.labels is None:
            line = {"kind": "labels", "test": test.number, "labels": result["hash"]}
            ledgers.append(held, line)
    write_json(options.run / human.RECORD_FILE, result)
    write_text(options.run / human.PAGE_FILE, human.page(result))
    print(
        f"{len(ids)} labels, {result['harmful']} harmful ({result['unclear_counted_as_harmful']} "
        f"of them missing or unclear); upper bound {cert.round_up(result['upper'])}, limit "
        f"{cert.plain(result['asked']['limit'])}"
    )
    print(result["claim"] or "no solution found: the limit is not shown for people")
    print(f"wrote {options.run / human.RECORD_FILE}")
    return PASSED if result["verdict"] == "PASS" else NO_SOLUTION


# -- ledger ----------------------------------------------------------------------------------------


def ledger_main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "hcrlhf ledger", description="Lists the tests of a claim, and what is left of δ."
    )
    parser.add_argument("ledger", type=Path)
    parser.add_argument(
        "--drop-torn-line", action="store_true", help="cut a last line that was not written whole"
    )
    parser.add_argument(
        "--forget",
        action="store_true",
        help="give up a claim whose file is gone: this machine no longer asks for it",
    )
    options = parser.parse_args(list(arguments))
    if options.forget:
        if options.ledger.exists():
            raise InputError(f"{options.ledger} is still there; --forget is for one that is gone")
        known = ledgers.forget(options.ledger)
        print("forgotten" if known else "this machine knows no ledger there")
        return PASSED
    if options.drop_torn_line:
        print(f"cut {ledgers.drop_torn_line(options.ledger)} bytes")
    ledger = ledgers.read(options.ledger)
    print(
        f"ledger {ledger.identity}: δ = {cert.plain(ledger.delta)} by schedule {ledger.schedule}, "
        f"{len(ledger.lines)} lines, head {ledger.head[:12]}"
    )
    for test in ledger.tests:
        share = ledgers.granted_share(ledger.schedule, test.number)
        state = (test.verdict or "open, spent").replace("_", " ").lower()
        burnt = ", burnt" if test.burnt else ""
        print(
            f"  test {test.number}: {state}{burnt}; {len(test.prompts)} prompts, δ = "
            f"{cert.plain(ledger.delta * share)}"
        )
    try:
        share = ledgers.granted_share(ledger.schedule, ledger.next_test)
        print(f"the next test is granted δ = {cert.plain(ledger.delta * share)}")
    except InputError:
        print("nothing of δ is left")
    return PASSED
