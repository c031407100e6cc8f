"""Noise that is held: one draw of a random classifier as a deterministic function."""

import torch
from torch import Tensor, nn


def _generators(module: nn.Module) -> list[torch.Generator]:
    found = [
        value
        for part in module.modules()
        for value in vars(part).values()
        if isinstance(value, torch.Generator)
    ]
    return list({id(generator): generator for generator in found}.values())


class Frozen(nn.Module):
    """A random classifier whose noise is held: every call rewinds every generator that it draws from to `seed`.

    Why         one draw of the noise is a deterministic function, which attacks and finite differences can be put to
    Shapes      those of the classifier; each place in a batch has its own noise, so compare the same batches
    Randomness  generators kept by the module or its parts, and torch's global one; all go on afterwards as if uncalled
    """

    deterministic = True

    def __init__(self, classifier: nn.Module, seed: int = 0):
        super().__init__()
        self.classifier = classifier
        self.seed = seed
        self.num_classes = classifier.num_classes
        self.image_shape = classifier.image_shape

    def forward(self, x: Tensor) -> Tensor:
        kept = [(generator, generator.get_state()) for generator in _generators(self.classifier)]
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(torch.Generator().manual_seed(self.seed).get_state())
            for generator, _ in kept:
                generator.manual_seed(self.seed)
            try:
                return self.classifier(x)
            finally:
                for generator, state in kept:
                    generator.set_state(state)
