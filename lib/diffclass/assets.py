"""The files that travel with the course: where they are, and whether they are still what they were."""

import os
from pathlib import Path

from diffclass.results import sha256_of

SUMS = "SHA256SUMS"


def folder() -> Path:
    """The assets folder: DIFFCLASS_ASSETS if set, else `assets/` of this checkout."""
    return Path(os.environ.get("DIFFCLASS_ASSETS") or Path(__file__).resolve().parents[2] / "assets")


def checksums() -> dict[str, str]:
    """The SHA-256 that each file should have, from `SHA256SUMS` (the format of sha256sum); empty if there is none."""
    return _listed(folder() / SUMS)


def _listed(listing: Path) -> dict[str, str]:
    if not listing.exists():
        return {}
    pairs = (line.split(maxsplit=1) for line in listing.read_text().splitlines() if line.strip())
    return {name.lstrip("*").strip(): digest for digest, name in pairs}


def verified(name: str) -> Path:
    """The path of an asset whose checksum holds.

    Errors      FileNotFoundError if it is missing or unlisted; ValueError if its bytes have changed
    """
    path, wanted = folder() / name, checksums().get(name)
    if not path.exists() or wanted is None:
        raise FileNotFoundError(f"expected the asset {name} in {folder().name}/ and its line in {SUMS}, found "
                                f"{'the file only' if path.exists() else 'no such file'}; check out the repository again, "
                                "or make it with `diffclass train digits`.")
    got = sha256_of(path)
    if got != wanted:
        raise ValueError(f"expected {name} with SHA-256 {wanted[:12]}..., got {got[:12]}... ({path.stat().st_size} bytes); "
                         "the file was changed or its copy cut short: restore it with git, or train it again.")
    return path


def record(names: list[str], target: Path | None = None) -> None:
    """Write the checksums of `names` into `SHA256SUMS` of a folder, keeping the lines of other files."""
    target = target or folder()
    lines = _listed(target / SUMS) | {name: sha256_of(target / name) for name in names}
    (target / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(lines.items())))
