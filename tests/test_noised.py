"""Classifiers of noised pictures: what each formula estimates, by quadrature where the truth is known, and what it costs."""

import math

import pytest
import torch
import twins
from diffclass import data, likelihood, noise, units
from diffclass.classifiers.base import Held
from diffclass.classifiers.bayes import BayesClassifier, ExactClassifier
from diffclass.classifiers.cnn import ConvClassifier
from diffclass.classifiers.mirrored import Mirrored
from diffclass.classifiers.noised import (
    FORMS,
    ApproximateNoisedClassifier,
    NoisedBayesClassifier,
    TrainedOnNoise,
    carried_sigma,
)
from diffclass.classifiers.one_call import (
    NearestHeadClassifier,
    NoisedOneCallClassifier,
    OneCallClassifier,
)
from diffclass.classifiers.purified import (
    Denoising,
    Purification,
    PurifiedClassifier,
    Restoration,
)
from diffclass.classifiers.smoothed import Smoothed
from diffclass.classifiers.votes import MajorityVote
from diffclass.denoisers import network
from diffclass.denoisers.exact import MixtureDenoiser
from diffclass.noise import Levels, NoiseBank
from numpy.polynomial import hermite_e, legendre

PLANE = (2, 1, 1)
DIGIT = (1, 8, 8)


def seeded(seed=0):
    """A generator with a seed."""
    return torch.Generator().manual_seed(seed)


def exact(name):
    """The exact denoiser of a law of the plane."""
    return MixtureDenoiser.of_law(data.PLANE_LAWS[name]())


def noised_points(name, count, tau, seed=4):
    """Points of a law with noise tau on them, in model space, and their classes."""
    x, y = data.PLANE_LAWS[name]().sample(count, seeded(seed), torch.float64)
    eps = torch.randn(x.shape, generator=seeded(seed + 1), dtype=torch.float64)
    return units.to_model(x) + tau * eps, y


def log_prior(name):
    """The prior of a law."""
    return torch.as_tensor(data.PLANE_LAWS[name]().priors).double().log()


def centred(values):
    """Values less their mean over the classes."""
    return values - values.mean(-1, keepdim=True)


# ---------------------------------------------------------------------------------------------------------------------
# Quadrature: the noise of a point by Gauss and Hermite, the levels by Gauss and Legendre


def gauss_hermite(count):
    """Nodes [n,2,1,1] and their shares [n] of two independent normal numbers; those without weight left out."""
    nodes, weights = map(torch.from_numpy, hermite_e.hermegauss(count))
    share = torch.outer(weights, weights).flatten() / weights.sum() ** 2
    kept = share > 1e-18
    eps = torch.cartesian_prod(nodes, nodes)[kept].reshape(-1, *PLANE)
    return eps, share[kept] / share[kept].sum()


def gauss_legendre(low, high, count):
    """Levels between two ends, and the weighting sigma^-3 d sigma integrated there to machine precision."""
    nodes, weights = map(torch.from_numpy, legendre.leggauss(count))
    half = math.log(high / low) / 2
    sigma = low * (half * (nodes + 1)).exp()
    between = (sigma[:-1] * sigma[1:]).sqrt()
    ends = torch.tensor([[low], [high]], dtype=torch.float64)
    levels = Levels(sigma, torch.cat([ends[0], between]), torch.cat([between, ends[1]]))
    return levels, lambda levels: levels.sigma**-2 * half * weights.to(levels.sigma)


def by_quadrature(estimate, denoiser, z_tau, tau, levels, weighting, count=48):
    """An estimate of likelihoods, its noise averaged by quadrature. Shapes: z_tau [B,2,1,1] -> [B,K]."""
    eps, share = gauss_hermite(count)
    bank = NoiseBank(levels, eps.reshape(1, 1, -1, *PLANE).expand(len(levels), -1, -1, -1, -1, -1))
    with torch.no_grad():
        rows = [
            share
            @ estimate(
                denoiser,
                z.expand(len(eps), -1, -1, -1),
                tau,
                bank,
                weighting,
                chunk=1 << 16,
            )
            for z in z_tau
        ]
    return torch.stack(rows)


def mean_density(denoiser, centre, sigma, count=48):
    """E log p_sigma(centre + sigma eps | k). Shapes: centre [B,2,1,1] -> [B,K]."""
    eps, share = gauss_hermite(count)
    rows = [share @ denoiser.log_density(one + sigma * eps, sigma) for one in centre]
    return torch.stack(rows)


def not_denoised(denoiser, z_tau, tau, bank, weighting, chunk):
    """A plain diffusion classifier of the noised image."""
    return likelihood.elbo(denoiser, z_tau, bank, weighting, chunk=chunk)


def first_class_denoises(denoiser, z_tau, tau, bank, weighting, chunk):
    """The image denoised under class 0."""
    clean = denoiser(z_tau, tau, [0])[:, 0]
    return likelihood.elbo(denoiser, clean, bank, weighting, chunk=chunk)


def denoised_at_the_first_level(denoiser, z_tau, tau, bank, weighting, chunk):
    """The image denoised at another level than that of its noise."""
    clean = denoiser.unconditional(z_tau, 2 * tau)
    return likelihood.elbo(denoiser, clean, bank, weighting, chunk=chunk)


def r_for_sigma(denoiser, z_tau, tau, bank, weighting, chunk):
    """Around the denoised image, the noise that would be added to the noised one."""
    clean = denoiser.unconditional(z_tau, tau)
    spread = (bank.sigma**2 - tau**2).sqrt()
    still = torch.zeros_like(spread)
    errors = likelihood._errors(denoiser, clean, bank, spread, still, None, chunk)
    return likelihood.evidence(errors.mean(-1), bank.levels, weighting)


@twins.rejected(
    {
        "not denoised": dict(estimate=not_denoised),
        "denoised under a class": dict(estimate=first_class_denoises),
        "denoised at another level": dict(estimate=denoised_at_the_first_level),
        "r for sigma": dict(estimate=r_for_sigma),
        "the path": dict(estimate=likelihood.denoised_target_elbo),
        "the exact posterior": dict(estimate=likelihood.noised_elbo),
    }
)
def test_the_ensemble_is_the_mean_density_around_the_denoised_image(
    estimate=likelihood.denoised_elbo,
):
    """Both sides of the identity, constant included: 1e-12 where the quadrature is, 1e-9 for narrow mixtures.

    -int_tau^s sigma^-3 E||x^ - D_k||^2 = E log p_tau(x^ + tau eps | k) - E log p_s(x^ + s eps | k) - D ln(s/tau)
    """
    for name, tau, tolerance in (
        ("gaussians", 0.5, 1e-12),
        ("overlapping", 0.5, 1e-12),
        ("mixtures", 0.5, 1e-9),
    ):
        denoiser = exact(name)
        z_tau, _ = noised_points(name, 2, tau)
        top = 50.0
        levels, weighting = gauss_legendre(tau, top, 96)
        got = by_quadrature(estimate, denoiser, z_tau, tau, levels, weighting)
        clean = denoiser.unconditional(z_tau, tau)
        wanted = mean_density(denoiser, clean, tau) - mean_density(denoiser, clean, top)
        off = got - (wanted - 2 * math.log(top / tau))
        assert float(off.abs().max()) < tolerance, (name, off)


def noised_target(denoiser, z_tau, tau, bank, weighting, chunk):
    """The noised image itself as the target, without the correction of EPNDC."""
    spread = (bank.sigma**2 - tau**2).sqrt()
    still = torch.zeros_like(spread)
    errors = likelihood._errors(denoiser, z_tau, bank, spread, still, None, chunk)
    return likelihood.evidence(errors.mean(-1), bank.levels, weighting)


@twins.rejected(
    {
        "the noised image as the target": dict(estimate=noised_target),
        "the ensemble": dict(estimate=likelihood.denoised_elbo),
        "the path": dict(estimate=likelihood.denoised_target_elbo),
    }
)
def test_epndc_is_the_density_of_the_noised_image(estimate=likelihood.noised_elbo):
    """What lies below r = 0.01 and above 500 left out, classes differ as log p_tau(z_tau | k) does, to 2.4e-3."""
    tau = 0.5
    first = 0.01
    for name in ("gaussians", "mixtures"):
        denoiser = exact(name)
        z_tau, _ = noised_points(name, 3, tau)
        added, _ = gauss_legendre(first, 500.0, 200)
        sigma_of = [(tau**2 + r**2).sqrt() for r in (added.sigma, added.lower, added.upper)]
        levels = Levels(*sigma_of)
        _, weights = map(torch.from_numpy, legendre.leggauss(200))
        half = math.log(500 / first) / 2

        def weighting(levels, half=half, weights=weights):
            # d sigma = (r^2 / sigma) d ln r
            return levels.sigma**-4 * (levels.sigma**2 - tau**2) * half * weights

        got = by_quadrature(estimate, denoiser, z_tau, tau, levels, weighting)
        off = centred(got) - centred(denoiser.log_density(z_tau, tau))
        assert float(off.abs().max()) < 2.4e-3, (name, off)


def test_the_discrete_chain_comes_to_the_density_as_its_steps_shrink():
    """Class differences of the discrete bound without its first step: the error falls with the steps."""
    tau = 0.5
    denoiser = exact("gaussians")
    z_tau, _ = noised_points("gaussians", 3, tau)
    truth = centred(denoiser.log_density(z_tau, tau))
    off = []
    for steps in (10, 100, 1000):
        r = torch.logspace(math.log10(0.03), math.log10(50), steps + 1, dtype=torch.float64)
        levels = noise.chain_levels((tau**2 + r**2).sqrt())
        weighting = likelihood.noised_weight(tau)
        got = by_quadrature(
            likelihood.noised_elbo, denoiser, z_tau, tau, levels, weighting, count=16
        )
        off.append(float((centred(got) - truth).abs().max()))
    assert off[0] > 4 * off[1] > 16 * off[2] and off[2] < 0.014, off


# ---------------------------------------------------------------------------------------------------------------------
# The path, term by term


def written_out(denoiser, z_tau, tau, bank, own):
    """- sum_t w_t mean_s ||x^ - D_k(z_tau + r eps, sigma_t)||^2, one term after the other."""
    total = torch.zeros(len(z_tau), denoiser.num_classes, dtype=torch.float64)
    for sigma, low, up, draws in zip(bank.sigma, bank.lower, bank.upper, bank.noise, strict=True):
        for eps in draws:
            for k in range(denoiser.num_classes):
                clean = denoiser(z_tau, tau, [k if own else denoiser.num_classes])[:, 0]
                further = z_tau + math.sqrt(sigma**2 - tau**2) * eps
                gap = clean - denoiser(further, float(sigma), [k])[:, 0]
                term = math.log(up / low) / sigma**2 * gap.flatten(1).square().sum(1)
                total[:, k] -= term / len(draws)
    return total


def shifted_target(denoiser, z_tau, tau, bank):
    """EPNDC's shift, kept where the denoised image is the target."""
    spread = (bank.sigma**2 - tau**2).sqrt()
    clean = denoiser.unconditional(z_tau, tau)[:, None]
    errors = likelihood._errors(denoiser, z_tau, bank, spread, tau**2 / spread, None, 4096, clean)
    return likelihood.evidence(errors.mean(-1), bank.levels)


@twins.rejected(
    {
        "the ensemble": dict(path=likelihood.denoised_elbo),
        "each class by its own": dict(path=likelihood.own_target_elbo),
        "EPNDC's shift kept": dict(path=shifted_target),
        "all by one for each by its own": dict(own=likelihood.denoised_target_elbo),
    }
)
def test_the_paths_are_their_formulas(
    path=likelihood.denoised_target_elbo, own=likelihood.own_target_elbo
):
    tau = 0.4
    denoiser = exact("mixtures")
    z_tau, _ = noised_points("mixtures", 3, tau)
    levels = noise.log_levels(tau, 5.0, 4)
    bank = NoiseBank.fresh(levels, PLANE, 3, seeded(1), 2, torch.float64)
    for formula, each in ((path, False), (own, True)):
        got = formula(denoiser, z_tau, tau, bank)
        wanted = written_out(denoiser, z_tau, tau, bank, each)
        assert float((got - wanted).abs().max()) < 1e-10


@pytest.mark.parametrize("form", FORMS)
def test_named_classes_small_chunks_and_gradients(form):
    """Some classes are a slice of all, a chunk changes neither value nor gradient, and that is of finite differences."""
    formula, _ = FORMS[form]
    tau = 0.4
    denoiser = exact("mixtures")
    z_tau, _ = noised_points("mixtures", 2, tau)
    bank = NoiseBank.fixed(noise.log_levels(tau, 5.0, 3), PLANE, 2, dtype=torch.float64)
    every = formula(denoiser, z_tau, tau, bank)
    some = formula(denoiser, z_tau, tau, bank, classes=[2, 0])
    assert float((some - every[:, [2, 0]]).abs().max()) < 1e-12
    slopes = []
    for chunk in (1 << 20, 5):
        leaf = z_tau.clone().requires_grad_()
        value = formula(denoiser, leaf, tau, bank, chunk=chunk)
        slopes.append(torch.autograd.grad((value * torch.tensor([1.0, -2.0, 0.5])).sum(), leaf)[0])
        assert float((value.detach() - every).abs().max()) < 1e-10
    assert float((slopes[0] - slopes[1]).abs().max()) < 1e-9

    def of(z):
        return formula(denoiser, z, tau, bank, chunk=5)

    leaf = z_tau.clone().requires_grad_()
    assert torch.autograd.gradcheck(of, (leaf,), eps=1e-6, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# What they decide, and what they cost


def ensemble_decisions(name, z_tau, tau):
    """What the mean density around the denoised image decides, without any noise."""
    denoiser = exact(name)
    clean = denoiser.unconditional(z_tau, tau)
    apart = mean_density(denoiser, clean, tau, 24) - mean_density(denoiser, clean, 50.0, 24)
    return (apart + log_prior(name)).argmax(1)


def test_the_ensemble_decides_otherwise_than_bayes_rule():
    """With exact denoisers, levels and noise: it agrees on all points of three Gaussians, on three quarters of mixtures."""
    agreed = {}
    for name in ("gaussians", "moons", "mixtures"):
        z_tau, _ = noised_points(name, 300, 0.5)
        truth = (exact(name).log_density(z_tau, 0.5) + log_prior(name)).argmax(1)
        agreed[name] = float((ensemble_decisions(name, z_tau, 0.5) == truth).double().mean())
    assert agreed["gaussians"] == 1
    assert 0.85 < agreed["moons"] < 0.96 and 0.65 < agreed["mixtures"] < 0.85, agreed


def test_the_classifiers_decide_as_their_formulas_mean():
    """By many levels and noises: the exact posterior that of the law, the ensemble that of the mean density."""
    z_tau, _ = noised_points("moons", 200, 0.5)
    denoiser = exact("moons")
    options = dict(levels=16, high=20.0, samples=64, prior=log_prior("moons").exp())
    x_tau = units.to_pixel(z_tau)
    truth = (denoiser.log_density(z_tau, 0.5) + log_prior("moons")).argmax(1)
    with torch.no_grad():
        epndc = NoisedBayesClassifier(denoiser, 0.25, **options)
        apndc = ApproximateNoisedClassifier(denoiser, 0.25, **options)
        found = Held.seeded(epndc)(x_tau).argmax(1)
        around = Held.seeded(apndc)(x_tau).argmax(1)
    assert float((found == truth).double().mean()) > 0.95
    assert float((around == ensemble_decisions("moons", z_tau, 0.5)).double().mean()) > 0.97
    assert 0.85 < float((around == truth).double().mean()) < 0.96


def test_a_class_that_is_held_to_its_own_answers_wins_by_being_steady():
    """On mixtures the own path is wrong more often than chance: narrow classes of few images win wherever they are."""
    z_tau, _ = noised_points("mixtures", 200, 0.5)
    denoiser = exact("mixtures")
    truth = (denoiser.log_density(z_tau, 0.5) + log_prior("mixtures")).argmax(1)
    share = {}
    for form in ("path", "own path"):
        model = ApproximateNoisedClassifier(denoiser, 0.25, form=form, levels=12, samples=32)
        with torch.no_grad():
            found = Held.seeded(model)(units.to_pixel(z_tau)).argmax(1)
        share[form] = float((found == truth).double().mean())
    assert share["path"] > 0.8 and share["own path"] < 1 / 3, share


class Counting(MixtureDenoiser):
    """A mixture that counts the images that it denoises, once for each class."""

    asked = 0

    def estimate(self, x_sigma, sigma, classes):
        """As the mixture, counted."""
        self.asked += len(x_sigma) * len(classes)
        return super().estimate(x_sigma, sigma, classes)


def test_the_approximation_costs_the_exact_one_and_one_call():
    denoiser = Counting.of_law(data.gaussians())
    x = torch.rand((1, *PLANE), generator=seeded(2))
    options = dict(levels=5, samples=2)
    models = {
        form: ApproximateNoisedClassifier(denoiser, 0.2, form=form, **options) for form in FORMS
    }
    models["exact"] = NoisedBayesClassifier(denoiser, 0.2, **options)
    spent = {}
    for name, model in models.items():
        denoiser.asked = 0
        Held.seeded(model)(x)
        spent[name] = denoiser.asked
        assert model.calls == spent[name], name
    assert spent["exact"] == 5 * 2 * 3
    assert spent["ensemble"] == spent["path"] == spent["exact"] + 1
    assert spent["own path"] == spent["exact"] + 3
    heads = network.build("MultiHeadDenoiser", "DigitNet", 10, DIGIT, width=16, blocks=1)
    assert ApproximateNoisedClassifier(heads, 0.2).calls == 8 + 1
    assert NoisedBayesClassifier(heads, 0.2).calls == 8


@pytest.mark.parametrize("form", ["EPNDC", "ensemble", "path", "own path"])
def test_without_noise_they_are_the_plain_classifier(form):
    """sigma_tau -> 0 under the same noise and levels: the plain diffusion classifier to 1e-6, and falling with it."""
    denoiser = exact("mixtures")
    x = data.mixtures().sample(4, seeded(3), torch.float64)[0]
    z = units.to_model(x)
    bank = NoiseBank.fixed(noise.log_levels(0.1, 5.0, 6), PLANE, 2, dtype=torch.float64)
    plain = likelihood.elbo(denoiser, z, bank)
    formula = likelihood.noised_elbo if form == "EPNDC" else FORMS[form][0]
    off = [
        float((formula(denoiser, z, tau, bank) - plain).abs().max()) for tau in (1e-2, 1e-4, 1e-6)
    ]
    assert off[0] > 10 * off[1] > 100 * off[2] and off[2] < 1e-6, off


@pytest.mark.parametrize("form", ["EPNDC", "ensemble", "path"])
def test_a_classifier_of_nearly_no_noise_is_the_plain_classifier(form):
    """The classifier with its own levels, which reach down to its noise."""
    denoiser = exact("mixtures")
    x = data.mixtures().sample(4, seeded(3), torch.float64)[0]
    sigma_pixel = 5e-10
    denoiser.sigma_range = (1e-10, 100.0)
    if form == "EPNDC":
        model = NoisedBayesClassifier(denoiser, sigma_pixel, levels=12)
    else:
        model = ApproximateNoisedClassifier(denoiser, sigma_pixel, form=form, levels=12)
    drawn = model.sample_noise(4, seeded(1)).double()
    plain = BayesClassifier(denoiser, model.levels)
    off = centred(model(x, drawn)) - centred(plain(x, drawn))
    assert float(off.abs().max()) < 1e-6, off


# ---------------------------------------------------------------------------------------------------------------------
# One call


@pytest.mark.parametrize("law", ["gaussians", "moons", "imbalanced"])
@pytest.mark.parametrize("sigma_pixel", [0.15, 0.5])
def test_one_call_is_the_posterior_of_the_picture_that_it_is_given(law, sigma_pixel):
    denoiser = exact(law)
    z_tau, _ = noised_points(law, 100, 2 * sigma_pixel)
    model = NoisedOneCallClassifier(denoiser, sigma_pixel)
    truth = (denoiser.log_density(z_tau, 2 * sigma_pixel) + log_prior(law)).softmax(1)
    got = model(units.to_pixel(z_tau))
    assert float((got.exp() - truth).abs().max()) < 1e-8
    assert model.deterministic and model.calls == denoiser.num_classes + 1
    assert torch.equal(got, model(units.to_pixel(z_tau)))


def test_one_call_adds_no_noise_of_its_own():
    """It is the classifier that adds noise, asked about the clean picture under the noise that is on it."""
    denoiser = exact("moons")
    x = data.moons().sample(5, seeded(), torch.float64)[0]
    clean = OneCallClassifier(denoiser, 0.6)
    eps = clean.sample_noise(5, seeded(1)).double()
    model = NoisedOneCallClassifier(denoiser, 0.3)
    torch.testing.assert_close(model(x + 0.3 * eps), clean(x, eps), rtol=0, atol=1e-9)
    for side, route in model.routes().items():
        assert torch.equal(route(x), model(x)), side
        assert route.sigma_pixel == 0.3 and route.routes() == {}


def nearest_head(denoiser, tau, z_tau):
    """The library's scores of noised points in model space."""
    return NearestHeadClassifier(denoiser, tau / 2)(units.to_pixel(z_tau))


def mean_of_the_heads(denoiser, tau, z_tau):
    """The distance to the plain mean of the heads, whatever the posterior is."""
    heads = denoiser(z_tau, tau)
    return -(heads - heads.mean(1, keepdim=True)).flatten(2).square().sum(-1) / tau**2


@twins.rejected(
    {
        "noise in pixels": dict(scores=lambda denoiser, tau, z: nearest_head(denoiser, tau / 2, z)),
        "distance for its square": dict(scores=lambda *given: -(-nearest_head(*given)).sqrt()),
        "the mean of the heads": dict(scores=mean_of_the_heads),
    }
)
def test_the_nearest_head_is_the_flattest_posterior(scores=nearest_head):
    """logit_k = -tau^2 ||grad log p(k | z_tau)||^2, the gradient by autograd; for two classes Bayes' answer."""
    for name, count in (("gaussians", 30), ("moons", 300)):
        denoiser = exact(name)
        tau = 0.5
        z_tau, _ = noised_points(name, count, tau)
        logits = scores(denoiser, tau, z_tau)
        leaf = z_tau.clone().requires_grad_()
        log_posterior = (denoiser.log_density(leaf, tau) + log_prior(name)).log_softmax(1)
        for k in range(denoiser.num_classes):
            slope = torch.autograd.grad(log_posterior[:, k].sum(), leaf, retain_graph=True)[0]
            wanted = -(tau**2) * slope.flatten(1).square().sum(1)
            torch.testing.assert_close(logits[:, k], wanted, rtol=1e-6, atol=1e-9)
    assert torch.equal(logits.argmax(1), log_posterior.argmax(1)), "two classes"


def test_the_nearest_head_can_be_wrong_with_three_classes():
    """On three rings it nearly always is: the middle one has a flat posterior where the others are sure."""
    z_tau, _ = noised_points("rings", 300, 1.0)
    denoiser = exact("rings")
    truth = (denoiser.log_density(z_tau, 1.0) + log_prior("rings")).argmax(1)
    found = NearestHeadClassifier(denoiser, 0.5)(units.to_pixel(z_tau)).argmax(1)
    assert float((found == truth).double().mean()) < 0.2
    posterior = NoisedOneCallClassifier(denoiser, 0.5)(units.to_pixel(z_tau)).argmax(1)
    assert float((posterior == truth).double().mean()) > 0.95


# ---------------------------------------------------------------------------------------------------------------------
# Denoise, then classify


def denoised(denoiser, sigma_pixel, x_tau):
    """What the library makes of noised pictures before it classifies them."""
    return Denoising(denoiser, sigma_pixel)(x_tau, ())


@twins.rejected(
    {
        "noise in pixels": dict(
            denoise=lambda denoiser, sigma, x: denoised(denoiser, sigma / 2, x)
        ),
        "not clamped": dict(
            denoise=lambda denoiser, sigma, x: units.to_pixel(
                denoiser.unconditional(units.to_model(x), 2 * sigma)
            )
        ),
        "denoised twice": dict(
            denoise=lambda denoiser, sigma, x: denoised(
                denoiser, sigma, denoised(denoiser, sigma, x)
            )
        ),
    }
)
def test_denoising_is_the_mean_of_the_clean_pictures(denoise=denoised):
    """One Gaussian N(0, s^2) in model space: E[x0 | z_tau] = s^2 z_tau / (s^2 + tau^2), clamped to pixels."""
    scale = 1.5
    denoiser = MixtureDenoiser(
        torch.zeros(2, *PLANE), torch.full((2,), scale), torch.ones(2), torch.tensor([0, 1])
    )
    x_tau = torch.tensor([[0.7, -0.2], [1.9, 0.5]], dtype=torch.float64).reshape(2, *PLANE)
    share = scale**2 / (scale**2 + 0.6**2)
    wanted = ((share * (2 * x_tau - 1) + 1) / 2).clamp(0, 1)
    assert (
        float(wanted.max()) == 1
        and float((denoise(denoiser, 0.3, x_tau) - wanted).abs().max()) < 1e-12
    )


def test_denoised_smoothing_asks_about_the_denoised_picture():
    denoiser = exact("gaussians")
    x_tau = units.to_pixel(noised_points("gaussians", 5, 0.6)[0])
    behind = ExactClassifier(denoiser)
    model = PurifiedClassifier(Denoising(denoiser, 0.3), behind)
    assert torch.equal(model(x_tau), behind(denoised(denoiser, 0.3, x_tau)))
    assert model.sigma_pixel == 0.3 and model.deterministic and model.calls == 2
    assert Smoothed(model).sigma == 0.3


def in_model_units(denoiser, sigma_pixel, **options):
    """The twin that takes its noise for one in model units."""
    return Restoration(denoiser, sigma_pixel / 2, **options)


def from_elsewhere(denoiser, sigma_pixel, **options):
    """The twin that starts a level too high, as if the picture carried more noise than it does."""
    return Restoration(denoiser, 1.1 * sigma_pixel, **options)


@twins.rejected(
    {
        "noise in model units": dict(restoration=in_model_units),
        "a start too high": dict(restoration=from_elsewhere),
    }
)
def test_the_walk_from_a_noised_picture_is_that_of_diffpure(restoration=Restoration):
    """Purification of the clean picture is Restoration of the noised one, under the noise of the steps back."""
    denoiser = exact("mixtures")
    x = data.mixtures().sample(4, seeded(), torch.float64)[0]
    for stochastic in (True, False):
        whole = Purification(denoiser, 0.6, steps=5, stochastic=stochastic)
        drawn = whole.sample_noise(4, seeded(1)).double()
        back = restoration(denoiser, 0.3, steps=5, stochastic=stochastic)
        rest = back.sample_noise(4, seeded(2))
        assert (rest.shape[1] == 4) if stochastic else rest == ()
        got = back(x + 0.3 * drawn[:, 0], drawn[:, 1:] if stochastic else ())
        torch.testing.assert_close(got, whole(x, drawn), rtol=0, atol=1e-12)
    assert back.calls == 5 and back.sigma_pixel == 0.3


@twins.rejected(
    {
        "all walks alike": dict(noise_of=lambda drawn: drawn[:1].expand_as(drawn)),
        "steps without noise": dict(noise_of=torch.zeros_like),
        "too much noise in a step": dict(noise_of=lambda drawn: 1.2 * drawn),
    }
)
def test_the_mean_of_many_walks_is_what_denoising_answers(noise_of=torch.clone):
    """On one Gaussian, far from the edges: E[x0 | x_tau] by 60 steps and 4 000 walks."""
    denoiser = MixtureDenoiser(
        torch.zeros(2, *PLANE),
        torch.full((2,), 0.15),
        torch.ones(2),
        torch.tensor([0, 1]),
    )
    walk = Restoration(denoiser, 0.1, steps=60, low=0.002)
    x_tau = torch.tensor([0.58, 0.45], dtype=torch.float64).reshape(1, *PLANE)
    drawn = noise_of(walk.sample_noise(4000, seeded(3)).double())
    ends = walk(x_tau.expand(4000, -1, -1, -1), drawn)
    at_once = Denoising(denoiser, 0.1)(x_tau, ())
    assert float((ends.mean(0) - at_once[0]).abs().max()) < 5e-3
    posterior = 0.15 * 0.2 / math.hypot(0.15, 0.2) / 2
    assert float((ends.std(0) / posterior - 1).abs().max()) < 0.06


def test_densepure_votes_over_walks():
    denoiser = exact("gaussians")
    one = PurifiedClassifier(Restoration(denoiser, 0.2, steps=4), ExactClassifier(denoiser))
    vote = MajorityVote(one, 7)
    x_tau = units.to_pixel(noised_points("gaussians", 6, 0.4)[0])
    counts = Held.seeded(vote)(x_tau)
    assert torch.equal(counts.sum(1), torch.full((6,), 7.0, dtype=torch.float64))
    assert vote.sigma_pixel == 0.2 and vote.calls == 7 * (4 + 1)
    assert one.level_counts == (2, 8) and one.at_levels(8).calls == 9
    assert one.at_levels(8).sigma_pixel == 0.2


# ---------------------------------------------------------------------------------------------------------------------
# Views


class UpsideDown(Mirrored):
    """The twin that exchanges top and bottom."""

    def logits(self, x, noise):
        return (self.classifier.logits(x, noise) + self.classifier.logits(x.flip(-2), noise)) / 2


class Summed(Mirrored):
    """The twin without the half: a posterior of two pictures, where there is one."""

    def logits(self, x, noise):
        return 2 * super().logits(x, noise)


class MirrorImageAlone(Mirrored):
    """The twin that asks about the mirror image only."""

    def logits(self, x, noise):
        return self.classifier.logits(x.flip(-1), noise)


@twins.rejected(
    {
        "upside down": dict(mirrored=UpsideDown),
        "without the half": dict(mirrored=Summed),
        "the mirror image alone": dict(mirrored=MirrorImageAlone),
    }
)
def test_a_mirrored_classifier_asks_twice(mirrored=Mirrored):
    cnn = ConvClassifier(DIGIT, 3, (4, 4), seed=1).eval()
    x = torch.rand((4, *DIGIT), generator=seeded(1))
    model = mirrored(TrainedOnNoise(cnn, 0.25))
    torch.testing.assert_close(model(x), (cnn(x) + cnn(x.flip(3))) / 2)
    torch.testing.assert_close(model(x), model(x.flip(3)))
    assert not torch.allclose(cnn(x), cnn(x.flip(3)), atol=1e-3)
    assert model.sigma_pixel == 0.25 and model.calls == 2
    heads = network.build("MultiHeadDenoiser", "DigitNet", 3, DIGIT, width=16, blocks=1)
    both = Mirrored(NoisedBayesClassifier(heads, 0.2, levels=4))
    assert both.level_counts == (2, 8) and both.at_levels(2).calls == 2 * 2


class Clamping(TrainedOnNoise):
    """The twin that cuts noised pictures off at black and white, as if they were clean ones."""

    def logits(self, x, noise):
        return super().logits(x.clamp(0, 1), noise)


@twins.rejected({"clamped": dict(trained_on_noise=Clamping)})
def test_a_network_of_noised_pictures_sees_what_leaves_the_range(trained_on_noise=TrainedOnNoise):
    cnn = ConvClassifier(DIGIT, 3, (4, 4), seed=1).eval()
    x_tau = torch.rand((4, *DIGIT), generator=seeded(1)) * 3 - 1
    model = trained_on_noise(cnn, 0.5)
    assert torch.equal(model(x_tau), cnn.logits(x_tau, ()))
    assert not torch.allclose(model(x_tau), cnn(x_tau.clamp(0, 1)))
    with pytest.raises(ValueError, match=r"expected images in \[0,1\]"):
        cnn(x_tau)
    assert Smoothed(model).sigma == 0.5


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be meant


def narrow(has_null=True):
    """A network that knows levels from 0.05 to 1, as those of photographs do."""
    return network.build(
        "MultiHeadDenoiser", "DigitNet", 3, DIGIT, (0.05, 1.0), has_null, width=16, blocks=1
    )


@pytest.mark.parametrize(
    "build, sentence",
    [
        (lambda: NoisedBayesClassifier(narrow(), 0.5), "below 0.5, as losses are measured at"),
        (lambda: ApproximateNoisedClassifier(narrow(), 0.5), "below 0.5, as losses are measured"),
        (lambda: NoisedBayesClassifier(narrow(), 1.0), r"got 1, which is 2 there\."),
        (lambda: NoisedBayesClassifier(narrow(), 0.01), "at least 0.025: this MultiHeadDenoiser"),
        (lambda: NoisedOneCallClassifier(narrow(), 0.6), "at most 0.5: this MultiHeadDenoiser"),
        (lambda: NearestHeadClassifier(narrow(), 0.02), "at least 0.025: this Multi"),
        (lambda: Denoising(narrow(), 1.0), "sigma_pixel at most 0.5: .* levels from 0.05 to 1"),
        (lambda: Restoration(narrow(), 1.0), "sigma_pixel at most 0.5"),
        (lambda: Restoration(narrow(), 0.025), "above 0.025, where the last step starts"),
        (lambda: Restoration(narrow(), 0.25, low=0.01), "noise levels between 0.05 and 1"),
        (lambda: NoisedBayesClassifier(narrow(), 0.2, high=3.0), "levels between 0.05 and 1"),
        (lambda: ApproximateNoisedClassifier(narrow(), 0.2, high=0.3), "0 < sigma_tau < high"),
        (lambda: ApproximateNoisedClassifier(narrow(), 0.2, form="road"), "the form of APNDC"),
        (lambda: ApproximateNoisedClassifier(narrow(False), 0.2), "without a null class. EPNDC"),
        (lambda: NoisedOneCallClassifier(narrow(False), 0.2), "trained without a null class"),
        (lambda: Denoising(narrow(False), 0.2), "trained without a null class"),
        (lambda: TrainedOnNoise(TrainedOnNoise(ConvClassifier(DIGIT, 3), 0.1), 0.1), "carry noise"),
        (
            lambda: PurifiedClassifier(
                Denoising(narrow(), 0.2), NoisedOneCallClassifier(narrow(), 0.2)
            ),
            "expected a classifier of clean pictures, got a NoisedOneCall",
        ),
        (lambda: carried_sigma(narrow(), 12), "did you mean 12/255"),
    ],
)
def test_what_cannot_be_asked_gets_a_sentence(build, sentence):
    with pytest.raises(ValueError, match=sentence):
        build()


def test_what_the_narrow_network_can_be_asked():
    """At the top of its range it denoises, and answers in one call; below it there is room for losses; no null, no matter."""
    assert NoisedOneCallClassifier(narrow(), 0.5).sigma_pixel == 0.5
    assert Denoising(narrow(), 0.5).calls == 1
    model = NoisedBayesClassifier(narrow(), 0.25)
    assert float(model.levels.upper[-1]) == pytest.approx(1)
    assert ApproximateNoisedClassifier(narrow(False), 0.25, form="own path").calls == 8 + 1


def test_formulas_refuse_a_noise_above_their_levels():
    bank = NoiseBank.fixed(noise.log_levels(0.3, 5, 4), PLANE)
    z = torch.zeros(1, *PLANE)
    for formula, _ in FORMS.values():
        with pytest.raises(ValueError, match="expected 0 < sigma_tau below every level"):
            formula(exact("gaussians"), z, 0.5, bank)
