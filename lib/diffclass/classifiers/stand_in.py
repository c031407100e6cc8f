"""A classifier's values with the gradient of another function."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffclass import noise, units
from diffclass.likelihood import telescoped_gradient

SlopeOf = Callable[[Tensor], Tensor]  # z [B,C,H,W] in [-1,1] -> gradients of K logits, [B,K,C,H,W]


class StandIn(nn.Module):
    """A classifier whose values are its own and whose gradient is another function's: for attacks of any library.

    Formula     f(x) + <g(2x - 1), 2 (x - x')> with x' = x, not differentiated: the value is f(x), the slope 2 g
    Shapes      x [B,C,H,W] in [0,1] -> [B,K]; slope_of: z [B,C,H,W] -> [B,K,C,H,W] in model units
    Why         `telescoped_gradient` costs two levels and no backward pass, where autograd differentiates all T
    """

    def __init__(self, classifier: nn.Module, slope_of: SlopeOf):
        super().__init__()
        self.classifier = classifier
        self.slope_of = slope_of
        self.num_classes = classifier.num_classes
        self.image_shape = classifier.image_shape
        self.deterministic = getattr(classifier, "deterministic", True)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the classifier. Shapes: [B,C,H,W] -> [B,K]."""
        with torch.no_grad():
            logits = self.classifier(x)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return logits
        slopes = self.slope_of(units.to_model(x.detach()))
        step = units.PIXELS_TO_MODEL * (x - x.detach())
        return logits + (slopes.to(logits) * step[:, None]).flatten(2).sum(-1)


def telescoped(classifier: nn.Module, samples: int, seed: int = 0) -> StandIn:
    """A diffusion classifier attacked by the telescoped gradient of its ELBO.

    Shapes      a `BayesClassifier` -> a module with its values; the ends are those of its levels
    Randomness  `samples` draws from `seed`, the same at every call
    Errors      ValueError for weights that are not those of an ELBO, whose gradient does not telescope
    """
    if classifier.weighting not in (noise.elbo_weight, noise.discrete_elbo_weight):
        raise ValueError(
            "expected a classifier with ELBO weights, for which everything between the ends cancels, got "
            f"{classifier.weighting.__name__}; use jacobian_free_gradient."
        )
    bank = classifier.bank
    low = float(bank.lower[0])
    high = float(bank.upper[-1])
    generator = torch.Generator().manual_seed(seed)
    eps = torch.randn((samples, 1, *classifier.image_shape), generator=generator)
    return StandIn(
        classifier,
        lambda z: (
            telescoped_gradient(classifier.denoiser, z, low, high, eps) / classifier.temperature
        ),
    )
