"""What many pages write: a seeded generator, and a count with its interval."""

import torch
from torch import Tensor

from diffclass import intervals


def seeded(seed: int) -> torch.Generator:
    """A generator of its own: the only source of randomness that a page uses."""
    return torch.Generator().manual_seed(seed)


def share(hits: Tensor) -> str:
    """How many of a row of booleans are true, as a count and a share with its 95 % Clopper-Pearson interval."""
    count = int(hits.sum())
    low, high = intervals.interval(count, len(hits))
    return f"{count}/{len(hits)} = {count / len(hits):.2f} [{low:.2f}, {high:.2f}]"
