"""Checksums: a file that is missing, unlisted or changed is named; a file that is right is found."""

import errno
import hashlib
import os
import sys

import pytest
from diffclass.storage import assets


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """An assets folder with one listed file."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    (folder / "net.safetensors").write_bytes(b"weights")
    monkeypatch.setenv("DIFFCLASS_ASSETS", str(folder))
    assets.record(["net.safetensors"])
    return folder


def test_a_listed_file_is_found(shelf):
    assert assets.verified("net.safetensors") == shelf / "net.safetensors"
    assert assets.checksums() == {"net.safetensors": hashlib.sha256(b"weights").hexdigest()}


def test_the_listing_is_what_sha256sum_reads_and_writes(shelf):
    digest = hashlib.sha256(b"weights").hexdigest()
    assert (shelf / assets.SUMS).read_text() == f"{digest}  net.safetensors\n"
    (shelf / assets.SUMS).write_text(
        f"{digest} *net.safetensors\n\n"
    )  # binary mode, and an empty line
    assert assets.verified("net.safetensors").exists()


def test_the_listing_is_read_again_when_it_changed_and_is_nobody_s_to_change(shelf):
    known = assets.checksums()
    assets.checksums().clear()
    assert assets.checksums() == known
    text = (shelf / assets.SUMS).read_text()
    other = "0" * 64 + text[64:]  # as long as before
    (shelf / "new").write_text(other)
    (shelf / "new").replace(shelf / assets.SUMS)
    assert assets.checksums() == {"net.safetensors": "0" * 64}
    (shelf / assets.SUMS).unlink()
    assert assets.checksums() == {}


def test_recording_keeps_the_other_lines(shelf):
    (shelf / assets.SUMS).write_text((shelf / assets.SUMS).read_text().replace("  ", " *") + " \n")
    (shelf / "b.bin").write_bytes(b"more")
    assets.record(["b.bin"], shelf)
    assert set(assets.checksums()) == {"b.bin", "net.safetensors"}
    (shelf / "net.safetensors").write_bytes(b"trained again")
    assets.record(["net.safetensors"], shelf)
    assert len((shelf / assets.SUMS).read_text().splitlines()) == 2
    assert assets.verified("b.bin") and assets.verified("net.safetensors")


@pytest.mark.parametrize("content", [b"Weights", b"weight", b""])
def test_a_changed_file_gets_a_sentence(shelf, content):
    (shelf / "net.safetensors").write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"SHA-256 .*, got .* \({len(content)} bytes\); the file was changed"
    ):
        assets.verified("net.safetensors")


def test_a_missing_file_gets_a_sentence(shelf):
    (shelf / "net.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"expected the asset net.* found no net.safetensors; .* again\.$"
    ):
        assets.verified("net.safetensors")
    with pytest.raises(
        FileNotFoundError,
        match="expected net.safetensors in .* to record its checksum, found no such",
    ):
        assets.record(["net.safetensors"])
    assert "net.safetensors" in assets.checksums(), "its line stays"


def test_missing_weights_say_which_command_trains_them(shelf):
    with pytest.raises(
        FileNotFoundError, match="found no such file; .*or make it with `diffclass train digits`"
    ):
        assets.verified("digits-net.safetensors")


def test_every_part_of_large_weights_is_verified(shelf):
    for i in (1, 2):
        (shelf / f"digits-large-{i}-of-2.safetensors").write_bytes(b"part %d" % i)
    (shelf / "digits-large-student-1-of-1.safetensors").write_bytes(b"of another network")
    assets.record(["digits-large.safetensors"])
    parts = {"digits-large-1-of-2.safetensors", "digits-large-2-of-2.safetensors"}
    assert set(assets.checksums()) == {"net.safetensors", *parts}
    assert assets.verified("digits-large.safetensors") == shelf / "digits-large.safetensors"
    (shelf / "digits-large-2-of-2.safetensors").write_bytes(b"part two")
    with pytest.raises(ValueError, match="expected digits-large-2-of-2.safetensors with SHA-256"):
        assets.verified("digits-large.safetensors")
    (shelf / "digits-large-2-of-2.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match="found no digits-large-2-of-2.safetensors; .*train digits"
    ):
        assets.verified("digits-large.safetensors")


def test_recording_one_file_forgets_its_former_parts(shelf):
    for i in (1, 2):
        (shelf / f"a-{i}-of-2.safetensors").write_bytes(b"part")
    assets.record(["a.safetensors"])
    for i in (1, 2):
        (shelf / f"a-{i}-of-2.safetensors").unlink()
    (shelf / "a.safetensors").write_bytes(b"whole")
    assets.record(["a.safetensors"])
    assert set(assets.checksums()) == {"net.safetensors", "a.safetensors"}


def test_an_unlisted_file_gets_a_sentence(shelf):
    (shelf / "other.bin").write_bytes(b"?")
    with pytest.raises(FileNotFoundError, match="its line in SHA256SUMS, found the file only"):
        assets.verified("other.bin")


@pytest.mark.parametrize(
    "line", [b"one-word", b"12ab  net.safetensors", b"\xff\xfe\x00", b"0" * 64, b"0" * 64 + b"  "]
)
def test_a_damaged_list_gets_a_sentence(shelf, line):
    with (shelf / assets.SUMS).open("ab") as file:
        file.write(line + b"\n")
    damaged = (
        "expected a SHA-256 and a file name in every line of SHA256SUMS, got .* restore it with git"
    )
    name = "net.safetensors"
    for use in (assets.checksums, lambda: assets.verified(name), lambda: assets.record([name])):
        with pytest.raises(ValueError, match=damaged):
            use()


def test_a_full_disk_leaves_the_list_as_it_was(shelf, monkeypatch):
    before = (shelf / assets.SUMS).read_bytes()
    (shelf / "new.bin").write_bytes(b"new")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="SHA256SUMS"):
        assets.record(["new.bin"])
    assert (shelf / assets.SUMS).read_bytes() == before
    assert sorted(os.listdir(shelf)) == [assets.SUMS, "net.safetensors", "new.bin"]


@pytest.mark.parametrize("name", ["a\nb", " a", "a ", "a\r"])
def test_a_name_that_no_line_can_hold_is_refused(shelf, name):
    before = (shelf / assets.SUMS).read_bytes()
    (shelf / name).write_bytes(b"?")
    with pytest.raises(ValueError, match="expected a file name without line ends"):
        assets.record([name])
    assert (shelf / assets.SUMS).read_bytes() == before


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes there")
def test_names_that_are_no_utf8_keep_their_bytes(shelf):
    odd = os.fsdecode(b"caf\xe9.bin")
    (shelf / odd).write_bytes(b"?")
    assets.record([odd])
    assets.record(["net.safetensors"])
    assert set(assets.checksums()) == {odd, "net.safetensors"}
    assert b"  caf\xe9.bin\n" in (shelf / assets.SUMS).read_bytes()


def test_an_empty_folder_lists_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFCLASS_ASSETS", str(tmp_path))
    assert assets.checksums() == {}
    with pytest.raises(FileNotFoundError, match="found no such file"):
        assets.verified("net.safetensors")


def test_without_the_variable_it_is_the_folder_of_the_checkout(monkeypatch):
    monkeypatch.delenv("DIFFCLASS_ASSETS", raising=False)
    assert assets.folder().name == "assets" and (assets.folder().parent / "pyproject.toml").exists()


def test_a_record_knows_its_weights_by_one_name(shelf):
    """That of the file, or of the checksums of several in order."""
    assert assets.fingerprint("net.safetensors") == hashlib.sha256(b"weights").hexdigest()
    for i in (1, 2):
        (shelf / f"large-{i}-of-2.safetensors").write_bytes(b"part %d" % i)
    assets.record(["large.safetensors"])
    digests = [hashlib.sha256(b"part %d" % i).hexdigest() for i in (1, 2)]
    wanted = hashlib.sha256("".join(digests).encode()).hexdigest()
    assert assets.fingerprint("large.safetensors") == wanted
    assert assets.whole("large-2-of-2.safetensors") == "large.safetensors"
    assert assets.whole("net.safetensors") == "net.safetensors"
