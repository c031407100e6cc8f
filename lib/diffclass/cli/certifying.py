"""The command that certifies: votes under noise, picture by picture, and how their certificates are verified."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from diffclass.cli.base import (
    EXIT_CODES,
    MANY_PICTURES,
    OK,
    PROBLEM,
    VERSION,
    Answer,
    Json,
    Seed,
    app,
    finite,
    watched,
)

MANY_VOTES = 10_000_000


def _radii(text: str) -> tuple[float, ...]:
    """Radii as they are written, with commas between them."""
    try:
        radii = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"expected radii with commas between them, such as 0.25,0.5, got {text!r}."
        ) from None
    for radius in radii:
        finite(radius)
    return radii


@app.command(epilog=EXIT_CODES)
def certify(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="CLASSIFIER", help="A name of `diffclass list`.")],
    sigma: Annotated[
        float,
        typer.Option(callback=finite, help="Smoothing noise, in pixels of [0,1]."),
    ],
    store: Annotated[Path, typer.Option(help="Keep the votes of every picture here; resumable.")],
    world: Annotated[str, typer.Option(help="digits, cifar10, gallery, or plane:NAME.")] = "digits",
    limit: Annotated[
        int | None,
        typer.Option(min=1, max=MANY_PICTURES, help="Of the first so many test pictures; all."),
    ] = None,
    every: Annotated[
        int, typer.Option(min=1, max=MANY_PICTURES, help="Only every so-manieth of them.")
    ] = 1,
    alpha: Annotated[
        float, typer.Option(callback=finite, help="Chance that a certificate is wrong, at most.")
    ] = 0.001,
    votes: Annotated[
        int, typer.Option(min=1, max=MANY_VOTES, help="Votes on one picture, at most.")
    ] = 10_000,
    selection: Annotated[
        int, typer.Option(min=1, max=MANY_VOTES, help="Votes before, that choose its class.")
    ] = 100,
    bound: Annotated[
        str,
        typer.Option(help="anytime: stop when it is known; fixed: count all votes (Cohen)."),
    ] = "anytime",
    radii: Annotated[
        str, typer.Option(help="L2 radii that are wanted, in pixels, such as 0.25,0.5.")
    ] = "0.25,0.5,0.75,1",
    precision: Annotated[
        str, typer.Option(help="fp32, or bf16: then the classifier in bf16 is certified.")
    ] = "fp32",
    together: Annotated[
        int, typer.Option(min=1, max=MANY_PICTURES, help="Votes at once: less needs less memory.")
    ] = 100,
    seed: Seed = 0,
    json_wanted: Json = False,
):
    """Certify a classifier by randomised smoothing: how far each picture may move in L2 and the answer stands.

    Any classifier of `diffclass list` will do: one that was made for noised pictures is asked about them, another about noised
    pictures that were clamped. Every certificate is a lower bound that is wrong with a chance of at most alpha. The counts of
    every picture are kept in --store, for `diffclass verify`; the same command goes on where it was stopped, and `accelerate
    launch -m diffclass certify ...` shares the pictures between processes.
    """
    from diffclass.data.worlds import world_of
    from diffclass.evaluation import certification
    from diffclass.zoo import noised

    answer = ctx.obj
    plan = certification.Plan(sigma, alpha, bound, selection, votes, _radii(radii))
    place = world_of(world)
    classifier = noised.classifier(world, name, sigma)
    images, labels = place.test(limit, seed)
    wanted = len(certification.picked(len(images), every))
    answer.content |= dict(
        command="certify",
        world=place.name,
        classifier=name,
        sigma=sigma,
        images=wanted,
        records=[],
    )
    answer.say(
        f"{wanted} pictures of {place.name}, sigma {sigma:g}: at most {selection + votes:,} votes each, of up to "
        f"{classifier.calls:,} network calls; ceiling of the radius {plan.ceiling:.3f}."
    )
    run = certification.certify(
        classifier,
        images,
        labels,
        plan,
        store,
        dict(
            world=place.name,
            classifier=noised.entry_of(world, name).name,
            version=VERSION,
            checkpoints=noised.checkpoints(world, name, sigma),
        ),
        every=every,
        precision=precision,
        together=together,
        seed=seed,
    )
    list(watched(run, f"{name}, sigma {sigma:g}", wanted, lambda item: f"{item.votes} votes"))
    done = certification.read(store)
    if len(done.rows) < wanted:
        answer.say(
            "the other processes have not finished their pictures; the last one writes the records."
        )
        return
    listed = certification.records_of(done)
    certification.keep(store, listed)
    for result in listed:
        answer.content["records"].append({**asdict(result), "what": result.what})
        answer.say(f"{result.what}: {result}")


def verify_certificates(answer: Answer, folder: Path, sampled: int, seed: int) -> None:
    """Check what `certify` has left in a folder; ends with exit code 1 if it does not stand."""
    from diffclass.data.worlds import world_of
    from diffclass.evaluation import certification
    from diffclass.zoo import noised

    run = certification.read(folder)
    claimed = certification.kept(folder)
    settings = run.settings
    place = world_of(settings["world"])
    name = settings["classifier"]
    sigma = run.plan.sigma_pixel
    images, labels = place.test(settings["n"], settings["seed"])
    checked = certification.verify(
        noised.classifier(place.name, name, sigma),
        images,
        labels,
        run,
        noised.checkpoints(place.name, name, sigma),
        claimed,
        seed=seed,
        recount=sampled,
        reattack=sampled,
    )
    answer.content |= dict(command="verify", folder=str(folder), seed=seed)
    *_, state = watched(checked, name, 2 * sampled, lambda item: f"{len(item.faults)} faults")
    for result in claimed:
        answer.say(f"{result.what}: {result}")
    answer.say(f"checked with the seed {seed}:")
    for title, sentences in (("SEEN", state.seen), ("WRONG", state.faults)):
        for sentence in sentences:
            answer.say(f"{title:10} {sentence}")
    stands = not state.faults
    answer.content |= dict(
        stands=stands,
        images=state.total,
        faults=list(state.faults),
        established=list(state.seen),
        recounted=state.recounted,
        attacked_again=state.attacked,
        records=[{**asdict(record), "what": record.what} for record in claimed],
    )
    verdict = "stands" if stands else "does not stand"
    answer.say(
        f"{verdict}: {state.total} certificates, {state.recounted} counted again, {state.attacked} attacked, "
        f"{len(state.faults)} faults."
    )
    raise typer.Exit(OK if stands else PROBLEM)
