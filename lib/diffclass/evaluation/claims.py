"""What a run under attack claims, as records with intervals; and whether its stored perturbations bear it out."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor, nn

from diffclass import intervals
from diffclass.evaluation import robustness
from diffclass.evaluation.robustness import Found
from diffclass.intervals import mean_interval
from diffclass.storage import files, results

SOURCE = "diffclass evaluate --attack"


FILE = "records.jsonl"


MEAN = "Korn-Graubard over images"


def _checkpoint(files: dict[str, str]) -> str | None:
    """One name for all weights of a defence: that of the file, or of the names of several in order."""
    digests = [files[name] for name in sorted(files)]
    return (
        (digests or [None])[0]
        if len(digests) < 2
        else hashlib.sha256("".join(digests).encode()).hexdigest()
    )


def records(found: Found) -> list[results.Record]:
    """All numbers of a finished run: clean and under attack, average and worst of the draws, and each attack's.

    Errors      ValueError if images are left to be attacked
    """
    rows = found.rows
    settings = found.settings
    protocol = found.protocol
    if found.finished < settings["n"]:
        raise ValueError(
            f"expected a finished run, got {found.finished} of {settings['n']} images; the same command "
            "goes on."
        )
    draws = settings["draws"]
    cost = sum(row["calls"] for row in rows) / len(rows)
    subject = f"{protocol.defence} on {len(rows)} images of {settings['world']}"
    under = f"accuracy of {subject} under the {protocol.name} protocol, {protocol.norm} {protocol.epsilon:.4g}"
    bound = "upper bound of the robust"
    found_by = [
        (f"clean accuracy of {subject}", [row["clean"] for row in rows]),
        (f"{bound} {under}", [row["hits"] for row in rows]),
    ]
    made = []
    for what, hits in found_by:
        made.append((what if draws == 1 else f"{what}, average of {draws} draws", hits, draws))
        if draws > 1:
            made.append((f"{what}, worst of {draws} draws", [int(hit == draws) for hit in hits], 1))
    made += [(f"{bound} {under}: only {name}", hits, draws) for name, hits in _of_attacks(found)]
    own = {**settings, "classifier calls per image": round(cost, 1)}
    return [
        _record(what, hits, count, own, _checkpoint(settings["checkpoints"]))
        for what, hits, count in made
    ]


def keep(folder: Path, made: Sequence[results.Record]) -> None:
    """Put the records of a run into its folder, in place of earlier ones."""
    files.write(
        folder / FILE, "".join(json.dumps(asdict(record), sort_keys=True) + "\n" for record in made)
    )


def kept(folder: Path) -> list[results.Record]:
    """The records in the folder of a run. Errors: those of `results.read`."""
    return results.read(folder / FILE)


def _of_attacks(found: Found) -> Iterator[tuple[str, list[int]]]:
    """Each attack with the hits it left, by the draws of its selection, on the images that it was tried on."""
    for attack in found.protocol.attacks:
        names = [
            name
            for name, _ in found.protocol.runs()
            if name == str(attack) or name.startswith(f"{attack}, run ")
        ]
        hits = [
            min(row["attacks"][name][0] for name in names if row["attacks"][name])
            for row in found.rows
            if row["attacks"][names[0]]
        ]
        restarts = f", {attack.restarts} restarts" if attack.restarts > 1 else ""
        left = (
            ""
            if len(hits) == len(found.rows)
            else f", on the {len(hits)} not yet fooled at every draw"
        )
        if hits:
            yield f"{attack}{restarts}{left}", hits


def _record(
    what: str, hits: list[int], draws: int, settings: dict, checkpoint: str | None
) -> results.Record:
    if draws == 1:
        return results.accuracy_record(
            sum(hits),
            len(hits),
            what,
            intervals.interval(sum(hits), len(hits)),
            settings=settings,
            seed=settings["seed"],
            source=SOURCE,
            checkpoint=checkpoint,
        )
    low, high = mean_interval([hit / draws for hit in hits], draws)
    return results.Record(
        what,
        sum(hits) / draws / len(hits),
        len(hits),
        low,
        high,
        0.95,
        settings,
        settings["seed"],
        checkpoint,
        SOURCE,
        method=MEAN,
    )


@dataclass
class Verification:
    """What a check of stored perturbations has seen so far; the claim stands if `faults` stays empty.

    faults      sentences, in the order of the images
    images      how many of `total` have been asked about again
    """

    total: int
    images: int = 0
    faults: list[str] = field(default_factory=list)


def verify(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    found: Found,
    checkpoints: dict[str, str],
    claimed: Sequence[results.Record],
) -> Iterator[Verification]:
    """Check a finished run without any attack, batch by batch; the last item yielded is the result.

    Checked     weights, images and protocol are the claimed ones; perturbations are inside the budget and [0,1]; the
                classifier, asked again with the same noise, answers as the rows say; the records follow from the rows
    Shapes      images [N,C,H,W], labels [N]: those of the claim, found anew; checkpoints: file -> SHA-256 of today
    Errors      those of `records` for a run that is not finished
    """
    state = Verification(len(found.rows))
    state.faults += _foreign(images, labels, found, checkpoints) + _contradicted(
        records(found), claimed
    )
    if len(images) == len(found.rows):
        state.faults += _outside(images, found) + _inconsistent(labels, found)
    if len(images) == len(found.rows) and bool(
        found.deltas.isfinite().all()
    ):  # else nobody can be asked about them
        for clean, hits in robustness.rescored(classifier, images, labels, found):
            rows = found.rows[state.images : state.images + len(hits)]
            for row, again, attacked in zip(rows, clean, hits, strict=True):
                for name, now, said in (
                    ("clean", again, row["clean"]),
                    ("perturbed", attacked, row["hits"]),
                ):
                    if now != said:
                        state.faults.append(
                            f"image {row['index']}: {name}, {now} of {found.settings['draws']} draws "
                            f"are right, not {said}."
                        )
            state.images += len(hits)
            yield state
    yield state


def _foreign(
    images: Tensor, labels: Tensor, found: Found, checkpoints: dict[str, str]
) -> list[str]:
    """Settings that are not those of the weights, images and protocol at hand."""
    stored = found.settings
    faults = [
        f"weights {name}: the claim is about {stored['checkpoints'].get(name, 'none')[:12]}, these are "
        f"{checkpoints.get(name, 'none')[:12]}."
        for name in sorted(stored["checkpoints"] | checkpoints)
        if stored["checkpoints"].get(name) != checkpoints.get(name)
    ]
    if robustness.fingerprint(images, labels) != stored["images"]:
        faults.append("the images or labels are not those of the claim.")
    if repr(found.protocol) != stored["chosen"]:
        faults.append(f"the protocol was changed: {found.protocol!r} is not {stored['chosen']}.")
    return faults


def _outside(images: Tensor, found: Found) -> list[str]:
    """Perturbations that no attack with this budget may return."""
    protocol = found.protocol
    there = (images.cpu() + found.deltas).flatten(1)
    reach = (there - 0.5).abs().amax(1).tolist()
    faults = [
        f"image {i}: the perturbation's {protocol.norm} size is {size:.6g}, more than the budget "
        f"{protocol.epsilon:.6g}."
        for i, size in enumerate(found.sizes)
        if not size <= protocol.epsilon + robustness.SLACK
    ]
    return faults + [
        f"image {i}: the perturbed image leaves [0,1]."
        for i, far in enumerate(reach)
        if not far <= 0.5 + robustness.SLACK
    ]


def _inconsistent(labels: Tensor, found: Found) -> list[str]:
    """Rows that name another label, or another attack than the strongest."""
    faults = []
    for row, label in zip(found.rows, labels.tolist(), strict=True):
        done = {name: entry for name, entry in row["attacks"].items() if entry}
        strongest = done.get(row["strongest"])
        if row["label"] != label:
            faults.append(f"image {row['index']}: the label is {label}, not {row['label']}.")
        if strongest is None or any(
            (-hits, margin) > (-strongest[0], strongest[1]) for hits, margin in done.values()
        ):
            faults.append(
                f"image {row['index']}: {row['strongest']!r} is not its strongest attack."
            )
    return faults


def _contradicted(now: list[results.Record], claimed: Sequence[results.Record]) -> list[str]:
    """Records that do not follow from the rows."""
    fields = ("value", "n", "low", "high", "level", "settings", "seed", "checkpoint", "method")
    known = {record.what: record for record in now}
    faults = []
    for record in claimed:
        own = known.get(record.what)
        wrong = [name for name in fields if own and getattr(own, name) != getattr(record, name)]
        if own is None or wrong:
            faults.append(
                f"the record {record.what!r} does not follow from the rows{f': {wrong}' * bool(wrong)}."
            )
    missing = [what for what in known if what not in {record.what for record in claimed}]
    return faults + [f"the record {what!r} is missing." for what in missing]
