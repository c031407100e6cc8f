"""Every classifier that the course speaks of, by name."""

from diffclass.zoo.classifiers import (
    BUDGETS,
    NAMES,
    VOTES,
    budget,
    checkpoints,
    defence,
    images,
)

__all__ = [
    "BUDGETS",
    "NAMES",
    "VOTES",
    "budget",
    "checkpoints",
    "defence",
    "images",
]
