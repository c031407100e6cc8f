"""The baselines of diffusion classifiers: a plain convolutional classifier, however it was trained."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from diffclass import units
from diffclass.classifiers.base import Classifier, Noise
from diffclass.denoisers import nets
from diffclass.storage import weights


class ConvClassifier(Classifier):
    """A small residual convolutional classifier: a deterministic function of the pixels, the same for all who call it.

    Formula     f(x) = W max_ij h_ij + b;  h = conv(2x - 1), then for each further width a convolution of stride 2 and
                h + two convolutions; SiLU and group norm between them
    Source      residual blocks: He et al. 2016. Group norm (Wu & He 2018), as batch norm makes training, prediction and
                attack three functions; a smooth activation, whose gradient the attack needs (Xie et al. 2020). The
                largest value of a normed channel says more than its mean: 49 % against 43 % after 200 steps of CIFAR-10
    Shapes      x [B,C,H,W] in [0,1] -> logits [B,K]
    Randomness  the initial weights are drawn from `seed` alone; none afterwards
    Errors      ValueError for widths that are not multiples of 4; those of `units.check_images`
    """

    scale = "scores"
    calls = 1

    def __init__(
        self,
        image_shape: Sequence[int],
        num_classes: int,
        widths: Sequence[int] = (32, 64),
        seed: int = 0,
    ):
        super().__init__()
        image_shape = units.check_image_shape(image_shape)
        num_classes = units.check_class_count(num_classes)
        seed = units.check_whole(seed, "a seed", most=None)
        widths = units.check_wholes(widths, "widths")
        if not widths or any(width < 4 or width % 4 for width in widths):
            raise ValueError(
                f"expected widths as multiples of 4, one for each halving of the picture and one before "
                f"them, got {tuple(widths)}."
            )
        self.image_shape = image_shape
        self.num_classes = num_classes
        self.widths = widths
        # modules first fill themselves from the global state
        with torch.random.fork_rng(devices=[]):
            self.enter = nn.Conv2d(self.image_shape[0], widths[0], 3, padding=1)
            self.stages = nn.Sequential(
                *[_Stage(*pair) for pair in zip(widths, widths[1:], strict=False)]
            )
            self.leave = nn.Linear(widths[-1], num_classes)
        nets.initialise(self, torch.Generator().manual_seed(seed))

    def logits(self, x: Tensor, noise: Noise) -> Tensor:
        """See `Classifier.logits`; in the precision of the pixels even under autocast."""
        z = units.to_model(x).to(self.enter.weight.dtype)
        h = self.stages(nn.functional.silu(self.enter(z)))
        return self.leave(h.amax((2, 3))).to(x.dtype)


class _Stage(nn.Module):
    """Half the side, more channels, and a residual block."""

    def __init__(self, before: int, width: int):
        super().__init__()
        self.halve = _normed(before, width, stride=2)
        self.inner = nn.Sequential(_normed(width, width), _normed(width, width))

    def forward(self, h: Tensor) -> Tensor:
        """h [B,before,H,W] -> [B,width,H/2,W/2]."""
        h = self.halve(h)
        return h + self.inner(h)


def _normed(before: int, width: int, stride: int = 1) -> nn.Sequential:
    # the norm has a bias of its own
    convolution = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(math.gcd(8, width), width), nn.SiLU())


def save(classifier: ConvClassifier, path: str | Path, card: dict | None = None) -> None:
    """Write weights, architecture and model card as safetensors; old files survive an interruption."""
    weights.save_weights(
        classifier,
        dict(
            network="ConvClassifier",
            image_shape=list(classifier.image_shape),
            num_classes=classifier.num_classes,
            widths=list(classifier.widths),
        ),
        path,
        card,
    )


def load(path: str | Path) -> tuple[ConvClassifier, dict]:
    """A baseline and its model card from what `save` wrote, ready to be asked.

    Errors      those of `network.load_weights` and `network.filled`; ValueError for a network of another kind
    """
    path = Path(path)
    state, architecture, card = weights.load_weights(path)
    if architecture.pop("network", None) != "ConvClassifier" or set(architecture) != {
        "image_shape",
        "num_classes",
        "widths",
    }:
        raise ValueError(
            f"expected {path.name} to hold a ConvClassifier, got the architecture {sorted(architecture)}; "
            "a network of another kind has a loader of its own."
        )
    return weights.filled(
        ConvClassifier(**architecture), state, f"ConvClassifier in {path.name}"
    ), card
