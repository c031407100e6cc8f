"""A classifier asked about a picture and its mirror image."""

import torch
from torch import Tensor

from diffclass.classifiers.base import Classifier, Noise


class Mirrored(Classifier):
    """The mean of a classifier's logits on a picture and on its mirror image, under the same noise.

    Formula     (f(x, noise) + f(flip x, noise)) / 2,  flip: left and right exchanged
    Why         a mirrored photograph shows the same class, and the mirror image of x + sigma eps is a clean one with noise of
                the same law: the pair answers more steadily, for twice the calls. Not so of digits
    Shapes      x [B,C,H,W], the classifier's noise -> [B,K]
    Randomness  the classifier's own
    """

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.classifier = classifier
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
        return (self.classifier.logits(x, noise) + self.classifier.logits(x.flip(-1), noise)) / 2

    def gradients(self) -> dict[str, Classifier]:
        """See `Classifier.gradients`: the classifier's."""
        return {name: Mirrored(other) for name, other in self.classifier.gradients().items()}

    def surrogate(self) -> Classifier:
        """See `Classifier.surrogate`: the classifier's."""
        if self.classifier.gradients():
            return self
        return Mirrored(self.classifier.surrogate())

    def routes(self) -> dict[str, Classifier]:
        """Those of the classifier, mirrored too."""
        return {name: Mirrored(route) for name, route in self.classifier.routes().items()}

    @property
    def level_counts(self) -> tuple[int, ...]:
        """Those of the classifier."""
        return self.classifier.level_counts

    def at_levels(self, count: int) -> "Mirrored":
        """The classifier with another number of levels or steps, mirrored."""
        return Mirrored(self.classifier.at_levels(count))

    @property
    def calls(self) -> int:
        """See `Classifier.calls`."""
        return 2 * self.classifier.calls
