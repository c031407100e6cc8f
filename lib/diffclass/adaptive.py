"""Attacks that know the defence: Jacobian-free gradients, a penalty for what a purifier would undo, bent images."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from diffclass import likelihood, noise, units
from diffclass.denoisers.base import Denoiser
from diffclass.noise import NoiseBank

SlopeOf = Callable[[Tensor], Tensor]  # z [B,C,H,W] in [-1,1] -> gradients of K logits, [B,K,C,H,W]


def telescoped_gradient(
    denoiser: Denoiser, z: Tensor, low: float, high: float, eps: Tensor
) -> Tensor:
    """The gradient of the ELBO of [low, high] from the denoised images at its two ends alone.

    Formula     E s_low(z + low eps) - E s_high(z + high eps),  s_sigma(x) = (D(x, sigma) - x) / sigma^2
    Source      differentiate the pointwise identity: everything between the ends cancels
    Shapes      z [B,C,H,W], eps [S,1 or B,C,H,W] -> [B,K,C,H,W], in nats per model unit
    Exact when  the denoiser is exact and S grows
    Meaning     class k minus class j is (D_k - D_j)/low^2 - the same at high: where the denoisers disagree
    """
    if not 0 < low < high:
        raise ValueError(f"expected levels with 0 < low < high, got {low} and {high}.")
    with torch.no_grad():
        return _mean_score(denoiser, z, low, eps) - _mean_score(denoiser, z, high, eps)


def _mean_score(denoiser: Denoiser, z: Tensor, sigma: float, eps: Tensor) -> Tensor:
    return sum(
        ((denoised - (z + sigma * some)[:, :, None]) / sigma**2).sum(0)
        for some, denoised in _denoised(denoiser, z, sigma, eps.to(z))
    ) / len(eps)


def _denoised(denoiser: Denoiser, z: Tensor, sigma, eps: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some draws at a time: eps [s,B,C,H,W] and D_k(z + sigma eps, sigma) [s,B,K,C,H,W]."""
    for some in eps.expand(-1, len(z), *z.shape[1:]).split(max(1, likelihood.CHUNK // len(z))):
        yield some, denoiser((z + sigma * some).flatten(0, 1), sigma).unflatten(0, some.shape[:2])


def jacobian_free_gradient(
    denoiser: Denoiser, z: Tensor, bank: NoiseBank, weights: Tensor
) -> Tensor:
    """The gradient of - sum_t w_t E||D_k(z + sigma_t eps) - z||^2, for any denoiser, without differentiating it.

    Formula     - sum_t w_t E[ (eps / sigma_t) (e_k - mean_j e_j) + 2 (z - D_k) ],  e_k = ||D_k(z + sigma_t eps) - z||^2
    Source      differentiate the Gaussian density instead of D; Chen et al. 2024 (NDC). The class mean is a baseline:
                it takes most of the variance away, and adds one gradient to all classes, which no margin feels
    Shapes      z [B,C,H,W], weights [T], bank T x S with its own noise for each image or one for all -> [B,K,C,H,W]
    Exact when  S grows; for any denoiser, but with more variance than autograd through the same noise
    """
    total = 0.0
    with torch.no_grad():
        for sigma, weight, draws in zip(
            bank.sigma.to(z), weights.to(z), bank.noise.to(z), strict=True
        ):
            for eps, denoised in _denoised(denoiser, z, sigma, draws):
                gap = z[:, None] - denoised  # [s,B,K,C,H,W]
                error = gap.flatten(3).square().sum(-1)
                contrast = (error - error.mean(2, keepdim=True))[..., None, None, None]
                total = total - weight / bank.samples * (
                    eps[:, :, None] / sigma * contrast + 2 * gap
                ).sum(0)
    return total


class StandIn(nn.Module):
    """A classifier whose values are its own and whose gradient is another function's: for attacks of any library.

    Formula     f(x) + <g(2x - 1), 2 (x - x')> with x' = x, not differentiated: the value is f(x), the slope 2 g
    Shapes      x [B,C,H,W] in [0,1] -> [B,K]; slope_of: z [B,C,H,W] -> [B,K,C,H,W] in model units
    Why         `telescoped_gradient` costs two levels and no backward pass, where autograd differentiates all T
    """

    def __init__(self, classifier: nn.Module, slope_of: SlopeOf):
        super().__init__()
        self.classifier = classifier
        self.slope_of = slope_of
        self.num_classes = classifier.num_classes
        self.image_shape = classifier.image_shape
        self.deterministic = getattr(classifier, "deterministic", True)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the classifier. Shapes: [B,C,H,W] -> [B,K]."""
        with torch.no_grad():
            logits = self.classifier(x)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return logits
        slopes = self.slope_of(units.to_model(x.detach()))
        step = units.PIXELS_TO_MODEL * (x - x.detach())
        return logits + (slopes.to(logits) * step[:, None]).flatten(2).sum(-1)


def telescoped(classifier: nn.Module, samples: int, seed: int = 0) -> StandIn:
    """A diffusion classifier attacked by the telescoped gradient of its ELBO.

    Shapes      a `BayesClassifier` -> a module with its values; the ends are those of its levels
    Randomness  `samples` draws from `seed`, the same at every call
    Errors      ValueError for weights that are not those of an ELBO, whose gradient does not telescope
    """
    if classifier.weighting not in (noise.elbo_weight, noise.discrete_elbo_weight):
        raise ValueError(
            "expected a classifier with ELBO weights, for which everything between the ends cancels, got "
            f"{classifier.weighting.__name__}; use jacobian_free_gradient."
        )
    bank = classifier.bank
    low = float(bank.lower[0])
    high = float(bank.upper[-1])
    generator = torch.Generator().manual_seed(seed)
    eps = torch.randn((samples, 1, *classifier.image_shape), generator=generator)
    return StandIn(
        classifier,
        lambda z: (
            telescoped_gradient(classifier.denoiser, z, low, high, eps) / classifier.temperature
        ),
    )


def unlikeliness(
    denoiser: Denoiser, bank: NoiseBank, strength: float
) -> Callable[[Tensor], Tensor]:
    """The penalty of the Lagrange attack: the unconditional loss that likelihood maximisation would lower.

    Formula     strength * mean_ts ||D(z + sigma_t eps_ts, sigma_t) - z||^2 / D, z = 2x - 1
    Source      Chen et al. 2024 (RDC): maximise loss(f(x), y) - c * diffusion loss, and there is nothing left to undo
    Shapes      -> a function of x [B,C,H,W] in [0,1] -> [B], for `attacks.pgd(..., penalty=...)`
    """
    if not strength >= 0:
        raise ValueError(
            f"expected a strength >= 0, got {strength}; a negative one would seek unlikely images."
        )

    def penalty(x: Tensor) -> Tensor:
        errors = likelihood.diffusion_loss(
            denoiser, units.to_model(x), bank, [denoiser.num_classes]
        )
        return strength * errors.flatten(1).mean(1) / x[0].numel()

    return penalty


def warp(x: Tensor, flow: Tensor) -> Tensor:
    """The image that shows at each place what was a little further on, interpolated between pixels.

    Formula     x'(i, j) = x(i + flow_1(i, j), j + flow_0(i, j)), bilinear; beyond the edge as at the edge
    Source      Xiao et al. 2018 (StAdv)
    Shapes      x [B,C,H,W], flow [B,2,H,W] (to the right, down), in pixel widths -> [B,C,H,W]
    """
    height, width = x.shape[2:]
    rows, columns = torch.meshgrid(
        torch.arange(height).to(x), torch.arange(width).to(x), indexing="ij"
    )
    places = (
        torch.stack(
            [2 * (columns + 0.5 + flow[:, 0]) / width, 2 * (rows + 0.5 + flow[:, 1]) / height], -1
        )
        - 1
    )
    return nn.functional.grid_sample(x, places, padding_mode="border", align_corners=False)


class Bent(nn.Module):
    """Logits of some images as a function of how they are bent: `attacks.pgd` or `apgd` on it is the attack StAdv.

    Formula     p -> f(warp(x, bound (2p - 1))); p = 1/2 is the image itself, and the budget 1/2 is the whole bound
    Source      Xiao et al. 2018; RDC bounds the flow of 32x32 pixels by 0.05 of half the picture, 0.8 pixel widths
    Shapes      x [B,C,H,W]; p [B,2,H,W] in [0,1] -> [B,K];  *_, last = attacks.pgd(bent, bent.straight, y, 0.5)
    Units       bound in pixel widths
    """

    def __init__(self, classifier: nn.Module, x: Tensor, bound: float):
        super().__init__()
        units.check_images(x, classifier.image_shape)
        if not bound >= 0:
            raise ValueError(f"expected a bound >= 0 in pixel widths, got {bound}.")
        self.classifier = classifier
        self.x = x
        self.bound = bound
        self.num_classes = classifier.num_classes
        self.image_shape = (2, *x.shape[2:])
        self.deterministic = getattr(classifier, "deterministic", True)
        self.straight = torch.full((len(x), *self.image_shape), 0.5, dtype=x.dtype, device=x.device)

    def image(self, p: Tensor) -> Tensor:
        """The bent images. Shapes: p [B,2,H,W] -> [B,C,H,W]."""
        units.check_images(p, self.image_shape)
        if len(p) != len(self.x):
            raise ValueError(f"expected a flow for each of {len(self.x)} images, got {len(p)}.")
        return warp(self.x, self.bound * (2 * p - 1)).clamp(0, 1)

    def forward(self, p: Tensor) -> Tensor:
        """Logits of the bent images. Shapes: [B,2,H,W] -> [B,K]."""
        return self.classifier(self.image(p))
