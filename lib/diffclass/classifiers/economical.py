"""Diffusion classifiers that ask no more than it takes: the same scores, fewer network calls, and what they cost is told.

Among a hundred classes most are out after a few noise levels. Each classifier here has one of `racing`'s strategies in
front of a diffusion classifier, and is a classifier like any other: the same pixels and the same seeds give the same bits.
"""

import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from diffclass import units
from diffclass.classifiers import racing
from diffclass.classifiers.base import Classifier, Noise
from diffclass.classifiers.bayes import BayesClassifier
from diffclass.classifiers.noised import NoisedBayesClassifier
from diffclass.classifiers.racing import Answer, Generators, Question
from diffclass.classifiers.votes import MeanLogits
from diffclass.noise import generator_of

STEP = 1.0  # how far below the worst survivor the classes lie that are out, in nats

# question, x, generators -> Answers; picklable, such as functools.partial(racing.full, shared=False)
Strategy = Callable[[Question, Tensor, Generators], Iterator[Answer]]


def question_of(classifier: BayesClassifier | NoisedBayesClassifier) -> Question:
    """What a diffusion classifier asks: its denoiser, levels, weights, prior and noise."""
    return Question(
        classifier.denoiser,
        classifier.levels,
        classifier.weighting,
        classifier.log_prior.cpu(),
        classifier.sigma_pixel,
    )


class EconomicalClassifier(Classifier):
    """The answer of a diffusion classifier, found by a strategy that leaves out what cannot change it, or should not.

    Formula     logit_k = -score_k of the strategy's `Answer` for the classes that are left; STEP below the worst of them
                for all others: out, and not infinitely so, which would silence an attack on their behalf
    Shapes      x [B,C,H,W] as the diffusion classifier's, noise [B or 1] of seeds -> [B,K] in nats up to the floor: "scores"
    Randomness  one seed a picture, for all that its strategy draws, levels and noises: neither the batch nor its order
                changes what a picture is asked
    Gradients   none, as who is out is no smooth function: an attack climbs `surrogate()`, the diffusion classifier itself
    Cost        `calls` at most; `billed` tells what each picture took
    """

    scale = "scores"

    def __init__(
        self, base: BayesClassifier | NoisedBayesClassifier, strategy: Strategy, calls: int
    ):
        super().__init__()
        self.mean = MeanLogits(base, 1)
        self.strategy = strategy
        self.most = units.check_whole(calls, "network calls at most", least=1)
        self.num_classes = base.num_classes
        self.image_shape = base.image_shape
        self.sigma_pixel = base.sigma_pixel
        question_of(base)  # raises for a noise that does not lie below every level

    def sample_noise(self, images: int, generator: torch.Generator) -> Tensor:
        """One seed for each picture. Shapes: -> [images]."""
        return self.mean.sample_noise(images, generator)

    def billed(self, x: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        """See `Classifier.billed`: a network with a head for every class counts once, whoever is left."""
        generators = [generator_of(seed) for seed in noise.expand(len(x)).tolist()]
        found = racing.answer(self.strategy(question_of(self.mean.classifier), x, generators))
        logits = -found.estimates
        worst = logits.masked_fill(~found.alive, math.inf).amin(1, keepdim=True)
        return torch.where(found.alive, logits, worst - STEP).to(x), found.evaluations.cpu()

    def logits(self, x: Tensor, noise: Noise) -> Tensor:
        """See `Classifier.logits`."""
        return self.billed(x, noise)[0]

    def gradients(self) -> dict[str, Classifier]:
        """None: elimination has no gradient."""
        return {}

    def surrogate(self) -> Classifier:
        """The diffusion classifier, its noise from the same seeds."""
        return self.mean.surrogate()

    def routes(self) -> dict[str, Classifier]:
        """Those of the diffusion classifier, which can be climbed."""
        return self.mean.routes()

    @property
    def calls(self) -> int:
        """See `Classifier.calls`."""
        return self.most


def with_own_noise(base: BayesClassifier | NoisedBayesClassifier) -> EconomicalClassifier:
    """Every class under noise of its own: nothing is saved, and the noise does not cancel. What the others are compared to.

    Cost        that of every class at every level, also where one call answers for all classes
    """
    strategy = functools.partial(racing.full, shared=False)
    return EconomicalClassifier(base, strategy, len(base.levels) * base.num_classes)


def sifted(
    base: BayesClassifier | NoisedBayesClassifier,
    threshold: float,
    sift: int,
    most: int,
) -> EconomicalClassifier:
    """Sift with few levels, refine the `most` classes that are left: see `racing.sift_and_refine`.

    Units       threshold in nats
    Errors      ValueError for numbers that `racing.sift_and_refine` refuses
    """
    threshold = units.check_number(threshold, "a threshold", above=0)
    sift = units.check_whole(sift, "levels to sift by", least=1, most=len(base.levels))
    most = units.check_whole(most, "classes that are refined", least=1, most=base.num_classes)
    strategy = functools.partial(racing.sift_and_refine, threshold=threshold, sift=sift, most=most)
    calls = base.denoiser.calls
    bound = sift * calls(base.num_classes) + len(base.levels) * calls(most)
    return EconomicalClassifier(base, strategy, bound)


def raced(
    base: BayesClassifier | NoisedBayesClassifier,
    pilot: racing.Pilot,
    alpha: float,
    budget: int,
) -> EconomicalClassifier:
    """One random level after the other for the classes that bets have not ruled out: `racing.race` by `normal_mixture`.

    Options     pilot of other pictures: how levels are drawn, and how much differences vary; alpha the chance that the best
                class is ruled out, under that guess; budget of network evaluations a picture, after which the best so far
                is the answer
    Errors      ValueError for an alpha or a budget that the race refuses
    """
    alpha = units.check_number(alpha, "alpha", above=0)
    if alpha >= 1:
        raise ValueError(f"expected alpha below 1, got {alpha:g}; 0.01 by custom.")
    least = base.denoiser.calls(base.num_classes)
    budget = units.check_whole(budget, "the budget of a race", least=least)
    rule = functools.partial(racing.normal_mixture, alpha=alpha, scale=pilot.scale)
    strategy = functools.partial(racing.race, share=pilot.share, rule=rule, budget=budget)
    return EconomicalClassifier(base, strategy, budget)
