"""Networks for randomised smoothing: four ways to train a classifier whose votes on noised copies agree.

All of them see x + sigma eps, not clamped, as a certificate's votes do; the network therefore has to carry `sigma_pixel`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import nll_loss

from diffclass import attacks, units
from diffclass.classifiers.base import Classifier, Noise
from diffclass.training.losses import Loss, crops, drawn_moves

# Where a share is kept from 0 and 1 before its quantile is taken. A pair of shares that this changes is more than 9
# apart in quantiles, beyond any hinge that is used here.
EDGE = 1e-6


def noises(images: Tensor, copies: int, generator: torch.Generator) -> Tensor:
    """Standard Gaussian noise for several copies of each image. Shapes: [B,C,H,W] -> [B,M,C,H,W]."""
    shape = (len(images), copies, *images.shape[1:])
    return torch.randn(shape, generator=generator, device=generator.device).to(images)


def _copies_of(value: Callable[..., Tensor], copies: int, crop: int) -> Loss:
    """A loss of the moved images, their labels and the noise of so many copies of each."""
    copies = units.check_whole(copies, "copies", least=1)

    def draw(
        classifier: Classifier, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Noise:
        moves = drawn_moves(len(images), crop, generator)
        return moves, noises(images, copies, generator)

    def of_slice(classifier: Classifier, images: Tensor, labels: Tensor, drawn: Noise) -> Tensor:
        moves, eps = drawn
        return value(classifier, crops(images, moves, crop), labels, eps)

    return Loss(draw, of_slice)


def log_shares(classifier: Classifier, images: Tensor, eps: Tensor, sigma: float) -> Tensor:
    """The classifier's log-probabilities on noised copies of each image.

    Formula     log softmax f(x + sigma eps_i)
    Shapes      images [B,C,H,W], eps [B,M,C,H,W] -> [B,M,K]
    """
    copies = (images[:, None] + sigma * eps).flatten(0, 1)
    return classifier(copies).log_softmax(1).unflatten(0, eps.shape[:2])


def log_mean(log_probabilities: Tensor) -> Tensor:
    """The logarithm of the mean over copies of probabilities. Shapes: [B,M,K] of logarithms -> [B,K]."""
    return log_probabilities.logsumexp(1) - math.log(log_probabilities.shape[1])


def mean_entropy(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of every copy, averaged. Shapes: [B,M,K] of log-probabilities, [B] -> scalar."""
    copies = log_probabilities.shape[1]
    return nll_loss(log_probabilities.flatten(0, 1), labels.repeat_interleave(copies))


def gaussian_loss(sigma: float, crop: int = 0) -> Loss:
    """Cross-entropy on a noised copy of each image.

    Formula     mean over images of -log softmax(f(x + sigma eps))_y
    Source      Cohen et al. 2019
    Shapes      images [B,C,H,W] in [0,1], moved by up to `crop` pixels, labels [B] -> scalar
    Units       sigma in pixels
    Errors      those of `units.check_sigma_pixel`, and of `units.check_whole` for copies
    """
    sigma = units.check_sigma_pixel(sigma)

    def value(classifier: Classifier, x: Tensor, labels: Tensor, eps: Tensor) -> Tensor:
        return mean_entropy(log_shares(classifier, x, eps, sigma), labels)

    return _copies_of(value, 1, crop)


def smoothed_worst_case(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    eps: Tensor,
    sigma: float,
    epsilon: float,
    steps: int,
) -> Tensor:
    """The pictures within an L2 ball on which the mean of the noised copies' probabilities says least of the label.

    Formula     x' <- project(x' + 2 epsilon / steps g / |g|), g the gradient of -log 1/M sum_i softmax(f(x' + sigma eps_i))_y
    Source      Salman et al. 2019, section 3.2: the attack on the smoothed classifier, not on the classifier; what is
                noised is a picture, so x' stays in [0,1]
    Shapes      images [B,C,H,W] in [0,1], labels [B], eps [B,M,C,H,W], the same at all steps -> [B,C,H,W] in [0,1]
    Units       sigma and epsilon in pixels
    """
    at = images
    for _ in range(steps):
        at = at.detach().requires_grad_(True)
        log_probabilities = log_mean(log_shares(classifier, at, eps, sigma))
        height = nll_loss(log_probabilities, labels, reduction="sum")
        (gradient,) = torch.autograd.grad(height, at)
        step = 2 * epsilon / steps * attacks.ascent(gradient, "l2")
        at = attacks.project(at.detach() + step, images, epsilon, "l2")
    return at.detach()


def smoothadv_loss(
    sigma: float, copies: int = 2, steps: int = 2, reach: float = 1.0, crop: int = 0
) -> Loss:
    """Cross-entropy on noised copies of the picture nearby that the smoothed classifier knows least.

    Formula     mean over images and copies of -log softmax(f(x' + sigma eps_i))_y,
                x' = argmax over |x' - x|_2 <= reach sigma of -log 1/M sum_i softmax(f(x' + sigma eps_i))_y, by a few steps
    Source      Salman et al. 2019 (SmoothAdv); the same noise finds x' and is trained on
    Shapes      images [B,C,H,W] in [0,1], moved by up to `crop` pixels, labels [B] -> scalar
    Units       sigma in pixels; reach in units of sigma
    Errors      those of `units.check_sigma_pixel`, and of `units.check_whole` for copies
    """
    sigma = units.check_sigma_pixel(sigma)

    def value(classifier: Classifier, x: Tensor, labels: Tensor, eps: Tensor) -> Tensor:
        worst = smoothed_worst_case(classifier, x, labels, eps, sigma, reach * sigma, steps)
        return mean_entropy(log_shares(classifier, worst, eps, sigma), labels)

    return _copies_of(value, copies, crop)


def radius_hinge(shares: Tensor, labels: Tensor, sigma: float, gamma: float) -> Tensor:
    """By how much the radius of each image falls short; nothing for an image whose first share is not its label's.

    Formula     sigma/2 max(0, gamma - (q_1 - q_2)),   q = quantile of the standard normal at the two largest shares
    Source      Zhai et al. 2020 (MACER), equation 8
    Shapes      shares [B,K], rows sum to 1, labels [B] -> [B]
    Units       sigma/2 (q_1 - q_2) is the radius, in pixels
    """
    first, classes = shares.topk(2, dim=1)
    quantiles = torch.special.ndtri(first.clamp(EDGE, 1 - EDGE))
    missing = (gamma - (quantiles[:, 0] - quantiles[:, 1])).clamp_min(0)
    return sigma / 2 * missing * (classes[:, 0] == labels)


def macer_loss(
    sigma: float,
    copies: int = 16,
    weight: float = 12.0,
    gamma: float = 8.0,
    beta: float = 16.0,
    crop: int = 0,
) -> Loss:
    """The smoothed classifier's own cross-entropy, and the radius that its right answers lack.

    Formula     mean over images of -log z_y + weight sigma/2 [z'_1 is y] max(0, gamma - (q(z'_1) - q(z'_2))),
                z = 1/M sum_i softmax(f(x + sigma eps_i)), z' the same of beta f, q the normal quantile
    Source      Zhai et al. 2020 (MACER): no attack inside
    Shapes      images [B,C,H,W] in [0,1], moved by up to `crop` pixels, labels [B] -> scalar
    Units       sigma in pixels
    Errors      those of `units.check_sigma_pixel`, and of `units.check_whole` for copies
    """
    sigma = units.check_sigma_pixel(sigma)

    def value(classifier: Classifier, x: Tensor, labels: Tensor, eps: Tensor) -> Tensor:
        each = log_shares(classifier, x, eps, sigma)
        sharp = (beta * each).softmax(2).mean(1)
        missing = radius_hinge(sharp, labels, sigma, gamma)
        return nll_loss(log_mean(each), labels) + weight * missing.mean()

    return _copies_of(value, copies, crop)


def consistency_loss(
    sigma: float, copies: int = 2, agreement: float = 10.0, entropy: float = 0.5, crop: int = 0
) -> Loss:
    """Cross-entropy on noised copies, and their disagreement.

    Formula     mean over images of 1/M sum_i [-log F_i,y + agreement KL(F || F_i)] + entropy H(F),
                F_i = softmax(f(x + sigma eps_i)), F = 1/M sum_i F_i
    Source      Jeong & Shin 2020
    Shapes      images [B,C,H,W] in [0,1], moved by up to `crop` pixels, labels [B] -> scalar
    Units       sigma in pixels
    Errors      those of `units.check_sigma_pixel`, and of `units.check_whole` for copies
    """
    sigma = units.check_sigma_pixel(sigma)

    def value(classifier: Classifier, x: Tensor, labels: Tensor, eps: Tensor) -> Tensor:
        each = log_shares(classifier, x, eps, sigma)
        log_whole = log_mean(each)
        whole = log_whole.exp()
        apart = (whole * (log_whole - each.mean(1))).sum(1)
        spread = -(whole * log_whole).sum(1)
        return mean_entropy(each, labels) + (agreement * apart + entropy * spread).mean()

    return _copies_of(value, copies, crop)
