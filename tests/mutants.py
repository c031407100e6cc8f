"""Random mutants of the numerical floors: does some test notice when a formula is changed?

    python tests/mutants.py

draws 100 small changes of the formulas by a fixed seed, runs for each the tests that reach the changed line, and prints
those that no test has noticed. It takes a quarter of an hour on two free cores and needs `pip install -e .[mutants]`. The
changes are made by cosmic-ray in copies of the repository, and coverage.py says which tests reach which line. The exit
code is 0 if at least 95 % of the mutants are killed.
"""

import argparse
import ast
import compileall
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from difflib import SequenceMatcher, unified_diff
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = Path("lib/diffclass")
FLOORS = (
    "units.py",
    "noise.py",
    "intervals.py",
    "likelihood.py",
    "denoisers/base.py",
    "denoisers/exact.py",
    "classifiers/bayes.py",
    "classifiers/noised.py",
    "classifiers/purified.py",
    "classifiers/votes.py",
    "classifiers/smoothed.py",
    "classifiers/paths.py",
    "attacks/search.py",
    "attacks/losses.py",
    "attacks/targeted.py",
    "attacks/blackbox.py",
    "certify/certificates.py",
    "certify/counting.py",
    "certify/anytime.py",
    "certify/soft.py",
    "certify/lipschitz.py",
    "evaluation/judging.py",
    "evaluation/accuracies.py",
)
TESTS = (
    "test_units.py",
    "test_intervals.py",
    "test_noise.py",
    "test_denoisers.py",
    "test_likelihood.py",
    "test_classifiers.py",
    "test_purified.py",
    "test_votes.py",
    "test_noised.py",
    "test_smoothed.py",
    "test_paths.py",
    "test_certificates.py",
    "test_anytime.py",
    "test_soft.py",
    "test_lipschitz.py",
    "test_attacks.py",
    "test_honest.py",
    "test_measuring.py",
    "test_judging.py",
    "test_cli_evaluation.py",
)
GOAL = 0.95
# loaded once for all mutants, as loading takes longer than most tests; nothing of the library itself
READY = ("pytest", "torch", "scipy.stats", "sklearn.datasets", "diffusers", "torchattacks", "typer")
# a mutant is equivalent if no input tells it apart: "file: the changed line" -> why
EQUIVALENT = {
    "certify/certificates.py: rivals = [c for k, c in enumerate(counts) if k != original]  ->  "
    "rivals = [c for k, c in enumerate(counts) if k is not original]": (
        "at worst the class is among its own rivals, and no class beats itself: its lower bound is below its upper one"
    ),
    "noise.py: return cls(levels, noise.expand(len(levels), -1, -1, -1, -1, -1).clone())  ->  "
    "return cls(levels, noise.expand(len(levels), -1, 1, -1, -1, -1).clone())": (
        "the third axis, the images, has one entry here: to keep it and to make it one are the same"
    ),
    "noise.py: return cls(levels, noise.expand(len(levels), -1, -1, -1, -1, -1).clone())  ->  "
    "return cls(levels, noise.expand(len(levels), -1, +1, -1, -1, -1).clone())": (
        "the third axis, the images, has one entry here: to keep it and to make it one are the same"
    ),
    "denoisers/base.py: return self(x_sigma, sigma, [self.num_classes])[:, 0]  ->  "
    "return self(x_sigma, sigma, [self.num_classes])[:, -1]": (
        "one class is asked for, so the first answer is the last one"
    ),
    "noise.py: right = torch.searchsorted(grid.to(s.device), s).clamp(1, len(grid) - 1)  ->  "
    "right = torch.searchsorted(grid.to(s.device), s).clamp( 0, len(grid) - 1)": (
        "only the lowest level itself is found at 0; its left neighbour is then the last one, a step of -1 away, "
        "and -1 plus the whole way from there is time 0 as well"
    ),
}
# cosmic-ray's changes that raise an error wherever they stand among numbers, so that any test kills them
CRUDE = re.compile(r"BinaryOperator_.*_(LShift|RShift|BitAnd|BitOr|BitXor)$|Unary.*_Invert$")
BITWISE = re.compile(r"BinaryOperator_(BitAnd|BitOr|BitXor)_(BitAnd|BitOr|BitXor)$")


@dataclass(frozen=True)
class Mutant:
    """One small change: an operator of cosmic-ray at one of the places where it can be applied."""

    file: str  # below lib/diffclass
    operator: str
    occurrence: int
    line: int
    change: str  # the changed line, as it is and as it becomes

    @property
    def name(self) -> str:
        return f"{self.file}: {self.change}"


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def words(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where a module holds annotations, error messages and other text: a change there changes no number.

    Shapes      pairs of (line, column), lines from 1, columns from 0, as in parso
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        texts = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        if isinstance(node, ast.JoinedStr):
            texts.append(node)
        found += [
            ((text.lineno, text.col_offset), (text.end_lineno, text.end_col_offset))
            for text in texts
            if text is not None
        ]
    return found


def changes_of(file: str) -> dict[tuple[int, int], list[tuple[str, int]]]:
    """Every change of a module that concerns a number or a decision, by its place: (operator, occurrence)."""
    import cosmic_ray.plugins
    from cosmic_ray.ast import ast_nodes, get_ast

    source = (ROOT / LIBRARY / file).read_text()
    nodes = list(ast_nodes(get_ast(source)))
    text = words(source)
    found: dict[tuple[int, int], list[tuple[str, int]]] = {}
    for operator in sorted(cosmic_ray.plugins.operator_names()):
        if CRUDE.search(operator) and not BITWISE.search(operator):
            continue
        kind = cosmic_ray.plugins.get_operator(operator)
        if kind.arguments():  # names of variables, which nobody gives it here
            continue
        places = [place for node in nodes for place, _ in kind().mutation_positions(node)]
        for occurrence, place in enumerate(places):
            if not any(start <= place < end for start, end in text):
                found.setdefault(place, []).append((operator, occurrence))
    return found


def mutant_of(file: str, operator: str, occurrence: int) -> Mutant:
    """A change as a mutant, whose line is known."""
    import cosmic_ray.plugins
    from cosmic_ray.mutating import mutate_code

    source = (ROOT / LIBRARY / file).read_text()
    changed = mutate_code(source, cosmic_ray.plugins.get_operator(operator)(), occurrence)
    return Mutant(file, operator, occurrence, *difference(source, changed))


def difference(source: str, changed: str) -> tuple[int, str]:
    """The first line that a change concerns, from 1, and what becomes of it."""
    before = source.splitlines()
    after = changed.splitlines()
    for _, start, end, to, until in SequenceMatcher(None, before, after, False).get_opcodes():
        if before[start:end] != after[to:until]:
            old = " ".join(line.strip() for line in before[start:end])
            new = " ".join(line.strip() for line in after[to:until])
            return start + 1, f"{old}  ->  {new}"
    raise ValueError("expected a change, got the same source twice.")


def drawn(count: int, seed: int, files: Sequence[str] = FLOORS) -> list[Mutant]:
    """Mutants at `count` different places, each place with one of its changes; all places alike.

    Errors      ValueError for more mutants than places
    """
    choice = random.Random(seed)
    places = [(file, changes) for file in files for changes in changes_of(file).values()]
    if count > len(places):
        raise ValueError(f"expected at most {len(places)} mutants, one a place, got {count}.")
    return [
        mutant_of(file, *choice.choice(changes)) for file, changes in choice.sample(places, count)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Running


def copy_into(folder: Path) -> Path:
    """A copy of the repository in which a module can be changed; what no test writes is only linked."""
    folder.mkdir(parents=True)
    for entry in ROOT.iterdir():
        if entry.name in ("lib", "tests"):
            shutil.copytree(
                entry, folder / entry.name, ignore=shutil.ignore_patterns("__pycache__")
            )
        elif not entry.name.startswith("."):
            (folder / entry.name).symlink_to(entry)
    return folder


def inside(folder: Path) -> None:
    """Let a process, and those that it starts, work in a copy and import the library from there."""
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder / "lib")
    os.environ["OMP_NUM_THREADS"] = "1"


class Reached:
    """Which tests reach a line of the unchanged library, the quickest first, and how long they take.

    Errors      RuntimeError if a test fails before anything is changed
    """

    def __init__(self, folder: Path, workers: int):
        import coverage

        report = folder / "seconds.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", f"--junitxml={report}"]
        command += ["--cov=diffclass", "--cov-context=test", "--cov-report=", "-n", str(workers)]
        command += [f"tests/{name}" for name in TESTS]
        done = subprocess.run(command, cwd=folder, text=True, capture_output=True)
        if done.returncode:
            raise RuntimeError(
                f"expected tests that pass before anything is changed, got\n{done.stdout[-3000:]}"
            )
        self.seconds: dict[str, float] = {}
        for case in ElementTree.parse(report).iter("testcase"):
            file = case.get("classname").replace(".", "/") + ".py"
            self.seconds[f"{file}::{case.get('name')}"] = float(case.get("time"))
        self.contexts = coverage.CoverageData(str(folder / ".coverage"))
        self.contexts.read()
        self.folder = folder

    def by(self, mutant: Mutant) -> list[str]:
        """The tests of a mutant: those that reach its line, all of its module for a line that runs on import."""
        path = str(self.folder / LIBRARY / mutant.file)
        contexts = self.contexts.contexts_by_lineno(path)
        near = {
            context.rsplit("|", 1)[0]
            for line in statement(path, mutant.line)
            for context in contexts.get(line, ())
        }
        if not near - {""}:  # a constant or a default, which runs on import
            near = {context.rsplit("|", 1)[0] for listed in contexts.values() for context in listed}
        return sorted(near & self.seconds.keys(), key=self.seconds.__getitem__)


def statement(path: str, line: int) -> range:
    """The lines of the smallest statement around a line, without the body of a loop, a function or an `if`."""
    best = range(line, line + 1)
    for node in ast.walk(ast.parse(Path(path).read_text())):
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            end = body[0].lineno - 1 if body else node.end_lineno
            own = range(node.lineno, max(node.lineno, end) + 1)
            if line in own:
                best = own
    return best


def tried(mutant: Mutant, tests: Sequence[str], timeout: float) -> dict:
    """What the tests say of a mutant, in the copy in which this process works."""
    import cosmic_ray.plugins
    from cosmic_ray.mutating import use_mutation

    listed = Path("mutant-tests.txt")
    listed.write_text("".join(f"{test}\n" for test in tests))
    said = Path("mutant-output.txt")
    module = Path(LIBRARY, mutant.file)
    operator = cosmic_ray.plugins.get_operator(mutant.operator)()
    with use_mutation(module, operator, mutant.occurrence) as (before, after):
        child = get_context("fork").Process(target=_tested, args=(listed, said))
        child.start()
        child.join(timeout)
        late = child.is_alive()
        if late:
            os.killpg(child.pid, signal.SIGKILL)
            child.join()
    names = (f"a/{mutant.file}", f"b/{mutant.file}")
    diff = "\n".join(unified_diff(before.splitlines(), after.splitlines(), *names, lineterm=""))
    if late:
        return dict(verdict="killed", by=f"time: {timeout:.0f} s", diff=diff)
    killers = re.findall(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", said.read_text(), re.MULTILINE)
    if child.exitcode == 0:
        return dict(verdict="survived", by="", diff=diff)
    by = killers[0] if killers else f"exit code {child.exitcode}: look at what happened"
    return dict(verdict="killed", by=by, diff=diff)


def _tested(listed: Path, said: Path) -> None:
    """Run the listed tests up to the first that fails, in a process of its own with the modules of `READY` at hand."""
    import pytest

    os.setsid()  # so that it ends with everything that it starts
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(Path("lib").resolve()))
    options = ["-x", "-q", "--no-header", "--tb=no", "-o", "addopts=", "-W", "ignore"]
    with said.open("w") as stream:
        os.dup2(stream.fileno(), 1)  # also what processes of the tests say
        os.dup2(stream.fileno(), 2)
        sys.stdout = stream
        sys.stderr = stream
        code = pytest.main([*options, "-p", "no:cacheprovider", f"@{listed}"])
    os._exit(code)


def _settle(folder: Path, places) -> None:
    """Give a process of the pool a copy of its own, and load what no mutant changes."""
    inside(copy_into(folder / f"copy-{places.get()}"))
    for name in READY:
        importlib.import_module(name)
    compileall.compile_dir("lib", quiet=2)


def run(mutants: Sequence[Mutant], workers: int, folder: Path) -> Iterator[tuple[int, dict]]:
    """Try every mutant; yields its number and what the tests said, as they finish."""
    whole = copy_into(folder / "whole")
    inside(whole)
    reached = Reached(whole, workers)
    context = get_context("spawn")
    places = context.Queue()
    for number in range(workers):
        places.put(number)
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_settle, initargs=(folder, places)
    )
    with pool:
        waiting = {}
        for number, mutant in enumerate(mutants):
            tests = reached.by(mutant)
            if not tests:
                yield number, dict(verdict="survived", by="", diff="no test reaches it")
                continue
            timeout = 120 + 5 * sum(reached.seconds[test] for test in tests)
            waiting[pool.submit(tried, mutant, tests, timeout)] = number
        for done in as_completed(waiting):
            yield waiting[done], done.result()


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw, run, print. Returns 0 if at least 95 % of the mutants that count are killed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="how many mutants")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--only", help="numbers of mutants of the draw, such as 3,17: try these")
    parser.add_argument("--list", action="store_true", help="print the draw and try nothing")
    chosen = parser.parse_args(arguments)
    listed = drawn(chosen.count, chosen.seed)
    numbers = range(len(listed))
    if chosen.only:
        numbers = [int(number) for number in chosen.only.split(",")]
    apart = [number for number in numbers if listed[number].name in EQUIVALENT]
    for number in apart:
        print(f"{number:3} set apart  {listed[number].name}: {EQUIVALENT[listed[number].name]}")
    numbers = [number for number in numbers if number not in apart]
    if chosen.list:
        for number in numbers:
            print(f"{number:3} {listed[number].name}")
        return 0
    survivors = []
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        results = run([listed[number] for number in numbers], chosen.workers, Path(folder))
        for place, result in results:
            number = numbers[place]
            counts[result["verdict"]] += 1
            told = f"{number:3} {result['verdict']:9} {listed[number].name}"
            print(f"{told}  [{result['by']}]", flush=True)
            if result["verdict"] == "survived":
                survivors.append((number, result["diff"]))
    for number, diff in sorted(survivors):
        print(f"\nsurvivor {number}\n{diff}")
    share = counts["killed"] / max(1, len(numbers))
    print(json.dumps({"drawn": len(numbers) + len(apart), "set apart": len(apart), **counts}))
    print(f"{share:.1%} killed; the goal is {GOAL:.0%}")
    return 0 if share >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
