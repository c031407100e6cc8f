"""Verification: an honest claim stands, and whatever is changed about it is found and named, without any attack."""

import json
from dataclasses import replace

import pytest
import torch
from diffclass.classifiers.randomised import Randomised
from diffclass.evaluation import claims, robustness
from diffclass.evaluation.protocols import Attack, Protocol
from safetensors.torch import load_file, save_file
from torch import nn

SHAPE = (1, 2, 2)
WEIGHTS = {"toy.safetensors": "ab" * 32}
LISTED = (Attack("margin", 10), Attack("scaled CE", 10, fresh=False))
PROTOCOL = Protocol("honest", "dc", "linf", 0.08, LISTED, "a test")


class Random(Randomised):
    """Logits W x + b and a little noise."""

    num_classes = 3
    image_shape = SHAPE

    def __init__(self, seed=1):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)))

    def forward(self, x):
        generator = torch.Generator().manual_seed(0) if self.deterministic else self.generator
        return (x.flatten(1) - 0.5) @ self.weight.T + 0.15 * torch.randn(
            len(x), 3, generator=generator
        )


@pytest.fixture(scope="module")
def data():
    x = torch.rand(20, *SHAPE, generator=torch.Generator().manual_seed(2))
    return x, ((x.flatten(1) - 0.5) @ Random().weight.T).argmax(1)


@pytest.fixture
def folder(data, tmp_path):
    own = dict(world="toy", checkpoints=WEIGHTS, version="0")
    for _ in robustness.run(Random(), *data, PROTOCOL, tmp_path, own, batch=8):
        pass
    return tmp_path


@pytest.fixture
def claimed(folder):
    return claims.records(robustness.read(folder))


def faults(folder, data, claimed, model=None, checkpoints=WEIGHTS):
    found = robustness.read(folder)
    *_, state = claims.verify(model or Random(), *data, found, checkpoints, claimed)
    return state.faults


def edit(folder, index, **changes):
    """Change one row of a finished run."""
    path = folder / robustness.ROWS
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[index] |= changes
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def bend(folder, index, change):
    """Change one stored perturbation, in 32 bits: whoever tampers is not bound to what 16 bits can hold."""
    path = folder / "deltas-0.safetensors"
    deltas = load_file(path)["deltas"].float()
    deltas[index] = change(deltas[index])
    save_file({"deltas": deltas}, path)


def test_an_honest_claim_stands_and_asks_no_attack(folder, data, claimed, monkeypatch):
    rows = robustness.read(folder).rows
    assert (
        len({row["hits"] for row in rows}) > 4
    )  # luck is in it: only the same noise gives the same counts
    monkeypatch.setattr(Attack, "frames", None)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    states = list(claims.verify(Random(), *data, robustness.read(folder), WEIGHTS, claimed))
    assert states[-1].faults == [] and states[-1].images == states[-1].total == 20
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("key, said", [("hits", "perturbed"), ("clean", "clean")])
def test_a_flipped_count_is_found_and_its_image_named(folder, data, key, said):
    old = robustness.read(folder).rows[7][key]
    new = old - 1 if old else 1
    edit(folder, 7, **{key: new})
    found = faults(
        folder, data, claims.records(robustness.read(folder))
    )  # records that follow from the forged rows
    assert found == [f"image 7: {said}, {old} of 10 draws are right, not {new}."]


def test_a_forged_row_contradicts_the_records_it_was_taken_from(folder, data, claimed):
    edit(folder, 3, hits=10 if robustness.read(folder).rows[3]["hits"] < 10 else 0)
    found = faults(folder, data, claimed)
    assert any(fault.startswith("image 3: perturbed") for fault in found)
    assert any(
        "average of 10 draws' does not follow from the rows: ['value'" in fault for fault in found
    )


@pytest.mark.parametrize(
    "change",
    [
        dict(value=0.96, high=1.0),
        dict(low=0.0),
        dict(what="robust accuracy"),
        dict(checkpoint="cd" * 32),
        dict(seed=7),
    ],
)
def test_a_tampered_record_is_found(folder, data, claimed, change):
    found = faults(
        folder,
        data,
        [replace(claimed[2], **change) if i == 2 else r for i, r in enumerate(claimed)],
    )
    assert found and all("record" in fault for fault in found)


def test_a_missing_record_is_found(folder, data, claimed):
    found = faults(folder, data, claimed[:-1])
    assert found == [f"the record {claimed[-1].what!r} is missing."]


def test_an_oversize_perturbation_is_found_and_its_image_named(folder, data, claimed):
    bend(folder, 5, lambda delta: torch.full_like(delta, 0.08 + 2e-6) * (0.5 - data[0][5]).sign())
    found = faults(folder, data, claimed)
    assert found[0].startswith(
        "image 5: the perturbation's linf size is 0.080002, more than the budget 0.08"
    )
    bend(folder, 5, lambda delta: delta * torch.nan)
    assert any(
        "image 5: the perturbation's linf size is nan" in fault
        for fault in faults(folder, data, claimed)
    )


def test_rounding_is_no_fault(folder, data, claimed):
    bend(folder, 5, lambda delta: delta * (1 + 2e-7))
    assert faults(folder, data, claimed) == []


def test_a_perturbed_image_outside_the_pixel_range_is_found(folder, data, claimed):
    i = int(data[0].flatten(1).amax(1).argmax())
    assert float(data[0][i].max()) > 0.95
    bend(folder, i, lambda delta: torch.full_like(delta, 0.08))
    assert f"image {i}: the perturbed image leaves [0,1]." in faults(folder, data, claimed)


def test_other_weights_are_found_by_name_and_by_what_they_answer(folder, data, claimed):
    found = faults(folder, data, claimed, checkpoints={"toy.safetensors": "cd" * 32})
    assert found == [
        "weights toy.safetensors: the claim is about abababababab, these are cdcdcdcdcdcd."
    ]
    assert faults(folder, data, claimed, checkpoints={}) == [
        "weights toy.safetensors: the claim is about abababababab, these are none."
    ]
    found = faults(folder, data, claimed, model=Random(seed=5))
    assert len(found) > 5 and all(fault.startswith("image ") for fault in found)


def test_other_images_and_labels_are_found(folder, data, claimed):
    x, y = data
    assert "the images or labels are not those of the claim." in faults(
        folder, (x * 0.99, y), claimed
    )
    found = faults(folder, (x, y.roll(1)), claimed)
    assert "the images or labels are not those of the claim." in found
    assert any(fault.startswith("image 0: the label is") for fault in found) == bool(y[-1] != y[0])
    fewer = faults(folder, (x[:9], y[:9]), claimed)
    assert fewer == ["the images or labels are not those of the claim."]


def test_a_changed_budget_or_protocol_is_found(folder, data, claimed):
    path = folder / "settings.json"
    settings = json.loads(path.read_text())
    settings["protocol"]["epsilon"] = 0.05
    path.write_text(json.dumps(settings))
    found = faults(folder, data, claimed)
    assert any(fault.startswith("the protocol was changed") for fault in found)
    assert any("more than the budget 0.05" in fault for fault in found)


def test_an_attack_that_is_not_the_strongest_is_found(folder, data):
    rows = robustness.read(folder).rows
    index = next(
        row["index"]
        for row in rows
        if row["strongest"] != "none"
        and row["attacks"]["none"][0] == 10
        and row["attacks"][row["strongest"]][0] < 10
    )
    edit(folder, index, strongest="none")
    found = faults(folder, data, claims.records(robustness.read(folder)))
    assert found == [f"image {index}: 'none' is not its strongest attack."]


def test_an_unfinished_run_is_no_claim(folder, data, claimed):
    edit(folder, 19, hits=None)
    with pytest.raises(ValueError, match="got 19 of 20 images; the same command goes on"):
        faults(folder, data, claimed)
