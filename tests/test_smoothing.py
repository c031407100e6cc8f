"""Votes: they are counted, independent, repeatable, and as frequent as the closed form of a linear classifier says."""

import math

import pytest
import torch
from diffclass import data
from diffclass.certify import certificates, counting
from diffclass.classifiers import smoothed
from diffclass.classifiers.noised import NoisedBayesClassifier
from diffclass.denoisers.exact import MixtureDenoiser
from torch import nn

SHAPE = (1, 2, 2)


class HalfSpace(nn.Module):
    """Two classes on either side of a plane at a known distance; remembers every noised image that it was shown."""

    num_classes = 2
    image_shape = SHAPE

    def __init__(self):
        super().__init__()
        self.normal = torch.tensor([0.5, -0.5, 0.5, 0.5], dtype=torch.float64)
        self.seen = []

    def forward(self, x):
        """Logits: the signed distance and its opposite."""
        self.seen.append(x)
        distance = (x.flatten(1) - 0.5) @ self.normal
        return torch.stack([distance, -distance], 1)


def image(distance: float) -> torch.Tensor:
    """The image at a signed distance from the plane."""
    return (torch.full((1, 4), 0.5, dtype=torch.float64) + distance * HalfSpace().normal).reshape(
        1, *SHAPE
    )


def last(counts):
    """The final running count."""
    *_, final = counts
    return final


def check_votes(count_votes=counting.count_votes):
    """A half space at distance d wins with probability Phi(d / sigma), for any batch, within 4.5 standard errors."""
    for distance, sigma, batch in ((0.1, 0.25, 250), (-0.2, 0.4, 77), (0.0, 0.1, 5000)):
        wins = (
            float(
                last(count_votes(HalfSpace(), image(distance), sigma, 5000, generator(), batch))[0]
            )
            / 5000
        )
        p = 0.5 * (1 + math.erf(distance / sigma / math.sqrt(2)))
        assert abs(wins - p) < 4.5 * math.sqrt(p * (1 - p) / 5000), (distance, wins, p)


def generator(seed: int = 0) -> torch.Generator:
    """A seeded generator."""
    return torch.Generator().manual_seed(seed)


def test_a_half_space_wins_with_its_closed_form_probability():
    check_votes()


def test_running_counts_grow_to_n_and_every_vote_counts_once():
    counts = list(counting.count_votes(HalfSpace(), image(0.1), 0.25, 230, generator(), batch=100))
    assert [int(c.sum()) for c in counts] == [100, 200, 230]
    assert all(bool((a <= b).all()) for a, b in zip(counts, counts[1:], strict=False))


def test_the_noise_is_gaussian_unclipped_and_of_the_stated_size():
    model = HalfSpace()
    x = image(0.1)
    last(counting.count_votes(model, x, 0.5, 4000, generator()))
    eps = (torch.cat(model.seen) - x) / 0.5
    assert abs(float(eps.mean())) < 4.5 / math.sqrt(16000) and abs(
        float(eps.var()) - 1
    ) < 4.5 * math.sqrt(2 / 16000)
    assert float(torch.cat(model.seen).min()) < 0 and float(torch.cat(model.seen).max()) > 1


def test_the_same_seed_repeats_and_touches_no_global_state():
    before = torch.get_rng_state()
    votes = [
        last(counting.draw_votes(HalfSpace(), image(0.05), 0.25, seed=s))[1] for s in (3, 3, 4)
    ]
    assert votes[0] == votes[1] != votes[2] and votes[0].seed == 3
    assert torch.equal(torch.get_rng_state(), before)


def test_selection_and_estimation_share_no_noise():
    """Every vote sees its own noise, and the class is guessed before, and apart from, the votes that bound it."""
    model = HalfSpace()
    progress = list(
        counting.draw_votes(model, image(0.05), 0.25, selection=60, estimation=340, batch=50)
    )
    seen = torch.cat(model.seen).flatten(1)
    assert len(seen) == 400 and len(torch.unique(seen, dim=0)) == 400
    votes = progress[-1][1]
    assert sum(votes.selection) == 60 and sum(votes.estimation) == 340 and votes.sigma_pixel == 0.25
    assert votes.selection[0] == int(((seen[:60] - 0.5) @ model.normal > 0).sum())
    assert votes.estimation[0] == int(((seen[60:] - 0.5) @ model.normal > 0).sum())
    done = [d for d, _ in progress]
    assert done == sorted(done) and done[-1] == 400 and all(v is None for _, v in progress[:-1])


def test_the_certificate_never_exceeds_the_true_distance():
    """At alpha 0.001 all of 40 certificates of a half space are at most its distance, and the best come close."""
    ratios = []
    for i in range(40):
        distance = 0.05 + 0.01 * i
        votes = last(
            counting.draw_votes(
                HalfSpace(), image(distance), 0.25, estimation=2000, seed=i, batch=1000
            )
        )[1]
        ratios.append(certificates.smoothing_radius(votes, alpha=0.001).radius / distance)
    assert max(ratios) <= 1 and max(ratios) > 0.8


def test_a_random_classifier_draws_fresh_noise_for_every_vote():
    """Two votes on the same noised picture can differ: the vote's own noise is inside the counted event."""
    law = data.overlapping()
    x = law.sample(1, generator(), torch.float32)[0]
    model = NoisedBayesClassifier(MixtureDenoiser.of_law(law), 0.15).with_fresh_noise(generator(1))
    counts = [last(counting.count_votes(model, x, 0.15, 300, generator(2))) for _ in range(2)]
    assert int(counts[0].sum()) == 300 and not torch.equal(*counts), (
        "same picture noise, other internal noise"
    )


def test_the_average_of_noised_logits_has_the_closed_form_mean_and_a_gradient():
    """A half space's logits are linear, so their average over noise is the clean logit, within 4.5 standard errors."""
    x = image(0.1).requires_grad_(True)
    logits = smoothed.NoiseAveraged(HalfSpace(), 0.25, 2000, generator())(x)
    assert abs(float(logits[0, 0].detach()) - 0.1) < 4.5 * 0.25 / math.sqrt(2000)
    assert torch.allclose(
        torch.autograd.grad(logits[0, 0], x)[0].flatten(), HalfSpace().normal, rtol=1e-9
    )
    batch = torch.cat([image(0.4), image(-0.4)])
    assert smoothed.NoiseAveraged(HalfSpace(), 0.05, 10, generator())(batch).argmax(1).tolist() == [
        0,
        1,
    ]


@pytest.mark.parametrize(
    "change, error, sentence",
    [
        (
            dict(x=torch.zeros(2, *SHAPE)),
            ValueError,
            "expected one image, got a batch of 2; a certificate",
        ),
        (dict(x=torch.zeros(SHAPE)), ValueError, "add the batch axis"),
        (dict(x=torch.full((1, *SHAPE), 30.0)), ValueError, "divide by 255"),
        (dict(x=torch.full((1, *SHAPE), math.nan)), ValueError, "expected finite images"),
        (dict(x=torch.zeros(1, 1, 3, 3)), ValueError, r"expected images of shape \[B,1,2,2\]"),
        (dict(sigma_pixel=0.0), ValueError, "expected a finite noise level sigma_pixel > 0, got 0"),
        (dict(sigma_pixel=-1.0), ValueError, "got -1"),
        (dict(sigma_pixel=math.inf), ValueError, "got inf"),
        (dict(n=0), ValueError, "expected at least one vote, .* got n=0"),
        (dict(batch=0), ValueError, "in batches of at least one, got n=10, batch=0"),
        (
            dict(x=torch.zeros(1, *SHAPE).numpy()),
            TypeError,
            "expected images as a torch.Tensor, got ndarray",
        ),
    ],
)
def test_votes_that_cannot_be_meant_get_a_sentence(change, error, sentence):
    arguments = {
        "x": torch.zeros(1, *SHAPE),
        "sigma_pixel": 0.25,
        "n": 10,
        "generator": generator(),
        **change,
    }
    with pytest.raises(error, match=sentence):
        next(counting.count_votes(HalfSpace(), **arguments))


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(selection=0), "expected at least one vote, .* got n=0"),
        (dict(estimation=-5), "expected at least one vote, .* got n=-5"),
        (dict(sigma_pixel=0.0), "expected a finite noise level sigma_pixel > 0"),
    ],
)
def test_a_certificate_needs_votes_and_noise(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        list(counting.draw_votes(HalfSpace(), image(0.1), **{"sigma_pixel": 0.25, **change}))


@pytest.mark.parametrize(
    "sigma, draws, sentence",
    [
        (0.0, 4, "expected a finite noise level sigma_pixel > 0"),
        (math.nan, 4, "got nan"),
        (0.25, 0, "expected at least one draw to average over, got 0"),
    ],
)
def test_an_average_needs_noise_and_draws(sigma, draws, sentence):
    with pytest.raises(ValueError, match=sentence):
        smoothed.NoiseAveraged(HalfSpace(), sigma, draws, generator())


def test_logits_that_are_not_numbers_are_no_votes():
    """argmax of NaN is some class, always the same one: without the error a broken classifier would be certified."""

    class Undefined(HalfSpace):
        def forward(self, x):
            """Logits that are NaN for one image in a few."""
            return super().forward(x) + torch.where(
                x.flatten(1).amin(1, keepdim=True) < 0, math.nan, 0.0
            )

    with pytest.raises(
        FloatingPointError, match="logits became NaN on noised images .sigma_pixel 0.25. and cannot"
    ):
        list(counting.draw_votes(Undefined(), image(0.1), 0.25))
