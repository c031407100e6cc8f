"""Train a network of `RECIPES` as one call: it goes on where it was stopped, is watched, measured and put away."""

import contextlib
import json
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffclass.data.worlds import DATA, images_of
from diffclass.storage import assets
from diffclass.training.loop import Curve, Progress, Training, is_late
from diffclass.training.recipes import RECIPES, Beginning, Recipe
from diffclass.zoo import networks


def train(
    name: str,
    folder: Path,
    *,
    steps: int | None = None,
    batch: int | None = None,
    widths: tuple[int, ...] | None = None,
    minutes: float | None = None,
    pause: float | None = None,
    measured: int | None = None,
    seed: int = 0,
) -> Iterator[Progress]:
    """Train a network of `RECIPES`, yielding progress; the last act writes weights, card and checksum.

    Shapes      steps, batch, widths and `measured`, the test images of the card, in place of the recipe's; the network
                that it needs is taken from `folder`
    Units       minutes: of training in place of the recipe's steps, at whose end the network is annealed on any machine,
                however often it was stopped; pause: minutes of this call, after which the run stops, resumable
    Randomness  all from `seed`
    Writes      folder/name, its line in SHA256SUMS, and folder/checkpoints/name while it runs (resumed if present);
                what a recipe keeps along the run, by the names of `networks.along`; saving is tried before the first step
    Errors      ValueError for a name that has no recipe, both steps and minutes, or widths that do not apply;
                FileNotFoundError without the network that it needs; those of `Training`, `images_of` and `recipe.save`
    """
    if name not in RECIPES:
        raise ValueError(f"expected one of {sorted(RECIPES)} to train, got {name!r}.")
    if steps and minutes:
        raise ValueError(
            f"expected the length of a run in steps or in minutes, got {steps} steps and {minutes:g} minutes."
        )
    recipe = RECIPES[name]
    recipe = replace(
        recipe,
        steps=steps or recipe.steps,
        batch=batch or recipe.batch,
        measured=measured or recipe.measured,
    )
    folder = Path(folder)
    checkpoint = folder / "checkpoints" / name
    chip = Accelerator()
    given = None
    if recipe.needs:
        given = recipe.reads(folder / recipe.needs).to(chip.device)
    run = training_of(
        recipe, seed, widths=widths, given=given, checkpoint=checkpoint, minutes=minutes
    )
    if chip.is_main_process:
        try_saving(recipe, run, folder / name)
    curve = Curve(checkpoint)
    started = time.monotonic()
    for progress in run:
        if recipe.watched and progress.is_milestone and chip.is_main_process:
            point = recipe.watch(run.average.eval(), *tested(recipe, recipe.watched, run), seed)
            if point:
                curve.add(progress, **point)
        if is_kept(recipe, progress) and chip.is_main_process:
            put_away(name, recipe, run, folder)
        yield progress
        if pause and is_late(chip, progress, started + 60 * pause):
            return  # the loop writes its checkpoint as it is left
    if chip.is_main_process:
        average = run.average.eval()
        stated = recipe.measure(average, *tested(recipe, recipe.measured, run), seed)
        content = card(name, recipe, run) | stated | dict(curve=curve.points())
        recipe.save(average, folder / name, content)
        assets.record([name], folder)
        for left in (checkpoint, curve.path):
            left.unlink(missing_ok=True)
    chip.wait_for_everyone()


def training_of(
    recipe: Recipe,
    seed: int,
    *,
    widths: tuple[int, ...] | None = None,
    given: nn.Module | None = None,
    checkpoint: Path | None = None,
    minutes: float | None = None,
) -> Training:
    """The run of a recipe: iterate over it to train. Randomness: all from `seed`."""
    images, labels = images_of(recipe.world, "train")
    shape = tuple(images.shape[1:])
    beginning = Beginning(shape, int(labels.max()) + 1, seed, widths, given)
    return Training(
        recipe.build(beginning),
        recipe.pictures(images),
        labels,
        loss=recipe.loss(beginning),
        steps=recipe.steps,
        minutes=minutes,
        optimiser=recipe.optimiser,
        batch=recipe.batch,
        rate=recipe.rate,
        ema=recipe.ema,
        mirror=recipe.mirror,
        seed=seed,
        precision=recipe.precision,
        compiled=recipe.compiled and torch.accelerator.is_available(),
        checkpoint=checkpoint,
    )


def try_saving(recipe: Recipe, run: Training, path: Path) -> None:
    """Write what a run begins with beside its file, and take it away: what cannot be saved fails before its minutes.

    Errors      those of `recipe.save`; TypeError for a card that is no JSON
    """
    content = card(path.name, recipe, run)
    json.dumps(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as trial:
        recipe.save(run.average, Path(trial) / path.name, content)


def is_kept(recipe: Recipe, progress: Progress) -> bool:
    """Whether the weights after this step are put away: at every multiple of the recipe's `kept` before the last step."""
    due = recipe.kept is not None and progress.step % recipe.kept == 0
    return due and progress.step < progress.steps


def put_away(name: str, recipe: Recipe, run: Training, folder: Path) -> None:
    """Write the average as it is now beside its file, with a card that names the step. Errors: those of `recipe.save`."""
    file = networks.along(name, run.step)
    recipe.save(run.average, folder / file, card(file, recipe, run) | dict(step=run.step))
    assets.record([file], folder)


def tested(recipe: Recipe, count: int | None, run: Training) -> tuple[Tensor, Tensor]:
    """The first test images of a recipe's world and their labels, all for None, where the run is."""
    images, labels = images_of(recipe.world, "test")
    device = run.accelerator.device
    return images[:count].to(device), labels[:count].to(device)


def card(name: str, recipe: Recipe, run: Training) -> dict:
    """What every model card says: what the network is, what it was trained on, and how."""
    minutes = run.settings["minutes"]
    return dict(
        name=name,
        data=DATA[recipe.world],
        command=recipe.command if minutes is None else f"{recipe.command} --minutes {minutes:g}",
        settings=run.settings | dict(config=recipe.config(run.average)),
        precision=run.precision,
        **recipe.says,
        **run.facts(),
    )


# ---------------------------------------------------------------------------------------------------------------------
# What is left to do, and Ctrl-C


def remaining(files: list[str], folder: Path) -> list[str]:
    """The networks of a method that training has still to make: all, or only the last if its own was interrupted.

    Shapes      files: in the order in which they are trained, the last one from those before it
    """
    *before, last = files
    checkpoints = folder / "checkpoints"
    present = [path.name for path in folder.iterdir()]
    done = all(assets.parts(name, present) and not (checkpoints / name).exists() for name in before)
    return [last] if done and (checkpoints / last).exists() else files


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
                if progress.step == progress.steps:
                    # What follows only measures, and the checkpoint is complete.
                    signal.signal(signal.SIGINT, before)
    finally:
        signal.signal(signal.SIGINT, before)
