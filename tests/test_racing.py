"""Fewer evaluations: what is counted, what is unbiased and what is not, and whether a race keeps its promise."""

import itertools
import math
from functools import partial

import pytest
import torch
import twins
from diffclass import data, intervals, likelihood, noise, units
from diffclass.classifiers import racing
from diffclass.classifiers.bayes import BayesClassifier
from diffclass.denoisers.exact import MixtureDenoiser
from diffclass.noise import NoiseBank
from diffclass.zoo import networks

LEVELS = noise.log_levels(0.05, 3, 32)
UNIFORM = racing.log_share(LEVELS)
LINEAR = (LEVELS.upper - LEVELS.lower) / (LEVELS.upper[-1] - LEVELS.lower[0])
LOPSIDED = (
    torch.linspace(1, 5, 32, dtype=torch.float64)
    / torch.linspace(1, 5, 32, dtype=torch.float64).sum()
)
DENOISERS = ("teacher", "student")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(count: int, name: str = "overlapping", seed: int = 1) -> torch.Tensor:
    """Points of a law in pixel space, float64."""
    return data.PLANE_LAWS[name]().sample(count, seeded(seed), torch.float64)[0]


def plane(name: str = "overlapping", **options) -> racing.Question:
    """Which class of a plane law."""
    return racing.Question(MixtureDenoiser.of_law(data.PLANE_LAWS[name]()), LEVELS, **options)


def circle(classes: int, radius: float = 0.3, scale: float = 0.14) -> racing.Question:
    """Classes on a circle, one Gaussian each: at the centre all scores are equal."""
    angle = 2 * math.pi * torch.arange(classes, dtype=torch.float64) / classes
    means = radius * torch.stack([angle.cos(), angle.sin()], 1)[:, :, None, None]
    ones = torch.ones(classes, dtype=torch.float64)
    return racing.Question(
        MixtureDenoiser(means, scale * ones, ones, torch.arange(classes)), LEVELS
    )


def digits(name: str, count: int = 8) -> racing.Question:
    """Which digit, over a short grid."""
    denoiser = networks.load_digits_denoiser(networks.MODELS["digits"][name])
    return racing.Question(denoiser, noise.log_levels(*networks.DIGIT_RANGE, count))


def simplex(classes: int, radius: float = 0.3, scale: float = 0.14) -> racing.Question:
    """One Gaussian for each class, in as many dimensions, all equally far from each other."""
    ones = torch.ones(classes, dtype=torch.float64)
    means = radius * torch.eye(classes, dtype=torch.float64)[:, :, None, None]
    return racing.Question(
        MixtureDenoiser(means, scale * ones, ones, torch.arange(classes)), LEVELS
    )


def exact_losses(question: racing.Question, x: torch.Tensor) -> torch.Tensor:
    """The weighted losses [B,K,G] in closed form, where every class is one Gaussian of variance v.

    D - z = (sigma^2 (mu - z) + v sigma eps) / (v + sigma^2), whose square has a known mean.
    """
    law = question.denoiser
    z = units.to_model(x).flatten(1)
    v = law.variances[:, None]  # [K,1], [B,K,1]
    square = ((law.means - z[:, None]) ** 2).sum(-1)[..., None]
    sigma = question.levels.sigma
    losses = (sigma**4 * square + v**2 * sigma**2 * z.shape[1]) / (v + sigma**2) ** 2
    return losses * question.weighting(question.levels)


def exact_scores(question: racing.Question, x: torch.Tensor) -> torch.Tensor:
    """The scores [B,K] in closed form."""
    return exact_losses(question, x).sum(-1) - question.log_prior


# ---------------------------------------------------------------------------------------------------------------------
# The meter


def forwards(question: racing.Question, run) -> tuple[int, racing.Answer]:
    """How many images the network really saw during a strategy, by a hook on the network itself."""
    seen = []
    hook = question.denoiser.network.register_forward_pre_hook(
        lambda module, inputs: seen.append(len(inputs[0]))
    )
    found = racing.answer(run(question))
    hook.remove()
    return sum(seen), found


STRATEGIES = {
    "full": lambda q, x, g: racing.full(q, x, g),
    "own noise for each class": lambda q, x, g: racing.full(q, x, g, shared=False),
    "sampled": lambda q, x, g: racing.sampled(
        q, x, g, 5, racing.log_share(q.levels), racing.systematic
    ),
    "staged": lambda q, x, g: racing.staged(q, x, g, (2, 8), (2, 1)),
    "sift": lambda q, x, g: racing.sift_and_refine(q, x, g, 3.0, 4, 2),
    "race": lambda q, x, g: racing.race(
        q,
        x,
        g,
        racing.log_share(q.levels),
        partial(racing.normal_mixture, alpha=0.1, scale=10.0),
        60,
    ),
}


@pytest.mark.parametrize("name", DENOISERS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_meter_counts_what_the_network_evaluates(name, strategy):
    x = data.digits().test_images[:4]
    seen, found = forwards(digits(name), lambda q: STRATEGIES[strategy](q, x, seeded()))
    assert seen == int(found.evaluations.sum()) > 0
    costs = {
        "full": {"teacher": 80, "student": 8},
        "own noise for each class": {"teacher": 80, "student": 80},
        "sampled": {"teacher": 50, "student": 5},
        "staged": {"teacher": 20 + 2 * 6, "student": 8},
    }
    if strategy in costs:
        assert found.evaluations.tolist() == [costs[strategy][name]] * 4


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_repeats_with_its_generator_and_touches_no_other(strategy):
    before = torch.get_rng_state()
    x = points(6)
    first, second, other = (
        racing.answer(STRATEGIES[strategy](plane(), x, seeded(seed))) for seed in (3, 3, 4)
    )
    assert torch.equal(first.estimates, second.estimates) and not torch.equal(
        first.estimates, other.estimates
    )
    assert torch.equal(torch.get_rng_state(), before)
    for now, later in itertools.pairwise(first.history):
        assert not bool((later.alive & ~now.alive).any()), "nobody comes back"
        assert bool((later.evaluations >= now.evaluations).all())
    assert bool(first.alive.gather(1, first.prediction[:, None]).all())


def test_full_is_the_bayes_classifier():
    """Same noise, same scores, and minus the logits of the classifier made of the same parts."""
    x = points(5, "imbalanced")
    prior = [0.8, 0.15, 0.05]
    noises = torch.randn(len(LEVELS), 1, *x.shape, generator=seeded(7), dtype=torch.float64)
    model = BayesClassifier(plane().denoiser, LEVELS, prior=prior)
    question = racing.Question(model.denoiser, LEVELS, model.weighting, model.log_prior)
    logits = model(x, noises.movedim(2, 0))
    assert torch.allclose(
        racing.answer(racing.full(question, x, seeded(7))).estimates, -logits, rtol=1e-10
    )


# ---------------------------------------------------------------------------------------------------------------------
# Unbiased, and how scattered


def estimates(run, seeds: int = 120, copies: int = 40, name: str = "overlapping") -> torch.Tensor:
    """Estimated scores of one point under many levels (seeds) and noises (copies). Shapes: -> [seeds, copies, K]."""
    question = plane(name)
    x = points(1, name).expand(copies, -1, -1, -1)
    return torch.stack(
        [racing.answer(run(question, x, seeded(seed))).estimates for seed in range(seeds)]
    )


def check_unbiased(run, **options):
    """The mean over levels and noise is the exact score, within 4.5 standard errors of independent seeds."""
    found = estimates(run, **options).mean(1)
    wanted = exact_scores(plane(), points(1))[0]
    error = found.std(0) / len(found) ** 0.5
    assert bool(((found.mean(0) - wanted).abs() < 4.5 * error).all()), (
        found.mean(0),
        wanted,
        error,
    )
    assert bool((error < 0.1 * wanted.abs()).all()), "too scattered to say anything"


@pytest.mark.parametrize("shared", [True, False])
def test_full_is_unbiased(shared):
    check_unbiased(partial(racing.full, shared=shared), seeds=30)


@pytest.mark.parametrize("design", [racing.independent, racing.systematic])
@pytest.mark.parametrize("share", [UNIFORM, LINEAR, LOPSIDED], ids=["log", "linear", "lopsided"])
def test_drawn_levels_are_unbiased_for_the_whole_grid(design, share):
    check_unbiased(partial(racing.sampled, count=8, share=share, design=design))


@pytest.mark.parametrize(
    "design",
    [
        lambda share, count, g: racing.independent(
            UNIFORM, count, g
        ),  # weights of one share, draws of another
        lambda share, count, g: racing.systematic(share, count, g).clamp(
            max=15
        ),  # the upper half never
        lambda share, count, g: (
            share.cumsum(0)[None] < (torch.arange(count)[:, None]) / count
        ).sum(1),  # no offset
    ],
    ids=["weights of another share", "levels never drawn", "no random offset"],
)
def test_a_mutated_design_is_caught_as_biased(design):
    with pytest.raises(AssertionError):
        check_unbiased(partial(racing.sampled, count=8, share=LOPSIDED, design=design))


@pytest.mark.parametrize("design", [racing.independent, racing.systematic])
def test_every_level_is_drawn_as_often_as_its_share_says(design):
    generator = seeded()
    drawn = torch.stack(
        [torch.bincount(design(LOPSIDED, 8, generator), minlength=32) for _ in range(4000)]
    ).double()
    error = drawn.std(0) / 4000**0.5
    assert bool(((drawn.mean(0) - 8 * LOPSIDED).abs() < 4.5 * error).all())
    if design is racing.systematic:
        assert bool((drawn <= (8 * LOPSIDED).ceil()).all()), (
            "at most once where a share is below 1/8"
        )


def difference_variance(run, **options) -> float:
    found = estimates(run, **options).flatten(0, 1)
    return float((found[:, 1] - found[:, 0]).var())


def test_shared_noise_systematic_levels_and_a_pilot_each_reduce_the_scatter():
    """Variance of a difference of two scores at equal cost; thresholds leave a third of what was measured."""
    own, shared = (
        difference_variance(partial(racing.full, shared=s), seeds=20) for s in (False, True)
    )
    assert shared < 0.75 * own, (shared, own)
    share = racing.pilot(plane(), points(60, seed=5), seeded(9), samples=3).share
    ways = {
        (design, p): difference_variance(
            partial(racing.sampled, count=8, share=q, design=design), seeds=90
        )
        for p, q in (("log", UNIFORM), ("Neyman", share))
        for design in (racing.independent, racing.systematic)
    }
    assert ways[racing.systematic, "log"] < 0.85 * ways[racing.independent, "log"], ways
    assert ways[racing.systematic, "Neyman"] < 0.85 * ways[racing.systematic, "log"], ways


def test_coarse_levels_answer_a_question_of_their_own():
    """Two fixed midpoints estimate the sum over two levels without bias, and that sum is not the fine one."""
    x = points(1)
    coarse = racing.Question(plane().denoiser, noise.log_levels(0.05, 3, 2))
    found = racing.answer(racing.full(coarse, x.expand(4000, -1, -1, -1), seeded())).estimates
    error = found.std(0) / len(found) ** 0.5
    own = exact_scores(coarse, x)[0]
    fine = exact_scores(plane(), x)[0]
    assert bool(((found.mean(0) - own).abs() < 4.5 * error).all())
    assert bool(((own - fine).abs() > 10 * error).any())


def test_the_pilot_measures_the_two_best_classes_only():
    """Against a direct computation from `diffusion_errors`, with the same noise."""
    question = plane()
    x = points(30)
    found = racing.pilot(question, x, seeded(2), samples=3, even=0.2)
    generator = seeded(2)
    drawn = [
        torch.randn(32, 1, *x.shape, generator=generator, dtype=torch.float64) for _ in range(3)
    ]
    bank = NoiseBank(LEVELS, torch.cat(drawn, 1))
    with torch.no_grad():
        errors = likelihood.diffusion_errors(question.denoiser, units.to_model(x), bank)
    losses = errors * noise.elbo_weight(LEVELS)[:, None]
    ranked = losses.mean(-1).sum(-1).sort(1).indices
    gap = torch.stack(
        [losses[b, ranked[b, 1]] - losses[b, ranked[b, 0]] for b in range(30)]
    )  # [N,G,S]
    spread = gap.var(-1).mean(0).sqrt()
    share = 0.8 * spread / spread.sum() + 0.2 / 32
    assert torch.allclose(found.share, share, rtol=1e-10) and float(
        found.share.sum()
    ) == pytest.approx(1)
    assert found.reach == pytest.approx(float((gap / share[:, None]).abs().max()), rel=1e-10)
    chosen = torch.multinomial(share, 10_000, replacement=True, generator=seeded(3))
    simulated = (gap / share[:, None])[:, chosen, torch.arange(10_000) % 3].std(1).max()
    assert found.scale == pytest.approx(float(simulated), rel=0.05)
    assert found.evaluations == 30 * 3 * 32 * 3


# ---------------------------------------------------------------------------------------------------------------------
# Elimination


class Recorder(MixtureDenoiser):
    """Writes down at which levels it was asked."""

    @classmethod
    def like(cls, law: MixtureDenoiser) -> "Recorder":
        return cls(
            law.means[:, :, None, None], law.variances.sqrt(), law.log_weights.exp(), law.labels
        )

    def estimate(self, x_sigma, sigma, classes):
        self.levels = [*getattr(self, "levels", []), sigma.clone()]
        return super().estimate(x_sigma, sigma, classes)


def from_the_first(size, counts):
    """A twin of `stage_levels` whose sub-grids begin with the first level."""
    done = torch.zeros(size, dtype=torch.bool)
    for count in counts:
        index = torch.arange(count) * (size // count)
        index = index[~done[index]]
        done[index] = True
        yield index


def measured_again(size, counts):
    """A twin that forgets what was measured."""
    for count in counts:
        yield torch.arange(count) * (size // count) + size // count // 2


def by_difference(size, counts):
    """A twin that takes sub-grids to hold the ones before."""
    for index, before in zip(measured_again(size, counts), (0, *counts), strict=False):
        yield index[: len(index) - before]


@twins.rejected(
    {
        "from the first": dict(stage_levels=from_the_first),
        "measured again": dict(stage_levels=measured_again),
        "differences": dict(stage_levels=by_difference),
    }
)
def test_a_stage_measures_what_no_earlier_one_has(stage_levels=racing.stage_levels):
    for size, counts in (
        (500, (50, 500)),
        (500, (20, 50, 100, 500)),
        (1000, (50, 100, 500, 1000)),
        (10, (3, 10)),
    ):
        seen = set()
        for count, index in zip(counts, stage_levels(size, counts), strict=True):
            stride = size // count
            grid = {stride // 2 + i * stride for i in range(count)}
            assert index.tolist() == sorted(grid - seen)
            seen |= grid
        assert seen == set(range(size))


def test_staged_elimination_is_the_published_one():
    """CIFAR-10: 50 then 500 of the timesteps 1, 3, .., 999; 5 classes kept: 2750 evaluations, first 11, 31, .., 991."""
    denoiser = Recorder.like(circle(10).denoiser)
    sigma = noise.sigma_of_alpha_bar(noise.alpha_bar(noise.scaled_linear_betas()))[
        1::2
    ].contiguous()
    edges = torch.cat([sigma[:1] * 0.9, (sigma[1:] * sigma[:-1]).sqrt(), sigma[-1:] * 1.1])
    question = racing.Question(
        denoiser, noise.Levels(sigma, edges[:-1], edges[1:]), lambda levels: levels.sigma**-2
    )
    found = racing.answer(racing.staged(question, points(1), seeded(), (50, 500), (5, 1)))
    assert found.evaluations.tolist() == [2750] and [int(a.alive.sum()) for a in found.history] == [
        5,
        1,
    ]
    assert [int(a.evaluations) for a in found.history] == [500, 2750]
    timesteps = torch.searchsorted(sigma, denoiser.levels[0]) * 2 + 1
    assert timesteps.tolist() == list(range(11, 992, 20))
    assert len(denoiser.levels) == 10 + 5
    assert torch.cat([denoiser.levels[0], denoiser.levels[-1]]).unique().numel() == 500


def test_staged_survivors_have_the_full_score_and_some_winners_are_lost():
    """The bias, by count: full evaluation under the very same noise picks a class that two levels have dropped."""
    x = points(800)
    whole = racing.answer(racing.full(plane(), x, seeded(1)))
    found = racing.answer(racing.staged(plane(), x, seeded(1), (2, 32), (2, 1)))
    left = found.history[0].alive
    assert torch.allclose(found.estimates[left], whole.estimates[left], rtol=1e-10)
    kept = left.gather(1, whole.prediction[:, None])[:, 0]
    assert intervals.lower_bound(int((~kept).sum()), 800, 0.001) > 0.005
    assert torch.equal(found.prediction == whole.prediction, kept), "who is kept wins"
    lenient = racing.answer(racing.staged(plane(), x, seeded(1), (16, 32), (2, 1))).history[0].alive
    assert int((~lenient.gather(1, whole.prediction[:, None])).sum()) < int((~kept).sum())


def test_a_stage_averages_over_all_levels_so_far():
    """Three, then eight of 32 levels, none of them twice: eleven after the second stage, each noise drawn once."""
    question = circle(6)
    x = points(20)
    found = racing.answer(racing.staged(question, x, seeded(2), (3, 8, 32), (5, 3, 1))).history[1]
    meter = racing.Meter(question, x, seeded(2))
    losses = meter.losses_of_all(torch.arange(32))
    wanted = meter.scores(32 * losses[..., [5, 15, 25, *range(2, 32, 4)]].mean(-1))
    assert torch.allclose(found.estimates[found.alive], wanted[found.alive], rtol=1e-12)


def test_sifting_drops_by_the_threshold_upwards_and_refines_who_is_left():
    question = circle(6)
    x = points(40)
    found = racing.answer(racing.sift_and_refine(question, x, seeded(), 2.0, sift=8, most=2))
    *sifted, last = found.history
    living = torch.ones(40, 6, dtype=torch.bool)
    spent = torch.zeros(40, dtype=torch.long)
    for now in sifted:
        spent += torch.where(living.sum(1) > 2, living.sum(1), 0)
        assert torch.equal(now.evaluations, spent)
        least = now.estimates.masked_fill(~living, math.inf).amin(1, keepdim=True)
        kept = living & (now.estimates <= least + 2.0)
        living = torch.where((living.sum(1) > 2)[:, None], kept, living)
        assert torch.equal(now.alive, living)
    assert int(last.alive.sum(1).max()) <= 2
    refined = torch.where(last.alive.sum(1) > 1, last.alive.sum(1), 0)
    assert torch.equal(last.evaluations, spent + 32 * refined) and len(set(spent.tolist())) > 2
    everything = racing.answer(racing.sift_and_refine(question, x, seeded(), 1e9, sift=8, most=6))
    assert everything.evaluations.tolist() == [6 * 32] * 40, "nothing to sift: full evaluation"
    meter = racing.Meter(question, x, seeded())
    for _ in range(8):
        meter.draw(1)
    fresh = meter.scores(meter.losses_of_all(torch.arange(32)).sum(-1))
    assert torch.allclose(everything.estimates, fresh, rtol=1e-12)


def test_a_high_threshold_sifts_little_and_a_low_one_loses_winners():
    x = points(400)
    question = plane()
    best = exact_scores(question, x).argmin(1)
    lost = []
    cost = []
    for threshold in (0.3, 3.0):
        found = racing.answer(
            racing.sift_and_refine(question, x, seeded(), threshold, sift=8, most=1)
        )
        lost.append(int((~found.alive.gather(1, best[:, None])).sum()))
        cost.append(float(found.evaluations.double().mean()))
    assert (
        lost[1] < lost[0]
        and cost[0] < cost[1]
        and intervals.lower_bound(lost[0], 400, 0.001) > 0.05
    )


# ---------------------------------------------------------------------------------------------------------------------
# Races


def test_a_bet_is_fair_in_a_fair_game():
    """Capital has expectation 1 when a class and its rival are level: all 2^8 games, and a Gaussian integral."""
    games = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=8)), dtype=torch.float64)
    state = None
    for x in games.T:
        pair = torch.zeros(len(games), 2, 2, dtype=torch.float64)
        pair[:, 0, 1] = x
        pair[:, 1, 0] = -x
        _, state = racing.betting(3.0 * pair, state, alpha=0.05, reach=3.0)
    assert torch.allclose(state.exp().mean(0)[0, 1], torch.ones(6, dtype=torch.float64), rtol=1e-12)
    # The sum of n Gaussian draws is Gaussian: integrate the capital over it and compare with the formula's own state.
    total = torch.linspace(-40, 40, 20001, dtype=torch.float64) * 0.7
    n = 5
    scale = 0.7
    density = torch.exp(-(total**2) / (2 * n * scale**2)) / (scale * math.sqrt(2 * math.pi * n))
    out = {}
    for alpha in (
        0.9,
        0.5,
        0.1,
        0.01,
    ):  # P(capital >= 1/alpha) <= alpha, by Markov; capital is monotone in the sum
        pair = torch.zeros(len(total), 2, 2, dtype=torch.float64)
        pair[:, 0, 1] = total
        pair[:, 1, 0] = -total
        state = torch.stack([pair * 0, torch.full_like(pair, n - 1)])
        out[alpha] = racing.normal_mixture(pair, state, alpha=alpha, scale=scale)[0][:, 0]
        assert float((density * out[alpha]).sum() * (total[1] - total[0])) <= alpha
    threshold = total[out[0.01]].min()
    s = threshold / (scale * math.sqrt(n + 1))
    capital = 2 / math.sqrt(n + 1) * torch.exp(s**2 / 2) * torch.special.ndtr(s)
    c = torch.linspace(0, 40 / scale, 400_001, dtype=torch.float64)
    prior = 2 * scale / math.sqrt(2 * math.pi) * torch.exp(-((c * scale) ** 2) / 2)
    integral = torch.trapezoid(torch.exp(c * threshold - c**2 * n * scale**2 / 2) * prior, c)
    assert float(capital) == pytest.approx(float(integral), rel=1e-6) and float(
        capital
    ) == pytest.approx(100, rel=0.02)


def differences(question, x, share, replicates: int, draws: int, seed: int = 0) -> torch.Tensor:
    """X_kj of many independent races at one point, straight from the denoiser. Shapes: -> [draws, replicates, K, K]."""
    generator = seeded(seed)
    index = torch.multinomial(share, draws * replicates, replacement=True, generator=generator)
    z = units.to_model(x)
    sigma = question.levels.sigma[index]
    eps = torch.randn(len(index), *z.shape[1:], generator=generator, dtype=torch.float64)
    denoised = question.denoiser(z + sigma[:, None, None, None] * eps, sigma)
    errors = ((denoised - z[:, None]) ** 2).flatten(2).sum(-1)
    scores = (question.weighting(question.levels) / share)[
        index, None
    ] * errors - question.log_prior
    return (scores[:, :, None] - scores[:, None]).unflatten(0, (draws, replicates))


def gaussian_law(question, x, share) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation [K,K,G] of X_kj at each level, for equal Gaussian classes, where it is Gaussian."""
    law = question.denoiser
    z = units.to_model(x).flatten(1)
    sigma = question.levels.sigma
    v = law.variances[0]
    weight = question.weighting(question.levels) / share / (v + sigma**2) ** 2
    square = ((law.means - z) ** 2).sum(-1)
    mean = (square[:, None] - square)[..., None] * sigma**4 * weight
    return mean, torch.cdist(law.means, law.means)[..., None] * 2 * v * sigma**3 * weight


def plane_game(
    classes: int = 12, replicates: int = 500, draws: int = 80
) -> tuple[torch.Tensor, float]:
    """Differences at a point where twelve classes are nearly level and class 0 is best, and their sub-Gaussian scale.

    Given the level they are Gaussian, and the share makes their deviations equal at every level.
    """
    question = simplex(classes)
    z = torch.full((1, classes, 1, 1), 0.3 / classes, dtype=torch.float64)
    z[0, 0] += 0.002
    x = units.to_pixel(z)
    share = gaussian_law(question, x, torch.full((32,), 1 / 32))[1][0, 1]
    share = 0.98 * share / share.sum() + 0.02 / 32
    best = exact_scores(question, x)[0]
    assert int(best.argmin()) == 0 and float(best.sort().values[1] - best[0]) > 0
    mean, deviation = gaussian_law(question, x, share)
    scale = (
        (deviation.amax(-1) ** 2 + ((mean.amax(-1) - mean.amin(-1)) / 2) ** 2).max().sqrt()
    )  # Hoeffding's lemma
    return differences(question, x, share, replicates, draws), float(scale)


def coin_game(classes: int = 16, replicates: int = 500, draws: int = 120) -> torch.Tensor:
    """Differences of fair coins, one for each class: as far as their reach allows, and nobody is better."""
    coins = torch.randint(2, (draws, replicates, classes), generator=seeded(4)).double()
    return coins[..., None] - coins[:, :, None]


def check_promise(games=("coins", "plane"), rule=None, alpha: float = 0.1):
    """A best class is out in at most alpha of independent races, looked at after every draw."""
    for game in games:
        drawn, scale = plane_game() if game == "plane" else (coin_game(), 1.0)
        kept = {
            "plane": partial(racing.normal_mixture, scale=scale),
            "coins": partial(racing.betting, reach=1.0),
        }
        state = None
        lost = torch.zeros(drawn.shape[1], dtype=torch.bool)
        for pair in drawn:
            out, state = (rule or kept[game])(pair, state, alpha=alpha)
            lost |= out[:, 0]
        assert intervals.lower_bound(int(lost.sum()), len(lost), 0.001) <= alpha, float(
            lost.double().mean()
        )


def fixed_interval(pair, state, alpha):
    """A normal interval for a number of draws fixed in advance, with a union bound over rivals, looked at always."""
    new = torch.stack([torch.ones_like(pair), pair, pair**2])
    state = new if state is None else state + new
    n, total, squares = state
    error = ((squares / n - (total / n) ** 2).clamp(min=0) / n).sqrt()
    z = torch.special.ndtri(torch.tensor(1 - alpha / (pair.shape[-1] - 1), dtype=torch.float64))
    return ((n > 10) & (total / n > z * error)).any(-1), state


def test_the_best_class_is_out_with_at_most_the_promised_probability():
    check_promise()


@pytest.mark.parametrize("game", ["coins", "plane"])
def test_peeking_with_a_fixed_interval_breaks_the_promise(game):
    with pytest.raises(AssertionError):
        check_promise([game], fixed_interval)


@pytest.mark.parametrize("game", ["coins", "plane"])
def test_the_best_rival_instead_of_the_mean_over_rivals_breaks_the_promise(monkeypatch, game):
    """No union bound: each rival gets the whole alpha."""

    def greatest(log_capital, alpha, unit):
        return (log_capital.logsumexp(-1) - math.log(log_capital.shape[-1])).amax(-1) >= -math.log(
            alpha
        )

    monkeypatch.setattr(racing, "_convinced", greatest)
    with pytest.raises(AssertionError):
        check_promise([game])


def test_a_reach_that_is_too_small_voids_the_promise():
    """X is 1, and once in fifty -100: better than its rival on average, and out when -100 is clipped to -1."""
    pair = torch.zeros(100, 400, 2, 2, dtype=torch.float64)
    rare = torch.rand(100, 400, generator=seeded(), dtype=torch.float64) < 0.02
    pair[..., 0, 1] = torch.where(rare, -100.0, 1.0)
    pair[..., 1, 0] = -pair[..., 0, 1]
    lost = {}
    for reach in (1.0, 100.0):
        state = None
        out = torch.zeros(400, dtype=torch.bool)
        for x in pair:
            now, state = racing.betting(x, state, alpha=0.05, reach=reach)
            out |= now[:, 0]
        lost[reach] = int(out.sum())
    assert intervals.lower_bound(lost[1.0], 400, 0.001) > 0.9 and lost[100.0] == 0


def test_a_race_hands_the_rule_paired_differences_of_known_mean():
    """A rule that drops class 2 of the first image after three draws, at levels that the denoiser writes down."""
    seen = []
    copies = 2000
    prior = torch.tensor([0.8, 0.15, 0.05]).log()
    denoiser = Recorder.like(plane().denoiser)
    question = racing.Question(denoiser, LEVELS, log_prior=prior)
    x = points(1)

    def rule(pair, state):
        seen.append(pair)
        out = torch.zeros(copies, 3, dtype=torch.bool)
        out[0, 2] = len(seen) >= 3
        return out, pair

    found = racing.answer(
        racing.race(question, x.expand(copies, -1, -1, -1), seeded(), LOPSIDED, rule, 60)
    )
    assert found.evaluations.tolist() == [3 * 3 + 2 * 25, *[60] * (copies - 1)] and not bool(
        found.decided.any()
    )
    pairs = torch.stack(seen[:20])
    assert bool(pairs[3:, 0, 2].isnan().all()) and not bool(pairs[3:, 0, :2, :2].isnan().any())
    pairs = pairs[:, 1:]
    averages = found.estimates[1:, :, None] - found.estimates[1:, None]
    assert torch.allclose(pairs.mean(0), averages, rtol=1e-9, atol=1e-12)
    sigma = torch.stack([levels[0] for levels in denoiser.levels[:60:3]])
    index = (sigma[:, None] - LEVELS.sigma).abs().argmin(1)
    scores = (exact_losses(question, x)[0] / LOPSIDED)[:, index].T - prior  # [draws,K]
    off = pairs.mean(1) - (scores[:, :, None] - scores[:, None])
    assert bool((off.abs() <= 4.5 * pairs.std(1) / copies**0.5 + 1e-9).all()), off.abs().max()


def test_a_race_stops_early_where_it_is_easy_and_says_undecided_at_a_tie():
    question = circle(3)
    law = gaussian_law(question, torch.full((1, 2, 1, 1), 0.5, dtype=torch.float64), UNIFORM)
    scale = float(law[1].max())
    easy = units.to_pixel(question.denoiser.means[1]).reshape(1, 2, 1, 1)
    tie = torch.full((1, 2, 1, 1), 0.5)
    x = torch.cat([easy, tie.double()]).repeat(20, 1, 1, 1)
    rule = partial(racing.normal_mixture, alpha=0.05, scale=scale)
    found = racing.answer(racing.race(question, x, seeded(), UNIFORM, rule, 300))
    assert bool(found.decided[::2].all()) and bool((found.prediction[::2] == 1).all())
    assert int((~found.decided[1::2]).sum()) >= 17, (
        "a tie is called by chance in alpha of the races"
    )
    assert (
        int(found.evaluations.max()) <= 300 and float(found.evaluations[::2].double().mean()) < 150
    )
    assert bool((found.evaluations[1::2][~found.decided[1::2]] > 297).all())
    stopped = [a.evaluations[0] for a in found.history if bool(a.decided[0])]
    assert len({int(n) for n in stopped}) == 1, "a decided image costs nothing more"


def test_a_race_that_condemns_all_keeps_the_best_so_far():
    found = racing.answer(
        racing.race(
            plane(),
            points(4),
            seeded(),
            UNIFORM,
            lambda pair, state: (torch.ones(4, 3, dtype=torch.bool), pair),
            30,
        )
    )
    assert found.alive.sum(1).tolist() == [1] * 4 and torch.equal(
        found.prediction, found.estimates.argmin(1)
    )


def test_races_agree_with_the_exact_best_class():
    """End to end, points of a law with the pilot's guesses: decided races are wrong in at most alpha."""
    question = plane()
    x = points(400)
    guess = racing.pilot(question, points(100, seed=6), seeded(7))
    best = exact_scores(question, x).argmin(1)
    for rule in (
        partial(racing.betting, alpha=0.1, reach=guess.reach),
        partial(racing.normal_mixture, alpha=0.1, scale=guess.scale),
    ):
        found = racing.answer(racing.race(question, x, seeded(8), guess.share, rule, 300))
        lost = int((~found.alive.gather(1, best[:, None])).sum())
        assert (
            intervals.lower_bound(lost, 400, 0.001) <= 0.1
            and 0.3 < float(found.decided.double().mean()) < 1
        )


def test_a_race_over_digits_with_one_trunk_for_all_classes():
    world = data.digits()
    question = digits("student", 16)
    guess = racing.pilot(question, world.train_images[:40], seeded())
    rule = partial(racing.normal_mixture, alpha=0.05, scale=guess.scale)
    found = racing.answer(
        racing.race(question, world.test_images[:40], seeded(1), guess.share, rule, 64)
    )
    right = found.prediction == world.test_labels[:40]
    assert int(right.sum()) >= 36 and int(found.decided.sum()) >= 30
    assert int(found.evaluations.max()) <= 64 and float(found.evaluations.double().mean()) < 50


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    "run, sentence",
    [
        (
            lambda q, x, g: racing.sampled(q, x, g, 4, UNIFORM[:5], racing.systematic),
            "expected 32 shares > 0 .*, got 5",
        ),
        (lambda q, x, g: racing.sampled(q, x, g, 4, UNIFORM * 2, racing.systematic), "sum 2"),
        (
            lambda q, x, g: racing.sampled(q, x, g, 4, torch.eye(32)[0], racing.systematic),
            "would be missing from",
        ),
        (lambda q, x, g: racing.staged(q, x, g, (8, 4), (2, 1)), r"counts \(8, 4\)"),
        (lambda q, x, g: racing.staged(q, x, g, (8, 64), (2, 1)), "at most 32 levels"),
        (lambda q, x, g: racing.staged(q, x, g, (8, 32), (5, 1)), "at most 3 classes"),
        (lambda q, x, g: racing.staged(q, x, g, (8, 32), (3, 2)), "to 1, got"),
        (
            lambda q, x, g: racing.staged(q, x, g, (8,), (2, 1)),
            r"got counts \(8,\) and keep \(2, 1\)",
        ),
        (lambda q, x, g: racing.sift_and_refine(q, x, g, 0.0), "expected threshold > 0"),
        (lambda q, x, g: racing.sift_and_refine(q, x, g, 1.0, sift=33), "sift <= 32"),
        (lambda q, x, g: racing.sift_and_refine(q, x, g, 1.0, most=4), "most <= 3"),
        (
            lambda q, x, g: racing.race(q, x, g, UNIFORM, racing.betting, 2),
            "a budget of at least 3",
        ),
        (
            lambda q, x, g: racing.race(
                q, x, g, UNIFORM, partial(racing.betting, alpha=0, reach=1), 9
            ),
            "alpha between 0",
        ),
        (
            lambda q, x, g: racing.race(
                q, x, g, UNIFORM, partial(racing.normal_mixture, alpha=0.1, scale=0), 9
            ),
            "scale > 0",
        ),
        (lambda q, x, g: racing.full(q, 255 * x, g), "divide by 255"),
        (lambda q, x, g: iter([racing.pilot(q, x, g, samples=1)]), "samples >= 2"),
        (
            lambda q, x, g: racing.full(plane(log_prior=torch.zeros(2)), x, g),
            "log-prior for each of 3 classes",
        ),
    ],
)
def test_impossible_wishes_get_a_sentence(run, sentence):
    with pytest.raises(ValueError, match=sentence):
        racing.answer(run(plane(), points(2), seeded()))
