"""Soft votes: each noised copy gives its class probabilities instead of one class, and the radius follows their mean.

Clopper and Pearson's bound is about hits and misses, and a mean of numbers between 0 and 1 counts none. Taken of n times
the mean, rounded down, it promises alpha where no more than 2 alpha is proven (a hit drawn for every number makes n p of
them at least every other time), and it is wasteful: hits vary more than any other numbers of the same mean. The bounds
here hold for every law on [0,1], and the better ones look how much the numbers vary.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

from diffclass import units
from diffclass.certify.anytime import check_alpha, falling_root

BETS = 64  # constant bets that the betting bound mixes
THOUSAND = 1000  # in how many parts stored probabilities are told
SLACK = 1e-6  # of probabilities in single precision

# ---------------------------------------------------------------------------------------------------------------------
# Lower bounds of a mean of numbers in [0,1]


def hoeffding_bound(values, alpha: float):
    """The value that the mean of the law of n independent numbers in [0,1] exceeds, except with probability alpha.

    Formula     mean - sqrt(ln(1/alpha) / (2 n)), at least 0
    Source      Hoeffding 1963; the least that numbers in [0,1] allow without a look at how they vary
    Shapes      values [...,n] -> [...], a float for one row
    Errors      ValueError for values outside [0,1] or alpha outside (0, 1)
    """
    x = _checked(values)
    slack = math.sqrt(-math.log(check_alpha(alpha)) / (2 * x.shape[-1]))
    return _as_given(np.maximum(x.mean(-1) - slack, 0))


def bernstein_bound(values, alpha: float):
    """The same from how much the numbers vary: far better than Hoeffding's where that is little.

    Formula     mean - sqrt(2 V ln(2/alpha) / n) - 7 ln(2/alpha) / (3 (n - 1)), at least 0,  V the sample variance
    Source      Maurer & Pontil 2009, Theorem 4
    Shapes      values [...,n], n >= 2 -> [...], a float for one row
    Errors      those of `hoeffding_bound`; ValueError for a single value
    """
    x = _checked(values)
    n = x.shape[-1]
    if n < 2:
        raise ValueError("expected at least two values, which can vary, got one.")
    log = math.log(2 / check_alpha(alpha))
    slack = np.sqrt(2 * x.var(-1, ddof=1) * log / n) + 7 * log / (3 * (n - 1))
    return _as_given(np.maximum(x.mean(-1) - slack, 0))


def log_capital(values, mean):
    """The logarithm of what a gambler makes of 1 who bets on every number that the law's mean is above `mean`.

    Formula     ln W(m) = ln 1/J sum_j prod_i (1 + b_j (X_i / m - 1)),  b_j = sin^2(pi (2j - 1) / (4 J)), J = 64
    Why         each bet is fair if m is the mean, whatever the law on [0,1], and W is never negative: P(W >= 1/alpha at
                any time) <= alpha. W falls in m, so a mean that is rejected takes the smaller ones with it. Bets near 0
                suit means close to m, those near 1 numbers that hardly vary; the mixture is within a constant of
                the best of them
    Source      Waudby-Smith & Ramdas 2023, the capital process for one side, with a grid of constant bets in place of
                predicted ones, so that the order of the numbers does not matter; Ville 1939
    Shapes      values [...,n], mean [...] in (0,1) -> [...], a float for one row
    Units       nats
    Errors      those of `hoeffding_bound`; ValueError for a mean outside (0, 1)
    """
    x = _checked(values)
    m = units.check_numbers(mean, "a mean").detach().cpu().double().numpy()
    if m.size and not (m.min() > 0 and m.max() < 1):
        raise ValueError(f"expected a mean between 0 and 1, got {m.min():g} to {m.max():g}.")
    if m.shape != x.shape[:-1]:
        raise ValueError(
            f"expected one mean for each row of values, got shapes {list(m.shape)} and {list(x.shape)}."
        )
    return _as_given(_capital(x, np.log(m))[0])


def betting_bound(values, alpha: float):
    """The same from bets: better than Bernstein's for few numbers, as good for many, and it may be read at any time.

    Formula     min{m : W(m) < 1/alpha}, see `log_capital`; 0 where every number is 0
    Meaning     P(the bound of the first n numbers > the mean of their law, for some n) <= alpha
    Source      Waudby-Smith & Ramdas 2023; the root by Newton's method in ln m, where ln W is convex
    Shapes      values [...,n] -> [...], a float for one row
    Errors      those of `hoeffding_bound`
    """
    x = _checked(values)
    alpha = check_alpha(alpha)
    empty = x.max(-1) == 0
    some = np.where(empty[..., None], 1.0, x)

    def excess(log_mean):
        capital, slope = _capital(some, log_mean)
        return capital + math.log(alpha), slope

    # left of the root: even the bets that lose every number but the largest have made enough there
    worst = np.log1p(-_bets().min()) * (x.shape[-1] - 1) - math.log(BETS)
    start = np.log(_bets().min() * some.max(-1)) + worst + math.log(alpha)
    bound = np.exp(falling_root(excess, start))
    return _as_given(np.where(empty, 0.0, bound))


SOFT_BOUNDS = {
    "hoeffding": hoeffding_bound,
    "bernstein": bernstein_bound,
    "betting": betting_bound,
}

# ---------------------------------------------------------------------------------------------------------------------
# The certificate of soft votes


@dataclass(frozen=True, eq=False)
class SoftVotes:
    """Class probabilities of one picture under noise: one set to choose the class, a fresh one to judge it.

    Shapes      selection [n0,K], estimation [n,K]: a row for every noised copy, with a sum of at most 1
    Units       sigma_pixel is the noise added to pixels in [0,1]
    Errors      ValueError for rows that are no probabilities, or an estimation that begins with the selection
    """

    selection: np.ndarray
    estimation: np.ndarray
    sigma_pixel: float
    seed: int | None = None

    def __post_init__(self):
        for name in ("selection", "estimation"):
            object.__setattr__(self, name, _rows(getattr(self, name), name))
        if self.selection.shape[1] != self.estimation.shape[1]:
            raise ValueError(
                f"expected selection and estimation votes for as many classes, got {self.selection.shape[1]} and "
                f"{self.estimation.shape[1]}."
            )
        object.__setattr__(self, "sigma_pixel", units.check_sigma_pixel(self.sigma_pixel))
        # rows of sure classifiers are alike by right
        varied = len(np.unique(self.selection, axis=0)) > 1
        if varied and np.array_equal(self.estimation[: len(self.selection)], self.selection):
            raise ValueError(
                "expected estimation votes of fresh noise, got those that chose the class once more; a class judged by "
                "the votes that chose it is certified too often."
            )

    @property
    def n(self) -> int:
        """Estimation votes."""
        return len(self.estimation)

    @property
    def guess(self) -> int:
        """The class that the selection votes chose: that of the largest mean."""
        return int(np.argmax(self.selection.mean(0)))

    @property
    def values(self) -> np.ndarray:
        """What each estimation vote gave that class. Shapes: -> [n]."""
        return self.estimation[:, self.guess]


@dataclass(frozen=True)
class SoftTally:
    """Soft votes of one picture as they are stored: in thousandths, rounded down, so that a bound of them stays a bound.

    Meaning     the mean of probabilities that were rounded down lies at most a thousandth below theirs, never above; what is
                certified is the class of the larger mean
    Shapes      selection: K sums of thousandths; estimation: pairs (thousandths that the chosen class got, how often), in
                order, as the bounds of `SOFT_BOUNDS` do not depend on the order of the votes
    Units       sigma_pixel is the noise added to pixels in [0,1]; calls, where known, how many network calls both took
    Errors      ValueError for what is no such tally
    """

    selection: tuple[int, ...]
    estimation: tuple[tuple[int, int], ...]
    sigma_pixel: float
    seed: int | None = None
    calls: int | None = None

    def __post_init__(self):
        selection = units.check_wholes(self.selection, "selection sums")
        if len(selection) < 2 or min(selection) < 0 or not sum(selection):
            raise ValueError(
                f"expected one sum of thousandths >= 0 for each of at least two classes, got {selection}."
            )
        if not isinstance(self.estimation, (tuple, list)):
            raise TypeError(
                f"expected estimation votes as pairs of whole numbers, got a {type(self.estimation).__name__}."
            )
        pairs = tuple(
            units.check_wholes(pair, "a pair of estimation votes") for pair in self.estimation
        )
        shares = [pair[0] for pair in pairs if len(pair) == 2]
        if (
            not pairs
            or len(shares) < len(pairs)
            or shares != sorted(set(shares))
            or not 0 <= shares[0] <= shares[-1] <= THOUSAND
            or min(pair[1] for pair in pairs) < 1
        ):
            raise ValueError(
                f"expected pairs of different thousandths from 0 to {THOUSAND}, in order, and how often each was given, got "
                f"{str(self.estimation)[:80]}."
            )
        object.__setattr__(self, "selection", selection)
        object.__setattr__(self, "estimation", pairs)
        object.__setattr__(self, "sigma_pixel", units.check_sigma_pixel(self.sigma_pixel))

    @classmethod
    def of_thousandths(
        cls, selection: np.ndarray, given: np.ndarray, sigma_pixel: float, **known
    ) -> "SoftTally":
        """The tally of votes. Shapes: selection [K] sums, given [n] thousandths that the chosen class got."""
        shares, counts = np.unique(given, return_counts=True)
        pairs = zip(shares.tolist(), counts.tolist(), strict=True)
        return cls(tuple(selection.tolist()), tuple(pairs), sigma_pixel, **known)

    @property
    def n(self) -> int:
        """Estimation votes."""
        return sum(count for _, count in self.estimation)

    @property
    def guess(self) -> int:
        """The class that the selection votes chose: that of the largest sum, the first of equal ones."""
        return int(np.argmax(self.selection))

    @property
    def values(self) -> np.ndarray:
        """What the estimation votes gave that class, in order. Shapes: -> [n], at most 1."""
        shares, counts = np.array(self.estimation).T
        return np.repeat(shares, counts) / THOUSAND


def thousandths(probabilities: np.ndarray) -> np.ndarray:
    """Probabilities in thousandths, rounded down. Shapes: [...] -> [...] of dtype int64."""
    return np.floor(np.asarray(probabilities, dtype=float).clip(0, 1) * THOUSAND).astype(np.int64)


@dataclass(frozen=True)
class SoftStopRule:
    """When soft votes on one picture suffice: the twin of `anytime.StopRule`, by bets.

    Formula     certified: `betting_bound` of the values >= Phi(r / sigma) of the largest radius;
                given up: `betting_bound` of 1 - values at level give_up > 1 - Phi(r / sigma) of the smallest not certified
    Units       sigma_pixel and radii (L2) in pixels of [0,1]
    Why         what bets have made may be read at any time: one alpha pays for all looks and all radii, and the
                certificate is still made by `betting_bound` of the votes cast. Giving up never certifies anything
    Errors      ValueError for a radius that not even `most` sure votes certify
    """

    sigma_pixel: float
    radii: tuple[float, ...]
    alpha: float
    most: int
    give_up: float = 0.05

    def __post_init__(self):
        ceiling = largest_soft_radius(self.most, self.sigma_pixel, self.alpha, "betting")
        radii = sorted(units.check_numbers(self.radii, "radii").double().reshape(-1).tolist())
        if not radii or not 0 <= radii[0] <= radii[-1] <= ceiling:
            raise ValueError(
                f"expected radii from 0 to {ceiling:.4g}, which {self.most} sure votes can certify at sigma "
                f"{self.sigma_pixel:g}, got {self.radii}."
            )
        check_alpha(self.give_up)
        object.__setattr__(self, "radii", tuple(radii))

    def verdict(self, values) -> str:
        """What the votes so far ask for: "go on", "certified", "given up" or "all counted".

        Shapes      values [n], what each gave the class chosen beforehand
        """
        x = _checked(values)
        if x.ndim != 1:
            raise ValueError(f"expected the votes on one picture [n], got shape {list(x.shape)}.")
        proven = betting_bound(x, self.alpha)
        wanted = stats.norm.cdf(np.array(self.radii) / self.sigma_pixel)
        missing = wanted[wanted > proven]
        if not len(missing):
            return "certified"
        if betting_bound(1 - x, self.give_up) > 1 - missing[0]:
            return "given up"
        return "all counted" if len(x) >= self.most else "go on"


@dataclass(frozen=True)
class SoftCertificate:
    """A guarantee for one picture from soft votes, with everything needed to recompute it.

    `prediction` is None, and `radius` 0, where the votes do not suffice (an abstention, which counts as an error).
    Shapes      values: what each of the n estimation votes gave the class
    Units       radius: L2, pixels in [0,1]
    """

    prediction: int | None
    radius: float
    p_lower: float
    values: tuple[float, ...]
    n: int
    alpha: float
    sigma_pixel: float
    bound: str
    seed: int | None = None

    def __post_init__(self):
        units.chosen(self.bound, SOFT_BOUNDS, "the bound of soft votes")
        if len(self.values) != self.n:
            raise ValueError(
                f"expected the {self.n} votes that were cast, got {len(self.values)} values."
            )
        if not self.p_lower <= math.fsum(self.values) / self.n + 1e-12:
            raise ValueError(
                f"expected a lower bound of at most the mean of the votes, got {self.p_lower:.4g} above "
                f"{math.fsum(self.values) / self.n:.4g}."
            )
        most = self.sigma_pixel * stats.norm.ppf(self.p_lower) if self.p_lower >= 0.5 else 0.0
        if self.radius > most * (1 + 1e-12):
            raise ValueError(
                f"expected a radius that the lower bound certifies, at most {most:.4g}, got {self.radius:.4g}."
            )
        if self.prediction is None and self.radius != 0:
            raise ValueError(f"expected radius 0 for an abstention, got {self.radius:.4g}.")

    @property
    def setting(self) -> str:
        """What certificates of one classifier and one confidence have in common."""
        return f"soft votes, sigma={self.sigma_pixel:g}, alpha={self.alpha:g}"


def soft_radius(
    votes: SoftVotes | SoftTally, alpha: float = 0.001, bound: str = "betting"
) -> SoftCertificate:
    """Certify the class of the largest mean probability under noise, or abstain.

    Formula     r = sigma Phi^-1(p),  p the lower bound of E F(x + sigma eps), F the class's probability; abstains
                where p < 1/2
    Meaning     Phi^-1 of the mean of any function to [0,1] is 1/sigma-Lipschitz, so this is the radius of hard votes
                with another F. The classifier certified is another one too: it answers by the mean, not by the majority.
                Soft votes are worth more where the class loses narrowly and wins clearly (between three classes a vote
                lost by .45 to .50 still counts .45), and where few are cast, as they vary less than hits of the same
                mean; hard ones are worth more where the class wins narrowly: a vote won by .6 to .4 counts 1, not .6
    Source      Salman et al. 2019, Lemma 2; bounds as named
    Units       radius: L2, pixels in [0,1]
    Errors      a certificate is wrong with probability at most alpha, over the noise of the votes; ValueError for a
                bound that is not in SOFT_BOUNDS
    """
    values = votes.values
    p = units.chosen(bound, SOFT_BOUNDS, "the bound of soft votes")(values, alpha)
    certain = p >= 0.5
    return SoftCertificate(
        prediction=votes.guess if certain else None,
        radius=float(votes.sigma_pixel * stats.norm.ppf(p)) if certain else 0.0,
        p_lower=p,
        values=tuple(values.tolist()),
        n=votes.n,
        alpha=check_alpha(alpha),
        sigma_pixel=votes.sigma_pixel,
        bound=bound.lower(),
        seed=votes.seed,
    )


def largest_soft_radius(
    n: int, sigma_pixel: float, alpha: float = 0.001, bound: str = "betting"
) -> float:
    """The radius when every vote gives its class all it can, 1: no image can get more from n soft votes.

    Units       L2, pixels in [0,1]; 0 where even such votes prove no majority
    Errors      those of `soft_radius`
    """
    n = units.check_whole(n, "n, the number of votes", least=1)
    sigma_pixel = units.check_sigma_pixel(sigma_pixel)
    p = units.chosen(bound, SOFT_BOUNDS, "the bound of soft votes")(np.ones(n), alpha)
    return float(max(0.0, sigma_pixel * stats.norm.ppf(p)))


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def _bets() -> np.ndarray:
    """The bets, each a share of the largest that cannot lose more than all. Shapes: -> [J]."""
    return np.sin(np.pi * (2 * np.arange(1, BETS + 1) - 1) / (4 * BETS)) ** 2


def _capital(x: np.ndarray, log_mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ln W and its slope in ln m. Shapes: x [...,n], log_mean [...] -> two arrays [...]."""
    gain = x * np.exp(-log_mean)[..., None] - 1
    logs = []
    slopes = []
    for bet in _bets():
        worth = 1 + bet * gain
        logs.append(np.log(worth).sum(-1))
        # d worth / d ln m = -bet X / m = 1 - bet - worth
        slopes.append((1 - bet) * (1 / worth).sum(-1) - x.shape[-1])
    weights = special.softmax(logs, axis=0)
    return special.logsumexp(logs, axis=0) - math.log(BETS), (weights * slopes).sum(0)


def _checked(values) -> np.ndarray:
    x = units.check_numbers(values, "values").detach().cpu().double().numpy()
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"expected at least one value, got an array of shape {list(x.shape)}.")
    if x.size and (x.min() < -SLACK or x.max() > 1 + SLACK):
        raise ValueError(
            f"expected values between 0 and 1, got {x.min():g} to {x.max():g}; these bounds are about probabilities, "
            "not about counts or logits."
        )
    return x.clip(0, 1)


def _rows(votes, name: str) -> np.ndarray:
    rows = units.check_numbers(votes, f"{name} votes").detach().cpu().double().numpy()
    if rows.ndim != 2 or len(rows) == 0 or rows.shape[1] < 2:
        raise ValueError(
            f"expected {name} votes [n,K], a row of probabilities for each noised copy, got shape "
            f"{list(rows.shape)}."
        )
    if rows.min() < -SLACK or rows.max() > 1 + SLACK or rows.sum(1).max() > 1 + 1e3 * SLACK:
        raise ValueError(
            f"expected rows of probabilities as {name} votes, got values from {rows.min():g} to {rows.max():g} with "
            f"sums of up to {rows.sum(1).max():g}; are they counts, or logits before a softmax?"
        )
    return rows.clip(0, 1)


def _as_given(values):
    return float(values) if np.ndim(values) == 0 else values
