"""Every attack by name: one table, one entry a name."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from diffclass import attacks, units
from diffclass.attacks import AttackStep

NEEDS = ("gradient", "logits")


@dataclass(frozen=True)
class AttackEntry:
    """One attack by name.

    run         (classifier, x, y, epsilon, *, noise, norm, steps, loss, draws, generator, ...) -> `AttackStep`s
    needs       "gradient", or "logits" for a black box
    norms       what its budget may be measured in
    step_size   whether it is told the length of its steps, in budgets
    Errors      ValueError for an entry that lacks a function, a source or a sentence
    """

    name: str
    run: Callable[..., Iterator[AttackStep]]
    needs: str
    norms: tuple[str, ...]
    source: str
    sentence: str
    step_size: bool = False

    def __post_init__(self):
        if not callable(self.run):
            raise ValueError(
                f"expected the attack {self.name!r} to have a function that runs it, got {self.run!r}."
            )
        if not (self.name and self.source and self.sentence):
            raise ValueError(
                f"expected an attack with a name, a source and a sentence, got {self.name!r}, {self.source!r} and "
                f"{self.sentence!r}."
            )
        if self.needs not in NEEDS or not self.norms:
            raise ValueError(
                f"expected the attack {self.name!r} to need one of {', '.join(NEEDS)} and to name its norms, got "
                f"{self.needs!r} and {self.norms!r}."
            )


ENTRIES: dict[str, AttackEntry] = {}


def register(entry: AttackEntry) -> None:
    """Add an attack to the table. Errors: ValueError for a name that is taken, in whatever case."""
    if entry.name.lower() in map(str.lower, ENTRIES):
        raise ValueError(f"expected a new name for an attack, got {entry.name!r}, which is taken.")
    ENTRIES[entry.name] = entry


def attack(name: str) -> AttackEntry:
    """An attack by name, whatever its case. Errors: ValueError that lists the names."""
    return units.chosen(name, ENTRIES, "the attack")


BOTH = ("linf", "l2")
register(
    AttackEntry(
        "pgd",
        attacks.pgd,
        "gradient",
        BOTH,
        "Madry et al. 2018",
        "Projected gradient ascent with steps of one length; its last image is judged.",
        step_size=True,
    )
)
register(
    AttackEntry(
        "apgd",
        attacks.apgd,
        "gradient",
        BOTH,
        "Croce & Hein 2020",
        "Projected gradient ascent that halves its steps where the loss no longer rises.",
    )
)
