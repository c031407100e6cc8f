"""Every likelihood formula against the exact mixture, which goes through the same code path as a network."""

import math
import sys
from functools import partial

import numpy as np
import pytest
import torch
import twins
from diffclass import data, likelihood, noise, units
from diffclass.classifiers.bayes import BayesClassifier
from diffclass.classifiers.noised import NoisedBayesClassifier
from diffclass.denoisers.base import Denoiser
from diffclass.denoisers.exact import MixtureDenoiser
from diffclass.noise import Levels, NoiseBank
from diffclass.training.loop import global_draws_from
from diffclass.training.losses import contrastive_loss
from scipy import stats

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
    density = denoiser.log_density(z_sigma, sigma).unflatten(0, (len(z), -1))
    return (density * weights[:, None]).sum(1)


def centred(logits: torch.Tensor) -> torch.Tensor:
    """Logits without the part that the classes share."""
    return logits - logits.mean(1, keepdim=True)


# ---------------------------------------------------------------------------------------------------------------------
# The ELBO of an exact denoiser is the log-density


@twins.rejected(
    {
        "mean over levels": dict(
            evidence=lambda losses, levels, weighting: -(losses * weighting(levels)).mean(-1)
        ),
        "sign": dict(evidence=twins.scaled(likelihood.evidence, -1)),
        "unweighted": dict(evidence=lambda losses, levels, weighting: -losses.sum(-1)),
    }
)
def test_evidence_is_minus_the_weighted_sum_of_losses(evidence=likelihood.evidence):
    levels = noise.chain_levels(torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64))
    losses = torch.tensor([[1.0, 10.0], [4.0, 0.0]], dtype=torch.float64)
    assert noise.discrete_elbo_weight(levels).tolist() == [1.5, 0.375]
    got = evidence(losses, levels, noise.discrete_elbo_weight)
    assert got.tolist() == [-1.5 - 3.75, -6.0]


@twins.rejected(
    {
        "EDM weighting": dict(estimate=partial(likelihood.elbo, weighting=noise.edm_weight)),
        "simple weighting": dict(estimate=partial(likelihood.elbo, weighting=noise.simple_weight)),
        "sign": dict(estimate=twins.scaled(likelihood.elbo, -1)),
        "mean over pixels": dict(estimate=twins.scaled(likelihood.elbo, 0.5)),
    }
)
def test_elbo_is_log_density(estimate=likelihood.elbo, tolerance: float = 0.03):
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


def constant_of_one_dimension(*arguments, **options):
    """The log-likelihood with the constant of one dimension instead of D."""
    total = likelihood.log_likelihood(*arguments, **options)
    return total + math.log(2 * math.pi * math.e) / 2


@twins.rejected(
    {
        "constant of one dimension": dict(estimate=constant_of_one_dimension),
        "no constant": dict(estimate=likelihood.elbo),
    }
)
def test_log_likelihood_is_absolute(estimate=likelihood.log_likelihood, tolerance: float = 0.03):
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


def test_the_constant_is_minus_the_entropy_of_the_noise_at_the_lowest_edge():
    """By scipy, for even and odd numbers of pixels; the edge 0.3 is not where the first loss is measured."""
    levels = noise.log_levels(0.3, 5.0, 4)
    for pixels in (1, 2, 3, 7):
        entropy = stats.multivariate_normal(cov=0.3**2 * np.eye(pixels)).entropy()
        assert likelihood.noise_constant(levels, pixels) == pytest.approx(-entropy)


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


@twins.rejected(
    {
        "half the weight": dict(weighting=twins.scaled(noise.elbo_weight, 0.5)),
        "sigma^-2": dict(weighting=lambda levels: levels.sigma**-2 * levels.step),
        "right end": dict(weighting=noise.right_end_weight),
    }
)
def test_pointwise_identity(weighting=noise.elbo_weight, tolerance: float = 1e-3):
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


@twins.rejected(
    {
        "right end": dict(weighting=noise.right_end_weight),
        "midpoint": dict(weighting=twins.scaled(noise.discrete_elbo_weight, 0.9)),
    }
)
def test_the_discrete_elbo_is_a_bound(weighting=noise.discrete_elbo_weight):
    """The chain's sum is below the log-density at every length and approaches it like 1/T."""
    gaps = [chain_gap(weighting, steps) for steps in (10, 100, 1000)]
    assert all(float(gap.max()) < 0 for gap in gaps), gaps
    assert float((gaps[2] / gaps[1]).min()) > 0.08 and float((gaps[2] / gaps[1]).max()) < 0.12
    assert float(gaps[2].min()) > -0.08


def test_the_right_end_weight_is_not_a_bound():
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


def end_term_with_trace(z, means, traces, sigma):
    """-(||z - m||^2 + tr) / (2 sigma^2): the trace, which cancels, is kept."""
    return -(((z[:, None] - means) ** 2).flatten(2).sum(-1) + traces) / (2 * sigma**2)


@twins.rejected(
    {
        "without the half": dict(end_term=twins.scaled(likelihood.end_term, 2)),
        "trace kept": dict(end_term=end_term_with_trace),
        "sign": dict(end_term=twins.scaled(likelihood.end_term, -1)),
    }
)
def test_end_term(end_term=likelihood.end_term):
    """C_k(sigma) = E log p_sigma + D ln sigma + D/2 ln(2 pi e): exact for one Gaussian a class, else up to sigma^-4."""
    rest = {}
    for name in ("imbalanced", "mixtures"):
        denoiser = exact(name)
        z = points(name, 4)
        for sigma in (3.0, 6.0, 12.0):
            truth = expected_density(denoiser, z, sigma) + 2 * math.log(sigma) - CONSTANT
            got = end_term(z, *moments_of(data.PLANE_LAWS[name]()), sigma)
            rest[name, sigma] = float((got - truth).abs().max())
            if name == "imbalanced":
                assert rest[name, sigma] < 1e-12, rest
    assert rest["mixtures", 3.0] < 2e-3, rest
    for sigma in (3.0, 6.0):  # doubling sigma divides a rest of order sigma^-4 by sixteen
        assert rest["mixtures", 2 * sigma] < rest["mixtures", sigma] / 12, rest


class EndMisplaced(BayesClassifier):
    """A classifier whose end term is that of another level, or not divided by the temperature."""

    edge = "upper"
    cooled = True

    def logits(self, x, noise):
        logits = self.logits_of(self._losses(x, self.levels, noise))
        if self.moments is not None:
            last = float(getattr(self.levels, self.edge)[-1])
            end = likelihood.end_term(units.to_model(x), *self.moments, last)
            logits = logits + (end / self.temperature if self.cooled else end)
        return logits


class EndAtTheLastLevel(EndMisplaced):
    """The end term at the level that was measured last, not where its interval ends."""

    edge = "sigma"


class EndUncooled(EndMisplaced):
    """The end term in nats, beside evidence that is divided by the temperature."""

    cooled = False


@twins.rejected(
    {
        "at the last level": dict(kind=EndAtTheLastLevel),
        "not divided by the temperature": dict(kind=EndUncooled),
    }
)
def test_a_classifier_adds_the_end_term_of_its_last_edge(kind=BayesClassifier):
    """With few levels up to 2, moments add E log p_2 by quadrature (and a constant), over the temperature."""
    denoiser = exact("imbalanced")
    z = points("imbalanced", 4)
    levels = noise.log_levels(0.05, 2.0, 4)
    moments = moments_of(data.imbalanced())
    dropped = expected_density(denoiser, z, 2.0) + 2 * math.log(2.0) - CONSTANT
    for temperature in (1.0, 4.0):
        logits = []
        for known in (moments, None):
            model = kind(denoiser, levels, temperature=temperature, moments=known)
            drawn = model.sample_noise(1, torch.Generator().manual_seed(0))
            logits.append(model(units.to_pixel(z), drawn))
        assert torch.allclose(logits[0] - logits[1], dropped / temperature, atol=1e-9)


def test_a_classifier_without_a_slip_passes_as_a_twin():
    test_a_classifier_adds_the_end_term_of_its_last_edge.check(kind=EndMisplaced)


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


def test_a_class_without_images_has_no_moments():
    with pytest.raises(ValueError, match=r"expected images of each class, got counts \[2, 0, 1\]"):
        likelihood.class_moments(torch.zeros(3, *SHAPE), torch.tensor([0, 2, 0]), 3)
    with pytest.raises(ValueError, match="expected labels between 0 and 1, got 0 to 2"):
        likelihood.class_moments(torch.zeros(3, *SHAPE), torch.tensor([0, 2, 1]), 2)


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
# The evidence of one drawn level, which a network is trained on


class Offsets(Denoiser):
    """Answers with the number a_k in every pixel: on black pictures head k is off by D a_k^2 at every level."""

    has_null = True
    num_classes = 2
    image_shape = SHAPE
    offsets = (0.1, 0.3, 0.2)  # the last one without a class

    def estimate(self, x_sigma, sigma, classes):
        """See `Denoiser.forward`."""
        own = torch.tensor(self.offsets)[classes]
        return own[None, :, None, None, None].expand(len(x_sigma), -1, *SHAPE)

    def answers(self, x_sigma, sigma):
        """See `LearnedDenoiser.answers`."""
        return self.estimate(x_sigma, sigma, torch.arange(len(self.offsets)))


def drawn_uniformly(low, high, temperature, denoising):
    """The contrastive loss with sigma ~ U(low, high) and the weight of log-uniform levels; its logits are flat."""

    def loss(denoiser, images, labels, generator):
        sigma = low + (high - low) * torch.rand(len(images), generator=generator)
        error = (denoiser(images, sigma, range(3)) - images[:, None]).square().flatten(2).sum(2)
        e = math.log(high / low) * error / sigma[:, None] ** 2
        own = e.gather(1, labels[:, None]) + e[:, -1:]
        return math.log(2) + denoising * own.mean() / (2 * images[0].numel())

    return loss


def upper_end_forgotten(low, high, **options):
    """The contrastive loss of another stretch of levels."""
    return contrastive_loss(low, 2 * high, **options)


def per_pixel(low, high, temperature, denoising):
    """The contrastive loss whose diffusion losses are divided by the pixels once more."""
    return contrastive_loss(low, high, temperature, denoising / math.prod(SHAPE))


@twins.rejected(
    {
        "levels drawn uniformly": dict(loss_of=drawn_uniformly),
        "upper end forgotten": dict(loss_of=upper_end_forgotten),
        "per pixel": dict(loss_of=per_pixel),
    }
)
def test_the_contrastive_loss_is_the_elbo_on_average(loss_of=contrastive_loss):
    """Where the logits are flat, the mean over drawn levels is the ELBO's integral of sigma^-3 in closed form."""
    low = 0.2
    high = 0.8
    loss = loss_of(low, high, temperature=1e9, denoising=0.5)
    black = torch.zeros(200_000, *SHAPE)
    labels = torch.zeros(200_000, dtype=torch.long)
    with torch.no_grad():
        value = float(loss(Offsets(), black, labels, torch.Generator().manual_seed(0)))
    integral = (low**-2 - high**-2) / 2
    wanted = math.log(2) + 0.5 * integral * (0.1**2 + 0.2**2) / 2
    assert abs(value / wanted - 1) < 2e-3, (value, wanted)


# ---------------------------------------------------------------------------------------------------------------------
# VP and VE


def ddpm_bank(betas: torch.Tensor, samples: int = 4) -> NoiseBank:
    """A bank over the steps t = 2..T of a schedule."""
    levels = noise.chain_levels(noise.sigma_of_alpha_bar(noise.alpha_bar(betas)))
    return NoiseBank.fixed(levels, SHAPE, samples, dtype=torch.float64)


def last_step_left_out(denoiser, z, betas, bank):
    """The sum over t = 2..T-1."""
    shorter = NoiseBank(bank.levels[:-1], bank.noise[:-1])
    return likelihood.vp_elbo(denoiser, z, betas[:-1], shorter)


def plain_variance(denoiser, z, betas, bank):
    """beta_t in place of beta~_t in the weight: the other choice of the model's variance."""
    abar = noise.alpha_bar(betas)
    ratio = (1 - abar[:-1]) / (1 - abar[1:])  # beta~ / beta
    return likelihood.elbo(
        denoiser, z, bank, lambda levels: noise.discrete_elbo_weight(levels) * ratio
    )


@twins.rejected(
    {
        "beta for beta~": dict(vp=plain_variance),
        "last step left out": dict(vp=last_step_left_out),
    }
)
def test_vp_equals_ve(vp=likelihood.vp_elbo):
    """The chain as DDPM writes it and as EDM writes it are one number: logits equal to 1e-5, for two schedules."""
    denoiser = exact("mixtures")
    z = points("mixtures", 5)
    for betas in (noise.linear_betas(60, 1e-3, 0.3), noise.cosine_betas(40)):
        bank = ddpm_bank(betas)
        ve = likelihood.elbo(denoiser, z, bank, noise.discrete_elbo_weight)
        assert float((vp(denoiser, z, betas, bank) - ve).abs().max()) < 1e-5


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


def noised_point_as_target(denoiser, z_tau, sigma_tau, bank, chunk):
    """EPNDC that starts from z_tau itself instead of the clean point on the line: no shift."""
    spread = (bank.sigma**2 - sigma_tau**2).sqrt()
    still = torch.zeros_like(spread)
    errors = likelihood._errors(denoiser, z_tau, bank, spread, still, None, chunk)
    return likelihood.evidence(errors.mean(-1), bank.levels)


def sigma_for_the_added_noise(denoiser, z_tau, sigma_tau, bank, chunk):
    """EPNDC that adds sigma where only r = sqrt(sigma^2 - sigma_tau^2) is missing."""
    shift = sigma_tau**2 / (bank.sigma**2 - sigma_tau**2).sqrt()
    errors = likelihood._errors(denoiser, z_tau, bank, bank.sigma, shift, None, chunk)
    return likelihood.evidence(errors.mean(-1), bank.levels)


@twins.rejected(
    {
        "noised point as the target": dict(estimate=noised_point_as_target),
        "sigma for r": dict(estimate=sigma_for_the_added_noise),
    }
)
def test_noised_elbo_is_the_noised_log_density(
    estimate=likelihood.noised_elbo, tolerance: float = 0.03
):
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


def noised_logits(denoiser, sigma_pixel, x_tau):
    """Logits of the library's classifier of noised images, under noise that is evenly spread."""
    model = NoisedBayesClassifier(
        denoiser, sigma_pixel, levels=128, high=50.0, samples=128, chunk=1 << 15
    )
    bank = sobol_bank(model.levels, 128)
    with torch.no_grad():
        return model(x_tau, bank.noise.movedim(2, 0))


class PixelsInTheFormula(NoisedBayesClassifier):
    """Levels above the noise in model units, and a formula that takes the noise in pixels."""

    def logits(self, x, noise):
        bank = NoiseBank(self.levels, noise.movedim(0, 2))
        sigma_tau = self.sigma_pixel
        return likelihood.noised_elbo(self.denoiser, units.to_model(x), sigma_tau, bank)


@twins.rejected(
    {
        "sigma in pixels": dict(
            logits_of=twins.patched(noised_logits, units, sigma_to_model=lambda sigma: sigma)
        ),
        "levels alone in model units": dict(
            logits_of=twins.patched(
                noised_logits, sys.modules[__name__], NoisedBayesClassifier=PixelsInTheFormula
            )
        ),
    }
)
def test_a_noised_classifier_converts_the_noise_of_its_pixels(logits_of=noised_logits):
    """Centred logits against log p_tau(z_tau | k), in nats; tau = 2 sigma_pixel is the noise in model units."""
    denoiser = exact("mixtures")
    generator = torch.Generator().manual_seed(4)
    for sigma_pixel in (0.1, 0.2):
        x = units.to_pixel(points("mixtures", 4))
        x_tau = x + sigma_pixel * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        truth = denoiser.log_density(units.to_model(x_tau), 2 * sigma_pixel)
        off = centred(logits_of(denoiser, sigma_pixel, x_tau)) - centred(truth)
        assert float(off.abs().max()) < 0.03, (sigma_pixel, off)


@twins.rejected(
    {
        "tau forgotten": dict(weight=lambda tau: noise.discrete_elbo_weight),
        "without the half": dict(weight=lambda tau: twins.scaled(likelihood.noised_weight(tau), 2)),
    }
)
def test_noised_weight_is_the_papers_after_rewriting(weight=likelihood.noised_weight):
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


def test_noised_weight_without_noise_is_that_of_the_chain():
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


# ---------------------------------------------------------------------------------------------------------------------
# Gradients that never differentiate the denoiser, against autograd


def slopes_of(function, z: torch.Tensor) -> torch.Tensor:
    """Gradients of K outputs by autograd. Shapes: [B,C,H,W] -> [B,K,C,H,W]."""
    leaf = z.clone().requires_grad_()
    out = function(leaf)
    slopes = [
        torch.autograd.grad(out[:, k].sum(), leaf, retain_graph=True)[0]
        for k in range(out.shape[1])
    ]
    return torch.stack(slopes, 1)


def even_bank(low: float, high: float, levels: int, samples: int) -> NoiseBank:
    """The library's bank of evenly spread noise, the same at every level."""
    return NoiseBank.sobol(noise.log_levels(low, high, levels), SHAPE, samples, dtype=torch.float64)


def lower_end_alone(denoiser, z, low, high, eps):
    """The score at the lower end alone."""
    return likelihood._mean_score(denoiser, z, low, eps)


def scores_of_noise(denoiser, z, low, high, eps):
    """The score divided by sigma instead of sigma^2."""
    lower = low * likelihood._mean_score(denoiser, z, low, eps)
    return lower - high * likelihood._mean_score(denoiser, z, high, eps)


@twins.rejected(
    {
        "lower end alone": dict(gradient_of=lower_end_alone),
        "sigma for sigma^2": dict(gradient_of=scores_of_noise),
        "sign": dict(gradient_of=twins.scaled(likelihood.telescoped_gradient, -1)),
        "per pixel": dict(gradient_of=twins.scaled(likelihood.telescoped_gradient, 2)),
    }
)
def test_the_telescoped_gradient_is_that_of_the_likelihood_band(
    gradient_of=likelihood.telescoped_gradient,
):
    """The mean score at the two ends is the gradient of E log p_low - E log p_high, class by class."""
    denoiser = exact("mixtures")
    z = points("mixtures", 4, seed=0)
    low = 0.2
    high = 1.5
    eps = even_bank(0.1, 1, 1, 32).noise[0]

    def band(z):
        lower = sum(denoiser.log_density(z + low * e, low) for e in eps)
        return (lower - sum(denoiser.log_density(z + high * e, high) for e in eps)) / 32

    got = gradient_of(denoiser, z, low, high, eps)
    wanted = slopes_of(band, z)
    assert float(wanted.abs().max()) > 1 and torch.allclose(got, wanted, rtol=1e-6, atol=1e-6)


def test_it_telescopes():
    """Autograd through the losses of 200 levels between the ends gives the same gradient, up to quadrature."""
    denoiser = exact("mixtures")
    z = points("mixtures", 2, seed=0)
    low = 0.2
    high = 1.5
    bank = even_bank(low, high, 200, 256)
    through = slopes_of(lambda z: likelihood.elbo(denoiser, z, bank, chunk=10**6), z)
    ends = likelihood.telescoped_gradient(denoiser, z, low, high, bank.noise[0])
    assert float((through - ends).norm() / through.norm()) < 0.02
    assert float((centred(through) - centred(ends)).norm() / centred(through).norm()) < 0.02


class Clipped(MixtureDenoiser):
    """A denoiser that is nobody's posterior mean: the exact one, bent."""

    def estimate(self, x_sigma, sigma, classes):
        """sin(2 D)."""
        return (2 * super().estimate(x_sigma, sigma, classes)).sin()


def denoiser_held_fixed(denoiser, z, bank, weights):
    """2 (z - D) alone: the gradient as if D did not move."""
    total = 0.0
    for t, weight in enumerate(weights):
        z_sigma = z + bank.sigma[t] * bank.noise[t]  # [S,B,C,H,W]
        denoised = denoiser(z_sigma.flatten(0, 1), bank.sigma[t]).unflatten(0, z_sigma.shape[:2])
        total = total - weight * 2 * (z[:, None] - denoised).mean(0)
    return total


@twins.rejected(
    {
        "denoiser held fixed": dict(gradient_of=denoiser_held_fixed),
        "half": dict(gradient_of=twins.scaled(likelihood.jacobian_free_gradient, 0.5)),
    }
)
def test_the_jacobian_free_gradient_needs_no_exact_denoiser(
    gradient_of=likelihood.jacobian_free_gradient,
):
    """For any denoiser: the gradient of the expected loss, up to one shared by the classes. In sample, within noise."""
    denoiser = Clipped.of_law(data.mixtures())
    z = points("mixtures", 2, seed=0)
    bank = even_bank(0.3, 1.5, 3, 2048)
    weights = noise.elbo_weight(bank.levels)
    wanted = centred(slopes_of(lambda z: likelihood.elbo(denoiser, z, bank, chunk=10**7), z))
    got = centred(gradient_of(denoiser, z, bank, weights))
    off = float((got - wanted).norm() / wanted.norm())
    assert off < 0.03, off


def test_ends_that_do_not_rise_get_a_sentence():
    eps = torch.zeros(2, 1, *SHAPE, dtype=torch.float64)
    with pytest.raises(ValueError, match="expected levels with 0 < low < high, got 1.0 and 0.5"):
        likelihood.telescoped_gradient(exact("mixtures"), points("mixtures", 1), 1.0, 0.5, eps)


@twins.rejected(
    {
        "the half is kept": dict(end_slope=twins.scaled(likelihood.end_slope, 0.5)),
        "sign": dict(end_slope=twins.scaled(likelihood.end_slope, -1)),
    }
)
def test_the_end_slope_is_the_gradient_of_the_end_term(end_slope=likelihood.end_slope):
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(4, 2, 1, 1, generator=generator, dtype=torch.float64).requires_grad_()
    means = torch.randn(3, 2, 1, 1, generator=generator, dtype=torch.float64)
    traces = torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64)
    ends = likelihood.end_term(z, means, traces, 1.5)
    wanted = [torch.autograd.grad(ends[:, k].sum(), z, retain_graph=True)[0] for k in range(3)]
    got = end_slope(z.detach(), means, traces, 1.5)
    assert torch.allclose(got, torch.stack(wanted, 1), rtol=1e-12)


class Dropping(Denoiser):
    """A network that drops half of its inputs at random while it is trained."""

    num_classes = 2
    image_shape = SHAPE
    sigma_range = (1e-3, 1e3)

    def __init__(self):
        super().__init__()
        self.dropout = torch.nn.Dropout(0.5)

    def estimate(self, x_sigma, sigma, classes):
        """Something bent, the same for every class but for a factor."""
        bent = self.dropout((x_sigma + sigma[:, None, None, None]).sin())
        return bent[:, None] * (1 + classes.to(bent))[:, None, None, None]


@pytest.mark.parametrize("denoiser", [exact("moons"), Dropping().train()])
def test_losses_that_are_recomputed_have_the_gradient_of_losses_that_are_kept(
    denoiser, monkeypatch
):
    bank = sobol_bank(noise.log_levels(0.1, 2, 4), 3)

    def slope(seed: int = 0):
        z = points("moons", 3).requires_grad_()
        with global_draws_from(torch.Generator().manual_seed(seed)):
            errors = likelihood.diffusion_errors(denoiser, z, bank, chunk=8)
        return torch.autograd.grad((errors * torch.arange(3.0)).sum(), z)[0]

    recomputed = slope()
    monkeypatch.setattr(
        likelihood, "checkpoint", lambda function, *arguments, **_: function(*arguments)
    )
    torch.testing.assert_close(recomputed, slope(), rtol=1e-9, atol=1e-12)
    assert torch.allclose(slope(1), slope(), rtol=1e-3) == (not isinstance(denoiser, Dropping))
