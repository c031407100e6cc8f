"""Verification: an honest claim stands, and whatever is changed about it is named; new noise, new attacks, in numbers."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from diffclass import zoo
from diffclass.classifiers.base import Classifier
from diffclass.data.worlds import world_of
from diffclass.evaluation import claims, protocols, runs, tables, verification
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


# the first version, which takes least time
PROTOCOL = protocols.named("honest", 1, Random(), PAPER, "linf", 0.08)
SEED = 1  # of the verification's own noise


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


def state_of(folder, data, claimed, model=None, checkpoints=WEIGHTS, reattack=0, seed=SEED):
    """The result of a verification, without attacks unless they are asked for."""
    run = runs.read(folder)
    options = dict(seed=seed, reattack=reattack)
    model = model or Random()
    *_, state = verification.verify(model, *data, run, checkpoints, claimed, PAPER, **options)
    return state


def faults(folder, data, claimed, model=None, checkpoints=WEIGHTS):
    return state_of(folder, data, claimed, model, checkpoints).faults


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
    options = dict(seed=SEED, reattack=0)
    for state in verification.verify(Random(), *data, run, WEIGHTS, claimed, PAPER, **options):
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
    said = "image 5: the perturbation's linf size is 0.080002, more than the budget 0.08"
    assert any(fault.startswith(said) for fault in listed)
    bend(folder, 5, lambda delta: delta * torch.nan)
    said = "image 5: the perturbation's linf size is nan"
    assert any(said in fault for fault in faults(folder, data, claimed))


def test_rounding_is_no_fault(folder, data, claimed):
    """Older runs store 32 bits, in which an attack may end a hair above its budget."""
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
    of_images = [fault for fault in listed if fault.startswith("image ")]
    assert len(of_images) > 5
    assert all("noise of the verification's own" in fault for fault in set(listed) - set(of_images))


def test_other_images_and_labels_are_noticed(folder, data, claimed):
    x, y = data
    said = "the images or labels are not those of the claim."
    assert said in faults(folder, (x * 0.99, y), claimed)
    listed = faults(folder, (x, y.roll(1)), claimed)
    assert said in listed
    assert any(fault.startswith("image 0: the label is") for fault in listed) == bool(y[-1] != y[0])
    listed = faults(folder, (x[:9], y[:9]), claimed)
    assert listed == [said, "only 9 of the 80 images of the claim could be asked about."]


def test_a_claim_about_fewer_images_than_it_has_rows_is_noticed(folder, data):
    """Once nothing was asked again then, and the claim stood unseen."""
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
    assert listed[0] == "the claim is about 1 draws, its protocol asks for 10."
    # what the selection saw was made up, and the cost is that of ten draws
    assert any("the selection of what is stored has hits and margin" in fault for fault in listed)
    assert any(", its attacks take" in fault for fault in listed)


def test_a_changed_budget_is_noticed(folder, data, claimed):
    set_up(folder, lambda settings: settings["protocol"].update(epsilon=0.05))
    listed = faults(folder, data, claimed)
    assert any("does not follow from the rows: ['settings']" in fault for fault in listed)
    assert any("more than the budget 0.05" in fault for fault in listed)
    listed = faults(folder, data, records_now(folder))
    assert listed and all("more than the budget 0.05" in fault for fault in listed)
    set_up(folder, lambda settings: settings["protocol"].update(epsilon=0.16))
    (fault,) = faults(folder, data, records_now(folder))
    assert fault.startswith("no perturbation is larger than 0.07") and "budget is 0.16" in fault


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
        lambda content: content.update(version=7),
        "expected the protocol honest-1, honest-2, paper-madry-1 or single-1, got honest-7; this library cannot judge by it.",
    ),
    "a name of its own": (
        lambda content: content.update(name="paper-rdc"),
        "expected the protocol honest-1, honest-2, paper-madry-1 or single-1, got paper-rdc-1; this library cannot judge by it.",
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
    assert said in faults(folder, data, records_now(folder))
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
        assert len(listed) > 5
        assert all("of 10 draws are right" in f or "the selection of" in f for f in listed)


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
    listed = faults(folder, data, claimed)
    assert "the run is not finished: 79 of 80 images; its number is no claim yet." in listed
    with pytest.raises(ValueError, match="got 79 of 80 images; the same command goes on"):
        records_now(folder)


# ---------------------------------------------------------------------------------------------------------------------
# New noise, and new attacks


def closed_form(draws, totals, count) -> float:
    """The same chance by brute force: every way to share out the hits of two judgements."""
    ways = {0: 1.0}
    for total in totals:
        there = {}
        for one in range(draws + 1):
            pairs = math.comb(draws, one) * math.comb(draws, total - one) if total >= one else 0
            for before, weight in ways.items():
                there[before + one] = there.get(before + one, 0) + weight * pairs
        ways = there
    whole = sum(ways.values())
    above = sum(weight for hits, weight in ways.items() if hits >= count) / whole
    below = sum(weight for hits, weight in ways.items() if hits <= count) / whole
    return min(1.0, 2 * min(above, below))


def test_the_chance_of_a_luckier_judgement_is_that_of_all_ways_to_share_out_the_hits():
    claimed = [3, 2, 0, 3]
    again = [1, 2, 1, 0]
    laws = verification._shares(claimed, again, 3)
    totals = [4, 4, 1, 3]
    for count in range(9):
        wanted = closed_form(3, totals, count)
        assert verification.two_sided(count, laws) == pytest.approx(wanted)


def test_an_honest_random_claim_is_called_lucky_as_often_as_chance_says():
    generator = torch.Generator().manual_seed(3)
    p = torch.rand(60, generator=generator).expand(400, 60)
    one, other = (torch.binomial(torch.full_like(p, 10), p, generator=generator) for _ in range(2))
    chances = []
    for claimed, again in zip(one.int().tolist(), other.int().tolist(), strict=True):
        chances.append(
            verification.two_sided(sum(claimed), verification._shares(claimed, again, 10))
        )
    below = [sum(chance < level for chance in chances) / 400 for level in (0.02, 0.1, 0.5)]
    assert below[0] <= 0.04 and below[1] <= 0.14 and 0.35 <= below[2] <= 0.55


def test_the_worst_of_ten_counts_the_images_that_are_right_at_every_draw():
    """Claimed and asked again: 10 of 10 counts, 9 of 10 does not."""
    rows = [dict(index=i, clean=10, hits=hits) for i, hits in enumerate((10, 9, 9, 0, 10))]
    run = runs.Run(dict(draws=10), rows, torch.zeros(5, *SHAPE))
    state = verification.Verification(5)
    again = verification._Again(clean=[9, 10, 10, 9, 8], hits=[9, 9, 10, 1, 9])
    assert verification._lucky(run, again, state) == []
    assert state.judged == {
        "clean, mean of 10 draws": [50, 46, 50],
        "clean, worst of 10 draws": [5, 2, 5],
        "under attack, mean of 10 draws": [38, 38, 50],
        "under attack, worst of 10 draws": [2, 1, 5],
    }


def test_new_noise_agrees_with_an_honest_claim_whatever_its_seed(folder, data, claimed):
    seen = set()
    for seed in range(4):
        state = state_of(folder, data, claimed, seed=seed)
        assert state.faults == [] and len(state.judged) == 4
        told, again, draws = state.judged["under attack, mean of 10 draws"]
        assert told == sum(row["hits"] for row in runs.read(folder).rows) and draws == 800
        seen.add(again)
    assert len(seen) > 1
    state = state_of(folder, data, claimed, seed=None)
    assert 0 <= state.seed < 2**32 and state.faults == []


def test_survivors_of_an_honest_claim_stand_the_same_attacks_again(folder, data, claimed):
    state = state_of(folder, data, claimed, reattack=5)
    # of those that no attack has moved, up to five more
    assert state.faults == [] and 5 <= state.attacked <= 10
    assert any("of 5 survivors that were attacked fell" in words for words in state.established)
    assert any(words.startswith("a lower bound") for words in state.open)
    without = state_of(folder, data, claimed)
    assert any("none was asked for" in words for words in without.open)


def test_what_falls_is_new_and_more_of_it_than_the_interval_allows_a_fault():
    bound = replace(claims.Record(**RECORD), value=0.8, low=0.7, n=100)
    few = verification._Group("attacked", list(range(80)), list(range(10)), fallen=2)
    assert verification._too_many(few, bound, possible=10.0) == []
    many = replace(few, fallen=9)
    (fault,) = verification._too_many(many, bound, possible=10.0)
    chance = sum(math.comb(10, k) * 0.125**k * 0.875 ** (10 - k) for k in (9, 10))
    assert f"has a chance of {chance:.2g}" in fault and fault.startswith("9 of 10 survivors")
    assert "fell to new runs of the same attacks; of all 80, at most" in verification._sampled(few)


def test_what_a_verification_has_learned_is_kept_line_by_line(folder, data, claimed):
    """Every success is thrown away but one: what the new attacks find is told, stored, and too much for chance."""
    rows = [json.loads(line) for line in (folder / runs.ROWS).read_text().splitlines()]
    deltas = load_file(folder / "deltas-0.safetensors")["deltas"]
    run = runs.read(folder)
    kept = verification._Again([row["clean"] for row in rows], [10] * IMAGES)
    forged = replace(run, rows=[{**row, "hits": 10} for row in run.rows])
    asked = [i for i, row in enumerate(rows) if row["hits"] == 0][:3]
    last = replace(run, rows=[rows[i] for i in asked], deltas=deltas[asked].float())
    new = verification._new(forged, last, asked, kept, seed=5)
    assert [entry["index"] for entry in new] == asked and all(e["hits"] == 0 for e in new)
    assert torch.equal(torch.tensor(new[0]["delta"]).reshape(SHAPE), last.deltas[0])
    verification.keep_new(folder, new[:1])
    verification.keep_new(folder, new[1:])
    lines = (folder / verification.NEW).read_text().splitlines()
    assert [json.loads(line) for line in lines] == new
    assert "0 of 10 draws right, where the record says 10" in verification.words_of(new[0])
    assert faults(folder, data, claimed) == []  # the file is no part of the claim


def test_fewer_hits_by_chance_are_not_new():
    assert verification._surely_fewer(0, 2, 1) and not verification._surely_fewer(1, 2, 1)
    assert not verification._surely_fewer(5, 12, 10) and verification._surely_fewer(2, 17, 10)


RECORD = dict(
    metric="accuracy",
    world="toy",
    classifier="toy",
    value=0.8,
    n=100,
    low=0.7,
    high=0.9,
    level=0.95,
    settings={},
    seed=0,
    checkpoint=None,
    source="test",
    attack="honest-1",
)


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
    usual = world_of(world).budget(run.protocol.norm)
    budget = "" if run.protocol.epsilon == usual else f"-{run.protocol.epsilon:g}"
    assert run.settings["world"] == world
    assert folder.name.endswith(f"-{run.protocol.norm}{budget}")
    now = [
        replace(record, when=there.when)
        for record, there in zip(claims.records_of(run), kept, strict=True)
    ]
    assert now == kept
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
    named = verification.named_protocol(classifier, entry.paper, run.protocol)
    assert named.as_json() == run.settings["protocol"]
    assert run.settings["draws"] == runs.draws_of(classifier, run.protocol)
    assert run.settings["checkpoints"] == zoo.checkpoints(world, name)
    assert run.settings["stream"] in runs.STREAMS


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
    options = dict(world=world_of(world), seed=SEED, reattack=0)
    *_, state = verification.verify(
        classifier, images, labels, run, checkpoints, kept, paper, **options
    )
    assert state.faults == [] and state.images == run.settings["n"]
