"""The references of the exercises of notebooks 07 and 08 are what the library and autograd say."""

import math

import torch
from diffclass import attacks
from diffclass.classifiers.purified import LikelihoodMaximisation, plain_direction
from diffclass.course import exercises
from diffclass.denoisers.exact import MixtureDenoiser


def test_the_steepest_step_gains_the_dual_norm_and_no_other_step_gains_more():
    generator = torch.Generator().manual_seed(0)
    for g, epsilon in exercises.STEEPEST_STEP.cases():
        step = exercises.STEEPEST_STEP.reference(g, epsilon)
        torch.testing.assert_close((step * g).sum(1), epsilon * g.norm(dim=1))
        others = torch.randn(1000, *g.shape, generator=generator, dtype=g.dtype)
        others = epsilon * others / others.norm(dim=-1, keepdim=True)
        assert bool(((others * g).sum(-1) <= (step * g).sum(1)).all())


def test_the_loss_references_are_those_of_the_library():
    for logits, y in exercises.MARGIN_LOSS.cases():
        margin = exercises.MARGIN_LOSS.reference(logits, y)
        torch.testing.assert_close(margin, attacks.margin_loss(logits, y))
        torch.testing.assert_close(
            exercises.DLR_LOSS.reference(logits, y), attacks.dlr_loss(logits, y)
        )
        assert torch.equal(margin > 0, logits.argmax(1) != y)


def test_so_many_draws_are_enough_and_one_fewer_is_not():
    for g, v, share in exercises.EOT_DRAWS.cases():
        n = exercises.EOT_DRAWS.reference(g, v, share)
        length = [math.sqrt(len(g) * v / count) for count in (n, n - 1)]
        assert length[0] <= share * float(g.norm()) < length[1]


def test_the_contraction_is_the_walk_of_the_library_on_a_gaussian():
    sigma = 0.5
    rate = 3.0
    steps = 4
    shape = (1, 2, 3)
    for variance in (0.04, 0.5, 2.0):
        law = MixtureDenoiser(
            torch.full((1, *shape), 0.1),
            torch.tensor([variance**0.5]),
            torch.ones(1),
            torch.zeros(1),
        )
        walk = LikelihoodMaximisation(
            law, steps=steps, rate=rate, rule=plain_direction, band=(sigma, sigma)
        )
        z = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        held = (torch.full((1, steps), sigma), torch.zeros(1, steps, *shape, dtype=torch.float64))
        *_, u = walk.walk(z, held)
        factor = exercises.CONTRACTION.reference(
            torch.tensor([variance], dtype=torch.float64), sigma, rate, steps, 6
        )
        torch.testing.assert_close(u - 0.1, factor * (z - 0.1), rtol=1e-5, atol=1e-6)


def test_the_gradient_of_the_loss_is_that_of_autograd():
    for d, u, jacobian in exercises.LOSS_GRADIENT.cases():
        leaf = u.clone().requires_grad_()
        denoised = d + (leaf - u) @ jacobian.T
        loss = ((denoised - leaf) ** 2).sum(1) / u.shape[1]
        wanted = torch.autograd.grad(loss.sum(), leaf)[0]
        torch.testing.assert_close(exercises.LOSS_GRADIENT.reference(d, u, jacobian), wanted)


def test_the_gradient_through_the_steps_is_that_of_autograd():
    for slopes, g, exact in exercises.STRAIGHT_THROUGH.cases():
        start = torch.zeros_like(g, requires_grad=True)
        u = start
        for slope in slopes:
            u = u - (slope @ u if exact else (slope @ u).detach())
        wanted = torch.autograd.grad(u @ g, start)[0]
        torch.testing.assert_close(exercises.STRAIGHT_THROUGH.reference(slopes, g, exact), wanted)
