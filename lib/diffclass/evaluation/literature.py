"""What papers and leaderboards publish, each number with its source, how it is known here, and what to know beside it."""

import json
from dataclasses import dataclass, fields
from pathlib import Path

from diffclass import units
from diffclass.storage import assets, files

SCHEMA = 1
PROVENANCES = ("read", "second-hand", "recalled", "recomputed")
STATISTICS = ("single", "mean", "worst")  # of the submissions to a random classifier


@dataclass(frozen=True)
class Claim:
    """One published number.

    table       which claims belong together
    paper       who published it; method: of what, in the paper's words
    metric      such as "robust accuracy"; unit "%", or that of a cost
    threat      {"norm": ..., "epsilon": ...} as printed; None on clean images and for costs. Of certificates the radius
    value       as printed, so accuracies are in percent; n: on how many images, None where it is not said
    protocol    by which attack or certificate
    source      where it stands
    provenance  how it is known here: read; second-hand, in somebody else's text; recalled, and not looked up again;
                recomputed, from the authors' own logs or network
    caveat      what to know before it is compared; entry: the classifier of a registry that it is about, if there is one
    Errors      ValueError, in one sentence, for whatever cannot be a claim
    """

    table: str
    paper: str
    method: str
    metric: str
    threat: dict | None
    value: float
    unit: str
    n: int | None
    statistic: str
    protocol: str
    source: str
    provenance: str
    caveat: str
    entry: str | None

    def __post_init__(self):
        for name in ("table", "paper", "method", "metric", "unit", "protocol", "source"):
            told = getattr(self, name)
            if not isinstance(told, str) or not told:
                raise ValueError(f"expected a claim with a {name}, got {told!r}.")
        units.chosen(self.provenance, PROVENANCES, "the provenance of a claim")
        units.chosen(self.statistic, STATISTICS, "the statistic of a claim")
        value = units.check_number(self.value, "a claim", least=0)
        if self.unit == "%" and value > 100:
            raise ValueError(f"expected at most 100 percent as a claim, got {self.value}.")
        if self.n is not None:
            units.check_whole(self.n, "the images of a claim", least=1, most=None)
        if self.threat is not None and set(self.threat) != {"norm", "epsilon"}:
            raise ValueError(f"expected a norm and an epsilon as a threat, got {self.threat!r}.")

    @property
    def misses(self) -> float:
        """How far the number is from the nearest share of n images, in points; 0 where n is not said, and for costs."""
        if self.n is None or self.unit != "%":
            return 0.0
        images = self.value * self.n / 100
        return abs(images - round(images)) * 100 / self.n


def record_file() -> Path:
    """Where the claims are kept."""
    return assets.folder() / "records" / "literature.json"


def claims() -> list[Claim]:
    """All claims that are kept, in order.

    Errors      FileNotFoundError; ValueError for a file of another schema, or a line that is no claim
    """
    path = record_file()
    if not path.exists():
        raise FileNotFoundError(
            f"expected the numbers of the literature in {path.name}, found no such file; restore it with git."
        )
    with files.reading(f"the claims in {path}"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise ValueError(
                f"expected claims of schema {SCHEMA} in {path.name}, got {content['schema']!r}."
            )
        known = {part.name for part in fields(Claim)}
        odd = [row for row in content["claims"] if set(row) != known]
        if odd:
            raise ValueError(
                f"expected the fields of a claim in {path.name}, got {sorted(set(odd[0]) ^ known)} too many or too few."
            )
        return [Claim(**row) for row in content["claims"]]
