"""The command that opens the explorer alone, as an app."""

import os
import runpy
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from diffclass.cli import files
from diffclass.cli.base import EXIT_CODES, app

# voila refuses its own page's wish to end the kernel when a tab is closed: one that nobody is connected to ends by itself.
CULLED = (
    "--MappingKernelManager.cull_idle_timeout=120",
    "--MappingKernelManager.cull_interval=30",
)
APP = Path(__file__).resolve().parents[1] / "course" / "app"


@app.command(epilog=EXIT_CODES)
def explore(
    port: Annotated[
        int, typer.Option(min=1, max=65_535, help="Where the app is served, on this machine only.")
    ] = 8866,  # as `course.exploring.PORT` says, which takes a second to import
    browser: Annotated[
        bool, typer.Option(help="Open a browser tab; --no-browser prints the address alone.")
    ] = True,
):
    """Open the explorer alone in a browser tab: a picture, two classifiers, an attack as a film, and what votes prove.

    It is the figure of notebook 15, served by voila. A link that the explorer made (tab Share) opens in the state that
    it was made in.
    """
    metadata.version("voila")  # raises, in one sentence, if it is missing
    starter = runpy.run_path(str(files.starter()))
    flags = ["--template=explorer", f"--port={port}", "--Voila.ip=127.0.0.1", *CULLED]
    if not browser or starter["without_display"]():
        flags.append("--no-browser")
        print(f"The explorer is at http://127.0.0.1:{port}", flush=True)
    searched = [str(APP), *filter(None, [os.environ.get("JUPYTER_PATH")])]
    env = {**starter["ENVIRONMENT"], **os.environ, "JUPYTER_PATH": os.pathsep.join(searched)}
    arguments = ["-m", "voila", str(APP / "explorer.ipynb"), *flags]
    os.execve(sys.executable, [sys.executable, *arguments], env)
