"""Rules of lib/diffclass that no tool checks: devices, randomness, probes, assertions; and that the tools are content.

Each rule is a function from a source to complaints, shown to complain about a planted offence.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lib" / "diffclass"
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)

# Draw from a global generator unless they are given one.
DRAWS = {
    f"torch.{name}"
    for name in (
        "rand",
        "randn",
        "randint",
        "randperm",
        "normal",
        "multinomial",
        "bernoulli",
        "poisson",
        "rand_like",
        "randn_like",
        "randint_like",
    )
}
FILLS = {
    "normal_",
    "uniform_",
    "bernoulli_",
    "random_",
    "exponential_",
    "cauchy_",
    "geometric_",
    "log_normal_",
    "trunc_normal_",
    "kaiming_normal_",
    "kaiming_uniform_",
    "xavier_normal_",
    "xavier_uniform_",
    "orthogonal_",
}


def sources(folder: Path) -> dict[str, str]:
    """Path relative to the folder -> source."""
    return {
        str(path.relative_to(folder)): path.read_text(encoding="utf-8")
        for path in sorted(folder.rglob("*.py"))
    }


def dotted(node, aliases) -> str:
    """The full name that an expression like `torch.nn.init` refers to, or an empty string."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, "")
    base = dotted(node.value, aliases) if isinstance(node, ast.Attribute) else ""
    return f"{base}.{node.attr}" if base else ""


def aliases_of(tree) -> dict[str, str]:
    """Local name -> full name, for everything that a module imports."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                names[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {
                alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names
            }
    return names


def names_no_device(source):
    tree = ast.parse(source)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    text = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in prose
        and "cuda" in node.value.lower()
    ]
    code = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == "cuda"]
    return [f"line {node.lineno}: cuda" for node in text + code]


def draws_from_given_generators(source):
    tree = ast.parse(source)
    names = aliases_of(tree)
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func, names)
        given = any(keyword.arg == "generator" for keyword in node.keywords)
        method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        draws = name in DRAWS or name.rpartition(".")[2] in FILLS or method in FILLS
        seeds = name.startswith("torch.") and name.rpartition(".")[2].startswith(
            ("manual_seed", "seed")
        )
        python = name.startswith("random.") and name != "random.Random"
        if draws and not given or seeds or python:
            found.append(f"line {node.lineno}: {name or method} uses the global random state")
    return found


def probes_nothing(source):
    """A classifier declares what it can do: nobody looks whether it has an attribute."""
    found = []
    for node in ast.walk(ast.parse(source)):
        name = (
            node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
        )
        if name == "hasattr" or name == "getattr" and len(node.args) == 3:
            found.append(f"line {node.lineno}: {name}")
        if isinstance(node, ast.ExceptHandler) and "AttributeError" in ast.dump(node.type or node):
            found.append(f"line {node.lineno}: except AttributeError")
    return found


def decides_by_decided(source):
    """Classes come from logits by `classifiers.base.decided`, which refuses NaN; `np.argmax` is about counts."""
    return [
        f"line {node.lineno}: .argmax"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "argmax"
        and not (isinstance(node.func.value, ast.Name) and node.func.value.id == "np")
    ]


def moves_no_control_in_the_browser(source):
    """A link in the browser answers the kernel's moves, late, and the last answer wins. `ipywidgets.link` has no answer."""
    return [
        f"line {node.lineno}: {node.attr}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and node.attr in ("jslink", "jsdlink")
    ]


def names_a_slider_s_value_last(source):
    """A plain slider may name its value before the range that allows it: a browser cut it, and left a film at 19 of 20."""
    sliders = ("IntSlider", "FloatSlider", "FloatLogSlider")
    return [
        f"line {node.lineno}: {node.func.attr}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in sliders
    ]


def can_fail(source):
    def checks(node):
        if isinstance(node, ast.Assert):
            return True
        if not isinstance(node, ast.Call):
            return False
        name = (
            node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        )
        return name.lstrip("_").startswith(("check", "assert")) or name in (
            "raises",
            "fail",
            "warns",
        )

    return [
        f"{test.name}: asserts nothing"
        for test in ast.walk(ast.parse(source))
        if isinstance(test, FUNCTION)
        and test.name.startswith("test")
        and not any(map(checks, ast.walk(test)))
    ]


ASKING = (
    "classifiers",
    "attacks",
    "certify",
    "zoo",
    "evaluation",
    "audit",
)  # rooms that use classifiers
FOREIGN = "classifiers/foreign.py"  # other people's modules have to be looked at


def asking_rooms() -> dict[str, str]:
    """The sources of the rooms in which nothing is probed."""
    code = sources(PACKAGE)
    return {
        name: source for name, source in code.items() if name.startswith(ASKING) and name != FOREIGN
    }


# Rooms in which an argmax names a class. The audit looks at broken classifiers, exercises are the reader's own.
DECIDING = (
    "attacks",
    "classifiers",
    "certify",
    "cli",
    "course/scenes",
    "evaluation",
    "training",
    "zoo",
)
DECIDES = "classifiers/base.py"


def deciding_rooms() -> dict[str, str]:
    """The sources of the rooms in which logits become classes."""
    code = sources(PACKAGE)
    return {
        name: source
        for name, source in code.items()
        if name.startswith(DECIDING) and name != DECIDES
    }


NAMES_DEVICES = "device.py"


def without_a_device() -> dict[str, str]:
    """The sources of all modules but the one that may name a device."""
    return {name: source for name, source in sources(PACKAGE).items() if name != NAMES_DEVICES}


RULES = {
    names_no_device: without_a_device,
    draws_from_given_generators: lambda: sources(PACKAGE),
    probes_nothing: asking_rooms,
    decides_by_decided: deciding_rooms,
    moves_no_control_in_the_browser: lambda: sources(PACKAGE),
    names_a_slider_s_value_last: lambda: sources(PACKAGE),
    can_fail: lambda: sources(ROOT / "tests"),
}
CLEAN = '''"""A module that may speak of cuda in its prose."""
import torch


def noise(shape, seed):
    """Noise of a given seed."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.empty(shape)
    torch.nn.init.normal_(weight, generator=generator)
    return torch.randn(shape, generator=generator) + weight
'''
PLANTED = [
    (names_no_device, "x = x.to('cuda:0')"),
    (names_no_device, "x = x.cuda()"),
    (draws_from_given_generators, "import torch\ntorch.manual_seed(0)"),
    (draws_from_given_generators, "import torch\ntorch.cuda.manual_seed_all(0)"),
    (draws_from_given_generators, "import torch as t\nt.seed()"),
    (draws_from_given_generators, "from random import shuffle\nshuffle([1])"),
    (draws_from_given_generators, "from torch import randn\nrandn(3)"),
    (draws_from_given_generators, "x.normal_()"),
    (draws_from_given_generators, "from torch import nn\nnn.init.kaiming_normal_(w)"),
    (probes_nothing, "if hasattr(classifier, 'bank'): pass"),
    (probes_nothing, "deterministic = getattr(classifier, 'deterministic', True)"),
    (probes_nothing, "try:\n    classifier.bank\nexcept AttributeError:\n    pass"),
    (decides_by_decided, "best = int(logits.argmax())"),
    (moves_no_control_in_the_browser, "W.jslink((play, 'value'), (slider, 'value'))"),
    (names_a_slider_s_value_last, "step = W.IntSlider(value=1)"),
    (can_fail, "def test_nothing():\n    compare(1, 2)"),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_module_keeps_the_rule(rule):
    code = RULES[rule]()
    found = [f"{name}: {complaint}" for name, source in code.items() for complaint in rule(source)]
    assert code and not found, "\n".join(found)


@pytest.mark.parametrize("rule, offence", PLANTED)
def test_rule_complains_about_an_offence(rule, offence):
    assert rule(offence)
    assert not rule(CLEAN)


def test_imports_only_go_down_and_never_in_circles():
    command = [
        Path(sys.executable).with_name("lint-imports"),
        "--no-cache",
        ROOT / "pyproject.toml",
    ]
    done = subprocess.run(command, cwd=ROOT / "lib", text=True, capture_output=True)
    assert done.returncode == 0 and "2 kept, 0 broken" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    "module", ["classifiers", "attacks", "zoo", "evaluation", "training", "audit"]
)
def test_the_library_loads_no_notebook_and_no_figure(module):
    rooms = "evaluation.claims" if module == "evaluation" else module
    names = {"training": "training.train"}.get(module, rooms)
    code = (
        f"import sys, diffclass.{names}; heavy = {{'IPython', 'ipywidgets', 'matplotlib', 'jupyterlab'}}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "--no-cache", "lib", "tests", "notebooks"],
        ["ruff", "format", "--no-cache", "--check", "lib", "tests", "notebooks"],
    ],
    ids=["ruff check", "ruff format"],
)
def test_tool_is_content(command):
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
