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
CERTIFY = (
    10_000,
    100_000,
)  # votes of a certificate: of diffusion classifiers in the literature, and of others


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
    store: Annotated[
        Path,
        typer.Option(
            help="Keep the votes of every picture here; resumable, with more pictures too."
        ),
    ],
    world: Annotated[
        str, typer.Option(help="digits, cifar10, gallery, hundred, or plane:NAME.")
    ] = "digits",
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
        typer.Option(
            help="anytime: stop when it is known; fixed: count all votes (Cohen); betting, bernstein or hoeffding: of soft "
            "votes, which are probabilities; betting stops as well."
        ),
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


@app.command("compare-votes", epilog=EXIT_CODES)
def compare_votes(
    ctx: typer.Context,
    sigma: Annotated[
        float, typer.Option(callback=finite, help="Smoothing noise, in pixels of [0,1].")
    ] = 0.25,
    world: Annotated[str, typer.Option(help="digits or cifar10.")] = "cifar10",
    only: Annotated[
        str | None, typer.Option(help="Names of classifiers, such as epndc,cohen; all there are.")
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32, or bf16 for the networks.")] = "fp32",
    together: Annotated[
        int, typer.Option(min=2, max=MANY_PICTURES, help="Votes that are asked together.")
    ] = 100,
    seconds: Annotated[
        float, typer.Option(min=0.01, max=3600, help="How long each is repeated.")
    ] = 2.0,
    seed: Seed = 0,
    json_wanted: Json = False,
):
    """Time a vote of each classifier of noised pictures, and what all votes of a certificate would take.

    The picture is the first test picture of the world, or one that a network drew where there is none. Nothing else should
    run meanwhile.
    """
    import torch

    from diffclass.data import cifar, gallery
    from diffclass.data.worlds import world_of
    from diffclass.device import device
    from diffclass.evaluation import timing
    from diffclass.zoo import noised

    answer = ctx.obj
    place = world_of(world)
    where = device()
    names = noised.names(world) if only is None else tuple(only.split(","))
    drawn = place.kind == "cifar10" and not cifar.cifar10_available()[0]
    picture = gallery.pictures()[0][:1] if drawn else place.test(1, seed)[0]
    built = {}
    missing = []
    for name in names:
        try:
            built[name] = noised.classifier(world, name, sigma).to(where)
        except (FileNotFoundError, ValueError) as error:
            if only is not None:
                raise
            missing.append(f"{name}: {error}")
    answer.content |= dict(
        command="compare-votes",
        world=place.name,
        sigma=sigma,
        precision=precision,
        together=together,
        device=where.type,
        machine=timing.processor(),
        threads=torch.get_num_threads(),
        missing=missing,
        classifiers=[],
    )
    answer.say(
        f"{place.name}, sigma {sigma:g}, {precision}, on {where.type} with {torch.get_num_threads()} threads: calls and seconds "
        f"of a vote, of one asked alone, and of {' and '.join(f'{n:,}' for n in CERTIFY)} votes (so many times a vote)"
    )
    run = timing.vote_timings(
        built,
        picture.to(where),
        sigma,
        together=together,
        precision=precision,
        seconds=seconds,
        seed=seed,
    )
    for row in run:
        whole = {str(votes): row.certify(votes) for votes in CERTIFY}
        answer.content["classifiers"].append({**asdict(row), "certify": whole})
        answer.say(
            f"  {row.name:18s} {row.calls:5d} {row.vote:10.6f} ({row.spread:.6f}) {row.alone:9.5f} "
            + " ".join(f"{taken:10.1f}" for taken in whole.values())
        )
    for sentence in missing:
        answer.say(f"  not timed: {sentence}")


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
