"""Two protocols for every classifier: the one of its own paper, and an honest one. Each is a list of attacks, in full."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from diffclass import attacks
from diffclass.classifiers.base import Classifier, NoiseSource, block_noise, take
from diffclass.noise import generator_of
from diffclass.zoo.attacks import attack as attack_named


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
GRADIENTS = ("exact", "bpda")
STARTS = ("image", "random")


@dataclass(frozen=True)
class Attack:
    """One attack of a protocol.

    loss        a name of `LOSSES`
    method      a name of `zoo.attacks`: "pgd" with steps of `step` budgets, or "apgd", which chooses its own
    gradient    of a purifier: "exact", or that of the identity ("bpda"); others have the exact one only
    fresh       whether a random classifier's noise is drawn anew at every call, or one noise is held
    draws       gradients averaged at every step (EOT); of held noise one is all there is
    restarts    runs, each an attack of its own; all but the first start at random
    start       where the first run starts: "image", or "random" inside the budget
    Errors      ValueError for a name that does not exist, or averaged draws of one held noise
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

    def __post_init__(self):
        if self.start not in STARTS or self.gradient not in GRADIENTS:
            raise ValueError(
                f"expected a start of {STARTS} and a gradient of {GRADIENTS}, got {self.start!r} and {self.gradient!r}."
            )
        if self.loss not in LOSSES:
            raise ValueError(f"expected a loss of {list(LOSSES)}, got {self.loss!r}.")
        needs_step = attack_named(self.method).step_size
        if min(self.steps, self.draws, self.restarts) < 1:
            raise ValueError(
                f"expected at least one step, draw and restart, got {self.steps}, {self.draws} and {self.restarts}."
            )
        if self.draws > 1 and not self.fresh:
            raise ValueError(
                f"expected one draw of held noise, got {self.draws}, which would all be the same; average over fresh noise."
            )
        if (self.step is not None) != needs_step:
            wanted = "a step size" if needs_step else "no step size"
            raise ValueError(f"expected {wanted} for {self.method}, got {self.step}.")

    def __str__(self) -> str:
        """The attack in words, for display."""
        noise = "fresh noise" if self.fresh else "held noise"
        if self.draws > 1:
            noise = f"{noise} x{self.draws}"
        gradient = "BPDA" if self.gradient == "bpda" else self.gradient
        return f"{self.method} {self.loss} {self.steps}, {gradient}, {noise}"

    @property
    def calls(self) -> int:
        """How often one run asks the classifier about an image, also to find the scale of its logits."""
        return (self.steps + 1) * self.draws + int(self.loss == "scaled CE")

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
        Errors      those of `attacks.pgd`
        """
        target = self.climbed(classifier)
        entry = attack_named(self.method)
        source = noise.source(target, self.fresh)
        if self.loss == "scaled CE":
            target = attacks.AttackView.calibrated(target, x, attacks.noise_at(source, -1, 0))
        options = dict(
            noise=source,
            norm=norm,
            steps=self.steps,
            loss=LOSSES[self.loss],
            draws=self.draws,
            generator=noise.start() if self.start == "random" else None,
        )
        if entry.step_size:
            options["step_size"] = self.step * epsilon
        return entry.run(target, x, y, epsilon, **options)

    def climbed(self, classifier: Classifier) -> Classifier:
        """What this attack differentiates: the classifier by the chosen gradient, or the surrogate of its votes."""
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
    norm        "linf" or "l2"; epsilon in pixels
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
        return {**asdict(self), "attacks": [asdict(attack) for attack in self.attacks]}

    @classmethod
    def of_json(cls, content: dict) -> "Protocol":
        """The protocol of an identity. Errors: ValueError for fields that are missing, unknown or cannot be meant."""
        try:
            listed = tuple(Attack(**attack) for attack in content["attacks"])
            return cls(**{**content, "attacks": listed})
        except (TypeError, KeyError) as error:
            raise ValueError(f"expected the fields of a protocol, got others ({error}).") from None

    def runs(self) -> list[Attack]:
        """The attacks in order, each restart as one of its own."""
        return [
            replace(attack, restarts=1, start=attack.start if number == 0 else "random")
            for attack in self.attacks
            for number in range(attack.restarts)
        ]


RDC_TESTER = (Attack("DLR", gradient="bpda", restarts=5, start="random"),)
PGD20 = (Attack("CE", 20, "pgd", fresh=False, step=0.25, start="random"),)
PAPERS = {
    "rdc": RDC_TESTER,
    "diffpure": (
        Attack("CE", draws=20, start="random"),
        Attack("DLR", draws=20, start="random"),
    ),
    "idc": (
        Attack("CE of softmax", 20, "pgd", fresh=False, step=0.25, start="random"),
        Attack("CE of softmax", 1, "pgd", fresh=False, step=1.0),
    ),
    "madry": PGD20,
}
SOURCES = {
    "paper-rdc": "Chen et al. 2024 (RDC), released tester: APGD with the DLR loss alone, 100 steps, 5 restarts, EOT 1, and "
    "the identity's gradient for likelihood maximisation.",
    "paper-diffpure": "Nie et al. 2022 (DiffPure): AutoAttack's random version, APGD with cross-entropy and DLR, 100 steps, "
    "EOT 20; its gradient by the adjoint method, ours exact.",
    "paper-idc": "Mei et al. 2024 (IDC), released code: PGD of 20 steps and FGSM on probabilities taken for logits, with "
    "one frozen noise.",
    "paper-madry": "Madry et al. 2018: PGD of 20 steps with cross-entropy, from one random start.",
    "honest": "Ours: exact gradient and BPDA, held and fresh noise, several losses and starts, at least 100 steps, the "
    "worst for each image, judged anew.",
    "single": "One attack alone, as it was asked for.",
}


def paper(name: str, norm: str, epsilon: float, *, classes: int = 10) -> Protocol:
    """The protocol of a classifier's own paper (the `paper` of its entry), at a budget of our choice.

    Errors      ValueError for an unknown name, or a DLR loss and fewer than 3 classes
    """
    if name not in PAPERS:
        raise ValueError(f"expected a paper's protocol of {', '.join(PAPERS)}, got {name!r}.")
    if classes < 3 and any(attack.loss == "DLR" for attack in PAPERS[name]):
        raise ValueError(
            f"expected at least 3 classes, as the protocol of {name} uses the DLR loss, got {classes}; the honest protocol "
            "has another loss then."
        )
    return Protocol(f"paper-{name}", norm, epsilon, PAPERS[name])


def honest(classifier: Classifier, norm: str, epsilon: float) -> Protocol:
    """The protocol that a number should be quoted from: for every kind of classifier, all that is known to matter.

    Source      Carlini et al. 2019; Croce & Hein 2020; Lee & Kim 2023
    Chosen by   what the classifier declares: whether it has noise, its gradients, and the draws to average (`eot`)
    Why pgd     under fresh noise APGD returns, and steps back to, the image whose draw was luckiest; PGD returns its last
    Classes     fewer than 3 have no DLR loss, and get the margin's instead
    """
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
    return Protocol("honest", norm, epsilon, tuple(dict.fromkeys(listed)))


def single(attack: Attack, norm: str, epsilon: float) -> Protocol:
    """One attack alone."""
    return Protocol("single", norm, epsilon, (attack,))
