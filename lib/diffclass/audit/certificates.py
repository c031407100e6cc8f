"""Does the certificate hold what it says? Checks 26 to 31: attacks inside it, its votes, its ceiling, its coverage."""

import numpy as np
import torch
from scipy import stats

from diffclass import units
from diffclass.audit.base import GREEN, RED, CannotJudge, Case, Picture, Verdict, check, proven
from diffclass.certify.certificates import (
    BOUNDS,
    Certificate,
    Votes,
    largest_radius,
    prediction_changed,
)
from diffclass.certify.counting import draw_votes
from diffclass.classifiers.smoothed import Smoothed
from diffclass.intervals import lower_bound
from diffclass.noise import seed_of

GROUP = "certificates"
RECOUNT = 1000  # votes that a check counts itself at most, for each image
ATTACKED = 8  # certified images that are attacked
COPIES = 16  # noised copies that this attack averages at a step
STEPS = 10  # of this attack, at most
RECOUNTED = 3  # images whose stored votes are counted again
LOOKS = 25  # at the votes of a simulated claim that stops when it knows enough


def _certified(case: Case) -> list[tuple[int, Votes, Certificate]]:
    if not case.votes:
        raise CannotJudge("no votes were given: nothing is certified here.")
    if len(case.votes) > len(case.x):
        raise ValueError(
            f"expected votes of the first of {len(case.x)} images, got {len(case.votes)}."
        )
    return [(i, votes, case.certify(votes)) for i, votes in enumerate(case.votes)]


def _due_bound(votes: Votes, certificate: Certificate) -> str:
    """The bound that votes allow: one that holds at every look for those that said when to stop, else the one named."""
    return "anytime" if votes.stopped else certificate.bound


def _attack_cost(case: Case) -> int:
    images = min(ATTACKED, len(case.votes))
    return images * ((min(STEPS, case.steps) + 1) * COPIES + RECOUNT)


@check(
    26,
    GROUP,
    "do not publish the radius: an image inside it changes the smoothed prediction",
    _attack_cost,
)
def certificate_vs_attack(case: Case) -> Verdict:
    """Whether an attack on the smoothed vote, inside the certified radius, provably changes the prediction.

    Judged by fresh votes at the attacked image (`certificates.prediction_changed`); passes while the changed ones do
    not prove a share above the certificates' alpha.
    """
    within = [
        (i, certificate)
        for i, _, certificate in _certified(case)
        if certificate.prediction is not None and certificate.radius > 0
    ][:ATTACKED]
    if not within:
        raise CannotJudge("every image abstains, so there is no radius to attack inside of.")
    changed = [_changes(case, i, certificate) for i, certificate in within]
    alpha = within[0][1].alpha
    return proven(sum(changed), len(changed), alpha), (
        f"{sum(changed)} of {len(changed)} certified images change their smoothed prediction inside the radius (alpha = "
        f"{alpha:g})"
    )


def _changes(case: Case, i: int, certificate: Certificate) -> bool:
    """Whether an attack on image i, inside its radius, provably changes the vote, by votes of its own."""
    smoothed = Smoothed(case.claimed, certificate.sigma_pixel, draws=COPIES)
    alone = Case(
        smoothed,
        case.x[i : i + 1],
        torch.tensor([certificate.prediction]).to(case.y),
        epsilon=min(0.999 * certificate.radius, case.x[0].numel() ** 0.5),
        norm="l2",
        held=False,
        attack=case.attack,
        steps=min(STEPS, case.steps),
        loss=case.loss,
        seed=seed_of(case.seed, "inside the radius", i) % 2**32,
    )
    x = alone.attacked(alone.everyone).x
    votes = min(RECOUNT, certificate.n)
    *_, counts = smoothed.count(x, seed_of(case.seed, "votes inside the radius", i), votes)
    return prediction_changed(counts.tolist(), certificate.prediction)


@check(
    27,
    GROUP,
    "choose the class by some votes, bound it by others, store the seed, and never change a count",
)
def votes_are_fresh(case: Case) -> Verdict:
    """Whether each certificate is about the estimation votes that were cast, which are not those that chose the class.

    Passes when counts, n and seed of every certificate are those of its votes, selection was counted apart, and votes that
    said themselves when to stop are bounded by what holds at every look.
    """
    certified = _certified(case)
    changed = [
        i for i, votes, one in certified if (one.counts, one.n) != (votes.estimation, votes.n)
    ]
    seedless = [i for i, votes, one in certified if votes.seed is None or one.seed != votes.seed]
    peeked = [i for i, votes, one in certified if one.bound != _due_bound(votes, one)]
    # unanimous counts are alike by right
    split = [votes for _, votes, _ in certified if max(votes.estimation) < votes.n]
    reused = sum(votes.selection == votes.estimation for votes in split)
    evidence = (
        f"of {len(certified)} certificates {len(changed)} are about other counts than those cast, {len(seedless)} lack "
        f"the seed, {reused} were judged by the votes that chose their class"
    )
    if changed:
        _, votes, one = certified[changed[0]]
        evidence = f"{evidence}; image {changed[0]} claims n = {one.n} of {votes.n} votes cast"
    if peeked:
        evidence = f"{evidence}; {len(peeked)} stopped counting when they knew enough, bounded as if n had been fixed before"
    return (
        RED if changed or seedless or peeked or (split and reused == len(split)) else GREEN
    ), evidence


@check(
    28,
    GROUP,
    "look for counts that were scaled: no number of votes certifies more than when all agree",
)
def radius_ceiling(case: Case) -> Verdict:
    """Whether every radius is one that the votes cast can certify.

    Formula     r <= sigma Phi^-1(alpha^(1/n)); of votes that stopped themselves, that of `anytime_bound` of n agreeing ones
    """
    certified = _certified(case)
    ceilings = [
        largest_radius(votes.n, votes.sigma_pixel, one.alpha, _due_bound(votes, one))
        for _, votes, one in certified
    ]
    above = sum(
        one.radius > ceiling * (1 + 1e-9)
        for (_, _, one), ceiling in zip(certified, ceilings, strict=True)
    )
    radii = sorted((one.radius for _, _, one in certified), reverse=True)
    evidence = (
        f"{above} of {len(certified)} radii are above what their votes can certify; the largest is {radii[0]:.3f}, the "
        f"ceiling {max(ceilings):.3f}"
    )
    picture = Picture(
        tuple(range(1, len(radii) + 1)),
        {"radius": tuple(radii), "ceiling": (max(ceilings),) * len(radii)},
        "images",
        "certified radius (L2, pixels)",
    )
    return (RED if above else GREEN), evidence, picture


@check(
    29, GROUP, "let votes that prove no majority abstain, and count every abstention as an error"
)
def abstain_reported(case: Case) -> Verdict:
    """Whether votes whose lower bound is below 1/2 abstain, with radius 0; their number is given."""
    certified = _certified(case)
    abstain = [
        BOUNDS[_due_bound(votes, one)](votes.estimation[votes.guess], votes.n, one.alpha) < 0.5
        for _, votes, one in certified
    ]
    hidden = sum(
        due and one.prediction is not None
        for due, (_, _, one) in zip(abstain, certified, strict=True)
    )
    right = sum(one.prediction == int(case.labels[i]) for i, _, one in certified)
    return (RED if hidden else GREEN), (
        f"{sum(abstain)} of {len(certified)} images have to abstain, {hidden} of them answer all the same; {right} are "
        "certified for the right class, abstentions counted as errors"
    )


def _recount_cost(case: Case) -> int:
    return sum(sum(votes.selection) + votes.n for votes in case.votes[:RECOUNTED])


@check(
    30,
    GROUP,
    "certify again with the classifier that is evaluated, and store its checkpoint beside the votes",
    _recount_cost,
)
def same_function_certified(case: Case) -> Verdict:
    """Whether the claimed classifier casts the stored votes when it is asked again with the stored seed.

    Passes when all counts recur for the first images: of a claim about held noise, of that noise in every vote.
    """
    differ = []
    pairs = []
    for i, votes, _ in _certified(case)[:RECOUNTED]:
        if votes.seed is None:
            raise CannotJudge("the votes came without their seed, so they cannot be counted again.")
        *_, (_, again) = draw_votes(
            Smoothed(case.claimed, votes.sigma_pixel),
            case.x[i : i + 1],
            seed=votes.seed,
            selection=sum(votes.selection),
            estimation=votes.n,
            picture=i,
        )
        stored = (votes.selection, votes.estimation)
        differ.append((again.selection, again.estimation) != stored)
        pairs.append(f"{votes.estimation[votes.guess]} and {again.estimation[votes.guess]}")
        sigma = votes.sigma_pixel
    return (RED if any(differ) else GREEN), (
        f"votes for the guessed class, stored and counted again: {'; '.join(pairs)} (sigma {sigma:g} in pixels, "
        f"{units.sigma_to_model(sigma):g} in model units)"
    )


@check(
    31,
    GROUP,
    "bound the probability by an exact interval of the votes that were cast, at the alpha named",
)
def coverage(case: Case, n: int = 1000, repeats: int = 2000, sigma: float = 0.25) -> Verdict:
    """Whether certificates of a linear classifier, whose radius is known, claim too much in at most alpha of the cases.

    Formula     votes ~ Binomial(n, p) for p = 0.6, 0.9 and 0.99, whose true radius is r = sigma Phi^-1(p); red if
                lower_bound(times that the certified radius is above r, repeats, 0.001) > the certificates' alpha.
                Where the claim's votes said themselves when to stop, so do these: r is to hold at each of LOOKS looks
    """
    rng = np.random.default_rng(case.seed)
    stopped = any(votes.stopped for votes in case.votes)
    looks = np.linspace(n / LOOKS, n, LOOKS).astype(int) if stopped else np.array([n])
    failed = {}
    alphas = set()
    for p in (0.6, 0.9, 0.99):
        steps = np.diff(looks, prepend=0)
        counts = rng.binomial(steps, p, (repeats, len(looks))).cumsum(1)
        truth = sigma * stats.norm.ppf(p)
        too_large = np.zeros(repeats, dtype=bool)
        for cast, found in zip(looks.tolist(), counts.T, strict=True):
            values, places = np.unique(found, return_inverse=True)
            certificates = [
                case.certify(
                    Votes((100, 0), (count, cast - count), sigma, case.seed, stopped=stopped)
                )
                for count in values.tolist()
            ]
            alphas |= {one.alpha for one in certificates}
            too_large |= np.array([one.radius > truth for one in certificates])[places]
        failed[p] = int(too_large.sum())
    alpha = max(alphas)
    evidence = (
        f"of {repeats} simulated certificates at alpha = {alpha:g}, those with too large a radius"
        + (f" at any of {LOOKS} looks: " if stopped else ": ")
        + ", ".join(f"{count} at p = {p:g}" for p, count in failed.items())
    )
    bound = lower_bound(max(failed.values()), repeats, 0.001)
    return (RED if bound > alpha else GREEN), evidence
