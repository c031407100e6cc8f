"""What one answer of every classifier costs: network calls, parameters, FLOP and seconds; measured, and kept as a record."""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import benchmark

from diffclass import units, zoo
from diffclass.classifiers.base import Classifier, flop
from diffclass.data.worlds import world_of
from diffclass.denoisers.base import Denoiser
from diffclass.evaluation import timing
from diffclass.storage import assets, files
from diffclass.zoo import noised

SCHEMA = 1
SOURCE = "diffclass compare-costs"
PRECISION = "fp32"
LONGEST = 3600  # seconds of repetitions
SIGMA = 0.25  # smoothing noise of the classifiers of noised pictures, unless another is asked for; pixels
# Of a processor that others use as well, only its own time says what an answer takes; other devices keep no such time.
CLOCKS = {"processor": time.process_time, "wall": benchmark.timer}


def clock_of(device: str) -> str:
    """Which clock of `CLOCKS` times a device, by the kind of the device."""
    return "processor" if device == "cpu" else "wall"


@dataclass(frozen=True)
class Cost:
    """What one answer about one picture costs, of a classifier of noised pictures one vote.

    calls       network calls at most; a call of a network with a head for each class gives all classes
    parameters  of all networks that are asked, each once: `parameters_of`
    flop        counted by torch, two for a multiply-add
    seconds     of one picture asked alone, by `clock_of` its device: the median of the repetitions; spread: their interquartile
                range
    """

    name: str
    calls: int
    parameters: int
    flop: int
    seconds: float
    spread: float
    repetitions: int


def cost_of(name: str, classifier: Classifier, picture: Tensor, seconds: float = 1.0) -> Cost:
    """Measure one classifier on the device that the picture is on.

    Shapes      picture [1,C,H,W] in [0,1]; asked again for about so many seconds, after one call to warm up
    Randomness  one held noise
    Errors      ValueError for another number of pictures than one; those of the classifier
    """
    classifier.checked(picture)
    if len(picture) != 1:
        raise ValueError(
            f"expected one picture to be timed, got {len(picture)}; the cost is that of one answer."
        )
    seconds = units.check_number(seconds, "seconds", above=0)
    if seconds > LONGEST:
        raise ValueError(
            f"expected at most {LONGEST} seconds of repetitions, got {seconds:g}; a fraction of one is enough."
        )
    noise = classifier.sample_noise(1, torch.Generator().manual_seed(0))

    def ask() -> Tensor:
        with torch.no_grad():
            return classifier(picture, noise)

    ask()
    timer = benchmark.Timer(
        "ask()",
        timer=CLOCKS[clock_of(picture.device.type)],
        globals={"ask": ask},
        num_threads=torch.get_num_threads(),
    )
    measured = timer.blocked_autorange(min_run_time=seconds)
    return Cost(
        name=name,
        calls=classifier.calls,
        parameters=parameters_of(classifier),
        flop=flop(classifier),
        seconds=measured.median,
        spread=measured.iqr,
        repetitions=len(measured.times) * measured.number_per_run,
    )


def parameters_of(classifier: Classifier) -> int:
    """How many numbers its networks consist of; a denoiser that it holds two copies of, to purify and to judge, counts once."""
    counted = set()
    known = set()
    total = 0
    denoisers = [part for part in classifier.modules() if isinstance(part, Denoiser)]
    for part in (*denoisers, classifier):
        own = [number for number in part.parameters() if id(number) not in counted]
        counted |= {id(number) for number in own}
        digest = hashlib.sha256()
        for number in own:
            digest.update(number.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        if digest.digest() not in known:
            total += sum(number.numel() for number in own)
        known.add(digest.digest())
    return total


def built(world: str, name: str, sigma_pixel: float = SIGMA) -> Classifier:
    """A classifier of clean or of noised pictures by name. Errors: those of `noised.classifier`."""
    return noised.classifier(world, name, sigma_pixel)


def measure(
    world: str,
    names: tuple[str, ...],
    picture: Tensor,
    *,
    sigma_pixel: float = SIGMA,
    seconds: float = 1.0,
) -> Iterator[Cost | str]:
    """The cost of each of some classifiers, or a sentence on why it cannot be asked here, in their order.

    Shapes      picture [1,C,H,W] in [0,1]
    Errors      ValueError for a name that the world does not have
    """
    for name in names:
        noised.entry_of(world, name)
    for name in names:
        try:
            classifier = built(world, name, sigma_pixel).to(picture.device)
        except (FileNotFoundError, ValueError) as error:
            yield f"{name}: {error}"
            continue
        yield cost_of(name, classifier, picture, seconds)


def all_names(world: str) -> tuple[str, ...]:
    """The classifiers of a world, those of clean pictures first. Errors: ValueError for a world that does not exist."""
    return (*zoo.names(world), *noised.names(world))


def document(world: str, device: str, sigma_pixel: float, listed: list[Cost | str]) -> dict:
    """A record of measured costs as JSON values, with the machine that they were measured on, and how busy it was."""
    return dict(
        schema=SCHEMA,
        source=SOURCE,
        world=world_of(world).name,
        sigma=sigma_pixel,
        precision=PRECISION,
        device=device,
        clock=clock_of(device),
        machine=timing.processor(),
        threads=torch.get_num_threads(),
        load=round(os.getloadavg()[0], 1),
        missing=[cost for cost in listed if isinstance(cost, str)],
        costs=[asdict(cost) for cost in listed if isinstance(cost, Cost)],
    )


def record_file(world: str) -> Path:
    """Where the record of a world's costs is kept. Errors: ValueError for a world that does not exist."""
    return assets.folder() / "records" / f"costs-{world_of(world).kind}.json"


def keep(path: Path, content: dict) -> None:
    """Write a record of costs, whole or not at all."""
    files.write(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def begun(path: Path, content: dict) -> list[Cost]:
    """The costs that an interrupted run has stored: those of the same world, noise and machine as a new record.

    Errors      ValueError for a file that is no record of costs
    """
    if not path.exists():
        return []
    with files.reading(f"the costs in {path}"):
        stored = json.loads(path.read_text())
        same = all(
            stored[key] == content[key]
            for key in content
            if key not in ("load", "missing", "costs")
        )
        return [Cost(**row) for row in stored["costs"]] if same else []


def kept(world: str) -> tuple[dict, dict[str, Cost]]:
    """The record of a world's costs: how it was measured, and name -> cost.

    Errors      FileNotFoundError, with the command; ValueError for a file that is no such record
    """
    path = record_file(world)
    if not path.exists():
        raise FileNotFoundError(
            f"expected the costs of {world_of(world).kind} in {path.name}, found no such file; "
            f"`{SOURCE} --world {world_of(world).kind}` measures them."
        )
    with files.reading(f"the costs in {path}"):
        content = json.loads(path.read_text())
        if content["schema"] != SCHEMA or content["world"] != world_of(world).kind:
            raise ValueError(
                f"expected costs of {world_of(world).kind} of schema {SCHEMA} in {path.name}, got those of "
                f"{content['world']!r}, schema {content['schema']!r}."
            )
        costs = {row["name"]: Cost(**row) for row in content["costs"]}
        about = {name: value for name, value in content.items() if name != "costs"}
    return about, costs
