"""Classifiers of noised images, which randomised smoothing asks for: Bayes' rule at the levels above the noise (NDC)."""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor

from diffclass import likelihood, noise, units
from diffclass.classifiers.base import Classifier, Noise
from diffclass.classifiers.bayes import (
    bank_of,
    check_level_count,
    check_prior,
    half_and_double,
    sampled_bank,
)
from diffclass.denoisers.base import RANGE_SLACK, Denoiser
from diffclass.noise import Levels, NoiseBank, Weighting

LEVELS = 8
HIGH = 5.0  # where that many levels end, in model units


def highest(denoiser: Denoiser, levels: int) -> float:
    """Where `levels` levels end: 5 for up to 8 of them, then in proportion, as far as the denoiser can be trusted.

    Why         what is left out above falls as high^-2, the error of the midpoint rule as levels^-2
    Units       model space
    """
    return min(HIGH * max(1.0, levels / LEVELS), denoiser.sigma_range[1])


def carried_sigma(denoiser: Denoiser, sigma_pixel: float, *, below: bool = False) -> float:
    """The noise that pictures carry, in model units, where the denoiser can be asked at that level.

    Formula     sigma_tau = 2 sigma_pixel
    Options     below: whether levels above it are needed, so that it has to lie below the highest of them
    Errors      those of `units.check_sigma_pixel`; ValueError for a level outside the denoiser's range
    """
    sigma_tau = units.sigma_to_model(units.check_sigma_pixel(sigma_pixel))
    low, high = denoiser.sigma_range
    most = high / RANGE_SLACK if below else high * RANGE_SLACK
    if not low / RANGE_SLACK <= sigma_tau <= most:
        bound = (
            f"at least {units.sigma_to_pixel(low):.4g}"
            if sigma_tau < low
            else f"at most {units.sigma_to_pixel(high):.4g}"
        )
        if below and sigma_tau >= low:
            bound = (
                f"below {units.sigma_to_pixel(high):.4g}, as losses are measured at levels above it"
            )
        raise ValueError(
            f"expected a smoothing noise sigma_pixel {bound}: this {type(denoiser).__name__} was trained at levels from "
            f"{low:.4g} to {high:.4g} in model units, got {units.sigma_to_pixel(sigma_tau):.4g}, which is {sigma_tau:.4g} "
            "there."
        )
    return sigma_tau


class _AboveTheNoise(Classifier):
    """What classifiers have in common that measure losses at levels above the noise that an image carries."""

    def __init__(
        self,
        denoiser: Denoiser,
        sigma_pixel: float,
        *,
        levels: int,
        high: float | None,
        samples: int,
        prior: Sequence[float] | None,
        weighting: Weighting,
        chunk: int,
    ):
        super().__init__()
        samples = units.check_whole(samples, "noise samples a level")
        levels = units.check_whole(levels, "the number of noise levels", least=1)
        if samples < 1:
            raise ValueError(f"expected at least one noise sample a level, got {samples}.")
        sigma_tau = carried_sigma(denoiser, sigma_pixel, below=True)
        self.sigma_pixel = units.sigma_to_pixel(sigma_tau)
        end = highest(denoiser, levels) if high is None else high
        self.levels = self.levels_above(sigma_tau, end, levels)
        denoiser.check_levels(self.levels.sigma)
        self.denoiser = denoiser
        self.high = high
        self.samples = samples
        self.weighting = weighting
        self.chunk = chunk
        self.num_classes = denoiser.num_classes
        self.image_shape = denoiser.image_shape
        self.register_buffer("log_prior", check_prior(prior, denoiser.num_classes))

    @abstractmethod
    def levels_above(self, sigma_tau: float, high: float, count: int) -> Levels:
        """The levels at which losses are measured. Units: model space."""

    @abstractmethod
    def evidence(self, z_tau: Tensor, sigma_tau: float, bank: NoiseBank) -> Tensor:
        """What the losses say for each class. Shapes: z_tau [B,C,H,W] -> [B,K]."""

    @abstractmethod
    def changed(self, **options) -> Self:
        """The same classifier with other levels, samples, weighting, prior or chunk."""

    def sample_noise(self, images: int, generator: torch.Generator) -> Tensor:
        """See `Classifier.sample_noise`. Shapes: -> [images,T,S,C,H,W]."""
        return sampled_bank((len(self.levels), self.samples, *self.image_shape), images, generator)

    def logits(self, x: Tensor, noise: Noise) -> Tensor:
        """See `Classifier.logits`."""
        sigma_tau = units.sigma_to_model(self.sigma_pixel)
        logits = self.evidence(units.to_model(x), sigma_tau, bank_of(self.levels, noise))
        return logits + self.log_prior.to(logits)

    @property
    def level_counts(self) -> tuple[int, ...]:
        """Half and twice as many noise levels."""
        return half_and_double(len(self.levels))

    def at_levels(self, count: int) -> Self:
        """The same classifier with `count` levels, up to the same `high` where one was given."""
        check_level_count(self, count)
        return self.changed(levels=count)

    @property
    def calls(self) -> int:
        """See `Classifier.calls`."""
        return len(self.levels) * self.samples * self.denoiser.calls(self.num_classes)

    def options(self) -> dict:
        """What the constructor was given, but for the denoiser and the noise."""
        return dict(
            levels=len(self.levels),
            high=self.high,
            samples=self.samples,
            prior=self.log_prior.exp().cpu(),
            weighting=self.weighting,
            chunk=self.chunk,
        )

    def extra_repr(self) -> str:
        return f"sigma_pixel={self.sigma_pixel:g}, {self.levels}, samples={self.samples}"


class NoisedBayesClassifier(_AboveTheNoise):
    """p(y | x + sigma_pixel eps): Bayes' rule for an image that already carries noise (EPNDC).

    Formula     logit_k(x_tau) = log p_tau(2 x_tau - 1 | k) + ln prior_k, by `likelihood.noised_elbo`
    Source      Chen et al. 2024 (NDC)
    Shapes      x_tau [B,C,H,W], pixels plus noise, any finite value; noise [B or 1,T,S,C,H,W] -> logits [B,K] in nats
    Randomness  `sample_noise`: S samples at each of T levels above the noise that the image carries
    Exact when  the denoiser is exact, and S and T grow. What lies below the first level and above the last is left out:
                of the second, about -||z_tau - m_k||^2 / (2 high^2), m_k the mean of class k. So T levels end at 5 T/8,
                5 at least, unless `high` is given, and both fall as T^-2
    Errors      those of `carried_sigma`
    """

    def __init__(
        self,
        denoiser: Denoiser,
        sigma_pixel: float,
        *,
        levels: int = LEVELS,
        high: float | None = None,
        samples: int = 1,
        prior: Sequence[float] | None = None,
        weighting: Weighting = noise.elbo_weight,
        chunk: int = likelihood.CHUNK,
    ):
        super().__init__(
            denoiser,
            sigma_pixel,
            levels=levels,
            high=high,
            samples=samples,
            prior=prior,
            weighting=weighting,
            chunk=chunk,
        )

    def levels_above(self, sigma_tau: float, high: float, count: int) -> Levels:
        """Geometric in the noise that is added."""
        return noise.noised_levels(sigma_tau, high, count)

    def evidence(self, z_tau: Tensor, sigma_tau: float, bank: NoiseBank) -> Tensor:
        """log p_tau(z_tau | k) up to a constant. Shapes: z_tau [B,C,H,W] -> [B,K]."""
        return likelihood.noised_elbo(
            self.denoiser, z_tau, sigma_tau, bank, self.weighting, chunk=self.chunk
        )

    def changed(self, **options) -> "NoisedBayesClassifier":
        """The same classifier with other levels, samples, weighting, prior or chunk."""
        return NoisedBayesClassifier(
            self.denoiser, self.sigma_pixel, **{**self.options(), **options}
        )


# A name -> its formula, and how many classes are denoised once more at the noise that the image carries, for K of them.
FORMS: dict[str, tuple[Callable[..., Tensor], Callable[[int], int]]] = {
    "ensemble": (likelihood.denoised_elbo, lambda classes: 1),
    "path": (likelihood.denoised_target_elbo, lambda classes: 1),
    "own path": (likelihood.own_target_elbo, lambda classes: classes),
}


class ApproximateNoisedClassifier(_AboveTheNoise):
    """Bayes' rule for an image that carries noise, by the losses of the denoised image (APNDC).

    Formula     logit_k(x_tau) = the losses above sigma_tau, summed by `likelihood.denoised_elbo` (ensemble),
                `denoised_target_elbo` (path) or `own_target_elbo` (own path), + ln prior_k
    Source      Chen et al. 2024 (NDC); the ensemble is the form that they certify
    Meaning     the ensemble: the mean log-likelihood of all noised versions of the denoised image; the paths: no likelihood.
                Not p(y | x_tau), not even of an exact denoiser
    Shapes      x_tau [B,C,H,W], pixels plus noise, any finite value; noise [B or 1,T,S,C,H,W] -> logits [B,K] in nats
    Randomness  `sample_noise`: S samples at each of T levels above the noise that the image carries
    Cost        that of `NoisedBayesClassifier` and one call; the own path, for a denoiser without a null class, one for each
                class
    Errors      those of `carried_sigma`; ValueError for a form that does not exist, or a denoiser without a null class where
                the form needs one
    """

    def __init__(
        self,
        denoiser: Denoiser,
        sigma_pixel: float,
        *,
        form: str = "ensemble",
        levels: int = LEVELS,
        high: float | None = None,
        samples: int = 1,
        prior: Sequence[float] | None = None,
        weighting: Weighting = noise.elbo_weight,
        chunk: int = likelihood.CHUNK,
    ):
        super().__init__(
            denoiser,
            sigma_pixel,
            levels=levels,
            high=high,
            samples=samples,
            prior=prior,
            weighting=weighting,
            chunk=chunk,
        )
        units.chosen(form, FORMS, "the form of APNDC")
        self.form = form.lower()
        if self.form != "own path":
            likelihood.check_null(denoiser)

    def levels_above(self, sigma_tau: float, high: float, count: int) -> Levels:
        """From the noise that the image carries, geometric: nothing diverges there."""
        high = units.check_real(high, "high")
        if not (sigma_tau < high and math.isfinite(high)):
            raise ValueError(
                f"expected 0 < sigma_tau < high, got sigma_tau {sigma_tau:.3g} and high {high:.3g}; "
                "levels start at the noise that the image carries and end above it."
            )
        return noise.log_levels(sigma_tau, high, count)

    def evidence(self, z_tau: Tensor, sigma_tau: float, bank: NoiseBank) -> Tensor:
        """What the losses of the denoised image say. Shapes: z_tau [B,C,H,W] -> [B,K]."""
        formula, _ = FORMS[self.form]
        return formula(self.denoiser, z_tau, sigma_tau, bank, self.weighting, chunk=self.chunk)

    def changed(self, **options) -> "ApproximateNoisedClassifier":
        """The same classifier with another form, other levels, samples, weighting, prior or chunk."""
        own = dict(form=self.form, **self.options())
        return ApproximateNoisedClassifier(self.denoiser, self.sigma_pixel, **{**own, **options})

    @property
    def calls(self) -> int:
        """See `Classifier.calls`."""
        _, classes = FORMS[self.form]
        return super().calls + self.denoiser.calls(classes(self.num_classes))

    def extra_repr(self) -> str:
        return f"{self.form}, {super().extra_repr()}"


class TrainedOnNoise(Classifier):
    """A classifier that was trained on noised pictures, told the noise that they carry: it sees them unclamped.

    Formula     f(x_tau, noise), whatever the classifier answers to pixels plus noise
    Why         a classifier of clean pictures is asked about clamped copies; one that learned from x + sigma eps is not
    Shapes      x_tau [B,C,H,W], pixels plus noise, any finite value; the classifier's noise -> its logits [B,K]
    Errors      those of `units.check_sigma_pixel`; ValueError for a classifier that brings a noise of its own
    """

    def __init__(self, classifier: Classifier, sigma_pixel: float):
        super().__init__()
        check_clean(classifier)
        self.sigma_pixel = units.check_sigma_pixel(sigma_pixel)
        self.classifier = classifier
        self.num_classes = classifier.num_classes
        self.image_shape = classifier.image_shape
        self.scale = classifier.scale
        self.eot = classifier.eot

    def sample_noise(self, images: int, generator: torch.Generator) -> Noise:
        """See `Classifier.sample_noise`."""
        return self.classifier.sample_noise(images, generator)

    def logits(self, x: Tensor, noise: Noise) -> Tensor:
        """See `Classifier.logits`."""
        return self.classifier.logits(x, noise)

    def gradients(self) -> dict[str, Classifier]:
        """See `Classifier.gradients`: the classifier's."""
        return {
            name: TrainedOnNoise(other, self.sigma_pixel)
            for name, other in self.classifier.gradients().items()
        }

    def surrogate(self) -> Classifier:
        """See `Classifier.surrogate`: the classifier's."""
        if self.classifier.gradients():
            return self
        return TrainedOnNoise(self.classifier.surrogate(), self.sigma_pixel)

    @property
    def calls(self) -> int:
        """See `Classifier.calls`."""
        return self.classifier.calls


def check_clean(classifier: Classifier) -> Classifier:
    """Return a classifier of clean pictures. Errors: ValueError for one whose pictures carry noise."""
    if classifier.sigma_pixel is not None:
        raise ValueError(
            f"expected a classifier of clean pictures, got a {type(classifier).__name__} whose pictures carry noise "
            f"sigma_pixel {classifier.sigma_pixel:g}."
        )
    return classifier
