"""Truth maximisation: a low-rank adapter raises the likelihood of attacked images under their true class."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from diffclass import units
from diffclass.classifiers.base import Classifier, Noise
from diffclass.denoisers.base import Denoiser
from diffclass.training.hardening import (
    Inner,
    adversarial_images,
    drawn_bank,
    drawn_evidence,
    drawn_start,
)
from diffclass.training.losses import Loss


@dataclass(frozen=True)
class Truth:
    """What the training of `truth_loss` is made of.

    inner        the attack on each batch; levels: noise levels a step, in [low, high]
    contrast     weight of the cross-entropy, by which the other classes are lowered; 0 is the paper's, which sees one class
    temperature  of the logits in the cross-entropy, in nats
    transferred  whether the images fool a plain network, as the paper's do, or the diffusion classifier itself
    """

    inner: Inner
    low: float
    high: float
    levels: int = 4
    contrast: float = 0.0
    temperature: float = 10.0
    transferred: bool = True


def truth_loss(
    truth: Truth,
    surrogate: Callable[[], Classifier] | None,
    encode: Callable[[Tensor], Tensor] = units.to_model,
) -> Loss:
    """Minus the ELBO of attacked images under their true class, and where it is asked for, that class against the others.

    Formula     mean of -ELBO_y(x') / D - contrast log softmax(ELBO(x') / temperature)_y, one noise for all classes;
                x' = argmax over |x' - x|_inf <= epsilon of the cross-entropy of the surrogate, or of the ELBOs under other noise
    Source      TMDC (2024), equation 8, with ELBO weights in place of equal ones; its loss never sees a wrong class
    Shapes      images [B,C,H,W] in model space, labels [B] -> scalar; surrogate: made when it is first asked, None where the
                images fool the classifier itself; encode: from pixels to the D numbers that the denoiser is asked about, of
                a text-to-image model its `autoencoder.encode`, through which an attack on the classifier itself then goes
    Errors      ValueError for no surrogate where one is to be fooled
    """
    if truth.transferred and surrogate is None:
        raise ValueError(
            "expected a surrogate for images that fool another network, got none; name one, or pass transferred=False."
        )
    made: list[Classifier] = []

    def draw(
        denoiser: Denoiser, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Noise:
        span = (truth.low, truth.high, truth.levels)
        asked = images.new_empty((len(images), *denoiser.image_shape))
        met = drawn_bank(asked, *span, generator)
        start = drawn_start(images, generator)
        return start, met, drawn_bank(asked, *span, generator)

    def value(denoiser: Denoiser, images: Tensor, labels: Tensor, drawn: Noise) -> Tensor:
        start, met, judging = drawn

        def evidence(x: Tensor, bank: Noise) -> Tensor:
            every = drawn_evidence(denoiser, encode(x), *bank)
            return every[:, : denoiser.num_classes]

        def climbed(x: Tensor) -> Tensor:
            if not truth.transferred:
                return evidence(x, met) / truth.temperature
            if not made:
                made.append(surrogate().to(images.device))
            return made[0](x)

        x = units.to_pixel(images)
        attacked = adversarial_images(climbed, x, labels, truth.inner, start)
        every = evidence(attacked, judging)
        loss = -every.gather(1, labels[:, None]).mean() / math.prod(denoiser.image_shape)
        if truth.contrast:
            loss = loss + truth.contrast * cross_entropy(every / truth.temperature, labels)
        return loss

    return Loss(draw, value, silent=not truth.transferred)
