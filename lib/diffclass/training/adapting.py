"""What truth maximisation moves: adapters followed along their training, and who fools whom, as records."""

import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from diffclass import attacks, units, zoo
from diffclass.attacks import margin_loss
from diffclass.classifiers.base import Classifier, Held, decided
from diffclass.data.worlds import images_of
from diffclass.denoisers import network
from diffclass.denoisers.base import Denoiser
from diffclass.evaluation import accuracies
from diffclass.evaluation.protocols import OWN, Attack, AttackNoise
from diffclass.storage import results
from diffclass.training import measures
from diffclass.training.hardening import Inner
from diffclass.training.recipes import (
    CONTRASTED,
    DIGITS_TRUTH,
    FOOLING_ANOTHER,
    FOOLING_ITSELF,
    Recipe,
)
from diffclass.training.train import training_of
from diffclass.zoo import networks

BUDGET = 0.1  # L-inf in pixels
EVERY = 100  # steps from one measurement to the next
ATTACKED = 64  # test digits that are attacked through the network itself
TESTED = 400  # test digits that are asked about, clean and by transfer
TABLED = 100  # of the paper's tables
ATTACK_STEPS = 20
THROUGH_ITSELF = "PGD"
THROUGH_ANOTHER = "PGD of another network"
LEVELS = 16
# What is raised, what it learns from, and whether an adapter learns or all weights.
PLAIN = dict(method="tmdc", inner=FOOLING_ANOTHER)
CONTRASTIVE = dict(method="tmdc-contrastive", inner=FOOLING_ITSELF, choices=CONTRASTED)
VARIANTS = {
    "truth, by transfer": PLAIN,
    "contrast, white-box": CONTRASTIVE,
    "truth, white-box": dict(PLAIN, inner=FOOLING_ITSELF, choices=dict(transferred=False)),
    "contrast, by transfer": dict(CONTRASTIVE, inner=FOOLING_ANOTHER, choices=dict(contrast=1.0)),
    "truth, by transfer, all weights": dict(PLAIN, whole=True),
    "contrast, white-box, all weights": dict(CONTRASTIVE, whole=True),
    "truth, by transfer of one step": dict(PLAIN, inner=Inner(BUDGET, 1, 1.0)),
}
STORED = {("truth, by transfer", 0), ("contrast, white-box", 0)}  # and their seeds, in `assets/`


def recipe_of(variant: str, **changed) -> Recipe:
    """The recipe of a variant. Shapes: changed: other fields. Errors: ValueError for a name that is none of `VARIANTS`."""
    return DIGITS_TRUTH(**units.chosen(variant, VARIANTS, "the variant"), **changed)


def follow(
    path: Path, seeds: tuple[int, ...] = (0,), only: list[str] | None = None, **changed
) -> Iterator[results.Record]:
    """Train each of `VARIANTS` and measure it before the first step and after every hundred; what is on record is left out.

    Shapes      only: some of `VARIANTS`, None for all; changed: other fields of the recipe, such as steps
    Randomness  training from the seed of a run; the noise of all measurements is one, the same for every run
    Writes      the records of `measured` at every measured step, into `path`, once a run is over
    Errors      ValueError for a name that is none of `VARIANTS`; those of `networks.trained`
    """
    known = {
        (record.settings["variant"], record.seed)
        for record in kept(path)
        if record.metric == "accuracy"  # a file has costs as well
    }
    others = fooling(zoo.classifier("digits", "cnn"))
    for seed in seeds:
        for variant in only or VARIANTS:
            if (variant, seed) in known:
                continue
            recipe = recipe_of(variant, **changed)
            told = recipe.says["truth"] | dict(
                variant=variant, rank=recipe.says["rank"], steps=recipe.steps, batch=recipe.batch
            )
            common = dict(
                world="digits",
                classifier=recipe.method,
                source="training.adapting.follow",
                seed=seed,
            )
            listed = []
            for step, denoiser in walked(variant, seed, **changed):
                listed += measured(denoiser, others, told | dict(step=step), common)
            for record in listed:
                record.append(path)
            yield from listed


def kept(path: Path) -> list[results.Record]:
    """The records of a file, none where there is no file yet. Errors: those of `results.read`."""
    return results.read(path) if Path(path).exists() else []


def walked(variant: str, seed: int, **changed) -> Iterator[tuple[int, Denoiser]]:
    """The average denoiser of a run before its first step, after every hundred, and at its end, each with its step.

    Meaning     of the two recipes in `assets/` by their own seed, the adapters that were put away: nothing is trained again
    Errors      those of `networks.adapted` and of `Training`
    """
    base = network.load_denoiser(networks.trained(networks.STUDENT))[0].eval()
    recipe = recipe_of(variant, **changed)
    if (variant, seed) in STORED and not changed:
        yield 0, base
        file = networks.TRUTH["digits"][recipe.method]
        for step in range(recipe.kept, recipe.steps, recipe.kept):
            yield step, networks.adapted(base, networks.along(file, step))
        yield recipe.steps, networks.adapted(base, file)
        return
    run = training_of(recipe, seed, given=base)
    yield 0, run.average.eval()
    for progress in run:
        if progress.step % EVERY == 0 or progress.step == progress.steps:
            yield progress.step, run.average.eval()


def fooling(surrogate: Classifier) -> Tensor:
    """The test digits after PGD on another network. Shapes: -> [TESTED,1,8,8] in [0,1]."""
    images, labels = _tested()
    *_, last = attacks.pgd(surrogate, images, labels, BUDGET, steps=ATTACK_STEPS)
    return last.x.detach()


def _tested() -> tuple[Tensor, Tensor]:
    images, labels = images_of("digits", "test")
    return images[:TESTED], labels[:TESTED]


def held_bayes(denoiser: Denoiser) -> Held:
    """The diffusion classifier of a denoiser of digits, with one noise for all pictures."""
    return measures.held_bayes(networks.DIGIT_RANGE, denoiser, LEVELS)


def measured(
    denoiser: Denoiser, others: Tensor, settings: dict, common: dict
) -> Iterator[results.Record]:
    """What a denoiser's classifier is worth, and where the truth is among its losses.

    Formula     accuracies: clean, on pictures that fool another network, and what PGD through this one leaves of the first;
                of the pictures that fool another: loss of the truth, of the best other class, and the gap between them
    Shapes      others: `fooling` of the other network; settings and common: of the records
    Units       nats for losses; positive gaps are right answers
    """
    images, labels = _tested()
    classifier = held_bayes(denoiser)
    budget = dict(norm="linf", epsilon=BUDGET, attack_steps=ATTACK_STEPS)

    def counted(correct: int, n: int, attack: str | None) -> results.Record:
        own = settings | (budget if attack else {})
        detail = f"{settings['variant']}, after {settings['step']} steps"
        return results.accuracy_record(
            correct, n, attack=attack, detail=detail, settings=own, **common
        )

    correct = accuracies.accuracy(classifier, images, labels, batch=200)
    yield counted(correct, len(labels), None)
    with torch.no_grad():
        logits = torch.cat([classifier(x) for x in others.split(200)])
    correct = int((decided(logits) == labels).sum())
    yield counted(correct, len(labels), THROUGH_ANOTHER)
    survived = measures.survivors(
        classifier, images[:ATTACKED], labels[:ATTACKED], BUDGET, ATTACK_STEPS, batch=ATTACKED
    )
    yield counted(survived, min(ATTACKED, len(labels)), THROUGH_ITSELF)
    truth = -logits.gather(1, labels[:, None])[:, 0]
    gap = -margin_loss(logits, labels)
    for name, values in (
        ("loss of the truth", truth),
        ("loss of the best other class", truth + gap),
        ("gap between them", gap),
    ):
        yield averaged(name, values, "nats", settings | budget, common)


def averaged(
    metric: str, values: Tensor, unit: str, settings: dict, common: dict
) -> results.Record:
    """The record of a mean with its interval. Formula: mean ± 1.96 s / sqrt(n), s with n - 1. Shapes: values [n]."""
    values = values.double()
    mean = float(values.mean())
    reach = 1.96 * float(values.std()) / math.sqrt(len(values))
    return results.Record(
        metric=metric,
        value=mean,
        n=len(values),
        low=mean - reach,
        high=mean + reach,
        level=0.95,
        unit=unit,
        method="normal",
        settings=settings,
        checkpoint=None,
        detail=settings["variant"],
        **common,
    )


def costs(path: Path, steps: int = 20, seed: int = 0) -> Iterator[results.Record]:
    """What a step takes, of each of `VARIANTS` in turn, and what learning keeps in memory beside the network.

    Formula     of every number that learns: its gradient and the two averages of Adam
    Units       seconds of a processor, the first step left out; bytes
    Randomness  training from the seed
    Writes      a record for every variant, into `path`
    """
    for variant in VARIANTS:
        recipe = recipe_of(variant, steps=steps)
        base = network.load_denoiser(networks.trained(networks.STUDENT))[0]
        run = training_of(recipe, seed, given=base)
        marks = []
        for _ in run:
            marks.append(time.process_time())
        learning = [value for value in run.denoiser.parameters() if value.requires_grad]
        told = dict(
            variant=variant,
            batch=recipe.batch,
            learning=sum(value.numel() for value in learning),
            numbers=sum(value.numel() for value in run.denoiser.parameters()),
            state_bytes=3 * sum(value.numel() * value.element_size() for value in learning),
        )
        common = dict(
            world="digits",
            classifier=recipe.method,
            source="training.adapting.costs",
            seed=seed,
        )
        record = averaged(
            "processor seconds a step",
            torch.tensor(marks, dtype=torch.float64).diff(),
            "s",
            told,
            common,
        )
        record.append(path)
        yield record


# ---------------------------------------------------------------------------------------------------------------------
# Who fools whom


DEFENCES = (
    "cnn",
    "adversarial",
    "wide",
    "adversarial-wide",
    "vit",
    "adversarial-vit",
    "jem",
    "diffpure",
    "dc",
    "contrastive",
    "adversarial-dc",
    "tmdc",
    "tmdc-contrastive",
    "diffpure-tmdc",
)
SURROGATES = ("cnn", "adversarial", "dc", "tmdc", "tmdc-contrastive")
HELD = dict(fresh=False)
CLIMB = (Attack("margin", 40, "pgd", step=0.1, **HELD),)
PLUS = tuple(
    Attack(OWN, steps, f"autoattack-plus-{steps}", targets=attacks.ranks(10), **HELD)
    for steps in (10, 100)
)
GRADIENTS = (
    Attack("CE", 1, "fgsm", **HELD),
    Attack("CE", 40, "pgd", step=0.157, start="random", **HELD),
)
PRINTED = 0.05  # TMDC's budget in both norms
# What TMDC's tables list, from a plain network: attacks, norm, budget. The second half has budgets that digits feel.
PAPER = (
    (GRADIENTS + PLUS, "linf", PRINTED),
    (PLUS[:1], "l2", PRINTED),
    (GRADIENTS + PLUS, "linf", BUDGET),
    (GRADIENTS + PLUS, "l2", 0.5),
)
# The same of photographs: who is asked, and what they meet.
OF_PHOTOGRAPHS = (
    "cnn",
    "adversarial",
    "contrastive",
    "adversarial-dc",
    "tmdc",
    "tmdc-contrastive",
)
ON_PHOTOGRAPHS = (
    (GRADIENTS + PLUS[:1], "linf", PRINTED),
    (GRADIENTS + PLUS[:1], "linf", 8 / 255),
    (GRADIENTS + PLUS[:1], "l2", 0.5),
)


def tables(path: Path) -> Iterator[results.Record]:
    """Who fools whom, and TMDC's tables from a plain network: everything that `transferred` can still add to a file.

    Errors      those of `transferred`
    """
    yield from transferred(path, SURROGATES, DEFENCES, CLIMB, "linf", BUDGET, ATTACKED)
    for listed, norm, epsilon in PAPER:
        yield from transferred(path, ("cnn",), DEFENCES, listed, norm, epsilon, TABLED)


def photographs(path: Path) -> Iterator[results.Record]:
    """TMDC's tables from a plain network of photographs: everything that `transferred` can still add to a file.

    Errors      those of `transferred`
    """
    for listed, norm, epsilon in ON_PHOTOGRAPHS:
        told = (listed, norm, epsilon, ATTACKED)
        yield from transferred(path, ("cnn",), OF_PHOTOGRAPHS, *told, world="cifar10")


def transferred(
    path: Path,
    surrogates: tuple[str, ...],
    defences: tuple[str, ...],
    listed: tuple[Attack, ...],
    norm: str,
    epsilon: float,
    count: int,
    seed: int = 0,
    world: str = "digits",
) -> Iterator[results.Record]:
    """Attack each surrogate, and ask every defence about what came out; what is on record is left out.

    Shapes      surrogates and defences: names of classifiers of the world; count: its first test pictures
    Units       epsilon in pixels
    Randomness  attacks from the seed; each classifier has one held noise, from the seed
    Writes      an accuracy for every surrogate, attack and defence, into `path`
    Errors      those of `zoo.classifier`, of `Attack.frames` and of `runs`
    """
    images, labels = images_of(world, "test")
    x = images[:count]
    y = labels[:count]
    known = {
        (
            record.world,
            record.classifier,
            record.settings["surrogate"],
            record.part,
            record.settings["norm"],
            record.settings["epsilon"],
            record.n,
        )
        for record in kept(path)
    }
    for surrogate in surrogates:
        attacked = _held(world, surrogate, seed)
        for number, attack in enumerate(listed):
            lacking = [
                name
                for name in defences
                if (world, name, surrogate, str(attack), norm, epsilon, len(x)) not in known
            ]
            if not lacking:
                continue
            drawn = AttackNoise(seed, number, 0, torch.arange(len(x)))
            *_, last = attack.frames(attacked, x, y, epsilon, norm, drawn)
            for name in lacking:
                correct = accuracies.accuracy(_held(world, name, seed), last.x, y, batch=200)
                record = results.accuracy_record(
                    correct,
                    len(x),
                    world=world,
                    classifier=name,
                    source="training.adapting.transferred",
                    attack=f"transfer from {surrogate}" if name != surrogate else "white-box",
                    part=str(attack),
                    settings=dict(
                        surrogate=surrogate,
                        norm=norm,
                        epsilon=epsilon,
                        attack=attack.as_json(),
                        checkpoints=zoo.checkpoints(world, name),
                    ),
                    seed=seed,
                )
                record.append(path)
                yield record


# What an adapter may have learned from, and the attacks on the plain network that it then meets.
LEARNED = ("truth, by transfer of one step", "truth, by transfer", "truth, white-box")
MET = GRADIENTS + PLUS[:1]


def crossed(path: Path, seed: int = 0, **changed) -> Iterator[results.Record]:
    """Training attack against test attack: each adapter of `LEARNED`, before and after, under every attack of `MET`.

    Meaning     the paper tests by the attack that it trains on; here each is met by all, and by one through the network itself
    Shapes      changed: other fields of the recipes, such as steps
    Randomness  training and attacks from the seed; the noise of all classifiers is one
    Writes      an accuracy for every adapter and attack, into `path`, once an adapter is trained; what is there is left out
    Errors      those of `walked` and `Attack.frames`
    """
    images, labels = _tested()
    surrogate = zoo.classifier("digits", "cnn")
    met = {}
    for number, attack in enumerate(MET):
        drawn = AttackNoise(seed, number, 0, torch.arange(len(images)))
        *_, last = attack.frames(surrogate, images, labels, BUDGET, "linf", drawn)
        met[str(attack)] = last.x
    known = {(record.settings["variant"], record.seed) for record in kept(path)}
    for variant in LEARNED:
        if (variant, seed) in known:
            continue
        recipe = recipe_of(variant, **changed)
        listed = []
        for step, denoiser in walked(variant, seed, **changed):
            if step not in (0, recipe.steps):
                continue
            classifier = held_bayes(denoiser)
            own = measures.survivors(
                classifier, images[:ATTACKED], labels[:ATTACKED], BUDGET, ATTACK_STEPS, ATTACKED
            )
            counted = {THROUGH_ITSELF: (own, min(ATTACKED, len(labels)))}
            for part, x in met.items():
                correct = accuracies.accuracy(classifier, x, labels, batch=200)
                counted[part] = (correct, len(labels))
            for part, (correct, count) in counted.items():
                record = results.accuracy_record(
                    correct,
                    count,
                    world="digits",
                    classifier=recipe.method,
                    source="training.adapting.crossed",
                    attack="white-box" if part == THROUGH_ITSELF else "transfer from cnn",
                    part=part,
                    settings=recipe.says["truth"]
                    | dict(variant=variant, step=step, norm="linf", epsilon=BUDGET),
                    seed=seed,
                )
                listed.append(record)
        for record in listed:
            record.append(path)
        yield from listed


def _held(world: str, name: str, seed: int) -> Classifier:
    classifier = zoo.classifier(world, name)
    return classifier if classifier.deterministic else Held.seeded(classifier, seed)


class InModelSpace(nn.Module):
    """A classifier as a function of numbers in [-1,1], with the parameter that a library asks for its device.

    Shapes      z [B,C,H,W] -> [B,K]
    """

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.classifier = classifier
        self.anchor = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, z: Tensor) -> Tensor:
        """Logits."""
        return self.classifier(units.to_pixel(z).clamp(0, 1))


def as_released(surrogate: Classifier, x: Tensor, y: Tensor, epsilon: float, steps: int) -> Tensor:
    """Pictures as TMDC's code attacks them: numbers in [-1,1] go to a library that brings every image into [0,1].

    Formula     z = 2x - 1;  z <- clip(z + clip(z' - z, ±epsilon), 0, 1),  z' = z + 2/255 sign(gradient);  (z + 1) / 2
    Meaning     what was darker than mid-grey is mid-grey afterwards, whatever epsilon is, 0 too
    Shapes      x [B,C,H,W] in [0,1], y [B] -> [B,C,H,W] in [0.5,1]
    Units       epsilon in model space, as the code has it
    Errors      those of `units.check_images` and `units.check_labels`; ValueError for an epsilon < 0 or fewer steps than one
    """
    import torchattacks

    surrogate.checked(x)
    units.check_labels(y, len(x), surrogate.num_classes)
    epsilon = units.check_number(epsilon, "epsilon", least=0)
    steps = units.check_whole(steps, "steps", least=1)

    chosen = torchattacks.PGD(
        InModelSpace(surrogate).eval(), eps=epsilon, alpha=2 / 255, steps=steps, random_start=False
    )
    with torch.enable_grad():
        attacked = chosen(units.to_model(x), y)
    return units.to_pixel(attacked).detach()
