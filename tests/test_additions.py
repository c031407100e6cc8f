"""What the README says about adding a classifier, an attack and a notebook works, in a copy of the repository."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"```python\n# (\S+)\n(.*?)```", re.S)
IMPORTS = {
    "lib/diffclass/zoo/classifiers.py": (
        "import torch\n"
        "from diffclass.classifiers.nearest import NearestMean\n"
        "from diffclass.data.worlds import images_of\n"
    ),
    "lib/diffclass/zoo/attacks.py": "from diffclass.attacks.corners import corners\n",
}
LONGEST = 30  # lines of an addition


def blocks() -> list[tuple[str, str]]:
    """File and text of every addition that the README shows, in order."""
    return BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository with all additions of the README made to it."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "lib", folder / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "notebooks").mkdir()
    (folder / "assets").symlink_to(ROOT / "assets")
    for name, text in blocks():
        path = folder / name
        if path.suffix == ".ipynb":
            cell = nbformat.v4.new_code_cell(text)
            nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
        elif path.exists():
            path.write_text(f"{path.read_text()}\n\n{IMPORTS[name]}\n\n{text}")
        else:
            path.write_text(text)
    return folder


def run(copy, *arguments) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(copy / "lib"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=copy, env=env, capture_output=True, text=True, timeout=300
    )


def document(copy, *arguments) -> dict:
    done = run(copy, "-m", "diffclass", "--json", *arguments)
    assert done.returncode in (0, 1), done.stderr[-2000:]
    return json.loads(done.stdout)


def test_the_readme_shows_each_addition_in_few_lines():
    files = [name for name, _ in blocks()]
    assert [Path(name).name for name in files] == [
        "nearest.py",
        "classifiers.py",
        "corners.py",
        "attacks.py",
        "blur.py",
        "16_blur.ipynb",
    ]
    assert all(len(text.splitlines()) <= LONGEST for _, text in blocks())


def test_a_new_classifier_is_evaluated_attacked_verified_and_audited(copy):
    clean = document(copy, "evaluate", "--classifier", "nearest", "--limit", "40")
    (record,) = clean["records"]
    assert record["classifier"] == "nearest" and record["value"] > 0.7
    folder = str(copy / "run")
    options = ("--classifier", "nearest", "--limit", "6", "--store", folder)
    attacked = document(copy, "evaluate", "--attack", "honest", *options)
    bound = next(one for one in attacked["records"] if one["attack"] == "honest-2")
    assert bound["value"] <= record["value"] and bound["settings"]["n"] == 6
    assert document(copy, "verify", folder)["stands"]
    audit = document(copy, "audit", "nearest", "--images", "8", "--only", "1,2,3,7,11,24")
    assert {check["number"]: check["light"] for check in audit["checks"]}[1] == "green"
    assert len(audit["checks"]) == 6


def test_a_new_attack_is_run_alone_and_audited(copy):
    folder = str(copy / "corners")
    attacked = document(
        copy,
        *("evaluate", "--attack", "corners", "--classifier", "cnn", "--epsilon", "0.3"),
        *("--steps", "10", "--limit", "12", "--store", folder),
    )
    clean, bound, *_ = attacked["records"]
    assert bound["attack"] == "single-1" and bound["value"] <= clean["value"]
    assert document(copy, "verify", folder)["stands"]
    audit = document(copy, "audit", "cnn", "--attack", "corners", "--images", "6", "--only", "6,8")
    assert [check["light"] for check in audit["checks"]] == ["green", "green"]


def test_a_new_notebook_runs(copy):
    done = run(
        copy,
        *("-m", "jupyter", "nbconvert", "--to", "notebook", "--execute", "--output", "executed"),
        "notebooks/16_blur.ipynb",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    executed = nbformat.read(copy / "notebooks" / "executed.ipynb", 4)
    outputs = executed.cells[0].outputs
    assert any("application/vnd.jupyter.widget-view+json" in one.get("data", {}) for one in outputs)


def test_the_generated_parts_of_the_readme_are_those_of_the_code():
    from diffclass.cli import readme

    stale = [
        str(path.relative_to(ROOT))
        for path, text in readme.written().items()
        if path.read_text(encoding="utf-8") != text
    ]
    assert not stale, f"{stale} differ from the code: run `diffclass readme`"
