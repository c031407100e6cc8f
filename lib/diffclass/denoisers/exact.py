"""Closed forms: the denoiser and the density of isotropic Gaussian mixtures, of which a finite data set is the limit.

They go through the same code path as a network, so every formula of the course can be compared with the truth.
"""

import math

import torch
from torch import Tensor

from diffclass import units
from diffclass.denoisers.base import Denoiser


class MixtureDenoiser(Denoiser):
    """Exact E[x0 | x_sigma, k] and log p_sigma(x_sigma | k) when every class is a mixture of isotropic Gaussians.

    Formula     r_m = softmax over m in class k of  log w_m + log N(x_sigma; mu_m, (s_m^2 + sigma^2) I)
                D_k = sum_m r_m (s_m^2 x_sigma + sigma^2 mu_m) / (s_m^2 + sigma^2)
                log p_sigma(x | k) = logsumexp_m log w_m + log N(x; mu_m, (s_m^2 + sigma^2) I)
    Source      Gaussian conditioning; with s_m = 0 it is RDC's Theorem 3.2 (Chen et al. 2024)
    Shapes      means [M,C,H,W], scales [M], weights [M] (sum 1 within each class), labels [M], priors [K]
    Units       model space; computed in float64, returned in the dtype of the input
    """

    has_null = True
    has_density = True

    def __init__(
        self,
        means: Tensor,
        scales: Tensor,
        weights: Tensor,
        labels: Tensor,
        priors: Tensor | None = None,
    ):
        super().__init__()
        means = units.check_numbers(means, "component means")
        if means.ndim != 4 or not len(means):
            raise ValueError(
                f"expected component means of shape [M,C,H,W], got {list(means.shape)}."
            )
        given = {"scales": scales, "weights": weights, "labels": labels}
        parts = {name: units.check_numbers(part, name) for name, part in given.items()}
        for name, part in parts.items():
            whole = name != "labels" or bool((part == part.floor()).all())
            if tuple(part.shape) != (len(means),) or bool((part < 0).any()) or not whole:
                raise ValueError(
                    f"expected {name} of {len(means)} components, none negative, labels as whole numbers, got "
                    f"{part.tolist()[:5]} of shape {list(part.shape)}."
                )
        scales = parts["scales"]
        labels = parts["labels"].long()
        self.num_classes = int(labels.max()) + 1
        self.image_shape = tuple(means.shape[1:])
        self.sigma_range = (1e-4, 1e4)
        counts = torch.bincount(labels, minlength=self.num_classes)
        if int(counts.min()) == 0:
            raise ValueError(
                f"expected at least one component for each class, got counts {counts.tolist()}."
            )
        uniform = torch.full((self.num_classes,), 1 / self.num_classes)
        priors = units.check_numbers(uniform if priors is None else priors, "priors").double()
        if tuple(priors.shape) != (self.num_classes,) or bool((priors <= 0).any()):
            raise ValueError(
                f"expected a prior > 0 for each of {self.num_classes} classes, got {priors.tolist()}."
            )
        weights = parts["weights"].double()
        within = torch.zeros(self.num_classes, dtype=torch.float64).index_add(0, labels, weights)
        if (
            not torch.allclose(within, torch.ones_like(within), atol=1e-6)
            or abs(float(priors.sum()) - 1) > 1e-6
        ):
            raise ValueError(
                f"expected weights that sum to 1 within each class and priors that sum to 1, "
                f"got {within.tolist()} and {float(priors.sum()):.6g}."
            )
        self.register_buffer("means", means.flatten(1).double())  # [M,D]
        self.register_buffer("variances", torch.as_tensor(scales, dtype=torch.float64) ** 2)  # [M]
        self.register_buffer("log_weights", weights.log())  # [M], within the class
        self.register_buffer("labels", labels)
        self.register_buffer("log_priors", priors.log())

    @classmethod
    def of_law(cls, law) -> "MixtureDenoiser":
        """The denoiser of a law (`data.MixtureLaw`): the same means, scales, weights, labels and priors."""
        means = law.means.reshape(-1, *law.image_shape)
        return cls(means, law.scales, law.weights, law.labels, law.priors)

    @classmethod
    def of_images(cls, images: Tensor, labels: Tensor) -> "MixtureDenoiser":
        """The optimal diffusion model of a finite data set: each class uniform over its own images.

        Formula     D_k(x_sigma) = sum_{i in class k} s_i x_i,  s = softmax_i(-||x_sigma - x_i||^2 / (2 sigma^2))
        Source      RDC (Chen et al. 2024), Theorem 3.2; priors are the class frequencies
        Shapes      images [N,C,H,W] in model space, labels [N]
        """
        units.check_images(images, pixel_range=False)
        classes = int(labels.max()) + 1 if isinstance(labels, Tensor) and len(labels) else 1
        units.check_labels(labels, len(images), classes)
        counts = torch.bincount(labels)
        weights = (1 / counts.double())[labels]
        return cls(images, torch.zeros(len(images)), weights, labels, counts.double() / len(labels))

    def estimate(self, x_sigma: Tensor, sigma: Tensor, classes: Tensor) -> Tensor:
        """See `Denoiser.forward`."""
        x = x_sigma.flatten(1).double()
        variance = sigma.double()[:, None] ** 2  # [B,1]
        shrink = variance / (self.variances + variance)  # [B,M]
        denoised = []
        for members, joint in self._joint_by_class(x, sigma, classes):
            share = torch.softmax(joint, dim=1)  # r_m [B,M_k]
            toward_mean = share * shrink[:, members]  # r_m sigma^2 / (s_m^2 + sigma^2)
            denoised.append(
                (1 - toward_mean.sum(1, keepdim=True)) * x + toward_mean @ self.means[members]
            )
        return torch.stack(denoised, 1).reshape(len(x), len(classes), *self.image_shape).to(x_sigma)

    def log_density(self, x_sigma: Tensor, sigma: Tensor | float, classes=None) -> Tensor:
        """The oracle: log p_sigma(x_sigma | k).

        Shapes      x_sigma [B,C,H,W], sigma a number >= 0 or [B], classes [k] or None -> [B,k]
        Units       nats, with respect to the volume of model space
        Errors      ValueError for a wrong shape, non-finite points, sigma < 0, or no variance at all; FloatingPointError
                    where the density is too small for the precision of the points
        """
        units.check_images(x_sigma, self.image_shape, pixel_range=False)
        sigma = self._checked_sigma(sigma, x_sigma)
        classes = self.check_classes(classes)
        x = x_sigma.flatten(1).double()
        logs = [
            torch.logsumexp(joint, dim=1) for _, joint in self._joint_by_class(x, sigma, classes)
        ]
        density = torch.stack(logs, 1).to(x_sigma)
        if not bool(torch.isfinite(density.detach()).all()):
            raise FloatingPointError(
                f"expected points whose log-density is a finite number of precision {density.dtype}, got points of size "
                f"{float(x_sigma.detach().abs().max()):.3g}; are they in model units?"
            )
        return density

    def _checked_sigma(self, sigma: Tensor | float, x_sigma: Tensor) -> Tensor:
        """One level >= 0 for each image, float64. Shapes: a number or [B] -> [B]."""
        if not isinstance(sigma, Tensor):
            number = units.check_real(sigma, "a noise level sigma")
            sigma = torch.tensor(number, dtype=torch.float64)
        if sigma.is_complex():
            raise TypeError("expected noise levels sigma as real numbers, got complex ones.")
        sigma = sigma.to(torch.float64).to(x_sigma.device)
        if sigma.ndim > 0 and tuple(sigma.shape) != (len(x_sigma),):
            raise ValueError(
                f"expected one noise level for all images or one for each of {len(x_sigma)}, got sigma of shape "
                f"{list(sigma.shape)}."
            )
        bad = sigma[~(torch.isfinite(sigma) & (sigma >= 0))]
        if bad.numel():
            raise ValueError(f"expected finite noise levels sigma >= 0, got {float(bad[0]):.3g}.")
        if bool((self.variances.min() + sigma**2 <= 0).any()):
            raise ValueError(
                "expected a positive total variance: a finite data set has no density at sigma = 0."
            )
        return sigma.expand(len(x_sigma))

    def _joint_by_class(self, x: Tensor, sigma: Tensor, classes: Tensor):
        """Yield (member indices, log w_m + log N(x; mu_m, total variance I) [B,M_k]) for each class asked for."""
        for k in classes.tolist():
            null = k == self.num_classes
            members = (
                torch.arange(len(self.labels))
                if null
                else torch.nonzero(self.labels == k).flatten()
            )
            log_weights = self.log_weights[members] + (self.log_priors[self.labels] if null else 0)
            total = self.variances[members] + sigma.double()[:, None] ** 2  # [B,M_k]
            square = _SquaredDistances.apply(x, self.means[members])
            log_normal = -square / (2 * total) - x.shape[1] / 2 * (2 * math.pi * total).log()
            yield members, log_weights + log_normal


class _SquaredDistances(torch.autograd.Function):
    """||x_b - mu_m||^2 by cdist, whose own backward has no second derivative; exact gradients of defences need one."""

    @staticmethod
    def forward(ctx, x: Tensor, means: Tensor) -> Tensor:
        ctx.save_for_backward(x, means)
        return torch.cdist(x, means, compute_mode="donot_use_mm_for_euclid_dist") ** 2

    @staticmethod
    def backward(ctx, slope: Tensor):
        x, means = ctx.saved_tensors
        return 2 * (x * slope.sum(1, keepdim=True) - slope @ means), None
