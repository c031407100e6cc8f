"""Frames of a digit whose noised copies vote: what the counts prove at every look, and what an attack disproves.

Two bounds of the same counts are shown and never confused: that of a number of votes that was fixed beforehand, and one
that may be read at every look.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from diffclass import attacks, data
from diffclass.certify import certificates
from diffclass.classifiers.base import decided, fresh_noise, take
from diffclass.classifiers.noised import NoisedBayesClassifier
from diffclass.classifiers.smoothed import VOTE_BLOCK, Smoothed
from diffclass.course import figures
from diffclass.course.figures import BEST, COLOURS, OTHER, WRONG
from diffclass.course.scenes.results import DONE, RUNNING, Result, recorded
from diffclass.denoisers.base import Denoiser
from diffclass.noise import seed_of

SELECTION = 20  # votes that choose the class: a wrong choice certifies less, never falsely
TOGETHER = 20  # votes between two looks
BATCH = 1000  # votes of one job
MOST = 3000  # votes on one digit
COPIES = 6  # noised copies that are shown
SURE = 60  # votes that decide whether a changed picture has changed the smoothed prediction
BUDGETS = (1.0, 2.0, 3.0, 4.5)  # L2, pixels, tried one after the other on the smoothed vote
STEPS = 8
ROUNDS = 5


def attack_votes(
    smoothed: Smoothed,
    x: Tensor,
    original: int,
    *,
    alpha: float,
    votes: int,
    seed: int,
    picture: int,
) -> Iterator[tuple[float, float | None]]:
    """Search the shortest change of a smoothed prediction: climb the mean logits of noised copies, let votes decide.

    Shapes      x [1,C,H,W] -> yields (share of the work done, the shortest L2 length so far or None)
    Meaning     an upper bound of the radius: `votes` fresh votes prove the change, except with probability alpha for each
                picture on the way
    Randomness  from keys of `seed` and `picture`, one for each purpose
    Units       pixels
    """
    climbed = smoothed.surrogate()
    seeds = (seed_of(seed, "judge", picture, number) for number in itertools.count())

    def changed(image: Tensor) -> bool:
        *_, counts = smoothed.count(image, next(seeds), votes)
        return certificates.prediction_changed(counts.tolist(), original, alpha)

    search = attacks.smallest_l2(
        climbed,
        x,
        torch.tensor([original]),
        noise=fresh_noise(climbed, 1, seed, "attack", picture),
        fooled=changed,
        budgets=BUDGETS,
        steps=STEPS,
        rounds=ROUNDS,
    )
    whole = attacks.longest_search(len(BUDGETS), STEPS, ROUNDS)
    for trial, best in enumerate(search):
        length = None if best is None else float(attacks.size_of(best - x, "l2"))
        yield (trial + 1) / whole, length


@dataclass(eq=False, kw_only=True)
class Ballot(Result):
    """The votes on one digit at one sigma, look by look, and what has become of an attack on the same function.

    Shapes      selection [K], None before it is counted; looks: running counts [K] after every TOGETHER votes; copies
                [COPIES,C,H,W], the first noised pictures that vote, and answers [COPIES], what they are taken for
    Units       sigma_pixel and `smallest` (L2, None while no change is found) in pixels of [0,1]
    """

    index: int
    sigma_pixel: float
    smoothed: Smoothed
    copies: Tensor
    answers: Tensor
    ending: str = DONE
    selection: Tensor | None = None
    looks: list[Tensor] = field(default_factory=list)
    counting: Iterator[Tensor] | None = None
    attack: Result | None = None
    smallest: float | None = None
    bounds: dict[str, dict[float, list[float]]] = field(
        default_factory=lambda: {name: {} for name in certificates.BOUNDS}
    )

    @property
    def n(self) -> int:
        """Votes that are counted."""
        return len(self.looks) * TOGETHER

    @property
    def guess(self) -> int | None:
        """The class that the selection chose."""
        return None if self.selection is None else int(decided(self.selection[None].double()))

    @property
    def hits(self) -> list[int]:
        """Votes for that class at every look."""
        guess = self.guess
        return [int(counts[guess]) for counts in self.looks]

    def shares(self, bound: str, alpha: float) -> np.ndarray:
        """The lower bounds of its share at every look, worked out once. Shapes: -> [looks]."""
        known = self.bounds[bound].setdefault(alpha, [])
        hits = self.hits[len(known) :]
        n = [(len(known) + look + 1) * TOGETHER for look in range(len(hits))]
        if bound == "anytime":
            known.extend(certificates.BOUNDS[bound](hits, n, alpha))
        else:  # which takes one number of votes at a time
            known.extend(
                certificates.BOUNDS[bound](*one, alpha) for one in zip(hits, n, strict=True)
            )
        return np.array(known)


class CertifyingScene:
    """Digits and the votes that were cast on them, kept for each digit and sigma.

    Jobs (`vote`, `attack`) are iterators: each item is the share of work done; a widget can show and stop them. Another
    alpha reads the counted votes again.
    Randomness  from keys of `seed`, the purpose and the digit: the same controls give the same votes
    """

    def __init__(self, denoiser: Denoiser, seed: int = 0):
        self.world = data.digits()
        self.denoiser = denoiser
        self.seed = seed
        self._ballots: dict[tuple[int, float], Ballot] = {}

    def ballot(self, index: int, sigma_pixel: float) -> Ballot:
        """The votes on a digit at a sigma, of which there may be none yet."""
        key = (index, sigma_pixel)
        if key not in self._ballots:
            smoothed = Smoothed(NoisedBayesClassifier(self.denoiser, sigma_pixel))
            drawn = smoothed.mean.drawn(self._key("estimation", index), 0, VOTE_BLOCK)
            x = self.picture(index)
            drawn = take(drawn, slice(0, COPIES))
            with torch.no_grad():
                answers = decided(smoothed.mean.copies(x, drawn))
            self._ballots[key] = Ballot(
                index=index,
                sigma_pixel=sigma_pixel,
                smoothed=smoothed,
                copies=x + sigma_pixel * drawn[0],
                answers=answers,
            )
        return self._ballots[key]

    def picture(self, index: int) -> Tensor:
        """One test digit. Shapes: -> [1,C,H,W]."""
        return self.world.test_images[index : index + 1]

    def _key(self, purpose: str, index: int) -> int:
        return seed_of(self.seed, purpose, index)

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def vote(self, index: int, sigma_pixel: float, votes: int = BATCH) -> Iterator[float]:
        """Cast `votes` more votes on a digit, MOST in all at most; the class is chosen by votes of their own first."""
        ballot = self.ballot(index, sigma_pixel)
        wanted = min(ballot.n + votes, MOST)
        begun = ballot.n
        with recorded(ballot):
            ballot.ending = RUNNING
            if ballot.selection is None:
                *_, ballot.selection = ballot.smoothed.count(
                    self.picture(index), self._key("selection", index), SELECTION
                )
                yield 0.0
            while ballot.n < wanted:
                ballot.looks.append(self._next_look(ballot))
                yield (ballot.n - begun) / (wanted - begun)
        yield 1.0

    def _next_look(self, ballot: Ballot) -> Tensor:
        """The counts after TOGETHER votes more; after a failure, those before are cast again, as they were."""
        if ballot.counting is None:
            counts = ballot.smoothed.count(
                self.picture(ballot.index),
                self._key("estimation", ballot.index),
                MOST,
                together=TOGETHER,
            )
            ballot.counting = itertools.islice(counts, len(ballot.looks), None)
        try:
            return next(ballot.counting)
        except Exception:
            ballot.counting = None
            raise

    def attack(self, index: int, sigma_pixel: float, alpha: float) -> Iterator[float]:
        """Search the shortest change of the class that the selection chose, on the function that votes."""
        ballot = self.ballot(index, sigma_pixel)
        if ballot.selection is None:
            yield from self.vote(index, sigma_pixel, 0)
        ballot.attack = Result()
        with recorded(ballot.attack):
            search = attack_votes(
                ballot.smoothed,
                self.picture(index),
                ballot.guess,
                alpha=alpha,
                votes=SURE,
                seed=self.seed,
                picture=index,
            )
            for done, length in search:
                if length is not None and (ballot.smallest is None or length < ballot.smallest):
                    ballot.smallest = length
                yield done
        yield 1.0

    # -- the frame ----------------------------------------------------------------------------------------------------

    def at(self, index: int, sigma_pixel: float, alpha: float, shown: int) -> dict:
        """What is shown: a digit, its votes up to `shown`, both bounds at every look, and the radius axis."""
        ballot = self.ballot(index, sigma_pixel)
        look = min(max(1, shown // TOGETHER), len(ballot.looks))  # 0 before the first vote
        rows = [
            [self._tiles(ballot), self._votes(ballot, look)],
            [self._shares(ballot, alpha, look), self._radii(ballot, alpha, look)],
            [self._axis(ballot, alpha, look)],
        ]
        return figures.frame(rows, self._note(ballot, alpha, look))

    def _tiles(self, ballot: Ballot) -> dict:
        label = int(self.world.test_labels[ballot.index])
        wrong = [WRONG if int(answer) != label else None for answer in ballot.answers]
        return figures.tiles(
            [self.picture(ballot.index)[0], *ballot.copies],
            columns=7,
            size=72,
            low=-0.25,
            high=1.25,
            title=f"Test digit {ballot.index} and the first noised copies that vote, σ = {ballot.sigma_pixel:.2f}",
            captions=[f"a {label}", *(f"says {int(answer)}" for answer in ballot.answers)],
            borders=[None, *wrong],
            alt=f"A handwritten {label} and {COPIES} noised copies with what each is taken for.",
        )

    def _votes(self, ballot: Ballot, look: int) -> dict:
        counts = ballot.looks[look - 1] if look else torch.zeros(self.denoiser.num_classes)
        n = look * TOGETHER
        title = f"The first {n} votes of {ballot.n} cast" if n else "No votes yet: press Vote"
        spoken = ", ".join(f"class {k} {int(c)}" for k, c in enumerate(counts) if c) or "none"
        return figures.bars(
            [str(k) for k in range(len(counts))],
            counts / max(n, 1),
            title=title,
            colours=[BEST if k == ballot.guess else OTHER for k in range(len(counts))],
            texts=[str(int(c)) if c else "" for c in counts],
            xlabel="class (blue: chosen by other votes)",
            w=420,
            h=110,
            alt=f"{title}; counts: {spoken}.",
        )

    def _grid(self, ballot: Ballot) -> list[int]:
        """The looks that the horizontal axis reaches."""
        return list(range(TOGETHER, max(BATCH, ballot.n) + 1, TOGETHER))

    def _cursor(self, look: int) -> float | None:
        return look * TOGETHER if look else None

    def _shares(self, ballot: Ballot, alpha: float, look: int) -> dict:
        grid = self._grid(ballot)
        cast = grid[: len(ballot.looks)]
        series = [dict(y=[0.5] * len(grid), colour=COLOURS[7], dash="3 3", width=1.2)]
        if look:
            observed = np.array(ballot.hits) / cast
            fixed = ballot.shares("fixed", alpha)
            anytime = ballot.shares("anytime", alpha)
            series += [
                dict(x=cast, y=observed, colour=COLOURS[7], label="share of the votes (no proof)"),
                dict(
                    x=cast, y=fixed, colour=COLOURS[1], label="bound, n fixed beforehand", width=2.2
                ),
                dict(x=cast, y=anytime, colour=COLOURS[0], label="bound at every look", width=2.2),
            ]
        return figures.curves(
            grid,
            series,
            title="Share of the chosen class, and its lower bounds",
            w=490,
            h=190,
            xlog=True,
            xlabel="votes n (drag); dashed: a majority",
            ylabel="share",
            yrange=(0.0, 1.02),
            cursor=self._cursor(look),
            legend="bottom",
            alt="Share of the votes for the chosen class and two lower bounds of it against the "
            "number of votes.",
        )

    def _radii(self, ballot: Ballot, alpha: float, look: int) -> dict:
        grid = self._grid(ballot)
        sigma = ballot.sigma_pixel
        some = np.unique(np.geomspace(1, len(grid), 25).astype(int)) * TOGETHER  # a smooth line
        most = dict(
            x=some,
            y=[certificates.largest_radius(n, sigma, alpha) for n in some.tolist()],
            colour=COLOURS[7],
            dash="5 3",
            label="ceiling: all n votes agree",
            width=1.5,
        )
        series = [most]
        if look:
            cast = grid[: len(ballot.looks)]
            for bound, colour, label in (
                ("fixed", COLOURS[1], "radius, n fixed beforehand"),
                ("anytime", COLOURS[0], "radius at every look"),
            ):
                radii = _radii_of(ballot.shares(bound, alpha), sigma)
                series.append(dict(x=cast, y=radii, colour=colour, label=label, width=2.2))
        return figures.curves(
            grid,
            series,
            title="Certified radius, and the ceiling σ Φ⁻¹(α^(1/n))",
            w=490,
            h=190,
            xlog=True,
            xlabel="votes n (drag)",
            ylabel="radius (L2, pixels)",
            yrange=(0.0, 4.6 * sigma),  # room for the legend above the ceiling
            cursor=self._cursor(look),
            alt="Certified radius by two bounds and the largest radius that so many votes allow, "
            "against the number of votes.",
        )

    def _axis(self, ballot: Ballot, alpha: float, look: int) -> dict:
        radii = dict.fromkeys(certificates.BOUNDS, 0.0)
        if look:
            for bound in radii:
                share = ballot.shares(bound, alpha)[look - 1 : look]
                radii[bound] = float(_radii_of(share, ballot.sigma_pixel)[0])
        fixed = f"n = {look * TOGETHER}, fixed" if look else "n fixed"
        named = {"fixed": fixed, "anytime": "read at every look"}
        rows = [
            dict(label=named[bound], certified=radius, attacked=ballot.smallest)
            for bound, radius in radii.items()
        ]
        last = max(3.2 * ballot.sigma_pixel, 1.3 * (ballot.smallest or 0.0))
        found = (
            "no attack so far" if ballot.smallest is None else f"attack at {ballot.smallest:.2f}"
        )
        return figures.radius_axis(
            rows,
            title=f"How far this digit can be moved (σ = {ballot.sigma_pixel:.2f}, α = {alpha:.2g})",
            xlabel="L2 length of a change (pixels)",
            range=(0.0, last),
            w=1000,
            alt=f"Certified up to {radii['fixed']:.2f} by the bound of fixed n, up to "
            f"{radii['anytime']:.2f} by the bound at every look; {found}.",
        )

    def _note(self, ballot: Ballot, alpha: float, look: int) -> str:
        label = int(self.world.test_labels[ballot.index])
        if ballot.selection is None:
            return f"No vote has been cast on this {label} at σ = {ballot.sigma_pixel:.2f} yet: press Vote."
        chosen = f"{SELECTION} votes of their own chose <b>{ballot.guess}</b> (label {label})"
        if not look:
            return f"{chosen}; none of the votes that bound its share is cast yet."
        n = look * TOGETHER
        lines = [f"{chosen}, which won {ballot.hits[look - 1]} of the first {n} others."]
        if ballot.ending not in (DONE, RUNNING):
            lines.append(f"Counting {ballot.ending} after {ballot.n} votes; Vote goes on with it.")
        for bound, words in (("fixed", "Had n been fixed"), ("anytime", "Read at every look")):
            share = float(ballot.shares(bound, alpha)[look - 1])
            radius = float(_radii_of(np.array([share]), ballot.sigma_pixel)[0])
            ending = f"radius {radius:.3f}" if share >= 0.5 else "no majority is proven: abstain"
            lines.append(f"{words}: share above {share:.4f}, {ending}.")
        proven = np.flatnonzero(ballot.shares("anytime", alpha)[:look] >= stats.norm.cdf(1))
        if len(proven):
            lines.append(f"1σ was certain after {(int(proven[0]) + 1) * TOGETHER} votes.")
        lines.append(self._attack_note(ballot))
        return " ".join(line for line in lines if line)

    def _attack_note(self, ballot: Ballot) -> str:
        if ballot.attack is None:
            return ""
        state = "" if ballot.attack.ending == DONE else f" ({ballot.attack.ending})"
        if ballot.smallest is None:
            return f"Attack on the votes{state}: none found, which is no proof."
        return f"Attack on the votes{state}: a change of {ballot.smallest:.2f} turns them."


def _radii_of(shares: np.ndarray, sigma_pixel: float) -> np.ndarray:
    """Radii of bounds, 0 where no majority is proven. Shapes: [L] -> [L]."""
    return sigma_pixel * stats.norm.ppf(np.clip(shares, 0.5, None))
