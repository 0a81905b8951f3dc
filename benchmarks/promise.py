"""The promise itself, from training to verdict, in worlds where every true value is known.

    python -m benchmarks.promise

A world is a table: types of prompts, answers, rewards, and for every (type, answer) a discrete law
of the cost, so that the mean cost and the harm rate of any policy are exact sums. Every seed draws
a world of its own; in each of them the answers that pay most are harmful, some of them rarely but
severely, and the policy of the highest reward breaks a limit. A cost model can be wrong: beside the
harm that it sees stands the world's own, which no method can see.

The loop: REINFORCE on a softmax table, with the project's own constraint, pessimism, spread,
violation and multiplier, one dual step per rollout, as in lightning_modules/policy.py; then the
project's gate with a fresh ledger. Counted is how often a method returns a policy that breaks a
limit.

The border: policies mixed so that one true value equals its limit, where a test errs most often.
A PASS there is an error in the limit: a policy the least bit worse breaks the promise.

Every seed is the SHA-256 of a name. What stands in promise.jsonl is not run again, so the same
command resumes; delete the file after a change of the code that is measured.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
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
    parser,
    run_missing,
    save,
)
from hcrlhf import certificate
from hcrlhf.bounds import student_t_factor
from hcrlhf.constraint import (
    Constraint,
    RunningVariance,
    pairwise_spread,
    pessimistic_costs,
    violation,
)
from hcrlhf.gate import Gate, Population
from hcrlhf.hashing import sha256
from hcrlhf.methods import StudentT
from hcrlhf.multiplier import FixedMultiplier, Multiplier, ProjectedMultiplier
from hcrlhf.safety import CostSamples

CAP = 4.0  # the squashed cost lies in [-4, 4]
DELTA = 0.05
TAU = -0.8  # limit of the mean cost
RHO = 0.1  # limit of the harm rate P(c > 0)
SAFETY_PROMPTS = 1000
BATCH = 64
UPDATES = 200
KL_COEFFICIENT = 0.05
LEARNING_RATE = 0.1
TYPES, ATOMS = 8, 4

SIZES = (100, 300, 1000)
GATE_TRIALS = 300  # border trials of a cell that go through the gate, ledger and files included
SEQUENTIAL_BATCH = 100

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
    the type of prompt. What concerns the constraints is done by the project, in the order of
    lightning_modules/policy.py.
    """

    def __init__(
        self, world: World, constraints: Sequence[Constraint], multiplier: Multiplier
    ) -> None:
        self.world = world
        self.constraints = tuple(constraints)
        self.multiplier = multiplier
        self.logits = np.log(world.reference)
        self.multipliers = [multiplier.initial for _ in constraints]
        self.variances = [RunningVariance(c.std_floor) for c in constraints]
        self.recent_costs: list[float] = []
        self.pessimisms = [0.0 for _ in constraints]
        self.baselines = np.zeros((1 + len(self.constraints), world.prompts.size))
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
        streams, violations = self._constrain(self.world.scores[x, a], costs)
        kl = np.log(policy[x, a] / self.world.reference[x, a])
        # The cost streams carry +βKL, so that the weighted sum holds the KL with weight β.
        sign = np.array([-1.0, *(1.0 for _ in self.constraints)])[:, None]
        streams = streams + sign * KL_COEFFICIENT * kl
        advantages = self._advantages(streams, x)
        direction = -policy[x]
        direction[np.arange(BATCH), a] += 1
        gradient = np.zeros_like(self.logits)
        np.add.at(gradient, x, advantages[:, None] * direction / BATCH)
        rate = LEARNING_RATE * (1 - 0.9 * self.updates / UPDATES)
        self.logits = self.logits + self.adam.step(gradient, rate)
        self.multipliers = [
            self.multiplier.update(value, g)
            for value, g in zip(self.multipliers, violations, strict=True)
        ]
        self.updates += 1

    def _constrain(self, scores: Floats, costs: Floats) -> tuple[Floats, list[float]]:
        streams, violations = [scores], []
        count = len(self.constraints)
        keys = [str(row) for row in range(BATCH)]  # every prompt of a rollout is another one
        self._remember(costs)
        for constraint, variance, pessimism in zip(
            self.constraints, self.variances, self.pessimisms, strict=True
        ):
            values = constraint.values(costs)
            spread = pairwise_spread(values, keys)
            current = float(spread.mean()) / 2
            std = variance.std(current)
            streams.append(pessimistic_costs(values, spread, pessimism, std))
            target = constraint.training_target(count)
            violations.append(violation(float(values.mean()), std, pessimism, target))
            variance.update(current)
        return np.stack(streams), violations

    def _remember(self, costs: Floats) -> None:
        capacity = max(c.safety_prompts for c in self.constraints)
        every = max(1, capacity // costs.size)
        self.recent_costs = [*self.recent_costs, *costs.tolist()][-capacity:]
        if self.updates % every == 0:
            count = len(self.constraints)
            self.pessimisms = [
                c.training_pessimism(count, self.recent_costs) for c in self.constraints
            ]

    def _advantages(self, streams: Floats, x: Any) -> Floats:
        if self.updates == 0:
            self.baselines += streams.mean(axis=1, keepdims=True)
        centred = streams - self.baselines[:, x]
        for kind in np.unique(x):
            self.baselines[:, kind] += 0.2 * centred[:, x == kind].mean(axis=1)
        weights = np.array([1.0, *(-value for value in self.multipliers)])
        combined = weights @ centred / (1 + sum(self.multipliers))
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


DUAL = ProjectedMultiplier()
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
                trial.release()
            else:
                trial.fail()
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
            "multipliers": [round(value, 4) for value in training.multipliers],
            "pessimisms": [round(value, 4) for value in training.pessimisms],
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
TESTS = (FIXED, SEQUENTIAL, STUDENT)


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
        passes = 0
        for trial in range(self.trials):
            costs = world.respond(rng, policy, world.draw_prompts(rng, self.n))
            decided = all(
                c.rule.passes(c.values(costs), c.threshold, c.delta, c.within) for c in constraints
            )
            passes += decided
            if trial < 100:
                judged = certificate.judge(constraints, samples_of(keys, costs, len(constraints)))
                if decided != all(j.passed for j in judged):
                    raise SystemExit(f"{self.name}: the certificate's judgement is another one")
        sequential = test == SEQUENTIAL
        # Of a sequential test the gate itself takes the e-process.
        configured = self.constraints(border)[FIXED] if sequential else constraints
        outcomes = [
            through_gate(configured, world, policy, f"promise/{self.name}/{test}/{k}", sequential)
            for k in range(GATE_TRIALS)
        ]
        return {
            "job": self.name,
            "kind": "border",
            "family": self.family,
            "n": self.n,
            "test": test,
            "trials": self.trials,
            "passes": passes,
            "gate trials": GATE_TRIALS,
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
