"""Purifiers against closed forms: what they do to a Gaussian, their exact gradient, and what BPDA leaves out of it.

A formula stands beside its twins, the slips that one makes, which its check must reject.
"""

import math
import warnings
from functools import partial

import pytest
import torch
import twins
from diffclass import attacks, data, noise
from diffclass.classifiers import purified
from diffclass.classifiers.base import Classifier, Fresh, Held, draw
from diffclass.classifiers.bayes import BayesClassifier, ExactClassifier
from diffclass.classifiers.purified import (
    LikelihoodMaximisation,
    Purification,
    PurifiedClassifier,
    adam_direction,
    plain_direction,
)
from diffclass.classifiers.votes import MajorityVote
from diffclass.denoisers.base import Denoiser
from diffclass.denoisers.exact import MixtureDenoiser
from diffclass.training.loop import global_draws_from

SHAPE = (1, 2, 2)
SPREAD = 0.3
MEAN = 0.1
KINDS = ["plain", "released", "paper", "SDE", "ODE"]


class Gaussian(Denoiser):
    """The exact denoiser of N(mean, diag(variances)) without classes, twice differentiable."""

    has_null = True
    num_classes = 1
    sigma_range = (1e-3, 1e3)

    def __init__(self, variances, mean=0.0):
        super().__init__()
        self.image_shape = tuple(variances.shape)
        self.variances = variances
        self.mean = mean

    def estimate(self, x_sigma, sigma, classes):
        """mean + s^2 / (s^2 + sigma^2) (x - mean)."""
        keep = self.variances / (self.variances + sigma[:, None, None, None] ** 2)
        return (self.mean + keep * (x_sigma - self.mean))[:, None].expand(
            -1, len(classes), -1, -1, -1
        )


class Waves(Denoiser):
    """Some smooth function of image and level, unlike any linear one: gradients have nothing to cancel by luck."""

    has_null = True
    num_classes = 2
    image_shape = SHAPE
    sigma_range = (1e-3, 1e3)

    def estimate(self, x_sigma, sigma, classes):
        """Neighbours bend each other."""
        bent = x_sigma + 0.3 * (3 * x_sigma.roll(1, -1) + sigma[:, None, None, None]).sin()
        return (
            bent[:, None].expand(-1, len(classes), -1, -1, -1)
            * torch.ones(len(classes))[:, None, None, None]
        )


def gaussian(shape=SHAPE, spread=SPREAD):
    """N(MEAN, SPREAD^2 I) as a mixture with one component."""
    return MixtureDenoiser(
        torch.full((1, *shape), MEAN), torch.tensor([spread]), torch.ones(1), torch.zeros(1)
    )


def seeded(seed=0):
    """A seeded generator."""
    return torch.Generator().manual_seed(seed)


def pixels(count=5, shape=SHAPE, seed=0):
    """Images away from the faces of the pixel cube."""
    return 0.4 + 0.2 * torch.rand(count, *shape, generator=seeded(seed), dtype=torch.float64)


def purifier(kind, denoiser=None, **options):
    """A purifier by name, on `Waves` unless a denoiser is given."""
    denoiser = denoiser or Waves()
    return {
        "plain": lambda: LikelihoodMaximisation(
            denoiser, rule=plain_direction, rate=0.5, **options
        ),
        "released": lambda: LikelihoodMaximisation.released(denoiser, **options),
        "paper": lambda: LikelihoodMaximisation.paper(denoiser, **options),
        "SDE": lambda: Purification(denoiser, steps=4, **options),
        "ODE": lambda: Purification(denoiser, steps=4, stochastic=False, **options),
    }[kind]()


def once(model, seed=0):
    """The noise of one picture, for all of them."""
    return model.sample_noise(1, seeded(seed))


class Dropping(Waves):
    """The same with dropout, which draws from the global random state while a network is trained."""

    def __init__(self):
        super().__init__()
        self.dropout = torch.nn.Dropout(0.5)

    def estimate(self, x_sigma, sigma, classes):
        """Some neighbours bend nothing."""
        return self.dropout(super().estimate(x_sigma, sigma, classes))


def through(model, drawn):
    """The gradient of a sum of purified pixels in the pixels, what is drawn inside from a generator of its own."""
    x = pixels(2).requires_grad_()
    with global_draws_from(seeded(5)):
        total = (model(x, drawn) * torch.arange(8.0).reshape(2, *SHAPE)).sum()
    return torch.autograd.grad(total, x)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("denoiser", [Waves, Dropping])
def test_what_is_recomputed_is_differentiated_under_the_same_noise(kind, denoiser, monkeypatch):
    model = purifier(kind, denoiser().train())
    drawn = model.sample_noise(2, seeded())
    recomputed = through(model, drawn)
    monkeypatch.setattr(purified, "_recomputed", lambda function, *arguments: function(*arguments))
    kept = through(model, drawn)
    torch.testing.assert_close(recomputed, kept, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(kept, through(model, model.sample_noise(2, seeded(1))), rtol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Likelihood maximisation


def purify_of(model, z, noise):
    """What the library does."""
    return model.purify(z, noise)


def slope_through(input_too, target_too):
    """The gradient of likelihood maximisation with one occurrence of u held fixed."""

    def slope(self, u, sigma, eps):
        u = u.detach().requires_grad_()
        inside = u if input_too else u.detach()
        outside = u if target_too else u.detach()
        sigma = sigma.expand(len(u))
        denoised = self.denoiser.unconditional(inside + sigma[:, None, None, None] * eps, sigma)
        loss = ((denoised - outside) ** 2).flatten(1).mean(1).sum()
        return torch.autograd.grad(loss, u)[0]

    return slope


def with_slope(slope):
    """Likelihood maximisation that follows another gradient."""
    return twins.patched(purify_of, LikelihoodMaximisation, slope=slope)


OWN_SLOPE = LikelihoodMaximisation.slope


@twins.rejected(
    {
        "target held fixed": dict(purify=with_slope(slope_through(True, False))),
        "input held fixed": dict(purify=with_slope(slope_through(False, True))),
        "sum over pixels": dict(purify=with_slope(twins.scaled(OWN_SLOPE, 4))),
        "sign": dict(purify=with_slope(twins.scaled(OWN_SLOPE, -1))),
    }
)
def test_likelihood_maximisation_contracts_a_gaussian(purify=purify_of):
    """On N(mu, s^2 I) without noise, n steps contract to mu by (1 - 2 (rate/D) sigma^4 / (s^2 + sigma^2)^2)^n."""
    z = 2 * pixels() - 1
    sigma = 0.5
    rate = 0.7
    steps = 4
    model = LikelihoodMaximisation(
        gaussian(), steps=steps, rate=rate * 4, rule=plain_direction, band=(sigma, sigma)
    )
    levels = torch.full((1, steps), sigma)
    silence = torch.zeros(1, steps, *SHAPE, dtype=torch.float64)
    factor = 1 - 2 * rate * sigma**4 / (SPREAD**2 + sigma**2) ** 2
    wanted = MEAN + factor**steps * (z - MEAN)
    assert torch.allclose(purify(model, z, (levels, silence)), wanted, rtol=1e-6) and factor < 0.5


def test_a_slope_without_a_slip_passes_as_a_twin():
    """What makes the twins fail is the slip, not how they are made."""
    check = test_likelihood_maximisation_contracts_a_gaussian.check
    check(with_slope(slope_through(True, True)))
    check(with_slope(twins.scaled(OWN_SLOPE, 1)))


def test_a_walk_shows_every_step_and_ends_where_the_purifier_does():
    for kind in ("plain", "released", "paper"):
        model = purifier(kind)
        z = 2 * pixels(2) - 1
        drawn = once(model)
        film = list(model.walk(z, drawn))
        assert len(film) == model.steps and torch.equal(film[-1], model.purify(z, drawn))
        shorter = list(model.walk(z, tuple(part[:, :2] for part in drawn)))
        assert torch.equal(shorter[1], film[1]) and not torch.equal(film[0], film[1])
        if model.budget is not None:
            assert all(float((u - z).abs().max()) <= 2 * model.budget + 1e-12 for u in film)


def test_averaged_over_the_noise_the_step_is_the_same():
    """E over eps of one step's gradient is 2/D (sigma^2 / (s^2 + sigma^2))^2 (z - mu): noise adds no bias."""
    model = LikelihoodMaximisation(gaussian())
    sigma = 0.5
    draws = 40_000
    z = (2 * pixels(1) - 1).expand(draws, -1, -1, -1)
    eps = torch.randn(z.shape, generator=seeded(), dtype=z.dtype)
    slopes = model.slope(z, torch.tensor([sigma], dtype=z.dtype), eps)
    wanted = 2 / 4 * (sigma**2 / (SPREAD**2 + sigma**2)) ** 2 * (z[0] - MEAN)
    error = slopes.std(0) / draws**0.5
    assert (
        bool(((slopes.mean(0) - wanted).abs() < 4 * error).all())
        and float(error.max()) < 0.1 * wanted.abs().max()
    )


def adam_uncorrected(gradients):
    """Adam without the correction of its first steps."""
    count = len(gradients)
    return adam_direction(gradients) * (1 - 0.9**count) / (1 - 0.999**count) ** 0.5


@twins.rejected(
    {
        "not corrected": dict(direction=adam_uncorrected),
        "sign of the gradient": dict(direction=lambda gradients: gradients[-1].sign()),
        "another beta": dict(direction=partial(adam_direction, beta2=0.99)),
    }
)
def test_adam_is_adam(direction=adam_direction):
    """What torch.optim.Adam does with the same gradients in its first steps, and after many."""
    generator = seeded()
    gradients = [
        torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64) for _ in range(800)
    ]
    theirs = torch.zeros(2, *SHAPE, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([theirs], lr=0.1)
    for count, gradient in enumerate(gradients, start=1):
        before = theirs.detach().clone()
        theirs.grad = gradient.clone()
        optimiser.step()
        if count <= 12 or count in (100, 800):
            step = -0.1 * direction(gradients[:count])
            assert torch.allclose(step, theirs.detach() - before, rtol=1e-9, atol=1e-12), count


def longest(steps: int, beta1: float = 0.9, beta2: float = 0.999) -> float:
    """The most that the directions of so many steps of Adam can sum to, by Cauchy and Schwarz at every step.

    Formula     sum_n sqrt(sum_i a_ni^2 / c_ni), a and c the shares of gradient i in the two means after n steps
    """
    total = 0.0
    for n in range(1, steps + 1):
        ages = torch.arange(n - 1, -1, -1, dtype=torch.float64)
        share = (1 - beta1) * beta1**ages / (1 - beta1**n)
        squared = (1 - beta2) * beta2**ages / (1 - beta2**n)
        total += float((share**2 / squared).sum().sqrt())
    return total


def test_five_directions_of_adam_sum_to_a_little_more_than_five():
    assert longest(5) == pytest.approx(5.022496464913)
    growing = [torch.full((1, *SHAPE), (0.999 / 0.9) ** i, dtype=torch.float64) for i in range(5)]
    reached = sum(adam_direction(growing[:n]) for n in range(1, 6))
    torch.testing.assert_close(reached, torch.full_like(reached, longest(5)), rtol=0, atol=1e-6)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        other = list(torch.randn(5, 1, *SHAPE, generator=generator, dtype=torch.float64).exp())
        moved = sum(adam_direction(other[:n]) for n in range(1, 6))
        assert float(moved.max()) <= longest(5)


def test_the_two_variants_differ_in_how_far_they_may_move():
    denoiser = gaussian(spread=0.01)
    x = 0.9 * torch.ones(1, *SHAPE, dtype=torch.float64)
    paper = LikelihoodMaximisation.paper(denoiser)
    assert abs(float((paper(x, once(paper)) - x).abs().max()) - 8 / 255) < 1e-9, (
        "the budget is reached, and not passed"
    )
    # all steps together go 2.5 budgets of 8/255, each of them twice as long in model units
    assert paper.steps * paper.rate == pytest.approx(2 * 2.5 * 8 / 255)
    released = LikelihoodMaximisation.released(denoiser)
    assert (released.steps, released.rate, released.budget, released.band) == (
        5,
        0.1,
        None,
        (0.4, 0.6),
    )
    drawn = once(released)
    assert 0.2 < float((x - released(x, drawn)).max()) <= released.rate / 2 * longest(5), (
        "a step of 0.1 in model space is 0.05 in pixels, times Adam's directions"
    )
    assert float(released(torch.ones(1, *SHAPE), drawn).max()) <= 1
    assert float(released(torch.zeros(1, *SHAPE), drawn).min()) >= 0


def test_it_raises_the_likelihood():
    law = data.mixtures()
    denoiser = MixtureDenoiser.of_law(law)
    x, _ = law.sample(50, seeded(), torch.float64)
    x = (x + 0.05 * torch.randn(x.shape, generator=seeded(1), dtype=x.dtype)).clamp(0, 1)
    model = LikelihoodMaximisation(
        denoiser, rule=plain_direction, rate=0.2, steps=20, band=(0.15, 0.25)
    )

    def evidence(images):
        return denoiser.log_density(2 * images - 1, 0.15, [3]).mean()

    assert float(evidence(model(x, once(model)))) > float(evidence(x)) + 0.1


def test_levels_are_uniform_in_the_band():
    """Mean and variance of U(0.2, 0.8), within 4.5 standard errors, and never outside."""
    model = LikelihoodMaximisation(gaussian(), band=(0.2, 0.8), steps=3)
    levels, eps = model.sample_noise(4000, seeded())
    assert tuple(levels.shape) == (4000, 3) and tuple(eps.shape) == (4000, 3, *SHAPE)
    assert 0.2 <= float(levels.min()) < 0.201 and 0.799 < float(levels.max()) <= 0.8
    variance = 0.6**2 / 12
    count = levels.numel()
    assert abs(float(levels.mean()) - 0.5) < 4.5 * math.sqrt(variance / count)
    assert abs(float(levels.var()) - variance) < 4.5 * variance * math.sqrt(0.8 / count)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


def plain_gradient(model, leaf, out):
    """By autograd, through the library's forward, under one noise."""
    return torch.autograd.grad((model(leaf, once(model)) * out).sum(), leaf)[0]


def straight_through(model, leaf, out):
    """The gradient of the identity in place of the purifier's."""
    return plain_gradient(model.changed(exact=False), leaf, out)


def without_steps(function, *arguments):
    """A step that is not differentiated."""
    return function(*arguments).detach()


def without_recomputing(function, *arguments):
    """A step whose inner values are kept."""
    return function(*arguments)


@twins.rejected(
    {
        "identity": dict(gradient_of=straight_through),
        "steps detached": dict(
            gradient_of=twins.patched(plain_gradient, purified, _recomputed=without_steps)
        ),
    }
)
def test_the_exact_gradient_is_exact(gradient_of=plain_gradient):
    """The gradient through every step is that of central differences, to 1e-6 relative; eight random directions."""
    generator = seeded()
    x = pixels(2)
    out = torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64)
    for kind in KINDS:
        model = purifier(kind)
        drawn = once(model)
        leaf = x.clone().requires_grad_()
        exact = gradient_of(model, leaf, out)
        for _ in range(8):
            v = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            h = 1e-6
            rise = model(x + h * v, drawn) - model(x - h * v, drawn)
            difference = (rise * out).sum() / (2 * h)
            error = abs(float((exact * v).sum() - difference))
            assert error < 1e-6 * float(exact.norm() * v.norm()), (kind, error)


@pytest.mark.parametrize("kind", KINDS)
def test_backward_through_the_identity_changes_the_gradient_alone(kind):
    exact = purifier(kind)
    x = pixels(3)
    straight = exact.changed(exact=False)
    drawn = once(exact)
    out = torch.randn(x.shape, generator=seeded(), dtype=x.dtype)
    leaf = x.clone().requires_grad_()
    assert torch.equal(exact(leaf, drawn), straight(leaf, drawn))
    assert torch.equal(exact(x, drawn), exact(leaf, drawn))
    assert torch.equal(plain_gradient(straight, leaf, out), out)
    assert not torch.allclose(plain_gradient(exact, leaf, out), out, atol=0.1) and exact.exact


@pytest.mark.parametrize("kind", KINDS)
def test_recomputing_changes_no_gradient(kind):
    leaf = pixels(2).requires_grad_()
    out = torch.ones(2, *SHAPE, dtype=torch.float64)
    recomputed = plain_gradient(purifier(kind), leaf, out)
    kept_of = twins.patched(plain_gradient, purified, _recomputed=without_recomputing)
    kept = kept_of(purifier(kind), leaf, out)
    assert torch.allclose(recomputed, kept, rtol=1e-12)


@pytest.mark.parametrize("rate, cosine", [(0.1, 0.947), (0.4, 0.721)])
def test_five_steps_turn_the_gradient_away_from_the_identity(rate, cosine):
    """On N(0, diag(0.05, 1)) the Jacobian is prod (1 - 2 rate sigma^4/(s^2 + sigma^2)^2): BPDA misses what it turns."""
    variances = torch.tensor([0.05, 1.0], dtype=torch.float64).reshape(2, 1, 1)
    sigma = 0.5
    denoiser = Gaussian(variances)
    model = LikelihoodMaximisation(
        denoiser, rule=plain_direction, rate=2 * rate, band=(sigma, sigma)
    )
    factors = (1 - 2 * rate * (sigma**2 / (variances + sigma**2)) ** 2) ** 5
    leaf = pixels(1, (2, 1, 1)).requires_grad_()
    out = torch.ones(1, 2, 1, 1, dtype=torch.float64)
    exact = plain_gradient(model, leaf, out)
    straight = plain_gradient(model.changed(exact=False), leaf, out)
    assert torch.allclose(exact[0], factors, rtol=1e-6)
    assert (
        abs(float(torch.cosine_similarity(exact.flatten(), straight.flatten(), 0)) - cosine) < 5e-4
    )


def test_a_vanished_gradient_is_not_infinite():
    """Where the loss is flat Adam divides 0 by 0 and a root by itself: the gradient stays finite."""
    flat = Gaussian(
        torch.full(SHAPE, 1e30, dtype=torch.float64)
    )  # keeps every image as it is: D(x) = x
    model = LikelihoodMaximisation(flat, band=(0.5, 0.5))
    leaf = pixels(1).requires_grad_()
    assert torch.allclose(model(leaf, once(model)), leaf)
    assert bool(torch.isfinite(plain_gradient(model, leaf, torch.ones_like(leaf))).all())


class Multiplying(Waves):
    """Multiplies the image by its level, which autograd keeps for the backward pass."""

    def estimate(self, x_sigma, sigma, classes):
        return super().estimate(x_sigma * sigma[:, None, None, None], sigma, classes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_finds_its_gradients_under_inference_mode(kind, dtype):
    """Images and noise made there carry no gradient, and a purifier needs some of its own."""
    x = pixels(3).to(dtype)
    model = purifier(kind, Multiplying())
    wanted = model(x, once(model))
    with torch.inference_mode():
        assert torch.equal(model(1 * x, once(model)), wanted)


# ---------------------------------------------------------------------------------------------------------------------
# Noising and walking back


def with_noise(first, later):
    """A walk whose first noise, on the way up, and whose later ones are so many times as large."""

    def purify(model, z, eps):
        return model.purify(z, torch.cat([first * eps[:, :1], later * eps[:, 1:]], 1))

    return purify


@twins.rejected(
    {
        "no noise on the way": dict(purify=with_noise(1, 0)),
        "twice the noise": dict(purify=with_noise(1, 2)),
        "not noised at first": dict(purify=with_noise(0, 1)),
    }
)
def test_the_walk_back_ends_where_it_must(purify=purify_of):
    """From N(mu, s^2 I) and level sigma the ODE scales x - mu by s / sqrt(s^2 + sigma^2), the SDE samples p(x0 | x)."""
    sigma = 0.5
    count = 4000
    total = SPREAD**2 + sigma**2
    z = (2 * pixels(1) - 1).expand(count, -1, -1, -1)
    generator = seeded()
    for stochastic, shrink, extra in (
        (False, SPREAD / total**0.5, 0.0),
        (True, SPREAD**2 / total, SPREAD * sigma / total**0.5),
    ):
        model = Purification(gaussian(), sigma, steps=60, stochastic=stochastic, low=0.002)
        eps = model.sample_noise(count, generator).double()
        out = purify(model, z, eps)
        rest = out - MEAN - shrink * (z + sigma * eps[:, 0] - MEAN)
        assert abs(float(rest.mean())) < 0.01, stochastic
        assert abs(float(rest.std()) - extra) < 0.02, (stochastic, float(rest.std()), extra)


def test_one_noise_for_all_or_one_for_each():
    x = pixels(2)[:1].repeat(2, 1, 1, 1)
    for kind in KINDS:
        model = purifier(kind)
        fixed = model(x, once(model))
        assert torch.equal(fixed, model(x, once(model))) and torch.equal(fixed[0], fixed[1])
        assert not torch.equal(fixed, model(x, once(model, seed=1)))
        first, second = (model(x, model.sample_noise(2, seeded(seed))) for seed in (0, 1))
        assert not torch.equal(first, second) and not torch.equal(first[0], first[1])
        assert torch.equal(model(x, model.sample_noise(2, seeded(0))), first)


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_purifier_keeps_all_that_it_is_not_told(kind):
    model = purifier(kind)
    assert repr(model.changed()) == repr(model)
    z = 2 * pixels(2) - 1
    assert torch.equal(model.changed().purify(z, once(model)), model.purify(z, once(model)))
    fewer = model.changed(steps=2)
    assert fewer.calls == 2 and model.calls == {"SDE": 4, "ODE": 4}.get(kind, 5)
    assert not model.changed(exact=False).exact and model.exact


def purified_with_noise_moved(z, drawn, stochastic):
    """The slip that takes the noise of the step before, and so that of the way up twice."""
    model = Purification(gaussian(), 0.8, steps=4, stochastic=stochastic, low=0.1)
    if stochastic:
        drawn = torch.cat([drawn[:, :1], drawn[:, :-1]], 1)
    return model.purify(z, drawn)


def purified_by_the_library(z, drawn, stochastic):
    """The formula."""
    return Purification(gaussian(), 0.8, steps=4, stochastic=stochastic, low=0.1).purify(z, drawn)


@twins.rejected({"noise of the step before": dict(purify=purified_with_noise_moved)})
def test_the_way_up_and_back_is_the_formula_step_by_step(purify=purified_by_the_library):
    """Noise 0 goes up, noise i is added after step i, and none after the last one, which ends at level 0."""
    ends = (0.8 ** (1 / 7), 0.1 ** (1 / 7))
    levels = [(ends[0] + i / 3 * (ends[1] - ends[0])) ** 7 for i in range(4)] + [0.0]
    z = torch.randn((3, *SHAPE), generator=seeded(), dtype=torch.float64)
    drawn = torch.randn((3, 4, *SHAPE), generator=seeded(1), dtype=torch.float64)
    for stochastic in (True, False):
        x = z + levels[0] * drawn[:, 0]
        for i in range(1, 5):
            high, low = levels[i - 1], levels[i]
            denoised = MEAN + SPREAD**2 / (SPREAD**2 + high**2) * (x - MEAN)
            if stochastic:
                share = (low / high) ** 2
                x = share * x + (1 - share) * denoised
                if i < 4:
                    x = x + low * math.sqrt(1 - share) * drawn[:, i]
            else:
                x = denoised + low / high * (x - denoised)
        assert torch.allclose(purify(z, drawn, stochastic), x, atol=1e-6)


def test_no_noise_is_drawn_that_is_not_used():
    """The ODE needs that of the way up alone; the SDE another for each step back but the last."""
    for stochastic, count in ((False, 1), (True, 4)):
        model = Purification(gaussian(), steps=4, stochastic=stochastic)
        assert model.sample_noise(3, seeded()).shape == (3, count, *SHAPE)


def test_a_purifier_changed_again_and_again_stays_what_it_was():
    """Its highest level is the one that it was told, not a root of a power of it."""
    for sigma in torch.linspace(0.1, 1.0, 50, dtype=torch.float64).tolist():
        model = Purification(gaussian(), sigma, steps=4)
        again = model.changed().changed().changed()
        assert again.sigma == sigma and torch.equal(again.levels, model.levels)


# ---------------------------------------------------------------------------------------------------------------------
# In front of a classifier


def plane(kind="SDE", **options):
    """A purifier in front of the exact classifier of three Gaussian classes."""
    denoiser = MixtureDenoiser.of_law(data.gaussians())
    return PurifiedClassifier(purifier(kind, denoiser, **options), ExactClassifier(denoiser))


def points(count=3):
    """Points of the law behind `plane`, and their classes."""
    return data.gaussians().sample(count, seeded(), torch.float64)


def bayes():
    """The diffusion classifier of the law behind `plane`."""
    denoiser = MixtureDenoiser.of_law(data.gaussians())
    return BayesClassifier(denoiser, noise.log_levels(0.05, 5, 8), 2)


def test_what_predicts_is_what_is_attacked():
    """The same logits with and without gradients, in train and eval, alone and in a batch."""
    x, _ = points(6)
    for kind in KINDS:
        whole = plane(kind)
        model = Held.seeded(whole)
        with torch.no_grad():
            silent = model(x)
        assert torch.equal(silent, model(x.clone().requires_grad_()).detach())
        assert torch.equal(silent, model.eval()(x)) and torch.allclose(
            silent[2:3], model(x[2:3]), rtol=1e-9
        )
        with torch.inference_mode():
            assert torch.equal(silent, model(1 * x))
        assert (whole.num_classes, whole.image_shape, model.deterministic) == (3, (2, 1, 1), True)


def test_it_classifies_what_the_purifier_makes_of_the_picture():
    x, _ = points()
    whole = PurifiedClassifier(plane("SDE").purifier, bayes())
    drawn = draw(whole, 3, 1)
    pure = whole.purifier(x, drawn[0])
    assert torch.equal(whole(x, drawn), whole.classifier(pure, drawn[1]))
    assert not torch.allclose(pure, x, atol=1e-3)
    assert whole.calls == 4 + 8 * 2 * 3


def test_both_parts_have_their_own_noise():
    """In order: the purifier's, then the classifier's, from one generator; each of them changes the answer."""
    x, _ = points()
    whole = PurifiedClassifier(plane("SDE").purifier, bayes())
    generator = seeded()
    first = whole.purifier.sample_noise(3, generator)
    then = whole.classifier.sample_noise(3, generator)
    drawn = whole.sample_noise(3, seeded())
    assert torch.equal(drawn[0], first) and torch.equal(drawn[1], then)
    held = Held.seeded(whole)
    random = Fresh(whole, seeded())
    assert held.deterministic and not whole.deterministic
    assert not torch.equal(random(x), random(x)) and torch.equal(held(x), held(x))
    one, other = (whole.sample_noise(3, seeded(seed)) for seed in (0, 1))
    mixed = [whole(x, (one[i], other[j])) for i, j in ((0, 1),)]
    answers = [whole(x, one), whole(x, other), *mixed, whole(x, (other[0], one[1]))]
    assert len(torch.stack(answers).unique(dim=0)) == 4
    assert not PurifiedClassifier(whole.purifier, held).deterministic
    assert not plane("SDE").deterministic


def test_its_gradients_are_those_of_all_its_parts():
    """Purified twice, "exact" is exact in both purifiers and "bpda" straight through both."""
    x, _ = points()
    denoiser = MixtureDenoiser.of_law(data.gaussians())
    inner = PurifiedClassifier(purifier("plain", denoiser, exact=False), ExactClassifier(denoiser))
    outer = PurifiedClassifier(purifier("ODE", denoiser), inner, eot=4)
    drawn = draw(outer, 3, 2)
    exact, bpda = outer.gradients().values()
    assert list(outer.gradients()) == ["exact", "bpda"] and exact.eot == bpda.eot == 4
    assert exact.purifier.exact and exact.classifier.purifier.exact
    assert not bpda.purifier.exact and not bpda.classifier.purifier.exact
    pure = outer.purifier(x, drawn[0])
    last = inner.purifier(pure, drawn[1][0]).requires_grad_()
    logits = ExactClassifier(denoiser)(last)
    wanted = torch.autograd.grad(logits[:, 0].sum(), last)[0]
    leaf = x.clone().requires_grad_()
    found = torch.autograd.grad(bpda(leaf, drawn)[:, 0].sum(), leaf)[0]
    assert torch.allclose(found, wanted, rtol=1e-12)
    push = 1e-6 * torch.randn(x.shape, generator=seeded(), dtype=x.dtype)
    rise = (outer(x + push, drawn) - outer(x - push, drawn))[:, 0].sum() / 2
    slope = torch.autograd.grad(exact(leaf, drawn)[:, 0].sum(), leaf)[0]
    assert float((slope * push).sum()) == pytest.approx(float(rise), rel=1e-5)


def test_votes_behind_a_purifier_are_climbed_through_their_mean():
    """They have no gradient, so neither has the whole; its surrogate is purified mean logits, by either gradient."""
    x, y = points()
    whole = PurifiedClassifier(plane("ODE").purifier, MajorityVote(bayes(), 3), eot=2)
    drawn = draw(whole, 3, 0)
    assert whole.gradients() == {}
    mean = whole.surrogate()
    pure = whole.purifier(x, drawn[0])
    assert torch.equal(mean(x, drawn), whole.classifier.mean(pure, drawn[1]))
    assert set(mean.gradients()) == {"exact", "bpda"} and mean.eot == 2
    slope, _, _ = attacks.expected_gradient(mean, x, y, noise=drawn)
    assert bool(torch.isfinite(slope).all()) and bool(slope.flatten(1).any(1).all())
    alone = whole.routes()["the classifier alone"]
    assert alone.gradients() == {}
    assert torch.equal(alone.surrogate()(x, drawn), whole.classifier.mean(x, drawn[1]))
    votes = MajorityVote(plane("ODE"), 3)
    assert set(votes.surrogate().gradients()) == {"exact", "bpda"}, "BPDA reaches through votes"


def test_routes_are_bpda_and_the_classifier_alone():
    x, _ = points()
    whole = PurifiedClassifier(plane("SDE").purifier, bayes())
    drawn = draw(whole, 3, 0)
    straight, alone = whole.routes().values()
    assert list(whole.routes()) == ["the identity's gradient (BPDA)", "the classifier alone"]
    assert torch.equal(straight(x, drawn), whole(x, drawn)) and not straight.purifier.exact
    assert torch.equal(alone(x, drawn), whole.classifier(x, drawn[1]))
    assert alone.calls == whole.classifier.calls < whole.calls


def test_other_numbers_of_steps_are_those_of_the_purifier():
    whole = plane("paper", steps=4)
    assert whole.level_counts == (2, 8) and plane("SDE").level_counts == ()
    assert whole.at_levels(2).purifier.steps == 2 and whole.at_levels(8).purifier.steps == 8
    with pytest.raises(ValueError, match=r"PurifiedClassifier offers, one of \(2, 8\), got 3"):
        whole.at_levels(3)


def test_an_attack_goes_through_the_purifier():
    """With the exact gradient PGD lowers the margin at least as far as through the identity, on average."""
    x, y = points(40)
    model = plane("ODE")
    held = Held.seeded(model)
    reached = {}
    for name, other in held.gradients().items():
        *_, last = attacks.pgd(other, x, y, 0.08, norm="l2", steps=10)
        reached[name] = float(attacks.margin_loss(held(last.x), y).mean())
    assert (
        reached["exact"] > float(attacks.margin_loss(held(x), y).mean()) + 1
        and reached["exact"] > reached["bpda"] - 1e-9
    )


class Tilted(Classifier):
    """Two classes, split by the second row against the first."""

    num_classes = 2
    image_shape = SHAPE
    scale = "scores"
    calls = 1

    def logits(self, x, noise):
        """The sums of both rows."""
        return torch.stack([x[:, 0, 0].sum(1), x[:, 0, 1].sum(1)], 1)


@pytest.mark.parametrize("kind", KINDS)
def test_attack_libraries_go_through_the_purifier_too(kind):
    """torchattacks on the view of a defence walks as our PGD does, to rounding: its gradients are the same."""
    import torchattacks

    x = pixels(4)
    model = Held.seeded(PurifiedClassifier(purifier(kind), Tilted()))
    y = model(x).argmax(1)
    view = attacks.AttackView.calibrated(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torchattacks.PGD(view, eps=0.05, alpha=0.01, steps=4, random_start=False)(x, y)
    *_, last = attacks.pgd(
        view, x, y, 0.05, steps=4, step_size=0.01, loss=attacks.cross_entropy_loss
    )
    assert torch.allclose(theirs.to(x), last.x, atol=1e-6) and float(last.size.min()) > 0.02


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def asked(x):
    """A purifier asked about pictures."""
    model = purifier("SDE")
    return model(x, once(model))


@pytest.mark.parametrize(
    "make, error, sentence",
    [
        (
            lambda: LikelihoodMaximisation(gaussian(), steps=0),
            ValueError,
            "expected steps >= 1, rate > 0",
        ),
        (
            lambda: LikelihoodMaximisation(gaussian(), band=(0.6, 0.4)),
            ValueError,
            "expected .* and 0 < low <= high",
        ),
        (lambda: LikelihoodMaximisation.paper(gaussian(), 8), ValueError, "did you mean 8/255"),
        (
            lambda: Purification(gaussian(), 0.0),
            ValueError,
            "expected a finite noise level sigma > 0",
        ),
        (
            lambda: Purification(gaussian(), 0.01),
            ValueError,
            "expected at least 2 steps between levels",
        ),
        (lambda: asked(2 * pixels() - 1), ValueError, "pass units.to_pixel"),
        (lambda: asked(255 * pixels()), ValueError, "divide by 255"),
        (lambda: asked(pixels(1) * math.nan), ValueError, "expected finite images"),
        (
            lambda: PurifiedClassifier(
                purifier("SDE"), ExactClassifier(MixtureDenoiser.of_law(data.gaussians()))
            ),
            ValueError,
            "expected a purifier and a classifier of the same images",
        ),
        (
            lambda: plane()(points()[0], plane().purifier.sample_noise(3, seeded())),
            ValueError,
            r"expected noise of shape \(\[B,4,2,1,1\], \(\)\) for PurifiedClassifier, got \[B,4,2,1,1\]",
        ),
    ],
)
def test_what_cannot_be_meant_gets_a_sentence(make, error, sentence):
    with pytest.raises(error, match=sentence):
        make()


def test_a_denoiser_without_a_null_class_cannot_purify():
    denoiser = gaussian()
    denoiser.has_null = False
    with pytest.raises(ValueError, match="trained without a null class"):
        Purification(denoiser)
