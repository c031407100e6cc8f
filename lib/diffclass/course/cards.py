"""How a notebook shows what went right and wrong: one line for the checks of a cell, one card for what failed."""

import html
import traceback

from IPython import get_ipython
from IPython.display import DisplayHandle, display

RED = "#B3261E"
RED_TEXT = "\033[31m{}\033[0m"


def in_notebook() -> bool:
    """Whether the code runs in a kernel, whose front end shows HTML."""
    return getattr(get_ipython(), "kernel", None) is not None


def folded(summary: str, inside: str, opened: bool = False) -> str:
    """A line that can be unfolded, as HTML; it needs no kernel. `summary` is text, `inside` HTML."""
    state = " open" if opened else ""
    return f"<details{state}><summary>{html.escape(summary)}</summary>{inside}</details>"


class Readable(AssertionError):
    """An error that is meant for the reader: a notebook shows its message as a card, with the traceback folded.

    Why         what failed is a statement or an answer, not the program; the frames of the library hide the hint
    """

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of a traceback; it asks more than once."""
        message = str(self)
        if not in_notebook():
            return [RED_TEXT.format(f"{type(self).__name__}: {message}")]
        if not getattr(self, "_shown", False):
            self._shown = True
            display({"text/html": self.card(), "text/plain": message}, raw=True)
        return [RED_TEXT.format(f"{type(self).__name__}: {message.partition(': ')[0]}")]

    def card(self) -> str:
        """What failed, why, and the folded traceback, as HTML."""
        what, _, why = str(self).partition(": ")
        lines = html.escape("".join(traceback.format_exception(self)))
        return (
            f"<div role='alert' style='border-left:4px solid {RED};padding:6px 12px'>"
            f"<b>✗ {html.escape(what)}</b><br>{html.escape(why)}{folded('traceback', f'<pre>{lines}</pre>')}</div>"
        )


class Fold:
    """The checks of one cell that hold: the first as a line, more as one line to unfold."""

    def __init__(self, cell: int):
        self.cell = cell
        self.lines: list[str] = []
        self.handle: DisplayHandle | None = None

    def add(self, line: str) -> None:
        """Show one more line."""
        self.lines.append(line)
        bundle = {"text/html": self.html(), "text/plain": "\n".join(self.lines)}
        if self.handle is None:
            self.handle = display(bundle, raw=True, display_id=True)
        else:
            self.handle.update(bundle, raw=True)

    def html(self) -> str:
        """The line or the fold."""
        if len(self.lines) == 1:
            return f"<div>{html.escape(self.lines[0])}</div>"
        rows = "<br>".join(map(html.escape, self.lines))
        return folded(f"✓ {len(self.lines)} checks hold", rows)


_present: Fold | None = None  # that of the cell which runs


def say(line: str) -> None:
    """Show a check that holds: folded with the others of its cell in a notebook, printed elsewhere."""
    global _present
    if not in_notebook():
        print(line)
        return
    cell = get_ipython().execution_count
    if _present is None or _present.cell != cell:
        _present = Fold(cell)
    _present.add(line)
