"""Figures, scenes and heroes without a browser: controls move their frames in time, the explorer's jobs are true."""

import asyncio
import json
import time

import numpy as np
import pytest
import torch
from diffclass import attacks, data, intervals
from diffclass.certify import certificates, counting
from diffclass.classifiers.base import Held
from diffclass.classifiers.noised import NoisedBayesClassifier
from diffclass.classifiers.smoothed import Smoothed
from diffclass.course import figures, widgets
from diffclass.course.scenes.digits import DigitScene
from diffclass.course.scenes.explorer import ExplorerScene
from diffclass.course.scenes.plane import PlaneScene
from diffclass.data import gallery
from diffclass.evaluation import measuring
from diffclass.storage import assets
from diffclass.zoo import networks


@pytest.fixture(scope="module")
def student():
    return networks.load_digits_denoiser()


def photos(_):
    """The drawn pictures, which are in the repository, with their stored losses."""
    return widgets.photo_hero(
        gallery.pictures()[0], measuring.read(assets.folder() / "records/gallery-prototype")
    )


HEROES = {
    "digit": widgets.digit_hero,
    "forward": lambda _: widgets.forward_hero(),
    "elbo": lambda _: widgets.elbo_hero(),
    "bayes": lambda _: widgets.bayes_hero(),
    "denoiser": lambda _: widgets.denoiser_hero(),
    "optimal digits": widgets.optimal_digits_hero,
    "explorer": widgets.explorer,
    "racing": widgets.racing_hero,
    "photos": photos,
    "translation": lambda _: widgets.translation_hero(networks.load_translator()),
    "audit": lambda _: widgets.audit_hero(),
    "attack": widgets.attack_hero,
    "maximisation": widgets.maximisation_hero,
}
each_hero = pytest.mark.parametrize("make", HEROES.values(), ids=HEROES)


def another(control):
    """A value that a reader can choose and has not chosen."""
    if hasattr(control, "options"):
        return next(o for o in control.options if o != control.value)
    if isinstance(control.value, tuple):  # a band: give up its upper end
        return control.value[0], control.value[1] - 1
    low, high = (
        control.base**v if hasattr(control, "base") else v for v in (control.min, control.max)
    )
    return high if control.value < (low + high) / 2 else low


def controls_of(hero):
    if isinstance(hero, widgets.Hero | widgets.Filmed):
        return hero.controls
    return {name: getattr(hero, name) for name in ("index", "sigma", "votes")}


# -- heroes -----------------------------------------------------------------------------------------------------------


@each_hero
def test_every_control_moves_the_frame_quickly(make, student):
    hero = make(student)
    for name, control in controls_of(hero).items():
        before = json.dumps(hero.stage.frame)
        start = time.perf_counter()
        control.value = another(control)
        elapsed = time.perf_counter() - start
        assert json.dumps(hero.stage.frame) != before, f"{name} changes nothing"
        assert elapsed < 0.5, (
            f"{name} took {elapsed:.2f} s"
        )  # the browser bench: 100 ms with repaint


@each_hero
def test_the_callback_leaves_the_browser_its_share_of_the_100_ms(make, student):
    hero = make(student)
    first, control = next(iter(controls_of(hero).items()))
    times = []
    values = (control.value, another(control))
    for turn in range(12):
        start = (
            time.thread_time()
        )  # its own work: a busy machine's waiting is no property of the callback
        control.value = values[(turn + 1) % 2]
        times.append(time.thread_time() - start)
    assert np.median(times) < 0.06, f"{first}: {1000 * np.median(times):.0f} ms"


@each_hero
def test_every_panel_speaks_to_those_who_do_not_see_it(make, student):
    frame = make(student).stage.frame
    assert frame["panels"] and len(frame["note"]) > 20
    for panel in frame["panels"]:
        assert panel["title"] and len(panel["alt"].split()) >= 4, panel["kind"]
        if panel["kind"] == "curves":
            assert panel["xlabel"] and panel["ylabel"]


@each_hero
def test_the_same_state_gives_the_same_frame(make, student):
    assert make(student).stage.frame == make(student).stage.frame


@pytest.mark.parametrize("name", ["elbo", "bayes", "denoiser"])
def test_a_dragged_point_is_the_point_of_the_frame(name, student):
    hero = HEROES[name](student)
    before = hero.stage.frame
    hero.stage.point = [-0.4, 0.3]
    assert hero.stage.frame["panels"][0]["handle"] == [-0.4, 0.3]
    assert hero.stage.frame["panels"][1]["series"] != before["panels"][1]["series"]


@pytest.mark.parametrize("name", ["digit", "denoiser"])
def test_dragging_the_cursor_is_moving_the_slider(name, student):
    hero = HEROES[name](student)
    hero.stage.cursor = 1.5
    assert hero.controls["sigma"].value == pytest.approx(1.5)
    assert any(panel.get("cursor") == pytest.approx(1.5) for panel in hero.stage.frame["panels"])


@pytest.mark.parametrize(
    ("name", "control", "dragged", "wanted"),
    [("forward", "t", 300.4, 300), ("elbo", "steps", 30.9, 32), ("racing", "spent", 61.2, 62)],
)
def test_the_cursor_moves_a_slider_with_whole_steps(name, control, dragged, wanted, student):
    hero = HEROES[name](student)
    hero.stage.cursor = dragged
    assert hero.controls[control].value == wanted


def test_a_click_on_a_class_shows_its_curve(student):
    hero = widgets.digit_hero(student)
    third = int(np.argsort(hero.stage.frame["panels"][3]["values"])[0])
    hero.stage.picked = third
    lines = hero.stage.frame["panels"][2]["series"]
    assert figures.WRONG in [line["color"] for line in lines if line["label"] == str(third)]


# -- what the frames show is what the library computes ----------------------------------------------------------------


def test_bars_of_the_digit_hero_are_the_posterior_of_the_classifier(student):
    hero = widgets.digit_hero(student, index=7)
    classifier = Held.seeded(networks.digit_classifier(student))
    share = classifier.posterior(data.digits().test_images[7:8])[0]
    np.testing.assert_allclose(hero.stage.frame["panels"][3]["values"], share.detach(), atol=1e-4)


def test_the_bound_of_the_elbo_frame_stays_below_the_truth_and_closes():
    scene = PlaneScene(data.gaussians())
    gaps = []
    for steps in (8, 32, 128):
        bars = scene.elbo((0.1, 0.1), steps)["panels"][2]
        gaps.append(np.array(bars["marks"]) - np.array(bars["values"]))
        assert (gaps[-1] > -0.05).all()
    assert (gaps[2] < gaps[0]).all() and gaps[2].max() < gaps[0].max() / 4


def test_the_backdrop_is_the_exact_posterior():
    law = data.gaussians()
    scene = PlaneScene(law)
    image = scene.backdrop()
    assert image["shape"] == [96, 96, 3]
    share = torch.softmax(
        law.log_density(torch.zeros(1, 2, 1, 1, dtype=torch.float64)) + law.priors.log(), 1
    )[0]
    assert share.sum() == pytest.approx(1)


# -- explorer ---------------------------------------------------------------------------------------------------------


def test_attack_shows_a_picture_that_fools_and_the_smallest_distance_found(student):
    explorer = widgets.explorer(student)
    explorer.attack()
    scene = explorer.scene
    x = scene.film[-1].x
    assert len(scene.film) == 21 and explorer.progress.description == "done"
    assert (
        float((x - scene.x).norm()) <= explorer.budget.value + 1e-5
        and 0 <= float(x.min()) <= float(x.max()) <= 1
    )
    assert int(scene.classifier(x).argmax()) != scene.predicted
    assert 0 < scene.smallest <= float((x - scene.x).norm()) + 1e-6
    assert explorer.stage.frame["panels"][-1]["rows"][0]["segments"][-1]["from"] == pytest.approx(
        scene.smallest
    )
    explorer.step.value = 0
    assert (
        explorer.stage.frame["panels"][0]["images"][0]
        == explorer.stage.frame["panels"][0]["images"][1]
    )


@pytest.fixture(scope="module")
def certified(student):
    """A scene after `certify`, and the shares of work it reported."""
    scene = ExplorerScene(DigitScene(student, samples=2))
    return scene, list(scene.certify(0.2, 200))


def test_certificate_is_that_of_its_votes_and_stays_below_the_attack(certified):
    scene, shares = certified
    assert shares == sorted(shares) and shares[-1] == 1.0 and int(scene.counts.sum()) == 200
    guess = scene.certificate.prediction
    lower = intervals.lower_bound(int(scene.counts[guess]), 200, 0.001)
    assert scene.certificate.radius == pytest.approx(
        0.2 * float(torch.special.ndtri(torch.tensor(lower))), rel=1e-4
    )
    assert scene.smallest_smoothed is None or scene.certificate.radius < scene.smallest_smoothed
    spoken = scene.at(0, 0.2, 200)["note"]
    assert "n=200" in spoken and "alpha=0.001" in spoken and "sigma=0.2" in spoken


def test_the_votes_are_those_of_the_smoothed_classifier_of_the_library(certified, student):
    scene, _ = certified
    smoothed = Smoothed(NoisedBayesClassifier(student, 0.2))
    *_, (_, votes) = counting.draw_votes(
        smoothed, scene.x, estimation=200, seed=scene.seed, picture=scene.index
    )
    assert scene.counts.tolist() == list(votes.estimation)
    assert scene.certificate == certificates.smoothing_radius(votes, 0.001)


def test_another_digit_or_sigma_puts_old_results_away(student):
    explorer = widgets.explorer(student)
    explorer.attack()
    explorer.scene.counts = torch.ones(10)
    explorer.sigma.value = 0.3
    assert explorer.scene.counts is None and explorer.scene.film
    explorer.index.value = 9
    assert not explorer.scene.film and explorer.scene.smallest is None


def test_a_job_lets_the_reader_act_and_stops_when_told_with_what_it_has(student):
    async def session():
        explorer = widgets.explorer(student)
        explorer.attack()
        while not explorer.scene.film:
            await asyncio.sleep(0)
        explorer.halt()
        seen = len(explorer.scene.film)
        await asyncio.sleep(0.05)
        return seen, len(explorer.scene.film), explorer.progress.description

    seen, after, state = asyncio.run(session())
    assert 0 < seen < 21 and after == seen and state == "stopped"


# -- films ------------------------------------------------------------------------------------------------------------


FILMS = {"attack": widgets.attack_hero, "maximisation": widgets.maximisation_hero}


@pytest.mark.parametrize("make", FILMS.values(), ids=FILMS)
def test_another_film_is_shot_for_every_control_and_the_old_one_is_kept(make, student):
    hero = make(student)
    first = hero.stage.frame
    seen = hero.scene.film
    for name, control in hero.shooting.items():
        before = json.dumps(hero.stage.frame)
        old = control.value
        control.value = another(control) if name != "index" else 7
        assert json.dumps(hero.stage.frame) != before and hero.progress.description == "done", name
        control.value = old
    assert hero.stage.frame == first and hero.scene.film is seen, "from memory, not shot again"


@pytest.mark.parametrize("make", FILMS.values(), ids=FILMS)
def test_a_stopped_film_can_be_scrubbed(make, student):
    async def session():
        hero = make(student)
        hero.shooting["index"].value = 7
        for _ in range(16):  # of 21 attack steps, or of 11 and then 20 steps of the walk
            await asyncio.sleep(0)
        hero.stop.click()
        seen = len(hero.scene.film)
        for control in hero.controls.values():
            control.value = 0
            control.value = 20
        await asyncio.sleep(0.05)
        return seen, len(hero.scene.film), hero.progress.description

    seen, after, state = asyncio.run(session())
    assert 0 < seen == after < 21 and state == "stopped"


def test_the_attack_film_is_pgd_and_stays_in_its_budget(student):
    hero = widgets.attack_hero(student, index=12)
    scene = hero.scene
    world = data.digits()
    x = world.test_images[12:13]
    y = world.test_labels[12:13]
    for norm, budget in (("L∞", 0.1), ("L2, radius 8ε", 0.8)):
        hero.shooting["norm"].value = norm
        *_, last = attacks.pgd(scene.classifier, x, y, budget, norm=scene.NORMS[norm], steps=20)
        assert torch.equal(scene.film[-1].x, last.x) and float(last.size) <= budget + 1e-5
    assert bool(last.fooled) and "fooled" in hero.stage.frame["note"]
    lead = hero.stage.frame["panels"][3]["series"][0]["y"]
    assert (
        lead[-1] == pytest.approx(-float(attacks.margin_loss(last.logits, y)), rel=1e-3)
        and len(lead) == 21
    )
    share = torch.softmax(last.logits[0], 0)
    np.testing.assert_allclose(hero.stage.frame["panels"][2]["values"], share, atol=1e-4)
    curve = scene.losses(20)
    torch.testing.assert_close(
        scene.bayes_classifier.logits_of(curve[None]), last.logits, rtol=1e-3, atol=1e-3
    )


def test_frame_five_of_the_walk_is_what_the_defence_answers(student):
    hero = widgets.maximisation_hero(student)
    for variant in hero.scene.VARIANTS:
        hero.shooting["variant"].value = variant
        scene = hero.scene
        limit = hero.shooting["budget"].value
        defence = scene.defence(variant, limit)
        with torch.no_grad():
            torch.testing.assert_close(
                defence(scene.film[0].x), scene.film[5].logits, rtol=1e-3, atol=1e-3
            )
        moved = (scene.film[20].x - scene.film[0].x).abs().max()
        assert (float(moved) <= limit + 1e-5) == (variant == scene.VARIANTS[0])
        assert float(scene.film[20].loss[1]) < float(scene.film[0].loss[1])


def test_the_whole_defence_is_attacked_when_the_reader_asks_for_it(student):
    hero = widgets.maximisation_hero(student)
    leads = []
    for target in hero.scene.TARGETS:
        hero.shooting["target"].value = target
        film = hero.scene.film
        y = torch.tensor([hero.scene.label])
        assert float((film[0].x[1] - film[0].x[0]).abs().max()) <= 0.1 + 1e-6
        leads.append(-float(attacks.margin_loss(film[5].logits[1:], y)))
    assert leads[2] < min(leads[:2]), (
        "after the defence, the exact gradient leaves the label the smallest lead"
    )


def test_a_plain_classifier_never_gets_a_certificate(certified):
    scene, _ = certified
    plain, smoothed = scene.at(0, 0.2, 200)["panels"][-1]["rows"]
    assert plain["segments"][0]["from"] == plain["segments"][0]["to"] == 0
    assert smoothed["segments"][0]["to"] == pytest.approx(scene.certificate.radius)


# -- figures ----------------------------------------------------------------------------------------------------------


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="expected finite numbers to draw, got 1 that are not"):
        figures.bars(["a", "b"], [0.0, float("nan")], title="t", alt="a", colours=["red", "red"])


def test_a_series_of_another_length_is_refused():
    short = dict(y=[1, 2], colour="red", label="short")
    with pytest.raises(ValueError, match="expected 3 values in each series, got 2 in 'short'"):
        figures.curves([1, 2, 3], [short], title="t", xlabel="x", ylabel="y", alt="a")


def test_picture_bytes_are_the_pixels():
    import base64

    image = figures.picture(torch.tensor([[[0.0, 1.0], [0.5, 2.0]]]))
    assert image["shape"] == [2, 2, 1] and list(base64.b64decode(image["data"])) == [
        0,
        255,
        128,
        255,
    ]


def test_emphasis_marks_best_and_second():
    assert figures.emphasis([0.1, 3.0, 2.0]) == [figures.OTHER, figures.BEST, figures.SECOND]


def test_radius_axis_keeps_the_order_certified_unknown_attacked():
    rows = [dict(label="f", certified=0.4, attacked=1.2)]
    panel = figures.radius_axis(rows, title="t", alt="a", xlabel="r", range=(0, 2))
    spans = [(s["from"], s["to"], s["text"]) for s in panel["rows"][0]["segments"]]
    assert spans == [(0.0, 0.4, "certified"), (0.4, 1.2, "unknown"), (1.2, 2.0, "an attack exists")]


def test_attack_film_margin_is_minus_the_margin_loss(student):
    scene = ExplorerScene(DigitScene(student, samples=2))
    list(scene.attack("L2", 0.5))
    line = next(p for p in scene.at(20, 0.2, 100)["panels"] if p["title"].startswith("Film"))[
        "series"
    ][0]["y"]
    logits = scene.classifier(scene.film[-1].x).detach()
    wanted = -float(attacks.margin_loss(logits, torch.tensor([scene.predicted])))
    assert line[-1] == pytest.approx(wanted, rel=1e-3)
