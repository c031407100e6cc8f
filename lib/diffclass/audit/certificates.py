"""Does the certificate hold what it says? Checks 26 to 31: attacks inside it, its votes, its ceiling, its coverage."""

from dataclasses import replace

import numpy as np
import torch
from scipy import stats

from diffclass.audit.base import GREEN, RED, CannotJudge, Case, Found, Picture, check, proven
from diffclass.certify.certificates import Certificate, Votes, largest_radius, prediction_changed
from diffclass.certify.counting import count_votes, draw_votes
from diffclass.classifiers.smoothed import NoiseAveraged
from diffclass.intervals import lower_bound

GROUP = "certificates"
RECOUNT = 1000  # votes that a check counts itself at most, for each image


def _certified(case: Case) -> list[tuple[int, Votes, Certificate]]:
    if not case.votes:
        raise CannotJudge("no votes were given: nothing is certified here.")
    if len(case.votes) > len(case.x):
        raise ValueError(
            f"expected votes of the first of {len(case.x)} images, got {len(case.votes)}."
        )
    return [(i, votes, case.certify(votes)) for i, votes in enumerate(case.votes)]


@check(26, GROUP, "do not publish the radius: an image inside it changes the smoothed prediction")
def certificate_vs_attack(case: Case, images: int = 8, draws: int = 16) -> Found:
    """Whether an attack on the smoothed vote, inside the certified radius, provably changes the prediction.

    Judged by fresh votes at the attacked image (`certificates.prediction_changed`); passes while the changed ones do
    not prove a share above the certificates' alpha.
    """
    within = [
        (i, one) for i, _, one in _certified(case) if one.prediction is not None and one.radius > 0
    ][:images]
    if not within:
        raise CannotJudge("every image abstains, so there is no radius to attack inside of.")
    broken = []
    draw = case.generator(26)
    for i, one in within:
        smoothed = NoiseAveraged(case.classifier, one.sigma_pixel, draws, draw)
        alone = replace(
            case,
            x=case.x[i : i + 1],
            y=torch.tensor([one.prediction]).to(case.y),
            norm="l2",
            votes=(),
        )
        reach = min(0.999 * one.radius, case.x[0].numel() ** 0.5)
        x = alone.attacked(
            alone.everyone, target=smoothed, epsilon=reach, draws=1, steps=min(10, case.steps)
        ).x
        *_, counts = count_votes(case.classifier, x, one.sigma_pixel, min(RECOUNT, one.n), draw)
        broken.append(prediction_changed(counts.tolist(), one.prediction))
    alpha = within[0][1].alpha
    return proven(sum(broken), len(broken), alpha), (
        f"{sum(broken)} of {len(broken)} certified images change their smoothed prediction inside the radius (alpha = "
        f"{alpha:g})"
    )


@check(
    27,
    GROUP,
    "choose the class by some votes, bound it by others, store the seed, and never change a count",
)
def votes_are_fresh(case: Case) -> Found:
    """Whether each certificate is about the estimation votes that were cast, which are not those that chose the class.

    Passes when counts, n and seed of every certificate are those of its votes, and selection was counted apart.
    """
    made = _certified(case)
    changed = [i for i, votes, one in made if (one.counts, one.n) != (votes.estimation, votes.n)]
    seedless = [i for i, votes, one in made if votes.seed is None or one.seed != votes.seed]
    split = [
        votes for _, votes, _ in made if max(votes.estimation) < votes.n
    ]  # unanimous counts are alike by right
    reused = sum(votes.selection == votes.estimation for votes in split)
    told = (
        f"of {len(made)} certificates {len(changed)} are about other counts than those cast, {len(seedless)} lack "
        f"the seed, {reused} were judged by the votes that chose their class"
    )
    if changed:
        votes, one = made[changed[0]][1:]
        told += f"; image {changed[0]} claims n = {one.n} of {votes.n} votes cast"
    return (RED if changed or seedless or (split and reused == len(split)) else GREEN), told


@check(
    28,
    GROUP,
    "look for counts that were scaled: no number of votes certifies more than when all agree",
)
def radius_ceiling(case: Case) -> Found:
    """Whether every radius is one that the votes cast can certify. Formula: r <= sigma Phi^-1(alpha^(1/n))."""
    made = _certified(case)
    most = [largest_radius(votes.n, votes.sigma_pixel, one.alpha) for _, votes, one in made]
    above = sum(
        one.radius > limit * (1 + 1e-9) for (_, _, one), limit in zip(made, most, strict=True)
    )
    radii = sorted((one.radius for _, _, one in made), reverse=True)
    told = (
        f"{above} of {len(made)} radii are above what their votes can certify; the largest is {radii[0]:.3f}, the "
        f"ceiling {max(most):.3f}"
    )
    return (
        (RED if above else GREEN),
        told,
        Picture(
            tuple(range(1, len(radii) + 1)),
            {"radius": tuple(radii), "ceiling": (max(most),) * len(radii)},
            "images",
            "certified radius (L2, pixels)",
        ),
    )


@check(
    29, GROUP, "let votes that prove no majority abstain, and count every abstention as an error"
)
def abstain_reported(case: Case) -> Found:
    """Whether votes whose lower bound is below 1/2 abstain, with radius 0; the rate is told."""
    made = _certified(case)
    must = [
        lower_bound(votes.estimation[votes.guess], votes.n, one.alpha) < 0.5
        for _, votes, one in made
    ]
    hidden = sum(
        due and one.prediction is not None for due, (_, _, one) in zip(must, made, strict=True)
    )
    right = sum(one.prediction == int(case.labels[i]) for i, _, one in made)
    return (RED if hidden else GREEN), (
        f"{sum(must)} of {len(made)} images have to abstain, {hidden} of them answer all the same; {right} are "
        "certified for the right class, abstentions counted as errors"
    )


@check(
    30,
    GROUP,
    "certify again with the classifier that is evaluated, and store its checkpoint beside the votes",
)
def same_function_certified(case: Case, images: int = 3) -> Found:
    """Whether this classifier casts the stored votes when it is asked again with the stored seed.

    Passes for a deterministic classifier when all counts recur; for a random one when the share of the guessed class is
    within four standard errors. Votes are recounted for the first images.
    """
    gaps = []
    told = []
    for i, votes, _ in _certified(case)[:images]:
        if votes.seed is None:
            raise CannotJudge("the votes came without their seed, so they cannot be counted again.")
        *_, (_, again) = draw_votes(
            case.classifier,
            case.x[i : i + 1],
            votes.sigma_pixel,
            seed=votes.seed,
            selection=sum(votes.selection),
            estimation=votes.n,
        )
        gaps.append(_differs(votes, again, case.deterministic))
        told.append(f"{votes.estimation[votes.guess]} and {again.estimation[votes.guess]}")
        sigma = votes.sigma_pixel
    return (RED if any(gaps) else GREEN), (
        f"votes for the guessed class, stored and counted again: {'; '.join(told)} (sigma {sigma:g} in pixels, "
        f"{2 * sigma:g} in model units)"
    )


def _differs(stored: Votes, again: Votes, exactly: bool) -> bool:
    if exactly:
        return (stored.selection, stored.estimation) != (again.selection, again.estimation)
    share = [one.estimation[stored.guess] / one.n for one in (stored, again)]
    pooled = sum(share) / 2
    return abs(share[0] - share[1]) > 4 * (2 * pooled * (1 - pooled) / stored.n) ** 0.5


@check(
    31,
    GROUP,
    "bound the probability by an exact interval of the votes that were cast, at the alpha named",
)
def coverage(case: Case, n: int = 1000, repeats: int = 2000, sigma: float = 0.25) -> Found:
    """Whether certificates of a linear classifier, whose radius is known, claim too much in at most alpha of the cases.

    Formula     votes ~ Binomial(n, p) for p = 0.6, 0.9 and 0.99, whose true radius is r = sigma Phi^-1(p); red if
                lower_bound(times that the certified radius is above r, repeats, 0.001) > the certificates' alpha
    """
    rng = np.random.default_rng(case.seed)
    failed = {}
    alphas = set()
    for p in (0.6, 0.9, 0.99):
        counts, times = np.unique(rng.binomial(n, p, repeats), return_counts=True)
        made = [
            case.certify(Votes((100, 0), (int(count), n - int(count)), sigma, case.seed))
            for count in counts
        ]
        alphas |= {one.alpha for one in made}
        truth = sigma * stats.norm.ppf(p)
        failed[p] = int(sum(t for one, t in zip(made, times, strict=True) if one.radius > truth))
    alpha = max(alphas)
    worst_of = max(failed.values())
    told = (
        f"of {repeats} simulated certificates at alpha = {alpha:g}, those with too large a radius: "
        + ", ".join(f"{count} at p = {p:g}" for p, count in failed.items())
    )
    return (RED if lower_bound(worst_of, repeats, 0.001) > alpha else GREEN), told
