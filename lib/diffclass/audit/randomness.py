"""What is left of the robustness when luck is taken out? Checks 18 to 22, for classifiers that draw noise."""

import torch
from torch import Tensor

from diffclass import attacks
from diffclass.audit.base import (
    AMBER,
    GREEN,
    RED,
    REPEATS,
    CannotJudge,
    Case,
    Found,
    Picture,
    check,
    outweighs,
    proven,
)
from diffclass.audit.holding import Frozen
from diffclass.intervals import interval

GROUP = "randomness"
NOISE_ONLY = 0.05  # of all images whose robustness may be noise before the light is red


def _need_noise(case: Case) -> None:
    if case.deterministic:
        raise CannotJudge("the classifier is deterministic: one answer is all answers.")


def _share(right: Tensor) -> str:
    low, high = interval(int(right.sum()), len(right))
    return f"{float(right.double().mean()):.1%} [{low:.1%}, {high:.1%}]"


@check(
    18,
    GROUP,
    "report the accuracy of the attack on held noise; the rest of the robustness is luck, not distance",
)
def fixed_noise_attack(case: Case) -> Found:
    """Whether survivors also survive when the noise is held during attack and judgement; the gap is only noise.

    Passes when at most 5 % of all images survive fresh noise but fall once one draw is held. A deterministic classifier
    that has a random twin is its own held noise: its evidence tells how the twin does on the same images.
    """
    if case.deterministic:
        if not hasattr(case.classifier, "with_fresh_noise"):
            raise CannotJudge("the classifier draws no noise that could be held.")
        twin = case.classifier.with_fresh_noise(case.generator(18))
        fresh = (
            (case.answers(case.main.x[case.few], REPEATS, twin) == case.labels[case.few])
            .double()
            .mean()
        )
        return GREEN, (
            f"accuracy under attack {_share(~case.fallen)} with the noise held, as it is claimed; the first "
            f"{len(case.few)} are right in {float(fresh):.1%} of {REPEATS} draws of fresh noise, and in "
            f"{1 - float(case.fallen[case.few].double().mean()):.1%} of held noise"
        )
    held = case.attacked(case.left, target=Frozen(case.target, case.seed + 18), draws=1)
    only = int(held.flagged.sum())
    survivors = int((~case.fallen).sum())
    light = (
        proven(only, len(case.left), NOISE_ONLY, survivors / len(case.x)) if survivors else GREEN
    )
    return light, (
        f"accuracy under attack {_share(~case.fallen)} with fresh noise; {only} of {len(case.left)} "
        "survivors fall once one draw of it is held: that much is only noise"
    )


@check(
    19, GROUP, "average more draws in the attack's gradient (EOT), and never seed inside forward"
)
def eot_converged(case: Case, images: int = 4, reference: int = 64) -> Found:
    """Whether more averaged draws fell more, and whether draws differ at all.

    Passes when max(20, 4 draws) instead of the attack's own fell less than 1 % more of all images. The picture is the
    cosine of the mean of n gradients with that of `reference` others.
    """
    _need_noise(case)
    x = case.x[:images]
    y = case.y[:images]
    drawn = [
        attacks.expected_gradient(case.target, x, y, loss=case.loss)[:2] for _ in range(reference)
    ]
    if all(
        torch.equal(slope, drawn[0][0]) and torch.equal(logits, drawn[0][1])
        for slope, logits in drawn
    ):
        return (
            RED,
            f"{reference} draws of logits and gradient are one and the same: averaging them does nothing",
        )
    slopes = [slope.flatten(1) for slope, _ in drawn]
    counts = [n for n in (1, 5, 20) if n <= reference // 2]
    half = torch.stack(slopes[reference // 2 :]).mean(0)
    likeness = [
        float(torch.cosine_similarity(torch.stack(slopes[:n]).mean(0), half, dim=1).mean())
        for n in counts
    ]
    draws = max(20, 4 * case.draws)
    light, _, more = case.beyond(case.falls(case.attacked(case.left, draws=draws).x, case.left))
    told = (
        f"{draws} draws instead of {case.draws} fell {more}; cosine with the mean of {reference // 2} other draws "
        + ", ".join(f"{c:.2f} for {n}" for n, c in zip(counts, likeness, strict=True))
    )
    return (
        light,
        told,
        Picture(tuple(counts), {"cosine": tuple(likeness)}, "draws averaged", "cosine"),
    )


@check(
    20,
    GROUP,
    "report mean and worst of ten beside each other, on clean images too; a user asks more than once",
)
def n_evaluation(case: Case, repeats: int = 10) -> Found:
    """Mean and worst of ten answers, on clean and on attacked images.

    Passes when at most 10 % of all attacked images are answered rightly by most draws but wrongly by one of ten.
    """
    _need_noise(case)
    asked = {"clean": case.x, "attacked": case.main.x}
    right = {name: case.answers(x, repeats) == case.labels for name, x in asked.items()}
    mean = {name: float(one.double().mean()) for name, one in right.items()}
    worst_of = {name: float(one.all(0).double().mean()) for name, one in right.items()}
    unsteady = int(((right["attacked"].double().mean(0) > 0.5) & ~right["attacked"].all(0)).sum())
    told = (
        ", ".join(
            f"{name} {mean[name]:.1%} on average and {worst_of[name]:.1%} in the worst of {repeats}"
            for name in right
        )
        + f"; {unsteady} of {len(case.x)} attacked images are right by luck of the draw"
    )
    return (
        proven(unsteady, len(case.x), 0.1),
        told,
        Picture(
            tuple(right),
            {"mean": tuple(mean.values()), "worst": tuple(worst_of.values())},
            "",
            "accuracy",
        ),
    )


@check(
    21,
    GROUP,
    "let a majority of draws answer and report its accuracy; single lucky draws are no robustness",
)
def majority_vote(case: Case) -> Found:
    """The accuracy of the majority of answers under attack, beside the mean of single answers.

    Passes when the mean is not above the vote by more than 5 points. Judged by the mean of the paired differences
    less 2.33 standard errors, the one-sided 1 % bound of the normal approximation.
    """
    _need_noise(case)
    right = (case.answers(case.main.x, REPEATS) == case.labels).double().mean(0)
    voted = right > 0.5
    gap = right - voted.double()
    surely = float(gap.mean() - 2.33 * gap.std() / len(gap) ** 0.5) if len(gap) > 1 else 0.0
    light = RED if surely > 0.05 else GREEN if float(gap.mean()) <= 0.05 else AMBER
    return light, (
        f"under attack the majority of {REPEATS} answers is right on {_share(voted)}, a single answer on "
        f"{float(right.mean()):.1%}"
    )


@check(
    22,
    GROUP,
    "store the adversarial images and judge them after the attack, by the classifier that is claimed",
)
def evaluate_after_attack(case: Case) -> Found:
    """Whether the attack's own count is that of its images judged afterwards, with fresh noise.

    Passes for a deterministic classifier when no verdict differs; a random one has both numbers told, and is red when
    the attack calls fewer images fooled than fall afterwards (paired sign test): its own count would flatter.
    """
    missed = int((case.fallen & ~case.main.flagged).sum())
    undone = int((case.main.flagged & ~case.fallen).sum())
    told = (
        f"the attack calls {int(case.main.flagged.sum())} of {len(case.x)} images fooled, {int(case.fallen.sum())} "
        f"are when asked again; {missed + undone} verdicts differ"
    )
    if case.deterministic:
        return (RED if missed + undone else GREEN), told
    return (RED if outweighs(missed, undone) else GREEN), told
