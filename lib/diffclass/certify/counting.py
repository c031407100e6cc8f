"""The only random step of a certificate: counting votes on noised copies. The arithmetic is in `certificates`."""

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from diffclass.certify.anytime import StopRule
from diffclass.certify.certificates import Votes
from diffclass.certify.soft import THOUSAND, SoftStopRule, SoftTally, thousandths
from diffclass.classifiers.base import decided
from diffclass.classifiers.smoothed import VOTE_BLOCK, Smoothed
from diffclass.noise import seed_of


def draw_votes(
    smoothed: Smoothed,
    x: Tensor,
    *,
    selection: int = 100,
    estimation: int = 1000,
    seed: int = 0,
    picture: int = 0,
    rule: StopRule | None = None,
    together: int = VOTE_BLOCK,
) -> Iterator[tuple[int, Votes | None]]:
    """The two independent counts of Cohen's Algorithm 1: one to guess the class, another to bound its probability.

    Shapes      x [1,C,H,W] -> yields (votes counted so far, None), and at the end (all, `Votes`)
    Stopping    with a `rule`, counting ends when that knows enough, after `estimation` votes at the latest; what was
                stopped by looking at it is bounded by `anytime` only
    Randomness  both counts from keys of their own, (seed, which, picture): `picture` is the image's place in its data set;
                how many votes are asked `together` changes none
    Errors      those of `Smoothed.count`
    """
    selected = None
    spent = 0
    for selected, calls in smoothed.billed_count(
        x, seed_of(seed, "selection", picture), selection, together=together
    ):
        spent = calls
        yield int(selected.sum()), None
    guess = int(decided(selected[None].double()))
    counts = None
    for counts, calls in smoothed.billed_count(
        x, seed_of(seed, "estimation", picture), estimation, together=together
    ):
        counted = int(counts.sum())
        in_all = spent + calls
        yield selection + counted, None
        if rule is not None and rule.verdict(int(counts[guess]), counted) != "go on":
            break
    votes = Votes(
        tuple(selected.tolist()),
        tuple(counts.tolist()),
        smoothed.sigma,
        seed,
        stopped=rule is not None,
        calls=in_all,
    )
    yield selection + votes.n, votes


def draw_soft_votes(
    smoothed: Smoothed,
    x: Tensor,
    *,
    selection: int = 100,
    estimation: int = 1000,
    seed: int = 0,
    picture: int = 0,
    rule: SoftStopRule | None = None,
    together: int = VOTE_BLOCK,
) -> Iterator[tuple[int, SoftTally | None]]:
    """The same for soft votes: probabilities in thousandths, rounded down, those that choose the class and fresh ones.

    Shapes      x [1,C,H,W] -> yields (votes so far, None), and at the end (all, `SoftTally`)
    Stopping    with a `rule`, which looks at what will be stored; the bound is then that of bets
    Randomness  the copies, and the keys, of `draw_votes`
    Errors      those of `Smoothed.billed_shares`
    """
    sums = np.zeros(smoothed.num_classes, dtype=np.int64)
    chosen = 0
    for shares, calls in smoothed.billed_shares(
        x, seed_of(seed, "selection", picture), selection, together=together
    ):
        sums = sums + thousandths(shares.numpy()).sum(0)
        chosen += len(shares)
        spent = calls
        yield chosen, None
    guess = int(np.argmax(sums))
    given = np.zeros(0, dtype=np.int64)
    for shares, calls in smoothed.billed_shares(
        x, seed_of(seed, "estimation", picture), estimation, together=together
    ):
        given = np.append(given, thousandths(shares[:, guess].numpy()))
        in_all = spent + calls
        yield chosen + len(given), None
        if rule is not None and rule.verdict(given / THOUSAND) != "go on":
            break
    tally = SoftTally.of_thousandths(sums, given, smoothed.sigma, seed=seed, calls=in_all)
    yield chosen + tally.n, tally
