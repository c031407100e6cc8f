"""Exercises of notebooks 06 and 06b: the variance of a paired difference, drawn noise levels, and where to draw them;
Bayes' rule for two classes from one call.
"""

import torch

from diffclass.course.exercises.base import Exercise, Mistake


def _positive(seed: int, *shape: int):
    return 0.1 + torch.rand(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def _drawn(seed: int, size: int, count: int) -> tuple:
    """Losses [G], shares [G] and drawn levels [n] of one case."""
    share = _positive(seed, size)
    share = share / share.sum()
    drawn = torch.multinomial(
        share, count, replacement=True, generator=torch.Generator().manual_seed(seed)
    )
    return 5 * _positive(seed + 1, size), share, drawn


PAIRED_VARIANCE = Exercise(
    key="06-paired-variance",
    prompt="Return the variance of the mean of n independent differences a - b, given the standard deviations s_a and "
    "s_b and the correlation rho of a and b under shared noise.",
    reference=lambda s_a, s_b, rho, n: (s_a**2 + s_b**2 - 2 * rho * s_a * s_b) / n,
    cases=lambda: [(2.0, 1.5, 0.8, 1), (3.0, 2.0, -0.4, 10), (1.0, 1.7, 0.95, 64)],
    mistakes=(
        Mistake(
            lambda s_a, s_b, rho, n: (s_a**2 + s_b**2 + 2 * rho * s_a * s_b) / n,
            "that is the variance of a sum; in a difference the noise that both share cancels",
        ),
        Mistake(
            lambda s_a, s_b, rho, n: (s_a**2 + s_b**2 - rho * s_a * s_b) / n,
            "the covariance appears once as Cov(a, -b) and once as Cov(-b, a): where is the other?",
        ),
        Mistake(
            lambda s_a, s_b, rho, n: (s_a**2 + s_b**2) / n,
            "that holds when each class has noise of its own; here they share it",
        ),
        Mistake(
            lambda s_a, s_b, rho, n: (s_a - s_b) ** 2 / n,
            "that is right for rho = 1 only; standard deviations do not subtract",
        ),
        Mistake(
            lambda s_a, s_b, rho, n: (s_a**2 + s_b**2 - 2 * rho * s_a * s_b) / n**0.5,
            "it is the standard deviation of a mean that falls with the root of n; a variance falls with n",
        ),
        Mistake(
            lambda s_a, s_b, rho, n: (s_a**2 + s_b**2 - 2 * rho) / n,
            "rho is a correlation, without units: multiply it by both standard deviations to get a covariance",
        ),
    ),
    meaning="With a correlation of 0.9 a shared noise sample is worth ten of the other kind, at no cost.",
)

LEVEL_WEIGHTS = Exercise(
    key="06-level-weights",
    prompt="Estimate the sum of losses [G] without bias from the drawn levels index [n], where level g was drawn with "
    "probability share[g].",
    reference=lambda losses, share, index: (losses[index] / share[index]).mean(),
    cases=lambda: [_drawn(0, 6, 4), _drawn(5, 20, 9)],
    mistakes=(
        Mistake(
            lambda losses, share, index: losses[index].mean(),
            "that estimates the average loss under the share, neither the sum nor the plain average: what weight "
            "makes up for drawing a level often?",
        ),
        Mistake(
            lambda losses, share, index: len(losses) * losses[index].mean(),
            "that is right where every level is drawn equally often, and these shares are not equal",
        ),
        Mistake(
            lambda losses, share, index: (losses[index] * share[index]).mean(),
            "the share went the wrong way: a level that is drawn twice as often must count half each time",
        ),
        Mistake(
            lambda losses, share, index: (losses[index] / share[index]).sum(),
            "n draws estimate the sum n times: average them",
        ),
        Mistake(
            lambda losses, share, index: (
                len(losses) * (losses[index] / share[index]).sum() / (1 / share[index]).sum()
            ),
            "weights that are normalised by their own random sum give a ratio of two estimates, which is biased",
        ),
        Mistake(
            lambda losses, share, index: losses[index.unique()].sum(),
            "levels that were not drawn are missing from that sum, so it is too small on average",
        ),
    ),
    meaning="Every share without zeros is right on average; the choice of the share only changes the scatter.",
)

NEYMAN = Exercise(
    key="06-neyman",
    prompt="Return the shares [G] that minimise sum_g size_g^2 / share_g, mixed with a part `even` of equal shares: "
    "(1 - even) times the optimum plus even / G.",
    reference=lambda size, even: (1 - even) * size / size.sum() + even / len(size),
    cases=lambda: [(_positive(1, 5), 0.0), (_positive(2, 12), 0.1), (4 * _positive(3, 30), 0.5)],
    mistakes=(
        Mistake(
            lambda size, even: (1 - even) * size**2 / (size**2).sum() + even / len(size),
            "you allocate by the variance; set the derivative -size^2 / share^2 equal for all levels, and solve "
            "for the share",
        ),
        Mistake(
            lambda size, even: (1 - even) * size.sqrt() / size.sqrt().sum() + even / len(size),
            "a root too many: size is already a standard deviation, not a variance",
        ),
        Mistake(
            lambda size, even: (1 - even) * (1 / size) / (1 / size).sum() + even / len(size),
            "upside down: precision weights are for combining estimates; here scattered levels need more draws",
        ),
        Mistake(
            lambda size, even: (1 - even) * size.softmax(0) + even / len(size),
            "a softmax is not scale-free: in other units the same problem would get other shares",
        ),
        Mistake(
            lambda size, even: size / size.sum() + even / len(size),
            "these shares do not add up to one when even > 0",
        ),
        Mistake(
            lambda size, even: (1 - even) * size / size.sum() + even,
            "the even part has to be divided among the levels",
        ),
    ),
    meaning="Draw where it scatters, in proportion to the deviation; the even part caps the weights at G / even.",
)


def _two_heads(first: torch.Tensor, second: torch.Tensor, null: torch.Tensor) -> torch.Tensor:
    apart = first - second
    return (((null - second) * apart).sum(1) / (apart * apart).sum(1)).clamp(0, 1)


def _answers(seed: int, off: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, second, beside = torch.randn(3, 6, 5, generator=generator, dtype=torch.float64)
    share = torch.rand(6, 1, generator=generator, dtype=torch.float64)
    return first, second, share * first + (1 - share) * second + off * beside


TWO_HEADS = Exercise(
    key="06b-two-heads",
    prompt="first, second and null [B,d] are the denoised pictures of two classes and of none; return the share of the "
    "first class [B], in [0,1].",
    reference=_two_heads,
    cases=lambda: [_answers(0, 0.0), _answers(1, 0.3)],
    mistakes=(
        Mistake(
            lambda first, second, null: _two_heads(second, first, null),
            "that is the share of the second class: at null = first the share must be 1",
        ),
        Mistake(
            lambda first, second, null: (
                (null - second).norm(dim=1) / (first - second).norm(dim=1)
            ).clamp(0, 1),
            "a ratio of lengths also counts what stands at a right angle to the line: project onto it",
        ),
        Mistake(
            lambda first, second, null: (
                (null - second).norm(dim=1)
                / ((null - first).norm(dim=1) + (null - second).norm(dim=1))
            ),
            "a ratio of distances is the share only while the answer without a class lies on the line",
        ),
    ),
    meaning="Two denoised pictures and their mean are Bayes' rule for two classes.",
)
