"""Exercises of notebook 08: the steepest step, two losses of an attack, and how many gradients to average."""

import math

import torch

from diffclass.course.exercises.base import Exercise, Mistake, normal

STEEPEST_STEP = Exercise(
    key="08-steepest-step",
    prompt="Return, for every row of the gradients g [B,D], the perturbation of L2 length epsilon with the largest "
    "first-order gain.",
    reference=lambda g, epsilon: epsilon * g / g.norm(dim=1, keepdim=True),
    cases=lambda: [(normal(0, 3, 5), 0.5), (normal(1, 4, 64), 1.0)],
    mistakes=(
        Mistake(
            lambda g, epsilon: epsilon * g.sign(),
            "that is the step of the L-inf ball: its L2 length is epsilon times the root of D",
        ),
        Mistake(
            lambda g, epsilon: epsilon * g.sign() / g.shape[1] ** 0.5,
            "a sign step made short enough is in the ball, but another direction gains more",
        ),
        Mistake(
            lambda g, epsilon: epsilon * g / g.norm(),
            "the norm was taken over the whole batch: each picture has a budget of its own",
        ),
        Mistake(
            lambda g, epsilon: epsilon * g,
            "that step is as long as the gradient happens to be; its length must be epsilon",
        ),
        Mistake(
            lambda g, epsilon: epsilon * g / g.abs().sum(1, keepdim=True),
            "divided by the L1 norm, which is the larger one: the step is shorter than it may be",
        ),
        Mistake(
            lambda g, epsilon: -epsilon * g / g.norm(dim=1, keepdim=True),
            "that descends: an attack climbs its loss",
        ),
    ),
    meaning="In L2 the step follows the gradient, in L-inf its sign: two budgets, two attacks.",
)


def _logits(seed: int, rows: int, classes: int, shift: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits with a shift, which makes them all negative or not, and labels that are right for some rows only."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(rows, classes, generator=generator, dtype=torch.float64) + shift
    y = torch.where(
        torch.arange(rows) % 2 == 0,
        logits.argmax(1),
        torch.randint(0, classes, (rows,), generator=generator),
    )
    return logits, y


def _cases() -> list[tuple]:
    return [_logits(0, 6, 4, 0.0), _logits(1, 5, 10, -60.0), _logits(2, 4, 3, 2.0)]


def _right(logits, y):
    return logits.gather(1, y[:, None])[:, 0]


def _best_wrong(logits, y):
    return logits.scatter(1, y[:, None], -math.inf).amax(1)


def _masked(logits, y):
    """The masks of a widespread implementation: multiplication by one or zero."""
    onehot = torch.nn.functional.one_hot(y, logits.shape[1])
    return ((1 - onehot) * logits).amax(1) - (onehot * logits).amax(1)


MARGIN_LOSS = Exercise(
    key="08-margin-loss",
    prompt="logits [B,K], labels y [B]: return how far the best wrong class is ahead of the right one [B], positive "
    "exactly for the misclassified.",
    reference=lambda logits, y: _best_wrong(logits, y) - _right(logits, y),
    cases=_cases,
    mistakes=(
        Mistake(
            lambda logits, y: logits.amax(1) - _right(logits, y),
            "the right class takes part in the maximum, so the loss is 0 for every picture that is classified "
            "correctly, and so is its gradient",
        ),
        Mistake(
            lambda logits, y: _masked(logits, y),
            "the mask multiplies by zero: where all logits are negative, as log-likelihoods are, the zero wins",
        ),
        Mistake(
            lambda logits, y: _right(logits, y) - _best_wrong(logits, y),
            "the sign: that is the margin of the classifier, and the attack climbs its loss",
        ),
        Mistake(
            lambda logits, y: logits.topk(2, 1).values[:, 1] - logits.topk(2, 1).values[:, 0],
            "that compares the two best classes whatever the label is; for a misclassified picture it is the wrong "
            "pair",
        ),
        Mistake(
            lambda logits, y: _best_wrong(logits.softmax(1), y) - _right(logits.softmax(1), y),
            "those are probabilities, flat where the classifier is sure; a margin is a difference of logits",
        ),
    ),
    meaning="A margin is positive exactly when the picture is misclassified, and its gradient never saturates.",
)


def _ratio(logits, y, low: int, high: int):
    ordered = logits.sort(dim=1, descending=True).values
    return (_best_wrong(logits, y) - _right(logits, y)) / (ordered[:, low] - ordered[:, high])


DLR_LOSS = Exercise(
    key="08-dlr-loss",
    prompt="Return the difference-of-logits ratio [B]: the margin loss over the gap between the largest and the third "
    "largest logit.",
    reference=lambda logits, y: _ratio(logits, y, 0, 2),
    cases=_cases,
    mistakes=(
        Mistake(
            lambda logits, y: _ratio(logits, y, 0, 1),
            "over the gap of the first two the ratio is -1 for every picture that is classified correctly: nothing "
            "to climb",
        ),
        Mistake(
            lambda logits, y: -_ratio(logits, y, 0, 2),
            "the sign: larger must be worse for the classifier",
        ),
        Mistake(
            lambda logits, y: _ratio(logits, y, 0, -1),
            "the last logit is that of the least likely class, which can be far away; the third is meant",
        ),
        Mistake(
            lambda logits, y: (_best_wrong(logits, y) - _right(logits, y)) / logits.abs().amax(1),
            "dividing by the size of a logit is not free of shifts: add a constant, and the loss changes",
        ),
        Mistake(
            lambda logits, y: _best_wrong(logits, y) - _right(logits, y),
            "that is the margin in nats: a DLR has no units, so multiplying all logits must not change it",
        ),
    ),
    meaning="DLR is the same for logits in nats, in bits or divided by a temperature: a fair judge of classifiers.",
)


def _draws(g, v, share) -> int:
    return math.ceil(len(g) * v / (share**2 * float((g**2).sum())))


EOT_DRAWS = Exercise(
    key="08-eot-draws",
    prompt="A gradient has mean g [D] and independent noise of variance v in each entry; return the smallest whole "
    "number of draws whose average has noise of root mean squared length at most `share` of the length of g.",
    reference=_draws,
    cases=lambda: [
        (normal(3, 1, 64)[0], 9.0, 0.3),
        (normal(4, 1, 20)[0], 4.0, 0.5),
        (0.1 * normal(5, 1, 8)[0], 0.7, 0.2),
    ],
    mistakes=(
        Mistake(
            lambda g, v, share: math.ceil(v / (share**2 * float((g**2).sum()))),
            "each of the D entries is noisy: the squared lengths of their noises add up",
        ),
        Mistake(
            lambda g, v, share: math.ceil((len(g) * v) ** 0.5 / (share * float(g.norm()))),
            "it is the variance of a mean that falls with n; the length falls with its root, so the ratio of "
            "lengths has to be squared",
        ),
        Mistake(
            lambda g, v, share: math.floor(len(g) * v / (share**2 * float((g**2).sum()))),
            "rounded down: with that many draws the noise is still a little too long",
        ),
        Mistake(
            lambda g, v, share: math.ceil(len(g) * v / (share * float((g**2).sum()))),
            "the share is one of lengths: in the comparison of squares it is squared too",
        ),
        Mistake(
            lambda g, v, share: math.ceil(len(g) * v**2 / (share**2 * float((g**2).sum()))),
            "v is a variance already: it is not squared again",
        ),
    ),
    meaning="Halving the error of a random gradient costs four times the draws: look at the error before you pay.",
)
