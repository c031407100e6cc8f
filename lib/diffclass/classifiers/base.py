"""The one noun: a classifier, a function of pixels and of noise. What predicts is what is attacked is what is derived.

A classifier is stateless: the same pixels and the same noise give the same logits, bit for bit. All randomness is an
argument, `classifier(x, noise)`, drawn by `classifier.sample_noise`; whoever asks decides whether the noise is held
(`Held`), drawn anew at every call (`Fresh`), or drawn by a key for every picture (`draw`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffclass import units
from diffclass.denoisers.base import Denoiser
from diffclass.noise import generator_of

BLOCK = 64  # pictures that draw together

# The picture axis comes first. Floating-point parts are the noise itself; integers are one seed a picture, which `logits`
# expands piece by piece where the noise would be large. A tuple holds the noises of a classifier's parts, () is none.
Noise = Tensor | tuple
# What an attack is given: one noise for all its steps, or a function of the step and the draw.
NoiseSource = Noise | Callable[[int, int], Noise]


def each(function: Callable[[Tensor], Tensor], noise: Noise) -> Noise:
    """`function` of every tensor in a noise."""
    if isinstance(noise, tuple):
        return tuple(each(function, part) for part in noise)
    return function(noise)


def parts(noise: Noise) -> Iterator[Tensor]:
    """Every tensor in a noise, in order."""
    if isinstance(noise, tuple):
        for part in noise:
            yield from parts(part)
    else:
        yield noise


def take(noise: Noise, kept) -> Noise:
    """The noise of some pictures; what was drawn once for all of them stays as it is.

    Shapes      kept: a slice, or indices or booleans of pictures
    """
    return each(lambda part: part if len(part) == 1 else part[kept], noise)


def joined(noises: list[Noise]) -> Noise:
    """The noises of pictures, one after the other."""
    if isinstance(noises[0], tuple):
        return tuple(joined(list(same)) for same in zip(*noises, strict=True))
    return torch.cat(noises)


class UndecidedError(FloatingPointError):
    """Logits that are not finite numbers, of which no class is the largest. `kind` is "NaN" or "infinite"."""

    def __init__(self, sentence: str, kind: str):
        super().__init__(sentence)
        self.kind = kind


def check_logits(logits: Tensor) -> Tensor:
    """Return logits between which can be decided: of two classes or more, all of them finite.

    Shapes      [B,K] -> the same
    Errors      ValueError for one class; UndecidedError for NaN, whose argmax would count as a class, and for infinity of
                either sign: an overflow decides nothing, and a class that is out has a finite floor below the others
    """
    units.check_class_count(logits.shape[1])
    if not bool(torch.isfinite(logits.detach()).all()):
        kind = "NaN" if bool(torch.isnan(logits.detach()).any()) else "infinite"
        rows = int((~torch.isfinite(logits.detach())).any(1).sum())
        raise UndecidedError(
            f"the classifier's logits became {kind} and cannot be judged, for {rows} of {len(logits)} pictures; are its "
            "weights finite? Infinity minus infinity, 0/0 or an overflow in it is the other likely cause.",
            kind,
        )
    return logits


def decided(logits: Tensor) -> Tensor:
    """The class of the largest logit: the only way from logits to classes. Shapes: [B,K] -> [B].

    Errors      those of `check_logits`
    """
    return check_logits(logits).argmax(1)


def on_device_of(x: Tensor, noise: Noise) -> Noise:
    """The noise on the device and in the precision of the pictures; seeds stay integers, on the CPU."""
    return each(lambda part: part.to(x) if part.is_floating_point() else part, noise)


class Classifier(nn.Module, ABC):
    """Pixels in [0,1] and noise -> logits of K classes. Subclasses are final.

    Formula     logits = f(x, noise), the same for predictions, attacks and derivations
    Shapes      x [B,C,H,W], noise of B pictures or of one for all of them -> [B,K]
    Units       `scale` says what logits are: "nats" (log-probabilities up to a constant), "scores" or "votes"
    Randomness  none: `sample_noise` draws it, and `forward` is given it

    What others may ask of it is declared here and nowhere probed: `gradients`, `surrogate`, `routes`, `prior`,
    `level_counts` and `at_levels`, `eot` (draws that an honest attack averages), `sigma_pixel` (the noise that its pictures carry, which may
    then leave [0,1]) and `calls`.
    """

    num_classes: int
    image_shape: tuple[int, int, int]
    sigma_pixel: float | None = None
    scale: str = "nats"
    eot: int = 1

    def sample_noise(self, images: int, generator: torch.Generator) -> Noise:
        """All the randomness of `images` pictures, the picture axis first; () for a deterministic classifier."""
        return ()

    @abstractmethod
    def logits(self, x: Tensor, noise: Noise) -> Tensor:
        """Logits of checked pictures and checked noise. Shapes: [B,C,H,W], noise of B or 1 pictures -> [B,K]."""

    def billed(self, x: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        """`logits`, and how many network calls each picture took: all of `calls`, where the pictures do not decide it.

        Shapes      as `logits` -> [B,K], [B] of dtype long
        """
        return self.logits(x, noise), torch.full((len(x),), self.calls)

    @final
    def forward(self, x: Tensor, noise: Noise = ()) -> Tensor:
        """Logits. Shapes: x [B,C,H,W], noise of B pictures or of one for all -> [B,K].

        Errors      those of `units.check_images`, of `check_logits`; ValueError for a noise that was not drawn for these
                    pictures
        """
        prepared = self.prepared(x, noise)
        if not len(x):
            return x.new_zeros(0, self.num_classes)
        return check_logits(self.logits(x, prepared))

    def prepared(self, x: Tensor, noise: Noise) -> Noise:
        """Checks pictures and noise; the noise, on the device and in the precision of the pictures."""
        self.checked(x)
        return on_device_of(x, self.checked_noise(noise, len(x)))

    def checked(self, x: Tensor) -> Tensor:
        """Return pictures that this classifier can be asked about. Errors: those of `units.check_images`."""
        return units.check_images(x, self.image_shape, pixel_range=self.sigma_pixel is None)

    def checked_noise(self, noise: Noise, images: int) -> Noise:
        """Return a noise of the shapes that `sample_noise` draws, of `images` pictures or of one for all of them.

        Errors      ValueError that says what was expected
        """
        wanted = self.sample_noise(0, torch.Generator())
        if not _alike(wanted, noise):
            raise ValueError(
                f"expected noise of shape {_spoken(wanted)} for {type(self).__name__}, got {_spoken(noise)}; draw it "
                "with classifier.sample_noise(pictures, generator), or ask Held.seeded(classifier)."
            )
        lengths = {len(part) for part in parts(noise)}
        if not lengths <= {1, images}:
            raise ValueError(
                f"expected noise for {images} pictures, or one noise for all of them, got noise for "
                f"{' and '.join(map(str, sorted(lengths)))}."
            )
        return noise

    @property
    def deterministic(self) -> bool:
        """Whether the classifier has no noise at all."""
        return next(parts(self.sample_noise(0, torch.Generator())), None) is None

    def gradients(self) -> dict[str, "Classifier"]:
        """The same values by other gradients: "exact", and "bpda" for purifiers; empty where there is none (votes)."""
        return {"exact": self}

    def surrogate(self) -> "Classifier":
        """What an attack climbs in place of this one, given this one's noise; itself unless it counts votes."""
        return self

    def routes(self) -> dict[str, "Classifier"]:
        """Other ways to attack it, by name: each takes this one's noise, or has none."""
        return {}

    def prior(self) -> tuple[Denoiser, tuple[float, float]] | None:
        """The denoiser whose unconditional loss it lowers before it classifies, and between which levels (model units)."""
        return None

    @property
    def level_counts(self) -> tuple[int, ...]:
        """Other numbers of noise levels, or steps, in which `at_levels` gives the same classifier."""
        return ()

    def at_levels(self, count: int) -> "Classifier":
        """The same classifier with another number of noise levels, or steps: one of `level_counts`."""
        raise ValueError(
            f"{type(self).__name__} has no noise levels or steps, so none can be left out, got {count}."
        )

    @property
    @abstractmethod
    def calls(self) -> int:
        """How many network calls one picture costs at most."""

    def complaints(self, x: Tensor) -> list[str]:
        """What speaks against measuring this classifier, one sentence each: `evaluate` refuses, the audit shows them.

        Shapes      x [B,C,H,W] in [0,1], a few pictures
        """
        try:
            self.check_mode()
        except ValueError as error:
            return [str(error)]
        return []

    def check_mode(self) -> None:
        """Raise a ValueError if a part is in training mode that may answer by chance there, or change under questions.

        Why         modules begin in training mode, which says nothing of a wrapper, nor of a layer such as a softmax: the
                    layers with weights decide, dropout, and other people's code
        """
        for name, part in self.named_modules():
            if part.training and _depends_on_mode(part):
                raise ValueError(
                    "expected a classifier in eval mode, got one in training mode, which changes under questions "
                    f"(its {name or type(part).__name__}); call .eval()."
                )

    def posterior(self, x: Tensor, noise: Noise = ()) -> Tensor:
        """p(y | x), where logits are in nats. Shapes: x [B,C,H,W] in [0,1] -> [B,K], rows sum to 1."""
        return torch.softmax(self(x, noise), dim=1)


# Layers of torch without weights, or with parts, that answer otherwise in training mode.
_DEPENDENT = (
    nn.modules.dropout._DropoutNd,
    nn.modules.batchnorm._NormBase,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RReLU,
)


def _depends_on_mode(part: nn.Module) -> bool:
    """Whether a module by itself, its parts aside, may be another function in training mode; classifiers are stateless."""
    if isinstance(part, (Classifier, Denoiser)):
        return False
    layer = not list(part.children()) and bool([*part.parameters(), *part.buffers()])
    plain = type(part).__module__.startswith(("torch.nn.modules.", "diffclass."))
    return layer or not plain or isinstance(part, _DEPENDENT)


def _alike(wanted: Noise, noise: Noise) -> bool:
    """Whether two noises have the same structure and shapes, the picture axis aside."""
    if isinstance(wanted, tuple) or isinstance(noise, tuple):
        return (
            isinstance(wanted, tuple)
            and isinstance(noise, tuple)
            and len(wanted) == len(noise)
            and all(map(_alike, wanted, noise))
        )
    return (
        isinstance(noise, Tensor)
        and noise.ndim == wanted.ndim
        and noise.shape[1:] == wanted.shape[1:]
        and noise.is_floating_point() == wanted.is_floating_point()
    )


def _spoken(noise: Noise) -> str:
    if isinstance(noise, tuple):
        return f"({', '.join(map(_spoken, noise))})"
    if not isinstance(noise, Tensor):
        return type(noise).__name__
    kind = "" if noise.is_floating_point() else " of seeds"
    return f"[{','.join(['B', *map(str, noise.shape[1:])])}]{kind}"


# ---------------------------------------------------------------------------------------------------------------------
# Who draws the noise


def block_noise(classifier: Classifier, block: int, seed: int, *purpose) -> Noise:
    """The noise of one whole block of 64 pictures, by a key of its own."""
    return classifier.sample_noise(BLOCK, generator_of(seed, *purpose, block))


def draw(classifier: Classifier, images: int, seed: int, *purpose) -> Noise:
    """The noise of `images` pictures by a key, in whole blocks of 64 pictures, each block from a key of its own.

    Randomness  (seed, purpose, block) alone: neither a batch size nor how many pictures follow changes a picture's noise
    """
    images = units.check_whole(images, "images", least=0)
    count = max(1, -(-images // BLOCK))
    blocks = [block_noise(classifier, block, seed, *purpose) for block in range(count)]
    return each(lambda part: part[:images], joined(blocks))


def fresh_noise(
    classifier: Classifier, images: int, seed: int, *purpose, kept=slice(None)
) -> NoiseSource:
    """New noise for every step and draw of an attack, each picture its own, as `draw` does it; `kept` selects pictures."""
    return lambda step, number: take(draw(classifier, images, seed, *purpose, step, number), kept)


class Held(Classifier):
    """A classifier with one noise, the same for every picture and call: a deterministic function of the pixels alone.

    Shapes      x [B,C,H,W] -> [B,K]
    Why         it repeats, pickles, and is what other people's attacks and the audit can be given
    Errors      ValueError for the noise of more than one picture: a library that drops fooled pictures would mix them up
    """

    def __init__(self, classifier: Classifier, noise: Noise):
        super().__init__()
        self.classifier = classifier
        self.noise = classifier.checked_noise(noise, 1)
        self.num_classes = classifier.num_classes
        self.image_shape = classifier.image_shape
        self.sigma_pixel = classifier.sigma_pixel
        self.scale = classifier.scale

    @classmethod
    def seeded(cls, classifier: Classifier, seed: int = 0) -> "Held":
        """The classifier with the noise that a seed gives."""
        generator = torch.Generator().manual_seed(units.check_whole(seed, "a seed", most=None))
        return cls(classifier, classifier.sample_noise(1, generator))

    def logits(self, x: Tensor, noise: Noise) -> Tensor:
        """See `Classifier.logits`."""
        return self.classifier.logits(x, on_device_of(x, self.noise))

    def gradients(self) -> dict[str, Classifier]:
        """See `Classifier.gradients`."""
        return {
            name: Held(other, self.noise) for name, other in self.classifier.gradients().items()
        }

    def surrogate(self) -> Classifier:
        """See `Classifier.surrogate`."""
        return Held(self.classifier.surrogate(), self.noise)

    def routes(self) -> dict[str, Classifier]:
        """See `Classifier.routes`."""
        return {
            name: route if route.deterministic else Held(route, self.noise)
            for name, route in self.classifier.routes().items()
        }

    def prior(self) -> tuple[Denoiser, tuple[float, float]] | None:
        """See `Classifier.prior`."""
        return self.classifier.prior()

    @property
    def calls(self) -> int:
        """See `Classifier.calls`."""
        return self.classifier.calls


class Fresh(nn.Module):
    """A classifier that draws new noise for every picture of every call: a random function of the pixels alone.

    Shapes      x [B,C,H,W] -> [B,K]
    Randomness  `generator`, which advances; nothing is promised across batch sizes
    """

    def __init__(self, classifier: Classifier, generator: torch.Generator):
        super().__init__()
        self.classifier = classifier
        self.generator = generator
        self.num_classes = classifier.num_classes
        self.image_shape = classifier.image_shape

    def forward(self, x: Tensor) -> Tensor:
        """Logits under noise that was never drawn before. Shapes: [B,C,H,W] -> [B,K]."""
        self.classifier.checked(x)
        return self.classifier(x, self.classifier.sample_noise(len(x), self.generator))


def flop(classifier: Classifier) -> int:
    """FLOP of one picture, counted by torch while it is classified; two for a multiply-add.

    Why         attention is counted only where it is written out as matrix products
    """
    parameter = next(classifier.parameters(), torch.zeros(()))
    picture = torch.full((1, *classifier.image_shape), 0.5).to(parameter)
    noise = classifier.sample_noise(1, torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        classifier(picture, noise)
    return counter.get_total_flops()
