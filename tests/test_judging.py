"""Your own picture: the verdict is the classifier's, level by level, and says what it could not measure."""

import pytest
import torch
from diffclass import data
from diffclass.classifiers.base import Held
from diffclass.data import cifar, pictures
from diffclass.denoisers import network
from diffclass.evaluation import judging
from diffclass.storage import assets
from PIL import Image


@pytest.fixture
def photo(tmp_path, monkeypatch):
    """A tiny network of photographs in an assets folder of its own, no training images, and a picture to judge."""
    monkeypatch.setenv("DIFFCLASS_ASSETS", str(tmp_path))
    monkeypatch.setattr(cifar, "cifar10_available", lambda: (False, "none"))
    denoiser = network.build(
        "ConditionalDenoiser", "UNet", 10, (3, 32, 32), widths=(8, 8), layers=1, seed=1
    )
    with torch.no_grad():  # a fresh network answers alike for all classes
        for weight in denoiser.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    network.save_denoiser(denoiser, tmp_path / "cifar10-student.safetensors")
    assets.record(["cifar10-student.safetensors"])
    picture = tmp_path / "photo.png"
    Image.effect_noise((48, 40), 60).convert("RGB").save(picture)
    return picture


def test_the_verdict_is_the_posterior_of_the_whole_classifier(photo):
    judge = judging.Judge("cifar10")
    *steps, (done, total, verdict) = judge.verdict(photo)
    assert [step[:2] for step in steps] == [
        (i, total) for i in range(1, total + 1)
    ] and done == total
    image = pictures.load_picture(photo, (3, 32, 32))
    with torch.no_grad():
        logits = Held.seeded(judge.classifier)(image)[0]
    assert torch.allclose(torch.tensor(verdict["posterior"]), logits.softmax(0), atol=1e-5)
    assert float(logits.max() - logits.min()) > 0.1, "a network that says nothing shows nothing"
    assert (
        verdict["prediction"] == verdict["classes"][int(logits.argmax())]
        and "airplane" in verdict["classes"]
    )


def test_a_network_that_answers_nothing_names_no_class(photo):
    judge = judging.Judge("cifar10")
    judge.classifier.weighting = lambda levels: levels.sigma * torch.nan
    with pytest.raises(FloatingPointError, match="logits became NaN and cannot be judged"):
        list(judge.verdict(photo))


def test_what_could_not_be_measured_is_said(photo, monkeypatch):
    *_, (_, _, verdict) = judging.Judge("cifar10").verdict(photo)
    assert verdict["familiarity"] is None and "not at hand" in judging.described(verdict)
    monkeypatch.setattr(cifar, "cifar10_available", lambda: (True, "here"))
    grey = torch.full((3, 3, 32, 32), 0.5) + 0.01 * torch.arange(3)[:, None, None, None]
    monkeypatch.setattr(cifar, "cifar10", lambda *arguments, **options: (grey, None))
    *_, (_, _, verdict) = judging.Judge("cifar10").verdict(photo)
    assert verdict["familiarity"]["far"] and "WARNING" in judging.described(verdict)


def test_the_losses_of_single_levels_make_up_the_losses():
    judge = judging.Judge("digits")
    image = data.digits().test_images[:1]
    levels = judge.classifier.levels
    parts = list(judge.losses(image))
    with torch.no_grad():
        whole = judge.classifier.losses(image, judge.noise)
    assert [part.shape for part in parts] == 16 * [(1, 10, 1)]
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-5, atol=1e-5)
    for t in range(len(levels)):
        own = levels[t : t + 1]
        assert own.sigma == levels.sigma[t] and own.step == levels.step[t]
    for part, other in zip(parts, parts[1:], strict=False):
        assert not torch.allclose(part, other, rtol=1e-3), "each level has losses of its own"


def test_a_digit_is_judged_and_familiar(tmp_path):
    """A training picture, saved and read again, is one that the classifier knows."""
    image = data.digits().train_images[3]
    picture = tmp_path / "digit.png"
    Image.fromarray((image[0] * 255).round().byte().numpy()).save(picture)
    judge = judging.Judge("digits")
    *_, (_, total, verdict) = judge.verdict(str(picture))
    assert total == 16 and verdict["prediction"] == str(int(data.digits().train_labels[3]))
    assert sum(verdict["posterior"]) == pytest.approx(1) and len(verdict["losses"]) == 10
    assert not verdict["familiarity"]["far"] and "WARNING" not in judging.described(verdict)
    first, second, *_ = judging.described(verdict).splitlines()
    assert first == verdict["prediction"] and f"{first}: " in second
    best = min(range(10), key=verdict["losses"].__getitem__)
    assert verdict["classes"][best] == verdict["prediction"]


def test_a_verdict_in_words_names_the_three_best_in_order_and_every_loss_above_the_smallest():
    verdict = dict(
        prediction="deer",
        classes=["cat", "deer", "dog", "frog"],
        posterior=[0.04, 0.7, 0.01, 0.25],
        losses=[12.5, 10.0, 14.0, 11.1],
        familiarity=dict(far=False, sentence="It is near."),
    )
    assert judging.described(verdict).splitlines() == [
        "deer",
        "  posterior  deer: 70.0%   frog: 25.0%   cat: 4.0%",
        "  losses     smallest 10.0 nats; above it cat:+2.5 deer:+0.0 dog:+4.0 frog:+1.1",
    ]
