"""The explorer: one real digit, attacked and certified, with both results on one radius axis.

Two functions are shown and never confused: the plain classifier (attacked, never certified) and the smoothed one, the
majority vote of the noised classifier, which has a certificate and an attack of its own.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from diffclass import attacks
from diffclass.attacks.search import AttackStep
from diffclass.certify import certificates, counting
from diffclass.classifiers.base import fresh_noise
from diffclass.classifiers.noised import NoisedBayesClassifier
from diffclass.classifiers.smoothed import Smoothed
from diffclass.course import figures
from diffclass.course.figures import COLOURS
from diffclass.course.scenes.digits import DigitScene, excess_curves, posterior_bars
from diffclass.noise import seed_of

NORMS = {"L2": "l2", "L∞": "linf"}
ALPHA = 0.001
STEPS = 20
SELECTION = 100  # votes that choose the class to certify
CHECK_VOTES = 200  # votes that decide whether a perturbed point has changed the smoothed prediction
# L2, pixels, tried one after the other on the smoothed vote
SMOOTHED_BUDGETS = (
    1.0,
    2.0,
    3.0,
    4.5,
)


class ExplorerScene:
    """The state of the explorer: a digit, the film of its attack, its votes, and the smallest perturbations found.

    Jobs (`attack`, `certify`) are iterators: each item is the share of work done; a widget can show and stop them.
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
        """Take another test digit; what was found for the last one is put away."""
        self.index = index
        self.x = self.world.test_images[index : index + 1]
        self.label = int(self.world.test_labels[index])
        self.film: list[AttackStep] = []
        self._measured: dict[int, tuple[Tensor, Tensor]] = {}
        self.predicted = int(self._curves_and_logits(0, self.x)[1].argmax())
        self.smallest: float | None = None
        self.forget_votes()

    def forget_votes(self) -> None:
        """Drop votes and certificate, which belong to one sigma."""
        self.certificate: certificates.Certificate | None = None
        self.counts: Tensor | None = None
        self.smallest_smoothed: float | None = None
        self.searched = False

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def attack(self, norm: str, budget: float, steps: int = STEPS) -> Iterator[float]:
        """PGD on the plain classifier: fills the film, and keeps the smallest fooling perturbation seen so far."""
        y = torch.tensor([self.predicted])
        self.film = []
        self._measured = {}
        for frame in attacks.pgd(self.classifier, self.x, y, budget, norm=NORMS[norm], steps=steps):
            self.film.append(frame)
            yield (frame.step + 1) / (steps + 1)
        closest = attacks.shrink(
            lambda x: bool(self.classifier(x).argmax(1) != y), self.x, self.film[-1].x
        )
        if closest is not None:
            size = float(attacks.size_of(closest - self.x, "l2"))
            self.smallest = size if self.smallest is None else min(size, self.smallest)

    def certify(self, sigma_pixel: float, n: int) -> Iterator[float]:
        """Votes and certificate of the smoothed classifier, then the search for an attack on the same function."""
        self.forget_votes()
        smoothed = Smoothed(NoisedBayesClassifier(self.digits.denoiser, sigma_pixel))
        counted = counting.draw_votes(
            smoothed,
            self.x,
            selection=SELECTION,
            estimation=n,
            seed=self.seed,
            picture=self.index,
        )
        for done, votes in counted:
            if votes is not None:
                self.certificate = certificates.smoothing_radius(votes, ALPHA)
                self.counts = torch.tensor(votes.estimation)
            yield 0.5 * done / (n + SELECTION)
        if self.certificate.prediction is not None:
            yield from self._attack_smoothed(smoothed)
        self.searched = True
        yield 1.0

    def _attack_smoothed(self, smoothed: Smoothed) -> Iterator[float]:
        """Climb the mean logits of noised copies; votes of their own decide about every picture on the way."""
        original = self.certificate.prediction
        climbed = smoothed.surrogate()
        seeds = (seed_of(self.seed, "judge", self.index, picture) for picture in itertools.count())

        def changed(x: Tensor) -> bool:
            *_, counts = smoothed.count(x, next(seeds), CHECK_VOTES)
            return certificates.prediction_changed(counts.tolist(), original, ALPHA)

        search = attacks.smallest_l2(
            climbed,
            self.x,
            torch.tensor([original]),
            noise=fresh_noise(climbed, 1, self.seed, "attack", self.index),
            fooled=changed,
            budgets=SMOOTHED_BUDGETS,
            steps=8,
            rounds=5,
        )
        for trial, best in enumerate(search):
            if best is not None:
                self.smallest_smoothed = float(attacks.size_of(best - self.x, "l2"))
            yield 0.5 + 0.5 * (trial + 1) / (len(SMOOTHED_BUDGETS) + 2)

    # -- the frame ----------------------------------------------------------------------------------------------------

    def at(self, step: int, sigma_pixel: float, n: int) -> dict:
        """What is shown: frame `step` of the film (the clean digit without one), votes, and the radius axis."""
        step = max(0, min(step, len(self.film) - 1))
        x = self.film[step].x if self.film else self.x
        curve, logits = self._curves_and_logits(step, x)
        share = torch.softmax(logits, 0)
        best = int(logits.argmax())
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
            self._film_panel(step),
            self._votes_panel(),
            self._axis(sigma_pixel, n),
        ]
        return figures.frame(panels, self._note(best, float(share[best]), size))

    def _curves_and_logits(self, step: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Loss curves [K,T] and logits [K] of a frame's picture, measured once."""
        if step not in self._measured:
            self._measured[step] = self.digits.measured(x)
        return self._measured[step]

    def _film_panel(self, step: int) -> dict:
        y = torch.tensor([self.predicted])
        if self.film:
            title = "Film of the attack: margin at each step"
            xlabel = "PGD step (drag)"
            steps = [float(f.step) for f in self.film]
            margins = [-float(attacks.margin_loss(f.logits, y)) for f in self.film]
        else:
            title = "Margin before any attack: press Attack"
            xlabel = "PGD step"
            logits = self._curves_and_logits(0, self.x)[1]
            steps = [0.0, float(STEPS)]
            margins = [-float(attacks.margin_loss(logits[None], y))] * 2
        zero = dict(y=[0.0] * len(steps), colour=COLOURS[4], dash="3 3")
        return figures.curves(
            steps,
            [dict(y=margins, colour=COLOURS[0], width=2.2), zero],
            title=title,
            w=540,
            h=210,
            xlabel=xlabel,
            ylabel="lead / nats",
            cursor=step if self.film else None,
            alt="Lead of the predicted class over the runner-up, in nats, at each step of the "
            "attack; below zero the classifier is fooled.",
        )

    def _votes_panel(self) -> dict:
        if self.counts is None:
            title = "Votes: press Certify"
            counts = torch.zeros(10)
            total = 1
        else:
            counts = self.counts
            total = int(counts.sum())
            title = f"Votes of the noised classifier (n = {total})"
        return figures.bars(
            [str(k) for k in range(10)],
            counts / total,
            title=title,
            colours=figures.emphasis(counts, 1),
            texts=[str(int(c)) if c else "" for c in counts],
            xlabel="class",
            w=450,
            h=210,
            alt="Votes of the noised classifier for each class.",
        )

    def _axis(self, sigma_pixel: float, n: int) -> dict:
        radius = self.certificate.radius if self.certificate else 0.0
        ceiling = certificates.largest_radius(n, sigma_pixel, ALPHA)
        rows = [
            dict(label="plain classifier", certified=0.0, attacked=self.smallest),
            dict(
                label=f"smoothed, σ = {sigma_pixel:.2f}",
                certified=radius,
                attacked=self.smallest_smoothed,
            ),
        ]
        spoken = [
            f"{row['label']}: certified up to {row['certified']:.2f}, smallest attack found: {row['attacked']}"
            for row in rows
        ]
        ends = [v for v in (self.smallest, self.smallest_smoothed, radius, ceiling) if v]
        return figures.radius_axis(
            rows,
            title="How far is the nearest picture that is classified differently?",
            xlabel=f"L2 radius in pixels (largest that {n} votes can certify: {ceiling:.2f})",
            range=(0.0, max(1.0, 1.15 * max(ends))),
            w=1004,
            alt="; ".join(spoken) + ".",
        )

    def _note(self, best: int, share: float, size: float) -> str:
        fooled = f", <b>fooled</b> at L2 distance {size:.2f}." if best != self.predicted else "."
        lines = [f"The plain classifier says <b>{best}</b> (posterior {share:.3f}){fooled}"]
        if self.certificate is not None:
            lines.append(f"Smoothed vote {self.certificate}.")
            if self.certificate.prediction is not None and self.searched:
                outcome = (
                    f"one exists at {self.smallest_smoothed:.2f} (upper bound, {CHECK_VOTES} votes)."
                    if self.smallest_smoothed
                    else "none found; that is not a proof."
                )
                lines.append(f"Attack on the smoothed vote: {outcome}")
        return " ".join(lines)
