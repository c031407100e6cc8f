"""Lipschitz constants against a classifier that reaches them and networks that never exceed them; the certificate."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from diffclass import data, likelihood, noise, units
from diffclass.certify import lipschitz, soft
from diffclass.certify.lipschitz import margin_constant, margin_radius
from diffclass.denoisers.base import Denoiser
from diffclass.denoisers.clipped import Clipped
from diffclass.denoisers.exact import MixtureDenoiser
from diffclass.noise import NoiseBank
from scipy import stats
from torch import nn
from twins import rejected, scaled

PLANE = (2, 1, 1)


def level(sigma: float) -> noise.Levels:
    """One level, of weight 1 under `ones`."""
    return noise.Levels(*(torch.tensor([sigma * f], dtype=torch.float64) for f in (1, 0.9, 1.1)))


def ones(levels: noise.Levels) -> torch.Tensor:
    """Weight 1 at every level."""
    return torch.ones(len(levels), dtype=torch.float64)


class Saturated(Denoiser):
    """Two classes that swap white and black at the hyperplane through the black picture: as steep as losses can be.

    Formula     D_0 = s, D_1 = -s in every pixel,  s = sign(sum_i (x_i + 1))
    """

    num_classes = 2
    sigma_range = (1e-4, 1e4)

    def __init__(self, image_shape):
        super().__init__()
        self.image_shape = image_shape

    def estimate(self, x_sigma, sigma, classes):
        """See `Denoiser.forward`."""
        side = (x_sigma + 1).flatten(1).sum(1).sign()[:, None]
        sign = side * torch.where(classes == 0, 1.0, -1.0)
        return sign[:, :, None, None, None].expand(-1, -1, *self.image_shape).to(x_sigma)


def saturated_margin(r: float, sigma: float, dimensions: int) -> float:
    """f_1 - f_0 of `Saturated`, for weight 1, where the black picture was moved by r pixels towards white, in closed form.

    Formula     (2 Phi(2r/sigma) - 1) (4 D - 8 r sqrt(D))
    """
    lead = 4 * dimensions - 8 * r * math.sqrt(dimensions)
    return (2 * stats.norm.cdf(2 * r / sigma) - 1) * lead


def test_the_closed_form_is_that_of_the_library():
    shape = (1, 4, 4)
    bank = NoiseBank.fixed(level(0.3), shape, 40_000, seed=1, dtype=torch.float64)
    for r in (0.05, 0.3):
        x = torch.full((1, *shape), r / 4, dtype=torch.float64)
        f = likelihood.elbo(Saturated(shape), units.to_model(x), bank, ones)
        assert float(f[0, 1] - f[0, 0]) == pytest.approx(saturated_margin(r, 0.3, 16), abs=1.0)


# ---------------------------------------------------------------------------------------------------------------------
# The constants


@rejected(
    {
        "model units": dict(constant=scaled(margin_constant, 0.5)),
        "squares of [0,1]": dict(constant=scaled(margin_constant, 0.25)),
        "both twice": dict(constant=scaled(margin_constant, 2)),
        "sqrt(2 pi)": dict(constant=lipschitz.logit_constant),
        "the mean over pixels": dict(
            constant=lambda *a: margin_constant(*a, over="mean"),
        ),
    }
)
def test_a_saturated_classifier_reaches_the_constant(constant=margin_constant):
    """Its slope in pixels is 8 D sqrt(2/pi) / sigma: of the constant, all but the second term."""
    for sigma, dimensions, least in ((0.01, 3072, 0.999), (0.1, 3072, 0.99), (0.01, 1, 0.98)):
        step = 1e-5 * sigma
        slope = saturated_margin(step, sigma, dimensions) / step
        ratio = slope / constant(level(sigma), dimensions, ones)
        assert least <= ratio <= 1


@rejected({"squares of [0,1]": dict(constant=scaled(lipschitz.logit_constant, 0.25))})
def test_one_saturated_logit_reaches_its_constant(constant=lipschitz.logit_constant):
    """By symmetry each logit changes half as fast as the difference."""
    sigma = 0.01
    step = 1e-5 * sigma
    slope = saturated_margin(step, sigma, 3072) / step / 2
    assert 0.999 <= slope / constant(level(sigma), 3072, ones) <= 1


def in_unit_pixels(sigma_pixel: float, dimensions: int, single: bool) -> float:
    """The constants as the paper's theorem has them: pictures in [0,1], mean over pixels, weight 1."""
    first = 1 / math.sqrt(2 * math.pi) if single else math.sqrt(2 / math.pi)
    return first / sigma_pixel + 2 / math.sqrt(dimensions)


@rejected(
    {
        "no square of two": dict(factor=2),
        "the sum over pixels": dict(over="sum"),
        "sigma not halved": dict(halved=1),
    }
)
def test_the_constants_are_the_papers_in_other_units(factor=4, over="mean", halved=2):
    """Losses of [-1,1] are four times those of [0,1], at a noise of half the size."""
    for dimensions in (2, 64, 3072):
        for sigma in (0.1, 2.0):
            for single, constant in (
                (False, margin_constant),
                (True, lipschitz.logit_constant),
            ):
                ours = constant(level(sigma), dimensions, ones, over)
                wanted = factor * in_unit_pixels(sigma / halved, dimensions, single)
                assert ours == pytest.approx(wanted, rel=1e-12)


def test_levels_add_up_with_their_weights():
    levels = noise.log_levels(0.1, 3, 5)
    weights = noise.edm_weight(levels)
    each = [margin_constant(level(float(sigma)), 48, ones) for sigma in levels.sigma]
    wanted = math.fsum(float(w) * one for w, one in zip(weights, each, strict=True))
    assert margin_constant(levels, 48, noise.edm_weight) == pytest.approx(wanted, rel=1e-9)


class Steep(Denoiser):
    """A random network with large weights: two classes, two pixels, far outside of [-1,1] before it is clipped."""

    num_classes = 2
    image_shape = PLANE
    sigma_range = (1e-4, 1e4)

    def __init__(self, seed: int):
        super().__init__()
        draw = np.random.default_rng(seed)
        self.first = torch.from_numpy(4 * draw.standard_normal((16, 2)))
        self.shift = torch.from_numpy(2 * draw.standard_normal(16))
        self.second = torch.from_numpy(2 * draw.standard_normal((4, 16)))

    def estimate(self, x_sigma, sigma, classes):
        """See `Denoiser.forward`."""
        hidden = torch.tanh(x_sigma.flatten(1).double() @ self.first.T + self.shift)
        out = (hidden @ self.second.T).reshape(-1, 2, *PLANE)
        return out[:, classes].to(x_sigma)


def test_random_clipped_networks_never_exceed_the_constants():
    """The gradient of both logits, by quadrature over the noise and autograd through the network."""
    nodes, shares = np.polynomial.hermite_e.hermegauss(48)
    eps = torch.from_numpy(np.stack(np.meshgrid(nodes, nodes), -1).reshape(-1, *PLANE))
    share = torch.from_numpy(np.outer(shares, shares).ravel() / (2 * math.pi))
    ratios = []
    for seed in range(30):
        denoiser = Clipped(Steep(seed))
        sigma = (0.3, 1.0)[seed % 2]
        draw = torch.Generator().manual_seed(seed)
        x = torch.rand((1, *PLANE), generator=draw, dtype=torch.float64).requires_grad_()
        z = units.to_model(x)
        square = ((denoiser(z + sigma * eps, sigma) - z[:, None]) ** 2).flatten(2).sum(2)
        f = -(share[:, None] * square).sum(0)
        (slope,) = torch.autograd.grad(f[0] - f[1], x, retain_graph=True)
        (single,) = torch.autograd.grad(f[0], x)
        ratios.append(float(slope.norm()) / margin_constant(level(sigma), 2, ones))
        assert float(single.norm()) <= lipschitz.logit_constant(level(sigma), 2, ones)
    assert 0.02 < max(ratios) <= 1


def test_without_clipping_there_is_no_such_constant():
    """The same saturated map, ten times as large: a hundred times the slope and above any constant of pictures."""

    class Unclipped(Saturated):
        def estimate(self, x_sigma, sigma, classes):
            """See `Denoiser.forward`."""
            return 10 * super().estimate(x_sigma, sigma, classes)

    shape = (1, 4, 4)
    bank = NoiseBank.fixed(level(0.3), shape, 4000, seed=2, dtype=torch.float64)
    z = -torch.ones((1, *shape), dtype=torch.float64)
    slopes = {}
    for name, denoiser in (("large", Unclipped(shape)), ("clipped", Clipped(Unclipped(shape)))):
        slope = likelihood.jacobian_free_gradient(denoiser, z, bank, ones(level(0.3)))[0]
        slopes[name] = 2 * float((slope[1] - slope[0]).norm())
    most = margin_constant(level(0.3), 16, ones)
    assert slopes["clipped"] <= 1.02 * most < 3 * most < slopes["large"]


def radius_of(margin: float, sigma: float, dimensions: int) -> float:
    """The radius of the library."""
    return margin_radius(margin, margin_constant(level(sigma), dimensions, ones))


def released_radius(margin: float, sigma: float, dimensions: int) -> float:
    """That of the released code, of the mean loss."""
    return margin / dimensions / (2 * lipschitz.released_constant(level(sigma), ones))


@rejected({"the released code": dict(radius=released_radius)})
def test_a_classifier_keeps_its_mind_inside_the_radius(radius=radius_of):
    """`Saturated` is of two minds at the black picture: the distance to it is the true radius."""
    for sigma, distance in ((0.5, 0.01), (0.5, 0.1), (2.0, 0.3)):
        claimed = radius(saturated_margin(distance, sigma, 3072), sigma, 3072)
        assert 0.9 * distance < claimed <= distance
        # what lies just beyond is of another mind
        assert saturated_margin(-0.01, sigma, 3072) < 0 < saturated_margin(0.01, sigma, 3072)


def test_the_released_constant_is_the_released_one_and_too_small():
    levels = noise.linear_levels(0.5, 3, 125)
    weights = noise.edm_weight(levels)
    wanted = 1.7978845608 * float((weights / levels.sigma).sum())
    assert lipschitz.released_constant(levels, noise.edm_weight) == pytest.approx(wanted, rel=1e-9)
    ours = margin_constant(levels, 3072, noise.edm_weight, "mean")
    assert 2 * wanted < 0.6 * ours


# ---------------------------------------------------------------------------------------------------------------------
# Probabilities and radii


@rejected({"an eighth": dict(constant=scaled(lipschitz.probability_constant, 0.5))})
def test_a_probability_changes_at_most_a_quarter_as_fast(constant=lipschitz.probability_constant):
    """Reached where two classes tie; random posteriors of five classes stay below."""
    most = margin_constant(level(0.01), 3072, ones)
    step = 1e-12
    change = 1 / (1 + math.exp(-saturated_margin(step, 0.01, 3072))) - 0.5
    assert 0.99 <= change / step / constant(most) <= 1
    rng = np.random.default_rng(3)
    for _ in range(200):
        slopes = rng.standard_normal((5, 3))
        p = rng.dirichlet(np.ones(5))
        fastest = max(np.linalg.norm(slopes[0] - one) for one in slopes)
        of_p = np.linalg.norm(p[0] * (slopes[0] - p @ slopes))
        assert of_p <= constant(fastest)


@rejected({"without the two": dict(radius=lambda p, q, L: margin_radius(p - q, L))})
def test_the_weak_law_ends_at_half_of_the_inverse_constant(radius=lipschitz.weak_radius):
    assert radius(1.0, 0.0, 4.0) == 1 / 8
    assert radius(0.7, 0.2, 2.0) == pytest.approx(0.125)
    assert radius(0.2, 0.7, 2.0) == 0
    # two probabilities that move at the rate L meet there
    assert 0.7 - 2.0 * radius(0.7, 0.2, 2.0) == pytest.approx(0.2 + 2.0 * radius(0.7, 0.2, 2.0))


def test_smoothing_certifies_more_than_its_weak_law():
    """Votes under noise sigma change at 1/(sigma sqrt(2 pi)): at most 1.253 sigma, where Phi^-1 has no end."""
    sigma = 0.25
    rate = 1 / (sigma * math.sqrt(2 * math.pi))
    assert lipschitz.weak_radius(1, 0, rate) == pytest.approx(1.2533 * sigma, abs=1e-4)
    for p in (0.6, 0.9, 0.9999):
        assert lipschitz.weak_radius(p, 1 - p, rate) < sigma * stats.norm.ppf(p)


# ---------------------------------------------------------------------------------------------------------------------
# The certificate

LEVELS = noise.log_levels(0.5, 3, 3)
LAW = data.gaussians()


def errors_of(seed: int, samples: int) -> torch.Tensor:
    """Errors of one picture of the plane, whose classes are told apart. Shapes: -> [K,T,samples]."""
    denoiser = Clipped(MixtureDenoiser.of_law(LAW))
    z = LAW.means[:1, :, None, None].double()
    bank = NoiseBank.fixed(LEVELS, PLANE, samples, seed, torch.float64)
    return likelihood.diffusion_errors(denoiser, z, bank)[0]


def margin_of(errors, weighting=noise.elbo_weight) -> float:
    """The lead of the first class, as the mean has it."""
    f = likelihood.evidence(errors.mean(2), LEVELS, weighting)
    return float(f[0] - f[1:].max())


@rejected({"the mean itself": dict(bounds={"mean": lambda shares, alpha: shares.mean(-1)})})
def test_margins_are_overestimated_less_often_than_alpha_says(bounds=soft.SOFT_BOUNDS):
    """1000 certificates of 100 draws each, against the mean over all of them."""
    alpha = 0.05
    errors = errors_of(4, 100_000)
    truth = margin_of(errors)
    assert truth > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lipschitz, "SOFT_BOUNDS", bounds)
        for name in bounds:
            margins = np.array(
                [
                    lipschitz.lipschitz_certificate(part, LEVELS, 2, alpha=alpha, bound=name).margin
                    for part in errors.split(100, dim=2)
                ]
            )
            assert (margins > truth).mean() <= alpha


def test_certificates_approach_the_margin_of_all_noise_from_below():
    errors = errors_of(5, 60_000)
    truth = margin_of(errors)
    constant = margin_constant(LEVELS, 2)
    for bound in soft.SOFT_BOUNDS:
        found = [
            lipschitz.lipschitz_certificate(errors[:, :, :n], LEVELS, 2, bound=bound)
            for n in (500, 5000, 60_000)
        ]
        margins = [one.margin for one in found]
        assert margins[0] < margins[1] < margins[2] < truth
        assert found[2].prediction == 0
        assert found[2].radius == pytest.approx(margins[2] / constant)
        assert 0 < found[2].radius < truth / constant


def test_a_certificate_carries_what_it_came_from():
    errors = errors_of(6, 20_000)
    one = lipschitz.lipschitz_certificate(errors, LEVELS, 2, alpha=0.01)
    assert (one.n, one.alpha, one.dimensions, one.bound) == (20_000, 0.01, 2, "betting")
    assert one.sigma_range == (float(LEVELS.sigma[0]), float(LEVELS.sigma[-1]))
    assert one.constant == margin_constant(LEVELS, 2)
    doubtful = lipschitz.lipschitz_certificate(errors[:, :, :10], LEVELS, 2)
    assert doubtful.prediction is None and doubtful.radius == 0 and doubtful.margin <= 0
    with pytest.raises(ValueError, match="at most margin / constant"):
        dataclasses.replace(one, radius=2 * one.radius)
    with pytest.raises(ValueError, match="radius 0 for an abstention"):
        dataclasses.replace(one, prediction=None)
    turned = lipschitz.lipschitz_certificate(errors.flip(0), LEVELS, 2, alpha=0.01)
    assert turned.prediction == len(errors) - 1
    assert turned.margin == pytest.approx(one.margin)


@rejected({"one pair's alpha": dict(pairs=1)})
def test_every_ordered_pair_of_classes_has_its_share_of_alpha(pairs=6):
    """Three classes, the leader of which is read from the same draws."""
    errors = errors_of(7, 3000)[:3]
    losses = (LEVELS.sigma**-3 * LEVELS.step)[None, :, None] * errors
    totals = losses.sum(1)
    reach = 8 * float(noise.elbo_weight(LEVELS).sum())
    wanted = min(
        2 * reach * soft.hoeffding_bound(((rival - totals[0]) / reach + 1) / 2, 0.01 / pairs)
        - reach
        for rival in totals[1:]
    )
    one = lipschitz.lipschitz_certificate(errors, LEVELS, 2, alpha=0.01, bound="hoeffding")
    assert one.margin == pytest.approx(wanted, abs=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# The clipped denoiser


@rejected({"not clipped": dict(clipped=lambda denoiser: denoiser)})
def test_a_clipped_denoiser_answers_with_pictures(clipped=Clipped):
    steep = Steep(1)
    view = clipped(steep)
    x = torch.from_numpy(3 * np.random.default_rng(8).standard_normal((200, *PLANE)))
    before = steep(x, 0.5)
    after = view(x, 0.5)
    assert float(before.abs().max()) > 1.5
    assert float(after.min()) == -1 and float(after.max()) == 1
    inside = before.abs() <= 1
    assert torch.equal(after[inside], before[inside])
    assert torch.equal(view(x, 0.5, [1]), after[:, 1:])


def test_a_clipped_denoiser_is_like_the_one_behind_it():
    exact = MixtureDenoiser.of_law(LAW)
    view = Clipped(exact)
    x = torch.rand((3, *PLANE), generator=torch.Generator().manual_seed(9))
    assert torch.equal(view.unconditional(x, 0.5), exact.unconditional(x, 0.5).clamp(-1, 1))
    for name in ("num_classes", "image_shape", "sigma_range", "has_null", "one_call"):
        assert getattr(view, name) == getattr(exact, name)
    assert not view.has_density and exact.has_density
    assert isinstance(view, nn.Module) and list(view.buffers())


ERRORS = torch.ones(2, 3, 4, dtype=torch.float64)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: lipschitz.lipschitz_certificate(9 * ERRORS, LEVELS, 2),
            "between 0 and 4 D = 8, got 9 to 9; wrap the denoiser",
        ),
        (lambda: lipschitz.lipschitz_certificate(-ERRORS, LEVELS, 2), "between 0 and 4 D"),
        (lambda: lipschitz.lipschitz_certificate(ERRORS[:, :2], LEVELS, 2), r"\[K,T,S\]"),
        (lambda: lipschitz.lipschitz_certificate(ERRORS[:1], LEVELS, 2), "at least two classes"),
        (lambda: lipschitz.lipschitz_certificate(ERRORS[:, :, :1], LEVELS, 2), "two draws"),
        (lambda: lipschitz.lipschitz_certificate(ERRORS, LEVELS, 2, alpha=0), "alpha between"),
        (lambda: lipschitz.lipschitz_certificate(math.nan * ERRORS, LEVELS, 2), "finite numbers"),
        (lambda: lipschitz.lipschitz_certificate(ERRORS, LEVELS, 2, bound="none"), "one of"),
        (lambda: margin_constant(LEVELS, 0), "at least 1"),
        (lambda: margin_constant(LEVELS, 2, over="max"), "one of 'sum', 'mean'"),
        (lambda: margin_constant(LEVELS, 2, lambda levels: -levels.sigma), "weights >= 0"),
        (lambda: margin_radius(math.nan, 1.0), "a finite number"),
        (lambda: margin_radius(1.0, 0.0), "constant > 0"),
        (lambda: lipschitz.weak_radius(0.9, 0.3, 1.0), "two probabilities of one law"),
        (lambda: lipschitz.weak_radius(-0.1, 0.3, 1.0), "at least 0"),
        (lambda: lipschitz.probability_constant(-1.0), "constant > 0"),
    ],
)
def test_impossible_inputs_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_levels_are_levels():
    with pytest.raises(TypeError, match="noise.Levels"):
        margin_constant([0.1, 0.2], 2)
