"""Trying a reader's answer: the cases, the classic mistakes, and a sentence for whatever else goes wrong."""

import copy
import warnings
from collections.abc import Callable

import numpy as np
import torch

from diffclass.course.exercises.base import Exercise, NotYet
from diffclass.course.exercises.compare import index_text, likely_cause, numbers


class _Unfilled(Exception):
    """The reader has not written anything yet."""


def grade(exercise: Exercise, answer: Callable | None) -> None:
    """Try the reader's function on the exercise's cases; print ✓ if it is right, ○ if it is not written yet.

    Not written means None, `...`, a function that returns one of them, or one that raises NotImplementedError.
    Errors      NotYet, with the hint of the classic mistake that behaves in the same way, or with the first case that
                is wrong
    """
    try:
        if answer is None or answer is ...:
            raise _Unfilled
        if not callable(answer):
            raise NotYet(
                f"{exercise.key}: expected a function, got {type(answer).__name__}; pass its name without "
                "calling it."
            )
        if exercise.verify is not None:
            _verify(exercise, answer)
        else:
            _compare(exercise, answer)
    except _Unfilled:
        print(f"○ {exercise.key}   not attempted yet: {exercise.prompt}")
        return
    print(f"✓ {exercise.key}   {exercise.meaning}")


def _verify(exercise: Exercise, answer: Callable) -> None:
    try:
        exercise.verify(lambda *args: _called(answer, args))
    except (_Unfilled, NotYet):
        raise
    except Exception as error:
        raise NotYet(
            f"{exercise.key}: your function raised {type(error).__name__}: {error}"
        ) from error


def _compare(exercise: Exercise, answer: Callable) -> None:
    cases = exercise.cases()
    got = [_outcome(answer, case) for case in cases]
    if not _same_outcomes([_outcome(answer, cases[0])], got[:1], 1e-12):
        raise NotYet(
            f"{exercise.key}: two calls with the same arguments gave different answers; all noise must "
            "come in as an argument."
        )
    want = [_outcome(exercise.reference, case) for case in cases]
    if _same_outcomes(got, want, exercise.tol):
        return
    for mistake in exercise.mistakes:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrong = [_outcome(mistake.function, case) for case in cases]
        if _same_outcomes(got, wrong, exercise.tol):
            raise NotYet(f"{exercise.key}: not yet: {mistake.hint}.")
    for number, (case, mine, right) in enumerate(zip(cases, got, want, strict=True), start=1):
        if not _same_outcomes([mine], [right], exercise.tol):
            _explain(exercise, number, case, mine, right)


def _explain(exercise: Exercise, number: int, case: tuple, mine, right: np.ndarray) -> None:
    start = f"{exercise.key}: not yet: in case {number} (arguments {', '.join(map(_shown, case))}) "
    if isinstance(mine, Exception):
        raise NotYet(f"{start}your function raised {type(mine).__name__}: {mine}") from mine
    if mine.shape != right.shape:
        raise NotYet(
            f"{start}your answer has shape {list(mine.shape)}, wanted {list(right.shape)}."
        )
    wrong = np.where(np.isnan(mine), np.inf, np.abs(mine - right))
    at = int(wrong.argmax())
    cause = likely_cause(mine, right, np.maximum(exercise.tol, 1e-3 * np.abs(right)))
    raise NotYet(
        f"{start}the entry {index_text(at, right.shape)} is {mine.flat[at]:.6g}, wanted {right.flat[at]:.6g}"
        f"{'; ' if cause else ''}{cause}."
    )


def _shown(argument) -> str:
    """An argument of a case in words: the shape of a tensor, a number, or several numbers."""
    if isinstance(argument, torch.Tensor):
        return str(list(argument.shape))
    return str(argument) if isinstance(argument, tuple) else f"{argument:g}"


def _called(function: Callable, args: tuple):
    """The answer to one case. Errors: _Unfilled where there is none yet."""
    try:
        # a function that changes its arguments must not change the next case
        result = function(*copy.deepcopy(args))
    except NotImplementedError:
        raise _Unfilled from None
    if result is None or result is ...:
        raise _Unfilled
    return result


def _outcome(function: Callable, args: tuple):
    """What a function does with one case: an array, or the exception it raises, which is an outcome too."""
    try:
        return numbers(_called(function, args), "the answer")
    except _Unfilled:
        raise
    except Exception as error:
        return error


def _same_outcomes(a: list, b: list, tol: float) -> bool:
    for one, other in zip(a, b, strict=True):
        if isinstance(one, Exception) or isinstance(other, Exception):
            if type(one) is not type(other):
                return False
        elif one.shape != other.shape or not np.allclose(
            one, other, rtol=tol, atol=tol, equal_nan=True
        ):
            return False
    return True
