"""Commands that measure: evaluate, on clean images or under attack, and verify what an attack has left."""

import contextlib
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from diffclass.cli.base import EXIT_CODES, OK, PROBLEM, VERSION, Json, Seed, app, is_first, shown


@app.command(epilog=EXIT_CODES)
def evaluate(
    ctx: typer.Context,
    world: Annotated[str, typer.Option(help="digits, cifar10, gallery, or plane:NAME.")] = "digits",
    model: Annotated[
        str | None, typer.Option(help="A network by name, such as contrastive.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Pictures; all of them, or 1000 points.")
    ] = None,
    levels: Annotated[int, typer.Option(min=1, help="Noise levels.")] = 16,
    weighting: Annotated[str, typer.Option(help="A name of noise.WEIGHTINGS.")] = "ELBO",
    attack: Annotated[
        str | None, typer.Option(help="Protocol of an attack: paper or honest.")
    ] = None,
    defence: Annotated[str, typer.Option(help="What is attacked: a name of zoo.NAMES.")] = "dc",
    norm: Annotated[str, typer.Option(help="Norm of an attack's budget: linf or l2.")] = "linf",
    epsilon: Annotated[
        float | None, typer.Option(help="Budget in pixels of [0,1], not the world's.")
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="Keep losses or perturbations here; resumable.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Pictures at once: 8, or 64 attacked.")
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32, or bf16 for the network.")] = "fp32",
    record: Annotated[
        Path | None, typer.Option(help="Append the result to this .jsonl file.")
    ] = None,
    seed: Seed = 0,
    json_wanted: Json = False,
):
    """Measure an accuracy, with its 95 % interval; on the plane next to the best that any classifier can reach.

    With --store the losses of every picture are kept, and every weighting is reported; it can be stopped, resumed, and
    shared by processes with `accelerate launch -m diffclass evaluate ...`. With --attack a defence is attacked, and the
    strongest perturbation of every picture is kept in --store, for `diffclass verify`.
    """
    answer = ctx.obj
    answer.content |= dict(command="evaluate", records=[])
    if attack is None:
        found = _clean(world, model, limit, levels, weighting, store, batch or 8, precision, seed)
    elif model is not None or (levels, weighting, precision) != (16, "ELBO", "fp32"):
        raise ValueError(
            "expected no --model, --levels, --weighting or --precision with --attack: the defence's name "
            "decides them."
        )
    else:
        found = _attacked(world, attack, defence, norm, epsilon, limit, store, batch or 64, seed)
    for result in found:
        answer.content["records"].append(asdict(result))
        answer.say(f"{result.what}: {result}")
        if record:
            result.append(record)


def _clean(world, model, limit, levels, weighting, store, batch, precision, seed) -> list:
    """The records of an accuracy on clean images."""
    from diffclass.evaluation import accuracies, measuring
    from diffclass.zoo import networks

    networks.chosen(precision, ("fp32", "bf16"), "the precision")
    trial = accuracies.evaluation(world, model, limit, levels, weighting, seed)
    if store is None:
        run = accuracies.hits(trial.classifier, trial.images, trial.labels, batch)
        *_, (correct, _) = shown(run, world, len(trial.labels))
        return accuracies.records(trial, correct, seed)
    run = measuring.measure(
        trial.classifier,
        trial.images,
        trial.labels,
        store,
        accuracies.store_settings(trial, seed, precision),
        batch=batch,
        precision=precision,
    )
    list(shown(run, world))
    return accuracies.stored_records(trial, measuring.read(store), seed)


def _attacked(world, attack, defence, norm, epsilon, limit, store, batch, seed) -> list:
    """The records of an accuracy under attack, which are also left in the folder `store`."""
    from accelerate import Accelerator

    from diffclass import zoo
    from diffclass.evaluation import claims, protocols, robustness
    from diffclass.zoo import networks

    if store is None:
        raise ValueError(
            "expected --store FOLDER with --attack: the perturbations are kept there, to be verified."
        )
    protocol = networks.chosen(
        attack, {"paper": protocols.paper, "honest": protocols.honest}, "the attack"
    )
    budget = zoo.budget(world, norm) if epsilon is None else epsilon
    classifier = zoo.defence(world, defence, seed=seed).to(Accelerator().device)
    images, labels = zoo.images(world, limit, seed)
    chosen = protocol(defence.lower(), norm.lower(), budget, classes=classifier.num_classes)
    own = dict(world=world, version=VERSION, checkpoints=zoo.checkpoints(world, chosen.defence))
    run = robustness.run(classifier, images, labels, chosen, store, own, seed=seed, batch=batch)
    list(_watched(run, f"{defence}, {chosen.name}", len(images)))
    found = claims.records(robustness.read(store))
    claims.keep(store, found)
    return found


def _watched(run, what: str, total: int):
    """The same items behind a progress bar, which names the attack that was last finished."""
    from tqdm import tqdm

    with (
        contextlib.closing(run),
        tqdm(
            desc=what, unit="picture", total=total, file=sys.stderr, disable=not is_first()
        ) as bar,
    ):
        for item in run:
            bar.set_postfix_str(getattr(item, "attack", ""))
            bar.update(item.images - bar.n)
            yield item


@app.command(epilog=EXIT_CODES)
def verify(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(help="What `evaluate --attack ... --store` has left.")],
    json_wanted: Json = False,
):
    """Check a claim of robustness by its stored perturbations: one pass, no attack; exit code 1 if it does not hold."""
    from accelerate import Accelerator

    from diffclass import zoo
    from diffclass.evaluation import claims, robustness

    answer = ctx.obj
    answer.content |= dict(command="verify", folder=str(folder))
    found = robustness.read(folder)
    claimed = claims.kept(folder)
    world = found.settings["world"]
    name = found.protocol.defence
    seed = found.settings["seed"]
    n = found.settings["n"]
    images, labels = zoo.images(world, n, seed)
    defence = zoo.defence(world, name, seed=seed).to(Accelerator().device)
    weights = zoo.checkpoints(world, name)
    run = claims.verify(defence, images, labels, found, weights, claimed)
    *_, state = _watched(run, name, n)
    for result in claimed:
        answer.say(f"{result.what}: {result}")
    for fault in state.faults:
        answer.say(f"WRONG      {fault}")
    stands = not state.faults
    answer.content |= dict(
        stands=stands,
        images=state.images,
        faults=state.faults,
        records=[asdict(result) for result in claimed],
    )
    answer.say(
        f"{'stands' if stands else 'does not stand'}: {state.images} of {n} pictures were asked about again, "
        f"{len(state.faults)} faults found."
    )
    raise typer.Exit(OK if stands else PROBLEM)
