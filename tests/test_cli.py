"""The command `diffclass`: pure JSON, exit codes, one sentence for every error, and nothing done that is lost."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from diffclass import __version__, cli, data, noise
from diffclass.classifiers.base import Held
from diffclass.data import cifar
from diffclass.denoisers import network
from diffclass.evaluation import accuracies
from diffclass.storage import assets, files, results
from diffclass.training import loop, recipes
from diffclass.zoo import networks
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

COMMANDS = (
    "lab",
    "explore",
    "doctor",
    "download",
    "convert",
    "train",
    "classify",
    "sample",
    "evaluate",
    "compare",
    "verify",
    "list",
    "audit",
    "certify",
    "compare-votes",
    "compare-costs",
    "scoreboard",
    "readme",
    "html",
)
ACCURACY = dict(correct=396, n=400, low=0.975, high=0.997)


@pytest.fixture(scope="module")
def small_digits():
    """The digits with a small test set: measuring is not what is tested here."""
    world = data.digits()
    return replace(world, test_images=world.test_images[:12], test_labels=world.test_labels[:12])


@pytest.fixture(scope="module")
def network_folder(tmp_path_factory, small_digits):
    """Both networks with their first weights, in one folder with its checksums."""
    folder = tmp_path_factory.mktemp("networks")
    for name in networks.MODELS["digits"].values():
        denoiser = recipes.RECIPES[name].build(recipes.Beginning((1, 8, 8), 10, seed=1))
        card = dict(accuracy=ACCURACY) if name == networks.STUDENT else {}
        network.save_denoiser(denoiser, folder / name, card)
    assets.record(list(networks.MODELS["digits"].values()), folder)
    return folder


@pytest.fixture
def folder(tmp_path, network_folder, small_digits, monkeypatch):
    """A copy of the networks that the command takes for its assets, and no CIFAR-10."""
    shutil.copytree(network_folder, tmp_path / "assets")
    monkeypatch.setenv("DIFFCLASS_ASSETS", str(tmp_path / "assets"))
    monkeypatch.setenv("DIFFCLASS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DIFFCLASS_CIFAR10", raising=False)
    monkeypatch.setattr(data, "digits", lambda: small_digits)
    return tmp_path / "assets"


@pytest.fixture
def picture(tmp_path, small_digits):
    """A test digit as an 80x80 PNG."""
    return save_picture(tmp_path / "digit.png", small_digits.test_images[0, 0])


def save_picture(path: Path, image) -> Path:
    from PIL import Image

    pixels = (image.numpy() * 255).round().astype("uint8")
    Image.fromarray(pixels).resize((80, 80), Image.Resampling.NEAREST).save(path)
    return path


def run(*arguments):
    done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert "Traceback" not in done.output
    return done


def document(done):
    """The one JSON document on stdout: anything beside it would not parse."""
    return json.loads(done.stdout)


def one_sentence(done, *words):
    lines = [line for line in done.stderr.splitlines() if line.startswith("diffclass: ")]
    return len(lines) == 1 and lines[0].endswith(".") and all(word in lines[0] for word in words)


# ---------------------------------------------------------------------------------------------------------------------
# The command as such


def test_help_and_version_import_nothing_heavy():
    code = (
        "import sys, time; start = time.perf_counter(); from diffclass import cli\n"
        "try:\n    cli.app(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'sklearn', 'scipy', 'PIL'} & set(sys.modules), 'heavy'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    words = (*COMMANDS, "Exit codes", "130")
    assert all(word in done.stdout for word in words)
    assert run("--version").stdout == f"diffclass {__version__}\n"


def test_every_command_is_tested_here():
    registered = {
        command.name or command.callback.__name__ for command in cli.app.registered_commands
    }
    assert registered == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_names_the_exit_codes(name):
    done = run(name, "--help")
    assert done.exit_code == 0 and " ".join(cli.EXIT_CODES.split()) in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ("evaluate", "--levels", "0"),
        ("evaluate", "--limit", "-1"),
        ("classify",),
        ("nonsense",),
        ("train", "digits", "--steps", "many"),
    ],
)
def test_bad_options_exit_2_with_nothing_on_stdout(folder, arguments):
    done = run(*arguments)
    assert done.exit_code == 2 and done.stdout == "" and "Usage" in done.stderr


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--json", "evaluate", "--levels", "0"), "'--levels'"),
        (("evaluate", "--limit", "many", "--json"), "'--limit'"),
        (("evaluate", "--seed", "-1", "--json"), "'--seed'"),
        (("evaluate", "--seed", str(2**64), "--json"), "'--seed'"),
        (("evaluate", "--nonsense", "--json"), "--nonsense"),
        (("--nonsense", "--json"), "--nonsense"),
        (("nonsense", "--json"), "'nonsense'"),
        (("classify", "--json"), "pictures"),
        (("--json",), "Missing command"),
    ],
)
def test_bad_options_with_json_are_in_the_document_too(folder, arguments, words):
    done = run(*arguments)
    assert done.exit_code == 2 and "Usage" in done.stderr
    assert set(document(done)) == {"error"} and words in document(done)["error"]


def test_a_picture_called_json_is_a_picture(folder, picture):
    done = run("classify", "--", picture, "--json")
    assert (
        done.exit_code == 2
        and "posterior" in done.stdout
        and one_sentence(done, "--json: ", "no such file")
    )


def test_train_idc_writes_its_network(folder, tmp_path, monkeypatch):
    from diffclass.classifiers import idc

    done = run(
        "train", "digits", "--method", "idc", "--steps", 2, "--out", tmp_path / "idc", "--json"
    )
    assert done.exit_code == 0, done.stderr
    card = document(done)["models"][0]["card"]
    assert idc.load_translator(tmp_path / "idc" / "digits-idc.safetensors")[1] == card


def test_download_without_a_network_says_what_to_do(folder, monkeypatch):
    monkeypatch.setattr(
        cifar.download_cifar10, "__defaults__", (None, "http://127.0.0.1:9/none.tar.gz", False)
    )
    done = run("download", "cifar10", "--json")
    assert done.exit_code == cli.base.FAILED and one_sentence(done, "127.0.0.1:9", "by hand")
    assert document(done)["command"] == "download" and "by hand" in document(done)["error"]


def test_download_of_what_is_there_verifies_it(folder, monkeypatch):
    archive = folder.parent / "cache" / "cifar10" / cifar.ARCHIVE
    archive.parent.mkdir(parents=True)
    archive.write_bytes(b"not the archive")
    done = run("download", "cifar10")
    assert done.exit_code == 2 and one_sentence(done, cifar.ARCHIVE)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("evaluate", "--weighting", "EDN"), ("'EDM'", "'EDN'")),
        (("evaluate", "--model", "professor"), ("'teacher'", "'professor'")),
        (("evaluate", "--world", "mars"), ("'plane'", "'mars'")),
        (("evaluate", "--world", "plane:hole"), ("'moons'", "'hole'")),
        (("evaluate", "--world", "plane"), ("'moons'", "''")),
        (("evaluate", "--world", "digits:moons"), ("'digits:moons'",)),
        (("evaluate", "--world", "plane:moons", "--model", "teacher"), ("exact",)),
        (("classify", "--model", "professor", "x.png"), ("'professor'",)),
        (("train", "digits", "--method", "gan"), ("'idc'", "'gan'")),
        (
            ("train", "digits", "--method", "idc", "--widths", "16,32"),
            ("expected no widths for DigitNet",),
        ),
        (("train", "mars"), ("'digits'", "'cifar10'", "'mars'")),
        (("train", "cifar10"), ("expected CIFAR-10 in", "diffclass download cifar10")),
        (("train", "cifar10", "--widths", "wide"), ("multiples of 4", "'wide'")),
        (("evaluate", "--precision", "fp8"), ("'bf16'", "'fp8'")),
        (("sample", "digits"), ("'cifar10'", "'digits'")),
        (("sample", "cifar10", "--model", "painter"), ("'teacher'", "'painter'")),
        (("sample", "cifar10"), ("cifar10-student.safetensors", "diffclass train cifar10")),
        (("download", "digits"), ("'cifar10'", "'digits'")),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_unknown_names_exit_2_with_one_sentence(folder, arguments, words, as_json):
    done = run(*(["--json"] if as_json else []), *arguments)
    assert done.exit_code == 2 and one_sentence(done, *words)
    if not as_json:
        assert done.stdout == ""
    else:
        assert all(word in document(done)["error"] for word in words)
        assert document(done)["command"] == arguments[0]


def test_lab_starts_jupyterlab_at_the_first_notebook(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "00_start_here.ipynb").touch()
    shutil.copy(cli.ROOT / "lib" / "__main__.py", tmp_path / "lib")
    started = []
    for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(cli.files, "ROOT", tmp_path)
    monkeypatch.setattr(os, "execve", lambda *arguments: started.append(arguments))
    monkeypatch.chdir(tmp_path)
    assert run("lab").exit_code == 0
    ((program, arguments, environment),) = started
    assert program == sys.executable and arguments[:3] == [sys.executable, "-m", "jupyterlab"]
    assert arguments[-1].endswith("00_start_here.ipynb") and environment["HF_HUB_OFFLINE"] == "1"
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE" and environment["OMP_NUM_THREADS"] == "4"
    assert ("--allow-root" in arguments) == (os.geteuid() == 0)


def test_explore_serves_the_explorer_on_this_machine_alone(monkeypatch):
    started = []
    monkeypatch.setattr(os, "execve", lambda *arguments: started.append(arguments))
    assert run("explore", "--port", "8899", "--no-browser").exit_code == 0
    ((program, arguments, environment),) = started
    assert program == sys.executable and arguments[:3] == [sys.executable, "-m", "voila"]
    assert {"--port=8899", "--Voila.ip=127.0.0.1", "--no-browser"} <= set(arguments)
    app = Path(arguments[3])
    assert app.is_file() and (app.parent / "voila/templates/explorer/index.html.j2").is_file()
    assert environment["JUPYTER_PATH"].split(os.pathsep)[0] == str(app.parent)


@pytest.mark.parametrize("command", ["lab", "explore"])
def test_what_opens_the_course_says_so_where_it_is_not(command, tmp_path, monkeypatch):
    monkeypatch.setattr(cli.files, "ROOT", tmp_path)
    done = run(command)
    assert done.exit_code == 2 and one_sentence(done, "00_start_here.ipynb")


# ---------------------------------------------------------------------------------------------------------------------
# The edge: failures of every kind


def raised(monkeypatch, error):
    """`diffclass list` with this error inside."""

    def fail():
        raise error

    monkeypatch.setattr(cli.evaluation, "_attacks", fail)
    return run("list", "--json")


FAULT = "this is a fault of the program and not of what you asked: DIFFCLASS_TRACEBACK=1"


@pytest.mark.parametrize(
    "error, code, words",
    [
        (ValueError("expected a, got b; c"), 2, "expected a, got b; c."),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), 2, "x: No such file."),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 2, "x: Permission denied."),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x"), 2, "x: File name too long."),
        (
            RuntimeError("Could not determine home directory."),
            2,
            "that begins with ~; write it out.",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 3, "x: No space left on device."),
        (OSError("expected 3 bytes, wrote 2"), 3, "expected 3 bytes, wrote 2."),
        (ConnectionError("expected a network, got none"), 3, "expected a network, got none."),
        (files.Busy("expected to be alone"), 3, "expected to be alone."),
        (FloatingPointError("the loss became NaN"), 3, "the loss became NaN."),
        (ModuleNotFoundError("No module named 'scipy'"), 3, "No module named 'scipy'."),
        (MemoryError(), 3, "memory ran out (MemoryError); ask for less at once"),
        (
            RuntimeError("[enforce fail at x] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            3,
            "memory ran out ([enforce fail",
        ),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 3, "the reader of the output left"),
        (RuntimeError("a\n  b"), 3, f"RuntimeError: a b; {FAULT}"),
        (KeyError("attacks"), 3, f"KeyError: 'attacks'; {FAULT}"),
        (TypeError("int + str"), 3, f"TypeError: int + str; {FAULT}"),
        (ZeroDivisionError(), 3, f"ZeroDivisionError: no reason given; {FAULT}"),
        (RecursionError("x" * 1000), 3, f"RecursionError: {'x' * 300}...; {FAULT}"),
        (EOFError(), 3, f"EOFError: no reason given; {FAULT}"),
    ],
)
def test_every_failure_is_one_sentence_one_document_and_one_code(monkeypatch, error, code, words):
    done = raised(monkeypatch, error)
    assert done.exit_code == code and one_sentence(done, words)
    assert document(done) == {
        "command": "list",
        "error": done.stderr.removeprefix("diffclass: ").rstrip("\n"),
    }


def test_the_traceback_is_shown_to_those_who_ask_for_it(monkeypatch):
    monkeypatch.setenv("DIFFCLASS_TRACEBACK", "1")
    monkeypatch.setattr(cli.evaluation, "_attacks", lambda: {}["attacks"])
    done = CliRunner().invoke(cli.app, ["list", "--json"])
    assert done.exit_code == 3 and document(done)["error"].startswith("KeyError: 'attacks'")
    assert "Traceback" in done.stderr and "_attacks()" in done.stderr
    assert one_sentence(done, FAULT)
    monkeypatch.setenv("DIFFCLASS_TRACEBACK", "0")
    assert "Traceback" not in run("list").stderr


def test_an_answer_that_is_no_json_is_a_failure(monkeypatch):
    monkeypatch.setattr(cli.evaluation, "_attacks", lambda: [dict(value=float("nan"))])
    done = run("list", "--json")
    assert done.exit_code == 3 and set(document(done)) == {"command", "error"}
    assert "expected an answer of finite numbers" in document(done)["error"]


def test_what_libraries_print_is_not_in_the_document(monkeypatch):
    monkeypatch.setattr(cli.evaluation, "_attacks", lambda: print("a library speaks") or [])
    done = run("list", "--json")
    assert document(done)["attacks"] == [] and "a library speaks" in done.stderr
    assert document(run("--version", "--json")) == {"version": __version__}
    done = run("list", "--json", "--help")
    assert document(done) == {} and "Usage" in done.stderr


@pytest.mark.parametrize("arguments", [("list",), ("list", "--json"), ("--help",)])
def test_an_output_that_is_full_or_gone_is_one_sentence(arguments):
    """In a process of its own, as Python itself would complain once more at its end."""
    command = [sys.executable, "-m", "diffclass", *arguments]
    if Path("/dev/full").exists():
        with open("/dev/full", "w") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        assert (done.returncode, done.stderr) == (3, "diffclass: No space left on device.\n")
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    sentence = "diffclass: the reader of the output left before its end.\n"
    assert (done.returncode, done.stderr) == (3, sentence)


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes there")
def test_names_that_are_no_utf8_are_shown_with_escapes(folder, picture, tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    shutil.copy(picture, path)
    done = run("classify", path, "--json")
    assert done.exit_code == 0 and done.stdout.isascii()
    assert document(done)["pictures"][0]["file"] == str(path)
    command = [sys.executable, "-m", "diffclass", "classify", path, f"{path}.absent"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "LC_ALL": "C.UTF-8"})
    assert done.returncode == 2 and b"caf\\udce9.png: " in done.stdout
    assert done.stderr.count(b"diffclass: ") == 1 and b"Traceback" not in done.stderr


def test_a_batch_goes_on_after_a_failure_of_any_kind(folder, picture, tmp_path, monkeypatch):
    from diffclass.data import pictures

    load = pictures.load_picture
    failures = [MemoryError(), RuntimeError("a strange file"), None, ValueError("no picture")]

    def failing(*arguments):
        error = failures.pop(0)
        if error is not None:
            raise error
        return load(*arguments)

    monkeypatch.setattr(pictures, "load_picture", failing)
    done = run("classify", "--json", picture, picture, picture, picture)
    assert done.exit_code == 3 and done.stderr.count("diffclass: ") == 3
    verdicts = document(done)["pictures"]
    assert ["error" in verdict for verdict in verdicts] == [True, True, False, True]
    assert "fault of the program" in verdicts[1]["error"] and "error" not in document(done)


def encoded(content) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", ["pt", "pkl", "safetensors"])
@pytest.mark.parametrize("kind", range(9))
def test_convert_refuses_what_is_no_network(folder, tmp_path, kind, suffix):
    import pickle

    import torch

    contents = [
        b"",
        b"not a file of tensors",
        encoded(torch.zeros(3)),
        encoded([1]),
        encoded({1: torch.zeros(2)}),
        encoded({"a": 3}),
        encoded("words"),
        pickle.dumps({"ema": 3}),
        pickle.dumps(os.getcwd),
    ]
    source = tmp_path / f"x.{suffix}"
    source.write_bytes(contents[kind])
    done = run("convert", "--json", source, tmp_path / "o.safetensors")
    assert done.exit_code == 2 and one_sentence(done, "expected") and document(done)["error"]
    assert not (tmp_path / "o.safetensors").exists() and not list(tmp_path.glob("*.part"))


def test_absurd_sizes_are_refused_before_memory_runs_out(folder):
    done = run("evaluate", "--levels", 100_000_000, "--json")
    assert done.exit_code == 2 and "'--levels'" in document(done)["error"]
    done = run("train", "digits", "--minutes", "inf", "--json")
    assert done.exit_code == 2 and "expected a finite number" in document(done)["error"]


def test_a_home_that_does_not_exist_is_bad_input(folder, monkeypatch):
    monkeypatch.setenv("DIFFCLASS_CACHE", "~nouser/x")
    done = run("download", "cifar10", "--json")
    assert done.exit_code == 2 and "begins with ~" in document(done)["error"]


def test_training_on_a_full_disk_keeps_the_old_weights(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(os, "fsync", full_disk)
    done = run("train", "digits", "--steps", 1, "--teacher-only", "--json")
    assert done.exit_code == 3 and one_sentence(done, "No space left on device")
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert after == before and not list(folder.rglob("*.part"))


# ---------------------------------------------------------------------------------------------------------------------
# doctor


def statuses(found):
    return {
        check["name"]: check
        for group in ("device", "worlds", "assets", "packages")
        for check in found[group]
    }


def test_doctor_is_content_and_missing_cifar_is_a_note(folder):
    done = run("doctor")
    assert done.exit_code == 0 and "The digits course can run" in done.stdout
    assert (
        "99.0% [97.5%, 99.7%] (396 of 400" in done.stdout
        and "no accuracy on its model card" in done.stdout
    )
    for arguments in (("--json", "doctor"), ("doctor", "--json")):
        done = run(*arguments)
        checks = statuses(document(done))
        assert (
            done.exit_code == 0
            and document(done)["ok"] is True
            and checks["CIFAR-10"]["status"] == "note"
        )
        assert (
            checks["device"]["threads"] >= 1
            and checks["device"]["type"] in checks["device"]["detail"]
        )
        needed = (*cli.files.PACKAGES, "plane", "digits", *networks.MODELS["digits"].values())
        assert {checks[name]["status"] for name in needed} == {"ok"}
        assert checks[networks.STUDENT]["bytes"] == (folder / networks.STUDENT).stat().st_size


def test_doctor_finds_a_changed_asset(folder):
    path = folder / networks.TEACHER
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    done = run("--json", "doctor")
    checks = statuses(document(done))
    assert done.exit_code == 1 and document(done)["ok"] is False
    assert (checks[networks.TEACHER]["state"], checks[networks.STUDENT]["state"]) == (
        "changed",
        "ok",
    )
    assert "SHA-256" in checks[networks.TEACHER]["detail"] and "problem" in run("doctor").stdout


def test_doctor_finds_a_missing_asset_and_says_how_to_get_it(folder):
    (folder / networks.STUDENT).unlink()
    done = run("--json", "doctor")
    check = statuses(document(done))[networks.STUDENT]
    assert (
        done.exit_code == 1
        and check["state"] == "missing"
        and "diffclass train digits" in check["detail"]
    )
    assert check["bytes"] is None


def test_doctor_finds_a_broken_asset_with_the_right_checksum(folder):
    (folder / networks.STUDENT).write_bytes(b"not weights at all")
    assets.record([networks.STUDENT], folder)
    done = run("--json", "doctor")
    check = statuses(document(done))[networks.STUDENT]
    assert done.exit_code == 1 and check["status"] == "problem" and "safetensors" in check["detail"]


def test_doctor_finds_weights_that_are_not_numbers_with_the_right_checksum(folder):
    path = folder / networks.STUDENT
    with safe_open(path, framework="pt") as opened:
        header = opened.metadata()
    tensors = load_file(path)
    name, value = next((name, value) for name, value in tensors.items() if value.ndim > 1)
    value.flatten()[3] = torch.nan
    save_file(tensors, path, header)
    assets.record([networks.STUDENT], folder)
    done = run("--json", "doctor")
    check = statuses(document(done))[networks.STUDENT]
    assert done.exit_code == 1 and document(done)["ok"] is False
    assert check["status"] == "problem" and "expected finite weights" in check["detail"]
    assert repr(name) in check["detail"]


def test_doctor_survives_a_damaged_list_and_an_empty_folder(folder):
    (folder / assets.SUMS).write_text("one-word\n")
    done = run("--json", "doctor")
    checks = statuses(document(done))
    assert done.exit_code == 1 and checks[assets.SUMS]["status"] == "problem"
    assert (
        checks[networks.TEACHER]["state"] == "unlisted"
        and "'one-word'" in checks[networks.TEACHER]["detail"]
    )
    assert one_sentence(run("classify", "x.png"), "'one-word'", "restore it with git")
    shutil.rmtree(folder)
    done = run("--json", "doctor")
    assert done.exit_code == 1 and statuses(document(done))[networks.TEACHER]["state"] == "missing"


def test_doctor_names_a_missing_package(folder, monkeypatch):
    monkeypatch.setattr(cli.files, "PACKAGES", ("plotly", "no-such-package"))
    done = run("doctor")
    assert (
        done.exit_code == 1
        and "no-such-package. Run" in done.stdout
        and "python3 -m lib lab" in done.stdout
    )


# ---------------------------------------------------------------------------------------------------------------------
# train


def test_train_writes_both_networks_with_cards_and_checksums(folder, tmp_path):
    out = tmp_path / "out"
    done = run("--json", "train", "digits", "--steps", 3, "--out", out, "--seed", 2)
    teacher, student = document(done)["models"]
    assert done.exit_code == 0 and "loss" in done.stderr
    assert (
        Path(teacher["file"]) == out / networks.TEACHER
        and Path(student["file"]) == out / networks.STUDENT
    )
    assert student["card"]["accuracy"]["n"] == 12 and student["card"]["settings"]["steps"] == 3
    assert student["card"]["settings"]["seed"] == 2
    os.environ["DIFFCLASS_ASSETS"] = str(out)  # the fixture restores it
    assert assets.verified(networks.TEACHER).exists() and assets.verified(networks.STUDENT).exists()
    assert not list((out / "checkpoints").iterdir())


def test_train_teacher_only_prints_its_accuracy(folder, tmp_path):
    done = run("train", "digits", "--steps", 1, "--teacher-only", "--out", tmp_path / "out")
    assert done.exit_code == 0 and "of 12, 95 % Clopper-Pearson" in done.stdout
    assert not (tmp_path / "out" / networks.STUDENT).exists()


@pytest.mark.parametrize("as_json", [False, True])
def test_interrupted_training_keeps_its_checkpoint_and_resumes(
    folder, tmp_path, interrupt, as_json
):
    """Ctrl-C during the second step of four: the step is finished, and the resumed run equals an unbroken one."""
    command = ["train", "digits", "--steps", 4, "--teacher-only", "--out"]
    if as_json:
        command.insert(0, "--json")
    assert run(*command, tmp_path / "unbroken").exit_code == 0
    before = signal.getsignal(signal.SIGINT)
    begun = interrupt()
    done = run(*command, tmp_path / "out")
    checkpoint = tmp_path / "out" / "checkpoints" / networks.TEACHER
    assert (
        done.exit_code == 130
        and one_sentence(done, str(checkpoint), "resumes")
        and checkpoint.exists()
    )
    assert document(done)["models"] == [] if as_json else done.stdout == ""
    assert signal.getsignal(signal.SIGINT) is before
    assert run(*command, tmp_path / "out").exit_code == 0
    assert begun == [0, 1, 2, 3] and not checkpoint.exists()
    assert weights(tmp_path / "out").equal(weights(tmp_path / "unbroken"))


def weights(folder: Path):
    import torch

    denoiser = network.load_denoiser(folder / networks.TEACHER)[0]
    return torch.cat([value.flatten() for value in denoiser.state_dict().values()])


def test_interrupted_student_does_not_train_its_teacher_again(folder, tmp_path, monkeypatch):
    """A KeyboardInterrupt that arises inside a step, as from a second Ctrl-C."""
    out = tmp_path / "out"
    step = loop.Training._one_step
    calls = []

    def interrupted(self):
        calls.append(type(self.denoiser).__name__)
        if len(calls) == 6:  # three steps of the teacher, two of the student
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(loop.Training, "_one_step", interrupted)
    command = ("train", "digits", "--steps", 3, "--out", out)
    done = run(*command)
    assert (
        done.exit_code == 130
        and one_sentence(done, networks.STUDENT)
        and networks.TEACHER in done.stdout
    )
    teacher = (out / networks.TEACHER).read_bytes()
    assert run(*command).exit_code == 0
    assert calls == ["ConditionalDenoiser"] * 3 + ["MultiHeadDenoiser"] * 4
    assert (out / networks.TEACHER).read_bytes() == teacher and (out / networks.STUDENT).exists()


def test_resuming_with_other_settings_is_refused_in_one_sentence(folder, tmp_path, monkeypatch):
    def interrupted(self):
        if self.step == 2:
            raise KeyboardInterrupt
        return step(self)

    step = loop.Training._one_step
    monkeypatch.setattr(loop.Training, "_one_step", interrupted)
    command = ("train", "digits", "--teacher-only", "--out", tmp_path, "--steps")
    assert run(*command, 4).exit_code == 130
    done = run(*command, 5)
    assert done.exit_code == 2 and one_sentence(done, "['steps']")


def test_training_into_a_file_is_refused(folder, tmp_path):
    (tmp_path / "out").write_text("a file")
    done = run("train", "digits", "--steps", 1, "--teacher-only", "--out", tmp_path / "out")
    assert done.exit_code == 2 and one_sentence(done, "out")


# ---------------------------------------------------------------------------------------------------------------------
# classify


@pytest.mark.parametrize("model", ["student", "teacher"])
def test_classify_prints_prediction_posterior_and_losses(folder, picture, model):
    done = run("classify", "--model", model, picture)
    assert done.exit_code == 0 and done.stderr == ""
    first, posterior, losses = done.stdout.splitlines()[:3]
    assert (
        first.startswith(f"{picture}: ") and posterior.count("%") == 3 and losses.count(":+") == 10
    )
    (verdict,) = document(run("--json", "classify", "--model", model, picture))["pictures"]
    assert sum(verdict["posterior"]) == pytest.approx(1, abs=1e-5) and len(verdict["losses"]) == 10
    assert (
        verdict["posterior"].index(max(verdict["posterior"]))
        == int(verdict["prediction"])
        == int(first[-1])
    )
    assert verdict["losses"].index(min(verdict["losses"])) == int(verdict["prediction"])


def test_classify_warns_of_what_is_unlike_the_training_data(folder, picture, tmp_path, generator):
    import torch

    static = save_picture(tmp_path / "static.png", torch.rand(8, 8, generator=generator))
    assert "WARNING" in run("classify", static).stdout
    known, unknown = document(run("--json", "classify", picture, static))["pictures"]
    assert unknown["familiarity"]["far"] and not known["familiarity"]["far"]
    assert "WARNING" not in run("classify", picture).stdout


def test_a_broken_file_does_not_stop_the_others(folder, picture, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(picture.read_bytes()[:60])
    done = run("classify", broken, picture, tmp_path / "absent.png", picture)
    errors = done.stderr.splitlines()
    assert done.exit_code == 2 and done.stdout.count("posterior") == 2
    assert len(errors) == 2 and str(broken) in errors[0] and "absent.png" in errors[1]
    done = run("--json", "classify", broken, picture)
    first, second = document(done)["pictures"]
    assert (
        done.exit_code == 2
        and set(first) == {"file", "error"}
        and second["prediction"] in "0123456789"
    )


def test_a_sentence_that_asks_keeps_its_question_mark(folder, picture, monkeypatch):
    from diffclass.data import pictures

    def refuse(*arguments):
        raise ValueError("expected pixels in [0,1],\n got 255; did you forget to divide?")

    monkeypatch.setattr(pictures, "load_picture", refuse)
    done = run("classify", picture)
    assert done.exit_code == 2
    assert (
        done.stderr
        == f"diffclass: {picture}: expected pixels in [0,1], got 255; did you forget to divide?\n"
    )


def test_an_interrupted_classification_keeps_what_it_has(folder, picture, monkeypatch):
    from diffclass.data import pictures

    load = pictures.load_picture
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return load(*arguments)

    monkeypatch.setattr(pictures, "load_picture", interrupted)
    done = run("--json", "classify", picture, picture)
    assert (
        done.exit_code == 130 and len(document(done)["pictures"]) == 1 and "error" in document(done)
    )


@pytest.mark.parametrize("command", [("classify", "x.png"), ("evaluate",)])
def test_missing_and_changed_assets_are_one_sentence(folder, command):
    (folder / networks.STUDENT).write_bytes(b"changed")
    done = run(*command)
    assert done.exit_code == 2 and done.stdout == "" and one_sentence(done, "SHA-256")
    (folder / networks.STUDENT).unlink()
    done = run("--json", *command)
    assert done.exit_code == 2 and "diffclass train digits" in document(done)["error"]


# ---------------------------------------------------------------------------------------------------------------------
# evaluate


def test_evaluate_digits_agrees_with_the_classifier_and_appends_a_record(
    folder, tmp_path, small_digits
):
    file = tmp_path / "records" / "results.jsonl"
    done = run(
        "--json",
        "evaluate",
        "--limit",
        10,
        "--levels",
        4,
        "--weighting",
        "edm",
        "--seed",
        3,
        "--record",
        file,
    )
    (got,) = document(done)["records"]
    denoiser = networks.load_digits_denoiser()
    classifier = networks.digit_classifier(
        denoiser, noise.log_levels(0.1, 3.0, 4), weighting=noise.edm_weight
    )
    held = Held.seeded(classifier, 3)
    wanted = accuracies.accuracy(held, small_digits.test_images[:10], small_digits.test_labels[:10])
    assert (
        done.exit_code == 0
        and got["value"] == wanted / 10
        and got["n"] == 10
        and got["low"] < got["high"]
    )
    assert got["checkpoint"] == results.sha256_of(folder / networks.STUDENT) and got["seed"] == 3
    assert got["settings"]["weighting"] == "EDM" and got["settings"]["levels"] == 4
    (written,) = results.read(file)
    assert written.value == got["value"] and written.settings == got["settings"]
    assert got == {**asdict(written), "what": written.what}
    assert (got["metric"], got["world"], got["classifier"]) == ("accuracy", "digits", "dc")
    run("evaluate", "--limit", 2, "--levels", 2, "--model", "teacher", "--record", file)
    assert len(results.read(file)) == 2


def test_stored_losses_report_every_weighting_and_are_not_measured_twice(folder, tmp_path):
    command = ("--json", "evaluate", "--limit", 3, "--levels", 2, "--store", tmp_path / "losses")
    done = run(*command)
    records = document(done)["records"]
    weightings = [record["settings"]["weighting"] for record in records]
    assert done.exit_code == 0 and weightings == list(noise.WEIGHTINGS)
    assert {record["n"] for record in records} == {3} and "3/3" in done.stderr
    (file,) = (tmp_path / "losses").glob("losses-*.jsonl")
    before = file.read_bytes()
    again = run(*command)
    assert again.exit_code == 0 and file.read_bytes() == before
    values = [record["value"] for record in records]
    assert [record["value"] for record in document(again)["records"]] == values


def test_evaluate_the_plane_next_to_the_optimum(folder):
    done = run("--json", "evaluate", "--world", "plane:overlapping", "--limit", 200)
    diffusion, optimal = document(done)["records"]
    law = data.PLANE_LAWS["overlapping"]()
    import torch

    x, y = law.sample(200, torch.Generator().manual_seed(0))
    assert optimal["value"] == pytest.approx(
        float((law.posterior(x).argmax(1) == y).double().mean())
    )
    assert (
        diffusion["value"] == pytest.approx(optimal["value"], abs=0.05)
        and diffusion["checkpoint"] is None
    )
    text = run("evaluate", "--world", "plane:overlapping", "--limit", 50)
    assert (
        text.exit_code == 0
        and text.stdout.count("95 % Clopper-Pearson") == 2
        and "50/50" in text.stderr
    )


EVALUATION = ("--json", "evaluate", "--world", "plane:moons", "--limit", 20, "--record")


def test_an_evaluation_is_shown_even_if_its_record_cannot_be_written(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "write", full_disk)
    done = run(*EVALUATION, tmp_path / "r.jsonl")
    assert done.exit_code == 3 and one_sentence(done, "r.jsonl: No space left on device")
    assert document(done)["records"][0]["n"] == 20 and document(done)["error"]
    assert not (tmp_path / "r.jsonl").exists()


def full_disk(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "content, words",
    [
        (b"my only copy of these notes", "ends in b'my only copy of these notes'"),
        (b"a line\nand another\n", "line 1 is no record"),
        (b'{"mine": 1}\n', "line 1 is no record"),
        (b'{"attack": nu', None),
        (b"\n", None),
        (b"", None),
    ],
)
def test_a_file_that_is_not_ours_is_left_alone_before_anything_is_measured(
    folder, tmp_path, monkeypatch, content, words
):
    """The reader's text stays to the byte; what is ours, or empty, is added to."""
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    asked = []
    hits = accuracies.hits
    monkeypatch.setattr(accuracies, "hits", lambda *a, **b: asked.append(1) or hits(*a, **b))
    if words is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            done = run(*EVALUATION, path)
        assert done.exit_code == 0 and asked
        assert [record.n for record in results.read(path)] == [20, 20]
    else:
        done = run(*EVALUATION, path)
        assert done.exit_code == 2 and one_sentence(done, words, "nothing was changed")
        assert path.read_bytes() == content and not asked and "records" not in document(done)


def test_places_that_cannot_hold_records_are_refused_before_anything_is_measured(folder, tmp_path):
    (tmp_path / "file").touch()
    assert one_sentence(run(*EVALUATION, tmp_path), "which is a folder")
    assert one_sentence(run(*EVALUATION, os.devnull), "which is a device")
    assert one_sentence(run(*EVALUATION, tmp_path / "file" / "r.jsonl"), "file: Not a directory")
    assert not (tmp_path / "file").read_bytes()


def test_an_interrupted_evaluation_exits_130(folder, monkeypatch):
    def interrupted(*arguments, **options):
        yield 1, 2
        raise KeyboardInterrupt

    monkeypatch.setattr(accuracies, "hits", interrupted)
    done = run("--json", "evaluate", "--world", "plane:moons")
    assert done.exit_code == 130 and document(done)["records"] == []
