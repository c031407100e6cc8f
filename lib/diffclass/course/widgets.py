"""Thin controllers: a few controls, one function from their state to a frame, one stage to draw it. No arithmetic."""

import asyncio
import functools
import html
import logging
import math
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path

import anywidget
import ipywidgets as W
import plotly.graph_objects as go
import traitlets
from torch import Tensor

from diffclass import data
from diffclass.audit import CHECKS
from diffclass.classifiers.base import Held
from diffclass.classifiers.idc import Translator
from diffclass.course import drawn, figures, plots
from diffclass.course.scenes.adapting import ANOTHER, LAST, AdapterScene
from diffclass.course.scenes.attacking import AttackScene
from diffclass.course.scenes.audit import AuditScene
from diffclass.course.scenes.certifying import MOST, TOGETHER, CertifyingScene
from diffclass.course.scenes.digits import DigitScene, OptimalDigitsScene
from diffclass.course.scenes.maximising import MaximisationScene
from diffclass.course.scenes.one_call import OneCallScene
from diffclass.course.scenes.photos import PhotoScene
from diffclass.course.scenes.plane import ForwardScene, PlaneScene
from diffclass.course.scenes.racing import RaceScene
from diffclass.course.scenes.scoreboard import SERIES, STEP, ScoreboardScene
from diffclass.course.scenes.smoothing import REACH, SmoothingScene
from diffclass.course.scenes.translation import TranslationScene
from diffclass.course.scenes.zero_shot import ZeroShotScene
from diffclass.data.plane import MixtureLaw
from diffclass.denoisers.base import Denoiser
from diffclass.evaluation.measuring import Losses
from diffclass.noise import Levels
from diffclass.storage.results import Record
from diffclass.training.adapting import EVERY

log = logging.getLogger(__name__)

Job = Generator[float, None, None]  # yields the share of its work that is done
QUIET = 0.15  # seconds without a change after which a control counts as resting
BREATH = 0.01  # seconds between two parts of what is prepared while they rest
VOTES = (100, 200, 500, 1000, 2000, 5000, 10_000)
WHOLE_LABEL = {"description_width": "initial"}  # labels are not cut off


class Stage(anywidget.AnyWidget):
    """The drawing surface: shows `frame`, reports what the reader drags (`point`, `cursor`) or clicks (`picked`)."""

    _esm = Path(__file__).with_name("stage.js")
    _css = Path(__file__).with_name("stage.css")
    frame = traitlets.Dict().tag(sync=True)
    backdrops = traitlets.Dict().tag(sync=True)
    point = traitlets.List(traitlets.Float(), [0.0, 0.0]).tag(sync=True)
    cursor = traitlets.Float(0.0).tag(sync=True)
    picked = traitlets.Int(-1).tag(sync=True)


def in_turn(method: Callable) -> Callable:
    """A method of `Staged` that waits until no other one of the same stage is at work.

    Why         JupyterLab hands the messages of widgets to another thread than the one that runs cells, though not the first
                ones; where two threads drew, the older figure could come last and stay under newer controls
    """

    @functools.wraps(method)
    def turned(self, *values, **more):
        with self._turn:
            return method(self, *values, **more)

    return turned


class Staged(W.VBox):
    """A stage with the figure of the present state, and below it a note that a screen reader reads out.

    What cannot be drawn says why in the note, instead of leaving an older figure under newer controls.
    """

    def __init__(self, stage: Stage):
        drawn.belong_to_cells()
        self._turn = threading.RLock()
        self.stage = stage
        self.message = ""  # what the hero itself has to say, before the figure's note
        self._logged = ""
        self._resting: asyncio.TimerHandle | None = None
        super().__init__()
        self.add_class("dc-hero")  # what the stage shows alone on a projector

    def frame(self) -> dict:
        """The frame of the present state; the heroes say how."""
        return figures.frame([])

    def later(self, action: Callable[[], None], after: float = QUIET) -> bool:
        """Call `action` when the controls have rested for so many seconds, and not what was to be called until then.

        Gives       False where no event loop runs, and so nobody would call
        """
        self.stay()
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return False
        self._resting = loop.call_later(after, action)
        return True

    def stay(self) -> None:
        """Call nothing later."""
        if self._resting is not None:
            self._resting.cancel()
            self._resting = None

    @in_turn
    def refresh(self, _=None) -> None:
        """Draw the present state, or say why it cannot be drawn."""
        try:
            frame = self.frame()
        except Exception as error:
            if str(error) != self._logged:  # once, not at every move of a slider
                log.exception("the figure could not be drawn")
            self._logged = str(error)
            frame = figures.frame([], f"<b>The figure could not be drawn.</b> {sentence(error)}")
        else:
            self._logged = ""
        note = " ".join(part for part in (self.message, frame["note"]) if part)
        self.stage.frame = {**frame, "note": note}


def sentence(error: Exception) -> str:
    """The kind of an error and what it says, as HTML."""
    text = html.escape(str(error)) or "it says no more than that."
    return f"{type(error).__name__}: {text}"


class Hero(Staged):
    """Controls above a stage; every change calls `show`, which returns the next frame.

    Shapes      controls: widgets with a `value`; show(**values by name, point, picked) -> frame; `cursor` names the
                control that the line in the figure moves, in whole multiples of `cursor_step` if it is given
    Moving      `quick`, of the same arguments, gives a lesser frame while a control moves, or None where `show` is as
                quick; `show` follows when the controls have rested for `QUIET`. At once where no event loop runs
    Resting     `ahead`, of the same arguments, prepares a small part of what the reader may ask for next, and says whether
                something is left: it is called again and again until nothing is, or a control moves
    Why         one place for wiring, so that each hero is its controls and one function, and a test can turn them
    """

    def __init__(
        self,
        show: Callable[..., dict],
        controls: dict[str, W.Widget],
        *,
        quick: Callable[..., dict | None] | None = None,
        ahead: Callable[..., bool] | None = None,
        cursor: str | None = None,
        cursor_step: int | None = None,
        point: tuple[float, float] | None = None,
        backdrops: dict | None = None,
    ):
        super().__init__(Stage(backdrops=backdrops or {}))
        if point is not None:
            self.stage.point = list(point)
        self.controls = controls
        self.show = show
        self.quick = quick
        self.ahead = ahead
        self._moving = False
        for control in controls.values():
            control.observe(self.move, "value")
        self.stage.observe(self.move, ["point", "picked"])
        if cursor is not None:
            drag_moves(self.stage, controls[cursor], cursor_step)
        self.children = [row(controls.values()), self.stage]
        self.refresh()
        if ahead is not None:
            self.later(self.prepare)

    @in_turn
    def move(self, _=None) -> None:
        """Draw what can be drawn while a control moves, and the whole when it rests."""
        self._moving = self.later(self.rest)
        self.refresh()
        if not self._moving:  # the whole is drawn already
            self.stay()
            if self.ahead is not None:
                self.later(self.prepare)

    @in_turn
    def rest(self) -> None:
        """Draw the whole frame."""
        self._moving = False
        self.refresh()
        if self.ahead is not None:
            self.later(self.prepare)

    @in_turn
    def prepare(self) -> None:
        """Prepare a part of what may be asked for next, and the rest of it later.

        Why         a failure is not said: the figure that needs what failed will say it
        """
        try:
            left = self.ahead(**self.state())
        except Exception:
            log.exception("nothing could be prepared")
            return
        if left:
            self.later(self.prepare, after=BREATH)

    def state(self) -> dict:
        """The values of the controls, and what the reader dragged or clicked in the figure."""
        values = {name: control.value for name, control in self.controls.items()}
        return dict(**values, point=tuple(self.stage.point), picked=self.stage.picked)

    def frame(self) -> dict:
        """The frame of the present controls: the lesser one while they move, where there is one."""
        state = self.state()
        quick = self.quick(**state) if self.quick is not None and self._moving else None
        self._moving = quick is not None
        return self.show(**state) if quick is None else quick


def drag_moves(stage: Stage, control: W.Widget, step: int | None = None) -> None:
    """Let the line that the reader drags in the figure move a slider, in whole multiples of `step` if it is given."""

    def dragged(change) -> None:
        value = change["new"]
        control.value = value if step is None else step * round(value / step)

    stage.observe(dragged, "cursor")


def row(controls: Iterable[W.Widget]) -> W.HBox:
    """Controls side by side; where the page is narrow they go on in the next line.

    Why         a button or a bar stays with the control before it, so that none stands on a line of its own
    """
    kept = []
    for control in controls:
        if kept and isinstance(control, (W.Button, W.FloatProgress)):
            kept[-1].append(control)
        else:
            kept.append([control])
    parts = [
        _classed(W.HBox(group), "dc-together") if len(group) > 1 else group[0] for group in kept
    ]
    return _classed(W.HBox(parts), "dc-controls")


def _classed(widget: W.Widget, name: str) -> W.Widget:
    """A widget with one more class for stage.css."""
    widget.add_class(name)
    return widget


def _room(width: int) -> W.Layout:
    """The place of a control: `width` pixels where there is no more room, and somewhat more where there is."""
    return W.Layout(
        width="auto", flex=f"1 1 {width}px", max_width=f"{width + 140}px", min_width="0"
    )


class ValueLast:
    """A slider that names its value after its range in every message.

    Why         a browser takes a message word by word: a value that comes before the range which allows it is cut to the old
                one, and what is left of it is sent back as if the reader had moved the slider. ipywidgets keeps held words in a
                set, so that each process had an order of its own
    """

    def get_state(self, *what, **more) -> dict:
        """The state that is asked for, with the value at its end."""
        state = super().get_state(*what, **more)
        if "value" in state:
            state["value"] = state.pop("value")
        return state


class WholeSlider(ValueLast, W.IntSlider):
    """A slider of whole numbers."""


class RealSlider(ValueLast, W.FloatSlider):
    """A slider of real numbers."""


class LogSlider(ValueLast, W.FloatLogSlider):
    """A slider whose range is given in powers of ten."""


def slider(
    label: str, value, low, high, step, *, log: bool = False, width: int = 300, **more
) -> W.Widget:
    """A slider with room for its label; `log` makes low and high powers of ten."""
    options = dict(
        value=value,
        min=low,
        max=high,
        step=step,
        description=label,
        style=WHOLE_LABEL,
        layout=_room(width),
        **more,
    )
    if log:
        return LogSlider(base=10, readout_format=".3g", **options)
    if isinstance(value, int) and isinstance(step, int):
        return WholeSlider(**options)
    return RealSlider(**options)


def digit_slider(scene, index: int, **more) -> W.Widget:
    """Which of a scene's test digits."""
    return slider("test digit", index, 0, len(scene.world.test_images) - 1, 1, **more)


def choice(label: str, options, value=None, width: int = 240) -> W.Dropdown:
    """A dropdown with room for its label."""
    options = list(options)
    return W.Dropdown(
        options=options,
        value=value or options[0],
        description=label,
        style=WHOLE_LABEL,
        layout=_room(width),
    )


def button(label: str, kind: str, tooltip: str) -> W.Button:
    """A button; `kind` is its colour's name in ipywidgets."""
    return W.Button(
        description=label,
        button_style=kind,
        tooltip=tooltip,
        layout=W.Layout(width="auto", flex="none"),
    )


def digit_hero(denoiser: Denoiser, index: int = 1) -> Hero:
    """A real digit, its ten denoised versions, its ten losses over sigma and its posterior (notebook 00)."""
    scene = DigitScene(denoiser)
    controls = dict(
        index=digit_slider(scene, index),
        sigma=slider("noise σ", 0.6, -1.3, 0.7, 0.02, log=True),
    )
    return Hero(
        lambda index, sigma, point, picked: scene.at(index, sigma, picked if picked >= 0 else None),
        controls,
        cursor="sigma",
    )


def forward_hero(law: MixtureLaw | None = None) -> Hero:
    """Points and a digit carried through time by a noise schedule (notebook 01)."""
    scene = ForwardScene(law or data.gaussians(), data.digits().test_images[1])
    controls = dict(
        t=slider("timestep t", 200, 1, 1000, 1), schedule=choice("schedule", scene.SCHEDULES)
    )
    return Hero(
        lambda t, schedule, point, picked: scene.at(int(t), schedule),
        controls,
        cursor="t",
        cursor_step=1,
    )


def elbo_hero(law: MixtureLaw | None = None) -> Hero:
    """The bound of a chain of T steps at a dragged point, against the exact log-likelihood (notebook 02)."""
    scene = PlaneScene(law or data.gaussians())
    controls = dict(steps=slider("steps T", 16, 4, 128, 4))
    return Hero(
        lambda steps, point, picked: scene.elbo(point, steps),
        controls,
        cursor="steps",
        cursor_step=4,
        point=(0.1, 0.1),
        backdrops={"posterior": scene.backdrop()},
    )


def bayes_hero(law: MixtureLaw | None = None) -> Hero:
    """Losses, evidence and posterior of a dragged point, with prior, temperature and weighting (notebook 03)."""
    scene = PlaneScene(law or data.gaussians())
    controls = dict(
        prior_of_a=slider("prior of class A", 1 / 3, 0.01, 0.98, 0.01),
        temperature=slider("temperature", 1.0, -1, 2, 0.05, log=True),
        weighting=choice("weighting", scene.WEIGHTINGS, "ELBO"),
    )
    return Hero(
        lambda prior_of_a, temperature, weighting, point, picked: scene.bayes(
            point, prior_of_a, temperature, scene.WEIGHTINGS[weighting]
        ),
        controls,
        point=(-0.26, 0.2),
        backdrops={"posterior": scene.backdrop()},
    )


def denoiser_hero(law: MixtureLaw | None = None) -> Hero:
    """E[x0 | x_sigma, k] of a dragged noisy point under every class (notebook 04)."""
    scene = PlaneScene(law or data.mixtures())
    controls = dict(sigma=slider("noise σ", 0.2, -1.6, 0.7, 0.02, log=True))
    return Hero(
        lambda sigma, point, picked: scene.denoised(point, sigma),
        controls,
        cursor="sigma",
        point=(0.1, 0.2),
        backdrops={"posterior": scene.backdrop()},
    )


def optimal_digits_hero(denoiser: Denoiser) -> Hero:
    """Ten denoised digits by a network against ten by the optimal denoiser of the training set (notebook 04)."""
    scene = OptimalDigitsScene(denoiser)
    controls = dict(
        sigma=slider("noise σ", 0.3, -1.3, 0.7, 0.02, log=True),
        index=slider("digit", 1, 0, 399, 1),
        split=choice("from the", ["test set", "training set"]),
    )
    return Hero(
        lambda sigma, index, split, point, picked: scene.at(index, sigma, split == "training set"),
        controls,
    )


def racing_hero(denoiser: Denoiser, index: int = 4) -> Hero:
    """One digit whose classes are raced, eliminated or all measured, against the bill (notebook 06)."""
    scene = RaceScene(DigitScene(denoiser))
    controls = dict(
        index=digit_slider(scene, index),
        spent=slider("evaluations spent", 60, 10, scene.whole, 2),
        scale=slider("assumed scale (nats)", 8.0, 2.0, 20.0, 0.5),
        strategy=choice("strategy", scene.STRATEGIES),
    )
    return Hero(
        lambda index, spent, scale, strategy, point, picked: scene.at(
            index, strategy, scale, spent
        ),
        controls,
        cursor="spent",
        cursor_step=2,
    )


def photo_hero(images: Tensor, losses: Losses) -> Hero:
    """Stored losses of photographs under a weighting and a band of noise levels (notebook 05)."""
    scene = PhotoScene(images, losses)
    last = losses.losses.shape[2] - 1
    band = W.IntRangeSlider(
        value=(0, last),
        min=0,
        max=last,
        description="levels used",
        layout=_room(300),
        style=WHOLE_LABEL,
    )
    controls = dict(
        index=slider("picture", 0, 0, len(losses.index) - 1, 1),
        weighting=choice("weighting", scene.WEIGHTINGS, "ELBO"),
        band=band,
    )
    return Hero(
        lambda index, weighting, band, point, picked: scene.at(
            index, scene.WEIGHTINGS[weighting], band
        ),
        controls,
    )


def one_call_hero(
    denoiser: Denoiser, levels: Levels, images: Tensor, labels: Tensor, names: Sequence[str], **more
) -> Hero:
    """A photograph, its noised copy, eleven denoised ones, and the posterior from that one call (notebook 06)."""
    scene = OneCallScene(denoiser, levels, images, labels, names, **more)
    low = math.log10(float(levels.sigma[0]))
    high = math.log10(float(levels.sigma[-1]))
    step = 0.02
    notches = [10 ** (low + place * step) for place in range(int((high - low) / step) + 1)]
    controls = dict(
        index=slider("picture", 0, 0, len(images) - 1, 1),
        sigma=slider("noise σ", 10**low, low, high, step, log=True),
    )
    return Hero(
        lambda index, sigma, point, picked: scene.at(index, sigma),
        controls,
        cursor="sigma",
        quick=lambda index, sigma, point, picked: scene.moving(index, sigma),
        ahead=lambda index, sigma, point, picked: scene.ahead(index, sigma, notches),
    )


def translation_hero(translator: Translator, index: int = 350) -> Hero:
    """A digit on the bridge to its label, four families of labels with their cosines, ten distances (notebook 10)."""
    scene = TranslationScene(translator)
    controls = dict(
        index=digit_slider(scene, index),
        m=slider("share m of the picture", 0.6, 0.0, 1.0, 0.01),
        low=slider("black is stored as", -1.0, -1.0, 0.0, 0.05),
        family=choice("labels", scene.FAMILIES, "Hadamard"),
    )
    return Hero(
        lambda index, m, low, family, point, picked: scene.at(index, m, low, family),
        controls,
        cursor="m",
    )


def adapter_hero(base: Denoiser, records: Sequence[Record], index: int = 31) -> Hero:
    """A digit under an adapter: step, rank, recipe and threat; its losses, and two threat models (notebook 11)."""
    scene = AdapterScene(base, records)
    controls = dict(
        index=digit_slider(scene, index),
        recipe=choice("what is raised", scene.RECIPES, next(iter(scene.RECIPES)), width=380),
        rank=slider("rank kept", 4, 1, 4, 1),
        step=slider("training step", LAST, 0, LAST, EVERY),
        threat=choice("attacked through", scene.THREATS, ANOTHER),
    )
    return Hero(
        lambda index, recipe, rank, step, threat, point, picked: scene.at(
            index, recipe, step, rank, threat
        ),
        controls,
        cursor="step",
        cursor_step=EVERY,
    )


def scoreboard_hero(world: str = "digits", n: int = 64) -> Hero:
    """What stands of every classifier on the same pictures, as many as a slider says (notebook 14).

    Why         plotly, so that a point can be asked what it is; the stage below it is for the words
    """
    scene = ScoreboardScene(world)
    figure = go.FigureWidget(plots.forest(scene.at(n).series, ""))
    figure._config = plots.OFFLINE
    # Margins that plotly would fit to the labels cost a second drawing at every step.
    fixed = dict(automargin=False)
    figure.update_layout(autosize=True, height=480, margin=dict(t=30, b=40, l=270), yaxis=fixed)

    def show(n: int, group: str, by: str, point, picked) -> dict:
        board = scene.at(n, group, by)
        labels = [label for label, _ in board.series[by]]
        moved = tuple(labels[::-1]) != figure.layout.yaxis.categoryarray
        with figure.batch_update():
            for trace in figure.data:
                drawn = plots.points(board.series[trace.name])
                trace.x = drawn["x"]
                trace.text = drawn["text"]
                trace.error_x.array = drawn["error_x"]["array"]
                trace.error_x.arrayminus = drawn["error_x"]["arrayminus"]
                if moved:
                    trace.y = drawn["y"]
            if moved:
                figure.layout.yaxis.update(plots.axis_of(labels) | fixed)
        return figures.frame([], board.note)

    controls = dict(
        n=slider("pictures, at most", n, STEP, scene.most, STEP),
        group=choice("show", scene.groups),
        by=choice("sorted by", SERIES, "honest"),
    )
    hero = Hero(show, controls)
    hero.children = [row(controls.values()), figure, hero.stage]
    return hero


class Worker(Staged):
    """A stage with a job: work that is done item by item between the reader's actions, and can be stopped.

    One job at a time: starting another stops the running one. A job that was stopped or replaced does no further item
    and says nothing any more. A job that raises says its sentence; what was reached before stays on the stage.
    """

    def __init__(self):
        super().__init__(Stage())
        self.job: asyncio.Task | None = None
        self.work: Job | None = None  # the job that may draw and end
        self.what = ""
        self.progress = W.FloatProgress(
            min=0,
            max=1,
            description="idle",
            layout=W.Layout(width="auto", flex="1 1 180px", min_width="150px"),
        )
        self.stop = button("Stop", "", "stop the running job; its results so far stay")
        self.stop.on_click(lambda _: self.halt())

    @in_turn
    def start(self, what: str, work: Job) -> None:
        """Run a job item by item: as a task where there is an event loop (a notebook), at once where there is none."""
        self._take_over(what, work)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self._run_at_once(work)
        else:
            self.job = loop.create_task(self._run(work))

    @in_turn
    def _take_over(self, what: str, work: Job) -> None:
        self.halt()
        self.what = what
        self.work = work
        self.message = ""
        self._say(what, "")
        self.progress.value = 0.0

    def _run_at_once(self, work: Job) -> None:
        for _ in self._items(work):
            pass

    async def _run(self, work: Job) -> None:
        painted = time.monotonic()
        for _ in self._items(work):
            if time.monotonic() - painted > 0.15:  # a sign of life, not a film of it
                self.refresh()
                painted = time.monotonic()
            await asyncio.sleep(0.001)  # long enough for another thread to take its turn

    def _items(self, work: Job) -> Iterator[None]:
        """Do a job item by item for as long as it is the present one, and say how it ended."""
        try:
            while self.work is work:
                with self._turn:
                    share = next(work)
                    if self.work is work:
                        self.progress.value = share
                yield
            # stopped or replaced while it computed its last item
            _close(work)
            if self.work is None:
                self.refresh()
        except StopIteration:
            self.finish(work)
        except Exception as error:
            self.fail(work, error)
        finally:
            if self.work is work:  # interrupted from outside, such as by the kernel
                self.halt()
            _close(work)

    @in_turn
    def finish(self, work: Job) -> None:
        """Say that a job is done, and draw its result; nothing where another job has taken its place."""
        if self.work is work:
            self._end("done", "success")

    @in_turn
    def fail(self, work: Job, error: Exception) -> None:
        """Say why a job failed, and draw what it reached; the traceback goes to the log."""
        log.error("a job failed", exc_info=error)
        if self.work is work:
            self.message = f"<b>{html.escape(self.what)} failed.</b> {sentence(error)} What was reached before stays."
            self.progress.tooltip = str(error)
            self._end("failed", "danger")

    @in_turn
    def halt(self) -> None:
        """Stop the running job; its results so far stay, and say that they are partial."""
        work = self.work
        if work is not None:
            self.work = None
            _close(work)
            self._end("stopped", "warning")

    def _end(self, description: str, colour: str) -> None:
        self.work = None
        self.job = None
        self._say(description, colour)
        self.refresh()

    def _say(self, description: str, colour: str) -> None:
        """The bar's words and its colour by ipywidgets' name."""
        self.progress.description = description
        self.progress.bar_style = colour


def _close(work: Job) -> None:
    """End a generator where it waits, so that its result is known to be partial."""
    try:
        work.close()
    except ValueError:
        # it is computing an item, in this thread or in another: it is closed after that item
        log.debug("a job is closed after its present item")


class Filmed(Worker):
    """A film that some controls have shot anew, as a job, and others scrub from memory.

    Shapes      a scene with shoot(**values of `shooting`) -> shares of the work done, at(**values of `scrubbing`) ->
                frame, `settings`: what the film that is shown was shot with, None without one, and
                described(**settings) -> words
    Controls    a control of `shooting` that changes stops the running job and starts another; the old film is shown,
                as its own, until the new one has a frame
    """

    def __init__(
        self, scene, what: str, scrubbing: dict[str, W.Widget], shooting: dict[str, W.Widget]
    ):
        super().__init__()
        self.scene = scene
        self.title = what
        self.controls = scrubbing
        self.shooting = shooting
        drag_moves(self.stage, next(iter(scrubbing.values())), step=1)
        for control in scrubbing.values():
            control.observe(self.refresh, "value")
        for control in shooting.values():
            control.observe(lambda _: self.shoot(), "value")
        self.children = [
            row([*scrubbing.values(), self.stop, self.progress]),
            row(shooting.values()),
            self.stage,
        ]
        first = self.take()
        self._take_over(what, first)
        self._run_at_once(first)  # the figure is never empty

    def asked(self) -> dict:
        """What the controls ask for."""
        return {name: control.value for name, control in self.shooting.items()}

    def take(self) -> Job:
        """The job: a new film, by the present controls."""
        return self.scene.shoot(**self.asked())

    @in_turn
    def shoot(self) -> None:
        """Start a new film."""
        self.start(self.title, self.take())

    def frame(self) -> dict:
        """The present step of the film there is, which says where it is not that of the controls."""
        frame = self.scene.at(**{name: control.value for name, control in self.controls.items()})
        shown = self.scene.settings
        asked = self.asked()
        if shown is None or shown == asked:
            return frame
        other = (
            f"<b>This is the film of {self.scene.described(**shown)}</b>; there is none yet of "
            f"{self.scene.described(**asked)}, for which the controls ask."
        )
        return {**frame, "note": f"{other} {frame['note']}"}


def audit_hero(stored: Iterable[dict] = (), name: str = "honest", number: int = 3) -> Hero:
    """40 lamps of an honest classifier, four mysteries and stored audits (documents of `diffclass audit --json`); a
    click tells why (notebook 09)."""
    scene = AuditScene(stored)
    controls = dict(
        name=choice("classifier", scene.names, name),
        number=slider("check", number, 1, len(CHECKS), 1),
    )
    hero = Hero(
        lambda name, number, point, picked: scene.at(name, number),
        controls,
        quick=lambda name, number, point, picked: scene.waiting(name),
    )

    def clicked(change) -> None:
        if change["new"] >= 0:
            shown = scene.numbers(controls["name"].value)
            controls["number"].value = shown[change["new"]]
            hero.stage.picked = -1  # so that the same lamp can be clicked again

    hero.stage.observe(clicked, "picked")
    return hero


def attack_hero(denoiser: Denoiser, index: int = 12) -> Filmed:
    """One digit attacked by PGD: picture, change, losses and posterior at every step (notebook 08)."""
    digits = DigitScene(denoiser)
    scene = AttackScene(digits.classifier, digits.world.test_images, digits.world.test_labels)
    which = digit_slider(digits, index, width=270, continuous_update=False)
    budget = slider("budget ε (pixels)", 0.1, 0.0, 0.3, 0.005, width=270, continuous_update=False)
    return _attacked(scene, which, budget)


def photo_attack_hero(
    classifier: Held, images: Tensor, labels: Tensor, names: Sequence[str], **more
) -> Filmed:
    """One photograph attacked by PGD of ten steps: picture, change, losses and posterior at each (notebook 08)."""
    scene = AttackScene(classifier, images, labels, names, **{"steps": 10, **more})
    which = slider("picture", 0, 0, len(images) - 1, 1, width=270, continuous_update=False)
    budget = W.SelectionSlider(
        options=[(f"{k}/255", k / 255) for k in range(17)],
        value=8 / 255,
        description="budget ε (pixels)",
        continuous_update=False,
        style=WHOLE_LABEL,
        layout=_room(280),
    )
    return _attacked(scene, which, budget)


def _attacked(scene: AttackScene, which: W.Widget, budget: W.Widget) -> Filmed:
    """The film of an attack, with what chooses the picture and the budget."""
    return Filmed(
        scene,
        "attacking",
        dict(step=slider("film: PGD step", scene.steps, 0, scene.steps, 1, width=270)),
        dict(
            index=which,
            epsilon=budget,
            norm=choice("norm", scene.norms, width=190),
            loss=choice("loss", scene.LOSSES, width=160),
        ),
    )


def maximisation_hero(denoiser: Denoiser, index: int = 17) -> Filmed:
    """Likelihood maximisation of a clean and of an attacked digit, step by step (notebook 07)."""
    scene = MaximisationScene(DigitScene(denoiser))
    return Filmed(
        scene,
        "attacking, then walking",
        dict(step=slider("film: step", 5, 0, 20, 1, width=270)),
        dict(
            index=digit_slider(scene, index, width=270, continuous_update=False),
            budget=slider(
                "its L∞ limit (pixels)", 0.1, 0.0, 0.3, 0.005, width=310, continuous_update=False
            ),
            variant=choice("variant", scene.VARIANTS, width=170),
            target=choice("attack on", scene.TARGETS, width=260),
        ),
    )


def zero_shot_hero(index: int = 0) -> Filmed:
    """Ten prompts eliminated level by level: losses by timestep, who is left, what it costs, and the truth (notebook 13)."""
    scene = ZeroShotScene()
    budget = W.SelectionSlider(
        options=[(f"{scene.bill(levels)}", levels) for levels in scene.BUDGETS],
        value=scene.BUDGETS[-1],
        description="budget (evaluations)",
        continuous_update=False,
        style=WHOLE_LABEL,
        layout=_room(280),
    )
    return Filmed(
        scene,
        "asking",
        dict(share=slider("film: % of the bill", 60, 1, 100, 1, width=270)),
        dict(
            index=slider(
                "picture", index, 0, len(scene.images) - 1, 1, width=270, continuous_update=False
            ),
            budget=budget,
            weighting=choice("weight", scene.WEIGHTINGS, width=260),
        ),
    )


def smoothing_hero(base: str = "a barcode", x: float = 0.05) -> Hero:
    """A jagged classifier of one pixel, its noised copies, and the radius that their share proves (notebook 12)."""
    scene = SmoothingScene()
    controls = dict(
        x=slider("picture x", x, -REACH, REACH, 0.01),
        sigma=slider("smoothing σ", 0.1, -1.7, -0.2, 0.02, log=True),
        base=choice("base classifier", scene.bases, base),
    )
    return Hero(
        lambda x, sigma, base, point, picked: scene.at(base, x, sigma),
        controls,
        cursor="x",
    )


class Certifier(Worker):
    """Notebook 12b: votes on one digit as they arrive, and what they prove. Jobs can be stopped, and go on where they were.

    Controls    another digit or sigma stops the running job and shows the votes cast there, if any; another alpha reads the
                counted votes again; `shown` scrubs through them
    """

    def __init__(self, denoiser: Denoiser, index: int):
        super().__init__()
        self.scene = CertifyingScene(denoiser)
        self.controls = dict(
            shown=slider("votes shown", MOST, TOGETHER, MOST, TOGETHER, width=270),
            index=digit_slider(self.scene, index, width=270),
            sigma=slider("smoothing σ (pixels)", 0.25, 0.05, 0.5, 0.05, width=270),
            alpha=slider("wrong at most α", 1e-3, -5, -1, 0.25, log=True, width=270),
        )
        self.run_vote = button("Vote", "success", "1000 noised copies more; press again to go on")
        self.run_attack = button(
            "Attack", "danger", "the shortest change that turns the votes: from above"
        )
        self._wire()
        self.children = [
            row([self.controls[name] for name in ("index", "sigma", "alpha")]),
            row([self.controls["shown"], self.run_vote, self.run_attack, self.stop, self.progress]),
            self.stage,
        ]
        first = self.scene.vote(*self.place(), votes=5 * TOGETHER)
        self._take_over("voting", first)
        self._run_at_once(first)  # the figure is never empty

    def _wire(self) -> None:
        for name in ("index", "sigma"):
            self.controls[name].observe(lambda _: self.choose(), "value")
        for name in ("alpha", "shown"):
            self.controls[name].observe(self.refresh, "value")
        drag_moves(self.stage, self.controls["shown"], step=TOGETHER)
        self.run_vote.on_click(lambda _: self.vote())
        self.run_attack.on_click(lambda _: self.attack())

    def place(self) -> tuple[int, float]:
        """The digit and the sigma that the controls ask for."""
        return self.controls["index"].value, round(self.controls["sigma"].value, 6)

    def frame(self) -> dict:
        """The frame of the present state."""
        return self.scene.at(
            *self.place(), self.controls["alpha"].value, self.controls["shown"].value
        )

    @in_turn
    def choose(self) -> None:
        """Take the chosen digit and sigma; a job on other ones ends."""
        self.halt()
        self.message = ""
        self.refresh()

    @in_turn
    def vote(self) -> None:
        """Cast more votes, and show them all."""
        self.controls["shown"].value = MOST
        self.start("voting", self.scene.vote(*self.place()))

    @in_turn
    def attack(self) -> None:
        """Start an attack on the votes."""
        job = self.scene.attack(*self.place(), self.controls["alpha"].value)
        self.start("attacking", job)


def certify_hero(denoiser: Denoiser, index: int = 12) -> Certifier:
    """The votes on a digit, two lower bounds of their share, the radius, and an attack from above (notebook 12b)."""
    return Certifier(denoiser, index)
