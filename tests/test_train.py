"""The recipes and the one function that trains them: pauses, resumes, measures, writes a card, in one process or two."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from diffclass import data, intervals
from diffclass.classifiers import cnn, idc
from diffclass.classifiers.base import Held
from diffclass.data.worlds import BUDGETS, images_of
from diffclass.denoisers import network
from diffclass.evaluation import accuracies
from diffclass.storage import assets, weights
from diffclass.training import loop, losses, measures, recipes
from diffclass.training.hardening import Inner, adversarial_loss
from diffclass.training.recipes import RECIPES, Beginning, Recipe
from diffclass.training.schedule import Schedule
from diffclass.training.train import remaining, train, training_of
from diffclass.zoo import networks
from twins import rejected
from typer.testing import CliRunner

TINY = ["--widths", "16,32", "--batch", "4", "--measured", "2", "--seed", "1"]
TEACHER = networks.MODELS["cifar10"]["teacher"]
STUDENT = networks.MODELS["cifar10"]["student"]
CNN = networks.BASELINES["digits"]["cnn"]
ADVERSARIAL = networks.BASELINES["digits"]["adversarial"]
IDC = networks.TRANSLATORS["digits"][0]
PAIRS = (("cnn", "adversarial"), ("wide", "adversarial-wide"), ("vit", "adversarial-vit"))
SHIPPED = tuple(networks.BASELINES["digits"])
ATTACKED = ("adversarial", "adversarial-wide", "adversarial-vit")
SHORTER = (
    networks.BASELINES["cifar10"]["adversarial"],
    networks.smoothing_file("cifar10", "cohen", 0.25),
)
NOT_OURS = ("prototype", "edm")  # denoisers of photographs that other commands made
# What makes a world of 40 pictures of 16x16 pixels out of CIFAR-10, in this process or another
SMALL = """
import torch
from diffclass.data import cifar
def small(split="test", limit=None, download=False, progress=True):
    generator = torch.Generator().manual_seed(3 if split == "train" else 4)
    labels = torch.arange(40) % 10
    images = torch.rand((40, 3, 16, 16), generator=generator) * 0.2 + labels[:, None, None, None] / 15
    return images[:limit], labels[:limit]
cifar.cifar10 = small
"""


@pytest.fixture
def small_cifar():
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


def weights_in(path) -> dict:
    return weights.load_weights(path)[0]


def same_weights(one, other) -> bool:
    mine, yours = weights_in(one), weights_in(other)
    return set(mine) == set(yours) and all(torch.equal(mine[n], yours[n]) for n in mine)


@pytest.fixture
def teacher(small_cifar, tmp_path):
    """A folder with a teacher of four steps, and what the command said."""
    done = diffclass(
        "--json", "train", "cifar10", "--steps", 4, "--teacher-only", "--out", tmp_path, *TINY
    )
    assert done.exit_code == 0, done.stderr
    return tmp_path, json.loads(done.stdout)


# -- the table --------------------------------------------------------------------------------------------------------


def test_every_network_that_the_course_trains_has_a_recipe():
    trained = [
        networks.MODELS["digits"].values(),
        [file for name, file in networks.MODELS["cifar10"].items() if name not in NOT_OURS],
        networks.HARDENED.values(),
        *(files.values() for files in networks.TRUTH.values()),
        *(files.values() for files in networks.BASELINES.values()),
        networks.JOINT.values(),
        *networks.TRANSLATORS.values(),
        [
            networks.smoothing_file(world, method, sigma)
            for world in networks.MODELS
            for method in networks.SMOOTHING
            for sigma in networks.SMOOTHING_SIGMAS
        ],
    ]
    assert sorted(file for files in trained for file in files) == sorted(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_known_by_the_command_that_the_zoo_names(name):
    recipe = RECIPES[name]
    assert recipe.command == networks.command_for(name)
    assert name.startswith(recipe.world)
    assert name in recipes.files_of(recipe.world, recipe.method, recipe.sigma)
    assert recipe.world in recipes.worlds_of(recipe.method) and recipe.method in recipes.methods()
    json.dumps(recipe.says)


def test_what_a_network_needs_is_trained_before_it():
    names = list(RECIPES)
    for name, recipe in RECIPES.items():
        if recipe.needs:
            assert names.index(recipe.needs) < names.index(name)
            assert RECIPES[recipe.needs].world == recipe.world
            assert recipe.needs in (recipe.says["teacher"], recipe.says["start"])
    assert sum(recipe.needs is not None for recipe in RECIPES.values()) == 10


def test_recipes_are_what_the_papers_say():
    """Wong et al. 2020 take one step of 1.25 eps; the inner budget is the one that the card measures."""
    for name, recipe in RECIPES.items():
        told = [recipe.says[key] for key in ("recipe", "hardening", "truth") if key in recipe.says]
        inner = told[0].get("inner") if told else None
        attacked = ("adversarial-dc", "tmdc", "tmdc-contrastive", *ATTACKED)
        assert (recipe.method in attacked) == (inner is not None), name
        if inner:
            assert inner["epsilon"] == BUDGETS[recipe.world]["linf"]
            assert inner["steps"] * inner["stride"] >= 1.25
            assert inner["steps"] > 1 or inner["stride"] == 1.25


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_those_of_the_cards_in_assets(name):
    """Two networks of CIFAR-10 were stopped sooner, as their cards say: what a CPU carried.

    Networks that were trained before their recipe was written say so, and agree in what they are.
    """
    if not assets.parts(name, assets.checksums()):
        pytest.skip(f"expected {name} in assets/, which is yet to be trained.")
    card = weights.card(assets.folder() / name)
    settings = card["settings"]
    recipe = RECIPES[name]
    if "before the recipe" in card.get("note", ""):
        given = network.load_denoiser(assets.folder() / recipe.needs)[0] if recipe.needs else None
        built = recipe.build(Beginning((3, 32, 32), 10, given=given))
        assert settings["config"] == json.loads(json.dumps(recipe.config(built)))
        return
    same = {"batch", "rate", "ema", "mirror"} & set(settings)
    if name not in SHORTER:
        same |= {"steps"}
    assert {key: settings[key] for key in same} == {key: getattr(recipe, key) for key in same}


def test_both_networks_are_made_unless_only_the_last_was_interrupted(tmp_path):
    files = recipes.files_of("digits", "diffusion")
    assert files == [networks.TEACHER, networks.STUDENT] == remaining(files, tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / networks.STUDENT).touch()
    assert remaining(files, tmp_path) == files, "there is no teacher to copy"
    (tmp_path / networks.TEACHER).touch()
    assert remaining(files, tmp_path) == [networks.STUDENT]
    (tmp_path / "checkpoints" / networks.TEACHER).touch()
    assert remaining(files, tmp_path) == files
    assert remaining([CNN], tmp_path) == [CNN]


# -- every method, from beginning to end ------------------------------------------------------------------------------

RUNS = {
    networks.TEACHER: dict(steps=4, batch=8, widths=(16,)),
    networks.CONTRASTIVE["digits"]: dict(steps=4, batch=8, widths=(16,)),
    CNN: dict(steps=4, batch=16, widths=(8, 16)),
    ADVERSARIAL: dict(steps=4, batch=16, widths=(8, 16)),
    IDC: dict(steps=4, batch=16),
}


@pytest.mark.parametrize("cut", [1, 3])
@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_stopped_ends_where_an_unbroken_one_does(name, cut, tmp_path):
    options = RUNS[name] | dict(measured=10, seed=2)
    unbroken = list(train(name, tmp_path / "whole", **options))
    for progress in train(name, tmp_path / "cut", **options):
        if progress.step == cut:
            break
    resumed = list(train(name, tmp_path / "cut", **options))
    assert [p.step for p in resumed] == list(range(cut + 1, 5)) and len(unbroken) == 4
    assert same_weights(tmp_path / "whole" / name, tmp_path / "cut" / name)
    assert name in (tmp_path / "cut" / "SHA256SUMS").read_text()
    assert not list((tmp_path / "cut" / "checkpoints").iterdir())
    card = weights.card(tmp_path / "whole" / name)
    recipe = RECIPES[name]
    assert card["name"] == name and card["command"] == recipe.command
    assert card["images_seen"] == 4 * options["batch"] and card["accuracy"]["n"] == 10
    assert card["settings"]["seed"] == 2 and card["settings"]["config"]
    assert "digits" in card["data"] and card["precision"] == "fp32" and card["seconds"] >= 0
    again = weights.card(tmp_path / "cut" / name)
    timeless = [
        {key: value for key, value in one.items() if key not in ("seconds", "curve")}
        for one in (card, again)
    ]
    assert timeless[0] == timeless[1]


def test_a_watched_run_keeps_its_points_in_the_card(tmp_path):
    list(train(ADVERSARIAL, tmp_path, steps=4, batch=16, widths=(8, 16), measured=10))
    card = cnn.load(tmp_path / ADVERSARIAL)[1]
    assert [point["images"] for point in card["curve"]] == [16, 32, 48, 64]
    for point in card["curve"]:
        assert 0 <= point["survived"] <= point["correct"] <= point["n"] == 200
        assert point["attack_steps"] == 10
    hit = card["accuracy_under_attack"]
    assert hit["n"] == 10 and hit["bound"].startswith("upper bound")
    assert card["recipe"]["inner"] == dict(epsilon=0.1, steps=7, stride=0.25)
    assert card["settings"]["config"] == dict(network="ConvClassifier", widths=[8, 16])


def test_a_translator_is_measured_on_all_digits_with_both_noises(tmp_path):
    list(train(IDC, tmp_path, steps=4))
    translator, card = idc.load_translator(tmp_path / IDC)
    assert card["accuracy"]["n"] == card["accuracy_fresh_noise"]["n"] == 400
    assert card["images_seen"] == 4 * 128 and card["recipe"]["labels"] == "Hadamard"
    assert card["curve"] == [] and card["flops"] > 1e7
    held = Held.seeded(idc.TranslationClassifier(translator))
    assert card["accuracy"]["correct"] == accuracies.accuracy(held, *images_of("digits", "test"))


def test_a_pause_leaves_a_checkpoint(small_cifar, tmp_path):
    options = dict(batch=4, widths=(16, 32), pause=1e-9, measured=2)
    run = train(TEACHER, tmp_path, steps=4, **options)
    assert [p.step for p in run] == [1]
    assert (tmp_path / "checkpoints" / TEACHER).exists()
    assert not (tmp_path / TEACHER).exists()
    run = train(CNN, tmp_path, steps=3, batch=8, widths=(8, 16), pause=1e-9, measured=2)
    assert [p.step for p in run] == [1]
    assert (tmp_path / "checkpoints" / CNN).exists() and not (tmp_path / CNN).exists()


def test_a_resume_with_other_settings_is_refused(small_cifar, tmp_path):
    options = dict(batch=4, widths=(16, 32), pause=1e-9, measured=2)
    list(train(TEACHER, tmp_path, steps=4, **options))
    with pytest.raises(ValueError, match=r"\['steps'\] differ; delete it to start afresh"):
        list(train(TEACHER, tmp_path, steps=5, **options))
    with pytest.raises(ValueError, match="holds another architecture"):
        list(train(TEACHER, tmp_path, steps=4, **{**options, "widths": (16, 16)}))


def test_a_network_without_a_recipe_gets_a_sentence(tmp_path):
    with pytest.raises(
        ValueError, match="expected one of .*digits-cnn.* to train, got 'digits-gan.safetensors'"
    ):
        next(train("digits-gan.safetensors", tmp_path))


def test_widths_that_do_not_apply_get_a_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"expected no widths for DigitNet, got \(16, 32\); they"):
        next(train(IDC, tmp_path, widths=(16, 32)))


@pytest.mark.parametrize(
    "loss", [losses.classification_loss(), adversarial_loss(Inner(0.1, 2, 0.75))]
)
def test_training_learns_the_digits(loss):
    recipe = replace(
        RECIPES[CNN], steps=60, batch=64, rate=8e-3, ema=0.9, loss=recipes.from_data(loss)
    )
    run = training_of(recipe, seed=0, widths=(8, 16))
    frames = list(run)
    assert sum(f.loss for f in frames[-10:]) < 0.5 * sum(f.loss for f in frames[:10])
    world = data.digits()
    correct = accuracies.accuracy(run.average, world.test_images, world.test_labels)
    assert correct > 0.75 * 400


# -- a recipe of one's own --------------------------------------------------------------------------------------------


def test_a_new_recipe_is_one_entry(tmp_path, monkeypatch):
    """Another method of digits, made of the parts that are there, is trained by the same function and command."""
    name = "digits-narrow.safetensors"
    recipe: Recipe = replace(
        recipes.plain(
            "digits",
            network=recipes.built(cnn.ConvClassifier, widths=(4, 8)),
            steps=2,
            batch=4,
            rate=1e-3,
            attacked=4,
        ),
        method="narrow",
    )
    monkeypatch.setitem(RECIPES, name, recipe)
    done = diffclass("train", "digits", "--method", "narrow", "--measured", 4, "--out", tmp_path)
    assert done.exit_code == 0, done.stderr
    classifier, card = cnn.load(tmp_path / name)
    assert classifier.widths == (4, 8)
    assert card["command"] == "diffclass train digits --method narrow"
    done = diffclass("train", "cifar10", "--method", "narrow", "--out", tmp_path)
    assert done.exit_code == 2 and "'digits'" in done.stderr


# -- denoisers --------------------------------------------------------------------------------------------------------


def test_the_card_says_what_was_done(teacher):
    folder, said = teacher
    denoiser, card = network.load_denoiser(folder / TEACHER)
    assert said["models"][0]["card"] == card
    assert (
        card["images_seen"] == 16 and card["settings"]["batch"] == 4 and card["accuracy"]["n"] == 2
    )
    assert card["precision"] == "bf16" and card["settings"]["config"]["widths"] == [16, 32]
    assert denoiser.has_null and denoiser.image_shape == (3, 16, 16)
    assert assets.parts(TEACHER, os.listdir(folder)) and not list(
        (folder / "checkpoints").iterdir()
    )
    stored = {
        value.dtype
        for value in safetensors.torch.load_file(folder / TEACHER).values()
        if value.is_floating_point()
    }
    assert stored == {torch.float16}


def test_a_contrastive_network_is_trained_without_a_teacher_and_watched(small_cifar, tmp_path):
    options = ["--steps", 3, "--out", tmp_path, "--widths", "16", *TINY[2:]]
    done = diffclass("train", "cifar10", "--method", "contrastive", *options)
    assert done.exit_code == 0, done.stderr
    denoiser, card = network.load_denoiser(tmp_path / networks.CONTRASTIVE["cifar10"])
    assert denoiser.one_call and denoiser.has_null
    assert denoiser.network.config["widths"] == [16] and denoiser.network.config["patch"] == 2
    assert denoiser.sigma_range == networks.NARROW_RANGE
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
    while not (paused / TEACHER).exists():
        done = diffclass(
            *command, "--pause", 0.01
        )  # 0.6 s: some steps, not all of them, on most machines
        assert done.exit_code == 0, done.stderr
        seen += 1
    assert seen <= 4
    assert same_weights(folder / TEACHER, paused / TEACHER)


def test_the_student_copies_every_head_of_the_teacher(teacher):
    folder, _ = teacher
    done = diffclass("train", "cifar10", "--steps", 3, "--student-only", "--out", folder, *TINY)
    assert done.exit_code == 0, done.stderr
    student, card = network.load_denoiser(folder / STUDENT)
    assert card["teacher"] == TEACHER and student.has_null
    assert student(torch.zeros(1, 3, 16, 16), 1.0).shape == (1, 10, 3, 16, 16)


def test_a_student_has_a_null_class_only_if_its_teacher_has(tmp_path):
    teacher = network.build(
        "ConditionalDenoiser", "DigitNet", 10, (1, 8, 8), has_null=False, width=16, blocks=1
    )
    network.save_denoiser(teacher, tmp_path / networks.TEACHER)
    list(train(networks.STUDENT, tmp_path, steps=1, batch=4, widths=(16,), measured=2))
    assert not network.load_denoiser(tmp_path / networks.STUDENT)[0].has_null


def test_a_student_without_a_teacher_gets_a_sentence(small_cifar, tmp_path):
    done = diffclass("train", "cifar10", "--student-only", "--out", tmp_path, *TINY)
    assert done.exit_code == 2 and TEACHER in done.stderr


def test_the_monitor_keeps_its_points_in_the_card(small_cifar, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setitem(RECIPES, TEACHER, replace(RECIPES[TEACHER], watched=2, compiled=False))
    list(train(TEACHER, tmp_path, steps=3, batch=4, widths=(16, 32), measured=2))
    curve = network.load_denoiser(tmp_path / TEACHER)[1]["curve"]
    assert [p["images"] for p in curve] == [4, 8, 12] and all(
        0 <= p["correct"] <= p["n"] == 2 for p in curve
    )


def test_a_hardened_network_goes_on_and_states_its_accuracy_under_attack(tmp_path, monkeypatch):
    small = network.build("MultiHeadDenoiser", "DigitNet", 10, (1, 8, 8), width=16, blocks=1)
    network.save_denoiser(small, tmp_path / networks.STUDENT)
    name = networks.HARDENED["digits"]
    attacked = measures.bayes_under_attack(networks.DIGIT_RANGE, 16, "fp32", 0.1, attacked=8)
    monkeypatch.setattr(measures, "CARD_STEPS", 2)
    monkeypatch.setitem(RECIPES, name, replace(RECIPES[name], measure=attacked))
    with pytest.raises(
        ValueError, match="expected no widths for a network that goes on from digits-student"
    ):
        next(train(name, tmp_path, widths=(16, 32)))
    *_, last = train(name, tmp_path, steps=2, batch=8, measured=20)
    assert last.step == 2
    card = weights.card(tmp_path / name)
    assert card["accuracy"]["n"] == 20 and card["settings"]["config"]["width"] == 16
    assert card["accuracy_under_attack"]["n"] == 8 and card["hardening"]["inner"]["epsilon"] == 0.1
    assert card["start"] == networks.STUDENT and "adversarial-dc" in card["command"]
    assert "at most" in weights.card_line(card)
    start = weights_in(tmp_path / networks.STUDENT)
    end = weights_in(tmp_path / name)
    moves = [float((start[key] - end[key]).abs().max()) for key in start]
    assert 0 < max(moves) < 0.01, "near where it started"


def test_a_network_to_start_from_is_needed(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected weights at digits-student"):
        next(train(networks.HARDENED["digits"], tmp_path))


@pytest.mark.parametrize("length", [("--steps", "3"), ("--minutes", "0.02")])
def test_two_processes_train_one_network(tmp_path, length):
    """By time as well: with clocks of their own one would wait for the other's last step for ever."""
    script = tmp_path / "worker.py"
    script.write_text(SMALL + "import sys\nfrom diffclass.cli import main\nmain()\n")
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = ["train", "cifar10", *length, "--teacher-only", "--out", str(tmp_path / "o")]
    done = subprocess.run(
        [*launch, str(script), *command, *TINY],
        env=env,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    card = network.load_denoiser(tmp_path / "o" / TEACHER)[1]
    assert card["processes"] == 2
    assert card["images_seen"] == 12 or card["seconds"] >= 1.2


@pytest.mark.parametrize("method, widths", [("idc", ("--widths", "32,32")), ("idc-small", ())])
def test_idc_is_trained_on_photographs_by_the_same_command(small_cifar, tmp_path, method, widths):
    options = ("--method", method, "--batch", 4, *widths, "--measured", 10, "--out", tmp_path)
    done = diffclass("--json", "train", "cifar10", *options, "--steps", 3)
    assert done.exit_code == 0, done.stderr
    file = networks.TRANSLATORS["cifar10"][method == "idc-small"]
    translator, card = idc.load_translator(tmp_path / file)
    assert card["accuracy"]["n"] == 10
    config = card["settings"]["config"]
    assert (
        config["widths"] == [32, 32] if widths else (config["width"], config["patch"]) == (128, 4)
    )
    assert (
        "CIFAR-10" in card["data"]
        and card["command"] == f"diffclass train cifar10 --method {method}"
    )
    assert translator.image_shape == (3, 16, 16) and translator.num_classes == 10
    with torch.no_grad():
        logits = Held.seeded(idc.TranslationClassifier(translator))(
            torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        )
    assert logits.shape == (2, 10) and bool(torch.isfinite(logits).all())


# -- what is in assets/ -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    """The trained networks of digits with their cards, by method."""
    files = networks.BASELINES["digits"]
    return {method: cnn.load(assets.verified(files[method])) for method in SHIPPED}


@pytest.mark.parametrize("method", SHIPPED)
def test_shipped_networks_are_as_accurate_as_their_cards_say(shipped, method):
    classifier, card = shipped[method]
    world = data.digits()
    accuracy = card["accuracy"]
    correct = accuracies.accuracy(classifier, world.test_images, world.test_labels)
    # attention learns less from 1397 pictures; rounding may turn one
    assert correct >= (0.95 if "vit" in method else 0.98) * 400
    assert abs(correct - accuracy["correct"]) <= 1
    assert card["name"] == networks.BASELINES["digits"][method] and card["commit"]
    for stated in (accuracy, card["accuracy_under_attack"]):
        assert stated["n"] == 400
        assert (stated["low"], stated["high"]) == pytest.approx(
            intervals.interval(stated["correct"], 400)
        )


# Of 100 digits the plain network of a pair keeps fewer, the other more.
BETWEEN = {"cnn": (80, 85), "wide": (80, 85), "vit": (40, 75)}


@pytest.mark.parametrize("plain, strong", PAIRS)
def test_adversarial_training_holds_where_the_plain_network_falls(shipped, plain, strong):
    """The bounds lie between what the two reach, and fail if the files are swapped."""
    fewer, more = BETWEEN[plain]
    world = data.digits()
    counts = {}
    x = world.test_images[:100]
    y = world.test_labels[:100]
    for method in (plain, strong):
        classifier, card = shipped[method]
        counts[method] = measures.survivors(classifier, x, y, 0.1, 10)
        assert card["accuracy_under_attack"]["epsilon"] == 0.1
    assert counts[plain] < fewer < more < counts[strong], counts


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("world", list(networks.BASELINES))
def test_cards_say_what_adversarial_training_is_worth(world, pair):
    """More than chance, at the same budget, and not lost again on the way (catastrophic overfitting)."""
    listed = assets.checksums()
    files = [networks.BASELINES[world][method] for method in pair]
    if not all(assets.parts(file, listed) for file in files):
        pytest.skip(
            f"expected both baselines of {world} in assets/; `diffclass train {world} --method {pair[0]}`."
        )
    plain, strong = (cnn.load(assets.verified(file))[1] for file in files)
    weak = plain["accuracy_under_attack"]
    firm = strong["accuracy_under_attack"]
    assert (
        weak["high"] < firm["low"]
        and weak["epsilon"] == firm["epsilon"] == strong["recipe"]["inner"]["epsilon"]
    )
    assert weak["n"] == firm["n"] >= 400 and len(strong["curve"]) == 20
    survived = [point["survived"] for point in strong["curve"]]
    assert survived[-1] >= 0.8 * max(survived)


# -- a run by time ----------------------------------------------------------------------------------------------------


class Clock:
    """A clock that a step moves on by a number of seconds: it is read before and after each."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += self.seconds
        return self.now


def timed(tmp_path, monkeypatch, seconds=0.5, cut=None, **options):
    """A run of six seconds of the plain network, each of whose steps takes so many."""
    options = dict(batch=16, widths=(8, 16), measured=10, seed=2, minutes=0.1) | options
    monkeypatch.setattr(loop.time, "perf_counter", Clock(seconds).perf_counter)
    frames = []
    for progress in train(CNN, tmp_path, **options):
        frames.append(progress)
        if progress.step == cut:
            break
    monkeypatch.undo()
    return frames


def test_minutes_are_the_length_of_a_run_on_a_slow_machine_as_on_a_fast_one(tmp_path, monkeypatch):
    for seconds, steps in ((0.5, 12), (2.0, 3), (0.125, 48)):
        frames = timed(tmp_path / str(seconds), monkeypatch, seconds)
        assert len(frames) == frames[-1].step == frames[-1].steps == steps
        assert all(f.step < f.steps for f in frames[:-1])
        assert frames[len(frames) // 2].steps in range(steps - 1, steps + 2)
        assert sum(f.is_milestone for f in frames) == min(20, steps)
        card = weights.card(tmp_path / str(seconds) / CNN)
        assert card["settings"]["minutes"] == 0.1 and card["images_seen"] == 16 * steps
        assert card["command"] == "diffclass train digits --method cnn --minutes 0.1"


@pytest.mark.parametrize("cut", [1, 7, 11])
def test_a_run_by_time_goes_on_with_the_clock_where_it_was_stopped(cut, tmp_path, monkeypatch):
    timed(tmp_path / "whole", monkeypatch)
    timed(tmp_path / "cut", monkeypatch, cut=cut)
    resumed = timed(tmp_path / "cut", monkeypatch)
    assert [f.step for f in resumed] == list(range(cut + 1, 13))
    assert resumed[-1].seconds == pytest.approx(6.0)
    assert same_weights(tmp_path / "whole" / CNN, tmp_path / "cut" / CNN)


def test_a_run_by_time_is_not_resumed_with_another_length(tmp_path, monkeypatch):
    timed(tmp_path, monkeypatch, cut=2)
    with pytest.raises(ValueError, match=r"\['minutes'\] differ; delete it to start afresh"):
        timed(tmp_path, monkeypatch, minutes=0.2)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="in steps or in minutes, got 5 steps and 0.1 minutes"):
        next(train(CNN, tmp_path, steps=5, minutes=0.1))


class BySteps(Schedule):
    """A twin whose rate looks at the recipe's steps where time decides."""

    def part(self, step, seconds):
        return min(1.0, step / self.steps)


class LongAverage(Schedule):
    """A twin whose average keeps as much in every step, however many there are."""

    def keep_at(self, step, seconds):
        return min(self.ema, (step + 1) / (step + 10))


@rejected({"by steps": dict(kind=BySteps), "an average by steps": dict(kind=LongAverage)})
def test_rate_and_average_depend_on_the_share_of_the_time(kind=Schedule):
    """Ten times the steps in the same time: the same rates at the same times, an average as far back."""
    reach = {}
    for steps in (2000, 20_000):
        schedule = kind(1e-3, 0.998, 6000, minutes=10)
        moments = [(step, 600 * step / steps) for step in range(steps)]
        rates = [schedule.rate_at(*m) for m in moments]
        assert max(rates) == pytest.approx(0.96e-3, rel=0.01)
        assert rates[steps // 2] == pytest.approx(0.5e-3, rel=1e-6)
        assert rates[-1] <= 0.011e-3 and rates[0] < 0.03e-3
        reach[steps] = schedule.keep_at(*moments[-1]) ** (
            steps / 100
        )  # over a hundredth of the time
    # what the recipe keeps over a hundredth of its steps
    assert reach[2000] == pytest.approx(0.998**60, rel=0.01)
    assert reach[20_000] == pytest.approx(0.998**60, rel=0.01)


def test_by_steps_the_schedule_is_the_linear_one():
    schedule = Schedule(2e-3, 0.99, 100)
    assert schedule.rate_at(0, 5.0) == pytest.approx(2e-3 / 20)
    assert schedule.rate_at(50, 0.0) == pytest.approx(1e-3)
    assert schedule.rate_at(99, 0.0) == pytest.approx(2e-5)
    assert schedule.keep_at(4, 9.0) == pytest.approx(5 / 14)
    assert schedule.keep_at(2000, 9.0) == 0.99 and schedule.steps_at(3, 1e9) == 100


# -- saving, before and after -----------------------------------------------------------------------------------------


def test_what_cannot_be_saved_fails_before_the_first_step(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError("no space left")

    steps = []
    for field, wrong, error in (
        ("save", full, OSError),
        ("says", dict(recipe=torch.zeros(1)), TypeError),
    ):
        monkeypatch.setitem(RECIPES, CNN, replace(RECIPES[CNN], **{field: wrong}))
        with pytest.raises(error):
            steps.extend(train(CNN, tmp_path, steps=2, batch=4, widths=(8, 16)))
        monkeypatch.undo()
    assert steps == [] and list(tmp_path.iterdir()) == []


def split(path) -> tuple[dict, bytes]:
    """The header of a safetensors file and the bytes of its tensors: the order of the former's metadata is random."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def channels_last(network):
    return network.to(memory_format=torch.channels_last)


def compiled(network):
    return torch.compile(network)


@pytest.mark.parametrize("changed", [channels_last, compiled])
def test_a_file_does_not_tell_how_a_network_lay_in_memory(changed, tmp_path):
    """Tensor for tensor, byte for byte that of the row-major network; read into either layout it has the same logits."""
    plain = cnn.ConvClassifier((1, 8, 8), 10, (8, 16), 3).eval()
    other = changed(cnn.ConvClassifier((1, 8, 8), 10, (8, 16), 3).eval())
    named = dict(network="ConvClassifier", image_shape=[1, 8, 8], num_classes=10, widths=[8, 16])
    weights.save_weights(plain, named, tmp_path / "plain.safetensors")
    weights.save_weights(other, named, tmp_path / "other.safetensors")
    one, two = (split(tmp_path / f"{n}.safetensors") for n in ("plain", "other"))
    assert one == two
    x = images_of("digits", "test")[0][:20]
    read = cnn.load(tmp_path / "other.safetensors")[0]
    assert torch.allclose(channels_last(read)(x), plain(x), atol=1e-5)


def test_two_heads_that_share_a_tensor_are_saved(tmp_path):
    pair = torch.nn.ModuleList([torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)])
    pair[1].weight = pair[0].weight
    weights.save_weights(pair, dict(network="pair"), tmp_path / "pair.safetensors")
    state = weights_in(tmp_path / "pair.safetensors")
    assert torch.equal(state["0.weight"], state["1.weight"]) and len(state) == 4


def test_training_in_channels_last_resumes_and_saves_what_rows_do(tmp_path, monkeypatch):
    """On an accelerator weights lie channels last; here they are made to, stopped and resumed."""
    options = dict(steps=4, batch=8, widths=(8, 16), measured=10)
    list(train(CNN, tmp_path / "rows", **options))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    for progress in train(CNN, tmp_path / "last", **options):
        if progress.step == 2:
            break
    list(train(CNN, tmp_path / "last", **options))
    mine, yours = (weights_in(tmp_path / n / CNN) for n in ("rows", "last"))
    assert all(torch.allclose(mine[n], yours[n], atol=1e-5) for n in mine)
    assert all(value.is_contiguous() for value in yours.values())
