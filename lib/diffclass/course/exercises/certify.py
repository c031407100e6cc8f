"""Exercises of notebooks 12, 12b and 15: a bridge's posterior, a constant's units, votes, bounds and radii."""

import math

import torch
from scipy import special, stats
from torch import Tensor

from diffclass.course.exercises.base import Exercise, Mistake, normal


def _bound(won: float, n: float, alpha: float) -> float:
    """Clopper and Pearson's lower bound, with its ends in closed form."""
    if won == 0:
        return 0.0
    return alpha ** (1 / n) if won == n else float(stats.beta.ppf(alpha, won, n - won + 1))


def _wald(won: float, n: float, alpha: float) -> float:
    """The normal approximation of it."""
    p = won / n
    return p - stats.norm.isf(alpha) * math.sqrt(p * (1 - p) / n)


def _radius_by(p_lower: float, sigma: float) -> float:
    return float(sigma * stats.norm.ppf(min(p_lower, 1 - 1e-9))) if p_lower > 0.5 else 0.0


def _radius(won: float, n: float, sigma: float, alpha: float) -> float:
    return _radius_by(_bound(won, n, alpha), sigma)


CERTIFIED_RADIUS = Exercise(
    key="15-certified-radius",
    prompt="Return the certified L2 radius (pixels) of a class that won `won` of `n` votes under noise `sigma` "
    "(pixels), at confidence 1 - `alpha`; 0.0 when the classifier must abstain.",
    reference=_radius,
    cases=lambda: [
        (990, 1000, 0.25, 0.001),
        (1000, 1000, 0.5, 0.001),
        (70, 100, 0.2, 0.01),
        (53, 100, 0.2, 0.001),
    ],
    mistakes=(
        Mistake(
            lambda won, n, sigma, alpha: max(
                0.0, float(sigma * stats.norm.ppf(min(won / n, 1 - 1e-9)))
            ),
            "the observed share was used as if it were the probability; a certificate needs its lower bound",
        ),
        Mistake(
            lambda won, n, sigma, alpha: _radius_by(_wald(won, n, alpha), sigma),
            "the normal approximation of the share: where most votes agree it promises too much, and for all of them "
            "it is certain",
        ),
        Mistake(
            lambda won, n, sigma, alpha: _radius(won, n, sigma, alpha / 2),
            "alpha was split over two sides; only the lower bound can fail us, so all of alpha belongs to it",
        ),
        Mistake(
            lambda won, n, sigma, alpha: _radius(10 * won, 10 * n, sigma, alpha),
            "the counts were multiplied by ten: that is evidence from votes that nobody cast",
        ),
        Mistake(
            lambda won, n, sigma, alpha: _radius(won, n, 2 * sigma, alpha),
            "sigma was converted to model units; votes, sigma and radius all live in pixels here",
        ),
        Mistake(
            lambda won, n, sigma, alpha: float(
                sigma
                * stats.norm.ppf(
                    alpha ** (1 / n) if won == n else stats.beta.ppf(alpha, won, n - won + 1)
                )
            ),
            "a radius below zero: when the lower bound is under one half there is no certificate, so return 0.0",
        ),
    ),
    meaning="Counts, n, alpha and sigma are all that a certificate is made of; none of them may be improved "
    "afterwards.",
)

# ---------------------------------------------------------------------------------------------------------------------
# Notebooks 12 and 12b


def _fewest(bound, radius: float, n: int, sigma: float, alpha: float) -> int:
    """The fewest votes of n whose bound reaches the radius; n + 1 where none does."""
    wanted = stats.norm.cdf(radius / sigma)
    return next((won for won in range(n + 1) if bound(won, n, alpha) >= wanted), n + 1)


VOTES_NEEDED = Exercise(
    key="12-votes-needed",
    prompt="Return how many of `n` votes have to agree before the L2 radius `radius` (pixels) is certified under noise "
    "`sigma` (pixels) at confidence 1 - `alpha`; n + 1 where even all of them are too few.",
    reference=lambda radius, n, sigma, alpha: _fewest(_bound, radius, n, sigma, alpha),
    cases=lambda: [
        (0.25, 1000, 0.25, 0.001),
        (0.5, 1000, 0.25, 0.001),
        (0.75, 1000, 0.25, 0.001),
        (0.5, 200, 0.5, 0.01),
    ],
    mistakes=(
        Mistake(
            lambda radius, n, sigma, alpha: _fewest(
                lambda won, n, alpha: won / n, radius, n, sigma, alpha
            ),
            "the observed share itself was asked to reach the radius; half of all certificates at the edge would be false",
        ),
        Mistake(
            lambda radius, n, sigma, alpha: _fewest(_wald, radius, n, sigma, alpha),
            "the normal approximation needs fewer votes than are safe, most of all where nearly all agree",
        ),
        Mistake(
            lambda radius, n, sigma, alpha: _fewest(_bound, radius, n, sigma, alpha / 2),
            "alpha was split over two sides; no certificate is wrong because the share is too large",
        ),
        Mistake(
            lambda radius, n, sigma, alpha: _fewest(_bound, 2 * radius, n, sigma, alpha),
            "one of radius and sigma was converted to model units; both are pixels, and only their ratio counts",
        ),
        Mistake(
            lambda radius, n, sigma, alpha: min(_fewest(_bound, radius, n, sigma, alpha), n),
            "where all votes together are too few the answer is n + 1; the ceiling of n votes is no certificate",
        ),
    ),
    meaning="The radius that n votes can prove has a ceiling: sigma Phi^-1(alpha^(1/n)), whatever the classifier.",
)


def _bridge(tau: float, low: float, high: float, x_tau: Tensor, x_high: Tensor) -> Tensor:
    """Mean and variance of x_t given x_tau and x_{t+1}, for noise levels tau < low < high."""
    whole = high**2 - tau**2
    mean = ((high**2 - low**2) * x_tau + (low**2 - tau**2) * x_high) / whole
    variance = (low**2 - tau**2) * (high**2 - low**2) / whole
    return _mean_and(mean, variance)


def _mean_and(mean: Tensor, variance: float) -> Tensor:
    return torch.cat([mean, torch.full((1,), variance, dtype=mean.dtype)])


def _bridge_cases() -> list[tuple]:
    levels = ((0.5, 0.7, 0.9), (0.2, 0.3, 1.0), (1.0, 2.0, 2.1))
    return [(*level, normal(2 * i, 3), normal(2 * i + 1, 3)) for i, level in enumerate(levels)]


BRIDGE_POSTERIOR = Exercise(
    key="12-bridge-posterior",
    prompt="x_t has noise level `low`, between `tau` of x_tau [D] and `high` of x_high [D]. Return the D means of x_t given "
    "both, followed by its variance (one number for all coordinates): torch.cat of [D] and [1].",
    reference=lambda tau, low, high, x_tau, x_high: _bridge(tau, low, high, x_tau, x_high),
    cases=_bridge_cases,
    mistakes=(
        Mistake(
            lambda tau, low, high, x_tau, x_high: _bridge(0.0, low, high, x_tau, x_high),
            "that is the posterior given a *clean* picture: x_tau already carries tau, so variances are counted from there",
        ),
        Mistake(
            lambda tau, low, high, x_tau, x_high: _bridge(
                tau, (high**2 + tau**2 - low**2) ** 0.5, high, x_tau, x_high
            ),
            "the two weights are exchanged: the nearer end has to weigh more",
        ),
        Mistake(
            lambda tau, low, high, x_tau, x_high: _mean_and(
                _bridge(tau, low, high, x_tau, x_high)[:-1],
                float(_bridge(tau, low, high, x_tau, x_high)[-1]) ** 0.5,
            ),
            "the last number is the standard deviation, not the variance",
        ),
        Mistake(
            lambda tau, low, high, x_tau, x_high: _mean_and(
                _bridge(tau, low, high, x_tau, x_high)[:-1], low**2 - tau**2
            ),
            "that is the variance given x_tau alone; knowing x_high as well leaves less",
        ),
        Mistake(
            lambda tau, low, high, x_tau, x_high: _mean_and(
                ((high - low) * x_tau + (low - tau) * x_high) / (high - tau),
                (low - tau) * (high - low) / (high - tau),
            ),
            "levels were subtracted; variances add, levels do not",
        ),
    ),
    meaning="With tau = 0 this is the posterior of notebook 02: a noised classifier is the plain one that starts later.",
)


def _margin(sigma: Tensor, weights: Tensor, dimensions: int, factor: float = 1.0) -> float:
    """How fast a difference of mean losses changes with a picture in pixels, times `factor`."""
    slopes = 8 * math.sqrt(2 / math.pi) / sigma + 8 / math.sqrt(dimensions)
    return factor * float((weights * slopes).sum())


def _levels(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Noise levels of model space and weights."""
    sigma = torch.exp(normal(seed, count)).sort().values
    return sigma, normal(seed + 1, count).abs()


LIPSCHITZ_PIXELS = Exercise(
    key="12-lipschitz-pixels",
    prompt="Logits are f_k = -sum_t w_t E|D_k - z|^2 / D, with z = 2x - 1 and D_k in [-1,1]^D and levels `sigma` [T] of model "
    "space. Given `sigma`, `weights` [T] and `dimensions`, return the Lipschitz constant of f_y - f_k per unit of x.",
    reference=lambda sigma, weights, dimensions: _margin(sigma, weights, dimensions),
    cases=lambda: [(*_levels(0, 4), 64), (*_levels(2, 7), 3072), (*_levels(4, 1), 2)],
    mistakes=(
        Mistake(
            lambda sigma, weights, dimensions: _margin(sigma, weights, dimensions, 0.5),
            "that is per unit of z: a step of x is twice as long in z, and a radius in pixels needs the constant per pixel",
        ),
        Mistake(
            lambda sigma, weights, dimensions: float(
                (weights * (math.sqrt(2 / math.pi) / sigma + 2 / math.sqrt(dimensions))).sum()
            ),
            "that is the constant for pictures and levels of [0,1]; squares of [-1,1] are four times as large",
        ),
        Mistake(
            lambda sigma, weights, dimensions: float(
                (1 + math.sqrt(2 / math.pi)) * (weights / sigma).sum()
            ),
            "that is the released constant, which has neither the four of the squares nor the two of the units",
        ),
        Mistake(
            lambda sigma, weights, dimensions: dimensions * _margin(sigma, weights, dimensions),
            "the losses here are means over the D pixels, not sums",
        ),
        Mistake(
            lambda sigma, weights, dimensions: float(
                (weights * 8 * math.sqrt(2 / math.pi) / sigma).sum()
            ),
            "the picture also stands beside the noise, in the square itself: its term 2 E(D_y - D_k) is missing",
        ),
    ),
    meaning="The constant depends on no network, and on the smallest level most: 1/sigma.",
)


def _first(evidence, hits: Tensor, p: float, alpha: float) -> int:
    """The first number of votes whose evidence against the share p reaches 1/alpha; 0 where none does."""
    won = torch.cumsum(hits, 0).tolist()
    for n, s in enumerate(won, start=1):
        if evidence(s, n, p, alpha):
            return n
    return 0


def _above(evidence):
    """The same evidence where the votes speak for a larger share than p."""
    return lambda s, n, p, alpha: s > n * p and evidence(s, n, p, alpha)


def _mixture(s: float, n: int, p: float, prior: tuple[float, float]) -> float:
    a, b = prior
    return float(
        special.betaln(a + s, b + n - s)
        - special.betaln(a, b)
        - s * math.log(p)
        - (n - s) * math.log1p(-p)
    )


def _ville(prior=(2.0, 0.25), spent: float = 1.0):
    return _above(lambda s, n, p, alpha: _mixture(s, n, p, prior) >= -math.log(alpha * spent))


def _hits(seed: int, count: int, share: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(count, generator=generator, dtype=torch.float64) < share).double()


ANYTIME_STOP = Exercise(
    key="12-anytime-stop",
    prompt="`hits` [n] says of each vote, in order, whether it is for the class (1.0 or 0.0). Return after how many votes "
    "the mixture with Beta(2, 1/4) first proves a share above `p` at level `alpha`, which may be read at every vote; 0 where "
    "it never does. `special.betaln` is ln B.",
    reference=lambda hits, p, alpha: _first(_ville(), hits, p, alpha),
    cases=lambda: [
        (_hits(0, 400, 0.97), 0.8413, 0.001),
        (_hits(1, 400, 0.93), 0.8413, 0.01),
        (_hits(2, 200, 0.5), 0.8413, 0.001),
        (_hits(3, 300, 0.8), 0.5, 0.001),
    ],
    mistakes=(
        Mistake(
            lambda hits, p, alpha: _first(
                lambda s, n, p, alpha: _bound(s, n, alpha) > p, hits, p, alpha
            ),
            "Clopper and Pearson's bound was read after every vote; its alpha pays for one look, chosen beforehand",
        ),
        Mistake(
            lambda hits, p, alpha: _first(
                lambda s, n, p, alpha: _mixture(s, n, p, (2.0, 0.25)) >= -math.log(alpha),
                hits,
                p,
                alpha,
            ),
            "too few votes speak against the share p as well; they prove that the true one is smaller, not larger",
        ),
        Mistake(
            lambda hits, p, alpha: _first(_ville(spent=0.5), hits, p, alpha),
            "the evidence was held to 2/alpha; only one side can be wrong, so 1/alpha is enough",
        ),
        Mistake(
            lambda hits, p, alpha: _first(_ville(prior=(1.0, 1.0)), hits, p, alpha),
            "a uniform prior was mixed in place of Beta(2, 1/4): as safe, and later",
        ),
        Mistake(
            lambda hits, p, alpha: _first(
                lambda s, n, p, alpha: stats.binom.sf(s - 1, n, p) <= alpha / n, hits, p, alpha
            ),
            "alpha was divided by the number of votes so far; the sum of alpha / n over all looks has no limit",
        ),
        Mistake(
            lambda hits, p, alpha: int(hits.sum()) if _first(_ville(), hits, p, alpha) else 0,
            "that is a number of hits; the votes spent are the ones that were cast",
        ),
    ),
    meaning="One alpha pays for every look, so counting may end the moment it suffices.",
)
