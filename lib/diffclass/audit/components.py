"""Was the defence attacked as what it is? Checks 23 to 25: its parts, its noise levels, and what the author tried."""

from collections.abc import Mapping

from diffclass.audit.base import GREEN, RED, CannotJudge, Case, Picture, Verdict, check, worst
from diffclass.classifiers.base import Classifier

GROUP = "components"


def _transferred(case: Case, targets: Mapping[object, Classifier]) -> tuple[str, str, Picture]:
    """Attack survivors through each of `targets` in place of the classifier, and judge them by the classifier."""
    lights = []
    sentences = []
    shares = []
    for name, target in targets.items():
        attacked = case.attacked(case.left, target=target, steps=_steps(case))
        light, count, words = case.beyond(case.falls(attacked.x, case.left))
        lights.append(light)
        sentences.append(f"{name}: {words}")
        shares.append(count / max(1, len(case.left)))
    picture = Picture(
        tuple(map(str, targets)),
        {"survivors that fall": tuple(shares)},
        "attack through",
        "share of survivors",
    )
    return worst(lights), "; ".join(sentences), picture


def _steps(case: Case) -> int:
    return max(1, case.steps // 2)


@check(
    23,
    GROUP,
    "attack every part alone and by every gradient (exact, BPDA), and report the strongest of them",
    lambda case: len(case.routes) * case.cost(len(case.few), steps=_steps(case)),
)
def ablate_component(case: Case) -> Verdict:
    """Whether a part alone, or another gradient of the same defence, fells 1 % more of all images than the claim says.

    Judges `routes`: by name, what to differentiate instead; a BPDA gradient and the exact one, each component alone.
    """
    if not case.routes:
        raise CannotJudge(
            "the classifier is one piece with one gradient: no parts or other routes were named."
        )
    light, evidence, picture = _transferred(case, case.routes)
    return light, f"survivors that fall through another route: {evidence}", picture


@check(
    24,
    GROUP,
    "let the attacker choose how many noise levels or steps to differentiate, and report the strongest",
    lambda case: len(case.levels) * case.cost(len(case.few), steps=_steps(case)),
)
def more_levels_not_more_robust_by_masking(case: Case) -> Verdict:
    """Whether an attacker who uses fewer or more noise levels (or steps) than the defender fells 1 % more."""
    if not case.levels:
        raise CannotJudge(
            "the classifier has no noise levels or steps of which an attacker could use fewer or more."
        )
    light, evidence, picture = _transferred(case, case.levels)
    return (
        light,
        f"survivors that fall through another number of levels or steps: {evidence}",
        picture,
    )


@check(
    25,
    GROUP,
    "write what would break this defence and what was tried; until then do not call it robust",
)
def adaptive_statement(case: Case, words: int = 8) -> Verdict:
    """Whether somebody has written what would break this defence, and what was tried; no attack of ours replaces it."""
    count = len(case.statement.split())
    if not count:
        return (
            RED,
            "nobody has said what would break this and what was tried, so no number here may be called robust",
        )
    if count < words:
        return (
            RED,
            f"the statement has {count} words, too few to say what would break this and what was tried",
        )
    return GREEN, f"stated: {' '.join(case.statement.split())}"
