"""Gradients that never differentiate the denoiser, and the penalty of the Lagrange attack, against autograd."""

import pytest
import torch
from diffclass import attacks, data, likelihood, noise
from diffclass.classifiers import stand_in
from diffclass.classifiers.bayes import BayesClassifier
from diffclass.denoisers.exact import MixtureDenoiser
from diffclass.noise import NoiseBank

LAW = data.mixtures()
DENOISER = MixtureDenoiser.of_law(LAW)


def points(count=4, seed=0):
    """Points of the plane, in pixels, with their labels."""
    return LAW.sample(count, torch.Generator().manual_seed(seed), torch.float64)


def centred(gradients):
    """Gradients without what all classes share, which no margin feels."""
    return gradients - gradients.mean(1, keepdim=True)


def draws(samples, seed=0, shape=(1, 2, 1, 1)):
    """Noise [S,1,C,H,W]."""
    return torch.randn(
        (samples, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def slopes_of(function, z):
    """Gradients of K outputs by autograd. Shapes: [B,C,H,W] -> [B,K,C,H,W]."""
    leaf = z.clone().requires_grad_()
    out = function(leaf)
    return torch.stack(
        [
            torch.autograd.grad(out[:, k].sum(), leaf, retain_graph=True)[0]
            for k in range(out.shape[1])
        ],
        1,
    )


def sobol(samples, levels=1):
    """Evenly spread noise for integrals in two dimensions."""
    bank = NoiseBank.sobol(
        noise.log_levels(0.1, 1, levels), (2, 1, 1), samples, dtype=torch.float64
    )
    return bank.noise[0]


def check_telescoped(gradient_of=likelihood.telescoped_gradient):
    """The mean score at the two ends is the gradient of E log p_low - E log p_high, class by class."""
    z = 2 * points()[0] - 1
    low = 0.2
    high = 1.5
    eps = sobol(32)

    def difference(z):
        return (
            sum(
                (DENOISER.log_density(z + low * e, low) - DENOISER.log_density(z + high * e, high))
                for e in eps
            )
            / 32
        )

    found = gradient_of(DENOISER, z, low, high, eps)
    wanted = slopes_of(difference, z)
    assert float(wanted.abs().max()) > 1 and torch.allclose(found, wanted, rtol=1e-6, atol=1e-6)


def test_the_telescoped_gradient_is_that_of_the_likelihood_band():
    check_telescoped()


def test_it_telescopes():
    """Autograd through the losses of 200 levels between the ends gives the same gradient, up to quadrature."""
    z = 2 * points(2)[0] - 1
    low = 0.2
    high = 1.5
    bank = NoiseBank.sobol(noise.log_levels(low, high, 200), (2, 1, 1), 256, dtype=torch.float64)
    through = slopes_of(lambda z: likelihood.elbo(DENOISER, z, bank, chunk=10**6), z)
    ends = likelihood.telescoped_gradient(DENOISER, z, low, high, bank.noise[0])
    assert float((through - ends).norm() / through.norm()) < 0.02
    assert float((centred(through) - centred(ends)).norm() / centred(through).norm()) < 0.02


class Clipped(MixtureDenoiser):
    """A denoiser that is nobody's posterior mean: the exact one, bent."""

    def estimate(self, x_sigma, sigma, classes):
        """sin(2 D)."""
        return (2 * super().estimate(x_sigma, sigma, classes)).sin()


def check_jacobian_free(gradient_of=likelihood.jacobian_free_gradient):
    """For any denoiser: the gradient of the expected loss, up to one shared by the classes. In sample, within noise."""
    denoiser = Clipped.of_law(LAW)
    z = 2 * points(2)[0] - 1
    bank = NoiseBank.sobol(noise.log_levels(0.3, 1.5, 3), (2, 1, 1), 2048, dtype=torch.float64)
    weights = noise.elbo_weight(bank.levels)
    wanted = centred(slopes_of(lambda z: likelihood.elbo(denoiser, z, bank, chunk=10**7), z))
    found = centred(gradient_of(denoiser, z, bank, weights))
    assert float((found - wanted).norm() / wanted.norm()) < 0.03, float(
        (found - wanted).norm() / wanted.norm()
    )


def test_the_jacobian_free_gradient_needs_no_exact_denoiser():
    check_jacobian_free()


def classifier(levels=40, samples=64, **options):
    """The diffusion classifier of the plane on evenly spread noise."""
    bank = NoiseBank.sobol(
        noise.log_levels(0.05, 5, levels), (2, 1, 1), samples, dtype=torch.float64
    )
    return BayesClassifier(DENOISER, bank, chunk=10**6, **options)


def test_a_stand_in_has_the_values_of_one_and_the_gradient_of_the_other():
    model = classifier()
    x = points()[0]
    slope = torch.randn(
        len(x), 3, 2, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    seen = []

    def slope_of(z):
        seen.append(z)
        return slope

    whole = stand_in.StandIn(model, slope_of)
    with torch.no_grad():
        assert torch.equal(whole(x), model(x)) and not seen, "no gradient, no cost"
    leaf = x.clone().requires_grad_()
    assert torch.equal(stand_in(leaf), model(x)) and torch.equal(seen[0], 2 * x - 1)
    assert torch.allclose(slopes_of(stand_in, x), 2 * slope), (
        "per pixel unit, twice that per model unit"
    )
    assert (stand_in.num_classes, stand_in.image_shape, stand_in.deterministic) == (
        3,
        (2, 1, 1),
        True,
    )


def test_the_telescoped_attack_is_as_strong_as_autograd_where_the_denoiser_is_exact():
    """Two levels without a backward pass fool as many points as autograd through all levels."""
    model = classifier(levels=16, samples=16)
    x, y = points(60)
    y = model(x).argmax(1)
    fooled = {}
    for name, view in (("autograd", model), ("telescoped", stand_in.telescoped(model, 64))):
        *_, last = attacks.pgd(view, x, y, 0.1, norm="l2", steps=5)
        fooled[name] = int((model(last.x).argmax(1) != y).sum())
    assert fooled["autograd"] > 10 and abs(fooled["autograd"] - fooled["telescoped"]) <= 3, fooled


def check_unlikeliness(penalty_of=attacks.unlikeliness):
    """The penalty is the loss that likelihood maximisation lowers; with it an attack ends at likelier points."""
    bank = NoiseBank.fixed(noise.log_levels(0.4, 0.6, 3), (2, 1, 1), 4, dtype=torch.float64)
    x = points()[0]
    z = 2 * x - 1
    penalty = penalty_of(DENOISER, bank, 3.0)
    wanted = (
        sum(
            ((DENOISER.unconditional(z + sigma * eps, sigma) - z) ** 2).flatten(1).mean(1)
            for sigma, draws in zip(bank.sigma, bank.noise, strict=True)
            for eps in draws
        )
        / 12
    )
    assert torch.allclose(penalty(x), 3 * wanted)
    ends = {}
    for strength in (0.0, 300.0):
        x, y = points(20)
        *_, last = attacks.pgd(
            classifier(8, 8),
            x,
            y,
            0.1,
            norm="l2",
            steps=5,
            penalty=penalty_of(DENOISER, bank, strength),
        )
        ends[strength] = float(penalty(last.x).mean())
    assert ends[300.0] < 0.9 * ends[0.0], ends


def test_the_lagrange_penalty():
    check_unlikeliness()


# ---------------------------------------------------------------------------------------------------------------------
# Bent images


def check_warp(warp=attacks.warp):
    """No flow leaves the image; a whole pixel is a shift, right or down; on a ramp the flow is read off exactly."""
    x = torch.rand(2, 3, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flow = torch.zeros(2, 2, 5, 6, dtype=torch.float64)
    assert torch.allclose(warp(x, flow), x)
    right = flow.clone()
    down = flow.clone()
    right[:, 0] = 1
    down[:, 1] = 1
    assert torch.allclose(warp(x, right)[..., :-1], x[..., 1:]) and torch.allclose(
        warp(x, right)[..., -1], x[..., -1]
    )
    assert torch.allclose(warp(x, down)[:, :, :-1], x[:, :, 1:])
    ramp = (0.1 * torch.arange(6, dtype=torch.float64)).expand(2, 1, 5, 6)
    flow = (
        0.8
        * torch.rand(2, 2, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        - 0.4
    )
    assert torch.allclose((warp(ramp, flow) - ramp)[:, 0, :, 1:-1], 0.1 * flow[:, 0, :, 1:-1])


def test_warp():
    check_warp()


class Weighed(torch.nn.Module):
    """Two classes; the second's logit is a weighted sum of the pixels that are not at the edge."""

    num_classes = 2
    image_shape = (1, 5, 6)

    def __init__(self):
        super().__init__()
        self.weights = torch.zeros(5, 6, dtype=torch.float64)
        self.weights[1:-1, 1:-1] = torch.randn(
            3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )

    def forward(self, x):
        """Logits 0 and sum w x."""
        score = (x[:, 0] * self.weights).sum((1, 2))
        return torch.stack([torch.zeros_like(score), score], 1)


def test_bending_a_ramp_gains_slope_times_bound_times_the_weights():
    """On a ramp of slope 0.1 a flow within the bound moves a linear score by 0.1 bound ||w||_1, and no more."""
    model = Weighed()
    y = torch.zeros(2, dtype=torch.long)
    ramp = (0.2 + 0.1 * torch.arange(6, dtype=torch.float64)).expand(2, 1, 5, 6).clone()
    bent = attacks.Bent(model, ramp, 0.4)
    for attack in (attacks.pgd, attacks.apgd):
        *_, last = attack(bent, bent.straight, y, 0.5, steps=10)
        gain = last.logits[:, 1] - model(ramp)[:, 1]
        assert torch.allclose(gain, 0.1 * 0.4 * model.weights.abs().sum().expand(2))
        assert torch.equal(model(bent.image(last.x)), last.logits)
    *_, last = attacks.pgd(attacks.Bent(model, ramp, 0.0), bent.straight, y, 0.5, steps=3)
    assert torch.allclose(last.logits, model(ramp)), "without a bound nothing bends"


@pytest.mark.parametrize(
    "make, sentence",
    [
        (
            lambda: likelihood.telescoped_gradient(DENOISER, points()[0], 1.0, 0.5, draws(2)),
            "0 < low < high, got 1.0 and",
        ),
        (
            lambda: stand_in.telescoped(classifier(weighting=noise.edm_weight), 4),
            "got edm_weight; use jacobian_free",
        ),
        (
            lambda: attacks.unlikeliness(DENOISER, classifier().bank, -1.0),
            "expected a strength >= 0, got -1.0",
        ),
        (
            lambda: attacks.Bent(Weighed(), torch.zeros(1, 1, 5, 6), -0.1),
            "expected a bound >= 0 in pixel widths, got",
        ),
        (lambda: attacks.Bent(Weighed(), torch.full((1, 1, 5, 6), 9.0), 0.1), "divide by 255"),
        (
            lambda: attacks.Bent(Weighed(), torch.zeros(1, 1, 5, 6), 0.1)(torch.zeros(2, 2, 5, 6)),
            "each of 1 images, got",
        ),
    ],
)
def test_what_cannot_be_meant_gets_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
