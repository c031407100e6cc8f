"""The smoothed classifier: what an attack climbs in place of its votes."""

import torch
from torch import Tensor, nn

from diffclass import units


class NoiseAveraged(nn.Module):
    """Mean logits over noised copies: a differentiable stand-in for the smoothed vote.

    Formula     mean over `draws` of f(x + sigma eps)
    Why         votes have no gradient; an attack climbs this and then lets the votes decide (Salman et al. 2019)
    Shapes      x [B,C,H,W] in [0,1] -> [B,K]
    Randomness  `generator` draws eps anew at every call
    Errors      ValueError for a noise level <= 0 or fewer than one draw
    """

    def __init__(
        self, classifier: nn.Module, sigma_pixel: float, draws: int, generator: torch.Generator
    ):
        super().__init__()
        if draws < 1:
            raise ValueError(f"expected at least one draw to average over, got {draws}.")
        self.classifier = classifier
        self.sigma_pixel = float(units.check_sigma(sigma_pixel, "sigma_pixel"))
        self.draws = draws
        self.generator = generator
        self.num_classes = classifier.num_classes
        self.image_shape = classifier.image_shape

    def forward(self, x: Tensor) -> Tensor:
        """Mean logits. Shapes: [B,C,H,W] -> [B,K]."""
        many = x.repeat(self.draws, 1, 1, 1)
        eps = torch.randn(many.shape, generator=self.generator, dtype=x.dtype).to(x.device)
        return (
            self.classifier(many + self.sigma_pixel * eps)
            .unflatten(0, (self.draws, len(x)))
            .mean(0)
        )
