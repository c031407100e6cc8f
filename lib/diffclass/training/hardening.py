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
from diffclass.training.losses import Loss, moved


@dataclass(frozen=True)
class Inner:
    """The inner maximisation of adversarial training: PGD in L-inf from a random start.

    Units       epsilon in pixels; stride, the length of a step, in units of epsilon
    """

    epsilon: float
    steps: int
    stride: float


def adversarial_images(
    classifier: Classifier,
    x: Tensor,
    y: Tensor,
    inner: Inner,
    generator: torch.Generator,
    noise: Noise = (),
) -> Tensor:
    """The images on which adversarial training trains: near the clean ones, and of a large loss.

    Formula     x <- project(x + stride epsilon sign(grad cross-entropy)), from x + epsilon U(-1, 1)
    Source      Madry et al. 2018; one step of 1.25 epsilon: Wong et al. 2020
    Shapes      x [B,C,H,W] in [0,1], y [B] -> [B,C,H,W] in [0,1]
    Randomness  the start from `generator`; `noise` is held for all steps
    """
    start = 2 * torch.rand(x.shape, generator=generator, device=generator.device).to(x) - 1
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

    def loss(
        classifier: Classifier, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Tensor:
        x = moved(images, crop, generator)
        attacked = adversarial_images(classifier, x, labels, inner, generator)
        return cross_entropy(classifier(attacked), labels)

    return loss


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

    def drawn(
        denoiser: Denoiser, images: int, generator: torch.Generator
    ) -> tuple[BayesClassifier, Noise]:
        levels = drawn_levels(hardening.low, hardening.high, hardening.levels, generator)
        classifier = BayesClassifier(denoiser, levels, temperature=hardening.temperature)
        return classifier, classifier.sample_noise(images, generator)

    def loss(
        denoiser: Denoiser, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Tensor:
        x = moved(units.to_pixel(images), hardening.shift, generator, "reflect")
        judge, noise = drawn(denoiser, len(x), generator)
        attacked = adversarial_images(judge, x, labels, hardening.inner, generator, noise)
        spared = int(hardening.clean * len(x))
        attacked = torch.cat([x[:spared], attacked[spared:]])
        if not hardening.held:
            judge, noise = drawn(denoiser, len(x), generator)
        own = judge.losses(x, noise)[torch.arange(len(x), device=x.device), labels]
        evidence = likelihood.evidence(own, judge.levels.to(own), judge.weighting)
        wrong = cross_entropy(judge(attacked, noise), labels)
        return wrong - hardening.denoising * evidence.mean() / x[0].numel()

    return loss
