"""What notebooks use: checks, exercises, figures, widgets. Only notebooks and the command line import it."""

from diffclass.course.checks import (
    LARGEST_SE,
    STANDARD_ERRORS,
    CheckFailed,
    Entry,
    Ledger,
    Prediction,
    check,
    check_less,
    check_true,
    clear_ledger,
    grade,
    ledger,
    predict,
    reveal,
)

__all__ = [
    "CheckFailed",
    "Entry",
    "LARGEST_SE",
    "Ledger",
    "Prediction",
    "STANDARD_ERRORS",
    "check",
    "check_less",
    "check_true",
    "clear_ledger",
    "grade",
    "ledger",
    "predict",
    "reveal",
]
