"""From vote counts to guarantees: exact binomial bounds, smoothing radii, certified accuracy. No model, no randomness.

A smoothed classifier answers with the class that wins most often when Gaussian noise of standard deviation
`sigma_pixel` is added to the image. Counting votes turns that probability into a lower bound, and the bound into a
radius. Every result remembers the counts, n, alpha and sigma it came from, and nothing here changes n afterwards.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy import stats

from diffclass import units
from diffclass.certify.anytime import anytime_bound, check_alpha
from diffclass.intervals import interval, lower_bound, upper_bound

BOUNDS = {
    "fixed": lower_bound,  # of a number of votes that was fixed before the first
    "anytime": anytime_bound,  # of votes that were counted until they sufficed
}


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
    alpha = check_alpha(alpha)
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

    `stopped` says that the estimation votes themselves decided how many they are, which only the bound "anytime" allows;
    `calls`, where it is known, how many network calls both sets took.
    Shapes      selection, estimation: K counts each
    Units       sigma_pixel is the noise added to pixels in [0,1]
    Why         judging a class with the votes that chose it is biased towards "certified"
    """

    selection: tuple[int, ...]
    estimation: tuple[int, ...]
    sigma_pixel: float
    seed: int | None = None
    stopped: bool = False
    calls: int | None = None

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
    `bound` says which of BOUNDS it was made by: "fixed" where n was fixed before the first vote was cast, "anytime" where
    the votes themselves said when to stop.
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
    bound: str = "fixed"

    def __post_init__(self):
        object.__setattr__(self, "counts", _votes_of(self.counts, "counts"))
        if sum(self.counts) != self.n:
            raise ValueError(
                f"expected counts that add up to n = {self.n}, got {sum(self.counts)}; a certificate is "
                "about the votes that were cast, and scaling them makes it false."
            )
        ceiling = largest_radius(self.n, self.sigma_pixel, self.alpha, self.bound)
        if self.radius > ceiling * (1 + 1e-12):
            raise ValueError(
                f"expected a radius that {self.n} votes can certify, got {self.radius:.4g}, above {ceiling:.4g}."
            )
        if self.prediction is None and self.radius != 0:
            raise ValueError(f"expected radius 0 for an abstention, got {self.radius:.4g}.")

    @property
    def setting(self) -> str:
        """What certificates of one classifier and one confidence have in common."""
        return f"sigma={self.sigma_pixel:g}, alpha={self.alpha:g}"

    def __str__(self) -> str:
        how = f"n={self.n}, {_level_said(self.alpha, self.bound)}, sigma={self.sigma_pixel:g}"
        if self.prediction is None:
            return f"abstains: the votes do not prove a majority (lower bound {self.p_lower:.4f} < 1/2, {how})"
        return (
            f"certified: no L2 perturbation below r={self.radius:.3f} changes the smoothed prediction "
            f"{self.prediction} (lower bound {self.p_lower:.4f}, {how})"
        )


def smoothing_radius(votes: Votes, alpha: float = 0.001, bound: str = "fixed") -> Certificate:
    """Certify the smoothed prediction of one image, or abstain.

    Formula     r = sigma Phi^-1(p),  p the lower bound of the guess's share of the estimation votes; abstains where
                p < 1/2
    Source      Cohen et al. 2019, Algorithm 1 and Theorem 1, with the bound of a fixed n; `anytime_bound` for votes
                counted until they sufficed, as by a `StopRule`
    Units       radius: L2, pixels in [0,1]
    Errors      a certificate is wrong with probability at most alpha, over the noise of the votes; ValueError for a
                bound that is not in BOUNDS
    """
    if votes.stopped and bound.lower() == "fixed":
        raise ValueError(
            "expected the bound 'anytime' for votes that said themselves when to stop, got 'fixed', which holds for a number "
            "of votes that was fixed before the first."
        )
    p = _share_bound(bound)(votes.estimation[votes.guess], votes.n, alpha)
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
        bound=bound.lower(),
    )


def largest_radius(n: int, sigma_pixel: float, alpha: float = 0.001, bound: str = "fixed") -> float:
    """The radius when every vote agrees: no image can get more from n votes.

    Formula     sigma Phi^-1(alpha^(1/n)), or of `anytime_bound`
    Units       L2, pixels in [0,1]; 0 where even unanimous votes do not prove a majority
    """
    units.check_sigma_pixel(sigma_pixel)
    n = units.check_whole(n, "n, the number of votes", least=1, most=None)
    return max(0.0, _radius_of(_share_bound(bound)(n, n, alpha), sigma_pixel))


def votes_needed(
    radius: float, n: int, sigma_pixel: float, alpha: float = 0.001, bound: str = "fixed"
) -> int | None:
    """The fewest agreeing votes among n that certify `radius`; None where no count does.

    Units       radius: L2, pixels in [0,1]
    """
    units.check_sigma_pixel(sigma_pixel)
    n = units.check_whole(n, "n, the number of votes", least=1)
    share_bound = _share_bound(bound)
    radius = units.check_real(radius, "a radius")
    if not (math.isfinite(radius) and radius >= 0):
        raise ValueError(f"expected a radius >= 0, got {radius}.")

    def suffices(agreeing: int) -> bool:
        p = share_bound(agreeing, n, alpha)
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


class Guarantee(Protocol):
    """What every kind of certificate says of its picture: of counted votes, of soft ones, of a Lipschitz constant."""

    prediction: int | None
    radius: float
    alpha: float

    @property
    def setting(self) -> str: ...


@dataclass(frozen=True)
class BestOfSigmas:
    """The certificate with the largest radius among those of one picture at several sigmas.

    Meaning     the smoothed classifier with the sigma of `chosen` does not change its prediction inside the radius. No
                one classifier answers so for all pictures: which sigma is best is only known of the clean picture
    Units       radius: L2, pixels in [0,1]; alpha is that of all of them together
    """

    chosen: Certificate
    sigmas: tuple[float, ...]
    alpha: float

    @property
    def prediction(self) -> int | None:
        """That of the chosen certificate."""
        return self.chosen.prediction

    @property
    def radius(self) -> float:
        """That of the chosen certificate."""
        return self.chosen.radius

    @property
    def setting(self) -> str:
        """What certificates of one classifier and one confidence have in common."""
        sigmas = ", ".join(f"{sigma:g}" for sigma in self.sigmas)
        return f"best sigma of {sigmas}, alpha={self.alpha:g}"


def per_image_best(
    certificates: Sequence[Sequence[Certificate]], alpha: float = 0.001
) -> list[BestOfSigmas]:
    """The best certificate of each picture among those of several sigmas, all of which hold at once.

    Formula     argmax_i radius_i of m certificates whose alphas sum to at most alpha: alpha/m each
    Why         the largest of m radii is wrong as often as any of them can be; made at the full alpha, m times as often
                (a union bound)
    Shapes      certificates [B][m], in the same order of sigmas for every picture -> B
    Units       radius: L2, pixels in [0,1]
    Errors      ValueError for certificates at more than alpha in all, two of one sigma, or other sigmas from picture to
                picture
    """
    alpha = check_alpha(alpha)
    best = []
    for own in certificates:
        if len(own) == 0:
            raise ValueError("expected at least one certificate for each picture, got none.")
        sigmas = tuple(one.sigma_pixel for one in own)
        if len(set(sigmas)) < len(sigmas) or (best and sigmas != best[0].sigmas):
            raise ValueError(
                f"expected certificates of the same different sigmas for every picture, got {sigmas}"
                + (f" after {best[0].sigmas}." if best else ".")
            )
        spent = math.fsum(one.alpha for one in own)
        if spent > alpha * (1 + 1e-9):
            raise ValueError(
                f"expected {len(own)} certificates at alpha / {len(own)} = {alpha / len(own):.3g} each, got "
                f"{spent:.3g} in all, more than alpha = {alpha:g}; certify the same votes again at the smaller alpha."
            )
        best.append(BestOfSigmas(max(own, key=lambda one: one.radius), sigmas, alpha))
    return best


def wrong_at_most(certificates: int, alpha: float, level: float = 0.95) -> int:
    """How many of the certificates of a data set may be wrong, at most, with probability `level`.

    Formula     min{w : P(Binomial(B, alpha) > w) <= 1 - level}
    Why         each is wrong with probability at most alpha, independently where each picture has noise of its own. A
                certificate is right or wrong as a whole, so the number holds for all radii of a curve at once
    Errors      ValueError for alpha or level outside (0, 1)
    """
    certificates = units.check_whole(certificates, "a number of certificates", least=1)
    alpha = check_alpha(alpha)
    level = units.check_number(level, "a confidence level", above=0)
    if level >= 1:
        raise ValueError(f"expected a confidence level below 1, got {level:g}; 95 % is 0.95.")
    return int(stats.binom.ppf(level, certificates, alpha))


@dataclass(frozen=True)
class CertifiedCurve:
    """Certified accuracy against the radius, with its binomial interval; all arrays [R], shares in [0,1].

    `accuracy` counts certificates, a few of which may be wrong; two bounds, each right with probability `level`, do not:
    sure        of these pictures: at least this share is classified rightly within the radius, at all radii at once
    sure_beyond of all pictures, of which these are a random sample: at least this share, at each radius
    """

    radii: np.ndarray
    accuracy: np.ndarray
    low: np.ndarray
    high: np.ndarray
    correct: np.ndarray
    n: int
    abstained: int
    level: float
    sure: np.ndarray
    sure_beyond: np.ndarray


def certified_accuracy(
    certificates: Sequence[Guarantee], labels, radii, level: float = 0.95
) -> CertifiedCurve:
    """The share of images whose correct class is certified at each radius; abstentions count as errors.

    Formula     accuracy = mean over images of [prediction = label and radius >= r] = c / B
                sure = (c - `wrong_at_most`(B, alpha, level)) / B,  of these pictures
                sure_beyond = lower_bound(c, B, 1 - level) - alpha: a picture drawn at random is certified more often
                than it is safe by at most alpha
    Source      Cohen et al. 2019, section 4
    Shapes      certificates and labels [B], radii [R] -> curve [R]
    Units       radii: L2, pixels in [0,1]
    Errors      ValueError for unequal lengths, or certificates of different sigma or alpha, which are different
                classifiers (`per_image_best` makes one of several); about alpha * B of the certificates may be wrong
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
    settings = sorted({c.setting for c in certificates})
    if len(settings) > 1:
        raise ValueError(
            f"expected certificates of one sigma and one alpha, got {'; '.join(settings)}; the best sigma for each image "
            "needs a smaller alpha, by per_image_best."
        )
    if not (np.isfinite(radii).all() and (radii >= 0).all()):
        raise ValueError(f"expected radii >= 0, got {radii.tolist()[:5]}.")
    # An abstention predicts no class, which -1 stands for; labels are checked to be classes.
    right = np.array([-1 if c.prediction is None else c.prediction for c in certificates]) == labels
    reach = np.array([c.radius for c in certificates])
    correct = (right[None] & (reach[None] >= radii[:, None])).sum(1)
    low, high = interval(correct, len(right), level)
    abstained = sum(c.prediction is None for c in certificates)
    alpha = certificates[0].alpha
    wrong = wrong_at_most(len(right), alpha, level)
    return CertifiedCurve(
        radii=radii,
        accuracy=correct / len(right),
        low=low,
        high=high,
        correct=correct,
        n=len(right),
        abstained=abstained,
        level=level,
        sure=np.maximum(correct - wrong, 0) / len(right),
        sure_beyond=np.maximum(lower_bound(correct, len(right), 1 - level) - alpha, 0),
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


def _share_bound(bound: str):
    return units.chosen(bound, BOUNDS, "the bound of a share of votes")


def _level_said(alpha: float, bound: str) -> str:
    return f"alpha={alpha:g}" if bound == "fixed" else f"alpha={alpha:g} at every look"


def _radius_of(p_lower: float, sigma_pixel: float) -> float:
    return float(sigma_pixel * stats.norm.ppf(p_lower))
