"""The classifier of noised images that randomised smoothing asks for (EPNDC)."""

from collections.abc import Sequence

from torch import Tensor

from diffclass import likelihood, noise, units
from diffclass.classifiers.bayes import _OfDenoiser, check_prior
from diffclass.denoisers.base import Denoiser
from diffclass.noise import NoiseBank, Weighting


class NoisedBayesClassifier(_OfDenoiser):
    """p(y | x + sigma_pixel eps): the classifier of noised images that randomised smoothing asks for (EPNDC).

    Formula     logit_k(x_tau) = log p_tau(2 x_tau - 1 | k) + ln prior_k, by `likelihood.noised_elbo`
    Source      Chen et al. 2024 (NDC)
    Shapes      x_tau [B,C,H,W], pixels plus noise, any finite value -> logits [B,K] in nats
    Randomness  deterministic: one fixed noise bank. `with_fresh_noise` draws for every image: each vote independent
    """

    def __init__(
        self,
        denoiser: Denoiser,
        sigma_pixel: float,
        *,
        levels: int = 8,
        high: float = 5.0,
        samples: int = 1,
        prior: Sequence[float] | None = None,
        seed: int = 0,
        weighting: Weighting = noise.elbo_weight,
        chunk: int = likelihood.CHUNK,
    ):
        super().__init__()
        self.sigma_pixel = float(units.check_sigma(sigma_pixel, "sigma_pixel"))
        grid = noise.noised_levels(units.sigma_to_model(self.sigma_pixel), high, levels, first=0.25)
        self.denoiser = denoiser
        self.weighting = weighting
        self.chunk = chunk
        self.bank = NoiseBank.fixed(grid, denoiser.image_shape, samples, seed)
        self.register_buffer("log_prior", check_prior(prior, denoiser.num_classes))

    def forward(self, x_tau: Tensor) -> Tensor:
        """Logits in nats of an image that carries noise sigma_pixel. Shapes: [B,C,H,W] -> [B,K]."""
        units.check_images(x_tau, self.image_shape, pixel_range=False)
        bank = self.bank if self.deterministic else self.bank.redrawn(len(x_tau), self.generator)
        sigma_tau = units.sigma_to_model(self.sigma_pixel)
        logits = likelihood.noised_elbo(
            self.denoiser, units.to_model(x_tau), sigma_tau, bank, self.weighting, chunk=self.chunk
        )
        return logits + self.log_prior.to(logits)

    def extra_repr(self) -> str:
        return f"sigma_pixel={self.sigma_pixel:g}, {'fixed noise' if self.deterministic else 'fresh noise'}"
