"""Adversarial training of the diffusion classifier: its levels are unbiased, its loss is what it says, and it helps."""

import math

import pytest
import torch
from diffclass import attacks, data, units
from diffclass.denoisers import network
from diffclass.noise import Levels, elbo_weight
from diffclass.storage import assets, weights
from diffclass.training import hardening, trainers
from diffclass.training.baselines import Inner
from diffclass.training.hardening import Hardening, drawn_levels, hardening_loss
from diffclass.zoo import networks

RECIPE = Hardening(Inner(0.1, 2, 0.8), 0.1, 3.0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small(seed=1):
    return network.build(
        "MultiHeadDenoiser", "DigitNet", 10, (1, 8, 8), seed=seed, width=16, blocks=1
    )


def integral_error(draw=drawn_levels) -> float:
    """How far the mean of 4000 drawn sums is from the integral of sigma^-2 over ln sigma, in standard errors."""
    low = 0.1
    high = 3.0
    source = generator()
    sums = torch.stack(
        [elbo_weight(draw(low, high, 4, source)).sum() for _ in range(4000)]
    ).double()
    exact = (low**-2 - high**-2) / 2
    return float((sums.mean() - exact).abs() / (sums.std() / math.sqrt(len(sums))))


def test_the_drawn_levels_are_unbiased_and_one_to_a_part():
    assert integral_error() < 4
    levels = drawn_levels(0.1, 3.0, 4, generator(3))
    assert bool(((levels.lower <= levels.sigma) & (levels.sigma <= levels.upper)).all())
    parts = (levels.upper / levels.lower).log()
    assert torch.allclose(levels.upper[:-1], levels.lower[1:]) and torch.allclose(parts, parts[0])


@pytest.mark.parametrize("slip", ["uniform in sigma", "always the middle"])
def test_levels_drawn_otherwise_are_biased(slip):
    def wrong(low, high, count, source):
        right = drawn_levels(low, high, count, source)
        sigma = (
            (right.lower * right.upper).sqrt()
            if slip == "always the middle"
            else (right.lower + torch.rand(count, generator=source) * (right.upper - right.lower))
        )
        return Levels(sigma, right.lower, right.upper)

    low = 0.1
    high = 3.0
    if slip == "always the middle":  # no spread to measure by: compare with the integral itself
        exact = (low**-2 - high**-2) / 2
        assert abs(float(elbo_weight(wrong(low, high, 4, generator())).sum()) / exact - 1) > 0.05
    else:
        assert integral_error(wrong) > 4


def test_the_loss_is_cross_entropy_on_attacked_images_plus_the_clean_diffusion_loss(monkeypatch):
    """With an attack that leaves the images alone, both parts can be written down from the same draws."""
    x = data.digits().train_images[:6]
    y = data.digits().train_labels[:6]
    monkeypatch.setattr(hardening, "adversarial_images", lambda classifier, x, y, inner, source: x)
    denoiser = networks.load_digits_denoiser()
    value = hardening_loss(RECIPE)(denoiser, units.to_model(x), y, generator(5))
    source = generator(5)
    for _ in range(2):  # the attack's draw, then the judge's
        levels = drawn_levels(0.1, 3.0, 4, source)
        noise = torch.randn(4, 1, 6, 1, 8, 8, generator=source)
    z = units.to_model(x)
    total = 0.0
    for t, sigma in enumerate(levels.sigma):
        errors = (denoiser(z + sigma * noise[t, 0], sigma) - z[:, None]).square().flatten(2).sum(2)
        total = total + errors * (levels.upper[t] / levels.lower[t]).log() / sigma**2
    wanted = (
        torch.nn.functional.cross_entropy(-total / 10, y)
        + 0.5 * total[torch.arange(6), y].mean() / 64
    )
    assert torch.allclose(value, wanted, rtol=1e-5)
    own = total[torch.arange(6), y].mean() / 64
    for slip in (
        torch.nn.functional.cross_entropy(-total, y) + 0.5 * own,
        torch.nn.functional.cross_entropy(-total / 10, y) + 0.5 * total.mean() / 64,
        torch.nn.functional.cross_entropy(-total / 10, y) + own,
    ):
        assert not torch.allclose(value, slip, rtol=1e-2)


def test_the_attack_inside_stays_in_its_budget_and_raises_the_loss(monkeypatch):
    x = data.digits().train_images[:16]
    y = data.digits().train_labels[:16]
    seen = []
    real = hardening.adversarial_images

    def watched(classifier, images, labels, inner, source):
        found = real(classifier, images, labels, inner, source)
        with torch.no_grad():
            before, after = (
                attacks.cross_entropy_loss(classifier(i), labels).mean() for i in (images, found)
            )
        seen.append((found, float(after - before)))
        return found

    monkeypatch.setattr(hardening, "adversarial_images", watched)
    student = networks.load_digits_denoiser()
    hardening_loss(RECIPE)(student, units.to_model(x), y, generator())
    ((found, rise),) = seen
    assert (
        rise > 0.1
        and float((found - x).abs().max()) <= 0.1 + 1e-6
        and 0 <= found.min()
        and found.max() <= 1
    )


def test_a_short_run_writes_a_card_that_states_its_accuracy_under_attack(tmp_path, monkeypatch):
    monkeypatch.setattr(hardening, "ATTACKED", 8)
    monkeypatch.setattr(hardening, "CARD_STEPS", 2)
    network.save_denoiser(small(), tmp_path / networks.STUDENT)
    name = networks.HARDENED["digits"]
    with pytest.raises(
        ValueError, match="expected no widths for a network that goes on from digits-student"
    ):
        next(trainers.train(name, tmp_path, widths=(16, 32)))
    *_, last = trainers.train(name, tmp_path, steps=2, batch=8, measured=20)
    assert last.step == 2
    card = weights.card(tmp_path / name)
    assert card["accuracy_under_attack"]["n"] == 8 and card["hardening"]["inner"]["epsilon"] == 0.1
    assert card["start"] == networks.STUDENT and "adversarial-dc" in card["command"]
    assert "at most" in weights.card_line(card)


def test_a_network_to_start_from_is_needed(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected weights at digits-student"):
        next(trainers.train(networks.HARDENED["digits"], tmp_path))


def test_the_trained_heads_survive_where_the_student_falls():
    """From the committed weights: PGD-10 within 0.1 on 24 digits. Fails if two files are swapped."""
    x = data.digits().test_images[:24]
    y = data.digits().test_labels[:24]
    left = {}
    for name in (networks.STUDENT, networks.CONTRASTIVE["digits"], networks.HARDENED["digits"]):
        classifier = networks.digit_classifier(network.load_denoiser(assets.verified(name))[0])
        *_, last = attacks.pgd(classifier, x, y, 0.1, steps=10)
        left[name] = int((~last.fooled).sum())
    student, contrastive, hardened = left.values()
    assert student <= 12 < contrastive < 20 <= hardened, left
