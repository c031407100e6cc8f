"""The command that judges a defence before it is believed: audit."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from diffclass.cli.base import EXIT_CODES, OK, PROBLEM, Json, Seed, app

WIDTH = 100  # of a line of evidence


def _line(made) -> str:
    import textwrap

    head = f"{made.light:6}{made.number:3} {made.name}  "
    body = textwrap.fill(made.evidence, WIDTH, initial_indent=" " * 10, subsequent_indent=" " * 10)
    advice = textwrap.fill(
        f"-> {made.advice}", WIDTH, initial_indent=" " * 10, subsequent_indent=" " * 13
    )
    return "\n".join([f"{head}({made.seconds:.1f} s)", body] + [advice] * (made.light == "red"))


def _stored(folder: Path | None) -> dict:
    """What a folder of a run under attack adds to a case: the numbers that were reported, not those that would be."""
    if folder is None:
        return {}
    from diffclass.evaluation import claims, robustness

    found = robustness.read(folder)
    if found.finished < found.settings["n"]:
        raise ValueError(
            f"expected a finished run in {folder}, got {found.finished} of {found.settings['n']} images; "
            "`diffclass evaluate` goes on with it."
        )
    return dict(records=claims.kept(folder), rows=found.rows, deltas=found.deltas)


def _case(
    world: str,
    name: str,
    stored: dict,
    fresh: bool,
    images: int,
    norm: str,
    epsilon: float | None,
    **options,
):
    """The defence with its images and its transfer source; stored perturbations bring their norm, budget and number."""
    import torch

    from diffclass import audit, zoo

    if stored:
        protocol = stored["records"][0].settings["protocol"]
        if protocol["defence"] != name.lower():
            raise ValueError(
                f"expected perturbations of {name}, got those of {protocol['defence']}."
            )
        norm = protocol["norm"]
        epsilon = protocol["epsilon"]
        images = min(images, len(stored["rows"]))
        fresh = (
            fresh or stored["records"][0].settings["draws"] > 1
        )  # the claim is about the random defence
    x, y = zoo.images(world, images, options["seed"])
    classifier = zoo.defence(
        world,
        name,
        seed=options["seed"],
        fresh=torch.Generator().manual_seed(options["seed"]) if fresh else None,
    )
    plain = "cnn" in zoo.NAMES.get(world, ()) and name != "cnn"
    sources = {"the plain network": zoo.defence(world, "cnn")} if plain else {}
    epsilon = zoo.budget(world, norm) if epsilon is None else epsilon
    return audit.case_of(classifier, x, y, epsilon, norm, sources=sources, **stored, **options)


@app.command(epilog=EXIT_CODES)
def audit(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="The defence, such as dc, idc or diffpure.")],
    world: Annotated[str, typer.Option(help="digits, cifar10, or plane:moons.")] = "digits",
    images: Annotated[int, typer.Option(min=1, help="The first test images.")] = 64,
    norm: Annotated[str, typer.Option(help="linf or l2")] = "linf",
    epsilon: Annotated[
        float | None, typer.Option(help="Budget in pixels of [0,1], not the world's.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the attack.")] = 20,
    starts: Annotated[
        int, typer.Option(min=1, help="Starts of the attack: the image, then random.")
    ] = 2,
    draws: Annotated[int, typer.Option(min=1, help="Gradients averaged a step (EOT).")] = 1,
    fresh: Annotated[bool, typer.Option("--fresh", help="Fresh noise at every call.")] = False,
    records: Annotated[
        Path | None, typer.Option(help="Folder of a run under attack to audit.")
    ] = None,
    statement: Annotated[
        str, typer.Option(help="What would break this defence, and what was tried.")
    ] = "",
    only: Annotated[str | None, typer.Option(help="Numbers of checks, such as 1,2,13.")] = None,
    seed: Seed = 0,
    json_wanted: Json = False,
):
    """Judge a claim of robustness by 36 checks, each a light with its evidence; a red one ends with exit code 1."""
    from diffclass import audit as auditing

    answer = ctx.obj
    answer.content |= dict(command="audit", defence=name, world=world, checks=[])
    case = _case(
        world,
        name,
        _stored(records),
        fresh,
        images,
        norm,
        epsilon,
        steps=steps,
        starts=starts,
        draws=draws,
        statement=statement,
        seed=seed,
    )
    answer.content |= dict(images=len(case.x), norm=case.norm, epsilon=case.epsilon, seed=seed)
    lights = []
    for made in auditing.run(case, _numbers(only)):
        lights.append(made.light)
        answer.content["checks"].append(asdict(made))
        answer.say(_line(made))
    counts = {light: lights.count(light) for light in auditing.LIGHTS}
    answer.content |= dict(lights=counts, ok=not counts["red"])
    answer.say(", ".join(f"{count} {light}" for light, count in counts.items()))
    raise typer.Exit(PROBLEM if counts["red"] else OK)


def _numbers(text: str | None) -> list[int] | None:
    if text is not None and not all(part.strip().isdigit() for part in text.split(",")):
        raise ValueError(
            f"expected numbers of checks with commas between them, such as 1,2,13, got {text!r}."
        )
    return None if text is None else [int(part) for part in text.split(",")]
