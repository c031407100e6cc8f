"""log p(x | k) for every class: exact where there is a closed form, and by the losses of a diffusion model.

One function measures losses (`diffusion_errors`); everything else is a weighted sum of what it returns.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffclass import noise, units
from diffclass.denoisers.base import Denoiser
from diffclass.noise import NoiseBank, Weighting

LARGEST = 2**62  # of a chunk, which may be meant as "all at once"
CHUNK = 4096  # network inputs evaluated at once: bounds memory, changes no value


def diffusion_errors(
    denoiser: Denoiser,
    z: Tensor,
    bank: NoiseBank,
    classes: Sequence[int] | None = None,
    chunk: int = CHUNK,
    distance: Callable[[Tensor], Tensor] = torch.square,
) -> Tensor:
    """The squared error of the denoised image, for every class, noise level and noise sample.

    Formula     e[b,k,t,s] = ||D_k(z_b + sigma_t eps_ts, sigma_t) - z_b||^2, summed over the D pixels
    Shapes      z [B,C,H,W] in [-1,1], bank T x S; distance: of each pixel's error, torch.abs in place of the square for the
                l1 norm, which is no likelihood -> [B,K,T,S]
    Randomness  all in `bank`; the same noise for every class
    """
    at = bank.sigma
    return _errors(
        denoiser,
        z,
        bank,
        spread=at,
        shift=torch.zeros_like(at),
        classes=classes,
        chunk=chunk,
        distance=distance,
    )


def diffusion_loss(
    denoiser: Denoiser,
    z: Tensor,
    bank: NoiseBank,
    classes: Sequence[int] | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """The per-class diffusion losses: `diffusion_errors` averaged over the noise samples.

    Shapes      z [B,C,H,W] in [-1,1] -> [B,K,T]
    """
    return diffusion_errors(denoiser, z, bank, classes, chunk).mean(-1)


def evidence(
    losses: Tensor, levels: noise.Levels, weighting: Weighting = noise.elbo_weight
) -> Tensor:
    """What losses say for each class: the evidence lower bound, where the weighting is that of an ELBO.

    Formula     - sum_t w_t losses_t
    Shapes      losses [...,T], T levels -> [...]
    Errors      TypeError, ValueError for losses that are no numbers of T levels
    """
    if not isinstance(losses, Tensor) or losses.ndim == 0 or losses.shape[-1] != len(levels):
        got = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"expected losses [...,{len(levels)}], one for each level, got {got}.")
    return -(losses * weighting(levels)).sum(-1)


def elbo(
    denoiser: Denoiser,
    z: Tensor,
    bank: NoiseBank,
    weighting: Weighting = noise.elbo_weight,
    classes: Sequence[int] | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """The evidence lower bound of the model's log p_k(z), up to a constant shared by the classes.

    Formula     - sum_t w_t mean_s ||D_k(z + sigma_t eps_ts, sigma_t) - z||^2
    Source      Ho et al. 2020; Kingma et al. 2021; Kong et al. 2023; Chen et al. 2024 (RDC), Theorem 3.1
    Shapes      z [B,C,H,W] in [-1,1], bank T x S -> [B,K]
    Units       nats per image, for `elbo_weight` and `discrete_elbo_weight`; other weightings give other classifiers
    Meaning     a bound for the density that the denoiser generates by, p_k, not for that of the data, p(z | k)
    Exact when  the denoiser is exact, so that the two are one, the levels reach from ~0 to infinity and T, S grow (tests/test_likelihood.py)
    """
    return evidence(diffusion_loss(denoiser, z, bank, classes, chunk), bank.levels, weighting)


def log_likelihood(
    denoiser: Denoiser,
    z: Tensor,
    bank: NoiseBank,
    weighting: Weighting = noise.elbo_weight,
    classes: Sequence[int] | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """The whole of it, constant included: E log p_a(z + a eps | k) at the lowest level's edge a.

    Formula     -D/2 ln(2 pi e a^2) - integral_a^inf sigma^-3 E||D_k - z||^2 d sigma
    Source      the pointwise identity, derived in notebook 04
    Shapes      z [B,C,H,W] -> [B,K]
    Units       nats per image, with respect to the volume of model space
    """
    units.check_images(z, denoiser.image_shape, pixel_range=False)
    return noise_constant(bank.levels, math.prod(z.shape[1:])) + elbo(
        denoiser, z, bank, weighting, classes, chunk
    )


def noise_constant(levels: noise.Levels, dimensions: int) -> float:
    """What weighted losses lack to be a log-likelihood at the lowest level a, when the highest is high enough.

    Formula     -D/2 ln(2 pi e a^2): minus the entropy of the noise at level a
    Source      the limit of the pointwise identity, derived in notebook 04
    Units       nats
    """
    dimensions = units.check_whole(dimensions, "dimensions", least=1)
    return -dimensions / 2 * math.log(2 * math.pi * math.e * float(levels.lower[0]) ** 2)


def end_term(z: Tensor, class_means: Tensor, class_traces: Tensor, sigma: float) -> Tensor:
    """What stopping at a finite level drops, class by class: exact for isotropic Gaussian classes.

    Formula     C_k(sigma) = -(||z - m_k||^2 - tr Sigma_k) / (2 (sigma^2 + v_k)) - D/2 ln(1 + v_k/sigma^2),
                v_k = tr Sigma_k / D; for any class this is -||z - m_k||^2 / (2 sigma^2) + O(sigma^-4): no trace is left
    Source      E log p_sigma(z + sigma eps | k) of a Gaussian with these moments; add it to `elbo` for levels that end
                at sigma
    Shapes      z [B,C,H,W], class_means [K,C,H,W], class_traces [K] -> [B,K]
    Errors      those of `units.check_images` and `units.check_sigma`; ValueError for moments that do not fit
    """
    square_sigma = _check_moments(z, class_means, class_traces, sigma)
    square = ((z[:, None] - class_means) ** 2).flatten(2).sum(-1)
    dimensions = math.prod(z.shape[1:])
    variance = class_traces / dimensions
    return -(square - class_traces) / (
        2 * (square_sigma + variance)
    ) - dimensions / 2 * torch.log1p(variance / square_sigma)


def end_slope(z: Tensor, class_means: Tensor, class_traces: Tensor, sigma: float) -> Tensor:
    """The gradient of `end_term` in the image.

    Formula     -(z - m_k) / (sigma^2 + v_k)
    Shapes      z [B,C,H,W], class_means [K,C,H,W], class_traces [K] -> [B,K,C,H,W]
    Errors      those of `end_term`
    """
    square_sigma = _check_moments(z, class_means, class_traces, sigma)
    variance = class_traces / math.prod(z.shape[1:])
    return -(z[:, None] - class_means) / (square_sigma + variance)[:, None, None, None]


def _check_moments(z: Tensor, class_means: Tensor, class_traces: Tensor, sigma: float) -> float:
    """The square of a level, where images and moments fit one another."""
    units.check_images(class_means, pixel_range=False)
    units.check_images(z, tuple(class_means.shape[1:]), pixel_range=False)
    units.check_numbers(class_traces, "traces")
    level = float(units.check_sigma(sigma))
    if tuple(class_traces.shape) != (len(class_means),) or bool((class_traces < 0).any()):
        raise ValueError(
            f"expected a trace >= 0 for each of {len(class_means)} classes, got {class_traces.tolist()}."
        )
    return level * level


def class_moments(images: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Mean image and trace of the covariance of each class.

    Shapes      images [N,C,H,W], labels [N] -> [K,C,H,W], [K]
    Errors      ValueError for a class without images, or labels that do not fit
    """
    units.check_images(images, pixel_range=False)
    units.check_labels(labels, len(images), num_classes)
    counts = torch.bincount(labels, minlength=num_classes)
    if int(counts.min()) == 0:
        raise ValueError(f"expected images of each class, got counts {counts.tolist()}.")
    means = []
    traces = []
    for k in range(num_classes):
        own = images[labels == k]
        means.append(own.mean(0))
        traces.append(((own - means[k]) ** 2).flatten(1).sum(1).mean())
    return torch.stack(means), torch.stack(traces)


def vp_elbo(
    denoiser: Denoiser,
    z: Tensor,
    betas: Tensor,
    bank: NoiseBank,
    classes: Sequence[int] | None = None,
) -> Tensor:
    """The discrete ELBO as DDPM writes it: noise prediction, variance-preserving chain, terms t = 2..T.

    Formula     - sum_t beta_t^2 / (2 beta~_t alpha_t (1 - abar_t)) * mean_s ||eps - eps_k(z_t, t)||^2
                z_t = sqrt(abar_t) z + sqrt(1 - abar_t) eps,   beta~_t = beta_t (1 - abar_{t-1}) / (1 - abar_t)
                eps_k = (z_t - sqrt(abar_t) D_k(z_t / sqrt(abar_t), sigma_t)) / sqrt(1 - abar_t)
    Source      Ho et al. 2020, equations 5-12
    Shapes      betas [T], bank of T-1 levels (`noise.chain_levels` of this schedule's sigmas) -> [B,K]
    Equal to    `elbo` with `discrete_elbo_weight`: the same number by another road
    """
    units.check_images(z, denoiser.image_shape, pixel_range=False)
    betas = units.check_numbers(betas, "betas")
    abar = noise.alpha_bar(betas).to(z)
    sigma = noise.sigma_of_alpha_bar(abar)
    if len(bank.sigma) != len(betas) - 1 or not torch.allclose(
        bank.sigma.to(sigma), sigma[1:], rtol=1e-4
    ):
        raise ValueError(
            f"expected a bank over the {len(betas) - 1} steps of this schedule, got {bank.levels}; build "
            "it from noise.chain_levels(noise.sigma_of_alpha_bar(noise.alpha_bar(betas)))."
        )
    total = 0.0
    for t in range(1, len(betas)):
        beta = betas[t].to(z)
        signal = abar[t].sqrt()
        spread = (1 - abar[t]).sqrt()
        posterior_variance = beta * (1 - abar[t - 1]) / (1 - abar[t])
        weight = beta**2 / (2 * posterior_variance * (1 - beta) * (1 - abar[t]))
        eps = bank.noise[t - 1].expand(-1, len(z), *z.shape[1:])  # [S,B,C,H,W]
        z_t = (signal * z + spread * eps).flatten(0, 1)
        eps_k = (z_t[:, None] - signal * denoiser(z_t / signal, sigma[t], classes)) / spread
        square = ((eps.flatten(0, 1)[:, None] - eps_k) ** 2).flatten(2).sum(-1)  # [S*B,K]
        total = total - weight * square.unflatten(0, eps.shape[:2]).mean(0)
    return _finite(total)


def noised_elbo(
    denoiser: Denoiser,
    z_tau: Tensor,
    sigma_tau: float,
    bank: NoiseBank,
    weighting: Weighting = noise.elbo_weight,
    classes: Sequence[int] | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """log p_tau(z_tau | k) of an image that already carries noise, up to a constant shared by the classes (EPNDC).

    Formula     - sum_t w_t mean_s ( ||z~ - D_k(z_tau + r_t eps, sigma_t)||^2 - (sigma_tau^2/r_t)^2 ||eps||^2 )
                r_t^2 = sigma_t^2 - sigma_tau^2,   z~ = z_tau - (sigma_tau^2 / r_t) eps: the clean point on the line
                through z_tau and z_t; the second term is shared by the classes and diverges at sigma_tau
    Source      Chen et al. 2024 (NDC), EPNDC; its continuous form is exact
    Shapes      z_tau [B,C,H,W], any range; bank over `noise.noised_levels(sigma_tau, ...)` -> [B,K]
    Units       sigma_tau in model space; nats per image
    """
    errors = noised_errors(denoiser, z_tau, sigma_tau, bank, classes, chunk)
    return evidence(errors.mean(-1), bank.levels, weighting)


def noised_errors(
    denoiser: Denoiser,
    z_tau: Tensor,
    sigma_tau: float,
    bank: NoiseBank,
    classes: Sequence[int] | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """The terms of `noised_elbo`, for every class, noise level and noise sample, not yet weighted.

    Formula     e[b,k,t,s] = ||z~ - D_k(z_tau + r_t eps_ts, sigma_t)||^2 - (sigma_tau^2/r_t)^2 ||eps_ts||^2
    Shapes      z_tau [B,C,H,W], any range; bank T x S over levels above sigma_tau -> [B,K,T,S]
    Units       sigma_tau in model space
    Errors      ValueError for a sigma_tau that does not lie below every level of the bank
    """
    sigma_tau = _check_carried(sigma_tau, bank)
    spread = (bank.sigma**2 - sigma_tau**2).sqrt()
    return _errors(denoiser, z_tau, bank, spread, sigma_tau**2 / spread, classes, chunk)


def _check_carried(sigma_tau: float, bank: NoiseBank) -> float:
    """Return the noise that an image carries if every level of the bank lies above it, else raise a ValueError."""
    sigma_tau = units.check_real(sigma_tau, "sigma_tau")
    if not 0 < sigma_tau < float(bank.sigma.min()):
        raise ValueError(
            f"expected 0 < sigma_tau below every level of the bank, got sigma_tau {sigma_tau:.3g} and a "
            f"lowest level of {float(bank.sigma.min()):.3g}; build the bank with noise.noised_levels."
        )
    return sigma_tau


def denoised_elbo(
    denoiser: Denoiser,
    z_tau: Tensor,
    sigma_tau: float,
    bank: NoiseBank,
    weighting: Weighting = noise.elbo_weight,
    classes: Sequence[int] | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """The ELBO of the denoised image, above the noise that it was freed of (APNDC, the ensemble).

    Formula     - sum_t w_t mean_s ||x^ - D_k(x^ + sigma_t eps_ts, sigma_t)||^2,   x^ = D_null(z_tau, sigma_tau)
    Source      Chen et al. 2024 (NDC), the form that is certified there
    Meaning     E_eps log p_tau(x^ + sigma_tau eps | k) but for a constant shared by the classes: the mean over all noised
                versions of the denoised image, not log p_tau(z_tau | k). So it decides otherwise in places, even with an
                exact denoiser (tests/test_noised.py)
    Shapes      z_tau [B,C,H,W], any range; bank over `noise.log_levels(sigma_tau, ...)` -> [B,K]
    Units       sigma_tau in model space; nats per image
    Cost        that of `noised_elbo`, and one call without a class
    Errors      those of `noised_elbo`; ValueError for a denoiser without a null class
    """
    sigma_tau = _check_carried(sigma_tau, bank)
    clean = check_null(denoiser).unconditional(z_tau, sigma_tau)
    return elbo(denoiser, clean, bank, weighting, classes, chunk)


def denoised_target_elbo(
    denoiser: Denoiser,
    z_tau: Tensor,
    sigma_tau: float,
    bank: NoiseBank,
    weighting: Weighting = noise.elbo_weight,
    classes: Sequence[int] | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """How well each class, from ever more noise, finds what is found of the noised image itself (APNDC, the path).

    Formula     - sum_t w_t mean_s ||x^ - D_k(z_tau + r_t eps_ts, sigma_t)||^2,   x^ = D_null(z_tau, sigma_tau),
                r_t^2 = sigma_t^2 - sigma_tau^2: that of `noised_elbo`, where x^ is in place of the point on the line
    Source      Chen et al. 2024 (NDC), its code
    Meaning     no likelihood: the expectation is over images noised further than z_tau, the target is not on their way. At
                sigma_tau its term is ||D_null - D_k||^2, how flat the posterior of class k is
    Shapes      z_tau [B,C,H,W], any range; bank over `noise.log_levels(sigma_tau, ...)` -> [B,K]
    Units       sigma_tau in model space
    Cost        that of `noised_elbo`, and one call without a class
    Errors      those of `denoised_elbo`
    """
    sigma_tau = _check_carried(sigma_tau, bank)
    clean = check_null(denoiser).unconditional(z_tau, sigma_tau)
    return _target_elbo(denoiser, z_tau, sigma_tau, clean[:, None], bank, weighting, classes, chunk)


def own_target_elbo(
    denoiser: Denoiser,
    z_tau: Tensor,
    sigma_tau: float,
    bank: NoiseBank,
    weighting: Weighting = noise.elbo_weight,
    classes: Sequence[int] | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """`denoised_target_elbo` where each class is held to what it found itself: for a denoiser without a null class.

    Formula     - sum_t w_t mean_s ||x^_k - D_k(z_tau + r_t eps_ts, sigma_t)||^2,   x^_k = D_k(z_tau, sigma_tau)
    Source      Chen et al. 2024 (NDC), its code
    Meaning     how steady the answers of class k are: a class of one image is, whatever image it is shown
    Shapes      z_tau [B,C,H,W], any range; bank over `noise.log_levels(sigma_tau, ...)` -> [B,K]
    Units       sigma_tau in model space
    Cost        that of `noised_elbo`, and one call for each class
    Errors      those of `noised_elbo`
    """
    sigma_tau = _check_carried(sigma_tau, bank)
    clean = denoiser(z_tau, sigma_tau, classes)
    return _target_elbo(denoiser, z_tau, sigma_tau, clean, bank, weighting, classes, chunk)


def _target_elbo(
    denoiser: Denoiser,
    z_tau: Tensor,
    sigma_tau: float,
    target: Tensor,
    bank: NoiseBank,
    weighting: Weighting,
    classes: Sequence[int] | None,
    chunk: int,
) -> Tensor:
    """- sum_t w_t mean_s ||target - D_k(z_tau + r_t eps)||^2. Shapes: target [B,1 or K,C,H,W] -> [B,K]."""
    spread = (bank.sigma**2 - sigma_tau**2).sqrt()
    errors = _errors(
        denoiser, z_tau, bank, spread, torch.zeros_like(spread), classes, chunk, target
    )
    return evidence(errors.mean(-1), bank.levels, weighting)


def check_null(denoiser: Denoiser) -> Denoiser:
    """Return a denoiser that also answers without a class, else raise a ValueError."""
    if not denoiser.has_null:
        raise ValueError(
            "expected a denoiser that also answers without a class, which gives the clean image that all classes are "
            f"measured by; this {type(denoiser).__name__} was trained without a null class. EPNDC needs none, and "
            "own_target_elbo measures each class by its own."
        )
    return denoiser


def noised_weight(sigma_tau: float) -> Weighting:
    """The exact weights of the discrete chain that starts at sigma_tau, for `noised_elbo` over `chain_levels`.

    Formula     (u^2 - l^2)(u^2 - sigma_tau^2) / (2 u^4 (l^2 - sigma_tau^2)),  l, u the ends of the step
    Source      NDC's equation for w_t^(tau) after rewriting its mean difference in terms of z~ - D; sigma_tau = 0
                gives `discrete_elbo_weight`
    """

    def weight(levels: noise.Levels) -> Tensor:
        low = levels.lower**2 - sigma_tau**2
        up = levels.upper**2 - sigma_tau**2
        return (up - low) * up / (2 * levels.upper**4 * low)

    return weight


def _errors(
    denoiser: Denoiser,
    z: Tensor,
    bank: NoiseBank,
    spread: Tensor,
    shift: Tensor,
    classes: Sequence[int] | None,
    chunk: int,
    target: Tensor | None = None,
    distance: Callable[[Tensor], Tensor] = torch.square,
) -> Tensor:
    """||(z - shift eps) - D_k(z + spread eps, sigma)||^2 - shift^2 ||eps||^2 for every level and sample: [B,K,T,S].

    A `target` [B,1 or K,C,H,W] is what answers are compared with in place of z.
    A `distance` other than the square is summed in place of it, where there is no shift.
    Rows (level, sample, image) are evaluated `chunk` at a time, and so are classes, each of which is a call of its own for
    most denoisers. Under autograd each chunk is recomputed in the
    backward pass instead of being kept, so memory does not grow with T, S or K. Noise is given, not drawn inside; what
    a network in training mode draws there, such as dropout, is drawn again from the global state that `checkpoint` keeps.
    """
    units.check_images(z, denoiser.image_shape, pixel_range=False)
    chunk = units.check_whole(chunk, "chunk", least=1, most=LARGEST)
    levels, samples, own = bank.noise.shape[:3]
    if own not in (1, len(z)):
        raise ValueError(
            f"expected noise for 1 or {len(z)} images, got a bank drawn for {own}; "
            "redraw it for this batch."
        )
    if bank.image_shape != tuple(z.shape[1:]):
        raise ValueError(
            f"expected noise of image shape {list(z.shape[1:])}, got {list(bank.image_shape)}."
        )
    classes = denoiser.check_classes(classes).to(z.device)
    eps_of = bank.noise.flatten(0, 1)
    flat = levels * samples * len(z)
    level_of = torch.arange(levels, device=z.device).repeat_interleave(samples)

    def errors_of(images: Tensor, rows: Tensor, some: Tensor) -> Tensor:
        draw = rows // len(z)
        image = rows % len(z)
        level = level_of[draw]
        eps = eps_of[draw, image if own > 1 else torch.zeros_like(image)].to(images)
        x0 = images[image]
        wide = spread[level].to(images)
        away = shift[level].to(images)
        denoised = denoiser(
            x0 + wide[:, None, None, None] * eps, bank.sigma[level].to(images), classes[some]
        )
        base = x0[:, None] if target is None else target[image]
        base = base if base.shape[1] == 1 else base[:, some]
        wanted = base - (away[:, None, None, None] * eps)[:, None]
        return (
            distance(wanted - denoised).flatten(2).sum(-1)
            - (away**2 * (eps**2).flatten(1).sum(1))[:, None]
        )

    keep = max(1, chunk // len(classes))  # a conditional network sees each row once for every class
    rows = torch.arange(flat, device=z.device)
    every = torch.arange(len(classes), device=z.device)
    groups = (every,) if denoiser.one_call else every.split(chunk)
    differentiable = torch.is_grad_enabled() and (flat > keep or len(groups) > 1)

    def answers(part: Tensor, group: Tensor) -> Tensor:
        if differentiable:
            return checkpoint(errors_of, z, part, group, use_reentrant=False)
        return errors_of(z, part, group)

    parts = [torch.cat([answers(part, group) for group in groups], 1) for part in rows.split(keep)]
    errors = torch.cat(parts).unflatten(0, (levels, samples, len(z))).permute(2, 3, 0, 1)
    return _finite(errors)


def _finite(values: Tensor) -> Tensor:
    """Return what was computed of finite images if it is finite, else raise a FloatingPointError."""
    if not bool(torch.isfinite(values.detach()).all()):
        raise FloatingPointError(
            f"expected finite losses and gradients, got NaN or infinity of images that are finite, at a precision of "
            f"{str(values.dtype).removeprefix('torch.')}; are the images in [-1,1]?"
        )
    return values


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
    units.check_images(z, denoiser.image_shape, pixel_range=False)
    low = units.check_real(low, "the lower level")
    high = units.check_real(high, "the higher level")
    _check_draws(eps, z)
    if not (0 < low < high and math.isfinite(high)):
        raise ValueError(f"expected levels with 0 < low < high, got {low} and {high}.")
    with torch.no_grad():
        return _mean_score(denoiser, z, low, eps) - _mean_score(denoiser, z, high, eps)


def _check_draws(eps: Tensor, z: Tensor) -> None:
    """Raise unless these are draws of noise for the images, or for one of them all."""
    eps = units.check_numbers(eps, "noise")
    fits = eps.ndim == 5 and eps.shape[1] in (1, len(z)) and eps.shape[2:] == z.shape[1:]
    if not fits or not len(eps):
        raise ValueError(
            f"expected noise [S,1 or {len(z)},{','.join(map(str, z.shape[1:]))}], got {list(eps.shape)}."
        )


def _mean_score(denoiser: Denoiser, z: Tensor, sigma: float, eps: Tensor) -> Tensor:
    return sum(
        ((denoised - (z + sigma * some)[:, :, None]) / sigma**2).sum(0)
        for some, denoised in _denoised(denoiser, z, sigma, eps.to(z))
    ) / len(eps)


def _denoised(denoiser: Denoiser, z: Tensor, sigma, eps: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some draws at a time: eps [s,B,C,H,W] and D_k(z + sigma eps, sigma) [s,B,K,C,H,W]."""
    for some in eps.expand(-1, len(z), *z.shape[1:]).split(max(1, CHUNK // max(1, len(z)))):
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
    units.check_images(z, denoiser.image_shape, pixel_range=False)
    weights = units.check_numbers(weights, "weights")
    if tuple(weights.shape) != (len(bank.sigma),):
        raise ValueError(
            f"expected a weight for each of {len(bank.sigma)} levels, got shape {list(weights.shape)}."
        )
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
    return _finite(total)
