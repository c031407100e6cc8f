"""A hundred classes under noise: what shared noise, sifting, racing and one call for all save, each by itself."""

import functools
import json
import math
import pickle

import contract
import pytest
import torch
import twins
from diffclass import likelihood, noise, units, zoo
from diffclass.classifiers import economical, racing
from diffclass.classifiers.base import draw, take
from diffclass.classifiers.noised import NoisedBayesClassifier
from diffclass.classifiers.one_call import NoisedOneCallClassifier
from diffclass.classifiers.smoothed import Smoothed
from diffclass.data import hundred
from diffclass.data.hundred import CLASSES, SHAPE
from diffclass.data.worlds import world_of
from diffclass.denoisers.exact import MixtureDenoiser
from diffclass.evaluation import certification
from diffclass.noise import NoiseBank
from diffclass.storage import assets
from test_cli_certifying import run, sentence

SIGMA = 0.25  # in pixels
PICTURES = 24
LEVELS = 16


def seeded(seed=0):
    """A generator with a seed."""
    return torch.Generator().manual_seed(seed)


@functools.cache
def denoiser():
    """That of the world of a hundred classes."""
    return MixtureDenoiser.of_law(hundred.hundred())


@functools.cache
def pictures():
    """Noised pictures in pixel units, and the class that the exact posterior names."""
    x, _ = hundred.hundred().sample(PICTURES, seeded(1), torch.float64)
    x_tau = x + SIGMA * torch.randn(x.shape, generator=seeded(2), dtype=torch.float64)
    return x_tau, denoiser().log_density(units.to_model(x_tau), 2 * SIGMA).argmax(1)


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


# ---------------------------------------------------------------------------------------------------------------------
# The world, and classifiers of it that ask no more than it takes

ECONOMICAL = ("epndc-own-noise", "epndc-sifted", "epndc-raced")


@functools.cache
def entry(name):
    return zoo.noised.classifier("hundred", name, SIGMA)


def billed(name, count=3, seed=0):
    """Logits and calls of the first noised pictures."""
    x_tau = pictures()[0][:count].float()
    return entry(name).billed(x_tau, draw(entry(name), count, seed))


def test_the_world_is_a_hundred_classes_of_pictures():
    place = world_of("hundred")
    images, labels = place.test(300)
    assert place.kind == place.name == "hundred" and len(place.class_names) == CLASSES
    assert images.shape == (300, *SHAPE) and 0 <= float(images.min()) < float(images.max()) <= 1
    assert len(labels.unique()) > 80
    again, _ = world_of("HUNDRED").test(300)
    other, _ = place.test(300, seed=1)
    assert torch.equal(images, again) and not torch.equal(images, other)
    with pytest.raises(ValueError, match="'hundred' alone"):
        world_of("hundred:noise-3")


@twins.rejected({"the classes of other pictures": dict(shift=1)})
def test_its_posterior_is_that_of_the_components(shift=0):
    """By hand: the density of 200 Gaussians, summed over the two of a class."""
    law = hundred.hundred()
    x, _ = law.sample(5, seeded(7), torch.float64)
    z = units.to_model(x).flatten(1)
    logs = -(torch.cdist(z, law.means) ** 2) / (2 * 0.1**2)
    wanted = logs.softmax(1).reshape(5, CLASSES, 2).sum(2).roll(shift, 1)
    assert float((law.posterior(x) - wanted).abs().max()) < 1e-9
    assert law.tail < 1e-6 and float(law.means.abs().max()) <= 0.4


def test_the_names_of_the_world():
    noised = zoo.noised.names("hundred")
    assert {"epndc", "apndc", "one-call-noised", "exact", *ECONOMICAL} <= set(noised)
    assert "dc" in zoo.names("hundred") and "cnn" not in zoo.names("hundred")
    assert not set(ECONOMICAL) & {*zoo.noised.names("digits"), *zoo.noised.names("plane:moons")}


@pytest.mark.parametrize("name", ECONOMICAL)
def test_each_answers_from_seeds_alone_whatever_else_is_asked(name):
    x_tau = pictures()[0][:3].float()
    model = entry(name)
    seeds = draw(model, 3, 0)
    logits, calls = model.billed(x_tau, seeds)
    alone, own = model.billed(x_tau[1:2], take(seeds, slice(1, 2)))
    assert torch.equal(calls[1:2], own) and torch.equal(alone.argmax(1), logits[1:2].argmax(1))
    other, _ = model.billed(x_tau, draw(model, 3, 1))
    assert not torch.equal(other, logits)
    assert bool(torch.isfinite(logits).all()) and bool((calls <= model.calls).all())
    assert model.scale == "scores" and model.gradients() == {}
    assert torch.equal(pickle.loads(pickle.dumps(model))(x_tau, seeds), logits)
    mean = model.surrogate()(x_tau, seeds)
    assert mean.shape == logits.shape and mean.requires_grad == logits.requires_grad


@pytest.mark.parametrize("promise", contract.CHECKS)
def test_sifting_keeps_the_contract(promise):
    contract.check_promise(promise, entry("epndc-sifted"), pictures()[0][:4].float())


@twins.rejected(
    {
        "on a level with the worst": dict(changes=dict(STEP=0.0)),
        "infinitely far": dict(changes=dict(STEP=math.inf)),
    }
)
def test_classes_that_are_out_lie_a_step_below_the_worst_survivor(changes=None):
    model = entry("epndc-sifted")
    x_tau = pictures()[0][:4].float()
    ask = twins.patched(model.billed, economical, **(changes or {}))
    logits, _ = ask(x_tau, draw(model, 4, 0))
    for row in logits.double():
        values, counts = row.unique(return_counts=True)  # ascending: the floor first
        assert int(counts[0]) >= CLASSES - 3 and abs(float(values[1] - values[0]) - 1) < 1e-3


def test_each_saves_what_it_promises_and_answers_as_the_truth():
    _, truth = pictures()
    whole, cost = billed("epndc", 12)
    assert bool((cost == 16 * CLASSES).all()) and bool((whole.argmax(1) == truth[:12]).all())
    logits, calls = billed("epndc-sifted", 12)
    assert float(calls.double().mean()) < 0.6 * 16 * CLASSES
    assert float((logits.argmax(1) == truth[:12]).double().mean()) >= 0.9
    _, own = billed("epndc-own-noise", 2)
    assert own.tolist() == [16 * CLASSES] * 2
    single, one = billed("one-call-noised", 12)
    assert one.tolist() == [CLASSES + 1] * 12 and bool((single.argmax(1) == truth[:12]).all())


def test_votes_tell_what_they_cost():
    model = Smoothed(entry("epndc-sifted"))
    x, _ = world_of("hundred").test(1)
    billed_counts = list(model.billed_count(x, 3, 5, together=2))
    assert [int(counts.sum()) for counts, _ in billed_counts] == [2, 4, 5]
    calls = [spent for _, spent in billed_counts]
    assert calls == sorted(calls) and 5 * CLASSES < calls[-1] < 5 * entry("epndc-sifted").calls
    assert [c.tolist() for c in model.count(x, 3, 5, together=2)] == [
        c.tolist() for c, _ in billed_counts
    ]


def test_a_certificate_of_many_classes_is_stored_resumed_and_verified(tmp_path, monkeypatch):
    monkeypatch.setattr(certification, "STEPS", 2)  # of the attack inside the radius
    monkeypatch.setattr(certification, "COPIES", 4)
    command = ("certify", "epndc-sifted", "--world", "hundred", "--sigma", 0.25, "--limit", 2)
    command += ("--selection", 3, "--votes", 12, "--radii", 0.02, "--store", tmp_path / "run")
    assert run(*command).exit_code == 0
    path = tmp_path / "run" / "votes-0.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(0 < row["calls"] < 15 * 1600 for row in rows)
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    assert run(*command).exit_code == 0
    again = [json.loads(line) for line in path.read_text().splitlines()]
    assert [{**row, "seconds": 0} for row in again] == [{**row, "seconds": 0} for row in rows]
    verdict = json.loads(run("--json", "verify", tmp_path / "run", "--reattack", 1).stdout)
    assert verdict["stands"] and verdict["recounted"] == 1


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda base: economical.sifted(base, -1.0, 4, 3), "a threshold > 0"),
        (lambda base: economical.sifted(base, 10.0, 99, 3), "levels to sift by"),
        (lambda base: economical.sifted(base, 10.0, 4, 101), "classes that are refined"),
        (lambda base: economical.raced(base, None, 0.0, 3200), "alpha > 0"),
        (lambda base: economical.raced(base, None, 1.0, 3200), "alpha below 1"),
        (lambda base: economical.raced(base, None, 0.01, 10), "the budget of a race"),
    ],
)
def test_what_no_strategy_can_do_gets_a_sentence(make, said):
    with pytest.raises(ValueError, match=said):
        make(entry("epndc"))


def test_generators_of_other_pictures_get_a_sentence():
    with pytest.raises(ValueError, match="one for each of 2 images, got 3"):
        racing.Meter(question(), pictures()[0][:2], [seeded()] * 3)


def test_a_world_without_networks_says_what_it_has(tmp_path):
    done = run("certify", "cohen", "--world", "hundred", "--sigma", 0.25, "--store", tmp_path)
    assert "epndc-sifted" in sentence(done)


def test_the_stored_savings_follow_from_their_rows():
    """Calls a vote: all classes at all levels 1600; sifted and raced about half; one call for all as many as heads."""
    per_vote = {}
    for folder in sorted((assets.folder() / "records" / "hundred-certified").iterdir()):
        stored = certification.read(folder)
        assert certification.kept(folder)
        for row, certificate in zip(stored.rows, stored.certificates(), strict=True):
            assert abs(row["radius"] - certificate.radius) < 1e-9
        votes = sum(one.n + stored.plan.selection for one in stored.votes())
        per_vote[folder.name] = sum(row["calls"] for row in stored.rows) / votes
    assert per_vote["epndc"] == per_vote["epndc-own-noise"] == 16 * CLASSES
    assert per_vote["apndc"] == 16 * CLASSES + 1 and per_vote["one-call-noised"] == CLASSES + 1
    assert per_vote["epndc-sifted"] < 800 and per_vote["epndc-raced"] < 1000
