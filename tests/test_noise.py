"""Schedules against their published values, weights against the KLs they stand for, banks against their word."""

import hashlib
import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
import twins
from diffclass import data, noise, units
from diffclass.classifiers.noised import NoisedBayesClassifier
from diffclass.denoisers import network, sampling
from diffclass.denoisers.exact import MixtureDenoiser
from diffclass.noise import Levels, NoiseBank
from numpy.polynomial import hermite_e
from scipy import integrate, stats

SHAPE = (1, 2, 2)

# ---------------------------------------------------------------------------------------------------------------------
# Schedules


@twins.rejected(
    {
        "no root": dict(sigma_of=lambda abar: (1 - abar) / abar),
        "not divided by the signal": dict(sigma_of=lambda abar: (1 - abar).sqrt()),
    }
)
def test_ddpm_levels(sigma_of=noise.sigma_of_alpha_bar):
    """The noise-to-signal ratio of z = sqrt(abar) x + sqrt(1 - abar) eps, and the levels of DDPM's schedule."""
    sigma = sigma_of(noise.alpha_bar(noise.linear_betas()))
    published = {
        1: 0.0100,
        10: 0.0436,
        100: 0.3388,
        200: 0.7193,
        300: 1.2339,
        500: 3.424,
        750: 17.25,
        1000: 157.4,
    }
    for t, level in published.items():
        assert abs(float(sigma[t - 1]) / level - 1) < 2e-3, t


@twins.rejected({"linear in beta": dict(betas=lambda: noise.linear_betas(1000, 0.00085, 0.012))})
def test_stable_diffusion_betas(betas=noise.scaled_linear_betas):
    """Linear in sqrt(beta) from 0.00085 to 0.012; 157 steps of 1000 are not the same as for a linear schedule."""
    roots = betas().sqrt()
    assert torch.allclose(roots.diff(), roots.diff()[:1], rtol=1e-9)
    assert abs(float(betas()[0]) - 0.00085) < 1e-12 and abs(float(betas()[-1]) - 0.012) < 1e-12


def test_a_level_says_which_signal_coefficient_it_is():
    abar = noise.alpha_bar(noise.linear_betas())
    back = noise.alpha_bar_of_sigma(noise.sigma_of_alpha_bar(abar))
    assert torch.allclose(back, abar, rtol=1e-12)


def test_cosine_schedule_follows_the_cosine():
    abar = noise.alpha_bar(noise.cosine_betas())
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (0, 250, 500, 900)]
    for t, value in zip((250, 500, 900), f[1:], strict=True):
        assert abs(float(abar[t - 1]) - value / f[0]) < 1e-10
    assert float(noise.cosine_betas().max()) == 0.999


def test_edm_levels_run_from_80_to_0_002():
    sigma = noise.edm_sigmas(18)
    assert abs(float(sigma[0]) - 80) < 1e-9 and abs(float(sigma[-1]) - 0.002) < 1e-12
    assert bool((sigma.diff() < 0).all())
    assert torch.allclose((sigma ** (1 / 7)).diff(), (sigma ** (1 / 7)).diff()[:1], rtol=1e-9)


@pytest.mark.parametrize("steps, low, high", [(2, 0.02, 80.0), (18, 0.002, 80.0), (10, 0.05, 0.5)])
def test_the_sampler_walks_down_edm_levels_to_zero(steps, low, high):
    """The numbers of `edm_sigmas` bit for bit, those of the formula written out, and a zero."""
    walk = sampling.karras_levels(steps, low, high)
    assert torch.equal(walk[:-1], noise.edm_sigmas(steps, low, high)) and float(walk[-1]) == 0
    ramp = [
        high ** (1 / 7) + i / (steps - 1) * (low ** (1 / 7) - high ** (1 / 7)) for i in range(steps)
    ]
    wanted = torch.tensor([root**7 for root in ramp], dtype=torch.float64)
    assert torch.allclose(walk[:-1], wanted, rtol=1e-12)


def test_betas_outside_0_1_get_a_sentence():
    with pytest.raises(ValueError, match="expected betas strictly between 0 and 1, got 0.1 to 1.2"):
        noise.alpha_bar(torch.tensor([0.1, 1.2]))


# ---------------------------------------------------------------------------------------------------------------------
# Levels


def test_log_levels_cut_the_axis_into_equal_ratios():
    levels = noise.log_levels(0.01, 10, 30)
    assert torch.allclose(levels.lower[1:], levels.upper[:-1], rtol=1e-12)
    assert torch.allclose(levels.sigma**2, levels.lower * levels.upper, rtol=1e-12)
    assert torch.allclose(
        (levels.upper / levels.lower).log(), torch.tensor(math.log(1000) / 30).double(), rtol=1e-9
    )
    assert repr(levels) == "Levels(T=30, sigma 0.01 to 10)"


def test_linear_and_chain_levels_are_measured_at_opposite_ends():
    linear = noise.linear_levels(0.5, 1.5, 4)
    chain = noise.chain_levels(torch.tensor([0.5, 0.7, 1.5]))
    assert torch.equal(linear.sigma, linear.lower) and abs(float(linear.upper[-1]) - 1.5) < 1e-12
    assert torch.equal(chain.sigma, chain.upper) and len(chain) == 2


def levels_from_a_quarter(sigma_tau, high, count):
    """Levels whose first added noise is sigma_tau / 4 however many there are, as it once was."""
    r = noise.log_levels(sigma_tau / 4, math.sqrt(high**2 - sigma_tau**2), count)
    return Levels(*((sigma_tau**2 + part**2).sqrt() for part in (r.sigma, r.lower, r.upper)))


@twins.rejected(
    {
        "a first level that stays": dict(levels_of=levels_from_a_quarter),
        "geometric in sigma": dict(levels_of=noise.log_levels),
    }
)
def test_noised_levels_are_geometric_in_the_added_noise(levels_of=noise.noised_levels):
    """From 2/count of sigma_tau, but never more than half of what can be added, to the end, without a gap."""
    for count in (4, 8, 16):
        levels = levels_of(0.5, 20.0, count)
        assert torch.equal(levels.lower[1:], levels.upper[:-1])
        added = (levels.lower**2 - 0.25).sqrt()
        ratio = (added[1:] / added[:-1]).log()
        assert torch.allclose(ratio, ratio[:1].expand(count - 1), rtol=1e-6)
        middle = (levels.sigma**2 - 0.25) ** 2
        assert torch.allclose(
            middle, (levels.lower**2 - 0.25) * (levels.upper**2 - 0.25), rtol=1e-6
        )
        assert abs(float(added[0]) - 0.5 * 2 / count) < 1e-9
        assert abs(float(levels.upper[-1]) - 20) < 1e-9
    for sigma_tau in (0.5, 4.999):
        only = levels_of(sigma_tau, 5.0, 1)
        most = min(sigma_tau, math.sqrt(25 - sigma_tau**2))
        assert abs(float((only.lower**2 - sigma_tau**2).sqrt()) - most / 2) < 1e-6


def logits_on_average(denoiser, x_tau, build, count):
    """The mean of a noised classifier's logits over its noise, by 24 x 24 Gauss-Hermite nodes: [B,K], B pictures."""
    nodes, weights = map(torch.from_numpy, hermite_e.hermegauss(24))
    share = torch.outer(weights, weights).flatten() / weights.sum() ** 2
    eps = torch.cartesian_prod(nodes, nodes).reshape(-1, 1, 1, 2, 1, 1)  # a picture for each node
    model = build(denoiser, 0.1, levels=count, chunk=1 << 15)
    drawn = eps.expand(-1, count, -1, -1, -1, -1)
    with torch.no_grad():
        each = [model(x.expand(len(eps), -1, -1, -1), drawn) for x in x_tau]
    return torch.stack([share @ logits for logits in each])


class FirstLevelStays(NoisedBayesClassifier):
    """Levels from sigma_tau / 4 of added noise on, as they once were, to the same end."""

    def __init__(self, denoiser, sigma_pixel, *, levels, **options):
        super().__init__(denoiser, sigma_pixel, levels=levels, **options)
        end = float(self.levels.upper[-1])
        self.levels = levels_from_a_quarter(2 * sigma_pixel, end, levels)


@twins.rejected(
    {
        "a first level that stays": dict(build=FirstLevelStays),
        "the end where it is for 8 levels": dict(build=partial(NoisedBayesClassifier, high=5.0)),
    }
)
def test_more_levels_bring_a_noised_classifier_to_the_truth(build=NoisedBayesClassifier):
    """On exact mixtures the worst centred logit is off by less than half as much at each doubling of the levels.

    Default options, sigma_pixel .1; the noise is averaged by quadrature, so nothing but the levels is left.
    """
    for name in ("gaussians", "mixtures"):
        law = data.PLANE_LAWS[name]()
        denoiser = MixtureDenoiser.of_law(law)
        generator = torch.Generator().manual_seed(4)
        x = law.sample(3, generator, torch.float64)[0]
        x_tau = x + 0.1 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        truth = denoiser.log_density(units.to_model(x_tau), 0.2)
        truth = truth - truth.mean(1, keepdim=True)
        off = []
        for count in (4, 8, 16, 32, 64):
            logits = logits_on_average(denoiser, x_tau, build, count)
            off.append(float((logits - logits.mean(1, keepdim=True) - truth).abs().max()))
        assert all(finer < coarser / 2 for coarser, finer in pairwise(off)), (name, off)
        assert off[-1] < 0.002, (name, off)


def test_some_levels_are_levels():
    levels = noise.log_levels(0.01, 10, 30)
    for kept in (slice(3, 7), torch.tensor([29, 0, 4])):
        some = levels[kept]
        for name in ("sigma", "lower", "upper", "step"):
            assert torch.equal(getattr(some, name), getattr(levels, name)[kept])
    short = levels.to(torch.zeros(1, dtype=torch.float32))
    assert short.sigma.dtype == short.lower.dtype == short.upper.dtype == torch.float32
    assert torch.equal(short.sigma, levels.sigma.float()) and levels.sigma.dtype == torch.float64


@pytest.mark.parametrize(
    "make, sentence",
    [
        (
            lambda: noise.log_levels(0.0, 1, 4),
            "expected noise levels with 0 < low < high, got low 0",
        ),
        (lambda: noise.log_levels(-1, 1, 4), "got low -1"),
        (lambda: noise.log_levels(2, 1, 4), "got low 2 and high 1"),
        (lambda: noise.log_levels(0.1, math.inf, 4), "got low 0.1 and high inf"),
        (lambda: noise.linear_levels(0.1, 1, 0), "expected at least one noise level, got 0"),
        (
            lambda: noise.noised_levels(2.0, 1.0, 4),
            "expected 0 < sigma_tau < high, got sigma_tau 2 and high 1",
        ),
        (lambda: Levels(torch.ones(2), torch.ones(3), torch.ones(2)), "equally long vectors"),
        (
            lambda: Levels(torch.ones(2, 2), torch.ones(2, 2) / 2, 2 * torch.ones(2, 2)),
            r"equally long vectors, got \[\[2, 2\]",
        ),
        (
            lambda: Levels(torch.ones(1), torch.tensor([2.0]), torch.tensor([3.0])),
            "expected 0 < lower <= sigma <= upper",
        ),
        (lambda: Levels(torch.ones(1), torch.ones(1), torch.ones(1)), "with lower < upper"),
    ],
)
def test_impossible_levels_get_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def gaussian_kl(levels: Levels, error: torch.Tensor) -> torch.Tensor:
    """KL between q(x_l | x_u, x) and the same Gaussian with x replaced by its estimate, from torch's own formula."""
    low = levels.lower**2
    up = levels.upper**2
    spread = (low * (up - low) / up).sqrt()
    shift = (up - low) / up * error  # of the means, when the estimate is off by `error`
    zero = torch.zeros_like(shift)
    return torch.distributions.kl_divergence(
        torch.distributions.Normal(zero, spread), torch.distributions.Normal(shift, spread)
    )


@twins.rejected(
    {
        "without the half": dict(weight=twins.scaled(noise.discrete_elbo_weight, 2)),
        "right end": dict(weight=noise.right_end_weight),
        "first powers": dict(weight=lambda levels: (1 / levels.lower - 1 / levels.upper) / 2),
    }
)
def test_discrete_weight_is_the_kl_of_a_step(weight=noise.discrete_elbo_weight):
    """The weight of a chain step is its KL for an estimate that is off by one, and the integral of sigma^-3."""
    levels = noise.chain_levels(torch.logspace(-1, 1, 9, dtype=torch.float64))
    w = weight(levels)
    assert torch.allclose(w, gaussian_kl(levels, torch.ones(8).double()), rtol=1e-12, atol=0)
    for t in (0, 5):
        exact = integrate.quad(lambda s: s**-3, float(levels.lower[t]), float(levels.upper[t]))[0]
        assert abs(float(w[t]) / exact - 1) < 1e-9


@twins.rejected(
    {
        "sigma^-2": dict(weight=lambda levels: levels.sigma**-2 * levels.step),
        "d sigma for d ln sigma": dict(
            weight=lambda levels: levels.sigma**-2 * (levels.upper - levels.lower)
        ),
        "with a half": dict(weight=twins.scaled(noise.elbo_weight, 0.5)),
    }
)
def test_elbo_weight_is_the_midpoint_rule(weight=noise.elbo_weight):
    """The midpoint rule: within 1e-4 of the exact integral of sigma^-3 at 400 levels, four times worse at 200."""
    off = {}
    for count in (200, 400):
        levels = noise.log_levels(0.01, 50, count)
        off[count] = float((weight(levels) / noise.discrete_elbo_weight(levels) - 1).abs().max())
    assert off[400] < 1e-4 and 3.9 < off[200] / off[400] < 4.1


def lambda_inverted(levels):
    """EDM's weight with lambda = c_out^2 instead of 1 / c_out^2."""
    return noise.edm_weight(levels) / noise.edm_lambda(levels.sigma) ** 2


@twins.rejected(
    {
        "released precedence": dict(weight=noise.rdc_released_weight),
        "lambda inverted": dict(weight=lambda_inverted),
        "normal, not log-normal": dict(
            weight=lambda levels: noise.edm_weight(levels) * levels.sigma
        ),
    }
)
def test_edm_weight_is_lambda_times_the_log_normal(weight=noise.edm_weight):
    """EDM's 1/c_out^2 times scipy's log-normal density of its training levels; the density sums to one."""
    levels = noise.log_levels(1e-4, 1e4, 2000)
    density = stats.lognorm.pdf(levels.sigma.numpy(), s=1.2, scale=math.exp(-1.2))
    c_out = levels.sigma * 0.5 / (levels.sigma**2 + 0.25).sqrt()
    drawn = weight(levels) * c_out**2
    assert torch.allclose(drawn, torch.from_numpy(density) * levels.step, rtol=1e-9, atol=1e-300)
    assert abs(float(drawn.sum()) - 1) < 1e-6


@twins.rejected(
    {
        "uniform in sigma": dict(weight=noise.unit_weight),
        "uniform in ln sigma": dict(weight=noise.elbo_weight),
    }
)
def test_simple_weight_is_uniform_over_ddpm_steps(weight=noise.simple_weight):
    """On the noise error every step of DDPM's own chain weighs the same, and all of them together one."""
    sigma = noise.sigma_of_alpha_bar(noise.alpha_bar(noise.linear_betas()))
    levels = noise.chain_levels(sigma)
    assert torch.allclose(
        weight(levels) * levels.sigma**2, torch.full((999,), 1 / 1000).double(), rtol=1e-8
    )


@twins.rejected(
    {
        "inverted": dict(weight_of=lambda sigma: 1 / noise.edm_lambda(sigma)),
        "not squared": dict(weight_of=lambda sigma: noise.edm_lambda(sigma) ** 0.5),
        "another sigma_data": dict(
            weight_of=lambda sigma: network.edm_scalings(sigma, sigma_data=1.0)[1] ** -2
        ),
    }
)
def test_edm_lambda_is_one_over_the_square_of_c_out(weight_of=noise.edm_lambda):
    """Two rows of EDM's table: the weight undoes the scale of the network's output, so each level's loss is one."""
    sigma = torch.logspace(-3, 3, 25, dtype=torch.float64)
    _, c_out, _ = network.edm_scalings(sigma)
    assert torch.allclose(weight_of(sigma) * c_out**2, torch.ones_like(sigma), rtol=1e-12)


def test_the_released_weight_is_a_log_normal_of_another_width():
    """The slip turns the log-standard deviation 1.2 into 1/1.2, and leaves the density 1.44 times too small."""
    levels = noise.log_levels(1e-4, 1e4, 2000)
    c_out = levels.sigma * 0.5 / (levels.sigma**2 + 0.25).sqrt()
    slipped = noise.rdc_released_weight(levels) * c_out**2 / levels.step
    density = torch.from_numpy(
        stats.lognorm.pdf(levels.sigma.numpy(), s=1 / 1.2, scale=math.exp(-1.2))
    )
    assert torch.allclose(slipped * 1.44, density, rtol=1e-9, atol=1e-300)
    assert (
        float((noise.rdc_released_weight(levels) / noise.edm_weight(levels) - 1).abs().max()) > 0.5
    )


def test_unit_weight_sums_to_the_length_of_the_axis():
    assert abs(float(noise.unit_weight(noise.log_levels(0.1, 3.0, 400)).sum()) - 2.9) < 1e-4


def test_right_end_weight_is_smaller_than_the_exact_one():
    levels = noise.chain_levels(torch.logspace(-2, 1, 20))
    assert bool((noise.right_end_weight(levels) < noise.discrete_elbo_weight(levels)).all())
    assert torch.allclose(
        noise.right_end_weight(levels), (levels.upper - levels.lower) * levels.upper**-3
    )


def test_every_weighting_is_positive_and_keeps_the_dtype():
    for name, weighting in noise.WEIGHTINGS.items():
        for dtype in (torch.float32, torch.float64):
            grid = noise.log_levels(0.02, 20, 12)
            w = weighting(Levels(*(v.to(dtype) for v in (grid.sigma, grid.lower, grid.upper))))
            assert w.dtype == dtype and w.shape == (12,) and float(w.min()) > 0, name


def ddpm_weight_of_snr(betas):
    """Half the relative drop of the signal-to-noise ratio: the weight on the noise error of steps 2..T."""
    ratio = noise.snr(noise.sigma_of_alpha_bar(noise.alpha_bar(betas)))
    return (ratio[:-1] / ratio[1:] - 1) / 2


def test_ddpm_weight_is_the_drop_of_snr():
    """beta_t^2 / (2 beta~_t alpha_t (1 - abar_t)), as DDPM prints it, to 1e-11 relative; its published values."""
    betas = noise.linear_betas()
    abar = noise.alpha_bar(betas)
    posterior_variance = betas[1:] * (1 - abar[:-1]) / (1 - abar[1:])
    printed = betas[1:] ** 2 / (2 * posterior_variance * (1 - betas[1:]) * (1 - abar[1:]))
    assert float((ddpm_weight_of_snr(betas) / printed - 1).abs().max()) < 1e-11
    assert [round(float(printed[t - 2]), 3) for t in (2, 3, 4)] == [0.6, 0.318, 0.222]


def test_bridge_posterior_by_conditioning():
    """q(x_l | x_u, x) from the joint covariance of the chain: the mean and variance whose KL the weight is."""
    low = 0.3**2  # cov(x_l, x_u | x) is the smaller variance
    up = 0.8**2
    x = -0.4
    x_up = 1.1
    gain = low / up
    mean = x + gain * (x_up - x)
    variance = low - gain * low
    assert abs(mean - ((up - low) * x + low * x_up) / up) < 1e-15
    assert abs(variance - low * (up - low) / up) < 1e-15
    draws = torch.randn(2, 400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_low = x + 0.3 * draws[0]
    x_high = x_low + math.sqrt(up - low) * draws[1]
    slope = float(torch.cov(torch.stack([x_low, x_high]))[0, 1] / x_high.var())
    rest = x_low - x - slope * (x_high - x)
    assert abs(slope - gain) < 4 * math.sqrt(variance / up / 400_000)
    assert abs(float(rest.var()) / variance - 1) < 4 * math.sqrt(2 / 400_000)


# ---------------------------------------------------------------------------------------------------------------------
# Seeds and banks


def test_a_purpose_has_a_seed_of_its_own():
    """The first 7 bytes of SHA-256 of the key: the same on every machine, another for every word and number."""
    digest = hashlib.sha256(b"(0, 'evaluation', 3)").digest()
    assert noise.seed_of(0, "evaluation", 3) == int.from_bytes(digest[:7], "big")
    keys = [(0,), (1,), (0, "evaluation", 3), (0, "evaluation", 4), (0, "attack", 3), (0, 3)]
    assert len({noise.seed_of(*key) for key in keys}) == len(keys)
    before = torch.get_rng_state()
    one, same, other = (
        torch.randn(4, generator=noise.generator_of(0, purpose)) for purpose in ("a", "a", "b")
    )
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"


def test_a_fixed_bank_depends_on_its_seed_alone():
    levels = noise.log_levels(0.1, 1, 3)
    before = torch.get_rng_state()
    one, same, other = (NoiseBank.fixed(levels, SHAPE, 2, seed) for seed in (5, 5, 6))
    assert torch.equal(one.noise, same.noise) and not torch.equal(one.noise, other.noise)
    assert (
        tuple(one.noise.shape) == (3, 2, 1, *SHAPE)
        and one.samples == 2
        and one.image_shape == SHAPE
    )
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"


def test_fresh_noise_differs_by_image_and_call_and_repeats_with_the_generator():
    levels = noise.log_levels(0.1, 1, 3)
    draw = torch.Generator().manual_seed(3)
    first, second = (NoiseBank.fresh(levels, SHAPE, 4, draw) for _ in range(2))
    again = NoiseBank.fresh(levels, SHAPE, 4, torch.Generator().manual_seed(3))
    assert torch.equal(first.noise, again.noise) and not torch.equal(first.noise, second.noise)
    assert not torch.equal(first.noise[:, :, 0], first.noise[:, :, 1])


def test_noise_is_standard_normal():
    noise_drawn = (
        NoiseBank.fixed(noise.log_levels(0.1, 1, 10), (1, 8, 8), 100).noise.flatten().double()
    )
    assert stats.kstest(noise_drawn.numpy(), "norm").pvalue > 0.001


def test_noise_of_another_shape_gets_a_sentence():
    with pytest.raises(ValueError, match=r"\[T,S,N,C,H,W\] with T = 3, got \[2, 1, 1, 1, 2, 2\]"):
        NoiseBank(noise.log_levels(0.1, 1, 3), torch.zeros(2, 1, 1, 1, 2, 2))


def test_sobol_noise_has_normal_moments_where_random_noise_does_not_yet():
    def worst(make):
        banks = [
            make(noise.log_levels(0.1, 1.0, 2), (2, 1, 1), 64, seed, torch.float64)
            for seed in range(10)
        ]
        eps = torch.stack([bank.noise[0, :, 0, :, 0, 0] for bank in banks])  # [10,64,2]
        return float(torch.maximum(eps.mean(1).abs().max(), (eps.var(1) - 1).abs().max()))

    assert worst(NoiseBank.sobol) < 0.15 < worst(NoiseBank.fixed)


def test_sobol_noise_is_shared_by_levels_and_made_of_its_seed_alone():
    before = torch.get_rng_state()
    one, same, other = (
        NoiseBank.sobol(noise.log_levels(0.1, 1.0, 3), (1, 2, 2), 8, seed) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.noise, same.noise) and not torch.equal(one.noise, other.noise)
    assert torch.equal(one.noise[0], one.noise[2]) and one.noise.shape == (3, 8, 1, 1, 2, 2)


def test_a_seed_is_a_whole_number_whatever_library_it_comes_from():
    """The key is written out, so that numpy's 7 would draw other noise than 7."""
    wanted = noise.seed_of(7, "attack", 1)
    assert {noise.seed_of(seed, "attack", 1) for seed in (np.int64(7), torch.tensor(7))} == {wanted}
    for wrong in (None, "7", 1.5, math.nan):
        with pytest.raises((TypeError, ValueError), match="expected a seed"):
            noise.generator_of(wrong)
