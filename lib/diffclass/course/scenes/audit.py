"""Frames of the audit: 36 lamps in six rows, and what the chosen one measured."""

import html
from collections.abc import Iterable, Sequence

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


class AuditScene:
    """The lamps of an honest classifier and four mysteries, audited now, and of stored audits of other classifiers.

    Randomness  that of the planted cases, from their seeds
    """

    def __init__(self, stored: Iterable[dict] = (), count: int = 64):
        faults = {"honest": "honest", **MYSTERIES}
        self.audits: dict[str, list[Check]] = {
            name: list(audit.run(planted.case(fault, count))) for name, fault in faults.items()
        }
        for document in stored:
            name = f"{document['classifier']} on {document['world']}"
            self.audits[name] = [_check_of(row) for row in document["checks"]]

    def numbers(self) -> list[int]:
        """The checks' numbers as their lamps are shown, group by group."""
        return [
            one.number for group in GROUPS for one in self.audits["honest"] if one.group == group
        ]

    def at(self, name: str, number: int) -> dict:
        """The frame of one classifier with the lamp of one check chosen."""
        checks = {one.number: one for one in self.audits[name]}
        chosen = checks[number]
        counts = [sum(one.light == light for one in checks.values()) for light in audit.LIGHTS]
        lights = ", ".join(map("{} {}".format, counts, audit.LIGHTS))
        note = f"<b>{number} {chosen.name}</b> is <b>{chosen.light}</b>: {html.escape(chosen.evidence)}."
        if chosen.light == RED:
            note = f"{note} <b>What to do:</b> {html.escape(chosen.advice)}."
        note = f"{note} In all: {lights}."
        return figures.frame([self._lamps(name, checks, number, lights), _drawn(chosen)], note)

    def _lamps(self, name: str, checks: dict[int, Check], number: int, lights: str) -> dict:
        rows = []
        for group in GROUPS:
            own = [checks[other] for other in self.numbers() if checks[other].group == group]
            lamps = [(one.number, SIGN[one.light], PAINT[one.light]) for one in own]
            rows.append(dict(label=group, lamps=lamps))
        return figures.lamps(
            rows,
            chosen=self.numbers().index(number),
            title=f"{name}: + passed, {SIGN[RED]} failed, ? not judged (click one)",
            alt=f"Six rows of lamps for {name}: {lights}; number {number} is chosen.",
        )


def _check_of(row: dict) -> Check:
    """A check from what `diffclass audit --json` printed of it."""
    picture = audit.Picture(**row["picture"]) if row["picture"] else None
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
