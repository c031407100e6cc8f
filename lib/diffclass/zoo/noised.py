"""Every classifier that randomised smoothing asks: one table, one entry a name, each made for one noise on its pictures."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from diffclass import units
from diffclass.classifiers import economical, racing
from diffclass.classifiers.base import Classifier
from diffclass.classifiers.bayes import ExactClassifier
from diffclass.classifiers.mirrored import Mirrored
from diffclass.classifiers.noised import (
    ApproximateNoisedClassifier,
    NoisedBayesClassifier,
    TrainedOnNoise,
)
from diffclass.classifiers.one_call import NearestHeadClassifier, NoisedOneCallClassifier
from diffclass.classifiers.purified import Denoising, PurifiedClassifier, Restoration
from diffclass.classifiers.votes import MajorityVote
from diffclass.data.worlds import EXACT, world_of
from diffclass.storage import assets
from diffclass.zoo import classifiers, networks
from diffclass.zoo.classifiers import Parts

WALKS = 10  # of DensePure, so that a vote takes a second where the paper's 40 take four
ALL = ("digits", "cifar10", *EXACT)
TRAINED = ("digits", "cifar10")
MANY = (
    "hundred",
)  # worlds where leaving classes out saves something, as no call answers for all of them
SIFT = dict(threshold=10.0, sift=16, most=3)
RACE = dict(alpha=0.01, budget=3200)
PILOT = dict(images=4, samples=4, seed=2**20)  # pictures that no test set holds, and noises a level


@dataclass(frozen=True)
class NoisedEntry:
    """One classifier of noised pictures by name: how it is built, of which weights, whose it is.

    title       what a table calls it
    sentence    what it is, for the reader
    source      who proposed it
    worlds      the kinds of world that have it
    build       Parts, sigma_pixel -> Classifier of that `sigma_pixel`
    weights     kind of world, sigma_pixel -> {role: file}, the files that are read
    Errors      ValueError for an entry that lacks one of these
    """

    name: str
    title: str
    sentence: str
    source: str
    worlds: tuple[str, ...]
    build: Callable[[Parts, float], Classifier]
    weights: Callable[[str, float], dict[str, str]]

    def __post_init__(self):
        classifiers.check_entry(self, ("name", "title", "sentence", "source", "worlds"))


ENTRIES: dict[str, NoisedEntry] = {}


def register(entry: NoisedEntry) -> None:
    """Add an entry to the table. Errors: ValueError for a name that is taken, here or in `zoo.classifiers`."""
    if entry.name.lower() in map(str.lower, (*ENTRIES, *classifiers.ENTRIES)):
        raise ValueError(
            f"expected a new name for a classifier of noised pictures, got {entry.name!r}, which is taken; two entries of "
            "one name would hide one of them."
        )
    ENTRIES[entry.name] = entry


# ---------------------------------------------------------------------------------------------------------------------
# Which files


def _heads(kind: str, sigma_pixel: float) -> dict[str, str]:
    """The network that was trained to tell noised pictures apart, with a head for each class and one for none."""
    return {} if kind in EXACT else {"denoiser": networks.CONTRASTIVE[kind]}


def _purifier(kind: str, sigma_pixel: float) -> dict[str, str]:
    return {} if kind in EXACT else {"purifier": networks.null_denoiser_file(kind)}


def _purifier_and_cnn(kind: str, sigma_pixel: float) -> dict[str, str]:
    return {**_purifier(kind, sigma_pixel), "cnn": networks.BASELINES[kind]["cnn"]}


def _nothing(kind: str, sigma_pixel: float) -> dict[str, str]:
    return {}


def _noise_trained(method: str) -> Callable[[str, float], dict[str, str]]:
    return lambda kind, sigma_pixel: {"cnn": networks.smoothing_file(kind, method, sigma_pixel)}


# ---------------------------------------------------------------------------------------------------------------------
# How they are built


def _losses_of(parts: Parts) -> dict:
    """How losses are measured above the noise: up to where the network was trained; of a law by its own grid."""
    if parts.world.law is not None:
        return dict(
            high=networks.PLANE_RANGE[1],
            levels=networks.NOISED_LEVELS[parts.world.kind],
            samples=networks.LAW_SAMPLES[parts.world.kind],
            prior=parts.world.law.priors,
        )
    return dict(high=networks.range_of(parts.files["denoiser"])[1])


def _epndc(parts: Parts, sigma_pixel: float) -> Classifier:
    return NoisedBayesClassifier(parts.denoiser(), sigma_pixel, **_losses_of(parts))


def _own_noise(parts: Parts, sigma_pixel: float) -> Classifier:
    return economical.with_own_noise(_epndc(parts, sigma_pixel))


def _sifted(parts: Parts, sigma_pixel: float) -> Classifier:
    return economical.sifted(_epndc(parts, sigma_pixel), **SIFT)


def _raced(parts: Parts, sigma_pixel: float) -> Classifier:
    """How much differences vary is measured on other pictures of the world, always the same ones."""
    base = _epndc(parts, sigma_pixel)
    generator = torch.Generator().manual_seed(PILOT["seed"])
    x, _ = parts.world.law.sample(PILOT["images"], generator)
    x_tau = x + sigma_pixel * torch.randn(x.shape, generator=generator)
    question = economical.question_of(base)
    pilot = racing.pilot(question, x_tau, generator, PILOT["samples"])
    return economical.raced(base, pilot, **RACE)


def _apndc(form: str) -> Callable[[Parts, float], Classifier]:
    return lambda parts, sigma_pixel: ApproximateNoisedClassifier(
        parts.denoiser(), sigma_pixel, form=form, **_losses_of(parts)
    )


def _one_call(parts: Parts, sigma_pixel: float) -> Classifier:
    return NoisedOneCallClassifier(parts.denoiser(), sigma_pixel)


def _mirrored(parts: Parts, sigma_pixel: float) -> Classifier:
    return Mirrored(_one_call(parts, sigma_pixel))


def _nearest_head(parts: Parts, sigma_pixel: float) -> Classifier:
    return NearestHeadClassifier(parts.denoiser(), sigma_pixel)


def _exact(parts: Parts, sigma_pixel: float) -> Classifier:
    return ExactClassifier(parts.denoiser(), parts.world.law.priors, sigma_pixel)


def _denoised_cnn(parts: Parts, sigma_pixel: float) -> Classifier:
    return PurifiedClassifier(Denoising(parts.denoiser("purifier"), sigma_pixel), parts.cnn())


def _densepure(walks: int) -> Callable[[Parts, float], Classifier]:
    def build(parts: Parts, sigma_pixel: float) -> Classifier:
        walk = Restoration(parts.denoiser("purifier"), sigma_pixel)
        return MajorityVote(PurifiedClassifier(walk, parts.cnn()), walks)

    return build


def _diffpure_dc(parts: Parts, sigma_pixel: float) -> Classifier:
    walk = Restoration(parts.denoiser("purifier"), sigma_pixel)
    return PurifiedClassifier(walk, parts.bayes("purifier"))


def _trained_on_noise(parts: Parts, sigma_pixel: float) -> Classifier:
    return TrainedOnNoise(parts.cnn(), sigma_pixel)


NDC = "Chen et al. 2024 (NDC)"
for _entry in (
    NoisedEntry(
        "epndc",
        "EPNDC",
        "Bayes' rule on the losses of ever noisier versions of the noised picture: its exact posterior.",
        NDC,
        ALL,
        _epndc,
        _heads,
    ),
    NoisedEntry(
        "epndc-own-noise",
        "EPNDC, own noise for each class",
        "The same losses, each class under noise of its own, which does not cancel between them: what sharing it is worth.",
        NDC,
        MANY,
        _own_noise,
        _heads,
    ),
    NoisedEntry(
        "epndc-sifted",
        "EPNDC, sift and refine",
        "The same losses, level by level for the classes that are not yet far behind, then all levels for the best three.",
        NDC,
        MANY,
        _sifted,
        _heads,
    ),
    NoisedEntry(
        "epndc-raced",
        "EPNDC, raced",
        "The same losses at random levels, until bets on their differences have ruled out every class but one.",
        "this course, notebook 12b; Robbins 1970",
        MANY,
        _raced,
        _heads,
    ),
    NoisedEntry(
        "apndc",
        "APNDC",
        "The plain diffusion classifier of the denoised picture, at levels above the noise that it was freed of.",
        NDC,
        ALL,
        _apndc("ensemble"),
        _heads,
    ),
    NoisedEntry(
        "apndc-path",
        "APNDC, on the path",
        "The same target, the denoised picture, for noisier versions of the noised one.",
        NDC + ", released code",
        ALL,
        _apndc("path"),
        _heads,
    ),
    NoisedEntry(
        "one-call-noised",
        "Bayes' rule from one call, of the noised picture",
        "Where the answer without a class lies among those with one: the posterior of the noised picture, from one call.",
        "this course, notebook 06b",
        ALL,
        _one_call,
        _heads,
    ),
    NoisedEntry(
        "one-call-mirrored",
        "Bayes' rule from one call, and its mirror image",
        "The mean of the log-posteriors of the noised picture and of its mirror image, from two calls.",
        "this course, notebook 12b",
        ("cifar10",),
        _mirrored,
        _heads,
    ),
    NoisedEntry(
        "nearest-head",
        "nearest head",
        "The class whose answer is nearest to the one without a class: the flattest posterior, from one call.",
        "this course, notebook 06b",
        ALL,
        _nearest_head,
        _heads,
    ),
    NoisedEntry(
        "exact",
        "the truth",
        "Bayes' rule on the density of noised points or pictures, where their law is known.",
        "Bayes 1763",
        EXACT,
        _exact,
        _nothing,
    ),
    NoisedEntry(
        "denoised-cnn",
        "denoised smoothing, plain CNN",
        "Denoise the noised picture at once, then ask the plain network.",
        "Carlini et al. 2023",
        TRAINED,
        _denoised_cnn,
        _purifier_and_cnn,
    ),
    NoisedEntry(
        "densepure",
        f"DensePure, {WALKS} walks, plain CNN",
        f"Walk back from the noise in ten random steps, {WALKS} times; what the plain network says most often.",
        "Xiao et al. 2023 (DensePure), with a quarter of its walks",
        TRAINED,
        _densepure(WALKS),
        _purifier_and_cnn,
    ),
    NoisedEntry(
        "densepure-40",
        "DensePure, 40 walks, plain CNN",
        "Walk back from the noise in ten random steps, forty times; what the plain network says most often.",
        "Xiao et al. 2023 (DensePure)",
        TRAINED,
        _densepure(40),
        _purifier_and_cnn,
    ),
    NoisedEntry(
        "diffpure-dc",
        "DiffPure, diffusion classifier",
        "Walk back from the noise in ten random steps, once, then ask the plain diffusion classifier.",
        "Nie et al. 2022; " + NDC,
        ALL,
        _diffpure_dc,
        _purifier,
    ),
    NoisedEntry(
        "cohen",
        "CNN, trained on noise",
        "The plain network, trained on pictures with the noise that it will be smoothed by.",
        "Cohen et al. 2019",
        TRAINED,
        _trained_on_noise,
        _noise_trained("cohen"),
    ),
    NoisedEntry(
        "smoothadv",
        "CNN, SmoothAdv",
        "The same network, trained on noised pictures that fool its mean over noises.",
        "Salman et al. 2019",
        TRAINED,
        _trained_on_noise,
        _noise_trained("smoothadv"),
    ),
    NoisedEntry(
        "macer",
        "CNN, MACER",
        "The same network, trained to enlarge the radius that its votes certify.",
        "Zhai et al. 2020",
        TRAINED,
        _trained_on_noise,
        _noise_trained("macer"),
    ),
    NoisedEntry(
        "consistency",
        "CNN, consistency",
        "The same network, trained to answer alike under every noise.",
        "Jeong & Shin 2020",
        TRAINED,
        _trained_on_noise,
        _noise_trained("consistency"),
    ),
):
    register(_entry)


# ---------------------------------------------------------------------------------------------------------------------
# What others ask


def names(world: str) -> tuple[str, ...]:
    """The classifiers of noised pictures that a world has. Errors: ValueError for a world that does not exist."""
    kind = world_of(world).kind
    return tuple(name for name, entry in ENTRIES.items() if kind in entry.worlds)


def all_names(world: str) -> tuple[str, ...]:
    """What can be smoothed in a world: `names`, then the classifiers of clean pictures, which see clamped copies."""
    return (*names(world), *classifiers.names(world))


def entry_of(world: str, name: str) -> NoisedEntry | classifiers.Entry:
    """The entry of a classifier by name, of noised or of clean pictures, whatever its case.

    Errors      ValueError for a world or name that is not there
    """
    chosen = units.chosen(name, all_names(world), f"what is smoothed in {world_of(world).kind}")
    return ENTRIES[chosen] if chosen in ENTRIES else classifiers.entry_of(world, chosen)


def classifier(world: str, name: str, sigma_pixel: float) -> Classifier:
    """A classifier by name for pictures with a noise on them, ready to be smoothed.

    Units       sigma_pixel in pixels of [0,1]
    Meaning     one of `names` has that `sigma_pixel`; one of clean pictures comes as it is, has none, and is asked about
                clamped copies: `Smoothed(classifier, sigma_pixel)`
    Errors      ValueError for a world, name or noise that does not exist, or a noise that the denoiser was not trained at;
                FileNotFoundError, with the command, for weights that are yet to be trained
    """
    sigma_pixel = units.check_sigma_pixel(sigma_pixel)
    entry = entry_of(world, name)
    if not isinstance(entry, NoisedEntry):
        return classifiers.classifier(world, entry.name)
    place = world_of(world)
    return entry.build(Parts(place, entry.weights(place.kind, sigma_pixel)), sigma_pixel).eval()


def checkpoints(world: str, name: str, sigma_pixel: float) -> dict[str, str]:
    """The weights that a classifier is built of, file -> SHA-256; empty for closed forms.

    Errors      those of `classifier`
    """
    sigma_pixel = units.check_sigma_pixel(sigma_pixel)
    entry = entry_of(world, name)
    if not isinstance(entry, NoisedEntry):
        return classifiers.checkpoints(world, entry.name)
    files = entry.weights(world_of(world).kind, sigma_pixel)
    return {file: assets.fingerprint(file) for file in sorted(set(files.values()))}
