"""Image labels, one picture for each class, and the Brownian bridges that lead from a picture to its label.

The pure mathematics of IDC: no network is needed for anything in this module.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffclass import units

# ---------------------------------------------------------------------------------------------------------------------
# Image labels [K,C,H,W] in pixels [0,1]


def _checked(num_classes: int, image_shape: Sequence[int], seed: int) -> tuple[int, int, int]:
    """A number of classes, the number of values of an image, and a seed."""
    classes = units.check_class_count(num_classes)
    channels, height, width = units.check_image_shape(image_shape)
    return classes, channels * height * width, units.check_whole(seed, "a seed", most=None)


def _orthonormal(num_classes: int, image_shape: Sequence[int], seed: int, centred: bool) -> Tensor:
    """K random orthonormal rows of D values by QR, orthogonal to the constant image as well if `centred`."""
    num_classes, dimensions, seed = _checked(num_classes, image_shape, seed)
    if num_classes > dimensions - centred:
        raise ValueError(
            f"expected at most {dimensions - centred} classes for {'centred ' * centred}orthogonal images "
            f"of {dimensions} pixels, got {num_classes}; take larger images."
        )
    rows = torch.randn(
        num_classes, dimensions, generator=torch.Generator().manual_seed(seed)
    ).double()
    if centred:
        rows = rows - rows.mean(1, keepdim=True)
    return torch.linalg.qr(rows.T).Q.T


def _as_labels(rows: Tensor, image_shape: Sequence[int]) -> Tensor:
    """Zero-mean rows [K,D], divided by one common constant so that they fill [-1,1], as pixels."""
    return units.to_pixel(rows / rows.abs().max()).float().reshape(-1, *image_shape)


def released_labels(num_classes: int, image_shape: Sequence[int], seed: int = 0) -> Tensor:
    """The labels of the released code: orthonormal rows, each then stretched to [0,1] by its own minimum and maximum.

    Formula     P_k = (q_k - min q_k) / (max q_k - min q_k),   Q from the QR decomposition of a Gaussian matrix
    Source      Mei et al. 2024 (IDC), released code; the q_k are orthogonal, the P_k are not
    Shapes      -> [K,C,H,W] in [0,1]
    """
    q = _orthonormal(num_classes, image_shape, seed, centred=False)
    low = q.amin(1, keepdim=True)
    high = q.amax(1, keepdim=True)
    return ((q - low) / (high - low)).float().reshape(-1, *image_shape)


def orthogonal_labels(num_classes: int, image_shape: Sequence[int], seed: int = 0) -> Tensor:
    """Labels that stay orthogonal: rows of mean zero, scaled by one constant for all.

    Formula     p_k = q_k / max |q|,   <q_k, 1> = 0,   P_k = (p_k + 1)/2;   <p_j, p_k> = 0 for j != k in model space
    Shapes      -> [K,C,H,W] in [0,1]
    """
    return _as_labels(_orthonormal(num_classes, image_shape, seed, centred=True), image_shape)


def hadamard_labels(num_classes: int, image_shape: Sequence[int], seed: int = 0) -> Tensor:
    """Black-and-white labels, the rows of a Hadamard matrix: orthogonal, of mean zero, and as long as pixels allow.

    Formula     H_1 = [1],  H_2n = [[H_n, H_n], [H_n, -H_n]];  `seed` picks K rows other than the constant one
    Source      Sylvester 1867; n is the largest power of two that divides D, repeated D/n times
    Shapes      -> [K,C,H,W], every value 0 or 1
    """
    num_classes, dimensions, seed = _checked(num_classes, image_shape, seed)
    size = dimensions & -dimensions
    if num_classes > size - 1:
        raise ValueError(
            f"expected at most {size - 1} classes for Hadamard images of {dimensions} pixels (the largest "
            f"power of two that divides them, less the constant row), got {num_classes}; take larger "
            "images."
        )
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    chosen = (
        1 + torch.randperm(size - 1, generator=torch.Generator().manual_seed(seed))[:num_classes]
    )
    return _as_labels(matrix[chosen].repeat(1, dimensions // size), image_shape)


def simplex_labels(num_classes: int, image_shape: Sequence[int], seed: int = 0) -> Tensor:
    """Labels at the corners of a regular simplex: equally far apart, and as far as K vectors of one length can be.

    Formula     s_k = q_k - mean_j q_j  of centred orthonormal q;   cosine -1/(K-1) for every pair, in model space
    Shapes      -> [K,C,H,W] in [0,1]
    """
    q = _orthonormal(num_classes, image_shape, seed, centred=True)
    return _as_labels(q - q.mean(0), image_shape)


LABELS: dict[str, Callable[..., Tensor]] = {
    "released": released_labels,
    "orthogonal": orthogonal_labels,
    "Hadamard": hadamard_labels,
    "simplex": simplex_labels,
}


def cosines(labels: Tensor) -> Tensor:
    """The Gram matrix of the normalised labels, in whatever range they are given.

    Formula     G_jk = <P_j, P_k> / (|P_j| |P_k|); give `units.to_model(labels)` for the cosines of model space
    Shapes      [K,C,H,W] -> [K,K]
    """
    rows = labels.flatten(1).double()
    rows = rows / rows.norm(dim=1, keepdim=True)
    return rows @ rows.T


def distances(pictures: Tensor, labels: Tensor) -> Tensor:
    """Mean absolute difference to every label. Formula: d_k = mean |x - P_k|. Shapes: [B,C,H,W], [K,C,H,W] -> [B,K]."""
    return (pictures[:, None] - labels).abs().flatten(2).mean(-1)


def check_apart(labels: Tensor) -> Tensor:
    """Return image labels if they are pictures that differ. Errors: as `units.check_images`; ValueError for a pair."""
    units.check_images(labels)
    between = distances(labels, labels) + torch.eye(len(labels)).to(labels)
    if len(labels) < 2:
        raise ValueError(f"expected the labels of at least two classes, got {len(labels)}.")
    if float(between.min()) < 1e-6:
        j, k = divmod(int(between.argmin()), len(labels))
        raise ValueError(
            f"expected labels that differ, got the same picture for classes {j} and {k}; no distance "
            "could tell these classes apart."
        )
    return labels


# ---------------------------------------------------------------------------------------------------------------------
# The bridge


@dataclass(frozen=True)
class Bridge:
    """A Brownian bridge from the label x0 (share m = 0) to the picture y (m = 1), looked at in `steps` places.

    Formula     x_t = (1 - m_t) x0 + m_t y + sqrt(delta_t) eps,   delta_t = 2 s m_t (1 - m_t),   s = `scale`
    Source      Li et al. 2023 (BBDM); Mei et al. 2024 (IDC): 4 steps, m from 0.001 to 0.999
    Shapes      images [B,C,H,W] of model space; positions t are numbers or [B], 0 <= t < steps
    Errors      ValueError for fewer than one step, or a scale or ends that cannot be meant
    """

    steps: int = 4
    scale: float = 1.0
    first: float = 0.001

    def __post_init__(self):
        for name in ("scale", "first"):
            object.__setattr__(self, name, units.check_number(getattr(self, name), name))
        object.__setattr__(self, "steps", units.check_whole(self.steps, "steps"))
        if self.steps < 1:
            raise ValueError(
                f"expected a bridge of at least one step, got {self.steps}; IDC uses 4."
            )
        if not (self.scale > 0 and 0 < self.first < 0.5):
            raise ValueError(
                f"expected scale > 0 and 0 < first < 1/2, got {self.scale} and {self.first}."
            )

    @property
    def shares(self) -> Tensor:
        """m_t, the share of the picture. Shapes: -> [T], ascending, float64."""
        # a single step starts at the picture
        first = self.first if self.steps > 1 else 1 - self.first
        return torch.linspace(first, 1 - self.first, self.steps, dtype=torch.float64)

    def share(self, t: int | Tensor, like: Tensor) -> Tensor:
        """m_t as something that multiplies images like `like`."""
        m = self.shares.to(like)[t]
        return m[:, None, None, None] if m.ndim else m

    def variance(self, m: Tensor) -> Tensor:
        """delta at share m."""
        return 2 * self.scale * m * (1 - m)

    def forward(self, x0: Tensor, y: Tensor, t: int | Tensor, eps: Tensor) -> Tensor:
        """The state x_t between label and picture, with noise eps. Shapes: [B,C,H,W] -> the same."""
        m = self.share(t, y)
        return (1 - m) * x0 + m * y + self.variance(m).sqrt() * eps

    def offsets(
        self, labels: Tensor, x0: Tensor, y: Tensor, t: int | Tensor, eps: Tensor
    ) -> Tensor:
        """What the network would predict if the last single step had drifted from the label of class k.

        Formula     O_k = m_{t-1} (y - x0) + (m_t - m_{t-1}) (y - p_k) + sqrt(delta_t) eps,   m_{-1} = 0
                    = x_t - [x0 + (m_t - m_{t-1}) (p_k - x0)];   for the true label O = x_t - x0
        Source      Mei et al. 2024 (IDC), Proposition 1, as the released code computes it; derived in notebook 10
        Shapes      labels p [K,C,H,W]; x0, y, eps [B,C,H,W] -> [B,K,C,H,W], all in model space
        """
        t = torch.as_tensor(t, device=y.device).expand(len(y))
        m = self.share(t, y)
        before = torch.where((t > 0)[:, None, None, None], self.share((t - 1).clamp(min=0), y), 0)
        common = before * (y - x0) + self.variance(m).sqrt() * eps
        return common[:, None] + (m - before)[:, None] * (y[:, None] - labels)

    def kept(self, t: int | Tensor, n: int | Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """How much of the state survives a step towards the label, and the variance of the noise that joins it.

        Formula     m_n / m_t,   2 s m_n (m_t - m_n) / m_t,   for positions n <= t
        Source      a Brownian bridge, cut at t, is a Brownian bridge between the label and x_t: the picture y has no
                    weight. IDC's formula in a, delta and y is the same, with more terms (tests/test_idc.py)
        """
        m_t = self.share(t, like)
        m_n = self.share(n, like)
        if bool((m_n > m_t).any()):
            raise ValueError(
                f"expected a step towards the label, to a position n <= t, got t = {t} and n = {n}."
            )
        return m_n / m_t, 2 * self.scale * m_n * (m_t - m_n) / m_t

    def posterior(
        self, x_t: Tensor, x0: Tensor, t: int | Tensor, n: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean [B,C,H,W] and variance of q(x_n | x_t, x0, y) = q(x_n | x_t, x0): the reverse step with an estimated x0.

        Formula     mean (m_n/m_t) x_t + (1 - m_n/m_t) x0
        """
        kept, variance = self.kept(t, n, x_t)
        return kept * x_t + (1 - kept) * x0, variance


def every_step(steps: int) -> list[int]:
    """All positions of a bridge, from the picture to the label: [T-1, ..., 1, 0]."""
    return list(range(Bridge(steps).steps - 1, -1, -1))


def released_steps(steps: int = 4) -> list[int]:
    """The positions that the released code visits: [3, 1, 1, 0] for four, where 1 -> 1 does nothing.

    Formula     floor((T-1) (1 - i/(T-2))) while it exceeds 1 before rounding, then 1, 0
    Source      BBDM's released sampler with as many sampling steps as positions
    Errors      ValueError for T < 3, where its step is not defined
    """
    steps = units.check_whole(steps, "steps")
    if steps < 3:
        raise ValueError(
            f"expected at least 3 steps for the released list, got {steps}; use every_step."
        )
    ramp = [(steps - 1) * (1 - i / (steps - 2)) for i in range(steps - 1)]
    return [int(value) for value in ramp if value > 1 + 1e-9] + [1, 0]


def check_steps(steps: Sequence[int], bridge: Bridge) -> tuple[int, ...]:
    """Return the positions that a sampler visits if they lead down the bridge and end at 0, else raise a ValueError."""
    steps = tuple(steps)
    if not steps:
        raise ValueError("expected at least one step, got an empty list; use every_step.")
    if (
        min(steps) < 0
        or max(steps) >= bridge.steps
        or list(steps) != sorted(steps, reverse=True)
        or steps[-1] != 0
    ):
        raise ValueError(
            f"expected positions that go down from at most {bridge.steps - 1} to 0, got {list(steps)}; "
            f"this bridge has {bridge.steps} of them."
        )
    return steps
