"""The scene of a race: bills as the meter counts them, the line above which a class is out, and honest captions."""

import math
from functools import partial

import pytest
import torch
from diffclass.classifiers import racing
from diffclass.course.scenes.digits import DigitScene
from diffclass.course.scenes.racing import ALPHA, LEVELS, RACE, STAGED, RaceScene, limit
from diffclass.denoisers.base import Denoiser
from diffclass.zoo import networks


class Conditional(Denoiser):
    """The heads of a network, asked one by one."""

    def __init__(self, heads):
        super().__init__()
        self.heads = heads
        self.num_classes = heads.num_classes
        self.image_shape = heads.image_shape
        self.sigma_range = heads.sigma_range

    def estimate(self, x_sigma, sigma, classes):
        return self.heads.estimate(x_sigma, sigma, classes)


@pytest.fixture(scope="module")
def scene():
    return RaceScene(DigitScene(networks.load_digits_denoiser()))


@pytest.fixture(scope="module")
def conditional(scene):
    return RaceScene(DigitScene(Conditional(scene.question.denoiser)))


@pytest.mark.parametrize("strategy", RaceScene.STRATEGIES)
def test_bills_of_a_network_with_heads_are_those_of_a_conditional_one(scene, conditional, strategy):
    """The meter of a conditional network counts what the scene works out for one with heads."""
    assert scene.question.denoiser.one_call and not conditional.question.denoiser.one_call
    ours = scene.run(3, strategy, 8.0)
    counted = conditional.run(3, strategy, 8.0)
    both = range(
        min(len(ours), len(counted))
    )  # a race counts its budget in evaluations, so one may end later
    assert [ours[i].bill for i in both] == [int(counted[i].answer.evaluations) for i in both]
    assert (
        all(torch.equal(ours[i].alive, counted[i].alive) for i in both)
        and ours[-1].bill <= scene.whole
    )


def test_a_class_above_the_line_is_out(scene):
    seen = 0
    for index in range(8):
        film = scene.run(index, RACE, 6.0)
        line = limit(torch.arange(1, len(film) + 1, dtype=torch.float64), 6.0, 10)
        for moment, at in zip(film, line, strict=True):
            assert not bool((moment.alive & (moment.lead > at + 0.01)).any())
            seen += int((moment.lead > at).sum())
    assert seen > 0


def test_the_line_is_where_one_rival_alone_convinces():
    for n in (1, 7):
        mean = float(limit(torch.tensor([float(n)]), 3.0, 4))
        for factor, wanted in ((1.01, True), (0.99, False)):
            pair = torch.full((1, 4, 4), -1e3, dtype=torch.float64)
            state = None
            pair[0, 0, 1] = factor * mean
            for _ in range(n):
                out, state = racing.normal_mixture(pair, state, alpha=ALPHA, scale=3.0)
            assert bool(out[0, 0]) is wanted


def test_a_frame_shows_the_answer_of_the_library(scene):
    x = scene.world.test_images[5:6]
    rule = partial(racing.normal_mixture, alpha=ALPHA, scale=8.0)
    generator = torch.Generator().manual_seed(1)
    found = racing.answer(
        racing.race(scene.question, x, generator, scene.pilot.share, rule, LEVELS)
    )
    frame = scene.at(5, RACE, 8.0, scene.whole)
    posterior = torch.softmax((-found.estimates[0]).masked_fill(~found.alive[0], -math.inf), 0)
    shown = torch.tensor(frame["panels"][2]["values"], dtype=torch.float64)
    assert (
        torch.allclose(shown, posterior, atol=1e-4)
        and f"<b>{int(found.prediction)}</b>" in frame["note"]
    )
    assert frame["panels"][3]["values"][2] == LEVELS * 10


def test_a_race_that_one_draw_decides_can_be_drawn(scene):
    """Under an absurdly bold assumption all but the leader are often out at once."""
    index = next(i for i in range(60) if len(scene.run(i, RACE, 0.1)) == 1)
    frame = scene.at(index, RACE, 0.1, 10)
    assert frame["panels"][3]["values"][:2] == [10, 10] and len(frame["panels"][1]["x"]) == 2


@pytest.mark.parametrize("strategy", RaceScene.STRATEGIES)
def test_a_run_says_what_it_was_run_with(scene, strategy):
    """The assumed scale belongs to the race alone: under another strategy the slider changes nothing, and it says so."""
    notes = [scene.at(3, strategy, scale, 60)["note"] for scale in (6.0, 12.0)]
    if strategy == RACE:
        assert "assumed scale 6.0 nats" in notes[0] and "assumed scale 12.0 nats" in notes[1]
    else:
        assert notes[0] == notes[1] and "uses no assumed scale" in notes[0]


def test_a_frame_before_the_first_bill_shows_the_bill_and_not_the_slider(scene):
    first = scene.run(3, STAGED, 8.0)[0].bill
    frame = scene.at(3, STAGED, 8.0, first - 2)
    assert frame["panels"][1]["cursor"] == frame["panels"][3]["values"][0] == first
    assert f"After {first} evaluations" in frame["note"]
