"""The explorer: one real digit, attacked and certified, with both results on one radius axis.

Two functions are shown and never confused: the plain classifier (attacked, never certified) and the smoothed one, the
majority vote of the noised classifier, which has a certificate and an attack of its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from diffclass import attacks
from diffclass.attacks.search import AttackStep
from diffclass.certify import certificates, counting
from diffclass.classifiers.base import decided
from diffclass.classifiers.noised import NoisedBayesClassifier
from diffclass.classifiers.smoothed import Smoothed
from diffclass.course import figures
from diffclass.course.figures import COLOURS
from diffclass.course.scenes.certifying import attack_votes
from diffclass.course.scenes.digits import DigitScene, excess_curves, posterior_bars
from diffclass.course.scenes.results import DONE, RUNNING, AttackFilm, Result, recorded

NORMS = {"L2": "l2", "L∞": "linf"}
ALPHA = 0.001
STEPS = 20
SELECTION = 100  # votes that choose the class to certify
CHECK_VOTES = 200  # votes that decide whether a perturbed point has changed the smoothed prediction


@dataclass(eq=False, kw_only=True)
class Attacked(AttackFilm):
    """The film of an attack on the plain classifier, with its norm and budget (pixels)."""

    norm: str
    budget: float

    def __str__(self) -> str:
        return f"{self.norm} within {self.budget:.2f}"


@dataclass(eq=False, kw_only=True)
class Certified(Result):
    """What `certify` has reached for one digit at one sigma and one number of votes.

    `certificate` is None until all votes are counted; `smallest` is the L2 length of the shortest change of the smoothed
    vote so far, None while there is none; `done` counts votes
    Units       sigma_pixel and smallest in pixels of [0,1]
    """

    index: int
    sigma_pixel: float
    n: int
    alpha: float
    seed: int
    done: int = 0
    certificate: certificates.Certificate | None = None
    smallest: float | None = None

    def __str__(self) -> str:
        return f"σ {self.sigma_pixel:.2f}, n {self.n}"


@dataclass(eq=False)
class Nearest:
    """The shortest change that fools the plain classifier on one digit, over all attacks so far. Units: L2, pixels."""

    size: float | None = None
    attack: str = ""

    def offer(self, size: float, attack: str) -> None:
        """Keep a fooling change if it is the shortest so far."""
        if self.size is None or size < self.size:
            self.size = size
            self.attack = attack


class ExplorerScene:
    """The state of the explorer: a digit, the film of its attack, its votes, and the smallest perturbations so far.

    Jobs (`attack`, `certify`) are iterators: each item is the share of work done; a widget can show and stop them.
    Each fills a result that knows its settings (`attacked`, `certified`), which takes the last one's place; a job that
    is stopped or replaced no longer touches what is shown.
    Randomness  the plain classifier's noise is held; votes, the attack on them and its judge draw from `seed`, each for
                its own purpose: the same controls give the same numbers
    """

    def __init__(self, digits: DigitScene, index: int = 4, seed: int = 0):
        self.world = digits.world
        self.digits = digits
        self.classifier = digits.classifier
        self.seed = seed
        self.choose(index)

    def choose(self, index: int) -> None:
        """Take another test digit; the results of the last one are put away."""
        self.index = index
        self.x = self.world.test_images[index : index + 1]
        self.label = int(self.world.test_labels[index])
        self.attacked: Attacked | None = None
        self.certified: Certified | None = None
        self.nearest = Nearest()
        self._measured: dict[tuple, tuple[Tensor, Tensor]] = {}

    @property
    def predicted(self) -> int:
        """What the plain classifier says about the clean digit."""
        return int(decided(self._curves_and_logits(None, 0)[1][None]))

    @property
    def film(self) -> list[AttackStep]:
        """The frames of the attack that is shown."""
        return [] if self.attacked is None else self.attacked.frames

    @property
    def smallest(self) -> float | None:
        """L2 length of the shortest change that fools the plain classifier, over all attacks on this digit."""
        return self.nearest.size

    @property
    def certificate(self) -> certificates.Certificate | None:
        """The certificate that is shown."""
        return None if self.certified is None else self.certified.certificate

    @property
    def counts(self) -> Tensor | None:
        """The votes behind the certificate that is shown. Shapes: [K]."""
        return None if self.certificate is None else torch.tensor(self.certificate.counts)

    @property
    def smallest_smoothed(self) -> float | None:
        """L2 length of the shortest change of the smoothed vote whose certificate is shown."""
        return None if self.certified is None else self.certified.smallest

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def attack(self, norm: str, budget: float, steps: int = STEPS) -> Iterator[float]:
        """PGD on the plain classifier: fills the film, and keeps the smallest fooling perturbation seen so far."""
        x = self.x
        y = torch.tensor([self.predicted])
        nearest = self.nearest
        attacked = Attacked(norm=norm, budget=budget, steps=steps)
        with recorded(attacked):
            for frame in attacks.pgd(self.classifier, x, y, budget, norm=NORMS[norm], steps=steps):
                attacked.frames.append(frame)
                if frame.step == 0:
                    self._show(attacked)
                if bool(frame.fooled):
                    nearest.offer(float(attacks.size_of(frame.x - x, "l2")), str(attacked))
                yield (frame.step + 1) / (steps + 1)
            for closest in attacks.shrink(
                lambda image: bool(decided(self.classifier(image)) != y), x, frame.x
            ):
                if closest is not None:
                    nearest.offer(float(attacks.size_of(closest - x, "l2")), str(attacked))
                yield 1.0

    def _show(self, attacked: Attacked) -> None:
        """Let a new film take the last one's place."""
        self.attacked = attacked
        clean = self._measured.get((None, 0))
        self._measured = {} if clean is None else {(None, 0): clean}

    def certify(self, sigma_pixel: float, n: int) -> Iterator[float]:
        """Votes and certificate of the smoothed classifier, then the search for an attack on the same function."""
        x = self.x
        certified = Certified(
            index=self.index, sigma_pixel=sigma_pixel, n=n, alpha=ALPHA, seed=self.seed
        )
        self.certified = certified
        with recorded(certified):
            smoothed = Smoothed(NoisedBayesClassifier(self.digits.denoiser, sigma_pixel))
            counted = counting.draw_votes(
                smoothed,
                x,
                selection=SELECTION,
                estimation=n,
                seed=self.seed,
                picture=certified.index,
            )
            for done, votes in counted:
                certified.done = done
                if votes is not None:
                    certified.certificate = certificates.smoothing_radius(votes, ALPHA)
                yield 0.5 * done / (n + SELECTION)
            if certified.certificate.prediction is not None:
                yield from self._attack_smoothed(smoothed, x, certified)
        yield 1.0

    def _attack_smoothed(
        self, smoothed: Smoothed, x: Tensor, certified: Certified
    ) -> Iterator[float]:
        """The shortest change of the smoothed prediction, kept as it shrinks."""
        search = attack_votes(
            smoothed,
            x,
            certified.certificate.prediction,
            alpha=ALPHA,
            votes=CHECK_VOTES,
            seed=self.seed,
            picture=certified.index,
        )
        for done, length in search:
            if length is not None:
                certified.smallest = length
            yield 0.5 + 0.5 * done

    # -- the frame ----------------------------------------------------------------------------------------------------

    def at(
        self,
        step: int,
        sigma_pixel: float,
        n: int,
        norm: str | None = None,
        budget: float | None = None,
    ) -> dict:
        """What is shown: frame `step` of the film (the clean digit without one), votes, and the radius axis.

        The other arguments are what the controls ask for now: they describe what has no result yet, and the note says
        where a result is that of other settings
        """
        attacked = self.attacked
        certified = self.certified
        last = 0 if attacked is None else len(attacked.frames) - 1
        step = max(0, min(step, last))
        x = self.x if attacked is None else attacked.frames[step].x
        curve, logits = self._curves_and_logits(attacked, step)
        share = torch.softmax(logits, 0)
        best = int(decided(logits[None]))
        colours = figures.emphasis(logits)
        delta = x - self.x
        size = float(attacks.size_of(delta, "l2"))
        shown = 0.5 + delta[0] * min(10.0, 0.5 / max(float(delta.abs().max()), 1e-6))
        panels = [
            figures.tiles(
                [self.x[0], x[0], shown],
                columns=3,
                size=96,
                title=f"Test digit {self.index}, a {self.label}",
                captions=["clean", f"step {step}: {best}", f"change, L2 {size:.2f}"],
                borders=[None, figures.WRONG if best != self.predicted else None, None],
                alt=f"The digit, its perturbed copy at step {step}, and the perturbation.",
            ),
            excess_curves(curve, best, colours, self.digits.curve_bank.sigma, None, w=380, h=210),
            posterior_bars(share, colours, "Posterior of the plain classifier", w=300, h=210),
            self._film_panel(attacked, step),
            self._votes_panel(certified),
            self._axis(certified, sigma_pixel, n),
        ]
        notes = [
            self._attack_note(attacked, step, best, float(share[best]), size),
            self._certificate_note(certified),
            self._asked_note(attacked, certified, sigma_pixel, n, norm, budget),
        ]
        return figures.frame(panels, " ".join(note for note in notes if note))

    def _curves_and_logits(self, attacked: Attacked | None, step: int) -> tuple[Tensor, Tensor]:
        """Loss curves [K,T] and logits [K] of a frame's picture, of the clean digit without a film; measured once."""
        key = (attacked, step)
        if key not in self._measured:
            x = self.x if attacked is None else attacked.frames[step].x
            self._measured[key] = self.digits.measured(x)
        return self._measured[key]

    def _film_panel(self, attacked: Attacked | None, step: int) -> dict:
        y = torch.tensor([self.predicted])
        if attacked is None:
            title = "Margin before any attack: press Attack"
            xlabel = "PGD step"
            last = STEPS
            logits = self._curves_and_logits(None, 0)[1]
            steps = [0.0, float(STEPS)]
            margins = [-float(attacks.margin_loss(logits[None], y))] * 2
        else:
            title = f"Film of the attack ({attacked}): margin at each step"
            xlabel = "PGD step (drag)"
            last = attacked.steps
            frames = attacked.frames
            shown = frames if len(frames) > 1 else frames * 2  # a line needs two ends
            steps = [float(frame.step) for frame in shown]
            margins = [-float(attacks.margin_loss(frame.logits, y)) for frame in shown]
        zero = dict(y=[0.0] * len(steps), colour=COLOURS[4], dash="3 3")
        return figures.curves(
            steps,
            [dict(y=margins, colour=COLOURS[0], width=2.2), zero],
            title=title,
            w=540,
            h=210,
            xlabel=xlabel,
            ylabel="lead / nats",
            xrange=(0, last),
            cursor=None if attacked is None else step,
            alt="Lead of the predicted class over the runner-up, in nats, at each step of the "
            "attack; below zero the classifier is fooled.",
        )

    def _votes_panel(self, certified: Certified | None) -> dict:
        counts = torch.zeros(self.digits.denoiser.num_classes)
        total = 1
        spoken = "no votes of the noised classifier to show"
        if certified is None:
            title = "Votes: press Certify"
        elif certified.certificate is None:
            title = f"Votes at {certified}: {certified.done} of {certified.n + SELECTION} cast"
        else:
            counts = torch.tensor(certified.certificate.counts)
            total = certified.certificate.n
            title = f"Votes of the noised classifier ({certified})"
            spoken = ", ".join(f"class {k} {int(c)}" for k, c in enumerate(counts) if c)
        return figures.bars(
            [str(k) for k in range(len(counts))],
            counts / total,
            title=title,
            colours=figures.emphasis(counts, 1),
            texts=[str(int(c)) if c else "" for c in counts],
            xlabel="class",
            w=450,
            h=210,
            alt=f"{title}; {spoken}.",
        )

    def _axis(self, certified: Certified | None, sigma_pixel: float, n: int) -> dict:
        """The radius axis: of the certificate's own sigma and n, of those of the controls while there is none."""
        radius = 0.0
        if certified is not None:
            sigma_pixel = certified.sigma_pixel
            n = certified.n
            if certified.certificate is not None:
                radius = certified.certificate.radius
        ceiling = certificates.largest_radius(n, sigma_pixel, ALPHA)
        rows = [
            dict(label="plain classifier", certified=0.0, attacked=self.smallest),
            dict(
                label=f"smoothed, σ = {sigma_pixel:.2f}",
                certified=radius,
                attacked=self.smallest_smoothed,
            ),
        ]
        lower = ["never certified", _certified_in_words(certified)]
        spoken = [
            f"{row['label']}: {words}, {_attacked_in_words(row['attacked'])}"
            for row, words in zip(rows, lower, strict=True)
        ]
        ends = [v for v in (self.smallest, self.smallest_smoothed, radius, ceiling) if v]
        return figures.radius_axis(
            rows,
            title="How far is the nearest picture that is classified differently?",
            xlabel=f"L2 radius in pixels (largest that {n} votes at σ = {sigma_pixel:.2f} can certify: {ceiling:.2f})",
            range=(0.0, max(1.0, 1.15 * max(ends))),
            w=1004,
            alt="; ".join(spoken) + ".",
        )

    def _attack_note(
        self, attacked: Attacked | None, step: int, best: int, share: float, size: float
    ) -> str:
        fooled = f", <b>fooled</b> at L2 distance {size:.2f}" if best != self.predicted else ""
        where = "" if attacked is None else f" at step {step}"
        lines = [f"The plain classifier says <b>{best}</b>{where} (posterior {share:.3f}){fooled}."]
        if attacked is not None:
            lines.append(f"Attack, {attacked}: {attacked.outcome}.")
        if self.smallest is not None:
            lines.append(
                f"Shortest fooling change so far: {self.smallest:.2f} ({self.nearest.attack})."
            )
        return " ".join(lines)

    def _certificate_note(self, certified: Certified | None) -> str:
        if certified is None:
            return ""
        if certified.certificate is None:
            cast = f"{certified.done} of {certified.n + SELECTION} votes"
            if certified.ending == RUNNING:
                return f"Certifying {certified}: {cast} cast."
            return f"Certify ({certified}) {certified.ending} after {cast}: no certificate."
        lines = [f"Smoothed vote {certified.certificate}."]
        if certified.certificate.prediction is None:
            return lines[0]
        length = certified.smallest
        outcome = (
            "none so far"
            if length is None
            else f"one exists at {length:.2f} (upper bound, {CHECK_VOTES} votes)"
        )
        if certified.ending == RUNNING:
            lines.append(f"Attack on the smoothed vote, running: {outcome}.")
        elif certified.ending != DONE:
            lines.append(
                f"Attack on the smoothed vote, {certified.ending} before its end: {outcome}."
            )
        elif length is None:
            lines.append("Attack on the smoothed vote: none found; that is not a proof.")
        else:
            lines.append(f"Attack on the smoothed vote: {outcome}.")
        return " ".join(lines)

    def _asked_note(
        self,
        attacked: Attacked | None,
        certified: Certified | None,
        sigma_pixel: float,
        n: int,
        norm: str | None,
        budget: float | None,
    ) -> str:
        """Which results are those of other settings than the controls', and what to press for these."""
        lines = []
        if (
            attacked is not None
            and norm is not None
            and (norm, budget) != (attacked.norm, attacked.budget)
        ):
            lines.append(
                f"<b>Attack of {attacked}</b>; press Attack for {norm} within {budget:.2f}."
            )
        if certified is not None and (sigma_pixel, n) != (certified.sigma_pixel, certified.n):
            what = "Votes" if certified.certificate is None else "Certificate"
            lines.append(
                f"<b>{what} of {certified}</b>; press Certify for σ {sigma_pixel:.2f}, n {n}."
            )
        return " ".join(lines)


def _certified_in_words(certified: Certified | None) -> str:
    if certified is None or certified.certificate is None:
        return "no certificate yet"
    if certified.certificate.prediction is None:
        return "abstained"
    return f"certified up to {certified.certificate.radius:.2f}"


def _attacked_in_words(length: float | None) -> str:
    return "no attack found" if length is None else f"smallest attack found: {length:.2f}"
