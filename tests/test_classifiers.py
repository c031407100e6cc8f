"""Bayes' rule end to end: values against the truth, gradients against differences, and every declared property.

A formula stands beside its twins, the slips that one makes, which its check must reject.
"""

import math

import pytest
import torch
import twins
from diffclass import data, likelihood, noise, units
from diffclass.classifiers.base import Fresh, Held, draw
from diffclass.classifiers.bayes import BayesClassifier, ExactClassifier, check_prior, telescoped
from diffclass.classifiers.noised import NoisedBayesClassifier
from diffclass.denoisers import network
from diffclass.denoisers.exact import MixtureDenoiser
from diffclass.noise import NoiseBank

SHAPE = (2, 1, 1)
LEVELS = noise.log_levels(0.02, 20, 24)


def seeded(seed: int = 0) -> torch.Generator:
    """A seeded generator."""
    return torch.Generator().manual_seed(seed)


def pixels(name: str = "overlapping", count: int = 4, seed: int = 1):
    """Points of a law in pixel space, float64."""
    return data.PLANE_LAWS[name]().sample(count, seeded(seed), torch.float64)[0]


def denoiser_of(name: str) -> MixtureDenoiser:
    """The exact denoiser of a plane law."""
    return MixtureDenoiser.of_law(data.PLANE_LAWS[name]())


def classifier(name: str = "overlapping", samples: int = 4, **options) -> BayesClassifier:
    """The classifier of a plane law."""
    return BayesClassifier(denoiser_of(name), LEVELS, samples, **options)


def noised(name: str = "overlapping", **options) -> NoisedBayesClassifier:
    """The classifier of points that carry noise 0.2."""
    return NoisedBayesClassifier(denoiser_of(name), 0.2, samples=4, **options)


def small_network() -> network.MultiHeadDenoiser:
    """A network of three classes that was never trained."""
    return network.build("MultiHeadDenoiser", "DigitNet", 3, (1, 8, 8), width=16, blocks=1)


# ---------------------------------------------------------------------------------------------------------------------
# Values


def likelihood_alone(model, x):
    """The posterior without its prior."""
    return torch.softmax(model(x) - model.classifier.log_prior, 1)


@twins.rejected(
    {
        "not normalised": dict(posterior_of=lambda model, x: model(x).exp()),
        "likelihood without prior": dict(posterior_of=likelihood_alone),
        "pixels not converted": dict(posterior_of=lambda model, x: model.posterior((x + 1) / 2)),
    }
)
def test_the_posterior_is_that_of_the_law(
    posterior_of=lambda model, x: model.posterior(x), tolerance: float = 0.02
):
    """Many levels and samples: the posterior of the law, with its unequal priors, to 0.02 at ten points."""
    law = data.imbalanced()
    levels = noise.log_levels(0.002, 50, 200)
    model = BayesClassifier(MixtureDenoiser.of_law(law), levels, 200, prior=law.priors.tolist())
    x = pixels("imbalanced", 10)
    with torch.no_grad():
        found = posterior_of(Held.seeded(model), x)
    assert float((found - law.posterior(x)).abs().max()) < tolerance


def test_the_exact_classifier_is_the_law_clean_and_noised():
    law = data.imbalanced()
    denoiser = MixtureDenoiser.of_law(law)
    x = pixels("imbalanced", 10)
    clean = ExactClassifier(denoiser, law.priors.tolist())
    assert torch.allclose(torch.softmax(clean(x), 1), law.posterior(x), atol=1e-12)
    smoothed = ExactClassifier(denoiser, sigma_pixel=0.25)(x + 5)  # noise leaves [0,1]
    density = law.log_density(units.to_model(x + 5), torch.tensor(0.5, dtype=torch.float64))
    assert torch.allclose(smoothed, density + math.log(1 / 3), atol=1e-9)


class Slipped(BayesClassifier):
    """The line that makes logits from losses, with one slip in it."""

    sign = 1.0
    prior_is_divided = False
    temperature_is_squared = False

    def logits_of(self, losses):
        evidence = super().logits_of(losses) - self.log_prior
        if self.temperature_is_squared:
            evidence = evidence / self.temperature
        prior = self.sign * self.log_prior
        if self.prior_is_divided:
            prior = prior / self.temperature
        return evidence + prior


def slipped(**slips):
    """A classifier with one slip."""
    kind = type("Twin", (Slipped,), slips)
    return lambda **options: kind(denoiser_of("overlapping"), LEVELS, 4, **options)


def mean_over_pixels(**options):
    """A classifier whose evidence is the mean over pixels instead of the sum."""
    return classifier(weighting=lambda levels: noise.elbo_weight(levels) / 2, **options)


@twins.rejected(
    {
        "mean over pixels": dict(model_of=mean_over_pixels),
        "applied twice": dict(model_of=slipped(temperature_is_squared=True)),
    }
)
def test_temperature(model_of=classifier):
    """Logits are sums over pixels divided by the temperature: ln odds double when the temperature halves."""
    x = pixels()
    log_odds = [Held.seeded(model_of(temperature=t))(x).diff(dim=1) for t in (1.0, 0.5)]
    assert torch.allclose(log_odds[1], 2 * log_odds[0], rtol=1e-9)
    bank = NoiseBank(LEVELS, NoiseBank.fixed(LEVELS, SHAPE, 4).noise.double())
    evidence = likelihood.elbo(model_of().denoiser, units.to_model(x), bank)
    assert torch.allclose(log_odds[0], evidence.diff(dim=1), rtol=1e-9), (
        "at temperature 1 they are nats"
    )


@twins.rejected(
    {
        "sign": dict(model_of=slipped(sign=-1.0)),
        "divided by the temperature": dict(model_of=slipped(prior_is_divided=True)),
    }
)
def test_prior(model_of=classifier):
    """A prior moves the logits by its logarithm, once, whatever the temperature."""
    x = pixels()
    prior = [0.7, 0.2, 0.1]
    for temperature in (1.0, 3.0):
        with_prior = Held.seeded(model_of(prior=prior, temperature=temperature))(x)
        without = Held.seeded(model_of(temperature=temperature))(x)
        shift = with_prior - without
        wanted = torch.tensor(prior, dtype=torch.float64).log() - math.log(1 / 3)
        assert torch.allclose(shift, wanted.expand_as(shift), atol=1e-9)


def test_a_classifier_without_a_slip_passes_as_a_twin():
    """What makes the twins fail is the slip, not how they are made."""
    test_temperature.check(slipped())
    test_prior.check(slipped())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", [0, 5])
def test_a_held_seed_is_the_fixed_bank_of_that_seed(seed, dtype):
    """Bit for bit what likelihoods measure with `NoiseBank.fixed`: the values of stored records."""
    x = pixels().to(dtype)
    model = classifier(prior=[0.5, 0.3, 0.2])
    bank = NoiseBank(LEVELS, NoiseBank.fixed(LEVELS, SHAPE, 4, seed).noise.to(dtype))
    evidence = likelihood.elbo(model.denoiser, units.to_model(x), bank)
    assert torch.equal(Held.seeded(model, seed)(x), evidence + model.log_prior.to(dtype))
    fresh = NoiseBank.fresh(LEVELS, SHAPE, 4, seeded(seed), 4)
    own = NoiseBank(LEVELS, fresh.noise.to(dtype))
    evidence = likelihood.elbo(model.denoiser, units.to_model(x), own)
    assert torch.equal(Fresh(model, seeded(seed))(x), evidence + model.log_prior.to(dtype))


def test_losses_can_be_reweighted_for_nothing():
    model = classifier()
    x = pixels()
    drawn = draw(model, 4, 3)
    losses = model.losses(x, drawn)
    assert torch.allclose(model.logits_of(losses), model(x, drawn), rtol=1e-12)
    assert tuple(losses.shape) == (4, 3, 24)
    shared = losses + torch.rand(4, 1, 24, generator=seeded(), dtype=torch.float64)
    moved = torch.softmax(model.logits_of(shared), 1)
    assert torch.allclose(moved, model.posterior(x, drawn), atol=1e-9), (
        "what the classes share does not matter"
    )
    other = model.changed(weighting=noise.edm_weight, prior=[0.2, 0.2, 0.6], temperature=2.0)
    assert torch.allclose(other.logits_of(losses), other(x, drawn), rtol=1e-12)


def test_losses_come_level_by_level_too():
    model = classifier()
    x = pixels()
    drawn = draw(model, 4, 3)
    levels = list(model.losses_by_level(x, drawn))
    assert [tuple(one.shape) for one in levels] == [(4, 3, 1)] * 24
    assert torch.equal(torch.cat(levels, -1), model.losses(x, drawn))
    for measured in (model.losses, model.losses_by_level):
        with pytest.raises(ValueError, match="expected noise for 4 pictures"):
            list(measured(x, draw(model, 3, 0)))
        with pytest.raises(ValueError, match="divide by 255"):
            list(measured(255 * x, drawn))


def test_the_end_term_is_added_and_helps():
    law = data.gaussians()
    levels = noise.log_levels(0.002, 2.0, 128)
    denoiser = MixtureDenoiser.of_law(law)
    moments = (denoiser.means.reshape(3, *SHAPE), 2 * denoiser.variances)
    eps = BayesClassifier(denoiser, levels, 128).sample_noise(1, seeded())
    antithetic = torch.cat([eps, -eps], 2)
    x = pixels("gaussians")
    truth = ExactClassifier(denoiser)(x).diff(dim=1)
    off = []
    for given in (None, moments):
        model = BayesClassifier(denoiser, levels, 256, moments=given)
        with torch.no_grad():
            off.append(float((model(x, antithetic).diff(dim=1) - truth).abs().max()))
    assert off[1] < 0.01 < 0.03 < off[0], off


class EndsInside(BayesClassifier):
    """The slip whose end term starts where the last loss is measured, not where its interval ends."""

    def logits(self, x, noise):
        means, traces = self.moments
        bare = self.changed(moments=None).logits(x, noise)
        last = float(self.levels.sigma[-1])
        return bare + likelihood.end_term(units.to_model(x), means, traces, last) / self.temperature


class HotEnd(BayesClassifier):
    """The slip whose end term does not feel the temperature."""

    def logits(self, x, noise):
        means, traces = self.moments
        bare = self.changed(moments=None).logits(x, noise)
        last = float(self.levels.upper[-1])
        return bare + likelihood.end_term(units.to_model(x), means, traces, last)


class EndOfPixels(BayesClassifier):
    """The slip whose end term is given pixels in place of model units."""

    def logits(self, x, noise):
        means, traces = self.moments
        bare = self.changed(moments=None).logits(x, noise)
        last = float(self.levels.upper[-1])
        return bare + likelihood.end_term(x, means, traces, last) / self.temperature


@twins.rejected(
    {
        "at the last loss": dict(make=EndsInside),
        "without the temperature": dict(make=HotEnd),
        "in pixels": dict(make=EndOfPixels),
    }
)
def test_the_end_term_starts_where_the_levels_end_and_is_as_hot_as_the_losses(
    make=BayesClassifier,
):
    """Three wide levels up to 2 and temperature 2.5: what moments add is the closed form at 2, over 2.5."""
    denoiser = denoiser_of("gaussians")
    means = denoiser.means.reshape(3, *SHAPE)
    traces = torch.tensor([0.3, 0.5, 0.9], dtype=torch.float64)
    levels = noise.log_levels(0.02, 2.0, 3)
    x = pixels("gaussians")
    drawn = draw(BayesClassifier(denoiser, levels), len(x), 0)
    options = dict(temperature=2.5, prior=[0.2, 0.3, 0.5])
    with torch.no_grad():
        added = make(denoiser, levels, moments=(means, traces), **options)(
            x, drawn
        ) - BayesClassifier(denoiser, levels, **options)(x, drawn)
    for b in range(len(x)):
        for k in range(3):
            square = float(((2 * x[b] - 1 - means[k]) ** 2).sum())
            trace = float(traces[k])
            end = -(square - trace) / (2 * (2.0**2 + trace / 2)) - math.log1p(trace / 2 / 2.0**2)
            assert float(added[b, k]) == pytest.approx(end / 2.5, abs=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


def plain_gradient(model, x):
    """By autograd, of the logit of class 0."""
    return torch.autograd.grad(model(x).select(1, 0).sum(), x)[0]


def check_gradient(model, x, gradient_of=plain_gradient):
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
            rise = model(x + push)[:, 0] - model(x - push)[:, 0]
            wanted.flatten(1)[:, index] = rise / (2 * step)
    assert float((got - wanted).abs().max() / wanted.abs().max()) < 1e-6


def through_softmax(model):
    """A head whose gradient passes through every class: log p of class 0."""
    return lambda x: torch.log_softmax(model(x), 1)


@pytest.mark.parametrize("name", ["overlapping", "mixtures"])
@pytest.mark.parametrize("make", [classifier, noised])
def test_autograd_equals_finite_differences(name, make):
    check_gradient(Held.seeded(make(name)), pixels(name))
    check_gradient(through_softmax(Held.seeded(make(name, chunk=17))), pixels(name))


class Cut(MixtureDenoiser):
    """A denoiser whose input is cut off from the picture."""

    def estimate(self, x_sigma, sigma, classes):
        return super().estimate(x_sigma.detach(), sigma, classes)


def detached(model, x):
    """A gradient through the target x0 alone: what a forward without gradients gives."""
    law = data.PLANE_LAWS["mixtures"]()
    whole = model.classifier
    cut = BayesClassifier(Cut.of_law(law), whole.levels, whole.samples)
    return plain_gradient(Held(cut, model.noise), x)


@twins.rejected(
    {
        "input detached": dict(gradient_of=detached),
        "pixels for model units": dict(gradient_of=twins.scaled(plain_gradient, 0.5)),
    }
)
def test_the_gradient_of_a_mixture(gradient_of=plain_gradient):
    """The gradient of a Bayes classifier against central differences."""
    check_gradient(Held.seeded(classifier("mixtures")), pixels("mixtures"), gradient_of)


@pytest.mark.parametrize("make", [classifier, noised])
def test_chunks_change_neither_logits_nor_gradient(make):
    results = []
    for chunk in (1 << 20, 50, 9, 2):  # two are fewer than the classes: a row at a time
        x = pixels("mixtures").requires_grad_(True)
        logits = Held.seeded(make("mixtures", chunk=chunk))(x)
        results.append((logits.detach(), torch.autograd.grad(logits[:, 0].sum(), x)[0]))
    for other in results[1:]:
        for whole, parts in zip(results[0], other, strict=True):
            assert float((whole - parts).abs().max() / whole.abs().max()) < 1e-12


def test_gradients_reach_the_network_too():
    denoiser = small_network()
    model = BayesClassifier(denoiser, noise.log_levels(0.1, 3, 4), chunk=8)
    x = torch.rand(2, 1, 8, 8, generator=seeded())
    model(x, draw(model, 2, 0))[:, 0].sum().backward()
    assert float(denoiser.network.leave[-1].weight.grad.abs().max()) > 0


# ---------------------------------------------------------------------------------------------------------------------
# Invariances


@pytest.mark.parametrize("make", [classifier, noised])
def test_logits_do_not_depend_on_the_batch(make):
    model = make("mixtures")
    x = pixels("mixtures", 5)
    drawn = draw(model, 5, 2)
    every = model(x, drawn)
    alone = [model(x[i : i + 1], drawn[i : i + 1]) for i in range(5)]
    assert torch.allclose(torch.cat(alone), every, rtol=1e-12)
    assert torch.allclose(model(x.flip(0), drawn.flip(0)).flip(0), every, rtol=1e-12)
    held = Held.seeded(model)
    assert torch.allclose(torch.cat([held(one[None]) for one in x]), held(x), rtol=1e-12)


def test_permuting_the_classes_permutes_the_logits():
    law = data.mixtures()  # old class -> new class
    order = torch.tensor([2, 0, 1])
    renamed = MixtureDenoiser(
        law.means[:, :, None, None], law.scales, law.weights, order[law.labels]
    )
    x = pixels("mixtures")
    prior = torch.tensor([0.5, 0.3, 0.2])
    moved = BayesClassifier(renamed, LEVELS, 4, prior=prior.tolist())
    plain = classifier("mixtures", prior=prior[order].tolist())
    drawn = draw(plain, 4, 0)
    assert torch.allclose(moved(x, drawn)[:, order], plain(x, drawn), atol=1e-9)


def test_two_identical_classes_differ_by_exactly_nothing():
    means = torch.tensor([[0.3, 0.1], [0.3, 0.1], [-0.4, 0.2]], dtype=torch.float64)[
        :, :, None, None
    ]
    same = MixtureDenoiser(means, [0.1] * 3, [1.0] * 3, [0, 1, 2])
    model = BayesClassifier(same, LEVELS, 4)
    for x in (pixels(), pixels().float()):
        for own in (Held.seeded(model, 8), Fresh(model, seeded())):
            logits = own(x)
            assert torch.equal(logits[:, 0], logits[:, 1])
            assert not torch.equal(logits[:, 0], logits[:, 2])


def test_train_and_eval_are_one_function():
    model = Held.seeded(classifier())
    x = pixels()
    assert torch.equal(model.train()(x), model.eval()(x))


# ---------------------------------------------------------------------------------------------------------------------
# Randomness as declared


def test_a_held_noise_is_deterministic_and_touches_no_global_state():
    model = Held.seeded(classifier())
    x = pixels()
    before = torch.get_rng_state()
    assert model.deterministic and torch.equal(model(x), model(x))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(model(x), Held.seeded(classifier(), 1)(x))


def test_fresh_noise_differs_by_call_and_image_and_repeats_with_the_generator():
    model = classifier()
    x = pixels()[:1].expand(3, -1, -1, -1)
    random = Fresh(model, seeded(4))
    first = random(x)
    second = random(x)
    again = Fresh(model, seeded(4))(x)
    held = Held.seeded(model)
    assert not model.deterministic and held.deterministic
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert not torch.equal(first[0], first[1]) and torch.equal(held(x)[0], held(x)[1])
    assert "samples=4" in repr(model) and "elbo_weight" in repr(model)


def test_fresh_noise_scatters_around_the_truth():
    """The mean of many random classifiers is the exact log-odds, within 4.5 standard errors plus the levels' cut."""
    x = pixels()[:1]
    denoiser = denoiser_of("overlapping")
    model = BayesClassifier(denoiser, noise.log_levels(0.002, 100, 64))
    with torch.no_grad():
        drawn = Fresh(model, seeded())(x.expand(400, -1, -1, -1))
    odds = drawn.diff(dim=1)
    truth = ExactClassifier(denoiser)(x).diff(dim=1)
    assert bool(((odds.mean(0) - truth).abs() < 4.5 * odds.std(0) / 20 + 1e-3).all())


def test_the_noised_classifier_draws_its_own_noise_for_each_vote():
    x = pixels()[:1].expand(3, -1, -1, -1)
    model = noised()
    logits = Fresh(model, seeded(1))(x)
    assert not torch.equal(logits[0], logits[1]) and not model.deterministic
    assert torch.equal(Fresh(noised(), seeded(1))(x), logits)
    held = Held.seeded(model)
    assert torch.equal(held(x)[0], held(x)[1]) and held.deterministic


def test_the_noised_classifier_is_bayes_rule_on_noised_points():
    denoiser = denoiser_of("gaussians")
    x = pixels("gaussians", 60)
    x_tau = x + 0.2 * torch.randn(x.shape, generator=seeded(2), dtype=torch.float64)
    prior = [0.2, 0.3, 0.5]
    model = NoisedBayesClassifier(denoiser, 0.2, levels=48, high=50.0, samples=48, prior=prior)
    truth = ExactClassifier(denoiser, prior, sigma_pixel=0.2)
    with torch.no_grad():
        found = torch.softmax(Held.seeded(model)(x_tau.float()), 1)
        off = found - torch.softmax(truth(x_tau), 1)
    assert float(off.abs().sum(1).mean() / 2) < 0.03


def test_the_levels_of_a_noised_image_end_at_5_and_further_the_more_they_are():
    """5 for up to 8 levels, then in proportion, never above what the denoiser can be trusted with."""
    denoiser = denoiser_of("gaussians")
    ends = [
        float(NoisedBayesClassifier(denoiser, 0.2, levels=count).levels.upper[-1])
        for count in (1, 4, 8, 12, 16)
    ]
    assert ends == pytest.approx([5, 5, 5, 7.5, 10])
    denoiser.sigma_range = (0.01, 6.0)
    model = NoisedBayesClassifier(denoiser, 0.2, levels=16)
    assert float(model.levels.upper[-1]) == pytest.approx(6)


def logits_of_noised(x_tau, drawn, levels, *, to_model=units.sigma_to_model):
    """The logits of a classifier of noise 0.2, by the library."""
    build = twins.patched(NoisedBayesClassifier, units, sigma_to_model=to_model)
    model = build(denoiser_of("gaussians"), 0.2, levels=levels, high=3.0, prior=[0.2, 0.3, 0.5])
    return twins.patched(model, units, sigma_to_model=to_model)(x_tau, drawn)


def first_level_not_above(x_tau, drawn, levels):
    """The slip whose levels are right and whose formula takes the noise for that of pixels."""
    model = NoisedBayesClassifier(
        denoiser_of("gaussians"), 0.2, levels=levels, high=3.0, prior=[0.2, 0.3, 0.5]
    )
    return twins.patched(model, units, sigma_to_model=lambda sigma: sigma)(x_tau, drawn)


@twins.rejected(
    {
        "sigma_tau in pixels": dict(
            logits_of=lambda *given: logits_of_noised(*given, to_model=lambda sigma: sigma)
        ),
        "sigma_tau in pixels in the formula alone": dict(logits_of=first_level_not_above),
    }
)
def test_the_noised_classifier_is_epndc_written_out(logits_of=logits_of_noised):
    """Classes N(m_k, s_k^2 I) and noise 0.2 on pixels, 0.4 in model units: every term by its formula, one by one."""
    law = data.gaussians()
    x = pixels("gaussians")
    x_tau = x + 0.2 * torch.randn(x.shape, generator=seeded(2), dtype=torch.float64)
    count = 5
    drawn = torch.randn((len(x), count, 1, *SHAPE), generator=seeded(3), dtype=torch.float64)
    with torch.no_grad():
        logits = logits_of(x_tau, drawn, count)
    tau = 0.4
    first = 0.4 * tau  # 2/5 of the noise that is there
    last = math.sqrt(3.0**2 - tau**2)
    ratio = (last / first) ** (1 / count)
    for b in range(len(x)):
        z = (2 * x_tau[b] - 1).flatten()
        for k in range(3):
            mean = law.means[k].double()
            variance = float(law.scales[k]) ** 2
            wanted = math.log([0.2, 0.3, 0.5][k])
            for t in range(count):
                low = math.hypot(tau, first * ratio**t)
                high = math.hypot(tau, first * ratio ** (t + 1))
                r = first * ratio ** (t + 0.5)
                sigma = math.hypot(tau, r)
                eps = drawn[b, t, 0].flatten()
                denoised = mean + variance / (variance + sigma**2) * (z + r * eps - mean)
                gap = z - tau**2 / r * eps - denoised
                error = float((gap**2).sum() - (tau**2 / r) ** 2 * (eps**2).sum())
                wanted -= math.log(high / low) / sigma**2 * error
            assert float(logits[b, k]) == pytest.approx(wanted, rel=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# What it declares


def test_at_levels_spreads_others_between_the_same_ends():
    model = classifier(prior=[0.5, 0.3, 0.2], temperature=2.0, weighting=noise.edm_weight)
    assert model.level_counts == (12, 48) and model.calls == 24 * 4 * 3
    for count in model.level_counts:
        other = model.at_levels(count)
        wanted = noise.log_levels(0.02, 20, count)
        assert torch.allclose(other.levels.sigma, wanted.sigma, rtol=1e-12)
        assert other.calls == count * 4 * 3
        assert (other.temperature, other.weighting, other.samples) == (2.0, noise.edm_weight, 4)
        assert torch.allclose(other.log_prior, model.log_prior, atol=1e-12)
    thin = noised(prior=[0.5, 0.3, 0.2]).at_levels(4)
    assert len(thin.levels) == 4 and thin.calls == 4 * 4 * 3 and thin.sigma_pixel == 0.2
    for own in (model, noised()):
        with pytest.raises(ValueError, match=r"offers, one of \(\d+, \d+\), got 7"):
            own.at_levels(7)
    with pytest.raises(ValueError, match="ExactClassifier has no noise levels"):
        ExactClassifier(denoiser_of("overlapping")).at_levels(2)
    assert BayesClassifier(small_network(), LEVELS).calls == 24, "one call answers for all classes"


def test_a_single_level_can_only_be_doubled():
    assert classifier().changed(levels=noise.log_levels(0.1, 1.0, 1)).level_counts == (2,)


def test_routes_are_uniform_weights_and_the_telescoped_gradient():
    x = pixels()
    model = classifier()
    drawn = draw(model, 4, 0)
    routes = model.routes()
    assert set(routes) == {"uniform weights", "the telescoped gradient"}
    uniform = model.changed(weighting=noise.unit_weight)
    assert torch.equal(routes["uniform weights"](x, drawn), uniform(x, drawn))
    assert set(uniform.routes()) == set(), "its own route is none"
    assert set(model.changed(weighting=noise.edm_weight).routes()) == {"uniform weights"}
    leaf = x.clone().requires_grad_()
    logits = routes["the telescoped gradient"](leaf, drawn)
    slope = torch.autograd.grad(logits[:, 1].sum(), leaf)[0]
    eps = torch.randn((8, 1, *SHAPE), generator=seeded())
    wanted = likelihood.telescoped_gradient(model.denoiser, units.to_model(x), 0.02, 20.0, eps)
    assert torch.equal(logits.detach(), model(x, drawn))
    assert torch.allclose(slope, 2 * wanted[:, 1], rtol=1e-9)


def test_only_the_gradient_of_an_elbo_telescopes():
    with pytest.raises(ValueError, match="expected a classifier with ELBO weights.*got edm_weight"):
        telescoped(classifier(weighting=noise.edm_weight), 4)


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
    model = classifier()
    asked = [
        lambda x: model(x, draw(model, 4, 0)),
        Held.seeded(model),
        Fresh(model, seeded()),
        ExactClassifier(denoiser_of("overlapping")),
    ]
    x = (
        0.99 * pixels() / pixels().max()
    )  # spread over [0,1], so that each mistake looks like itself
    x[0, 0] = 0.01
    for ask in asked:
        with pytest.raises(error, match=sentence):
            ask(change(x))


@pytest.mark.parametrize("temperature", [0, -1, math.nan])
def test_impossible_temperatures_get_a_sentence(temperature):
    with pytest.raises(ValueError, match="expected a temperature > 0, got"):
        classifier(temperature=temperature)


@pytest.mark.parametrize(
    "make",
    [
        lambda denoiser: BayesClassifier(denoiser, LEVELS, 0),
        lambda denoiser: NoisedBayesClassifier(denoiser, 0.2, samples=0),
    ],
)
def test_a_level_needs_a_sample(make):
    with pytest.raises(ValueError, match="expected at least one noise sample a level, got 0"):
        make(denoiser_of("overlapping"))


def test_parts_that_do_not_fit_get_a_sentence():
    denoiser = denoiser_of("overlapping")
    model = classifier()
    digits = BayesClassifier(small_network(), LEVELS, 4)
    with pytest.raises(
        ValueError,
        match=r"expected noise of shape \[B,24,4,2,1,1\] for BayesClassifier, got \[B,24,4,1,8,8\]",
    ):
        model(pixels(), draw(digits, 4, 0))
    with pytest.raises(ValueError, match=r"got \(\); draw it with classifier.sample_noise"):
        model(pixels())
    with pytest.raises(ValueError, match=r"expected noise of shape \(\) for ExactClassifier"):
        ExactClassifier(denoiser)(pixels(), draw(model, 4, 0))
    with pytest.raises(
        TypeError, match="expected a denoiser with a closed-form density, got MultiHeadDenoiser"
    ):
        ExactClassifier(small_network())
    with pytest.raises(ValueError, match="expected a finite noise level sigma_pixel > 0, got 0"):
        NoisedBayesClassifier(denoiser, 0.0)
    with pytest.raises(ValueError, match="expected 0 < sigma_tau < high"):
        NoisedBayesClassifier(denoiser, 0.5, high=0.9)
    for build in (
        lambda sigma: NoisedBayesClassifier(denoiser, sigma),
        lambda sigma: ExactClassifier(denoiser, sigma_pixel=sigma),
    ):
        with pytest.raises(ValueError, match="at most 1, got 12; did you mean 12/255"):
            build(12)
        with pytest.raises(ValueError, match="finite noise level sigma_pixel > 0, got nan"):
            build(math.nan)
        with pytest.raises(ValueError, match="finite noise level sigma_pixel > 0, got -0.1"):
            build(-0.1)
    assert ExactClassifier(denoiser, sigma_pixel=0).sigma_pixel is None
    with pytest.raises(ValueError, match="expected finite images"):
        Held.seeded(noised())(pixels() * math.nan)
