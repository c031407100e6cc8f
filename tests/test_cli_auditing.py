"""`diffclass audit`: a light for every row as it is made, exit code 1 for a red one, stored runs audited by name."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffclass import audit, cli, zoo
from diffclass.audit import planted
from diffclass.data import worlds
from diffclass.evaluation import claims, runs
from diffclass.evaluation.protocols import Attack, Protocol
from typer.testing import CliRunner

KINDS = {
    "honest": planted.Honest,
    "quantised": planted.Quantised,
    "noisy": planted.Noisy,
    "cnn": planted.Honest,
}
CHEAP = ["--only", "1,3,4,5,8,25", "--images", "8"]


def world_of(name):
    """The world of the planted classifiers."""
    budgets = {"linf": planted.EPSILON, "l2": 0.5}
    return SimpleNamespace(
        name=name, kind="digits", law=None, test=planted.images, budget=budgets.get
    )


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """The zoo holds planted classifiers: networks are not what is tested here."""

    def classifier(world, name):
        if name not in KINDS:
            raise ValueError(f"expected one of {list(KINDS)}, got {name!r}.")
        return KINDS[name]().eval()

    monkeypatch.setattr(zoo, "classifier", classifier)
    monkeypatch.setattr(zoo, "names", lambda world: tuple(KINDS))
    monkeypatch.setattr(worlds, "world_of", world_of)


def run(*arguments):
    done = CliRunner().invoke(cli.app, ["audit", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert "Traceback" not in done.output
    return done


def test_an_honest_classifier_with_a_statement_passes():
    done = run("honest", "--images", 32, "--statement", planted.STATEMENT)
    assert done.exit_code == 0, done.output
    rows = [line for line in done.stdout.splitlines() if line.startswith(("green", "amber", "red"))]
    first, *_ = done.stdout.splitlines()
    assert first.startswith("40 checks of honest on 32 images of digits: at most about ")
    assert " classifier calls (network calls in each: up to 1), about " in first
    assert first.endswith(" s here, and up to a minute to compile it (check 38).")
    assert (
        len(rows) == 40
        and rows[0].startswith("green   1 one_function")
        and "white_beats_black" in rows[12]
    )
    assert (
        done.stdout.splitlines()[-1].endswith("24 green, 0 red, 16 amber")
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


def test_a_masked_classifier_is_red_where_its_fault_is():
    done = run("quantised", *CHEAP, "--statement", planted.STATEMENT, "--json")
    document = json.loads(done.stdout)
    assert done.exit_code == 1 and document["ok"] is False
    assert [row["number"] for row in document["checks"] if row["light"] == "red"] == [3]
    assert "8 of 8 images have a zero or non-finite gradient" in document["checks"][1]["evidence"]


def test_the_training_pictures_of_the_world_are_looked_through(monkeypatch):
    done = run("honest", "--only", "40", "--images", 8, "--statement", planted.STATEMENT)
    assert done.exit_code == 0 and "0 are among the 1397 that it was trained on" in done.stdout
    monkeypatch.setattr(worlds, "images_of", lambda world, split: planted.images(8))
    document = json.loads(run("honest", "--only", "40", "--images", 8, "--json").stdout)
    assert "8 are among the 8 that it was trained on" in document["checks"][0]["evidence"]
    assert document["checks"][0]["light"] == "red"


def test_the_time_is_told_before_the_audit_starts(monkeypatch):
    monkeypatch.setattr(audit.Case, "pace", lambda case: 0.5)
    done = run("honest", "--only", "4", "--images", 8)
    first, *_ = done.stdout.splitlines()
    assert first.startswith("1 checks of honest on 8 images of digits: at most about ")
    document = json.loads(run("honest", "--only", "4", "--images", 8, "--json").stdout)
    assert document["seconds"] == document["calls"] / 2
    assert f"about {round(document['seconds'] / 60)} min here" in first
    assert json.loads(run("honest", "--only", "25", "--json").stdout)["seconds"] == 0


def test_a_classifier_that_cannot_be_asked_is_audited_all_the_same(monkeypatch):
    class Broken(planted.Honest):
        def logits(self, x, noise):
            raise RuntimeError("out of order")

    monkeypatch.setitem(KINDS, "honest", Broken)
    done = run("honest", "--only", "1,39", "--images", 8)
    assert "whose time cannot be told, as the first of them failed" in done.stdout
    assert done.exit_code == 1 and done.stdout.count("RuntimeError: out of order") == 2


def test_json_is_one_document_with_every_row():
    document = json.loads(run("honest", *CHEAP, "--norm", "l2", "--seed", 3, "--json").stdout)
    assert [row["number"] for row in document["checks"]] == [1, 3, 4, 5, 8, 25]
    assert (document["norm"], document["epsilon"], document["images"], document["seed"]) == (
        "l2",
        0.5,
        8,
        3,
    )
    assert set(document["checks"][0]) == {
        "number",
        "name",
        "group",
        "light",
        "evidence",
        "advice",
        "picture",
        "seconds",
    }
    assert document["lights"] == {"green": 5, "red": 1, "amber": 0}
    assert (document["command"], document["classifier"]) == ("audit", "honest")
    assert document["attack"] == "apgd" and document["held"] is True and document["calls"] > 500


def test_the_attack_is_chosen_by_name(monkeypatch):
    document = json.loads(
        run("honest", "--only", "10,11", "--images", 8, "--attack", "PGD", "--json").stdout
    )
    assert document["attack"] == "PGD"
    asked = []
    entry = zoo.attack("pgd")

    def watched(*arguments, **options):
        asked.append(options["steps"])
        return entry.run(*arguments, **options)

    monkeypatch.setattr(zoo, "attack", lambda name: replace(entry, run=watched))
    run("honest", "--only", "6", "--images", 8, "--attack", "pgd", "--steps", 3, "--starts", 1)
    assert asked == [3]


def test_a_random_classifier_is_held_unless_new_noise_is_asked_for():
    held = json.loads(run("noisy", "--only", "5,18,20", "--json").stdout)
    fresh = json.loads(run("noisy", "--only", "5,18,20", "--fresh", "--draws", 2, "--json").stdout)
    assert [row["light"] for row in held["checks"]] == ["green", "green", "amber"]
    assert [row["light"] for row in fresh["checks"]] == ["green", "red", "red"]
    assert "with the noise held, as it is claimed" in held["checks"][1]["evidence"]
    assert (held["held"], fresh["held"]) == (True, False)
    assert held["calls"] < fresh["calls"]


@pytest.fixture
def stored(tmp_path):
    """A finished run on 40 images, in a folder."""
    x, y = planted.images(40)
    protocol = Protocol("honest", "linf", 0.15, (Attack("margin", 10, restarts=4),))
    own = dict(world="digits", classifier="honest", checkpoints={}, version="1")
    list(runs.run(planted.Honest().eval(), x, y, protocol, tmp_path, own))
    claims.keep(tmp_path, claims.records_of(runs.read(tmp_path)))
    return tmp_path


def test_a_stored_run_brings_its_budget_images_and_perturbations(stored):
    done = run("honest", "--records", stored, "--only", "6,22,32,33,34,35,36", "--json")
    document = json.loads(done.stdout)
    assert (document["images"], document["epsilon"]) == (40, 0.15)
    assert [row["light"] for row in document["checks"]] == [
        "green",
        "green",
        "amber",
        "green",
        "green",
        "green",
        "green",
    ]
    assert "fewest images are 40" in document["checks"][2]["evidence"]
    document = json.loads(
        run("honest", "--records", stored, "--images", 20, "--only", "6,22,36", "--json").stdout
    )
    assert document["images"] == 20
    assert [row["light"] for row in document["checks"]] == ["green"] * 3


def test_a_reported_number_that_the_rows_do_not_bear_out_is_red(stored):
    path = stored / "records.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(
        "".join(json.dumps({**row, "value": 1.0, "low": 0.9, "high": 1.0}) + "\n" for row in rows)
    )
    document = json.loads(run("honest", "--records", stored, "--only", "32,34", "--json").stdout)
    assert [row["light"] for row in document["checks"]] == [
        "red",
        "red",
    ] and "reported 100.0%" in str(document["checks"])


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


def test_perturbations_of_another_classifier_or_world_are_refused(stored):
    done = run("quantised", "--records", stored)
    assert (
        done.exit_code == 2
        and "expected perturbations of quantised, got those of honest." in done.stderr
    )
    done = run("honest", "--world", "cifar10", "--records", stored)
    assert done.exit_code == 2
    assert "expected perturbations of images of cifar10, got those of digits" in done.stderr


@pytest.mark.parametrize(
    "change",
    [
        lambda settings: settings.update(protocol={}),
        lambda settings: settings.update(protocol=None),
        lambda settings: settings["protocol"].update(attacks=5),
        lambda settings: settings.clear(),
    ],
)
def test_a_run_whose_settings_are_damaged_is_bad_input(stored, change):
    path = stored / "settings.json"
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings))
    done = run("honest", "--records", stored, "--only", "36", "--json")
    assert done.exit_code == 2 and json.loads(done.stdout)["error"].startswith("expected ")
    path.write_text("[1]")
    done = run("honest", "--records", stored, "--only", "36", "--json")
    assert done.exit_code == 2 and "expected the settings of a run" in done.stderr


def test_a_budget_is_a_fraction_too():
    done = run("honest", "--only", "25", "--images", 4, "--epsilon", "8/255", "--json")
    assert json.loads(done.stdout)["epsilon"] == 8 / 255


def test_tampered_perturbations_are_red(stored):
    from safetensors.torch import load_file, save_file

    path = stored / "deltas-0.safetensors"
    save_file({"deltas": torch.zeros_like(load_file(path)["deltas"])}, path)
    document = json.loads(run("honest", "--records", stored, "--only", "36", "--json").stdout)
    assert (
        document["checks"][0]["light"] == "red"
        and "100.0% survive" in document["checks"][0]["evidence"]
    )


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["nobody"], "expected one of ['honest', 'quantised', 'noisy', 'cnn'], got 'nobody'."),
        (["honest", "--epsilon", "8"], "did you mean 8/255?"),
        (
            ["honest", "--only", "1,x"],
            "expected numbers of checks with commas between them, such as 1,2,13, got '1,x'.",
        ),
        (["honest", "--only", "41"], "expected checks from 1 to 40, got [41]."),
        (["honest", "--records", "nowhere"], "expected the results of an attack in nowhere"),
        (["honest", "--fresh"], "expected no --fresh for honest, which draws no noise."),
        (["noisy", "--draws", "3"], "expected one draw of noise that is held, got draws=3"),
        (["honest", "--attack", "nothing"], "expected the attack"),
        (["honest", "--attack", "cw", "--norm", "l2"], "told its loss and its steps, such as pgd"),
        (["honest", "--attack", "lagrange"], "climbs whatever it is given, got lagrange."),
        (["honest", "--attack", "stadv"], "expected a norm of flow for stadv, got 'linf'."),
    ],
)
def test_input_that_cannot_be_meant_gets_a_sentence(arguments, sentence):
    done = run(*arguments)
    assert done.exit_code == 2 and sentence in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("diffclass: ")]) == 1
