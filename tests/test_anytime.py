"""The bound that may be read after every vote: its formula, its promise at every look, and what stopping by it saves."""

import dataclasses
import math

import numpy as np
import pytest
from diffclass import intervals
from diffclass.certify import anytime, certificates
from diffclass.certify.anytime import StopRule, anytime_bound, log_evidence
from diffclass.certify.certificates import Votes
from scipy import optimize, stats
from twins import patched, rejected

CLASSIFIERS = 20_000
LOOKS = np.arange(10, 1001, 10)


def deviation(alpha: float, trials: int) -> float:
    """Four standard errors of a rate that is alpha."""
    return 4 * math.sqrt(alpha * (1 - alpha) / trials)


def counted(shares, looks, seed: int) -> np.ndarray:
    """Votes for the class at every look, of one classifier for each share. Shapes: shares [C], looks [L] -> [C,L]."""
    steps = np.diff(looks, prepend=0)
    drawn = np.random.default_rng(seed).binomial(steps, np.asarray(shares)[:, None])
    return drawn.cumsum(1)


# ---------------------------------------------------------------------------------------------------------------------
# The formula


def turned(function):
    """The twin whose prior expects shares near 0."""
    return patched(function, anytime, PRIOR=(0.25, 2.0))


@rejected(
    {
        "another prior": dict(evidence=turned(log_evidence)),
        "no prior's constant": dict(
            evidence=lambda s, n, p: log_evidence(s, n, p) + float(stats.beta.entropy(2, 0.25))
        ),
        "of the wrong votes": dict(evidence=lambda s, n, p: log_evidence(n - s, n, p)),
    }
)
def test_evidence_is_the_ratio_of_two_laws_of_the_count(evidence=log_evidence):
    """Of s among n votes: the beta-binomial law over the binomial one."""
    for n in (1, 2, 17, 400):
        for p in (0.05, 0.5, 0.9):
            s = np.arange(math.floor(n * p) + 1, n + 1)
            wanted = stats.betabinom.logpmf(s, n, 2, 0.25) - stats.binom.logpmf(s, n, p)
            np.testing.assert_allclose(
                [evidence(int(one), n, p) for one in s], wanted, atol=1e-9, rtol=1e-9
            )


def test_votes_below_the_share_say_nothing_against_it():
    assert log_evidence(5, 10, 0.5) == -math.inf and log_evidence(3, 10, 0.5) == -math.inf
    assert log_evidence(0, 0, 0.5) == -math.inf
    assert log_evidence([6, 7], 10, [[0.5], [0.4]]).shape == (2, 2)


def solved(s: int, n: int, alpha: float) -> float:
    """The bound by other means: the mixture as a product of its predictions, the root by Brent's method."""
    hits = math.fsum(math.log(2 + i) for i in range(s))
    misses = math.fsum(math.log(0.25 + i) for i in range(n - s))
    mixture = hits + misses - math.fsum(math.log(2.25 + i) for i in range(n))

    def excess(p):
        return mixture - s * math.log(p) - (n - s) * math.log1p(-p) + math.log(alpha)

    if s == n:
        return math.exp((mixture + math.log(alpha)) / n)
    return optimize.brentq(excess, 1e-300, s / n, xtol=1e-16, rtol=1e-14, maxiter=2000)


@rejected(
    {
        "half of alpha": dict(bound=lambda s, n, alpha: anytime_bound(s, n, alpha / 2)),
        "another prior": dict(bound=turned(anytime_bound)),
        "the fixed bound": dict(bound=intervals.lower_bound),
        "seven digits": dict(bound=lambda s, n, alpha: anytime_bound(s, n, alpha) * (1 + 1e-7)),
    }
)
def test_the_bound_is_the_root(bound=anytime_bound):
    for s, n in ((1, 1), (1, 2), (3, 10), (99, 100), (100, 100), (4000, 5000), (4999, 5000)):
        for alpha in (0.5, 0.001, 1e-9):
            assert bound(s, n, alpha) == pytest.approx(solved(s, n, alpha), abs=1e-12)


def test_the_bound_of_many_counts_is_that_of_each():
    successes = np.array([[0, 1, 5], [10, 3, 0]])
    trials = np.array([10, 10, 20])
    together = anytime_bound(successes, trials, 0.01)
    alone = [
        [anytime_bound(int(s), int(n), 0.01) for s, n in zip(row, trials, strict=True)]
        for row in successes
    ]
    np.testing.assert_allclose(together, alone, atol=1e-15)
    assert isinstance(anytime_bound(3, 10, 0.01), float) and anytime_bound(0, 0, 0.01) == 0
    assert anytime_bound(7, [7, 8, 9], 0.01).shape == (3,)


def test_the_bound_grows_with_votes_and_alpha_and_stays_below_the_fixed_one():
    s = np.arange(1001)
    bound = anytime_bound(s, 1000, 0.001)
    assert (np.diff(bound) > 0).all() and (bound[1:] < s[1:] / 1000).all()
    assert (bound[1:] < intervals.lower_bound(s, 1000, 0.001)[1:]).all()
    assert (anytime_bound(s, 1000, 0.05)[1:] > bound[1:]).all()
    # what is above the bound is what is not rejected
    share = 0.8
    proof = log_evidence(s, 1000, share) >= math.log(1000)
    np.testing.assert_array_equal(proof, bound >= share)


def test_all_correct_has_a_closed_form():
    """n right votes in a row: the product of the predictions (2 + i) / (2.25 + i) over p^n is 1/alpha."""
    for n in (1, 51, 10_000):
        product = math.fsum(math.log((2 + i) / (2.25 + i)) for i in range(n))
        assert anytime_bound(n, n, 0.001) == pytest.approx(
            math.exp((product + math.log(0.001)) / n), abs=1e-13
        )


def test_newton_says_where_nothing_settles():
    with pytest.raises(FloatingPointError, match="found in 200 steps"):
        anytime.falling_root(lambda at: (1.0 + 0 * at, -1.0 + 0 * at), np.zeros(2))


# ---------------------------------------------------------------------------------------------------------------------
# The promise


def fixed_at_every_look(s: np.ndarray, looks: np.ndarray, alpha: float) -> np.ndarray:
    """The twin that reads the bound of a fixed n at every look."""
    tables = [intervals.lower_bound(np.arange(n + 1), int(n), alpha) for n in looks]
    return np.stack([table[s[:, i]] for i, table in enumerate(tables)], 1)


@rejected({"the fixed bound, read at every look": dict(bound=fixed_at_every_look)})
def test_the_bound_holds_at_all_looks_at_once(bound=anytime_bound):
    alpha = 0.01
    shares = np.random.default_rng(3).uniform(0.5, 1, 10_000)
    s = counted(shares, LOOKS, seed=4)
    wrong = (bound(s, LOOKS, alpha) > shares[:, None]).any(1)
    assert wrong.mean() <= alpha + deviation(alpha, len(shares))


def test_the_evidence_holds_at_every_single_vote():
    alpha = 0.05
    shares = np.random.default_rng(5).uniform(0.3, 1, 10_000)
    looks = np.arange(1, 301)
    evidence = log_evidence(counted(shares, looks, seed=6), looks, shares[:, None])
    wrong = (evidence >= -math.log(alpha)).any(1)
    assert 0.001 < wrong.mean() <= alpha


def stopped(rule: StopRule, s: np.ndarray, looks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The look at which each classifier stops, and the verdict there."""
    told = rule.verdict(s, looks)
    first = (told != "go on").argmax(1)
    assert (told[:, -1] != "go on").all()
    return first, told[np.arange(len(s)), first]


@dataclasses.dataclass(frozen=True)
class Peeking(StopRule):
    """The twin that stops by the bound of a fixed n."""

    def verdict(self, successes, trials):
        share = stats.norm.cdf(self.radii[-1] / self.sigma_pixel)
        proven = fixed_at_every_look(successes, trials, self.alpha) >= share
        return np.select(
            [proven, np.broadcast_to(trials >= self.most, proven.shape)],
            ["certified", "all counted"],
            "go on",
        )


@rejected({"the bound of a fixed n": dict(rule=Peeking), "ten times alpha": dict(factor=10)})
def test_false_certificates_are_rarer_than_alpha_with_early_stopping(rule=StopRule, factor=1):
    """The hardest truths: the share is just that of the radius."""
    alpha = 0.01
    for sigma, radius in ((0.25, 0.25), (0.5, 0.25)):
        shares = np.full(CLASSIFIERS, stats.norm.cdf(radius / sigma))
        s = counted(shares, LOOKS, seed=7)
        _, told = stopped(rule(sigma, (radius,), factor * alpha, 1000), s, LOOKS)
        assert (told == "certified").mean() <= alpha


def test_certificates_made_at_the_stop_are_false_less_often_than_alpha_says():
    """Whatever the verdict was: also pictures given up, and all counted, get the certificate of their votes."""
    alpha = 0.01
    rng = np.random.default_rng(8)
    shares = rng.uniform(0.5, 0.999, CLASSIFIERS)
    s = counted(shares, LOOKS, seed=9)
    rule = StopRule(0.5, (0.2, 0.4, 0.8), alpha, 1000)
    look, told = stopped(rule, s, LOOKS)
    assert set(told) == {"certified", "given up", "all counted"}
    share = anytime_bound(s[np.arange(len(s)), look], LOOKS[look], alpha)
    truth = 0.5 * stats.norm.ppf(shares)
    radius = np.where(share >= 0.5, 0.5 * stats.norm.ppf(np.maximum(share, 0.5)), 0)
    assert (radius > truth).mean() <= alpha
    assert (radius > 0.4).mean() > 0.2


def test_giving_up_loses_few_certificates_and_saves_votes():
    """Just above the radius: at most give_up of the pictures are given up."""
    shares = np.full(5000, stats.norm.cdf(1.0) + 1e-3)
    s = counted(shares, LOOKS, seed=10)
    for give_up in (0.05, 0.3):
        _, told = stopped(StopRule(0.25, (0.25,), 0.001, 1000, give_up), s, LOOKS)
        assert 0.001 < (told == "given up").mean() <= give_up
    _, told = stopped(StopRule(0.25, (0.25,), 0.001, 1000, 0), s, LOOKS)
    assert not (told == "given up").any()


def test_stopping_spends_a_fifth_of_the_votes_for_the_same_certificates():
    most = 10_000
    looks = np.arange(20, most + 1, 20)
    shares = np.repeat([0.5, 0.7, 0.9, 0.95, 0.99, 0.999], 100)
    s = counted(shares, looks, seed=11)
    look, told = stopped(StopRule(0.25, (0.25,), 0.001, most), s, looks)
    needed = certificates.votes_needed(0.25, most, 0.25)
    np.testing.assert_array_equal(told == "certified", s[:, -1] >= needed)
    assert most / looks[look].mean() >= 5


@rejected({"a tenth too much": dict(bound=lambda s, n, a: 1.1 * anytime_bound(s, n, a))})
def test_a_linear_classifier_is_certified_from_below_and_ever_closer(bound=anytime_bound):
    """Two equal Gaussians: the smoothed rule is the hyperplane, so the true radius is the distance to it."""
    rng = np.random.default_rng(12)
    sigma = 0.25
    for distance in (0.1, 0.25, 0.4):
        gaps = []
        for n in (100, 1000, 10_000, 1_000_000):
            s = rng.binomial(n, stats.norm.cdf(distance / sigma), 2000)
            radius = sigma * stats.norm.ppf(np.minimum(bound(s, n, 0.01), 1 - 1e-9))
            assert (radius > distance).mean() <= 0.01
            gaps.append(distance - np.maximum(radius, 0).mean())
        assert gaps[0] > gaps[1] > gaps[2] > gaps[3] > 0 and gaps[3] < 0.02 * distance


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts and certificates


def test_verdicts_of_one_picture():
    rule = StopRule(0.25, (0.5, 0.25), 0.001, 1000)
    assert rule.radii == (0.25, 0.5)
    assert rule.verdict(0, 0) == "go on" and isinstance(rule.verdict(0, 0), str)
    first = next(n for n in range(1, 1001) if rule.verdict(n, n) != "go on")
    assert rule.verdict(first, first) == "certified"
    # certified is where the largest radius is
    reach = [certificates.largest_radius(n, 0.25, 0.001, "anytime") for n in (first - 1, first)]
    assert reach[0] < 0.5 <= reach[1]
    # at .9 of the votes the smaller radius is certified (share .84) and the larger (share .977) is out of reach
    assert anytime_bound(900, 1000, 0.001) > stats.norm.cdf(1)
    assert rule.verdict(900, 1000) == "given up" and rule.verdict(250, 500) == "given up"
    assert rule.verdict(977, 1000) == "all counted" and rule.verdict(970, 990) == "go on"
    assert dataclasses.replace(rule, give_up=0).verdict(250, 500) == "go on"


def test_giving_up_asks_for_the_next_radius_not_for_the_largest():
    """Votes that can still reach the small radius go on, though the large one is lost."""
    both = StopRule(0.25, (0.25, 0.5), 0.001, 1000)
    large = StopRule(0.25, (0.5,), 0.001, 1000)
    assert large.verdict(87, 100) == "given up" and both.verdict(87, 100) == "go on"


def test_anytime_certificates_name_their_bound_and_never_exceed_it():
    votes = Votes((9, 1), (990, 10), 0.25, seed=3)
    fixed = certificates.smoothing_radius(votes)
    early = certificates.smoothing_radius(votes, bound="anytime")
    assert (fixed.bound, early.bound) == ("fixed", "anytime")
    assert early.radius == pytest.approx(0.25 * stats.norm.ppf(solved(990, 1000, 0.001)))
    assert 0 < early.radius < fixed.radius and early.counts == votes.estimation
    assert "alpha=0.001 at every look" in str(early) and "every look" not in str(fixed)
    unanimous = certificates.smoothing_radius(Votes((9, 1), (100, 0), 0.25))
    with pytest.raises(ValueError, match="radius that 100 votes can certify"):
        dataclasses.replace(unanimous, bound="anytime")
    with pytest.raises(ValueError, match="the bound of a share of votes"):
        certificates.smoothing_radius(votes, bound="early")
    needed = certificates.votes_needed(0.25, 1000, 0.25, bound="anytime")
    assert anytime_bound(needed, 1000, 0.001) >= stats.norm.cdf(1)
    assert anytime_bound(needed - 1, 1000, 0.001) < stats.norm.cdf(1)
    assert needed > certificates.votes_needed(0.25, 1000, 0.25)


def test_the_guess_of_the_selection_votes_is_judged():
    """Of three classes the second was chosen beforehand; the votes for the first, however many, certify nothing."""
    votes = Votes((3, 5, 2), (990, 8, 2), 0.25)
    assert certificates.smoothing_radius(votes, bound="anytime").prediction is None


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: anytime_bound(11, 10, 0.1), "at most as many successes as trials, got 11 of 10"),
        (lambda: anytime_bound([1, 9], [5, 8], 0.1), "got 9 of 8"),
        (lambda: anytime_bound(0.97, 10, 0.1), "shares instead of counts"),
        (lambda: anytime_bound(-1, 10, 0.1), "whole numbers >= 0"),
        (lambda: anytime_bound(1, 10, 0), "alpha between 0 and 1"),
        (lambda: anytime_bound(1, 10, 1.0), "alpha between 0 and 1"),
        (lambda: anytime_bound(math.nan, 10, 0.1), "finite numbers"),
        (lambda: anytime_bound([1, 2], [3, 4, 5], 0.1), "shapes that fit one another"),
        (lambda: log_evidence(1, 2, 1.0), "share of votes between 0 and 1"),
        (lambda: log_evidence(1, 2, math.nan), "finite numbers"),
        (lambda: StopRule(0.25, (0.25, 0.9), 0.001, 1000), "1000 votes can certify"),
        (lambda: StopRule(0.25, (0.1,), 0.001, 3), "at most 0,"),
        (lambda: StopRule(0.25, (), 0.001, 1000), "at least one radius"),
        (lambda: StopRule(0.25, (-0.1,), 0.001, 1000), "none negative"),
        (lambda: StopRule(0.25, (0.1,), 1.5, 1000), "alpha between 0 and 1"),
        (lambda: StopRule(0.25, (0.1,), 0.001, 1000, 1), "give_up below 1"),
        (lambda: StopRule(25, (0.1,), 0.001, 1000), "at most 1, got 25"),
        (lambda: StopRule(0.25, (0.1,), 0.001, 1000).verdict(5, 4), "counts of another run"),
    ],
)
def test_impossible_inputs_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
