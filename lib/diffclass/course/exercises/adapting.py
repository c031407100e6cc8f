"""Exercises of notebook 11: a layer with a low-rank adapter, what contrast pulls at, and what a small rate can move."""

import torch

from diffclass.course.exercises.base import Exercise, Mistake, normal


def _layer(x, W, A, B, alpha):
    return x @ W.T + alpha / len(A) * (x @ A.T) @ B.T


def _layers() -> list[tuple]:
    return [
        (normal(0, 3, 5), normal(1, 4, 5), normal(2, 2, 5), normal(3, 4, 2), 6.0),
        (normal(4, 2, 3), normal(5, 3, 3), normal(6, 3, 3), normal(7, 3, 3), 3.0),
    ]


LORA_LAYER = Exercise(
    key="11-lora-layer",
    prompt="x [B,n] are inputs, W [m,n] a frozen linear layer without a bias, A [r,n] and B [m,r] an adapter with its alpha. "
    "Return the layer's outputs [B,m].",
    reference=_layer,
    cases=_layers,
    mistakes=(
        Mistake(
            lambda x, W, A, B, alpha: x @ W.T,
            "that is the base alone: the adapter adds to it",
        ),
        Mistake(
            lambda x, W, A, B, alpha: x @ W.T + alpha * (x @ A.T) @ B.T,
            "alpha is divided by the rank, so that another rank does not ask for another rate",
        ),
        Mistake(
            lambda x, W, A, B, alpha: x @ W.T + (x @ A.T) @ B.T,
            "the adapter is scaled, by alpha over its rank",
        ),
        Mistake(
            lambda x, W, A, B, alpha: alpha / len(A) * (x @ A.T) @ B.T,
            "the frozen layer still speaks: the adapter stands beside it, not in its place",
        ),
        Mistake(
            lambda x, W, A, B, alpha: x @ W.T + alpha / A.shape[1] * (x @ A.T) @ B.T,
            "the rank is the short side of A, not the number of inputs",
        ),
    ),
    meaning="Two thin matrices beside one that stays: with B = 0 it is the base, and r (m + n) numbers learn.",
)


def _pull(elbo, y, temperature):
    wanted = torch.zeros_like(elbo)
    wanted[torch.arange(len(y)), y] = 1
    return (wanted - torch.softmax(elbo / temperature, 1)) / temperature


def _evidence(seed: int, temperature: float) -> tuple:
    y = torch.arange(3) % 4
    return 3 * normal(seed, 3, 4), y, temperature


CONTRASTIVE_PULL = Exercise(
    key="11-contrastive-pull",
    prompt="elbo [B,K] are the evidences of K classes, y [B] the labels. Return how much log softmax(elbo / temperature)_y rises "
    "with each of them: its derivatives [B,K].",
    reference=_pull,
    cases=lambda: [_evidence(0, 1.0), _evidence(1, 10.0)],
    mistakes=(
        Mistake(
            lambda elbo, y, temperature: torch.nn.functional.one_hot(y, elbo.shape[1]).double(),
            "that is the paper's pull: the truth alone, and nobody pushes the others",
        ),
        Mistake(
            lambda elbo, y, temperature: -_pull(elbo, y, temperature),
            "the sign: the truth is raised and the others are lowered",
        ),
        Mistake(
            lambda elbo, y, temperature: _pull(elbo, y, temperature) * temperature,
            "the evidences are divided by the temperature, and so is the derivative",
        ),
        Mistake(
            lambda elbo, y, temperature: -torch.softmax(elbo / temperature, 1) / temperature,
            "the label's own term is missing: its derivative has a 1 as well",
        ),
    ),
    meaning="Each class is pushed by its own posterior: what is surely right, or surely out, is left alone.",
)


def _reach(rate, warm, steps):
    rates = [rate * min(1.0, (step + 1) / warm) for step in range(steps)]
    return torch.tensor(sum(rates), dtype=torch.float64)


MOST_MOVED = Exercise(
    key="11-most-moved",
    prompt="A rate warms up linearly over `warm` steps (step i of them, from 1, has i / warm of it) and then stays; Adam moves a "
    "number by about the rate in a step. Return how far `steps` steps can carry it.",
    reference=_reach,
    cases=lambda: [(1e-6, 100, 200), (1e-6, 1500, 200), (2e-3, 20, 400)],
    mistakes=(
        Mistake(
            lambda rate, warm, steps: torch.tensor(rate * steps, dtype=torch.float64),
            "the steps of the warm-up are shorter",
        ),
        Mistake(
            lambda rate, warm, steps: torch.tensor(
                rate * max(0, steps - warm), dtype=torch.float64
            ),
            "the steps of the warm-up are short, but they are not nothing",
        ),
        Mistake(
            lambda rate, warm, steps: torch.tensor(rate, dtype=torch.float64),
            "that is one step: they add up",
        ),
    ),
    meaning="Steps have a length whatever the loss says: 200 of them at 1e-6 carry no weight farther than 0.00015.",
    tol=1e-9,
)
