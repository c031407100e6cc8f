"""Votes for every smoothing level from one path: a picture that is noised further and further, denoised once a level.

What a network answers at a level does not depend on how much of the noise is smoothing and how much was added to
measure losses. So one Brownian path serves every smoothing level on its grid, for the calls of the lowest one.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from diffclass import likelihood, noise, units
from diffclass.classifiers.base import decided
from diffclass.classifiers.one_call import barycentric
from diffclass.denoisers.base import Denoiser
from diffclass.noise import Levels, Weighting


def path_noise(
    levels: Levels, image_shape: tuple[int, int, int], paths: int, generator: torch.Generator
) -> Tensor:
    """The increments of some paths, one a level. Shapes: -> [paths,T,C,H,W].

    Randomness  `generator`, which advances
    Errors      those of `units.check_image_shape` and `units.check_whole`
    """
    paths = units.check_whole(paths, "paths", least=0)
    shape = (paths, len(levels), *units.check_image_shape(image_shape))
    return torch.randn(shape, generator=generator, device=generator.device)


def brownian_path(z: Tensor, levels: Levels, increments: Tensor) -> Tensor:
    """An image at ever higher noise levels, each the one before with more noise.

    Formula     x_1 = z + sigma_1 xi_1,   x_{j+1} = x_j + sqrt(sigma_{j+1}^2 - sigma_j^2) xi_{j+1}
    Why         every x_j is a smoothing sample z + sigma_j eps, and all that follow are draws of q(x_t | x_j): images
                noised apart from each other, z + sigma_t eps_t, are not
    Shapes      z [B,C,H,W], increments [B or 1,T,C,H,W] -> [B,T,C,H,W]
    Units       model space
    Errors      ValueError for levels that do not rise, fewer than two, or increments of other images
    """
    units.check_images(z, pixel_range=False)
    increments = units.check_numbers(increments, "the increments of a path")
    count = len(levels)
    fits = increments.ndim == 5 and increments.shape[1:] == (count, *z.shape[1:])
    if not fits or len(increments) not in (1, len(z)):
        raise ValueError(
            f"expected increments [1 or {len(z)},{count},{','.join(map(str, z.shape[1:]))}] for these images and levels, got "
            f"{list(increments.shape)}; draw them by path_noise."
        )
    if count < 2 or bool((levels.sigma.diff() <= 0).any()):
        raise ValueError(
            f"expected two levels or more that rise, along which noise is added, got {levels}."
        )
    squares = torch.cat([levels.sigma.new_zeros(1), levels.sigma.double() ** 2])
    added = squares.diff().sqrt().to(z)
    steps = added[:, None, None, None] * increments.to(z)
    return z[:, None] + steps.cumsum(1)


@torch.no_grad()
def path_logits(
    denoiser: Denoiser,
    z: Tensor,
    levels: Levels,
    increments: Tensor,
    weighting: Weighting = noise.elbo_weight,
) -> Tensor:
    """log p_tau(x_tau | k) for the smoothing level of every level but the last, from one path (EPNDC).

    Formula     for tau = sigma_i:  - sum_{j>i} w_j ( ||x~_ij - D_k(x_j, sigma_j)||^2 - ||x_i - x~_ij||^2 ),
                x~_ij = x_i - sigma_i^2 / (sigma_j^2 - sigma_i^2) (x_j - x_i): the clean point on the line through both
    Equal to    `likelihood.noised_elbo` of x_i over the levels above, under the noise that the path adds
    Source      Chen et al. 2024 (NDC) remark that answers can be used again; that the draws must lie on one path is
                derived in notebook 12b
    Shapes      z [B,C,H,W], T levels, increments [B or 1,T,C,H,W] -> [B,T-1,K]
    Units       model space: sigma_pixel = sigma / 2; nats, up to a constant of each level
    Cost        T - 1 levels, each asked once: the calls of the lowest smoothing level alone
    Meaning     each level is unbiased, as by noise of its own; noise is shared along the path, so that levels are correlated,
                and so are the terms of one level, whose spread is a little larger
    Gradient    none: for votes
    Errors      those of `brownian_path`, and of `Denoiser.check_levels`
    """
    path = brownian_path(z, levels, increments)
    sigma = levels.sigma.tolist()
    losses: list[list[Tensor]] = [[] for _ in sigma]
    for above, heads in _answers(denoiser, path, levels, first=1, null=False):
        for tau in range(above):
            share = sigma[tau] ** 2 / (sigma[above] ** 2 - sigma[tau] ** 2)
            away = share * (path[:, above] - path[:, tau])
            clean = (path[:, tau] - away)[:, None]
            shared = away.flatten(1).square().sum(1)[:, None]
            losses[tau].append((clean - heads).flatten(2).square().sum(-1) - shared)
    return _evidence_above(losses, levels.to(z), weighting)


@torch.no_grad()
def path_approximations(
    denoiser: Denoiser,
    z: Tensor,
    levels: Levels,
    increments: Tensor,
    weighting: Weighting = noise.elbo_weight,
) -> Tensor:
    """What APNDC on the path says at the smoothing level of every level but the last, from one path.

    Formula     for tau = sigma_i:  - sum_{j>i} w_j ||D_null(x_i, sigma_i) - D_k(x_j, sigma_j)||^2
    Equal to    `likelihood.denoised_target_elbo` of x_i over the levels above, under the noise that the path adds
    Shapes      z [B,C,H,W], T levels, increments [B or 1,T,C,H,W] -> [B,T-1,K]
    Units       those of `path_logits`
    Cost        T levels, each asked once under every class and without one; for a network with all these heads T calls. The
                ensemble has no such path: it adds noise to the denoised image, another one for every smoothing level
    Gradient    none: for votes
    Errors      those of `path_logits`; ValueError for a denoiser without a null class
    """
    path = brownian_path(z, levels, increments)
    losses: list[list[Tensor]] = [[] for _ in levels.sigma]
    found: list[Tensor] = []
    for _, answers in _answers(denoiser, path, levels, first=0, null=True):
        heads = answers[:, :-1]
        for tau, clean in enumerate(found):
            losses[tau].append((clean - heads).flatten(2).square().sum(-1))
        found.append(answers[:, -1:])
    return _evidence_above(losses, levels.to(z), weighting)


@torch.no_grad()
def path_posterior(denoiser: Denoiser, z: Tensor, levels: Levels, increments: Tensor) -> Tensor:
    """ln p(k | x_tau) for the smoothing level of every level, from one path and one call each.

    Formula     for tau = sigma_i the barycentric coordinates of D_null(x_i, sigma_i) among the D_k(x_i, sigma_i)
    Source      this course, notebook 06b
    Shapes      z [B,C,H,W], T levels, increments [B or 1,T,C,H,W] -> [B,T,K]
    Units       model space: sigma_pixel = sigma / 2; nats
    Cost        T levels, each asked once under every class and without one
    Gradient    none: for votes
    Errors      those of `path_approximations`
    """
    path = brownian_path(z, levels, increments)
    rows = [
        barycentric(answers[:, :-1].flatten(2), answers[:, -1].flatten(1)).to(z)
        for _, answers in _answers(denoiser, path, levels, first=0, null=True)
    ]
    return torch.stack(rows, 1)


def path_votes(logits: Tensor) -> Tensor:
    """The class of the largest logit at every smoothing level.

    Shapes      [B,taus,K] -> [B,taus]
    Errors      those of `base.check_logits`; ValueError for logits of another shape
    """
    logits = units.check_reals(logits, "logits")
    if logits.ndim != 3:
        raise ValueError(f"expected logits [B,taus,K] of paths, got {list(logits.shape)}.")
    return decided(logits.flatten(0, 1)).unflatten(0, logits.shape[:2])


def _answers(
    denoiser: Denoiser, path: Tensor, levels: Levels, *, first: int, null: bool
) -> Iterator[tuple[int, Tensor]]:
    """Yield every level's number from `first` on and the denoised images there, with `null` the one without a class last."""
    denoiser.check_levels(levels.sigma)
    classes = list(range(denoiser.num_classes + null))
    if null:
        likelihood.check_null(denoiser)
    for number, sigma in enumerate(levels.sigma.tolist()):
        if number >= first:
            yield number, denoiser(path[:, number], sigma, classes)


def _evidence_above(losses: list[list[Tensor]], levels: Levels, weighting: Weighting) -> Tensor:
    """Losses of the levels above every smoothing level, weighted and summed. Shapes: -> [B,T-1,K]."""
    rows = [
        likelihood.evidence(torch.stack(own, -1), levels[tau + 1 :], weighting)
        for tau, own in enumerate(losses[:-1])
    ]
    return torch.stack(rows, 1)
