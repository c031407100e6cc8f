"""Closed-form denoisers against independent formulas, learned ones against their own words, files against accidents."""

import json
import math

import pytest
import safetensors.torch
import torch
from diffclass import data, noise, units
from diffclass.denoisers import network
from diffclass.denoisers.exact import MixtureDenoiser
from diffclass.denoisers.network import ConditionalDenoiser, MultiHeadDenoiser

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


def check_theorem_3_2(noise_of=optimal_noise):
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


def check_corollary_3_3(residual_of=residual):
    """Losses through the whole code path (bank, chunks, denoiser) equal `residual_of` draw by draw, to 1e-12."""
    from diffclass import likelihood

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


def test_theorem_3_2():
    check_theorem_3_2()


def test_theorem_3_2_rejects_the_released_temperature():
    with pytest.raises(AssertionError):
        check_theorem_3_2(lambda *a: optimal_noise(*a, temperature=lambda spread: 2 * spread))


def test_corollary_3_3():
    check_corollary_3_3()


def test_corollary_3_3_rejects_the_released_sum_of_squares():
    with pytest.raises(AssertionError):
        check_corollary_3_3(sum_of_squares)


# ---------------------------------------------------------------------------------------------------------------------
# Mixtures


def check_denoiser_is_the_posterior_mean(denoise=MixtureDenoiser.forward):
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


def check_tweedie(denoise=MixtureDenoiser.forward, sign: float = 1.0):
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


def test_the_denoiser_is_the_posterior_mean():
    check_denoiser_is_the_posterior_mean()


def test_tweedie():
    check_tweedie()


@pytest.mark.parametrize("name", list(data.PLANE_LAWS))
def test_density_agrees_with_the_law_at_every_level(name):
    """Two independent codes of the same formula, and total probability one by summing over a grid."""
    law = data.PLANE_LAWS[name]()
    denoiser = MixtureDenoiser.of_law(law)
    x_sigma, sigma = noisy_points(law)
    assert (
        float((denoiser.log_density(x_sigma, sigma) - law.log_density(x_sigma, sigma)).abs().max())
        < 1e-10
    )
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


def test_a_finite_set_has_no_density_without_noise():
    with pytest.raises(ValueError, match="a finite data set has no density at sigma = 0"):
        MixtureDenoiser.of_images(*finite_set()).log_density(torch.zeros(1, 1, 2, 2), 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Networks


def check_scalings(scalings=network.edm_scalings):
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


def test_edm_scalings():
    check_scalings()


CASES = {
    "digits conditional": ("ConditionalDenoiser", "DigitNet", dict(width=16, blocks=1)),
    "digits multi-head": ("MultiHeadDenoiser", "DigitNet", dict(width=16, blocks=1)),
    "patches conditional": ("ConditionalDenoiser", "PatchNet", dict(width=16, blocks=1, patch=2)),
    "patches multi-head": ("MultiHeadDenoiser", "PatchNet", dict(width=16, blocks=1, patch=2)),
    "unet conditional": ("ConditionalDenoiser", "UNet", dict(widths=(16, 16), layers=1)),
    "unet multi-head": ("MultiHeadDenoiser", "UNet", dict(widths=(16, 16), layers=1)),
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
        assert torch.allclose(denoiser(x, sigma, range(5))[:, :4], every, atol=1e-5)
        assert torch.allclose(
            denoiser.unconditional(x, sigma), denoiser(x, sigma, [4])[:, 0], atol=1e-6
        )
        alone = torch.cat([denoiser(x[i : i + 1], float(sigma[i])) for i in range(3)])
        assert torch.allclose(alone, every, atol=1e-5), "an image's answer depends on its batch"


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
            "got 'ConditionalDenoiser' around 'Transformer'; was the file made by",
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


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    network.save_denoiser(build("digits conditional"), path)
    before = path.read_bytes()

    def interrupted(state, target, header):
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(network, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        network.save_denoiser(build("digits multi-head"), path)
    assert path.read_bytes() == before


def test_kinds_are_what_they_say():
    assert isinstance(build("digits conditional"), ConditionalDenoiser)
    assert isinstance(build("unet multi-head"), MultiHeadDenoiser)
