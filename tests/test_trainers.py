"""The recipes on a tiny world: the same command trains, pauses, resumes and writes a card, in one process or two."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from diffclass.denoisers import network
from diffclass.storage import assets, weights
from diffclass.training import trainers
from diffclass.zoo import networks
from typer.testing import CliRunner

TINY = ["--widths", "16,32", "--batch", "4", "--measured", "2", "--seed", "1"]
# What makes a world of 40 pictures of 16x16 pixels out of CIFAR-10, in this process or another
SMALL = """
import torch
from diffclass import cifar
def small(split="test", limit=None, download=False, progress=True):
    generator = torch.Generator().manual_seed(3 if split == "train" else 4)
    labels = torch.arange(40) % 10
    images = torch.rand((40, 3, 16, 16), generator=generator) * 0.2 + labels[:, None, None, None] / 15
    return images[:limit], labels[:limit]
cifar.cifar10 = small
"""


@pytest.fixture
def small_cifar(monkeypatch):
    from diffclass.data import cifar

    before = cifar.cifar10
    exec(SMALL, {})
    yield
    cifar.cifar10 = before


def diffclass(*arguments):
    from diffclass import cli

    done = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def weights_in(path):
    return network.load_denoiser(path)[0].state_dict()


@pytest.fixture
def teacher(small_cifar, tmp_path):
    """A folder with a teacher of four steps, and what the command said."""
    done = diffclass(
        "--json", "train", "cifar10", "--steps", 4, "--teacher-only", "--out", tmp_path, *TINY
    )
    assert done.exit_code == 0, done.stderr
    return tmp_path, json.loads(done.stdout)


def test_the_card_says_what_was_done(teacher):
    folder, said = teacher
    denoiser, card = network.load_denoiser(folder / trainers.CIFAR_TEACHER)
    assert said["models"][0]["card"] == card
    assert (
        card["images_seen"] == 16 and card["settings"]["batch"] == 4 and card["accuracy"]["n"] == 2
    )
    assert card["precision"] == "bf16" and card["settings"]["config"]["widths"] == [16, 32]
    assert denoiser.has_null and denoiser.image_shape == (3, 16, 16)
    assert assets.parts(trainers.CIFAR_TEACHER, os.listdir(folder)) and not list(
        (folder / "checkpoints").iterdir()
    )
    stored = {
        v.dtype
        for v in __import__("safetensors.torch")
        .torch.load_file(folder / trainers.CIFAR_TEACHER)
        .values()
        if v.is_floating_point()
    }
    assert stored == {torch.float16}


def test_a_contrastive_network_is_trained_without_a_teacher_and_watched(small_cifar, tmp_path):
    done = diffclass(
        "train",
        "cifar10",
        "--method",
        "contrastive",
        "--steps",
        3,
        "--out",
        tmp_path,
        "--widths",
        "16",
        *TINY[2:],
    )
    assert done.exit_code == 0, done.stderr
    denoiser, card = network.load_denoiser(tmp_path / networks.CONTRASTIVE["cifar10"])
    assert denoiser.one_call and denoiser.has_null and denoiser.network.config["width"] == 16
    assert card["contrastive"] and card["command"] == "diffclass train cifar10 --method contrastive"
    assert [(point["images"], point["n"]) for point in card["curve"]] == [
        (4, 40),
        (8, 40),
        (12, 40),
    ]


def test_a_paused_run_goes_on_and_ends_where_an_unbroken_one_does(teacher, tmp_path_factory):
    folder = teacher[0]
    paused = tmp_path_factory.mktemp("paused")
    command = ["train", "cifar10", "--steps", 4, "--teacher-only", "--out", paused, *TINY]
    seen = 0
    while not (paused / trainers.CIFAR_TEACHER).exists():
        done = diffclass(
            *command, "--minutes", 0.01
        )  # 0.6 s: some steps, not all of them, on most machines
        assert done.exit_code == 0, done.stderr
        seen += 1
    assert seen <= 4
    for name, value in weights_in(folder / trainers.CIFAR_TEACHER).items():
        assert torch.equal(value, weights_in(paused / trainers.CIFAR_TEACHER)[name]), name


def test_minutes_pause_with_a_checkpoint(small_cifar, tmp_path):
    run = trainers.train(
        trainers.CIFAR_TEACHER,
        tmp_path,
        steps=4,
        batch=4,
        widths=(16, 32),
        minutes=1e-9,
        measured=2,
    )
    assert [p.step for p in run] == [1]
    assert (tmp_path / "checkpoints" / trainers.CIFAR_TEACHER).exists()
    assert not (tmp_path / trainers.CIFAR_TEACHER).exists()


def test_a_resume_with_other_settings_is_refused(small_cifar, tmp_path):
    options = dict(batch=4, widths=(16, 32), minutes=1e-9, measured=2)
    list(trainers.train(trainers.CIFAR_TEACHER, tmp_path, steps=4, **options))
    with pytest.raises(ValueError, match=r"\['steps'\] differ; delete it to start afresh"):
        list(trainers.train(trainers.CIFAR_TEACHER, tmp_path, steps=5, **options))
    with pytest.raises(ValueError, match="holds another architecture"):
        list(
            trainers.train(
                trainers.CIFAR_TEACHER, tmp_path, steps=4, **{**options, "widths": (16, 16)}
            )
        )


def test_the_student_copies_every_head_of_the_teacher(teacher):
    folder, _ = teacher
    done = diffclass("train", "cifar10", "--steps", 3, "--student-only", "--out", folder, *TINY)
    assert done.exit_code == 0, done.stderr
    student, card = network.load_denoiser(folder / trainers.CIFAR_STUDENT)
    assert card["teacher"] == trainers.CIFAR_TEACHER and student.has_null
    assert student(torch.zeros(1, 3, 16, 16), 1.0).shape == (1, 10, 3, 16, 16)


def test_a_student_without_a_teacher_gets_a_sentence(small_cifar, tmp_path):
    done = diffclass("train", "cifar10", "--student-only", "--out", tmp_path, *TINY)
    assert done.exit_code == 2 and trainers.CIFAR_TEACHER in done.stderr


def test_the_monitor_keeps_its_points_in_the_card(small_cifar, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    recipe = trainers.RECIPES[trainers.CIFAR_TEACHER]
    monkeypatch.setitem(
        trainers.RECIPES, trainers.CIFAR_TEACHER, replace(recipe, monitored=2, compiled=False)
    )
    list(
        trainers.train(
            trainers.CIFAR_TEACHER, tmp_path, steps=3, batch=4, widths=(16, 32), measured=2
        )
    )
    curve = network.load_denoiser(tmp_path / trainers.CIFAR_TEACHER)[1]["curve"]
    assert [p["images"] for p in curve] == [4, 8, 12] and all(
        0 <= p["correct"] <= p["n"] == 2 for p in curve
    )


def test_two_processes_train_one_network(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(SMALL + "import sys\nfrom diffclass.cli import main\nmain()\n")
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(script),
    ]
    done = subprocess.run(
        [
            *command,
            "train",
            "cifar10",
            "--steps",
            "3",
            "--teacher-only",
            "--out",
            str(tmp_path / "o"),
            *TINY,
        ],
        env=env,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    card = network.load_denoiser(tmp_path / "o" / trainers.CIFAR_TEACHER)[1]
    assert card["processes"] == 2 and card["images_seen"] == 12


def test_the_student_is_small_and_the_count_of_flops_is_torch_s():
    student = network.build(
        "MultiHeadDenoiser",
        "UNet",
        10,
        (3, 32, 32),
        **trainers.RECIPES[trainers.CIFAR_STUDENT].config,
    )
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        student(torch.zeros(1, 3, 32, 32), 1.0)
    own = counter.get_total_flops()
    assert own <= 1e9
    teacher = trainers.step_flops(trainers.CIFAR_TEACHER) / 3
    assert trainers.step_flops(trainers.CIFAR_STUDENT) == pytest.approx(3 * own + 11 * teacher)


def test_speed_is_a_share_of_a_measured_peak():
    speed = trainers.Speed(images=1000, flops=2e9, peak=8e12)
    assert str(speed) == "1,000 images/s, 2 TFLOP/s, 25% of the matrix peak"
    assert 1e8 < trainers.matrix_peak("fp32", size=1024, seconds=0.05) < 1e16


def test_the_digits_recipes_are_those_of_the_cards():
    for name in (networks.TEACHER, networks.STUDENT):
        card = weights.card(assets.folder() / name)
        recipe = trainers.RECIPES[name]
        assert {k: card["settings"][k] for k in ("steps", "batch", "rate")} == {
            k: getattr(recipe, k) for k in ("steps", "batch", "rate")
        }


@pytest.mark.parametrize("method, widths", [("idc", ("--widths", "32,32")), ("idc-small", ())])
def test_idc_is_trained_on_photographs_by_the_same_command(small_cifar, tmp_path, method, widths):
    from diffclass.classifiers import idc

    options = (
        "train",
        "cifar10",
        "--method",
        method,
        "--batch",
        4,
        *widths,
        "--measured",
        10,
        "--out",
        tmp_path,
    )
    done = diffclass("--json", *options, "--steps", 3)
    assert done.exit_code == 0, done.stderr
    file = idc.FILES["cifar10"][method == "idc-small"]
    translator, card = idc.load_translator(tmp_path / file)
    assert card["accuracy"]["n"] == 10 and card["recipe"]["config"] == (
        {"widths": [32, 32]} if widths else {}
    )
    assert (
        "CIFAR-10" in card["data"]
        and card["command"] == f"diffclass train cifar10 --method {method}"
    )
    assert translator.image_shape == (3, 16, 16) and translator.num_classes == 10
    with torch.no_grad():
        logits = idc.TranslationClassifier(translator)(
            torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        )
    assert logits.shape == (2, 10) and bool(torch.isfinite(logits).all())
