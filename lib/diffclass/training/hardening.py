"""Adversarial training: a network learns on the images that fool it, a classifier directly, a denoiser by its ELBO.

Accuracy under an attack of several steps is watched along such runs: a one-step attack can be learned without any
robustness, and only several steps show it (catastrophic overfitting, Wong et al. 2020).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from diffclass import attacks, likelihood, units
from diffclass.classifiers.base import Classifier, Noise
from diffclass.classifiers.bayes import BayesClassifier
from diffclass.denoisers.base import Denoiser
from diffclass.noise import Levels
from diffclass.training.losses import Loss, crops, drawn_moves


@dataclass(frozen=True)
class Inner:
    """The inner maximisation of adversarial training: PGD in L-inf from a random start.

    Units       epsilon in pixels; stride, the length of a step, in units of epsilon
    """

    epsilon: float
    steps: int
    stride: float


def drawn_start(images: Tensor, generator: torch.Generator) -> Tensor:
    """Where in its budget each image's attack starts: U(-1, 1) in every pixel. Shapes: [B,C,H,W] -> the same."""
    return 2 * torch.rand(images.shape, generator=generator, device=generator.device).to(images) - 1


def adversarial_images(
    classifier: Classifier,
    x: Tensor,
    y: Tensor,
    inner: Inner,
    start: Tensor,
    noise: Noise = (),
) -> Tensor:
    """The images on which adversarial training trains: near the clean ones, and of a large loss.

    Formula     x <- project(x + stride epsilon sign(grad cross-entropy)), from x + epsilon U(-1, 1)
    Source      Madry et al. 2018; one step of 1.25 epsilon: Wong et al. 2020
    Shapes      x [B,C,H,W] in [0,1], y [B], start [B,C,H,W] in [-1,1] -> [B,C,H,W] in [0,1]
    Randomness  none: `start` is that of `drawn_start`, and `noise` is held for all steps
    """
    at = attacks.project(x + inner.epsilon * start, x, inner.epsilon, "linf")
    for _ in range(inner.steps):
        gradient, _, _ = attacks.expected_gradient(
            classifier, at, y, noise=noise, loss=attacks.cross_entropy_loss
        )
        step = inner.stride * inner.epsilon * attacks.ascent(gradient, "linf")
        at = attacks.project(at + step, x, inner.epsilon, "linf")
    return at


def adversarial_loss(inner: Inner, crop: int = 0) -> Loss:
    """Cross-entropy of a deterministic classifier on the worst case of moved images.

    Formula     mean over images of -log softmax(f(x'))_y,   x' = argmax over |x' - x|_inf <= epsilon of the same
    Source      Madry et al. 2018, equation 2.1
    Shapes      images [B,C,H,W] in [0,1], labels [B] -> scalar
    """

    def draw(
        classifier: Classifier, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Noise:
        moves = drawn_moves(len(images), crop, generator)
        return moves, drawn_start(images, generator)

    def value(classifier: Classifier, images: Tensor, labels: Tensor, drawn: Noise) -> Tensor:
        moves, start = drawn
        x = crops(images, moves, crop)
        attacked = adversarial_images(classifier, x, labels, inner, start)
        return cross_entropy(classifier(attacked), labels)

    return Loss(draw, value)


# ---------------------------------------------------------------------------------------------------------------------
# A diffusion classifier


@dataclass(frozen=True)
class Hardening:
    """What the training of `hardening_loss` is made of.

    inner        the attack on each batch; levels: noise levels a step, in [low, high]
    temperature  of the logits in the cross-entropy, in nats: at 1 the margins of an ELBO leave it flat
    denoising    weight of the clean images' own loss, by which the network stays a diffusion model
    clean        share of the images that stay as they are, in [0, 1)
    shift        by how many pixels images are moved before, mirrored at their edges
    held         whether the noise that an attack met also judges it: the attack is then as strong as it can be
    """

    inner: Inner
    low: float
    high: float
    levels: int = 4
    temperature: float = 10.0
    denoising: float = 0.5
    clean: float = 0.0
    shift: int = 0
    held: bool = False

    def __post_init__(self):
        if not 0 <= self.clean < 1:
            raise ValueError(
                f"expected a share of clean images in [0, 1), got {self.clean}; at 1 nothing would be attacked."
            )


def drawn_levels(low: float, high: float, count: int, generator: torch.Generator) -> Levels:
    """One noise level in each of `count` equal parts of [ln low, ln high]: the ELBO's sum over them is unbiased.

    Formula     ln sigma_i ~ U(part i);  E sum_i (ln up_i - ln low_i) g(sigma_i) = integral of g over ln sigma
    Shapes      -> `count` levels, with the parts' ends as their edges
    """
    edges = torch.linspace(math.log(low), math.log(high), count + 1, device=generator.device)
    place = torch.rand(count, generator=generator, device=generator.device)
    return Levels((edges[:-1] + place * edges.diff()).exp(), edges[:-1].exp(), edges[1:].exp())


def hardening_loss(hardening: Hardening) -> Loss:
    """Cross-entropy of the Bayes classifier on attacked images, plus the diffusion loss of the clean ones.

    Formula     mean of -log softmax(ELBO(x') / temperature)_y - denoising ELBO_y(x) / D,
                x' = argmax over |x' - x|_inf <= epsilon of the same cross-entropy, under other noise or the same
    Source      Madry et al. 2018 for the maximisation; the classifier is `BayesClassifier` with levels drawn anew
    Shapes      images [B,C,H,W] of D numbers in model space, labels [B] -> scalar
    """

    def bank(denoiser: Denoiser, images: int, generator: torch.Generator) -> tuple[Noise, Noise]:
        """Levels, of all images alike, and the noise of the classifier at these levels."""
        levels = drawn_levels(hardening.low, hardening.high, hardening.levels, generator)
        noise = classifier_of(denoiser, levels).sample_noise(images, generator)
        return (levels.sigma[None], levels.lower[None], levels.upper[None]), noise

    def classifier_of(denoiser: Denoiser, levels: Levels) -> BayesClassifier:
        return BayesClassifier(denoiser, levels, temperature=hardening.temperature)

    def draw(
        denoiser: Denoiser, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Noise:
        count = len(images)
        moves = drawn_moves(count, hardening.shift, generator)
        met = bank(denoiser, count, generator)
        start = drawn_start(images, generator)
        judging = met if hardening.held else bank(denoiser, count, generator)
        spared = torch.arange(count, device=images.device) < int(hardening.clean * count)
        return moves, start, spared, met, judging

    def value(denoiser: Denoiser, images: Tensor, labels: Tensor, drawn: Noise) -> Tensor:
        moves, start, spared, met, judging = drawn
        x = crops(units.to_pixel(images), moves, hardening.shift, "reflect")
        (levels, noise), (own_levels, own_noise) = met, judging
        attacker = classifier_of(denoiser, Levels(*(part[0] for part in levels)))
        attacked = adversarial_images(attacker, x, labels, hardening.inner, start, noise)
        attacked = torch.where(spared[:, None, None, None], x, attacked)
        judge = classifier_of(denoiser, Levels(*(part[0] for part in own_levels)))
        own = judge.losses(x, own_noise)[torch.arange(len(x), device=x.device), labels]
        evidence = likelihood.evidence(own, judge.levels.to(own), judge.weighting)
        wrong = cross_entropy(judge(attacked, own_noise), labels)
        return wrong - hardening.denoising * evidence.mean() / x[0].numel()

    return Loss(draw, value)
