"""Adversarial training: a network learns on the images that fool it, a classifier directly, a denoiser by its ELBO.

Accuracy under an attack of several steps is watched along such runs: a one-step attack can be learned without any
robustness, and only several steps show it (catastrophic overfitting, Wong et al. 2020).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from diffclass import units
from diffclass.classifiers.base import Classifier, Noise
from diffclass.classifiers.bayes import sampled_bank
from diffclass.denoisers.base import Denoiser
from diffclass.denoisers.network import LearnedDenoiser
from diffclass.noise import Levels, elbo_weight
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
    logits_of: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, inner: Inner, start: Tensor
) -> Tensor:
    """The images on which adversarial training trains: near the clean ones, and of a large loss.

    Formula     x <- clip(x + stride epsilon sign(grad cross-entropy)), from x + epsilon start; into the budget, and [0,1]
    Source      Madry et al. 2018; one step of 1.25 epsilon: Wong et al. 2020
    Shapes      logits_of: [B,C,H,W] -> [B,K]; x [B,C,H,W] in [0,1], y [B], start in [-1,1] -> [B,C,H,W] in [0,1]
    Randomness  none: `start` is that of `drawn_start`, and what `logits_of` draws it has drawn before
    Errors      none of its own: nothing is checked, as a check would read a number back in the midst of a step
    """
    low = (x - inner.epsilon).clamp(min=0)
    high = (x + inner.epsilon).clamp(max=1)
    at = (x + inner.epsilon * start).clamp(low, high)
    for _ in range(inner.steps):
        at = at.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(cross_entropy(logits_of(at), y, reduction="sum"), at)
        step = inner.stride * inner.epsilon * gradient.sign()
        at = (at.detach() + step).clamp(low, high)
    return at.detach()


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


def drawn_bank(
    images: Tensor, low: float, high: float, count: int, generator: torch.Generator
) -> Noise:
    """Levels and their ELBO weights, of all images alike, and noise at these levels, as `drawn_evidence` takes them.

    Shapes      images [B,C,H,W] -> [1,T], [1,T], [B,T,1,C,H,W]
    """
    levels = drawn_levels(low, high, count, generator)
    eps = sampled_bank((len(levels), 1, *images.shape[1:]), len(images), generator)
    sigma = levels.sigma.to(images)[None]
    return sigma, elbo_weight(levels).to(images)[None], eps.to(images)


def hardening_loss(hardening: Hardening) -> Loss:
    """Cross-entropy of the Bayes classifier on attacked images, plus the diffusion loss of the clean ones.

    Formula     mean of -log softmax(ELBO(x') / temperature)_y - denoising ELBO_y(x) / D,
                x' = argmax over |x' - x|_inf <= epsilon of the same cross-entropy, under other noise or the same
    Source      Madry et al. 2018 for the maximisation; the classifier is `BayesClassifier`'s, with levels drawn anew
    Shapes      images [B,C,H,W] of D numbers in model space, labels [B] -> scalar
    """

    span = (hardening.low, hardening.high)

    def draw(
        denoiser: Denoiser, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Noise:
        moves = drawn_moves(len(images), hardening.shift, generator)
        met = drawn_bank(images, *span, hardening.levels, generator)
        start = drawn_start(images, generator)
        judging = met
        if not hardening.held:
            judging = drawn_bank(images, *span, hardening.levels, generator)
        first = torch.arange(len(images), device=images.device)
        return moves, start, first < int(hardening.clean * len(images)), met, judging

    def value(denoiser: LearnedDenoiser, images: Tensor, labels: Tensor, drawn: Noise) -> Tensor:
        moves, start, spared, met, judging = drawn

        def logits(x: Tensor, bank: Noise) -> Tensor:
            every = drawn_evidence(denoiser, units.to_model(x), *bank)
            return every[:, : denoiser.num_classes] / hardening.temperature

        x = crops(units.to_pixel(images), moves, hardening.shift, "reflect")
        attacked = adversarial_images(lambda at: logits(at, met), x, labels, hardening.inner, start)
        attacked = torch.where(spared[:, None, None, None], x, attacked)
        own = hardening.temperature * logits(x, judging).gather(1, labels[:, None])
        wrong = cross_entropy(logits(attacked, judging), labels)
        return wrong - hardening.denoising * own.mean() / x[0].numel()

    return Loss(draw, value, silent=True)


def drawn_evidence(
    denoiser: Denoiser, z: Tensor, sigma: Tensor, weight: Tensor, eps: Tensor
) -> Tensor:
    """The evidence of a few drawn levels for every class and, where it is offered, "no class": unchecked, for training.

    Formula     - sum_t w_t |D_k(z + sigma_t eps_t, sigma_t) - z|^2, as `likelihood.elbo` has it
    Shapes      z [B,C,H,W] in model space, sigma and weight [1,T], eps [B,T,1,C,H,W] -> [B,K or K+1]
    """
    noisy = z[:, None] + sigma[0, :, None, None, None] * eps[:, :, 0]
    levels = sigma.expand(len(z), -1).flatten()
    denoised = denoiser.answers(noisy.flatten(0, 1), levels).unflatten(0, noisy.shape[:2])
    square = (denoised - z[:, None, None]).float().square().flatten(3).sum(3)
    return -(square * weight[0, :, None]).sum(1)
