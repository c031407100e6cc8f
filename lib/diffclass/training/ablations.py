"""What each part of IDC's recipe is worth: short trainings on digits that change one thing at a time, as records."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from diffclass import attacks
from diffclass.attacks.search import AttackStep
from diffclass.classifiers.base import Fresh, Held, decided
from diffclass.classifiers.idc import TranslationClassifier
from diffclass.data.worlds import images_of
from diffclass.evaluation import accuracies
from diffclass.storage import results
from diffclass.training.recipes import DIGITS_IDC
from diffclass.training.train import training_of

BUDGET = 0.15  # L-inf in pixels, PGD, EOT, test digits
ATTACK_STEPS = 20
DRAWS = 2
ATTACKED = 100
ABLATIONS = {
    "as in the recipe": {},
    "without the inter-class loss": dict(inter=0.0),
    "released labels": dict(labels="released"),
    "released labels, without the inter-class loss": dict(labels="released", inter=0.0),
    "orthogonal labels": dict(labels="orthogonal"),
    "simplex labels": dict(labels="simplex"),
    "Hadamard labels, scrambled": dict(scrambled=True),
    "1 position": dict(positions=1),
    **{f"{count} positions": dict(positions=count) for count in (2, 3, 5, 6, 7, 8)},
}


CURVES = ("as in the recipe", "without the inter-class loss")
CURVE_BUDGETS = (0.05, 0.1, 0.15, 0.2, 0.3)  # L-inf in pixels
CURVE_STEPS = (1, 2, 5, 10, ATTACK_STEPS)  # of PGD, after which survivors are counted


def film_of(
    classifier: TranslationClassifier,
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    seed: int,
    budget: float,
) -> Iterator[AttackStep]:
    """PGD on a classifier, step by step, which averages new draws of it at every step.

    Shapes      [N,C,H,W], [N]; budget L-inf in pixels
    Randomness  the classifier's noise from `generator`, the start from `seed`
    """
    return attacks.pgd(
        classifier,
        images,
        labels,
        budget,
        noise=lambda step, draw: classifier.sample_noise(len(images), generator),
        steps=ATTACK_STEPS,
        draws=DRAWS,
        generator=torch.Generator().manual_seed(seed),
    )


def attacked(
    classifier: TranslationClassifier,
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    seed: int,
) -> Tensor:
    """Pictures after the whole film of PGD at `BUDGET`. Shapes: [N,C,H,W], [N] -> [N,C,H,W]. Randomness: that of `film_of`."""
    *_, last = film_of(classifier, images, labels, generator, seed, BUDGET)
    return last.x


def curves(path: Path, steps: int = 400, seed: int = 0) -> Iterator[results.Record]:
    """Train each of `CURVES` and attack it at each budget; each number is appended to `path` and yielded.

    Meaning     the share of digits that no step so far has fooled, on fresh noise: an upper bound that falls with the steps
    Randomness  as for `ablate`
    Writes      a record for each variant, budget and number of steps of `CURVE_STEPS`
    """
    test, answers = images_of("digits", "test")
    x = test[:ATTACKED]
    y = answers[:ATTACKED]
    for variant in CURVES:
        classifier, settings = _trained(variant, steps, seed)
        for budget in CURVE_BUDGETS:
            generator = torch.Generator().manual_seed(seed + 1)
            film = film_of(classifier, x, y, generator, seed, budget)
            fooled = torch.stack([frame.fooled for frame in film]).cumsum(0) > 0  # [steps + 1,N]
            for after in CURVE_STEPS:
                record = _record(
                    int((~fooled[after]).sum()),
                    len(x),
                    "fresh",
                    dict(
                        **settings,
                        attack="PGD, margin loss",
                        norm="linf",
                        epsilon=budget,
                        attack_steps=after,
                        draws=DRAWS,
                    ),
                    f"PGD-{after}",
                    "training.ablations.curves",
                )
                record.append(path)
                yield record


def _trained(variant: str, steps: int, seed: int) -> tuple[TranslationClassifier, dict]:
    """The classifier of a finished training of a variant, and what a record says of it."""
    recipe = DIGITS_IDC(steps=steps, **ABLATIONS[variant])
    run = training_of(recipe, seed)
    *_, last = run
    settings = dict(
        **run.settings, **recipe.says["recipe"], variant=variant, final_loss=round(last.loss, 4)
    )
    return TranslationClassifier(run.average.eval().requires_grad_(False)), settings


def ablate(
    path: Path, steps: int = 400, seed: int = 0, only: list[str] | None = None
) -> Iterator[results.Record]:
    """Train a digits network for each of `ABLATIONS` and measure it; each number is appended to `path` and yielded.

    Randomness  training, labels and attacks from `seed`; fresh noise where the record says so
    Writes      three records a variant: accuracy with held and with fresh noise, and an upper bound of the accuracy
                under PGD in L-inf on the classifier with fresh noise (right before and after)
    """
    test, answers = images_of("digits", "test")
    for variant in only or ABLATIONS:
        classifier, settings = _trained(variant, steps, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        fresh = Fresh(classifier, generator)
        x = test[:ATTACKED]
        y = answers[:ATTACKED]
        adversarial = attacked(classifier, x, y, generator, seed)
        with torch.no_grad():
            before = decided(fresh(x)) == y
            after = decided(fresh(adversarial)) == y
        attack = dict(
            attack="PGD, margin loss",
            norm="linf",
            epsilon=BUDGET,
            attack_steps=ATTACK_STEPS,
            draws=DRAWS,
        )
        held = accuracies.accuracy(Held.seeded(classifier), test, answers, batch=200)
        random = accuracies.accuracy(fresh, test, answers, batch=200)
        survived = int((before & after).sum())
        for record in (
            _record(held, len(test), "held", settings),
            _record(random, len(test), "fresh", settings),
            _record(survived, len(x), "fresh", settings | attack, f"PGD-{ATTACK_STEPS}"),
        ):
            record.append(path)
            yield record


def _record(
    correct: int,
    n: int,
    noise: str,
    settings: dict,
    attack: str | None = None,
    source: str = "training.ablations.ablate",
) -> results.Record:
    return results.accuracy_record(
        correct,
        n,
        world="digits",
        classifier="idc",
        source=source,
        attack=attack,
        detail=f"{settings['variant']}, {noise} noise",
        settings=settings | dict(noise=noise),
        seed=settings["seed"],
    )
