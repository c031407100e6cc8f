"""Exercises of notebook 10: image labels, the wrong label's posterior, and logits from distances."""

import torch

from diffclass.course.exercises.base import Exercise, Mistake, NotYet, normal

# ---------------------------------------------------------------------------------------------------------------------
# Labels


def _sylvester(dimensions: int):
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < dimensions:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def _stretched(rows):
    low = rows.amin(1, keepdim=True)
    high = rows.amax(1, keepdim=True)
    return (rows - low) / (high - low)


def _centred(count: int, dimensions: int):
    rows = normal(0, count, dimensions)
    q = torch.linalg.qr((rows - rows.mean(1, keepdim=True)).T).Q.T
    return (q / q.abs().max() + 1) / 2


def _verify_labels(labels_of) -> None:
    for count, dimensions in ((3, 4), (10, 64), (7, 16)):
        labels = torch.as_tensor(labels_of(count, dimensions), dtype=torch.float64)
        at = f"For {count} labels of {dimensions} pixels: "
        if labels.shape != (count, dimensions):
            raise NotYet(
                f"{at}expected shape [{count}, {dimensions}], got {list(labels.shape)}: a label is a row."
            )
        if (
            not bool(torch.isfinite(labels).all())
            or float(labels.min()) < -1e-9
            or float(labels.max()) > 1 + 1e-9
        ):
            raise NotYet(
                f"{at}values run from {float(labels.min()):.3g} to {float(labels.max()):.3g}; a label is a "
                "picture, so bring it from model space to pixels in [0,1]."
            )
        spread = labels.amax(1) - labels.amin(1)
        if float(spread.min()) < 1e-6:
            raise NotYet(
                f"{at}label {int(spread.argmin())} is one flat grey; the constant picture is what all labels "
                "must be orthogonal to, so it cannot be one of them."
            )
        model = 2 * labels - 1
        rows = model / model.norm(dim=1, keepdim=True)
        worst = float((rows @ rows.T - torch.eye(count, dtype=torch.float64)).abs().max())
        if worst > 1e-6:
            raise NotYet(
                f"{at}the largest cosine between two labels in model space is {worst:.3g}, not zero; whatever "
                "is done to each label after they were made orthogonal must keep the angle."
            )
        if float(labels.amin(1).max()) > 1e-6 or float(labels.amax(1).min()) < 1 - 1e-6:
            raise NotYet(
                f"{at}the cosines are zero, but not every label reaches both black and white: the weakest "
                f"spans {float(spread.min()):.3g} of the range. One common scale serves only the strongest."
            )


ZERO_COSINE_LABELS = Exercise(
    key="10-zero-cosine-labels",
    prompt="Write labels(K, D) -> [K,D] in [0,1] for D a power of two and K < D: in model space every pair has cosine "
    "zero, and every label reaches exactly 0 and 1.",
    reference=lambda count, dimensions: (_sylvester(dimensions)[1 : count + 1] + 1) / 2,
    cases=lambda: [],
    mistakes=(
        Mistake(
            lambda count, dimensions: _stretched(
                torch.linalg.qr(normal(0, count, dimensions).T).Q.T
            ),
            "must keep the angle",
        ),
        Mistake(_centred, "One common scale serves only the strongest"),
        Mistake(
            lambda count, dimensions: _sylvester(dimensions)[1 : count + 1],
            "bring it from model space to pixels",
        ),
        Mistake(
            lambda count, dimensions: (_sylvester(dimensions)[:count] + 1) / 2, "is one flat grey"
        ),
        Mistake(
            lambda count, dimensions: (_sylvester(dimensions)[1 : count + 1].T + 1) / 2,
            "a label is a row",
        ),
    ),
    meaning="Labels of +-1 with mean zero are orthogonal where the network works, and any two differ in half of their "
    "pixels.",
    verify=_verify_labels,
)


# ---------------------------------------------------------------------------------------------------------------------
# Proposition 1


def _towards(x_t, end, m_prev: float, m_t: float):
    """The mean of the bridge's posterior, one step nearer to `end`."""
    return end + (m_prev / m_t) * (x_t - end)


def _moved(x0, p_k, share: float):
    return x0 + share * (p_k - x0)


def _posterior_cases() -> list[tuple]:
    return [
        (normal(0, 2, 5), normal(1, 2, 5), normal(2, 2, 5), 0.3337, 0.6663),
        (normal(4, 1, 3), normal(5, 1, 3), normal(6, 1, 3), 0.1, 0.9),
    ]


WRONG_POSTERIOR = Exercise(
    key="10-wrong-posterior",
    prompt="Return the mean of q(x_prev given x_t, e_k) for a bridge at shares m_prev < m_t, whose end e_k is the "
    "label x0, moved towards the wrong label p_k by the share of the last step.",
    reference=lambda x_t, x0, p_k, m_prev, m_t: _towards(
        x_t, _moved(x0, p_k, m_t - m_prev), m_prev, m_t
    ),
    cases=_posterior_cases,
    mistakes=(
        Mistake(
            lambda x_t, x0, p_k, m_prev, m_t: _towards(x_t, p_k, m_prev, m_t),
            "the end was the wrong label itself; only the last step drifted from it, so the end moves by that "
            "step's share",
        ),
        Mistake(
            lambda x_t, x0, p_k, m_prev, m_t: _towards(x_t, x0, m_prev, m_t),
            "that is the posterior of the true label: p_k does not appear in it",
        ),
        Mistake(
            lambda x_t, x0, p_k, m_prev, m_t: _towards(x_t, _moved(x0, p_k, m_t), m_prev, m_t),
            "the end moved by the whole share m_t; the first steps, up to m_prev, followed the true label",
        ),
        Mistake(
            lambda x_t, x0, p_k, m_prev, m_t: _towards(
                x_t, _moved(x0, p_k, m_prev - m_t), m_prev, m_t
            ),
            "the end moved away from the wrong label: check the sign of m_t - m_prev",
        ),
        Mistake(
            lambda x_t, x0, p_k, m_prev, m_t: (
                x_t + (m_prev / m_t) * (_moved(x0, p_k, m_t - m_prev) - x_t)
            ),
            "state and end have changed places: near the label, m_prev = 0, the mean must be the end",
        ),
        Mistake(
            lambda x_t, x0, p_k, m_prev, m_t: (
                x_t + (m_t - m_prev) * (_moved(x0, p_k, m_t - m_prev) - x_t)
            ),
            "the step was measured against the whole bridge; what is left of it is only m_t long",
        ),
    ),
    meaning="The loss of Proposition 1 is the KL to this posterior without its factor: the means differ by "
    "c_t (O_k - F).",
)


# ---------------------------------------------------------------------------------------------------------------------
# Logits


def _distance(z, labels):
    return ((z[:, None] + 1) / 2 - labels).abs().mean(-1)


def _logit_cases() -> list[tuple]:
    return [
        (normal(0, 3, 8).clamp(-1, 1), (normal(1, 4, 8) > 0).double(), 0.1),
        (
            normal(2, 2, 4).clamp(-1, 1),
            torch.rand(3, 4, generator=torch.Generator().manual_seed(3)).double(),
            0.5,
        ),
    ]


DISTANCE_LOGITS = Exercise(
    key="10-distance-logits",
    prompt="Return IDC's logits [B,K] from translations z [B,D] in model space, labels [K,D] in pixels and a "
    "temperature: what a loss such as cross-entropy is meant to receive.",
    reference=lambda z, labels, temperature: -_distance(z, labels) / temperature,
    cases=_logit_cases,
    mistakes=(
        Mistake(
            lambda z, labels, temperature: (-_distance(z, labels) / temperature).softmax(1),
            "these are probabilities; cross-entropy applies its own softmax, and the second one makes them flat",
        ),
        Mistake(
            lambda z, labels, temperature: _distance(z, labels) / temperature,
            "the nearest label must have the largest logit: the sign is missing",
        ),
        Mistake(
            lambda z, labels, temperature: -(z[:, None] - labels).abs().mean(-1) / temperature,
            "z is in model space and the labels are in pixels: convert one of them",
        ),
        Mistake(
            lambda z, labels, temperature: -2 * _distance(z, labels) / temperature,
            "the distances were measured in model space, where they are twice as long as in pixels",
        ),
        Mistake(
            lambda z, labels, temperature: (
                -((z[:, None] + 1) / 2 - labels).abs().sum(-1) / temperature
            ),
            "summed over the pixels; the temperature belongs to a mean",
        ),
        Mistake(
            lambda z, labels, temperature: (
                -(((z[:, None] + 1) / 2 - labels) ** 2).mean(-1) / temperature
            ),
            "squared: IDC measures absolute differences",
        ),
    ),
    meaning="Logits, not probabilities, are what an attack must see; the decision is the same, the gradient is not.",
)
