"""Draw images from a denoiser: the deterministic probability-flow sampler of EDM."""

from collections.abc import Iterator

import torch
from torch import Tensor

from diffclass.denoisers.base import Denoiser


def karras_levels(steps: int, low: float = 0.02, high: float = 80.0, rho: float = 7.0) -> Tensor:
    """EDM's falling noise levels, the last followed by zero.

    Formula     sigma_i = (high^(1/rho) + i/(steps-1) (low^(1/rho) - high^(1/rho)))^rho
    Source      Karras et al. 2022, equation 5
    Shapes      -> [steps + 1]
    """
    if steps < 2 or not 0 < low < high:
        raise ValueError(
            f"expected at least 2 steps between levels 0 < low < high, got {steps} from {high} to {low}."
        )
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    levels = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64)])


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
    denoiser.check_classes(labels)
    x = torch.randn((len(labels), *denoiser.image_shape), generator=generator).to(device) * float(
        levels[0]
    )

    def denoised(x: Tensor, sigma: float) -> Tensor:
        out = torch.empty_like(x)
        with torch.no_grad():
            for label in (
                labels.unique().tolist()
            ):  # one class at a time: a denoiser answers for all its images at once
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
