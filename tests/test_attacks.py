"""Attacks on classifiers whose answer is known in closed form, and the views that keep them honest."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
import twins
from diffclass import attacks, data, likelihood, noise, units
from diffclass.attacks import search
from diffclass.attacks.views import AttackView
from diffclass.classifiers.base import Classifier, Held, fresh_noise, take
from diffclass.classifiers.bayes import BayesClassifier, telescoped
from diffclass.classifiers.foreign import Foreign
from diffclass.classifiers.purified import (
    LikelihoodMaximisation,
    Purification,
    PurifiedClassifier,
)
from diffclass.classifiers.stand_in import StandIn
from diffclass.denoisers.exact import MixtureDenoiser
from diffclass.noise import NoiseBank
from torch import nn

SHAPE = (1, 4, 4)


class Linear(Classifier):
    """Logits factor * (W x + b) - shift: robust accuracy, distance and gradient are known exactly."""

    scale = "scores"
    calls = 1

    def __init__(self, classes: int = 2, factor: float = 1.0, shift: float = 0.0, shape=SHAPE):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        size = math.prod(shape)
        self.weight = nn.Parameter(
            torch.randn(classes, size, generator=generator, dtype=torch.float64)
        )
        self.bias = nn.Parameter(
            -self.weight.detach().sum(1) / 2
        )  # the middle of the cube is on the boundary
        self.factor = factor
        self.shift = shift
        self.num_classes = classes
        self.image_shape = shape

    def logits(self, x, noise):
        """See `Classifier.logits`."""
        return self.factor * (x.flatten(1) @ self.weight.T.to(x) + self.bias.to(x)) - self.shift

    @property
    def normal(self):
        """w_1 - w_0, the direction across the boundary of two classes."""
        return (self.weight[1] - self.weight[0]).detach()

    def margin(self, x):
        """|f_1 - f_0|, how far ahead the predicted class is."""
        return self(x).detach().diff(dim=1).abs()[:, 0] / self.factor


def images(count: int = 200, seed: int = 0):
    """Images around the middle of the cube, far from its faces, and the labels that `Linear` gives them."""
    uniform = torch.rand(
        count, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    x = 0.45 + 0.1 * uniform
    return x, Linear()(x).argmax(1)


# ---------------------------------------------------------------------------------------------------------------------
# PGD against closed forms


ASCENT = search.ascent


def descent(gradient, norm):
    """Downhill."""
    return -ASCENT(gradient, norm)


def one_norm_for_the_batch(gradient, norm):
    """L2 gradients over the length of the whole batch's, not each image's own."""
    return gradient.sign() if norm == "linf" else gradient / gradient.norm()


def sign_in_l2(gradient, norm):
    """The corner of a box in place of the direction of the gradient."""
    return gradient.sign() / gradient[0].numel() ** 0.5


def unprojected(x, x0, epsilon, norm):
    """No budget at all."""
    return x


@twins.rejected(
    {
        "descent": dict(pgd=twins.patched(attacks.pgd, search, ascent=descent)),
        "no projection": dict(pgd=twins.patched(attacks.pgd, search, project=unprojected)),
        "raw gradient": dict(pgd=twins.patched(attacks.pgd, search, ascent=lambda g, norm: g)),
        "one L2 norm for the batch": dict(
            pgd=twins.patched(attacks.pgd, search, ascent=one_norm_for_the_batch)
        ),
        "sign for L2": dict(pgd=twins.patched(attacks.pgd, search, ascent=sign_in_l2)),
    }
)
def test_pgd_reaches_the_exact_robust_accuracy(pgd=attacks.pgd):
    """On a linear model PGD reaches the exact robust accuracy: an image falls iff its margin is below eps ||w||_q.

    The logits' scale does not matter: a step follows the direction of the gradient, not its length.
    """
    x, y = images()
    for factor in (1e-3, 1.0, 1e3):
        model = Linear(factor=factor)
        for norm, q, budgets in (("linf", 1, (0.002, 0.01, 0.03)), ("l2", 2, (0.01, 0.03, 0.1))):
            for epsilon in budgets:
                *_, last = pgd(model, x, y, epsilon, norm=norm, steps=10)
                falls = model.margin(x) < epsilon * model.normal.norm(p=q)
                assert torch.equal(last.fooled, falls), (factor, norm, epsilon)
                assert 0.01 < float(falls.double().mean()), (
                    "a budget at which nothing falls proves nothing"
                )


@pytest.mark.parametrize("norm, q", [("linf", 1), ("l2", 2)])
def test_one_step_gains_epsilon_times_the_dual_norm(norm, q):
    model = Linear()
    x, y = images(20)
    first, last = attacks.pgd(model, x, y, 0.02, norm=norm, steps=1)
    gain = attacks.margin_loss(last.logits, y) - attacks.margin_loss(first.logits, y)
    assert torch.allclose(gain, 0.02 * model.normal.norm(p=q), rtol=1e-9)
    assert torch.allclose(last.size, torch.full((20,), 0.02, dtype=torch.float64), rtol=1e-9)


def test_every_frame_is_kept_and_inside_the_budget():
    model = Linear(3)
    x, y = images(10)
    for norm in ("linf", "l2"):
        frames = list(
            attacks.pgd(
                model, x, y, 0.05, norm=norm, steps=7, generator=torch.Generator().manual_seed(0)
            )
        )
        assert [f.step for f in frames] == list(range(8))
        for f in frames:
            assert (
                float(f.size.max()) <= 0.05 + 1e-12
                and float(f.x.min()) >= 0
                and float(f.x.max()) <= 1
            )
            assert torch.allclose(f.logits, model(f.x).detach()) and torch.equal(
                f.fooled, f.logits.argmax(1) != y
            )
            assert torch.equal(f.size, attacks.size_of(f.x - x, norm)) and not f.x.requires_grad
        assert float(frames[0].size.min()) > 0, "a random start"
    assert float(next(attacks.pgd(model, x, y, 0.05)).size.max()) == 0, (
        "without a generator it starts at the image"
    )


def test_a_zero_budget_changes_nothing():
    model = Linear()
    x, y = images(5)
    for norm in ("linf", "l2"):
        *_, last = attacks.pgd(model, x, y, 0.0, norm=norm, steps=3)
        assert torch.equal(last.x, x) and not bool(last.fooled.any())


@twins.rejected(
    {
        "L2 ball scaled even inside": dict(
            project=lambda x, x0, epsilon, norm: attacks.project(
                x0 + 1e6 * (x - x0), x0, epsilon, norm
            )
        ),
        "not clipped to pixels": dict(
            project=lambda x, x0, epsilon, norm: x0 + (x - x0).clamp(-epsilon / 4, epsilon / 4)
        ),
        "L-inf box for L2": dict(
            project=lambda x, x0, epsilon, norm: attacks.project(x, x0, epsilon, "linf")
        ),
    }
)
def test_projection(project=attacks.project):
    """The result is in the ball and in [0,1]; what is inside already stays; projecting twice changes nothing."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(50, *SHAPE, generator=generator, dtype=torch.float64)
    far = x0 + torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    for norm in ("linf", "l2"):
        once = project(far, x0, 0.3, norm)
        assert float(attacks.size_of(once - x0, norm).max()) <= 0.3 + 1e-12
        assert float(once.min()) >= 0 and float(once.max()) <= 1
        assert torch.allclose(project(once, x0, 0.3, norm), once, atol=1e-12)
        near = (x0 + 0.01 * (far - x0)).clamp(0, 1)
        assert torch.allclose(project(near, x0, 0.3, norm), near, atol=1e-12)
    reach = attacks.size_of(project(far, torch.full_like(x0, 0.5), 0.3, "l2") - 0.5, "l2")
    assert torch.allclose(reach, torch.full_like(reach, 0.3)), (
        "an image outside the ball lands on its surface"
    )


def margin_of_all(logits, y):
    """max over all classes, the right one included: never negative, flat where nothing is fooled."""
    return logits.amax(1) - logits.gather(1, y[:, None])[:, 0]


@twins.rejected(
    {
        "right class included": dict(loss=margin_of_all),
        "sign": dict(loss=twins.scaled(attacks.margin_loss, -1)),
    }
)
def test_margin_loss(loss=attacks.margin_loss):
    """max over wrong classes minus the right one: positive exactly when fooled."""
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, -5.0, 4.0], [1.0, 2.0, -7.0]])
    assert loss(logits, torch.tensor([0, 2, 2])).tolist() == [-1.0, -4.0, 9.0]


def test_cross_entropy_loss():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    assert torch.allclose(
        attacks.cross_entropy_loss(logits, y), -torch.log_softmax(logits, 1)[torch.arange(6), y]
    )


# ---------------------------------------------------------------------------------------------------------------------
# The smallest perturbation


def test_shrink_returns_what_was_tested_and_fools():
    x0 = torch.zeros(1, *SHAPE)
    x = torch.full((1, *SHAPE), 0.2)
    tested = []

    def fooled(image):
        tested.append(image)
        return float(image.max()) > 0.0603

    *_, best = attacks.shrink(fooled, x0, x, rounds=12)
    assert fooled(best) and any(torch.equal(best, t) for t in tested)
    assert 0.0603 < float(best.max()) < 0.0603 + 2 * 0.2 / 2**12
    assert list(attacks.shrink(lambda image: False, x0, x)) == [None]


def test_the_smallest_attack_on_a_linear_model_is_its_distance():
    """An upper bound by construction, and within 2 % of |margin| / ||w||_2."""
    model = Linear()
    x, y = images(12)
    for i in range(12):
        *_, best = attacks.smallest_l2(model, x[i : i + 1], y[i : i + 1], rounds=10)
        size = float(attacks.size_of(best - x[i : i + 1], "l2"))
        distance = float(model.margin(x[i : i + 1]) / model.normal.norm())
        assert distance * (1 - 1e-9) <= size <= 1.02 * distance + 0.25 * 2**-9, (size, distance)
        assert int(model(best).argmax(1)) != int(y[i])


def test_the_smallest_attack_can_be_stopped_after_every_frame_and_decision():
    """Between two items lies one frame of an attack or one decision, and no more items come than is said."""
    x, y = images(1)
    asked = []

    class Counted(Linear):
        def logits(self, x, noise):
            asked.append("frame")
            return super().logits(x, noise)

    model = Counted()

    def fooled(image):
        asked.append("decision")
        return bool(Linear()(image).argmax(1) != y)

    # an attack of 5 frames, one decision where it fails, 4 where it fools; then once more
    for budgets, wanted in (((1e-6, 1e-5), (12,)), ((1e-6, 1.0), (6 + 9 + 6, 6 + 9 + 9))):
        asked.clear()
        seen = 0
        longest = 0
        for _ in attacks.smallest_l2(
            model, x, y, fooled=fooled, budgets=budgets, steps=4, rounds=3
        ):
            longest = max(longest, len(asked) - seen)
            seen = len(asked)
        assert longest == 1 and seen == len(asked)
        assert seen in wanted and seen <= attacks.longest_search(2, steps=4, rounds=3)
    always = list(attacks.smallest_l2(model, x, y, fooled=lambda _: True, budgets=(1.0,), steps=4))
    assert len(always) == attacks.longest_search(1, steps=4, rounds=8)


def test_no_attack_within_the_budgets_is_none():
    model = Linear()
    x, y = images(1)
    *_, best = attacks.smallest_l2(model, x, y, budgets=(1e-6, 1e-5), steps=2)
    assert best is None


def test_another_judge_can_decide():
    """`fooled` is what decides: a stricter judge gets a larger perturbation."""
    model = Linear()
    x, y = images(1)
    *_, plain = attacks.smallest_l2(model, x, y)
    *_, strict = attacks.smallest_l2(
        model, x, y, fooled=lambda image: bool(attacks.margin_loss(model(image), y) > 0.5)
    )
    assert float(attacks.size_of(strict - x, "l2")) > float(attacks.size_of(plain - x, "l2")) + 0.03


def test_pgd_through_a_diffusion_classifier_moves_towards_the_boundary():
    law = data.gaussians()
    levels = noise.log_levels(0.02, 10, 24)
    model = Held.seeded(BayesClassifier(MixtureDenoiser.of_law(law), levels, 4, chunk=800))
    x, y = law.sample(8, torch.Generator().manual_seed(0), torch.float64)
    frames = list(attacks.pgd(model, x, y, 0.25, norm="l2", steps=5))
    assert bool(frames[-1].fooled.all())
    gains = [attacks.margin_loss(f.logits, y).mean() for f in frames]
    assert float(gains[-1]) > float(gains[0]) + 1


# ---------------------------------------------------------------------------------------------------------------------
# The view that libraries get


def test_the_view_keeps_decisions_and_gradients():
    model = Linear(4, factor=1e4, shift=1e6)
    x, _ = images(50)
    view = AttackView.calibrated(model, x)
    assert torch.equal(view(x).argmax(1), model(x).argmax(1)) and float(view(x).detach().min()) >= 0
    top = view(x).detach().topk(2, dim=1).values
    assert abs(float((top[:, 0] - top[:, 1]).median()) - 1) < 1e-6
    leaf = x[:3].clone().requires_grad_(True)
    slope = torch.autograd.grad(view(leaf)[:, 1].sum(), leaf)[0]
    wanted = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)[0] / view.temperature
    assert torch.allclose(slope, wanted, rtol=1e-9)
    assert (
        next(view.parameters()).device.type == "cpu"
        and view.num_classes == 4
        and view.image_shape == SHAPE
    )


def library(name: str, model):
    """An attack of torchattacks with its random start switched off, so that runs can be compared."""
    import torchattacks

    makers = {
        "PGD": lambda: torchattacks.PGD(model, eps=0.02, alpha=0.005, steps=8, random_start=False),
        "PGDL2": lambda: torchattacks.PGDL2(
            model, eps=0.05, alpha=0.02, steps=8, random_start=False
        ),
        "FGSM": lambda: torchattacks.FGSM(model, eps=0.02),
        "CW": lambda: torchattacks.CW(model, c=1, steps=40, lr=0.01),
        "APGD": lambda: torchattacks.APGD(
            model, norm="Linf", eps=0.02, steps=10, n_restarts=1, seed=0, loss="ce"
        ),
    }
    return makers[name]()


def attacked(name: str, model, x, y):
    """Which images an attack of torchattacks fools, and by how much it moves them; the global generator is restored."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        moved = library(name, model)(x, y).to(x.dtype)
    return model(moved).argmax(1) != y, (moved - x).flatten(1).norm(dim=1).detach()


@pytest.mark.parametrize("name", ["PGD", "PGDL2", "FGSM", "CW", "APGD"])
def test_through_the_view_an_attack_does_not_feel_the_scale(name):
    """Logits times 1, 1e3 and 1e6, all negative like log-densities: the same images fall."""
    x, y = images(40)
    x = x.float()
    fallen = {}
    for factor in (1.0, 1e3, 1e6):
        model = Linear(factor=factor, shift=100 * factor)
        view = AttackView.calibrated(model.double(), x.double()).float()
        fallen[factor] = attacked(name, view, x, y)[0]
    assert 0 < int(fallen[1.0].sum()) < 40 or name == "CW"
    assert int(fallen[1.0].sum()) > 0
    for factor in (1e3, 1e6):
        assert int((fallen[factor] != fallen[1.0]).sum()) <= 1, (name, factor)


def test_without_the_view_carlini_wagner_does_nothing_to_negative_logits():
    """The trap: its objective reads max((1 - onehot) f), which is zero when every logit is negative."""
    x, y = images(40)
    x = x.float()
    fooled, size = attacked("CW", Linear(shift=1000.0), x, y)
    assert int(fooled.sum()) == 0 and float(size.max()) < 1e-3
    model = Linear(shift=1000.0)
    through, _ = attacked("CW", AttackView.calibrated(model, x), x, y)
    assert int(through.sum()) > 20


def test_without_the_view_cross_entropy_is_flat_on_logits_far_apart():
    x, y = images(40)
    x = x.float()
    raw, _ = attacked("PGD", Linear(factor=1e6), x, y)
    through, _ = attacked("PGD", AttackView.calibrated(Linear(factor=1e6), x), x, y)
    assert int(raw.sum()) < int(through.sum())


def plane_classifier(levels: int = 16, samples: int = 16, **options) -> BayesClassifier:
    """A diffusion classifier of the plane's mixtures, by their exact denoiser."""
    denoiser = MixtureDenoiser.of_law(data.mixtures())
    return BayesClassifier(
        denoiser, noise.log_levels(0.05, 5, levels), samples, chunk=10**6, **options
    )


def plane_points(count: int = 4, seed: int = 0):
    """Points of the plane's mixtures in pixels, and their labels."""
    return data.mixtures().sample(count, torch.Generator().manual_seed(seed), torch.float64)


@pytest.mark.parametrize("name", ["PGD", "CW", "APGD"])
def test_libraries_attack_a_random_classifier_through_a_view_of_one_noise(name):
    """With its noise held a diffusion classifier is one function: what falls, falls again when it is asked anew."""
    x, _ = plane_points(40)
    x = x.float()
    held = Held.seeded(plane_classifier(8, 4), 3)
    view = AttackView.calibrated(held, x)
    y = held(x).argmax(1)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torchattacks

        attack = {
            "PGD": lambda: torchattacks.PGD(view, eps=0.1, alpha=0.03, steps=8),
            "CW": lambda: torchattacks.CW(view, c=1, steps=40, lr=0.01),
            "APGD": lambda: torchattacks.APGD(view, norm="L2", eps=0.15, steps=10, loss="ce"),
        }[name]()
        moved = attack(x, y)
    again = Held.seeded(plane_classifier(8, 4), 3)
    fallen = again(moved).argmax(1) != y
    assert int(fallen.sum()) > 5 and torch.equal(fallen, view(moved).argmax(1) != y)
    with pytest.raises(ValueError, match=r"expected noise of shape .* got \(\); draw it"):
        AttackView(plane_classifier(8, 4), 1.0)(x)


def test_a_view_hands_the_noise_on():
    """The same noise goes through the view, which is calibrated under it, and its gradient is the classifier's."""
    model = plane_classifier(8, 4)
    x, y = plane_points(6)
    drawn = model.sample_noise(6, torch.Generator().manual_seed(2))
    view = AttackView.calibrated(model, x, drawn)
    assert torch.equal(view(x, drawn).argmax(1), model(x, drawn).argmax(1))
    top = model(x, drawn).topk(2, dim=1).values
    assert view.temperature == pytest.approx(float((top[:, 0] - top[:, 1]).median()))
    first = view.sample_noise(6, torch.Generator().manual_seed(2))
    assert torch.equal(first, drawn) and not view.deterministic and view.eot == model.eot
    slope = attacks.expected_gradient(view, x, y, noise=drawn)[0]
    wanted = attacks.expected_gradient(model, x, y, noise=drawn)[0] / view.temperature
    assert torch.allclose(slope, wanted, rtol=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    "options, error, sentence",
    [
        (
            dict(epsilon=8),
            ValueError,
            r"attack budget 8 \(linf\) is larger than the pixel range .*did you mean 8/255",
        ),
        (dict(epsilon=-0.1), ValueError, "expected an attack budget >= 0"),
        (dict(epsilon=math.nan), ValueError, "expected an attack budget >= 0, got nan"),
        (dict(epsilon=0.1, norm="l0"), ValueError, "expected norm 'linf' or 'l2', got 'l0'"),
        (
            dict(epsilon=0.1, y=torch.tensor([0, 2])),
            ValueError,
            "expected labels between 0 and 1, got",
        ),
        (
            dict(epsilon=0.1, y=torch.tensor([0, -1])),
            ValueError,
            "expected labels between 0 and 1, got",
        ),
        (
            dict(epsilon=0.1, y=torch.tensor([0])),
            ValueError,
            "expected one label for each of 2 images",
        ),
        (dict(epsilon=0.1, y=[0, 1]), TypeError, "expected labels as a torch.Tensor"),
        (dict(epsilon=0.1, y=torch.tensor([True, False])), ValueError, "dtype bool"),
        (dict(epsilon=0.1, y=torch.eye(2)), ValueError, r"one-hot .*: pass y.argmax\(1\)"),
        (dict(epsilon=0.1, y=torch.tensor([0, 1]).int()), ValueError, r"pass y.long\(\)"),
        (dict(epsilon=0.1, step_size=-0.01), ValueError, "expected a step size > 0, got -0.01"),
        (dict(epsilon=0.1, step_size=0.0), ValueError, "expected a step size > 0, got 0"),
        (dict(epsilon=0.1, step_size=2.0), ValueError, "got 2; did you mean 2/255"),
        (dict(epsilon=0.1, step_size=0.3), ValueError, "a step size of at most 0.2, across"),
        (dict(epsilon=0.1, x=torch.full((2, *SHAPE), 200.0)), ValueError, "divide by 255"),
        (
            dict(epsilon=0.1, x=torch.zeros(2, 3, 4, 4)),
            ValueError,
            r"expected images of shape \[B,1,4,4\]",
        ),
        (
            dict(epsilon=0.1, x=torch.full((2, *SHAPE), math.nan)),
            ValueError,
            "expected finite images",
        ),
    ],
)
def test_attacks_that_cannot_be_meant_get_a_sentence(options, error, sentence):
    x, y = images(2)
    arguments = {"x": x, "y": y, **options}
    with pytest.raises(error, match=sentence):
        next(attacks.pgd(Linear(), **arguments))


def test_a_gradient_that_breaks_gets_a_sentence_and_the_frames_stand():
    class Breaking(Linear):
        def logits(self, x, noise):
            """Finite logits; their slope is NaN below 0.44, as `where` does not keep the root's own slope out."""
            depth = x.flatten(1).amin(1, keepdim=True) - 0.44
            root = torch.where(depth > 0, depth.sqrt(), 0.0)
            return super().logits(x, noise) + 5 * root * torch.tensor([1.0, 0.0])

    x = images(1)[0]  # climbing away from class 0 lowers the root
    y = torch.zeros(1, dtype=torch.long)
    frames = []
    with pytest.raises(
        FloatingPointError, match="gradient became non-finite at step 1; the frames so far stand"
    ):
        for frame in attacks.pgd(Breaking(), x, y, 0.2, steps=10):
            frames.append(frame)
    assert [f.step for f in frames] == [0, 1]
    assert all(bool(torch.isfinite(f.x).all() and torch.isfinite(f.logits).all()) for f in frames)


def test_a_step_across_the_whole_budget_and_none_in_no_budget_pass():
    x, y = images(2)
    for epsilon, step in ((0.1, 0.2), (0.1, 0.001), (0.0, 0.0)):
        *_, last = attacks.pgd(Linear(), x, y, epsilon, step_size=step, steps=4)
        assert float(last.size.max()) <= epsilon + 1e-12
    *_, last = attacks.pgd(Linear(), x, y, 0.1, step_size=0.25, steps=1)
    assert torch.allclose(last.size, torch.tensor(0.1, dtype=x.dtype)), "the usual one of one step"


@pytest.mark.parametrize("momentum", [-0.1, 1.0, math.nan])
def test_a_momentum_that_cannot_be_meant_gets_a_sentence(momentum):
    x, y = images(2)
    with pytest.raises(ValueError, match="expected a momentum of at least 0 and below 1, got"):
        next(attacks.apgd(Linear(), x, y, 0.1, momentum=momentum))


def test_the_smallest_attack_is_asked_about_one_image_and_some_budget():
    x, y = images(2)
    with pytest.raises(ValueError, match="one image and at least one budget, got 2 images and 5"):
        next(attacks.smallest_l2(Linear(), x, y))
    with pytest.raises(ValueError, match="got 1 images and 0 budgets"):
        next(attacks.smallest_l2(Linear(), x[:1], y[:1], budgets=()))


class OneClass(Linear):
    """One score between 0 and 1, as of a sigmoid."""

    def __init__(self):
        super().__init__(1)

    def logits(self, x, noise):
        """[B,1]."""
        return super().logits(x, noise).sigmoid()


@pytest.mark.parametrize("loss", [attacks.margin_loss, attacks.cross_entropy_loss])
@pytest.mark.parametrize("attack", [attacks.pgd, attacks.apgd])
def test_one_class_cannot_be_robust(attack, loss):
    """Its accuracy would be 1 under every attack."""
    x, _ = images(2)
    y = torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="expected at least two classes, got 1: with one"):
        next(attack(OneClass(), x, y, 0.1, loss=loss))
    with pytest.raises(ValueError, match="expected at least two classes, got 1: with one"):
        loss(torch.zeros(2, 1), y)


class Normalising(nn.Module):
    """A network with batch statistics, which a training mode moves."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.layer = nn.Linear(16, 3)

    def forward(self, x):
        """[B,1,4,4] -> [B,3]."""
        return self.layer(self.norm(x).flatten(1))


@pytest.mark.parametrize("attack", [attacks.pgd, attacks.apgd])
def test_a_classifier_in_training_mode_is_not_attacked(attack):
    """Its statistics would move under the attack, and with them what is attacked."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Normalising()
    x = images(4)[0].float()
    y = torch.zeros(4, dtype=torch.long)
    model = Foreign(network, 3, SHAPE)
    before = network.norm.running_mean.clone()
    for asked in (model, AttackView(model, 1.0), Held(model, ())):
        with pytest.raises(ValueError, match="got one in training mode, .*; call .eval"):
            next(attack(asked, x, y, 0.1))
    assert torch.equal(network.norm.running_mean, before)
    network.eval()
    *_, last = attack(model, x, y, 0.1, steps=3)
    assert torch.equal(network.norm.running_mean, before) and float(last.size.max()) > 0


@pytest.mark.parametrize("attack", [attacks.pgd, attacks.apgd])
def test_attacks_run_under_no_grad_and_not_under_inference_mode(attack):
    x, y = images(4)
    *_, plain = attack(Linear(), x, y, 0.05, steps=3)
    with torch.no_grad():
        *_, last = attack(Linear(), x, y, 0.05, steps=3)
    assert torch.equal(last.x, plain.x)
    with (
        torch.inference_mode(),
        pytest.raises(TypeError, match=r"outside torch.inference_mode, under which there is none"),
    ):
        next(attack(Linear(), x, y, 0.05, steps=3))


@pytest.mark.parametrize("steps", [1, 10])
def test_infinite_logits_do_not_count_as_fooled(steps):
    """An overflow makes some class the largest, where the classifier has none."""

    class Overflowing(Linear):
        def logits(self, x, noise):
            """Infinite for one class once any pixel is below 0.44."""
            dark = x.flatten(1).amin(1, keepdim=True) < 0.44
            logits = super().logits(x, noise)
            return torch.where(dark & torch.tensor([True, False]), math.inf, logits)

    x, y = images(4)
    frames = []
    with pytest.raises(FloatingPointError, match="logits became infinite at step 1; the frames"):
        for frame in attacks.pgd(Overflowing(), x, y, 0.2, steps=steps, step_size=0.15):
            frames.append(frame)
    assert [f.step for f in frames] == [0]


@pytest.mark.parametrize("steps", [1, 10])
def test_logits_that_are_not_numbers_do_not_count_as_fooled(steps):
    """argmax of NaN is some class: an attack that ends, or passes, where a classifier breaks has fooled nothing."""

    class Undefined(Linear):
        def logits(self, x, noise):
            """Logits that are NaN, with the right slope, once any pixel is below 0.44."""
            dark = x.flatten(1).amin(1, keepdim=True) < 0.44
            return super().logits(x, noise) + torch.where(dark, math.nan, 0.0)

    x, y = images(4)
    frames = []
    with pytest.raises(
        FloatingPointError,
        match="the classifier's logits became NaN at step 1; the frames before it",
    ):
        for frame in attacks.pgd(Undefined(), x, y, 0.2, steps=steps, step_size=0.15):
            frames.append(frame)
    assert [f.step for f in frames] == [0]


def test_a_view_needs_a_positive_temperature():
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(
            ValueError, match="expected a temperature > 0, got .*; use AttackView.calibrated"
        ):
            AttackView(Linear(), temperature)


# ---------------------------------------------------------------------------------------------------------------------
# Other losses


def over_the_first_gap(logits, y):
    """A margin over the gap between the two largest logits."""
    return attacks.margin_loss(logits, y) / -logits.topk(2).values.diff(dim=1)[:, 0]


@twins.rejected(
    {
        "over the first gap": dict(loss=over_the_first_gap),
        "not divided": dict(loss=attacks.margin_loss),
        "sign": dict(loss=twins.scaled(attacks.dlr_loss, -1)),
    }
)
def test_dlr_loss(loss=attacks.dlr_loss):
    """The ratio of the margin to the gap between the first and the third; blind to scale and shift of the logits."""
    logits = torch.tensor(
        [[3.0, 1.0, 2.0, -9.0], [0.0, -5.0, 4.0, 3.0], [1.0, 2.0, -7.0, 0.0]], dtype=torch.float64
    )
    y = torch.tensor([0, 2, 2])
    wanted = torch.tensor([-1 / 2, -1 / 4, 9 / 2], dtype=torch.float64)
    for scale, shift in ((1, 0), (1e6, 0), (1e-3, -1e3)):
        assert torch.allclose(loss(scale * logits + shift, y), wanted, rtol=1e-6), (scale, shift)


def test_targeted_losses():
    logits = torch.tensor([[5.0, 1.0, 2.0, -2.0, 0.0]])
    y = torch.tensor([0])
    target = torch.tensor([1])
    assert attacks.targeted_loss(target)(logits, y).tolist() == [-4.0]
    assert torch.allclose(
        attacks.targeted_dlr_loss(target)(logits, y), torch.tensor([-4 / (5 - 0.5)])
    )


def test_a_targeted_attack_gains_epsilon_times_the_dual_norm_towards_its_target():
    model = Linear(6)
    x, _ = images(20)
    y = model(x).argmax(1)
    target = (y + 2) % 6
    loss = attacks.targeted_loss(target)
    direction = (model.weight[target] - model.weight[y]).detach()
    *_, last = attacks.pgd(model, x, y, 0.02, steps=10, loss=loss)
    assert torch.allclose(
        loss(last.logits, y) - loss(model(x).detach(), y), 0.02 * direction.norm(p=1, dim=1)
    )
    *_, last = attacks.apgd(model, x, y, 0.45, steps=20, loss=attacks.targeted_dlr_loss(target))
    assert bool((loss(last.logits, y) > 0).all()), "every image's target has overtaken its label"


@pytest.mark.parametrize(
    "classes, loss, sentence",
    [
        (2, attacks.dlr_loss, "expected at least 3 classes, .* got 2; use margin_loss"),
        (
            3,
            attacks.targeted_dlr_loss(torch.tensor([1])),
            "expected at least 4 classes, .* got 3; use targeted_loss",
        ),
        (
            3,
            attacks.targeted_loss(torch.tensor([0])),
            "expected targets that differ from the labels",
        ),
        (3, attacks.targeted_loss(torch.tensor([3])), "expected labels between 0 and 2, got 3"),
    ],
)
def test_losses_that_need_more_classes_say_so(classes, loss, sentence):
    with pytest.raises(ValueError, match=sentence):
        loss(torch.arange(classes, dtype=torch.float64)[None], torch.tensor([0]))


# ---------------------------------------------------------------------------------------------------------------------
# APGD


def one_small_norm_for_the_batch(gradient, norm):
    """`one_norm_for_the_batch`, short enough that halving cannot make up for it."""
    return gradient.sign() if norm == "linf" else 1e-2 * gradient / gradient.norm()


@twins.rejected(
    {
        "descent": dict(apgd=twins.patched(attacks.apgd, search, ascent=descent)),
        "no projection": dict(apgd=twins.patched(attacks.apgd, search, project=unprojected)),
        "one L2 norm for the batch": dict(
            apgd=twins.patched(attacks.apgd, search, ascent=one_small_norm_for_the_batch)
        ),
    }
)
def test_apgd_reaches_the_exact_robust_accuracy(apgd=attacks.apgd):
    """On a linear model, at any scale, exactly the images fall whose margin is below eps ||w||_q; from any start."""
    x, y = images()
    for factor, start in ((1.0, None), (1e6, 3)):
        model = Linear(factor=factor)
        for norm, q, epsilon in (("linf", 1, 0.01), ("l2", 2, 0.03)):
            generator = None if start is None else torch.Generator().manual_seed(start)
            *_, last = apgd(model, x, y, epsilon, norm=norm, steps=10, generator=generator)
            falls = model.margin(x) < epsilon * model.normal.norm(p=q)
            assert torch.equal(last.fooled, falls), (factor, norm, start)
            assert (
                float(last.size.max()) <= epsilon + 1e-12
                and 0.01 < float(falls.double().mean()) < 0.99
            )


class TwoClasses(Classifier):
    """A classifier with two classes of pictures of `SHAPE`."""

    scale = "scores"
    calls = 1
    num_classes = 2
    image_shape = SHAPE


class Bowl(TwoClasses):
    """The margin has one maximum inside the budget, at `top`: a step that is too long jumps over it."""

    def __init__(self, top):
        super().__init__()
        self.top = top

    def logits(self, x, noise):
        """Logits 0 and 1 - ||x - top||^2."""
        height = 1 - ((x - self.top) ** 2).flatten(1).sum(1)
        return torch.stack([torch.zeros_like(height), height], 1)


class NeverHalved(search._Halving):
    """Steps of a fixed size."""

    def after(self, value, best):
        return torch.zeros_like(self.halved)


def best_forgotten(*arguments, **options):
    """APGD that returns where it is instead of the best that it has seen."""
    for frame in attacks.apgd(*arguments, **options):
        logits = torch.stack([torch.zeros_like(frame.value), -frame.value], 1)
        yield replace(frame, x=frame.at, logits=logits)


@twins.rejected(
    {
        "never halved": dict(apgd=twins.patched(attacks.apgd, search, _Halving=NeverHalved)),
        "the best forgotten": dict(apgd=best_forgotten),
    }
)
def test_apgd_halves_its_steps(apgd=attacks.apgd):
    """A maximum inside the budget is reached to 1e-3, which a step of fixed size circles around; steps only halve."""
    x = torch.full((3, *SHAPE), 0.5, dtype=torch.float64)
    y = torch.zeros(3, dtype=torch.long)
    model = Bowl(
        x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    )
    frames = list(apgd(model, x, y, 0.5, norm="l2", steps=100))
    values = torch.stack([f.logits[:, 1] for f in frames])
    assert bool((values.diff(dim=0) >= 0).all()), "the best so far never gets worse"
    assert float((frames[-1].x - model.top).abs().max()) < 1e-3
    sizes = torch.stack([f.step_size for f in frames])
    ratio = sizes[1:] / sizes[:-1]
    assert (
        bool(((ratio == 1) | (ratio == 0.5)).all())
        and float(sizes[0, 0]) == 1.0
        and float(sizes[-1].max()) < 0.02
    )
    assert [f.step for f in frames] == list(range(101))
    assert all(torch.equal(f.value, attacks.margin_loss(model(f.at), y)) for f in frames), (
        "the way is recorded"
    )


class Scripted(TwoClasses):
    """The margin at the n-th call is the n-th number of a script, wherever it is asked; its slope is one."""

    def __init__(self, script):
        super().__init__()
        self.script = iter(script)

    def logits(self, x, noise):
        """Logits 0 and the next margin."""
        height = next(self.script) + (x - x.detach()).flatten(1).sum(1)
        return torch.stack([torch.zeros_like(height), height], 1)


class RareRisesAlone(search._Halving):
    """Steps are halved where the loss rises too rarely, and never because its best stays what it was."""

    def after(self, value, best):
        self.best = torch.full_like(best, -math.inf)
        return super().after(value, best)


class NoNewBestAlone(search._Halving):
    """Steps are halved where the best stays what it was, however rarely the loss rises."""

    def after(self, value, best):
        self.rises = torch.full_like(value, math.inf)
        return super().after(value, best)


class HalvedWithoutRest(search._Halving):
    """Steps are halved for want of a new best even right after they have been halved."""

    def after(self, value, best):
        self.halved = torch.zeros_like(self.halved)
        return super().after(value, best)


class BestOfTheStart(search._Halving):
    """The best is compared with that of the start, not of the last look."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.start = self.best

    def after(self, value, best):
        self.best = self.start
        return super().after(value, best)


@twins.rejected(
    {
        "second condition dead": dict(
            apgd=twins.patched(attacks.apgd, search, _Halving=RareRisesAlone)
        ),
        "first condition dead": dict(
            apgd=twins.patched(attacks.apgd, search, _Halving=NoNewBestAlone)
        ),
        "halved again at once": dict(
            apgd=twins.patched(attacks.apgd, search, _Halving=HalvedWithoutRest)
        ),
        "best of the start": dict(
            apgd=twins.patched(attacks.apgd, search, _Halving=BestOfTheStart)
        ),
    }
)
def test_apgd_halves_where_the_loss_rises_rarely_or_finds_no_new_best(apgd=attacks.apgd):
    """Looks after 22, 19, 16, 13, 10, 7, 6, 6 of 100 steps, as Croce & Hein's code; both conditions by a script."""
    falls_then_rises = [list(range(-100, -100 + stretch)) for stretch in (19, 16, 13)]
    script = [
        *range(23),  # the start, and 22 rises with a new best
        *falls_then_rises[0],  # 18 rises of 19, none above the best: halved
        *falls_then_rises[1],  # 15 of 16, but halved just before: not again
        *falls_then_rises[2],  # 12 of 13: halved
        *range(-200, -210, -1),  # no rise at all: halved
        *range(100, 120),  # new bests to the end: not halved any more
    ]
    assert len(script) == 101
    x = torch.full((2, *SHAPE), 0.5, dtype=torch.float64)
    *_, last = frames = list(apgd(Scripted(script), x, torch.zeros(2).long(), 0.4, steps=100))
    halvings = [
        f.step
        for f, g in zip(frames[1:], frames, strict=False)
        if not f.step_size.equal(g.step_size)
    ]
    assert halvings == [41, 70, 80], halvings
    assert last.step_size.tolist() == [0.1, 0.1] and float(frames[0].step_size[0]) == 0.8


def test_attacks_without_a_slip_pass_as_twins():
    test_pgd_reaches_the_exact_robust_accuracy.check(
        pgd=twins.patched(attacks.pgd, search, ascent=ASCENT)
    )
    test_apgd_halves_where_the_loss_rises_rarely_or_finds_no_new_best.check(
        apgd=twins.patched(attacks.apgd, search, _Halving=search._Halving)
    )


@pytest.mark.parametrize("norm, epsilon", [("linf", 0.02), ("l2", 0.08)])
def test_apgd_walks_as_torchattacks_does(norm, epsilon, monkeypatch):
    """From the same start the same points: its Croce & Hein loop against ours, on a classifier that is not linear."""
    import torchattacks

    x, y = images(12)
    model = Curved()
    theirs = torchattacks.APGD(
        model, norm=norm.capitalize(), eps=epsilon, steps=30, n_restarts=1, seed=0, loss="ce"
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        t = 2 * torch.rand(x.shape) - 1 if norm == "linf" else torch.randn(x.shape)
        flat = t.reshape(len(x), -1)
        length = flat.abs().amax(1) if norm == "linf" else flat.norm(dim=1)
        torch.manual_seed(5)
        _, _, loss, best = theirs.attack_single_run(x, y)
    push = epsilon * (t / length[:, None, None, None])
    monkeypatch.setattr(search, "_start", lambda *_: (x + push).clamp(0, 1))
    *_, last = attacks.apgd(
        model, x, y, epsilon, norm=norm, steps=30, loss=attacks.cross_entropy_loss
    )
    assert torch.allclose(attacks.cross_entropy_loss(last.logits, y), loss.to(x.dtype), atol=1e-6)


class Curved(Linear):
    """Three classes with curved boundaries."""

    def __init__(self):
        super().__init__(3)
        generator = torch.Generator().manual_seed(3)
        self.bent = nn.Parameter(2 * torch.randn(3, 16, generator=generator, dtype=torch.float64))

    def logits(self, x, noise):
        """Linear logits and a wave."""
        return super().logits(x, noise) + (40 * x.flatten(1)).sin() @ self.bent.T


@pytest.mark.parametrize(
    "name, norm, epsilon, step", [("PGD", "linf", 0.02, 0.005), ("PGDL2", "l2", 0.05, 0.02)]
)
def test_pgd_walks_as_torchattacks_does(name, norm, epsilon, step):
    """From the same start the same image, to rounding."""
    x, y = images(40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        moved = library(name, Curved())(x, y)
    *_, last = attacks.pgd(
        Curved(), x, y, epsilon, norm=norm, steps=8, step_size=step, loss=attacks.cross_entropy_loss
    )
    assert (
        torch.allclose(last.x, moved.to(x.dtype), atol=1e-6)
        and float((last.x - x).abs().max()) > 0.01
    )


# ---------------------------------------------------------------------------------------------------------------------
# Randomness: averaged gradients, restarts


class Jittered(Linear):
    """A linear classifier whose slope is drawn around its own: the noise of a picture is a slope for each class."""

    def __init__(self, size: float = 1.0):
        super().__init__()
        self.size = size

    def sample_noise(self, images, generator):
        """Slopes [images,2,D] of mean zero."""
        shape = (images, 2, math.prod(self.image_shape))
        return self.size * torch.randn(shape, generator=generator, dtype=torch.float64)

    def logits(self, x, noise):
        """Logits with the slopes of the noise added."""
        return super().logits(x, noise) + ((x.flatten(1) - 0.5)[:, None] * noise).sum(-1)


def drawn_anew(classifier, images: int, seed: int = 5):
    """New noise for every call from one stream, whatever the step and the draw."""
    generator = torch.Generator().manual_seed(seed)
    return lambda step, draw: classifier.sample_noise(images, generator)


def test_averaging_over_draws_beats_one_draw_on_a_random_classifier():
    """A linear model with gradient noise: the mean of 64 draws points along w more closely than one draw does."""
    model = Jittered(3.0)
    x, y = images(1)
    along = {}
    for draws in (1, 64):
        *_, last = attacks.pgd(
            model, x, y, 0.05, noise=drawn_anew(model, 1), norm="l2", steps=1, draws=draws
        )
        push = (last.x - x).flatten()
        along[draws] = abs(float(torch.cosine_similarity(push, model.normal, dim=0)))
    assert along[64] > 0.8 > along[1], along


def summed(*arguments, draws=1, **options):
    """Gradients added up over the draws, not averaged."""
    gradient, logits, value = attacks.expected_gradient(*arguments, draws=draws, **options)
    return draws * gradient, logits, value


def one_draw(*arguments, draws=1, **options):
    """The gradient of one draw, however many are asked for."""
    return attacks.expected_gradient(*arguments, **options)


def first_draw_again(*arguments, noise, **options):
    """Every draw with the noise of the first."""
    held = noise(0, 0)
    return attacks.expected_gradient(*arguments, noise=lambda step, draw: held, **options)


@twins.rejected(
    {
        "a sum": dict(gradient_of=summed),
        "one draw for all": dict(gradient_of=one_draw),
        "the same noise in every draw": dict(gradient_of=first_draw_again),
    }
)
def test_the_variance_of_averaged_gradients_falls_as_one_over_the_draws(
    gradient_of=attacks.expected_gradient,
):
    """The mean of n draws has variance 2/n in each pixel of the margin's gradient: slope -1 in a log-log plot."""
    model = Jittered()
    x, _ = images(1)
    x = x.expand(800, -1, -1, -1)
    y = torch.zeros(800, dtype=torch.long)
    drawn = drawn_anew(model, 800)
    counts = [1, 2, 4, 8, 16]
    spread = [
        float(gradient_of(model, x, y, noise=drawn, draws=n)[0].flatten(1).var(0).mean())
        for n in counts
    ]
    for n, variance in zip(counts, spread, strict=True):
        assert abs(variance * n / 2 - 1) < 0.06, (n, variance)
    logs = torch.tensor([counts, spread]).double().log()
    along = ((logs[0] - logs[0].mean()) * (logs[1] - logs[1].mean())).sum()
    slope = float(along / logs[0].var(correction=0) / 5)
    assert abs(slope + 1) < 0.03, slope
    model = Linear()
    gradient, logits, value = gradient_of(model, x, y, noise=lambda step, draw: (), draws=3)
    assert torch.allclose(gradient.flatten(1), model.normal.expand(800, -1)), "a mean, not a sum"
    assert torch.allclose(value, attacks.margin_loss(logits, y))
    assert torch.allclose(logits, model(x).detach())


@pytest.mark.parametrize("attack", [attacks.pgd, attacks.apgd])
def test_noise_is_asked_for_by_step_and_draw(attack):
    """Every call has its own step and draw: in order, each once, with none behind the last frame."""
    model = Jittered()
    x, y = images(2)
    asked = []

    def drawn(step, draw):
        asked.append((step, draw))
        return model.sample_noise(2, torch.Generator().manual_seed(10 * step + draw))

    frames = list(attack(model, x, y, 0.02, noise=drawn, steps=3, draws=2))
    assert asked == [(step, draw) for step in range(4) for draw in range(2)]
    last = torch.stack([model(frames[-1].x, drawn(3, draw)).detach() for draw in range(2)])
    if attack is attacks.pgd:
        assert torch.allclose(frames[-1].logits, last.mean(0)), (
            "a frame shows the mean of its draws"
        )
    gradient, logits, value = attacks.expected_gradient(model, x, y, noise=drawn, step=7)
    assert asked[-1] == (7, 0) and torch.equal(logits, model(x, drawn(7, 0)).detach())


@pytest.mark.parametrize("attack", [attacks.pgd, attacks.apgd])
def test_one_noise_is_held_for_all_steps(attack):
    """The noise of one picture for all is the attack on `Held`; a noise for each picture is each picture's own attack."""
    model = Jittered()
    x, y = images(5)
    shared = model.sample_noise(1, torch.Generator().manual_seed(3))
    *_, given = attack(model, x, y, 0.05, noise=shared, steps=5)
    *_, held = attack(Held.seeded(model, 3), x, y, 0.05, steps=5)
    assert torch.equal(given.x, held.x) and torch.equal(given.logits, held.logits)
    own = model.sample_noise(5, torch.Generator().manual_seed(4))
    *_, together = attack(model, x, y, 0.05, noise=own, steps=5)
    for i in range(5):
        one = slice(i, i + 1)
        *_, alone = attack(model, x[one], y[one], 0.05, noise=take(own, one), steps=5)
        assert torch.allclose(alone.x, together.x[one], atol=1e-12)


def test_fresh_noise_of_a_key_does_not_depend_on_the_batch():
    """An attack on some pictures, by their place in the whole, is that part of the attack on all of them."""
    model = Jittered()
    x, y = images(70)
    kept = torch.tensor([66, 2, 40])
    options = dict(norm="l2", steps=3, draws=2)
    whole = fresh_noise(model, 70, 8, "attack")
    some = fresh_noise(model, 70, 8, "attack", kept=kept)
    *_, every = attacks.pgd(model, x, y, 0.05, noise=whole, **options)
    *_, few = attacks.pgd(model, x[kept], y[kept], 0.05, noise=some, **options)
    assert torch.allclose(few.x, every.x[kept], atol=1e-12)
    assert torch.allclose(few.logits, every.logits[kept], atol=1e-12)
    keys = [whole(0, 0), whole(1, 0), whole(0, 1)]
    assert not any(torch.equal(a, b) for a, b in zip(keys, keys[1:] + keys[:1], strict=True))
    assert torch.equal(whole(1, 0), keys[1]), "the same key, the same noise"
    other = fresh_noise(model, 70, 9, "attack")
    *_, another = attacks.pgd(model, x, y, 0.05, noise=other, **options)
    assert not torch.allclose(another.x, every.x, atol=1e-3)


def test_a_random_classifier_without_its_noise_gets_a_sentence():
    model = Jittered()
    x, y = images(3)
    for attack in (attacks.pgd, attacks.apgd):
        with pytest.raises(
            ValueError, match=r"expected noise of shape \[B,2,16\] for Jittered, got"
        ):
            next(attack(model, x, y, 0.1))
        with pytest.raises(ValueError, match="expected noise for 3 pictures, or one noise for all"):
            next(attack(model, x, y, 0.1, noise=torch.zeros(2, 2, 16)))
        with pytest.raises(ValueError, match="as the noise of 4 draws, got one noise"):
            next(attack(model, x, y, 0.1, noise=torch.zeros(3, 2, 16), draws=4))
    with pytest.raises(
        ValueError, match=r"expected noise of shape \(\) for Linear, got \[B,2,16\]"
    ):
        next(attacks.pgd(Linear(), x, y, 0.1, noise=torch.zeros(3, 2, 16)))


def test_the_smallest_attack_on_a_random_classifier_is_judged_under_one_noise():
    """Its gradients have new noise; what fooled is judged by the first noise alone, or by the judge that is given."""
    model = Jittered(0.5)
    x, y = images(1)
    drawn = fresh_noise(model, 1, 0, "smallest")
    judge = Held(model, drawn(0, 0))
    y = judge(x).argmax(1)
    *_, best = attacks.smallest_l2(model, x, y, noise=drawn, draws=4, rounds=10)
    assert int(judge(best).argmax(1)) != int(y)
    size = float(attacks.size_of(best - x, "l2"))
    slope = (model.normal + judge.noise[0].diff(dim=0)[0]).norm()
    distance = float(judge(x).diff(dim=1).abs()[0, 0].detach() / slope)
    assert distance * (1 - 1e-9) <= size <= 1.5 * distance, (size, distance)


def last_run_wins(runs):
    """Restarts that forget what fell before."""
    return [list(run)[-1] for run in runs]


@twins.rejected({"the last run wins": dict(worst_case=last_run_wins)})
def test_restarts_keep_the_worst_of_each_image(worst_case=attacks.worst_case):
    """Robust to all is what no run fooled; a fooled image is kept, and kept as it first was."""
    model = Curved()
    x, y = images(60)
    y = model(x).argmax(1)

    def runs():
        return [
            attacks.pgd(model, x, y, 0.02, steps=2, generator=torch.Generator().manual_seed(seed))
            for seed in range(4)
        ]

    lasts = [list(run)[-1] for run in runs()]
    alone = torch.stack([last.fooled for last in lasts])
    frames = list(worst_case(runs()))
    assert len(frames) == 4 and int(alone.any(0).sum()) > int(alone.sum(1).max()), (
        "restarts have to matter here"
    )
    for i, frame in enumerate(frames):
        assert torch.equal(frame.fooled, alone[: i + 1].any(0))
        assert torch.equal(frame.fooled, model(frame.x).argmax(1) != y) and torch.equal(
            frame.logits, model(frame.x)
        )
    assert torch.equal(frames[-1].x[alone[0]], lasts[0].x[alone[0]])


def test_an_interrupted_search_keeps_its_result():
    """An attack is a generator: whatever stops it, the last frame is a whole result."""
    model = Linear()
    x, y = images(10)
    kept = None
    with pytest.raises(KeyboardInterrupt):
        for frame in attacks.worst_case(attacks.apgd(model, x, y, 0.05, steps=5) for _ in range(3)):
            kept = frame
            raise KeyboardInterrupt
    assert bool(kept.fooled.any()) and torch.equal(kept.fooled, model(kept.x).argmax(1) != y)


def test_a_penalty_is_subtracted_from_the_loss():
    """A penalty on leaving the image keeps the attack at the point where the two slopes balance."""
    model = Linear()
    x, y = images(3)
    strength = 20.0
    frames = attacks.apgd(
        model,
        x,
        y,
        0.5,
        norm="l2",
        steps=60,
        penalty=lambda image: strength * ((image - x) ** 2).flatten(1).sum(1),
    )
    *_, last = frames
    signs = torch.where(y == 0, 1.0, -1.0)[:, None]
    balance = signs * model.normal / (2 * strength)
    assert (
        torch.allclose((last.x - x).flatten(1), balance, atol=3e-3)
        and float(balance.abs().max()) > 0.03
    )


# ---------------------------------------------------------------------------------------------------------------------
# Classifiers that cannot be attacked as they are


class Answers(nn.Module):
    """A linear classifier seen through something that hides its logits, in somebody else's module."""

    def __init__(self, hide):
        super().__init__()
        self.linear = Linear(3)
        self.hide = hide

    def forward(self, x):
        """hide(logits)."""
        return self.hide(self.linear(x))


def foreign(hide) -> Foreign:
    """What attacks are given of it."""
    return Foreign(Answers(hide), 3, SHAPE).eval()


@pytest.mark.parametrize("attack", [attacks.pgd, attacks.apgd])
@pytest.mark.parametrize(
    "hide, error, sentence",
    [
        (lambda f: f.softmax(1), ValueError, "expected logits, got rows of probabilities"),
        (lambda f: 100 * f.softmax(1), ValueError, "expected logits, got rows of percent"),
        (
            lambda f: f.detach(),
            TypeError,
            "expected logits that depend on the image differentiably",
        ),
        (
            lambda f: f.detach().requires_grad_(),
            TypeError,
            "expected logits that depend on the image differentiably",
        ),
        (
            lambda f: nn.functional.one_hot(f.argmax(1), 3).double() * 7,
            TypeError,
            "counts votes, or runs under",
        ),
        (lambda f: f[:, :2], ValueError, r"expected logits of shape \[4,3\], got \[4, 2\]"),
    ],
)
def test_classifiers_that_hide_their_logits_get_a_sentence(attack, hide, error, sentence):
    x, _ = images(4)
    with pytest.raises(error, match=sentence):
        list(attack(foreign(hide), x, torch.zeros(4, dtype=torch.long), 0.1, steps=2))


@pytest.mark.parametrize(
    "images_of, sentence",
    [
        (lambda x: 2 * x - 1, r"these look like model space \[-1,1\]; pass units.to_pixel"),
        (lambda x: 255 * x, r"these look like \[0,255\]; divide by 255"),
    ],
)
def test_images_in_other_ranges_get_a_sentence(images_of, sentence):
    x, y = images(4)
    with pytest.raises(ValueError, match=sentence):
        next(attacks.apgd(Linear(), images_of(torch.cat([x[:3], 0 * x[3:]])), y, 8 / 255))


def test_counts_that_cannot_be_meant_get_a_sentence():
    x, y = images(2)
    with pytest.raises(ValueError, match="expected at least one draw to average over, got 0"):
        next(attacks.pgd(Linear(), x, y, 0.1, draws=0))
    with pytest.raises(ValueError, match="expected steps >= 0, got -1"):
        next(attacks.apgd(Linear(), x, y, 0.1, steps=-1))
    with pytest.raises(ValueError, match="did you mean 8/255"):
        next(attacks.apgd(Linear(), x, y, 8))
    with pytest.raises(FloatingPointError, match="logits became NaN at step 0"):
        next(attacks.apgd(foreign(lambda f: f + math.nan), x, y, 0.1))


# ---------------------------------------------------------------------------------------------------------------------
# What an attack that knows the defence does: other gradients, another loss


def test_a_stand_in_has_the_values_of_one_and_the_gradient_of_the_other():
    model = plane_classifier()
    x, _ = plane_points()
    generator = torch.Generator().manual_seed(0)
    slope = torch.randn(4, 3, 2, 1, 1, generator=generator, dtype=torch.float64)
    drawn = model.sample_noise(4, generator)
    seen = []

    def slope_of(z):
        seen.append(z)
        return slope

    whole = StandIn(model, slope_of)
    with torch.no_grad():
        assert torch.equal(whole(x, drawn), model(x, drawn)) and not seen, "no gradient, no cost"
    leaf = x.clone().requires_grad_()
    logits = whole(leaf, drawn)
    assert torch.equal(logits, model(x, drawn)) and torch.equal(seen[0], units.to_model(x))
    for k in range(3):
        per_pixel = torch.autograd.grad(logits[:, k].sum(), leaf, retain_graph=True)[0]
        assert torch.allclose(per_pixel, 2 * slope[:, k]), "per pixel, twice that per model unit"
    assert (whole.num_classes, whole.image_shape, whole.deterministic) == (3, (2, 1, 1), False)


def test_the_telescoped_attack_is_as_strong_as_autograd_where_the_denoiser_is_exact():
    """Two levels without a backward pass fool as many points as autograd through all levels."""
    model = plane_classifier()
    even = NoiseBank.sobol(model.levels, (2, 1, 1), 16, dtype=torch.float64)
    drawn = even.noise.movedim(2, 0)
    x, _ = plane_points(60)
    y = model(x, drawn).argmax(1)
    fooled = {}
    for name, route in (("autograd", model), ("telescoped", telescoped(model, 64))):
        *_, last = attacks.pgd(route, x, y, 0.1, noise=drawn, norm="l2", steps=5)
        fooled[name] = int((model(last.x, drawn).argmax(1) != y).sum())
    assert fooled["autograd"] > 10 and abs(fooled["autograd"] - fooled["telescoped"]) <= 3, fooled
    with pytest.raises(ValueError, match="got edm_weight; use jacobian_free"):
        telescoped(plane_classifier(weighting=noise.edm_weight), 4)


def test_the_telescoped_gradient_is_that_of_logits_at_their_temperature():
    """Per pixel unit and over the temperature: twice the gradient of the ends, a quarter of it at temperature 4."""
    x, y = plane_points()
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn((8, 1, 2, 1, 1), generator=generator)
    for temperature in (1.0, 4.0):
        model = plane_classifier(temperature=temperature)
        drawn = model.sample_noise(4, generator)
        slope = likelihood.telescoped_gradient(model.denoiser, units.to_model(x), 0.05, 5.0, eps)
        got = attacks.expected_gradient(
            telescoped(model, 8), x, y, noise=drawn, loss=lambda logits, y: logits[:, 1]
        )[0]
        assert torch.allclose(got, 2 * slope[:, 1] / temperature, rtol=1e-9)


def summed_over_pixels(denoiser, bank, strength):
    """The penalty with a sum over the two pixels in place of their mean."""
    return attacks.unlikeliness(denoiser, bank, 2 * strength)


def rewarding(denoiser, bank, strength):
    """A penalty that rewards what it should punish."""
    penalty = attacks.unlikeliness(denoiser, bank, strength)
    return lambda x: -penalty(x)


@twins.rejected(
    {
        "sum over pixels": dict(penalty_of=summed_over_pixels),
        "sign": dict(penalty_of=rewarding),
    }
)
def test_the_lagrange_penalty(penalty_of=attacks.unlikeliness):
    """The penalty is the loss that likelihood maximisation lowers; with it an attack ends at likelier points."""
    model = plane_classifier(8, 8)
    denoiser = model.denoiser
    levels = noise.log_levels(0.4, 0.6, 3)
    bank = NoiseBank.fixed(levels, (2, 1, 1), 4, dtype=torch.float64)
    x, _ = plane_points()
    z = units.to_model(x)
    total = 0.0
    for sigma, draws in zip(bank.sigma, bank.noise, strict=True):
        for eps in draws:
            error = denoiser.unconditional(z + sigma * eps, sigma) - z
            total = total + (error**2).flatten(1).mean(1)
    assert torch.allclose(penalty_of(denoiser, bank, 3.0)(x), 3 * total / 12)
    even = NoiseBank.sobol(model.levels, (2, 1, 1), 8, dtype=torch.float64)
    x, y = plane_points(20)
    ends = {}
    for strength in (0.0, 300.0):
        penalty = penalty_of(denoiser, bank, strength)
        *_, last = attacks.pgd(
            model,
            x,
            y,
            0.1,
            noise=even.noise.movedim(2, 0),
            norm="l2",
            steps=5,
            penalty=penalty,
        )
        ends[strength] = float(penalty_of(denoiser, bank, 3.0)(last.x).mean())
    assert ends[300.0] < 0.9 * ends[0.0], ends


def of_strength(strength):
    """The attack with another strength than one nat for one nat."""
    return lambda *given, **options: attacks.lagrange(*given, **{**options, "strength": strength})


def maximising(band=(0.4, 0.6)):
    """The plane's classifier behind one step of likelihood maximisation."""
    model = plane_classifier(8, 8)
    first = LikelihoodMaximisation(model.denoiser, steps=1, rate=0.02, band=band)
    return PurifiedClassifier(first, model)


@twins.rejected(
    {
        "no penalty": dict(lagrange=of_strength(0.0)),
        "half a nat": dict(lagrange=of_strength(0.5)),
    }
)
def test_the_lagrange_attack_is_pgd_on_the_loss_less_the_nats(lagrange=attacks.lagrange):
    """The penalty, written out, is the mean over the band of the squared error of all pixels over 2 sigma^2."""
    whole = maximising()
    model = whole.gradients()["bpda"]
    x, y = plane_points(20)
    generator = torch.Generator().manual_seed(0)
    drawn = model.sample_noise(1, generator)
    levels = noise.log_levels(0.4, 0.6, 3)
    bank = NoiseBank.fixed(levels, (2, 1, 1), dtype=torch.float64)

    def nats(points):
        z = units.to_model(points)
        total = 0.0
        for sigma, eps in zip(bank.sigma, bank.noise, strict=True):
            error = model.purifier.denoiser.unconditional(z + sigma * eps[0], sigma) - z
            total = total + (error**2).flatten(1).sum(1) / 3
        return total / (2 * 0.4 * 0.6)

    options = dict(noise=drawn, norm="l2", steps=8, step_size=0.01)
    *_, wanted = attacks.pgd(model, x, y, 0.1, penalty=nats, **options)
    *_, last = lagrange(model, x, y, 0.1, **options)
    assert torch.allclose(last.x, wanted.x, atol=1e-9)


def test_with_the_lagrange_penalty_an_attack_ends_at_likelier_images():
    model = maximising().gradients()["bpda"]
    x, y = plane_points(40)
    drawn = model.sample_noise(1, torch.Generator().manual_seed(0))
    bank = NoiseBank.sobol(noise.log_levels(0.4, 0.6, 3), (2, 1, 1), 8, dtype=torch.float64)
    loss_of = attacks.unlikeliness(model.purifier.denoiser, bank, 1.0)
    options = dict(noise=drawn, norm="l2", steps=8)
    *_, free = attacks.pgd(model, x, y, 0.1, **options)
    *_, bound = attacks.lagrange(model, x, y, 0.1, strength=300.0, **options)
    assert float(loss_of(bound.x).mean()) < 0.9 * float(loss_of(free.x).mean())


def test_a_classifier_says_what_it_maximises():
    whole = maximising(band=(0.3, 0.7))
    denoiser = whole.classifier.denoiser
    assert whole.prior() == (denoiser, (0.3, 0.7))
    assert Held.seeded(whole).prior() == (denoiser, (0.3, 0.7))
    assert whole.gradients()["bpda"].prior() == (denoiser, (0.3, 0.7))
    model = whole.classifier
    x, y = plane_points()
    for other in (model, PurifiedClassifier(Purification(denoiser), model)):
        assert other.prior() is None
        with pytest.raises(ValueError, match="expected a classifier that maximises a likelihood"):
            attacks.lagrange(other, x, y, 0.1)


# ---------------------------------------------------------------------------------------------------------------------
# Bent images


@twins.rejected(
    {
        "the other way": dict(warp=lambda x, flow: attacks.warp(x, -flow)),
        "rows for columns": dict(warp=lambda x, flow: attacks.warp(x, flow.flip(1))),
        "three times as far": dict(warp=lambda x, flow: attacks.warp(x, flow * 3)),
    }
)
def test_warp(warp=attacks.warp):
    """No flow leaves the image; a whole pixel is a shift, right or down; on a ramp the flow is read off exactly."""
    x = torch.rand(2, 3, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flow = torch.zeros(2, 2, 5, 6, dtype=torch.float64)
    assert torch.allclose(warp(x, flow), x)
    right = flow.clone()
    down = flow.clone()
    right[:, 0] = 1
    down[:, 1] = 1
    shifted = warp(x, right)
    assert torch.allclose(shifted[..., :-1], x[..., 1:])
    assert torch.allclose(shifted[..., -1], x[..., -1])
    assert torch.allclose(warp(x, down)[:, :, :-1], x[:, :, 1:])
    ramp = (0.1 * torch.arange(6, dtype=torch.float64)).expand(2, 1, 5, 6)
    uniform = torch.rand(
        flow.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    flow = 0.8 * uniform - 0.4
    assert torch.allclose((warp(ramp, flow) - ramp)[:, 0, :, 1:-1], 0.1 * flow[:, 0, :, 1:-1])


class Weighed(Classifier):
    """Two classes; the second's logit is a weighted sum of the pixels that are not at the edge, plus its noise."""

    scale = "scores"
    calls = 1
    num_classes = 2
    image_shape = (1, 5, 6)

    def __init__(self, noisy: bool = False):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = torch.zeros(5, 6, dtype=torch.float64)
        self.weights[1:-1, 1:-1] = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        self.noisy = noisy

    def sample_noise(self, images, generator):
        """A shift of the logit of each picture."""
        return torch.randn(images, generator=generator) if self.noisy else ()

    def logits(self, x, noise):
        """Logits 0 and sum w x."""
        score = (x[:, 0] * self.weights).sum((1, 2))
        score = score + noise if self.noisy else score
        return torch.stack([torch.zeros_like(score), score], 1)


def test_bending_a_ramp_gains_slope_times_bound_times_the_weights():
    """On a ramp of slope 0.1 a flow within the bound moves a linear score by 0.1 bound ||w||_1, and no more."""
    model = Weighed()
    y = torch.zeros(2, dtype=torch.long)
    ramp = (0.2 + 0.1 * torch.arange(6, dtype=torch.float64)).expand(2, 1, 5, 6).clone()
    bent = attacks.Bent(model, ramp, 0.4)
    for attack in (attacks.pgd, attacks.apgd):
        *_, last = attack(bent, bent.straight, y, 0.5, steps=10)
        gain = last.logits[:, 1] - model(ramp)[:, 1]
        assert torch.allclose(gain, 0.1 * 0.4 * model.weights.abs().sum().expand(2))
        assert torch.equal(model(bent.image(last.x)), last.logits)
    *_, last = attacks.pgd(attacks.Bent(model, ramp, 0.0), bent.straight, y, 0.5, steps=3)
    assert torch.allclose(last.logits, model(ramp)), "without a bound nothing bends"


def test_a_bent_classifier_hands_the_noise_on():
    model = Weighed(noisy=True)
    x = torch.rand(3, 1, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bent = attacks.Bent(model, x, 0.4)
    drawn = bent.sample_noise(3, torch.Generator().manual_seed(1))
    assert torch.equal(drawn, model.sample_noise(3, torch.Generator().manual_seed(1)))
    assert torch.equal(bent(bent.straight, drawn), model(bent.image(bent.straight), drawn))
    with pytest.raises(ValueError, match=r"expected noise of shape \[B\] for Bent, got \(\)"):
        bent(bent.straight)


@pytest.mark.parametrize(
    "make, sentence",
    [
        (
            lambda: attacks.unlikeliness(
                MixtureDenoiser.of_law(data.mixtures()),
                NoiseBank.fixed(noise.log_levels(0.4, 0.6, 3), (2, 1, 1)),
                -1.0,
            ),
            "expected a strength >= 0, got -1.0",
        ),
        (
            lambda: attacks.Bent(Weighed(), torch.zeros(1, 1, 5, 6), -0.1),
            "expected a bound >= 0 in pixel widths, got",
        ),
        (lambda: attacks.Bent(Weighed(), torch.full((1, 1, 5, 6), 9.0), 0.1), "divide by 255"),
        (
            lambda: attacks.Bent(Weighed(), torch.zeros(1, 1, 5, 6), 0.1)(torch.zeros(2, 2, 5, 6)),
            "each of 1 images, got",
        ),
    ],
)
def test_what_cannot_be_meant_gets_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
