"""Accuracy on clean images, as records with intervals."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffclass import noise, units, zoo
from diffclass.classifiers.base import Classifier, Held, decided
from diffclass.classifiers.bayes import BayesClassifier
from diffclass.data.worlds import World, world_of
from diffclass.evaluation import measuring
from diffclass.storage import assets, results
from diffclass.zoo import networks

SOURCE = "diffclass evaluate"


def hits(
    classifier: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, batch: int = 100
) -> Iterator[tuple[int, int]]:
    """Classify batch by batch, yielding how many are correct of how many seen so far, so that a caller can show it.

    Shapes      classifier: a function of the pixels alone (`Held`, `Fresh`, or a deterministic one); images [N,C,H,W] in
                [0,1], labels [N]
    Errors      those of `decided`, for logits that are not finite, whose argmax would count as a class
    """
    correct = 0
    for start in range(0, len(images), batch):
        with torch.no_grad():
            logits = classifier(images[start : start + batch])
        correct += int((decided(logits) == labels[start : start + batch]).sum())
        yield correct, min(start + batch, len(images))


def accuracy(
    classifier: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, batch: int = 100
) -> int:
    """How many of the images are classified correctly. Shapes: images [N,C,H,W] in [0,1], labels [N] -> a count."""
    return max((correct for correct, _ in hits(classifier, images, labels, batch)), default=0)


@dataclass(frozen=True, eq=False)
class Trial:
    """A classifier, the labelled images it is to be measured on, and everything that was chosen, for a record.

    name        of the classifier; detail: which denoiser and weighting, in words
    optimal     how many of the images the exact posterior classifies correctly; None where no law is known
    checkpoint  SHA-256 of the weights; None for closed forms
    """

    world: World
    name: str
    classifier: Classifier
    images: Tensor
    labels: Tensor
    settings: dict
    seed: int
    detail: str = ""
    checkpoint: str | None = None
    optimal: int | None = None

    @property
    def held(self) -> Held:
        """The classifier with one noise, from the seed, for all images."""
        return Held.seeded(self.classifier, self.seed)


def bayes_trial(
    world: str = "digits",
    model: str | None = None,
    limit: int | None = None,
    levels: int = 16,
    weighting: str = "ELBO",
    seed: int = 0,
) -> Trial:
    """A diffusion classifier by its denoiser, number of levels and weighting, on the first images of a world.

    Randomness  noise and points from `seed`; `limit` takes the first test images (their order is a random permutation)
    Errors      ValueError for a name that does not exist; those of `load_denoiser` and `cifar.cifar10`
    """
    place = world_of(world)
    weighting = units.chosen(weighting, list(noise.WEIGHTINGS), "the weighting")
    settings = dict(world=place.name, levels=levels, samples=1, weighting=weighting)
    own = dict(world=place, name="dc", seed=seed)
    if place.law is not None:
        if model is not None:
            raise ValueError(
                f"expected no model for {place.name}, got {model!r}; its denoiser is exact."
            )
        samples = networks.LAW_SAMPLES[place.kind]
        classifier = networks.plane_classifier(
            place.law, levels, noise.WEIGHTINGS[weighting], samples
        )
        images, labels = place.test(limit, seed)
        best = (decided(place.law.posterior(images)) == labels).sum()
        return Trial(
            classifier=classifier,
            images=images,
            labels=labels,
            settings={
                **settings,
                "sigma": list(networks.PLANE_RANGE),
                "model": "exact",
                "samples": samples,
            },
            detail=f"exact denoiser, {weighting} weights",
            optimal=int(best),
            **own,
        )
    denoiser, file = networks.load(place.kind, model)
    name = file.partition(".")[0].partition("-")[2]
    span = networks.range_of(file)
    images, labels = place.test(limit, seed)
    return Trial(
        classifier=BayesClassifier(
            denoiser, noise.log_levels(*span, levels), 1, noise.WEIGHTINGS[weighting]
        ),
        images=images,
        labels=labels,
        settings={**settings, "sigma": list(span), "model": name},
        detail=f"{name} denoiser, {weighting} weights",
        checkpoint=assets.fingerprint(file),
        **own,
    )


def named_trial(world: str, name: str, limit: int | None = None, seed: int = 0) -> Trial:
    """A classifier of the registry on the first images of a world. Errors: those of `zoo.classifier`."""
    place = world_of(world)
    images, labels = place.test(limit, seed)
    checkpoints = zoo.checkpoints(world, name)
    return Trial(
        world=place,
        name=zoo.entry_of(world, name).name,
        classifier=zoo.classifier(world, name),
        images=images,
        labels=labels,
        settings=dict(world=place.name, checkpoints=checkpoints),
        seed=seed,
        checkpoint=next(iter(checkpoints.values())) if len(checkpoints) == 1 else None,
    )


def records_of(trial: Trial, correct: int) -> list[results.Record]:
    """The measured accuracy as a record, followed by the optimal one of the same points where it is known."""
    n = len(trial.labels)
    common = dict(world=trial.world.name, seed=trial.seed, source=SOURCE)
    measured = results.accuracy_record(
        correct,
        n,
        classifier=trial.name,
        settings=trial.settings,
        checkpoint=trial.checkpoint,
        detail=trial.detail,
        **common,
    )
    if trial.optimal is None:
        return [measured]
    best = results.accuracy_record(
        trial.optimal, n, classifier="exact", settings={"world": trial.world.name}, **common
    )
    return [measured, best]


def store_settings(trial: Trial, precision: str) -> dict:
    """What stored losses depend on: everything but the weighting, which is applied to them afterwards."""
    own = {key: value for key, value in trial.settings.items() if key != "weighting"}
    return {**own, "seed": trial.seed, "checkpoint": trial.checkpoint, "precision": precision}


def stored_records(trial: Trial, losses: measuring.Losses) -> list[results.Record]:
    """The accuracy under every weighting, from the same stored losses."""
    listed = []
    for name, weighting in noise.WEIGHTINGS.items():
        own = replace(
            trial,
            labels=losses.labels,
            optimal=None,
            settings={**trial.settings, "weighting": name},
            detail=f"{trial.settings['model']} denoiser, {name} weights",
        )
        listed += records_of(own, int(losses.hits(weighting).sum()))
    return listed
