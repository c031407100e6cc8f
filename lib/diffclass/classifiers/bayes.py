"""Bayes' rule on per-class diffusion losses, and on exact densities: pixels in [0,1] -> logits in nats."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffclass import likelihood, noise, units
from diffclass.classifiers.base import Classifier, Noise
from diffclass.classifiers.stand_in import StandIn
from diffclass.denoisers.base import Denoiser
from diffclass.noise import Levels, NoiseBank, Weighting

TELESCOPED = 8  # draws behind the telescoped gradient


def check_prior(prior, num_classes: int) -> Tensor:
    """Return a prior over K classes as log-probabilities [K], uniform for None; raise if it is not a distribution."""
    if prior is None:
        prior = torch.full((num_classes,), 1 / num_classes, dtype=torch.float64)
    prior = units.check_reals(prior, "a prior").double()
    if tuple(prior.shape) != (num_classes,):
        raise ValueError(f"expected a prior over {num_classes} classes, got {list(prior.shape)}.")
    positive = bool(torch.isfinite(prior).all()) and float(prior.min()) > 0
    if not positive or abs(float(prior.sum()) - 1) > 1e-6:
        raise ValueError(
            f"expected a prior of positive probabilities that sum to 1, got {prior.tolist()} with sum "
            f"{float(prior.sum()):.6g}; divide it by its sum."
        )
    return prior.log()


def sampled_bank(shape: tuple[int, ...], images: int, generator: torch.Generator) -> Tensor:
    """Noise at T levels, S samples each. Shapes: (T, S, C, H, W) -> [images,T,S,C,H,W].

    Why         it is drawn level by level, as the noise of stored records was, and then seen from the picture's side
    """
    levels, samples, *image_shape = shape
    drawn = torch.randn(
        (levels, samples, images, *image_shape), generator=generator, device=generator.device
    )
    return drawn.movedim(2, 0)


def bank_of(levels: Levels, drawn: Tensor) -> NoiseBank:
    """The noise of a classifier's pictures as the bank that likelihoods are given."""
    return NoiseBank(levels, drawn.movedim(0, 2))


class BayesClassifier(Classifier):
    """p(y | x) from the per-class diffusion losses, by Bayes' rule.

    Formula     logit_k(x) = ELBO_k(2x - 1) / temperature + C_k + ln prior_k,   p(y | x) = softmax(logits)
    Source      Li et al. 2023; Chen et al. 2024 (RDC), Theorem 3.1
    Shapes      x [B,C,H,W] in [0,1], noise [B or 1,T,S,C,H,W] -> logits [B,K] in nats, up to a constant shared by the
                classes
    Randomness  `sample_noise`: S samples at each of T levels, shared by the classes
    """

    def __init__(
        self,
        denoiser: Denoiser,
        levels: Levels,
        samples: int = 1,
        weighting: Weighting = noise.elbo_weight,
        *,
        prior: Sequence[float] | None = None,
        temperature: float = 1.0,
        moments: tuple[Tensor, Tensor] | None = None,
        chunk: int = likelihood.CHUNK,
    ):
        super().__init__()
        temperature = units.check_real(temperature, "a temperature")
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"expected a temperature > 0, got {temperature}; 1 is Bayes' rule.")
        samples = units.check_whole(samples, "noise samples a level")
        chunk = units.check_whole(chunk, "chunk", least=1, most=likelihood.LARGEST)
        if samples < 1:
            raise ValueError(f"expected at least one noise sample a level, got {samples}.")
        denoiser.check_levels(levels.sigma)
        self.denoiser = denoiser
        self.levels = levels
        self.samples = samples
        self.weighting = weighting
        self.temperature = temperature
        self.chunk = chunk
        self.num_classes = denoiser.num_classes
        self.image_shape = denoiser.image_shape
        self.register_buffer("log_prior", check_prior(prior, denoiser.num_classes))
        self.moments = moments  # (class means, covariance traces) for the end term, or None to drop it as papers do

    def sample_noise(self, images: int, generator: torch.Generator) -> Tensor:
        """See `Classifier.sample_noise`. Shapes: -> [images,T,S,C,H,W]."""
        return sampled_bank((len(self.levels), self.samples, *self.image_shape), images, generator)

    def losses(self, x: Tensor, noise: Noise) -> Tensor:
        """The diffusion losses behind the logits. Shapes: x [B,C,H,W] in [0,1] -> [B,K,T]."""
        drawn = self.prepared(x, noise)
        return self._losses(x, self.levels, drawn)

    def losses_by_level(self, x: Tensor, noise: Noise) -> Iterator[Tensor]:
        """`losses`, one noise level after the other. Shapes: x [B,C,H,W] in [0,1] -> T times [B,K,1]."""
        drawn = self.prepared(x, noise)
        for level in range(len(self.levels)):
            own = slice(level, level + 1)
            yield self._losses(x, self.levels[own], drawn[:, own])

    def _losses(self, x: Tensor, levels: Levels, drawn: Tensor) -> Tensor:
        return likelihood.diffusion_loss(
            self.denoiser, units.to_model(x), bank_of(levels, drawn), chunk=self.chunk
        )

    def logits_of(self, losses: Tensor) -> Tensor:
        """Logits from losses already measured, so that a weighting or a prior can be changed for nothing.

        Shapes      [B,K,T] -> [B,K], without the end term, which needs the image
        """
        evidence = likelihood.evidence(losses, self.levels.to(losses), self.weighting)
        return evidence / self.temperature + self.log_prior.to(losses)

    def logits(self, x: Tensor, noise: Noise) -> Tensor:
        """See `Classifier.logits`."""
        logits = self.logits_of(self._losses(x, self.levels, noise))
        if self.moments is not None:
            means, traces = (m.to(x) for m in self.moments)
            end = likelihood.end_term(
                units.to_model(x), means, traces, float(self.levels.upper[-1])
            )
            logits = logits + end / self.temperature
        return logits

    def routes(self) -> dict[str, Classifier]:
        """Uniform weights, and, for the weights of an ELBO, the telescoped gradient."""
        routes: dict[str, Classifier] = {}
        if self.weighting is not noise.unit_weight:
            routes["uniform weights"] = self.changed(weighting=noise.unit_weight)
        if self.weighting in (noise.elbo_weight, noise.discrete_elbo_weight):
            routes["the telescoped gradient"] = telescoped(self, TELESCOPED)
        return routes

    @property
    def level_counts(self) -> tuple[int, ...]:
        """Half and twice as many noise levels."""
        return half_and_double(len(self.levels))

    def at_levels(self, count: int) -> "BayesClassifier":
        """The same classifier with `count` levels between the same ends, spread evenly over ln sigma."""
        check_level_count(self, count)
        ends = (float(self.levels.lower[0]), float(self.levels.upper[-1]))
        return self.changed(levels=noise.log_levels(*ends, count))

    @property
    def calls(self) -> int:
        """See `Classifier.calls`."""
        return len(self.levels) * self.samples * self.denoiser.calls(self.num_classes)

    def changed(self, **options) -> "BayesClassifier":
        """The same classifier with other levels, samples, weighting, prior, temperature or chunk."""
        own = dict(
            levels=self.levels,
            samples=self.samples,
            weighting=self.weighting,
            prior=self.log_prior.exp().cpu(),
            temperature=self.temperature,
            moments=self.moments,
            chunk=self.chunk,
        )
        return BayesClassifier(self.denoiser, **{**own, **options})

    def extra_repr(self) -> str:
        return (
            f"{self.levels}, samples={self.samples}, weighting={self.weighting.__name__}, "
            f"temperature={self.temperature:g}"
        )


def half_and_double(count: int) -> tuple[int, ...]:
    """Half and twice a number of levels or steps, where these are other numbers."""
    return tuple(more for more in sorted({max(1, count // 2), 2 * count}) if more != count)


def check_level_count(classifier: Classifier, count: int) -> int:
    """Return a number of levels or steps that a classifier offers. Errors: ValueError that lists them."""
    if count not in classifier.level_counts:
        raise ValueError(
            f"expected a number of levels or steps that this {type(classifier).__name__} offers, one of "
            f"{classifier.level_counts}, got {count}."
        )
    return count


def telescoped(classifier: BayesClassifier, samples: int, seed: int = 0) -> StandIn:
    """A diffusion classifier attacked by the telescoped gradient of its ELBO.

    Shapes      a `BayesClassifier` -> a classifier with its values; the ends are those of its levels
    Randomness  the gradient's `samples` draws are from `seed`, the same at every call
    Errors      ValueError for weights that are not those of an ELBO, whose gradient does not telescope
    """
    if classifier.weighting not in (noise.elbo_weight, noise.discrete_elbo_weight):
        raise ValueError(
            "expected a classifier with ELBO weights, for which everything between the ends cancels, got "
            f"{classifier.weighting.__name__}; use jacobian_free_gradient."
        )
    low = float(classifier.levels.lower[0])
    high = float(classifier.levels.upper[-1])
    samples = units.check_whole(samples, "draws of the gradient", least=1)
    generator = torch.Generator().manual_seed(units.check_whole(seed, "a seed", most=None))
    eps = torch.randn((samples, 1, *classifier.image_shape), generator=generator)
    slope = _TelescopedSlope(
        classifier.denoiser, low, high, eps, classifier.temperature, classifier.moments
    )
    return StandIn(classifier, slope)


@dataclass(frozen=True, eq=False)
class _TelescopedSlope:
    """The telescoped gradient of every logit, as a function of z; a class, as closures do not pickle."""

    denoiser: Denoiser
    low: float
    high: float
    eps: Tensor
    temperature: float
    moments: tuple[Tensor, Tensor] | None

    def __call__(self, z: Tensor) -> Tensor:
        slope = likelihood.telescoped_gradient(self.denoiser, z, self.low, self.high, self.eps)
        if self.moments is not None:
            means, traces = (m.to(z) for m in self.moments)
            slope = slope + likelihood.end_slope(z, means, traces, self.high)
        return slope / self.temperature


class ExactClassifier(Classifier):
    """Bayes' rule on the true density: what every other classifier of an exact world approximates.

    Formula     logit_k(x) = log p_sigma(2x - 1 | k) + ln prior_k
    Shapes      x [B,C,H,W]; pixels in [0,1] for sigma_pixel = 0, any finite value with noise -> [B,K] in nats
    Randomness  none
    Errors      TypeError for a denoiser without a density; those of `check_prior`, and of `units.check_sigma_pixel`
    """

    calls = 1

    def __init__(
        self, denoiser: Denoiser, prior: Sequence[float] | None = None, sigma_pixel: float = 0.0
    ):
        super().__init__()
        if not denoiser.has_density:
            raise TypeError(
                f"expected a denoiser with a closed-form density, got {type(denoiser).__name__}; "
                "use BayesClassifier for a network."
            )
        self.denoiser = denoiser
        self.sigma_pixel = None
        if sigma_pixel is not None and units.check_real(sigma_pixel, "sigma_pixel") != 0:
            self.sigma_pixel = units.check_sigma_pixel(sigma_pixel)
        self.register_buffer("log_prior", check_prior(prior, denoiser.num_classes))
        self.num_classes = denoiser.num_classes
        self.image_shape = denoiser.image_shape

    def logits(self, x: Tensor, noise: Noise) -> Tensor:
        """See `Classifier.logits`."""
        sigma = units.sigma_to_model(self.sigma_pixel or 0.0)
        density = self.denoiser.log_density(units.to_model(x), sigma)
        return density + self.log_prior.to(density)
