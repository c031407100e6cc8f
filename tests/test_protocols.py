"""Attack protocols: closed forms reached, the worst per image, luck exposed, runs that can be killed at any point."""

import json
import math
from dataclasses import replace

import pytest
import torch
from diffclass import attacks, intervals
from diffclass.classifiers.randomised import Randomised
from diffclass.evaluation import claims, protocols, robustness
from diffclass.evaluation.protocols import Attack, Protocol
from diffclass.storage import files
from torch import nn

SHAPE = (1, 2, 2)
OWN = dict(world="toy", checkpoints={}, version="0")


class Linear(nn.Module):
    """Logits W x + b, plus noise that has nothing to do with x where `noise` is given."""

    num_classes = 3
    image_shape = SHAPE

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(3, 4, generator=generator))
        self.bias = nn.Parameter(-self.weight.detach().sum(1) / 2)

    def forward(self, x):
        return x.flatten(1) @ self.weight.T + self.bias


class Noisy(Randomised, Linear):
    """The same with noise on the logits: fixed, or drawn anew."""

    def forward(self, x):
        generator = torch.Generator().manual_seed(0) if self.deterministic else self.generator
        noise = torch.randn(1 if self.deterministic else len(x), 3, generator=generator)
        return super().forward(x) + 2 * noise


@pytest.fixture(scope="module")
def points():
    """Images that Linear classifies correctly, far enough from the ends of [0,1] for the whole budget."""
    x = 0.2 + 0.6 * torch.rand(60, *SHAPE, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return x, Linear()(x).argmax(1)


def robust(model, x, y, epsilon, size) -> torch.Tensor:
    """The closed form: every margin is larger than epsilon times the dual norm of its slope."""
    logits = model(x).detach()
    safe = torch.ones(len(x), dtype=torch.bool)
    for k in range(3):
        gap = logits.gather(1, y[:, None])[:, 0] - logits[:, k]
        slope = size((model.weight[y] - model.weight[k]).detach())
        safe &= (gap > epsilon * slope) | (y == k)
    return safe


def finished(model, points, protocol, folder, **options):
    progress = list(robustness.run(model, *points, protocol, folder, OWN, **options))
    return robustness.read(folder), progress


def few(steps=5, **options) -> Protocol:
    """A protocol that takes no time."""
    listed = (Attack("margin", steps), Attack("scaled CE", steps, fresh=False))
    return Protocol("honest", "dc", "linf", 0.1, listed, "a test", **options)


@pytest.mark.parametrize("norm, dual, epsilon", [("linf", 1, 0.08), ("l2", 2, 0.12)])
def test_the_honest_protocol_reaches_the_closed_form(points, tmp_path, norm, dual, epsilon):
    found, _ = finished(
        Linear(), points, protocols.honest("cnn", norm, epsilon, classes=3), tmp_path
    )
    got = torch.tensor([row["hits"] for row in found.rows]) == 1
    wanted = robust(Linear(), *points, epsilon, lambda slope: slope.norm(p=dual, dim=1))
    mutated = robust(Linear(), *points, epsilon, lambda slope: slope.norm(p=3 - dual, dim=1))
    assert (
        10 < int(wanted.sum()) < 50 and torch.equal(got, wanted) and not torch.equal(got, mutated)
    )
    clean, bound, *alone = claims.records(found)
    assert (
        clean.value == 1
        and bound.value == float(wanted.double().mean())
        and bound.method == "Clopper-Pearson"
    )
    assert "upper bound" in bound.what and "honest protocol" in bound.what and norm in bound.what
    assert found.settings["draws"] == 1 and len(alone) == 3


def test_the_minimum_is_taken_per_image_not_of_averages(points, tmp_path, monkeypatch):
    """Two attacks that each only touch half of the images: either alone leaves half, both leave nothing."""

    def only(parity):
        return lambda logits, y: attacks.margin_loss(logits, y) * (y % 2 == parity)

    monkeypatch.setitem(protocols.LOSSES, "even", only(0))
    monkeypatch.setitem(protocols.LOSSES, "odd", only(1))
    protocol = Protocol(
        "honest", "dc", "linf", 0.5, (Attack("even", 20), Attack("odd", 20)), "a test"
    )
    found, _ = finished(Linear(), points, protocol, tmp_path)
    first, second = (name for name, _ in protocol.runs())
    for row in found.rows:
        assert row["hits"] == min(entry[0] for entry in row["attacks"].values() if entry)
    after_first = [row["attacks"][first][0] for row in found.rows]
    tried_again = [row["attacks"][second][0] for row in found.rows if row["attacks"][second]]
    total = sum(row["hits"] for row in found.rows)
    assert 0 < sum(after_first) < 60 and total < sum(after_first) and 0 == sum(tried_again) == total


def test_noise_alone_is_exposed_by_the_worst_of_ten(points, tmp_path):
    found, _ = finished(Noisy(), points, few(), tmp_path)
    named = claims.records(found)[:4]
    assert [record.what.split(", ")[-1] for record in named] == 2 * [
        "average of 10 draws",
        "worst of 10 draws",
    ]
    clean, clean_worst, average, worst = (record.value for record in named)
    assert (
        average > 0.25 and worst < average / 3 and worst <= clean_worst < clean and average < clean
    )


def test_one_lucky_draw_does_not_spare_an_image_from_later_attacks(points, tmp_path):
    found, _ = finished(Noisy(), points, few(), tmp_path)
    first, second = (name for name, _ in few().runs())
    spared = [row for row in found.rows if row["attacks"][second] is None]
    lucky = [
        row
        for row in found.rows
        if 0 < row["attacks"][first][0] < 10 and row["attacks"]["none"][0] > 0
    ]
    assert lucky and all(row["attacks"][second] is not None for row in lucky)
    assert all(min(e[0] for e in row["attacks"].values() if e) == 0 for row in spared)


def test_the_number_that_counts_is_not_the_one_that_selected(points, tmp_path):
    """Choosing the least of several noisy counts is itself luck; the chosen perturbation is judged with other noise."""
    many = replace(
        few(), attacks=tuple(Attack("margin", step) for step in range(1, 9)), epsilon=0.0
    )
    found, _ = finished(Noisy(), points, many, tmp_path)
    least = sum(min(e[0] for e in row["attacks"].values() if e) for row in found.rows) / 600
    judged, clean = (sum(row[key] for row in found.rows) / 600 for key in ("hits", "clean"))
    assert least < clean - 0.1 and judged == pytest.approx(
        clean, abs=0.05
    )  # a budget of nothing changes nothing


def contents(folder) -> dict:
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.glob("*"))
        if not path.name.startswith(".")
    }


def test_a_killed_run_ends_as_an_unbroken_one(points, tmp_path):
    model = Noisy()
    protocol = few()
    _, progress = finished(model, points, protocol, tmp_path / "whole", batch=25)
    assert [p.images for p in progress] == [0, 0, 25, 25, 25, 50, 50, 50, 60] and progress[
        -1
    ].total == 60
    for stop in range(1, len(progress)):
        folder = tmp_path / str(stop)
        run = robustness.run(model, *points, protocol, folder, OWN, batch=25)
        assert [next(run) for _ in range(stop)] == progress[:stop]
        run.close()
        assert len(robustness.read(folder).rows) == min(
            60, 25 * math.ceil(stop / 3)
        )  # what is done is kept
        finished(model, points, protocol, folder, batch=25)
        assert contents(folder) == contents(tmp_path / "whole")


def test_a_run_killed_between_two_files_ends_as_an_unbroken_one(points, tmp_path, monkeypatch):
    finished(Noisy(), points, few(), tmp_path / "whole", batch=25)
    write = files.write
    for stop in range(1, 8):
        left = [stop]

        def failing(path, content, left=left):
            left[0] -= path.name == robustness.ROWS
            if not left[0]:
                raise OSError("no space left on device")
            write(path, content)

        folder = tmp_path / str(stop)
        with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
            patch.setattr(files, "write", failing)
            finished(Noisy(), points, few(), folder, batch=25)
        finished(Noisy(), points, few(), folder, batch=25)
        assert contents(folder) == contents(tmp_path / "whole")


def test_a_folder_of_other_settings_is_refused(points, tmp_path):
    finished(Linear(), points, few(), tmp_path)
    other = (
        (few(6), {}, "protocol"),
        (few(), dict(seed=1), "seed"),
        (few(), dict(batch=7), "batch"),
    )
    for protocol, options, named in other:
        with pytest.raises(ValueError, match=f"{named}.* differ; name another folder"):
            finished(Linear(), points, protocol, tmp_path, **options)
    with pytest.raises(ValueError, match=r"\['images', 'n'\] differ"):
        finished(Linear(), (points[0][:9], points[1][:9]), few(), tmp_path)
    run = robustness.run(Linear(), *points, few(), tmp_path / "new", OWN)
    next(run)
    with pytest.raises(RuntimeError, match="another run holds its lock"):
        finished(Linear(), points, few(), tmp_path / "new")
    run.close()


class Odd(Linear):
    """A model with something wrong, from the call `since` on."""

    def __init__(self, wrong, since=0):
        super().__init__()
        self.wrong = wrong
        self.left = since

    def forward(self, x):
        self.left -= 1
        return super().forward(x) if self.left >= 0 else self.wrong(super().forward(x))


BAD_MODELS = [
    (lambda f: f.softmax(1), ValueError, "expected logits, got rows of probabilities"),
    (lambda f: f.detach(), TypeError, "logits without a gradient"),
    (lambda f: f * torch.nan, FloatingPointError, "became NaN and cannot be judged"),
    (
        lambda f: (f - f.detach()).sqrt() + f.detach(),
        FloatingPointError,
        "became non-finite at step 0",
    ),
]


@pytest.mark.parametrize("wrong, error, said", BAD_MODELS)
def test_classifiers_that_cannot_be_attacked(points, tmp_path, wrong, error, said):
    with pytest.raises(error, match=said):
        finished(Odd(wrong), points, few(), tmp_path)


def test_what_was_done_before_a_failure_is_kept(points, tmp_path):
    failing = Odd(
        lambda f: f * torch.nan, since=10
    )  # two judge, six attack, one judges, one calibrates
    with pytest.raises(FloatingPointError):
        finished(failing, points, few(), tmp_path / "part")
    rows = robustness.read(tmp_path / "part").rows
    assert len(rows) == 60 and all(
        set(row["attacks"]) == {"none", few().runs()[0][0]} for row in rows
    )
    finished(Linear(), points, few(), tmp_path / "part")
    finished(Linear(), points, few(), tmp_path / "whole")
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(x=lambda x: 2 * x - 1), r"model space \[-1,1\]; pass units.to_pixel"),
        (dict(x=lambda x: 255 * x), r"look like \[0,255\]; divide by 255"),
        (dict(y=lambda y: y + 3), "expected labels between 0 and 2"),
        (dict(epsilon=8), "did you mean 8/255"),
        (dict(epsilon=-0.1), "expected an attack budget >= 0"),
        (dict(norm="l1"), "expected norm 'linf' or 'l2'"),
        (dict(batch=0), "at least one image at once"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_written(points, tmp_path, change, said):
    x = change.get("x", lambda x: x)(points[0])
    y = change.get("y", lambda y: y)(points[1])
    protocol = replace(few(), **{k: v for k, v in change.items() if k in ("epsilon", "norm")})
    with pytest.raises(ValueError, match=said):
        list(
            robustness.run(
                Linear(), x, y, protocol, tmp_path / "new", OWN, batch=change.get("batch", 8)
            )
        )
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------------------------------------------------
# What a protocol is


def test_the_repr_of_a_protocol_is_everything_that_was_chosen(points, tmp_path):
    protocol = protocols.paper("diffpure", "l2", 0.5)
    scope = dict(Protocol=Protocol, Attack=Attack)
    assert eval(repr(protocol), scope) == protocol and protocol.source.endswith(".")
    found, _ = finished(Linear(), points, few(), tmp_path)
    assert found.protocol == few() and found.settings["chosen"] == repr(few())


@pytest.mark.parametrize("name", protocols.PAPERS)
def test_the_honest_protocol_has_what_it_promises(name):
    paper = protocols.paper(name, "linf", 0.1)
    honest = protocols.honest(name, "linf", 0.1)
    listed = honest.attacks
    assert honest.draws == 10 and {"margin", "DLR", "scaled CE"} == {
        attack.loss for attack in listed
    }
    assert all(attack.steps >= 100 for attack in listed) and len(honest.runs()) >= 3
    assert all(attack.method == ("pgd" if attack.fresh else "apgd") for attack in listed), (
        "a lucky draw is no ascent"
    )
    if name in protocols.PURIFIED:
        assert {attack.exact for attack in listed} == {True, False}
    if name not in protocols.DETERMINISTIC:
        assert {attack.fresh for attack in listed} == {True, False}
    assert paper.source != honest.source and len(paper.source.split()) > 5
    assert not any(
        attack.loss == "DLR" for attack in protocols.honest(name, "linf", 0.1, classes=2).attacks
    )


def test_names_and_choices_that_do_not_exist():
    for make in (protocols.paper, protocols.honest):
        with pytest.raises(ValueError, match="got 'vote'"):
            make("vote", "linf", 0.1)
    with pytest.raises(
        ValueError, match="expected at least 3 classes, as the paper's protocol for rdc5"
    ):
        protocols.paper("rdc5", "linf", 0.1, classes=2)
    for options, said in (
        (dict(loss="margins"), "expected a loss of"),
        (dict(draws=4, fresh=False), "one draw of fixed noise"),
        (dict(steps=0), "at least one step"),
        (dict(step=0.1), "none for apgd"),
        (dict(method="pgd"), "expected a step size for pgd"),
    ):
        with pytest.raises(ValueError, match=said):
            Attack(**{"loss": "margin", **options})
    with pytest.raises(ValueError, match="got one twice"):
        Protocol("honest", "dc", "linf", 0.1, (Attack("margin"), Attack("margin")), "a test")


def test_cost_is_counted(points, tmp_path):
    class Counting(Linear):
        seen = 0

        def forward(self, x):
            self.seen += len(x)
            return super().forward(x)

    model = Counting()
    protocol = Protocol(
        "honest",
        "dc",
        "linf",
        0.05,
        (Attack("margin", 7), Attack("DLR", 3, restarts=2), Attack("scaled CE", 2, draws=3)),
        "a test",
    )
    found, _ = finished(model, points, protocol, tmp_path)
    assert sum(row["calls"] for row in found.rows) == model.seen
    assert claims.records(found)[0].settings["classifier calls per image"] == round(
        model.seen / 60, 1
    )


# ---------------------------------------------------------------------------------------------------------------------
# The interval of an average


def test_the_interval_of_an_average_covers_and_that_of_pooled_draws_does_not():
    rng = torch.Generator().manual_seed(0)
    covered = pooled = 0
    for _ in range(400):
        own = (
            torch.rand(50, generator=rng) < 0.6
        ).double()  # what each image's draws have in common
        hits = (torch.rand(50, 10, generator=rng) < (0.1 + 0.8 * own)[:, None]).sum(1).tolist()
        low, high = intervals.mean_interval([hit / 10 for hit in hits], 10)
        covered += low <= 0.58 <= high
        low, high = intervals.interval(sum(hits), 500)
        pooled += low <= 0.58 <= high
    assert covered >= 0.93 * 400 and pooled < 0.8 * 400


def test_the_interval_of_an_average_at_its_ends():
    assert intervals.mean_interval([1.0] * 30, 10) == (
        pytest.approx(intervals.interval(30, 30)[0]),
        1.0,
    )
    assert intervals.mean_interval([0.0] * 30, 10) == (
        0.0,
        pytest.approx(intervals.interval(0, 30)[1]),
    )
    low, high = intervals.mean_interval([0.5] * 30, 10)  # no image differs: at most all draws count
    assert (low, high) == pytest.approx(intervals.interval(150, 300)) and low < 0.5 < high
    assert intervals.mean_interval([0.4], 10)[0] < 0.4
    with pytest.raises(ValueError, match="divide hits by draws"):
        intervals.mean_interval([4.0], 10)


def test_an_unfinished_run_has_no_records(points, tmp_path):
    run = robustness.run(Linear(), *points, few(), tmp_path, OWN, batch=30)
    next(run)
    run.close()
    with pytest.raises(ValueError, match="got 0 of 60 images; the same command goes on"):
        claims.records(robustness.read(tmp_path))


def test_damaged_folders_get_a_sentence(points, tmp_path):
    with pytest.raises(
        FileNotFoundError, match="found no settings.json; `diffclass evaluate --attack"
    ):
        robustness.read(tmp_path)
    finished(Linear(), points, few(), tmp_path)
    rows = tmp_path / "rows.jsonl"
    deltas = tmp_path / "deltas-0.safetensors"
    whole = rows.read_text(), deltas.read_bytes()
    for text in (
        whole[0].replace('"hits"', '"hit"', 1),
        whole[0].split("\n", 1)[1],
        "[]\n" + whole[0],
    ):
        rows.write_text(text)
        with pytest.raises(ValueError, match="line 1 of .* is not the row of image 0"):
            robustness.read(tmp_path)
    rows.write_text(whole[0])
    deltas.write_bytes(whole[1][:-50])
    with pytest.raises(ValueError, match="cut short"):
        robustness.read(tmp_path)
    deltas.write_bytes(whole[1])
    settings = json.loads((tmp_path / "settings.json").read_text())
    (tmp_path / "settings.json").write_text(json.dumps({"levels": settings["seed"]}))
    with pytest.raises(ValueError, match="to be that of an attack, got one without"):
        robustness.read(tmp_path)


def test_perturbations_are_split_into_files_of_bounded_size(points, tmp_path, monkeypatch):
    finished(Linear(), points, few(), tmp_path / "one")
    monkeypatch.setattr(robustness, "SHARD_BYTES", 8 * 25)  # 25 images of 4 numbers of 16 bits
    found, _ = finished(Linear(), points, few(), tmp_path / "many", batch=16)
    again, _ = finished(Linear(), points, few(), tmp_path / "whole", batch=16)
    assert sorted(p.name for p in (tmp_path / "many").glob("d*")) == [
        f"deltas-{i}.safetensors" for i in range(3)
    ]
    assert torch.equal(found.deltas, again.deltas) and len(found.deltas) == 60


def grows(stored) -> bool:
    """Whether what is stored of random perturbations is anywhere longer than they are, or loses a thousandth."""
    deltas = 0.1 * (2 * torch.rand(100_000, generator=torch.Generator().manual_seed(0)) - 1)
    kept = stored(deltas)
    assert kept.dtype == deltas.dtype and torch.equal(kept, kept.half().float())
    return bool((kept.abs() > deltas.abs()).any()) or float((kept - deltas).abs().max()) > 1e-4


def test_what_is_stored_of_a_perturbation_is_never_longer():
    assert (
        not grows(robustness.storable)
        and float(robustness.storable(torch.tensor([8 / 255]))) <= 8 / 255
    )
    assert grows(lambda deltas: deltas.half().float())  # the twin that only rounds


def convex_rivals(start: str) -> float:
    """Robust accuracy that APGD on the margin leaves of a linear classifier of six classes, from one start."""
    made = torch.Generator().manual_seed(3)
    weights = torch.randn(6, 12, generator=made)
    x = torch.rand(300, 1, 3, 4, generator=made)
    model = torch.nn.Module()
    model.num_classes = 6
    model.image_shape = (1, 3, 4)
    model.forward = lambda z: z.flatten(1) @ weights.T
    y = model.forward(x).argmax(1)
    noise, first = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    *_, last = Attack("margin", 20, start=start).frames(model, x, y, 0.1, "linf", noise, first)
    return float((~last.fooled).double().mean())


def test_the_first_run_starts_at_the_image_and_the_others_at_random():
    """A convex margin has a peak for every rival, and a random start may climb the wrong one."""
    listed = (Attack("margin", restarts=3), Attack("CE", start="random"))
    protocol = Protocol("honest", "dc", "linf", 0.1, listed, "ours")
    assert [attack.start for _, attack in protocol.runs()] == [
        "image",
        "random",
        "random",
        "random",
    ]
    assert convex_rivals("image") < convex_rivals("random")
    with pytest.raises(
        ValueError, match="expected an attack to start at the 'image' or at 'random', got 'zero'"
    ):
        Attack("margin", start="zero")


def test_the_line_of_an_attack_is_the_least_of_its_runs(points, tmp_path):
    """CE of one step with random starts: what the first run leaves, a later one fells."""
    attack = Attack("CE", 1, "pgd", step=0.6, restarts=6, fresh=False)
    protocol = Protocol("honest", "cnn", "linf", 0.08, (attack,), "a test")
    found, _ = finished(Linear(), points, protocol, tmp_path)
    left = [
        min(seen[0] for name, seen in row["attacks"].items() if seen and name != "none")
        for row in found.rows
    ]
    first = [row["attacks"][protocol.runs()[0][0]][0] for row in found.rows]
    (line,) = (record for record in claims.records(found) if "only" in record.what)
    assert (
        "6 restarts" in line.what
        and line.value * 60 == pytest.approx(sum(left))
        and sum(left) < sum(first)
    )
