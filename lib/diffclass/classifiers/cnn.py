"""The baselines of diffusion classifiers: plain networks, however they were trained, and the files of all of them."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from diffclass import units
from diffclass.classifiers.attention import AttentionClassifier
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
    settings = ("widths",)

    def __init__(
        self,
        image_shape: Sequence[int],
        num_classes: int,
        widths: Sequence[int] = (32, 64),
        seed: int = 0,
    ):
        super().__init__()
        self.image_shape = units.check_image_shape(image_shape)
        self.num_classes = units.check_class_count(num_classes)
        seed = units.check_whole(seed, "a seed", most=None)
        widths = _checked_widths(
            widths, 1, "one for each halving of the picture and one before them"
        )
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


def _checked_widths(widths: Sequence[int], least: int, which: str) -> tuple[int, ...]:
    """Return so many widths or more that are multiples of 4, else raise a ValueError that says `which` they are."""
    widths = units.check_wholes(widths, "widths")
    if len(widths) < least or any(width < 4 or width % 4 for width in widths):
        raise ValueError(f"expected widths as multiples of 4, {which}, got {tuple(widths)}.")
    return widths


# ---------------------------------------------------------------------------------------------------------------------
# Wider


class WideClassifier(Classifier):
    """A wide residual network: few blocks of many channels in place of many of few.

    Formula     f(x) = W mean_ij a(h)_ij + b;  h = conv(2x - 1), then for each further width some blocks
                h <- s(h) + conv(a(conv(a(h)))), the first of stride 2 from the second group on; a = SiLU of the norm, and
                s is a convolution of one pixel of a(h) where the width or the side changes, h itself elsewhere
    Source      Zagoruyko & Komodakis 2016: their WRN-d-k has the widths 16, 16k, 32k, 64k and (d - 4)/6 blocks each. Group
                norm for batch norm and SiLU for ReLU, as `ConvClassifier` has them and for its reasons; no dropout. Without
                norms for JEM: Grathwohl et al. 2020
    Shapes      x [B,C,H,W] in [0,1] -> logits [B,K]
    Randomness  the initial weights are drawn from `seed` alone; none afterwards
    Errors      ValueError for fewer than two widths, or widths that are not multiples of 4; those of `units.check_images`
    """

    scale = "scores"
    calls = 1
    settings = ("widths", "blocks", "normed")

    def __init__(
        self,
        image_shape: Sequence[int],
        num_classes: int,
        widths: Sequence[int] = (16, 32, 64, 128),
        blocks: int = 1,
        normed: bool = True,
        seed: int = 0,
    ):
        super().__init__()
        self.image_shape = units.check_image_shape(image_shape)
        self.num_classes = units.check_class_count(num_classes)
        self.widths = _checked_widths(widths, 2, "the first layer's and one for each group")
        self.blocks = units.check_whole(blocks, "blocks", least=1)
        self.normed = bool(normed)
        seed = units.check_whole(seed, "a seed", most=None)
        # modules first fill themselves from the global state
        with torch.random.fork_rng(devices=[]):
            self.enter = nn.Conv2d(self.image_shape[0], self.widths[0], 3, padding=1)
            groups = []
            for index, (before, width) in enumerate(
                zip(self.widths, self.widths[1:], strict=False)
            ):
                groups.append(_WideBlock(before, width, 2 if index else 1, self.normed))
                groups += [_WideBlock(width, width, 1, self.normed) for _ in range(self.blocks - 1)]
            self.groups = nn.Sequential(*groups)
            self.last = _activation(self.widths[-1], self.normed)
            self.leave = nn.Linear(self.widths[-1], self.num_classes)
        nets.initialise(self, torch.Generator().manual_seed(seed))

    def logits(self, x: Tensor, noise: Noise) -> Tensor:
        """See `Classifier.logits`; in the precision of the pixels even under autocast."""
        z = units.to_model(x).to(self.enter.weight.dtype)
        h = self.last(self.groups(self.enter(z)))
        return self.leave(h.mean((2, 3))).to(x.dtype)


class _WideBlock(nn.Module):
    """A residual block whose norms come before its convolutions: what is passed on is never normed."""

    def __init__(self, before: int, width: int, stride: int, normed: bool):
        super().__init__()
        self.first = _activation(before, normed)
        self.inner = nn.Sequential(
            nn.Conv2d(before, width, 3, stride, padding=1),
            _activation(width, normed),
            nn.Conv2d(width, width, 3, padding=1),
        )
        changed = before != width or stride > 1
        self.shortcut = nn.Conv2d(before, width, 1, stride) if changed else None

    def forward(self, h: Tensor) -> Tensor:
        """h [B,before,H,W] -> [B,width,H,W], or half the side for a stride of 2."""
        active = self.first(h)
        kept = h if self.shortcut is None else self.shortcut(active)
        return kept + self.inner(active)


def _activation(width: int, normed: bool) -> nn.Module:
    if not normed:
        return nn.SiLU()
    return nn.Sequential(nn.GroupNorm(math.gcd(8, width), width), nn.SiLU())


# ---------------------------------------------------------------------------------------------------------------------
# Files

Plain = ConvClassifier | WideClassifier | AttentionClassifier
KINDS: dict[str, type[Plain]] = {
    kind.__name__: kind for kind in (ConvClassifier, WideClassifier, AttentionClassifier)
}


def described(classifier: Plain) -> dict:
    """What kind of network a classifier is and how it is built, JSON values: for its card."""
    own = {name: getattr(classifier, name) for name in classifier.settings}
    return dict(network=type(classifier).__name__, **own)


def save(
    classifier: Plain,
    path: str | Path,
    card: dict | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write weights, architecture and model card as safetensors; old files survive an interruption."""
    fixed = dict(image_shape=list(classifier.image_shape), num_classes=classifier.num_classes)
    weights.save_weights(classifier, described(classifier) | fixed, path, card, dtype)


def load(path: str | Path) -> tuple[Plain, dict]:
    """A baseline and its model card from what `save` wrote, ready to be asked.

    Errors      those of `network.load_weights` and `network.filled`; ValueError for a network of another kind
    """
    path = Path(path)
    state, architecture, card = weights.load_weights(path)
    kind = KINDS.get(architecture.pop("network", None))
    if kind is None or set(architecture) != {"image_shape", "num_classes", *kind.settings}:
        raise ValueError(
            f"expected {path.name} to hold a plain network ({', '.join(KINDS)}), got the architecture "
            f"{sorted(architecture)}; a network of another kind has a loader of its own."
        )
    return weights.filled(kind(**architecture), state, f"{kind.__name__} in {path.name}"), card
