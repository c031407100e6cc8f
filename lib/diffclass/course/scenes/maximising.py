"""Frames of likelihood maximisation on one digit, clean and attacked: the pictures, their change, loss and verdict."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffclass import attacks, units
from diffclass.classifiers.base import Classifier, Held, decided
from diffclass.classifiers.purified import LikelihoodMaximisation, PurifiedClassifier
from diffclass.course import figures
from diffclass.course.figures import COLOURS
from diffclass.course.scenes.digits import DigitScene, posterior_bars
from diffclass.course.scenes.results import DONE, RUNNING, Result, recorded

STEPS = 20  # of the walk that is shown
DEFENCE = 5  # of the defence, whose noise is that of the walk's first steps
ATTACK_STEPS = 10
PAPER = "the paper's"
RELEASED = "as released"


@dataclass(frozen=True)
class Moment:
    """One step of the walk of two pictures, the clean one and the attacked one.

    Shapes      x [2,C,H,W] in [0,1]; loss [2], the unconditional one in the walk's band, summed over pixels; logits
                [2,K]
    """

    x: Tensor
    loss: Tensor
    logits: Tensor


@dataclass(eq=False, kw_only=True)
class Walk(Result):
    """The moments of a walk, with the settings that it was taken with; `budget` is None where the walk has no limit."""

    settings: dict
    label: int
    budget: float | None
    moments: list[Moment] = field(default_factory=list)


class MaximisationScene:
    """Attack a test digit, then walk from it and from the clean digit: `shoot` does it, `at` shows a step.

    Randomness  held: the walk's noise, the classifier's, and that of the loss on display
    """

    VARIANTS = (PAPER, RELEASED)
    # what is attacked -> the gradient of the whole defence, or none where the attack leaves the defence out
    TARGETS = {
        "the classifier alone": None,
        "the whole defence (BPDA)": "bpda",
        "the whole defence (exact)": "exact",
    }

    def __init__(self, digits: DigitScene, epsilon: float = 0.1, seed: int = 0):
        self.digits = digits
        self.world = digits.world
        self.epsilon = epsilon
        self.denoiser = digits.denoiser
        self.classifier = digits.classifier
        levels = digits.curve_bank.sigma
        whole = LikelihoodMaximisation(self.denoiser, steps=STEPS)
        low, high = whole.band
        self.band = (levels >= low) & (levels <= high)  # where the walk's loss is, and is shown
        self.noise = whole.sample_noise(1, torch.Generator().manual_seed(seed))
        self.shown: Walk | None = None
        self._films: dict[tuple, Walk] = {}

    @property
    def film(self) -> list[Moment]:
        """The moments of the walk that is shown."""
        return [] if self.shown is None else self.shown.moments

    @property
    def settings(self) -> dict | None:
        """What the walk that is shown was taken with: the arguments of `shoot`."""
        return None if self.shown is None else self.shown.settings

    @property
    def label(self) -> int:
        """The label of the digit that is shown."""
        return self.shown.label

    def described(self, index: int, budget: float, variant: str, target: str) -> str:
        """Settings in words. Units: pixels."""
        limit = (
            f"L∞ limit {budget:.3f}" if variant == PAPER else "no limit"
        )  # the limit is the paper's alone
        return f"digit {index}, steps {variant} with {limit}, attack on {target} within L∞ {self.epsilon:.3f}"

    def maximisation(self, variant: str, budget: float) -> LikelihoodMaximisation:
        """The defence's steps in a variant; the budget (pixels, L-inf) is the paper's alone."""
        if variant == PAPER:
            return LikelihoodMaximisation.paper(self.denoiser, budget, steps=DEFENCE)
        return LikelihoodMaximisation.released(self.denoiser, steps=DEFENCE)

    def defence(self, variant: str, budget: float) -> Held:
        """Five steps of a variant before the classifier, under the noise of the walk's first five steps.

        Why         so the defence's answer is the classifier's at step 5 of the film
        """
        levels, eps = self.noise
        first_steps = (levels[:, :DEFENCE], eps[:, :DEFENCE])
        defence = PurifiedClassifier(
            self.maximisation(variant, budget), self.digits.bayes_classifier
        )
        return Held(defence, (first_steps, self.classifier.noise))

    def shoot(self, index: int, budget: float, variant: str, target: str) -> Iterator[float]:
        """Attack, then walk; yields the share of the work done. A finished film is kept and not shot again.

        The walk that is shown gives way when the new one begins, after its attack.
        Units       budget in pixels, L-inf
        """
        key = (index, budget, variant, target)
        if key in self._films:
            self.shown = self._films[key]
            yield 1.0
            return
        maximisation = self.maximisation(variant, budget)
        x = self.world.test_images[index : index + 1]
        y = self.world.test_labels[index : index + 1]
        film = Walk(
            settings=dict(index=index, budget=budget, variant=variant, target=target),
            label=int(y),
            budget=maximisation.budget,
        )
        with recorded(film):
            for frame in attacks.pgd(
                self._attacked(variant, budget, target), x, y, self.epsilon, steps=ATTACK_STEPS
            ):
                yield 0.5 * frame.step / ATTACK_STEPS
            start = units.to_model(torch.cat([x, frame.x]))
            film.moments.append(self._moment(start))
            self.shown = film
            for u in maximisation.changed(steps=STEPS).walk(start, self.noise):
                film.moments.append(self._moment(u))
                yield 0.5 + 0.5 * (len(film.moments) - 1) / STEPS
        self._films[key] = film
        yield 1.0

    def _attacked(self, variant: str, budget: float, target: str) -> Classifier:
        """What the attack climbs."""
        gradient = self.TARGETS[target]
        if gradient is None:
            return self.classifier
        return self.defence(variant, budget).gradients()[gradient]

    def _moment(self, z: Tensor) -> Moment:
        x = units.to_pixel(z).clamp(0, 1)
        with torch.no_grad():
            return Moment(x, self.digits.unconditional(z)[:, self.band].mean(1), self.classifier(x))

    def at(self, step: int) -> dict:
        """The frame of a step; of the last one there is, while the film is being shot."""
        if self.shown is None:
            return figures.frame([], "There is no film yet.")
        film = self.shown
        step = max(0, min(step, len(film.moments) - 1))
        start = film.moments[0]
        now = film.moments[step]
        label = film.label
        best = decided(now.logits).tolist()
        share = torch.softmax(now.logits[1], 0)
        wrong = [figures.WRONG if k != label else None for k in best]
        moved = (now.x - start.x).flatten(1).abs().amax(1).tolist()
        change = 0.5 + now.x - start.x
        colours = figures.emphasis(now.logits[1])
        if best[1] != label:
            colours[best[1]] = figures.WRONG
        return figures.frame(
            [
                [
                    figures.tiles(
                        [picture for k in (0, 1) for picture in (start.x[k], now.x[k], change[k])],
                        columns=6,
                        size=88,
                        title=f"Test digit {film.settings['index']}, a {label}, clean and attacked: before, after {step} steps",
                        captions=[
                            "clean",
                            f"now {best[0]}",
                            f"change {moved[0]:.2f}",
                            "attacked",
                            f"now {best[1]}",
                            f"change {moved[1]:.2f}",
                        ],
                        borders=[None, wrong[0], None, None, wrong[1], None],
                        alt=f"A handwritten {label} and its attacked copy, before and after {step} steps of "
                        "likelihood maximisation, and what the steps changed.",
                    ),
                    posterior_bars(share, colours, "Posterior of the attacked digit", w=400, h=130),
                ],
                [
                    self._curves(
                        step,
                        "‖D − u‖²",
                        "Unconditional loss: what the steps lower",
                        [moment.loss for moment in film.moments],
                        w=480,
                    ),
                    self._curves(
                        step,
                        "lead / nats",
                        "How far the label leads",
                        [
                            -attacks.margin_loss(moment.logits, torch.tensor([label, label]))
                            for moment in film.moments
                        ],
                        w=480,
                        zero_is_the_limit=True,
                    ),
                ],
            ],
            self._note(film, step, best, share, moved),
        )

    def _curves(
        self,
        step: int,
        ylabel: str,
        title: str,
        pairs: list[Tensor],
        *,
        w: int,
        zero_is_the_limit: bool = False,
    ) -> dict:
        """One line for the clean and one for the attacked digit. Shapes: pairs [2] of every step -> a panel."""
        shown = torch.stack(pairs if len(pairs) > 1 else pairs * 2)  # a line needs two ends
        series = [
            dict(y=shown[:, 0], colour=COLOURS[0], label="clean", width=2.2),
            dict(y=shown[:, 1], colour=COLOURS[4], label="attacked", width=2.2),
        ]
        alt = f"{title} of the clean and of the attacked digit, against the step"
        if zero_is_the_limit:
            series.append(dict(y=[0.0] * len(shown), colour=COLOURS[7], dash="3 3"))
            alt = f"{alt}; below zero the answer is wrong"
        return figures.curves(
            range(len(shown)),
            series,
            title=title,
            xlabel="step (drag)",
            ylabel=ylabel,
            w=w,
            h=210,
            xrange=(0, STEPS),
            cursor=step,
            legend="bottom" if zero_is_the_limit else "top",  # a clean digit leads to the end
            alt=f"{alt}.",
        )

    def _note(
        self, film: Walk, step: int, best: list[int], share: Tensor, moved: list[float]
    ) -> str:
        first = film.moments[0]
        now = film.moments[step]
        taken = len(film.moments) - 1
        state = ""
        if film.ending == RUNNING:
            state = f" Walking, {taken} of {STEPS} steps so far."
        elif film.ending != DONE:
            state = f" The walk was {film.ending} after step {taken} of {STEPS}."
        answer = f"The defence stops after {DEFENCE} steps, which this walk has not taken."
        if taken >= DEFENCE:
            defended = decided(film.moments[DEFENCE].logits).tolist()
            answer = f"The defence stops after {DEFENCE} steps and answers {defended[0]} and {defended[1]}."
        return (
            f"Label {film.label}: {self.described(**film.settings)}.{state} After {step} steps the clean digit is "
            f"called <b>{best[0]}</b>, the attacked one <b>{best[1]}</b> (posterior {float(share[best[1]]):.3f}); the "
            f"unconditional loss went from {float(first.loss[1]):.2f} to {float(now.loss[1]):.2f} and the pixels "
            f"moved by up to {moved[1]:.2f}. {answer}"
        )
