"""All pictures of a record as dots: how far the label leads on the clean picture, and on the strongest changed one."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffclass.evaluation import runs
from diffclass.storage import assets


@dataclass(frozen=True)
class Dot:
    """One picture of a record: its place, label, leads in the classifier's scale, and the share of draws that stood."""

    index: int
    label: int
    clean: float
    attacked: float
    standing: float


@dataclass(frozen=True, eq=False)
class Overview:
    """A record of an attack, picture by picture. Shapes: deltas [N,C,H,W]. Units: epsilon in pixels."""

    name: str
    classifier: str
    norm: str
    epsilon: float
    dots: tuple[Dot, ...]
    deltas: Tensor

    def delta(self, index: int) -> Tensor:
        """The stored perturbation of a picture. Shapes: -> [1,C,H,W]."""
        place = [dot.index for dot in self.dots].index(index)
        return self.deltas[place : place + 1]

    @property
    def said(self) -> str:
        """What the record claims, in words."""
        share = sum(dot.standing for dot in self.dots) / len(self.dots)
        norm = "L∞" if self.norm == "linf" else "L2"
        return (
            f"{self.classifier}, honest protocol, {norm} within {self.epsilon:.3g}: {100 * share:.1f} % of "
            f"{len(self.dots)} pictures stand, an upper bound."
        )


def stored(world: str) -> dict[str, Path]:
    """The records of the honest protocol that a world has, name -> folder; flows, which are no added pixels, left out."""
    folder = assets.folder() / "records" / f"{world}-attacks"
    return {
        path.name.replace("-honest", ""): path
        for path in sorted(folder.glob("*-honest-l*"))
        if path.is_dir()
    }


def read(name: str, folder: Path) -> Overview:
    """One record. Errors: those of `runs.read`."""
    run = runs.read(folder)
    draws = run.settings["draws"]
    finished = [row for row in run.rows if row["hits"] is not None]
    dots = tuple(
        Dot(
            row["index"],
            row["label"],
            -row["attacks"][0][1],
            -row["attacks"][row["strongest"]][1],
            row["hits"] / draws,
        )
        for row in finished
    )
    protocol = run.protocol
    deltas = torch.stack([run.deltas[row["index"]] for row in finished])
    return Overview(name, run.settings["classifier"], protocol.norm, protocol.epsilon, dots, deltas)
