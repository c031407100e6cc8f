"""Pictures made worse without anybody's ill will: a handful of the corruptions of CIFAR-10-C, at five severities."""

import io

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from diffclass import units

SEVERITIES = {  # the parameter of each at severity 1 to 5, as CIFAR-10-C has it
    "noise": (0.04, 0.06, 0.08, 0.09, 0.10),  # standard deviation of Gaussian noise, pixels
    "shot": (500, 250, 100, 75, 50),  # photons of a white pixel
    "blur": (0.4, 0.6, 0.7, 0.8, 1.0),  # standard deviation of a Gaussian kernel, pixel widths
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),  # share of the contrast that is left
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),  # what is added to every pixel
    "jpeg": (80, 65, 58, 50, 40),  # quality
}


def corrupted(images: Tensor, name: str, severity: int, generator: torch.Generator) -> Tensor:
    """The same pictures, corrupted.

    Source      Hendrycks & Dietterich 2019 (CIFAR-10-C); brightness is added here to each colour, not to HSV's value
    Shapes      images [N,C,H,W] in [0,1] -> the same
    Randomness  `generator` for noise and photons; the others are deterministic
    Errors      ValueError for another name or severity
    """
    units.check_images(images)
    known = isinstance(name, str) and name in SEVERITIES
    if not known or not isinstance(severity, (int, float)) or severity not in range(1, 6):
        raise ValueError(
            f"expected one of {', '.join(SEVERITIES)} at a severity of 1 to 5, got {name!r} at "
            f"{severity!r}."
        )
    strength = SEVERITIES[name][int(severity) - 1]
    return {
        "noise": _noise,
        "shot": _shot,
        "blur": _blur,
        "contrast": _contrast,
        "brightness": _brightness,
        "jpeg": _jpeg,
    }[name](images, strength, generator).clamp(0, 1)


def _noise(x: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    return x + deviation * torch.randn(x.shape, generator=generator)


def _shot(x: Tensor, photons: int, generator: torch.Generator) -> Tensor:
    return torch.poisson(x * photons, generator=generator) / photons


def _blur(x: Tensor, deviation: float, _) -> Tensor:
    reach = int(4 * deviation + 0.5)
    kernel = torch.exp(-((torch.arange(-reach, reach + 1) / deviation) ** 2) / 2)
    kernel = (kernel / kernel.sum()).to(x)
    channels = x.shape[1]
    for shape, edges in (
        ((1, 1, -1, 1), (0, 0, reach, reach)),
        ((1, 1, 1, -1), (reach, reach, 0, 0)),
    ):
        x = conv2d(
            pad(x, edges, mode="replicate"),
            kernel.reshape(shape).expand(channels, -1, -1, -1),
            groups=channels,
        )
    return x


def _contrast(x: Tensor, share: float, _) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return mean + share * (x - mean)


def _brightness(x: Tensor, more: float, _) -> Tensor:
    return x + more


def _jpeg(x: Tensor, quality: int, _) -> Tensor:
    from PIL import Image

    pictures = []
    for picture in (255 * x).round().byte().permute(0, 2, 3, 1).numpy():
        with io.BytesIO() as file:
            Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture).save(
                file, "JPEG", quality=quality
            )
            pictures.append(np.asarray(Image.open(file)).reshape(picture.shape))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).to(x) / 255
