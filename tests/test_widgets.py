"""Figures, scenes and heroes without a browser: controls move their frames in time, jobs end as they say."""

import asyncio
import base64
import contextlib
import copy
import json
import logging
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffclass import attacks, data
from diffclass.classifiers.base import Held
from diffclass.classifiers.one_call import OneCallClassifier
from diffclass.course import figures, widgets
from diffclass.course.exploring import Explorer
from diffclass.course.scenes.audit import MYSTERIES
from diffclass.course.scenes.digits import DigitScene
from diffclass.course.scenes.one_call import KEPT, OneCallScene
from diffclass.course.scenes.photos import SHORT
from diffclass.course.scenes.plane import PlaneScene
from diffclass.data import gallery
from diffclass.evaluation import measuring
from diffclass.storage import assets, results
from diffclass.zoo import networks


@pytest.fixture(scope="module")
def student():
    return networks.load_digits_denoiser()


def photo_attack(student):
    """Digits in place of photographs, with names and a film of three steps."""
    world = data.digits()
    return widgets.photo_attack_hero(
        DigitScene(student).classifier,
        world.test_images[:20],
        world.test_labels[:20],
        SHORT,
        kind="Photo",
        steps=3,
    )


def photos(_):
    """The drawn pictures, which are in the repository, with their stored losses."""
    return widgets.photo_hero(
        gallery.pictures()[0], measuring.read(assets.folder() / "records/gallery-prototype")
    )


def few_digits():
    """Twenty digits, with their labels."""
    world = data.digits()
    return world.test_images[:20], world.test_labels[:20]


@contextlib.contextmanager
def counted_calls(denoiser):
    """A list that grows by the number of pictures whenever a denoiser is asked."""
    asked = []
    hook = denoiser.register_forward_hook(lambda module, given, _: asked.append(len(given[0])))
    try:
        yield asked
    finally:
        hook.remove()


def one_call(student):
    """Digits, noised and denoised under each class and without one."""
    return widgets.one_call_hero(
        student, networks.DIGIT_LEVELS, *few_digits(), "0123456789", kind="Digit"
    )


def adapter(student):
    """A digit under the adapters of the assets, with their records."""
    return widgets.adapter_hero(
        student, results.read(assets.folder() / "records" / "tmdc-digits.jsonl")
    )


def audited(_):
    """The lamps of all planted classifiers, each shown once: the first time it takes a second, which its frame says."""
    hero = widgets.audit_hero()
    for name in (*MYSTERIES, "honest"):
        hero.controls["name"].value = name
    return hero


HEROES = {
    "digit": widgets.digit_hero,
    "one call": one_call,
    "forward": lambda _: widgets.forward_hero(),
    "elbo": lambda _: widgets.elbo_hero(),
    "bayes": lambda _: widgets.bayes_hero(),
    "denoiser": lambda _: widgets.denoiser_hero(),
    "optimal digits": widgets.optimal_digits_hero,
    "explorer": lambda _: Explorer(),
    "racing": widgets.racing_hero,
    "photos": photos,
    "translation": lambda _: widgets.translation_hero(networks.load_translator()),
    "adapter": adapter,
    "smoothing": lambda _: widgets.smoothing_hero(),
    "audit": audited,
    "attack": widgets.attack_hero,
    "maximisation": widgets.maximisation_hero,
    "photo attack": photo_attack,
    "certify": widgets.certify_hero,
    "zero-shot": lambda _: widgets.zero_shot_hero(),
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
    if isinstance(hero, widgets.Hero | widgets.Filmed | widgets.Certifier):
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
    assert json.dumps(frame, allow_nan=False), "strict JSON, which a browser can read"
    assert frame["panels"] and len(frame["note"]) > 20
    for panel in frame["panels"]:
        assert panel["title"] and len(panel["alt"].split()) >= 4, panel["kind"]
        assert "None" not in panel["alt"] and "nan" not in panel["alt"].split(), panel["alt"]
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


def test_one_call_shows_the_posterior_of_that_call_beside_that_of_the_losses(student):
    hero = one_call(student)
    hero.controls["index"].value = 3
    hero.controls["sigma"].value = 0.5
    picture, heads, curves, bars = hero.stage.frame["panels"]
    scene = OneCallScene(
        student,
        networks.DIGIT_LEVELS,
        data.digits().test_images[:20],
        data.digits().test_labels[:20],
        "0123456789",
    )
    x = data.digits().test_images[3:4]
    with torch.no_grad():
        share = OneCallClassifier(student, 0.5)(x, scene.noise).softmax(1)[0]
        by_losses = scene.bayes(x).softmax(1)[0]
    assert torch.allclose(torch.tensor(bars["values"]), share, atol=1e-4)
    assert torch.allclose(torch.tensor(bars["marks"]), by_losses, atol=1e-4)
    assert len(heads["images"]) == 11 and heads["captions"][-1] == "no class"
    assert curves["cursor"] == pytest.approx(0.5) and len(picture["images"]) == 2
    assert (
        f"says <b>{int(share.argmax())}</b> with {float(share.max()):.2f}"
        in hero.stage.frame["note"]
    )


def test_a_picture_that_moves_is_asked_one_level_and_one_that_rests_all_of_them(student):
    async def session():
        hero = one_call(student)
        hero.controls["sigma"].value = 0.5
        for index in (7, 8, 9):  # the slider passes 7 and 8, and rests at 9
            hero.controls["index"].value = index
        moving = hero.stage.frame
        known = len(measured_scene(hero)._measured)
        await asyncio.sleep(2 * widgets.QUIET)
        return hero, moving, known, hero.stage.frame

    hero, moving, known, resting = asyncio.run(session())
    scene = measured_scene(hero)
    assert "The losses of this call alone say" in moving["note"] and known == 1
    assert set(scene._measured) == {0, 9}, "what the slider passed was not measured"
    assert resting == hero.show(9, 0.5, (0.0, 0.0), -1)
    for place in (0, 1):  # the picture and its heads stay as they were
        assert moving["panels"][place] == resting["panels"][place]
    losses = losses_of_one_call(scene, 9, 0.5)
    lines = moving["panels"][2]["series"]
    excess = (losses - losses.min()) / 0.5**2
    assert sorted(line["y"][0] for line in lines) == pytest.approx(
        sorted(excess.tolist()), rel=1e-3
    )
    assert all(len(set(line["y"])) == 1 for line in lines), "one level stands for all"
    low, high = networks.DIGIT_RANGE
    share = torch.softmax(-losses / 0.5**2 * np.log(high / low), 0)
    torch.testing.assert_close(torch.tensor(moving["panels"][3]["marks"]), share, atol=1e-4, rtol=0)


def measured_scene(hero):
    """The scene behind the hero of one call."""
    return hero.show.__closure__[0].cell_contents


def losses_of_one_call(scene, index, sigma):
    """Each class's squared error of the denoised picture, from the network itself."""
    z = 2 * scene.images[index] - 1
    with torch.no_grad():
        heads = scene.denoiser(z[None] + sigma * scene.noise, sigma)[0]
    return ((heads - z) ** 2).flatten(1).sum(1)


def test_without_a_lesser_frame_nothing_is_drawn_twice():
    drawn = []

    def show(value, point, picked):
        drawn.append(value)
        return bar_of(value)

    async def session(quick):
        drawn.clear()
        hero = widgets.Hero(show, {"value": widgets.slider("value", 1, 0, 9, 1)}, quick=quick)
        hero.controls["value"].value = 2
        await asyncio.sleep(2 * widgets.QUIET)
        return drawn

    assert asyncio.run(session(None)) == [1, 2]
    assert asyncio.run(session(lambda value, point, picked: None)) == [1, 2]
    assert asyncio.run(session(lambda value, point, picked: bar_of(0.0))) == [1, 2]


def test_what_is_prepared_while_the_reader_looks_is_what_would_be_asked_live(student):
    hero = one_call(student)
    scene = OneCallScene(student, networks.DIGIT_LEVELS, *few_digits(), "0123456789", "Digit")
    wanted = [0.3, 0.6, 1.2, 2.4]
    assert scene.ahead(3, 0.5, wanted)  # something is left: the farthest one
    with counted_calls(student) as asked:
        for level in wanted[:3]:
            scene.answers(3, level)
        assert asked == []
        scene.answers(3, 2.4)
        assert asked == [1]
    assert not scene.ahead(3, 0.5, wanted)
    live = OneCallScene(student, networks.DIGIT_LEVELS, *few_digits(), "0123456789", "Digit")
    for level in wanted:
        for ready, now in zip(scene.answers(3, level), live.answers(3, level), strict=True):
            assert torch.allclose(ready, now, atol=1e-5)
        with torch.no_grad():
            heads, null = OneCallClassifier(student, level).answers(live.images[3:4], live.noise)
        assert torch.allclose(scene.answers(3, level)[0], heads, atol=1e-5)
        assert torch.allclose(scene.answers(3, level)[1], null, atol=1e-5)
    for index in range(4, 20):
        for _ in range(10):
            scene.ahead(index, 0.5, [0.2 + 0.05 * place for place in range(30)])
    assert len(scene._answered) == KEPT
    assert hero.ahead is not None


def test_a_hero_prepares_part_by_part_until_nothing_is_left_or_a_control_moves(caplog):
    prepared = []

    def ahead(value, point, picked):
        prepared.append(value)
        if value == 5:
            raise RuntimeError("the network is gone")
        return prepared.count(value) < 3

    async def session():
        hero = widgets.Hero(
            lambda value, point, picked: bar_of(value),
            {"value": widgets.slider("value", 1, 0, 9, 1)},
            ahead=ahead,
        )
        assert prepared == []  # not before the reader has seen the figure
        await asyncio.sleep(2 * widgets.QUIET)
        assert prepared == [1, 1, 1]
        for value in (2, 3, 4):  # passes 2 and 3, and rests at 4
            hero.controls["value"].value = value
        await asyncio.sleep(2 * widgets.QUIET)
        assert prepared == [1, 1, 1, 4, 4, 4]
        hero.controls["value"].value = 5
        await asyncio.sleep(2 * widgets.QUIET)
        return hero

    hero = asyncio.run(session())
    assert prepared[6:] == [5] and "nothing could be prepared" in caplog.text
    assert "gone" not in hero.stage.frame["note"]  # the figure itself lacks nothing
    prepared.clear()
    hero.controls["value"].value = 6  # where no event loop runs, nothing is prepared
    assert prepared == []


@pytest.mark.parametrize("name", ["digit", "denoiser", "one call"])
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


def last_note(show) -> str:
    """What a hero says at last that draws 1 in this thread, slowly, while another thread moves its control to 2."""
    moved = threading.Event()
    began = threading.Event()

    def slow(value, point, picked):
        if value == 1:
            began.set()
            moved.wait(0.5)  # in vain, where the other thread has to wait for its turn
        return show(value)

    hero = widgets.Hero(slow, {"value": widgets.slider("value", 0, 0, 5, 1)})

    def move() -> None:
        began.wait(5)
        hero.controls["value"].value = 2
        moved.set()

    other = threading.Thread(target=move)
    other.start()
    hero.controls["value"].value = 1
    other.join(5)
    assert not other.is_alive()
    return hero.stage.frame["note"]


def test_an_older_figure_is_never_drawn_over_a_newer_one(monkeypatch):
    def show(value):
        return figures.frame([], f"value {value}")

    assert last_note(show) == "value 2"
    monkeypatch.setattr(widgets.threading, "RLock", contextlib.nullcontext)
    assert last_note(show) == "value 1"  # the planted fault: nobody waits


@pytest.mark.parametrize(
    "made",
    [
        widgets.slider("whole", 3, 0, 9, 1),
        widgets.slider("real", 0.3, 0.0, 0.9, 0.1),
        widgets.slider("powers of ten", 0.3, -1, 1, 0.1, log=True),
    ],
    ids=lambda made: made.description,
)
def test_a_slider_says_its_range_before_its_value(made):
    """A browser that reads the value first cuts it to the old range, and sends back what is left of it."""
    wanted = ["value", "min", "max", "step"]
    assert set(made.get_state(wanted)) == set(wanted)
    for first in range(len(wanted)):
        words = list(made.get_state(wanted[first:] + wanted[:first]))
        assert words[-1] == "value"
    assert list(made.get_state("max")) == ["max"]


def test_a_job_lets_other_threads_have_their_turn():
    waited = []

    class Counting(widgets.Worker):
        def frame(self):
            return figures.frame([])

    async def session():
        worker = Counting()

        def job():
            for share in range(100):
                time.sleep(0.01)
                yield share / 100

        def interfere():
            for _ in range(5):
                begun = time.monotonic()
                worker.refresh()
                waited.append(time.monotonic() - begun)
                time.sleep(0.02)
            worker.halt()

        worker.start("counting", job())
        await asyncio.gather(worker.job, asyncio.to_thread(interfere))
        return worker

    worker = asyncio.run(session())
    assert worker.progress.description == "stopped"
    assert worker.progress.value < 0.9  # it was stopped on its way
    assert max(waited) < 0.2


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


def test_losses_that_are_not_numbers_name_no_class():
    scene = PlaneScene(data.gaussians())
    with pytest.raises(FloatingPointError, match="became NaN and cannot be judged"):
        scene.bayes((0.1, 0.1), 0.5, 1.0, lambda levels: levels.sigma * torch.nan)


def test_the_backdrop_is_the_exact_posterior():
    law = data.gaussians()
    scene = PlaneScene(law)
    image = scene.backdrop()
    assert image["shape"] == [96, 96, 4]
    pixels = np.frombuffer(base64.b64decode(image["data"]), np.uint8).reshape(96, 96, 4)
    row, column = 20, 70
    at = torch.tensor([(column + 0.5) / 48 - 1, 1 - (row + 0.5) / 48], dtype=torch.float64)
    density = scene.denoiser.log_density(at.reshape(1, 2, 1, 1), 0.0)
    share = torch.softmax(density + law.priors.log(), 1)[0].numpy()
    palette = [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in figures.COLOURS[: len(share)]]
    np.testing.assert_allclose(pixels[row, column, :3], share @ np.array(palette), atol=1)
    assert (pixels[..., 3] == 140).all(), "half clear, so that it suits a dark page as well"


# -- jobs -------------------------------------------------------------------------------------------------------------


class Counting(widgets.Worker):
    """A worker whose jobs append to a list, which its frame shows."""

    def __init__(self):
        super().__init__()
        self.reached = []

    def frame(self):
        return figures.frame([], f"reached {self.reached}")

    def letters(self, name, items=3, error=None):
        for item in range(items):
            self.reached.append(f"{name}{item}")
            yield (item + 1) / items
        if error is not None:
            raise error


async def until(condition, job):
    """Let the event loop run until something is the case, or the job has ended."""
    while not condition() and not job.done():
        await asyncio.sleep(0)


def run_on_a_loop(worker, *start):
    async def session():
        worker.start(*start)
        job = worker.job
        await job

    asyncio.run(session())


def run_at_once(worker, *start):
    worker.start(*start)


@pytest.mark.parametrize("run", [run_on_a_loop, run_at_once])
def test_a_job_that_raises_says_its_sentence_and_the_next_one_works(run, caplog):
    worker = Counting()
    error = FloatingPointError("the gradient [B,C] became <non-finite>")
    with caplog.at_level(logging.ERROR):
        run(worker, "attacking", worker.letters("a", error=error))
    assert worker.progress.description == "failed" and worker.progress.bar_style == "danger"
    assert worker.job is None and worker.work is None
    note = worker.stage.frame["note"]
    assert "attacking failed" in note and "the gradient [B,C] became &lt;non-finite&gt;" in note
    assert "reached ['a0', 'a1', 'a2']" in note, "what was reached stays"
    assert caplog.records[-1].exc_info[1] is error, "the traceback goes to the log"
    run(worker, "again", worker.letters("b"))
    assert worker.progress.description == "done" and worker.progress.bar_style != "danger"
    assert "failed" not in worker.stage.frame["note"] and worker.reached[-1] == "b2"


@pytest.mark.parametrize("error", [None, ValueError("too late")], ids=["ends", "raises"])
def test_the_end_of_a_replaced_job_does_not_touch_the_one_that_replaced_it(error):
    """The other job is started while the first computes its last item, as from another thread."""
    worker = Counting()
    seen = []

    def first():
        yield 0.5
        worker.start("second", worker.letters("b", items=50))
        if error is not None:
            raise error

    async def session():
        worker.start("first", first())
        old = worker.job
        await until(lambda: old.done(), old)
        seen.append((worker.progress.description, worker.job is not None and worker.job.done()))
        await worker.job
        return old

    old = asyncio.run(session())
    assert seen == [("second", False)] and old.exception() is None
    assert worker.progress.description == "done" and worker.progress.value == 1
    assert len(worker.reached) == 50 and "too late" not in worker.stage.frame["note"]


def test_a_job_replaced_before_its_first_item_does_nothing():
    worker = Counting()

    async def session():
        worker.start("first", worker.letters("a"))
        old = worker.job
        worker.start("second", worker.letters("b"))
        await worker.job
        await old

    asyncio.run(session())
    assert worker.reached == ["b0", "b1", "b2"] and worker.progress.description == "done"


def test_a_stopped_job_does_no_further_item_and_is_closed():
    worker = Counting()
    closed = []

    def job():
        try:
            yield from worker.letters("a", items=100)
        finally:
            closed.append(len(worker.reached))

    async def session():
        worker.start("counting", job())
        task = worker.job
        await until(lambda: len(worker.reached) == 4, task)
        worker.stop.click()
        state = worker.progress.description
        await task
        return state

    assert asyncio.run(session()) == "stopped"
    assert closed == [4] and len(worker.reached) == 4 and worker.progress.description == "stopped"


def test_a_job_whose_task_is_cancelled_from_outside_is_stopped():
    worker = Counting()

    async def session():
        worker.start("counting", worker.letters("a", items=100))
        await until(lambda: worker.reached, worker.job)
        worker.job.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    asyncio.run(session())
    assert worker.progress.description == "stopped" and worker.work is None


def bar_of(value):
    panel = figures.bars(["a"], [value], title="t", alt="a", colours=["red"])
    return figures.frame([[panel]], f"value {value}")


def test_a_figure_that_cannot_be_drawn_says_why_and_the_hero_lives():
    control = widgets.slider("value", 0.5, 0.0, 1.0, 0.1)
    hero = widgets.Hero(
        lambda value, point, picked: bar_of(float("nan") if value > 0.8 else value),
        dict(value=control),
    )
    control.value = 1.0
    assert hero.stage.frame["panels"] == [], "no older figure under the newer control"
    assert "could not be drawn" in hero.stage.frame["note"]
    assert "got 1 that are not" in hero.stage.frame["note"]
    control.value = 0.3
    assert hero.stage.frame["panels"][0]["values"] == [0.3]
    assert "could not" not in hero.stage.frame["note"]


@pytest.mark.parametrize("name", ["digit", "attack", "maximisation"])
def test_a_network_of_nan_leaves_a_hero_that_says_why(name, student):
    broken = copy.deepcopy(student)
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    hero = HEROES[name](broken)
    note = hero.stage.frame["note"]
    assert hero.stage.frame["panels"] == [] and "NaN" in note


def test_a_job_goes_on_while_its_figure_cannot_be_drawn():
    class Drawing(Counting):
        def frame(self):
            return bar_of(float("nan") if len(self.reached) < 5 else 1.0)

    worker = Drawing()
    worker.start("counting", worker.letters("a", items=2))
    assert "could not be drawn" in worker.stage.frame["note"]
    worker.start("counting", worker.letters("b", items=3))
    assert worker.stage.frame["panels"] and worker.progress.description == "done"


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
        while (
            hero.progress.value < 0.6
        ):  # of 21 attack steps, or of 11 and then 20 steps of the walk
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


def asked_in_words(hero):
    return hero.scene.described(**{name: one.value for name, one in hero.shooting.items()})


@pytest.mark.parametrize("make", FILMS.values(), ids=FILMS)
def test_an_old_film_is_shown_as_its_own_until_the_new_one_begins(make, student):
    async def session():
        hero = make(student)
        old = asked_in_words(hero)
        first = hero.stage.frame
        assert old in first["note"] and "This is the film of" not in first["note"]
        hero.shooting["index"].value = 7
        hero.controls["step"].value = 3
        waiting = hero.stage.frame
        job = hero.job
        await job
        return hero, old, waiting

    hero, old, waiting = asyncio.run(session())
    new = asked_in_words(hero)
    assert f"This is the film of {old}</b>; there is none yet of {new}" in waiting["note"]
    assert waiting["panels"][0]["title"] != hero.stage.frame["panels"][0]["title"]
    assert "This is the film of" not in hero.stage.frame["note"]
    assert new in hero.stage.frame["note"]


@pytest.mark.parametrize("make", FILMS.values(), ids=FILMS)
def test_a_film_that_fails_says_so_and_the_old_one_stays_its_own(make, student):
    hero = make(student)
    old = asked_in_words(hero)
    panels = hero.stage.frame["panels"]
    noise = hero.scene.classifier.noise
    hero.scene.classifier.noise = torch.full_like(noise, float("nan"))
    hero.shooting["index"].value = 7
    assert hero.progress.description == "failed" and hero.progress.bar_style == "danger"
    assert (
        "failed.</b> ValueError: expected the noise of a bank as finite numbers"
        in hero.stage.frame["note"]
    )
    assert f"This is the film of {old}" in hero.stage.frame["note"]
    assert hero.stage.frame["panels"] == panels
    hero.scene.classifier.noise = noise
    hero.shooting["index"].value = 8
    assert hero.progress.description == "done" and "failed" not in hero.stage.frame["note"]


@pytest.mark.parametrize("make", FILMS.values(), ids=FILMS)
def test_a_first_film_that_fails_leaves_a_hero_that_says_why(make, student, monkeypatch):
    def nothing(*_, **__):
        raise FloatingPointError("logits of NaN")
        yield

    with monkeypatch.context() as patched:
        patched.setattr(attacks, "pgd", nothing)
        hero = make(student)
    assert "logits of NaN" in hero.stage.frame["note"]
    assert "There is no film yet" in hero.stage.frame["note"]
    hero.shooting["index"].value = 7
    assert hero.stage.frame["panels"] and "logits of NaN" not in hero.stage.frame["note"]


def test_a_film_that_is_stopped_early_says_so_and_is_shot_again_when_asked_for(student):
    async def session():
        hero = widgets.attack_hero(student)
        hero.shooting["epsilon"].value = 0.01
        await until(lambda: len(hero.scene.film) == 3, hero.job)
        hero.stop.click()
        stopped = hero.stage.frame["note"]
        hero.shooting["epsilon"].value = 0.1
        await hero.job
        hero.shooting["epsilon"].value = 0.01
        await hero.job
        return stopped, hero

    stopped, hero = asyncio.run(session())
    assert "stopped after step 2: not fooled so far" in stopped
    assert len(hero.scene.film) == 21
    assert "not fooled in 20 steps, which is no proof" in hero.stage.frame["note"]


def test_a_walk_that_is_stopped_early_does_not_answer_for_the_defence(student):
    async def session():
        hero = widgets.maximisation_hero(student)
        hero.shooting["index"].value = 7
        job = hero.job
        await until(lambda: hero.scene.settings["index"] == 7 and len(hero.scene.film) == 3, job)
        hero.stop.click()
        return hero

    note = asyncio.run(session()).stage.frame["note"]
    assert "The walk was stopped after step 2 of 20" in note
    assert "which this walk has not taken" in note and "and answers" not in note


def test_the_attack_film_is_pgd_and_stays_in_its_budget(student):
    hero = widgets.attack_hero(student, index=12)
    scene = hero.scene
    world = data.digits()
    x = world.test_images[12:13]
    y = world.test_labels[12:13]
    for norm, budget in (("L∞", 0.1), ("L2, radius 8ε", 0.8)):
        hero.shooting["norm"].value = norm
        *_, last = attacks.pgd(scene.classifier, x, y, budget, norm=scene.norms[norm], steps=20)
        assert torch.equal(scene.film[-1].x, last.x) and float(last.size) <= budget + 1e-5
    assert bool(last.fooled) and "fooled" in hero.stage.frame["note"]
    lead = hero.stage.frame["panels"][3]["series"][0]["y"]
    assert (
        lead[-1] == pytest.approx(-float(attacks.margin_loss(last.logits, y)), rel=1e-3)
        and len(lead) == 21
    )
    share = torch.softmax(last.logits[0], 0)
    np.testing.assert_allclose(hero.stage.frame["panels"][2]["values"], share, atol=1e-4)
    curve = scene.shown.losses[20]
    torch.testing.assert_close(
        scene.bayes_classifier.logits_of(curve[None]), last.logits, rtol=1e-3, atol=1e-3
    )


def test_a_photographs_film_names_its_classes_and_counts_its_budget_in_255ths(student):
    hero = photo_attack(student)
    assert hero.shooting["epsilon"].label == "8/255" and hero.controls["step"].max == 3
    note = hero.stage.frame["note"]
    label = SHORT[int(data.digits().test_labels[0])]
    assert "Attack on photo 0, L∞ within 0.031, margin loss, 3 steps" in note
    assert hero.stage.frame["panels"][0]["title"] == f"Photo 0: {label}"
    assert hero.stage.frame["panels"][2]["labels"] == list(SHORT)
    hero.shooting["epsilon"].value = 16 / 255
    x = data.digits().test_images[:1]
    y = data.digits().test_labels[:1]
    *_, last = attacks.pgd(hero.scene.classifier, x, y, 16 / 255, steps=3)
    torch.testing.assert_close(hero.scene.film[-1].x, last.x, atol=1e-6, rtol=0)
    hero.shooting["norm"].value = "L2, radius 8ε"
    *_, last = attacks.pgd(hero.scene.classifier, x, y, 8 * 16 / 255, norm="l2", steps=3)
    torch.testing.assert_close(hero.scene.film[-1].x, last.x, atol=1e-6, rtol=0)


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


def test_colours_of_the_plane_that_no_control_moves_are_named(student):
    for name in ("bayes", "denoiser"):
        hero = HEROES[name](student)
        backdrops = dict(hero.stage.backdrops)
        for control in hero.controls.values():
            control.value = another(control)
        assert hero.stage.backdrops == backdrops
        assert "The plane is coloured by the" in hero.stage.frame["note"]
        assert "without noise" in hero.stage.frame["panels"][0]["alt"]


def test_stored_losses_name_their_picture_weighting_and_levels():
    losses = measuring.read(assets.folder() / "records/gallery-prototype")
    kept = replace(
        losses, index=losses.index[3:5], labels=losses.labels[3:5], losses=losses.losses[3:5]
    )
    hero = widgets.photo_hero(gallery.pictures()[0], kept)
    hero.controls["weighting"].value = "EDM"
    last = len(losses.levels.sigma) - 1
    hero.controls["band"].value = (1, last)
    assert hero.stage.frame["panels"][0]["title"].startswith("Generated 3:")
    assert hero.stage.frame["panels"][2]["title"] == "Posterior (EDM weighting)"
    assert f"With EDM weighting, {last} levels" in hero.stage.frame["note"]


def test_distances_of_a_translation_are_to_the_labels_of_the_network():
    hero = HEROES["translation"](None)
    before = hero.stage.frame["panels"][3]
    hero.controls["family"].value = another(hero.controls["family"])
    assert hero.stage.frame["panels"][3] == before
    assert "network's own labels" in before["title"] and "trained on" in before["alt"]


# -- figures ----------------------------------------------------------------------------------------------------------


def test_a_frame_numbers_its_panels_through_all_rows():
    a, b, c = (figures.bars(["x"], [1], title=t, alt=t, colours=["red"]) for t in "abc")
    frame = figures.frame([[a, b], [c]], "note")
    assert [panel["title"] for panel in frame["panels"]] == ["a", "b", "c"]
    assert frame["rows"] == [2, 1] and frame["note"] == "note"
    assert figures.frame([], "note") == dict(panels=[], rows=[], note="note")


def test_a_button_stays_with_the_control_before_it():
    first, second = (widgets.slider(name, 1, 0, 3, 1) for name in "ab")
    run, stop = (widgets.button(name, "", name) for name in ("run", "stop"))
    left, right = widgets.row([first, second, run, stop]).children
    assert left is first and right.children == (second, run, stop)
    assert "dc-together" in right._dom_classes
    assert [len(widgets.row([run, stop]).children[0].children)] == [2]


def test_the_axis_of_the_attacks_evidence_stands_still_and_shows_the_clean_curves(student):
    scene = widgets.attack_hero(student, index=12).scene
    panels = [scene.at(step)["panels"][1] for step in (0, 7, 20)]
    assert len({tuple(panel["yrange"]) for panel in panels}) == 1
    drawn = [value for panel in panels for line in panel["series"] for value in line["y"]]
    low, high = panels[0]["yrange"]
    assert low <= min(drawn) and max(drawn) <= high
    dotted = [[line for line in panel["series"] if line["dash"]] for panel in panels]
    clean = {tuple(line["y"]) for line in panels[0]["series"] if not line["dash"]}
    for lines in dotted:
        assert len(lines) == 2 and all(tuple(line["y"]) in clean for line in lines)


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="expected finite numbers to draw, got 1 that are not"):
        figures.bars(["a", "b"], [0.0, float("nan")], title="t", alt="a", colours=["red", "red"])


def test_pictures_cursors_and_radii_that_are_not_finite_are_refused():
    nan = float("nan")
    row = dict(label="f", certified=float("inf"), attacked=None)
    spelled = dict(title="t", alt="a")
    line = dict(y=[1.0, 2.0], colour="red")
    for draw in (
        lambda: figures.picture([[0.0, nan]]),
        lambda: figures.radius_axis([row], xlabel="r", range=(0, 1), **spelled),
        lambda: figures.radius_axis(
            [dict(row, certified=0, attacked=nan)], xlabel="r", range=(0, 1), **spelled
        ),
        lambda: figures.radius_axis(
            [dict(row, certified=0)], xlabel="r", range=(0, nan), **spelled
        ),
        lambda: figures.curves([0, 1], [line], xlabel="x", ylabel="y", cursor=nan, **spelled),
        lambda: figures.curves([0, 1], [line], xlabel="x", ylabel="y", yrange=(0, nan), **spelled),
    ):
        with pytest.raises(ValueError, match="expected finite numbers to draw, got 1"):
            draw()


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
