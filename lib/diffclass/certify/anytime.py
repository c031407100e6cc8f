"""A lower bound of a class's share of votes that may be read after every vote, and the rule that stops counting by it.

The exact bound of `intervals` is paid for all n votes before it may be read: whoever looks, and goes on where it is too
low, spends its alpha again with every look. A mixture of likelihood ratios spends it once.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

from diffclass import units

PRIOR = (
    2.0,
    0.25,
)  # Beta law that mixes the likelihood ratios: shares near 1 are where certificates are made
ACCURACY = 1e-11  # of Newton's last step; the error left is its square
STEPS = 200  # of Newton's method at most; it takes about ten


def log_evidence(successes, trials, share):
    """The logarithm of the evidence against "the class's share of the votes is at most `share`".

    Formula     ln M_n(p) = ln B(a + s, b + n - s) - ln B(a, b) - s ln p - (n - s) ln(1 - p),  (a, b) = (2, 1/4),
                where s/n > p; -inf elsewhere, as votes below the share say nothing against it
    Why         M_n(p) is the ratio of two likelihoods of the votes, that of a share drawn from Beta(a, b) and that of p.
                Where p is the truth its mean is 1, whatever came before, so P(M_n >= 1/alpha for some n) <= alpha. It
                falls in p up to s/n: what speaks against a share speaks more against a smaller one
    Source      Ville 1939; Robbins 1970; the prior is ours (any would do)
    Shapes      successes, trials, share of shapes that fit one another -> [...], a float for numbers
    Units       nats; at least ln(1/alpha) rejects the share at level alpha
    Errors      ValueError for counts outside 0..n, or a share outside (0, 1)
    """
    s, n = _counted(successes, trials)
    p = units.check_numbers(share, "a share of votes").detach().cpu().double().numpy()
    if p.size and not (p.min() > 0 and p.max() < 1):
        raise ValueError(
            f"expected a share of votes between 0 and 1, got {p.min():g} to {p.max():g}."
        )
    s, n, p = _broadcast(s, n, p)
    evidence = _log_mixture(s, n) - s * np.log(p) - (n - s) * np.log1p(-p)
    return _as_given(np.where(s > n * p, evidence, -np.inf))


def anytime_bound(successes, trials, alpha: float):
    """The share of votes that the true one exceeds at every look at once, except with probability at most alpha.

    Formula     L_n = min{p < s/n : M_n(p) < 1/alpha}, see `log_evidence`; 0 for s = 0, and for s = n
                (alpha B(a + n, b) / B(a, b))^(1/n)
    Meaning     P(L_n > p for some n) <= alpha. The votes may be counted until they suffice, and every radius
                sigma Phi^-1(L_n) read from them: one alpha pays for all looks and all radii. For K classes the class
                has to be chosen beforehand, by other votes, as for the bound of a fixed n
    Source      `log_evidence`; the root by Newton's method in the logit of p, where ln M_n is convex
    Shapes      successes, trials of shapes that fit one another -> [...], a float for numbers
    Errors      ValueError for counts outside 0..n, or alpha outside (0, 1)
    """
    s, n = _broadcast(*_counted(successes, trials))
    alpha = check_alpha(alpha)
    some = np.maximum(s, 1.0)  # no votes for the class have the bound 0, which no logit reaches
    all_ = np.maximum(n, 1.0)
    due = -math.log(alpha) - _log_mixture(some, all_)  # what -s ln p - (n - s) ln(1 - p) has to be

    def excess(logit):
        ln_p = -np.logaddexp(0, -logit)
        ln_q = -np.logaddexp(0, logit)
        return -some * ln_p - (all_ - some) * ln_q - due, all_ * special.expit(logit) - some

    # -ln p >= -logit, so there the excess is not negative: left of the root
    logit = falling_root(excess, -due / some)
    return _as_given(np.where(s == 0, 0.0, special.expit(logit)))


def falling_root(curve: Callable, start: np.ndarray) -> np.ndarray:
    """Where a convex falling function is 0, by Newton's method from its left, which never steps across the root.

    Shapes      curve: [...] -> (values [...], slopes [...]); start [...], where no value is negative -> [...]
    Errors      FloatingPointError where it does not settle
    """
    at = np.asarray(start, dtype=float)
    for _ in range(STEPS):
        value, slope = curve(at)
        step = -value / slope
        at = at + step
        if np.all(np.abs(step) <= ACCURACY * (1 + np.abs(at))):
            return at
    raise FloatingPointError(
        f"expected a bound that is found in {STEPS} steps, got a last step of {np.abs(step).max():.3g}."
    )


@dataclass(frozen=True)
class StopRule:
    """When the votes on one picture suffice: its largest radius is certified, or the next one is out of reach.

    Formula     certified at radius r:  ln M_n(p) >= ln(1/alpha) of the votes for the class,  p = Phi(r / sigma)
                given up:  ln M_n(1 - p) >= ln(1/give_up) of the votes against it, p of the smallest radius not certified
    Units       sigma_pixel and radii (L2) in pixels of [0,1]
    Why         stopping may depend on the votes in any way, as the bound holds at all looks at once: one alpha pays for
                every look and every radius. Giving up is such a stop: it leaves radii uncertified, each picture that
                could have had one with probability at most give_up, and never certifies a false one, as the
                certificate is still made by `anytime_bound` of the votes cast
    Errors      ValueError for a radius that not even `most` agreeing votes certify, give_up outside [0, 1), where 0
                never gives up, and those of `units.check_sigma_pixel`
    """

    sigma_pixel: float
    radii: tuple[float, ...]
    alpha: float
    most: int
    give_up: float = 0.05

    def __post_init__(self):
        object.__setattr__(self, "sigma_pixel", units.check_sigma_pixel(self.sigma_pixel))
        object.__setattr__(self, "alpha", check_alpha(self.alpha))
        object.__setattr__(self, "most", units.check_whole(self.most, "most", least=1))
        give_up = units.check_number(self.give_up, "give_up", least=0)
        if give_up >= 1:
            raise ValueError(f"expected give_up below 1, got {give_up:g}; 0 never gives up.")
        radii = units.check_numbers(self.radii, "radii").detach().cpu().double()
        if radii.ndim != 1 or not len(radii) or float(radii.min()) < 0:
            raise ValueError(f"expected at least one radius, none negative, got {self.radii}.")
        ceiling = self.sigma_pixel * stats.norm.ppf(anytime_bound(self.most, self.most, self.alpha))
        if float(radii.max()) > ceiling:
            raise ValueError(
                f"expected radii that {self.most} votes can certify at sigma {self.sigma_pixel:g}, at most "
                f"{max(ceiling, 0):.4g}, got {float(radii.max()):.4g}; count more votes, or leave it out."
            )
        object.__setattr__(self, "radii", tuple(sorted(radii.tolist())))
        object.__setattr__(self, "give_up", give_up)

    def verdict(self, successes, trials):
        """What the votes so far ask for: "go on", "certified", "given up" or "all counted".

        Shapes      successes for the class chosen beforehand and trials, of shapes that fit one another -> [...] of
                    texts, a text for numbers
        Errors      ValueError for counts outside 0..n
        """
        s, n = _broadcast(*_counted(successes, trials))
        right = stats.norm.cdf(np.array(self.radii) / self.sigma_pixel)  # shares to exceed [R]
        wrong = stats.norm.sf(np.array(self.radii) / self.sigma_pixel)
        proofs = log_evidence(s[..., None], n[..., None], right) >= -math.log(self.alpha)
        reached = proofs.sum(-1)  # radii ascend, and evidence falls with them
        certified = reached == len(right)
        following = wrong[np.minimum(reached, len(right) - 1)]
        doubt = math.inf if self.give_up == 0 else -math.log(self.give_up)
        hopeless = np.asarray(log_evidence(n - s, n, following)) >= doubt
        told = np.select(
            [certified, hopeless, n >= self.most],
            ["certified", "given up", "all counted"],
            "go on",
        )
        return str(told) if told.ndim == 0 else told


def check_alpha(alpha: float) -> float:
    """Return the chance of a wrong certificate if it is between 0 and 1, else raise a ValueError or a TypeError."""
    alpha = units.check_real(alpha, "alpha")
    if not 0 < alpha < 1:
        raise ValueError(f"expected alpha between 0 and 1, got {alpha}; 0.001 by custom.")
    return alpha


def _log_mixture(s: np.ndarray, n: np.ndarray) -> np.ndarray:
    """ln of the likelihood of s of n votes, in their order, under a share drawn from the prior."""
    a, b = PRIOR
    return special.betaln(a + s, b + n - s) - special.betaln(a, b)


def _counted(successes, trials) -> tuple[np.ndarray, np.ndarray]:
    s = units.check_numbers(successes, "successes").detach().cpu().double().numpy()
    n = units.check_numbers(trials, "trials").detach().cpu().double().numpy()
    for name, counts in (("successes", s), ("trials", n)):
        if counts.size and (counts.min() < 0 or np.any(counts != np.floor(counts))):
            raise ValueError(
                f"expected {name} as whole numbers >= 0, got {counts.min():g} to {counts.max():g}; are they shares "
                "instead of counts? Soft votes have bounds of their own."
            )
    s, n = _broadcast(s, n)
    if np.any(s > n):
        raise ValueError(
            f"expected at most as many successes as trials, got {s[s > n].flat[0]:g} of {n[s > n].flat[0]:g}; are they "
            "counts of another run?"
        )
    return s, n


def _broadcast(*arrays: np.ndarray) -> list[np.ndarray]:
    try:
        return list(np.broadcast_arrays(*arrays))
    except ValueError:
        shapes = [list(np.shape(array)) for array in arrays]
        raise ValueError(
            f"expected numbers of shapes that fit one another, got {shapes}."
        ) from None


def _as_given(values: np.ndarray):
    return float(values) if values.ndim == 0 else values
