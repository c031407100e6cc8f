"""The lamps of the audit: each in its group's row, told apart without colour, and a click chooses its check."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from diffclass import audit, widgets
from diffclass.audit import planted
from diffclass.scenes.audit import COLUMNS, MYSTERIES, NAMES, AuditScene, lamp


@pytest.fixture(scope="module")
def stored():
    """What `diffclass audit --json` prints of a masked classifier."""
    rows = [asdict(made) for made in audit.run(planted.case("quantised", 16))]
    return json.loads(json.dumps(dict(defence="masked", world="toy", checks=rows)))


@pytest.fixture(scope="module")
def scene(stored):
    return AuditScene([stored])


def test_every_lamp_is_in_the_row_of_its_group(scene):
    places = scene.places()
    assert sorted(one.number for one in places.values()) == list(range(1, 37))
    for tile, one in places.items():
        assert audit.GROUPS[tile // COLUMNS] == one.group and tile % COLUMNS >= NAMES
    captions = scene.at("honest", 3)["panels"][0]["captions"]
    assert [captions[COLUMNS * row] for row in range(6)] == list(audit.GROUPS)
    tiles = {one.number: tile for tile, one in places.items()}
    assert captions[tiles[1]] == "1+" and captions[tiles[19]] == "19?"


def test_lamps_differ_without_their_colours():
    signs = [(lamp(light) == 255).all(2) for light in audit.LIGHTS]
    assert all(not np.array_equal(a, b) for i, a in enumerate(signs) for b in signs[:i])
    assert (lamp(None) == 255).all()


def test_the_frame_tells_what_the_chosen_check_found(scene):
    for name, fault in {"honest": "honest", **MYSTERIES}.items():
        for made in scene.audits[name]:
            note = scene.at(name, made.number)["note"]
            assert f"<b>{made.number} {made.name}</b> is <b>{made.light}</b>" in note
            assert ("What to do" in note) == (made.light == "red")
        assert set(planted.FAULTS[fault][1]) <= {made.number for made in scene.audits[name] if made.light == "red"}


def test_curves_are_drawn_over_numbers_and_bars_over_names(scene):
    kinds = {number: scene.at("mystery 2", number)["panels"][1]["kind"] for number in (1, 9, 15, 19, 20, 25)}
    assert kinds == {1: "bars", 9: "curves", 15: "bars", 19: "curves", 20: "bars", 25: "bars"}
    drawn = next(made for made in scene.audits["mystery 2"] if made.number == 20).picture
    panel = scene.at("mystery 2", 20)["panels"][1]
    assert panel["values"] == pytest.approx(drawn.lines["mean"], rel=1e-4)
    assert panel["marks"] == pytest.approx(drawn.lines["worst"], abs=1e-4)


def test_a_stored_audit_is_shown_as_it_was_made(scene, stored):
    frame = scene.at("masked on toy", 3)
    assert stored["checks"][2]["evidence"] in frame["note"] and "is <b>red</b>" in frame["note"]
    assert "masked on toy" in frame["panels"][0]["title"]


def test_a_click_on_a_lamp_chooses_its_check_and_one_beside_it_nothing():
    hero = widgets.audit_hero(number=3)
    hero.stage.picked = COLUMNS + NAMES + 6
    assert hero.controls["number"].value == 13 and "white_beats_black" in hero.stage.frame["note"]
    hero.stage.picked = COLUMNS  # the name of a group
    assert hero.controls["number"].value == 13
