"""A classifier as attack libraries see it: rescaled, its decisions unchanged."""

import math

import torch
from torch import Tensor, nn

from diffclass import units
from diffclass.classifiers.base import Classifier, Noise


class AttackView(Classifier):
    """What attack libraries receive: the same decision, with logits shifted to be >= 0 and scaled to a margin of one.

    Formula     (f_k - min_k f_k) / temperature; the shift is not differentiated, so gradients are those of f
    Why         CW in torchattacks takes max((1 - onehot) * f), which is 0 for all-negative logits: it does nothing to a
                log-posterior; cross-entropy is flat when logits are thousands of nats apart
    Shapes      x [B,C,H,W] in [0,1], the classifier's own noise -> [B,K]; libraries take a view of `Held`
    """

    scale = "scores"

    def __init__(self, classifier: Classifier, temperature: float):
        super().__init__()
        temperature = units.check_real(temperature, "a temperature")
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(
                f"expected a temperature > 0, got {temperature}; use AttackView.calibrated."
            )
        self.classifier = classifier
        self.temperature = float(temperature)
        self.num_classes = classifier.num_classes
        self.image_shape = classifier.image_shape
        self.sigma_pixel = classifier.sigma_pixel
        self.eot = classifier.eot
        # libraries ask a parameter for the device
        self.anchor = nn.Parameter(torch.zeros(()), requires_grad=False)

    @classmethod
    def calibrated(cls, classifier: Classifier, x: Tensor, noise: Noise = ()) -> "AttackView":
        """A view whose median gap between the two best classes on `x` is one."""
        with torch.no_grad():
            top = classifier(x, noise).topk(2, dim=1).values
        gap = float((top[:, 0] - top[:, 1]).median())
        return cls(classifier, max(gap, torch.finfo(torch.float32).tiny))

    def sample_noise(self, images: int, generator: torch.Generator) -> Noise:
        """See `Classifier.sample_noise`."""
        return self.classifier.sample_noise(images, generator)

    def logits(self, x: Tensor, noise: Noise) -> Tensor:
        """See `Classifier.logits`; shifted and scaled."""
        logits = self.classifier.logits(x, noise)
        return (logits - logits.detach().amin(1, keepdim=True)) / self.temperature

    def gradients(self) -> dict[str, Classifier]:
        """See `Classifier.gradients`: views of the classifier's."""
        return {
            name: AttackView(other, self.temperature)
            for name, other in self.classifier.gradients().items()
        }

    def surrogate(self) -> Classifier:
        """See `Classifier.surrogate`: a view of the classifier's."""
        return AttackView(self.classifier.surrogate(), self.temperature)

    @property
    def calls(self) -> int:
        """See `Classifier.calls`."""
        return self.classifier.calls
