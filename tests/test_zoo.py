"""The two tables: what each name is built of, what it promises, and what is missing said in one sentence."""

import shutil
from dataclasses import replace

import pytest
import torch
import torchattacks
from diffclass import attacks, data, zoo
from diffclass.classifiers import cnn, joint
from diffclass.classifiers.attention import AttentionClassifier
from diffclass.classifiers.base import Held, draw, parts
from diffclass.classifiers.bayes import BayesClassifier
from diffclass.classifiers.cnn import WideClassifier
from diffclass.classifiers.foreign import Foreign
from diffclass.classifiers.idc import TranslationClassifier
from diffclass.classifiers.joint import JointClassifier
from diffclass.classifiers.purified import (
    LikelihoodMaximisation,
    Purification,
    PurifiedClassifier,
)
from diffclass.classifiers.votes import MajorityVote
from diffclass.data import cifar
from diffclass.data.worlds import world_of
from diffclass.denoisers.exact import MixtureDenoiser
from diffclass.evaluation.protocols import Attack
from diffclass.storage import assets
from diffclass.zoo import attacks as attack_table
from diffclass.zoo import classifiers as classifier_table
from diffclass.zoo import networks
from diffclass.zoo.attacks import AttackEntry
from diffclass.zoo.classifiers import Entry
from torch.nn.functional import one_hot

PLAIN = ("cnn", "adversarial", "wide", "adversarial-wide", "vit", "adversarial-vit")
DIGITS = (
    *PLAIN,
    "jem",
    "dc",
    "contrastive",
    "adversarial-dc",
    "tmdc",
    "tmdc-contrastive",
    "one-call",
    "one-call-hardened",
    "vote",
    "rdc1",
    "rdc5",
    "rdc-released",
    "rdc-contrastive",
    "lm-cnn",
    "diffpure",
    "diffpure-tmdc",
    "idc",
)
ATTACKS = (
    "fgsm",
    "pgd",
    "apgd",
    "square",
    "lagrange",
    "stadv",
    "bend",
    "mifgsm",
    "cw",
    "autoattack-10",
    "autoattack-100",
    "autoattack-plus-10",
    "autoattack-plus-100",
)
PLANE = ("dc", "one-call", "vote", "rdc1", "rdc5", "rdc-released")
DETERMINISTIC = (*PLAIN, "jem")
ADAPTED = "denoiser.network.blocks.0.conv1.weight"  # of a layer with an adapter
PURIFIED = (
    "rdc1",
    "rdc5",
    "rdc-released",
    "rdc-contrastive",
    "lm-cnn",
    "diffpure",
    "diffpure-tmdc",
)


def plain_network(method: str, seed: int) -> cnn.Plain:
    """A small network of the kind that a method trains, with first weights."""
    if method.endswith("wide"):
        return WideClassifier((1, 8, 8), 10, (8, 8), seed=seed)
    if method.endswith("vit"):
        return AttentionClassifier((1, 8, 8), 10, 6, 1, seed=seed)
    return cnn.ConvClassifier((1, 8, 8), 10, widths=(8, 8), seed=seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The digits' networks of this checkout, and baselines with their first weights."""
    target = tmp_path_factory.mktemp("assets")
    names = [
        networks.STUDENT,
        networks.HARDENED["digits"],
        networks.CONTRASTIVE["digits"],
        *networks.TRUTH["digits"].values(),
        networks.TRANSLATORS["digits"][0],
    ]
    for name in names:
        shutil.copy(assets.folder() / name, target)
    baselines = networks.BASELINES["digits"]
    for method, name in baselines.items():
        cnn.save(plain_network(method, seed=len(name)), target / name)
    jem = networks.JOINT["digits"]
    energy = WideClassifier((1, 8, 8), 10, (8, 8), normed=False)
    joint.save(JointClassifier.begun(energy, 3), target / jem)
    assets.record([*names, *baselines.values(), jem], target)
    return target


@pytest.fixture
def network_folder(folder, monkeypatch):
    monkeypatch.setenv("DIFFCLASS_ASSETS", str(folder))
    return folder


@pytest.fixture(scope="module")
def digits():
    world = data.digits()
    return world.test_images[:6], world.test_labels[:6]


# ---------------------------------------------------------------------------------------------------------------------
# What is in the table


def test_the_names_of_every_world():
    assert zoo.names("digits") == zoo.names("digits:noise-3") == DIGITS
    assert zoo.names("cifar10") == zoo.names("gallery") == zoo.names("CIFAR10") == DIGITS
    for law in data.plane.PLANE_LAWS:
        assert zoo.names(f"plane:{law}") == PLANE
    assert tuple(classifier_table.ENTRIES) == DIGITS
    assert tuple(attack_table.ENTRIES) == ATTACKS


def test_every_entry_tells_the_reader_what_it_is():
    for name, entry in classifier_table.ENTRIES.items():
        assert entry.name == name and entry.title and entry.source
        assert entry.sentence.endswith(".") and len(entry.sentence.split()) > 5
    for table in (classifier_table.ENTRIES, attack_table.ENTRIES):
        assert len({entry.sentence for entry in table.values()}) == len(table)
    assert len({entry.title for entry in classifier_table.ENTRIES.values()}) == len(DIGITS)


def test_an_entry_is_asked_for_in_any_case():
    assert zoo.entry_of("digits", "RDC1") is classifier_table.ENTRIES["rdc1"]
    assert zoo.attack("APGD") is attack_table.ENTRIES["apgd"]
    assert zoo.attack("pgd").run is attacks.pgd and zoo.attack("apgd").run is attacks.apgd
    assert zoo.attack("pgd").step_size and not zoo.attack("apgd").step_size


@pytest.mark.parametrize("name", DIGITS)
def test_every_classifier_of_digits_keeps_its_promises(network_folder, digits, name):
    classifier = zoo.classifier("digits", name)
    x = digits[0]
    assert classifier.num_classes == 10 and tuple(classifier.image_shape) == (1, 8, 8)
    assert classifier.deterministic == (name in DETERMINISTIC)
    assert classifier.complaints(x) == [] and not classifier.training
    noise = draw(classifier, 6, 0, "one")
    with torch.no_grad():
        logits = classifier(x, noise)
        assert logits.shape == (6, 10) and torch.equal(classifier(x, noise), logits)
    if name in DETERMINISTIC:
        assert noise == ()
        kind = type(classifier).__name__
        with pytest.raises(ValueError, match=rf"expected noise of shape \(\) for {kind}"):
            classifier(x, torch.zeros(6))
        return
    if name == "vote":  # of easy digits all votes agree, whatever the noise
        assert torch.equal(logits.sum(1), torch.full((6,), 11.0))
        return
    with torch.no_grad():
        assert not torch.equal(classifier(x, draw(classifier, 6, 0, "other")), logits)
        held = Held.seeded(classifier, 0)(x)
        assert torch.equal(held, Held.seeded(zoo.classifier("digits", name), 0)(x))
        assert not torch.equal(held, Held.seeded(classifier, 1)(x))


@pytest.mark.parametrize("name", ["lm-cnn", "rdc1", "rdc5", "rdc-released", "diffpure"])
def test_exact_gradients_and_those_of_the_identity_have_the_same_values(
    network_folder, digits, name
):
    x = digits[0][:2].clone().requires_grad_()
    classifier = zoo.classifier("digits", name)
    noise = draw(classifier, 2, 0, "a test")
    by_name = classifier.gradients()
    assert set(by_name) == {"exact", "bpda"}
    exact = by_name["exact"](x, noise)
    identity = by_name["bpda"](x, noise)
    torch.testing.assert_close(exact, identity)
    torch.testing.assert_close(classifier(x, noise), exact)
    slopes = [torch.autograd.grad(logits.square().sum(), x)[0] for logits in (exact, identity)]
    assert not torch.allclose(*slopes, rtol=0.05)


@pytest.mark.parametrize("name", ["cnn", "dc", "vote", "idc"])
def test_other_classifiers_have_one_gradient_or_none(network_folder, name):
    by_name = zoo.classifier("digits", name).gradients()
    assert set(by_name) == (set() if name == "vote" else {"exact"})


def test_the_parts_are_those_of_the_names(network_folder):
    built = {name: zoo.classifier("digits", name) for name in zoo.names("digits")}
    of_kind = {
        kind: {name for name, one in built.items() if isinstance(one, kind)}
        for kind in (
            PurifiedClassifier,
            BayesClassifier,
            cnn.ConvClassifier,
            WideClassifier,
            AttentionClassifier,
            JointClassifier,
            TranslationClassifier,
        )
    }
    assert of_kind[PurifiedClassifier] == set(PURIFIED)
    assert of_kind[BayesClassifier] == {
        "dc",
        "contrastive",
        "adversarial-dc",
        "tmdc",
        "tmdc-contrastive",
    }
    assert of_kind[cnn.ConvClassifier] == {"cnn", "adversarial"}
    assert of_kind[WideClassifier] == {"wide", "adversarial-wide"}
    assert of_kind[AttentionClassifier] == {"vit", "adversarial-vit"}
    assert of_kind[JointClassifier] == {"jem"}
    assert of_kind[TranslationClassifier] == {"idc"}
    steps = [built[name].purifier.steps for name in ("rdc1", "rdc5", "rdc-released", "lm-cnn")]
    assert steps == [1, 5, 5, 5]
    assert built["rdc5"].purifier.budget == world_of("digits").budget("linf") == 0.1
    assert built["rdc-released"].purifier.budget is None
    assert isinstance(built["diffpure"].purifier, Purification)
    assert isinstance(built["diffpure"].classifier, cnn.ConvClassifier)
    assert isinstance(built["diffpure-tmdc"].purifier, Purification)
    assert isinstance(built["diffpure-tmdc"].classifier, BayesClassifier)
    assert isinstance(built["lm-cnn"].purifier, LikelihoodMaximisation)
    assert isinstance(built["lm-cnn"].classifier, cnn.ConvClassifier)
    assert isinstance(built["rdc-contrastive"].classifier, BayesClassifier)
    assert isinstance(built["vote"], MajorityVote) and built["vote"].votes == classifier_table.VOTES
    assert not built["vote"].mean.classifier.deterministic
    for pair, weight in (
        (("cnn", "adversarial"), "enter.weight"),
        (("wide", "adversarial-wide"), "enter.weight"),
        (("vit", "adversarial-vit"), "enter.weight"),
        (("dc", "adversarial-dc"), "denoiser.network.enter.weight"),
        (("dc", "contrastive"), "denoiser.network.enter.weight"),
        (("dc", "tmdc"), ADAPTED),
        (("dc", "tmdc-contrastive"), ADAPTED),
        (("tmdc", "tmdc-contrastive"), ADAPTED),
    ):
        assert not torch.equal(*(built[name].state_dict()[weight] for name in pair))
    for pair, weight in (
        (("lm-cnn", "cnn"), "enter.weight"),
        (("diffpure", "cnn"), "enter.weight"),
        (("diffpure-tmdc", "tmdc"), ADAPTED),
        (("rdc5", "dc"), "denoiser.network.enter.weight"),
        (("rdc-contrastive", "contrastive"), "denoiser.network.enter.weight"),
    ):
        whole, behind = (built[name] for name in pair)
        assert torch.equal(whole.classifier.state_dict()[weight], behind.state_dict()[weight])


def test_how_many_draws_an_honest_attack_averages(network_folder):
    eot = {name: zoo.classifier("digits", name).eot for name in zoo.names("digits")}
    assert {name for name, draws in eot.items() if draws != 1} == {"idc", "diffpure"}
    assert eot["idc"] == eot["diffpure"] == 4


@pytest.mark.parametrize("name", ["rdc5", "rdc-contrastive"])
def test_the_purifier_does_not_repeat_the_noise_of_the_classifier(network_folder, name):
    classifier = zoo.classifier("digits", name)
    for noise in (Held.seeded(classifier, 3).noise, draw(classifier, 2, 3, "a test")):
        purifier, behind = noise
        levels, eps = purifier
        assert eps.shape[1:] == (5, 1, 8, 8) and behind.shape[1:] == (16, 1, 1, 8, 8)
        values = torch.cat([part.flatten() for part in parts((levels, eps, behind))])
        assert len(values.unique()) == len(values)


def test_checkpoints_name_every_file_that_is_read(network_folder, monkeypatch):
    wanted = {
        "dc": [networks.STUDENT],
        "vote": [networks.STUDENT],
        "rdc1": [networks.STUDENT],
        "rdc5": [networks.STUDENT],
        "rdc-released": [networks.STUDENT],
        "idc": [networks.TRANSLATORS["digits"][0]],
        "adversarial-dc": [networks.HARDENED["digits"]],
        **{method: [f"digits-{method}.safetensors"] for method in (*PLAIN, "jem")},
        "lm-cnn": [networks.STUDENT, "digits-cnn.safetensors"],
        "diffpure": [networks.STUDENT, "digits-cnn.safetensors"],
        "diffpure-tmdc": [networks.STUDENT, "digits-tmdc.safetensors"],
        "contrastive": [networks.CONTRASTIVE["digits"]],
        "one-call": [networks.CONTRASTIVE["digits"]],
        "one-call-hardened": [networks.HARDENED["digits"]],
        "rdc-contrastive": [networks.STUDENT, networks.CONTRASTIVE["digits"]],
        "tmdc": [networks.STUDENT, "digits-tmdc.safetensors"],
        "tmdc-contrastive": [networks.STUDENT, "digits-tmdc-contrastive.safetensors"],
    }
    assert set(wanted) == set(zoo.names("digits"))
    read = []
    trained = networks.trained
    monkeypatch.setattr(networks, "trained", lambda file: read.append(file) or trained(file))
    for name, files in wanted.items():
        listed = zoo.checkpoints("digits", name)
        assert list(listed) == sorted(files)
        assert listed == {file: assets.fingerprint(file) for file in files}
        read.clear()
        zoo.classifier("digits", name)
        assert set(read) == set(files)
    for name in zoo.names("plane:moons"):
        assert zoo.checkpoints("plane:moons", name) == {}


def test_missing_weights_are_one_sentence_with_the_command(tmp_path, network_folder, monkeypatch):
    monkeypatch.setenv("DIFFCLASS_ASSETS", str(tmp_path))
    for name, command in (
        ("cnn", "--method cnn"),
        ("adversarial", "--method adversarial"),
        ("wide", "--method wide"),
        ("adversarial-vit", "--method adversarial-vit"),
        ("jem", "--method jem"),
        ("adversarial-dc", "--method adversarial-dc"),
        ("idc", "--method idc"),
        ("contrastive", "--method contrastive"),
    ):
        with pytest.raises(
            FileNotFoundError, match=f"train them with `diffclass train digits {command}`"
        ):
            zoo.classifier("digits", name)
    for name in ("dc", "vote", "rdc1", "lm-cnn", "tmdc"):
        with pytest.raises(FileNotFoundError, match="train them with `diffclass train digits`"):
            zoo.classifier("digits", name)


def test_photographs_without_an_unconditional_denoiser(monkeypatch):
    """The prototype has no null class: purifiers take the contrastive network, and say so where there is none."""
    assert zoo.classifier("cifar10", "dc").image_shape == (3, 32, 32)
    assert set(zoo.checkpoints("cifar10", "rdc1")) == {
        "cifar10-prototype.safetensors",
        "cifar10-contrastive.safetensors",
    }
    monkeypatch.setattr(networks, "CONTRASTIVE", {"cifar10": "cifar10-missing.safetensors"})
    with pytest.raises(ValueError, match="trained without a null class"):
        zoo.classifier("cifar10", "rdc1")
    with pytest.raises(
        FileNotFoundError, match="got none; train them with `diffclass train cifar10 --method"
    ):
        zoo.classifier("cifar10", "contrastive")


@pytest.mark.parametrize("name", zoo.names("plane:moons"))
def test_the_plane_has_the_exact_denoiser(name):
    classifier = zoo.classifier("plane:moons", name)
    place = world_of("plane:moons")
    x, y = place.test(8, seed=4)
    assert len(x) == 8 and not torch.equal(x, place.test(8)[0])
    with torch.no_grad():
        scores = Held.seeded(classifier)(x)
    assert scores.shape == (8, classifier.num_classes) and bool(torch.isfinite(scores).all())
    denoisers = [part for part in classifier.modules() if isinstance(part, MixtureDenoiser)]
    assert denoisers and list(classifier.parameters()) == []
    # one band of likelihood misleads here
    assert name.startswith("rdc") or int((scores.argmax(1) == y).sum()) >= 7
    if name == "vote":
        votes = float(classifier_table.VOTES)
        assert torch.equal(scores.sum(1), torch.full((8,), votes))
        assert float((scores * one_hot(y, 2)).sum()) > 40


def test_names_that_do_not_exist():
    for call, said in (
        (lambda: zoo.classifier("digits", "ddc"), "the classifier of digits to be one of 'cnn'"),
        (lambda: zoo.classifier("plane:moons", "idc"), "the classifier of plane"),
        (lambda: zoo.checkpoints("digits", "ddc"), "the classifier of digits"),
        (lambda: zoo.entry_of("plane:moons", "cnn"), "the classifier of plane"),
        (lambda: zoo.classifier("mnist", "dc"), "the world"),
        (lambda: zoo.names("mnist"), "the world"),
        (lambda: zoo.classifier("plane:suns", "dc"), "the law of the plane"),
        (lambda: zoo.names("plane"), "the law of the plane"),
        (lambda: zoo.classifier("digits:moons", "dc"), "alone or with one of"),
        (lambda: world_of("digits").budget("l1"), "the norm"),
        (lambda: zoo.attack("fab"), "the attack to be one of 'fgsm', 'pgd', .*, got 'fab'"),
        (lambda: world_of("plane:moons").budget("flow"), "the norm"),
    ):
        with pytest.raises(ValueError, match=said):
            call()


# ---------------------------------------------------------------------------------------------------------------------
# Attacks of torchattacks, and one step


@pytest.fixture(scope="module")
def linear():
    """A linear classifier of five classes, images of 5x5 pixels and the labels that it gives them."""
    draw = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(25, 5, bias=False)
    layer.weight.data = torch.randn(5, 25, generator=draw)
    module = torch.nn.Sequential(torch.nn.Flatten(), layer).eval()
    model = Foreign(module, 5, (1, 5, 5))
    x = 0.2 + 0.6 * torch.rand(16, 1, 5, 5, generator=draw)
    return model, x, model(x).argmax(1).detach()


def result(name, linear, epsilon, norm, **options):
    """The last frame of an attack by name."""
    entry = zoo.attack(name)
    options = dict(steps=entry.steps or entry.usual) | options
    if entry.targeted:
        options["targets"] = 4
    *_, last = entry.run(*linear, epsilon, norm=norm, **options)
    return last


LIBRARY = [
    ("mifgsm", "linf"),
    ("cw", "l2"),
    *((f"autoattack-{name}", norm) for name in ("10", "plus-10") for norm in ("linf", "l2")),
]


@pytest.mark.parametrize("name, norm", LIBRARY)
def test_attacks_of_a_library_keep_to_the_budget_and_leave_nothing_changed(
    linear, name, norm, monkeypatch
):
    queries = torchattacks.Square.__init__
    monkeypatch.setattr(
        torchattacks.Square,
        "__init__",
        lambda self, *given, **options: queries(self, *given, **{**options, "n_queries": 20}),
    )
    model, x, y = linear
    state = torch.random.get_rng_state()
    epsilon = 0.03 if norm == "linf" else 0.15
    last = result(name, linear, epsilon, norm)
    assert torch.equal(state, torch.random.get_rng_state())
    assert float(attacks.size_of(last.x - x, norm).max()) <= epsilon + 1e-6
    assert torch.equal(last.logits, model(last.x)) and not last.x.requires_grad
    assert torch.equal(last.fooled, last.logits.argmax(1) != y)
    assert 0 < int(last.fooled.sum()) < 16
    assert torch.equal(last.x, result(name, linear, epsilon, norm).x)
    bound = zoo.attack(name).calls(zoo.attack(name).usual, 4)
    assert 10 <= last.step <= bound - 2, "a look for the scale, and one at the end, come on top"
    nothing = result(name, linear, 0.0, norm)
    assert not bool(nothing.fooled.any()) and float(nothing.size.max()) == 0
    assert not any(part.training for part in model.module.modules())


def test_cw_is_that_of_torchattacks(linear):
    model, x, y = linear
    # in training mode, as a view begins, the library would leave the classifier in it too
    view = attacks.AttackView.calibrated(model, x).eval()
    theirs = torchattacks.CW(view, c=1, steps=50, lr=0.01)(x, y)
    ours = result("cw", linear, 5.0, "l2").x
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert float(attacks.size_of(ours - x, "l2").max()) > 0


def test_autoattack_plus_adds_starts_a_loss_and_fab(linear):
    model, _, _ = linear
    chosen = attack_table._autoattack(
        attack_table.Shown(model, linear[1], ()), 0.1, "linf", 100, 4, 0, "plus"
    )
    parts = chosen._autoattack.attacks
    assert [type(part).__name__ for part in parts] == [
        "APGD",
        "APGD",
        "FAB",
        "Square",
        "APGDT",
        "FAB",
    ]
    assert [part.steps for part in parts if not isinstance(part, torchattacks.Square)] == [100] * 5
    assert [part.n_restarts for part in parts] == [5, 5, 5, 1, 1, 1]
    assert {part.loss for part in parts[:2]} == {"ce", "dlr"}


def test_autoattack_by_its_two_names_differs_in_the_steps_alone(linear):
    model, x, _ = linear
    shown = attack_table.Shown(model, x, ())
    for count in (10, 100):
        chosen = attack_table._autoattack(shown, 0.1, "linf", count, 4, 0)
        *gradients, squares = chosen._autoattack.attacks
        assert [part.steps for part in gradients] == [count] * 3
        assert squares.n_queries == 5000
        assert gradients[1].n_target_classes == gradients[2].n_target_classes == 4
    assert torchattacks.APGD(shown).steps == 10, "what the library ships"


def test_a_library_gets_held_noise_and_a_classifier_in_eval_mode(linear):
    model, x, y = linear
    run = zoo.attack("mifgsm").run
    with pytest.raises(ValueError, match="expected one held noise for an attack of torchattacks"):
        next(run(model, x, y, 0.1, noise=lambda step, draw: (), steps=3))
    with pytest.raises(ValueError, match="expected images of 5x5 pixels or more for AutoAttack"):
        small = Foreign(torch.nn.Flatten().eval(), 4, (1, 2, 2))
        image = torch.rand(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
        labels = small(image).argmax(1)
        run = zoo.attack("autoattack-10").run
        next(run(small, image, labels, 0.1, norm="l2", steps=10, targets=3))
    training = Foreign(
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(25, 5)), 5, (1, 5, 5)
    )
    for name in ("mifgsm", "square", "fgsm"):
        with pytest.raises(ValueError, match="expected a classifier in eval mode"):
            next(zoo.attack(name).run(training.train(), x, y, 0.1, steps=1))


def test_one_step_is_one_step_of_pgd(linear):
    model, x, y = linear
    for norm in ("linf", "l2"):
        *_, wanted = attacks.pgd(model, x, y, 0.1, norm=norm, steps=1, step_size=0.1)
        assert torch.equal(result("fgsm", linear, 0.1, norm).x, wanted.x)
    with pytest.raises(ValueError, match="expected one step of fgsm, which has no more, got 5"):
        result("fgsm", linear, 0.1, "linf", steps=5)


# ---------------------------------------------------------------------------------------------------------------------
# An entry of one's own


def of_weights(kind: str) -> dict[str, str] | None:
    """What an entry of digits alone says of its weights."""
    return {} if kind == "digits" else None


def entry(**changes) -> Entry:
    """An entry that is complete."""
    own = dict(
        name="mine",
        title="mine",
        sentence="A network of one's own.",
        source="a test",
        paper="madry",
        build=lambda parts: cnn.ConvClassifier(parts.world.image_shape, 10, widths=(8, 8)),
        weights=of_weights,
    )
    return Entry(**(own | changes))


def attack_entry(**changes) -> AttackEntry:
    """An attack that is complete."""
    own = dict(
        name="mine",
        run=attacks.apgd,
        needs="gradient",
        norms=("linf",),
        source="a test",
        sentence="An attack of one's own.",
    )
    return AttackEntry(**(own | changes))


@pytest.fixture
def own_tables(monkeypatch):
    """Both tables as they are, to which a test may add."""
    monkeypatch.setattr(classifier_table, "ENTRIES", dict(classifier_table.ENTRIES))
    monkeypatch.setattr(attack_table, "ENTRIES", dict(attack_table.ENTRIES))


def test_a_registered_classifier_is_there_by_name(own_tables, digits):
    zoo.register(entry())
    assert zoo.names("digits") == (*DIGITS, "mine") and zoo.names("cifar10") == DIGITS
    classifier = zoo.classifier("digits", "mine")
    assert classifier(digits[0]).shape == (6, 10) and not classifier.training
    assert zoo.checkpoints("digits", "mine") == {}


@pytest.mark.parametrize("field", ["name", "title", "sentence", "source", "paper"])
def test_an_entry_without_words_gets_a_sentence(field):
    with pytest.raises(
        ValueError, match=f"^expected an entry with a {field}, got the entry .*\\.$"
    ):
        entry(**{field: ""})


@pytest.mark.parametrize("field", ["build", "weights"])
@pytest.mark.parametrize("value", [None, {"denoiser": "digits-student.safetensors"}])
def test_an_entry_without_its_functions_gets_a_sentence(field, value):
    with pytest.raises(
        ValueError, match=f"^expected {field} of the entry 'mine' to be a function, got .*\\.$"
    ):
        entry(**{field: value})


def test_two_entries_of_one_name_get_a_sentence(own_tables):
    before = dict(classifier_table.ENTRIES)
    with pytest.raises(ValueError, match="expected a new name for a classifier, got 'dc', which"):
        zoo.register(entry(name="dc"))
    with pytest.raises(ValueError, match="expected a new name for an attack, got 'pgd', which"):
        attack_table.register(attack_entry(name="pgd"))
    assert classifier_table.ENTRIES == before


@pytest.mark.parametrize("name", ["DC", "Idc"])
def test_names_that_differ_in_their_case_alone_are_one(own_tables, name):
    """They are asked for in any case, so one would hide the other."""
    with pytest.raises(ValueError, match=f"expected a new name for a classifier, got '{name}'"):
        zoo.register(entry(name=name))
    with pytest.raises(ValueError, match="expected a new name for an attack, got 'PGD'"):
        attack_table.register(attack_entry(name="PGD"))


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(run=None), "the attack 'mine' to have a function that runs it, got None"),
        (dict(run="apgd"), "the attack 'mine' to have a function that runs it, got 'apgd'"),
        (dict(source=""), "an attack with a name, a source and a sentence"),
        (dict(sentence=""), "an attack with a name, a source and a sentence"),
        (dict(name=""), "an attack with a name, a source and a sentence"),
        (dict(needs="luck"), "the attack 'mine' to need one of gradient, logits .* got 'luck'"),
        (dict(norms=()), r"the attack 'mine' .* to name its norms, got 'gradient' and \(\)"),
    ],
)
def test_an_attack_that_lacks_something_gets_a_sentence(changes, said):
    with pytest.raises(ValueError, match=f"^expected {said}.*\\.$"):
        attack_entry(**changes)


def test_a_registered_attack_can_be_named_by_a_protocol(own_tables):
    with pytest.raises(ValueError, match="got 'mine'"):
        Attack("margin", method="mine")
    attack_table.register(attack_entry())
    assert Attack("margin", method="mine").step is None
    attack_table.register(replace(attack_entry(), name="stepwise", step_size=True))
    with pytest.raises(ValueError, match="expected a step size for stepwise, got None"):
        Attack("margin", method="stepwise")
    assert Attack("margin", method="stepwise", step=0.5).step == 0.5


# ---------------------------------------------------------------------------------------------------------------------
# The worlds


def test_what_a_world_says_of_its_pictures():
    for name, kind, shape, classes in (
        ("digits", "digits", (1, 8, 8), 10),
        ("digits:blur-2", "digits", (1, 8, 8), 10),
        ("cifar10", "cifar10", (3, 32, 32), 10),
        ("gallery", "cifar10", (3, 32, 32), 10),
        ("plane:moons", "plane", (2, 1, 1), 2),
        ("hundred", "hundred", (3, 8, 8), 100),
    ):
        place = world_of(name)
        assert (place.kind, place.name, place.image_shape) == (kind, name, shape)
        assert len(place.class_names) == classes
        assert (place.law is not None) == (kind in ("plane", "hundred"))
    assert world_of("cifar10").class_names == cifar.CIFAR10_CLASSES
    assert world_of("digits").class_names == tuple("0123456789")
    assert world_of("Plane:Moons").name == "plane:moons"


def test_budgets_are_in_pixels():
    wanted = {"digits": (0.1, 1.0), "cifar10": (8 / 255, 0.5), "plane:moons": (0.05, 0.05)}
    wanted["hundred"] = (0.1, 1.0)
    for name, budgets in wanted.items():
        place = world_of(name)
        assert (place.budget("linf"), place.budget("L2")) == budgets


def test_the_first_test_images_are_taken_and_points_are_drawn():
    x, y = world_of("digits").test(7, seed=5)
    assert torch.equal(x, data.digits().test_images[:7])
    assert torch.equal(y, data.digits().test_labels[:7])
    assert len(world_of("digits").test()[0]) == 400
    place = world_of("plane:moons")
    assert len(place.test()[0]) == 1000
    assert torch.equal(place.test(9, 3)[0], place.test(9, 3)[0])
    assert not torch.equal(place.test(9, 3)[0], place.test(9, 4)[0])
    images, labels = world_of("gallery").test(5)
    assert images.shape == (5, 3, 32, 32) and labels.shape == (5,)


# -- where networks are --------------------------------------------------------------------------------------------------


def test_the_networks_of_photographs_are_put_where_the_accelerator_is(monkeypatch):
    monkeypatch.setattr(networks, "device", lambda: torch.device("meta"))
    photographs, _ = networks.load("cifar10", "contrastive")
    behind = zoo.classifier("cifar10", "contrastive").denoiser
    digits, _ = networks.load("digits")
    assert {p.device.type for p in photographs.parameters()} == {"meta"}
    assert {p.device.type for p in behind.parameters()} == {"meta"}
    assert {p.device.type for p in digits.parameters()} == {"cpu"}, "too small to be worth the way"


def test_pictures_go_to_where_the_network_is_and_its_answers_come_back(monkeypatch):
    student, _ = networks.load("digits")
    seen = []

    def elsewhere(x, log_sigma, labels):
        seen.append((x.device.type, log_sigma.device.type))
        return torch.zeros(len(x), 11, *x.shape[2:], dtype=torch.float16)

    student.to("meta")
    monkeypatch.setattr(student.network, "forward", elsewhere)
    x = torch.zeros(2, *student.image_shape, dtype=torch.float64)
    out = student(x, 0.5)
    assert seen == [("meta", "meta")]
    assert (out.device, out.dtype, out.shape) == (x.device, x.dtype, (2, 10, *x.shape[1:]))
