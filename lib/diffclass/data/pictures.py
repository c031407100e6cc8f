"""Your own picture: a photograph or drawing as an image of a world, and how far it is from that world's data."""

import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffclass import units

FAR_PERCENTILE = 99.0
MAX_REFERENCES = (
    1000  # training images whose own nearest neighbour is looked up: enough to place a percentile
)


# ---------------------------------------------------------------------------------------------------------------------
# From a file to an image


def load_picture(
    path: str | Path | bytes, image_shape: tuple[int, int, int], invert: bool | str = "auto"
) -> Tensor:
    """A PNG, JPEG or WebP file, or what is in one, as one image: turned upright, over white, cropped to the middle,
    resized, in [0,1].

    With one channel (digits are bright ink on black) "auto" inverts a picture whose border is brighter than its mean:
    dark ink on paper. With three channels "auto" leaves the colours alone.

    Shapes      image_shape (C,H,W) with C 1 or 3  ->  [1,C,H,W] float32
    Errors      FileNotFoundError; ValueError for what is no picture, is damaged or has too many pixels
    """
    from PIL import Image, ImageOps

    channels, height, width = units.check_image_shape(image_shape)
    if channels not in (1, 3):
        raise ValueError(
            f"expected an image shape with 1 or 3 channels, got {tuple(image_shape)}; points of the plane "
            "are no pictures."
        )
    if not isinstance(invert, bool) and invert != "auto":
        raise ValueError(f"expected invert True, False or 'auto', got {invert!r}.")
    name, content = _content(path)
    image = ImageOps.exif_transpose(_decoded(content, name))
    image = _over_white(image, _bits(content)).convert("L" if channels == 1 else "RGB")
    # Digits were made by counting ink in blocks, and a wider kernel would smear it; photographs deserve the wider one.
    kernel = Image.Resampling.BOX if channels == 1 else Image.Resampling.LANCZOS
    image = ImageOps.fit(image, (width, height), method=kernel)
    pixels = np.asarray(image, dtype=np.float32).reshape(height, width, channels) / 255
    if invert is True or (invert == "auto" and channels == 1 and is_dark_ink(pixels[:, :, 0])):
        pixels = 1 - pixels
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()


def is_dark_ink(pixels: np.ndarray) -> bool:
    """Whether a grey picture [H,W] is dark ink on light ground: the median of its border is brighter than its mean."""
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or not pixels.size:
        got = list(pixels.shape) if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise ValueError(f"expected a grey picture as an array [H,W], got {got}.")
    units.check_numbers(pixels, "pixels")
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    return bool(np.median(border) > pixels.mean())


def _content(path: str | Path | bytes) -> tuple[str, bytes]:
    """What the picture is called, and what is in its file."""
    if isinstance(path, bytes):
        return "the picture", path
    if not isinstance(path, (str, Path)) or "\0" in str(path):
        raise ValueError(f"expected the path of a picture, got {path!r}.")
    path = Path(path).expanduser()
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise FileNotFoundError(
            f"expected a PNG, JPEG or WebP picture at {path}, found {what}; check the name."
        )
    return path.name, path.read_bytes()


def _decoded(content: bytes, name: str):
    """The decoded picture, or one sentence on why there is none."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=["PNG", "JPEG", "WEBP"])
        image.load()
    except UnidentifiedImageError as reason:
        raise ValueError(
            f"expected a PNG, JPEG or WebP picture, got {name} ({len(content)} bytes), which "
            "is none of them or is damaged from the start; save it again as PNG."
        ) from reason
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as reason:
        raise ValueError(
            f"expected a picture of at most {Image.MAX_IMAGE_PIXELS} pixels, got {name} with more; "
            "make it smaller first."
        ) from reason
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
    ) as reason:  # Pillow's ways to say that a file is broken
        raise ValueError(
            f"expected a whole picture, got {name} ({len(content)} bytes), damaged or "
            f"cut short ({reason}); copy it again."
        ) from reason
    return image


def _bits(content: bytes) -> int:
    """How many bits a sample of a PNG has, which is what the value that it declares transparent is counted in; else 8."""
    head = content[:25]
    return head[24] if head.startswith(b"\x89PNG") and head[12:16] == b"IHDR" else 8


def _over_white(image, bits: int):
    """The picture without transparency, and with at most 8 bits a channel.

    Why bits    a PNG may declare one value transparent, in its own bits, whereas Pillow gives samples of 8 bits (grey of
                16 bits as it is): compared as they are, the value is missed and stays black
    """
    from PIL import Image

    clear = image.info.get("transparency")
    if image.mode.startswith("I"):  # 16-bit grey; a plain conversion would clip it to white
        samples = np.asarray(image).astype(np.float64)
        grey = (samples / 257).round().clip(0, 255)
        if clear is not None:
            grey[samples == clear] = 255
        return Image.fromarray(grey.astype(np.uint8))
    if not image.has_transparency_data:
        return image
    if image.mode == "L" and bits < 8 and clear is not None:
        image.info["transparency"] = clear * 255 // (2**bits - 1)
    if image.mode == "RGB" and bits == 16 and clear is not None:
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


# ---------------------------------------------------------------------------------------------------------------------
# How familiar it is


@dataclass(frozen=True)
class Familiarity:
    """How far a picture is from its nearest training image, among the distances that training images have themselves.

    Units       distance: L2, pixels in [0,1]; percentile: 0..100; far: percentile > 99
    """

    distance: float
    percentile: float
    far: bool
    sentence: str


def distance_report(picture: Tensor, train_images: Tensor) -> Familiarity:
    """Whether a picture resembles the training images at all: a classifier answers for any input, this warns.

    Formula     distance = min_i |picture - x_i|;  percentile = share of training images j with min_{i != j} |x_j - x_i|
                below it (at most 1000 of them, evenly spaced)
    Shapes      picture [1,C,H,W], train_images [N,C,H,W] with N >= 2, all in [0,1]
    Errors      TypeError, ValueError as `units.check_images`; ValueError for fewer than 2 training images
    """
    units.check_images(train_images)
    units.check_images(picture, tuple(train_images.shape[1:]))
    flat = train_images.flatten(1)
    if len(picture) != 1 or len(flat) < 2:
        raise ValueError(
            f"expected 1 picture and 2 or more training images, got {len(picture)} and {len(flat)}."
        )
    distance = float(torch.linalg.vector_norm(flat - picture.flatten(1).to(flat), dim=1).min())
    count = min(len(flat), MAX_REFERENCES)
    own = _neighbour_distances(flat, torch.arange(count) * len(flat) // count)
    percentile = 100 * float((own < distance).double().mean())
    far = percentile > FAR_PERCENTILE
    verdict = (
        "it is unlike the training data, so its scores mean little"
        if far
        else "distances like this occur among the training images themselves"
    )
    return Familiarity(
        distance,
        percentile,
        far,
        f"The nearest training image is {distance:.2f} away (L2, pixels in [0,1]), farther than "
        f"{percentile:.1f} % of training images are from their own nearest neighbour: {verdict}.",
    )


def _neighbour_distances(flat: Tensor, chosen: Tensor, chunk: int = 250) -> Tensor:
    """For each chosen row of flat [N,D], the distance to the nearest other row. The fast product form finds the
    neighbour; its distance is then taken exactly, because the product form cannot tell small distances from zero."""
    parts = []
    for rows in chosen.split(chunk):
        distances = torch.cdist(flat[rows], flat, compute_mode="use_mm_for_euclid_dist")
        distances[torch.arange(len(rows)), rows] = torch.inf
        parts.append(torch.linalg.vector_norm(flat[rows] - flat[distances.argmin(1)], dim=1))
    return torch.cat(parts)
