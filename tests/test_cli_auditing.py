"""`diffclass audit`: a light for every row as it is made, exit code 1 for a red one, stored runs audited by name."""

import json

import pytest
import torch
from diffclass import cli, zoo
from diffclass.audit import planted
from diffclass.evaluation import claims, robustness
from diffclass.evaluation.protocols import Attack, Protocol
from typer.testing import CliRunner

KINDS = {"honest": planted.Honest, "quantised": planted.Quantised, "cnn": planted.Honest}
CHEAP = ["--only", "1,3,4,5,8,25", "--images", "8"]


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """The zoo holds planted classifiers: networks are not what is tested here."""

    def defence(world, name, *, seed=0, fresh=None):
        if name not in KINDS or fresh is not None and KINDS[name] is planted.Honest:
            raise ValueError(f"expected one of {list(KINDS)}, got {name!r}.")
        return KINDS[name]()

    monkeypatch.setattr(zoo, "defence", defence)
    monkeypatch.setattr(zoo, "NAMES", {"digits": tuple(KINDS)})
    monkeypatch.setattr(zoo, "images", lambda world, limit, seed: planted.images(limit, seed))
    monkeypatch.setattr(
        zoo, "budget", lambda world, norm: planted.EPSILON if norm == "linf" else 0.5
    )


def run(*arguments):
    done = CliRunner().invoke(cli.app, ["audit", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert "Traceback" not in done.output
    return done


def test_an_honest_defence_with_a_statement_passes():
    done = run("honest", "--images", 32, "--statement", planted.STATEMENT)
    assert done.exit_code == 0, done.output
    rows = [line for line in done.stdout.splitlines() if line.startswith(("green", "amber", "red"))]
    assert (
        len(rows) == 36
        and rows[0].startswith("green   1 one_function")
        and "white_beats_black" in rows[12]
    )
    assert (
        done.stdout.splitlines()[-1].endswith("20 green, 0 red, 16 amber")
        and "robust " not in done.stdout
    )


def test_without_a_statement_nothing_is_called_robust():
    done = run("honest", *CHEAP)
    assert done.exit_code == 1
    assert (
        "5 green, 1 red, 0 amber" in done.stdout
        and "-> write what would break this defence" in done.stdout
    )
    red = next(line for line in done.stdout.splitlines() if line.startswith("red"))
    assert red.startswith("red    25 adaptive_statement")


def test_a_masked_defence_is_red_where_its_fault_is():
    done = run("quantised", *CHEAP, "--statement", planted.STATEMENT, "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == 1 and found["ok"] is False
    assert [row["number"] for row in found["checks"] if row["light"] == "red"] == [3]
    assert "8 of 8 images have a zero or non-finite gradient" in found["checks"][1]["evidence"]


def test_json_is_one_document_with_every_row():
    found = json.loads(run("honest", *CHEAP, "--norm", "l2", "--seed", 3, "--json").stdout)
    assert [row["number"] for row in found["checks"]] == [1, 3, 4, 5, 8, 25]
    assert (found["norm"], found["epsilon"], found["images"], found["seed"]) == ("l2", 0.5, 8, 3)
    assert set(found["checks"][0]) == {
        "number",
        "name",
        "group",
        "light",
        "evidence",
        "advice",
        "picture",
        "seconds",
    }
    assert found["lights"] == {"green": 5, "red": 1, "amber": 0}


@pytest.fixture
def stored(tmp_path):
    """A finished run on 40 images, in a folder."""
    x, y = planted.images(40)
    attack = Attack("margin", 10, restarts=4)
    protocol = Protocol("paper", "honest", "linf", 0.15, (attack,), "this test")
    own = dict(world="digits", defence="honest", checkpoints={}, version="1")
    list(robustness.run(planted.Honest(), x, y, protocol, tmp_path, own))
    claims.keep(tmp_path, claims.records(robustness.read(tmp_path)))
    return tmp_path


def test_a_stored_run_brings_its_budget_images_and_perturbations(stored):
    done = run("honest", "--records", stored, "--only", "6,22,32,33,34,35,36", "--json")
    found = json.loads(done.stdout)
    assert (found["images"], found["epsilon"]) == (40, 0.15)
    assert [row["light"] for row in found["checks"]] == [
        "green",
        "green",
        "amber",
        "green",
        "green",
        "green",
        "green",
    ]
    assert "fewest images are 40" in found["checks"][2]["evidence"]


def test_a_reported_number_that_the_rows_do_not_bear_out_is_red(stored):
    path = stored / "records.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(
        "".join(json.dumps({**row, "value": 1.0, "low": 0.9, "high": 1.0}) + "\n" for row in rows)
    )
    found = json.loads(run("honest", "--records", stored, "--only", "32,34", "--json").stdout)
    assert [row["light"] for row in found["checks"]] == ["red", "red"] and "reported 100.0%" in str(
        found["checks"]
    )


def test_a_run_that_is_not_finished_is_refused(stored):
    rows = stored / "rows.jsonl"
    *whole, last = rows.read_text().splitlines()
    rows.write_text("\n".join([*whole, json.dumps({**json.loads(last), "hits": None})]) + "\n")
    done = run("honest", "--records", stored)
    assert (
        done.exit_code == 2
        and "expected a finished run" in done.stderr
        and "39 of 40 images" in done.stderr
    )


def test_perturbations_of_another_defence_are_refused(stored):
    done = run("quantised", "--records", stored)
    assert (
        done.exit_code == 2
        and "expected perturbations of quantised, got those of honest." in done.stderr
    )


def test_tampered_perturbations_are_red(stored):
    from safetensors.torch import load_file, save_file

    path = stored / "deltas-0.safetensors"
    save_file({"deltas": torch.zeros_like(load_file(path)["deltas"])}, path)
    found = json.loads(run("honest", "--records", stored, "--only", "36", "--json").stdout)
    assert (
        found["checks"][0]["light"] == "red" and "100.0% survive" in found["checks"][0]["evidence"]
    )


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["nobody"], "expected one of ['honest', 'quantised', 'cnn'], got 'nobody'."),
        (["honest", "--epsilon", "8"], "did you mean 8/255?"),
        (
            ["honest", "--only", "1,x"],
            "expected numbers of checks with commas between them, such as 1,2,13, got '1,x'.",
        ),
        (["honest", "--only", "37"], "expected checks from 1 to 36, got [37]."),
        (["honest", "--records", "nowhere"], "expected the results of an attack in nowhere"),
    ],
)
def test_input_that_cannot_be_meant_gets_a_sentence(arguments, sentence):
    done = run(*arguments)
    assert done.exit_code == 2 and sentence in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("diffclass: ")]) == 1
