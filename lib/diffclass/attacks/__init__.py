"""Attacks on whatever maps pixels to logits, written to be read."""

from diffclass.attacks.adaptive import (
    unlikeliness,
)
from diffclass.attacks.blackbox import square
from diffclass.attacks.losses import (
    AttackLoss,
    Penalty,
    cross_entropy_loss,
    dlr_loss,
    margin_loss,
    targeted_dlr_loss,
    targeted_loss,
)
from diffclass.attacks.search import (
    AttackStep,
    SearchStep,
    apgd,
    ascent,
    expected_gradient,
    longest_search,
    noise_at,
    pgd,
    project,
    shrink,
    size_of,
    smallest_l2,
    worst_case,
)
from diffclass.attacks.targeted import ranked, ranks
from diffclass.attacks.views import (
    AttackView,
    Bent,
    warp,
)

__all__ = [
    "AttackLoss",
    "AttackStep",
    "AttackView",
    "Bent",
    "Penalty",
    "SearchStep",
    "apgd",
    "ascent",
    "cross_entropy_loss",
    "dlr_loss",
    "expected_gradient",
    "longest_search",
    "margin_loss",
    "noise_at",
    "pgd",
    "project",
    "ranked",
    "ranks",
    "shrink",
    "size_of",
    "smallest_l2",
    "square",
    "targeted_dlr_loss",
    "targeted_loss",
    "unlikeliness",
    "warp",
    "worst_case",
]
