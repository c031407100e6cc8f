"""Robust accuracy under a protocol in three steps: attack, judge, store; anybody can verify what was stored.

Every number here is an upper bound: a better attack may find more. What a run keeps is one perturbation for each image,
the strongest of all attacks, and asking the classifier about it again is all that a check of the claim needs.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, groupby
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffclass import attacks, units
from diffclass.classifiers.base import BLOCK, Classifier, Noise, block_noise, decided, take
from diffclass.evaluation.protocols import AttackNoise, Protocol
from diffclass.noise import generator_of
from diffclass.storage import files

SCHEMA = 2  # of settings and rows
ROWS = "rows.jsonl"
SHARD_BYTES = 14_000_000  # of one file of perturbations
NEEDED = {
    "schema",
    "world",
    "classifier",
    "checkpoints",
    "protocol",
    "stream",
    "seed",
    "n",
    "draws",
    "images",
}
ROW = {"index", "label", "clean", "attacks", "strongest", "hits", "calls"}
MOST_DRAWS = 1000  # of a judgement; more would keep whoever verifies a claim busy for ever
SLACK = 1e-6  # of a budget, for rounding
# How the noise of a judgement is drawn: by a key for every draw and block of 64 images; or, as the first records were,
# one draw after the other from one key of the block, for as many images as it has.
STREAMS = ("blocks", "batches of 64")


@dataclass(frozen=True)
class Progress:
    """How far a run is: images finished of how many, and the attack that was last finished."""

    images: int
    total: int
    attack: str


@dataclass(frozen=True, eq=False)
class Run:
    """What a run has stored: settings, one row for each image in order of their index, perturbations [N,C,H,W].

    A perturbation is what the `attacks.Threat` of the protocol's norm does to an image: added pixels, or a flow [2,H,W].

    A row holds index; label; clean, the hits of `draws` on the clean image; attacks, for the clean image and then for
    every run of the protocol [hits, mean margin] with noise that only this selection saw, or None for an image that an
    earlier one had fooled at every draw; strongest, a place in that list (0: the clean image); hits of `draws` on the
    stored perturbation, with noise that no selection saw, None until all attacks are over; and calls, how often the
    classifier was asked about the image. `oddities` are sentences about files that no finished run leaves so
    """

    settings: dict
    rows: list[dict]
    deltas: Tensor
    oddities: tuple[str, ...] = ()

    @property
    def protocol(self) -> Protocol:
        """The protocol of the settings."""
        return Protocol.of_json(self.settings["protocol"])

    @property
    def sizes(self) -> list[float]:
        """How much of the budget each perturbation uses, in its unit. Errors: ValueError for an unknown norm."""
        return attacks.threat(self.protocol.norm).size(self.deltas).tolist()

    @property
    def finished(self) -> int:
        """How many images all attacks are over for."""
        return sum(row["hits"] is not None for row in self.rows)


# ---------------------------------------------------------------------------------------------------------------------
# Attack


def attack(
    classifier: Classifier,
    x: Tensor,
    y: Tensor,
    protocol: Protocol,
    number: int,
    seed: int,
    block: int,
    kept: Tensor,
) -> Tensor:
    """What one run of the protocol does to some images of a block: perturbations that can be stored.

    Shapes      x [B,C,H,W] in [0,1], y [B]; kept [B], their places in the block -> [B,C,H,W], or flows [B,2,H,W], on
                the CPU
    Errors      those of `attacks.pgd`
    """
    chosen = protocol.runs()[number]
    noise = AttackNoise(seed, number, block, kept)
    *_, last = chosen.frames(classifier, x, y, protocol.epsilon, protocol.norm, noise)
    return storable(attacks.threat(protocol.norm).done(x, last).float().cpu())


def storable(deltas: Tensor) -> Tensor:
    """The perturbations as 16 bits hold them: a little shorter, so that no rounding leads out of a budget or of [0,1].

    Why         rounding to 11 bits changes a number by at most 2^-11 of it, so a factor 1 - 2^-11 comes first; what is
                too small for 11 bits and would grow all the same becomes zero
    """
    kept = (deltas * (1 - 2.0**-11)).half().to(deltas)
    return torch.where(kept.abs() > deltas.abs(), 0, kept)


# ---------------------------------------------------------------------------------------------------------------------
# Judge


def judge(
    classifier: Classifier, x: Tensor, y: Tensor, noises: Iterable[Noise]
) -> tuple[Tensor, Tensor]:
    """How often each image is classified correctly, and the mean margin of the best wrong class.

    Shapes      x [B,C,H,W], y [B], a noise for every draw -> hits [B], margin [B]
    Errors      those of `decided`, for logits that are not finite, whose argmax would count as a class
    """
    hits = torch.zeros_like(y)
    margins = []
    for noise in noises:
        with torch.no_grad():
            logits = classifier(x, noise)
        hits = hits + (decided(logits) == y)
        margins.append(attacks.margin_loss(logits, y).double())
    return hits, torch.stack(margins).mean(0)


def judging_noises(
    classifier: Classifier, settings: dict, block: int, images: int, purpose: str
) -> Iterator[Noise]:
    """The noise of every draw of a judgement, for the images of a block; no attack ever saw it.

    Randomness  (seed, purpose, draw, block), as the stream of the settings says
    """
    seed = settings["seed"]
    if settings["stream"] == STREAMS[0]:
        for draw in range(settings["draws"]):
            noise = block_noise(classifier, block, seed, "judge", purpose, draw)
            yield take(noise, slice(0, images))
    else:
        generator = generator_of(seed, BLOCK * block, purpose)
        for _ in range(settings["draws"]):
            yield classifier.sample_noise(images, generator)


def draws_of(classifier: Classifier, protocol: Protocol) -> int:
    """How often the classifier is asked about an image: once if it has no noise to draw."""
    return 1 if classifier.deterministic else protocol.draws


def calls_of(row: dict, protocol: Protocol, draws: int) -> int:
    """How often the classifier was asked about the image of a finished row: by judgements, and by the attacks it stood."""
    tried = [
        chosen
        for chosen, entry in zip(protocol.runs(), row["attacks"][1:], strict=True)
        if entry is not None
    ]
    return 3 * draws + sum(chosen.calls + draws for chosen in tried)


# ---------------------------------------------------------------------------------------------------------------------
# Store


def store(folder: Path, run: Run, first: int, last: int) -> None:
    """Write perturbations and rows, after images `first` to `last` have changed; each file is whole or absent.

    Perturbations first: rows never speak of one that is not there.
    """
    shard = per_file(run.deltas)
    known = len(run.rows)
    for number in range(first // shard, (last - 1) // shard + 1):
        path = folder / f"deltas-{number}.safetensors"
        own = run.deltas[number * shard : min((number + 1) * shard, known)]
        files.write_tensors(path, {"deltas": own.half().contiguous()})
    lines = [json.dumps(row, allow_nan=False) + "\n" for row in run.rows]
    files.write(folder / ROWS, "".join(lines))


def per_file(deltas: Tensor) -> int:
    """How many images' perturbations go into a file."""
    return max(1, SHARD_BYTES // (2 * deltas[0].numel()))


def read(folder: str | Path) -> Run:
    """What a run has stored so far.

    Errors      FileNotFoundError for a folder without a run; ValueError for a file that is damaged, or of another schema
    """
    with files.reading(f"the results of an attack in {folder}"):
        return _read(Path(folder))


def _read(folder: Path) -> Run:
    missing = [
        name
        for name in (files.SETTINGS, ROWS, "deltas-0.safetensors")
        if not (folder / name).exists()
    ]
    if missing:
        raise FileNotFoundError(
            f"expected the results of an attack in {folder}, got no {missing[0]}; "
            "`diffclass evaluate --attack honest --store FOLDER` writes them."
        )
    settings = checked_settings(files.settings_of(folder), folder)
    rows = [
        _row(line, number, folder)
        for number, line in enumerate((folder / ROWS).read_text().splitlines())
    ]
    deltas, oddities = _deltas(folder)
    if len(deltas) < len(rows):
        raise ValueError(
            f"expected a perturbation for each of {len(rows)} rows in {folder}, got {len(deltas)}; a file "
            "deltas-*.safetensors is missing."
        )
    if len(deltas) > len(rows):
        oddities.append(
            f"there are {len(deltas)} perturbations and {len(rows)} rows; each row has one."
        )
    return checked_rows(Run(settings, rows, deltas[: len(rows)], tuple(oddities)), folder)


def checked_rows(run: Run, folder: Path) -> Run:
    """Return a run whose finished rows have an entry for the clean image and every attack, else raise a ValueError."""
    wanted = 1 + len(run.protocol.runs())
    for row in run.rows:
        if row["hits"] is not None and len(row["attacks"]) != wanted:
            raise ValueError(
                f"expected {wanted} entries of attacks in the row of image {row['index']} of {folder / ROWS}, got "
                f"{len(row['attacks'])}; the file was changed by something else."
            )
    return run


def checked_settings(settings: dict, folder: Path) -> dict:
    """Return settings that are those of an attack, else raise a ValueError."""
    where = folder / files.SETTINGS
    if settings.get("schema") != SCHEMA:
        raise ValueError(
            f"expected {where} of schema {SCHEMA}, got {settings.get('schema', 'one without a schema')!r}; it was written "
            "by another version, or is not that of an attack."
        )
    lacking = sorted(NEEDED - set(settings))
    if lacking:
        raise ValueError(f"expected {where} to be that of an attack, got one without {lacking}.")
    if settings["stream"] not in STREAMS:
        raise ValueError(
            f"expected a stream of noise of {STREAMS} in {where}, got {settings['stream']!r}."
        )
    for name, (kind, possible) in KINDS.items():
        value = settings[name]
        if type(value) is not kind or not possible(value):
            raise ValueError(
                f"expected {name} in {where} to be one that a run of this library has, got {str(value)[:80]!r}; the file was "
                "changed by something else."
            )
    Protocol.of_json(settings["protocol"])
    return settings


# What the settings of a run are, by type and by value.
KINDS = {
    "world": (str, bool),
    "classifier": (str, bool),
    "checkpoints": (dict, lambda value: all(type(name) is str for name in value.values())),
    "protocol": (dict, bool),
    "seed": (int, lambda value: 0 <= value < 2**32),
    "n": (int, lambda value: value >= 1),
    "draws": (int, lambda value: 1 <= value <= MOST_DRAWS),
    "images": (str, lambda value: re.fullmatch("[0-9a-f]{64}", value)),
}


def _row(line: str, number: int, folder: Path) -> dict:
    try:
        row = json.loads(line)
        known = isinstance(row, dict) and ROW <= set(row) and _is_of(row, number)
    except ValueError:
        known = False
    if not known:
        raise ValueError(
            f"line {number + 1} of {folder / ROWS} is not the row of image {number}; the file was "
            "changed by something else: restore it, or attack again in another folder."
        )
    return row


def _is_of(row: dict, number: int) -> bool:
    """Whether a row is about the image of that number, and its values are of the types that a run writes."""
    counts = all(type(row[name]) is int for name in ("index", "label", "clean", "calls"))
    judged = row["hits"] is None or type(row["hits"]) is int
    tried = isinstance(row["attacks"], list) and all(map(_is_entry, row["attacks"]))
    return counts and judged and tried and row["index"] == number


def _is_entry(entry) -> bool:
    """Whether this is what one attack left of an image, [hits, margin], or None where it was not tried."""
    if entry is None:
        return True
    if not isinstance(entry, list) or len(entry) != 2:
        return False
    hits, margin = entry
    return type(hits) is int and type(margin) in (int, float) and math.isfinite(margin)


def _deltas(folder: Path) -> tuple[Tensor, list[str]]:
    """The perturbations of all files in order, and what is odd about the files."""
    paths = list(folder.glob("deltas-*.safetensors"))
    numbered = {path: re.fullmatch(r"deltas-(\d+)", path.stem) for path in paths}
    unknown = sorted(path.name for path in paths if numbered[path] is None)
    if unknown:
        raise ValueError(
            f"expected files deltas-NUMBER.safetensors in {folder}, got {unknown[0]}; the folder was changed by something "
            "else."
        )
    paths.sort(key=lambda path: int(numbered[path].group(1)))
    try:
        parts = [load_file(path)["deltas"] for path in paths]
        whole = torch.cat(parts)
    except (SafetensorError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"expected perturbations in {folder}/deltas-*.safetensors, got a file without ({error}); it "
            "was probably cut short."
        ) from None
    if whole.ndim != 4:
        raise ValueError(
            f"expected perturbations of shape [N,C,H,W] in {folder}/deltas-*.safetensors, got {list(whole.shape)}."
        )
    oddities = [
        f"{path.name} holds numbers of type {str(part.dtype).removeprefix('torch.')}; what is stored, and judged, is float16, "
        "and float32 in older runs."
        for path, part in zip(paths, parts, strict=True)
        if part.dtype not in (torch.float16, torch.float32)
    ]
    wanted = [f"deltas-{number}.safetensors" for number in range(len(paths))]
    if [path.name for path in paths] != wanted:
        oddities.append(
            f"the files of perturbations are {[path.name for path in paths]}, not {wanted}."
        )
    return whole.float(), oddities


# ---------------------------------------------------------------------------------------------------------------------
# The walk over all images


def fingerprint(images: Tensor, labels: Tensor) -> str:
    """The SHA-256 of labelled images, in order."""
    content = b"".join(part.cpu().contiguous().numpy().tobytes() for part in (images, labels))
    return hashlib.sha256(content).hexdigest()


def settings_of(
    classifier: Classifier, images: Tensor, labels: Tensor, protocol: Protocol, own: dict, seed: int
) -> dict:
    """All that a run depends on, as JSON values: `own` is the caller's (world, classifier, checkpoints, version)."""
    settings = {
        **own,
        "schema": SCHEMA,
        "protocol": protocol.as_json(),
        "stream": STREAMS[0],
        "seed": seed,
        "n": len(images),
        "draws": draws_of(classifier, protocol),
        "images": fingerprint(images, labels),
    }
    return json.loads(json.dumps(settings, allow_nan=False))


def run(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    protocol: Protocol,
    folder: str | Path,
    own: dict,
    *,
    seed: int = 0,
) -> Iterator[Progress]:
    """Attack all images, block by block and attack by attack, keeping what is done after each.

    Shapes      images [N,C,H,W] in [0,1], labels [N]; an image's index is its place in `images`
    Randomness  all of it from `seed` by keys: an interrupted run ends as an unbroken one; one that goes on with more images
                keeps what it found, and draws the random starts of the new ones as for a run of their own
    Writes      folder/settings.json, rows.jsonl and deltas-0.safetensors, each in one piece
    Errors      ValueError for images, labels or a budget that cannot be meant, or a folder of other settings;
                RuntimeError if another run writes to it; those of `attacks.pgd`, after which what is done is kept
    """
    classifier.checked(images)
    units.check_labels(labels, len(images), classifier.num_classes)
    threat = attacks.threat(protocol.norm)
    threat.check(protocol.epsilon, classifier.image_shape)
    folder = Path(folder)
    with files.locked(folder):
        settings = settings_of(classifier, images, labels, protocol, own, seed)
        settle(folder, settings, images, labels, "perturbations")
        before = read(folder).rows if (folder / ROWS).exists() else []
        deltas = torch.zeros(len(images), *threat.shape(classifier.image_shape))
        if before:
            deltas[: len(before)] = read(folder).deltas
        whole = Run(settings, before, deltas)
        for block in range(-(-len(images) // BLOCK)):
            for part in _abreast(before, block, len(images)):
                yield from _Block(classifier, images, labels, whole, block, part).attacked(folder)


def settle(folder: Path, settings: dict, images: Tensor, labels: Tensor, what: str) -> None:
    """`files.settle` for labelled images, which may have become more since: then the first ones are those that it knows.

    Why         what is kept of an image is about it alone, and a number of images that was affordable is soon too small
    Errors      those of `files.settle`
    """
    if (folder / files.SETTINGS).exists():
        there = files.settings_of(folder)
        fewer = there.get("n")
        if type(fewer) is int and 0 < fewer < len(images):
            known = {"n": fewer, "images": fingerprint(images[:fewer], labels[:fewer])}
            if there == {**settings, **known}:
                files.write(folder / files.SETTINGS, files.settings_text(settings))
    files.settle(folder, settings, what)


def _abreast(rows: list[dict], block: int, total: int) -> Iterator[range]:
    """The images of a block in parts that are equally far: finished ones, interrupted ones, those not yet begun."""
    start = block * BLOCK
    stop = min(start + BLOCK, total)
    for _, part in groupby(
        rows[start:stop], lambda row: (len(row["attacks"]), row["hits"] is None)
    ):
        end = start + len(list(part))
        yield range(start, end)
        start = end
    if start < stop:
        yield range(start, stop)


class _Block:
    """Up to 64 images of a run, a block or a part of one: their pixels, and views of their rows and perturbations."""

    def __init__(
        self,
        classifier: Classifier,
        images: Tensor,
        labels: Tensor,
        run: Run,
        number: int,
        part: range | None = None,
    ):
        self.classifier = classifier
        self.run = run
        self.threat = attacks.threat(run.protocol.norm)
        self.number = number
        first = number * BLOCK
        part = part or range(first, min(first + BLOCK, len(images)))
        self.part = slice(part.start, part.stop)
        self.before = part.start - first  # images of the block that are not of this part
        where = next(chain(classifier.parameters(), classifier.buffers()), images).device
        self.x = images[self.part].to(where)
        self.y = labels[self.part].to(where)
        self.rows = run.rows[self.part]
        self.deltas = run.deltas[self.part]

    def judged(self, purpose: str, deltas: Tensor, kept: Tensor | None = None) -> tuple[list, list]:
        """Hits and margins of perturbed images, by noise of that purpose; `kept` are their places in the part."""
        kept = torch.arange(len(self.x)) if kept is None else kept
        until = self.before + len(self.x)
        drawn = judging_noises(self.classifier, self.run.settings, self.number, until, purpose)
        own = kept + self.before
        x = self.threat.applied(self.x[kept], deltas)
        hits, margins = judge(
            self.classifier, x, self.y[kept], (take(noise, own) for noise in drawn)
        )
        return hits.tolist(), margins.tolist()

    def begin(self) -> None:
        """The rows of clean images: their hits to be shown, and hits with other noise, from which attacks start."""
        nothing = torch.zeros_like(self.deltas)
        clean, _ = self.judged("clean", nothing)
        hits, margins = self.judged("selection 0", nothing)
        draws = self.run.settings["draws"]
        self.rows = [
            dict(
                index=self.part.start + i,
                label=int(label),
                clean=clean[i],
                attacks=[[hits[i], margins[i]]],
                strongest=0,
                hits=None,
                calls=2 * draws,
            )
            for i, label in enumerate(self.y)
        ]
        self.run.rows.extend(self.rows)

    def keep(self, place: int, kept: Tensor, deltas: Tensor, calls: int) -> None:
        """Judge what an attack returned, as it is stored; let it stand where it is stronger than what stood."""
        hits, margins = self.judged(f"selection {place}", deltas, kept)
        for i, hit, margin, delta in zip(kept.tolist(), hits, margins, deltas, strict=True):
            row = self.rows[i]
            row["attacks"][place] = [hit, margin]
            row["calls"] += calls + self.run.settings["draws"]
            stood = row["attacks"][row["strongest"]]
            if (-hit, margin) > (-stood[0], stood[1]):
                row["strongest"] = place
                self.deltas[i] = delta

    def store(self, folder: Path | None) -> None:
        """Write what is new of the block."""
        if folder is not None:
            store(folder, self.run, self.part.start, self.part.stop)

    def attacked(self, folder: Path | None) -> Iterator[Progress]:
        """Every attack that the block still lacks, on the images that are not yet fooled at every draw.

        Writes      into `folder`, unless it is None
        """
        settings = self.run.settings
        protocol = self.run.protocol
        if not self.rows:
            self.begin()
        for number, chosen in enumerate(protocol.runs()):
            place = number + 1
            if place < len(self.rows[0]["attacks"]):
                continue
            standing = [row["attacks"][row["strongest"]][0] > 0 for row in self.rows]
            kept = torch.tensor(standing).nonzero().flatten()
            for row in self.rows:
                row["attacks"].append(None)
            if len(kept):
                deltas = attack(
                    self.classifier,
                    self.x[kept],
                    self.y[kept],
                    protocol,
                    number,
                    settings["seed"],
                    self.number,
                    kept + self.before,
                )
                self.keep(place, kept, deltas, chosen.calls)
            self.store(folder)
            yield Progress(self.part.start, settings["n"], str(chosen))
        if self.rows[0]["hits"] is None:
            hits, _ = self.judged("evaluation", self.deltas)
            for row, hit in zip(self.rows, hits, strict=True):
                row["hits"] = hit
                row["calls"] += settings["draws"]
            self.store(folder)
        yield Progress(self.part.stop, settings["n"], "all attacks")


# ---------------------------------------------------------------------------------------------------------------------
# Asked again


def rejudged(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    run: Run,
    purposes: tuple[str, str] = ("clean", "evaluation"),
) -> Iterator[tuple[list, list]]:
    """Ask again, block by block, with the noise of the claim: the hits on clean and on perturbed images.

    Shapes      images [N,C,H,W], labels [N] -> yields (clean, perturbed), a list of hits each
    Randomness  that of the run's settings, by the names of the two purposes
    """
    for number in range(-(-len(run.rows) // BLOCK)):
        block = _Block(classifier, images, labels, run, number)
        clean, _ = block.judged(purposes[0], torch.zeros_like(block.deltas))
        hits, _ = block.judged(purposes[1], block.deltas)
        yield clean, hits


def judged_afresh(
    classifier: Classifier, images: Tensor, labels: Tensor, run: Run, seed: int
) -> Iterator[tuple[list, list]]:
    """Ask about clean and perturbed images with noise that no claim has ever drawn, whatever its seed. Shapes: as `rejudged`."""
    own = {**run.settings, "stream": STREAMS[0], "seed": seed}
    return rejudged(
        classifier, images, labels, replace(run, settings=own), ("verify clean", "verify perturbed")
    )


def reselected(
    classifier: Classifier, images: Tensor, labels: Tensor, run: Run
) -> Iterator[list[tuple[list, list]]]:
    """Ask again, block by block, what the selections were told of the clean image and of the stored perturbation.

    Shapes      images [N,C,H,W], labels [N], rows that name a strongest attack of their list -> yields for each image two
                entries [hits, margin], as rows have them
    """
    for number in range(-(-len(run.rows) // BLOCK)):
        block = _Block(classifier, images, labels, run, number)
        hits, margins = block.judged("selection 0", torch.zeros_like(block.deltas))
        first = [[hit, margin] for hit, margin in zip(hits, margins, strict=True)]
        last = list(first)
        for place in sorted({row["strongest"] for row in block.rows} - {0}):
            kept = torch.tensor(
                [i for i, row in enumerate(block.rows) if row["strongest"] == place]
            )
            hits, margins = block.judged(f"selection {place}", block.deltas[kept], kept)
            for i, hit, margin in zip(kept.tolist(), hits, margins, strict=True):
                last[i] = [hit, margin]
        yield list(zip(first, last, strict=True))


def attacked_afresh(
    classifier: Classifier, images: Tensor, labels: Tensor, protocol: Protocol, seed: int
) -> Iterator[Run]:
    """Attack images by a protocol and judge them, keeping nothing: the run so far after every attack, at last the whole.

    Shapes      images [N,C,H,W] in [0,1], labels [N]
    Randomness  all of it from `seed` by keys
    Errors      those of `attacks.pgd`
    """
    settings = settings_of(classifier, images, labels, protocol, {}, seed)
    shape = attacks.threat(protocol.norm).shape(classifier.image_shape)
    whole = Run(settings, [], torch.zeros(len(images), *shape))
    for number in range(-(-len(images) // BLOCK)):
        for _ in _Block(classifier, images, labels, whole, number).attacked(None):
            yield whole
