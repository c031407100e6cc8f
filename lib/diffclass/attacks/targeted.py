"""Which classes a targeted attack goes towards."""

import torch
from torch import Tensor

from diffclass import units
from diffclass.classifiers.base import Classifier, Noise

MOST = 9  # targets, however many classes there are


def ranks(num_classes: int) -> tuple[int, ...]:
    """The targets of an attack towards every wrong class: 1 is the most likely one; of many classes the first 9.

    Source      Croce & Hein 2020, whose APGD-T has 9 targets
    """
    num_classes = units.check_class_count(num_classes)
    return tuple(range(1, min(num_classes - 1, MOST) + 1))


def ranked(classifier: Classifier, x: Tensor, y: Tensor, noise: Noise = ()) -> Tensor:
    """The wrong classes of each image, the most likely one first.

    Shapes      x [B,C,H,W] in [0,1], y [B], noise of B images or of one for all -> [B,K-1]
    Why noise   attacks towards the first, the second, ... class must rank by one noise, or a class is left out
    """
    units.check_images(x, classifier.image_shape)
    units.check_labels(y, len(x), classifier.num_classes)
    with torch.no_grad():
        order = classifier(x, noise).argsort(dim=1, descending=True, stable=True)
    return order[order != y[:, None]].reshape(len(x), -1)
