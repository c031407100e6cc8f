"""Adversarial training of a diffusion classifier: the denoiser learns on the images that fool its own ELBO."""

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from diffclass import intervals, units
from diffclass.classifiers.bayes import BayesClassifier
from diffclass.denoisers.base import Denoiser
from diffclass.noise import Levels, NoiseBank
from diffclass.training.baselines import CARD_STEPS, Inner, Loss, adversarial_images, survivors

ATTACKED = 100  # test images behind the accuracy under attack of a model card


@dataclass(frozen=True)
class Hardening:
    """What the training of `hardening_loss` is made of.

    inner        the attack on each batch; levels: noise levels a step, in [low, high]
    temperature  of the logits in the cross-entropy, in nats: at 1 the margins of an ELBO leave it flat
    denoising    weight of the clean images' own loss, by which the network stays a diffusion model
    """

    inner: Inner
    low: float
    high: float
    levels: int = 4
    temperature: float = 10.0
    denoising: float = 0.5


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

    Formula     mean of -log softmax(ELBO(x') / temperature)_y + denoising * w . loss_y(x) / D,
                x' = argmax over |x' - x|_inf <= epsilon of the same cross-entropy, under other noise
    Source      Madry et al. 2018 for the maximisation; the classifier is `BayesClassifier` with levels drawn anew
    Shapes      images [B,C,H,W] in model space, labels [B] -> scalar
    """

    def drawn(denoiser: Denoiser, images: int, generator: torch.Generator) -> BayesClassifier:
        levels = drawn_levels(hardening.low, hardening.high, hardening.levels, generator)
        bank = NoiseBank.fresh(levels, denoiser.image_shape, images, generator)
        return BayesClassifier(denoiser, bank, temperature=hardening.temperature)

    def loss(
        denoiser: Denoiser, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Tensor:
        x = units.to_pixel(images)
        attacked = adversarial_images(
            drawn(denoiser, len(x), generator), x, labels, hardening.inner, generator
        )
        judge = drawn(denoiser, len(x), generator)
        own = judge.losses(x)[torch.arange(len(x), device=x.device), labels] * judge.weighting(
            judge.bank.levels
        )
        return (
            cross_entropy(judge(attacked), labels)
            + hardening.denoising * own.sum(-1).mean() / x[0].numel()
        )

    return loss


def under_attack(hardening: Hardening, classifier: BayesClassifier, x: Tensor, y: Tensor) -> dict:
    """What a card says of a hardened network: how it was hardened, and how many images survive a short attack.

    Shapes      x [N,C,H,W] in [0,1], y [N], of which the first 100 are attacked
    """
    x = x[:ATTACKED]
    y = y[:ATTACKED]
    epsilon = hardening.inner.epsilon
    count = survivors(classifier, x, y, epsilon, CARD_STEPS, batch=50)
    low, high = intervals.interval(count, len(y))
    return dict(
        hardening=asdict(hardening),
        accuracy_under_attack=dict(
            correct=count,
            n=len(y),
            low=low,
            high=high,
            attack=f"PGD-{CARD_STEPS}",
            loss="margin",
            norm="linf",
            epsilon=epsilon,
            bound="upper bound of the robust accuracy",
        ),
    )
