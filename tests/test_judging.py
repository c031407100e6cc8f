"""Your own picture: the verdict is the classifier's, level by level, and says what it could not measure."""

import pytest
import torch
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
        logits = judge.classifier(image)[0]
    assert torch.allclose(torch.tensor(verdict["posterior"]), logits.softmax(0), atol=1e-5)
    assert float(logits.max() - logits.min()) > 0.1, "a network that says nothing shows nothing"
    assert (
        verdict["prediction"] == verdict["classes"][int(logits.argmax())]
        and "airplane" in verdict["classes"]
    )


def test_what_could_not_be_measured_is_said(photo, monkeypatch):
    *_, (_, _, verdict) = judging.Judge("cifar10").verdict(photo)
    assert verdict["familiarity"] is None and "not at hand" in judging.described(verdict)
    monkeypatch.setattr(cifar, "cifar10_available", lambda: (True, "here"))
    grey = torch.full((3, 3, 32, 32), 0.5) + 0.01 * torch.arange(3)[:, None, None, None]
    monkeypatch.setattr(cifar, "cifar10", lambda *arguments, **options: (grey, None))
    *_, (_, _, verdict) = judging.Judge("cifar10").verdict(photo)
    assert verdict["familiarity"]["far"] and "WARNING" in judging.described(verdict)


def test_the_banks_of_single_levels_make_up_the_bank():
    bank = judging.Judge("digits").classifier.bank
    for t in range(len(bank.levels)):
        assert (
            torch.equal(bank.level(t).noise[0], bank.noise[t])
            and bank.level(t).sigma == bank.sigma[t]
        )
        assert bank.level(t).levels.step == bank.levels.step[t]
