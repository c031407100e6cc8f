"""JEM: one network whose logits are a classifier, and whose log-sum-exp is an energy from which pictures are drawn."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from diffclass import units
from diffclass.classifiers import cnn
from diffclass.classifiers.base import Classifier, Noise
from diffclass.classifiers.cnn import WideClassifier
from diffclass.storage import weights


class JointClassifier(Classifier):
    """A classifier that is also a density: log p(x, y) = f(x)_y - log Z, and Z is never known.

    Formula     logits = f(x);  log p(x) = log sum_y exp f(x)_y - log Z,  p(y | x) = softmax f(x)_y
    Source      Grathwohl et al. 2020 (JEM), equations 5 to 7
    Shapes      x [B,C,H,W] in [0,1] -> logits [B,K]; `replay` [N,C,H,W] in model space: where the chains of its training
                stand, not clamped
    Randomness  none
    Errors      ValueError for a network or a replay of another kind; those of `units.check_images`
    """

    calls = 1

    def __init__(self, network: WideClassifier, replay: Tensor):
        super().__init__()
        self.network = _checked(network)
        self.num_classes = network.num_classes
        self.image_shape = network.image_shape
        self.register_buffer(
            "replay", units.check_images(replay, self.image_shape, pixel_range=False)
        )

    @classmethod
    def begun(cls, network: WideClassifier, chains: int, seed: int = 0) -> "JointClassifier":
        """The network with chains that have not moved yet. Randomness: U(-1, 1) in every pixel, from `seed`."""
        chains = units.check_whole(chains, "chains", least=1)
        seed = units.check_whole(seed, "a seed", most=None)
        generator = torch.Generator().manual_seed(seed)
        return cls(network, uniform((chains, *_checked(network).image_shape), generator))

    def logits(self, x: Tensor, noise: Noise) -> Tensor:
        """See `Classifier.logits`."""
        return self.network.logits(x, noise)

    def log_density(self, z: Tensor) -> Tensor:
        """log p(z) + log Z, the negative energy: unchecked, as chains leave the range of pixels.

        Formula     log sum_y exp f(x)_y, x the pixels of z
        Shapes      z [B,C,H,W] in model space -> [B], in nats
        """
        return self.network.logits(units.to_pixel(z), ()).logsumexp(1)

    def samples(self, count: int, generator: torch.Generator) -> Tensor:
        """Pictures that the training left in its chains, each once. Shapes: -> [count,C,H,W] in [0,1].

        Errors      ValueError for more pictures than there are chains
        """
        count = units.check_whole(count, "count", least=1, most=len(self.replay))
        chosen = torch.randperm(len(self.replay), generator=generator)[:count]
        return units.to_pixel(self.replay[chosen.to(self.replay.device)]).clamp(0, 1)


def _checked(network: WideClassifier) -> WideClassifier:
    """Return a network whose logits can be read as an energy, else raise a ValueError."""
    if not isinstance(network, WideClassifier):
        raise ValueError(
            f"expected a WideClassifier, whose logits are read as an energy, got {type(network).__name__}."
        )
    return network


def uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Where a chain begins: U(-1, 1) in every pixel of model space. Shapes: -> `shape`, on the generator's device."""
    return 2 * torch.rand(shape, generator=generator, device=generator.device) - 1


def langevin(
    log_density: Callable[[Tensor], Tensor],
    z: Tensor,
    *,
    steps: int,
    step: float,
    noise: float,
    generator: torch.Generator,
) -> Iterator[Tensor]:
    """Walk uphill in log p and be pushed about, yielding every state: stochastic gradient Langevin dynamics.

    Formula     z <- z + step grad log p(z) + noise eps
    Source      Welling & Teh 2011; Grathwohl et al. 2020, equation 3
    Exact when  noise = sqrt(2 step) and step -> 0: the states are then distributed as p. Otherwise as p^(1/T) at the
                temperature T = noise^2 / (2 step) where steps are short
    Shapes      log_density: [B,...] -> [B]; z [B,C,H,W], any finite numbers -> `steps` times the same
    Randomness  eps from `generator`
    Errors      ValueError for steps below 1, a step that is not positive, a negative noise, or z that is no picture
    """
    z = units.check_images(z, None, pixel_range=False)
    steps = units.check_whole(steps, "steps", least=1)
    step = units.check_number(step, "step", above=0)
    noise = units.check_number(noise, "noise", least=0)
    return walk(log_density, z, steps, step, noise, generator)


def walk(
    log_density: Callable[[Tensor], Tensor],
    z: Tensor,
    steps: int,
    step: float,
    noise: float,
    generator: torch.Generator,
) -> Iterator[Tensor]:
    """`langevin`, unchecked, for training: a run that diverges has chains that are no numbers."""
    for _ in range(steps):
        with torch.enable_grad():
            at = z.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(log_density(at).sum(), at)
        eps = torch.randn(z.shape, generator=generator, device=generator.device).to(z)
        z = at.detach() + step * gradient + noise * eps
        yield z


def temperature(step: float, noise: float) -> float:
    """At which temperature a walk of short steps leaves its states. Formula: noise^2 / (2 step), 1 for noise = sqrt(2 step)."""
    step = units.check_number(step, "step", above=0)
    noise = units.check_number(noise, "noise", least=0)
    return math.pow(noise, 2) / (2 * step)


# ---------------------------------------------------------------------------------------------------------------------
# Files


def described(classifier: JointClassifier) -> dict:
    """What kind of network it is and how it is built, JSON values: for its card."""
    inner = cnn.described(classifier.network)
    return dict(network="JointClassifier", inner=inner, chains=len(classifier.replay))


def save(
    classifier: JointClassifier,
    path: str | Path,
    card: dict | None = None,
    dtype: torch.dtype = torch.float32,
    chains: int | None = None,
) -> None:
    """Write weights, chains, architecture and model card as safetensors; old files survive an interruption.

    Shapes      chains: how many of the classifier's own are written, the first ones; None for all
    """
    if chains is not None and chains < len(classifier.replay):
        fewer = JointClassifier.begun(classifier.network, chains)
        fewer.replay.copy_(classifier.replay[:chains])
        classifier = fewer
    fixed = dict(image_shape=list(classifier.image_shape), num_classes=classifier.num_classes)
    weights.save_weights(classifier, described(classifier) | fixed, path, card, dtype)


def load(path: str | Path) -> tuple[JointClassifier, dict]:
    """A joint classifier and its model card from what `save` wrote, ready to be asked.

    Errors      those of `network.load_weights` and `network.filled`; ValueError for a network of another kind
    """
    path = Path(path)
    state, architecture, card = weights.load_weights(path)
    wanted = {"network", "inner", "chains", "image_shape", "num_classes"}
    if architecture.get("network") != "JointClassifier" or set(architecture) != wanted:
        raise ValueError(
            f"expected {path.name} to hold a JointClassifier, got the architecture {sorted(architecture)}; "
            "a network of another kind has a loader of its own."
        )
    own = {name: architecture["inner"][name] for name in WideClassifier.settings}
    network = WideClassifier(architecture["image_shape"], architecture["num_classes"], **own)
    classifier = JointClassifier.begun(network, architecture["chains"])
    return weights.filled(classifier, state, f"JointClassifier in {path.name}"), card
