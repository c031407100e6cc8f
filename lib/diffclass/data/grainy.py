"""Faint digits in heavy grain, whose law is known: pictures of which a perfect text-to-image model can be written down.

A random network shows how a model is asked, not what its answers are worth. Here a prompt names a class, or a class and a
stroke, the model of its pictures is exact, and the pictures are hard: Bayes' rule itself names six of seven.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from diffclass import units
from diffclass.data.handwritten import digits
from diffclass.data.plane import MixtureLaw
from diffclass.denoisers.exact import MixtureDenoiser
from diffclass.denoisers.latent import Autoencoder, Haar, LatentModel

CONTRAST = 0.14  # of the digits, as a share of the range of model space
GRAIN = 0.14  # its standard deviation in a pixel, in model units; six of them fit between a digit and the edge
LATENTS = (4, 4, 4)

# Which digits of its class a prompt describes: all, the half with more or less ink than its median, or all of them mirrored.
TEMPLATES = (
    "a photo of a {}.",
    "a photo of a bold {}.",
    "a photo of a thin {}.",
    "a mirror image of a {}.",
)
PLAIN, BOLD, THIN, MIRRORED = TEMPLATES


@functools.cache
def grainy() -> MixtureLaw:
    """Ten classes, each its training digits, faint, with grain.

    Formula     x0 = 0.14 (2 digit - 1) + 0.14 n,  the digit uniform over the training digits of the class, n ~ N(0, I)
    Shapes      (1,8,8), K = 10, M = 1397
    """
    world = digits()
    labels = world.train_labels
    means = CONTRAST * units.to_model(world.train_images).flatten(1).double()
    counts = torch.bincount(labels).double()
    return MixtureLaw(
        name="grainy",
        means=means,
        scales=torch.full((len(labels),), GRAIN),
        weights=(1 / counts)[labels],
        labels=labels,
        priors=torch.full((len(counts),), 1 / len(counts), dtype=torch.float64),
        image_shape=world.image_shape,
    )


def described(template: str) -> MixtureLaw:
    """The law of the pictures that a template describes, class by class.

    Shapes      one of `TEMPLATES` -> a law of the same ten classes
    Errors      those of `units.chosen`
    """
    template = units.chosen(template, TEMPLATES, "the template")
    law = grainy()
    if template == PLAIN:
        return law
    if template == MIRRORED:
        return replace(law, means=law.means.unflatten(1, law.image_shape).flip(-1).flatten(1))
    ink = law.means.sum(1)
    kept = torch.zeros_like(ink, dtype=torch.bool)
    for k in range(law.num_classes):
        own = law.labels == k
        bold = ink > ink[own].median()
        kept |= own & (bold if template == BOLD else ~bold)
    labels = law.labels[kept]
    weights = (1 / torch.bincount(labels).double())[labels]
    return replace(
        law, means=law.means[kept], scales=law.scales[kept], weights=weights, labels=labels
    )


def latent_scale() -> float:
    """What latents are multiplied by so that their variance is 1 on average, as Stable Diffusion's scaling factor does."""
    law = grainy()
    return 1 / math.sqrt(float(law.means.var(0).mean()) + GRAIN**2)


def model(templates: Sequence[str] = (PLAIN,)) -> LatentModel:
    """A perfect text-to-image model of these pictures: latents, prompts and all.

    Formula     latents z = scale H (2x - 1) of orthonormal H, so that p(z | prompt) is the mixture of the turned and scaled
                means, whose denoiser is `MixtureDenoiser`
    Shapes      templates, P of `TEMPLATES` -> pictures (1,8,8), latents (4,4,4), ten classes of P prompts
    Errors      TypeError, ValueError for no templates, or others
    """
    if isinstance(templates, str) or not isinstance(templates, Sequence) or not len(templates):
        raise TypeError(
            f"expected templates as a list of texts, got {templates!r:.60}; take some of grainy.TEMPLATES."
        )
    laws = [described(template) for template in templates]
    scale = latent_scale()
    autoencoder = Autoencoder(Haar(scaling_factor=scale), LATENTS)
    means = torch.cat([law.means for law in laws]).unflatten(1, laws[0].image_shape)
    prompts = torch.cat([len(laws) * law.labels + place for place, law in enumerate(laws)])
    denoiser = MixtureDenoiser(
        autoencoder.encode(units.to_pixel(means)),
        scale * torch.cat([law.scales for law in laws]),
        torch.cat([law.weights for law in laws]),
        prompts,
    )
    names = digits().class_names
    return LatentModel(denoiser, autoencoder, names, len(laws)).eval().requires_grad_(False)
