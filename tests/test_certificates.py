"""Bounds against simulation and scipy, radii against the classifier whose true radius is known, and mutated twins."""

import dataclasses
import math

import numpy as np
import pytest
from diffclass import intervals
from diffclass.certify import certificates
from diffclass.certify.certificates import Certificate, Votes
from scipy import stats
from twins import rejected

REPETITIONS = 20_000
PROBABILITIES = (0.6, 0.9, 0.99, 0.999)


def failure_rate(bound, p: float, n: int, alpha: float, seed: int = 0) -> tuple[float, float]:
    """How often `bound` of a binomial draw exceeds the true p, and the standard error if that happened alpha often."""
    counts = np.random.default_rng(seed).binomial(n, p, REPETITIONS)
    return float((bound(counts, n, alpha) > p).mean()), math.sqrt(alpha * (1 - alpha) / REPETITIONS)


@pytest.mark.parametrize("alpha", [0.01, 0.05])
@pytest.mark.parametrize("p", PROBABILITIES)
def test_lower_bound_covers(p, alpha):
    rate, se = failure_rate(intervals.lower_bound, p, 1000, alpha)
    assert rate <= alpha + 4 * se


@pytest.mark.parametrize("p", PROBABILITIES)
def test_counts_times_ten_breaks_coverage(p):
    """The published shortcut (a tenth of the votes, times ten) fails more than 100 times as often as it says."""
    rate, _ = failure_rate(lambda s, n, a: intervals.lower_bound(10 * s, 10 * n, a), p, 1000, 0.001)
    assert rate > 0.1
    honest, se = failure_rate(intervals.lower_bound, p, 1000, 0.001)
    assert honest <= 0.001 + 4 * se


@pytest.mark.parametrize("p", [0.6, 0.9, 0.99])
def test_upper_bound_covers_and_mirrors_the_lower(p):
    counts = np.random.default_rng(1).binomial(1000, p, REPETITIONS)
    upper = intervals.upper_bound(counts, 1000, 0.05)
    assert (upper < p).mean() <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / REPETITIONS)
    np.testing.assert_allclose(
        upper, 1 - intervals.lower_bound(1000 - counts, 1000, 0.05), atol=1e-12
    )


def test_half_alpha_slip_is_not_our_bound():
    """Twin: a two-sided interval's lower end is valid but spends half of alpha; the twin is visibly more cautious."""
    s = 9900
    n = 10_000
    alpha = 0.001
    two_sided = stats.binomtest(s, n).proportion_ci(1 - alpha, "exact").low
    one_sided = stats.binomtest(s, n, alternative="greater").proportion_ci(1 - alpha, "exact").low
    ours = intervals.lower_bound(s, n, alpha)
    assert ours == pytest.approx(one_sided, abs=1e-12)
    assert ours - two_sided > 1e-4


@pytest.mark.parametrize("p", [0.6, 0.9])
def test_double_alpha_slip_breaks_coverage(p):
    rate, se = failure_rate(lambda s, n, a: intervals.lower_bound(s, n, 2 * a), p, 10_000, 0.05)
    assert rate > 0.05 + 4 * se


@pytest.mark.parametrize("s", [0, 1, 37, 395, 399, 400])
def test_interval_agrees_with_scipy(s):
    theirs = stats.binomtest(s, 400).proportion_ci(0.95, "exact")
    assert intervals.interval(s, 400) == pytest.approx((theirs.low, theirs.high), abs=1e-10)


@pytest.mark.parametrize(
    ("n", "p", "radii"),
    [
        (100, 0.93325, (0.375, 0.750, 1.500)),
        (1000, 0.99312, (0.616, 1.232, 2.463)),
        (10_000, 0.999309, (0.800, 1.599, 3.199)),
        (100_000, 0.999931, (0.953, 1.906, 3.811)),
    ],
)
def test_unanimous_votes(n, p, radii):
    assert intervals.lower_bound(n, n, 0.001) == 0.001 ** (1 / n)
    assert intervals.lower_bound(n, n, 0.001) == pytest.approx(p, abs=6e-6)
    assert [certificates.largest_radius(n, s) for s in (0.25, 0.5, 1.0)] == pytest.approx(
        radii, abs=6e-4
    )


def test_votes_needed_is_the_smallest_count():
    table = {
        0.25: [8526, 9818, 9997, None],
        0.5: [7058, 8526, 9409, 9818],
        1.0: [6139, 7058, 7863, 8526],
    }
    for sigma, wanted in table.items():
        assert [
            certificates.votes_needed(r, 10_000, sigma) for r in (0.25, 0.5, 0.75, 1.0)
        ] == wanted
    for count, enough in ((9408, False), (9409, True)):
        votes = Votes((10, 0), (count, 10_000 - count), 0.5)
        assert (certificates.smoothing_radius(votes).radius >= 0.75) is enough
    assert certificates.votes_needed(certificates.largest_radius(500, 0.25), 500, 0.25) == 500
    assert certificates.votes_needed(0.0, 1000, 0.25) == next(
        s for s in range(1001) if intervals.lower_bound(s, 1000, 0.001) >= 0.5
    )


def test_radius_grows_with_votes_and_stays_below_the_largest():
    n = 2000
    found = [
        certificates.smoothing_radius(Votes((5, 1), (s, n - s), 0.5)) for s in range(0, n + 1, 20)
    ]
    radii = np.array([c.radius for c in found])
    assert (
        (np.diff(radii) >= 0).all()
        and radii[0] == 0
        and radii[-1] == certificates.largest_radius(n, 0.5)
    )
    assert all((c.prediction is None) == (c.p_lower < 0.5) for c in found)
    assert found[0].prediction is None and found[-1].prediction == 0


def test_linear_classifier_radius_is_sound_and_tight():
    """w.x + b under noise sigma votes for its class with probability Phi(d / sigma), d the true radius."""
    rng = np.random.default_rng(2)
    sigma = 0.5
    alpha = 0.01
    for distance in (0.1, 0.3, 0.6):
        p = stats.norm.cdf(distance / sigma)
        gaps = []
        for n in (100, 1000, 100_000):
            radius = sigma * stats.norm.ppf(
                intervals.lower_bound(rng.binomial(n, p, REPETITIONS), n, alpha)
            )
            assert (radius > distance).mean() <= alpha + 4 * math.sqrt(
                alpha * (1 - alpha) / REPETITIONS
            )
            gaps.append(distance - np.maximum(radius, 0).mean())
        assert gaps[0] > gaps[1] > gaps[2] > 0 and gaps[2] < 0.02


def test_selection_votes_choose_and_estimation_votes_judge():
    certificate = certificates.smoothing_radius(Votes((0, 10, 3), (990, 10, 0), 0.25, seed=7))
    assert certificate.prediction is None and certificate.radius == 0 and certificate.seed == 7
    assert "abstains" in str(certificate)


def test_certificate_says_what_it_is_worth():
    text = str(certificates.smoothing_radius(Votes((90, 10), (9900, 100), 0.5)))
    assert text.startswith(
        "certified: no L2 perturbation below r=1.106 changes the smoothed prediction 0"
    )
    for part in ("n=10000", "alpha=0.001", "sigma=0.5", "lower bound 0.9865"):
        assert part in text


def test_certificates_cannot_be_inflated():
    honest = certificates.smoothing_radius(Votes((10, 0), (100, 0), 0.5))
    with pytest.raises(ValueError, match="add up to n = 1000, got 100"):
        dataclasses.replace(honest, n=1000)
    with pytest.raises(ValueError, match="add up to n = 100, got 1000"):
        dataclasses.replace(honest, counts=(1000, 0))
    with pytest.raises(ValueError, match="radius that 100 votes can certify"):
        dataclasses.replace(honest, radius=1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        honest.n = 1000


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Votes((1, 2), (3, -1), 0.5), "counts >= 0"),
        (lambda: Votes((1, 2), (3, 1, 2), 0.5), "as many selection as estimation"),
        (lambda: Votes((1, 2), (0, 0), 0.5), "at least one vote"),
        (lambda: Votes((1, 2), (0.5, 0.5), 0.5), "whole numbers"),
        (lambda: Votes((1, 2), (3, 1), 0.0), "sigma_pixel > 0"),
        (lambda: Votes((1, 2), (3, 1), 31), "at most 1, got 31; did you mean 31/255"),
        (lambda: Votes((1, 2), (3, 1), math.nan), "sigma_pixel > 0, got nan"),
        (lambda: certificates.largest_radius(100, 2.0), "at most 1, got 2"),
        (lambda: certificates.votes_needed(0.5, 100, 2.0), "at most 1, got 2"),
        (lambda: Votes((1,), (3,), 0.5), "at least two classes"),
        (lambda: intervals.lower_bound(5, 4, 0.1), "from 0 to 4"),
        (lambda: intervals.lower_bound(0.97, 4, 0.1), "shares instead of counts"),
        (lambda: intervals.lower_bound(1, 0, 0.1), "at least one trial"),
        (
            lambda: certificates.smoothing_radius(Votes((1, 2), (3, 1), 0.5), alpha=1.0),
            "alpha between 0 and 1",
        ),
        (lambda: intervals.interval(1, 2, level=95), "between 0 and 1"),
        (lambda: certificates.votes_needed(-1, 10, 0.5), "radius >= 0"),
        (lambda: certificates.prediction_changed((1, 2), 2), "among 0..1"),
    ],
)
def test_impossible_inputs_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("law", [(0.5, 0.5), (0.34, 0.33, 0.33), (0.1,) * 10])
def test_prediction_changed_raises_few_false_alarms(law):
    """The hardest truth to leave alone: the original class still wins, by nothing."""
    alpha = 0.05
    repetitions = 4000
    draws = np.random.default_rng(3).multinomial(400, law, repetitions)
    rate = np.mean([certificates.prediction_changed(c, 0, alpha) for c in draws])
    assert rate <= alpha + 4 * math.sqrt(alpha * (1 - alpha) / repetitions)
    naive = np.mean(draws.argmax(1) != 0)  # twin: one vote more is taken for proof
    assert naive > 0.4


def test_prediction_changed_has_power_without_a_majority():
    assert certificates.prediction_changed((100, 800, 50, 50), 0)
    assert not certificates.prediction_changed((450, 100, 225, 225), 0)
    # Twin: "the original class is below 1/2" calls this changed, although the original wins.
    assert intervals.upper_bound(450, 1000, 0.001) < 0.5


def make(prediction, radius, n=1000, sigma=0.5, alpha=0.001) -> Certificate:
    return Certificate(prediction, radius, 0.9, (n, 0), n, alpha, sigma)


def test_certified_accuracy_counts_abstentions_as_errors():
    found = [make(0, 0.3), make(1, 0.9), make(None, 0.0), make(2, 1.2)]
    curve = certificates.certified_accuracy(found, [0, 1, 0, 0], [0.0, 0.3, 0.5, 1.0])
    assert curve.correct.tolist() == [2, 2, 1, 0] and curve.abstained == 1 and curve.n == 4
    assert curve.accuracy.tolist() == [0.5, 0.5, 0.25, 0.0]
    low, high = intervals.interval(2, 4)
    assert (curve.low[0], curve.high[0]) == (low, high)


def test_certified_accuracy_refuses_what_is_not_one_classifier():
    with pytest.raises(ValueError, match="one sigma and one alpha"):
        certificates.certified_accuracy([make(0, 0.3), make(0, 0.1, sigma=0.25)], [0, 0], [0.0])
    with pytest.raises(ValueError, match="one label for each"):
        certificates.certified_accuracy([make(0, 0.3)], [0, 1], [0.0])
    with pytest.raises(ValueError, match="labels >= 0"):
        certificates.certified_accuracy([make(None, 0.0)], [-1], [0.0])


# ---------------------------------------------------------------------------------------------------------------------
# Fresh votes, and many certificates at once


@rejected({"the votes that chose the class judge it": dict(fresh=False)})
def test_false_certificates_of_a_tie_are_as_rare_as_alpha_says(fresh=True):
    """Two classes with half of the votes each: no certificate is right, whichever was chosen."""
    alpha = 0.05
    rng = np.random.default_rng(20)
    first = rng.binomial(1000, 0.5, REPETITIONS)
    estimation = rng.binomial(1000, 0.5, REPETITIONS) if fresh else first
    agreeing = np.where(first >= 500, estimation, 1000 - estimation)
    rate = (intervals.lower_bound(agreeing, 1000, alpha) >= 0.5).mean()
    assert rate <= alpha + 4 * math.sqrt(alpha * (1 - alpha) / REPETITIONS)


@rejected(
    {
        "the expected number": dict(most=lambda b, alpha, level: math.ceil(b * alpha)),
        "one less": dict(most=lambda *a: certificates.wrong_at_most(*a) - 1),
        "one more": dict(most=lambda *a: certificates.wrong_at_most(*a) + 1),
    }
)
def test_so_many_certificates_are_wrong_at_most(most=certificates.wrong_at_most):
    """The smallest number that a sum over the binomial law allows, and it holds in simulated data sets."""
    for pictures, alpha, level in ((500, 0.001, 0.95), (10_000, 0.001, 0.99), (200, 0.05, 0.9)):
        chances = [
            math.comb(pictures, w) * alpha**w * (1 - alpha) ** (pictures - w) for w in range(60)
        ]
        wanted = next(w for w in range(60) if math.fsum(chances[: w + 1]) >= level)
        assert most(pictures, alpha, level) == wanted
    assert most(1, 0.001, 0.95) == 0


def test_the_sure_accuracy_of_a_data_set_is_below_the_true_one():
    """4000 data sets of 200 pictures, certificates at alpha = 0.05: truly safe shares are below `sure` in at most 5 %."""
    rng = np.random.default_rng(21)
    alpha = 0.05
    radius = 0.25  # sigma .25: a share of .8413 is just safe
    shares = rng.uniform(0.8, 0.9, (4000, 200))
    needed = certificates.votes_needed(radius, 200, 0.25, alpha)
    claimed = rng.binomial(200, shares) >= needed
    safe = (shares >= stats.norm.cdf(1.0)) & claimed
    correct = claimed.sum(1)
    wrong = certificates.wrong_at_most(200, alpha)
    assert (safe.sum(1) < correct - wrong).mean() <= 0.05
    assert (safe.sum(1) < correct).mean() > 0.2  # twin: nothing is taken off
    truth = (0.9 - stats.norm.cdf(1.0)) / 0.1
    beyond = intervals.lower_bound(correct, 200, 0.05) - alpha
    assert (beyond > truth).mean() <= 0.05


def test_the_curve_carries_both_bounds():
    found = 90 * [make(0, 0.3)] + 10 * [make(1, 0.9)]
    curve = certificates.certified_accuracy(found, [0] * 100, [0.0, 0.3, 0.5])
    wrong = certificates.wrong_at_most(100, 0.001)
    assert wrong == 1 and curve.sure.tolist() == [0.89, 0.89, 0.0]
    np.testing.assert_allclose(
        curve.sure_beyond, [intervals.lower_bound(90, 100, 0.05) - 0.001] * 2 + [0.0]
    )
    assert (curve.sure <= curve.accuracy).all() and (curve.sure_beyond < curve.accuracy)[:2].all()


def of_sigmas(alpha: float, bound: str = "fixed") -> list[Certificate]:
    """One picture, certified at three sigmas from a share that falls with the noise."""
    return [
        certificates.smoothing_radius(Votes((9, 1), (right, 1000 - right), sigma), alpha, bound)
        for sigma, right in ((0.25, 990), (0.5, 950), (1.0, 600))
    ]


def test_the_best_sigma_of_a_picture_pays_for_all_three():
    own = of_sigmas(0.001 / 3)
    (best,) = certificates.per_image_best([own], 0.001)
    assert best.chosen == own[1] and best.radius == max(one.radius for one in own) > 0
    assert best.alpha == 0.001 and best.sigmas == (0.25, 0.5, 1.0) and best.prediction == 0
    curve = certificates.certified_accuracy(
        certificates.per_image_best([own, of_sigmas(0.001 / 3, "anytime")]), [0, 0], [0.25]
    )
    assert curve.correct.tolist() == [2]
    # shares of alpha need not be equal
    uneven = [
        *of_sigmas(0.0005)[:1],
        *of_sigmas(0.00025)[1:],
    ]
    assert certificates.per_image_best([uneven])[0].radius == uneven[1].radius


def test_the_best_of_several_radii_needs_the_smaller_alpha():
    """Radii of three sigmas with one true value: the largest at the full alpha is false too often."""
    rng = np.random.default_rng(22)
    alpha = 0.05
    counts = rng.binomial(2000, 0.9, (REPETITIONS, 3))
    for spent, holds in ((alpha / 3, True), (alpha, False)):
        wrong = float((intervals.lower_bound(counts, 2000, spent) > 0.9).any(1).mean())
        assert (wrong <= alpha + 4 * math.sqrt(alpha * (1 - alpha) / REPETITIONS)) is holds


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: certificates.per_image_best([of_sigmas(0.001)]), "alpha / 3 = 0.000333 each"),
        (lambda: certificates.per_image_best([[]]), "at least one certificate"),
        (
            lambda: certificates.per_image_best([2 * of_sigmas(0.0001)[:1]]),
            "same different sigmas",
        ),
        (
            lambda: certificates.per_image_best([of_sigmas(0.0001), of_sigmas(0.0001)[:2]]),
            r"got \(0.25, 0.5\) after \(0.25, 0.5, 1.0\)",
        ),
        (
            lambda: certificates.certified_accuracy(of_sigmas(0.0001), [0, 0, 0], [0]),
            "by per_image_best",
        ),
        (lambda: certificates.wrong_at_most(100, 0.001, 95), "below 1, got 95"),
        (lambda: certificates.wrong_at_most(100, 0.0), "alpha between 0 and 1"),
        (lambda: certificates.wrong_at_most(0, 0.001), "at least 1"),
    ],
)
def test_what_cannot_be_said_of_many_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_votes_that_said_when_to_stop_have_no_fixed_bound():
    votes = Votes((9, 1), (40, 2), 0.25, 0, stopped=True)
    assert certificates.smoothing_radius(votes, bound="anytime").radius > 0
    with pytest.raises(ValueError, match="said themselves when to stop"):
        certificates.smoothing_radius(votes)
