"""The command that judges a classifier before it is believed: audit."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from diffclass.cli.base import (
    EXIT_CODES,
    MANY_DRAWS,
    MANY_PICTURES,
    MANY_STEPS,
    OK,
    PROBLEM,
    Epsilon,
    Json,
    Seed,
    app,
)

WIDTH = 100  # of a line of evidence


def _line(result) -> str:
    import textwrap

    indent = " " * 10
    lines = [
        f"{result.light:6}{result.number:3} {result.name}  ({result.seconds:.1f} s)",
        textwrap.fill(result.evidence, WIDTH, initial_indent=indent, subsequent_indent=indent),
    ]
    if result.light == "red":
        advice = f"-> {result.advice}"
        further = indent + " " * 3
        lines.append(textwrap.fill(advice, WIDTH, initial_indent=indent, subsequent_indent=further))
    return "\n".join(lines)


def _stored(folder: Path | None, place, name: str):
    """A finished run under attack of this classifier, or None: the numbers that were reported, not those that would be."""
    if folder is None:
        return None
    from diffclass.evaluation import runs

    run = runs.read(folder)
    settings = run.settings
    if run.finished < settings["n"]:
        raise ValueError(
            f"expected a finished run in {folder}, got {run.finished} of {settings['n']} images; "
            "`diffclass evaluate` goes on with it."
        )
    if settings["classifier"] != name.lower():
        raise ValueError(
            f"expected perturbations of {name}, got those of {settings['classifier']}."
        )
    if settings["world"] != place.name:
        raise ValueError(
            f"expected perturbations of images of {place.name}, got those of {settings['world']}; name it with --world."
        )
    return run


def _attack(name: str, norm: str):
    """The function of an attack by name."""
    from diffclass import zoo

    entry = zoo.attack(name)
    if norm not in entry.norms:
        raise ValueError(
            f"expected a norm of {', '.join(entry.norms)} for {entry.name}, got {norm!r}."
        )
    told = not entry.own_loss and entry.steps is None
    if not told or entry.prior:
        raise ValueError(
            "expected an attack that can be told its loss and its steps, such as pgd or apgd, and climbs whatever it is "
            f"given, got {entry.name}."
        )
    return entry.run


def _case(
    world: str,
    name: str,
    records: Path | None,
    images: int,
    norm: str,
    epsilon: float | None,
    attack: str,
    fresh: bool,
    seed: int,
    **options,
):
    """The classifier with its images and its transfer source; stored perturbations bring their norm, budget and images."""
    from diffclass import audit, zoo
    from diffclass.data import worlds
    from diffclass.device import device
    from diffclass.evaluation import claims

    place = worlds.world_of(world)
    where = device()
    run = _stored(records, place, name)
    classifier = zoo.classifier(world, name).to(where)
    if fresh and classifier.deterministic:
        raise ValueError(f"expected no --fresh for {name}, which draws no noise.")
    if run is None:
        x, y = place.test(images, seed)
        norm = norm.lower()
        epsilon = place.budget(norm) if epsilon is None else epsilon
    else:
        whole = place.test(run.settings["n"], run.settings["seed"])
        x, y = (part[:images] for part in whole)
        norm = run.protocol.norm
        epsilon = run.protocol.epsilon
        options |= dict(records=claims.kept(records), rows=run.rows, deltas=run.deltas)
    sources = {}
    if "cnn" in zoo.names(world) and name.lower() != "cnn":
        sources["the plain network"] = zoo.classifier(world, "cnn").to(where)
    return audit.case_of(
        classifier,
        x.to(where),
        y.to(where),
        epsilon,
        norm,
        held=not fresh and run is None,  # stored runs are about new noise at every call
        attack=_attack(attack, norm),
        sources=sources,
        seed=seed,
        compiled=True,
        training=_training(place),
        **options,
    )


def _training(place):
    """What gives the training pictures of a world that has a fixed set of them, or None."""
    if place.law is not None or place.name.startswith("gallery"):
        return None
    from diffclass.data import worlds

    return lambda: worlds.images_of(place.kind, "train")[0]


@app.command(epilog=EXIT_CODES)
def audit(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="A classifier by name, such as dc, idc or diffpure.")],
    world: Annotated[
        str, typer.Option(help="digits, cifar10, hundred, or plane:moons.")
    ] = "digits",
    images: Annotated[
        int, typer.Option(min=1, max=MANY_PICTURES, help="The first test images.")
    ] = 64,
    norm: Annotated[str, typer.Option(help="linf or l2")] = "linf",
    epsilon: Epsilon = None,
    attack: Annotated[str, typer.Option(help="An attack by name, such as apgd or pgd.")] = "apgd",
    steps: Annotated[int, typer.Option(min=1, max=MANY_STEPS, help="Steps of the attack.")] = 20,
    starts: Annotated[
        int,
        typer.Option(min=1, max=MANY_DRAWS, help="Starts of the attack: the image, then random."),
    ] = 2,
    draws: Annotated[
        int, typer.Option(min=1, max=MANY_DRAWS, help="Gradients averaged a step (EOT).")
    ] = 1,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="New noise at every call, not one that is held.")
    ] = False,
    records: Annotated[
        Path | None, typer.Option(help="Folder of a run under attack to audit.")
    ] = None,
    statement: Annotated[
        str, typer.Option(help="What would break this classifier, and what was tried.")
    ] = "",
    only: Annotated[str | None, typer.Option(help="Numbers of checks, such as 1,2,13.")] = None,
    seed: Seed = 0,
    json_wanted: Json = False,
):
    """Judge a claim of robustness by 40 checks, each a light with its evidence; a red one ends with exit code 1."""
    from diffclass import audit as auditing

    answer = ctx.obj
    answer.content |= dict(command="audit", classifier=name, world=world, checks=[])
    case = _case(
        world,
        name,
        records,
        images,
        norm,
        epsilon,
        attack,
        fresh,
        seed,
        steps=steps,
        starts=starts,
        draws=draws,
        statement=statement,
    )
    numbers = _numbers(only)
    count = len(auditing.chosen(numbers))
    calls = auditing.calls(case, numbers)
    seconds = _seconds(case, numbers)
    answer.content |= dict(
        images=len(case.x),
        norm=case.norm,
        epsilon=case.epsilon,
        attack=attack,
        held=case.held,
        seed=seed,
        calls=calls,
        seconds=seconds,
    )
    answer.say(
        f"{count} checks of {name} on {len(case.x)} images of {world}: at most about {calls:,} classifier calls (network "
        f"calls in each: up to {case.classifier.calls:,}), {_spoken(seconds)}."
    )
    lights = []
    for result in auditing.run(case, numbers):
        lights.append(result.light)
        answer.content["checks"].append(asdict(result))
        answer.say(_line(result))
    counts = {light: lights.count(light) for light in auditing.LIGHTS}
    answer.content |= dict(lights=counts, ok=not counts["red"])
    answer.say(", ".join(f"{count} {light}" for light, count in counts.items()))
    raise typer.Exit(PROBLEM if counts["red"] else OK)


def _seconds(case, numbers: list[int] | None) -> float | None:
    """How long the checks will take at most, or None for a classifier that cannot even be asked: they will say why."""
    from diffclass import audit as auditing

    try:
        return auditing.seconds(case, numbers)
    except Exception:
        return None


def _spoken(seconds: float | None) -> str:
    """A time as a reader plans it: in seconds up to two minutes, then in minutes, and what is not in it."""
    if seconds is None:
        return "whose time cannot be told, as the first of them failed"
    time = f"{max(1, round(seconds))} s" if seconds < 120 else f"{round(seconds / 60)} min"
    return f"about {time} here, and up to a minute to compile it (check 38)"


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise ValueError(
            f"expected numbers of checks with commas between them, such as 1,2,13, got {text!r}."
        )
    return [int(part) for part in parts]
