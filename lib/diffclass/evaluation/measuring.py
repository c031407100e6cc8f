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
from diffclass.classifiers.base import Held, Noise, decided
from diffclass.classifiers.bayes import BayesClassifier
from diffclass.data.worlds import world_of
from diffclass.device import in_precision
from diffclass.noise import Levels, Weighting, elbo_weight
from diffclass.storage import files

CIFAR10_TEST = 10_000  # images, counted here because the data set need not be there
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
        """Which images are classified correctly. Shapes: -> [N] of booleans, ready for a paired test.

        Errors      those of `decided`, for logits that are not finite
        """
        return decided(self.logits(weighting)) == self.labels

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
    Errors      ValueError if the folder holds losses of other settings or those of `read`; RuntimeError if another run writes to it
    """
    Held(classifier, noise)  # raises unless it is one noise for all images
    accelerator = Accelerator()
    folder = Path(folder)
    grid = classifier.levels.to(torch.zeros(()))
    levels = dict(sigma=grid.sigma.tolist(), lower=grid.lower.tolist(), upper=grid.upper.tolist())
    chosen = json.loads(json.dumps({**settings, "levels": levels}, allow_nan=False))
    with files.locked(folder, accelerator.process_index):
        files.settle(folder, chosen, "losses measured")
        done = set()
        if any(folder.glob("losses-*.jsonl")):
            done = set(read(folder, labels).index.tolist())
        accelerator.wait_for_everyone()  # nobody writes before everybody has read what is there
        todo = [i for i in range(len(images)) if i not in done]
        todo = todo[accelerator.process_index :: accelerator.num_processes]
        classifier = classifier.to(accelerator.device)
        path = folder / f"losses-{accelerator.process_index}.jsonl"
        files.mend(path, b'{"index": ')
        for start in range(0, len(todo), batch):
            part = todo[start : start + batch]
            here = images[part].to(accelerator.device)
            with in_precision(precision, here):
                classifier, losses = losses_within_memory(classifier, here, noise)
            lines = []
            for index, loss in zip(part, losses.cpu(), strict=True):
                lines.append(_line(index, int(labels[index]), loss))
            files.append(path, "".join(lines).encode())
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


def read(folder: str | Path, labels: Tensor | None = None) -> Losses:
    """Everything that the processes wrote into `folder`; an interrupted last line is left out.

    Shapes      labels [N]: of the first images of the world, where they are known, to compare with
    Errors      FileNotFoundError; ValueError that names the line, for one that is not one image's losses: labels and indices
                out of range, an image twice, losses that are negative or not finite
    """
    with files.reading(f"stored losses in {folder}"):
        return _read(Path(folder), labels)


def _read(folder: Path, labels: Tensor | None) -> Losses:
    paths = sorted(folder.glob("losses-*.jsonl"))
    if not paths or not (folder / "settings.json").exists():
        raise FileNotFoundError(
            f"expected settings.json and losses-*.jsonl in {folder}, found "
            f"{sorted(p.name for p in folder.glob('*'))}; measure them with `diffclass evaluate`."
        )
    settings = files.settings_of(folder)
    levels = _levels(settings, folder)
    images = _images(settings)
    by_index: dict[int, tuple] = {}
    classes = None
    for path in paths:
        # what follows the last line end was interrupted
        finished = path.read_text().split("\n")[:-1]
        for number, line in enumerate(finished, start=1):
            where = f"line {number} of {path}"
            index, label, losses = _measured(line, where, levels)
            classes = classes or len(losses)
            if len(losses) != classes:
                raise ValueError(
                    f"expected losses of {classes} classes on {where}, as on the lines before, got {len(losses)}; {MENDED}."
                )
            if images is not None and index >= images:
                raise ValueError(
                    f"expected an image of {settings['world']}, from 0 to {images - 1}, on {where}, got {index}; {MENDED}."
                )
            if index in by_index:
                raise ValueError(
                    f"expected each image once, got image {index} again on {where}; {MENDED}."
                )
            if labels is not None and index < len(labels) and label != int(labels[index]):
                raise ValueError(
                    f"expected the label {int(labels[index])} of image {index} on {where}, got {label}; {MENDED}."
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


MENDED = "the file was changed by something else: remove the line, and the same command measures it again"


def _levels(settings: dict, folder: Path) -> Levels:
    """The noise levels of the settings. Errors: ValueError for settings without."""
    try:
        chosen = [torch.tensor(settings["levels"][name]) for name in ("sigma", "lower", "upper")]
        return Levels(*chosen)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"expected settings.json in {folder} to have noise levels, got one without ({type(error).__name__}: {error}); is "
            "it that of losses?"
        ) from None


def _images(settings: dict) -> int | None:
    """How many images the world of the settings has; None where they are drawn, or no world is named."""
    name = settings.get("world")
    if not isinstance(name, str):
        return None
    place = world_of(name)
    if place.law is not None:
        return None
    if place.kind == "cifar10" and not place.name.startswith("gallery"):
        return CIFAR10_TEST
    return len(world_of(name.partition(":")[0]).test()[1])


def _measured(line: str, where: str, levels: Levels) -> tuple[int, int, Tensor]:
    """Index, label and losses [K,T] of one line. Errors: ValueError that names it."""
    try:
        row = json.loads(line)
        index = row["index"]
        label = row["label"]
        losses = torch.tensor(row["losses"], dtype=torch.float32)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{where} does not hold the losses of an image ({error}); the other "
            "lines are untouched: remove it, and the same command measures it again."
        ) from None
    if losses.ndim != 2 or losses.shape[1] != len(levels.sigma):
        raise ValueError(
            f"expected losses of {len(levels.sigma)} levels on {where}, got shape "
            f"{list(losses.shape)}; is settings.json of another run?"
        )
    if type(index) is not int or index < 0:
        raise ValueError(
            f"expected the number of an image, from 0, on {where}, got {index!r}; {MENDED}."
        )
    if type(label) is not int or not 0 <= label < len(losses):
        raise ValueError(
            f"expected a label from 0 to {len(losses) - 1} on {where}, got {label!r}; {MENDED}."
        )
    if not bool(losses.isfinite().all()) or bool((losses < 0).any()):
        bad = losses[~(losses.isfinite() & (losses >= 0))]
        raise ValueError(
            f"expected finite losses that are not negative on {where}, got {float(bad[0])}; {MENDED}."
        )
    return index, label, losses


def _line(index: int, label: int, losses: Tensor) -> str:
    rows = [[float(f"{v:.{DIGITS}g}") for v in row] for row in losses.tolist()]
    return json.dumps(dict(index=index, label=label, losses=rows), allow_nan=False) + "\n"
