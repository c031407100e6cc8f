"""Frames of an attack on one digit: the picture, the change, the losses of the classes, and how far the label leads."""

from collections.abc import Iterator

import torch
from torch import Tensor

from diffclass import attacks
from diffclass.attacks.search import AttackStep
from diffclass.course import figures
from diffclass.course.figures import COLOURS
from diffclass.course.scenes.digits import DigitScene, excess_curves, posterior_bars

STEPS = 20
LOUDER = 10  # how much larger than it is the change is shown


def magnified(delta: Tensor) -> Tensor:
    """A change as a picture: grey where nothing changed, ten times as strong elsewhere. Shapes: the same."""
    return (0.5 + LOUDER * delta).clamp(0, 1)


class AttackScene:
    """PGD on one test digit, filmed: `shoot` attacks, `at` shows one step of what there is of the film.

    Randomness  none: the classifier's noise is held, and PGD starts at the clean digit
    """

    # 8 = sqrt(64): the smallest L2 ball around the box
    NORMS = {"L∞": "linf", "L2, radius 8ε": "l2"}
    LOSSES = {
        "margin": attacks.margin_loss,
        "cross-entropy": attacks.cross_entropy_loss,
        "DLR": attacks.dlr_loss,
    }

    def __init__(self, digits: DigitScene):
        self.world = digits.world
        self.bayes_classifier = digits.bayes_classifier
        self.classifier = digits.classifier
        self.film: list[AttackStep] = []
        self._losses: dict[int, Tensor] = {}
        self._films: dict[tuple, list[AttackStep]] = {}

    def shoot(self, index: int, epsilon: float, norm: str, loss: str) -> Iterator[float]:
        """Attack a test digit; yields the share of the steps done. A finished film is kept and not shot again."""
        key = (index, epsilon, norm, loss)
        self.x = self.world.test_images[index : index + 1]
        self.y = self.world.test_labels[index : index + 1]
        self.index = index
        self.film = self._films.get(key, [])
        self._losses = {}
        if self.film:
            yield 1.0
            return
        kind = self.NORMS[norm]
        radius = float(attacks.size_of(torch.full_like(self.x, epsilon), kind))
        for frame in attacks.pgd(
            self.classifier, self.x, self.y, radius, norm=kind, steps=STEPS, loss=self.LOSSES[loss]
        ):
            self.film.append(frame)
            yield (frame.step + 1) / (STEPS + 1)
        self._films[key] = self.film

    def losses(self, step: int) -> Tensor:
        """The losses [K,T] behind the logits of a frame, measured once."""
        if step not in self._losses:
            with torch.no_grad():
                self._losses[step] = self.bayes_classifier.losses(
                    self.film[step].x, self.classifier.noise
                )[0]
        return self._losses[step]

    def at(self, step: int) -> dict:
        """The frame of a step; of the last one there is, while the film is being shot."""
        now = self.film[max(0, min(step, len(self.film) - 1))]
        losses = self.losses(now.step)
        logits = now.logits[0]
        label = int(self.y)
        best = int(logits.argmax())
        colours = figures.emphasis(logits)
        share = torch.softmax(logits, 0)
        delta = now.x - self.x
        if best != label:  # then the label is what to look at, wherever it has fallen to
            colours = [figures.OTHER] * len(colours)
            colours[best] = figures.WRONG
            colours[label] = figures.SECOND
        sizes = {norm: float(attacks.size_of(delta, norm)) for norm in ("linf", "l2")}
        caption = f"step {now.step}: {best}"
        return figures.frame(
            [
                figures.tiles(
                    [self.x[0], now.x[0], magnified(delta[0])],
                    columns=3,
                    size=96,
                    title=f"Test digit {self.index}, a {label}",
                    captions=["clean", caption, f"change × {LOUDER}"],
                    borders=[None, figures.WRONG if best != label else None, None],
                    alt=f"A handwritten {label}, its perturbed copy at {caption}, and the change, ten times as "
                    "strong, on grey.",
                ),
                excess_curves(
                    losses,
                    best,
                    colours,
                    self.bayes_classifier.levels.to(losses).sigma,
                    None,
                    w=380,
                    h=230,
                ),
                posterior_bars(share, colours, w=300, h=230),
                self._film_panel(now.step),
            ],
            self._note(label, best, float(share[best]), sizes),
        )

    def _film_panel(self, step: int) -> dict:
        shown = self.film if len(self.film) > 1 else self.film * 2  # a line needs two ends
        steps = [float(i) for i in range(len(shown))]
        leads = [-float(attacks.margin_loss(frame.logits, self.y)) for frame in shown]
        zero = dict(y=[0.0] * len(steps), colour=COLOURS[4], dash="3 3")
        return figures.curves(
            steps,
            [dict(y=leads, colour=COLOURS[0], width=2.2), zero],
            w=1000,
            h=200,
            title="The film: how far the label leads",
            xlabel="PGD step (drag)",
            ylabel="lead / nats",
            xrange=(0, STEPS),
            cursor=step,
            alt="Lead of the label over the best other class, in nats, at each step of the attack; "
            "below zero the classifier is fooled.",
        )

    def _note(self, label: int, best: int, share: float, sizes: dict[str, float]) -> str:
        verdict = f"<b>fooled</b>, label {label}" if best != label else "right"
        return (
            f"The classifier says <b>{best}</b> with posterior {share:.3f} ({verdict}). Size of the change in "
            f"pixels: L∞ {sizes['linf']:.3f}, which is {255 * sizes['linf']:.0f}/255 of the range; L2 "
            f"{sizes['l2']:.2f}."
        )
