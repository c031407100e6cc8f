"""The scene of votes: counts are the library's, bounds are read again and never counted again, jobs go on where they were."""

import asyncio
import time

import numpy as np
import pytest
import torch
from diffclass import intervals
from diffclass.certify import anytime, certificates, counting
from diffclass.classifiers.noised import NoisedBayesClassifier
from diffclass.classifiers.smoothed import Smoothed
from diffclass.course import widgets
from diffclass.course.scenes import certifying
from diffclass.course.scenes.certifying import MOST, SELECTION, TOGETHER, CertifyingScene
from diffclass.noise import seed_of
from diffclass.zoo import networks

SIGMA = 0.25


@pytest.fixture(scope="module")
def student():
    return networks.load_digits_denoiser()


@pytest.fixture
def scene(student):
    return CertifyingScene(student)


@pytest.fixture(scope="module")
def counted(student):
    """A digit with 200 votes."""
    scene = CertifyingScene(student)
    list(scene.vote(12, SIGMA, 200))
    return scene


def panel(frame, start):
    """The panel whose title begins so."""
    return next(one for one in frame["panels"] if one["title"].startswith(start))


def lines(frame, start):
    """The labelled series of a panel, by label."""
    return {one["label"]: one for one in panel(frame, start)["series"] if one["label"]}


def test_votes_are_those_that_a_certificate_counts(counted, student):
    ballot = counted.ballot(12, SIGMA)
    x = counted.picture(12)
    smoothed = Smoothed(NoisedBayesClassifier(student, SIGMA))
    *_, (_, votes) = counting.draw_votes(
        smoothed, x, selection=SELECTION, estimation=200, seed=0, picture=12
    )
    assert tuple(ballot.selection.tolist()) == votes.selection
    assert tuple(ballot.looks[-1].tolist()) == votes.estimation
    assert [int(counts.sum()) for counts in ballot.looks] == list(range(TOGETHER, 201, TOGETHER))
    shown = panel(counted.at(12, SIGMA, 0.001, MOST), "The first 200 votes of 200 cast")
    np.testing.assert_allclose(shown["values"], np.array(votes.estimation) / 200, atol=1e-4)


def test_both_bounds_and_radii_are_the_librarys_at_every_look(counted):
    ballot = counted.ballot(12, SIGMA)
    frame = counted.at(12, SIGMA, 0.01, 120)
    n = np.arange(TOGETHER, 201, TOGETHER)
    hits = np.array(ballot.hits)
    fixed = np.array(
        [intervals.lower_bound(int(s), int(m), 0.01) for s, m in zip(hits, n, strict=True)]
    )
    shares = lines(frame, "Share of the chosen class")
    np.testing.assert_allclose(shares["bound, n fixed beforehand"]["y"], fixed, rtol=1e-4)
    every = anytime.anytime_bound(hits, n, 0.01)
    np.testing.assert_allclose(shares["bound at every look"]["y"], every, rtol=1e-4)
    assert shares["bound at every look"]["x"] == n.tolist()
    radii = lines(frame, "Certified radius")
    for label, bound in (
        ("radius, n fixed beforehand", "fixed"),
        ("radius at every look", "anytime"),
    ):
        wanted = []
        for counts in ballot.looks:
            votes = certificates.Votes(
                tuple(ballot.selection.tolist()), tuple(counts.tolist()), SIGMA
            )
            wanted.append(certificates.smoothing_radius(votes, 0.01, bound).radius)
        np.testing.assert_allclose(radii[label]["y"], wanted, rtol=1e-4, atol=1e-9)
        row = {"fixed": 0, "anytime": 1}[bound]
        certified = panel(frame, "How far")["rows"][row]["segments"][0]["to"]
        assert certified == pytest.approx(wanted[120 // TOGETHER - 1])
    ceiling = radii["ceiling: all n votes agree"]
    highest = [certificates.largest_radius(n, SIGMA, 0.01) for n in ceiling["x"]]
    np.testing.assert_allclose(ceiling["y"], highest, rtol=1e-4)
    limit = certificates.largest_radius(200, SIGMA, 0.01)
    assert max(radii["radius at every look"]["y"]) < limit < max(ceiling["y"])


def test_another_alpha_reads_the_same_votes_again(counted, monkeypatch):
    def no_votes(*_, **__):
        raise AssertionError("a vote was cast")

    before = counted.at(12, SIGMA, 0.001, MOST)
    monkeypatch.setattr(Smoothed, "count", no_votes)
    after = counted.at(12, SIGMA, 0.05, MOST)
    assert panel(before, "The first")["values"] == panel(after, "The first")["values"]
    radii = [frame["panels"][4]["rows"][1]["segments"][0]["to"] for frame in (before, after)]
    assert 0 < radii[0] < radii[1]


def test_scrubbing_shows_the_counts_up_to_there(counted):
    frame = counted.at(12, SIGMA, 0.001, 60)
    shown = panel(frame, "The first 60 votes of 200 cast")
    counts = counted.ballot(12, SIGMA).looks[2]
    assert shown["texts"] == [str(int(c)) if c else "" for c in counts]
    assert panel(frame, "Share of the chosen class")["cursor"] == 60
    assert f"which won {int(counts[7])} of the first 60 others" in frame["note"]


def test_a_digit_without_votes_says_so_and_has_a_ceiling_only(scene):
    frame = scene.at(3, 0.5, 0.001, MOST)
    assert panel(frame, "No votes yet: press Vote")
    assert list(lines(frame, "Certified radius")) == ["ceiling: all n votes agree"]
    assert "No vote has been cast on this 2 at σ = 0.50 yet: press Vote." == frame["note"]
    assert [row["segments"][0]["to"] for row in frame["panels"][4]["rows"]] == [0.0, 0.0]


def test_a_stopped_count_goes_on_where_it_was(scene, student):
    job = scene.vote(12, SIGMA, 200)
    for _ in range(4):  # the selection and three looks
        next(job)
    job.close()
    ballot = scene.ballot(12, SIGMA)
    assert ballot.n == 3 * TOGETHER
    assert "Counting stopped after 60" in scene.at(12, SIGMA, 0.001, MOST)["note"]
    list(scene.vote(12, SIGMA, 140))
    whole = CertifyingScene(student)
    list(whole.vote(12, SIGMA, 200))
    assert torch.equal(ballot.looks[-1], whole.ballot(12, SIGMA).looks[-1])
    assert len(ballot.looks) == 10


def test_a_failed_count_goes_on_with_the_same_votes(scene, student, monkeypatch):
    list(scene.vote(12, SIGMA, 60))
    plain = certifying.Smoothed.count

    def failing(*args, **more):
        yield from ()
        raise FloatingPointError("NaN among the logits")

    ballot = scene.ballot(12, SIGMA)
    ballot.counting = failing()
    with pytest.raises(FloatingPointError):
        list(scene.vote(12, SIGMA, 60))
    assert ballot.n == 60 and "Counting failed" in scene.at(12, SIGMA, 0.001, MOST)["note"]
    list(scene.vote(12, SIGMA, 60))
    *_, wanted = plain(
        ballot.smoothed,
        scene.picture(12),
        seed_of(0, "estimation", 12),
        120,
        together=TOGETHER,
    )
    assert torch.equal(ballot.looks[-1], wanted)


def test_no_more_than_most_votes_are_cast(scene, monkeypatch):
    monkeypatch.setattr(certifying, "MOST", 60)
    assert list(scene.vote(12, SIGMA, 200))[-1] == 1.0
    assert scene.ballot(12, SIGMA).n == 60
    list(scene.vote(12, SIGMA, 200))
    assert scene.ballot(12, SIGMA).n == 60


def test_the_copies_shown_are_the_first_that_vote(scene):
    ballot = scene.ballot(12, SIGMA)
    drawn = ballot.smoothed.mean.drawn(seed_of(0, "estimation", 12), 0, 100)
    first = scene.picture(12) + SIGMA * drawn[0][: certifying.COPIES]
    assert torch.equal(ballot.copies, first)
    with torch.no_grad():
        answers = ballot.smoothed.mean.copies(scene.picture(12), drawn).argmax(1)
    assert torch.equal(ballot.answers, answers[: certifying.COPIES])


def test_an_attack_lies_outside_the_certificate_and_closes_the_axis(scene):
    list(scene.vote(8, SIGMA, 200))
    seen = list(scene.attack(8, SIGMA, 0.001))
    ballot = scene.ballot(8, SIGMA)
    frame = scene.at(8, SIGMA, 0.001, MOST)
    for row in frame["panels"][4]["rows"]:
        kinds = [(one["text"], one["from"]) for one in row["segments"]]
        assert kinds[2] == ("an attack exists", ballot.smallest)
        assert row["segments"][0]["to"] < ballot.smallest
    assert f"a change of {ballot.smallest:.2f} turns them" in frame["note"]
    assert seen == sorted(seen) and seen[-1] == 1.0


def test_an_attack_without_votes_chooses_the_class_first(scene):
    job = scene.attack(12, SIGMA, 0.001)
    next(job)
    ballot = scene.ballot(12, SIGMA)
    assert int(ballot.selection.sum()) == SELECTION and ballot.n == 0
    job.close()
    assert (
        "none of the votes that bound its share is cast yet" in scene.at(12, SIGMA, 0.1, 20)["note"]
    )


def test_a_change_that_turns_the_votes_is_found_by_the_shared_search(student):
    """The same search as the explorer's: what it returns is proven by votes that it did not see."""
    scene = CertifyingScene(student)
    ballot = scene.ballot(8, SIGMA)
    x = scene.picture(8)
    *_, (share, length) = certifying.attack_votes(
        ballot.smoothed, x, 5, alpha=0.001, votes=60, seed=0, picture=8
    )
    assert share <= 1 and 0.1 < length < 4.5


# -- the hero -----------------------------------------------------------------------------------------------------------


def test_the_hero_counts_while_it_draws_and_stops_at_once(student):
    async def session():
        hero = widgets.certify_hero(student)
        begun = hero.scene.ballot(*hero.place()).n
        hero.run_vote.click()
        for _ in range(5):
            await asyncio.sleep(0)
        hero.stop.click()
        seen = hero.scene.ballot(*hero.place()).n
        for _ in range(5):
            await asyncio.sleep(0)
        return begun, seen, hero.scene.ballot(*hero.place()).n, hero

    begun, seen, after, hero = asyncio.run(session())
    assert begun == 100 < seen == after < 1100 and hero.progress.description == "stopped"
    assert f"Counting stopped after {after}" in hero.stage.frame["note"]


@pytest.mark.parametrize("name, value", [("index", 3), ("sigma", 0.4)])
def test_another_digit_or_sigma_ends_the_count_and_shows_none_of_it(student, name, value):
    async def session():
        hero = widgets.certify_hero(student)
        old = hero.place()
        hero.run_vote.click()
        for _ in range(3):
            await asyncio.sleep(0)
        hero.controls[name].value = value
        seen = hero.scene.ballot(*old).n
        for _ in range(5):
            await asyncio.sleep(0)
        return hero, old, seen

    hero, old, seen = asyncio.run(session())
    assert hero.scene.ballot(*old).n == seen and hero.progress.description == "stopped"
    assert hero.scene.ballot(*hero.place()).n == 0
    assert "No votes yet: press Vote" in [one["title"] for one in hero.stage.frame["panels"]]
    hero.controls[name].value = dict(zip(("index", "sigma"), old, strict=True))[name]
    assert f"The first {seen} votes of {seen} cast" in [
        one["title"] for one in hero.stage.frame["panels"]
    ]


def test_an_item_of_the_count_is_short(scene):
    """Stop acts between two items, so none may last long; its own work, whatever else the machine does."""
    list(scene.vote(12, SIGMA, TOGETHER))
    job = scene.vote(12, SIGMA, 200)
    times = []
    for _ in range(8):
        start = time.process_time()
        next(job)
        times.append(time.process_time() - start)
    assert np.median(times) < 0.2, f"{1000 * np.median(times):.0f} ms"


def test_voting_shows_the_newest_votes(student):
    hero = widgets.certify_hero(student)
    hero.controls["shown"].value = 40
    assert "The first 40 votes of 100 cast" in [one["title"] for one in hero.stage.frame["panels"]]
    hero.scene.vote = lambda *place: (share for share in ())
    hero.vote()
    assert hero.controls["shown"].value == MOST and hero.progress.description == "done"
