"""Where tensors live, and in which precision networks run: the one function that names a device."""

import torch


def device() -> torch.device:
    """The device of this process: its accelerator where there is one, under Accelerate its own of several, else the CPU."""
    from accelerate import Accelerator  # here, not above: it takes a second

    return Accelerator().device


def in_precision(precision: str, like: torch.Tensor) -> torch.autocast:
    """Inside, networks run in this precision, "fp32" or "bf16", on the device of a tensor.

    Errors      ValueError for another precision
    """
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"expected the precision fp32 or bf16, got {precision!r}.")
    return torch.autocast(like.device.type, torch.bfloat16, enabled=precision == "bf16")
