"""Closed-form denoisers against independent formulas, learned ones against their own words, files against accidents."""

import copy
import json
import math
from functools import partial

import numpy as np
import pytest
import safetensors.torch
import torch
import twins
from diffclass import data, likelihood, noise, units
from diffclass.classifiers.bayes import BayesClassifier
from diffclass.denoisers import nets, network
from diffclass.denoisers.exact import MixtureDenoiser
from diffclass.denoisers.network import ConditionalDenoiser, MultiHeadDenoiser
from diffclass.storage import files, weights
from diffclass.training import losses
from scipy import special, stats

SHAPE = (1, 8, 8)


def finite_set(count: int = 9, classes: int = 3, seed: int = 0):
    """A small data set in model space: images [N,1,2,2] and labels [N], every class present."""
    generator = torch.Generator().manual_seed(seed)
    images = 2 * torch.rand(count, 1, 2, 2, generator=generator, dtype=torch.float64) - 1
    return images, torch.arange(count) % classes


def noisy_points(law, count: int = 12, seed: int = 0):
    """Points of a law in model space with noise of several sizes: x_sigma [B,2,1,1], sigma [B]."""
    generator = torch.Generator().manual_seed(seed)
    z = units.to_model(law.sample(count, generator, torch.float64)[0])
    sigma = torch.logspace(-1.5, 0.7, count, dtype=torch.float64)
    return z + sigma[:, None, None, None] * torch.randn(
        z.shape, generator=generator, dtype=torch.float64
    ), sigma


# ---------------------------------------------------------------------------------------------------------------------
# Theorem 3.2 and Corollary 3.3 of RDC, written out again with loops, in DDPM's variables


def optimal_noise(z_t, abar: float, images, temperature=lambda spread: 2 * spread**2):
    """Theorem 3.2: eps* = sum_i s_i (z_t - sqrt(abar) x_i) / sqrt(1 - abar), by an explicit softmax over the images."""
    signal = math.sqrt(abar)
    spread = math.sqrt(1 - abar)
    scores = [-float(((z_t - signal * x) ** 2).sum()) / temperature(spread) for x in images]
    top = max(scores)
    shares = [math.exp(s - top) for s in scores]
    return sum(
        w / sum(shares) * (z_t - signal * x) / spread for w, x in zip(shares, images, strict=True)
    )


@twins.rejected(
    {
        "released temperature 2 sigma": dict(
            noise_of=partial(optimal_noise, temperature=lambda spread: 2 * spread)
        ),
        "without the two": dict(
            noise_of=partial(optimal_noise, temperature=lambda spread: spread**2)
        ),
    }
)
def test_theorem_3_2(noise_of=optimal_noise):
    """The library's denoiser of a finite set, turned into a noise predictor, equals `noise_of` to 1e-12."""
    images, labels = finite_set()
    denoiser = MixtureDenoiser.of_images(images, labels)
    z_t = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    worst = 0.0
    for abar in (0.95, 0.6, 0.2, 0.02):
        signal = math.sqrt(abar)
        spread = math.sqrt(1 - abar)
        denoised = denoiser(z_t / signal, spread / signal)[0]
        for k in range(3):
            got = (z_t[0] - signal * denoised[k]) / spread
            worst = max(
                worst, float((got - noise_of(z_t[0], abar, images[labels == k])).abs().max())
            )
    assert worst < 1e-12, worst


def residual(z, x_sigma, sigma, images):
    """Corollary 3.3, one draw: || sum_i s_i (z - x_i) ||^2, the square of the sum."""
    shares = torch.softmax(
        torch.stack([-((x_sigma - x) ** 2).sum() / (2 * sigma**2) for x in images]), 0
    )
    return float((sum(s * (z - x) for s, x in zip(shares, images, strict=True)) ** 2).sum())


def sum_of_squares(z, x_sigma, sigma, images):
    """RDC's released slip: sum_i || s_i (z - x_i) ||^2, the sum of the squares."""
    shares = torch.softmax(
        torch.stack([-((x_sigma - x) ** 2).sum() / (2 * sigma**2) for x in images]), 0
    )
    return float(sum(((s * (z - x)) ** 2).sum() for s, x in zip(shares, images, strict=True)))


@twins.rejected({"released sum of squares": dict(residual_of=sum_of_squares)})
def test_corollary_3_3(residual_of=residual):
    """Losses through the whole code path (bank, chunks, denoiser) equal `residual_of` draw by draw, to 1e-12."""
    images, labels = finite_set()
    z = images.flip(0)[:1] * 0.8
    bank = noise.NoiseBank.fixed(noise.log_levels(0.2, 2.0, 4), (1, 2, 2), 3, dtype=torch.float64)
    got = likelihood.diffusion_errors(MixtureDenoiser.of_images(images, labels), z, bank)
    for k in range(3):
        for t, sigma in enumerate(bank.sigma.tolist()):
            for s in range(3):
                wanted = residual_of(
                    z[0], z[0] + sigma * bank.noise[t, s, 0], sigma, images[labels == k]
                )
                assert abs(float(got[0, k, t, s]) - wanted) < 1e-12, (k, t, s)


# ---------------------------------------------------------------------------------------------------------------------
# Mixtures


class SigmaForItsSquare(MixtureDenoiser):
    """Responsibilities with sigma where sigma^2 belongs."""

    def _joint_by_class(self, x, sigma, classes):
        return super()._joint_by_class(x, sigma.sqrt(), classes)


def sigma_for_its_square(denoiser, x_sigma, sigma):
    """The answer of a `SigmaForItsSquare` with the same components."""
    twin = copy.deepcopy(denoiser)
    twin.__class__ = SigmaForItsSquare
    return twin(x_sigma, sigma)


def deviation_for_variance(denoiser, x_sigma, sigma):
    """The answer of a denoiser that reads the components' deviations as variances."""
    twin = copy.deepcopy(denoiser)
    twin.variances = denoiser.variances.sqrt()
    return twin(x_sigma, sigma)


def weights_forgotten(denoiser, x_sigma, sigma):
    """The answer of a denoiser whose components all weigh the same."""
    twin = copy.deepcopy(denoiser)
    twin.log_weights = torch.zeros_like(denoiser.log_weights)
    return twin(x_sigma, sigma)


@twins.rejected(
    {
        "deviation for variance": dict(denoise=deviation_for_variance),
        "sigma for sigma^2": dict(denoise=sigma_for_its_square),
        "weights forgotten": dict(denoise=weights_forgotten),
    }
)
def test_the_denoiser_is_the_posterior_mean(denoise=MixtureDenoiser.forward):
    """D_k = integral of x0 p(x0 | k) N(x_sigma; x0, sigma^2) / the same without x0, by brute force on a grid."""
    law = data.mixtures()
    denoiser = MixtureDenoiser.of_law(law)
    axis = torch.linspace(-1.3, 1.3, 400, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2, 1, 1)
    prior = denoiser.log_density(grid, 0.0)  # [G,K]
    x_sigma = torch.tensor([[0.1, 0.3], [-0.6, 0.2]], dtype=torch.float64)[:, :, None, None]
    for sigma in (0.1, 0.5):
        seen = -((x_sigma[:, None] - grid) ** 2).flatten(2).sum(-1) / (2 * sigma**2)  # [B,G]
        share = torch.softmax(prior.T[None] + seen[:, None], dim=2)  # [B,K,G]
        wanted = (share @ grid.flatten(1))[..., None, None]
        assert float((denoise(denoiser, x_sigma, sigma) - wanted).abs().max()) < 1e-8


def noise_added(denoiser, x_sigma, sigma):
    """D with the noise added instead of taken away: 2 x_sigma - D."""
    return 2 * x_sigma[:, None] - denoiser(x_sigma, sigma)


@twins.rejected(
    {
        "sign": dict(sign=-1.0),
        "noise added": dict(denoise=noise_added),
        "half the variance": dict(sign=0.5),
    }
)
def test_tweedie(denoise=MixtureDenoiser.forward, sign: float = 1.0):
    """D_k = x_sigma + sigma^2 grad log p_sigma(x_sigma | k), with the gradient from autograd, to 1e-8."""
    for law in (data.mixtures(), data.imbalanced()):
        denoiser = MixtureDenoiser.of_law(law)
        x_sigma, sigma = noisy_points(law)
        x_sigma.requires_grad_(True)
        logs = denoiser.log_density(x_sigma, sigma)
        for k in range(law.num_classes):
            score = torch.autograd.grad(logs[:, k].sum(), x_sigma, retain_graph=True)[0]
            wanted = x_sigma + sign * sigma[:, None, None, None] ** 2 * score
            assert (
                float((denoise(denoiser, x_sigma, sigma)[:, k] - wanted).detach().abs().max())
                < 1e-8
            )


def density_of_scipy(law, x_sigma, sigma):
    """log p_sigma(x_sigma | k) from scipy's normal density: [B,K]. Independent of the library's only line for it."""
    points = x_sigma.flatten(1)[:, None].numpy()  # [B,1,2]
    spread = torch.hypot(law.scales, sigma[:, None]).numpy()[..., None]  # [B,M,1]
    logs = stats.norm.logpdf(points, law.means.numpy(), spread).sum(-1) + law.weights.log().numpy()
    classes = [special.logsumexp(logs[:, law.labels == k], axis=1) for k in range(law.num_classes)]
    return torch.from_numpy(np.stack(classes, 1))


class AxisForgotten(MixtureDenoiser):
    """A density with the normalisation of one dimension."""

    def log_density(self, x_sigma, sigma, classes=None):
        variance = self.variances[0] + sigma[:, None] ** 2
        return super().log_density(x_sigma, sigma, classes) + (2 * math.pi * variance).log() / 2


class DeviationsAdded(MixtureDenoiser):
    """A density whose deviations add up instead of the variances."""

    def _joint_by_class(self, x, sigma, classes):
        deviation = self.variances[0].sqrt()
        return super()._joint_by_class(x, (sigma**2 + 2 * sigma * deviation).sqrt(), classes)


@twins.rejected(
    {
        "sigma for sigma^2": dict(kind=SigmaForItsSquare),
        "deviations added": dict(kind=DeviationsAdded),
        "constant of one dimension": dict(kind=AxisForgotten),
    }
)
def test_the_density_is_that_of_scipy_at_every_level(kind=MixtureDenoiser):
    for make in data.PLANE_LAWS.values():
        law = make()
        x_sigma, sigma = noisy_points(law)
        wanted = density_of_scipy(law, x_sigma, sigma)
        off = kind.of_law(law).log_density(x_sigma, sigma) - wanted
        assert float(off.abs().max()) < 1e-10, law.name


@pytest.mark.parametrize("name", list(data.PLANE_LAWS))
def test_the_law_has_the_density_of_its_denoiser_which_integrates_to_one(name):
    law = data.PLANE_LAWS[name]()
    denoiser = MixtureDenoiser.of_law(law)
    x_sigma, sigma = noisy_points(law)
    assert torch.equal(denoiser.log_density(x_sigma, sigma), law.log_density(x_sigma, sigma))
    short = law.log_density(x_sigma.float(), 0.3)
    assert short.dtype == torch.float64, "the law answers in float64 whatever it is asked in"
    assert torch.equal(short, denoiser.log_density(x_sigma.float().double(), 0.3))
    axis = torch.linspace(-3, 3, 300, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2, 1, 1)
    mass = denoiser.log_density(grid, 0.3).exp().sum(0) * (axis[1] - axis[0]) ** 2
    assert torch.allclose(mass, torch.ones_like(mass), atol=1e-6)


def test_no_class_is_the_prior_mixture_of_the_classes():
    law = data.imbalanced()
    denoiser = MixtureDenoiser.of_law(law)
    x_sigma, sigma = noisy_points(law)
    joint = denoiser.log_density(x_sigma, sigma) + law.priors.log()
    assert torch.allclose(
        denoiser.log_density(x_sigma, sigma, [3])[:, 0], joint.logsumexp(1), atol=1e-12
    )
    mean = (joint.softmax(1)[:, :, None, None, None] * denoiser(x_sigma, sigma)).sum(1)
    assert torch.allclose(denoiser.unconditional(x_sigma, sigma), mean, atol=1e-12)


def test_a_finite_set_is_denoised_by_a_softmax_over_its_images():
    images, labels = finite_set(7, 2)
    denoiser = MixtureDenoiser.of_images(images, labels)
    assert torch.allclose(denoiser.log_priors.exp(), torch.tensor([4, 3]).double() / 7)
    near = images[3][None] + 0.01
    assert torch.allclose(denoiser(near, 0.01)[0, 1], images[3], atol=1e-6), (
        "low noise: the nearest image of the class"
    )
    far = denoiser(near, 1e4)[0]
    assert torch.allclose(far[0], images[labels == 0].mean(0), atol=1e-6), (
        "high noise: the mean of the class"
    )
    at = (
        images[3][None].clone().requires_grad_(True)
    )  # exactly on a training image, where a distance has a kink
    assert bool(torch.isfinite(torch.autograd.grad(denoiser(at, 0.5).sum(), at)[0]).all())


def test_float32_in_float32_out_with_float64_inside():
    law = data.rings()
    denoiser = MixtureDenoiser.of_law(law)
    x_sigma, sigma = noisy_points(law)
    short = denoiser(x_sigma.float(), sigma.float())
    assert short.dtype == torch.float32
    assert torch.allclose(
        short.double(), denoiser(x_sigma.float().double(), sigma.float().double()), atol=1e-6
    )


@pytest.mark.parametrize(
    "make, sentence",
    [
        (
            lambda m, s, w, y: MixtureDenoiser(m[:, 0], s, w, y),
            r"component means of shape \[M,C,H,W\], got \[4, 1, 1\]",
        ),
        (
            lambda m, s, w, y: MixtureDenoiser(m, s, w / 2, y),
            "weights that sum to 1 within each class",
        ),
        (
            lambda m, s, w, y: MixtureDenoiser(m, s, w, y, [0.7, 0.7]),
            "priors that sum to 1, got .* and 1.4",
        ),
        (
            lambda m, s, w, y: MixtureDenoiser(m, s, w, y * 2),
            r"one component for each class, got counts \[2, 0, 2\]",
        ),
    ],
)
def test_impossible_mixtures_get_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(
            torch.zeros(4, 2, 1, 1),
            torch.ones(4),
            torch.full((4,), 0.5),
            torch.tensor([0, 0, 1, 1]),
        )


@pytest.mark.parametrize(
    "x_sigma, sigma, sentence",
    [
        (torch.zeros(2, 1, 2, 2), 0.0, "a finite data set has no density at sigma = 0"),
        (torch.zeros(2, 1, 2, 2), torch.tensor([0.5, 0.0]), "no density at sigma = 0"),
        (torch.zeros(2, 1, 2, 2), -0.1, r"finite noise levels sigma >= 0, got -0.1"),
        (torch.zeros(2, 1, 2, 2), math.nan, r"finite noise levels sigma >= 0, got nan"),
        (torch.zeros(2, 1, 2, 2), torch.ones(3), r"one for each of 2, got sigma of shape \[3\]"),
        (torch.zeros(2, 1, 2, 2), torch.ones(2, 1), r"got sigma of shape \[2, 1\]"),
        (torch.zeros(2, 4), 0.1, r"expected images of shape \[B,1,2,2\]"),
        (torch.full((2, 1, 2, 2), math.nan), 0.1, "expected finite images"),
    ],
)
def test_densities_that_do_not_exist_get_a_sentence(x_sigma, sigma, sentence):
    with pytest.raises(ValueError, match=sentence):
        MixtureDenoiser.of_images(*finite_set()).log_density(x_sigma, sigma)


# ---------------------------------------------------------------------------------------------------------------------
# Networks


def swapped_scalings(sigma):
    """c_in and c_out exchanged."""
    c_skip, c_out, c_in = network.edm_scalings(sigma)
    return c_skip, c_in, c_out


def first_power_in_the_skip(sigma):
    """c_skip of sigma where sigma^2 belongs."""
    _, c_out, c_in = network.edm_scalings(sigma)
    return 0.5 / (sigma + 0.5), c_out, c_in


@twins.rejected(
    {
        "another sigma_data": dict(scalings=partial(network.edm_scalings, sigma_data=1.0)),
        "c_in and c_out swapped": dict(scalings=swapped_scalings),
        "c_skip of sigma, not sigma^2": dict(scalings=first_power_in_the_skip),
    }
)
def test_edm_scalings(scalings=network.edm_scalings):
    """EDM's three conditions: the network's input and target have unit variance, and c_out is as small as possible."""
    sigma = torch.logspace(-2, 2, 9, dtype=torch.float64)
    c_skip, c_out, c_in = scalings(sigma)
    variance = 0.25  # of the data
    assert torch.allclose(c_in**2 * (variance + sigma**2), torch.ones_like(sigma), atol=1e-12)
    target = (1 - c_skip) ** 2 * variance + c_skip**2 * sigma**2  # Var(x0 - c_skip x_sigma)
    assert torch.allclose(target, c_out**2, rtol=1e-12)
    for shift in (-1e-3, 1e-3):
        assert bool(
            ((1 - c_skip - shift) ** 2 * variance + (c_skip + shift) ** 2 * sigma**2 > target).all()
        )


CASES = {
    "digits conditional": ("ConditionalDenoiser", "DigitNet", dict(width=16, blocks=1)),
    "digits multi-head": ("MultiHeadDenoiser", "DigitNet", dict(width=16, blocks=1)),
    "patches conditional": ("ConditionalDenoiser", "PatchNet", dict(width=16, blocks=1, patch=2)),
    "patches multi-head": ("MultiHeadDenoiser", "PatchNet", dict(width=16, blocks=1, patch=2)),
    "unet conditional": ("ConditionalDenoiser", "UNet", dict(widths=(16, 16), layers=1)),
    "unet multi-head": ("MultiHeadDenoiser", "UNet", dict(widths=(16, 16), layers=1)),
    "unet on patches": ("MultiHeadDenoiser", "UNet", dict(widths=(16, 16), layers=1, patch=2)),
}


def build(case: str, seed: int = 0, awake: bool = True):
    """A tiny denoiser by name; `awake` gives the layers that start at zero small weights, so that classes differ."""
    kind, net, config = CASES[case]
    denoiser = network.build(kind, net, 4, SHAPE, seed=seed, **config).eval()
    if awake:
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for value in denoiser.parameters():
                if not bool(value.any()):
                    value.normal_(0, 0.05, generator=generator)
    return denoiser


@pytest.mark.parametrize("case", list(CASES))
def test_networks_answer_for_all_classes_for_some_and_for_none(case):
    denoiser = build(case)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, *SHAPE, generator=generator)
    sigma = torch.tensor([0.05, 0.5, 5.0])
    with torch.no_grad():
        every = denoiser(x, sigma)
        assert tuple(every.shape) == (3, 4, *SHAPE) and bool(torch.isfinite(every).all())
        assert float((every[:, 0] - every[:, 1]).abs().max()) > 1e-4, (
            "the class makes no difference"
        )
        assert torch.allclose(denoiser(x, sigma, [2, 0, 2]), every[:, [2, 0, 2]], atol=1e-5)
        assert torch.allclose(denoiser(x, sigma, [0, 1, 2, 3]), every, atol=1e-5)
        answers = denoiser(x, sigma, range(5))
        assert torch.allclose(answers[:, :4], every, atol=1e-5)
        for order in ([4, 2, 0, 1, 3], [3, 2, 1, 0], [0, 1], [1, 0]):
            assert torch.allclose(denoiser(x, sigma, order), answers[:, order], atol=1e-5), order
        assert torch.allclose(
            denoiser.unconditional(x, sigma), denoiser(x, sigma, [4])[:, 0], atol=1e-6
        )
        alone = torch.cat([denoiser(x[i : i + 1], float(sigma[i])) for i in range(3)])
        assert torch.allclose(alone, every, atol=1e-5), "an image's answer depends on its batch"


@pytest.mark.parametrize("kind", ["ConditionalDenoiser", "MultiHeadDenoiser"])
def test_a_network_without_a_null_class_answers_in_the_order_asked(kind):
    denoiser = network.build(kind, "DigitNet", 3, SHAPE, has_null=False, width=16, blocks=1)
    torch.nn.init.normal_(
        denoiser.network.leave[-1].weight, generator=torch.Generator().manual_seed(1)
    )
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        every = denoiser(x, 0.5)
        assert float((every[:, 0] - every[:, 2]).abs().max()) > 1e-4
        assert torch.allclose(denoiser(x, 0.5, [2, 0, 1]), every[:, [2, 0, 1]], atol=1e-5)
    with pytest.raises(ValueError, match="between 0 and 2; this one has no 'no class', got"):
        denoiser.unconditional(x, 0.5)


@pytest.mark.parametrize("case", list(CASES))
def test_networks_are_built_from_their_seed_alone(case):
    global_seeds = []
    for global_seed in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(global_seed)
            before = torch.get_rng_state()
            global_seeds.append(build(case, seed=7, awake=False).state_dict())
            assert torch.equal(torch.get_rng_state(), before), "the global generator was used"
    other = build(case, seed=8, awake=False).state_dict()
    assert all(torch.equal(global_seeds[0][n], global_seeds[1][n]) for n in other)
    assert any(not torch.equal(global_seeds[0][n], other[n]) for n in other)


def test_a_network_that_says_nothing_gives_the_skip_connection():
    """DigitNet's last layer starts at zero, so D = c_skip x: what a Gaussian of deviation 0.5 would be denoised to."""
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    for case in ("digits conditional", "digits multi-head"):
        denoised = build(case, awake=False)(x, 0.5)
        assert torch.allclose(denoised, (x / 2)[:, None].expand_as(denoised), atol=1e-6)


def test_a_unet_on_patches_is_one_on_their_pixels_as_channels():
    """The same weights around the patches of the picture, cut and put together by hand."""
    channels, size, _ = SHAPE
    config = dict(widths=(16, 16), layers=1, attention=False)
    patched = nets.UNet(channels, heads=3, size=size, patch=2, **config)
    plain = nets.UNet(4 * channels, heads=3, size=size // 2, **config)
    plain.load_state_dict(patched.state_dict())
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    half = size // 2
    cut = x.reshape(2, channels, half, 2, half, 2).permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
    log_sigma = torch.tensor([-1.0, 0.5])
    with torch.no_grad():
        answers = plain(cut, log_sigma, None).reshape(2, 3 * channels, 2, 2, half, half)
        whole = answers.permute(0, 1, 4, 2, 5, 3).reshape(2, 3 * channels, size, size)
        assert torch.allclose(patched(x, log_sigma, None), whole, atol=1e-6)
    with pytest.raises(
        ValueError, match="expected a patch that divides a picture of 8x8 pixels, got 3"
    ):
        nets.UNet(1, size=8, patch=3, **config)


def test_a_level_outside_the_range_of_a_denoiser_is_refused():
    narrow = network.build(
        "MultiHeadDenoiser", "DigitNet", 4, SHAPE, (0.05, 1.0), width=16, blocks=1
    )
    levels = noise.log_levels(0.05, 1.0, 6)
    assert BayesClassifier(narrow, levels).levels is levels
    with pytest.raises(ValueError, match="expected noise levels between 0.05 and 1, which this"):
        BayesClassifier(narrow, noise.log_levels(0.05, 10.0, 6))


def test_a_patch_network_of_single_pixels_is_the_digits_network_and_patches_stay_where_they_are():
    """With patches of one pixel nothing changes; with larger ones a far pixel is answered by its own patch's cell."""
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.3, 2.0])
    one = network.build(
        "MultiHeadDenoiser", "PatchNet", 4, SHAPE, width=16, blocks=1, patch=1, seed=3
    )
    other = network.build("MultiHeadDenoiser", "DigitNet", 4, SHAPE, width=16, blocks=1, seed=3)
    for net in (one.network.inner, other.network):
        torch.nn.init.normal_(net.leave[-1].weight, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(one(x, sigma), other(x, sigma), atol=1e-6)
    patched = build("patches multi-head")
    with torch.no_grad():
        patched.network.inner.leave[-1].weight.zero_()
        patched.network.inner.leave[-1].bias.copy_(
            torch.arange(5 * 4).float()
        )  # head k, pixel (i, j): 4 k + 2 i + j
        heads = patched.network(x, sigma.log(), None)
    assert [heads[0, k, i, j].item() for k in (0, 4) for i in (2, 3) for j in (4, 5)] == [
        0,
        1,
        2,
        3,
        16,
        17,
        18,
        19,
    ]


DENOISING = losses.denoising_loss()


@twins.rejected(
    {
        "no weight": dict(
            loss=twins.patched(losses.denoising_loss(), noise, edm_lambda=torch.ones_like)
        ),
        "weight of the noise error": dict(
            loss=twins.patched(losses.denoising_loss(), noise, edm_lambda=noise.snr)
        ),
    }
)
def test_the_denoising_loss_of_an_untrained_network_is_one(loss=DENOISING):
    """EDM's weight 1 / c_out^2 on the pixel mean: for data of deviation 0.5 and D = c_skip x, one at every level."""
    denoiser = network.build("ConditionalDenoiser", "DigitNet", 2, SHAPE, width=16, blocks=1)
    images = 0.5 * torch.randn(4000, *SHAPE, generator=torch.Generator().manual_seed(1))
    labels = torch.zeros(4000, dtype=torch.long)
    with torch.no_grad():
        value = float(loss(denoiser, images, labels, torch.Generator().manual_seed(2)))
    assert abs(value - 1) < 0.02, value


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ((torch.zeros(2, *SHAPE), 0.0), "expected a finite noise level sigma > 0, got 0"),
        ((torch.zeros(2, *SHAPE), -1.0), "got -1"),
        ((torch.zeros(2, *SHAPE), math.nan), "got nan"),
        ((torch.zeros(2, *SHAPE), torch.ones(3)), r"one for each of 2, got sigma of shape \[3\]"),
        ((torch.zeros(2, 3, 8, 8), 1.0), r"expected images of shape \[B,1,8,8\]"),
        ((torch.full((2, *SHAPE), math.nan), 1.0), "expected finite images"),
        (
            (torch.zeros(2, *SHAPE), 1.0, [5]),
            r"expected classes between 0 and 4 \(4 = no class\), got \[5\]",
        ),
        ((torch.zeros(2, *SHAPE), 1.0, [-1]), r"got \[-1\]; this denoiser was made for 4 classes"),
        ((torch.zeros(2, *SHAPE), 1.0, []), r"got \[\]"),
    ],
)
def test_wrong_questions_get_a_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        build("digits multi-head")(*arguments)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("case", ["digits conditional", "digits multi-head"])
def test_an_answer_that_is_not_finite_is_none(case, value):
    """Races mark classes that were left out by NaN: one of the network's own would pass for that."""
    denoiser = build(case)
    denoiser.network.leave[-1].bias.data[0] = value
    with pytest.raises(FloatingPointError, match=r"expected finite denoised images, got .* 0.5 to"):
        denoiser(torch.zeros(2, *SHAPE), 0.5)


def test_unknown_architectures_get_a_sentence():
    with pytest.raises(
        ValueError, match="expected one of .* around one of .*, got 'Oracle' around 'DigitNet'"
    ):
        network.build("Oracle", "DigitNet", 4, SHAPE)


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("case", list(CASES))
def test_weights_travel_bit_for_bit(case, tmp_path):
    denoiser = build(case)
    network.save_denoiser(
        denoiser, tmp_path / "deep" / "w.safetensors", {"data": "none", "images": 0}
    )
    loaded, card = network.load_denoiser(tmp_path / "deep" / "w.safetensors")
    assert type(loaded) is type(denoiser) and card == {"data": "none", "images": 0}
    assert (
        loaded.sigma_range == denoiser.sigma_range
        and loaded.num_classes == 4
        and loaded.image_shape == SHAPE
    )
    assert all(torch.equal(v, loaded.state_dict()[n]) for n, v in denoiser.state_dict().items())
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    denoiser.requires_grad_(
        False
    )  # as the loaded one: on some CPUs frozen weights take another kernel
    assert torch.equal(loaded(x, 0.3), denoiser(x, 0.3))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["w.safetensors"], (
        "a partial file was left behind"
    )


def test_missing_weights_get_a_sentence(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="expected weights at none.*, found none; run `diffclass doctor`"
    ):
        network.load_denoiser(tmp_path / "none.safetensors")


def test_the_exact_denoiser_has_second_derivatives():
    """Exact gradients through likelihood maximisation differentiate a gradient; finite differences of it agree."""
    generator = torch.Generator().manual_seed(0)
    exact = MixtureDenoiser(
        torch.randn(4, 1, 2, 2, generator=generator),
        torch.full((4,), 0.3),
        torch.full((4,), 0.5),
        torch.tensor([0, 0, 1, 1]),
    )
    x = torch.randn(1, 1, 2, 2, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda z: exact(z, 0.5)[:, 1].square().sum(), (x,))


def test_a_network_of_another_kind_gets_a_sentence(tmp_path):
    from safetensors.torch import save_file

    save_file(
        {"w": torch.zeros(1)}, tmp_path / "other.safetensors", {"architecture": '{"bridge": 4}'}
    )
    with pytest.raises(
        ValueError, match=r"expected other.safetensors to hold a denoiser, got .*\['bridge'\]"
    ):
        network.load_denoiser(tmp_path / "other.safetensors")


@pytest.mark.parametrize("keep", [0, 5, 400, -100])
def test_truncated_weights_get_a_sentence(keep, tmp_path):
    path = tmp_path / "w.safetensors"
    network.save_denoiser(build("digits conditional"), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        ValueError, match=r"expected w.safetensors to be .*, got \d+ bytes .* cut short"
    ):
        network.load_denoiser(path)


def test_weights_of_another_format_get_a_sentence(tmp_path):
    path = tmp_path / "w.safetensors"
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="expected w.safetensors to be a safetensors file"):
        network.load_denoiser(path)


def test_weights_without_an_architecture_get_a_sentence(tmp_path):
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(3)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"to name its architecture, got the header \['format'\]"):
        network.load_denoiser(path)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (
            dict(width=24),
            r"should have shape .* and has .*; these weights belong to another architecture",
        ),
        (dict(blocks=2), "should have shape .* and has None"),
        (dict(num_classes=5), "another architecture"),
        (
            dict(network="Transformer"),
            "got 'ConditionalDenoiser' around 'Transformer'; was the file written by",
        ),
    ],
)
def test_weights_of_another_architecture_get_a_sentence(change, sentence, tmp_path):
    path = tmp_path / "w.safetensors"
    denoiser = build("digits conditional")
    state = {n: v.contiguous() for n, v in denoiser.state_dict().items()}
    safetensors.torch.save_file(
        state, path, {"architecture": json.dumps({**network.describe(denoiser), **change})}
    )
    with pytest.raises(ValueError, match=sentence):
        network.load_denoiser(path)


def rewritten(path, change):
    """The same weights file with other tensors under the same header."""
    with safetensors.safe_open(path, framework="pt") as opened:
        header = opened.metadata()
    state = safetensors.torch.load_file(path)
    safetensors.torch.save_file(change(state), path, header)


def spoilt(*names, value=math.nan):
    """Weights of which the first value is another."""

    def change(state):
        for name in names:
            state[name].view(-1)[0] = value
        return state

    return change


@pytest.mark.parametrize("case", ["digits conditional", "digits multi-head"])
@pytest.mark.parametrize(
    "change, sentence",
    [
        (
            spoilt("network.enter.weight"),
            "got 1 NaN or infinite values among 144 in 'network.enter.weight'",
        ),
        (spoilt("network.enter.weight", value=math.inf), "got 1 NaN or infinite values among"),
        (spoilt("network.enter.bias", "network.place"), r"\(and in 1 more tensors\)"),
        (
            lambda state: {
                n: v * math.nan if v.is_floating_point() else v for n, v in state.items()
            },
            "expected finite weights of .*; the training that wrote them diverged, or the file was",
        ),
    ],
)
def test_weights_that_are_not_finite_are_refused(case, change, sentence, tmp_path):
    path = tmp_path / "w.safetensors"
    network.save_denoiser(build(case), path)
    weights.check_weights(path)
    rewritten(path, change)
    with pytest.raises(ValueError, match=sentence):
        network.load_denoiser(path)
    with pytest.raises(ValueError, match="expected finite weights of w.safetensors, got"):
        weights.check_weights(path)


def test_every_part_of_large_weights_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_BYTES", 5_000)
    path = tmp_path / "w.safetensors"
    network.save_denoiser(build("digits conditional"), path)
    files = weights.weight_files(path)
    assert len(files) > 2
    weights.check_weights(path)
    last = safetensors.torch.load_file(files[-1])
    rewritten(files[-1], spoilt(next(iter(last))))
    with pytest.raises(ValueError, match="expected finite weights of w.safetensors, got 1"):
        weights.check_weights(path)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda s: {f"module.{n}": v for n, v in s.items()}, r"\(\d+ missing, \d+ left over\)"),
        (lambda s: dict(list(s.items())[1:]), r"or some are lost \(1 missing, 0 left over\)"),
        (lambda s: {**s, "more": torch.zeros(1)}, r"\(0 missing, 1 left over\)"),
        (
            lambda s: {**s, "network.place": s["network.place"].to(torch.int8)},
            "expected 'network.place' .* as float32, got int8; quantised weights are not read",
        ),
    ],
)
def test_weights_that_do_not_fit_say_how(change, sentence, tmp_path):
    path = tmp_path / "w.safetensors"
    network.save_denoiser(build("digits conditional"), path)
    rewritten(path, change)
    with pytest.raises(ValueError, match=sentence):
        network.load_denoiser(path)


def test_names_are_those_of_the_network_without_its_wrappers():
    plain = {"a.weight": torch.zeros(1), "b.module.bias": torch.ones(1)}
    for wrapped in (
        {f"module.{n}": v for n, v in plain.items()},
        {f"_orig_mod.{n}": v for n, v in plain.items()},
        {f"module._orig_mod.{n}": v for n, v in plain.items()},
        {"a._orig_mod.weight": plain["a.weight"], "b.module.bias": plain["b.module.bias"]},
    ):
        assert weights.unwrapped(wrapped) == plain
    mixed = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    assert weights.unwrapped(mixed) == mixed, "not of every name: a part that is called so"
    assert weights.unwrapped({}) == {}
    with pytest.raises(ValueError, match="expected weights of one network, got 'a' twice"):
        weights.unwrapped({"a": torch.zeros(1), "_orig_mod.a": torch.zeros(1)})


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    network.save_denoiser(build("digits conditional"), path)
    before = path.read_bytes()

    def interrupted(target, content):
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "_write_new", interrupted)
    with pytest.raises(KeyboardInterrupt):
        network.save_denoiser(build("digits multi-head"), path)
    assert path.read_bytes() == before


def test_kinds_are_what_they_say():
    assert isinstance(build("digits conditional"), ConditionalDenoiser)
    assert isinstance(build("unet multi-head"), MultiHeadDenoiser)
