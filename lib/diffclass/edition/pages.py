"""A notebook as a page, and all of them as one site: links that lead somewhere, and nothing that asks another host."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
from bs4 import BeautifulSoup
from jinja2 import Environment, FileSystemLoader
from nbconvert.exporters.html import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
from traitlets.config import Config

from diffclass.edition import chapters, formulas
from diffclass.storage import files

HERE = Path(__file__).resolve().parent
PACKAGES = ("nbconvert", "latex2mathml", "mistune", "pygments")  # what a page also depends on
FRONT = "15"  # the notebook whose figure the index shows
TEMPLATES = Environment(loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True)
FOOT = "Code: Apache-2.0. Text and figures: CC BY 4.0. Formulas are set in STIX Two Math (SIL Open Font License 1.1)."
CAPTION = (
    "As the figure stands when the notebook opens. There it is live: drag, choose, press play."
)
WIDGET = "application/vnd.jupyter.widget-view+json"
PLOT = "application/vnd.plotly.v1+json"
SCRIPT = "plotly.min.js"
LIVE = '<p class="live">Live in the notebook: <code>python3 -m lib lab</code></p>'
UNREAD = re.compile(r"\$[^$]+\$|\\[A-Za-z]{2,}")  # a formula that was taken for text
MARK = "@fingerprint@"  # where a page is given the fingerprint of what it was made from
LINK = re.compile(r"\]\(([^)\s]+)\)")
PLAIN = ("code", "pre", "script", "style", "math")


class _Renderer(IPythonRenderer):
    """Markdown to HTML, formulas to MathML."""

    def block_math(self, body: str) -> str:
        return f'<span class="formula" tabindex="0">{formulas.mathml(body, display=True)}</span>'

    def latex_environment(self, name: str, body: str) -> str:
        return self.block_math(f"\\begin{{{name}}}{body}\\end{{{name}}}")

    def inline_math(self, body: str) -> str:
        return formulas.mathml(body)


class _Exporter(HTMLExporter):
    """nbconvert's exporter with the edition's template and renderer."""

    def default_filters(self):
        yield from super().default_filters()
        yield "markdown2html", markdown


def markdown(text: str) -> str:
    """Markdown with formulas as HTML. Errors: FormulaError."""
    renderer = _Renderer(escape=False, exclude_anchor_links=True)
    return MarkdownWithMath(renderer=renderer).render(text)


@dataclass
class Linked:
    """What the pages of a site refer to, and has to be beside them: pictures, and files of the library."""

    pictures: set[Path] = field(default_factory=set)
    sources: set[Path] = field(default_factory=set)


@dataclass(frozen=True)
class Written:
    """What became of one page: written, kept as nothing changed, or failed and why."""

    name: str
    kept: bool = False
    problem: Exception | None = None


# ---------------------------------------------------------------------------------------------------------------------
# One page


def cells(notebook: dict, name: str) -> str:
    """The cells of a notebook as HTML.

    Errors      FormulaError that names the notebook and the cell
    """
    for i, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "markdown":
            try:
                markdown(chapters.source(cell))
            except formulas.FormulaError as error:
                raise formulas.FormulaError(f"{name}, cell {i}: {error}") from None
    config = Config(
        NbConvertBase=dict(
            display_data_priority=[
                "text/html",
                "text/markdown",
                "image/svg+xml",
                "image/png",
                "image/jpeg",
                "text/plain",
            ]
        )
    )
    read = nbformat.reads(json.dumps(notebook), as_version=4)
    outputs = [output for cell in read.cells for output in cell.get("outputs", [])]
    for i, output in enumerate(outputs):
        data = output.get("data", {})
        if WIDGET in data:
            output.data = {"text/html": LIVE}
        elif PLOT in data:
            output.data = {"text/html": _plot(data[PLOT], f"plot-{i}")}
    exporter = _Exporter(template_file=str(HERE / "cells.html.j2"), config=config)
    body, _ = exporter.from_notebook_node(read)
    return body


def _plot(figure: dict, name: str) -> str:
    """A plotly figure that can be touched, as HTML that needs `SCRIPT` beside its page."""
    from plotly import io

    return io.to_html(figure, include_plotlyjs=False, full_html=False, validate=False, div_id=name)


def prepared(body: str, path: Path, linked: Linked) -> BeautifulSoup:
    """A page's HTML with links that hold in the site, names for its headings, and the live figures as pictures.

    Errors      ValueError that names the file, for a link that leads nowhere and a formula that was taken for text
    """
    soup = BeautifulSoup(body, "html.parser")
    for text in soup.find_all(string=UNREAD):
        if not text.find_parent(PLAIN):
            what = text.strip()[:80]
            raise ValueError(
                f"{path.name}: expected no formula in plain text or HTML, got {what!r}."
            )
    for tag in soup.find_all("a", href=True):
        tag["href"] = _target(tag["href"], path, linked)
    for tag in soup.find_all("img", src=True):
        tag["src"] = _target(tag["src"], path, linked)
    _name_headings(soup)
    for details in soup.find_all("details"):
        if details.find("img", src=re.compile("_hero")):
            _unfold(soup, details, linked)
    heading = ""
    for tag in soup.find_all(["h1", "h2", "h3", "img"]):
        if tag.name == "img":
            tag["alt"] = tag.get("alt") or f"Drawn by the code above, in the section: {heading}"
        else:
            heading = tag.get_text()
    for table in soup.find_all("table"):
        table.wrap(soup.new_tag("div", attrs={"class": "table", "tabindex": "0"}))
    for pre in soup.find_all("pre"):
        pre["tabindex"] = "0"  # what scrolls sideways is reached by keys
    return soup


def _target(href: str, page: Path, linked: Linked) -> str:
    """Where a link of a file of the repository leads in the site."""
    parts = urlsplit(href)
    if parts.scheme or not parts.path:
        return href
    path = (page.parent / parts.path).resolve()
    mark = f"#{parts.fragment}" if parts.fragment else ""
    extras = [chapters.NOTEBOOKS / name for name, _, _ in chapters.EXTRAS]
    if path == chapters.ROOT / "README.md":
        return f"index.html{mark}"
    if path.exists() and (path.suffix == ".ipynb" or path in extras):
        return f"{path.stem}.html{mark}"
    if path.exists() and path.suffix == ".py" and chapters.LIBRARY in path.parents:
        linked.sources.add(path)
        return f"{_page_of(path)}{mark}"
    if path.exists() and path.suffix == ".png":
        linked.pictures.add(path)
        return f"pictures/{path.name}"
    raise ValueError(
        f"{page.name}: expected a link to a notebook, a picture or a file of the library, got {href!r}."
    )


def _page_of(path: Path) -> str:
    """The page of a file of the library."""
    return path.relative_to(chapters.LIBRARY).with_suffix(".html").as_posix()


def _name_headings(soup: BeautifulSoup) -> None:
    """Give every heading the name that JupyterLab links to it by."""
    taken = set()
    for tag in soup.find_all(re.compile("^h[1-6]$")):
        name = tag.get_text().strip().replace(" ", "-")
        number = 2
        while name in taken:
            name = f"{tag.get_text().strip().replace(' ', '-')}-{number}"
            number += 1
        taken.add(name)
        tag["id"] = name


def _unfold(soup: BeautifulSoup, details, linked: Linked) -> None:
    """The picture of a live figure, which notebooks fold away, as a figure; where there is one, as a film of it.

    Why         a reader who asked the system for less motion sees the picture
    """
    picture = details.find("img").extract()
    film = chapters.ROOT / "assets" / Path(picture["src"]).name.replace("_hero.png", "_film.webp")
    if film.exists():
        linked.pictures.add(film)
        moving = soup.new_tag("picture")
        where = {
            "srcset": f"pictures/{film.name}",
            "type": "image/webp",
            "media": "(prefers-reduced-motion: no-preference)",
        }
        moving.extend([soup.new_tag("source", attrs=where), picture])
        picture = moving
    figure = soup.new_tag("figure")
    caption = soup.new_tag("figcaption")
    caption.string = CAPTION
    figure.extend([picture, caption])
    details.replace_with(figure)


def _contents(soup: BeautifulSoup) -> list[dict]:
    """The headings of a page below its title, as its template lists them."""
    found = []
    for tag in soup.find_all(["h2", "h3"]):
        words = "".join(map(str, tag.contents))
        found.append(dict(level=tag.name[1], id=tag["id"], words=words))
    return found


def notebook_page(
    notebook: dict, chapter: chapters.Chapter, listed: Sequence[chapters.Chapter], linked: Linked
) -> str:
    """A notebook's page, with its question and its facts below its title.

    Errors      ValueError that names the notebook, and for a formula the cell
    """
    body = cells(notebook, chapter.path.name)
    soup = prepared(body, chapter.path, linked)
    names = _names(listed)
    facts = TEMPLATES.from_string(
        '<p class="question">{{ chapter.question }}</p>\n'
        '<p class="facts">{{ chapter.minutes }} min to read'
        '{% for need in chapter.needs if need in names %}{{ " · after " if loop.first else ", " }}'
        '<a href="{{ names[need] }}.html">{{ need }}</a>{% endfor %}</p>'
    ).render(chapter=chapter, names=names)
    title = soup.find("h1")
    title.insert_after(BeautifulSoup(facts, "html.parser"))
    before = {b: a for a, b in pairwise(listed)}.get(chapter)
    after = dict(pairwise(listed)).get(chapter)
    return _page(
        title=f"{chapter.number} · {chapter.title}",
        body=str(soup),
        contents=_contents(soup),
        before=before,
        after=after,
    )


def script_for(body: str) -> str:
    """The script that a page needs: plotly's, where it has a figure of it, and else none."""
    return SCRIPT if "plotly-graph-div" in body else ""


def _names(listed: Sequence[chapters.Chapter]) -> dict[str, str]:
    """Numbers of chapters to names of their pages."""
    return {one.number: one.name for one in listed}


def _page(up: str = "", contents=(), before=None, after=None, **parts) -> str:
    return TEMPLATES.get_template("page.html.j2").render(
        script=script_for(parts["body"]),
        up=up,
        contents=contents,
        before=before,
        after=after,
        foot=FOOT,
        fingerprint=MARK,
        **parts,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The site


def fingerprint(*parts: bytes) -> str:
    """What a page depends on: the parts, the edition's own files, and the packages that convert."""
    own = [path.read_bytes() for path in sorted(HERE.iterdir()) if path.suffix in (".py", ".j2")]
    versions = [metadata.version(name).encode() for name in PACKAGES]
    return hashlib.sha256(b"\0".join([*parts, *own, *versions])).hexdigest()


def _is_kept(path: Path, mark: str) -> bool:
    if not path.exists():
        return False
    return f'name="fingerprint" content="{mark}"' in path.read_text(encoding="utf-8")[:1000]


def build(
    folder: Path,
    execute: Callable[[chapters.Chapter], dict] | None = None,
    listed: Sequence[chapters.Chapter] | None = None,
) -> Iterator[Written]:
    """Write the site, page by page: pages of notebooks that did not change are kept.

    `execute` makes of a chapter its notebook with outputs; without it notebooks are shown as they are stored.

    Writes      index.html, a page for every notebook and every text beside them, edition.css, fonts/, pictures/, and the
                files of the library that pages link to; nothing is deleted
    Errors      OSError for a folder that cannot be written. A notebook that fails is yielded with its problem, and the
                others go on
    """
    listed = chapters.chapters() if listed is None else listed
    linked = Linked()
    put_style(folder)
    around = "".join(f"{one.short}{one.question}{one.minutes}" for one in listed).encode()
    for chapter in listed:
        path = folder / f"{chapter.name}.html"
        parts = [chapter.path.read_bytes(), around]
        if execute is not None:
            parts += [file.read_bytes() for file in sorted(chapters.LIBRARY.rglob("*.py"))]
        mark = fingerprint(*parts)
        if _is_kept(path, mark):
            _note_links(chapter, linked)
            put_pictures(folder, linked.pictures)
            yield Written(chapter.name, kept=True)
            continue
        try:
            notebook = chapters.read(chapter.path) if execute is None else execute(chapter)
            page = notebook_page(notebook, chapter, listed, linked)
        except ValueError as error:
            yield Written(chapter.name, problem=error)
            continue
        put_pictures(folder, linked.pictures)
        if script_for(page):
            put_script(folder)
        put(path, page, mark)
        yield Written(chapter.name)
    for name, title, _ in chapters.EXTRAS:
        source = chapters.NOTEBOOKS / name
        soup = prepared(markdown(source.read_text(encoding="utf-8")), source, linked)
        page = _page(title=title, body=str(soup), contents=_contents(soup))
        put_pictures(folder, linked.pictures)
        put(folder / f"{source.stem}.html", page)
        yield Written(source.stem)
    _write_front(folder, listed, linked)
    yield Written("index")


def _note_links(chapter: chapters.Chapter, linked: Linked) -> None:
    """What a page that was kept refers to."""
    for cell in chapters.read(chapter.path)["cells"]:
        if cell["cell_type"] == "markdown":
            for href in LINK.findall(chapters.source(cell)):
                _target(href, chapter.path, linked)


def put(path: Path, page: str, mark: str = "") -> None:
    """Write a page, with the fingerprint of what it was made from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, page.replace(MARK, mark, 1))


def _write_front(folder: Path, listed: Sequence[chapters.Chapter], linked: Linked) -> None:
    """The index, and what the pages refer to."""
    front = [chapters.ROOT / "assets" / f"{FRONT}{end}" for end in ("_hero.png", "_film.webp")]
    body = TEMPLATES.get_template("index.html.j2").render(
        chapters=listed,
        names=_names(listed),
        total=chapters.hours(sum(one.minutes for one in listed)),
        picture=f"pictures/{front[0].name}",
        film=f"pictures/{front[1].name}",
        extras=[(Path(name).stem, title, words) for name, title, words in chapters.EXTRAS],
    )
    put(folder / "index.html", _page(title="Map", body=body))
    for path in sorted(linked.sources):
        mark = fingerprint(path.read_bytes())
        if not _is_kept(folder / _page_of(path), mark):
            put(folder / _page_of(path), _source_page(path), mark)
    put_pictures(folder, set(front))


def put_style(folder: Path) -> None:
    """Write what every page needs, before the first page: a site that is stopped half-way can be read."""
    _copy(HERE / "edition.css", folder / "edition.css")
    _copy(formulas.font(), folder / "fonts" / formulas.FONT)


def put_script(folder: Path) -> None:
    """Write plotly's script. Its figures are drawn by it, here as in the notebooks."""
    from plotly import offline

    files.write(folder / SCRIPT, offline.get_plotlyjs())


def put_pictures(folder: Path, pictures: set[Path]) -> None:
    """Write the pictures that pages show."""
    for path in sorted(pictures):
        _copy(path, folder / "pictures" / path.name)


def _copy(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    files.write(target, path.read_bytes())


def _source_page(path: Path) -> str:
    """A file of the library to read."""
    name = path.relative_to(chapters.LIBRARY).as_posix()
    code = highlight(path.read_text(encoding="utf-8"), PythonLexer(), HtmlFormatter())
    body = f"<h1>{name}</h1>" + code.replace("<pre>", '<pre tabindex="0">', 1)
    return _page(up="../" * name.count("/"), title=name, body=body)
