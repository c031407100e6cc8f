"""Folders that runs write into: one writer at a time, one set of settings, files that are whole or absent."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import filelock

SETTINGS = "settings.json"


def write(path: Path, content: str) -> None:
    """Replace a text file in one piece, so that an interruption leaves the old one or the new one."""
    partial = path.with_suffix(f".{os.getpid()}.part")
    partial.write_text(content)
    partial.replace(path)


def settings_of(folder: Path) -> dict:
    """The settings that a folder was begun with. Errors: FileNotFoundError; ValueError for a file that is not JSON."""
    try:
        return json.loads((folder / SETTINGS).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"expected JSON in {folder / SETTINGS}, got a file that is not ({error})."
        ) from None


def settle(folder: Path, chosen: dict, what: str) -> None:
    """Note the settings (JSON values) of `what` in a new folder, or compare them with those it was begun with.

    Errors      ValueError that names the settings which differ
    """
    path = folder / SETTINGS
    if not path.exists():
        write(path, json.dumps(chosen, indent=1, allow_nan=False))
    there = settings_of(folder)
    differing = sorted(k for k in chosen | there if chosen.get(k) != there.get(k))
    if differing:
        raise ValueError(
            f"expected {folder} to hold {what} with the same settings, but {differing} differ; "
            "name another folder, or use the settings it was begun with."
        )


def mend(path: Path) -> None:
    """Remove half a line that an interrupted write left at the end of a file of lines."""
    if path.exists():
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            path.write_bytes(content[: content.rfind(b"\n") + 1])


@contextlib.contextmanager
def locked(folder: Path, rank: int = 0) -> Iterator[None]:
    """Make the folder, and be the only run that writes the files of process `rank` in it.

    Errors      RuntimeError if another run does
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / f".lock-{rank}", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise RuntimeError(
            f"expected to be the only one that writes to {folder}, but another run holds its lock; wait "
            "for it, or name another folder."
        ) from None
    try:
        yield
    finally:
        lock.release()
