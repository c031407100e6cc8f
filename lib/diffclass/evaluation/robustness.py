"""Robust accuracy under a protocol: perturbations are found, judged anew, stored, and can be verified by anybody.

Every number here is an upper bound: a better attack may find more. What an attack found is one perturbation for each
image, the strongest of all attacks, and asking the classifier about it again is all that a check of the claim needs.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffclass import attacks, units
from diffclass.evaluation.protocols import Attack, Protocol
from diffclass.storage import files

ROWS = "rows.jsonl"


# Perturbations are float32, not the 256 levels of a picture file: the attacked classifier reads floats, and rounding
# would change the attack. In float32 the judged image is rebuilt bit by bit; 512 images of 3x32x32 take 6 MB.
SHARD_BYTES = 14_000_000  # of one file of them


NEEDED = {
    "world",
    "checkpoints",
    "protocol",
    "chosen",
    "seed",
    "batch",
    "n",
    "draws",
    "images",
}  # of the settings


SLACK = 1e-6  # of a budget, for rounding


@dataclass(frozen=True)
class Progress:
    """How far a run is: images finished of how many, and the attack that was last finished."""

    images: int
    total: int
    attack: str


@dataclass(frozen=True, eq=False)
class Found:
    """What a run has stored: settings, one row for each image in order of their index, perturbations [N,C,H,W].

    A row holds index; label; clean, the hits of `draws` on the clean image; attacks, a name -> [hits, mean margin] with
    noise that only this selection saw, or None for an image that an earlier one had fooled at every draw; strongest, a
    name ("none": the clean image); hits of `draws` on the stored perturbation, with noise that no selection saw, None
    until all attacks are over; and calls, how often the classifier was asked about the image
    """

    settings: dict
    rows: list[dict]
    deltas: Tensor

    @property
    def protocol(self) -> Protocol:
        """The protocol of the settings."""
        content = self.settings["protocol"]
        return Protocol(
            **{**content, "attacks": tuple(Attack(**attack) for attack in content["attacks"])}
        )

    @property
    def sizes(self) -> list[float]:
        """The norm of each perturbation, in pixels."""
        return attacks.size_of(self.deltas, self.protocol.norm).tolist()

    @property
    def finished(self) -> int:
        """How many images all attacks are over for."""
        return sum(row["hits"] is not None for row in self.rows)


def perturbed(x: Tensor, delta: Tensor) -> Tensor:
    """The image that is judged, today and by whoever verifies it. Shapes: [B,C,H,W] twice -> [B,C,H,W] in [0,1]."""
    return (x + delta.to(x)).clamp(0, 1)


def generator(seed: int, *purpose) -> torch.Generator:
    """Noise of its own for every purpose, whatever was drawn before: a resumed run draws what an unbroken one does."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def judged(
    classifier: nn.Module, x: Tensor, y: Tensor, draws: int, noise: torch.Generator
) -> tuple[Tensor, Tensor]:
    """How often of `draws` each image is classified correctly, and the mean margin of the best wrong class.

    Shapes      x [B,C,H,W], y [B] -> hits [B], margin [B]; a classifier without noise is asked as often, in vain
    Errors      FloatingPointError for logits that are NaN, whose argmax would count as a class
    """
    judge = (
        classifier.with_fresh_noise(noise)
        if hasattr(classifier, "with_fresh_noise")
        else classifier
    )
    hits = torch.zeros_like(y)
    margin = torch.zeros(len(y), dtype=torch.float64, device=y.device)
    for _ in range(draws):
        with torch.no_grad():
            logits = judge(x)
        if bool(torch.isnan(logits).any()):
            raise FloatingPointError(
                "the classifier's logits became NaN and cannot be judged; infinity minus infinity "
                "or 0/0 in it is the likely cause."
            )
        hits = hits + (logits.argmax(1) == y)
        margin = margin + attacks.margin_loss(logits, y).double() / draws
    return hits, margin


def draws_of(classifier: nn.Module, protocol: Protocol) -> int:
    """How often the classifier is asked about an image: once if it has no noise to draw."""
    return protocol.draws if hasattr(classifier, "with_fresh_noise") else 1


def fingerprint(images: Tensor, labels: Tensor) -> str:
    """The SHA-256 of labelled images, in order."""
    content = b"".join(part.cpu().contiguous().numpy().tobytes() for part in (images, labels))
    return hashlib.sha256(content).hexdigest()


def settings_of(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    protocol: Protocol,
    own: dict,
    *,
    seed: int,
    batch: int,
) -> dict:
    """All that a run depends on, as JSON values: `own` is the caller's (world, defence, checkpoints, version)."""
    return json.loads(
        json.dumps(
            {
                **own,
                "protocol": asdict(protocol),
                "chosen": repr(protocol),
                "seed": seed,
                "batch": batch,
                "n": len(images),
                "draws": draws_of(classifier, protocol),
                "images": fingerprint(images, labels),
            },
            allow_nan=False,
        )
    )


def run(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    protocol: Protocol,
    folder: str | Path,
    own: dict,
    *,
    seed: int = 0,
    batch: int = 64,
) -> Iterator[Progress]:
    """Attack all images, batch by batch and attack by attack, keeping what is done after each.

    Shapes      images [N,C,H,W] in [0,1], labels [N]; an image's index is its place in `images`
    Randomness  all of it from `seed`, the batch and the attack: an interrupted run ends as an unbroken one
    Writes      folder/settings.json, rows.jsonl and deltas-0.safetensors, each in one piece
    Errors      ValueError for images, labels or a budget that cannot be meant, or a folder of other settings;
                RuntimeError if another run writes to it; those of `attacks.pgd`, after which what is done is kept
    """
    units.check_images(images, classifier.image_shape)
    units.check_labels(labels, len(images), classifier.num_classes)
    units.check_budget(protocol.epsilon, protocol.norm, images[0].numel())
    if batch < 1:
        raise ValueError(f"expected at least one image at once, got {batch}.")
    folder = Path(folder)
    with files.locked(folder):
        chosen = settings_of(classifier, images, labels, protocol, own, seed=seed, batch=batch)
        files.settle(folder, chosen, "perturbations found")
        found = (
            read(folder)
            if (folder / ROWS).exists()
            else Found(chosen, [], torch.zeros(0, *classifier.image_shape))
        )
        deltas = torch.zeros(images.shape)
        deltas[: len(found.deltas)] = found.deltas
        found = Found(chosen, found.rows, deltas)
        for start in range(0, len(images), batch):
            yield from _attacked(_Batch(classifier, images, labels, found, folder, start))


class _Batch:
    """Some images of a run: their pixels, and views of their rows and perturbations."""

    def __init__(
        self,
        classifier: nn.Module,
        images: Tensor,
        labels: Tensor,
        found: Found,
        folder: Path,
        start: int,
    ):
        self.classifier = classifier
        self.found = found
        self.folder = folder
        self.start = start
        self.part = slice(start, min(start + found.settings["batch"], len(images)))
        where = next(chain(classifier.parameters(), classifier.buffers()), images).device
        self.x = images[self.part].to(where)
        self.y = labels[self.part].to(where)
        self.rows = found.rows[self.part]
        self.deltas = found.deltas[self.part]

    def noise(self, *purpose) -> torch.Generator:
        """Noise of its own for every purpose."""
        return generator(self.found.settings["seed"], self.start, *purpose)

    def judge(
        self, purpose: str, kept=slice(None), deltas: Tensor | None = None
    ) -> tuple[list, list]:
        """Hits and margins of the perturbed images `kept`, by noise of that purpose."""
        deltas = self.deltas[kept] if deltas is None else deltas
        hits, margin = judged(
            self.classifier,
            perturbed(self.x[kept], deltas),
            self.y[kept],
            self.found.settings["draws"],
            self.noise(purpose),
        )
        return hits.tolist(), margin.tolist()

    def begin(self) -> None:
        """The rows of clean images: their hits to be shown, and hits with other noise, from which attacks start."""
        (clean, _) = self.judge("clean")
        (hits, margin) = self.judge("selection, none")
        self.rows = [
            dict(
                index=self.start + i,
                label=int(y),
                clean=clean[i],
                attacks={"none": [hits[i], margin[i]]},
                strongest="none",
                hits=None,
                calls=2 * self.found.settings["draws"],
            )
            for i, y in enumerate(self.y)
        ]
        self.found.rows.extend(self.rows)

    def keep(self, name: str, indices: list[int], deltas: Tensor, calls: int) -> None:
        """Judge what an attack returned, as it will be stored; let it stand where it is stronger than what stood."""
        deltas = storable(deltas)
        hits, margin = self.judge(f"selection, {name}", indices, deltas)
        for place, i in enumerate(indices):
            row = self.rows[i]
            row["attacks"][name] = [hits[place], margin[place]]
            row["calls"] += calls + self.found.settings["draws"]
            before = row["attacks"][row["strongest"]]
            if (-hits[place], margin[place]) > (-before[0], before[1]):
                row["strongest"] = name
                self.deltas[i] = deltas[place]

    def write(self) -> None:
        """Perturbations first: rows never speak of one that is not there."""
        shard = per_file(self.found.deltas)
        known = len(self.found.rows)
        for number in range(self.part.start // shard, (self.part.stop - 1) // shard + 1):
            path = self.folder / f"deltas-{number}.safetensors"
            own = (
                self.found.deltas[number * shard : min((number + 1) * shard, known)]
                .half()
                .contiguous()
            )
            save_file({"deltas": own}, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
        files.write(
            self.folder / ROWS,
            "".join(json.dumps(row, allow_nan=False) + "\n" for row in self.found.rows),
        )


def per_file(deltas: Tensor) -> int:
    """How many images' perturbations go into a file."""
    return max(1, SHARD_BYTES // (2 * deltas[0].numel()))


def storable(deltas: Tensor) -> Tensor:
    """The perturbations as 16 bits hold them: a little shorter, so that no rounding leads out of a budget or of [0,1].

    Why         rounding to 11 bits changes a number by at most 2^-11 of it, so a factor 1 - 2^-11 comes first; what is
                too small for 11 bits and would grow all the same becomes zero
    """
    kept = (deltas * (1 - 2.0**-11)).half().to(deltas)
    return torch.where(kept.abs() > deltas.abs(), 0, kept)


def _attacked(batch: _Batch) -> Iterator[Progress]:
    """Every attack that a batch still lacks, on the images that are not yet fooled at every draw."""
    found = batch.found
    protocol = batch.found.protocol
    total = batch.found.settings["n"]
    if not batch.rows:
        batch.begin()
    for name, attack in protocol.runs():
        if name in batch.rows[0]["attacks"]:
            continue
        alive = [i for i, row in enumerate(batch.rows) if row["attacks"][row["strongest"]][0] > 0]
        for i in set(range(len(batch.rows))) - set(alive):
            batch.rows[i]["attacks"][name] = None
        if alive:
            x = batch.x[alive]
            y = batch.y[alive]
            *_, last = attack.frames(
                batch.classifier,
                x,
                y,
                protocol.epsilon,
                protocol.norm,
                batch.noise(name),
                batch.noise(name, "start"),
            )
            batch.keep(name, alive, (last.x - x).float().cpu(), attack.calls)
        batch.write()
        yield Progress(batch.part.start, total, name)
    if batch.rows[0]["hits"] is None:
        for row, hits in zip(batch.rows, batch.judge("evaluation")[0], strict=True):
            row["hits"] = hits
            row["calls"] = row["calls"] + found.settings["draws"]
        batch.write()
    yield Progress(batch.part.stop, total, "all attacks")


def rescored(
    classifier: nn.Module, images: Tensor, labels: Tensor, found: Found
) -> Iterator[tuple[list, list]]:
    """Ask again, batch by batch, with the noise of the claim: the hits on clean and on perturbed images.

    Shapes      images [N,C,H,W], labels [N] -> yields (clean, perturbed), a list of hits each
    """
    for start in range(0, len(found.rows), found.settings["batch"]):
        batch = _Batch(classifier, images, labels, found, Path(), start)
        clean, _ = batch.judge("clean", deltas=torch.zeros_like(batch.deltas))
        yield clean, batch.judge("evaluation")[0]


def read(folder: str | Path) -> Found:
    """What a run has stored so far.

    Errors      FileNotFoundError for a folder without a run; ValueError for a file that is damaged
    """
    folder = Path(folder)
    missing = [
        name
        for name in (files.SETTINGS, ROWS, "deltas-0.safetensors")
        if not (folder / name).exists()
    ]
    if missing:
        raise FileNotFoundError(
            f"expected the results of an attack in {folder}, found no {missing[0]}; "
            "`diffclass evaluate --attack honest --store FOLDER` writes them."
        )
    rows = []
    for number, line in enumerate((folder / ROWS).read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
            known = {"index", "label", "clean", "attacks", "strongest", "hits", "calls"} <= set(row)
        except (ValueError, TypeError):
            known = False
        if not known or row["index"] != number - 1:
            raise ValueError(
                f"line {number} of {folder / ROWS} is not the row of image {number - 1}; the file was "
                "changed by something else: restore it, or attack again in another folder."
            )
        rows.append(row)
    shards = sorted(
        folder.glob("deltas-*.safetensors"), key=lambda path: int(path.stem.split("-")[1])
    )
    try:
        deltas = torch.cat([load_file(path)["deltas"] for path in shards]).float()
    except (SafetensorError, KeyError) as error:
        raise ValueError(
            f"expected perturbations in {folder}/deltas-*.safetensors, got a file without ({error}); it "
            "was probably cut short."
        ) from None
    if len(deltas) < len(rows):
        raise ValueError(
            f"expected a perturbation for each of {len(rows)} rows in {folder}, got {len(deltas)}; a file "
            "deltas-*.safetensors is missing."
        )
    settings = files.settings_of(folder)
    lacking = sorted(NEEDED - set(settings))
    if lacking:
        raise ValueError(
            f"expected {folder / files.SETTINGS} to be that of an attack, got one without {lacking}."
        )
    return Found(settings, rows, deltas[: len(rows)])
