"""Exercises of notebook 07: the factor of one step, the gradient of the loss itself, and what BPDA leaves out."""

import torch

from diffclass.course.exercises.base import Exercise, Mistake, normal


def _factor(v, sigma, rate, n, D):
    return (1 - 2 * rate / D * sigma**4 / (v + sigma**2) ** 2) ** n


CONTRACTION = Exercise(
    key="07-contraction",
    prompt="Along an axis of variance v [A], n plain steps down ||D(u) - u||^2 / D at level sigma multiply the "
    "distance to the mean by what? Return the factors [A]; the rate multiplies the gradient, D counts pixels.",
    reference=_factor,
    cases=lambda: [(normal(0, 4) ** 2, 0.5, 0.4, 5, 2), (normal(1, 6) ** 2, 0.3, 20.0, 3, 64)],
    mistakes=(
        Mistake(
            lambda v, sigma, rate, n, D: (1 - 2 * rate / D * sigma**2 / (v + sigma**2)) ** n,
            "the denoiser's pull is sigma^2 / (v + sigma^2), but the loss is its square, and a gradient of a "
            "square keeps it twice",
        ),
        Mistake(
            lambda v, sigma, rate, n, D: (1 - rate / D * sigma**4 / (v + sigma**2) ** 2) ** n,
            "a square has a derivative with a factor 2",
        ),
        Mistake(
            lambda v, sigma, rate, n, D: (1 - 2 * rate * sigma**4 / (v + sigma**2) ** 2) ** n,
            "the loss is a mean over D pixels: each step is D times shorter",
        ),
        Mistake(
            lambda v, sigma, rate, n, D: 1 - 2 * n * rate / D * sigma**4 / (v + sigma**2) ** 2,
            "n steps multiply their factors; that is only the beginning of the power",
        ),
        Mistake(
            lambda v, sigma, rate, n, D: (
                (1 - 2 * rate / D * sigma**4 / (v**2 + sigma**2) ** 2) ** n
            ),
            "v is a variance already: it is not squared again",
        ),
    ),
    meaning="Narrow axes are straightened first, wide ones last: that is the repair, and at the end the collapse.",
)


def _system(seed: int, rows: int, size: int) -> tuple:
    """Denoised images d and images u [B,D], and the denoiser's Jacobian J [D,D], the same for all rows."""
    return (
        normal(seed, rows, size),
        normal(seed + 1, rows, size),
        0.3 * normal(seed + 2, size, size),
    )


LOSS_GRADIENT = Exercise(
    key="07-loss-gradient",
    prompt="d [B,D] = D(u + sigma eps) are denoised images u [B,D], J [D,D] the denoiser's Jacobian there (row i: "
    "derivatives of output i). Return the gradients [B,D] of ||d - u||^2 / D with respect to u.",
    reference=lambda d, u, J: 2 / u.shape[1] * (d - u) @ (J - torch.eye(len(J), dtype=J.dtype)),
    cases=lambda: [_system(2, 3, 4), _system(5, 2, 7)],
    mistakes=(
        Mistake(
            lambda d, u, J: 2 / u.shape[1] * (u - d),
            "u also goes into the denoiser: the part that comes through it is missing",
        ),
        Mistake(
            lambda d, u, J: 2 / u.shape[1] * (d - u) @ J,
            "u is also the target: the part that does not pass through the denoiser is missing",
        ),
        Mistake(
            lambda d, u, J: 2 / u.shape[1] * (d - u) @ (J - torch.eye(len(J), dtype=J.dtype)).T,
            "the Jacobian is transposed: a gradient goes back through outputs to inputs",
        ),
        Mistake(
            lambda d, u, J: 2 * (d - u) @ (J - torch.eye(len(J), dtype=J.dtype)),
            "the loss is a mean over the D pixels, so its gradient is too",
        ),
        Mistake(
            lambda d, u, J: 2 / u.shape[1] * (d - u) @ (torch.eye(len(J), dtype=J.dtype) - J),
            "the sign: the residual is d - u, and its derivative is J minus the identity",
        ),
    ),
    meaning="The step knows the denoiser's slope: holding either occurrence of u fixed is another algorithm.",
)


def _straight(slopes, g, exact):
    """The gradient at the input: through all steps, or past them. `slopes` [N,D,D] are the Hessians times the rate."""
    for slope in reversed(slopes.unbind(0)) if exact else ():
        g = g - slope @ g
    return g


def _in_reading_order(slopes, g, exact):
    for slope in slopes.unbind(0) if exact else ():
        g = g - slope @ g
    return g


def _hessians(seed: int, steps: int, size: int, exact: bool) -> tuple:
    root = 0.4 * normal(seed, steps, size, size)
    return root @ root.mT, normal(seed + 1, size), exact


STRAIGHT_THROUGH = Exercise(
    key="07-straight-through",
    prompt="Step i of N is u <- u - rate grad L_i(u), and slopes[i] [D,D] is rate times the (symmetric) Hessian of L_i "
    "on the way; g [D] is the classifier's gradient at the end. Return the gradient at the start: exact if "
    "`exact`, else BPDA's, with the identity as the backward pass.",
    reference=_straight,
    cases=lambda: [_hessians(0, 3, 4, True), _hessians(2, 5, 3, True), _hessians(4, 3, 4, False)],
    mistakes=(
        Mistake(
            lambda slopes, g, exact: g.clone(),
            "that is BPDA in both cases: the exact gradient passes through every step",
        ),
        Mistake(
            _in_reading_order,
            "a gradient goes backwards: the last step's Jacobian is applied first, and matrices do not commute",
        ),
        Mistake(
            lambda slopes, g, exact: g - slopes.sum(0) @ g if exact else g.clone(),
            "the Jacobians multiply: the sum is only right for steps that hardly move",
        ),
        Mistake(
            lambda slopes, g, exact: g - slopes[-1] @ g if exact else g.clone(),
            "only the last step was gone through: the earlier ones bend the gradient too",
        ),
        Mistake(
            lambda slopes, g, exact: _straight(-slopes, g, exact),
            "the sign: a step goes down the loss, so its Jacobian is the identity minus the Hessian",
        ),
    ),
    meaning="BPDA leaves out the product of N matrices: close for one short step, another direction after five.",
)
