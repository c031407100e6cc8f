"""One path for all smoothing levels: equal to each level by itself, unbiased, and paid for once."""

import math

import pytest
import torch
import twins
from diffclass import data, likelihood, noise, units
from diffclass.classifiers import paths
from diffclass.classifiers.noised import NoisedBayesClassifier
from diffclass.classifiers.one_call import NoisedOneCallClassifier
from diffclass.denoisers import network
from diffclass.denoisers.exact import MixtureDenoiser
from diffclass.noise import Levels, NoiseBank

PLANE = (2, 1, 1)
LEVELS = noise.log_levels(0.2, 4.0, 6)


def seeded(seed=0):
    """A generator with a seed."""
    return torch.Generator().manual_seed(seed)


def exact(name="mixtures"):
    """The exact denoiser of a law of the plane."""
    return MixtureDenoiser.of_law(data.PLANE_LAWS[name]())


def points(count, name="mixtures"):
    """Points of a law, in model space."""
    return units.to_model(data.PLANE_LAWS[name]().sample(count, seeded(), torch.float64)[0])


def drawn(count, seed=1, levels=LEVELS):
    """Increments of some paths."""
    return paths.path_noise(levels, PLANE, count, seeded(seed)).double()


def one_by_one(formula, denoiser, path, levels):
    """Every smoothing level by itself: a bank over the levels above, of the noise that the path adds."""
    rows = []
    for tau in range(len(levels) - 1):
        above = levels[tau + 1 :]
        added = (above.sigma**2 - levels.sigma[tau] ** 2).sqrt()
        eps = (path[:, tau + 1 :] - path[:, tau, None]) / added[:, None, None, None]
        bank = NoiseBank(above, eps.movedim(1, 0)[:, None])
        rows.append(formula(denoiser, path[:, tau], float(levels.sigma[tau]), bank))
    return torch.stack(rows, 1)


def swapped(denoiser, z, levels, increments):
    """What the approximation says in place of the exact one."""
    return paths.path_approximations(denoiser, z, levels, increments)


def one_level_further(denoiser, z, levels, increments):
    """The logits of each smoothing level without the first level above it."""
    logits = paths.path_logits(denoiser, z, levels, increments)
    return torch.cat([logits[:, 1:], logits[:, :1]], 1)


@twins.rejected(
    {
        "the approximation": dict(logits_of=swapped),
        "one level further": dict(logits_of=one_level_further),
        "the exact one for the approximation": dict(approximations_of=paths.path_logits),
        "NDC's printed weights": dict(
            logits_of=lambda *given: paths.path_logits(*given, noise.right_end_weight)
        ),
    }
)
def test_every_smoothing_level_is_what_it_is_by_itself(
    logits_of=paths.path_logits, approximations_of=paths.path_approximations
):
    denoiser = exact()
    z = points(5)
    increments = drawn(5)
    path = paths.brownian_path(z, LEVELS, increments)
    for got, formula in (
        (logits_of, likelihood.noised_elbo),
        (approximations_of, likelihood.denoised_target_elbo),
    ):
        wanted = one_by_one(formula, denoiser, path, LEVELS)
        assert wanted.shape == (5, 5, 3)
        off = got(denoiser, z, LEVELS, increments) - wanted
        assert float(off.abs().max()) < 1e-9, off


def test_the_lowest_level_is_the_classifier_of_noised_pictures():
    """The library's classifier at the lowest smoothing level, asked about the first point of the path under its noise."""
    denoiser = exact()
    z = points(4)
    increments = drawn(4)
    path = paths.brownian_path(z, LEVELS, increments)
    sigma_pixel = units.sigma_to_pixel(float(LEVELS.sigma[0]))
    model = NoisedBayesClassifier(denoiser, sigma_pixel, levels=5, prior=None)
    model.levels = LEVELS[1:]
    added = (LEVELS.sigma[1:] ** 2 - LEVELS.sigma[0] ** 2).sqrt()[:, None, None, None]
    eps = ((path[:, 1:] - path[:, :1]) / added)[:, :, None]
    wanted = model(units.to_pixel(path[:, 0]), eps)
    got = paths.path_logits(denoiser, z, LEVELS, increments)[:, 0]
    assert float((got - math.log(3) - wanted).abs().max()) < 1e-9


def test_one_call_a_level_is_the_posterior_along_the_path():
    denoiser = exact("moons")
    z = points(6, "moons")
    increments = drawn(6)
    path = paths.brownian_path(z, LEVELS, increments)
    got = paths.path_posterior(denoiser, z, LEVELS, increments)
    assert got.shape == (6, 6, 2)
    for tau, sigma in enumerate(LEVELS.sigma.tolist()):
        truth = denoiser.log_density(path[:, tau], sigma).softmax(1)
        assert float((got[:, tau].exp() - truth).abs().max()) < 1e-8
        alone = NoisedOneCallClassifier(denoiser, sigma / 2) if sigma <= 2 else None
        if alone is not None:
            torch.testing.assert_close(
                got[:, tau], alone(units.to_pixel(path[:, tau])), rtol=0, atol=1e-8
            )


def apart_from_each_other(z, levels, increments):
    """Images that are noised each by itself."""
    return z[:, None] + levels.sigma.to(z)[:, None, None, None] * increments


def sigma_added(z, levels, increments):
    """Every step adds the whole sigma."""
    return z[:, None] + (levels.sigma.to(z)[:, None, None, None] * increments).cumsum(1)


@twins.rejected(
    {
        "noised each by itself": dict(path_of=apart_from_each_other),
        "sigma added at every step": dict(path_of=sigma_added),
    }
)
def test_a_path_is_brownian(path_of=paths.brownian_path):
    """Covariances of 100 000 paths: of levels j <= k that of the lower, sigma_j^2, whatever came between."""
    count = 100_000
    z = torch.full((1, *PLANE), 0.3, dtype=torch.float64).expand(count, -1, -1, -1)
    path = path_of(z, LEVELS, drawn(count)).flatten(2)[..., 0] - 0.3
    found = path.T @ path / count
    square = LEVELS.sigma**2
    wanted = torch.minimum(square[:, None], square)
    spread = torch.outer(LEVELS.sigma, LEVELS.sigma)
    assert float(((found - wanted) / spread).abs().max()) < 0.02


def fresh_logits(denoiser, z, levels, tau, seed):
    """A smoothing sample and a bank of its own, apart from any path."""
    sigma = float(levels.sigma[tau])
    eps = torch.randn(z.shape, generator=seeded(seed), dtype=torch.float64)
    bank = NoiseBank.fresh(levels[tau + 1 :], PLANE, len(z), seeded(seed + 1), 1, torch.float64)
    return likelihood.noised_elbo(denoiser, z + sigma * eps, sigma, bank, chunk=1 << 20)


def path_logits_apart(denoiser, z, levels, increments):
    """Logits along images that are noised each by itself."""
    twin = twins.patched(paths.path_logits, paths, brownian_path=apart_from_each_other)
    return twin(denoiser, z, levels, increments)


@twins.rejected({"noised each by itself": dict(logits_of=path_logits_apart)})
def test_a_path_is_unbiased_at_every_level(logits_of=paths.path_logits):
    """Class differences of one point over 20 000 paths and as many fresh draws: equal within 4 standard errors."""
    denoiser = exact()
    count = 20_000
    z = points(1).expand(count, -1, -1, -1)
    levels = noise.log_levels(0.25, 5.0, 10)
    logits = logits_of(denoiser, z, levels, drawn(count, 7, levels))
    for tau in (0, 4):
        by_path = logits[:, tau, 0] - logits[:, tau, 1]
        alone = fresh_logits(denoiser, z, levels, tau, 11 + tau)
        fresh = alone[:, 0] - alone[:, 1]
        error = math.hypot(float(by_path.std()), float(fresh.std())) / math.sqrt(count)
        gap = float(by_path.mean() - fresh.mean())
        assert abs(gap) < 4 * error, (tau, gap, error)
        ratio = float(by_path.std() / fresh.std())
        assert 0.9 < ratio < 2, (tau, ratio)


class Counting(MixtureDenoiser):
    """A mixture that counts the images that it denoises, once for each class."""

    asked = 0

    def estimate(self, x_sigma, sigma, classes):
        """As the mixture, counted."""
        self.asked += len(x_sigma) * len(classes)
        return super().estimate(x_sigma, sigma, classes)


def test_all_levels_cost_what_the_lowest_does():
    denoiser = Counting.of_law(data.mixtures())
    z = points(1)
    spent = {}
    for name in ("path_logits", "path_approximations", "path_posterior"):
        denoiser.asked = 0
        getattr(paths, name)(denoiser, z, LEVELS, drawn(1))
        spent[name] = denoiser.asked
    denoiser.asked = 0
    path = paths.brownian_path(z, LEVELS, drawn(1))
    one_by_one(likelihood.noised_elbo, denoiser, path[:, :], LEVELS)
    lowest = 5 * 3
    assert spent["path_logits"] == lowest and denoiser.asked == (5 + 4 + 3 + 2 + 1) * 3
    assert spent["path_approximations"] == spent["path_posterior"] == 6 * (3 + 1)


def test_votes_of_a_path_are_its_largest_logits():
    logits = paths.path_logits(exact(), points(7), LEVELS, drawn(7))
    votes = paths.path_votes(logits)
    assert votes.shape == (7, 5)
    assert torch.equal(votes, logits.argmax(2))
    with pytest.raises(FloatingPointError, match="logits became NaN"):
        paths.path_votes(logits * math.nan)


def test_a_network_of_digits_walks_in_its_own_precision():
    heads = network.build("MultiHeadDenoiser", "DigitNet", 4, (1, 8, 8), width=16, blocks=1)
    z = torch.rand((3, 1, 8, 8), generator=seeded(2)) * 2 - 1
    increments = paths.path_noise(LEVELS, (1, 8, 8), 1, seeded(3))
    leaf = z.clone().requires_grad_()
    logits = paths.path_logits(heads, leaf, LEVELS, increments)
    assert logits.dtype == torch.float32 and logits.shape == (3, 5, 4) and not logits.requires_grad
    alone = paths.path_logits(heads, z[1:2], LEVELS, increments)
    torch.testing.assert_close(alone[0], logits[1], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    "call, sentence",
    [
        (
            lambda: paths.brownian_path(points(3), LEVELS, drawn(2)),
            r"increments \[1 or 3,6,2,1,1\]",
        ),
        (lambda: paths.brownian_path(points(3), LEVELS[1:], drawn(3)), r"\[1 or 3,5,2,1,1\] for"),
        (
            lambda: paths.brownian_path(points(3), LEVELS[:1], drawn(3)[:, :1]),
            "two levels or more that rise",
        ),
        (
            lambda: paths.brownian_path(points(3), LEVELS[torch.tensor([1, 0])], drawn(3)[:, :2]),
            "two levels or more that rise",
        ),
        (
            lambda: paths.path_votes(torch.zeros(3, 2)),
            r"logits \[B,taus,K\] of paths, got \[3, 2\]",
        ),
        (lambda: paths.path_noise(LEVELS, PLANE, -1, seeded()), "expected paths"),
        (
            lambda: paths.path_logits(
                network.build(
                    "MultiHeadDenoiser", "DigitNet", 3, (1, 8, 8), (0.05, 1.0), width=16, blocks=1
                ),
                torch.zeros(1, 1, 8, 8),
                LEVELS,
                torch.zeros(1, 6, 1, 8, 8),
            ),
            "noise levels between 0.05 and 1, which this denoiser",
        ),
        (
            lambda: paths.path_posterior(
                network.build(
                    "MultiHeadDenoiser",
                    "DigitNet",
                    3,
                    (1, 8, 8),
                    has_null=False,
                    width=16,
                    blocks=1,
                ),
                torch.zeros(1, 1, 8, 8),
                LEVELS,
                torch.zeros(1, 6, 1, 8, 8),
            ),
            "trained without a null class",
        ),
    ],
)
def test_what_is_no_path_gets_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_levels_of_a_path_may_be_any_that_rise():
    """Edges that touch nothing: only the middles matter for the path, the edges for the weights."""
    sigma = torch.tensor([0.3, 0.5, 1.0], dtype=torch.float64)
    levels = Levels(sigma, sigma * 0.9, sigma * 1.1)
    got = paths.path_logits(exact(), points(2), levels, drawn(2, 1, levels))
    assert got.shape == (2, 2, 3) and bool(torch.isfinite(got).all())
