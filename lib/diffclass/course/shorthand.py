"""What many pages write: a seeded generator, a count with its interval, and the photographs at hand."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from diffclass import intervals, units
from diffclass.data import cifar, gallery, pictures

PHOTO_SHAPE = (3, 32, 32)


def seeded(seed: int) -> torch.Generator:
    """A generator of its own: the only source of randomness that a page uses."""
    return torch.Generator().manual_seed(seed)


def share(hits: Tensor) -> str:
    """How many of a row of booleans are true, as a count and a share with its 95 % Clopper-Pearson interval."""
    count = int(hits.sum())
    low, high = intervals.interval(count, len(hits))
    return f"{count}/{len(hits)} = {count / len(hits):.2f} [{low:.2f}, {high:.2f}]"


def photographs(
    count: int, own: Mapping[str | Path, str] | None = None
) -> tuple[Tensor, Tensor, str]:
    """The first test photographs of CIFAR-10; where they are not at hand, generated ones, and a line that says so.

    There are at most as many as were generated, in which every class has its share.
    `own` puts pictures of the reader's in front, each file with the name of its class: {"my cat.jpg": "cat"}.

    Shapes      -> images [count + own,3,32,32] in [0,1], labels [count + own], "Photo" or "Generated"
    Errors      those of `pictures.load_picture` for a file; ValueError for a class that CIFAR-10 does not have
    """
    count = units.check_whole(count, "a number of photographs", least=1)
    if cifar.cifar10_available()[0]:
        images, labels = cifar.cifar10("test", count, progress=False)
        kind = "Photo"
    else:
        print(
            "photographs: not at hand (`diffclass download cifar10`); generated pictures are shown"
        )
        drawn, classes = gallery.pictures()
        count = min(count, len(drawn))
        spread = torch.arange(count) * len(drawn) // count  # they come class by class
        images = drawn[spread]
        labels = classes[spread]
        kind = "Generated"
    names = cifar.CIFAR10_CLASSES
    for file, name in reversed((own or {}).items()):
        label = names.index(units.chosen(name, names, f"the class of {file}"))
        images = torch.cat([pictures.load_picture(file, PHOTO_SHAPE), images])
        labels = torch.cat([torch.tensor([label]), labels])
    return images, labels, kind
