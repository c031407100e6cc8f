"""How the IDC network in `assets/` was trained, and what each part of the recipe is worth: ablations as records."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from diffclass import attacks, intervals, units
from diffclass.classifiers import bridges, idc
from diffclass.classifiers.bridges import Bridge
from diffclass.classifiers.idc import TranslationClassifier, Translator
from diffclass.data.worlds import DATA, images_of
from diffclass.storage import assets, results
from diffclass.training import losses
from diffclass.training.loop import Progress, Training, is_late

BUDGET = 0.15  # of the ablations: L-inf in pixels, PGD, EOT, test digits


ATTACK_STEPS = 20


DRAWS = 2


ATTACKED = 100


@dataclass(frozen=True)
class Recipe:
    """What an IDC network is made of.

    config    of the network; stored: the precision of its weights file; measured: test images behind its card
    labels    a family of `bridges.LABELS`; positions: of the bridge; inter: weight of the inter-class loss
    scrambled pixels of all labels permuted alike: every distance and cosine stays, all structure of the pictures goes
    """

    world: str
    network: str
    steps: int
    batch: int
    rate: float
    config: dict = field(default_factory=dict)
    labels: str = "Hadamard"
    positions: int = 4
    inter: float = 0.2
    scrambled: bool = False
    ema: float = 0.995
    mirror: bool = False
    precision: str = "fp32"
    compiled: bool = False
    stored: torch.dtype = torch.float32
    measured: int | None = None


(DIGITS,) = idc.FILES["digits"]


(PHOTOS, SMALL) = idc.FILES["cifar10"]


RECIPES = {
    DIGITS: Recipe("digits", "DigitNet", 1200, 128, 2e-3),
    PHOTOS: Recipe(
        "cifar10",
        "PrunedUNet",
        20_000,
        256,
        5e-4,
        ema=0.999,
        mirror=True,
        precision="bf16",
        compiled=True,
        stored=torch.float16,
    ),
    SMALL: Recipe(
        "cifar10",
        "PatchNet",
        3600,
        128,
        2e-3,
        ema=0.998,
        mirror=True,
        precision="bf16",
        stored=torch.float16,
    ),
}


ABLATIONS = {
    "as in the recipe": {},
    "without the inter-class loss": dict(inter=0.0),
    "released labels": dict(labels="released"),
    "released labels, without the inter-class loss": dict(labels="released", inter=0.0),
    "orthogonal labels": dict(labels="orthogonal"),
    "simplex labels": dict(labels="simplex"),
    "Hadamard labels, scrambled": dict(scrambled=True),
    **{
        f"{count} position{'s' * (count > 1)}": dict(positions=count)
        for count in (1, 2, 3, 5, 6, 7, 8)
    },
}


def untrained(recipe: Recipe, classes: int, shape: tuple[int, int, int], seed: int) -> Translator:
    """The translator of a recipe before its first step. Randomness: labels and weights from `seed`."""
    labels = bridges.LABELS[recipe.labels](classes, shape, seed)
    if recipe.scrambled:
        order = torch.randperm(labels[0].numel(), generator=torch.Generator().manual_seed(seed))
        labels = labels.flatten(1)[:, order].reshape(labels.shape)
    return idc.build(recipe.network, labels, Bridge(recipe.positions), seed, **recipe.config)


def training_of(recipe: Recipe, seed: int, checkpoint: Path | None = None) -> Training:
    """The run of a recipe: iterate to train. Randomness: all from `seed`."""
    images, answers = images_of(recipe.world, "train")
    translator = untrained(recipe, int(answers.max()) + 1, tuple(images.shape[1:]), seed)
    return Training(
        translator,
        units.to_model(images),
        answers,
        loss=losses.translation_loss(recipe.inter),
        steps=recipe.steps,
        batch=recipe.batch,
        rate=recipe.rate,
        ema=recipe.ema,
        mirror=recipe.mirror,
        precision=recipe.precision,
        compiled=recipe.compiled and torch.accelerator.is_available(),
        seed=seed,
        checkpoint=checkpoint,
    )


def correct_of(
    classifier: TranslationClassifier, images: Tensor, labels: Tensor, batch: int = 200
) -> int:
    """How many pictures are classified correctly. Shapes: images [N,C,H,W] in [0,1], labels [N]."""
    device = next(classifier.parameters()).device
    with torch.no_grad():
        return sum(
            int(
                (
                    classifier(images[i : i + batch].to(device)).argmax(1).cpu()
                    == labels[i : i + batch]
                ).sum()
            )
            for i in range(0, len(images), batch)
        )


def train_translation(
    name: str,
    folder: Path,
    *,
    steps: int | None = None,
    batch: int | None = None,
    widths: tuple[int, ...] | None = None,
    minutes: float | None = None,
    measured: int | None = None,
    seed: int = 0,
) -> Iterator[Progress]:
    """Train a network of `RECIPES`, yielding progress; the last act writes weights, card and checksum.

    Shapes      widths of the U-Net, for photographs; `minutes` pauses the run after that time, resumable
    Randomness  all from `seed`
    Writes      folder/name, its line in SHA256SUMS, and folder/checkpoints/name while it runs (resumed if present)
    Errors      ValueError for a name that has no recipe, or widths for digits; those of `Training`
    """
    if name not in RECIPES:
        raise ValueError(f"expected one of {sorted(RECIPES)} to train, got {name!r}.")
    recipe = RECIPES[name]
    checkpoint = Path(folder) / "checkpoints" / name
    started = time.monotonic()
    if widths and recipe.network != "PrunedUNet":
        raise ValueError(
            f"expected no widths for {recipe.network}, got {widths}; they are those of a U-Net."
        )
    recipe = replace(
        recipe,
        steps=steps or recipe.steps,
        batch=batch or recipe.batch,
        measured=measured,
        config=dict(widths=widths) if widths else recipe.config,
    )
    run = training_of(recipe, seed, checkpoint)
    for progress in run:
        yield progress
        if minutes and is_late(run.accelerator, progress, started + 60 * minutes):
            return  # the loop writes its checkpoint as it is left
    if run.accelerator.is_main_process:
        translator = run.average.eval()
        card = _card(name, recipe, run, translator, seed)
        idc.save_translator(translator, Path(folder) / name, card, recipe.stored)
        assets.record([name], Path(folder))
        checkpoint.unlink(missing_ok=True)
    run.accelerator.wait_for_everyone()


def _card(name: str, recipe: Recipe, run: Training, translator: Translator, seed: int) -> dict:
    classifier = TranslationClassifier(translator)
    device = run.accelerator.device
    test, answers = (part[: recipe.measured] for part in images_of(recipe.world, "test"))
    counts = {"fixed noise": correct_of(classifier.to(device), test, answers)}
    fresh = classifier.with_fresh_noise(torch.Generator(device).manual_seed(seed))
    counts["fresh noise"] = correct_of(fresh, test, answers)
    stated = {
        noise: dict(
            zip(
                ("correct", "n", "low", "high"),
                (correct, len(test), *intervals.interval(correct, len(test))),
                strict=True,
            )
        )
        for noise, correct in counts.items()
    }
    told = {key: value for key, value in asdict(recipe).items() if key != "stored"}
    command = f"diffclass train {recipe.world} --method {'idc-small' if name == SMALL else 'idc'}"
    return dict(
        name=name,
        data=DATA[recipe.world],
        recipe=told,
        command=command,
        settings=run.settings,
        **run.facts(),
        accuracy=stated["fixed noise"],
        accuracy_fresh_noise=stated["fresh noise"],
        flops=idc.classification_flops(classifier),
    )


def attacked(
    classifier: TranslationClassifier, images: Tensor, labels: Tensor, budget: float, seed: int
) -> Tensor:
    """Pictures after PGD on the classifier's own loss, as random as it is. Shapes: [N,C,H,W], [N] -> [N,C,H,W]."""
    draws = 1 if classifier.deterministic else DRAWS
    *_, last = attacks.pgd(
        classifier,
        images,
        labels,
        budget,
        steps=ATTACK_STEPS,
        draws=draws,
        generator=torch.Generator().manual_seed(seed),
    )
    return last.x


def ablate(
    path: Path, steps: int = 400, seed: int = 0, only: list[str] | None = None
) -> Iterator[results.Record]:
    """Train a digits network for each of `ABLATIONS` and measure it; each number is appended to `path` and yielded.

    Randomness  training, labels and attacks from `seed`; fresh noise where the record says so
    Writes      three records a variant: accuracy with fixed and with fresh noise, and an upper bound of the accuracy
                under PGD in L-inf on the classifier with fresh noise (right before and after)
    """
    test, answers = images_of("digits", "test")
    x = test[:ATTACKED]
    y = answers[:ATTACKED]
    for name in only or ABLATIONS:
        recipe = replace(RECIPES[DIGITS], steps=steps, **ABLATIONS[name])
        run = training_of(recipe, seed)
        *_, last = run
        classifier = TranslationClassifier(run.average.eval().requires_grad_(False))
        fresh = classifier.with_fresh_noise(torch.Generator().manual_seed(seed + 1))
        adversarial = attacked(fresh, x, y, BUDGET, seed)
        with torch.no_grad():
            before, after = (fresh(pictures).argmax(1) == y for pictures in (x, adversarial))
        counts = {
            "accuracy, fixed noise": (correct_of(classifier, test, answers), len(test), {}),
            "accuracy, fresh noise": (correct_of(fresh, test, answers), len(test), {}),
            "upper bound of the accuracy under attack, fresh noise": (
                int((before & after).sum()),
                len(x),
                dict(
                    attack="PGD, margin loss",
                    norm="linf",
                    epsilon=BUDGET,
                    attack_steps=ATTACK_STEPS,
                    draws=DRAWS,
                ),
            ),
        }
        for what, (correct, n, more) in counts.items():
            record = results.accuracy_record(
                correct,
                n,
                f"IDC on digits, {name}: {what}",
                intervals.interval(correct, n),
                seed=seed,
                settings={**asdict(recipe), "final_loss": round(last.loss, 4), **more},
                source="translation_training.ablate",
            )
            record.append(path)
            yield record
