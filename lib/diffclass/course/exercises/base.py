"""What an exercise is: a task with a reference answer, cases to try, and the mistakes that people make."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffclass.course.cards import Readable


class NotYet(Readable):
    """The answer to an exercise is not right yet; the message is the hint."""


@dataclass(frozen=True)
class Mistake:
    """A wrong answer that is worth recognising. `function` gives it; `hint` says where to look, not the solution."""

    function: Callable
    hint: str


@dataclass(frozen=True)
class Exercise:
    """A task for the reader, graded by `course.grade`.

    key         unique name; the notebook's number first
    prompt      the task in one sentence, with the arguments and their shapes
    reference   a correct answer: a function of the arguments of one case
    cases       () -> the argument tuples to try; tensors are float64
    mistakes    at least three, each with its own hint
    meaning     what the reader now knows, printed on success
    tol         largest error allowed, relative to max(1, |wanted|)
    verify      replaces the comparison with `reference` where many answers are right: it calls the reader's function
                and raises NotYet with a hint; `cases` then has nothing to say
    """

    key: str
    prompt: str
    reference: Callable
    cases: Callable[[], list[tuple]]
    mistakes: tuple[Mistake, ...]
    meaning: str
    tol: float = 1e-6
    verify: Callable[[Callable], None] | None = None

    def __post_init__(self):
        if len(self.mistakes) < 3:
            raise ValueError(
                f"expected at least three classic mistakes for {self.key}, got {len(self.mistakes)}."
            )
        if len({m.hint for m in self.mistakes}) < len(self.mistakes):
            raise ValueError(f"expected a different hint for every mistake of {self.key}.")


def normal(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers for a case, the same at every call. Shapes: -> `shape`, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
