"""A hundred classes of small pictures whose law is known: where many classes are what costs, and the truth is at hand.

Sifting, racing and one call for all save little among ten classes and nothing among three. Here are a hundred, in as many
dimensions as a picture of 8x8 pixels in colour has, offline and exact.
"""

import functools

import torch

from diffclass.data.plane import MixtureLaw

CLASSES = 100
COMPONENTS = (
    2  # of every class, so that no class is one Gaussian and no straight line separates two
)
SHAPE = (3, 8, 8)
REACH = 0.4  # of component means in every direction, in model units
SCALE = 0.1  # of components, in model units; six of them fit between the means and the edge of the picture
SEED = 0  # of the means


@functools.cache
def hundred() -> MixtureLaw:
    """A hundred classes of two Gaussians each, around random pictures: equally likely, and far apart without noise.

    Formula     p(x0 | k) = 1/2 sum_{m=1,2} N(x0; mu_km, 0.1^2 I),  mu_km uniform in [-0.4, 0.4]^192
    Meaning     two means lie about 4.5 apart: under noise of sigma_pixel 0.25 (0.5 in model units) Bayes' rule names 99.9 %
                of the classes, under 0.5 67 %, under 1 15 % (2000 pictures)
    Shapes      (3,8,8), K = 100
    """
    count = COMPONENTS * CLASSES
    size = SHAPE[0] * SHAPE[1] * SHAPE[2]
    generator = torch.Generator().manual_seed(SEED)
    means = REACH * (2 * torch.rand((count, size), generator=generator, dtype=torch.float64) - 1)
    return MixtureLaw(
        name="hundred",
        means=means,
        scales=torch.full((count,), SCALE),
        weights=torch.full((count,), 1 / COMPONENTS),
        labels=torch.arange(count) // COMPONENTS,
        priors=torch.full((CLASSES,), 1 / CLASSES, dtype=torch.float64),
        image_shape=SHAPE,
    )
