"""How what matplotlib draws reaches the page: by the cell that drew it, in words as well, and readable on a dark page."""

import functools
import html
import importlib
import threading
from collections.abc import Callable, Iterator

from IPython import get_ipython
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.pylabtools import print_figure
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PLOT = "dc-plot"  # of lines and marks: stage.css turns it round on a dark page
PICTURES = "dc-pictures"  # of images, whose colours mean something: they stay as they are
LONGEST = 600  # letters of a description


def belong_to_cells() -> None:
    """Let figures be shown by the cells that draw them alone, and as HTML: see `_of_cells` and `as_html`.

    Meaning     nothing changes outside a notebook; calling it again changes nothing
    """
    shell = get_ipython()
    if shell is None or isinstance(shell.events.trigger, functools.partial):
        return
    shell.events.trigger = functools.partial(_of_cells, shell, shell.events.trigger)
    # Jupyter's own formats come with the first figure, and put all others away: now, and before each cell in case of more
    importlib.import_module("matplotlib_inline.backend_inline")
    shell.events.register("pre_execute", functools.partial(_format, shell))
    _format(shell)


def _of_cells(shell: InteractiveShell, trigger: Callable, event: str, *values, **more) -> None:
    """Let no message of a widget publish what a running cell draws.

    Why         JupyterLab hands the messages of widgets to another thread beside the running cell; IPython shows and closes all
                figures after each message, so a figure that a cell was still drawing went out under the message of a slider,
                where nobody sees it, and the cell had none
    """
    beside = threading.current_thread() is not threading.main_thread()
    if beside and shell.get_parent()["header"]["msg_type"] == "comm_msg":
        return
    trigger(event, *values, **more)


def _format(shell: InteractiveShell) -> None:
    """Show figures as HTML, and not a second time as a bare picture."""
    formatters = shell.display_formatter.formatters
    formatters["text/html"].for_type(Figure, as_html)
    formatters["image/png"].for_type(Figure, _nothing)


def _nothing(figure: Figure) -> None:
    """No picture."""


def as_html(figure: Figure) -> str | None:
    """A figure as HTML: its picture, as Jupyter makes it, with a description; None where nothing is drawn.

    Why         a picture alone has no words for those who do not see it, and is dark on white in every theme
    """
    picture = print_figure(figure, base64=True)
    if picture is None:
        return None
    kind = PICTURES if any(axes.images for axes in figure.axes) else PLOT
    words = html.escape(described(figure) or "Drawn by the code above.", quote=True)
    return (
        f'<img class="{kind}" alt="{words}" style="max-width: 100%" '
        f'src="data:image/png;base64,{picture}">'
    )


def described(figure: Figure) -> str:
    """What a figure's own words say: titles, axes and legends, in order."""
    parts = [figure.get_suptitle(), *(words for axes in figure.axes for words in _words_of(axes))]
    text = "; ".join(" ".join(part.split()) for part in dict.fromkeys(parts) if part.strip())
    return text if len(text) <= LONGEST else f"{text[:LONGEST].rstrip()} …"


def _words_of(axes: Axes) -> Iterator[str]:
    yield axes.get_title()
    across = axes.get_xlabel()
    up = axes.get_ylabel()
    yield f"{up} over {across}" if across and up else across or up
    legend = axes.get_legend()
    if legend is not None:
        yield ", ".join(entry.get_text() for entry in legend.get_texts())
