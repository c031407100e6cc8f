"""The scene of a smoothed line: its share against copies that are drawn, its radii against the truth, and its figures."""

import numpy as np
import pytest
import torch
from diffclass.certify import certificates
from diffclass.course import widgets
from diffclass.course.scenes.smoothing import REACH, SmoothingScene, barcode
from diffclass.noise import generator_of
from scipy import stats

BASES = tuple(SmoothingScene().bases)


@pytest.fixture(scope="module")
def scene():
    return SmoothingScene()


def drawn_share(edges, x, sigma, copies=400_000, seed=0):
    """The share of copies on a stripe, counted."""
    noised = x + sigma * np.random.default_rng(seed).standard_normal(copies)
    return float((np.searchsorted(edges, noised) % 2 == 1).mean())


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("x, sigma", [(-0.4, 0.05), (0.16, 0.2), (0.7, 0.5)])
def test_the_share_is_that_of_drawn_copies(scene, base, x, sigma):
    counted = drawn_share(scene.bases[base], x, sigma)
    share = float(scene.share(base, x, sigma)[0])
    assert abs(counted - share) < 5 * (0.25 / 400_000) ** 0.5
    half = float(scene.share(base, x, sigma / 2)[0])  # sigma is no variance: its twin is seen
    assert base != BASES[0] or abs(half - share) > 0.001


@pytest.mark.parametrize("base", BASES)
def test_no_radius_reaches_the_nearest_other_answer(scene, base):
    rng = np.random.default_rng(1)
    for _ in range(300):
        x = rng.uniform(-REACH, REACH)
        sigma = rng.uniform(0.02, 0.6)
        strong, weak = scene.radii(base, x, sigma)
        truth = scene.nearest_turn(base, x, sigma)
        assert weak <= strong + 1e-12
        assert truth is None or strong <= truth + 1e-4
        if base == "a straight boundary" and strong < 5 * sigma:
            assert strong == pytest.approx(truth, abs=1e-4)


def test_a_radius_that_forgets_phi_would_be_caught(scene):
    """The test above can fail: a radius of sigma times the share, or of twice the sigma, passes other answers."""
    passed = {"share": 0, "double": 0}
    for x in np.linspace(-0.9, 0.9, 60):
        truth = scene.nearest_turn("a barcode", x, 0.1)
        share = float(scene.share("a barcode", x, 0.1)[0])
        passed["share"] += 0.1 * max(share, 1 - share) > truth
        passed["double"] += 2 * scene.radii("a barcode", x, 0.1)[0] > truth
    assert min(passed.values()) > 5


def test_the_answer_changes_where_the_scene_says(scene):
    turns = scene.turns("a barcode", 0.05)
    assert len(turns) > 3
    for place in turns:
        below, above = scene.share("a barcode", np.array([place - 0.01, place + 0.01]), 0.05)
        assert (below - 0.5) * (above - 0.5) < 0
        assert float(scene.share("a barcode", place, 0.05)[0]) == pytest.approx(0.5, abs=1e-3)


def test_the_strong_radius_is_that_of_votes_without_end(scene):
    """Votes in the very share, ever more of them: the library's certificate comes from below."""
    share = float(scene.share("a barcode", 0.16, 0.2)[0])
    strong, _ = scene.radii("a barcode", 0.16, 0.2)
    won = max(share, 1 - share)
    reached = []
    for n in (100, 10_000, 100_000_000):
        counts = (round(n * won), n - round(n * won))
        votes = certificates.Votes((10, 0), counts, 0.2, 0)
        reached.append(certificates.smoothing_radius(votes).radius)
    assert reached == sorted(reached)
    assert reached[-1] == pytest.approx(strong, abs=1e-3)


def test_stripes_fill_the_line_in_order():
    edges = barcode(0.02, 0.5, generator_of(0, "barcode"))
    assert len(edges) % 2 == 0 and (np.diff(edges) >= 0.02 - 1e-12).all()
    assert edges[0] < -0.4 and 0.4 < edges[-1] < REACH
    assert np.array_equal(edges, barcode(0.02, 0.5, generator_of(0, "barcode")))


def test_an_unknown_base_is_named(scene):
    with pytest.raises(ValueError, match="a barcode"):
        scene.share("a zebra", 0.0, 0.2)


def test_every_place_and_noise_can_be_drawn():
    hero = widgets.smoothing_hero()
    for base in BASES:
        hero.controls["base"].value = base
        for x in (-1.0, 0.0, 0.16, 1.0):
            hero.controls["x"].value = x
            for sigma in (0.02, 0.2, 0.63):
                hero.controls["sigma"].value = sigma
                frame = hero.stage.frame
                assert "could not be drawn" not in frame["note"], frame["note"]
                assert frame["rows"] == [2, 1]
    hero.stage.cursor = -0.5
    assert hero.controls["x"].value == -0.5
    assert "x = -0.50" in hero.stage.frame["note"]


def test_the_figure_shows_what_the_note_says(scene):
    frame = scene.at("a barcode", 0.16, 0.2)
    share = float(scene.share("a barcode", 0.16, 0.2)[0])
    strong = 0.2 * stats.norm.ppf(max(share, 1 - share))
    assert f"<b>{strong:.3f}</b>" in frame["note"]
    marks = [mark["text"] for mark in frame["panels"][2]["rows"][0]["marks"]]
    assert marks == [f"{strong:.2f}", f"{scene.nearest_turn('a barcode', 0.16, 0.2):.2f}"]
    assert torch.tensor(frame["panels"][1]["series"][1]["y"]).numpy().tolist()[::2] == [0.0, 0.0]
