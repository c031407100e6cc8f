"""Frames of one digit under an adapter: its losses with and without it, at a step of the training, by a rank."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffclass import attacks, data, zoo
from diffclass.classifiers.base import Held, decided
from diffclass.course import figures
from diffclass.course.figures import BEST, COLOURS, OTHER, SECOND, WRONG
from diffclass.denoisers.base import Denoiser
from diffclass.denoisers.lora import Adapter
from diffclass.storage.results import Record
from diffclass.training.adapting import BUDGET, EVERY, THROUGH_ANOTHER, THROUGH_ITSELF
from diffclass.zoo import networks

LAST = 400  # steps of the two recipes
ATTACK_STEPS = 10
TOP = 40.0  # nats that the bars show

CLEAN = "nothing"
ANOTHER = "another network (transfer)"
ITSELF = "this network (white-box)"


def weights_of(method: str, step: int) -> str:
    """The file of a recipe's adapter after so many steps."""
    file = networks.TRUTH["digits"][method]
    return file if step == LAST else networks.along(file, step)


class AdapterScene:
    """A base, the adapters of two recipes along their training, and test digits before and after attacks.

    Shapes      records: those of `training.adapting.follow` about the two recipes' variants, for the curves
    Randomness  one held noise for all classifiers
    """

    RECIPES = {  # in words: the method, and the variant of the records
        "truth alone (TMDC)": ("tmdc", "truth, by transfer"),
        "truth against the others (contrastive)": ("tmdc-contrastive", "contrast, white-box"),
    }
    THREATS = (CLEAN, ANOTHER, ITSELF)

    def __init__(self, base: Denoiser, records: Sequence[Record], seed: int = 0):
        self.world = data.digits()
        self.base = base
        self.seed = seed
        self.records = [record for record in records if record.seed == 0]
        self.surrogate = zoo.classifier("digits", "cnn")
        self.plain = self.held(base)
        self.adapters = {  # by recipe and step: read at once, so that no slider waits for a file
            (recipe, step): Adapter.load(base, networks.trained(weights_of(method, step)))
            for recipe, (method, _) in self.RECIPES.items()
            for step in range(EVERY, LAST + 1, EVERY)
        }
        self._made: dict[tuple, Held] = {}
        self._fooled: dict[tuple, Tensor] = {}

    def held(self, denoiser: Denoiser) -> Held:
        """The course's diffusion classifier of a denoiser, with the noise of this scene."""
        return Held.seeded(networks.digit_classifier(denoiser), self.seed)

    def classifier(self, recipe: str, step: int, rank: int) -> Held:
        """The classifier whose adapter was trained for so many steps, and then cut down to a rank; made once."""
        if step == 0:
            return self.plain
        key = (recipe, step, rank)
        if key not in self._made:
            adapter = self.adapters[recipe, step]
            lower = adapter if rank == adapter.rank else adapter.truncated(rank)
            self._made[key] = self.held(lower.merged())
        return self._made[key]

    def fooling(self, index: int, threat: str, shown: Held) -> Tensor:
        """A test digit after PGD through the plain network or the shown one. Shapes: -> [1,1,8,8]."""
        x = self.world.test_images[index : index + 1]
        if threat == CLEAN:
            return x
        climbed = self.surrogate if threat == ANOTHER else shown
        key = (index, climbed)
        if key not in self._fooled:
            y = self.world.test_labels[index : index + 1]
            *_, last = attacks.pgd(climbed, x, y, BUDGET, steps=ATTACK_STEPS)
            self._fooled[key] = last.x.detach()
        return self._fooled[key]

    def curve(self, recipe: str, metric: str, attack: str | None = None) -> list[Record]:
        """The records of a metric along a recipe's training, in the order of its steps."""
        own = [
            record
            for record in self.records
            if record.settings["variant"] == self.RECIPES[recipe][1]
            and record.metric == metric
            and record.attack == attack
        ]
        return sorted(own, key=lambda record: record.settings["step"])

    def at(self, index: int, recipe: str, step: int, rank: int, threat: str) -> dict:
        """The frame of one test digit."""
        shown = self.classifier(recipe, step, rank)
        x = self.fooling(index, threat, shown)
        label = int(self.world.test_labels[index])
        with torch.no_grad():
            before = -self.plain(x)[0]
            after = -shown(x)[0]
        said = int(decided(-after[None]))
        others = after.clone()
        others[label] = torch.inf
        gap = float(others.min() - after[label])
        colours = [OTHER] * len(after)
        colours[said] = WRONG
        colours[label] = BEST
        clean = self.world.test_images[index]
        panels = [
            figures.tiles(
                [clean, x[0]],
                columns=1,
                size=104,
                title=f"Test digit {index}",
                captions=[f"label {label}", f"now {said}"],
                borders=[None, None if said == label else WRONG],
                alt=f"A handwritten {label}, clean and as it is asked about; the answer is {said}.",
            ),
            figures.bars(
                range(len(after)),
                (after - after.min()).clamp(max=TOP),
                colours=colours,
                marks=(before - before.min()).clamp(max=TOP),
                range=(0, TOP),
                title="Loss above the smallest",
                xlabel="class (line: without the adapter)",
                w=290,
                alt=f"Loss of every class above the smallest; the truth {label} is at "
                f"{float(after[label] - after.min()):.1f} nats.",
            ),
            self._losses(recipe, step),
            self._threats(recipe, step),
        ]
        return figures.frame([panels], self._note(label, said, gap, before, step, rank, threat))

    def _losses(self, recipe: str, step: int) -> dict:
        """How the truth and its best rival fare along the training, both from where they began."""
        truth = self.curve(recipe, "loss of the truth")
        rival = self.curve(recipe, "loss of the best other class")
        start = truth[0].value
        lines = [
            dict(y=[r.value - start for r in rival], colour=SECOND, label="best other class"),
            dict(y=[r.value - start for r in truth], colour=BEST, label="truth", width=2.5),
        ]
        return figures.curves(
            [r.settings["step"] for r in truth],
            lines,
            title=f"Mean loss, {truth[0].n} transfers",
            xlabel="training step",
            ylabel="nats from the truth at 0",
            cursor=step,
            w=310,
            alt="Loss of the true class and of its best rival along the training.",
        )

    def _threats(self, recipe: str, step: int) -> dict:
        """Two threat models side by side."""
        kinds = [
            ("clean", None, COLOURS[2], None),
            ("through another network", THROUGH_ANOTHER, BEST, None),
            ("through itself", THROUGH_ITSELF, WRONG, "6 3"),
        ]
        lines = []
        for label, attack, colour, dash in kinds:
            own = self.curve(recipe, "accuracy", attack)
            lines.append(
                dict(
                    y=[r.value for r in own],
                    colour=colour,
                    dash=dash,
                    label=f"{label} ({own[0].n})",
                    width=2,
                )
            )
        return figures.curves(
            [r.settings["step"] for r in own],
            lines,
            title="Two threat models (digits)",
            xlabel="training step",
            ylabel="share of digits right",
            yrange=(0, 1.05),
            cursor=step,
            legend="bottom",
            w=310,
            alt="Accuracy clean, by transfer and white-box along the training.",
        )

    def _note(
        self,
        label: int,
        said: int,
        gap: float,
        before: Tensor,
        step: int,
        rank: int,
        threat: str,
    ) -> str:
        plain = int(decided(-before[None]))
        verdict = "right" if said == label else "wrong"
        attacked = (
            "clean" if threat == CLEAN else f"within {BUDGET:g} of each pixel, through {threat}"
        )
        adapter = f"an adapter of {step} steps and rank {rank}" if step else "no adapter"
        return (
            f"The digit, {attacked}: with {adapter} the classifier says <b>{said}</b>, {verdict} (label {label}), and the "
            f"truth is {abs(gap):.1f} nats {'below' if gap >= 0 else 'above'} the best other class. Without the adapter the same "
            f"picture is called {plain}."
        )
