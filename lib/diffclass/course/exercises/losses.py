"""Exercises of notebook 05: from a table of losses to logits, to the levels that decide, to a fair comparison."""

import torch
from scipy import stats

from diffclass.course.exercises.base import Exercise, Mistake


def _table(
    seed: int, images: int = 6, classes: int = 4, levels: int = 5
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # small noise: small losses and large weights
    weights = torch.logspace(2, -2, levels, dtype=torch.float64)
    losses = torch.rand(images, classes, levels, generator=generator, dtype=torch.float64)
    return losses / weights.sqrt(), weights


DC_LOGITS = Exercise(
    key="05-dc-logits",
    prompt="losses [B,K,T] hold ||D_k(x + sigma_t eps) - x||^2 and weights [T] the ELBO weights; return logits [B,K] "
    "in nats under a uniform prior.",
    reference=lambda losses, weights: -(losses * weights).sum(-1),
    cases=lambda: [_table(0), _table(1, 3, 10, 12)],
    mistakes=(
        Mistake(
            lambda losses, weights: (losses * weights).sum(-1),
            "the sign: a class whose denoiser misses by more is less likely, and a logit grows with likelihood",
        ),
        Mistake(
            lambda losses, weights: -losses.sum(-1),
            "the weights are missing: that is the classifier with w = 1, which hears the large noise levels only",
        ),
        Mistake(
            lambda losses, weights: -(losses * weights).mean(-1),
            "a mean over the levels divides all evidence by T; the ELBO is a sum, each weight has its step in it",
        ),
        Mistake(
            lambda losses, weights: (-(losses * weights).sum(-1)).log_softmax(-1),
            "those are log-probabilities: right for the decision, but the logits lost what the classes share",
        ),
        Mistake(
            lambda losses, weights: (-(losses * weights).sum(-1)).softmax(-1),
            "those are probabilities: an attack needs the logits before the softmax, and so does cross-entropy",
        ),
    ),
    meaning="A diffusion classifier's forward pass is a table of losses and one weighted sum.",
)


def _without(losses: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    evidence = losses * weights
    return torch.stack(
        [(evidence.sum(-1) - evidence[..., t]).argmin(1) for t in range(len(weights))]
    )


LEAVE_ONE_OUT = Exercise(
    key="05-leave-one-level-out",
    prompt="Return the predictions [T,B]: row t is the class predicted from all levels but level t.",
    reference=_without,
    cases=lambda: [_table(2, 40, 3, 5), _table(3, 60, 4, 4)],
    mistakes=(
        Mistake(
            lambda losses, weights: (losses * weights).argmin(1).T,
            "row t uses level t alone; asked is what remains without it",
        ),
        Mistake(
            lambda losses, weights: torch.stack(
                [
                    ((losses * weights).sum(-1) - losses[..., t]).argmin(1)
                    for t in range(len(weights))
                ]
            ),
            "what was taken away is the loss without its weight; what was summed had one",
        ),
        Mistake(
            lambda losses, weights: torch.stack(
                [
                    ((losses * weights).sum(-1) - (losses * weights)[..., t]).argmax(1)
                    for t in range(len(weights))
                ]
            ),
            "argmax of a loss is the least likely class",
        ),
    ),
    meaning="A level decides if leaving it out changes answers: that is measured, not read off the height of a curve.",
)


def _pairs() -> list[tuple]:
    def pair(both, first, second, neither):
        a = torch.tensor([True] * both + [True] * first + [False] * second + [False] * neither)
        b = torch.tensor([True] * both + [False] * first + [True] * second + [False] * neither)
        return a, b

    return [pair(80, 9, 2, 9), pair(50, 3, 12, 0), pair(10, 0, 0, 5)]


def _exact(a, b) -> float:
    first = int((a & ~b).sum())
    second = int((b & ~a).sum())
    return 1.0 if first + second == 0 else float(stats.binomtest(first, first + second, 0.5).pvalue)


def _one_sided(a, b) -> float:
    first = int((a & ~b).sum())
    second = int((b & ~a).sum())
    return (
        1.0
        if first + second == 0
        else float(stats.binomtest(first, first + second, 0.5, "greater").pvalue)
    )


def _unpaired(a, b) -> float:
    table = [[int(a.sum()), int((~a).sum())], [int(b.sum()), int((~b).sum())]]
    return float(stats.fisher_exact(table).pvalue)


def _of_all(a, b) -> float:
    return float(stats.binomtest(int((a & ~b).sum()), len(a), 0.5).pvalue)


MCNEMAR = Exercise(
    key="05-mcnemar",
    prompt="a and b [N] say which images two classifiers get right, on the same images; return the exact two-sided "
    "p-value of 'neither is better' (1 if they never differ).",
    reference=_exact,
    cases=_pairs,
    mistakes=(
        Mistake(
            _unpaired,
            "compared as if on different images; only images on which they disagree tell them apart",
        ),
        Mistake(_one_sided, "one-sided: which of the two would win was not known before looking"),
        Mistake(
            _of_all,
            "the images on which both agree are counted as coin tosses; only the disagreements are",
        ),
    ),
    meaning="On the same images a small difference can be certain, and a large one luck: count the disagreements.",
)
