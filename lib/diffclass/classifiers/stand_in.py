"""A classifier's values with the gradient of another function."""

from collections.abc import Callable

import torch
from torch import Tensor

from diffclass import units
from diffclass.classifiers.base import Classifier, Noise

SlopeOf = Callable[[Tensor], Tensor]  # z [B,C,H,W] in [-1,1] -> gradients of K logits, [B,K,C,H,W]


class StandIn(Classifier):
    """A classifier whose values are its own and whose gradient is another function's: for attacks of any library.

    Formula     f(x) + <g(2x - 1), 2 (x - x')> with x' = x, not differentiated: the value is f(x), the slope 2 g
    Shapes      x [B,C,H,W] in [0,1] -> [B,K]; slope_of: z [B,C,H,W] -> [B,K,C,H,W] in model units
    Randomness  the classifier's own
    Why         `telescoped_gradient` costs two levels and no backward pass, where autograd differentiates all T
    """

    def __init__(self, classifier: Classifier, slope_of: SlopeOf):
        super().__init__()
        self.classifier = classifier
        self.slope_of = slope_of
        self.num_classes = classifier.num_classes
        self.image_shape = classifier.image_shape
        self.sigma_pixel = classifier.sigma_pixel
        self.scale = classifier.scale
        self.eot = classifier.eot

    def sample_noise(self, images: int, generator: torch.Generator) -> Noise:
        """See `Classifier.sample_noise`."""
        return self.classifier.sample_noise(images, generator)

    def logits(self, x: Tensor, noise: Noise) -> Tensor:
        """See `Classifier.logits`."""
        with torch.no_grad():
            logits = self.classifier.logits(x, noise)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return logits
        slopes = self.slope_of(units.to_model(x.detach()))
        step = units.PIXELS_TO_MODEL * (x - x.detach())
        return logits + (slopes.to(logits) * step[:, None]).flatten(2).sum(-1)

    @property
    def calls(self) -> int:
        """See `Classifier.calls`."""
        return self.classifier.calls
