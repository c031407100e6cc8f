"""What is left of the robustness when luck is taken out? Checks 18 to 22, for classifiers that draw noise."""

from dataclasses import replace

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
    Picture,
    Verdict,
    check,
    outweighs,
    proven,
)
from diffclass.classifiers.base import Fresh
from diffclass.intervals import interval

GROUP = "randomness"
NOISE_ONLY = 0.05  # of all images whose robustness may be noise before the light is red
COMPARED = 4  # images whose gradients of several draws are compared
REFERENCE = 64  # draws of these gradients
ASKED = 10  # answers of which the worst is reported


def _need_noise(case: Case) -> None:
    if case.classifier.deterministic:
        raise CannotJudge("the classifier is deterministic: one answer is all answers.")
    if case.held:
        raise CannotJudge("the claim is about one held noise: one answer is all answers.")


def _share(right: Tensor) -> str:
    low, high = interval(int(right.sum()), len(right))
    return f"{float(right.double().mean()):.1%} [{low:.1%}, {high:.1%}]"


def _held_cost(case: Case) -> int:
    few = len(case.few)
    return few * REPEATS if case.held else case.cost(few, draws=1)


@check(
    18,
    GROUP,
    "report the accuracy of the attack on held noise; the rest of the robustness is luck, not distance",
    _held_cost,
)
def fixed_noise_attack(case: Case) -> Verdict:
    """Whether survivors also survive when one noise is held during attack and judgement; the gap is only noise.

    Passes when at most 5 % of all images survive new noise at every call but fall once one noise is held. Of a claim
    about held noise the evidence says how the same images do under new noise.
    """
    if case.classifier.deterministic:
        raise CannotJudge("the classifier draws no noise that could be held.")
    if case.held:
        few = case.few
        fresh = Fresh(case.classifier, case.generator(18))
        right = (case.answers(case.main.x[few], REPEATS, fresh) == case.labels[few]).double().mean()
        return GREEN, (
            f"accuracy under attack {_share(~case.fallen)} with the noise held, as it is claimed; the first "
            f"{len(few)} are right in {float(right):.1%} of {REPEATS} draws of fresh noise, and in "
            f"{float((~case.fallen[few]).double().mean()):.1%} of held noise"
        )
    held = replace(case, held=True, draws=1, seed=case.seed + 18)
    only = int(held.falls(held.attacked(case.left).x, case.left).sum())
    survivors = int((~case.fallen).sum())
    share = survivors / len(case.x)
    light = proven(only, len(case.left), NOISE_ONLY, share) if survivors else GREEN
    return light, (
        f"accuracy under attack {_share(~case.fallen)} with fresh noise; {only} of {len(case.left)} "
        "survivors fall once one draw of it is held: that much is only noise"
    )


def _averaged(case: Case) -> int:
    return max(20, 4 * case.draws)


@check(
    19,
    GROUP,
    "average more draws in the attack's gradient (EOT), and never seed inside forward",
    lambda case: COMPARED * REFERENCE + case.cost(len(case.few), draws=_averaged(case)),
)
def eot_converged(case: Case) -> Verdict:
    """Whether more averaged draws fell more, and whether draws differ at all.

    Passes when max(20, 4 draws) instead of the attack's own fell less than 1 % more of all images. The picture is the
    cosine of the mean of n gradients with that of other draws.
    """
    _need_noise(case)
    x = case.x[:COMPARED]
    y = case.y[:COMPARED]
    slopes = []
    logits = []
    for _ in range(REFERENCE):
        noise = case.noise_for(case.target, len(x))
        slope, drawn, _ = attacks.expected_gradient(case.target, x, y, noise=noise, loss=case.loss)
        slopes.append(slope.flatten(1))
        logits.append(drawn)
    if all(torch.equal(one, slopes[0]) for one in slopes) and all(
        torch.equal(one, logits[0]) for one in logits
    ):
        return (
            RED,
            f"{REFERENCE} draws of logits and gradient are one and the same: averaging them does nothing",
        )
    half = REFERENCE // 2
    others = torch.stack(slopes[half:]).mean(0)
    counts = [n for n in (1, 5, 20) if n <= half]
    cosines = []
    for n in counts:
        mean = torch.stack(slopes[:n]).mean(0)
        cosines.append(float(torch.cosine_similarity(mean, others, dim=1).mean()))
    draws = _averaged(case)
    light, _, words = case.beyond(case.falls(case.attacked(case.left, draws=draws).x, case.left))
    evidence = (
        f"{draws} draws instead of {case.draws} fell {words}; cosine with the mean of {half} other draws "
        + ", ".join(f"{cosine:.2f} for {n}" for n, cosine in zip(counts, cosines, strict=True))
    )
    picture = Picture(tuple(counts), {"cosine": tuple(cosines)}, "draws averaged", "cosine")
    return light, evidence, picture


@check(
    20,
    GROUP,
    "report mean and worst of ten beside each other, on clean images too; a user asks more than once",
    lambda case: 2 * ASKED * len(case.x),
)
def n_evaluation(case: Case) -> Verdict:
    """Mean and worst of ten answers, on clean and on attacked images.

    Passes when at most 10 % of all attacked images are answered rightly by most draws but wrongly by one of ten.
    """
    _need_noise(case)
    asked = {"clean": case.x, "attacked": case.main.x}
    mean = {}
    worst = {}
    for name, x in asked.items():
        right = case.answers(x, ASKED) == case.labels
        mean[name] = float(right.double().mean())
        worst[name] = float(right.all(0).double().mean())
    mostly = right.double().mean(0) > 0.5  # of the attacked images, the last ones
    unsteady = int((mostly & ~right.all(0)).sum())
    numbers = ", ".join(
        f"{name} {mean[name]:.1%} on average and {worst[name]:.1%} in the worst of {ASKED}"
        for name in asked
    )
    evidence = (
        f"{numbers}; {unsteady} of {len(case.x)} attacked images are right by luck of the draw"
    )
    lines = {"mean": tuple(mean.values()), "worst": tuple(worst.values())}
    light = proven(unsteady, len(case.x), 0.1)
    return light, evidence, Picture(tuple(asked), lines, "", "accuracy")


@check(
    21,
    GROUP,
    "let a majority of draws answer and report its accuracy; single lucky draws are no robustness",
    lambda case: REPEATS * len(case.x),
)
def majority_vote(case: Case) -> Verdict:
    """The accuracy of the majority of answers under attack, beside the mean of single answers.

    Passes when the mean is not above the vote by more than 5 points. Judged by the mean of the paired differences
    less 2.33 standard errors, the one-sided 1 % bound of the normal approximation.
    """
    _need_noise(case)
    right = (case.answers(case.main.x, REPEATS) == case.labels).double().mean(0)
    voted = right > 0.5
    gap = right - voted.double()
    surely = float(gap.mean() - 2.33 * gap.std() / len(gap) ** 0.5) if len(gap) > 1 else 0.0
    if surely > 0.05:
        light = RED
    else:
        light = GREEN if float(gap.mean()) <= 0.05 else AMBER
    return light, (
        f"under attack the majority of {REPEATS} answers is right on {_share(voted)}, a single answer on "
        f"{float(right.mean()):.1%}"
    )


@check(
    22,
    GROUP,
    "store the adversarial images and judge them after the attack, by the classifier that is claimed",
    lambda case: 0,
)
def evaluate_after_attack(case: Case) -> Verdict:
    """Whether the attack's own count is that of its images judged afterwards, with fresh noise.

    Passes for a deterministic classifier when no verdict differs; of a random one both numbers are given, and it is red
    when the attack calls fewer images fooled than fall afterwards (paired sign test): its own count would flatter.
    """
    missed = int((case.fallen & ~case.main.flagged).sum())
    undone = int((case.main.flagged & ~case.fallen).sum())
    evidence = (
        f"the attack calls {int(case.main.flagged.sum())} of {len(case.x)} images fooled, {int(case.fallen.sum())} "
        f"are when asked again; {missed + undone} verdicts differ"
    )
    if case.deterministic:
        return (RED if missed + undone else GREEN), evidence
    return (RED if outweighs(missed, undone) else GREEN), evidence
