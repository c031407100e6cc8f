"""What cards state: survivors of an attack, counts with their intervals, and when a run is not watched."""

import pytest
import test_cnn
import torch
from diffclass import attacks, data, intervals
from diffclass.classifiers.base import Held
from diffclass.classifiers.bayes import BayesClassifier
from diffclass.denoisers import network
from diffclass.evaluation import accuracies
from diffclass.noise import log_levels
from diffclass.training import measures
from diffclass.zoo import networks


def denoiser(kind="MultiHeadDenoiser"):
    return network.build(kind, "DigitNet", 10, (1, 8, 8), width=16, blocks=1).eval()


def first(count):
    world = data.digits()
    return world.test_images[:count], world.test_labels[:count]


def test_whatever_any_frame_fools_does_not_survive(monkeypatch):
    x, y = test_cnn.some(count=3)

    def film(classifier, x, y, epsilon, steps):
        for fooled in ([False, False, True], [False, True, False], [False, False, False]):
            yield attacks.AttackStep(0, x, x, torch.tensor(fooled), x)

    monkeypatch.setattr(attacks, "pgd", film)
    assert measures.survivors(test_cnn.tiny(), x, y, 0.1, 2) == 1


def test_without_a_budget_the_survivors_are_those_classified_correctly():
    classifier = test_cnn.tiny()
    x, y = first(50)
    correct = int((classifier(x).argmax(1) == y).sum())
    assert measures.survivors(classifier, x, y, 0.1, 0, batch=17) == correct > 0
    assert measures.survivors(classifier, x, y, 0.0, 3) == correct
    assert accuracies.accuracy(classifier, x, y) == correct


def test_a_count_is_stated_with_its_interval():
    assert measures.counted(9, 12) == dict(
        correct=9, n=12, **dict(zip(("low", "high"), intervals.interval(9, 12), strict=True))
    )


def test_only_the_first_images_are_attacked():
    x, y = first(20)
    classifier = test_cnn.tiny()
    stated = measures.attacked_accuracy(0.1, 7)(classifier, x, y, 0)
    hit = stated["accuracy_under_attack"]
    assert stated["accuracy"]["n"] == 20 and hit["n"] == 7 and hit["epsilon"] == 0.1
    assert hit["correct"] == measures.survivors(classifier, x[:7], y[:7], 0.1, 20)
    point = measures.attacked_curve(0.1)(classifier, x, y, 0)
    assert point["correct"] == stated["accuracy"]["correct"] and point["attack_steps"] == 10
    assert point["survived"] == measures.survivors(classifier, x, y, 0.1, 10)


def test_a_denoiser_is_measured_by_its_diffusion_classifier_with_held_noise():
    x, y = first(20)
    asked = denoiser()
    held = Held.seeded(BayesClassifier(asked, log_levels(0.1, 3.0, 4)), 0)
    stated = measures.bayes_accuracy(networks.DIGIT_RANGE, 4, "fp32")(asked, x, y, 5)["accuracy"]
    assert stated["correct"] == accuracies.accuracy(held, x, y) and stated["n"] == 20
    assert stated["levels"] == "4 log-spaced in [0.1, 3]" and stated["weighting"] == "ELBO"


@pytest.mark.parametrize(
    "kind, accelerated, watched",
    [
        ("MultiHeadDenoiser", False, True),
        ("ConditionalDenoiser", False, False),
        ("ConditionalDenoiser", True, True),
    ],
)
def test_what_takes_too_long_is_not_watched(kind, accelerated, watched, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerated)
    x, y = first(4)
    point = measures.bayes_curve(networks.DIGIT_RANGE, "fp32")(denoiser(kind), x, y, 0)
    assert bool(point) == watched and point.get("n", 4) == 4
