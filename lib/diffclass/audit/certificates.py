"""Does the certificate hold what it says? Checks 26 to 31: attacks inside it, its votes, its ceiling, its coverage.

Votes are hard ones, each a class, or soft ones, each the probability that it gave the chosen class (`SoftTally`).
"""

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
from diffclass.certify.counting import draw_soft_votes, draw_votes
from diffclass.certify.soft import (
    SOFT_BOUNDS,
    THOUSAND,
    SoftCertificate,
    SoftTally,
    betting_bound,
    largest_soft_radius,
)
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
# Votes and looks of a simulated claim by bets, each of which is a sum over all votes.
SOFT = (200, 10)
CLOSE = 0.005  # how far a soft vote may be from what it was, by rounding

AnyVotes = Votes | SoftTally
AnyCertificate = Certificate | SoftCertificate


def _certified(case: Case) -> list[tuple[int, AnyVotes, AnyCertificate]]:
    if not case.votes:
        raise CannotJudge("no votes were given: nothing is certified here.")
    if len(case.votes) > len(case.x):
        raise ValueError(
            f"expected votes of the first of {len(case.x)} images, got {len(case.votes)}."
        )
    return [(i, votes, case.certify(votes)) for i, votes in enumerate(case.votes)]


def _due_bound(votes: AnyVotes, certificate: AnyCertificate) -> str:
    """The bound that votes allow: one that holds at every look for those that said when to stop, else the one named.

    Why         soft votes do not say whether they stopped themselves, and their bounds name what they allow
    """
    if isinstance(votes, SoftTally):
        return certificate.bound
    return "anytime" if votes.stopped else certificate.bound


def _lower(votes: AnyVotes, bound: str, alpha: float) -> float:
    """What a bound proves of the chosen class's share."""
    if isinstance(votes, SoftTally):
        return SOFT_BOUNDS[bound](votes.values, alpha)
    return BOUNDS[bound](votes.estimation[votes.guess], votes.n, alpha)


def _ceiling(votes: AnyVotes, bound: str, alpha: float) -> float:
    """The radius when all of so many votes agree, soft ones with all that they have."""
    largest = largest_soft_radius if isinstance(votes, SoftTally) else largest_radius
    return largest(votes.n, votes.sigma_pixel, alpha, bound)


def _is_about(certificate: AnyCertificate, votes: AnyVotes) -> bool:
    """Whether a certificate is of the estimation votes that were cast."""
    if isinstance(votes, SoftTally):
        claimed = np.sort(np.array(certificate.values))
        return len(claimed) == votes.n and np.allclose(claimed, votes.values, atol=1e-9)
    return (certificate.counts, certificate.n) == (votes.estimation, votes.n)


def _varied(votes: AnyVotes) -> bool:
    """Whether the estimation votes differ: those that all agree are like others by right."""
    if isinstance(votes, SoftTally):
        return len(votes.estimation) > 1
    return max(votes.estimation) < votes.n


def _reused(votes: AnyVotes) -> bool:
    """Whether the votes that chose the class seem to be those that bound it."""
    if isinstance(votes, SoftTally):
        given = sum(share * count for share, count in votes.estimation)
        return votes.selection[votes.guess] == given
    return votes.selection == votes.estimation


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

    Judged by fresh votes at the attacked image (`certificates.prediction_changed`; of soft votes, whether bets prove that the
    class has less than half); passes while the changed ones do not prove a share above the certificates' alpha.
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
    fresh = seed_of(case.seed, "votes inside the radius", i)
    if isinstance(certificate, SoftCertificate):
        parts = [
            shares[:, certificate.prediction]
            for shares, _ in smoothed.billed_shares(x, fresh, votes)
        ]
        against = 1 - torch.cat(parts).numpy()
        return betting_bound(against, certificate.alpha) > 0.5
    *_, counts = smoothed.count(x, fresh, votes)
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
    changed = [i for i, votes, one in certified if not _is_about(one, votes)]
    seedless = [i for i, votes, one in certified if votes.seed is None or one.seed != votes.seed]
    peeked = [i for i, votes, one in certified if one.bound != _due_bound(votes, one)]
    # unanimous counts are alike by right
    split = [votes for _, votes, _ in certified if _varied(votes)]
    reused = sum(map(_reused, split))
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

    Formula     r <= sigma Phi^-1(alpha^(1/n)); of votes that stopped themselves, that of `anytime_bound` of n agreeing ones, of
                soft ones that of their bound of n ones
    """
    certified = _certified(case)
    ceilings = [_ceiling(votes, _due_bound(votes, one), one.alpha) for _, votes, one in certified]
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
        _lower(votes, _due_bound(votes, one), one.alpha) < 0.5 for _, votes, one in certified
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
    return sum(_selected(votes) + votes.n for votes in case.votes[:RECOUNTED])


def _selected(votes: AnyVotes) -> int:
    """How many votes chose the class: of soft ones, which lose by rounding down, at most so many; the class is the same."""
    if isinstance(votes, SoftTally):
        return -(-sum(votes.selection) // THOUSAND)
    return sum(votes.selection)


@check(
    30,
    GROUP,
    "certify again with the classifier that is evaluated, and store its checkpoint beside the votes",
    _recount_cost,
)
def same_function_certified(case: Case) -> Verdict:
    """Whether the claimed classifier casts the stored votes when it is asked again with the stored seed.

    Passes when all counts recur for the first images, soft votes up to rounding: of a claim about held noise, of that noise
    in every vote.
    """
    differ = []
    pairs = []
    for i, votes, _ in _certified(case)[:RECOUNTED]:
        if votes.seed is None:
            raise CannotJudge("the votes came without their seed, so they cannot be counted again.")
        soft = isinstance(votes, SoftTally)
        drawn = draw_soft_votes if soft else draw_votes
        *_, (_, again) = drawn(
            Smoothed(case.claimed, votes.sigma_pixel),
            case.x[i : i + 1],
            seed=votes.seed,
            selection=_selected(votes),
            estimation=votes.n,
            picture=i,
        )
        if soft:
            recurs = again.guess == votes.guess and np.allclose(
                again.values, votes.values, atol=CLOSE
            )
            pairs.append(f"{votes.values.mean():.3f} and {again.values.mean():.3f}")
        else:
            stored = (votes.selection, votes.estimation)
            recurs = (again.selection, again.estimation) == stored
            pairs.append(f"{votes.estimation[votes.guess]} and {again.estimation[votes.guess]}")
        differ.append(not recurs)
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
                Where the claim's votes said themselves when to stop, so do these: r is to hold at each of several looks.
                Soft votes are 1 or 0 then, which vary as much as numbers of their mean can; bets are read at every look
    """
    rng = np.random.default_rng(case.seed)
    soft = bool(case.votes) and isinstance(case.votes[0], SoftTally)
    if soft:
        stopped = case.certify(case.votes[0]).bound == "betting"
    else:
        stopped = any(votes.stopped for votes in case.votes)
    n, often = SOFT if soft else (n, LOOKS)
    looks = np.linspace(n / often, n, often).astype(int) if stopped else np.array([n])
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
                case.certify(_simulated(count, cast, sigma, case.seed, soft, stopped))
                for count in values.tolist()
            ]
            alphas |= {one.alpha for one in certificates}
            too_large |= np.array([one.radius > truth for one in certificates])[places]
        failed[p] = int(too_large.sum())
    alpha = max(alphas)
    evidence = (
        f"of {repeats} simulated certificates at alpha = {alpha:g}, those with too large a radius"
        + (f" at any of {often} looks: " if stopped else ": ")
        + ", ".join(f"{count} at p = {p:g}" for p, count in failed.items())
    )
    bound = lower_bound(max(failed.values()), repeats, 0.001)
    return (RED if bound > alpha else GREEN), evidence


def _simulated(
    count: int, cast: int, sigma: float, seed: int, soft: bool, stopped: bool
) -> AnyVotes:
    """So many votes for the first of two classes, of those that were cast: as a case's votes are, hard or soft."""
    if not soft:
        return Votes((100, 0), (count, cast - count), sigma, seed, stopped=stopped)
    pairs = [(0, cast - count), (THOUSAND, count)]
    told = tuple(pair for pair in pairs if pair[1])
    return SoftTally((100 * THOUSAND, 0), told, sigma, seed)
