"""Noise levels, schedules, quadrature weights and shared noise. Timesteps never leave this module.

Everything is said in sigma, the standard deviation of the noise in model space: x_sigma = x0 + sigma * eps. A DDPM
timestep t with signal coefficient abar_t is the level sigma_t = sqrt((1 - abar_t) / abar_t).
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffclass import units

EDM_LOG_MEAN = -1.2  # Karras et al. 2022, Table 1
EDM_LOG_STD = 1.2
EDM_SIGMA_DATA = 0.5

# ---------------------------------------------------------------------------------------------------------------------
# Schedules: betas -> abar -> sigma


def linear_betas(steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """DDPM's schedule. Source: Ho et al. 2020, section 4. Shapes: -> [T], float64."""
    first, last, steps = _check_betas(first, last, steps)
    return torch.linspace(first, last, steps, dtype=torch.float64)


def scaled_linear_betas(steps: int = 1000, first: float = 0.00085, last: float = 0.012) -> Tensor:
    """Stable Diffusion's schedule, linear in sqrt(beta). Source: Rombach et al. 2022. Shapes: -> [T], float64."""
    first, last, steps = _check_betas(first, last, steps)
    return torch.linspace(math.sqrt(first), math.sqrt(last), steps, dtype=torch.float64) ** 2


def cosine_betas(steps: int = 1000, offset: float = 0.008, largest: float = 0.999) -> Tensor:
    """The cosine schedule. Formula: abar_t = f(t)/f(0), f(t) = cos^2(((t/T) + s)/(1 + s) * pi/2), betas capped.

    Source      Nichol & Dhariwal 2021, equation 17
    Shapes      -> [T], float64
    """
    steps = units.check_whole(steps, "steps", least=1)
    offset = units.check_number(offset, "offset", above=0)
    largest, _, _ = _check_betas(largest, largest, steps)
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = torch.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=largest)


def alpha_bar(betas: Tensor) -> Tensor:
    """Signal power left after t steps. Formula: abar_t = prod_{s<=t} (1 - beta_s). Shapes: [T] -> [T].

    Errors      those of `units.check_numbers`; ValueError for betas outside (0,1), or none
    """
    betas = units.check_numbers(betas, "betas")
    if betas.numel() == 0:
        raise ValueError("expected betas strictly between 0 and 1, got none.")
    if float(betas.min()) <= 0 or float(betas.max()) >= 1:
        raise ValueError(
            f"expected betas strictly between 0 and 1, got {float(betas.min()):.3g} to "
            f"{float(betas.max()):.3g}."
        )
    return torch.cumprod(1 - betas, dim=0)


def sigma_of_alpha_bar(abar: Tensor) -> Tensor:
    """The noise level of a DDPM signal coefficient. Formula: sigma = sqrt((1 - abar)/abar). Units: model space.

    Errors      those of `units.check_numbers`; ValueError for coefficients outside (0,1]
    """
    abar = units.check_numbers(abar, "signal coefficients")
    outside = abar[~((abar > 0) & (abar <= 1))]
    if outside.numel():
        raise ValueError(
            f"expected signal coefficients above 0 and at most 1, got {float(outside.flatten()[0]):.3g}."
        )
    return ((1 - abar) / abar).sqrt()


def alpha_bar_of_sigma(sigma: Tensor) -> Tensor:
    """The DDPM signal coefficient of a noise level. Formula: abar = 1 / (1 + sigma^2). Units: model space.

    Errors      those of `units.check_sigma`
    """
    units.check_sigma(sigma)
    return 1 / (1 + sigma**2)


def snr(sigma: Tensor) -> Tensor:
    """Signal-to-noise ratio of a level, for signals of unit variance. Formula: sigma^-2.

    Errors      those of `units.check_sigma`
    """
    units.check_sigma(sigma)
    return sigma**-2


def edm_sigmas(steps: int, low: float = 0.002, high: float = 80.0, rho: float = 7.0) -> Tensor:
    """EDM's sampling levels, descending. Source: Karras et al. 2022, equation 5. Shapes: -> [T], float64.

    Errors      ValueError unless 0 < low < high, rho > 0 and there is a step
    """
    low, high, steps = _check_grid(low, high, steps)
    rho = units.check_number(rho, "rho", above=0)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    return (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho


# ---------------------------------------------------------------------------------------------------------------------
# Levels: where the loss is measured, and which stretch of the sigma axis each measurement stands for


@dataclass(frozen=True)
class Levels:
    """T noise levels, each standing for one interval of the sigma axis; all [T], model units, ascending.

    The loss of level t is measured at `sigma[t]` and weighted by an integral over [lower[t], upper[t]].
    """

    sigma: Tensor
    lower: Tensor
    upper: Tensor

    def __post_init__(self):
        for name in ("sigma", "lower", "upper"):
            object.__setattr__(self, name, units.check_numbers(getattr(self, name), name))
        if not (
            self.sigma.shape == self.lower.shape == self.upper.shape
            and self.sigma.ndim == 1
            and len(self.sigma)
        ):
            raise ValueError(
                f"expected sigma, lower and upper as equally long vectors, got "
                f"{[list(v.shape) for v in (self.sigma, self.lower, self.upper)]}."
            )
        inside = (self.lower <= self.sigma) & (self.sigma <= self.upper) & (self.lower < self.upper)
        if float(self.lower[0]) <= 0 or not bool(inside.all()):
            raise ValueError(
                "expected 0 < lower <= sigma <= upper with lower < upper for every noise level; "
                f"got sigma {self.sigma.tolist()[:4]}..., lower {self.lower.tolist()[:4]}..."
            )

    def __len__(self) -> int:
        return len(self.sigma)

    def __repr__(self) -> str:
        return f"Levels(T={len(self)}, sigma {float(self.lower[0]):.3g} to {float(self.upper[-1]):.3g})"

    def __getitem__(self, kept) -> "Levels":
        """Some of the levels. Shapes: a slice or indices -> the levels chosen."""
        return Levels(self.sigma[kept], self.lower[kept], self.upper[kept])

    def to(self, other: Tensor) -> "Levels":
        """The levels on the device and in the precision of a tensor."""
        return Levels(self.sigma.to(other), self.lower.to(other), self.upper.to(other))

    @property
    def step(self) -> Tensor:
        """Width of each interval by the rule d sigma = sigma d ln sigma. Shapes: [T]."""
        return self.sigma * (self.upper / self.lower).log()


def midpoint_levels(edges: Tensor) -> Levels:
    """Levels at the geometric midpoints of ascending `edges` [T+1]: the midpoint rule in ln sigma."""
    edges = _check_edges(edges)
    return Levels((edges[:-1] * edges[1:]).sqrt(), edges[:-1], edges[1:])


def log_levels(low: float, high: float, count: int) -> Levels:
    """`count` geometric intervals of [low, high], measured at their midpoints: the natural quadrature.

    Why         the exact weight on the noise error is uniform in ln sigma, so equal steps there are equal work
    Units       model space
    """
    low, high, count = _check_grid(low, high, count)
    return midpoint_levels(
        torch.logspace(math.log10(low), math.log10(high), count + 1, dtype=torch.float64)
    )


def linear_levels(low: float, high: float, count: int) -> Levels:
    """`count` equal intervals of [low, high], measured at their left ends, as RDC's released code does.

    Units       model space
    """
    low, high, count = _check_grid(low, high, count)
    edges = torch.linspace(low, high, count + 1, dtype=torch.float64)
    return Levels(edges[:-1], edges[:-1], edges[1:])


def chain_levels(edges: Tensor) -> Levels:
    """The steps of a discrete diffusion chain, measured at their noisy ends: the levels of the discrete ELBO.

    Shapes      edges [T+1], ascending, edges[0] > 0 -> T levels
    Why         the network call of the step t+1 -> t happens at sigma_{t+1} (derived in notebook 02)
    """
    edges = _check_edges(edges)
    return Levels(edges[1:], edges[:-1], edges[1:])


def timestep_levels(chain: Tensor, count: int) -> Levels:
    """`count` timesteps of a chain, evenly spread, each standing for its stretch of timesteps.

    Formula     t_i = floor((i + 1/2) T / count), counted from 0; stretches meet half-way between two of them, by ln sigma
                where that is between two timesteps, and reach T / (2 count) beyond the first and the last
    Source      Li et al. 2023, its code: of 1000 timesteps 500 are 1, 3, ..., 999
    Shapes      chain [T], the ascending levels of its timesteps -> count levels
    Errors      those of `units.check_sigma`; ValueError for more levels than timesteps, or a chain that does not ascend
    """
    chain = units.check_sigma(chain).double()
    count = units.check_whole(count, "the number of noise levels", least=1)
    if chain.ndim != 1 or count > len(chain) or len(chain) < 2 or bool((chain.diff() <= 0).any()):
        raise ValueError(
            f"expected at most as many levels as the ascending chain has timesteps, got {count} of a chain of shape "
            f"{list(chain.shape)}."
        )
    steps = (2 * torch.arange(count) + 1) * len(chain) // (2 * count)
    reach = len(chain) / (2 * count)
    ends = torch.cat([steps[:1] - reach, (steps[1:] + steps[:-1]) / 2, steps[-1:] + reach]).double()
    ends = ends.clamp(0, len(chain) - 1)
    left = ends.floor().long().clamp(max=len(chain) - 2)
    log_chain = chain.log()
    edges = (log_chain[left] + (ends - left) * (log_chain[left + 1] - log_chain[left])).exp()
    sigma = chain[steps]
    # at an end of the chain the stretch begins or ends at the timestep itself
    return Levels(sigma, edges[:-1].minimum(sigma), edges[1:].maximum(sigma))


def noised_levels(sigma_tau: float, high: float, count: int) -> Levels:
    """`count` levels above the noise `sigma_tau` that an image already carries, geometric in the added noise r.

    Formula     sigma = sqrt(sigma_tau^2 + r^2), r from 2/count of sigma_tau, at most half of it, to
                sqrt(high^2 - sigma_tau^2)
    Why         near sigma_tau the integrand of a noised image changes on the scale of r, not of sigma. Leaving out what
                lies below the first r costs about r^2; one noise there scatters the classes by 1/r, which would cost
                more. So the first r falls as levels are added, and what is left out as count^-2: with a first r that
                stays, no number of levels brings it back
    Units       model space
    """
    sigma_tau = units.check_real(sigma_tau, "sigma_tau")
    high = units.check_real(high, "high")
    count = units.check_whole(count, "the number of noise levels")
    if not (0 < sigma_tau < high and math.isfinite(high)):
        raise ValueError(
            f"expected 0 < sigma_tau < high, got sigma_tau {sigma_tau:.3g} and high {high:.3g}; "
            "the chain must start at the noise that the image carries and end above it."
        )
    last = math.sqrt(high**2 - sigma_tau**2)
    first = min(0.5, 2 / max(1, count)) * min(sigma_tau, last)
    r_edges = log_levels(first, last, count)
    sigma_of = [(sigma_tau**2 + r**2).sqrt() for r in (r_edges.sigma, r_edges.lower, r_edges.upper)]
    return Levels(*sigma_of)


def _check_betas(first: float, last: float, steps: int) -> tuple[float, float, int]:
    """Two betas between 0 and 1, and a number of steps."""
    first = units.check_real(first, "a beta")
    last = units.check_real(last, "a beta")
    if not (0 < first < 1 and 0 < last < 1):
        raise ValueError(f"expected betas strictly between 0 and 1, got {first:.3g} to {last:.3g}.")
    return first, last, units.check_whole(steps, "steps", least=1)


def _check_edges(edges) -> Tensor:
    """The edges of intervals of levels, ascending; `Levels` says what is wrong with their order."""
    edges = units.check_numbers(edges, "the edges of noise levels")
    if edges.ndim != 1 or len(edges) < 2:
        raise ValueError(
            f"expected the edges of noise levels as two numbers or more, got shape {list(edges.shape)}."
        )
    return edges


def _check_grid(low: float, high: float, count: int) -> tuple[float, float, int]:
    low = units.check_real(low, "the lowest noise level")
    high = units.check_real(high, "the highest noise level")
    count = units.check_whole(count, "the number of noise levels")
    if not (0 < low < high and math.isfinite(high)):
        raise ValueError(
            f"expected noise levels with 0 < low < high, got low {low:g} and high {high:g}; "
            "the loss at zero noise is zero over zero, so start at 0.01 or so."
        )
    if count < 1:
        raise ValueError(f"expected at least one noise level, got {count}.")
    return low, high, count


# ---------------------------------------------------------------------------------------------------------------------
# Weightings: Levels -> weights [T] of ||x0 - D||^2. Each one defines a classifier; only the first two a posterior.

Weighting = Callable[[Levels], Tensor]


def discrete_elbo_weight(levels: Levels) -> Tensor:
    """The exact weight of one interval: half the drop of the signal-to-noise ratio.

    Formula     w_t = (lower_t^-2 - upper_t^-2) / 2 = integral of sigma^-3 over [lower_t, upper_t]
    Source      Gaussian KL of the VE chain; Kingma et al. 2021, equation 13
    Shapes      -> [T]
    """
    return (levels.lower**-2 - levels.upper**-2) / 2


def elbo_weight(levels: Levels) -> Tensor:
    """The exact continuous weight sigma^-3 d sigma by the midpoint rule in ln sigma.

    Formula     w_t = sigma_t^-3 * step_t = sigma_t^-2 ln(upper_t / lower_t)
    Source      Kingma et al. 2021; Kong et al. 2023 (pointwise I-MMSE)
    Shapes      -> [T]
    """
    return levels.sigma**-3 * levels.step


def right_end_weight(levels: Levels) -> Tensor:
    """The Riemann sum that NDC prints; it is smaller than the exact weight, so its sum is *not* a lower bound.

    Formula     w_t = (upper_t - lower_t) / upper_t^3
    Source      Chen et al. 2024 (NDC)
    Shapes      -> [T]
    """
    return (levels.upper - levels.lower) / levels.upper**3


def edm_weight(levels: Levels) -> Tensor:
    """EDM's training weight times its log-normal density: what RDC means to use.

    Formula     w_t = lambda(sigma) p(sigma) step,  lambda = (sigma^2 + s^2)/(sigma s)^2,  ln sigma ~ N(-1.2, 1.2^2)
    Source      Karras et al. 2022, Table 1; Chen et al. 2024 (RDC)
    Shapes      -> [T]
    """
    return edm_lambda(levels.sigma) * _log_normal(levels.sigma, EDM_LOG_STD) * levels.step


def rdc_released_weight(levels: Levels) -> Tensor:
    """RDC's released weight, with its slip: exp(-z^2/2 * s^2) where exp(-z^2 / (2 s^2)) is meant.

    Why         published numbers were computed with it; here by name, to reproduce them
    Shapes      -> [T]
    """
    z = levels.sigma.log() - EDM_LOG_MEAN
    slipped = (-(z**2) / 2 * EDM_LOG_STD**2).exp() / (
        levels.sigma * EDM_LOG_STD * math.sqrt(2 * math.pi)
    )
    return edm_lambda(levels.sigma) * slipped * levels.step


def unit_weight(levels: Levels) -> Tensor:
    """w = 1 on the x-error, uniform in sigma. Formula: w_t = step_t. Not a likelihood. Shapes: -> [T]."""
    return levels.step


def simple_weight(levels: Levels) -> Tensor:
    """DDPM's simple loss: w = 1 on the noise error, uniform in the timesteps of the linear schedule.

    Formula     w_t = sigma_t^-2 * (time spent in [lower_t, upper_t])
    Source      Ho et al. 2020, equation 14; used by Li et al. 2023 and TMDC
    Shapes      -> [T]
    """
    grid = sigma_of_alpha_bar(alpha_bar(linear_betas()))

    def time_of(sigma: Tensor) -> Tensor:  # linear interpolation of t over the schedule's levels
        s = sigma.to(grid).clamp(grid[0], grid[-1]).contiguous()
        right = torch.searchsorted(grid.to(s.device), s).clamp(1, len(grid) - 1)
        left = right - 1
        g = grid.to(s.device)
        return (left + (s - g[left]) / (g[right] - g[left])) / len(grid)

    return levels.sigma**-2 * (time_of(levels.upper) - time_of(levels.lower)).to(levels.sigma)


def even_noise_weight(levels: Levels) -> Tensor:
    """w = 1 on the noise error, every level alike: the mean over a grid of timesteps, as Li's code takes it.

    Formula     w_t = sigma_t^-2 / T
    Source      Li et al. 2023, its code; a likelihood would weigh each by its ln(upper/lower), `elbo_weight`
    Shapes      -> [T]
    """
    return levels.sigma**-2 / len(levels)


WEIGHTINGS: dict[str, Weighting] = {
    "discrete ELBO": discrete_elbo_weight,
    "ELBO": elbo_weight,
    "EDM": edm_weight,
    "RDC as released": rdc_released_weight,
    "w = 1 on noise": simple_weight,
    "w = 1 on x": unit_weight,
    "right end (NDC)": right_end_weight,
}


def edm_lambda(sigma: Tensor) -> Tensor:
    """EDM's weight of a denoising error, which gives every level a loss of about one at first.

    Formula     (sigma^2 + s^2) / (sigma s)^2 = 1 / c_out^2,  s = 0.5
    Source      Karras et al. 2022, Table 1
    Shapes      [...] -> [...]
    """
    return (sigma**2 + EDM_SIGMA_DATA**2) / (sigma * EDM_SIGMA_DATA) ** 2


def _log_normal(sigma: Tensor, log_std: float) -> Tensor:
    z = (sigma.log() - EDM_LOG_MEAN) / log_std
    return (-(z**2) / 2).exp() / (sigma * log_std * math.sqrt(2 * math.pi))


# ---------------------------------------------------------------------------------------------------------------------
# Rectified flow: x_t = (1 - t) x0 + t eps is x_sigma (1 - t) at the level sigma = t/(1 - t)


def flow_time(sigma: Tensor) -> Tensor:
    """The time of a rectified flow that has a noise level. Formula: t = sigma / (1 + sigma). Units: model space.

    Source      Liu et al. 2023 (rectified flow): x_t = (1 - t) x0 + t eps, divided by 1 - t
    Errors      those of `units.check_sigma`
    """
    sigma = units.check_sigma(sigma)
    return sigma / (1 + sigma)


def sigma_of_flow_time(t: Tensor) -> Tensor:
    """The noise level of a rectified flow at a time. Formula: sigma = t / (1 - t). Units: model space.

    Errors      those of `units.check_numbers`; ValueError for times outside (0,1): at 1 there is nothing but noise
    """
    t = units.check_numbers(t, "times of a flow")
    outside = t[~((t > 0) & (t < 1))]
    if outside.numel():
        raise ValueError(
            f"expected times of a flow strictly between 0 and 1, got {float(outside.flatten()[0]):.3g}; divide timesteps "
            "by their number."
        )
    return t / (1 - t)


def shifted_time(u: Tensor, shift: float) -> Tensor:
    """Where a scheduler's shift moves an even grid of times; to be applied once.

    Formula     t = s u / (1 + (s - 1) u), of the inverse u = t / (s - (s - 1) t), which is the shift by 1/s
    Source      Esser et al. 2024 (Stable Diffusion 3), equation 23
    Shapes      [...] in [0,1] -> [...]
    Errors      those of `units.check_numbers`; ValueError for a shift <= 0 or times outside [0,1]
    """
    u = units.check_numbers(u, "times of a flow")
    shift = units.check_number(shift, "the shift of a flow", above=0)
    if u.numel() and (float(u.min()) < 0 or float(u.max()) > 1):
        raise ValueError(
            f"expected times between 0 and 1, got {float(u.min()):.3g} to {float(u.max()):.3g}."
        )
    return shift * u / (1 + (shift - 1) * u)


def flow_levels(low: float, high: float, count: int, shift: float = 1.0) -> Levels:
    """`count` intervals of [low, high], equally long in the time of a scheduler before its shift.

    Formula     sigma = t/(1 - t), t = s u/(1 + (s - 1) u), u even, measured in the middle
    Why         each level stands for its stretch of sigma, so that no weight needs the Jacobian of the shift
    Units       model space
    Errors      those of `log_levels` and `shifted_time`
    """
    low, high, count = _check_grid(low, high, count)
    shift = units.check_number(shift, "the shift of a flow", above=0)
    ends = flow_time(torch.tensor([low, high], dtype=torch.float64))
    first, last = shifted_time(ends, 1 / shift).tolist()
    u = torch.linspace(first, last, 2 * count + 1, dtype=torch.float64)
    sigma = sigma_of_flow_time(shifted_time(u, shift))
    return Levels(sigma[1::2], sigma[:-1:2], sigma[2::2])


def on_velocity(levels: Levels, weight: Tensor) -> Tensor:
    """The weights of ||x0 - D||^2 that mean a weight of the velocity error, integrated over t.

    Formula     w_t = weight_t t^-2 (1 - t)^2 step_t,  as ||v - (eps - x0)||^2 = ||x0 - D||^2 / t^2, dt = (1 - t)^2 d sigma;
                weight (1 - t)/t gives sigma^-3 step, `elbo_weight`: the one that is Bayes' rule
    Shapes      weight [T] at the levels' times -> [T]
    """
    t = flow_time(levels.sigma)
    return weight * t**-2 * (1 - t) ** 2 * levels.step


def flow_noise_weight(levels: Levels) -> Tensor:
    """w = 1 on the noise error of a flow, uniform in t: (1 - t)^2 on the velocity error. Shapes: -> [T]."""
    return on_velocity(levels, (1 - flow_time(levels.sigma)) ** 2)


def flow_velocity_weight(levels: Levels) -> Tensor:
    """w = 1 on the velocity error, uniform in t: a flow's training loss without its density. Shapes: -> [T]."""
    return on_velocity(levels, torch.ones_like(levels.sigma))


def flow_logit_normal_weight(levels: Levels) -> Tensor:
    """The logit-normal density of t on the velocity error: the training loss of Stable Diffusion 3.

    Formula     exp(-ln(sigma)^2 / 2) / (t (1 - t)) / sqrt(2 pi) on the velocity error; ln sigma is the logit of t
    Source      Esser et al. 2024, equation 19 with m = 0, s = 1
    Shapes      -> [T]
    """
    t = flow_time(levels.sigma)
    density = (-(levels.sigma.log() ** 2) / 2).exp() / (t * (1 - t)) / math.sqrt(2 * math.pi)
    return on_velocity(levels, density)


def flow_x0_weight(levels: Levels) -> Tensor:
    """w = 1 on the x-error of a flow, uniform in t: t^2 on the velocity error, the default of training scripts.

    Why         scripts that precondition the output compare D with x0; as a classifier's weight it asks mostly where
                nothing of the picture is left
    Shapes      -> [T]
    """
    return on_velocity(levels, flow_time(levels.sigma) ** 2)


FLOW_WEIGHTINGS: dict[str, Weighting] = {
    "velocity, (1 - t)/t: the ELBO": elbo_weight,
    "noise, 1": flow_noise_weight,
    "velocity, 1": flow_velocity_weight,
    "velocity, logit-normal": flow_logit_normal_weight,
    "x0, 1: the default of training scripts": flow_x0_weight,
}


# ---------------------------------------------------------------------------------------------------------------------
# The noise itself, as an argument


def generator_of(seed: int, *purpose) -> torch.Generator:
    """A generator of its own for every purpose, whatever else was drawn: a resumed run draws what an unbroken one does.

    Shapes      purpose: words and whole numbers, such as ("evaluation", 3)
    """
    return torch.Generator().manual_seed(seed_of(seed, *purpose))


def seed_of(seed: int, *purpose) -> int:
    """A seed of its own for every purpose. Formula: the first 7 bytes of SHA-256 of the key.

    Errors      TypeError, ValueError for a seed that is no whole number
    """
    seed = units.check_whole(seed, "a seed", most=None)
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


class NoiseBank(nn.Module):
    """Noise levels and the noise drawn at them: an argument, never a side effect, and shared by all classes.

    Shapes      levels: T levels; noise [T,S,N,C,H,W], S samples a level, N = 1 (one noise for every image: the
                deterministic classifier) or N = B (each image its own: the random one)
    Randomness  all of it is here; `fixed` and `fresh` take the seed or the generator
    """

    def __init__(self, levels: Levels, noise: Tensor):
        super().__init__()
        noise = units.check_numbers(noise, "the noise of a bank")
        if noise.ndim != 6 or noise.shape[0] != len(levels):
            raise ValueError(
                f"expected noise of shape [T,S,N,C,H,W] with T = {len(levels)}, got {list(noise.shape)}."
            )
        for name in ("sigma", "lower", "upper"):
            self.register_buffer(name, getattr(levels, name).to(noise))
        self.register_buffer("noise", noise)

    @classmethod
    def fixed(
        cls,
        levels: Levels,
        image_shape: tuple[int, int, int],
        samples: int = 1,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> "NoiseBank":
        """One noise for every image, drawn from `seed`: the bank of a deterministic classifier."""
        generator = torch.Generator().manual_seed(units.check_whole(seed, "a seed", most=None))
        return cls.fresh(levels, image_shape, 1, generator, samples, dtype)

    @classmethod
    def fresh(
        cls,
        levels: Levels,
        image_shape: tuple[int, int, int],
        images: int,
        generator: torch.Generator,
        samples: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> "NoiseBank":
        """Independent noise for each of `images` images, drawn from `generator`, which advances."""
        samples = units.check_whole(samples, "noise samples a level", least=1)
        images = units.check_whole(images, "images", least=0)
        shape = (len(levels), samples, images, *units.check_image_shape(image_shape))
        return cls(
            levels, torch.randn(shape, generator=generator, dtype=dtype, device=generator.device)
        )

    @classmethod
    def sobol(
        cls,
        levels: Levels,
        image_shape: tuple[int, int, int],
        samples: int,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> "NoiseBank":
        """Evenly spread noise, the same at every level: smooth curves where images have few pixels, as on the plane.

        Formula     eps = sqrt(2) erfinv(2u - 1) for the points u of a scrambled Sobol sequence
        Source      randomised quasi-Monte Carlo; Owen 1997
        """
        image_shape = units.check_image_shape(image_shape)
        samples = units.check_whole(samples, "noise samples a level", least=1)
        seed = units.check_whole(seed, "a seed", most=None)
        engine = torch.quasirandom.SobolEngine(math.prod(image_shape), scramble=True, seed=seed)
        uniform = engine.draw(samples, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
        noise = torch.special.ndtri(uniform).to(dtype).reshape(1, samples, 1, *image_shape)
        return cls(levels, noise.expand(len(levels), -1, -1, -1, -1, -1).clone())

    @property
    def levels(self) -> Levels:
        """The levels, on the bank's device."""
        return Levels(self.sigma, self.lower, self.upper)

    @property
    def samples(self) -> int:
        """Noise draws a level."""
        return self.noise.shape[1]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return tuple(self.noise.shape[3:])

    def extra_repr(self) -> str:
        return f"{self.levels}, samples={self.samples}, images={self.noise.shape[2]}"
