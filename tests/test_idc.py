"""IDC: labels, bridge and inter-class offsets against closed forms, each formula beside twins that must fail; the classifier."""

import itertools
import json
import math

import pytest
import torch
from diffclass import attacks, data, units
from diffclass.classifiers import bridges, idc
from diffclass.classifiers.base import Fresh, Held
from diffclass.classifiers.bridges import Bridge
from diffclass.classifiers.idc import TranslationClassifier
from diffclass.evaluation import accuracies
from diffclass.storage import assets
from diffclass.zoo import networks

SHAPE = (1, 8, 8)
CIFAR = (3, 32, 32)
FAMILIES = pytest.mark.parametrize("family", bridges.LABELS)
F64 = torch.float64


def off_diagonal(matrix):
    return matrix[~torch.eye(len(matrix), dtype=torch.bool)]


def draw(seed: int, *shape: int):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def tiny(family: str = "Hadamard", positions: int = 4, seed: int = 0, **config):
    """A translator of three classes that trains in milliseconds."""
    labels = bridges.LABELS[family](3, SHAPE)
    return idc.build(
        "DigitNet", labels, Bridge(positions), seed, **{"width": 16, "blocks": 1, **config}
    )


def alive(positions: int = 4, **config):
    """A translator whose last layer is not zero, so that noise and pictures move its output."""
    translator = tiny(positions=positions, **config)
    weight = translator.network.leave[-1].weight
    torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(1))
    return translator.eval().requires_grad_(False)


PICTURES = data.digits().test_images[:6]

# -- labels -----------------------------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("shape", [SHAPE, CIFAR])
def test_labels_are_distinct_pictures_that_use_their_range(family, shape):
    labels = bridges.LABELS[family](10, shape)
    assert labels.shape == (10, *shape) and labels.dtype == torch.float32
    bridges.check_apart(labels)
    extremes = units.to_model(labels).abs().amax()
    assert float(extremes) == pytest.approx(1, abs=1e-6)
    assert torch.equal(labels, bridges.LABELS[family](10, shape)), (
        "the same seed gives the same labels"
    )
    assert not torch.equal(labels, bridges.LABELS[family](10, shape, seed=1))


def check_centred(labels):
    """Mean zero in model space, and cosines that are those of the identity."""
    model = units.to_model(labels.double())
    assert float(model.flatten(1).mean(1).abs().max()) < 1e-6
    assert float((bridges.cosines(model) - torch.eye(len(labels), dtype=F64)).abs().max()) < 1e-6


@pytest.mark.parametrize("family", ["orthogonal", "Hadamard"])
@pytest.mark.parametrize("shape", [SHAPE, CIFAR])
def test_centred_labels_are_orthogonal_where_the_network_works(family, shape):
    check_centred(bridges.LABELS[family](10, shape))


def test_in_pixels_orthogonal_labels_share_the_grey_of_the_background():
    """P = (p + 1)/2 with mean-zero p of length r: cosine 1 / sqrt((1 + r_j^2/D)(1 + r_k^2/D)); one half for +-1."""
    assert off_diagonal(
        bridges.cosines(bridges.hadamard_labels(10, SHAPE))
    ).numpy() == pytest.approx(0.5, abs=1e-9)
    labels = bridges.orthogonal_labels(10, SHAPE).double()
    power = 1 + (units.to_model(labels) ** 2).flatten(1).mean(1)
    wanted = 1 / (power[:, None] * power).sqrt()
    assert torch.allclose(off_diagonal(bridges.cosines(labels)), off_diagonal(wanted), atol=1e-6)


def test_released_labels_have_the_cosines_that_the_released_code_has():
    """QR alone is orthogonal; after min-max 0.906 to 0.939 in pixels, within 0.12 of zero in model space (K = 10)."""
    rows = bridges._orthonormal(10, CIFAR, 0, centred=False)
    assert float((rows @ rows.T - torch.eye(10, dtype=F64)).abs().max()) < 1e-12
    labels = bridges.released_labels(10, CIFAR)
    assert (
        float(labels.flatten(1).amin(1).max()) == 0 and float(labels.flatten(1).amax(1).min()) == 1
    )
    pixel, model = (off_diagonal(bridges.cosines(v)) for v in (labels, units.to_model(labels)))
    assert 0.90 < float(pixel.min()) < 0.91 and 0.935 < float(pixel.max()) < 0.945
    assert 0.11 < float(model.abs().max()) < 0.125
    with pytest.raises(AssertionError):
        check_centred(labels)


@pytest.mark.parametrize("shape", [SHAPE, CIFAR])
def test_simplex_labels_are_equally_far_apart(shape):
    model = units.to_model(bridges.simplex_labels(10, shape).double())
    assert off_diagonal(bridges.cosines(model)).numpy() == pytest.approx(-1 / 9, abs=1e-6)
    assert float(model.sum(0).abs().max()) < 1e-5


def test_distances_are_mean_absolute_differences():
    labels = bridges.hadamard_labels(3, SHAPE)
    by_hand = [[float((a - b).abs().sum()) / 64 for b in labels] for a in PICTURES]
    assert torch.allclose(bridges.distances(PICTURES, labels), torch.tensor(by_hand), atol=1e-6)
    assert (
        off_diagonal(bridges.distances(labels, labels)).tolist() == [0.5] * 6
    )  # half of the pixels differ


# -- bridge -----------------------------------------------------------------------------------------------------------


def check_posterior(bridge):
    """q(x_n | x_t, x0, y) by conditioning the joint Gaussian of the Brownian bridge, whose covariance is known.

    Source      Cov(B_u, B_v) = u (1 - v) for u <= v, times 2 scale; mean linear between the ends
    """
    x0, y, x_t = (draw(seed, 2, 1, 3, 3) for seed in (0, 1, 2))
    for t, n in itertools.combinations(range(bridge.steps - 1, -1, -1), 2):
        m_t = float(bridge.shares[t])
        m_n = float(bridge.shares[n])
        across = m_n * (1 - m_t)
        joint = (
            2
            * bridge.scale
            * torch.tensor([[m_n * (1 - m_n), across], [across, m_t * (1 - m_t)]], dtype=F64)
        )
        mean_n, mean_t = ((1 - m) * x0 + m * y for m in (m_n, m_t))
        gain = joint[0, 1] / joint[1, 1]
        mean, variance = bridge.posterior(x_t, x0, t, n)
        assert torch.allclose(mean, mean_n + gain * (x_t - mean_t), rtol=0, atol=1e-12)
        assert float(variance) == pytest.approx(float(joint[0, 0] - gain * joint[0, 1]), abs=1e-12)


@pytest.mark.parametrize("steps", [2, 3, 4, 8])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_posterior_is_conditioning(steps, scale):
    check_posterior(Bridge(steps, scale))


def test_posterior_is_the_one_that_the_released_code_writes_out():
    """In a, delta and y: the weight of the picture is zero, and the others are those of the shorter formula."""
    bridge = Bridge(4, 0.7)
    like = torch.zeros(1, dtype=F64)
    for t, n in itertools.combinations(range(3, -1, -1), 2):
        m_t = float(bridge.shares[t])
        m_n = float(bridge.shares[n])
        a = (1 - m_t) / (1 - m_n)
        delta_t = 1.4 * m_t * (1 - m_t)
        delta_n = 1.4 * m_n * (1 - m_n)
        between = delta_t - a**2 * delta_n
        kept, variance = bridge.kept(t, n, like)
        assert m_n - m_t * a * delta_n / delta_t == pytest.approx(0, abs=1e-12)
        assert float(kept) == pytest.approx(a * delta_n / delta_t, abs=1e-12)
        assert float(1 - kept) == pytest.approx((1 - m_n) * between / delta_t, abs=1e-12)
        assert float(variance) == pytest.approx(between * delta_n / delta_t, abs=1e-12)


class SharesOfTheWay(Bridge):
    """The state keeps 1 - (m_t - m_n): the step's share of the whole bridge, not of what is left of it."""

    def kept(self, t, n, like):
        return 1 - (self.share(t, like) - self.share(n, like)), super().kept(t, n, like)[1]


class Reversed(Bridge):
    """The label and the state have changed places."""

    def kept(self, t, n, like):
        kept, variance = super().kept(t, n, like)
        return 1 - kept, variance


class ForwardVariance(Bridge):
    """The variance of the forward step where that of the posterior belongs."""

    def kept(self, t, n, like):
        m_t = self.share(t, like)
        m_n = self.share(n, like)
        return m_n / m_t, 2 * self.scale * (1 - m_t) * (m_t - m_n) / (1 - m_n)


@pytest.mark.parametrize("twin", [SharesOfTheWay, Reversed, ForwardVariance])
def test_posterior_twins_are_rejected(twin):
    with pytest.raises(AssertionError):
        check_posterior(twin(4))


def check_forward(bridge):
    """Mean and variance of the state, by 40 000 draws and by the printed numbers of IDC's bridge of four."""
    assert bridge.shares.tolist() == pytest.approx(
        [0.001, 1 / 3 + 1e-3 / 3, 2 / 3 - 1e-3 / 3, 0.999], abs=1e-12
    )
    assert bridge.variance(bridge.shares).sqrt().tolist() == pytest.approx(
        [0.0447, 0.6668, 0.6668, 0.0447], abs=1e-4
    )
    x0 = torch.full((40_000, 1, 1, 1), -0.5)
    y = torch.full((40_000, 1, 1, 1), 0.8)
    eps = draw(3, 40_000, 1, 1, 1)
    for t in range(4):
        m = float(bridge.shares[t])
        x_t = bridge.forward(x0.double(), y.double(), t, eps)
        std = math.sqrt(2 * m * (1 - m))
        assert abs(float(x_t.mean()) - (-0.5 + 1.3 * m)) < 4 * std / 200
        assert float(x_t.std()) == pytest.approx(std, rel=0.015)


def test_forward_has_the_mean_and_the_variance_of_the_bridge():
    check_forward(Bridge(4))
    mixed = Bridge(4).forward(
        draw(0, 4, 1, 2, 2), draw(1, 4, 1, 2, 2), torch.arange(4), draw(2, 4, 1, 2, 2)
    )
    for t in range(4):
        alone = Bridge(4).forward(draw(0, 4, 1, 2, 2), draw(1, 4, 1, 2, 2), t, draw(2, 4, 1, 2, 2))
        assert torch.equal(mixed[t], alone[t])


@pytest.mark.parametrize(
    "twin",
    [
        type(
            "Swapped",
            (Bridge,),
            dict(forward=lambda self, x0, y, t, eps: Bridge.forward(self, y, x0, t, eps)),
        ),
        type("HalfVariance", (Bridge,), dict(variance=lambda self, m: m * (1 - m) * self.scale)),
        type(
            "VarianceForDeviation",
            (Bridge,),
            dict(
                forward=lambda self, x0, y, t, eps: Bridge.forward(
                    self, x0, y, t, eps * self.variance(self.share(t, y)).sqrt()
                )
            ),
        ),
    ],
)
def test_forward_twins_are_rejected(twin):
    with pytest.raises(AssertionError):
        check_forward(twin(4))


def test_weights_of_the_intra_class_bound():
    """c_t, the weight of x0 in the one-step posterior of IDC's bridge: the numbers of its schedule."""
    got = [float(1 - Bridge(4).kept(t, t - 1, torch.zeros(1, dtype=F64))[0]) for t in (1, 2, 3)]
    assert got == pytest.approx([0.997, 0.499, 0.333], abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("t", [0, 1, 2, 3])
def test_a_step_to_where_one_stands_changes_nothing(t, dtype):
    x_t, x0 = (draw(seed, 2, 1, 3, 3).to(dtype) for seed in range(2))
    mean, variance = Bridge(4).posterior(x_t, x0, t, t)
    assert torch.equal(mean, x_t) and float(variance) == 0


def test_a_bridge_of_one_step_starts_at_the_picture():
    assert Bridge(1).shares.tolist() == [0.999] and Bridge(1).shares.dtype == F64


def test_step_lists():
    assert bridges.released_steps(4) == [3, 1, 1, 0] and bridges.every_step(4) == [3, 2, 1, 0]
    assert bridges.released_steps(3) == [2, 1, 0] and bridges.released_steps(8) == [
        7,
        5,
        4,
        3,
        2,
        1,
        1,
        0,
    ]
    for steps in range(3, 40):
        ramp = (
            torch.arange(steps - 1, 1, step=-(steps - 1) / (steps - 2)).long().tolist()
        )  # the released line
        assert bridges.released_steps(steps) == [*ramp, 1, 0]


# -- inter-class offsets ----------------------------------------------------------------------------------------------


def check_offsets(bridge):
    """Proposition 1 as the released code writes it, as a mixed state minus the label, and as a moved end point."""
    labels = draw(0, 3, 1, 2, 2)
    x0 = draw(1, 5, 1, 2, 2)
    y = draw(2, 5, 1, 2, 2)
    eps = draw(3, 5, 1, 2, 2)
    for t in range(bridge.steps):
        m = float(bridge.shares[t])
        before = float(bridge.shares[t - 1]) if t else 0.0
        noise = math.sqrt(2 * bridge.scale * m * (1 - m)) * eps
        got = bridge.offsets(labels, x0, y, t, eps)
        state = (1 - m) * x0 + m * y + noise
        for k, p in enumerate(labels):
            released = before * (p - x0) + m * (y - p) + noise
            mixed = (1 - before) * x0 + before * y + (m - before) * (y - p) + noise
            end = x0 + (m - before) * (p - x0)
            for wanted in (released, mixed - x0, state - end):
                assert torch.allclose(got[:, k], wanted, rtol=0, atol=1e-12)
        several = bridge.offsets(labels, x0, y, torch.full((5,), t), eps)
        assert torch.equal(several, got)


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_inter_class_identity(steps):
    check_offsets(Bridge(steps, 0.7))


class WholeStep(Bridge):
    """The plain posterior of the wrong label: the whole way with its drift, not the last step."""

    def offsets(self, labels, x0, y, t, eps):
        x_t = self.forward(x0, y, t, eps)
        return x_t[:, None] - labels.expand(len(y), *labels.shape)


class LastDrift(Bridge):
    """The true label takes the last step, the wrong one all others."""

    def offsets(self, labels, x0, y, t, eps):
        t = torch.as_tensor(t).expand(len(y))
        m = self.share(t, y)
        before = torch.where((t > 0)[:, None, None, None], self.share((t - 1).clamp(min=0), y), 0)
        common = (m - before) * (y - x0) + self.variance(m).sqrt() * eps
        return common[:, None] + before[:, None] * (y[:, None] - labels)


@pytest.mark.parametrize("twin", [WholeStep, LastDrift])
def test_inter_class_twins_are_rejected(twin):
    with pytest.raises(AssertionError):
        check_offsets(twin(4))


def test_the_offset_of_the_true_label_is_the_way_back():
    bridge = Bridge(4)
    labels = draw(0, 3, 1, 2, 2)
    y = draw(2, 3, 1, 2, 2)
    eps = draw(3, 3, 1, 2, 2)
    for t in range(4):
        own = bridge.offsets(labels, labels, y, t, eps)[torch.arange(3), torch.arange(3)]
        assert torch.allclose(own, bridge.forward(labels, y, t, eps) - labels, rtol=0, atol=1e-12)


# -- network ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pruned():
    return idc.build("PrunedUNet", bridges.released_labels(10, CIFAR)).eval().requires_grad_(False)


def test_the_pruned_network_has_the_budget_of_the_paper(pruned):
    assert sum(p.numel() for p in pruned.parameters()) == pytest.approx(9.39e6, rel=1e-3)
    released = TranslationClassifier(pruned, bridges.released_steps())
    flops = idc.classification_flops(released)
    assert flops == pytest.approx(27.09e9, rel=1e-3) and flops / 8 == pytest.approx(
        3.386e9, rel=1e-3
    )
    shorter = idc.classification_flops(TranslationClassifier(pruned, [3, 1, 0]))
    assert shorter == pytest.approx(0.75 * flops)


def test_the_network_knows_its_position_and_nothing_of_classes(pruned):
    x = draw(0, 2, *CIFAR).float()
    assert not torch.allclose(pruned(x, 0), pruned(x, 2))
    assert torch.allclose(pruned(x, torch.tensor([2, 0]))[1:], pruned(x[1:], 0), atol=1e-5)
    assert not torch.allclose(alive()(PICTURES, 0), alive()(PICTURES, 2))


def test_untrained_weights_come_from_the_seed_alone():
    torch.rand(7)
    one, same, other = (alive(seed=s).network.enter.weight for s in (3, 3, 4))
    assert torch.equal(one, same) and not torch.equal(one, other)


# -- classifier -------------------------------------------------------------------------------------------------------


def test_logits_are_distances_of_the_translation_written_out_by_hand():
    translator = alive()
    bridge = Bridge(4)
    classifier = Held.seeded(TranslationClassifier(translator), 7)
    y = state = 2 * PICTURES - 1
    for i, t in enumerate([3, 2, 1, 0]):
        x0 = translator(state, t).clamp(-1, 1)
        if t:
            m_t = float(bridge.shares[t])
            m_n = float(bridge.shares[t - 1])
            dt = 2 * m_t * (1 - m_t)
            dn = 2 * m_n * (1 - m_n)
            var = (dt - dn * (1 - m_t) ** 2 / (1 - m_n) ** 2) * dn / dt
            state = (
                (1 - m_n) * x0
                + m_n * y
                + math.sqrt((dn - var) / dt) * (state - (1 - m_t) * x0 - m_t * y)
                + math.sqrt(var) * classifier.noise[0, i]
            )
    wanted = -((x0 + 1) / 2 - translator.labels[:, None]).abs().mean((2, 3, 4)).T / 0.1
    assert torch.allclose(classifier(PICTURES), wanted, atol=1e-5)


def test_held_noise_is_deterministic_and_fresh_noise_is_not():
    classifier = TranslationClassifier(alive())
    held = Held.seeded(classifier)
    fresh = Fresh(classifier, torch.Generator().manual_seed(0))
    assert held.deterministic and not classifier.deterministic
    assert torch.equal(held(PICTURES), held(PICTURES))
    assert torch.allclose(held(PICTURES)[2:3], held(PICTURES[2:3]), atol=1e-6), (
        "one noise for every image"
    )
    assert not torch.equal(fresh(PICTURES), fresh(PICTURES))
    again = [Fresh(classifier, torch.Generator().manual_seed(0))(PICTURES) for _ in range(2)]
    assert torch.equal(*again)
    twice = fresh(PICTURES[:1].repeat(2, 1, 1, 1))
    assert not torch.equal(twice[0], twice[1]), "each image its own noise"


def test_the_released_steps_spend_a_call_on_nothing():
    classifier = TranslationClassifier(alive(), bridges.released_steps())
    noise = classifier.sample_noise(1, torch.Generator().manual_seed(3))
    frames = list(classifier.walk(PICTURES, noise))
    assert [f.t for f in frames] == [3, 1, 1, 0]
    assert torch.equal(frames[1].x_t, frames[2].x_t) and torch.equal(
        frames[1].estimate, frames[2].estimate
    )
    short = TranslationClassifier(alive(), [3, 1, 0])
    assert torch.equal(short(PICTURES, noise[:, [0, 2]]), classifier(PICTURES, noise))
    every = list(TranslationClassifier(alive()).walk(PICTURES, noise))
    assert all(not torch.equal(a.x_t, b.x_t) for a, b in itertools.pairwise(every))


def test_attacks_see_the_gradient_of_what_predicts():
    classifier = Held.seeded(TranslationClassifier(alive().double()))
    x = PICTURES[:2].double().clamp(0.2, 0.8)
    y = torch.tensor([0, 1])
    x.requires_grad_()
    gradient = torch.autograd.grad(attacks.margin_loss(classifier(x), y).sum(), x)[0]
    for i in (9, 27, 42):
        step = torch.zeros_like(x).flatten(1)
        step[:, i] = 1e-6
        step = step.reshape(x.shape)
        with torch.no_grad():
            slope = (
                attacks.margin_loss(classifier(x + step), y)
                - attacks.margin_loss(classifier(x - step), y)
            ) / 2e-6
        assert torch.allclose(gradient.flatten(1)[:, i], slope, rtol=1e-3, atol=1e-7)
    view = attacks.AttackView.calibrated(classifier, PICTURES.double())
    *_, last = attacks.pgd(view, PICTURES.double(), view(PICTURES.double()).argmax(1), 0.2, steps=5)
    assert float(last.size.max()) <= 0.2 + 1e-9 and view(PICTURES.double()).shape == (6, 3)


def test_an_attack_library_takes_it_as_it_is():
    import torchattacks

    classifier = Held.seeded(TranslationClassifier(alive()))
    y = classifier(PICTURES).argmax(1)
    found = torchattacks.PGD(classifier, eps=0.2, alpha=0.05, steps=5, random_start=False)(
        PICTURES, y
    )
    assert float((found - PICTURES).abs().max()) <= 0.2 + 1e-6
    before, after = (attacks.margin_loss(classifier(x), y).mean() for x in (PICTURES, found))
    assert float(after) > float(before) + 1e-3


def test_a_perfect_translation_has_a_share_of_one_third_in_the_released_head():
    labels = bridges.released_labels(10, CIFAR)
    shares = (-bridges.distances(labels, labels) / idc.TEMPERATURE).softmax(1).diagonal()
    assert 0.33 < float(shares.min()) and float(shares.max()) < 0.39
    twice = (-bridges.distances(labels, labels) / idc.TEMPERATURE).softmax(1).softmax(1)
    assert float(twice.diagonal().max()) < 0.14, (
        "a second softmax, inside cross-entropy, leaves nearly nothing"
    )


# -- errors: one sentence each ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "sentence"),
    [
        (
            lambda: bridges.released_labels(65, SHAPE),
            r"expected at most 64 classes for orthogonal images of 64 pixels",
        ),
        (
            lambda: bridges.orthogonal_labels(64, SHAPE),
            r"expected at most 63 classes for centred orthogonal images of 64",
        ),
        (lambda: bridges.simplex_labels(64, SHAPE), r"at most 63 classes"),
        (
            lambda: bridges.hadamard_labels(64, SHAPE),
            r"expected at most 63 classes for Hadamard images of 64 pixels",
        ),
        (
            lambda: bridges.hadamard_labels(4, (3, 2, 2)),
            r"at most 3 classes for Hadamard images of 12 pixels",
        ),
        (
            lambda: idc.build("DigitNet", torch.rand(1, *SHAPE).repeat(2, 1, 1, 1)),
            r"expected labels that differ, got the same picture for classes 0 and 1",
        ),
        (
            lambda: idc.build("DigitNet", 2 * bridges.hadamard_labels(3, SHAPE) - 1),
            r"these look like model space",
        ),
        (
            lambda: idc.build("DigitNet", bridges.hadamard_labels(1, SHAPE)),
            r"at least two classes, got 1",
        ),
        (
            lambda: idc.build("ResNet", bridges.hadamard_labels(3, SHAPE)),
            r"expected one of .*, got 'ResNet'",
        ),
        (lambda: Bridge(0), r"expected a bridge of at least one step, got 0"),
        (lambda: Bridge(4, scale=0.0), r"expected scale > 0"),
        (lambda: bridges.every_step(0), r"at least one step"),
        (
            lambda: bridges.released_steps(2),
            r"expected at least 3 steps for the released list, got 2",
        ),
        (
            lambda: Bridge(4).posterior(*[torch.zeros(1, 1, 1, 1)] * 2, 1, 2),
            r"to a position n <= t, got t = 1 and n = 2",
        ),
        (
            lambda: TranslationClassifier(tiny(), []),
            r"expected at least one step, got an empty list",
        ),
        (
            lambda: TranslationClassifier(tiny(), [3, 1]),
            r"go down from at most 3 to 0, got \[3, 1\]",
        ),
        (
            lambda: TranslationClassifier(tiny(), [4, 0]),
            r"go down from at most 3 to 0, got \[4, 0\]",
        ),
        (lambda: TranslationClassifier(tiny(), [1, 3, 0]), r"go down from at most 3 to 0"),
        (
            lambda: TranslationClassifier(tiny(), temperature=0.0),
            r"expected a temperature > 0, got 0",
        ),
        (
            lambda: Held.seeded(TranslationClassifier(tiny()))(2 * PICTURES - 1),
            r"expected images in \[0,1\].*model space",
        ),
        (
            lambda: Held.seeded(TranslationClassifier(tiny()))(torch.zeros(1, *CIFAR)),
            r"expected images of shape \[B,1,8,8\]",
        ),
    ],
)
def test_errors_are_one_sentence(action, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        action()
    assert str(caught.value).count("\n") == 0


# -- weights ----------------------------------------------------------------------------------------------------------


def test_a_saved_translator_comes_back(tmp_path):
    translator = alive(positions=5)
    idc.save_translator(translator, tmp_path / "t.safetensors", {"name": "t"})
    loaded, card = idc.load_translator(tmp_path / "t.safetensors")
    assert card == {"name": "t"} and loaded.bridge == Bridge(5)
    assert torch.equal(loaded.labels, translator.labels)
    assert torch.equal(
        Held.seeded(TranslationClassifier(loaded))(PICTURES),
        Held.seeded(TranslationClassifier(translator))(PICTURES),
    )


def test_a_damaged_or_foreign_file_is_told(tmp_path):
    path = tmp_path / "t.safetensors"
    idc.save_translator(tiny(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="probably cut short"):
        idc.load_translator(path)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, path, {"architecture": json.dumps(dict(network="DigitNet"))})
    with pytest.raises(
        ValueError, match="expected t.safetensors to hold a translator with its bridge and labels"
    ):
        idc.load_translator(path)
    with pytest.raises(FileNotFoundError):
        idc.load_translator(tmp_path / "none.safetensors")


# -- what is in assets/ -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits_translator():
    return networks.load_translator()


def test_the_shipped_network_is_as_accurate_as_its_card_says(digits_translator):
    world = data.digits()
    card = idc.load_translator(assets.verified(networks.TRANSLATORS["digits"][0]))[1]
    classifier = TranslationClassifier(digits_translator)
    held = Held.seeded(classifier)
    correct = accuracies.accuracy(held, world.test_images, world.test_labels)
    assert (
        correct >= 0.97 * 400 and abs(correct - card["accuracy"]["correct"]) <= 1
    )  # rounding may turn one
    fresh = Fresh(classifier, torch.Generator().manual_seed(9))
    assert accuracies.accuracy(fresh, world.test_images, world.test_labels) >= 0.95 * 400


def test_its_estimates_move_from_step_to_step_and_labels_stay_orthogonal(digits_translator):
    check_centred(digits_translator.labels)
    classifier = TranslationClassifier(digits_translator)
    noise = classifier.sample_noise(1, torch.Generator().manual_seed(0))
    frames = list(classifier.walk(data.digits().test_images[:100], noise))
    lead = [f.distances.topk(2, largest=False).values.diff(dim=1).mean() for f in frames]
    assert float(lead[-1]) > float(lead[0]), "distances grow apart"
