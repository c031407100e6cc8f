"""What networks are trained by: denoising, copying, contrast, translation, classification."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffclass import noise, units
from diffclass.classifiers.base import Classifier
from diffclass.classifiers.idc import Translator
from diffclass.denoisers.base import Denoiser

# What a loss is given: the network, a batch of images, their labels, and the generator of this step
Loss = Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]


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


def _noised(
    denoiser: Denoiser, images: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    sigma = draw_sigma(len(images), generator, sigma_range=denoiser.sigma_range).to(images)
    eps = torch.randn(images.shape, generator=generator, device=generator.device).to(images)
    return images + sigma[:, None, None, None] * eps, sigma, noise.edm_lambda(sigma)


def denoising_loss(
    denoiser: Denoiser,
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    null_rate: float = 0.1,
) -> Tensor:
    """EDM's denoising loss under the true label; a share `null_rate` of the labels is withheld (the null class).

    Formula     mean over images and pixels of lambda(sigma) (D_y(x + sigma eps, sigma) - x)^2, lambda of `edm_lambda`
    Source      Karras et al. 2022, equation 8; label dropout: Ho & Salimans 2022
    Shapes      images [B,C,H,W] in model space, labels [B] -> scalar
    """
    x_sigma, sigma, weight = _noised(denoiser, images, generator)
    if denoiser.has_null:
        dropped = (
            torch.rand(len(labels), generator=generator, device=generator.device).to(images.device)
            < null_rate
        )
        labels = torch.where(dropped, denoiser.num_classes, labels)
    square = (denoiser.paired(x_sigma, sigma, labels) - images) ** 2
    return (weight[:, None, None, None] * square).mean()


def distillation_loss(teacher: Denoiser) -> Loss:
    """The loss that copies every head of `teacher`: the heads of wrong classes see every image.

    Formula     mean over images, classes (and "no class") and pixels of lambda(sigma) (D_k - teacher_k)^2
    Source      Chen et al. 2024 (RDC), multi-head diffusion
    """
    every = list(range(teacher.num_classes + teacher.has_null))

    def loss(
        denoiser: Denoiser, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Tensor:
        x_sigma, sigma, weight = _noised(denoiser, images, generator)
        with torch.no_grad():
            wanted = teacher(x_sigma, sigma, every)
        square = (denoiser(x_sigma, sigma, every) - wanted) ** 2
        return (weight[:, None, None, None, None] * square).mean()

    return loss


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

    def loss(
        denoiser: Denoiser, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Tensor:
        if not denoiser.has_null:
            raise ValueError(
                "expected a denoiser with a null class, which is trained along, got one without."
            )
        images = moved(images, shift, generator, "reflect")
        part = torch.rand(len(images), generator=generator, device=generator.device).to(images)
        sigma = low * (high / low) ** part
        eps = torch.randn(images.shape, generator=generator, device=generator.device).to(images)
        denoised = denoiser(
            images + sigma[:, None, None, None] * eps, sigma, range(denoiser.num_classes + 1)
        )
        square = (denoised - images[:, None]).float().square().flatten(2).sum(2)
        evidence = -math.log(high / low) * square / sigma[:, None] ** 2
        own = evidence.gather(1, labels[:, None]).mean() + evidence[:, -1].mean()
        return nn.functional.cross_entropy(
            evidence[:, :-1] / temperature, labels
        ) - denoising * own / (2 * images[0].numel())

    return loss


def translation_loss(inter: float = 0.2) -> Loss:
    """IDC's training loss: towards the true label, and away from the nearest wrong one while that is nearer.

    Formula     mean over images of d_c - inter [d_c > min_{k != c} d_k] min_{k != c} d_k,   d_k = mean |O_k - F(x_t)|
                at a random position t; d_c = mean |x0 - x0_hat| is the intra-class loss, all that is left for inter = 0
    Source      Mei et al. 2024 (IDC), with 0.2 in the released code; O_k of Proposition 1 is `Bridge.offsets`
    Shapes      images [B,C,H,W] in model space, labels [B] -> scalar
    """

    def loss(
        translator: Translator, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Tensor:
        bridge = translator.bridge
        targets = units.to_model(translator.labels)
        t = torch.randint(
            bridge.steps, (len(images),), generator=generator, device=generator.device
        )
        eps = torch.randn(images.shape, generator=generator, device=generator.device).to(images)
        x_t = bridge.forward(targets[labels], images, t, eps)
        predicted = x_t - translator(x_t, t)
        offsets = bridge.offsets(targets, targets[labels], images, t, eps)
        d = (offsets - predicted[:, None]).abs().flatten(2).mean(-1)
        right = nn.functional.one_hot(labels, len(targets)).bool()
        intra = d[right]
        nearest = d.masked_fill(right, torch.inf).amin(1)
        return (intra - inter * (intra > nearest) * nearest).mean()

    return loss


def moved(images: Tensor, most: int, generator: torch.Generator, edge: str = "constant") -> Tensor:
    """Each image moved by up to `most` pixels in both directions: a crop of the padded image.

    Shapes      images [B,C,H,W] -> the same; edge: what is where it left, "constant" (0: black, of pixels) or "reflect"
    Randomness  one move for each image, from `generator`; none is drawn for most = 0
    """
    if not most:
        return images
    count, channels, height, width = images.shape
    first = torch.randint(
        2 * most + 1, (2, count, 1), generator=generator, device=generator.device
    ).to(images.device)
    rows = first[0] + torch.arange(height, device=images.device)
    columns = first[1] + torch.arange(width, device=images.device)
    image = torch.arange(count, device=images.device)
    channel = torch.arange(channels, device=images.device)
    padded = nn.functional.pad(images, [most] * 4, mode=edge)
    return padded[
        image[:, None, None, None],
        channel[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None],
    ]


def classification_loss(crop: int = 0) -> Loss:
    """Cross-entropy of a deterministic classifier on moved images.

    Formula     mean over images of -log softmax(f(x'))_y, x' = x moved by up to `crop` pixels
    Shapes      images [B,C,H,W] in [0,1], labels [B] -> scalar
    """

    def loss(
        classifier: Classifier, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Tensor:
        return nn.functional.cross_entropy(classifier(moved(images, crop, generator)), labels)

    return loss
