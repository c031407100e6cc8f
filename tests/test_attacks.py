"""Attacks on classifiers whose answer is known in closed form, and the view that keeps attack libraries honest."""

import math
import warnings

import pytest
import torch
from diffclass import attacks, data, noise
from diffclass.attacks.views import AttackView
from diffclass.classifiers.bayes import BayesClassifier
from diffclass.denoisers.exact import MixtureDenoiser
from diffclass.noise import NoiseBank
from torch import nn

SHAPE = (1, 4, 4)


class Linear(nn.Module):
    """Logits scale * (W x + b) - shift: robust accuracy, distance and gradient are known exactly."""

    def __init__(self, classes: int = 2, scale: float = 1.0, shift: float = 0.0, shape=SHAPE):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        size = math.prod(shape)
        self.weight = nn.Parameter(
            torch.randn(classes, size, generator=generator, dtype=torch.float64)
        )
        self.bias = nn.Parameter(
            -self.weight.detach().sum(1) / 2
        )  # the middle of the cube is on the boundary
        self.scale = scale
        self.shift = shift
        self.num_classes = classes
        self.image_shape = shape

    def forward(self, x):
        """Logits."""
        return self.scale * (x.flatten(1) @ self.weight.T.to(x) + self.bias.to(x)) - self.shift

    @property
    def normal(self):
        """w_1 - w_0, the direction across the boundary of two classes."""
        return (self.weight[1] - self.weight[0]).detach()

    def margin(self, x):
        """|f_1 - f_0|, how far ahead the predicted class is."""
        return self(x).detach().diff(dim=1).abs()[:, 0] / self.scale


def images(count: int = 200, seed: int = 0):
    """Images around the middle of the cube, far from its faces, and the labels that `Linear` gives them."""
    uniform = torch.rand(
        count, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    x = 0.45 + 0.1 * uniform
    return x, Linear()(x).argmax(1)


# ---------------------------------------------------------------------------------------------------------------------
# PGD against closed forms


def check_pgd(pgd=attacks.pgd):
    """On a linear model PGD reaches the exact robust accuracy: an image falls iff its margin is below eps ||w||_q.

    The logits' scale does not matter: a step follows the direction of the gradient, not its length.
    """
    x, y = images()
    for scale in (1e-3, 1.0, 1e3):
        model = Linear(scale=scale)
        for norm, q, budgets in (("linf", 1, (0.002, 0.01, 0.03)), ("l2", 2, (0.01, 0.03, 0.1))):
            for epsilon in budgets:
                *_, last = pgd(model, x, y, epsilon, norm=norm, steps=10)
                falls = model.margin(x) < epsilon * model.normal.norm(p=q)
                assert torch.equal(last.fooled, falls), (scale, norm, epsilon)
                assert 0.01 < float(falls.double().mean()), (
                    "a budget at which nothing falls proves nothing"
                )


def test_pgd_reaches_the_exact_robust_accuracy():
    check_pgd()


@pytest.mark.parametrize("norm, q", [("linf", 1), ("l2", 2)])
def test_one_step_gains_epsilon_times_the_dual_norm(norm, q):
    model = Linear()
    (x, y) = images(20)
    first, last = attacks.pgd(model, x, y, 0.02, norm=norm, steps=1)
    gain = attacks.margin_loss(last.logits, y) - attacks.margin_loss(first.logits, y)
    assert torch.allclose(gain, 0.02 * model.normal.norm(p=q), rtol=1e-9)
    assert torch.allclose(last.size, torch.full((20,), 0.02, dtype=torch.float64), rtol=1e-9)


def test_every_frame_is_kept_and_inside_the_budget():
    model = Linear(3)
    (x, y) = images(10)
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
    (x, y) = images(5)
    for norm in ("linf", "l2"):
        *_, last = attacks.pgd(model, x, y, 0.0, norm=norm, steps=3)
        assert torch.equal(last.x, x) and not bool(last.fooled.any())


def check_projection(project=attacks.project):
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


def test_projection():
    check_projection()


def check_margin_loss(loss=attacks.margin_loss):
    """max over wrong classes minus the right one: positive exactly when fooled."""
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, -5.0, 4.0], [1.0, 2.0, -7.0]])
    assert loss(logits, torch.tensor([0, 2, 2])).tolist() == [-1.0, -4.0, 9.0]


def test_losses():
    check_margin_loss()
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    assert torch.allclose(
        attacks.cross_entropy_loss(logits, y), -torch.log_softmax(logits, 1)[torch.arange(6), y]
    )


def test_averaging_over_draws_beats_one_draw_on_a_random_classifier():
    """A linear model with gradient noise: the mean of 64 draws points along w more closely than one draw does."""

    class Noisy(Linear):
        generator = torch.Generator().manual_seed(5)

        def forward(self, x):
            """Logits with a random slope of mean zero."""
            slope = 3 * torch.randn(2, x[0].numel(), generator=self.generator, dtype=x.dtype)
            return super().forward(x) + (x.flatten(1) - 0.5) @ slope.T

    model = Noisy()
    (x, y) = images(1)
    along = {}
    for draws in (1, 64):
        *_, last = attacks.pgd(model, x, y, 0.05, norm="l2", steps=1, draws=draws)
        along[draws] = abs(
            float(torch.cosine_similarity((last.x - x).flatten(), model.normal, dim=0))
        )
    assert along[64] > 0.8 > along[1], along


# ---------------------------------------------------------------------------------------------------------------------
# The smallest perturbation


def test_shrink_returns_what_was_tested_and_fools():
    x0 = torch.zeros(1, *SHAPE)
    x = torch.full((1, *SHAPE), 0.2)
    tested = []

    def fooled(image):
        tested.append(image)
        return float(image.max()) > 0.0603

    best = attacks.shrink(fooled, x0, x, rounds=12)
    assert fooled(best) and any(torch.equal(best, t) for t in tested)
    assert 0.0603 < float(best.max()) < 0.0603 + 2 * 0.2 / 2**12
    assert attacks.shrink(lambda image: False, x0, x) is None


def test_the_smallest_attack_on_a_linear_model_is_its_distance():
    """An upper bound by construction, and within 2 % of |margin| / ||w||_2."""
    model = Linear()
    (x, y) = images(12)
    for i in range(12):
        *_, best = attacks.smallest_l2(model, x[i : i + 1], y[i : i + 1], rounds=10)
        found = float(attacks.size_of(best - x[i : i + 1], "l2"))
        distance = float(model.margin(x[i : i + 1]) / model.normal.norm())
        assert distance * (1 - 1e-9) <= found <= 1.02 * distance + 0.25 * 2**-9, (found, distance)
        assert int(model(best).argmax(1)) != int(y[i])


def test_no_attack_within_the_budgets_is_none():
    model = Linear()
    (x, y) = images(1)
    *_, best = attacks.smallest_l2(model, x, y, budgets=(1e-6, 1e-5), steps=2)
    assert best is None


def test_another_judge_can_decide():
    """`fooled` is what decides: a stricter judge gets a larger perturbation."""
    model = Linear()
    (x, y) = images(1)
    *_, plain = attacks.smallest_l2(model, x, y)
    *_, strict = attacks.smallest_l2(
        model, x, y, fooled=lambda image: bool(attacks.margin_loss(model(image), y) > 0.5)
    )
    assert float(attacks.size_of(strict - x, "l2")) > float(attacks.size_of(plain - x, "l2")) + 0.03


def test_pgd_through_a_diffusion_classifier_moves_towards_the_boundary():
    law = data.gaussians()
    bank = NoiseBank.fixed(noise.log_levels(0.02, 10, 24), (2, 1, 1), 4, dtype=torch.float64)
    model = BayesClassifier(MixtureDenoiser.of_law(law), bank, chunk=800)
    x, y = law.sample(8, torch.Generator().manual_seed(0), torch.float64)
    frames = list(attacks.pgd(model, x, y, 0.25, norm="l2", steps=5))
    assert bool(frames[-1].fooled.all())
    gains = [attacks.margin_loss(f.logits, y).mean() for f in frames]
    assert float(gains[-1]) > float(gains[0]) + 1


# ---------------------------------------------------------------------------------------------------------------------
# The view that libraries get


def test_the_view_keeps_decisions_and_gradients():
    model = Linear(4, scale=1e4, shift=1e6)
    (x, _) = images(50)
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

    made = {
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
    return made[name]()


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
    for scale in (1.0, 1e3, 1e6):
        model = Linear(scale=scale, shift=100 * scale)
        fallen[scale] = attacked(
            name, AttackView.calibrated(model.double(), x.double()).float(), x, y
        )[0]
    assert 0 < int(fallen[1.0].sum()) < 40 or name == "CW"
    assert int(fallen[1.0].sum()) > 0
    for scale in (1e3, 1e6):
        assert int((fallen[scale] != fallen[1.0]).sum()) <= 1, (name, scale)


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
    raw, _ = attacked("PGD", Linear(scale=1e6), x, y)
    through, _ = attacked("PGD", AttackView.calibrated(Linear(scale=1e6), x), x, y)
    assert int(raw.sum()) < int(through.sum())


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
        def forward(self, x):
            """Finite logits; their slope is NaN below 0.44, as `where` does not keep the root's own slope out."""
            depth = x.flatten(1).amin(1, keepdim=True) - 0.44
            root = torch.where(depth > 0, depth.sqrt(), 0.0)
            return super().forward(x) + 5 * root * torch.tensor([1.0, 0.0])

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


@pytest.mark.parametrize("steps", [1, 10])
def test_logits_that_are_not_numbers_do_not_count_as_fooled(steps):
    """argmax of NaN is some class: an attack that ends, or passes, where a classifier breaks has fooled nothing."""

    class Undefined(Linear):
        def forward(self, x):
            """Logits that are NaN, with the right slope, once any pixel is below 0.44."""
            return super().forward(x) + torch.where(
                x.flatten(1).amin(1, keepdim=True) < 0.44, math.nan, 0.0
            )

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


def check_dlr(loss=attacks.dlr_loss):
    """The ratio of the margin to the gap between the first and the third; blind to scale and shift of the logits."""
    logits = torch.tensor(
        [[3.0, 1.0, 2.0, -9.0], [0.0, -5.0, 4.0, 3.0], [1.0, 2.0, -7.0, 0.0]], dtype=torch.float64
    )
    y = torch.tensor([0, 2, 2])
    wanted = torch.tensor([-1 / 2, -1 / 4, 9 / 2], dtype=torch.float64)
    for scale, shift in ((1, 0), (1e6, 0), (1e-3, -1e3)):
        assert torch.allclose(loss(scale * logits + shift, y), wanted, rtol=1e-6), (scale, shift)


def test_dlr_loss():
    check_dlr()
    logits = torch.tensor([[5.0, 1.0, 2.0, -2.0, 0.0]])
    y = torch.tensor([0])
    target = torch.tensor([1])
    assert attacks.targeted_loss(target)(logits, y).tolist() == [-4.0]
    assert torch.allclose(
        attacks.targeted_dlr_loss(target)(logits, y), torch.tensor([-4 / (5 - 0.5)])
    )


def test_a_targeted_attack_gains_epsilon_times_the_dual_norm_towards_its_target():
    model = Linear(6)
    (x, _) = images(20)
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


def check_apgd(apgd=attacks.apgd):
    """On a linear model, at any scale, exactly the images fall whose margin is below eps ||w||_q; from any start."""
    x, y = images()
    for scale, start in ((1.0, None), (1e6, 3)):
        model = Linear(scale=scale)
        for norm, q, epsilon in (("linf", 1, 0.01), ("l2", 2, 0.03)):
            generator = None if start is None else torch.Generator().manual_seed(start)
            *_, last = apgd(model, x, y, epsilon, norm=norm, steps=10, generator=generator)
            falls = model.margin(x) < epsilon * model.normal.norm(p=q)
            assert torch.equal(last.fooled, falls), (scale, norm, start)
            assert (
                float(last.size.max()) <= epsilon + 1e-12
                and 0.01 < float(falls.double().mean()) < 0.99
            )


def test_apgd_reaches_the_exact_robust_accuracy():
    check_apgd()


class Bowl(nn.Module):
    """Two classes whose margin has one maximum inside the budget, at `top`: a step that is too long jumps over it."""

    num_classes = 2
    image_shape = SHAPE

    def __init__(self, top):
        super().__init__()
        self.top = top

    def forward(self, x):
        """Logits 0 and 1 - ||x - top||^2."""
        height = 1 - ((x - self.top) ** 2).flatten(1).sum(1)
        return torch.stack([torch.zeros_like(height), height], 1)


def check_halving(apgd=attacks.apgd):
    """A maximum inside the budget is found to 1e-3, which a step of fixed size circles around; steps only halve."""
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


def test_apgd_halves_its_steps():
    check_halving()


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
    monkeypatch.setattr(attacks, "_start", lambda *_: (x + push).clamp(0, 1))
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

    def forward(self, x):
        """Linear logits and a wave."""
        return super().forward(x) + (40 * x.flatten(1)).sin() @ self.bent.T


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
    """A linear classifier whose slope is drawn anew at every call, around its own."""

    deterministic = False

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(5)

    def forward(self, x):
        """Logits with a random slope of mean zero."""
        slope = torch.randn(len(x), 2, x[0].numel(), generator=self.generator, dtype=x.dtype)
        return super().forward(x) + ((x.flatten(1) - 0.5)[:, None] * slope).sum(-1)


def check_averaging(gradient_of=attacks.expected_gradient):
    """The mean of n draws has variance 2/n in each pixel of the margin's gradient: slope -1 in a log-log plot."""
    model = Jittered()
    (x, _) = images(1)
    x = x.expand(800, -1, -1, -1)
    y = torch.zeros(800, dtype=torch.long)
    counts = [1, 2, 4, 8, 16]
    spread = [float(gradient_of(model, x, y, draws=n)[0].flatten(1).var(0).mean()) for n in counts]
    for n, found in zip(counts, spread, strict=True):
        assert abs(found * n / 2 - 1) < 0.06, (n, found)
    logs = torch.tensor([counts, spread]).double().log()
    slope = float(
        ((logs[0] - logs[0].mean()) * (logs[1] - logs[1].mean())).sum()
        / logs[0].var(correction=0)
        / 5
    )
    assert abs(slope + 1) < 0.03, slope
    gradient, logits, value = gradient_of(Linear(), x, y, draws=3)
    assert torch.allclose(gradient.flatten(1), Linear().normal.expand(800, -1)), "a mean, not a sum"
    assert torch.allclose(value, attacks.margin_loss(logits, y)) and torch.allclose(
        logits, Linear()(x).detach()
    )


def test_the_variance_of_averaged_gradients_falls_as_one_over_the_draws():
    check_averaging()


def check_worst_case(worst_case=attacks.worst_case):
    """Robust to all is what no run fooled; a fooled image is kept, and kept as it was first found."""
    model = Curved()
    (x, y) = images(60)
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


def test_restarts_keep_the_worst_of_each_image():
    check_worst_case()


def test_an_interrupted_search_keeps_what_it_found():
    """An attack is a generator: whatever stops it, the last frame is a whole result."""
    model = Linear()
    (x, y) = images(10)
    kept = None
    with pytest.raises(KeyboardInterrupt):
        for frame in attacks.worst_case(attacks.apgd(model, x, y, 0.05, steps=5) for _ in range(3)):
            kept = frame
            raise KeyboardInterrupt
    assert bool(kept.fooled.any()) and torch.equal(kept.fooled, model(kept.x).argmax(1) != y)


def test_a_penalty_is_subtracted_from_the_loss():
    """A penalty on leaving the image keeps the attack at the point where the two slopes balance."""
    model = Linear()
    (x, y) = images(3)
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


class Answers(Linear):
    """A linear classifier seen through something that hides its logits."""

    def __init__(self, hide):
        super().__init__(3)
        self.hide = hide

    def forward(self, x):
        """hide(logits)."""
        return self.hide(super().forward(x))


@pytest.mark.parametrize("attack", [attacks.pgd, attacks.apgd])
@pytest.mark.parametrize(
    "hide, error, sentence",
    [
        (lambda f: f.softmax(1), ValueError, "expected logits, got rows of probabilities"),
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
        list(attack(Answers(hide), x, torch.zeros(4, dtype=torch.long), 0.1, steps=2))


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
        next(attacks.apgd(Answers(lambda f: f + math.nan), x, y, 0.1))
