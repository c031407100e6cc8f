"""Frames of photographs: a picture, its ten measured loss curves, what a weighting and a band make of them."""

import torch
from torch import Tensor

from diffclass.course import figures
from diffclass.course.scenes.digits import excess_curves, posterior_bars
from diffclass.evaluation.measuring import Losses
from diffclass.noise import WEIGHTINGS, Levels, Weighting

SHORT = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


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
        losses = self.losses.losses[index]
        kept = slice(band[0], band[1] + 1)
        levels = Levels(
            *(
                part[kept]
                for part in (
                    self.losses.levels.sigma,
                    self.losses.levels.lower,
                    self.losses.levels.upper,
                )
            )
        )
        terms = losses[:, kept] * weighting(levels).to(losses)
        logits = -terms.sum(1)
        share = torch.softmax(logits, 0)
        best, second = logits.topk(2).indices.tolist()
        colours = figures.emphasis(logits)
        rival = int(torch.where(torch.arange(len(logits)) == label, -torch.inf, logits).argmax())
        lead = terms[rival] - terms[label]  # nats for the true class, level by level
        curves = excess_curves(losses[:, kept], best, colours, levels.sigma, None, w=430, h=250)
        for line in curves["series"]:
            line["label"] = line["label"] and self.names[int(line["label"])]
        posterior = posterior_bars(share, colours, "Posterior under this weighting", w=430, h=250)
        posterior["labels"] = list(self.names)
        return figures.frame(
            [
                figures.tiles(
                    [self.images[index]],
                    columns=1,
                    size=176,
                    title=f"{self.kind} {index}: {self.names[label]}",
                    captions=[f"read as {self.names[best]}"],
                    borders=[None if best == label else figures.WRONG],
                    alt=f"A picture of class {self.names[label]}.",
                ),
                curves,
                posterior,
                figures.bars(
                    [f"{float(s):.2g}" for s in levels.sigma],
                    lead,
                    range=None,
                    w=1060,
                    h=170,
                    colours=[figures.BEST if float(v) >= 0 else figures.WRONG for v in lead],
                    title=f"Nats for {self.names[label]} against {self.names[rival]}, level by level",
                    xlabel="noise level σ (model units)",
                    alt=f"What each level adds to the lead of {self.names[label]} over {self.names[rival]}.",
                ),
            ],
            f"True class <b>{self.names[label]}</b>, read as <b>{self.names[best]}</b> with posterior "
            f"{float(share[best]):.3f}; {self.names[second]} is {float(logits[best] - logits[second]):.1f} "
            f"{'nats' if weighting.__name__ in ('elbo_weight', 'discrete_elbo_weight') else 'units'} behind.",
        )
