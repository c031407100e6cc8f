"""A classifier without convolutions: attention between the patches of a picture."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffclass import units
from diffclass.classifiers.base import Classifier, Noise
from diffclass.denoisers import nets

# An odd number of heads keeps torch from its fused inference kernel, which rounds otherwise than training and attack do.
HEADS = 3
PLACE = 0.02  # standard deviation of the first token and of the places before training


class AttentionClassifier(Classifier):
    """A small vision transformer: patches become tokens, and one more token reads the class off them.

    Formula     f(x) = W norm(t_0) + b;  t = (first, P u_1, ..., P u_n) + places of the patches u_i of 2x - 1, then for
                each layer t <- t + attention(norm(t)), t <- t + V gelu(U norm(t)), U widening twofold
    Source      Dosovitskiy et al. 2021, equations 1 to 4; three heads as in the smallest of Touvron et al. 2021; the layers
                are `torch.nn.TransformerEncoder`'s. No dropout, which would make training another function
    Shapes      x [B,C,H,W] in [0,1], H and W multiples of `patch` -> logits [B,K]
    Randomness  the initial weights are drawn from `seed` alone; none afterwards
    Errors      ValueError for a width that three heads cannot share, or a patch that does not divide the picture; those of
                `units.check_images`
    """

    scale = "scores"
    calls = 1
    settings = ("width", "layers", "patch")

    def __init__(
        self,
        image_shape: Sequence[int],
        num_classes: int,
        width: int = 96,
        layers: int = 3,
        patch: int = 2,
        seed: int = 0,
    ):
        super().__init__()
        self.image_shape = units.check_image_shape(image_shape)
        self.num_classes = units.check_class_count(num_classes)
        self.width = units.check_whole(width, "a width", least=1)
        self.layers = units.check_whole(layers, "layers", least=1)
        self.patch = units.check_whole(patch, "a patch", least=1)
        seed = units.check_whole(seed, "a seed", most=None)
        channels, height, wide = self.image_shape
        if self.width % HEADS:
            raise ValueError(
                f"expected a width that {HEADS} heads can share, a multiple of {HEADS}, got {self.width}."
            )
        if height % self.patch or wide % self.patch:
            raise ValueError(
                f"expected a patch that divides a picture of {height}x{wide} pixels, got {self.patch}; "
                "were the weights made for pictures of another size?"
            )
        count = (height // self.patch) * (wide // self.patch)
        # modules first fill themselves from the global state
        with torch.random.fork_rng(devices=[]):
            self.enter = nn.Conv2d(channels, self.width, self.patch, stride=self.patch)
            layer = nn.TransformerEncoderLayer(
                self.width,
                HEADS,
                dim_feedforward=2 * self.width,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            self.encoder = nn.TransformerEncoder(
                layer, self.layers, nn.LayerNorm(self.width), enable_nested_tensor=False
            )
            self.first = nn.Parameter(torch.zeros(1, 1, self.width))
            self.place = nn.Parameter(torch.zeros(1, count + 1, self.width))
            self.leave = nn.Linear(self.width, self.num_classes)
        generator = torch.Generator().manual_seed(seed)
        nets.initialise(self, generator)
        for tokens in (self.first, self.place):
            nn.init.normal_(tokens, std=PLACE, generator=generator)

    def logits(self, x: Tensor, noise: Noise) -> Tensor:
        """See `Classifier.logits`; in the precision of the pixels even under autocast."""
        z = units.to_model(x).to(self.enter.weight.dtype)
        patches = self.enter(z).flatten(2).transpose(1, 2)  # [B,n,width]
        first = self.first.expand(len(x), -1, -1).to(patches.dtype)
        tokens = self.encoder(torch.cat([first, patches], 1) + self.place)
        return self.leave(tokens[:, 0]).to(x.dtype)
