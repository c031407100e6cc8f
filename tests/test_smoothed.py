"""Smoothing: votes are counted, independent, repeatable, and as frequent as the closed form of a half space says."""

import itertools
import math

import pytest
import torch
import twins
from diffclass import attacks, data
from diffclass.certify import certificates, counting
from diffclass.classifiers import smoothed
from diffclass.classifiers.base import Classifier, Held, draw
from diffclass.classifiers.bayes import ExactClassifier
from diffclass.classifiers.noised import NoisedBayesClassifier
from diffclass.classifiers.purified import Purification, PurifiedClassifier
from diffclass.classifiers.smoothed import Smoothed
from diffclass.denoisers.exact import MixtureDenoiser
from diffclass.noise import seed_of

SHAPE = (1, 2, 2)
NORMAL = torch.tensor([0.5, -0.5, 0.5, 0.5], dtype=torch.float64)


class HalfSpace(Classifier):
    """Two classes on either side of a plane at a known distance; remembers every noised image that it was shown.

    With a `sigma_pixel` it says that it was made for noised pictures, which are then not clamped.
    """

    num_classes = 2
    image_shape = SHAPE
    scale = "scores"
    calls = 1

    def __init__(self, sigma_pixel=None):
        super().__init__()
        self.sigma_pixel = sigma_pixel
        self.seen = []

    def logits(self, x, noise):
        """The signed distance and its opposite."""
        self.seen.append(x.detach())
        distance = (x.flatten(1) - 0.5) @ NORMAL.to(x)
        return torch.stack([distance, -distance], 1)


class Undecided(HalfSpace):
    """Its logits are NaN for one image in a few: argmax would be some class, always the same one."""

    def logits(self, x, noise):
        dark = x.flatten(1).amin(1, keepdim=True) < 0
        return super().logits(x, noise) + torch.where(dark, math.nan, 0.0)


def image(distance: float) -> torch.Tensor:
    """The image at a signed distance from the plane."""
    return (torch.full((1, 4), 0.5, dtype=torch.float64) + distance * NORMAL).reshape(1, *SHAPE)


def last(frames):
    """The final one of what is yielded."""
    *_, final = frames
    return final


def smoothed_half_space(sigma, **options) -> Smoothed:
    """A half space that was made for noised pictures, and remembers them."""
    return Smoothed(HalfSpace(sigma), **options)


def overlapping() -> MixtureDenoiser:
    """The exact denoiser of a law of the plane."""
    return MixtureDenoiser.of_law(data.overlapping())


# ---------------------------------------------------------------------------------------------------------------------
# Votes


def with_noise_times(factor):
    """Smoothing whose noise has another size than it says."""

    def smooth(sigma):
        model = smoothed_half_space(sigma)
        model.mean.sigma = factor * sigma
        return model

    return smooth


@twins.rejected(
    {
        "sigma in model units": dict(smooth=with_noise_times(2.0)),
        "sigma squared": dict(smooth=with_noise_times(0.25)),
    }
)
def test_a_half_space_wins_with_its_closed_form_probability(smooth=smoothed_half_space):
    """A half space at distance d wins with probability Phi(d / sigma), within 4.5 standard errors."""
    for distance, sigma in ((0.1, 0.25), (-0.2, 0.4), (0.0, 0.1), (0.3, 1.0)):
        wins = float(last(smooth(sigma).count(image(distance), 0, 5000))[0]) / 5000
        p = 0.5 * (1 + math.erf(distance / sigma / math.sqrt(2)))
        assert abs(wins - p) < 4.5 * math.sqrt(p * (1 - p) / 5000), (distance, wins, p)


def test_running_counts_grow_to_n_and_every_vote_counts_once():
    counts = list(smoothed_half_space(0.25).count(image(0.1), 0, 230))
    assert [int(c.sum()) for c in counts] == [100, 200, 230]
    assert all(bool((a <= b).all()) for a, b in itertools.pairwise(counts))


def test_votes_come_in_whole_blocks_that_a_longer_count_repeats():
    """Neither how many votes are wanted nor where a count was broken off changes a vote."""
    model = smoothed_half_space(0.25)
    longer = list(model.count(image(0.02), 3, 1000))
    shorter = list(model.count(image(0.02), 3, 730))
    for one, other in zip(longer[:7], shorter[:7], strict=True):
        assert torch.equal(one, other)
    seen = torch.cat(model.mean.base.seen).flatten(1)
    assert len(seen) == 1000 + 730 and torch.equal(seen[:730], seen[1000:])
    cast = ((seen[700:730] - 0.5) @ NORMAL > 0).sum()
    assert int(shorter[-1][0] - shorter[-2][0]) == int(cast)


def test_the_noise_is_gaussian_unclipped_and_of_the_stated_size():
    model = smoothed_half_space(0.5)
    x = image(0.1)
    last(model.count(x, 0, 4000))
    seen = torch.cat(model.mean.base.seen)
    eps = (seen - x) / 0.5
    assert abs(float(eps.mean())) < 4.5 / math.sqrt(16000)
    assert abs(float(eps.var()) - 1) < 4.5 * math.sqrt(2 / 16000)
    assert float(seen.min()) < 0 and float(seen.max()) > 1
    assert len(seen.flatten(1).unique(dim=0)) == 4000


def test_a_base_that_was_made_for_pictures_sees_pictures():
    """Clamping is a part of the smoothed function: the same noise, brought back into the range of pixels."""
    free = smoothed_half_space(0.5)
    clamped = Smoothed(HalfSpace(), 0.5)
    for model in (free, clamped):
        last(model.count(image(0.1), 0, 300))
    noised = torch.cat(free.mean.base.seen)
    assert torch.equal(torch.cat(clamped.mean.base.seen), noised.clamp(0, 1))
    assert float(noised.min()) < 0


def test_the_same_seed_repeats_and_touches_no_global_state():
    before = torch.get_rng_state()
    model = smoothed_half_space(0.25)
    votes = [last(counting.draw_votes(model, image(0.05), seed=seed))[1] for seed in (3, 3, 4)]
    other = last(counting.draw_votes(model, image(0.05), seed=3, picture=1))[1]
    assert votes[0] == votes[1] != votes[2] and votes[0].seed == 3 and votes[0] != other
    assert torch.equal(torch.get_rng_state(), before)


def test_selection_and_estimation_share_no_noise():
    """Every vote sees its own noise, and the class is guessed before, and apart from, the votes that bound it."""
    model = smoothed_half_space(0.25)
    x = image(0.05)
    progress = list(counting.draw_votes(model, x, selection=60, estimation=340, seed=5, picture=7))
    seen = torch.cat(model.mean.base.seen).flatten(1)  # 60 of selection, 340 of estimation
    assert len(seen.unique(dim=0)) == len(seen) == 400
    votes = progress[-1][1]
    assert sum(votes.selection) == 60 and sum(votes.estimation) == 340 and votes.sigma_pixel == 0.25
    selected = seen[:60]
    estimated = seen[60:]
    assert votes.selection[0] == int(((selected - 0.5) @ NORMAL > 0).sum())
    assert votes.estimation[0] == int(((estimated - 0.5) @ NORMAL > 0).sum())
    alone = last(model.count(x, seed_of(5, "estimation", 7), 340))
    assert tuple(alone.tolist()) == votes.estimation
    done = [d for d, _ in progress]
    assert done == [60, 160, 260, 360, 400, 400] and all(v is None for _, v in progress[:-1])


def test_the_certificate_never_exceeds_the_true_distance():
    """At alpha 0.001 all of 40 certificates of a half space are at most its distance, and the best come close."""
    ratios = []
    for i in range(40):
        distance = 0.05 + 0.01 * i
        model = smoothed_half_space(0.25)
        votes = last(counting.draw_votes(model, image(distance), estimation=2000, seed=i))[1]
        ratios.append(certificates.smoothing_radius(votes, alpha=0.001).radius / distance)
    assert max(ratios) <= 1 and max(ratios) > 0.8


def test_a_random_classifier_draws_fresh_noise_for_every_vote():
    """A vote's own noise is inside the counted event: every copy of a block has another, from the block's key."""
    x = data.overlapping().sample(1, torch.Generator().manual_seed(0), torch.float32)[0]
    seen = []
    base = NoisedBayesClassifier(overlapping(), 0.15)
    own = base.logits

    def watched(x, noise):
        seen.append(noise)
        return own(x, noise)

    base.logits = watched
    counts = last(Smoothed(base).count(x, 2, 300))
    drawn = torch.cat(seen).flatten(1)
    assert int(counts.sum()) == 300 and len(drawn) == 300 and len(drawn.unique(dim=0)) == 300
    held = last(Smoothed(Held.seeded(NoisedBayesClassifier(overlapping(), 0.15))).count(x, 2, 300))
    assert int(held.sum()) == 300 and not torch.equal(counts, held), (
        "same picture noise, other internal noise"
    )


def test_votes_keep_no_graph_and_leave_the_caller_its_own_mode():
    """A graph of ten thousand copies would not fit into memory, and votes have no gradient to use it for."""
    modes = []

    class Watched(HalfSpace):
        def logits(self, x, noise):
            modes.append(torch.is_grad_enabled())
            return super().logits(x, noise)

    smooth = Smoothed(Watched(), 0.25, votes=250)
    for _ in smooth.count(image(0.1), 0, 250):
        assert torch.is_grad_enabled()
    smooth(image(0.1).requires_grad_(), draw(smooth, 1, 0))
    assert modes == [False] * 6


def test_counts_are_the_logits_of_the_classifier():
    model = smoothed_half_space(0.25, votes=150)
    x = torch.cat([image(0.1), image(-0.1), image(0.0)])
    seeds = draw(model, 3, 1)
    logits = model(x, seeds)
    assert logits.dtype == x.dtype and bool((logits.sum(1) == 150).all())
    for picture, seed in enumerate(seeds.tolist()):
        counts = last(model.count(x[picture : picture + 1], seed, 150))
        assert torch.equal(logits[picture], counts.to(x))
    shared = model(x, seeds[:1])
    assert torch.equal(shared[0], logits[0]), "one seed for all pictures"


# ---------------------------------------------------------------------------------------------------------------------
# What an attack climbs


def test_the_average_of_noised_logits_has_the_closed_form_mean_and_a_gradient():
    """A half space's logits are linear, so their average over noise is the clean logit, within 4.5 standard errors."""
    x = image(0.1).requires_grad_(True)
    mean = smoothed_half_space(0.25, draws=2000).surrogate()
    logits = mean(x, draw(mean, 1, 0))
    assert abs(float(logits[0, 0].detach()) - 0.1) < 4.5 * 0.25 / math.sqrt(2000)
    assert torch.allclose(torch.autograd.grad(logits[0, 0], x)[0].flatten(), NORMAL, rtol=1e-9)
    batch = torch.cat([image(0.4), image(-0.4)])
    few = smoothed_half_space(0.05, draws=10).surrogate()
    assert few(batch, draw(few, 2, 0)).argmax(1).tolist() == [0, 1]


def test_an_attack_climbs_the_average_and_the_votes_judge():
    x = torch.cat([image(0.1), image(0.2)])
    y = torch.zeros(2, dtype=torch.long)
    model = smoothed_half_space(0.25, votes=1000)
    seeds = draw(model, 2, 0)
    with pytest.raises(TypeError, match="counts votes"):
        list(attacks.pgd(model, x, y, 0.15, noise=seeds, norm="l2"))
    *_, found = attacks.pgd(model.surrogate(), x, y, 0.15, noise=seeds, norm="l2")
    distance = (found.x.flatten(1) - 0.5) @ NORMAL
    assert distance.tolist() == pytest.approx([-0.05, 0.05], abs=1e-6), "straight to the plane"
    assert model(found.x, draw(model, 2, 1)).argmax(1).tolist() == [1, 0]


def test_what_it_declares():
    model = smoothed_half_space(0.25, votes=50, draws=4)
    assert (model.sigma, model.sigma_pixel, model.scale) == (0.25, None, "votes")
    assert model.calls == 50 and model.surrogate().calls == 4
    assert model.gradients() == {} and model.surrogate() is model.mean
    assert model.mean.scale == "scores" and not model.deterministic
    denoiser = overlapping()
    purified = PurifiedClassifier(Purification(denoiser, steps=3), ExactClassifier(denoiser))
    mean = Smoothed(purified, 0.1).surrogate()
    assert set(mean.gradients()) == {"exact", "bpda"}, "BPDA reaches through noised copies"
    of_votes = Smoothed(model, 0.1, draws=2).surrogate()
    assert set(of_votes.gradients()) == {"exact"} and of_votes.calls == 2 * 4


# ---------------------------------------------------------------------------------------------------------------------
# One sigma, and bad input


def test_whoever_says_nothing_gets_a_hundred_votes_and_sixteen_draws_of_their_mean():
    smooth = Smoothed(HalfSpace(), 0.25)
    assert (smooth.votes, smooth.calls, smooth.surrogate().calls) == (100, 100, 16)
    (_, votes) = last(counting.draw_votes(smooth, image(0.1)))
    assert (sum(votes.selection), votes.n) == (100, 1000)  # as many as Cohen et al. select by


def test_smoothing_has_one_sigma():
    """That of a base which was made for one, else the one that is given."""
    assert Smoothed(HalfSpace(0.25)).sigma == Smoothed(HalfSpace(), 0.25).sigma == 0.25
    assert Smoothed(HalfSpace(0.25), 0.25).sigma == 0.25
    assert Smoothed(NoisedBayesClassifier(overlapping(), 0.15)).sigma == 0.15
    assert Smoothed(ExactClassifier(overlapping(), sigma_pixel=0.2)).sigma == 0.2


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: Smoothed(HalfSpace()), "HalfSpace has none of its own, got none"),
        (lambda: Smoothed(HalfSpace(0.25), 0.5), "made for, sigma_pixel 0.25, got 0.5; smoothing"),
        (lambda: Smoothed(HalfSpace(0.25), math.nan), "sigma_pixel 0.25, got nan"),
        (lambda: Smoothed(HalfSpace(), 0.0), "finite noise level sigma_pixel > 0, got 0"),
        (lambda: Smoothed(HalfSpace(), -1.0), "got -1"),
        (lambda: Smoothed(HalfSpace(), math.inf), "got inf"),
        (lambda: Smoothed(HalfSpace(), math.nan), "got nan"),
        (lambda: Smoothed(HalfSpace(), 64), "at most 1, got 64; did you mean 64/255"),
        (lambda: Smoothed(HalfSpace(2.0)), "got 2; .* or 1, half of a noise in model units"),
        (lambda: smoothed.NoisedCopies(HalfSpace(), 1.5, 4), "did you mean 1.5/255, or 0.75"),
        (lambda: Smoothed(HalfSpace(), 0.25, votes=0), "expected at least one vote, got 0"),
        (lambda: Smoothed(HalfSpace(), 0.25, draws=0), "one draw to average over, got 0"),
        (lambda: smoothed.NoisedCopies(HalfSpace(), 0.0, 4), "noise level sigma_pixel > 0"),
        (lambda: smoothed.NoisedCopies(HalfSpace(), 0.25, 0), "one draw to average over, got 0"),
    ],
)
def test_a_smoothed_classifier_that_cannot_be_meant_gets_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize(
    "change, error, sentence",
    [
        (
            dict(x=torch.zeros(2, *SHAPE)),
            ValueError,
            "expected one image, got a batch of 2; a certificate",
        ),
        (dict(x=torch.zeros(SHAPE)), ValueError, "add the batch axis"),
        (dict(x=torch.full((1, *SHAPE), 30.0)), ValueError, "divide by 255"),
        (dict(x=torch.full((1, *SHAPE), math.nan)), ValueError, "expected finite images"),
        (dict(x=torch.zeros(1, 1, 3, 3)), ValueError, r"expected images of shape \[B,1,2,2\]"),
        (dict(votes=0), ValueError, "expected at least one vote, got 0"),
        (
            dict(x=torch.zeros(1, *SHAPE).numpy()),
            TypeError,
            "expected images as a torch.Tensor, got ndarray",
        ),
    ],
)
def test_votes_that_cannot_be_meant_get_a_sentence(change, error, sentence):
    arguments = {"x": torch.zeros(1, *SHAPE), "seed": 0, "votes": 10, **change}
    with pytest.raises(error, match=sentence):
        next(smoothed_half_space(0.25).count(**arguments))


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(selection=0), "expected at least one vote, got 0"),
        (dict(estimation=-5), "expected at least one vote, got -5"),
    ],
)
def test_a_certificate_needs_votes(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        list(counting.draw_votes(smoothed_half_space(0.25), image(0.1), **change))


def test_infinite_logits_are_no_votes():
    """Infinity has a largest class, and an overflow decides nothing."""

    class Overflown(HalfSpace):
        def logits(self, x, noise):
            logits = super().logits(x, noise)
            return torch.where(logits > 0.2, math.inf, logits)

    with pytest.raises(FloatingPointError, match="became infinite and cannot be judged"):
        list(counting.draw_votes(Smoothed(Overflown(0.25)), image(0.1)))


def test_logits_that_are_not_numbers_are_no_votes():
    """Without the error a broken classifier would be certified."""
    model = Smoothed(Undecided(0.25))
    with pytest.raises(FloatingPointError, match="logits became NaN and cannot be judged, for"):
        list(counting.draw_votes(model, image(0.1)))
    with pytest.raises(FloatingPointError, match="logits became NaN and cannot be judged, for"):
        model(image(0.1), draw(model, 1, 0))


@pytest.mark.parametrize("together", [7, 64, 100, 1000])
def test_how_many_votes_are_asked_together_changes_no_count(together):
    """A vote is a function of (seed, its number) alone: other blocks, kept or resumed, are the same votes."""
    half = smoothed_half_space(0.25)
    whole = list(half.count(image(0.1), 7, 1000))[-1]
    parts = list(half.count(image(0.1), 7, 1000, together=together))
    assert parts[-1].tolist() == whole.tolist()
    steps = [int(b.sum() - a.sum()) for a, b in itertools.pairwise(parts)]
    assert max(steps) <= min(together, 100)
    assert int(parts[0].sum()) == min(together, 100)


def test_votes_of_a_double_picture_are_those_of_a_single_one():
    half = smoothed_half_space(0.25)
    single = list(half.count(image(0.1).float(), 7, 500))[-1]
    double = list(half.count(image(0.1).double(), 7, 500))[-1]
    assert (single - double).abs().sum() <= 2
