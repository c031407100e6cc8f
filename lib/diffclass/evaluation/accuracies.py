"""Accuracy on clean images, as records with intervals."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from diffclass import intervals, noise
from diffclass.classifiers.bayes import BayesClassifier
from diffclass.data.worlds import test_pictures
from diffclass.evaluation import measuring
from diffclass.storage import assets, results
from diffclass.zoo.networks import (
    CLASSIFIERS,
    PLANE_RANGE,
    PLANE_SAMPLES,
    chosen,
    load,
    plane_classifier,
    plane_law,
)


def hits(
    classifier, images: torch.Tensor, labels: torch.Tensor, batch: int = 100
) -> Iterator[tuple[int, int]]:
    """Classify batch by batch, yielding how many are correct of how many seen so far, so that a caller can show it.

    Shapes      images [N,C,H,W] in [0,1], labels [N]
    """
    correct = 0
    for start in range(0, len(images), batch):
        with torch.no_grad():
            answers = classifier(images[start : start + batch]).argmax(1)
        correct += int((answers == labels[start : start + batch]).sum())
        yield correct, min(start + batch, len(images))


def accuracy(classifier, images: torch.Tensor, labels: torch.Tensor, batch: int = 100) -> int:
    """How many of the images are classified correctly. Shapes: images [N,C,H,W] in [0,1], labels [N] -> a count."""
    return max((correct for correct, _ in hits(classifier, images, labels, batch)), default=0)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A classifier, the labelled images it is to be measured on, and everything that was chosen, for a record.

    optimal     how many of the images the exact posterior classifies correctly; None where no law is known
    checkpoint  SHA-256 of the weights; None for closed forms
    """

    classifier: BayesClassifier
    images: torch.Tensor
    labels: torch.Tensor
    settings: dict
    checkpoint: str | None = None
    optimal: int | None = None


def evaluation(
    world: str = "digits",
    model: str | None = None,
    limit: int | None = None,
    levels: int = 16,
    weighting: str = "ELBO",
    seed: int = 0,
) -> Evaluation:
    """Prepare the measurement of an accuracy on "digits", "cifar10", the "gallery", "digits:blur-3" or "plane:moons".

    Randomness  noise and points from `seed`; `limit` takes the first test images (their order is a random permutation)
    Errors      ValueError for a name that does not exist; those of `load_denoiser` and `cifar.cifar10`
    """
    weighting = chosen(weighting, list(noise.WEIGHTINGS), "the weighting")
    rule = noise.WEIGHTINGS[weighting]
    kind, _, detail = world.partition(":")
    kind = chosen(kind, ("digits", "plane", "cifar10", "gallery"), "the world")
    if kind == "plane":
        law = plane_law(detail)
        if model is not None:
            raise ValueError(
                f"expected no model for the plane, got {model!r}; its denoiser is exact."
            )
        images, labels = law.sample(limit or 1000, torch.Generator().manual_seed(seed))
        classifier = plane_classifier(law, levels, seed, rule)
        optimal = int((law.posterior(images).argmax(1) == labels).sum())
        settings = dict(
            world=f"plane:{law.name}",
            model="exact",
            levels=levels,
            sigma=list(PLANE_RANGE),
            samples=PLANE_SAMPLES,
            weighting=weighting,
        )
        return Evaluation(classifier, images, labels, settings, optimal=optimal)
    denoiser, file = load("digits" if kind == "digits" else "cifar10", model)
    name = file.partition(".")[0].partition("-")[2]
    make, span = CLASSIFIERS["digits" if kind == "digits" else "cifar10"]
    settings = dict(
        world=f"{kind}:{detail}" if detail else kind,
        model=name,
        levels=levels,
        samples=1,
        weighting=weighting,
        sigma=list(span),
    )
    classifier = make(denoiser, noise.log_levels(*span, levels), seed=seed, weighting=rule)
    return Evaluation(
        classifier, *test_pictures(kind, detail, limit, seed), settings, assets.fingerprint(file)
    )


def records(trial: Evaluation, correct: int, seed: int) -> list[results.Record]:
    """The measured accuracy as a record, followed by the optimal one of the same points where it is known."""
    n = len(trial.labels)
    settings = trial.settings
    kind, _, detail = settings["world"].partition(":")
    where = {
        "digits": f"{n} test digits",
        "cifar10": f"the first {n} test images of CIFAR-10",
        "gallery": f"{n} pictures that such a network drew itself",
    }.get(kind)
    worse = f", made worse by {detail}" if detail else ""
    where = where + worse if where else f"{n} points of {settings['world']}"
    how = f"{settings['model']} denoiser, {settings['weighting']} weights"
    counts = [(f"accuracy of the diffusion classifier ({how}) on {where}", correct, settings)]
    if trial.optimal is not None:
        counts.append(
            (
                f"accuracy of the exact posterior on {where}",
                trial.optimal,
                {"world": settings["world"]},
            )
        )
    return [
        results.accuracy_record(
            count,
            n,
            what,
            intervals.interval(count, n),
            settings=own,
            seed=seed,
            source="diffclass evaluate",
            checkpoint=trial.checkpoint,
        )
        for what, count, own in counts
    ]


def store_settings(trial: Evaluation, seed: int, precision: str) -> dict:
    """What stored losses depend on: everything but the weighting, which is applied to them afterwards."""
    own = {key: value for key, value in trial.settings.items() if key != "weighting"}
    return {**own, "seed": seed, "checkpoint": trial.checkpoint, "precision": precision}


def stored_records(trial: Evaluation, losses: measuring.Losses, seed: int) -> list[results.Record]:
    """The accuracy under every weighting, from the same stored losses."""
    n = len(losses.labels)
    return [
        record
        for name, rule in noise.WEIGHTINGS.items()
        for record in records(
            replace(
                trial,
                labels=losses.labels,
                optimal=None,
                settings={**trial.settings, "weighting": name, "n": n},
            ),
            int(losses.hits(rule).sum()),
            seed,
        )
    ]
