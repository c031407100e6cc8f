"""The explorer: what it shows is what classifiers say, its jobs are true, and whatever it is given ends in a sentence."""

import asyncio
import io
import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffclass import attacks
from diffclass.certify import certificates, counting
from diffclass.classifiers.smoothed import Smoothed
from diffclass.course import exploring
from diffclass.course.exploring import Explorer
from diffclass.course.scenes import explorer as scenes
from diffclass.course.scenes import keeping, overview
from diffclass.course.scenes.explorer import LEFT, Asked, ExplorerScene, Lane
from diffclass.course.scenes.keeping import State
from diffclass.course.widgets import QUIET
from diffclass.data.pictures import load_picture
from diffclass.noise import Levels, seed_of
from diffclass.zoo import classifiers, noised
from PIL import Image

ASKED = Asked("L2", 1.0, "PGD, margin", 10)


def ended(job):
    shares = list(job)
    assert shares == sorted(shares) and shares[-1] == 1.0
    return shares


def radius_rows(frame):
    return next(panel for panel in frame["panels"] if panel["kind"] == "radius")["rows"]


def at(scene, step=0, asked=ASKED, sigma_pixel=0.25, n=200):
    return scene.at(step, 0.6, asked, sigma_pixel, n)


# -- what is shown is what is said ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", classifiers.names("digits"))
def test_a_look_has_the_classifiers_own_logits(name):
    lane = Lane("digits", name, 0)
    scene = ExplorerScene("digits")
    x = scene.subject.x
    seen = lane.look(None, x)
    with torch.no_grad():
        wanted = lane.classifier(x, lane.noise)[0]
    assert torch.equal(seen.logits, wanted)
    assert (seen.lines is None) == bool(seen.why)
    made = lane.made(None, x, 0.6, scene.class_names)
    assert isinstance(made, str) or made.images.shape == (10, 1, 8, 8)
    assert lane.spent >= lane.classifier.calls


@pytest.mark.parametrize("number", [0, 9])
def test_a_glance_is_the_answer_of_one_level_with_the_same_noise(number):
    scene = ExplorerScene("digits")
    lane = scene.lanes[0]
    x = scene.subject.x
    levels = lane.classifier.levels
    own = slice(number, number + 1)
    alone = Levels(levels.sigma[own], levels.lower[:1], levels.upper[-1:])
    with torch.no_grad():
        wanted = lane.classifier.changed(levels=alone)(x, lane.noise[:, own])[0]
    seen, made = lane.glance(x, float(levels.sigma[number]), scene.class_names)
    spread = wanted - wanted.mean()
    torch.testing.assert_close(seen.logits - seen.logits.mean(), spread, rtol=1e-4, atol=1e-3)
    assert seen.calls == made.calls == lane.classifier.denoiser.calls(10) == lane.spent


def test_a_picture_that_moves_is_answered_by_one_level_until_it_rests(monkeypatch):
    monkeypatch.setattr(scenes, "MOVING", 0.0)

    async def session():
        explorer = Explorer()
        lane = explorer.scene.lanes[0]
        explorer.index.value = 9
        moving = explorer.stage.frame
        spent = lane.spent
        explorer.index.value = 10
        await asyncio.sleep(2 * QUIET)
        return lane, moving, spent, explorer.stage.frame

    lane, moving, spent, rested = asyncio.run(session())
    assert "by one level alone" in moving["note"]
    assert spent == lane.classifier.denoiser.calls(10) < lane.classifier.calls
    assert moving["rows"] == rested["rows"]  # the same panels in the same places
    assert "by one level alone" not in rested["note"]
    assert lane.known(None)


def test_a_fast_classifier_answers_while_a_slow_one_beside_it_is_asked():
    scene = ExplorerScene("digits", ("dc", "cnn"))
    for lane in scene.lanes:
        lane.look(None, scene.subject.x)
    scene.lanes[0].seconds = 10.0
    scene.choose(7)
    notes = at(scene)["note"].split("<br>")
    assert "is being asked" in notes[0] and "says" in notes[1]
    assert not scene.quick(0)


def test_denoised_pictures_are_those_behind_the_losses():
    """The squared errors under the pictures are the losses that the curve has at that level."""
    scene = ExplorerScene("digits")
    lane = scene.lanes[0]
    seen = lane.look(None, scene.subject.x)
    for level in (0, 7, 15):
        sigma = float(lane.classifier.levels.sigma[level])
        made = lane.made(None, scene.subject.x, sigma, scene.class_names)
        errors = [float(caption.split("\n")[1]) for caption in made.captions]
        assert errors == pytest.approx((seen.lines.values[:, level] * sigma**2).tolist(), abs=0.006)


def test_denoised_pictures_of_another_level_have_other_errors():
    """The test above can fail: a look at a neighbouring noise level has other errors."""
    scene = ExplorerScene("digits")
    lane = scene.lanes[0]
    seen = lane.look(None, scene.subject.x)
    sigma = float(lane.classifier.levels.sigma[7])
    made = lane.made(
        None, scene.subject.x, float(lane.classifier.levels.sigma[9]), scene.class_names
    )
    errors = [float(caption.split("\n")[1]) for caption in made.captions]
    assert errors != pytest.approx((seen.lines.values[:, 7] * sigma**2).tolist(), abs=0.006)


# -- attacks ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def attacked():
    """The diffusion classifier and the plain network, each attacked by itself."""
    scene = ExplorerScene("digits", ("dc", "cnn"))
    list(scene.attack(ASKED))
    return scene


def test_each_film_keeps_the_budget_and_shows_what_its_classifier_says(attacked):
    for lane in attacked.lanes:
        assert len(lane.film.frames) == 11 and lane.film.through == lane.name
        for frame in lane.film.frames:
            delta = frame.x - attacked.subject.x
            assert float(delta.norm()) <= 1.0 + 1e-5 and 0 <= float(frame.x.min())
            with torch.no_grad():
                again = lane.classifier(frame.x, lane.noise)
            assert torch.equal(again, frame.logits)
            assert bool(frame.fooled) == (int(again.argmax()) != attacked.predicted(lane))
    last = [lane.film.frames[-1].x for lane in attacked.lanes]
    assert not torch.equal(*last)


def test_a_film_begins_with_the_clean_picture_before_anything_is_asked():
    scene = ExplorerScene("digits", ("dc",))
    list(scene.ask(0))
    (lane,) = scene.lanes
    spent = lane.spent
    job = scene.attack(ASKED)
    next(job)
    assert lane.film.frames[0].x is scene.subject.x and len(lane.film.frames) == 1
    assert lane.spent == spent and "clean" in at(scene)["panels"][0]["captions"][0]
    job.close()


def test_the_shortest_change_fools_and_is_no_longer_than_the_film(attacked):
    lane = attacked.lanes[0]
    fooling = [float((f.x - attacked.subject.x).norm()) for f in lane.film.frames if bool(f.fooled)]
    assert fooling and 0 < lane.nearest.size <= min(fooling) + 1e-6
    rows = radius_rows(at(attacked))
    assert rows[0]["segments"][-1]["from"] == pytest.approx(lane.nearest.size, rel=1e-4)


def test_one_attack_shown_on_both_has_one_series_of_pictures():
    scene = ExplorerScene("digits", ("dc", "cnn"))
    ended(scene.attack(replace(ASKED, who=LEFT)))
    first, second = scene.lanes
    assert first.film.through == second.film.through == "dc"
    for one, other in zip(first.film.frames, second.film.frames, strict=True):
        assert torch.equal(one.x, other.x) and not torch.equal(one.logits, other.logits)
    assert "through dc" in at(scene)["note"]


@pytest.mark.parametrize("method", scenes.METHODS)
def test_every_attack_can_be_filmed(method):
    scene = ExplorerScene("digits", ("cnn",))
    ended(scene.attack(Asked("L∞", 0.1, method, 5)))
    frames = scene.lanes[0].film.frames
    assert len(frames) == (2 if method.startswith("FGSM") else 6)
    assert all(float((f.x - scene.subject.x).abs().max()) <= 0.1 + 1e-6 for f in frames)


def test_votes_are_climbed_by_their_surrogate_and_judged_by_themselves():
    scene = ExplorerScene("digits", ("vote",))
    list(scene.attack(replace(ASKED, steps=2)))
    assert all(float(f.logits.sum()) == 11 for f in scene.lanes[0].film.frames)


def test_other_noise_asks_about_the_same_pictures_again(attacked):
    scene = ExplorerScene("digits", ("dc",))
    ended(scene.attack(ASKED))
    x = scene.lanes[0].film.frames[-1].x
    before = at(scene, 10)
    scene.refresh(1)
    after = at(scene, 10)
    assert scene.lanes[0].film.frames[-1].x is x
    assert before["panels"][0]["images"] == after["panels"][0]["images"]
    assert before["panels"][2]["series"] != after["panels"][2]["series"]


# -- certificates -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certified():
    scene = ExplorerScene("digits", ("dc",))
    return scene, ended(scene.certify(0.2, 200, ("epndc",)))


def test_the_votes_are_those_of_the_library_and_the_bound_may_be_read_at_every_look(certified):
    scene, _ = certified
    certificate = scene.lanes[0].certified.certificate
    smoothed = Smoothed(noised.classifier("digits", "epndc", 0.2))
    *_, (_, votes) = counting.draw_votes(
        smoothed, scene.subject.x, estimation=200, seed=0, picture=scene.subject.index
    )
    assert list(certificate.counts) == list(votes.estimation)
    stopped = replace(votes, stopped=True)
    assert certificate == certificates.smoothing_radius(stopped, scenes.ALPHA, "anytime")


def test_the_certificate_stays_below_the_attack_on_the_same_votes(certified):
    scene, _ = certified
    result = scene.lanes[0].certified
    assert result.certificate.radius > 0 and result.smallest > result.certificate.radius
    rows = radius_rows(at(scene, sigma_pixel=0.2))
    assert rows[1]["segments"][0]["to"] == pytest.approx(result.certificate.radius, rel=1e-4)
    assert rows[1]["segments"][-1]["from"] == pytest.approx(result.smallest, rel=1e-4)


def test_a_radius_grows_while_votes_arrive():
    scene = ExplorerScene("digits", ("dc",))
    radii = []
    for _ in scene.certify(0.25, 500, ("epndc",)):
        result = scene.lanes[0].certified
        if result.searching:
            break
        if result.certificate is not None:
            radii.append(result.certificate.radius)
    assert len(radii) >= 5 and radii == sorted(radii) and radii[-1] > radii[0]


def test_a_classifier_of_clean_pictures_votes_on_clamped_copies():
    scene = ExplorerScene("digits", ("cnn",))
    for share in scene.certify(0.5, 100, (scenes.SAME,)):
        if share >= 0.5:
            break
    result = scene.lanes[0].certified
    smoothed = Smoothed(classifiers.classifier("digits", "cnn"), 0.5)
    *_, counts = smoothed.count(scene.subject.x, seed_of(0, "estimation", 4), 100)
    assert max(counts.tolist()) < 90, "votes of one mind would hide whose seed they came from"
    assert result.voter == "cnn" and list(result.certificate.counts) == counts.tolist()


# -- the hero ---------------------------------------------------------------------------------------------------------


async def until(condition, job):
    """Let the event loop run until something is the case, or the job has ended."""
    while not condition() and not job.done():
        await asyncio.sleep(0)


def test_another_picture_puts_old_results_away():
    explorer = Explorer()
    explorer.budget.value = 1.5
    explorer.attack()
    assert explorer.step.value == explorer.step.max == 20
    assert explorer.scene.lanes[0].nearest.size is not None
    explorer.index.value = 9
    lane = explorer.scene.lanes[0]
    assert lane.film is None and lane.nearest.size is None and explorer.step.value == 0
    assert "press Attack" not in explorer.stage.frame["note"]


def test_player_and_film_move_each_other():
    explorer = Explorer()
    explorer.attack()
    frame = explorer.stage.frame
    explorer.play.value = 3  # a tick of the player
    assert explorer.step.value == 3 and explorer.stage.frame != frame
    explorer.step.value = 7  # the player goes on from where the reader left the slider
    assert explorer.play.value == 7


def test_results_keep_their_own_settings():
    async def session():
        explorer = Explorer()
        explorer.votes.value = 100
        explorer.smoothing.value = 0.12
        explorer.certify()
        job = explorer.job
        await until(lambda: explorer.progress.value >= 0.2, job)
        explorer.smoothing.value = 0.5
        explorer.votes.value = 500
        moved = explorer.stage.frame
        await until(lambda: explorer.scene.lanes[0].certified.searching, job)
        explorer.stop.click()
        return explorer, moved

    explorer, moved = asyncio.run(session())
    certificate = explorer.scene.lanes[0].certified.certificate
    assert (certificate.sigma_pixel, certificate.n) == (0.12, 100)
    for frame in (moved, explorer.stage.frame):
        assert "<b>Press Certify</b> for σ 0.50, n 500" in frame["note"]
    ceiling = certificates.largest_radius(100, 0.12, scenes.ALPHA, "anytime")
    axis = next(p for p in explorer.stage.frame["panels"] if p["kind"] == "radius")
    assert f"certify at most {ceiling:.2f}" in axis["xlabel"]
    explorer.smoothing.value = 0.12
    explorer.votes.value = 100
    assert "Press Certify" not in explorer.stage.frame["note"]


def test_an_attack_that_is_stopped_says_so_and_keeps_its_film():
    async def session():
        explorer = Explorer()
        explorer.attack()
        await until(lambda: explorer.scene.lanes[0].film, explorer.job)
        explorer.stop.click()
        return explorer

    explorer = asyncio.run(session())
    assert len(explorer.scene.lanes[0].film.frames) == 1
    assert "stopped after step 0: not fooled so far" in explorer.stage.frame["note"]


def test_what_fooled_before_the_attack_was_stopped_is_on_the_axis():
    async def session():
        explorer = Explorer()
        explorer.budget.value = 2.0
        explorer.attack()
        frames = explorer.scene.lanes[0]
        await until(lambda: frames.film and bool(frames.film.frames[-1].fooled), explorer.job)
        explorer.stop.click()
        return explorer

    explorer = asyncio.run(session())
    lane = explorer.scene.lanes[0]
    last = lane.film.frames[-1]
    assert explorer.progress.description == "stopped" and bool(last.fooled)
    assert f"stopped after step {last.step}: fooled at step" in explorer.stage.frame["note"]
    rows = radius_rows(explorer.stage.frame)[0]["segments"]
    assert lane.nearest.size == pytest.approx(float(last.size))
    assert rows[1]["to"] == rows[2]["from"] == pytest.approx(float(last.size), rel=1e-4)


@pytest.mark.parametrize("first", ["attack", "certify"])
def test_a_job_that_another_replaces_stays_partial_and_the_other_ends(first):
    async def session():
        explorer = Explorer()
        explorer.votes.value = 100
        jobs = [explorer.attack, explorer.certify]
        if first == "certify":
            jobs.reverse()
        jobs[0]()
        old = explorer.job
        await until(lambda: explorer.progress.value > 0.05, old)
        jobs[1]()
        new = explorer.job
        await until(lambda: explorer.progress.value > 0.5, new)
        explorer.halt()
        await new
        return explorer, old

    explorer, old = asyncio.run(session())
    note = explorer.stage.frame["note"]
    assert old.done()
    if first == "attack":
        assert "stopped after step" in note and "no change below" in note
    else:
        assert len(explorer.scene.lanes[0].film.frames) > 8 and "stopped after" in note
        assert explorer.scene.lanes[0].certified.ending == "stopped"


def test_a_network_of_nan_leaves_an_explorer_that_says_why():
    explorer = Explorer()
    with torch.no_grad():
        next(explorer.scene.lanes[0].classifier.parameters()).fill_(float("nan"))
    explorer.index.value = 5
    note = explorer.stage.frame["note"]
    assert "NaN" in note and explorer.stage.frame["panels"] == []
    explorer.attack()
    assert explorer.progress.description == "failed"
    assert "attacking failed" in explorer.stage.frame["note"]


def test_no_combination_of_controls_fails():
    """Each classifier of digits with a random setting of everything else, attacked for two steps; the last with a mate."""
    generator = random.Random(0)
    explorer = Explorer()
    for name in classifiers.names("digits"):
        explorer.first.value = name
        explorer.second.value = generator.choice(explorer.second.options)[1]
        for control in (explorer.method, explorer.norm, explorer.who):
            control.value = generator.choice(control.options)
        explorer.index.value = generator.randrange(explorer.index.max)
        explorer.sigma.value = generator.uniform(0.1, 3)
        explorer.steps.value = 2
        explorer.attack()
        explorer.step.value = generator.randrange(3)
        note = explorer.stage.frame["note"]
        assert explorer.progress.description == "done" and "could not be drawn" not in note, name
        json.dumps(explorer.stage.frame, allow_nan=False)
        json.dumps(keeping.record(explorer.scene, explorer.state()), allow_nan=False)


def test_every_tab_opens():
    explorer = Explorer()
    for tab, title in enumerate(explorer.tabs.titles):
        explorer.tabs.selected_index = tab
        assert title
    assert json.loads(explorer.kept.value)["explorer"] == keeping.VERSION
    assert "explorer-record.json" in explorer.files.value
    assert explorer.of_record.value == "dc-linf"
    assert explorer.audit.frame["panels"][0]["kind"] == "lamps"
    explorer.first.value = "vit"
    explorer.tabs.selected_index = 0
    explorer.tabs.selected_index = list(explorer.tabs.titles).index("Audit")
    assert "No audit of vision transformer is stored" in explorer.audit.frame["note"]


def test_a_classifier_that_cannot_be_asked_live_is_refused_in_a_sentence(monkeypatch):
    explorer = Explorer()
    monkeypatch.setitem(scenes.MOST_CALLS, "digits", 100)
    explorer.first.value = "vote"
    assert "got diffusion classifier, majority of 11 with 176" in explorer.stage.frame["note"]
    assert explorer.first.value == "dc" and explorer.scene.lanes[0].name == "dc"


# -- pictures of the reader's own -------------------------------------------------------------------------------------


def png(array, mode=None):
    file = io.BytesIO()
    Image.fromarray(np.asarray(array, np.uint8), mode).save(file, "PNG")
    return file.getvalue()


def bring(explorer, content):
    explorer.pad.picture = content
    explorer.pad.count += 1
    return explorer.stage.frame["note"]


def test_a_drawing_is_taken_and_warned_about():
    explorer = Explorer()
    ink = np.zeros((168, 168))
    ink[30:140, 75:95] = 255
    note = bring(explorer, png(ink))
    assert explorer.scene.subject.index is None and "<b>Mind:</b>" in note
    wanted = load_picture(png(ink), (1, 8, 8))
    assert torch.equal(explorer.scene.subject.x, wanted)
    explorer.attack()
    assert explorer.progress.description == "done"


@pytest.mark.parametrize(
    "content, said",
    [
        (b"no picture at all", "which is none of them or is damaged"),
        (png(np.zeros((168, 168))), "is the drawing empty?"),
        (png(np.full((1, 1), 200)), "is the drawing empty?"),
        (png(np.zeros((9, 9, 4))), "is the drawing empty?"),
        (png(np.eye(60) * 255)[:60], "damaged"),
        (b"", "is none of them"),
    ],
    ids=["text", "empty", "one pixel", "transparent", "cut short", "nothing"],
)
def test_what_is_no_picture_leaves_the_last_one(content, said):
    explorer = Explorer()
    note = bring(explorer, content)
    assert said in note and explorer.scene.subject.index == 4


@pytest.mark.parametrize("shape", [(5000, 4000), (30, 400), (40, 40, 3), (40, 40, 4)])
def test_pictures_of_any_size_and_kind_are_taken(shape):
    ramp = np.broadcast_to(np.linspace(0, 255, shape[1])[None, :, None], (*shape[:2], 4)).copy()
    ramp[..., 3:] = 255
    array = ramp[..., 0] if len(shape) == 2 else ramp[..., : shape[2]]
    explorer = Explorer()
    bring(explorer, png(array))
    assert explorer.scene.subject.index is None


# -- keeping ----------------------------------------------------------------------------------------------------------

STATES = [
    State(),
    State(classifiers=("cnn", "idc"), picture=17, seed=3, norm="L2", budget=1.5, who=LEFT),
    State(method="Square, no gradient", steps=7, smoothing=0.12, votes=5000, sigma=1.1),
]


@pytest.mark.parametrize("state", STATES)
def test_a_state_survives_json_and_a_link(state):
    assert keeping.of_json(state.as_json()) == (state, [])
    assert keeping.of_link(state.as_link()) == (state, [])
    explorer = Explorer()
    explorer.restore(state.as_link())
    again = explorer.state()
    assert again.asked == state.asked and again.classifiers == state.classifiers
    assert (again.picture, again.seed, again.votes) == (state.picture, state.seed, state.votes)
    assert again.sigma == pytest.approx(state.sigma)


def test_a_state_with_a_film_shows_that_film_again():
    first = Explorer()
    first.budget.value = 0.8
    first.attack()
    first.step.value = 13
    second = Explorer()
    second.restore(first.state().as_json())
    assert second.step.value == 13
    assert second.stage.frame["panels"] == first.stage.frame["panels"]


def test_a_picture_of_ones_own_survives_a_link():
    explorer = Explorer()
    ink = np.zeros((168, 168))
    ink[30:140, 75:95] = 255
    bring(explorer, png(ink))
    link = explorer.state().as_link()
    assert len(link) < 2000
    other = Explorer()
    other.restore(link)
    assert torch.equal(other.scene.subject.x, explorer.scene.subject.x)


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "expected the state"),
        ("{", "as JSON"),
        ("[1]", "as the text of a link"),
        ("{}", 'with a field "explorer"'),
        ("not!a!link", "was it cut short?"),
        (State().as_link()[:-9], "cut short"),
        ("x" * 200_000, "expected the state"),
        ("{" + " " * 200_000 + "}", "got 200002 characters"),
    ],
)
def test_what_is_no_state_is_said_and_changes_nothing(text, said):
    explorer = Explorer()
    before = explorer.state()
    explorer.restore(text)
    assert said.replace('"', "&quot;") in explorer.stage.frame["note"]
    assert explorer.state() == before


@pytest.mark.parametrize(
    "change, said",
    [
        ({"classifiers": ["perfect"]}, "There is no classifier &#x27;perfect&#x27;"),
        ({"explorer": 99}, "of version 99"),
        ({"world": "mars"}, "There is no world &#x27;mars&#x27;"),
        ({"norm": "L7"}, "There is no norm &#x27;L7&#x27;"),
        ({"steps": "many"}, "steps is a whole number"),
        ({"sigma": float("nan")}, "sigma is a number"),
        ({"picture": "eJw"}, "The picture cannot be read"),
        ({"picture": None}, "The picture cannot be read"),
        ({"votes": -1}, "votes is a whole number"),
    ],
)
def test_a_state_that_does_not_fit_opens_with_a_sentence(change, said):
    explorer = Explorer()
    explorer.restore(json.dumps({**json.loads(State().as_json()), **change}))
    assert said in explorer.stage.frame["note"] and explorer.progress.description == "done"


def test_a_record_is_asked_about_again_and_a_false_one_is_named():
    explorer = Explorer()
    explorer.budget.value = 1.5
    explorer.attack()
    record = keeping.record(explorer.scene, explorer.state())
    other = Explorer()
    other.restore(json.dumps(record))
    assert "which holds" in other.stage.frame["note"]
    stored = other.scene.lanes[0].film.frames[-1].x
    assert torch.allclose(stored, explorer.scene.lanes[0].film.frames[-1].x)
    record["results"][0]["attack"]["says"] = "0"
    other.restore(json.dumps(record))
    assert (
        "claims that diffusion classifier calls the changed picture 0, but says"
        in (other.stage.frame["note"])
    )
    record["results"][0]["attack"]["perturbation"] = "AAAA"
    other.restore(json.dumps(record))
    assert "expected a perturbation of shape" in other.stage.frame["note"]


def test_the_app_opens_in_the_state_of_its_address(monkeypatch):
    state = State(classifiers=("cnn",), picture=3)
    monkeypatch.setenv("QUERY_STRING", f"state={state.as_link()}&theme=dark")
    explorer = exploring.app()
    assert explorer.scene.lanes[0].name == "cnn" and explorer.index.value == 3
    monkeypatch.setenv("QUERY_STRING", "state=nonsense")
    assert "expected the state" in exploring.app().stage.frame["note"]


# -- all pictures -----------------------------------------------------------------------------------------------------


def test_every_record_of_the_honest_protocol_has_its_dots():
    listed = overview.stored("digits")
    assert {"dc-linf", "cnn-l2-0.25"} <= set(listed)
    shown = overview.read("cnn-linf", listed["cnn-linf"])
    stood = sum(dot.standing for dot in shown.dots)
    assert f"{100 * stood / len(shown.dots):.1f} %" in shown.said and "68.0 %" in shown.said
    for dot in shown.dots:  # a deterministic network: what fell has a lead below zero
        assert (dot.attacked > 0) == (dot.standing == 1)


def test_a_click_on_a_dot_opens_its_picture_with_the_stored_change():
    explorer = Explorer(State(classifiers=("cnn",)))
    explorer.of_record.value = "cnn-linf"
    fell = explorer.dots.data[1]
    assert len(explorer.dots.data[0].x) + len(fell.x) == 400
    shown = overview.read("cnn-linf", overview.stored("digits")["cnn-linf"])
    points = type("Points", (), {"point_inds": [2]})
    explorer._picked(shown, fell, points)
    index = int(fell.customdata[2])
    assert explorer.scene.subject.index == index == explorer.index.value
    lane = explorer.scene.lanes[0]
    wanted = (explorer.scene.subject.x + shown.delta(index)).clamp(0, 1)
    assert torch.equal(lane.film.frames[-1].x, wanted) and bool(lane.film.frames[-1].fooled)
    assert float(attacks.size_of(shown.delta(index), "linf")) <= 0.1 + 1e-6


def test_what_has_no_weights_is_not_offered():
    assert scenes.missing("cifar10", "wide").endswith("`diffclass train cifar10 --method wide`.")
    assert "wide" not in scenes.available("cifar10") and "cnn" in scenes.available("cifar10")
    assert set(scenes.available("digits")) == set(classifiers.names("digits"))


def test_the_relatives_that_vote_exist():
    for world, listed in scenes.RELATIVES.items():
        assert set(listed) <= set(classifiers.names(world))
        assert set(listed.values()) <= set(noised.names(world))
