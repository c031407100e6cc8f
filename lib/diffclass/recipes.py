"""The networks in `assets/` and the classifiers made of them, measured and asked as the course does it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from diffclass import (
    assets,
    certificates,
    cifar,
    corruptions,
    data,
    gallery,
    measuring,
    noise,
    results,
)
from diffclass.classifiers import BayesClassifier
from diffclass.denoisers import network
from diffclass.denoisers.base import Denoiser
from diffclass.denoisers.exact import MixtureDenoiser
from diffclass.noise import NoiseBank, Weighting

TEACHER = "digits-teacher.safetensors"
STUDENT = "digits-student.safetensors"
MODELS = {  # the best first
    "digits": {
        "student": STUDENT,
        "teacher": TEACHER,
        "contrastive": "digits-contrastive.safetensors",
    },
    "cifar10": {
        name: f"cifar10-{name}.safetensors"
        for name in ("student", "teacher", "prototype", "edm", "contrastive")
    },
}
CONTRASTIVE = {
    world: models["contrastive"] for world, models in MODELS.items()
}  # trained to tell classes apart
HARDENED = {
    world: f"{world}-adversarial-dc.safetensors" for world in MODELS
}  # trained on attacked images
DIGIT_RANGE = (0.1, 3.0)  # where digits differ: below, all losses are small; above, all alike
DIGIT_LEVELS = noise.log_levels(*DIGIT_RANGE, 16)
CIFAR_RANGE = (0.05, 10.0)  # the same for photographs of 32x32 pixels
CIFAR_LEVELS = noise.log_levels(*CIFAR_RANGE, 36)
PHOTO_LEVELS = noise.log_levels(
    *CIFAR_RANGE, 12
)  # for one photograph: ten to twenty seconds on two cores
PLANE_RANGE = (0.02, 5.0)  # from below the narrowest law of the plane to beyond the widest
PLANE_SAMPLES = 16  # a point has two coordinates: one noise sample says little, and 16 cost little


def digit_classifier(
    denoiser: Denoiser,
    levels: noise.Levels = DIGIT_LEVELS,
    samples: int = 1,
    seed: int = 0,
    weighting: Weighting = noise.elbo_weight,
) -> BayesClassifier:
    """The deterministic classifier of digits that the course uses: 16 levels, one noise each."""
    return BayesClassifier(
        denoiser, NoiseBank.fixed(levels, denoiser.image_shape, samples, seed), weighting
    )


def cifar_classifier(
    denoiser: Denoiser,
    levels: noise.Levels = CIFAR_LEVELS,
    seed: int = 0,
    weighting: Weighting = noise.elbo_weight,
) -> BayesClassifier:
    """The deterministic classifier of CIFAR-10 that the course uses: 36 levels, one noise each."""
    return BayesClassifier(
        denoiser, NoiseBank.fixed(levels, denoiser.image_shape, 1, seed), weighting
    )


CLASSIFIERS = {
    "digits": (digit_classifier, DIGIT_RANGE),
    "cifar10": (cifar_classifier, CIFAR_RANGE),
}


def plane_law(name: str) -> data.MixtureLaw:
    """A law of the plane by name. Errors: ValueError for a name that does not exist."""
    return chosen(name, data.PLANE_LAWS, "the law of the plane (as in plane:moons)")()


def plane_classifier(
    law: data.MixtureLaw, levels: int = 16, seed: int = 0, weighting: Weighting = noise.elbo_weight
) -> BayesClassifier:
    """The deterministic classifier of a law of the plane that the course uses: exact denoiser, 16 noises a level."""
    bank = NoiseBank.fixed(
        noise.log_levels(*PLANE_RANGE, levels), law.image_shape, PLANE_SAMPLES, seed
    )
    return BayesClassifier(MixtureDenoiser.of_law(law), bank, weighting, prior=law.priors)


def available_model(world: str, model: str | None) -> str:
    """The file of a world's network by name; without a name the first of `MODELS` that is in `assets/`.

    Errors      ValueError for a name that does not exist
    """
    models = MODELS[world]
    if model is not None:
        return chosen(model, models, "the model")
    listed = assets.checksums()
    return next(
        (file for file in models.values() if assets.parts(file, listed)),
        next(iter(models.values())),
    )


def load(world: str, model: str | None = None) -> tuple[Denoiser, str]:
    """A world's trained denoiser by its model's name, its checksum verified, and the file it came from.

    Errors      those of `available_model`, `assets.verified` and `load_denoiser`
    """
    file = available_model(world, model)
    return loaded(assets.verified(file)), file


def has_null(file: str) -> bool:
    """Whether the denoiser of a weights file in `assets/` also answers without a class. Errors: those of `verified`."""
    return json.loads(network.read_header(assets.verified(file))["architecture"]).get(
        "has_null", True
    )


def loaded(path: Path) -> Denoiser:
    """The denoiser in a weights file. Errors: those of `load_denoiser`."""
    return network.load_denoiser(path)[0]


def chosen(value: str, allowed, what: str):
    """The entry of `allowed` (names, or a mapping from names) that `value` names, whatever its case.

    Errors      ValueError that lists the names
    """
    names = {name.lower(): name for name in allowed}
    if value.lower() not in names:
        choice = ", ".join(map(repr, allowed))
        raise ValueError(
            f"expected {what} to be {'one of ' * (len(allowed) > 1)}{choice}, got {value!r}."
        )
    name = names[value.lower()]
    return allowed[name] if isinstance(allowed, dict) else name


def load_digits_denoiser(name: str = STUDENT) -> Denoiser:
    """A trained digits denoiser from `assets/`, its checksum verified. Errors: those of `verified`, `load_denoiser`."""
    return network.load_denoiser(assets.verified(name))[0]


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


def test_pictures(
    kind: str, corruption: str, limit: int | None, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first test pictures of a world and their labels, corrupted if that is asked for, as in "noise-3"."""
    if kind == "digits":
        digits = data.digits()
        images = digits.test_images[:limit]
        labels = digits.test_labels[:limit]
    else:
        images, labels = (
            cifar.cifar10("test", limit)
            if kind == "cifar10"
            else (p[:limit] for p in gallery.pictures())
        )
    if corruption:
        name, _, severity = corruption.rpartition("-")
        if name not in corruptions.SEVERITIES or severity not in tuple("12345"):
            raise ValueError(
                f"expected the world {kind!r}, alone or with one of {', '.join(corruptions.SEVERITIES)} "
                f"at a severity of 1 to 5, as in {kind}:noise-3, got {f'{kind}:{corruption}'!r}."
            )
        images = corruptions.corrupted(
            images, name, int(severity), torch.Generator().manual_seed(seed)
        )
    return images, labels


def card_line(content: dict) -> str:
    """The accuracy on a model card, in words; where it has one, also that under attack."""
    if "accuracy" not in content:
        return "no accuracy on its model card"

    def stated(a: dict) -> str:
        return (
            f"{a['correct'] / a['n']:.1%} [{a['low']:.1%}, {a['high']:.1%}] ({a['correct']} of {a['n']}, "
            "95 % Clopper-Pearson)"
        )

    line = f"test accuracy {stated(content['accuracy'])}"
    hit = content.get("accuracy_under_attack")
    return (
        line
        if hit is None
        else (
            f"{line}, at most {stated(hit)} under {hit['attack']} in {hit['norm']} {hit['epsilon']:.3g}"
        )
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
            certificates.interval(count, n),
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


def card(path: Path) -> dict:
    """The model card inside a weights file, of whatever kind of network. Errors: as `network.read_header`."""
    return json.loads(network.read_header(path).get("card", "{}"))
