"""Set up the course and run it. Standard library only; safe to run twice.

    python3 -m lib lab    [jupyter args]    set up, then open JupyterLab at notebooks/00_start_here.ipynb
    python3 -m lib explore [options]        set up, then open the explorer alone in a browser tab
    python3 -m lib test   [pytest args]     set up, then run all tests and all notebooks
    python3 -m lib bench  [pytest args]     set up, then time the sliders in a real browser
    python3 -m lib twins  [pytest args]     set up, then draw the static twins of the interactive figures anew
    python3 -m lib html   [--run ...]       set up, then write the course as pages to read to build/html

The first run installs about 2 GB into .venv (DIFFCLASS_VENV names another folder), which takes 1-2 minutes and the
download. An activated conda or virtual environment that already holds this checkout is used as it is.
"""

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = Path(os.environ.get("DIFFCLASS_VENV") or ROOT / ".venv").expanduser().absolute()
BINARY = "Scripts/python.exe" if os.name == "nt" else "bin/python"
PYTHONS = ((3, 11), (3, 12), (3, 13))
BUSY = "installing"  # what VENV/.diffclass says until an installation is complete
NETWORK = (
    "connection broken",
    "ConnectionError",
    "Timeout",
    "ProxyError",
    "SSLError",
    "from versions: none",
)
USABLE = f"import pip, sys; sys.exit(sys.version_info[:2] not in {PYTHONS})"
INSTALLED = """import importlib.util as u, pathlib, sys; here = u.find_spec("diffclass")
sys.exit(not (here and pathlib.Path(here.origin).resolve().parents[1] == pathlib.Path(sys.argv[1]) and all(map(
    u.find_spec, ("torch", "jupyterlab", "voila", "nbconvert", "latex2mathml", "ziamath", "pytest", "xdist", "nbval",
    "playwright")))))"""
CLOSED = '{"data": {"layout-restorer:data": {"left": {"collapsed": true}}}, "metadata": {"id": "default"}}'
say = functools.partial(print, flush=True)


def works(python, *code):
    return (
        python.exists()
        and subprocess.call(
            [str(python), "-c", *code],
            cwd=str(ROOT),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        == 0
    )


def fingerprint():
    """What an installation depends on; another value means that it has to be repeated."""
    parts = [
        str(ROOT).encode(),
        (ROOT / "pyproject.toml").read_bytes(),
        (ROOT / "lib/constraints.txt").read_bytes(),
    ]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def python_problem(version):
    other = next(
        filter(shutil.which, ("python3.13", "python3.12", "python3.11")),
        "one from https://www.python.org",
    )
    return f"The course needs Python 3.11, 3.12 or 3.13, and this is Python {version[0]}.{version[1]}: use {other}."


def make_venv(state):
    """Create the environment, or rebuild one whose installation was interrupted or whose Python has gone."""
    if VENV.exists() and not (
        VENV.is_dir() and ((VENV / "pyvenv.cfg").exists() or not any(VENV.iterdir()))
    ):
        sys.exit(
            f"{VENV} is neither a virtual environment nor empty, so it is left alone: set another DIFFCLASS_VENV."
        )
    sys.version_info[:2] in PYTHONS or sys.exit(python_problem(sys.version_info))
    say(f"1/2 {'Rebuilding' if state else 'Making'} the environment {VENV}")
    try:
        venv.create(str(VENV), with_pip=True, clear=True, symlinks=os.name != "nt")
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(
            f"Python could not make the environment {VENV} ({error}): it must be writable, and Debian and Ubuntu "
            "need `apt install python3-venv` first."
        )


def install(python):
    """Run pip, showing one living line instead of its two hundred; returns what went wrong, or nothing."""
    say(
        "2/2 Installing what pyproject.toml names, as in lib/constraints.txt: about 2 GB, 1-2 minutes and the download"
    )
    options = "-m pip --disable-pip-version-check --no-input install -c lib/constraints.txt -e .[test]".split()
    pip = subprocess.Popen(
        [str(python), *options],
        cwd=str(ROOT),
        env={**os.environ, "PIP_USER": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    lines = ["pip starts"]
    start = time.monotonic()
    done = threading.Event()
    terminal = sys.stdout.isatty()
    clear = "\r\033[2K" if terminal else ""

    def live():
        while not done.wait(1 if terminal else 20):
            text = f"    {time.monotonic() - start:4.0f} s  {lines[-1]}"[
                : shutil.get_terminal_size().columns - 1
            ]
            print(clear + text, end="" if terminal else "\n", flush=True)

    threading.Thread(target=live, daemon=True).start()
    for line in pip.stdout:
        if line.strip() and not any(
            words in line for words in ("is ignored: it is", "ninstall", "existing inst")
        ):
            lines.append(line.strip())
    pip.wait()
    done.set()
    say(f"{clear}    pip ended after {time.monotonic() - start:.0f} s")
    if pip.returncode and any(sign in line for sign in NETWORK for line in lines):
        return "pip could not reach its package index: check the network or the proxy, then run the same command again."
    return "\n".join(
        [
            *lines[-15:],
            f"pip could not install this: mend that and try again. For another Python, remove {VENV} first.",
        ]
        * bool(pip.returncode)
    )


def ready():
    """The Python that has the course: the activated environment's, or that of an up-to-date .venv."""
    for name in () if os.environ.get("DIFFCLASS_VENV") else ("VIRTUAL_ENV", "CONDA_PREFIX"):
        active = Path(os.environ.get(name) or VENV)
        if active != VENV and works(active / BINARY, INSTALLED, str(ROOT / "lib")):
            say(f"Using the activated environment {active}")
            return active / BINARY
    python = VENV / BINARY
    stamp = VENV / ".diffclass"
    state = stamp.read_text() if stamp.exists() else ""
    problem = ""
    if state != fingerprint() or not works(python, INSTALLED, str(ROOT / "lib")):
        if state == BUSY or not works(python, USABLE):
            make_venv(state)
        stamp.write_text(BUSY)
        problem = install(python)
        # pip ended in order: what it did install is whole
        stamp.write_text("" if problem else fingerprint())
    return sys.exit(problem) if problem else python


# What the course runs in, where the reader's own environment says nothing else. A thread that has nothing to do sleeps:
# by default it would spin, and on a machine where something else runs, such as the browser, two spinning threads need many
# times as long as one (150 votes on a photograph 16 s, and 1.2 s when they sleep; 0.6 and 0.8 s on an idle one).
# Half of the processors is left to the browser and the server: with both of two the explorer's slider took 117 ms (p95)
# to the repaint, with one 91 ms; the second one saves 15 % of an answer about a photograph, of one about a digit nothing.
ENVIRONMENT = {
    "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2)),
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}


def without_display():
    """Whether there is no screen here that a browser could open on."""
    if not sys.platform.startswith("linux"):
        return False
    return not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def lab():
    """JupyterLab's command line, with settings of its own: the user's are neither read nor written."""
    home = ROOT / "build" / "lab"
    folder = home / "@jupyterlab/notebook-extension"
    folder.mkdir(parents=True, exist_ok=True)
    # cells out of sight stay alive
    (folder / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')
    # nobody is asked about, or fetches, news
    notices = home / "@jupyterlab/apputils-extension"
    notices.mkdir(exist_ok=True)
    (notices / "notification.jupyterlab-settings").write_text(
        '{"fetchNews": "false", "checkForUpdates": false}'
    )
    # the page has the whole width until the reader opens the sidebar, which JupyterLab then remembers here
    workspace = home / "workspaces" / "default-37a8.jupyterlab-workspace"
    if not workspace.exists():
        workspace.parent.mkdir(exist_ok=True)
        workspace.write_text(CLOSED)
    flags = [
        f"--LabApp.user_settings_dir={home}",
        f"--LabApp.workspaces_dir={home / 'workspaces'}",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.news_url=None",
    ]
    flags += ["--allow-root"] * (getattr(os, "geteuid", lambda: 1)() == 0)
    if without_display():
        flags.append("--no-browser")
        say(
            "There is no display here: open the address http://localhost:... that JupyterLab prints below in a browser "
            "(from another machine after `ssh -L 8888:localhost:8888 THIS_MACHINE`)."
        )
    return [
        "-m",
        "jupyterlab",
        *flags,
        "--LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb",
    ]


def main(argv):
    job = (argv or [""])[0]
    jobs = {
        "lab": lab,
        "explore": lambda: ["-m", "diffclass", "explore"],
        # in order: the browser's few tests take longest, and must not begin when the others have ended
        "test": lambda: "-m pytest -n 3 --dist loadfile --no-loadscope-reorder --nbval-lax".split(),
        "bench": lambda: [
            *"-m pytest -q -s tests/test_browser.py -m".split(),
            "browser and not pictures",
        ],
        "twins": lambda: "-m pytest -q -m pictures tests/test_browser.py".split(),
        "html": lambda: "-m diffclass html".split(),
    }
    if job not in jobs:
        return say(__doc__) or 2 * (job not in ("-h", "--help"))
    bench = "1" if job == "bench" else ""
    # two processes of two threads fight over two cores
    threads = {"OMP_NUM_THREADS": "1"} if job == "test" else {}
    env = {
        **ENVIRONMENT,
        **threads,
        **os.environ,
        "DIFFCLASS_BENCH": bench,
    }
    if env.get("DIFFCLASS_CIFAR10"):
        # kernels run in notebooks/
        env["DIFFCLASS_CIFAR10"] = os.path.abspath(env["DIFFCLASS_CIFAR10"])
    try:
        return subprocess.call([str(ready()), *jobs[job](), *argv[1:]], cwd=str(ROOT), env=env)
    except KeyboardInterrupt:
        return (
            say(
                "\nStopped. The same command starts again and repairs an installation that was cut short."
            )
            or 130
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
