"""Frames of the audit: 40 lamps in six rows, and what the chosen one measured."""

import functools
import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from diffclass import audit
from diffclass.audit import AMBER, GREEN, GROUPS, RED, Check, planted
from diffclass.course import figures
from diffclass.course.figures import COLOURS

MYSTERIES = {
    f"mystery {number}": name
    for number, name in enumerate(("quantised", "noisy", "two-faced", "reseeded"), start=1)
}
PAINT = {GREEN: COLOURS[2], AMBER: COLOURS[1], RED: COLOURS[4]}
SIGN = {GREEN: "+", AMBER: "?", RED: "\N{MINUS SIGN}"}


@functools.cache
def planted_checks(fault: str, count: int) -> tuple[Check, ...]:
    """All checks of a planted classifier on so many pictures; asked once, as its seeds make them the same each time."""
    return tuple(audit.run(planted.case(fault, count)))


class AuditScene:
    """The lamps of an honest classifier and four mysteries, audited when they are shown, and of stored audits of others.

    Randomness  that of the planted cases, from their seeds
    """

    def __init__(self, stored: Iterable[dict] = (), count: int = 64):
        self.count = count
        self.faults = {"honest": "honest", **MYSTERIES}
        self._seen: set[str] = set()
        self.stored: dict[str, tuple[Check, ...]] = {}
        self.settings: dict[str, str] = dict.fromkeys(
            self.faults, f"audited here on {count} pictures"
        )
        for document in stored:
            name = f"{document['classifier']} on {document['world']}"
            settings = _settings_of(document)
            if name in self.settings:
                name = f"{name}, {settings}"
            if name in self.settings:
                raise ValueError(
                    f"expected stored audits that differ, got {name} twice; is the same file listed twice?"
                )
            self.stored[name] = tuple(_check_of(row) for row in document["checks"])
            self.settings[name] = settings

    @property
    def names(self) -> tuple[str, ...]:
        """Whose lamps can be shown."""
        return tuple(self.settings)

    def checks(self, name: str) -> tuple[Check, ...]:
        """The checks of one audit; the first time, a planted classifier takes up to a second."""
        self._seen.add(name)
        if name in self.stored:
            return self.stored[name]
        return planted_checks(self.faults[name], self.count)

    def numbers(self, name: str = "honest") -> list[int]:
        """The checks' numbers of one audit as their lamps are shown, group by group."""
        return [one.number for group in GROUPS for one in self.checks(name) if one.group == group]

    def waiting(self, name: str) -> dict | None:
        """The frame while a planted classifier is audited for the first time; None where its lamps are known."""
        if name in self._seen or name in self.stored:
            return None
        words = f"{name} is asked {len(audit.CHECKS)} questions; this takes about a second."
        return figures.frame([[figures.words(words, title=f"{name}: being audited", w=520)]], words)

    def at(self, name: str, number: int) -> dict:
        """The frame of one classifier with the lamp of one check chosen."""
        checks = {one.number: one for one in self.checks(name)}
        chosen = checks.get(number)
        counts = [sum(one.light == light for one in checks.values()) for light in audit.LIGHTS]
        lights = ", ".join(map("{} {}".format, counts, audit.LIGHTS))
        panels = [self._lamps(name, checks, number, lights)]
        ending = f"In all: {lights} ({html.escape(name)}, {html.escape(self.settings[name])})."
        if chosen is None:
            return figures.frame([panels], f"This audit has no check <b>{number}</b>. {ending}")
        note = f"<b>{number} {chosen.name}</b> is <b>{chosen.light}</b>: {html.escape(chosen.evidence)}."
        if chosen.light == RED:
            note = f"{note} <b>What to do:</b> {html.escape(chosen.advice)}."
        if chosen.picture is None or chosen.picture.finite:
            panels.append(_drawn(chosen))
        else:
            note = f"{note} Some of its numbers are not finite or missing, so they are not drawn."
        return figures.frame([panels], f"{note} {ending}")

    def _lamps(self, name: str, checks: dict[int, Check], number: int, lights: str) -> dict:
        shown = self.numbers(name)
        words = f"number {number} is chosen" if number in shown else f"number {number} is not there"
        return figures.lamps(
            _rows_of(checks.values()),
            chosen=shown.index(number) if number in shown else None,
            title=f"{name}: + passed, {SIGN[RED]} failed, ? not judged (click one)",
            alt=f"Six rows of lamps for {name}: {lights}; {words}.",
        )


def _rows_of(checks: Iterable[Check]) -> list[dict]:
    """The lamps of an audit, one row a group."""
    checks = list(checks)
    rows = []
    for group in GROUPS:
        own = [one for one in checks if one.group == group]
        lamps = [(one.number, SIGN[one.light], PAINT[one.light]) for one in own]
        rows.append(dict(label=group, lamps=lamps))
    return rows


def evidence_of(document: dict, place: int) -> str:
    """What the check of a lamp, by its place among all lamps of `lamps_of`, measured, in words."""
    shown = [
        one for row in GROUPS for one in map(_check_of, document["checks"]) if one.group == row
    ]
    chosen = shown[min(place, len(shown) - 1)]
    words = f"<b>{chosen.number} {chosen.name}</b> is <b>{chosen.light}</b>: {html.escape(chosen.evidence)}."
    if chosen.light != RED:
        return words
    return f"{words} <b>What to do:</b> {html.escape(chosen.advice)}."


def lamps_of(document: dict, title: str) -> dict:
    """The lamps of a stored audit, a document of `diffclass audit --json`, as a panel."""
    checks = [_check_of(row) for row in document["checks"]]
    counts = [sum(one.light == light for one in checks) for light in audit.LIGHTS]
    lights = ", ".join(map("{} {}".format, counts, audit.LIGHTS))
    return figures.lamps(
        _rows_of(checks),
        title=f"{title}: {lights} ({_settings_of(document)})",
        alt=f"Six rows of lamps for {title}: {lights}.",
    )


def _settings_of(document: dict) -> str:
    """What a stored audit was run with, in words: what its document says of it."""
    words = []
    if "images" in document:
        words.append(f"{document['images']} pictures")
    if "epsilon" in document:
        norm = "L∞" if document["norm"] == "linf" else "L2"
        words.append(f"{norm} within {document['epsilon']:g}")
    if "seed" in document:
        words.append(f"seed {document['seed']}")
    return f"stored: {', '.join(words) or 'its settings are not recorded'}"


def _check_of(row: dict) -> Check:
    """A check from what `diffclass audit --json` printed of it."""
    picture = None
    if row["picture"]:
        picture = audit.Picture(**row["picture"])
        lines = {  # JSON has no NaN: what was not measured is null
            name: tuple(math.nan if value is None else value for value in line)
            for name, line in picture.lines.items()
        }
        picture = replace(picture, lines=lines)
    return Check(**{**row, "picture": picture})


def _drawn(result: Check) -> dict:
    """The chosen check's numbers: a curve over numbers, bars over names, else how long it took."""
    title = result.name.replace("_", " ")
    alt = f"What {title} measured: {result.evidence}."
    picture = result.picture
    if picture is None:
        return figures.bars(
            [result.light],
            [1],
            title=title,
            alt=alt,
            colours=[PAINT[result.light]],
            texts=[result.light],
        )
    first, *others = picture.lines.items()
    if isinstance(picture.x[0], str) or len(picture.x) < 2:
        most = max(max(line) for line in picture.lines.values())
        names = _named([first[0], *(name for name, _ in others)])
        return figures.bars(
            picture.x,
            first[1],
            title=f"{title} ({names})",
            alt=alt,
            colours=[COLOURS[0]] * len(picture.x),
            marks=others[0][1] if others else None,
            range=(min(0, *first[1]), most if most > 0 else 1),
            xlabel=picture.xlabel,
            w=420,
            h=260,
        )
    series = [
        dict(y=line, colour=colour, label=label, width=2.2)
        for (label, line), colour in zip(picture.lines.items(), COLOURS, strict=False)
    ]
    return figures.curves(
        picture.x,
        series,
        title=title,
        alt=alt,
        xlabel=picture.xlabel or "image",
        ylabel=picture.ylabel or "value",
        w=420,
        h=260,
    )


def _named(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]}; line: {names[1]}"
