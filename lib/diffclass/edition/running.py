"""Notebooks with what they print and draw: run from top to bottom in a kernel of their own."""

import json
import subprocess

import nbformat

from diffclass.edition import chapters

LONGEST = 600  # seconds for one cell


def executed(chapter: chapters.Chapter) -> dict:
    """A notebook with the outputs of all its cells; its file stays as it is.

    Errors      ValueError that names the notebook and the cell that failed, and what it said
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellControlSignal, DeadKernelError

    notebook = nbformat.read(chapter.path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=LONGEST,
        kernel_name="python3",
        resources=dict(metadata=dict(path=str(chapter.path.parent))),
        store_widget_state=False,
    )
    try:
        # a kernel says on its stderr how it talks to us, which is nothing for the reader of a progress bar
        client.execute(stderr=subprocess.DEVNULL)
    except (CellControlSignal, DeadKernelError) as error:
        number = client.code_cells_executed
        raise ValueError(
            f"{chapter.path.name}: expected a notebook that runs, got an error in code cell {number}: {_last_line(error)}"
        ) from None
    return json.loads(nbformat.writes(notebook))


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
