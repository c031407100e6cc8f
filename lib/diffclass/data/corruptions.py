"""Pictures made worse without anybody's ill will: twelve corruptions of CIFAR-10-C, at five severities.

Of the other seven frost needs its pictures, motion and snow ImageMagick, spatter and elastic OpenCV; glass and fog are left out.
"""

import io
import math

import numpy as np
import torch
from scipy import ndimage
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
    "impulse": (0.01, 0.02, 0.03, 0.05, 0.07),  # share of the numbers that become black or white
    "speckle": (0.06, 0.1, 0.12, 0.16, 0.2),  # standard deviation of noise, in shares of the pixel
    # radius of a lens's disc and deviation of the blur that smooths its edge, pixel widths
    "defocus": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1)),
    "zoom": (
        1.06,
        1.11,
        1.16,
        1.21,
        1.26,
    ),  # below which pictures are enlarged, by steps of 0.01, and averaged
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),  # share of the pixels along each side that is left
    # what the saturation of HSV is multiplied by, and what is added to it
    "saturate": ((0.3, 0.0), (0.1, 0.0), (1.5, 0.0), (2.0, 0.1), (2.5, 0.2)),
}


def corrupted(images: Tensor, name: str, severity: int, generator: torch.Generator) -> Tensor:
    """The same pictures, corrupted.

    Source      Hendrycks & Dietterich 2019 (CIFAR-10-C); brightness is added here to each colour, not to HSV's value
    Shapes      images [N,C,H,W] in [0,1] -> the same
    Randomness  `generator` for noise, photons, impulses and speckles; the others are deterministic
    Errors      ValueError for another name or severity, or the saturation of pictures without colours
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
        "impulse": _impulse,
        "speckle": _speckle,
        "defocus": _defocus,
        "zoom": _zoom,
        "pixelate": _pixelate,
        "saturate": _saturate,
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


def _impulse(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    lot = torch.rand(x.shape, generator=generator)
    salted = torch.where(lot < share, 1.0, x)
    return torch.where(lot < share / 2, 0.0, salted)


def _speckle(x: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    return x * (1 + deviation * torch.randn(x.shape, generator=generator))


def _defocus(x: Tensor, lens: tuple[float, float], _) -> Tensor:
    radius, soft = lens
    reach = math.ceil(radius) + 1
    grid = torch.arange(-reach, reach + 1)
    disc = (grid[:, None] ** 2 + grid[None] ** 2 <= radius**2).to(x)
    edge = torch.exp(-((torch.arange(-1, 2) / soft) ** 2) / 2).to(x)
    smooth = (edge[:, None] * edge)[None, None] / edge.sum() ** 2
    kernel = conv2d(disc[None, None] / disc.sum(), smooth, padding=1)
    channels = x.shape[1]
    wide = pad(x, (reach,) * 4, mode="reflect")
    return conv2d(wide, kernel.expand(channels, 1, -1, -1), groups=channels)


def _zoom(x: Tensor, limit: float, _) -> Tensor:
    pictures = x.numpy()
    factors = np.arange(1, limit, 0.01)  # whose rounding decides how many there are
    larger = sum(_enlarged(pictures, factor) for factor in factors)
    return torch.from_numpy((pictures + larger) / (len(factors) + 1)).to(x)


def _enlarged(pictures: np.ndarray, factor: float) -> np.ndarray:
    """The middle of pictures, enlarged to their size. Shapes: [N,C,H,W] -> the same."""
    sides = pictures.shape[2:]
    for axis, side in zip((2, 3), sides, strict=True):
        inner = math.ceil(side / factor)
        pictures = pictures.take(range((side - inner) // 2, (side - inner) // 2 + inner), axis)
    larger = ndimage.zoom(pictures, (1, 1, factor, factor), order=1)
    for axis, side in zip((2, 3), sides, strict=True):
        first = (larger.shape[axis] - side) // 2
        larger = larger.take(range(first, first + side), axis)
    return larger


def _pixelate(x: Tensor, share: float, _) -> Tensor:
    from PIL import Image

    pictures = []
    for picture in (255 * x).round().byte().flatten(0, 1).numpy():
        height, width = picture.shape
        few = Image.fromarray(picture).resize((int(share * width), int(share * height)), Image.BOX)
        pictures.append(np.asarray(few.resize((width, height), Image.BOX)))
    return torch.from_numpy(np.stack(pictures)).reshape(x.shape).to(x) / 255


def _saturate(x: Tensor, change: tuple[float, float], _) -> Tensor:
    if x.shape[1] != 3:
        raise ValueError(
            f"expected pictures of three colours, whose saturation can change, got {x.shape[1]} channel(s)."
        )
    times, plus = change
    value = x.amax(1, keepdim=True)
    depth = (
        value - x
    )  # of each colour below the largest: in HSV it is proportional to the saturation
    before = depth.amax(1, keepdim=True) / value.clamp_min(1e-12)
    after = (times * before + plus).clamp(0, 1)
    grey = before == 0  # has no hue, which HSV calls red
    red = torch.tensor([0.0, 1.0, 1.0]).to(x)[None, :, None, None]
    depth = torch.where(grey, value * red, depth / before.clamp_min(1e-12))
    return value - after * depth
