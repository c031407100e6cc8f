"""Losses of many images: resumed, shared by two processes, and cut short on memory, they stay the same losses."""

import json
import os
import subprocess
import sys

import pytest
import torch
from diffclass import noise
from diffclass.classifiers.bayes import BayesClassifier
from diffclass.denoisers.base import Denoiser
from diffclass.evaluation import measuring
from diffclass.noise import NoiseBank
from diffclass.zoo import networks

COUNT = 12
WORKER = """
import sys, torch
torch.set_num_threads(1)
from diffclass import data, measuring, recipes
classifier, world = recipes.digit_classifier(recipes.load_digits_denoiser()), data.digits()
images, labels = world.test_images[:12], world.test_labels[:12]
for _ in measuring.measure(classifier, images, labels, sys.argv[1], {"name": "t"}, batch=1):
    pass
"""


@pytest.fixture(scope="module")
def classifier():
    return networks.digit_classifier(networks.load_digits_denoiser())


@pytest.fixture(scope="module")
def digits():
    from diffclass import data

    world = data.digits()
    return world.test_images[:COUNT], world.test_labels[:COUNT]


def run(classifier, digits, folder, settings=None, **options):
    return list(
        measuring.measure(classifier, *digits, folder, settings or {"name": "t"}, **options)
    )


@pytest.fixture(scope="module")
def whole(classifier, digits, tmp_path_factory):
    """The losses of an unbroken run of one process."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(classifier, digits, folder, batch=5) == [(5, 12), (10, 12), (12, 12)]
    return measuring.read(folder)


def test_stored_losses_give_the_logits_of_the_classifier(classifier, digits, whole):
    with torch.no_grad():
        wanted = classifier(digits[0])
    got = whole.logits()
    torch.testing.assert_close(
        got - got.mean(1, keepdim=True), wanted - wanted.mean(1, keepdim=True), rtol=1e-4, atol=1e-3
    )
    assert whole.index.tolist() == list(range(COUNT)) and torch.equal(whole.labels, digits[1])
    assert bool(whole.hits().all())


def test_another_weighting_is_a_sum_not_a_run(classifier, digits, whole):
    other = BayesClassifier(classifier.denoiser, classifier.bank, noise.edm_weight)
    with torch.no_grad():
        wanted = other(digits[0])
    got = whole.logits(noise.edm_weight)
    torch.testing.assert_close(
        got - got.mean(1, keepdim=True), wanted - wanted.mean(1, keepdim=True), rtol=1e-3, atol=1e-3
    )


def test_a_run_cut_in_the_middle_of_a_line_loses_one_line_and_resumes(
    classifier, digits, whole, tmp_path
):
    run_ = measuring.measure(classifier, *digits, tmp_path, {"name": "t"}, batch=2)
    next(run_), next(run_)
    run_.close()
    path = tmp_path / "losses-0.jsonl"
    path.write_bytes(path.read_bytes()[:-30])  # the disk stopped here
    assert len(measuring.read(tmp_path).index) == 3
    assert run(classifier, digits, tmp_path, batch=4)[-1] == (9, 9)
    again = measuring.read(tmp_path)
    assert again.index.tolist() == list(range(COUNT))  # neither holes nor doubles
    torch.testing.assert_close(again.losses, whole.losses, rtol=1e-5, atol=1e-5)
    assert run(classifier, digits, tmp_path) == []  # nothing left to do


def test_two_processes_measure_what_one_does(whole, tmp_path):
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(script),
    ]
    done = subprocess.run(
        [*command, str(tmp_path / "two")], env=env, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(p.name for p in (tmp_path / "two").glob("losses*")) == [
        "losses-0.jsonl",
        "losses-1.jsonl",
    ]
    both = measuring.read(tmp_path / "two")
    assert torch.equal(both.index, whole.index)
    torch.testing.assert_close(both.losses, whole.losses, rtol=1e-5, atol=1e-5)


def test_other_settings_are_refused(classifier, digits, tmp_path):
    run(classifier, digits, tmp_path)
    with pytest.raises(ValueError, match=r"\['name'\] differ; name another folder"):
        run(classifier, digits, tmp_path, {"name": "other"})
    fewer = networks.digit_classifier(classifier.denoiser, noise.log_levels(0.1, 3.0, 8))
    with pytest.raises(ValueError, match=r"\['levels'\] differ"):
        run(fewer, digits, tmp_path)


def test_two_writers_are_refused(classifier, digits, tmp_path):
    first = measuring.measure(classifier, *digits, tmp_path, {"name": "t"}, batch=1)
    next(first)
    with pytest.raises(RuntimeError, match="another run holds its lock"):
        run(classifier, digits, tmp_path)
    first.close()
    assert run(classifier, digits, tmp_path)[-1] == (11, 11)


def test_fresh_noise_is_refused(classifier, digits, tmp_path):
    with pytest.raises(ValueError, match="expected a deterministic classifier"):
        run(classifier.with_fresh_noise(torch.Generator().manual_seed(0)), digits, tmp_path)


class Greedy(Denoiser):
    """Runs out of memory above ten images, as an accelerator would."""

    num_classes = 2
    image_shape = (1, 2, 2)
    sigma_range = (0.01, 10.0)

    def estimate(self, x_sigma, sigma, classes):
        if len(x_sigma) * len(classes) > 10:
            raise torch.OutOfMemoryError("out of memory")
        return x_sigma[:, None].expand(-1, len(classes), -1, -1, -1) * (
            1 + classes[:, None, None, None]
        )


def test_without_memory_the_chunk_is_halved_and_the_result_is_the_same():
    x = torch.rand(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    bank = NoiseBank.fixed(noise.log_levels(0.1, 1.0, 6), (1, 2, 2))
    wanted = BayesClassifier(Greedy(), bank, chunk=2).losses(x)
    greedy = BayesClassifier(Greedy(), bank, chunk=64)
    with pytest.warns(UserWarning, match="memory ran out; going on with"):
        got = measuring.losses_within_memory(greedy, x)
    assert torch.equal(got, wanted) and greedy.chunk == 8


def test_memory_that_does_not_suffice_for_one_is_an_error():
    class Starved(Greedy):
        def estimate(self, x_sigma, sigma, classes):
            raise torch.OutOfMemoryError("out of memory")

    bank = NoiseBank.fixed(noise.log_levels(0.1, 1.0, 2), (1, 2, 2))
    with pytest.warns(UserWarning), pytest.raises(torch.OutOfMemoryError):
        measuring.losses_within_memory(
            BayesClassifier(Starved(), bank, chunk=4),
            torch.rand(1, 1, 2, 2, generator=torch.Generator().manual_seed(0)),
        )


def test_a_damaged_line_and_an_empty_folder_get_a_sentence(classifier, digits, tmp_path):
    with pytest.raises(FileNotFoundError, match="measure them with `diffclass evaluate`"):
        measuring.read(tmp_path)
    run(classifier, digits, tmp_path)
    path = tmp_path / "losses-0.jsonl"
    path.write_text(path.read_text().replace('"label"', '"lebal"', 1))
    with pytest.raises(ValueError, match="line 1 of .* does not hold the losses of an image"):
        measuring.read(tmp_path)


def test_losses_of_another_number_of_levels_are_noticed(classifier, digits, tmp_path):
    run(classifier, digits, tmp_path)
    settings = json.loads((tmp_path / "settings.json").read_text())
    settings["levels"] = {name: values[:5] for name, values in settings["levels"].items()}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="expected losses of 5 levels on line 1"):
        measuring.read(tmp_path)


def test_thinned_levels_cover_the_same_range(whole):
    thin = whole.thinned(4)
    assert thin.losses.shape[2] == 4
    assert (
        thin.levels.lower[0] == whole.levels.lower[0]
        and thin.levels.upper[-1] == whole.levels.upper[-1]
    )
    assert torch.equal(thin.levels.upper[:-1], thin.levels.lower[1:])
    with pytest.raises(ValueError, match="expected a divisor of 16 levels, got 3"):
        whole.thinned(3)
