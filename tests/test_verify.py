"""Verification: an honest claim stands, and whatever is changed about it is named, without any attack."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffclass import zoo
from diffclass.classifiers.base import Classifier
from diffclass.data.worlds import world_of
from diffclass.evaluation import claims, protocols, runs, tables
from diffclass.evaluation.protocols import Attack
from safetensors.torch import load_file, save_file
from torch import nn

SHAPE = (1, 2, 2)
WEIGHTS = {"toy.safetensors": "ab" * 32}
OWN = dict(world="toy", classifier="toy", checkpoints=WEIGHTS, version="0")
IMAGES = 80  # more than one block
PAPER = "madry"


class Random(Classifier):
    """Logits W x + b and a little noise."""

    num_classes = 3
    image_shape = SHAPE
    calls = 1

    def __init__(self, seed=1):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)))

    def sample_noise(self, images, generator):
        return torch.randn((images, 3), generator=generator)

    def logits(self, x, noise):
        return (x.flatten(1) - 0.5) @ self.weight.T + 0.15 * noise


PROTOCOL = protocols.honest(Random(), "linf", 0.08)


@pytest.fixture(scope="module")
def data():
    x = torch.rand(IMAGES, *SHAPE, generator=torch.Generator().manual_seed(2))
    return x, ((x.flatten(1) - 0.5) @ Random().weight.T).argmax(1)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The folder of a finished run, which no test changes."""
    folder = tmp_path_factory.mktemp("run")
    for _ in runs.run(Random(), *data, PROTOCOL, folder, OWN):
        pass
    claims.keep(folder, claims.records_of(runs.read(folder)))
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of a finished run."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def claimed(folder):
    return claims.kept(folder)


def faults(folder, data, claimed, model=None, checkpoints=WEIGHTS):
    run = runs.read(folder)
    *_, state = claims.verify(model or Random(), *data, run, checkpoints, claimed, PAPER)
    return state.faults


def records_now(folder):
    """The records that follow from what is in the folder."""
    return claims.records_of(runs.read(folder))


def edit(folder, index, **changes):
    """Change one row of a finished run."""
    path = folder / runs.ROWS
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[index] |= changes
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def set_up(folder, change):
    """Change the settings of a finished run."""
    path = folder / "settings.json"
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings))


def bend(folder, index, change):
    """Change one stored perturbation, in 32 bits: whoever tampers is not bound to what 16 bits can hold."""
    path = folder / "deltas-0.safetensors"
    deltas = load_file(path)["deltas"].float()
    deltas[index] = change(deltas[index])
    save_file({"deltas": deltas}, path)


def test_an_honest_claim_stands_and_asks_no_attack(folder, data, claimed, monkeypatch):
    rows = runs.read(folder).rows
    # luck is in it: only the same noise gives the same counts
    assert len({row["hits"] for row in rows}) > 4
    monkeypatch.setattr(Attack, "frames", None)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    run = runs.read(folder)
    states = []
    for state in claims.verify(Random(), *data, run, WEIGHTS, claimed, PAPER):
        states.append((state.images, list(state.faults)))
    assert states == [(64, []), (IMAGES, []), (IMAGES, [])] and state.total == IMAGES
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("index", [7, 70])
@pytest.mark.parametrize("key, said", [("hits", "perturbed"), ("clean", "clean")])
def test_a_flipped_count_is_noticed_and_its_image_named(folder, data, index, key, said):
    old = runs.read(folder).rows[index][key]
    new = old - 1 if old else 1
    edit(folder, index, **{key: new})
    # records that follow from the forged rows
    listed = faults(folder, data, records_now(folder))
    assert listed == [f"image {index}: {said}, {old} of 10 draws are right, not {new}."]


def test_a_forged_row_contradicts_the_records_it_was_taken_from(folder, data, claimed):
    edit(folder, 3, hits=10 if runs.read(folder).rows[3]["hits"] < 10 else 0)
    listed = faults(folder, data, claimed)
    assert any(fault.startswith("image 3: perturbed") for fault in listed)
    assert any(
        "mean of 10 draws' does not follow from the rows: ['value'" in fault for fault in listed
    )


@pytest.mark.parametrize(
    "change",
    [
        dict(value=0.96, high=1.0),
        dict(low=0.0),
        dict(high=1.0),
        dict(n=IMAGES + 1),
        dict(level=0.9),
        dict(method="Wald"),
        dict(unit="nats"),
        dict(metric="robust accuracy"),
        dict(attack="honest-2"),
        dict(attack=None),
        dict(part="the best of them"),
        dict(statistic="worst"),
        dict(world="digits"),
        dict(classifier="dc"),
        dict(detail="contrastive"),
        dict(source="a better paper"),
        dict(checkpoint="cd" * 32),
        dict(settings={}),
        dict(seed=7),
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_tampered_record_is_noticed(folder, data, claimed, change):
    tampered = [replace(r, **change) if i == 2 else r for i, r in enumerate(claimed)]
    listed = faults(folder, data, tampered)
    assert listed and all("record" in fault for fault in listed)


def test_only_the_time_of_a_record_is_its_own(folder, data, claimed):
    later = [replace(record, when="2031-01-01T00:00:00+00:00") for record in claimed]
    assert faults(folder, data, later) == []


def test_a_missing_record_is_noticed(folder, data, claimed):
    listed = faults(folder, data, claimed[:-1])
    assert listed == [f"the record {claimed[-1].what!r} is missing."]


def test_an_oversize_perturbation_is_noticed_and_its_image_named(folder, data, claimed):
    bend(folder, 5, lambda delta: torch.full_like(delta, 0.08 + 2e-6) * (0.5 - data[0][5]).sign())
    listed = faults(folder, data, claimed)
    assert listed[0].startswith(
        "image 5: the perturbation's linf size is 0.080002, more than the budget 0.08"
    )
    bend(folder, 5, lambda delta: delta * torch.nan)
    said = "image 5: the perturbation's linf size is nan"
    assert any(said in fault for fault in faults(folder, data, claimed))


def test_rounding_is_no_fault(folder, data, claimed):
    bend(folder, 5, lambda delta: delta * (1 + 2e-7))
    assert faults(folder, data, claimed) == []


def test_a_perturbed_image_outside_the_pixel_range_is_noticed(folder, data, claimed):
    i = int(data[0].flatten(1).amax(1).argmax())
    assert float(data[0][i].max()) > 0.95
    bend(folder, i, lambda delta: torch.full_like(delta, 0.08))
    assert f"image {i}: the perturbed image leaves [0,1]." in faults(folder, data, claimed)


def test_other_weights_are_noticed_by_name_and_by_what_they_answer(folder, data, claimed):
    listed = faults(folder, data, claimed, checkpoints={"toy.safetensors": "cd" * 32})
    assert listed == [
        "weights toy.safetensors: the claim is about abababababab, these are cdcdcdcdcdcd."
    ]
    assert faults(folder, data, claimed, checkpoints={}) == [
        "weights toy.safetensors: the claim is about abababababab, these are none."
    ]
    assert faults(folder, data, claimed, checkpoints={**WEIGHTS, "more": "ef" * 32}) == [
        "weights more: the claim is about none, these are efefefefefef."
    ]
    listed = faults(folder, data, claimed, model=Random(seed=5))
    assert len(listed) > 5 and all(fault.startswith("image ") for fault in listed)


def test_other_images_and_labels_are_noticed(folder, data, claimed):
    x, y = data
    said = "the images or labels are not those of the claim."
    assert said in faults(folder, (x * 0.99, y), claimed)
    listed = faults(folder, (x, y.roll(1)), claimed)
    assert said in listed
    assert any(fault.startswith("image 0: the label is") for fault in listed) == bool(y[-1] != y[0])
    assert faults(folder, (x[:9], y[:9]), claimed) == [said]


def test_a_claim_about_fewer_images_than_it_has_rows_is_noticed(folder, data):
    """Nothing could be asked again then: without this the claim would stand unseen."""
    x, y = data
    few = (x[:9], y[:9])
    set_up(folder, lambda settings: settings.update(n=9, images=runs.fingerprint(*few)))
    listed = faults(folder, few, records_now(folder))
    assert listed == [f"the claim is about 9 images, but has {IMAGES} rows."]


def test_a_claim_about_other_draws_than_its_protocol_asks_for_is_noticed(folder, data):
    """One lucky draw for ten: rows and records that agree with the answers of a single draw."""
    set_up(folder, lambda settings: settings.update(draws=1))
    run = runs.read(folder)
    again = list(runs.rejudged(Random(), *data, run))
    clean = [hit for block, _ in again for hit in block]
    hits = [hit for _, block in again for hit in block]
    for i in range(IMAGES):
        tried = [[1, 0.0], [hits[i], 1.0], None, None]
        edit(folder, i, clean=clean[i], hits=hits[i], attacks=tried, strongest=1)
    listed = faults(folder, data, records_now(folder))
    assert listed == ["the claim is about 1 draws, its protocol asks for 10."]


def test_a_changed_budget_is_noticed(folder, data, claimed):
    set_up(folder, lambda settings: settings["protocol"].update(epsilon=0.05))
    listed = faults(folder, data, claimed)
    assert any("does not follow from the rows: ['settings']" in fault for fault in listed)
    assert any("more than the budget 0.05" in fault for fault in listed)
    listed = faults(folder, data, records_now(folder))
    assert listed and all("more than the budget 0.05" in fault for fault in listed)


PROTOCOL_CHANGES = {
    "fewer steps": (
        lambda content: content["attacks"][0].update(steps=10),
        "the protocol is not what honest-1 is here: attacks differ.",
    ),
    "an easier gradient": (
        lambda content: content["attacks"][2].update(fresh=False),
        "the protocol is not what honest-1 is here: attacks differ.",
    ),
    "another paper's name": (
        lambda content: content.update(name="paper-madry"),
        "the protocol is not what paper-madry-1 is here: attacks differ.",
    ),
    "another version": (
        lambda content: content.update(version=2),
        "expected the protocol honest-1, paper-madry-1 or single-1, got honest-2; this library cannot judge by it.",
    ),
    "a name of its own": (
        lambda content: content.update(name="paper-rdc"),
        "expected the protocol honest-1, paper-madry-1 or single-1, got paper-rdc-1; this library cannot judge by it.",
    ),
    "one attack alone": (
        lambda content: content.update(name="single"),
        "the protocol is not what single-1 is here: attacks differ.",
    ),
}


@pytest.mark.parametrize("change", PROTOCOL_CHANGES)
def test_a_protocol_that_is_not_what_its_name_says_is_noticed(folder, data, claimed, change):
    changed, said = PROTOCOL_CHANGES[change]
    set_up(folder, lambda settings: changed(settings["protocol"]))
    assert faults(folder, data, records_now(folder)) == [said]
    assert any("record" in fault for fault in faults(folder, data, claimed))


def test_fewer_draws_in_the_protocol_are_noticed(folder, data):
    set_up(folder, lambda settings: settings["protocol"].update(draws=1))
    assert faults(folder, data, records_now(folder)) == [
        "the claim is about 10 draws, its protocol asks for 1.",
        "the protocol is not what honest-1 is here: draws differ.",
    ]


def test_another_stream_or_seed_of_noise_is_noticed_by_the_answers(folder, data):
    for change in (dict(stream="batches of 64"), dict(seed=1)):
        set_up(folder, lambda settings, change=change: settings.update(change))
        listed = faults(folder, data, records_now(folder))
        assert len(listed) > 5 and all("of 10 draws are right" in fault for fault in listed)


def test_an_attack_that_is_not_the_strongest_is_noticed(folder, data):
    rows = runs.read(folder).rows
    index = next(
        row["index"]
        for row in rows
        if row["strongest"] != 0
        and row["attacks"][0][0] == 10
        and row["attacks"][row["strongest"]][0] < 10
    )
    for place in (0, 4, -1, "none", None):
        edit(folder, index, strongest=place)
        listed = faults(folder, data, records_now(folder))
        assert listed == [f"image {index}: attack {place!r} is not its strongest attack."]


def test_an_attack_that_was_not_tried_is_not_the_strongest(folder, data):
    index = next(row["index"] for row in runs.read(folder).rows if row["attacks"][3] is None)
    edit(folder, index, strongest=3)
    listed = faults(folder, data, records_now(folder))
    assert listed == [f"image {index}: attack 3 is not its strongest attack."]


def test_an_unfinished_run_is_no_claim(folder, data, claimed):
    edit(folder, IMAGES - 1, hits=None)
    with pytest.raises(ValueError, match="got 79 of 80 images; the same command goes on"):
        faults(folder, data, claimed)


# ---------------------------------------------------------------------------------------------------------------------
# The runs that are committed

COMMITTED = [
    pytest.param(world, folder, id=f"{world}-{folder.name}")
    for world in ("digits", "cifar10")
    for folder in tables.folders(world)
]


def test_there_are_committed_runs():
    assert len(COMMITTED) >= 38


@pytest.mark.parametrize("world, folder", COMMITTED)
def test_the_numbers_of_a_committed_run_follow_from_its_rows(world, folder):
    run = runs.read(folder)
    kept = claims.kept(folder)
    assert run.finished == run.settings["n"] == len(run.rows) == len(run.deltas)
    assert (run.settings["world"], run.protocol.norm) == (world, folder.name.rpartition("-")[2])
    now = [
        replace(record, when=there.when)
        for record, there in zip(claims.records_of(run), kept, strict=True)
    ]
    assert now == kept
    assert run.protocol.epsilon == world_of(world).budget(run.protocol.norm)
    assert max(run.sizes) <= run.protocol.epsilon + runs.SLACK


@pytest.mark.parametrize("world, folder", COMMITTED)
def test_the_protocol_of_a_committed_run_is_what_its_name_says(world, folder):
    run = runs.read(folder)
    name = run.settings["classifier"]
    try:
        classifier = zoo.classifier(world, name)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    entry = zoo.entry_of(world, name)
    named = claims.named_protocol(classifier, entry.paper, run.protocol)
    assert named.as_json() == run.settings["protocol"]
    assert run.settings["draws"] == runs.draws_of(classifier, run.protocol)
    assert run.settings["checkpoints"] == zoo.checkpoints(world, name)
    assert run.settings["stream"] == "batches of 64"


QUICK = ("digits-cnn-honest-linf", "digits-cnn-paper-l2", "digits-idc-honest-linf")
VERIFIED = [
    pytest.param(*one.values, id=one.id, marks=() if one.id in QUICK else pytest.mark.slow)
    for one in COMMITTED
]


@pytest.mark.parametrize("world, folder", VERIFIED)
def test_a_committed_run_verifies(world, folder, monkeypatch):
    run = runs.read(folder)
    name = run.settings["classifier"]
    try:
        images, labels = world_of(world).test(run.settings["n"])
        classifier = zoo.classifier(world, name)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(Attack, "frames", None)
    checkpoints = zoo.checkpoints(world, name)
    paper = zoo.entry_of(world, name).paper
    kept = claims.kept(folder)
    *_, state = claims.verify(classifier, images, labels, run, checkpoints, kept, paper)
    assert state.faults == [] and state.images == run.settings["n"]
