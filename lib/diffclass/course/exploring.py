"""The explorer: thin controls around `ExplorerScene`; what a lecturer projects, in a notebook or alone in a browser tab."""

import base64
import html
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs

import anywidget
import ipywidgets as W
import plotly.graph_objects as go
import traitlets
from ipywidgets.widgets.trait_types import CByteMemoryView

from diffclass.course import figures, plots
from diffclass.course.scenes import keeping, overview
from diffclass.course.scenes.audit import evidence_of, lamps_of
from diffclass.course.scenes.explorer import (
    EACH,
    METHODS,
    NORMS,
    SAME,
    WHO,
    WIDEST,
    WORLDS,
    ExplorerScene,
    available,
)
from diffclass.course.scenes.keeping import State
from diffclass.course.widgets import (
    VOTES,
    WHOLE_LABEL,
    Job,
    Stage,
    Worker,
    button,
    choice,
    drag_moves,
    in_turn,
    row,
    sentence,
    slider,
)
from diffclass.data.pictures import load_picture
from diffclass.storage import assets
from diffclass.zoo import networks, noised

NONE = "none"
FILM_SECONDS = 2.0
SEEN = {"digits": networks.DIGIT_RANGE, "cifar10": networks.NARROW_RANGE}  # noise levels to look at
PORT = 8866  # of `diffclass explore`
STARTS = {
    "digits": State(),
    "cifar10": State(
        "cifar10", ("contrastive",), 0, sigma=0.2, norm="L∞", budget=8 / 255, steps=10, votes=500
    ),
}


class Pad(anywidget.AnyWidget):
    """A pad to draw on or to drop a picture on; `count` grows by one whenever `picture`, the bytes of a PNG, is new."""

    _esm = Path(__file__).with_name("pad.js")
    _css = Path(__file__).with_name("pad.css")
    picture = CByteMemoryView(b"").tag(sync=True)  # what a browser's buffer becomes
    name = traitlets.Unicode("").tag(sync=True)
    count = traitlets.Int(0).tag(sync=True)
    said = traitlets.Unicode("").tag(sync=True)


class Explorer(Worker):
    """Notebook 15 and `diffclass explore`: one picture, one or two classifiers, an attack as a film, votes, a radius axis.

    Controls    picture, Attack and Certify; the rest is in tabs below. Another picture or classifier stops the running job;
                another setting changes nothing that is running or shown: the result keeps its own, and the note says
                what to press
    State       `state()` and `restore(text)`, as JSON; in an address as `?state=...`
    """

    def __init__(self, state: State = STARTS["digits"]):
        super().__init__()
        self._filling = False
        self._moving = False  # whether the picture's slider moves, and lesser answers do
        self.scene = ExplorerScene(state.world, state.classifiers)
        self._controls(state)
        self._place(state)
        self._wire()
        self.children = [
            row([self.index, self.run_attack, self.run_certify, self.stop, self.progress]),
            row([self.play, self.step, self.sigma]),
            self.stage,
            self.tabs,
        ]
        self._fill(state)
        self.refresh()

    # -- controls -----------------------------------------------------------------------------------------------------

    def _controls(self, state: State) -> None:
        self.index = slider("picture", 0, 0, 1, 1, width=290)
        self.run_attack = button("Attack", "danger", "change the picture until the answer changes")
        self.run_certify = button(
            "Certify", "success", "votes on noised copies, and the radius that they prove"
        )
        self.play = W.Play(min=0, max=1, step=1, interval=100, layout=W.Layout(width="150px"))
        self.step = slider("film", 0, 0, 1, 1, width=330)
        # Not in the browser: that would answer each picture of a film with the number before, and the last answer would win.
        W.link((self.play, "value"), (self.step, "value"))
        self.sigma = slider("noise σ to look at", 0.6, -1.0, 0.47, 0.1, log=True, width=330)
        self.world = choice(
            "world", [(said, name) for name, said in WORLDS.items()], state.world, width=240
        )
        self.first = choice("classifier", [NONE], width=360)
        self.second = choice("beside it", [NONE], width=360)
        self.seed = W.BoundedIntText(
            value=0,
            min=0,
            max=10**6,
            description="noise, seed",
            style=WHOLE_LABEL,
            layout=W.Layout(width="170px"),
        )
        self.another = button(
            "Other noise", "", "hold another noise, and ask about the same pictures again"
        )
        self.method = choice("attack", METHODS, width=250)
        self.norm = choice("norm", NORMS, width=120)
        self.budget = slider(
            "budget (pixels)", 0.1, 0.0, 0.3, 0.005, width=290, readout_format=".3f"
        )
        self.steps = slider("steps", 20, 1, 100, 1, width=240)
        self.who = choice("through", WHO, EACH, width=280)
        self.smoothing = slider("smoothing σ (pixels)", 0.25, 0.05, 0.5, 0.01, width=310)
        self.votes = W.SelectionSlider(
            options=VOTES,
            value=1000,
            description="votes",
            layout=W.Layout(width="240px"),
            style=WHOLE_LABEL,
        )
        self.voters = [
            choice("who votes", [SAME], width=330),
            choice("beside it", [SAME], width=330),
        ]
        self.pad = Pad()
        self.kept = W.Textarea(
            layout=W.Layout(width="640px", height="86px"), description="state", style=WHOLE_LABEL
        )
        self.load = button("Load", "", "take the state or the record in the box")
        self.load.layout.align_self = "flex-start"
        self.files = W.HTML()
        self.of_record = choice("record", [NONE], width=300)
        self.dots = go.FigureWidget(plots.dots([], "No record is chosen"))
        self.audit = Stage()
        self.tabs = W.Tab(
            children=[
                W.VBox(
                    [row([self.world, self.first, self.second]), row([self.seed, self.another])]
                ),
                row([self.method, self.norm, self.budget, self.steps, self.who]),
                row([self.smoothing, self.votes, *self.voters]),
                self.pad,
                row([self.kept, W.VBox([self.load, self.files])]),
                W.VBox([row([self.of_record]), self.dots]),
                self.audit,
            ],
            titles=(
                "Classifiers",
                "Attack",
                "Certificate",
                "Your picture",
                "Share",
                "All pictures",
                "Audit",
            ),
        )

    def _wire(self) -> None:
        self.index.observe(self._heard(self.choose), "value")
        self.world.observe(self._heard(self.travel), "value")
        for control in (self.first, self.second):
            control.observe(self._heard(self.compare), "value")
        self.seed.observe(self._heard(self.renoise), "value")
        self.norm.observe(self._heard(self._range_budget), "value")
        for control in (
            *(self.step, self.sigma, self.method, self.budget, self.steps, self.who),
            *(self.smoothing, self.votes, *self.voters),
        ):
            control.observe(self._heard(self.look), "value")
        self.pad.observe(self._heard(self.bring), "count")
        self.audit.observe(self._lamp, "picked")
        self.of_record.observe(self._heard(self._show_record), "value")
        self.tabs.observe(self._heard(self._opened), "selected_index")
        drag_moves(self.stage, self.sigma)
        self.run_attack.on_click(lambda _: self.attack())
        self.run_certify.on_click(lambda _: self.certify())
        self.another.on_click(lambda _: setattr(self.seed, "value", self.seed.value + 1))
        self.load.on_click(lambda _: self.restore(self.kept.value))

    def _heard(self, action):
        """An observer that calls `action` when the reader moved a control, not when the explorer fills them in."""

        def heard(change) -> None:
            if not self._filling:
                action()

        return heard

    @in_turn
    def _fill(self, state: State) -> None:
        """Set every control to a state, without acting on any of them."""
        self._filling = True
        try:
            self._fill_in(state)
        finally:
            self._filling = False

    def _fill_in(self, state: State) -> None:
        names = available(state.world)
        options = [(title, name) for name, title in names.items()]
        self.world.value = state.world
        self.first.options = options
        self.second.options = [("nothing", NONE), *options]
        self.first.value = state.classifiers[0]
        self.second.value = state.classifiers[1] if len(state.classifiers) > 1 else NONE
        self.index.max = len(self.scene.images) - 1
        if isinstance(state.picture, int):
            self.index.value = min(state.picture, self.index.max)
        self.seed.value = state.seed
        low, high = SEEN[state.world]
        with self.sigma.hold_sync():
            self.sigma.min = math.log10(low)
            self.sigma.max = math.log10(high)
            self.sigma.value = min(max(state.sigma, low), high)
        self.norm.value = state.norm
        self._range_budget(state.budget)
        self.method.value = state.method
        self.steps.value = min(max(1, state.steps), self.steps.max)
        self.who.value = state.who
        self.smoothing.value = min(max(state.smoothing, self.smoothing.min), self.smoothing.max)
        self.votes.value = min(VOTES, key=lambda count: abs(count - state.votes))
        self._offer_voters()
        self._offer_records()
        self._rewind()

    def _range_budget(self, value: float | None = None) -> None:
        """Let the budget's slider reach what its norm and world are attacked with, and no further than three times that."""
        usual = self.scene.place.budget(NORMS[self.norm.value])
        filling = self._filling
        self._filling = True
        with (
            self.budget.hold_sync()
        ):  # or the browser rounds the old value to the new step, and sends that back
            self.budget.min = 0.0
            self.budget.max = WIDEST * usual
            self.budget.step = usual / 20
            self.budget.value = usual if value is None else min(value, self.budget.max)
        self._filling = filling
        if not filling:
            self.look()

    def _offer_voters(self) -> None:
        for number, control in enumerate(self.voters):
            shown = number < len(self.scene.lanes)
            control.disabled = not shown
            control.options = (SAME, *noised.names(self.scene.world))
            if shown:
                control.value = self.scene.voter_of(self.scene.lanes[number])

    def _offer_records(self) -> None:
        listed = (NONE, *overview.stored(self.scene.world))
        if self.of_record.options != listed:
            self.of_record.options = listed
            self.of_record.value = NONE

    # -- state --------------------------------------------------------------------------------------------------------

    def state(self) -> State:
        """What the controls say."""
        subject = self.scene.subject
        return State(
            world=self.scene.world,
            classifiers=tuple(lane.name for lane in self.scene.lanes),
            picture=keeping.packed(subject.x) if subject.index is None else subject.index,
            seed=self.seed.value,
            sigma=self.sigma.value,
            norm=self.norm.value,
            budget=self.budget.value,
            method=self.method.value,
            steps=self.steps.value,
            who=self.who.value,
            smoothing=self.smoothing.value,
            votes=self.votes.value,
            step=self.step.value,
        )

    @in_turn
    def restore(self, text: str) -> None:
        """Take a state or a record, as JSON or as the text of a link; what does not exist here is said in a sentence."""
        try:
            text = text.strip()
            state, said = keeping.of_json(text) if text.startswith("{") else keeping.of_link(text)
        except ValueError as reason:
            self.message = sentence(reason)
            self.refresh()
            return
        record = None
        if text.startswith("{") and json.loads(text).get("kind") == keeping.RECORD:
            record = json.loads(text)
        message = " ".join(map(html.escape, said))
        self.start("opening", self._open(state, message, record))

    def _open(
        self, state: State, message: str = "", record: dict | None = None, film: bool = True
    ) -> Job:
        yield 0.1
        self._place(state)
        self._fill(state)
        yield 0.5
        yield from self.scene.ask(self.step.value)
        if record is not None:
            message = " ".join([message, *keeping.reopened(self.scene, record)])
            self._follow()
        elif film and state.step > 0:  # it showed a film, which the same settings give again
            yield from self._filmed(self.scene.attack(state.asked))
        self.message = message
        self._show(state.step)

    def _show(self, step: int) -> None:
        """Let the film's slider stand at a step."""
        self._film(self.step.max, step)

    def _place(self, state: State) -> None:
        """Take the world, picture, classifiers and noise of a state."""
        if state.world != self.scene.world:
            self.scene = ExplorerScene(state.world, state.classifiers)
        self.scene.compare(state.classifiers)
        if isinstance(state.picture, int):
            self.scene.choose(min(state.picture, len(self.scene.images) - 1))
        else:
            self.scene.bring(keeping.unpacked(state.picture, self.scene.place.image_shape))
        if state.seed != self.scene.seed:
            self.scene.refresh(state.seed)

    # -- actions ------------------------------------------------------------------------------------------------------

    def frame(self) -> dict:
        """The frame of the present state."""
        return self.scene.at(
            self.step.value,
            self.sigma.value,
            self.state().asked,
            self.smoothing.value,
            self.votes.value,
            moving=self._moving,
        )

    @in_turn
    def refresh(self, _=None) -> None:
        """Draw the present state; what is shared follows while it is seen."""
        super().refresh()
        if self.work is None and self.tabs.titles[self.tabs.selected_index or 0] == "Share":
            self._keep()

    @in_turn
    def look(self) -> None:
        """Draw what is known; ask, as a job, what is slow to find out."""
        self._moving = False
        if self.work is not None or self.scene.quick(self.step.value):
            self.refresh()
        else:
            self.start("asking", self.scene.ask(self.step.value))

    @in_turn
    def choose(self) -> None:
        """Take the chosen picture; where whole answers would hold up the slider, they follow when it rests."""
        self.halt()
        self.message = ""
        self.scene.choose(self.index.value)
        self._rewind()
        if self.scene.heavy(self.step.value) and self.later(self.look):
            self._moving = True
            self.refresh()
        else:
            self.look()

    @in_turn
    def bring(self) -> None:
        """Take the reader's own picture."""
        self.halt()
        self.message = ""
        try:
            self.scene.bring(load_picture(bytes(self.pad.picture), self.scene.place.image_shape))
        except ValueError as reason:
            self.message = f"<b>That picture was not taken.</b> {sentence(reason)}"
            self.pad.said = "Not taken; the line under the figure says why."
        else:
            self.pad.said = "Taken: the figure above is about it. A number of the slider goes back to the test pictures."
        self._rewind()
        self.look()

    @in_turn
    def travel(self) -> None:
        """Go to another world, where it begins."""
        self.halt()
        self.message = ""
        self.start("opening", self._open(STARTS[self.world.value]))

    @in_turn
    def compare(self) -> None:
        """Show the chosen classifiers; loading one may take a moment."""
        names = [name for name in (self.first.value, self.second.value) if name != NONE]
        self.halt()
        self.message = ""
        self.start("loading", self._load(names))

    def _load(self, names: Sequence[str]) -> Iterator[float]:
        yield 0.1
        try:
            self.scene.compare(names)
        except (ValueError, FileNotFoundError) as reason:
            self._fill(self.state())
            self.message = sentence(reason)
        else:
            self._filling = True
            self._offer_voters()
            self._filling = False
        yield 0.6
        yield from self.scene.ask(self.step.value)
        self._follow()

    @in_turn
    def renoise(self) -> None:
        """Hold the noise of the seed that the control says, and ask about the pictures that are shown again."""
        self.halt()
        self.scene.refresh(self.seed.value)
        self.look()

    @in_turn
    def attack(self) -> None:
        """Start the attack that the controls ask for."""
        self.start("attacking", self._filmed(self.scene.attack(self.state().asked)))

    def _filmed(self, job: Job) -> Job:
        for share in job:
            self._follow()
            yield share

    def _follow(self) -> None:
        """Let the film's slider reach, and show, the last picture there is."""
        self._film(max(1, self.scene.last), self.scene.last or self.step.value)

    def _rewind(self) -> None:
        self._film(1, 0)

    def _film(self, last: int, step: int) -> None:
        """The film's slider and player, in one message each: a browser that sees a part of it would answer."""
        self._filling = True
        with self.step.hold_sync(), self.play.hold_sync():
            self.step.max = self.play.max = last
            self.play.interval = max(20, round(1000 * FILM_SECONDS / last))
            self.step.value = self.play.value = min(step, last)
        self._filling = False

    @in_turn
    def certify(self) -> None:
        """Start votes, certificate and the attack on the smoothed vote of each classifier."""
        voters = [control.value for control in self.voters[: len(self.scene.lanes)]]
        self.start("certifying", self.scene.certify(self.smoothing.value, self.votes.value, voters))

    # -- what is folded -----------------------------------------------------------------------------------------------

    @in_turn
    def _opened(self) -> None:
        """Fill a tab when it is opened."""
        title = self.tabs.titles[self.tabs.selected_index]
        if title == "Share":
            self._keep()
        if title == "Audit":
            self._show_audit()
        if title == "All pictures" and self.of_record.value == NONE:
            name = f"{self.first.value}-linf"
            listed = self.of_record.options
            self.of_record.value = name if name in listed else listed[-1]

    def _keep(self) -> None:
        state = self.state()
        found = keeping.record(self.scene, state)
        document = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False)
        data = base64.b64encode(document.encode()).decode()
        self.kept.value = state.as_json()
        # alone, the page's own address; in a notebook, where the command serves it
        alone = os.environ.get("SERVER_SOFTWARE", "").startswith("voila")
        here = "" if alone else f"http://127.0.0.1:{PORT}/"
        self.files.value = (
            f'<a style="text-decoration: underline" download="explorer-record.json" href="data:application/json;base64,{data}">Save the record</a> '
            "(pictures, perturbations, votes: all that was found)<br>"
            f'<a style="text-decoration: underline" href="{here}?state={state.as_link()}" target="_blank">Link</a> that opens all this in '
            "<code>diffclass explore</code>, wherever that runs. The frame in the figure's corner shows it on the whole "
            "screen; the arrow beside it saves it as a picture."
        )

    def _show_audit(self, chosen: int | None = None) -> None:
        panels = []
        said = []
        for lane in self.scene.lanes:
            path = assets.folder() / "records" / "audits" / f"{self.scene.world}-{lane.name}.json"
            if path.is_file():
                stored = json.loads(path.read_text())
                panels.append(lamps_of(stored, lane.title))
                if chosen is not None:
                    said.append(f"{lane.title}: {evidence_of(stored, chosen)}")
            else:
                said.append(
                    f"No audit of {lane.title} is stored; run <code>diffclass audit {lane.name} --world "
                    f"{self.scene.world}</code>."
                )
        if panels and chosen is None:
            said.append("Click a lamp to see what it measured; notebook 09 says what each asks.")
        self.audit.frame = figures.frame([[panel] for panel in panels], " ".join(said))

    @in_turn
    def _lamp(self, change) -> None:
        """Say what the lamp that was clicked measured."""
        if change["new"] >= 0:
            self._show_audit(change["new"])
            self.audit.picked = -1  # so that the same lamp can be clicked again

    @in_turn
    def _show_record(self) -> None:
        """Draw a record's pictures as dots that can be clicked."""
        name = self.of_record.value
        self.dots.layout.height = 380 if name != NONE else 10
        if name == NONE:
            return
        shown = overview.read(name, overview.stored(self.scene.world)[name])
        drawn = plots.dots(shown.dots, shown.said)
        with self.dots.batch_update():
            for trace, new in zip(self.dots.data, drawn.data, strict=True):
                trace.update(new.to_plotly_json(), overwrite=True)
            self.dots.layout.update(drawn.layout)
        for trace in self.dots.data:
            trace.on_click(
                lambda trace, points, _: self._picked(shown, trace, points), append=False
            )

    @in_turn
    def _picked(self, shown: overview.Overview, trace, points) -> None:
        """Open the picture of a dot, with the change that the record stores of it."""
        if not points.point_inds:
            return
        index = int(trace.customdata[points.point_inds[0]])
        self.halt()
        state = replace(
            self.state(),
            picture=index,
            classifiers=(shown.classifier,),
            norm="L∞" if shown.norm == "linf" else "L2",
            budget=shown.epsilon,
            step=1,
        )
        self.start("opening the picture", self._open_dot(state, shown, index))

    def _open_dot(self, state: State, shown: overview.Overview, index: int) -> Job:
        yield from self._open(state, film=False)
        lane = self.scene.lanes[0]
        keeping.show_stored(self.scene, lane, shown.delta(index), shown.epsilon, state.norm)
        self._follow()
        yield 1.0


def app() -> Explorer:
    """The explorer of `diffclass explore`: in the state that the address asks for, where it does."""
    explorer = Explorer()
    asked = parse_qs(os.environ.get("QUERY_STRING", "")).get("state")
    if asked:
        explorer.restore(asked[0])
    return explorer
