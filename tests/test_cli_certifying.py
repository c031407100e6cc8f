"""`diffclass certify` and `verify` of what it leaves: stored, resumed, refused, and wrong when tampered with."""

import json

import pytest
from diffclass import cli
from diffclass.evaluation import certification
from typer.testing import CliRunner

PLANE = (
    "certify",
    "exact",
    "--world",
    "plane:gaussians",
    "--sigma",
    0.05,
    "--limit",
    4,
    "--votes",
    400,
    "--radii",
    "0.02,0.05",
)


def run(*arguments):
    return CliRunner().invoke(
        cli.app, [str(argument) for argument in arguments], prog_name="diffclass"
    )


def sentence(done) -> str:
    """The one line that a failed command says."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("diffclass: ")]
    assert done.exit_code == 2 and len(lines) == 1 and "Traceback" not in done.output
    return lines[0]


@pytest.fixture
def store(tmp_path):
    """A finished run."""
    assert run(*PLANE, "--store", tmp_path / "run").exit_code == 0
    return tmp_path / "run"


def test_certificates_are_stored_recorded_and_verified(tmp_path):
    folder = tmp_path / "run"
    done = run("--json", *PLANE, "--store", folder)
    assert done.exit_code == 0
    content = json.loads(done.stdout)
    assert [record["settings"]["radius"] for record in content["records"]] == [0.0, 0.02, 0.05]
    assert all(record["n"] == 4 for record in content["records"])
    kept = certification.kept(folder)
    assert [record.value for record in kept] == [record["value"] for record in content["records"]]
    checked = run("--json", "verify", folder)
    assert checked.exit_code == 0
    verdict = json.loads(checked.stdout)
    assert verdict["stands"] and verdict["recounted"] == 4 and verdict["faults"] == []


def test_the_same_command_goes_on(store):
    path = store / "votes-0.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    path.write_text(whole[0] + whole[1][:30])
    assert run(*PLANE, "--store", store).exit_code == 0
    again = [{**json.loads(line), "seconds": 0} for line in path.read_text().splitlines()]
    assert again == [{**json.loads(line), "seconds": 0} for line in whole]


def test_a_tampered_run_does_not_stand(store):
    path = store / "votes-0.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["radius"] += 0.01
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("verify", store)
    assert done.exit_code == 1 and "WRONG" in done.stdout and "does not stand" in done.stdout


@pytest.mark.parametrize(
    "more, words",
    [
        (("--alpha", 0), "alpha"),
        (("--bound", "both"), "the bound"),
        (("--radii", "3"), "can certify at sigma"),
        (("--sigma", -1), "sigma"),
        (("--precision", "fp8"), "precision"),
    ],
)
def test_options_that_cannot_be_meant_end_in_one_sentence(tmp_path, more, words):
    done = run(*PLANE, "--store", tmp_path / "run", *more)
    assert words in sentence(done)
    assert not list(tmp_path.glob("run/votes-*"))


@pytest.mark.parametrize(
    "more, word",
    [(("--alpha", "nan"), "finite"), (("--radii", "0.1,x"), "commas"), (("--votes", 0), "--votes")],
)
def test_options_that_are_no_such_values_are_refused_as_usage(tmp_path, more, word):
    done = run(*PLANE, "--store", tmp_path / "run", *more)
    assert done.exit_code == 2 and word in done.output and "Traceback" not in done.output


def test_other_settings_leave_a_folder_alone(store):
    before = (store / "votes-0.jsonl").read_text()
    assert "differ" in sentence(run(*PLANE, "--store", store, "--alpha", 0.01))
    assert (store / "votes-0.jsonl").read_text() == before


def test_a_name_that_does_not_exist_lists_what_can_be_smoothed(tmp_path):
    done = run("certify", "nobody", *PLANE[2:], "--store", tmp_path / "run")
    assert "epndc" in sentence(done)


def test_the_list_names_classifiers_of_noised_pictures():
    content = json.loads(run("list", "--json").stdout)
    noised = {entry["name"]: entry for entry in content["noised"]}
    assert "epndc" in noised and "plane" in noised["exact"]["worlds"]
    assert "certify CLASSIFIER" in run("list").stdout


def test_soft_votes_are_certified_and_verified(tmp_path):
    soft = ("certify", "one-call-noised", *PLANE[2:], "--bound", "betting")
    done = run("--json", *soft, "--store", tmp_path / "run")
    content = json.loads(done.stdout)
    assert all("soft votes" in record["what"] for record in content["records"])
    assert content["records"][0]["settings"]["plan"]["bound"] == "betting"
    verdict = json.loads(run("--json", "verify", tmp_path / "run").stdout)
    assert verdict["stands"] and verdict["recounted"] == 4
    path = tmp_path / "run" / "votes-0.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["estimation"] = [[1000, sum(count for _, count in rows[0]["estimation"])]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("verify", tmp_path / "run").exit_code == 1


@pytest.mark.parametrize("name", ["nearest-head", "vote"])
def test_what_has_no_probabilities_is_refused_in_one_sentence(tmp_path, name):
    done = run("certify", name, *PLANE[2:], "--bound", "bernstein", "--store", tmp_path / "run")
    assert "log-probabilities" in sentence(done)
