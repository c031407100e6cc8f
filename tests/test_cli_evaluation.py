"""`diffclass evaluate --attack` and `diffclass verify`: stored, resumed, refused, and found out when tampered with."""

import json
import shutil

import pytest
import torch
from diffclass import cli, data, zoo
from diffclass.classifiers import cnn
from diffclass.evaluation import protocols, robustness
from diffclass.storage import assets, results
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

CNN = "digits-cnn.safetensors"
TRAINED = ("--world", "digits", "--defence", "cnn", "--limit", 6)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A plain classifier of digits after a second of training, listed in its folder."""
    folder = tmp_path_factory.mktemp("networks")
    world = data.digits()
    model = cnn.ConvClassifier((1, 8, 8), 10, widths=(8, 8), seed=1)
    optimiser = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(40):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(
            model(world.train_images[:400]), world.train_labels[:400]
        ).backward()
        optimiser.step()
    cnn.save(model, folder / CNN)
    assets.record([CNN], folder)
    return folder


@pytest.fixture
def weights(tmp_path, networks, monkeypatch):
    shutil.copytree(networks, tmp_path / "assets")
    monkeypatch.setenv("DIFFCLASS_ASSETS", str(tmp_path / "assets"))
    return tmp_path / "assets"


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
def store(weights, tmp_path):
    """A finished run."""
    done = run("evaluate", "--attack", "paper", *TRAINED, "--store", tmp_path / "run")
    assert done.exit_code == 0
    return tmp_path / "run"


def test_an_attack_is_stored_recorded_and_verified(weights, tmp_path):
    store = tmp_path / "run"
    file = tmp_path / "all.jsonl"
    done = run(
        "--json",
        "evaluate",
        "--attack",
        "paper",
        *TRAINED,
        "--norm",
        "l2",
        "--epsilon",
        0.05,
        "--store",
        store,
        "--record",
        file,
    )
    content = json.loads(done.stdout)
    clean, bound, *alone = content["records"]
    assert done.exit_code == 0 and "6/6" in done.stderr
    assert (
        "paper protocol, l2 0.05" in bound["what"]
        and "upper bound" in bound["what"]
        and len(alone) == 1
    )
    assert bound["settings"]["chosen"] == repr(protocols.paper("cnn", "l2", 0.05))
    assert (
        bound["checkpoint"] == results.sha256_of(weights / CNN)
        and 0 < bound["value"] <= clean["value"]
    )
    assert [r.what for r in results.read(file)] == [
        r.what for r in results.read(store / "records.jsonl")
    ]
    assert robustness.read(store).finished == 6
    done = run("--json", "verify", store)
    content = json.loads(done.stdout)
    assert (
        done.exit_code == 0
        and content["stands"]
        and content["images"] == 6
        and content["faults"] == []
    )
    done = run("verify", store)
    assert (
        done.exit_code == 0
        and "stands: 6 of 6 pictures" in done.stdout
        and bound["what"] in done.stdout
    )


def test_the_budget_of_the_world_is_the_default_and_a_run_resumes(store):
    before = {
        path.name: path.read_bytes() for path in store.glob("*s*") if path.name != "records.jsonl"
    }
    assert robustness.read(store).protocol.epsilon == zoo.budget("digits", "linf")
    shutil.copy(store / "rows.jsonl", store / "whole")
    (store / "records.jsonl").unlink()
    done = run("evaluate", "--attack", "paper", *TRAINED, "--store", store)
    assert done.exit_code == 0 and before == {name: (store / name).read_bytes() for name in before}
    assert len(results.read(store / "records.jsonl")) == 3 and "rows.jsonl" in before


def test_the_plane_is_attacked_without_weights(tmp_path):
    options = ("--world", "plane:moons", "--limit", 2, "--store")
    done = run(
        "evaluate",
        "--attack",
        "honest",
        "--defence",
        "DC",
        *options,
        tmp_path / "run",
        "--epsilon",
        0.01,
    )
    assert done.exit_code == 0 and "worst of 10 draws" in done.stdout
    assert run("verify", tmp_path / "run").exit_code == 0
    assert "at least 3 classes" in sentence(
        run("evaluate", "--attack", "paper", *options, tmp_path / "paper")
    )


def test_a_tampered_claim_exits_1_and_names_the_image(store):
    path = store / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[4]["hits"] = 1 - rows[4]["hits"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("verify", store)
    assert (
        done.exit_code == 1
        and "WRONG      image 4: perturbed" in done.stdout
        and "does not stand" in done.stdout
    )
    content = json.loads(run("--json", "verify", store).stdout)
    assert not content["stands"] and any(fault.startswith("image 4") for fault in content["faults"])


def test_an_oversize_perturbation_exits_1(store):
    path = store / "deltas-0.safetensors"
    deltas = load_file(path)["deltas"].float()
    deltas[2] = torch.full_like(deltas[2], 0.11)
    save_file({"deltas": deltas}, path)
    done = run("verify", store)
    assert done.exit_code == 1 and "image 2: the perturbation's linf size is 0.11" in done.stdout


def test_other_weights_exit_1(store, weights):
    cnn.save(cnn.ConvClassifier((1, 8, 8), 10, widths=(8, 8), seed=9), weights / CNN)
    assets.record([CNN], weights)
    done = run("verify", store)
    assert done.exit_code == 1 and f"WRONG      weights {CNN}: the claim is about" in done.stdout


def test_what_cannot_be_verified_gets_a_sentence(store, tmp_path):
    assert "found no settings.json" in sentence(run("verify", tmp_path / "nothing"))
    (store / "records.jsonl").unlink()
    assert "expected records in" in sentence(run("verify", store))


def test_bad_input_gets_a_sentence(weights, tmp_path, store):
    attack = ("evaluate", "--attack", "paper", *TRAINED)
    new = ("--store", tmp_path / "new")
    assert "expected --store FOLDER with --attack" in sentence(run(*attack))
    assert "did you mean 8/255" in sentence(run(*attack, *new, "--epsilon", 8))
    assert "the norm" in sentence(run(*attack, *new, "--norm", "l1"))
    assert "the attack" in sentence(run("evaluate", "--attack", "pgd", *TRAINED, *new))
    assert "the defence of digits" in sentence(run(*attack, *new, "--defence", "gan"))
    assert "got 'vote'" in sentence(
        run(
            "evaluate",
            "--attack",
            "paper",
            "--world",
            "plane:moons",
            "--limit",
            2,
            "--defence",
            "vote",
            *new,
        )
    )
    assert "--method adversarial" in sentence(run(*attack, *new, "--defence", "adversarial"))
    assert "the defence's name decides" in sentence(run(*attack, *new, "--levels", 4))
    assert "'seed'] differ" in sentence(run(*attack, "--store", store, "--seed", 1))
    assert not (tmp_path / "new").exists()
