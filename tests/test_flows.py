"""Attacks that bend: the warp and its gradient, the price of roughness, and flows that are stored and verified."""

import json
import shutil

import pytest
import torch
import twins
from diffclass import attacks
from diffclass.attacks.threats import Flow
from diffclass.classifiers.base import Classifier
from diffclass.evaluation import claims, protocols, runs, verification
from safetensors.torch import load_file, save_file
from torch import nn

SHAPE = (1, 5, 6)
WEIGHTS = {"toy.safetensors": "ab" * 32}
OWN = dict(world="toy", classifier="toy", checkpoints=WEIGHTS, version="0")
BOUND = 0.12


def random(*shape, seed=0, dtype=torch.float64):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---------------------------------------------------------------------------------------------------------------------
# The warp


def by_shares(x, flow):
    """The warp by torch's own sampler, whose places are shares of the picture."""
    height, width = x.shape[2:]
    rows, columns = torch.meshgrid(
        torch.arange(height).to(x), torch.arange(width).to(x), indexing="ij"
    )
    right = 2 * (columns + 0.5 + flow[:, 0]) / width - 1
    down = 2 * (rows + 0.5 + flow[:, 1]) / height - 1
    places = torch.stack([right, down], -1)
    return nn.functional.grid_sample(x, places, padding_mode="border", align_corners=False)


@twins.rejected(
    {
        "by shares of the picture": dict(warp=by_shares),
        "half a pixel off": dict(warp=lambda x, flow: attacks.warp(x, flow + 0.5)),
    }
)
def test_without_a_flow_an_image_is_itself_bit_for_bit(warp=attacks.warp):
    for shape in ((3, 3, 32, 32), (2, 1, 8, 8), (2, 1, 7, 5), (2, 2, 1, 4), (2, 1, 4, 1)):
        x = random(*shape, dtype=torch.float32)
        flow = torch.zeros(shape[0], 2, *shape[2:])
        assert torch.equal(warp(x, flow), x), shape


def test_the_warp_is_what_torch_samples():
    x = random(3, 2, 7, 5)
    for reach in (0.3, 2.0, 40.0):
        flow = reach * (2 * random(3, 2, 7, 5, seed=1) - 1)
        assert torch.allclose(attacks.warp(x, flow), by_shares(x, flow), atol=1e-9)


@twins.rejected(
    {
        "half the slope": dict(
            warp=lambda x, flow: attacks.warp(x, flow.detach() + (flow - flow.detach()) / 2)
        ),
        "no slope down": dict(
            warp=lambda x, flow: attacks.warp(x, torch.stack([flow[:, 0], flow[:, 1].detach()], 1))
        ),
    }
)
def test_the_gradient_of_the_warp_is_that_of_finite_differences(warp=attacks.warp):
    x = random(2, 3, 5, 6)
    weight = random(2, 3, 5, 6, seed=1)
    # away from whole pixels, at which an interpolation has a kink
    flow = (0.1 + 0.3 * random(2, 2, 5, 6, seed=2)).requires_grad_()
    slope = torch.autograd.grad((weight * warp(x, flow)).sum(), flow)[0]
    step = 1e-6
    for seed in range(10):
        push = random(2, 2, 5, 6, seed=10 + seed) - 0.5
        with torch.no_grad():
            above = (weight * warp(x, flow + step * push)).sum()
            below = (weight * warp(x, flow - step * push)).sum()
        wanted = (above - below) / (2 * step)
        assert torch.allclose((slope * push).sum(), wanted, rtol=1e-5, atol=1e-8)


@twins.rejected(
    {
        "squares": dict(
            roughness=lambda flow: sum(
                (flow.diff(dim=axis) ** 2).flatten(1).sum(1) for axis in (2, 3)
            )
        ),
        "axis by axis": dict(
            roughness=lambda flow: sum(
                flow.diff(dim=axis).abs().flatten(1).sum(1) for axis in (2, 3)
            )
        ),
        "only beside": dict(
            roughness=lambda flow: (flow.diff(dim=3) ** 2).sum(1).sqrt().flatten(1).sum(1)
        ),
    }
)
def test_roughness_counts_every_pair_of_neighbours_once(roughness=attacks.roughness):
    flow = torch.zeros(3, 2, 5, 6, dtype=torch.float64)
    flow[0] += torch.tensor([0.3, -0.2])[:, None, None]  # a shift
    flow[1, :, 2, 3] = torch.tensor([0.3, 0.4])  # one place, with four neighbours
    flow[2, :, 0, 0] = torch.tensor([0.3, 0.4])  # a corner, with two
    wanted = torch.tensor([0.0, 2.0, 1.0], dtype=torch.float64)
    assert torch.allclose(roughness(flow), wanted, atol=1e-9)


def test_roughness_has_a_slope_where_a_flow_begins():
    flow = torch.zeros(2, 2, 5, 6, requires_grad=True)
    slope = torch.autograd.grad(attacks.roughness(flow).sum(), flow)[0]
    assert torch.equal(slope, torch.zeros_like(flow))


# ---------------------------------------------------------------------------------------------------------------------
# The attack


class Weighed(Classifier):
    """Three classes; weighted sums of the pixels, with a little noise where it is random."""

    num_classes = 3
    image_shape = SHAPE
    scale = "scores"
    calls = 1

    def __init__(self, noisy=False):
        super().__init__()
        self.weight = nn.Parameter(random(3, 30, seed=3).float() - 0.5)
        self.noisy = noisy

    def sample_noise(self, images, generator):
        return torch.randn((images, 3), generator=generator) if self.noisy else ()

    def logits(self, x, noise):
        scores = (x - 0.5).flatten(1) @ self.weight.T.to(x)
        return scores + 0.05 * noise if self.noisy else scores


def pictures(count=40):
    """Images and the labels that `Weighed` gives them."""
    x = random(count, *SHAPE, seed=4).float()
    with torch.no_grad():
        return x, Weighed()(x).argmax(1)


def test_a_bending_attack_keeps_to_its_bound_and_says_what_it_did():
    model = Weighed()
    x, y = pictures()
    frames = list(attacks.stadv(model, x, y, BOUND, steps=20, step_size=BOUND / 10))
    assert len(frames) == 21 and torch.equal(frames[0].x, x)
    for frame in frames:
        assert float(frame.flow.abs().max()) <= BOUND + 1e-6
        assert torch.equal(frame.size, frame.flow.flatten(1).abs().amax(1))
        assert torch.equal(frame.x, attacks.warp(x, frame.flow).clamp(0, 1))
        assert torch.equal(frame.logits, model(frame.x).detach())
        assert torch.equal(frame.fooled, frame.logits.argmax(1) != y)
    assert not bool(frames[0].fooled.any()) and int(frames[-1].fooled.sum()) > 10
    *_, nothing = attacks.stadv(model, x, y, 0.0, steps=3)
    assert torch.equal(nothing.x, x) and not bool(nothing.flow.any())


def smoother(stadv) -> bool:
    """Whether a larger weight of smoothness leaves smoother flows."""
    x, y = pictures()
    ends = []
    for weight in (0.0, 0.02):
        *_, last = stadv(Weighed(), x, y, BOUND, steps=20, smoothness=weight)
        ends.append(float(attacks.roughness(last.flow).mean()))
    return ends[1] < 0.8 * ends[0]


def test_smoothness_has_its_price():
    assert smoother(attacks.stadv)

    def rough(*given, smoothness, **options):
        return attacks.stadv(*given, smoothness=0.0, **options)

    assert not smoother(rough)


class Whispering(Weighed):
    """The same answers by logits ten thousand times smaller."""

    def logits(self, x, noise):
        return 1e-4 * super().logits(x, noise)


def test_a_wish_for_smoothness_is_no_defence_of_small_logits():
    """StAdv's fixed weight decides the steps against `Whispering`, whose answers are as easy to turn."""
    x, y = pictures()
    left = {}
    for attack in (attacks.stadv, attacks.bend):
        for model in (Weighed(), Whispering()):
            *_, last = attack(model, x, y, BOUND, steps=20)
            used = float(last.size.mean()) / BOUND
            left[attack, type(model)] = (int((~last.fooled).sum()), used)
    assert left[attacks.stadv, Whispering][1] < 0.5 < 0.9 < left[attacks.bend, Whispering][1]
    assert left[attacks.stadv, Whispering][0] > left[attacks.bend, Whispering][0] + 5
    assert left[attacks.bend, Whispering][0] == left[attacks.bend, Weighed][0]


def test_bending_without_the_wish_is_stadv_without_its_weight():
    x, y = pictures(6)
    frames = attacks.bend(Weighed(), x, y, BOUND, steps=5)
    others = attacks.stadv(Weighed(), x, y, BOUND, steps=5, smoothness=0.0)
    for frame, other in zip(frames, others, strict=True):
        assert torch.equal(frame.flow, other.flow)


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(norm="linf"), "expected the norm 'flow' for stadv, which adds nothing, got 'linf'"),
        (dict(smoothness=-1.0), "expected a weight of smoothness >= 0, got -1.0"),
        (dict(epsilon=-0.1), "expected a displacement between 0 and 5, the width of the image"),
        (dict(epsilon=6), "got 6; it is in pixel widths, not in shares"),
        (dict(step_size=2.0), "expected a step size of at most 0.24, across the whole budget"),
    ],
)
def test_bending_that_cannot_be_meant_gets_a_sentence(changes, said):
    x, y = pictures(4)
    options = dict(epsilon=BOUND, steps=20) | changes
    with pytest.raises(ValueError, match=said):
        next(attacks.stadv(Weighed(), x, y, **options))


def test_in_one_pixel_nothing_is_moved():
    with pytest.raises(ValueError, match="something can be moved, got images of 1x1"):
        attacks.threat("flow").check(0.1, (2, 1, 1))


# ---------------------------------------------------------------------------------------------------------------------
# Stored and verified


@pytest.fixture(scope="module", params=[False, True], ids=["deterministic", "random"])
def made(request, tmp_path_factory):
    """A finished run of flows, which no test changes, and its classifier."""
    folder = tmp_path_factory.mktemp("flows")
    model = Weighed(request.param)
    protocol = protocols.alone("stadv", model, "flow", BOUND, steps=20)
    for _ in runs.run(model, *pictures(), protocol, folder, OWN):
        pass
    claims.keep(folder, claims.records_of(runs.read(folder)))
    return folder, model


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "run")


def state_of(folder, model, **options):
    options = dict(seed=1, reattack=0) | options
    *_, state = verification.verify(
        model, *pictures(), runs.read(folder), WEIGHTS, claims.kept(folder), "madry", **options
    )
    return state


def test_flows_are_stored_as_flows_and_judged_as_bent_images(folder, made):
    _, model = made
    run = runs.read(folder)
    x, y = pictures()
    assert run.deltas.shape == (40, 2, 5, 6) and max(run.sizes) <= BOUND
    assert max(run.sizes) > 0.99 * BOUND
    assert run.protocol.norm == "flow"
    if model.deterministic:
        right = model(attacks.warp(x, run.deltas).clamp(0, 1)).argmax(1) == y
        assert [row["hits"] for row in run.rows] == right.long().tolist()
    assert sum(2 * row["hits"] <= run.settings["draws"] for row in run.rows) > 10


def test_records_say_how_far_and_how_roughly_flows_move(folder):
    run = runs.read(folder)
    listed = {record.metric: record for record in claims.kept(folder)}
    sizes = torch.tensor(run.sizes, dtype=torch.float64) / BOUND
    assert listed["displacement"].value == pytest.approx(float(sizes.mean()), abs=1e-6)
    most = (5 * 5 + 6 * 4) * 2 * 2**0.5 * BOUND
    shares = attacks.roughness(run.deltas.double()) / most
    assert listed["roughness"].value == pytest.approx(float(shares.mean()), abs=1e-6)
    assert 0 < listed["roughness"].low < listed["roughness"].high < 1
    assert listed["roughness"].what.startswith("roughness of toy on 40 images of toy under single")


def test_a_claim_about_flows_stands(folder, made):
    state = state_of(folder, made[1], reattack=4)
    assert state.faults == [] and state.images == 40 and state.attacked > 0
    assert any("the budget flow 0.12 in pixel widths" in sentence for sentence in state.about)
    assert all(entry["shape"] == [2, 5, 6] for entry in state.new)


def test_flows_are_applied_by_the_warp_and_nothing_else(folder, made, monkeypatch):
    """The twin of a verification that bends the other way."""
    own = Flow.applied
    monkeypatch.setattr(Flow, "applied", lambda self, x, change: own(self, x, -change))
    said = [fault for fault in state_of(folder, made[1]).faults if fault.startswith("image")]
    assert len(said) > 10


TAMPERINGS = {
    "mirrored": (lambda flow: flow.flip(-1), "image 3"),
    "the other way": (lambda flow: -flow, "image 3"),
    "rows for columns": (lambda flow: flow.flip(0), "image 3"),
    "nothing": (lambda flow: 0 * flow, "image 3"),
    "further": (lambda flow: 1.5 * flow, "image 3: the perturbation's flow size is 0.1"),
    "one torn place": (
        lambda flow: flow.index_put(
            (torch.tensor(0), torch.tensor(2), torch.tensor(2)), torch.tensor(-0.11)
        ),
        "the record 'roughness of toy",
    ),
    "not a number": (lambda flow: flow * torch.nan, "image 3"),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_a_tampered_flow_is_noticed(folder, made, name):
    change, said = TAMPERINGS[name]
    path = folder / "deltas-0.safetensors"
    flows = load_file(path)["deltas"]
    assert bool(flows[3].any())
    flows[3] = change(flows[3].float()).half()
    save_file({"deltas": flows}, path)
    faults = state_of(folder, made[1]).faults
    assert any(said in fault for fault in faults), faults


def test_perturbations_of_pixels_in_place_of_flows_are_noticed(folder, made):
    path = folder / "deltas-0.safetensors"
    save_file({"deltas": load_file(path)["deltas"][:, :1].contiguous()}, path)
    faults = state_of(folder, made[1]).faults
    assert any(r"shape [1, 5, 6], but [2, 5, 6] for these images" in fault for fault in faults)


def test_a_larger_bound_than_it_had_is_noticed(folder, made):
    path = folder / "settings.json"
    settings = json.loads(path.read_text())
    settings["protocol"]["epsilon"] = 2 * BOUND
    path.write_text(json.dumps(settings))
    faults = state_of(folder, made[1]).faults
    assert any("the record 'displacement of toy" in fault for fault in faults)
