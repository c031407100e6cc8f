"""CIFAR-10: found on this machine or downloaded from its official source, and verified every time it is read.

It is read from the folder named by DIFFCLASS_CIFAR10, or from `cifar10/` in the cache (~/.cache/diffclass, or
DIFFCLASS_CACHE), in any of three layouts: the official archive, the official folder `cifar-10-batches-py`, or lossless
WebP tiles with their own SHA256SUMS. Nothing in a data file can run code. CIFAR-100 is read from a local folder alone,
the one that DIFFCLASS_CIFAR100 names: the course has no network for it.
"""

import hashlib
import http.client
import io
import os
import pickle
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffclass import units
from diffclass.storage import files

OFFICIAL_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
ARCHIVE = "cifar-10-python.tar.gz"
BATCHES = "cifar-10-batches-py"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"  # as printed on the official page
BATCH_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
FOLDER_100 = "cifar-100-python"
MD5_100 = {
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
}
URL_100 = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
# a batch is 30 MB; no member larger than 64 MiB is ever held in memory
SIDE, LARGEST_BATCH = (
    32,
    2**26,
)


# ---------------------------------------------------------------------------------------------------------------------
# Where it is


def cifar10_cache() -> Path:
    """The folder that downloads go to: `cifar10` in the cache."""
    return files.cache() / "cifar10"


def _folders() -> list[Path]:
    named = os.environ.get("DIFFCLASS_CIFAR10")
    return ([Path(named).expanduser()] if named else []) + [cifar10_cache()]


def _layout(folder: Path) -> tuple[str, Path] | None:
    """Which of the three layouts lies in a folder, and where; the official files may also be named directly."""
    for batches in (folder / BATCHES, folder):
        if (batches / "test_batch").is_file() or (batches / "data_batch_1").is_file():
            return "batches", batches
    if (folder / "test-labels.npy").is_file() or (folder / "train-labels.npy").is_file():
        return "tiles", folder
    for archive in (folder, folder / ARCHIVE):
        if archive.is_file():
            return "archive", archive
    return None


def _missing() -> str:
    places = " and ".join(str(folder) for folder in _folders())
    return (
        f"expected CIFAR-10 in {places}, found none; run `diffclass download cifar10` once (163 MiB), or put "
        f"{ARCHIVE} from {OFFICIAL_URL} into {cifar10_cache()}, or set DIFFCLASS_CIFAR10 to the folder that "
        "holds it."
    )


def cifar10_available() -> tuple[bool, str]:
    """Whether CIFAR-10 can be read here, and a sentence that says where, or what to do. Reads no picture."""
    what = {
        "batches": "the official batches",
        "tiles": "lossless WebP tiles",
        "archive": "the official archive",
    }
    for folder in _folders():
        if layout := _layout(folder):
            return True, f"CIFAR-10 found in {layout[1]} ({what[layout[0]]})."
    part = cifar10_cache() / (ARCHIVE + ".part")
    begun = (
        f" An interrupted download of {part.stat().st_size >> 20} MiB can be resumed."
        if part.exists()
        else ""
    )
    return False, _missing() + begun


def _verify(content: bytes, name: str, expected: str | None, algorithm: str) -> bytes:
    """The bytes themselves if their checksum holds."""
    got = hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()
    if got != expected:
        raise ValueError(
            f"expected {name} with {algorithm} {expected or 'listed in SHA256SUMS'}, got {got} "
            f"({len(content)} bytes); the file was cut short or altered: replace it with a fresh copy."
        )
    return content


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(
            f"expected {path.name} beside the other CIFAR-10 files in {path.parent}, found no such "
            "file; the copy is incomplete: copy or unpack it again."
        )
    return path.read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# Reading; every reader yields (uint8 images [n,3,32,32], labels [n]) file by file, so that little is decoded


class _ArraysOnly(pickle.Unpickler):
    """Unpickles dicts, lists, bytes and NumPy arrays; every other name in the file is refused, not imported."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")
        return self.ALLOWED[module, name]


def _batch(
    content: bytes, name: str, key: bytes = b"labels", classes: int = 10
) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of one official batch."""
    try:
        batch = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
        images = np.asarray(batch[b"data"])
        labels = np.asarray(batch[key])
    except (
        pickle.UnpicklingError,
        EOFError,
        KeyError,
        TypeError,
        ValueError,
        IndexError,
        AttributeError,
    ) as reason:
        raise ValueError(
            f"expected {name} to be a CIFAR-{classes} batch of plain arrays, got a file that is refused "
            f"({reason}); replace it with a fresh copy."
        ) from reason
    if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != 3 * SIDE**2:
        raise ValueError(
            f"expected {name} to hold uint8 images [N,3072], got {images.dtype} {list(images.shape)}."
        )
    return images.reshape(-1, 3, SIDE, SIDE), _checked_labels(labels, name, len(images), classes)


def _checked_labels(
    labels: np.ndarray, name: str, count: int | None = None, classes: int = 10
) -> np.ndarray:
    good = (
        labels.ndim == 1
        and labels.dtype.kind in "ui"
        and labels.size
        and 0 <= labels.min() <= labels.max() < classes
    )
    if not good or (count is not None and len(labels) != count):
        raise ValueError(
            f"expected {name} to hold {count or 'a list of'} labels from 0 to {classes - 1}, got {labels.dtype} "
            f"of shape {list(labels.shape)}; the file belongs to something else."
        )
    return labels


def _names(split: str) -> list[str]:
    return ["test_batch"] if split == "test" else [f"data_batch_{i}" for i in range(1, 6)]


def _read_batches(folder: Path, split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for name in _names(split):
        yield _batch(_verify(_read(folder / name), name, BATCH_MD5[name], "md5"), name)


def _read_archive(path: Path, split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """One pass, nothing unpacked: the official archive is not in the canonical order, so what comes early is held."""
    names = _names(split)
    held = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                name = member.name.removeprefix(BATCHES + "/")
                if name in names:
                    if not member.isfile() or member.size > LARGEST_BATCH:
                        raise tarfile.TarError(
                            f"{name} is no ordinary file of at most {LARGEST_BATCH >> 20} MiB"
                        )
                    held[name] = _verify(
                        archive.extractfile(member).read(), name, BATCH_MD5[name], "md5"
                    )
                while names and names[0] in held:
                    yield _batch(held.pop(names[0]), names.pop(0))
                if not names:
                    return
            raise tarfile.TarError(f"it holds no {names[0]}")
    except (tarfile.TarError, EOFError, zlib.error, OSError) as reason:
        raise ValueError(
            f"expected {path.name} to be the official CIFAR-10 archive, got {path.stat().st_size} bytes "
            f"that cannot be read ({reason}); delete it and run `diffclass download cifar10`."
        ) from reason


def _read_tiles(folder: Path, split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Lossless WebP sheets of 32x32 tiles, row by row, in the canonical order."""
    from PIL import Image

    lines = (
        line.split(maxsplit=1)
        for line in _read(folder / "SHA256SUMS").decode().splitlines()
        if line.strip()
    )
    sums = {name.lstrip("*").strip(): digest for digest, name in lines}

    def verified(name):
        return io.BytesIO(_verify(_read(folder / name), name, sums.get(name), "sha256"))

    labels = _checked_labels(
        np.load(verified(f"{split}-labels.npy"), allow_pickle=False), f"{split}-labels.npy"
    )
    done = 0
    while done < len(labels):
        name = f"{split}-{done // 1000:02d}.webp"
        # its shape is [rows*32, columns*32, 3]
        sheet = np.asarray(Image.open(verified(name), formats=["WEBP"]).convert("RGB"))
        rows = sheet.shape[0] // SIDE
        columns = sheet.shape[1] // SIDE
        tiles = (
            sheet.reshape(rows, SIDE, columns, SIDE, 3)
            .transpose(0, 2, 4, 1, 3)
            .reshape(-1, 3, SIDE, SIDE)
        )
        expected = min(1000, len(labels) - done)
        if len(tiles) != expected:
            raise ValueError(
                f"expected {expected} tiles in {name}, got {len(tiles)}; the labels belong elsewhere."
            )
        yield tiles, labels[done : done + expected]
        done += expected


def cifar10(
    split: str = "test", limit: int | None = None, download: bool = False, progress: bool = True
) -> tuple[Tensor, Tensor]:
    """CIFAR-10 in its canonical order, so that `limit=512` is the usual "first 512"; only what is needed is decoded.

    Source      Krizhevsky 2009
    Shapes      -> images [N,3,32,32] float32 in [0,1], labels [N] int64 (names in CIFAR10_CLASSES)
    Errors      FileNotFoundError where it is missing (unless `download`); ValueError for altered or truncated files
    """
    from tqdm.auto import tqdm

    if split not in ("train", "test"):
        raise ValueError(f"expected split 'train' or 'test', got {split!r}.")
    if limit is not None and limit < 1:
        raise ValueError(f"expected a limit of at least 1 image, got {limit}; None means all.")
    layout = next(filter(None, map(_layout, _folders())), None)
    if layout is None:
        if not download:
            raise FileNotFoundError(_missing())
        layout = "archive", download_cifar10(progress=progress)
    reader = {"batches": _read_batches, "archive": _read_archive, "tiles": _read_tiles}[layout[0]]
    pieces = []
    have = 0
    with tqdm(
        total=limit, desc=f"CIFAR-10 {split}", unit="image", leave=False, disable=not progress
    ) as bar:
        for images, labels in reader(layout[1], split):
            wanted = len(images) if limit is None else min(len(images), limit - have)
            pieces.append((images[:wanted], labels[:wanted]))
            have += wanted
            bar.update(wanted)
            if have == limit:
                break
    if limit is not None and have < limit:
        raise ValueError(
            f"expected {limit} images of the {split} split, got {have}: it has no more."
        )
    images, labels = (np.concatenate(part) for part in zip(*pieces, strict=True))
    return torch.from_numpy(images).float().div_(255), torch.from_numpy(labels.astype(np.int64))


def cifar100(split: str = "test", limit: int | None = None) -> tuple[Tensor, Tensor]:
    """CIFAR-100 in its canonical order, of the hundred fine classes, from the folder that DIFFCLASS_CIFAR100 names.

    Source      Krizhevsky 2009; the unpacked official folder `cifar-100-python`, or the one that it lies in
    Shapes      -> images [N,3,32,32] float32 in [0,1], labels [N] int64 from 0 to 99
    Errors      FileNotFoundError where it is missing, with what to do; ValueError for an altered file, another split or limit
    """
    split = units.chosen(split, tuple(MD5_100), "the split")
    if limit is not None:
        limit = units.check_whole(limit, "a number of images", least=1)
    named = os.environ.get("DIFFCLASS_CIFAR100")
    if not named:
        raise FileNotFoundError(
            f"expected CIFAR-100 in the folder that DIFFCLASS_CIFAR100 names, which is not set; unpack {URL_100} and set it "
            f"to the folder {FOLDER_100}. The world 'hundred' has as many classes, and needs nothing."
        )
    folder = Path(named).expanduser()
    folder = folder / FOLDER_100 if (folder / FOLDER_100).is_dir() else folder
    if not (folder / split).is_file():
        raise FileNotFoundError(
            f"expected the file {split} of CIFAR-100 in {folder}, found none; unpack {URL_100}, and set DIFFCLASS_CIFAR100 "
            f"to the folder {FOLDER_100}."
        )
    content = _verify((folder / split).read_bytes(), split, MD5_100[split], "md5")
    images, labels = _batch(content, split, b"fine_labels", 100)
    if limit is not None and limit > len(images):
        raise ValueError(
            f"expected {limit} images of the {split} split, got {len(images)}: it has no more."
        )
    chosen = torch.from_numpy(images[:limit]).float().div_(255)
    return chosen, torch.from_numpy(labels[:limit].astype(np.int64))


# ---------------------------------------------------------------------------------------------------------------------
# Downloading


def download_cifar10(
    folder: str | Path | None = None, url: str = OFFICIAL_URL, progress: bool = True
) -> Path:
    """Fetch the official archive; an interrupted download keeps its .part file, and the next call goes on from there.

    Source      https://www.cs.toronto.edu/~kriz/cifar.html, 163 MiB, verified by the MD5 printed there
    Writes      folder/cifar-10-python.tar.gz (`cifar10_cache()` unless named); nothing is unpacked  ->  its path
    Errors      ConnectionError offline or cut off (what was tried, what to do); ValueError for a wrong checksum
    """
    folder = cifar10_cache() if folder is None else Path(folder).expanduser()
    target = folder / ARCHIVE
    part = folder / (ARCHIVE + ".part")
    if target.exists():
        _verify_archive(target)
        return target
    folder.mkdir(parents=True, exist_ok=True)
    try:
        expected = _fetch(url, part, progress)
    except (
        OSError,
        http.client.HTTPException,
    ) as reason:  # refused, no such host, timed out, reset, disk full
        raise _cut_off(url, part, str(reason), folder) from reason
    got = part.stat().st_size
    if expected is not None and got < expected:
        raise _cut_off(url, part, f"the server stopped after {got} of {expected} bytes", folder)
    try:
        _verify_archive(part)
    except ValueError:
        part.unlink()  # a wrong file cannot be resumed into a right one
        raise
    return part.replace(target)


def _fetch(url: str, part: Path, progress: bool) -> int | None:
    """Append what is missing to the .part file; returns the full size, if the server says it."""
    from tqdm.auto import tqdm

    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as reason:
        # nothing lies beyond what we have: complete, or wrong; the checksum tells
        if reason.code == 416 and have:
            return have
        raise
    with response:
        resumed = (
            response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            and response.status == 206
        )
        have = have if resumed else 0  # a server without ranges sends everything again
        length = response.headers.get("Content-Length")
        total = None if length is None else have + int(length)
        bar = tqdm(
            total=total,
            initial=have,
            desc="CIFAR-10",
            unit="B",
            unit_scale=True,
            disable=not progress,
        )
        with bar, open(part, "ab" if resumed else "wb") as file:
            while chunk := response.read(1 << 18):
                file.write(chunk)
                bar.update(len(chunk))
    return total


def _verify_archive(path: Path) -> None:
    with open(path, "rb") as file:
        got = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if got != ARCHIVE_MD5:
        raise ValueError(
            f"expected {path.name} with md5 {ARCHIVE_MD5}, got {got} ({path.stat().st_size} bytes in "
            f"{path.parent}); it is not the official file or was altered: delete it and download again."
        )


def _cut_off(url: str, part: Path, reason: str, folder: Path) -> ConnectionError:
    kept = (
        f"{part.stat().st_size} bytes are kept and the next call resumes"
        if part.exists()
        else "nothing came"
    )
    return ConnectionError(
        f"expected to download CIFAR-10 from {url}, but: {reason}; {kept}. Without internet, put "
        f"{ARCHIVE} from {OFFICIAL_URL} into {folder} by hand, or set DIFFCLASS_CIFAR10 to the "
        "folder that holds it."
    )
