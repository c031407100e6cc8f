"""The honest protocol reaches the truth where the truth is known: linear classifiers, whose worst image is a formula."""

import inspect
import itertools
import json
import math
import re
from dataclasses import replace

import pytest
import torch
import torchattacks
from diffclass import attacks
from diffclass.attacks import blackbox
from diffclass.classifiers.base import Classifier
from diffclass.evaluation import protocols, runs, tables
from diffclass.evaluation.protocols import Protocol
from diffclass.evaluation.runs import Run
from diffclass.storage import assets

SHAPE = (1, 3, 4)
PIXELS = 12
NEAR = 1e-3  # of a budget: what is stored is shorter by 2^-11


class Linear(Classifier):
    """f = W x + b, with noise that is the same for every class where it is random, and so decides nothing."""

    image_shape = SHAPE
    calls = 1

    def __init__(self, weight, bias, random=False, purified=False):
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.num_classes = len(weight)
        self.random = random
        self.purified = purified

    def sample_noise(self, images, generator):
        return torch.randn(images, 1, generator=generator) if self.random else ()

    def logits(self, x, noise):
        scores = x.flatten(1) @ self.weight.T + self.bias
        return scores + noise if self.random else scores

    def gradients(self):
        return {"exact": self, "bpda": self} if self.purified else {"exact": self}


def furthest(gradient, low, high, epsilon: float, norm: str):
    """How far a linear function can rise within the budget and the pixel range.

    Formula     L-inf: every pixel goes as far as it may. L2: delta = clip(s g, low, high), the condition of Karush, Kuhn
                and Tucker, at the s for which its norm is the budget; its norm rises with s, so bisection finds it
    Shapes      gradient, low, high [B,D] -> [B]
    """
    if norm == "linf":
        delta = torch.where(gradient > 0, high.clamp(max=epsilon), low.clamp(min=-epsilon))
        return (gradient * delta).sum(1)
    small = torch.zeros(len(gradient), 1, dtype=gradient.dtype)
    large = small + 1e6
    for _ in range(100):
        middle = (small + large) / 2
        delta = torch.clamp(middle * gradient, low, high)
        within = delta.norm(dim=1, keepdim=True) <= epsilon
        small = torch.where(within, middle, small)
        large = torch.where(within, large, middle)
    return (gradient * torch.clamp(small * gradient, low, high)).sum(1)


def highest_margin(model: Linear, x, y, epsilon: float, norm: str):
    """The largest margin of a wrong class within the budget, and the least of its rivals. Shapes: -> [B]."""
    weight = model.weight.double()
    flat = x.flatten(1).double()
    scores = flat @ weight.T + model.bias.double()
    margins = []
    for rival in range(len(weight)):
        gradient = weight[rival] - weight[y]
        gap = scores[:, rival] - scores.gather(1, y[:, None])[:, 0]
        margin = gap + furthest(gradient, -flat, 1 - flat, epsilon, norm)
        margins.append(margin.masked_fill(y == rival, -torch.inf))
    return torch.stack(margins).amax(0)


def robust(model: Linear, x, y, epsilon: float, norm: str) -> int:
    """How many images no perturbation within the budget can fool; none of them is too near to the border to be judged."""
    truth = highest_margin(model, x, y, epsilon, norm) < 0
    assert torch.equal(truth, highest_margin(model, x, y, (1 - NEAR) * epsilon, norm) < 0)
    return int(truth.sum())


def survivors(model, x, y, protocol: Protocol, folder) -> int:
    """How many images are left by a whole run, judged anew as it is stored."""
    for _ in runs.run(
        model, x, y, protocol, folder, dict(world="toy", classifier="linear", checkpoints={})
    ):
        pass
    rows = runs.read(folder).rows
    draws = protocol.draws if model.random else 1
    assert {row["hits"] for row in rows} <= {0, draws}
    return sum(row["hits"] == draws for row in rows)


def drawn(classes: int, seed: int, images: int = 40):
    """A classifier, images of which half have pixels close to the ends of the range, and labels that it is right about."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, PIXELS, generator=draw)
    weight = weight * torch.exp(torch.randn(classes, 1, generator=draw))
    x = torch.rand(images, *SHAPE, generator=draw)
    x[::2] = 0.4 + 0.2 * x[::2]
    x[1::2] = x[1::2].round() * 0.98 + 0.01
    bias = -(x.flatten(1) @ weight.T).mean(0)
    model = Linear(weight, bias)
    return model, x, model(x).argmax(1)


# Budgets at which a good part of the images is robust and a good part is not.
LINEAR = [
    (2, "linf", 0.06),
    (2, "l2", 0.15),
    (3, "linf", 0.04),
    (3, "l2", 0.1),
    (5, "linf", 0.04),
    (5, "l2", 0.1),
    (10, "linf", 0.03),
    (10, "l2", 0.08),
]


@pytest.mark.parametrize("classes, norm, epsilon", LINEAR)
def test_it_reaches_the_robust_accuracy_of_a_linear_classifier(classes, norm, epsilon, tmp_path):
    model, x, y = drawn(classes, seed=classes)
    left = robust(model, x, y, epsilon, norm)
    assert 10 <= left <= 30, "the budget tells nothing apart"
    flat = x.flatten(1)
    bound = ((flat < epsilon / 2) | (flat > 1 - epsilon / 2)).any(1)
    assert 10 <= int(bound.sum()) <= 30, "the range of pixels binds for half of the images"
    protocol = protocols.honest(model, norm, epsilon)
    assert protocol.key == "honest-2"
    assert survivors(model, x, y, protocol, tmp_path / "run") == left


@pytest.mark.parametrize("kind", [{}, dict(random=True), dict(random=True, purified=True)])
def test_it_reaches_it_whatever_the_classifier_declares(kind, tmp_path):
    model, x, y = drawn(4, seed=4, images=16)
    declared = Linear(model.weight, model.bias, **kind)
    left = robust(model, x, y, 0.04, "linf")
    assert 3 <= left <= 13
    protocol = protocols.honest(declared, "linf", 0.04)
    assert survivors(declared, x, y, protocol, tmp_path / "run") == left


EPSILON = 0.02


def far_rival(seed: int = 1652):
    """Five classes, one of which is far away at every image and steep: no untargeted loss climbs towards it.

    The seed is the first one at which margin and DLR leave 91 of 100 images where the truth is 75.
    """
    draw = torch.Generator().manual_seed(seed)
    steep = torch.tensor([0.2, 1, 1, 1, 12])[:, None]
    weight = torch.randn(5, PIXELS, generator=draw) * steep
    x = 0.45 + 0.1 * torch.rand(100, *SHAPE, generator=draw)
    before = torch.nn.functional.linear(x.flatten(1), weight).mean(0)
    bias = -before - torch.tensor([0, 0.5, 0.5, 0.5, 3.6])
    model = Linear(weight, bias)
    return model, x, model(x).argmax(1)


def test_the_first_version_misses_a_rival_that_the_second_one_targets(tmp_path):
    model, x, y = far_rival()
    assert robust(model, x, y, EPSILON, "linf") == 75
    fooled = torch.zeros(100, dtype=torch.bool)
    for loss in (attacks.margin_loss, attacks.dlr_loss):
        *_, last = attacks.apgd(model, x, y, EPSILON, loss=loss)
        fooled |= last.fooled
    assert int((~fooled).sum()) == 91
    first = protocols.named("honest", 1, model, "madry", "linf", EPSILON)
    assert survivors(model, x, y, first, tmp_path / "first") > 75
    second = protocols.named("honest", 2, model, "madry", "linf", EPSILON)
    assert second == protocols.honest(model, "linf", EPSILON)
    assert survivors(model, x, y, second, tmp_path / "second") == 75


# ---------------------------------------------------------------------------------------------------------------------
# Targets


def test_targets_are_ranked_by_the_clean_image_and_leave_no_class_out():
    model, x, y = drawn(5, seed=1)
    order = attacks.ranked(model, x, y)
    assert order.shape == (40, 4)
    scores = model(x)
    for image in range(40):
        assert sorted([int(y[image]), *order[image].tolist()]) == [0, 1, 2, 3, 4]
        along = scores[image][order[image]]
        assert bool((along[:-1] >= along[1:]).all())
    assert attacks.ranks(2) == (1,)
    assert attacks.ranks(10) == attacks.ranks(100) == (1, 2, 3, 4, 5, 6, 7, 8, 9)


def test_equal_logits_leave_no_class_out_either():
    flat = Linear(torch.zeros(4, PIXELS), torch.zeros(4))
    x = torch.full((4, *SHAPE), 0.5)
    order = attacks.ranked(flat, x, torch.arange(4))
    assert order.tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]


# ---------------------------------------------------------------------------------------------------------------------
# Square


def walk(model, x, y, epsilon, norm, steps=300, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return list(
        attacks.square(model, x, y, epsilon, norm=norm, steps=steps, generator=generator, **options)
    )


@pytest.mark.parametrize("norm, epsilon", [("linf", 0.03), ("l2", 0.1)])
def test_square_climbs_within_the_budget_close_to_the_worst_image(norm, epsilon):
    draw = torch.Generator().manual_seed(2)
    model = Linear(torch.randn(3, 64, generator=draw), torch.zeros(3))
    model.image_shape = (1, 8, 8)
    x = torch.rand(20, 1, 8, 8, generator=draw)
    y = model(x).argmax(1)
    frames = walk(model, x, y, epsilon, norm, steps=1000)
    assert [frame.step for frame in frames] == list(range(1001))
    for frame in frames[::100]:
        assert float(attacks.size_of(frame.x - x, norm).max()) <= epsilon + 1e-6
        assert 0 <= float(frame.x.min()) and float(frame.x.max()) <= 1
        assert torch.equal(frame.logits, model(frame.x))
        assert torch.equal(frame.fooled, frame.logits.argmax(1) != y)
    heights = torch.stack([attacks.margin_loss(frame.logits, y) for frame in frames])
    assert bool((heights[1:] >= heights[:-1]).all())
    best = highest_margin(model, x, y, epsilon, norm)
    start = attacks.margin_loss(model(x), y)
    gained = (heights[-1] - start) / (best - start)
    assert float(gained.min()) > {"linf": 0.999, "l2": 0.7}[norm]
    assert float(gained.max()) < 1.001


@pytest.mark.parametrize("norm, epsilon", [("linf", 0.03), ("l2", 0.1)])
def test_a_walk_by_squares_depends_on_the_seed_and_on_no_other_image(norm, epsilon):
    model, x, y = drawn(3, seed=3)
    steps = 8  # few enough that chance still shows
    whole = walk(model, x, y, epsilon, norm, steps)[-1].x
    assert torch.equal(whole, walk(model, x, y, epsilon, norm, steps)[-1].x)
    some = torch.tensor([5, 17, 30])
    alone = walk(model, x[some], y[some], epsilon, norm, steps)[-1].x
    assert torch.allclose(whole[some], alone, atol=1e-6)
    assert not torch.equal(whole, walk(model, x, y, epsilon, norm, steps, seed=1)[-1].x)
    unseeded = list(attacks.square(model, x, y, epsilon, norm=norm, steps=steps))[-1].x
    assert torch.equal(whole, unseeded)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 1, 1), (3, 5, 9), (1, 2, 7)])
def test_squares_fit_images_of_any_shape(norm, shape):
    draw = torch.Generator().manual_seed(0)
    numbers = shape[0] * shape[1] * shape[2]
    model = Linear(torch.randn(3, numbers, generator=draw), torch.zeros(3))
    model.image_shape = shape
    x = torch.rand(4, *shape, generator=draw)
    y = model(x).argmax(1)
    before = attacks.margin_loss(model(x), y)
    last = walk(model, x, y, 0.2, norm)[-1]
    assert bool((attacks.margin_loss(last.logits, y) > before).all())
    assert float(last.size.max()) <= 0.2 + 1e-6


def test_squares_fool_a_classifier_whose_gradient_is_masked():
    class Masked(Linear):
        def logits(self, x, noise):
            return super().logits((16 * x).round() / 16, noise)

    model, x, y = drawn(3, seed=3)
    masked = Masked(model.weight, model.bias)
    y = masked(x).argmax(1)
    *_, by_gradient = attacks.pgd(masked, x, y, 0.1)
    by_squares = walk(masked, x, y, 0.1, "linf")[-1]
    assert int(by_gradient.fooled.sum()) == 0
    assert int(by_squares.fooled.sum()) >= 20


def test_the_squares_shrink_as_in_the_paper():
    share = blackbox.area_at
    assert share(0, 10_000) == share(10, 10_000) == 0.8
    assert share(11, 10_000) == 0.4 and share(51, 10_000) == 0.2
    assert share(9_999, 10_000) == 0.8 / 512
    assert share(51, 1000) == share(510, 10_000) == 0.8 / 16
    theirs = torchattacks.Square(torch.nn.Linear(1, 1), n_queries=5000, p_init=0.8)
    assert [share(step, 5000) for step in range(5000)] == [
        theirs.p_selection(step) for step in range(5000)
    ]


def test_whoever_says_nothing_gets_as_many_steps_as_the_papers_take():
    """Square's 5000 queries; 100 steps of APGD, of which the reference AutoAttack takes as many; 20 of PGD."""
    defaults = {
        name: inspect.signature(getattr(attacks, name)).parameters["steps"].default
        for name in ("square", "apgd", "pgd", "smallest_l2")
    }
    theirs = inspect.signature(torchattacks.Square).parameters["n_queries"].default
    assert defaults == {"square": theirs, "apgd": 100, "pgd": 20, "smallest_l2": 20}


def test_a_bump_is_a_hill_beside_a_valley_of_unit_norm():
    draw = torch.Generator().manual_seed(0)
    for side in range(1, 8):
        shape = blackbox.bump(side, draw)
        assert shape.shape == (side, side)
        assert float(shape.norm()) == pytest.approx(1)
        assert side == 1 or (float(shape.min()) < 0 < float(shape.max()))


def test_a_hill_falls_off_by_inverse_squares():
    row = torch.tensor([1 / 4, 1 + 1 / 4, 1 / 4], dtype=torch.float64)
    assert torch.allclose(blackbox._hill(1, 3), row[None] / row.norm())


class Rising(Classifier):
    """A margin that is higher at every call, wherever it is asked: every proposal is kept."""

    scale = "scores"
    calls = 1
    num_classes = 2

    def __init__(self, shape):
        super().__init__()
        self.image_shape = shape
        self.asked = 0

    def logits(self, x, noise):
        self.asked += 1
        height = torch.full((len(x),), float(self.asked))
        return torch.stack([torch.zeros_like(height), height], 1)


@pytest.mark.parametrize("step, side", [(1, 9), (12, 6), (52, 4)])
def test_a_square_covers_the_share_of_the_image_that_its_step_says(step, side):
    """0.8, 0.4 and 0.2 of 10x10 pixels: squares of side 9, 6 and 4, one of which shows whole in many walks."""
    largest = 0
    for seed in range(12):
        model = Rising((1, 10, 10))
        x = torch.full((1, 1, 10, 10), 0.5)
        generator = torch.Generator().manual_seed(seed)
        frames = attacks.square(
            model, x, torch.zeros(1).long(), 0.1, steps=10_000, generator=generator
        )
        before, after = [frame.x for frame in itertools.islice(frames, step + 1)][-2:]
        rows, columns = torch.nonzero((before != after)[0, 0], as_tuple=True)
        if len(rows):
            height = int(rows.max() - rows.min()) + 1
            largest = max(largest, height, int(columns.max() - columns.min()) + 1)
    assert largest == side


def test_a_bump_stands_upright_as_often_as_it_lies():
    draw = torch.Generator().manual_seed(0)
    shapes = [blackbox.bump(3, draw) for _ in range(400)]
    # upright: the hill is the first row of three, and every row is as good from left as from right
    upright = sum(torch.equal(shape, shape.flip(1)) for shape in shapes)
    lying = sum(torch.equal(shape, shape.flip(0)) for shape in shapes)
    assert upright + lying == 400 and 150 < upright < 250  # five standard deviations of 10


def moved_by_hand(best, x0, epsilon, side, generator):
    """Algorithm 3 of Andriushchenko et al. 2020 for pictures of one channel far from the ends of [0,1]."""
    height, width = x0.shape[2:]
    corners = [
        int(torch.randint(n - side + 1, (), generator=generator)) for n in 2 * (height, width)
    ]
    (top, left), (top2, left2) = corners[:2], corners[2:]
    shape = blackbox.bump(side, generator).to(x0)
    sign = float(2 * torch.randint(2, (1, 1, 1), generator=generator) - 1)
    moved = best.clone()
    for image in range(len(best)):
        delta = (best - x0)[image, 0]
        inside = torch.zeros(height, width, dtype=torch.bool)
        inside[top : top + side, left : left + side] = True
        inside[top2 : top2 + side, left2 : left2 + side] = True
        unused = epsilon**2 - float((delta**2).sum())
        budget = math.sqrt(unused + float((delta[inside] ** 2).sum()))
        window = delta[top : top + side, left : left + side].clone()
        new = window / window.norm() + sign * shape
        new = budget * new / new.norm()
        delta[inside] = 0
        delta[top : top + side, left : left + side] = new
        moved[image, 0] = x0[image, 0] + delta
    return moved


@pytest.mark.parametrize("area, side", [(1.0, 3), (16.0, 5), (27.0, 5)])
def test_a_bump_is_paid_with_what_another_window_had(area, side):
    """Windows of odd sides, at least 3; the budget of both goes to one of them, with what was not used yet."""
    draw = torch.Generator().manual_seed(4)
    x0 = torch.full((2, 1, 8, 8), 0.5, dtype=torch.float64)
    delta = torch.randn(x0.shape, generator=draw, dtype=torch.float64)
    sizes = torch.tensor([0.1, 0.07], dtype=torch.float64)[:, None, None, None]
    best = x0 + sizes * delta / delta.flatten(1).norm(dim=1)[:, None, None, None]
    for seed in range(5):
        moved = blackbox._moved(best, x0, 0.1, area, torch.Generator().manual_seed(seed))
        wanted = moved_by_hand(best, x0, 0.1, side, torch.Generator().manual_seed(seed))
        assert torch.allclose(moved, wanted, atol=1e-12)
        lengths = (moved - x0).flatten(1).norm(dim=1)
        assert torch.allclose(lengths, torch.full_like(lengths, 0.1), atol=1e-12)


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(steps=-1), "expected steps >= 0, got -1"),
        (dict(epsilon=8), "larger than the pixel range"),
        (dict(norm="l1"), "expected norm 'linf' or 'l2', got 'l1'"),
    ],
)
def test_squares_that_cannot_be_meant_get_a_sentence(changes, said):
    model, x, y = drawn(3, seed=3)
    options = dict(epsilon=0.1, norm="linf", steps=3) | changes
    with pytest.raises(ValueError, match=said):
        list(attacks.square(model, x, y, **options))


# ---------------------------------------------------------------------------------------------------------------------
# The reference AutoAttack, run on the same images outside this repository


REFERENCE = assets.folder() / "records" / "reference-autoattack.json"
FIGURES = json.loads(REFERENCE.read_text(encoding="utf-8"))


def on_record() -> dict[tuple, Run]:
    """The runs by honest-2 of classifiers without noise: (world, classifier, norm, budget) -> run; AutoAttack bends nothing."""
    listed = {}
    for world in ("digits", "cifar10"):
        for folder in tables.folders(world):
            run = runs.read(folder)
            bent = run.protocol.norm == "flow"
            if run.protocol.key == "honest-2" and run.settings["draws"] == 1 and not bent:
                name = run.settings["classifier"]
                listed[world, name, run.protocol.norm, run.protocol.epsilon] = run
    return listed


def key(figure: dict) -> tuple:
    return figure["world"], figure["classifier"], figure["norm"], figure["epsilon"]


def unbeaten(run: Run, figure: dict) -> bool:
    """Whether a run leaves no more images than the reference did."""
    standing = {i for i, stood in enumerate(figure["standing"]) if stood == "1"}
    assert len(standing) == figure["stood"] and len(figure["standing"]) == figure["n"]
    return sum(row["hits"] > 0 for row in run.rows) <= len(standing)


@pytest.mark.parametrize(
    "figure", FIGURES["runs"], ids=lambda figure: "-".join(map(str, key(figure)))
)
def test_no_record_is_above_what_the_reference_autoattack_leaves(figure):
    run = on_record()[key(figure)]
    for name in ("images", "checkpoints", "n"):
        assert run.settings[name] == figure[name], name
    assert unbeaten(run, figure)
    # the twin: one image more would be above it
    rows = [{**row, "hits": int(i <= figure["stood"])} for i, row in enumerate(run.rows)]
    assert not unbeaten(replace(run, rows=rows), figure)


def test_every_record_of_the_second_version_without_noise_has_its_reference_or_is_named():
    compared = {key(figure) for figure in FIGURES["runs"]}
    named = {key(record) for record in FIGURES["missing"]}
    assert compared and not compared & named
    assert set(on_record()) == compared | named
    assert re.fullmatch("[0-9a-f]{40}", FIGURES["commit"]) and FIGURES["version"] == "standard"
