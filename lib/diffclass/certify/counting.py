"""The only random step of a certificate: counting votes on noised copies. The arithmetic is in `certificates`."""

from collections.abc import Iterator

from torch import Tensor

from diffclass.certify.certificates import Votes
from diffclass.classifiers.smoothed import Smoothed
from diffclass.noise import seed_of


def draw_votes(
    smoothed: Smoothed,
    x: Tensor,
    *,
    selection: int = 100,
    estimation: int = 1000,
    seed: int = 0,
    picture: int = 0,
) -> Iterator[tuple[int, Votes | None]]:
    """The two independent counts of Cohen's Algorithm 1: one to guess the class, another to bound its probability.

    Shapes      x [1,C,H,W] -> yields (votes counted so far, None), and at the end (all, `Votes`)
    Randomness  both counts from keys of their own, (seed, which, picture): `picture` is the image's place in its data set
    Errors      those of `Smoothed.count`
    """
    done = 0
    counts = []
    for which, wanted in (("selection", selection), ("estimation", estimation)):
        running = None
        for running in smoothed.count(x, seed_of(seed, which, picture), wanted):
            yield done + int(running.sum()), None
        done += wanted
        counts.append(tuple(running.tolist()))
    yield done, Votes(counts[0], counts[1], smoothed.sigma, seed)
