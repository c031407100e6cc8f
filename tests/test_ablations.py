"""What each part of IDC's recipe is worth: a variant is trained, measured and recorded, and all are on record."""

from types import SimpleNamespace

import pytest
import torch
from diffclass.classifiers.base import Held
from diffclass.classifiers.idc import TranslationClassifier
from diffclass.data.worlds import images_of
from diffclass.evaluation import accuracies
from diffclass.storage import assets, results
from diffclass.training import ablations
from diffclass.training.recipes import DIGITS_IDC
from diffclass.training.train import training_of


def test_a_variant_is_trained_and_its_numbers_are_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "ATTACKED", 6)
    monkeypatch.setattr(ablations, "ATTACK_STEPS", 2)
    path = tmp_path / "records.jsonl"
    records = list(ablations.ablate(path, steps=3, seed=1, only=["2 positions"]))
    assert records == results.read(path)
    assert [(r.n, r.settings["noise"], r.attack) for r in records] == [
        (400, "held", None),
        (400, "fresh", None),
        (6, "fresh", "PGD-2"),
    ]
    for record in records:
        assert record.world == "digits" and record.classifier == "idc" and record.seed == 1
        assert record.settings["variant"] == "2 positions" and record.settings["positions"] == 2
        assert record.settings["steps"] == 3
    attacked = records[2].settings
    assert records[2].what.startswith("upper bound") and attacked["epsilon"] == 0.15
    assert attacked["attack_steps"] == 2 and attacked["draws"] == ablations.DRAWS
    run = training_of(DIGITS_IDC(steps=3, positions=2), 1)
    *_, last = run
    held = Held.seeded(TranslationClassifier(run.average.eval()))
    correct = accuracies.accuracy(held, *images_of("digits", "test"))
    assert records[0].value * 400 == pytest.approx(correct, abs=1e-9)
    assert records[0].settings["final_loss"] == round(last.loss, 4)


def test_the_attack_draws_noise_anew_and_stays_in_its_budget(monkeypatch):
    monkeypatch.setattr(ablations, "ATTACK_STEPS", 2)
    images, labels = images_of("digits", "test")
    x = images[:4]
    run = training_of(DIGITS_IDC(steps=1), 0)
    list(run)
    classifier = TranslationClassifier(run.average.eval())
    asked = []
    sample = classifier.sample_noise
    monkeypatch.setattr(
        classifier, "sample_noise", lambda *given: asked.append(sample(*given)) or asked[-1]
    )
    found = ablations.attacked(classifier, x, labels[:4], torch.Generator().manual_seed(1), 0)
    assert float((found - x).abs().max()) <= ablations.BUDGET + 1e-6
    drawn = [noise for noise in asked if len(noise)]  # none of no pictures, which only shows shapes
    assert len(drawn) == 3 * ablations.DRAWS and not torch.equal(drawn[0], drawn[1])


def test_scrambled_labels_keep_every_distance():
    plain, scrambled = (
        training_of(DIGITS_IDC(scrambled=mixed), 0).denoiser.labels.flatten(1)
        for mixed in (False, True)
    )
    assert not torch.equal(plain, scrambled)
    assert torch.allclose(torch.cdist(plain, plain, p=1), torch.cdist(scrambled, scrambled, p=1))


def test_the_ablations_are_on_record():
    records = results.read(assets.folder() / "records" / "idc-digits.jsonl")
    assert {record.settings["variant"] for record in records} == set(ablations.ABLATIONS)
    for record in records:
        assert record.n in (100, 400) and record.seed is not None
        assert record.settings["steps"] >= 300 and record.world == "digits"
        assert (record.attack is not None) == ("epsilon" in record.settings)
        assert ("upper bound" in record.what) == (record.attack is not None)


def test_a_curve_counts_those_that_no_step_has_fooled(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "ATTACKED", 6)
    monkeypatch.setattr(ablations, "ATTACK_STEPS", 3)
    monkeypatch.setattr(ablations, "CURVE_STEPS", (1, 3))
    monkeypatch.setattr(ablations, "CURVE_BUDGETS", (0.05, 0.3))
    path = tmp_path / "records.jsonl"
    records = list(ablations.curves(path, steps=3, seed=1))
    assert records == results.read(path) and len(records) == 8
    by_hand, settings = ablations._trained("as in the recipe", 3, 1)
    images, labels = images_of("digits", "test")
    film = ablations.film_of(
        by_hand, images[:6], labels[:6], torch.Generator().manual_seed(2), 1, 0.05
    )
    fooled = [frame.fooled for frame in film]
    for record, after in zip(records[:2], (1, 3), strict=True):
        ever = torch.stack(fooled[: after + 1]).any(0)
        assert record.value == pytest.approx(float((~ever).double().mean()))
        assert record.attack == f"PGD-{after}" and record.settings["attack_steps"] == after
        assert record.settings["epsilon"] == 0.05 and record.settings["steps"] == settings["steps"]
    assert records[4].settings["inter"] == 0 and records[0].settings["inter"] > 0
    assert "upper bound" in records[0].what


def test_who_was_fooled_once_stays_fooled_on_a_curve(tmp_path, monkeypatch):
    """Fresh noise may read a picture again that an earlier step has fooled."""
    frames = [[False, False], [True, False], [False, False], [False, True]]
    film = [SimpleNamespace(fooled=torch.tensor(frame)) for frame in frames]
    monkeypatch.setattr(ablations, "film_of", lambda *given: film)
    monkeypatch.setattr(ablations, "ATTACKED", 2)
    monkeypatch.setattr(ablations, "CURVE_STEPS", (1, 2, 3))
    monkeypatch.setattr(ablations, "CURVE_BUDGETS", (0.1,))
    records = list(ablations.curves(tmp_path / "records.jsonl", steps=1))
    assert [record.value for record in records[:3]] == [0.5, 0.5, 0.0]


def test_the_curves_are_on_record():
    records = results.read(assets.folder() / "records" / "idc-curves.jsonl")
    places = [
        (r.settings["variant"], r.settings["epsilon"], r.settings["attack_steps"]) for r in records
    ]
    assert sorted(places) == sorted(
        (variant, budget, steps)
        for variant in ablations.CURVES
        for budget in ablations.CURVE_BUDGETS
        for steps in ablations.CURVE_STEPS
    )
    assert all(r.n == ablations.ATTACKED and r.settings["steps"] >= 300 for r in records)
