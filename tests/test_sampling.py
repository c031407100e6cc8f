"""The sampler lands where the exact probability flow does, and samples have the moments of the law."""

import itertools
import math

import pytest
import torch
from diffclass import data, units
from diffclass.denoisers import sampling
from diffclass.denoisers.exact import MixtureDenoiser


def single_gaussian(scale=0.3):
    """One isotropic Gaussian: the probability flow has a closed form."""
    return MixtureDenoiser(
        torch.tensor([0.2, -0.1]).reshape(1, 2, 1, 1),
        torch.tensor([scale]),
        torch.ones(1),
        torch.zeros(1, dtype=torch.long),
    )


def flow_error(steps: int, heun=sampling.heun) -> float:
    """Distance to the closed form x_0 = m + (x_T - m) s / sqrt(s^2 + sigma_T^2)."""
    denoiser = single_gaussian()
    scale = 0.3
    levels = sampling.karras_levels(steps, 0.002, 80.0)
    *_, x = heun(
        denoiser, torch.zeros(64, dtype=torch.long), levels, torch.Generator().manual_seed(0)
    )
    start = torch.randn(64, 2, 1, 1, generator=torch.Generator().manual_seed(0)).double() * 80
    mean = torch.tensor([0.2, -0.1], dtype=torch.float64)[:, None, None]
    wanted = mean + (start - mean) * scale / math.sqrt(scale**2 + 80**2)
    return float((x - wanted).abs().max())


def test_heun_follows_the_closed_form_flow_at_second_order():
    errors = [flow_error(steps) for steps in (18, 36, 72, 144)]
    assert errors[-1] < 1e-3
    assert all(
        coarse / fine > 3 for coarse, fine in itertools.pairwise(errors)
    )  # a first-order sampler would halve


def test_an_euler_twin_is_caught():
    def euler(denoiser, labels, levels, generator):
        x = torch.randn((len(labels), *denoiser.image_shape), generator=generator).double() * float(
            levels[0]
        )
        for sigma, lower in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
            x = x + (lower - sigma) * (x - denoiser(x, sigma, [0])[:, 0]) / sigma
        yield x

    errors = [flow_error(steps, euler) for steps in (18, 36)]
    assert errors[0] / errors[1] < 3


def test_samples_have_the_moments_of_their_class():
    law = data.gaussians()
    denoiser = MixtureDenoiser.of_law(law)
    labels = torch.arange(3).repeat_interleave(2000)
    *_, x = sampling.heun(
        denoiser, labels, sampling.karras_levels(24), torch.Generator().manual_seed(1)
    )
    drawn, kinds = law.sample(60_000, torch.Generator().manual_seed(2), torch.float64)
    for k in range(3):
        mine = x[labels == k].flatten(1)
        truth = units.to_model(drawn[kinds == k]).flatten(1)
        assert (mine.mean(0) - truth.mean(0)).abs().max() < 5 * truth.std(0).max() / math.sqrt(2000)
        assert (mine.std(0) / truth.std(0) - 1).abs().max() < 0.1


def test_bad_levels_and_classes_get_a_sentence():
    with pytest.raises(ValueError, match="expected at least 2 steps between levels"):
        sampling.karras_levels(1)
    with pytest.raises(ValueError, match="expected classes between 0 and"):
        next(
            sampling.heun(
                single_gaussian(), torch.tensor([7]), sampling.karras_levels(4), torch.Generator()
            )
        )
