"""The explorer: one real digit, attacked and certified, with both results on one radius axis.

Two functions are shown and never confused: the plain classifier (attacked, never certified) and the smoothed one, the
majority vote of the noised classifier, which has a certificate and an attack of its own.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from diffclass import attacks
from diffclass.attacks.search import AttackStep
from diffclass.certify import certificates, counting
from diffclass.classifiers import smoothed
from diffclass.classifiers.noised import NoisedBayesClassifier
from diffclass.course import figures
from diffclass.course.figures import COLOURS
from diffclass.course.scenes.digits import DigitScene, excess_curves, posterior_bars

NORMS = {"L2": "l2", "L∞": "linf"}


ALPHA = 0.001


STEPS = 20


CHECK_VOTES = 200  # votes that decide whether a perturbed point has changed the smoothed prediction


class ExplorerScene:
    """The state of the explorer: a digit, the film of its attack, its votes, and the smallest perturbations found.

    Jobs (`attack`, `certify`) are iterators: each item is the share of work done; a widget can show and stop them.
    Randomness  every job starts from its own fixed seed: the same controls give the same numbers
    """

    def __init__(self, digits: DigitScene, index: int = 4):
        self.world = digits.world
        self.digits = digits
        self.classifier = digits.classifier
        self.choose(index)

    def choose(self, index: int) -> None:
        """Take another test digit; what was found for the last one is put away."""
        self.index = index
        self.x = self.world.test_images[index : index + 1]
        self.label = int(self.world.test_labels[index])
        self.film: list[AttackStep] = []
        self.known: dict[int, tuple[Tensor, Tensor]] = {}
        self.predicted = int(self._measured(0, self.x)[1].argmax())
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
        self.known = {}
        for frame in attacks.pgd(self.classifier, self.x, y, budget, norm=NORMS[norm], steps=steps):
            self.film.append(frame)
            yield (frame.step + 1) / (steps + 1)
        found = attacks.shrink(
            lambda x: bool(self.classifier(x).argmax(1) != y), self.x, self.film[-1].x
        )
        if found is not None:
            size = float(attacks.size_of(found - self.x, "l2"))
            self.smallest = size if self.smallest is None else min(size, self.smallest)

    def certify(self, sigma_pixel: float, n: int) -> Iterator[float]:
        """Votes and certificate of the smoothed classifier, then the search for an attack on the same function."""
        self.forget_votes()
        noised = self._noised(sigma_pixel, seed=1)
        for done, votes in counting.draw_votes(noised, self.x, sigma_pixel, estimation=n, seed=2):
            if votes is not None:
                self.certificate = certificates.smoothing_radius(votes, ALPHA)
                self.counts = torch.tensor(votes.estimation)
            yield 0.5 * done / (n + 100)
        if self.certificate.prediction is not None:
            yield from self._attack_smoothed(sigma_pixel)
        self.searched = True
        yield 1.0

    def _attack_smoothed(self, sigma_pixel: float) -> Iterator[float]:
        original = self.certificate.prediction
        stand_in = smoothed.NoiseAveraged(
            self._noised(sigma_pixel, seed=3), sigma_pixel, 16, torch.Generator().manual_seed(4)
        )
        judge = self._noised(sigma_pixel, seed=5)

        def changed(x: Tensor) -> bool:
            *_, counts = counting.count_votes(judge, x, sigma_pixel, CHECK_VOTES, judge.generator)
            return certificates.prediction_changed(counts.tolist(), original, ALPHA)

        budgets = (1.0, 2.0, 3.0, 4.5)
        search = attacks.smallest_l2(
            stand_in,
            self.x,
            torch.tensor([original]),
            fooled=changed,
            budgets=budgets,
            steps=8,
            rounds=5,
        )
        for trial, best in enumerate(search):
            if best is not None:
                self.smallest_smoothed = float(attacks.size_of(best - self.x, "l2"))
            yield 0.5 + 0.5 * (trial + 1) / (len(budgets) + 2)

    def _noised(self, sigma_pixel: float, seed: int) -> NoisedBayesClassifier:
        noised = NoisedBayesClassifier(self.digits.denoiser, sigma_pixel)
        return noised.with_fresh_noise(torch.Generator().manual_seed(seed))

    # -- the frame ----------------------------------------------------------------------------------------------------

    def at(self, step: int, sigma_pixel: float, n: int) -> dict:
        """What is shown: frame `step` of the film (the clean digit without one), votes, and the radius axis."""
        step = max(0, min(step, len(self.film) - 1))
        x = self.film[step].x if self.film else self.x
        curve, logits = self._measured(step, x)
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
            self._votes_panel(n),
            self._axis(sigma_pixel, n),
        ]
        return figures.frame(panels, self._note(best, float(share[best]), size))

    def _measured(self, step: int, x: Tensor) -> tuple[Tensor, Tensor]:
        if step not in self.known:
            self.known[step] = self.digits.measured(x)
        return self.known[step]

    def _film_panel(self, step: int) -> dict:
        y = torch.tensor([self.predicted])
        if self.film:
            title = "Film of the attack: margin at each step"
            steps = [float(f.step) for f in self.film]
            margins = [-float(attacks.margin_loss(f.logits, y)) for f in self.film]
        else:
            title = "Margin before any attack: press Attack"
            steps = [0.0, float(STEPS)]
            margins = 2 * [-float(attacks.margin_loss(self._measured(0, self.x)[1][None], y))]
        zero = dict(y=[0.0] * len(steps), colour=COLOURS[4], dash="3 3")
        return figures.curves(
            steps,
            [dict(y=margins, colour=COLOURS[0], width=2.2), zero],
            title=title,
            w=540,
            h=210,
            xlabel="PGD step" + " (drag)" * bool(self.film),
            ylabel="lead / nats",
            cursor=step if self.film else None,
            alt="Lead of the predicted class over the runner-up, in nats, at each step of the "
            "attack; below zero the classifier is fooled.",
        )

    def _votes_panel(self, n: int) -> dict:
        counts = self.counts if self.counts is not None else torch.zeros(10)
        total = max(1, int(counts.sum()))
        text = (
            f"Votes of the noised classifier (n = {total})"
            if self.counts is not None
            else "Votes: press Certify"
        )
        return figures.bars(
            [str(k) for k in range(10)],
            counts / total,
            title=text,
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
        found = [v for v in (self.smallest, self.smallest_smoothed, radius, ceiling) if v]
        return figures.radius_axis(
            rows,
            title="How far is the nearest picture that is classified differently?",
            xlabel=f"L2 radius in pixels (largest that {n} votes can certify: {ceiling:.2f})",
            range=(0.0, max(1.0, 1.15 * max(found))),
            w=1004,
            alt="; ".join(spoken) + ".",
        )

    def _note(self, best: int, share: float, size: float) -> str:
        fooled = f", <b>fooled</b> at L2 distance {size:.2f}." if best != self.predicted else "."
        lines = [f"The plain classifier says <b>{best}</b> (posterior {share:.3f}){fooled}"]
        if self.certificate is not None:
            lines.append(f"Smoothed vote {self.certificate}.")
            if self.certificate.prediction is not None and self.searched:
                found = (
                    f"one exists at {self.smallest_smoothed:.2f} (upper bound, {CHECK_VOTES} votes)."
                    if self.smallest_smoothed
                    else "none found; that is not a proof."
                )
                lines.append(f"Attack on the smoothed vote: {found}")
        return " ".join(lines)
