"""Votes and mean logits of a random classifier: counted as the binomial law says, one noise after the other."""

import math

import pytest
import torch
import twins
from diffclass import attacks, data, noise
from diffclass.classifiers.base import Classifier, Held, decided, draw
from diffclass.classifiers.bayes import BayesClassifier, ExactClassifier
from diffclass.classifiers.purified import Purification, PurifiedClassifier
from diffclass.classifiers.votes import MajorityVote, MeanLogits
from diffclass.denoisers.exact import MixtureDenoiser
from diffclass.noise import generator_of
from scipy import stats

SHAPE = (1, 2, 2)


class Coin(Classifier):
    """Says class 1 with probability `share`, else class 0."""

    num_classes = 2
    image_shape = SHAPE
    scale = "scores"
    calls = 3

    def __init__(self, share):
        super().__init__()
        self.share = share

    def sample_noise(self, images, generator):
        """A throw for each picture."""
        return torch.rand((images,), generator=generator)

    def logits(self, x, noise):
        """Logits of the throws, and of the pixels, a little."""
        heads = noise.expand(len(x)) < self.share
        thrown = torch.stack([~heads, heads], 1).to(x)
        return thrown + 1e-3 * x.flatten(1)[:, :2]


class Undefined(Coin):
    """Its logits are NaN."""

    def logits(self, x, noise):
        return math.nan * super().logits(x, noise)


class Three(Classifier):
    """Three classes, one of them by one noise."""

    num_classes = 3
    image_shape = SHAPE
    scale = "scores"
    calls = 1

    def sample_noise(self, images, generator):
        """One of three classes for each picture."""
        return torch.randint(3, (images,), generator=generator)

    def logits(self, x, noise):
        """Certain of the class that was drawn."""
        return torch.nn.functional.one_hot(noise.expand(len(x)), 3).to(x)


def pixels(count, seed=0):
    """Pictures away from the faces of the pixel cube."""
    generator = torch.Generator().manual_seed(seed)
    return 0.4 + 0.2 * torch.rand(count, *SHAPE, generator=generator, dtype=torch.float64)


def bayes():
    """The diffusion classifier of a law of the plane."""
    denoiser = MixtureDenoiser.of_law(data.gaussians())
    return BayesClassifier(denoiser, noise.log_levels(0.05, 5, 6), 2)


def points(count=4):
    """Points of its law, and their classes."""
    return data.gaussians().sample(count, torch.Generator().manual_seed(1), torch.float64)


@twins.rejected(
    {
        "one vote": dict(vote=lambda classifier, votes: MajorityVote(classifier, 1)),
        "half the votes": dict(vote=lambda classifier, votes: MajorityVote(classifier, votes // 2)),
    }
)
def test_majority_votes(vote=MajorityVote):
    """Of 101 throws of a 0.6 coin class 1 wins as often as the binomial law says, 0.979; rows sum to the votes."""
    model = vote(Coin(0.6), 101)
    counts = model(pixels(1).expand(1000, -1, -1, -1), draw(model, 1000, 0))
    wins = float((counts.argmax(1) == 1).double().mean())
    wanted = float(stats.binom.sf(50, 101, 0.6))
    assert abs(wins - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / 1000)
    assert bool((counts.sum(1) == 101).all())
    assert abs(float(counts[:, 1].mean()) / 101 - 0.6) < 0.01


def test_each_vote_is_the_answer_under_a_noise_of_its_own():
    """Votes and mean logits, written out: noise number i of a picture is drawn from the key (its seed, i)."""
    x, _ = points()
    model = MajorityVote(bayes(), 7)
    seeds = draw(model, 4, 0)
    assert tuple(seeds.shape) == (4,) and not seeds.is_floating_point()
    counts = torch.zeros(4, 3, dtype=torch.float64)
    total = torch.zeros(4, 3, dtype=torch.float64)
    for picture, seed in enumerate(seeds.tolist()):
        one = x[picture : picture + 1]
        for number in range(7):
            own = model.mean.classifier.sample_noise(1, generator_of(seed, number))
            logits = model.mean.classifier(one, own)[0]
            counts[picture, logits.argmax()] += 1
            total[picture] += logits
    assert torch.equal(model(x, seeds), counts)
    assert torch.allclose(model.surrogate()(x, seeds), total / 7, rtol=1e-12)


def test_votes_never_hold_more_than_one_noise_of_a_picture():
    """The largest noise that the classifier is given has one entry for each picture."""
    seen = []

    class Watched(Coin):
        def logits(self, x, noise):
            seen.append(len(noise))
            return super().logits(x, noise)

    model = MajorityVote(Watched(0.5), 11)
    model(pixels(5), draw(model, 5, 0))
    assert seen == [5] * 11


def test_the_first_of_equal_classes_wins():
    votes = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 2.0], [0.0, 0.0, 0.0]])
    assert decided(votes).tolist() == [0, 1, 0]
    counts = MajorityVote(Three(), 300)(pixels(50), draw(MajorityVote(Three(), 300), 50, 0))
    assert bool((counts.sum(1) == 300).all()) and float(counts.std()) > 0
    assert abs(float(counts[:, 0].mean()) - 100) < 4.5 * math.sqrt(300 * 2 / 9 / 50)


def test_the_mean_has_the_gradient_of_the_mean():
    """Central differences of the mean logits under the same seeds, 1e-6 relative."""
    x, _ = points()
    model = MeanLogits(bayes(), 3)
    seeds = draw(model, 4, 0)
    leaf = x.clone().requires_grad_()
    slope = torch.autograd.grad(model(leaf, seeds)[:, 0].sum(), leaf)[0]
    for axis in range(2):
        push = torch.zeros_like(x)
        push[:, axis] = 1e-5
        rise = (model(x + push, seeds) - model(x - push, seeds))[:, 0] / 2e-5
        assert torch.allclose(slope[:, axis, 0, 0], rise, rtol=1e-6, atol=1e-6 * float(slope.max()))


def test_what_they_declare():
    model = MajorityVote(Coin(0.5), 9)
    assert (model.scale, model.mean.scale) == ("votes", "scores")
    assert model.calls == model.mean.calls == 27
    assert (model.num_classes, model.image_shape, model.deterministic) == (2, SHAPE, False)
    assert model.gradients() == {} and model.surrogate() is model.mean
    assert set(model.mean.gradients()) == {"exact"} and model.mean.surrogate() is model.mean
    votes_of_votes = MajorityVote(model, 3)
    mean_of_means = votes_of_votes.surrogate()
    assert set(mean_of_means.gradients()) == {"exact"} and mean_of_means.calls == 81


def test_routes_and_levels_of_the_voter_are_those_of_its_votes():
    """Attacks and audits climb the mean: it must not lose the other roads to the classifier that it averages."""
    x, _ = points()
    voter = bayes()
    model = MajorityVote(voter, 5)
    seeds = draw(model, 4, 0)
    assert set(model.routes()) == set(model.surrogate().routes()) == set(voter.routes())
    uniform = MeanLogits(voter.changed(weighting=noise.unit_weight), 5)
    for own in (model, model.surrogate()):
        assert torch.equal(own.routes()["uniform weights"](x, seeds), uniform(x, seeds))
        assert own.level_counts == voter.level_counts == (3, 12)
        other = own.at_levels(3)
        same = type(own)(voter.at_levels(3), 5)
        assert other.scale == own.scale and torch.equal(other(x, seeds), same(x, seeds))
        with pytest.raises(ValueError, match=r"offers, one of \(3, 12\), got 4"):
            own.at_levels(4)
    purified = PurifiedClassifier(
        Purification(voter.denoiser, steps=3), ExactClassifier(voter.denoiser)
    )
    alone = MajorityVote(purified, 3).routes()["the classifier alone"]
    votes = draw(MajorityVote(purified, 3), 4, 0)
    assert torch.allclose(alone(x, votes), purified.classifier(x), rtol=1e-12)


def test_votes_have_no_gradient_and_nan_cannot_vote():
    x = pixels(2)
    labels = torch.zeros(2, dtype=torch.long)
    model = MajorityVote(Coin(0.5), 9)
    with pytest.raises(TypeError, match="counts votes"):
        list(attacks.pgd(model, x, labels, 0.1, noise=draw(model, 2, 0)))
    *_, last = attacks.pgd(model.surrogate(), x, labels, 0.1, noise=draw(model, 2, 0))
    assert float(last.size.max()) == pytest.approx(0.1)
    broken = MajorityVote(Undefined(0.5), 3)
    with pytest.raises(FloatingPointError, match="became NaN and cannot be judged"):
        broken(x, draw(broken, 2, 0))


@pytest.mark.parametrize("kind", [MajorityVote, MeanLogits])
def test_what_cannot_be_meant_gets_a_sentence(kind):
    exact = ExactClassifier(MixtureDenoiser.of_law(data.gaussians()))
    for deterministic in (exact, Held.seeded(bayes())):
        with pytest.raises(ValueError, match="expected a random classifier, got a deterministic"):
            kind(deterministic, 5)
    with pytest.raises(ValueError, match="expected at least one draw, got 0"):
        kind(Coin(0.5), 0)
    model = kind(Coin(0.5), 3)
    with pytest.raises(ValueError, match=r"expected noise of shape \[B\] of seeds for .*got \[B\]"):
        model(pixels(2), torch.rand(2))
