"""The explorer: one picture, one or two classifiers beside each other, what an attack does to them, and what votes prove.

Two functions of every classifier are shown and never confused: the plain one, which is attacked and never certified, and
the smoothed one, the vote on noised copies, which has a certificate and an attack of its own.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffclass import attacks, units
from diffclass.attacks.search import AttackStep
from diffclass.certify import certificates
from diffclass.certify.certificates import Votes
from diffclass.classifiers.base import Classifier, Noise, decided
from diffclass.classifiers.smoothed import Smoothed
from diffclass.course import figures
from diffclass.course.figures import BEST, COLOURS, OTHER, SECOND, WRONG
from diffclass.course.scenes import insides
from diffclass.course.scenes.certifying import attack_votes
from diffclass.course.scenes.digits import class_lines
from diffclass.course.scenes.insides import Look, Made
from diffclass.course.scenes.photos import SHORT
from diffclass.course.scenes.results import DONE, RUNNING, AttackFilm, Result, recorded
from diffclass.data import cifar
from diffclass.data.pictures import Familiarity, distance_report
from diffclass.data.worlds import images_of, world_of
from diffclass.noise import generator_of, seed_of
from diffclass.zoo import attacks as attack_zoo
from diffclass.zoo import classifiers, networks, noised

WORLDS = {"digits": "handwritten digits", "cifar10": "photographs"}
NORMS = {"L∞": "linf", "L2": "l2"}
# The largest budget that a norm's slider offers: three times what the world is attacked with in records.
WIDEST = 3.0
LOSSES = {
    "margin": attacks.margin_loss,
    "cross-entropy": attacks.cross_entropy_loss,
    "DLR": attacks.dlr_loss,
}
METHODS = {
    "PGD, margin": ("pgd", "margin"),
    "PGD, cross-entropy": ("pgd", "cross-entropy"),
    "PGD, DLR": ("pgd", "DLR"),
    "APGD, margin": ("apgd", "margin"),
    "FGSM, margin": ("fgsm", "margin"),
    "Square, no gradient": ("square", "margin"),
}
EACH = "each by itself"
LEFT = "the first, shown on both"
RIGHT = "the second, shown on both"
WHO = (EACH, LEFT, RIGHT)
SAME = "the classifier itself"
DRAWN = "Generated picture"
DRAWN_WHY = (
    "CIFAR-10 is not here, so these are pictures that our own denoiser drew; <code>diffclass download cifar10</code> "
    "fetches the photographs."
)
ALPHA = 0.001
SELECTION = 100  # votes that choose the class to certify
CHECK_VOTES = 200  # votes that decide whether a perturbed point has changed the smoothed prediction
TOGETHER = {"digits": 50, "cifar10": 10}  # votes between two signs of life, at most
CALLS_TOGETHER = {"digits": 450, "cifar10": 20}  # and network calls: Stop waits for them
PHOTOGRAPHS = 512  # test pictures of CIFAR-10 that can be chosen
# Network calls of one answer, at most, for a classifier to be shown live: about five seconds on two cores.
MOST_CALLS = {"digits": 400, "cifar10": 40}
QUICK = 0.12  # seconds: what takes longer is asked as a job
MOVING = 0.01  # seconds of answers that a slider which moves can wait for
# Which classifier of noised pictures is nearest to a classifier of clean ones; others vote themselves.
RELATIVES = {
    "digits": {
        "dc": "epndc",
        "contrastive": "epndc",
        "adversarial-dc": "epndc",
        "one-call": "one-call-noised",
        "cnn": "denoised-cnn",
    },
    "cifar10": {
        "dc": "nearest-head",
        "contrastive": "nearest-head",
        "adversarial-dc": "nearest-head",
        "one-call": "one-call-noised",
        "cnn": "denoised-cnn",
    },
}


@dataclass(frozen=True)
class Asked:
    """What an attack is asked to do: a budget in a norm (pixels), a method of METHODS, steps, and through whom (WHO)."""

    norm: str
    budget: float
    method: str
    steps: int
    who: str = EACH

    def __str__(self) -> str:
        steps = _steps_of(self)
        words = "1 step" if steps == 1 else f"{steps} steps"
        return f"{self.method}, {self.norm} within {self.budget:.3g}, {words}"


@dataclass(frozen=True, eq=False)
class Subject:
    """The picture that is asked about.

    Shapes      x [1,C,H,W] in [0,1]; label None where nobody knows it; index None for a picture of the reader's own
    """

    x: Tensor
    title: str
    label: int | None = None
    index: int | None = None
    warning: str = ""


@dataclass(eq=False, kw_only=True)
class Film(AttackFilm):
    """An attack, as one classifier sees its pictures; `through` names the classifier that was climbed."""

    asked: Asked
    through: str


@dataclass(eq=False, kw_only=True)
class Certified(Result):
    """What `certify` has reached for one classifier at one sigma and at most `n` votes.

    `certificate` may be read at every look; None before the first. `smallest` is the L2 length of the shortest change of
    the smoothed vote so far, None while there is none; `done` counts votes, those that chose the class included
    Units       sigma_pixel and smallest in pixels of [0,1]
    """

    voter: str
    sigma_pixel: float
    n: int
    done: int = 0
    certificate: certificates.Certificate | None = None
    smallest: float | None = None
    searching: bool = False

    def __str__(self) -> str:
        return f"{self.voter}, σ {self.sigma_pixel:.2f}, n {self.n}"


@dataclass(eq=False)
class Nearest:
    """The shortest change that fools a classifier on one picture, over all attacks so far. Units: L2, pixels."""

    size: float | None = None
    attack: str = ""

    def offer(self, size: float, attack: str) -> None:
        """Keep a fooling change if it is the shortest so far."""
        if self.size is None or size < self.size:
            self.size = size
            self.attack = attack


class Lane:
    """One classifier, with its noise held, and what is known of it for the present picture.

    spent       network calls on this picture so far, without those backwards
    seconds     what its last answer took
    """

    def __init__(self, world: str, name: str, seed: int):
        entry = classifiers.entry_of(world, name)
        self.world = world
        self.name = entry.name
        self.title = entry.title
        self.classifier: Classifier = classifiers.classifier(world, entry.name)
        self.seconds: float | None = None
        self.refresh(seed)
        self.forget()

    def refresh(self, seed: int) -> None:
        """Draw another noise; what was found under the last one is asked again where it is shown."""
        self.noise: Noise = self.classifier.sample_noise(1, generator_of(seed, "explorer"))
        self._looks: dict[object, Look] = {}
        self._made: dict[object, Made | str] = {}
        self._glances: dict[float, tuple[Look, Made] | None] = {}

    def forget(self) -> None:
        """Put away what is known of the last picture."""
        self._looks.clear()
        self._made.clear()
        self._glances.clear()
        self.film: Film | None = None
        self.certified: Certified | None = None
        self.nearest = Nearest()
        self.spent = 0

    def known(self, place: object) -> bool:
        """Whether the answer about a place (None: the clean picture, else (film, step)) was given before."""
        return place in self._looks

    @torch.no_grad()
    def look(self, place: object, x: Tensor) -> Look:
        """The answer about a picture, asked once for each place."""
        if place not in self._looks:
            begun = time.perf_counter()
            self._looks[place] = insides.look(self.classifier, x, self.noise)
            self.seconds = time.perf_counter() - begun
            self.spent += self._looks[place].calls
        return self._looks[place]

    @torch.no_grad()
    def made(self, place: object, x: Tensor, sigma: float, names: Sequence[str]) -> Made | str:
        """The pictures that the classifier makes of a picture, made once for each place and level."""
        key = (place, sigma)
        if key not in self._made:
            if len(self._made) > 200:  # a slider that is dragged for long
                self._made.clear()
            made = insides.made(self.classifier, x, self.noise, sigma, names)
            self.spent += 0 if isinstance(made, str) else made.calls
            self._made[key] = made
        return self._made[key]

    @torch.no_grad()
    def glance(self, x: Tensor, sigma: float, names: Sequence[str]) -> tuple[Look, Made] | None:
        """A lesser answer about the clean picture, and what it makes of it, kept until the whole one is asked for."""
        if sigma not in self._glances:
            seen = insides.glance(self.classifier, x, self.noise, sigma, names)
            self.spent += 0 if seen is None else seen[0].calls
            self._glances[sigma] = seen
        return self._glances[sigma]

    def show(self, film: Film) -> None:
        """Let a new film take the last one's place."""
        self.film = film

    @property
    def random(self) -> bool:
        """Whether its answer depends on noise."""
        return not self.classifier.deterministic


def available(world: str) -> dict[str, str]:
    """The classifiers that can be asked here, name -> title: those whose weights are there."""
    return {
        name: classifiers.entry_of(world, name).title
        for name in classifiers.names(world)
        if missing(world, name) is None
    }


def missing(world: str, name: str) -> str | None:
    """Why a classifier cannot be asked here, or None where it can."""
    entry = classifiers.entry_of(world, name)
    for file in entry.weights(world_of(world).kind).values():
        if not networks.is_present(file):
            return f"{entry.title} has no weights here; train them with `{networks.command_for(file)}`."
    return None


def pictures_of(world: str) -> tuple[Tensor, Tensor, str]:
    """What can be chosen in a world: pictures, labels, and what they are; the gallery where CIFAR-10 is absent."""
    if world == "digits":
        images, labels = images_of("digits", "test")
        return images, labels, "Test digit"
    if cifar.cifar10_available()[0]:
        images, labels = cifar.cifar10("test", PHOTOGRAPHS)
        return images, labels, "Test picture"
    images, labels = world_of("gallery").test()
    return images, labels, DRAWN


class ExplorerScene:
    """The state of the explorer: a picture, one or two classifiers, their films, votes, and shortest changes so far.

    Jobs (`ask`, `attack`, `certify`) are iterators: each item is the share of work done; a widget can show and stop them.
    Each fills a result that knows its settings, which takes the last one's place; a job that is stopped or replaced no
    longer touches what is shown.
    Randomness  classifiers' noise is held, from `seed`; votes, the attack on them and its judge draw from `seed`, each for
                its own purpose: the same controls give the same numbers
    """

    def __init__(
        self, world: str = "digits", names: Sequence[str] = ("dc",), index: int = 4, seed: int = 0
    ):
        self.world = units.chosen(world, tuple(WORLDS), "the explorer's world")
        self.place = world_of(self.world)
        self.class_names = self.place.class_names
        self.images, self.labels, self.kind = pictures_of(self.world)
        self.seed = seed
        self._kept: dict[str, Lane] = {}
        self.lanes: list[Lane] = []
        self.choose(index)
        self.compare(names)

    # -- what is shown ------------------------------------------------------------------------------------------------

    def choose(self, index: int) -> None:
        """Take another picture of the world; what was found on the last one is put away."""
        index = units.check_whole(index, "a picture", least=0, most=len(self.images) - 1)
        label = int(self.labels[index])
        title = f"{self.kind} {index}: {self.class_names[label]}"
        drawn = "" if self.kind != DRAWN else DRAWN_WHY
        self._take(
            Subject(self.images[index : index + 1], title, label, index=index, warning=drawn)
        )

    def bring(self, x: Tensor) -> None:
        """Take a picture of the reader's own, with a warning where it is unlike what networks were trained on.

        Shapes      [1,C,H,W] in [0,1]
        """
        units.check_images(x, self.place.image_shape)
        if len(x) != 1:
            raise ValueError(f"expected one picture, got {len(x)}.")
        if float(x.max() - x.min()) < 0.02:
            raise ValueError(
                "expected a picture with something in it, got one of a single shade; is the drawing empty?"
            )
        far = self._familiarity(x)
        warning = ""
        if far is not None and far.far:
            warning = (
                f"<b>Mind:</b> the nearest training image is {far.distance:.2f} away (L2, pixels), farther than nearly all of "
                "them are from each other: it is unlike the training data, so its scores mean little."
            )
        self._take(Subject(x, "Your picture", warning=warning))

    def _familiarity(self, x: Tensor) -> Familiarity | None:
        if self.world != "digits":  # 50 000 photographs would be read for one sentence
            return None
        return distance_report(x, images_of("digits", "train")[0])

    def _take(self, subject: Subject) -> None:
        self.subject = subject
        for lane in self._kept.values():
            lane.forget()

    def compare(self, names: Sequence[str]) -> None:
        """Show these classifiers, one or two, the first one first. Errors: those of `zoo.classifiers.classifier`."""
        if len(names) not in (1, 2):
            raise ValueError(f"expected one or two classifiers, got {len(names)}.")
        lanes = []
        for name in dict.fromkeys(names):  # the same one twice is one
            if name not in self._kept:
                self._kept[name] = self._lane(name)
            lanes.append(self._kept[name])
        self.lanes = lanes

    def _lane(self, name: str) -> Lane:
        lane = Lane(self.world, name, self.seed)
        calls = lane.classifier.calls
        if calls > MOST_CALLS[self.world]:
            raise ValueError(
                f"expected a classifier that can be asked live, of at most {MOST_CALLS[self.world]} network calls an answer "
                f"on {WORLDS[self.world]}, got {lane.title} with {calls}; its records are under All pictures and in "
                "notebook 14."
            )
        return lane

    def refresh(self, seed: int) -> None:
        """Hold another noise. Films and certificates stay: their pictures are asked about again."""
        self.seed = units.check_whole(seed, "a seed", least=0, most=None)
        for lane in self._kept.values():
            lane.refresh(self.seed)

    def predicted(self, lane: Lane) -> int:
        """What a classifier says about the clean picture."""
        return int(decided(lane.look(None, self.subject.x).logits[None]))

    def quick(self, step: int) -> bool:
        """Whether every answer that a step needs is known, or fast enough to be asked while a slider moves."""
        return all(self._quick(lane, step) for lane in self.lanes)

    def _quick(self, lane: Lane, step: int) -> bool:
        known = lane.known(self._place(lane, step))
        return known or (lane.seconds is not None and lane.seconds < QUICK)

    def heavy(self, step: int) -> bool:
        """Whether the answers that a step still needs take longer than a slider that moves can wait for."""
        waiting = [lane for lane in self.lanes if not lane.known(self._place(lane, step))]
        return sum(lane.seconds or 0.0 for lane in waiting) > MOVING

    def _place(self, lane: Lane, step: int) -> tuple[Film, int] | None:
        """Which answer a step needs: that about the clean picture (None), or about a picture of the film."""
        film = lane.film
        if film is None or not film.frames:
            return None
        number = max(0, min(step, len(film.frames) - 1))
        return None if film.frames[number].x is self.subject.x else (film, number)

    def _picture(self, lane: Lane, step: int) -> Tensor:
        place = self._place(lane, step)
        return self.subject.x if place is None else place[0].frames[place[1]].x

    @property
    def last(self) -> int:
        """The last step of the films that are shown; 0 without one."""
        return max((len(lane.film.frames) - 1 for lane in self.lanes if lane.film), default=0)

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def ask(self, step: int) -> Iterator[float]:
        """Ask every classifier that has not answered yet about the step that is shown."""
        for done, lane in enumerate(self.lanes):
            yield done / len(self.lanes)
            lane.look(None, self.subject.x)
            lane.look(self._place(lane, step), self._picture(lane, step))
        yield 1.0

    def attack(self, asked: Asked) -> Iterator[float]:
        """Attack each classifier, or one and show the pictures on both; keeps the shortest fooling changes.

        Meaning     the aim is to change what the climbed classifier says of the clean picture
        """
        if asked.who == EACH:
            groups = [(lane, [lane]) for lane in self.lanes]
        else:
            climbed = self.lanes[0] if asked.who == LEFT else self.lanes[-1]
            groups = [(climbed, list(self.lanes))]
        jobs = [self._shoot(climbed, shown, asked) for climbed, shown in groups]
        shares = [0.0] * len(jobs)
        running = dict(enumerate(jobs))
        try:
            while running:  # in turn, so that both films grow together
                for number in list(running):
                    try:
                        shares[number] = next(running[number])
                    except StopIteration:
                        del running[number]
                        shares[number] = 1.0
                    yield sum(shares) / len(shares)
        finally:
            for job in jobs:
                job.close()

    def _shoot(self, climbed: Lane, shown: Sequence[Lane], asked: Asked) -> Iterator[float]:
        x = self.subject.x
        y = torch.tensor([self.predicted(climbed)])
        films = [Film(steps=_steps_of(asked), asked=asked, through=climbed.name) for _ in shown]
        with contextlib.ExitStack() as stack:
            for film in films:
                stack.enter_context(recorded(film))
            last = x
            # What is said of the clean picture is known, so the film begins before the first gradient, which takes up to
            # a second on a photograph. A random search begins elsewhere.
            known = not attack_zoo.attack(METHODS[asked.method][0]).random
            if known:
                self._append(shown, films, 0, x, torch.zeros(1))
                yield 0.0
            for number, frame in enumerate(self._frames(climbed, x, y, asked)):
                last = frame.x
                if number > 0 or not known:
                    self._append(shown, films, number, frame.x, frame.size)
                climbed.spent += climbed.classifier.calls
                yield (number + 1) / (films[0].steps + 2)
            yield from self._shrink(shown, films, x, last)

    def _frames(self, lane: Lane, x: Tensor, y: Tensor, asked: Asked) -> Iterator[AttackStep]:
        """The frames of a method of the registry on what can be climbed of a classifier, its noise held."""
        name, loss = METHODS[asked.method]
        entry = attack_zoo.attack(name)
        classifier = lane.classifier
        target = classifier.gradients().get("exact") or classifier.surrogate()
        options = dict(noise=lane.noise, norm=NORMS[asked.norm], loss=LOSSES[loss])
        if entry.steps is None:
            options["steps"] = asked.steps
        if entry.random:
            options["generator"] = generator_of(self.seed, "attack")
        return entry.run(target, x, y, asked.budget, **options)

    def _append(
        self, shown: Sequence[Lane], films: Sequence[Film], number: int, x: Tensor, size: Tensor
    ) -> None:
        for lane, film in zip(shown, films, strict=True):
            self.add(lane, film, number, x, size)
            if number == 0:
                lane.show(film)

    def add(self, lane: Lane, film: Film, number: int, x: Tensor, size: Tensor) -> None:
        """Add a picture to a film, as a classifier itself sees it: what is attacked is what predicts.

        Shapes      x [1,C,H,W]; size [1], in the norm of the film
        """
        place = None if x is self.subject.x else (film, number)
        logits = lane.look(place, x).logits[None]
        fooled = decided(logits) != self.predicted(lane)
        film.frames.append(AttackStep(number, x, logits, fooled, size))
        if bool(fooled):
            length = float(attacks.size_of(x - self.subject.x, "l2"))
            lane.nearest.offer(length, str(film.asked))

    def _shrink(
        self, shown: Sequence[Lane], films: Sequence[Film], x: Tensor, last: Tensor
    ) -> Iterator[float]:
        """Bisect from the last picture towards the clean one, for every classifier that it fools."""
        for lane, film in zip(shown, films, strict=True):
            first = self.predicted(lane)

            def fools(image: Tensor, lane: Lane = lane, first: int = first) -> bool:
                lane.spent += lane.classifier.calls
                with torch.no_grad():
                    return int(decided(lane.classifier(image, lane.noise))) != first

            for closest in attacks.shrink(fools, x, last):
                if closest is not None:
                    lane.nearest.offer(float(attacks.size_of(closest - x, "l2")), str(film.asked))
                yield 1.0

    def voter_of(self, lane: Lane) -> str:
        """Which classifier of noised pictures votes for a classifier where nobody says another: its nearest relative."""
        return RELATIVES[self.world].get(lane.name, SAME)

    def certify(self, sigma_pixel: float, n: int, voters: Sequence[str]) -> Iterator[float]:
        """Votes and a certificate that may be read at every look, for each classifier; then an attack on the same votes.

        Shapes      voters: for each classifier SAME, or a name of `zoo.noised`
        """
        results = []
        for lane, voter in zip(self.lanes, voters, strict=True):
            named = lane.name if voter == SAME else voter
            lane.certified = Certified(voter=named, sigma_pixel=sigma_pixel, n=n)
            results.append(lane.certified)
        parts = 2 * len(results)
        for number, (lane, result) in enumerate(zip(list(self.lanes), results, strict=True)):
            with recorded(result):
                base = noised.classifier(self.world, result.voter, sigma_pixel)
                smoothed = Smoothed(base, None if base.sigma_pixel else sigma_pixel)
                for share in self._vote(lane, result, smoothed):
                    yield (2 * number + share) / parts
                if result.certificate.prediction is not None:
                    result.searching = True
                    for share in self._attack_votes(result, smoothed):
                        yield (2 * number + 1 + share) / parts
        yield 1.0

    def _vote(self, lane: Lane, result: Certified, smoothed: Smoothed) -> Iterator[float]:
        x = self.subject.x
        picture = self.subject.index or 0
        calls = smoothed.mean.base.calls
        together = min(TOGETHER[self.world], max(1, CALLS_TOGETHER[self.world] // calls))
        seeds = [seed_of(self.seed, purpose, picture) for purpose in ("selection", "estimation")]
        for selected in smoothed.count(x, seeds[0], SELECTION, together=together):
            result.done = int(selected.sum())
            lane.spent += together * calls
            yield result.done / (SELECTION + result.n)
        for counts in smoothed.count(x, seeds[1], result.n, together=together):
            result.done = SELECTION + int(counts.sum())
            lane.spent += together * calls
            votes = Votes(
                tuple(selected.tolist()),
                tuple(counts.tolist()),
                smoothed.sigma,
                self.seed,
                stopped=True,
            )
            result.certificate = certificates.smoothing_radius(votes, ALPHA, "anytime")
            yield result.done / (SELECTION + result.n)

    def _attack_votes(self, result: Certified, smoothed: Smoothed) -> Iterator[float]:
        """The shortest change of the smoothed prediction, kept as it shrinks."""
        search = attack_votes(
            smoothed,
            self.subject.x,
            result.certificate.prediction,
            alpha=ALPHA,
            votes=CHECK_VOTES,
            seed=self.seed,
            picture=self.subject.index or 0,
        )
        for done, length in search:
            if length is not None:
                result.smallest = length
            yield done

    # -- the frame ----------------------------------------------------------------------------------------------------

    def at(
        self,
        step: int,
        sigma: float,
        asked: Asked,
        sigma_pixel: float,
        n: int,
        moving: bool = False,
    ) -> dict:
        """What is shown: a row for each classifier from picture to posterior, the films, and how far the answers hold.

        The other arguments are what the controls ask for now: the note says where a result is that of other settings.
        While the picture is `moving`, a classifier that has not answered yet gives its lesser answer, if it has one
        """
        glances = [self._glance(lane, step, sigma) if moving else None for lane in self.lanes]
        both = list(zip(self.lanes, glances, strict=True))
        rows = [self._row(lane, step, sigma, glance) for lane, glance in both]
        ending = [self._films(step), self._axis(sigma_pixel, n)]
        notes = [self.subject.warning]
        notes += [self._said(lane, step, asked, sigma_pixel, n, glance) for lane, glance in both]
        return figures.frame([*rows, ending], "<br>".join(note for note in notes if note))

    def _glance(self, lane: Lane, step: int, sigma: float) -> tuple[Look, Made] | None:
        """The lesser answer of a classifier that has none about the clean picture, which is the one that moves."""
        if self._place(lane, step) is not None or lane.known(None):
            return None
        return lane.glance(self.subject.x, sigma, self.class_names)

    def _row(
        self, lane: Lane, step: int, sigma: float, glance: tuple[Look, Made] | None
    ) -> list[dict]:
        place = self._place(lane, step)
        x = self._picture(lane, step)
        if glance is not None:
            seen, made = glance
            return self._answered(lane, step, sigma, seen, seen, made)
        if not lane.known(None) and not lane.known(place) and lane.seconds is None:
            lane.look(None, self.subject.x)
        if not (lane.known(None) and lane.known(place)) and not self._quick(lane, step):
            words = f"{lane.title} is being asked; its last answer took {lane.seconds:.1f} s."
            return [
                self._tiles(lane, step, x, None),
                figures.words(words, title=lane.title, w=860, h=190),
            ]
        clean = lane.look(None, self.subject.x)
        now = lane.look(place, x)
        made = lane.made(place, x, sigma, self.class_names)
        return self._answered(lane, step, sigma, clean, now, made)

    def _answered(
        self, lane: Lane, step: int, sigma: float, clean: Look, now: Look, made: Made | str
    ) -> list[dict]:
        """The panels of a classifier's answers about the clean picture and the present one."""
        x = self._picture(lane, step)
        colours = self._colours(clean, now)
        if isinstance(made, str) and now.lines is None:
            words = f"{lane.title} {made}."
            inside = [figures.words(words, title="Between picture and answer", w=640, h=190)]
        else:
            inside = [
                self._made(lane, made, colours),
                self._lines(lane, clean, now, colours, sigma),
            ]
        return [
            self._tiles(lane, step, x, now),
            *inside,
            self._posterior(lane, clean, now, colours),
        ]

    def _colours(self, clean: Look, now: Look) -> list[str]:
        """Best blue and runner-up orange; where the answer has changed, the new one red and the old one blue."""
        best = int(decided(now.logits[None]))
        first = int(decided(clean.logits[None]))
        colours = figures.emphasis(now.logits)
        if best != first:
            colours = [OTHER] * len(colours)
            colours[best] = WRONG
            colours[first] = BEST
        return colours

    def _tiles(self, lane: Lane, step: int, x: Tensor, now: Look | None) -> dict:
        delta = x - self.subject.x
        size = float(attacks.size_of(delta, "l2"))
        shown = 0.5 + delta[0] * min(10.0, 0.5 / max(float(delta.abs().max()), 1e-6))
        place = self._place(lane, step)
        said = "asked …"
        border = None
        if now is not None:
            best = int(decided(now.logits[None]))
            said = self.class_names[best]
            if lane.known(None) and best != self.predicted(lane):
                border = WRONG
        at = "clean" if place is None else f"step {place[1]}"
        images = [x[0], shown]
        captions = [f"{at}\n{said}", f"L2 {size:.2f}"]
        borders = [border, None]
        if now is not None and now.seen is not None:
            images.insert(1, now.seen[0])
            captions.insert(1, "purified")
            borders.insert(1, None)
        return figures.tiles(
            images,
            columns=1,
            size=78 if len(images) == 2 else 62,
            title=lane.name if len(self.lanes) > 1 else self.subject.title,
            captions=captions,
            borders=borders,
            alt=f"{self.subject.title}, {at}, for {lane.title}: it says {said}. The change has L2 length {size:.2f}.",
        )

    def _made(self, lane: Lane, made: Made | str, colours: list[str]) -> dict:
        if isinstance(made, str):
            return figures.words(f"{lane.title} {made}.", title="Pictures", w=300, h=190)
        return figures.tiles(
            made.images,
            columns=5,
            size=58,
            low=made.low,
            high=1.0,
            title=made.title,
            captions=made.captions,
            borders=[None if colour == OTHER else colour for colour in colours],
            alt=f"{made.title}: {', '.join(' '.join(c.split()) for c in made.captions)}.",
        )

    def _lines(self, lane: Lane, clean: Look, now: Look, colours: list[str], sigma: float) -> dict:
        """Excess over the best class of the clean picture, which keeps the scale; its own lines stay as ghosts."""
        lines = now.lines
        size = dict(w=350 if self.world == "digits" else 280, h=210)
        if lines is None:
            return figures.words(f"{lane.title} {now.why}.", title="Losses", **size)
        before = clean.lines.values
        if lines.values.shape[1] == 1:  # one place: nothing to draw a line through
            return figures.bars(
                self.class_names,
                lines.values[:, 0],
                colours=colours,
                marks=before[:, 0],
                range=(0.0, 1.15 * float(torch.maximum(before, lines.values).max())),
                title=lines.title,
                texts=[""] * len(colours),
                xlabel="class (line: clean picture)",
                alt=f"{lines.title}; the smallest is {self.class_names[int(lines.values[:, 0].argmin())]}.",
                **size,
            )
        best = int(decided(now.logits[None]))
        first = int(decided(clean.logits[None]))
        excess = lines.values - lines.values[best] if lines.log else lines.values
        ghost = before - before[first] if lines.log else before
        series = []
        if now is not clean:  # of the classes that the eye follows, what they were before
            series = [
                dict(y=row, colour=colour, dash="3 3", width=1.5, opacity=0.7)
                for row, colour in zip(ghost, colours, strict=True)
                if colour != OTHER
            ]
        series += class_lines(excess, colours, self.class_names, filled=SECOND)
        low = min(0.0, float(ghost.min()))
        high = 1.1 * max(float(ghost.max()), self._highest(lane, lines.log)) + 1e-6
        return figures.curves(
            lines.places,
            series,
            title=lines.title,
            xlabel=lines.xlabel,
            ylabel=lines.ylabel,
            xlog=lines.log,
            yrange=(min(low, -0.25 * high) if now is not clean and lines.log else low, high),
            cursor=min(max(sigma, float(lines.places[0])), float(lines.places[-1]))
            if lines.log
            else None,
            alt=f"{lines.title} for every class; the best is {self.class_names[best]}."
            + (" Dashed: those of the clean picture." if now is not clean else ""),
            **size,
        )

    def _highest(self, lane: Lane, excess: bool) -> float:
        """The highest line on the last picture of a film, so that the scale stays the same all through it."""
        if lane.film is None or not lane.film.frames:
            return 0.0
        last = len(lane.film.frames) - 1
        place = (lane.film, last)
        if not lane.known(place):
            return 0.0
        look = lane.look(place, lane.film.frames[last].x)
        values = look.lines.values
        if excess:
            values = values - values[int(decided(look.logits[None]))]
        return float(values.max())

    def _posterior(self, lane: Lane, clean: Look, now: Look, colours: list[str]) -> dict:
        title, share = shares(lane.classifier, now.logits)
        _, before = shares(lane.classifier, clean.logits)
        best = int(decided(now.logits[None]))
        return figures.bars(
            self.class_names if self.world == "digits" else SHORT,
            share,
            colours=colours,
            title=title,
            marks=None if now is clean else before,
            texts=[f"{float(p):.2f}" if p >= 0.005 else "" for p in share],
            xlabel="class" if now is clean else "class (line: clean picture)",
            w=270 if self.world == "digits" else 360,
            h=210,
            alt=f"{title} by {lane.title}; the largest is {self.class_names[best]} with {float(share[best]):.2f}.",
        )

    def _films(self, step: int) -> dict:
        shown = [lane for lane in self.lanes if lane.film is not None and lane.film.frames]
        size = dict(w=400, h=70 + 44 * 2 * len(self.lanes))
        if not shown:
            words = (
                "Press Attack: the picture is changed within the budget, step by step, until the answer changes or the "
                "steps are used up. The film can then be played and dragged."
            )
            return figures.words(words, title="Lead of the first answer", **size)
        series = []
        for number, lane in enumerate(shown):
            y = torch.tensor([self.predicted(lane)])
            frames = lane.film.frames if len(lane.film.frames) > 1 else lane.film.frames * 2
            leads = [-float(attacks.margin_loss(frame.logits, y)) for frame in frames]
            most = max(map(abs, leads)) or 1.0  # scales differ, from shares to thousands of nats
            series.append(
                dict(
                    x=[float(i) for i in range(len(frames))],
                    y=[lead / most for lead in leads],
                    colour=(BEST, COLOURS[3])[number],
                    label=f"{lane.title} (1 = {_number(most)} {lane.classifier.scale})",
                    width=2.2,
                )
            )
        last = max(2, *(lane.film.steps + 1 for lane in shown)) - 1
        grid = [0.0, float(last)]
        series.append(dict(y=[0.0, 0.0], colour=WRONG, dash="3 3"))
        return figures.curves(
            grid,
            series,
            title="Lead of the first answer; below 0 it has changed",
            xlabel=f"step of the attack ({shown[0].film.asked.method}; drag the slider)",
            ylabel="lead",
            xrange=(0.0, float(last)),
            yrange=(-1.1, 1.25),
            alt="; ".join(f"{lane.title}: {lane.film.outcome}" for lane in shown) + ".",
            **size,
        )

    def _axis(self, sigma_pixel: float, n: int) -> dict:
        """Two rows for each classifier: the plain one and its votes, at the certificate's own sigma and n."""
        rows = []
        spoken = []
        ends = []
        ceilings = []
        for lane in self.lanes:
            certified = lane.certified
            radius = 0.0
            voter = self.voter_of(lane)
            voter = lane.name if voter == SAME else voter
            sigma = sigma_pixel
            votes = n
            smallest = None
            words = "no certificate yet"
            if certified is not None:
                voter = certified.voter
                sigma = certified.sigma_pixel
                votes = certified.n
                smallest = certified.smallest
                words = _certified_in_words(certified)
                if certified.certificate is not None:
                    radius = certified.certificate.radius
            rows.append(dict(label=lane.name, certified=0.0, attacked=lane.nearest.size))
            rows.append(dict(label=f"votes, {voter}", certified=radius, attacked=smallest))
            spoken.append(f"{lane.title}: never certified, {_attacked_in_words(lane.nearest.size)}")
            spoken.append(f"its votes: {words}, {_attacked_in_words(smallest)}")
            ceiling = certificates.largest_radius(votes, sigma, ALPHA, "anytime")
            ends += [lane.nearest.size, smallest, radius, ceiling]
            ceilings.append(f"{ceiling:.2f}")
        ceiling = " and ".join(dict.fromkeys(ceilings))
        return figures.radius_axis(
            rows,
            title="How far is the nearest picture that is classified differently?",
            xlabel=f"L2 length of a change (pixels); so many votes certify at most {ceiling}",
            range=(0.0, max(0.5, 1.15 * max(end for end in ends if end is not None))),
            w=620,
            alt="; ".join(spoken) + ".",
        )

    def _said(
        self,
        lane: Lane,
        step: int,
        asked: Asked,
        sigma_pixel: float,
        n: int,
        glance: tuple[Look, Made] | None,
    ) -> str:
        """What is known of a classifier, in words."""
        place = self._place(lane, step)
        if glance is not None:
            name = self.class_names[int(decided(glance[0].logits[None]))]
            return f"<b>{lane.title}</b> says <b>{name}</b> by one level alone; the others follow when the slider rests."
        if not (lane.known(None) and lane.known(place)):
            return f"<b>{lane.title}</b> is being asked."
        now = lane.look(place, self._picture(lane, step))
        best = int(decided(now.logits[None]))
        _, share = shares(lane.classifier, now.logits)
        first = self.predicted(lane)
        label = self.subject.label
        name = self.class_names[best]
        verdict = "" if label is None else (" (right)" if best == label else " (wrong)")
        lines = [f"<b>{lane.title}</b> says <b>{name}</b>{verdict}, {float(share[best]):.3f}"]
        if best != first:
            lines.append(f", first {self.class_names[first]}")
        lines.append(f". {lane.spent} network calls so far.")
        if lane.film is not None:
            through = "" if lane.film.through == lane.name else f" through {lane.film.through}"
            lines.append(f" Attack ({lane.film.asked}{through}): {lane.film.outcome}.")
            if lane.film.asked != asked:
                lines.append(f" <b>Press Attack</b> for {asked}.")
        if lane.nearest.size is not None:
            lines.append(f" Shortest fooling change so far: L2 {lane.nearest.size:.2f}.")
        certified = lane.certified
        if certified is not None:
            lines.append(
                f" Votes ({certified}): {_certificate_in_words(certified, self.class_names)}."
            )
            if (certified.sigma_pixel, certified.n) != (sigma_pixel, n):
                lines.append(f" <b>Press Certify</b> for σ {sigma_pixel:.2f}, n {n}.")
        return "".join(lines)


def shares(classifier: Classifier, logits: Tensor) -> tuple[str, Tensor]:
    """What a classifier's logits say of the classes, in shares that add up to 1, and what they are. Shapes: [K] -> [K]."""
    if classifier.scale == "votes":
        return "Votes", logits / logits.sum()
    title = "Posterior" if classifier.scale == "nats" else "Softmax of scores, no posterior"
    return title, logits.softmax(0)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _steps_of(asked: Asked) -> int:
    if asked.method not in METHODS:  # of a record
        return asked.steps
    steps = attack_zoo.attack(METHODS[asked.method][0]).steps
    return asked.steps if steps is None else steps


def _certificate_in_words(certified: Certified, names: Sequence[str]) -> str:
    if certified.certificate is None:
        cast = f"{certified.done} of {certified.n + SELECTION} cast"
        return cast if certified.ending == RUNNING else f"{certified.ending} after {cast}"
    counted = certified.certificate
    state = "" if certified.ending == DONE else f", {certified.ending}"
    if counted.prediction is None:
        return f"no majority is proven by {counted.n} votes, abstains{state}"
    words = (
        f"no change below {counted.radius:.3f} turns {names[counted.prediction]}, except with probability {ALPHA:g} "
        f"({counted.n} votes)"
    )
    if not certified.searching:
        return f"{words}{state}"
    if certified.smallest is None:
        return f"{words}; an attack on the votes found none{state}, which is no proof"
    return f"{words}; one of {certified.smallest:.2f} does{state}"


def _certified_in_words(certified: Certified) -> str:
    if certified.certificate is None:
        return "no certificate yet"
    if certified.certificate.prediction is None:
        return "abstained"
    return f"certified up to {certified.certificate.radius:.2f}"


def _attacked_in_words(length: float | None) -> str:
    return "no attack found" if length is None else f"smallest attack found: {length:.2f}"
