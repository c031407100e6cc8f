"""Random command lines: whatever is asked, in whatever folder, no traceback, one document, an exit code of the table."""

import errno
import json
import os
import pickle
import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffclass import cli, data
from diffclass.classifiers import cnn
from diffclass.denoisers import network
from diffclass.storage import assets
from diffclass.training import recipes
from diffclass.zoo import networks
from PIL import Image
from typer.testing import CliRunner

CODES = (0, 1, 2, 3, 130)
NOTES = b"my only copy of these notes"
CNN = "digits-cnn.safetensors"
ABSENT = "absent/file"
JUNK = (
    "--nonsense",
    "-x",
    "",
    "--",
    "\udce9",
    "a b",
    "\n",
    "--json",
    "--help",
    "--version",
    "9" * 30,
)

# What a command is asked with: positional words, then options with values that are right, odd and wrong.
WORLDS = ("digits", "plane:moons", "plane:overlapping", "DIGITS", "cifar10", "gallery", "plane", "")
WORLDS += (
    "hundred",
    "hundred:noise-3",
    "mars",
    "digits:noise-3",
    "digits:noise-9",
    "plane:hole",
    "\udcff",
    "digits:",
)
COUNTS = ("1", "2", "3", "0", "-1", "many", "1.5", "9" * 30, "")
SEEDS = ("0", "7", "-1", str(2**64), "x", "4294967295")
CLASSIFIERS = ("dc", "cnn", "vote", "DC", "gan", "", "idc", "adversarial", "noised", "\udce9")
BUDGETS = ("0.1", "8/255", "8", "0", "-1", "nan", "1/0", "x", "1e400", "300")
PLACES = (
    "new",
    "run",
    "losses",
    "notes.txt",
    "notes.txt/x",
    "empty",
    ".",
    "damaged",
    "\udce9",
    "n" * 300,
)
FILES = (
    "new.jsonl",
    "records.jsonl",
    "notes.txt",
    "empty",
    "half.jsonl",
    "/dev/null",
    "a/b/c.jsonl",
)
PICTURES = (
    "digit.png",
    "half.png",
    "notes.txt",
    "nothing",
    "empty",
    ABSENT,
    "caf\udce9.png",
    "~nouser/a",
)
NETWORKS = (
    "list.pt",
    "tensor.pt",
    "keys.pt",
    "code.pkl",
    "half.safetensors",
    "student.safetensors",
)
OPTIONS = {
    "list": {},
    "doctor": {},
    "readme": {"--check": (None,)},
    "download": {},
    "convert": {},
    "lab": {},
    "compare-costs": {
        "--world": WORLDS,
        "--only": ("cnn", "cnn,nobody", "nobody", ""),
        "--sigma": ("0.25", "nan", "-1", "x"),
        "--seconds": ("0.01", "0", "nan", "x"),
        "--store": PLACES,
    },
    "scoreboard": {
        "--world": WORLDS,
        "--by": ("clean", "flop", "honest", "beauty", ""),
        "--html": PLACES,
    },
    "classify": {"--world": WORLDS, "--model": ("student", "teacher", "professor", "")},
    "sample": {
        "--model": ("student", "painter"),
        "--per-class": COUNTS,
        "--out": PLACES,
        "--seed": SEEDS,
    },
    "train": {
        "--method": ("diffusion", "contrastive", "cnn", "cohen", "idc", "gan", ""),
        "--batch": ("2", "0", "x"),
        "--widths": ("4", "4,8", "3", "wide", "", "-4"),
        "--minutes": ("0.01", "nan", "inf", "-1", "x"),
        "--pause": ("0.01", "nan", "inf", "-1", "x"),
        "--sigma": ("0.25", "0.3", "nan", "-1", "x"),
        "--measured": ("1", "2", "0"),
        "--teacher-only": (None,),
        "--student-only": (None,),
        "--seed": SEEDS,
    },
    "evaluate": {
        "--world": WORLDS,
        "--classifier": CLASSIFIERS,
        "--model": ("student", "teacher", "professor"),
        "--levels": ("1", "2", "0", "x", "9" * 30),
        "--weighting": ("ELBO", "edm", "EDN", ""),
        "--attack": ("pgd", "apgd", "fgsm", "APGD", "nothing", ""),
        "--norm": ("linf", "l2", "L2", "l1", ""),
        "--epsilon": BUDGETS,
        "--store": PLACES,
        "--batch": ("1", "8", "0", "9" * 30),
        "--precision": ("fp32", "bf16", "fp8"),
        "--record": FILES,
        "--seed": SEEDS,
    },
    "verify": {},
    "audit": {
        "--world": WORLDS,
        "--norm": ("linf", "l2", "l1"),
        "--epsilon": BUDGETS,
        "--attack": ("apgd", "pgd", "nothing"),
        "--starts": ("1", "0"),
        "--draws": ("1", "2", "0"),
        "--fresh": (None,),
        "--records": PLACES,
        "--statement": ("", "\udce9", "nothing breaks it"),
        "--seed": SEEDS,
    },
}
WORDS = {
    "download": (("cifar10", "digits", "\udce9"),),
    "convert": (
        (*NETWORKS, "notes.txt", "nothing", "empty", ABSENT),
        ("o.safetensors", "o.pt", *PLACES),
    ),
    "classify": (PICTURES, PICTURES),
    "sample": (("cifar10", "digits"),),
    "train": (("digits", "cifar10", "mars"),),
    "verify": (PLACES,),
    "audit": (CLASSIFIERS,),
}
# Always given, so that what is asked is small.
SMALL = {
    "evaluate": {"--limit": ("1", "2", "3"), "--steps": ("1", "2")},
    "train": {"--steps": ("1", "2", "0"), "--out": ("out", "notes.txt", "empty")},
    "audit": {
        "--only": ("1,3", "25", "4,5", "0", "99", "x"),
        "--images": ("2", "4"),
        "--steps": ("1",),
    },
}
SOMETIMES = 0.3
FAULTS = ("a full disk", "no memory", "an interruption", "no permission")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with networks of no training, runs, records, pictures and other people's files."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "assets").mkdir()
    for name in networks.MODELS["digits"].values():
        denoiser = recipes.RECIPES[name].build(recipes.Beginning((1, 8, 8), 10, seed=1))
        network.save_denoiser(denoiser, folder / "assets" / name, {})
    cnn.save(cnn.ConvClassifier((1, 8, 8), 10, widths=(8, 8), seed=1), folder / "assets" / CNN)
    assets.record([*networks.MODELS["digits"].values(), CNN], folder / "assets")
    shutil.copy(folder / "assets" / networks.STUDENT, folder / "student.safetensors")
    whole = (folder / "student.safetensors").read_bytes()
    (folder / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.txt").write_bytes(NOTES)
    (folder / "nothing").write_bytes(b"")
    (folder / "empty").mkdir()
    torch.save([1], folder / "list.pt")
    torch.save(torch.zeros(3), folder / "tensor.pt")
    torch.save({1: torch.zeros(2)}, folder / "keys.pt")
    (folder / "code.pkl").write_bytes(pickle.dumps(os.getcwd))
    digit = data.digits().test_images[0, 0]
    Image.fromarray((digit.numpy() * 255).astype("uint8")).resize((40, 40)).save(
        folder / "digit.png"
    )
    picture = (folder / "digit.png").read_bytes()
    (folder / "half.png").write_bytes(picture[: len(picture) // 2])
    (folder / "caf\udce9.png").write_bytes(picture)
    options = ("--world", "plane:moons", "--limit", "2")
    attack = ("--attack", "pgd", "--steps", "1", "--store", folder / "run")
    losses = ("--store", folder / "losses", "--levels", "2", "--record", folder / "records.jsonl")
    for command in ((*options, *attack), (*options, *losses)):
        done = CliRunner().invoke(cli.app, ["evaluate", *map(str, command)])
        assert done.exit_code == 0, done.output
    records = (folder / "records.jsonl").read_bytes()
    (folder / "half.jsonl").write_bytes(records[:-30])
    return folder


@pytest.fixture
def world(place, tmp_path, monkeypatch):
    """Runs command lines, each by its seed in its own copy of the place, and says what is wrong with what they do."""
    small = data.digits()
    small = replace(small, test_images=small.test_images[:4], test_labels=small.test_labels[:4])
    monkeypatch.setattr(data, "digits", lambda: small)
    monkeypatch.setattr(cli.files, "ROOT", tmp_path)
    for name, source in (("README.md", cli.ROOT), ("__init__.py", cli.readme.PACKAGE)):
        shutil.copy(source / name, tmp_path / name)
    rooms = cli.readme.rooms()  # `readme` writes: into copies, not into the repository
    monkeypatch.setattr(cli.readme, "rooms", lambda: rooms)
    monkeypatch.setattr(cli.readme, "ROOT", tmp_path)
    monkeypatch.setattr(cli.readme, "PACKAGE", tmp_path)
    monkeypatch.setenv("DIFFCLASS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DIFFCLASS_CIFAR10", raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")

    def tried(seed: int) -> tuple[int, list[str]]:
        chance = random.Random(seed)
        here = tmp_path / str(seed)
        shutil.copytree(place, here)
        damage(chance, here)
        arguments = command_line(chance, here)
        with monkeypatch.context() as patch:
            patch.chdir(here)  # names without a folder are written here, not into the repository
            patch.setenv("DIFFCLASS_ASSETS", str(here / "assets"))
            fault = chance.choice(FAULTS) if chance.random() < 0.1 else None
            break_something(patch, chance, fault)
            done = CliRunner().invoke(cli.app, arguments)
        wrong = complaints(done, arguments, here, fault)
        shutil.rmtree(here)
        shown = f"seed {seed}, {fault or 'no fault'}: {arguments}"
        return done.exit_code, [f"{shown}: {complaint}" for complaint in wrong]

    return tried


DAMAGED = ("damaged",) * 6  # more often than the others


def command_line(chance: random.Random, here: Path) -> list[str]:
    """A random command with a random subset of its options, in random order."""
    name = chance.choice([*OPTIONS, "evaluate", "verify", "audit"])
    pairs = [
        (option, chance.choice(values + DAMAGED if values is PLACES else values))
        for option, values in OPTIONS[name].items()
        if chance.random() < SOMETIMES
    ]
    pairs += [(option, chance.choice(values)) for option, values in SMALL.get(name, {}).items()]
    if name == "evaluate" and not any(option == "--attack" for option, _ in pairs):
        pairs = [(option, value) for option, value in pairs if option != "--steps"]
    chance.shuffle(pairs)
    words = [word for pair in pairs for word in pair if word is not None]
    positional = [
        chance.choice(values + DAMAGED if values is PLACES else values)
        for values in WORDS.get(name, ())
    ]
    arguments = [name, *positional, *words]
    if chance.random() < 0.1:
        arguments.insert(chance.randrange(len(arguments) + 1), chance.choice(JUNK))
    if chance.random() < 0.05:
        del arguments[chance.randrange(len(arguments))]
    if chance.random() < 0.6:
        arguments.insert(chance.choice((0, len(arguments))), "--json")
    known = {path.name for path in here.iterdir()} | {"new", "out", "damaged"}
    return [
        str(here / word) if word.split("/")[0] in known and word else word for word in arguments
    ]


def damage(chance: random.Random, here: Path) -> None:
    """Change some of what runs and assets consist of: cut it, fill it with bytes, or with JSON of other types."""
    shutil.copytree(here / "run", here / "damaged")
    places = [here / "damaged", chance.choice((here / "losses", here / "assets", here / "run"))]
    for folder in places[: 1 + (chance.random() < 0.4)]:
        path = chance.choice(sorted(path for path in folder.glob("[!.]*") if path.stat().st_size))
        content = path.read_bytes()
        way = chance.randrange(6)
        if way == 0:
            path.unlink()
        elif way == 1:
            path.write_bytes(content[: chance.randrange(len(content) + 1)])
        elif way == 2:
            path.write_bytes(chance.randbytes(chance.randrange(200)))
        elif path.suffix in (".json", ".jsonl"):
            lines = content.splitlines() if path.suffix == ".jsonl" else [content]
            lines = [replaced(chance, line) if chance.random() < 0.7 else line for line in lines]
            path.write_bytes(b"\n".join(lines) + b"\n")
        else:
            changed = bytearray(content)
            for _ in range(3):
                changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
            path.write_bytes(bytes(changed))
    if chance.random() < 0.5 and (here / "assets" / assets.SUMS).exists():
        present = sorted(path.name for path in (here / "assets").glob("*.safetensors"))
        try:
            assets.record(present, here / "assets")  # damaged files with the right checksums
        except ValueError:
            return


def replaced(chance: random.Random, line: bytes) -> bytes:
    """A line of JSON in which one value is of another type."""
    try:
        content = json.loads(line)
    except ValueError:
        return line
    inside = content
    while isinstance(inside, (dict, list)) and inside:
        key = chance.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
        if not isinstance(inside[key], (dict, list)) or not inside[key] or chance.random() < 0.5:
            inside[key] = chance.choice((None, 5, -1, "x", [], {}, [[]], True, 1e300, {"a": 1}))
            break
        inside = inside[key]
    return json.dumps(content).encode()


def break_something(patch, chance: random.Random, fault: str | None) -> None:
    """Let the machine fail during the command, at the first or at a later write."""
    raised = {
        "a full disk": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        "no memory": MemoryError(),
        "an interruption": KeyboardInterrupt(),
        "no permission": PermissionError(errno.EACCES, os.strerror(errno.EACCES), "x"),
    }
    if fault is None:
        return
    left = [chance.randrange(3)]
    name = chance.choice(("fsync", "listdir", "access"))
    call = getattr(os, name)

    def failing(*arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            raise raised[fault]
        return call(*arguments, **options)

    patch.setattr(os, name, failing)


def complaints(done, arguments: list[str], here: Path, fault: str | None) -> list[str]:
    """What is wrong with how a command ended."""
    wrong = []
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        wrong.append(f"raised {done.exception!r}")
    if "Traceback" in done.output:
        wrong.append("a traceback")
    if done.exit_code not in CODES:
        wrong.append(f"exit code {done.exit_code}")
    before = arguments[: arguments.index("--")] if "--" in arguments else arguments
    content = {}
    if "--json" in before:
        try:
            content = json.loads(done.stdout)
        except ValueError:
            wrong.append(f"no document but {done.stdout[:100]!r}")
        errors = [content, *content.get("pictures", [])]
        if done.exit_code in (2, 3, 130) and not any("error" in part for part in errors):
            wrong.append(f"exit code {done.exit_code} without an error in the document")
    sentences = [line for line in done.stderr.splitlines() if line.startswith("diffclass: ")]
    wrong += [line for line in sentences if "this is a fault of the program" in line]
    usage = "Usage: " in done.stderr or "Error: " in done.stderr
    if done.exit_code in (2, 3, 130) and not sentences and not usage:
        wrong.append(f"exit code {done.exit_code} without a sentence")
    if done.exit_code in (0, 1) and sentences:
        wrong.append(f"exit code {done.exit_code} with {sentences}")
    if len(sentences) > (2 if "classify" in arguments else 1):
        wrong.append(f"several sentences: {sentences}")
    if list(here.rglob("*.part")):
        wrong.append("a .part file is left")
    if (here / "notes.txt").read_bytes() != NOTES:
        wrong.append("the reader's notes were changed")
    return wrong


def tally(world, seeds, capsys) -> tuple[list[str], set[int]]:
    """Try the command lines of these seeds, print how often each exit code came -> every complaint, and the codes."""
    codes = Counter()
    wrong = []
    for seed in seeds:
        code, complaint = world(seed)
        codes[code] += 1
        wrong += complaint
    with capsys.disabled():
        print(f"\n{sum(codes.values())} command lines, by exit code: {dict(sorted(codes.items()))}")
    return wrong, set(codes)


def test_a_sample_of_command_lines_ends_as_the_table_says(world, capsys):
    wrong, codes = tally(world, range(40), capsys)
    assert not wrong, "\n".join(wrong)
    assert codes >= {0, 2}


@pytest.mark.slow
def test_many_command_lines_end_as_the_table_says(world, capsys):
    wrong, codes = tally(world, range(40, 600), capsys)
    assert not wrong, "\n".join(wrong)
    assert codes >= {0, 2}
