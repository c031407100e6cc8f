"""`diffclass evaluate` of classifiers by name, `verify` and `list`: stored, resumed, refused, and wrong when tampered with."""

import json
import re
import shutil
from dataclasses import asdict

import pytest
import torch
from diffclass import cli, data, zoo
from diffclass.attacks import search
from diffclass.classifiers import cnn
from diffclass.classifiers.base import Held
from diffclass.data.worlds import world_of
from diffclass.evaluation import accuracies, protocols, runs
from diffclass.storage import assets, files, results
from diffclass.zoo import attacks
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

CNN = "digits-cnn.safetensors"
TRAINED = ("--world", "digits", "--classifier", "cnn", "--limit", 6)


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
    protocol = protocols.paper("madry", "l2", 0.05)
    assert done.exit_code == 0 and "6/6" in done.stderr
    assert "upper bound" in bound["what"] and "under paper-madry-1, l2 0.05" in bound["what"]
    assert (clean["attack"], bound["attack"], bound["part"]) == (None, protocol.key, None)
    assert len(alone) == len(protocol.attacks) == 1
    assert alone[0]["part"].startswith(f"{protocol.attacks[0]}, on the 5 not yet fooled")
    assert bound["settings"]["protocol"] == protocol.as_json()
    assert (bound["world"], bound["classifier"]) == ("digits", "cnn")
    assert bound["checkpoint"] == results.sha256_of(weights / CNN)
    assert 0 < bound["value"] <= clean["value"]
    listed = results.read(store / "records.jsonl")
    assert results.read(file) == listed
    assert content["records"] == [{**asdict(record), "what": record.what} for record in listed]
    assert runs.read(store).finished == 6
    done = run("--json", "verify", store)
    again = json.loads(done.stdout)
    assert (
        done.exit_code == 0 and again["stands"] and again["images"] == 6 and again["faults"] == []
    )
    assert again["records"] == content["records"]
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
    assert runs.read(store).protocol.epsilon == world_of("digits").budget("linf")
    shutil.copy(store / "rows.jsonl", store / "whole")
    (store / "records.jsonl").unlink()
    done = run("evaluate", "--attack", "paper", *TRAINED, "--store", store)
    assert done.exit_code == 0 and before == {name: (store / name).read_bytes() for name in before}
    assert len(results.read(store / "records.jsonl")) == 3 and "rows.jsonl" in before


def test_a_number_of_pictures_that_verify_would_refuse_is_refused_before_the_attack(tmp_path):
    options = (
        "--world",
        "plane:moons",
        "--attack",
        "pgd",
        "--steps",
        1,
        "--store",
        tmp_path / "run",
    )
    said = sentence(run("evaluate", *options, "--limit", 20))
    assert "got the first 20; attack with --limit 16 or 24" in said
    assert not (tmp_path / "run").exists()
    said = sentence(run("evaluate", *options, "--limit", 70))
    assert "attack with --limit 64 or 100" in said
    assert run("evaluate", *options, "--limit", 24).exit_code == 0
    done = run("verify", tmp_path / "run", "--reattack", 0)
    assert done.exit_code == 0, done.stdout


def test_the_plane_is_attacked_without_weights(tmp_path):
    options = ("--world", "plane:moons", "--limit", 2, "--store")
    done = run(
        "evaluate",
        "--attack",
        "honest",
        "--classifier",
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


def test_flows_are_stored_and_verified_like_perturbations(weights, tmp_path):
    """An attack that has no L-inf budget is asked about at the one that it has."""
    folder = tmp_path / "run"
    options = ("--attack", "stadv", *TRAINED, "--limit", 8, "--steps", 5, "--store", folder)
    done = run("evaluate", *options)
    assert done.exit_code == 0, done.output
    assert "under single-1, flow 0.2" in done.stdout and "roughness of cnn" in done.stdout
    assert runs.read(folder).deltas.shape == (8, 2, 8, 8)
    done = run("verify", folder)
    assert done.exit_code == 0 and "the budget flow 0.2 in pixel widths" in done.stdout
    path = folder / "deltas-0.safetensors"
    save_file({"deltas": -load_file(path)["deltas"]}, path)
    done = run("verify", folder)
    assert done.exit_code == 1 and "does not stand" in done.stdout
    said = sentence(run("evaluate", *options[:-1], tmp_path / "new", "--norm", "linf"))
    assert "expected a norm of flow for the attack stadv, got 'linf'" in said
    lagrange = ("--attack", "lagrange", *TRAINED, "--limit", 2, "--store", tmp_path / "new")
    assert "that maximises a likelihood first" in sentence(run("evaluate", *lagrange))
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_verified_gets_a_sentence(store, tmp_path):
    assert "got no settings.json" in sentence(run("verify", tmp_path / "nothing"))
    (store / "records.jsonl").unlink()
    assert "expected records in" in sentence(run("verify", store))


def test_bad_input_gets_a_sentence(weights, tmp_path, store):
    attack = ("evaluate", "--attack", "paper", *TRAINED)
    new = ("--store", tmp_path / "new")
    assert "expected --store FOLDER with --attack" in sentence(run(*attack))
    assert "did you mean 8/255" in sentence(run(*attack, *new, "--epsilon", 8))
    assert "the norm" in sentence(run(*attack, *new, "--norm", "l1"))
    choice = ", ".join(map(repr, ("paper", "honest", *attacks.ENTRIES)))
    assert f"expected the attack to be one of {choice}, got 'fab'" in sentence(
        run("evaluate", "--attack", "fab", *TRAINED, *new)
    )
    assert "the classifier of digits" in sentence(run(*attack, *new, "--classifier", "gan"))
    plane = ("--world", "plane:moons", "--limit", 2)
    assert "got 'cnn'" in sentence(
        run("evaluate", "--attack", "paper", *plane, "--classifier", "cnn", *new)
    )
    assert "--method adversarial" in sentence(run(*attack, *new, "--classifier", "adversarial"))
    assert "the classifier as it is named" in sentence(run(*attack, *new, "--levels", 4))
    assert "clean test images are attacked" in sentence(
        run(*attack, *new, "--world", "digits:noise-3")
    )
    assert "'seed'] differ" in sentence(run(*attack, "--store", store, "--seed", 1))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "text, value",
    [("0.03", 0.03), ("8/255", 8 / 255), ("0.5/2", 0.25), ("1e-2", 0.01), (" 1 / 50 ", 0.02)],
)
def test_a_budget_is_a_number_or_a_fraction(weights, tmp_path, text, value):
    options = (*TRAINED, "--limit", 1, "--attack", "pgd", "--steps", 1)
    done = run("evaluate", *options, "--store", tmp_path / "run", "--epsilon", text)
    assert done.exit_code == 0, done.output
    assert runs.read(tmp_path / "run").protocol.epsilon == value


def test_the_budget_that_is_suggested_is_accepted(weights, tmp_path):
    options = (*TRAINED, "--limit", 1, "--attack", "pgd", "--steps", 1, "--store", tmp_path / "run")
    hint = sentence(run("evaluate", *options, "--epsilon", "8"))
    suggested = re.search(r"did you mean (\S+)\?", hint)[1]
    assert run("evaluate", *options, "--epsilon", suggested).exit_code == 0
    assert runs.read(tmp_path / "run").protocol.epsilon == 8 / 255
    options = ("--norm", "l2", "--limit", 1, "--attack", "pgd", "--steps", 1)
    store = ("--store", tmp_path / "large")
    assert run("evaluate", *TRAINED, *options, *store, "--epsilon", "8").exit_code == 0


@pytest.mark.parametrize("text", ["8/0", "nan", "inf", "x", "8/255/2", "", "1/nan"])
def test_a_budget_that_is_no_number_is_refused(tmp_path, text):
    for command in (("evaluate",), ("audit", "cnn")):
        done = run(*command, "--epsilon", text, "--json")
        content = json.loads(done.stdout)
        assert done.exit_code == 2 and "expected a number or a fraction" in content["error"]


def test_a_second_writer_gets_a_sentence_and_a_document(store):
    with files.locked(store):
        options = ("--attack", "paper", *TRAINED, "--store", store)
        done = run("--json", "evaluate", *options)
    assert done.exit_code == 3 and "another run holds its lock" in json.loads(done.stdout)["error"]
    assert "fault of the program" not in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# One attack by name


@pytest.mark.parametrize("name", ["pgd", "apgd"])
def test_one_attack_by_name_is_stored_recorded_and_verified(weights, tmp_path, name):
    store = tmp_path / "run"
    options = ("--attack", name.upper(), "--steps", 3, "--store", store)
    done = run("--json", "evaluate", *options, *TRAINED)
    assert done.exit_code == 0, done.output
    clean, bound, alone = json.loads(done.stdout)["records"]
    step = {"pgd": 2.5 / 3, "apgd": None}[name]
    attack = protocols.Attack("margin", 3, name, fresh=False, step=step)
    assert runs.read(store).protocol == protocols.single(attack, "linf", 0.1)
    assert bound["attack"] == alone["attack"] == "single-1"
    assert f"only {name} margin 3, exact, held noise" in alone["what"]
    assert bound["value"] * 6 == pytest.approx(alone["value"] * alone["n"])
    assert bound["value"] < clean["value"] == alone["n"] / 6
    assert run("verify", store).exit_code == 0


def test_one_attack_averages_the_draws_that_a_random_classifier_declares(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo.classifier("plane:moons", "dc").__class__, "eot", 3)
    options = ("--world", "plane:moons", "--limit", 1, "--attack", "pgd", "--steps", 1)
    assert run("evaluate", *options, "--store", tmp_path / "run").exit_code == 0
    (attack,) = runs.read(tmp_path / "run").protocol.attacks
    assert (attack.draws, attack.fresh, attack.steps, attack.step) == (3, True, 1, 2.5)


def test_an_attack_that_is_added_to_the_table_is_a_name_of_the_command(
    weights, tmp_path, monkeypatch
):
    from diffclass.zoo import attacks

    begun = []

    def nothing(classifier, x, y, epsilon, *, noise, **options):
        begun.append(options["steps"])
        yield from search.pgd(classifier, x, y, 0.0, noise=noise, steps=1)

    monkeypatch.setattr(attacks, "ENTRIES", dict(attacks.ENTRIES))
    attacks.register(
        attacks.AttackEntry("nothing", nothing, "gradient", ("linf",), "a test", "Moves nothing.")
    )
    options = (*TRAINED, "--store", tmp_path / "run", "--attack", "nothing")
    assert "expected a norm of linf for the attack nothing, got 'l2'" in sentence(
        run("evaluate", *options, "--norm", "l2")
    )
    done = run("--json", "evaluate", *options)
    clean, bound, _ = json.loads(done.stdout)["records"]
    assert done.exit_code == 0 and begun == [100] and bound["value"] == clean["value"]


def test_a_hundred_steps_of_pgd_are_a_tenth_of_the_budget_each(weights, tmp_path):
    options = (*TRAINED, "--limit", 1, "--store", tmp_path / "run", "--attack", "pgd")
    assert run("evaluate", *options).exit_code == 0
    (attack,) = runs.read(tmp_path / "run").protocol.attacks
    assert (attack.steps, attack.step, attack.draws, attack.fresh) == (100, 0.1, 1, False)


def test_steps_are_those_of_one_attack_alone(weights, tmp_path):
    new = ("--store", tmp_path / "new", "--steps", 3)
    for name in ("paper", "honest"):
        assert f"expected no --steps with --attack {name}, which decides them" in sentence(
            run("evaluate", "--attack", name, *TRAINED, *new)
        )
    assert "expected --steps only with --attack" in sentence(run("evaluate", *TRAINED, *new))
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------------------------------------------------
# A classifier by name, on clean images


def test_a_named_classifier_is_measured_on_clean_images(weights, tmp_path):
    file = tmp_path / "all.jsonl"
    options = ("--world", "digits", "--classifier", "CNN", "--limit", 40, "--record", file)
    done = run("--json", "evaluate", *options)
    (record,) = json.loads(done.stdout)["records"]
    images, labels = world_of("digits").test(40)
    correct = accuracies.accuracy(zoo.classifier("digits", "cnn"), images, labels)
    assert done.exit_code == 0 and "40/40" in done.stderr
    assert (record["value"], record["n"]) == (correct / 40, 40)
    assert (record["classifier"], record["attack"]) == ("cnn", None)
    assert record["checkpoint"] == results.sha256_of(weights / CNN)
    assert record["what"] == "accuracy of cnn on 40 images of digits"
    (written,) = results.read(file)
    assert record == {**asdict(written), "what": written.what}


def test_a_random_classifier_holds_the_noise_of_the_seed():
    world = "plane:overlapping"
    counts = {}
    for seed in (0, 1):
        options = ("--world", world, "--classifier", "vote", "--limit", 60, "--seed", seed)
        (record,) = json.loads(run("--json", "evaluate", *options).stdout)["records"]
        held = Held.seeded(zoo.classifier(world, "vote"), seed)
        correct = accuracies.accuracy(held, *world_of(world).test(60, seed))
        assert record["seed"] == seed and record["checkpoint"] is None
        assert record["value"] == correct / 60
        counts[seed] = correct
    assert counts[0] != counts[1]


def test_what_only_dc_has_is_refused_for_another_classifier(weights, tmp_path):
    named = ("evaluate", *TRAINED)
    for option in (("--levels", 4), ("--weighting", "EDM"), ("--precision", "bf16")):
        assert "only for the clean accuracy of dc" in sentence(run(*named, *option))
    assert "only for the clean accuracy of dc" in sentence(run(*named, "--model", "teacher"))
    assert "has no losses to keep" in sentence(run(*named, "--store", tmp_path / "new"))
    assert "the classifier of digits" in sentence(run("evaluate", "--classifier", "gan"))
    assert "--method adversarial" in sentence(run("evaluate", "--classifier", "adversarial"))
    assert not (tmp_path / "new").exists()


def test_a_classifier_that_should_not_be_measured_is_refused(weights, tmp_path, monkeypatch):
    trained = zoo.classifier("digits", "cnn").train()
    monkeypatch.setattr(zoo, "classifier", lambda world, name: trained)
    assert "got one in training mode" in sentence(run("evaluate", *TRAINED))
    attack = ("--attack", "paper", "--store", tmp_path / "new")
    assert "got one in training mode" in sentence(run("evaluate", *TRAINED, *attack))
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------------------------------------------------
# list


def test_list_prints_the_tables_of_classifiers_and_attacks(weights):
    from diffclass.zoo import attacks, classifiers

    content = json.loads(run("list", "--json").stdout)
    text = run("list").stdout
    assert [entry["name"] for entry in content["classifiers"]] == list(classifiers.ENTRIES)
    assert [entry["name"] for entry in content["attacks"]] == list(attacks.ENTRIES)
    for entry in content["classifiers"]:
        own = classifiers.ENTRIES[entry["name"]]
        assert entry["title"] == own.title and entry["sentence"] == own.sentence
        assert entry["source"] == own.source
        for world, name in (("digits", "digits"), ("cifar10", "cifar10"), ("plane", "plane:moons")):
            assert (world in entry["worlds"]) == (entry["name"] in zoo.names(name))
    for entry in content["attacks"]:
        own = attacks.ENTRIES[entry["name"]]
        assert entry["sentence"] == own.sentence and entry["source"] == own.source
        assert entry["norms"] == list(own.norms) and entry["needs"] == own.needs
    for entry in content["classifiers"] + content["attacks"]:
        assert f"\n  {entry['name']} " in text
        assert entry["sentence"] in text and f"source: {entry['source']}\n" in text
    assert "RDC, 1 step (digits, cifar10, plane, hundred)\n" in text
    assert "needs the gradient (linf, l2)\n" in text


def test_list_shows_what_was_added_to_a_table(weights, monkeypatch):
    from diffclass.zoo import classifiers

    entry = classifiers.Entry(
        name="new",
        title="a new one",
        sentence="Says nothing yet.",
        source="nobody",
        paper="madry",
        build=lambda parts: None,
        weights=lambda kind: {} if kind == "plane" else None,
    )
    monkeypatch.setattr(classifiers, "ENTRIES", dict(classifiers.ENTRIES))
    classifiers.register(entry)
    text = run("list").stdout
    assert "  new              a new one (plane)\n" in text
