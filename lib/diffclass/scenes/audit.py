"""Frames of the audit: 36 lamps in six rows, and what the chosen one measured."""

import html
from collections.abc import Iterable, Sequence

import numpy as np

from diffclass import audit, figures
from diffclass.audit import AMBER, GREEN, GROUPS, RED, Check, planted
from diffclass.figures import COLOURS

MYSTERIES = {f"mystery {number}": name for number, name in enumerate(
    ("quantised", "noisy", "two-faced", "reseeded"), start=1)}
PAINT, SIGN = {GREEN: COLOURS[2], AMBER: COLOURS[1], RED: COLOURS[4]}, {GREEN: "+", AMBER: "?", RED: "-"}
NAMES = 2  # tiles before the lamps of a row, which the group's name needs
COLUMNS = NAMES + max(sum(one.group == group for one in audit.CHECKS) for group in GROUPS)
SIDE = 13  # pixels of a drawn lamp


def lamp(light: str | None) -> np.ndarray:
    """A disc in the light's colour with its sign, told apart without colour as well; None is empty. Shapes: [S,S,3]."""
    rows, columns = np.mgrid[:SIDE, :SIDE] - SIDE // 2
    image = np.full((SIDE, SIDE, 3), 255, dtype=np.uint8)
    if light is None:
        return image
    colour = PAINT[light]
    image[rows**2 + columns**2 <= (SIDE / 2) ** 2] = [int(colour[i:i + 2], 16) for i in (1, 3, 5)]
    bar = (abs(rows) <= 0) & (abs(columns) <= 3)
    marks = {"-": bar, "+": bar | bar.T, "?": (abs(rows) <= 1) & (abs(columns) <= 1)}
    image[marks[SIGN[light]]] = 255
    return image


class AuditScene:
    """The lamps of an honest classifier and four mysteries, audited now, and of stored audits of other classifiers.

    Randomness  that of the planted cases, from their seeds
    """

    def __init__(self, stored: Iterable[dict] = (), count: int = 64):
        faults = {"honest": "honest", **MYSTERIES}
        self.audits: dict[str, list[Check]] = {
            name: list(audit.run(planted.case(fault, count))) for name, fault in faults.items()}
        for document in stored:
            self.audits[f"{document['defence']} on {document['world']}"] = [
                Check(**{**row, "picture": row["picture"] and audit.Picture(**row["picture"])})
                for row in document["checks"]]

    def row_of(self, tile: int) -> int | None:
        """The number of the check whose lamp is that tile; None for the name of a group or an empty place."""
        made = self.places().get(tile)
        return made and made.number

    def places(self) -> dict[int, Check]:
        """Where each check's lamp is, tile -> check of the honest classifier."""
        return {COLUMNS * row + NAMES + column: made for row, group in enumerate(GROUPS)
                for column, made in enumerate(one for one in self.audits["honest"] if one.group == group)}

    def at(self, name: str, number: int) -> dict:
        """The frame of one classifier with the lamp of one check chosen."""
        made = {one.number: one for one in self.audits[name]}
        chosen, counts = made[number], [sum(one.light == light for one in made.values()) for light in audit.LIGHTS]
        told = ", ".join(map("{} {}".format, counts, audit.LIGHTS))
        todo = f" <b>What to do:</b> {html.escape(chosen.advice)}." if chosen.light == RED else ""
        note = (f"<b>{number} {chosen.name}</b> is <b>{chosen.light}</b>: {html.escape(chosen.evidence)}.{todo} In "
                f"all: {told}.")
        return figures.frame([self._lamps(name, made, number, told), _drawn(chosen)], note)

    def _lamps(self, name: str, made: dict[int, Check], number: int, told: str) -> dict:
        places = {tile: made[one.number] for tile, one in self.places().items()}
        tiles = range(COLUMNS * len(GROUPS))
        captions = [GROUPS[tile // COLUMNS] if tile % COLUMNS == 0 else  # a blank keeps empty tiles as high as others
                    f"{places[tile].number}{SIGN[places[tile].light]}" if tile in places else " " for tile in tiles]
        lit = [places[tile].light if tile in places else None for tile in tiles]
        return figures.tiles([lamp(light) for light in lit], columns=COLUMNS, size=40, captions=captions, pick=True,
                             borders=["#222222" if tile in places and places[tile].number == number else
                                      None if tile in places else "#FFFFFF" for tile in tiles],
                             title=f"36 checks of {name}: + passed, - failed, ? not judged (click one)",
                             alt=f"Six rows of lamps for {name}: {told}; number {number} is chosen.")


def _drawn(made: Check) -> dict:
    """The chosen check's numbers: a curve over numbers, bars over names, else how long it took."""
    title, alt = made.name.replace("_", " "), f"What {made.name.replace('_', ' ')} measured: {made.evidence}."
    picture = made.picture
    if picture is None:
        return figures.bars([made.light], [1], title=title, alt=alt, colours=[PAINT[made.light]], texts=[made.light])
    first, *others = picture.lines.items()
    if isinstance(picture.x[0], str) or len(picture.x) < 2:
        most = max(max(line) for line in picture.lines.values())
        names = _named([first[0], *(name for name, _ in others)])
        return figures.bars(picture.x, first[1], title=f"{title} ({names})", alt=alt,
                            colours=[COLOURS[0]] * len(picture.x), marks=others[0][1] if others else None,
                            range=(min(0, *first[1]), most if most > 0 else 1), xlabel=picture.xlabel, w=420, h=260)
    series = [dict(y=line, colour=colour, label=label, width=2.2)
              for (label, line), colour in zip(picture.lines.items(), COLOURS, strict=False)]
    return figures.curves(picture.x, series, title=title, alt=alt, xlabel=picture.xlabel or "image",
                          ylabel=picture.ylabel or "value", w=420, h=260)


def _named(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]}; line: {names[1]}"
