"""`diffclass train WORLD --method M`: trains, pauses, resumes, and refuses what does not apply."""

import json
from dataclasses import replace

import pytest
import torch
from diffclass import cli, data
from diffclass.classifiers import cnn, joint
from diffclass.data import cifar
from diffclass.storage import assets
from diffclass.zoo import networks
from typer.testing import CliRunner

TINY = ["--widths", "8,16", "--batch", "16", "--measured", "4", "--seed", "1"]
# A method, and widths of a small network of its kind.
METHODS = {
    "cnn": "8,16",
    "adversarial": "8,16",
    "wide": "8,16",
    "adversarial-wide": "8,16",
    "vit": "12",
    "jem": "8,16",
}
FILES = {
    world: networks.BASELINES[world] | {"jem": networks.JOINT[world]}
    for world in networks.BASELINES
}


@pytest.fixture(autouse=True)
def worlds(monkeypatch, tmp_path):
    """Digits with a small test set, a CIFAR-10 of 12 pictures of noise, and assets of this test alone."""
    world = data.digits()
    small = replace(world, test_images=world.test_images[:8], test_labels=world.test_labels[:8])
    noise = torch.rand((12, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(data, "digits", lambda: small)
    monkeypatch.setattr(cifar, "cifar10", lambda split: (noise, torch.arange(12) % 10))
    monkeypatch.setenv("DIFFCLASS_ASSETS", str(tmp_path / "assets"))


def run(*arguments):
    done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert "Traceback" not in done.output
    return done


def one_sentence(done, *words) -> bool:
    """Whether stderr ends in one line of ours with these words, and says nothing else of ours."""
    ours = [line for line in done.stderr.splitlines() if line.startswith("diffclass: ")]
    return len(ours) == 1 and all(word in ours[0] for word in words)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("world", ["digits", "cifar10"])
def test_train_writes_network_card_and_checksum(tmp_path, world, method):
    options = ["--steps", 2, "--widths", METHODS[method], *TINY[2:]]
    done = run("--json", "train", world, "--method", method.upper(), *options)
    assert done.exit_code == 0 and "loss" in done.stderr, done.stderr
    (model,) = json.loads(done.stdout)["models"]
    load = joint.load if method == "jem" else cnn.load
    classifier, card = load(assets.verified(FILES[world][method]))
    assert model == dict(file=str(tmp_path / "assets" / FILES[world][method]), card=card)
    assert classifier.image_shape[0] == {"digits": 1, "cifar10": 3}[world]
    assert (
        card["settings"]["seed"] == 1
        and card["settings"]["steps"] == 2
        and card["images_seen"] == 32
    )
    assert (card["recipe"]["inner"] is not None) == method.startswith("adversarial")
    assert card["accuracy"]["n"] == 4
    config = card["settings"]["config"]
    config = config.get("inner", config)
    if method.endswith("vit"):
        assert config["network"] == "AttentionClassifier" and config["width"] == 12
    else:
        assert config["widths"] == [8, 16]
    assert card["command"] == f"diffclass train {world} --method {method}"
    assert not list((tmp_path / "assets" / "checkpoints").iterdir())


def test_attention_is_trained_on_attacked_pictures_from_weights_that_know_clean_ones(tmp_path):
    options = ("--steps", 2, *TINY[2:])
    command = ("train", "digits", "--method", "adversarial-vit", *options)
    done = run(*command)
    assert done.exit_code == 2 and one_sentence(done, "expected weights at digits-vit")
    run("train", "digits", "--method", "vit", "--widths", "12", *options)
    done = run(*command, "--widths", "12")
    assert done.exit_code == 2 and one_sentence(done, "no widths", "goes on from digits-vit")
    done = run("--json", *command)
    assert done.exit_code == 0, done.stderr
    (model,) = json.loads(done.stdout)["models"]
    assert model["card"]["start"] == "digits-vit.safetensors"
    assert model["card"]["recipe"]["inner"]["steps"] == 7
    before, after = (
        cnn.load(assets.verified(FILES["digits"][method]))[0].enter.weight
        for method in ("vit", "adversarial-vit")
    )
    assert 0 < float((before - after).abs().max()) < 0.02


def test_train_says_both_accuracies(tmp_path):
    done = run(
        "train", "digits", "--method", "cnn", "--steps", 1, "--out", tmp_path / "out", *TINY[:4]
    )
    assert done.exit_code == 0 and done.stdout.count("of 8, 95 % Clopper-Pearson") == 2
    assert "at most" in done.stdout and "under PGD-20 in linf 0.1, 16 images in" in done.stdout
    assert not (tmp_path / "assets" / networks.BASELINES["digits"]["cnn"]).exists()


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_keeps_the_checkpoint_of_this_network_and_resumes_to_the_bit(
    tmp_path, interrupt, as_json
):
    """Ctrl-C during the second step of four, beside the checkpoint of another network."""
    name = networks.BASELINES["digits"]["adversarial"]
    out = tmp_path / "out"
    command = [
        *["--json"] * as_json,
        "train",
        "digits",
        "--method",
        "adversarial",
        "--steps",
        4,
        *TINY,
        "--out",
    ]
    assert run(*command, tmp_path / "unbroken").exit_code == 0
    (out / "checkpoints").mkdir(parents=True)
    (out / "checkpoints" / networks.BASELINES["cifar10"]["cnn"]).write_text("of another run")
    begun = interrupt()
    done = run(*command, out)
    assert done.exit_code == 130 and one_sentence(done, str(out / "checkpoints" / name), "resumes")
    assert (out / "checkpoints" / name).exists() and not (out / name).exists()
    assert run(*command, out).exit_code == 0 and begun == [0, 1, 2, 3]
    one, other = (
        cnn.load(folder / name)[0].state_dict() for folder in (out, tmp_path / "unbroken")
    )
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert [p.name for p in (out / "checkpoints").iterdir()] == [
        networks.BASELINES["cifar10"]["cnn"]
    ]


def test_a_pause_and_the_same_command_goes_on(tmp_path):
    command = ["--json", "train", "digits", "--method", "cnn", "--steps", 200, *TINY]
    done = run(*command, "--pause", 0.01)
    kept = tmp_path / "assets" / "checkpoints" / networks.BASELINES["digits"]["cnn"]
    assert done.exit_code == 0 and json.loads(done.stdout)["paused"] == str(kept) and kept.exists()
    assert run(*command).exit_code == 0 and not kept.exists()


@pytest.mark.parametrize(
    "world, method, widths",
    [
        ("digits", "cnn", "8,16"),
        ("cifar10", "contrastive", "16"),
        ("cifar10", "idc", "32,32"),
    ],
)
def test_minutes_are_a_whole_run(tmp_path, world, method, widths):
    """Of 0.6 seconds of training: its card says how long it was to be, and was, and how to make it again."""
    command = ["--json", "train", world, "--method", method, "--minutes", 0.01, "--batch", 4]
    done = run(*command, "--measured", 4, "--widths", widths)
    assert done.exit_code == 0, done.stderr
    (model,) = json.loads(done.stdout)["models"]
    card = model["card"]
    assert card["settings"]["minutes"] == 0.01 and card["seconds"] >= 0.6
    assert card["command"].endswith(f"--method {method} --minutes 0.01")
    assert card["images_seen"] >= 4 and not list((tmp_path / "assets" / "checkpoints").iterdir())


def test_steps_and_minutes_are_not_both_the_length_of_a_run():
    done = run("train", "digits", "--method", "cnn", "--steps", 4, "--minutes", 1)
    assert done.exit_code == 2 and one_sentence(done, "in steps or in minutes", "got 4 steps")


def test_a_longer_run_says_how_fast_it_is():
    done = run("train", "digits", "--method", "cnn", "--steps", 12, *TINY)
    assert done.exit_code == 0 and "% of the matrix peak" in done.stderr


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            ("digits", "--method", "cnn", "--teacher-only"),
            ("--teacher-only", "--method cnn", "one network"),
        ),
        (
            ("cifar10", "--method", "adversarial", "--student-only"),
            ("--student-only", "--method adversarial"),
        ),
        (("digits", "--method", "idc", "--teacher-only"), ("--teacher-only", "--method idc")),
        (("digits", "--method", "gan"), ("'cnn'", "'adversarial'", "'gan'")),
        (("mars", "--method", "cnn"), ("'digits'", "'cifar10'", "'mars'")),
        (("mars",), ("--method diffusion", "'digits'", "'cifar10'", "'mars'")),
        (("digits", "--method", "idc-small"), ("--method idc-small", "'cifar10'", "'digits'")),
        (("digits", "--method", "cnn", "--widths", "wide"), ("multiples of 4", "'wide'")),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_options_that_do_not_apply_get_a_sentence(arguments, words, as_json):
    done = run(*["--json"] * as_json, "train", *arguments, "--steps", 1)
    assert done.exit_code == 2 and one_sentence(done, *words)
    assert (
        all(word in json.loads(done.stdout)["error"] for word in words)
        if as_json
        else done.stdout == ""
    )


def test_another_recipe_does_not_resume(tmp_path):
    """A checkpoint of other settings is refused, not mixed with new ones."""
    run("train", "digits", "--method", "cnn", "--steps", 300, *TINY, "--pause", 0.01)
    done = run("train", "digits", "--method", "cnn", "--steps", 200, *TINY)
    assert done.exit_code == 2 and one_sentence(done, "['steps'] differ")
