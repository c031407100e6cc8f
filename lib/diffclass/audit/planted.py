"""An honest classifier of known robustness, and eight that only look robust, each after a bug that was published.

All stand on one linear classifier, so that what is robust is known in closed form and every difference is the bug.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from diffclass.audit.base import Case
from diffclass.certify.anytime import StopRule
from diffclass.certify.certificates import Certificate, Votes, smoothing_radius
from diffclass.certify.counting import draw_votes
from diffclass.classifiers.base import Classifier, Noise
from diffclass.classifiers.smoothed import Smoothed

SHAPE = (1, 8, 8)
CLASSES = 4
STRONG = 0.2  # how far the classes' pixels lie from grey, and the noise around that
WEAK = 0.03
SPREAD = 0.1
EPSILON = 0.16  # L-inf budget in pixels: above WEAK, so that weak pixels can be turned around, and below STRONG
VOTE_NOISE = 0.12  # smoothing noise in pixels, of which nearly all votes agree
HADAMARD = torch.tensor(
    [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float32
)
STATEMENT = (
    "A budget above 0.2 turns the strong pixels around and breaks it; gradient attacks reach the closed form, "
    "black boxes do not pass it."
)


def means() -> Tensor:
    """Class means less 1/2: Hadamard signs, strong in the upper two rows, weak below. Shapes: -> [4,1,8,8]."""
    signs = HADAMARD.repeat(1, 16).reshape(CLASSES, *SHAPE)
    size = torch.full(SHAPE, WEAK)
    size[:, :2] = STRONG
    return signs * size


def images(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gaussian images around their class means. Formula: x = clamp(1/2 + mean_y + 0.1 eps, 0, 1). Shapes: [n,1,8,8]."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (count,), generator=generator)
    eps = torch.randn((count, *SHAPE), generator=generator)
    return (0.5 + means()[y] + SPREAD * eps).clamp(0, 1), y


class Honest(Classifier):
    """The linear classifier that adversarial training of infinitely many images leads to, in closed form.

    Formula     f = scale (W x + b),  w_k = sign(mean_k) max(|mean_k| - epsilon, 0);  b makes every f >= 0 on [0,1]
    Source      Javanmard & Soltanolkotabi 2022: of Gaussian classes it keeps only pixels that the budget cannot turn
                around, with the budget taken off
    Shapes      x [B,1,8,8] in [0,1] -> [B,4]
    Randomness  none
    """

    scale = "scores"
    calls = 1
    num_classes = CLASSES
    image_shape = SHAPE

    def __init__(self):
        super().__init__()
        rows = means().flatten(1)
        self._weigh(10 * rows.sign() * (rows.abs() - EPSILON).clamp_min(0))

    def _weigh(self, weight: Tensor) -> None:
        self.register_buffer("weight", weight)
        self.register_buffer("bias", weight.clamp(max=0).abs().sum(1))

    def linear(self, x: Tensor) -> Tensor:
        """The linear function that every fault is planted on. Shapes: [B,1,8,8] -> [B,4]."""
        return x.flatten(1) @ self.weight.T + self.bias

    def logits(self, x: Tensor, noise: Noise) -> Tensor:
        """See `Classifier.logits`."""
        return self.linear(x)

    def survives(self, x: Tensor, y: Tensor, epsilon: float) -> Tensor:
        """Which images no L-inf perturbation within epsilon and [0,1] can change: the exact robust accuracy.

        Formula     f_y - f_k > sum_i max over the pixel's reach of (w_k - w_y)_i delta_i, for every k != y
        Shapes      -> [n]
        Meaning     of the linear function, which is the mean over all draws where a fault draws noise
        """
        up = ((x + epsilon).clamp(0, 1) - x).flatten(1)
        down = ((x - epsilon).clamp(0, 1) - x).flatten(1)
        push = self.weight - self.weight[y][:, None]  # [n,K,D]
        gain = (push * torch.where(push > 0, up[:, None], down[:, None])).sum(2)
        linear = self.linear(x)
        ahead = linear.gather(1, y[:, None]) - linear - gain
        return ahead.scatter(1, y[:, None], torch.inf).amin(1) > 0


class TwoFaced(Honest):
    """Answers one function, and differentiates another wherever gradients are wanted.

    Imitates    released diffusion classifiers whose forward takes another path under `requires_grad`, with other
                noise levels or its own autograd function: attacks climb what never predicts
    """

    def logits(self, x: Tensor, noise: Noise) -> Tensor:
        """See `Classifier.logits`; two functions."""
        if torch.is_grad_enabled() and x.requires_grad:
            return self.linear(x.flip(-1))
        return self.linear(x)


class Saturated(Honest):
    """Logits ten thousand times too large: cross-entropy is exactly 0, and so is its gradient.

    Imitates    defensive distillation (Papernot et al. 2016), broken by Carlini & Wagner 2016: trained at a high
                temperature and asked at 1; sums of losses over thousands of pixels do the same
    """

    def logits(self, x: Tensor, noise: Noise) -> Tensor:
        """See `Classifier.logits`."""
        return 1e4 * self.linear(x)


class Negative(Honest):
    """Logits below zero, as log-likelihoods are: margins that mask by a product with 0 see only the zeros.

    Imitates    log-posteriors handed to CW of torchattacks, whose objective is then constant (its issue 184)
    """

    def logits(self, x: Tensor, noise: Noise) -> Tensor:
        """See `Classifier.logits`."""
        return self.linear(x) - 1000


class Reseeded(Honest):
    """Declares noise, and draws from one seed at every call: averaging over draws averages one draw.

    Imitates    IDC's released `forward`, which begins with torch.manual_seed(0)
    Randomness  `sample_noise`, which is not used
    """

    def sample_noise(self, images: int, generator: torch.Generator) -> Tensor:
        """See `Classifier.sample_noise`. Shapes: -> [images,1,8,8]."""
        return torch.randn((images, *SHAPE), generator=generator)

    def logits(self, x: Tensor, noise: Noise) -> Tensor:
        """See `Classifier.logits`; by noise of its own."""
        eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
        return self.linear(x + 0.05 * eps)


class Quantised(Honest):
    """Rounds its input, so that the gradient is zero wherever there is one.

    Imitates    input transformations and thermometer encoding (Buckman et al. 2018), broken by Athalye et al. 2018
                with the gradient of the identity in place of the rounding
    """

    def logits(self, x: Tensor, noise: Noise) -> Tensor:
        """See `Classifier.logits`."""
        return self.linear((31 * x).round() / 31)


class Noisy(Honest):
    """The undefended classifier behind large random slopes: attacks that average no draws climb the noise.

    Formula     f + strength <slope, x - 1/2>,  slope ~ N(0, 1) for every class and pixel
    Imitates    robustness by randomness alone, as of purifiers attacked with one draw (Lee & Kim 2023; Liu et al. 2025)
    Randomness  `sample_noise`: the slopes
    """

    def __init__(self, strength: float = 2.0):
        super().__init__()
        self.strength = strength
        self._weigh(12 * means().flatten(1))

    def sample_noise(self, images: int, generator: torch.Generator) -> Tensor:
        """See `Classifier.sample_noise`. Shapes: -> [images,4,64]."""
        return torch.randn((images, CLASSES, self.weight.shape[1]), generator=generator)

    def logits(self, x: Tensor, noise: Noise) -> Tensor:
        """See `Classifier.logits`."""
        tilt = (noise * (x.flatten(1) - 0.5)[:, None]).sum(2)
        return self.linear(x) + self.strength * tilt


def inflated(votes: Votes, alpha: float = 0.001, factor: int = 10) -> Certificate:
    """A certificate of `factor` times the votes that were cast.

    Imitates    released certification code that counts a batch of repeated votes as new ones: n_A x 10, and a true
                failure rate of 16 % where alpha = 0.1 % is claimed
    """
    more = replace(votes, estimation=tuple(factor * count for count in votes.estimation))
    return smoothing_radius(more, alpha)


def peeked(votes: Votes, alpha: float = 0.001) -> Certificate:
    """A certificate by the exact bound of a fixed n, of votes that were counted until they sufficed.

    Imitates    whoever reads Clopper and Pearson's bound after every batch and stops where it is high enough: each look
                spends its alpha again, six times as much after 25 of them
    """
    return smoothing_radius(replace(votes, stopped=False), alpha)


FAULTS: dict[str, tuple[Callable[[], Classifier], tuple[int, ...]]] = {
    "honest": (Honest, ()),
    "two-faced": (TwoFaced, (1, 2)),
    "saturated": (Saturated, (4, 15)),
    "negative": (Negative, (4, 15)),
    "reseeded": (Reseeded, (5, 19)),
    "quantised": (Quantised, (3, 7, 13)),
    "noisy": (Noisy, (18, 19, 20)),
    "inflated": (Honest, (27, 28, 31)),
    "peeked": (Honest, (27, 31)),
}  # name -> what makes the classifier, and the numbers of the checks that name its fault


def case(name: str, count: int = 64, seed: int = 0) -> Case:
    """One of `FAULTS` with its images, attacked as its author would.

    Shapes      `count` images; votes of a smoothed classifier come with the honest, the inflated and the peeked one
    Errors      KeyError for a name that is not in FAULTS
    """
    classifier = FAULTS[name][0]().eval()
    x, y = images(count, seed)
    claim = Case(
        classifier,
        x,
        y,
        EPSILON,
        held=classifier.deterministic,
        statement=STATEMENT,
        closer=16,
        seed=seed,
    )
    makers = {"honest": smoothing_radius, "inflated": inflated, "peeked": peeked}
    if name not in makers:
        return claim
    smoothed = Smoothed(classifier, VOTE_NOISE)
    rule = StopRule(VOTE_NOISE, (VOTE_NOISE,), 0.001, 1000) if name == "peeked" else None
    votes = []
    for picture, one in enumerate(x[:8].split(1)):
        *_, (_, counted) = draw_votes(smoothed, one, seed=seed, picture=picture, rule=rule)
        votes.append(counted)
    return replace(claim, votes=votes, certify=makers[name])
