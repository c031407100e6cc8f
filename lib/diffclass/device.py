"""Where tensors live, in which precision networks run, and how a step is replayed: the one module that names a device."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

WARM_CALLS = 3  # before a step is captured: what fills itself at a first call has done so


def device() -> torch.device:
    """The device of this process: its accelerator where there is one, under Accelerate its own of several, else the CPU."""
    from accelerate import Accelerator  # here, not above: it takes a second

    return Accelerator().device


def available(precision: str, place: torch.device) -> str:
    """The precision in which networks run there: the one that is asked for, or fp32 where there is no bfloat16.

    Errors      ValueError for another precision than fp32 or bf16
    """
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"expected the precision fp32 or bf16, got {precision!r}.")
    lacks = place.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16" and lacks:
        warnings.warn(
            f"{place} has no bfloat16; networks run in fp32 there: slower, and no less exact.",
            stacklevel=3,
        )
        return "fp32"
    return precision


def in_precision(precision: str, like: Tensor, *, cached: bool = True) -> torch.autocast:
    """Inside, networks run in this precision, "fp32" or "bf16", on the device of a tensor; fp32 where that lacks bf16.

    Shapes      cached: whether weights are converted once and kept until the end, which a captured step must not do
    Errors      those of `available`
    """
    chosen = available(precision, like.device)
    return torch.autocast(
        like.device.type, torch.bfloat16, enabled=chosen == "bf16", cache_enabled=cached
    )


def give_back_memory(place: torch.device) -> None:
    """Return what torch keeps for later to the accelerator."""
    if place.type == "cuda":
        torch.cuda.empty_cache()


def keep_compiled(folder: Path) -> None:
    """Let what `torch.compile` makes stay in a folder, so that the next process need not compile it again.

    Why         a graph takes a minute; a folder that a reader names in the environment stays, but not the temporary one
                that torch puts there itself when it is first asked
    """
    named = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "torchinductor_")
    if Path(named).name.startswith("torchinductor_"):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


# ---------------------------------------------------------------------------------------------------------------------
# A step that is replayed


def replays(place: torch.device) -> bool:
    """Whether steps are captured and replayed there: on CUDA, where launching kernels one by one keeps the host busier
    than the chip."""
    return place.type == "cuda"


class Replayed:
    """A function of tensors as one captured graph, after a few plain calls.

    Shapes      the same in every call
    Why         the function runs on tensors of its own, into which each call's are copied; it must read nothing back, and
                branch on no value
    """

    def __init__(self, function: Callable[..., Tensor]):
        self.function = function
        self.calls = 0
        self.stream = torch.cuda.Stream()

    def __call__(self, *given: Tensor) -> Tensor:
        if self.calls < WARM_CALLS:
            value = self._aside(given)
        else:
            if self.calls == WARM_CALLS:
                self._capture(given)
            for own, now in zip(self.own, given, strict=True):
                own.copy_(now)
            self.graph.replay()
            value = self.value.clone()  # the next call writes into the same
        self.calls += 1
        return value

    def _aside(self, given: tuple[Tensor, ...]) -> Tensor:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            value = self.function(*given)
        torch.cuda.current_stream().wait_stream(self.stream)
        return value

    def _capture(self, given: tuple[Tensor, ...]) -> None:
        self.own = [part.clone() for part in given]
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.value = self.function(*self.own)
