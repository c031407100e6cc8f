"""Purify, then classify: likelihood maximisation, noising and denoising, or denoising alone, in front of a classifier."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from diffclass import units
from diffclass.classifiers.base import Classifier, Noise, each, on_device_of, parts
from diffclass.classifiers.bayes import check_level_count, half_and_double
from diffclass.classifiers.noised import carried_sigma, check_clean
from diffclass.denoisers import sampling
from diffclass.denoisers.base import Denoiser

# the gradients of all steps so far, the last one newest -> a direction
Rule = Callable[[list[Tensor]], Tensor]


def plain_direction(gradients: list[Tensor]) -> Tensor:
    """Gradient descent. Formula: g_n. Shapes: n tensors [B,C,H,W] -> [B,C,H,W]."""
    return gradients[-1]


def adam_direction(
    gradients: list[Tensor], beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8
) -> Tensor:
    """Adam's direction after n steps, as a function of all n gradients, so that it can be differentiated.

    Formula     m / (sqrt(v) + epsilon),  m = sum_i (1 - b1) b1^(n-i) g_i / (1 - b1^n),  v the same of g_i^2 with b2
    Source      Kingma & Ba 2015
    Shapes      n tensors [B,C,H,W] -> [B,C,H,W]; each entry is about 1 in size, whatever the size of the gradients
    """
    mean = torch.zeros_like(gradients[0])
    square = torch.zeros_like(gradients[0])
    for gradient in gradients:
        mean = beta1 * mean + (1 - beta1) * gradient
        square = beta2 * square + (1 - beta2) * gradient**2
    count = len(gradients)
    mean = mean / (1 - beta1**count)
    square = square / (1 - beta2**count)
    tiny = torch.finfo(
        square.dtype
    ).tiny  # the root has no slope at 0, where a pixel's gradients all vanish
    return mean / (square.clamp_min(tiny).sqrt() + epsilon)


class Purifier(nn.Module, ABC):
    """Pixels and noise -> pixels that the unconditional diffusion model finds more likely.

    Formula     x -> clamp((purify(2x - 1, noise) + 1) / 2, 0, 1)
    Shapes      x [B,C,H,W] in [0,1], noise of B pictures or of one for all -> [B,C,H,W]
    Gradient    `exact`: through every step, each recomputed in the backward pass instead of being kept. Else that of
                the identity (BPDA, Athalye et al. 2018): the same values, so only an attack can tell the difference
    Randomness  `sample_noise`
    Noise       `sigma_pixel`: what its pictures carry, which may then leave [0,1]; None for clean pictures
    """

    sigma_pixel: float | None = None

    def __init__(self, denoiser: Denoiser, exact: bool):
        super().__init__()
        if not denoiser.has_null:
            raise ValueError(
                "expected a denoiser that also answers without a class, which is what purifies; this "
                f"{type(denoiser).__name__} was trained without a null class."
            )
        self.denoiser = denoiser
        self.exact = exact
        self.image_shape = denoiser.image_shape

    @abstractmethod
    def sample_noise(self, images: int, generator: torch.Generator) -> Noise:
        """All the randomness of `images` pictures, the picture axis first."""

    @abstractmethod
    def purify(self, z: Tensor, noise: Noise) -> Tensor:
        """The purified image in model space. Shapes: z [B,C,H,W], noise of B or 1 pictures -> [B,C,H,W]."""

    @abstractmethod
    def changed(self, **options) -> Self:
        """The same purifier with other options of its constructor."""

    @property
    @abstractmethod
    def calls(self) -> int:
        """How many network calls one picture costs."""

    @property
    def maximised(self) -> tuple[float, float] | None:
        """Between which levels (model units) the unconditional loss is lowered; None where it is not what is lowered."""
        return None

    @property
    def level_counts(self) -> tuple[int, ...]:
        """Other numbers of steps that an attacker may use."""
        return ()

    def forward(self, x: Tensor, noise: Noise) -> Tensor:
        """The purified image. Shapes: x [B,C,H,W] -> the same, in [0,1]."""
        units.check_images(x, self.image_shape, pixel_range=self.sigma_pixel is None)
        wanted = self.exact and torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(wanted):
            own = _for_autograd(x)  # a purifier may need gradients of its own
            z = self.purify(units.to_model(own), each(_for_autograd, on_device_of(own, noise)))
            pure = units.to_pixel(z).clamp(0, 1)
        return pure if self.exact else pure + (x - x.detach())


def _for_autograd(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one that was made under torch.inference_mode, which no gradient may pass."""
    return tensor.clone() if tensor.is_inference() else tensor


def _recomputed(function, *arguments: Tensor):
    """function(*arguments), its inner values recomputed in the backward pass if there is going to be one.

    Why         all noise is an argument; a function that drew its own would be differentiated under other noise
    """
    if torch.is_grad_enabled() and any(a.requires_grad for a in arguments):
        return checkpoint(function, *arguments, use_reentrant=False)
    return function(*arguments)


class LikelihoodMaximisation(Purifier):
    """A few steps down the unconditional diffusion loss at one random level each (RDC's first stage).

    Formula     u <- project(u - rate * direction(g_1..g_n)),  g = grad_u ||D(u + sigma eps, sigma) - u||^2 / D,
                sigma ~ U(low, high); the gradient passes through both occurrences of u
    Source      Chen et al. 2024 (RDC), likelihood maximisation
    Units       budget (L-inf, None for no limit) in pixels; rate, low and high in model units
    Meaning     by the pointwise identity it raises log p_low - log p_high, a band of the likelihood, not log p itself
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        steps: int = 5,
        rate: float = 0.1,
        budget: float | None = None,
        rule: Rule = adam_direction,
        band: tuple[float, float] = (0.4, 0.6),
        exact: bool = True,
    ):
        super().__init__(denoiser, exact)
        ends = units.check_numbers(band, "a band of noise levels").flatten().tolist()
        if len(ends) != 2:
            raise ValueError(f"expected a band of two noise levels, got {band}.")
        low, high = ends
        steps = units.check_whole(steps, "steps")
        rate = units.check_number(rate, "a rate")
        if steps < 1 or not rate > 0 or not 0 < low <= high:
            raise ValueError(
                f"expected steps >= 1, rate > 0 and 0 < low <= high, got {steps}, {rate} and {band}."
            )
        self.budget = None if budget is None else units.check_budget(budget, "linf", 1)
        self.steps = steps
        self.rate = rate
        self.rule = rule
        self.band = (low, high)

    @classmethod
    def released(cls, denoiser: Denoiser, **options) -> "LikelihoodMaximisation":
        """As RDC's code does it: 5 steps of Adam at rate 0.1 in model space, sigma ~ U(0.4, 0.6), no active limit.

        Why         a pixel can move by up to 0.2511, as Adam's five directions sum to at most 5.0225, which is eight times the
                    paper's 8/255; here by name, to compare the two
        """
        return cls(denoiser, **{**dict(steps=5, rate=0.1, budget=None), **options})

    @classmethod
    def paper(
        cls, denoiser: Denoiser, budget: float = 8 / 255, steps: int = 5, **options
    ) -> "LikelihoodMaximisation":
        """As RDC's paper writes it: within an L-inf budget around the image. Units: budget in pixels.

        Why         the paper names budget and steps, not the rate: 2.5 budgets over all steps lets the limit act
        """
        budget = units.check_budget(budget, "linf", 1)
        steps = units.check_whole(steps, "steps", least=1)
        rate = units.PIXELS_TO_MODEL * 2.5 * budget / steps
        return cls(denoiser, steps=steps, rate=rate, budget=budget, **options)

    def sample_noise(self, images: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Levels [images,N] and noise [images,N,C,H,W] of the N steps."""
        low, high = self.band
        device = generator.device
        uniform = torch.rand((self.steps, images), generator=generator, device=device)
        shape = (self.steps, images, *self.image_shape)
        eps = torch.randn(shape, generator=generator, device=device)
        return (low + (high - low) * uniform).movedim(1, 0), eps.movedim(1, 0)

    def slope(self, u: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
        """g at one level: the gradient that a step follows. Shapes: [B,C,H,W], [1 or B] -> [B,C,H,W]."""
        wanted = torch.is_grad_enabled() and u.requires_grad
        # the fused attention of torch has no second derivative
        attention = sdpa_kernel(SDPBackend.MATH) if wanted else nullcontext()
        with torch.enable_grad(), attention:
            u = u if wanted else u.detach().requires_grad_()
            sigma = sigma.expand(len(u))
            denoised = self.denoiser.unconditional(u + sigma[:, None, None, None] * eps, sigma)
            loss = ((denoised - u) ** 2).flatten(1).mean(1).sum()
            return torch.autograd.grad(loss, u, create_graph=wanted)[0]

    def walk(self, z: Tensor, noise: Noise) -> Iterator[Tensor]:
        """The image after every step, in model space. Shapes: z [B,C,H,W] -> N of the same."""
        levels, draws = noise
        u = z
        gradients = []
        for sigma, eps in zip(levels.unbind(1), draws.unbind(1), strict=True):
            gradients.append(_recomputed(self.slope, u, sigma, eps))
            u = u - self.rate * self.rule(gradients)
            if self.budget is not None:
                reach = units.PIXELS_TO_MODEL * self.budget
                u = z + (u - z).clamp(-reach, reach)
            yield u

    def purify(self, z: Tensor, noise: Noise) -> Tensor:
        """See `Purifier.purify`."""
        *_, u = self.walk(z, noise)
        return u

    def changed(self, **options) -> "LikelihoodMaximisation":
        """See `Purifier.changed`."""
        own = dict(
            steps=self.steps,
            rate=self.rate,
            budget=self.budget,
            rule=self.rule,
            band=self.band,
            exact=self.exact,
        )
        return LikelihoodMaximisation(self.denoiser, **{**own, **options})

    @property
    def maximised(self) -> tuple[float, float]:
        """See `Purifier.maximised`: the band of its steps."""
        return self.band

    @property
    def level_counts(self) -> tuple[int, ...]:
        """Half and twice as many steps."""
        return half_and_double(self.steps)

    @property
    def calls(self) -> int:
        """See `Purifier.calls`; a step goes forward and back, counted as one call."""
        return self.steps

    def extra_repr(self) -> str:
        return (
            f"steps={self.steps}, rate={self.rate:g}, budget={self.budget}, {self.rule.__name__}, "
            f"sigma {self.band[0]:g} to {self.band[1]:g}, exact={self.exact}"
        )


class _ReverseWalk(Purifier):
    """What purifiers have in common that walk back from a noise level with the unconditional denoiser."""

    def __init__(
        self,
        denoiser: Denoiser,
        sigma: float,
        *,
        steps: int,
        stochastic: bool,
        low: float,
        exact: bool,
    ):
        super().__init__(denoiser, exact)
        self.sigma = sigma
        self.levels = sampling.karras_levels(steps, low, sigma)
        self.low = low
        self.stochastic = stochastic

    def options(self) -> dict:
        """What the constructor was given, but for the denoiser and the noise."""
        return dict(
            steps=len(self.levels) - 1,
            stochastic=self.stochastic,
            low=self.low,
            exact=self.exact,
        )

    def drawn(self, images: int, count: int, generator: torch.Generator) -> Tensor:
        """Noise of some steps. Shapes: -> [images,count,C,H,W]."""
        shape = (count, images, *self.image_shape)
        return torch.randn(shape, generator=generator, device=generator.device).movedim(1, 0)

    def back(self, x: Tensor, level: Tensor, lower: Tensor) -> Tensor:
        """The mean of one step from `level` to `lower`. Shapes: [B,C,H,W] and two numbers -> [B,C,H,W]."""
        ratio = (lower / level) ** (2 if self.stochastic else 1)
        return ratio * x + (1 - ratio) * self.denoiser.unconditional(x, level)

    def walked(self, x: Tensor, noise: Tensor) -> Tensor:
        """All steps from a noised image. Shapes: x [B,C,H,W], noise of B or 1 pictures [.,steps-1,C,H,W] -> as x."""
        levels = self.levels.to(x)
        for step, (level, lower) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
            x = _recomputed(self.back, x, level, lower)
            if self.stochastic and lower > 0:
                x = x + lower * (1 - (lower / level) ** 2).sqrt() * noise[:, step]
        return x

    @property
    def calls(self) -> int:
        """See `Purifier.calls`."""
        return len(self.levels) - 1

    def extra_repr(self) -> str:
        return (
            f"sigma={self.sigma:g}, steps={len(self.levels) - 1}, "
            f"{'SDE' if self.stochastic else 'ODE'}, exact={self.exact}"
        )


class Purification(_ReverseWalk):
    """Noise the image up to sigma, then walk back with the unconditional denoiser (DiffPure, variance-exploding form).

    Formula     x <- z + sigma eps; then for each level s and the next s', r = s'/s:
                ODE  x <- r x + (1 - r) D(x, s)
                SDE  x <- r^2 x + (1 - r^2) D(x, s) + s' sqrt(1 - r^2) eps
    Source      Nie et al. 2022; levels of Karras et al. 2022; the SDE step is the chain's exact posterior given x0 = D
    Units       sigma and low in model units; 0.5 corresponds to DiffPure's t* = 0.15, 0.34 to its 0.1
    """

    def __init__(
        self,
        denoiser: Denoiser,
        sigma: float = 0.5,
        *,
        steps: int = 10,
        stochastic: bool = True,
        low: float = 0.05,
        exact: bool = True,
    ):
        super().__init__(
            denoiser,
            float(units.check_sigma(sigma)),
            steps=steps,
            stochastic=stochastic,
            low=low,
            exact=exact,
        )

    def sample_noise(self, images: int, generator: torch.Generator) -> Tensor:
        """Noise [images,steps,C,H,W]: one to go up, and for the SDE one a step back, but for the last step."""
        return self.drawn(images, self.calls if self.stochastic else 1, generator)

    def purify(self, z: Tensor, noise: Noise) -> Tensor:
        """See `Purifier.purify`."""
        return self.walked(z + self.levels.to(z)[0] * noise[:, 0], noise[:, 1:])

    def changed(self, **options) -> "Purification":
        """See `Purifier.changed`."""
        own = dict(sigma=self.sigma, **self.options())
        return Purification(self.denoiser, **{**own, **options})


class Restoration(_ReverseWalk):
    """Walk a picture that already carries noise back to a clean one with the unconditional denoiser (DensePure's walk).

    Formula     x <- z_tau;  then the steps of `Purification` from sigma_tau = 2 sigma_pixel on
    Meaning     by the SDE a draw from p(x0 | x_tau), as good as the denoiser and the number of steps; in expectation what
                `Denoising` answers at once. Several walks differ, and their classes vote (`MajorityVote`)
    Source      Xiao et al. 2023 (DensePure): 10 strided steps of the reverse chain, 40 walks; after Nie et al. 2022
    Shapes      x_tau [B,C,H,W], pixels plus noise, any finite value -> the same, in [0,1]
    Units       sigma_pixel in pixels; low in model units
    Errors      those of `carried_sigma`; ValueError for a noise that lies no higher than the last step
    """

    def __init__(
        self,
        denoiser: Denoiser,
        sigma_pixel: float,
        *,
        steps: int = 10,
        stochastic: bool = True,
        low: float = 0.05,
        exact: bool = True,
    ):
        sigma_tau = carried_sigma(denoiser, sigma_pixel)
        low = float(denoiser.check_levels(units.check_sigma(low)))
        if not low < sigma_tau:
            raise ValueError(
                f"expected a smoothing noise sigma_pixel above {units.sigma_to_pixel(low):.4g}, where the last step starts "
                f"({low:.4g} in model units), got {units.sigma_to_pixel(sigma_tau):.4g}; there is no way to walk, so denoise "
                "at once, by Denoising."
            )
        super().__init__(
            denoiser, sigma_tau, steps=steps, stochastic=stochastic, low=low, exact=exact
        )
        self.sigma_pixel = units.sigma_to_pixel(sigma_tau)

    def sample_noise(self, images: int, generator: torch.Generator) -> Tensor | tuple:
        """Noise [images,steps-1,C,H,W] of all steps but the last; none of the ODE."""
        return self.drawn(images, self.calls - 1, generator) if self.stochastic else ()

    def purify(self, z: Tensor, noise: Noise) -> Tensor:
        """See `Purifier.purify`."""
        return self.walked(z, noise)

    def changed(self, **options) -> "Restoration":
        """See `Purifier.changed`."""
        own = dict(sigma_pixel=self.sigma_pixel, **self.options())
        return Restoration(self.denoiser, **{**own, **options})

    @property
    def level_counts(self) -> tuple[int, ...]:
        """Half and twice as many steps."""
        return tuple(count for count in half_and_double(self.calls) if count >= 2)


class Denoising(Purifier):
    """Denoise a picture that already carries noise at once (denoised smoothing).

    Formula     x <- D(z_tau, sigma_tau),  sigma_tau = 2 sigma_pixel: the mean of all clean pictures that x_tau may come from
    Source      Salman et al. 2020; Carlini et al. 2023, with the denoiser of a diffusion model
    Shapes      x_tau [B,C,H,W], pixels plus noise, any finite value -> the same, in [0,1]
    Randomness  none
    Units       sigma_pixel in pixels
    Errors      those of `carried_sigma`
    """

    def __init__(self, denoiser: Denoiser, sigma_pixel: float, *, exact: bool = True):
        super().__init__(denoiser, exact)
        self.sigma = carried_sigma(denoiser, sigma_pixel)
        self.sigma_pixel = units.sigma_to_pixel(self.sigma)

    def sample_noise(self, images: int, generator: torch.Generator) -> tuple:
        """None."""
        return ()

    def purify(self, z: Tensor, noise: Noise) -> Tensor:
        """See `Purifier.purify`."""
        return self.denoiser.unconditional(z, self.sigma)

    def changed(self, **options) -> "Denoising":
        """See `Purifier.changed`."""
        own = dict(sigma_pixel=self.sigma_pixel, exact=self.exact)
        return Denoising(self.denoiser, **{**own, **options})

    @property
    def calls(self) -> int:
        """See `Purifier.calls`."""
        return 1

    def extra_repr(self) -> str:
        return f"sigma_pixel={self.sigma_pixel:g}, exact={self.exact}"


class PurifiedClassifier(Classifier):
    """A purifier in front of a classifier: one function from pixels to logits, for predictions and attacks alike.

    Formula     f(purify(x, noise_1), noise_2)
    Shapes      x [B,C,H,W] in [0,1], or with the noise `sigma_pixel` of the purifier's pictures; noise: the purifier's and
                the classifier's -> logits [B,K]
    Errors      ValueError for parts that were made for different images, or a classifier whose pictures carry noise
    """

    def __init__(self, purifier: Purifier, classifier: Classifier, eot: int = 1):
        super().__init__()
        if tuple(purifier.image_shape) != tuple(classifier.image_shape):
            raise ValueError(
                f"expected a purifier and a classifier of the same images, got {purifier.image_shape} and "
                f"{classifier.image_shape}."
            )
        check_clean(classifier)
        self.purifier = purifier
        self.classifier = classifier
        self.sigma_pixel = purifier.sigma_pixel
        self.num_classes = classifier.num_classes
        self.image_shape = classifier.image_shape
        self.scale = classifier.scale
        self.eot = eot

    def sample_noise(self, images: int, generator: torch.Generator) -> Noise:
        """The noise of the purifier, and that of the classifier behind it; () where neither has one."""
        first = self.purifier.sample_noise(images, generator)
        both = (first, self.classifier.sample_noise(images, generator))
        return both if any(True for _ in parts(both)) else ()

    def logits(self, x: Tensor, noise: Noise) -> Tensor:
        """See `Classifier.logits`."""
        first, then = noise or ((), ())
        return self.classifier.logits(self.purifier(x, first), then)

    def with_gradient(self, exact: bool) -> "PurifiedClassifier":
        """The same values, the gradient of the purifier exact or that of the identity (BPDA)."""
        return PurifiedClassifier(self.purifier.changed(exact=exact), self.classifier, self.eot)

    def before(self, classifier: Classifier) -> "PurifiedClassifier":
        """The same purifier in front of another classifier, which takes the same noise."""
        return PurifiedClassifier(self.purifier, classifier, self.eot)

    def gradients(self) -> dict[str, Classifier]:
        """See `Classifier.gradients`: this purifier's and, where another stands behind it, that one's by the same name."""
        behind = self.classifier.gradients()
        if not behind:
            return {}
        straight = behind.get("bpda", behind["exact"])
        return {
            "exact": self.before(behind["exact"]).with_gradient(True),
            "bpda": self.before(straight).with_gradient(False),
        }

    def surrogate(self) -> Classifier:
        """See `Classifier.surrogate`: that of the classifier behind the purifier."""
        if self.classifier.gradients():
            return self
        return self.before(self.classifier.surrogate())

    def routes(self) -> dict[str, Classifier]:
        """The gradient of the identity, and the classifier behind the purifier."""
        return {
            "the identity's gradient (BPDA)": self.with_gradient(False),
            "the classifier alone": _Behind(self),
        }

    def prior(self) -> tuple[Denoiser, tuple[float, float]] | None:
        """See `Classifier.prior`: the purifier's, if it maximises a likelihood."""
        band = self.purifier.maximised
        return None if band is None else (self.purifier.denoiser, band)

    @property
    def level_counts(self) -> tuple[int, ...]:
        """Other numbers of steps of the purifier."""
        return self.purifier.level_counts

    def at_levels(self, count: int) -> "PurifiedClassifier":
        """The same classifier behind a purifier of `count` steps."""
        check_level_count(self, count)
        return PurifiedClassifier(self.purifier.changed(steps=count), self.classifier, self.eot)

    @property
    def calls(self) -> int:
        """See `Classifier.calls`."""
        return self.purifier.calls + self.classifier.calls


class _Behind(Classifier):
    """The classifier behind a purifier, given the noise of both."""

    def __init__(self, whole: PurifiedClassifier):
        super().__init__()
        self.whole = whole
        self.sigma_pixel = whole.sigma_pixel
        self.num_classes = whole.num_classes
        self.image_shape = whole.image_shape
        self.scale = whole.scale

    def sample_noise(self, images: int, generator: torch.Generator) -> Noise:
        """See `Classifier.sample_noise`."""
        return self.whole.sample_noise(images, generator)

    def logits(self, x: Tensor, noise: Noise) -> Tensor:
        """See `Classifier.logits`."""
        _, then = noise or ((), ())
        return self.whole.classifier.logits(x, then)

    def gradients(self) -> dict[str, Classifier]:
        """See `Classifier.gradients`: those of the classifier."""
        behind = self.whole.classifier.gradients()
        return {name: _Behind(self.whole.before(other)) for name, other in behind.items()}

    def surrogate(self) -> Classifier:
        """See `Classifier.surrogate`: that of the classifier."""
        if self.whole.classifier.gradients():
            return self
        return _Behind(self.whole.before(self.whole.classifier.surrogate()))

    @property
    def calls(self) -> int:
        """See `Classifier.calls`."""
        return self.whole.classifier.calls
