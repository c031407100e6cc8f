"""Frames of real digits: the picture, its ten denoised versions, ten losses over sigma, the posterior."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffclass import data, likelihood, noise, units
from diffclass.classifiers.base import Held, check_logits, decided
from diffclass.course import figures
from diffclass.course.figures import BEST, OTHER, SECOND
from diffclass.denoisers.base import Denoiser
from diffclass.denoisers.exact import MixtureDenoiser
from diffclass.noise import NoiseBank
from diffclass.zoo import networks

CURVE_LEVELS = noise.log_levels(0.05, 5.0, 20)


class DigitScene:
    """One trained denoiser of digits and the test pictures; a frame is a digit at a noise level.

    What it shares with other scenes: `bayes_classifier`, which takes its noise as an argument, and `classifier`, the
    same with one noise held.
    Randomness  one held noise for the classifier, one fixed bank for the curves, one fixed noise for the picture
    """

    def __init__(self, denoiser: Denoiser, seed: int = 0, samples: int = 4):
        self.world = data.digits()
        self.denoiser = denoiser
        self.bayes_classifier = networks.digit_classifier(denoiser)
        self.classifier = Held.seeded(self.bayes_classifier, seed)
        self.curve_bank = NoiseBank.fixed(CURVE_LEVELS, denoiser.image_shape, samples, seed)
        self.eps = torch.randn(
            denoiser.image_shape, generator=torch.Generator().manual_seed(seed + 1)
        )
        self._measured: dict[int, tuple[Tensor, Tensor]] = {}

    def unconditional(self, z: Tensor) -> Tensor:
        """Losses [B,T] without a class of pictures [B,C,H,W] in model space, at the levels of the curves."""
        with torch.no_grad():
            return likelihood.diffusion_loss(
                self.denoiser, z, self.curve_bank, [self.denoiser.num_classes]
            )[:, 0]

    def losses(self, index: int) -> tuple[Tensor, Tensor]:
        """Loss curves [K,T] and logits [K] of a test digit, measured once."""
        if index not in self._measured:
            self._measured[index] = self.measured(self.world.test_images[index : index + 1])
        return self._measured[index]

    def measured(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Loss curves [K,T] and logits [K] of a picture [1,C,H,W]."""
        with torch.no_grad():
            curve = likelihood.diffusion_loss(self.denoiser, units.to_model(x), self.curve_bank)[0]
            return curve, self.classifier(x)[0]

    def at(self, index: int, sigma: float, picked: int | None = None) -> dict:
        """The frame of one test digit at one noise level; `picked` adds a class to look at."""
        x = self.world.test_images[index]
        label = int(self.world.test_labels[index])
        curve, logits = self.losses(index)
        share = torch.softmax(logits, 0)
        z = units.to_model(x)
        z_sigma = z + sigma * self.eps
        with torch.no_grad():
            denoised = self.denoiser(z_sigma[None], sigma)[0]
        error = ((denoised - z) ** 2).flatten(1).sum(1)
        best, second = check_logits(logits[None])[0].topk(2).indices.tolist()
        colours = figures.emphasis(logits)
        if picked is not None and picked not in (best, second):
            colours[picked] = figures.WRONG
        lead = float(logits[best] - logits[second])
        note = (
            f"Predicted <b>{best}</b> (label {label}) with posterior {float(share[best]):.3f}; runner-up {second} "
            f"is {lead:.1f} nats behind. At σ = {sigma:.2f} the denoised {best} misses the picture by "
            f"{float(error[best]):.2f}, the denoised {second} by {float(error[second]):.2f} (squared)."
        )
        return figures.frame(
            [
                [
                    figures.tiles(
                        [z, (z_sigma / (1 + sigma))],
                        columns=2,
                        size=96,
                        low=-1,
                        high=1,
                        title=f"Test digit {index}",
                        captions=[f"label {label}", f"σ = {sigma:.2f}"],
                        alt=f"A handwritten {label} and its noised copy.",
                    ),
                    figures.tiles(
                        denoised,
                        columns=10,
                        size=72,
                        low=-1,
                        high=1,
                        title="Denoised as if it were each class (click one)",
                        captions=[f"{k}\n{float(e):.2f}" for k, e in enumerate(error)],
                        pick=True,
                        borders=[None if c == OTHER else c for c in colours],
                        alt="The noised digit denoised under each of the ten classes, with squared errors.",
                    ),
                ],
                [
                    excess_curves(curve, best, colours, self.curve_bank.sigma, sigma),
                    posterior_bars(share, colours),
                ],
            ],
            note,
        )


def class_lines(
    values: Tensor,
    colours: list[str],
    names: Sequence[str] | None = None,
    filled: str | None = None,
) -> list[dict]:
    """One line for each class, the grey ones thin, without a label and first, so that colours lie on top.

    Shapes      values [K,T], K colours -> K series for `figures.curves`; what has the colour `filled` is filled
    """
    names = digit_names(values) if names is None else names
    grey_first = sorted(range(len(colours)), key=lambda k: colours[k] != OTHER)
    series = []
    for k in grey_first:
        grey = colours[k] == OTHER
        series.append(
            dict(
                y=values[k],
                colour=colours[k],
                label=None if grey else names[k],
                width=1 if grey else 2.4,
                fill=colours[k] == filled,
            )
        )
    return series


def digit_names(values: Tensor) -> list[str]:
    """The names 0, 1, 2, ... of the rows."""
    return [str(k) for k in range(len(values))]


def excess_curves(
    losses: Tensor,
    best: int,
    colours: list[str],
    sigmas: Tensor,
    cursor: float | None,
    names: Sequence[str] | None = None,
    ghost: Tensor | None = None,
    **more,
) -> dict:
    """Excess loss over the best class, per unit of ln sigma: the area under a curve is nats against that class.

    Shapes      losses [K,T], sigmas [T] -> a panel, with a line to drag where there is a cursor; ghost [K,T]: what the
                coloured curves are of the clean picture, drawn dotted
    """
    names = digit_names(losses) if names is None else names
    excess = excess_of(losses, best, sigmas)
    top = float(excess.max())
    xlabel = "noise level σ (model units)"
    before = []
    if cursor is not None:
        xlabel = "noise level σ (model units; drag)"
    if ghost is not None:
        xlabel = "noise level σ; dotted: clean"
        before = [
            dict(y=ghost[k], colour=colour, dash="2 3", opacity=0.8)
            for k, colour in enumerate(colours)
            if colour != OTHER
        ]
    return figures.curves(
        sigmas,
        before + class_lines(excess, colours, names, filled=SECOND),
        title="Evidence against each class (area = nats)",
        cursor=cursor,
        xlog=True,
        xlabel=xlabel,
        ylabel="excess loss / σ²",
        alt=f"Excess loss over class {names[best]} for every class against the noise level.",
        **{
            "w": 520,
            "h": 230,
            "yrange": (min(0.0, float(excess.min())), max(top * 1.05, 1e-3)),
            **more,
        },
    )


def excess_of(losses: Tensor, best: int, sigmas: Tensor) -> Tensor:
    """Excess loss over a class, per unit of ln sigma. Shapes: losses [K,T], sigmas [T] -> [K,T]."""
    return (losses - losses[best]) / sigmas**2


def posterior_bars(
    share: Tensor,
    colours: list[str],
    title: str = "Posterior p(class | picture)",
    names: Sequence[str] | None = None,
    **more,
) -> dict:
    """The posterior of ten classes. Shapes: share [K] -> a panel."""
    names = digit_names(share) if names is None else names
    best = int(decided(share[None]))
    return figures.bars(
        names,
        share,
        colours=colours,
        title=title,
        xlabel="class",
        texts=[f"{float(p):.2f}" if p >= 0.005 else "" for p in share],
        alt=f"Posterior; the largest is class {names[best]} with {float(share[best]):.2f}.",
        **{"w": 360, "h": 230, **more},
    )


class OptimalDigitsScene:
    """Notebook 04: the network against the optimal denoiser of the training set, on the same noised digit."""

    def __init__(self, denoiser: Denoiser, seed: int = 0):
        self.world = data.digits()
        self.denoiser = denoiser
        pictures = units.to_model(self.world.train_images).double()
        self.optimal = MixtureDenoiser.of_images(pictures, self.world.train_labels)
        self.eps = torch.randn(
            denoiser.image_shape, generator=torch.Generator().manual_seed(seed + 1)
        )

    def at(self, index: int, sigma: float, seen: bool) -> dict:
        """The frame of a training digit (`seen`) or a test digit at one noise level."""
        if seen:
            origin = "Training"
            images = self.world.train_images
            labels = self.world.train_labels
        else:
            origin = "Test"
            images = self.world.test_images
            labels = self.world.test_labels
        z = units.to_model(images[index])
        label = int(labels[index])
        z_sigma = (z + sigma * self.eps)[None]
        with torch.no_grad():
            pairs = {
                "the trained network": self.denoiser(z_sigma, sigma)[0],
                "the optimal denoiser": self.optimal(z_sigma, sigma)[0],
            }
        above, below = pairs
        panels = [
            figures.tiles(
                [z, z_sigma[0] / (1 + sigma)],
                columns=1,
                size=96,
                low=-1,
                high=1,
                title=f"{origin} digit {index}",
                captions=[f"label {label}", f"σ = {sigma:.2f}"],
                alt=f"A handwritten {label} and its noised copy.",
            )
        ]
        errors = []
        captions = []
        borders = []
        for denoised in pairs.values():
            error = ((denoised - z) ** 2).flatten(1).sum(1)
            errors.append(float(error[label]))
            best = int(error.argmin())
            captions += [f"{k}\n{float(e):.2f}" for k, e in enumerate(error)]
            borders += [BEST if k == best else None for k in range(10)]
        panels.append(
            figures.tiles(
                torch.cat(list(pairs.values())),
                columns=10,
                size=76,
                low=-1,
                high=1,
                title=f"Denoised as each class: above by {above}, below by {below}",
                captions=captions,
                borders=borders,
                alt=f"The digit denoised under ten classes by {above} and by {below}, with squared errors.",
            )
        )
        errors_text = f"network {errors[0]:.2f}, optimal denoiser {errors[1]:.2f}"
        memory = (
            "has this very picture in its memory."
            if seen
            else "has never seen this picture: it can only return mixtures of training digits."
        )
        note = f"Squared error under the true class: {errors_text}. The optimal denoiser {memory}"
        return figures.frame([panels], note)
