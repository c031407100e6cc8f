"""Training for randomised smoothing: each loss is what its paper says, and the trained networks' votes agree."""

import math

import pytest
import test_cnn
import torch
from diffclass import attacks, data
from diffclass.certify import certificates, counting
from diffclass.classifiers import cnn
from diffclass.classifiers.base import Classifier
from diffclass.classifiers.smoothed import Smoothed
from diffclass.data.worlds import images_of
from diffclass.storage import assets, weights
from diffclass.training import recipes, smoothing
from diffclass.training.recipes import RECIPES
from diffclass.training.train import train, training_of
from diffclass.zoo import networks
from test_cli_train import one_sentence, run
from torch import nn
from twins import patched, rejected

SIGMA = 0.3
DIGITS = [networks.smoothing_file("digits", m, s) for m in networks.SMOOTHING for s in (0.25, 0.5)]


def asked(seed: int = 0):
    """A small network that takes noised pictures; six pictures and labels."""
    classifier = test_cnn.tiny(seed)
    classifier.sigma_pixel = SIGMA
    return classifier, *test_cnn.some()


def shares_of(classifier, x, eps, beta=1.0):
    """softmax(beta f(x + sigma eps_i)) in plain loops: [B][M] lists of K numbers, float64."""
    found = []
    for image, draws in zip(x, eps, strict=True):
        rows = []
        for draw in draws:
            logits = beta * classifier((image + SIGMA * draw)[None])[0].detach().double()
            height = [math.exp(v - float(logits.max())) for v in logits.tolist()]
            rows.append([v / sum(height) for v in height])
        found.append(rows)
    return found


def mean(rows):
    return [sum(column) / len(column) for column in zip(*rows, strict=True)]


def drawn(x, copies, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((len(x), copies, *x.shape[1:]), generator=generator)


def value_of(loss, classifier, x, y, seed=5) -> float:
    return float(loss(classifier, x, y, torch.Generator().manual_seed(seed)).detach())


# -- the four losses --------------------------------------------------------------------------------------------------


@rejected(
    {
        "twice the noise": dict(make=lambda sigma: smoothing.gaussian_loss(2 * sigma)),
        "clamped": dict(
            make=lambda sigma: patched(
                smoothing.gaussian_loss(sigma),
                smoothing,
                log_shares=lambda f, x, eps, s: f((x + s * eps[:, 0]).clamp(0, 1)).log_softmax(1)[
                    :, None
                ],
            )
        ),
    }
)
def test_cohen_is_cross_entropy_on_a_noised_copy(make=smoothing.gaussian_loss):
    classifier, x, y = asked()
    shares = shares_of(classifier, x, drawn(x, 1))
    wanted = sum(-math.log(rows[0][k]) for rows, k in zip(shares, y.tolist(), strict=True)) / len(x)
    assert value_of(make(SIGMA), classifier, x, y) == pytest.approx(wanted, rel=1e-5)


HINGE = smoothing.radius_hinge


def mean_of_logarithms(each):
    """In place of the logarithm of the mean."""
    return each.mean(1)


@rejected(
    {
        "the mean of logarithms": dict(
            make=lambda *a, **k: patched(
                smoothing.macer_loss(*a, **k), smoothing, log_mean=mean_of_logarithms
            )
        ),
        "the sum of the radii's lacks": dict(
            make=lambda *a, weight, **k: smoothing.macer_loss(*a, weight=6 * weight, **k)
        ),
        "without the sharpness": dict(
            make=lambda *a, beta, **k: smoothing.macer_loss(*a, beta=1.0, **k)
        ),
        "of wrong answers too": dict(
            make=lambda *a, **k: patched(
                smoothing.macer_loss(*a, **k),
                smoothing,
                radius_hinge=lambda z, y, s, g: HINGE(z, z.argmax(1), s, g),
            )
        ),
    }
)
def test_macer_is_cross_entropy_of_the_mean_and_what_the_radii_lack(make=smoothing.macer_loss):
    """By loops, with the normal quantile of Python's statistics."""
    from statistics import NormalDist

    classifier, x, _ = asked()
    with torch.no_grad():
        y = classifier(x).argmax(1)
    y[:2] = (y[:2] + 1) % 10  # some right, some wrong
    eps = drawn(x, 4)
    total = 0.0
    counted = 0
    for rows, sharp, k in zip(
        shares_of(classifier, x, eps), shares_of(classifier, x, eps, beta=4.0), y, strict=True
    ):
        total -= math.log(mean(rows)[int(k)])
        first, second = sorted(mean(sharp), reverse=True)[:2]
        if mean(sharp).index(first) == int(k):
            apart = NormalDist().inv_cdf(first) - NormalDist().inv_cdf(second)
            total += 3.0 * SIGMA / 2 * max(0.0, 6.0 - apart)
            counted += 1
    assert 0 < counted < len(x)
    loss = make(SIGMA, copies=4, weight=3.0, gamma=6.0, beta=4.0)
    assert value_of(loss, classifier, x, y) == pytest.approx(total / len(x), rel=1e-4)


@rejected(
    {
        "divergence the other way": dict(slip=lambda F, each: (each.exp() * (each - F)).sum(2)),
        "entropy alone": dict(slip=lambda F, each: each[:, :, 0] * 0),
        "the sum over copies": dict(slip=lambda F, each: 2 * (F.exp() * (F - each)).sum(2)),
    }
)
def test_consistency_is_cross_entropy_divergence_and_entropy(slip=None):
    classifier, x, y = asked()
    shares = shares_of(classifier, x, drawn(x, 3))
    total = 0.0
    for rows, k in zip(shares, y.tolist(), strict=True):
        whole = mean(rows)
        total += sum(-math.log(row[k]) for row in rows) / 3
        apart = [
            sum(p * (math.log(p) - math.log(q)) for p, q in zip(whole, row, strict=True))
            for row in rows
        ]
        if slip:
            each = torch.tensor(rows).log()[None]
            apart = slip(torch.tensor(whole).log()[None, None], each)[0].tolist()
        total += 10 * sum(apart) / 3 - 0.5 * sum(p * math.log(p) for p in whole)
    loss = smoothing.consistency_loss(SIGMA, copies=3, agreement=10.0, entropy=0.5)
    assert value_of(loss, classifier, x, y) == pytest.approx(total / len(x), rel=1e-4)


class Linear(Classifier):
    """Two classes, f_1 - f_0 = w . x: the steepest way is known."""

    num_classes = 2
    image_shape = (1, 2, 2)
    sigma_pixel = SIGMA
    calls = 1

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5, -0.1]))

    def logits(self, x, noise):
        height = x.flatten(1) @ self.w
        return torch.stack([-height / 2, height / 2], 1)


def test_the_worst_case_of_a_linear_model_is_the_end_of_the_steepest_way(generator):
    """Where no pixel's range is in the way it is x + epsilon w / |w| of class 0, whatever the noise."""
    x = 0.4 + 0.2 * torch.rand(20, 1, 2, 2, generator=generator)
    y = torch.zeros(20, dtype=torch.long)
    eps = torch.randn(20, 3, 1, 2, 2, generator=generator)
    linear = Linear()
    got = smoothing.smoothed_worst_case(linear, x, y, eps, SIGMA, 0.2, 2)
    way = (0.2 * linear.w / linear.w.norm()).detach().view(1, 1, 2, 2)
    assert torch.allclose(got, x + way, atol=1e-5) and linear.w.grad is None
    far = smoothing.smoothed_worst_case(linear, x, y, eps, SIGMA, 1.5, 3)
    assert 0 <= float(far.min()) and float(far.max()) <= 1
    assert float((far - x).flatten(1).norm(dim=1).max()) <= 1.5 + 1e-5


@rejected(
    {
        "the base classifier": dict(
            find=lambda f, x, y, eps, *rest: smoothing.smoothed_worst_case(
                f, x, y, torch.zeros_like(eps), *rest
            )
        ),
        "the mean of logarithms": dict(
            find=patched(smoothing.smoothed_worst_case, smoothing, log_mean=mean_of_logarithms)
        ),
        "downhill": dict(
            find=patched(
                smoothing.smoothed_worst_case,
                attacks,
                ascent=lambda g, norm: -g / g.flatten(1).norm(dim=1)[:, None, None, None],
            )
        ),
    }
)
def test_a_step_follows_the_gradient_of_the_mean_probability(find=smoothing.smoothed_worst_case):
    """Against finite differences of -log of the mean probability, in float64."""
    classifier, x, y = asked()
    classifier = classifier.double()
    x = 0.4 + 0.2 * x.double()
    eps = 3 * drawn(x, 2).double()

    def height(at):
        copies = (at[:, None] + SIGMA * eps).flatten(0, 1)
        shares = classifier(copies).softmax(1).view(len(at), 2, -1)
        return -shares.mean(1)[torch.arange(len(at)), y].log()

    moved = find(classifier, x, y, eps, SIGMA, 1e-3, 1)
    # one step of twice the budget, brought back into it
    assert torch.allclose((moved - x).flatten(1).norm(dim=1), torch.full((6,), 1e-3).double())
    slope = torch.zeros_like(x)
    with torch.no_grad():
        for i in range(64):
            push = torch.zeros(64, dtype=x.dtype)
            push[i] = 1e-6
            push = push.view(1, 1, 8, 8)
            slope.flatten(1)[:, i] = (height(x + push) - height(x - push)) / 2e-6
    cosine = nn.functional.cosine_similarity((moved - x).flatten(1), slope.flatten(1))
    assert float(cosine.min()) > 1 - 1e-6


@rejected(
    {
        "other noise for the judge": dict(seed=6),
        "trained on clean pictures": dict(find=lambda f, x, *rest: x),
    }
)
def test_smoothadv_trains_on_the_worst_case_under_the_same_noise(
    seed=5, find=smoothing.smoothed_worst_case
):
    classifier, x, y = asked()
    worst = find(classifier, x, y, drawn(x, 2, seed), SIGMA, 0.5 * SIGMA, 2)
    shares = shares_of(classifier, worst, drawn(x, 2, seed))
    total = sum(
        -math.log(row[k]) for rows, k in zip(shares, y.tolist(), strict=True) for row in rows
    ) / (2 * len(x))
    loss = smoothing.smoothadv_loss(SIGMA, copies=2, steps=2, reach=0.5)
    assert value_of(loss, classifier, x, y) == pytest.approx(total, rel=1e-5)


def test_the_hinge_is_finite_with_its_gradient_at_certain_shares():
    """At 0 and 1 the quantile is infinite, and so would be its slope."""
    shares = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.7, 0.1]], requires_grad=True)
    labels = torch.tensor([0, 0, 0])
    missing = smoothing.radius_hinge(shares, labels, 0.5, 8.0)
    assert missing.tolist() == pytest.approx([0, 0.25 * 8, 0])
    missing.sum().backward()
    assert bool(torch.isfinite(shares.grad).all())


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: smoothing.gaussian_loss(0.0), "sigma_pixel > 0"),
        (lambda: smoothing.macer_loss(12.0), r"at most 1, got 12; did you mean 12/255"),
        (lambda: smoothing.smoothadv_loss("much"), "sigma_pixel"),
        (lambda: smoothing.consistency_loss(0.25, copies=0), "copies as a whole number of at"),
    ],
)
def test_what_cannot_be_meant_gets_a_sentence(make, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence):
        make()


# -- recipes and the command ------------------------------------------------------------------------------------------


def test_every_method_and_sigma_has_a_recipe_that_carries_its_noise():
    for world in networks.MODELS:
        for method in networks.SMOOTHING:
            assert recipes.sigmas_of(world, method) == networks.SMOOTHING_SIGMAS
            for sigma in networks.SMOOTHING_SIGMAS:
                (name,) = recipes.files_of(world, method, sigma)
                assert name == f"{world}-{method}-{sigma:g}.safetensors"
                assert RECIPES[name].command.endswith(f"--method {method} --sigma {sigma:g}")
                assert RECIPES[name].says["recipe"]["sigma_pixel"] == sigma
    run = training_of(RECIPES["digits-cohen-0.5.safetensors"], seed=0)
    assert run.denoiser.sigma_pixel == run.average.sigma_pixel == 0.5


@pytest.mark.parametrize("method", networks.SMOOTHING)
def test_a_short_run_learns_and_states_its_accuracy_under_noise(method, tmp_path):
    name = networks.smoothing_file("digits", method, 0.25)
    frames = list(train(name, tmp_path, steps=60, batch=32, widths=(8, 16), measured=100))
    assert sum(f.loss for f in frames[-10:]) < 0.9 * sum(f.loss for f in frames[:10])
    classifier, card = cnn.load(tmp_path / name)
    once = card["accuracy"]
    votes = card["accuracy_of_votes"]
    assert once["sigma_pixel"] == card["recipe"]["sigma_pixel"] == 0.25
    assert once["n"] == votes["n"] == 100 and votes["votes"] == 100
    assert once["low"] < once["correct"] / 100 < once["high"] and len(card["curve"]) == 20
    eps = torch.randn((100, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    images, labels = images_of("digits", "test")
    classifier.sigma_pixel = 0.25
    with torch.no_grad():
        right = classifier(images[:100] + 0.25 * eps).argmax(1) == labels[:100]
    assert int(right.sum()) == once["correct"]


def test_the_command_asks_for_the_sigma_that_a_method_needs(tmp_path):
    done = run(
        "train",
        "digits",
        "--method",
        "cohen",
        "--sigma",
        0.5,
        *("--steps", 2, "--widths", "8,16", "--batch", 16, "--measured", 4, "--out", tmp_path),
    )
    assert done.exit_code == 0 and "under noise of sigma 0.5" in done.stdout, done.stderr
    assert weights.card(tmp_path / "digits-cohen-0.5.safetensors")["command"].endswith("0.5")
    for options, words in (
        (("cohen",), ("--sigma", "0.125, 0.25, 0.5, 1", "got none")),
        (("macer", "--sigma", 0.3), ("0.125, 0.25, 0.5, 1", "got 0.3")),
        (("cnn", "--sigma", 0.25), ("--method cnn as none", "got 0.25")),
    ):
        done = run("train", "digits", "--method", *options)
        assert done.exit_code == 2 and one_sentence(done, *words), done.stderr


# -- the trained networks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIGITS)
def test_the_votes_of_a_trained_network_agree(name):
    """Certified within an L2 ball of half its noise on more of the first 20 digits than any class holds."""
    classifier, card = cnn.load(assets.verified(name))
    sigma = card["recipe"]["sigma_pixel"]
    classifier.sigma_pixel = sigma
    smoothed = Smoothed(classifier)
    world = data.digits()
    held = 0
    for i in range(20):
        *_, (_, votes) = counting.draw_votes(
            smoothed, world.test_images[i : i + 1], estimation=300, picture=i
        )
        found = certificates.smoothing_radius(votes)
        held += found.prediction == int(world.test_labels[i]) and found.radius >= sigma / 2
    assert held >= 12, held
    assert card["accuracy"]["n"] == card["accuracy_of_votes"]["n"] == 400
    assert card["accuracy_of_votes"]["correct"] >= card["accuracy"]["correct"]
