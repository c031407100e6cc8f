"""Two protocols for every defence: the one of its own paper, and an honest one. Each is a list of attacks, in full."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from diffclass import attacks


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


METHODS = {"pgd": attacks.pgd, "apgd": attacks.apgd}


@dataclass(frozen=True)
class Attack:
    """One attack of a protocol.

    method      "pgd" with steps of `step` budgets, or "apgd", which chooses its own
    loss        a name of `LOSSES`
    exact       the gradient of a purifier: exact, or that of the identity (BPDA); others have the exact one only
    fresh       whether a classifier that can draws its noise anew at every call, or keeps one fixed noise
    draws       gradients averaged at every step (EOT); of fixed noise one is all there is
    restarts    runs, each an attack of its own; all but the first start at random
    start       where the first run starts: "image", or "random" inside the budget. Where the margin is convex, as in a
                linear model, only the image itself is sure to lead to the best wrong class
    Errors      ValueError for a name that does not exist, or averaged draws of one fixed noise
    """

    loss: str
    steps: int = 100
    method: str = "apgd"
    exact: bool = True
    fresh: bool = True
    draws: int = 1
    restarts: int = 1
    step: float | None = None
    start: str = "image"

    def __post_init__(self):
        if self.start not in ("image", "random"):
            raise ValueError(
                f"expected an attack to start at the 'image' or at 'random', got {self.start!r}."
            )
        if self.loss not in LOSSES or self.method not in METHODS:
            raise ValueError(
                f"expected a loss of {list(LOSSES)} and a method of {list(METHODS)}, got {self.loss!r} "
                f"and {self.method!r}."
            )
        if min(self.steps, self.draws, self.restarts) < 1:
            raise ValueError(
                f"expected at least one step, draw and restart, got {self.steps}, {self.draws} and "
                f"{self.restarts}."
            )
        if self.draws > 1 and not self.fresh:
            raise ValueError(
                f"expected one draw of fixed noise, got {self.draws}, which would all be the same; "
                "average over fresh noise."
            )
        if (self.step is not None) != (self.method == "pgd"):
            raise ValueError(
                f"expected a step size for pgd, and none for apgd, got {self.step} for {self.method}."
            )

    def __str__(self) -> str:
        noise = (
            f"fresh noise{f' x{self.draws}' if self.draws > 1 else ''}"
            if self.fresh
            else "fixed noise"
        )
        return (
            f"{self.method} {self.loss} {self.steps}, {'exact' if self.exact else 'BPDA'}, {noise}"
        )

    @property
    def calls(self) -> int:
        """How often one run asks the classifier about an image, also to find the scale of its logits."""
        return (self.steps + 1) * self.draws + (self.loss == "scaled CE")

    def frames(
        self,
        classifier: nn.Module,
        x: Tensor,
        y: Tensor,
        epsilon: float,
        norm: str,
        noise: torch.Generator,
        start: torch.Generator,
    ) -> Iterator[attacks.AttackStep]:
        """One run; a random start is drawn from `start`, and a random classifier draws from `noise`.

        Shapes      x [B,C,H,W] in [0,1], y [B] -> yields `attacks.AttackStep`
        Errors      those of `attacks.pgd`
        """
        if hasattr(classifier, "with_gradient"):
            classifier = classifier.with_gradient(self.exact)
        if self.fresh and hasattr(classifier, "with_fresh_noise"):
            classifier = classifier.with_fresh_noise(noise)
        if self.loss == "scaled CE":
            classifier = attacks.AttackView.calibrated(classifier, x)
        options = dict(
            norm=norm,
            steps=self.steps,
            loss=LOSSES[self.loss],
            draws=self.draws,
            generator=start if self.start == "random" else None,
        )
        if self.method == "pgd":
            options["step_size"] = self.step * epsilon
        return METHODS[self.method](classifier, x, y, epsilon, **options)


@dataclass(frozen=True)
class Protocol:
    """Everything that was chosen for a robust accuracy; its repr is what a record keeps.

    norm        "linf" or "l2"; epsilon in pixels
    draws       how often a random defence is asked about each finished perturbation, with noise that no attack saw;
                a deterministic one is asked once
    source      one sentence: whose protocol this is
    """

    name: str
    defence: str
    norm: str
    epsilon: float
    attacks: tuple[Attack, ...]
    source: str
    draws: int = 10

    def __post_init__(self):
        if len(set(map(str, self.attacks))) < len(self.attacks):
            raise ValueError(
                "expected attacks of different names, got one twice; give it more restarts instead."
            )

    def runs(self) -> list[tuple[str, Attack]]:
        """The attacks in order, each restart as one of its own, under the names that results go by."""
        return [
            (
                f"{attack}{f', run {number}' if attack.restarts > 1 else ''}",
                replace(attack, start=attack.start if number == 1 else "random"),
            )
            for attack in self.attacks
            for number in range(1, attack.restarts + 1)
        ]


RDC_TESTER = (Attack("DLR", exact=False, restarts=5, start="random"),)


RDC_SOURCE = (
    "Chen et al. 2024 (RDC), released tester: APGD with the DLR loss alone, 100 steps, 5 restarts, EOT 1, "
    "and the identity's gradient for likelihood maximisation."
)


PGD20 = (Attack("CE", 20, "pgd", fresh=False, step=0.25, start="random"),)


MADRY = "Madry et al. 2018: PGD of 20 steps with cross-entropy, from one random start."


PAPERS = {
    **dict.fromkeys(
        ("dc", "lm-cnn", "rdc1", "rdc5", "rdc-released", "rdc-contrastive"),
        (RDC_TESTER, RDC_SOURCE),
    ),
    "diffpure": (
        (Attack("CE", draws=20, start="random"), Attack("DLR", draws=20, start="random")),
        "Nie et al. 2022 (DiffPure): AutoAttack's random version, APGD with cross-entropy and DLR, 100 steps, "
        "EOT 20; its gradient by the adjoint method, ours exact.",
    ),
    "idc": (
        (
            Attack("CE of softmax", 20, "pgd", fresh=False, step=0.25, start="random"),
            Attack("CE of softmax", 1, "pgd", fresh=False, step=1.0),
        ),
        "Mei et al. 2024 (IDC), released code: PGD of 20 steps and FGSM on probabilities taken for logits, with "
        "one frozen noise.",
    ),
    **dict.fromkeys(("cnn", "adversarial", "adversarial-dc", "contrastive"), (PGD20, MADRY)),
}


PURIFIED = ("lm-cnn", "rdc1", "rdc5", "rdc-released", "rdc-contrastive", "diffpure")


DETERMINISTIC = ("cnn", "adversarial")


HONEST = (
    "Ours: exact gradient and BPDA, fixed and fresh noise, several losses and starts, at least 100 steps, the "
    "worst for each image, judged anew."
)


# Gradients averaged at a step, one where not named: where trials on a few digits showed that more gain nothing.
EOT = {"idc": 4, "diffpure": 4}


def paper(defence: str, norm: str, epsilon: float, *, classes: int = 10) -> Protocol:
    """The protocol of the defence's own paper, at a budget of our choice.

    Errors      ValueError for an unknown name, or a DLR loss and fewer than 3 classes
    """
    if defence not in PAPERS:
        raise ValueError(
            f"expected a defence with a paper, one of {list(PAPERS)}, got {defence!r}."
        )
    listed, source = PAPERS[defence]
    if classes < 3 and any(attack.loss == "DLR" for attack in listed):
        raise ValueError(
            f"expected at least 3 classes, as the paper's protocol for {defence} uses the DLR loss, got "
            f"{classes}; the honest protocol has another loss then."
        )
    return Protocol("paper", defence, norm, epsilon, listed, source)


def honest(defence: str, norm: str, epsilon: float, *, classes: int = 10) -> Protocol:
    """The protocol that a number should be quoted from: whatever kind of defence, all that is known to matter.

    Source      Carlini et al. 2019; Croce & Hein 2020; Lee & Kim 2023
    Why pgd     under fresh noise APGD returns, and steps back to, the image whose draw was luckiest; PGD returns its
                last one
    Classes     fewer than 3 have no DLR loss, and get the margin's instead
    Errors      ValueError for an unknown name
    """
    if defence not in PAPERS:
        raise ValueError(f"expected one of the defences {list(PAPERS)}, got {defence!r}.")
    draws = EOT.get(defence, 1)
    ratio = "DLR" if classes > 2 else "margin"
    averaged = Attack("margin", 100, "pgd", draws=draws, step=0.1)
    if defence in DETERMINISTIC:
        listed = (
            Attack("margin", fresh=False, restarts=5),
            Attack(ratio, fresh=False, restarts=5),
            Attack("scaled CE", fresh=False, restarts=5),
        )
    elif defence in PURIFIED:
        listed = (
            averaged,
            replace(averaged, loss=ratio, exact=False, draws=1),
            Attack("scaled CE", fresh=False),
        )
    else:
        listed = (averaged, Attack(ratio, fresh=False), replace(averaged, loss="scaled CE"))
    return Protocol("honest", defence, norm, epsilon, tuple(dict.fromkeys(listed)), HONEST)
