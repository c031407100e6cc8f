"""The labelled pictures of every world by name."""

import torch
from torch import Tensor

from diffclass import data
from diffclass.data import cifar, corruptions, gallery

DATA = {
    "digits": "scikit-learn digits, 1397 training images",
    "cifar10": "CIFAR-10, 50 000 training images",
}


def images_of(world: str, split: str) -> tuple[Tensor, Tensor]:
    """All images of a split in [0,1], and their labels. Errors: those of `cifar.cifar10` where it is missing."""
    if world == "cifar10":
        return cifar.cifar10(split)
    digits = data.digits()
    return (
        (digits.train_images, digits.train_labels)
        if split == "train"
        else (digits.test_images, digits.test_labels)
    )


def test_pictures(
    kind: str, corruption: str, limit: int | None, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first test pictures of a world and their labels, corrupted if that is asked for, as in "noise-3"."""
    if kind == "digits":
        digits = data.digits()
        images = digits.test_images[:limit]
        labels = digits.test_labels[:limit]
    else:
        images, labels = (
            cifar.cifar10("test", limit)
            if kind == "cifar10"
            else (p[:limit] for p in gallery.pictures())
        )
    if corruption:
        name, _, severity = corruption.rpartition("-")
        if name not in corruptions.SEVERITIES or severity not in tuple("12345"):
            raise ValueError(
                f"expected the world {kind!r}, alone or with one of {', '.join(corruptions.SEVERITIES)} "
                f"at a severity of 1 to 5, as in {kind}:noise-3, got {f'{kind}:{corruption}'!r}."
            )
        images = corruptions.corrupted(
            images, name, int(severity), torch.Generator().manual_seed(seed)
        )
    return images, labels
