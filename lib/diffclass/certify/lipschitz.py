"""The Lipschitz certificate of a diffusion classifier: how far its logits can fall, whatever the network.

The noise in the losses makes them smooth: their gradient is that of a Gaussian density against errors that cannot be
large, as long as pictures and denoised pictures lie in [-1,1]. So this is about clipped denoisers (`denoisers.Clipped`)
and about the mean over *all* noise: with a fixed bank of draws the logits are as steep as the network.
"""

import math
from dataclasses import dataclass

import numpy as np

from diffclass import noise, units
from diffclass.certify.anytime import check_alpha
from diffclass.certify.soft import SOFT_BOUNDS
from diffclass.noise import Levels, Weighting

MEAN_SIZE = math.sqrt(2 / math.pi)  # E|z| of a standard normal number
LARGEST_SQUARE = 4.0  # of the difference of two pixels in [-1,1]
OVER = ("sum", "mean")  # of a loss, over the pixels
SLACK = 1e-5  # relative, of losses in single precision

# ---------------------------------------------------------------------------------------------------------------------
# Constants: how fast logits can change


def margin_constant(
    levels: Levels,
    dimensions: int,
    weighting: Weighting = noise.elbo_weight,
    over: str = "sum",
) -> float:
    """How fast the difference of two logits can change with the picture, in L2.

    Formula     f_k(z) = - sum_t w_t E||D_k(z + sigma_t eps) - z||^2,  z and D_k in [-1,1]^D:
                Lip(f_y - f_k) <= 2 sum_t w_t (4 D sqrt(2/pi) / sigma_t + 4 sqrt(D)),  over D for the mean over pixels
    Why         of two losses only the difference counts, at most 4 D. Differentiate the Gaussian density:
                |v . grad E Delta_t| <= 4 D E|v . eps| / sigma_t + 2 |E[D_y - D_k]|,  E|v . eps| = sqrt(2/pi). The factor
                2 in front is dz/dx
    Source      Chen et al. 2024 (NDC), in the units of this library (tests/test_lipschitz.py: 99.9 % are reached)
    Units       levels in model space, logits in nats (`elbo`) or what the weighting gives; the constant is per *pixel*
                unit, as radii are
    Errors      ValueError for an unknown `over`, or weights that are negative
    """
    sigma, weights, dimensions = _checked(levels, weighting, dimensions)
    each = LARGEST_SQUARE * dimensions * MEAN_SIZE / sigma + 4 * math.sqrt(dimensions)
    return _in_pixels(weights, each, dimensions, over)


def logit_constant(
    levels: Levels,
    dimensions: int,
    weighting: Weighting = noise.elbo_weight,
    over: str = "sum",
) -> float:
    """How fast one logit can change with the picture, in L2.

    Formula     Lip(f_k) <= 2 sum_t w_t (4 D / (sqrt(2 pi) sigma_t) + 4 sqrt(D)),  over D for the mean over pixels
    Why         a loss lies in [0, 4D], so at most 2D from its middle; twice this is more than `margin_constant`, in whose
                second term |z|^2 has cancelled
    Source, Units, Errors       those of `margin_constant`
    """
    sigma, weights, dimensions = _checked(levels, weighting, dimensions)
    each = LARGEST_SQUARE / 2 * dimensions * MEAN_SIZE / sigma + 4 * math.sqrt(dimensions)
    return _in_pixels(weights, each, dimensions, over)


def released_constant(levels: Levels, weighting: Weighting = noise.elbo_weight) -> float:
    """The constant of NDC's released code for one logit of mean losses, whose radius is margin / (2 L): too small.

    Formula     (1 + sqrt(2/pi)) sum_t w_t / sigma_t
    Why         losses are squares of [-1,1], four times those of [0,1], and radii pixels, half as long: neither factor is
                there. A classifier of ours changes its mind inside the radius (tests/test_lipschitz.py); not for use
    Source      the released code of Chen et al. 2024 (NDC)
    """
    sigma, weights, _ = _checked(levels, weighting, 1)
    return float((1 + MEAN_SIZE) * (weights / sigma).sum())


def probability_constant(constant: float) -> float:
    """How fast a posterior probability can change, from `margin_constant` of its logits.

    Formula     Lip(p_y) <= 1/4 max_k Lip(f_y - f_k),  as  grad p_y = p_y sum_k p_k grad(f_y - f_k),  p_y (1 - p_y) <= 1/4
    Units       those of the constant; of logits divided by a temperature, divide it too
    """
    return units.check_number(constant, "a Lipschitz constant", above=0) / 4


# ---------------------------------------------------------------------------------------------------------------------
# Radii


def margin_radius(margin: float, constant: float) -> float:
    """How far the picture can move before a margin is used up; 0 where there is none.

    Formula     max(0, f_y - max_k f_k) / Lip(f_y - f_k)
    Units       L2, pixels in [0,1], of a constant per pixel unit
    """
    constant = units.check_number(constant, "a Lipschitz constant", above=0)
    return max(0.0, units.check_number(margin, "a margin")) / constant


def weak_radius(first: float, second: float, constant: float) -> float:
    """The radius of probabilities that change at most at one rate everywhere: the weak law.

    Formula     max(0, p_1 - p_2) / (2 L), at most 1/(2 L): the largest may fall and the second rise, both at rate L
    Why         a constant that holds for every value cannot tell a sure picture from a safe one; smoothing's Phi^-1 can
    Source      Chen et al. 2024 (NDC)
    Units       L2, pixels in [0,1], of a constant per pixel unit
    Errors      ValueError for what are no two probabilities of one law
    """
    first = units.check_number(first, "the first probability", least=0)
    second = units.check_number(second, "the second probability", least=0)
    if first + second > 1 + 1e-6:
        raise ValueError(
            f"expected two probabilities of one law, got {first:g} and {second:g}, more than 1 in all."
        )
    return margin_radius(first - second, 2 * units.check_number(constant, "L", above=0))


# ---------------------------------------------------------------------------------------------------------------------
# The certificate of losses that are estimated


@dataclass(frozen=True)
class LipschitzCertificate:
    """A guarantee for one picture, about the classifier that averages over all noise.

    `prediction` is None, and `radius` 0, where no class is proven to lead (an abstention, which counts as an error).
    `margin` is a lower bound of the lead over every other class, except with probability alpha over n draws of noise.
    Units       radius: L2, pixels in [0,1], for perturbed pictures in [0,1] too; sigma_range in model units
    """

    prediction: int | None
    radius: float
    margin: float
    constant: float
    n: int
    alpha: float
    sigma_range: tuple[float, float]
    dimensions: int
    bound: str

    def __post_init__(self):
        most = margin_radius(self.margin, self.constant)
        if self.radius > most * (1 + 1e-12):
            raise ValueError(
                f"expected a radius of at most margin / constant = {most:.4g}, got {self.radius:.4g}."
            )
        if self.prediction is None and self.radius != 0:
            raise ValueError(f"expected radius 0 for an abstention, got {self.radius:.4g}.")

    @property
    def setting(self) -> str:
        """What certificates of one classifier and one confidence have in common."""
        low, high = self.sigma_range
        return f"Lipschitz, levels {low:g} to {high:g}, constant={self.constant:g}, alpha={self.alpha:g}"


def lipschitz_certificate(
    errors,
    levels: Levels,
    dimensions: int,
    weighting: Weighting = noise.elbo_weight,
    alpha: float = 0.001,
    bound: str = "betting",
) -> LipschitzCertificate:
    """Certify a picture by the errors of a clipped denoiser under independent noise, or abstain.

    Formula     margin_yk = E sum_t w_t (e_kt - e_yt), from n draws, each between -4 D sum_t w_t and 4 D sum_t w_t;
                its lower bound by `bound` at level alpha / (K (K - 1)), as the leading class y is read from the same
                draws; radius = min_k of them / Lip(f_y - f_k)
    Shapes      errors [K,T,S]: those of one picture in [-1,1] by `likelihood.diffusion_errors` of a `Clipped` denoiser,
                of S independent draws at T levels, summed over the D pixels
    Units       radius: L2, pixels in [0,1]
    Meaning     about the classifier that averages over all noise, which no run computes: one of finitely many draws can
                differ from it, and is as steep as its network. Of equal priors, and without the `end_term`, whose slope
                is in no constant here. Errors of several pictures under one bank are not independent, and neither
                are their certificates, which `certificates.wrong_at_most` assumes
    Randomness  in the errors: draws of `NoiseBank.fixed` or `fresh`; those of `sobol` are not independent
    Errors      ValueError for errors outside [0, 4 D], as of a denoiser that is not clipped, or another shape;
                those of `margin_constant` and of the bound
    """
    _, weights, dimensions = _checked(levels, weighting, dimensions)
    lower_bound = units.chosen(bound, SOFT_BOUNDS, "the bound of the margin")
    alpha = check_alpha(alpha)
    e = units.check_numbers(errors, "errors").detach().cpu().double().numpy()
    if e.ndim != 3 or len(e) < 2 or e.shape[1] != len(weights) or e.shape[2] < 2:
        raise ValueError(
            f"expected errors [K,T,S] of at least two classes, {len(weights)} levels and two draws, got shape "
            f"{list(e.shape)}; take one picture's from likelihood.diffusion_errors."
        )
    largest = LARGEST_SQUARE * dimensions
    if e.min() < 0 or e.max() > largest * (1 + SLACK):
        raise ValueError(
            f"expected errors between 0 and 4 D = {largest:g}, got {e.min():.4g} to {e.max():.4g}; wrap the denoiser in "
            "denoisers.clipped.Clipped, and give pictures of model space [-1,1]."
        )
    losses = np.einsum("t,kts->ks", weights, e)  # [K,S]
    leading = int(np.argmin(losses.mean(1)))
    leads = np.delete(losses, leading, axis=0) - losses[leading]  # [K-1,S]
    reach = largest * float(weights.sum())
    pairs = len(e) * (len(e) - 1)
    shares = np.clip((leads + reach) / (2 * reach), 0, 1)
    margin = float((2 * reach * np.asarray(lower_bound(shares, alpha / pairs)) - reach).min())
    constant = margin_constant(levels, dimensions, weighting)
    return LipschitzCertificate(
        prediction=leading if margin > 0 else None,
        radius=margin_radius(margin, constant),
        margin=margin,
        constant=constant,
        n=e.shape[2],
        alpha=alpha,
        sigma_range=(float(levels.sigma.min()), float(levels.sigma.max())),
        dimensions=dimensions,
        bound=bound.lower(),
    )


def _checked(
    levels: Levels, weighting: Weighting, dimensions: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Levels and weights [T] as float64, and D."""
    if not isinstance(levels, Levels):
        raise TypeError(f"expected noise levels as noise.Levels, got {type(levels).__name__}.")
    dimensions = units.check_whole(dimensions, "dimensions", least=1)
    weights = units.check_numbers(weighting(levels), "weights").detach().cpu().double().numpy()
    if weights.min() < 0 or weights.sum() == 0:
        raise ValueError(
            f"expected weights >= 0, not all of them 0, got {weights.min():g} to {weights.max():g}."
        )
    return levels.sigma.detach().cpu().double().numpy(), weights, dimensions


def _in_pixels(weights: np.ndarray, each: np.ndarray, dimensions: int, over: str) -> float:
    """A constant per pixel unit, from that of each level's loss per model unit."""
    whole = units.sigma_to_model(float((weights * each).sum()))
    return whole if units.chosen(over, OVER, "over") == "sum" else whole / dimensions
