"""Exercises of notebook 13: the weight of a flow's velocity error, the bill of an elimination, several prompts of a class."""

import math

import torch
from torch import Tensor

from diffclass.course.exercises.base import Exercise, Mistake, normal


def _times(seed: int, count: int) -> Tensor:
    """Times strictly between 0 and 1."""
    return torch.rand(
        count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).clamp(0.02, 0.98)


VELOCITY_WEIGHT = Exercise(
    key="13-velocity-weight",
    prompt="Return the weight [N] on the squared velocity error at times t [N] in (0,1), for an integral over dt, by which an "
    "exact flow answers as Bayes' rule does.",
    reference=lambda t: (1 - t) / t,
    cases=lambda: [(_times(0, 5),), (_times(1, 20),)],
    mistakes=(
        Mistake(
            lambda t: torch.ones_like(t),
            "that is the loss that velocities are trained by; the density asks for sigma^-3 of the error of D",
        ),
        Mistake(
            lambda t: t**2,
            "that weighs the errors of D alike at all times: sigma^-3 is missing",
        ),
        Mistake(
            lambda t: (1 - t) ** 2,
            "that weighs the errors of the noise alike, as Li's code does on a chain; it is no density",
        ),
        Mistake(
            lambda t: (1 - t) / t**3,
            "that is the weight on the error of D; one velocity error is t^2 times smaller or larger than it",
        ),
        Mistake(
            lambda t: (1 - t) ** 3 / t,
            "sigma^-3 and t^2 are there; what is d sigma in terms of dt?",
        ),
        Mistake(
            lambda t: t / (1 - t),
            "upside down: the densities differ where there is little noise, so small t must count more",
        ),
    ),
    meaning="(1 - t)/t grows without bound as t falls: a flow's small times decide, and a training loss hardly looks there.",
)


def _bill(classes: int, counts, keep, templates: int) -> float:
    total = classes * counts[0]
    for j in range(1, len(counts)):
        total += keep[j - 1] * (counts[j] - counts[j - 1])
    return float(templates * total)


def _anew(classes: int, counts, keep, templates: int) -> float:
    left = (classes, *keep[:-1])
    return float(templates * sum(k * n for k, n in zip(left, counts, strict=True)))


def _own_survivors(classes: int, counts, keep, templates: int) -> float:
    new = (n - before for n, before in zip(counts, (0, *counts), strict=False))
    return float(templates * sum(k * n for k, n in zip(keep, new, strict=True)))


STAGED_BILL = Exercise(
    key="13-staged-bill",
    prompt="Return the network evaluations of a staged elimination of `classes` classes with `templates` prompts each: stage j "
    "ends with counts[j] levels measured in all, and keeps keep[j] classes.",
    reference=_bill,
    cases=lambda: [
        (10, (50, 500), (5, 1), 1),
        (10, (50, 500), (5, 1), 3),
        (102, (20, 70, 150, 500), (20, 10, 5, 1), 1),
        (1000, (50, 150, 550, 1000), (500, 50, 10, 1), 2),
    ],
    mistakes=(
        Mistake(
            _anew,
            "you pay for levels twice: what a class was measured at in an earlier stage is not measured again",
        ),
        Mistake(
            _own_survivors,
            "a stage asks the classes that the stage before it has left, and the first one asks all",
        ),
        Mistake(
            lambda classes, counts, keep, templates: float(templates * classes * counts[-1]),
            "that is the bill without any elimination",
        ),
        Mistake(
            lambda classes, counts, keep, templates: float(_bill(classes, counts, keep, 1)),
            "every template is a prompt of its own, and asks the network for itself",
        ),
        Mistake(
            lambda classes, counts, keep, templates: float(templates * classes * counts[0]),
            "the later stages cost something too",
        ),
    ),
    meaning="2 750 of 5 000 for ten classes; with a thousand the first stage alone is 50 000.",
)


TEMPLATE_EVIDENCE = Exercise(
    key="13-template-evidence",
    prompt="losses [B,K,P] are -ln p(z | prompt) of P equally likely prompts of each class; return ln p(z | class) [B,K].",
    reference=lambda losses: torch.logsumexp(-losses, 2) - math.log(losses.shape[2]),
    cases=lambda: [(3 * normal(0, 4, 3, 2),), (5 * normal(1, 2, 5, 4) + 60,)],
    mistakes=(
        Mistake(
            lambda losses: -losses.mean(2),
            "a mean of logarithms is the logarithm of a geometric mean: one prompt that does not fit drags its class down",
        ),
        Mistake(
            lambda losses: -losses.amin(2),
            "the best prompt alone: a class with many prompts would win by having many tries",
        ),
        Mistake(
            lambda losses: torch.logsumexp(-losses, 2),
            "each of the P prompts has only its share of the class",
        ),
        Mistake(
            lambda losses: torch.logsumexp(losses, 2) - math.log(losses.shape[2]),
            "a loss is minus a log-density: mind the sign before the exponential",
        ),
        Mistake(
            lambda losses: torch.softmax(-losses, 2).mean(2).log(),
            "a softmax over the prompts of one class forgets how well the class fits at all",
        ),
    ),
    meaning="Prompts of a class are alternatives, and alternatives add up as probabilities, not as losses.",
)
