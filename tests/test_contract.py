"""Every classifier keeps the contract, and every check of the contract rejects one that breaks it."""

import functools
import re

import contract
import pytest
import torch
from contract import CHECKS
from diffclass import attacks, data, noise, zoo
from diffclass.attacks.spatial import Bent
from diffclass.classifiers.base import Classifier, Fresh, Held, check_logits, decided
from diffclass.classifiers.bayes import BayesClassifier, ExactClassifier, telescoped
from diffclass.classifiers.cnn import ConvClassifier
from diffclass.classifiers.foreign import Foreign
from diffclass.classifiers.idc import TranslationClassifier
from diffclass.classifiers.mirrored import Mirrored
from diffclass.classifiers.noised import (
    ApproximateNoisedClassifier,
    NoisedBayesClassifier,
    TrainedOnNoise,
)
from diffclass.classifiers.one_call import NearestHeadClassifier, NoisedOneCallClassifier
from diffclass.classifiers.purified import (
    Denoising,
    LikelihoodMaximisation,
    Purification,
    PurifiedClassifier,
    Restoration,
    plain_direction,
)
from diffclass.classifiers.smoothed import Smoothed
from diffclass.classifiers.stand_in import StandIn
from diffclass.classifiers.votes import MajorityVote, MeanLogits
from diffclass.data import gallery
from diffclass.denoisers.exact import MixtureDenoiser
from torch import nn

PLANE = (2, 1, 1)
DIGIT = (1, 8, 8)
LAW = data.overlapping()


@functools.cache
def points():
    """Six points of a law of the plane, in float64."""
    return LAW.sample(6, contract.seeded(1), torch.float64)[0]


@functools.cache
def digits():
    """Four pictures of digits."""
    return data.digits().test_images[:4]


@functools.cache
def denoiser():
    """The exact denoiser of the law."""
    return MixtureDenoiser.of_law(LAW)


@functools.cache
def trained():
    """The course's classifier of digits, at few levels."""
    whole = zoo.classifier("digits", "dc")
    return whole.changed(levels=noise.log_levels(0.2, 2.0, 4))


def bayes(**options):
    """The Bayes classifier of the law."""
    levels = noise.log_levels(0.1, 5.0, 6)
    return BayesClassifier(denoiser(), levels, 3, prior=[0.5, 0.3, 0.2], **options)


def exact():
    """The truth about the law."""
    return ExactClassifier(denoiser())


def maximised(classifier, **options):
    """Likelihood maximisation in front of a classifier of the plane."""
    own = dict(rule=plain_direction, rate=0.1, steps=3)
    return PurifiedClassifier(LikelihoodMaximisation(denoiser(), **{**own, **options}), classifier)


def diffpure(classifier, **options):
    """Noising and walking back in front of a classifier of the plane."""
    return PurifiedClassifier(Purification(denoiser(), 0.5, steps=4, **options), classifier)


def walked(classifier, **options):
    """A few steps back from the noise that points carry."""
    return PurifiedClassifier(Restoration(denoiser(), 0.2, steps=4, **options), classifier)


def end_term():
    """Class means and traces of the covariances, which a law of three classes has."""
    means = torch.stack([denoiser().means[denoiser().labels == k].mean(0) for k in range(3)])
    return means.reshape(3, *PLANE), torch.full((3,), 0.1, dtype=torch.float64)


def cnn():
    """A small network that was never trained."""
    return ConvClassifier(DIGIT, 10, (8, 16)).eval()


def slopes(z):
    """Gradients of three logits, all of them of one shape: pulls towards the corners of the plane."""
    return z[:, None] * torch.tensor([1.0, -1.0, 0.5], dtype=z.dtype).reshape(3, 1, 1, 1)


class Module(nn.Module):
    """Somebody's module that draws nothing."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 3).double()
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.3, -2.0]]))

    def forward(self, x):
        """[B,2,1,1] -> [B,3]."""
        return self.layer(x.flatten(1))


class Drawing(Module):
    """Somebody's module that draws by itself: from torch's global state, and from a generator of its own."""

    def __init__(self):
        super().__init__()
        self.generator = contract.seeded(9)

    def forward(self, x):
        """Logits of noised points."""
        own = torch.randn(x.shape, generator=self.generator, dtype=x.dtype)
        return super().forward(x + 0.1 * own + 0.1 * torch.randn_like(x))


class Given(Module):
    """Somebody's module whose noise is an argument, as ours is."""

    def sample_noise(self, images, generator):
        """One noise for each picture."""
        return torch.randn((images, *PLANE), generator=generator)

    def forward(self, x, noise):
        """Logits of noised points."""
        return super().forward(x + 0.1 * noise)


# name -> how it is made, and the pictures that it is asked about
TOYS = {
    "Bayes": (bayes, points),
    "Bayes, end term": (lambda: bayes(moments=end_term(), temperature=3.0), points),
    "Bayes in small chunks": (lambda: bayes(chunk=40), points),
    "Bayes on digits": (trained, digits),
    "noised": (lambda: NoisedBayesClassifier(denoiser(), 0.2, levels=4, samples=2), points),
    "noised digits": (
        lambda: NoisedBayesClassifier(trained().denoiser, 0.2, levels=2),
        digits,
    ),
    "noised, ensemble": (
        lambda: ApproximateNoisedClassifier(denoiser(), 0.2, levels=4, samples=2),
        points,
    ),
    "noised, path": (
        lambda: ApproximateNoisedClassifier(denoiser(), 0.2, form="path", levels=4),
        points,
    ),
    "noised, own path": (
        lambda: ApproximateNoisedClassifier(denoiser(), 0.2, form="own path", levels=4),
        points,
    ),
    "one call of noised points": (lambda: NoisedOneCallClassifier(denoiser(), 0.2), points),
    "nearest head": (lambda: NearestHeadClassifier(denoiser(), 0.2), points),
    "denoised at once, exactly": (
        lambda: PurifiedClassifier(Denoising(denoiser(), 0.2), exact()),
        points,
    ),
    "denoised at once": (lambda: PurifiedClassifier(Denoising(denoiser(), 0.2), bayes()), points),
    "denoised in steps, SDE": (lambda: walked(exact()), points),
    "denoised in steps, ODE": (lambda: walked(bayes(), stochastic=False), points),
    "votes over walks": (lambda: MajorityVote(walked(exact()), 3), points),
    "a network of noised pictures": (lambda: TrainedOnNoise(cnn(), 0.2), digits),
    "votes of noised pictures": (lambda: TrainedOnNoise(MajorityVote(bayes(), 3), 0.2), points),
    "mirrored": (lambda: Mirrored(cnn()), digits),
    "mirrored votes": (lambda: Mirrored(MajorityVote(trained(), 3)), digits),
    "mirrored, noised": (
        lambda: Mirrored(NoisedBayesClassifier(trained().denoiser, 0.2, levels=2)),
        digits,
    ),
    "exact": (exact, points),
    "exact, noised": (lambda: ExactClassifier(denoiser(), sigma_pixel=0.2), points),
    "likelihood maximisation": (lambda: maximised(exact()), points),
    "likelihood maximisation by Adam": (
        lambda: PurifiedClassifier(LikelihoodMaximisation.paper(denoiser(), steps=2), bayes()),
        points,
    ),
    "likelihood maximisation of digits": (
        lambda: PurifiedClassifier(
            LikelihoodMaximisation.paper(trained().denoiser, 0.1, steps=2), trained()
        ),
        digits,
    ),
    "likelihood maximisation, one step": (lambda: maximised(bayes(), steps=1), points),
    "DiffPure, SDE": (lambda: diffpure(bayes()), points),
    "DiffPure, ODE": (lambda: diffpure(exact(), stochastic=False), points),
    "purified twice": (lambda: diffpure(maximised(bayes())), points),
    "a purifier whose gradient is the identity's": (
        lambda: maximised(diffpure(exact(), exact=False), exact=False),
        points,
    ),
    "votes": (lambda: MajorityVote(bayes(), 5), points),
    "votes on digits": (lambda: MajorityVote(trained(), 3), digits),
    "votes of a purified classifier": (lambda: MajorityVote(diffpure(exact()), 5), points),
    "votes behind a purifier": (lambda: maximised(MajorityVote(bayes(), 5)), points),
    "votes of votes": (lambda: MajorityVote(MajorityVote(bayes(), 3), 3), points),
    "mean logits": (lambda: MeanLogits(bayes(), 3), points),
    "mean logits of a purified classifier": (lambda: MeanLogits(diffpure(exact()), 3), points),
    "smoothed": (
        lambda: Smoothed(NoisedBayesClassifier(denoiser(), 0.2, levels=3), votes=120, draws=3),
        points,
    ),
    "smoothed exactly": (
        lambda: Smoothed(ExactClassifier(denoiser(), sigma_pixel=0.2), draws=3),
        points,
    ),
    "smoothed network": (lambda: Smoothed(cnn(), 0.2, draws=3), digits),
    "smoothed after a purifier": (lambda: Smoothed(maximised(exact()), 0.1, draws=3), points),
    "smoothed votes": (lambda: Smoothed(MajorityVote(diffpure(exact()), 2), 0.1, draws=3), points),
    "mean over noised copies": (lambda: Smoothed(cnn(), 0.2, draws=3).surrogate(), digits),
    "network": (cnn, digits),
    "IDC": (lambda: zoo.classifier("digits", "idc"), digits),
    "IDC in one step": (
        lambda: TranslationClassifier(zoo.classifier("digits", "idc").translator, [0]),
        digits,
    ),
    "stand-in": (lambda: StandIn(bayes(), slopes), points),
    "telescoped": (lambda: telescoped(bayes(), 4), points),
    "telescoped on digits": (lambda: telescoped(trained(), 2), digits),
    "stand-in for votes": (lambda: StandIn(MajorityVote(bayes(), 3), slopes), points),
    "view": (lambda: attacks.AttackView(bayes(), 20.0), points),
    "view of a held classifier": (
        lambda: attacks.AttackView.calibrated(Held.seeded(bayes()), points()),
        points,
    ),
    "view of a purified classifier": (lambda: attacks.AttackView(diffpure(bayes()), 20.0), points),
    "view of votes": (lambda: attacks.AttackView(MajorityVote(bayes(), 3), 2.0), points),
    "bent before votes": (
        lambda: Bent(MajorityVote(trained(), 3), digits(), 0.5),
        lambda: torch.rand((4, 2, 8, 8), generator=contract.seeded()),
    ),
    "bent": (
        lambda: Bent(trained(), digits(), 0.5),
        lambda: torch.rand((4, 2, 8, 8), generator=contract.seeded()),
    ),
    "held": (lambda: Held.seeded(bayes(), 2), points),
    "held votes": (lambda: Held.seeded(MajorityVote(bayes(), 3), 2), points),
    "held after a purifier": (lambda: Held.seeded(diffpure(bayes())), points),
    "somebody's": (lambda: Foreign(Module(), 3, PLANE), points),
    "somebody's, hidden noise": (lambda: Foreign(Drawing(), 3, PLANE, "hidden"), points),
    "somebody's, noise as an argument": (lambda: Foreign(Given(), 3, PLANE, "argument"), points),
    "ours as somebody's": (
        lambda: Foreign(Fresh(bayes(), contract.seeded()), 3, PLANE, "hidden"),
        points,
    ),
    "the classifier behind a purifier": (
        lambda: diffpure(bayes()).routes()["the classifier alone"],
        points,
    ),
    "the votes behind a purifier": (
        lambda: maximised(MajorityVote(bayes(), 3)).routes()["the classifier alone"],
        points,
    ),
}
# Bent pictures are a function of flows of the very pictures that it was made with: it cannot be asked about some of them.
WHOLE_ONLY = {(toy, "parts equal the whole") for toy in ("bent", "bent before votes")}


@pytest.mark.parametrize("promise", CHECKS)
@pytest.mark.parametrize("toy", TOYS)
def test_the_contract(toy, promise):
    if (toy, promise) in WHOLE_ONLY:
        pytest.skip("about the very pictures that it was made with")
    make, pictures = TOYS[toy]
    contract.check_promise(promise, make(), pictures())


needs_accelerator = pytest.mark.skipif(
    not torch.accelerator.is_available(), reason="there is no accelerator to compare with"
)


@needs_accelerator
@pytest.mark.parametrize("toy", TOYS)
def test_an_accelerator_agrees(toy):
    make, pictures = TOYS[toy]
    contract.check_accelerator(make(), pictures())


# ---------------------------------------------------------------------------------------------------------------------
# The registry


@functools.cache
def entry(world, name):
    """A classifier of the registry; skips where its weights are yet to be trained."""
    try:
        return zoo.classifier(world, name)
    except FileNotFoundError as error:
        pytest.skip(str(error))


@functools.cache
def photographs():
    """Four generated pictures of the gallery, of as many classes."""
    images, labels = gallery.pictures()
    return images[[int((labels == k).nonzero()[0]) for k in (0, 3, 5, 8)]]


# A vote over a hundred calls and more is held to the promises that cost none: it is one of fewer, but for a number.
MANY_CALLS = 100


def skip_twin(name):
    """Skip a classifier of photographs that differs in its weights alone from one before it: the promises are about the code.

    Why         the printed modules say everything that was chosen, and no weight; the slow test asks the twins as well
    """
    for earlier in zoo.names("cifar10"):
        if earlier == name:
            return
        if made("cifar10", earlier) == made("cifar10", name):
            pytest.skip(f"of the same make as {earlier}")


@functools.cache
def made(world, name):
    """How a classifier of the registry is put together, in words; a name of its own for one without weights."""
    try:
        return repr(zoo.classifier(world, name))
    except FileNotFoundError:
        return name


@pytest.mark.parametrize("promise", CHECKS)
@pytest.mark.parametrize("name", zoo.names("digits"))
def test_every_classifier_of_digits_keeps_the_contract(name, promise):
    classifier = entry("digits", name)
    if classifier.calls > MANY_CALLS and promise not in WITHOUT_CALLS:
        pytest.skip(f"{classifier.calls} calls a picture")
    contract.check_promise(promise, classifier, digits())


# On a CPU a network of photographs takes from hundredths of a second to several for one call. A Bayes classifier is held at
# two of its levels: more of them are no other code. A classifier of many calls is held to the promises that cost none, and
# with `-m slow` to all of them, at all levels; one of very many calls would take hours, and is made of classes that the toys
# and the digits are already held with.
FEW_CALLS = 5
FEW_LEVELS = 2
MOST_CALLS = 100
WITHOUT_CALLS = ("draws begin alike", "wrong noise is refused")


def brief(classifier):
    """A Bayes classifier of a network with all heads at its first levels; others as they are."""
    if isinstance(classifier, BayesClassifier) and classifier.denoiser.one_call:
        return classifier.changed(levels=classifier.levels[:FEW_LEVELS])
    return classifier


@pytest.mark.parametrize("promise", CHECKS)
@pytest.mark.parametrize("name", zoo.names("cifar10"))
def test_every_classifier_of_photographs_keeps_the_contract(name, promise):
    skip_twin(name)
    classifier = brief(entry("cifar10", name))
    if classifier.calls > FEW_CALLS and promise not in WITHOUT_CALLS:
        pytest.skip(f"{classifier.calls} calls a picture; see the slow test")
    contract.check_promise(promise, classifier, photographs())


@pytest.mark.slow
@pytest.mark.parametrize("promise", CHECKS)
@pytest.mark.parametrize("name", zoo.names("cifar10"))
def test_classifiers_of_photographs_keep_the_whole_contract(name, promise):
    classifier = entry("cifar10", name)
    if classifier.calls > MOST_CALLS:
        pytest.skip(f"{classifier.calls} calls a picture")
    contract.check_promise(promise, classifier, photographs())


NOISE = 0.25  # in pixels, of the pictures that a classifier of noised ones is asked about
FEW_NOISED_CALLS = 2  # of the large network of photographs, in the ordinary suite


@functools.cache
def noised_entry(world, name):
    """A classifier of noised pictures; skips where its weights are yet to be trained."""
    try:
        return zoo.noised.classifier(world, name, NOISE)
    except FileNotFoundError as error:
        pytest.skip(str(error))


def with_noise(pictures):
    """Pictures with the noise on them, which leave [0,1]."""
    return pictures + NOISE * torch.randn(pictures.shape, generator=contract.seeded(3))


@pytest.mark.parametrize("promise", CHECKS)
@pytest.mark.parametrize("name", zoo.noised.names("digits"))
def test_every_classifier_of_noised_digits_keeps_the_contract(name, promise):
    classifier = noised_entry("digits", name)
    if classifier.calls > MANY_CALLS and promise not in WITHOUT_CALLS:
        pytest.skip(f"{classifier.calls} calls a picture")
    contract.check_promise(promise, classifier, with_noise(digits()))


@pytest.mark.parametrize("promise", CHECKS)
@pytest.mark.parametrize("name", zoo.noised.names("plane:overlapping"))
def test_every_classifier_of_noised_points_keeps_the_contract(name, promise):
    classifier = noised_entry("plane:overlapping", name)
    contract.check_promise(promise, classifier, with_noise(points().float()))


@pytest.mark.parametrize("promise", CHECKS)
@pytest.mark.parametrize("name", zoo.noised.names("cifar10"))
def test_every_classifier_of_noised_photographs_keeps_the_contract(name, promise):
    classifier = noised_entry("cifar10", name)
    if classifier.calls > FEW_NOISED_CALLS and promise not in WITHOUT_CALLS:
        pytest.skip(f"{classifier.calls} calls a picture")
    contract.check_promise(promise, classifier, with_noise(photographs()))


@needs_accelerator
@pytest.mark.parametrize("world", ["digits", "cifar10"])
def test_an_accelerator_agrees_on_the_registry(world):
    pictures = digits() if world == "digits" else photographs()
    for name in zoo.names(world):
        contract.check_accelerator(entry(world, name), pictures)


# ---------------------------------------------------------------------------------------------------------------------
# Classifiers that break one promise each, beside the honest one that they are made of

CORNERS = torch.tensor([[1.0, 2.0, -0.5], [-1.0, 0.5, 2.0]], dtype=torch.float64)


class Honest(Classifier):
    """Three smooth logits of a noised point."""

    num_classes = 3
    image_shape = PLANE
    scale = "scores"
    calls = 1

    def sample_noise(self, images, generator):
        """One noise for each picture."""
        return torch.randn((images, *PLANE), generator=generator)

    def logits(self, x, noise):
        """See `Classifier.logits`."""
        return ((x + 0.1 * noise).flatten(1) @ CORNERS.to(x)).sin()


class Counting(Honest):
    """Remembers how often it was asked."""

    asked = 0

    def logits(self, x, noise):
        self.asked += 1
        return super().logits(x, noise) + 1e-6 * self.asked


class Reading(Honest):
    """Draws from torch's global generator."""

    def logits(self, x, noise):
        return super().logits(x, noise + 0.01 * torch.randn_like(noise))


class Clamping(Honest):
    """Clamps its pictures in place."""

    def logits(self, x, noise):
        x.clamp_(0.4, 0.6)
        return super().logits(x, noise)


class Centred(Honest):
    """Logits less their mean over the batch."""

    def logits(self, x, noise):
        logits = super().logits(x, noise)
        return logits - logits.mean(0)


class Rescaled(Honest):
    """Noise of unit length over all pictures of the batch."""

    def logits(self, x, noise):
        return super().logits(x, noise / noise.norm())


class FirstNoise(Honest):
    """Every picture under the noise of the first."""

    def logits(self, x, noise):
        return super().logits(x, noise[:1])


class Placed(Honest):
    """Noise that depends on the place in the batch."""

    def logits(self, x, noise):
        places = torch.arange(len(x)).reshape(-1, 1, 1, 1)
        return super().logits(x, noise + 1e-3 * places)


class Shuffled(Honest):
    """Votes that the places in the batch take turns at."""

    scale = "votes"

    def logits(self, x, noise):
        rows = super().logits(x, noise)
        places = torch.arange(len(x))
        return torch.stack([row.roll(int(place)) for row, place in zip(rows, places, strict=True)])


class Wary(Honest):
    """Another function under torch.inference_mode."""

    def logits(self, x, noise):
        return super().logits(x, noise) + 1e-6 * torch.is_inference_mode_enabled()


class Blind(Honest):
    """Another function where no gradient can be taken."""

    def logits(self, x, noise):
        return super().logits(x, noise) + 1e-6 * (not torch.is_grad_enabled())


class Fleeing(Honest):
    """Another function where a gradient is wanted."""

    def logits(self, x, noise):
        return super().logits(x, noise) + 0.01 * x.requires_grad


class Closure(Honest):
    """Keeps a function that does not pickle."""

    def __init__(self):
        super().__init__()
        self.function = lambda logits: logits

    def logits(self, x, noise):
        return self.function(super().logits(x, noise))


class Forgetful(Honest):
    """Forgets a part of itself when it is pickled."""

    def __init__(self):
        super().__init__()
        self.tilt = 0.1

    def __getstate__(self):
        return {**self.__dict__, "tilt": 0.0}

    def logits(self, x, noise):
        return super().logits(x, noise) + self.tilt * x.flatten(1)[:, :1]


class LevelFirst(Honest):
    """The picture axis is the second one of its noise."""

    def sample_noise(self, images, generator):
        return torch.randn((4, images, *PLANE), generator=generator)


class Shared(Honest):
    """One noise for all pictures that are drawn together."""

    def sample_noise(self, images, generator):
        return super().sample_noise(1, generator).expand(images, -1, -1, -1)


class Remembering(Honest):
    """Noise that depends on how much was drawn before."""

    drawn = 0

    def sample_noise(self, images, generator):
        self.drawn += images
        return super().sample_noise(images, generator) + self.drawn


class Global(Honest):
    """Noise from torch's global generator."""

    def sample_noise(self, images, generator):
        return torch.randn(images, *PLANE)


class Rooted(Honest):
    """Noise from a seed of its own, whatever generator it is given."""

    def sample_noise(self, images, generator):
        return super().sample_noise(images, contract.seeded(7))


class Trusting(Honest):
    """Takes any noise."""

    def checked_noise(self, noise, images):
        return noise if isinstance(noise, torch.Tensor) else torch.zeros(1, *PLANE)

    def logits(self, x, noise):
        if noise.shape[1:] != PLANE or len(noise) not in (1, len(x)):
            noise = torch.zeros(1, *PLANE)
        return super().logits(x, noise)


class Raising(Honest):
    """Refuses a wrong noise with the wrong kind of error."""

    def checked_noise(self, noise, images):
        try:
            return super().checked_noise(noise, images)
        except ValueError as error:
            raise TypeError(str(error)) from error


class Percent(Honest):
    """Logits of no known scale."""

    scale = "percent"


class Free(Honest):
    """Costs nothing, it says."""

    calls = 0


class TooMany(Honest):
    """More classes than logits."""

    num_classes = 4


class Single(Honest):
    """Logits in another precision than that of the pictures."""

    def logits(self, x, noise):
        return super().logits(x, noise).float()


class Undefined(Honest):
    """Infinite for a picture without noise to the left."""

    def logits(self, x, noise):
        return super().logits(x, noise) / (noise[:, :1, 0, 0] > 0)


class Detached(Honest):
    """Says that it has a gradient, and has none."""

    def logits(self, x, noise):
        return super().logits(x, noise).detach()


class Rooty(Honest):
    """A gradient that is infinite everywhere: the slope of a root at 0."""

    def logits(self, x, noise):
        return super().logits(x, noise) + (x - x.detach()).flatten(1).sum(1, keepdim=True).sqrt()


class Flat(Honest):
    """A gradient that is zero everywhere."""

    def logits(self, x, noise):
        return super().logits(x.detach(), noise) + 0 * x.flatten(1)[:, :1]


class Other(Honest):
    """Its second gradient is that of another function."""

    def gradients(self):
        return {"exact": self, "bpda": Tilted()}


class Tilted(Honest):
    """Nearly the honest one."""

    def logits(self, x, noise):
        return super().logits(x, noise) + 1e-3


class Votes(Honest):
    """Votes without a gradient, and without anything to climb in their place."""

    scale = "votes"

    @torch.no_grad()
    def logits(self, x, noise):
        return nn.functional.one_hot(super().logits(x, noise).argmax(1), 3).to(x)

    def gradients(self):
        return {}


class OtherNoise(Votes):
    """Votes with a surrogate that wants other noise."""

    def surrogate(self):
        return bayes()


class Substituted(Honest):
    """Has a gradient, and lets something else be attacked all the same."""

    def surrogate(self):
        return Tilted()


class AnyLevels(Honest):
    """Gives a classifier for every number of levels."""

    def at_levels(self, count):
        return self


class Unlevelled(Honest):
    """Offers a number of levels that it refuses."""

    level_counts = (2,)


class OtherAtTwo(Honest):
    """At two levels it is a classifier of another scale."""

    level_counts = (2,)

    def at_levels(self, count):
        return Halved() if count == 2 else super().at_levels(count)


class Halved(Honest):
    """Half as dear."""

    calls = 2
    scale = "nats"


class AsDear(Honest):
    """Two levels cost what all of them do."""

    level_counts = (2,)

    def at_levels(self, count):
        return Honest() if count == 2 else super().at_levels(count)


class WrongRoute(Honest):
    """A route that wants noise of its own."""

    def routes(self):
        return {"Bayes": bayes()}


class BlockedRoute(Honest):
    """A route that cannot be climbed."""

    def routes(self):
        return {"detached": Detached()}


BROKEN = [  # the promise that is broken, who breaks it, and what its check says
    ("same bits twice", Counting, "the same bits for the same pixels and noise"),
    ("same bits twice", Reading, "the same bits for the same pixels and noise"),
    ("same bits twice", Clamping, "leave its pictures and its noise as they were"),
    ("parts equal the whole", Centred, "a prefix of Centred to be the same"),
    ("parts equal the whole", Rescaled, "a prefix of Rescaled to be the same"),
    ("parts equal the whole", FirstNoise, "chosen pictures of FirstNoise to be the same"),
    ("parts equal the whole", Placed, "chosen pictures of Placed to be the same"),
    ("parts equal the whole", Shuffled, "chosen pictures of Shuffled to elect the same"),
    ("same in every mode", Wary, "got others for torch.inference_mode"),
    ("same in every mode", Blind, "got others for torch.no_grad"),
    ("same in every mode", Fleeing, "pictures that want a gradient of Fleeing to be the same"),
    ("pickles", Closure, "expected Closure to pickle"),
    ("pickles", Forgetful, "a pickled Forgetful to give the same bits"),
    ("draws begin alike", LevelFirst, "the picture axis first"),
    ("draws begin alike", Shared, "a noise of its own for every picture"),
    ("draws begin alike", Remembering, "to be the beginning of that of 70"),
    ("draws begin alike", Global, "another state of torch's global one"),
    ("draws begin alike", Rooted, "a noise of its own for every picture and key"),
    ("wrong noise is refused", Trusting, "to refuse a wrong noise"),
    ("wrong noise is refused", Raising, "with a ValueError, got TypeError"),
    ("held and fresh", Global, "under the noise of seed 3"),
    ("held and fresh", Rooted, "got a generator that did not move"),
    ("held and fresh", Remembering, "under the noise of seed 3"),
    ("held and fresh", Trusting, "to refuse a noise of two pictures"),
    ("declares itself", Percent, "one of nats, scores, votes, got 'percent'"),
    ("declares itself", Free, "calls of Free to be a whole number >= 1, got 0"),
    ("declares itself", TooMany, r"expected logits \[6,4\]"),
    ("declares itself", Single, "of torch.float32"),
    ("declares itself", Undefined, "expected finite logits"),
    ("gradients leave the values", Detached, "got logits without gradient"),
    ("gradients leave the values", Rooty, "a finite gradient exact"),
    ("gradients leave the values", Flat, "that is not zero"),
    ("gradients leave the values", Other, "under its gradient bpda"),
    ("votes have a surrogate", Votes, "to name a surrogate that has one"),
    ("votes have a surrogate", OtherNoise, "to draw the noise that it draws"),
    ("votes have a surrogate", Substituted, "got a Tilted of other values"),
    ("levels are declared", AnyLevels, "to refuse 0 levels"),
    ("levels are declared", Unlevelled, "to give a classifier at 2 levels, as it offers"),
    ("levels are declared", OtherAtTwo, "to keep its scale at 2 levels"),
    ("levels are declared", AsDear, "to cost another number of calls"),
    ("routes take its noise", WrongRoute, "the route 'Bayes' of WrongRoute to take its noise"),
    ("routes take its noise", BlockedRoute, "got logits without gradient"),
]


@pytest.mark.parametrize("promise", CHECKS)
def test_the_honest_classifier_passes(promise):
    contract.check_promise(promise, Honest(), points())


@pytest.mark.parametrize("promise, offender, sentence", BROKEN)
def test_a_classifier_that_breaks_a_promise_is_named(promise, offender, sentence):
    with pytest.raises(AssertionError, match=sentence):
        contract.check_promise(promise, offender(), points().clone())


def test_every_promise_has_somebody_who_breaks_it():
    assert {promise for promise, _, _ in BROKEN} == set(CHECKS)


# ---------------------------------------------------------------------------------------------------------------------
# Somebody else's modules


def test_hidden_noise_is_held_and_goes_on_as_if_nobody_had_asked():
    """Both of its generators are rewound for the call, and stand afterwards where they stood."""
    module = Drawing()
    wrapped = Foreign(module, 3, PLANE, "hidden")
    own = module.generator.get_state()
    before = torch.get_rng_state()
    held = Held.seeded(wrapped)
    assert torch.equal(held(points()), held(points()))
    assert not torch.equal(held(points()), Held.seeded(wrapped, 1)(points()))
    assert torch.equal(own, module.generator.get_state())
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(module(points()), module(points())), "by itself it draws on"


def test_hidden_noise_does_not_depend_on_the_pictures_beside():
    """A module draws for its whole batch at once; ours asks for one picture at a time, each under its own seed."""
    wrapped = Foreign(Drawing(), 3, PLANE, "hidden")
    noise = contract.noise_of(wrapped, 70)
    x = points()[:1].expand(70, -1, -1, -1)
    whole = wrapped(x, noise)
    for i in (0, 1, 63, 64, 69):
        assert torch.equal(wrapped(x[i : i + 1], noise[i : i + 1])[0], whole[i])
    assert len(whole.unique(dim=0)) == 70


def test_hidden_noise_is_named_as_such():
    """A module that says it draws nothing, and does, breaks the contract."""
    with pytest.raises(AssertionError, match="the same bits for the same pixels"):
        contract.check_promise("same bits twice", Foreign(Drawing(), 3, PLANE), points())


def test_noise_as_an_argument_is_the_modules_own():
    module = Given()
    wrapped = Foreign(module, 3, PLANE, "argument")
    noise = wrapped.sample_noise(6, contract.seeded(2))
    assert torch.equal(noise, module.sample_noise(6, contract.seeded(2)))
    assert torch.equal(wrapped(points(), noise), module(points(), noise.double()))


def linear_logits(x):
    """Logits of points of the plane, of either sign. Shapes: [B,2,1,1] -> [B,3]."""
    weights = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.3, -2.0]], dtype=x.dtype)
    return x.flatten(1) @ weights.T


class Answering(nn.Module):
    """Answers what a function of the pictures says."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer(x)


@pytest.mark.parametrize("randomness", ["none", "hidden"])
@pytest.mark.parametrize(
    "answer, error, sentence",
    [
        (lambda x: (x.flatten(1), None), TypeError, "logits as a tensor, got tuple"),
        (lambda x: x.flatten(1), ValueError, r"logits of shape \[[16],3\], got \[[16], 2\]"),
        (lambda x: x.flatten(1)[1:, [0, 0, 1]], ValueError, r"got \[[05], 3\]"),
        (lambda x: x.flatten(1)[:, [0, 0, 1]] > 0.5, TypeError, "floating-point dtype, got bool"),
        (lambda x: 9 * x.flatten(1)[:, [0, 0, 1]].long(), TypeError, "dtype, got int64; counts"),
    ],
)
def test_what_is_not_logits_is_refused(answer, error, sentence, randomness):
    wrapped = Foreign(Answering(answer), 3, PLANE, randomness).eval()
    noise = contract.noise_of(wrapped, 6)
    with pytest.raises(error, match=sentence):
        wrapped(points(), noise)
    (complaint,) = wrapped.complaints(points())
    assert "expected logits" in complaint


@pytest.mark.parametrize("randomness", ["none", "hidden"])
def test_what_speaks_against_a_module_is_said(randomness):
    soft = Answering(lambda x: torch.softmax(Module()(x), 1))
    wrapped = Foreign(soft, 3, PLANE, randomness).train()
    training, probabilities = wrapped.complaints(points())
    assert "got one in training mode" in training and "got rows of probabilities" in probabilities
    assert Foreign(Module().eval(), 3, PLANE, randomness).eval().complaints(points()) == []


@pytest.mark.parametrize(
    "answer, sentence",
    [
        (lambda f: f.softmax(1), r"got rows of probabilities \(none negative, each sum 1\)"),
        (lambda f: f.softmax(1).half(), "got rows of probabilities"),
        (lambda f: f.softmax(1).bfloat16(), "got rows of probabilities"),
        (lambda f: 100 * f.softmax(1), "got rows of percent, or counts of 100 votes"),
        (lambda f: (100 * f.softmax(1)).round(decimals=2), "got rows of percent"),
        (
            lambda f: (2 * f).abs().clamp(0, 1),
            "and 1, as a sigmoid or a clamp to",
        ),
        (lambda f: (10 * f).sigmoid(), "as a sigmoid or a clamp to"),
        (lambda f: f * torch.nan, "logits became NaN and cannot be judged, for 6 of 6 pictures"),
        (lambda f: f / 0, "logits became infinite and cannot be judged"),
        (lambda f: f.log(), "logits became NaN"),
    ],
)
def test_scores_that_are_no_logits_are_named(answer, sentence):
    wrapped = Foreign(Answering(lambda x: answer(linear_logits(x))).eval(), 3, PLANE)
    (complaint,) = wrapped.complaints(points())
    assert re.search(sentence, complaint), complaint


@pytest.mark.parametrize(
    "answer",
    [
        lambda f: f,
        lambda f: f.log_softmax(1),
        lambda f: 0.2 + 0.1 * f.sigmoid(),  # cosines of embeddings look like this
        lambda f: 50 * f.softmax(1) + 1,
        lambda f: -f.square(),
        lambda f: torch.stack([torch.zeros_like(f[:, 0]), f[:, 0], f[:, 1]], 1),
    ],
)
def test_logits_of_any_size_are_not_complained_of(answer):
    wrapped = Foreign(Answering(lambda x: answer(linear_logits(x))).eval(), 3, PLANE)
    assert wrapped.complaints(points()) == []


class OneClass(Honest):
    """A single score, as of a sigmoid: every picture is of class 0, and no attack changes that."""

    num_classes = 1

    def logits(self, x, noise):
        return super().logits(x, noise)[:, :1].sigmoid()


def test_one_class_is_no_classifier():
    x = points()
    with pytest.raises(
        ValueError, match=r"expected at least two classes, got 1: .* logits \[0, f\]"
    ):
        OneClass()(x, contract.noise_of(OneClass(), len(x)))
    with pytest.raises(ValueError, match="expected at least two classes, got 1"):
        Foreign(Module(), 1, PLANE)


class Broken(Honest):
    """One of its logits is a given number for some pictures."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def logits(self, x, noise):
        logits = super().logits(x, noise).clone()
        logits[2, 1] = self.value
        return logits


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_never_leave_a_classifier(value):
    """Whoever asks, and however it is wrapped: argmax would make a class of them."""
    broken = Broken(value)
    x = points()
    noise = contract.noise_of(broken, len(x))
    kind = "NaN" if value != value else "infinite"
    asked = {
        "itself": lambda: broken(x, noise),
        "its posterior": lambda: broken.posterior(x, noise),
        "held": lambda: Held.seeded(broken)(x),
        "fresh": lambda: Fresh(broken, contract.seeded(0))(x),
        "a view": lambda: attacks.AttackView(broken, 1.0)(x, noise),
        "decided": lambda: decided(broken.logits(x, noise)),
    }
    for what, ask in asked.items():
        with pytest.raises(FloatingPointError, match="logits became"):
            ask()
            pytest.fail(what)
    with pytest.raises(FloatingPointError, match=f"became {kind} and cannot be judged, for 1 of 6"):
        broken(x, noise)


def test_finite_logits_are_returned_as_they_are():
    logits = torch.tensor([[1e30, -1e30], [0.0, 1.0]])
    assert check_logits(logits) is logits and decided(logits).tolist() == [0, 1]


class Normalising(nn.Module):
    """Somebody's module with batch statistics and a layer that drops."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(2).double()
        self.drop = nn.Dropout(0.5)
        self.layer = nn.Linear(2, 3).double()

    def forward(self, x):
        return self.layer(self.drop(self.norm(x)).flatten(1))


class Functional(Module):
    """Somebody's module that drops by a function: none of its layers says so."""

    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


def test_a_training_mode_that_means_nothing_is_no_fault():
    """Wrappers, classifiers, denoisers and layers without weights begin in training mode, and do not depend on it."""
    plain = nn.Sequential(nn.Flatten(), nn.Linear(2, 3).eval(), nn.Softplus())
    for steady in (bayes(), exact(), Held.seeded(bayes()), Foreign(plain, 3, PLANE)):
        assert steady.training
        steady.check_mode()
        assert Classifier.complaints(steady, points()) == []


@pytest.mark.parametrize(
    "module, name",
    [
        (Normalising(), "its module.norm|its module"),
        (nn.Sequential(nn.Flatten(), nn.Linear(2, 3)), r"its module\.1"),
        (nn.Sequential(nn.Flatten(), nn.Dropout(0.5)), r"its module\.1"),
        (nn.Sequential(nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3)), r"its module\.0"),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(2, 3)), "its module"),
        (Functional(), "its module"),
    ],
)
def test_a_training_mode_that_means_something_is_refused(module, name):
    wrapped = Foreign(module, 3, PLANE)
    wrapped.module.train()
    for asked in (wrapped, Held(wrapped, ()), attacks.AttackView(wrapped, 1.0)):
        name_in_it = name if asked is wrapped else name.replace("its ", r"its \S*")
        with pytest.raises(ValueError, match=rf"got one in training mode, .* \(({name_in_it})"):
            asked.check_mode()
    wrapped.module.eval()
    wrapped.check_mode()


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: Foreign(Module(), 3, PLANE, "some"), "one of none, hidden, argument, got 'some'"),
        (lambda: Foreign(Module(), 3, PLANE, "argument"), "expected Module to have sample_noise"),
    ],
)
def test_an_unknown_randomness_gets_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
