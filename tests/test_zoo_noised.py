"""The table of what is smoothed: each name builds what it says, for the noise that it is told."""

import shutil

import pytest
import torch
from diffclass import data, zoo
from diffclass.classifiers import cnn
from diffclass.classifiers.base import Held, draw
from diffclass.classifiers.bayes import BayesClassifier, ExactClassifier
from diffclass.classifiers.mirrored import Mirrored
from diffclass.classifiers.noised import (
    ApproximateNoisedClassifier,
    NoisedBayesClassifier,
    TrainedOnNoise,
)
from diffclass.classifiers.one_call import NearestHeadClassifier, NoisedOneCallClassifier
from diffclass.classifiers.purified import Denoising, PurifiedClassifier, Restoration
from diffclass.classifiers.smoothed import Smoothed
from diffclass.classifiers.votes import MajorityVote
from diffclass.storage import assets
from diffclass.zoo import classifiers, networks, noised
from diffclass.zoo.noised import NoisedEntry

NETWORKS = (
    "epndc",
    "apndc",
    "apndc-path",
    "one-call-noised",
    "nearest-head",
    "denoised-cnn",
    "densepure",
    "densepure-40",
    "diffpure-dc",
)
ECONOMICAL = ("epndc-own-noise", "epndc-sifted", "epndc-raced")
OF_NOISE = ("cohen", "smoothadv", "macer", "consistency")
PLANE = (
    "epndc",
    "apndc",
    "apndc-path",
    "one-call-noised",
    "nearest-head",
    "exact",
    "diffpure-dc",
)
SIGMA = 0.25


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The digits' networks of this checkout, and networks of noise 0.25 with their first weights."""
    target = tmp_path_factory.mktemp("assets")
    files = [networks.STUDENT, networks.CONTRASTIVE["digits"], networks.BASELINES["digits"]["cnn"]]
    for file in files:
        shutil.copy(assets.folder() / file, target)
    for seed, method in enumerate(OF_NOISE):
        file = f"digits-{method}-0.25.safetensors"
        cnn.save(cnn.ConvClassifier((1, 8, 8), 10, widths=(8, 8), seed=seed), target / file)
        files.append(file)
    assets.record(files, target)
    return target


@pytest.fixture
def network_folder(folder, monkeypatch):
    monkeypatch.setenv("DIFFCLASS_ASSETS", str(folder))
    return folder


@pytest.fixture(scope="module")
def digits():
    """Digits with noise 0.25 on them, and their classes."""
    world = data.digits()
    eps = torch.randn(world.test_images[:60].shape, generator=torch.Generator().manual_seed(1))
    return world.test_images[:60] + SIGMA * eps, world.test_labels[:60]


def test_the_names_of_every_world():
    assert noised.names("digits") == noised.names("digits:noise-3") == (*NETWORKS, *OF_NOISE)
    photographs = noised.names("cifar10")
    assert set(photographs) == {*NETWORKS, *OF_NOISE, "one-call-mirrored"}
    assert noised.names("gallery") == photographs
    for law in data.plane.PLANE_LAWS:
        assert noised.names(f"plane:{law}") == PLANE
        assert noised.all_names(f"plane:{law}") == (*PLANE, *zoo.names(f"plane:{law}"))
    assert noised.names("hundred") == ("epndc", *ECONOMICAL, *PLANE[1:])
    assert set(noised.ENTRIES) == {*NETWORKS, *OF_NOISE, *ECONOMICAL, "one-call-mirrored", "exact"}
    assert zoo.noised is noised


def test_every_entry_tells_the_reader_what_it_is():
    entries = noised.ENTRIES.values()
    for name, entry in noised.ENTRIES.items():
        assert entry.name == name and entry.title and entry.source
        assert entry.sentence.endswith(".") and len(entry.sentence.split()) > 5
    others = classifiers.ENTRIES.values()
    for field in ("title", "sentence"):
        told = [vars(entry)[field] for entry in (*entries, *others)]
        assert len(set(told)) == len(told)


@pytest.mark.parametrize("name", (*NETWORKS, *OF_NOISE))
def test_every_classifier_of_noised_digits_brings_its_noise(network_folder, digits, name):
    model = noised.classifier("digits", name, SIGMA)
    assert model.sigma_pixel == SIGMA and not model.training and model.num_classes == 10
    assert Smoothed(model).sigma == SIGMA
    x_tau = digits[0][:3]
    assert float(x_tau.min()) < 0
    with torch.no_grad():
        noise = draw(model, 3, 0, "one")
        logits = model(x_tau, noise)
        assert logits.shape == (3, 10) and torch.equal(model(x_tau, noise), logits)
    assert model.complaints(x_tau) == []


def test_the_parts_are_those_of_the_names(network_folder):
    built = {name: noised.classifier("digits", name, SIGMA) for name in noised.names("digits")}
    kinds = {
        "epndc": NoisedBayesClassifier,
        "apndc": ApproximateNoisedClassifier,
        "apndc-path": ApproximateNoisedClassifier,
        "one-call-noised": NoisedOneCallClassifier,
        "nearest-head": NearestHeadClassifier,
        "denoised-cnn": PurifiedClassifier,
        "densepure": MajorityVote,
        "densepure-40": MajorityVote,
        "diffpure-dc": PurifiedClassifier,
        **dict.fromkeys(OF_NOISE, TrainedOnNoise),
    }
    for name, kind in kinds.items():
        assert type(built[name]) is kind, name
    assert (built["apndc"].form, built["apndc-path"].form) == ("ensemble", "path")
    assert isinstance(built["denoised-cnn"].purifier, Denoising)
    walk = built["densepure"].mean.classifier
    assert isinstance(walk.purifier, Restoration)
    assert isinstance(walk.classifier, cnn.ConvClassifier)
    assert isinstance(built["diffpure-dc"].purifier, Restoration)
    assert isinstance(built["diffpure-dc"].classifier, BayesClassifier)
    weights = [built[name].classifier.state_dict()["enter.weight"] for name in OF_NOISE]
    assert all(
        not torch.equal(one, other) for i, one in enumerate(weights) for other in weights[:i]
    )
    calls = {name: model.calls for name, model in built.items()}
    assert calls == {
        "epndc": 8,
        "apndc": 9,
        "apndc-path": 9,
        "one-call-noised": 1,
        "nearest-head": 1,
        "denoised-cnn": 2,
        "densepure": 10 * 11,
        "densepure-40": 40 * 11,
        "diffpure-dc": 10 + 16,
        **dict.fromkeys(OF_NOISE, 1),
    }
    for name in ("epndc", "apndc"):
        assert float(built[name].levels.upper[-1]) == pytest.approx(networks.DIGIT_RANGE[1])


def test_networks_for_noise_name_noised_digits(network_folder, digits):
    """Those that were trained, at noise 0.25: all far above chance, the exact posterior and one call above nine tenths."""
    x_tau, y = digits
    right = {}
    for name in NETWORKS:
        if name == "densepure-40":
            continue
        model = noised.classifier("digits", name, SIGMA)
        with torch.no_grad():
            found = model(x_tau, draw(model, len(y), 0, "accuracy")).argmax(1)
        right[name] = float((found == y).double().mean())
    assert min(right.values()) > 0.8, right
    assert min(right["epndc"], right["one-call-noised"], right["denoised-cnn"]) > 0.9, right


def test_classifiers_of_clean_pictures_come_as_they_are(network_folder):
    for name in ("cnn", "dc", "one-call"):
        model = noised.classifier("digits", name, SIGMA)
        assert model.sigma_pixel is None and type(model) is type(zoo.classifier("digits", name))
        assert Smoothed(model, SIGMA).sigma == SIGMA
        assert noised.checkpoints("digits", name, SIGMA) == zoo.checkpoints("digits", name)
    assert noised.entry_of("digits", "CNN") is classifiers.ENTRIES["cnn"]
    assert noised.entry_of("digits", "EPNDC") is noised.ENTRIES["epndc"]


def test_points_of_the_plane_are_classified_as_by_the_truth():
    law = data.moons()
    x = law.sample(100, torch.Generator().manual_seed(0))[0]
    x_tau = x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    truth = noised.classifier("plane:moons", "exact", 0.2)
    assert isinstance(truth, ExactClassifier)
    for name in ("epndc", "one-call-noised", "nearest-head", "apndc-path"):
        model = noised.classifier("plane:moons", name, 0.2)
        found = Held.seeded(model)(x_tau).argmax(1)
        agree = float((found == truth(x_tau).argmax(1)).double().mean())
        assert agree > 0.9, (name, agree)
        assert noised.checkpoints("plane:moons", name, 0.2) == {}


def test_the_prior_of_a_law_is_that_of_its_classifiers():
    for name in ("epndc", "apndc", "exact"):
        model = noised.classifier("plane:imbalanced", name, 0.2)
        wanted = torch.as_tensor(data.imbalanced().priors).double()
        torch.testing.assert_close(model.log_prior.exp(), wanted, rtol=0, atol=1e-6)


def test_checkpoints_name_every_file_that_is_read(network_folder, monkeypatch):
    heads = [networks.CONTRASTIVE["digits"]]
    plain = "digits-cnn.safetensors"
    wanted = {
        **dict.fromkeys(("epndc", "apndc", "apndc-path", "one-call-noised", "nearest-head"), heads),
        **dict.fromkeys(("denoised-cnn", "densepure", "densepure-40"), [networks.STUDENT, plain]),
        "diffpure-dc": [networks.STUDENT],
        **{method: [f"digits-{method}-0.25.safetensors"] for method in OF_NOISE},
    }
    assert set(wanted) == set(noised.names("digits"))
    read = []
    trained = networks.trained
    monkeypatch.setattr(networks, "trained", lambda file: read.append(file) or trained(file))
    for name, files in wanted.items():
        listed = noised.checkpoints("digits", name, SIGMA)
        assert listed == {file: assets.fingerprint(file) for file in sorted(files)}
        read.clear()
        noised.classifier("digits", name, SIGMA)
        assert set(read) == set(files)


@pytest.mark.parametrize("method", OF_NOISE)
def test_a_network_of_another_noise_is_another_file(network_folder, method):
    command = f"train them with `diffclass train digits --method {method} --sigma 0.5`"
    with pytest.raises(FileNotFoundError, match=f"digits-{method}-0.5.safetensors.*{command}"):
        noised.classifier("digits", method, 0.5)
    assert networks.command_for(f"cifar10-{method}-0.125.safetensors") == (
        f"diffclass train cifar10 --method {method} --sigma 0.125"
    )
    assert networks.smoothing_file("digits", method.upper(), 1) == (
        f"digits-{method}-1.safetensors"
    )


def test_photographs_are_answered_where_their_network_was_trained():
    """It knows levels from 0.05 to 1 in model units: one call up to 0.5 in pixels, losses only below."""
    for name in ("one-call-noised", "nearest-head", "one-call-mirrored", "denoised-cnn"):
        assert noised.classifier("cifar10", name, 0.5).sigma_pixel == 0.5
        with pytest.raises(ValueError, match="expected a smoothing noise sigma_pixel at most 0.5"):
            noised.classifier("cifar10", name, 1.0)
    assert isinstance(noised.classifier("cifar10", "one-call-mirrored", 0.25), Mirrored)
    for name in ("epndc", "apndc", "apndc-path"):
        assert float(noised.classifier("cifar10", name, 0.25).levels.upper[-1]) == pytest.approx(1)
        with pytest.raises(ValueError, match="sigma_pixel below 0.5, as losses are measured at"):
            noised.classifier("cifar10", name, 0.5)


def test_names_and_noises_that_do_not_exist():
    for call, said in (
        (lambda: noised.classifier("digits", "epdc", SIGMA), "what is smoothed in digits to be"),
        (lambda: noised.classifier("digits", "one-call-mirrored", SIGMA), "smoothed in digits"),
        (lambda: noised.classifier("plane:moons", "cohen", SIGMA), "what is smoothed in plane"),
        (lambda: noised.classifier("mars", "epndc", SIGMA), "the world"),
        (lambda: noised.names("mars"), "the world"),
        (lambda: noised.classifier("digits", "epndc", 12), "did you mean 12/255"),
        (lambda: noised.classifier("digits", "epndc", 0), "sigma_pixel > 0, got 0"),
        (lambda: noised.checkpoints("digits", "epndc", -1), "sigma_pixel > 0, got -1"),
        (lambda: networks.smoothing_file("digits", "dc", 0.25), "training on noise"),
    ):
        with pytest.raises(ValueError, match=said):
            call()


def entry(**changes) -> NoisedEntry:
    """An entry that is complete."""
    own = dict(
        name="mine",
        title="mine",
        sentence="A network of one's own.",
        source="a test",
        worlds=("digits",),
        build=lambda parts, sigma_pixel: TrainedOnNoise(
            cnn.ConvClassifier(parts.world.image_shape, 10, widths=(8, 8)), sigma_pixel
        ),
        weights=lambda kind, sigma_pixel: {},
    )
    return NoisedEntry(**(own | changes))


def test_a_registered_classifier_is_there_by_name(monkeypatch, digits):
    monkeypatch.setattr(noised, "ENTRIES", dict(noised.ENTRIES))
    noised.register(entry())
    assert noised.names("digits")[-1] == "mine" and "mine" not in noised.names("cifar10")
    model = noised.classifier("digits", "Mine", 0.5)
    assert model.sigma_pixel == 0.5 and model(digits[0]).shape == (60, 10)
    for taken in ("MINE", "dc", "epndc"):
        with pytest.raises(ValueError, match="expected a new name for a classifier of noised"):
            noised.register(entry(name=taken))


@pytest.mark.parametrize("field", ["name", "title", "sentence", "source", "worlds"])
def test_an_entry_without_words_gets_a_sentence(field):
    with pytest.raises(ValueError, match=f"^expected an entry with a {field}, got the entry"):
        entry(**{field: ""})


@pytest.mark.parametrize("field", ["build", "weights"])
def test_an_entry_without_its_functions_gets_a_sentence(field):
    with pytest.raises(ValueError, match=f"^expected {field} of the entry 'mine' to be a function"):
        entry(**{field: None})
