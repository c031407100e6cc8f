"""Frames of a photograph, live: its noised copy, ten denoised ones and one without a class, and what one call says."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffclass import units
from diffclass.classifiers.base import Held, decided
from diffclass.classifiers.bayes import BayesClassifier
from diffclass.classifiers.one_call import OneCallClassifier
from diffclass.course import figures
from diffclass.course.figures import OTHER
from diffclass.course.scenes.digits import excess_curves
from diffclass.denoisers.base import Denoiser
from diffclass.noise import Levels

TOGETHER = 3  # levels that are asked at once ahead of the reader: short enough not to be in the way of a slider
KEPT = 300  # answers, of 135 kB each for photographs


class OneCallScene:
    """A network with a head for each class and one for none, and pictures; a frame is a picture at a noise level.

    Shapes      images [N,C,H,W] in [0,1], labels [N]; levels: those of the curves
    Randomness  one held noise for the curves, one for the noised picture
    """

    def __init__(
        self,
        denoiser: Denoiser,
        levels: Levels,
        images: Tensor,
        labels: Tensor,
        names: Sequence[str],
        kind: str = "Picture",
        seed: int = 0,
    ):
        self.denoiser = denoiser
        self.images = images
        self.labels = labels
        self.names = tuple(names)
        self.kind = kind
        self.bayes = Held.seeded(BayesClassifier(denoiser, levels), seed)
        self.levels = levels
        one = OneCallClassifier(denoiser, float(levels.sigma[0]))
        self.noise = one.sample_noise(1, torch.Generator().manual_seed(seed + 1))
        self._measured: dict[int, Tensor] = {}
        self._answered: dict[tuple[int, float], tuple[Tensor, Tensor]] = {}

    def curves(self, index: int) -> Tensor:
        """The losses of a picture, measured once. Shapes: -> [K,T]."""
        if index not in self._measured:
            with torch.no_grad():
                losses = self.bayes.classifier.losses(
                    self.images[index : index + 1], self.bayes.noise
                )
            self._measured[index] = losses[0]
        return self._measured[index]

    def at(self, index: int, sigma: float) -> dict:
        """The frame of one picture at one noise level."""
        heads, null = self.answers(index, sigma)
        of_levels = f"The losses at {len(self.levels)} levels say"
        return self._frame(index, sigma, heads, null, self.curves(index), self.levels, of_levels)

    def moving(self, index: int, sigma: float) -> dict | None:
        """The frame from one call alone, whose loss stands for all levels; None where the others are measured already.

        Why         the call that the heads are shown of also measures each class at its own level, for nothing
        """
        if index in self._measured:
            return None
        heads, null = self.answers(index, sigma)
        z = units.to_model(self.images[index])
        losses = (heads[0] - z).square().flatten(1).sum(1, keepdim=True)
        level = Levels(
            torch.tensor([sigma], dtype=torch.float64),
            self.levels.lower[:1],
            self.levels.upper[-1:],
        )
        of_levels = "The losses of this call alone say"
        return self._frame(index, sigma, heads, null, losses, level, of_levels)

    def answers(self, index: int, sigma: float) -> tuple[Tensor, Tensor]:
        """A picture's noised copy, denoised under each class and without one. Shapes: -> [1,K,C,H,W], [1,C,H,W]."""
        if _key(index, sigma) not in self._answered:
            self._ask(index, [sigma])
        return self._answered[_key(index, sigma)]

    def ahead(self, index: int, sigma: float, wanted: Sequence[float]) -> bool:
        """Ask about a picture at a few of the levels that are wanted, the nearest ones first; whether some are left."""
        lacking = [level for level in wanted if _key(index, level) not in self._answered]
        lacking.sort(key=lambda level: abs(math.log(level / sigma)))
        if lacking:
            self._ask(index, lacking[:TOGETHER])
        return len(lacking) > TOGETHER

    def _ask(self, index: int, levels: list[float]) -> None:
        """Keep what the network answers about a picture at some levels, in one call."""
        sigma = torch.tensor(levels).to(self.images)
        z = units.to_model(self.images[index : index + 1])
        noised = z + sigma[:, None, None, None] * self.noise.to(z)
        every = range(self.denoiser.num_classes + 1)
        with torch.no_grad():
            denoised = self.denoiser(noised, sigma, list(every))
        for level, answer in zip(levels, denoised[:, None], strict=True):
            self._answered[_key(index, level)] = (answer[:, :-1], answer[:, -1])
        while len(self._answered) > KEPT:
            del self._answered[next(iter(self._answered))]  # the oldest one

    def _frame(
        self,
        index: int,
        sigma: float,
        heads: Tensor,
        null: Tensor,
        losses: Tensor,
        levels: Levels,
        of_levels: str,
    ) -> dict:
        """Shapes: heads [1,K,C,H,W], null [1,C,H,W], losses [K,T] at T levels."""
        label = int(self.labels[index])
        by_losses = self.bayes.classifier.changed(levels=levels).logits_of(losses[None])
        by_losses = by_losses.softmax(1)[0]
        share = OneCallClassifier(self.denoiser, sigma).of_answers(heads, null).softmax(1)[0]
        away = (heads - null[:, None])[0].flatten(1).norm(dim=1)
        z = units.to_model(self.images[index])
        noised = z + sigma * self.noise[0]
        best = int(decided(share[None]))
        colours = figures.emphasis(share)
        shown = levels.sigma
        if len(levels) == 1:  # flat over all levels: it stands for them
            shown = self.levels.sigma
            losses = losses * (shown / sigma).to(losses) ** 2
        note = (
            f"One call at σ = {sigma:.2f} says <b>{self.names[best]}</b> with {float(share[best]):.2f} "
            f"({self.kind.lower()} of class {self.names[label]}); the nearest head to the one without a class is "
            f"{self.names[int(away.argmin())]}. {of_levels} "
            f"{self.names[int(decided(by_losses[None]))]} with {float(by_losses.max()):.3f}."
        )
        return figures.frame(
            [
                [
                    figures.tiles(
                        [z, noised / (1 + sigma)],
                        columns=2,
                        size=100,
                        low=-1,
                        high=1,
                        title=f"{self.kind} {index}",
                        captions=[self.names[label], f"σ = {sigma:.2f}"],
                        alt=f"A picture of class {self.names[label]} and its noised copy.",
                    ),
                    figures.tiles(
                        [*heads[0], null[0]],
                        columns=11,
                        size=64,
                        low=-1,
                        high=1,
                        title="Denoised as each class and without one, with the distance from the latter",
                        captions=[
                            *(
                                f"{n}\n{float(d):.2f}"
                                for n, d in zip(self.names, away, strict=True)
                            ),
                            "no class",
                        ],
                        borders=[*(None if c == OTHER else c for c in colours), figures.COLOURS[2]],
                        alt="The noised picture denoised under each class and without one, with distances.",
                    ),
                ],
                [
                    excess_curves(
                        losses,
                        best,
                        colours,
                        shown,
                        sigma,
                        names=self.names,
                    ),
                    figures.bars(
                        self.names,
                        share,
                        colours=colours,
                        marks=by_losses,
                        title="Posterior from one call (line: from the losses)",
                        xlabel="class",
                        texts=[f"{float(p):.2f}" if p >= 0.005 else "" for p in share],
                        alt=f"Posterior from one call; the largest is {self.names[best]} with {float(share[best]):.2f}.",
                        w=470,
                        h=230,
                    ),
                ],
            ],
            note,
        )


def _key(index: int, sigma: float) -> tuple[int, float]:
    """By what an answer is known: a slider's level is no other one for its last bits."""
    return index, round(math.log(sigma), 6)
