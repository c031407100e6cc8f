"""Tables of what stands: a row for each classifier of the registry, from the records of the runs in `assets/`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffclass.certify.certificates import CertifiedCurve
from diffclass.data.worlds import world_of
from diffclass.evaluation import certification, claims, sigmas
from diffclass.evaluation.protocols import Protocol
from diffclass.storage import assets
from diffclass.storage.results import Record
from diffclass.zoo import noised
from diffclass.zoo.classifiers import ENTRIES, Entry

DRAWS = Protocol.draws  # of a random classifier, in the columns of the worst


@dataclass(frozen=True)
class Column:
    """One column of a table of robust accuracies.

    attack      "clean", "paper" (the protocol of the classifier's own paper), or "honest"
    worst       whether it counts what stood at every draw, instead of the average draw
    """

    title: str
    attack: str
    worst: bool = False

    def protocol(self, entry: Entry) -> str | None:
        """The name of the protocol whose records belong here, None for clean images."""
        return {"clean": None, "paper": f"paper-{entry.paper}", "honest": "honest"}[self.attack]

    def shows(self, entry: Entry, record: Record) -> bool:
        """Whether a record is the number that this column shows of a classifier."""
        if record.classifier != entry.name or record.metric != "accuracy" or record.part:
            return False
        if self.worst != (record.statistic == "worst"):
            return False
        if self.worst and record.settings["draws"] != DRAWS:
            return False
        own = record.settings["protocol"]["name"] if record.attack else None
        return own == self.protocol(entry)


HONEST = Column("honest", "honest")
COLUMNS = (
    Column("clean", "clean"),
    Column(f"clean, worst of {DRAWS}", "clean", worst=True),
    Column("paper's protocol", "paper"),
    HONEST,
    Column(f"honest, worst of {DRAWS}", "honest", worst=True),
)


@dataclass(frozen=True)
class Row:
    """A classifier and its records, one for each column, None where nothing was measured."""

    entry: Entry
    records: tuple[Record | None, ...]


def folders(world: str) -> list[Path]:
    """The folders of a world's committed runs. Errors: ValueError for a world that does not exist."""
    runs = assets.folder() / "records" / f"{world_of(world).kind}-attacks"
    return sorted(path.parent for path in runs.glob(f"*/{claims.FILE}"))


def robust_rows(
    world: str,
    norm: str,
    epsilon: float | None = None,
    columns: Sequence[Column] = COLUMNS,
) -> list[Row]:
    """What is known of a world's classifiers at a budget, in the order of the registry; without those of no record.

    Units       epsilon: another budget than the world's, in its unit

    Of several records for a cell the newest version of the protocol is shown, and of that the one of the most images.

    Errors      ValueError for a world or norm that does not exist; those of `claims.kept`
    """
    usual = world_of(world).budget(norm)
    budget = usual if epsilon is None else epsilon
    listed = [
        record
        for folder in folders(world)
        for record in claims.kept(folder)
        if _at(record, norm, budget)
    ]
    rows = []
    for entry in ENTRIES.values():
        cells = tuple(_shown(column, entry, listed) for column in columns)
        if any(cells):
            rows.append(Row(entry, cells))
    return rows


def _at(record: Record, norm: str, budget: float) -> bool:
    """Whether a record's run had this budget; clean images are those of the same run."""
    protocol = record.settings["protocol"]
    return (protocol["norm"], protocol["epsilon"]) == (norm, budget)


def _shown(column: Column, entry: Entry, listed: list[Record]) -> Record | None:
    def rank(record: Record) -> tuple[int, int]:
        version = record.settings["protocol"]["version"] if record.attack else 0
        return version, record.n

    fitting = [record for record in listed if column.shows(entry, record)]
    return max(fitting, key=rank, default=None)


def cell(record: Record | None) -> str:
    """An accuracy in percent with its interval and, in brackets, the number of images; empty for None."""
    if record is None:
        return ""
    value = f"{100 * record.value:.1f}"
    return f"{value} [{100 * record.low:.0f}, {100 * record.high:.0f}] ({record.n})"


def robust_table(world: str, norm: str, epsilon: float | None = None) -> list[str]:
    """The lines of a table in Markdown: titles, rule, and a line for each of `robust_rows`. Errors: those of it."""
    titles = ["Classifier", *(column.title for column in COLUMNS)]
    lines = [_line(titles), "|" + "---|" * len(titles)]
    for row in robust_rows(world, norm, epsilon):
        lines.append(_line([row.entry.title, *map(cell, row.records)]))
    return lines


THREATS = (("L-inf", "linf"), ("L2", "l2"), ("bent by a flow", "flow"))  # title, norm


def threats_table(world: str) -> list[str]:
    """The lines of a table in Markdown: what each classifier was made against, and what is left of it under every threat.

    Meaning     the world's budgets, the average draw; classifiers of which two threats at least are on record
    Errors      those of `robust_rows`
    """
    found: dict[str, dict[str, Record]] = {}
    for title, norm in THREATS:
        for row in robust_rows(world, norm, columns=(HONEST,)):
            found.setdefault(row.entry.name, {})[title] = row.records[0]
    titles = [title for title, _ in THREATS]
    lines = [_line(["Classifier", "made against", *titles]), "|" + "---|" * (2 + len(titles))]
    for name, entry in ENTRIES.items():
        known = found.get(name, {})
        if len(known) > 1:
            cells = [cell(known.get(title)) for title in titles]
            lines.append(_line([entry.title, entry.against, *cells]))
    return lines


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


# ---------------------------------------------------------------------------------------------------------------------
# Certificates


@dataclass(frozen=True)
class CertifiedRow:
    """A smoothed classifier and its certified accuracies, by radius; None where its votes cannot certify the radius.

    name            in the registry; soft_votes: whether its votes are probabilities
    votes, calls    counted on one picture, and the network calls that they took, both on average
    """

    name: str
    title: str
    soft_votes: bool
    sigma_pixel: float
    ceiling: float
    votes: float
    calls: float
    records: dict[float, Record | None]


def certified_folders(world: str) -> list[Path]:
    """The folders of a world's committed certification runs. Errors: ValueError for a world that does not exist."""
    runs = assets.folder() / "records" / f"{world_of(world).kind}-certified"
    return sorted(path.parent for path in runs.glob(f"*/{certification.FILE}"))


def certified_rows(world: str) -> list[CertifiedRow]:
    """What is certified in a world: by smoothing noise, then in the order of the tables of classifiers.

    Errors      ValueError for a world that does not exist; those of `certification.kept`
    """
    order = noised.all_names(world)
    placed = []
    for folder in certified_folders(world):
        listed = certification.kept(folder)
        settings = listed[0].settings
        plan = certification.Plan.of_json(settings["plan"])
        name = listed[0].classifier
        by_radius = {
            record.settings["radius"]: record if _reachable(record, plan) else None
            for record in listed
        }
        row = CertifiedRow(
            name=name,
            soft_votes=plan.soft_votes,
            title=noised.entry_of(world, name).title + (", soft votes" if plan.soft_votes else ""),
            sigma_pixel=plan.sigma_pixel,
            ceiling=plan.ceiling,
            votes=settings["votes per image"],
            calls=settings["calls per image"],
            records=by_radius,
        )
        placed.append(((plan.sigma_pixel, order.index(name), -listed[0].n), row))
    return [row for _, row in sorted(placed, key=lambda pair: pair[0])]


def _reachable(record: Record, plan: certification.Plan) -> bool:
    return record.settings["radius"] <= plan.ceiling


def certified_table(world: str) -> list[str]:
    """The lines of a table in Markdown: titles, rule, and a line for each of `certified_rows`. Errors: those of it."""
    rows = certified_rows(world)
    radii = sorted({radius for row in rows for radius in row.records})
    titles = ["Classifier", "sigma", *(f"r = {radius:g}" for radius in radii), "votes", "calls"]
    lines = [_line(titles), "|" + "---|" * len(titles)]
    for row in rows:
        cells = [_certified_cell(row, radius) for radius in radii]
        spent = [f"{row.votes:.0f}", f"{row.calls:.0f}"]
        lines.append(_line([row.title, f"{row.sigma_pixel:g}", *cells, *spent]))
    return lines


def _certified_cell(row: CertifiedRow, radius: float) -> str:
    """A certified accuracy; a dash where so many votes cannot certify the radius, empty where it was not asked for."""
    if radius in row.records and row.records[radius] is None:
        return "–"
    return cell(row.records.get(radius))


def sigmas_table(world: str) -> list[str]:
    """The lines of a table in Markdown: certified accuracy by each smoothing noise, by the best one of the data set and by
    the best one of each picture. Errors: ValueError for a world that does not exist; those of `sigmas.study_of`
    """
    lines = []
    for name, runs in sigmas.kept_runs(world).items():
        study = sigmas.study_of(runs, (0.0, *runs[0].plan.radii))
        if not lines:
            titles = ["Classifier", "sigma", *(f"r = {radius:g}" for radius in study.radii)]
            lines = [_line(titles), "|" + "---|" * len(titles)]
        title = noised.entry_of(world, name).title
        ceilings = [run.plan.ceiling for run in sorted(runs, key=lambda run: run.plan.sigma_pixel)]
        for sigma, ceiling, curve in zip(study.sigmas, ceilings, study.each, strict=True):
            lines.append(_line([title, f"{sigma:g}", *_shares(curve, ceiling)]))
        best = [
            f"{100 * share:.1f} (sigma {sigma:g})" if share else "0.0"
            for share, sigma in zip(study.accuracy.max(0), study.best, strict=True)
        ]
        lines.append(_line([title, "best of the data set", *best]))
        lines.append(
            _line([title, "best of each picture", *_shares(study.of_each_picture, max(ceilings))])
        )
    return lines


def _shares(curve: CertifiedCurve, ceiling: float) -> list[str]:
    """Accuracies in percent with intervals and the number of pictures; a dash beyond the ceiling of the votes."""
    ends = zip(curve.radii, curve.accuracy, curve.low, curve.high, strict=True)
    return [
        f"{100 * share:.1f} [{100 * low:.0f}, {100 * high:.0f}] ({curve.n})"
        if radius <= ceiling
        else "–"
        for radius, share, low, high in ends
    ]
