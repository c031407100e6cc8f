"""Which class, for fewer network evaluations: shared noise, chosen levels, elimination, races with a guarantee.

Every strategy asks for the class with the smallest score, a weighted sum of losses over a fine grid of G noise levels:

    score_k = sum_g w_g E_eps e_k(g, eps) - ln prior_k,    e_k(g, eps) = ||D_k(z + sigma_g eps, sigma_g) - z||^2

(of a picture that carries noise, the terms of `likelihood.noised_errors`) and yields `Answer`s that a notebook can animate; `answer` runs it to its end and keeps the way there.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffclass import likelihood, noise, units
from diffclass.denoisers.base import Denoiser
from diffclass.noise import Levels, NoiseBank, Weighting

# one for all pictures, or one for each
Generators = torch.Generator | Sequence[torch.Generator]
# share [G], count, generator -> grid indices [count]
Design = Callable[[Tensor, int, torch.Generator], Tensor]
# differences [B,K,K], state -> who is out [B,K], state
Rule = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Question:
    """What is asked: a denoiser, G levels, w = weighting(levels), and ln prior [K], None for a uniform one.

    A score is minus a logit of the `BayesClassifier` made of the same parts, its noise averaged away; with a `sigma_pixel`,
    the noise that the pictures carry, of the `NoisedBayesClassifier`.
    Errors      ValueError for a prior that does not fit, or a noise that does not lie below every level
    """

    denoiser: Denoiser
    levels: Levels
    weighting: Weighting = noise.elbo_weight
    log_prior: Tensor | None = None
    sigma_pixel: float | None = None

    def __post_init__(self):
        count = self.denoiser.num_classes
        prior = torch.full((count,), -math.log(count)) if self.log_prior is None else self.log_prior
        if tuple(prior.shape) != (count,) or not bool(torch.isfinite(prior).all()):
            raise ValueError(
                f"expected a finite log-prior for each of {count} classes, got {prior.tolist()}."
            )
        object.__setattr__(self, "log_prior", prior.double())
        if self.sigma_pixel is not None:
            carried = units.check_sigma_pixel(self.sigma_pixel)
            lowest = float(self.levels.sigma.min())
            if not units.sigma_to_model(carried) < lowest:
                raise ValueError(
                    f"expected a noise sigma_pixel below {units.sigma_to_pixel(lowest):.4g}, the lowest level of the grid in "
                    f"pixels, got {carried:.4g}; take noise.noised_levels({units.sigma_to_model(carried):.4g}, ...)."
                )

    def errors(self, z: Tensor, bank: NoiseBank, classes: Sequence[int]) -> Tensor:
        """e_k of some classes at the levels of a bank. Shapes: z [B,C,H,W] in model space -> [B,k,T,S]."""
        if self.sigma_pixel is None:
            return likelihood.diffusion_errors(self.denoiser, z, bank, classes)
        sigma_tau = units.sigma_to_model(self.sigma_pixel)
        return likelihood.noised_errors(self.denoiser, z, sigma_tau, bank, classes)


class Meter:
    """A batch of images, and the number of network evaluations spent on each of them.

    One evaluation is one forward of one image for one class; a multi-head network answers for all classes in one.
    Shapes      x [B,C,H,W] in [0,1], or with the question's noise; evaluations [B]
    Randomness  noise from `generator`, each image its own. With a generator for each image, what an image is asked depends
                on its own generator alone, whatever else is in the batch
    Errors      those of `units.check_images`; ValueError for generators of other images
    """

    def __init__(self, question: Question, x: Tensor, generator: Generators):
        clean = question.sigma_pixel is None
        units.check_images(x, question.denoiser.image_shape, pixel_range=clean)
        self.question = question
        self.z = units.to_model(x)
        if not isinstance(generator, torch.Generator) and len(generator) != len(x):
            raise ValueError(
                f"expected one generator, or one for each of {len(x)} images, got {len(generator)}."
            )
        self.generator = generator
        self.weights = question.weighting(question.levels).double().to(x.device)
        self.evaluations = torch.zeros(len(x), dtype=torch.long, device=x.device)
        self.everyone = torch.ones(
            len(x), question.denoiser.num_classes, dtype=torch.bool, device=x.device
        )
        self.heads = question.denoiser.one_call

    def draw(self, count: int) -> Tensor:
        """Fresh noise for `count` levels. Shapes: -> [count,1,B,C,H,W]."""
        if isinstance(self.generator, torch.Generator):
            return self._normal((count, 1, *self.z.shape), self.generator)
        own = (count, 1, 1, *self.z.shape[1:])
        return torch.cat([self._normal(own, one) for one in self.generator], 2)

    def _normal(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=self.z.dtype, device=generator.device)
        return drawn.to(self.z)

    def levels(self, share: Tensor) -> Tensor:
        """One random level for each image, the same for all under one generator. Shapes: share [G] -> [B]."""
        if isinstance(self.generator, torch.Generator):
            return independent(share, 1, self.generator).expand(len(self.z))
        return torch.cat([independent(share, 1, one) for one in self.generator])

    def cost(self, asked: Tensor) -> Tensor:
        """Network evaluations at one level. Shapes: asked [B,K] -> [B]."""
        return asked.any(1).long() if self.heads else asked.sum(1)

    @torch.no_grad()
    def losses(self, index: Tensor, asked: Tensor, eps: Tensor) -> Tensor:
        """Weighted errors w_g e_k(g, eps) of the classes asked for, under the same noise; NaN for the others.

        Shapes      index [n] on the grid, asked [B,K], eps [n,1,B,C,H,W] -> [B,K,n], float64
        """
        grid = self.question.levels
        every = range(asked.shape[1])
        levels = grid[index]
        weighted = torch.full(
            (*asked.shape, len(index)), math.nan, dtype=torch.float64, device=self.z.device
        )
        for classes in [list(every)] if self.heads else [[k] for k in every]:
            rows = asked[:, classes].any(1).nonzero().flatten()
            if len(rows):
                bank = NoiseBank(levels, eps[:, :, rows])
                errors = self.question.errors(self.z[rows], bank, classes)[..., 0]
                weighted[rows[:, None], torch.tensor(classes, device=rows.device)] = (
                    errors.double() * self.weights[index]
                )
        self.evaluations += len(index) * self.cost(asked)
        return weighted.masked_fill(~asked[..., None], math.nan)

    def losses_at(self, index: Tensor, asked: Tensor, eps: Tensor) -> Tensor:
        """`losses` of every image at a level of its own. Shapes: index [B], asked [B,K], eps [1,1,B,C,H,W] -> [B,K]."""
        weighted = torch.full_like(asked, math.nan, dtype=torch.float64)
        for level in index.unique():
            here = asked & (index == level).to(asked.device)[:, None]
            found = self.losses(level[None], here, eps)[..., 0]
            weighted = torch.where(here, found, weighted)
        return weighted

    def losses_of_all(self, index: Tensor, shared: bool = True) -> Tensor:
        """Losses of every class under fresh noise: one for all classes, or one for each. Shapes: [n] -> [B,K,n]."""
        if shared:
            return self.losses(index, self.everyone, self.draw(len(index)))
        only = torch.eye(self.everyone.shape[1], dtype=torch.bool, device=self.z.device)
        return torch.stack(
            [
                self.losses(index, own.expand_as(self.everyone), self.draw(len(index)))[:, k]
                for k, own in enumerate(only)
            ],
            1,
        )

    def answer(self, estimates: Tensor, alive: Tensor, decided: Tensor | None = None) -> "Answer":
        """What has been found so far, with the bill."""
        return Answer(
            estimates,
            alive,
            self.evaluations.clone(),
            self.everyone[:, 0] if decided is None else decided,
        )

    def scores(self, sums: Tensor) -> Tensor:
        """Sums of losses, with the prior. Shapes: [B,K] -> [B,K]."""
        return sums - self.question.log_prior.to(sums)


@dataclass(frozen=True, eq=False)
class Answer:
    """What a strategy would say now, and what it has cost.

    Shapes      estimates [B,K] of the scores, in nats; alive [B,K] the classes still possible; evaluations [B];
                decided [B], false where a race has not finished; history, all moments up to this one
    """

    estimates: Tensor
    alive: Tensor
    evaluations: Tensor
    decided: Tensor
    history: tuple["Answer", ...] = ()

    @property
    def prediction(self) -> Tensor:
        """The living class with the smallest estimate. Shapes: [B]."""
        return self.estimates.masked_fill(~self.alive, math.inf).argmin(1)


def answer(run: Iterator[Answer]) -> Answer:
    """Run a strategy to its end: `answer(full(question, x, generator))`."""
    history = tuple(run)
    return replace(history[-1], history=history)


def _smallest(scores: Tensor, alive: Tensor, count: int) -> Tensor:
    """The `count` living classes of smallest score, or all the living. Shapes: [B,K], [B,K] -> [B,K]."""
    best = scores.masked_fill(~alive, math.inf).topk(count, largest=False).indices
    return torch.zeros_like(alive).scatter(1, best, True) & alive


# ---------------------------------------------------------------------------------------------------------------------
# All classes, at all levels or at some: unbiased


def full(
    question: Question, x: Tensor, generator: Generators, shared: bool = True
) -> Iterator[Answer]:
    """Every class at every level of the grid, once.

    Unbiased    for the scores of this grid; a coarse grid has other scores, by the error of its quadrature
    Why         Var(a - b) = Var a + Var b - 2 Cov(a, b), and noise shared by the classes makes the last term large
    Shapes      x [B,C,H,W] in [0,1] -> one `Answer`
    """
    meter = Meter(question, x, generator)
    losses = meter.losses_of_all(torch.arange(len(question.levels)), shared)
    yield meter.answer(meter.scores(losses.sum(-1)), meter.everyone)


def sampled(
    question: Question,
    x: Tensor,
    generator: torch.Generator,
    count: int,
    share: Tensor,
    design: Design,
    shared: bool = True,
) -> Iterator[Answer]:
    """Every class at `count` levels drawn from the grid, each weighted by how often it is drawn.

    Formula     score_k ~ 1/n sum_i (w_g / share_g) e_k(g, eps_i) at g = g_i,  - ln prior_k
    Unbiased    for the scores of the grid, for every share > 0: both designs draw level g n share_g times on average
    Shapes      x [B,C,H,W] in [0,1], share [G]; the levels are drawn once for the batch -> one `Answer`
    """
    meter = Meter(question, x, generator)
    share = _checked(share, question.levels)
    index = design(share, count, generator)
    losses = meter.losses_of_all(index, shared) / share[index].to(x.device)
    yield meter.answer(meter.scores(losses.mean(-1)), meter.everyone)


def independent(share: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Levels drawn independently from the share. Shapes: [G] -> [count]."""
    return torch.multinomial(share, count, replacement=True, generator=generator)


def systematic(share: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """One level from each of `count` stretches of equal share, at one random offset. Shapes: [G] -> [count]."""
    position = (
        torch.arange(count) + torch.rand(1, generator=generator, dtype=torch.float64)
    ) / count
    return torch.searchsorted(share.cumsum(0), position, right=True).clamp(max=len(share) - 1)


def log_share(levels: Levels) -> Tensor:
    """Levels spread evenly over ln sigma. Shapes: -> [G], sum 1."""
    return (levels.upper / levels.lower).log() / (levels.upper[-1] / levels.lower[0]).log()


def _checked(share: Tensor, levels: Levels) -> Tensor:
    if (
        tuple(share.shape) != (len(levels),)
        or float(share.min()) <= 0
        or abs(float(share.sum()) - 1) > 1e-6
    ):
        raise ValueError(
            f"expected {len(levels)} shares > 0 of sum 1, got {len(share)} from {float(share.min()):.3g} "
            f"with sum {float(share.sum()):.6g}; a level never drawn would be missing from the scores."
        )
    return share.double()


@dataclass(frozen=True, eq=False)
class Pilot:
    """How the two best classes of other images differ: Neyman's share [G]; the largest difference in one draw from it
    (reach) and its largest standard deviation in an image (scale), in nats; all the network evaluations spent."""

    share: Tensor
    reach: float
    scale: float
    evaluations: int


def pilot(
    question: Question,
    images: Tensor,
    generator: torch.Generator,
    samples: int = 2,
    even: float = 0.1,
) -> Pilot:
    """Measure the two best classes of other images at every level of the grid, `samples` >= 2 times.

    Formula     share_g = (1 - even) s_g / sum s + even / G,   s_g^2 = mean over images of Var_eps[w_g (e_2nd - e_1st)]
    Source      Neyman 1934; the even part keeps every importance weight below G / even
    Shapes      images [N,C,H,W] in [0,1]
    """
    if samples < 2 or not 0 < even <= 1:
        raise ValueError(
            f"expected samples >= 2, to see a variance, and 0 < even <= 1, got {samples} and {even}."
        )
    meter = Meter(question, images, generator)
    grid = torch.arange(len(question.levels))
    losses = torch.stack([meter.losses_of_all(grid) for _ in range(samples)], -1)  # [N,K,G,S]
    best = meter.scores(losses.mean(-1).sum(-1)).topk(2, largest=False).indices
    first, second = losses[torch.arange(len(images))[:, None], best].unbind(1)
    spread = (second - first).var(-1).mean(0).sqrt()
    share = (1 - even) * spread / spread.sum() + even / len(grid)
    drawn = (second - first) / share[:, None]  # [N,G,S]
    mean = (share[:, None] * drawn).sum(1).mean(-1)
    variance = (share[:, None] * (drawn - mean[:, None, None]) ** 2).sum(1).mean(-1)
    return Pilot(
        share.cpu(),
        float(drawn.abs().max()),
        float(variance.max().sqrt()),
        int(meter.evaluations.sum()),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Elimination without a guarantee. Biased: a class that is dropped by bad luck, or by its first levels, never returns


def staged(
    question: Question,
    x: Tensor,
    generator: Generators,
    counts: Sequence[int] = (8, 64),
    keep: Sequence[int] = (5, 1),
) -> Iterator[Answer]:
    """Li's staged elimination: a sparse sub-grid for all classes, denser ones for those that are left.

    Formula     stage j: measure the living at the counts[j] levels of index (i + 1/2) G / counts[j], once each;
                score_k ~ G mean of w_g e_k over all levels so far, - ln prior_k; keep the keep[j] smallest
    Source      Li et al. 2023 and its code, where w = 1 on the noise error and the grid is one of timesteps
    Biased      see above; who survives until counts[-1] = G has the score that `full` gives under the same noise
    Shapes      x [B,C,H,W] in [0,1] -> one `Answer` a stage
    """
    size = len(question.levels)
    counts, keep = check_stages(counts, keep, size, question.denoiser.num_classes)
    meter = Meter(question, x, generator)
    eps = meter.draw(size)

    def losses(index: Tensor, alive: Tensor) -> Tensor:
        return meter.losses(index, alive, eps[index])

    for estimates, alive in stages(losses, meter.scores, meter.everyone, size, counts, keep):
        yield meter.answer(estimates, alive)


def check_stages(
    counts: Sequence[int], keep: Sequence[int], size: int, classes: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the levels and the survivors of each stage if they fit a grid of `size` levels and the classes, else raise.

    Errors      ValueError unless counts grow to at most `size` and keep falls from at most `classes` to 1
    """
    counts = units.check_wholes(counts, "counts")
    keep = units.check_wholes(keep, "keep")
    if not (
        0 < len(counts) == len(keep)
        and 0 < counts[0]
        and sorted(set(counts)) == list(counts)
        and counts[-1] <= size
        and keep[0] <= classes
        and sorted(set(keep), reverse=True) == list(keep)
        and keep[-1] == 1
    ):
        raise ValueError(
            f"expected counts that grow to at most {size} levels and as many keep that fall from at most "
            f"{classes} classes to 1, got counts {tuple(counts)} and keep {tuple(keep)}."
        )
    return counts, keep


def stages(
    losses: Callable[[Tensor, Tensor], Tensor],
    scores: Callable[[Tensor], Tensor],
    everyone: Tensor,
    size: int,
    counts: Sequence[int],
    keep: Sequence[int],
) -> Iterator[tuple[Tensor, Tensor]]:
    """The elimination of `staged`, of whatever losses: the estimates after each stage, and who is left.

    Shapes      losses(index [n] on the grid, asked [B,K]) -> [B,K,n], NaN for those not asked; scores([B,K] sums) -> [B,K];
                everyone [B,K]; counts and keep as `check_stages` returns them -> estimates [B,K], alive [B,K]
    """
    alive = everyone
    done = 0
    sums = estimates = torch.zeros_like(alive, dtype=torch.float64)
    for index, survivors in zip(stage_levels(size, counts), keep, strict=True):
        done += len(index)
        sums = sums + losses(index, alive).sum(-1)  # NaN once a class is out
        estimates = torch.where(alive, scores(sums * size / done), estimates)
        alive = _smallest(estimates, alive, survivors)
        yield estimates, alive


def stage_levels(size: int, counts: Sequence[int]) -> Iterator[Tensor]:
    """The levels that each stage measures: those of its sub-grid that no earlier stage has measured.

    Formula     i (size // count) + (size // count) // 2,  i < count
    Shapes      counts as `check_stages` returns them -> indices [n] of a grid of `size` levels, one tensor a stage
    """
    done = torch.zeros(size, dtype=torch.bool)
    for count in counts:
        index = torch.arange(count) * (size // count) + size // count // 2
        index = index[~done[index]]
        done[index] = True
        yield index


def sift_and_refine(
    question: Question,
    x: Tensor,
    generator: Generators,
    threshold: float,
    sift: int = 16,
    most: int = 3,
) -> Iterator[Answer]:
    """NDC's way with many classes: sift with few levels, upwards, until few are left; measure those from scratch.

    Formula     drop k once  sum_t (G/sift) w_t e_k(t) - ln prior_k > min_j (the same) + threshold;  stop at `most`
                classes, or keep the `most` smallest in the end; refine on all G levels with new noise
    Source      Chen et al. 2024 (NDC), its code, where errors are pixel means and the factor G/sift is left out
    Shapes      x [B,C,H,W] in [0,1] -> one `Answer` for each sifted level and one for the refinement
    """
    size = len(question.levels)
    classes = question.denoiser.num_classes
    if not (threshold > 0 and 1 <= sift <= size and 1 <= most <= classes):
        raise ValueError(
            f"expected threshold > 0, sift <= {size}, most <= {classes}, got {threshold}, {sift}, {most}."
        )
    meter = Meter(question, x, generator)
    stride = size // sift
    alive = meter.everyone
    estimates = meter.scores(torch.zeros_like(meter.everyone, dtype=torch.float64))
    for index in (torch.arange(sift) * stride + stride // 2).split(1):
        asked = alive & (alive.sum(1) > most)[:, None]
        estimates = estimates + size / sift * meter.losses(index, asked, meter.draw(1))[
            ..., 0
        ].nan_to_num(0.0)
        least = estimates.masked_fill(~alive, math.inf).amin(1, keepdim=True)
        alive = alive & (~asked | (estimates <= least + threshold))
        yield meter.answer(estimates, alive)
    alive = _smallest(estimates, alive, most)
    refined = meter.losses(
        torch.arange(size), alive & (alive.sum(1) > 1)[:, None], meter.draw(size)
    ).sum(-1)
    yield meter.answer(torch.where(refined.isnan(), estimates, meter.scores(refined)), alive)


# ---------------------------------------------------------------------------------------------------------------------
# Races: a class is out only when the evidence against it holds whenever one looks


def race(
    question: Question,
    x: Tensor,
    generator: Generators,
    share: Tensor,
    rule: Rule,
    budget: int,
) -> Iterator[Answer]:
    """One random level at a time for the classes alive, until one is left, or the budget is spent: undecided.

    Formula     X_kj = (w_g / share_g) (e_k - e_j) - ln prior_k + ln prior_j,  of expectation score_k - score_j
    Guarantee   P(the class of smallest score is ever out) <= alpha of the rule, where its assumptions hold
    Shapes      x [B,C,H,W] in [0,1], share [G], budget in network evaluations an image -> one `Answer` a draw
    Randomness  with one generator, levels are drawn once for the batch, and noise for each image
    """
    meter = Meter(question, x, generator)
    share = _checked(share, question.levels)
    alive = meter.everyone
    state = None
    sums = draws = torch.zeros_like(alive, dtype=torch.float64)
    if (least := int(meter.cost(alive).max())) > budget:
        raise ValueError(
            f"expected a budget of at least {least}, one level of every class, got {budget}."
        )
    while bool(
        (running := (alive.sum(1) > 1) & (meter.evaluations + meter.cost(alive) <= budget)).any()
    ):
        asked = alive & running[:, None]
        index = meter.levels(share)
        losses = meter.losses_at(index, asked, meter.draw(1))
        drawn = meter.scores(losses / share[index].to(losses)[:, None])
        sums = sums + drawn.nan_to_num(0.0)
        draws = draws + asked
        out, state = rule(drawn[:, :, None] - drawn[:, None], state)
        left = alive & ~(out & asked)  # should that be nobody, the best so far stays
        alive = torch.where(left.any(1, keepdim=True), left, _smallest(sums / draws, alive, 1))
        yield meter.answer(sums / draws, alive, alive.sum(1) == 1)


def betting(
    x: Tensor, state: Tensor | None, *, alpha: float, reach: float
) -> tuple[Tensor, Tensor]:
    """Class k is out once bets that it is worse than its rivals have multiplied their stake by 1/alpha.

    Formula     M_k = mean over rivals j and bets c of prod_i (1 + c clip(X_kj,i, -reach, reach) / reach)
    Guarantee   E[X | past] <= 0 for the best k: M_k is a nonnegative supermartingale, P(sup M_k >= 1/alpha) <= alpha,
                where the mean over rivals replaces a union bound
    Assumes     X >= -reach; clipping above only gives evidence away. Under a guessed reach the promise is one about
                the clipped differences
    Source      Ville 1939; Waudby-Smith & Ramdas 2024
    Shapes      x [B,K,K], NaN for pairs not drawn -> out [B,K], state [B,K,K,bets]
    """
    bets = 2.0 ** -torch.arange(1, 7, dtype=torch.float64, device=x.device)
    won = torch.log1p(bets * (x.nan_to_num(0.0).clamp(-reach, reach) / reach)[..., None])
    won = won if state is None else state + won
    return _convinced(won, alpha, reach), won


def normal_mixture(
    x: Tensor, state: Tensor | None, *, alpha: float, scale: float
) -> tuple[Tensor, Tensor]:
    """The same with exponential bets of every size: far cheaper, and it assumes far more.

    Formula     M_k = mean over j of integral_0^inf exp(c S - c^2 n scale^2 / 2) 2 N(c; 0, 1/scale^2) dc
                    = mean over j of 2 (n + 1)^(-1/2) exp(s^2 / 2) Phi(s),  S = sum_i X_kj,i,  s = S/(scale (n+1)^(1/2))
    Assumes     E exp(c X) <= exp(c^2 scale^2 / 2), c > 0, for the best k, as if sub-Gaussian; under a guessed scale
                the promise is approximate
    Source      Robbins 1970; Howard et al. 2021
    Shapes      x [B,K,K], NaN for pairs not drawn -> out [B,K], state [2,B,K,K]: S and n
    """
    new = torch.stack([x.nan_to_num(0.0), (~x.isnan()).to(x)])
    total, n = state = new if state is None else state + new
    s = total / (scale * (n + 1).sqrt())
    log_capital = math.log(2) - torch.log1p(n) / 2 + s**2 / 2 + torch.special.log_ndtr(s)
    return _convinced(log_capital[..., None], alpha, scale), state


def _convinced(log_capital: Tensor, alpha: float, unit: float) -> Tensor:
    """Whether the mean capital over rivals and bets has reached 1/alpha. Shapes: [B,K,K,bets] -> [B,K]."""
    if not (0 < alpha < 1 and 0 < unit < math.inf):
        raise ValueError(
            f"expected alpha between 0 and 1 and a finite reach or scale > 0, got {alpha} and {unit}."
        )
    classes, bets = log_capital.shape[2:]
    oneself = torch.eye(classes, dtype=torch.bool, device=log_capital.device)[..., None]
    mean = log_capital.masked_fill(oneself, -math.inf).flatten(2).logsumexp(-1) - math.log(
        (classes - 1) * bets
    )
    return mean >= -math.log(alpha)
