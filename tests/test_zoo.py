"""Defences by name: what they are made of, what they promise, and what is missing said in one sentence."""

import shutil

import pytest
import torch
from diffclass import data, zoo
from diffclass.classifiers import cnn, idc
from diffclass.classifiers.purified import Defended, LikelihoodMaximisation, Purification
from diffclass.classifiers.votes import MajorityVote
from diffclass.storage import assets
from diffclass.zoo import networks
from torch.nn.functional import one_hot


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The digits' networks of this checkout, and baselines with their first weights."""
    target = tmp_path_factory.mktemp("assets")
    names = [
        networks.STUDENT,
        networks.HARDENED["digits"],
        networks.CONTRASTIVE["digits"],
        idc.FILES["digits"][0],
    ]
    for name in names:
        shutil.copy(assets.folder() / name, target)
    for name in cnn.FILES["digits"].values():
        cnn.save(cnn.ConvClassifier((1, 8, 8), 10, widths=(8, 8), seed=len(name)), target / name)
    assets.record([*names, *cnn.FILES["digits"].values()], target)
    return target


@pytest.fixture
def network_folder(folder, monkeypatch):
    monkeypatch.setenv("DIFFCLASS_ASSETS", str(folder))
    return folder


@pytest.fixture(scope="module")
def digits():
    world = data.digits()
    return world.test_images[:6], world.test_labels[:6]


@pytest.mark.parametrize("name", zoo.NAMES["digits"])
def test_every_defence_of_digits_keeps_the_contract(network_folder, digits, name):
    defence = zoo.defence("digits", name)
    with torch.no_grad():
        logits = defence(digits[0])
        again = defence(digits[0])
    assert (
        logits.shape == (6, 10)
        and defence.num_classes == 10
        and tuple(defence.image_shape) == (1, 8, 8)
    )
    assert defence.deterministic == (name != "vote") and (
        torch.equal(logits, again) or name == "vote"
    )
    if name in ("cnn", "adversarial", "vote"):
        assert not hasattr(defence, "with_fresh_noise")
        with pytest.raises(ValueError, match=f"expected no generator for {name}"):
            zoo.defence("digits", name, fresh=torch.Generator())
    else:
        random = zoo.defence("digits", name, fresh=torch.Generator().manual_seed(1))
        with torch.no_grad():
            assert not random.deterministic and not torch.equal(random(digits[0]), logits)
            assert not torch.equal(zoo.defence("digits", name, seed=1)(digits[0]), logits)


@pytest.mark.parametrize("name", ["lm-cnn", "rdc1", "rdc5", "rdc-released", "diffpure"])
def test_exact_gradients_and_those_of_the_identity_have_the_same_values(
    network_folder, digits, name
):
    x = digits[0][:2].clone().requires_grad_()
    exact = zoo.defence("digits", name)
    identity = zoo.defence("digits", name, exact=False)
    slopes = [torch.autograd.grad(made(x).square().sum(), x)[0] for made in (exact, identity)]
    torch.testing.assert_close(exact(x), identity(x))
    assert not torch.allclose(*slopes, rtol=0.05)


def test_the_parts_are_those_of_the_names(network_folder):
    made = {name: zoo.defence("digits", name) for name in zoo.NAMES["digits"]}
    assert {name for name, one in made.items() if isinstance(one, Defended)} == {
        "lm-cnn",
        "rdc1",
        "rdc5",
        "rdc-released",
        "rdc-contrastive",
        "diffpure",
    }
    assert [made[name].purifier.steps for name in ("rdc1", "rdc5", "rdc-released", "lm-cnn")] == [
        1,
        5,
        5,
        5,
    ]
    assert made["rdc5"].purifier.budget == zoo.budget("digits", "linf") == 0.1
    assert made["rdc-released"].purifier.budget is None and isinstance(
        made["diffpure"].purifier, Purification
    )
    assert isinstance(made["lm-cnn"].purifier, LikelihoodMaximisation)
    assert isinstance(made["lm-cnn"].classifier, cnn.ConvClassifier)
    assert isinstance(made["vote"], MajorityVote) and not made["vote"].classifier.deterministic
    for pair, weight in (
        (("cnn", "adversarial"), "enter.weight"),
        (("dc", "adversarial-dc"), "denoiser.network.enter.weight"),
        (("dc", "contrastive"), "denoiser.network.enter.weight"),
    ):
        assert not torch.equal(*(made[name].state_dict()[weight] for name in pair))


def test_the_purifier_does_not_repeat_the_noise_of_the_classifier(network_folder):
    made = zoo.defence("digits", "rdc5", seed=3)
    plain = zoo.defence("digits", "dc", seed=3)
    assert made.purifier.seed != 3 and torch.equal(made.classifier.bank.noise, plain.bank.noise)


def test_checkpoints_name_every_file_that_is_read(network_folder):
    wanted = {
        "dc": [networks.STUDENT],
        "vote": [networks.STUDENT],
        "rdc1": [networks.STUDENT],
        "idc": [idc.FILES["digits"][0]],
        "adversarial-dc": [networks.HARDENED["digits"]],
        "cnn": ["digits-cnn.safetensors"],
        "adversarial": ["digits-adversarial.safetensors"],
        "lm-cnn": [networks.STUDENT, "digits-cnn.safetensors"],
        "diffpure": [networks.STUDENT, "digits-cnn.safetensors"],
        "contrastive": [networks.CONTRASTIVE["digits"]],
        "rdc-contrastive": [networks.STUDENT, networks.CONTRASTIVE["digits"]],
    }
    for name, files in wanted.items():
        found = zoo.checkpoints("digits", name)
        assert sorted(found) == sorted(files)
        assert found == {file: assets.fingerprint(file) for file in files}
    assert zoo.checkpoints("plane:moons", "dc") == {}


def test_missing_weights_are_one_sentence_with_the_command(tmp_path, network_folder, monkeypatch):
    monkeypatch.setenv("DIFFCLASS_ASSETS", str(tmp_path))
    for name, command in (
        ("cnn", "--method cnn"),
        ("adversarial", "--method adversarial"),
        ("idc", "--method idc"),
        ("contrastive", "--method contrastive"),
    ):
        with pytest.raises(
            FileNotFoundError, match=f"train them with `diffclass train digits {command}`"
        ):
            zoo.defence("digits", name)
    with pytest.raises(FileNotFoundError, match="diffclass train digits"):
        zoo.defence("digits", "dc")


def test_photographs_without_an_unconditional_denoiser(monkeypatch):
    """The prototype has no null class: purifiers take the contrastive network, and say so where there is none."""
    assert zoo.defence("cifar10", "dc").image_shape == (3, 32, 32)
    monkeypatch.setattr(networks, "CONTRASTIVE", {"cifar10": "cifar10-missing.safetensors"})
    with pytest.raises(ValueError, match="trained without a null class"):
        zoo.defence("cifar10", "rdc1")
    with pytest.raises(
        FileNotFoundError, match="train them with `diffclass train cifar10 --method contrastive`"
    ):
        zoo.defence("cifar10", "contrastive")


@pytest.mark.parametrize("name", zoo.NAMES["plane"])
def test_the_plane_has_the_exact_denoiser(name):
    defence = zoo.defence("plane:moons", name)
    x, y = zoo.images("plane:moons", 8, seed=4)
    assert len(x) == 8 and not torch.equal(x, zoo.images("plane:moons", 8)[0])
    with torch.no_grad():
        scores = defence(x)
    assert scores.shape == (8, defence.num_classes) and bool(torch.isfinite(scores).all())
    assert (
        name.startswith("rdc") or int((scores.argmax(1) == y).sum()) >= 7
    )  # one band of likelihood misleads here
    if name == "vote":
        assert torch.equal(scores.sum(1), torch.full((8,), float(zoo.VOTES)))
        assert float((scores * one_hot(y, 2)).sum()) > 40


def test_names_that_do_not_exist():
    for call, said in (
        (lambda: zoo.defence("digits", "ddc"), "expected the defence of digits to be one of 'dc'"),
        (lambda: zoo.defence("plane:moons", "idc"), "the defence of plane"),
        (lambda: zoo.defence("mnist", "dc"), "the world"),
        (lambda: zoo.defence("plane:suns", "dc"), "the law of the plane"),
        (lambda: zoo.defence("digits:moons", "dc"), "without a law"),
        (lambda: zoo.budget("digits", "l1"), "the norm"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
