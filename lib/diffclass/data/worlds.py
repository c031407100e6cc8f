"""The worlds that classifiers are asked about: their pictures, classes, budgets, and what may be done to them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffclass import data, units
from diffclass.data import cifar, corruptions, gallery
from diffclass.data.hundred import SHAPE, hundred
from diffclass.data.plane import PLANE_LAWS, MixtureLaw

DATA = {
    "digits": "scikit-learn digits, 1397 training images",
    "cifar10": "CIFAR-10, 50 000 training images",
}
# Of attacks, in pixels; of flows in pixel widths: RDC's bound, a twentieth of half the picture, so that a small picture
# is torn no more than a large one.
BUDGETS = {
    "digits": {"linf": 0.1, "l2": 1.0, "flow": 0.2},
    "cifar10": {"linf": 8 / 255, "l2": 0.5, "flow": 0.8},
    "plane": {"linf": 0.05, "l2": 0.05},
    "hundred": {"linf": 0.1, "l2": 1.0},
}
SHAPES = {"digits": (1, 8, 8), "cifar10": (3, 32, 32), "plane": (2, 1, 1), "hundred": SHAPE}
EXACT = (
    "plane",
    "hundred",
)  # whose laws are known: their denoiser is a closed form, nothing is trained
POINTS = 1000  # that are drawn of a law where no number is asked for


@dataclass(frozen=True)
class World:
    """Labelled pictures that a classifier can be asked about.

    kind        "digits", "cifar10", "plane" or "hundred": what decides shapes, classes and networks
    name        as it was asked for: the kind, "gallery" (generated photographs), "plane:moons", "digits:noise-3"
    law         of the plane and of the hundred classes: the law that points and pictures are drawn from
    corruption  what makes the pictures worse, and how severely, from 1 to 5
    """

    kind: str
    name: str
    law: MixtureLaw | None = None
    corruption: tuple[str, int] | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return SHAPES[self.kind]

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the classes are called."""
        if self.law is not None:
            return self.law.class_names
        return cifar.CIFAR10_CLASSES if self.kind == "cifar10" else tuple(map(str, range(10)))

    def budget(self, norm: str) -> float:
        """The budget that this world is attacked with. Units: pixels; of flows pixel widths.

        Errors      ValueError for another norm, or one that its images do not have
        """
        return units.chosen(norm, BUDGETS[self.kind], "the norm")

    def test(self, limit: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
        """The first test images and their labels; of a law, points drawn from `seed`.

        Shapes      -> [N,C,H,W] in [0,1], [N]
        Randomness  `seed` of points and of corruptions
        Errors      those of `cifar.cifar10` where it is missing
        """
        seed = units.check_whole(seed, "a seed", most=None)
        if limit is not None:
            limit = units.check_whole(limit, "a number of images", least=1)
        if self.law is not None:
            return self.law.sample(limit or POINTS, torch.Generator().manual_seed(seed))
        if self.name.startswith("gallery"):
            images, labels = (part[:limit] for part in gallery.pictures())
        elif self.kind == "cifar10":
            images, labels = cifar.cifar10("test", limit)
        else:
            images, labels = (part[:limit] for part in images_of("digits", "test"))
        if self.corruption is not None:
            generator = torch.Generator().manual_seed(seed)
            images = corruptions.corrupted(images, *self.corruption, generator)
        return images, labels


def world_of(name: str) -> World:
    """A world by its name: digits, cifar10, gallery, plane:LAW, hundred; digits and photographs also corrupted, as digits:blur-3.

    Errors      ValueError that lists what exists
    """
    kind, _, detail = name.partition(":") if isinstance(name, str) else (name, "", "")
    kind = units.chosen(kind, ("digits", "cifar10", "gallery", "plane", "hundred"), "the world")
    if kind == "plane":
        make = units.chosen(detail, PLANE_LAWS, "the law of the plane (as in plane:moons)")
        law = make()
        return World("plane", f"plane:{law.name}", law)
    if kind == "hundred":
        if detail:
            raise ValueError(
                f"expected the world 'hundred' alone, got {name!r}; only digits and photographs are corrupted."
            )
        return World("hundred", "hundred", hundred())
    corruption = _corruption(kind, detail) if detail else None
    return World(
        kind="digits" if kind == "digits" else "cifar10",
        name=f"{kind}:{detail}" if detail else kind,
        corruption=corruption,
    )


def kind_of(image_shape: Sequence[int]) -> str:
    """The kind of world whose pictures have this shape. Errors: ValueError for a shape that none has."""
    for kind, shape in SHAPES.items():
        if isinstance(image_shape, Sequence) and shape == tuple(image_shape):
            return kind
    raise ValueError(
        f"expected pictures of the shape of a world ({', '.join(map(str, SHAPES.values()))}), got {image_shape!r}; "
        "another network that could be attacked in place of this one is not known."
    )


def _corruption(kind: str, detail: str) -> tuple[str, int]:
    name, _, severity = detail.rpartition("-")
    if name not in corruptions.SEVERITIES or severity not in tuple("12345"):
        raise ValueError(
            f"expected the world {kind!r}, alone or with one of {', '.join(corruptions.SEVERITIES)} at a severity of 1 "
            f"to 5, as in {kind}:noise-3, got {f'{kind}:{detail}'!r}."
        )
    return name, int(severity)


def images_of(world: str, split: str) -> tuple[Tensor, Tensor]:
    """All images of a split of digits or CIFAR-10 in [0,1], and their labels.

    Errors      those of `cifar.cifar10` where it is missing
    """
    if world == "cifar10":
        return cifar.cifar10(split)
    digits = data.digits()
    if split == "train":
        return digits.train_images, digits.train_labels
    return digits.test_images, digits.test_labels
