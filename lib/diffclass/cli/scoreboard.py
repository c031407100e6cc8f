"""The commands of the scoreboard: compare-costs measures what answers cost; scoreboard puts all records beside each other."""

from pathlib import Path
from typing import Annotated

import typer

from diffclass.cli.base import EXIT_CODES, OK, PROBLEM, Answer, Json, app, finite


@app.command("compare-costs", epilog=EXIT_CODES)
def compare_costs(
    ctx: typer.Context,
    world: Annotated[str, typer.Option(help="digits or cifar10.")] = "digits",
    only: Annotated[
        str | None, typer.Option(help="Names of classifiers, such as cnn,dc; all there are.")
    ] = None,
    sigma: Annotated[
        float, typer.Option(callback=finite, help="Noise of the classifiers of noised pictures.")
    ] = 0.25,
    seconds: Annotated[
        float, typer.Option(min=0.01, max=3600, help="How long each is repeated.")
    ] = 1.0,
    store: Annotated[
        Path | None,
        typer.Option(help="Also write the record to this .json file, as it grows; resumable."),
    ] = None,
    json_wanted: Json = False,
):
    """Count what one answer of each classifier costs: network calls, parameters, FLOP, and seconds on this machine.

    FLOP are counted by torch while the classifier answers, two for a multiply-add. The picture is the first test picture of
    the world, or one that a network drew where there is none. Seconds are those of the processor; how busy the machine was
    is part of the record, as caches and memory are shared.
    """
    from diffclass.data import cifar, gallery
    from diffclass.data.worlds import world_of
    from diffclass.device import device
    from diffclass.evaluation import costs

    answer = ctx.obj
    place = world_of(world)
    where = device()
    drawn = place.kind == "cifar10" and not cifar.cifar10_available()[0]
    picture = gallery.pictures()[0][:1] if drawn else place.test(1)[0]
    names = costs.all_names(world) if only is None else tuple(only.split(","))
    answer.content |= dict(command="compare-costs")
    answer.say(f"{place.name}, one picture: network calls, parameters, FLOP, seconds (spread)")
    content = costs.document(world, where.type, sigma, [])
    listed = [] if store is None else costs.begun(store, content)
    if listed:
        stored = ", ".join(cost.name for cost in listed)
        answer.say(f"  on record in {store}, not measured again: {stored}")
    left = tuple(name for name in names if name not in {cost.name for cost in listed})
    for cost in costs.measure(world, left, picture.to(where), sigma_pixel=sigma, seconds=seconds):
        listed.append(cost)
        if isinstance(cost, str):
            answer.say(f"  not measured: {cost}")
        else:
            answer.say(
                f"  {cost.name:18s} {cost.calls:6d} {cost.parameters:11,d} {cost.flop:18,d} {cost.seconds:10.5f} "
                f"({cost.spread:.5f})"
            )
        content = costs.document(world, where.type, sigma, listed)
        if store is not None:
            costs.keep(store, content)
    answer.content |= content


SHOWN = ("clean", "honest", "honest, worst of 10", "certified, r = 0.25", "flop")  # in a terminal
WIDTH = 24


@app.command(epilog=EXIT_CODES)
def scoreboard(
    ctx: typer.Context,
    world: Annotated[str, typer.Option(help="digits or cifar10.")] = "digits",
    by: Annotated[
        str, typer.Option(help="The column to sort by; what it lacks comes last.")
    ] = "honest",
    html: Annotated[
        Path | None, typer.Option(help="Also write all columns and figures to this .html file.")
    ] = None,
    json_wanted: Json = False,
):
    """Every classifier's numbers side by side, from the records alone; exit code 1 if a number has no record or source.

    Accuracies under attack are upper bounds, certified ones lower bounds. --json has every column with its source, all pairs
    of classifiers on the pictures that both were asked about, and what the literature claims. --html writes one page that
    needs no other file and no network.
    """
    from diffclass.evaluation import scoreboard

    answer = ctx.obj
    world = scoreboard.checked_world(world)
    answer.content |= dict(command="scoreboard", world=world)
    wrong = scoreboard.complaints(world)
    if wrong:
        answer.content |= dict(complaints=wrong)
        for sentence in wrong:
            answer.say(f"NO SOURCE  {sentence}")
        raise typer.Exit(PROBLEM)
    content = scoreboard.document(world)
    answer.content |= content
    _tell(answer, scoreboard.ranked(scoreboard.standings(world), by))
    if html is not None:
        from diffclass.course import plots
        from diffclass.storage import files

        files.write(html, plots.page(world))
        answer.say(f"all columns and figures: {html}")
    raise typer.Exit(OK)


def _tell(answer: Answer, rows: list) -> None:
    """The table for a terminal."""
    from diffclass.evaluation import scoreboard

    kinds = {measure.title: measure for measure in scoreboard.measures()}
    answer.say(f"{'':36}" + "".join(f"{title:{WIDTH}}" for title in SHOWN))
    for row in rows:
        cells = [scoreboard.spoken(row.numbers[title], kinds[title]) for title in SHOWN]
        answer.say(f"{row.title[:34]:36}" + "".join(f"{cell:{WIDTH}}" for cell in cells).rstrip())
