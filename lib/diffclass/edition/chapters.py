"""The notebooks in their order: what each asks, what it needs, how long it takes, and what comes before and after."""

import ast
import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
NOTEBOOKS = ROOT / "notebooks"
LIBRARY = ROOT / "lib"
# Pages beside the notebooks, in the order of the edition: file, title, and what one finds there.
EXTRAS = (
    ("glossary.md", "Glossary", "Names and abbreviations, one plain sentence each."),
    ("teaching.md", "Teaching", "A plan for 90 minutes, one for a semester, and what to watch."),
)
MAP = "../README.md#what-is-in-it"  # as seen from a notebook
CLOSING = "onward"  # the id of the cell with the links, the last of every notebook
# Prose with formulas is read at half the speed of a novel, and code line by line. By these two numbers most notebooks
# take what those who have read them with a watch put under "Runtime".
WORDS_A_MINUTE = 100
LINES_A_MINUTE = 15
ROUNDED = 5  # minutes
CODE_BLOCK = re.compile(r"```.*?```", re.S)
TITLE = re.compile(r"^# (?:\d\d[a-z]? · )?(.+)$", re.M)
NEEDS = re.compile(r"^\*\*You need\*\*(.+)$", re.M)
NUMBERS = re.compile(r"\b(\d\d[a-z]?)(?: to (\d\d[a-z]?))?\b")


@dataclass(frozen=True)
class Chapter:
    """One notebook: its file, its number as in the file's name, its title, its question, and what it asks of a reader."""

    path: Path
    number: str
    title: str
    question: str
    needs: tuple[str, ...]
    words: int
    lines: int

    @property
    def name(self) -> str:
        """The file's name without its ending, such as 02_elbo."""
        return self.path.stem

    @property
    def short(self) -> str:
        """The number and the title up to its colon, for links."""
        return f"{self.number} · {self.title.partition(':')[0]}"

    @property
    def minutes(self) -> int:
        """How long it takes to read.

        Formula     words / 100 + lines of code / 15, in minutes, rounded up to five
        """
        exact = self.words / WORDS_A_MINUTE + self.lines / LINES_A_MINUTE
        return ROUNDED * math.ceil(exact / ROUNDED)


def read(path: Path) -> dict:
    """A notebook as it is stored. Errors: ValueError that names it for a file that is none."""
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name}: expected a notebook, got no JSON ({error}).") from None
    if not isinstance(notebook, dict) or not isinstance(notebook.get("cells"), list):
        raise ValueError(f"{path.name}: expected a notebook with cells, got other JSON.")
    return notebook


def source(cell: Mapping) -> str:
    """The text of a cell: files hold it as lines or as one string."""
    return "".join(cell["source"])


@functools.cache
def _chapter(path: Path, _changed: int) -> Chapter:
    notebook = read(path)
    kept = [cell for cell in notebook["cells"] if cell.get("id") != CLOSING]
    prose = [source(cell) for cell in kept if cell["cell_type"] == "markdown"]
    code = [source(cell) for cell in kept if cell["cell_type"] == "code"]
    text = CODE_BLOCK.sub("", "\n".join(prose))
    title = TITLE.search(text)
    question = notebook["metadata"].get("diffclass", {}).get("question")
    if not title or not question:
        missing = "question in its metadata (diffclass.question)" if title else "title"
        raise ValueError(
            f"{path.name}: expected a notebook of the course, got one without {missing}."
        )
    needs = NEEDS.search(text)
    number = path.stem.partition("_")[0]
    numbers = NUMBERS.findall(needs[1]) if needs else []
    return Chapter(
        path=path,
        number=number,
        title=title[1].strip(),
        question=question,
        needs=tuple(_spread(numbers)),
        words=len(text.split()),
        lines=sum(bool(line.strip()) for cell in code for line in cell.splitlines()),
    )


def _spread(numbers: Sequence[tuple[str, str]]) -> list[str]:
    """Numbers and ranges of numbers, one by one: ("01", "03") is 01, 02, 03."""
    found = []
    for first, last in numbers:
        found += [f"{n:02}" for n in range(int(first), int(last) + 1)] if last else [first]
    return sorted(set(found))


def chapters(folder: Path = NOTEBOOKS) -> list[Chapter]:
    """Every notebook of a folder in its order.

    Errors      ValueError for a folder without any, and for one without title or question; it names the file
    """
    paths = sorted(folder.glob("[0-9][0-9]*_*.ipynb"))
    if not paths:
        raise ValueError(f"expected notebooks in {folder}, got none.")
    return [_chapter(path, path.stat().st_mtime_ns) for path in paths]


def find(name: str, listed: Sequence[Chapter]) -> Chapter:
    """The chapter of a number, a name or a file's name. Errors: ValueError with those there are."""
    wanted = Path(name).name.removesuffix(".ipynb")
    for chapter in listed:
        if wanted in (chapter.number, chapter.name):
            return chapter
    numbers = ", ".join(chapter.number for chapter in listed)
    raise ValueError(
        f"expected a notebook by its number or name, got {name!r}; there are {numbers}."
    )


def hours(minutes: int) -> str:
    """Minutes as people say them: 45 min, 1 h 15 min."""
    whole, rest = divmod(minutes, 60)
    parts = [f"{whole} h"] * bool(whole) + [f"{rest} min"] * (bool(rest) or not whole)
    return " ".join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# What is written into the README and into the notebooks


def map_table(listed: Sequence[Chapter]) -> str:
    """The map of the course as a table of the README."""
    lines = ["| Notebook | Question | To read | After |", "|---|---|---|---|"]
    for chapter in listed:
        link = f"[{chapter.short}](notebooks/{chapter.path.name})"
        needs = ", ".join(chapter.needs) or "–"
        lines.append(f"| {link} | {chapter.question} | {chapter.minutes} min | {needs} |")
    total = sum(chapter.minutes for chapter in listed)
    lines.append(f"| | All of it | {hours(total)} | |")
    return "\n".join(lines)


def modules(notebook: Mapping) -> list[Path]:
    """The files of the library that a notebook imports from, without those of the room `course`."""
    found = []
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        code = "\n".join("" if line.startswith("%") else line for line in source(cell).splitlines())
        syntax = compile(code, "cell", "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        for node in ast.walk(syntax):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diffclass"):
                for alias in node.names:
                    found.append(_file(f"{node.module}.{alias.name}") or _file(node.module))
    course = LIBRARY / "diffclass" / "course"
    kept = {path for path in found if path and course not in path.parents}
    return sorted(kept)


def _file(dotted: str) -> Path | None:
    """The file of a module or package of the library, if the name is that of one."""
    base = LIBRARY.joinpath(*dotted.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.exists():
            return path
    return None


def _spoken(path: Path) -> str:
    """A file of the library as one says its module: denoisers.exact, data."""
    parts = path.relative_to(LIBRARY / "diffclass").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def closing(chapter: Chapter, listed: Sequence[Chapter]) -> str:
    """The last cell of a notebook: what comes before and after, the map, and the library's files behind the page."""
    around = {after: before for before, after in pairwise(listed)}
    following = {before: after for before, after in pairwise(listed)}
    links = []
    if chapter in around:
        links.append(f"← [{around[chapter].short}]({around[chapter].path.name})")
    links += [f"[Map of the course]({MAP})", "[Glossary](glossary.md)"]
    if chapter in following:
        links.append(f"[{following[chapter].short}]({following[chapter].path.name}) →")
    lines = ["---", "", " | ".join(links)]
    files = [
        f"[`{_spoken(path)}`](../lib/{path.relative_to(LIBRARY).as_posix()})"
        for path in modules(read(chapter.path))
    ]
    if files:
        lines += ["", f"The library's files behind this page: {', '.join(files)}"]
    return "\n".join(lines)


def with_closing(chapter: Chapter, listed: Sequence[Chapter]) -> str:
    """The notebook's file with its last cell written anew, or added; everything else as it is."""
    notebook = read(chapter.path)
    cells = [cell for cell in notebook["cells"] if cell.get("id") != CLOSING]
    text = closing(chapter, listed)
    cell = dict(
        cell_type="markdown", id=CLOSING, metadata={}, source=text.splitlines(keepends=True)
    )
    notebook["cells"] = [*cells, cell]
    return json.dumps(notebook, ensure_ascii=False, indent=1) + "\n"
