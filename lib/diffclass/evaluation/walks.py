"""RDC's ablations, also under the attack that knows of the walk: how far it goes, at which levels, and whose gradient.

Likelihood maximisation moves a picture by up to eta, at levels of a band; its paper measures both against attacks on what
stands behind it. Here each number has two beside it: what clean pictures lose, and what an attack through the walk leaves.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffclass import attacks, intervals, units, zoo
from diffclass.classifiers.base import Classifier, decided, draw, fresh_noise
from diffclass.classifiers.purified import LikelihoodMaximisation, PurifiedClassifier
from diffclass.data.worlds import images_of, world_of
from diffclass.storage import results

SOURCE = "evaluation.walks"
BAND = (0.4, 0.6)  # RDC's levels
ETAS = (0.025, 0.05, 0.1, 0.2, 0.3)  # L-inf in pixels: how far the walk may go
BANDS = ((0.05, 0.1), (0.1, 0.2), (0.2, 0.4), BAND, (0.6, 1.0))
STEPS = 20  # of PGD
ATTACKED = 100  # test digits
KINDS = ("clean", "unaware", "through the walk")  # who has changed the pictures
ASKED = 50  # pictures whose gradients are compared
DRAWS = 4  # of each, so that six pairs are compared
AGREEMENT = "agreement of gradients"  # what a record calls the cosine


def places(budget: float) -> list[tuple[float, tuple[float, float]]]:
    """The walks that are measured: every reach at RDC's levels, and all levels at the reach of the attack's budget."""
    reaches = [(eta, BAND) for eta in ETAS]
    return reaches + [(budget, band) for band in BANDS if band != BAND]


def ablate(path: str | Path, *, n: int = ATTACKED, seed: int = 0) -> Iterator[results.Record]:
    """Put one step of likelihood maximisation before the diffusion classifier of digits, at each of `places`.

    Meaning     three records of a walk: accuracy on clean digits; on digits that PGD changed which knows the classifier alone;
                and the share that is right on what PGD through the walk made, by the exact gradient and by BPDA both. The last
                two are upper bounds of a robust accuracy
    Randomness  fresh noise from `seed` by keys, the same for every walk
    Writes      each number is appended to `path` and yielded; walks that it holds already are left out
    Errors      ValueError for no digits, or a file that is not one of records
    """
    n = units.check_whole(n, "digits", least=1)
    world = world_of("digits")
    budget = world.budget("linf")
    classifier = zoo.classifier("digits", "dc")
    denoiser = zoo.classifier("digits", "rdc1").purifier.denoiser
    images, labels = images_of("digits", "test")
    x = images[:n]
    y = labels[:n]
    done = _done(path)
    unaware = None
    for eta, band in places(budget):
        if (eta, band) in done:
            continue
        if unaware is None:
            unaware = _changed(classifier, x, y, budget, seed)
        walk = LikelihoodMaximisation.paper(denoiser, eta, 1, band=band)
        whole = PurifiedClassifier(walk, classifier)
        through = [
            _right(whole, _changed(way, x, y, budget, seed), y, seed)
            for way in whole.gradients().values()
        ]
        right = {
            "clean": _right(whole, x, y, seed),
            "unaware": _right(whole, unaware, y, seed),
            "through the walk": torch.stack(through).all(0),
        }
        written = [
            _record(kind, int(right[kind].sum()), n, eta, band, budget, seed) for kind in KINDS
        ]
        for record in written:  # before the first is yielded: whoever stops then has the whole walk
            record.append(path)
        yield from written


def _record(
    kind: str,
    right: int,
    n: int,
    eta: float,
    band: tuple[float, float],
    budget: float,
    seed: int,
) -> results.Record:
    attack = {} if kind == "clean" else dict(norm="linf", epsilon=budget, attack_steps=STEPS)
    return results.accuracy_record(
        right,
        n,
        world="digits",
        classifier="rdc1",
        source=f"{SOURCE}.ablate",
        attack=f"PGD-{STEPS}" if attack else None,
        detail=f"{kind}, eta {eta:g}, levels {band[0]:g} to {band[1]:g}",
        settings=dict(eta=eta, band=list(band), kind=kind, **attack),
        seed=seed,
        checkpoint=results.one_checkpoint(zoo.checkpoints("digits", "rdc1")),
    )


def _done(path: str | Path) -> set[tuple[float, tuple[float, float]]]:
    """The walks of which a file has every number."""
    if not Path(path).exists():
        return set()
    return {
        (record.settings["eta"], tuple(record.settings["band"]))
        for record in results.read(path)
        if record.settings.get("kind") == KINDS[-1]
    }


def _changed(way: Classifier, x: Tensor, y: Tensor, budget: float, seed: int) -> Tensor:
    """Pictures after PGD on a classifier, under new noise at every step. Shapes: [N,C,H,W], [N] -> [N,C,H,W]."""
    noise = fresh_noise(way, len(x), seed, "walks, attack")
    *_, last = attacks.pgd(way, x, y, budget, noise=noise, steps=STEPS)
    return last.x


def _right(classifier: Classifier, x: Tensor, y: Tensor, seed: int) -> Tensor:
    """Which pictures are classified correctly, under noise that no attack saw. Shapes: [N,C,H,W], [N] -> [N]."""
    with torch.no_grad():
        return decided(classifier(x, draw(classifier, len(x), seed, "walks, judge"))) == y


def agreement(
    path: str | Path,
    world: str,
    names: Sequence[str],
    *,
    n: int = ASKED,
    draws: int = DRAWS,
    seed: int = 0,
) -> Iterator[results.Record]:
    """How far the gradients of classifiers agree between draws of their noise: a record for each.

    Formula     the mean over pictures of the mean over pairs of draws of  <g, g'> / (||g|| ||g'||),  g the gradient of the
                margin's loss at the clean picture
    Source      Chen et al. 2024 (RDC), who print it as evidence that nothing is masked
    Randomness  noise from `seed` by keys, for each picture its own
    Writes      each number is appended to `path` and yielded; classifiers that it holds already are left out
    Errors      ValueError for no pictures, fewer than two draws, or a file that is not one of records; those of `zoo.classifier`
    """
    n = units.check_whole(n, "pictures", least=1)
    draws = units.check_whole(draws, "draws", least=2)
    images, labels = images_of(world, "test")
    held = results.read(path) if Path(path).exists() else []
    done = {record.classifier for record in held if record.world == world}
    for name in names:
        if name in done:
            continue
        classifier = zoo.classifier(world, name)
        cosines = cosines_of(classifier, images[:n], labels[:n], draws, seed)
        low, high = intervals.paired_interval(cosines.tolist())
        record = results.Record(
            metric=AGREEMENT,
            world=world,
            classifier=name,
            value=float(cosines.mean()),
            n=n,
            low=low,
            high=high,
            level=0.95,
            settings=dict(draws=draws),
            seed=seed,
            checkpoint=results.one_checkpoint(zoo.checkpoints(world, name)),
            source=f"{SOURCE}.agreement",
            unit="cosine",
            method="Korn-Graubard over images",
        )
        record.append(path)
        yield record


def cosines_of(
    classifier: Classifier, x: Tensor, y: Tensor, draws: int, seed: int, together: int = 10
) -> Tensor:
    """The mean cosine of the pairs of gradients under several draws, for each picture.

    Formula     (||sum_i u_i||^2 - m) / (m (m - 1))  of unit vectors u_1 ... u_m
    Shapes      [N,C,H,W], [N] -> [N]
    """
    found = []
    for start in range(0, len(x), together):
        part = slice(start, start + together)
        directions = []
        for number in range(draws):
            noise = fresh_noise(classifier, len(x), seed, "agreement", kept=part)(0, number)
            gradient, _, _ = attacks.expected_gradient(classifier, x[part], y[part], noise=noise)
            directions.append(normalize(gradient.flatten(1).double(), dim=1))
        whole = torch.stack(directions).sum(0).square().sum(1)
        found.append((whole - draws) / (draws * (draws - 1)))
    return torch.cat(found)
