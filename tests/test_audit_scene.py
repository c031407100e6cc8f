"""The lamps of the audit: each in its group's row, told apart without colour, and a click chooses its check."""

import asyncio
import json
from dataclasses import asdict

import pytest
from diffclass import audit
from diffclass.audit import planted
from diffclass.course import widgets
from diffclass.course.scenes.audit import MYSTERIES, SIGN, AuditScene


@pytest.fixture(scope="module")
def stored():
    """What `diffclass audit --json` prints of a masked classifier."""
    rows = [asdict(result) for result in audit.run(planted.case("quantised", 16))]
    return json.loads(json.dumps(dict(classifier="masked", world="toy", checks=rows)))


@pytest.fixture(scope="module")
def partial(stored):
    """An audit of the same classifier with other settings, without its first ten checks, with a number not measured."""
    checks = [dict(row) for row in stored["checks"] if row["number"] > 10]
    drawn = next(row for row in checks if row["picture"])
    lines = {name: [None, *line[1:]] for name, line in drawn["picture"]["lines"].items()}
    drawn["picture"] = dict(drawn["picture"], lines=lines)
    settings = dict(images=24, norm="linf", epsilon=0.1, seed=5)
    return dict(stored, checks=checks, **settings), drawn["number"]


PARTIAL = "masked on toy, stored: 24 pictures, L∞ within 0.1, seed 5"


@pytest.fixture(scope="module")
def scene(stored, partial):
    return AuditScene([stored, partial[0]])


def test_every_lamp_is_in_the_row_of_its_group(scene):
    panel = scene.at("honest", 3)["panels"][0]
    assert [row["label"] for row in panel["rows"]] == list(audit.GROUPS)
    group_of = {one.number: one.group for one in scene.checks("honest")}
    shown = [(int(name), row["label"]) for row in panel["rows"] for name, _, _ in row["lamps"]]
    assert [number for number, _ in shown] == scene.numbers() and sorted(scene.numbers()) == list(
        range(1, 41)
    )
    assert all(group_of[number] == label for number, label in shown)
    assert scene.numbers()[panel["chosen"]] == 3


def test_lamps_differ_without_their_colours(scene):
    assert len(set(SIGN.values())) == len(audit.LIGHTS)
    for name in scene.names:
        signs = {
            int(n): sign
            for row in scene.at(name, 1)["panels"][0]["rows"]
            for n, sign, _ in row["lamps"]
        }
        assert signs == {one.number: SIGN[one.light] for one in scene.checks(name)}


def test_the_frame_says_what_the_chosen_check_measured(scene):
    for name, fault in {"honest": "honest", **MYSTERIES}.items():
        for result in scene.checks(name):
            note = scene.at(name, result.number)["note"]
            assert f"<b>{result.number} {result.name}</b> is <b>{result.light}</b>" in note
            assert ("What to do" in note) == (result.light == "red")
        assert set(planted.FAULTS[fault][1]) <= {
            result.number for result in scene.checks(name) if result.light == "red"
        }


def test_curves_are_drawn_over_numbers_and_bars_over_names(scene):
    kinds = {
        number: scene.at("mystery 2", number)["panels"][1]["kind"]
        for number in (1, 9, 15, 19, 20, 25)
    }
    assert kinds == {1: "bars", 9: "curves", 15: "bars", 19: "curves", 20: "bars", 25: "bars"}
    drawn = next(one for one in scene.checks("mystery 2") if one.number == 20).picture
    panel = scene.at("mystery 2", 20)["panels"][1]
    assert panel["values"] == pytest.approx(drawn.lines["mean"], rel=1e-4)
    assert panel["marks"] == pytest.approx(drawn.lines["worst"], abs=1e-4)


def test_a_stored_audit_is_shown_as_it_was(scene, stored):
    frame = scene.at("masked on toy", 3)
    assert stored["checks"][2]["evidence"] in frame["note"] and "is <b>red</b>" in frame["note"]
    assert "masked on toy" in frame["panels"][0]["title"]


def test_audits_of_one_classifier_with_other_settings_stay_apart(scene, stored):
    assert len(scene.checks("masked on toy")) == 40 and len(scene.checks(PARTIAL)) == 30
    assert "its settings are not recorded" in scene.at("masked on toy", 3)["note"]
    assert "24 pictures, L∞ within 0.1, seed 5" in scene.at(PARTIAL, 20)["note"]
    assert "audited here on 64 pictures" in scene.at("honest", 3)["note"]


def test_the_same_audit_twice_is_refused(partial):
    with pytest.raises(ValueError, match="expected stored audits that differ"):
        AuditScene([partial[0]] * 3, count=16)


def test_a_check_that_an_audit_lacks_is_not_shown_as_another(scene):
    frame = scene.at(PARTIAL, 3)
    assert "has no check <b>3</b>" in frame["note"]
    assert len(frame["panels"]) == 1 and frame["panels"][0]["chosen"] is None
    shown = [int(name) for row in frame["panels"][0]["rows"] for name, _, _ in row["lamps"]]
    assert shown == scene.numbers(PARTIAL) and 3 not in shown


def test_numbers_that_were_not_measured_are_not_drawn(scene, partial):
    frame = scene.at(PARTIAL, partial[1])
    assert len(frame["panels"]) == 1 and "not finite or missing" in frame["note"]


def test_a_lamp_of_a_shorter_audit_chooses_its_own_check(stored, partial):
    hero = widgets.audit_hero([stored, partial[0]], PARTIAL, 20)
    lamp = hero.stage.frame["panels"][0]["chosen"]
    hero.controls["number"].value = 30
    hero.stage.picked = lamp
    assert hero.controls["number"].value == 20 and "<b>20 " in hero.stage.frame["note"]


def test_a_click_on_a_lamp_chooses_its_check_and_can_be_repeated():
    hero = widgets.audit_hero(number=3)
    lamp = hero.stage.frame["panels"][0]["chosen"]
    number = hero.controls["number"]
    for other in (13, 20):
        number.value = other
        hero.stage.picked = lamp
        assert number.value == 3 and "<b>3 " in hero.stage.frame["note"]
        assert hero.stage.frame["panels"][0]["chosen"] == lamp


def test_a_first_audit_says_that_it_takes_a_second_and_then_shows_its_lamps():
    async def session():
        hero = widgets.audit_hero()
        hero.controls["name"].value = "mystery 3"
        waiting = hero.stage.frame
        await asyncio.sleep(2 * widgets.QUIET)
        lamps = hero.stage.frame
        hero.controls["name"].value = "honest"
        return waiting, lamps, hero.stage.frame

    waiting, lamps, known = asyncio.run(session())
    assert [panel["kind"] for panel in waiting["panels"]] == ["words"]
    assert "about a second" in waiting["note"]
    assert lamps["panels"][0]["kind"] == "lamps" and "mystery 3" in lamps["note"]
    assert known["panels"][0]["kind"] == "lamps" and "honest" in known["note"]


def test_planted_audits_are_asked_once_for_all_scenes(monkeypatch):
    asked = []
    run = audit.run
    monkeypatch.setattr(audit, "run", lambda case: asked.append(case) or run(case))
    first = AuditScene(count=12).checks("mystery 1")
    assert AuditScene(count=12).checks("mystery 1") is first and len(asked) == 1
    assert AuditScene(count=13).checks("mystery 1") is not first and len(asked) == 2
