"""Which smoothing noise is best: certified accuracy by each, by the best of a data set, and by the best of each picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffclass.certify import certificates
from diffclass.certify.anytime import check_alpha
from diffclass.certify.certificates import CertifiedCurve
from diffclass.data.worlds import world_of
from diffclass.evaluation import certification
from diffclass.evaluation.certification import Certification
from diffclass.storage import assets

ALPHA = 0.001  # of the certificates of one picture, all of them together
SAME = ("world", "classifier", "images", "every", "n", "precision")


@dataclass(frozen=True, eq=False)
class SigmaStudy:
    """One classifier's certified accuracy on the same pictures by several smoothing noises; every certificate at alpha / m.

    sigmas          m of them, in pixels, rising
    alpha           the chance that any certificate of a picture is wrong, at most
    each            the curve of every sigma
    of_each_picture the curve where every picture is read by the sigma that certifies it furthest
    """

    classifier: str
    sigmas: tuple[float, ...]
    alpha: float
    each: tuple[CertifiedCurve, ...]
    of_each_picture: CertifiedCurve

    @property
    def radii(self) -> np.ndarray:
        """Where the curves are read. Units: pixels."""
        return self.of_each_picture.radii

    @property
    def accuracy(self) -> np.ndarray:
        """Certified accuracy. Shapes: -> [m,R]."""
        return np.stack([curve.accuracy for curve in self.each])

    @property
    def best(self) -> tuple[float, ...]:
        """For each radius the sigma that certifies most pictures: chosen on the pictures that it is quoted for. Units: pixels."""
        return tuple(
            max(zip(column, self.sigmas, strict=True), key=lambda pair: pair[0])[1]
            for column in self.accuracy.T.tolist()
        )


def study_of(
    runs: Sequence[Certification], radii: Sequence[float], alpha: float = ALPHA
) -> SigmaStudy:
    """What several finished runs of one classifier, at different sigmas, say together.

    Formula     each sigma's certificates at alpha / m, so that the best of a picture's m is wrong with at most alpha
    Meaning     papers print for every radius the best sigma of the data set, chosen after the fact on the same pictures; the
                best of each picture is no less, and needs no such choice, but its alpha is paid by the union bound
    Units       radii: L2, pixels in [0,1]
    Errors      ValueError for fewer than two runs, runs of other pictures or classifiers, unfinished or soft ones, or two
                of one sigma; those of `certified_accuracy`
    """
    alpha = check_alpha(alpha)
    if len(runs) < 2:
        raise ValueError(f"expected runs at two or more sigmas, got {len(runs)}.")
    runs = sorted(runs, key=lambda run: run.plan.sigma_pixel)
    first = runs[0].settings
    for run in runs[1:]:
        other = [name for name in SAME if run.settings[name] != first[name]]
        if other:
            raise ValueError(
                f"expected runs that differ in sigma alone, got another {other[0]}: {first[other[0]]!r} and "
                f"{run.settings[other[0]]!r}."
            )
    for run in runs:
        if run.plan.soft_votes:
            raise ValueError("expected runs of hard votes, got one of soft votes.")
        wanted = len(certification.picked(first["n"], first["every"]))
        if len(run.rows) != wanted:
            raise ValueError(
                f"expected finished runs, got {len(run.rows)} of {wanted} pictures at sigma {run.plan.sigma_pixel:g}."
            )
    share = alpha / len(runs)
    by_sigma = [
        [certificates.smoothing_radius(votes, share, run.plan.bound) for votes in run.votes()]
        for run in runs
    ]
    best = certificates.per_image_best(list(zip(*by_sigma, strict=True)), alpha)
    labels = runs[0].labels
    return SigmaStudy(
        classifier=first["classifier"],
        sigmas=tuple(run.plan.sigma_pixel for run in runs),
        alpha=alpha,
        each=tuple(certificates.certified_accuracy(own, labels, radii) for own in by_sigma),
        of_each_picture=certificates.certified_accuracy(best, labels, radii),
    )


def kept_runs(world: str) -> dict[str, list[Certification]]:
    """The committed runs of a world at several sigmas, by classifier. Errors: ValueError for a world that does not exist."""
    folder: Path = assets.folder() / "records" / f"{world_of(world).kind}-sigmas"
    runs: dict[str, list[Certification]] = {}
    for path in sorted(folder.glob(f"*/{certification.FILE}")):
        run = certification.read(path.parent)
        runs.setdefault(run.settings["classifier"], []).append(run)
    return runs
