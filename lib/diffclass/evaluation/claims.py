"""What a run under attack claims, as records with intervals."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from diffclass import attacks, intervals
from diffclass.evaluation.runs import Run
from diffclass.storage import files, results
from diffclass.storage.results import Record

SOURCE = "diffclass evaluate --attack"
FILE = "records.jsonl"
MEAN = "Korn-Graubard over images"
DIGITS = 6  # of a share that is no count


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
    return listed + _measured(run)


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


def _measured(run: Run) -> list[Record]:
    """What is known of the perturbations beside that they are within the budget, on average over the images."""
    threat = attacks.threat(run.protocol.norm)
    shares = threat.measures(run.deltas.double(), run.protocol.epsilon)
    listed = []
    for metric, values in shares.items():
        # another machine sums in another order
        rounded = [round(value, DIGITS) for value in values.tolist()]
        low, high = intervals.mean_interval(rounded, 1)
        listed.append(
            Record(
                metric=metric,
                value=math.fsum(rounded) / len(rounded),
                n=len(rounded),
                low=low,
                high=high,
                level=0.95,
                method=MEAN,
                attack=run.protocol.key,
                **_common(run),
            )
        )
    return listed


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
        checkpoint=results.one_checkpoint(settings["checkpoints"]),
        source=SOURCE,
    )


def _of_attacks(run: Run) -> Iterator[tuple[str, list[int]]]:
    """Each attack in words with the hits it left, by the draws of its selection, on the images that it was tried on."""
    first = 1
    for attack in run.protocol.attacks:
        places = range(first, first + len(attack.runs()))
        first = places.stop
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
