"""The files that travel with the course: where they are, and whether they are still what they were."""

import functools
import hashlib
import os
import re
from collections.abc import Collection
from pathlib import Path

from diffclass.storage import files
from diffclass.storage.results import sha256_of

SUMS = "SHA256SUMS"


def folder() -> Path:
    """The assets folder: DIFFCLASS_ASSETS if set, else `assets/` of this checkout."""
    return Path(
        os.environ.get("DIFFCLASS_ASSETS") or Path(__file__).resolve().parents[3] / "assets"
    )


def checksums() -> dict[str, str]:
    """The SHA-256 that each file should have, from `SHA256SUMS` (the format of sha256sum); empty if there is none.

    Errors      ValueError for a line that is not a checksum and a name
    """
    return _listed(folder() / SUMS)


def _listed(listing: Path) -> dict[str, str]:
    if not listing.exists():
        return {}
    now = listing.stat()
    return dict(_read(listing, (now.st_ino, now.st_mtime_ns, now.st_size)))


@functools.lru_cache(maxsize=8)
def _read(listing: Path, state: tuple[int, ...]) -> dict[str, str]:
    """The lines of a listing, read once for each state of its file: a list of classifiers asks a thousand times."""
    listed = {}
    # Names that are no UTF-8 keep their bytes, so that the list can be written again as it was.
    text = listing.read_bytes().decode("utf-8", "surrogateescape")
    for line in filter(str.strip, text.split("\n")):
        entry = re.fullmatch(r"([0-9a-f]{64}) [ *](\S.*?)\s*", line)
        if not entry:
            raise ValueError(
                f"expected a SHA-256 and a file name in every line of {listing.name}, got {line[:80]!r}; "
                "the list is damaged: restore it with git."
            )
        listed[entry[2]] = entry[1]
    return listed


def parts(name: str, present: Collection[str]) -> list[str]:
    """The names among `present` that hold an asset: itself, or its parts NAME-1-of-2.safetensors and so on."""
    part = re.compile(rf"{re.escape(Path(name).stem)}-\d+-of-\d+{re.escape(Path(name).suffix)}")
    return [name] if name in present else sorted(filter(part.fullmatch, present))


def whole(file: str) -> str:
    """The asset that a file is, or is a part of."""
    return re.sub(r"-\d+-of-\d+(?=\.\w+$)", "", file)


def fingerprint(name: str) -> str:
    """The SHA-256 that identifies an asset in a record; of several files, that of their checksums in order."""
    listed = checksums()
    digests = [listed[file] for file in parts(name, listed)]
    return (
        digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    )


def verified(name: str) -> Path:
    """The path of an asset whose checksum holds; large weights are several files, NAME-1-of-2.safetensors and so on.

    Errors      FileNotFoundError if a file is missing or unlisted; ValueError if its bytes have changed
    """
    path = folder() / name
    listed = checksums()
    named = parts(name, listed)
    missing = [part for part in named if not (folder() / part).exists()]
    if missing or not named:
        instead = (
            f"no {missing[0]}" if missing else "the file only" if path.exists() else "no such file"
        )
        # weights are named after the world that they were trained on
        world, dash, _ = name.partition("-")
        raise FileNotFoundError(
            f"expected the asset {name} in {folder().name}/ and its line in {SUMS}, found {instead}; "
            "check out the repository again"
            f"{f', or make it with `diffclass train {world}`' if dash else ''}."
        )
    for part in named:
        got = sha256_of(folder() / part)
        if got != listed[part]:
            raise ValueError(
                f"expected {part} with SHA-256 {listed[part][:12]}..., got {got[:12]}... "
                f"({(folder() / part).stat().st_size} bytes); the file was changed or its copy cut short: "
                "restore it with git, or train it again."
            )
    return path


def check_name(name: str) -> None:
    """Raise a ValueError for a file name that a line of `SHA256SUMS` cannot hold."""
    if name != name.strip() or "\n" in name or "\r" in name:
        raise ValueError(
            f"expected a file name without line ends and without spaces around it, got {name!r}; "
            f"a line of {SUMS} could not hold it."
        )


def record(names: list[str], target: Path | None = None) -> None:
    """Write the checksums of `names` into `SHA256SUMS` of a folder, keeping the lines of other files.

    Errors      FileNotFoundError for a name without a file; ValueError for a damaged list, or a name that no line can hold
    """
    target = target or folder()
    lines = _listed(target / SUMS)
    for name in names:
        check_name(name)
        for old in parts(name, lines):
            del lines[old]
        present = parts(name, os.listdir(target))
        if not present:
            raise FileNotFoundError(
                f"expected {name} in {target} to record its checksum, found no such file."
            )
        lines |= {file: sha256_of(target / file) for file in present}
    text = "".join(f"{digest}  {name}\n" for name, digest in sorted(lines.items()))
    files.write(target / SUMS, text.encode("utf-8", "surrogateescape"))
