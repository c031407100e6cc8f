"""What a budget allows to be done to an image: how it is bounded, stored, applied and measured, for every norm."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from diffclass import units
from diffclass.attacks.search import AttackStep, size_of
from diffclass.attacks.spatial import FlowStep, bent, displacement, roughness

TINY = 1e-12  # in place of a budget of nothing, of which any share is nothing


class Threat(ABC):
    """One norm: what may be done to an image [C,H,W] is a tensor of `shape`, zero where nothing is done.

    norm        its name in protocols and records
    unit        of budgets and sizes
    """

    norm: str
    unit: str

    @abstractmethod
    def check(self, epsilon: float, image_shape: tuple[int, int, int]) -> float:
        """Return a budget that can be meant, else raise a ValueError."""

    @abstractmethod
    def shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """The shape of what is stored of an image."""

    @abstractmethod
    def done(self, x: Tensor, step: AttackStep) -> Tensor:
        """What an attack's frame has done to the images. Shapes: x [B,C,H,W] -> [B,*shape]."""

    @abstractmethod
    def applied(self, x: Tensor, change: Tensor) -> Tensor:
        """The images to which it is done. Shapes: [B,C,H,W], [B,*shape] -> [B,C,H,W] in [0,1]."""

    @abstractmethod
    def size(self, change: Tensor) -> Tensor:
        """What of the budget it uses. Shapes: [B,*shape] -> [B]."""

    def measures(self, change: Tensor, epsilon: float) -> dict[str, Tensor]:
        """What else records say of it: name -> a share in [0,1] of the most that there could be. Shapes: -> [B] each."""
        return {}

    @abstractmethod
    def outside(self, x: Tensor, change: Tensor) -> Tensor:
        """How far it leads out of [0,1], where an attack would have stopped. Shapes: as `applied` -> [B]."""


class Added(Threat):
    """A perturbation that is added to the pixels, within an L-inf or L2 ball."""

    unit = "pixels"

    def __init__(self, norm: str):
        self.norm = norm

    def check(self, epsilon: float, image_shape: tuple[int, int, int]) -> float:
        """See `Threat.check`."""
        channels, height, width = image_shape
        return units.check_budget(epsilon, self.norm, channels * height * width)

    def shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """See `Threat.shape`: that of the image."""
        return tuple(image_shape)

    def done(self, x: Tensor, step: AttackStep) -> Tensor:
        """See `Threat.done`: the difference."""
        return step.x - x

    def applied(self, x: Tensor, change: Tensor) -> Tensor:
        """See `Threat.applied`: the sum."""
        return (x + change.to(x)).clamp(0, 1)

    def size(self, change: Tensor) -> Tensor:
        """See `Threat.size`: the norm."""
        return size_of(change, self.norm)

    def outside(self, x: Tensor, change: Tensor) -> Tensor:
        """See `Threat.outside`."""
        there = (x + change.to(x)).flatten(1)
        return (there - 0.5).abs().amax(1) - 0.5


class Flow(Threat):
    """A flow field that bends the image; it moves what is there by at most the budget along either axis."""

    norm = "flow"
    unit = "pixel widths"

    def check(self, epsilon: float, image_shape: tuple[int, int, int]) -> float:
        """See `Threat.check`."""
        return units.check_displacement(epsilon, *image_shape[1:])

    def shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """See `Threat.shape`: two displacements for each place, to the right and down."""
        return (2, *image_shape[1:])

    def done(self, x: Tensor, step: FlowStep) -> Tensor:
        """See `Threat.done`: the flow."""
        return step.flow

    def applied(self, x: Tensor, change: Tensor) -> Tensor:
        """See `Threat.applied`: the bent image."""
        return bent(x, change.to(x))

    def size(self, change: Tensor) -> Tensor:
        """See `Threat.size`: the largest displacement."""
        return displacement(change)

    def measures(self, change: Tensor, epsilon: float) -> dict[str, Tensor]:
        """See `Threat.measures`: the largest displacement, and the mean difference of neighbours."""
        height, width = change.shape[2:]
        neighbours = height * (width - 1) + width * (height - 1)
        widest = 2 * 2**0.5 * epsilon  # from one corner of the budget to the other
        return {
            "displacement": displacement(change) / max(epsilon, TINY),
            "roughness": roughness(change) / max(neighbours * widest, TINY),
        }

    def outside(self, x: Tensor, change: Tensor) -> Tensor:
        """See `Threat.outside`: never, as means of pixels lie between them."""
        return torch.zeros(len(x))


THREATS = {threat.norm: threat for threat in (Added("linf"), Added("l2"), Flow())}


def threat(norm: str) -> Threat:
    """What a norm allows, by its name. Errors: ValueError that lists the names."""
    if norm not in THREATS:
        raise ValueError(f"expected a norm of {', '.join(THREATS)}, got {norm!r}.")
    return THREATS[norm]
