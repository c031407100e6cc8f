"""The edition to read: every formula is drawn, every link leads somewhere, nobody is asked, and what did not change is kept."""

import json
import re
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup
from diffclass import __version__, cli
from diffclass.edition import chapters, formulas, pages, running, slides
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]
LISTED = chapters.chapters()
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.S)
FORMULA = re.compile(r"\$\$.+?\$\$|\$[^$\n]+?\$|\\begin\{(\w+\*?)\}.*?\\end\{\1\}", re.S)
LOADED = (
    "script",
    "img",
    "iframe",
    "source",
    "video",
    "audio",
    "embed",
)  # what a browser fetches by src
SITE = ("06b", "14")  # two short notebooks, built for real


def prose(path: Path) -> list[str]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]


# ---------------------------------------------------------------------------------------------------------------------
# Formulas


@pytest.mark.parametrize("chapter", LISTED, ids=lambda chapter: chapter.number)
def test_every_formula_of_every_notebook_is_drawn(chapter):
    """The number of formulas is counted by another expression than the one that finds them."""
    for text in prose(chapter.path):
        wanted = len(FORMULA.findall(CODE.sub("", text)))
        assert pages.markdown(text).count("<math ") == wanted, text


def test_a_page_has_a_formula_to_draw_at_all():
    assert sum(len(FORMULA.findall(CODE.sub("", text))) for text in prose(LISTED[2].path)) > 100


@pytest.mark.parametrize(
    "latex", [r"\frac{a}", r"\unknown x", r"a_", r"\begin{pmatrix} a", r"\mathbb 7"]
)
def test_a_formula_that_cannot_be_drawn_is_an_error(latex):
    with pytest.raises(formulas.FormulaError, match="expected a"):
        formulas.mathml(latex)


def symbols(latex: str, display: bool = False) -> list[tuple[str, str]]:
    soup = BeautifulSoup(formulas.mathml(latex, display), "html.parser")
    return [(tag.name, tag.get_text()) for tag in soup.find_all(["mi", "mo", "mn"])]


@pytest.mark.parametrize(
    "latex, symbol",
    [
        (r"\mathcal N(0,I)", ("mi", "𝒩")),
        (r"\mathbb E[x]", ("mi", "𝔼")),
        (r"\mathbb 1[x]", ("mn", "𝟙")),
        (r"\varepsilon\sim N", ("mo", "∼")),
        (r"\sigma\to\infty", ("mi", "∞")),
        (r"\Big\|x\Big\|^2", ("mo", "‖")),
        (r"\big\{x\big\}", ("mo", "{")),
        (r"\arg\max_k p", ("mo", "arg")),
        (r"\tilde\beta", ("mo", "~")),
    ],
)
def test_a_symbol_is_the_one_that_was_meant(latex, symbol):
    assert symbol in symbols(latex)


def test_symbols_are_set_as_tex_sets_them():
    drawn = {
        latex: BeautifulSoup(formulas.mathml(latex, True), "html.parser")
        for latex in (r"\min_k x", r"x=-1", r"a/b", r"\log p", r"\log(p)", r"\Big(x\Big)^2")
    }
    assert drawn[r"\min_k x"].find("munder").find("mo")["movablelimits"] == "true"
    minus = drawn[r"x=-1"].find_all("mo")[1]
    assert minus["form"] == "prefix"
    assert drawn[r"a/b"].find("mo")["lspace"] == "0em"
    assert drawn[r"\log p"].find("mspace") and not drawn[r"\log(p)"].find("mspace")
    assert drawn[r"\Big(x\Big)^2"].find("msup").find("mrow").find("mo")["minsize"]


def test_the_font_of_formulas_is_at_hand():
    assert formulas.font().read_bytes()[:4] == b"\0\1\0\0"  # TrueType


# ---------------------------------------------------------------------------------------------------------------------
# The site


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A site of two real notebooks, and slides of one."""
    folder = tmp_path_factory.mktemp("site")
    listed = [chapters.find(number, LISTED) for number in SITE]
    written = list(pages.build(folder, listed=listed))
    assert [page.problem for page in written] == [None] * len(written)
    slides.write(chapters.read(listed[0].path), listed[0], folder)
    return folder


@pytest.fixture(scope="module")
def parsed(site):
    """Every page of the site."""
    found = sorted(site.rglob("*.html"))
    assert len(found) > 8
    return {path: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for path in found}


def test_no_link_of_the_site_is_dead(site, parsed):
    """Pages of the notebooks that this small site leaves out count as there."""
    elsewhere = {(site / f"{chapter.name}.html") for chapter in LISTED}
    dead = []
    for page, soup in parsed.items():
        for tag in soup.find_all(True):
            link = tag.get("href") or tag.get("src") or ""
            name, _, mark = link.partition("#")
            if not link or re.match(r"https?:|data:", link):
                continue
            target = (page.parent / name).resolve() if name else page
            if not target.exists() and target not in elsewhere:
                dead.append((page.name, link))
            if mark and target in parsed and not parsed[target].find(id=unquote(mark)):
                dead.append((page.name, link))
    assert not dead


def fetched(soup: BeautifulSoup) -> list[str]:
    """What a browser loads by itself when it opens a page."""
    loaded = [tag.get("src", "") for tag in soup.find_all(LOADED)]
    loaded += [tag.get("href", "") for tag in soup.find_all("link")]
    loaded += re.findall(r"url\(([^)]*)\)|@import", str(soup.find_all("style")))
    return loaded


def test_a_page_asks_no_other_host(site, parsed):
    for page, soup in parsed.items():
        assert not [link for link in fetched(soup) if re.match(r"(https?:)?//", link)], page
        assert not soup.find_all("script", src=True)
    style = (site / "edition.css").read_text(encoding="utf-8")
    assert "://" not in style and "@import" not in style
    assert (site / re.search(r'url\("([^"]+)"\)', style)[1]).exists()
    planted = BeautifulSoup('<img src="https://example.org/a.png">', "html.parser")
    assert fetched(planted) == ["https://example.org/a.png"]


def test_a_page_has_its_question_its_figure_and_its_folded_hints(site, parsed):
    chapter = chapters.find("06b", LISTED)
    soup = parsed[site / f"{chapter.name}.html"]
    assert soup.find(class_="question").get_text() == chapter.question
    assert f"{chapter.minutes} min" in soup.find(class_="facts").get_text()
    figure = soup.find("figure")
    assert (
        figure.find("img")["src"] == "pictures/06b_hero.png" and len(figure.find("img")["alt"]) > 40
    )
    film = figure.find("source")
    assert film["srcset"] == "pictures/06b_film.webp" and (site / film["srcset"]).exists()
    assert "prefers-reduced-motion" in film["media"]
    assert "Hint" in [summary.get_text() for summary in soup.find_all("summary")]
    assert len(soup.find_all("h1")) == 1 and soup.find("html")["lang"] == "en"
    marks = [tag["id"] for tag in soup.find_all(id=True)]
    assert len(marks) == len(set(marks))
    listed = [link["href"][1:] for link in soup.select(".contents.wide a")]
    assert listed == [tag["id"] for tag in soup.find_all(["h2", "h3"])]


def test_slides_fold_the_code_and_leave_the_links_out(site, parsed):
    soup = parsed[site / "06b_one_call_slides.html"]
    sections = soup.find_all("section")
    assert len(sections) > 10 and not soup.find(class_="onward")
    assert all(code.find_parent("details") for code in soup.select(".code .highlight"))
    assert soup.select(".code .highlight") and sections[0].find("h1")


# ---------------------------------------------------------------------------------------------------------------------
# Small notebooks of our own


def make(folder: Path, name: str, *cells: str, question: str = "Why?") -> Path:
    """A notebook whose cells are text, or code where they begin with >."""
    made = [
        nbformat.v4.new_code_cell(cell[1:])
        if cell[0] == ">"
        else nbformat.v4.new_markdown_cell(cell)
        for cell in cells
    ]
    notebook = nbformat.v4.new_notebook(
        cells=made, metadata=dict(diffclass=dict(question=question))
    )
    nbformat.write(notebook, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


@pytest.fixture
def small(tmp_path):
    """Three notebooks and the folder of their site."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    make(folder, "00_first", "# First: a title\n\n**You need** nothing", ">print(6 * 7)")
    make(folder, "01_second", "# 01 · Second\n\n**You need** notebook 00", "$a<b$", ">1 / 0")
    make(folder, "02_third", "# 02 · Third\n\n**You need** notebooks 00 to 01", ">x = 1\n\ny = 2")
    return folder


def results(small: Path, execute=None) -> dict[str, str]:
    written = pages.build(small.parent / "site", execute, chapters.chapters(small))
    return {
        page.name: "kept" if page.kept else str(page.problem) if page.problem else "written"
        for page in written
    }


def test_a_chapter_is_what_its_notebook_says(small):
    first, second, third = chapters.chapters(small)
    assert (first.short, second.short, third.needs) == ("00 · First", "01 · Second", ("00", "01"))
    assert third.lines == 2 and third.words == 10
    assert (
        chapters.find("02", [first, third]) is third is chapters.find("x/02_third.ipynb", [third])
    )
    with pytest.raises(ValueError, match="there are 00, 02"):
        chapters.find("01", [first, third])


@pytest.mark.parametrize(
    "words, lines, minutes", [(0, 1, 5), (500, 0, 5), (501, 0, 10), (500, 76, 15)]
)
def test_reading_times(small, words, lines, minutes):
    path = make(small, "03_long", "# Title " + "word " * (words - 2), ">" + "x = 1\n" * lines)
    chapter = chapters.chapters(path.parent)[-1]
    assert chapter.lines == lines and chapter.minutes == minutes
    assert (chapters.hours(45), chapters.hours(120), chapters.hours(125)) == (
        "45 min",
        "2 h",
        "2 h 5 min",
    )


def test_a_folder_without_a_course_is_named(tmp_path):
    with pytest.raises(ValueError, match="got none"):
        chapters.chapters(tmp_path)
    make(tmp_path, "00_mute", "# Title", question="")
    with pytest.raises(ValueError, match=r"00_mute.ipynb.*question"):
        chapters.chapters(tmp_path)
    (tmp_path / "00_mute.ipynb").write_text("{")
    with pytest.raises(ValueError, match=r"00_mute.ipynb.*no JSON"):
        chapters.chapters(tmp_path)


def test_what_did_not_change_is_kept(small):
    assert set(results(small).values()) == {"written"}
    again = results(small)
    assert [again[name] for name in ("00_first", "01_second", "02_third")] == ["kept"] * 3
    make(small, "01_second", "# 01 · Second\n\nMore.")
    assert results(small)["01_second"] == "written" != results(small)["00_first"]


def test_neighbours_know_each_other(small):
    results(small)
    soups = {
        name: BeautifulSoup((small.parent / "site" / f"{name}.html").read_text(), "html.parser")
        for name in ("00_first", "01_second", "02_third")
    }
    ways = {
        name: [
            soup.find(rel=way)["href"] if soup.find(rel=way) else None for way in ("prev", "next")
        ]
        for name, soup in soups.items()
    }
    assert ways == {
        "00_first": [None, "01_second.html"],
        "01_second": ["00_first.html", "02_third.html"],
        "02_third": ["01_second.html", None],
    }
    assert "a&lt;b" in str(soups["01_second"]) or "&lt;" in str(soups["01_second"].find("math"))


@pytest.mark.parametrize(
    "cell, said",
    [
        (r"$\unknown$", r"01_bad.ipynb, cell 1: .*\\unknown"),
        ("[there](nowhere.ipynb)", "01_bad.ipynb: .*'nowhere.ipynb'"),
        ("![A picture of it](nowhere.png)", "01_bad.ipynb: .*'nowhere.png'"),
        ("<details><summary>Hint</summary>The $x$ there.</details>", "01_bad.ipynb: .*plain text"),
    ],
)
def test_a_notebook_that_fails_is_named_and_the_others_are_written(small, cell, said):
    make(small, "01_bad", "# Title", cell)
    found = results(small)
    assert re.search(said, found["01_bad"]), found["01_bad"]
    assert found["00_first"] == found["02_third"] == found["index"] == "written"


def test_notebooks_are_run_when_asked(small):
    found = results(small, running.executed)
    assert "01_second.ipynb" in found["01_second"] and "ZeroDivisionError" in found["01_second"]
    assert "code cell 1" in found["01_second"]
    page = BeautifulSoup((small.parent / "site" / "00_first.html").read_text(), "html.parser")
    assert page.select_one(".output pre").get_text().strip() == "42"
    assert not json.loads((small / "00_first.ipynb").read_text())["cells"][1]["outputs"]
    assert results(small)["00_first"] == "written"  # without outputs it is another page


def test_a_live_figure_is_a_sentence_and_a_drawn_one_has_words(small):
    path = make(small, "03_out", "# Title", "## Part", ">widget", ">plot")
    notebook = json.loads(path.read_text())
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "a"}, "text/plain": "VBox()"}
    for cell, data in zip(notebook["cells"][2:], (widget, {"image/png": "AAAA"}), strict=True):
        cell["outputs"] = [dict(output_type="display_data", data=data, metadata={})]
    soup = pages.prepared(pages.cells(notebook, "03"), path, pages.Linked())
    assert soup.find(class_="live") and "VBox" not in soup.get_text()
    assert soup.find("img")["alt"].endswith("in the section: Part")


def test_a_plotly_figure_is_drawn_by_a_script_beside_the_page(small):
    path = make(small, "03_plot", "# Title", ">figure")
    notebook = json.loads(path.read_text())
    figure = {"data": [{"type": "bar", "y": [1, 2]}], "layout": {}}
    output = dict(output_type="display_data", data={pages.PLOT: figure}, metadata={})
    notebook["cells"][1]["outputs"] = [output]

    def execute(chapter):
        return notebook if chapter.path == path else chapters.read(chapter.path)

    assert results(small, execute)["03_plot"] == "written"
    site = small.parent / "site"
    soup = BeautifulSoup((site / "03_plot.html").read_text(), "html.parser")
    assert [tag["src"] for tag in soup.find_all("script", src=True)] == [pages.SCRIPT]
    assert soup.find(id="plot-0") and (site / pages.SCRIPT).stat().st_size > 1e6
    others = (site / "00_first.html").read_text() + (site / "index.html").read_text()
    assert "<script" not in others


# ---------------------------------------------------------------------------------------------------------------------
# The command


def run(*arguments):
    return CliRunner().invoke(cli.app, ["html", *map(str, arguments)])


def test_the_command(small, monkeypatch):
    listed = chapters.chapters(small)
    monkeypatch.setattr(chapters, "chapters", lambda: listed)
    to = small.parent / "deep" / "site"
    done = run("--to", to, "--slides", "02", "--json")
    document = json.loads(done.stdout)
    assert done.exit_code == 0 and document["slides"] == str(to / "02_third_slides.html")
    assert {"00_first", "glossary", "teaching", "index"} <= set(document["pages"])
    assert (to / "index.html").exists() and Path(document["slides"]).exists()
    assert len(json.loads(run("--to", to, "--json").stdout)["kept"]) == 3
    make(small, "01_second", "# 01 · Second", r"$\unknown$")
    failed = run("--to", to)
    assert failed.exit_code == 1 and "01_second.ipynb, cell 1" in failed.stderr
    assert run("--to", to, "--slides", "77").exit_code == 2
    assert run("--to", small / "00_first.ipynb").exit_code == 2


# ---------------------------------------------------------------------------------------------------------------------
# The front door


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s#]+)[^)\s]*\)", text)


def test_the_notebooks_are_a_chain():
    """By the links in their last cells alone: forwards from the first to the last, and backwards."""
    names = [path.name for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    lasts = {}
    for name in names:
        cell = json.loads((ROOT / "notebooks" / name).read_text(encoding="utf-8"))["cells"][-1]
        assert cell["id"] == chapters.CLOSING, name
        lasts[name] = "".join(cell["source"])
    for before, after in pairwise(names):
        assert re.search(rf"\({after}\) →", lasts[before]), before
        assert re.search(rf"← \[[^]]+\]\({before}\)", lasts[after]), after
    assert "←" not in lasts[names[0]] and "→" not in lasts[names[-1]]
    for name, text in lasts.items():
        dead = [link for link in links(text) if not (ROOT / "notebooks" / link).exists()]
        assert not dead and "../README.md" in links(text), name


def test_every_page_links_to_files_that_are_there():
    listed = [ROOT / "README.md", *(ROOT / "notebooks" / name for name, _, _ in chapters.EXTRAS)]
    for path in listed:
        for link in links(path.read_text(encoding="utf-8")):
            assert link.startswith("https://") or (path.parent / link).exists(), (path.name, link)
    assert "what-is-in-it" in chapters.MAP and "## What is in it" in listed[0].read_text()


def test_every_source_has_a_link():
    """Each line under Sources leads to a paper."""
    for chapter in LISTED:
        text = "\n".join(prose(chapter.path))
        lines = re.findall(r"^[*-] .+$", text[text.index("## Sources") :], re.M)
        assert lines and all("](https://" in line for line in lines), chapter.name


def test_a_notebook_says_what_the_glossary_says_it_derives():
    text = (ROOT / "notebooks" / "glossary.md").read_text(encoding="utf-8")
    entries = re.findall(r"^\* (.+)$", text, re.M)
    assert len(entries) > 40
    for entry in entries:
        names = [name.lower() for name in re.findall(r"\*{1,2}([^*]+)\*", entry)]
        (link,) = re.findall(r"\]\(([^)]+)\)$", entry)
        page = (ROOT / "notebooks" / link).read_text(encoding="utf-8").lower()
        assert any(name in page for name in names), f"{link} does not speak of {names}"


def test_the_citation_names_this_version():
    assert f"version = {{{__version__}}}" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_issues_ask_for_what_can_be_checked():
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    asked = {}
    for path in forms:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        required = [
            one["attributes"]["label"]
            for one in content.get("body", [])
            if one.get("validations", {}).get("required")
        ]
        asked[path.stem] = " ".join(required)
    assert asked.pop("config") == "" and len(asked) == 3
    assert all("`diffclass" in labels for labels in asked.values())
