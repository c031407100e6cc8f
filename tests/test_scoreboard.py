"""The scoreboard: numbers from records alone, no point where there is none, and pairs compared on the same pictures."""

import json
import math
from dataclasses import asdict, replace

import pytest
from diffclass import intervals
from diffclass.course import plots, widgets
from diffclass.course.scenes.scoreboard import ALL, SERIES, ScoreboardScene
from diffclass.evaluation import costs, literature, scoreboard, tables
from diffclass.evaluation.scoreboard import ABSTAINED, MISSING, UNBOUNDED, Number, Outcome
from diffclass.storage import results
from test_cli import document, run
from twins import rejected

ROWS = {world: scoreboard.standings(world) for world in scoreboard.WORLDS}
HONEST = scoreboard.outcomes("digits", "honest")


def strict(text):
    """Parse JSON as a browser does: NaN and infinity are no JSON."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def record(correct, n=20, **changes):
    return results.accuracy_record(
        correct, n, world="digits", classifier="cnn", source="a test", **changes
    )


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize("world", scoreboard.WORLDS)
def test_every_number_of_the_readme_is_on_the_board(world):
    by_name = {row.name: row for row in ROWS[world]}
    for row in tables.robust_rows(world, "linf"):
        for column, shown in zip(tables.COLUMNS, row.records, strict=True):
            number = by_name[row.entry.name].numbers[column.title]
            if shown is not None:
                assert (number.value, number.low, number.n) == (shown.value, shown.low, shown.n)
                assert number.source.startswith(shown.source)
    certified = [
        row
        for row in tables.certified_rows(world)
        if row.sigma_pixel == 0.25 and "soft votes" not in row.title
    ]
    assert certified
    for row in certified:
        number = by_name[row.name].numbers["certified, r = 0.25"]
        assert number.value == row.records[0.25].value


@pytest.mark.parametrize("world", scoreboard.WORLDS)
def test_there_is_a_number_or_a_reason_and_a_source_for_every_number(world):
    titles = [measure.title for measure in scoreboard.measures()]
    for row in ROWS[world]:
        assert list(row.numbers) == titles
        for number in row.numbers.values():
            if number.value is None:
                assert number.reason in (MISSING, ABSTAINED, UNBOUNDED)
            else:
                assert math.isfinite(number.value) and number.reason == "" and number.source
    assert any(number.reason == MISSING for row in ROWS[world] for number in row.numbers.values())


def test_without_noise_the_worst_draw_is_the_only_one():
    by_name = {row.name: row.numbers for row in ROWS["digits"]}
    assert by_name["cnn"]["honest, worst of 10"] == by_name["cnn"]["honest"]
    assert by_name["dc"]["honest, worst of 10"].value < by_name["dc"]["honest"].value


@pytest.mark.parametrize(
    "value, reason",
    [
        (math.nan, MISSING),
        (None, MISSING),
        (math.inf, UNBOUNDED),
        (-math.inf, UNBOUNDED),
        (2.0, ""),
    ],
)
def test_what_is_no_number_gets_its_reason(value, reason):
    number = Number.measured(value, "a test")
    assert number.reason == reason and (number.value is None) == bool(reason)
    assert strict(json.dumps(asdict(number)))["reason"] == reason


def test_a_picture_that_abstained_is_no_zero():
    all_of_them = record(0, settings=dict(abstained=20))
    assert Number.of(all_of_them).reason == ABSTAINED
    some = Number.of(record(0, settings=dict(abstained=19)))
    assert some.value == 0 and some.reason == ""
    assert Number.of(None).reason == MISSING


def spoilt_rows():
    """A scoreboard with all that can be missing: NaN, infinity, no record, everybody abstained."""
    first, second, third, *_ = ROWS["digits"]
    empty = {title: Number() for title in first.numbers}
    return [
        replace(first, name="none", title="none", numbers=empty),
        replace(
            second,
            name="odd",
            title="odd",
            numbers={
                **empty,
                "flop": Number.measured(math.inf, "a test"),
                "seconds": Number.measured(math.nan, "a test"),
                "certified, r = 0.25": Number.of(record(0, settings=dict(abstained=20))),
            },
        ),
        third,
    ]


def test_what_has_no_number_comes_last_and_is_drawn_nowhere():
    rows = spoilt_rows()
    for title in ("honest", "flop", "certified, r = 0.25"):
        order = scoreboard.ranked(rows, title)
        values = [row.numbers[title].value for row in order]
        assert values == sorted(values, key=lambda value: value is None)
    pictures = [(row.title, row.numbers["honest"]) for row in rows]
    figure = plots.forest({"honest": pictures}, "test")
    assert len(figure.data[0].x) == 1 and 0 not in figure.data[0].x
    assert "none (not measured)" in figure.layout.yaxis.categoryarray
    both = plots.forest(
        {
            "first": [("a", Number()), ("b", Number())],
            "second": [("a", Number()), ("b", rows[2].numbers["honest"])],
        },
        "test",
    )
    assert both.layout.yaxis.categoryarray == ("b", "a (not measured)")
    assert list(both.data[1].y) == ["b"]  # a row is one row, whichever of its numbers are there
    assert [len(trace.x) for trace in plots.against_cost(rows, "honest").data] == [1]
    told = plots.table(rows, ["honest", "flop", "certified, r = 0.25"], "honest")
    words = {word for column in told.data[0].cells["values"] for word in column}
    assert {MISSING, ABSTAINED, UNBOUNDED} <= words
    for drawn in (figure, told, plots.against_cost(rows, "honest")):
        strict(drawn.to_json())
    strict(json.dumps([asdict(row) for row in rows], allow_nan=False))


def test_the_cheapest_comes_first_and_the_most_accurate():
    by_cost = scoreboard.ranked(ROWS["digits"], "flop")
    assert by_cost[0].numbers["flop"].value == min(
        row.numbers["flop"].value for row in ROWS["digits"]
    )
    best = scoreboard.ranked(ROWS["digits"], "honest")[0].numbers["honest"].value
    assert best == max(row.numbers["honest"].value or 0 for row in ROWS["digits"])
    with pytest.raises(ValueError, match="a column of the scoreboard"):
        scoreboard.ranked(ROWS["digits"], "beauty")


# ---------------------------------------------------------------------------------------------------------------------
# Pairs


def outcome(name, hits, draws=1, labels=None, images="a"):
    labels = tuple(range(len(hits))) if labels is None else labels
    own = record(0, len(hits))
    return Outcome(replace(own, classifier=name), tuple(hits), draws, labels, images)


def test_a_pair_is_compared_on_its_common_prefix():
    first = outcome("first", [1, 1, 1, 0, 1, 1, 0, 0])
    second = outcome("second", [1, 0, 0, 1])
    pair = scoreboard.compare(first, second)
    assert (pair.n, pair.more, pair.less, pair.difference) == (4, 2, 1, 0.25)
    assert pair.p == intervals.sign_test(2, 1)
    assert (pair.low, pair.high) == intervals.paired_interval([0, 1, 1, -1])
    turned = scoreboard.compare(second, first)
    assert turned.difference == -pair.difference and turned.low == pytest.approx(-pair.high)


def test_random_answers_are_compared_by_their_shares_and_the_worst_by_counts():
    first = outcome("first", [10, 9, 10], 10)
    second = outcome("second", [5, 10, 0], 10)
    pair = scoreboard.compare(first, second)
    assert pair.difference == pytest.approx((0.5 - 0.1 + 1) / 3)
    assert pair.p is None and pair.more is None
    worst = scoreboard.compare(first, second, worst=True)
    assert (worst.more, worst.less, worst.difference) == (2, 1, pytest.approx(1 / 3))


def unpaired(first, second, worst=False):
    """The wrong twin: two intervals, one for each, as if the pictures were others."""
    pair = scoreboard.compare(first, second, worst)
    one = first.number(pair.n, worst)
    other = second.number(pair.n, worst)
    return replace(pair, low=one.low - other.high, high=one.high - other.low)


@rejected({"unpaired": dict(compare=unpaired)})
def test_a_difference_that_is_real_is_seen(compare=scoreboard.compare):
    """64 pictures: 8 stand for the first alone, and none for the second alone."""
    first = outcome("first", [1] * 48 + [0] * 16)
    second = outcome("second", [1] * 40 + [0] * 24)
    pair = compare(first, second)
    assert pair.real and pair.p < 0.01


def test_other_pictures_are_refused():
    first = outcome("first", [1, 0, 1])
    with pytest.raises(ValueError, match="prefixes of the same pictures"):
        scoreboard.compare(first, outcome("second", [1, 0, 1], labels=(9, 9, 9)))
    with pytest.raises(ValueError, match="prefixes of the same pictures"):
        scoreboard.compare(first, outcome("second", [1, 0, 1], images="b"))
    for n in (0, 4):
        with pytest.raises(ValueError, match="pictures"):
            first.number(n)


def test_outcomes_are_those_of_the_records():
    for title in ("clean", "honest"):
        found = scoreboard.outcomes("digits", title)
        assert len(found) > 8
        for one in found.values():
            number = one.number()
            assert number.value == pytest.approx(one.record.value, abs=1e-12)
            assert (number.low, number.high) == pytest.approx((one.record.low, one.record.high))
    labels = {one.labels[:32] for one in HONEST.values()}
    assert len(labels) == 1  # one order of pictures for all
    remarks = [pair.remark for pair in scoreboard.comparisons(HONEST)]
    assert any("honest-1" in remark for remark in remarks) and "" in remarks
    with pytest.raises(ValueError, match="one of the columns"):
        scoreboard.outcomes("digits", "honest, worst of 10")


# ---------------------------------------------------------------------------------------------------------------------
# Sources


@pytest.mark.parametrize("world", scoreboard.WORLDS)
def test_nothing_on_the_board_lacks_its_source(world):
    assert scoreboard.complaints(world) == []


def test_a_number_without_a_source_is_named(monkeypatch, tmp_path):
    about, spent = costs.kept("digits")
    without = {name: cost for name, cost in spent.items() if name != "idc"}
    monkeypatch.setattr(costs, "kept", lambda world: ({**about, "machine": ""}, without))
    found = scoreboard.complaints("digits")
    assert len(found) == 2 and "machine" in found[0] and "cost of idc" in found[1]
    done = run("scoreboard", "--html", tmp_path / "page.html")
    assert done.exit_code == 1 and "NO SOURCE  digits, cost of idc" in done.stdout
    assert not (tmp_path / "page.html").exists()


def test_a_record_that_its_run_does_not_bear_out_is_named(monkeypatch):
    rows = tables.robust_rows

    def flattered(world, norm, epsilon=None, columns=tables.COLUMNS):
        listed = rows(world, norm, epsilon, columns)
        if norm != "linf":
            return listed
        first = listed[0]
        shown = list(first.records)
        better = replace(shown[3], value=shown[3].value + 1 / shown[3].n, high=1.0)
        shown[3] = better
        shown[2] = replace(shown[2], settings={**shown[2].settings, "seed": 9})
        return [tables.Row(first.entry, tuple(shown)), *listed[1:]]

    monkeypatch.setattr(tables, "robust_rows", flattered)
    found = scoreboard.complaints("digits")
    assert len(found) == 2
    assert "paper's protocol of cnn: expected a run behind" in found[0]
    assert "honest of cnn: the record says 0.6825 of 400, the rows of its run 0.6800" in found[1]


def test_missing_costs_and_an_empty_literature_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(literature, "claims", lambda: [])
    assert "no claims" in scoreboard.complaints("cifar10")[0]
    monkeypatch.setattr(costs, "record_file", lambda world: tmp_path / "costs-digits.json")
    (missing,) = scoreboard.complaints("digits")
    assert "compare-costs --world digits" in missing


# ---------------------------------------------------------------------------------------------------------------------
# The command and its page


@pytest.mark.parametrize("world", scoreboard.WORLDS)
def test_the_command_prints_strict_json(world):
    done = run("--json", "scoreboard", "--world", world)
    assert done.exit_code == 0
    content = strict(done.stdout)
    assert content == document(done)
    assert len(content["rows"]) == len(ROWS[world]) and len(content["literature"]) > 250
    pairs = content["comparisons"]["honest"]
    assert pairs and all(pair["low"] <= pair["difference"] <= pair["high"] for pair in pairs)


def test_the_command_prints_a_table_and_writes_a_page_of_its_own(tmp_path):
    page = tmp_path / "page.html"
    done = run("scoreboard", "--by", "flop", "--html", page)
    assert done.exit_code == 0 and "not measured" in done.stdout
    text = page.read_text()
    assert "not measured" in text and "Scoreboard of digits" in text
    assert "<script src=" not in text and 'rel="stylesheet" href="http' not in text
    for wrong in (("--world", "mars"), ("--by", "beauty")):
        assert run("scoreboard", *wrong).exit_code == 2


def test_the_figures_of_a_page_are_strict_json():
    rows = ROWS["cifar10"]
    for figure in (
        plots.against_cost(rows, "honest"),
        plots.pairs(scoreboard.comparisons(HONEST), "pairs"),
        plots.claims_table(literature.claims()),
        plots.surface([0, 1], [0, 1, 2], [[0, 1], [1, 2], [2, 3]], ("a", "b", "c")),
    ):
        strict(figure.to_json())
    assert len(plots.pairs(scoreboard.comparisons(HONEST), "pairs").data[0].x) == math.comb(
        len(HONEST), 2
    )


# ---------------------------------------------------------------------------------------------------------------------
# The hero of notebook 14


def test_the_hero_shows_every_classifier_on_the_same_pictures():
    scene = ScoreboardScene()
    board = scene.at(64)
    assert list(board.series) == list(SERIES)
    labels = [label for label, _ in board.series["honest"]]
    few = sum(len(one.hits) == 32 for one in HONEST.values())
    assert len(labels) == len(HONEST) and few > 2
    assert sum("(only 32)" in label for label in labels) == few
    values = [number.value for _, number in board.series["honest"]]
    assert values == sorted(values, reverse=True)
    for name in ("cnn", "dc"):
        place = next(i for i, label in enumerate(labels) if label == scene.titles[name])
        own = min(64, len(HONEST[name].hits))
        assert board.series["honest"][place][1] == HONEST[name].number(own)
    names = {name for group in list(scene.groups)[1:] for name in scene.groups[group]}
    assert names == set(scene.groups[ALL]) == set(HONEST)
    worst = scene.at(64, by="honest, worst of 10").series
    assert [number.value for _, number in worst["honest, worst of 10"]] == sorted(
        (number.value for _, number in worst["honest, worst of 10"]), reverse=True
    )


def test_the_note_of_the_hero_compares_the_first_two_rows():
    scene = ScoreboardScene()
    scene.groups["apart"] = ("cnn", "adversarial")
    apart = scene.at(400, "apart")
    assert "a real difference" in apart.note and "the 400 pictures" in apart.note
    assert "no difference that so few pictures can show" in scene.at(8).note


def test_the_figure_of_the_hero_follows_its_controls():
    hero = widgets.scoreboard_hero(n=32)
    figure = hero.children[1]
    before = [len(trace.x) for trace in figure.data]
    assert before == [len(HONEST)] * 3
    scene = ScoreboardScene()
    quiet = "answers without noise"
    hero.controls["group"].value = quiet
    assert [len(trace.x) for trace in figure.data] == [len(scene.groups[quiet])] * 3 != before
    wide = max(figure.data[1].error_x.array)
    hero.controls["n"].value = 400
    assert max(figure.data[1].error_x.array) < wide / 2
    assert set(figure.layout.yaxis.categoryarray) == set(figure.data[0].y)
    strict(figure.to_json())
    assert hero.stage.frame["note"] == scene.at(400, quiet).note
