"""What a picture's losses cost: every way measures the same numbers, and is counted as it is."""

import json

import pytest
import torch
from diffclass import data, noise, units
from diffclass.classifiers.bayes import BayesClassifier, bank_of
from diffclass.evaluation import timing
from diffclass.zoo import networks, noised
from test_cli import run


def digits_classifier(name=networks.STUDENT, levels=3, samples=1):
    """The course's classifier of digits at few levels."""
    denoiser = networks.load_digits_denoiser(name)
    return BayesClassifier(denoiser, noise.log_levels(0.1, 3.0, levels), samples)


@pytest.mark.parametrize("name", [networks.STUDENT, networks.TEACHER])
def test_every_way_measures_the_losses_of_the_classifier(name):
    classifier = digits_classifier(name)
    x = data.digits().test_images[5:6]
    drawn = classifier.sample_noise(1, torch.Generator().manual_seed(3))
    wanted = classifier.losses(x, drawn)[0]
    bank = bank_of(classifier.levels, drawn)
    for way in timing.WAYS.values():
        got = way(classifier.denoiser, units.to_model(x), bank)
        assert got.shape == wanted.shape == (10, 3)
        assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_the_ways_ask_the_network_as_often_as_they_say():
    classifier = digits_classifier(networks.TEACHER)
    x = units.to_model(data.digits().test_images[5:6])
    bank = bank_of(classifier.levels, classifier.sample_noise(1, torch.Generator().manual_seed(3)))
    rows = []
    hook = classifier.denoiser.network.register_forward_pre_hook(
        lambda _, inputs: rows.append(len(inputs[0]))
    )
    seen = {}
    for name, way in timing.WAYS.items():
        rows.clear()
        with torch.no_grad():
            way(classifier.denoiser, x, bank)
        seen[name] = (len(rows), sum(rows))
    hook.remove()
    assert seen == {"one by one": (30, 30), "class by class": (10, 30), "all at once": (1, 30)}


def test_timings_compare_with_the_plain_loop():
    rows = list(timing.timings(digits_classifier(), data.digits().test_images[:1], seconds=0.01))
    assert [row.way for row in rows] == list(timing.WAYS)
    assert rows[0].apart == 0 and all(row.apart < 1e-4 for row in rows)
    assert all(row.seconds > 0 and row.repetitions > 0 for row in rows)
    # ten heads and three levels in one call: far from the thirty of the loop
    assert rows[2].seconds < rows[0].seconds / 2


def test_votes_are_timed_one_by_one_and_together():
    """A network of eight levels takes longer than a CNN, and a vote alone longer than its share of a hundred."""
    built = {name: noised.classifier("digits", name, 0.25) for name in ("cohen", "epndc")}
    rows = list(timing.vote_timings(built, data.digits().test_images[:1], 0.25, seconds=0.05))
    cohen, epndc = rows
    assert [row.name for row in rows] == ["cohen", "epndc"]
    assert (cohen.calls, epndc.calls) == (1, 8) and epndc.vote > 3 * cohen.vote
    assert all(row.alone > row.vote > 0 and row.repetitions > 0 for row in rows)
    assert epndc.certify(1000) == 1000 * epndc.vote


def test_the_processor_is_named_where_the_system_tells(tmp_path):
    about = tmp_path / "cpuinfo"
    about.write_text("processor : 0\nmodel name\t: Some Chip 9000\nmodel name : Another\n")
    assert timing.processor(about) == "Some Chip 9000"
    assert timing.processor(tmp_path / "nothing") != ""


def test_the_command_times_votes_and_says_what_is_missing():
    done = run(
        "--json", "compare-votes", "--world", "digits", "--only", "cohen", "--seconds", "0.01"
    )
    content = json.loads(done.stdout)
    assert [row["name"] for row in content["classifiers"]] == ["cohen"]
    assert content["classifiers"][0]["certify"]["10000"] > 0 and content["missing"] == []
    done = run("compare-votes", "--world", "digits", "--only", "nobody", "--seconds", "0.01")
    assert done.exit_code == 2 and "expected" in done.stderr


def test_what_cannot_be_compared_gets_a_sentence():
    x = data.digits().test_images
    with pytest.raises(
        ValueError, match="expected one picture and one noise sample a level, got 2"
    ):
        list(timing.timings(digits_classifier(), x[:2]))
    with pytest.raises(
        ValueError, match="expected one picture and one noise sample a level, got 1"
    ):
        list(timing.timings(digits_classifier(samples=2), x[:1]))
    with pytest.raises(ValueError, match="expected the precision fp32 or bf16, got 'fp8'"):
        list(timing.timings(digits_classifier(), x[:1], precision="fp8"))


def test_the_command_reports_every_way(monkeypatch):
    arguments = ("compare", "--world", "digits", "--classifier", "dc", "--levels", "2")
    done = run(*arguments, "--seconds", "0.01", "--json")
    content = json.loads(done.stdout)
    assert done.exit_code == 0 and content["levels"] == 2
    assert [row["way"] for row in content["ways"]] == list(timing.WAYS)
    assert content["ways"][0]["times_as_fast"] == 1
    other = run("compare", "--world", "digits", "--classifier", "cnn", "--json")
    assert other.exit_code == 2
    assert "which has no losses to time" in json.loads(other.stdout)["error"]
    wrong = {**timing.WAYS, "all at once": lambda *asked: 1.1 * timing.all_at_once(*asked)}
    monkeypatch.setattr(timing, "WAYS", wrong)
    done = run(*arguments, "--seconds", "0.01")
    assert done.exit_code == 1 and "THE LOSSES DIFFER" in done.stdout
