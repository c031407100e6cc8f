"""An attack that asks for logits alone and follows no gradient, so that no masked one can stop it; written to be read."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from diffclass import units
from diffclass.attacks.losses import AttackLoss, margin_loss
from diffclass.attacks.search import AttackStep, expected_gradient, project, size_of
from diffclass.classifiers.base import Classifier, NoiseSource, decided

SHARE = 0.8  # of the image that the first squares cover
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10 000 steps: each halves the area
SMALLEST = 3  # side of a window under an L2 budget: a bump needs a middle


def square(
    classifier: Classifier,
    x: Tensor,
    y: Tensor,
    epsilon: float,
    *,
    noise: NoiseSource = (),
    norm: str = "linf",
    steps: int = 5000,
    loss: AttackLoss = margin_loss,
    draws: int = 1,
    generator: torch.Generator | None = None,
) -> Iterator[AttackStep]:
    """Random search by squares: one is proposed at every step, and kept for the images whose loss it raises.

    Formula     L-inf: a square in which every channel becomes x0 + epsilon or x0 - epsilon; at first stripes of them.
                L2: a bump up and down in one window, paid with what another window had; at first bumps everywhere
    Source      Andriushchenko et al. 2020 (Square), algorithms 1 to 3; its schedule of sizes, stretched to `steps`
    Shapes      x [B,C,H,W] in [0,1], y [B] -> yields `AttackStep`, the best image so far; steps + 1 calls an image
    Randomness  `generator` draws places and signs (that of seed 0 without one), the same ones for every image, so that
                an image's walk depends on no other. `noise` as in `pgd`; hold it, or the best is the luckiest
    Errors      ValueError for a budget or labels that cannot be meant, or a classifier in training mode;
                FloatingPointError for logits that are not finite
    """
    units.check_images(x, classifier.image_shape)
    units.check_labels(y, len(x), classifier.num_classes)
    classifier.check_mode()
    epsilon = units.check_budget(epsilon, norm, math.prod(x.shape[1:]))
    steps = units.check_whole(steps, "steps")
    if steps < 0:
        raise ValueError(f"expected steps >= 0, got {steps}.")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    best = _stripes(x, epsilon, generator) if norm == "linf" else _bumps(x, epsilon, generator)
    best_logits, best_value = _asked(classifier, best, y, noise, 0, loss, draws)
    for step in range(steps + 1):
        if step > 0:
            area = area_at(step - 1, steps) * x.shape[2] * x.shape[3]
            propose = _square if norm == "linf" else _moved
            tried = propose(best, x, epsilon, area, generator)
            logits, value = _asked(classifier, tried, y, noise, step, loss, draws)
            higher = value > best_value
            best = torch.where(higher[:, None, None, None], tried, best)
            best_logits = torch.where(higher[:, None], logits, best_logits)
            best_value = torch.where(higher, value, best_value)
        yield AttackStep(
            step, best, best_logits, decided(best_logits) != y, size_of(best - x, norm)
        )


def area_at(step: int, steps: int) -> float:
    """The share of the image that a square covers at a step. Formula: 0.8 / 2^(how many of `HALVINGS` have passed)."""
    now = int(10_000 * step / steps)
    return SHARE / 2 ** sum(now > halving for halving in HALVINGS)


def _asked(
    classifier: Classifier,
    x: Tensor,
    y: Tensor,
    noise: NoiseSource,
    step: int,
    loss: AttackLoss,
    draws: int,
) -> tuple[Tensor, Tensor]:
    """The logits of images and their loss, without a gradient. Shapes: -> [B,K], [B]."""
    _, logits, value = expected_gradient(
        classifier, x, y, noise=noise, step=step, loss=loss, draws=draws, differentiate=False
    )
    return logits, value


def _signs(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Plus or minus one at random, on the device of `like`."""
    return (2 * torch.randint(2, shape, generator=generator) - 1).to(like)


def _window(side: int, x0: Tensor, generator: torch.Generator) -> tuple[slice, slice]:
    """The rows and columns of a random square of that side."""
    top = int(torch.randint(x0.shape[2] - side + 1, (), generator=generator))
    left = int(torch.randint(x0.shape[3] - side + 1, (), generator=generator))
    return slice(top, top + side), slice(left, left + side)


# ---------------------------------------------------------------------------------------------------------------------
# L-inf: pixels at the corners of the budget


def _stripes(x0: Tensor, epsilon: float, generator: torch.Generator) -> Tensor:
    """The images with every column of every channel pushed up or down by the whole budget."""
    signs = _signs((x0.shape[1], 1, x0.shape[3]), x0, generator)
    return project(x0 + epsilon * signs, x0, epsilon, "linf")


def _square(
    best: Tensor, x0: Tensor, epsilon: float, area: float, generator: torch.Generator
) -> Tensor:
    """The images with one square pushed up or down, as far as the budget lets it."""
    side = min(max(round(math.sqrt(area)), 1), *x0.shape[2:])
    rows, columns = _window(side, x0, generator)
    push = torch.zeros_like(x0[0])
    push[:, rows, columns] = 2 * epsilon * _signs((x0.shape[1], 1, 1), x0, generator)
    return project(best + push, x0, epsilon, "linf")


# ---------------------------------------------------------------------------------------------------------------------
# L2: bumps of unit norm


def _hill(rows: int, columns: int) -> Tensor:
    """Concentric rectangles of unit norm. Formula: sum of 1/k^2 over the k > d, d the distance from the middle."""
    down = (torch.arange(rows) - rows // 2).abs()
    right = (torch.arange(columns) - columns // 2).abs()
    distance = torch.maximum(down[:, None], right[None, :])
    terms = 1 / torch.arange(1, int(distance.max()) + 2, dtype=torch.float64) ** 2
    hill = terms.flip(0).cumsum(0).flip(0)[distance]
    return hill / hill.norm()


def bump(side: int, generator: torch.Generator) -> Tensor:
    """A hill beside a valley, of unit norm, one above the other or side by side. Shapes: -> [side, side]."""
    half = side // 2
    parts = [-_hill(side - half, side)]
    if half:
        parts.insert(0, _hill(half, side))
    both = torch.cat(parts)
    both = both / both.norm()
    return both.T if bool(torch.randint(2, (), generator=generator)) else both


def _at_budget(delta: Tensor, x0: Tensor, epsilon: float) -> Tensor:
    """The images moved along `delta` by the whole budget, and brought back into [0,1]."""
    size = size_of(delta, "l2").clamp_min(1e-12)[:, None, None, None]
    return project(x0 + epsilon * delta / size, x0, epsilon, "l2")


def _bumps(x0: Tensor, epsilon: float, generator: torch.Generator) -> Tensor:
    """The images with small bumps side by side everywhere, five in a row and column."""
    height, width = x0.shape[2:]
    side = max(1, min(height, width) // 5)
    delta = torch.zeros_like(x0)
    for top in range(0, height, side):
        for left in range(0, width, side):
            place = delta[:, :, top : top + side, left : left + side]
            shape = bump(side, generator)[: place.shape[2], : place.shape[3]].to(x0)
            place += shape * _signs((x0.shape[1], 1, 1), x0, generator)
    return _at_budget(delta, x0, epsilon)


def _moved(
    best: Tensor, x0: Tensor, epsilon: float, area: float, generator: torch.Generator
) -> Tensor:
    """The images with a bump added in one window, in exchange for what was in another."""
    channels = x0.shape[1]
    side = min(max(round(math.sqrt(area)), SMALLEST) | 1, *x0.shape[2:])
    here = (..., *_window(side, x0, generator))
    there = (..., *_window(side, x0, generator))
    delta = best - x0
    unused = (epsilon**2 - size_of(delta, "l2") ** 2).clamp_min(0)[:, None, None, None]
    either = torch.zeros_like(x0, dtype=torch.bool)
    either[here] = True
    either[there] = True
    budget = (unused / channels + _squared(delta * either)).sqrt()
    old = delta[here] / _squared(delta[here]).sqrt().clamp_min(1e-12)
    new = old + bump(side, generator).to(x0) * _signs((channels, 1, 1), x0, generator)
    new = new / _squared(new).sqrt().clamp_min(1e-12)
    delta[there] = 0
    delta[here] = budget * new
    return _at_budget(delta, x0, epsilon)


def _squared(delta: Tensor) -> Tensor:
    """The squared norm in each channel. Shapes: [B,C,h,w] -> [B,C,1,1]."""
    return (delta**2).sum((2, 3), keepdim=True)
