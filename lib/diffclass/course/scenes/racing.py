"""Frames of one digit whose classes are compared for fewer evaluations: who is left, on what evidence, at what bill."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from diffclass.classifiers import racing
from diffclass.classifiers.racing import Answer, Question
from diffclass.course import figures
from diffclass.course.figures import BEST, OTHER, SECOND, WRONG
from diffclass.course.scenes.digits import DigitScene, class_lines, posterior_bars
from diffclass.zoo import networks

LEVELS = len(networks.DIGIT_LEVELS)
TOP = 60.0  # nats that the figure shows

RACE = "race with a guarantee"
ALPHA = 0.1  # its chance of losing the best class

STAGED = "staged elimination"
STAGES = (4, LEVELS)  # levels measured by the end of each stage
SURVIVORS = (4, 1)  # classes left after each stage

SIFT_AND_REFINE = "sift and refine"
SIFT = 5  # sifted levels
MOST = 3  # classes left to refine
THRESHOLD = 15.0  # nats behind the leader

NO_ELIMINATION = "no elimination"


@dataclass(frozen=True, eq=False)
class Moment:
    """What a strategy says after `bill` evaluations of a network that is asked class by class.

    Shapes      lead [K] in nats behind the best living class, frozen when a class leaves; alive [K]
    """

    bill: int
    lead: Tensor
    alive: Tensor
    answer: Answer


class RaceScene:
    """A test digit, a strategy, and how much of it has been paid for.

    Randomness  every run starts from the same seed; the pilot is measured once, on training digits
    """

    STRATEGIES = (RACE, STAGED, SIFT_AND_REFINE, NO_ELIMINATION)

    def __init__(self, digits: DigitScene, seed: int = 0):
        self.world = digits.world
        self.seed = seed
        self.question = Question(digits.denoiser, networks.DIGIT_LEVELS)
        self.whole = LEVELS * digits.denoiser.num_classes
        self.pilot = racing.pilot(
            self.question, self.world.train_images[:20], torch.Generator().manual_seed(seed)
        )
        self._films: dict[tuple, list[Moment]] = {}

    def run(self, index: int, strategy: str, scale: float) -> list[Moment]:
        """Every moment of a strategy on one test digit, measured once."""
        key = (index, strategy, scale if strategy == RACE else None)
        if key not in self._films:
            x = self.world.test_images[index : index + 1]
            history = racing.answer(self._answers(x, strategy, scale)).history
            self._films[key] = _moments(
                history, self.question.denoiser.one_call, strategy == SIFT_AND_REFINE
            )
        return self._films[key]

    def _answers(self, x: Tensor, strategy: str, scale: float) -> Iterator[Answer]:
        """What a strategy would say after every stretch of its work."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        if strategy == STAGED:
            return racing.staged(self.question, x, generator, STAGES, SURVIVORS)
        if strategy == SIFT_AND_REFINE:
            return racing.sift_and_refine(self.question, x, generator, THRESHOLD, SIFT, MOST)
        rule = nobody_is_out
        if strategy == RACE:
            rule = partial(racing.normal_mixture, alpha=ALPHA, scale=scale)
        denoiser = self.question.denoiser
        budget = LEVELS * denoiser.calls(denoiser.num_classes)
        return racing.race(self.question, x, generator, self.pilot.share, rule, budget)

    def at(self, index: int, strategy: str, scale: float, spent: float) -> dict:
        """The frame of one test digit under a strategy once `spent` evaluations have been paid for, class by class."""
        film = self.run(index, strategy, scale)
        paid = [moment for moment in film if moment.bill <= spent]
        now = paid[-1] if paid else film[0]
        label = int(self.world.test_labels[index])
        scores = now.answer.estimates[0]
        share = torch.softmax((-scores).masked_fill(~now.alive, -math.inf), 0)
        best = int(now.answer.prediction)
        colours = [
            colour if bool(alive) else OTHER
            for colour, alive in zip(figures.emphasis(share), now.alive, strict=True)
        ]
        if best != label:
            colours[best] = WRONG
        panels = [
            figures.tiles(
                [self.world.test_images[index]],
                columns=1,
                size=110,
                title=f"Test digit {index}",
                captions=[f"label {label}, now {best}"],
                alt=f"A handwritten {label}; the strategy says {best} at this moment.",
                borders=[WRONG if best != label else None],
            ),
            self._curves(film, now, strategy, scale, colours),
            posterior_bars(share, colours, "Posterior of the living classes", w=290, h=250),
            self._meter(now, film[-1]),
        ]
        return figures.frame([panels], self._note(film, now, strategy, scale, share, label))

    def _curves(
        self, film: list[Moment], now: Moment, strategy: str, scale: float, colours: list[str]
    ) -> dict:
        shown = film if len(film) > 1 else film * 2  # a line needs two ends
        leads = torch.stack([moment.lead for moment in shown])
        bills = [moment.bill for moment in shown]
        series = class_lines(leads.T, colours)
        out = dict(colour=figures.INK, dash="5 3", label="above this: out")
        if strategy == RACE:
            draws = torch.arange(1, len(shown) + 1, dtype=torch.float64)
            series.append(dict(y=limit(draws, scale, leads.shape[1]), **out))
        elif strategy == SIFT_AND_REFINE:
            series.append(dict(y=[THRESHOLD] * len(bills), **out))
        return figures.curves(
            bills,
            series,
            title="Behind the leader (frozen once out)",
            w=410,
            xlabel="network evaluations, class by class (drag)",
            ylabel="lag / nats",
            xrange=(0, self.whole),
            yrange=(0.0, TOP),
            cursor=min(now.bill, self.whole),
            alt="Lag of every class behind the leading one against evaluations spent, in nats.",
        )

    def _meter(self, now: Moment, last: Moment) -> dict:
        values = [now.bill, last.bill, self.whole]
        return figures.bars(
            ["so far", "in the end", "all, always"],
            values,
            colours=[BEST, SECOND, OTHER],
            title="Evaluations, class by class",
            range=(0, self.whole),
            w=240,
            texts=[str(v) for v in values],
            xlabel="",
            alt=f"{now.bill} network evaluations so far, {last.bill} in the end, {self.whole} for all "
            "classes at all levels.",
        )

    def described(self, strategy: str, scale: float) -> str:
        """A strategy with the settings that it uses, in words; what it does not use is left out."""
        return {
            RACE: f"{RACE}, α = {ALPHA:g}, assumed scale {scale:.1f} nats",
            STAGED: f"{STAGED} to {SURVIVORS[0]} and {SURVIVORS[1]} classes at {STAGES[0]} and {STAGES[1]} levels; it uses "
            "no assumed scale",
            SIFT_AND_REFINE: f"{SIFT_AND_REFINE}, threshold {THRESHOLD:g} nats; it uses no assumed scale",
            NO_ELIMINATION: f"{NO_ELIMINATION}; it uses no assumed scale",
        }[strategy]

    def _note(
        self,
        film: list[Moment],
        now: Moment,
        strategy: str,
        scale: float,
        share: Tensor,
        label: int,
    ) -> str:
        last = film[-1]
        best = int(now.answer.prediction)
        left = [str(k) for k in range(len(share)) if bool(now.alive[k])]
        ending = f"ends with {int(last.answer.prediction)} after {last.bill} of {self.whole}"
        if strategy == RACE and not bool(last.answer.decided):
            ending = f"remains undecided, its budget of {LEVELS} levels being spent"
        return (
            f"After {now.bill} evaluations: <b>{best}</b> (label {label}), living classes {', '.join(left)}; the "
            f"run ({self.described(strategy, scale)}) {ending}. A network with one head for each class would have paid "
            f"{int(now.answer.evaluations)} so far. Largest scale seen in the pilot: {self.pilot.scale:.1f} nats."
        )


def nobody_is_out(differences: Tensor, state: None) -> tuple[Tensor, None]:
    """The rule of a race in which no class is ever put out. Shapes: differences [B,K,K] -> out [B,K], state."""
    return torch.zeros(differences.shape[:2], dtype=torch.bool), state


def limit(draws: Tensor, scale: float, classes: int, alpha: float = ALPHA) -> Tensor:
    """The mean lag behind one rival that puts a class out by that rival alone, under `racing.normal_mixture`.

    Formula     scale s (n + 1)^(1/2) / n at the s with 2 (n + 1)^(-1/2) exp(s^2/2) Phi(s) = (K - 1)/alpha
    Shapes      draws n [T] -> [T], nats
    """
    s = torch.linspace(0, 12, 12001, dtype=torch.float64)
    log_capital = math.log(2) + s**2 / 2 + torch.special.log_ndtr(s)  # grows with s
    wanted = math.log((classes - 1) / alpha) + torch.log1p(draws) / 2
    return scale * s[torch.searchsorted(log_capital, wanted)] * (draws + 1).sqrt() / draws


def _moments(history: tuple[Answer, ...], heads: bool, refines: bool) -> list[Moment]:
    """The bill class by class: a level costs one evaluation for every class that is asked at it."""
    alive = torch.ones_like(history[0].alive[0])
    lead = torch.zeros_like(history[0].estimates[0])
    bill = 0
    paid = 0
    film = []
    for answer in history:
        refining = refines and answer is history[-1]
        asked = answer.alive[0] if refining else alive  # refinement asks who is left after it
        new = int(answer.evaluations) - paid
        bill = bill + (new * int(asked.sum()) if heads else new)
        paid = paid + new
        scores = answer.estimates[0]
        lag = scores - scores.masked_fill(~answer.alive[0], math.inf).min()
        lead = torch.where(alive, lag, lead)
        alive = answer.alive[0]
        film.append(Moment(bill, lead, alive, answer))
    return film
