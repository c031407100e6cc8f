"""The plane: class-conditional Gaussian mixtures, whose densities are known exactly.

A point is an image of shape (2,1,1) with values in [0,1], so that one code path serves all worlds.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffclass import units
from diffclass.denoisers.exact import MixtureDenoiser

LARGEST_TAIL = 1e-6  # how much of a plane law may lie outside [0,1]^2: sampling redraws it, the density does not


# ---------------------------------------------------------------------------------------------------------------------
# Plane: class-conditional Gaussian mixtures


@dataclass(frozen=True, eq=False)
class MixtureLaw:
    """Class-conditional laws, each a mixture of M isotropic Gaussians; the truth to test all else on.

    Formula     p(x0 | k) = sum_m weights[m] [labels[m] = k] N(x0; means[m], scales[m]^2 I)
    Shapes      means [M,D], scales [M] (standard deviations), weights [M] (they sum to 1 within each class),
                labels [M] in 0..K-1, priors [K]; stored as float64 and int64; D = C H W of `image_shape`, 2 on the plane
    Units       model space [-1,1]^D; `sample` and `posterior` speak pixels, like every image of this library
    Errors      ValueError for weights or priors that do not sum to 1, scales <= 0, labels with a gap, or a law of which
                more than one in a million points would lie outside the picture
    """

    name: str
    means: Tensor
    scales: Tensor
    weights: Tensor
    labels: Tensor
    priors: Tensor
    image_shape: tuple[int, int, int] = (2, 1, 1)  # of the plane: two channels, one pixel

    def __post_init__(self):
        for field in ("means", "scales", "weights", "priors"):
            numbers = units.check_reals(getattr(self, field), f"{field} of the law '{self.name}'")
            object.__setattr__(self, field, numbers.double())
        labels = units.check_numbers(self.labels, f"labels of the law '{self.name}'")
        if bool((labels != labels.floor()).any()):
            raise ValueError(
                f"law '{self.name}': expected labels as whole numbers, got {labels.tolist()[:5]}."
            )
        object.__setattr__(self, "labels", labels.long())
        self._check_shapes()
        self._check_values()

    def _check_shapes(self):
        count = len(self.scales)
        object.__setattr__(self, "image_shape", units.check_image_shape(self.image_shape))
        expected = {
            "means": (count, math.prod(self.image_shape)),
            "scales": (count,),
            "weights": (count,),
            "labels": (count,),
        }
        expected["priors"] = (len(self.priors),)
        for field, shape in expected.items():
            if tuple(getattr(self, field).shape) != shape:
                raise ValueError(
                    f"law '{self.name}': expected {field} of shape {list(shape)}, got "
                    f"{list(getattr(self, field).shape)}; the first four share one axis."
                )
        if self.labels.unique().tolist() != list(range(len(self.priors))):
            raise ValueError(
                f"law '{self.name}': expected labels 0 to {len(self.priors) - 1} with no gap (one per "
                f"prior), got {self.labels.unique().tolist()}; renumber the classes."
            )

    def _check_values(self):
        if not all(
            bool(torch.isfinite(t).all())
            for t in (self.means, self.scales, self.weights, self.priors)
        ):
            raise ValueError(
                f"law '{self.name}': expected finite numbers, got NaN or infinity; check where they come from."
            )
        if float(self.scales.min()) <= 0:
            raise ValueError(
                f"law '{self.name}': expected scales > 0, got {float(self.scales.min()):.3g}; a scale is "
                "a standard deviation in model units."
            )
        if float(self.weights.min()) < 0 or float(self.priors.min()) <= 0:
            raise ValueError(
                f"law '{self.name}': expected weights >= 0 and priors > 0, got a smallest weight of "
                f"{float(self.weights.min()):.3g} and prior of {float(self.priors.min()):.3g}."
            )
        totals = torch.zeros_like(self.priors).index_add_(0, self.labels, self.weights)
        if not torch.allclose(totals, torch.ones_like(totals), rtol=0, atol=1e-9):
            raise ValueError(
                f"law '{self.name}': expected weights that sum to 1 within each class, got "
                f"{[round(t, 6) for t in totals.tolist()]}; divide each class's weights by its sum."
            )
        if abs(float(self.priors.sum()) - 1) > 1e-9:
            raise ValueError(
                f"law '{self.name}': expected priors that sum to 1, got {float(self.priors.sum()):.6g}."
            )
        if self.tail >= LARGEST_TAIL:
            raise ValueError(
                f"law '{self.name}': expected less than {LARGEST_TAIL:g} of each class outside the picture, [-1,1] in every direction, "
                f"got up to {self.tail:.2g}; move the means inward or reduce the scales."
            )

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.priors)

    @property
    def class_names(self) -> tuple[str, ...]:
        """What to write in a legend."""
        return tuple(f"class {k}" for k in range(self.num_classes))

    @property
    def tail(self) -> float:
        """An upper bound on the probability, in the worst class, that a point lies outside [-1,1]^D.

        Formula     sum_m weights[m] sum over the 2 D edges of Phi(-distance to the edge / scales[m])
        """
        edges = torch.cat([1 - self.means, 1 + self.means], dim=1)  # [M,2D]
        outside = torch.special.ndtr(-edges / self.scales[:, None]).sum(1)
        return float(
            torch.zeros_like(self.priors).index_add_(0, self.labels, self.weights * outside).max()
        )

    def sample(
        self, n: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Draw points and their classes; a point outside the picture (less than one in a million) is drawn again.

        Shapes      -> x [n,C,H,W] in pixel space [0,1], y [n]
        Randomness  all of it from `generator`
        """
        n = units.check_whole(n, "points to sample")
        if n < 1:
            raise ValueError(f"expected at least 1 point to sample, got n={n}.")
        component = torch.multinomial(
            self.priors[self.labels] * self.weights, n, replacement=True, generator=generator
        )
        size = self.means.shape[1]
        z = torch.full((n, size), torch.inf, dtype=torch.float64)
        while bool((outside := (z.abs() > 1).any(1)).any()):
            m = component[outside]
            noise = torch.randn(len(m), size, dtype=torch.float64, generator=generator)
            z[outside] = self.means[m] + self.scales[m, None] * noise
        return units.to_pixel(z).to(dtype).reshape(n, *self.image_shape), self.labels[component]

    def log_density(self, x_sigma: Tensor, sigma: float | Tensor = 0.0) -> Tensor:
        """The exact log density of noisy points, given each class; differentiable in x_sigma.

        Formula     that of `MixtureDenoiser.log_density`, the only place where it stands
        Source      a Gaussian plus independent Gaussian noise is Gaussian, and variances add
        Shapes      x_sigma [B,C,H,W] in model space, sigma a number or [B]  ->  [B,K], float64
        Units       nats; density per unit volume of model space
        Errors      ValueError for a wrong shape, non-finite points, or sigma < 0
        """
        units.check_images(x_sigma, self.image_shape, pixel_range=False)
        denoiser = MixtureDenoiser.of_law(self).to(x_sigma.device)
        return denoiser.log_density(x_sigma.double(), sigma)

    def posterior(self, x: Tensor) -> Tensor:
        """The exact probability of each class at a clean point: the best that any classifier can know.

        Formula     p(k | x) = priors[k] p(x | k) / sum_j priors[j] p(x | j)
        Source      Bayes' rule; the change of units multiplies every density alike and cancels
        Shapes      x [B,C,H,W] in pixel space [0,1]  ->  [B,K], float64
        """
        units.check_images(x, self.image_shape)
        return (self.log_density(units.to_model(x)) + self.priors.log().to(x.device)).softmax(1)


def _law(
    name: str, classes: list[list[tuple[float, float, float, float]]], priors=None
) -> MixtureLaw:
    """A law from its classes, each a list of components (x, y, scale, weight); equal priors unless given."""
    table = torch.tensor(
        [component for components in classes for component in components], dtype=torch.float64
    )
    labels = [k for k, components in enumerate(classes) for _ in components]
    priors = [1 / len(classes)] * len(classes) if priors is None else priors
    return MixtureLaw(name, table[:, :2], table[:, 2], table[:, 3], labels, priors)


def _arc(
    centre: tuple[float, float], radius: float, scale: float, start: float = 0.0, turn: float = 1.0
):
    """Equal Gaussians along a circle or a part of it (angles in turns), close enough to look like one band.

    Neighbours lie 1.5 scales apart or nearer; the ripple along the band, 2 exp(-2 pi^2 / 1.5^2), is then below 0.1 %.
    """
    count = math.ceil(2 * math.pi * radius * turn / (1.5 * scale))
    steps = count if turn == 1 else count - 1  # a full circle does not repeat its first point
    angles = [2 * math.pi * (start + turn * i / steps) for i in range(count)]
    return [
        (centre[0] + radius * math.cos(a), centre[1] + radius * math.sin(a), scale, 1 / count)
        for a in angles
    ]


def _triangle(radius: float, scale: float):
    angles = [math.pi * (1 / 2 + 2 * k / 3) for k in range(3)]
    return [[(radius * math.cos(a), radius * math.sin(a), scale, 1.0)] for a in angles]


def gaussians() -> MixtureLaw:
    """Three round classes that just touch: the law of the first derivations."""
    return _law("gaussians", _triangle(radius=0.32, scale=0.12))


def mixtures() -> MixtureLaw:
    """Three classes of three, two and four unequal Gaussians, interleaved so that no straight line separates them."""
    return _law(
        "mixtures",
        [
            [(-0.50, 0.45, 0.09, 0.4), (0.05, 0.05, 0.08, 0.3), (0.55, -0.40, 0.08, 0.3)],
            [(-0.10, 0.50, 0.09, 0.6), (0.10, -0.50, 0.09, 0.4)],
            [
                (-0.50, -0.05, 0.08, 0.3),
                (-0.35, -0.50, 0.07, 0.2),
                (0.45, 0.05, 0.08, 0.3),
                (0.50, 0.50, 0.09, 0.2),
            ],
        ],
    )


def rings() -> MixtureLaw:
    """Three concentric rings. By definition the law *is* the mixture of Gaussians on each circle, so it stays exact."""
    return _law("rings", [_arc((0.0, 0.0), radius, 0.05) for radius in (0.16, 0.41, 0.66)])


def moons() -> MixtureLaw:
    """Two interlocking half circles, each a mixture of Gaussians along its arc."""
    return _law(
        "moons",
        [_arc((-0.2, -0.12), 0.42, 0.06, 0.0, 0.5), _arc((0.2, 0.12), 0.42, 0.06, 0.5, 0.5)],
    )


def overlapping() -> MixtureLaw:
    """Three classes that overlap so much that the best possible classifier is right about three times in four."""
    return _law("overlapping", _triangle(radius=0.162, scale=0.14))


def imbalanced() -> MixtureLaw:
    """Three touching classes of which one is rare: priors 0.80, 0.15, 0.05."""
    return _law("imbalanced", _triangle(radius=0.25, scale=0.12), priors=[0.80, 0.15, 0.05])


PLANE_LAWS = {
    law.__name__: law for law in (gaussians, mixtures, rings, moons, overlapping, imbalanced)
}
