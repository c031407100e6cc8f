"""How a classifier comes to its answer about one picture: its logits, its losses, and the pictures that it makes.

One function a kind of classifier, and `look(...)` has the logits of `classifier(x, noise)`, whatever it shows beside them;
`glance(...)` is what can be said from a part of the calls.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import singledispatch

import torch
from torch import Tensor

from diffclass import units
from diffclass.classifiers.base import Classifier, Noise
from diffclass.classifiers.bayes import BayesClassifier
from diffclass.classifiers.idc import TranslationClassifier
from diffclass.classifiers.one_call import OneCallClassifier
from diffclass.classifiers.purified import PurifiedClassifier
from diffclass.classifiers.votes import MajorityVote
from diffclass.noise import Levels

NOTHING_DENOISED = "goes straight from pixels to logits: it makes no picture, and has no losses"
VOTES_ONLY = "only counts which class each draw of its noise names"


@dataclass(frozen=True)
class Lines:
    """A number for each class at several places, smaller for the class that fits: losses over sigma, distances over steps.

    Shapes      values [K,T], places [T], rising
    """

    values: Tensor
    places: Tensor
    title: str
    xlabel: str
    ylabel: str
    log: bool = False


@dataclass(frozen=True, eq=False)
class Look:
    """What a classifier says of one picture, and what it said on the way.

    Shapes      logits [K]; seen [1,C,H,W], the picture that a purifier handed on, None without one
    lines       None for what has no losses, with the reason in `why`
    calls       network calls that the answer took
    """

    logits: Tensor
    calls: int
    lines: Lines | None = None
    why: str = ""
    seen: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Made:
    """Pictures that a classifier makes, one for each class.

    Shapes      images [K,C,H,W] in [low, 1]; captions K
    """

    images: Tensor
    captions: tuple[str, ...]
    title: str
    calls: int
    low: float = -1.0


@singledispatch
def look(classifier: Classifier, x: Tensor, noise: Noise) -> Look:
    """The classifier's answer about one picture, as `classifier(x, noise)` gives it, with what led to it.

    Shapes      x [1,C,H,W] in [0,1], noise of one picture
    """
    return Look(classifier(x, noise)[0], classifier.calls, why=NOTHING_DENOISED)


@look.register
def _(classifier: BayesClassifier, x: Tensor, noise: Noise) -> Look:
    losses = classifier.losses(x, noise)
    if classifier.moments is None:
        logits = classifier.logits_of(losses)[0]
    else:  # the end term needs the picture
        logits = classifier(x, noise)[0]
    levels = classifier.levels.sigma
    lines = Lines(
        losses[0] / levels.to(losses) ** 2,
        levels,
        "Losses of the classes (excess over the best)",
        "noise level σ (model units; drag)",
        "excess loss / σ²",
        log=True,
    )
    return Look(logits, classifier.calls, lines)


@look.register
def _(classifier: OneCallClassifier, x: Tensor, noise: Noise) -> Look:
    heads, null = classifier.answers(x, noise)
    away = (heads - null[:, None]).flatten(2).norm(dim=2)[0]
    lines = Lines(
        away[:, None],
        torch.tensor([classifier.sigma]),
        f"Distance from the answer without a class, σ = {classifier.sigma:.2f}",
        "class",
        "distance",
    )
    return Look(classifier.of_answers(heads, null)[0], classifier.calls, lines)


@look.register
def _(classifier: TranslationClassifier, x: Tensor, noise: Noise) -> Look:
    walk = list(classifier.walk(x, noise))
    shares = classifier.translator.bridge.shares
    lines = Lines(
        torch.stack([step.distances[0] for step in walk[::-1]], dim=1),
        torch.stack([shares[step.t] for step in walk[::-1]]),
        "Distance to the ten labels (read right to left)",
        "share of the picture on the way to its label",
        "mean absolute difference",
    )
    return Look(-walk[-1].distances[0] / classifier.temperature, classifier.calls, lines)


@look.register
def _(classifier: PurifiedClassifier, x: Tensor, noise: Noise) -> Look:
    first, then = classifier.prepared(x, noise) or ((), ())
    seen = classifier.purifier(x, first).detach()
    behind = look(classifier.classifier, seen, then)
    return replace(behind, seen=seen, calls=classifier.calls)


@look.register
def _(classifier: MajorityVote, x: Tensor, noise: Noise) -> Look:
    return Look(classifier(x, noise)[0], classifier.calls, why=VOTES_ONLY)


@singledispatch
def made(
    classifier: Classifier, x: Tensor, noise: Noise, sigma: float, names: Sequence[str]
) -> Made | str:
    """The pictures that a classifier makes of one picture, or why it makes none.

    Shapes      x [1,C,H,W] in [0,1], noise of one picture; sigma: the noise level to look at, of which the nearest is
                taken that the classifier asks about; K names
    """
    return NOTHING_DENOISED


@made.register
def _(classifier: BayesClassifier, x, noise, sigma, names) -> Made:
    made, _, _ = _denoised(classifier, x, noise, sigma, names)
    return made


def _denoised(
    classifier: BayesClassifier, x: Tensor, noise: Noise, sigma: float, names: Sequence[str]
) -> tuple[Made, Tensor, float]:
    """What the first noise of the nearest level makes, the squared errors [K] of that, and the level."""
    levels = classifier.levels.sigma
    nearest = int((levels.log() - torch.tensor(sigma).log()).abs().argmin())
    level = levels[nearest].to(x)
    z = units.to_model(x)
    eps = classifier.prepared(x, noise)[:, nearest, 0]
    denoised = classifier.denoiser(z + level * eps, level)[0]
    error = (denoised - z).flatten(1).square().sum(1)
    captions = tuple(f"{n}\n{float(e):.2f}" for n, e in zip(names, error, strict=True))
    title = f"Denoised as each class, σ = {float(level):.2f}; squared error"
    calls = classifier.denoiser.calls(classifier.num_classes)
    return Made(denoised, captions, title, calls), error, float(levels[nearest])


@made.register
def _(classifier: OneCallClassifier, x, noise, sigma, names) -> Made:
    heads, null = classifier.answers(x, noise)
    away = (heads - null[:, None])[0].flatten(1).norm(dim=1)
    captions = tuple(f"{n}\n{float(d):.2f}" for n, d in zip(names, away, strict=True))
    title = "Denoised as each class; distance from the one without"
    return Made(heads[0], captions, title, classifier.calls)


@made.register
def _(classifier: TranslationClassifier, x, noise, sigma, names) -> Made:
    *_, last = classifier.walk(x, noise)
    distances = last.distances[0]
    labels = classifier.translator.labels
    captions = tuple(f"{n}\n{float(d):.2f}" for n, d in zip(names, distances, strict=True))
    title = "Label pictures; distance of the translation"
    return Made(labels, captions, title, classifier.calls, low=0.0)


@made.register
def _(classifier: MajorityVote, x, noise, sigma, names) -> str:
    return VOTES_ONLY


@made.register
def _(classifier: PurifiedClassifier, x, noise, sigma, names) -> Made | str:
    first, then = classifier.prepared(x, noise) or ((), ())
    seen = classifier.purifier(x, first).detach()
    return made(classifier.classifier, seen, then, sigma, names)


@singledispatch
def glance(
    classifier: Classifier, x: Tensor, noise: Noise, sigma: float, names: Sequence[str]
) -> tuple[Look, Made] | None:
    """A lesser answer for a slider that moves, and the pictures behind it; None where the whole answer is no dearer.

    Shapes      as for `made`
    """
    return None


@glance.register
def _(classifier: BayesClassifier, x, noise, sigma, names) -> tuple[Look, Made] | None:
    """One noise of one level stands for all levels: its error over sigma^2 is taken as the same at each."""
    levels = classifier.levels
    if len(levels) == 1:
        return None
    made, error, level = _denoised(classifier, x, noise, sigma, names)
    alone = Levels(
        torch.tensor([level], dtype=levels.sigma.dtype), levels.lower[:1], levels.upper[-1:]
    )
    logits = classifier.changed(levels=alone).logits_of(error[None, :, None])[0]
    lines = Lines(
        (error / level**2)[:, None].expand(-1, len(levels)),
        levels.sigma,
        f"Losses (excess), of σ = {level:.2f} alone",
        "noise level σ (model units; drag)",
        "excess loss / σ²",
        log=True,
    )
    return Look(logits, made.calls, lines), made
