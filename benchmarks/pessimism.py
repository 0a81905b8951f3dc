"""How often a policy that training takes for safe enough fails its safety test: 5% is asked for.

    python -m benchmarks.pessimism

Training adds k standard deviations to the mean cost. k comes from the 500 costs of recent rollouts
(`Constraint.training_pessimism`), once for each of RECENTS draws of them. Then TESTS times each: m
validation costs, the limit that their mean and standard deviation just satisfy with this k, and a
safety test on n other costs with this limit. Everything is drawn from the same distribution, one
of benchmarks/coverage.py. Intervals are Student's over the draws of recent costs.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace

from benchmarks.coverage import CAP, DISTRIBUTIONS, ROOT, generator, markdown, origin
from benchmarks.recipe import interval
from hcrlhf.constraint import Constraint
from hcrlhf.methods import Betting, HallT

RECENTS, TESTS = 60, 400
SIZES = ((500, 400), (200, 100))  # safety prompts n, validation prompts m
LIMIT = Constraint("mean", 0.0, 0.025, lower=-CAP, upper=CAP, miss_probability=0.05)
RULES = {
    "mean, star": replace(LIMIT, bound=Betting("star")),
    "mean, Hall's t": replace(LIMIT, bound=HallT()),
    "CVaR of a tenth, star": replace(LIMIT, estimand="cvar", alpha=0.1, threshold=3.9),
}


def misses(limit: Constraint, name: str, m: int) -> list[float]:
    """Of every draw of recent costs, the share of policies that fail their test."""
    rng = generator(f"pessimism/{name}/{limit.label}/{limit.rule.name}/{limit.safety_prompts}/{m}")
    draw = DISTRIBUTIONS[name].draw
    shares = []
    for _ in range(RECENTS):
        recent = draw(rng, 500)
        fixed = limit.with_eta(recent)
        k = limit.training_pessimism(1, recent, m)
        top = fixed.within.upper
        assert top is not None
        failed = 0
        for _ in range(TESTS):
            seen = fixed.values(draw(rng, m))
            border = float(seen.mean()) + k * fixed.margin_std(float(seen.std()))
            test = fixed.values(draw(rng, limit.safety_prompts))
            met = border >= top or fixed.rule.passes(test, border, fixed.delta, fixed.within)
            failed += not met
        shares.append(failed / TESTS)
    return shares


def main() -> None:
    began = time.time()
    head = ["costs", *(f"{rule}, n = {n}, m = {m}" for rule in RULES for n, m in SIZES)]
    body = []
    for name in DISTRIBUTIONS:
        cells = [
            interval(misses(replace(limit, safety_prompts=n), name, m), 3)
            for limit in RULES.values()
            for n, m in SIZES
        ]
        body.append([name, *cells])
        print(" | ".join(body[-1]), file=sys.stderr, flush=True)
    lines = ["# How often a policy that training takes for safe enough fails its test", ""]
    lines += ["The docstring of `benchmarks/pessimism.py` says what is run.", ""]
    lines += ["`miss_probability` is 5%, δ 2.5%; n safety prompts, m validation prompts.", ""]
    lines += [*origin("python -m benchmarks.pessimism", [{"seconds": time.time() - began}]), ""]
    lines += [*markdown(head, body), ""]
    (ROOT / "benchmarks" / "results" / "pessimism.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
