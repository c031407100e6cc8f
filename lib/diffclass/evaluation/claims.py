"""What a run under attack claims, as records with intervals; and whether its stored perturbations bear it out."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from torch import Tensor

from diffclass import intervals
from diffclass.classifiers.base import Classifier
from diffclass.evaluation import protocols, runs
from diffclass.evaluation.protocols import Protocol
from diffclass.evaluation.runs import Run
from diffclass.storage import files, results
from diffclass.storage.results import Record

SOURCE = "diffclass evaluate --attack"
FILE = "records.jsonl"
MEAN = "Korn-Graubard over images"


def records_of(run: Run) -> list[Record]:
    """All numbers of a finished run: clean and under attack, mean and worst of the draws, and each attack's alone.

    Errors      ValueError if images are left to be attacked
    """
    if run.finished < run.settings["n"]:
        raise ValueError(
            f"expected a finished run, got {run.finished} of {run.settings['n']} images; the same command "
            "goes on."
        )
    key = run.protocol.key
    listed = _statistics(run, [row["clean"] for row in run.rows])
    listed += _statistics(run, [row["hits"] for row in run.rows], attack=key)
    for part, hits in _of_attacks(run):
        listed.append(_mean(run, hits, attack=key, part=part))
    return listed


def keep(folder: Path, listed: Sequence[Record]) -> None:
    """Put the records of a run into its folder, in place of earlier ones."""
    lines = [json.dumps(asdict(record), sort_keys=True) + "\n" for record in listed]
    files.write(folder / FILE, "".join(lines))


def kept(folder: Path) -> list[Record]:
    """The records in the folder of a run. Errors: those of `results.read`."""
    return results.read(folder / FILE)


def _statistics(run: Run, hits: list[int], attack: str | None = None) -> list[Record]:
    """The mean of the draws and, of several, the worst."""
    draws = run.settings["draws"]
    listed = [_mean(run, hits, attack=attack)]
    if draws > 1:
        always = sum(hit == draws for hit in hits)
        listed.append(_counted(run, always, len(hits), attack=attack, statistic="worst"))
    return listed


def _mean(run: Run, hits: list[int], **keys) -> Record:
    draws = run.settings["draws"]
    if draws == 1:
        return _counted(run, sum(hits), len(hits), **keys)
    low, high = intervals.mean_interval([hit / draws for hit in hits], draws)
    return Record(
        metric="accuracy",
        value=sum(hits) / draws / len(hits),
        n=len(hits),
        low=low,
        high=high,
        level=0.95,
        statistic="mean",
        method=MEAN,
        **_common(run),
        **keys,
    )


def _counted(run: Run, correct: int, n: int, **keys) -> Record:
    return results.accuracy_record(correct, n, **_common(run), **keys)


def _common(run: Run) -> dict:
    calls = sum(row["calls"] for row in run.rows) / len(run.rows)
    settings = run.settings
    return dict(
        world=settings["world"],
        classifier=settings["classifier"],
        settings={**settings, "calls per image": round(calls, 1)},
        seed=settings["seed"],
        checkpoint=_checkpoint(settings["checkpoints"]),
        source=SOURCE,
    )


def _checkpoint(weights: dict[str, str]) -> str | None:
    """One name for all weights of a classifier: that of the file, or of the names of several in order."""
    digests = [weights[name] for name in sorted(weights)]
    if len(digests) < 2:
        return digests[0] if digests else None
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _of_attacks(run: Run) -> Iterator[tuple[str, list[int]]]:
    """Each attack in words with the hits it left, by the draws of its selection, on the images that it was tried on."""
    first = 1
    for attack in run.protocol.attacks:
        places = range(first, first + attack.restarts)
        first += attack.restarts
        tried = [row for row in run.rows if row["attacks"][places[0]]]
        if not tried:
            continue
        hits = [
            min(row["attacks"][place][0] for place in places if row["attacks"][place])
            for row in tried
        ]
        words = str(attack)
        if attack.restarts > 1:
            words = f"{words}, {attack.restarts} restarts"
        if len(tried) < len(run.rows):
            words = f"{words}, on the {len(tried)} not yet fooled at every draw"
        yield words, hits


# ---------------------------------------------------------------------------------------------------------------------
# Verification


@dataclass
class Verification:
    """What a check of stored perturbations has seen so far; the claim stands if `faults` stays empty.

    faults      sentences, in the order of the images
    images      how many of `total` have been asked about again
    """

    total: int
    images: int = 0
    faults: list[str] = field(default_factory=list)


def named_protocol(classifier: Classifier, paper: str, claimed: Protocol) -> Protocol:
    """The protocol that a claim names, as the library defines it for this classifier.

    Shapes      paper: the paper's protocol of the classifier's entry
    Errors      ValueError for a protocol that the library does not know
    """
    if claimed.name == "single":
        return protocols.single(claimed.attacks[0], claimed.norm, claimed.epsilon)
    if claimed.name == "honest" and claimed.version == 1:
        return protocols.honest(classifier, claimed.norm, claimed.epsilon)
    if claimed.name == f"paper-{paper}" and claimed.version == 1:
        return protocols.paper(paper, claimed.norm, claimed.epsilon, classes=classifier.num_classes)
    raise ValueError(
        f"expected the protocol honest-1, paper-{paper}-1 or single-1, got {claimed.key}; this library cannot judge by it."
    )


def verify(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    run: Run,
    checkpoints: dict[str, str],
    claimed: Sequence[Record],
    paper: str,
) -> Iterator[Verification]:
    """Check a finished run without any attack, block by block; the last item yielded is the result.

    Checked     weights, images and protocol are those that are named; perturbations are inside the budget and [0,1]; the
                classifier, asked again with the same noise, answers as the rows say; the records follow from the rows
    Shapes      images [N,C,H,W], labels [N]: those of the claim; checkpoints: file -> SHA-256 of today; paper: the
                protocol of the classifier's own paper
    Errors      those of `records_of` for a run that is not finished
    """
    state = Verification(len(run.rows))
    state.faults += _other_settings(images, labels, run, checkpoints)
    state.faults += _other_count(classifier, run)
    state.faults += _other_protocol(classifier, run, paper)
    state.faults += _contradicted(records_of(run), claimed)
    comparable = len(images) == len(run.rows)
    if comparable:
        state.faults += _outside(images, run) + _inconsistent(labels, run)
    if comparable and bool(run.deltas.isfinite().all()):
        for clean, hits in runs.rejudged(classifier, images, labels, run):
            rows = run.rows[state.images : state.images + len(hits)]
            state.faults += _other_answers(rows, clean, hits, run.settings["draws"])
            state.images += len(hits)
            yield state
    yield state


def _other_answers(rows: list[dict], clean: list, hits: list, draws: int) -> list[str]:
    """Images about which the classifier does not answer as their rows say."""
    faults = []
    for row, again, attacked in zip(rows, clean, hits, strict=True):
        pairs = (("clean", again, row["clean"]), ("perturbed", attacked, row["hits"]))
        for name, now, claimed in pairs:
            if now != claimed:
                faults.append(
                    f"image {row['index']}: {name}, {now} of {draws} draws are right, not {claimed}."
                )
    return faults


def _other_settings(
    images: Tensor, labels: Tensor, run: Run, checkpoints: dict[str, str]
) -> list[str]:
    """Settings that are not those of the weights and images at hand."""
    stored = run.settings["checkpoints"]
    faults = [
        f"weights {name}: the claim is about {stored.get(name, 'none')[:12]}, these are "
        f"{checkpoints.get(name, 'none')[:12]}."
        for name in sorted(stored | checkpoints)
        if stored.get(name) != checkpoints.get(name)
    ]
    if runs.fingerprint(images, labels) != run.settings["images"]:
        faults.append("the images or labels are not those of the claim.")
    return faults


def _other_count(classifier: Classifier, run: Run) -> list[str]:
    """Settings that count other images than there are rows, or other draws than the protocol asks for."""
    settings = run.settings
    draws = runs.draws_of(classifier, run.protocol)
    faults = []
    if settings["n"] != len(run.rows):
        faults.append(f"the claim is about {settings['n']} images, but has {len(run.rows)} rows.")
    if settings["draws"] != draws:
        faults.append(
            f"the claim is about {settings['draws']} draws, its protocol asks for {draws}."
        )
    return faults


def _other_protocol(classifier: Classifier, run: Run, paper: str) -> list[str]:
    """A protocol that is not what its name says in this library."""
    claimed = run.protocol
    try:
        named = named_protocol(classifier, paper, claimed)
    except ValueError as error:
        return [str(error)]
    ours = named.as_json()
    theirs = claimed.as_json()
    differing = sorted(name for name in ours if ours[name] != theirs[name])
    if differing:
        return [f"the protocol is not what {claimed.key} is here: {', '.join(differing)} differ."]
    return []


def _outside(images: Tensor, run: Run) -> list[str]:
    """Perturbations that no attack with this budget may return."""
    protocol = run.protocol
    there = (images.cpu() + run.deltas).flatten(1)
    reach = (there - 0.5).abs().amax(1).tolist()
    faults = [
        f"image {i}: the perturbation's {protocol.norm} size is {size:.6g}, more than the budget "
        f"{protocol.epsilon:.6g}."
        for i, size in enumerate(run.sizes)
        if not size <= protocol.epsilon + runs.SLACK
    ]
    return faults + [
        f"image {i}: the perturbed image leaves [0,1]."
        for i, far in enumerate(reach)
        if not far <= 0.5 + runs.SLACK
    ]


def _inconsistent(labels: Tensor, run: Run) -> list[str]:
    """Rows that name another label, or another attack than the strongest."""
    faults = []
    for row, label in zip(run.rows, labels.tolist(), strict=True):
        if row["label"] != label:
            faults.append(f"image {row['index']}: the label is {label}, not {row['label']}.")
        if not _names_strongest(row):
            faults.append(
                f"image {row['index']}: attack {row['strongest']!r} is not its strongest attack."
            )
    return faults


def _names_strongest(row: dict) -> bool:
    place = row["strongest"]
    if not isinstance(place, int) or not 0 <= place < len(row["attacks"]):
        return False
    strongest = row["attacks"][place]
    if strongest is None:
        return False
    return not any(
        (-entry[0], entry[1]) > (-strongest[0], strongest[1]) for entry in row["attacks"] if entry
    )


def _contradicted(now: list[Record], claimed: Sequence[Record]) -> list[str]:
    """Records that do not follow from the rows."""
    compared = [part.name for part in fields(Record) if part.name != "when"]
    known = {_key(record): record for record in now}
    faults = []
    for record in claimed:
        own = known.get(_key(record))
        wrong = [name for name in compared if own and getattr(own, name) != getattr(record, name)]
        if own is None or wrong:
            which = f": {wrong}" if wrong else ""
            faults.append(f"the record {record.what!r} does not follow from the rows{which}.")
    claims = {_key(record) for record in claimed}
    missing = [record for key, record in known.items() if key not in claims]
    return faults + [f"the record {record.what!r} is missing." for record in missing]


def _key(record: Record) -> tuple:
    return (
        record.metric,
        record.world,
        record.classifier,
        record.attack,
        record.part,
        record.statistic,
        record.detail,
    )
