"""How the baselines in `assets/` were trained: on clean images, or each batch on its worst case (adversarial training).

Accuracy under PGD is watched along the run: a one-step attack can be learned without any robustness, and only an attack
of several steps shows it (catastrophic overfitting, Wong et al. 2020).
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from diffclass import attacks, intervals
from diffclass.classifiers import cnn
from diffclass.data.worlds import DATA, images_of
from diffclass.storage import assets
from diffclass.training.loop import Curve, Progress, Training, is_late
from diffclass.training.losses import Loss

CARD_STEPS = 20  # of PGD on the model card and along the run


CURVE_STEPS = 10


CURVE_IMAGES = 200


@dataclass(frozen=True)
class Inner:
    """The inner maximisation of adversarial training: PGD in L-inf from a random start.

    Units       epsilon in pixels; stride, the length of a step, in units of epsilon
    """

    epsilon: float
    steps: int
    stride: float


@dataclass(frozen=True)
class Recipe:
    """What a baseline is made of.

    epsilon     L-inf budget in pixels of the attack by which it is measured; inner: None for training on clean images
    crop        augmentation: pixels by which each image may move; mirror: half of them turned
    measured    test images behind the clean accuracy of its card (None: all); attacked: behind that under attack
    """

    world: str
    widths: tuple[int, ...]
    steps: int
    batch: int
    rate: float
    epsilon: float
    inner: Inner | None = None
    crop: int = 0
    mirror: bool = False
    ema: float = 0.995
    precision: str = "fp32"
    measured: int | None = None
    attacked: int = 400


DIGITS = Recipe("digits", (32, 64), 400, 128, 2e-3, epsilon=0.1)


CIFAR = Recipe(
    "cifar10",
    (32, 64, 128),
    4000,
    128,
    3e-3,
    epsilon=8 / 255,
    crop=4,
    mirror=True,
    ema=0.998,
    precision="bf16",
    attacked=1000,
)


RECIPES = {
    cnn.FILES["digits"]["cnn"]: DIGITS,
    cnn.FILES["digits"]["adversarial"]: replace(DIGITS, inner=Inner(0.1, 7, 0.25)),
    cnn.FILES["cifar10"]["cnn"]: CIFAR,
    cnn.FILES["cifar10"]["adversarial"]: replace(CIFAR, steps=6000, inner=Inner(8 / 255, 1, 1.25)),
}


def moved(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Each image moved by up to `most` pixels in both directions, black where it left: a crop of the padded image.

    Shapes      images [B,C,H,W] -> the same
    Randomness  one move for each image, from `generator`
    """
    count, channels, height, width = images.shape
    first = torch.randint(
        2 * most + 1, (2, count, 1), generator=generator, device=generator.device
    ).to(images.device)
    rows, columns = (
        start + torch.arange(side, device=images.device)
        for start, side in zip(first, (height, width), strict=True)
    )
    image, channel = (torch.arange(n, device=images.device) for n in (count, channels))
    padded = nn.functional.pad(images, [most] * 4)
    return padded[
        image[:, None, None, None],
        channel[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None],
    ]


def adversarial_images(
    classifier: nn.Module, x: Tensor, y: Tensor, inner: Inner, generator: torch.Generator
) -> Tensor:
    """The images on which adversarial training trains: near the clean ones, and of a large loss.

    Formula     x <- project(x + stride epsilon sign(grad cross-entropy)), from x + epsilon U(-1, 1)
    Source      Madry et al. 2018; one step of 1.25 epsilon: Wong et al. 2020
    Shapes      x [B,C,H,W] in [0,1], y [B] -> [B,C,H,W] in [0,1]
    """
    start = 2 * torch.rand(x.shape, generator=generator, device=generator.device).to(x) - 1
    at = attacks.project(x + inner.epsilon * start, x, inner.epsilon, "linf")
    for _ in range(inner.steps):
        gradient = attacks.expected_gradient(classifier, at, y, loss=attacks.cross_entropy_loss)[0]
        at = attacks.project(
            at + inner.stride * inner.epsilon * gradient.sign(), x, inner.epsilon, "linf"
        )
    return at


def classification_loss(crop: int = 0, inner: Inner | None = None) -> Loss:
    """Cross-entropy on moved images, or on their worst case if there is an inner maximisation.

    Formula     mean over images of -log softmax(f(x'))_y,   x' = x, or argmax over |x' - x|_inf <= epsilon of the same
    Source      Madry et al. 2018, equation 2.1
    Shapes      images [B,C,H,W] in [0,1], labels [B] -> scalar
    """

    def loss(
        classifier: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Tensor:
        x = moved(images, crop, generator) if crop else images
        if inner:
            x = adversarial_images(classifier, x, labels, inner, generator)
        return nn.functional.cross_entropy(classifier(x), labels)

    return loss


def survivors(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    steps: int,
    batch: int = 200,
) -> int:
    """How many images no frame of a PGD attack in L-inf fools, the clean one included: with 0 steps, how many are
    classified correctly.

    Formula     an upper bound of the robust accuracy; the attack climbs the margin from the clean image
    Shapes      images [N,C,H,W] in [0,1], labels [N] -> a count
    """
    count = 0
    for x, y in zip(images.split(batch), labels.split(batch), strict=True):
        fooled = [frame.fooled for frame in attacks.pgd(classifier, x, y, epsilon, steps=steps)]
        count += int((~torch.stack(fooled).any(0)).sum())
    return count


def train_baseline(
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
    """Train a baseline of `RECIPES`, yielding progress; the last act writes weights, card and checksum.

    Shapes      `minutes` pauses the run after that time, resumable; `measured` limits the test images of the card
    Randomness  all from `seed`
    Writes      folder/name, its line in SHA256SUMS, and folder/checkpoints/name while it runs (resumed if present)
    Errors      ValueError for a name that has no recipe; those of `Training` and `images_of`
    """
    if name not in RECIPES:
        raise ValueError(f"expected one of {sorted(RECIPES)} to train, got {name!r}.")
    recipe = RECIPES[name]
    checkpoint = Path(folder) / "checkpoints" / name
    recipe = replace(
        recipe,
        steps=steps or recipe.steps,
        batch=batch or recipe.batch,
        widths=widths or recipe.widths,
        measured=measured or recipe.measured,
        attacked=min(measured or recipe.attacked, recipe.attacked),
    )
    run = training_of(recipe, seed, checkpoint)
    curve = Curve(checkpoint)
    started = time.monotonic()
    test = images_of(recipe.world, "test")
    for progress in run:
        if progress.is_milestone and run.accelerator.is_main_process:
            curve.add(progress, **_point(recipe, run, test))
        yield progress
        if minutes and is_late(run.accelerator, progress, started + 60 * minutes):
            return  # the loop writes its checkpoint as it is left
    if run.accelerator.is_main_process:
        card = _card(name, recipe, run, test) | {"curve": curve.points()}
        cnn.save(run.average, Path(folder) / name, card)
        assets.record([name], Path(folder))
        for left in (checkpoint, curve.path):
            left.unlink(missing_ok=True)
    run.accelerator.wait_for_everyone()


def training_of(recipe: Recipe, seed: int, checkpoint: Path | None = None) -> Training:
    """The run of a recipe: iterate to train. Randomness: all from `seed`."""
    images, labels = images_of(recipe.world, "train")
    classifier = cnn.ConvClassifier(images.shape[1:], int(labels.max()) + 1, recipe.widths, seed)
    return Training(
        classifier,
        images,
        labels,
        loss=classification_loss(recipe.crop, recipe.inner),
        steps=recipe.steps,
        batch=recipe.batch,
        rate=recipe.rate,
        ema=recipe.ema,
        mirror=recipe.mirror,
        seed=seed,
        precision=recipe.precision,
        checkpoint=checkpoint,
    )


def _point(recipe: Recipe, run: Training, test: tuple[Tensor, Tensor]) -> dict:
    x, y = (part[:CURVE_IMAGES].to(run.accelerator.device) for part in test)
    classifier = run.average.eval()
    return dict(
        correct=survivors(classifier, x, y, recipe.epsilon, 0),
        n=len(y),
        attack_steps=CURVE_STEPS,
        survived=survivors(classifier, x, y, recipe.epsilon, CURVE_STEPS),
    )


def _card(name: str, recipe: Recipe, run: Training, test: tuple[Tensor, Tensor]) -> dict:
    x, y = (part[: recipe.measured].to(run.accelerator.device) for part in test)
    classifier = run.average.eval()

    def stated(n: int, steps: int) -> dict:
        count = survivors(classifier, x[:n], y[:n], recipe.epsilon, steps)
        low, high = intervals.interval(count, n)
        return dict(correct=count, n=n, low=low, high=high)

    attack = dict(
        attack=f"PGD-{CARD_STEPS}",
        loss="margin",
        start="the clean image",
        norm="linf",
        epsilon=recipe.epsilon,
        bound="upper bound of the robust accuracy",
    )
    method = "adversarial" if recipe.inner else "cnn"
    return dict(
        name=name,
        network="ConvClassifier",
        data=DATA[recipe.world],
        recipe=asdict(recipe),
        settings=run.settings,
        **run.facts(),
        command=f"diffclass train {recipe.world} --method {method}",
        accuracy=stated(len(y), 0),
        accuracy_under_attack=stated(min(recipe.attacked, len(y)), CARD_STEPS) | attack,
    )
