"""What networks are trained by: denoising, copying, contrast, translation, classification.

A loss first draws all its noise and then has a value that depends on nothing else, so that the value of a batch is the
mean of the values of its slices, whatever memory allows, and a step can be captured and replayed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffclass import noise, units
from diffclass.classifiers.base import Classifier, Noise
from diffclass.classifiers.idc import Translator
from diffclass.denoisers.base import Denoiser
from diffclass.denoisers.network import LearnedDenoiser


@dataclass(frozen=True)
class Loss:
    """What a network is trained by, in two parts.

    draw    (network, images, labels, generator) -> all the noise of a batch, the picture axis first
    value   (network, images, labels, noise) -> the mean over these images, of a batch or of a slice of both
    silent  whether `value` reads no number back from the accelerator, so that a step of it can be captured
    limit   beyond which size it says that the run has diverged and has to go back to its last good state; None for a loss
            that no number stops but one that is not finite

    Called with a generator in place of the noise, it does both. Shapes: images [B,C,H,W], labels [B] -> scalar
    """

    draw: Callable[[nn.Module, Tensor, Tensor, torch.Generator], Noise]
    value: Callable[[nn.Module, Tensor, Tensor, Noise], Tensor]
    silent: bool = False
    limit: float | None = None

    def __call__(
        self, network: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Tensor:
        return self.value(network, images, labels, self.draw(network, images, labels, generator))


def draw_sigma(
    count: int,
    generator: torch.Generator,
    log_mean: float = -0.8,
    log_std: float = 1.2,
    sigma_range: tuple[float, float] = (0.01, 80.0),
) -> Tensor:
    """Training noise levels: ln sigma ~ N(log_mean, log_std^2), kept in the denoiser's range. Shapes: -> [B]."""
    normal = torch.randn(count, generator=generator, device=generator.device)
    return (log_mean + log_std * normal).exp().clamp(*sigma_range)


def _drawn_eps(images: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(images.shape, generator=generator, device=generator.device).to(images)


def _drawn_level(
    denoiser: Denoiser, images: Tensor, labels: Tensor, generator: torch.Generator
) -> Noise:
    """A noise level, its weight, and noise for each image. Shapes: -> [B], [B], [B,C,H,W]."""
    sigma = draw_sigma(len(images), generator, sigma_range=denoiser.sigma_range).to(images)
    return sigma, noise.edm_lambda(sigma), _drawn_eps(images, generator)


def denoising_loss(null_rate: float = 0.1) -> Loss:
    """EDM's denoising loss under the true label; a share `null_rate` of the labels is withheld (the null class).

    Formula     mean over images and pixels of lambda(sigma) (D_y(x + sigma eps, sigma) - x)^2, lambda of `edm_lambda`
    Source      Karras et al. 2022, equation 8; label dropout: Ho & Salimans 2022
    Shapes      images [B,C,H,W] in model space, labels [B] -> scalar
    """

    def draw(
        denoiser: Denoiser, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Noise:
        level = _drawn_level(denoiser, images, labels, generator)
        if denoiser.has_null:
            part = torch.rand(len(labels), generator=generator, device=generator.device)
            labels = torch.where(part.to(images) < null_rate, denoiser.num_classes, labels)
        return *level, labels

    def value(denoiser: LearnedDenoiser, images: Tensor, labels: Tensor, drawn: Noise) -> Tensor:
        sigma, weight, eps, told = drawn
        noisy = images + sigma[:, None, None, None] * eps
        square = (denoiser.paired(noisy, sigma, told) - images) ** 2
        return (weight[:, None, None, None] * square).mean()

    return Loss(draw, value, silent=True)


def distillation_loss(teacher: LearnedDenoiser) -> Loss:
    """The loss that copies every head of `teacher`: the heads of wrong classes see every image.

    Formula     mean over images, classes (and "no class") and pixels of lambda(sigma) (D_k - teacher_k)^2
    Source      Chen et al. 2024 (RDC), multi-head diffusion
    """

    def value(denoiser: LearnedDenoiser, images: Tensor, labels: Tensor, drawn: Noise) -> Tensor:
        sigma, weight, eps = drawn
        noisy = images + sigma[:, None, None, None] * eps
        with torch.no_grad():
            wanted = teacher.answers(noisy, sigma)
        square = (denoiser.answers(noisy, sigma) - wanted) ** 2
        return (weight[:, None, None, None, None] * square).mean()

    return Loss(_drawn_level, value, silent=True)


def contrastive_loss(
    low: float, high: float, temperature: float = 10.0, denoising: float = 0.5, shift: int = 0
) -> Loss:
    """Cross-entropy of the ELBO that one drawn level estimates, so that the heads of wrong classes learn without a
    teacher; plus the diffusion losses of the true class and of "no class", by which both stay denoisers.

    Formula     e_k = ln(high / low) |D_k(x + sigma eps, sigma) - x|^2 / sigma^2 with ln sigma ~ U(ln low, ln high): its
                mean is the ELBO's integral. Mean of -log softmax(-e / temperature)_y + denoising (e_y + e_null) / 2D,
                of images x moved by up to `shift` pixels, mirrored at their edges
    Why hot     one level is a noisy estimate of a sum of many: colder logits would follow its noise. The errors of digits
                take 10; those of photographs, of fifty times as many numbers, 300
    Shapes      images [B,C,H,W] of D numbers in model space, labels [B] -> scalar
    Errors      ValueError for a denoiser without a null class
    """

    def draw(
        denoiser: Denoiser, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Noise:
        if not denoiser.has_null:
            raise ValueError(
                "expected a denoiser with a null class, which is trained along, got one without."
            )
        moves = drawn_moves(len(images), shift, generator)
        part = torch.rand(len(images), generator=generator, device=generator.device).to(images)
        return moves, low * (high / low) ** part, _drawn_eps(images, generator)

    def value(denoiser: LearnedDenoiser, images: Tensor, labels: Tensor, drawn: Noise) -> Tensor:
        moves, sigma, eps = drawn
        images = crops(images, moves, shift, "reflect")
        denoised = denoiser.answers(images + sigma[:, None, None, None] * eps, sigma)
        square = (denoised - images[:, None]).float().square().flatten(2).sum(2)
        evidence = -math.log(high / low) * square / sigma[:, None] ** 2
        own = evidence.gather(1, labels[:, None]).mean() + evidence[:, -1].mean()
        return nn.functional.cross_entropy(
            evidence[:, :-1] / temperature, labels
        ) - denoising * own / (2 * images[0].numel())

    return Loss(draw, value, silent=True)


def translation_loss(inter: float = 0.2) -> Loss:
    """IDC's training loss: towards the true label, and away from the nearest wrong one while that is nearer.

    Formula     mean over images of d_c - inter [d_c > min_{k != c} d_k] min_{k != c} d_k,   d_k = mean |O_k - F(x_t)|
                at a random position t; d_c = mean |x0 - x0_hat| is the intra-class loss, all that is left for inter = 0
    Source      Mei et al. 2024 (IDC), with 0.2 in the released code; O_k of Proposition 1 is `Bridge.offsets`
    Shapes      images [B,C,H,W] in model space, labels [B] -> scalar
    """

    def draw(
        translator: Translator, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Noise:
        bridge = translator.bridge
        targets = units.to_model(translator.labels)
        t = torch.randint(
            bridge.steps, (len(images),), generator=generator, device=generator.device
        )
        eps = _drawn_eps(images, generator)
        x_t = bridge.forward(targets[labels], images, t, eps)
        offsets = bridge.offsets(targets, targets[labels], images, t, eps)
        return x_t, torch.logit(bridge.shares.to(images)[t]), offsets

    def value(translator: Translator, images: Tensor, labels: Tensor, drawn: Noise) -> Tensor:
        x_t, log_odds, offsets = drawn
        predicted = translator.network(x_t, log_odds, None)
        d = (offsets - predicted[:, None]).abs().flatten(2).mean(-1)
        intra = d.gather(1, labels[:, None])[:, 0]
        nearest = d.scatter(1, labels[:, None], torch.inf).amin(1)
        return (intra - inter * (intra > nearest) * nearest).mean()

    return Loss(draw, value, silent=True)


def drawn_moves(count: int, most: int, generator: torch.Generator) -> Noise:
    """By how many pixels each image is moved, down and right; () for most = 0. Shapes: -> [count,2], from 0 to 2 most."""
    if not most:
        return ()
    drawn = torch.randint(2 * most + 1, (2, count, 1), generator=generator, device=generator.device)
    return drawn[:, :, 0].T


def crops(images: Tensor, moves: Noise, most: int, edge: str = "constant") -> Tensor:
    """The padded images, cut where `drawn_moves` says; the images themselves for ().

    Shapes      images [B,C,H,W], moves [B,2] -> [B,C,H,W]; edge: what is where an image left, "constant" (0: black, of
                pixels) or "reflect"
    """
    if isinstance(moves, tuple):
        return images
    count, channels, height, width = images.shape
    first = moves.to(images.device)
    rows = first[:, :1] + torch.arange(height, device=images.device)
    columns = first[:, 1:] + torch.arange(width, device=images.device)
    image = torch.arange(count, device=images.device)
    channel = torch.arange(channels, device=images.device)
    padded = nn.functional.pad(images, [most] * 4, mode=edge)
    return padded[
        image[:, None, None, None],
        channel[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None],
    ]


def moved(images: Tensor, most: int, generator: torch.Generator, edge: str = "constant") -> Tensor:
    """Each image moved by up to `most` pixels in both directions: a crop of the padded image.

    Shapes      images [B,C,H,W] -> the same; edge: that of `crops`
    Randomness  one move for each image, from `generator`; none is drawn for most = 0
    """
    return crops(images, drawn_moves(len(images), most, generator), most, edge)


def classification_loss(crop: int = 0) -> Loss:
    """Cross-entropy of a deterministic classifier on moved images.

    Formula     mean over images of -log softmax(f(x'))_y, x' = x moved by up to `crop` pixels
    Shapes      images [B,C,H,W] in [0,1], labels [B] -> scalar
    """

    def draw(
        classifier: Classifier, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Noise:
        return drawn_moves(len(images), crop, generator)

    def value(classifier: Classifier, images: Tensor, labels: Tensor, moves: Noise) -> Tensor:
        return nn.functional.cross_entropy(classifier(crops(images, moves, crop)), labels)

    return Loss(draw, value)
