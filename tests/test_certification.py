"""Certification runs: counts follow from keys alone, can be killed anywhere, and nothing false passes verification."""

import json
import math
import shutil
import tempfile
from dataclasses import replace

import pytest
import torch
import twins
from diffclass.certify.certificates import Votes, smoothing_radius
from diffclass.certify.soft import SoftTally
from diffclass.classifiers.base import Classifier
from diffclass.evaluation import certification
from diffclass.evaluation.certification import Plan
from diffclass.intervals import lower_bound
from diffclass.noise import seed_of
from scipy import stats

SHAPE = (1, 2, 2)
OWN = dict(world="toy", classifier="toy", checkpoints={}, version="0")
NORMAL = torch.tensor([0.5, -0.5, 0.5, 0.5])
SIGMA = 0.25
PLAN = Plan(SIGMA, selection=100, most=2000, radii=(0.1, 0.2))


class HalfSpace(Classifier):
    """Two classes on either side of a plane; its smoothed form is certified up to its true distance, by closed form."""

    num_classes = 2
    image_shape = SHAPE
    scale = "scores"
    sigma_pixel = SIGMA
    calls = 1

    def logits(self, x, noise):
        distance = (x.flatten(1) - 0.5) @ NORMAL.to(x)
        return torch.stack([distance, -distance], 1)


def pictures(distances=(0.4, 0.05, -0.3, 0.0, 0.15)):
    """Pictures at signed distances from the plane, and their classes; the fourth lies on it."""
    images = 0.5 + torch.tensor(distances)[:, None] * NORMAL
    return images.reshape(-1, *SHAPE), (torch.tensor(distances) < 0).long()


def certify(folder, plan=PLAN, images=None, **options):
    images, labels = pictures() if images is None else images
    return list(certification.certify(HalfSpace(), images, labels, plan, folder, OWN, **options))


def verified(folder, claimed=None, images=None, classifier=None, checkpoints=None, **options):
    """The last state of a verification."""
    run = certification.read(folder)
    claimed = certification.records_of(run) if claimed is None else claimed
    images, labels = pictures() if images is None else images
    *_, state = certification.verify(
        classifier or HalfSpace(),
        images,
        labels,
        run,
        checkpoints or {},
        claimed,
        seed=1,
        **options,
    )
    return state


@pytest.mark.parametrize("bound", ["anytime", "fixed"])
def test_radii_approach_the_true_distance_from_below(tmp_path, bound):
    certify(tmp_path, replace(PLAN, bound=bound, radii=(0.14, 0.25), most=4000))
    run = certification.read(tmp_path)
    distances = (0.4, 0.05, 0.3, 0.0, 0.15)
    for certificate, distance in zip(run.certificates(), distances, strict=True):
        assert certificate.radius <= distance + 1e-9
    reached = [c.radius for c in run.certificates()]
    assert reached[2] >= 0.25 and reached[4] > 0.1
    assert reached[3] == 0 and run.certificates()[3].prediction is None
    assert [row["label"] for row in run.rows] == pictures()[1].tolist()


def test_a_fixed_plan_is_cohens_certificate(tmp_path):
    certify(tmp_path, replace(PLAN, bound="fixed"))
    for row in certification.read(tmp_path).rows:
        assert sum(row["estimation"]) == 2000 and sum(row["selection"]) == 100
        assert row["calls"] == 2100  # one a vote
        guess = max(range(2), key=lambda k: row["selection"][k])
        share = lower_bound(row["estimation"][guess], 2000, 0.001)
        radius = SIGMA * stats.norm.ppf(share) if share >= 0.5 else 0.0
        assert math.isclose(row["radius"], radius, abs_tol=1e-12)


def test_stopping_early_spends_fewer_votes_and_certifies_the_same(tmp_path):
    certify(tmp_path / "all", replace(PLAN, bound="fixed"))
    certify(tmp_path / "early", PLAN, together=10)
    every = certification.read(tmp_path / "all")
    early = certification.read(tmp_path / "early")
    for radius in (0.0, 0.1):
        by_all = [c.radius >= radius and c.prediction is not None for c in every.certificates()]
        by_few = [c.radius >= radius and c.prediction is not None for c in early.certificates()]
        assert by_all == by_few
    spent = [sum(row["estimation"]) for row in early.rows]
    assert spent[0] < 200 and sum(spent) < 0.6 * 5 * 2000


@pytest.mark.parametrize("together", [7, 64])
def test_counts_depend_on_keys_alone(tmp_path, together):
    """Neither how many votes are asked together, nor an interruption, nor a resumed run changes a count of a fixed plan."""
    plan = replace(PLAN, bound="fixed")
    certify(tmp_path / "whole", plan)
    images, labels = pictures()
    broken = certification.certify(
        HalfSpace(), images, labels, plan, tmp_path / "broken", OWN, together=together
    )
    for progress in broken:
        if progress.images == 2 and progress.votes > 300:
            break
    broken.close()
    with open(tmp_path / "broken" / "votes-0.jsonl", "a") as file:
        file.write('{"index": 2, "lab')
    certify(tmp_path / "broken", plan, together=333)
    strip = [{**row, "seconds": 0} for row in certification.read(tmp_path / "broken").rows]
    assert strip == [{**row, "seconds": 0} for row in certification.read(tmp_path / "whole").rows]


def test_every_second_picture_is_a_slice_of_all(tmp_path):
    plan = replace(PLAN, bound="fixed", most=200)
    certify(tmp_path / "all", plan)
    certify(tmp_path / "some", plan, every=2)
    every = certification.read(tmp_path / "all").rows
    some = certification.read(tmp_path / "some").rows
    assert [row["index"] for row in some] == [0, 2, 4]
    assert [row["estimation"] for row in some] == [every[i]["estimation"] for i in (0, 2, 4)]


def test_records_say_how_they_came_about(tmp_path):
    certify(tmp_path)
    listed = certification.records_of(certification.read(tmp_path))
    assert [record.settings["radius"] for record in listed] == [0.0, 0.1, 0.2]
    values = [record.value for record in listed]
    assert values == sorted(values, reverse=True) and listed[0].value == 0.8
    for record in listed:
        assert record.metric == "certified accuracy" and record.low <= record.value <= record.high
        assert record.settings["plan"]["alpha"] == 0.001 and record.n == 5
        per_image = record.settings["calls per image"]
        assert round(per_image - record.settings["votes per image"], 1) == PLAN.selection
    certification.keep(tmp_path, listed)
    assert certification.kept(tmp_path) == listed


def test_an_unfinished_run_has_no_records(tmp_path):
    images, labels = pictures()
    run = certification.certify(HalfSpace(), images, labels, PLAN, tmp_path, OWN)
    for progress in run:
        if progress.images == 2:
            break
    run.close()
    with pytest.raises(ValueError, match="expected a finished run, got 2 of 5"):
        certification.records_of(certification.read(tmp_path))


def test_what_was_counted_verifies(tmp_path):
    certify(tmp_path)
    state = verified(tmp_path)
    assert state.faults == () and state.recounted == 4 and state.attacked == 4


def tampered(folder, change):
    """Change the rows of a run as somebody would who wants a larger radius."""
    path = folder / "votes-0.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def enlarge(rows):
    rows[0]["radius"] += 0.1


def relabel(rows):
    rows[1]["label"] = 1


def more_votes(rows):
    """Counts times two, with the radius that would follow from them."""
    row = rows[0]
    row["estimation"] = [2 * count for count in row["estimation"]]
    votes = Votes(tuple(row["selection"]), tuple(row["estimation"]), SIGMA, 0, stopped=True)
    row["radius"] = smoothing_radius(votes, 0.001, "anytime").radius


def other_votes(rows):
    """Votes of the fourth picture, which lies on the plane, all for one class."""
    row = rows[3]
    row["estimation"] = [sum(row["estimation"]), 0]
    row["selection"] = [100, 0]
    votes = Votes(tuple(row["selection"]), tuple(row["estimation"]), SIGMA, 0, stopped=True)
    certificate = smoothing_radius(votes, 0.001, "anytime")
    row["radius"] = certificate.radius
    row["prediction"] = certificate.prediction


def fewer_calls(rows):
    rows[0]["calls"] //= 2


def lose(rows):
    del rows[-1]


@pytest.mark.parametrize(
    "change, words",
    [
        (enlarge, "claims radius"),
        (relabel, "labels of 1 pictures"),
        (more_votes, "recount with the same noise differs"),
        (other_votes, "recount with the same noise differs"),
        (fewer_calls, "network calls"),
        (lose, "not finished: 4 of 5"),
    ],
)
def test_a_tampered_row_is_a_fault(tmp_path, change, words):
    certify(tmp_path)
    honest = certification.records_of(certification.read(tmp_path))
    tampered(tmp_path, change)
    rows = certification.read(tmp_path)
    finished = len(rows.rows) == 5
    state = verified(tmp_path, certification.records_of(rows) if finished else honest, recount=5)
    assert any(words in fault for fault in state.faults), state.faults


def test_a_better_record_is_a_fault(tmp_path):
    certify(tmp_path)
    listed = certification.records_of(certification.read(tmp_path))
    better = replace(listed[1], value=1.0, low=0.5, high=1.0)
    assert verified(tmp_path, [listed[0], better, listed[2]]).faults
    assert verified(tmp_path, listed[:2]).faults


class Lucky(HalfSpace):
    """Answers as it should under the noise of one run, and as the plane that lies elsewhere under any other."""

    def __init__(self, told):
        super().__init__()
        self.told = told

    def logits(self, x, noise):
        known = torch.tensor([round(float(one.sum()), 4) in self.told for one in x])
        moved = super().logits(x - 0.4 * NORMAL.reshape(SHAPE).to(x), noise)
        return torch.where(known[:, None], super().logits(x, noise), moved)


class Listening(HalfSpace):
    """Remembers every noised picture that it was asked about."""

    def __init__(self):
        super().__init__()
        self.heard = set()

    def logits(self, x, noise):
        self.heard |= {round(float(one.sum()), 4) for one in x}
        return super().logits(x, noise)


def seeded_as_the_run(seed, *purpose):
    """The twin of `seed_of` whose recount draws the noise of the run's own votes."""
    if purpose[0] == "recount":
        return seed_of(0, "estimation", purpose[1])
    return seed_of(seed, *purpose)


@twins.rejected(
    {
        "new votes that prove nothing": dict(changes=dict(CHANCE=1e-300)),
        "new votes with the old noise": dict(changes=dict(seed_of=seeded_as_the_run)),
    }
)
def test_votes_that_only_the_noise_of_the_run_gives_are_a_fault(changes=None):
    images, labels = pictures((0.4,))
    with tempfile.TemporaryDirectory() as folder:
        listening = Listening()
        list(certification.certify(listening, images, labels, PLAN, folder, OWN))
        run = certification.read(folder)
        check = twins.patched(certification.verify, certification, **(changes or {}))
        claimed = certification.records_of(run)
        *_, state = check(
            Lucky(listening.heard), images, labels, run, {}, claimed, seed=1, reattack=0
        )
    assert [fault for fault in state.faults if "new votes prove" in fault]


class Moved(HalfSpace):
    """The plane lies elsewhere: another classifier than the one that was certified."""

    def logits(self, x, noise):
        return super().logits(x - 0.2, noise)


def test_another_classifier_or_other_weights_are_a_fault(tmp_path):
    certify(tmp_path)
    assert any("differs" in fault for fault in verified(tmp_path, classifier=Moved()).faults)
    faults = verified(tmp_path, checkpoints={"a": "0" * 64}).faults
    assert any("weights a" in fault for fault in faults)
    other = pictures((0.4, 0.05, -0.3, 0.0, 0.2))
    assert any("not those" in fault for fault in verified(tmp_path, images=other).faults)


def test_an_attack_inside_the_radius_finds_a_radius_that_is_too_large():
    """A certificate of counts that nobody cast, at a picture close to the plane."""
    images, labels = pictures((0.05,))
    smoothed = certification.Smoothed(HalfSpace(), SIGMA)
    forged = smoothing_radius(Votes((20, 0), (2000, 0), SIGMA, 0), 0.001)
    assert forged.radius > 0.5
    assert certification.changed_inside(smoothed, images, forged, seed=3)
    counted = smoothing_radius(Votes((20, 0), (1160, 840), SIGMA, 0), 0.001)
    assert 0 < counted.radius < 0.05
    assert not certification.changed_inside(smoothed, images, counted, seed=3)


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(alpha=0.0), "alpha"),
        (dict(alpha=1.5), "alpha"),
        (dict(bound="both"), "the bound"),
        (dict(most=0), "most votes"),
        (dict(selection=2.5), "selection votes"),
        (dict(radii=()), "radii above 0"),
        (dict(radii=(0.1, math.nan)), "radi"),
        (dict(radii=(-1.0,)), "radii above 0"),
        (dict(sigma_pixel=-1.0), "sigma"),
    ],
)
def test_a_plan_that_cannot_be_meant_is_refused(fields, words):
    with pytest.raises((ValueError, TypeError), match=words):
        replace(PLAN, **fields)


def test_a_run_goes_on_with_more_pictures(tmp_path):
    images, labels = pictures()
    certify(tmp_path / "more", images=(images[:3], labels[:3]))
    first = (tmp_path / "more/votes-0.jsonl").read_text()
    certify(tmp_path / "more")
    certify(tmp_path / "whole")
    assert (tmp_path / "more/votes-0.jsonl").read_text().startswith(first)  # nothing is done twice
    whole = certification.read(tmp_path / "whole")
    more = certification.read(tmp_path / "more")
    counts = [[{**row, "seconds": 0} for row in run.rows] for run in (more, whole)]
    assert counts[0] == counts[1] and more.settings == whole.settings
    with pytest.raises(ValueError, match=r"\['images', 'n'\] differ"):
        certify(tmp_path / "more", images=(images[:3], labels[:3]))


def test_a_folder_of_other_settings_is_left_alone(tmp_path):
    certify(tmp_path)
    before = (tmp_path / "votes-0.jsonl").read_text()
    with pytest.raises(ValueError, match=r"\['plan'\] differ"):
        certify(tmp_path, replace(PLAN, alpha=0.01))
    with pytest.raises(ValueError, match=r"\['seed'\] differ"):
        certify(tmp_path, seed=1)
    assert (tmp_path / "votes-0.jsonl").read_text() == before


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        '{"index": 0}',
        '{"index": 0, "label": 0, "selection": [100, 0], "estimation": [0.5, 0.5], "prediction": 0, "radius": 0, "calls": 110, "seconds": 1}',
        '{"index": 0, "label": 0, "selection": [100, 0], "estimation": [9, 1], "prediction": 0, "radius": 0, "seconds": 1}',
        '{"index": 0, "label": 0, "selection": [100, 0], "estimation": [9, 1], "prediction": 0, "radius": 0, "calls": 0, "seconds": 1}',
        '{"index": 9, "label": 0, "selection": [100, 0], "estimation": [9, 1], "prediction": 0, "radius": 0, "calls": 110, "seconds": 1}',
        '{"index": 0, "label": 0, "selection": [100, 0], "estimation": [9, 1], "prediction": 0, "radius": NaN, "seconds": 1}',
    ],
)
def test_a_damaged_row_is_named(tmp_path, line):
    certify(tmp_path)
    (tmp_path / "votes-0.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match="votes-0"):
        certification.read(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Soft votes: the probabilities themselves

WIDTH = 0.1  # of the slope from one class to the other


class SoftHalfSpace(HalfSpace):
    """The same plane, with the probability of a class: its mean under noise is known as well."""

    scale = "nats"

    def logits(self, x, noise):
        distance = super().logits(x, noise)[:, 0].double() / WIDTH
        return torch.special.log_ndtr(torch.stack([distance, -distance], 1))


BETTING = replace(PLAN, bound="betting", radii=(0.05, 0.15))


def softly(folder, plan=BETTING, classifier=None, **options):
    images, labels = pictures()
    classifier = classifier or SoftHalfSpace()
    return list(certification.certify(classifier, images, labels, plan, folder, OWN, **options))


@pytest.fixture(scope="module")
def a_soft_run(tmp_path_factory):
    """The folder of a finished run of soft votes, to be copied."""
    folder = tmp_path_factory.mktemp("soft")
    softly(folder)
    return folder


def soft_verified(folder, classifier=None, **options):
    return verified(folder, classifier=classifier or SoftHalfSpace(), **options)


@pytest.mark.parametrize("bound", ["betting", "bernstein", "hoeffding"])
def test_soft_radii_approach_those_of_the_true_mean_from_below(tmp_path, bound):
    """E Phi((d + sigma z) / w) = Phi(d / sqrt(w^2 + sigma^2)), so sigma d / sqrt(w^2 + sigma^2) is all there is."""
    softly(tmp_path, replace(BETTING, bound=bound, radii=(0.1, 0.3)))
    found = certification.read(tmp_path).certificates()
    for certificate, distance in zip(found, (0.4, 0.05, 0.3, 0.0, 0.15), strict=True):
        most = SIGMA * distance / math.hypot(WIDTH, SIGMA)
        assert certificate.radius <= most and certificate.bound == bound
    assert found[3].prediction is None and found[2].prediction == 1
    assert found[4].radius > 0.05 and found[0].radius > 0.25


def test_a_stored_soft_vote_is_rounded_down_so_that_its_bound_stays_one(tmp_path):
    softly(tmp_path, replace(BETTING, bound="bernstein"))
    run = certification.read(tmp_path)
    images, _ = pictures()
    smoothed = certification.Smoothed(SoftHalfSpace(), SIGMA)
    for row, tally in zip(run.rows[:2], run.votes(), strict=False):
        key = certification.seed_of(0, "estimation", row["index"])
        parts = smoothed.billed_shares(images[row["index"]][None], key, 2000)
        given = torch.cat([shares[:, tally.guess] for shares, _ in parts]).sort().values.numpy()
        lost = given - tally.values
        assert tally.n == 2000 and 0 <= lost.min() and lost.max() < 0.001 and lost.max() > 0.0005
        assert row["calls"] == 2100 and sum(count for _, count in row["estimation"]) == 2000
        exact = certification.soft.bernstein_bound(given, 0.001)
        assert 0 <= exact - run.plan.certificate(tally).p_lower < 0.002


def test_bets_stop_early_and_certify_as_many(tmp_path):
    softly(tmp_path / "all", replace(BETTING, bound="bernstein"))
    softly(tmp_path / "early", together=20)
    every = certification.read(tmp_path / "all")
    early = certification.read(tmp_path / "early")
    for radius in BETTING.radii:
        by_all = [c.radius >= radius for c in every.certificates()]
        by_few = [c.radius >= radius for c in early.certificates()]
        assert all(few or not all_ for few, all_ in zip(by_few, by_all, strict=True))
    spent = [votes.n for votes in early.votes()]
    assert spent[0] < 100 and sum(spent) < 0.7 * 5 * 2000
    assert early.rows[0]["calls"] == 100 + spent[0]


def test_soft_votes_depend_on_keys_alone(tmp_path):
    plan = replace(BETTING, bound="bernstein", most=300, radii=(0.05,))
    softly(tmp_path / "whole", plan)
    images, labels = pictures()
    broken = certification.certify(
        SoftHalfSpace(), images, labels, plan, tmp_path / "broken", OWN, together=7
    )
    for progress in broken:
        if progress.images == 2 and progress.votes > 150:
            break
    broken.close()
    softly(tmp_path / "broken", plan, together=64)
    strip = [{**row, "seconds": 0} for row in certification.read(tmp_path / "broken").rows]
    assert strip == [{**row, "seconds": 0} for row in certification.read(tmp_path / "whole").rows]


def test_soft_votes_verify_and_their_records_say_what_they_are(tmp_path):
    softly(tmp_path)
    state = soft_verified(tmp_path)
    assert state.faults == () and state.recounted == 4 and state.attacked > 0
    listed = certification.records_of(certification.read(tmp_path))
    assert all("soft votes" in record.what for record in listed)
    assert [record.settings["radius"] for record in listed] == [0.0, 0.05, 0.15]


def surer(rows):
    """No vote less sure than .9, and the radius that would follow."""
    row = rows[1]
    moved = {}
    for share, count in row["estimation"]:
        share = max(share, 900)
        moved[share] = moved.get(share, 0) + count
    row["estimation"] = sorted(map(list, moved.items()))
    votes = certification.votes_of(row, BETTING, 0)
    certificate = BETTING.certificate(votes)
    row["prediction"] = certificate.prediction
    row["radius"] = certificate.radius


def other_class(rows):
    rows[0]["selection"].reverse()


def too_sure_a_choice(rows):
    rows[0]["selection"][0] += 10_000


@pytest.mark.parametrize(
    "change, words",
    [
        (enlarge, "claims radius"),
        (surer, "recount with the same noise differs"),
        (surer, "new votes prove"),
        (other_class, "claims radius"),
        (too_sure_a_choice, "thousandths"),
        (fewer_calls, "network calls"),
    ],
)
def test_tampered_soft_votes_are_a_fault(a_soft_run, tmp_path, change, words):
    shutil.copytree(a_soft_run, tmp_path, dirs_exist_ok=True)
    tampered(tmp_path, change)
    listed = certification.records_of(certification.read(tmp_path))
    state = soft_verified(tmp_path, claimed=listed, recount=5)
    assert any(words in fault for fault in state.faults), state.faults


class SoftMoved(SoftHalfSpace):
    """Another soft classifier: its plane lies elsewhere."""

    def logits(self, x, noise):
        return super().logits(x - 0.2, noise)


def test_another_soft_classifier_is_a_fault_and_a_false_radius_is_found_by_an_attack(tmp_path):
    softly(tmp_path)
    assert any("differs" in fault for fault in soft_verified(tmp_path, SoftMoved()).faults)
    images, _ = pictures((0.05,))
    smoothed = certification.Smoothed(SoftHalfSpace(), SIGMA)
    forged = BETTING.certificate(SoftTally((100_000, 0), ((1000, 2000),), SIGMA, 0))
    assert forged.radius > 0.4
    assert certification.changed_inside(smoothed, images, forged, seed=3)


@pytest.mark.parametrize("scale", ["scores", "votes"])
def test_what_has_no_probabilities_has_no_soft_votes(tmp_path, scale):
    silent = HalfSpace()
    silent.scale = scale
    with pytest.raises(ValueError, match=f"log-probabilities.*logits are {scale}"):
        softly(tmp_path, classifier=silent)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "estimation, selection",
    [
        ([[0.5, 3]], [600, 400]),
        ([[1001, 3]], [600, 400]),
        ([[500, 3], [400, 2]], [600, 400]),
        ([[500, 0]], [600, 400]),
        ([[500]], [600, 400]),
        ([], [600, 400]),
        ([9, 1], [600, 400]),
        ([[500, 3]], [-1, 400]),
        ([[500, 3]], [0, 0]),
        ([[500, 3]], "600"),
    ],
)
def test_a_damaged_soft_row_is_named(a_soft_run, tmp_path, estimation, selection):
    shutil.copytree(a_soft_run, tmp_path, dirs_exist_ok=True)
    row = certification.read(tmp_path).rows[0]
    row = {**row, "estimation": estimation, "selection": selection}
    (tmp_path / "votes-0.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="votes-0"):
        certification.read(tmp_path)
