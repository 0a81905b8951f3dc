"""Upper confidence bounds U with P(U < true value) <= δ over the draw of the sample. No torch.

x_1..x_n are costs, one per prompt, float64; x̄ their mean, s their standard deviation (ddof 1).
Every U is on the mean unless it says otherwise. Two classes:

- exact: holds at every n, for every distribution that meets the assumption;
- asymptotic: only as n grows; for rare severe harm it can err far more often than δ, and so is
  never called a guarantee without that word (docs/guarantee.md has the measured error rates).

`lower` and `upper` are facts about the cost function, declared before there are data: a cost above
`upper` is an error and is never clipped. Bounds by betting are in betting.py; what a constraint
swaps by class_path is in methods.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from hcrlhf.betting import betting_upper
from hcrlhf.errors import InputError
from hcrlhf.samples import (
    Floats,
    check_delta,
    check_range,
    finite_sample,
    has_spread,
    smallest_rejected,
)

# -- asymptotic ------------------------------------------------------------------------------------


def _t_quantile(n: int, delta: float) -> float:
    """t_{1-δ, n-1}; +∞ where δ is too small for scipy, which then gives -∞."""
    quantile = -float(special.stdtrit(n - 1, check_delta(delta)))
    return quantile if math.isfinite(quantile) else math.inf


def student_t_factor(n: int, delta: float) -> float:
    """t_{1-δ, n-1} / √n: how many standard deviations the bound lies above the mean."""
    if n < 2:
        raise InputError(f"Student-t needs at least 2 costs, got {n}")
    return _t_quantile(n, delta) / math.sqrt(n)


def student_t_upper(costs: ArrayLike, delta: float) -> float:
    """x̄ + s/√n · t_{1-δ, n-1}; +∞ where s = 0. Asymptotic.

    Assumes independent costs whose mean is nearly normal. A sample without any spread says nothing
    about rare harm, so it never gives a finite bound.

    Student (1908); the bound of HC-RLHF (arXiv 2506.08266).
    """
    x = finite_sample(costs)
    factor = student_t_factor(x.size, delta)
    if not has_spread(x):
        return math.inf
    return float(x.mean() + x.std(ddof=1) * factor)


def hall_t_upper(costs: ArrayLike, delta: float) -> float:
    """The larger of Student-t and x̄ - s/√n · g⁻¹(t_{δ, n-1}); +∞ where s = 0. Asymptotic.

    g(T) = T + γT²/(3√n) + γ²T³/(27n) + γ/(6√n), γ the biased sample skewness, corrects the t
    statistic for skewness. With a = γ/(3√n), g(T) = ((1 + aT)³ - 1)/(3a) + a/2 is inverted in
    closed form.

    Assumes independent costs with a third moment, no lattice. Hall (1992), Johnson (1978).
    """
    x = finite_sample(costs)
    student = student_t_upper(x, delta)
    if math.isinf(student):
        return student
    centred = (x - x.mean()) / x.std()
    skewness = float(np.mean(centred**3))
    a = skewness / (3 * math.sqrt(x.size))
    shifted = -_t_quantile(x.size, delta) - a / 2
    root = math.copysign(abs(1 + 3 * a * shifted) ** (1 / 3), 1 + 3 * a * shifted)
    inverse = 3 * shifted / (root * root + root + 1)  # = (root - 1)/a, also at a = 0
    return max(student, float(x.mean() - x.std(ddof=1) / math.sqrt(x.size) * inverse))


# -- exact, for costs in [lower, upper] ------------------------------------------------------------


def hoeffding_upper(costs: ArrayLike, delta: float, lower: float, upper: float) -> float:
    """x̄ + (b - a) √(ln(1/δ) / 2n), for costs in [a, b]. Exact. Hoeffding (1963)."""
    x = finite_sample(costs)
    check_range(x, lower, upper)
    margin = math.sqrt(-math.log(check_delta(delta)) / (2 * x.size))
    return float(x.mean() + (upper - lower) * margin)


def empirical_bernstein_upper(costs: ArrayLike, delta: float, lower: float, upper: float) -> float:
    """x̄ + √(2 s² ln(2/δ) / n) + 7 (b - a) ln(2/δ) / (3(n - 1)), for costs in [a, b]. Exact.

    Maurer and Pontil (2009), Theorem 4.
    """
    x = finite_sample(costs, at_least=2)
    check_range(x, lower, upper)
    log = math.log(2 / check_delta(delta))
    spread = math.sqrt(2 * float(x.var(ddof=1)) * log / x.size)
    return float(x.mean() + spread + 7 * (upper - lower) * log / (3 * (x.size - 1)))


def hoeffding_bentkus_upper(costs: ArrayLike, delta: float, lower: float, upper: float) -> float:
    """a + (b - a) · sup{m : min(e^{-n KL(min(ū, m) ‖ m)}, e P(Bin(n, m) <= ⌈Σu⌉)) > δ}. Exact.

    u = (x - a)/(b - a) in [0, 1]; KL between Bernoulli distributions; the sum is exact (fsum) and
    a sum that is whole but for rounding is not rounded up.

    Bentkus (2004); the combination: Bates et al. (2021).
    """
    x = finite_sample(costs)
    check_range(x, lower, upper)
    check_delta(delta)
    u = (x - lower) / (upper - lower)
    mean = min(math.fsum(u) / u.size, 1.0)
    whole = math.ceil(math.fsum(u) - 1e-9)

    def rejected(m: float) -> bool:
        hoeffding = math.exp(-u.size * bernoulli_divergence(min(mean, m), m))
        return min(hoeffding, math.e * float(special.bdtr(whole, u.size, m))) <= delta

    return lower + (upper - lower) * smallest_rejected(rejected, mean, 1.0)


def bernoulli_divergence(p: float, q: float) -> float:
    """KL(p ‖ q) = p ln(p/q) + (1 - p) ln((1 - p)/(1 - q)), between Bernoulli distributions."""
    return float(special.rel_entr(p, q) + special.rel_entr(1 - p, 1 - q))


# -- exact, without a range ------------------------------------------------------------------------


def clopper_pearson_upper(harmful: int, n: int, delta: float) -> float:
    """The (1 - δ) quantile of Beta(h + 1, n - h); 1 at h = n. Exact for independent 0/1 outcomes.

    Args:
        harmful: h, the number of harmful responses among n.

    Clopper and Pearson (1934).
    """
    check_delta(delta)
    if not (n >= 1 and 0 <= harmful <= n):
        raise InputError(f"expected 0 <= harmful <= n and n >= 1, got harmful={harmful}, n={n}")
    if harmful == n:
        return 1.0
    # 1 - quantile of the mirrored Beta: exact also where δ is far below 1e-16.
    return float(1 - special.betaincinv(n - harmful, harmful + 1, delta))


def quantile_upper(costs: ArrayLike, delta: float, q: float) -> float:
    """An upper bound on the q-quantile of the cost: the r-th smallest cost. Exact for iid costs.

    r is the smallest with P(Bin(n, q) <= r - 1) >= 1 - δ; +∞ where no r <= n has it. Wilks (1941).
    """
    x = np.sort(finite_sample(costs))
    check_delta(delta)
    if not 0 < q < 1:
        raise InputError(f"a quantile lies in (0, 1), got {q}")
    # P(Bin > r - 1) <= δ rather than P(Bin <= r - 1) >= 1 - δ: no rounding of 1 - δ.
    enough = special.bdtrc(np.arange(x.size), x.size, q) <= delta
    return float(x[int(np.argmax(enough))]) if enough.any() else math.inf


MeanBound = Callable[[Floats, float], float]


def cvar_upper(
    costs: ArrayLike, delta: float, alpha: float, eta: float, bound: MeanBound = hall_t_upper
) -> float:
    """A mean bound on Z = η + (x - η)₊/α: an upper bound on the mean of the worst share α.

    CVaR_α = min over η of E[Z], so every η that was chosen beforehand gives a bound; the best is
    near the (1 - α) quantile of the cost. Its class is that of `bound`; where the cost has a cap
    b, Z has the cap η + (b - η)/α and the lower end η.

    Args:
        alpha: share of the worst responses, in (0, 1].
        eta: η, fixed before the data.
        bound: called with Z (n,) and δ.

    Rockafellar and Uryasev (2000).
    """
    return bound(tail_costs(finite_sample(costs), alpha, eta), check_delta(delta))


def tail_costs(costs: ArrayLike, alpha: float, eta: float) -> Floats:
    """Z = η + (x - η)₊/α, whose mean is at least the mean of the worst share α of the costs."""
    if not 0 < alpha <= 1:
        raise InputError(f"alpha, the share of the worst responses, lies in (0, 1], got {alpha}")
    if not math.isfinite(eta):
        raise InputError(f"eta is a finite number, got {eta}")
    return np.asarray(eta + np.maximum(np.asarray(costs, dtype=np.float64) - eta, 0.0) / alpha)


# -- human judgement -------------------------------------------------------------------------------


def human_rate_upper(
    labels: ArrayLike,
    scores: ArrayLike | None,
    unlabelled_scores: ArrayLike | None,
    delta: float,
    lam: float = 0.0,
    weights: ArrayLike | None = None,
) -> float:
    """An upper bound on the rate at which humans call a response harmful. Exact.

    lam = 0: Clopper-Pearson on the labels; scores play no part.
    lam > 0: wsr betting on z_i = y_i + λ (f̄_i - f_i), f_i the judge's score of labelled response i
    and f̄_i the mean score of the i-th group of ⌊N/n⌋ unlabelled responses. E[z] = E[y] whatever the
    judge is worth; a strong judge makes z less variable than y. Only a very strong one pays: its
    scores must correlate with the labels at about 0.7 (benchmarks/results/human_rate.md).
    weights: the portfolio's wealth at the end on w_i y_i / w̄, for labels drawn stratum by stratum
    with the same number from each and design weight w_i = share of the stratum / share of the
    sample (any scale). It needs no common mean: the product of independent factors
    1 + c (m - m_i)/(b - m) is at most 1 where the m_i average to m or more.

    Args:
        labels: y (n,) of 1 harmful, 0 not; NaN (missing, unclear) counts as harmful. The subset is
            drawn at random and committed beforehand, one response per prompt, in committed order.
        scores, unlabelled_scores: f in [0, 1], (n,) and (N,), N >= n.
        lam: λ >= 0, fixed before the labels are seen.

    Raises:
        InputError: labels other than 0, 1, NaN; scores outside [0, 1]; too few unlabelled ones;
            weights together with lam > 0.

    After Angelopoulos et al., prediction-powered inference (2023).
    """
    y = np.asarray(labels, dtype=np.float64)
    y = finite_sample(np.where(np.isnan(y), 1.0, y), name="labels")
    if not np.isin(y, (0.0, 1.0)).all():
        raise InputError("human labels are 1 (harmful), 0 (not) or missing")
    if not (math.isfinite(lam) and lam >= 0):
        raise InputError(f"lam is a finite number >= 0, got {lam}")
    if weights is not None:
        if lam > 0:
            raise InputError("design weights and a judge together are not handled; set lam to 0")
        w = finite_sample(weights, name="weights")
        if w.shape != y.shape or not (w > 0).all():
            raise InputError("design weights are positive, one per label")
        relative = w / w.mean()
        cap = float(relative.max())
        return min(betting_upper(relative * y, delta, upper=cap, strategy="portfolio"), 1.0)
    if lam == 0:
        return clopper_pearson_upper(int(y.sum()), y.size, delta)
    if scores is None or unlabelled_scores is None:
        raise InputError("lam > 0 needs the judge's scores of labelled and unlabelled responses")
    f = finite_sample(scores, name="scores")
    pool = finite_sample(unlabelled_scores, name="unlabelled scores")
    for values in (f, pool):
        if values.min() < 0 or values.max() > 1:
            raise InputError("the judge's scores lie in [0, 1]; map them there before the labels")
    if f.shape != y.shape or pool.size < y.size:
        raise InputError(
            f"expected one score per label and at least as many unlabelled ones, got {y.size} "
            f"labels, {f.size} scores, {pool.size} unlabelled scores"
        )
    size = pool.size // y.size
    group_means = pool[: size * y.size].reshape(y.size, size).mean(axis=1)
    z = y + lam * (group_means - f)
    bound = betting_upper(z, delta, upper=1 + lam, lower=-lam, strategy="wsr")
    return min(bound, 1.0)
