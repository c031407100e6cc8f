"""What a protocol is: its attacks in full, chosen by what a classifier declares, and an identity that records keep."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from diffclass import attacks, zoo
from diffclass.classifiers.base import BLOCK, Classifier, Held
from diffclass.classifiers.foreign import Foreign
from diffclass.classifiers.votes import MajorityVote
from diffclass.evaluation import claims, protocols, tables
from diffclass.evaluation.protocols import Attack, AttackNoise, Protocol
from diffclass.noise import generator_of

SHAPE = (1, 2, 2)
FIELDS = ("loss", "steps", "method", "gradient", "fresh", "draws", "restarts", "step", "start")

# What `protocols.honest` listed for every classifier of digits before classifiers declared anything, in the order of FIELDS.
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
HONEST = {
    "cnn": DETERMINISTIC,
    "adversarial": DETERMINISTIC,
    "dc": RANDOM,
    "contrastive": RANDOM,
    "adversarial-dc": RANDOM,
    "vote": RANDOM,  # had no protocol before
    "rdc1": PURIFIED,
    "rdc5": PURIFIED,
    "rdc-released": PURIFIED,
    "rdc-contrastive": PURIFIED,
    "lm-cnn": PURIFIED,
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
RDC = (("DLR", 100, "apgd", "bpda", True, 1, 5, None, "random"),)
MADRY = (("CE", 20, "pgd", "exact", False, 1, 1, 0.25, "random"),)
PAPER = {
    "cnn": MADRY,
    "adversarial": MADRY,
    "dc": RDC,
    "contrastive": MADRY,
    "adversarial-dc": MADRY,
    "vote": RDC,  # had no protocol before
    "rdc1": RDC,
    "rdc5": RDC,
    "rdc-released": RDC,
    "rdc-contrastive": RDC,
    "lm-cnn": RDC,
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


def in_full(protocol: Protocol) -> tuple:
    return tuple(tuple(asdict(attack).values()) for attack in protocol.attacks)


# ---------------------------------------------------------------------------------------------------------------------
# Which attacks


def test_the_lists_above_are_about_every_classifier_and_field():
    assert set(HONEST) == set(PAPER) == set(zoo.names("digits"))
    assert FIELDS == tuple(asdict(Attack("margin")))


@pytest.mark.parametrize("name", zoo.names("digits"))
@pytest.mark.parametrize("norm, epsilon", [("linf", 0.1), ("l2", 1.0)])
def test_the_honest_protocol_of_every_classifier_is_what_it_always_was(name, norm, epsilon):
    protocol = protocols.honest(zoo.classifier("digits", name), norm, epsilon)
    assert in_full(protocol) == HONEST[name]
    assert (protocol.key, protocol.norm, protocol.epsilon) == ("honest-1", norm, epsilon)
    assert protocol.draws == 10


@pytest.mark.parametrize("name", zoo.names("digits"))
def test_the_protocol_of_every_paper_is_what_it_always_was(name):
    entry = zoo.entry_of("digits", name)
    protocol = protocols.paper(entry.paper, "l2", 0.5)
    assert in_full(protocol) == PAPER[name]
    assert (protocol.name, protocol.version) == (f"paper-{entry.paper}", 1)
    assert (protocol.norm, protocol.epsilon, protocol.draws) == ("l2", 0.5, 10)


@pytest.mark.parametrize("name", zoo.names("digits"))
def test_the_honest_protocol_has_what_it_promises(name):
    classifier = zoo.classifier("digits", name)
    paper = protocols.paper(zoo.entry_of("digits", name).paper, "linf", 0.1)
    honest = protocols.honest(classifier, "linf", 0.1)
    listed = honest.attacks
    assert honest.draws == 10
    assert {attack.loss for attack in listed} == {"margin", "DLR", "scaled CE"}
    assert all(attack.steps >= 100 for attack in listed) and len(honest.runs()) >= 3
    for attack in listed:
        assert attack.method == ("pgd" if attack.fresh else "apgd"), "a lucky draw is no ascent"
    gradients = set(classifier.gradients()) or {"exact"}
    assert {attack.gradient for attack in listed} == gradients
    noises = {False} if classifier.deterministic else {True, False}
    assert {attack.fresh for attack in listed} == noises
    assert max(attack.draws for attack in listed) == classifier.eot
    assert paper.source != honest.source and len(paper.source.split()) > 5


KINDS = {
    "deterministic": (Toy(random=False), DETERMINISTIC),
    "held": (Held.seeded(Toy()), DETERMINISTIC),
    "somebody's, deterministic": (Foreign(torch.nn.Flatten(), 4, SHAPE), DETERMINISTIC),
    "random": (Toy(), RANDOM),
    "somebody's, hidden noise": (Foreign(torch.nn.Flatten(), 4, SHAPE, "hidden"), RANDOM),
    "votes": (MajorityVote(Toy(), 3), RANDOM),
    "purified": (Toy(purified=True), PURIFIED),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_honest_protocol_follows_what_a_classifier_declares_and_no_name(kind):
    classifier, listed = KINDS[kind]
    assert in_full(protocols.honest(classifier, "linf", 0.1)) == listed


@pytest.mark.parametrize("purified", [False, True])
def test_a_classifier_declares_how_many_draws_are_averaged(purified):
    listed = protocols.honest(Toy(purified=purified, eot=6), "linf", 0.1).attacks
    draws = [attack.draws for attack in listed]
    assert draws == ([6, 1, 1] if purified else [6, 1, 6])


@pytest.mark.parametrize("options", [{}, dict(random=False), dict(purified=True)])
def test_two_classes_have_no_ratio_and_get_the_margin_again(options):
    two = protocols.honest(Toy(2, **options), "linf", 0.1).attacks
    three = protocols.honest(Toy(3, **options), "linf", 0.1).attacks
    in_place = tuple(
        replace(attack, loss="margin") if attack.loss == "DLR" else attack for attack in three
    )
    assert two == tuple(dict.fromkeys(in_place))
    assert not any(attack.loss == "DLR" for attack in two)


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
    model = Foreign(torch.nn.Sequential(torch.nn.Flatten(), linear), 6, (1, 3, 4))
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
    assert sum(attack.calls for attack in protocols.honest(Toy(), "l2", 1.0).runs()) == 304


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
    listed += [protocols.honest(classifier, "linf", 8 / 255) for classifier, _ in KINDS.values()]
    return [*listed, protocols.single(Attack("margin", 7, "pgd", step=0.1), "linf", 0.1)]


@pytest.mark.parametrize("protocol", every_protocol(), ids=lambda protocol: protocol.name)
def test_the_identity_of_a_protocol_is_everything_that_was_chosen(protocol):
    content = json.loads(json.dumps(protocol.as_json(), allow_nan=False))
    assert set(content) == {"name", "norm", "epsilon", "attacks", "version", "draws"}
    assert all(tuple(attack) == FIELDS for attack in content["attacks"])
    assert Protocol.of_json(content) == protocol
    assert protocol.source.endswith(".") and protocol.key == f"{protocol.name}-1"


CHANGES = {
    "name": "paper-rdc",
    "norm": "l2",
    "epsilon": 0.2,
    "version": 2,
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
        (dict(loss="margins"), "expected a loss of"),
        (dict(method="cg"), "expected the attack to be one of 'pgd', 'apgd'.*got 'cg'"),
        (dict(gradient="straight"), "a gradient of .*'exact', 'bpda'"),
        (dict(draws=4, fresh=False), "one draw of held noise"),
        (dict(steps=0), "at least one step"),
        (dict(restarts=0), "at least one step, draw and restart"),
        (dict(step=0.1), "no step size for apgd, got 0.1"),
        (dict(method="pgd"), "expected a step size for pgd, got None"),
    ):
        with pytest.raises(ValueError, match=said):
            Attack(**{"loss": "margin", **options})
    with pytest.raises(ValueError, match="got one twice"):
        Protocol("honest", "linf", 0.1, (Attack("margin"), Attack("margin")))
    with pytest.raises(ValueError, match="expected at least one attack in the protocol 'honest'"):
        Protocol("honest", "linf", 0.1, ())


def test_attacks_in_words():
    assert str(Attack("DLR", gradient="bpda")) == "apgd DLR 100, BPDA, fresh noise"
    assert str(Attack("CE", 20, "pgd", draws=4, step=0.1)) == "pgd CE 20, exact, fresh noise x4"
    assert str(Attack("margin", fresh=False)) == "apgd margin 100, exact, held noise"


# ---------------------------------------------------------------------------------------------------------------------
# A claim's protocol is the one that its name has in the library


def test_a_named_protocol_is_the_librarys_own():
    toy = Toy()
    known = (
        protocols.honest(toy, "l2", 0.3),
        protocols.paper("madry", "linf", 0.1),
        protocols.single(Attack("margin", 3), "l2", 0.2),
    )
    for protocol in known:
        assert claims.named_protocol(toy, "madry", protocol) == protocol
        shorter = replace(protocol, attacks=(Attack("DLR", 1),))
        same = claims.named_protocol(toy, "madry", shorter) == shorter
        assert same == (protocol.name == "single")
    assert claims.named_protocol(toy, "madry", replace(known[2], draws=1)).draws == 10


@pytest.mark.parametrize("change", [dict(version=2), dict(name="paper-rdc"), dict(name="best")])
def test_a_protocol_that_the_library_does_not_know_cannot_be_judged_by(change):
    claimed = replace(protocols.honest(Toy(), "linf", 0.1), **change)
    with pytest.raises(ValueError, match=f"got {claimed.key}; this library cannot judge by it"):
        claims.named_protocol(Toy(), "madry", claimed)


def test_every_table_asks_for_protocols_that_exist():
    for entry in zoo.classifiers.ENTRIES.values():
        assert entry.paper in protocols.PAPERS
        named = {column.protocol(entry) for column in tables.COLUMNS}
        assert named == {None, f"paper-{entry.paper}", "honest"}
        assert named - {None} <= set(protocols.SOURCES)
