"""Frames of an attack on one picture: the picture, the change, the losses of the classes, and how far the label leads."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffclass import attacks
from diffclass.attacks.search import AttackStep
from diffclass.classifiers.base import Held, decided
from diffclass.course import figures
from diffclass.course.figures import COLOURS
from diffclass.course.scenes.digits import excess_curves, excess_of, posterior_bars
from diffclass.course.scenes.results import AttackFilm, recorded

STEPS = 20
LOUDER = 10  # how much larger than it is the change is shown


def magnified(delta: Tensor) -> Tensor:
    """A change as a picture: grey where nothing changed, ten times as strong elsewhere. Shapes: the same."""
    return (0.5 + LOUDER * delta).clamp(0, 1)


@dataclass(eq=False, kw_only=True)
class PictureFilm(AttackFilm):
    """The film of an attack on one picture, with the settings that it was shot with.

    Shapes      x [1,C,H,W], y [1]; losses [K,T] of every frame
    """

    settings: dict
    x: Tensor
    y: Tensor
    losses: list[Tensor] = field(default_factory=list)

    def excess(self, step: int, sigmas: Tensor) -> Tensor:
        """The losses of a step over those of the class that it is taken for. Shapes: sigmas [T] -> [K,T]."""
        return excess_of(self.losses[step], int(decided(self.frames[step].logits)), sigmas)

    def scale(self, sigmas: Tensor) -> tuple[float, float]:
        """The range that holds every step there is, so that the axis stands still while the film is scrubbed."""
        every = torch.stack([self.excess(step, sigmas) for step in range(len(self.losses))])
        return float(every.min()), max(1.05 * float(every.max()), 1e-3)


class AttackScene:
    """PGD on one picture, filmed: `shoot` attacks, `at` shows one step of what there is of the film.

    Shapes      classifier: a `BayesClassifier` with its noise held; images [N,C,H,W] in [0,1], labels [N], K names
    Randomness  none: the classifier's noise is held, and PGD starts at the clean picture
    """

    LOSSES = {
        "margin": attacks.margin_loss,
        "cross-entropy": attacks.cross_entropy_loss,
        "DLR": attacks.dlr_loss,
    }

    def __init__(
        self,
        classifier: Held,
        images: Tensor,
        labels: Tensor,
        names: Sequence[str] = tuple("0123456789"),
        kind: str = "Test digit",
        steps: int = STEPS,
    ):
        self.bayes_classifier = classifier.classifier
        self.classifier = classifier
        self.images = images
        self.labels = labels
        self.names = tuple(names)
        self.kind = kind
        self.steps = steps
        side = (
            math.prod(images.shape[1:]) ** 0.5
        )  # of the box, in budgets: the smallest L2 ball around it
        self.norms = {"L∞": "linf", f"L2, radius {side:.0f}ε": "l2"}
        self.shown: PictureFilm | None = None
        self._films: dict[tuple, PictureFilm] = {}

    @property
    def film(self) -> list[AttackStep]:
        """The frames of the film that is shown."""
        return [] if self.shown is None else self.shown.frames

    @property
    def settings(self) -> dict | None:
        """What the film that is shown was shot with: the arguments of `shoot`."""
        return None if self.shown is None else self.shown.settings

    def described(self, index: int, epsilon: float, norm: str, loss: str) -> str:
        """Settings in words. Units: pixels."""
        kind = self.norms[norm]
        name = "L∞" if kind == "linf" else "L2"
        radius = self._radius(epsilon, kind)
        return f"{self.kind.lower()} {index}, {name} within {radius:.3f}, {loss} loss, {self.steps} steps"

    def _radius(self, epsilon: float, kind: str) -> float:
        image = self.images[:1]
        return float(attacks.size_of(torch.full_like(image, epsilon), kind))

    def shoot(self, index: int, epsilon: float, norm: str, loss: str) -> Iterator[float]:
        """Attack a picture; yields the share of the steps done. A finished film is kept and not shot again.

        The film that is shown gives way when the new one has its first frame.
        """
        key = (index, epsilon, norm, loss)
        if key in self._films:
            self.shown = self._films[key]
            yield 1.0
            return
        film = PictureFilm(
            steps=self.steps,
            settings=dict(index=index, epsilon=epsilon, norm=norm, loss=loss),
            x=self.images[index : index + 1],
            y=self.labels[index : index + 1],
        )
        kind = self.norms[norm]
        with recorded(film):
            for frame in attacks.pgd(
                self.classifier,
                film.x,
                film.y,
                self._radius(epsilon, kind),
                norm=kind,
                steps=self.steps,
                loss=self.LOSSES[loss],
            ):
                with torch.no_grad():
                    losses = self.bayes_classifier.losses(frame.x, self.classifier.noise)[0]
                film.frames.append(frame)
                film.losses.append(losses)
                if frame.step == 0:
                    self.shown = film
                yield (frame.step + 1) / (self.steps + 1)
        self._films[key] = film

    def at(self, step: int) -> dict:
        """The frame of a step; of the last one there is, while the film is being shot."""
        if self.shown is None:
            return figures.frame([], "There is no film yet.")
        film = self.shown
        x = film.x
        index = film.settings["index"]
        now = film.frames[max(0, min(step, len(film.frames) - 1))]
        losses = film.losses[now.step]
        label = int(film.y)
        logits = now.logits[0]
        best = int(decided(now.logits))
        colours = figures.emphasis(logits)
        share = torch.softmax(logits, 0)
        delta = now.x - x
        sigmas = self.bayes_classifier.levels.to(losses).sigma
        if best != label:  # then the label is what to look at, wherever it has fallen to
            colours = [figures.OTHER] * len(colours)
            colours[best] = figures.WRONG
            colours[label] = figures.SECOND
        sizes = {norm: float(attacks.size_of(delta, norm)) for norm in ("linf", "l2")}
        caption = f"step {now.step}: {self.names[best]}"
        name = self.names[label]
        wide = len(name) > 1
        return figures.frame(
            [
                [
                    figures.tiles(
                        [x[0], now.x[0], magnified(delta[0])],
                        columns=3,
                        size=104,
                        title=f"{self.kind} {index}: {name}",
                        captions=["clean", caption, f"change × {LOUDER}"],
                        borders=[None, figures.WRONG if best != label else None, None],
                        alt=f"A picture of class {name}, its perturbed copy at {caption}, and the change, ten times "
                        "as strong, on grey.",
                    ),
                    excess_curves(
                        losses,
                        best,
                        colours,
                        sigmas,
                        None,
                        names=self.names,
                        ghost=film.excess(0, sigmas),
                        yrange=film.scale(sigmas),
                        w=380,
                        h=210,
                    ),
                    posterior_bars(share, colours, names=self.names, w=400 if wide else 330, h=210),
                ],
                [self._film_panel(film, now.step)],
            ],
            self._note(film, label, best, float(share[best]), sizes),
        )

    def _film_panel(self, film: PictureFilm, step: int) -> dict:
        frames = film.frames
        shown = frames if len(frames) > 1 else frames * 2  # a line needs two ends
        steps = [float(i) for i in range(len(shown))]
        leads = [-float(attacks.margin_loss(frame.logits, film.y)) for frame in shown]
        zero = dict(y=[0.0] * len(steps), colour=COLOURS[4], dash="3 3")
        return figures.curves(
            steps,
            [dict(y=leads, colour=COLOURS[0], width=2.2), zero],
            w=1000,
            h=180,
            title="The film: how far the label leads",
            xlabel="PGD step (drag)",
            ylabel="lead / nats",
            xrange=(0, self.steps),
            cursor=step,
            alt="Lead of the label over the best other class, in nats, at each step of the attack; "
            "below zero the classifier is fooled.",
        )

    def _note(
        self, film: PictureFilm, label: int, best: int, share: float, sizes: dict[str, float]
    ) -> str:
        verdict = f"<b>fooled</b>, label {self.names[label]}" if best != label else "right"
        return (
            f"Attack on {self.described(**film.settings)}: {film.outcome}. At the step shown the classifier says "
            f"<b>{self.names[best]}</b> with posterior {share:.3f} ({verdict}). Size of the change in pixels: "
            f"L∞ {sizes['linf']:.3f}, which is {255 * sizes['linf']:.0f}/255 of the range; L2 {sizes['l2']:.2f}."
        )
