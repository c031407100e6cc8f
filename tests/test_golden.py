"""Numbers that the library gave at commit e64ec5d, before its classifiers became functions of pixels and of noise.

They were compared bit for bit when that was done; here with a tolerance that holds on another processor.
"""

import json
from pathlib import Path

import pytest
import torch
from diffclass import attacks, data, units, zoo
from diffclass.certify import certificates
from diffclass.classifiers.base import Fresh, Held
from diffclass.classifiers.bayes import ExactClassifier
from diffclass.classifiers.noised import NoisedBayesClassifier
from diffclass.denoisers.exact import MixtureDenoiser
from diffclass.zoo import networks

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
HELD = ("dc", "contrastive", "adversarial-dc", "cnn", "adversarial", "idc")
PURIFIED = ("rdc1", "rdc5", "lm-cnn", "diffpure")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def digits():
    world = data.digits()
    return world.test_images[:24], world.test_labels[:24]


def check_agrees(name: str, values, relative: float = 1e-4) -> None:
    wanted = torch.tensor(GOLDEN[name], dtype=torch.float64)
    got = torch.as_tensor(values, dtype=torch.float64).detach()[: len(wanted)]
    scale = float(wanted.abs().max())
    assert got.shape == wanted.shape
    assert float((got - wanted).abs().max()) <= relative * scale, name


@pytest.mark.parametrize("name", HELD)
def test_logits_under_a_held_noise(digits, name):
    with torch.no_grad():
        check_agrees(f"{name}/held", Held.seeded(zoo.classifier("digits", name))(digits[0]))


@pytest.mark.parametrize("name", ["dc", "idc"])
def test_logits_under_fresh_noise(digits, name):
    """Drawn for the whole batch, as stored perturbations were judged."""
    with torch.no_grad():
        check_agrees(f"{name}/fresh1", Fresh(zoo.classifier("digits", name), seeded(1))(digits[0]))


@pytest.mark.parametrize("name", PURIFIED)
def test_logits_behind_a_purifier(digits, name):
    whole = zoo.classifier("digits", name)
    noise = (
        whole.purifier.sample_noise(1, seeded(1)),
        whole.classifier.sample_noise(1, seeded(0)),
    )
    with torch.no_grad():
        check_agrees(f"{name}/held", whole(digits[0], noise), relative=1e-3)


def test_losses_and_attacked_pictures(digits):
    x, y = (part[:8] for part in digits)
    classifier = zoo.classifier("digits", "dc")
    noise = classifier.sample_noise(1, seeded(0))
    with torch.no_grad():
        check_agrees("dc/losses", classifier.losses(x[:4], noise)[0, :3])
    *_, last = attacks.pgd(classifier, x, y, 0.1, noise=noise, steps=8)
    check_agrees("dc/pgd", last.x.flatten(1).sum(1), relative=1e-2)
    plain = zoo.classifier("digits", "cnn")
    *_, last = attacks.apgd(plain, x, y, 0.1, steps=30, generator=seeded(3))
    check_agrees("cnn/apgd", last.x.flatten(1).sum(1), relative=1e-2)


def test_noised_digits(digits):
    noised = NoisedBayesClassifier(networks.load_digits_denoiser(), 0.25)
    x = digits[0] + 0.25 * torch.randn(digits[0].shape, generator=seeded(5))
    with torch.no_grad():
        check_agrees("noised/held", Held.seeded(noised)(x))


def test_the_plane_and_a_certificate():
    law = data.gaussians()
    points, _ = law.sample(20, seeded(7))
    with torch.no_grad():
        check_agrees("plane", Held.seeded(networks.plane_classifier(law))(points))
        exact = ExactClassifier(MixtureDenoiser.of_law(law), law.priors, 0.1)
        check_agrees("plane exact", exact(points.double()), relative=1e-6)
    check_agrees(
        "law density", law.log_density(units.to_model(points).double(), 0.3), relative=1e-6
    )
    votes = certificates.Votes((90, 10), (970, 30), 0.25, 1)
    certificate = certificates.smoothing_radius(votes)
    check_agrees("certificate", [certificate.radius, certificate.p_lower], relative=1e-12)
