"""From vote counts to guarantees: exact binomial bounds, smoothing radii, certified accuracy. No model, no randomness.

A smoothed classifier answers with the class that wins most often when Gaussian noise of standard deviation
`sigma_pixel` is added to the image. Counting votes turns that probability into a lower bound, and the bound into a
radius. Every result remembers the counts, n, alpha and sigma it came from, and nothing here changes n afterwards.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from diffclass import units
from diffclass.intervals import interval, lower_bound, upper_bound


def prediction_changed(counts: Sequence[int], original: int, alpha: float = 0.001) -> bool:
    """Whether the votes at a perturbed image prove that the smoothed prediction is no longer `original`.

    Formula     upper_bound(original) < lower_bound(some other class), each of the K bounds at level alpha / K
    Why         one vote more for another class proves nothing, and "original is below 1/2" does not either: with many
                classes the winner may hold less than half. Splitting alpha over all K bounds, not over two, pays for
                choosing the rival after seeing the counts
    Errors      False alarm with probability at most alpha; ValueError for impossible counts
    """
    counts = _votes_of(counts, "counts")
    original = units.check_whole(original, "the original class")
    alpha = _check_alpha(alpha)
    if not 0 <= original < len(counts):
        raise ValueError(f"expected the original class among 0..{len(counts) - 1}, got {original}.")
    n = sum(counts)
    share = alpha / len(counts)
    rivals = [c for k, c in enumerate(counts) if k != original]
    return upper_bound(counts[original], n, share) < lower_bound(max(rivals), n, share)


# ---------------------------------------------------------------------------------------------------------------------
# Votes and the certificate they buy


@dataclass(frozen=True)
class Votes:
    """Class counts of one image under noise: one set to choose the class, a fresh one to judge it.

    Shapes      selection, estimation: K counts each
    Units       sigma_pixel is the noise added to pixels in [0,1]
    Why         judging a class with the votes that chose it is biased towards "certified"
    """

    selection: tuple[int, ...]
    estimation: tuple[int, ...]
    sigma_pixel: float
    seed: int | None = None

    def __post_init__(self):
        for name in ("selection", "estimation"):
            object.__setattr__(self, name, _votes_of(getattr(self, name), name))
        if len(self.selection) != len(self.estimation):
            raise ValueError(
                f"expected as many selection as estimation counts, got {len(self.selection)} and "
                f"{len(self.estimation)}; both need one count for every class."
            )
        units.check_sigma_pixel(self.sigma_pixel)

    @property
    def n(self) -> int:
        """Estimation votes."""
        return sum(self.estimation)

    @property
    def guess(self) -> int:
        """The class that the selection votes chose."""
        return int(np.argmax(self.selection))


@dataclass(frozen=True)
class Certificate:
    """A guarantee for one image, with everything needed to recompute it.

    `prediction` is None, and `radius` 0, where the votes do not suffice (an abstention, which counts as an error).
    Units       radius: L2, pixels in [0,1]
    """

    prediction: int | None
    radius: float
    p_lower: float
    counts: tuple[int, ...]
    n: int
    alpha: float
    sigma_pixel: float
    seed: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "counts", _votes_of(self.counts, "counts"))
        if sum(self.counts) != self.n:
            raise ValueError(
                f"expected counts that add up to n = {self.n}, got {sum(self.counts)}; a certificate is "
                "about the votes that were cast, and scaling them makes it false."
            )
        if self.radius > largest_radius(self.n, self.sigma_pixel, self.alpha) * (1 + 1e-12):
            raise ValueError(
                f"expected a radius that {self.n} votes can certify, got {self.radius:.4g}, above "
                f"{largest_radius(self.n, self.sigma_pixel, self.alpha):.4g}."
            )
        if self.prediction is None and self.radius != 0:
            raise ValueError(f"expected radius 0 for an abstention, got {self.radius:.4g}.")

    def __str__(self) -> str:
        how = f"n={self.n}, alpha={self.alpha:g}, sigma={self.sigma_pixel:g}"
        if self.prediction is None:
            return f"abstains: the votes do not prove a majority (lower bound {self.p_lower:.4f} < 1/2, {how})"
        return (
            f"certified: no L2 perturbation below r={self.radius:.3f} changes the smoothed prediction "
            f"{self.prediction} (lower bound {self.p_lower:.4f}, {how})"
        )


def smoothing_radius(votes: Votes, alpha: float = 0.001) -> Certificate:
    """Certify the smoothed prediction of one image, or abstain.

    Formula     r = sigma Phi^-1(p),  p = lower_bound(estimation[guess], n, alpha); abstains where p < 1/2
    Source      Cohen et al. 2019, Algorithm 1 and Theorem 1
    Units       radius: L2, pixels in [0,1]
    Errors      a certificate is wrong with probability at most alpha, over the noise of the votes
    """
    p = lower_bound(votes.estimation[votes.guess], votes.n, alpha)
    certain = p >= 0.5
    return Certificate(
        prediction=votes.guess if certain else None,
        radius=_radius_of(p, votes.sigma_pixel) if certain else 0.0,
        p_lower=p,
        counts=votes.estimation,
        n=votes.n,
        alpha=alpha,
        sigma_pixel=votes.sigma_pixel,
        seed=votes.seed,
    )


def largest_radius(n: int, sigma_pixel: float, alpha: float = 0.001) -> float:
    """The radius when every vote agrees: no image can get more from n votes. Formula: sigma Phi^-1(alpha^(1/n)).

    Units       L2, pixels in [0,1]; 0 where even unanimous votes do not prove a majority
    """
    units.check_sigma_pixel(sigma_pixel)
    return max(0.0, _radius_of(lower_bound(n, n, alpha), sigma_pixel))


def votes_needed(radius: float, n: int, sigma_pixel: float, alpha: float = 0.001) -> int | None:
    """The fewest agreeing votes among n that certify `radius`; None where no count does.

    Units       radius: L2, pixels in [0,1]
    """
    units.check_sigma_pixel(sigma_pixel)
    n = units.check_whole(n, "n, the number of votes", least=1)
    radius = units.check_real(radius, "a radius")
    if not (math.isfinite(radius) and radius >= 0):
        raise ValueError(f"expected a radius >= 0, got {radius}.")

    def suffices(agreeing: int) -> bool:
        p = lower_bound(agreeing, n, alpha)
        return p >= 0.5 and _radius_of(p, sigma_pixel) >= radius

    if not suffices(n):
        return None
    few = 0  # invariant: `few` votes do not suffice (0 has the bound 0), `enough` do
    enough = n
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if suffices(middle) else (middle, enough)
    return enough


# ---------------------------------------------------------------------------------------------------------------------
# Many images


@dataclass(frozen=True)
class CertifiedCurve:
    """Certified accuracy against the radius, with its binomial interval; all arrays [R], shares in [0,1]."""

    radii: np.ndarray
    accuracy: np.ndarray
    low: np.ndarray
    high: np.ndarray
    correct: np.ndarray
    n: int
    abstained: int
    level: float


def certified_accuracy(
    certificates: Sequence[Certificate], labels, radii, level: float = 0.95
) -> CertifiedCurve:
    """The share of images whose correct class is certified at each radius; abstentions count as errors.

    Formula     mean over images of [prediction = label and radius >= r]
    Source      Cohen et al. 2019, section 4
    Shapes      certificates and labels [B], radii [R] -> curve [R]
    Units       radii: L2, pixels in [0,1]
    Errors      ValueError for unequal lengths, or certificates of different sigma or alpha, which are different
                classifiers; at level alpha, about alpha * B of the certificates may be wrong
    """
    labels = units.check_numbers(labels, "labels").detach().cpu().numpy()
    radii = np.atleast_1d(units.check_numbers(radii, "radii").detach().cpu().double().numpy())
    if radii.ndim != 1:
        raise ValueError(f"expected radii [R], got shape {list(radii.shape)}.")
    if (labels != np.floor(labels)).any():
        raise ValueError(f"expected whole numbers as labels, got {labels.tolist()[:5]}.")
    if len(certificates) == 0 or labels.shape != (len(certificates),):
        raise ValueError(
            f"expected one label for each certificate, got {len(certificates)} certificates and labels "
            f"of shape {list(labels.shape)}."
        )
    if labels.min() < 0:
        raise ValueError(f"expected labels >= 0, got {labels.min()}.")
    settings = {(c.sigma_pixel, c.alpha) for c in certificates}
    if len(settings) > 1:
        raise ValueError(
            f"expected certificates of one sigma and one alpha, got {sorted(settings)}; the best sigma "
            "for each image would need a smaller alpha (a union bound)."
        )
    if not (np.isfinite(radii).all() and (radii >= 0).all()):
        raise ValueError(f"expected radii >= 0, got {radii.tolist()[:5]}.")
    # An abstention predicts no class, which -1 stands for; labels are checked to be classes.
    right = np.array([-1 if c.prediction is None else c.prediction for c in certificates]) == labels
    reach = np.array([c.radius for c in certificates])
    correct = (right[None] & (reach[None] >= radii[:, None])).sum(1)
    low, high = interval(correct, len(right), level)
    abstained = sum(c.prediction is None for c in certificates)
    return CertifiedCurve(
        radii, correct / len(right), low, high, correct, len(right), abstained, level
    )


# ---------------------------------------------------------------------------------------------------------------------
# Checks at the entrance


def _votes_of(counts, name: str) -> tuple[int, ...]:
    counts = units.check_numbers(counts, f"{name} counts").tolist()
    if not isinstance(counts, list) or len(counts) < 2:
        raise ValueError(
            f"expected one {name} count for each of at least two classes, got {counts}."
        )
    if any(isinstance(c, list) or int(c) != c for c in counts):
        raise ValueError(
            f"expected whole numbers as {name}, got {counts}; probabilities need other bounds than votes."
        )
    counts = tuple(int(c) for c in counts)
    if min(counts) < 0 or sum(counts) == 0:
        raise ValueError(f"expected {name} counts >= 0 with at least one vote, got {counts}.")
    return counts


def _check_alpha(alpha: float) -> float:
    alpha = units.check_real(alpha, "alpha")
    if not 0 < alpha < 1:
        raise ValueError(f"expected alpha between 0 and 1, got {alpha}; 0.001 by custom.")
    return alpha


def _radius_of(p_lower: float, sigma_pixel: float) -> float:
    return float(sigma_pixel * stats.norm.ppf(p_lower))
