"""The order of lib/diffclass, read from its syntax trees: who may import whom, sizes, docstrings, randomness.

Every rule is a function from sources to complaints. It has to be silent on the library and on a clean sample, and to
complain about a planted offence: a rule that cannot fire proves nothing.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lib" / "diffclass"
FLOORS = {
    0: ("", "units", "noise", "randomised", "certificates", "results"),
    1: ("denoisers", "data", "cifar", "pictures", "assets", "storage", "bridges", "corruptions"),
    2: ("likelihood", "sampling", "training", "conversion"),
    3: ("classifiers", "defences", "adaptive", "gallery", "racing", "translation", "attacks", "smoothing",
        "baselines"),
    4: ("audit", "exercises", "measuring", "protocols", "translation_training", "baseline_training"),
    5: ("figures", "course", "recipes", "robustness", "hardening"),
    6: ("scenes", "trainers", "zoo", "claims", "judging"),
    7: ("widgets", "cli"),
    8: ("__main__",),
}
FLOOR_OF = {module: floor for floor, modules in FLOORS.items() for module in modules}
# A package's own common ground.
SHARED = {"audit.base", "audit.holding", "denoisers.base", "denoisers.nets", "exercises.base", "exercises.compare",
          "scenes.digits", "cli.base"}
MAX_ARROWS, MAX_MODULE, MAX_FUNCTION = 3.0, 350, 40
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)

# Draw from a global generator unless they are given one.
DRAWS = {f"torch.{name}" for name in ("rand", "randn", "randint", "randperm", "normal", "multinomial", "bernoulli",
                                      "poisson", "rand_like", "randn_like", "randint_like")}
FILLS = {"normal_", "uniform_", "bernoulli_", "random_", "exponential_", "cauchy_", "geometric_", "log_normal_",
         "trunc_normal_", "kaiming_normal_", "kaiming_uniform_", "xavier_normal_", "xavier_uniform_", "orthogonal_"}
NUMPY_OWN = {"default_rng", "Generator", "SeedSequence", "PCG64", "Philox", "BitGenerator"}


def sources(folder: Path) -> dict[str, str]:
    """Module name relative to the folder ("" is its __init__) -> source."""
    names = {path: ".".join(path.relative_to(folder).with_suffix("").parts) for path in sorted(folder.rglob("*.py"))}
    return {name.removesuffix("__init__").rstrip("."): path.read_text() for path, name in names.items()}


def dotted(node, aliases) -> str:
    """The full name that an expression like `np.random.seed` refers to, or an empty string."""
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
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


# ---------------------------------------------------------------------------------------------------------------------
# Arrows


def targets(module: str, source: str, modules, package: bool) -> set[str]:
    """The modules of ours that a module imports, at any depth of its code."""
    found = set()
    here = (["diffclass"] + module.split(".") if module else ["diffclass"])[: None if package else -1]
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, [base, node.module]))
            names = [f"{base}.{alias.name}" for alias in node.names]
        for name in names:
            if name == "diffclass" or name.startswith("diffclass."):
                inner = name.removeprefix("diffclass").lstrip(".")
                while inner and inner not in modules:
                    inner = inner.rpartition(".")[0]
                found.add(inner)
    return found - {module}


def arrows(code: dict[str, str]) -> dict[str, set[str]]:
    packages = {name.rpartition(".")[0] for name in code} | {""}
    return {name: targets(name, source, code, name in packages) for name, source in code.items()}


def room(module: str) -> str:
    return module.partition(".")[0]


def has_no_unknown_module(code):
    return [f"{name}: has no floor; give it one in FLOORS" for name in code if room(name) not in FLOOR_OF]


def goes_down(code):
    """An import leads to a lower floor, inside a package to what it shares; its __init__ may list its modules."""
    def allowed(a, b):
        if a and room(a) == room(b):
            return b in SHARED or a == room(a)
        return b == "" or FLOOR_OF.get(room(a), 99) > FLOOR_OF.get(room(b), -1)
    return [f"{a} -> {b or 'diffclass'}: an import may only go to a lower floor" for a, ends in arrows(code).items()
            for b in sorted(ends) if not allowed(a, b)]


def has_no_cycle(code):
    graph, done, found = arrows(code), set(), []

    def visit(name, trail):
        if name in trail:
            found.append(" -> ".join([*trail[trail.index(name):], name]))
        elif name not in done:
            for end in sorted(graph.get(name, ())):
                visit(end, [*trail, name])
            done.add(name)
    for name in graph:
        visit(name, [])
    return found


def has_few_arrows(code):
    rooms = {name: ends for name, ends in arrows(code).items() if name not in ("", "denoisers", "exercises")}
    count = sum(map(len, rooms.values()))
    return [f"{count} imports between {len(rooms)} modules"] if count > MAX_ARROWS * len(rooms) else []


# ---------------------------------------------------------------------------------------------------------------------
# Rules for one module: source -> complaints


def is_short(source):
    lines = len(source.splitlines())
    return [f"{lines} lines, at most {MAX_MODULE}"] if lines > MAX_MODULE else []


def has_short_functions(source):
    return [f"{node.name}: {node.end_lineno - node.lineno + 1} lines, at most {MAX_FUNCTION}"
            for node in ast.walk(ast.parse(source))
            if isinstance(node, FUNCTION) and node.end_lineno - node.lineno + 1 > MAX_FUNCTION]


def has_no_star_import(source):
    return [f"line {node.lineno}: star import" for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)]


def has_no_bare_except(source):
    return [f"line {node.lineno}: bare except" for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.ExceptHandler) and node.type is None]


def names_no_device(source):
    tree = ast.parse(source)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings may speak of devices
    text = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
            and id(node) not in prose and "cuda" in node.value.lower()]
    code = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "cuda"]
    return [f"line {node.lineno}: cuda" for node in text + code]


def draws_from_given_generators(source):
    tree, found = ast.parse(source), []
    names = aliases_of(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func, names)
        given = any(keyword.arg == "generator" for keyword in node.keywords)
        method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if ((name in DRAWS or name.rpartition(".")[2] in FILLS or method in FILLS) and not given
                or name.startswith("torch.") and name.rpartition(".")[2].startswith(("manual_seed", "seed"))
                or name.startswith("numpy.random.") and name.split(".")[2] not in NUMPY_OWN
                or name.startswith("random.") and name != "random.Random"):
            found.append(f"line {node.lineno}: {name or method} uses the global random state")
    return found


def is_documented(source):
    """Every public module, class, function and method has a docstring; torch's own hooks speak through their class."""
    tree = ast.parse(source)
    found = [] if ast.get_docstring(tree) else ["module without docstring"]

    def visit(body, prefix):
        for node in body:
            if isinstance(node, (*FUNCTION, ast.ClassDef)) and not node.name.startswith("_"):
                if not ast.get_docstring(node) and not (prefix and node.name in ("forward", "extra_repr")):
                    found.append(f"{prefix}{node.name} without docstring")
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{node.name}.")
    visit(tree.body, "")
    return found


def can_fail(source):
    def checks(node):
        if isinstance(node, ast.Assert):
            return True
        if not isinstance(node, ast.Call):
            return False
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return name.lstrip("_").startswith(("check", "assert")) or name in ("raises", "fail", "warns")
    return [f"{test.name}: asserts nothing" for test in ast.walk(ast.parse(source))
            if isinstance(test, FUNCTION) and test.name.startswith("test") and not any(map(checks, ast.walk(test)))]


# ---------------------------------------------------------------------------------------------------------------------
# The library obeys, and every rule fires

LIBRARY, TESTS = sources(PACKAGE), sources(ROOT / "tests")
MODULE_RULES = [is_short, has_short_functions, has_no_star_import, has_no_bare_except, names_no_device,
                draws_from_given_generators, is_documented]
PLAN_RULES = [has_no_unknown_module, goes_down, has_no_cycle, has_few_arrows]
CLEAN = '''"""A module that may speak of cuda in its prose."""
import numpy as np
import torch


def noise(shape, seed):
    """Noise of a given seed."""
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    weight = torch.empty(shape)
    torch.nn.init.normal_(weight, generator=generator)
    return torch.randn(shape, generator=generator) + rng.normal(size=shape) + weight
'''
PLANTED = [
    (is_short, "pass\n" * (MAX_MODULE + 1)),
    (has_short_functions, "def f():\n" + "    pass\n" * MAX_FUNCTION),
    (has_short_functions, "class A:\n    def f(self):\n" + "        pass\n" * MAX_FUNCTION),
    (has_no_star_import, "from torch import *"),
    (has_no_bare_except, "try:\n    pass\nexcept:\n    pass"),
    (names_no_device, "x = x.to('cuda:0')"),
    (names_no_device, "x = x.cuda()"),
    (names_no_device, "import torch\ntorch.cuda.is_available()"),
    (draws_from_given_generators, "import torch\ntorch.manual_seed(0)"),
    (draws_from_given_generators, "import torch\ntorch.cuda.manual_seed_all(0)"),
    (draws_from_given_generators, "import torch as t\nt.seed()"),
    (draws_from_given_generators, "import numpy as np\nnp.random.seed(0)"),
    (draws_from_given_generators, "from numpy import random\nrandom.normal()"),
    (draws_from_given_generators, "import random\nrandom.seed(0)"),
    (draws_from_given_generators, "from random import shuffle\nshuffle([1])"),
    *[(draws_from_given_generators, f"import torch\n{name}(3)") for name in sorted(DRAWS)],
    (draws_from_given_generators, "from torch import randn\nrandn(3)"),
    (draws_from_given_generators, "x.normal_()"),
    (draws_from_given_generators, "from torch import nn\nnn.init.kaiming_normal_(w)"),
    (is_documented, "x = 1"),
    (is_documented, '"""M."""\ndef f():\n    pass'),
    (is_documented, '"""M."""\nclass A:\n    pass'),
    (is_documented, '"""M."""\nclass A:\n    """A."""\n    def f(self):\n        pass'),
    (can_fail, "def test_nothing():\n    compare(1, 2)"),
]
PLANTED_PLANS = [
    (has_no_unknown_module, {"utils": ""}),
    (goes_down, {"units": "from . import noise", "noise": ""}),
    (goes_down, {"units": "import diffclass.cli", "cli": ""}),
    (goes_down, {"data": "from diffclass.denoisers.exact import X", "denoisers.exact": ""}),
    (goes_down, {"denoisers.exact": "from .network import X", "denoisers.network": ""}),
    (goes_down, {"likelihood": "def f():\n    from diffclass import classifiers", "classifiers": ""}),
    (has_no_cycle, {"units": "from .noise import x", "noise": "import diffclass.data", "data": "from . import units"}),
    (has_few_arrows, {f"room{i}": "from . import " + ", ".join(f"room{j}" for j in range(5)) for i in range(5)}),
]


@pytest.mark.parametrize("rule", MODULE_RULES, ids=lambda rule: rule.__name__)
def test_library_module(rule):
    found = [f"{name or '__init__'}: {complaint}" for name, source in LIBRARY.items() for complaint in rule(source)]
    assert LIBRARY and not found, "\n".join(found)


@pytest.mark.parametrize("rule", PLAN_RULES, ids=lambda rule: rule.__name__)
def test_library_plan(rule):
    assert not rule(LIBRARY), "\n".join(rule(LIBRARY))


def test_every_test_can_fail():
    found = [f"{name}: {complaint}" for name, source in TESTS.items() for complaint in can_fail(source)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("rule, offence", PLANTED)
def test_rule_fires(rule, offence):
    assert rule(offence)


@pytest.mark.parametrize("rule, offence", PLANTED_PLANS)
def test_plan_rule_fires(rule, offence):
    assert rule(offence)


@pytest.mark.parametrize("rule", [*MODULE_RULES, can_fail], ids=lambda rule: rule.__name__)
def test_rule_is_silent_on_clean_code(rule):
    assert not rule(CLEAN)


def test_plan_rules_are_silent_on_a_clean_plan():
    plan = {"": "", "units": "", "noise": "", "denoisers": "from .exact import X",
            "denoisers.base": "from .. import units",
            "denoisers.exact": "from .base import Denoiser\nfrom ..noise import levels",
            "likelihood": "import diffclass\nfrom diffclass.denoisers.base import Denoiser"}
    assert arrows(plan)["denoisers.exact"] == {"denoisers.base", "noise"}
    assert arrows(plan)["likelihood"] == {"", "denoisers.base"}
    assert [complaint for rule in PLAN_RULES for complaint in rule(plan)] == []


def test_every_rule_has_a_planted_offence():
    rules = {rule for rule, _ in PLANTED} | {rule for rule, _ in PLANTED_PLANS}
    assert rules == {*MODULE_RULES, *PLAN_RULES, can_fail}


def test_ruff_is_content():
    folders = [name for name in ("lib", "tests", "notebooks") if any((ROOT / name).rglob("*.[pi][yp]*"))]
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", *folders], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stdout
    assert re.search("All checks passed", done.stdout)
