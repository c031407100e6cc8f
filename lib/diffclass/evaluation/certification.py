"""Certificates of many pictures: votes are counted, kept one line a picture, and anybody can recount them.

What is stored is not the radius but the counts that it follows from; another radius, another alpha or another bound is
then arithmetic, not another run. Every certificate is a lower bound of how far the smoothed classifier's answer stands.
"""

import json
import math
import re
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from diffclass import attacks, intervals, units
from diffclass.certify import anytime, certificates, counting, soft
from diffclass.certify.certificates import Certificate, Votes
from diffclass.certify.soft import SoftCertificate, SoftTally
from diffclass.classifiers.base import Classifier
from diffclass.classifiers.smoothed import VOTE_BLOCK, Smoothed, check_probabilities
from diffclass.device import in_precision
from diffclass.evaluation.runs import fingerprint, settle
from diffclass.noise import seed_of
from diffclass.storage import files, results
from diffclass.storage.results import Record

SCHEMA = 1
KIND = "certification"  # what settings of such a run say of themselves
FILE = "records.jsonl"
SOURCE = "diffclass certify"
RADII = (0.25, 0.5, 0.75, 1.0)  # at which the literature reports certified accuracy; pixels
MOST = 10_000  # votes on one picture
SELECTION = 100  # votes that choose its class
LARGEST_VOTES = 10_000_000
NEEDED = {
    "kind",
    "schema",
    "world",
    "classifier",
    "checkpoints",
    "images",
    "every",
    "n",
    "precision",
    "seed",
    "plan",
}
ROW = {"index", "label", "selection", "estimation", "prediction", "radius", "calls", "seconds"}
INSIDE = 0.999  # of a certified radius: where it is attacked
COPIES = 16  # noised copies that this attack averages at a step
STEPS = 20  # of this attack
JUDGES = 1000  # fresh votes at most that judge what it found, or a claim
RECOUNTED = 25  # votes that are asked together, so that a recount shows that it goes on
TIES = 0.01  # of the votes that may fall otherwise on another machine
CLOSE = 0.005  # how far a probability may be from what it was, by rounding
CHANCE = 1e-6  # that new votes contradict a bound that holds


@dataclass(frozen=True)
class Plan:
    """How pictures are certified: everything that decides a certificate, but for the classifier and the seed.

    sigma_pixel  the smoothing noise, in pixels of [0,1]
    alpha        the chance that a certificate is wrong, at most
    bound        of hard votes "anytime": counting stops as soon as the largest radius is certified or the next one is out
                 of reach, and the bound holds whenever it stops; "fixed": all votes are counted, then the exact binomial
                 bound. Of soft votes, the probabilities of a classifier that has them: "betting", which stops as "anytime"
                 does; "bernstein" and "hoeffding", of all votes
    selection    votes that choose the class; they are not counted again
    most         votes that bound its share, at most
    radii        that are wanted, in pixels: only "anytime" and "betting" look at them, to know when they know enough
    """

    sigma_pixel: float
    alpha: float = 0.001
    bound: str = "anytime"
    selection: int = SELECTION
    most: int = MOST
    radii: tuple[float, ...] = RADII

    def __post_init__(self):
        units.check_sigma_pixel(self.sigma_pixel)
        units.chosen(self.bound, (*certificates.BOUNDS, *soft.SOFT_BOUNDS), "the bound")
        object.__setattr__(self, "bound", self.bound.lower())
        for name in ("selection", "most"):
            units.check_whole(getattr(self, name), f"{name} votes", least=1, most=LARGEST_VOTES)
        intervals.lower_bound(1, 1, self.alpha)  # raises for an alpha outside (0,1)
        radii = tuple(sorted(float(units.check_real(r, "a radius")) for r in self.radii))
        if not radii or not all(0 < radius < math.inf for radius in radii):
            raise ValueError(f"expected radii above 0 to be certified at, got {self.radii}.")
        object.__setattr__(self, "radii", radii)
        if radii[0] > self.ceiling:
            raise ValueError(
                f"expected a radius that {self.most} votes can certify at sigma {self.sigma_pixel:g}, at most "
                f"{self.ceiling:.4g}, got {radii}; count more votes, or ask for less."
            )

    @property
    def soft_votes(self) -> bool:
        """Whether votes are probabilities."""
        return self.bound in soft.SOFT_BOUNDS

    @property
    def stops(self) -> bool:
        """Whether the votes say themselves when they suffice, which their bound then has to allow."""
        return self.bound in ("anytime", "betting")

    @property
    def ceiling(self) -> float:
        """The radius when every vote agrees, soft ones with all that they have. Units: pixels."""
        if self.soft_votes:
            return soft.largest_soft_radius(self.most, self.sigma_pixel, self.alpha, self.bound)
        return certificates.largest_radius(self.most, self.sigma_pixel, self.alpha, self.bound)

    @property
    def rule(self) -> anytime.StopRule | soft.SoftStopRule | None:
        """When to stop counting, with 0 and the radii that so many votes can certify; None where all votes are counted.

        Why         radius 0 is among them: which pictures abstain is counted as well
        """
        if not self.stops:
            return None
        within = (0.0, *(radius for radius in self.radii if radius <= self.ceiling))
        rule = soft.SoftStopRule if self.soft_votes else anytime.StopRule
        return rule(self.sigma_pixel, within, self.alpha, self.most)

    def certificate(self, votes: Votes | SoftTally) -> Certificate | SoftCertificate:
        """What the votes on one picture prove."""
        if self.soft_votes:
            return soft.soft_radius(votes, self.alpha, self.bound)
        return certificates.smoothing_radius(votes, self.alpha, self.bound)

    @classmethod
    def of_json(cls, fields: dict) -> "Plan":
        """A plan from what `asdict` made of it. Errors: ValueError for other fields, or values that cannot be meant."""
        with files.reading("the plan of a certification"):
            return cls(**{**fields, "radii": tuple(fields["radii"])})


@dataclass(frozen=True, eq=False)
class Certification:
    """What a run has stored: settings, and one row for each finished picture in order of its index.

    A row holds index, the picture's place in its test set; label; selection and estimation, K counts each, or those of a
    `SoftTally`; prediction (None: abstained) and radius, which follow from them; the network calls and the seconds that it took.
    """

    settings: dict
    rows: list[dict]

    @property
    def plan(self) -> Plan:
        """The plan of the settings."""
        return Plan.of_json(self.settings["plan"])

    @property
    def labels(self) -> Tensor:
        """The classes of the finished pictures. Shapes: -> [N]."""
        return torch.tensor([row["label"] for row in self.rows], dtype=torch.long)

    def votes(self) -> list[Votes | SoftTally]:
        """The votes on each finished picture."""
        plan = self.plan
        return [votes_of(row, plan, self.settings["seed"]) for row in self.rows]

    def certificates(self) -> list[Certificate | SoftCertificate]:
        """What the votes prove, computed anew."""
        plan = self.plan
        return [plan.certificate(votes) for votes in self.votes()]


def votes_of(row: dict, plan: Plan, seed: int) -> Votes | SoftTally:
    """The votes of a row. Errors: those of `Votes` and of `SoftTally`."""
    selection = tuple(row["selection"])
    if plan.soft_votes:
        pairs = tuple(tuple(pair) for pair in row["estimation"])
        return SoftTally(selection, pairs, plan.sigma_pixel, seed, row["calls"])
    return Votes(
        selection,
        tuple(row["estimation"]),
        plan.sigma_pixel,
        seed,
        stopped=plan.stops,
        calls=row["calls"],
    )


@dataclass(frozen=True)
class Progress:
    """How far a run is: pictures done of how many here, and votes counted on the one at hand."""

    images: int
    total: int
    votes: int


def picked(n: int, every: int) -> list[int]:
    """Which pictures of a test set are certified: each `every`-th of the first n, from the first on."""
    n = units.check_whole(n, "pictures", least=0, most=None)
    every = units.check_whole(every, "every how many pictures one is taken", least=1, most=None)
    return list(range(0, n, every))


def settings_of(
    images: Tensor, labels: Tensor, plan: Plan, own: dict, *, every: int, precision: str, seed: int
) -> dict:
    """All that a run depends on, as JSON values: `own` is the caller's (world, classifier, checkpoints, version)."""
    settings = {
        **own,
        "kind": KIND,
        "schema": SCHEMA,
        "plan": asdict(plan),
        "every": every,
        "n": len(images),
        "images": fingerprint(images, labels),
        "precision": precision,
        "seed": seed,
    }
    return json.loads(json.dumps(settings, allow_nan=False))


def certify(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    plan: Plan,
    folder: str | Path,
    own: dict,
    *,
    every: int = 1,
    precision: str = "fp32",
    together: int = VOTE_BLOCK,
    seed: int = 0,
) -> Iterator[Progress]:
    """Certify every `every`-th image, one after the other, keeping the counts of each when it is finished.

    Shapes      images [N,C,H,W] in [0,1], labels [N]; an image's index is its place in `images`
    Precision   "fp32", or "bf16" for the network: then the classifier in bf16 is what is certified
    Randomness  votes from keys (seed, purpose, index): neither processes, interruptions nor how many votes are asked
                `together` change a count, but for ties within rounding
    Writes      folder/settings.json, and folder/votes-RANK.jsonl, flushed after each image
    Errors      ValueError for images or labels that cannot be meant, a folder of other settings, or soft votes of a
                classifier without probabilities; RuntimeError if another run writes to it; those of `Smoothed`
    """
    if plan.soft_votes:
        check_probabilities(classifier)
    smoothed = Smoothed(classifier, plan.sigma_pixel)
    smoothed.checked(images)
    units.check_labels(labels, len(images), classifier.num_classes)
    accelerator = Accelerator()
    folder = Path(folder)
    settings = settings_of(images, labels, plan, own, every=every, precision=precision, seed=seed)
    with files.locked(folder, accelerator.process_index):
        settle(folder, settings, images, labels, "certificates")
        done = {row["index"] for row in read(folder).rows}
        accelerator.wait_for_everyone()  # nobody writes before everybody has read what is there
        todo = [index for index in picked(len(images), every) if index not in done]
        todo = todo[accelerator.process_index :: accelerator.num_processes]
        smoothed = smoothed.to(accelerator.device)
        path = folder / f"votes-{accelerator.process_index}.jsonl"
        files.mend(path, b'{"index": ')
        for number, index in enumerate(todo):
            x = images[index : index + 1].to(accelerator.device)
            begun = time.perf_counter()
            votes = None
            for step in _counted(smoothed, x, plan, index, precision, together, seed):
                counted, votes = step
                yield Progress(number, len(todo), counted)
            row = _row(index, int(labels[index]), votes, plan, time.perf_counter() - begun)
            files.append(path, (json.dumps(row) + "\n").encode())
            yield Progress(number + 1, len(todo), 0)
        accelerator.wait_for_everyone()


def _counted(
    smoothed: Smoothed, x: Tensor, plan: Plan, index: int, precision: str, together: int, seed: int
) -> Iterator[tuple[int, Votes | SoftTally | None]]:
    """The votes on one picture, as `counting.draw_votes` or `counting.draw_soft_votes` yields them."""
    drawn = counting.draw_soft_votes if plan.soft_votes else counting.draw_votes
    run = drawn(
        smoothed,
        x,
        selection=plan.selection,
        estimation=plan.most,
        seed=seed,
        picture=index,
        rule=plan.rule,
        together=together,
    )
    return _in_precision(run, precision, x)


def _row(index: int, label: int, votes: Votes | SoftTally, plan: Plan, seconds: float) -> dict:
    certificate = plan.certificate(votes)
    return dict(
        index=index,
        label=label,
        selection=list(votes.selection),
        estimation=list(votes.estimation),
        prediction=certificate.prediction,
        radius=certificate.radius,
        calls=votes.calls,
        seconds=round(seconds, 3),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Read


def is_certification(folder: str | Path) -> bool:
    """Whether a folder holds the results of `certify`. Errors: those of `files.settings_of`, where it has settings."""
    folder = Path(folder)
    return (folder / files.SETTINGS).exists() and files.settings_of(folder).get("kind") == KIND


def read(folder: str | Path) -> Certification:
    """Everything that the processes wrote into `folder`; an interrupted last line is left out.

    Errors      FileNotFoundError for a folder without a run; ValueError for a file that is damaged, or of another schema
    """
    folder = Path(folder)
    with files.reading(f"the results of a certification in {folder}"):
        settings = _checked_settings(files.settings_of(folder), folder)
        rows = {}
        for path in sorted(folder.glob("votes-*.jsonl")):
            finished = path.read_text().split("\n")[
                :-1
            ]  # what follows the last line end was interrupted
            for number, line in enumerate(finished, start=1):
                row = _checked_row(line, f"line {number} of {path}", settings)
                if row["index"] in rows:
                    raise ValueError(
                        f"expected each picture once, got picture {row['index']} again on line {number} of {path}; the file "
                        "was changed by something else."
                    )
                rows[row["index"]] = row
        return Certification(settings, [rows[index] for index in sorted(rows)])


def _checked_settings(settings: dict, folder: Path) -> dict:
    where = folder / files.SETTINGS
    if settings.get("kind") != KIND or settings.get("schema") != SCHEMA:
        raise ValueError(
            f"expected {where} to be that of a certification of schema {SCHEMA}, got "
            f"{settings.get('kind', 'one of another kind')!r}, schema {settings.get('schema')!r}; `diffclass certify "
            "--store FOLDER` writes such a folder."
        )
    lacking = sorted(NEEDED - set(settings))
    if lacking:
        raise ValueError(
            f"expected {where} to be that of a certification, got one without {lacking}."
        )
    for name, least in (("n", 1), ("every", 1), ("seed", 0)):
        units.check_whole(settings[name], f"{name} in {where}", least=least, most=None)
    for name in ("world", "classifier", "precision", "images"):
        if not isinstance(settings[name], str) or not settings[name]:
            raise ValueError(f"expected words as {name} in {where}, got {settings[name]!r}.")
    if not re.fullmatch("[0-9a-f]{64}", settings["images"]):
        raise ValueError(
            f"expected the SHA-256 of the images in {where}, got {settings['images']!r}."
        )
    Plan.of_json(settings["plan"])
    return settings


def _checked_row(line: str, where: str, settings: dict) -> dict:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or set(row) != ROW or type(row["index"]) is not int:
        raise ValueError(
            f"{where} is not the row of a certified picture; the file was changed by something else: restore it, or "
            "certify again in another folder."
        )
    if row["index"] not in range(0, settings["n"], settings["every"]):
        raise ValueError(
            f"expected every {settings['every']}-th picture of {settings['n']} in {where}, got picture {row['index']}."
        )
    units.check_whole(row["label"], f"a label in {where}", least=0)
    units.check_whole(row["calls"], f"the network calls in {where}", least=1, most=None)
    if type(row["radius"]) not in (int, float) or not 0 <= row["radius"] < math.inf:
        raise ValueError(f"expected a radius >= 0 in {where}, got {row['radius']!r}.")
    if Plan.of_json(settings["plan"]).soft_votes:
        return _checked_tally(row, where)
    for counts in (row["selection"], row["estimation"]):
        if not isinstance(counts, list) or any(type(c) is not int or c < 0 for c in counts):
            raise ValueError(
                f"expected K whole numbers as counts in {where}, got {str(counts)[:80]}."
            )
    if len(row["selection"]) != len(row["estimation"]) or not sum(row["selection"]):
        raise ValueError(f"expected counts of the same classes, and votes among them, in {where}.")
    return row


def _checked_tally(row: dict, where: str) -> dict:
    """A row of soft votes whose numbers are those of a tally, else a ValueError that names it."""
    try:
        SoftTally(tuple(row["selection"]), tuple(map(tuple, row["estimation"])), 1.0)
    except (TypeError, ValueError) as reason:
        raise ValueError(f"expected soft votes in {where}: {reason}") from None
    return row


# ---------------------------------------------------------------------------------------------------------------------
# Records


def records_of(run: Certification) -> list[Record]:
    """Certified accuracy at radius 0 (right and not abstained) and at each radius of the plan, with intervals.

    Errors      ValueError if pictures are left to be certified
    """
    wanted = len(picked(run.settings["n"], run.settings["every"]))
    if len(run.rows) < wanted:
        raise ValueError(
            f"expected a finished run, got {len(run.rows)} of {wanted} pictures; the same command goes on."
        )
    plan = run.plan
    certified = run.certificates()
    spent = sum(votes.n for votes in run.votes()) / len(run.rows)
    kind = ", soft votes" if plan.soft_votes else ""
    calls = sum(row["calls"] for row in run.rows) / len(run.rows)
    listed = []
    for radius in (0.0, *plan.radii):
        curve = certificates.certified_accuracy(certified, run.labels, [radius])
        listed.append(
            results.accuracy_record(
                int(curve.correct[0]),
                len(certified),
                metric="certified accuracy",
                world=run.settings["world"],
                classifier=run.settings["classifier"],
                detail=f"L2 radius {radius:g}, sigma {plan.sigma_pixel:g}{kind}",
                settings={
                    **run.settings,
                    "radius": radius,
                    "abstained": curve.abstained,
                    "votes per image": round(spent, 1),
                    "calls per image": round(calls, 1),
                },
                seed=run.settings["seed"],
                checkpoint=results.one_checkpoint(run.settings["checkpoints"]),
                source=SOURCE,
            )
        )
    return listed


def keep(folder: str | Path, listed: Sequence[Record]) -> None:
    """Put the records of a run into its folder, in place of earlier ones."""
    lines = [json.dumps(asdict(record), sort_keys=True) + "\n" for record in listed]
    files.write(Path(folder) / FILE, "".join(lines))


def kept(folder: str | Path) -> list[Record]:
    """The records in the folder of a run. Errors: those of `results.read`."""
    return results.read(Path(folder) / FILE)


# ---------------------------------------------------------------------------------------------------------------------
# Verify


@dataclass(frozen=True, eq=False)
class Verification:
    """What a verification has found so far: faults, and what was seen; `recounted` and `attacked` pictures."""

    total: int
    faults: tuple[str, ...] = ()
    seen: tuple[str, ...] = ()
    recounted: int = 0
    attacked: int = 0

    @property
    def images(self) -> int:
        """How many pictures were asked about again so far."""
        return self.recounted + self.attacked


def verify(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    run: Certification,
    checkpoints: dict[str, str],
    claimed: Sequence[Record],
    *,
    seed: int,
    recount: int = 4,
    reattack: int = 4,
) -> Iterator[Verification]:
    """Check a finished run as one who trusts nothing in its folder; the last item yielded is the result.

    Checked     weights and images are those that are named; every radius follows from its counts, and every record from
                the rows; a sample of pictures is voted on again, with the noise of the record and with new noise; a sample
                of certified pictures is attacked inside the radius
    Statistics  the same noise gives the same counts, but for ties within rounding: 1 % of the votes may differ. New votes,
                as many, may not prove (exact binomial bound, or bets, level 1e-6) that the share is below the bound that is claimed
    Shapes      images [N,C,H,W], labels [N]: the library's own, whatever the folder says
    Randomness  `seed`, by keys that no run draws from
    """
    faults = _other_settings(images, labels, run, checkpoints)
    faults += _unlike_counts(run)
    faults += _unlike_records(run, claimed)
    state = Verification(len(run.rows), tuple(faults))
    yield state
    if faults:
        return
    plan = run.plan
    smoothed = Smoothed(classifier, plan.sigma_pixel)
    by_luck = torch.Generator().manual_seed(seed_of(seed, "which pictures") % 2**62)
    order = torch.randperm(len(run.rows), generator=by_luck).tolist()
    for place in order[:recount]:
        new = yield from _recounted(smoothed, images, run, run.rows[place], seed, state)
        state = replace(state, faults=(*state.faults, *new), recounted=state.recounted + 1)
        yield state
    certified = run.certificates()
    inside = [place for place in order if certified[place].radius > 0]
    for place in inside[:reattack]:
        row = run.rows[place]
        x = images[row["index"] : row["index"] + 1]
        with in_precision(run.settings["precision"], x):
            changed = changed_inside(smoothed, x, certified[place], seed_of(seed, row["index"]))
        new = ()
        if changed:
            new = (
                f"picture {row['index']} changes its smoothed prediction inside the radius {certified[place].radius:.3f}.",
            )
        state = replace(state, faults=(*state.faults, *new), attacked=state.attacked + 1)
        yield state
    seen = (
        f"{len(run.rows)} radii follow from their counts",
        f"{state.recounted} pictures were voted on again, {state.attacked} attacked inside their radius",
    )
    yield replace(state, seen=seen)


def changed_inside(
    smoothed: Smoothed, x: Tensor, certificate: Certificate | SoftCertificate, seed: int
) -> bool:
    """Whether an attack inside a certified radius provably changes the smoothed prediction.

    Attack      PGD in L2 on the mean logits of noised copies (Salman et al. 2019), judged by fresh votes: of hard ones another
                class has more; of soft ones the class has less than half, which the certificate excludes
    Shapes      x [1,C,H,W] in [0,1]
    """
    attacked = Smoothed(smoothed.mean.base, smoothed.mean.sigma, draws=COPIES).surrogate()
    y = torch.tensor([certificate.prediction], device=x.device)
    generator = torch.Generator().manual_seed(seed_of(seed, "attack inside") % 2**62)
    *_, last = attacks.pgd(
        attacked,
        x,
        y,
        INSIDE * certificate.radius,
        noise=lambda step, draw: attacked.sample_noise(1, generator),
        norm="l2",
        steps=STEPS,
        loss=attacks.margin_loss,
    )
    votes = min(JUDGES, certificate.n)
    judged = seed_of(seed, "votes inside")
    if isinstance(certificate, SoftCertificate):
        given = _given(smoothed, last.x, judged, votes, certificate.prediction)
        return 1 - soft.betting_bound(1 - given, certificate.alpha) < 0.5
    *_, counts = smoothed.count(last.x, judged, votes)
    return certificates.prediction_changed(counts.tolist(), certificate.prediction)


def _other_settings(
    images: Tensor, labels: Tensor, run: Certification, checkpoints: dict[str, str]
) -> list[str]:
    stored = run.settings["checkpoints"]
    faults = [
        f"weights {name}: the claim is about {str(stored.get(name, 'none'))[:12]}, these are "
        f"{checkpoints.get(name, 'none')[:12]}."
        for name in sorted(stored | checkpoints)
        if stored.get(name) != checkpoints.get(name)
    ]
    if len(images) != run.settings["n"] or fingerprint(images, labels) != run.settings["images"]:
        faults.append("the images are not those that the claim names.")
    wanted = picked(run.settings["n"], run.settings["every"])
    if [row["index"] for row in run.rows] != wanted:
        faults.append(
            f"the run is not finished: {len(run.rows)} of {len(wanted)} pictures; its numbers are no claim yet."
        )
    wrong = [
        row["index"]
        for row in run.rows
        if row["index"] < len(labels) and row["label"] != int(labels[row["index"]])
    ]
    if wrong:
        faults.append(f"the labels of {len(wrong)} pictures are not theirs, such as {wrong[0]}.")
    return faults


def _unlike_counts(run: Certification) -> list[str]:
    """Rows whose radius does not follow from their counts, or whose counts the plan does not allow."""
    plan = run.plan
    faults = []
    for row, votes in zip(run.rows, run.votes(), strict=True):
        certificate = plan.certificate(votes)
        counted = votes.n
        allowed = counted <= plan.most if plan.stops else counted == plan.most
        if not _chosen_by(row["selection"], plan) or not allowed:
            unit = " thousandths" if plan.soft_votes else ""
            faults.append(
                f"picture {row['index']} has {sum(row['selection'])}{unit} and {counted} votes, where the plan says "
                f"{plan.selection} votes and {plan.most}."
            )
        same = math.isclose(row["radius"], certificate.radius, rel_tol=1e-9, abs_tol=1e-12)
        if row["prediction"] != certificate.prediction or not same:
            faults.append(
                f"picture {row['index']} claims radius {row['radius']:.4f} for class {row['prediction']}; its counts "
                f"prove {certificate.radius:.4f} for {certificate.prediction}."
            )
    return faults


def _chosen_by(selection: list[int], plan: Plan) -> bool:
    """Whether selection counts can be those of as many votes as the plan says; each soft one loses by rounding down."""
    if not plan.soft_votes:
        return sum(selection) == plan.selection
    most = soft.THOUSAND * plan.selection
    return most - len(selection) * plan.selection < sum(selection) <= most


def _unlike_records(run: Certification, claimed: Sequence[Record]) -> list[str]:
    """Records that do not follow from the rows."""
    try:
        own = {record.settings["radius"]: record for record in records_of(run)}
    except ValueError as error:
        return [str(error)]
    faults = []
    for record in claimed:
        now = own.pop(record.settings.get("radius"), None)
        same = now is not None and replace(now, when=record.when) == record
        if not same:
            faults.append(f"the record '{record.what}' does not follow from the rows.")
    if own:
        faults.append(f"records are missing for the radii {sorted(own)}.")
    return faults


def _recounted(
    smoothed: Smoothed,
    images: Tensor,
    run: Certification,
    row: dict,
    seed: int,
    state: Verification,
) -> Generator[Verification, None, tuple[str, ...]]:
    """What a recount of one picture's votes contradicts; yields the state so far while it counts."""
    plan = run.plan
    index = row["index"]
    x = images[index : index + 1]
    votes = votes_of(row, plan, run.settings["seed"])
    precision = run.settings["precision"]
    again = None
    drawn = _same_votes(smoothed, x, run, index, votes.n)
    for step in _in_precision(drawn, precision, x):
        again = step[1]
        yield state
    new_votes = min(votes.n, JUDGES)
    anew = seed_of(seed, "recount", index)
    if plan.soft_votes:
        given = []
        asked = smoothed.billed_shares(x, anew, new_votes, together=RECOUNTED)
        for shares, _ in _in_precision(asked, precision, x):
            given.append(shares[:, votes.guess].numpy())
            yield state
        below = 1 - soft.betting_bound(1 - np.concatenate(given), CHANCE)
    else:
        counts = None
        asked = smoothed.count(x, anew, new_votes, together=RECOUNTED)
        for step in _in_precision(asked, precision, x):
            counts = step
            yield state
        below = intervals.upper_bound(int(counts[votes.guess]), new_votes, CHANCE)
    apart = _soft_apart(votes, again) if plan.soft_votes else _apart(votes, again)
    faults = ()
    if apart > math.ceil(TIES * (votes.n + plan.selection)):
        faults += (f"picture {index}: a recount with the same noise differs by {apart} votes.",)
    if not math.isclose(again.calls, row["calls"], rel_tol=0.01):
        faults += (
            f"picture {index}: its votes take {again.calls} network calls, where {row['calls']} are claimed.",
        )
    bound = plan.certificate(votes).p_lower
    if below < bound:
        faults += (
            f"picture {index}: {new_votes} new votes prove its share below {below:.4f}, where at least {bound:.4f} is claimed.",
        )
    return faults


def _in_precision(run: Iterator, precision: str, like: Tensor) -> Iterator:
    """The same items, each step of the run in a precision: between two steps other code runs, which is not."""
    while True:
        with in_precision(precision, like):
            try:
                step = next(run)
            except StopIteration:
                return
        yield step


def _same_votes(
    smoothed: Smoothed, x: Tensor, run: Certification, index: int, counted: int
) -> Iterator[tuple[int, Votes | SoftTally | None]]:
    """The votes on a picture with the noise of the run, as many as are stored, as they are drawn."""
    drawn = counting.draw_soft_votes if run.plan.soft_votes else counting.draw_votes
    return drawn(
        smoothed,
        x,
        selection=run.plan.selection,
        estimation=counted,
        seed=run.settings["seed"],
        picture=index,
        together=RECOUNTED,
    )


def _apart(stored: Votes, again: Votes) -> int:
    """How many votes differ between two counts of as many."""
    pairs = zip(
        stored.selection + stored.estimation, again.selection + again.estimation, strict=True
    )
    return sum(abs(one - other) for one, other in pairs) // 2


def _soft_apart(stored: SoftTally, again: SoftTally) -> int:
    """How many soft votes of two tallies of as many differ by more than `CLOSE`, in order; all, where the class does."""
    if stored.guess != again.guess:
        return stored.n
    chosen = abs(torch.tensor(stored.selection) - torch.tensor(again.selection)).max()
    differ = abs(stored.values - again.values) > CLOSE
    return int(differ.sum()) + int(chosen) // soft.THOUSAND


def _given(smoothed: Smoothed, x: Tensor, seed: int, votes: int, chosen: int) -> np.ndarray:
    """What new soft votes give one class. Shapes: x [1,C,H,W] -> [votes]."""
    parts = [shares[:, chosen].numpy() for shares, _ in smoothed.billed_shares(x, seed, votes)]
    return np.concatenate(parts)
