"""The interval of an average: it covers, ends where Clopper and Pearson's does, and is not that of pooled draws."""

import math

import pytest
import torch
from diffclass import intervals
from scipy import stats
from twins import rejected


def coverage(interval) -> float:
    """How often an interval of (values, draws) holds the truth, 0.58, of images whose draws have much in common."""
    rng = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(400):
        own = (torch.rand(50, generator=rng) < 0.6).double()  # what an image's draws have in common
        hits = (torch.rand(50, 10, generator=rng) < (0.1 + 0.8 * own)[:, None]).sum(1).tolist()
        low, high = interval([hit / 10 for hit in hits], 10)
        covered += low <= 0.58 <= high
    return covered / 400


def pooled(values, draws):
    """The twin that takes every draw for an image of its own."""
    return intervals.interval(round(sum(values) * draws), len(values) * draws)


def test_the_interval_of_an_average_covers_and_that_of_pooled_draws_does_not():
    assert coverage(intervals.mean_interval) >= 0.93
    assert coverage(pooled) < 0.8


def test_the_interval_of_an_average_at_its_ends():
    assert intervals.mean_interval([1.0] * 30, 10) == (
        pytest.approx(intervals.interval(30, 30)[0]),
        1.0,
    )
    assert intervals.mean_interval([0.0] * 30, 10) == (
        0.0,
        pytest.approx(intervals.interval(0, 30)[1]),
    )
    low, high = intervals.mean_interval([0.5] * 30, 10)  # no image differs: at most all draws count
    assert (low, high) == pytest.approx(intervals.interval(150, 300)) and low < 0.5 < high
    assert intervals.mean_interval([0.4], 10)[0] < 0.4


@pytest.mark.parametrize("n", [1, 2, 3, 10, 40])
def test_bounds_are_where_the_count_has_the_chance_alpha(n):
    """Their definition, by the binomial law itself: P(s or more at the lower) = P(s or fewer at the upper) = alpha."""
    for alpha in (0.001, 0.05):
        for s in range(n + 1):
            low = intervals.lower_bound(s, n, alpha)
            high = intervals.upper_bound(s, n, alpha)
            if s > 0:
                assert float(stats.binom.sf(s - 1, n, low)) == pytest.approx(alpha, rel=1e-6)
            if s < n:
                assert float(stats.binom.cdf(s, n, high)) == pytest.approx(alpha, rel=1e-6)
            assert (low == 0) is (s == 0) and (high == 1) is (s == n)


def of_count(p: float, count: float, level: float) -> tuple[float, float]:
    """Clopper and Pearson's interval of p count hits of `count`, which need not be whole."""
    tail = (1 - level) / 2
    hits = p * count
    low = stats.beta.ppf(tail, hits, count - hits + 1)
    return float(low), float(stats.beta.ppf(1 - tail, hits + 1, count - hits))


def with_variance_over(divisor):
    """The formula of `mean_interval` with another divisor of the sum of squares."""

    def twin(values, draws, level=0.95):
        n = len(values)
        p = math.fsum(values) / n
        variance = math.fsum((value - p) ** 2 for value in values) / divisor(n)
        return of_count(p, min(p * (1 - p) / (variance / n), n * draws), level)

    return twin


def with_variance_of_an_image(values, draws, level=0.95):
    """The twin that forgets to divide the variance by the number of images."""
    p = math.fsum(values) / len(values)
    variance = math.fsum((value - p) ** 2 for value in values) / (len(values) - 1)
    return of_count(p, p * (1 - p) / variance, level)


def of_all_images(values, draws, level=0.95):
    """The twin that counts every image whole, however much its draws differ."""
    return of_count(math.fsum(values) / len(values), len(values), level)


@rejected(
    {
        "n instead of n - 1": dict(mean_interval=with_variance_over(lambda n: n)),
        "n - 2 instead of n - 1": dict(mean_interval=with_variance_over(lambda n: n - 2)),
        "the variance of one image": dict(mean_interval=with_variance_of_an_image),
        "every image whole": dict(mean_interval=of_all_images),
        "pooled draws": dict(mean_interval=lambda values, draws, level=0.95: pooled(values, draws)),
    }
)
def test_the_interval_of_an_average_is_clopper_and_pearsons_of_as_many_images(
    mean_interval=intervals.mean_interval,
):
    """Of values of 0 and 1 these are n - 1 images; of values that differ less, as many more as the variance is smaller."""
    for hits, n in ((3, 10), (10, 20), (1, 5)):
        values = [1.0] * hits + [0.0] * (n - hits)
        for level in (0.95, 0.9):
            wanted = of_count(hits / n, n - 1, level)
            assert mean_interval(values, 10, level) == pytest.approx(wanted)
    # 0.4 and 0.8 by turns: p = 0.6, variance 0.04 n / (n - 1), so p (1 - p) (n - 1) / 0.04 = 6 (n - 1) images
    assert mean_interval([0.4, 0.8] * 6, 10) == pytest.approx(of_count(0.6, 66, 0.95))
    # draws of two: no more than 2 n of them
    assert mean_interval([0.5, 0.5, 0.5, 0.5, 0.5, 1.0], 2) == pytest.approx(
        of_count(7 / 12, 12, 0.95)
    )


def test_what_are_no_shares_gets_a_sentence():
    for values in ([4.0], [-0.1, 0.5], []):
        with pytest.raises(ValueError, match="divide hits by draws"):
            intervals.mean_interval(values, 10)


# ---------------------------------------------------------------------------------------------------------------------
# Pairs


PAIRS = ((0.02, 0.0), (0.05, 0.01), (0.1, 0.1), (0.2, 0.05), (0.4, 0.1), (0.6, 0.0), (0.9, 0.02))


def paired_coverage(paired, images: int, first: float, second: float) -> float:
    """Exactly how often the interval holds the difference, where `first` of the images are right by the first alone."""
    covered = 0.0
    for more in range(images + 1):
        chance_of_more = stats.binom.pmf(more, images, first)
        if chance_of_more < 1e-6:
            continue
        for less in range(images - more + 1):
            chance = chance_of_more * stats.binom.pmf(less, images - more, second / (1 - first))
            if chance < 1e-6:
                continue
            low, high = paired([1.0] * more + [-1.0] * less + [0.0] * (images - more - less))
            covered += chance * (low <= first - second <= high)
    return covered


def without_the_four(differences, level=0.95):
    mapped = [(1 + value) / 2 for value in differences]
    low, high = intervals.mean_interval(mapped, len(mapped) ** 2, level)
    return 2 * low - 1, 2 * high - 1


def with_the_four_alone(differences, level=0.95):
    return without_the_four([*differences, -1.0, 1.0, 0.0, 0.0], level)


@rejected(
    {
        "without the four": dict(paired=without_the_four),
        "with the four alone": dict(paired=with_the_four_alone),
        "one tail for both": dict(
            paired=lambda values: intervals.paired_interval(values, level=0.9)
        ),
    }
)
def test_the_interval_of_pairs_holds_the_difference_as_often_as_it_says(
    paired=intervals.paired_interval,
):
    for images in (16, 32):
        for first, second in PAIRS:
            assert paired_coverage(paired, images, first, second) >= 0.945


def unpaired(differences, level=0.95):
    """The wrong twin: as if the two had been asked about different images, one of them right on half of these."""
    images = len(differences)
    first = images // 2
    second = first - round(sum(differences))
    low, high = intervals.interval(first, images, level)
    other_low, other_high = intervals.interval(second, images, level)
    return low - other_high, high - other_low


@rejected({"unpaired": dict(paired=unpaired)})
def test_the_interval_of_pairs_is_short_where_the_two_answer_alike(
    paired=intervals.paired_interval,
):
    low, high = paired([1.0] * 12 + [-1.0] * 2 + [0.0] * 86)
    assert 0 < low < 0.1 < high < 0.2  # the average, 0.1, is no luck
    assert intervals.sign_test(12, 2) == pytest.approx(0.01294, abs=1e-5)


def test_the_interval_of_pairs_turns_with_its_sign_and_holds_its_average():
    for values in ([0.3, -0.1, 0.0, 1.0], [1.0] * 10, [-1.0] * 3, [0.0] * 50):
        low, high = intervals.paired_interval(values)
        turned = intervals.paired_interval([-value for value in values])
        assert turned == pytest.approx((-high, -low), abs=1e-9)
        assert -1 <= low <= sum(values) / len(values) <= high <= 1
    assert intervals.paired_interval([0.0] * 50)[1] > 0.02


@rejected(
    {
        "one-sided": dict(
            p=lambda more, less: stats.binomtest(more, more + less, 0.5, "greater").pvalue
        ),
        "of the normal law": dict(
            p=lambda more, less: 2 * stats.norm.sf(abs(more - less) / (more + less) ** 0.5)
        ),
    }
)
def test_the_sign_test_counts_coins(p=intervals.sign_test):
    assert p(5, 0) == pytest.approx(2 / 32)
    assert p(1, 5) == pytest.approx(2 * (1 + 6) / 64)
    assert p(3, 3) == pytest.approx(1)


def test_pairs_that_cannot_be_compared_are_refused():
    assert intervals.sign_test(0, 0) == 1
    for values in ([], [1.5], [3, -2]):
        with pytest.raises(ValueError, match="differences between -1 and 1"):
            intervals.paired_interval(values)
    with pytest.raises(ValueError, match="more"):
        intervals.sign_test(-1, 2)
