"""The baselines: one deterministic function, trained on clean or on attacked images, and resumed to the bit."""

import json
import subprocess
from dataclasses import replace

import pytest
import torch
from diffclass import attacks, data, intervals
from diffclass.classifiers import cnn
from diffclass.classifiers.cnn import ConvClassifier
from diffclass.storage import assets
from diffclass.training import baselines, loop
from diffclass.training.baselines import Inner, Recipe
from torch import nn

CNN = cnn.FILES["digits"]["cnn"]
ADVERSARIAL = cnn.FILES["digits"]["adversarial"]


def tiny(seed: int = 0) -> ConvClassifier:
    return ConvClassifier((1, 8, 8), 10, (8, 16), seed)


def some(shape=(1, 8, 8), count: int = 6, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((count, *shape), generator=generator), torch.arange(count) % 10


# -- the classifier ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, widths", [((1, 8, 8), (8, 16)), ((3, 32, 32), (4, 8, 12)), ((3, 16, 16), (8,))]
)
def test_pixels_become_logits_of_every_class(shape, widths):
    classifier = ConvClassifier(shape, 10, widths)
    (x, _) = some(shape)
    logits = classifier(x)
    assert (
        logits.shape == (6, 10) and classifier.num_classes == 10 and classifier.image_shape == shape
    )
    assert classifier.deterministic and torch.equal(logits, classifier(x))
    assert float(logits.detach().std(0).min()) > 0, "the picture has to matter"


def test_it_is_one_function_in_training_prediction_and_attack():
    classifier = tiny()
    (x, _) = some()
    wanted = classifier.train()(x)
    with torch.no_grad():
        assert torch.equal(classifier.eval()(x), wanted)
    assert torch.equal(classifier(x.clone().requires_grad_()), wanted)
    alone = torch.cat([classifier(one[None]) for one in x])
    assert torch.allclose(alone, wanted, atol=1e-5)  # nothing is shared by the pictures of a batch
    double = tiny().double()(x.double())
    assert double.dtype == torch.float64 and torch.allclose(double.float(), wanted, atol=1e-4)


def test_logits_stay_in_the_precision_of_the_pixels_under_autocast():
    classifier = tiny()
    (x, _) = some()
    with torch.autocast("cpu", torch.bfloat16):
        low = classifier(x)
    assert low.dtype == torch.float32 and torch.allclose(low, classifier(x), atol=0.05)
    assert not torch.equal(low, classifier(x))


def test_the_gradient_is_that_of_finite_differences(generator):
    classifier = tiny().double()
    (x, y) = some()
    x = x.double().clamp(0.1, 0.9)
    gradient, _, _ = attacks.expected_gradient(classifier, x, y, loss=attacks.cross_entropy_loss)
    for _ in range(5):
        way = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        near, far = (attacks.cross_entropy_loss(classifier(x + h * way), y) for h in (-1e-5, 1e-5))
        slope = (gradient * way).sum((1, 2, 3))
        assert torch.allclose((far - near) / 2e-5, slope, rtol=1e-5, atol=1e-8)
        assert not torch.allclose((far - near) / 2e-5, -slope, rtol=1e-5, atol=1e-8)


def test_the_first_weights_come_from_the_seed_alone():
    before = torch.get_rng_state()
    one, same, other = (
        torch.cat([p.flatten() for p in tiny(seed).parameters()]) for seed in (3, 3, 4)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (lambda x: 2 * x - 1, r"expected images in \[0,1\].*model space"),
        (lambda x: 255 * x, r"expected images in \[0,1\].*divide by 255"),
        (lambda x: x[0], r"expected images of shape \[B,1,8,8\].*x\[None\]"),
        (lambda x: x.repeat(1, 3, 1, 1), "is this the world that the classifier was made for"),
        (lambda x: x / 0, "expected finite images"),
    ],
)
def test_what_is_no_picture_gets_a_sentence(spoil, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny()(spoil(some()[0]))


@pytest.mark.parametrize("widths", [(), (6, 12), (0, 8)])
def test_impossible_widths_get_a_sentence(widths):
    with pytest.raises(ValueError, match="expected widths as multiples of 4"):
        ConvClassifier((1, 8, 8), 10, widths)


# -- files ------------------------------------------------------------------------------------------------------------


def test_weights_travel_bit_for_bit(tmp_path):
    classifier = tiny()
    (x, _) = some()
    cnn.save(classifier, tmp_path / "c.safetensors", {"name": "c"})
    loaded, card = cnn.load(tmp_path / "c.safetensors")
    assert (
        torch.equal(loaded(x), classifier(x)) and card == {"name": "c"} and loaded.widths == (8, 16)
    )
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_a_damaged_or_foreign_file_is_told(tmp_path):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "c.safetensors"
    cnn.save(tiny(), path)
    whole = path.read_bytes()
    state = load_file(path)
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="probably cut short"):
        cnn.load(path)
    save_file(
        state,
        path,
        {
            "architecture": json.dumps(
                dict(network="ConvClassifier", image_shape=[1, 8, 8], num_classes=9, widths=[8, 16])
            )
        },
    )
    with pytest.raises(
        ValueError, match=r"expected weights of ConvClassifier in c.safetensors, but 'leave.*\(9"
    ):
        cnn.load(path)
    with pytest.raises(
        ValueError, match="expected digits-idc.safetensors to hold a ConvClassifier, got the arch"
    ):
        cnn.load(assets.verified("digits-idc.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        cnn.load(tmp_path / "none.safetensors")


# -- what a step of training sees -------------------------------------------------------------------------------------


def test_moved_images_are_crops_of_the_padded_ones():
    x, _ = some((3, 6, 5), 40)
    got = baselines.moved(x, 2, torch.Generator().manual_seed(7))
    padded = nn.functional.pad(x, [2] * 4)
    used = set()
    for image, wide in zip(got, padded, strict=True):
        places = {
            (r, c)
            for r in range(5)
            for c in range(5)
            if torch.equal(image, wide[:, r : r + 6, c : c + 5])
        }
        assert len(places) == 1
        used |= places
    assert len(used) > 15 and {r for r, _ in used} == {c for _, c in used} == set(range(5))
    assert torch.equal(got, baselines.moved(x, 2, torch.Generator().manual_seed(7)))
    assert torch.equal(baselines.moved(x, 0, torch.Generator()), x)


class Linear(nn.Module):
    """Two classes, f_1 - f_0 = w . x: the worst case is known."""

    num_classes = 2
    image_shape = (1, 2, 2)
    deterministic = True

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5, -0.1]))

    def forward(self, x):
        height = x.flatten(1) @ self.w
        return torch.stack([-height / 2, height / 2], 1)


@pytest.mark.parametrize("inner, least", [(Inner(0.1, 4, 0.5), 1.0), (Inner(0.1, 1, 1.25), 0.25)])
def test_the_inner_maximisation_reaches_the_closed_form_of_a_linear_model(inner, least, generator):
    """Enough steps reach the corner x + eps sign(w) of class 0; one step of 1.25 eps at least a quarter of the way."""
    x = 0.2 + 0.6 * torch.rand(50, 1, 2, 2, generator=generator)
    y = torch.zeros(50, dtype=torch.long)
    linear = Linear()
    got = baselines.adversarial_images(linear, x, y, inner, generator)
    way = (got - x).flatten(1) * linear.w.detach().sign() / inner.epsilon
    assert float(way.min()) >= least - 1e-5 and float(way.max()) <= 1 + 1e-5
    starts = baselines.adversarial_images(linear, x, y, replace(inner, steps=0), generator)
    share = ((starts - x) / inner.epsilon).flatten()
    assert abs(float(share.mean())) < 0.15 and 0.5 < float(share.std()) < 0.65  # uniform: 1/sqrt(3)
    assert linear.w.grad is None


def test_adversarial_images_stay_in_the_budget_and_raise_the_loss(generator):
    classifier = tiny()
    (x, y) = some(count=20)
    x = x.round()  # every pixel at an end of its range
    got = baselines.adversarial_images(classifier, x, y, Inner(0.1, 3, 0.5), generator)
    assert (
        float((got - x).abs().max()) <= 0.1 + 1e-6
        and 0 <= float(got.min())
        and float(got.max()) <= 1
    )
    clean, hurt = (
        attacks.cross_entropy_loss(classifier(images), y).mean().item() for images in (x, got)
    )
    assert hurt > clean


def test_the_loss_is_cross_entropy_and_higher_on_attacked_images(generator):
    classifier = tiny()
    (x, y) = some()
    plain = baselines.classification_loss()(classifier, x, y, generator)
    assert torch.allclose(
        plain, -classifier(x).log_softmax(1)[torch.arange(6), y].mean(), atol=1e-6
    )
    hard = baselines.classification_loss(inner=Inner(0.2, 3, 0.5))(classifier, x, y, generator)
    hard.backward()
    assert hard.item() > plain.item() and all(p.grad is not None for p in classifier.parameters())


def test_whatever_any_frame_fools_does_not_survive(monkeypatch):
    x, y = some(count=3)

    def film(classifier, x, y, epsilon, steps):
        for fooled in ([False, False, True], [False, True, False], [False, False, False]):
            yield attacks.AttackStep(0, x, x, torch.tensor(fooled), x)

    monkeypatch.setattr(attacks, "pgd", film)
    assert baselines.survivors(tiny(), x, y, 0.1, 2) == 1


def test_without_steps_the_survivors_are_those_classified_correctly():
    classifier = tiny()
    world = data.digits()
    x = world.test_images[:50]
    y = world.test_labels[:50]
    correct = int((classifier(x).argmax(1) == y).sum())
    assert baselines.survivors(classifier, x, y, 0.1, 0, batch=17) == correct > 0
    assert baselines.survivors(classifier, x, y, 0.0, 3) == correct


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [None, Inner(0.1, 2, 0.75)])
def test_training_learns_the_digits(inner):
    recipe = Recipe("digits", (8, 16), 60, 64, 8e-3, epsilon=0.1, inner=inner, ema=0.9)
    run = baselines.training_of(recipe, seed=0)
    frames = list(run)
    assert sum(f.loss for f in frames[-10:]) < 0.5 * sum(f.loss for f in frames[:10])
    world = data.digits()
    correct = baselines.survivors(run.average, world.test_images, world.test_labels, 0.1, 0)
    assert correct > 0.75 * 400


@pytest.mark.parametrize("cut", [1, 3])
def test_a_run_that_was_stopped_ends_where_an_unbroken_one_does(cut, tmp_path):
    options = dict(steps=4, batch=16, widths=(8, 16), measured=10, seed=2)
    unbroken = list(baselines.train_baseline(ADVERSARIAL, tmp_path / "whole", **options))
    for progress in baselines.train_baseline(ADVERSARIAL, tmp_path / "cut", **options):
        if progress.step == cut:
            break
    resumed = list(baselines.train_baseline(ADVERSARIAL, tmp_path / "cut", **options))
    assert [p.step for p in resumed] == list(range(cut + 1, 5)) and len(unbroken) == 4
    (one, card), (other, _) = (
        cnn.load(tmp_path / folder / ADVERSARIAL) for folder in ("whole", "cut")
    )
    assert all(torch.equal(v, other.state_dict()[n]) for n, v in one.state_dict().items())
    assert [point["images"] for point in card["curve"]] == [16, 32, 48, 64]
    assert all(
        0 <= p["survived"] <= p["correct"] <= p["n"] == 200 and p["attack_steps"] == 10
        for p in card["curve"]
    )
    assert (
        card["images_seen"] == 64
        and card["accuracy"]["n"] == card["accuracy_under_attack"]["n"] == 10
    )
    assert (
        card["accuracy_under_attack"]["bound"].startswith("upper bound")
        and card["settings"]["seed"] == 2
    )
    assert ADVERSARIAL in (tmp_path / "cut" / "SHA256SUMS").read_text()
    assert not list((tmp_path / "cut" / "checkpoints").iterdir())


def test_minutes_pause_with_a_checkpoint(tmp_path):
    run = baselines.train_baseline(
        CNN, tmp_path, steps=3, batch=8, widths=(8, 16), minutes=1e-9, measured=2
    )
    assert [p.step for p in run] == [1]
    assert (tmp_path / "checkpoints" / CNN).exists() and not (tmp_path / CNN).exists()


def test_a_network_without_a_recipe_gets_a_sentence(tmp_path):
    with pytest.raises(
        ValueError, match="expected one of .*digits-cnn.* to train, got 'digits-gan.safetensors'"
    ):
        next(baselines.train_baseline("digits-gan.safetensors", tmp_path))


def test_recipes_are_what_the_papers_say():
    """Wong et al. 2020 take one step of 1.25 eps; the inner budget is the one that the card measures."""
    assert set(baselines.RECIPES) == {
        file for files in cnn.FILES.values() for file in files.values()
    }
    for name, recipe in baselines.RECIPES.items():
        assert ("adversarial" in name) == (recipe.inner is not None) and name.startswith(
            recipe.world
        )
        if recipe.inner:
            assert (
                recipe.inner.epsilon == recipe.epsilon
                and recipe.inner.steps * recipe.inner.stride >= 1.25
            )
            assert recipe.inner.steps > 1 or recipe.inner.stride == 1.25


def test_a_curve_counts_a_repeated_point_once(tmp_path):
    checkpoint = tmp_path / "deep" / "w.safetensors"
    curve = loop.Curve(checkpoint)
    assert curve.points() == []
    for step, correct in ((2, 5), (4, 6), (4, 7)):
        curve.add(loop.Progress(step, 40, 10 * step, 1.04, torch.tensor(0.0)), correct=correct)
    assert curve.points() == [
        dict(images=20, seconds=1.0, correct=5),
        dict(images=40, seconds=1.0, correct=7),
    ]
    checkpoint.touch()
    assert loop.Curve(checkpoint).points() == curve.points()
    checkpoint.unlink()
    assert loop.Curve(checkpoint).points() == [], "a new run begins a new curve"
    milestones = [
        step
        for step in range(1, 41)
        if loop.Progress(step, 40, 0, 0, torch.tensor(0.0)).is_milestone
    ]
    assert milestones == list(range(2, 41, 2))


def test_the_commit_is_that_of_the_checkout_or_none(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(
            ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments],
            check=True,
            capture_output=True,
        )

    monkeypatch.setattr(
        loop, "__file__", str(tmp_path / "lib" / "diffclass" / "training" / "loop.py")
    )
    assert loop.commit() is None
    git("init")
    assert loop.commit() is None  # no commit yet
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-m", "a")
    clean = loop.commit()
    (tmp_path / "file").write_text("b")
    assert len(clean) == 12 and loop.commit() == clean + "+"


# -- what is in assets/ -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    """The two trained networks of digits with their cards, by method."""
    return {method: cnn.load(assets.verified(file)) for method, file in cnn.FILES["digits"].items()}


@pytest.mark.parametrize("method", ["cnn", "adversarial"])
def test_shipped_networks_are_as_accurate_as_their_cards_say(shipped, method):
    classifier, card = shipped[method]
    world = data.digits()
    accuracy = card["accuracy"]
    correct = baselines.survivors(classifier, world.test_images, world.test_labels, 0.1, 0)
    assert (
        correct >= 0.98 * 400 and abs(correct - accuracy["correct"]) <= 1
    )  # rounding may turn one
    assert card["name"] == cnn.FILES["digits"][method] and card["commit"]
    for stated in (accuracy, card["accuracy_under_attack"]):
        assert stated["n"] == 400
        assert (stated["low"], stated["high"]) == pytest.approx(
            intervals.interval(stated["correct"], 400)
        )


def test_adversarial_training_holds_where_the_plain_network_falls(shipped):
    """The bounds lie between what the two reach, and fail if the files are swapped."""
    world = data.digits()
    counts = {}
    x = world.test_images[:100]
    y = world.test_labels[:100]
    for method, (classifier, card) in shipped.items():
        counts[method] = baselines.survivors(classifier, x, y, 0.1, 10)
        assert card["accuracy_under_attack"]["epsilon"] == 0.1
    assert counts["cnn"] < 80 < 85 < counts["adversarial"], counts


@pytest.mark.parametrize("world", list(cnn.FILES))
def test_cards_say_what_adversarial_training_is_worth(world):
    """More than chance, at the same budget, and not lost again on the way (catastrophic overfitting)."""
    listed = assets.checksums()
    if not all(assets.parts(file, listed) for file in cnn.FILES[world].values()):
        pytest.skip(
            f"expected both baselines of {world} in assets/; `diffclass train {world} --method cnn`."
        )
    plain, strong = (
        cnn.load(assets.verified(cnn.FILES[world][m]))[1] for m in ("cnn", "adversarial")
    )
    weak = plain["accuracy_under_attack"]
    firm = strong["accuracy_under_attack"]
    assert (
        weak["high"] < firm["low"]
        and weak["epsilon"] == firm["epsilon"] == strong["recipe"]["inner"]["epsilon"]
    )
    assert weak["n"] == firm["n"] >= 400 and len(strong["curve"]) == 20
    survived = [point["survived"] for point in strong["curve"]]
    assert survived[-1] >= 0.8 * max(survived)
