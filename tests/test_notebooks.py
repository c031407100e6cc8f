"""The form of every notebook: its promises to the reader, no outputs, checked equations, exercises.

Every contract is a function from a notebook to complaints, and is shown to complain about a planted offence.
"""

import ast
import copy
import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
REACH = 3  # how many cells below its equation a check may stand
PROMISES = ("**Objectives**", "**Runtime**", "**You need**")
EQUATION = re.compile(r"\$\$.+?\$\$|\\begin\{(equation|align|gather)\*?\}", re.S)
FOLDED = re.compile(r"<details\b.*?</details>", re.S)
ANSWER = re.compile(r"<details\b[^>]*>\s*<summary>[^<]*(hint|solution)", re.I)
IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)[^)]*\)")
SHELL = re.compile(r"^\s*(!|%{1,2}(pip|conda|bash|sh|script|system|sx)\b)", re.M)
ELSEWHERE = re.compile(r"https?://|^(/|~/)[\w.]+|^[A-Za-z]:\\|^file:")


def text(cell) -> str:
    source = cell["source"]
    return source if isinstance(source, str) else "".join(source)


def prose(cell) -> str:
    """A markdown cell without its code blocks, or nothing."""
    if cell["cell_type"] != "markdown":
        return ""
    return re.sub(r"```.*?```", "", text(cell), flags=re.S)


def code_cells(notebook) -> Iterator[tuple[int, str]]:
    for i, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            yield i, text(cell)


def headings(notebook) -> list[tuple[int, int, str]]:
    """(cell, level, words) of every markdown heading."""
    return [
        (i, len(marks), words.strip())
        for i, cell in enumerate(notebook["cells"])
        for marks, words in re.findall(r"^(#{1,6}) (.+)$", prose(cell), re.M)
    ]


def tree(source: str):
    """The syntax tree of a cell without its magics, or the syntax error as a string."""
    lines = ["pass" if line.startswith("%") else line for line in source.splitlines()]
    try:
        return compile(
            "\n".join(lines), "cell", "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        )
    except SyntaxError as error:
        return str(error)


def calls(source: str, name: str) -> int:
    """How often a cell calls `name(...)` or `something.name(...)`."""
    syntax = tree(source)
    if isinstance(syntax, str):
        return 0
    called = [node.func for node in ast.walk(syntax) if isinstance(node, ast.Call)]
    names = [node.id for node in called if isinstance(node, ast.Name)]
    names += [node.attr for node in called if isinstance(node, ast.Attribute)]
    return names.count(name)


def equation_cells(notebook) -> list[int]:
    """The markdown cells with a displayed equation that the reader sees without unfolding anything."""
    return [
        i
        for i, cell in enumerate(notebook["cells"])
        if EQUATION.search(FOLDED.sub("", prose(cell)))
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Contracts: notebook, path -> complaints


def is_well_formed(notebook, path):
    ids = [cell.get("id") for cell in notebook["cells"]]
    if not all(ids) or len(set(ids)) < len(ids):
        return ["every cell needs an id of its own (nbformat 4.5)"]
    try:
        nbformat.validate(nbformat.from_dict(copy.deepcopy(notebook)))
    except nbformat.ValidationError as error:
        return [str(error).splitlines()[0]]
    return []


def is_named_in_order(notebook, path):
    # a letter where a long notebook was divided: the numbers of the others stay
    if re.fullmatch(r"\d\d[a-z]?(_[a-z0-9]+)+\.ipynb", path.name):
        return []
    return [f"{path.name}: not NN_idea.ipynb, nor NNb_idea.ipynb"]


def has_one_title(notebook, path):
    complaints = []
    levels = [(i, level) for i, level, _ in headings(notebook)]
    titles = [i for i, level in levels if level == 1]
    if titles != [0]:
        complaints.append(f"one title in the first cell, got {len(titles)}")
    for (_, before), (i, after) in pairwise(levels):
        if after > before + 1:
            complaints.append(f"cell {i}: heading skips a level")
    return complaints


def makes_its_promises(notebook, path):
    page = "\n".join(map(prose, notebook["cells"]))
    return [f"no {word}" for word in PROMISES if word not in page]


def describes_its_images(notebook, path):
    complaints = []
    for i, cell in enumerate(notebook["cells"]):
        for words, target in IMAGE.findall(prose(cell)):
            if len(words.split()) < 3:
                complaints.append(f"cell {i}: {target} needs alt text that says what it shows")
            if not (path.parent / target).is_file():
                complaints.append(f"cell {i}: {target} is no file of the repository")
        for tag in re.findall(r"<img\b[^>]*>", prose(cell)):
            if not re.search(r'alt="[^"]{8,}"', tag):
                complaints.append(f"cell {i}: <img> without alt")
    return complaints


def stores_no_results(notebook, path):
    complaints = []
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    if any(cell.get("outputs") for cell in cells):
        complaints.append("outputs")
    if any(cell.get("execution_count") is not None for cell in cells):
        complaints.append("execution counts")
    if "widgets" in notebook["metadata"]:
        complaints.append("widget state")
    return complaints


def runs_no_shell(notebook, path):
    complaints = []
    for i, source in code_cells(notebook):
        line = SHELL.search(source)
        if line:
            complaints.append(f"cell {i}: {line[0].strip()}")
    return complaints


def needs_nothing_elsewhere(notebook, path):
    complaints = []
    for i, source in code_cells(notebook):
        if SHELL.search(source):
            continue
        syntax = tree(source)
        if isinstance(syntax, str):
            complaints.append(f"cell {i}: {syntax}")
            continue
        constants = [node.value for node in ast.walk(syntax) if isinstance(node, ast.Constant)]
        for value in constants:
            if isinstance(value, str) and ELSEWHERE.search(value):
                complaints.append(f"cell {i}: {value[:60]!r} leads out of the repository")
    return complaints


def checks_every_equation(notebook, path):
    """A check before the next equation, or within the next cells where several equations share one check."""
    equations = equation_cells(notebook)
    complaints = []
    checks = {i: calls(source, "check") for i, source in code_cells(notebook)}
    for i, following in pairwise([*equations, len(notebook["cells"])]):
        nearby = range(i + 1, max(following, i + REACH + 1))
        if not any(checks.get(j, 0) for j in nearby):
            complaints.append(f"cell {i}: equation without a check")
    total = sum(checks.values())
    if total < len(equations):
        complaints.append(f"{total} checks for {len(equations)} cells with equations")
    return complaints


def grades_its_exercises(notebook, path):
    complaints = []
    cells = notebook["cells"]
    marks = headings(notebook)
    graded = {i for i, source in code_cells(notebook) if calls(source, "grade")}
    starts = [i for i, level, words in marks if level == 3 and words.startswith("Exercise")]
    if not starts:
        complaints.append("no exercise")
    for i in starts:
        later = [j for j, level, _ in marks if j > i and level <= 3]
        own = range(i, min(later, default=len(cells)))
        if starts.count(i) > 1:
            complaints.append(f"cell {i}: one exercise per cell")
        if not any(ANSWER.search(prose(cells[j])) for j in own):
            complaints.append(f"cell {i}: exercise without a folded hint or solution")
        if graded.isdisjoint(own):
            complaints.append(f"cell {i}: exercise without course.grade")
    return complaints


CONTRACTS = [
    is_well_formed,
    is_named_in_order,
    has_one_title,
    makes_its_promises,
    describes_its_images,
    stores_no_results,
    runs_no_shell,
    needs_nothing_elsewhere,
    checks_every_equation,
    grades_its_exercises,
]


# ---------------------------------------------------------------------------------------------------------------------
# The notebooks keep them


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.__name__)
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebook(path, contract):
    complaints = contract(json.loads(path.read_text(encoding="utf-8")), path)
    assert not complaints, "\n".join(complaints)


def test_numbers_are_unique():
    numbers = [path.stem.partition("_")[0] for path in PATHS]
    assert len(set(numbers)) == len(numbers)


# ---------------------------------------------------------------------------------------------------------------------
# Every contract fires


def markdown(source):
    return nbformat.v4.new_markdown_cell(source)


def code(source):
    return nbformat.v4.new_code_cell(source)


def good(folder):
    """A notebook that keeps every contract, and its path."""
    (folder / "picture.png").write_bytes(b"")
    cells = [
        markdown(
            "# Title\n**Objectives** you will\n\n**Runtime** 1 s\n\n**You need** nothing\n```\n# no heading\n```"
        ),
        markdown("## Part\n![Ten loss curves over sigma](picture.png)"),
        markdown("$$a = b$$"),
        code("from diffclass.course import check\ncheck('a', 1, 1)"),
        markdown("$$c = d$$"),
        markdown("$$e = f$$"),
        code("check('c', 1, 1)\ncheck('e', 1, 1)"),
        markdown("### Exercise 1\nDo it."),
        code("answer = ..."),
        code("course.grade('one', answer)"),
        markdown("<details><summary>Hint</summary>\n$$g = h$$\n</details>"),
        markdown("## End"),
        *[code("label = 'p / nats'\n%matplotlib inline") for _ in range(20)],
    ]
    notebook = json.loads(nbformat.writes(nbformat.v4.new_notebook(cells=cells)))
    return notebook, folder / "03_bayes_rule.ipynb"


def put(index, source):
    return lambda notebook: notebook["cells"][index].update(source=source)


def drop(index):
    return lambda notebook: notebook["cells"].pop(index)


PLANTED = [
    (is_well_formed, lambda n: n["cells"][3].pop("id")),
    (is_well_formed, lambda n: n["cells"][3].update(id=n["cells"][2]["id"])),
    (is_well_formed, lambda n: n["cells"][3].pop("outputs")),
    (has_one_title, put(1, "# Second title")),
    (has_one_title, put(0, "**Objectives** **Runtime** **You need**")),
    (has_one_title, put(1, "#### Deep")),
    *[
        (makes_its_promises, put(0, "# Title\n" + " ".join(PROMISES).replace(word, "")))
        for word in PROMISES
    ],
    (describes_its_images, put(1, "## Part\n![](picture.png)")),
    (describes_its_images, put(1, "## Part\n![Ten loss curves over sigma](missing.png)")),
    (
        describes_its_images,
        put(1, "## Part\n![Ten loss curves over sigma](https://example.org/a.png)"),
    ),
    (describes_its_images, put(1, '## Part\n<img src="picture.png">')),
    (
        stores_no_results,
        lambda n: n["cells"][3].update(outputs=[nbformat.v4.new_output("stream", text="1")]),
    ),
    (stores_no_results, lambda n: n["cells"][3].update(execution_count=1)),
    (stores_no_results, lambda n: n["metadata"].update(widgets={})),
    (runs_no_shell, put(-1, "!ls")),
    (runs_no_shell, put(-1, "%pip install torch")),
    (runs_no_shell, put(-1, "%%bash\nls")),
    (needs_nothing_elsewhere, put(-1, "open('/home/me/data.npy')")),
    (needs_nothing_elsewhere, put(-1, "open('~/data.npy')")),
    (needs_nothing_elsewhere, put(-1, "f'https://example.org/{name}'")),
    (needs_nothing_elsewhere, put(-1, "open(r'C:\\data.npy')")),
    (needs_nothing_elsewhere, put(-1, "x = = 1")),
    (checks_every_equation, put(3, "check")),
    (checks_every_equation, put(3, "# check('a', 1, 1)")),
    (checks_every_equation, put(6, "check('c and e', 1, 1)")),
    (checks_every_equation, put(6, "pass")),
    (checks_every_equation, put(11, r"## End" + "\n" + r"\begin{align} a &= b \end{align}")),
    (grades_its_exercises, put(9, "answer")),
    (grades_its_exercises, put(10, "Hint: think.")),
    (grades_its_exercises, put(10, "## Elsewhere\n<details><summary>Hint</summary>\n</details>")),
    (grades_its_exercises, put(7, "### Exercise 1\n\n### Exercise 2")),
    (grades_its_exercises, put(7, "Do it.")),
]


def test_contracts_are_silent_on_a_good_notebook(tmp_path):
    notebook, path = good(tmp_path)
    assert {contract.__name__: contract(notebook, path) for contract in CONTRACTS} == {
        contract.__name__: [] for contract in CONTRACTS
    }


@pytest.mark.parametrize("contract, spoil", PLANTED)
def test_contract_fires(contract, spoil, tmp_path):
    notebook, path = good(tmp_path)
    spoil(notebook)
    assert contract(notebook, path)


@pytest.mark.parametrize(
    "name", ["bayes.ipynb", "3_bayes.ipynb", "03-bayes.ipynb", "03_Bayes.ipynb", "03_.ipynb"]
)
def test_bad_names_are_noticed(name, tmp_path):
    assert is_named_in_order(good(tmp_path)[0], tmp_path / name)


def test_every_contract_has_a_planted_offence():
    assert {contract for contract, _ in PLANTED} | {is_named_in_order} == set(CONTRACTS)
