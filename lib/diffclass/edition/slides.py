"""A notebook as slides: one for every piece of text with the code and the figures that follow it."""

from pathlib import Path

from bs4 import BeautifulSoup

from diffclass.edition import chapters, pages


def slides(notebook: dict, chapter: chapters.Chapter, linked: pages.Linked) -> str:
    """The page of slides: each begins with a heading or a cell of text, and its code is folded.

    Errors      those of `pages.notebook_page`
    """
    soup = pages.prepared(pages.cells(notebook, chapter.path.name), chapter.path, linked)
    shown = []
    for block in soup.find_all("div", attrs={"data-cell": True}):
        if "onward" in block["class"]:
            continue
        if "code" in block["class"] and shown:
            _fold_code(soup, block)
            shown[-1] += str(block)
        else:
            shown += _cut(block)
    return pages.TEMPLATES.get_template("slides.html.j2").render(
        title=f"{chapter.number} · {chapter.title}",
        short=chapter.short,
        slides=shown,
        script=pages.script_for("".join(shown)),
    )


def _cut(block) -> list[str]:
    """A cell of text, cut before each of its headings but the first thing in it."""
    parts = [""]
    for child in block.children:
        if child.name in ("h1", "h2", "h3") and parts[-1].strip():
            parts.append("")
        parts[-1] += str(child)
    return [f'<div class="prose">{part}</div>' for part in parts if part.strip()]


def _fold_code(soup: BeautifulSoup, block) -> None:
    """Fold the code of a cell away; what it drew stays in sight."""
    for code in block.find_all("div", class_="highlight"):
        details = soup.new_tag("details")
        summary = soup.new_tag("summary")
        summary.string = "code"
        code.wrap(details)
        details.insert(0, summary)


def write(notebook: dict, chapter: chapters.Chapter, folder: Path) -> Path:
    """Write a notebook's slides and what they show into a folder.

    Writes      NAME_slides.html, edition.css, fonts/ and pictures/
    """
    linked = pages.Linked()
    page = slides(notebook, chapter, linked)
    path = folder / f"{chapter.name}_slides.html"
    pages.put(path, page)
    pages.put_style(folder)
    if pages.script_for(page):
        pages.put_script(folder)
    pages.put_pictures(folder, linked.pictures)
    return path
