"""What each part of IDC's recipe is worth: short trainings on digits that change one thing at a time, as records."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from diffclass import attacks
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


def attacked(
    classifier: TranslationClassifier,
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    seed: int,
) -> Tensor:
    """Pictures after PGD, which averages new draws of the classifier at every step. Shapes: [N,C,H,W], [N] -> [N,C,H,W].

    Randomness  the classifier's noise from `generator`, the start from `seed`
    """
    *_, last = attacks.pgd(
        classifier,
        images,
        labels,
        BUDGET,
        noise=lambda step, draw: classifier.sample_noise(len(images), generator),
        steps=ATTACK_STEPS,
        draws=DRAWS,
        generator=torch.Generator().manual_seed(seed),
    )
    return last.x


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
        recipe = DIGITS_IDC(steps=steps, **ABLATIONS[variant])
        run = training_of(recipe, seed)
        *_, last = run
        classifier = TranslationClassifier(run.average.eval().requires_grad_(False))
        generator = torch.Generator().manual_seed(seed + 1)
        fresh = Fresh(classifier, generator)
        x = test[:ATTACKED]
        y = answers[:ATTACKED]
        adversarial = attacked(classifier, x, y, generator, seed)
        with torch.no_grad():
            before = decided(fresh(x)) == y
            after = decided(fresh(adversarial)) == y
        settings = dict(
            **run.settings,
            **recipe.says["recipe"],
            variant=variant,
            final_loss=round(last.loss, 4),
        )
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
    correct: int, n: int, noise: str, settings: dict, attack: str | None = None
) -> results.Record:
    return results.accuracy_record(
        correct,
        n,
        world="digits",
        classifier="idc",
        source="training.ablations.ablate",
        attack=attack,
        detail=f"{settings['variant']}, {noise} noise",
        settings=settings | dict(noise=noise),
        seed=settings["seed"],
    )
