"""Soft votes: three bounds of a mean, the promise of each, and the radius that follows."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from diffclass import intervals
from diffclass.certify import soft
from diffclass.certify.soft import SoftVotes, betting_bound, log_capital, soft_radius
from scipy import stats
from twins import patched, rejected

LAWS = 10_000


def deviation(alpha: float, trials: int) -> float:
    """Four standard errors of a rate that is alpha."""
    return 4 * math.sqrt(alpha * (1 - alpha) / trials)


# ---------------------------------------------------------------------------------------------------------------------
# The formulas


@rejected(
    {
        "two-sided": dict(bound=lambda x, alpha: soft.hoeffding_bound(x, alpha / 2)),
        "half of the range": dict(
            bound=lambda x, alpha: (np.mean(x) + soft.hoeffding_bound(x, alpha)) / 2
        ),
    }
)
def test_hoeffdings_bound(bound=soft.hoeffding_bound):
    x = [0.9, 0.8, 1.0, 0.7] * 20
    assert bound(x, 0.01) == pytest.approx(0.85 - math.sqrt(math.log(100) / 160))
    slack = 1 - soft.hoeffding_bound(np.ones(10_000), 0.001)
    assert slack == pytest.approx(0.0186, abs=5e-5)
    assert soft.hoeffding_bound([0.1, 0.1], 0.01) == 0


def with_variance_of_all(x, alpha):
    """The twin that divides the squares by n."""
    x = np.asarray(x)
    n = len(x)
    log = math.log(2 / alpha)
    return x.mean() - math.sqrt(2 * x.var() * log / n) - 7 * log / (3 * (n - 1))


@rejected(
    {
        "one side": dict(bound=lambda x, alpha: soft.bernstein_bound(x, 2 * alpha)),
        "variance over n": dict(bound=with_variance_of_all),
        "Hoeffding's": dict(bound=soft.hoeffding_bound),
    }
)
def test_bernsteins_bound(bound=soft.bernstein_bound):
    x = [0.9, 0.8, 1.0, 0.7] * 20
    variance = math.fsum((one - 0.85) ** 2 for one in x) / 79
    log = math.log(200)
    wanted = 0.85 - math.sqrt(2 * variance * log / 80) - 7 * log / (3 * 79)
    assert bound(x, 0.01) == pytest.approx(wanted, abs=1e-12)


def expected_capital(capital, law: dict, draws: int, mean: float) -> float:
    """E W(mean) after so many draws of a law of a few values, by all ways that they can come."""
    return math.fsum(
        math.prod(law[x] for x in drawn) * math.exp(capital(list(drawn), mean))
        for drawn in itertools.product(law, repeat=draws)
    )


def of_mean_logarithms(x, mean):
    """The twin that averages the logarithms over the bets."""
    bets = [math.sin(math.pi * (2 * j + 1) / 256) ** 2 for j in range(64)]
    return math.fsum(math.log1p(bet * (one / mean - 1)) for bet in bets for one in x) / 64


@rejected(
    {
        "the bets' sum": dict(capital=lambda x, mean: log_capital(x, mean) + math.log(64)),
        "the mean of logarithms": dict(capital=of_mean_logarithms),
        "against the mean of the numbers": dict(
            capital=lambda x, mean: log_capital([*x, mean], mean * (1 - 1e-3))
        ),
    }
)
def test_bets_are_fair(capital=log_capital):
    """At the law's own mean nothing is won on average, whatever the law: exactly 1."""
    laws = ({0.0: 0.3, 1.0: 0.7}, {0.2: 0.5, 0.9: 0.5}, {0.0: 0.1, 0.5: 0.6, 1.0: 0.3})
    for law in laws:
        mean = math.fsum(x * p for x, p in law.items())
        for draws in (1, 2, 5):
            assert expected_capital(capital, law, draws, mean) == pytest.approx(1, abs=1e-12)
            assert expected_capital(capital, law, draws, 0.8 * mean) > 1.0001


@rejected(
    {
        "alpha halved": dict(bound=lambda x, alpha: betting_bound(x, alpha / 2)),
        "another grid": dict(
            bound=patched(betting_bound, soft, _bets=lambda: np.linspace(0.01, 0.9, 64))
        ),
    }
)
def test_the_betting_bound_has_a_closed_form_for_one_number_and_for_all_ones(bound=betting_bound):
    """The bets have the mean 1/2: W = 1 + (x/m - 1)/2; of ones the sum is a polynomial in 1/m."""
    for x, alpha in ((0.3, 0.1), (1.0, 0.001), (0.9, 0.5)):
        assert bound([x], alpha) == pytest.approx(x * 0.5 / (1 / alpha - 0.5), rel=1e-12)
    bets = [math.sin(math.pi * (2 * j + 1) / 256) ** 2 for j in range(64)]
    m = bound([1.0] * 7, 0.01)
    assert math.fsum((1 + b * (1 / m - 1)) ** 7 for b in bets) / 64 == pytest.approx(100)
    assert bound([0.0, 0.0], 0.1) == 0


def test_the_betting_bound_is_where_the_capital_reaches_one_over_alpha():
    x = np.random.default_rng(0).beta(5, 2, (40, 60))
    x[0] = 0
    x[1, :50] = 0
    bound = betting_bound(x, 0.01)
    assert bound[0] == 0 and (bound < x.mean(1) + 1e-15).all()
    np.testing.assert_allclose(log_capital(x[1:], bound[1:]), math.log(100), atol=1e-9)
    # the order of the numbers is of no account, and rows do not see one another
    np.testing.assert_allclose(betting_bound(np.sort(x), 0.01), bound, atol=1e-12)
    assert betting_bound(x[7], 0.01) == pytest.approx(bound[7], abs=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# The promises


def laws(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of many laws on [0,1], half of them smooth, half of two values, and their means: [L,40], [L]."""
    rng = np.random.default_rng(seed)
    a, b = rng.uniform(0.1, 5, (2, LAWS // 2, 1))
    smooth = rng.beta(a, b, (LAWS // 2, 40))
    low, share = rng.uniform(0, 1, (2, LAWS // 2, 1))
    two = np.where(rng.random((LAWS // 2, 40)) < share, 1.0, low)
    means = np.concatenate([a / (a + b), share + (1 - share) * low])[:, 0]
    return np.concatenate([smooth, two]), means


@rejected(
    {
        "the mean itself": dict(bounds={"mean": lambda x, alpha: x.mean(-1)}),
        "a normal law": dict(
            bounds={
                "normal": lambda x, alpha: (
                    x.mean(-1) - stats.norm.isf(alpha) * x.std(-1, ddof=1) / math.sqrt(40)
                )
            }
        ),
    }
)
def test_bounds_exceed_the_mean_less_often_than_alpha_says(bounds=soft.SOFT_BOUNDS):
    x, means = laws(1)
    alpha = 0.02
    for bound in bounds.values():
        wrong = (bound(x, alpha) > means).mean()
        assert wrong <= alpha + deviation(alpha, LAWS)


@rejected({"a normal law's, at every look": dict(looks_of="normal")})
def test_the_betting_bound_holds_at_all_looks_at_once(looks_of="betting"):
    """Its twin is the bound of a normal law, read at every look."""
    x, means = laws(2)
    alpha = 0.05
    wrong = np.zeros(LAWS, dtype=bool)
    for n in (5, 10, 20, 30, 40):
        seen = x[:, :n]
        if looks_of == "betting":
            wrong |= log_capital(seen, means) >= -math.log(alpha)
        else:
            width = stats.norm.isf(alpha) * seen.std(1, ddof=1) / math.sqrt(n)
            wrong |= seen.mean(1) - width > means
    assert wrong.mean() <= alpha


def test_clopper_and_pearsons_bound_of_a_mean_breaks_its_promise():
    """Numbers that are always one half, rounded to hits: at alpha = 0.7 the bound is above the mean every time."""
    hits = math.floor(np.full(10, 0.5).sum())
    assert intervals.lower_bound(hits, 10, 0.7) > 0.5
    for bound in soft.SOFT_BOUNDS.values():
        assert bound(np.full(10, 0.5), 0.7) <= 0.5


def test_numbers_that_vary_little_are_bounded_better_than_hits():
    x = np.random.default_rng(3).beta(90, 10, 1000)
    hits = intervals.lower_bound(math.floor(x.sum()), 1000, 0.001)
    hoeffding, bernstein, betting = (bound(x, 0.001) for bound in soft.SOFT_BOUNDS.values())
    assert hoeffding < hits < bernstein < betting < 0.9


# ---------------------------------------------------------------------------------------------------------------------
# The certificate


def votes_of(p, selection=20, sigma=0.25, seed=None) -> SoftVotes:
    """Votes of two classes, the first with these probabilities, the first of them for the selection."""
    rows = np.stack([p, 1 - np.asarray(p)], 1)
    return SoftVotes(rows[:selection], rows[selection:], sigma, seed)


@rejected({"no bound": dict(bounds={"mean": lambda x, alpha: x.mean(-1)})})
def test_soft_certificates_of_a_linear_classifier_stay_below_the_true_distance(
    bounds=soft.SOFT_BOUNDS,
):
    """F = Phi(x/s) of a point at distance d: E F = Phi(d / sqrt(sigma^2 + s^2)), less than hard votes' Phi(d / sigma)."""
    rng = np.random.default_rng(4)
    sigma = 0.25
    distance = 0.2
    for s in (0.3, 0.05):
        truth = sigma * distance / math.sqrt(sigma**2 + s**2)
        assert truth < distance
        for bound in bounds.values():
            gaps = []
            for n, repeats in ((100, 400), (1000, 40), (5000, 10)):
                x = distance + sigma * rng.standard_normal((repeats, n))
                share = bound(stats.norm.cdf(x / s), 0.01)
                radius = sigma * stats.norm.ppf(np.maximum(share, 0.01))
                assert (radius > truth).mean() <= 0.01 + deviation(0.01, repeats)
                gaps.append(truth - radius.mean())
            assert gaps[0] > gaps[1] > gaps[2] > 0


def test_a_soft_certificate_says_what_it_is_worth():
    rng = np.random.default_rng(5)
    votes = votes_of(rng.beta(9, 1, 320), seed=8)
    for name, bound in soft.SOFT_BOUNDS.items():
        one = soft_radius(votes, 0.001, name)
        p = bound(votes.estimation[:, 0], 0.001)
        assert one.p_lower == p and one.radius == pytest.approx(0.25 * stats.norm.ppf(p))
        assert (one.prediction, one.n, one.seed, one.bound) == (0, 300, 8, name)
        assert one.values == tuple(votes.estimation[:, 0])
    doubtful = soft_radius(votes_of(rng.uniform(0.4, 0.65, 120)))
    assert doubtful.prediction is None and doubtful.radius == 0
    with pytest.raises(ValueError, match="votes that were cast"):
        dataclasses.replace(one, n=3000)
    with pytest.raises(ValueError, match="at most the mean"):
        dataclasses.replace(one, p_lower=0.99)
    with pytest.raises(ValueError, match="lower bound certifies"):
        dataclasses.replace(one, radius=1.0)
    with pytest.raises(ValueError, match="radius 0 for an abstention"):
        dataclasses.replace(one, prediction=None)


def test_soft_votes_win_where_votes_are_lost_narrowly_and_lose_where_they_are_won_so():
    rng = np.random.default_rng(6)
    lost = rng.random(1000) < 0.4
    narrow = np.where(lost[:, None], [0.45, 0.5, 0.05], [0.98, 0.01, 0.01])
    soft_one = soft_radius(SoftVotes(narrow[:100], narrow[100:], 0.25))
    hard = int((narrow[100:].argmax(1) == 0).sum())
    assert intervals.lower_bound(hard, 900, 0.001) < soft_one.p_lower
    won = np.tile([0.6, 0.4], (1000, 1)) + rng.uniform(-0.05, 0.05, (1000, 1)) * [1, -1]
    soft_two = soft_radius(SoftVotes(won[:100], won[100:], 0.25))
    assert intervals.lower_bound(900, 900, 0.001) > 0.99 > 0.65 > soft_two.p_lower > 0.5


def test_the_class_of_the_selection_votes_is_judged():
    """The estimation votes prefer another class: that proves nothing of the one that was chosen."""
    selection = np.array([[0.1, 0.9], [0.2, 0.8]])
    votes = SoftVotes(selection, np.tile([0.99, 0.01], (500, 1)), 0.25)
    one = soft_radius(votes)
    assert votes.guess == 1 and one.prediction is None and one.p_lower <= 0.01


def test_votes_may_be_tensors_and_rows_may_leave_something_over():
    rows = torch.full((30, 3), 0.3) + torch.tensor([0.05, 0.0, 0.0])
    votes = SoftVotes(rows[:10], rows[10:], 0.5)
    assert votes.guess == 0 and votes.n == 20
    assert soft_radius(votes).prediction is None


ROWS = np.array([[0.7, 0.3], [0.6, 0.4], [0.9, 0.1]])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SoftVotes(ROWS, [[90, 10]], 0.25), "are they counts, or logits"),
        (lambda: SoftVotes(ROWS, [[-0.5, 0.5]], 0.25), "rows of probabilities"),
        (lambda: SoftVotes(ROWS, [[0.9, 0.9]], 0.25), "sums of up to 1.8"),
        (lambda: SoftVotes(ROWS, [[math.nan, 0.1]], 0.25), "finite numbers"),
        (lambda: SoftVotes(ROWS, [0.9, 0.1], 0.25), r"\[n,K\]"),
        (lambda: SoftVotes(ROWS, [[0.9, 0.05, 0.05]], 0.25), "as many classes, got 2 and 3"),
        (lambda: SoftVotes(ROWS, ROWS, 0.25), "chose the class once more"),
        (lambda: SoftVotes(ROWS, np.repeat(ROWS, 2, 0)[[0, 2, 4, 1]], 0.25), "fresh noise"),
        (lambda: SoftVotes(ROWS, ROWS[[2, 1, 0]], 12), "at most 1, got 12"),
        (
            lambda: soft_radius(SoftVotes(ROWS, ROWS[[2, 1, 0]], 0.25), alpha=0),
            "alpha between 0 and 1",
        ),
        (
            lambda: soft_radius(SoftVotes(ROWS, ROWS[[2, 1, 0]], 0.25), bound="exact"),
            "one of 'hoeffding', 'bernstein', 'betting'",
        ),
        (lambda: soft.bernstein_bound([0.5], 0.01), "at least two values"),
        (lambda: soft.hoeffding_bound([], 0.01), "at least one value"),
        (lambda: betting_bound([3, 4], 0.01), "not about counts"),
        (lambda: betting_bound([0.5, math.nan], 0.01), "finite numbers"),
        (lambda: log_capital([0.5, 0.6], 1.0), "a mean between 0 and 1"),
        (lambda: log_capital([0.5, 0.6], [0.5, 0.6]), "one mean for each row"),
    ],
)
def test_impossible_inputs_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# ---------------------------------------------------------------------------------------------------------------------
# Soft votes as they are stored, and when they suffice


def test_a_tally_keeps_the_votes_rounded_down_and_proves_a_little_less():
    drawn = np.random.default_rng(0).dirichlet([8, 1, 1], 600)
    sums = soft.thousandths(drawn[:100]).sum(0)
    given = soft.thousandths(drawn[100:, 0])
    tally = soft.SoftTally.of_thousandths(sums, given, 0.25, seed=7, calls=3)
    assert tally.n == 500 and tally.guess == 0 and (tally.seed, tally.calls) == (7, 3)
    assert tally.values.tolist() == sorted((given / 1000).tolist())
    lost = np.sort(drawn[100:, 0]) - tally.values
    assert 0 <= lost.min() and 0.0009 < lost.max() < 0.001
    for bound in soft.SOFT_BOUNDS:
        whole = soft_radius(SoftVotes(drawn[:100], drawn[100:], 0.25), 0.001, bound)
        stored = soft_radius(tally, 0.001, bound)
        assert whole.radius - 0.002 < stored.radius <= whole.radius
    assert soft.thousandths(np.array([1.0, 0.9999, -1e-9, 0.0004])).tolist() == [1000, 999, 0, 0]


def test_the_largest_soft_radius_is_that_of_votes_that_give_all():
    for bound in soft.SOFT_BOUNDS:
        ones = soft.SoftTally((5000, 0), ((1000, 400),), 0.5)
        most = soft.largest_soft_radius(400, 0.5, 0.001, bound)
        assert most == pytest.approx(soft_radius(ones, 0.001, bound).radius) and most > 0
    assert soft.largest_soft_radius(1, 0.5) == 0


def verdicts(mean: float, votes: int, rule, seed: int = 0) -> list[str]:
    """What a rule says after every tenth vote."""
    drawn = np.random.default_rng(seed).beta(8 * mean, 8 * (1 - mean), votes)
    return [rule.verdict(drawn[:n]) for n in range(10, votes + 1, 10)]


@rejected(
    {
        "certified by the mean": dict(betting=lambda x, alpha: np.mean(x)),
        "never certified": dict(betting=lambda x, alpha: 0.0),
    }
)
def test_counting_stops_when_bets_know_enough_and_not_before(betting=betting_bound):
    """Sure votes are certified early, votes against it given up early, and those at the edge counted to the end."""
    rule = soft.SoftStopRule(0.25, (0.0, 0.25), 0.001, 1000)
    edge = stats.norm.cdf(1)
    run = patched(verdicts, soft, betting_bound=betting)
    sure = run(0.97, 1000, rule)
    assert "certified" in sure[:20] and "given up" not in sure[: sure.index("certified")]
    assert sure.index("certified") > 1
    hopeless = run(0.3, 1000, rule)
    assert "given up" in hopeless[:20] and "certified" not in hopeless
    between = run(0.7, 1000, rule)  # radius 0 is certified, the next one never
    assert "certified" not in between and "given up" in between
    assert "given up" not in between[:1]
    at_the_edge = run(float(edge), 1000, rule)
    first = next((word for word in at_the_edge if word != "go on"), "")
    assert first == "all counted", first


def test_giving_up_on_the_smallest_radius_that_is_left_is_rarely_wrong():
    """At level .05, with the mean right at the radius and a look now and then."""
    rule = soft.SoftStopRule(0.25, (0.25,), 0.001, 300)
    mean = float(stats.norm.cdf(1))
    drawn = np.random.default_rng(1).beta(8 * mean, 8 * (1 - mean), (100, 300))
    wrong = [any(rule.verdict(x[:n]) == "given up" for n in (10, 40, 120, 299)) for x in drawn]
    assert np.mean(wrong) <= 0.05 + deviation(0.05, 100)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: soft.SoftTally((5, 0), ((500, 3), (400, 1)), 0.25), "in order"),
        (lambda: soft.SoftTally((5, 0), (), 0.25), "in order"),
        (lambda: soft.SoftTally((5,), ((500, 3),), 0.25), "at least two classes"),
        (lambda: soft.SoftTally((0, 0), ((500, 3),), 0.25), "at least two classes"),
        (lambda: soft.SoftTally((5, 0), ((1001, 3),), 0.25), "0 to 1000"),
        (lambda: soft.SoftTally((5, 0), ((0.5, 3),), 0.25), "whole number"),
        (lambda: soft.SoftTally((5, 0), ((500, 3),), -0.25), "sigma"),
        (lambda: soft.SoftStopRule(0.25, (5.0,), 0.001, 100), "sure votes can certify"),
        (lambda: soft.SoftStopRule(0.25, (), 0.001, 100), "sure votes can certify"),
        (lambda: soft.SoftStopRule(0.25, (-0.1,), 0.001, 100), "sure votes can certify"),
        (lambda: soft.SoftStopRule(0.25, (0.1,), 0.001, 100, give_up=1.0), "alpha between"),
        (lambda: soft.largest_soft_radius(0, 0.25), "the number of votes"),
    ],
)
def test_tallies_and_rules_that_cannot_be_meant_are_named(build, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build()
