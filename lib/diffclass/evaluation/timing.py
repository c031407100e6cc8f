"""What a picture's losses cost, here and by the loops that are published on the same network, and what a vote costs."""

import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import benchmark

from diffclass import likelihood, units
from diffclass.classifiers.base import Classifier
from diffclass.classifiers.bayes import BayesClassifier, bank_of
from diffclass.classifiers.smoothed import Smoothed
from diffclass.denoisers.base import Denoiser
from diffclass.device import in_precision
from diffclass.noise import NoiseBank

# What measures losses: denoiser, picture [1,C,H,W] in model space, bank of one sample a level -> [K,T]
Way = Callable[[Denoiser, Tensor, NoiseBank], Tensor]


def _square(denoised: Tensor, z: Tensor) -> Tensor:
    """Shapes: [...,C,H,W], [1,C,H,W] -> [...]."""
    return ((denoised - z) ** 2).flatten(-3).sum(-1)


def one_by_one(denoiser: Denoiser, z: Tensor, bank: NoiseBank) -> Tensor:
    """One class, one level, a batch of one picture: a plain loop.

    Source      as zero-shot diffusion classifiers are written down, Li et al. 2023
    Shapes      z [1,C,H,W] -> [K,T]
    """
    rows = []
    for k in range(denoiser.num_classes):
        row = []
        for t, sigma in enumerate(bank.sigma):
            noisy = z + sigma * bank.noise[t, 0]
            row.append(_square(denoiser(noisy, sigma, [k])[0, 0], z[0]))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def class_by_class(denoiser: Denoiser, z: Tensor, bank: NoiseBank) -> Tensor:
    """All levels of a class in one batch, as released codes do it. Shapes: z [1,C,H,W] -> [K,T]."""
    noisy = z + bank.sigma[:, None, None, None] * bank.noise[:, 0, 0]
    rows = [_square(denoiser(noisy, bank.sigma, [k])[:, 0], z) for k in range(denoiser.num_classes)]
    return torch.stack(rows)


def all_at_once(denoiser: Denoiser, z: Tensor, bank: NoiseBank) -> Tensor:
    """This library's: all levels and classes in one batch. Shapes: z [1,C,H,W] -> [K,T]."""
    return likelihood.diffusion_loss(denoiser, z, bank)[0]


WAYS: dict[str, Way] = {
    "one by one": one_by_one,
    "class by class": class_by_class,
    "all at once": all_at_once,
}


@dataclass(frozen=True)
class Timing:
    """One way to measure the losses of one picture.

    seconds     the median of the repetitions; spread: their interquartile range
    apart       the largest difference of its losses from those of the plain loop, relative to the largest loss
    """

    way: str
    seconds: float
    spread: float
    repetitions: int
    apart: float


def timings(
    classifier: BayesClassifier,
    picture: Tensor,
    *,
    precision: str = "fp32",
    seconds: float = 2.0,
    seed: int = 0,
) -> Iterator[Timing]:
    """Each way of `WAYS`, the plain loop first, on the device that the classifier is on.

    Shapes      picture [1,C,H,W] in [0,1]; each way is repeated for about so many seconds, after one call to warm up
    Randomness  the noise of one sample a level from `seed`, the same for every way
    Errors      ValueError for another number of samples than one, or of pictures
    """
    units.check_images(picture, classifier.image_shape)
    if len(picture) != 1 or classifier.samples != 1:
        raise ValueError(
            f"expected one picture and one noise sample a level, got {len(picture)} and {classifier.samples}; the loops "
            "that are published have no other."
        )
    drawn = classifier.sample_noise(1, torch.Generator().manual_seed(seed)).to(picture)
    bank = bank_of(classifier.levels.to(picture), drawn)
    z = units.to_model(picture)
    plain = None
    for name, way in WAYS.items():

        def run(way: Way = way) -> Tensor:
            with torch.no_grad(), in_precision(precision, z):
                return way(classifier.denoiser, z, bank).float()

        losses = run()
        plain = losses if plain is None else plain
        timer = benchmark.Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
        measured = timer.blocked_autorange(min_run_time=seconds)
        yield Timing(
            way=name,
            seconds=measured.median,
            spread=measured.iqr,
            repetitions=len(measured.times) * measured.number_per_run,
            apart=float((losses - plain).abs().max() / plain.abs().max()),
        )


def processor(about: Path = Path("/proc/cpuinfo")) -> str:
    """What the processor is called, where the system tells it; else its kind. Shapes: about: a file of "name : value"."""
    if about.exists():
        for line in about.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class VoteTiming:
    """What one classifier's votes cost on one picture.

    calls       network calls of a vote, at most
    vote        seconds of a vote, of many that are asked together: the median of the repetitions; spread: their
                interquartile range
    alone       seconds of a vote that is asked alone, as an answer is: the median
    """

    name: str
    calls: int
    vote: float
    spread: float
    alone: float
    repetitions: int

    def certify(self, votes: int) -> float:
        """Seconds of so many votes, all of them counted: their number times a vote."""
        return votes * self.vote


def vote_timings(
    classifiers: Mapping[str, Classifier],
    picture: Tensor,
    sigma_pixel: float,
    *,
    together: int = 100,
    precision: str = "fp32",
    seconds: float = 2.0,
    seed: int = 0,
) -> Iterator[VoteTiming]:
    """How long a vote of each classifier takes, on the device that it is on.

    Shapes      picture [1,C,H,W] in [0,1]; each is repeated for about so many seconds, after one call to warm up
    Randomness  the noise of the votes from `seed`
    Errors      those of `Smoothed.count`
    """
    for name, classifier in classifiers.items():
        smoothed = Smoothed(classifier, sigma_pixel)

        def run(votes: int, smoothed: Smoothed = smoothed) -> Tensor:
            with in_precision(precision, picture):
                *_, counts = smoothed.count(picture, seed, votes, together=together)
            return counts

        run(1)
        measured = {}
        for votes in (together, 1):
            timer = benchmark.Timer(
                "run(votes)",
                globals={"run": run, "votes": votes},
                num_threads=torch.get_num_threads(),
            )
            measured[votes] = timer.blocked_autorange(min_run_time=seconds)
        many = measured[together]
        yield VoteTiming(
            name=name,
            calls=classifier.calls,
            vote=many.median / together,
            spread=many.iqr / together,
            alone=measured[1].median,
            repetitions=len(many.times) * many.number_per_run,
        )
