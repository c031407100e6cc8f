"""Every classifier and every attack that the course speaks of, by name."""

from diffclass.zoo import noised
from diffclass.zoo.attacks import AttackEntry, attack
from diffclass.zoo.classifiers import (
    Entry,
    checkpoints,
    classifier,
    entry_of,
    names,
    register,
)

__all__ = [
    "AttackEntry",
    "Entry",
    "attack",
    "checkpoints",
    "classifier",
    "entry_of",
    "names",
    "noised",
    "register",
]
