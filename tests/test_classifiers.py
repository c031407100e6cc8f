"""Bayes' rule end to end: values against the truth, gradients against differences, and every declared property."""

import math

import pytest
import torch
from diffclass import data, likelihood, noise, units
from diffclass.classifiers.bayes import BayesClassifier, ExactClassifier, check_prior
from diffclass.classifiers.noised import NoisedBayesClassifier
from diffclass.denoisers import network
from diffclass.denoisers.exact import MixtureDenoiser
from diffclass.noise import NoiseBank

SHAPE = (2, 1, 1)
LEVELS = noise.log_levels(0.02, 20, 24)


def pixels(name: str = "overlapping", count: int = 4, seed: int = 1):
    """Points of a law in pixel space, float64."""
    return data.PLANE_LAWS[name]().sample(
        count, torch.Generator().manual_seed(seed), torch.float64
    )[0]


def classifier(name: str = "overlapping", samples: int = 4, **options) -> BayesClassifier:
    """The deterministic classifier of a plane law."""
    bank = NoiseBank.fixed(LEVELS, SHAPE, samples, dtype=torch.float64)
    return BayesClassifier(MixtureDenoiser.of_law(data.PLANE_LAWS[name]()), bank, **options)


def noised(name: str = "overlapping", **options) -> NoisedBayesClassifier:
    """The classifier of points that carry noise 0.2, in float64."""
    made = NoisedBayesClassifier(
        MixtureDenoiser.of_law(data.PLANE_LAWS[name]()), 0.2, samples=4, **options
    )
    made.bank = NoiseBank.fixed(
        noise.noised_levels(0.4, 5.0, 8, 0.25), SHAPE, 4, dtype=torch.float64
    )
    return made


# ---------------------------------------------------------------------------------------------------------------------
# Values


def check_posterior(posterior_of=lambda model, x: model.posterior(x), tolerance: float = 0.02):
    """Many levels and samples: the posterior of the law, with its unequal priors, to 0.02 at ten points."""
    law = data.imbalanced()
    bank = NoiseBank.fixed(noise.log_levels(0.002, 50, 200), SHAPE, 200, dtype=torch.float64)
    model = BayesClassifier(MixtureDenoiser.of_law(law), bank, prior=law.priors.tolist())
    x = pixels("imbalanced", 10)
    with torch.no_grad():
        assert float((posterior_of(model, x) - law.posterior(x)).abs().max()) < tolerance


def test_the_posterior_is_that_of_the_law():
    check_posterior()


def test_the_exact_classifier_is_the_law_clean_and_noised():
    law = data.imbalanced()
    denoiser = MixtureDenoiser.of_law(law)
    x = pixels("imbalanced", 10)
    clean = ExactClassifier(denoiser, law.priors.tolist())
    assert torch.allclose(torch.softmax(clean(x), 1), law.posterior(x), atol=1e-12)
    smoothed = ExactClassifier(denoiser, sigma_pixel=0.25)(x + 5)  # noise leaves [0,1]
    density = law.log_density(units.to_model(x + 5), torch.tensor(0.5, dtype=torch.float64))
    assert torch.allclose(smoothed, density + math.log(1 / 3), atol=1e-9)


def check_temperature(model_of=classifier):
    """Logits are sums over pixels divided by the temperature: ln odds double when the temperature halves."""
    x = pixels()
    log_odds = [model_of(temperature=t)(x).diff(dim=1) for t in (1.0, 0.5)]
    assert torch.allclose(log_odds[1], 2 * log_odds[0], rtol=1e-9)
    evidence = likelihood.elbo(model_of().denoiser, units.to_model(x), model_of().bank)
    assert torch.allclose(log_odds[0], evidence.diff(dim=1), rtol=1e-9), (
        "at temperature 1 they are nats"
    )


def test_temperature():
    check_temperature()


def check_prior_shift(model_of=classifier):
    """A prior moves the logits by its logarithm, once, whatever the temperature."""
    x = pixels()
    prior = [0.7, 0.2, 0.1]
    for temperature in (1.0, 3.0):
        shift = model_of(prior=prior, temperature=temperature)(x) - model_of(
            temperature=temperature
        )(x)
        wanted = torch.tensor(prior, dtype=torch.float64).log() - math.log(1 / 3)
        assert torch.allclose(shift, wanted.expand_as(shift), atol=1e-9)


def test_prior():
    check_prior_shift()


def test_losses_can_be_reweighted_for_nothing():
    model = classifier()
    x = pixels()
    assert torch.allclose(model.logits_of(model.losses(x)), model(x), rtol=1e-12)
    assert tuple(model.losses(x).shape) == (4, 3, 24)
    shared = model.losses(x) + torch.rand(
        4, 1, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    moved = torch.softmax(model.logits_of(shared), 1)
    assert torch.allclose(moved, model.posterior(x), atol=1e-9), (
        "what the classes share does not matter"
    )


def test_the_end_term_is_added_and_helps():
    law = data.gaussians()
    levels = noise.log_levels(0.002, 2.0, 128)
    bank = NoiseBank.fixed(levels, SHAPE, 128, dtype=torch.float64)
    antithetic = NoiseBank(levels, torch.cat([bank.noise, -bank.noise], 1))
    denoiser = MixtureDenoiser.of_law(law)
    moments = (denoiser.means.reshape(3, *SHAPE), 2 * denoiser.variances)
    x = pixels("gaussians")
    truth = ExactClassifier(denoiser)(x).diff(dim=1)
    with torch.no_grad():
        off = [
            float(
                (BayesClassifier(denoiser, antithetic, moments=m)(x).diff(dim=1) - truth)
                .abs()
                .max()
            )
            for m in (None, moments)
        ]
    assert off[1] < 0.01 < 0.03 < off[0], off


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


def check_gradient(
    model, x, gradient_of=lambda model, x: torch.autograd.grad(model(x).select(1, 0).sum(), x)[0]
):
    """Autograd against central differences in float64, 1e-6 relative to the largest component."""
    x = x.clone().requires_grad_(True)
    got = gradient_of(model, x)
    step = 1e-5
    wanted = torch.zeros_like(x)
    with torch.no_grad():
        for index in range(x[0].numel()):
            push = torch.zeros_like(x).flatten(1)
            push[:, index] = step
            push = push.reshape(x.shape)
            wanted.flatten(1)[:, index] = (model(x + push)[:, 0] - model(x - push)[:, 0]) / (
                2 * step
            )
    assert float((got - wanted).abs().max() / wanted.abs().max()) < 1e-6


def through_softmax(model):
    """A head whose gradient passes through every class: log p of class 0."""
    return lambda x: torch.log_softmax(model(x), 1)


@pytest.mark.parametrize("name", ["overlapping", "mixtures"])
@pytest.mark.parametrize("make", [classifier, noised])
def test_autograd_equals_finite_differences(name, make):
    check_gradient(make(name), pixels(name))
    check_gradient(through_softmax(make(name, chunk=17)), pixels(name))


@pytest.mark.parametrize("make", [classifier, noised])
def test_chunks_change_neither_logits_nor_gradient(make):
    results = []
    for chunk in (1 << 20, 50, 9):
        x = pixels("mixtures").requires_grad_(True)
        logits = make("mixtures", chunk=chunk)(x)
        results.append((logits.detach(), torch.autograd.grad(logits[:, 0].sum(), x)[0]))
    for other in results[1:]:
        for whole, parts in zip(results[0], other, strict=True):
            assert float((whole - parts).abs().max() / whole.abs().max()) < 1e-12


def test_gradients_reach_the_network_too():
    denoiser = network.build("MultiHeadDenoiser", "DigitNet", 3, (1, 8, 8), width=16, blocks=1)
    model = BayesClassifier(
        denoiser, NoiseBank.fixed(noise.log_levels(0.1, 3, 4), (1, 8, 8)), chunk=8
    )
    model(torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)))[:, 0].sum().backward()
    assert float(denoiser.network.leave[-1].weight.grad.abs().max()) > 0


# ---------------------------------------------------------------------------------------------------------------------
# Invariances


@pytest.mark.parametrize("make", [classifier, noised])
def test_logits_do_not_depend_on_the_batch(make):
    model = make("mixtures")
    x = pixels("mixtures", 5)
    every = model(x)
    assert torch.allclose(torch.cat([model(one[None]) for one in x]), every, rtol=1e-12)
    assert torch.allclose(model(x.flip(0)).flip(0), every, rtol=1e-12)


def test_permuting_the_classes_permutes_the_logits():
    law = data.mixtures()  # old class -> new class
    order = torch.tensor([2, 0, 1])
    renamed = MixtureDenoiser(
        law.means[:, :, None, None], law.scales, law.weights, order[law.labels]
    )
    bank = classifier("mixtures").bank
    x = pixels("mixtures")
    prior = torch.tensor([0.5, 0.3, 0.2])
    moved = BayesClassifier(renamed, bank, prior=prior.tolist())(x)[:, order]
    plain = BayesClassifier(MixtureDenoiser.of_law(law), bank, prior=prior[order].tolist())(x)
    assert torch.allclose(moved, plain, atol=1e-9)


def test_two_identical_classes_differ_by_exactly_nothing():
    means = torch.tensor([[0.3, 0.1], [0.3, 0.1], [-0.4, 0.2]], dtype=torch.float64)[
        :, :, None, None
    ]
    twins = MixtureDenoiser(means, [0.1] * 3, [1.0] * 3, [0, 1, 2])
    for bank in (classifier().bank, NoiseBank.fixed(LEVELS, SHAPE, 3, seed=8)):
        x = pixels().to(bank.noise.dtype)
        logits = BayesClassifier(twins, bank)(x)
        assert torch.equal(logits[:, 0], logits[:, 1]) and not torch.equal(
            logits[:, 0], logits[:, 2]
        )
        fresh = BayesClassifier(twins, bank).with_fresh_noise(torch.Generator().manual_seed(0))(x)
        assert torch.equal(fresh[:, 0], fresh[:, 1])


def test_train_and_eval_are_one_function():
    model = classifier()
    x = pixels()
    assert torch.equal(model.train()(x), model.eval()(x))


# ---------------------------------------------------------------------------------------------------------------------
# Randomness as declared


def test_the_fixed_bank_is_deterministic_and_touches_no_global_state():
    model = classifier()
    x = pixels()
    before = torch.get_rng_state()
    assert model.deterministic and torch.equal(model(x), model(x))
    assert torch.equal(torch.get_rng_state(), before)


def test_fresh_noise_differs_by_call_and_image_and_repeats_with_the_generator():
    model = classifier()
    x = pixels()[:1].expand(3, -1, -1, -1)
    random = model.with_fresh_noise(torch.Generator().manual_seed(4))
    first = random(x)
    second = random(x)
    again = model.with_fresh_noise(torch.Generator().manual_seed(4))(x)
    assert not random.deterministic and model.deterministic, "the original stays deterministic"
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert not torch.equal(first[0], first[1]) and torch.equal(model(x)[0], model(x)[1])
    assert "fresh noise" in repr(random) and "fixed noise" in repr(model)


def test_fresh_noise_scatters_around_the_truth():
    """The mean of many random classifiers is the exact log-odds, within 4.5 standard errors plus the levels' cut."""
    law = data.overlapping()
    x = pixels()[:1]
    denoiser = MixtureDenoiser.of_law(law)
    bank = NoiseBank.fixed(noise.log_levels(0.002, 100, 64), SHAPE, 1, dtype=torch.float64)
    random = BayesClassifier(denoiser, bank).with_fresh_noise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        drawn = random(x.expand(400, -1, -1, -1))
    odds = drawn.diff(dim=1)
    truth = ExactClassifier(denoiser)(x).diff(dim=1)
    assert bool(((odds.mean(0) - truth).abs() < 4.5 * odds.std(0) / 20 + 1e-3).all())


def test_the_noised_classifier_draws_its_own_noise_for_each_vote():
    x = pixels()[:1].expand(3, -1, -1, -1)
    random = noised().with_fresh_noise(torch.Generator().manual_seed(1))
    logits = random(x)
    assert not torch.equal(logits[0], logits[1]) and not random.deterministic
    assert torch.equal(noised().with_fresh_noise(torch.Generator().manual_seed(1))(x), logits)
    assert torch.equal(noised()(x)[0], noised()(x)[1]) and noised().deterministic


def test_the_noised_classifier_is_bayes_rule_on_noised_points():
    law = data.gaussians()
    generator = torch.Generator().manual_seed(2)
    x = pixels("gaussians", 60)
    x_tau = x + 0.2 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    model = NoisedBayesClassifier(
        MixtureDenoiser.of_law(law), 0.2, levels=48, high=50.0, samples=48, prior=[0.2, 0.3, 0.5]
    )
    truth = ExactClassifier(MixtureDenoiser.of_law(law), [0.2, 0.3, 0.5], sigma_pixel=0.2)
    with torch.no_grad():
        off = torch.softmax(model(x_tau.float()), 1) - torch.softmax(truth(x_tau), 1)
    assert float(off.abs().sum(1).mean() / 2) < 0.03


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    "prior, sentence",
    [
        ([0.5, 0.5], r"expected a prior over 3 classes, got \[2\]"),
        ([0.5, 0.5, 0.5], "sum to 1, got .* with sum 1.5; divide it by its sum"),
        ([1.0, 0.5, -0.5], "positive probabilities"),
        ([1.0, 0.0, 0.0], "positive probabilities"),
        ([math.nan, 0.5, 0.5], "positive probabilities"),
    ],
)
def test_impossible_priors_get_a_sentence(prior, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_prior(prior, 3)
    for make in (classifier, noised):
        with pytest.raises(ValueError, match=sentence):
            make(prior=prior)


@pytest.mark.parametrize(
    "change, error, sentence",
    [
        (lambda x: x * 255, ValueError, "divide by 255"),
        (lambda x: x * 2 - 1, ValueError, "model space"),
        (lambda x: x[0], ValueError, r"add the batch axis"),
        (lambda x: x[:, :1], ValueError, r"expected images of shape \[B,2,1,1\]"),
        (lambda x: x * math.nan, ValueError, "expected finite images"),
        (lambda x: (x * 255).to(torch.uint8), TypeError, "dtype uint8; divide by 255"),
        (lambda x: x.tolist(), TypeError, "got list"),
    ],
)
def test_wrong_images_get_a_sentence(change, error, sentence):
    models = [classifier(), ExactClassifier(MixtureDenoiser.of_law(data.overlapping()))]
    x = (
        0.99 * pixels() / pixels().max()
    )  # spread over [0,1], so that each mistake looks like itself
    x[0, 0] = 0.01
    for model in models:
        with pytest.raises(error, match=sentence):
            model(change(x))


@pytest.mark.parametrize("temperature", [0, -1, math.nan])
def test_impossible_temperatures_get_a_sentence(temperature):
    with pytest.raises(ValueError, match="expected a temperature > 0, got"):
        classifier(temperature=temperature)


def test_parts_that_do_not_fit_get_a_sentence():
    denoiser = MixtureDenoiser.of_law(data.overlapping())
    with pytest.raises(
        ValueError, match=r"expected a noise bank for images \[2, 1, 1\], got \[1, 8, 8\]"
    ):
        BayesClassifier(denoiser, NoiseBank.fixed(LEVELS, (1, 8, 8)))
    with pytest.raises(
        TypeError, match="expected a denoiser with a closed-form density, got MultiHeadDenoiser"
    ):
        ExactClassifier(
            network.build("MultiHeadDenoiser", "DigitNet", 3, (1, 8, 8), width=16, blocks=1)
        )
    with pytest.raises(ValueError, match="expected a finite noise level sigma_pixel > 0, got 0"):
        NoisedBayesClassifier(denoiser, 0.0)
    with pytest.raises(ValueError, match="expected 0 < sigma_tau < high"):
        NoisedBayesClassifier(denoiser, 3.0)
    with pytest.raises(ValueError, match="expected finite images"):
        noised()(pixels() * math.nan)
