"""The scoreboard: every classifier's numbers side by side, from records alone, and pairs compared on the same pictures."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path

from diffclass import intervals, units
from diffclass.evaluation import costs, literature, runs, tables
from diffclass.evaluation.costs import Cost
from diffclass.evaluation.tables import Column
from diffclass.storage import files
from diffclass.storage.results import Record
from diffclass.zoo import classifiers, noised

WORLDS = ("digits", "cifar10")
NORM = "linf"  # of the budget that the robust columns are about
SIGMA = 0.25  # smoothing noise of the certified columns, pixels
RADII = (0.25, 0.5)  # L2, pixels

MISSING = "not measured"
ABSTAINED = "abstained"
UNBOUNDED = "unbounded"


@dataclass(frozen=True)
class Number:
    """One cell: a number with its interval, or the reason why there is none; never NaN and never infinite.

    value       a share for accuracies, else in the unit of its column; None where there is none
    low, high   the interval, None where the number has none, as a count of FLOP
    n           pictures; reason: "" for a number, else MISSING, ABSTAINED or UNBOUNDED
    source      the command that measured it, and what its record says of it; "" without a number
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    reason: str = MISSING
    source: str = ""

    @classmethod
    def of(cls, record: Record | None) -> "Number":
        """The number of a record: none where there is no record, or where every picture abstained."""
        if record is None:
            return cls()
        source = f"{record.source}: {record.what}"
        if record.settings.get("abstained") == record.n:
            return cls(n=record.n, reason=ABSTAINED, source=source)
        return cls(record.value, record.low, record.high, record.n, "", source)

    @classmethod
    def measured(cls, value: float | None, source: str) -> "Number":
        """A number without an interval: none for None and NaN, and for infinity no bound."""
        if value is None or math.isnan(value):
            return cls(source=source)
        if math.isinf(value):
            return cls(reason=UNBOUNDED, source=source)
        return cls(value, reason="", source=source)


@dataclass(frozen=True)
class Measure:
    """One column of the scoreboard.

    kind        "accuracy" or "cost"; bound: what an accuracy is of the truth, "upper" or "lower", "" for a clean one
    """

    title: str
    kind: str
    bound: str = ""
    unit: str = ""


@dataclass(frozen=True)
class Standing:
    """One classifier and what is known of it: column -> number, for every column of `measures`."""

    name: str
    title: str
    numbers: dict[str, Number]


UNSEEN = (Column("L2, honest", "honest"), Column("L2, honest, worst of 10", "honest", worst=True))
BENT = (Column("bent by a flow", "honest"),)
SPENT = {
    "calls": "calls",
    "parameters": "parameters",
    "flop": "FLOP",
    "seconds": "s",
}


def measures() -> tuple[Measure, ...]:
    """The columns, in order: accuracies at the L-inf budget, under other threats, certified, and costs."""
    robust = [
        Measure(column.title, "accuracy", "" if column.attack == "clean" else "upper")
        for column in (*tables.COLUMNS, *UNSEEN, *BENT)
    ]
    certified = [Measure(_radius_title(radius), "accuracy", "lower") for radius in RADII]
    spent = [Measure(name, "cost", unit=unit) for name, unit in SPENT.items()]
    return (*robust, *certified, *spent)


def _radius_title(radius: float) -> str:
    return f"certified, r = {radius:g}"


def standings(world: str) -> list[Standing]:
    """Every classifier of which something is on record, in the order of the registries.

    Meaning     robust columns are those of `tables.robust_rows` at the world's budgets in L-inf, L2 and flows; certified ones
                those of `tables.certified_rows` at smoothing noise `SIGMA`, of hard votes; costs those of `costs.kept`
    Errors      ValueError for a world without a scoreboard; those of the records
    """
    world = checked_world(world)
    found: dict[str, dict[str, Number]] = {}
    for norm, columns in ((NORM, tables.COLUMNS), ("l2", UNSEEN), ("flow", BENT)):
        for row in tables.robust_rows(world, norm, columns=columns):
            cells = found.setdefault(row.entry.name, {})
            for column, record in zip(columns, row.records, strict=True):
                cells[column.title] = Number.of(record)
            _without_noise(cells, columns, row.records)
    for row in tables.certified_rows(world):
        if row.sigma_pixel != SIGMA or row.soft_votes:
            continue
        cells = found.setdefault(row.name, {})
        for radius in RADII:
            new = Number.of(row.records.get(radius))
            old = cells.get(_radius_title(radius), Number())
            cells[_radius_title(radius)] = max(new, old, key=lambda number: number.n or 0)
        clean = tables.COLUMNS[0].title
        cells.setdefault(clean, Number.of(row.records.get(0.0)))
    about, spent = costs.kept(world)
    for name, cells in found.items():
        cells |= _spent(spent.get(name), about)
    entries = {**classifiers.ENTRIES, **noised.ENTRIES}
    titles = [measure.title for measure in measures()]
    return [
        Standing(name, entry.title, {title: found[name].get(title, Number()) for title in titles})
        for name, entry in entries.items()
        if name in found
    ]


def _without_noise(cells: dict[str, Number], columns: Sequence[Column], records) -> None:
    """Where answers have no noise, the worst of all draws is the one draw there is."""
    for column, record in zip(columns, records, strict=True):
        worst = next((one for one in columns if one.worst and one.attack == column.attack), None)
        if record is not None and worst is not None and record.settings["draws"] == 1:
            cells[worst.title] = Number.of(record)


def checked_world(world: str) -> str:
    """Return a world that has a scoreboard. Errors: ValueError that lists what exists."""
    return units.chosen(world, WORLDS, "a world with a scoreboard")


def _spent(cost: Cost | None, about: dict) -> dict[str, Number]:
    if cost is None:
        return {}
    source = (
        f"{about['source']}: {about['machine']}, {about['device']}, {about['threads']} threads, {about['clock']} time, "
        f"{about['precision']}, load {about['load']}"
    )
    return {
        name: Number.measured(value, source)
        for name, value in asdict(cost).items()
        if name in SPENT
    }


def ranked(rows: Sequence[Standing], title: str) -> list[Standing]:
    """The same rows by one column: the best first, those without a number last, in the order that they came in.

    Errors      ValueError for a column that does not exist
    """
    by_title = {measure.title: measure for measure in measures()}
    measure = by_title[units.chosen(title, tuple(by_title), "a column of the scoreboard")]
    sign = -1 if measure.kind == "accuracy" else 1

    def key(row: Standing) -> tuple[bool, float]:
        value = row.numbers[measure.title].value
        return value is None, 0.0 if value is None else sign * value

    return sorted(rows, key=key)


def spoken(number: Number, measure: Measure) -> str:
    """A cell in words: percent with interval and pictures, a cost with its unit, or the reason why there is no number."""
    if number.value is None:
        return number.reason
    if measure.kind == "cost":
        whole = measure.unit in ("calls", "parameters")
        return f"{number.value:,.0f}" if whole else f"{number.value:.3g} {measure.unit}"
    share = f"{100 * number.value:.1f} [{100 * number.low:.0f}, {100 * number.high:.0f}]"
    return f"{share} ({number.n})"


# ---------------------------------------------------------------------------------------------------------------------
# The same pictures


@dataclass(frozen=True, eq=False)
class Outcome:
    """How often one classifier was right about each picture of a prefix of the test set.

    record      the number of the whole run that it belongs to
    hits        of `draws`, in the order of the pictures; labels: what they show
    images      SHA-256 of the pictures of the whole run
    """

    record: Record
    hits: tuple[int, ...]
    draws: int
    labels: tuple[int, ...]
    images: str

    @property
    def name(self) -> str:
        """Whose."""
        return self.record.classifier

    def shares(self, n: int | None = None, worst: bool = False) -> list[float]:
        """The share of draws that are right, of each of the first n pictures; by `worst` 1 for all of them, else 0."""
        hits = self.hits[:n]
        if worst:
            return [float(hit == self.draws) for hit in hits]
        return [hit / self.draws for hit in hits]

    def first(self, n: int) -> "Outcome":
        """The same on the first n pictures, or on all where there are no more."""
        return replace(self, hits=self.hits[:n], labels=self.labels[:n])

    def number(self, n: int | None = None, worst: bool = False) -> Number:
        """The accuracy on the first n pictures, with its 95 % interval.

        Errors      ValueError for more pictures than there are, or none
        """
        n = units.check_whole(
            len(self.hits) if n is None else n, "pictures", least=1, most=len(self.hits)
        )
        shares = self.shares(n, worst)
        if worst or self.draws == 1:
            low, high = intervals.interval(round(sum(shares)), n)
        else:
            low, high = intervals.mean_interval(shares, self.draws)
        source = f"{self.record.source}: {self.record.what}, its first {n}"
        return Number(math.fsum(shares) / n, low, high, n, "", source)


def outcomes(world: str, title: str, norm: str = NORM) -> dict[str, Outcome]:
    """Classifier -> its outcome, for one column of `tables.COLUMNS`, at the world's budget.

    Errors      ValueError for a world or a column that does not exist, or a record that belongs to no run
    """
    world = checked_world(world)
    column = next(
        (column for column in tables.COLUMNS if column.title == title and not column.worst), None
    )
    if column is None:
        possible = [column.title for column in tables.COLUMNS if not column.worst]
        raise ValueError(f"expected one of the columns {possible}, got {title!r}.")
    stored = {folder: files.settings_of(folder) for folder in tables.folders(world)}
    found = {}
    for row in tables.robust_rows(world, norm, columns=(column,)):
        (record,) = row.records
        run = _run_of(record, stored)
        place = "clean" if column.attack == "clean" else "hits"
        found[row.entry.name] = Outcome(
            record=record,
            hits=tuple(one[place] for one in run.rows),
            draws=run.settings["draws"],
            labels=tuple(one["label"] for one in run.rows),
            images=run.settings["images"],
        )
    return found


def _run_of(record: Record, stored: dict[Path, dict]) -> runs.Run:
    """The run that a record is about: the one of the same settings, alone of all folders read whole."""
    for folder, settings in stored.items():
        if settings == {key: record.settings.get(key) for key in settings}:
            return runs.read(folder)
    raise ValueError(f"expected a run behind {record.what!r}, got none of its settings.")


@dataclass(frozen=True)
class Comparison:
    """Two classifiers on the pictures that both were asked about.

    n           pictures, the common prefix
    difference  share of hits of the first less that of the second, with its 95 % interval by `intervals.paired_interval`
    more, less  pictures that only the first, and only the second stands for certain; None where an answer is random
    p           exact two-sided sign test (McNemar) of these; None likewise
    remark      what is unequal about the two, "" if nothing is
    """

    first: str
    second: str
    n: int
    difference: float
    low: float
    high: float
    more: int | None
    less: int | None
    p: float | None
    remark: str

    @property
    def real(self) -> bool:
        """Whether the interval leaves 0 out."""
        return not self.low <= 0 <= self.high


def compare(first: Outcome, second: Outcome, worst: bool = False) -> Comparison:
    """Compare two outcomes on their common prefix, picture by picture.

    Meaning     `worst`: what stands at every draw; then every picture counts 0 or 1, as it does for answers without noise
    Errors      ValueError for outcomes of other pictures, or of other worlds
    """
    n = min(len(first.hits), len(second.hits))
    same = first.record.world == second.record.world and first.labels[:n] == second.labels[:n]
    if not same or (first.record.n == second.record.n and first.images != second.images):
        raise ValueError(
            f"expected outcomes on prefixes of the same pictures, got {first.record.what!r} and {second.record.what!r}."
        )
    pairs = list(zip(first.shares(n, worst), second.shares(n, worst), strict=True))
    differences = [one - other for one, other in pairs]
    low, high = intervals.paired_interval(differences)
    more = less = p = None
    if worst or first.draws == second.draws == 1:
        more = sum(one > other for one, other in pairs)
        less = sum(one < other for one, other in pairs)
        p = intervals.sign_test(more, less)
    return Comparison(
        first=first.name,
        second=second.name,
        n=n,
        difference=math.fsum(differences) / n,
        low=low,
        high=high,
        more=more,
        less=less,
        p=p,
        remark=_unequal(first, second),
    )


def _unequal(first: Outcome, second: Outcome) -> str:
    """What differs in how the two were measured."""
    keys = (first.record.attack, second.record.attack)
    if keys[0] != keys[1]:
        return f"{first.name} under {keys[0]}, {second.name} under {keys[1]}"
    return ""


def comparisons(found: dict[str, Outcome], worst: bool = False) -> list[Comparison]:
    """Every pair of some outcomes, in their order. Errors: those of `compare`."""
    return [compare(*pair, worst=worst) for pair in combinations(found.values(), 2)]


# ---------------------------------------------------------------------------------------------------------------------
# What has no source


def complaints(world: str) -> list[str]:
    """What is wrong with the scoreboard of a world, one sentence each: a number without a record, a record without a run,
    a run whose rows say something else, a cost without its machine, or nothing that is published beside it.

    Errors      ValueError for a world without a scoreboard
    """
    world = checked_world(world)
    found = []
    for check in (_unmeasured_costs, _unfounded_records, _unsourced_claims):
        try:
            found += check(world)
        except (FileNotFoundError, ValueError) as error:
            found.append(f"{world}: {error}")
    return found


def _unmeasured_costs(world: str) -> list[str]:
    about, spent = costs.kept(world)
    found = [
        f"{world}, costs: the record does not say its {name}."
        for name in ("source", "machine", "device", "clock", "threads", "precision", "load")
        if about.get(name) in (None, "")
    ]
    found += [
        f"{world}, cost of {row.name}: no record; `{costs.SOURCE} --world {world}` measures it."
        for row in standings(world)
        if row.name not in spent
    ]
    return found


def _unfounded_records(world: str) -> list[str]:
    """Records that the rows of their runs do not bear out."""
    stored = {folder: files.settings_of(folder) for folder in tables.folders(world)}
    found = []
    for norm, columns in ((NORM, tables.COLUMNS), ("l2", UNSEEN), ("flow", BENT)):
        for row in tables.robust_rows(world, norm, columns=columns):
            for column, record in zip(columns, row.records, strict=True):
                if record is not None:
                    found += _unlike(world, column, record, stored)
    return found


def _unlike(world: str, column: Column, record: Record, stored) -> list[str]:
    """What the rows of a record's run say else than it does."""
    what = f"{world}, {column.title} of {record.classifier}"
    try:
        run = _run_of(record, stored)
    except ValueError as error:
        return [f"{what}: {error}"]
    place = "clean" if column.attack == "clean" else "hits"
    draws = run.settings["draws"]
    shares = [
        float(row[place] == draws) if column.worst else row[place] / draws for row in run.rows
    ]
    value = math.fsum(shares) / max(1, len(shares))
    if len(shares) != record.n or abs(value - record.value) > 1e-9:
        return [
            f"{what}: the record says {record.value:.4f} of {record.n}, the rows of its run {value:.4f} of {len(shares)}."
        ]
    return []


def _unsourced_claims(world: str) -> list[str]:
    """Whether there is anything published to stand beside a world; each claim has its source, or it would not be read."""
    if world == "cifar10" and not literature.claims():
        return [f"{world}, literature: no claims are on record."]
    return []


def document(world: str) -> dict:
    """The whole scoreboard of a world as strict JSON values: null with a reason where there is no number.

    Errors      those of `standings` and of `literature.claims`
    """
    pairs = {}
    for column in tables.COLUMNS:
        if not column.worst:
            listed = comparisons(outcomes(world, column.title))
            pairs[column.title] = [{**asdict(pair), "real": pair.real} for pair in listed]
    about, _ = costs.kept(world)
    return dict(
        world=world,
        measures=[asdict(measure) for measure in measures()],
        rows=[asdict(row) for row in standings(world)],
        comparisons=pairs,
        costs=about,
        literature=[asdict(claim) for claim in literature.claims()],
        complaints=complaints(world),
    )
