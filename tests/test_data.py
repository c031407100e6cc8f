"""The plane laws are what they say (density, noise, posterior, sampling), and the digits are the measured ones."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from diffclass import data, units
from diffclass.data import plane
from diffclass.denoisers.exact import MixtureDenoiser
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

LAWS = [law() for law in data.PLANE_LAWS.values()]
every_law = pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
every_sigma = pytest.mark.parametrize("sigma", [0.0, 0.05, 0.3, 2.0])


def plane_grid(law, sigma):
    """Points of model space [N,2,1,1] and the area that each stands for; the sum over them is exact for Gaussians."""
    step = 0.4 * math.hypot(float(law.scales.min()), sigma)
    axis = torch.arange(-1 - 7 * sigma - 0.3, 1.3 + 7 * sigma, step, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis).reshape(-1, 2, 1, 1), step**2


def textbook(law, k, sigma, add=torch.hypot):
    """The law of class k plus noise, built from torch.distributions; `add` joins the two standard deviations."""
    m = law.labels == k
    spread = add(law.scales[m], torch.tensor(sigma, dtype=torch.float64))[:, None].expand(-1, 2)
    return MixtureSameFamily(
        Categorical(law.weights[m]), Independent(Normal(law.means[m], spread), 1)
    )


def with_std_added(law):
    """The mutated twin: a convolution that adds standard deviations instead of variances."""
    return lambda x, sigma: torch.stack(
        [textbook(law, k, sigma, torch.add).log_prob(x.flatten(1)) for k in range(law.num_classes)],
        1,
    )


def worst_z(log_density, law, sigma, generator, n=100_000):
    """Noisy samples against a density: the worst standardised gap between sample means and integrals of test bumps."""
    x, y = law.sample(n, generator, torch.float64)
    noisy = units.to_model(x) + sigma * torch.randn(x.shape, dtype=x.dtype, generator=generator)
    grid, area = plane_grid(law, sigma)
    density = log_density(grid, sigma).exp()  # [G,K]
    worst = 0.0
    for k in range(law.num_classes):
        for centre in law.means[law.labels == k][:2]:

            def bump(points, centre=centre):
                return torch.exp(-((points.flatten(1) - centre) ** 2).sum(1) / (2 * 0.15**2))

            values = bump(noisy[y == k])
            gap = float(values.mean() - (density[:, k] * bump(grid)).sum() * area)
            worst = max(worst, abs(gap) / float(values.std() / len(values) ** 0.5))
    return worst


# ---------------------------------------------------------------------------------------------------------------------
# Plane


@every_law
@every_sigma
def test_density_integrates_to_one(law, sigma):
    grid, area = plane_grid(law, sigma)
    total = law.log_density(grid, sigma).exp().sum(0) * area
    assert torch.allclose(total, torch.ones(law.num_classes, dtype=torch.float64), atol=1e-6)


@every_law
@every_sigma
def test_density_equals_the_textbook_mixture(law, sigma, generator):
    x = 2 * torch.rand(50, 2, 1, 1, dtype=torch.float64, generator=generator) - 1
    expected = torch.stack(
        [textbook(law, k, sigma).log_prob(x.flatten(1)) for k in range(law.num_classes)], 1
    )
    torch.testing.assert_close(law.log_density(x, sigma), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        law.log_density(x, torch.full((50,), sigma)), expected, rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(
        MixtureDenoiser.of_law(law).log_density(x, sigma), expected, rtol=1e-10, atol=1e-10
    )


@every_law
@pytest.mark.parametrize("sigma", [0.0, 0.1, 0.5])
def test_density_is_that_of_noisy_samples(law, sigma, generator):
    assert worst_z(law.log_density, law, sigma, generator) < 4.5
    if sigma:
        assert worst_z(with_std_added(law), law, sigma, generator) > 8


def test_each_point_may_have_its_own_sigma(generator):
    law = data.mixtures()
    x = torch.randn(3, 2, 1, 1, generator=generator)
    sigma = torch.tensor([0.0, 0.2, 1.0])
    each = torch.cat([law.log_density(x[i : i + 1], sigma[i]) for i in range(3)])
    torch.testing.assert_close(law.log_density(x, sigma), each)


@every_law
def test_posterior_is_bayes_rule(law, generator):
    x = torch.rand(200, 2, 1, 1, dtype=torch.float64, generator=generator)
    joint = torch.stack(
        [
            law.priors[k] * textbook(law, k, 0.0).log_prob(2 * x.flatten(1) - 1).exp()
            for k in range(law.num_classes)
        ],
        1,
    )
    seen = joint.sum(1) > 1e-200
    torch.testing.assert_close(law.posterior(x)[seen], (joint / joint.sum(1, keepdim=True))[seen])


@every_law
def test_samples_agree_with_priors_and_posterior(law, generator):
    n = 40_000
    x, y = law.sample(n, generator, torch.float64)
    frequency = torch.bincount(y, minlength=law.num_classes) / n
    assert bool(
        ((frequency - law.priors).abs() < 4 * (law.priors * (1 - law.priors) / n).sqrt()).all()
    )
    posterior = law.posterior(x)
    gap = (posterior.argmax(1) == y).double() - posterior.amax(1)  # calibrated: its mean is 0
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / n**0.5
    accuracy = float(posterior.amax(1).mean())
    assert 0.70 < accuracy < 0.80 if law.name == "overlapping" else 0.95 < accuracy < 0.999


@every_law
def test_samples_are_images_and_repeat(law):
    draws = [law.sample(500, torch.Generator().manual_seed(seed)) for seed in (7, 7, 8)]
    x, y = draws[0]
    assert (
        x.shape == (500, *law.image_shape) and x.dtype == torch.float32 and y.dtype == torch.int64
    )
    assert float(x.min()) >= 0 and float(x.max()) <= 1 and len(law.class_names) == law.num_classes
    assert (
        torch.equal(x, draws[1][0])
        and torch.equal(y, draws[1][1])
        and not torch.equal(x, draws[2][0])
    )


@every_law
def test_almost_nothing_lies_outside(law):
    """Against the exact probability of the square, one minus the product over axes, from another formula (erf)."""
    unit = law.scales[:, None] * 2**0.5
    inside = torch.erf((1 - law.means) / unit) + torch.erf((1 + law.means) / unit)
    exact = float((law.weights * (1 - (inside / 2).prod(1))).max())
    assert law.tail < data.LARGEST_TAIL and exact <= law.tail + 1e-15


def test_outside_points_are_drawn_again(monkeypatch, generator):
    monkeypatch.setattr(plane, "LARGEST_TAIL", 1.1)
    law = data.MixtureLaw("wide", [[0.9, 0.0]], [0.5], [1.0], [0], [1.0])
    x, _ = law.sample(2000, generator)
    assert (
        law.tail > 0.3
        and float(x.min()) >= 0
        and float(x.max()) <= 1
        and float(x[:, 0].mean()) < 0.9
    )


def test_density_has_a_gradient(generator):
    law = data.gaussians()
    x = torch.randn(4, 2, 1, 1, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: law.log_density(z, 0.3), x)
    assert torch.autograd.gradgradcheck(lambda z: law.log_density(z, 0.3), x)
    sigma = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda level: law.log_density(x.detach(), level), sigma)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(weights=torch.tensor([0.5, 1.0, 1.0])), "weights that sum to 1 within each class"),
        (dict(priors=torch.tensor([0.5, 0.3, 0.3])), "priors that sum to 1"),
        (dict(scales=torch.tensor([0.1, 0.0, 0.1])), "scales > 0"),
        (dict(labels=torch.tensor([0, 2, 3])), "labels 0 to 2 with no gap"),
        (dict(means=torch.zeros(2, 2)), "means of shape [3, 2]"),
        (dict(means=torch.full((3, 2), torch.nan)), "finite"),
        (dict(scales=torch.tensor([0.1, 0.5, 0.1])), "outside the picture"),
        (dict(weights=torch.tensor([1.0, 1.0, -1.0])), "weights >= 0"),
    ],
)
def test_a_broken_law_is_refused(change, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[").replace("^", r"\^")):
        dataclasses.replace(data.gaussians(), **change)


def test_wrong_questions_are_refused(generator):
    law = data.gaussians()
    x = torch.zeros(2, 2, 1, 1)
    for bad in (-0.1, torch.tensor([0.1, 0.2, 0.3]), float("nan")):
        with pytest.raises(ValueError, match="sigma"):
            law.log_density(x, bad)
    with pytest.raises(ValueError, match="model space"):
        law.posterior(x - 1)
    with pytest.raises(ValueError, match="at least 1 point"):
        law.sample(0, generator)


# ---------------------------------------------------------------------------------------------------------------------
# Digits


def test_digits_are_split_once_and_for_all():
    from sklearn.datasets import load_digits

    world = data.digits()
    source = load_digits()
    assert world.train_images.shape == (1397, 1, 8, 8) and world.test_images.shape == (400, 1, 8, 8)
    assert (
        world.image_shape == (1, 8, 8)
        and world.num_classes == 10
        and world.class_names == tuple("0123456789")
    )
    assert world.train_images.dtype == torch.float32 and world.train_labels.dtype == torch.int64
    assert float(world.train_images.min()) == 0 and float(world.train_images.max()) == 1
    rows = [
        (*image.flatten().mul(16).int().tolist(), int(label))
        for images, labels in (
            (world.train_images, world.train_labels),
            (world.test_images, world.test_labels),
        )
        for image, label in zip(images, labels, strict=True)
    ]
    whole = np.column_stack([source.data, source.target]).astype(int).tolist()
    assert sorted(rows) == sorted(
        map(tuple, whole)
    )  # every picture once, with its label: the two parts are disjoint
    assert torch.bincount(world.test_labels).min() >= 30


@pytest.mark.parametrize("where", ["images", "target"])
def test_changed_digits_are_noticed(monkeypatch, where):
    import sklearn.datasets

    source = sklearn.datasets.load_digits()
    getattr(source, where).flat[5] += 1
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: source)
    with pytest.raises(ValueError, match="expected scikit-learn's digits with SHA-256"):
        data.digits()


def test_a_law_is_read_from_any_array_of_numbers_and_its_labels_are_whole():
    law = data.gaussians()
    parts = [getattr(law, name).numpy() for name in ("means", "scales", "weights", "labels")]
    backwards = data.MixtureLaw("backwards", *(part[::-1] for part in parts), law.priors)
    assert torch.equal(backwards.means, law.means.flip(0))
    assert backwards.labels.tolist() == [2, 1, 0]
    with pytest.raises(ValueError, match="labels as whole numbers"):
        data.MixtureLaw("halves", *parts[:3], law.labels + 0.5, law.priors)
