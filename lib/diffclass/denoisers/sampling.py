"""Draw images from a denoiser: the deterministic probability-flow sampler of EDM."""

from collections.abc import Iterator

import torch
from torch import Tensor

from diffclass import noise, units
from diffclass.denoisers.base import Denoiser


def karras_levels(steps: int, low: float = 0.02, high: float = 80.0, rho: float = 7.0) -> Tensor:
    """EDM's falling noise levels, the last followed by zero.

    Formula     that of `noise.edm_sigmas`, then 0
    Shapes      -> [steps + 1]
    Errors      ValueError for fewer than 2 steps, or levels that do not fall
    """
    steps = units.check_whole(steps, "steps")
    low = units.check_real(low, "the lowest level")
    high = units.check_real(high, "the highest level")
    if steps < 2 or not 0 < low < high:
        raise ValueError(
            f"expected at least 2 steps between levels 0 < low < high, got {steps} from {high} to {low}."
        )
    levels = noise.edm_sigmas(steps, low, high, rho)
    return torch.cat([levels, levels.new_zeros(1)])


def heun(
    denoiser: Denoiser, labels: Tensor, levels: Tensor, generator: torch.Generator
) -> Iterator[Tensor]:
    """Walk one image a label from noise to data, yielding the denoised images of every step; the last are the samples.

    Formula     d = (x - D(x, s))/s;  x' = x + (s' - s) d;  corrected by (d + d')/2 while s' > 0
    Source      Karras et al. 2022, algorithm 1 without added noise
    Shapes      labels [B] (num_classes: no class), levels [T+1] falling to 0 -> yields [B,C,H,W] in model space
    Randomness  `generator` draws the first noise; the rest is deterministic
    """
    device = next(denoiser.parameters(), torch.zeros(())).device
    if labels is None:
        raise TypeError("expected a label for each image to draw, got None.")
    labels = denoiser.check_classes(labels)
    levels = units.check_numbers(levels, "levels")
    if levels.ndim != 1 or len(levels) < 2 or bool((levels.diff() >= 0).any()) or levels[-1] != 0:
        raise ValueError(
            f"expected two levels or more that fall to 0, got {levels.tolist()}; take `karras_levels`."
        )
    eps = torch.randn((len(labels), *denoiser.image_shape), generator=generator)
    x = eps.to(device) * float(levels[0])

    def denoised(x: Tensor, sigma: float) -> Tensor:
        out = torch.empty_like(x)
        with torch.no_grad():
            # one class at a time: a denoiser answers for all its images at once
            for label in labels.unique().tolist():
                rows = labels == label
                out[rows] = denoiser(x[rows], sigma, [label])[:, 0]
        return out

    for sigma, lower in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
        estimate = denoised(x, sigma)
        slope = (x - estimate) / sigma
        ahead = x + (lower - sigma) * slope
        if lower > 0:
            ahead = x + (lower - sigma) * (slope + (ahead - denoised(ahead, lower)) / lower) / 2
        x = ahead
        yield estimate if lower > 0 else x
