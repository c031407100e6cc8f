"""How the networks in `assets/` were trained: data, settings, monitoring and model card of each, as one call."""

import contextlib
import json
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from diffclass import assets, certificates, cifar, data, noise, recipes, units
from diffclass.classifiers import BayesClassifier
from diffclass.denoisers import network
from diffclass.denoisers.base import Denoiser
from diffclass.training import Progress, Training, denoising_loss, distillation_loss

DATA = {"digits": "scikit-learn digits, 1397 training images", "cifar10": "CIFAR-10, 50 000 training images"}


@dataclass(frozen=True)
class Recipe:
    """What one network of `assets/` is made of.

    config      of the network; teacher: the file that it copies, or None to learn from data
    stored      the precision of the weights file; measured: test images behind the accuracy of its card
    monitored   test images behind each of the twenty points of its accuracy over time, where there is an accelerator
    """

    world: str
    kind: str
    network: str
    steps: int
    batch: int
    rate: float
    config: dict = field(default_factory=dict)
    ema: float = 0.995
    mirror: bool = False
    precision: str = "fp32"
    compiled: bool = False
    stored: torch.dtype = torch.float32
    teacher: str | None = None
    levels: int = 16
    measured: int = 400
    monitored: int = 0


CIFAR = dict(world="cifar10", network="UNet", mirror=True, precision="bf16", compiled=True, stored=torch.float16,
             levels=36, measured=1000, monitored=256)
CIFAR_TEACHER, CIFAR_STUDENT = recipes.MODELS["cifar10"]["teacher"], recipes.MODELS["cifar10"]["student"]
RECIPES = {
    recipes.TEACHER: Recipe("digits", "ConditionalDenoiser", "DigitNet", 500, 256, 2e-3),
    recipes.STUDENT: Recipe("digits", "MultiHeadDenoiser", "DigitNet", 3000, 128, 3e-3, teacher=recipes.TEACHER),
    CIFAR_TEACHER: Recipe(kind="ConditionalDenoiser", steps=15_000, batch=1024, rate=8e-4, ema=0.999,
                          config=dict(widths=(96, 192, 192), layers=2, dropout=0.1), **CIFAR),
    CIFAR_STUDENT: Recipe(kind="MultiHeadDenoiser", steps=12_000, batch=512, rate=1e-3, ema=0.999,
                          config=dict(widths=(32, 64, 96), layers=2, attention=False), teacher=CIFAR_TEACHER, **CIFAR),
}


def images_of(world: str, split: str) -> tuple[Tensor, Tensor]:
    """All images of a split in [0,1], and their labels. Errors: those of `cifar.cifar10` where it is missing."""
    if world == "cifar10":
        return cifar.cifar10(split)
    digits = data.digits()
    return (digits.train_images, digits.train_labels) if split == "train" else (digits.test_images, digits.test_labels)


def classifier_of(recipe: Recipe, denoiser: Denoiser, levels: int | None = None) -> BayesClassifier:
    """The classifier by which a network's card states its accuracy."""
    if recipe.world == "cifar10":
        return recipes.cifar_classifier(denoiser, levels or recipe.levels)
    return recipes.digit_classifier(denoiser, noise.log_levels(*recipes.DIGIT_RANGE, levels or recipe.levels))


def train(name: str, folder: Path, *, steps: int | None = None, batch: int | None = None, widths: tuple | None = None,
          minutes: float | None = None, measured: int | None = None, seed: int = 0) -> Iterator[Progress]:
    """Train a network of `RECIPES`, yielding progress; the last act writes weights, card and checksum.

    Shapes      a student copies the teacher found in `folder`; `minutes` pauses the run after that time, resumable
    Randomness  all from `seed`
    Writes      folder/name, its line in SHA256SUMS, and folder/checkpoints/name while it runs (resumed if present)
    """
    recipe, chip = RECIPES[name], Accelerator()
    images, labels = images_of(recipe.world, "train")
    classes, shape = int(labels.max()) + 1, tuple(images.shape[1:])
    config = {**recipe.config, **({"widths": widths} if widths else {})}
    loss, null = denoising_loss, True
    if recipe.teacher:
        teacher = network.load_denoiser(folder / recipe.teacher)[0].to(chip.device)
        loss, null = distillation_loss(teacher), teacher.has_null
    denoiser = network.build(recipe.kind, recipe.network, classes, shape, has_null=null, seed=seed, **config)
    accelerated = torch.accelerator.is_available()
    run = Training(denoiser, units.to_model(images), labels, loss=loss, steps=steps or recipe.steps,
                   batch=batch or recipe.batch, rate=recipe.rate, ema=recipe.ema, mirror=recipe.mirror, seed=seed,
                   precision=recipe.precision, compiled=recipe.compiled and accelerated,
                   checkpoint=folder / "checkpoints" / name)
    monitor = Monitor(recipe, folder / "checkpoints" / f"{name}.curve.jsonl", recipe.monitored if accelerated else 0)
    started, progress = time.monotonic(), None
    for progress in run:
        monitor.look(run, progress)
        yield progress
        if minutes and _is_late(chip, progress, started + 60 * minutes):
            return  # the loop writes its checkpoint as it is left
    if chip.is_main_process:
        _finish(name, folder, run, config, measured or recipe.measured, monitor)
    chip.wait_for_everyone()


def _is_late(chip: Accelerator, progress: Progress, end: float) -> bool:
    """Whether to pause here; all processes agree, and with several of them that is asked now and then only."""
    if progress.step == progress.steps or (chip.num_processes > 1 and progress.step % 10):
        return False
    late = torch.tensor(float(time.monotonic() > end), device=chip.device)
    return bool(chip.reduce(late, "sum") > 0)


class Monitor:
    """Accuracy over training time: twenty points, kept beside the checkpoint so that a resumed run has them all."""

    def __init__(self, recipe: Recipe, path: Path, images: int):
        self.recipe, self.path, self.count = recipe, path, images

    def look(self, run: Training, progress: Progress) -> None:
        """Measure the averaged network of this step, if it is one of the twenty."""
        if not self.count or progress.step % max(1, progress.steps // 20) or not run.accelerator.is_main_process:
            return
        device = run.accelerator.device
        test, labels = (part[:self.count].to(device) for part in images_of(self.recipe.world, "test"))
        with torch.autocast(device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            classifier = classifier_of(self.recipe, run.average.eval(), levels=12).to(device)
            correct = recipes.accuracy(classifier, test, labels)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as file:
            point = dict(images=progress.images, seconds=round(progress.seconds, 1), correct=correct, n=self.count,
                         levels=12)
            file.write(json.dumps(point) + "\n")

    def points(self) -> list[dict]:
        """What was measured so far."""
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []


def remaining(world: str, folder: Path, only: str | None = None) -> list[str]:
    """The networks that training has still to make: both, or only the student if its own training was interrupted.

    Shapes      only is "teacher", "student" or None
    """
    teacher, student = (next(name for name, r in RECIPES.items() if r.world == world and bool(r.teacher) == copies)
                        for copies in (False, True))
    if only:
        return [teacher if only == "teacher" else student]
    checkpoints = folder / "checkpoints"
    begun = (checkpoints / student).exists() and not (checkpoints / teacher).exists()
    return [student] if begun and assets.parts(teacher, [p.name for p in folder.iterdir()]) else [teacher, student]


def stoppable(run: Iterator[Progress]) -> Iterator[Progress]:
    """The same progress, but Ctrl-C waits for the end of a step, so that the checkpoint is whole and the resumed run
    equals an unbroken one. A second Ctrl-C does not wait. For the main thread, where signals arrive."""
    pressed, before = [], signal.getsignal(signal.SIGINT)

    def press(number, frame):
        pressed.append(number)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, press)
    try:
        with contextlib.closing(run):
            for progress in run:
                yield progress
                if pressed:
                    raise KeyboardInterrupt
                if progress.step == progress.steps:  # what follows only measures, and the checkpoint is complete
                    signal.signal(signal.SIGINT, before)
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass(frozen=True)
class Speed:
    """How fast a network is trained, and how much of what the chip's matrix units can do that is.

    images      a second; flops: of one training step on one image; peak: FLOP a second of a large matrix product
    """

    images: float
    flops: float
    peak: float

    def __str__(self) -> str:
        return (f"{self.images:,.0f} images/s, {self.images * self.flops / 1e12:.3g} TFLOP/s, "
                f"{self.images * self.flops / self.peak:.0%} of the matrix peak")


def step_flops(name: str, widths: tuple | None = None) -> float:
    """FLOP of one training step on one image: three forwards' worth, and the teacher's forward for every class.

    Source      counted by torch on one forward; the backward pass counts twice
    """
    recipe = RECIPES[name]
    classes, shape = (10, (3, 32, 32)) if recipe.world == "cifar10" else (10, (1, 8, 8))
    config = {**recipe.config, **({"widths": widths} if widths else {})}
    denoiser = network.build(recipe.kind, recipe.network, classes, shape, **config).eval()
    asked = None if recipe.kind == "MultiHeadDenoiser" else [0]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        denoiser(torch.zeros(1, *shape), 1.0, asked)
    own = counter.get_total_flops()
    return 3 * own + (11 * step_flops(recipe.teacher) / 3 if recipe.teacher else 0)


def matrix_peak(precision: str, size: int = 4096, seconds: float = 0.3) -> float:
    """FLOP a second of a product of two large matrices on this process's chip, in the precision of the network."""
    device = Accelerator().device
    size = size if torch.accelerator.is_available() else size // 4
    matrix = torch.ones(size, size, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    wait = torch.accelerator.synchronize if torch.accelerator.is_available() else lambda: None
    matrix @ matrix
    wait()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        matrix @ matrix
        count += 1
        wait()
    return 2 * size**3 * count / (time.perf_counter() - started)


def _finish(name: str, folder: Path, run: Training, config: dict, measured: int, monitor: Monitor) -> None:
    """Measure the averaged network; write weights, card and checksum; put the checkpoint away."""
    recipe, device = RECIPES[name], run.accelerator.device
    test, labels = (part[:measured].to(device) for part in images_of(recipe.world, "test"))
    average = run.average.eval()
    with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
        correct = recipes.accuracy(classifier_of(recipe, average).to(device), test, labels)
    content = _card(name, recipe, {**run.settings, "config": config}, run, correct, len(labels))
    network.save_denoiser(average, folder / name, content | {"curve": monitor.points()}, recipe.stored)
    assets.record([name], folder)
    for left in (folder / "checkpoints" / name, monitor.path):
        left.unlink(missing_ok=True)


def _card(name: str, recipe: Recipe, settings: dict, run: Training, correct: int, n: int) -> dict:
    low, high = certificates.interval(correct, n)
    span = recipes.CIFAR_RANGE if recipe.world == "cifar10" else recipes.DIGIT_RANGE
    own = {key: value for key, value in asdict(recipe).items() if key in ("kind", "network", "precision", "teacher")}
    return dict(name=name, **own, data=DATA[recipe.world], settings=settings,
                images_seen=run.step * run.settings["batch"], seconds=round(run.seconds, 1),
                device=run.accelerator.device.type, processes=run.accelerator.num_processes,
                threads=torch.get_num_threads(), torch=torch.__version__.split("+")[0],
                command=f"diffclass train {recipe.world}", date=datetime.now(UTC).strftime("%Y-%m-%d"),
                accuracy=dict(correct=correct, n=n, low=low, high=high, weighting="ELBO",
                              levels=f"{recipe.levels} log-spaced in [{span[0]:g}, {span[1]:g}]"))
