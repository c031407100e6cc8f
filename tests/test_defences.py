"""Purifiers against closed forms: what they do to a Gaussian, their exact gradient, and what BPDA leaves out of it."""

import math
import warnings

import pytest
import torch
from diffclass import attacks, data, noise
from diffclass.classifiers import purified
from diffclass.classifiers.bayes import BayesClassifier, ExactClassifier
from diffclass.classifiers.purified import (
    Defended,
    LikelihoodMaximisation,
    Purification,
    adam_direction,
    plain_direction,
)
from diffclass.classifiers.votes import MajorityVote
from diffclass.denoisers.base import Denoiser
from diffclass.denoisers.exact import MixtureDenoiser
from diffclass.noise import NoiseBank

SHAPE = (1, 2, 2)
SPREAD = 0.3
MEAN = 0.1
KINDS = ["plain", "released", "paper", "SDE", "ODE"]


class Gaussian(Denoiser):
    """The exact denoiser of N(mean, diag(variances)) without classes, twice differentiable."""

    has_null = True
    num_classes = 1
    sigma_range = (1e-3, 1e3)

    def __init__(self, variances, mean=0.0):
        super().__init__()
        self.image_shape = tuple(variances.shape)
        self.variances = variances
        self.mean = mean

    def estimate(self, x_sigma, sigma, classes):
        """mean + s^2 / (s^2 + sigma^2) (x - mean)."""
        keep = self.variances / (self.variances + sigma[:, None, None, None] ** 2)
        return (self.mean + keep * (x_sigma - self.mean))[:, None].expand(
            -1, len(classes), -1, -1, -1
        )


class Waves(Denoiser):
    """Some smooth function of image and level, unlike any linear one: gradients have nothing to cancel by luck."""

    has_null = True
    num_classes = 2
    image_shape = SHAPE
    sigma_range = (1e-3, 1e3)

    def estimate(self, x_sigma, sigma, classes):
        """Neighbours bend each other."""
        bent = x_sigma + 0.3 * (3 * x_sigma.roll(1, -1) + sigma[:, None, None, None]).sin()
        return (
            bent[:, None].expand(-1, len(classes), -1, -1, -1)
            * torch.ones(len(classes))[:, None, None, None]
        )


def gaussian(shape=SHAPE, spread=SPREAD):
    """N(MEAN, SPREAD^2 I) as a mixture with one component."""
    return MixtureDenoiser(
        torch.full((1, *shape), MEAN), torch.tensor([spread]), torch.ones(1), torch.zeros(1)
    )


def pixels(count=5, shape=SHAPE, seed=0):
    """Images away from the faces of the pixel cube."""
    generator = torch.Generator().manual_seed(seed)
    return 0.4 + 0.2 * torch.rand(count, *shape, generator=generator, dtype=torch.float64)


def purifier(kind, denoiser=None, **options):
    """A purifier by name, on `Waves` unless a denoiser is given."""
    denoiser = denoiser or Waves()
    return {
        "plain": lambda: LikelihoodMaximisation(
            denoiser, rule=plain_direction, rate=0.5, **options
        ),
        "released": lambda: LikelihoodMaximisation.released(denoiser, **options),
        "paper": lambda: LikelihoodMaximisation.paper(denoiser, **options),
        "SDE": lambda: Purification(denoiser, steps=4, **options),
        "ODE": lambda: Purification(denoiser, steps=4, stochastic=False, **options),
    }[kind]()


# ---------------------------------------------------------------------------------------------------------------------
# Likelihood maximisation


def contracted(model, z, *noise):
    """What the library does."""
    return model.purify(z, *noise)


def check_contraction(purify=contracted):
    """On N(mu, s^2 I) without noise, n steps contract to mu by (1 - 2 (rate/D) sigma^4 / (s^2 + sigma^2)^2)^n."""
    z = 2 * pixels() - 1
    sigma = 0.5
    rate = 0.7
    steps = 4
    model = LikelihoodMaximisation(
        gaussian(), steps=steps, rate=rate * 4, rule=plain_direction, band=(sigma, sigma)
    )
    levels = torch.full((steps, 1), sigma)
    silence = torch.zeros(steps, 1, *SHAPE, dtype=torch.float64)
    factor = 1 - 2 * rate * sigma**4 / (SPREAD**2 + sigma**2) ** 2
    wanted = MEAN + factor**steps * (z - MEAN)
    assert torch.allclose(purify(model, z, levels, silence), wanted, rtol=1e-6) and factor < 0.5


def test_likelihood_maximisation_contracts_a_gaussian():
    check_contraction()


def test_a_walk_shows_every_step_and_ends_where_the_purifier_does():
    for kind in ("plain", "released", "paper"):
        model = purifier(kind)
        z = 2 * pixels(2) - 1
        film = list(model.walk(z, *model.noise(z)))
        assert len(film) == model.steps and torch.equal(film[-1], model.purify(z, *model.noise(z)))
        shorter = list(model.walk(z, *(part[:2] for part in model.noise(z))))
        assert torch.equal(shorter[1], film[1]) and not torch.equal(film[0], film[1])
        if model.budget is not None:
            assert all(float((u - z).abs().max()) <= 2 * model.budget + 1e-12 for u in film)


def test_averaged_over_the_noise_the_step_is_the_same():
    """E over eps of one step's gradient is 2/D (sigma^2 / (s^2 + sigma^2))^2 (z - mu): noise adds no bias."""
    model = LikelihoodMaximisation(gaussian())
    sigma = 0.5
    draws = 40_000
    z = (2 * pixels(1) - 1).expand(draws, -1, -1, -1)
    eps = torch.randn(z.shape, generator=torch.Generator().manual_seed(0), dtype=z.dtype)
    slopes = model.slope(z, torch.tensor([sigma], dtype=z.dtype), eps)
    wanted = 2 / 4 * (sigma**2 / (SPREAD**2 + sigma**2)) ** 2 * (z[0] - MEAN)
    error = slopes.std(0) / draws**0.5
    assert (
        bool(((slopes.mean(0) - wanted).abs() < 4 * error).all())
        and float(error.max()) < 0.1 * wanted.abs().max()
    )


def check_adam(direction=adam_direction):
    """Step for step what torch.optim.Adam does with the same gradients."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64) for _ in range(6)]
    theirs = torch.zeros(2, *SHAPE, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([theirs], lr=0.1)
    ours = torch.zeros(2, *SHAPE, dtype=torch.float64)
    for count in range(1, 7):
        theirs.grad = gradients[count - 1].clone()
        optimiser.step()
        ours = ours - 0.1 * direction(gradients[:count])
        assert torch.allclose(ours, theirs.detach(), rtol=1e-9), count


def test_adam_is_adam():
    check_adam()


def test_the_two_variants_differ_in_how_far_they_may_move():
    denoiser = gaussian(spread=0.01)
    x = 0.9 * torch.ones(1, *SHAPE, dtype=torch.float64)
    paper = LikelihoodMaximisation.paper(denoiser)
    assert abs(float((paper(x) - x).abs().max()) - 8 / 255) < 1e-9, (
        "the budget is reached, and not passed"
    )
    released = LikelihoodMaximisation.released(denoiser)
    assert (released.steps, released.rate, released.budget, released.band) == (
        5,
        0.1,
        None,
        (0.4, 0.6),
    )
    assert 0.2 < float((x - released(x)).max()) < 0.26, (
        "five steps of 0.1 in model space are 0.25 in pixels"
    )
    assert (
        float(released(torch.ones(1, *SHAPE)).max()) <= 1
        and float(released(torch.zeros(1, *SHAPE)).min()) >= 0
    )


def test_it_raises_the_likelihood():
    law = data.mixtures()
    denoiser = MixtureDenoiser.of_law(law)
    x, _ = law.sample(50, torch.Generator().manual_seed(0), torch.float64)
    x = (
        x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    ).clamp(0, 1)
    model = LikelihoodMaximisation(
        denoiser, rule=plain_direction, rate=0.2, steps=20, band=(0.15, 0.25)
    )

    def evidence(images):
        return denoiser.log_density(2 * images - 1, 0.15, [3]).mean()

    assert float(evidence(model(x))) > float(evidence(x)) + 0.1


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


def check_exact_gradient(gradient_of=None):
    """The gradient through every step is that of central differences, to 1e-6 relative; eight random directions."""
    generator = torch.Generator().manual_seed(0)
    x = pixels(2)
    out = torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64)
    for kind in KINDS:
        model = purifier(kind)
        leaf = x.clone().requires_grad_()
        exact = (gradient_of or plain_gradient)(model, leaf, out)
        for _ in range(8):
            v = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            h = 1e-6
            difference = ((model(x + h * v) - model(x - h * v)) * out).sum() / (2 * h)
            error = abs(float((exact * v).sum() - difference))
            assert error < 1e-6 * float(exact.norm() * v.norm()), (kind, error)


def plain_gradient(model, leaf, out):
    """By autograd, through the library's forward."""
    return torch.autograd.grad((model(leaf) * out).sum(), leaf)[0]


def test_the_exact_gradient_is_exact():
    check_exact_gradient()


@pytest.mark.parametrize("kind", KINDS)
def test_backward_through_the_identity_changes_the_gradient_alone(kind):
    exact = purifier(kind)
    x = pixels(3)
    straight = exact.with_gradient(False)
    out = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    leaf = x.clone().requires_grad_()
    assert torch.equal(exact(leaf), straight(leaf)) and torch.equal(exact(x), exact(leaf))
    assert torch.equal(plain_gradient(straight, leaf, out), out)
    assert not torch.allclose(plain_gradient(exact, leaf, out), out, atol=0.1) and exact.exact


@pytest.mark.parametrize("kind", KINDS)
def test_recomputing_changes_no_gradient(kind, monkeypatch):

    leaf = pixels(2).requires_grad_()
    out = torch.ones(2, *SHAPE, dtype=torch.float64)
    recomputed = plain_gradient(purifier(kind), leaf, out)
    monkeypatch.setattr(purified, "_recomputed", lambda function, *arguments: function(*arguments))
    assert torch.allclose(recomputed, plain_gradient(purifier(kind), leaf, out), rtol=1e-12)


@pytest.mark.parametrize("rate, cosine", [(0.1, 0.947), (0.4, 0.721)])
def test_five_steps_turn_the_gradient_away_from_the_identity(rate, cosine):
    """On N(0, diag(0.05, 1)) the Jacobian is prod (1 - 2 rate sigma^4/(s^2 + sigma^2)^2): BPDA misses what it turns."""
    variances = torch.tensor([0.05, 1.0], dtype=torch.float64).reshape(2, 1, 1)
    sigma = 0.5
    denoiser = Gaussian(variances)
    model = LikelihoodMaximisation(
        denoiser, rule=plain_direction, rate=2 * rate, band=(sigma, sigma)
    )
    factors = (1 - 2 * rate * (sigma**2 / (variances + sigma**2)) ** 2) ** 5
    leaf = pixels(1, (2, 1, 1)).requires_grad_()
    out = torch.ones(1, 2, 1, 1, dtype=torch.float64)
    exact = plain_gradient(model, leaf, out)
    straight = plain_gradient(model.with_gradient(False), leaf, out)
    assert torch.allclose(exact[0], factors, rtol=1e-6)
    assert (
        abs(float(torch.cosine_similarity(exact.flatten(), straight.flatten(), 0)) - cosine) < 5e-4
    )


def test_a_vanished_gradient_is_not_infinite():
    """Where the loss is flat Adam divides 0 by 0 and a root by itself: the gradient stays finite."""
    flat = Gaussian(
        torch.full(SHAPE, 1e30, dtype=torch.float64)
    )  # keeps every image as it is: D(x) = x
    model = LikelihoodMaximisation(flat, band=(0.5, 0.5))
    leaf = pixels(1).requires_grad_()
    assert torch.allclose(model(leaf), leaf)
    assert bool(torch.isfinite(plain_gradient(model, leaf, torch.ones_like(leaf))).all())


# ---------------------------------------------------------------------------------------------------------------------
# Noising and walking back


def walked(model, z, eps):
    """What the library does."""
    return model.purify(z, eps)


def check_walk(purify=walked):
    """From N(mu, s^2 I) and level sigma the ODE scales x - mu by s / sqrt(s^2 + sigma^2), the SDE samples p(x0 | x)."""
    sigma = 0.5
    count = 4000
    total = SPREAD**2 + sigma**2
    z = (2 * pixels(1) - 1).expand(count, -1, -1, -1)
    generator = torch.Generator().manual_seed(0)
    for stochastic, shrink, extra in (
        (False, SPREAD / total**0.5, 0.0),
        (True, SPREAD**2 / total, SPREAD * sigma / total**0.5),
    ):
        model = Purification(gaussian(), sigma, steps=60, stochastic=stochastic, low=0.002)
        eps = model.draw(count, generator)[0].double()
        out = purify(model, z, eps)
        rest = out - MEAN - shrink * (z + sigma * eps[0] - MEAN)
        assert abs(float(rest.mean())) < 0.01, stochastic
        assert abs(float(rest.std()) - extra) < 0.02, (stochastic, float(rest.std()), extra)


def test_the_walk_back_ends_where_it_must():
    check_walk()


def test_one_fixed_noise_or_fresh_noise():
    x = pixels(2)[:1].repeat(2, 1, 1, 1)
    for kind in KINDS:
        fixed = purifier(kind)
        assert (
            fixed.deterministic
            and torch.equal(fixed(x), fixed(x))
            and torch.equal(fixed(x)[0], fixed(x)[1])
        )
        assert not torch.equal(fixed(x), purifier(kind, seed=1)(x))
        random = fixed.with_fresh_noise(torch.Generator().manual_seed(0))
        first = random(x)
        second = random(x)
        assert (
            not random.deterministic
            and not torch.equal(first, second)
            and not torch.equal(first[0], first[1])
        )
        again = fixed.with_fresh_noise(torch.Generator().manual_seed(0))
        assert torch.equal(again(x), first) and fixed.deterministic


# ---------------------------------------------------------------------------------------------------------------------
# In front of a classifier


def plane(kind="SDE", **options):
    """A purifier in front of the exact classifier of three Gaussian classes."""
    denoiser = MixtureDenoiser.of_law(data.gaussians())
    return Defended(purifier(kind, denoiser, **options), ExactClassifier(denoiser))


def test_what_predicts_is_what_is_attacked():
    """The same logits with and without gradients, in train and eval, alone and in a batch."""
    x, _ = data.gaussians().sample(6, torch.Generator().manual_seed(0), torch.float64)
    for kind in KINDS:
        model = plane(kind)
        with torch.no_grad():
            silent = model(x)
        assert torch.equal(silent, model(x.clone().requires_grad_()).detach())
        assert torch.equal(silent, model.eval()(x)) and torch.allclose(
            silent[2:3], model(x[2:3]), rtol=1e-9
        )
        with torch.inference_mode():
            assert torch.equal(silent, model(1 * x))
        assert (model.num_classes, model.image_shape, model.deterministic) == (3, (2, 1, 1), True)


def test_fresh_noise_reaches_both_parts():
    denoiser = MixtureDenoiser.of_law(data.gaussians())
    x, _ = data.gaussians().sample(3, torch.Generator().manual_seed(0), torch.float64)
    bank = NoiseBank.fixed(noise.log_levels(0.05, 5, 8), (2, 1, 1), 2, dtype=torch.float64)
    fixed = Defended(purifier("SDE", denoiser), BayesClassifier(denoiser, bank))
    random = fixed.with_fresh_noise(torch.Generator().manual_seed(0))
    assert fixed.deterministic and not random.deterministic
    assert not random.purifier.deterministic and not random.classifier.deterministic
    assert not torch.equal(random(x), random(x)) and torch.equal(fixed(x), fixed(x))
    assert not Defended(fixed.purifier, random.classifier).deterministic
    assert (
        not random.with_gradient(False).deterministic
        and not random.with_gradient(False).purifier.exact
    )


def test_an_attack_goes_through_the_purifier():
    """With the exact gradient PGD lowers the margin at least as far as through the identity, on average."""
    law = data.gaussians()
    x, y = law.sample(40, torch.Generator().manual_seed(0), torch.float64)
    model = plane("ODE")
    reached = {}
    for exact in (True, False):
        *_, last = attacks.pgd(model.with_gradient(exact), x, y, 0.08, norm="l2", steps=10)
        reached[exact] = float(attacks.margin_loss(model(last.x), y).mean())
    assert (
        reached[True] > float(attacks.margin_loss(model(x), y).mean()) + 1
        and reached[True] > reached[False] - 1e-9
    )


@pytest.mark.parametrize("kind", KINDS)
def test_attack_libraries_go_through_the_purifier_too(kind):
    """torchattacks on the view of a defence walks as our PGD does, to rounding: its gradients are the same."""
    import torchattacks

    class Tilted(torch.nn.Module):
        num_classes = 2
        image_shape = SHAPE
        deterministic = True

        def forward(self, x):
            """Two classes, split by the second row against the first."""
            return torch.stack([x[:, 0, 0].sum(1), x[:, 0, 1].sum(1)], 1)

    x = pixels(4)
    model = Defended(purifier(kind), Tilted())
    y = model(x).argmax(1)
    view = attacks.AttackView.calibrated(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torchattacks.PGD(view, eps=0.05, alpha=0.01, steps=4, random_start=False)(x, y)
    *_, last = attacks.pgd(
        view, x, y, 0.05, steps=4, step_size=0.01, loss=attacks.cross_entropy_loss
    )
    assert torch.allclose(theirs.to(x), last.x, atol=1e-6) and float(last.size.min()) > 0.02


class Coin(torch.nn.Module):
    """Says class 1 with probability `share`, else class 0."""

    num_classes = 2
    image_shape = SHAPE
    deterministic = False

    def __init__(self, share):
        super().__init__()
        self.share = share
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x):
        """Logits of one throw for each image."""
        heads = torch.rand(len(x), generator=self.generator) < self.share
        return torch.stack([~heads, heads], 1).to(x)


def check_votes(vote=MajorityVote):
    """Of 101 throws of a 0.6 coin class 1 wins as often as the binomial law says, 0.979; rows sum to the votes."""
    from scipy import stats

    counts = vote(Coin(0.6), 101)(pixels(1).expand(1000, -1, -1, -1))
    wins = float((counts.argmax(1) == 1).double().mean())
    wanted = float(stats.binom.sf(50, 101, 0.6))
    assert abs(wins - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / 1000)
    assert bool((counts.sum(1) == 101).all()) and abs(float(counts[:, 1].mean()) / 101 - 0.6) < 0.01


def test_majority_votes():
    check_votes()


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    "make, error, sentence",
    [
        (
            lambda: LikelihoodMaximisation(gaussian(), steps=0),
            ValueError,
            "expected steps >= 1, rate > 0",
        ),
        (
            lambda: LikelihoodMaximisation(gaussian(), band=(0.6, 0.4)),
            ValueError,
            "expected .* and 0 < low <= high",
        ),
        (lambda: LikelihoodMaximisation.paper(gaussian(), 8), ValueError, "did you mean 8/255"),
        (
            lambda: Purification(gaussian(), 0.0),
            ValueError,
            "expected a finite noise level sigma > 0",
        ),
        (
            lambda: Purification(gaussian(), 0.01),
            ValueError,
            "expected at least 2 steps between levels",
        ),
        (
            lambda: MajorityVote(ExactClassifier(gaussian()), 5),
            ValueError,
            "pass classifier.with_fresh_noise",
        ),
        (lambda: MajorityVote(Coin(0.5), 0), ValueError, "expected at least one vote, got 0"),
        (lambda: purifier("SDE")(2 * pixels() - 1), ValueError, "pass units.to_pixel"),
        (lambda: purifier("SDE")(255 * pixels()), ValueError, "divide by 255"),
        (lambda: purifier("SDE")(pixels(1) * math.nan), ValueError, "expected finite images"),
        (
            lambda: Defended(
                purifier("SDE"), ExactClassifier(MixtureDenoiser.of_law(data.gaussians()))
            ),
            ValueError,
            "expected a purifier and a classifier of the same images",
        ),
    ],
)
def test_what_cannot_be_meant_gets_a_sentence(make, error, sentence):
    with pytest.raises(error, match=sentence):
        make()


def test_a_denoiser_without_a_null_class_cannot_purify():
    denoiser = gaussian()
    denoiser.has_null = False
    with pytest.raises(ValueError, match="trained without a null class"):
        Purification(denoiser)


def test_votes_have_no_gradient_and_nan_cannot_vote():
    x = pixels(2)
    with pytest.raises(TypeError, match="counts votes"):
        list(attacks.pgd(MajorityVote(Coin(0.5), 9), x, torch.zeros(2, dtype=torch.long), 0.1))
    broken = Coin(0.5)
    broken.forward = lambda x: torch.full((len(x), 2), math.nan)
    with pytest.raises(FloatingPointError, match="became NaN and cannot vote"):
        MajorityVote(broken, 3)(x)
