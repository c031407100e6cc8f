"""Losses of many images, kept one line each: stopped and resumed without loss, shared by any number of processes.

What is stored is not a verdict but what every verdict is made of, the losses [K,T] of each image: another weighting,
prior, temperature or subset of levels is then a sum (`Losses.logits`), not another run.
"""

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from diffclass import likelihood
from diffclass.classifiers.base import Held, Noise
from diffclass.classifiers.bayes import BayesClassifier
from diffclass.noise import Levels, Weighting, elbo_weight
from diffclass.storage import files

DIGITS = 6  # significant digits of a stored loss: a relative 1e-6, as far as float32 sums go


@dataclass(frozen=True, eq=False)
class Losses:
    """Stored losses, in the order of the images' indices.

    Shapes      index [N], labels [N], losses [N,K,T]; levels: the T noise levels; settings: what was chosen
    """

    index: Tensor
    labels: Tensor
    losses: Tensor
    levels: Levels
    settings: dict

    def logits(self, weighting: Weighting = elbo_weight) -> Tensor:
        """Logits under a uniform prior. Formula: -sum_t w_t losses_t. Shapes: -> [N,K] in nats for an ELBO weight."""
        return likelihood.evidence(self.losses, self.levels.to(self.losses), weighting)

    def hits(self, weighting: Weighting = elbo_weight) -> Tensor:
        """Which images are classified correctly. Shapes: -> [N] of booleans, ready for a paired test."""
        return self.logits(weighting).argmax(1) == self.labels

    def thinned(self, every: int) -> "Losses":
        """The same images with every `every`-th level, each standing for the span of those left out.

        Errors      ValueError unless `every` divides the number of levels
        """
        count = len(self.levels.sigma)
        if every < 1 or count % every:
            raise ValueError(f"expected a divisor of {count} levels, got {every}.")
        kept = slice(every // 2, None, every)
        levels = Levels(
            self.levels.sigma[kept],
            self.levels.lower[::every],
            self.levels.upper[every - 1 :: every],
        )
        return Losses(self.index, self.labels, self.losses[..., kept], levels, self.settings)


def measure(
    classifier: BayesClassifier,
    noise: Noise,
    images: Tensor,
    labels: Tensor,
    folder: str | Path,
    settings: dict,
    *,
    batch: int = 8,
    precision: str = "fp32",
) -> Iterator[tuple[int, int]]:
    """Measure the losses of the images that `folder` does not have yet, yielding (images done here, images to do here).

    Shapes      images [N,C,H,W] in [0,1], labels [N]; an image's index is its place in `images`; noise of one picture
    Precision   "fp32", or "bf16" for the network under autocast
    Randomness  none but the noise: results do not depend on batches, processes or interruptions
    Writes      folder/settings.json, and folder/losses-RANK.jsonl, flushed after each batch
    Errors      ValueError if the folder holds losses of other settings; RuntimeError if another run writes to it
    """
    Held(classifier, noise)  # raises unless it is one noise for all images
    accelerator = Accelerator()
    folder = Path(folder)
    grid = classifier.levels.to(torch.zeros(()))
    levels = dict(sigma=grid.sigma.tolist(), lower=grid.lower.tolist(), upper=grid.upper.tolist())
    chosen = json.loads(json.dumps({**settings, "levels": levels}, allow_nan=False))
    with files.locked(folder, accelerator.process_index):
        files.settle(folder, chosen, "losses measured")
        done = set(read(folder).index.tolist()) if any(folder.glob("losses-*.jsonl")) else set()
        accelerator.wait_for_everyone()  # nobody writes before everybody has read what is there
        todo = [i for i in range(len(images)) if i not in done]
        todo = todo[accelerator.process_index :: accelerator.num_processes]
        classifier = classifier.to(accelerator.device)
        path = folder / f"losses-{accelerator.process_index}.jsonl"
        files.mend(path)
        with open(path, "a") as file:
            for start in range(0, len(todo), batch):
                part = todo[start : start + batch]
                with torch.autocast(
                    accelerator.device.type, torch.bfloat16, enabled=precision == "bf16"
                ):
                    classifier, losses = losses_within_memory(
                        classifier, images[part].to(accelerator.device), noise
                    )
                for index, loss in zip(part, losses.cpu(), strict=True):
                    file.write(_line(index, int(labels[index]), loss))
                file.flush()
                yield start + len(part), len(todo)
        accelerator.wait_for_everyone()


def losses_within_memory(
    classifier: BayesClassifier, x: Tensor, noise: Noise
) -> tuple[BayesClassifier, Tensor]:
    """`classifier.losses(x, noise)` without gradient; when memory runs out, with half the chunk, until it fits.

    Shapes      x [B,C,H,W] -> the classifier with a chunk that fits, and [B,K,T]; the chunk changes memory and speed, never
                a value
    Errors      torch.OutOfMemoryError if a chunk of one does not fit
    """
    while True:
        try:
            with torch.no_grad():
                return classifier, classifier.losses(x, noise)
        except torch.OutOfMemoryError:
            if classifier.chunk <= 1:
                raise
            classifier = classifier.changed(chunk=max(1, classifier.chunk // 2)).to(x.device)
            warnings.warn(
                f"memory ran out; going on with {classifier.chunk} network inputs at once, same result.",
                stacklevel=2,
            )


def read(folder: str | Path) -> Losses:
    """Everything that the processes wrote into `folder`; an interrupted last line is left out.

    Errors      FileNotFoundError; ValueError for a line that is not one image's losses, or losses that contradict
    """
    folder = Path(folder)
    paths = sorted(folder.glob("losses-*.jsonl"))
    if not paths or not (folder / "settings.json").exists():
        raise FileNotFoundError(
            f"expected settings.json and losses-*.jsonl in {folder}, found "
            f"{sorted(p.name for p in folder.glob('*'))}; measure them with `diffclass evaluate`."
        )
    settings = files.settings_of(folder)
    levels = Levels(
        *(torch.tensor(settings["levels"][name]) for name in ("sigma", "lower", "upper"))
    )
    by_index: dict[int, tuple] = {}
    for path in paths:
        # what follows the last line end was interrupted
        finished = path.read_text().split("\n")[:-1]
        for number, line in enumerate(finished, start=1):
            try:
                row = json.loads(line)
                index = row["index"]
                label = row["label"]
                losses = torch.tensor(row["losses"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"line {number} of {path} does not hold the losses of an image ({error}); the other "
                    "lines are untouched: remove it, and the same command measures it again."
                ) from None
            if losses.ndim != 2 or losses.shape[1] != len(levels.sigma):
                raise ValueError(
                    f"expected losses of {len(levels.sigma)} levels on line {number} of {path}, got shape "
                    f"{list(losses.shape)}; is settings.json of another run?"
                )
            by_index[index] = (label, losses)
    if not by_index:
        return Losses(
            torch.zeros(0, dtype=torch.long),
            torch.zeros(0, dtype=torch.long),
            torch.zeros(0, 0, len(levels.sigma)),
            levels,
            settings,
        )
    index = torch.tensor(sorted(by_index))
    return Losses(
        index,
        torch.tensor([by_index[i][0] for i in index.tolist()]),
        torch.stack([by_index[i][1] for i in index.tolist()]),
        levels,
        settings,
    )


def _line(index: int, label: int, losses: Tensor) -> str:
    rows = [[float(f"{v:.{DIGITS}g}") for v in row] for row in losses.tolist()]
    return json.dumps(dict(index=index, label=label, losses=rows), allow_nan=False) + "\n"
