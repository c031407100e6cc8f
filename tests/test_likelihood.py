"""Every likelihood formula against the exact mixture, which goes through the same code path as a network."""

import math

import numpy as np
import pytest
import torch
from diffclass import data, likelihood, noise, units
from diffclass.denoisers.exact import MixtureDenoiser
from diffclass.noise import Levels, NoiseBank

SHAPE = (2, 1, 1)
CONSTANT = -math.log(2 * math.pi * math.e)  # -D/2 ln(2 pi e) in the plane


def exact(name: str) -> MixtureDenoiser:
    """The denoiser of a plane law."""
    return MixtureDenoiser.of_law(data.PLANE_LAWS[name]())


def points(name: str, count: int, seed: int = 1) -> torch.Tensor:
    """Points drawn from a law, in model space: [B,2,1,1] in float64."""
    drawn = data.PLANE_LAWS[name]().sample(
        count, torch.Generator().manual_seed(seed), torch.float64
    )[0]
    return units.to_model(drawn)


def sobol_bank(levels: Levels, samples: int, seed: int = 0) -> NoiseBank:
    """A bank whose samples fill the normal law evenly (scrambled Sobol points): the same code with less variance."""
    drawn = []
    for t in range(len(levels)):
        engine = torch.quasirandom.SobolEngine(2, scramble=True, seed=1000 * seed + t)
        drawn.append(
            torch.special.ndtri(engine.draw(samples, dtype=torch.float64).clamp(1e-9, 1 - 1e-9))
        )
    return NoiseBank(levels, torch.stack(drawn)[:, :, None, :, None, None])


def hermite(nodes: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Gauss-Hermite nodes [n^2,2] and weights [n^2] of the standard normal law of the plane."""
    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    grid = torch.cartesian_prod(torch.from_numpy(x), torch.from_numpy(x))
    weights = torch.outer(torch.from_numpy(w), torch.from_numpy(w)).flatten()
    return grid[weights > 1e-16], weights[weights > 1e-16] / weights.sum()


def expected_errors(denoiser, z, levels: Levels, nodes: int = 40) -> torch.Tensor:
    """E ||z - D_k(z + sigma eps)||^2 by quadrature, through the library's code: [B,K,T]."""
    grid, weights = hermite(nodes)
    nodes = grid[None, :, None, :, None, None]
    bank = NoiseBank(levels, nodes.expand(len(levels), *nodes.shape[1:]))
    with torch.no_grad():
        return likelihood.diffusion_errors(denoiser, z, bank, chunk=1 << 16) @ weights


def expected_density(denoiser, z, sigma: float, nodes: int = 40) -> torch.Tensor:
    """E log p_sigma(z + sigma eps | k) by quadrature: [B,K]."""
    grid, weights = hermite(nodes)
    z_sigma = (z[:, None] + sigma * grid[:, :, None, None]).flatten(0, 1)
    return (denoiser.log_density(z_sigma, sigma).unflatten(0, (len(z), -1)) * weights[:, None]).sum(
        1
    )


def centred(logits: torch.Tensor) -> torch.Tensor:
    """Logits without the part that the classes share."""
    return logits - logits.mean(1, keepdim=True)


# ---------------------------------------------------------------------------------------------------------------------
# The ELBO of an exact denoiser is the log-density


def check_elbo(estimate=likelihood.elbo, tolerance: float = 0.03):
    """Centred `estimate` at 512 levels x 512 plain samples against centred log p(z | k), at four points."""
    for name in ("gaussians", "overlapping"):
        denoiser = exact(name)
        z = points(name, 4)
        bank = NoiseBank.fixed(
            noise.log_levels(0.002, 100, 512), SHAPE, 512, seed=0, dtype=torch.float64
        )
        with torch.no_grad():
            off = centred(estimate(denoiser, z, bank, chunk=1 << 15)) - centred(
                denoiser.log_density(z, 0.0)
            )
        assert float(off.abs().max()) < tolerance, (name, off)


def check_log_likelihood(estimate=likelihood.log_likelihood, tolerance: float = 0.03):
    """The constant included: 256 levels x 256 even samples, for laws of one and of many components, in nats."""
    for name in ("imbalanced", "mixtures"):
        denoiser = exact(name)
        z = points(name, 3)
        with torch.no_grad():
            got = estimate(
                denoiser, z, sobol_bank(noise.log_levels(0.001, 100, 256), 256), chunk=1 << 15
            )
        off = got - denoiser.log_density(z, 0.0)
        assert float(off.abs().max()) < tolerance, (name, off)


def test_elbo_is_log_density():
    check_elbo()


@pytest.mark.parametrize("name, count", [("mixtures", 3), ("moons", 2)])
def test_elbo_is_log_density_of_many_components_with_even_samples(name, count):
    """Plain samples leave 0.02 to 0.06 nats here; samples that fill the normal law evenly bring every logit to 0.03."""
    denoiser = exact(name)
    z = points(name, count)
    with torch.no_grad():
        got = likelihood.elbo(
            denoiser, z, sobol_bank(noise.log_levels(0.001, 100, 512), 512), chunk=1 << 15
        )
    assert float((centred(got) - centred(denoiser.log_density(z, 0.0))).abs().max()) < 0.03


def test_elbo_is_log_density_on_rings():
    denoiser = exact("rings")
    z = points("rings", 2)
    with torch.no_grad():
        got = likelihood.elbo(
            denoiser, z, sobol_bank(noise.log_levels(0.001, 50, 256), 256), chunk=1 << 15
        )
    assert float((centred(got) - centred(denoiser.log_density(z, 0.0))).abs().max()) < 0.03


def test_log_likelihood_is_absolute():
    check_log_likelihood()


def test_error_falls_as_levels_and_samples_grow():
    """Root mean square over points, classes and four banks: each step, 4 x levels and 4 x samples, divides it by ~4."""
    denoiser = exact("mixtures")
    z = points("mixtures", 4)
    truth = centred(denoiser.log_density(z, 0.0))
    rms = []
    for size in (16, 64, 256):
        banks = [
            NoiseBank.fixed(noise.log_levels(0.002, 100, size), SHAPE, size, s, torch.float64)
            for s in range(4)
        ]
        with torch.no_grad():
            off = [
                centred(likelihood.elbo(denoiser, z, bank, chunk=1 << 15)) - truth for bank in banks
            ]
        rms.append(float((torch.stack(off) ** 2).mean().sqrt()))
    assert rms[1] < rms[0] / 2 and rms[2] < rms[1] / 2 and rms[2] < 0.06, rms


def test_plain_samples_are_unbiased():
    """The error of many independent draws is within 4.5 standard errors of zero at every point and class."""
    denoiser = exact("mixtures")
    z = points("mixtures", 4)
    bank = NoiseBank.fixed(
        noise.log_levels(0.001, 100, 256), SHAPE, 256, seed=3, dtype=torch.float64
    )
    with torch.no_grad():
        terms = (
            likelihood.diffusion_errors(denoiser, z, bank, chunk=1 << 15)
            * noise.elbo_weight(bank.levels)[:, None]
        )
    terms = terms - terms.mean(1, keepdim=True)
    standard_error = (terms.var(-1) / 256).sum(-1).sqrt()
    off = -terms.mean(-1).sum(-1) - centred(denoiser.log_density(z, 0.0))
    assert float((off / standard_error).abs().max()) < 4.5


# ---------------------------------------------------------------------------------------------------------------------
# The pointwise identity, its constant, the chain's bound, and the end term


def check_identity(weighting=noise.elbo_weight, tolerance: float = 1e-3):
    """E log p_a = E log p_b + D ln(b/a) - integral_a^b sigma^-3 E||z - D||^2 at every point and class, by nodes."""
    low = 1e-3
    high = 200.0
    for name in ("gaussians", "mixtures"):
        denoiser = exact(name)
        z = points(name, 4)
        levels = noise.log_levels(low, high, 100)
        integral = (expected_errors(denoiser, z, levels, 72) * weighting(levels)).sum(-1)
        right = expected_density(denoiser, z, high, 72) + 2 * math.log(high / low) - integral
        off = expected_density(denoiser, z, low, 72) - right
        assert float(off.abs().max()) < tolerance, (name, off)


def test_pointwise_identity():
    check_identity()


def test_the_constant_at_infinity_is_universal():
    for name in ("gaussians", "rings", "imbalanced"):
        got = expected_density(exact(name), points(name, 3), 200.0) + 2 * math.log(200.0)
        assert float((got - CONSTANT).abs().max()) < 3e-5, name


def chain_gap(weighting, steps: int, low: float = 0.01, high: float = 50.0) -> torch.Tensor:
    """What the chain's sum says about E log p_low, minus the truth: [B,K]."""
    denoiser = exact("overlapping")
    z = points("overlapping", 2)
    levels = noise.chain_levels(
        torch.logspace(math.log10(low), math.log10(high), steps + 1, dtype=torch.float64)
    )
    total = (expected_errors(denoiser, z, levels, 24) * weighting(levels)).sum(-1)
    return (
        expected_density(denoiser, z, high)
        + 2 * math.log(high / low)
        - total
        - expected_density(denoiser, z, low)
    )


def check_chain_bound(weighting=noise.discrete_elbo_weight):
    """The chain's sum is below the log-density at every length and approaches it like 1/T."""
    gaps = [chain_gap(weighting, steps) for steps in (10, 100, 1000)]
    assert all(float(gap.max()) < 0 for gap in gaps), gaps
    assert float((gaps[2] / gaps[1]).min()) > 0.08 and float((gaps[2] / gaps[1]).max()) < 0.12
    assert float(gaps[2].min()) > -0.08


def test_the_discrete_elbo_is_a_bound():
    check_chain_bound()


def test_the_right_end_weight_is_not_a_bound():
    with pytest.raises(AssertionError):
        check_chain_bound(noise.right_end_weight)
    assert all(float(chain_gap(noise.right_end_weight, steps).min()) > 0 for steps in (10, 100))


def moments_of(law) -> tuple[torch.Tensor, torch.Tensor]:
    """Class means [K,2,1,1] and covariance traces [K] of a law, from its components."""
    means = []
    traces = []
    for k in range(law.num_classes):
        at = law.labels == k
        w = law.weights[at]
        m = law.means[at]
        s = law.scales[at]
        mean = (w[:, None] * m).sum(0)
        means.append(mean)
        traces.append((w * (2 * s**2 + ((m - mean) ** 2).sum(1))).sum())
    return torch.stack(means)[:, :, None, None], torch.stack(traces)


def check_end_term(end_term=likelihood.end_term):
    """C_k(sigma) = E log p_sigma + D ln sigma + D/2 ln(2 pi e): exact for one Gaussian a class, else up to sigma^-4."""
    rest = {}
    for name in ("imbalanced", "mixtures"):
        denoiser = exact(name)
        z = points(name, 4)
        for sigma in (3.0, 6.0, 12.0):
            truth = expected_density(denoiser, z, sigma) + 2 * math.log(sigma) - CONSTANT
            got = end_term(z, *moments_of(data.PLANE_LAWS[name]()), sigma)
            rest[name, sigma] = float((got - truth).abs().max())
            assert name == "mixtures" or rest[name, sigma] < 1e-12, rest
    assert rest["mixtures", 3.0] < 2e-3, rest
    for sigma in (3.0, 6.0):  # doubling sigma divides a rest of order sigma^-4 by sixteen
        assert rest["mixtures", 2 * sigma] < rest["mixtures", sigma] / 12, rest


def test_end_term():
    check_end_term()


def test_the_end_term_repairs_levels_that_stop_early():
    denoiser = exact("gaussians")
    z = points("gaussians", 4)
    levels = noise.log_levels(0.001, 3.0, 200)
    short = -(expected_errors(denoiser, z, levels, 24) * noise.elbo_weight(levels)).sum(-1)
    truth = centred(denoiser.log_density(z, 0.0))
    repaired = short + likelihood.end_term(z, *moments_of(data.gaussians()), 3.0)
    without, with_it = (float((centred(v) - truth).abs().max()) for v in (short, repaired))
    assert with_it < 0.003 and with_it < without / 10, (without, with_it)


def test_class_moments_are_those_of_the_images():
    images = points("mixtures", 60)
    labels = torch.arange(60) % 3
    means, traces = likelihood.class_moments(images, labels, 3)
    flat = images.flatten(1).numpy()
    for k in range(3):
        assert np.allclose(means[k].flatten(), flat[labels == k].mean(0), atol=1e-12)
        assert abs(float(traces[k]) - np.trace(np.cov(flat[labels == k].T, bias=True))) < 1e-12


def test_only_the_exact_weights_give_the_posterior():
    """Mean total variation to the exact posterior over 200 points: the ELBO's is tiny, that of every other is not."""
    denoiser = exact("overlapping")
    z = points("overlapping", 200)
    levels = noise.log_levels(0.002, 100, 120)
    errors = expected_errors(denoiser, z, levels, 8)
    truth = torch.softmax(denoiser.log_density(z, 0.0), 1)

    def distance(logits):
        return float((torch.softmax(logits, 1) - truth).abs().sum(1).mean() / 2)

    off = {name: distance(-(errors * w(levels)).sum(-1)) for name, w in noise.WEIGHTINGS.items()}
    assert off["ELBO"] < 2e-3 and off["discrete ELBO"] < 2e-3, off
    for name in ("EDM", "RDC as released", "w = 1 on noise", "w = 1 on x"):
        assert off[name] > 0.02, off
    assert distance(-(errors * noise.elbo_weight(levels)).sum(-1) / 2) > 0.02, (
        "a mean over pixels is another posterior"
    )


# ---------------------------------------------------------------------------------------------------------------------
# VP and VE


def ddpm_bank(betas: torch.Tensor, samples: int = 4) -> NoiseBank:
    """A bank over the steps t = 2..T of a schedule."""
    levels = noise.chain_levels(noise.sigma_of_alpha_bar(noise.alpha_bar(betas)))
    return NoiseBank.fixed(levels, SHAPE, samples, dtype=torch.float64)


def check_vp_is_ve(vp=likelihood.vp_elbo):
    """The chain as DDPM writes it and as EDM writes it are one number: logits equal to 1e-5, for two schedules."""
    denoiser = exact("mixtures")
    z = points("mixtures", 5)
    for betas in (noise.linear_betas(60, 1e-3, 0.3), noise.cosine_betas(40)):
        bank = ddpm_bank(betas)
        ve = likelihood.elbo(denoiser, z, bank, noise.discrete_elbo_weight)
        assert float((vp(denoiser, z, betas, bank) - ve).abs().max()) < 1e-5


def test_vp_equals_ve():
    check_vp_is_ve()


def test_vp_equals_ve_on_some_classes():
    denoiser = exact("mixtures")
    z = points("mixtures", 2)
    betas = noise.linear_betas(20, 1e-3, 0.3)
    every, some = (
        likelihood.vp_elbo(denoiser, z, betas, ddpm_bank(betas), classes)
        for classes in (None, [2, 0])
    )
    assert torch.allclose(some, every[:, [2, 0]], atol=1e-12)


def test_a_bank_of_another_schedule_gets_a_sentence():
    bank = ddpm_bank(noise.linear_betas(20, 1e-3, 0.3))
    with pytest.raises(
        ValueError, match="expected a bank over the 20 steps of this schedule, got Levels"
    ):
        likelihood.vp_elbo(
            exact("mixtures"), points("mixtures", 1), noise.linear_betas(21, 1e-3, 0.3), bank
        )
    with pytest.raises(ValueError, match="build it from noise.chain_levels"):
        likelihood.vp_elbo(
            exact("mixtures"), points("mixtures", 1), noise.linear_betas(20, 1e-3, 0.2), bank
        )


# ---------------------------------------------------------------------------------------------------------------------
# Images that already carry noise


def check_noised_elbo(estimate=likelihood.noised_elbo, tolerance: float = 0.03):
    """Centred `estimate` of z_tau against centred log p_tau(z_tau | k), for two laws and two noise levels."""
    generator = torch.Generator().manual_seed(4)
    for name, tau in (("gaussians", 0.2), ("mixtures", 0.5)):
        denoiser = exact(name)
        z = points(name, 4)
        z_tau = z + tau * torch.randn(z.shape, generator=generator, dtype=torch.float64)
        bank = sobol_bank(noise.noised_levels(tau, 100.0, 256), 256)
        with torch.no_grad():
            got = estimate(denoiser, z_tau, tau, bank, chunk=1 << 15)
        off = centred(got) - centred(denoiser.log_density(z_tau, tau))
        assert float(off.abs().max()) < tolerance, (name, off)


def test_noised_elbo_is_the_noised_log_density():
    check_noised_elbo()


def test_noised_elbo_without_noise_is_the_elbo():
    denoiser = exact("mixtures")
    z = points("mixtures", 4)
    bank = NoiseBank.fixed(noise.log_levels(0.05, 20, 24), SHAPE, 4, dtype=torch.float64)
    plain = likelihood.elbo(denoiser, z, bank)
    assert float((likelihood.noised_elbo(denoiser, z, 1e-6, bank) - plain).abs().max()) < 1e-6


def check_noised_weight(weight=likelihood.noised_weight):
    """The weight on z~ - D equals NDC's 1/(2V) on the difference of the bridge means, for random vectors."""
    tau = 0.4
    levels = noise.chain_levels(torch.logspace(-0.3, 1, 9, dtype=torch.float64))
    z_tau, z_up, denoised = torch.randn(
        3, 8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    low, up = (v[:, None] ** 2 for v in (levels.lower, levels.upper))
    bridge = ((up - low) * z_tau + (low - tau**2) * z_up) / (up - tau**2)
    model = ((up - low) * denoised + low * z_up) / up
    variance = (low - tau**2) * (up - low) / (up - tau**2)
    printed = (((bridge - model) ** 2) / (2 * variance)).sum(1)
    clean = (up * z_tau - tau**2 * z_up) / (up - tau**2)
    assert torch.allclose(
        weight(tau)(levels) * ((clean - denoised) ** 2).sum(1), printed, rtol=1e-12
    )


def test_noised_weight_is_the_papers_after_rewriting():
    check_noised_weight()
    levels = noise.chain_levels(torch.logspace(-1, 1, 8, dtype=torch.float64))
    assert torch.allclose(
        likelihood.noised_weight(0.0)(levels), noise.discrete_elbo_weight(levels), rtol=1e-12
    )


@pytest.mark.parametrize("sigma_tau", [0.0, -0.1, 0.5, math.nan])
def test_noise_outside_the_bank_gets_a_sentence(sigma_tau):
    bank = NoiseBank.fixed(noise.log_levels(0.3, 20, 8), SHAPE, dtype=torch.float64)
    with pytest.raises(ValueError, match="expected 0 < sigma_tau below every level of the bank"):
        likelihood.noised_elbo(exact("gaussians"), points("gaussians", 1), sigma_tau, bank)


# ---------------------------------------------------------------------------------------------------------------------
# One code path: chunks, classes, batches, shapes


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_chunks_change_neither_value_nor_gradient(chunk):
    denoiser = exact("mixtures")
    bank = NoiseBank.fixed(noise.log_levels(0.05, 5, 6), SHAPE, 3, dtype=torch.float64)
    results = []
    for size in (1 << 20, chunk):
        z = points("mixtures", 3).requires_grad_(True)
        value = likelihood.elbo(denoiser, z, bank, chunk=size)
        gradient = torch.autograd.grad((value * torch.tensor([1.0, -2.0, 0.5])).sum(), z)[0]
        results.append((value.detach(), gradient))
    for whole, parts in zip(*results, strict=True):
        assert float(((whole - parts) / whole.abs().max()).abs().max()) < 1e-12


class Counting(MixtureDenoiser):
    """A mixture that remembers how many images it was asked to denoise at once."""

    largest = 0

    def estimate(self, x_sigma, sigma, classes):
        """As the mixture, counted."""
        self.largest = max(self.largest, len(x_sigma) * len(classes))
        return super().estimate(x_sigma, sigma, classes)


def test_memory_is_bounded_by_the_chunk():
    """No call sees more rows than the chunk, and autograd keeps a small part of what it would keep without chunks."""
    denoiser = Counting.of_law(data.mixtures())
    kept = {}
    for samples, chunk in ((4, 60), (64, 60), (64, 1 << 20)):
        denoiser.largest = 0
        total = 0
        bank = NoiseBank.fixed(noise.log_levels(0.05, 5, 6), SHAPE, samples, dtype=torch.float64)

        def pack(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            z = points("mixtures", 2).requires_grad_(True)
            value = likelihood.elbo(denoiser, z, bank, chunk=chunk)
        kept[samples, chunk] = total / (samples * 6 * 2)
        assert denoiser.largest <= chunk
        value.sum().backward()
        assert denoiser.largest <= chunk and z.grad is not None
    assert kept[64, 60] < kept[64, 1 << 20] / 20, kept


def test_named_classes_are_a_slice_of_all():
    denoiser = exact("mixtures")
    z = points("mixtures", 3)
    bank = NoiseBank.fixed(noise.log_levels(0.05, 5, 6), SHAPE, 2, dtype=torch.float64)
    every = likelihood.diffusion_loss(denoiser, z, bank)
    assert tuple(every.shape) == (3, 3, 6)
    assert torch.equal(likelihood.diffusion_loss(denoiser, z, bank, [2, 0]), every[:, [2, 0]])
    assert tuple(likelihood.diffusion_loss(denoiser, z, bank, [3]).shape) == (3, 1, 6)


def test_each_image_can_have_its_own_noise():
    denoiser = exact("mixtures")
    z = points("mixtures", 3)
    bank = NoiseBank.fresh(
        noise.log_levels(0.05, 5, 6), SHAPE, 3, torch.Generator().manual_seed(0), 2, torch.float64
    )
    together = likelihood.diffusion_errors(denoiser, z, bank)
    for i in range(3):
        alone = likelihood.diffusion_errors(
            denoiser, z[i : i + 1], NoiseBank(bank.levels, bank.noise[:, :, i : i + 1])
        )
        assert torch.allclose(alone[0], together[i], rtol=1e-12)


@pytest.mark.parametrize(
    "images, shape, sentence",
    [
        (4, SHAPE, "expected noise for 1 or 3 images, got a bank drawn for 4; redraw it"),
        (1, (1, 2, 1), r"expected noise of image shape \[2, 1, 1\], got \[1, 2, 1\]"),
    ],
)
def test_a_bank_that_does_not_fit_gets_a_sentence(images, shape, sentence):
    bank = NoiseBank.fresh(
        noise.log_levels(0.05, 5, 6), shape, images, torch.Generator().manual_seed(0)
    )
    with pytest.raises(ValueError, match=sentence):
        likelihood.elbo(exact("mixtures"), points("mixtures", 3), bank)


def test_a_class_that_does_not_exist_gets_a_sentence():
    bank = NoiseBank.fixed(noise.log_levels(0.05, 5, 6), SHAPE)
    with pytest.raises(ValueError, match="expected classes between 0 and 3"):
        likelihood.elbo(exact("mixtures"), points("mixtures", 1), bank, classes=[7])
