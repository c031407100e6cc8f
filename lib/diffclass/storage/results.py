"""Records: numbers that remember their interval, settings, seed and checkpoint, one line of JSON each.

Every number that a notebook prints comes from a record or is computed in front of the reader. A file of records only
grows; an interrupted write costs at most the record that was being written.
"""

import errno
import hashlib
import json
import math
import os
import re
import warnings
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path

from diffclass.storage import files

SHARE = "share"  # the unit of accuracies: a number in [0,1], shown in percent


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


BEGINNING = b'{"attack": '  # of every line that `Record.append` writes: its keys are sorted
SCHEMA = 2  # of a line; another number is another meaning of the fields
STATISTICS = ("single", "mean", "worst")  # of the draws of a random classifier


@dataclass(frozen=True)
class Record:
    """One measured number.

    metric      what was measured, such as "accuracy"
    world       on which pictures, by the name of a world
    classifier  of which classifier, by its name in the registry
    value       the number; `low` and `high` are its interval at `level`, by `method`, from `n` observations
    settings    everything that was chosen: JSON values only
    seed        of the noise; None where nothing is random
    checkpoint  SHA-256 of the weights (`sha256_of`); None where there are none
    source      who measured it: a command, a notebook, or a paper with its table
    attack      the protocol of the attack, such as "honest-1": the number is an upper bound; None on clean images
    part        the one attack of the protocol that the number is about; None for the worst of all of them
    statistic   "single", or "mean" or "worst" of several draws of a random classifier
    detail      what else tells the number apart, in words for display
    when        UTC, ISO 8601
    unit        "share" for accuracies (shown in percent), else the unit to print
    schema      of these fields
    Errors      ValueError, in one sentence, for whatever cannot be a result: NaN, an interval without its value, a
                share that is not a whole number of n
    """

    metric: str
    world: str
    classifier: str
    value: float
    n: int
    low: float
    high: float
    level: float
    settings: dict
    seed: int | None
    checkpoint: str | None
    source: str
    attack: str | None = None
    part: str | None = None
    statistic: str = "single"
    detail: str = ""
    when: str = field(default_factory=_now)
    unit: str = SHARE
    method: str = "Clopper-Pearson"
    schema: int = SCHEMA

    @property
    def what(self) -> str:
        """The number in words, for display."""
        subject = f"{self.metric} of {self.classifier} on {self.n} images of {self.world}"
        if self.detail:
            subject = f"{subject} ({self.detail})"
        if self.attack is not None:
            budget = self.settings.get("protocol", self.settings)
            size = f", {budget['norm']} {budget['epsilon']:.4g}" if "epsilon" in budget else ""
            bound = "upper bound of the robust " if self.metric == "accuracy" else ""
            subject = f"{bound}{subject} under {self.attack}{size}"
        if self.part is not None:
            subject = f"{subject}, only {self.part}"
        if self.statistic != "single":
            draws = self.settings.get("draws", "several")
            subject = f"{subject}, {self.statistic} of {draws} draws"
        return subject

    def __post_init__(self):
        if self.schema != SCHEMA:
            raise ValueError(
                f"expected a record of schema {SCHEMA}, got {self.schema!r}; it was written by another version."
            )
        unnamed = [
            name
            for name in ("metric", "world", "classifier", "source")
            if not isinstance(getattr(self, name), str) or not getattr(self, name)
        ]
        if unnamed:
            raise ValueError(
                f"expected a record that says what was measured, of what and by whom, got no {' and no '.join(unnamed)}."
            )
        if self.statistic not in STATISTICS:
            raise ValueError(
                f"expected a statistic of {', '.join(STATISTICS)}, got {self.statistic!r}."
            )
        numbers = {k: getattr(self, k) for k in ("value", "low", "high", "level")}
        bad = {k: v for k, v in numbers.items() if isinstance(v, bool) or not _is_finite(v)}
        if bad:
            raise ValueError(
                f"expected finite numbers in a record, got {bad} for the {self.metric}; a failed run is not "
                "a result."
            )
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 1:
            raise ValueError(
                f"expected n, the number of observations, to be a whole number >= 1, got {self.n!r}."
            )
        if not self.low <= self.value <= self.high or not 0 < self.level < 1:
            raise ValueError(
                f"expected low <= value <= high at a level in (0, 1), got {self.low} <= {self.value} <= "
                f"{self.high} at {self.level}; is the interval in percent and the value a share?"
            )
        self._check_share()
        if self.checkpoint is not None and not re.fullmatch("[0-9a-f]{64}", str(self.checkpoint)):
            raise ValueError(
                f"expected the checkpoint as 64 hexadecimal digits, got {self.checkpoint!r}; "
                "use sha256_of."
            )
        try:
            json.dumps(self.settings, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"expected settings of plain JSON values, got {self.settings!r} ({error})."
            ) from error

    def _check_share(self) -> None:
        if self.unit != SHARE:
            return
        if not (0 <= self.low and self.high <= 1):
            raise ValueError(
                f"expected a share in [0,1], got {self.value} [{self.low}, {self.high}]; "
                "divide percent by 100."
            )
        if (
            self.method == "Clopper-Pearson"
            and abs(self.value * self.n - round(self.value * self.n)) > 1e-6
        ):
            raise ValueError(
                f"expected a share that is a whole number of {self.n}, got {self.value} = "
                f"{self.value * self.n:.4f} of {self.n}; is n the number of images it was measured on?"
            )

    def __str__(self) -> str:
        how = f"{100 * self.level:g} % {self.method}"
        if self.unit == SHARE:
            count = (
                f"{round(self.value * self.n)} of {self.n}"
                if self.method == "Clopper-Pearson"
                else f"n = {self.n}"
            )
            return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}] ({count}, {how})"
        return (
            f"{self.value:.4g} {self.unit} [{self.low:.4g}, {self.high:.4g}] (n = {self.n}, {how})"
        )

    def append(self, path) -> Path:
        """Add the record to the file `path` as one line, written in one piece and flushed to the disk.

        Creates the folder. What an interrupted earlier write left at the end of the file is removed, with a warning.
        Errors      those of `check_appendable`, and of `files.append`
        """
        path = Path(path)
        line = json.dumps(asdict(self), allow_nan=False, ensure_ascii=False, sort_keys=True)
        check_appendable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        _mend_end(path)
        files.append(path, line.encode() + b"\n")
        return path


def check_appendable(path) -> None:
    """Raise unless a record can be added to `path`: a new file, or one in which every line is a record.

    Errors      ValueError for a file that holds anything else, which is left as it is, and for a folder or a device;
                OSError for a place that cannot be written to
    """
    path = Path(path)
    files.check_file(path)
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    if nearest != path and not nearest.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(nearest))
    if not os.access(nearest, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(nearest))
    if not path.exists():
        return
    *lines, tail = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            _parse(line)
        except ValueError as error:
            raise ValueError(
                f"expected a file of records to add one to, got {path}, whose line {number} is no record ({error}); nothing "
                "was changed: name another file."
            ) from None
    if tail and not _is_record(tail) and not tail.startswith(BEGINNING):
        raise ValueError(
            f"expected a file of records to add one to, got {path}, which ends in {tail[:40]!r}; nothing was changed: "
            "name another file."
        )


def read(path) -> list[Record]:
    """All records of a file, in order.

    A last line without its end that is no record (an interrupted write) is reported as a warning and left out, so
    that nothing already measured is lost.
    Errors      FileNotFoundError; ValueError naming the line for anything else that is not a record
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"expected records in {path}, found no such file; run the command that measures them."
        )
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(_parse(line))
        except ValueError as error:
            if number < len(lines):  # this line has its end, so it was not an interrupted write
                raise ValueError(
                    f"line {number} of {path} is not a record: {error} The other lines are untouched; "
                    "repair or remove this one."
                ) from error
            warnings.warn(
                f"line {number} of {path} is an interrupted write and was left out; {len(records)} records "
                "before it are complete.",
                stacklevel=2,
            )
    return records


def accuracy_record(
    correct: int,
    n: int,
    *,
    world: str,
    classifier: str,
    source: str,
    metric: str = "accuracy",
    **fields,
) -> Record:
    """The record of `correct` hits among `n` images, with the Clopper-Pearson interval at `level`, 0.95 unless given.

    Shapes      fields: others of `Record`; settings, seed and checkpoint are empty unless given
    """
    from diffclass import (
        intervals,  # here, not above: assets are looked after where scipy is missing
        units,
    )

    correct = units.check_whole(correct, "correct")
    n = units.check_whole(n, "n", most=None)
    if not 0 <= correct <= n or n < 1:
        raise ValueError(f"expected 0 <= correct <= n with n >= 1, got {correct} of {n}.")
    level = fields.pop("level", 0.95)
    low, high = intervals.interval(correct, n, level)
    own = dict(settings={}, seed=None, checkpoint=None)
    return Record(
        metric=metric,
        world=world,
        classifier=classifier,
        value=int(correct) / int(n),
        n=int(n),
        low=float(low),
        high=float(high),
        level=level,
        source=source,
        **{**own, **fields},
    )


def one_checkpoint(weights: dict[str, str]) -> str | None:
    """One name for all weights of a classifier: that of the file, or of the names of several in order."""
    digests = [weights[name] for name in sorted(weights)]
    if len(digests) < 2:
        return digests[0] if digests else None
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def sha256_of(path) -> str:
    """The SHA-256 of a file, in hexadecimal: the name by which a record knows its weights."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_finite(value) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, OverflowError):
        return False


def _parse(line: bytes) -> Record:
    """The record on a line. Errors: ValueError whose text is one sentence."""
    try:
        content = json.loads(line.decode())  # both of their errors are ValueErrors
    except RecursionError:
        raise ValueError("expected the fields of a Record, got brackets without end.") from None
    if not isinstance(content, dict):
        raise ValueError(f"expected the fields of a Record, got {type(content).__name__}.")
    if content.get("schema") != SCHEMA:
        raise ValueError(
            f"expected a record of schema {SCHEMA}, got {content.get('schema', 'one without a schema')!r}; it was written "
            "by another version."
        )
    extra = sorted(set(content) - {f.name for f in fields(Record)})
    if extra:
        raise ValueError(f"expected the fields of a Record, got also {extra}.")
    try:
        return Record(**content)
    except TypeError as error:
        raise ValueError(f"{error}.") from error


def _is_record(line: bytes) -> bool:
    try:
        _parse(line)
    except ValueError:
        return False
    return True


def _mend_end(path: Path) -> None:
    """Make a file of records end with a line end: finish a complete last record, remove half of one."""
    if not path.exists():
        return
    content = path.read_bytes()
    start = content.rfind(b"\n") + 1
    tail = content[start:]
    if not tail:
        return
    if _is_record(tail):
        files.append(path, b"\n")
        return
    files.mend(path, BEGINNING)
    warnings.warn(
        f"{path} ended in an interrupted write of {len(tail)} bytes, which was removed.",
        stacklevel=3,
    )
