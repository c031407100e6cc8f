"""The launcher, the list of dependencies and its exact versions, the conda environment."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDED = [
    Requirement(line) for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]
]
PINNED = dict(
    line.split("==")
    for line in (ROOT / "lib" / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
)


@pytest.fixture
def launcher(monkeypatch, tmp_path):
    """lib/__main__.py as a module whose environment lies in a temporary folder and whose pip is never called."""
    monkeypatch.setenv("DIFFCLASS_VENV", str(tmp_path / "venv"))
    spec = importlib.util.spec_from_file_location("launcher", ROOT / "lib" / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "install", lambda python: pytest.fail("pip was called"))
    return module


def launch(*arguments, **env):
    return subprocess.run(
        [sys.executable, "-m", "lib", *arguments],
        cwd=ROOT,
        text=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
        env={**os.environ, **env},
    )


@pytest.mark.parametrize("needed", NEEDED, ids=lambda needed: needed.name)
def test_dependency_is_pinned_allowed_and_installed(needed):
    pinned = {canonicalize_name(name): release for name, release in PINNED.items()}[
        canonicalize_name(needed.name)
    ]
    assert needed.specifier.contains(pinned)
    assert needed.specifier.contains(version(needed.name).partition("+")[0])


def test_constraints_are_exact_and_public():
    assert len(PINNED) > 50 and canonicalize_name(PROJECT["name"]) not in map(
        canonicalize_name, PINNED
    )
    assert not [
        pin
        for pin in PINNED.values()
        if not pin.replace(".", "").replace("post", "").isalnum() or "+" in pin
    ]


def test_conda_installs_through_pyproject_alone():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert sorted(Requirement(entry.replace("python=", "python==")).name for entry in conda) == [
        "pip",
        "python",
    ]
    assert pip == ["-c lib/constraints.txt", "-e .[test]"]
    (python,) = [entry.partition("=")[2] for entry in conda if entry.startswith("python=")]
    assert python in PROJECT["requires-python"].replace(">=", "")


def test_launcher_can_be_read_by_an_old_python():
    source = (ROOT / "lib" / "__main__.py").read_text()
    ast.parse(source, feature_version=(3, 7))
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import)]
    assert (
        imports
        and {alias.name for node in imports for alias in node.names} <= sys.stdlib_module_names
    )


@pytest.mark.parametrize("python", [(3, 8), (3, 10), (3, 14)])
def test_unsuitable_python_gets_one_sentence(launcher, monkeypatch, python):
    monkeypatch.setattr(launcher.sys, "version_info", (*python, 0))
    with pytest.raises(
        SystemExit, match=rf"needs Python 3.11, 3.12 or 3.13, and this is Python 3.{python[1]}: use"
    ):
        launcher.ready()


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("ten years of work")
    done = launch("test", DIFFCLASS_VENV=str(tmp_path))
    assert done.returncode == 1 and "neither a virtual environment nor empty" in done.stderr
    assert (tmp_path / "thesis.tex").read_text() == "ten years of work"


@pytest.mark.parametrize("retries", ["0", "1"])
def test_without_a_network_one_sentence_says_so_and_the_next_run_tries_again(tmp_path, retries):
    offline = {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_FIND_LINKS": "",
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_NO_CACHE_DIR": "1",
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_RETRIES": retries,
    }
    done = launch("test", DIFFCLASS_VENV=str(tmp_path / "venv"), **offline)
    assert done.returncode == 1
    assert (
        done.stderr.strip().startswith("pip could not reach its package index")
        and "Traceback" not in done.stderr
    )
    assert (tmp_path / "venv" / ".diffclass").read_text() == ""


def test_ready_installs_once_then_again_only_after_a_change(launcher, monkeypatch):
    calls = []
    monkeypatch.setattr(launcher, "install", lambda python: calls.append(python) or "")
    monkeypatch.setattr(launcher, "make_venv", lambda state: launcher.VENV.mkdir())
    launcher.ready()
    monkeypatch.setattr(launcher, "works", lambda python, *code: True)
    assert launcher.ready() == launcher.VENV / launcher.BINARY and len(calls) == 1
    monkeypatch.setattr(launcher, "fingerprint", lambda: "another list of dependencies")
    launcher.ready()
    launcher.ready()
    assert len(calls) == 2


def test_an_interrupted_installation_is_rebuilt_from_scratch(launcher, monkeypatch):
    def interrupted(python):
        raise KeyboardInterrupt

    rebuilt = []
    launcher.VENV.mkdir()
    monkeypatch.setattr(launcher, "works", lambda python, *code: code[0] == launcher.USABLE)
    monkeypatch.setattr(launcher, "make_venv", rebuilt.append)
    monkeypatch.setattr(launcher, "install", interrupted)
    with pytest.raises(KeyboardInterrupt):
        launcher.ready()
    assert rebuilt == [] and (launcher.VENV / ".diffclass").read_text() == launcher.BUSY
    monkeypatch.setattr(launcher, "install", lambda python: "")
    launcher.ready()
    assert (
        rebuilt == [launcher.BUSY]
        and (launcher.VENV / ".diffclass").read_text() == launcher.fingerprint()
    )


def test_fingerprint_depends_on_both_lists(launcher, monkeypatch, tmp_path):
    (tmp_path / "lib").mkdir()
    monkeypatch.setattr(launcher, "ROOT", tmp_path)
    seen = set()
    for project, constraints in (("a", "b"), ("c", "b"), ("c", "d")):
        (tmp_path / "pyproject.toml").write_text(project)
        (tmp_path / "lib" / "constraints.txt").write_text(constraints)
        seen.add(launcher.fingerprint())
    assert len(seen) == 3


def test_an_unknown_job_prints_the_four_jobs():
    done = launch("tset")
    assert done.returncode == 2
    assert all(f"python3 -m lib {job}" in done.stdout for job in ("lab", "test", "bench", "html"))


def test_lab_writes_nothing_outside_build(launcher, monkeypatch, tmp_path):
    monkeypatch.setattr(launcher, "ROOT", tmp_path)
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    command = launcher.lab()
    assert {file.relative_to(tmp_path).parts[0] for file in tmp_path.rglob("*")} == {"build"}
    assert command[-1].endswith("/lab/tree/notebooks/00_start_here.ipynb")
    (workspace,) = (tmp_path / "build/lab/workspaces").glob("*")
    closed = json.loads(workspace.read_text())["data"]["layout-restorer:data"]
    assert closed == {"left": {"collapsed": True}}, "the page has the whole width"
    workspace.write_text("the reader's own")
    launcher.lab()
    assert workspace.read_text() == "the reader's own"
    assert ("--no-browser" in command) == sys.platform.startswith("linux")


def test_html_is_the_command_of_the_library(launcher, monkeypatch):
    called = []
    monkeypatch.setattr(launcher, "ready", lambda: Path("python"))
    monkeypatch.setattr(launcher.subprocess, "call", lambda command, **_: called.append(command))
    launcher.main(["html", "--run", "--slides", "03"])
    assert called == [["python", "-m", "diffclass", "html", "--run", "--slides", "03"]]
