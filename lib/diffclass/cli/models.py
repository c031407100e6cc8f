"""Commands that train, ask and draw from the networks: train, classify, sample."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from diffclass.cli.base import (
    EXIT_CODES,
    MANY_PICTURES,
    MANY_STEPS,
    OK,
    Json,
    Seed,
    app,
    finite,
    is_first,
    sentence_of,
    shown,
)

Widths = Annotated[
    str | None, typer.Option(help="Channels of the network's levels, such as 16,32: for a dry run.")
]


def _train_one(name: str, folder: Path, options: dict) -> bool:
    """Train one network with a progress bar; whether it is complete."""
    from tqdm import tqdm

    from diffclass.training import train as training
    from diffclass.training.speed import Speed

    run = training.stoppable(training.train(name, folder, **options))
    costs = None
    first = None
    with (
        contextlib.closing(run),
        tqdm(desc=Path(name).stem, unit="step", file=sys.stderr, disable=not is_first()) as bar,
    ):
        for progress in run:
            first = first or progress
            bar.total = progress.steps
            bar.n = progress.step
            bar.initial = first.step - 1
            last = progress.step == progress.steps
            done = progress.step - first.step
            if done > 3 and progress.step % 10 and not last:
                continue  # reading the loss waits for the accelerator
            parts = [f"loss {progress.loss:.3f}", f"{progress.seconds:.0f} s in all"]
            if done >= 10:
                costs = costs or _costs(name, options["widths"])
                rate = (progress.images - first.images) / (progress.seconds - first.seconds)
                parts.append(str(Speed(rate, **costs)))
            if last:
                parts.append("measuring")
            bar.set_postfix_str(", ".join(parts))
    return progress.step == progress.steps


def _costs(name: str, widths: tuple[int, ...] | None) -> dict[str, float]:
    """What a step of a network costs, and what the chip could do, as `Speed` takes them."""
    from diffclass.training.recipes import RECIPES
    from diffclass.training.speed import matrix_peak, step_flops

    return dict(flops=step_flops(name, widths), peak=matrix_peak(RECIPES[name].precision))


@app.command(epilog=EXIT_CODES)
def train(
    ctx: typer.Context,
    world: Annotated[str, typer.Argument(help="What to train on: digits or cifar10.")],
    steps: Annotated[
        int | None,
        typer.Option(min=1, max=MANY_STEPS, help="Steps of each network, not the recipe's."),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, max=MANY_PICTURES, help="Images a step, not the recipe's."),
    ] = None,
    widths: Widths = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            callback=finite,
            help="Minutes of training of each network in place of steps: it ends annealed on any machine.",
        ),
    ] = None,
    pause: Annotated[
        float | None,
        typer.Option(min=0.01, callback=finite, help="Pause each network after these minutes."),
    ] = None,
    measured: Annotated[
        int | None,
        typer.Option(min=1, max=MANY_PICTURES, help="Test images behind the card's accuracy."),
    ] = None,
    teacher_only: Annotated[
        bool, typer.Option("--teacher-only", help="Do not train the student.")
    ] = False,
    method: Annotated[
        str,
        typer.Option(
            help="diffusion; contrastive: no teacher; idc, idc-small; cnn, wide, vit; jem; adversarial, "
            "adversarial-wide, adversarial-vit, adversarial-dc: on attacked images; tmdc, tmdc-contrastive: an adapter on "
            "attacked images; cohen, smoothadv, macer, consistency: on noised ones."
        ),
    ] = "diffusion",
    sigma: Annotated[
        float | None,
        typer.Option(callback=finite, help="Noise in pixels of a method that learns from it."),
    ] = None,
    student_only: Annotated[
        bool, typer.Option("--student-only", help="Copy the teacher that is there.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for the weights, not assets/.")] = None,
    seed: Seed = 0,
    json_wanted: Json = False,
):
    """Train a world's teacher and the student that copies it, or one network of another --method. Ctrl-C keeps what is
    done, and the same command goes on. `accelerate launch -m diffclass train ...` does it on several devices."""
    from diffclass.storage import assets, weights

    folder = out or assets.folder()
    ctx.obj.content |= dict(command="train", folder=str(folder), models=[])
    # Before the training, not after it, if it cannot be written.
    folder.mkdir(parents=True, exist_ok=True)
    options = dict(
        steps=steps,
        batch=batch,
        minutes=minutes,
        pause=pause,
        measured=measured,
        seed=seed,
        widths=_numbers(widths),
    )
    only = "student" if student_only else None
    only = "teacher" if teacher_only else only
    names = _names(world, method, sigma, only, folder)
    try:
        for name in names:
            if not _train_one(name, folder, options):
                ctx.obj.content["paused"] = str(folder / "checkpoints" / name)
                ctx.obj.say(f"{name}: paused after {pause:g} minutes; the same command goes on.")
                break
            card = weights.card(folder / name)
            ctx.obj.content["models"].append(dict(file=str(folder / name), card=card))
            ctx.obj.say(
                f"{name}: {weights.card_line(card)}, {card['images_seen']} images in {card['seconds']:.0f} s"
            )
    except KeyboardInterrupt:
        kept = folder / "checkpoints" / name
        ctx.obj.fail(
            f"stopped; the checkpoint {kept} is kept, and the same command resumes it."
            if kept.exists()
            else "stopped before the first step; nothing was begun."
        )
        raise


def _names(
    world: str, method: str, sigma: float | None, only: str | None, folder: Path
) -> list[str]:
    """The networks to train, in order."""
    from diffclass import units
    from diffclass.training import recipes
    from diffclass.training.train import remaining

    method = units.chosen(method, recipes.methods(), "the method")
    worlds = recipes.worlds_of(method)
    world = units.chosen(world, worlds, f"the world of --method {method}")
    sigmas = recipes.sigmas_of(world, method)
    if (sigma not in sigmas) if sigmas else (sigma is not None):
        among = f"one of {', '.join(f'{s:g}' for s in sigmas)}" if sigmas else "none"
        raise ValueError(
            f"expected --sigma with --method {method} as {among}, got {'none' if sigma is None else f'{sigma:g}'}."
        )
    files = recipes.files_of(world, method, sigma)
    if only is None:
        return remaining(files, folder)
    if len(files) == 1:
        raise ValueError(
            f"expected no --{only}-only with --method {method}, which trains one network alone."
        )
    return files[:1] if only == "teacher" else files[-1:]


def _numbers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        widths = tuple(int(part) for part in text.split(","))
    except ValueError:
        widths = ()
    if not widths or min(widths) < 4 or any(width % 4 for width in widths):
        raise ValueError(
            f"expected widths as multiples of 4 with commas between them, such as 16,32, got {text!r}."
        )
    return widths


@app.command(epilog=EXIT_CODES)
def classify(
    ctx: typer.Context,
    pictures: Annotated[list[str], typer.Argument(help="PNG, JPEG or WebP files.")],
    world: Annotated[
        str, typer.Option(help="What is in them: digits, or photographs (cifar10).")
    ] = "digits",
    model: Annotated[
        str | None, typer.Option(help="A network by name, such as contrastive.")
    ] = None,
    json_wanted: Json = False,
):
    """Name what is in each picture, among ten digits or ten kinds of things; a broken file does not stop the others."""
    from diffclass import units
    from diffclass.evaluation import judging
    from diffclass.zoo import networks

    answer = ctx.obj
    code = OK
    answer.content |= dict(command="classify", pictures=[])
    world = units.chosen(world, list(networks.MODELS), "the world of the pictures")
    judge = judging.Judge(world, model)
    answer.content |= dict(world=world, model=judge.model)
    for path in pictures:
        try:
            verdict = _judged(judge, path)
        except Exception as error:  # whatever it is, the next picture may be right
            code = max(code, answer.failed(error, about=path))
            verdict = dict(error=sentence_of(error))
        else:
            answer.say(f"{path}: {judging.described(verdict)}")
        answer.content["pictures"].append(dict(file=path, **verdict))
    raise typer.Exit(code)


def _judged(judge, path: str) -> dict:
    """The verdict on a picture; a bar shows the noise levels when it takes longer than a second."""
    from tqdm import tqdm

    with (
        contextlib.closing(judge.verdict(path)) as run,
        tqdm(
            desc=path, unit="level", delay=1, leave=False, file=sys.stderr, disable=not is_first()
        ) as bar,
    ):
        for done, total, latest in run:
            bar.total = total
            bar.update(done - bar.n)
            verdict = latest
    return verdict


@app.command(epilog=EXIT_CODES)
def sample(
    ctx: typer.Context,
    world: Annotated[str, typer.Argument(help="What to draw: cifar10.")],
    model: Annotated[str | None, typer.Option(help="A network by name, such as prototype.")] = None,
    per_class: Annotated[int, typer.Option(min=1, max=1000, help="Pictures of each class.")] = 4,
    out: Annotated[Path | None, typer.Option(help="Folder for the picture, not assets/.")] = None,
    seed: Seed = 0,
    json_wanted: Json = False,
):
    """Draw the gallery: generated pictures of every class, for readers who do not have CIFAR-10 at hand."""
    from diffclass import units
    from diffclass.data import gallery
    from diffclass.storage import assets
    from diffclass.training import drawing
    from diffclass.zoo import networks

    ctx.obj.content |= dict(command="sample")
    denoiser, name = networks.load(units.chosen(world, ("cifar10",), "the world to draw"), model)
    list(shown(drawing.draw(denoiser, name, per_class, seed, out), "sampling", unit="step"))
    path = (out or assets.folder()) / gallery.FILE
    ctx.obj.content |= dict(file=str(path), model=name, pictures=per_class * denoiser.num_classes)
    ctx.obj.say(f"{path}: {per_class * denoiser.num_classes} pictures by {name}")
