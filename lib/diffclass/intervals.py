"""Exact binomial bounds and the intervals of averages: no model, no randomness."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from diffclass import units

# ---------------------------------------------------------------------------------------------------------------------
# Exact bounds for a probability from counted successes


def lower_bound(successes, trials: int, alpha: float):
    """The value that the true probability exceeds, except with probability at most alpha (one-sided).

    Formula     Beta^-1(alpha; s, n - s + 1);  0 for s = 0 and alpha^(1/n) for s = n
    Source      Clopper & Pearson 1934
    Shapes      successes [...] -> [...], a float for a number
    Errors      ValueError for counts outside 0..n or alpha outside (0, 1)
    """
    s, n, alpha = _counted(successes, trials, alpha)
    bound = _lower(np.maximum(s, 1), n, alpha)
    # The two ends are exact in closed form; the inverse beta function is only accurate to a few digits fewer there.
    return _as_given(np.where(s == 0, 0.0, np.where(s == n, alpha ** (1 / n), bound)))


def upper_bound(successes, trials: int, alpha: float):
    """The value that the true probability stays below, except with probability at most alpha (one-sided).

    Formula     1 - lower_bound(n - s)
    Source      Clopper & Pearson 1934
    Shapes      successes [...] -> [...], a float for a number
    Errors      ValueError for counts outside 0..n or alpha outside (0, 1)
    """
    s, n, alpha = _counted(successes, trials, alpha)
    bound = _upper(np.minimum(s, n - 1), n, alpha)
    return _as_given(np.where(s == n, 1.0, np.where(s == 0, -np.expm1(math.log(alpha) / n), bound)))


def interval(successes, trials: int, level: float = 0.95):
    """The two-sided interval of an accuracy: each side fails with probability at most (1 - level) / 2.

    Source      Clopper & Pearson 1934
    Shapes      successes [...] -> (low [...], high [...]), floats for a number
    Errors      ValueError for counts outside 0..n or a level outside (0, 1)
    """
    alpha = (1 - _check_level(level)) / 2
    return lower_bound(successes, trials, alpha), upper_bound(successes, trials, alpha)


def mean_interval(values: Sequence[float], draws: int, level: float = 0.95) -> tuple[float, float]:
    """The interval of an average over images of numbers in [0,1], such as shares of hits.

    Formula     Clopper-Pearson for p m hits of m,  m = p (1 - p) / (var / n) images of which each is right or wrong
    Source      Korn & Graubard 1998; for values of 0 and 1 alone it is Clopper-Pearson's interval of n - 1 images, or
                of n where all are alike
    Shapes      values [N], each a mean over `draws` -> (low, high)
    Errors      ValueError for values outside [0,1]
    """
    values = units.check_numbers(values, "shares").flatten().tolist()
    draws = units.check_whole(draws, "draws", least=1)
    level = _check_level(level)
    n = len(values)
    if not n or min(values) < 0 or max(values) > 1:
        raise ValueError(
            f"expected shares between 0 and 1, got {list(values)[:3]}...; divide hits by draws."
        )
    p = math.fsum(values) / n
    variance = math.fsum((value - p) ** 2 for value in values) / max(1, n - 1)
    count = n if p in (0, 1) else min(p * (1 - p) / max(variance / n, 1e-12), n * draws)
    tail = (1 - level) / 2
    hits = p * count
    low = float(_lower(hits, count, tail)) if p > 0 else 0.0
    high = float(_upper(hits, count, tail)) if p < 1 else 1.0
    return low, high


def paired_interval(differences: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """The interval of an average of differences in [-1,1], each of two shares of hits on the same image.

    Formula     of the values (1 + d) / 2, `mean_interval` as they are, and with four more, 0, 1 and twice 1/2; from the lower
                of the two lower ends to the higher of the two higher ones, twice each less 1
    Why         images that both answer alike have no part in the variance, which two separate intervals would count twice; the
                four keep some of it where the two hardly ever differ, of which a sample says little
    Source      Korn & Graubard 1998; Agresti & Min 2005 add half an image to each cell of the table of right and wrong, these
                four a whole one. Its coverage is computed exactly in the tests
    Shapes      differences [N] -> (low, high), both in [-1,1]
    Errors      ValueError for no differences, or one outside [-1,1]
    """
    values = units.check_numbers(differences, "differences").flatten().tolist()
    if not values or min(values) < -1 or max(values) > 1:
        raise ValueError(
            f"expected differences between -1 and 1, got {list(values)[:3]}...; subtract shares of hits, not counts."
        )
    mapped = [(1 + value) / 2 for value in values]
    ends = []
    for several in (mapped, [*mapped, 0.0, 1.0, 0.5, 0.5]):
        # so many draws that they limit nothing: what varies is the images
        ends += mean_interval(several, len(several) ** 2, level)
    return 2 * min(ends) - 1, 2 * max(ends) - 1


def sign_test(more: int, less: int) -> float:
    """How likely so uneven a split is by chance, or one more uneven: the exact two-sided p of "neither is better".

    Formula     min(1, 2 P(X >= max(more, less))),  X binomial of more + less fair coins; 1 if there are none
    Source      McNemar 1947: of two classifiers on the same images only those tell that one answers right and one wrong
    Shapes      counts of images on which the first, and the second alone is right -> float
    Errors      ValueError for counts that are no whole numbers >= 0
    """
    more = units.check_whole(more, "more", least=0, most=None)
    less = units.check_whole(less, "less", least=0, most=None)
    if not more + less:
        return 1.0
    return float(stats.binomtest(more, more + less, 0.5).pvalue)


def _check_level(level: float) -> float:
    level = units.check_real(level, "a confidence level")
    if not 0 < level < 1:
        raise ValueError(f"expected a confidence level between 0 and 1, got {level}; 95 % is 0.95.")
    return level


def _lower(successes, trials, alpha):
    """Clopper and Pearson's lower bound of a probability, also for counts that are no whole numbers."""
    return stats.beta.ppf(alpha, successes, trials - successes + 1)


def _upper(successes, trials, alpha):
    """Their upper bound."""
    return stats.beta.ppf(1 - alpha, successes + 1, trials - successes)


def _counted(successes, trials: int, alpha: float) -> tuple[np.ndarray, int, float]:
    s = units.check_numbers(successes, "successes").detach().cpu().numpy()
    trials = units.check_whole(trials, "the number of trials", most=None)
    alpha = units.check_real(alpha, "alpha")
    if trials < 1:
        raise ValueError(f"expected at least one trial, a whole number, got {trials}.")
    if s.size and not (np.all(s == np.floor(s)) and s.min() >= 0 and s.max() <= trials):
        raise ValueError(
            f"expected successes as whole numbers from 0 to {trials}, got {s.min()} to {s.max()}; "
            "are they shares instead of counts, or counts of another run?"
        )
    if not 0 < alpha < 1:
        raise ValueError(
            f"expected alpha between 0 and 1, got {alpha}; alpha is the chance of a wrong certificate, "
            "0.001 by custom."
        )
    return s.astype(float), int(trials), float(alpha)


def _as_given(values: np.ndarray):
    return float(values) if values.ndim == 0 else values
