"""The classifier of noised images that randomised smoothing asks for (EPNDC)."""

from collections.abc import Sequence

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
from diffclass.denoisers.base import Denoiser
from diffclass.noise import Weighting

LEVELS = 8
HIGH = 5.0  # where that many levels end, in model units


def highest(denoiser: Denoiser, levels: int) -> float:
    """Where `levels` levels end: 5 for up to 8 of them, then in proportion, as far as the denoiser can be trusted.

    Why         what is left out above falls as high^-2, the error of the midpoint rule as levels^-2
    Units       model space
    """
    return min(HIGH * max(1.0, levels / LEVELS), denoiser.sigma_range[1])


class NoisedBayesClassifier(Classifier):
    """p(y | x + sigma_pixel eps): Bayes' rule for an image that already carries noise.

    Formula     logit_k(x_tau) = log p_tau(2 x_tau - 1 | k) + ln prior_k, by `likelihood.noised_elbo`
    Source      Chen et al. 2024 (NDC)
    Shapes      x_tau [B,C,H,W], pixels plus noise, any finite value; noise [B or 1,T,S,C,H,W] -> logits [B,K] in nats
    Randomness  `sample_noise`: S samples at each of T levels above the noise that the image carries
    Exact when  the denoiser is exact, and S and T grow. What lies below the first level and above the last is left out:
                of the second, about -||z_tau - m_k||^2 / (2 high^2), m_k the mean of class k. So T levels end at 5 T/8,
                5 at least, unless `high` is given, and both fall as T^-2
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
        super().__init__()
        samples = units.check_whole(samples, "noise samples a level")
        levels = units.check_whole(levels, "the number of noise levels", least=1)
        if samples < 1:
            raise ValueError(f"expected at least one noise sample a level, got {samples}.")
        self.sigma_pixel = units.check_sigma_pixel(sigma_pixel)
        sigma_tau = units.sigma_to_model(self.sigma_pixel)
        end = highest(denoiser, levels) if high is None else high
        self.levels = noise.noised_levels(sigma_tau, end, levels)
        self.denoiser = denoiser
        self.high = high
        self.samples = samples
        self.weighting = weighting
        self.chunk = chunk
        self.num_classes = denoiser.num_classes
        self.image_shape = denoiser.image_shape
        self.register_buffer("log_prior", check_prior(prior, denoiser.num_classes))

    def sample_noise(self, images: int, generator: torch.Generator) -> Tensor:
        """See `Classifier.sample_noise`. Shapes: -> [images,T,S,C,H,W]."""
        return sampled_bank((len(self.levels), self.samples, *self.image_shape), images, generator)

    def logits(self, x: Tensor, noise: Noise) -> Tensor:
        """See `Classifier.logits`."""
        logits = likelihood.noised_elbo(
            self.denoiser,
            units.to_model(x),
            units.sigma_to_model(self.sigma_pixel),
            bank_of(self.levels, noise),
            self.weighting,
            chunk=self.chunk,
        )
        return logits + self.log_prior.to(logits)

    @property
    def level_counts(self) -> tuple[int, ...]:
        """Half and twice as many noise levels."""
        return half_and_double(len(self.levels))

    def at_levels(self, count: int) -> "NoisedBayesClassifier":
        """The same classifier with `count` levels, up to the same `high` where one was given."""
        check_level_count(self, count)
        return NoisedBayesClassifier(
            self.denoiser,
            self.sigma_pixel,
            levels=count,
            high=self.high,
            samples=self.samples,
            prior=self.log_prior.exp().cpu(),
            weighting=self.weighting,
            chunk=self.chunk,
        )

    @property
    def calls(self) -> int:
        """See `Classifier.calls`."""
        return len(self.levels) * self.samples * self.denoiser.calls(self.num_classes)

    def extra_repr(self) -> str:
        return f"sigma_pixel={self.sigma_pixel:g}, {self.levels}, samples={self.samples}"
