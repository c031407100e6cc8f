"""Random calls of the library: right values give finite numbers of the documented shape, wrong ones a sentence of ours.

Ours is what a `raise` of the library raises: not what torch, numpy or the interpreter say of what they were handed.
"""

import dataclasses
import dis
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import diffclass
import numpy as np
import pytest
import torch
from diffclass import attacks, data, intervals, likelihood, noise, units
from diffclass.certify import anytime, certificates, lipschitz, soft
from diffclass.classifiers import bridges, economical, paths, racing
from diffclass.classifiers.attention import AttentionClassifier
from diffclass.classifiers.base import Classifier, Fresh, Held, draw
from diffclass.classifiers.bayes import BayesClassifier, ExactClassifier, telescoped
from diffclass.classifiers.cnn import ConvClassifier, WideClassifier
from diffclass.classifiers.foreign import Foreign
from diffclass.classifiers.joint import JointClassifier, langevin, temperature, uniform
from diffclass.classifiers.mirrored import Mirrored
from diffclass.classifiers.noised import (
    ApproximateNoisedClassifier,
    NoisedBayesClassifier,
    TrainedOnNoise,
    carried_sigma,
)
from diffclass.classifiers.one_call import NearestHeadClassifier, NoisedOneCallClassifier
from diffclass.classifiers.purified import (
    Denoising,
    LikelihoodMaximisation,
    Purification,
    PurifiedClassifier,
    Restoration,
)
from diffclass.classifiers.smoothed import NoisedCopies, Smoothed
from diffclass.classifiers.votes import MajorityVote, MeanLogits
from diffclass.classifiers.zero_shot import Cost, ZeroShotClassifier
from diffclass.data import corruptions, grainy, pictures
from diffclass.data.worlds import kind_of, world_of
from diffclass.denoisers import latent, network, sampling
from diffclass.denoisers.clipped import Clipped
from diffclass.denoisers.exact import MixtureDenoiser
from diffclass.denoisers.flow import ExactVelocity, FlowDenoiser
from diffclass.denoisers.latent import Autoencoder, Haar, LatentModel
from diffclass.denoisers.lora import Adapter
from diffclass.evaluation import costs, literature, scoreboard
from diffclass.noise import NoiseBank
from diffclass.storage import results, weights
from diffclass.training import adapting
from torch import Tensor

PACKAGE = str(Path(diffclass.__file__).parent)
SPOKEN = (ValueError, TypeError, FloatingPointError, OSError)
FEW = 60  # calls of the ordinary suite, spread over all entries
MANY = 1500

# ---------------------------------------------------------------------------------------------------------------------
# Values: right ones, odd ones that may be taken or refused, and wrong ones that nobody can mean


@dataclass(frozen=True)
class Values:
    """What an argument is drawn from."""

    right: tuple
    odd: tuple = ()
    wrong: tuple = ()


NO_NUMBER = (math.nan, math.inf, -math.inf, None, "0.1", "x", 1j, [], {}, torch.tensor(math.nan))
HUGE = (1e30, 1e308)


def positive(*right, odd=()) -> Values:
    """A number > 0."""
    odd = (*odd, np.float32(right[0]), torch.tensor(float(right[0])), True, 1e-30, *HUGE)
    return Values(right, odd, (*NO_NUMBER, 0, 0.0, -1.0))


def at_least_0(*right) -> Values:
    """A number >= 0."""
    return Values(right, (np.float64(right[0]), 0, 1e-30, True), (*NO_NUMBER, -1.0))


def share(*right) -> Values:
    """A number between 0 and 1, both excluded."""
    return Values(right, (np.float64(right[0]), 1e-9), (*NO_NUMBER, 0, 1, -0.1, 1.5, 95))


def count(*right) -> Values:
    """A whole number >= 1."""
    odd = (np.int64(right[0]), torch.tensor(right[0]), float(right[0]), True, 10**30)
    return Values(right, odd, (*NO_NUMBER, 0, -1, 1.5))


def count_or_0(*right) -> Values:
    """A whole number >= 0."""
    return Values(right, (np.int64(right[0]), 0, True), (*NO_NUMBER, -1, 1.5))


def seeds() -> Values:
    """A seed."""
    return Values((0, 1, 2**31), (np.int64(1), 2**63 - 1), (math.nan, None, "x", 1.5))


def names(*right) -> Values:
    """A name."""
    return Values(right, (right[0].upper(),), ("", "mars", None, 3, "\udce9", [], b"x"))


def fixed(*right) -> Values:
    """Parts that are made elsewhere, such as a denoiser."""
    return Values(right)


def generator() -> Values:
    """A generator, made anew for every call."""
    return Values((lambda: torch.Generator().manual_seed(0),))


PLANE = (2, 1, 1)
DIGIT = (1, 8, 8)


def drawn(*shape, low=0.0, high=1.0, dtype=torch.float32) -> Tensor:
    """Evenly drawn numbers."""
    uniform = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (low + (high - low) * uniform).to(dtype)


def spoilt(x: Tensor, value: float) -> Tensor:
    """The same with one other value."""
    x = x.clone()
    x.view(-1)[0] = value
    return x


def no_images(x: Tensor, any_shape: bool) -> tuple:
    """What is no batch of finite images of this shape."""
    other = () if any_shape else (x.repeat(1, 1, 2, 1), x.repeat(1, 3, 1, 1))
    return (
        *other,
        None,
        "x",
        3,
        0.5,
        x.tolist(),
        x.numpy(),
        x[0],
        x[None],
        (255 * x).byte(),
        x > 0.5,
        x.to(torch.complex64),
        spoilt(x, math.nan),
        spoilt(x, math.inf),
    )


def pixels(shape=PLANE, images=3, any_shape=False) -> Values:
    """Images in [0,1], of any shape where no other part says which."""
    x = drawn(images, *shape, low=0.1, high=0.9)
    wrong = (255 * x, 2 * x - 1 - 0.5, spoilt(x, -0.2), spoilt(x, 1.2))
    odd = (
        x[:0],
        x[:1],
        x.double(),
        x.half(),
        x.clone().requires_grad_(),
        x[:1].expand(images, *shape),
    )
    return Values((x, x.double()), odd, (*no_images(x, any_shape), *wrong))


def points(shape=PLANE, images=3, any_shape=False) -> Values:
    """Images of model space, or with noise on them: any finite values."""
    x = drawn(images, *shape, low=-0.9, high=0.9)
    odd = (x[:0], x[:1], x.half(), x.clone().requires_grad_(), 255 * x, 1e30 * x)
    return Values((x, x.double()), odd, no_images(x, any_shape))


def labels(images=3, classes=2) -> Values:
    """One class for each image."""
    y = torch.arange(images) % classes
    wrong = (None, "x", 1, y.tolist(), y.numpy(), y.float(), y.int(), y[:-1], y[:, None])
    wrong += (y - 1, y + classes, y > 0, torch.nn.functional.one_hot(y, classes))
    return Values((y, 0 * y), (), wrong)


def classes_of(images=4) -> Values:
    """One class for each image, every class among them."""
    values = labels(images, 2)
    return Values(values.right[:1], (), values.wrong)


def scores(images=3, classes=4) -> Values:
    """Logits."""
    f = drawn(images, classes, low=-3, high=3)
    wrong = (None, "x", 3, f.tolist(), f[0], f[:, :1], f[:, :0], f.long(), f > 0)
    return Values((f, f.double(), 100 * f), (f.half(), f[:0]), wrong)


# ---------------------------------------------------------------------------------------------------------------------
# Parts


@dataclass(frozen=True)
class Call:
    """A function, what its arguments are drawn from, and the shape of what it returns for right ones."""

    name: str
    function: Callable
    slots: dict[str, Values]
    shape: Callable[..., tuple] | None = None


LAW = data.gaussians()
EXACT = MixtureDenoiser.of_law(LAW)
K = LAW.num_classes
LEVELS = noise.log_levels(0.1, 5, 4)
BANK = NoiseBank.fixed(LEVELS, PLANE, 2)
BETAS = noise.linear_betas(6, 0.01, 0.2)
CHAIN = NoiseBank.fixed(
    noise.chain_levels(noise.sigma_of_alpha_bar(noise.alpha_bar(BETAS))), PLANE, 2
)
ABOVE = NoiseBank.fixed(noise.noised_levels(0.2, 5, 4), PLANE, 2)
MEANS = drawn(K, *PLANE, low=-0.5, high=0.5, dtype=torch.float64)
TRACES = torch.full((K,), 0.1, dtype=torch.float64)
BAYES = BayesClassifier(EXACT, LEVELS)
STANDING = scoreboard.Standing(
    "a", "A", {measure.title: scoreboard.Number() for measure in scoreboard.measures()}
)
CNN = ConvClassifier(DIGIT, 3, widths=(4, 4), seed=1).eval()
WIDE = WideClassifier(DIGIT, 3, (4, 4), normed=False, seed=1).eval()
VIT = AttentionClassifier(DIGIT, 3, 6, 1, 4, seed=1).eval()
JEM = JointClassifier.begun(WIDE, 5, 1).eval()
ADAPTED = network.build("ConditionalDenoiser", "DigitNet", 2, DIGIT, width=8, blocks=1)
ADAPTER = Adapter.beside(ADAPTED, ["conv1"], 3)
RELEASED = ConvClassifier(DIGIT, 2, widths=(4, 4)).eval()
LAYERS_NOT_ADAPTED = (
    None,
    "conv1",
    3,
    [],
    ["norm1"],
    ["classes"],
    ["nothing"],
    [None],
    ["leave.2"],
)
PROMPTED_NAMES = [f"class {k}" for k in range(K)]
VOTES = certificates.Votes((9, 1), (95, 5), 0.25)


class Plain(torch.nn.Module):
    """Other people's linear network."""

    def forward(self, x):
        """[B,2,1,1] -> [B,3]."""
        return torch.cat([x.flatten(1), -x.flatten(1).sum(1, keepdim=True)], 1) * 7 - 3


class Config(dict):
    """Settings of an autoencoder, by name and as attributes."""

    __getattr__ = dict.__getitem__


class Same(torch.nn.Module):
    """Other people's autoencoder, whose latents are the pictures."""

    config = Config(latent_channels=2, in_channels=2, block_out_channels=(1,), scaling_factor=1.0)

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()), requires_grad=False)

    def encode(self, z):
        """[B,2,1,1] -> its Gaussian."""
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: z))


def classifiers() -> dict[str, Classifier]:
    """One of each kind of classifier of the plane."""
    maximised = PurifiedClassifier(LikelihoodMaximisation(EXACT, steps=2), BAYES)
    diffused = PurifiedClassifier(Purification(EXACT, steps=2), BAYES)
    return {
        "bayes": BAYES,
        "held": Held.seeded(BAYES),
        "exact": ExactClassifier(EXACT),
        "exact noised": ExactClassifier(EXACT, sigma_pixel=0.1),
        "noised": NoisedBayesClassifier(EXACT, 0.1, levels=3),
        "noised, ensemble": ApproximateNoisedClassifier(EXACT, 0.1, levels=3),
        "noised, path": ApproximateNoisedClassifier(EXACT, 0.1, form="path", levels=3),
        "one call of noised": NoisedOneCallClassifier(EXACT, 0.1),
        "nearest head": NearestHeadClassifier(EXACT, 0.1),
        "denoised": PurifiedClassifier(Denoising(EXACT, 0.1), BAYES),
        "restored": PurifiedClassifier(Restoration(EXACT, 0.1, steps=2), BAYES),
        "trained on noise": TrainedOnNoise(BAYES, 0.1),
        "mirrored": Mirrored(NearestHeadClassifier(EXACT, 0.1)),
        "maximised": maximised,
        "purified": diffused,
        "vote": MajorityVote(diffused, 3),
        "mean": MeanLogits(diffused, 2),
        "smoothed": Smoothed(ExactClassifier(EXACT), 0.1, votes=5, draws=2),
        "copies": NoisedCopies(ExactClassifier(EXACT), 0.1, 2),
        "telescoped": telescoped(BAYES, 2),
        "view": attacks.AttackView(Held.seeded(BAYES), 2.0),
        "zero-shot": ZeroShotClassifier(PROMPTED, LEVELS, (2, 4), (2, 1)),
        "foreign": Foreign(Plain(), 3, PLANE, randomness="none"),
    }


PROMPTED = LatentModel(EXACT, Autoencoder(Same(), PLANE), PROMPTED_NAMES)
HAAR = Autoencoder(Haar(scaling_factor=2.0), (4, 2, 2))
KINDS = classifiers()


def asked(kind: str, x, generator) -> Tensor:
    """The logits of a kind of classifier."""
    classifier = KINDS[kind]
    return classifier(x, classifier.sample_noise(1, generator))


def answered(build: Callable[..., Classifier]) -> Callable:
    """A constructor, and the logits of what it made."""

    def made(**options):
        classifier = build(**options)
        x = drawn(2, *classifier.image_shape)
        return classifier(x, classifier.sample_noise(2, torch.Generator().manual_seed(0)))

    return made


def last_of(attack: Callable) -> Callable:
    """An attack, run to its end."""

    def run(classifier, x, y, **options):
        *_, last = attack(classifier, x, y, **options)
        return last

    return run


def record(**fields) -> results.Record:
    """A record of an accuracy."""
    return results.accuracy_record(world="digits", classifier="dc", source="a test", **fields)


EXACTLY = Held.seeded(ExactClassifier(EXACT))
ATTACKED = dict(classifier=fixed(EXACTLY, Held.seeded(BAYES)), x=pixels(), y=labels(3, K))
BUDGET = dict(
    epsilon=Values(
        (0.05, 0.3, 0),
        (np.float32(0.1), torch.tensor(0.1), True, 1e-30),
        (*NO_NUMBER, -0.1, 8, 300),
    ),
    norm=Values(("linf", "l2"), (), ("l1", "", None, 3, "L2 ")),
)
STEPS = dict(steps=count_or_0(0, 1, 3))
WEIGHTED = {
    name: Call(
        f"noise: {name}",
        lambda levels, weighting=weighting: weighting(levels),
        dict(levels=fixed(LEVELS, noise.linear_levels(0.1, 80, 5), LEVELS[1:3])),
        lambda levels: (len(levels),),
    )
    for name, weighting in (noise.WEIGHTINGS | noise.FLOW_WEIGHTINGS).items()
}
EDGES = Values(
    (torch.tensor([0.1, 0.5, 2.0]), [0.1, 1.0, 3.0]),
    (np.array([0.1, 0.2]), torch.tensor([1, 2, 3])),
    (
        None,
        "x",
        3.0,
        [],
        [0.1],
        [0.0, 1.0],
        [1.0, 0.5],
        [-1.0, 1.0],
        [0.1, math.nan, 1.0],
        [0.1, math.inf],
        [[0.1, 1.0]],
        [0.1, None],
    ),
)
LEVEL = Values(
    (0.3, torch.tensor(0.3), torch.tensor([0.1, 0.3, 2.0])),
    (1e-30, 1e30, True, np.float64(0.2)),
    (*NO_NUMBER, 0, -0.1, torch.tensor([0.1, 0.2]), torch.tensor([0.1, math.nan, 0.2])),
)
COUNTS = Values(
    ((9, 1), [5, 5, 5], (1, 0)),
    (np.array([3, 4]), torch.tensor([3, 4]), (3.0, 4.0)),
    (None, "x", 3, (), (1,), (0, 0), (-1, 2), (0.5, 0.5), (math.nan, 1), ("a", "b"), (True, False)),
)
SHARE_BOUND = names("fixed", "anytime")
SUCCESSES = Values(
    (3, 0, 7, [1, 2], np.array([0, 7])),
    (7.0, torch.tensor(3), []),
    (-1, 0.5, math.nan, None, "x", [1, None], 1j, 101),
)
UNIT = Values(
    ([0.5, 1.0, 0.2], [1.0, 1.0], np.full((3, 4), 0.3), np.array([0.3, 0.9])[::-1]),
    ([0.0, 0.0], torch.tensor([0.3, 0.4])),
    (None, "x", 0.5, [], [1.5, 0.2], [-0.1, 0.5], [math.nan, 0.5], [None, 0.1], ["a", "b"]),
)
SHAPES = Values(
    (PLANE, DIGIT, [2, 1, 1]),
    (torch.Size(PLANE),),
    (None, "x", 3, (), (2,), (2, 1), (0, 1, 1), (-1, 2, 2), (1.5, 1, 1), (None, 1, 1)),
)

STEPS_OF_A_PATH = Values(
    (drawn(1, len(LEVELS), *PLANE), drawn(1, len(LEVELS), *PLANE).double()),
    (),
    (
        None,
        "x",
        3,
        drawn(2, len(LEVELS), *PLANE),
        drawn(1, 2, *PLANE),
        drawn(1, *PLANE),
        drawn(1, len(LEVELS), *PLANE) * math.nan,
    ),
)

CALLS = [
    # units
    Call(
        "units.l2_of_linf",
        units.l2_of_linf,
        dict(epsilon_linf=at_least_0(0.1, 1.0), dimensions=count(2, 3072)),
        lambda **_: (),
    ),
    Call(
        "units.linf_of_l2",
        units.linf_of_l2,
        dict(radius=at_least_0(0.1, 1.0), dimensions=count(2, 3072)),
        lambda **_: (),
    ),
    Call(
        "units.check_images",
        units.check_images,
        dict(x=pixels(), image_shape=fixed(PLANE)),
        lambda x, **_: x.shape,
    ),
    Call(
        "units.check_labels",
        units.check_labels,
        dict(y=labels(), images=fixed(3), num_classes=fixed(2)),
        lambda y, **_: y.shape,
    ),
    Call("units.check_class_count", units.check_class_count, dict(classes=count(2, 10))),
    Call("units.check_sigma", units.check_sigma, dict(sigma=positive(0.1, 3.0))),
    Call(
        "units.check_sigma_pixel",
        units.check_sigma_pixel,
        dict(sigma_pixel=Values((0.1, 1.0), (True,), (*NO_NUMBER, 0, -1, 12))),
    ),
    Call(
        "units.check_budget",
        units.check_budget,
        dict(**BUDGET, dimensions=fixed(4)),
    ),
    Call(
        "units.check_step_size",
        units.check_step_size,
        dict(step_size=positive(0.01, 0.1), epsilon=fixed(0.1), steps=fixed(5)),
    ),
    Call(
        "units.chosen",
        units.chosen,
        dict(value=names("linf", "l2"), allowed=fixed(("linf", "l2")), what=fixed("the norm")),
    ),
    # noise
    Call(
        "noise.linear_betas",
        noise.linear_betas,
        dict(steps=count(1, 5), first=share(1e-4, 0.01), last=share(0.02, 0.5)),
        lambda steps, **_: (int(steps),),
    ),
    Call(
        "noise.scaled_linear_betas",
        noise.scaled_linear_betas,
        dict(steps=count(1, 5), first=share(1e-4, 0.01), last=share(0.02, 0.5)),
        lambda steps, **_: (int(steps),),
    ),
    Call(
        "noise.cosine_betas",
        noise.cosine_betas,
        dict(steps=count(1, 5), offset=positive(0.008, 0.1), largest=share(0.999, 0.9)),
        lambda steps, **_: (int(steps),),
    ),
    Call(
        "noise.alpha_bar",
        noise.alpha_bar,
        dict(
            betas=Values(
                (BETAS, BETAS.float()),
                (BETAS[:1],),
                (None, "x", 1.5, BETAS[:0], -BETAS, 10 * BETAS, BETAS * math.nan),
            )
        ),
        lambda betas: betas.shape,
    ),
    Call(
        "noise.sigma_of_alpha_bar",
        noise.sigma_of_alpha_bar,
        dict(
            abar=Values(
                (torch.tensor([0.9, 0.1]), torch.tensor(0.5)),
                (torch.tensor(1.0), torch.tensor(1e-30)),
                (None, "x", torch.tensor([0.9, 0.0]), torch.tensor(-0.1), torch.tensor(1.1))
                + (torch.tensor(math.nan),),
            )
        ),
        lambda abar: abar.shape,
    ),
    *(
        Call(
            f"noise.{function.__name__}",
            function,
            dict(
                sigma=Values(
                    (torch.tensor([0.1, 3.0]), torch.tensor(2.0)),
                    (),
                    (None, "x", torch.tensor(math.nan), torch.tensor([0.5, -1.0]))
                    + (torch.tensor([math.inf]),),
                )
            ),
            lambda sigma: sigma.shape,
        )
        for function in (noise.alpha_bar_of_sigma, noise.snr)
    ),
    Call(
        "noise.edm_sigmas",
        noise.edm_sigmas,
        dict(
            steps=count(2, 5),
            low=positive(0.002, 0.1),
            high=positive(80.0, 2.0),
            rho=positive(7, 1),
        ),
        lambda steps, **_: (int(steps),),
    ),
    *(
        Call(
            f"noise.{function.__name__}",
            function,
            dict(low=positive(0.01, 0.1), high=positive(80.0, 5.0), count=count(1, 4)),
        )
        for function in (noise.log_levels, noise.linear_levels)
    ),
    Call(
        "noise.timestep_levels",
        noise.timestep_levels,
        dict(
            chain=Values(
                (torch.tensor([0.1, 0.2, 0.5, 3.0]), torch.tensor([0.1, 1.0])),
                (torch.tensor([0.1, 0.2, 0.5]).half(),),
                (None, "x", torch.tensor([0.5, 0.2]), torch.tensor([math.nan, 1.0]), 0.3),
            ),
            count=count(1, 2),
        ),
    ),
    Call(
        "noise.even_noise_weight",
        noise.even_noise_weight,
        dict(levels=fixed(LEVELS, LEVELS[1:3])),
        lambda levels: (len(levels),),
    ),
    Call("noise.flow_time", noise.flow_time, dict(sigma=positive(0.1, 3.0)), lambda **_: ()),
    Call(
        "noise.sigma_of_flow_time",
        noise.sigma_of_flow_time,
        dict(t=Values((0.5, torch.tensor([0.1, 0.9])), ([0.5],), (*NO_NUMBER[:6], 0, 1, -0.1, 5))),
    ),
    Call(
        "noise.shifted_time",
        noise.shifted_time,
        dict(
            u=Values((0.5, torch.tensor([0.0, 1.0])), ([0.5],), (*NO_NUMBER[:6], -0.1, 5)),
            shift=positive(1, 3.0),
        ),
    ),
    Call(
        "noise.flow_levels",
        noise.flow_levels,
        dict(
            low=positive(0.01, 0.1),
            high=positive(80.0, 5.0),
            count=count(1, 4),
            shift=positive(1, 3.0),
        ),
    ),
    Call(
        "noise.noised_levels",
        noise.noised_levels,
        dict(sigma_tau=positive(0.2, 0.5), high=positive(5.0, 80.0), count=count(1, 4)),
    ),
    Call("noise.midpoint_levels", noise.midpoint_levels, dict(edges=EDGES)),
    Call("noise.chain_levels", noise.chain_levels, dict(edges=EDGES)),
    Call(
        "noise.Levels",
        noise.Levels,
        {
            name: Values(
                (torch.tensor([value, value + 0.3]),),
                ([value, value + 0.3], torch.tensor([1, 2])),
                (None, "x", 3, torch.zeros(2), torch.tensor([math.nan, 1.0]))
                + (torch.tensor([0.1]), torch.tensor([[0.1, 0.2]])),
            )
            for name, value in (("sigma", 0.2), ("lower", 0.1), ("upper", 0.35))
        },
    ),
    *WEIGHTED.values(),
    Call("noise.generator_of", noise.generator_of, dict(seed=seeds())),
    Call(
        "noise.NoiseBank.fixed",
        NoiseBank.fixed,
        dict(levels=fixed(LEVELS), image_shape=SHAPES, samples=count(1, 2), seed=seeds()),
    ),
    Call(
        "noise.NoiseBank.fresh",
        NoiseBank.fresh,
        dict(
            levels=fixed(LEVELS),
            image_shape=SHAPES,
            images=count(1, 3),
            generator=generator(),
            samples=count(1, 2),
        ),
    ),
    Call(
        "noise.NoiseBank.sobol",
        NoiseBank.sobol,
        dict(levels=fixed(LEVELS), image_shape=SHAPES, samples=count(1, 4), seed=seeds()),
    ),
    Call(
        "noise.NoiseBank",
        NoiseBank,
        dict(
            levels=fixed(LEVELS),
            noise=Values(
                (drawn(4, 1, 1, *PLANE),),
                (drawn(4, 1, 1, *PLANE).half(), drawn(4, 1, 1, *PLANE).long()),
                (None, "x", 3, drawn(4, 1), drawn(3, 1, 1, *PLANE), [0.1])
                + (drawn(4, 1, 1, *PLANE) * math.nan,),
            ),
        ),
    ),
    # intervals and certificates
    *(
        Call(
            f"intervals.{function.__name__}",
            function,
            dict(
                successes=Values(
                    (3, 0, 7, [1, 2], np.array([0, 7])),
                    (7.0, torch.tensor(3), []),
                    (-1, 0.5, math.nan, None, "x", [1, None], 1j),
                ),
                trials=Values(
                    (7, 100), (np.int64(7), 10**9), (0, -1, 1.5, math.nan, None, "x", [])
                ),
                **{third: share(0.05, 0.95)},
            ),
        )
        for function, third in (
            (intervals.lower_bound, "alpha"),
            (intervals.upper_bound, "alpha"),
            (intervals.interval, "level"),
        )
    ),
    Call(
        "intervals.mean_interval",
        intervals.mean_interval,
        dict(
            values=Values(
                ([0.5, 1.0, 0.0], [1.0], [0.0, 0.0]),
                (np.array([0.5, 0.2]), torch.tensor([0.5, 1.0])),
                (
                    [],
                    None,
                    "x",
                    0.5,
                    [math.nan, 0.5],
                    [0.5, math.nan],
                    [1.5],
                    [-0.1],
                    [None],
                    ["a"],
                ),
            ),
            draws=count(1, 10),
            level=share(0.95, 0.5),
        ),
        lambda **_: (2,),
    ),
    Call(
        "intervals.paired_interval",
        intervals.paired_interval,
        dict(
            differences=Values(
                ([0.5, -1.0, 0.0], [1.0], [0.0, 0.0]),
                (np.array([0.5, 0.2]), torch.tensor([0.5, -1.0])),
                ([], None, "x", [math.nan, 0.5], [1.5], [-1.1], [None], ["a"]),
            ),
            level=share(0.95, 0.5),
        ),
        lambda **_: (2,),
    ),
    Call(
        "scoreboard.ranked",
        scoreboard.ranked,
        dict(rows=fixed([], [STANDING], [STANDING, STANDING]), title=names("honest", "flop")),
        lambda rows, title: (len(rows),),
    ),
    Call(
        "scoreboard.checked_world",
        scoreboard.checked_world,
        dict(world=names("digits", "cifar10")),
        lambda **_: (),
    ),
    Call(
        "costs.cost_of",
        costs.cost_of,
        dict(
            name=fixed("small"),
            classifier=fixed(CNN),
            picture=pixels(DIGIT, images=1),
            seconds=Values((0.001,), (np.float32(0.01),), (*NO_NUMBER, 0, -1.0, *HUGE)),
        ),
    ),
    Call(
        "literature.Claim",
        literature.Claim,
        dict(
            table=fixed("a"),
            paper=Values(("A paper",), (), ("", None, 3, [])),
            method=fixed("a method"),
            metric=fixed("robust accuracy"),
            threat=Values((None, dict(norm="linf", epsilon="8/255")), (), ({}, dict(norm="l2"))),
            value=Values((75.67, 0, 100), (np.float64(3.0), True), (*NO_NUMBER, -1, 101)),
            unit=fixed("%"),
            n=Values((512, None), (np.int64(3),), (0, -1, 1.5, math.nan, "x")),
            statistic=names("single", "mean", "worst"),
            protocol=fixed("PGD"),
            source=fixed("a table"),
            provenance=names("read", "recalled"),
            caveat=fixed(""),
            entry=fixed(None, "dc"),
        ),
    ),
    Call(
        "intervals.sign_test",
        intervals.sign_test,
        dict(more=count_or_0(3, 12), less=count_or_0(0, 5)),
    ),
    Call(
        "certificates.Votes",
        certificates.Votes,
        dict(
            selection=fixed((9, 1), (4, 4)),
            estimation=Values(((9, 1), [5, 5]), COUNTS.odd, COUNTS.wrong),
            sigma_pixel=positive(0.25, 1.0),
        ),
    ),
    Call(
        "certificates.prediction_changed",
        certificates.prediction_changed,
        dict(
            counts=COUNTS,
            original=Values((0, 1), (np.int64(1),), (-1, 7, None, "x", 0.5, math.nan)),
            alpha=share(0.001, 0.05),
        ),
    ),
    Call(
        "certificates.smoothing_radius",
        certificates.smoothing_radius,
        dict(votes=fixed(VOTES), alpha=share(0.001, 0.05), bound=SHARE_BOUND),
    ),
    Call(
        "certificates.largest_radius",
        certificates.largest_radius,
        dict(
            n=count(10, 1000),
            sigma_pixel=positive(0.25, 1.0),
            alpha=share(0.001, 0.05),
            bound=SHARE_BOUND,
        ),
    ),
    Call(
        "certificates.votes_needed",
        certificates.votes_needed,
        dict(
            radius=at_least_0(0.1, 0.5),
            n=count(10, 1000),
            sigma_pixel=positive(0.25, 1.0),
            alpha=share(0.001, 0.05),
            bound=SHARE_BOUND,
        ),
    ),
    Call(
        "certificates.wrong_at_most",
        certificates.wrong_at_most,
        dict(certificates=count(1, 500), alpha=share(0.001, 0.05), level=share(0.95, 0.5)),
        lambda **_: (),
    ),
    Call(
        "certificates.per_image_best",
        certificates.per_image_best,
        dict(
            certificates=fixed([[certificates.smoothing_radius(VOTES, 1e-10)]]),
            alpha=share(0.001, 0.05),
        ),
        lambda **_: (1,),
    ),
    Call(
        "anytime.log_evidence",
        lambda **votes: np.exp(anytime.log_evidence(**votes)),  # -inf below the share
        dict(successes=SUCCESSES, trials=fixed(7, 100), share=share(0.01, 0.02)),
    ),
    Call(
        "anytime.anytime_bound",
        anytime.anytime_bound,
        dict(
            successes=SUCCESSES,
            trials=Values((7, 100), (np.int64(7), 10**9, [7, 8]), (-1, 1.5, math.nan, None, "x")),
            alpha=share(0.001, 0.05),
        ),
    ),
    Call(
        "anytime.StopRule",
        lambda successes, **rule: anytime.StopRule(**rule).verdict(successes, 100),
        dict(
            sigma_pixel=positive(0.25, 1.0),
            radii=Values(
                ((0.1,), [0.05, 0.1], (0.0,)),
                (np.array([0.1]), torch.tensor([0.1])),
                ((), None, "x", 0.1, (-0.1,), (math.nan,), (30.0,), ("a",), ((0.1,),)),
            ),
            alpha=share(0.001, 0.05),
            most=count(1000, 10_000),
            give_up=Values((0.05, 0, 0.5), (1e-9, np.float64(0.1)), (*NO_NUMBER, -0.1, 1, 5)),
            successes=Values(
                (0, 90, 100), (torch.tensor(3), [90, 100], 7.0), (-1, 101, 0.9, math.nan, None, "x")
            ),
        ),
    ),
    *(
        Call(
            f"soft.{function.__name__}",
            function,
            dict(values=UNIT, alpha=share(0.001, 0.05)),
        )
        for function in (soft.hoeffding_bound, soft.bernstein_bound, soft.betting_bound)
    ),
    Call(
        "soft.log_capital",
        soft.log_capital,
        dict(values=fixed([0.5, 0.9], [1.0, 0.0]), mean=share(0.3, 0.9)),
        lambda **_: (),
    ),
    Call(
        "soft.largest_soft_radius",
        soft.largest_soft_radius,
        dict(
            n=Values((1, 50), (True,), (*NO_NUMBER, 0, -1, 1.5)),
            sigma_pixel=positive(0.25, 1.0),
            alpha=share(0.001, 0.05),
            bound=names("hoeffding", "betting"),
        ),
        lambda **_: (),
    ),
    Call(
        "soft.SoftTally",
        lambda **options: soft.SoftTally(**options).values,
        dict(
            selection=Values(
                ((900, 100), (0, 5)), ([3, 4],), (None, "x", 3, (), (1,), (0, 0), (-1, 2))
            ),
            estimation=Values(
                (((900, 3),), ((0, 1), (1000, 2))),
                ([[5, 1]],),
                (None, "x", 3, (), ((1001, 1),), ((5, 0),), ((5, 1), (4, 1)), ((5,),), (5, 1)),
            ),
            sigma_pixel=positive(0.25, 1.0),
        ),
    ),
    Call(
        "soft.SoftStopRule",
        lambda values, **options: soft.SoftStopRule(**options).verdict(values) and 0,
        dict(
            values=Values(
                ([0.5, 1.0, 0.2], [1.0, 1.0]),
                ([0.0, 0.0],),
                (None, "x", [], [[0.5, 0.2]], [1.5, 0.2]),
            ),
            sigma_pixel=positive(0.25, 1.0),
            radii=Values(
                ((0.0, 0.1), (0.2,)), ([0.0],), (None, "x", (), (-0.1,), (99,), (math.nan,))
            ),
            alpha=share(0.001, 0.05),
            most=Values((100, 1000), (100.0,), (*NO_NUMBER, 0, -1, 1.5)),
            give_up=share(0.05, 0.2),
        ),
    ),
    Call(
        "soft.soft_radius",
        lambda estimation, sigma_pixel, **options: soft.soft_radius(
            soft.SoftVotes(np.array([[0.8, 0.2], [0.6, 0.4]]), estimation, sigma_pixel), **options
        ),
        dict(
            estimation=Values(
                ([[0.9, 0.1]] * 5, np.array([[0.3, 0.7], [0.2, 0.8]]), np.full((3, 2), 0.5)[::-1]),
                (torch.tensor([[0.5, 0.5], [0.2, 0.1]]),),
                (None, "x", 3, [], [0.5], [[9, 1]], [[-0.1, 0.5]], [[0.9, 0.9]], [[math.nan, 0.1]])
                + ([[0.2, 0.3, 0.5]],),
            ),
            sigma_pixel=positive(0.25, 1.0),
            alpha=share(0.001, 0.05),
            bound=names("hoeffding", "bernstein", "betting"),
        ),
    ),
    *(
        Call(
            f"lipschitz.{function.__name__}",
            function,
            dict(
                levels=Values((LEVELS, ABOVE.levels), (), (None, "x", 0.3, [0.1, 0.2])),
                dimensions=count(2, 3072),
                over=names("sum", "mean"),
            ),
            lambda **_: (),
        )
        for function in (lipschitz.margin_constant, lipschitz.logit_constant)
    ),
    Call(
        "lipschitz.released_constant",
        lipschitz.released_constant,
        dict(levels=Values((LEVELS,), (), (None, "x", 0.3))),
        lambda **_: (),
    ),
    Call(
        "lipschitz.probability_constant",
        lipschitz.probability_constant,
        dict(constant=positive(0.1, 30.0)),
        lambda **_: (),
    ),
    Call(
        "lipschitz.margin_radius",
        lipschitz.margin_radius,
        dict(margin=Values((0.5, -1.0, 0), (True,), NO_NUMBER), constant=positive(0.1, 30.0)),
        lambda **_: (),
    ),
    Call(
        "lipschitz.weak_radius",
        lipschitz.weak_radius,
        dict(
            first=Values((0.7, 0.2), (0, True), (*NO_NUMBER, -0.1, 7)),
            second=Values((0.2, 0.0), (), (*NO_NUMBER, -0.1, 7)),
            constant=positive(0.1, 30.0),
        ),
        lambda **_: (),
    ),
    Call(
        "lipschitz.lipschitz_certificate",
        lipschitz.lipschitz_certificate,
        dict(
            errors=Values(
                (drawn(3, 4, 6, high=8.0), drawn(2, 4, 50, high=0.1)),
                (drawn(3, 4, 6).half(), drawn(3, 4, 6).numpy()),
                (None, "x", 3.0, drawn(4, 6), drawn(1, 4, 6), drawn(3, 3, 6), drawn(3, 4, 1))
                + (drawn(3, 4, 6) - 2, drawn(3, 4, 6, high=9e3), spoilt(drawn(3, 4, 6), math.nan)),
            ),
            levels=fixed(LEVELS),
            dimensions=fixed(2),
            alpha=share(0.001, 0.05),
            bound=names("hoeffding", "bernstein", "betting"),
        ),
    ),
    Call(
        "denoisers.Clipped",
        lambda x_sigma, sigma: Clipped(EXACT)(x_sigma, sigma),
        dict(x_sigma=points(), sigma=positive(0.3, 2.0)),
        lambda x_sigma, **_: (len(x_sigma), K, *PLANE),
    ),
    Call(
        "certificates.certified_accuracy",
        certificates.certified_accuracy,
        dict(
            certificates=fixed(2 * [certificates.smoothing_radius(VOTES)]),
            labels=Values(
                ([0, 1], np.array([0, 0])),
                (torch.tensor([0, 1]),),
                ([0], [-1, 0], None, "x", [0.5, 1], [math.nan, 0], [[0, 1]], ["a", "b"]),
            ),
            radii=Values(
                ([0, 0.1], 0.5),
                (np.array([0.1]), torch.tensor([0.2])),
                ([-1], [math.nan], None, "x", [math.inf], [[0.1, 0.2]]),
            ),
            level=share(0.95, 0.5),
        ),
    ),
    # likelihoods
    *(
        Call(
            f"likelihood.{function.__name__}",
            function,
            dict(
                denoiser=fixed(EXACT),
                z=points(),
                bank=fixed(BANK),
                classes=Values(
                    (None, [0], [1, 0]), ([K], []), ([-1], [99], "x", [0.5], [math.nan])
                ),
                chunk=count(1, 4096),
            ),
        )
        for function in (
            likelihood.diffusion_errors,
            likelihood.diffusion_loss,
            likelihood.elbo,
            likelihood.log_likelihood,
        )
    ),
    Call(
        "likelihood.noised_errors",
        likelihood.noised_errors,
        dict(
            denoiser=fixed(EXACT),
            z_tau=points(),
            sigma_tau=Values((0.2, 0.1), (), (*NO_NUMBER, 0, -0.2, 3.0)),
            bank=fixed(ABOVE),
            classes=Values((None, [0, 1]), (), ("x", [99], [-1], [0.5], [])),
            chunk=count(1, 64),
        ),
        lambda z_tau, classes, **_: (len(z_tau), len(classes or range(K)), *ABOVE.noise.shape[:2]),
    ),
    Call(
        "likelihood.noised_elbo",
        likelihood.noised_elbo,
        dict(
            denoiser=fixed(EXACT),
            z_tau=points(),
            sigma_tau=Values((0.2, 0.1), (np.float64(0.1),), (*NO_NUMBER, 0, -1, 3.0)),
            bank=fixed(ABOVE),
        ),
        lambda z_tau, **_: (len(z_tau), K),
    ),
    Call(
        "likelihood.vp_elbo",
        likelihood.vp_elbo,
        dict(
            denoiser=fixed(EXACT),
            z=points(),
            betas=Values((BETAS,), (), (None, "x", BETAS[:3], BETAS * 0, BETAS * math.nan)),
            bank=fixed(CHAIN),
        ),
        lambda z, **_: (len(z), K),
    ),
    Call(
        "likelihood.telescoped_gradient",
        likelihood.telescoped_gradient,
        dict(
            denoiser=fixed(EXACT),
            z=points(),
            low=positive(0.1, 0.2),
            high=positive(5.0, 1.0),
            eps=Values(
                (drawn(2, 1, *PLANE), drawn(2, 3, *PLANE)),
                (),
                (None, "x", drawn(3, *PLANE), drawn(2, 7, *PLANE), drawn(2, 1, *PLANE) * math.nan)
                + (drawn(0, 1, *PLANE),),
            ),
        ),
        lambda z, **_: (len(z), K, *PLANE),
    ),
    Call(
        "likelihood.jacobian_free_gradient",
        likelihood.jacobian_free_gradient,
        dict(
            denoiser=fixed(EXACT),
            z=points(),
            bank=fixed(BANK),
            weights=Values(
                (torch.ones(4),),
                ([1.0, 1.0, 1.0, 1.0],),
                (None, "x", 3, torch.ones(3), torch.ones(4) * math.nan),
            ),
        ),
        lambda z, **_: (len(z), K, *PLANE),
    ),
    Call(
        "likelihood.evidence",
        likelihood.evidence,
        dict(
            losses=Values(
                (drawn(3, 2, 4), drawn(4)), (), (None, "x", 3, drawn(3, 2, 5), drawn(3, 2, 1))
            ),
            levels=fixed(LEVELS),
        ),
    ),
    Call(
        "likelihood.noise_constant",
        likelihood.noise_constant,
        dict(levels=fixed(LEVELS), dimensions=count(1, 3072)),
        lambda **_: (),
    ),
    *(
        Call(
            f"likelihood.{function.__name__}",
            function,
            dict(
                z=points(),
                class_means=Values(
                    (MEANS,), (), (None, "x", MEANS[0], MEANS * math.nan, drawn(K, *DIGIT))
                ),
                class_traces=Values(
                    (TRACES, 0 * TRACES), (), (None, "x", TRACES[:1], -TRACES, TRACES * math.nan)
                ),
                sigma=positive(5.0, 0.5),
            ),
        )
        for function in (likelihood.end_term, likelihood.end_slope)
    ),
    Call(
        "likelihood.class_moments",
        likelihood.class_moments,
        dict(
            images=points(PLANE, 4, True),
            labels=classes_of(4),
            num_classes=Values((2,), (), (3, 1, 0)),
        ),
    ),
    # denoisers
    Call(
        "MixtureDenoiser",
        MixtureDenoiser,
        dict(
            means=Values(
                (MEANS, MEANS.float()), (), (None, "x", MEANS[0], MEANS * math.nan, MEANS[:0])
            ),
            scales=Values(
                (torch.full((K,), 0.2), torch.zeros(K)),
                (),
                (None, "x", torch.ones(K + 1), -torch.ones(K), torch.full((K,), math.nan)),
            ),
            weights=Values(
                (torch.ones(K),), (), (None, "x", torch.zeros(K), -torch.ones(K), torch.ones(K + 1))
            ),
            labels=Values(
                (torch.arange(K),),
                (list(range(K)),),
                (None, "x", torch.arange(K) - 1, torch.arange(K + 1), torch.arange(K) + 0.5, []),
            ),
            priors=Values(
                (None, torch.full((K,), 1 / K)),
                (),
                ("x", torch.ones(K), torch.ones(1), torch.full((K,), math.nan)),
            ),
        ),
    ),
    Call(
        "MixtureDenoiser.of_images",
        MixtureDenoiser.of_images,
        dict(images=points(PLANE, 4, True), labels=classes_of(4)),
    ),
    Call(
        "a denoiser",
        EXACT,
        dict(
            x_sigma=points(),
            sigma=LEVEL,
            classes=Values((None, [0], [K]), ([],), ([-1], [99], "x", [0.5], [math.nan])),
        ),
    ),
    Call(
        "a network",
        network.build("ConditionalDenoiser", "DigitNet", 2, DIGIT, width=8, blocks=1).eval(),
        dict(x_sigma=points(DIGIT), sigma=LEVEL),
        lambda x_sigma, **_: (len(x_sigma), 2, *DIGIT),
    ),
    Call(
        "a density",
        EXACT.log_density,
        dict(x_sigma=points(), sigma=Values((0.0, 0.3), (True, 1e30), (*NO_NUMBER, -0.1))),
        lambda x_sigma, **_: (len(x_sigma), K),
    ),
    Call(
        "sampling.karras_levels",
        sampling.karras_levels,
        dict(
            steps=Values((2, 5), (10**30,), (*NO_NUMBER, 0, 1, -1, 2.5)),
            low=positive(0.02, 0.1),
            high=positive(80.0, 2.0),
            rho=positive(7.0, 1.0),
        ),
        lambda steps, **_: (int(steps) + 1,),
    ),
    Call(
        "sampling.heun",
        lambda **options: list(sampling.heun(**options)),
        dict(
            denoiser=fixed(EXACT),
            labels=Values(
                (torch.tensor([0, 1]), torch.tensor([K])),
                (),
                (None, "x", torch.tensor([99]), torch.tensor([0.5])),
            ),
            levels=Values(
                (sampling.karras_levels(2, 0.1, 2),),
                (),
                (None, "x", torch.tensor([1.0, 2.0, 0.0]), torch.tensor([math.nan, 0.0]))
                + (torch.tensor([]), torch.tensor([2.0, -1.0])),
            ),
            generator=generator(),
        ),
    ),
    # classifiers
    *(
        Call(
            f"the classifier {kind}",
            lambda x, generator, kind=kind: asked(kind, x, generator),
            dict(x=points() if KINDS[kind].sigma_pixel else pixels(), generator=generator()),
            lambda x, kind=kind, **_: (len(x), KINDS[kind].num_classes),
        )
        for kind in KINDS
    ),
    Call("the classifier cnn", CNN, dict(x=pixels(DIGIT)), lambda x: (len(x), 3)),
    Call("the classifier wide", WIDE, dict(x=pixels(DIGIT)), lambda x: (len(x), 3)),
    Call("the classifier vit", VIT, dict(x=pixels(DIGIT)), lambda x: (len(x), 3)),
    Call("the classifier jem", JEM, dict(x=pixels(DIGIT)), lambda x: (len(x), 3)),
    Call(
        "a noise of another",
        BAYES,
        dict(
            x=pixels(),
            noise=Values(
                (draw(BAYES, 3, 0), draw(BAYES, 1, 0)),
                (),
                (None, "x", (), 3, draw(BAYES, 2, 0), draw(BAYES, 3, 0)[:, :2])
                + (draw(BAYES, 3, 0) * math.nan,),
            ),
        ),
        lambda x, **_: (len(x), K),
    ),
    Call(
        "BayesClassifier",
        answered(BayesClassifier),
        dict(
            denoiser=fixed(EXACT),
            levels=fixed(LEVELS),
            samples=count(1, 2),
            prior=Values(
                (None, [1 / K] * K),
                (torch.full((K,), 1 / K),),
                ([0.5], [1.0] * K, "x", [math.nan] * K, [0.0] * (K - 1) + [1.0], 3),
            ),
            temperature=positive(1.0, 10.0),
            chunk=count(1, 64),
        ),
    ),
    Call(
        "NoisedBayesClassifier",
        answered(NoisedBayesClassifier),
        dict(
            denoiser=fixed(EXACT),
            sigma_pixel=Values((0.1, 0.25), (1.0,), (*NO_NUMBER, 0, -1, 12)),
            levels=count(1, 3),
            high=Values((None, 5.0), (1e30,), (math.nan, -1, "x", 0, math.inf)),
            samples=count(1, 2),
        ),
    ),
    Call(
        "ApproximateNoisedClassifier",
        answered(ApproximateNoisedClassifier),
        dict(
            denoiser=fixed(EXACT),
            sigma_pixel=Values((0.1, 0.25), (1.0,), (*NO_NUMBER, 0, -1, 12)),
            form=names("ensemble", "path", "own path"),
            levels=count(1, 3),
            high=Values((None, 5.0), (1e30,), (math.nan, -1, "x", 0, math.inf)),
            samples=count(1, 2),
        ),
    ),
    *(
        Call(
            build.__name__,
            answered(build),
            dict(
                denoiser=fixed(EXACT),
                sigma_pixel=Values((0.1, 0.25), (1.0,), (*NO_NUMBER, 0, -1, 12)),
                follow=names("all", "null", "heads"),
            ),
        )
        for build in (NoisedOneCallClassifier, NearestHeadClassifier)
    ),
    Call(
        "Denoising",
        answered(lambda **options: PurifiedClassifier(Denoising(EXACT, **options), BAYES)),
        dict(sigma_pixel=Values((0.1, 0.25), (1.0,), (*NO_NUMBER, 0, -1, 12))),
    ),
    Call(
        "Restoration",
        answered(lambda **options: PurifiedClassifier(Restoration(EXACT, **options), BAYES)),
        dict(
            sigma_pixel=Values((0.1, 0.25), (1.0,), (*NO_NUMBER, 0, -1, 12)),
            steps=Values((2, 3), (10**30,), (*NO_NUMBER, 0, 1, -1, 2.5)),
            low=Values((0.05, 0.1), (0.2,), (*NO_NUMBER, 0, -1, 3.0)),
        ),
    ),
    Call(
        "TrainedOnNoise",
        answered(TrainedOnNoise),
        dict(
            classifier=fixed(BAYES),
            sigma_pixel=Values((0.1, 0.25), (1.0,), (*NO_NUMBER, 0, -1, 12)),
        ),
    ),
    Call(
        "carried_sigma",
        carried_sigma,
        dict(
            denoiser=fixed(EXACT),
            sigma_pixel=Values((0.1, 0.25), (1.0,), (*NO_NUMBER, 0, -1, 12)),
        ),
        lambda **_: (),
    ),
    *(
        Call(
            f"likelihood.{formula.__name__}",
            formula,
            dict(
                denoiser=fixed(EXACT),
                z_tau=points(),
                sigma_tau=Values((0.2, 0.1), (), (*NO_NUMBER, 0, -0.2, 3.0)),
                bank=fixed(ABOVE),
            ),
            lambda z_tau, **_: (len(z_tau), K),
        )
        for formula in (
            likelihood.denoised_elbo,
            likelihood.denoised_target_elbo,
            likelihood.own_target_elbo,
        )
    ),
    Call(
        "paths.path_noise",
        paths.path_noise,
        dict(
            levels=fixed(LEVELS), image_shape=SHAPES, paths=count_or_0(1, 5), generator=generator()
        ),
        lambda image_shape, paths, **_: (paths, len(LEVELS), *image_shape),
    ),
    *(
        Call(
            f"paths.{function.__name__}",
            lambda z, increments, function=function: function(EXACT, z, LEVELS, increments),
            dict(z=points(), increments=STEPS_OF_A_PATH),
            lambda z, shape=shape, **_: (len(z), *shape),
        )
        for function, shape in (
            (paths.path_logits, (len(LEVELS) - 1, K)),
            (paths.path_approximations, (len(LEVELS) - 1, K)),
            (paths.path_posterior, (len(LEVELS), K)),
        )
    ),
    Call(
        "paths.brownian_path",
        lambda z, increments: paths.brownian_path(z, LEVELS, increments),
        dict(z=points(), increments=STEPS_OF_A_PATH),
        lambda z, **_: (len(z), len(LEVELS), *PLANE),
    ),
    Call(
        "paths.path_votes",
        paths.path_votes,
        dict(
            logits=Values(
                (drawn(3, 4, K), drawn(1, 2, 5)),
                (drawn(3, 4, K).double(),),
                (None, "x", 3, drawn(3, K), drawn(3, 4, 1), drawn(3, 4, K) * math.nan),
            )
        ),
        lambda logits: logits.shape[:2],
    ),
    Call(
        "ExactClassifier",
        answered(ExactClassifier),
        dict(
            denoiser=fixed(EXACT),
            prior=Values((None, [1 / K] * K), (), ([0.5], [1.0] * K, "x", [math.nan] * K)),
            sigma_pixel=Values((0, 0.0, 0.25), (), (math.nan, -1, "x", 12, math.inf)),
        ),
    ),
    Call(
        "LikelihoodMaximisation",
        answered(
            lambda **options: PurifiedClassifier(LikelihoodMaximisation(EXACT, **options), BAYES)
        ),
        dict(
            steps=count(1, 2),
            rate=positive(0.1, 1.0),
            budget=Values((None, 0.1), (0,), (math.nan, -1, "x", 8)),
            band=Values(
                ((0.4, 0.6), (0.5, 0.5)),
                ([0.4, 0.6],),
                (None, "x", (0.6, 0.4), (0, 1), (math.nan, 1), (0.4,), (0.1, math.inf)),
            ),
        ),
    ),
    Call(
        "LikelihoodMaximisation.paper",
        answered(
            lambda **options: PurifiedClassifier(
                LikelihoodMaximisation.paper(EXACT, **options), BAYES
            )
        ),
        dict(budget=positive(8 / 255, 0.1), steps=count(1, 2)),
    ),
    Call(
        "Purification",
        answered(lambda **options: PurifiedClassifier(Purification(EXACT, **options), BAYES)),
        dict(
            sigma=positive(0.5, 0.2),
            steps=Values((2, 3), (10**30,), (*NO_NUMBER, 0, 1, -1, 2.5)),
            low=positive(0.05, 0.1),
        ),
    ),
    Call(
        "MajorityVote",
        answered(MajorityVote),
        dict(classifier=fixed(KINDS["purified"]), votes=count(1, 3)),
    ),
    Call(
        "MeanLogits",
        answered(MeanLogits),
        dict(classifier=fixed(KINDS["purified"]), draws=count(1, 3)),
    ),
    Call(
        "Smoothed",
        answered(Smoothed),
        dict(
            base=fixed(KINDS["exact"]),
            sigma_pixel=Values((0.1, 0.25), (1.0,), (*NO_NUMBER, 0, -1, 12)),
            votes=count(1, 5),
            draws=count(1, 2),
        ),
    ),
    Call(
        "Smoothed.count",
        lambda **options: list(KINDS["smoothed"].count(**options)),
        dict(x=pixels(images=1), seed=seeds(), votes=count(1, 120)),
    ),
    Call(
        "ConvClassifier",
        answered(ConvClassifier),
        dict(
            image_shape=Values(
                (DIGIT, [3, 8, 8]), (), (None, "x", 3, (8, 8), (0, 8, 8), (-1, 8, 8), (1.5, 8, 8))
            ),
            num_classes=Values((2, 10), (), (*NO_NUMBER, 0, 1, -1, 1.5)),
            widths=Values(((4,), (4, 8)), (), ((), (3,), (0,), (-4,), None, "x", (4.5,), 4)),
            seed=seeds(),
        ),
    ),
    Call(
        "WideClassifier",
        answered(WideClassifier),
        dict(
            image_shape=Values((DIGIT, [3, 8, 8]), (), (None, "x", 3, (8, 8), (0, 8, 8))),
            num_classes=Values((2, 10), (), (*NO_NUMBER, 0, 1, -1, 1.5)),
            widths=Values(((4, 4), (4, 8, 4)), (), ((), (4,), (4, 3), (0, 4), None, "x", 4)),
            blocks=Values((1, 2), (True,), (*NO_NUMBER, 0, -1, 1.5)),
            normed=fixed(True, False),
            seed=seeds(),
        ),
    ),
    Call(
        "AttentionClassifier",
        answered(AttentionClassifier),
        dict(
            image_shape=Values((DIGIT, [3, 8, 16]), (), (None, "x", 3, (8, 8), (1, 6, 8))),
            num_classes=Values((2, 10), (), (*NO_NUMBER, 0, 1, -1, 1.5)),
            width=Values((3, 12), (np.int64(6),), (*NO_NUMBER, 0, -3, 4, 3.5)),
            layers=Values((1, 2), (True,), (*NO_NUMBER, 0, -1, 1.5)),
            patch=Values((4, 8), (True,), (*NO_NUMBER, 0, -1, 3, 16, 1.5)),
            seed=seeds(),
        ),
    ),
    Call(
        "JointClassifier",
        answered(JointClassifier),
        dict(network=Values((WIDE,), (), (None, CNN, VIT, "x")), replay=points(DIGIT)),
    ),
    Call(
        "JointClassifier.begun",
        answered(JointClassifier.begun),
        dict(network=Values((WIDE,), (), (None, CNN, VIT, "x")), chains=count(1, 3), seed=seeds()),
    ),
    Call(
        "JointClassifier.samples",
        JEM.samples,
        dict(count=Values((1, 5), (True,), (*NO_NUMBER, 0, -1, 6, 1.5)), generator=generator()),
    ),
    Call(
        "joint.uniform",
        uniform,
        dict(shape=fixed((2, 3), ()), generator=generator()),
        lambda shape, **_: shape,
    ),
    Call(
        "joint.langevin",
        lambda **options: list(langevin(lambda z: -z.square().flatten(1).sum(1) / 2, **options))[
            -1
        ],
        dict(
            z=points(any_shape=True),
            steps=Values((1, 3), (True,), (*NO_NUMBER, 0, -1, 1.5)),
            step=Values((0.1, 1.0), (True, np.float32(0.1)), (*NO_NUMBER, 0, -1.0)),
            noise=at_least_0(0.1, 1.0),
            generator=generator(),
        ),
        lambda z, **_: z.shape,
    ),
    Call(
        "joint.temperature",
        temperature,
        dict(
            step=Values((0.1, 1.0), (True, np.float32(0.1)), (*NO_NUMBER, 0, -1.0)),
            noise=at_least_0(0.1, 1.0),
        ),
        lambda **_: (),
    ),
    Call(
        "telescoped",
        answered(telescoped),
        dict(classifier=fixed(BAYES), samples=count(1, 2), seed=seeds()),
    ),
    Call(
        "Held.seeded",
        answered(Held.seeded),
        dict(classifier=fixed(BAYES, KINDS["purified"]), seed=seeds()),
    ),
    Call(
        "draw",
        draw,
        dict(classifier=fixed(BAYES), images=count_or_0(1, 70), seed=seeds()),
    ),
    Call(
        "Fresh",
        lambda x, generator: Fresh(BAYES, generator)(x),
        dict(x=pixels(), generator=generator()),
        lambda x, **_: (len(x), K),
    ),
    Call(
        "bridges.Bridge",
        lambda **options: bridges.Bridge(**options).shares,
        dict(
            steps=count(1, 4),
            scale=positive(1.0, 2.0),
            first=Values((0.001, 0.1), (), (*NO_NUMBER, 0, 0.5, -0.1)),
        ),
    ),
    *(
        Call(
            f"bridges.{function.__name__}",
            function,
            dict(
                num_classes=Values((2, 3), (), (*NO_NUMBER, 0, -1, 1.5, 999)),
                image_shape=Values((DIGIT,), ([3, 8, 8],), (None, "x", 3, (0, 8, 8), (-1, 8, 8))),
                seed=seeds(),
            ),
            lambda num_classes, image_shape, **_: (num_classes, *image_shape),
        )
        for function in bridges.LABELS.values()
    ),
    Call("bridges.every_step", bridges.every_step, dict(steps=count(1, 4))),
    Call(
        "bridges.released_steps",
        bridges.released_steps,
        dict(steps=Values((3, 4), (), (*NO_NUMBER, 0, 2, -1, 3.5))),
    ),
    Call(
        "racing.staged",
        lambda **options: [
            answer.prediction for answer in racing.staged(racing.Question(EXACT, LEVELS), **options)
        ],
        dict(
            x=pixels(),
            generator=generator(),
            counts=Values(((2, 4),), (), ((), (0, 4), (4, 2), None, "x", (2, 99), (1.5, 4))),
            keep=Values(((2, 1),), (), ((), (0, 1), (1,), None, "x", (99, 1), (1.5, 1))),
        ),
    ),
    Call(
        "economical.sifted",
        lambda x, **options: Held.seeded(economical.sifted(BAYES, **options))(x),
        dict(
            x=pixels(),
            threshold=positive(1.0, 30.0),
            sift=Values((1, 4), (True,), (*NO_NUMBER, 0, -1, 1.5, 99)),
            most=Values((1, 2), (True,), (*NO_NUMBER, 0, -1, 1.5, 99)),
        ),
        lambda x, **_: (len(x), K),
    ),
    Call(
        "economical.raced",
        lambda x, **options: Held.seeded(economical.raced(BAYES, **options))(x),
        dict(
            x=pixels(),
            pilot=fixed(racing.Pilot(noise.log_levels(0.1, 5, 4).sigma * 0 + 0.25, 9.0, 2.0, 0)),
            alpha=share(0.01, 0.2),
            budget=Values((30, 90), (30.0,), (*NO_NUMBER, 0, -1, 1.5, K - 1)),
        ),
        lambda x, **_: (len(x), K),
    ),
    # attacks
    Call(
        "attacks.pgd",
        last_of(attacks.pgd),
        dict(
            **ATTACKED,
            **BUDGET,
            **STEPS,
            step_size=Values((None, 0.01), (), (math.nan, 0, -1, 99, "x")),
            draws=Values((1,), (True,), (*NO_NUMBER, 0, -1, 1.5)),
            generator=Values((None, lambda: torch.Generator().manual_seed(0))),
        ),
    ),
    Call(
        "attacks.apgd",
        last_of(attacks.apgd),
        dict(
            **ATTACKED,
            **BUDGET,
            **STEPS,
            momentum=Values((0.25, 0), (), (*NO_NUMBER, 1, -0.1)),
        ),
    ),
    Call(
        "attacks.square",
        last_of(attacks.square),
        dict(**ATTACKED, **BUDGET, **STEPS, generator=generator()),
    ),
    Call(
        "attacks.smallest_l2",
        last_of(attacks.smallest_l2),
        dict(
            classifier=fixed(EXACTLY),
            x=pixels(images=1),
            y=labels(1, K),
            budgets=Values(((0.25, 1.0), [0.5]), ((0,),), ((), None, "x", (math.nan,), (-1.0,))),
            steps=count_or_0(1, 2),
            rounds=count_or_0(0, 2),
        ),
    ),
    Call(
        "attacks.shrink",
        lambda **options: list(
            attacks.shrink(lambda image: bool(image.max() > 0.5), torch.zeros(1, *PLANE), **options)
        ),
        dict(x=fixed(torch.ones(1, *PLANE)), rounds=count_or_0(0, 3)),
    ),
    Call(
        "attacks.expected_gradient",
        attacks.expected_gradient,
        dict(**ATTACKED, draws=Values((1,), (), (*NO_NUMBER, 0, -1, 2))),
    ),
    Call(
        "attacks.project",
        attacks.project,
        dict(x=points(), x0=pixels(), **BUDGET),
        lambda x, x0, **_: torch.broadcast_shapes(x.shape, x0.shape),
    ),
    Call(
        "attacks.size_of",
        attacks.size_of,
        dict(
            delta=Values(
                points().right,
                points().odd,
                (None, "x", 3, drawn(3, 2), drawn(3, *PLANE) > 0, drawn(3, *PLANE) + 1j),
            ),
            norm=BUDGET["norm"],
        ),
        lambda delta, **_: (len(delta),),
    ),
    Call(
        "attacks.ascent",
        attacks.ascent,
        dict(gradient=points(any_shape=True), norm=BUDGET["norm"]),
        lambda gradient, **_: gradient.shape,
    ),
    *(
        Call(
            f"attacks.{loss.__name__}",
            loss,
            dict(logits=scores(), y=labels(3, 4)),
            lambda logits, **_: (len(logits),),
        )
        for loss in (attacks.margin_loss, attacks.cross_entropy_loss, attacks.dlr_loss)
    ),
    *(
        Call(
            f"attacks.{loss.__name__}",
            lambda target, logits, y, loss=loss: loss(target)(logits, y),
            dict(
                target=Values((torch.tensor([3, 3, 3]),), (), labels(3, 4).wrong),
                logits=scores(),
                y=fixed(torch.tensor([0, 1, 2])),
            ),
            lambda logits, **_: (len(logits),),
        )
        for loss in (attacks.targeted_loss, attacks.targeted_dlr_loss)
    ),
    Call("attacks.ranks", attacks.ranks, dict(num_classes=Values((2, 10), (), (*NO_NUMBER, 1, 0)))),
    Call(
        "attacks.ranked",
        attacks.ranked,
        ATTACKED,
        lambda x, **_: (len(x), K - 1),
    ),
    Call(
        "attacks.warp",
        attacks.warp,
        dict(
            x=points(DIGIT, any_shape=True),
            flow=Values(
                (drawn(3, 2, 8, 8), drawn(1, 2, 8, 8)[:1].expand(3, -1, -1, -1)),
                (),
                (None, "x", drawn(3, 1, 8, 8), drawn(3, 2, 4, 8), drawn(2, 2, 8, 8))
                + (drawn(3, 2, 8, 8) * math.nan,),
            ),
        ),
        lambda x, **_: x.shape,
    ),
    Call(
        "attacks.Bent",
        lambda classifier, x, bound: attacks.Bent(classifier, x, bound)(drawn(3, 2, 8, 8)),
        dict(classifier=fixed(CNN), x=pixels(DIGIT), bound=at_least_0(0.0, 0.8)),
        lambda x, **_: (len(x), 3),
    ),
    Call(
        "attacks.AttackView",
        answered(attacks.AttackView),
        dict(classifier=fixed(EXACTLY), temperature=positive(1.0, 3.0)),
    ),
    Call(
        "attacks.AttackView.calibrated",
        answered(attacks.AttackView.calibrated),
        dict(classifier=fixed(EXACTLY), x=pixels()),
    ),
    Call(
        "attacks.unlikeliness",
        lambda strength, x: attacks.unlikeliness(EXACT, BANK, strength)(x),
        dict(strength=at_least_0(0.0, 2.0), x=pixels()),
        lambda x, **_: (len(x),),
    ),
    # pictures and storage
    Call(
        "pictures.load_picture",
        pictures.load_picture,
        dict(
            path=Values(("picture.png",), (), ("absent.png", "notes.txt", "", ".", None, 3, "\0")),
            image_shape=Values(
                (DIGIT, (3, 32, 32)), (), (None, "x", 3, PLANE, (1, 0, 8), (1, -8, 8), (1, 8))
            ),
            invert=Values((True, False, "auto"), (), (None, "yes", 3)),
        ),
        lambda image_shape, **_: (1, *image_shape),
    ),
    Call(
        "pictures.is_dark_ink",
        pictures.is_dark_ink,
        dict(
            pixels=Values(
                (drawn(8, 8).numpy(),),
                (),
                (
                    None,
                    "x",
                    3,
                    drawn(8).numpy(),
                    drawn(0, 8).numpy(),
                    drawn(8, 8).numpy() * math.nan,
                ),
            )
        ),
    ),
    Call(
        "pictures.distance_report",
        pictures.distance_report,
        dict(picture=pixels(DIGIT, 1), train_images=pixels(DIGIT, 5)),
    ),
    Call(
        "corruptions.corrupted",
        corruptions.corrupted,
        dict(
            images=pixels(DIGIT, any_shape=True),
            name=names(*corruptions.SEVERITIES),
            severity=Values((1, 5), (True, 2.0), (*NO_NUMBER, 0, 6, -1, 1.5)),
            generator=generator(),
        ),
        lambda images, **_: images.shape,
    ),
    Call(
        "world_of", world_of, dict(name=names("digits", "plane:moons", "hundred", "digits:blur-3"))
    ),
    Call(
        "World.test",
        world_of("plane:moons").test,
        dict(limit=Values((None, 1, 20), (), (0, -1, 1.5, "x", math.nan)), seed=seeds()),
        lambda limit, **_: None,
    ),
    Call(
        "MixtureLaw.sample",
        LAW.sample,
        dict(n=count(1, 9), generator=generator()),
    ),
    Call(
        "MixtureLaw.posterior",
        LAW.posterior,
        dict(x=pixels()),
        lambda x: (len(x), K),
    ),
    Call(
        "results.accuracy_record",
        record,
        dict(
            correct=Values((0, 3, 7), (np.int64(3),), (-1, math.nan, None, "x", 0.5)),
            n=Values((7, 10), (np.int64(7),), (0, -1, math.nan, None, "x", 7.5)),
            level=share(0.95, 0.5),
        ),
    ),
    Call(
        "weights.check_finite",
        weights.check_finite,
        dict(
            state=Values(
                ({"w": torch.ones(2)}, {}),
                ({"w": torch.ones(2).half()}, {"w": torch.arange(2)}),
                (None, "x", {"w": torch.tensor(math.nan)}, {"w": 3}, [torch.ones(2)]),
            ),
            what=fixed("a network"),
        ),
    ),
    Call(
        "weights.unwrapped",
        weights.unwrapped,
        dict(
            state=Values(
                ({"module.w": torch.ones(2)}, {"_orig_mod.w": torch.ones(2)}),
                ({},),
                (None, "x", {1: torch.ones(2)}, {"w": torch.ones(1), "_orig_mod.w": torch.ones(1)}),
            )
        ),
    ),
    # flows, latents and prompts
    Call(
        "flow.FlowDenoiser",
        lambda x_sigma, **told: FlowDenoiser(ExactVelocity(EXACT), K, PLANE, **told)(x_sigma, 1.0),
        dict(
            x_sigma=points(),
            sigma_range=Values(
                ((0.01, 80.0), [0.1, 2.0]),
                (),
                ((80.0, 0.01), (0, 1.0), (math.nan, 1.0), (0.1, math.inf)),
            ),
            shift=positive(1, 3.0),
        ),
        lambda x_sigma, **_: (len(x_sigma), K, *PLANE),
    ),
    Call(
        "latent.prompts_of",
        latent.prompts_of,
        dict(
            names=Values(
                (["cat", "dog"], ("a", "b")),
                ((" a", "a "),),
                (None, "cat", 3, [], ["cat"], ["a", "a"], ["a", ""], ["a", None], {"a", "b"}),
            ),
            templates=Values(
                (["{}"], ("a {}", "{} b")), (), (None, "{}", [], ["a"], ["{} {}"], [None], 3)
            ),
        ),
    ),
    Call(
        "latent.LatentModel",
        lambda **told: LatentModel(EXACT, Autoencoder(Same(), PLANE), **told).templates,
        dict(
            names=Values((PROMPTED_NAMES,), (), (None, "x", ["a", "b", "c", "d", "e", "f", "g"])),
            templates=Values((1,), (1.0, True), (*NO_NUMBER, 0, 2, -1)),
        ),
    ),
    Call(
        "latent.Autoencoder.encode",
        lambda x: Autoencoder(Same(), PLANE).encode(x),
        dict(x=pixels()),
        lambda x: x.shape,
    ),
    Call(
        "latent.Haar",
        lambda x, **told: HAAR.decode(HAAR.encode(x)),
        dict(
            x=Values(
                (torch.rand(2, 1, 4, 4), torch.full((1, 1, 4, 4), 0.5)),
                (torch.rand(1, 1, 4, 4).double(),),
                (
                    torch.rand(2, 1, 4, 2),
                    torch.rand(4, 4),
                    torch.full((1, 1, 4, 4), math.nan),
                    3,
                    None,
                ),
            )
        ),
        lambda x, **_: x.shape,
    ),
    Call(
        "grainy.described",
        lambda template: grainy.described(template).scales,
        dict(template=names(*grainy.TEMPLATES)),
    ),
    Call(
        "grainy.model",
        lambda templates: grainy.model(templates).denoiser.variances,
        dict(
            templates=Values(
                ((grainy.PLAIN,), list(grainy.TEMPLATES)),
                (),
                (None, grainy.PLAIN, [], ["{}"], [None], 3, {grainy.PLAIN}),
            )
        ),
    ),
    Call(
        "lora.Adapter.beside",
        lambda **told: Adapter.beside(ADAPTED, **told).count,
        dict(
            targets=Values((["conv1"], ("conv1", "modulate")), (["embed.0"],), LAYERS_NOT_ADAPTED),
            rank=count(1, 4),
            alpha=Values((None, 1.0, 3), (1e-30,), (math.nan, math.inf, "x", 0, -1.0)),
            seed=seeds(),
        ),
    ),
    Call(
        "lora.Adapter.truncated",
        lambda rank: ADAPTER.truncated(rank).count,
        dict(rank=Values((1, 2, 3), (np.int64(2), 2.0, True), (*NO_NUMBER, 0, -1, 4, 1.5))),
    ),
    Call(
        "worlds.kind_of",
        kind_of,
        dict(
            image_shape=Values(
                ((1, 8, 8), (3, 32, 32)),
                ([1, 8, 8], torch.Size([1, 8, 8])),
                ((1, 8), (), (1, 9, 9), "1,8,8", (math.nan, 8, 8), None, 3),
            )
        ),
    ),
    Call(
        "adapting.recipe_of",
        lambda variant: adapting.recipe_of(variant).steps,
        dict(variant=names(*adapting.VARIANTS)),
    ),
    Call(
        "adapting.as_released",
        lambda **told: adapting.as_released(RELEASED, **told),
        dict(
            x=Values(
                (torch.rand(2, *DIGIT, generator=torch.Generator().manual_seed(0)),),
                (),
                ("x", None, torch.rand(2, 3), torch.full((2, *DIGIT), math.nan)),
            ),
            y=Values(
                (torch.tensor([0, 1]),),
                (),
                (None, "x", torch.tensor([0, 7]), torch.tensor([0.5, 1.0]), torch.tensor([0])),
            ),
            epsilon=at_least_0(0.05, 0.1),
            steps=count(1, 2),
        ),
        lambda x, **_: x.shape,
    ),
    Call(
        "zero_shot.ZeroShotClassifier",
        answered(lambda **told: ZeroShotClassifier(PROMPTED, LEVELS, **told)),
        dict(
            counts=Values(((2, 4), [1, 4]), (), ((4, 2), (2, 3), (0, 4), (2, 9), (1.5, 4), "x", 3)),
            keep=Values(((2, 1),), ([2, 1],), ((1, 2), (2,), (9, 1), (2, 0), None, "x")),
            distance=names("l1", "l2"),
            chunk=count(1, 5),
        ),
        lambda **_: (2, K),
    ),
    Call(
        "zero_shot.Cost.hours",
        Cost(10, 100, 7).hours,
        dict(pictures=count_or_0(1, 10_000), flop_per_second=positive(1e9, 1.0)),
    ),
]


# ---------------------------------------------------------------------------------------------------------------------
# What a call does


def is_ours(error: BaseException) -> bool:
    """Whether a `raise` of the library raised it."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    raising = code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return isinstance(error, SPOKEN) and raising and code.co_filename.startswith(PACKAGE)


def is_finite(value) -> bool:
    """Whether every number inside is finite."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, np.ndarray):
        return bool(np.isfinite(value).all())
    if isinstance(value, (float, np.floating)):
        return math.isfinite(value)
    if dataclasses.is_dataclass(value):
        return all(is_finite(getattr(value, field.name)) for field in dataclasses.fields(value))
    if isinstance(value, dict):
        return all(map(is_finite, value.values()))
    if isinstance(value, (tuple, list)):
        return all(map(is_finite, value))
    if isinstance(value, torch.nn.Module):
        return all(map(is_finite, itertools.chain(value.parameters(), value.buffers())))
    return True


def made(value):
    """A value that is drawn; generators are made anew."""
    return value() if callable(value) and not isinstance(value, torch.nn.Module) else value


def arguments_of(call: Call, chance: random.Random) -> tuple[dict, list[str], list[str]]:
    """Arguments, and the names of those that are odd and wrong: of all but every fourth call, one or two."""
    picked = {name: chance.choice(values.right) for name, values in call.slots.items()}
    odd = []
    wrong = []
    open_to = [name for name, values in call.slots.items() if values.odd or values.wrong]
    for name in chance.sample(open_to, min(len(open_to), chance.choice((0, 1, 1, 1, 2)))):
        values = call.slots[name]
        choice = chance.randrange(len(values.odd) + len(values.wrong))
        picked[name] = (*values.odd, *values.wrong)[choice]
        (odd if choice < len(values.odd) else wrong).append(name)
    return {name: made(value) for name, value in picked.items()}, odd, wrong


def tried(call: Call, seed: int) -> tuple[str, str]:
    """What came of a call by its seed: "answer" or "sentence", and what is wrong with that."""
    arguments, odd, wrong = arguments_of(call, random.Random(f"{call.name} {seed}"))
    told = {name: str(arguments[name])[:70].replace("\n", "") for name in (*odd, *wrong)}
    shown = f"{call.name}, seed {seed}, odd {odd}, wrong {wrong}: {told}"
    try:
        result = call.function(**arguments)
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        if not is_ours(error):
            return "raw", f"{shown} raised what is not ours, {said}"
        if not odd and not wrong:
            return "refused", f"{shown} refused what is right, {said}"
        return "sentence", ""
    if wrong:
        return "silent", f"{shown} was taken and gave a {type(result).__name__}"
    if not is_finite(result):
        return "silent", f"{shown} gave a {type(result).__name__} that is not finite"
    wanted = call.shape(**arguments) if call.shape is not None else None
    if wanted is not None and tuple(np.shape(result)) != tuple(wanted):
        return "silent", f"{shown} gave the shape {np.shape(result)}, not {tuple(wanted)}"
    return "answer", ""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a picture and a text."""
    from PIL import Image

    Image.effect_noise((20, 16), 60).convert("RGB").save(tmp_path / "picture.png")
    (tmp_path / "notes.txt").write_text("notes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tally(calls: list[tuple[Call, int]], capsys) -> tuple[Counter, list[str]]:
    """Try calls by their seeds, print how they ended -> the counts, and every complaint."""
    ends = Counter()
    wrong = []
    with torch.no_grad():
        for call, seed in calls:
            end, complaint = tried(call, seed)
            ends[end] += 1
            wrong += [complaint] if complaint else []
    with capsys.disabled():
        print(f"\n{sum(ends.values())} calls: {dict(sorted(ends.items()))}")
    return ends, wrong


def test_a_sample_of_calls_answers_or_speaks(place, capsys):
    spread = CALLS[:: max(1, len(CALLS) // FEW)][:FEW]
    ends, wrong = tally([(call, 0) for call in spread], capsys)
    assert not wrong, "\n".join(wrong)
    assert ends["answer"] and ends["sentence"]


@pytest.mark.slow
def test_many_calls_answer_or_speak(place, capsys):
    rounds = range(1, 1 + -(-MANY // len(CALLS)))
    ends, wrong = tally([(call, seed) for call in CALLS for seed in rounds], capsys)
    assert not wrong, "\n".join(wrong)
    assert ends["answer"] > MANY / 10 and ends["sentence"] > MANY / 10
