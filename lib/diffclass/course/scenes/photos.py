"""Frames of photographs: a picture, its ten measured loss curves, what a weighting and a band make of them."""

import torch
from torch import Tensor

from diffclass import likelihood
from diffclass.classifiers.base import check_logits, decided
from diffclass.course import figures
from diffclass.course.scenes.digits import excess_curves, posterior_bars
from diffclass.evaluation.measuring import Losses
from diffclass.noise import WEIGHTINGS, Weighting, discrete_elbo_weight, elbo_weight

SHORT = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def named(weighting: Weighting) -> str:
    """The name of a weighting, as the reader chooses it."""
    return next((name for name, one in WEIGHTINGS.items() if one is weighting), "another")


class PhotoScene:
    """Stored losses of pictures, shown one picture at a time. Nothing is run: every frame is a weighted sum.

    Shapes      images [N,3,H,W] in [0,1]; losses of images 0 to N-1
    """

    WEIGHTINGS = WEIGHTINGS

    def __init__(self, images: Tensor, losses: Losses, names: tuple[str, ...] = SHORT):
        if len(images) < len(losses.index) or int(losses.index.max()) >= len(images):
            raise ValueError(
                f"expected a picture for each of {len(losses.index)} stored losses, got {len(images)}."
            )
        self.images = images[losses.index]
        self.losses = losses
        self.names = names
        self.kind = "Generated" if losses.settings.get("world") == "gallery" else "Photo"

    def at(self, index: int, weighting: Weighting, band: tuple[int, int]) -> dict:
        """The frame of one picture under a weighting of the levels band[0] to band[1], both included."""
        label = int(self.losses.labels[index])
        number = int(self.losses.index[index])
        kept = slice(band[0], band[1] + 1)
        losses = self.losses.losses[index][:, kept]
        levels = self.losses.levels[kept].to(losses)
        logits = likelihood.evidence(losses, levels, weighting)
        share = torch.softmax(logits, 0)
        best, second = check_logits(logits[None])[0].topk(2).indices.tolist()
        colours = figures.emphasis(logits)
        others = logits.clone()
        others[label] = logits.min() - 1
        rival = int(decided(others[None]))
        terms = losses * weighting(levels)
        lead = terms[rival] - terms[label]  # nats for the true class, level by level
        unit = "nats" if weighting in (elbo_weight, discrete_elbo_weight) else "units"
        used = (
            f"{named(weighting)}, {len(levels.sigma)} levels, σ {float(levels.sigma.min()):.2g} to "
        )
        first = float(levels.sigma.min())
        last = float(levels.sigma.max())
        used = f"{named(weighting)} weighting, {len(levels.sigma)} levels from σ {first:.2g} to {last:.2g}"
        return figures.frame(
            [
                [
                    figures.tiles(
                        [self.images[index]],
                        columns=1,
                        size=176,
                        title=f"{self.kind} {number}: {self.names[label]}",
                        captions=[f"read as {self.names[best]}"],
                        borders=[None if best == label else figures.WRONG],
                        alt=f"A picture of class {self.names[label]}.",
                    ),
                    excess_curves(
                        losses, best, colours, levels.sigma, None, names=self.names, w=410, h=220
                    ),
                    posterior_bars(
                        share,
                        colours,
                        f"Posterior ({named(weighting)} weighting)",
                        names=self.names,
                        w=430,
                        h=220,
                    ),
                ],
                [
                    figures.bars(
                        [f"{float(s):.2g}" for s in levels.sigma],
                        lead,
                        range=None,
                        w=1040,
                        h=160,
                        colours=[figures.BEST if float(v) >= 0 else figures.WRONG for v in lead],
                        title=f"Nats for {self.names[label]} against {self.names[rival]}, level by level",
                        xlabel="noise level σ (model units)",
                        alt=f"What each level adds to the lead of {self.names[label]} over {self.names[rival]}.",
                    )
                ],
            ],
            f"With {used}: true class <b>{self.names[label]}</b>, read as <b>{self.names[best]}</b> with posterior "
            f"{float(share[best]):.3f}; {self.names[second]} is {float(logits[best] - logits[second]):.1f} "
            f"{unit} behind.",
        )
