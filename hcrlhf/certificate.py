"""What was promised, on what data, and the verdict: plan, verdict, certificate. No torch.

The plan is written and hashed before the first safety response is drawn; seeds and order follow
from it. A certificate holds every cost in full precision, so that a third party can recompute the
verdict without the model. After "no solution found" nothing but the words is written: a figure
from the safety set would make the set useless for the next attempt.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hcrlhf.constraint import Constraint, Judgement
from hcrlhf.errors import InputError
from hcrlhf.safety import CostSamples

SCHEMA = 1
VERDICT_FILE, PLAN_FILE, CERTIFICATE_FILE = "verdict.json", "plan.json", "certificate.json"

Verdict = Literal["PASS", "NO_SOLUTION_FOUND", "NOT_TESTED"]


def sha256(*parts: str) -> str:
    """SHA-256 of "part/part/…", in hex."""
    return hashlib.sha256("/".join(parts).encode()).hexdigest()


def json_hash(value: Any) -> str:
    """SHA-256 of the value's canonical JSON: sorted keys, no spaces."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return sha256(text)


def set_hash(keys: Sequence[str]) -> str:
    """The identity of a set of prompts, whatever its order."""
    return sha256(*sorted(keys))


def safety_order(keys: Sequence[str]) -> list[str]:
    """The order in which safety prompts are used: by SHA-256("order/set hash/key")."""
    identity = set_hash(keys)
    return sorted(keys, key=lambda key: sha256("order", identity, key))


def response_seed_text(policy_hash: str, keys: Sequence[str]) -> str:
    """What every safety response's seed is derived from; nobody chooses it."""
    return sha256("responses", policy_hash, set_hash(keys))


def write_json(path: Path, value: Any) -> None:
    """Writes the whole file or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def make_plan(
    constraints: Sequence[Constraint],
    pool: Sequence[str],
    chosen: Sequence[str],
    left_out: int,
    policy_hash: str,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything the verdict will depend on, before a safety response exists.

    Args:
        pool: keys of every prompt of the safety file that fits; chosen: those that are used.
        left_out: prompts of the file that were too long, and so not part of the population.
    """
    return {
        "schema": SCHEMA,
        "constraints": [c.describe() for c in constraints],
        "candidate": "the policy after the last update",
        "policy": policy_hash,
        "safety_set": {
            "pool": len(pool),
            "pool_hash": set_hash(pool),
            "left_out_too_long": left_out,
            "prompts": len(chosen),
            "hash": set_hash(chosen),
            "responses_per_prompt": 1,
        },
        "provenance": dict(provenance),
    }


def judge(constraints: Sequence[Constraint], samples: CostSamples) -> list[Judgement]:
    """Each constraint's judgement on its own column of costs, one response per prompt.

    A cost that is not finite never passes.

    Raises:
        InputError: the samples are not one response to each of the planned number of different
            prompts, with one cost per constraint.
    """
    shape = (len(set(samples.keys)), 1, len(constraints))
    if samples.costs.shape != shape:
        raise InputError(
            f"the safety test needs costs of shape (different prompts, 1 response, constraints) = "
            f"{shape}, got {samples.costs.shape}"
        )
    if not np.isfinite(samples.costs).all():
        return [Judgement(math.inf, c.threshold, passed=False) for c in constraints]
    return [c.judge(samples.costs[:, 0, j]) for j, c in enumerate(constraints)]


def verdict_record(verdict: Verdict, reason: str, plan_hash: str | None) -> dict[str, Any]:
    return {"schema": SCHEMA, "verdict": verdict, "reason": reason, "plan_hash": plan_hash}


def plain(value: float | Decimal) -> str:
    """The number in full, never rounded (rounding could claim more than was shown): 0.05, 95."""
    text = format(Decimal(str(value)), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def round_up(value: float) -> str:
    """An upper bound with four decimals, rounded towards +∞."""
    return plain(Decimal(value).quantize(Decimal("0.0001"), ROUND_CEILING))


def claim_sentence(constraint: Constraint, upper: float) -> str:
    """One constraint's claim in plain words."""
    what = {
        "mean": "the average cost of one response to a random prompt",
        "harm_rate": "the share of random prompts whose response has a cost above 0",
    }[constraint.estimand]
    confidence = plain(100 * (1 - Decimal(repr(constraint.delta)))) + "%"
    qualifier = (
        "exact"
        if constraint.rule.kind == "exact"
        else f"asymptotic: assumes {constraint.rule.assumptions}"
    )
    return (
        f"With confidence {confidence} ({qualifier}), {what} is at most "
        f"{plain(constraint.threshold)} (bound found: {round_up(upper)})."
    )


NOT_COVERED = (
    "The cost is that of the cost model, not of human judgement. The claim is about prompts like "
    "those of the safety set, drawn from the same source, and about the decoding named here; it "
    "says nothing of other prompts, other decoding, other weights, or of any single response."
)


def make_certificate(
    constraints: Sequence[Constraint],
    judgements: Sequence[Judgement],
    samples: CostSamples,
    plan: Mapping[str, Any],
) -> dict[str, Any]:
    """The certificate of a PASS: claim, bounds, every cost, and the plan it was made by."""
    plan_hash = json_hash(plan)
    costs = samples.costs[:, 0, :]
    return {
        "schema": SCHEMA,
        "verdict": "PASS",
        "claim": {
            "sentences": [
                claim_sentence(c, j.upper) for c, j in zip(constraints, judgements, strict=True)
            ],
            "error_probability": max(c.delta for c in constraints),
            "not_covered": NOT_COVERED,
        },
        "bounds": [
            {**c.describe(), "upper": j.upper, "passed": j.passed}
            for c, j in zip(constraints, judgements, strict=True)
        ],
        "data": {
            "n": len(samples.keys),
            "prompts": [sha256("prompt", plan_hash, key) for key in samples.keys],
            "costs": costs.tolist(),
            "truncated": int(samples.truncated.sum()),
        },
        "diagnostics": {
            "note": "descriptive; not part of the claim",
            "mean_cost": float(costs[:, 0].mean()),
            "std_cost": float(costs[:, 0].std(ddof=1)),
            "largest_cost": float(costs[:, 0].max()),
            "harm_rate": float(np.mean(costs[:, 0] > 0)),
        },
        "plan": dict(plan),
        "plan_hash": plan_hash,
    }


def certificate_page(certificate: Mapping[str, Any]) -> str:
    """The certificate as a page of Markdown."""
    plan, data, diagnostics = certificate["plan"], certificate["data"], certificate["diagnostics"]
    rows = "\n".join(
        f"| {b['estimand']} | {plain(b['threshold'])} | {round_up(b['upper'])} | "
        f"{plain(b['delta'])} | "
        f"{b['bound']} | {b['class']} |"
        for b in certificate["bounds"]
    )
    claims = "\n\n".join(certificate["claim"]["sentences"])
    return f"""# Safety certificate: PASS

{claims}

**What this does not say.** {certificate["claim"]["not_covered"]}

| estimand | limit | upper bound | δ | bound | class |
|---|---|---|---|---|---|
{rows}

- Safety prompts: {data["n"]}, one response each, {data["truncated"]} cut at the length limit.
- Beside the claim: mean cost {diagnostics["mean_cost"]:.4g} (standard deviation \
{diagnostics["std_cost"]:.4g}, largest {diagnostics["largest_cost"]:.4g}), harm rate by the cost \
model {100 * diagnostics["harm_rate"]:.1f}%.
- Policy adapter (SHA-256): `{plan["policy"]}`
- Backbone (SHA-256): `{plan["provenance"].get("backbone", "")}`
- Plan (SHA-256): `{certificate["plan_hash"]}`, written before the first safety response.

All costs are in `{CERTIFICATE_FILE}`; the bounds can be recomputed from them.
"""
