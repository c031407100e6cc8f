"""What an answer costs: calls, parameters and FLOP are counted, not estimated, and a record says where it was measured."""

import json

import pytest
import torch
from diffclass import noise, zoo
from diffclass.classifiers.base import Classifier
from diffclass.classifiers.bayes import BayesClassifier
from diffclass.data.worlds import world_of
from diffclass.evaluation import costs
from diffclass.zoo import networks
from test_cli import document, run
from torch import nn
from twins import rejected

DIGIT = world_of("digits").test(1)[0]


class Linear(Classifier):
    """64 numbers times a matrix, so many times: its FLOP are known by hand."""

    num_classes = 10
    image_shape = (1, 8, 8)
    scale = "scores"

    def __init__(self, times=1):
        super().__init__()
        self.layer = nn.Linear(64, 10)
        nn.init.zeros_(self.layer.weight)
        self.times = times
        self.eval()

    def logits(self, x, noise):
        return sum(self.layer(x.flatten(1)) for _ in range(self.times))

    @property
    def calls(self):
        return self.times


def half_of(name, classifier, picture, seconds=1.0):
    cost = costs.cost_of(name, classifier, picture, seconds)
    return costs.Cost(**{**vars(cost), "flop": cost.flop // 2})


@rejected({"multiply-adds for FLOP": dict(cost_of=half_of)})
def test_a_matrix_costs_what_it_costs(cost_of=costs.cost_of):
    for times in (1, 3):
        cost = cost_of("linear", Linear(times), DIGIT, seconds=0.01)
        assert cost.flop == times * 2 * 64 * 10
        assert (cost.calls, cost.parameters) == (times, 650)
        assert cost.seconds > 0 and cost.repetitions > 0


def by_sum(classifier):
    return sum(part.numel() for part in classifier.parameters())


@rejected({"every copy": dict(parameters_of=by_sum)})
def test_two_copies_of_one_network_count_once(parameters_of=costs.parameters_of):
    alone = parameters_of(zoo.classifier("digits", "dc"))
    assert parameters_of(zoo.classifier("digits", "rdc1")) == alone
    assert parameters_of(zoo.classifier("digits", "rdc-contrastive")) > 1.9 * alone
    cnn = parameters_of(zoo.classifier("digits", "cnn"))
    assert parameters_of(zoo.classifier("digits", "lm-cnn")) == alone + cnn


def test_a_zero_shot_classifier_costs_its_levels():
    """K heads in one call: FLOP grow with the levels alone; a network of one class a call needs K times the calls."""
    denoiser = networks.load_digits_denoiser(networks.STUDENT)
    bill = {}
    for levels in (2, 4):
        asked = BayesClassifier(denoiser, _levels(levels))
        bill[levels] = costs.cost_of("dc", asked, DIGIT, seconds=0.01)
    assert bill[4].flop == 2 * bill[2].flop and bill[4].calls == 4
    teacher = networks.load_digits_denoiser(networks.TEACHER)
    one_class_a_call = costs.cost_of("dc", BayesClassifier(teacher, _levels(2)), DIGIT, 0.01)
    assert one_class_a_call.calls == 20


def _levels(count):
    return noise.log_levels(*networks.DIGIT_RANGE, count)


def test_more_pictures_than_one_are_refused():
    with pytest.raises(ValueError, match="expected one picture to be timed, got 2"):
        costs.cost_of("linear", Linear(), torch.cat([DIGIT, DIGIT]))


def test_only_a_processor_that_is_shared_is_timed_by_its_own_clock():
    assert costs.clock_of("cpu") == "processor" and costs.clock_of("anything else") == "wall"


@pytest.mark.parametrize("world", ["digits", "cifar10"])
def test_the_committed_costs_are_those_of_todays_networks(world):
    about, kept = costs.kept(world)
    assert about["threads"] >= 1 and about["machine"] and about["precision"] == "fp32"
    for name in ("cnn", "idc"):
        classifier = costs.built(world, name)
        assert kept[name].calls == classifier.calls
        assert kept[name].parameters == costs.parameters_of(classifier)
        assert kept[name].flop == costs.flop(classifier)


def test_the_command_writes_a_record_that_is_read_again(tmp_path, monkeypatch):
    path = tmp_path / "records" / "costs-digits.json"
    path.parent.mkdir()
    done = run("--json", "compare-costs", "--only", "cnn,cohen", "--seconds", 0.01, "--store", path)
    content = document(done)
    assert [row["name"] for row in content["costs"]] == ["cnn", "cohen"]
    assert content["missing"] == [] and content["load"] >= 0
    monkeypatch.setattr(costs.assets, "folder", lambda: tmp_path)
    about, kept = costs.kept("digits")
    assert set(kept) == {"cnn", "cohen"} and about["clock"] in costs.CLOCKS
    with pytest.raises(FileNotFoundError, match="`diffclass compare-costs --world cifar10`"):
        costs.kept("cifar10")
    whole = json.loads(path.read_text())
    for spoilt, sentence in ((dict(schema=7), "schema 1"), (dict(costs=[{}]), "cannot be read")):
        path.write_text(json.dumps({**whole, **spoilt}))
        with pytest.raises(ValueError, match=sentence):
            costs.kept("digits")


def test_an_interrupted_comparison_goes_on_and_a_record_of_another_machine_does_not_count(
    tmp_path, monkeypatch
):
    path = tmp_path / "costs.json"
    command = ("--json", "compare-costs", "--seconds", 0.01, "--store", path, "--only")
    asked = []
    measured = costs.cost_of

    def counted(name, *values):
        if name == "cohen" and not asked[1:]:
            raise KeyboardInterrupt
        asked.append(name)
        return measured(name, *values)

    monkeypatch.setattr(costs, "cost_of", counted)
    assert run(*command, "cnn,cohen").exit_code == 130
    first = json.loads(path.read_text())["costs"]
    asked.append("interrupted")
    both = document(run(*command, "cnn,cohen"))["costs"]
    assert asked == ["cnn", "interrupted", "cohen"] and both[:1] == first
    path.write_text(json.dumps({**json.loads(path.read_text()), "machine": "another"}))
    assert document(run(*command, "cnn"))["costs"] != first
    assert asked[3:] == ["cnn"]
    path.write_text("{}")
    assert "cannot be read" in str(document(run(*command, "cnn")))


def test_a_classifier_that_cannot_be_built_is_named(monkeypatch):
    def broken(world, name, sigma_pixel):
        raise FileNotFoundError("expected weights, found none.")

    monkeypatch.setattr(costs, "built", broken)
    assert list(costs.measure("digits", ("cnn",), DIGIT)) == ["cnn: expected weights, found none."]
    done = run("compare-costs", "--only", "nobody")
    assert done.exit_code == 2 and "nobody" in done.stderr
