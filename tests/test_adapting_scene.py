"""The scene of an adapter: losses as the library has them, attackers as they are named, curves from the records."""

import pytest
import torch
from diffclass import attacks, zoo
from diffclass.classifiers.base import Held
from diffclass.course.scenes import adapting as scenes
from diffclass.course.scenes.adapting import ANOTHER, CLEAN, ITSELF, LAST, AdapterScene
from diffclass.denoisers.lora import Adapter
from diffclass.storage import assets, results
from diffclass.training import adapting
from diffclass.zoo import networks

PLAIN, CONTRAST = AdapterScene.RECIPES


@pytest.fixture(scope="module")
def records():
    return results.read(assets.folder() / "records" / "tmdc-digits.jsonl")


@pytest.fixture(scope="module")
def scene(records):
    return AdapterScene(networks.load_digits_denoiser(), records)


def excess(denoiser, x):
    """Losses above the smallest, by the course's classifier with its held noise."""
    with torch.no_grad():
        losses = -Held.seeded(networks.digit_classifier(denoiser), 0)(x)[0]
    return (losses - losses.min()).clamp(max=scenes.TOP)


@pytest.mark.parametrize("recipe", AdapterScene.RECIPES)
@pytest.mark.parametrize("step, rank", [(0, 4), (100, 4), (LAST, 1), (LAST, 4)])
def test_bars_are_the_losses_with_the_adapter_and_lines_those_without(scene, recipe, step, rank):
    frame = scene.at(5, recipe, step, rank, CLEAN)
    x = scene.world.test_images[5:6]
    base = networks.load_digits_denoiser()
    shown = base
    if step:
        file = scenes.weights_of(AdapterScene.RECIPES[recipe][0], step)
        shown = Adapter.load(base, networks.trained(file)).truncated(rank).merged()
    bars = frame["panels"][1]
    tolerance = dict(atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(torch.tensor(bars["values"]), excess(shown, x), **tolerance)
    torch.testing.assert_close(torch.tensor(bars["marks"]), excess(base, x), **tolerance)


def test_the_whole_adapter_is_the_classifier_of_the_registry(scene):
    for recipe, (method, _) in AdapterScene.RECIPES.items():
        x = scene.world.test_images[:6]
        with torch.no_grad():
            shown = scene.classifier(recipe, LAST, 4)(x)
            wanted = Held.seeded(zoo.classifier("digits", method), 0)(x)
        torch.testing.assert_close(shown, wanted, rtol=1e-3, atol=1e-2)


def test_the_attackers_are_those_that_are_named(scene):
    shown = scene.classifier(CONTRAST, LAST, 4)
    x, y = scene.world.test_images[5:6], scene.world.test_labels[5:6]
    assert torch.equal(scene.fooling(5, CLEAN, shown), x)
    for threat, climbed in ((ANOTHER, zoo.classifier("digits", "cnn")), (ITSELF, shown)):
        *_, last = attacks.pgd(climbed, x, y, adapting.BUDGET, steps=scenes.ATTACK_STEPS)
        found = scene.fooling(5, threat, shown)
        assert torch.equal(found, last.x) and float((found - x).abs().max()) > 0.05
    other = scene.classifier(PLAIN, LAST, 4)
    assert torch.equal(scene.fooling(5, ANOTHER, other), scene.fooling(5, ANOTHER, shown))
    assert not torch.equal(scene.fooling(5, ITSELF, other), scene.fooling(5, ITSELF, shown))


def test_the_curves_are_those_of_the_records(scene, records):
    frame = scene.at(5, CONTRAST, 200, 4, CLEAN)
    losses, threats = frame["panels"][2:]
    assert losses["cursor"] == threats["cursor"] == 200
    for place, attack in enumerate((None, adapting.THROUGH_ANOTHER, adapting.THROUGH_ITSELF)):
        wanted = {
            r.settings["step"]: r.value
            for r in records
            if r.metric == "accuracy"
            and r.attack == attack
            and r.seed == 0
            and r.settings["variant"] == AdapterScene.RECIPES[CONTRAST][1]
        }
        assert sorted(wanted) == threats["x"]
        assert threats["series"][place]["y"] == pytest.approx(
            [wanted[step] for step in sorted(wanted)], abs=1e-4
        )
    rival, truth = (one["y"] for one in losses["series"])
    assert truth[0] == 0, "from where it began"
    assert len(rival) == len(truth) == len(losses["x"])


def test_the_note_says_what_is_shown(scene):
    said = scene.at(5, PLAIN, 0, 4, CLEAN)["note"]
    assert "no adapter" in said and "clean" in said
    said = scene.at(5, PLAIN, 300, 2, ITSELF)["note"]
    assert "an adapter of 300 steps and rank 2" in said and "white-box" in said
