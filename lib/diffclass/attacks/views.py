"""A classifier as an attack sees it: rescaled for libraries, or as a function of how images are bent."""

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


def warp(x: Tensor, flow: Tensor) -> Tensor:
    """The image that shows at each place what was a little further on, interpolated between pixels.

    Formula     x'(i, j) = x(i + flow_1(i, j), j + flow_0(i, j)), bilinear; beyond the edge as at the edge
    Source      Xiao et al. 2018 (StAdv)
    Shapes      x [B,C,H,W], flow [B,2,H,W] (to the right, down), in pixel widths -> [B,C,H,W]
    """
    units.check_images(x, pixel_range=False)
    units.check_images(flow, (2, *x.shape[2:]), pixel_range=False)
    if len(flow) != len(x):
        raise ValueError(f"expected a flow for each of {len(x)} images, got {len(flow)}.")
    height, width = x.shape[2:]
    rows, columns = torch.meshgrid(
        torch.arange(height).to(x), torch.arange(width).to(x), indexing="ij"
    )
    right = 2 * (columns + 0.5 + flow[:, 0]) / width - 1
    down = 2 * (rows + 0.5 + flow[:, 1]) / height - 1
    places = torch.stack([right, down], -1).to(x)
    return nn.functional.grid_sample(x, places, padding_mode="border", align_corners=False)


class Bent(Classifier):
    """Logits of some images as a function of how they are bent: `attacks.pgd` or `apgd` on it is the attack StAdv.

    Formula     p -> f(warp(x, bound (2p - 1)), noise); p = 1/2 is the image itself, the budget 1/2 is the whole bound
    Source      Xiao et al. 2018; RDC bounds the flow of 32x32 pixels by 0.05 of half the picture, 0.8 pixel widths
    Shapes      x [B,C,H,W]; p [B,2,H,W] in [0,1], the classifier's own noise -> [B,K];
                *_, last = attacks.pgd(bent, bent.straight, y, 0.5)
    Units       bound in pixel widths
    """

    def __init__(self, classifier: Classifier, x: Tensor, bound: float):
        super().__init__()
        units.check_images(x, classifier.image_shape)
        bound = units.check_number(bound, "a bound")
        if not bound >= 0:
            raise ValueError(f"expected a bound >= 0 in pixel widths, got {bound}.")
        self.classifier = classifier
        self.x = x
        self.bound = bound
        self.num_classes = classifier.num_classes
        self.image_shape = (2, *x.shape[2:])
        self.scale = classifier.scale
        self.eot = classifier.eot
        self.straight = torch.full((len(x), *self.image_shape), 0.5, dtype=x.dtype, device=x.device)

    def sample_noise(self, images: int, generator: torch.Generator) -> Noise:
        """See `Classifier.sample_noise`."""
        return self.classifier.sample_noise(images, generator)

    def image(self, p: Tensor) -> Tensor:
        """The bent images. Shapes: p [B,2,H,W] -> [B,C,H,W]."""
        units.check_images(p, self.image_shape)
        if len(p) != len(self.x):
            raise ValueError(f"expected a flow for each of {len(self.x)} images, got {len(p)}.")
        return warp(self.x, self.bound * (2 * p - 1)).clamp(0, 1)

    def logits(self, x: Tensor, noise: Noise) -> Tensor:
        """Logits of the bent images. Shapes: [B,2,H,W] -> [B,K]."""
        return self.classifier.logits(self.image(x), noise)

    def gradients(self) -> dict[str, Classifier]:
        """See `Classifier.gradients`: those of the classifier, of the bent images."""
        return {
            name: Bent(other, self.x, self.bound)
            for name, other in self.classifier.gradients().items()
        }

    def surrogate(self) -> Classifier:
        """See `Classifier.surrogate`: the classifier's, of the bent images."""
        return Bent(self.classifier.surrogate(), self.x, self.bound)

    @property
    def calls(self) -> int:
        """See `Classifier.calls`."""
        return self.classifier.calls
