"""Bayes' rule from one call: exact where the denoiser is, its derivative, and what it cannot know."""

import pytest
import torch
from diffclass import data, units
from diffclass.classifiers.one_call import OneCallClassifier, barycentric
from diffclass.denoisers import network
from diffclass.denoisers.exact import MixtureDenoiser


def seeded(seed=0):
    """A generator with a seed."""
    return torch.Generator().manual_seed(seed)


def random_heads(count, classes, dimensions, seed=0):
    """Heads in general position, and shares of each."""
    heads = torch.randn(count, classes, dimensions, generator=seeded(seed), dtype=torch.float64)
    share = torch.randn(count, classes, generator=seeded(seed + 1), dtype=torch.float64).softmax(1)
    return heads, share


def projected(heads, null, rounds=200_000):
    """The same shares by another road: projected gradient, with the projection onto the simplex of Duchi et al. 2008."""
    away = heads - null[:, None]
    gram = away @ away.transpose(1, 2)
    rate = 1 / torch.linalg.matrix_norm(gram, 2)[:, None]
    share = torch.full(gram.shape[:2], 1 / gram.shape[1], dtype=gram.dtype)
    ranks = torch.arange(1, gram.shape[1] + 1, dtype=gram.dtype)
    for _ in range(rounds):
        moved = share - rate * (gram @ share[:, :, None])[:, :, 0]
        ordered = moved.sort(1, descending=True).values
        sums = (ordered.cumsum(1) - 1) / ranks
        last = (ordered > sums).sum(1, keepdim=True)
        new = (moved - sums.gather(1, last - 1)).clamp_min(0)
        if float((new - share).abs().max()) < 1e-14:
            break
        share = new
    return share


@pytest.mark.parametrize("law", ["gaussians", "moons", "overlapping", "imbalanced"])
@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_it_is_the_posterior_of_the_noised_point(law, sigma):
    law = data.PLANE_LAWS[law]()
    denoiser = MixtureDenoiser.of_law(law)
    classifier = OneCallClassifier(denoiser, sigma)
    x = law.sample(200, seeded(), torch.float64)[0]
    noise = classifier.sample_noise(200, seeded(1)).double()
    truth = denoiser.log_density(units.to_model(x) + sigma * noise, sigma)
    truth = (truth + torch.as_tensor(law.priors).double().log()).softmax(1)
    got = classifier(x, noise).exp()
    assert float((got - truth).abs().max()) < 1e-8
    assert float((got.sum(1) - 1).abs().max()) < 1e-9
    # a uniform prior is not that of the answer without a class
    flat = denoiser.log_density(units.to_model(x) + sigma * noise, sigma).softmax(1)
    if law.name == "imbalanced":
        assert float((got - flat).abs().max()) > 0.05


def test_shares_inside_and_on_the_edge_of_the_simplex():
    heads, share = random_heads(8, 10, 30)
    inside = (share[:, :, None] * heads).sum(1)
    assert float((barycentric(heads, inside).exp() - share).abs().max()) < 1e-8
    outside = inside + 0.5 * torch.randn(8, 30, generator=seeded(2), dtype=torch.float64)
    got = barycentric(heads, outside).exp()
    assert float((got - projected(heads, outside)).abs().max()) < 1e-6
    assert float(got.min()) < 1e-6  # some heads have no share there


def test_the_derivative_is_that_of_finite_differences():
    heads, share = random_heads(2, 4, 6, seed=3)
    null = (share[:, :, None] * heads).sum(1)
    off = null + 0.3 * torch.randn(2, 6, generator=seeded(5), dtype=torch.float64)
    for point in (null, off):
        inputs = (heads.clone().requires_grad_(), point.clone().requires_grad_())
        assert torch.autograd.gradcheck(barycentric, inputs, eps=1e-7, atol=1e-4)


def test_heads_that_are_alike_share_evenly():
    same = torch.ones(3, 5, 7, dtype=torch.float64)
    got = barycentric(same, same[:, 0]).exp()
    assert float((got - 0.2).abs().max()) < 1e-12


def test_the_nearest_head_is_bayes_answer_for_two_classes():
    """|D_1 - D_null| = (1 - p_1) |D_1 - D_2|."""
    law = data.moons()
    classifier = OneCallClassifier(MixtureDenoiser.of_law(law), 0.5)
    x = law.sample(100, seeded(4), torch.float64)[0]
    noise = classifier.sample_noise(100, seeded(6)).double()
    heads, null = classifier.answers(x, noise)
    distance = (heads - null[:, None]).flatten(2).norm(dim=2)
    apart = (heads[:, 0] - heads[:, 1]).flatten(1).norm(dim=1)
    share = classifier(x, noise).exp()
    torch.testing.assert_close(distance / apart[:, None], 1 - share, rtol=0, atol=1e-7)


def test_routes_follow_one_side_of_the_difference_each():
    law = data.overlapping()
    classifier = OneCallClassifier(MixtureDenoiser.of_law(law), 0.4)
    x = law.sample(5, seeded(7), torch.float64)[0]
    noise = classifier.sample_noise(5, seeded(8)).double()
    values = {"all": classifier, **classifier.routes()}
    gradients = {}
    for name, route in values.items():
        moving = x.clone().requires_grad_()
        logits = route(moving, noise)
        torch.testing.assert_close(logits, classifier(x, noise), rtol=0, atol=1e-9)
        margin = logits[:, 0].sum() - logits[:, 1].sum()
        (gradients[name],) = torch.autograd.grad(margin, moving)
    both = gradients["the null head alone"] + gradients["the heads alone"]
    torch.testing.assert_close(both, gradients["all"], rtol=1e-6, atol=1e-9)
    assert float(gradients["the null head alone"].abs().max()) > 0


def test_a_denoiser_without_a_null_class_or_a_level_outside_its_range_is_refused():
    shape = (1, 8, 8)
    plain = network.build("MultiHeadDenoiser", "DigitNet", 4, shape, has_null=False, width=16)
    with pytest.raises(ValueError, match="trained without a null class"):
        OneCallClassifier(plain, 0.1)
    narrow = network.build("MultiHeadDenoiser", "DigitNet", 4, shape, (0.05, 1.0), width=16)
    with pytest.raises(ValueError, match="noise levels between 0.05 and 1, which this denoiser"):
        OneCallClassifier(narrow, 2.0)
    assert OneCallClassifier(narrow, 0.05).calls == 1
