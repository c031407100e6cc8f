"""Bayes' rule on per-class diffusion losses, and on exact densities: pixels in [0,1] -> logits in nats."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffclass import likelihood, noise, units
from diffclass.classifiers.randomised import Randomised
from diffclass.denoisers.base import Denoiser
from diffclass.noise import NoiseBank, Weighting


def check_prior(prior, num_classes: int) -> Tensor:
    """Return a prior over K classes as log-probabilities [K], uniform for None; raise if it is not a distribution."""
    if prior is None:
        prior = torch.full((num_classes,), 1 / num_classes, dtype=torch.float64)
    prior = torch.as_tensor(prior, dtype=torch.float64)
    if tuple(prior.shape) != (num_classes,):
        raise ValueError(f"expected a prior over {num_classes} classes, got {list(prior.shape)}.")
    if (
        not bool(torch.isfinite(prior).all())
        or float(prior.min()) <= 0
        or abs(float(prior.sum()) - 1) > 1e-6
    ):
        raise ValueError(
            f"expected a prior of positive probabilities that sum to 1, got {prior.tolist()} with sum "
            f"{float(prior.sum()):.6g}; divide it by its sum."
        )
    return prior.log()


class _OfDenoiser(Randomised):
    """A classifier of what its denoiser can tell apart."""

    @property
    def num_classes(self) -> int:
        """K."""
        return self.denoiser.num_classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.denoiser.image_shape


class BayesClassifier(_OfDenoiser):
    """p(y | x) from the per-class diffusion losses, by Bayes' rule.

    Formula     logit_k(x) = ELBO_k(2x - 1) / temperature + C_k + ln prior_k,   p(y | x) = softmax(logits)
    Source      Li et al. 2023; Chen et al. 2024 (RDC), Theorem 3.1
    Shapes      x [B,C,H,W] in [0,1] -> logits [B,K] in nats, up to a constant shared by the classes
    Randomness  deterministic: one fixed noise bank, shared by all images. `with_fresh_noise` gives the random one.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        bank: NoiseBank,
        weighting: Weighting = noise.elbo_weight,
        *,
        prior: Sequence[float] | None = None,
        temperature: float = 1.0,
        moments: tuple[Tensor, Tensor] | None = None,
        chunk: int = likelihood.CHUNK,
    ):
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"expected a temperature > 0, got {temperature}; 1 is Bayes' rule.")
        if bank.image_shape != denoiser.image_shape:
            raise ValueError(
                f"expected a noise bank for images {list(denoiser.image_shape)}, "
                f"got {list(bank.image_shape)}."
            )
        self.denoiser = denoiser
        self.bank = bank
        self.weighting = weighting
        self.temperature = temperature
        self.chunk = chunk
        self.register_buffer("log_prior", check_prior(prior, denoiser.num_classes))
        self.moments = moments  # (class means, covariance traces) for the end term, or None to drop it as papers do

    def losses(self, x: Tensor) -> Tensor:
        """The diffusion losses behind the logits. Shapes: x [B,C,H,W] in [0,1] -> [B,K,T]."""
        units.check_images(x, self.image_shape)
        bank = self.bank if self.deterministic else self.bank.redrawn(len(x), self.generator)
        return likelihood.diffusion_loss(self.denoiser, units.to_model(x), bank, chunk=self.chunk)

    def logits_of(self, losses: Tensor) -> Tensor:
        """Logits from losses already measured, so that a weighting or a prior can be changed for nothing.

        Shapes      [B,K,T] -> [B,K], without the end term, which needs the image
        """
        evidence = -(losses * self.weighting(self.bank.levels)).sum(-1)
        return evidence / self.temperature + self.log_prior.to(losses)

    def forward(self, x: Tensor) -> Tensor:
        """Logits in nats. Shapes: x [B,C,H,W] in [0,1] -> [B,K]."""
        logits = self.logits_of(self.losses(x))
        if self.moments is not None:
            means, traces = (m.to(x) for m in self.moments)
            end = likelihood.end_term(units.to_model(x), means, traces, float(self.bank.upper[-1]))
            logits = logits + end / self.temperature
        return logits

    def posterior(self, x: Tensor) -> Tensor:
        """p(y | x). Shapes: x [B,C,H,W] in [0,1] -> [B,K], rows sum to 1."""
        return torch.softmax(self(x), dim=1)

    def extra_repr(self) -> str:
        kind = "fixed noise" if self.deterministic else "fresh noise"
        return f"weighting={self.weighting.__name__}, temperature={self.temperature:g}, {kind}"


class ExactClassifier(nn.Module):
    """Bayes' rule on the true density: what every other classifier of an exact world approximates.

    Formula     logit_k(x) = log p_sigma(2x - 1 | k) + ln prior_k
    Shapes      x [B,C,H,W]; pixels in [0,1] for sigma_pixel = 0, any finite value with noise -> [B,K] in nats
    """

    def __init__(
        self, denoiser: Denoiser, prior: Sequence[float] | None = None, sigma_pixel: float = 0.0
    ):
        super().__init__()
        if not hasattr(denoiser, "log_density"):
            raise TypeError(
                f"expected a denoiser with a closed-form density, got {type(denoiser).__name__}; "
                "use BayesClassifier for a network."
            )
        self.denoiser = denoiser
        self.sigma_pixel = sigma_pixel
        self.deterministic = True
        self.register_buffer("log_prior", check_prior(prior, denoiser.num_classes))
        self.num_classes = denoiser.num_classes
        self.image_shape = denoiser.image_shape

    def forward(self, x: Tensor) -> Tensor:
        """Logits in nats. Shapes: x [B,C,H,W] -> [B,K]."""
        units.check_images(x, self.image_shape, pixel_range=self.sigma_pixel == 0)
        density = self.denoiser.log_density(
            units.to_model(x), units.sigma_to_model(self.sigma_pixel)
        )
        return density + self.log_prior.to(density)
