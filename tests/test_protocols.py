"""What a protocol is: its attacks in full, chosen by what a classifier declares, and an identity that records keep."""

import json
from dataclasses import asdict, replace

import pytest
import torch
import twins
from diffclass import attacks, data, zoo
from diffclass.classifiers.base import BLOCK, Classifier, Held
from diffclass.classifiers.foreign import Foreign
from diffclass.classifiers.votes import MajorityVote
from diffclass.evaluation import protocols, tables
from diffclass.evaluation.protocols import Attack, AttackNoise, Protocol
from diffclass.noise import generator_of
from diffclass.storage import assets
from diffclass.zoo import attacks as attack_table

SHAPE = (1, 2, 2)
FIELDS = ("loss", "steps", "method", "gradient", "fresh", "draws", "restarts", "step", "start")
TARGETS = (1, 2, 3, 4, 5, 6, 7, 8, 9)

# What honest-1 listed for every classifier of digits before classifiers declared anything, in the order of FIELDS.
DETERMINISTIC = (
    ("margin", 100, "apgd", "exact", False, 1, 5, None, "image"),
    ("DLR", 100, "apgd", "exact", False, 1, 5, None, "image"),
    ("scaled CE", 100, "apgd", "exact", False, 1, 5, None, "image"),
)
RANDOM = (
    ("margin", 100, "pgd", "exact", True, 1, 1, 0.1, "image"),
    ("DLR", 100, "apgd", "exact", False, 1, 1, None, "image"),
    ("scaled CE", 100, "pgd", "exact", True, 1, 1, 0.1, "image"),
)
PURIFIED = (
    ("margin", 100, "pgd", "exact", True, 1, 1, 0.1, "image"),
    ("DLR", 100, "pgd", "bpda", True, 1, 1, 0.1, "image"),
    ("scaled CE", 100, "apgd", "exact", False, 1, 1, None, "image"),
)
# Plain networks, and JEM, whose logits are those of one.
PLAIN = ("cnn", "adversarial", "wide", "adversarial-wide", "vit", "adversarial-vit", "jem")
HONEST = {
    **dict.fromkeys(PLAIN, DETERMINISTIC),
    "dc": RANDOM,
    "contrastive": RANDOM,
    "adversarial-dc": RANDOM,
    "tmdc": RANDOM,
    "tmdc-contrastive": RANDOM,
    "one-call": RANDOM,
    "one-call-hardened": RANDOM,
    "vote": RANDOM,  # had no protocol before
    "rdc1": PURIFIED,
    "rdc5": PURIFIED,
    "rdc-released": PURIFIED,
    "rdc-contrastive": PURIFIED,
    "lm-cnn": PURIFIED,
    "diffpure-tmdc": PURIFIED,
    "diffpure": (
        ("margin", 100, "pgd", "exact", True, 4, 1, 0.1, "image"),
        ("DLR", 100, "pgd", "bpda", True, 1, 1, 0.1, "image"),
        ("scaled CE", 100, "apgd", "exact", False, 1, 1, None, "image"),
    ),
    "idc": (
        ("margin", 100, "pgd", "exact", True, 4, 1, 0.1, "image"),
        ("DLR", 100, "apgd", "exact", False, 1, 1, None, "image"),
        ("scaled CE", 100, "pgd", "exact", True, 4, 1, 0.1, "image"),
    ),
}
# What honest-2 lists for three classes, in the order of FIELDS and of the targets.
SQUARE = ("margin", 1000, "square", "exact", False, 1, 1, None, "image", ())
DETERMINISTIC_2 = (
    ("margin", 1, "fgsm", "exact", False, 1, 1, None, "image", ()),
    ("margin", 100, "apgd", "exact", False, 1, 5, None, "image", ()),
    ("targeted margin", 100, "apgd", "exact", False, 1, 1, None, "image", (1, 2)),
    ("DLR", 100, "apgd", "exact", False, 1, 5, None, "image", ()),
    ("scaled CE", 100, "apgd", "exact", False, 1, 5, None, "image", ()),
    SQUARE,
)
RANDOM_2 = (
    ("margin", 10, "pgd", "exact", True, 1, 1, 0.25, "image", ()),
    ("DLR", 100, "apgd", "exact", False, 1, 1, None, "image", ()),
    ("margin", 100, "pgd", "exact", True, 1, 1, 0.1, "image", ()),
    ("scaled CE", 100, "pgd", "exact", True, 1, 1, 0.1, "image", ()),
    SQUARE,
    ("targeted margin", 100, "pgd", "exact", True, 1, 1, 0.1, "image", (1, 2)),
)
PURIFIED_2 = (
    ("margin", 10, "pgd", "bpda", True, 1, 1, 0.25, "image", ()),
    ("DLR", 100, "pgd", "bpda", True, 1, 1, 0.1, "image", ()),
    ("scaled CE", 100, "apgd", "exact", False, 1, 1, None, "image", ()),
    ("margin", 100, "pgd", "exact", True, 1, 1, 0.1, "image", ()),
    ("targeted margin", 100, "pgd", "bpda", True, 1, 1, 0.1, "image", (1, 2)),
    SQUARE,
    ("targeted margin", 100, "pgd", "exact", True, 1, 1, 0.1, "image", (1, 2)),
)
RDC = (("DLR", 100, "apgd", "bpda", True, 1, 5, None, "random"),)
MADRY = (("CE", 20, "pgd", "exact", False, 1, 1, 0.25, "random"),)
TMDC_L2 = (("its own", 10, "autoattack-plus-10", "exact", False, 1, 1, None, "image"),)
PAPER = {
    **dict.fromkeys(PLAIN, MADRY),
    "dc": RDC,
    "contrastive": MADRY,
    "adversarial-dc": MADRY,
    "tmdc": TMDC_L2,
    "tmdc-contrastive": TMDC_L2,
    "one-call": MADRY,
    "one-call-hardened": MADRY,
    "vote": RDC,  # had no protocol before
    "rdc1": RDC,
    "rdc5": RDC,
    "rdc-released": RDC,
    "rdc-contrastive": RDC,
    "lm-cnn": RDC,
    "diffpure-tmdc": TMDC_L2,
    "diffpure": (
        ("CE", 100, "apgd", "exact", True, 20, 1, None, "random"),
        ("DLR", 100, "apgd", "exact", True, 20, 1, None, "random"),
    ),
    "idc": (
        ("CE of softmax", 20, "pgd", "exact", False, 1, 1, 0.25, "random"),
        ("CE of softmax", 1, "pgd", "exact", False, 1, 1, 1.0, "image"),
    ),
}


class Toy(Classifier):
    """Logits of the first pixels, with noise where it is random, by two gradients where it is purified."""

    image_shape = SHAPE
    calls = 1

    def __init__(self, num_classes=3, random=True, purified=False, eot=1):
        super().__init__()
        self.num_classes = num_classes
        self.random = random
        self.purified = purified
        self.eot = eot

    def sample_noise(self, images, generator):
        if not self.random:
            return ()
        # class by class: more images would change the noise of each
        return torch.randn((self.num_classes, images), generator=generator).movedim(1, 0)

    def logits(self, x, noise):
        scores = x.flatten(1)[:, : self.num_classes]
        return scores + noise if self.random else scores

    def gradients(self):
        other = Toy(self.num_classes, self.random, self.purified)
        return {"exact": self, "bpda": other} if self.purified else {"exact": self}


class Maximising(Toy):
    """The same, behind what it says maximises a likelihood."""

    def prior(self):
        return None, (0.4, 0.6)


def in_full(protocol: Protocol) -> tuple:
    """Every attack as FIELDS, without targets that it has not."""
    return tuple(tuple(asdict(attack).values())[:9] for attack in protocol.attacks)


def first_honest(classifier, norm: str, epsilon: float) -> Protocol:
    return protocols.named("honest", 1, classifier, "madry", norm, epsilon)


# ---------------------------------------------------------------------------------------------------------------------
# Which attacks


def test_the_lists_above_are_about_every_classifier_and_field():
    assert set(HONEST) == set(PAPER) == set(zoo.names("digits"))
    assert (*FIELDS, "targets", "through") == tuple(asdict(Attack("margin")))


@pytest.mark.parametrize("name", zoo.names("digits"))
@pytest.mark.parametrize("norm, epsilon", [("linf", 0.1), ("l2", 1.0)])
def test_the_first_honest_protocol_of_every_classifier_is_what_it_always_was(name, norm, epsilon):
    protocol = first_honest(zoo.classifier("digits", name), norm, epsilon)
    assert in_full(protocol) == HONEST[name]
    assert (protocol.key, protocol.norm, protocol.epsilon) == ("honest-1", norm, epsilon)
    assert protocol.draws == 10
    assert not any(attack.targets for attack in protocol.attacks)


@pytest.mark.parametrize("name", zoo.names("digits"))
def test_the_protocol_of_every_paper_is_what_it_always_was(name):
    entry = zoo.entry_of("digits", name)
    protocol = protocols.paper(entry.paper, "l2", 0.5, version=1)
    assert in_full(protocol) == PAPER[name]
    assert (protocol.name, protocol.version) == (f"paper-{entry.paper}", 1)
    assert (protocol.norm, protocol.epsilon, protocol.draws) == ("l2", 0.5, 10)


IDC_2 = (
    ("CE of softmax", 1, "fgsm", "exact", False, 1, 1, None, "image", ()),
    ("CE of softmax", 20, "pgd", "exact", False, 1, 1, 0.25, "random", ()),
    ("its own", 5, "mifgsm", "exact", False, 1, 1, None, "image", ()),
    ("its own", 1000, "cw", "exact", False, 1, 1, None, "image", ()),
    ("its own", 10, "autoattack-10", "exact", False, 1, 1, None, "image", TARGETS),
    ("CE of softmax", 50, "pgd", "exact", True, 15, 1, 0.25, "image", ()),
)


@pytest.mark.parametrize("norm, without", [("linf", "cw"), ("l2", "mifgsm")])
def test_the_second_version_of_idc_is_its_whole_list(norm, without):
    protocol = protocols.paper("idc", norm, 0.5)
    wanted = tuple((*attack, None) for attack in IDC_2 if attack[2] != without)
    assert tuple(tuple(asdict(attack).values()) for attack in protocol.attacks) == wanted
    assert protocol.key == "paper-idc-2"
    few = protocols.paper("idc", norm, 0.5, classes=5)
    assert [attack.targets for attack in few.attacks if attack.targets] == [(1, 2, 3, 4)]
    toy = Toy(5)
    for version in (1, 2):
        wanted = protocols.paper("idc", norm, 0.5, classes=5, version=version)
        assert protocols.named("paper-idc", version, toy, "idc", norm, 0.5) == wanted
    with pytest.raises(ValueError, match="expected at least 4 classes, as the protocol of idc has"):
        protocols.paper("idc", norm, 0.5, classes=3)


def test_only_the_protocol_of_idc_has_a_second_version():
    newest = {name: max(versions) for name, versions in protocols.PAPERS.items()}
    assert newest == {"rdc": 1, "diffpure": 1, "idc": 2, "madry": 1, "tmdc": 1}
    with pytest.raises(ValueError, match="paper-idc of version 1 or version 2, got version 3"):
        protocols.paper("idc", "linf", 0.1, version=3)


def test_the_protocol_of_tmdc_is_all_by_transfer():
    listed = protocols.paper("tmdc", "linf", 0.05).attacks
    assert tuple(tuple(asdict(attack).values()) for attack in listed) == (
        ("CE", 1, "fgsm", "exact", False, 1, 1, None, "image", (), "cnn"),
        ("CE", 40, "pgd", "exact", False, 1, 1, 0.157, "random", (), "cnn"),
        ("its own", 10, "autoattack-plus-10", "exact", False, 1, 1, None, "image", TARGETS, "cnn"),
    )
    assert all(attack.calls == 0 and "by transfer from cnn" in str(attack) for attack in listed)
    with pytest.raises(ValueError, match="at least 4 classes, as the protocol of tmdc has"):
        protocols.paper("tmdc", "linf", 0.05, classes=3)


@pytest.mark.parametrize("change", [dict(through="resnet"), dict(through="cnn", fresh=True)])
def test_a_transfer_from_nobody_or_with_fresh_noise_is_refused(change):
    options = dict(fresh=False) | change
    with pytest.raises(ValueError, match="held noise and the name of a classifier to attack"):
        Attack("CE", 1, "fgsm", **options)


class Watched(Classifier):
    """A classifier of digits that must never be asked."""

    num_classes = 10
    image_shape = (1, 8, 8)
    calls = 1

    def logits(self, x, noise):
        raise AssertionError("an attack by transfer asked the classifier")


@twins.rejected(
    {
        "the classifier itself": dict(
            frames=twins.patched(Attack.frames, Attack, climbed=lambda self, classifier: classifier)
        ),
        "another network": dict(
            frames=twins.patched(
                Attack.frames,
                protocols,
                another=lambda kind, name: zoo.classifier(kind, "adversarial"),
            )
        ),
    }
)
def test_an_attack_by_transfer_asks_the_other_network_alone(frames=Attack.frames):
    world = data.digits()
    x, y = world.test_images[:8], world.test_labels[:8]
    steps = (x, y, 0.1, "linf", AttackNoise(0, 0, 0, torch.arange(8)))
    chosen = Attack("CE", 3, "pgd", fresh=False, step=0.5)
    *_, wanted = chosen.frames(zoo.classifier("digits", "cnn"), *steps)
    *_, got = frames(replace(chosen, through="cnn"), Watched(), *steps)
    assert torch.equal(got.x, wanted.x) and not torch.equal(got.x, x)


def test_a_transfer_to_pictures_of_no_world_is_refused():
    chosen = Attack("CE", 1, "fgsm", fresh=False, through="cnn")
    with pytest.raises(ValueError, match="pictures of the shape of a world"):
        chosen.climbed(Toy())


@pytest.mark.parametrize("name", zoo.names("digits"))
def test_the_honest_protocol_has_what_it_promises(name):
    classifier = zoo.classifier("digits", name)
    paper = protocols.paper(zoo.entry_of("digits", name).paper, "linf", 0.1)
    honest = protocols.honest(classifier, "linf", 0.1)
    listed = honest.attacks
    assert (honest.key, honest.draws) == ("honest-2", 10)
    losses = {attack.loss for attack in listed}
    assert losses - {"targeted DLR"} == {"margin", "DLR", "scaled CE", "targeted margin"}
    assert ("targeted DLR" in losses) == classifier.deterministic
    assert all(attack.steps >= 100 for attack in listed[1:])  # the first one is the cheap one
    for attack in listed:
        lucky = attack.fresh and attack.method != "pgd"
        assert not lucky, "a lucky draw is no ascent"
        assert attack.targets == (TARGETS if attack.loss.startswith("targeted") else ())
    assert [attack.method for attack in listed].count("square") == 1
    gradients = set(classifier.gradients()) or {"exact"}
    assert {attack.gradient for attack in listed} == gradients
    assert {attack.gradient for attack in listed if attack.targets} == gradients
    noises = {False} if classifier.deterministic else {True, False}
    assert {attack.fresh for attack in listed} == noises
    assert max(attack.draws for attack in listed) == classifier.eot
    assert listed[0].runs()[0].calls == min(attack.runs()[0].calls for attack in listed)
    # what the first version asked, the second asks too
    assert set(first_honest(classifier, "linf", 0.1).attacks) <= set(listed)
    assert paper.source != honest.source and len(paper.source.split()) > 5


KINDS = {
    "deterministic": (Toy(random=False), DETERMINISTIC, DETERMINISTIC_2),
    "held": (Held.seeded(Toy()), DETERMINISTIC, DETERMINISTIC_2),
    "random": (Toy(), RANDOM, RANDOM_2),
    "votes": (MajorityVote(Toy(), 3), RANDOM, RANDOM_2),
    "purified": (Toy(purified=True), PURIFIED, PURIFIED_2),
}
FOREIGN = {
    "somebody's, deterministic": (Foreign(torch.nn.Flatten(), 4, SHAPE), DETERMINISTIC),
    "somebody's, hidden noise": (Foreign(torch.nn.Flatten(), 4, SHAPE, "hidden"), RANDOM),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_honest_protocol_follows_what_a_classifier_declares_and_no_name(kind):
    classifier, first, second = KINDS[kind]
    assert in_full(first_honest(classifier, "linf", 0.1)) == first
    listed = protocols.honest(classifier, "linf", 0.1).attacks
    assert tuple(tuple(asdict(attack).values())[:-1] for attack in listed) == second
    assert not any(attack.through for attack in listed), "who is measured is attacked"


@pytest.mark.parametrize("kind", FOREIGN)
def test_somebodys_classifier_gets_the_protocol_of_its_kind(kind):
    classifier, first = FOREIGN[kind]
    assert in_full(first_honest(classifier, "linf", 0.1)) == first
    listed = protocols.honest(classifier, "linf", 0.1).attacks
    targets = {attack.loss: attack.targets for attack in listed if attack.targets}
    wanted = {"targeted margin"} | ({"targeted DLR"} if classifier.deterministic else set())
    assert set(targets) == wanted and set(targets.values()) == {(1, 2, 3)}


@pytest.mark.parametrize("purified", [False, True])
def test_a_classifier_declares_how_many_draws_are_averaged(purified):
    listed = protocols.honest(Toy(purified=purified, eot=6), "linf", 0.1).attacks
    draws = [attack.draws for attack in listed]
    assert draws == ([1, 1, 1, 6, 1, 1, 6] if purified else [1, 1, 6, 6, 1, 6])


@pytest.mark.parametrize("options", [{}, dict(random=False), dict(purified=True)])
def test_two_classes_have_no_ratio_and_get_the_margin_again(options):
    two = protocols.honest(Toy(2, **options), "linf", 0.1).attacks
    three = protocols.honest(Toy(3, **options), "linf", 0.1).attacks
    in_place = [
        replace(attack, loss="margin") if attack.loss == "DLR" else attack for attack in three
    ]
    one = [replace(attack, targets=(1,)) if attack.targets else attack for attack in in_place]
    assert two == tuple(dict.fromkeys(one))
    assert not any("DLR" in attack.loss for attack in two)


def test_an_attack_climbs_the_gradient_that_it_names():
    purified = Toy(purified=True)
    random = Toy()
    votes = MajorityVote(random, 3)
    exact = Attack("margin")
    bpda = Attack("margin", gradient="bpda")
    assert exact.climbed(purified) is purified
    assert bpda.climbed(purified) is not purified
    assert exact.climbed(random) is random and bpda.climbed(random) is random
    assert votes.gradients() == {} and exact.climbed(votes).scale == "nats"
    assert votes.scale == "votes"


def convex_rivals(start: str) -> float:
    """Robust accuracy that APGD on the margin leaves of a linear classifier of six classes, from one start."""
    drawn = torch.Generator().manual_seed(3)
    weights = torch.randn(6, 12, generator=drawn)
    x = torch.rand(300, 1, 3, 4, generator=drawn)
    linear = torch.nn.Linear(12, 6, bias=False)
    linear.weight.data = weights
    model = Foreign(torch.nn.Sequential(torch.nn.Flatten(), linear), 6, (1, 3, 4)).eval()
    y = model(x).argmax(1)
    noise = AttackNoise(0, 0, 0, torch.arange(300))
    *_, last = Attack("margin", 20, start=start).frames(model, x, y, 0.1, "linf", noise)
    return float((~last.fooled).double().mean())


def test_the_first_run_starts_at_the_image_and_the_others_at_random():
    """A convex margin has a peak for every rival, and a random start may climb the wrong one."""
    listed = (Attack("margin", restarts=3), Attack("CE", start="random"))
    protocol = Protocol("honest", "linf", 0.1, listed)
    starts = [attack.start for attack in protocol.runs()]
    assert starts == ["image", "random", "random", "random"]
    assert all(attack.restarts == 1 for attack in protocol.runs())
    assert convex_rivals("image") < convex_rivals("random")
    with pytest.raises(ValueError, match=r"expected a start of \('image', 'random'\).*got 'zero'"):
        Attack("margin", start="zero")


def test_the_calls_of_an_attack_are_its_steps_and_draws():
    assert Attack("margin", 7).calls == 8
    assert Attack("DLR", 3, restarts=2).calls == 4
    assert Attack("scaled CE", 2, draws=3).calls == 10
    assert Attack("targeted margin", 7, targets=(1, 2)).runs()[0].calls == 9
    assert Attack("margin", 1000, "square", fresh=False).calls == 1001
    assert sum(attack.calls for attack in first_honest(Toy(), "l2", 1.0).runs()) == 304
    second = protocols.honest(Toy(), "l2", 1.0)
    assert sum(attack.calls for attack in second.runs()) == 304 + 11 + 1001 + 2 * 102


# ---------------------------------------------------------------------------------------------------------------------
# Targets


def test_every_target_and_restart_is_a_run_of_its_own():
    attack = Attack("targeted margin", restarts=2, targets=(1, 3))
    runs = [(run.targets, run.start, run.restarts) for run in attack.runs()]
    assert runs == [
        ((1,), "image", 1),
        ((3,), "image", 1),
        ((1,), "random", 1),
        ((3,), "random", 1),
    ]
    listed = (Attack("margin"), attack)
    assert len(Protocol("honest", "linf", 0.1, listed).runs()) == 5
    assert len(Attack("margin", restarts=3).runs()) == 3


def test_a_target_is_the_wrong_class_of_its_rank_under_the_held_noise(monkeypatch):
    toy = Toy(4)
    x = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 2])
    noise = AttackNoise(0, 0, 0, rows(3))
    order = attacks.ranked(toy, x, y, noise.source(toy, fresh=False))
    towards = []
    told = attacks.targeted_loss
    monkeypatch.setitem(
        protocols.TARGETED, "targeted margin", lambda target: towards.append(target) or told(target)
    )
    whole = Attack("targeted margin", 2, "pgd", step=0.1, targets=(1, 2, 3))
    for run in whole.runs():
        *_, last = run.frames(toy, x, y, 0.1, "linf", noise)
        assert last.x.shape == x.shape
    assert torch.equal(torch.stack(towards, 1), order)
    with pytest.raises(ValueError, match="expected one target of a run, got 3"):
        whole.frames(toy, x, y, 0.1, "linf", noise)
    beyond = Attack("targeted margin", targets=(4,))
    with pytest.raises(ValueError, match="expected targets among 3 wrong classes, got number 4"):
        beyond.frames(toy, x, y, 0.1, "linf", noise)


def test_the_squares_are_seeded_by_the_run(monkeypatch):
    toy = Toy(4)
    x = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 2])
    squares = Attack("margin", 5, "square", fresh=False)
    results = []
    for seed in (0, 0, 1):
        noise = AttackNoise(seed, 0, 0, rows(3))
        *_, last = squares.frames(toy, x, y, 0.1, "linf", noise)
        results.append(last.x)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


# ---------------------------------------------------------------------------------------------------------------------
# The noise of an attack


def rows(count: int) -> torch.Tensor:
    return torch.arange(count)


def test_held_noise_is_one_for_all_images_and_steps():
    for kept in (rows(3), torch.tensor([40])):
        held = AttackNoise(5, 2, 1, kept).source(Toy(), fresh=False)
        assert torch.equal(held, Toy().sample_noise(1, generator_of(5, "held noise")))


def test_fresh_noise_is_an_images_own_at_every_step_and_draw():
    """Neither how many images there are nor which of them survive changes the noise of an image."""
    toy = Toy()
    whole = AttackNoise(5, 2, 1, rows(BLOCK)).source(toy, fresh=True)
    first = AttackNoise(5, 2, 1, rows(3)).source(toy, fresh=True)
    some = AttackNoise(5, 2, 1, torch.tensor([7, 60])).source(toy, fresh=True)
    drawn = whole(4, 0)
    assert torch.equal(first(4, 0), drawn[:3]) and torch.equal(some(4, 0), drawn[[7, 60]])
    assert torch.equal(drawn, toy.sample_noise(BLOCK, generator_of(5, "attack", 2, 4, 0, 1)))
    others = (
        whole(5, 0),
        whole(4, 1),
        AttackNoise(6, 2, 1, rows(BLOCK)).source(toy, fresh=True)(4, 0),
        AttackNoise(5, 3, 1, rows(BLOCK)).source(toy, fresh=True)(4, 0),
        AttackNoise(5, 2, 0, rows(BLOCK)).source(toy, fresh=True)(4, 0),
    )
    assert all(not bool((drawn == other).any()) for other in others)


def test_the_view_is_calibrated_on_noise_that_no_step_has(monkeypatch):
    asked = []
    calibrated = attacks.AttackView.calibrated

    def watched(classifier, x, noise=()):
        asked.append(noise)
        return calibrated(classifier, x, noise)

    monkeypatch.setattr(attacks.AttackView, "calibrated", watched)
    x = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 2])
    noise = AttackNoise(0, 0, 0, rows(3))
    list(Attack("scaled CE", 4, "pgd", step=0.1).frames(Toy(), x, y, 0.1, "linf", noise))
    (drawn,) = asked
    steps = [noise.source(Toy(), fresh=True)(step, 0) for step in range(5)]
    assert drawn.shape == (3, 3) and not any(torch.equal(drawn, step) for step in steps)


# ---------------------------------------------------------------------------------------------------------------------
# Identity


def every_protocol() -> list[Protocol]:
    listed = [protocols.paper(name, "l2", 0.5) for name in protocols.PAPERS]
    for classifier, _, _ in KINDS.values():
        listed += [
            define(classifier, "linf", 8 / 255) for define in (first_honest, protocols.honest)
        ]
    listed.append(protocols.alone("autoattack-10", Toy(5), "l2", 0.1))
    return [*listed, protocols.single(Attack("margin", 7, "pgd", step=0.1), "linf", 0.1)]


@pytest.mark.parametrize("protocol", every_protocol(), ids=lambda protocol: protocol.name)
def test_the_identity_of_a_protocol_is_everything_that_was_chosen(protocol):
    content = json.loads(json.dumps(protocol.as_json(), allow_nan=False))
    assert set(content) == {"name", "norm", "epsilon", "attacks", "version", "draws"}
    for attack, listed in zip(protocol.attacks, content["attacks"], strict=True):
        own = [name for name in ("targets", "through") if getattr(attack, name)]
        assert tuple(listed) == (*FIELDS, *own)
    assert Protocol.of_json(content) == protocol
    assert protocol.source.endswith(".") and protocol.key == f"{protocol.name}-{protocol.version}"


def test_identities_of_before_there_were_targets_are_read_and_are_the_same():
    stored = sorted(assets.folder().glob("records/*-attacks/*/settings.json"))
    assert stored
    for path in stored:
        content = json.loads(path.read_text())["protocol"]
        assert Protocol.of_json(content).as_json() == content, path


CHANGES = {
    "name": "paper-rdc",
    "norm": "l2",
    "epsilon": 0.2,
    "version": 1,
    "draws": 11,
    "attacks": (Attack("margin"), Attack("DLR")),
}


@pytest.mark.parametrize("field", CHANGES)
def test_another_value_of_any_field_is_another_identity(field):
    protocol = protocols.honest(Toy(), "linf", 0.1)
    other = replace(protocol, **{field: CHANGES[field]})
    assert other.as_json() != protocol.as_json()
    assert Protocol.of_json(other.as_json()) == other != protocol


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("norm"),
        lambda content: content.pop("attacks"),
        lambda content: content.update(defence="dc"),
        lambda content: content.update(attacks=None),
        lambda content: content["attacks"][0].update(exact=True),
        lambda content: content["attacks"][0].pop("loss"),
    ],
)
def test_the_fields_of_something_else_get_a_sentence(change):
    content = protocols.honest(Toy(), "linf", 0.1).as_json()
    change(content)
    with pytest.raises(ValueError, match="expected the fields of a protocol, got others"):
        Protocol.of_json(content)


def test_names_and_choices_that_do_not_exist():
    with pytest.raises(ValueError, match="expected a paper's protocol of rdc, .*, got 'vote'"):
        protocols.paper("vote", "linf", 0.1)
    with pytest.raises(
        ValueError, match="expected at least 3 classes, as the protocol of rdc uses the DLR loss"
    ):
        protocols.paper("rdc", "linf", 0.1, classes=2)
    assert protocols.paper("madry", "linf", 0.1, classes=2).attacks
    for options, said in (
        (dict(loss="margins"), "expected a loss of .* for apgd, got 'margins'"),
        (dict(method="cg"), "expected the attack to be one of 'fgsm', 'pgd', 'apgd'.*got 'cg'"),
        (dict(method="cw", fresh=False), "expected a loss of .*'its own'.* for cw, got 'margin'"),
        (dict(loss="its own"), "expected a loss of .* for apgd, got 'its own'"),
        (dict(method="square"), "expected held noise for square, .* got fresh noise"),
        (dict(method="fgsm"), "expected 1 steps of fgsm, which has no other number, got 100"),
        (dict(loss="targeted margin"), r"expected the ranks of its targets for apgd .* got \(\)"),
        (dict(targets=(1,)), r"expected no targets for apgd .* got \(1,\)"),
        (dict(loss="targeted margin", targets=(0, 1)), r"ranks from 1, each once, got \(0, 1\)"),
        (dict(loss="targeted margin", targets=(1, 1)), r"ranks from 1, each once, got \(1, 1\)"),
        (dict(loss="targeted margin", targets=(1.5,)), r"ranks from 1, each once, got \(1.5,\)"),
        (dict(gradient="straight"), "a gradient of .*'exact', 'bpda'"),
        (dict(draws=4, fresh=False), "one draw of held noise"),
        (dict(steps=0), "at least one step"),
        (dict(restarts=0), "at least one step, draw and restart"),
        (dict(step=0.1), "no step size for apgd, got 0.1"),
        (dict(method="pgd"), "expected a step size for pgd, got None"),
    ):
        with pytest.raises(ValueError, match=said):
            Attack(**{"loss": "margin", **options})
    with pytest.raises(ValueError, match="expected a norm of linf, l2, flow, got 'l1'"):
        Protocol("honest", "l1", 0.1, (Attack("margin"),))
    with pytest.raises(ValueError, match="got one twice"):
        Protocol("honest", "linf", 0.1, (Attack("margin"), Attack("margin")))
    with pytest.raises(ValueError, match="expected at least one attack in the protocol 'honest'"):
        Protocol("honest", "linf", 0.1, ())


def test_attacks_in_words():
    assert str(Attack("DLR", gradient="bpda")) == "apgd DLR 100, BPDA, fresh noise"
    assert str(Attack("CE", 20, "pgd", draws=4, step=0.1)) == "pgd CE 20, exact, fresh noise x4"
    assert str(Attack("margin", fresh=False)) == "apgd margin 100, exact, held noise"
    towards = Attack("targeted margin", fresh=False, targets=(1, 2))
    assert str(towards) == "apgd targeted margin 100, exact, held noise, 2 targets"
    assert str(towards.runs()[1]).endswith("held noise, towards wrong class 2")
    assert str(Attack("margin", 1, "fgsm")) == "fgsm margin, exact, fresh noise"
    own = Attack("its own", 50, "cw", fresh=False)
    assert str(own) == "cw 50, exact, held noise"


# ---------------------------------------------------------------------------------------------------------------------
# A protocol by its name


def test_a_protocol_is_named_by_its_name_and_version():
    toy = Toy()
    assert protocols.named("honest", 2, toy, "madry", "l2", 0.3) == protocols.honest(toy, "l2", 0.3)
    first = protocols.named("honest", 1, toy, "madry", "l2", 0.3)
    assert in_full(first) == RANDOM and first.key == "honest-1"
    paper = protocols.named("paper-madry", 1, toy, "madry", "linf", 0.1)
    assert paper == protocols.paper("madry", "linf", 0.1)


def test_flows_are_bent_with_and_without_a_wish_for_smoothness():
    random = protocols.honest(Toy(eot=4), "flow", 0.5).attacks
    assert [(attack.method, attack.loss) for attack in random] == [
        ("stadv", "margin"),
        ("bend", "margin"),
        ("bend", "scaled CE"),
    ]
    assert all(attack.fresh and attack.draws == 4 and attack.steps == 100 for attack in random)
    held = protocols.honest(Toy(random=False, eot=4), "flow", 0.5).attacks
    assert not any(attack.fresh or attack.draws > 1 for attack in held)
    *_, last = protocols.honest(Toy(purified=True), "flow", 0.5).attacks
    assert (last.method, last.gradient) == ("bend", "bpda") and len(random) == 3
    assert protocols.named("honest", 2, Toy(), "madry", "flow", 0.5).key == "honest-2"
    with pytest.raises(ValueError, match="expected honest-2 for flows, got honest-1"):
        protocols.named("honest", 1, Toy(), "madry", "flow", 0.5)


@pytest.mark.parametrize(
    "name, version",
    [
        ("honest", 3),
        ("honest", 0),
        ("paper-rdc", 1),
        ("paper-madry", 2),
        ("single", 1),
        ("best", 1),
    ],
)
def test_a_protocol_that_the_library_does_not_know_cannot_be_judged_by(name, version):
    said = f"honest-1, honest-2, paper-madry-1 .* got {name}-{version}; this library cannot judge"
    with pytest.raises(ValueError, match=said):
        protocols.named(name, version, Toy(), "madry", "linf", 0.1)


ALONE = {
    "fgsm": Attack("margin", 1, "fgsm"),
    "pgd": Attack("margin", 100, "pgd", step=0.1, draws=4),
    "apgd": Attack("margin", draws=4),
    "square": Attack("margin", 1000, "square", fresh=False),
    "lagrange": Attack("margin", 100, "lagrange", "bpda", step=0.1, draws=4),
    "stadv": Attack("margin", 100, "stadv", step=0.1, draws=4),
    "bend": Attack("margin", 100, "bend", step=0.1, draws=4),
    "mifgsm": Attack("its own", 10, "mifgsm", fresh=False),
    "cw": Attack("its own", 50, "cw", fresh=False),
    **{
        f"autoattack-{name}": Attack(
            "its own", steps, f"autoattack-{name}", fresh=False, targets=(1, 2, 3)
        )
        for name, steps in (("10", 10), ("100", 100), ("plus-10", 10), ("plus-100", 100))
    },
}


@pytest.mark.parametrize("name", ALONE)
def test_one_attack_by_name_has_all_its_choices_made(name):
    assert set(ALONE) == set(attack_table.ENTRIES)
    norm = zoo.attack(name).norms[0]
    wanted = ALONE[name]
    if name == "fgsm":
        wanted = replace(wanted, draws=4)
    assert protocols.alone(name, Maximising(4, eot=4), norm, 0.1) == protocols.single(
        wanted, norm, 0.1
    )
    without = protocols.alone(name.upper(), Maximising(4, random=False), norm, 0.1).attacks
    assert without == (replace(wanted, fresh=False, draws=1),)


def test_one_attack_by_name_that_cannot_be_meant_gets_a_sentence():
    three = Toy(3)
    assert protocols.alone("pgd", three, "l2", 0.1, steps=5).attacks[0].step == 0.5
    for name, norm, steps, said in (
        ("cw", "linf", None, "expected a norm of l2 for the attack cw, got 'linf'"),
        ("stadv", "linf", None, "expected a norm of flow for the attack stadv, got 'linf'"),
        ("mifgsm", "l2", None, "expected a norm of linf for the attack mifgsm, got 'l2'"),
        ("autoattack-10", "l2", None, "at least 4 classes for the attack autoattack-10, got 3"),
        ("fgsm", "l2", 7, "expected 1 steps of fgsm"),
        ("lagrange", "l2", None, "expected a classifier that maximises a likelihood first"),
        ("cg", "l2", None, "expected the attack to be one of"),
    ):
        with pytest.raises(ValueError, match=said):
            protocols.alone(name, three, norm, 0.1, steps)


def test_every_table_asks_for_protocols_that_exist():
    for entry in zoo.classifiers.ENTRIES.values():
        assert entry.paper in protocols.PAPERS
        named = {column.protocol(entry) for column in tables.COLUMNS}
        assert named == {None, f"paper-{entry.paper}", "honest"}
        assert named - {None} <= set(protocols.SOURCES)
