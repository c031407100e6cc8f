"""Attacks that know the defence, and add to their loss what it would undo."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from diffclass import likelihood, units
from diffclass.attacks.losses import AttackLoss, margin_loss
from diffclass.attacks.search import AttackStep, pgd
from diffclass.classifiers.base import Classifier, NoiseSource
from diffclass.denoisers.base import Denoiser
from diffclass.noise import NoiseBank, log_levels

LEVELS = 3  # of the penalty, spread over the levels at which likelihood maximisation works


def unlikeliness(
    denoiser: Denoiser, bank: NoiseBank, strength: float
) -> Callable[[Tensor], Tensor]:
    """The penalty of the Lagrange attack: the unconditional loss that likelihood maximisation would lower.

    Formula     strength * mean_ts ||D(z + sigma_t eps_ts, sigma_t) - z||^2 / D, z = 2x - 1
    Source      Chen et al. 2024 (RDC): maximise loss(f(x), y) - c * diffusion loss, and there is nothing left to undo
    Shapes      -> a function of x [B,C,H,W] in [0,1] -> [B], for `attacks.pgd(..., penalty=...)`
    """
    strength = units.check_number(strength, "a strength")
    if not strength >= 0:
        raise ValueError(
            f"expected a strength >= 0, got {strength}; a negative one would seek unlikely images."
        )

    def penalty(x: Tensor) -> Tensor:
        units.check_images(x, denoiser.image_shape)
        errors = likelihood.diffusion_loss(
            denoiser, units.to_model(x), bank, [denoiser.num_classes]
        )
        return strength * errors.flatten(1).mean(1) / x[0].numel()

    return penalty


def prior_of(classifier: Classifier) -> tuple[Denoiser, tuple[float, float]]:
    """What a classifier maximises before it classifies: see `Classifier.prior`. Errors: ValueError if that is nothing."""
    prior = classifier.prior()
    if prior is None:
        raise ValueError(
            f"expected a classifier that maximises a likelihood first, such as rdc1 or lm-cnn, for the Lagrange attack, got "
            f"{type(classifier).__name__}, which has nothing to undo; use pgd."
        )
    return prior


def lagrange(
    classifier: Classifier,
    x: Tensor,
    y: Tensor,
    epsilon: float,
    *,
    noise: NoiseSource = (),
    norm: str = "linf",
    steps: int = 100,
    step_size: float | None = None,
    loss: AttackLoss = margin_loss,
    draws: int = 1,
    generator: torch.Generator | None = None,
    strength: float = 1.0,
) -> Iterator[AttackStep]:
    """PGD towards images that are misclassified and likely, so that likelihood maximisation leaves them as they are.

    Formula     maximise loss(f(x), y) - strength * sum_pixels ||D(z + sigma eps, sigma) - z||^2 / (2 sigma^2), averaged
                over levels of the band in which the classifier maximises the likelihood; a strength of 1 is one nat for
                one nat of that bound, sigma the band's geometric middle
    Source      Chen et al. 2024 (RDC), who name no strength
    Shapes      x [B,C,H,W] in [0,1], y [B] -> yields `AttackStep`
    Units       epsilon and step_size in pixels
    Randomness  that of `attacks.pgd`; the penalty has one noise, held for all images and steps
    Errors      those of `attacks.pgd`; ValueError for a classifier that maximises no likelihood
    """
    denoiser, (low, high) = prior_of(classifier)
    levels = log_levels(low, high, LEVELS)
    bank = NoiseBank.fixed(levels, classifier.image_shape, dtype=x.dtype)
    nats = x[0].numel() / (2 * low * high)
    return pgd(
        classifier,
        x,
        y,
        epsilon,
        noise=noise,
        norm=norm,
        steps=steps,
        step_size=step_size,
        loss=loss,
        draws=draws,
        penalty=unlikeliness(denoiser, bank, strength * nats),
        generator=generator,
    )
