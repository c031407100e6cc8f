"""An audit of a claimed robustness: 36 checks, each a light with its evidence, and what to do when it is red.

A red light is a fault that was measured. A green one says that this check found none, not that none is there.
"""

from collections.abc import Callable, Iterable, Iterator
from inspect import isfunction

from diffclass.audit import attack, certificates, components, object, randomness, reporting
from diffclass.audit.base import AMBER, GREEN, LIGHTS, RED, Case, Check, Picture
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
    "case_of",
    "run",
]

_MODULES = (object, attack, randomness, components, certificates, reporting)
CHECKS: tuple[Callable[[Case], Check], ...] = tuple(
    sorted(
        (
            value
            for module in _MODULES
            for value in vars(module).values()
            if isfunction(value) and hasattr(value, "number")
        ),
        key=lambda made: made.number,
    )
)
GROUPS = tuple(module.GROUP for module in _MODULES)


def run(case: Case, only: Iterable[int] | None = None) -> Iterator[Check]:
    """Make the checks one after another, each told as soon as it is made; `only` some of them, by number.

    Randomness  all of the audit's own from `case.seed`; a random classifier goes on drawing its own noise
    Errors      ValueError for a number that no check has; what goes wrong inside a check is a red light
    """
    wanted = set(range(1, len(CHECKS) + 1)) if only is None else set(only)
    if not wanted <= {one.number for one in CHECKS}:
        raise ValueError(f"expected checks from 1 to {len(CHECKS)}, got {sorted(wanted)}.")
    return (one(case) for one in CHECKS if one.number in wanted)
