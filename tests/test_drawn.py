"""What matplotlib draws: shown by its own cell, with words, and as one picture."""

import base64
import io
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from diffclass.course import drawn, widgets
from IPython.core.events import EventManager, available_events
from IPython.core.formatters import DisplayFormatter
from IPython.core.pylabtools import select_figure_formats
from matplotlib.figure import Figure
from PIL import Image


@pytest.fixture
def shell(monkeypatch):
    """A shell with events and formatters, and the message that it is at work on."""
    header = {"msg_type": "execute_request"}
    made = SimpleNamespace(
        events=EventManager(None, available_events),
        display_formatter=DisplayFormatter(),
        header=header,
        get_parent=lambda: {"header": header},
    )
    monkeypatch.setattr(drawn, "get_ipython", lambda: made)
    return made


def plot():
    """Two lines with names, and a panel without any."""
    figure = Figure()
    left, right = figure.subplots(1, 2)
    left.plot([0, 1], label="clean")
    left.plot([1, 0], label="attacked <b>")
    left.legend()
    left.set(title="Loss by level", xlabel="noise level\nσ", ylabel="loss")
    right.plot([0, 1])
    figure.suptitle("Two panels")
    return figure


def pictures():
    """An image."""
    figure = Figure()
    figure.subplots().imshow(np.zeros((4, 4)))
    return figure


def test_the_message_of_a_slider_beside_a_cell_publishes_no_figure(shell):
    published = []
    shell.events.register("post_execute", lambda: published.append(shell.header["msg_type"]))
    widgets.forward_hero()
    hooked = shell.events.trigger
    widgets.forward_hero()
    assert shell.events.trigger is hooked
    # a cell that runs in another thread shows its own figures
    for shell.header["msg_type"] in ("comm_msg", "execute_request"):
        other = threading.Thread(target=shell.events.trigger, args=("post_execute",))
        other.start()
        other.join()
    assert published == ["execute_request"]
    shell.header["msg_type"] = "comm_msg"
    shell.events.trigger("post_execute")  # in the thread of cells, between two of them
    assert published == ["execute_request", "comm_msg"]


def test_a_figure_is_one_picture_with_words(shell):
    drawn.belong_to_cells()
    data, _ = shell.display_formatter.format(plot())
    assert "image/png" not in data
    words = "Two panels; Loss by level; loss over noise level σ; clean, attacked &lt;b&gt;"
    assert f'alt="{words}"' in data["text/html"]
    picture = data["text/html"].partition("base64,")[2].partition('"')[0]
    assert Image.open(io.BytesIO(base64.b64decode(picture))).width > 300


def test_a_figure_stays_so_when_matplotlib_is_set_up_later(shell):
    """`import matplotlib.pyplot` in a notebook makes the formatters forget what they knew of figures."""
    drawn.belong_to_cells()
    select_figure_formats(shell, {"png"})
    assert "text/html" not in shell.display_formatter.format(plot())[0]
    shell.events.trigger("pre_execute")
    data, _ = shell.display_formatter.format(plot())
    assert "text/html" in data and "image/png" not in data


def test_plots_and_pictures_are_told_apart():
    """A dark page turns plots round; a photograph that is turned round is a negative."""
    assert 'class="dc-plot"' in drawn.as_html(plot())
    assert 'class="dc-pictures"' in drawn.as_html(pictures())
    both = plot()
    both.axes[1].imshow(np.zeros((4, 4)))
    assert 'class="dc-pictures"' in drawn.as_html(both)
    assert drawn.as_html(Figure()) is None


def test_long_descriptions_end():
    figure = Figure()
    figure.subplots().set_title("word " * 1000)
    assert len(drawn.described(figure)) < drawn.LONGEST + 3
    assert drawn.described(pictures()) == ""
