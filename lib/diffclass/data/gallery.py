"""Pictures that the course may show where CIFAR-10 is not at hand: generated, and labelled so."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffclass.storage import assets

FILE = "cifar10-gallery.png"


def pictures(side: int = 32) -> tuple[Tensor, Tensor]:
    """The generated pictures and the classes they were drawn for. Errors: those of `assets.verified`.

    Shapes      -> images [N,3,side,side] in [0,1], labels [N]
    """
    sheet = (
        torch.from_numpy(np.array(Image.open(assets.verified(FILE)).convert("RGB"))).float() / 255
    )
    classes = sheet.shape[0] // side
    per_class = sheet.shape[1] // side
    tiles = sheet.unflatten(1, (per_class, side)).unflatten(0, (classes, side))  # [K,H,n,W,3]
    return tiles.permute(0, 2, 4, 1, 3).flatten(0, 1).contiguous(), torch.arange(
        classes
    ).repeat_interleave(per_class)
