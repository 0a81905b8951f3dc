"""Upper confidence bounds on a mean by betting: exact, and the best of their class. No torch.

A gambler bets against "the mean cost is m or more". If that is true, every bet is unfair to him
and by Ville's inequality his wealth reaches 1/δ with probability at most δ, so a wealth of 1/δ
rejects m. U is the smallest mean that is rejected. Only a cap b on the cost is needed:
u = (x - a)/(b - a) <= 1, where a merely sets the scale of the bets.

Two families:
- wsr and star choose each bet from the costs before it. They depend on the order of the costs,
  which therefore must be derived, never chosen.
- portfolio holds a fixed mixture of constant bets. Its wealth at the end does not depend on the
  order; its running maximum may be looked at after every cost (`portfolio_path`).

Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting" (2024, arXiv
2010.09686); Voracek and Orabona (2025, arXiv 2505.22422); Cover (1991); Orabona and Jun (2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special

from hcrlhf.errors import InputError
from hcrlhf.samples import Floats, check_cap, check_delta, finite_sample, smallest_rejected

Strategy = Literal["star", "wsr", "portfolio"]
STRATEGIES: tuple[Strategy, ...] = ("star", "wsr", "portfolio")

# Midpoints of the arcsine law, which puts weight where one bet fits few or very many harms.
NODES = np.sin((np.arange(64) + 0.5) * math.pi / 128) ** 2


def betting_upper(
    costs: ArrayLike,
    delta: float,
    *,
    upper: float,
    lower: float | None = None,
    strategy: Strategy = "star",
    c: float = 0.75,
) -> float:
    """The smallest mean that the gambler's wealth rejects; `upper` where it rejects none. Exact.

    Args:
        costs: (n,), in the committed order.
        upper: cap b; C <= b is the only assumption besides independence.
        lower: scale of the bets for star and wsr (the lower end of the cost's range), declared
            and never taken from the data. Costs below it do not harm.
        strategy: how much to bet, `log_wealth`.
        c: star and wsr never stake more than this share of the wealth.

    Raises:
        InputError: a cost above the cap, or `lower` missing.
    """
    x = finite_sample(costs)
    log_goal = -math.log(check_delta(delta))
    bets = _prepared(x, upper, lower, strategy, c)

    def excess(mean: float) -> float:
        return bets.log_wealth(mean, delta) - log_goal

    if isinstance(bets, _Portfolio):
        return _smooth_upper(bets, lambda gap: bets.log_wealth_at(gap) - log_goal)
    just_under = math.nextafter(upper, -math.inf)
    # At or below the lowest cost no bet can win.
    low = float(x.min())
    return smallest_rejected(lambda m: excess(min(m, just_under)) >= 0, low, upper)


def _smooth_upper(portfolio: _Portfolio, excess: Callable[[float], float]) -> float:
    """The smallest mean that is rejected, searched over b - m, in which wealth is smooth.

    Args:
        excess: of ln wealth over ln(1/δ), as a function of b - m > 0; falls as that grows.
    """
    widest = float(portfolio.below_cap.max())
    narrowest = widest * 2.0**-40
    if widest == 0 or excess(narrowest) < 0:
        return portfolio.upper
    tolerance = 2.0**-44 * widest
    root = float(optimize.brentq(excess, narrowest, widest, xtol=tolerance))
    mean = portfolio.upper - max(root - 2 * tolerance, narrowest)
    # Where the costs are far from 0 the subtraction rounds: go up to what is rejected itself.
    while mean < portfolio.upper and excess(portfolio.upper - mean) < 0:
        mean = math.nextafter(mean, math.inf)
    return mean


def log_wealth(
    costs: ArrayLike,
    mean: float,
    delta: float,
    *,
    upper: float,
    lower: float | None = None,
    strategy: Strategy = "star",
    c: float = 0.75,
) -> float:
    """ln of the wealth that decides about `mean`; rejected where it reaches ln(1/δ).

    wsr, star: largest wealth on the way, betting stops once it has reached 1/δ.
    portfolio: wealth at the end.

    Raises:
        InputError: mean >= upper: a threshold at or above the cap says nothing.
    """
    x = finite_sample(costs)
    check_delta(delta)
    if not mean < upper:
        raise InputError(
            f"a threshold of {mean:g} at or above the cap {upper:g} is met by every cost; expected "
            "a lower threshold"
        )
    return _prepared(x, upper, lower, strategy, c).log_wealth(mean, delta)


def _prepared(
    x: Floats, upper: float, lower: float | None, strategy: Strategy, c: float
) -> _Adaptive | _Portfolio:
    check_cap(x, upper)
    if strategy == "portfolio":
        return _Portfolio(x, upper)
    if strategy not in STRATEGIES:
        raise InputError(f"the betting strategies are {', '.join(STRATEGIES)}, got {strategy!r}")
    if lower is None:
        raise InputError(
            f"betting by {strategy} needs `lower`, the declared lower end of the cost; portfolio "
            "does without"
        )
    if not (math.isfinite(lower) and lower < upper):
        raise InputError(f"expected a range lower < upper, got [{lower}, {upper}]")
    if not 0 < c < 1:
        raise InputError(f"c is the largest share of the wealth to stake, in (0, 1), got {c}")
    return _Adaptive(x, lower, upper, star=strategy == "star", c=c)


class _Adaptive:
    """wsr and star: λ_i from the costs before i.

    μ̂_t = (½ + Σu)/(t + 1) and v_t = (¼ + Σ(u_i - μ̂_i)²)/(t + 1): one fake cost of ½ with variance
    ¼ comes first. With L = ln(1/δ), wealth K_t = Π(1 - λ_i (u_i - m)) and

        wsr:   λ_i = min(√(2L / (n v_{i-1})), c/(1 - m))
        star:  λ_i = min(√(2(L - ln K_{i-1})₊ / ((n - i + 1) v_{i-1})), c/(1 - m))

    star stakes what is still to be won over the costs that are still to come.
    """

    def __init__(self, x: Floats, lower: float, upper: float, star: bool, c: float) -> None:
        self.lower, self.width = lower, upper - lower
        self.star, self.c = star, c
        u = (x - lower) / self.width
        count = np.arange(1, u.size + 1)
        means = (0.5 + np.cumsum(u)) / (count + 1)
        variances = (0.25 + np.cumsum((u - means) ** 2)) / (count + 1)
        self.u = u
        self.before = np.concatenate([[0.25], variances[:-1]])
        if star:  # plain floats: the loop below is four times faster over them
            self.costs = u.tolist()
            self.scaled = (2 / ((u.size - count + 1) * self.before)).tolist()

    def log_wealth(self, mean: float, delta: float) -> float:
        m = (mean - self.lower) / self.width
        most = self.c / max(1 - m, 5e-324)
        log_goal = -math.log(delta)
        if not self.star:
            bets = np.minimum(np.sqrt(2 * log_goal / (self.u.size * self.before)), most)
            return float(np.cumsum(np.log1p(-bets * (self.u - m))).max())
        sqrt, log1p = math.sqrt, math.log1p
        wealth, best = 0.0, -math.inf
        for u, scale in zip(self.costs, self.scaled, strict=True):
            bet = sqrt(scale * (log_goal - wealth))
            wealth += log1p(-(bet if bet < most else most) * (u - m))
            if wealth > best:
                best = wealth
                if best >= log_goal:
                    break
        return best


class _Portfolio:
    """Wealth Σ_j w_j Π_i (1 - c_j + c_j (b - x_i)/(b - m)), 64 nodes c_j, equal weights."""

    def __init__(self, x: Floats, upper: float) -> None:
        self.below_cap, self.upper = upper - x, upper

    def _log_terms(self, gap: float) -> Floats:
        return np.log1p(NODES[:, None] * (self.below_cap / gap - 1)[None, :])

    def log_wealth_at(self, gap: float) -> float:
        """ln of the wealth at the end, against the mean b - gap."""
        total = self._log_terms(gap).sum(axis=1)
        return float(special.logsumexp(total)) - math.log(NODES.size)

    def log_wealth(self, mean: float, delta: float) -> float:
        return self.log_wealth_at(self.upper - mean)

    def path_at(self, gap: float) -> Floats:
        """ln of the wealth after every cost, (n,)."""
        totals = np.cumsum(self._log_terms(gap), axis=1)
        top = totals.max(axis=0)
        return np.asarray(top + np.log(np.exp(totals - top).mean(axis=0)))


def portfolio_path(costs: ArrayLike, mean: float, upper: float) -> Floats:
    """ln of the portfolio's wealth after every cost, (n,): an e-process against "mean or more".

    It may be looked at after each cost: if the true mean is `mean` or more, the probability that
    it ever reaches ln(1/δ) is at most δ (Ville 1939).

    Raises:
        InputError: a cost above the cap, or mean >= upper.
    """
    x = finite_sample(costs)
    check_cap(x, upper)
    if not mean < upper:
        raise InputError(f"expected a threshold below the cap {upper:g}, got {mean:g}")
    return _Portfolio(x, upper).path_at(upper - mean)


def portfolio_running_upper(costs: ArrayLike, delta: float, upper: float) -> float:
    """The smallest U of the portfolio over all looks so far: valid at every stopping time."""
    x = finite_sample(costs)
    check_cap(x, upper)
    log_goal = -math.log(check_delta(delta))
    portfolio = _Portfolio(x, upper)
    return _smooth_upper(portfolio, lambda gap: float(portfolio.path_at(gap).max()) - log_goal)
