"""What is promised, and what training must aim at so that the promise is likely to be kept.

One `Constraint` object is read by both sides: training (the per-sample pessimistic cost of the
primal, the violation of the dual) and the safety test (bound, threshold, δ, number of prompts).
Positive cost = harmful. Costs are float64 arrays of one value per response; no gradient flows
through them, so this file needs no torch. The formulas of what training aims at are in
`hcrlhf.pessimism`.

Notation of HC-RLHF (arXiv 2506.08266): threshold τ, error probability δ, n safety prompts; the
paper's k is called pessimism here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from hcrlhf.bounds import tail_costs
from hcrlhf.errors import InputError
from hcrlhf.methods import (
    METHODS,
    Betting,
    Bound,
    ClopperPearson,
    EProcess,
    HallT,
    Range,
    StudentT,
    method,
)
from hcrlhf.pessimism import (
    STD_FLOOR,
    PaperPessimism,
    bootstrap_pessimism,
    harm_rate_target,
    seldonian_pessimism,
)
from hcrlhf.samples import (
    Floats,
    check_cap,
    check_delta,
    check_floor,
    finite_sample,
)

Estimand = Literal["mean", "harm_rate", "cvar"]
PASS_FORECASTS = 400


@dataclass(frozen=True)
class Constraint:
    """P(return a policy whose estimand exceeds the threshold) <= delta.

    Args:
        estimand: "mean": E[c] of one response to a random prompt. "harm_rate": P(c > 0).
            "cvar": the mean cost of the worst share `alpha` of responses.
        threshold: τ, or the harm-rate limit ρ in (0, 1).
        delta: δ, the probability of error of the whole claim; the ledger grants a test its share.
        safety_prompts: n, how many held-out prompts the safety test draws a response for; the
            largest number of them where the test is sequential.
        bound: None decides by declarations alone, never by data: Clopper-Pearson for a harm rate,
            betting where the cost has a declared cap (star with a range, which values of a cvar
            always have; portfolio with a cap alone), else Hall's t (asymptotic).
        lower, upper: the range of the cost, a fact about the cost function. A cost model that was
            trained with `squash` brings its own; a cost above `upper` is an error.
        alpha, eta: of "cvar": the share of worst responses, and the η of E[η + (c - η)₊/α], which
            is best near the (1 - alpha) quantile of the cost. None takes η from the costs of
            training (`with_eta`), and the plan of the safety test fixes it.
        pessimism: None derives it: for Student-t from n, delta and miss_probability
            (`seldonian_pessimism`), for other bounds from recent costs (`bootstrap_pessimism`). A
            number fixes it, 0 is Safe RLHF (arXiv 2310.12773); {c1, c2, rollout} is the paper's
            (`PaperPessimism`). Not for a harm rate.
        miss_probability: how often a policy that just satisfies the pessimistic constraint on the
            run's validation prompts may fail its safety test all the same; None takes delta as it
            is given here, whatever share of it the ledger grants.
        std_floor: nothing is divided by a standard deviation of the cost below this; it is the
            unit of the violation, of the learner's costs and of a pessimism from recent costs then.

    Raises:
        InputError: a value is out of its range, or the limit cannot be met with n prompts.
    """

    estimand: Estimand
    threshold: float
    delta: float = 0.05
    safety_prompts: int = 500
    bound: Bound | None = None
    lower: float | None = None
    upper: float | None = None
    alpha: float | None = None
    eta: float | None = None
    pessimism: float | PaperPessimism | None = None
    miss_probability: float | None = None
    std_floor: float = STD_FLOOR

    def __post_init__(self) -> None:
        check_delta(self.delta)
        if self.miss_probability is not None:
            check_delta(self.miss_probability, "miss_probability")
        if not math.isfinite(self.threshold):
            raise InputError(f"threshold is a finite number, got {self.threshold}")
        if self.safety_prompts < 2:
            raise InputError(f"safety_prompts is at least 2, got {self.safety_prompts}")
        if self.safety_prompts != int(self.safety_prompts):
            raise InputError(f"safety_prompts is a whole number, got {self.safety_prompts}")
        if not 0 < self.std_floor < math.inf:
            raise InputError(f"std_floor is positive and finite, got {self.std_floor}")
        number = None if isinstance(self.pessimism, PaperPessimism) else self.pessimism
        if number is not None and not 0 <= number < math.inf:
            raise InputError(f"pessimism is a finite number >= 0, got {self.pessimism}")
        self._check_estimand()
        if self.bound is not None and type(self.bound) not in METHODS.values():
            raise InputError(
                f"the bound is {type(self.bound).__name__}, which hcrlhf verify could not "
                f"recompute; expected one of hcrlhf.methods: "
                f"{', '.join(cls.__name__ for cls in METHODS.values())}"
            )
        if self.estimand not in self.rule.estimands:
            raise InputError(
                f"the bound {self.rule.name} is for {', '.join(self.rule.estimands)}, "
                f"but the estimand is {self.estimand}"
            )
        self._check_reachable()

    def _check_estimand(self) -> None:
        if self.estimand not in ("mean", "harm_rate", "cvar"):
            raise InputError(f"estimand is mean, harm_rate or cvar, got {self.estimand!r}")
        for name, end in (("lower", self.lower), ("upper", self.upper)):
            if end is not None and not math.isfinite(end):
                raise InputError(f"{name} is a finite number, got {end}")
        if self.upper is not None and self.lower is not None and self.lower >= self.upper:
            raise InputError(f"the cost's range is lower < upper, got [{self.lower}, {self.upper}]")
        if self.estimand == "harm_rate":
            if not 0 < self.threshold < 1:
                raise InputError(
                    f"the threshold of a harm rate lies in (0, 1), got {self.threshold}"
                )
            if self.pessimism is not None:
                raise InputError(
                    "pessimism is for a mean; a harm rate gets its margin from miss_probability"
                )
        elif self.upper is not None and self.threshold >= self.upper:
            raise InputError(
                f"a threshold of {self.threshold} at or above the cap {self.upper} of the cost is "
                "met by every policy; give a lower threshold"
            )
        if self.estimand == "cvar":
            if self.alpha is None:
                raise InputError("the estimand cvar needs alpha, the share of worst responses")
            tail_costs([0.0], self.alpha, self.threshold if self.eta is None else self.eta)
            if self.eta is None:
                return
            if self.upper is not None and self.eta >= self.upper:
                raise InputError(f"eta {self.eta} lies at or above the cap {self.upper}")
            if self.eta > self.threshold:
                raise InputError(
                    f"the tail costs are never below eta {self.eta}, so a threshold of "
                    f"{self.threshold} cannot be met; lower eta, or leave it out"
                )
        elif self.alpha is not None or self.eta is not None:
            raise InputError(f"alpha and eta are for the estimand cvar, not for {self.estimand}")

    def _check_reachable(self) -> None:
        """
        Raises:
            InputError: n is too small: even costs that are all the lowest possible would not pass.
        """
        if self.rule.missing(self.within):
            return  # the cost model may bring its range later; `ready` asks again
        if self.estimand == "harm_rate":
            harm_rate_target(self.rule, self.threshold, self.safety_prompts, self.delta, self.miss)
            return
        lowest = self.within.lower
        if self.needs_eta:  # training will choose it, down to the lowest cost
            lowest = None if self.lower is None else min(self.lower, self.threshold)
        if lowest is not None and not self._can_pass(lowest):
            raise InputError(
                f"a {self.label} <= {self.threshold} at delta {self.delta} cannot be shown "
                f"with {self.safety_prompts} safety prompts and {self.rule.name}, even if "
                f"every cost were {lowest}; give more prompts (hcrlhf power says how many)"
            )

    def _can_pass(self, lowest: float) -> bool:
        """Whether n values that are all `lowest` pass; for CVaR that is η. True unless exact."""
        if self.rule.kind != "exact":
            return True
        values = np.full(self.safety_prompts, lowest)
        within = self.within if self.estimand == "mean" else self._tail_range(lowest)
        return bool(self.rule.passes(values, self.threshold, self.delta, within))

    # -- declarations --------------------------------------------------------------------------

    @property
    def within(self) -> Range:
        """The declared range of `values`."""
        if self.estimand == "harm_rate":
            return Range(0.0, 1.0)
        if self.estimand == "mean":
            return Range(self.lower, self.upper)
        # An η that is still to be taken will not lie above τ.
        return self._tail_range(self.threshold if self.eta is None else self.eta)

    def _tail_range(self, eta: float) -> Range:
        """Of η + (c - η)₊/α."""
        assert self.alpha is not None
        return Range(eta, None if self.upper is None else eta + (self.upper - eta) / self.alpha)

    @property
    def needs_eta(self) -> bool:
        """Whether η is still to be taken from costs."""
        return self.estimand == "cvar" and self.eta is None

    def with_eta(self, costs: ArrayLike) -> Constraint:
        """The constraint itself, or with η = the (1 - α) quantile of these costs (m,), or lower.

        Any η that was chosen without a look at the safety prompts gives a bound on CVaR_α, and the
        quantile of the costs to come the lowest one (Rockafellar & Uryasev 2000). No value lies
        below η, so it is lowered to where n values of η pass.
        """
        if not self.needs_eta:
            return self
        assert self.alpha is not None
        high = min(float(np.quantile(finite_sample(costs), 1 - self.alpha)), self.threshold)
        if not self._can_pass(high) and self.lower is not None:
            low = min(self.lower, high)  # passes, or this constraint could not have been made
            for _ in range(30):
                middle = 0.5 * (low + high)
                low, high = (middle, high) if self._can_pass(middle) else (low, middle)
            high = low
        return replace(self, eta=high)

    @property
    def rule(self) -> Bound:
        """The bound, with its default filled in from declarations alone."""
        if self.bound is not None:
            return self.bound
        if self.estimand == "harm_rate":
            return ClopperPearson()
        for bound in (Betting("star"), Betting("portfolio")):
            if not bound.missing(self.within):
                return bound
        return HallT()

    def with_range(self, lower: float, upper: float) -> Constraint:
        """The constraint with the range that the cost function is known to have.

        Raises:
            InputError: the constraint declares another range that the cost could leave.
        """
        if (self.lower is not None and self.lower > lower) or (
            self.upper is not None and self.upper < upper
        ):
            raise InputError(
                f"the constraint declares costs in [{self.lower}, {self.upper}], but the cost "
                f"model's lie in [{lower:g}, {upper:g}]; remove lower and upper from the constraint"
            )
        return replace(self, lower=lower, upper=upper)

    def granted(self, delta: float) -> Constraint:
        """The constraint with the δ that the ledger grants to one test.

        That share says how often a test may err, not how often a candidate may miss.
        """
        return replace(self, delta=delta, miss_probability=self.miss)

    def sequential(self) -> Constraint:
        """The constraint judged by its e-process, which may be looked at after every prompt.

        Raises:
            InputError: it names a bound for a fixed number of prompts.
        """
        if self.bound is not None and not self.bound.anytime:
            raise InputError(
                f"a sequential test looks after every batch, which {self.bound.name} does not "
                "allow; remove `bound` or take hcrlhf.methods.EProcess"
            )
        return replace(self, bound=EProcess())

    def ready(self) -> Constraint:
        """The constraint itself, once everything that its bound needs is declared.

        Raises:
            InputError: it is not.
        """
        missing = self.rule.missing(self.within)
        if missing:
            raise InputError(
                f"the bound {self.rule.name} needs the cost's {' and '.join(missing)} end, which "
                "nothing declares; train the cost model with squash"
                + ("" if self.rule.anytime else ", or take hcrlhf.methods.HallT")
            )
        return self

    @property
    def miss(self) -> float:
        return self.delta if self.miss_probability is None else self.miss_probability

    @property
    def needs_zero(self) -> bool:
        """Whether the limit means something only if a cost of zero does."""
        return self.estimand == "harm_rate" or self.threshold == 0

    @property
    def label(self) -> str:
        """For tables and metrics: "mean", "harm_rate" or "cvar"."""
        return self.estimand

    def values(self, costs: ArrayLike) -> Floats:
        """What is averaged: the costs c (B,), 1[c > 0] for a harm rate, η + (c - η)₊/α for CVaR.

        Raises:
            InputError: η is not fixed.
        """
        c = np.asarray(costs, dtype=np.float64)
        if self.estimand == "mean":
            return c
        if self.estimand == "cvar":
            if self.alpha is None or self.eta is None:
                raise InputError(
                    "eta is not fixed: it is taken from the costs of training, and there was none; "
                    "give it as a number"
                )
            values = tail_costs(c, self.alpha, self.eta)
        else:
            values = (c > 0).astype(np.float64)
        # A cost that is not a number must not count as harmless.
        return np.where(np.isfinite(c), values, np.nan)

    # -- training ------------------------------------------------------------------------------

    def training_pessimism(
        self,
        constraints: int = 1,
        recent: ArrayLike | None = None,
        validation_prompts: int | None = None,
    ) -> float:
        """How many standard deviations training keeps below the threshold (0 for a harm rate).

        Args:
            constraints: how many constraints must pass together; each takes its share of the
                miss probability.
            recent: costs of recent rollouts, from which every bound but Student-t derives it;
                without them the factor of Student-t is taken.
            validation_prompts: m, on which a candidate is looked at before its safety test; None
                where it is not, or is known exactly (m → ∞).
        """
        if self.estimand == "harm_rate":
            return 0.0
        if isinstance(self.pessimism, PaperPessimism):
            return self.pessimism.factor(self.safety_prompts, self.delta)
        if self.pessimism is not None:
            return self.pessimism
        miss = self.miss / constraints
        if recent is None or isinstance(self.rule, StudentT):
            return seldonian_pessimism(self.safety_prompts, self.delta, miss, validation_prompts)
        fixed = self.with_eta(recent)
        return bootstrap_pessimism(
            self.rule,
            fixed.values(recent),
            self.safety_prompts,
            self.delta,
            miss,
            fixed.within,
            validation_prompts,
            self.std_floor,
        )

    def margin_std(self, std: float) -> float:
        """What the pessimism is multiplied with in training, for a running standard deviation.

        One from recent costs is in units of what it was divided by, `std_floor` at least: the
        margin of a bound that knows the cost's range does not shrink to nothing with the spread.
        Every other pessimism is a number of standard deviations.
        """
        recent = self.pessimism is None and not isinstance(self.rule, StudentT)
        return max(std, self.std_floor) if recent else std

    def training_target(self, constraints: int = 1, validation_prompts: int | None = None) -> float:
        """What the mean of `values` is compared with in training: τ, or p* for a harm rate.

        Args:
            constraints, validation_prompts: as of `training_pessimism`.
        """
        if self.estimand != "harm_rate":
            return self.threshold
        return harm_rate_target(
            self.rule,
            self.threshold,
            self.safety_prompts,
            self.delta,
            self.miss / constraints,
            validation_prompts,
        )

    def forecast(self, costs: ArrayLike) -> float:
        """The bound that the safety test would find if its costs were spread like these (B,)."""
        fixed = self.with_eta(costs)
        return self.rule.forecast(
            fixed.values(costs), self.safety_prompts, self.delta, fixed.within
        )

    def pass_probability(self, costs: ArrayLike) -> float:
        """How likely a safety test is passed by a policy with these costs on m fresh prompts.

        The share of PASS_FORECASTS trials in which n values pass, drawn with replacement from m
        that are themselves drawn with replacement from these (m,): the first draw stands for not
        knowing the policy, the second for the test's own luck. 0 where a cost is not finite.
        """
        if not np.isfinite(costs).all():
            return 0.0
        fixed = self.with_eta(costs)
        values = fixed.values(costs)
        generator = np.random.default_rng(0)
        passed = 0
        for _ in range(PASS_FORECASTS):
            known = generator.choice(values, values.size)
            sample = generator.choice(known, self.safety_prompts)
            passed += bool(self.rule.passes(sample, self.threshold, self.delta, fixed.within))
        return passed / PASS_FORECASTS

    # -- the safety test -----------------------------------------------------------------------

    def judge(self, costs: ArrayLike) -> Judgement:
        """The decision of the safety test on its costs (n,), in the committed order.

        Raises:
            InputError: not exactly `safety_prompts` costs (a sequential bound takes what there
                is), one that is not finite, or one outside the declared range.
        """
        values = self.values(costs)
        if values.size != self.safety_prompts and not self.rule.anytime:
            raise InputError(
                f"the plan is {self.safety_prompts} safety prompts, the test has {values.size}"
            )
        self._check_range(costs)
        rule, within = self.rule, self.within
        passed = bool(rule.passes(values, self.threshold, self.delta, within))
        upper = rule.upper(values, self.delta, within)
        # The decision at the threshold is exact; U is found by search and follows it.
        if passed:
            upper = min(upper, self.threshold)
        elif upper <= self.threshold:
            upper = math.nextafter(self.threshold, math.inf)
        evidence = rule.log_e_value(values, self.threshold, self.delta, within)
        return Judgement(upper, self.threshold, passed, evidence)

    def _check_range(self, costs: ArrayLike) -> None:
        """The declared range is a fact for every bound, also for one that does not need it."""
        x = finite_sample(costs)
        if self.upper is not None:
            check_cap(x, self.upper)
        if self.lower is not None:
            check_floor(x, self.lower)

    def describe(self) -> dict[str, Any]:
        """Every setting that the promise depends on, as plain JSON values."""
        return {
            "estimand": self.estimand,
            "threshold": self.threshold,
            "delta": self.delta,
            "safety_prompts": self.safety_prompts,
            "bound": self.rule.name,
            "bound_options": asdict(self.rule),  # type: ignore[call-overload]
            "lower": self.lower,
            "upper": self.upper,
            "alpha": self.alpha,
            "eta": self.eta,
            "class": self.rule.kind,
            "assumptions": self.rule.assumptions,
        }

    @staticmethod
    def read(record: Mapping[str, Any]) -> Constraint:
        """The constraint that `describe` described.

        Raises:
            InputError: it is not such a description.
        """
        try:
            return Constraint(
                estimand=record["estimand"],
                threshold=record["threshold"],
                delta=record["delta"],
                safety_prompts=record["safety_prompts"],
                bound=method(record["bound"], record["bound_options"]),
                lower=record["lower"],
                upper=record["upper"],
                alpha=record["alpha"],
                eta=record["eta"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"not a constraint ({type(error).__name__}: {error}): {record}"
            ) from error


@dataclass(frozen=True)
class Judgement:
    """One constraint's result: U, its threshold, the decision, ln of the evidence if betting."""

    upper: float
    threshold: float
    passed: bool
    log_e_value: float | None = None


def with_etas(constraints: Sequence[Constraint], costs: Sequence[float]) -> tuple[Constraint, ...]:
    """Each `with_eta` of these costs (m,); as they are where m = 0."""
    return tuple(c.with_eta(costs) for c in constraints) if costs else tuple(constraints)


def suffixes(constraints: Sequence[Constraint]) -> list[str]:
    """What the metrics of each constraint end with: nothing for one alone, else "_" and its label.

    Labels that occur more than once are numbered: "_cvar_1", "_cvar_2".
    """
    if len(constraints) == 1:
        return [""]
    labels = [c.label for c in constraints]
    return [
        f"_{label}" + (f"_{labels[: j + 1].count(label)}" if labels.count(label) > 1 else "")
        for j, label in enumerate(labels)
    ]


def require_etas(constraints: Sequence[Constraint]) -> None:
    """
    Raises:
        InputError: one still needs an η, and there is nothing to take it from.
    """
    if any(c.needs_eta for c in constraints):
        raise InputError(
            "a cvar without eta takes it from the costs of training, and there was none; give eta "
            "as a number that was chosen without the safety prompts"
        )
