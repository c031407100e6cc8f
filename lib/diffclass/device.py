"""Where tensors live: the one function that names a device."""

import torch


def device() -> torch.device:
    """The device of this process: its accelerator where there is one, under Accelerate its own of several, else the CPU."""
    from accelerate import Accelerator  # here, not above: it takes a second

    return Accelerator().device
