"""The three worlds and your own pictures."""

from diffclass.data.handwritten import (
    DIGITS_SHA256,
    DIGITS_TEST,
    ImageSet,
    digits,
)
from diffclass.data.plane import (
    LARGEST_TAIL,
    PLANE_LAWS,
    MixtureLaw,
    gaussians,
    imbalanced,
    mixtures,
    moons,
    overlapping,
    rings,
)

__all__ = [
    "DIGITS_SHA256",
    "DIGITS_TEST",
    "ImageSet",
    "LARGEST_TAIL",
    "MixtureLaw",
    "PLANE_LAWS",
    "digits",
    "gaussians",
    "imbalanced",
    "mixtures",
    "moons",
    "overlapping",
    "rings",
]
