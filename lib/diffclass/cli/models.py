"""Commands that train, ask, draw from and measure the networks: train, classify, sample, evaluate."""

import contextlib
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from diffclass import assets
from diffclass.cli.base import BAD_INPUT, EXIT_CODES, FAILURES, OK, Json, Seed, app, is_first, sentence_of

IDC = "digits-idc.safetensors"
Widths = Annotated[str | None, typer.Option(help="Channels of the U-Net's levels, such as 16,32: for a dry run.")]


def _train_one(name: str, folder: Path, minutes: float | None, options: dict) -> bool:
    """Train one network with a progress bar; whether it is complete."""
    from tqdm import tqdm

    from diffclass import trainers, translation_training

    if name == IDC:
        run = translation_training.train_translation(name, folder, options["steps"], options["seed"])
    else:
        run = trainers.train(name, folder, minutes=minutes, **options)
    run, speed, first = trainers.stoppable(run), None, None
    with contextlib.closing(run), tqdm(desc=name.partition(".")[0], unit="step", file=sys.stderr,
                                       disable=not is_first()) as bar:
        for progress in run:
            first = first or progress
            bar.total, bar.n, bar.initial = progress.steps, progress.step, first.step - 1
            last, done = progress.step == progress.steps, progress.step - first.step
            if done > 3 and progress.step % 10 and not last:
                continue  # reading the loss waits for the accelerator
            if name.startswith("cifar10") and done >= 10:
                rate = (progress.images - first.images) / (progress.seconds - first.seconds)
                speed = replace(speed, images=rate) if speed else trainers.Speed(
                    rate, trainers.step_flops(name, options["widths"]),
                    trainers.matrix_peak(trainers.RECIPES[name].precision))
            bar.set_postfix_str(f"loss {progress.loss:.3f}, {progress.seconds:.0f} s in all"
                                + (f", {speed}" if speed else "") + ", measuring" * last)
    return progress.step == progress.steps


@app.command(epilog=EXIT_CODES)
def train(ctx: typer.Context, world: Annotated[str, typer.Argument(help="What to train on: digits or cifar10.")],
          steps: Annotated[int | None, typer.Option(min=1, help="Steps of each network, not the recipe's.")] = None,
          batch: Annotated[int | None, typer.Option(min=1, help="Images a step, not the recipe's.")] = None,
          widths: Widths = None,
          minutes: Annotated[float | None, typer.Option(min=0.01, help="Pause each network after this time.")] = None,
          measured: Annotated[int | None, typer.Option(min=1, help="Test images behind the card's accuracy.")] = None,
          teacher_only: Annotated[bool, typer.Option("--teacher-only", help="Do not train the student.")] = False,
          method: Annotated[str, typer.Option(help="diffusion, or idc: translation into label pictures (digits).")
                            ] = "diffusion",
          student_only: Annotated[bool, typer.Option("--student-only", help="Copy the teacher that is there.")] = False,
          out: Annotated[Path | None, typer.Option(help="Folder for the weights, not assets/.")] = None,
          seed: Seed = 0, json_wanted: Json = False):
    """Train a world's networks: a teacher, then the student that copies it. Ctrl-C keeps what is done, and the same
    command goes on. `accelerate launch -m diffclass train ...` does it on several devices."""
    from diffclass import recipes, trainers

    folder = out or assets.folder()
    ctx.obj.content |= dict(command="train", folder=str(folder), models=[])
    world = recipes.chosen(world, ("digits", "cifar10"), "the world to train on")
    folder.mkdir(parents=True, exist_ok=True)  # before the training, not after it, if it cannot be written
    options = dict(steps=steps, batch=batch, measured=measured, seed=seed, widths=_numbers(widths))
    if recipes.chosen(method, ("diffusion", "idc"), "the method") == "idc":
        recipes.chosen(world, ("digits",), "the world of --method idc")
        if teacher_only or student_only or minutes or widths or batch or measured:
            raise ValueError("expected no other option than --steps, --out and --seed with --method idc.")
    only = "teacher" if teacher_only else "student" if student_only else None
    try:
        for name in [IDC] if method == "idc" else trainers.remaining(world, folder, only):
            if not _train_one(name, folder, minutes, options):
                ctx.obj.content["paused"] = str(folder / "checkpoints" / name)
                ctx.obj.say(f"{name}: paused after {minutes:g} minutes; the same command goes on.")
                break
            card = recipes.card(folder / name)
            ctx.obj.content["models"].append(dict(file=str(folder / name), card=card))
            ctx.obj.say(f"{name}: {recipes.card_line(card)}, {card['images_seen']} images in {card['seconds']:.0f} s")
    except KeyboardInterrupt:
        kept = next((folder / "checkpoints").glob("*.safetensors"), None)
        ctx.obj.fail(f"stopped; the checkpoint {kept} is kept, and the same command resumes it." if kept else
                     "stopped before the first step; nothing was begun.")
        raise


def _numbers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 4 or any(width % 4 for width in found):
        raise ValueError(f"expected widths as multiples of 4 with commas between them, such as 16,32, got {text!r}.")
    return found


@app.command(epilog=EXIT_CODES)
def classify(ctx: typer.Context, pictures: Annotated[list[str], typer.Argument(help="PNG, JPEG or WebP files.")],
             model: Annotated[str, typer.Option(help="student or teacher")] = "student", json_wanted: Json = False):
    """Name the digit in each picture; a broken file does not stop the others."""
    from diffclass import recipes

    answer, failed = ctx.obj, 0
    answer.content |= dict(command="classify", model=model, pictures=[])
    judge = recipes.judge(recipes.chosen(model, recipes.MODELS["digits"], "the model"))
    for path in pictures:
        try:
            verdict = judge(path)
        except FAILURES as error:
            failed += 1
            verdict = dict(error=sentence_of(error))
            print(f"diffclass: {path}: {verdict['error']}", file=sys.stderr, flush=True)
        else:
            answer.say(f"{path}: {recipes.described(verdict)}")
        answer.content["pictures"].append(dict(file=path, **verdict))
    raise typer.Exit(BAD_INPUT if failed else OK)


@app.command(epilog=EXIT_CODES)
def sample(ctx: typer.Context, world: Annotated[str, typer.Argument(help="What to draw: cifar10.")],
           model: Annotated[str | None, typer.Option(help="student, teacher or prototype.")] = None,
           per_class: Annotated[int, typer.Option(min=1, help="Pictures of each class.")] = 4,
           out: Annotated[Path | None, typer.Option(help="Folder for the picture, not assets/.")] = None,
           seed: Seed = 0, json_wanted: Json = False):
    """Draw the gallery: generated pictures of every class, for readers who do not have CIFAR-10 at hand."""
    from diffclass import gallery, recipes
    from diffclass.denoisers import network

    ctx.obj.content |= dict(command="sample")
    name = recipes.available_model(recipes.chosen(world, ("cifar10",), "the world to draw"), model)
    denoiser = network.load_denoiser(assets.verified(name))[0]
    list(_shown(gallery.draw(denoiser, name, per_class, seed, out), "sampling", unit="step"))
    path = (out or assets.folder()) / gallery.FILE
    ctx.obj.content |= dict(file=str(path), model=name, pictures=per_class * denoiser.num_classes)
    ctx.obj.say(f"{path}: {per_class * denoiser.num_classes} pictures by {name}")


@app.command(epilog=EXIT_CODES)
def evaluate(ctx: typer.Context,
             world: Annotated[str, typer.Option(help="digits, cifar10, gallery, or plane:NAME.")] = "digits",
             model: Annotated[str | None, typer.Option(help="student, teacher or (cifar10) prototype.")] = None,
             limit: Annotated[int | None, typer.Option(min=1, help="Pictures; all of them, or 1000 points.")] = None,
             levels: Annotated[int, typer.Option(min=1, help="Noise levels.")] = 16,
             weighting: Annotated[str, typer.Option(help="A name of noise.WEIGHTINGS.")] = "ELBO",
             store: Annotated[Path | None, typer.Option(help="Keep each picture's losses here; resumable.")] = None,
             batch: Annotated[int, typer.Option(min=1, help="Pictures at once.")] = 8,
             precision: Annotated[str, typer.Option(help="fp32, or bf16 for the network.")] = "fp32",
             record: Annotated[Path | None, typer.Option(help="Append the result to this .jsonl file.")] = None,
             seed: Seed = 0, json_wanted: Json = False):
    """Measure an accuracy, with its 95 % interval; on the plane next to the best that any classifier can reach.

    With --store the losses of every picture are kept, and every weighting is reported; it can be stopped, resumed, and
    shared by processes with `accelerate launch -m diffclass evaluate ...`.
    """
    from diffclass import measuring, recipes

    answer = ctx.obj
    answer.content |= dict(command="evaluate", records=[])
    recipes.chosen(precision, ("fp32", "bf16"), "the precision")
    trial = recipes.evaluation(world, model, limit, levels, weighting, seed)
    if store is None:
        run = recipes.hits(trial.classifier, trial.images, trial.labels, batch)
        *_, (correct, _) = _shown(run, world, len(trial.labels))
        found = recipes.records(trial, correct, seed)
    else:
        run = measuring.measure(trial.classifier, trial.images, trial.labels, store,
                                recipes.store_settings(trial, seed, precision), batch=batch, precision=precision)
        list(_shown(run, world))
        found = recipes.stored_records(trial, measuring.read(store), seed)
    for result in found:
        answer.content["records"].append(asdict(result))
        answer.say(f"{result.what}: {result}")
        if record:
            result.append(record)


def _shown(run, what: str, total: int | None = None, unit: str = "picture"):
    """The same items behind a progress bar: (correct, seen) of `total` pictures, or (done, total)."""
    from tqdm import tqdm

    with contextlib.closing(run), tqdm(desc=what, unit=unit, total=total, file=sys.stderr,
                                              disable=not is_first()) as bar:
        for first, second in run:
            done, bar.total = (second, total) if total else (first, second)
            if total:
                bar.set_postfix_str(f"{first / second:.1%} correct")
            bar.update(done - bar.n)
            yield first, second
