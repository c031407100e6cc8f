"""Every number that the README prints is in a record, by the function that builds its tables."""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from diffclass import zoo
from diffclass.certify.certificates import smoothing_radius
from diffclass.evaluation import certification, claims, sigmas, tables
from diffclass.storage import results
from diffclass.zoo import classifiers as registry
from diffclass.zoo import noised

ROOT = Path(__file__).resolve().parents[1]
TABLES = (("digits", "linf"), ("digits", "l2"), ("cifar10", "linf"))
# What the README prints, by hand.
PRINTED = {
    ("digits", "linf"): (
        "| vision transformer | 96.0 [94, 98] (400) |  | 14.5 [11, 18] (400) | 9.0 [6, 12] (400) |  |",
        "| JEM | 99.2 [98, 100] (400) |  | 67.0 [62, 72] (400) | 75.0 [67, 82] (128) |  |",
        "| plain CNN | 99.2 [98, 100] (400) |  | 70.2 [66, 75] (400) | 68.0 [63, 73] (400) |  |",
        "| diffusion classifier | 99.1 [96, 100] (128) | 98.4 [94, 100] (128) | 40.8 [32, 50] (64) | 34.3 [28, 41] (128) "
        "| 7.0 [3, 13] (128) |",
        "| RDC as released | 97.8 [94, 100] (32) | 90.6 [75, 98] (32) |  | 85.9 [76, 93] (32) | 62.5 [44, 79] (32) |",
        "| IDC | 97.8 [97, 99] (400) | 87.0 [83, 90] (400) | 82.3 [79, 86] (400) | 67.9 [60, 75] (128) "
        "| 36.7 [28, 46] (128) |",
    ),
    ("digits", "l2"): (
        "| diffusion classifier | 99.7 [98, 100] (64) | 98.4 [92, 100] (64) |  | 0.0 [0, 6] (64) | 0.0 [0, 6] (64) |",
        "| IDC | 97.8 [97, 99] (400) | 87.0 [83, 90] (400) | 49.2 [45, 54] (400) | 6.5 [3, 11] (128) | 3.1 [1, 8] (128) |",
    ),
    ("cifar10", "linf"): (
        "| CNN, adversarially trained | 57.0 [51, 63] (256) |  | 31.2 [26, 37] (256) | 28.1 [21, 37] (128) |  |",
        "| IDC | 60.9 [52, 69] (128) | 54.7 [46, 64] (128) | 12.0 [7, 19] (128) | 6.2 [1, 21] (32) | 6.2 [1, 21] (32) |",
    ),
}
ORDER = (
    "cnn",
    "adversarial",
    "wide",
    "adversarial-wide",
    "vit",
    "adversarial-vit",
    "jem",
    "dc",
    "contrastive",
    "adversarial-dc",
    "tmdc",
    "tmdc-contrastive",
    "one-call",
    "one-call-hardened",
    "rdc1",
    "rdc5",
    "rdc-released",
    "rdc-contrastive",
    "lm-cnn",
    "diffpure",
    "diffpure-tmdc",
    "idc",
)


def shown(world: str, norm: str) -> list[str]:
    """The lines of a table in the README, titles and rule included."""
    after = (ROOT / "README.md").read_text(encoding="utf-8").split(f"<!-- {world} {norm} -->\n")[1]
    lines = after.splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("|"))
    return lines[:end]


@pytest.mark.parametrize("world, norm", TABLES)
def test_the_tables_of_robust_accuracies_are_those_of_the_records(world, norm):
    wanted = tables.robust_table(world, norm)
    got = shown(world, norm)
    # the titles are for `diffclass readme --check`; here it is about the numbers
    assert got[2:] == wanted[2:], f"the README's table of {world}, {norm} should be:\n" + "\n".join(
        wanted
    )
    assert got[1] == wanted[1] and len(got) > 6


@pytest.mark.parametrize("world, norm", TABLES)
def test_the_printed_numbers_are_what_they_always_were(world, norm):
    assert set(PRINTED[world, norm]) <= set(tables.robust_table(world, norm))


def test_a_number_that_was_changed_would_be_noticed():
    line = tables.robust_table("digits", "linf")[2]
    assert line in shown("digits", "linf")
    assert line.replace("[", "[1") not in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_rows_are_those_of_the_registry_in_its_order():
    rows = tables.robust_rows("digits", "linf")
    assert [row.entry.name for row in rows] == [name for name in ORDER if "one-call" not in name]
    for row in rows:
        assert row.entry is zoo.entry_of("digits", row.entry.name)
        assert [record.classifier for record in row.records if record] == (
            [row.entry.name] * sum(record is not None for record in row.records)
        )
    for world, norm in TABLES[1:]:
        names = [row.entry.name for row in tables.robust_rows(world, norm)]
        assert names == [name for name in ORDER if name in names]
        assert len(tables.robust_table(world, norm)) == 2 + len(names)


def test_the_titles_of_a_table():
    first, rule, *_ = tables.robust_table("digits", "linf")
    assert first == (
        "| Classifier | clean | clean, worst of 10 | paper's protocol | honest | honest, worst of 10 |"
    )
    assert rule == "|---|---|---|---|---|---|"


@pytest.mark.parametrize("world", ["digits", "cifar10"])
def test_the_table_of_unseen_threats_is_that_of_the_records(world):
    wanted = tables.threats_table(world)
    assert shown(world, "threats") == wanted and len(wanted) > 3
    titles = {entry.title: entry for entry in registry.ENTRIES.values()}
    for line in wanted[2:]:
        title, against, *numbers = (part.strip() for part in line.strip("|").split("|"))
        entry = titles[title]
        assert against == entry.against and sum(map(bool, numbers)) > 1
        for norm, place, number in (("linf", 3, numbers[0]), ("l2", 3, numbers[1])):
            rows = tables.robust_rows(world, norm)
            records = [row.records[place] for row in rows if row.entry is entry]
            assert number == (tables.cell(records[0]) if records else "")


def test_who_was_trained_on_fooling_pictures_says_so():
    hardened = {name for name in registry.ENTRIES if "adversarial" in name or "hardened" in name}
    assert hardened and all(registry.ENTRIES[name].against == "L-inf" for name in hardened)
    assert registry.ENTRIES["cnn"].against == registry.ENTRIES["dc"].against == "none"


# ---------------------------------------------------------------------------------------------------------------------
# Which record is shown


def record(correct: int, n: int = 20, **changes):
    """A record of the plain diffusion classifier under its honest protocol."""
    protocol = dict(name="honest", norm="linf", epsilon=0.1, version=1)
    protocol |= changes.pop("protocol", {})
    own = dict(
        world="digits",
        classifier="dc",
        source="a test",
        attack=f"{protocol['name']}-{protocol['version']}",
        statistic="mean",
        settings=dict(protocol=protocol, draws=changes.pop("draws", 10)),
    )
    return results.accuracy_record(correct, n, **{**own, **changes})


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A function that puts records into a run's folder of an assets folder of its own."""
    monkeypatch.setenv("DIFFCLASS_ASSETS", str(tmp_path))

    def kept(name, *listed):
        folder = tmp_path / "records" / "digits-attacks" / name
        folder.mkdir(parents=True)
        claims.keep(folder, listed)

    return kept


def cells(norm="linf") -> dict[str, list[str]]:
    """The cells of every row of the table of digits."""
    return {
        row.entry.name: [tables.cell(record) for record in row.records]
        for row in tables.robust_rows("digits", norm)
    }


def test_a_classifier_with_one_threat_on_record_is_not_in_the_table_of_threats(shelf):
    shelf("one", record(9, classifier="cnn", draws=1))
    shelf("two", record(8, classifier="dc"))
    assert len(tables.threats_table("digits")) == 2
    shelf("three", record(3, classifier="dc", protocol=dict(norm="l2", epsilon=1.0)))
    (line,) = tables.threats_table("digits")[2:]
    assert line.startswith("| diffusion classifier | none | 40.0 [") and "| 15.0 [" in line


def test_a_folder_without_records_has_no_rows(shelf):
    assert tables.robust_rows("digits", "linf") == [] and tables.folders("digits") == []
    assert len(tables.robust_table("digits", "linf")) == 2


def test_every_statistic_has_its_column(shelf):
    clean = dict(attack=None)
    paper = dict(protocol=dict(name="paper-rdc"))
    shelf(
        "a",
        record(19, **clean),
        record(17, statistic="worst", **clean),
        record(12, **paper),
        record(11, statistic="worst", **paper),
        record(8),
        record(3, statistic="worst"),
        record(5, part="pgd CE 20"),
    )
    line = ["95.0", "85.0", "60.0", "40.0", "15.0"]
    assert [text.split(" ")[0] for text in cells()["dc"]] == line
    assert list(cells()) == ["dc"]


def test_a_deterministic_classifier_has_no_worst(shelf):
    shelf("a", record(13, classifier="cnn", statistic="single", draws=1))
    assert cells() == {"cnn": ["", "", "", "65.0 [41, 85] (20)", ""]}


@pytest.mark.parametrize(
    "changes",
    [
        dict(protocol=dict(epsilon=0.05)),
        dict(protocol=dict(norm="l2", epsilon=1.0)),
        dict(protocol=dict(name="single")),
        dict(protocol=dict(name="paper-madry")),
        dict(part="pgd CE 20"),
        dict(statistic="worst", draws=5),
        dict(metric="loss"),
        dict(classifier="nobody's"),
    ],
    ids=lambda changes: "-".join(changes),
)
def test_what_is_not_the_number_of_a_column_is_not_shown(shelf, changes):
    """Another budget, norm, protocol, part or number of draws is another number."""
    metric = changes.pop("metric", "accuracy")
    shelf("a", replace(record(5, **changes), metric=metric))
    assert cells() == {}


def test_of_several_records_the_newest_protocol_and_the_most_images_are_shown(shelf):
    second = dict(protocol=dict(version=2))
    shelf("a", record(5, 20), record(10, 400, attack=None))
    shelf("b", record(80, 400), record(5, 20, attack=None))
    assert cells()["dc"][3] == "20.0 [16, 24] (400)"
    shelf("c", record(1, 10, **second), record(9, 10, attack=None, **second))
    assert cells()["dc"][3] == "10.0 [0, 45] (10)"
    assert cells()["dc"][0] == "2.5 [1, 5] (400)"  # clean images know no protocol


def test_the_two_norms_have_tables_of_their_own(shelf):
    shelf("a", record(5), record(10, protocol=dict(norm="l2", epsilon=1.0)))
    assert cells("linf")["dc"][3].startswith("25.0")
    assert cells("l2")["dc"][3].startswith("50.0")


def test_another_budget_has_a_table_of_its_own(shelf):
    shelf("a", record(5, protocol=dict(norm="l2", epsilon=1.0)))
    shelf("b", record(10, protocol=dict(norm="l2", epsilon=0.25)))
    (row,) = tables.robust_rows("digits", "l2", 0.25)
    assert row.records[3].value == 0.5
    assert tables.robust_rows("digits", "l2", 0.5) == []
    assert tables.robust_table("digits", "l2") != tables.robust_table("digits", "l2", 0.25)


def test_a_classifiers_own_paper_is_that_of_its_entry(shelf):
    madry = dict(protocol=dict(name="paper-madry"))
    shelf("a", record(7, classifier="cnn", **madry), record(7, classifier="dc", **madry))
    assert {name: row[2][:4] for name, row in cells().items()} == {"cnn": "35.0"}


def test_tables_of_nothing_that_exists():
    for call, said in (
        (lambda: tables.robust_table("mnist", "linf"), "the world"),
        (lambda: tables.robust_table("digits", "l1"), "the norm"),
        (lambda: tables.folders("mnist"), "the world"),
    ):
        with pytest.raises(ValueError, match=said):
            call()


def test_a_cell():
    assert tables.cell(None) == ""
    assert tables.cell(record(5)) == "25.0 [9, 49] (20)"
    assert asdict(record(5))["value"] == 0.25


@pytest.mark.parametrize("world", ["digits", "cifar10", "hundred"])
def test_the_tables_of_certificates_are_those_of_the_counts(world):
    """From the votes of every picture, not from the records: accuracies, votes, and radii that no vote can reach."""
    wanted = tables.certified_table(world)
    assert shown(world, "certified") == wanted
    rows = tables.certified_rows(world)
    assert len(rows) == len(wanted) - 2 == len(tables.certified_folders(world)) > 0
    for folder in tables.certified_folders(world):
        run = certification.read(folder)
        plan = run.plan
        title = noised.entry_of(world, run.settings["classifier"]).title
        if plan.soft_votes:
            title = f"{title}, soft votes"
        own = [row for row in rows if (row.title, row.sigma_pixel) == (title, plan.sigma_pixel)]
        assert len(own) == 1
        proven = list(zip(run.certificates(), run.labels.tolist(), strict=True))
        for radius, record in own[0].records.items():
            right = [
                certificate.prediction == label and certificate.radius >= radius
                for certificate, label in proven
            ]
            if record is None:
                assert radius > plan.ceiling and not any(right)
            else:
                assert record.value == sum(right) / len(right)


def test_the_table_of_sigmas_is_that_of_the_counts():
    """From the votes of every picture: each sigma, the best of the data set, and the best of each picture."""
    wanted = tables.sigmas_table("digits")
    assert shown("digits", "sigmas") == wanted
    (runs,) = sigmas.kept_runs("digits").values()
    assert len(wanted) == 2 + len(runs) + 2
    radii = (0.0, *runs[0].plan.radii)
    right_and_far = []
    for run in runs:
        proofs = [
            smoothing_radius(votes, 0.001 / len(runs), run.plan.bound) for votes in run.votes()
        ]
        right_and_far.append(
            [
                proof.radius if proof.prediction == label else -1.0
                for proof, label in zip(proofs, run.labels.tolist(), strict=True)
            ]
        )
    found = np.array(right_and_far)
    of_each = (found.max(0)[:, None] >= radii).mean(0)
    of_the_set = (found[:, :, None] >= radii).mean(1).max(0)
    cells = [line.strip("| ").split(" | ") for line in wanted[-2:]]
    for column in range(len(radii)):
        assert cells[0][2 + column].startswith(f"{100 * of_the_set[column]:.1f}")
        if cells[1][2 + column] != "–":
            assert cells[1][2 + column].startswith(f"{100 * of_each[column]:.1f} [")
