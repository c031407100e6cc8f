"""Truth maximisation: the loss is minus the likelihood of attacked images, and only an adapter learns from it."""

import functools
import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import twins
from diffclass import likelihood, noise, units
from diffclass.classifiers.cnn import ConvClassifier
from diffclass.denoisers import network, pipelines, tiny
from diffclass.denoisers.lora import Adapter
from diffclass.storage import assets, weights
from diffclass.training import hardening, measures, recipes, truth
from diffclass.training.hardening import Inner, adversarial_images
from diffclass.training.recipes import RECIPES
from diffclass.training.train import train
from diffclass.training.truth import Truth, truth_loss
from diffclass.zoo import networks

TMDC, CONTRASTIVE = networks.TRUTH["digits"].values()
LAYERS = recipes.ADAPTED_LAYERS["digits"]
INNER = Inner(0.1, 3, 0.5)


def student(classes=3):
    """A small denoiser of digits, its last layer awake."""
    made = network.build("MultiHeadDenoiser", "DigitNet", classes, (1, 8, 8), width=8, blocks=1)
    generator = torch.Generator().manual_seed(0)
    for value in made.parameters():
        if not value.any():
            value.data = 0.1 * torch.randn(value.shape, generator=generator)
    return made.eval()


def surrogate():
    """A small plain network."""
    return ConvClassifier((1, 8, 8), 3, widths=(4, 4), seed=1).eval()


def batch(images=4):
    """Images in model space, and their labels."""
    x = torch.rand(images, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return units.to_model(x), torch.arange(images) % 3


def by_hand(denoiser, images, labels, drawn, recipe):
    """The loss from `likelihood`'s own ELBO, image by image."""
    start, met, (sigma, weight, eps) = drawn

    def evidence(x, bank):
        sigma, _, eps = bank
        edges = torch.linspace(torch.tensor(recipe.low).log(), torch.tensor(recipe.high).log(), 5)
        levels = noise.Levels(sigma[0], edges[:-1].exp(), edges[1:].exp())
        every = [
            likelihood.elbo(
                denoiser, units.to_model(x[b : b + 1]), noise.NoiseBank(levels, eps[b][:, :, None])
            )
            for b in range(len(x))
        ]
        return torch.cat(every)

    def climbed(x):
        return surrogate()(x) if recipe.transferred else evidence(x, met) / recipe.temperature

    attacked = adversarial_images(climbed, units.to_pixel(images), labels, recipe.inner, start)
    every = evidence(attacked, (sigma, weight, eps))
    own = every[torch.arange(len(labels)), labels]
    wrong = torch.nn.functional.cross_entropy(every / recipe.temperature, labels)
    return -own.mean() / 64 + recipe.contrast * wrong


def clean_pictures(logits_of, x, y, inner, start):
    """An attack that changes nothing."""
    return x


def next_class(loss):
    """The loss of the class after the true one."""
    return lambda denoiser, images, labels, drawn: loss.value(
        denoiser, images, (labels + 1) % 3, drawn
    )


RECIPE = Truth(INNER, 0.1, 3.0)
PLAIN = truth_loss(RECIPE, surrogate)


@twins.rejected(
    {
        "clean pictures": dict(
            value=twins.patched(PLAIN.value, truth, adversarial_images=clean_pictures)
        ),
        "another class": dict(value=next_class(PLAIN)),
        "the other sign": dict(value=twins.scaled(PLAIN.value, -1)),
        "not per pixel": dict(value=twins.scaled(PLAIN.value, 64)),
    }
)
def test_the_loss_is_minus_the_elbo_of_the_truth_on_attacked_images(value=PLAIN.value):
    denoiser = student()
    images, labels = batch()
    drawn = PLAIN.draw(denoiser, images, labels, torch.Generator().manual_seed(2))
    wanted = by_hand(denoiser, images, labels, drawn, RECIPE)
    assert float(value(denoiser, images, labels, drawn)) == pytest.approx(float(wanted), rel=1e-4)


WHITE = replace(RECIPE, contrast=2.0, transferred=False)
CONTRAST = truth_loss(WHITE, surrogate)


@twins.rejected(
    {
        "no contrast": dict(loss=truth_loss(replace(WHITE, contrast=0.0), surrogate)),
        "no temperature": dict(loss=truth_loss(replace(WHITE, temperature=1.0), surrogate)),
        "another attack": dict(loss=truth_loss(replace(WHITE, transferred=True), surrogate)),
    }
)
def test_the_contrastive_loss_also_lowers_the_others(loss=CONTRAST):
    denoiser = student()
    images, labels = batch()
    drawn = loss.draw(denoiser, images, labels, torch.Generator().manual_seed(2))
    wanted = by_hand(denoiser, images, labels, drawn, WHITE)
    got = float(loss.value(denoiser, images, labels, drawn).detach())
    assert got == pytest.approx(float(wanted.detach()), rel=1e-4)


def test_plain_truth_pulls_every_head_that_it_shows_and_contrast_pushes_the_others():
    """The gradient in the heads of wrong classes: none without contrast, as the paper's loss never sees them."""
    images, labels = batch(1)
    pulls = {}
    for contrast in (0.0, 2.0):
        denoiser = student()
        loss = truth_loss(replace(RECIPE, contrast=contrast), surrogate)
        loss(denoiser, images, labels, torch.Generator().manual_seed(2)).backward()
        pulls[contrast] = denoiser.network.leave[2].weight.grad[1:3].abs().max()
    assert float(pulls[0.0]) == 0 < float(pulls[2.0])


def test_an_adapter_learns_the_truth_and_its_base_stays():
    base = student()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    adapted = Adapter.beside(base, LAYERS, 4).denoiser
    images, labels = batch(8)
    optimiser = torch.optim.AdamW(
        [value for value in adapted.parameters() if value.requires_grad], 2e-2
    )
    drawn = PLAIN.draw(adapted, images, labels, torch.Generator().manual_seed(2))
    losses = []
    for _ in range(12):
        optimiser.zero_grad()
        loss = PLAIN.value(adapted, images, labels, drawn)
        loss.backward()
        optimiser.step()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    again = Adapter.of(adapted)
    assert again.base == Adapter.beside(base, LAYERS, 4).base
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


@functools.cache
def prompted():
    """A tiny Stable Diffusion of three prompts."""
    with tempfile.TemporaryDirectory() as folder:
        saved, _ = tiny.stable_diffusion(Path(folder))
        return pipelines.from_pipeline(saved, ["cat", "dog", "ship"]).eval()


def latents_at_twice_their_scale(x):
    return 2 * prompted().autoencoder.encode(x)


def made_of_latents(encode=None, **changed):
    """Truth maximisation of pictures through the autoencoder of a text-to-image model, attacked through itself."""
    recipe = replace(RECIPE, low=0.1, high=5.0, levels=2, transferred=False, **changed)
    return truth_loss(recipe, surrogate, encode or prompted().autoencoder.encode)


@twins.rejected(
    {
        "latents that are not scaled": dict(
            value=lambda: made_of_latents(latents_at_twice_their_scale).value
        ),
        "clean pictures": dict(
            value=lambda: twins.patched(
                made_of_latents().value, truth, adversarial_images=clean_pictures
            )
        ),
        "not per number": dict(value=lambda: twins.scaled(made_of_latents().value, 16)),
    }
)
def test_the_truth_of_a_text_to_image_model_is_raised_in_its_latents(
    value=lambda: made_of_latents().value,
):
    model = prompted()
    adapted = Adapter.beside(model.denoiser, ("to_q", "to_v", "conv1"), 2).denoiser
    x = torch.rand(4, *model.autoencoder.image_shape, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(4) % 3
    loss = made_of_latents()
    drawn = loss.draw(adapted, units.to_model(x), labels, torch.Generator().manual_seed(2))
    start, met, (sigma, weight, eps) = drawn
    assert eps.shape == (4, 2, 1, *model.denoiser.image_shape)

    def evidence(pictures, sigma, weight, eps):
        z = model.autoencoder.encode(pictures)
        found = 0.0
        for level in range(2):
            noisy = z + sigma[0, level] * eps[:, level, 0]
            square = (adapted(noisy, sigma[0, level]) - z[:, None]).square().flatten(2).sum(2)
            found = found - weight[0, level] * square
        return found

    attacked = adversarial_images(
        lambda at: evidence(at, *met) / RECIPE.temperature, x, labels, INNER, start
    )
    assert float((attacked - x).abs().max()) > 0.09
    every = evidence(attacked, sigma, weight, eps)
    wanted = -every[torch.arange(4), labels].mean() / math.prod(model.denoiser.image_shape)
    got = value()(adapted, units.to_model(x), labels, drawn)
    assert float(got.detach()) == pytest.approx(float(wanted.detach()), rel=1e-4)
    got.backward()
    learned = {name for name, one in adapted.named_parameters() if one.grad is not None}
    assert learned and all(".lora_" in name for name in learned)
    assert all(one.grad is None for one in model.autoencoder.parameters())


def test_images_of_another_network_need_that_network():
    with pytest.raises(ValueError, match="expected a surrogate for images that fool another"):
        truth_loss(RECIPE, None)
    images, labels = batch()
    alone = truth_loss(WHITE, None)(student(), images, labels, torch.Generator().manual_seed(2))
    asked = CONTRAST(student(), images, labels, torch.Generator().manual_seed(2))
    assert torch.equal(alone, asked)


def test_an_adapter_of_a_text_to_image_model_learns():
    model = prompted()
    adapted = Adapter.beside(model.denoiser, ("to_q", "to_v", "conv1"), 2).denoiser
    x = torch.rand(4, *model.autoencoder.image_shape, generator=torch.Generator().manual_seed(0))
    loss = made_of_latents(contrast=1.0)
    labels = torch.arange(4) % 3
    drawn = loss.draw(adapted, units.to_model(x), labels, torch.Generator().manual_seed(2))
    learning = [value for value in adapted.parameters() if value.requires_grad]
    optimiser = torch.optim.AdamW(learning, 2e-2)
    losses = []
    for _ in range(8):
        optimiser.zero_grad()
        value = loss.value(adapted, units.to_model(x), labels, drawn)
        value.backward()
        optimiser.step()
        losses.append(float(value))
    assert losses[-1] < losses[0]


@pytest.fixture
def ours(monkeypatch):
    """Recipes of truth maximisation with a small measure and a small surrogate."""
    monkeypatch.setattr(measures, "CARD_STEPS", 2)
    small = ConvClassifier((1, 8, 8), 10, widths=(4, 4), seed=1).eval()
    for name in (TMDC, CONTRASTIVE):
        told = Truth(**{**RECIPES[name].says["truth"], "inner": INNER})
        measure = measures.bayes_under_both((0.1, 3.0), 4, 0.1, lambda: small, attacked=4)
        recipe = replace(
            RECIPES[name],
            measure=measure,
            loss=recipes.from_data(truth_loss(told, lambda: small)),
        )
        monkeypatch.setitem(RECIPES, name, recipe)


@pytest.mark.parametrize("name", [TMDC, CONTRASTIVE])
def test_the_command_trains_and_saves_the_adapter_alone(name, ours, tmp_path):
    base = student(10)
    network.save_denoiser(base, tmp_path / networks.STUDENT)
    with pytest.raises(ValueError, match="expected no widths for an adapter beside digits-student"):
        next(train(name, tmp_path, widths=(16,)))
    *_, last = train(name, tmp_path, steps=3, batch=8, measured=12)
    assert last.step == 3
    card = weights.card(tmp_path / name)
    assert card["accuracy"]["n"] == 12 == card["accuracy_by_transfer"]["n"]
    assert card["accuracy_under_attack"]["n"] == 4
    assert card["truth"]["inner"]["epsilon"] == 0.1 and card["rank"] == 4
    assert (
        card["start"] == networks.STUDENT and f"--method {RECIPES[name].method}" in card["command"]
    )
    loaded = Adapter.load(base.eval(), tmp_path / name)
    assert (tmp_path / name).stat().st_size < 4 * loaded.count + 20_000
    assert any(bool(value.any()) for key, value in loaded.weights.items() if "lora_B" in key)
    assert json.loads(json.dumps(card)) == card


def test_adapters_are_put_away_along_the_run(ours, tmp_path, monkeypatch):
    base = student(10)
    network.save_denoiser(base, tmp_path / networks.STUDENT)
    monkeypatch.setitem(RECIPES, TMDC, replace(RECIPES[TMDC], kept=2))
    saved = []
    for progress in train(TMDC, tmp_path, steps=4, batch=8, measured=4):
        saved.append((progress.step, (tmp_path / networks.along(TMDC, 2)).exists()))
    assert saved == [(1, False), (2, True), (3, True), (4, True)]
    assert not (tmp_path / networks.along(TMDC, 4)).exists()
    halfway, last = (
        Adapter.load(base.eval(), tmp_path / name) for name in (networks.along(TMDC, 2), TMDC)
    )
    moved = [not torch.equal(value, last.weights[name]) for name, value in halfway.weights.items()]
    assert any(moved)
    card = weights.card(tmp_path / networks.along(TMDC, 2))
    assert card["step"] == 2 and card["images_seen"] == 16 and card["start"] == networks.STUDENT
    assert networks.along(TMDC, 2) in (tmp_path / assets.SUMS).read_text()
    assert networks.command_for(networks.along(TMDC, 2)) == networks.command_for(TMDC)


@pytest.mark.parametrize("name", networks.TRUTH["cifar10"].values())
def test_photographs_have_the_same_recipes_beside_the_network_that_answers_at_once(name):
    recipe = RECIPES[name]
    assert recipe.needs == networks.CONTRASTIVE["cifar10"] == networks.BENEATH["cifar10"]
    told = recipe.says["truth"]
    assert (told["low"], told["high"]) == networks.NARROW_RANGE
    assert (
        networks.levels_of(name) is networks.NARROW_LEVELS and told["inner"]["epsilon"] == 8 / 255
    )
    assert told["transferred"] == (recipe.method == "tmdc") == (told["contrast"] == 0)


def test_a_merged_adapter_is_read_from_assets(tmp_path, monkeypatch):
    base = student()
    monkeypatch.setattr(assets, "folder", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match="diffclass train digits --method tmdc`"):
        networks.adapted(base, TMDC)
    adapter = Adapter.beside(base, LAYERS, 2)
    for value in adapter.weights.values():
        value.data.fill_(0.1)
    adapter.save(tmp_path / TMDC)
    assets.record([TMDC], tmp_path)
    x = torch.zeros(1, 1, 8, 8)
    merged = networks.adapted(base, TMDC)
    torch.testing.assert_close(merged(x, 1.0), adapter.denoiser(x, 1.0))
    assert (merged(x, 1.0) - base(x, 1.0)).abs().max() > 1e-3


def test_a_denoiser_without_an_adapter_has_none_to_save(tmp_path):
    with pytest.raises(
        ValueError, match="a denoiser with an adapter, got a MultiHeadDenoiser without"
    ):
        recipes.save_adapter(student(), tmp_path / "adapter.safetensors", {})
    assert hardening.drawn_bank(batch()[0], 0.1, 3.0, 4, torch.Generator())[2].shape[:3] == (
        4,
        4,
        1,
    )
