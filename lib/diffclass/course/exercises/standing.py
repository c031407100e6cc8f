"""Exercises of notebook 14: the error of a paired difference, and what is unequal about two numbers side by side."""

from collections.abc import Callable

import torch
from torch import Tensor

from diffclass.course.exercises.base import Exercise, Mistake, NotYet


def _hits(seed: int, n: int) -> tuple[Tensor, Tensor]:
    """Which of n pictures two classifiers get right, of which most are easy or hard for both."""
    generator = torch.Generator().manual_seed(seed)
    easy = torch.rand(n, generator=generator) < 0.6
    own = torch.rand(2, n, generator=generator) < torch.where(easy, 0.95, 0.2)
    return own[0].double(), own[1].double()


def _paired(a: Tensor, b: Tensor) -> list[float]:
    d = a - b
    return [float(d.mean()), float((d.var() / len(d)).sqrt())]


def _unpaired(a: Tensor, b: Tensor) -> list[float]:
    return [float((a - b).mean()), float(((a.var() + b.var()) / len(a)).sqrt())]


def _of_one(a: Tensor, b: Tensor) -> list[float]:
    return [float((a - b).mean()), float((a - b).std())]


def _divided_by_n(a: Tensor, b: Tensor) -> list[float]:
    d = a - b
    return [float(d.mean()), float((d.var(correction=0) / len(d)).sqrt())]


def _without_sign(a: Tensor, b: Tensor) -> list[float]:
    d = (a - b).abs()
    return [float(d.mean()), float((d.var() / len(d)).sqrt())]


PAIRED_ERROR = Exercise(
    key="14-paired-error",
    prompt="a and b [n] hold 1 where two classifiers are right and 0 where they are wrong, on the same pictures; return the "
    "difference of their accuracies and its standard error, as a list of two numbers.",
    reference=_paired,
    cases=lambda: [_hits(0, 40), _hits(1, 128), _hits(2, 400)],
    mistakes=(
        Mistake(
            _unpaired,
            "the variances were added, as if the two had seen different pictures; what they have in common cancels",
        ),
        Mistake(
            _of_one, "that is how far one picture's difference scatters; an average of n does less"
        ),
        Mistake(
            _divided_by_n,
            "the mean was taken from the same n numbers: their squares are divided by n - 1",
        ),
        Mistake(_without_sign, "the sign was lost: a picture may also speak for the second one"),
    ),
    meaning="Easy and hard pictures are so for everybody: on the same pictures they cancel, and the error shrinks.",
)

# ---------------------------------------------------------------------------------------------------------------------
# What is unfair about it?

FLAWS = ("fair", "attack", "draws", "pictures", "data", "threat")
PAIRS = {1: "attack", 2: "draws", 3: "pictures", 4: "data", 5: "threat", 6: "fair"}
_HINTS = {
    "fair": "read both lines to their end: something is unequal about them",
    "attack": "look at who was differentiated; here both were attacked in the same way, or there is no attack at all",
    "draws": "how often each was asked is the same in both lines, or nothing is drawn at all",
    "pictures": "both were asked about equally many pictures of the same test set, or that is not the largest flaw",
    "data": "both were trained on the same kind of data, as far as the lines say",
    "threat": "both budgets are the same, in norm and size",
}


def _verify_flaws(flaw: Callable) -> None:
    for number, right in PAIRS.items():
        answer = flaw(number)
        if answer not in FLAWS:
            raise NotYet(
                f"14-unfair: expected one of {', '.join(FLAWS)} for pair {number}, got {answer!r}."
            )
        if answer != right:
            raise NotYet(f"14-unfair: not yet: pair {number} is not {answer!r}: {_HINTS[answer]}.")


def _confused(wrong: dict[int, str]) -> Callable:
    """An answer that is right except for some pairs."""
    return lambda number: wrong.get(number, PAIRS[number])


UNFAIR = Exercise(
    key="14-unfair",
    prompt="Given the number of a pair (1 to 6), return what makes it unfair: 'attack', 'draws', 'pictures', 'data' or "
    "'threat', or 'fair'.",
    reference=lambda number: PAIRS[number],
    cases=lambda: [],
    mistakes=tuple(
        Mistake(_confused(wrong), _HINTS[name])
        for name, wrong in (
            ("fair", {1: "fair"}),
            ("attack", {2: "attack"}),
            ("draws", {3: "draws"}),
            ("pictures", {6: "pictures"}),
            ("data", {5: "data"}),
            ("threat", {4: "threat"}),
        )
    ),
    meaning="Two numbers are comparable if threat, attack, draws, pictures and data are; a table hides all five.",
    verify=_verify_flaws,
)
