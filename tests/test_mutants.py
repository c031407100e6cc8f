"""The draw of mutants: repeatable, of formulas and decisions alone, and what is set apart is there and has a reason."""

import sys
import textwrap

import mutants
import pytest

MODULE = textwrap.dedent(
    '''
    def half(x: int | None = 2) -> float | None:
        """Half."""
        if x < 0:
            raise ValueError(f"expected at least {1 - 1}, got {x / 2}.")
        return (
            x
            / 2
        )
    '''
).strip()


def test_annotations_and_texts_are_no_formulas():
    lines = MODULE.splitlines()
    text = mutants.words(MODULE)

    def is_text(snippet: str, line: int) -> bool:
        place = (line, lines[line - 1].index(snippet))
        return any(start <= place < end for start, end in text)

    assert is_text("| None =", 1) and is_text("| None:", 1) and is_text("- 1}", 4)
    assert is_text("/ 2}", 4)
    assert not is_text("2) ->", 1) and not is_text("< 0", 3) and not is_text("/ 2", 7)


def test_a_change_is_told_by_its_line():
    changed = MODULE.replace("x < 0", "x <= 0")
    assert mutants.difference(MODULE, changed) == (3, "if x < 0:  ->  if x <= 0:")
    shorter = MODULE.replace("        x\n", "")
    assert mutants.difference(MODULE, shorter) == (6, "x  ->  ")
    with pytest.raises(ValueError, match="the same source twice"):
        mutants.difference(MODULE, MODULE)


def test_the_statement_of_a_line_is_its_own_and_not_its_body(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(MODULE)
    lines = [list(mutants.statement(path, line)) for line in (1, 3, 4, 7)]
    assert lines == [[1], [3], [4], [5, 6, 7, 8]]


def test_the_floors_and_their_tests_are_there():
    for file in mutants.FLOORS:
        assert (mutants.ROOT / mutants.LIBRARY / file).is_file()
    for name in mutants.TESTS:
        assert (mutants.ROOT / "tests" / name).is_file()


def test_what_is_set_apart_still_stands_in_the_library_and_has_a_reason():
    for name, reason in mutants.EQUIVALENT.items():
        file, _, change = name.partition(": ")
        before = change.split("  ->  ")[0]
        lines = (mutants.ROOT / mutants.LIBRARY / file).read_text().splitlines()
        assert before in [line.strip() for line in lines] and len(reason) > 20, name


def test_the_draw_depends_on_its_seed_and_changes_numbers_or_decisions_alone():
    pytest.importorskip("cosmic_ray", reason="the mutation tool is asked for by the group mutants")
    files = ("intervals.py", "classifiers/noised.py")
    once = mutants.drawn(20, 3, files)
    assert once == mutants.drawn(20, 3, files) and len(set(once)) == 20
    assert once != mutants.drawn(20, 4, files)
    for mutant in once:
        lines = (mutants.ROOT / mutants.LIBRARY / mutant.file).read_text().splitlines()
        assert mutant.change.startswith(lines[mutant.line - 1].strip())
        assert "<<" not in mutant.change and '"""' not in mutant.change
    with pytest.raises(ValueError, match="expected at most .* mutants, one a place, got 10000"):
        mutants.drawn(10_000, 0, files)


class Contexts:
    """What coverage.py has seen: which tests have run which line; "" stands for the import."""

    def __init__(self, contexts):
        self.contexts = contexts

    def contexts_by_lineno(self, path):
        return self.contexts


def test_a_mutant_meets_the_tests_that_reach_its_line_the_quickest_first(tmp_path):
    module = tmp_path / mutants.LIBRARY / "units.py"
    module.parent.mkdir(parents=True)
    module.write_text(MODULE)
    reached = object.__new__(mutants.Reached)
    reached.folder = tmp_path
    reached.seconds = {"slow": 3.0, "quick": 0.1, "other": 1.0}
    reached.contexts = Contexts(
        {1: [""], 3: ["slow|run", "quick|run", "other|run", "gone|run"], 6: ["", "slow|run"]}
    )

    def by(line):
        return reached.by(mutants.Mutant("units.py", "an operator", 0, line, "x  ->  y"))

    assert by(3) == ["quick", "other", "slow"]
    assert by(7) == ["slow"], "the whole statement counts"
    assert by(1) == ["quick", "other", "slow"], "a default runs on import: all tests of the module"
    assert by(4) == ["quick", "other", "slow"]


@pytest.mark.parametrize(
    "test, timeout, verdict, by",
    [
        ("half(6) == 3", 300, "killed", "tests/test_half.py::test_half"),
        ("half(0) == 0", 300, "survived", ""),
        ("half(6) == 3 or time.sleep(300)", 5, "killed", "time: 5 s"),
        ("half(6) == 3 or os._exit(7)", 300, "killed", "exit code 7: look at what happened"),
    ],
)
def test_what_the_tests_say_of_a_mutant(tmp_path, monkeypatch, test, timeout, verdict, by):
    """A division that becomes a product is noticed by a test that fails, or by one that does not end."""
    pytest.importorskip("cosmic_ray", reason="the mutation tool is asked for by the group mutants")
    source = "def half(x):\n    return x / 2\n"
    module = tmp_path / mutants.LIBRARY / "halves.py"
    module.parent.mkdir(parents=True)
    module.write_text(source)
    module.with_name("__init__.py").write_text("")
    checked = tmp_path / "tests" / "test_half.py"
    checked.parent.mkdir()
    checked.write_text(
        f"import os\nimport time\nfrom diffclass.halves import half\n\ndef test_half():\n    assert {test}\n"
    )
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "diffclass"]:
        monkeypatch.delitem(sys.modules, name)
    mutant = mutants.Mutant("halves.py", "core/ReplaceBinaryOperator_Div_Mul", 0, 2, "")
    result = mutants.tried(mutant, ["tests/test_half.py::test_half"], timeout)
    assert (result["verdict"], result["by"]) == (verdict, by)
    assert "-    return x / 2" in result["diff"] and "+    return x * 2" in result["diff"]
    assert module.read_text() == source
