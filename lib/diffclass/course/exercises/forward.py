"""Exercises of notebooks 00 to 02: noise and units, the forward process, the evidence lower bound."""

import math

import torch

from diffclass.course.exercises.base import Exercise, Mistake, NotYet, normal


def _column(v):
    """One value for each image, shaped to multiply [B,C,H,W]."""
    return v[:, None, None, None]


# ---------------------------------------------------------------------------------------------------------------------
# 00 Start here

FORWARD_NOISE = Exercise(
    key="00-forward-noise",
    prompt="Return x_sigma: the image x with the noise eps added at level sigma.",
    reference=lambda x, sigma, eps: x + sigma * eps,
    cases=lambda: [
        (normal(0, 2, 1, 4, 4), 0.3, normal(1, 2, 1, 4, 4)),
        (normal(2, 5), 2.5, normal(3, 5)),
    ],
    mistakes=(
        Mistake(
            lambda x, sigma, eps: x + sigma**2 * eps,
            "the noise comes out with the standard deviation sigma^2: sigma is a standard deviation, not the root "
            "of one",
        ),
        Mistake(
            lambda x, sigma, eps: x + math.sqrt(sigma) * eps,
            "you took sigma for a variance; no square root is needed here (it is, where a formula gives beta)",
        ),
        Mistake(
            lambda x, sigma, eps: x - sigma * eps,
            "the noise is subtracted; the law of x_sigma would be the same, but eps would no longer be the noise "
            "that a network is asked to find",
        ),
        Mistake(
            lambda x, sigma, eps: (x + sigma * eps) / math.sqrt(1 + sigma**2),
            "the image is scaled down: that is the variance-preserving form of notebook 01; here the image stays "
            "as it is",
        ),
    ),
    meaning="x_sigma = x + sigma eps is the only way noise enters this course; DDPM's timesteps are names for sigma.",
)

UNITS = Exercise(
    key="00-units",
    prompt="Given sigma_pixel, an L2 radius in pixel units and the number of values D of an image, return the pair "
    "(sigma in model units, L-inf radius in pixel units that the L2 radius guarantees).",
    reference=lambda sigma_pixel, radius, dimensions: (
        2 * sigma_pixel,
        radius / math.sqrt(dimensions),
    ),
    cases=lambda: [(0.25, 0.5, 3072), (1.0, 0.8, 64)],
    mistakes=(
        Mistake(
            lambda sigma_pixel, radius, dimensions: (
                sigma_pixel / 2,
                radius / math.sqrt(dimensions),
            ),
            "sigma went the other way: z = 2x - 1 stretches [0,1] to [-1,1], so lengths grow on the way in",
        ),
        Mistake(
            lambda sigma_pixel, radius, dimensions: (sigma_pixel, radius / math.sqrt(dimensions)),
            "sigma was not converted: the interval [-1,1] is twice as long as [0,1], and the noise with it",
        ),
        Mistake(
            lambda sigma_pixel, radius, dimensions: (
                4 * sigma_pixel,
                radius / math.sqrt(dimensions),
            ),
            "the factor 4 belongs to squared errors and variances; sigma is a length",
        ),
        Mistake(
            lambda sigma_pixel, radius, dimensions: (2 * sigma_pixel, radius / dimensions),
            "the L2 length of a vector with all entries e is sqrt(D) e, not D e",
        ),
        Mistake(
            lambda sigma_pixel, radius, dimensions: (2 * sigma_pixel, radius),
            "an L-inf ball of that radius sticks out of the L2 ball at its corners: which cube fits inside?",
        ),
        Mistake(
            lambda sigma_pixel, radius, dimensions: (
                2 * sigma_pixel,
                radius * math.sqrt(dimensions),
            ),
            "that is the direction from L-inf to L2; a guarantee for L-inf must be smaller than the L2 radius",
        ),
    ),
    meaning="An L2 radius of 0.5 on a colour image of 32 x 32 guarantees only 2.3/255 in L-inf: norms matter.",
)


# ---------------------------------------------------------------------------------------------------------------------
# 01 The forward process


def _q_sample_cases() -> list[tuple]:
    # The first case has as many images as columns, so that a forgotten reshape runs and is wrong; the second does not.
    first = (
        normal(0, 3, 1, 3, 3),
        torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64),
        normal(1, 3, 1, 3, 3),
    )
    second = (
        normal(2, 2, 3, 4, 5),
        torch.tensor([0.99, 0.2], dtype=torch.float64),
        normal(3, 2, 3, 4, 5),
    )
    return [first, second]


Q_SAMPLE = Exercise(
    key="01-q-sample",
    prompt="Draw x_t of DDPM from x0 [B,C,H,W], abar [B] (one for each image) and eps [B,C,H,W].",
    reference=lambda x0, abar, eps: _column(abar.sqrt()) * x0 + _column((1 - abar).sqrt()) * eps,
    cases=_q_sample_cases,
    mistakes=(
        Mistake(
            lambda x0, abar, eps: _column(abar) * x0 + _column(1 - abar) * eps,
            "the two coefficients are missing their square roots: abar and 1 - abar are variances",
        ),
        Mistake(
            lambda x0, abar, eps: _column((1 - abar).sqrt()) * x0 + _column(abar.sqrt()) * eps,
            "the coefficients are swapped: with abar near 1 the result must still look like the image",
        ),
        Mistake(
            lambda x0, abar, eps: _column(abar.sqrt()) * x0 + _column(1 - abar.sqrt()) * eps,
            "the variances do not add up to 1: the noise needs the root of 1 - abar, not 1 minus the root",
        ),
        Mistake(
            lambda x0, abar, eps: x0 + _column((1 - abar).sqrt()) * eps,
            "the image was not scaled: with its variance kept at 1, the sum would have more than 1",
        ),
        Mistake(
            lambda x0, abar, eps: abar.sqrt() * x0 + (1 - abar).sqrt() * eps,
            "abar [B] was matched with the last axis, the columns of the image; give it the shape [B,1,1,1]",
        ),
        Mistake(
            lambda x0, abar, eps: abar[0].sqrt() * x0 + (1 - abar[0]).sqrt() * eps,
            "one abar was used for all images; each has its own step t, and so its own abar",
        ),
    ),
    meaning="One line jumps to any step of the chain; its variance stays 1 when the data have variance 1.",
)

SIGMA_OF_ABAR = Exercise(
    key="01-sigma-of-abar",
    prompt="Return the level sigma for which x_t / sqrt(abar) = x0 + sigma eps.",
    reference=lambda abar: ((1 - abar) / abar) ** 0.5,
    cases=lambda: [(torch.tensor([0.9999, 0.8, 0.5, 0.2, 1e-3], dtype=torch.float64),)],
    mistakes=(
        Mistake(
            lambda abar: (1 - abar) ** 0.5,
            "that is the noise before x_t is divided by sqrt(abar); the division enlarges the noise too",
        ),
        Mistake(lambda abar: (1 - abar) / abar, "that is sigma^2, a variance: take the root"),
        Mistake(
            lambda abar: (abar / (1 - abar)) ** 0.5,
            "upside down: that is the root of the signal-to-noise ratio, which falls as noise grows",
        ),
        Mistake(
            lambda abar: ((1 - abar) / abar) ** 0.5 / 2,
            "half of it: abar speaks of model space already, so no conversion to pixels is wanted",
        ),
    ),
    meaning="DDPM, EDM and Stable Diffusion differ in names for one axis: sigma.",
)


def _verify_schedule(betas_of) -> None:
    for steps in (50, 200, 1000):
        betas = torch.as_tensor(betas_of(steps), dtype=torch.float64)
        at = f"With T = {steps}: "
        if betas.shape != (steps,):
            raise NotYet(
                f"{at}expected {steps} betas, one for each step, got shape {list(betas.shape)}; abar has a "
                "value before the first step, betas do not."
            )
        if (
            not bool(torch.isfinite(betas).all())
            or float(betas.min()) <= 0
            or float(betas.max()) >= 1
        ):
            raise NotYet(
                f"{at}expected every beta strictly between 0 and 1, got {float(betas.min()):.3g} to "
                f"{float(betas.max()):.3g}; beta is the share of variance that a step replaces."
            )
        if float(betas[0]) > 0.5 and bool((betas.diff() < 0).all()):
            raise NotYet(
                f"{at}these numbers fall from {float(betas[0]):.3g} to {float(betas[-1]):.3g}, as abar does; "
                "return the betas of the single steps, not their accumulated product."
            )
        abar = torch.cumprod(1 - betas, 0)
        first = float(abar[0] / (1 - abar[0]))
        last = float(abar[-1] / (1 - abar[-1]))
        if first < 10:
            raise NotYet(
                f"{at}the signal-to-noise ratio is {first:.3g} after one step; begin gently (10 or more), "
                "or the network never sees fine detail."
            )
        if bool((betas.diff() < 0).any()):
            raise NotYet(
                f"{at}beta falls somewhere; as the signal fades, each step may replace more of it, not less."
            )
        if last >= 1e-3:
            raise NotYet(
                f"{at}the final signal-to-noise ratio is {last:.3g}, not below 1e-3; "
                "betas made for 1000 steps are too small for fewer: let them grow as T shrinks."
            )


SNR_SCHEDULE = Exercise(
    key="01-snr-schedule",
    prompt="Write betas(T) -> [T]: non-decreasing, in (0,1), signal-to-noise ratio above 10 after the first step and "
    "below 1e-3 after the last, for T = 50, 200 and 1000.",
    reference=lambda steps: torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64),
    cases=lambda: [],
    mistakes=(
        Mistake(
            lambda steps: torch.linspace(1e-4, 0.02, steps),
            "betas made for 1000 steps are too small for fewer",
        ),
        Mistake(lambda steps: torch.linspace(0.999, 1e-4, steps), "not their accumulated product"),
        Mistake(lambda steps: torch.full((steps,), 0.2), "begin gently"),
        Mistake(
            lambda steps: torch.linspace(0.1 / steps, 20 / steps, steps + 1),
            "abar has a value before the first",
        ),
        Mistake(
            lambda steps: torch.linspace(0, 20 / steps, steps), "beta is the share of variance"
        ),
        Mistake(
            lambda steps: torch.linspace(4 / steps, 20 / steps, steps).flip(0) / 5,
            "beta falls somewhere",
        ),
    ),
    meaning="Any schedule that starts gently and ends in pure noise will do; it chooses where the levels lie, no more.",
    verify=_verify_schedule,
)


# ---------------------------------------------------------------------------------------------------------------------
# 02 The evidence lower bound


def _edges() -> list[tuple]:
    edges = torch.tensor([0.05, 0.1, 0.3, 1.0, 4.0, 20.0], dtype=torch.float64)
    return [(edges[:-1], edges[1:])]


VE_WEIGHT = Exercise(
    key="02-ve-weight",
    prompt="Return the exact weight of ||x0 - D||^2 for the step from the level upper [T] down to lower [T].",
    reference=lambda lower, upper: (lower**-2 - upper**-2) / 2,
    cases=_edges,
    mistakes=(
        Mistake(
            lambda lower, upper: lower**-2 - upper**-2,
            "twice too large: the KL of two Gaussians has a factor 1/2 in front",
        ),
        Mistake(
            lambda lower, upper: (upper - lower) / upper**3,
            "that is the Riemann value of sigma^-3 at the noisy end: right for tiny steps, too small for these, so "
            "the sum is no lower bound",
        ),
        Mistake(
            lambda lower, upper: (upper - lower) / lower**3,
            "that is the Riemann value of sigma^-3 at the clean end; the KL gives an exact expression",
        ),
        Mistake(
            lambda lower, upper: (upper**-2 - lower**-2) / 2,
            "negative: the signal-to-noise ratio sigma^-2 falls as sigma grows, and a weight is positive",
        ),
        Mistake(
            lambda lower, upper: (upper / lower).log(),
            "that is the weight on the error of eps, ||eps - eps_hat||^2; on x0 it is larger by sigma^-2",
        ),
    ),
    meaning="The weight of a step is half the drop of the signal-to-noise ratio; short steps make it sigma^-3 d sigma.",
)

KL_GAUSSIANS = Exercise(
    key="02-kl-gaussians",
    prompt="Return KL(N(mean_p, variance I) || N(mean_q, variance I)) for means [B,D]: one number for each row.",
    reference=lambda mean_p, mean_q, variance: ((mean_p - mean_q) ** 2).sum(-1) / (2 * variance),
    cases=lambda: [
        (normal(0, 4, 3), normal(1, 4, 3), 0.25),
        (normal(2, 2, 7), normal(3, 2, 7), 3.0),
    ],
    mistakes=(
        Mistake(
            lambda mean_p, mean_q, variance: ((mean_p - mean_q) ** 2).mean(-1) / (2 * variance),
            "averaged over the D coordinates: KL of independent coordinates adds up",
        ),
        Mistake(
            lambda mean_p, mean_q, variance: ((mean_p - mean_q) ** 2).sum(-1) / variance,
            "the factor 1/2 of the Gaussian's exponent is missing",
        ),
        Mistake(
            lambda mean_p, mean_q, variance: ((mean_p - mean_q) ** 2).sum(-1) / (2 * variance**0.5),
            "divided by the standard deviation; a squared distance is measured in variances",
        ),
        Mistake(
            lambda mean_p, mean_q, variance: ((mean_p - mean_q) ** 2).sum(-1) / (2 * variance**2),
            "the variance is squared once too often: the argument is a variance, not a standard deviation",
        ),
        Mistake(
            lambda mean_p, mean_q, variance: (
                ((mean_p - mean_q) ** 2).sum(-1).sqrt() / (2 * variance)
            ),
            "the distance enters squared; you took its root",
        ),
    ),
    meaning="With equal covariance, KL is a squared distance: this is why training a diffusion model is regression.",
)


def _posterior_cases() -> list[tuple]:
    return [
        (normal(0, 2, 3), normal(1, 2, 3), 0.5, 0.8),
        (normal(2, 4), normal(3, 4), 1.0, 3.0),
    ]


POSTERIOR_MEAN = Exercise(
    key="02-posterior-mean",
    prompt="Return the mean of q(x_t given x_{t+1}, x0) when x_t = x0 + s eps and x_{t+1} has the level s_next > s.",
    reference=lambda x0, x_next, s, s_next: ((s_next**2 - s**2) * x0 + s**2 * x_next) / s_next**2,
    cases=_posterior_cases,
    mistakes=(
        Mistake(
            lambda x0, x_next, s, s_next: (s**2 * x0 + (s_next**2 - s**2) * x_next) / s_next**2,
            "the weights are swapped: for s near 0, x_t is nearly x0",
        ),
        Mistake(
            lambda x0, x_next, s, s_next: ((s_next - s) * x0 + s * x_next) / s_next,
            "the weights use standard deviations; independent noises add in variance",
        ),
        Mistake(
            lambda x0, x_next, s, s_next: (x0 / s**2 + x_next / s_next**2) / (s**-2 + s_next**-2),
            "x_{t+1} was given the precision of its whole noise; seen from x_t it carries s_next^2 - s^2 more",
        ),
        Mistake(
            lambda x0, x_next, s, s_next: (s_next**2 - s**2) * x0 + s**2 * x_next,
            "not divided by s_next^2: the weights of a mean add up to 1",
        ),
    ),
    meaning="Replace x0 by the denoiser and this is the model's reverse step; the KL sees only their difference.",
)
