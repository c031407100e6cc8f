"""Two protocols for every classifier: the one of its own paper, and an honest one. Each is a list of attacks, in full."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from diffclass import attacks
from diffclass.classifiers.base import Classifier, NoiseSource, block_noise, take
from diffclass.data.worlds import kind_of
from diffclass.noise import generator_of
from diffclass.zoo.attacks import attack as attack_named
from diffclass.zoo.classifiers import ENTRIES as CLASSIFIERS
from diffclass.zoo.classifiers import classifier as another


def _of_probabilities(logits: Tensor, y: Tensor) -> Tensor:
    """The cross-entropy of probabilities taken for logits, as a released attack has it: nearly flat."""
    return attacks.cross_entropy_loss(logits.softmax(1), y)


# "scaled CE" sees the logits through `attacks.AttackView`: shifted, and a median margin of one on the clean images.
LOSSES = {
    "margin": attacks.margin_loss,
    "DLR": attacks.dlr_loss,
    "CE": attacks.cross_entropy_loss,
    "scaled CE": attacks.cross_entropy_loss,
    "CE of softmax": _of_probabilities,
}
# Losses towards one wrong class: each target is a run of its own.
TARGETED = {
    "targeted margin": attacks.targeted_loss,
    "targeted DLR": attacks.targeted_dlr_loss,
}
OWN = "its own"  # the loss of an attack that is told none
GRADIENTS = ("exact", "bpda")
STARTS = ("image", "random")


@dataclass(frozen=True)
class Attack:
    """One attack of a protocol.

    loss        a name of `LOSSES` or `TARGETED`, or `OWN`
    method      a name of `zoo.attacks`: "pgd" with steps of `step` budgets, "apgd", which chooses its own, "square", ...
    gradient    of a purifier: "exact", or that of the identity ("bpda"); others have the exact one only
    fresh       whether a random classifier's noise is drawn anew at every call, or one noise is held
    draws       gradients averaged at every step (EOT); of held noise one is all there is
    restarts    runs, each an attack of its own; all but the first start at random
    start       where the first run starts: "image", or "random" inside the budget
    targets     the wrong classes that it goes towards, by rank: 1 is the most likely one on the clean image, under the
                held noise; empty for a loss without a target
    through     the name of another classifier of the same world, which is attacked in place of this one: by transfer
    Errors      ValueError for a name that does not exist, averaged draws of one held noise, fresh noise of another
                classifier, or choices that the method does not have
    """

    loss: str
    steps: int = 100
    method: str = "apgd"
    gradient: str = "exact"
    fresh: bool = True
    draws: int = 1
    restarts: int = 1
    step: float | None = None
    start: str = "image"
    targets: tuple[int, ...] = ()
    through: str | None = None

    def __post_init__(self):
        if self.start not in STARTS or self.gradient not in GRADIENTS:
            raise ValueError(
                f"expected a start of {STARTS} and a gradient of {GRADIENTS}, got {self.start!r} and {self.gradient!r}."
            )
        entry = attack_named(self.method)
        allowed = [OWN] if entry.own_loss else [*LOSSES, *TARGETED]
        if self.loss not in allowed:
            raise ValueError(f"expected a loss of {allowed} for {self.method}, got {self.loss!r}.")
        if min(self.steps, self.draws, self.restarts) < 1:
            raise ValueError(
                f"expected at least one step, draw and restart, got {self.steps}, {self.draws} and {self.restarts}."
            )
        if entry.steps not in (None, self.steps):
            raise ValueError(
                f"expected {entry.steps} steps of {self.method}, which has no other number, got {self.steps}."
            )
        if self.draws > 1 and not self.fresh:
            raise ValueError(
                f"expected one draw of held noise, got {self.draws}, which would all be the same; average over fresh noise."
            )
        if self.fresh and entry.held:
            raise ValueError(
                f"expected held noise for {self.method}, which compares one call with the next, got fresh noise."
            )
        if (self.step is not None) != entry.step_size:
            wanted = "a step size" if entry.step_size else "no step size"
            raise ValueError(f"expected {wanted} for {self.method}, got {self.step}.")
        self._check_targets(entry.targeted or self.loss in TARGETED)
        if self.through is not None and (self.through not in CLASSIFIERS or self.fresh):
            raise ValueError(
                f"expected held noise and the name of a classifier to attack in place of this one, got {self.through!r} with "
                f"{'fresh' if self.fresh else 'held'} noise; `diffclass list` names them."
            )

    def _check_targets(self, wanted: bool) -> None:
        # JSON has lists, and a list is not a tuple
        object.__setattr__(self, "targets", tuple(self.targets))
        if bool(self.targets) != wanted:
            words = "the ranks of its targets" if wanted else "no targets"
            raise ValueError(
                f"expected {words} for {self.method} with the loss {self.loss}, got {self.targets}."
            )
        whole = all(type(rank) is int and rank > 0 for rank in self.targets)
        if not whole or len(set(self.targets)) < len(self.targets):
            raise ValueError(
                f"expected targets as ranks from 1, each once, got {self.targets}; 1 is the most likely wrong class."
            )

    def __str__(self) -> str:
        """The attack in words, for display."""
        noise = "fresh noise" if self.fresh else "held noise"
        if self.draws > 1:
            noise = f"{noise} x{self.draws}"
        gradient = "BPDA" if self.gradient == "bpda" else self.gradient
        name = self.method
        if self.loss != OWN:
            name = f"{name} {self.loss}"
        if attack_named(self.method).steps is None:
            name = f"{name} {self.steps}"
        words = f"{name}, {gradient}, {noise}"
        if len(self.targets) > 1:
            words = f"{words}, {len(self.targets)} targets"
        elif self.targets:
            words = f"{words}, towards wrong class {self.targets[0]}"
        if self.through:
            words = f"{words}, by transfer from {self.through}"
        return words

    def as_json(self) -> dict:
        """Its identity: every field, as JSON values; without targets or transfer as it was before there were any."""
        content = {**asdict(self), "targets": list(self.targets)}
        return {
            name: value
            for name, value in content.items()
            if value or name not in ("targets", "through")
        }

    @property
    def calls(self) -> int:
        """How often one run asks the classifier about an image at most, also for the scale or the order of its logits.

        Meaning     an attack by transfer never asks it
        """
        if self.through:
            return 0
        entry = attack_named(self.method)
        looks = int(self.loss == "scaled CE" or self.loss in TARGETED)
        return entry.calls(self.steps, len(self.targets)) * self.draws + looks

    def runs(self) -> list["Attack"]:
        """Each target, and of it each restart, as an attack of its own."""
        towards = [self.targets]
        if self.loss in TARGETED:
            towards = [(rank,) for rank in self.targets]
        return [
            replace(
                self, restarts=1, start=self.start if number == 0 else "random", targets=targets
            )
            for number in range(self.restarts)
            for targets in towards
        ]

    def frames(
        self,
        classifier: Classifier,
        x: Tensor,
        y: Tensor,
        epsilon: float,
        norm: str,
        noise: "AttackNoise",
    ) -> Iterator[attacks.AttackStep]:
        """One run on some images.

        Shapes      x [B,C,H,W] in [0,1], y [B] -> yields `attacks.AttackStep`
        Errors      those of `attacks.pgd`; ValueError for several targets, which are several runs, for a rank that the
                    classifier has no class of, for a norm or a number of classes that the method cannot attack
        """
        target = self.climbed(classifier).to(x.device)  # another one was just loaded
        entry = attack_named(self.method)
        if norm not in entry.norms or classifier.num_classes < entry.classes:
            raise ValueError(
                f"expected a norm of {', '.join(entry.norms)} and at least {entry.classes} classes for the attack "
                f"{self.method}, got {norm!r} and {classifier.num_classes} classes."
            )
        last = max(self.targets, default=0)
        if last >= classifier.num_classes:
            raise ValueError(
                f"expected targets among {classifier.num_classes - 1} wrong classes, got number {last}; the protocol was "
                "chosen for another classifier."
            )
        source = noise.source(target, self.fresh)
        options = dict(
            noise=source,
            norm=norm,
            steps=self.steps,
            generator=noise.start() if self.start == "random" or entry.random else None,
        )
        if self.loss in TARGETED:
            options["loss"] = self._towards(target, x, y, noise)
        elif self.loss != OWN:
            options["loss"] = LOSSES[self.loss]
        if self.loss == "scaled CE":
            target = attacks.AttackView.calibrated(target, x, attacks.noise_at(source, -1, 0))
        if self.draws > 1:
            options["draws"] = self.draws
        if entry.step_size:
            options["step_size"] = self.step * epsilon
        if entry.targeted:
            options["targets"] = len(self.targets)
        return entry.run(target, x, y, epsilon, **options)

    def _towards(
        self, classifier: Classifier, x: Tensor, y: Tensor, noise: "AttackNoise"
    ) -> attacks.AttackLoss:
        """The loss towards each image's wrong class of this rank, by one noise that is the same for every rank."""
        if len(self.targets) > 1:
            raise ValueError(
                f"expected one target of a run, got {len(self.targets)}; each of runs() has one."
            )
        order = attacks.ranked(classifier, x, y, noise.source(classifier, fresh=False))
        return TARGETED[self.loss](order[:, self.targets[0] - 1])

    def climbed(self, classifier: Classifier) -> Classifier:
        """What this attack differentiates: the classifier by the chosen gradient, the surrogate of its votes, or another.

        Errors      those of `zoo.classifiers.classifier`, for weights of another one that are yet to be trained
        """
        if self.through:
            return another(kind_of(classifier.image_shape), self.through)
        by_name = classifier.gradients()
        if not by_name:
            return classifier.surrogate()
        return by_name.get(self.gradient, by_name["exact"])


@dataclass(frozen=True)
class AttackNoise:
    """The randomness of one attack on one block of images, by keys: no run depends on what was drawn before it.

    block       the number of the block of 64 images
    kept        the places of the attacked images within the block
    """

    seed: int
    number: int
    block: int
    kept: Tensor

    def source(self, classifier: Classifier, fresh: bool) -> NoiseSource:
        """Noise for every step and draw, each image its own; or one noise for all images and steps."""
        if not fresh:
            return classifier.sample_noise(1, generator_of(self.seed, "held noise"))
        return lambda step, draw: take(
            block_noise(classifier, self.block, self.seed, "attack", self.number, step, draw),
            self.kept,
        )

    def start(self) -> torch.Generator:
        """What random starts are drawn from."""
        return generator_of(self.seed, "start", self.number, self.block)


@dataclass(frozen=True)
class Protocol:
    """Everything that was chosen for a robust accuracy.

    version     another number is another protocol: records name it, and are judged by it
    norm        "linf" or "l2", epsilon in pixels; or "flow", epsilon in pixel widths
    draws       how often a random classifier is asked about each finished perturbation, with noise that no attack saw;
                a deterministic one is asked once
    """

    name: str
    norm: str
    epsilon: float
    attacks: tuple[Attack, ...]
    version: int = 1
    draws: int = 10

    def __post_init__(self):
        if not self.attacks:
            raise ValueError(
                f"expected at least one attack in the protocol {self.name!r}, got none."
            )
        attacks.threat(self.norm)
        if len(set(map(str, self.attacks))) < len(self.attacks):
            raise ValueError(
                "expected attacks that differ, got one twice; give it more restarts instead."
            )

    @property
    def key(self) -> str:
        """By what records name it, such as "honest-1"."""
        return f"{self.name}-{self.version}"

    @property
    def source(self) -> str:
        """Whose protocol this is, in one sentence."""
        return SOURCES[self.name]

    def as_json(self) -> dict:
        """Its identity: every field, as JSON values."""
        return {**asdict(self), "attacks": [attack.as_json() for attack in self.attacks]}

    @classmethod
    def of_json(cls, content: dict) -> "Protocol":
        """The protocol of an identity. Errors: ValueError for fields that are missing, unknown or cannot be meant."""
        try:
            listed = tuple(Attack(**attack) for attack in content["attacks"])
            return cls(**{**content, "attacks": listed})
        except (TypeError, KeyError) as error:
            raise ValueError(f"expected the fields of a protocol, got others ({error}).") from None

    def runs(self) -> list[Attack]:
        """The attacks in order, each target and restart as one of its own."""
        return [run for attack in self.attacks for run in attack.runs()]


RDC_TESTER = (Attack("DLR", gradient="bpda", restarts=5, start="random"),)
TRANSFERRED = dict(fresh=False, through="cnn")
PGD20 = (Attack("CE", 20, "pgd", fresh=False, step=0.25, start="random"),)
IDC_PGD = Attack("CE of softmax", 20, "pgd", fresh=False, step=0.25, start="random")


def _idc_2(norm: str, classes: int) -> tuple[Attack, ...]:
    """IDC's whole list: each attack where the norm is its own, as MI-FGSM has no L2 and CW no L-inf."""
    targets = attacks.ranks(classes)
    listed = (
        Attack("CE of softmax", 1, "fgsm", fresh=False),
        IDC_PGD,
        Attack(OWN, 5, "mifgsm", fresh=False),
        Attack(OWN, 1000, "cw", fresh=False),
        Attack(OWN, 10, "autoattack-10", fresh=False, targets=targets),
        Attack("CE of softmax", 50, "pgd", draws=15, step=0.25),
    )
    return tuple(attack for attack in listed if norm in attack_named(attack.method).norms)


def _tmdc_1(norm: str, classes: int) -> tuple[Attack, ...]:
    """TMDC's list, all of it of another network: in L2 AutoAttack alone."""
    plus = Attack(OWN, 10, "autoattack-plus-10", targets=attacks.ranks(classes), **TRANSFERRED)
    if norm != "linf":
        return (plus,)
    return (
        Attack("CE", 1, "fgsm", **TRANSFERRED),
        # 2/255 of 0.05
        Attack("CE", 40, "pgd", step=round(2 / 255 / 0.05, 3), start="random", **TRANSFERRED),
        plus,
    )


# Name -> version -> its attacks, or what lists them for a norm and a number of classes.
PAPERS = {
    "rdc": {1: RDC_TESTER},
    "diffpure": {
        1: (
            Attack("CE", draws=20, start="random"),
            Attack("DLR", draws=20, start="random"),
        )
    },
    "idc": {
        1: (IDC_PGD, Attack("CE of softmax", 1, "pgd", fresh=False, step=1.0)),
        2: _idc_2,
    },
    "madry": {1: PGD20},
    "tmdc": {1: _tmdc_1},
}
SOURCES = {
    "paper-rdc": "Chen et al. 2024 (RDC), released tester: APGD with the DLR loss alone, 100 steps, 5 restarts, EOT 1, and "
    "the identity's gradient for likelihood maximisation.",
    "paper-diffpure": "Nie et al. 2022 (DiffPure): AutoAttack's random version, APGD with cross-entropy and DLR, 100 steps, "
    "EOT 20; its gradient by the adjoint method, ours exact.",
    "paper-idc": "Mei et al. 2024 (IDC), released code: FGSM and PGD of 20 steps on probabilities taken for logits, with "
    "one frozen noise; from version 2 on also MI-FGSM of 5 steps, CW of 1000 (its weight 1, theirs 0.0001, which hardly "
    "leaves the image), torchattacks' AutoAttack as shipped, and PGD of 50 steps on the mean of 15 draws.",
    "paper-madry": "Madry et al. 2018: PGD of 20 steps with cross-entropy, from one random start.",
    "paper-tmdc": "Li et al. 2024 (TMDC): FGSM, PGD of 40 steps and AutoAttack plus as torchattacks ships it, in L2 AutoAttack "
    "alone, all of a plain network in place of the classifier (theirs a ResNet-50, ours the registry's), within the budget of "
    "pixels in [0,1].",
    "honest": "Ours: exact gradient and BPDA, held and fresh noise, several losses and starts, at least 100 steps, from "
    "version 2 on every target and a search without gradients (neither of flows), the worst for each image, judged anew.",
    "single": "One attack alone, as it was asked for.",
}


def paper(
    name: str, norm: str, epsilon: float, *, classes: int = 10, version: int | None = None
) -> Protocol:
    """The protocol of a classifier's own paper (the `paper` of its entry), at a budget of our choice.

    Shapes      version: the newest one, unless another is asked for
    Errors      ValueError for an unknown name or version, a DLR loss and fewer than 3 classes, or an attack that needs more
    """
    if name not in PAPERS:
        raise ValueError(f"expected a paper's protocol of {', '.join(PAPERS)}, got {name!r}.")
    number = max(PAPERS[name]) if version is None else version
    if number not in PAPERS[name]:
        raise ValueError(f"expected paper-{name} of {_versions(name)}, got version {number}.")
    chosen = PAPERS[name][number]
    listed = chosen(norm, classes) if callable(chosen) else chosen
    if classes < 3 and any(attack.loss == "DLR" for attack in listed):
        raise ValueError(
            f"expected at least 3 classes, as the protocol of {name} uses the DLR loss, got {classes}; the honest protocol "
            "has another loss then."
        )
    fewest = max(attack_named(attack.method).classes for attack in listed)
    if classes < fewest:
        raise ValueError(
            f"expected at least {fewest} classes, as the protocol of {name} has an attack that needs them, got {classes}; "
            "the honest protocol has others."
        )
    return Protocol(f"paper-{name}", norm, epsilon, listed, number)


def _versions(name: str) -> str:
    return " or ".join(f"version {number}" for number in PAPERS[name])


_of_paper = paper  # in `named`, `paper` is a name


# Queries of the black box. It is there for masked gradients, which few queries show; with AutoAttack's 5000 it would be
# most of the cost.
SQUARES = 1000


def honest(classifier: Classifier, norm: str, epsilon: float) -> Protocol:
    """The protocol that a number should be quoted from: for every kind of classifier, all that is known to matter.

    Source      Carlini et al. 2019; Croce & Hein 2020; Andriushchenko et al. 2020; Lee & Kim 2023
    Chosen by   what the classifier declares: whether it has noise, its gradients, and the draws to average (`eot`)
    Order       cheap attacks first: an image that fell at every draw is not asked about again
    Why targets an untargeted loss climbs towards the class that is nearest at the image, and another one may be reached
                first within the budget: of a linear classifier it leaves images that a target takes
    Why pgd     under fresh noise APGD returns, and steps back to, the image whose draw was luckiest; PGD returns its last
    Why held    squares compare one call with the next, so noise must not differ between them
    Classes     fewer than 3 have no DLR loss, fewer than 4 no targeted one: the margin's are in their place; of more than
                10 the 9 most likely wrong ones are targets
    Flows       have fewer attacks: StAdv, and PGD on flows without its wish for smoothness, by two losses and where there is
                one by BPDA; no targets, and no search without gradients
    """
    return Protocol("honest", norm, epsilon, _honest(2, classifier, norm), version=2)


def _honest(version: int, classifier: Classifier, norm: str) -> tuple[Attack, ...]:
    """The attacks of a version. Errors: ValueError for flows by a version that had none."""
    if norm != "flow":
        return HONEST[version](classifier)
    if version < 2:
        raise ValueError(
            f"expected honest-2 for flows, got honest-{version}, which has no attack on them."
        )
    bends = Attack(
        "margin",
        100,
        "bend",
        fresh=not classifier.deterministic,
        draws=1 if classifier.deterministic else classifier.eot,
        step=0.1,
    )
    listed = (replace(bends, method="stadv"), bends, replace(bends, loss="scaled CE"))
    straight = "bpda" in classifier.gradients()
    return (*listed, replace(bends, gradient="bpda")) if straight else listed


def _honest_1(classifier: Classifier) -> tuple[Attack, ...]:
    """The first honest protocol, by which old records are judged: no targets, no black box."""
    ratio = "DLR" if classifier.num_classes > 2 else "margin"
    averaged = Attack("margin", 100, "pgd", draws=classifier.eot, step=0.1)
    if classifier.deterministic:
        listed = tuple(
            Attack(loss, fresh=False, restarts=5) for loss in ("margin", ratio, "scaled CE")
        )
    elif "bpda" in classifier.gradients():
        listed = (
            averaged,
            replace(averaged, loss=ratio, gradient="bpda", draws=1),
            Attack("scaled CE", fresh=False),
        )
    else:
        listed = (averaged, Attack(ratio, fresh=False), replace(averaged, loss="scaled CE"))
    return tuple(dict.fromkeys(listed))


def _honest_2(classifier: Classifier) -> tuple[Attack, ...]:
    """The second honest protocol: the first one's attacks, targets, and squares."""
    towards = attacks.ranks(classifier.num_classes)
    ratio = "DLR" if classifier.num_classes > 2 else "margin"
    averaged = Attack("margin", 100, "pgd", draws=classifier.eot, step=0.1)
    quick = Attack("margin", 10, "pgd", step=0.25)  # takes what is not defended, for a tenth
    averaged_towards = replace(averaged, loss="targeted margin", targets=towards)
    if classifier.deterministic:
        held_towards = [Attack("targeted margin", fresh=False, targets=towards)]
        if classifier.num_classes > 3:
            held_towards.append(replace(held_towards[0], loss="targeted DLR"))
        listed = (
            Attack("margin", 1, "fgsm", fresh=False),
            Attack("margin", fresh=False, restarts=5),
            *held_towards,
            Attack(ratio, fresh=False, restarts=5),
            Attack("scaled CE", fresh=False, restarts=5),
            Attack("margin", SQUARES, "square", fresh=False),
        )
    elif "bpda" in classifier.gradients():
        straight = replace(averaged, loss=ratio, gradient="bpda", draws=1)
        listed = (
            replace(quick, gradient="bpda"),
            straight,
            Attack("scaled CE", fresh=False),
            averaged,
            replace(straight, loss="targeted margin", targets=towards),
            Attack("margin", SQUARES, "square", fresh=False),
            averaged_towards,
        )
    else:
        listed = (
            quick,
            Attack(ratio, fresh=False),
            averaged,
            replace(averaged, loss="scaled CE"),
            Attack("margin", SQUARES, "square", fresh=False),
            averaged_towards,
        )
    return tuple(dict.fromkeys(listed))


HONEST = {1: _honest_1, 2: _honest_2}


def named(
    name: str, version: int, classifier: Classifier, paper: str, norm: str, epsilon: float
) -> Protocol:
    """The protocol of a name and version, as this library defines it for a classifier: records are judged by it.

    Shapes      name as in `Protocol.name`; paper: the `paper` of the classifier's entry, the only one that it is judged by
    Errors      ValueError for one that the library does not know, or whose attacks are its own choice ("single"); those of
                `paper`
    """
    if name == "honest" and version in HONEST:
        return Protocol("honest", norm, epsilon, _honest(version, classifier, norm), version)
    if name == f"paper-{paper}" and version in PAPERS[paper]:
        return _of_paper(paper, norm, epsilon, classes=classifier.num_classes, version=version)
    listed = [f"honest-{number}" for number in HONEST]
    listed += [f"paper-{paper}-{number}" for number in PAPERS[paper]]
    known = ", ".join(listed)
    raise ValueError(
        f"expected the protocol {known} or single-1, got {name}-{version}; this library cannot judge by it."
    )


def single(attack: Attack, norm: str, epsilon: float) -> Protocol:
    """One attack alone."""
    return Protocol("single", norm, epsilon, (attack,))


# An attack that is told the length of its steps takes them of a tenth of the budget; few steps are longer, so that all of
# them together can cross the budget from any start (Madry et al. 2018: 2.5 budgets in all).
STEP_SIZE = 0.1
REACH = 2.5


def alone(
    name: str, classifier: Classifier, norm: str, epsilon: float, steps: int | None = None
) -> Protocol:
    """One attack by name alone, its other choices made for the classifier: noise, draws, targets, the length of steps.

    Errors      ValueError for a name that does not exist, a norm, a number of steps or of classes that it cannot attack,
                or a classifier that maximises no likelihood where that is what is attacked
    """
    entry = attack_named(name)
    if entry.prior:
        attacks.prior_of(classifier)
    if norm not in entry.norms:
        raise ValueError(
            f"expected a norm of {', '.join(entry.norms)} for the attack {entry.name}, got {norm!r}."
        )
    if classifier.num_classes < entry.classes:
        raise ValueError(
            f"expected at least {entry.classes} classes for the attack {entry.name}, got {classifier.num_classes}."
        )
    count = (entry.steps or entry.usual) if steps is None else steps
    fresh = not (classifier.deterministic or entry.held)
    chosen = Attack(
        loss=OWN if entry.own_loss else "margin",
        steps=count,
        method=entry.name,
        gradient="bpda" if entry.prior else "exact",
        fresh=fresh,
        draws=classifier.eot if fresh else 1,
        step=max(STEP_SIZE, REACH / count) if entry.step_size else None,
        targets=attacks.ranks(classifier.num_classes) if entry.targeted else (),
    )
    return single(chosen, norm, epsilon)
