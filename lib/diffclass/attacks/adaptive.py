"""What an attack that knows the defence adds to its loss."""

from collections.abc import Callable

from torch import Tensor

from diffclass import likelihood, units
from diffclass.denoisers.base import Denoiser
from diffclass.noise import NoiseBank


def unlikeliness(
    denoiser: Denoiser, bank: NoiseBank, strength: float
) -> Callable[[Tensor], Tensor]:
    """The penalty of the Lagrange attack: the unconditional loss that likelihood maximisation would lower.

    Formula     strength * mean_ts ||D(z + sigma_t eps_ts, sigma_t) - z||^2 / D, z = 2x - 1
    Source      Chen et al. 2024 (RDC): maximise loss(f(x), y) - c * diffusion loss, and there is nothing left to undo
    Shapes      -> a function of x [B,C,H,W] in [0,1] -> [B], for `attacks.pgd(..., penalty=...)`
    """
    strength = units.check_number(strength, "a strength")
    if not strength >= 0:
        raise ValueError(
            f"expected a strength >= 0, got {strength}; a negative one would seek unlikely images."
        )

    def penalty(x: Tensor) -> Tensor:
        units.check_images(x, denoiser.image_shape)
        errors = likelihood.diffusion_loss(
            denoiser, units.to_model(x), bank, [denoiser.num_classes]
        )
        return strength * errors.flatten(1).mean(1) / x[0].numel()

    return penalty
