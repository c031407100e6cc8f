"""Losses of many images: resumed, shared by two processes, and cut short on memory, they stay the same losses."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from diffclass import noise, zoo
from diffclass.classifiers.base import Held
from diffclass.classifiers.bayes import BayesClassifier
from diffclass.denoisers.base import Denoiser
from diffclass.evaluation import accuracies, measuring
from diffclass.zoo import networks

COUNT = 12
WORKER = """
import sys

import torch

torch.set_num_threads(1)
from diffclass import data
from diffclass.evaluation import measuring
from diffclass.zoo import networks

classifier = networks.digit_classifier(networks.load_digits_denoiser())
noise = classifier.sample_noise(1, torch.Generator().manual_seed(0))
world = data.digits()
images = world.test_images[:12]
labels = world.test_labels[:12]
for _ in measuring.measure(classifier, noise, images, labels, sys.argv[1], {"name": "t"}, batch=1):
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


def held_noise(classifier, seed=0, images=1):
    return classifier.sample_noise(images, torch.Generator().manual_seed(seed))


def begun(classifier, digits, folder, settings=None, drawn=None, **options):
    drawn = held_noise(classifier) if drawn is None else drawn
    return measuring.measure(
        classifier, drawn, *digits, folder, settings or {"name": "t"}, **options
    )


def run(classifier, digits, folder, settings=None, drawn=None, **options):
    return list(begun(classifier, digits, folder, settings, drawn, **options))


@pytest.fixture(scope="module")
def whole(classifier, digits, tmp_path_factory):
    """The losses of an unbroken run of one process."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(classifier, digits, folder, batch=5) == [(5, 12), (10, 12), (12, 12)]
    return measuring.read(folder)


def test_stored_losses_give_the_logits_of_the_classifier(classifier, digits, whole):
    with torch.no_grad():
        wanted = Held.seeded(classifier)(digits[0])
    got = whole.logits()
    torch.testing.assert_close(
        got - got.mean(1, keepdim=True), wanted - wanted.mean(1, keepdim=True), rtol=1e-4, atol=1e-3
    )
    assert whole.index.tolist() == list(range(COUNT)) and torch.equal(whole.labels, digits[1])
    assert bool(whole.hits().all())


def test_another_weighting_is_a_sum_not_a_run(classifier, digits, whole):
    other = BayesClassifier(
        classifier.denoiser, classifier.levels, classifier.samples, noise.edm_weight
    )
    with torch.no_grad():
        wanted = Held.seeded(other)(digits[0])
    got = whole.logits(noise.edm_weight)
    torch.testing.assert_close(
        got - got.mean(1, keepdim=True), wanted - wanted.mean(1, keepdim=True), rtol=1e-3, atol=1e-3
    )


def test_a_run_cut_in_the_middle_of_a_line_loses_one_line_and_resumes(
    classifier, digits, whole, tmp_path
):
    stopped = begun(classifier, digits, tmp_path, batch=2)
    next(stopped)
    next(stopped)
    stopped.close()
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
    first = begun(classifier, digits, tmp_path, batch=1)
    next(first)
    with pytest.raises(RuntimeError, match="another run holds its lock"):
        run(classifier, digits, tmp_path)
    first.close()
    assert run(classifier, digits, tmp_path)[-1] == (11, 11)


def test_a_noise_for_each_image_is_refused(classifier, digits, tmp_path):
    """A resumed run, or another process, would give an image the noise of another."""
    own = held_noise(classifier, images=COUNT)
    with pytest.raises(ValueError, match="expected noise for 1 pictures.*got noise for 12"):
        run(classifier, digits, tmp_path / "new", drawn=own)
    with pytest.raises(ValueError, match="expected noise of shape .* for BayesClassifier, got"):
        run(classifier, digits, tmp_path / "new", drawn=())
    assert not (tmp_path / "new").exists()


def test_the_noise_decides_the_losses(classifier, digits, whole, tmp_path):
    run(classifier, digits, tmp_path, drawn=held_noise(classifier, seed=1))
    other = measuring.read(tmp_path)
    assert not torch.allclose(other.losses, whole.losses, rtol=0.01)
    assert other.losses.shape == whole.losses.shape == (COUNT, 10, 16)


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
    levels = noise.log_levels(0.1, 1.0, 6)
    small = BayesClassifier(Greedy(), levels, chunk=2)
    drawn = held_noise(small)
    wanted = small.losses(x, drawn)
    greedy = BayesClassifier(Greedy(), levels, chunk=64)
    with pytest.warns(UserWarning, match="memory ran out; going on with"):
        fitting, got = measuring.losses_within_memory(greedy, x, drawn)
    assert torch.equal(got, wanted) and fitting.chunk == 8
    assert greedy.chunk == 64  # what was passed in is not changed
    again, same = measuring.losses_within_memory(fitting, x, drawn)
    assert again is fitting and torch.equal(same, wanted)


def test_a_run_goes_on_with_the_chunk_that_fits(tmp_path, recwarn):
    greedy = BayesClassifier(Greedy(), noise.log_levels(0.1, 1.0, 6), chunk=64)
    x = torch.rand(12, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    pictures = (x, torch.zeros(12, dtype=torch.long))
    assert run(greedy, pictures, tmp_path, batch=4)[-1] == (12, 12)
    assert len(recwarn) == 3  # 32, 16, 8: once for all three batches
    wanted = greedy.changed(chunk=2).losses(x, held_noise(greedy))
    torch.testing.assert_close(measuring.read(tmp_path).losses, wanted, rtol=1e-5, atol=1e-5)


def test_memory_that_does_not_suffice_for_one_is_an_error():
    class Starved(Greedy):
        def estimate(self, x_sigma, sigma, classes):
            raise torch.OutOfMemoryError("out of memory")

    starved = BayesClassifier(Starved(), noise.log_levels(0.1, 1.0, 2), chunk=4)
    x = torch.rand(1, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning), pytest.raises(torch.OutOfMemoryError):
        measuring.losses_within_memory(starved, x, held_noise(starved))


def test_a_damaged_line_and_an_empty_folder_get_a_sentence(classifier, digits, tmp_path):
    with pytest.raises(FileNotFoundError, match="measure them with `diffclass evaluate`"):
        measuring.read(tmp_path)
    run(classifier, digits, tmp_path)
    path = tmp_path / "losses-0.jsonl"
    path.write_text(path.read_text().replace('"label"', '"lebal"', 1))
    with pytest.raises(ValueError, match="line 1 of .* does not hold the losses of an image"):
        measuring.read(tmp_path)


def change_line(folder, number, change):
    """Change one line of stored losses."""
    path = folder / "losses-0.jsonl"
    lines = path.read_text().splitlines()
    row = json.loads(lines[number])
    change(row)
    lines[number] = json.dumps(row)
    path.write_text("".join(line + "\n" for line in lines))


def worst_of_all(row, value):
    row["losses"][0][0] = value


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda row: worst_of_all(row, float("nan")), "expected finite losses .* on line 2 .* nan"),
        (lambda row: worst_of_all(row, float("inf")), "expected finite losses .* on line 2 .* inf"),
        (lambda row: worst_of_all(row, -1.0), "that are not negative on line 2 .* got -1.0"),
        (lambda row: row.update(label=77), "expected a label from 0 to 9 on line 2 .*, got 77"),
        (lambda row: row.update(label=-1), "expected a label from 0 to 9 on line 2 .*, got -1"),
        (lambda row: row.update(label=1.0), "expected a label from 0 to 9 on line 2 .*, got 1.0"),
        (lambda row: row.update(label=True), "expected a label from 0 to 9 on line 2 .*, got True"),
        (lambda row: row.update(index=-1), "expected the number of an image.* line 2 .* got -1"),
        (lambda row: row.update(index="1"), "expected the number of an image.* line 2 .* got '1'"),
        (lambda row: row.update(index=400), "from 0 to 399, on line 2 .*, got 400"),
        (lambda row: row.update(index=0), "expected each image once, got image 0 again on line 2 "),
        (lambda row: row["losses"].pop(), "expected losses of 10 classes on line 2 .*, got 9"),
        (lambda row: row.update(losses="x"), "line 2 of .* does not hold the losses of an image"),
    ],
)
def test_stored_losses_are_not_trusted(classifier, digits, tmp_path, change, said):
    run(classifier, digits, tmp_path, {"world": "digits"})
    change_line(tmp_path, 1, change)
    with pytest.raises(ValueError, match=said):
        measuring.read(tmp_path)
    with pytest.raises(ValueError, match=said):
        run(classifier, digits, tmp_path, {"world": "digits"})


def test_stored_labels_are_those_of_the_world(classifier, digits, tmp_path):
    run(classifier, digits, tmp_path)
    right = int(digits[1][1])
    change_line(tmp_path, 1, lambda row: row.update(label=(right + 1) % 10))
    said = (
        f"expected the label {right} of image 1 on line 2 of .*, got {(right + 1) % 10}; the file"
    )
    with pytest.raises(ValueError, match=said):
        run(classifier, digits, tmp_path)


def test_settings_without_levels_get_a_sentence(classifier, digits, tmp_path):
    run(classifier, digits, tmp_path)
    (tmp_path / "settings.json").write_text(json.dumps({"name": "t"}))
    with pytest.raises(ValueError, match="to have noise levels, got one without"):
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
    # the level that stands for four is one of the two in their middle
    assert torch.equal(thin.levels.sigma, whole.levels.sigma[2::4])
    assert torch.equal(thin.losses, whole.losses[..., 2::4])
    with pytest.raises(ValueError, match="expected a divisor of 16 levels, got 3"):
        whole.thinned(3)


# ---------------------------------------------------------------------------------------------------------------------
# Accuracies of trials


def test_a_trial_by_its_parts_is_the_trial_by_its_name():
    """dc is the best denoiser at the course's levels, with one held noise."""
    parts = accuracies.bayes_trial("digits", limit=COUNT)
    named = accuracies.named_trial("digits", "DC", limit=COUNT)
    with torch.no_grad():
        assert torch.equal(parts.held(parts.images), named.held(named.images))
    assert (parts.name, named.name, named.optimal) == ("dc", "dc", None)
    assert parts.checkpoint == named.checkpoint
    assert list(zoo.checkpoints("digits", "dc").values()) == [parts.checkpoint]


def test_hits_are_counted_batch_by_batch(digits):
    images, labels = digits
    wrong = torch.where(torch.arange(COUNT) % 3 == 0, (labels + 1) % 10, labels)
    held = accuracies.named_trial("digits", "dc", limit=COUNT).held
    counted = list(accuracies.hits(held, images, wrong, batch=5))
    assert [seen for _, seen in counted] == [5, 10, 12]
    assert [correct for correct, _ in counted] == [3, 6, 8]
    assert accuracies.accuracy(held, images, wrong) == 8
    assert accuracies.accuracy(held, images[:0], labels[:0]) == 0

    for wrong, kind in ((torch.nan, "NaN"), (torch.inf, "infinite")):

        def broken(x, wrong=wrong):
            return held(x) + (wrong if torch.equal(x[0], images[5]) else 0.0)

        counted = accuracies.hits(broken, images, labels, batch=5)
        assert next(counted) == (5, 5)
        with pytest.raises(FloatingPointError, match=f"became {kind} and cannot be judged"):
            next(counted)


def test_a_line_that_no_reader_can_read_gets_a_sentence(classifier, digits, tmp_path):
    run(classifier, digits, tmp_path, batch=12)
    path = tmp_path / "losses-0.jsonl"
    path.write_text('{"index": ' + "[" * 100_000 + "\n" + path.read_text())
    with pytest.raises(ValueError, match=f"expected stored losses in {tmp_path}, got something"):
        measuring.read(tmp_path)


def test_stored_losses_under_weights_that_are_not_finite_name_no_class(whole):
    for wrong, kind in ((torch.nan, "NaN"), (torch.inf, "infinite")):
        with pytest.raises(FloatingPointError, match=f"became {kind} and cannot be judged"):
            whole.hits(lambda levels, wrong=wrong: wrong * levels.sigma)


def test_a_hundred_images_are_classified_at_a_time():
    images = torch.zeros(250, 1, 1, 1)
    labels = torch.arange(250) % 3
    always_one = torch.tensor([[0.0, 1.0, 0.0]])
    counted = list(accuracies.hits(lambda x: always_one.expand(len(x), 3), images, labels))
    assert counted == [(33, 100), (67, 200), (83, 250)]


def test_a_trial_equals_itself_alone():
    """Its images are tensors, whose equality is no yes or no."""
    trial = accuracies.bayes_trial("plane:moons", limit=5)
    assert trial in {trial} and trial != replace(trial, images=trial.images.clone())


def test_stored_losses_become_a_record_for_every_weighting(digits, whole):
    trial = accuracies.bayes_trial("digits", limit=COUNT)
    records = accuracies.stored_records(trial, whole)
    assert [record.settings["weighting"] for record in records] == list(noise.WEIGHTINGS)
    for record, weighting in zip(records, noise.WEIGHTINGS.values(), strict=True):
        right = int((whole.logits(weighting).argmax(1) == digits[1]).sum())
        assert (record.value, record.n) == (right / COUNT, COUNT)
        assert record.checkpoint == trial.checkpoint and record.attack is None
    assert "weighting" not in accuracies.store_settings(trial, "fp32")


def test_on_the_plane_the_best_that_any_classifier_can_reach_is_recorded_too():
    trial = accuracies.bayes_trial("plane:moons", limit=60, seed=3)
    measured, best = accuracies.records_of(trial, 41)
    assert (measured.classifier, best.classifier) == ("dc", "exact")
    assert measured.value == 41 / 60 and best.value == trial.optimal / 60 >= 0.9
    assert measured.world == best.world == "plane:moons" and measured.seed == best.seed == 3
    assert measured.checkpoint is None
