"""A denoiser whose pictures stay pictures: what the Lipschitz certificate is about."""

from torch import Tensor

from diffclass.denoisers.base import Denoiser


class Clipped(Denoiser):
    """Another denoiser with every pixel of its answer brought into [-1,1].

    Formula     clip(D_k(x_sigma, sigma), -1, 1)
    Source      Chen et al. 2024 (NDC), whose theorem needs it and whose released code leaves it out
    Units       model space
    Meaning     a classifier of its own: where the denoiser leaves [-1,1] its losses change, and its gradient is 0. The
                density of an exact denoiser is not that of the clipped one, so none is offered
    """

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        self.denoiser = denoiser
        self.num_classes = denoiser.num_classes
        self.image_shape = denoiser.image_shape
        self.sigma_range = denoiser.sigma_range
        self.has_null = denoiser.has_null
        self.one_call = denoiser.one_call

    def estimate(self, x_sigma: Tensor, sigma: Tensor, classes: Tensor) -> Tensor:
        """See `Denoiser.forward`."""
        return self.denoiser.estimate(x_sigma, sigma, classes).clamp(-1, 1)
