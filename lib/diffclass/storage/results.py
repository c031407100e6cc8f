"""Records: numbers that remember their interval, settings, seed and checkpoint, one line of JSON each.

Every number that a notebook prints comes from a record or is computed in front of the reader. A file of records only
grows; an interrupted write costs at most the record that was being written.
"""

import hashlib
import json
import math
import os
import re
import warnings
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path

SHARE = "share"  # the unit of accuracies: a number in [0,1], shown in percent


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Record:
    """One measured number.

    what        the sentence that the number answers, such as "accuracy of the EDM-weighted classifier on digits"
    value       the number; `low` and `high` are its interval at `level`, by `method`, from `n` observations
    settings    everything that was chosen: JSON values only
    seed        of the noise; None where nothing is random
    checkpoint  SHA-256 of the weights (`sha256_of`); None where there are none
    source      who measured it: a command, a notebook, or a paper with its table
    when        UTC, ISO 8601
    unit        "share" for accuracies (shown in percent), else the unit to print
    Errors      ValueError, in one sentence, for whatever cannot be a result: NaN, an interval without its value, a
                share that is not a whole number of n
    """

    what: str
    value: float
    n: int
    low: float
    high: float
    level: float
    settings: dict
    seed: int | None
    checkpoint: str | None
    source: str
    when: str = field(default_factory=_now)
    unit: str = SHARE
    method: str = "Clopper-Pearson"

    def __post_init__(self):
        if not (self.what and self.source):
            raise ValueError(
                f"expected a record that says what was measured and by whom, got what={self.what!r}, "
                f"source={self.source!r}."
            )
        numbers = {k: getattr(self, k) for k in ("value", "low", "high", "level")}
        bad = {k: v for k, v in numbers.items() if isinstance(v, bool) or not _is_finite(v)}
        if bad:
            raise ValueError(
                f"expected finite numbers in a record, got {bad} for {self.what!r}; a failed run is not "
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
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        line = (
            json.dumps(asdict(self), allow_nan=False, ensure_ascii=False, sort_keys=True).encode()
            + b"\n"
        )
        _mend_end(path)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            written = os.write(handle, line)
            os.fsync(handle)
        finally:
            os.close(handle)
        if written != len(line):
            raise OSError(
                f"expected to write {len(line)} bytes to {path}, wrote {written}; is the disk full?"
            )
        return path


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
    what: str,
    bounds: tuple[float, float],
    *,
    source: str,
    level: float = 0.95,
    settings: dict | None = None,
    seed: int | None = None,
    checkpoint: str | None = None,
) -> Record:
    """The record of `correct` hits among `n` images; `bounds` is `certificates.interval(correct, n, level)`."""
    if not 0 <= correct <= n or n < 1:
        raise ValueError(f"expected 0 <= correct <= n with n >= 1, got {correct} of {n}.")
    low, high = (float(b) for b in bounds)
    return Record(
        what,
        int(correct) / int(n),
        int(n),
        low,
        high,
        level,
        settings or {},
        seed,
        checkpoint,
        source,
    )


def sha256_of(path) -> str:
    """The SHA-256 of a file, in hexadecimal: the name by which a record knows its weights."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_finite(value) -> bool:
    try:
        return math.isfinite(value)
    except TypeError:
        return False


def _parse(line: bytes) -> Record:
    """The record on a line. Errors: ValueError whose text is one sentence."""
    content = json.loads(line.decode())  # both of their errors are ValueErrors
    known = {f.name for f in fields(Record)}
    if not isinstance(content, dict) or not set(content) <= known:
        extra = (
            sorted(set(content) - known) if isinstance(content, dict) else type(content).__name__
        )
        raise ValueError(f"expected the fields of a Record, got also {extra}.")
    try:
        return Record(**content)
    except TypeError as error:
        raise ValueError(f"{error}.") from error


def _mend_end(path: Path) -> None:
    """Make the file end with a line end: finish a complete last record, remove half of one."""
    if not path.exists():
        return
    content = path.read_bytes()
    if not content or content.endswith(b"\n"):
        return
    start = content.rfind(b"\n") + 1
    try:
        _parse(content[start:])
    except ValueError:
        warnings.warn(
            f"{path} ended in an interrupted write of {len(content) - start} bytes, which was removed.",
            stacklevel=3,
        )
        os.truncate(path, start)
        return
    with open(path, "ab") as file:
        file.write(b"\n")
