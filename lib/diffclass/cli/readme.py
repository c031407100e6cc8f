"""The command that keeps the README, the package's docstring and the notebooks' links in step with the code: readme."""

import ast
import re
import tomllib
from pathlib import Path

import typer

from diffclass.cli.base import EXIT_CODES, OK, PROBLEM, ROOT, Json, app

PACKAGE = ROOT / "lib" / "diffclass"
BLOCK = r"(<!-- {name} -->\n).*?(<!-- end -->)"
TITLE_LINES = 2  # a table's head and its rule
TABLES = (  # world, norm, and the budget where it is not the world's
    ("digits", "linf", None),
    ("digits", "l2", 0.25),
    ("digits", "l2", 0.5),
    ("digits", "l2", None),
    ("cifar10", "linf", None),
)
THREATS = ("digits", "cifar10")
CERTIFIED = ("digits", "cifar10", "hundred")
SIGMAS = ("digits",)
PLAN = r"(Rooms, bottom to top:\n\n).*?(\n\"\"\")"


def rooms() -> list[tuple[str, str]]:
    """Every room of the library and its sentence, bottom to top.

    Source      the layers that import-linter holds, in pyproject.toml; the first line of each room's docstring
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = next(
        contract["layers"]
        for contract in project["tool"]["importlinter"]["contracts"]
        if contract["type"] == "layers"
    )
    names = [name.strip() for layer in reversed(layers) for name in layer.split("|")]
    return [(name, _sentence(name)) for name in names if not name.startswith("__")]


def _sentence(room: str) -> str:
    package = PACKAGE / room / "__init__.py"
    path = package if package.exists() else PACKAGE / f"{room}.py"
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    return docstring.splitlines()[0]


def floor_plan() -> str:
    """The rooms and the classifiers as the package's docstring shows them."""
    from diffclass.zoo.classifiers import ENTRIES

    lines = [f"    {room:12} {sentence}" for room, sentence in rooms()]
    lines += ["", "Classifiers, by the names of the registry:", ""]
    lines += [f"    {entry.name:15} {entry.sentence}" for entry in ENTRIES.values()]
    return "\n".join(lines)


def room_table() -> str:
    """The rooms as a table of the README."""
    lines = ["| Room | What is in it |", "|---|---|"]
    for room, sentence in rooms():
        escaped = sentence.replace("|", "\\|")
        lines.append(f"| `{room}` | {escaped} |")
    return "\n".join(lines)


def classifier_table(entries: dict) -> str:
    """The classifiers of a registry as a table of the README."""
    lines = ["| Name | Classifier | Source |", "|---|---|---|"]
    for entry in entries.values():
        lines.append(f"| `{entry.name}` | {entry.sentence} | {entry.source} |")
    return "\n".join(lines)


def refreshed(text: str, name: str, content: str) -> str:
    """A text with the block between `<!-- name -->` and `<!-- end -->` replaced.

    Errors      ValueError for a text without the block
    """
    pattern = re.compile(BLOCK.format(name=re.escape(name)), re.S)
    if not pattern.search(text):
        raise ValueError(f"expected a block '<!-- {name} -->' with its '<!-- end -->', got none.")
    return pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text)


def written() -> dict[Path, str]:
    """The files that are partly generated, as they should be."""
    from diffclass.edition import chapters
    from diffclass.evaluation import tables
    from diffclass.zoo import classifiers, noised

    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    listed = chapters.chapters()
    text = refreshed(text, "map", chapters.map_table(listed))
    text = refreshed(text, "rooms", room_table())
    text = refreshed(text, "classifiers", classifier_table(classifiers.ENTRIES))
    text = refreshed(text, "noised", classifier_table(noised.ENTRIES))
    for world in CERTIFIED:
        text = refreshed(text, f"{world} certified", _filled(tables.certified_table(world), world))
    for world in SIGMAS:
        text = refreshed(text, f"{world} sigmas", _filled(tables.sigmas_table(world), world))
    for world, norm, epsilon in TABLES:
        name = f"{world} {norm}" if epsilon is None else f"{world} {norm} {epsilon:g}"
        text = refreshed(text, name, _filled(tables.robust_table(world, norm, epsilon), name))
    for world in THREATS:
        name = f"{world} threats"
        text = refreshed(text, name, _filled(tables.threats_table(world), name))
    package = PACKAGE / "__init__.py"
    docstring = re.sub(
        PLAN,
        lambda match: f"{match[1]}{floor_plan()}{match[2]}",
        package.read_text(encoding="utf-8"),
        flags=re.S,
    )
    closed = {chapter.path: chapters.with_closing(chapter, listed) for chapter in listed}
    return {readme: text, package: docstring, **closed}


def _filled(table: list[str], name: str) -> str:
    """The lines of a table that has a row. Errors: ValueError for one without."""
    if len(table) <= TITLE_LINES:
        raise ValueError(
            f"expected records of {name} for the README's table, got none; is DIFFCLASS_ASSETS set to another folder?"
        )
    return "\n".join(table)


@app.command(epilog=EXIT_CODES)
def readme(ctx: typer.Context, check: bool = False, json_wanted: Json = False):
    """Write the generated parts anew: README.md (map, rooms, classifiers, results) and the notebooks' last cells.

    --check only says whether they differ.
    """
    from diffclass.storage import files

    answer = ctx.obj
    stale = [path for path, text in written().items() if text != path.read_text(encoding="utf-8")]
    names = [str(path.relative_to(ROOT)) for path in stale]
    answer.content |= dict(command="readme", differ=names)
    if not check:
        for path in stale:
            files.write(path, written()[path])
    verb = "differs from the code" if check else "written"
    for name in names:
        answer.say(f"{name}: {verb}")
    if not names:
        answer.say(
            "README.md, the package's docstring and the notebooks' links say what the code says."
        )
    raise typer.Exit(PROBLEM if check and names else OK)
