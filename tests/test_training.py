"""Losses and the training loop: it learns, it copies a teacher, a run cut anywhere ends where an unbroken one does."""

import itertools
import math
import subprocess

import pytest
import safetensors.torch
import test_cnn
import test_idc
import torch
from diffclass import data, units
from diffclass.classifiers.base import Held
from diffclass.classifiers.idc import TranslationClassifier
from diffclass.denoisers import network
from diffclass.evaluation import accuracies
from diffclass.training import loop, losses
from diffclass.training.loop import Training
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from twins import patched, rejected

SHAPE = (1, 8, 8)


def pictures(count: int = 64):
    """Two classes of striped pictures in model space, with a little noise: [N,1,8,8], labels [N]."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    stripes = torch.where(torch.arange(8) % 4 < 2, 0.8, -0.8)
    clean = torch.stack([stripes.expand(8, 8), stripes[:, None].expand(8, 8)])[labels][:, None]
    return clean + 0.05 * torch.randn(clean.shape, generator=generator), labels


def tiny(kind: str = "ConditionalDenoiser", seed: int = 0, width: int = 16):
    """A denoiser of two classes that trains in milliseconds."""
    return network.build(kind, "DigitNet", 2, SHAPE, seed=seed, width=width, blocks=1)


def run(steps: int = 6, denoiser=None, **settings) -> Training:
    """A short run on the striped pictures."""
    images, labels = pictures()
    return Training(denoiser or tiny(), images, labels, steps=steps, **{"batch": 16, **settings})


def equal(one: Training, other: Training) -> bool:
    """Whether weights and averages of two runs are the same bits."""
    pairs = [(one.denoiser, other.denoiser), (one.average, other.average)]
    return all(
        torch.equal(v, b.state_dict()[n]) for a, b in pairs for n, v in a.state_dict().items()
    )


# ---------------------------------------------------------------------------------------------------------------------
# Learning


def test_the_loss_falls_and_progress_counts():
    frames = list(run(steps=60, batch=32))
    assert sum(p.loss for p in frames[-10:]) < 0.7 * sum(p.loss for p in frames[:10])
    assert [p.step for p in frames] == list(range(1, 61)) and frames[-1].images == 60 * 32
    assert all(a.seconds <= b.seconds for a, b in itertools.pairwise(frames))


def test_the_class_is_learned():
    """After a few steps the right class denoises better than the wrong one, which is all that a classifier needs."""
    trained = run(steps=80, batch=32, ema=0.9)
    list(trained)
    images, labels = pictures()
    eps = torch.randn(images.shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        errors = (
            ((trained.average.eval()(images + eps, 1.0) - images[:, None]) ** 2).flatten(2).sum(-1)
        )
    assert float((errors.argmin(1) == labels).float().mean()) > 0.9


def test_a_student_approaches_its_teacher_under_every_class():
    teacher = tiny(seed=3)
    list(run(steps=30, denoiser=teacher, batch=32))
    teacher = teacher.eval().requires_grad_(False)
    student = run(
        steps=60,
        denoiser=tiny("MultiHeadDenoiser"),
        loss=losses.distillation_loss(teacher),
        batch=32,
    )
    images, _ = pictures()
    noisy = images + torch.randn(images.shape, generator=torch.Generator().manual_seed(6))

    def distances():
        with torch.no_grad():
            return (
                (student.denoiser(noisy, 1.0, [0, 1, 2]) - teacher(noisy, 1.0, [0, 1, 2])) ** 2
            ).mean((0, 2, 3, 4))

    before = distances()
    list(student)
    assert bool((distances() < 0.5 * before).all()), "both classes and 'no class'"


class Offsets(network.MultiHeadDenoiser):
    """Answers a_k whatever it is asked: on black pictures the error of head k is |a_k|^2 at every level."""

    def __init__(self, offsets):
        super().__init__(torch.nn.Identity(), len(offsets) - 1, SHAPE)
        self.offsets = torch.tensor(offsets)

    def answers(self, x_sigma, sigma):
        """[B,K+1,C,H,W], with `noisy` what was last asked."""
        self.noisy = x_sigma
        return self.offsets[None, :, None, None, None].expand(len(x_sigma), -1, *SHAPE)


def test_the_contrastive_loss_draws_levels_evenly_in_ln_sigma():
    asked = Offsets([0.0, 0.0, 0.0])
    losses.contrastive_loss(0.2, 4.0)(
        asked,
        torch.zeros(50_000, *SHAPE),
        torch.zeros(50_000).long(),
        torch.Generator().manual_seed(0),
    )
    assert float(asked.noisy.std()) == pytest.approx(
        math.sqrt((4.0**2 - 0.2**2) / 2 / math.log(4.0 / 0.2)), rel=0.01
    )


def test_the_contrastive_loss_is_cross_entropy_plus_two_diffusion_losses():
    images, labels = pictures(8)
    denoiser = tiny("MultiHeadDenoiser", seed=4)
    low = 0.2
    high = 4.0
    torch.nn.init.normal_(
        denoiser.network.leave[-1].weight, std=0.02, generator=torch.Generator().manual_seed(3)
    )
    with torch.no_grad():
        value = losses.contrastive_loss(low, high)(
            denoiser, images, labels, torch.Generator().manual_seed(7)
        )
        source = torch.Generator().manual_seed(7)
        sigma = (math.log(low) + torch.rand(8, generator=source) * math.log(high / low)).exp()
        noisy = images + sigma[:, None, None, None] * torch.randn(images.shape, generator=source)
        error = (denoiser(noisy, sigma, [0, 1, 2]) - images[:, None]).square().sum((2, 3, 4))
    e = math.log(high / low) * error / sigma[:, None] ** 2
    own = e[torch.arange(8), labels].mean() / 64
    null = e[:, 2].mean() / 64

    def entropy(logits):
        return torch.nn.functional.cross_entropy(logits, labels)

    assert torch.allclose(value, entropy(-e[:, :2] / 10) + 0.25 * (own + null), rtol=1e-5)
    for slip in (
        entropy(-e[:, :2]) + 0.25 * (own + null),
        entropy(-e / 10) + 0.25 * (own + null),
        entropy(-e[:, :2] / 10) + 0.5 * own,
        entropy(e[:, :2] / 10) + 0.25 * (own + null),
    ):
        assert not torch.allclose(value, slip, rtol=1e-3)
    with pytest.raises(ValueError, match="expected a denoiser with a null class"):
        losses.contrastive_loss(low, high)(
            network.build(
                "MultiHeadDenoiser", "DigitNet", 2, SHAPE, has_null=False, width=16, blocks=1
            ),
            images,
            labels,
            torch.Generator(),
        )


def test_heads_learn_the_class_without_a_teacher():
    """The heads of wrong classes are told apart; trained on the true head alone they answer as they like."""
    images, labels = pictures()
    trained = run(
        steps=60,
        denoiser=tiny("MultiHeadDenoiser"),
        loss=losses.contrastive_loss(0.2, 4.0),
        batch=32,
        ema=0.9,
    )
    list(trained)
    eps = torch.randn(images.shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        errors = (
            ((trained.average.eval()(images + eps, 1.0) - images[:, None]) ** 2).flatten(2).sum(-1)
        )
    assert float((errors.argmin(1) == labels).float().mean()) > 0.9


def test_training_levels_are_log_normal_and_kept_in_range():
    sigma = losses.draw_sigma(200_000, torch.Generator().manual_seed(0))
    assert (
        abs(float(sigma.log().mean()) + 0.8) < 0.01 and abs(float(sigma.log().std()) - 1.2) < 0.01
    )
    narrow = losses.draw_sigma(1000, torch.Generator().manual_seed(0), sigma_range=(0.2, 0.5))
    assert float(narrow.min()) == pytest.approx(0.2) and float(narrow.max()) == pytest.approx(0.5)


def test_a_tenth_of_the_labels_is_withheld(monkeypatch):
    denoiser = tiny()
    seen = []
    paired = denoiser.paired
    monkeypatch.setattr(
        denoiser, "paired", lambda x, s, labels: seen.append(labels) or paired(x, s, labels)
    )
    images, labels = pictures(4000)
    with torch.no_grad():
        for rate in (0.1, 0.0):
            losses.denoising_loss(rate)(denoiser, images, labels, torch.Generator().manual_seed(0))
    share = float((seen[0] == 2).float().mean())
    assert abs(share - 0.1) < 4 * math.sqrt(0.09 / 4000)
    assert torch.equal(seen[0][seen[0] != 2], labels[seen[0] != 2]) and torch.equal(seen[1], labels)


def check_translation_loss(loss_of):
    """The loss image by image, recomputed from the translator's own estimates; both branches occur."""
    translator = test_idc.alive(seed=2)
    images = units.to_model(data.digits().train_images[:200])
    labels = torch.arange(200) % 3
    got = float(loss_of(0.2)(translator, images, labels, torch.Generator().manual_seed(5)))
    generator = torch.Generator().manual_seed(5)
    t = torch.randint(4, (200,), generator=generator)
    eps = torch.randn(images.shape, generator=generator)
    targets = units.to_model(translator.labels)
    total = 0.0
    pushed = 0
    for i, c in enumerate(labels.tolist()):
        at = int(t[i])
        one = slice(i, i + 1)
        estimate = translator(
            translator.bridge.forward(targets[c : c + 1], images[one], at, eps[one]), at
        )[0]
        step = float(translator.bridge.shares[at]) - (
            float(translator.bridge.shares[at - 1]) if at else 0.0
        )
        d = [float((targets[c] + step * (p - targets[c]) - estimate).abs().mean()) for p in targets]
        wrong = min(v for k, v in enumerate(d) if k != c)
        total += d[c] - 0.2 * wrong * (d[c] > wrong)
        pushed += d[c] > wrong
    assert 20 < pushed < 180
    assert got == pytest.approx(total / 200, rel=1e-5)


def test_the_translation_loss_is_the_released_one():
    check_translation_loss(losses.translation_loss)


@pytest.mark.parametrize(
    "twin",
    [
        lambda inter: losses.translation_loss(0.0),
        lambda inter: losses.translation_loss(-inter),
    ],
)
def test_translation_loss_twins_are_rejected(twin):
    with pytest.raises(AssertionError):
        check_translation_loss(twin)


def test_training_learns_to_translate():
    world = data.digits()
    three = world.train_labels < 3
    images = units.to_model(world.train_images[three])
    labels = world.train_labels[three]
    trained = Training(
        test_idc.tiny(width=32, blocks=2),
        images,
        labels,
        loss=losses.translation_loss(),
        steps=150,
        batch=64,
        rate=4e-3,
        ema=0.9,
    )
    frames = list(trained)
    assert sum(f.loss for f in frames[-10:]) < 0.6 * sum(f.loss for f in frames[:10])
    test, answers = (v[world.test_labels < 3] for v in (world.test_images, world.test_labels))
    classifier = Held.seeded(TranslationClassifier(trained.average.eval()))
    assert accuracies.accuracy(classifier, test, answers) > 0.85 * len(test)


def test_moved_images_are_crops_of_the_padded_ones():
    x, _ = test_cnn.some((3, 6, 5), 40)
    got = losses.moved(x, 2, torch.Generator().manual_seed(7))
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
    assert torch.equal(got, losses.moved(x, 2, torch.Generator().manual_seed(7)))
    assert torch.equal(losses.moved(x, 0, torch.Generator()), x)


def test_the_classification_loss_is_cross_entropy_on_moved_images(generator):
    classifier = test_cnn.tiny()
    x, y = test_cnn.some()
    plain = losses.classification_loss()(classifier, x, y, generator)
    by_hand = -classifier(x).log_softmax(1)[torch.arange(6), y].mean()
    assert torch.allclose(plain, by_hand, atol=1e-6)
    cropped = losses.classification_loss(2)(classifier, x, y, torch.Generator().manual_seed(7))
    moved = losses.moved(x, 2, torch.Generator().manual_seed(7))
    by_hand = -classifier(moved).log_softmax(1)[torch.arange(6), y].mean()
    assert torch.allclose(cropped, by_hand, atol=1e-6) and not torch.allclose(cropped, plain)


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def test_the_average_is_an_exponential_moving_average():
    """After step i: average <- k average + (1 - k) weights with k = min(ema, i / (i + 9)), recomputed by hand."""
    trained = run(steps=12, ema=0.4)
    by_hand = {n: v.clone().double() for n, v in trained.denoiser.named_parameters()}
    for progress in trained:
        keep = min(0.4, progress.step / (progress.step + 9))
        for name, value in trained.denoiser.named_parameters():
            by_hand[name] = keep * by_hand[name] + (1 - keep) * value.detach().double()
    for name, value in trained.average.named_parameters():
        assert torch.allclose(value.double(), by_hand[name], atol=1e-6), name
        assert not value.requires_grad


def seen(mirror: bool) -> torch.Tensor:
    """All pictures that a loss is given in thirty steps on one picture; no two of its rows or columns are alike."""
    picture = torch.arange(64.0).reshape(1, *SHAPE) / 64
    given = []

    def value(denoiser, images, labels, noise):
        given.append(images.detach().clone())
        return sum(weight.square().sum() for weight in denoiser.parameters())

    loss = losses.Loss(lambda *batch: (), value)
    training = Training(
        tiny(), picture, torch.zeros(1).long(), loss=loss, steps=30, batch=16, mirror=mirror
    )
    for _ in training:
        pass
    return torch.cat(given)


FLIP = torch.Tensor.flip


@rejected(
    {
        "upside down": dict(
            seen=patched(seen, torch.Tensor, flip=lambda images, axis: FLIP(images, axis - 1))
        ),
        "all of a batch": dict(
            seen=patched(seen, torch, rand=lambda *shape, **how: torch.zeros(shape))
        ),
    }
)
def test_a_mirrored_picture_has_left_and_right_changed_and_is_one_of_two(seen=seen):
    plain = torch.arange(64.0).reshape(1, *SHAPE) / 64
    turned = torch.zeros_like(plain)
    for column in range(8):
        turned[..., column] = plain[..., 7 - column]
    assert torch.equal(seen(False), plain.expand(480, -1, -1, -1))
    given = seen(True)
    same = (given == plain).flatten(1).all(1)
    mirrored = (given == turned).flatten(1).all(1)
    assert bool((same ^ mirrored).all())
    assert 180 < int(mirrored.sum()) < 300  # 240 on average, five standard deviations of 11


def test_training_depends_on_its_seed_alone():
    before = None
    results = []
    for _ in range(2):
        trained = run()
        before = torch.get_rng_state()
        list(trained)
        assert torch.equal(torch.get_rng_state(), before), "the global generator was used"
        results.append(trained)
    other = run(seed=1)
    list(other)
    assert equal(*results) and not equal(results[0], other)


def test_a_batch_is_shared_evenly_or_gets_a_sentence():
    assert [loop.own_share(12, processes) for processes in (1, 3, 4)] == [12, 4, 3]
    with pytest.raises(
        ValueError,
        match="expected a batch that 5 processes can share evenly, got 12 images; .* of 5",
    ):
        loop.own_share(12, 5)


def test_a_loss_that_explodes_gets_a_sentence():
    images, labels = pictures()
    with pytest.raises(
        FloatingPointError, match=r"the loss became nan at step 0; lower the rate \(0.002\)"
    ):
        list(Training(tiny(), images * math.nan, labels, steps=3))


# ---------------------------------------------------------------------------------------------------------------------
# Stopping and going on


@pytest.mark.parametrize("kept", [1, 3, 5])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(kept, tmp_path):
    whole = run()
    losses = [p.loss for p in whole]
    first = iter(run(checkpoint=tmp_path / "run.safetensors", save_every=100))
    early = [next(first).loss for _ in range(kept)]
    first.close()  # what an interruption or a closed notebook does
    second = run(checkpoint=tmp_path / "run.safetensors", denoiser=tiny(seed=5))
    assert second.step == kept
    assert early + [p.loss for p in second] == losses and equal(whole, second)


def test_a_checkpoint_with_nan_is_not_resumed(tmp_path):
    path = tmp_path / "run.safetensors"
    begun = iter(run(checkpoint=path, save_every=100))
    next(begun)
    begun.close()
    with safe_open(path, framework="pt") as opened:
        header = opened.metadata()
    tensors = load_file(path)
    name = next(name for name in tensors if name.startswith("now."))
    tensors[name].flatten()[0] = torch.nan
    save_file(tensors, path, header)
    with pytest.raises(ValueError, match=r"expected finite weights of run\.safetensors, got 1 NaN"):
        run(checkpoint=path)


def test_an_exception_between_steps_saves_what_is_done(tmp_path):
    trained = run(checkpoint=tmp_path / "run.safetensors", save_every=100)
    with pytest.raises(KeyboardInterrupt):
        for progress in (frames := iter(trained)):
            if progress.step == 2:
                frames.throw(KeyboardInterrupt())
    assert run(checkpoint=tmp_path / "run.safetensors").step == 2


def test_the_same_run_can_be_iterated_again(tmp_path):
    whole = run()
    parts = run()
    list(whole)
    list(itertools.islice(parts, 2))
    assert parts.step == 2 and [p.step for p in parts] == [3, 4, 5, 6] and equal(whole, parts)
    assert list(parts) == []


def test_a_finished_run_stays_finished(tmp_path):
    path = tmp_path / "run.safetensors"
    list(run(checkpoint=path))
    again = run(checkpoint=path)
    assert again.step == 6 and list(again) == []
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(batch=8), r"\['batch'\] differ; delete it to start afresh, or use the old settings"),
        (dict(rate=1e-3, seed=4), r"\['rate', 'seed'\] differ"),
        (dict(steps=7), r"\['steps'\] differ"),
    ],
)
def test_a_checkpoint_of_other_settings_gets_a_sentence(change, sentence, tmp_path):
    list(run(checkpoint=tmp_path / "run.safetensors"))
    with pytest.raises(ValueError, match=sentence):
        run(checkpoint=tmp_path / "run.safetensors", **change)


@pytest.mark.parametrize("other", [dict(width=24), dict(kind="MultiHeadDenoiser")])
def test_a_checkpoint_of_another_architecture_gets_a_sentence(other, tmp_path):
    list(run(checkpoint=tmp_path / "run.safetensors"))
    with pytest.raises(ValueError, match="run.safetensors holds another architecture; delete it"):
        run(checkpoint=tmp_path / "run.safetensors", denoiser=tiny(**other))


@pytest.mark.parametrize("keep", [0, 20, 3000, -8])
def test_a_damaged_checkpoint_gets_a_sentence(keep, tmp_path):
    path = tmp_path / "run.safetensors"
    list(run(checkpoint=path))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        ValueError, match="expected a training checkpoint in run.safetensors, got a damaged file"
    ):
        run(checkpoint=path)


def test_weights_in_place_of_a_checkpoint_get_a_sentence(tmp_path):
    path = tmp_path / "run.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(2)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="run.safetensors"):
        run(checkpoint=path)


# ---------------------------------------------------------------------------------------------------------------------
# Beside the run


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
    milestones = [progress.step for progress in run(steps=40) if progress.is_milestone]
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
