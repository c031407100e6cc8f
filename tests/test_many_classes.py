"""A hundred classes under noise: what shared noise, sifting, racing and one call for all save, each by itself.

The world is made here: two Gaussians a class in a space of pictures, whose denoiser and posterior are exact.
"""

import functools

import pytest
import torch
import twins
from diffclass import likelihood, noise, units
from diffclass.classifiers import racing
from diffclass.classifiers.noised import NoisedBayesClassifier
from diffclass.classifiers.one_call import NoisedOneCallClassifier
from diffclass.denoisers.exact import MixtureDenoiser
from diffclass.noise import NoiseBank

CLASSES = 100
SHAPE = (3, 8, 8)
SIGMA = 0.25  # in pixels
PICTURES = 24
LEVELS = 16


def seeded(seed=0):
    """A generator with a seed."""
    return torch.Generator().manual_seed(seed)


@functools.cache
def denoiser():
    """Two Gaussians a class around random pictures."""
    count = 2 * CLASSES
    means = 0.25 * torch.randn((count, *SHAPE), generator=seeded(), dtype=torch.float64)
    half = torch.full((count,), 0.5)
    return MixtureDenoiser(means, torch.full((count,), 0.1), half, torch.arange(count) // 2)


@functools.cache
def pictures():
    """Noised pictures in pixel units, and the class that the exact posterior names."""
    made = denoiser()
    chosen = torch.randint(2 * CLASSES, (PICTURES,), generator=seeded(1))
    inner = torch.randn((2, PICTURES, *SHAPE), generator=seeded(2), dtype=torch.float64)
    z = made.means[chosen].reshape(PICTURES, *SHAPE) + 0.1 * inner[0]
    x_tau = units.to_pixel(z) + SIGMA * inner[1]
    return x_tau, made.log_density(units.to_model(x_tau), 2 * SIGMA).argmax(1)


def question(levels=LEVELS, **options):
    """Which of a hundred classes a noised picture is of."""
    grid = noise.noised_levels(2 * SIGMA, 5.0, levels)
    return racing.Question(denoiser(), grid, **{**dict(sigma_pixel=SIGMA), **options})


def agreement_and_bill(run):
    """The share of pictures named as by the exact posterior, and evaluations a picture."""
    found = racing.answer(run)
    agree = (found.prediction == pictures()[1]).double().mean()
    return float(agree), float(found.evaluations.double().mean())


def scores_of(asked, x_tau, bank):
    """Scores of all classes under a given noise."""
    meter = racing.Meter(asked, x_tau, seeded())
    index = torch.arange(len(asked.levels))
    return meter.scores(meter.losses(index, meter.everyone, bank.noise).sum(-1))


@twins.rejected({"asked as a clean picture": dict(sigma_pixel=None)})
def test_the_scores_of_a_noised_picture_are_those_of_epndc(sigma_pixel=SIGMA):
    x_tau = pictures()[0][:3].clamp(0, 1)
    asked = question(4, sigma_pixel=sigma_pixel)
    bank = NoiseBank.fresh(asked.levels, SHAPE, 3, seeded(3), 1, torch.float64)
    model = NoisedBayesClassifier(denoiser(), SIGMA, levels=4, high=5.0)
    wanted = -model(x_tau, bank.noise.movedim(2, 0))
    assert float((scores_of(asked, x_tau, bank) - wanted).abs().max()) < 1e-6
    errors = likelihood.noised_errors(denoiser(), units.to_model(x_tau), 2 * SIGMA, bank, [7, 99])
    assert errors.shape == (3, 2, 4, 1)


def test_the_same_noise_for_all_classes_is_worth_more_than_twice_the_levels():
    x_tau, _ = pictures()
    own = agreement_and_bill(racing.full(question(8), x_tau, seeded(4), shared=False))
    shared = agreement_and_bill(racing.full(question(4), x_tau, seeded(4)))
    assert own[1] == 8 * CLASSES and shared[1] == 4 * CLASSES
    assert shared[0] >= 0.95 > own[0], (own, shared)


def test_sifting_leaves_more_than_half_of_the_evaluations_out():
    x_tau, _ = pictures()
    whole = agreement_and_bill(racing.full(question(), x_tau, seeded(4)))
    sifted = agreement_and_bill(
        racing.sift_and_refine(question(), x_tau, seeded(4), 10.0, sift=LEVELS, most=10)
    )
    assert whole[1] == LEVELS * CLASSES and whole[0] == 1
    assert sifted[0] >= 0.95 and sifted[1] < whole[1] / 2, (whole, sifted)


def test_a_race_of_a_hundred_classes_ends_with_the_right_one():
    """Bets under a scale that others' pictures gave: decided for nearly all, cheaper than all levels twice."""
    x_tau, _ = pictures()
    asked = question()
    measured = racing.pilot(asked, x_tau[:4], seeded(5), samples=4)

    def rule(differences, state):
        return racing.normal_mixture(differences, state, alpha=0.01, scale=measured.scale)

    found = racing.answer(
        racing.race(asked, x_tau[4:], seeded(6), measured.share, rule, 4 * LEVELS * CLASSES)
    )
    right = found.prediction == pictures()[1][4:]
    assert float(right.double().mean()) >= 0.95
    assert float(found.decided.double().mean()) >= 0.9
    assert float(found.evaluations.double().mean()) < 2 * LEVELS * CLASSES


def test_one_call_for_all_is_the_posterior_for_one_evaluation_a_head():
    """K <= D + 1 heads in general position: exact but for the barrier, for K + 1 evaluations, or one of so many heads."""
    x_tau, truth = pictures()
    model = NoisedOneCallClassifier(denoiser(), SIGMA)
    posterior = denoiser().log_density(units.to_model(x_tau), 2 * SIGMA).softmax(1)
    got = model(x_tau)
    assert torch.equal(got.argmax(1), truth)
    assert float((got.exp() - posterior).abs().max()) < 1e-4
    assert model.calls == CLASSES + 1


@pytest.mark.parametrize("sigma_pixel, said", [(0.5, "below 0.2"), (12, "12/255"), (0, "> 0")])
def test_a_noise_that_is_not_below_the_grid_gets_a_sentence(sigma_pixel, said):
    with pytest.raises(ValueError, match=said):
        question(sigma_pixel=sigma_pixel)
