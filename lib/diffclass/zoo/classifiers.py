"""Every defence that the course speaks of, by name, made of the networks in `assets/`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffclass.classifiers import cnn, idc
from diffclass.classifiers.purified import Defended, LikelihoodMaximisation, Purification
from diffclass.classifiers.votes import MajorityVote
from diffclass.data import worlds
from diffclass.denoisers.base import Denoiser
from diffclass.storage import assets
from diffclass.zoo import networks

BUDGETS = {
    "digits": {"linf": 0.1, "l2": 1.0},
    "cifar10": {"linf": 8 / 255, "l2": 0.5},
    "plane": {"linf": 0.05, "l2": 0.05},
}  # in pixels


VOTES = 11


@dataclass(frozen=True)
class _Parts:
    """The parts of a world's defences, each loaded when it is asked for."""

    world: str
    law: str
    exact: bool
    seed: int

    def budget(self) -> float:
        """The L-inf budget within which the paper's likelihood maximisation stays: that of the attacks."""
        return BUDGETS[self.world]["linf"]

    def bayes(self) -> nn.Module:
        """The diffusion classifier."""
        if self.world == "plane":
            return networks.plane_classifier(networks.plane_law(self.law), seed=self.seed)
        return self.classifier(networks.load(self.world)[0])

    def hardened(self) -> nn.Module:
        """The diffusion classifier whose denoiser was trained on attacked images."""
        command = f"diffclass train {self.world} --method adversarial-dc"
        return self.classifier(networks.loaded(_trained(networks.HARDENED[self.world], command)))

    def contrastive(self) -> nn.Module:
        """The diffusion classifier whose denoiser was trained to tell the classes apart."""
        command = f"diffclass train {self.world} --method contrastive"
        return self.classifier(networks.loaded(_trained(networks.CONTRASTIVE[self.world], command)))

    def unconditional(self) -> Denoiser:
        """A denoiser that also answers without a class, for purifiers."""
        return (
            self.bayes().denoiser
            if self.world == "plane"
            else networks.loaded(assets.verified(_unconditional(self.world)))
        )

    def classifier(self, denoiser: Denoiser) -> nn.Module:
        """The course's diffusion classifier of this world, with another denoiser."""
        return networks.CLASSIFIERS[self.world][0](denoiser, seed=self.seed)

    def vote(self) -> nn.Module:
        """The majority of fresh noises of the diffusion classifier."""
        return MajorityVote(
            self.bayes().with_fresh_noise(torch.Generator().manual_seed(self.seed)), VOTES
        )

    def baseline(self, method: str) -> nn.Module:
        """The plain or the adversarially trained network."""
        file = cnn.FILES[self.world][method]
        return cnn.load(_trained(file, f"diffclass train {self.world} --method {method}"))[0]

    def translation(self) -> nn.Module:
        """The classifier that translates into label pictures."""
        file = _trained(_translator(self.world), f"diffclass train {self.world} --method idc")
        return idc.TranslationClassifier(idc.load_translator(file)[0], seed=self.seed)

    def purified(self, classifier: str, make: Callable[..., nn.Module], *steps: int) -> nn.Module:
        """A purifier before a classifier; its seed is another one, as the same would repeat the classifier's noise."""
        options = (self.budget(), *steps) if steps else ()
        first = make(self.unconditional(), *options, exact=self.exact, seed=self.seed + 1)
        return Defended(first, _PLAIN[classifier](self))


_PLAIN: dict[str, Callable[[_Parts], nn.Module]] = {
    "dc": _Parts.bayes,
    "cnn": lambda parts: parts.baseline("cnn"),
    "adversarial": lambda parts: parts.baseline("adversarial"),
    "adversarial-dc": _Parts.hardened,
    "contrastive": _Parts.contrastive,
    "idc": _Parts.translation,
    "vote": _Parts.vote,
}


_PURIFIED = {  # the classifier behind the purifier, the purifier, and its steps where it is asked for a number
    "lm-cnn": ("cnn", LikelihoodMaximisation.paper, 5),
    "rdc1": ("dc", LikelihoodMaximisation.paper, 1),
    "rdc5": ("dc", LikelihoodMaximisation.paper, 5),
    "rdc-released": ("dc", LikelihoodMaximisation.released),
    "rdc-contrastive": ("contrastive", LikelihoodMaximisation.paper, 5),
    "diffpure": ("cnn", Purification),
}


_EXACT = ("dc", "rdc1", "rdc5", "rdc-released", "vote")  # what a world without trained networks has


NAMES = {"digits": (*_PLAIN, *_PURIFIED), "cifar10": (*_PLAIN, *_PURIFIED), "plane": _EXACT}


def defence(
    world: str,
    name: str,
    *,
    exact: bool = True,
    seed: int = 0,
    fresh: torch.Generator | None = None,
) -> nn.Module:
    """A defence by name, from pixels to logits, ready to be asked and attacked.

    dc is the diffusion classifier, adversarial-dc the same trained on attacked images, contrastive the same trained to
    tell classes apart; lm-cnn, rdc1, rdc5, rdc-released and rdc-contrastive maximise the likelihood before the plain
    network or one of these (in the paper's way with 1 or 5 steps, or as the code does it); diffpure noises and denoises
    before the plain network; vote is the majority of 11 fresh noises
    Shapes      x [B,C,H,W] in [0,1] -> logits [B,K]
    Randomness  one fixed noise, from `seed`; drawn anew at every call from `fresh`, where it is given
    Errors      ValueError for a world or name that does not exist, a generator that a defence has no use for, or a
                purifier on a denoiser trained without a null class; FileNotFoundError, with the command, for weights
                that are yet to be trained
    """
    kind, law = _world(world)
    name = networks.chosen(name, NAMES[kind], f"the defence of {kind}")
    parts = _Parts(kind, law, exact, seed)
    made = _PLAIN[name](parts) if name in _PLAIN else parts.purified(*_PURIFIED[name])
    if fresh is None:
        return made
    if not hasattr(made, "with_fresh_noise"):
        raise ValueError(
            f"expected no generator for {name}, which has no noise that could be drawn by one."
        )
    return made.with_fresh_noise(fresh)


def checkpoints(world: str, name: str) -> dict[str, str]:
    """The weights that a defence is made of, file -> SHA-256; empty for closed forms."""
    kind, _ = _world(world)
    if kind == "plane":
        return {}
    own = {
        "idc": _translator(kind),
        "adversarial-dc": networks.HARDENED[kind],
        "contrastive": networks.CONTRASTIVE[kind],
        **cnn.FILES[kind],
    }
    classifier = _PURIFIED[name][0] if name in _PURIFIED else name
    files = [own.get(classifier) or networks.available_model(kind, None)]
    if name in _PURIFIED and _unconditional(kind) not in files:
        files.append(_unconditional(kind))
    return {file: assets.fingerprint(file) for file in files}


def images(world: str, limit: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The first test images of a world and their labels; of the plane, points drawn from `seed`."""
    kind, law = _world(world)
    if kind == "plane":
        return networks.plane_law(law).sample(limit or 1000, torch.Generator().manual_seed(seed))
    return worlds.test_pictures(kind, "", limit, seed)


def budget(world: str, norm: str) -> float:
    """The budget that a world is attacked with. Units: pixels. Errors: ValueError for a name that does not exist."""
    return networks.chosen(norm, BUDGETS[_world(world)[0]], "the norm")


def _world(world: str) -> tuple[str, str]:
    kind, _, law = world.partition(":")
    kind = networks.chosen(kind, tuple(BUDGETS), "the world")
    if kind == "plane":
        networks.plane_law(law)
    elif law:
        raise ValueError(f"expected the world {kind!r} without a law, got {world!r}.")
    return kind, law


def _translator(kind: str) -> str:
    """The first translator of a world that is in `assets/`, else the first."""
    first, *others = idc.FILES[kind]
    return next(filter(_present, (first, *others)), first)


def _unconditional(kind: str) -> str:
    """The weights of a denoiser with a null class: those of dc, or the contrastive ones where they have none."""
    file = networks.available_model(kind, None)
    return (
        file
        if networks.has_null(file) or not _present(networks.CONTRASTIVE[kind])
        else networks.CONTRASTIVE[kind]
    )


def _present(file: str) -> bool:
    return bool(assets.parts(file, assets.checksums()))


def _trained(file: str, command: str):
    """The verified path of an asset that a command makes."""
    if not _present(file):
        raise FileNotFoundError(
            f"expected the weights {file} in {assets.folder().name}/, found none; train them with "
            f"`{command}`."
        )
    return assets.verified(file)
