"""Rectified flows: the exact velocity gives the exact posterior, by one weight and by no other; a shift counts once."""

import math

import pytest
import torch
import twins
from diffclass import data, likelihood, noise
from diffclass.classifiers.bayes import BayesClassifier
from diffclass.denoisers import flow
from diffclass.denoisers.exact import MixtureDenoiser

# The mixture of the dossier's table: three classes of two parts each, written once more and by hand.
MEANS = torch.tensor(
    [[[0.5, 0.3], [-0.4, 0.2]], [[-0.3, -0.5], [0.2, 0.6]], [[0.1, -0.1], [0.7, -0.6]]],
    dtype=torch.float64,
)
SPREADS = torch.tensor([0.08, 0.12, 0.10], dtype=torch.float64)
RANGE = (0.02, 60.0)


def exact() -> MixtureDenoiser:
    """The mixture as a denoiser."""
    return MixtureDenoiser(
        MEANS.reshape(6, 2, 1, 1),
        SPREADS.repeat_interleave(2),
        torch.full((6,), 0.5),
        torch.arange(3).repeat_interleave(2),
    )


def velocity(x_t, t, classes):
    """E[eps - x0 | x_t, k] by conditioning the pair (eps - x0, x_t) of each part: no denoiser in it.

    Var x_t = (1 - t)^2 s^2 + t^2,  Cov(eps - x0, x_t) = t - (1 - t) s^2,  E[eps - x0] = -mu
    """
    x = x_t.flatten(1).double()
    at = t.double()[:, None]
    means = MEANS[classes]
    square = (SPREADS[classes] ** 2)[:, None]
    variance = (1 - at) ** 2 * square + at**2
    away = x[:, None] - (1 - at)[..., None] * means
    share = (-(away**2).sum(-1) / (2 * variance)).softmax(1)
    slope = (at - (1 - at) * square) / variance
    answer = (share[..., None] * (slope[..., None] * away - means)).sum(1)
    return answer.reshape(x_t.shape).to(x_t)


def perfect(**options) -> flow.FlowDenoiser:
    """The flow whose velocity is exact."""
    return flow.FlowDenoiser(velocity, 3, (2, 1, 1), RANGE, **options)


def points(count, seed=0):
    """Points of model space about the parts of the mixture."""
    generator = torch.Generator().manual_seed(seed)
    part = torch.randint(6, (count,), generator=generator)
    away = 0.25 * torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return (MEANS.reshape(6, 2)[part] + away).reshape(count, 2, 1, 1)


def unscaled(self, x_sigma, sigma, classes):
    """A flow that is shown x_sigma in place of x_t."""
    t = noise.flow_time(sigma).repeat_interleave(len(classes))
    wide = x_sigma.repeat_interleave(len(classes), 0)
    answer = wide - t[:, None, None, None] * self.velocity(wide, t, classes.repeat(len(x_sigma)))
    return answer.unflatten(0, (len(x_sigma), len(classes)))


def told_sigma(self, x_sigma, sigma, classes):
    """A flow that is told sigma in place of t."""
    wide = sigma.repeat_interleave(len(classes))
    t = noise.flow_time(wide)[:, None, None, None]
    x_t = x_sigma.repeat_interleave(len(classes), 0) * (1 - t)
    answer = x_t - t * self.velocity(x_t, wide, classes.repeat(len(x_sigma)))
    return answer.unflatten(0, (len(x_sigma), len(classes)))


def by_one_minus_t(self, x_sigma, sigma, classes):
    """A flow whose answer takes the velocity (1 - t) times: that of the noise."""
    t = noise.flow_time(sigma).repeat_interleave(len(classes))
    x_t = x_sigma.repeat_interleave(len(classes), 0) * (1 - t)[:, None, None, None]
    step = (1 - t)[:, None, None, None] * self.velocity(x_t, t, classes.repeat(len(x_sigma)))
    return (x_t - step).unflatten(0, (len(x_sigma), len(classes)))


def flow_of(estimate):
    """A twin of `FlowDenoiser` with another estimate."""
    return type("Twin", (flow.FlowDenoiser,), {"estimate": estimate})


@twins.rejected(
    {
        "x_sigma in place of x_t": dict(kind=flow_of(unscaled)),
        "told sigma": dict(kind=flow_of(told_sigma)),
        "1 - t times the velocity": dict(kind=flow_of(by_one_minus_t)),
    }
)
def test_the_exact_velocity_is_the_exact_denoiser(kind=flow.FlowDenoiser):
    x = points(6)
    denoiser = kind(velocity, 3, (2, 1, 1), RANGE)
    for sigma in (0.03, 0.4, 5.0, 50.0):
        noisy = x + sigma * torch.randn(
            x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype
        )
        torch.testing.assert_close(denoiser(noisy, sigma), exact()(noisy, sigma), rtol=0, atol=1e-9)


def late(x_t, t, classes):
    """The exact velocity, half a step of a thousand late."""
    return flow.ExactVelocity(exact())(x_t, (t + 5e-4).clamp(max=0.999), classes)


def without_t(x_t, t, classes):
    """x_t - D: the velocity times t."""
    return t[:, None, None, None] * flow.ExactVelocity(exact())(x_t, t, classes)


@twins.rejected({"late": dict(formula=late), "not divided by t": dict(formula=without_t)})
def test_the_velocity_of_a_denoiser_is_the_one_derived_by_hand(
    formula=flow.ExactVelocity(exact()),  # noqa: B008
):
    x = points(40)
    t = torch.linspace(0.05, 0.95, 40, dtype=torch.float64)
    classes = torch.arange(40) % 3
    torch.testing.assert_close(
        formula(x, t, classes), velocity(x, t, classes), rtol=1e-8, atol=1e-9
    )


def test_a_perfect_flow_has_the_posterior_of_a_perfect_denoiser_on_the_plane():
    law = data.mixtures()
    denoiser = MixtureDenoiser.of_law(law)
    flowing = flow.FlowDenoiser(flow.ExactVelocity(denoiser), law.num_classes, (2, 1, 1), (0.02, 5))
    levels = noise.log_levels(0.02, 5, 12)
    ours = BayesClassifier(flowing, levels, 4, prior=law.priors)
    theirs = BayesClassifier(denoiser, levels, 4, prior=law.priors)
    x, _ = law.sample(20, torch.Generator().manual_seed(0))
    drawn = theirs.sample_noise(len(x), torch.Generator().manual_seed(1)).double()
    x = x.double()
    torch.testing.assert_close(
        ours.posterior(x, drawn), theirs.posterior(x, drawn), rtol=0, atol=1e-5
    )


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def integrand(weight, levels):
    """weight(t) dt on the velocity error as a weight on the x-error, by finite differences of t."""
    t = noise.flow_time(levels.sigma)
    width = noise.flow_time(levels.upper) - noise.flow_time(levels.lower)
    return weight(t) * width / t**2


FINE = noise.log_levels(0.02, 60, 4000)
WEIGHTS_OF_T = {
    "velocity, (1 - t)/t: the ELBO": lambda t: (1 - t) / t,
    "noise, 1": lambda t: (1 - t) ** 2,
    "velocity, 1": torch.ones_like,
    "velocity, logit-normal": lambda t: (
        (-(torch.logit(t) ** 2) / 2).exp() / (t * (1 - t) * math.sqrt(2 * math.pi))
    ),
    "x0, 1: the default of training scripts": lambda t: t**2,
}


def slipped(power_of_t, power_of_rest):
    """A twin of `on_velocity` with other powers."""

    def twin(levels, weight):
        t = noise.flow_time(levels.sigma)
        return weight * t**power_of_t * (1 - t) ** power_of_rest * levels.step

    return {
        name: (lambda levels, w=w: twin(levels, w(noise.flow_time(levels.sigma))))
        for name, w in WEIGHTS_OF_T.items()
    }


@twins.rejected(
    {
        "no Jacobian": dict(weightings=slipped(-2, 0)),
        "the Jacobian upside down": dict(weightings=slipped(-2, -2)),
        "t once": dict(weightings=slipped(-1, 2)),
    }
)
def test_weights_on_the_velocity_are_what_their_names_say(weightings=noise.FLOW_WEIGHTINGS):
    assert list(weightings) == list(WEIGHTS_OF_T)
    for name, weighting in weightings.items():
        wanted = integrand(WEIGHTS_OF_T[name], FINE)
        torch.testing.assert_close(weighting(FINE), wanted, rtol=1e-5, atol=0)


def test_the_weight_of_bayes_on_the_velocity_is_the_elbo_weight():
    t = noise.flow_time(FINE.sigma)
    torch.testing.assert_close(noise.on_velocity(FINE, (1 - t) / t), noise.elbo_weight(FINE))


def test_only_the_elbo_weight_lets_a_perfect_flow_answer_as_bayes_does():
    x = points(200)
    bank = noise.NoiseBank.sobol(noise.log_levels(*RANGE, 40), (2, 1, 1), 64, dtype=torch.float64)
    losses = likelihood.diffusion_loss(perfect(), x, bank)
    truth = exact().log_density(x, 0.0).argmax(1)
    agree = {
        name: float(
            (likelihood.evidence(losses, bank.levels, w).argmax(1) == truth).double().mean()
        )
        for name, w in noise.FLOW_WEIGHTINGS.items()
    }
    elbo, *others = agree.values()
    assert elbo > 0.97 and max(others) < elbo, agree
    assert agree["x0, 1: the default of training scripts"] < 0.75, agree


# ---------------------------------------------------------------------------------------------------------------------
# Time and shift


def shifted_twice(u, shift):
    """A shift that is applied to what was shifted."""
    return noise.shifted_time(noise.shifted_time(u, shift), shift)


@twins.rejected(
    {
        "twice": dict(shifted=shifted_twice),
        "not at all": dict(shifted=lambda u, shift: u),
        "backwards": dict(shifted=lambda u, shift: noise.shifted_time(u, 1 / shift)),
    }
)
def test_the_shift_is_the_schedulers_own_before_it_is_set(shifted=noise.shifted_time):
    from diffusers import FlowMatchEulerDiscreteScheduler

    for shift in (1.0, 3.0):
        sigmas = FlowMatchEulerDiscreteScheduler(shift=shift).sigmas.double().flip(0)
        u = torch.arange(1, 1001, dtype=torch.float64) / 1000
        torch.testing.assert_close(shifted(u, shift), sigmas, rtol=1e-5, atol=1e-7)


def test_a_grid_is_even_before_the_shift_and_its_stretches_meet():
    levels = perfect(shift=3.0).grid(50)
    assert torch.equal(levels.upper[:-1], levels.lower[1:])
    assert float(levels.lower[0]) == pytest.approx(RANGE[0])
    assert float(levels.upper[-1]) == pytest.approx(RANGE[1])
    u = noise.shifted_time(noise.flow_time(levels.sigma), 1 / 3)
    torch.testing.assert_close(u.diff(), u.diff()[:1].expand(49), rtol=1e-6, atol=0)
    unshifted = perfect().grid(50)
    assert float(levels.sigma[25]) == pytest.approx(3 * float(unshifted.sigma[25]), rel=0.1)


def test_time_and_level_are_inverse_and_the_ends_are_no_times():
    sigma = torch.tensor([0.01, 1.0, 200.0], dtype=torch.float64)
    torch.testing.assert_close(noise.sigma_of_flow_time(noise.flow_time(sigma)), sigma)
    assert float(noise.flow_time(torch.tensor(1.0))) == 0.5
    for t in (0.0, 1.0, 500.0):
        with pytest.raises(ValueError, match="strictly between 0 and 1.*divide timesteps"):
            noise.sigma_of_flow_time(torch.tensor([t]))


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(ValueError, match="the shift of a flow > 0, got 0"):
        perfect(shift=0)
    with pytest.raises(ValueError, match="times between 0 and 1, got 0.5 to 2"):
        noise.shifted_time(torch.tensor([0.5, 2.0]), 3.0)
    with pytest.raises(ValueError, match="0 < low < high"):
        flow.FlowDenoiser(velocity, 3, (2, 1, 1), (5.0, 0.02))
    with pytest.raises(ValueError, match="noise levels between 0.02 and 60"):
        perfect()(points(1), 100.0)
