"""Rectified flows, which predict a velocity, behind the one interface: their time vanishes in here."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffclass import noise
from diffclass.denoisers.base import Denoiser

# x_t [N,C,H,W], t [N] in (0,1), classes [N] -> E[eps - x0 | x_t, class] [N,C,H,W]
Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


class FlowDenoiser(Denoiser):
    """A velocity of a rectified flow, asked at noise levels instead of times.

    Formula     t = sigma/(1 + sigma),  x_t = (1 - t) x_sigma = (1 - t) x0 + t eps,  D_k = x_t - t v_k(x_t, t)
    Source      Liu et al. 2023; v = E[eps - x0 | x_t], and x_t = (1 - t) x0 + t eps makes x_t - t v = E[x0 | x_t]
    Shapes      velocity(x_t [N,C,H,W], t [N], classes [N]) -> [N,C,H,W]; shift: the scheduler's, for `grid` alone, as D
                does not depend on which times a sampler visits
    Bayes       `noise.elbo_weight` on ||D - x0||^2 is (1 - t)/t on the velocity error; `noise.FLOW_WEIGHTINGS` has others
    Errors      ValueError for levels that are no range, or a shift <= 0
    """

    def __init__(
        self,
        velocity: Velocity,
        num_classes: int,
        image_shape: tuple[int, int, int],
        sigma_range: tuple[float, float],
        has_null: bool = False,
        shift: float = 1.0,
    ):
        super().__init__()
        noise.flow_levels(*sigma_range, 1, shift)  # says what is wrong with the range or the shift
        self.velocity = velocity
        self.num_classes = num_classes
        self.image_shape = tuple(image_shape)
        self.sigma_range = tuple(map(float, sigma_range))
        self.has_null = has_null
        self.shift = float(shift)
        self.notes: tuple[str, ...] = ()

    def grid(self, count: int) -> noise.Levels:
        """`count` levels, evenly spread over the time of the scheduler. Errors: those of `noise.flow_levels`."""
        return noise.flow_levels(*self.sigma_range, count, self.shift)

    def estimate(self, x_sigma: Tensor, sigma: Tensor, classes: Tensor) -> Tensor:
        """See `Denoiser.forward`."""
        times = len(classes)
        sigma = self.check_levels(sigma).repeat_interleave(times)
        t = noise.flow_time(sigma)
        # not by 1 - t, of which little is left in single precision where t is near 1
        x_t = x_sigma.repeat_interleave(times, 0) / (1 + sigma)[:, None, None, None]
        velocity = self.velocity(x_t, t, classes.repeat(len(x_sigma)))
        return (x_t - t[:, None, None, None] * velocity).unflatten(0, (len(x_sigma), times))


class ExactVelocity(nn.Module):
    """The velocity of a perfect flow, from a denoiser.

    Formula     v_k(x_t, t) = (x_t - D_k(x_t / (1 - t), t / (1 - t))) / t
    Shapes      x_t [N,C,H,W], t [N], classes [N] -> [N,C,H,W]
    Errors      those of the denoiser and of `noise.sigma_of_flow_time`
    """

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x_t: Tensor, t: Tensor, classes: Tensor) -> Tensor:
        """One call."""
        column = t[:, None, None, None]
        asked, own = classes.unique(return_inverse=True)
        every = self.denoiser(x_t / (1 - column), noise.sigma_of_flow_time(t), asked)
        denoised = every[torch.arange(len(x_t), device=x_t.device), own]
        return (x_t - denoised) / column
