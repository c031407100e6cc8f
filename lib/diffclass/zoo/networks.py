"""The networks in `assets/` and the classifiers made of them, measured and asked as the course does it."""

import json
from pathlib import Path

from diffclass import data, noise
from diffclass.classifiers.bayes import BayesClassifier
from diffclass.denoisers import network
from diffclass.denoisers.base import Denoiser
from diffclass.denoisers.exact import MixtureDenoiser
from diffclass.noise import NoiseBank, Weighting
from diffclass.storage import assets, weights

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
    return json.loads(weights.read_header(assets.verified(file))["architecture"]).get(
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
