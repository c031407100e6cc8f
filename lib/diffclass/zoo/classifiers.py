"""Every classifier that the course speaks of: one table, one entry a name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from diffclass import units
from diffclass.classifiers import cnn, idc, joint
from diffclass.classifiers.base import Classifier
from diffclass.classifiers.bayes import BayesClassifier
from diffclass.classifiers.one_call import OneCallClassifier
from diffclass.classifiers.purified import (
    LikelihoodMaximisation,
    Purification,
    PurifiedClassifier,
)
from diffclass.classifiers.votes import MajorityVote
from diffclass.data.worlds import EXACT, World, world_of
from diffclass.denoisers.base import Denoiser
from diffclass.denoisers.exact import MixtureDenoiser
from diffclass.storage import assets
from diffclass.zoo import networks

VOTES = 11


@dataclass(frozen=True)
class Parts:
    """What an entry's builder is given: the world, and the weights files of the entry by their role."""

    world: World
    files: dict[str, str]

    def denoiser(self, role: str = "denoiser") -> Denoiser:
        """The denoiser of a role; of a law, the exact one. Errors: FileNotFoundError with the command to train it."""
        if self.world.law is not None:
            return MixtureDenoiser.of_law(self.world.law)
        return networks.loaded(networks.trained(self.files[role]))

    def bayes(self, role: str = "denoiser") -> BayesClassifier:
        """The course's diffusion classifier of this world, by the denoiser of a role."""
        if self.world.law is not None:
            samples = networks.LAW_SAMPLES[self.world.kind]
            return networks.plane_classifier(self.world.law, samples=samples)
        return BayesClassifier(self.denoiser(role), networks.levels_of(self.files[role]))

    def adapted(self) -> BayesClassifier:
        """The diffusion classifier of a denoiser with an adapter beside it, merged."""
        file = self.files["adapter"]
        denoiser = networks.adapted(self.denoiser(), file)
        return BayesClassifier(denoiser, networks.levels_of(file))

    def one_call(self, role: str = "denoiser") -> OneCallClassifier:
        """Bayes' rule from one call of the denoiser of a role, at the lowest of the levels that it is asked at."""
        level = networks.ONE_CALL_LEVELS[self.world.kind]
        return OneCallClassifier(self.denoiser(role), level)

    def cnn(self, role: str = "cnn") -> cnn.Plain:
        """The plain network of a role."""
        return cnn.load(networks.trained(self.files[role]))[0]

    def maximisation(self, steps: int) -> LikelihoodMaximisation:
        """The paper's likelihood maximisation, within the budget of this world's attacks."""
        return LikelihoodMaximisation.paper(
            self.denoiser("purifier"), self.world.budget("linf"), steps
        )


@dataclass(frozen=True)
class Entry:
    """One classifier by name: how it is built, of which weights, whose it is.

    title       what a table calls it
    sentence    what it is, for the reader
    source      who proposed it
    paper       the protocol of its own paper, a name of `evaluation.protocols.PAPERS`
    build       Parts -> Classifier
    weights     kind of world -> {role: file}, the files that are read; None where the world has no such classifier
    against     the threat that it was trained on, or whose budget limits it, in the words of a table
    Errors      ValueError for an entry that lacks one of these
    """

    name: str
    title: str
    sentence: str
    source: str
    paper: str
    build: Callable[[Parts], Classifier]
    weights: Callable[[str], dict[str, str] | None]
    against: str = "none"

    def __post_init__(self):
        check_entry(self, ("name", "title", "sentence", "source", "paper", "against"))


def check_entry(entry, words: Sequence[str]) -> None:
    """Raise a ValueError for an entry that lacks one of its words, or its functions `build` and `weights`."""
    told = vars(entry)
    for field in words:
        if not told[field]:
            raise ValueError(
                f"expected an entry with a {field}, got the entry {entry.name!r} without; readers are told all of them."
            )
    for field in ("build", "weights"):
        if not callable(told[field]):
            raise ValueError(
                f"expected {field} of the entry {entry.name!r} to be a function, got {told[field]!r}."
            )


ENTRIES: dict[str, Entry] = {}


def register(entry: Entry) -> None:
    """Add an entry to the table. Errors: ValueError for a name that is taken, in whatever case."""
    if entry.name.lower() in map(str.lower, ENTRIES):
        raise ValueError(
            f"expected a new name for a classifier, got {entry.name!r}, which is taken; two entries of one name would hide "
            "one of them."
        )
    ENTRIES[entry.name] = entry


# ---------------------------------------------------------------------------------------------------------------------
# Which files


def _denoiser(kind: str) -> dict[str, str]:
    return {} if kind in EXACT else {"denoiser": networks.denoiser_file(kind)}


def _purifier(kind: str) -> dict[str, str]:
    return {} if kind in EXACT else {"purifier": networks.null_denoiser_file(kind)}


def _denoiser_and_purifier(kind: str) -> dict[str, str]:
    return _denoiser(kind) | _purifier(kind)


def _trained_only(roles: Callable[[str], dict[str, str]]) -> Callable[[str], dict[str, str] | None]:
    """Of worlds whose networks are trained: where the denoiser is exact there is no such classifier."""
    return lambda kind: None if kind in EXACT else roles(kind)


def _contrastive(kind: str) -> dict[str, str]:
    return {"denoiser": networks.CONTRASTIVE[kind]}


def _truth(method: str) -> Callable[[str], dict[str, str]]:
    return lambda kind: {
        "adapter": networks.TRUTH[kind][method],
        "denoiser": networks.BENEATH[kind],
    }


def _baseline(method: str) -> Callable[[str], dict[str, str]]:
    return lambda kind: {"cnn": networks.BASELINES[kind][method]}


# ---------------------------------------------------------------------------------------------------------------------
# How they are built


def _bayes(parts: Parts) -> Classifier:
    return parts.bayes()


def _adapted(parts: Parts) -> Classifier:
    return parts.adapted()


def _one_call(parts: Parts) -> Classifier:
    return parts.one_call()


def _cnn(parts: Parts) -> Classifier:
    return parts.cnn()


def _joint(parts: Parts) -> Classifier:
    return joint.load(networks.trained(parts.files["network"]))[0]


def _idc(parts: Parts) -> Classifier:
    translator = networks.load_translator(parts.world.kind)
    return idc.TranslationClassifier(translator, eot=4)  # more averaged draws gained nothing


def _vote(parts: Parts) -> Classifier:
    return MajorityVote(parts.bayes(), VOTES)


def _rdc(steps: int) -> Callable[[Parts], Classifier]:
    return lambda parts: PurifiedClassifier(parts.maximisation(steps), parts.bayes())


def _rdc_released(parts: Parts) -> Classifier:
    purifier = LikelihoodMaximisation.released(parts.denoiser("purifier"))
    return PurifiedClassifier(purifier, parts.bayes())


def _maximised_cnn(parts: Parts) -> Classifier:
    return PurifiedClassifier(parts.maximisation(5), parts.cnn())


def _diffpure(parts: Parts) -> Classifier:
    purifier = Purification(parts.denoiser("purifier"))
    return PurifiedClassifier(purifier, parts.cnn(), eot=4)  # more averaged draws gained nothing


def _purified_adapted(parts: Parts) -> Classifier:
    return PurifiedClassifier(Purification(parts.denoiser("purifier")), parts.adapted())


RDC = "Chen et al. 2024 (RDC)"
for _entry in (
    Entry(
        "cnn",
        "plain CNN",
        "A small residual convolutional network, trained on clean images.",
        "He et al. 2016",
        "madry",
        _cnn,
        _trained_only(_baseline("cnn")),
    ),
    Entry(
        "adversarial",
        "CNN, adversarially trained",
        "The same network, trained on the images that fool it.",
        "Madry et al. 2018",
        "madry",
        _cnn,
        _trained_only(_baseline("adversarial")),
        against="L-inf",
    ),
    Entry(
        "wide",
        "wide residual network",
        "A residual network of few blocks and many channels, trained on clean images.",
        "Zagoruyko & Komodakis 2016",
        "madry",
        _cnn,
        _trained_only(_baseline("wide")),
    ),
    Entry(
        "adversarial-wide",
        "wide residual network, adversarially trained",
        "The wide residual network, trained on the images that fool it.",
        "Zagoruyko & Komodakis 2016; Madry et al. 2018",
        "madry",
        _cnn,
        _trained_only(_baseline("adversarial-wide")),
        against="L-inf",
    ),
    Entry(
        "vit",
        "vision transformer",
        "Attention between the patches of a picture, without convolutions, trained on clean images.",
        "Dosovitskiy et al. 2021",
        "madry",
        _cnn,
        _trained_only(_baseline("vit")),
    ),
    Entry(
        "adversarial-vit",
        "vision transformer, adversarially trained",
        "The vision transformer, trained on the images that fool it.",
        "Dosovitskiy et al. 2021; Madry et al. 2018",
        "madry",
        _cnn,
        _trained_only(_baseline("adversarial-vit")),
        against="L-inf",
    ),
    Entry(
        "jem",
        "JEM",
        "A wide residual network whose logits are also log-densities, trained against pictures that it draws itself.",
        "Grathwohl et al. 2020 (JEM)",
        "madry",
        _joint,
        _trained_only(lambda kind: {"network": networks.JOINT[kind]}),
    ),
    Entry(
        "dc",
        "diffusion classifier",
        "Bayes' rule on the per-class losses of a diffusion model.",
        "Li et al. 2023; " + RDC,
        "rdc",
        _bayes,
        _denoiser,
    ),
    Entry(
        "contrastive",
        "diffusion classifier, contrastive",
        "The diffusion classifier whose heads were trained to tell the classes apart under noise.",
        "this course, notebook 07",
        "madry",
        _bayes,
        _trained_only(_contrastive),
    ),
    Entry(
        "adversarial-dc",
        "diffusion classifier, adversarially trained",
        "The diffusion classifier whose denoiser was trained on the images that fool it.",
        "this course, after Madry et al. 2018",
        "madry",
        _bayes,
        _trained_only(lambda kind: {"denoiser": networks.HARDENED[kind]}),
        against="L-inf",
    ),
    Entry(
        "tmdc",
        "TMDC",
        "The diffusion classifier with an adapter that raised the truth of images that fool another network.",
        "Li et al. 2024 (TMDC)",
        "tmdc",
        _adapted,
        _trained_only(_truth("tmdc")),
        against="L-inf, through another network",
    ),
    Entry(
        "tmdc-contrastive",
        "TMDC, contrastive",
        "The same, by images that fool itself, and with the other classes lowered under the same noise.",
        "Li et al. 2024 (TMDC); this course, notebook 11",
        "tmdc",
        _adapted,
        _trained_only(_truth("tmdc-contrastive")),
        against="L-inf",
    ),
    Entry(
        "one-call",
        "Bayes' rule from one call",
        "Where the contrastive network's answer without a class lies among those with one: the posterior, from one call.",
        "this course, notebook 06b",
        "madry",
        _one_call,
        lambda kind: {} if kind in EXACT else _contrastive(kind),
    ),
    Entry(
        "one-call-hardened",
        "Bayes' rule from one call, adversarially trained",
        "The same, of the network that was trained on the images that fool it.",
        "this course, notebook 06b",
        "madry",
        _one_call,
        _trained_only(lambda kind: {"denoiser": networks.HARDENED[kind]}),
        against="L-inf",
    ),
    Entry(
        "vote",
        "diffusion classifier, majority of 11",
        "What the diffusion classifier answers most often under eleven noises.",
        "this course, notebook 09",
        "rdc",
        _vote,
        _denoiser,
    ),
    Entry(
        "rdc1",
        "RDC, 1 step",
        "One step of likelihood maximisation within the attacks' budget, then the diffusion classifier.",
        RDC,
        "rdc",
        _rdc(1),
        _denoiser_and_purifier,
        against="L-inf, by its band",
    ),
    Entry(
        "rdc5",
        "RDC, 5 steps",
        "Five steps of likelihood maximisation within the attacks' budget, then the diffusion classifier.",
        RDC,
        "rdc",
        _rdc(5),
        _denoiser_and_purifier,
        against="L-inf, by its band",
    ),
    Entry(
        "rdc-released",
        "RDC as released",
        "Likelihood maximisation as RDC's code does it, without an active limit, then the diffusion classifier.",
        RDC + ", released code",
        "rdc",
        _rdc_released,
        _denoiser_and_purifier,
    ),
    Entry(
        "rdc-contrastive",
        "RDC, 5 steps, contrastive",
        "Five steps of likelihood maximisation, then the contrastive diffusion classifier.",
        RDC + "; this course, notebook 07",
        "rdc",
        _rdc(5),
        _trained_only(lambda kind: _contrastive(kind) | _purifier(kind)),
        against="L-inf, by its band",
    ),
    Entry(
        "lm-cnn",
        "likelihood maximisation, plain CNN",
        "Five steps of likelihood maximisation in front of the plain network.",
        RDC,
        "rdc",
        _maximised_cnn,
        _trained_only(lambda kind: _baseline("cnn")(kind) | _purifier(kind)),
        against="L-inf, by its band",
    ),
    Entry(
        "diffpure",
        "DiffPure, plain CNN",
        "Noise the picture, walk back with the unconditional denoiser, then ask the plain network.",
        "Nie et al. 2022",
        "diffpure",
        _diffpure,
        _trained_only(lambda kind: _baseline("cnn")(kind) | _purifier(kind)),
    ),
    Entry(
        "diffpure-tmdc",
        "DiffPure, TMDC",
        "Noise the picture, walk back with the unconditional denoiser, then ask TMDC: what its paper would try next.",
        "Nie et al. 2022; Li et al. 2024 (TMDC)",
        "tmdc",
        _purified_adapted,
        _trained_only(lambda kind: _truth("tmdc")(kind) | _purifier(kind)),
        against="L-inf, through another network",
    ),
    Entry(
        "idc",
        "IDC",
        "Translate the picture into the picture of its label; the nearest label wins.",
        "Mei et al. 2024 (IDC)",
        "idc",
        _idc,
        _trained_only(lambda kind: {"translator": networks.translator_file(kind)}),
    ),
):
    register(_entry)


# ---------------------------------------------------------------------------------------------------------------------
# What others ask


def names(world: str) -> tuple[str, ...]:
    """The classifiers that a world has. Errors: ValueError for a world that does not exist."""
    kind = world_of(world).kind
    return tuple(name for name, entry in ENTRIES.items() if entry.weights(kind) is not None)


def entry_of(world: str, name: str) -> Entry:
    """The entry of a classifier by name, whatever its case. Errors: ValueError for a world or name that is not there."""
    return ENTRIES[units.chosen(name, names(world), f"the classifier of {world_of(world).kind}")]


def classifier(world: str, name: str) -> Classifier:
    """A classifier by name, from pixels and noise to logits, ready to be asked and attacked.

    Errors      ValueError for a world or name that does not exist, or a purifier on a denoiser that was trained without a
                null class; FileNotFoundError, with the command, for weights that are yet to be trained
    """
    entry = entry_of(world, name)
    place = world_of(world)
    return entry.build(Parts(place, entry.weights(place.kind))).eval()


def checkpoints(world: str, name: str) -> dict[str, str]:
    """The weights that a classifier is built of, file -> SHA-256; empty for closed forms."""
    files = entry_of(world, name).weights(world_of(world).kind)
    return {file: assets.fingerprint(file) for file in sorted(set(files.values()))}
