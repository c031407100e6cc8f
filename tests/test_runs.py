"""Attack, judge, store: closed forms reached, the worst per image, luck exposed, runs that can be killed at any point."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from diffclass import attacks, data, zoo
from diffclass.classifiers.base import BLOCK, Classifier, Fresh
from diffclass.evaluation import claims, protocols, runs
from diffclass.evaluation.protocols import Attack, Protocol
from diffclass.noise import generator_of
from diffclass.storage import files
from safetensors.torch import load_file
from torch import nn
from twins import patched, rejected

SHAPE = (1, 2, 2)
OWN = dict(world="toy", classifier="toy", checkpoints={}, version="0")


class Linear(Classifier):
    """Logits W x + b, plus noise that has nothing to do with x where there is any."""

    num_classes = 3
    image_shape = SHAPE
    calls = 1

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(3, 4, generator=generator))
        self.bias = nn.Parameter(-self.weight.detach().sum(1) / 2)

    def scores(self, x):
        return x.flatten(1) @ self.weight.T + self.bias

    def logits(self, x, noise):
        return self.scores(x)


class Noisy(Linear):
    """The same with noise on the logits, drawn class by class: more images would change the noise of each."""

    def sample_noise(self, images, generator):
        return torch.randn((3, images), generator=generator).movedim(1, 0)

    def logits(self, x, noise):
        return self.scores(x) + 2 * noise


def classified(count: int):
    """Images that Linear classifies correctly, far enough from the ends of [0,1] for the whole budget."""
    x = 0.2 + 0.6 * torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return x, Linear()(x).argmax(1)


@pytest.fixture(scope="module")
def points():
    """Sixty images, which are less than a block."""
    return classified(60)


@pytest.fixture(scope="module")
def many():
    """Three blocks of images, the last of which is not whole."""
    return classified(150)


def robust(model, x, y, epsilon, size) -> torch.Tensor:
    """The closed form: every margin is larger than epsilon times the dual norm of its slope."""
    logits = model(x).detach()
    safe = torch.ones(len(x), dtype=torch.bool)
    for k in range(3):
        gap = logits.gather(1, y[:, None])[:, 0] - logits[:, k]
        slope = size((model.weight[y] - model.weight[k]).detach())
        safe &= (gap > epsilon * slope) | (y == k)
    return safe


def finished(model, points, protocol, folder, own=OWN, **options):
    """A run to its end, and the progress that it reported."""
    progress = list(runs.run(model, *points, protocol, folder, own, **options))
    return runs.read(folder), progress


def few(steps=5, **options) -> Protocol:
    """A protocol that takes no time."""
    listed = (Attack("margin", steps), Attack("scaled CE", steps, fresh=False))
    return Protocol("honest", "linf", 0.1, listed, **options)


def left(row: dict, first: int = 0) -> int:
    """The least hits of the entries of a row, from one place on."""
    return min(entry[0] for entry in row["attacks"][first:] if entry)


def contents(folder) -> dict:
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.glob("*"))
        if not path.name.startswith(".")
    }


# ---------------------------------------------------------------------------------------------------------------------
# What a run measures


@pytest.mark.parametrize("norm, dual, epsilon", [("linf", 1, 0.08), ("l2", 2, 0.12)])
def test_the_honest_protocol_reaches_the_closed_form(points, tmp_path, norm, dual, epsilon):
    model = Linear()
    run, _ = finished(model, points, protocols.honest(model, norm, epsilon), tmp_path)
    got = torch.tensor([row["hits"] for row in run.rows]) == 1
    wanted = robust(model, *points, epsilon, lambda slope: slope.norm(p=dual, dim=1))
    mutated = robust(model, *points, epsilon, lambda slope: slope.norm(p=3 - dual, dim=1))
    assert 10 < int(wanted.sum()) < 50
    assert torch.equal(got, wanted) and not torch.equal(got, mutated)
    clean, bound, *alone = claims.records_of(run)
    assert clean.value == 1 and clean.attack is None
    assert bound.value == float(wanted.double().mean()) and bound.method == "Clopper-Pearson"
    assert (bound.attack, bound.part, bound.statistic) == ("honest-2", None, "single")
    assert "upper bound" in bound.what and "honest-2" in bound.what and norm in bound.what
    assert run.settings["draws"] == 1 and len(alone) == 6
    assert all(record.attack == "honest-2" and record.part for record in alone)


@pytest.fixture
def halves(monkeypatch):
    """Two attacks that each only touch half of the images: either alone leaves half, both leave nothing."""

    def only(parity):
        return lambda logits, y: attacks.margin_loss(logits, y) * (y % 2 == parity)

    monkeypatch.setitem(protocols.LOSSES, "even", only(0))
    monkeypatch.setitem(protocols.LOSSES, "odd", only(1))
    return Protocol("honest", "linf", 0.5, (Attack("even", 20), Attack("odd", 20)))


def test_the_minimum_is_taken_per_image_not_of_averages(points, tmp_path, halves):
    run, _ = finished(Linear(), points, halves, tmp_path)
    for row in run.rows:
        assert row["hits"] == left(row)
    after_first = [row["attacks"][1][0] for row in run.rows]
    tried_again = [row["attacks"][2][0] for row in run.rows if row["attacks"][2]]
    total = sum(row["hits"] for row in run.rows)
    assert 0 < sum(after_first) < 60 and total < sum(after_first)
    assert 0 == sum(tried_again) == total
    _, bound, first, second = claims.records_of(run)
    assert bound.value == 0 < first.value == sum(after_first) / 60
    assert second.n == len(tried_again) < 60


def test_noise_alone_is_exposed_by_the_worst_of_ten(points, tmp_path):
    run, _ = finished(Noisy(), points, few(), tmp_path)
    named = claims.records_of(run)[:4]
    endings = [record.what.split(", ")[-1] for record in named]
    assert endings == 2 * ["mean of 10 draws", "worst of 10 draws"]
    assert [record.statistic for record in named] == 2 * ["mean", "worst"]
    clean, clean_worst, average, worst = (record.value for record in named)
    assert average > 0.25 and worst < average / 3
    assert worst <= clean_worst < clean and average < clean


def test_one_lucky_draw_does_not_spare_an_image_from_later_attacks(points, tmp_path):
    run, _ = finished(Noisy(), points, few(), tmp_path)
    spared = [row for row in run.rows if row["attacks"][2] is None]
    tried = [row for row in run.rows if row["attacks"][1]]
    lucky = [row for row in tried if 0 < row["attacks"][1][0] < 10]
    assert len(lucky) > 40 and all(row["attacks"][0][0] > 0 for row in lucky)
    assert all(row["attacks"][2] is not None for row in lucky)
    assert all(left(row) == 0 for row in spared)


def test_the_number_that_counts_is_not_the_one_that_selected(many, tmp_path):
    """Choosing the least of several noisy counts is itself luck; the chosen perturbation is judged with other noise."""
    listed = tuple(Attack("margin", step) for step in range(1, 9))
    nothing = replace(few(), attacks=listed, epsilon=0.0)  # a budget of nothing changes nothing
    run, _ = finished(Noisy(), many, nothing, tmp_path)
    least = sum(map(left, run.rows)) / 1500
    judged = sum(row["hits"] for row in run.rows) / 1500
    clean = sum(row["clean"] for row in run.rows) / 1500
    assert least < clean - 0.1 and judged == pytest.approx(clean, abs=0.05)


def test_what_is_stored_is_the_attack_that_left_the_fewest_hits_and_then_the_largest_margin(
    many, tmp_path
):
    """A strong attack is followed by a weak one, which now and then is luckier; a stored one answers as its row says."""
    weak = Attack("margin", 1, "pgd", step=0.1, start="random")
    protocol = replace(few(), attacks=(Attack("margin", 10), weak))
    model = Noisy()
    run, _ = finished(model, many, protocol, tmp_path)
    kept = []
    for row in run.rows:
        entries = [(-entry[0], entry[1]) if entry else (-99, 0) for entry in row["attacks"]]
        assert row["strongest"] == entries.index(max(entries))
        kept.append(row["strongest"])
    assert min(kept.count(place) for place in range(3)) > 10
    twice = [row["attacks"] for row in run.rows if row["attacks"][2]]
    assert sum(entries[1][0] == entries[2][0] for entries in twice) > 10
    x = attacks.threat("linf").applied(many[0], run.deltas)
    for i, row in enumerate(run.rows):
        if row["strongest"] == 0:
            assert not bool(run.deltas[i].any())
            continue
        purpose = f"selection {row['strongest']}"
        noises = runs.judging_noises(model, run.settings, i // BLOCK, BLOCK, purpose)
        own = slice(i % BLOCK, i % BLOCK + 1)
        at = slice(i, i + 1)
        hits, margin = runs.judge(model, x[at], many[1][at], (noise[own] for noise in noises))
        assert [int(hits), float(margin)] == pytest.approx(
            row["attacks"][row["strongest"]], abs=1e-5
        )


def test_the_line_of_an_attack_is_the_least_of_its_runs(points, tmp_path):
    """CE of one step with random starts: what the first run leaves, a later one fells."""
    attack = Attack("CE", 1, "pgd", step=0.6, restarts=6, fresh=False)
    run, _ = finished(Linear(), points, Protocol("honest", "linf", 0.08, (attack,)), tmp_path)
    least = sum(left(row, first=1) for row in run.rows)
    first = sum(row["attacks"][1][0] for row in run.rows)
    (line,) = (record for record in claims.records_of(run) if record.part)
    assert "6 restarts" in line.what and line.value * 60 == pytest.approx(least)
    assert least < first


def test_cost_is_counted(points, tmp_path):
    class Counting(Linear):
        seen = 0

        def logits(self, x, noise):
            self.seen += len(x)
            return self.scores(x)

    model = Counting()
    listed = (
        Attack("margin", 7),
        Attack("DLR", 3, restarts=2),
        Attack("scaled CE", 2, draws=3),
    )
    run, _ = finished(model, points, Protocol("honest", "linf", 0.05, listed), tmp_path)
    assert sum(row["calls"] for row in run.rows) == model.seen
    assert [runs.calls_of(row, run.protocol, 1) for row in run.rows] == [
        row["calls"] for row in run.rows
    ]
    for record in claims.records_of(run):
        assert record.settings["calls per image"] == round(model.seen / 60, 1)


# ---------------------------------------------------------------------------------------------------------------------
# The records of a run, by hand


def by_hand(hits, draws=10) -> runs.Run:
    """A finished run of two attacks, one of them of two runs, with the hits [clean, 1, 2, 3, judged] of each image."""
    listed = (Attack("margin", restarts=2), Attack("DLR"))
    protocol = Protocol("honest", "linf", 0.1, listed)
    rows = [
        dict(
            index=i,
            label=0,
            clean=clean,
            attacks=[[clean, 0.0], *([count, 0.0] for count in tried)],
            strongest=1,
            hits=judged,
            calls=10,
        )
        for i, (clean, *tried, judged) in enumerate(hits)
    ]
    settings = dict(
        world="toy",
        classifier="toy",
        checkpoints={},
        protocol=protocol.as_json(),
        seed=0,
        n=len(rows),
        draws=draws,
    )
    return runs.Run(settings, rows, torch.zeros(len(rows), *SHAPE))


def almost(records, run, hits, attack=None):
    """The twin whose worst of ten forgives one draw."""
    listed = records(run, hits, attack)
    always = sum(hit >= run.settings["draws"] - 1 for hit in hits)
    return [listed[0], claims._counted(run, always, len(hits), attack=attack, statistic="worst")]


def least_average(run):
    """The twin that takes the least of the runs' averages, where each image has its own least."""
    first = [row["attacks"][1][0] for row in run.rows]
    second = [row["attacks"][2][0] for row in run.rows]
    yield "the first", min(first, second, key=sum)
    yield "the second", [row["attacks"][3][0] for row in run.rows]


@rejected(
    {
        "one draw is forgiven": dict(
            records_of=patched(
                claims.records_of, claims, _statistics=partial(almost, claims._statistics)
            )
        ),
        "the least of averages": dict(
            records_of=patched(claims.records_of, claims, _of_attacks=least_average)
        ),
    }
)
def test_the_records_of_a_run_in_numbers(records_of=claims.records_of):
    hits = [
        (10, 10, 2, 9, 10),
        (10, 2, 10, 9, 9),
        (9, 8, 8, 8, 10),
        (10, 9, 9, 9, 10),
    ]
    listed = records_of(by_hand(hits))
    keys = [(record.attack, record.part is not None, record.statistic) for record in listed]
    assert keys == [
        (None, False, "mean"),
        (None, False, "worst"),
        ("honest-1", False, "mean"),
        ("honest-1", False, "worst"),
        ("honest-1", True, "mean"),
        ("honest-1", True, "mean"),
    ]
    values = [record.value for record in listed]
    assert values == pytest.approx([39 / 40, 3 / 4, 39 / 40, 3 / 4, 21 / 40, 35 / 40])
    assert all(record.n == 4 and record.low < record.value <= record.high for record in listed)


def test_a_part_that_was_not_tried_on_all_images_says_so():
    run = by_hand([(10, 0, 0, 9, 0), (10, 5, 5, 5, 5), (10, 0, 0, 9, 0)])
    for row in run.rows[::2]:
        row["attacks"][3] = None
    *_, first, second = claims.records_of(run)
    assert (first.n, second.n) == (3, 1)
    assert first.part == "apgd margin 100, exact, fresh noise, 2 restarts"
    assert second.part == (
        "apgd DLR 100, exact, fresh noise, on the 1 not yet fooled at every draw"
    )
    for row in run.rows:
        row["attacks"][3] = None
    assert len(claims.records_of(run)) == 5  # an attack that was tried on no image has no number


# ---------------------------------------------------------------------------------------------------------------------
# Killed, resumed, refused


def test_a_killed_run_ends_as_an_unbroken_one(many, tmp_path):
    model = Noisy()
    protocol = few()
    _, progress = finished(model, many, protocol, tmp_path / "whole")
    assert [p.images for p in progress] == [0, 0, 64, 64, 64, 128, 128, 128, 150]
    assert progress[-1].total == 150
    for stop in range(1, len(progress)):
        folder = tmp_path / str(stop)
        run = runs.run(model, *many, protocol, folder, OWN)
        assert [next(run) for _ in range(stop)] == progress[:stop]
        run.close()
        done = min(150, 64 * math.ceil(stop / 3))
        assert len(runs.read(folder).rows) == done  # what is done is kept
        finished(model, many, protocol, folder)
        assert contents(folder) == contents(tmp_path / "whole")


def test_a_run_killed_between_two_files_ends_as_an_unbroken_one(many, tmp_path, monkeypatch):
    finished(Noisy(), many, few(), tmp_path / "whole")
    write = files.write
    for stop in range(1, 8):
        writes = [stop]

        def failing(path, content, writes=writes):
            writes[0] -= path.name == runs.ROWS
            if not writes[0]:
                raise OSError("no space left on device")
            write(path, content)

        folder = tmp_path / str(stop)
        with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
            patch.setattr(files, "write", failing)
            finished(Noisy(), many, few(), folder)
        finished(Noisy(), many, few(), folder)
        assert contents(folder) == contents(tmp_path / "whole")


def test_a_folder_of_other_settings_is_refused(points, tmp_path):
    finished(Linear(), points, few(), tmp_path)
    other = (
        (few(6), {}, "protocol"),
        (replace(few(), version=2), {}, "protocol"),
        (few(), dict(seed=1), "seed"),
        (few(), dict(own={**OWN, "version": "1"}), "version"),
        (few(), dict(own={**OWN, "classifier": "other"}), "classifier"),
        (few(), dict(own={**OWN, "checkpoints": {"a": "ab"}}), "checkpoints"),
    )
    for protocol, options, named in other:
        with pytest.raises(ValueError, match=rf"\['{named}'\] differ; name another folder"):
            finished(Linear(), points, protocol, tmp_path, **options)
    with pytest.raises(ValueError, match=r"\['images', 'n'\] differ"):
        finished(Linear(), (points[0][:9], points[1][:9]), few(), tmp_path)
    run = runs.run(Linear(), *points, few(), tmp_path / "new", OWN)
    next(run)
    with pytest.raises(RuntimeError, match="another run holds its lock"):
        finished(Linear(), points, few(), tmp_path / "new")
    run.close()


def check_alike(run, other):
    """That two runs found the same, but for the rounding of sums over parts of different sizes."""
    assert run.settings == other.settings
    assert len(run.rows) == len(other.rows)
    for row, same in zip(run.rows, other.rows, strict=True):
        assert {**row, "attacks": None} == {**same, "attacks": None}
        assert row["attacks"] == [
            entry and pytest.approx(entry, abs=1e-5) for entry in same["attacks"]
        ]
    torch.testing.assert_close(run.deltas, other.deltas, atol=1e-5, rtol=0)


@pytest.mark.parametrize("fewer", [9, 64, 80])
def test_a_run_goes_on_with_more_images(many, tmp_path, fewer):
    images, labels = many
    finished(Noisy(), (images[:fewer], labels[:fewer]), few(), tmp_path / "more")
    first = contents(tmp_path / "more")["rows.jsonl"]
    run, _ = finished(Noisy(), many, few(), tmp_path / "more")
    whole, _ = finished(Noisy(), many, few(), tmp_path / "whole")
    assert contents(tmp_path / "more")["rows.jsonl"].startswith(first)  # nothing is done twice
    check_alike(run, whole)


def test_a_run_that_goes_on_with_more_images_may_be_interrupted_and_go_on_again(many, tmp_path):
    images, labels = many
    for begun, count in ((0, 9), (9, 30), (30, 50)):
        run = runs.run(Noisy(), images[:count], labels[:count], few(), tmp_path, OWN)
        # of the attacks on the new images the first one alone
        next(step for step in run if step.images == begun and step.attack != "all attacks")
        run.close()
    assert [len(row["attacks"]) for row in runs.read(tmp_path).rows] == [3] * 30 + [2] * 20
    run, _ = finished(Noisy(), many, few(), tmp_path)
    whole, _ = finished(Noisy(), many, few(), tmp_path / "whole")
    check_alike(run, whole)


def test_other_or_fewer_images_are_not_those_that_a_run_was_begun_with(many, tmp_path):
    images, labels = many
    finished(Linear(), (images[:9], labels[:9]), few(), tmp_path)
    before = contents(tmp_path)
    for others in (many[0].flip(0), images + 1e-3):
        with pytest.raises(ValueError, match=r"\['images', 'n'\] differ"):
            finished(Linear(), (others, labels), few(), tmp_path)
    with pytest.raises(ValueError, match=r"\['images', 'n'\] differ"):
        finished(Linear(), (images[:8], labels[:8]), few(), tmp_path)
    with pytest.raises(ValueError, match=r"\['images', 'n', 'seed'\] differ"):
        finished(Linear(), many, few(), tmp_path, seed=1)
    assert contents(tmp_path) == before


def test_a_run_of_the_first_stream_is_not_continued_in_another(points, tmp_path):
    finished(Noisy(), points, few(), tmp_path)
    change_settings(tmp_path, stream="batches of 64")
    with pytest.raises(ValueError, match=r"\['stream'\] differ"):
        finished(Noisy(), points, few(), tmp_path)


class Odd(Linear):
    """A model with something wrong, from the call `since` on."""

    def __init__(self, wrong, since=0):
        super().__init__()
        self.wrong = wrong
        self.left = since

    def logits(self, x, noise):
        self.left -= 1
        return self.scores(x) if self.left >= 0 else self.wrong(self.scores(x))


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


@pytest.mark.parametrize("wrong, kind", [(torch.nan, "NaN"), (torch.inf, "infinite")])
def test_logits_that_are_not_finite_are_no_hits(points, wrong, kind):
    x, y = points[0][:4], points[1][:4]

    def unchecked(x, noise):
        return torch.tensor([[0.0, wrong]]).expand(len(x), 2)

    with pytest.raises(FloatingPointError, match=f"became {kind} and cannot be judged"):
        runs.judge(unchecked, x, y, [()])


def test_what_was_done_before_a_failure_is_kept(points, tmp_path):
    # two calls judge, six attack, one judges, one calibrates
    failing = Odd(lambda f: f * torch.nan, since=10)
    with pytest.raises(FloatingPointError):
        finished(failing, points, few(), tmp_path / "part")
    rows = runs.read(tmp_path / "part").rows
    assert len(rows) == 60 and all(len(row["attacks"]) == 2 for row in rows)
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
        (dict(norm="flow", epsilon=3), "expected a displacement between 0 and 1, the width"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_written(points, tmp_path, change, said):
    x = change.get("x", lambda x: x)(points[0])
    y = change.get("y", lambda y: y)(points[1])
    protocol = replace(few(), **{k: v for k, v in change.items() if k in ("epsilon", "norm")})
    with pytest.raises(ValueError, match=said):
        finished(Linear(), (x, y), protocol, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_settings_hold_the_protocol(points, tmp_path):
    run, _ = finished(Linear(), points, few(), tmp_path)
    assert run.protocol == few() and run.settings["protocol"] == few().as_json()
    assert (run.settings["schema"], run.settings["stream"]) == (2, "blocks")
    assert run.settings["images"] == runs.fingerprint(*points)
    assert {name: run.settings[name] for name in OWN} == OWN


def test_an_unfinished_run_has_no_records(many, tmp_path):
    run = runs.run(Linear(), *many, few(), tmp_path, OWN)
    next(run)
    run.close()
    with pytest.raises(ValueError, match="got 0 of 150 images; the same command goes on"):
        claims.records_of(runs.read(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# The noise of judgements


def settings_of(stream: str, seed=3, draws=4) -> dict:
    return dict(seed=seed, stream=stream, draws=draws)


def drawn(stream, block, images, purpose="evaluation", classifier=None, **options) -> list:
    """The noises of a judgement."""
    chosen = settings_of(stream, **options)
    model = classifier or Noisy()
    return list(runs.judging_noises(model, chosen, block, images, purpose))


def test_in_blocks_an_images_noise_depends_on_no_other_image():
    few_images = drawn("blocks", 2, 5)
    whole = drawn("blocks", 2, BLOCK)
    assert [noise.shape for noise in few_images] == 4 * [(5, 3)]
    for some, all_of_them in zip(few_images, whole, strict=True):
        assert torch.equal(some, all_of_them[:5])
    # the twin: in the first stream the second draw is another one as soon as more images follow
    few_images = drawn("batches of 64", 2, 5)
    whole = drawn("batches of 64", 2, BLOCK)
    assert not torch.equal(few_images[1], whole[1][:5])


def test_every_draw_block_purpose_and_seed_has_noise_of_its_own():
    for stream in runs.STREAMS:
        listed = [
            *drawn(stream, 0, BLOCK),
            *drawn(stream, 1, BLOCK),
            *drawn(stream, 0, BLOCK, "clean"),
            *drawn(stream, 0, BLOCK, seed=4),
        ]
        values = torch.cat(listed).flatten()
        assert len(values) == 16 * BLOCK * 3 and len(values.unique()) == len(values)


# Of the seed 3: what the library of the first records made of the key (seed, first image, purpose).
OLD_SEEDS = {(0, "clean"): 39243156889689891, (64, "evaluation"): 49756272733843035}


@pytest.mark.parametrize("start, purpose", OLD_SEEDS)
def test_the_first_stream_is_what_the_first_records_drew(start, purpose):
    """One draw after the other, from one generator for the images of a block, as many as it has."""
    assert generator_of(3, start, purpose).initial_seed() == OLD_SEEDS[start, purpose]
    generator = torch.Generator().manual_seed(OLD_SEEDS[start, purpose])
    wanted = [torch.randn((3, 11), generator=generator).movedim(1, 0) for _ in range(4)]
    got = drawn("batches of 64", start // 64, 11, purpose)
    assert len(got) == 4 and all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("name", ["dc", "rdc1", "diffpure", "idc"])
def test_judged_in_the_first_stream_is_judged_by_fresh_noise_of_the_block(name):
    """What `with_fresh_noise(generator)` did call by call, the stream does noise by noise."""
    classifier = zoo.classifier("digits", name)
    world = data.digits()
    x = world.test_images[64:67]
    fresh = Fresh(classifier, generator_of(3, 64, "clean"))
    noises = drawn("batches of 64", 1, 3, "clean", classifier, draws=2)
    with torch.no_grad():
        for noise in noises:
            assert torch.equal(classifier(x, noise), fresh(x))


def test_the_noise_of_stored_records_was_drawn_level_first():
    classifier = zoo.classifier("digits", "dc")
    (noise, _) = drawn("batches of 64", 1, 5, "clean", classifier, draws=2)
    shape = (len(classifier.levels), 1, 5, 1, 8, 8)
    wanted = torch.randn(shape, generator=generator_of(3, 64, "clean"))
    assert torch.equal(noise.movedim(0, 2), wanted)


def own_steps() -> Protocol:
    """Attacks that look at one image at a time: no median of a batch is in them."""
    listed = (Attack("margin", 4, "pgd", step=0.2), Attack("DLR", 4, draws=2))
    return Protocol("honest", "linf", 0.02, listed)


def alike(one: list[dict], other: list[dict]) -> bool:
    """Whether rows say the same of their images; margins may be rounded differently in another batch."""
    return all(same_row(a, b) for a, b in zip(one, other, strict=True))


def same_row(one: dict, other: dict) -> bool:
    for entry, there in zip(one["attacks"], other["attacks"], strict=True):
        if (entry is None) != (there is None):
            return False
        if entry and (entry[0] != there[0] or abs(entry[1] - there[1]) > 1e-5):
            return False
    rest = ("index", "label", "clean", "strongest", "hits", "calls")
    return all(one[name] == other[name] for name in rest)


def test_what_a_run_says_of_an_image_depends_on_no_image_that_follows(many, tmp_path):
    whole, _ = finished(Noisy(), many, own_steps(), tmp_path / "whole")
    for count in (20, 64, 100):
        part = (many[0][:count], many[1][:count])
        run, _ = finished(Noisy(), part, own_steps(), tmp_path / str(count))
        assert alike(run.rows, whole.rows[:count])
        torch.testing.assert_close(run.deltas, whole.deltas[:count], rtol=0, atol=1e-4)


class Sure(Noisy):
    """Noise that never decides about images whose last pixel is 0 or 1: these are right, or wrong, at every draw."""

    def logits(self, x, noise):
        sure = (x[:, 0, 1, 1] - 0.5).abs() > 0.45
        return self.scores(x) + 2 * noise * ~sure[:, None]


def test_what_a_run_says_of_an_image_does_not_depend_on_which_others_survive(points, tmp_path):
    """Every other image is made one that is wrong at every draw, so that no attack is tried on it."""
    x, y = points
    whole, _ = finished(Sure(), points, own_steps(), tmp_path / "whole")
    others = x.clone()
    others[1::2, 0, 1, 1] = 1.0
    with torch.no_grad():
        wrong = Linear()(others).argmin(1)
    labels = torch.where(torch.arange(60) % 2 == 1, wrong, y)
    run, _ = finished(Sure(), (others, labels), own_steps(), tmp_path / "half")
    assert all(row["attacks"][1:] == [None, None] for row in run.rows[1::2])
    assert sum(row["attacks"][1] is not None for row in run.rows[::2]) >= 25
    assert alike(run.rows[::2], whole.rows[::2])
    torch.testing.assert_close(run.deltas[::2], whole.deltas[::2], rtol=0, atol=1e-4)


def test_judging_counts_hits_and_means_margins(points):
    x, y = points
    model = Noisy()
    noises = drawn("blocks", 0, 60)
    hits, margin = runs.judge(model, x, y, noises)
    with torch.no_grad():
        logits = torch.stack([model(x, noise) for noise in noises])
    right = logits.gather(2, y.expand(4, -1)[..., None])[..., 0]
    others = logits.masked_fill(nn.functional.one_hot(y, 3).bool(), -torch.inf)
    assert torch.equal(hits, (logits.argmax(2) == y).sum(0)) and 0 < int(hits.sum()) < 240
    torch.testing.assert_close(margin, (others.amax(2) - right).double().mean(0))


@pytest.mark.parametrize("stream", runs.STREAMS)
def test_a_claim_is_judged_again_in_its_own_stream(many, tmp_path, stream):
    model = Noisy()
    run, _ = finished(model, many, few(), tmp_path)
    settings = {**run.settings, "stream": stream}
    again = list(runs.rejudged(model, *many, replace(run, settings=settings)))
    assert [len(clean) for clean, _ in again] == [64, 64, 22]
    clean = [hit for block, _ in again for hit in block]
    hits = [hit for _, block in again for hit in block]
    same = clean == [row["clean"] for row in run.rows] and hits == [row["hits"] for row in run.rows]
    assert same == (stream == "blocks")
    x = attacks.threat("linf").applied(many[0], run.deltas)
    for start in (0, 64, 128):
        own = slice(start, start + 64)
        noises = runs.judging_noises(model, settings, start // 64, len(x[own]), "evaluation")
        wanted, _ = runs.judge(model, x[own], many[1][own], noises)
        assert hits[own] == wanted.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# What is stored


def change_settings(folder, **changes):
    """Change the settings of a finished run; a value of None takes one away."""
    path = folder / files.SETTINGS
    settings = json.loads(path.read_text()) | changes
    kept = {name: value for name, value in settings.items() if value is not None}
    path.write_text(json.dumps(kept))


def change_row(folder, index, change):
    """Change one row of a finished run."""
    path = folder / runs.ROWS
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows[index])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_damaged_folders_get_a_sentence(points, tmp_path):
    with pytest.raises(FileNotFoundError, match="got no settings.json; `diffclass evaluate --att"):
        runs.read(tmp_path)
    finished(Linear(), points, few(), tmp_path)
    rows = tmp_path / "rows.jsonl"
    deltas = tmp_path / "deltas-0.safetensors"
    lines = rows.read_text()
    perturbations = deltas.read_bytes()
    for text in (
        lines.replace('"hits"', '"hit"', 1),
        lines.split("\n", 1)[1],
        "[]\n" + lines,
    ):
        rows.write_text(text)
        with pytest.raises(ValueError, match="line 1 of .* is not the row of image 0"):
            runs.read(tmp_path)
    rows.write_text(lines)
    deltas.write_bytes(perturbations[:-50])
    with pytest.raises(ValueError, match="cut short"):
        runs.read(tmp_path)
    deltas.write_bytes(perturbations)
    whole = (tmp_path / "settings.json").read_text()
    (tmp_path / "settings.json").write_text(json.dumps({"schema": 2, "levels": 0}))
    with pytest.raises(ValueError, match="to be that of an attack, got one without"):
        runs.read(tmp_path)
    (tmp_path / "settings.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="expected JSON in .*settings.json"):
        runs.read(tmp_path)
    (tmp_path / "settings.json").write_text(whole)
    rows.write_text(lines.replace('"index": 0', f'"index": 0, "more": {"[" * 100_000}', 1))
    with pytest.raises(ValueError, match=f"expected the results of an attack in {tmp_path}, got"):
        runs.read(tmp_path)
    rows.write_text(lines)
    (tmp_path / "settings.json").write_text(whole[:-10])
    with pytest.raises(ValueError, match="expected JSON in .*settings.json"):
        runs.read(tmp_path)
    (tmp_path / "settings.json").write_text(whole)
    assert runs.read(tmp_path).finished == 60


OLD_SETTINGS = {  # as version 0.1 wrote them, without a schema
    "world": "digits",
    "defence": "cnn",
    "version": "0.1.0",
    "checkpoints": {},
    "protocol": {"name": "honest", "defence": "cnn", "norm": "linf", "epsilon": 0.1},
    "chosen": "Protocol(name='honest', defence='cnn')",
    "seed": 0,
    "batch": 64,
    "n": 60,
    "draws": 1,
    "images": "ab" * 32,
}


def test_the_settings_of_an_old_run_get_a_sentence(points, tmp_path):
    finished(Linear(), points, few(), tmp_path)
    (tmp_path / "settings.json").write_text(json.dumps(OLD_SETTINGS))
    said = "expected .*settings.json of schema 2, got 'one without a schema'; it was written by "
    with pytest.raises(ValueError, match=f"^{said}another version, or is not that of an attack.$"):
        runs.read(tmp_path)
    (tmp_path / "settings.json").write_text(json.dumps({**OLD_SETTINGS, "schema": 1}))
    with pytest.raises(ValueError, match="of schema 2, got 1; it was written by another version"):
        runs.read(tmp_path)


def test_settings_of_an_unknown_stream_get_a_sentence(points, tmp_path):
    finished(Linear(), points, few(), tmp_path)
    change_settings(tmp_path, stream="device")
    with pytest.raises(ValueError, match="expected a stream of noise of .*'blocks'.*got 'device'"):
        runs.read(tmp_path)
    change_settings(tmp_path, stream=None)
    with pytest.raises(ValueError, match=r"got one without \['stream'\]"):
        runs.read(tmp_path)


@pytest.mark.parametrize(
    "name, value",
    [
        ("n", True),
        ("n", 0),
        ("n", "60"),
        ("draws", 10**9),
        ("seed", -1),
        ("world", ""),
        ("classifier", 3),
        ("checkpoints", {"a": 1}),
        ("protocol", []),
        ("images", "ab"),
    ],
)
def test_settings_that_no_run_has_get_a_sentence(points, tmp_path, name, value):
    finished(Linear(), points, few(), tmp_path)
    change_settings(tmp_path, **{name: value})
    with pytest.raises(
        ValueError, match=f"expected {name} in .*settings.json to be one that a run"
    ):
        runs.read(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        dict(label=1.0),
        dict(clean=True),
        dict(hits="1"),
        dict(calls=None),
        dict(attacks=[[1, float("inf")], None, None]),
        dict(attacks=[[1], None, None]),
        dict(attacks=[[1.5, 0.0], None, None]),
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_row_of_other_types_gets_a_sentence(points, tmp_path, change):
    finished(Linear(), points, few(), tmp_path)
    change_row(tmp_path, 4, lambda row: row.update(change))
    with pytest.raises(ValueError, match="line 5 of .*rows.jsonl is not the row of image 4"):
        runs.read(tmp_path)


def test_what_the_selections_saw_can_be_asked_again(many, tmp_path):
    model = Noisy()
    run, _ = finished(model, many, few(), tmp_path)
    again = [pair for block in runs.reselected(model, *many, run) for pair in block]
    assert len(again) == 150
    for row, (first, last) in zip(run.rows, again, strict=True):
        assert first == pytest.approx(row["attacks"][0], abs=1e-5)
        assert last == pytest.approx(row["attacks"][row["strongest"]], abs=1e-5)


def test_new_noise_is_no_noise_that_a_claim_has_drawn(many, tmp_path):
    """Not even by the same seed; and it depends on that seed alone."""
    model = Noisy()
    run, _ = finished(model, many, few(), tmp_path)
    same = list(runs.rejudged(model, *many, run))
    fresh = list(runs.judged_afresh(model, *many, run, run.settings["seed"]))
    assert all(one[1] != other[1] for one, other in zip(same, fresh, strict=True))
    other_settings = replace(run, settings={**run.settings, "seed": 9, "stream": "batches of 64"})
    assert fresh == list(runs.judged_afresh(model, *many, other_settings, run.settings["seed"]))


def test_an_attack_afresh_is_a_run_that_keeps_nothing(points, tmp_path):
    run, _ = finished(Linear(), points, few(), tmp_path)
    *_, afresh = runs.attacked_afresh(Linear(), *points, few(), 0)
    assert afresh.rows == run.rows and torch.equal(afresh.deltas, run.deltas)
    *_, other = runs.attacked_afresh(Noisy(), *points, few(), 1)
    assert other.finished == 60


def test_a_row_of_an_old_run_gets_a_sentence(points, tmp_path):
    finished(Linear(), points, few(), tmp_path)
    names = ["none", "apgd margin 5, exact, fresh noise", "apgd scaled CE 5, exact, fixed noise"]
    change_row(
        tmp_path, 4, lambda row: row.update(attacks=dict(zip(names, row["attacks"], strict=True)))
    )
    said = "^line 5 of .*rows.jsonl is not the row of image 4; the file was changed by something "
    with pytest.raises(ValueError, match=said):
        runs.read(tmp_path)


def test_a_finished_row_without_an_entry_for_every_attack_gets_a_sentence(points, tmp_path):
    finished(Linear(), points, few(), tmp_path)
    change_row(tmp_path, 4, lambda row: row["attacks"].pop())
    with pytest.raises(
        ValueError, match="^expected 3 entries of attacks in the row of image 4 .*, got 2; "
    ):
        runs.read(tmp_path)


def test_perturbations_are_split_into_files_of_bounded_size(many, tmp_path, monkeypatch):
    whole, _ = finished(Linear(), many, few(), tmp_path / "one")
    monkeypatch.setattr(runs, "SHARD_BYTES", 8 * 50)  # 50 images of 4 numbers of 16 bits
    run, _ = finished(Linear(), many, few(), tmp_path / "several")
    names = sorted(path.name for path in (tmp_path / "several").glob("d*"))
    assert names == [f"deltas-{i}.safetensors" for i in range(3)]
    assert [len(load_file(tmp_path / "several" / name)["deltas"]) for name in names] == 3 * [50]
    assert torch.equal(run.deltas, whole.deltas) and len(run.deltas) == 150
    (tmp_path / "several" / names[1]).unlink()
    with pytest.raises(ValueError, match="for each of 150 rows in .*, got 100; a file"):
        runs.read(tmp_path / "several")


def test_what_is_judged_is_what_is_stored(points, tmp_path):
    run, _ = finished(Linear(), points, few(), tmp_path)
    stored = load_file(tmp_path / "deltas-0.safetensors")["deltas"]
    assert stored.dtype == torch.float16 and torch.equal(stored.float(), run.deltas)
    assert max(run.sizes) <= 0.1 and run.sizes == attacks.size_of(run.deltas, "linf").tolist()
    there = attacks.threat("linf").applied(points[0], run.deltas)
    with torch.no_grad():
        right = Linear()(there).argmax(1) == points[1]
    assert [row["hits"] for row in run.rows] == right.long().tolist()


def grows(stored) -> bool:
    """Whether what is stored of random perturbations is anywhere longer than they are, or loses a thousandth."""
    deltas = 0.1 * (2 * torch.rand(100_000, generator=torch.Generator().manual_seed(0)) - 1)
    kept = stored(deltas)
    assert kept.dtype == deltas.dtype and torch.equal(kept, kept.half().float())
    return bool((kept.abs() > deltas.abs()).any()) or float((kept - deltas).abs().max()) > 1e-4


def test_what_is_stored_of_a_perturbation_is_never_longer():
    assert not grows(runs.storable)
    assert float(runs.storable(torch.tensor([8 / 255]))) <= 8 / 255
    assert grows(lambda deltas: deltas.half().float())  # the twin that only rounds
