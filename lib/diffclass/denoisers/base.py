"""The one noun that everything above stands on: a denoiser that answers for every class at once."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffclass import units
from diffclass.noise import Levels, log_levels

RANGE_SLACK = 1.01  # how far outside its range a level may lie, as a factor


class Denoiser(nn.Module, ABC):
    """E[x0 | x_sigma, class]: all that a diffusion classifier needs to know about a diffusion model.

    Subclasses are final and implement `estimate`. Predictions of the noise, the score or v are converted inside them;
    no timestep is visible here. The class index `num_classes` means "no class given", where `has_null` says it is
    offered; it is what likelihood maximisation and purification ask for.
    """

    num_classes: int
    image_shape: tuple[int, int, int]  # C, H, W of model space
    sigma_range: tuple[float, float]  # the levels at which the estimate can be trusted, model units
    has_null: bool = False
    has_density: bool = False  # whether `log_density(x_sigma, sigma)` is known exactly
    one_call: bool = False  # whether one call of the network answers for every class: classes left out save nothing

    def calls(self, classes: int) -> int:
        """How many network calls it takes to denoise one image under so many classes."""
        return 1 if self.one_call else classes

    @abstractmethod
    def estimate(self, x_sigma: Tensor, sigma: Tensor, classes: Tensor) -> Tensor:
        """The denoised images. Shapes: x_sigma [B,C,H,W], sigma [B], classes [k] -> [B,k,C,H,W]; inputs are checked."""

    def answers(self, x_sigma: Tensor, sigma: Tensor) -> Tensor:
        """Denoise under every class and, where it is offered, "no class": for training, nothing is checked.

        Shapes      x_sigma [B,C,H,W], sigma [B] -> [B,K or K+1,C,H,W]
        Why         a check reads a number back from the accelerator, which a captured step cannot
        """
        count = self.num_classes + self.has_null
        return self.estimate(x_sigma, sigma, torch.arange(count, device=x_sigma.device))

    def forward(
        self, x_sigma: Tensor, sigma: Tensor | float, classes: Sequence[int] | Tensor | None = None
    ) -> Tensor:
        """Denoise under every class, or under the classes named.

        Formula     D_k(x_sigma, sigma) = E[x0 | x_sigma, k]
        Shapes      x_sigma [B,C,H,W], sigma a number or [B], classes [k] or None for all K -> [B,k,C,H,W]
        Units       model space
        Errors      ValueError for a wrong shape, sigma <= 0, or a class that does not exist; FloatingPointError for an
                    answer that is not finite
        """
        units.check_images(x_sigma, self.image_shape, pixel_range=False)
        sigma = units.check_sigma(sigma).to(x_sigma)
        if sigma.ndim == 0:
            sigma = sigma.expand(len(x_sigma))
        elif tuple(sigma.shape) != (len(x_sigma),):
            raise ValueError(
                f"expected one noise level for all images or one for each of {len(x_sigma)}, "
                f"got sigma of shape {list(sigma.shape)}."
            )
        denoised = self.estimate(x_sigma, sigma, self.check_classes(classes).to(x_sigma.device))
        # whoever leaves classes out marks them by NaN, so one of a network's own would pass for that
        if not bool(torch.isfinite(denoised.detach()).all()):
            raise FloatingPointError(
                f"expected finite denoised images, got NaN or infinity from {type(self).__name__} at sigma "
                f"{float(sigma.min()):.3g} to {float(sigma.max()):.3g}; are its weights finite, and its precision enough?"
            )
        return denoised

    def unconditional(self, x_sigma: Tensor, sigma: Tensor | float) -> Tensor:
        """Denoise without a class: E[x0 | x_sigma]. Shapes: [B,C,H,W], sigma a number or [B] -> [B,C,H,W]."""
        return self(x_sigma, sigma, [self.num_classes])[:, 0]

    def grid(self, count: int) -> Levels:
        """`count` levels over the whole of `sigma_range`, evenly spread as its noise schedule is, or over ln sigma without one.

        Errors      those of `noise.log_levels`
        """
        return log_levels(*self.sigma_range, count)

    def check_levels(self, sigma: Tensor) -> Tensor:
        """Return noise levels at which the estimate can be trusted; raise for those outside of `sigma_range`.

        Units       model space
        """
        low, high = self.sigma_range
        if bool((sigma < low / RANGE_SLACK).any()) or bool((sigma > high * RANGE_SLACK).any()):
            raise ValueError(
                f"expected noise levels between {low:.4g} and {high:.4g}, which this denoiser was trained at, got "
                f"{float(sigma.min()):.4g} to {float(sigma.max()):.4g}; choose levels inside its sigma_range."
            )
        return sigma

    def check_classes(self, classes: Sequence[int] | Tensor | None) -> Tensor:
        """Return class indices as a long tensor [k], all K for None; raise if one does not exist."""
        if classes is None:
            return torch.arange(self.num_classes)
        named = units.check_numbers(classes, "classes").reshape(-1)
        if bool((named != named.floor()).any()):
            raise ValueError(f"expected classes as whole numbers, got {named.tolist()}.")
        classes = named.long()
        last = self.num_classes if self.has_null else self.num_classes - 1
        if classes.numel() == 0 or int(classes.min()) < 0 or int(classes.max()) > last:
            null = (
                f" ({self.num_classes} = no class)"
                if self.has_null
                else "; this one has no 'no class'"
            )
            raise ValueError(
                f"expected classes between 0 and {last}{null}, got {classes.tolist()}; "
                f"this denoiser was made for {self.num_classes} classes."
            )
        return classes
