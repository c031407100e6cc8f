"""Purify, then classify: likelihood maximisation, noising and denoising, votes. What predicts is what is attacked."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffclass import units
from diffclass.classifiers.randomised import Randomised
from diffclass.denoisers import sampling
from diffclass.denoisers.base import Denoiser

Rule = Callable[
    [list[Tensor]], Tensor
]  # the gradients of all steps so far, the last one newest -> a direction


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


class Purifier(Randomised, ABC):
    """Pixels -> pixels that the unconditional diffusion model finds more likely.

    Formula     x -> clamp((purify(2x - 1) + 1) / 2, 0, 1)
    Shapes      x [B,C,H,W] in [0,1] -> the same
    Gradient    `exact`: through every step, each recomputed in the backward pass instead of being kept. Else that of
                the identity (BPDA, Athalye et al. 2018): the same values, so only an attack can tell the difference
    Randomness  one fixed noise, drawn from `seed` and shared by all images; `with_fresh_noise` gives the random one,
                which draws for every image of every call
    """

    def __init__(self, denoiser: Denoiser, exact: bool, seed: int):
        super().__init__()
        if not denoiser.has_null:
            raise ValueError(
                "expected a denoiser that also answers without a class, which is what purifies; this "
                f"{type(denoiser).__name__} was trained without a null class."
            )
        self.denoiser = denoiser
        self.exact = exact
        self.num_classes = denoiser.num_classes
        self.image_shape = denoiser.image_shape
        self.seed = seed

    def with_gradient(self, exact: bool) -> "Purifier":
        """The same purifier, its gradient exact or that of the identity."""
        twin = self.twin()
        twin.exact = exact
        return twin

    @abstractmethod
    def draw(self, images: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """The noise of one call for `images` images; of 1 image, it is shared by all."""

    @abstractmethod
    def purify(self, z: Tensor, *noise: Tensor) -> Tensor:
        """The purified image, in model space, given the noise of `draw`. Shapes: [B,C,H,W] -> the same."""

    def noise(self, z: Tensor) -> tuple[Tensor, ...]:
        """The noise of this call, on the image's device and in its precision."""
        drawn = (
            self.draw(1, torch.Generator().manual_seed(self.seed))
            if self.deterministic
            else self.draw(len(z), self.generator)
        )
        return tuple(part.to(z) for part in drawn)

    def forward(self, x: Tensor) -> Tensor:
        """The purified image. Shapes: [B,C,H,W] in [0,1] -> the same."""
        units.check_images(x, self.image_shape)
        wanted = self.exact and torch.is_grad_enabled()
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(wanted),
        ):  # a purifier may need gradients of its own
            z = units.to_model(x)
            pure = units.to_pixel(self.purify(z, *self.noise(z))).clamp(0, 1)
        return pure if self.exact else pure + (x - x.detach())


def _recomputed(function, *arguments: Tensor):
    """function(*arguments), its inner values recomputed in the backward pass if there is going to be one."""
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
        seed: int = 0,
    ):
        super().__init__(denoiser, exact, seed)
        low, high = band
        if steps < 1 or not rate > 0 or not 0 < low <= high:
            raise ValueError(
                f"expected steps >= 1, rate > 0 and 0 < low <= high, got {steps}, {rate} and {band}."
            )
        self.budget = None if budget is None else units.check_budget(budget, "linf", 1)
        self.steps = steps
        self.rate = rate
        self.rule = rule
        self.band = band

    @classmethod
    def released(cls, denoiser: Denoiser, **options) -> "LikelihoodMaximisation":
        """As RDC's code does it: 5 steps of Adam at rate 0.1 in model space, sigma ~ U(0.4, 0.6), no active limit.

        Why         a pixel can move by about 0.25, eight times the paper's 8/255; here by name, to compare the two
        """
        return cls(denoiser, **{**dict(steps=5, rate=0.1, budget=None), **options})

    @classmethod
    def paper(
        cls, denoiser: Denoiser, budget: float = 8 / 255, steps: int = 5, **options
    ) -> "LikelihoodMaximisation":
        """As RDC's paper writes it: within an L-inf budget around the image. Units: budget in pixels.

        Why         the paper names budget and steps, not the rate: 2.5 budgets over all steps lets the limit act
        """
        return cls(
            denoiser,
            steps=steps,
            rate=units.PIXELS_TO_MODEL * 2.5 * budget / steps,
            budget=budget,
            **options,
        )

    def draw(self, images: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Levels [N,images] and noise [N,images,C,H,W] of the N steps."""
        low, high = self.band
        uniform = torch.rand((self.steps, images), generator=generator, device=generator.device)
        eps = torch.randn(
            (self.steps, images, *self.image_shape), generator=generator, device=generator.device
        )
        return low + (high - low) * uniform, eps

    def slope(self, u: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
        """g at one level: the gradient that a step follows. Shapes: [B,C,H,W], [1 or B] -> [B,C,H,W]."""
        wanted = torch.is_grad_enabled() and u.requires_grad
        with torch.enable_grad():
            u = u if wanted else u.detach().requires_grad_()
            sigma = sigma.expand(len(u))
            denoised = self.denoiser.unconditional(u + sigma[:, None, None, None] * eps, sigma)
            loss = ((denoised - u) ** 2).flatten(1).mean(1).sum()
            return torch.autograd.grad(loss, u, create_graph=wanted)[0]

    def walk(self, z: Tensor, *noise: Tensor) -> Iterator[Tensor]:
        """The image after every step, in model space, given the noise of `draw`. Shapes: [B,C,H,W] -> N of the same."""
        u = z
        gradients = []
        for sigma, eps in zip(*noise, strict=True):
            gradients.append(_recomputed(self.slope, u, sigma, eps))
            u = u - self.rate * self.rule(gradients)
            if self.budget is not None:
                reach = units.PIXELS_TO_MODEL * self.budget
                u = z + (u - z).clamp(-reach, reach)
            yield u

    def purify(self, z: Tensor, *noise: Tensor) -> Tensor:
        """See `Purifier.purify`."""
        *_, u = self.walk(z, *noise)
        return u

    def extra_repr(self) -> str:
        return (
            f"steps={self.steps}, rate={self.rate:g}, budget={self.budget}, {self.rule.__name__}, "
            f"sigma {self.band[0]:g} to {self.band[1]:g}, exact={self.exact}"
        )


class Purification(Purifier):
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
        seed: int = 0,
    ):
        super().__init__(denoiser, exact, seed)
        self.levels = sampling.karras_levels(steps, low, float(units.check_sigma(sigma)))
        self.stochastic = stochastic

    def draw(self, images: int, generator: torch.Generator) -> tuple[Tensor]:
        """Noise [steps,images,C,H,W]: one to go up, and for the SDE one a step back, but for the last step."""
        count = len(self.levels) - 1 if self.stochastic else 1
        return (
            torch.randn(
                (count, images, *self.image_shape), generator=generator, device=generator.device
            ),
        )

    def back(self, x: Tensor, level: Tensor, lower: Tensor) -> Tensor:
        """The mean of one step from `level` to `lower`. Shapes: [B,C,H,W] and two numbers -> [B,C,H,W]."""
        ratio = (lower / level) ** (2 if self.stochastic else 1)
        return ratio * x + (1 - ratio) * self.denoiser.unconditional(x, level)

    def purify(self, z: Tensor, *noise: Tensor) -> Tensor:
        """See `Purifier.purify`."""
        (eps,) = noise
        levels = self.levels.to(z)
        x = z + levels[0] * eps[0]
        for step, (level, lower) in enumerate(zip(levels[:-1], levels[1:], strict=True), start=1):
            x = _recomputed(self.back, x, level, lower)
            if self.stochastic and lower > 0:
                x = x + lower * (1 - (lower / level) ** 2).sqrt() * eps[step]
        return x

    def extra_repr(self) -> str:
        return (
            f"sigma={float(self.levels[0]):g}, steps={len(self.levels) - 1}, "
            f"{'SDE' if self.stochastic else 'ODE'}, exact={self.exact}"
        )


class Defended(nn.Module):
    """A purifier in front of a classifier: one module from pixels to logits, for predictions and attacks alike.

    Formula     f(purify(x))
    Shapes      x [B,C,H,W] in [0,1] -> logits [B,K]
    Randomness  that of its parts; `with_fresh_noise` makes both random, from one generator
    Errors      ValueError for parts that were made for different images
    """

    def __init__(self, purifier: Purifier, classifier: nn.Module):
        super().__init__()
        if tuple(purifier.image_shape) != tuple(classifier.image_shape):
            raise ValueError(
                f"expected a purifier and a classifier of the same images, got {purifier.image_shape} and "
                f"{classifier.image_shape}."
            )
        self.purifier = purifier
        self.classifier = classifier
        self.num_classes = classifier.num_classes
        self.image_shape = classifier.image_shape

    @property
    def deterministic(self) -> bool:
        """Whether two calls on the same image give the same logits."""
        return self.purifier.deterministic and getattr(self.classifier, "deterministic", True)

    def with_fresh_noise(self, generator: torch.Generator) -> "Defended":
        """The random defence: the purifier, and a classifier that can, draw their noise anew at every call."""
        own = getattr(self.classifier, "with_fresh_noise", None)
        return Defended(
            self.purifier.with_fresh_noise(generator), own(generator) if own else self.classifier
        )

    def with_gradient(self, exact: bool) -> "Defended":
        """The same defence, the gradient of its purifier exact or that of the identity (BPDA)."""
        return Defended(self.purifier.with_gradient(exact), self.classifier)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the purified image. Shapes: [B,C,H,W] -> [B,K]."""
        return self.classifier(self.purifier(x))
