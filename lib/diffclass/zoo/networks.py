"""The networks in `assets/`, by name: their files, the noise levels they are asked at, and how to get them."""

import functools
import json
from pathlib import Path

from diffclass import noise, units
from diffclass.classifiers import idc
from diffclass.classifiers.bayes import BayesClassifier
from diffclass.classifiers.idc import Translator
from diffclass.data.plane import MixtureLaw
from diffclass.denoisers import network
from diffclass.denoisers.base import Denoiser
from diffclass.denoisers.exact import MixtureDenoiser
from diffclass.denoisers.lora import Adapter
from diffclass.device import device
from diffclass.noise import Levels, Weighting
from diffclass.storage import assets, weights

TEACHER = "digits-teacher.safetensors"
STUDENT = "digits-student.safetensors"
# Denoisers of a world, the best first: a name -> its file.
MODELS = {
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
# Denoisers that were trained to tell classes apart, or on attacked images.
CONTRASTIVE = {world: models["contrastive"] for world, models in MODELS.items()}
HARDENED = {world: f"{world}-adversarial-dc.safetensors" for world in MODELS}
# Plain networks, each trained on clean pictures and on attacked ones.
PLAIN = ("cnn", "adversarial", "wide", "adversarial-wide", "vit", "adversarial-vit")
BASELINES = {
    world: {method: f"{world}-{method}.safetensors" for method in PLAIN} for world in MODELS
}
# Networks that are a classifier and a density.
JOINT = {world: f"{world}-jem.safetensors" for world in MODELS}
# Low-rank adapters beside a network of their world, trained on attacked images: truth maximisation, and with contrast.
# What lies beneath them: of photographs, the network that answers for all classes at once.
BENEATH = {"digits": STUDENT, "cifar10": CONTRASTIVE["cifar10"]}
TRUTH = {
    world: {name: f"{world}-{name}.safetensors" for name in ("tmdc", "tmdc-contrastive")}
    for world in MODELS
}
# Plain classifiers that learned from noised pictures, for randomised smoothing: methods, and noise in pixels.
SMOOTHING = ("cohen", "smoothadv", "macer", "consistency")
SMOOTHING_SIGMAS = (0.125, 0.25, 0.5, 1.0)
# Translators of each world, the best first: the small one of photographs is what a CPU can train.
TRANSLATORS = {
    "digits": ("digits-idc.safetensors",),
    "cifar10": ("cifar10-idc.safetensors", "cifar10-idc-small.safetensors"),
}

DIGIT_RANGE = (0.1, 3.0)  # where digits differ: below, all losses are small; above, all alike
DIGIT_LEVELS = noise.log_levels(*DIGIT_RANGE, 16)
CIFAR_RANGE = (0.05, 10.0)  # the same for photographs of 32x32 pixels
CIFAR_LEVELS = noise.log_levels(*CIFAR_RANGE, 36)
PHOTO_LEVELS = noise.log_levels(*CIFAR_RANGE, 12)  # for one photograph, in seconds on two cores
# Networks that are trained to tell photographs apart know these levels only, and need no more: notebook 06.
NARROW_RANGE = (0.05, 1.0)
NARROW_LEVELS = noise.log_levels(*NARROW_RANGE, 6)
PLANE_RANGE = (0.02, 5.0)  # from below the narrowest law of the plane to beyond the widest
PLANE_SAMPLES = 16  # a point has two coordinates: one noise sample says little, and 16 cost little
# Noises a level where the law is known; a picture of 192 numbers says enough by one.
LAW_SAMPLES = {"plane": PLANE_SAMPLES, "hundred": 1}
NOISED_LEVELS = {"plane": 8, "hundred": 16}  # above the noise on a picture, among so many classes
RANGES = {"digits": DIGIT_RANGE, "cifar10": CIFAR_RANGE, "plane": PLANE_RANGE}
LEVELS = {
    "digits": DIGIT_LEVELS,
    "cifar10": CIFAR_LEVELS,
    "plane": noise.log_levels(*PLANE_RANGE, 16),
}
# Of Bayes' rule from one call: the lowest level that a network is asked at, where noise hides least.
ONE_CALL_LEVELS = {
    "digits": float(DIGIT_LEVELS.sigma[0]),
    "cifar10": float(NARROW_LEVELS.sigma[0]),
    "plane": PLANE_RANGE[0],
    "hundred": PLANE_RANGE[0],
}
NARROW = (CONTRASTIVE["cifar10"], HARDENED["cifar10"], *TRUTH["cifar10"].values())


def range_of(file: str) -> tuple[float, float]:
    """The noise levels that the denoiser of a weights file is trained at and asked at: lowest and highest edge."""
    return NARROW_RANGE if file in NARROW else RANGES[_world(file)]


def levels_of(file: str) -> Levels:
    """The noise levels at which the course asks the denoiser of a weights file."""
    return NARROW_LEVELS if file in NARROW else LEVELS[_world(file)]


def few_levels_of(file: str) -> Levels:
    """The same, as many as a network answers at in seconds on two cores."""
    levels = levels_of(file)
    return PHOTO_LEVELS if levels is CIFAR_LEVELS else levels


def smoothing_file(world: str, method: str, sigma_pixel: float) -> str:
    """The file of the plain classifier that a method of `SMOOTHING` trains on noise. Units: pixels."""
    sigma_pixel = units.check_sigma_pixel(sigma_pixel)
    method = units.chosen(method, SMOOTHING, "the method of training on noise")
    return f"{world}-{method.lower()}-{sigma_pixel:g}.safetensors"


def along(file: str, step: int) -> str:
    """The file of a network's weights after so many steps of the training that ends in `file`."""
    return f"{Path(file).stem}-{step}.safetensors"


def _world(file: str) -> str:
    return file.partition("-")[0]


# ---------------------------------------------------------------------------------------------------------------------
# Files


def adapted(base: Denoiser, file: str) -> Denoiser:
    """A base with the adapter of a file merged into a copy of it. Errors: those of `trained` and `lora.Adapter.load`."""
    return Adapter.load(base, trained(file)).merged()


def is_present(file: str) -> bool:
    """Whether the weights are listed in `assets/`."""
    return bool(assets.parts(file, assets.checksums()))


def command_for(file: str) -> str:
    """The command that makes a weights file, by the name it has."""
    world, _, method = Path(file).stem.partition("-")
    if method == "edm":
        return "diffclass convert EDM.pkl"
    if method in ("teacher", "student"):
        return f"diffclass train {world}"
    smoothing, _, sigma = method.rpartition("-")
    if smoothing in SMOOTHING:
        return f"diffclass train {world} --method {smoothing} --sigma {sigma}"
    if sigma.isdigit():  # weights along the way
        return f"diffclass train {world} --method {smoothing}"
    return f"diffclass train {world} --method {method}"


def trained(file: str) -> Path:
    """The verified path of a weights file. Errors: FileNotFoundError with the command that makes it."""
    if not is_present(file):
        raise FileNotFoundError(
            f"expected the weights {file} in {assets.folder().name}/, got none; train them with `{command_for(file)}`."
        )
    return assets.verified(file)


def denoiser_file(world: str, model: str | None = None) -> str:
    """The file of a world's denoiser by its model's name; without a name the best that is in `assets/`.

    Errors      ValueError for a name that does not exist
    """
    models = MODELS[world]
    if model is not None:
        return units.chosen(model, models, "the model")
    return next(filter(is_present, models.values()), next(iter(models.values())))


def quick_model(world: str) -> str | None:
    """The model that a reader's own picture is asked of where none is named; None for the best.

    Why         a single call of the contrastive network answers for all kinds of photographs, where a conditional one takes
                minutes
    """
    quick = world == "cifar10" and is_present(CONTRASTIVE[world])
    return "contrastive" if quick else None


def null_denoiser_file(world: str) -> str:
    """The file of the best denoiser that also answers without a class, as purifiers need."""
    file = denoiser_file(world)
    if not is_present(file) or has_null(file) or not is_present(CONTRASTIVE[world]):
        return file
    return CONTRASTIVE[world]


def translator_file(world: str) -> str:
    """The first translator of a world that is in `assets/`, else the first."""
    return next(filter(is_present, TRANSLATORS[world]), TRANSLATORS[world][0])


def has_null(file: str) -> bool:
    """Whether the denoiser of a weights file also answers without a class. Errors: those of `assets.verified`."""
    return _has_null(file, assets.folder(), assets.fingerprint(file))


@functools.lru_cache(maxsize=64)
def _has_null(file: str, folder: Path, fingerprint: str) -> bool:
    """The same, read once for what a file of a folder should hold: every list of names asks, and hashing takes a while."""
    header = weights.read_header(assets.verified(file))
    return json.loads(header["architecture"]).get("has_null", True)


def load(world: str, model: str | None = None) -> tuple[Denoiser, str]:
    """A world's trained denoiser by its model's name, its checksum verified, and the file it came from.

    Errors      those of `denoiser_file`, `assets.verified` and `load_denoiser`
    """
    file = denoiser_file(world, model)
    return loaded(assets.verified(file)), file


def loaded(path: Path) -> Denoiser:
    """The denoiser in a weights file, that of photographs on the accelerator where there is one.

    Why         a photograph's network is worth the way there and back; pictures and noise stay where they are
    Errors      those of `load_denoiser`
    """
    denoiser = network.load_denoiser(path)[0]
    return denoiser.to(device()) if _world(path.name) == "cifar10" else denoiser


def load_digits_denoiser(name: str = STUDENT) -> Denoiser:
    """A trained digits denoiser from `assets/`, its checksum verified. Errors: those of `verified`, `load_denoiser`."""
    return loaded(assets.verified(name))


def load_translator(world: str = "digits") -> Translator:
    """A world's trained translator, its checksum verified. Errors: those of `trained` and `idc.load_translator`."""
    return idc.load_translator(trained(translator_file(world)))[0]


# ---------------------------------------------------------------------------------------------------------------------
# The diffusion classifiers that the course makes of them


def digit_classifier(
    denoiser: Denoiser,
    levels: Levels = DIGIT_LEVELS,
    samples: int = 1,
    weighting: Weighting = noise.elbo_weight,
) -> BayesClassifier:
    """The classifier of digits that the course uses: 16 levels, one noise each."""
    return BayesClassifier(denoiser, levels, samples, weighting)


def cifar_classifier(
    denoiser: Denoiser,
    levels: Levels = CIFAR_LEVELS,
    samples: int = 1,
    weighting: Weighting = noise.elbo_weight,
) -> BayesClassifier:
    """The classifier of CIFAR-10 that the course uses: 36 levels, one noise each."""
    return BayesClassifier(denoiser, levels, samples, weighting)


def plane_classifier(
    law: MixtureLaw,
    levels: int = 16,
    weighting: Weighting = noise.elbo_weight,
    samples: int = PLANE_SAMPLES,
) -> BayesClassifier:
    """The classifier of a law that the course uses: exact denoiser, on the plane 16 noises a level."""
    return BayesClassifier(
        MixtureDenoiser.of_law(law),
        noise.log_levels(*PLANE_RANGE, levels),
        samples,
        weighting,
        prior=law.priors,
    )
