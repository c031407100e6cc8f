"""The exercise of notebook 15: from counted votes to a certified radius."""

from scipy import stats

from diffclass.course.exercises.base import Exercise, Mistake


def _radius(won: float, n: float, sigma: float, alpha: float) -> float:
    p_lower = alpha ** (1 / n) if won == n else stats.beta.ppf(alpha, won, n - won + 1)
    return float(sigma * stats.norm.ppf(p_lower)) if p_lower > 0.5 else 0.0


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
