"""One switch for everything that may draw noise: fixed, so that calls can be repeated, or fresh at every call."""

import copy
from typing import Self

import torch
from torch import nn


class Randomised(nn.Module):
    """A module that is deterministic until it is given a generator.

    Randomness  none by itself: subclasses draw from `generator` where there is one, else from a fixed seed
    """

    generator: torch.Generator | None = None

    @property
    def deterministic(self) -> bool:
        """Whether two calls on the same image give the same answer."""
        return self.generator is None

    def with_fresh_noise(self, generator: torch.Generator) -> Self:
        """The random module: noise drawn anew for every image of every call, by `generator`; the weights are shared."""
        twin = self.twin()
        twin.generator = generator
        return twin

    def twin(self) -> Self:
        """A copy whose attributes can be set without changing this one; weights and noise are shared."""
        twin = copy.copy(self)
        twin._buffers = dict(self._buffers)
        twin._modules = dict(self._modules)
        return twin
