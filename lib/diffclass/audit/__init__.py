"""An audit of a claimed robustness: 40 checks, each a light with its evidence, and what to do when it is red.

A red light is a fault that was measured. A green one says that this check found none, not that none is there.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator

from diffclass.audit import (
    attack,
    certificates,
    circumstances,
    components,
    leakage,
    object,
    randomness,
    reporting,
)
from diffclass.audit.base import AMBER, GREEN, LIGHTS, RED, REGISTERED, Case, Check, Picture
from diffclass.audit.cases import case_of

__all__ = [
    "AMBER",
    "CHECKS",
    "GREEN",
    "GROUPS",
    "LIGHTS",
    "RED",
    "Case",
    "Check",
    "Picture",
    "calls",
    "case_of",
    "chosen",
    "run",
    "seconds",
]

CHECKS: tuple[Callable[[Case], Check], ...] = tuple(sorted(REGISTERED, key=lambda one: one.number))
GROUPS = tuple(
    dict.fromkeys(
        module.GROUP
        for module in (
            object,
            circumstances,
            leakage,
            attack,
            randomness,
            components,
            certificates,
            reporting,
        )
    )
)


def chosen(only: Iterable[int] | None = None) -> list[Callable[[Case], Check]]:
    """The checks, all or some of them by number, in order. Errors: ValueError for a number that no check has."""
    wanted = set(range(1, len(CHECKS) + 1)) if only is None else set(only)
    if not wanted <= {one.number for one in CHECKS}:
        raise ValueError(f"expected checks from 1 to {len(CHECKS)}, got {sorted(wanted)}.")
    return [one for one in CHECKS if one.number in wanted]


def run(case: Case, only: Iterable[int] | None = None) -> Iterator[Check]:
    """The checks one after another, each as soon as it is there; `only` some of them, by number.

    Randomness  all of it from `case.seed`; new noise is drawn one draw after the other, by whichever check is next
    Errors      ValueError for a number that no check has; what goes wrong inside a check is a red light
    """
    return _lit(case, chosen(only))


def _lit(case: Case, wanted: list[Callable[[Case], Check]]) -> Iterator[Check]:
    for one in wanted:
        if one.first is not None:
            with contextlib.suppress(Exception):  # the check itself will say what was raised
                one.first(case)
    for one in wanted:
        yield one(case)


def calls(case: Case, only: Iterable[int] | None = None) -> int:
    """At most how often these checks ask a classifier about an image, roughly: what they share is counted in full."""
    asking = [one for one in chosen(only) if one.cost is not None]
    if not asking:
        return 0
    return case.shared_cost + sum(one.cost(case) for one in asking)


def seconds(case: Case, only: Iterable[int] | None = None) -> float:
    """At most how long these checks take here, roughly: `calls`, each as long as one with its gradient takes now.

    Meaning     many calls need no gradient, and not all images survive to be attacked again: the rule is less; what a
                compiler takes, of a case that is `compiled`, comes on top
    Errors      whatever the classifier raises
    """
    count = calls(case, only)
    return count * case.pace() if count else 0.0
