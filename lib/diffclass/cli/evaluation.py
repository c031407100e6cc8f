"""Commands that measure: evaluate, on clean images or under attack; verify what an attack has left; list what there is."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from diffclass.cli.base import (
    EXIT_CODES,
    MANY_LEVELS,
    MANY_PICTURES,
    MANY_STEPS,
    OK,
    PROBLEM,
    VERSION,
    Epsilon,
    Json,
    Seed,
    app,
    shown,
    watched,
)
from diffclass.cli.certifying import verify_certificates

NAME = 16  # columns of a name in a table


def _records_file(path: Path | None) -> Path | None:
    """A file that a record can be added to: looked at before the measurement begins, not after it."""
    if path is not None:
        from diffclass.storage import results

        results.check_appendable(path)
    return path


@app.command(epilog=EXIT_CODES)
def evaluate(
    ctx: typer.Context,
    world: Annotated[
        str, typer.Option(help="digits, cifar10, gallery, hundred, or plane:NAME.")
    ] = "digits",
    classifier: Annotated[
        str, typer.Option(help="A classifier by name, such as dc, rdc1 or idc.")
    ] = "dc",
    model: Annotated[
        str | None, typer.Option(help="The denoiser of dc by name, such as contrastive.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, max=MANY_PICTURES, help="Pictures; all of them, or 1000 points."),
    ] = None,
    levels: Annotated[int, typer.Option(min=1, max=MANY_LEVELS, help="Noise levels of dc.")] = 16,
    weighting: Annotated[
        str, typer.Option(help="Weighting of dc: a name of noise.WEIGHTINGS.")
    ] = "ELBO",
    attack: Annotated[
        str | None, typer.Option(help="A protocol (paper or honest), or one attack by name.")
    ] = None,
    norm: Annotated[
        str | None,
        typer.Option(
            help="Norm of an attack's budget: linf, l2 or flow; linf, or what the attack has instead."
        ),
    ] = None,
    epsilon: Epsilon = None,
    steps: Annotated[
        int | None, typer.Option(min=1, max=MANY_STEPS, help="Steps of one attack by name.")
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(help="Keep losses or perturbations here; resumable, with more pictures too."),
    ] = None,
    batch: Annotated[
        int,
        typer.Option(
            min=1,
            max=MANY_PICTURES,
            help="Pictures at once, on clean images: less needs less memory.",
        ),
    ] = 8,
    precision: Annotated[str, typer.Option(help="fp32, or bf16 for the network of dc.")] = "fp32",
    record: Annotated[
        Path | None,
        typer.Option(callback=_records_file, help="Append the result to this .jsonl file."),
    ] = None,
    seed: Seed = 0,
    json_wanted: Json = False,
):
    """Measure an accuracy, with its 95 % interval; on the plane next to the best that any classifier can reach.

    With --store the losses of every picture by dc are kept, and every weighting is reported; it can be stopped, resumed,
    and shared by processes with `accelerate launch -m diffclass evaluate ...`. With --attack the classifier is attacked,
    and the strongest perturbation of every picture is kept in --store, for `diffclass verify`. The names of classifiers
    and attacks are those of `diffclass list`.
    """
    from diffclass import units

    answer = ctx.obj
    answer.content |= dict(command="evaluate", records=[])
    units.chosen(precision, ("fp32", "bf16"), "the precision")
    changed = model is not None or (levels, weighting, precision) != (16, "ELBO", "fp32")
    if changed and (attack is not None or classifier.lower() != "dc"):
        raise ValueError(
            "expected --model, --levels, --weighting and --precision only for the clean accuracy of dc: the name of "
            "another classifier decides them, and an attack is about the classifier as it is named."
        )
    if attack is None and steps is not None:
        raise ValueError("expected --steps only with --attack and the name of one attack.")
    if attack is not None:
        listed = _attacked(world, attack, classifier, norm, epsilon, steps, limit, store, seed)
    elif classifier.lower() != "dc":
        listed = _named(world, classifier, limit, store, batch, seed)
    else:
        options = dict(world=world, model=model, limit=limit, levels=levels)
        listed = _clean({**options, "weighting": weighting, "seed": seed}, store, batch, precision)
    for result in listed:
        answer.content["records"].append(_fields(result))
        answer.say(f"{result.what}: {result}")
        if record:
            result.append(record)


def _fields(record) -> dict:
    """A record in the document: its fields, and what it says in words."""
    return {**asdict(record), "what": record.what}


def _clean(options: dict, store: Path | None, batch: int, precision: str) -> list:
    """The records of a diffusion classifier's accuracy on clean images."""
    from diffclass.evaluation import accuracies, measuring

    trial = accuracies.bayes_trial(**options)
    if store is None:
        return accuracies.records_of(trial, _counted(trial, batch))
    run = measuring.measure(
        trial.classifier,
        trial.held.noise,
        trial.images,
        trial.labels,
        store,
        accuracies.store_settings(trial, precision),
        batch=batch,
        precision=precision,
    )
    list(shown(run, trial.world.name))
    return accuracies.stored_records(trial, measuring.read(store))


def _named(
    world: str, name: str, limit: int | None, store: Path | None, batch: int, seed: int
) -> list:
    """The record of a named classifier's accuracy on clean images, with one held noise."""
    from diffclass.evaluation import accuracies

    if store is not None:
        raise ValueError(
            "expected no --store for the clean accuracy of a classifier other than dc, which has no losses to keep; use "
            "--record FILE for the number."
        )
    trial = accuracies.named_trial(world, name, limit, seed)
    _refuse(trial.classifier, trial.images[:4])
    return accuracies.records_of(trial, _counted(trial, batch))


def _counted(trial, batch: int) -> int:
    """How many images are classified correctly, behind a progress bar."""
    from diffclass.device import device
    from diffclass.evaluation import accuracies

    where = device()
    held = trial.held.to(where)
    run = accuracies.hits(held, trial.images.to(where), trial.labels.to(where), batch)
    *_, (correct, _) = shown(run, trial.world.name, len(trial.labels))
    return correct


def _refuse(classifier, images) -> None:
    """Stop before a classifier is measured that should not be."""
    complaints = classifier.complaints(images)
    if complaints:
        raise ValueError(complaints[0])


def _attacked(
    world: str,
    attack: str,
    name: str,
    norm: str | None,
    epsilon: float | None,
    steps: int | None,
    limit: int | None,
    store: Path | None,
    seed: int,
) -> list:
    """The records of an accuracy under attack, which are also left in the folder `store`."""
    from diffclass import zoo
    from diffclass.data.worlds import world_of
    from diffclass.device import device
    from diffclass.evaluation import claims, runs, verification

    if store is None:
        raise ValueError(
            "expected --store FOLDER with --attack: the perturbations are kept there, to be verified."
        )
    place = world_of(world)
    if place.corruption is not None or place.name == "gallery":
        raise ValueError(
            f"expected the world {place.kind!r} under attack, got {world!r}; clean test images are attacked."
        )
    norm = _usual_norm(attack) if norm is None else norm.lower()
    budget = place.budget(norm) if epsilon is None else epsilon
    entry = zoo.entry_of(world, name)
    where = device()
    classifier = zoo.classifier(world, name).to(where)
    images, labels = place.test(limit, seed)
    verification.check_count(place, len(images))
    _refuse(classifier, images[:4].to(where))
    protocol = _protocol(attack, classifier, entry.paper, norm, budget, steps)
    own = dict(
        world=place.name,
        classifier=entry.name,
        version=VERSION,
        checkpoints=zoo.checkpoints(world, name),
    )
    run = runs.run(classifier, images, labels, protocol, store, own, seed=seed)
    what = f"{entry.name}, {protocol.key}"
    list(watched(run, what, len(images), lambda item: item.attack))
    listed = claims.records_of(runs.read(store))
    claims.keep(store, listed)
    return listed


def _usual_norm(attack: str) -> str:
    """The norm of an attack where nobody names one: L-inf, or the first of an attack that has no such budget."""
    from diffclass.zoo import attacks

    entry = attacks.ENTRIES.get(attack.lower())
    return "linf" if entry is None or "linf" in entry.norms else entry.norms[0]


def _protocol(attack: str, classifier, paper: str, norm: str, epsilon: float, steps: int | None):
    """The protocol of an attack's name: that of the classifier's paper, the honest one, or one attack alone."""
    from diffclass import units
    from diffclass.evaluation import protocols
    from diffclass.zoo import attacks

    name = units.chosen(attack, ("paper", "honest", *attacks.ENTRIES), "the attack")
    if name in ("paper", "honest"):
        if steps is not None:
            raise ValueError(f"expected no --steps with --attack {name}, which decides them.")
        if name == "paper":
            return protocols.paper(paper, norm, epsilon, classes=classifier.num_classes)
        return protocols.honest(classifier, norm, epsilon)
    return protocols.alone(name, classifier, norm, epsilon, steps)


@app.command(epilog=EXIT_CODES)
def compare(
    ctx: typer.Context,
    world: Annotated[str, typer.Option(help="digits or cifar10.")] = "cifar10",
    classifier: Annotated[
        str, typer.Option(help="A classifier by losses: dc, contrastive or adversarial-dc.")
    ] = "contrastive",
    levels: Annotated[
        int | None, typer.Option(min=1, max=MANY_LEVELS, help="Noise levels in place of its own.")
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32, or bf16 for the network.")] = "fp32",
    seconds: Annotated[
        float, typer.Option(min=0.01, max=3600, help="How long each way is repeated.")
    ] = 2.0,
    seed: Seed = 0,
    json_wanted: Json = False,
):
    """Time the losses of one picture: all at once, as here, beside the loops that are published, on the same network.

    The picture is the first test picture of the world, or one that a network drew where there is none. Nothing else
    should run meanwhile. The losses of all ways must agree: exit code 1 if they do not.
    """
    import torch

    from diffclass import noise, zoo
    from diffclass.classifiers.bayes import BayesClassifier
    from diffclass.data import cifar, gallery
    from diffclass.data.worlds import world_of
    from diffclass.device import device
    from diffclass.evaluation import timing

    answer = ctx.obj
    asked = zoo.classifier(world, classifier)
    if not isinstance(asked, BayesClassifier):
        raise ValueError(
            f"expected a classifier by losses, such as dc or contrastive, got {classifier!r}, which has no losses to time."
        )
    if levels is not None:
        ends = (float(asked.levels.lower[0]), float(asked.levels.upper[-1]))
        asked = asked.changed(levels=noise.log_levels(*ends, levels))
    where = device()
    drawn = world_of(world).kind == "cifar10" and not cifar.cifar10_available()[0]
    pictures = gallery.pictures()[0] if drawn else world_of(world).test(1)[0]
    rounding = 1e-4 if precision == "fp32" else 5e-2
    answer.content |= dict(
        command="compare",
        world=world,
        classifier=zoo.entry_of(world, classifier).name,
        levels=len(asked.levels),
        precision=precision,
        device=where.type,
        threads=torch.get_num_threads(),
        ways=[],
    )
    answer.say(
        f"{classifier} of {world}, {len(asked.levels)} levels, {precision}, on {where.type} with "
        f"{torch.get_num_threads()} threads; seconds for one picture (median, interquartile range):"
    )
    plain = None
    code = OK
    for row in timing.timings(
        asked.to(where), pictures[:1].to(where), precision=precision, seconds=seconds, seed=seed
    ):
        plain = plain or row.seconds
        answer.content["ways"].append({**asdict(row), "times_as_fast": plain / row.seconds})
        agree = "" if row.apart <= rounding else "   THE LOSSES DIFFER"
        code = OK if not agree and code == OK else PROBLEM
        answer.say(
            f"  {row.way:16s} {row.seconds:9.4f} ({row.spread:.4f}), n {row.repetitions}, "
            f"{plain / row.seconds:6.1f} times as fast, losses apart by {row.apart:.1e}{agree}"
        )
    raise typer.Exit(code)


@app.command(epilog=EXIT_CODES)
def verify(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(help="What `evaluate --attack ... --store` has left.")],
    reattack: Annotated[
        int,
        typer.Option(
            min=0, max=MANY_PICTURES, help="Survivors that are attacked again; 0 for none."
        ),
    ] = 8,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, max=2**32 - 1, help="Of the verification's own noise; else nobody's choice."
        ),
    ] = None,
    json_wanted: Json = False,
):
    """Check a claim of robustness as one who trusts nothing in its folder; exit code 1 if it does not stand.

    The classifier is asked about every picture of the claim, with the noise of the record and with noise of its own, and a
    sample of the pictures that survived is attacked again by the protocol's own attacks. What falls then is kept in
    FOLDER/found-by-verify.jsonl: no fault, unless it is more than the claim's own interval allows.
    """
    from diffclass import zoo
    from diffclass.data.worlds import world_of
    from diffclass.device import device
    from diffclass.evaluation import certification, claims, runs, verification

    answer = ctx.obj
    own = verification.own_seed() if seed is None else seed
    if certification.is_certification(folder):
        verify_certificates(answer, folder, reattack, own)
    answer.content |= dict(command="verify", folder=str(folder))
    run = runs.read(folder)
    claimed = claims.kept(folder)
    settings = run.settings
    place = world_of(settings["world"])
    name = settings["classifier"]
    images, labels = place.test(max(1, len(run.rows)), settings["seed"])
    answer.content |= dict(seed=own)
    checked = verification.verify(
        zoo.classifier(place.name, name).to(device()),
        images,
        labels,
        run,
        zoo.checkpoints(place.name, name),
        claimed,
        zoo.entry_of(place.name, name).paper,
        world=place,
        seed=own,
        reattack=reattack,
    )
    *_, state = watched(checked, name, len(run.rows), lambda item: item.note)
    for result in claimed:
        answer.say(f"{result.what}: {result}")
    answer.say(f"checked with the seed {own}:")
    for title, sentences in (
        ("ABOUT", state.about),
        ("SEEN", state.established),
        ("NOT SEEN", state.open),
        ("NEW", [verification.words_of(entry) for entry in state.new]),
        ("WRONG", state.faults),
    ):
        for sentence in sentences:
            answer.say(f"{title:10} {sentence}")
    if state.new:
        verification.keep_new(folder, state.new)
    stands = not state.faults
    answer.content |= dict(
        stands=stands,
        images=state.images,
        faults=state.faults,
        about=state.about,
        established=state.established,
        not_established=state.open,
        judged=state.judged,
        attacked_again=state.attacked,
        new=state.new,
        records=[_fields(result) for result in claimed],
    )
    verdict = "stands" if stands else "does not stand"
    count = f"{state.images} of {settings['n']} pictures were asked about again, {state.attacked} attacked again"
    answer.say(f"{verdict}: {count}, {len(state.faults)} faults.")
    raise typer.Exit(OK if stands else PROBLEM)


# ---------------------------------------------------------------------------------------------------------------------
# What there is to measure


@app.command("list", epilog=EXIT_CODES)
def registries(ctx: typer.Context, json_wanted: Json = False):
    """List the classifiers, of clean and of noised pictures, and the attacks, by name, each with its source."""
    answer = ctx.obj
    answer.content |= dict(command="list")
    classifiers = _classifiers()
    noised = _noised()
    attacks = _attacks()
    answer.content |= dict(classifiers=classifiers, noised=noised, attacks=attacks)
    answer.say("classifiers: evaluate --classifier NAME, audit NAME")
    for entry in classifiers:
        answer.say(_described(entry, f"{entry['title']} ({', '.join(entry['worlds'])})"))
    answer.say(
        "classifiers of noised pictures: certify CLASSIFIER, which takes those above as well"
    )
    for entry in noised:
        answer.say(_described(entry, f"{entry['title']} ({', '.join(entry['worlds'])})"))
    answer.say("attacks: evaluate --attack NAME, audit --attack NAME")
    for entry in attacks:
        answer.say(_described(entry, f"needs the {entry['needs']} ({', '.join(entry['norms'])})"))


def _classifiers() -> list[dict]:
    """The entries of the table of classifiers, each with the worlds that have it."""
    from diffclass.data.worlds import SHAPES
    from diffclass.zoo.classifiers import ENTRIES

    worlds = {
        name: [kind for kind in SHAPES if entry.weights(kind) is not None]
        for name, entry in ENTRIES.items()
    }
    return [_listed(entry, worlds[name]) for name, entry in ENTRIES.items()]


def _noised() -> list[dict]:
    """The entries of the table of classifiers of noised pictures."""
    from diffclass.zoo.noised import ENTRIES

    return [_listed(entry, entry.worlds) for entry in ENTRIES.values()]


def _listed(entry, worlds) -> dict:
    """What the list says of a classifier."""
    return dict(
        name=entry.name,
        title=entry.title,
        sentence=entry.sentence,
        worlds=list(worlds),
        source=entry.source,
    )


def _attacks() -> list[dict]:
    """The entries of the table of attacks."""
    from diffclass.zoo.attacks import ENTRIES

    return [
        dict(
            name=entry.name,
            sentence=entry.sentence,
            needs=entry.needs,
            norms=list(entry.norms),
            source=entry.source,
        )
        for entry in ENTRIES.values()
    ]


def _described(entry: dict, first: str) -> str:
    """An entry as a row of its table: its name, and beside it what it is and whose."""
    indent = " " * (NAME + 3)
    lines = [
        f"  {entry['name']:{NAME}} {first}",
        f"{indent}{entry['sentence']}",
        f"{indent}source: {entry['source']}",
    ]
    return "\n".join(lines)
