"""Attacks on whatever maps pixels to logits, written to be read."""

from diffclass.attacks.adaptive import lagrange, prior_of, unlikeliness
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
from diffclass.attacks.spatial import Bent, FlowStep, bend, displacement, roughness, stadv, warp
from diffclass.attacks.targeted import ranked, ranks
from diffclass.attacks.threats import THREATS, Threat, threat
from diffclass.attacks.views import AttackView

__all__ = [
    "THREATS",
    "AttackLoss",
    "AttackStep",
    "AttackView",
    "Bent",
    "FlowStep",
    "Penalty",
    "SearchStep",
    "Threat",
    "apgd",
    "bend",
    "ascent",
    "cross_entropy_loss",
    "displacement",
    "dlr_loss",
    "expected_gradient",
    "lagrange",
    "longest_search",
    "margin_loss",
    "noise_at",
    "pgd",
    "prior_of",
    "project",
    "ranked",
    "ranks",
    "roughness",
    "shrink",
    "size_of",
    "smallest_l2",
    "square",
    "stadv",
    "targeted_dlr_loss",
    "targeted_loss",
    "threat",
    "unlikeliness",
    "warp",
    "worst_case",
]
