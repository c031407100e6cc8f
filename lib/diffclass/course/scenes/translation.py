"""Frames of IDC: the labels and their cosines, the bridge from a digit to its label, the network's walk back."""

import torch
from torch import Tensor

from diffclass import data, units
from diffclass.classifiers import bridges
from diffclass.classifiers.base import check_logits
from diffclass.classifiers.bridges import Bridge
from diffclass.classifiers.idc import TranslationClassifier, TranslationStep, Translator
from diffclass.course import figures
from diffclass.course.scenes.digits import class_lines

SIZE = 72  # of a label on the screen, pixels


def stored(labels: Tensor, low: float) -> Tensor:
    """Labels whose black is stored as `low` and white as 1: -1 is model space, 0 are pixels. Shapes: the same."""
    return low + (1 - low) * labels


class TranslationScene:
    """A trained translator, the test digits and every family of labels; a frame is a digit at a place of the bridge.

    Randomness  one fixed noise for the bridge, one held noise for the walk
    """

    FAMILIES = tuple(bridges.LABELS)

    def __init__(self, translator: Translator, seed: int = 0):
        self.world = data.digits()
        self.classifier = TranslationClassifier(translator)
        self.noise = self.classifier.sample_noise(1, torch.Generator().manual_seed(seed))
        self.bridge: Bridge = translator.bridge
        self.labels = {
            name: family(translator.num_classes, translator.image_shape)
            for name, family in bridges.LABELS.items()
        }
        self.eps = torch.randn(
            translator.image_shape, generator=torch.Generator().manual_seed(seed + 1)
        )
        self._walks: dict[int, list[TranslationStep]] = {}

    def walk(self, index: int) -> list[TranslationStep]:
        """The network's steps on a test digit, from the picture to the label, taken once."""
        if index not in self._walks:
            x = self.world.test_images[index : index + 1]
            with torch.no_grad():
                self._walks[index] = list(self.classifier.walk(x, self.noise))
        return self._walks[index]

    def at(self, index: int, m: float, low: float, family: str) -> dict:
        """The frame of one test digit at share m of the bridge, with labels of one family stored in [low, 1]."""
        labels = self.labels[family]
        c = int(self.world.test_labels[index])
        picture = units.to_model(self.world.test_images[index])
        label = units.to_model(labels[c])
        share = torch.tensor(m)
        state = (
            (1 - share) * label + share * picture + self.bridge.variance(share).sqrt() * self.eps
        )
        cosines = bridges.cosines(stored(labels, low))
        apart = cosines[~torch.eye(len(labels), dtype=torch.bool)]
        spread = f"{float(apart.min()):+.2f} to {float(apart.max()):+.2f}"
        walk = self.walk(index)
        ends = walk[-1].distances[0]
        best, second = check_logits(ends[None])[0].topk(2, largest=False).indices.tolist()
        note = (
            f"{family} labels with black stored as {low:.2f}: cosines {spread}. The network, trained on its own "
            f"labels, translates this {c} and ends {float(ends[best]):.3f} from label {best} and "
            f"{float(ends[second]):.3f} from label {second} (mean absolute difference in pixels)."
        )
        return figures.frame(
            [
                [
                    figures.tiles(
                        [picture, state, label],
                        columns=3,
                        size=100,
                        low=-1,
                        high=1,
                        title="From picture to label",
                        captions=[f"digit {index}", f"m = {m:.2f}", f"label {c}"],
                        alt=f"A handwritten {c}, the bridge at share {m:.2f}, and the label of class {c}.",
                    ),
                    figures.tiles(
                        labels,
                        columns=5,
                        size=SIZE,
                        captions=[str(k) for k in range(len(labels))],
                        title=f"Labels: {family}",
                        alt=f"The ten labels of the family {family}.",
                    ),
                    figures.tiles(
                        [cosines[None]],
                        columns=1,
                        size=150,
                        low=-1,
                        high=1,
                        captions=[spread],
                        title="Cosines",
                        alt=f"Gram matrix of the ten labels; between different labels {spread}.",
                    ),
                ],
                [
                    self._distances(walk, m, c),
                    figures.tiles(
                        [step.estimate[0] for step in walk],
                        columns=len(walk),
                        size=84,
                        low=-1,
                        high=1,
                        captions=[f"m = {float(self.bridge.shares[step.t]):.2f}" for step in walk],
                        title="The network's estimated label at each step",
                        alt=f"The network's estimates of the label; the last is nearest to label {best}.",
                    ),
                ],
            ],
            note,
        )

    def _distances(self, walk: list[TranslationStep], m: float, label: int) -> dict:
        """Distance of the estimates to the ten labels, against the share of the bridge where they were made."""
        back = walk[::-1]
        distances = torch.stack([step.distances[0] for step in back])
        return figures.curves(
            self.bridge.shares[[step.t for step in back]],
            class_lines(distances.T, figures.emphasis(-distances[0])),
            cursor=m,
            xrange=(0, 1),
            yrange=(0, max(0.6, float(distances.max()) * 1.05)),
            w=480,
            h=200,
            title="Distance to the network's own labels (read right to left)",
            xlabel="share m of the picture (drag)",
            ylabel="mean |difference|",
            alt=f"Distances of the estimates of a {label} to the ten labels that the network was trained on, from "
            "picture to label.",
        )
