"""Frames of a picture whose prompts are compared level by level: who is left, on which timesteps' evidence, at what bill."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffclass import noise
from diffclass.classifiers import racing
from diffclass.classifiers.base import decided
from diffclass.classifiers.zero_shot import ZeroShotClassifier
from diffclass.course import figures
from diffclass.course.figures import BEST, OTHER, SECOND, WRONG
from diffclass.course.scenes.digits import class_lines, posterior_bars
from diffclass.course.scenes.results import Result, recorded
from diffclass.data import grainy
from diffclass.noise import Levels, generator_of

PICTURES = 60
TIMESTEPS = 1000  # of Stable Diffusion's chain
KEEP = (5, 1)  # classes left after each stage
FIRST = 10  # the first stage's levels are so many times fewer
PIECE = 25  # levels measured between two signs of life
BINS = 50  # columns of the heat map, at most
POINTS = 120  # of a curve, at most
LOUD = 0.95  # the quantile of differences that has the full colour
WEIGHTINGS = {
    "noise, 1 (Li et al.)": noise.even_noise_weight,
    "ELBO": noise.elbo_weight,
    "x0, 1": noise.flow_x0_weight,
}
BUDGETS = (20, 50, 100, 250, 500)  # levels; the last is the released code's


def timesteps(count: int) -> Levels:
    """`count` of Stable Diffusion's timesteps as noise levels. Errors: those of `noise.timestep_levels`."""
    betas = noise.scaled_linear_betas(TIMESTEPS)
    return noise.timestep_levels(noise.sigma_of_alpha_bar(noise.alpha_bar(betas)), count)


@dataclass(eq=False, kw_only=True)
class EliminationFilm(Result):
    """Every loss that an elimination has paid for, in the order in which it did.

    Shapes      settings: the arguments of `shoot`; x [1,1,8,8]; losses [K,G], NaN where nobody asked; when [K,G], the
                evaluations spent once a loss was known; of every level measured, in order: bills, leads [K] behind the best
                living class, frozen once a class is out, and alive [K]
    """

    settings: dict
    classifier: ZeroShotClassifier
    x: Tensor
    label: int
    losses: Tensor
    when: Tensor
    bills: list[int] = field(default_factory=list)
    leads: list[Tensor] = field(default_factory=list)
    alive: list[Tensor] = field(default_factory=list)

    def upto(self, spent: int) -> int:
        """The last of the measured levels that so many evaluations pay for; the first, where they pay for none."""
        return max(0, sum(bill <= spent for bill in self.bills) - 1)


class ZeroShotScene:
    """Grainy digits and the perfect text-to-image model of them: `shoot` eliminates prompts, `at` shows a moment of it.

    Randomness  pictures and noise from one seed; a picture has the same noise whatever the budget's weighting
    """

    WEIGHTINGS = WEIGHTINGS
    BUDGETS = BUDGETS

    def __init__(self, pictures: int = PICTURES, seed: int = 0):
        self.law = grainy.grainy()
        self.model = grainy.model()
        self.names = self.model.names
        self.images, self.labels = self.law.sample(pictures, generator_of(seed, "pictures"))
        self.seed = seed
        self.shown: EliminationFilm | None = None
        self._films: dict[tuple, EliminationFilm] = {}

    @property
    def settings(self) -> dict | None:
        """What the film that is shown was shot with: the arguments of `shoot`."""
        return None if self.shown is None else self.shown.settings

    def classifier(self, budget: int, weighting: str) -> ZeroShotClassifier:
        """The staged elimination of so many levels, a tenth of them in the first stage."""
        return ZeroShotClassifier(
            self.model,
            timesteps(budget),
            (budget // FIRST, budget),
            KEEP,
            self.WEIGHTINGS[weighting],
        )

    def bill(self, budget: int) -> int:
        """Evaluations of one picture."""
        return self.classifier(budget, "ELBO").calls

    def described(self, index: int, budget: int, weighting: str) -> str:
        """Settings in words."""
        return f"picture {index}, {budget} levels, weight {weighting}"

    def shoot(self, index: int, budget: int, weighting: str) -> Iterator[float]:
        """Eliminate the prompts of a picture; yields the share of the bill that is paid. A finished film is kept.

        The film that is shown gives way when the new one has its first level.
        """
        key = (index, budget, weighting)
        if key in self._films:
            self.shown = self._films[key]
            yield 1.0
            return
        classifier = self.classifier(budget, weighting)
        shape = (classifier.num_classes, budget)
        film = EliminationFilm(
            settings=dict(index=index, budget=budget, weighting=weighting),
            classifier=classifier,
            x=self.images[index : index + 1],
            label=int(self.labels[index]),
            losses=torch.full(shape, math.nan, dtype=torch.float64),
            when=torch.zeros(shape, dtype=torch.long),
        )
        with recorded(film):
            for spent in self._stages(film):
                self.shown = film
                yield spent / classifier.calls
        self._films[key] = film

    def _stages(self, film: EliminationFilm) -> Iterator[int]:
        """Measure level by level, and decide after each stage, by `racing.stages` on what is measured."""
        classifier = film.classifier
        z = classifier.encode(film.x)
        seeds = classifier.sample_noise(1, generator_of(self.seed, film.settings["index"]))
        alive = torch.ones(1, classifier.num_classes, dtype=torch.bool)
        everyone = alive

        def known(index: Tensor, asked: Tensor) -> Tensor:
            return film.losses[None][..., index].masked_fill(~asked[..., None], math.nan)

        for stage, index in enumerate(
            racing.stage_levels(len(classifier.levels), classifier.counts)
        ):
            for piece in index.split(PIECE):
                with torch.no_grad():
                    new = classifier.losses(z, seeds, piece, alive)[0].double()
                for level, column in zip(piece.tolist(), new.T, strict=True):
                    self._note_level(film, level, column, alive[0])
                yield film.bills[-1]
            told = (classifier.counts[: stage + 1], classifier.keep[: stage + 1])
            *_, (_, alive) = racing.stages(
                known, classifier.scores, everyone, len(classifier.levels), *told
            )
            film.alive[-1] = alive[0]

    def _note_level(self, film: EliminationFilm, level: int, column: Tensor, alive: Tensor) -> None:
        spent = (film.bills[-1] if film.bills else 0) + int(
            alive.sum()
        ) * film.classifier.model.templates
        film.losses[:, level] = column
        film.when[alive, level] = spent
        film.bills.append(spent)
        sums = film.losses.nansum(1) * len(film.classifier.levels) / len(film.bills)
        scores = film.classifier.scores(sums)
        lead = scores - scores[alive].min()
        film.leads.append(torch.where(alive, lead, film.leads[-1]) if film.leads else lead)
        film.alive.append(alive)

    # -----------------------------------------------------------------------------------------------------------------
    # A frame

    def at(self, share: int) -> dict:
        """The frame of the film once `share` per cent of its bill are paid; of what there is, while it is being shot."""
        if self.shown is None:
            return figures.frame([], "There is no film yet.")
        film = self.shown
        now = film.upto(round(share / 100 * film.classifier.calls))
        alive = film.alive[now]
        lead = film.leads[now]
        standing = -torch.where(
            alive, lead, lead.max() + 1
        )  # whoever is out stands behind all others
        best = int(decided(standing[None]))
        colours = [
            colour if bool(left) else OTHER
            for colour, left in zip(figures.emphasis(standing), alive, strict=True)
        ]
        if best != film.label:
            colours[best] = WRONG
        truth = self.law.posterior(film.x)[0]
        exactly = figures.emphasis(truth)
        rows = [
            [self._pictures(film, best), self._heat(film, now, best, colours)],
            [
                self._curves(film, now, share, colours),
                posterior_bars(
                    truth, exactly, "Bayes' rule on the exact law", self.names, w=310, h=185
                ),
                self._meter(film, now),
            ],
        ]
        return figures.frame(rows, self._note(film, now, best, truth))

    def _pictures(self, film: EliminationFilm, best: int) -> dict:
        z = film.classifier.encode(film.x)[0]
        limit = float(z.abs().max())
        shown = [0.5 + (film.x[0, 0] - 0.5) / (4 * grainy.CONTRAST)]
        shown += [0.5 + channel / (2 * limit) for channel in z]
        return figures.tiles(
            shown,
            columns=3,
            size=72,
            title=f"Picture {film.settings['index']} and its latents",
            captions=[f"label {film.label}", "sum", "vertical", "horizontal", "diagonal"],
            borders=[WRONG if best != film.label else None, None, None, None, None],
            alt=f"A faint handwritten {film.label} in heavy grain, and its latents: four pictures of half the size.",
        )

    def differences(self, film: EliminationFilm, now: int, best: int) -> Tensor:
        """By how much each class is worse than the leading one, timestep by timestep, averaged over neighbours.

        Shapes      -> [K,N] for N <= BINS columns of timesteps, NaN where nothing was measured
        """
        spent = film.bills[now]
        known = torch.where((film.when > 0) & (film.when <= spent), film.losses, math.nan)
        gaps = known - known[best]
        columns = [piece.nanmean(1) for piece in gaps.tensor_split(min(BINS, gaps.shape[1]), dim=1)]
        return torch.stack(columns, 1)

    def _heat(self, film: EliminationFilm, now: int, best: int, colours: list[str]) -> dict:
        values = self.differences(film, now, best)
        sizes = values[~values.isnan()].abs()
        limit = float(sizes.quantile(LOUD)) or 1.0
        ticks = [(t / TIMESTEPS, str(t)) for t in range(0, TIMESTEPS + 1, 200)]
        return figures.heat(
            values,
            labels=[
                f"{'' if left else '✗ '}{self.prompt(k)}"
                for k, left in enumerate(film.alive[now].tolist())
            ],
            colours=colours,
            limit=limit,
            ticks=ticks,
            title="Prompt × timestep: worse (orange) or better (blue) than the leader",
            xlabel="timestep; grey: not asked, ✗: out",
            h=225,
            alt=f"Weighted loss of every prompt at every timestep, less that of the leading prompt, class {self.names[best]}; "
            f"{int(film.alive[now].sum())} prompts are left.",
        )

    def prompt(self, k: int) -> str:
        """The text of a class."""
        return grainy.PLAIN.replace("{}", self.names[k])

    def _curves(self, film: EliminationFilm, now: int, share: int, colours: list[str]) -> dict:
        places = torch.linspace(0, len(film.bills) - 1, min(POINTS, len(film.bills))).round().long()
        places = places if len(places) > 1 else places.repeat(2)  # a line needs two ends
        leads = torch.stack([film.leads[i] for i in places.tolist()])
        bill = film.classifier.calls
        paid = [100 * film.bills[i] / bill for i in places.tolist()]
        top = float(film.leads[-1].max()) or 1.0
        return figures.curves(
            paid,
            class_lines(leads.T, colours, self.names),
            title="Behind the leader (frozen once out)",
            xlabel=f"% of {bill} evaluations (drag)",
            ylabel="lag / weighted loss",
            xrange=(0, 100),
            yrange=(0.0, top),
            cursor=min(share, 100 * film.bills[-1] / bill),
            w=430,
            h=185,
            alt="Lag of every class behind the leading one against the evaluations spent.",
        )

    def _meter(self, film: EliminationFilm, now: int) -> dict:
        whole = film.classifier.num_classes * len(film.classifier.levels)
        values = [film.bills[now], film.classifier.calls, whole]
        return figures.bars(
            ["so far", "in the end", "all, always"],
            values,
            colours=[BEST, SECOND, OTHER],
            title="Network evaluations",
            range=(0, whole),
            w=240,
            h=185,
            texts=[str(v) for v in values],
            alt=f"{values[0]} network evaluations so far, {values[1]} in the end, {whole} for all prompts at all levels.",
        )

    def _note(self, film: EliminationFilm, now: int, best: int, truth: Tensor) -> str:
        left = [self.names[k] for k in range(len(self.names)) if bool(film.alive[now][k])]
        says = int(decided(truth[None]))
        return (
            f"Film of {self.described(**film.settings)}: after {film.bills[now]} of {film.classifier.calls} evaluations "
            f"<b>{self.names[best]}</b> leads (label {film.label}); left: {', '.join(left)}. Bayes' rule says "
            f"{self.names[says]} with {float(truth[says]):.2f}. The work on it is {film.ending}."
        )
