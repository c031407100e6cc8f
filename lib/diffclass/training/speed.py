"""How fast a network is trained, beside what the chip could do."""

import time
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from diffclass import device
from diffclass.data.worlds import SHAPES
from diffclass.training.recipes import RECIPES, Beginning


@dataclass(frozen=True)
class Speed:
    """How fast a network is trained, and how much of what the chip's matrix units can do that is.

    images      a second; flops: of one training step on one image; peak: FLOP a second of a large matrix product
    """

    images: float
    flops: float
    peak: float

    def __str__(self) -> str:
        return (
            f"{self.images:,.0f} images/s, {self.images * self.flops / 1e12:.3g} TFLOP/s, "
            f"{self.images * self.flops / self.peak:.0%} of the matrix peak"
        )


class Counter(TorchDispatchMode):
    """Counts FLOP by torch's own formulas, two for a multiply-add, whatever is called inside.

    Why         torch's counter assigns them to modules as well, which fails where a loss takes a gradient itself
    """

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run one operation and count it."""
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        formula = flop_registry.get(function.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=result)
        return result


def step_flops(name: str, widths: tuple[int, ...] | None = None) -> int:
    """FLOP of one training step on one image: the loss and its gradient, with whatever they call; no optimiser.

    Source      counted in one step of an untrained network on the CPU
    """
    recipe = RECIPES[name]
    beginning = _beginning(name, widths)
    model = recipe.build(beginning).eval()  # without dropout, which draws and costs nothing here
    loss = recipe.loss(beginning)
    picture = recipe.pictures(torch.full((1, *beginning.shape), 0.5))
    with Counter() as counter, sdpa_kernel(SDPBackend.MATH):
        loss(model, picture, torch.zeros(1, dtype=torch.long), torch.Generator()).backward()
    return counter.total


def _beginning(name: str, widths: tuple[int, ...] | None) -> Beginning:
    return Beginning(SHAPES[RECIPES[name].world], 10, widths=widths, given=_needed(name))


def _needed(name: str) -> nn.Module | None:
    """A stand-in for the network that a recipe needs, with its first weights: it costs the same."""
    needs = RECIPES[name].needs
    return RECIPES[needs].build(_beginning(needs, None)).eval() if needs else None


def matrix_peak(precision: str, size: int = 4096, seconds: float = 0.3) -> float:
    """FLOP a second of a product of two large matrices on this process's chip, in the precision of the network."""
    place = Accelerator().device
    size = size if torch.accelerator.is_available() else size // 4
    halved = device.available(precision, place) == "bf16"
    dtype = torch.bfloat16 if halved else torch.float32
    matrix = torch.ones(size, size, device=place, dtype=dtype)
    wait = torch.accelerator.synchronize if torch.accelerator.is_available() else lambda: None
    matrix @ matrix
    wait()
    started = time.perf_counter()
    count = 0
    while time.perf_counter() - started < seconds:
        matrix @ matrix
        count += 1
        wait()
    return 2 * size**3 * count / (time.perf_counter() - started)
