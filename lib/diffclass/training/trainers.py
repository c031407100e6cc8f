"""How the networks in `assets/` were trained: data, settings, monitoring and model card of each, as one call."""

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

from diffclass import intervals, noise, units
from diffclass.classifiers.bayes import BayesClassifier
from diffclass.data.worlds import DATA, images_of
from diffclass.denoisers import network
from diffclass.denoisers.base import Denoiser
from diffclass.evaluation import accuracies
from diffclass.storage import assets
from diffclass.training.hardening import Hardening, Inner, hardening_loss, under_attack
from diffclass.training.loop import Curve, Progress, Training, is_late
from diffclass.training.losses import Loss, contrastive_loss, denoising_loss, distillation_loss
from diffclass.zoo import networks

SHAPES = {"digits": (1, 8, 8), "cifar10": (3, 32, 32)}


@dataclass(frozen=True)
class Recipe:
    """What one network of `assets/` is made of.

    config      of the network; teacher: the file that it copies, or None to learn from data
    contrastive all heads learn from data, by `contrastive_loss`
    hardening   adversarial training that goes on from the weights `start`, with their architecture
    stored      the precision of the weights file; measured: test images behind the accuracy of its card
    monitored   test images behind each of the twenty points of its accuracy over time; only where there is an
                accelerator, or one call of the network answers for all classes
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
    contrastive: bool = False
    start: str | None = None
    hardening: Hardening | None = None
    levels: int = 16
    measured: int = 400
    monitored: int = 0


CIFAR = dict(
    world="cifar10",
    network="UNet",
    mirror=True,
    precision="bf16",
    compiled=True,
    stored=torch.float16,
    levels=36,
    measured=1000,
    monitored=256,
)


CIFAR_TEACHER = networks.MODELS["cifar10"]["teacher"]


CIFAR_STUDENT = networks.MODELS["cifar10"]["student"]


RECIPES = {
    networks.TEACHER: Recipe("digits", "ConditionalDenoiser", "DigitNet", 500, 256, 2e-3),
    networks.STUDENT: Recipe(
        "digits", "MultiHeadDenoiser", "DigitNet", 3000, 128, 3e-3, teacher=networks.TEACHER
    ),
    CIFAR_TEACHER: Recipe(
        kind="ConditionalDenoiser",
        steps=15_000,
        batch=1024,
        rate=8e-4,
        ema=0.999,
        config=dict(widths=(96, 192, 192), layers=2, dropout=0.1),
        **CIFAR,
    ),
    CIFAR_STUDENT: Recipe(
        kind="MultiHeadDenoiser",
        steps=12_000,
        batch=512,
        rate=1e-3,
        ema=0.999,
        config=dict(widths=(32, 64, 96), layers=2, attention=False),
        teacher=CIFAR_TEACHER,
        **CIFAR,
    ),
    networks.CONTRASTIVE["digits"]: Recipe(
        "digits", "MultiHeadDenoiser", "DigitNet", 1000, 128, 3e-3, contrastive=True
    ),
    networks.CONTRASTIVE["cifar10"]: Recipe(
        kind="MultiHeadDenoiser",
        steps=4000,
        batch=128,
        rate=2e-3,
        ema=0.998,
        contrastive=True,
        **{**CIFAR, "network": "PatchNet", "levels": 12},
    ),
    networks.HARDENED["digits"]: Recipe(
        "digits",
        "MultiHeadDenoiser",
        "DigitNet",
        400,
        64,
        1e-3,
        ema=0.98,
        start=networks.STUDENT,
        hardening=Hardening(Inner(0.1, 2, 0.8), *networks.DIGIT_RANGE),
    ),
    networks.HARDENED["cifar10"]: Recipe(
        kind="MultiHeadDenoiser",
        steps=6000,
        batch=256,
        rate=5e-4,
        ema=0.998,
        start=networks.CONTRASTIVE["cifar10"],
        hardening=Hardening(Inner(8 / 255, 2, 0.8), *networks.CIFAR_RANGE),
        **CIFAR,
    ),
}


def classifier_of(recipe: Recipe, denoiser: Denoiser, levels: int | None = None) -> BayesClassifier:
    """The classifier by which a network's card states its accuracy."""
    make, span = networks.CLASSIFIERS[recipe.world]
    return make(denoiser, noise.log_levels(*span, levels or recipe.levels))


def train(
    name: str,
    folder: Path,
    *,
    steps: int | None = None,
    batch: int | None = None,
    widths: tuple | None = None,
    minutes: float | None = None,
    measured: int | None = None,
    seed: int = 0,
) -> Iterator[Progress]:
    """Train a network of `RECIPES`, yielding progress; the last act writes weights, card and checksum.

    Shapes      a student copies the teacher found in `folder`; `minutes` pauses the run after that time, resumable
    Randomness  all from `seed`
    Writes      folder/name, its line in SHA256SUMS, and folder/checkpoints/name while it runs (resumed if present)
    """
    recipe = RECIPES[name]
    chip = Accelerator()
    images, labels = images_of(recipe.world, "train")
    denoiser, loss = _begun(recipe, folder, chip, tuple(images.shape[1:]), widths, seed)
    accelerated = torch.accelerator.is_available()
    run = Training(
        denoiser,
        units.to_model(images),
        labels,
        loss=loss,
        steps=steps or recipe.steps,
        batch=batch or recipe.batch,
        rate=recipe.rate,
        ema=recipe.ema,
        mirror=recipe.mirror,
        seed=seed,
        precision=recipe.precision,
        compiled=recipe.compiled and accelerated,
        checkpoint=folder / "checkpoints" / name,
    )
    watched = recipe.monitored if accelerated or denoiser.one_call else 0
    monitor = Monitor(recipe, folder / "checkpoints" / name, watched)
    started = time.monotonic()
    progress = None
    for progress in run:
        monitor.look(run, progress)
        yield progress
        if minutes and is_late(chip, progress, started + 60 * minutes):
            return  # the loop writes its checkpoint as it is left
    if chip.is_main_process:
        _finish(name, folder, run, measured or recipe.measured, monitor)
    chip.wait_for_everyone()


def _begun(
    recipe: Recipe, folder: Path, chip: Accelerator, shape: tuple, widths: tuple | None, seed: int
) -> tuple[Denoiser, Loss]:
    """The network as its training begins, and what it is trained by."""
    if recipe.hardening:
        if widths:
            raise ValueError(
                f"expected no widths for a network that goes on from {recipe.start}, got {widths}."
            )
        return network.load_denoiser(folder / recipe.start)[0].requires_grad_(True), hardening_loss(
            recipe.hardening
        )
    loss = (
        contrastive_loss(*networks.CLASSIFIERS[recipe.world][1])
        if recipe.contrastive
        else denoising_loss
    )
    null = True
    if recipe.teacher:
        teacher = network.load_denoiser(folder / recipe.teacher)[0].to(chip.device)
        loss = distillation_loss(teacher)
        null = teacher.has_null
    return _fresh(recipe, shape, widths, null, seed), loss


def _fresh(
    recipe: Recipe, shape: tuple, widths: tuple | None, null: bool = True, seed: int = 0
) -> Denoiser:
    own = (
        {}
        if not widths
        else {"widths": widths}
        if recipe.network == "UNet"
        else {"width": widths[0]}
    )
    config = {**recipe.config, **own}
    return network.build(recipe.kind, recipe.network, 10, shape, has_null=null, seed=seed, **config)


class Monitor(Curve):
    """Accuracy over training time: twenty points, on the first `images` test images."""

    def __init__(self, recipe: Recipe, checkpoint: Path, images: int):
        super().__init__(checkpoint)
        self.recipe = recipe
        self.count = images

    def look(self, run: Training, progress: Progress) -> None:
        """Measure the averaged network of this step, if it is one of the twenty."""
        if not self.count or not progress.is_milestone or not run.accelerator.is_main_process:
            return
        device = run.accelerator.device
        test, labels = (
            part[: self.count].to(device) for part in images_of(self.recipe.world, "test")
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            classifier = classifier_of(self.recipe, run.average.eval(), levels=12).to(device)
            correct = accuracies.accuracy(classifier, test, labels)
        self.add(progress, correct=correct, n=len(labels), levels=12)


def remaining(world: str, folder: Path, only: str | None = None) -> list[str]:
    """The networks that training has still to make: both, or only the student if its own training was interrupted.

    Shapes      only is "teacher", "student" or None
    """
    own = {
        name: recipe
        for name, recipe in RECIPES.items()
        if recipe.world == world and not (recipe.hardening or recipe.contrastive)
    }
    teacher, student = sorted(own, key=lambda name: bool(own[name].teacher))
    if only:
        return [teacher if only == "teacher" else student]
    checkpoints = folder / "checkpoints"
    begun = (checkpoints / student).exists() and not (checkpoints / teacher).exists()
    return (
        [student]
        if begun and assets.parts(teacher, [p.name for p in folder.iterdir()])
        else [teacher, student]
    )


def stoppable(run: Iterator[Progress]) -> Iterator[Progress]:
    """The same progress, but Ctrl-C waits for the end of a step, so that the checkpoint is whole and the resumed run
    equals an unbroken one. A second Ctrl-C does not wait. For the main thread, where signals arrive."""
    pressed = []
    before = signal.getsignal(signal.SIGINT)

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
                if (
                    progress.step == progress.steps
                ):  # what follows only measures, and the checkpoint is complete
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
        return (
            f"{self.images:,.0f} images/s, {self.images * self.flops / 1e12:.3g} TFLOP/s, "
            f"{self.images * self.flops / self.peak:.0%} of the matrix peak"
        )


def step_flops(name: str, widths: tuple | None = None) -> float:
    """FLOP of one training step on one image: three forwards' worth, and the teacher's forward for every class.

    Source      counted by torch on one forward; the backward pass counts twice. A network that is hardened goes forward
                and back at every level for each step of the attack, for the attacked and for the clean image
    """
    recipe = RECIPES[name]
    if recipe.hardening:
        return (
            3
            * forward_flops(RECIPES[recipe.start])
            * recipe.hardening.levels
            * (recipe.hardening.inner.steps + 2)
        )
    taught = 11 * forward_flops(RECIPES[recipe.teacher]) if recipe.teacher else 0
    return 3 * forward_flops(recipe, widths) + taught


def forward_flops(recipe: Recipe, widths: tuple | None = None) -> int:
    """FLOP of one call of a recipe's network on one image: of one class, or of all heads at once."""
    asked = None if recipe.kind == "MultiHeadDenoiser" else [0]
    shape = SHAPES[recipe.world]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _fresh(recipe, shape, widths).eval()(torch.zeros(1, *shape), 1.0, asked)
    return counter.get_total_flops()


def matrix_peak(precision: str, size: int = 4096, seconds: float = 0.3) -> float:
    """FLOP a second of a product of two large matrices on this process's chip, in the precision of the network."""
    device = Accelerator().device
    size = size if torch.accelerator.is_available() else size // 4
    matrix = torch.ones(
        size, size, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32
    )
    wait = torch.accelerator.synchronize if torch.accelerator.is_available() else lambda: None
    matrix @ matrix
    wait()
    started = time.perf_counter()
    count = 0
    while time.perf_counter() - started < seconds:
        matrix @ matrix
        count += 1
        wait()
    return 2 * size**3 * count / (time.perf_counter() - started)


def _finish(name: str, folder: Path, run: Training, measured: int, monitor: Monitor) -> None:
    """Measure the averaged network; write weights, card and checksum; put the checkpoint away."""
    recipe = RECIPES[name]
    device = run.accelerator.device
    test, labels = (part[:measured].to(device) for part in images_of(recipe.world, "test"))
    average = run.average.eval()
    with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
        classifier = classifier_of(recipe, average).to(device)
        correct = accuracies.accuracy(classifier, test, labels)
        content = _card(name, recipe, run, correct, len(labels))
        if recipe.hardening:
            content |= under_attack(recipe.hardening, classifier, test, labels)
    network.save_denoiser(
        average, folder / name, content | {"curve": monitor.points()}, recipe.stored
    )
    assets.record([name], folder)
    for left in (folder / "checkpoints" / name, monitor.path):
        left.unlink(missing_ok=True)


def _card(name: str, recipe: Recipe, run: Training, correct: int, n: int) -> dict:
    low, high = intervals.interval(correct, n)
    _, span = networks.CLASSIFIERS[recipe.world]
    told = ("kind", "network", "precision", "teacher", "contrastive", "start")
    own = {key: value for key, value in asdict(recipe).items() if key in told}
    settings = {**run.settings, "config": network.describe(run.average)}
    method = (
        " --method adversarial-dc" * bool(recipe.hardening)
        + " --method contrastive" * recipe.contrastive
    )
    return dict(
        name=name,
        **own,
        data=DATA[recipe.world],
        settings=settings,
        **run.facts(),
        command=f"diffclass train {recipe.world}{method}",
        accuracy=dict(
            correct=correct,
            n=n,
            low=low,
            high=high,
            weighting="ELBO",
            levels=f"{recipe.levels} log-spaced in [{span[0]:g}, {span[1]:g}]",
        ),
    )
