"""What every notebook uses: checks that raise, exercises with hints, predictions before the answer.

check("abar is the product", got, want, tol=1e-12)      compares and prints one line, or raises and teaches
grade(exercises.Q_SAMPLE, my_function)                  tries the reader's answer, knows the classic mistakes
guess = predict("Which weight wins?", ["ELBO", "EDM"])  asks; reveal(guess, "EDM") answers, and never raises
ledger()                                                what this notebook checked
"""

import html
import math
from dataclasses import dataclass

import ipywidgets
import numpy as np
import torch
from IPython.display import display

from diffclass.course import cards
from diffclass.course.exercises.compare import index_text, likely_cause, numbers
from diffclass.course.exercises.grading import grade

__all__ = [
    "CheckFailed",
    "Entry",
    "Ledger",
    "Prediction",
    "check",
    "check_less",
    "check_true",
    "clear_ledger",
    "grade",
    "ledger",
    "predict",
    "reveal",
]

STANDARD_ERRORS = 4.0  # a true statement is rejected once in 16 000 numbers
LARGEST_SE = 0.25  # with more noise than this share of the wanted value, zero would pass


class CheckFailed(cards.Readable):
    """A number is not what the derivation says."""


@dataclass(frozen=True)
class Entry:
    """One check of this kernel: its name, whether it held, and the measured figure."""

    name: str
    passed: bool
    evidence: str

    def __str__(self) -> str:
        return f"{'✓' if self.passed else '✗'} {self.name}   {self.evidence}"


@dataclass(frozen=True)
class Ledger:
    """The checks done so far, as a table."""

    entries: tuple[Entry, ...]

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def passed(self) -> int:
        """How many held."""
        return sum(e.passed for e in self.entries)

    def __repr__(self) -> str:
        return "\n".join([f"{self.passed} of {len(self)} checks hold", *map(str, self.entries)])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{'✓ holds' if e.passed else '✗ fails'}</td><td style='text-align:left'>{html.escape(e.name)}</td>"
            f"<td style='text-align:left'>{html.escape(e.evidence)}</td></tr>"
            for e in self.entries
        )
        table = (
            "<table><thead><tr><th scope='col'>result</th><th scope='col'>what</th>"
            f"<th scope='col'>measured</th></tr></thead><tbody>{rows}</tbody></table>"
        )
        return cards.folded(
            f"{self.passed} of {len(self)} checks hold", table, opened=self.passed < len(self)
        )


_LEDGER: dict[str, Entry] = {}  # by name, so that a cell run again replaces its line


def ledger() -> Ledger:
    """The checks of this kernel, in the order in which they were first made."""
    return Ledger(tuple(_LEDGER.values()))


def clear_ledger() -> None:
    """Forget all checks."""
    _LEDGER.clear()


def _settle(name: str, passed: bool, evidence: str, explanation: str = "") -> None:
    _LEDGER[name] = Entry(name, passed, evidence)
    if not passed:
        end = "" if explanation.endswith("?") else "."
        raise CheckFailed(f"{name}: {evidence}{'; ' if explanation else ''}{explanation}{end}")
    cards.say(str(_LEDGER[name]))


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def check(
    name: str, got, want, tol: float | None = None, se=None, relative: bool = False, scale=None
) -> None:
    """Raise unless `got` is `want`, to `tol` or within four standard errors `se`; print one line if it is.

    Formula     max |got - want| <= tol  (divided by |want| if `relative`),  or  |got - want| <= 4 se everywhere
    Shapes      equal, or `want` is one number for all of `got`; anything else is an error, never broadcast
    Units       those of `got`; `scale` is the size of a difference that would matter, max |want| unless given
    Errors      CheckFailed, saying where, by how much, and what the pattern of the error looks like; ValueError for a
                check that could not fail or cannot be meant
    """
    if (tol is None) == (se is None):
        raise ValueError(
            f"expected exactly one of tol and se for the check {name!r}, got tol={tol}, se={se}; an exact "
            "statement has a tolerance, an average over noise has a standard error."
        )
    g = numbers(got, f"the value of {name!r}")
    w = numbers(want, f"the wanted value of {name!r}")
    if g.shape != w.shape and w.size != 1:
        turned = "; one is the transpose of the other" if g.shape == w.shape[::-1] else ""
        shapes = f"got shape {list(g.shape)}, wanted {list(w.shape)}"
        _settle(name, False, shapes, f"shapes are never stretched{turned}")
    if g.size == 0:
        raise ValueError(f"expected something to check for {name!r}, got an array without values.")
    w = np.broadcast_to(w.reshape(()) if w.size == 1 and g.shape != w.shape else w, g.shape)
    if np.isnan(g).any() or np.isnan(w).any():
        which = "got" if np.isnan(g).any() else "the wanted value"
        _settle(
            name,
            False,
            f"{which} has {int(np.isnan(g).sum() or np.isnan(w).sum())} NaN among {g.size} values",
            "likely 0/0, a logarithm of a negative number, or exp that overflowed",
        )
    with np.errstate(invalid="ignore"):
        difference = np.where(g == w, 0.0, np.abs(g - w))  # equal infinities agree
    if se is not None:
        _judge_se(name, g, w, difference, se, relative, scale)
    else:
        _judge_tol(name, g, w, difference, tol, relative)


def check_true(name: str, condition, why: str) -> None:
    """Raise, with `why` it should hold, unless `condition` is true. Errors: ValueError for what is not one truth."""
    value = (
        condition.item()
        if isinstance(condition, torch.Tensor) and condition.numel() == 1
        else condition
    )
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(
            f"expected True or False for the check {name!r}, got {type(condition).__name__}; end it with "
            ".all(), or compare numbers with check."
        )
    _settle(name, bool(value), why if value else f"is false; it should hold because {why}")


def check_less(name: str, small, large, slack: float = 0.0) -> None:
    """Raise unless small <= large + slack everywhere; print the smallest margin. For bounds.

    Shapes      equal, or one of the two is one number
    """
    smaller = numbers(small, f"the smaller side of {name!r}")
    larger = numbers(large, f"the larger side of {name!r}")
    if smaller.shape != larger.shape and min(smaller.size, larger.size) != 1:
        shapes = f"shapes {list(smaller.shape)} and {list(larger.shape)} differ"
        _settle(name, False, shapes, "shapes are never stretched")
    margin = np.asarray(larger - smaller)
    if margin.size == 0 or not math.isfinite(slack) or slack < 0:
        raise ValueError(
            f"expected values and a slack >= 0 for the check {name!r}, got {margin.size} values and "
            f"{slack}."
        )
    if np.isnan(margin).any():
        _settle(name, False, "NaN on one side", "a bound that is not a number bounds nothing")
    worst = float(margin.min())
    at = "" if margin.size == 1 else f" at {index_text(margin.argmin(), margin.shape)}"
    held = worst >= -slack
    _settle(
        name,
        held,
        f"smallest margin = {worst:.3g}{at}",
        "" if held else f"the bound is broken by {-worst:.3g}, and {slack:g} is allowed",
    )


def _judge_tol(name, g, w, difference, tol, relative) -> None:
    if isinstance(tol, bool) or not (math.isfinite(tol) and tol >= 0):
        raise ValueError(f"expected a tolerance >= 0 for the check {name!r}, got {tol}.")
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.where(difference == 0, 0.0, difference / np.abs(w)) if relative else difference
    error = np.where(np.isnan(error), np.inf, error)
    at = int(error.argmax())
    worst = float(error.flat[at])
    label = "max|Δ|/|want|" if relative else "max|Δ|"
    if worst <= tol:
        return _settle(name, True, f"{label} = {worst:.1e} ≤ {tol:.3g}")
    where = f" at {index_text(at, g.shape)}" if g.size > 1 else ""
    evidence = (
        f"{label} = {worst:.3g} > {tol:.3g}{where}: got {g.flat[at]:.6g}, wanted {w.flat[at]:.6g}"
    )
    limit = tol * np.abs(w) if relative else tol
    return _settle(name, False, evidence, likely_cause(g, w, np.maximum(limit, 1e-3 * np.abs(w))))


def _judge_se(name, g, w, difference, se, relative, scale) -> None:
    if relative:
        raise ValueError(
            f"expected relative only together with tol for the check {name!r}; a standard error "
            "has units."
        )
    s = numbers(se, f"the standard error of {name!r}")
    if s.shape != g.shape and s.size != 1:
        raise ValueError(
            f"expected one standard error, or one for each value, for {name!r}, got shape "
            f"{list(s.shape)}."
        )
    s = np.broadcast_to(s.reshape(()) if s.size == 1 else s, g.shape)
    if not (np.isfinite(s).all() and (s > 0).all()):
        raise ValueError(
            f"expected standard errors > 0 for the check {name!r}, got {float(np.min(s)):.3g}; a sample "
            "of one, or of equal numbers, has none."
        )
    size = float(np.abs(w).max()) if scale is None else float(scale)
    if size > 0 and float(s.max()) > LARGEST_SE * size:
        raise ValueError(
            f"the check {name!r} cannot fail: its standard error {float(s.max()):.3g} is more than a "
            f"quarter of the scale {size:.3g}, so that zero would pass; draw more samples."
        )
    z = difference / s
    at = int(z.argmax())
    evidence = f"|z| = {z.flat[at]:.2f} {'≤' if z.flat[at] <= STANDARD_ERRORS else '>'} {STANDARD_ERRORS:g}"
    if z.flat[at] <= STANDARD_ERRORS:
        return _settle(name, True, f"{evidence} (standard error {s.flat[at]:.1e})")
    where = f" at {index_text(at, g.shape)}" if g.size > 1 else ""
    evidence += (
        f"{where}: got {g.flat[at]:.6g}, wanted {w.flat[at]:.6g}, standard error {s.flat[at]:.2g}"
    )
    return _settle(name, False, evidence, likely_cause(g, w, STANDARD_ERRORS * s))


# ---------------------------------------------------------------------------------------------------------------------
# Predict, then reveal


class Prediction:
    """A question with a place for the reader's answer; display it, or set `value`. None means not answered."""

    def __init__(self, question: str, options: list | None, unit: str):
        self.question = question
        self.options = options
        self.unit = unit
        self._status = ipywidgets.HTML()
        ask = ipywidgets.HTML(f"<b>Predict before you run.</b> {html.escape(question)}")
        wide = {"description_width": "initial"}
        if options is not None:
            self._field = ipywidgets.RadioButtons(
                options=[str(o) for o in options],
                index=None,
                style=wide,
                description="Your prediction",
                layout={"width": "max-content"},
            )
            self._field.observe(lambda change: self._note(), names="index")
            controls = [self._field]
        else:
            label = f"Your prediction ({unit})" if unit else "Your prediction"
            self._field = ipywidgets.FloatText(description=label, style=wide)
            button = ipywidgets.Button(
                description="This is my prediction", layout={"width": "max-content"}
            )
            button.on_click(lambda _: self._commit(self._field.value))
            controls = [ipywidgets.HBox([self._field, button])]
        self._number: float | None = None  # a number field shows 0 before anyone has answered
        self._actual: list = []  # the answer, once it has been asked for
        self.box = ipywidgets.VBox([ask, *controls, self._status])

    def _commit(self, number) -> None:
        self._number = None if number is None else float(number)
        self._note()

    def _note(self) -> None:
        text = "" if self.value is None else f"Noted: {_shown(self.value, self.unit)}."
        if self._actual and self.value is not None:
            text = _judged(self.value, self._actual[-1], self.unit)
        self.show(text)

    def await_answer(self, actual) -> None:
        """Tell the answer under the question as soon as there is a prediction."""
        self._actual.append(actual)

    @property
    def value(self):
        """The reader's answer: one of the options, a number, or None."""
        if self.options is None:
            return self._number
        return None if self._field.index is None else self.options[self._field.index]

    @value.setter
    def value(self, answer) -> None:
        """Answer in code. Errors: ValueError for what is not among the options."""
        if self.options is None:
            self._commit(answer)
            if answer is not None:
                self._field.value = float(answer)
        elif answer is not None and answer not in self.options:
            raise ValueError(f"expected one of {self.options}, got {answer!r}.")
        else:
            self._field.index = None if answer is None else self.options.index(answer)

    def show(self, text: str) -> None:
        """Write a line under the question; screen readers announce it."""
        self._status.value = f"<span role='status' aria-live='polite'>{html.escape(text)}</span>"

    def _repr_mimebundle_(self, **kwargs):
        return self.box._repr_mimebundle_(**kwargs)

    def __repr__(self) -> str:
        return f"Prediction({self.question!r}, value={self.value!r})"


def predict(question: str, options: list | None = None, answer=None, unit: str = "") -> Prediction:
    """Ask before the cell that answers: a choice among `options`, or a number where there are none.

    `answer` is the reader's prediction given in code, for those who use no widgets.
    """
    if options is not None and len(options) < 2:
        raise ValueError(
            f"expected at least two options to choose from, got {options!r}; leave them out to ask for a "
            "number."
        )
    prediction = Prediction(question, None if options is None else list(options), unit)
    prediction.value = answer
    return prediction


def reveal(prediction, actual) -> None:
    """Show the answer beside the prediction, and under the question. Never raises: a guess is not an exam.

    `prediction` is what `predict` gave, or a plain answer: a number, a string, or None. Where a notebook's question has no
    prediction yet, the answer stays folded, so that whoever runs all cells at once can still predict.
    """
    guess = prediction
    unit = ""
    if isinstance(prediction, Prediction):
        guess = prediction.value
        unit = prediction.unit
    if isinstance(actual, torch.Tensor):
        actual = actual.detach().cpu().numpy()
    if isinstance(actual, (np.ndarray, np.generic)) and actual.size == 1:
        actual = actual.item()
    text = _judged(guess, actual, unit)
    if isinstance(prediction, Prediction):
        prediction.await_answer(actual)
        if guess is None and cards.in_notebook():
            waiting = "The answer waits for your prediction; unfold to see it without one"
            bundle = {"text/html": cards.folded(waiting, html.escape(text)), "text/plain": text}
            display(bundle, raw=True)
            return
        prediction.show(text)
    print(text)


def _judged(guess, actual, unit: str) -> str:
    """The answer in words, beside the prediction."""
    if guess is None:
        return f"You made no prediction; the answer is {_shown(actual, unit)}."
    if _is_number(guess) and _is_number(actual):
        return (
            f"You predicted {_shown(guess, unit)}, actual {_shown(actual, unit)}: "
            f"{_distance_in_words(guess, actual)}."
        )
    if str(guess) == str(actual):
        return f"You predicted {_shown(guess, unit)}: right."
    return f"You predicted {_shown(guess, unit)}, actual {_shown(actual, unit)}: have another look at why."


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shown(value, unit: str) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return f"{text} {unit}".strip()


def _distance_in_words(guess: float, actual: float) -> str:
    if not (math.isfinite(guess) and math.isfinite(actual)):
        return "one of them is not finite"
    if math.isclose(guess, actual, rel_tol=0.02, abs_tol=1e-12):
        return "right on the spot"
    if guess * actual <= 0:
        sign = "; the sign differs" if guess * actual < 0 else ""
        return f"off by {abs(guess - actual):.3g}{sign}"
    factor = guess / actual
    direction = "high" if abs(factor) > 1 else "low"
    return f"too {direction} by a factor {max(factor, 1 / factor):.3g}"
