"""The audit of other people's classifiers: every one that cheats is red by name, no honest one is red anywhere."""

import pytest
from diffclass import audit
from diffclass.audit import planted
from diffclass.classifiers.foreign import Foreign
from foreign_modules import CLASSES, SHAPE, TESTED, Entry, dishonest, honest

QUICK = (1, 2, 3, 4, 5, 37, 38, 39, 40)  # checks that look at the object alone
SMALL = 0.04  # a budget that some pictures of an undefended network survive
NUMBER = {one.__name__: one.number for one in audit.CHECKS}


def case_of(entry: Entry, epsilon: float = planted.EPSILON, **options) -> audit.Case:
    """Somebody else's module under audit, as its author would have it audited."""
    classifier = Foreign(entry.make(), CLASSES, SHAPE, entry.randomness)
    classifier.train(entry.training)
    own = dict(
        held=entry.randomness == "none",
        statement=planted.STATEMENT,
        compiled=entry.compiled,
        training=lambda: planted.images(512, seed=100)[0],
        closer=16,
    )
    x, y = planted.images(TESTED)
    return audit.case_of(classifier, x, y, epsilon, **{**own, **options})


def reds(case: audit.Case, only=None) -> dict[str, str]:
    """The evidence of every red check, by its name."""
    return {one.name: one.evidence for one in audit.run(case, only) if one.light == audit.RED}


def test_the_table_is_long_enough():
    assert len(dishonest()) >= 30 and len(honest()) >= 12
    named = {name for entry in dishonest().values() for name in entry.red}
    assert named <= set(NUMBER)
    new = {"same_in_both_modes", "same_for_every_caller", "same_at_every_time", "nothing_leaked"}
    assert new <= named


def listed(table: dict[str, Entry]):
    """The names of a table; what has to be compiled takes long."""
    return [
        pytest.param(name, marks=pytest.mark.slow if entry.compiled else ())
        for name, entry in table.items()
    ]


@pytest.mark.parametrize("name", listed(dishonest()))
def test_who_cheats_is_red_by_name(name):
    entry = dishonest()[name]
    case = case_of(entry)
    wanted = {NUMBER[check] for check in entry.red}
    red = reds(case, sorted({*QUICK[:5], *wanted}))
    assert set(entry.red) <= set(red), red


@pytest.mark.parametrize("name", listed(honest()))
def test_who_is_honest_is_not_red(name):
    case = case_of(honest()[name], SMALL)
    assert reds(case, QUICK) == {}
    assert len(case.left), "nothing is left that could be attacked further"


@pytest.mark.slow
@pytest.mark.parametrize("name", honest())
def test_who_is_honest_passes_the_whole_audit(name):
    assert reds(case_of(honest()[name], SMALL)) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", dishonest())
def test_who_cheats_fails_the_whole_audit(name):
    entry = dishonest()[name]
    red = reds(case_of(entry))
    assert set(entry.red) <= set(red), red
