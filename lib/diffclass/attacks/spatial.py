"""Attacks that move what an image shows instead of adding to it (StAdv), and the flow fields that do so."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from diffclass import units
from diffclass.attacks.losses import AttackLoss, margin_loss
from diffclass.attacks.search import AttackStep, pgd
from diffclass.classifiers.base import Classifier, Noise, NoiseSource

# RDC's released weight of smoothness against the margin; there too the flow is measured in bounds.
SMOOTHNESS = 0.0025
HALF = 0.5  # the budget of `Bent` that is its whole bound


def warp(x: Tensor, flow: Tensor) -> Tensor:
    """The image that shows at each place what was a little further on, interpolated between pixels.

    Formula     x'(i, j) = x(i + flow_1(i, j), j + flow_0(i, j)), bilinear; beyond the edge as at the edge
    Source      Xiao et al. 2018 (StAdv)
    Shapes      x [B,C,H,W], flow [B,2,H,W] (to the right, down), in pixel widths -> [B,C,H,W]
    Why         written out: without a flow it is the image itself bit for bit, which torch's grid_sample, whose places
                are shares of the picture, misses by rounding
    """
    units.check_images(x, pixel_range=False)
    units.check_images(flow, (2, *x.shape[2:]), pixel_range=False)
    if len(flow) != len(x):
        raise ValueError(f"expected a flow for each of {len(x)} images, got {len(flow)}.")
    height, width = x.shape[2:]
    rows = torch.arange(height, device=x.device)[:, None]
    columns = torch.arange(width, device=x.device)
    right = (columns + flow[:, 0]).clamp(0, width - 1)
    down = (rows + flow[:, 1]).clamp(0, height - 1)
    left = right.detach().floor().clamp(max=max(width - 2, 0))
    top = down.detach().floor().clamp(max=max(height - 2, 0))
    across = (right - left)[:, None]
    along = (down - top)[:, None]
    upper = (1 - across) * _pixels(x, top, left) + across * _pixels(x, top, left + 1)
    lower = (1 - across) * _pixels(x, top + 1, left) + across * _pixels(x, top + 1, left + 1)
    return (1 - along) * upper + along * lower


def _pixels(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The pixels at whole places. Shapes: x [B,C,H,W], rows and columns [B,H,W] -> [B,C,H,W]."""
    height, width = x.shape[2:]
    places = rows.clamp(max=height - 1).long() * width + columns.clamp(max=width - 1).long()
    index = places.flatten(1)[:, None].expand(-1, x.shape[1], -1)
    return x.flatten(2).gather(2, index).reshape(x.shape)


def displacement(flow: Tensor) -> Tensor:
    """How far a flow moves anything along either axis. Shapes: [B,2,H,W] -> [B]. Units: those of the flow."""
    return flow.flatten(1).abs().amax(1)


def roughness(flow: Tensor) -> Tensor:
    """How much a flow field differs between neighbours: 0 for a shift of the whole picture.

    Formula     sum over neighbouring places p, q (beside, below) of ||flow(p) - flow(q)||_2
    Source      Xiao et al. 2018 (StAdv), their flow loss; each pair once
    Shapes      [B,2,H,W] -> [B]; units those of the flow
    """
    total = torch.zeros_like(flow[:, 0, 0, 0])
    for axis in (2, 3):
        squared = (flow.diff(dim=axis) ** 2).sum(1)
        # the root has no slope at 0, where a flow begins
        tiny = torch.finfo(flow.dtype).tiny
        total = total + squared.clamp_min(tiny).sqrt().flatten(1).sum(1)
    return total


def bent(x: Tensor, flow: Tensor) -> Tensor:
    """The bent image, kept in [0,1] against rounding. Shapes: those of `warp`."""
    return warp(x, flow).clamp(0, 1)


class Bent(Classifier):
    """Logits of some images as a function of how they are bent: `attacks.pgd` or `apgd` on it bends them.

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

    def flow(self, p: Tensor) -> Tensor:
        """The flow that p stands for. Shapes: p [B,2,H,W] in [0,1] -> the same, in pixel widths."""
        return self.bound * (2 * p - 1)

    def image(self, p: Tensor) -> Tensor:
        """The bent images. Shapes: p [B,2,H,W] -> [B,C,H,W]."""
        units.check_images(p, self.image_shape)
        if len(p) != len(self.x):
            raise ValueError(f"expected a flow for each of {len(self.x)} images, got {len(p)}.")
        return bent(self.x, self.flow(p))

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


@dataclass(frozen=True)
class FlowStep(AttackStep):
    """One frame of `stadv`: an `AttackStep` at the best bent image so far, and the flow that bends it.

    Shapes      flow [B,2,H,W] in pixel widths; size [B] is its largest displacement along an axis
    """

    flow: Tensor


def stadv(
    classifier: Classifier,
    x: Tensor,
    y: Tensor,
    epsilon: float,
    *,
    noise: NoiseSource = (),
    norm: str = "flow",
    steps: int = 100,
    step_size: float | None = None,
    loss: AttackLoss = margin_loss,
    draws: int = 1,
    generator: torch.Generator | None = None,
    smoothness: float = SMOOTHNESS,
) -> Iterator[FlowStep]:
    """Bend images by smooth flow fields until they are taken for another class, frame by frame.

    Formula     maximise loss(f(warp(x, flow)), y) - smoothness * roughness(flow / epsilon) where |flow| <= epsilon, by PGD
    Source      Xiao et al. 2018 (StAdv), by L-BFGS and without a bound; bound and weight are those of RDC's release
    Shapes      x [B,C,H,W] in [0,1], y [B] -> yields `FlowStep`
    Units       epsilon, the largest displacement along either axis, and step_size in pixel widths
    Randomness  that of `attacks.pgd`
    Errors      those of `attacks.pgd`; ValueError for a budget that cannot be meant, or another norm
    """
    if norm != "flow":
        raise ValueError(f"expected the norm 'flow' for stadv, which adds nothing, got {norm!r}.")
    if not smoothness >= 0:
        raise ValueError(
            f"expected a weight of smoothness >= 0, got {smoothness}; a negative one would seek "
            "torn images."
        )
    units.check_images(x, classifier.image_shape)
    epsilon = units.check_displacement(epsilon, *x.shape[2:])
    if step_size is not None:
        step_size = units.check_step_size(step_size, epsilon, steps)
    view = Bent(classifier, x, epsilon)
    for frame in pgd(
        view,
        view.straight,
        y,
        HALF,
        noise=noise,
        steps=steps,
        step_size=HALF * step_size / epsilon if step_size else None,
        loss=loss,
        draws=draws,
        penalty=lambda p: smoothness * roughness(2 * p - 1),
        generator=generator,
    ):
        flow = view.flow(frame.x)
        yield FlowStep(
            frame.step,
            bent(x, flow),
            frame.logits,
            frame.fooled,
            displacement(flow),
            flow,
        )


def bend(
    classifier: Classifier, x: Tensor, y: Tensor, epsilon: float, **options
) -> Iterator[FlowStep]:
    """`stadv` without its wish for smoothness: PGD on flow fields, within the same budget.

    Why         the wish has a fixed weight, and a loss has the size of the classifier's logits: where these are few nats, or
                their gradients differ from draw to draw, the wish decides the signs of the steps and the flow stays at home
    Source      the bound of RDC's release is kept, Xiao et al. 2018's regularity is not
    Shapes      those of `stadv`; options: its keywords, but for `smoothness`
    Errors      those of `stadv`
    """
    yield from stadv(classifier, x, y, epsilon, smoothness=0.0, **options)
