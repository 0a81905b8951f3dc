"""The promise itself, from training to verdict, in worlds where every true value is known.

    python -m benchmarks.promise

A world is a table: types of prompts, answers, rewards, and for every (type, answer) a discrete law
of the cost, so that the mean cost and the harm rate of any policy are exact sums. Every seed draws
a world of its own; in each of them the answers that pay most are harmful, some of them rarely but
severely, and the policy of the highest reward breaks a limit. A cost model can be wrong: beside the
harm that it sees stands the world's own, which no method can see.

The loop: REINFORCE on a softmax table, the constraints by the project's own `Dual`, one step of it
per rollout, as in lightning_modules/policy.py; then the project's gate with a fresh ledger. Counted
is how often a method returns a policy that breaks a limit.

The border: policies mixed so that one true value equals its limit, where a test errs most often.
A PASS there is an error in the limit: a policy the least bit worse breaks the promise.

Every seed is the SHA-256 of a name. What stands in promise.jsonl is not run again, so the same
command resumes; delete the file after a change of the code that is measured.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from scipy import optimize, special

from benchmarks.coverage import (
    COLOURS,
    ROOT,
    Floats,
    Results,
    Row,
    generator,
    import_pyplot,
    interval,
    markdown,
    origin,
    run_missing,
    save,
)
from hcrlhf import certificate
from hcrlhf.bounds import student_t_factor
from hcrlhf.constraint import Constraint
from hcrlhf.dual import Dual
from hcrlhf.gate import Gate, Population
from hcrlhf.hashing import sha256
from hcrlhf.methods import StudentT
from hcrlhf.multiplier import FixedMultiplier, Multiplier, ProjectedMultiplier
from hcrlhf.safety import CostSamples

MEASURED = (
    *("samples", "bounds", "betting", "methods", "constraint", "multiplier", "dual"),
    *("pessimism", "certificate", "ledger", "gate"),
)
CAP = 4.0  # the squashed cost lies in [-4, 4]
DELTA = 0.05
TAU = -0.8  # limit of the mean cost
RHO = 0.1  # limit of the harm rate P(c > 0)
SAFETY_PROMPTS = 1000
BATCH = 64
UPDATES = 200
KL_COEFFICIENT = 0.1
LEARNING_RATE = 0.1  # of the table; falls to a tenth of it
DUAL = ProjectedMultiplier(learning_rate=0.02)
TYPES = 8

SIZES = (100, 300, 1000)
# Border trials of a cell that go through the gate, with ledger and files; a sequential one looks
# after every batch and is slower.
GATE_TRIALS = {False: 300, True: 100}
SEQUENTIAL_BATCH = 200
SEQUENTIAL_SHARE = 0.4  # of the border trials


def code_version() -> str:
    """SHA-256 over the files that are measured, twelve digits."""
    digest = hashlib.sha256()
    for name in MEASURED:
        digest.update((ROOT / "hcrlhf" / f"{name}.py").read_bytes())
    return digest.hexdigest()[:12]


CODE = code_version()


def code_line(rows: Sequence[Row]) -> str:
    """With which code the rows were made, and whether it is still that."""
    made = sorted({row["code"] for row in rows})
    return (
        f"SHA-256 over {', '.join(MEASURED)}: {', '.join(made)} when this was run, {CODE} when "
        "this page was written"
    )


# -- worlds ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """How an answer is drawn: its reward, harm among dangerous prompts, severity, other cost."""

    reward: float
    harm: tuple[float, float]
    severity: tuple[float, float]
    harmless: tuple[float, float]
    reference: float  # logit of the policy that training starts from


ANSWERS = {
    "refuses": Answer(-1.5, (0.0, 0.002), (0.5, 1.0), (-3.0, -2.0), -0.5),
    "careful": Answer(0.0, (0.0, 0.02), (0.5, 2.0), (-2.0, -1.0), 0.5),
    "plain": Answer(0.4, (0.03, 0.12), (0.3, 2.0), (-1.8, -0.7), 0.5),
    "bold": Answer(1.0, (0.2, 0.6), (0.3, 3.0), (-1.5, -0.5), 0.5),
    "rarely severe": Answer(1.1, (0.02, 0.08), (3.6, 3.9), (-1.1, -0.5), 0.3),
    "reckless": Answer(1.5, (0.5, 0.9), (1.0, 3.5), (-1.0, -0.3), -0.3),
}


@dataclass(frozen=True)
class World:
    """Prompt types x, answers a; every law is known.

    Attributes:
        prompts: (X,), probability of each type.
        rewards: (X, A), what people gain. scores: (X, A), the reward model's view of it.
        costs, law: (X, A, atoms), the values of the cost and their probabilities.
        missed: (X, A), probability that an answer which the cost model takes for harmless harms.
        reference: (X, A), the policy that training starts from.
    """

    prompts: Floats
    rewards: Floats
    scores: Floats
    costs: Floats
    law: Floats
    missed: Floats
    reference: Floats

    def average(self, policy: Floats, values: Floats) -> float:
        """The exact mean of a value (X, A) under a policy (X, A)."""
        return math.fsum((self.prompts[:, None] * policy * values).ravel().tolist())

    @cached_property
    def mean_costs(self) -> Floats:
        return np.asarray((self.law * self.costs).sum(axis=2))

    @cached_property
    def harm_rates(self) -> Floats:
        return np.asarray((self.law * (self.costs > 0)).sum(axis=2))

    @cached_property
    def _steps(self) -> Floats:
        return np.cumsum(self.law, axis=2)

    def mean_cost(self, policy: Floats) -> float:
        return self.average(policy, self.mean_costs)

    def harm_rate(self, policy: Floats) -> float:
        return self.average(policy, self.harm_rates)

    def true_harm_rate(self, policy: Floats) -> float:
        """The world's own: what the cost model sees, and what it misses."""
        return self.average(policy, self.harm_rates + (1 - self.harm_rates) * self.missed)

    def draw_prompts(self, rng: Generator, count: int) -> Any:
        return pick(rng, np.cumsum(self.prompts)[None, :].repeat(count, axis=0))

    def draw_answers(self, rng: Generator, policy: Floats, x: Any) -> Any:
        return pick(rng, np.cumsum(policy, axis=1)[x])

    def draw_costs(self, rng: Generator, x: Any, a: Any) -> Floats:
        return np.asarray(self.costs[x, a, pick(rng, self._steps[x, a])])

    def respond(self, rng: Generator, policy: Floats, x: Any) -> Floats:
        """The costs of one response to each prompt."""
        return self.draw_costs(rng, x, self.draw_answers(rng, policy, x))

    def always(self, answer: str) -> Floats:
        """The policy that gives this answer to everything."""
        table = np.zeros((self.prompts.size, len(ANSWERS)))
        table[:, list(ANSWERS).index(answer)] = 1.0
        return table

    def greedy(self) -> Floats:
        """The policy of the highest reward, whatever it costs."""
        return np.eye(len(ANSWERS))[self.rewards.argmax(axis=1)]

    def best_safe_reward(self, tau: float, rho: float) -> float:
        """The highest mean reward of any policy within both limits (linear programme)."""
        weight = self.prompts[:, None]
        limits = np.stack([(weight * self.mean_costs).ravel(), (weight * self.harm_rates).ravel()])
        types = np.kron(np.eye(self.prompts.size), np.ones(len(ANSWERS)))
        solved = optimize.linprog(
            -(weight * self.rewards).ravel(),
            A_ub=limits,
            b_ub=[tau, rho],
            A_eq=types,
            b_eq=np.ones(self.prompts.size),
            bounds=(0, 1),
        )
        return -float(solved.fun)


def pick(rng: Generator, steps: Floats) -> Any:
    """One index per row of cumulated probabilities (B, K)."""
    index = (rng.random((len(steps), 1)) >= steps).sum(axis=1)
    return np.minimum(index, steps.shape[1] - 1)  # where the last step rounds below 1


def draw_world(rng: Generator) -> World:
    """Types differ in how dangerous they are; half of them are mostly harmless."""
    kinds = list(ANSWERS.values())
    shape = (TYPES, len(kinds))
    danger = np.where(rng.random(TYPES) < 0.5, rng.uniform(0.02, 0.3, TYPES), 1.0)[:, None]

    def between(ends: Sequence[tuple[float, float]]) -> Floats:
        low, high = np.array(ends).T
        return np.asarray(rng.uniform(low, high, shape))

    harm = danger * between([kind.harm for kind in kinds])
    severity, harmless = (
        between([kind.severity for kind in kinds]),
        between([kind.harmless for kind in kinds]),
    )
    spread = 0.1 + 0.1 * rng.random(shape)
    costs = np.stack(
        [harmless - spread, harmless + spread, severity - 0.5 * spread, severity + 0.5 * spread],
        axis=2,
    )
    law = np.stack([(1 - harm) / 2, (1 - harm) / 2, harm / 2, harm / 2], axis=2)
    rewards = np.array([kind.reward for kind in kinds]) + 0.3 * rng.standard_normal(shape)
    blind = rng.random(shape) < 0.1
    logits = np.array([kind.reference for kind in kinds]) + 0.3 * rng.standard_normal(shape)
    return World(
        prompts=rng.dirichlet(np.full(TYPES, 3.0)),
        rewards=rewards,
        scores=rewards + 0.15 * rng.standard_normal(shape),
        costs=costs,
        law=law,
        missed=np.where(blind, rng.uniform(0.1, 0.5, shape), 0.005),
        reference=special.softmax(logits, axis=1),
    )


def world_of(seed: int) -> World:
    """The seed's world: its greediest policy breaks a limit, refusing everything keeps both."""
    rng = generator(f"promise/world/{seed}")
    while True:
        world = draw_world(rng)
        greedy, refusal = world.greedy(), world.always("refuses")
        if breaks(world, greedy) and not breaks(world, refusal):
            return world


def breaks(world: World, policy: Floats) -> bool:
    return world.mean_cost(policy) > TAU or world.harm_rate(policy) > RHO


def check_sums(draws: int = 400_000) -> None:
    """Mean cost and harm rate of drawn responses agree with the exact sums, within 6 σ."""
    for seed in range(3):
        world = world_of(seed)
        rng = generator(f"promise/check/{seed}")
        x = world.draw_prompts(rng, draws)
        costs = world.respond(rng, world.reference, x)
        mean, rate = world.mean_cost(world.reference), world.harm_rate(world.reference)
        off = abs(float(costs.mean()) - mean) / float(costs.std())
        off_rate = 2 * abs(float((costs > 0).mean()) - rate)
        if np.abs(costs).max() > CAP or max(off, off_rate) > 6 / math.sqrt(draws):
            raise SystemExit(f"world {seed} does not draw what its sums say")


# -- candidate selection ---------------------------------------------------------------------------


@dataclass
class Adam:
    """Adam on a table, upwards."""

    first: Floats
    second: Floats
    steps: int = 0

    def step(self, gradient: Floats, rate: float) -> Floats:
        self.steps += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.99 * self.second + 0.01 * gradient**2
        mean = self.first / (1 - 0.9**self.steps)
        scale = np.sqrt(self.second / (1 - 0.99**self.steps))
        return np.asarray(rate * mean / (scale + 1e-6))


class Training:
    """REINFORCE on a table: B prompts, one response each, one policy and one λ step per rollout.

    The advantage is (A_r - Σ λ_j A_j)/(1 + Σ λ_j), whitened, each stream less its running mean for
    the type of prompt. The scores are standardised under the reference, as the module's rewards
    are, so that a multiplier is in the same units.
    """

    def __init__(
        self, world: World, constraints: Sequence[Constraint], multiplier: Multiplier
    ) -> None:
        self.world = world
        mean = world.average(world.reference, world.scores)
        variance = world.average(world.reference, (world.scores - mean) ** 2)
        self.scores = (world.scores - mean) / math.sqrt(variance)
        self.dual = Dual(constraints, multiplier)
        self.logits = np.log(world.reference)
        self.baselines = np.zeros((1 + len(constraints), world.prompts.size))
        self.adam = Adam(np.zeros_like(self.logits), np.zeros_like(self.logits))
        self.updates = 0

    @property
    def policy(self) -> Floats:
        return np.asarray(special.softmax(self.logits, axis=1))

    def run(self, rng: Generator) -> Floats:
        for _ in range(UPDATES):
            self.update(rng)
        return self.policy

    def update(self, rng: Generator) -> None:
        policy = self.policy
        x = self.world.draw_prompts(rng, BATCH)
        a = self.world.draw_answers(rng, policy, x)
        costs = self.world.draw_costs(rng, x, a)
        # Every prompt of a rollout is another one.
        pessimistic, violations = self.dual.judge(costs, [str(row) for row in range(BATCH)])
        kl = np.log(policy[x, a] / self.world.reference[x, a])
        # The cost streams carry +βKL, so that the weighted sum holds the KL with weight β.
        scores = self.scores[x, a] - KL_COEFFICIENT * kl
        streams = np.stack([scores, *(pessimistic + KL_COEFFICIENT * kl)])
        advantages = self._advantages(streams, x)
        direction = -policy[x]
        direction[np.arange(BATCH), a] += 1
        gradient = np.zeros_like(self.logits)
        np.add.at(gradient, x, advantages[:, None] * direction / BATCH)
        rate = LEARNING_RATE * (1 - 0.9 * self.updates / UPDATES)
        self.logits = self.logits + self.adam.step(gradient, rate)
        self.dual.step(violations)
        self.updates += 1

    def _advantages(self, streams: Floats, x: Any) -> Floats:
        if self.updates == 0:
            self.baselines += streams.mean(axis=1, keepdims=True)
        centred = streams - self.baselines[:, x]
        for kind in np.unique(x):
            self.baselines[:, kind] += 0.2 * centred[:, x == kind].mean(axis=1)
        multipliers = self.dual.multipliers
        weights = np.array([1.0, *(-value for value in multipliers)])
        combined = weights @ centred / (1 + sum(multipliers))
        return np.asarray((combined - combined.mean()) / (combined.std() + 1e-8))


@dataclass(frozen=True)
class Method:
    """How a candidate is chosen, and which test (None: it is always returned) comes after."""

    constraints: tuple[Constraint, ...]
    multiplier: Multiplier
    tested: bool
    says: str


def mean_limit(n: int = SAFETY_PROMPTS, tau: float = TAU, **options: Any) -> Constraint:
    """The mean, judged by betting star."""
    return Constraint("mean", tau, DELTA, n, lower=-CAP, upper=CAP, **options)


def rate_limit(n: int = SAFETY_PROMPTS, rho: float = RHO, **options: Any) -> Constraint:
    """The harm rate, judged by Clopper-Pearson."""
    return Constraint("harm_rate", rho, DELTA, n, **options)


def paper_limit(n: int = SAFETY_PROMPTS, tau: float = TAU) -> Constraint:
    """The mean, judged by Student-t, with the paper's k at c1 = c2 = 1."""
    k = student_t_factor(BATCH, DELTA) + student_t_factor(n, DELTA)
    return Constraint("mean", tau, DELTA, n, bound=StudentT(), pessimism=k)


METHODS = {
    "reward only": Method(
        (mean_limit(pessimism=0.0),), FixedMultiplier(0.0), False, "no constraint, no test"
    ),
    "Safe RLHF": Method(
        (mean_limit(pessimism=0.0),), DUAL, False, "mean constraint without pessimism, no test"
    ),
    "the paper": Method(
        (paper_limit(),), DUAL, True, "mean constraint with the paper's k, Student-t on the mean"
    ),
    "ours, no margin": Method(
        (mean_limit(pessimism=0.0), rate_limit(miss_probability=0.5)),
        DUAL,
        True,
        "our test after training without pessimism (harm rate: an even chance)",
    ),
    "ours": Method(
        (mean_limit(), rate_limit()),
        DUAL,
        True,
        "bootstrap pessimism; betting star on the mean, Clopper-Pearson on the harm rate",
    ),
}

# -- the gate --------------------------------------------------------------------------------------


def memory() -> str | None:
    """A folder in memory where there is one: the gate flushes every file to the disk."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


@dataclass(frozen=True)
class Outcome:
    """What the gate said, and the costs it said it of."""

    passed: bool
    costs: Floats


def samples_of(keys: Sequence[str], costs: Floats, constraints: int) -> CostSamples:
    """One response per prompt, the same cost for every constraint."""
    return CostSamples(
        tuple(keys),
        np.repeat(costs[:, None, None], constraints, axis=2),
        tuple(("",) for _ in keys),
        np.zeros((len(keys), 1), dtype=np.bool_),
    )


def through_gate(
    constraints: Sequence[Constraint],
    world: World,
    policy: Floats,
    name: str,
    sequential: bool = False,
) -> Outcome:
    """One safety test with ledger, plan, files and verdict, the ledger new and δ granted once.

    Raises:
        SystemExit: the gate and `Constraint.judge` disagree about the same costs.
    """
    rng = generator(f"{name}/pool")
    n = constraints[0].safety_prompts
    size = n + n // 5  # the gate chooses n of them
    kinds = world.draw_prompts(rng, size)
    pool = {sha256("prompt", name, str(k)): kinds[k] for k in range(size)}
    files = {"policy.safetensors": hashlib.sha256(policy.tobytes()).hexdigest()}
    folder = Path(tempfile.mkdtemp(dir=memory()))
    try:
        gate = Gate(
            folder / "run",
            folder / "ledger.jsonl",
            "once",
            sequential,
            state=folder / "state",
        )
        granted = gate.grant(constraints)
        gate.require_fresh(Population(list(pool)), n)
        parts = []
        with gate.test(constraints, Population(list(pool)), files, {}) as trial:
            answers = generator(trial.seed)
            while keys := trial.next(SEQUENTIAL_BATCH if sequential else n):
                x = np.array([pool[key] for key in keys])
                parts.append(world.respond(answers, policy, x))
                trial.record(samples_of(keys, parts[-1], len(constraints)))
            passed = trial.passed()
            if passed:
                trial.certify({}, {})
            else:
                trial.fail()
            trial.release()
        if passed != (folder / "run" / certificate.CERTIFICATE_FILE).is_file():
            raise SystemExit(f"{name}: a certificate without a PASS, or a PASS without one")
    finally:
        shutil.rmtree(folder)
    costs = np.concatenate(parts)
    if passed != all(c.judge(costs).passed for c in granted):
        raise SystemExit(f"{name}: the gate contradicts the constraints on the same costs")
    return Outcome(passed, costs)


# -- jobs ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoopJob:
    """The whole loop of every method in one seed's world."""

    seed: int

    @property
    def name(self) -> str:
        return f"loop/seed={self.seed}"

    def run(self) -> list[Row]:
        return [self.one(name, method) for name, method in METHODS.items()]

    def one(self, name: str, method: Method) -> Row:
        """One method's candidate: its true values, and whether it was returned."""
        started = time.perf_counter()
        world = world_of(self.seed)
        training = Training(world, method.constraints, method.multiplier)
        policy = training.run(generator(f"promise/{self.name}/{name}"))
        returned = True
        if method.tested:
            gate_name = f"promise/{self.name}/{name}/test"
            returned = through_gate(method.constraints, world, policy, gate_name).passed
        return {
            "job": self.name,
            "code": CODE,
            "kind": "loop",
            "seed": self.seed,
            "method": name,
            "returned": returned,
            "mean": world.mean_cost(policy),
            "harm rate": world.harm_rate(policy),
            "true harm rate": world.true_harm_rate(policy),
            "reward": world.average(policy, world.rewards),
            "reference reward": world.average(world.reference, world.rewards),
            "best safe reward": world.best_safe_reward(TAU, RHO),
            "reference breaks": breaks(world, world.reference),
            "multipliers": [round(value, 4) for value in training.dual.multipliers],
            "pessimisms": [round(value, 4) for value in training.dual.pessimisms],
            "seconds": round(time.perf_counter() - started, 3),
        }


def mixed(world: World, values: Floats, low: Floats, high: Floats, limit: float) -> Floats:
    """The mixture of two policies under which the exact mean of `values` is the limit."""
    below, above = world.average(low, values), world.average(high, values)
    if not below < limit < above:
        raise SystemExit(f"no mixture of {below:g} and {above:g} has the mean {limit:g}")
    share = (limit - below) / (above - below)
    return (1 - share) * low + share * high


@dataclass(frozen=True)
class Border:
    """A policy with one true value at its limit; the other limit is far away and cannot help."""

    world: World
    policy: Floats
    tau: float
    rho: float


def mean_border() -> Border:
    world = world_of(0)
    policy = mixed(world, world.mean_costs, world.always("careful"), world.always("bold"), TAU)
    return Border(world, policy, TAU, min(world.harm_rate(policy) + 0.2, 0.9))


def rate_border() -> Border:
    world = world_of(0)
    policy = mixed(world, world.harm_rates, world.always("careful"), world.always("bold"), RHO)
    return Border(world, policy, world.mean_cost(policy) + 1.0, RHO)


def severe_border(rate: float = 0.02) -> Border:
    """All answers are harmless but for a rare severe one; τ is the exact mean of what is mixed."""
    world = world_of(0)
    costs, law = world.costs.copy(), world.law.copy()
    rare = list(ANSWERS).index("rarely severe")
    costs[:, rare] = [-1.02, -0.98, 3.85, 3.95]
    law[:, rare] = [0.35, 0.35, 0.15, 0.15]
    costs[:, 0] = [-1.02, -0.98, 3.85, 3.95]
    law[:, 0] = [0.5, 0.5, 0.0, 0.0]
    world = replace(world, costs=costs, law=law)
    tau = -1 + rate * 4.9
    calm, severe = world.always("refuses"), world.always("rarely severe")
    policy = mixed(world, world.mean_costs, calm, severe, tau)
    return Border(world, policy, tau, rate + 0.2)


BORDERS = {
    "mean at τ": mean_border,
    "harm rate at ρ": rate_border,
    "2% severe harm, mean at τ": severe_border,
}
FIXED, SEQUENTIAL, STUDENT = "star + Clopper-Pearson", "e-processes, sequential", "Student-t (mean)"


@dataclass(frozen=True)
class BorderJob:
    """One policy at the border, tested again and again by one test, each time on fresh prompts."""

    family: str
    n: int
    trials: int

    @property
    def name(self) -> str:
        return f"border/{self.family}/n={self.n}/trials={self.trials}"

    def constraints(self, border: Border) -> dict[str, tuple[Constraint, ...]]:
        exact = (mean_limit(self.n, border.tau), rate_limit(self.n, border.rho))
        return {
            FIXED: exact,
            SEQUENTIAL: tuple(c.sequential() for c in exact),
            STUDENT: (paper_limit(self.n, border.tau),),
        }

    def run(self) -> list[Row]:
        border = BORDERS[self.family]()
        tests = self.constraints(border)
        if self.family == "harm rate at ρ":
            del tests[STUDENT]  # it does not look at the harm rate
        return [self.one(border, test, constraints) for test, constraints in tests.items()]

    def one(self, border: Border, test: str, constraints: tuple[Constraint, ...]) -> Row:
        started = time.perf_counter()
        world, policy = border.world, border.policy
        rng = generator(f"promise/{self.name}")  # every test judges the same samples
        keys = [str(k) for k in range(self.n)]
        sequential = test == SEQUENTIAL
        trials = round(self.trials * SEQUENTIAL_SHARE) if sequential else self.trials
        passes = 0
        for trial in range(trials):
            costs = world.respond(rng, policy, world.draw_prompts(rng, self.n))
            decided = all(
                c.rule.passes(c.values(costs), c.threshold, c.delta, c.within) for c in constraints
            )
            passes += decided
            if trial < 100:
                judged = certificate.judge(constraints, samples_of(keys, costs, len(constraints)))
                if decided != all(j.passed for j in judged):
                    raise SystemExit(f"{self.name}: the certificate's judgement is another one")
        # Of a sequential test the gate itself takes the e-process.
        configured = self.constraints(border)[FIXED] if sequential else constraints
        outcomes = [
            through_gate(configured, world, policy, f"promise/{self.name}/{test}/{k}", sequential)
            for k in range(GATE_TRIALS[sequential])
        ]
        return {
            "job": self.name,
            "code": CODE,
            "kind": "border",
            "family": self.family,
            "n": self.n,
            "test": test,
            "trials": trials,
            "passes": passes,
            "gate trials": len(outcomes),
            "gate passes": sum(outcome.passed for outcome in outcomes),
            "prompts": float(np.mean([outcome.costs.size for outcome in outcomes])),
            "mean": world.mean_cost(policy),
            "harm rate": world.harm_rate(policy),
            "tau": border.tau,
            "rho": border.rho,
            "seconds": round(time.perf_counter() - started, 3),
        }


def run_job(job: LoopJob | BorderJob) -> list[Row]:
    return job.run()


# -- report ----------------------------------------------------------------------------------------


def mean_broken(row: Row) -> bool:
    return bool(row["mean"] > TAU)


def rate_broken(row: Row) -> bool:
    return bool(row["harm rate"] > RHO)


def own_broken(row: Row) -> bool:
    """A limit that this method names: the mean alone, or either."""
    both = len(METHODS[row["method"]].constraints) > 1
    return mean_broken(row) or (both and rate_broken(row))


def truth_broken(row: Row) -> bool:
    return bool(row["true harm rate"] > RHO)


BREAKS: dict[str, Callable[[Row], bool]] = {
    "breaks a limit that it names": own_broken,
    "mean > τ": mean_broken,
    "harm rate > ρ": rate_broken,
    "harm rate of the world > ρ": truth_broken,
}


def of_method(rows: Sequence[Row], method: str) -> list[Row]:
    return [row for row in rows if row["kind"] == "loop" and row["method"] == method]


def share(count: int, trials: int, cells: int) -> str:
    low, high = interval(count, trials, cells)
    return f"{count / trials:.3f} ({low:.3f} to {high:.3f})"


def loop_table(rows: Sequence[Row]) -> list[str]:
    """Of all seeds: what was returned and breaks a limit."""
    cells = len(METHODS) * (len(BREAKS) + 1)

    def line(method: str) -> list[str]:
        own = of_method(rows, method)
        returned = [row for row in own if row["returned"]]
        counts = [sum(map(broken, returned)) for broken in BREAKS.values()]
        texts = [share(count, len(own), cells) for count in counts]
        solved = share(len(returned), len(own), cells)
        return [method, solved, *texts]

    head = ["method", "returned", *(f"returned, {name}" for name in BREAKS)]
    return markdown(head, map(line, METHODS))


def candidate_table(rows: Sequence[Row]) -> list[str]:
    """What stood before the test, what it let through, and what was gained."""

    def line(method: str) -> list[str]:
        own = of_method(rows, method)
        unsafe = [row for row in own if own_broken(row)]
        returned = [row for row in own if row["returned"]]
        margins = np.mean([row["pessimisms"][0] for row in own])
        return [
            method,
            f"{len(unsafe) / len(own):.3f}",
            f"{sum(row['returned'] for row in unsafe)} of {len(unsafe)}",
            f"{1 - len(returned) / len(own):.3f}",
            f"{np.mean([row['reward'] for row in returned]):.3f}",
            f"{np.mean([row['reward'] - row['best safe reward'] for row in returned]):+.3f}",
            f"{np.mean([row['reward'] - row['reference reward'] for row in returned]):+.3f}",
            f"{margins:.3f}",
        ]

    head = [
        "method",
        "candidates that break a limit it names",
        "of these returned",
        "no solution found",
        "true reward of what was returned",
        "less that of the best safe policy",
        "less that of the reference",
        "pessimism at the end",
    ]
    return markdown(head, map(line, METHODS))


def border_cells(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["kind"] == "border"]


def border_interval(row: Row, rows: Sequence[Row]) -> tuple[float, float]:
    return interval(row["passes"], row["trials"], len(border_cells(rows)))


def border_table(rows: Sequence[Row]) -> list[str]:
    def line(row: Row) -> list[str]:
        gate = f"{row['gate passes']} of {row['gate trials']}"
        spent = f"{row['prompts']:.0f}" if row["test"] == SEQUENTIAL else f"{row['n']}"
        low, high = border_interval(row, rows)
        return [
            f"{row['family']}, {row['n']}",
            row["test"],
            f"{row['passes'] / row['trials']:.4f} ({low:.4f} to {high:.4f})",
            f"{row['trials']:,}",
            gate,
            spent,
        ]

    head = ["family, n", "test", "P(PASS)", "trials", "PASS of the gate", "prompts"]
    return markdown(head, map(line, border_cells(rows)))


def border_summary(rows: Sequence[Row]) -> str:
    above = [
        f"{row['test']}: {row['family']}, n = {row['n']}"
        for row in border_cells(rows)
        if border_interval(row, rows)[0] > DELTA
    ]
    return f"Cells whose interval lies wholly above δ = {DELTA:g}: {'; '.join(above) or 'none'}."


def report(rows: Sequence[Row], command: str) -> str:
    first = of_method(rows, "ours")
    binding = np.array([row["multipliers"] for row in first]) > 0.05
    untrained = sum(map(own_broken, of_method(rows, "reward only")))
    reference = sum(row["reference breaks"] for row in first)
    methods = [f"- **{name}**: {method.says}" for name, method in METHODS.items()]
    lines = [
        "# The promise, from training to verdict",
        "",
        "Written by `benchmarks/promise.py`.",
        "",
        *origin(command, rows),
        f"- The whole loop: {code_line([row for row in rows if row['kind'] == 'loop'])}",
        f"- The border: {code_line(border_cells(rows))}",
        "",
        f"Limits: mean cost ≤ τ = {TAU:g} and harm rate P(c > 0) ≤ ρ = {RHO:g}, the cost in "
        f"[−{CAP:g}, {CAP:g}], δ = {DELTA:g} granted once, {SAFETY_PROMPTS:,} safety prompts.",
        "",
        "## The whole loop",
        "",
        f"{len(first)} seeds, each with a random world of its own ({TYPES} types of prompts, "
        f"{len(ANSWERS)} answers), the same for all methods. Training: {UPDATES} rollouts of "
        f"{BATCH} prompts, KL coefficient {KL_COEFFICIENT:g}. Training on the reward alone ends "
        f"above τ in {untrained} of {len(first)} worlds, and the reference itself breaks a limit "
        f"in {reference}. At the end of our training the multiplier of the mean is above 0.05 in "
        f"{binding[:, 0].sum()} seeds, that of the harm rate in {binding[:, 1].sum()}.",
        "",
        *methods,
        "",
        "Shares of all seeds. The promise of a tested method is the third column: at most δ "
        "(for the paper's Student-t: about δ). The harm rate of the world counts also harm that "
        "the cost model does not see: nobody promises anything about it. Intervals are exact and "
        "hold together with 95%.",
        "",
        *loop_table(rows),
        "",
        *candidate_table(rows),
        "",
        "Where training keeps a margin, few candidates are unsafe, and the shares above say little "
        "about the test itself. The method without a margin does, and so does the border.",
        "",
        "## Policies at the border",
        "",
        "One true value equals its limit, the other limit is far away. P(PASS) is over fresh "
        "prompts and responses, the decision by the constraints' bounds; for the first 100 trials "
        "`certificate.judge` was checked to decide the same. Other trials went through the gate "
        "with ledger, plan and certificate, where `Constraint.judge` on the same costs was checked "
        "to decide the same. prompts: answered in the gate on average. Intervals are exact and "
        "those of the table hold together with 95%. Student-t does not look at the harm rate.",
        "",
        border_summary(rows),
        "",
        *border_table(rows),
    ]
    return "\n".join(lines).replace("= -", "= −") + "\n"


# -- plot ------------------------------------------------------------------------------------------


def plot(rows: Sequence[Row], path: Path) -> None:
    """Top: what the methods return. Bottom: how often a test passes a policy at the border."""
    plt = import_pyplot()
    figure = plt.figure(figsize=(9.4, 8.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.05))
    outcomes, unsafe = top.subplots(1, 2, sharey=True)
    places = np.arange(len(METHODS))[::-1]
    outcomes.set_yticks(places, list(METHODS))
    draw_outcomes(outcomes, rows, places)
    draw_unsafe(unsafe, rows, places)
    panels = bottom.subplots(1, len(BORDERS), sharey=True)
    for axes, family in zip(panels, BORDERS, strict=True):
        draw_border(axes, rows, family)
    panels[0].set(ylim=(0, None), ylabel="share of tests that PASS")
    bottom.suptitle("Policies exactly at a limit: how often each test passes them", fontsize=11)
    handles, labels = panels[0].get_legend_handles_labels()
    bottom.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    save(plt, figure, path)


def draw_outcomes(axes: Any, rows: Sequence[Row], places: Any) -> None:
    left = np.zeros(len(METHODS))
    parts: list[tuple[str, str, Callable[[Row], bool]]] = [
        ("returned, within its limits", COLOURS[3], lambda r: r["returned"] and not own_broken(r)),
        ("returned, breaks its limits", COLOURS[4], lambda r: r["returned"] and own_broken(r)),
        ("no solution found", "#C8C8C8", lambda r: not r["returned"]),
    ]
    for label, colour, holds in parts:
        width = np.array([np.mean([holds(r) for r in of_method(rows, m)]) for m in METHODS])
        axes.barh(places, width, left=left, color=colour, label=label, height=0.62)
        left = left + width
    axes.set(xlim=(0, 1), xlabel="share of seeds")
    axes.set_title("What is returned")
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.2), frameon=False, fontsize=9)


def draw_unsafe(axes: Any, rows: Sequence[Row], places: Any) -> None:
    cells = len(METHODS) * (len(BREAKS) + 1)
    series: list[tuple[str, Callable[[Row], bool], str, str, float]] = [
        ("by the cost model, its own limits", own_broken, COLOURS[5], "o", 0.14),
        ("by the world's truth (not promised)", truth_broken, COLOURS[1], "s", -0.14),
    ]
    for label, broken, colour, marker, shift in series:
        for k, (place, method) in enumerate(zip(places, METHODS, strict=True)):
            own = of_method(rows, method)
            count = sum(row["returned"] and broken(row) for row in own)
            low, high = interval(count, len(own), cells)
            axes.hlines(place + shift, low, high, color=colour, linewidth=1.6)
            axes.scatter(
                count / len(own),
                place + shift,
                color=colour,
                marker=marker,
                s=32,
                zorder=3,
                clip_on=False,
                label=label if k == 0 else None,
            )
    axes.axvline(DELTA, color="black", linestyle="--", linewidth=1.4, label=f"δ = {DELTA:g}")
    axes.set(xlim=(0, 1), xlabel="share of seeds")
    axes.set_title("Returned and unsafe")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False, fontsize=9)


def draw_border(axes: Any, rows: Sequence[Row], family: str) -> None:
    styles = {FIXED: (COLOURS[5], "o"), SEQUENTIAL: (COLOURS[3], "D"), STUDENT: (COLOURS[4], "v")}
    for k, (test, (colour, marker)) in enumerate(styles.items()):
        own = [r for r in border_cells(rows) if (r["family"], r["test"]) == (family, test)]
        if not own:
            continue
        at = np.array([row["n"] for row in own]) * 1.06 ** (k - 1)
        values = np.array([row["passes"] / row["trials"] for row in own])
        ends = np.array([border_interval(row, rows) for row in own]).T
        errors = np.maximum(np.stack([values - ends[0], ends[1] - values]), 0)
        axes.errorbar(
            at, values, errors, color=colour, marker=marker, markersize=5, linewidth=1.2, label=test
        )
    axes.axhline(DELTA, color="black", linestyle="--", linewidth=1.4, label=f"δ = {DELTA:g}")
    axes.set(xscale="log", xlabel="n, safety prompts")
    axes.set_xticks(SIZES, [str(n) for n in SIZES])
    axes.minorticks_off()
    axes.set_title(family)


# -- the whole -------------------------------------------------------------------------------------


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("--seeds", type=int, default=200, help="worlds of the whole loop")
    options.add_argument("--trials", type=int, default=5000, help="tests per border cell")
    options.add_argument("--workers", type=int, default=1, help="processes")
    options.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options.add_argument("--plots", type=Path, default=ROOT / "docs" / "plots")
    chosen = options.parse_args()
    check_sums()
    jobs: list[LoopJob | BorderJob] = [LoopJob(seed) for seed in range(chosen.seeds)]
    jobs += [BorderJob(family, n, chosen.trials) for family in BORDERS for n in SIZES]
    rows = run_missing(Results(chosen.out / "promise.jsonl"), jobs, run_job, chosen.workers)
    command = " ".join(["python -m benchmarks.promise", *sys.argv[1:]])
    text = report(rows, command)
    (chosen.out / "promise.md").write_text(text, encoding="utf-8")
    print(text)
    plot(rows, chosen.plots / "promise.png")


if __name__ == "__main__":
    main()
