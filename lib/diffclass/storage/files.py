"""Files that are whole or absent: one way to write them, one writer of a folder at a time, one set of settings."""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import filelock

SETTINGS = "settings.json"
OURS = ("*.jsonl", "*.safetensors")  # what runs write into their folders beside the settings


class Busy(RuntimeError):
    """Another run writes to the folder."""


def cache() -> Path:
    """The folder for what can be fetched or made again: DIFFCLASS_CACHE, else ~/.cache/diffclass."""
    named = os.environ.get("DIFFCLASS_CACHE")
    return Path(named or Path.home() / ".cache" / "diffclass").expanduser()


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write(path: Path, content: str | bytes) -> None:
    """Replace a file in one piece: as `write_all` of one file."""
    write_all({path: content})


def write_tensors(path: Path, tensors: dict, header: dict[str, str] | None = None) -> None:
    """Replace a safetensors file in one piece. Errors: those of `write_all`."""
    from safetensors.torch import save  # here, not above: assets are looked after without torch

    write(path, save(tensors, metadata=header))


def write_all(contents: Mapping[Path, str | bytes]) -> None:
    """Replace files, of which none changes before all of them are on the disk: after a failure the old ones are there.

    Writes      beside every file one that ends in .part, flushed to the disk; then each takes the place of its file.
                Text is UTF-8; the target of a link is replaced, not the link; permissions stay
    Errors      ValueError for a path that is something else than a file; OSError that names the file, after which no
                .part is left
    """
    targets = {Path(os.path.realpath(path)): content for path, content in contents.items()}
    partials = {
        target: target.with_name(f".{os.getpid()}-{secrets.token_hex(4)}.part")
        for target in targets
    }
    for target in targets:
        check_file(target)
    path = None
    try:
        for path, partial in partials.items():
            _write_new(partial, targets[path])
            if path.exists():
                shutil.copymode(path, partial)
        for path, partial in partials.items():
            partial.replace(path)
            _flush_folder(path.parent)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)


def check_file(path: Path) -> None:
    """Raise a ValueError for a folder, a device or a pipe in the place of a file; a path that does not exist is right."""
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "a device or a pipe"
        raise ValueError(f"expected a file to write to, got {path}, which is {what}; name a file.")


def _write_new(path: Path, content: str | bytes) -> None:
    encoded = content.encode() if isinstance(content, str) else content
    with open(path, "xb") as file:
        file.write(encoded)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Have the disk remember the new names as well, where the system can be asked for it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def append(path: Path, line: bytes) -> None:
    """Add a line, with its end, to a file in one write that is flushed to the disk; after a failure the file is as it was.

    Errors      ValueError for a path that is something else than a file; OSError that names the file
    """
    check_file(path)
    existed = path.exists()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    before = os.fstat(handle).st_size
    written = 0
    try:
        written = os.write(handle, line)
        if written != len(line):
            raise OSError(
                f"expected to write {len(line)} bytes to {path}, wrote {written}; is the disk full?"
            )
        os.fsync(handle)
    except BaseException as error:
        # Only what was written here: another process may have added a line meanwhile.
        if os.fstat(handle).st_size == before + written:
            os.ftruncate(handle, before)
            if not existed:
                path.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        os.close(handle)


def mend(path: Path, begins: bytes = b'{"') -> None:
    """Remove half a line that an interrupted write left at the end of a file of lines that all begin alike.

    Errors      ValueError for a last line that begins in another way: it is not ours, and stays
    """
    if not path.exists():
        return
    content = path.read_bytes()
    start = content.rfind(b"\n") + 1
    tail = content[start:]
    if not tail:
        return
    if not tail.startswith(begins) and not begins.startswith(tail):
        raise ValueError(
            f"expected a file of lines that begin with {begins.decode()} at {path}, got one that ends in "
            f"{tail[:40]!r}; nothing was changed: it was not written by this course, so name another place."
        )
    os.truncate(path, start)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Whatever a reader raises inside that is no sentence yet becomes one: what it reads is damaged, or of another kind.

    Errors      ValueError in place of KeyError, TypeError, RuntimeError and the like; ValueError, OSError and MemoryError
                pass as they are
    """
    try:
        yield
    except (ValueError, OSError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(
            f"expected {what}, got something that cannot be read as such ({reason}); it is damaged, or of another kind."
        ) from error


def settings_text(settings: dict) -> str:
    """Settings (JSON values) as a folder keeps them."""
    return json.dumps(settings, indent=1, allow_nan=False)


def settings_of(folder: Path) -> dict:
    """The settings that a folder was begun with.

    Errors      FileNotFoundError; ValueError for a file that is not a JSON object
    """
    path = folder / SETTINGS
    try:
        settings = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON in {path}, got a file that is not ({error}).") from None
    if not isinstance(settings, dict):
        raise ValueError(
            f"expected the settings of a run in {path}, got {type(settings).__name__} instead of names with values; "
            "the file was changed by something else."
        )
    return settings


# ---------------------------------------------------------------------------------------------------------------------
# Folders of runs


def settle(folder: Path, chosen: dict, what: str) -> None:
    """Note the settings (JSON values) of `what` in a new folder, or compare them with those it was begun with.

    Errors      ValueError that names the settings which differ, or the files of a folder that no run has begun
    """
    path = folder / SETTINGS
    if not path.exists():
        foreign = sorted(file.name for pattern in OURS for file in folder.glob(pattern))
        if foreign:
            raise ValueError(
                f"expected a new folder for {what}, or one that was begun with {SETTINGS}, but {folder} holds "
                f"{foreign[0]} without it; nothing was changed: name another folder."
            )
        write(path, settings_text(chosen))
    there = settings_of(folder)
    differing = sorted(k for k in chosen | there if chosen.get(k) != there.get(k))
    if differing:
        raise ValueError(
            f"expected {folder} to hold {what} with the same settings, but {differing} differ; "
            "name another folder, or use the settings it was begun with."
        )


@contextlib.contextmanager
def locked(folder: Path, rank: int = 0) -> Iterator[None]:
    """Make the folder, and be the only run that writes the files of process `rank` in it.

    Errors      Busy (a RuntimeError) if another run does
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / f".lock-{rank}", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise Busy(
            f"expected to be the only one that writes to {folder}, but another run holds its lock; wait "
            "for it, or name another folder."
        ) from None
    try:
        yield
    finally:
        lock.release()
