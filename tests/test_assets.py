"""Checksums: a file that is missing, unlisted or changed is named; a file that is right is found."""

import hashlib

import pytest
from diffclass import assets


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
    (shelf / assets.SUMS).write_text(f"{digest} *net.safetensors\n\n")  # binary mode, and an empty line
    assert assets.verified("net.safetensors").exists()


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
    with pytest.raises(ValueError, match=rf"SHA-256 .*, got .* \({len(content)} bytes\); the file was changed"):
        assets.verified("net.safetensors")


def test_a_missing_file_gets_a_sentence(shelf):
    (shelf / "net.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="expected the asset net.* found no such file; .*train digits"):
        assets.verified("net.safetensors")


def test_an_unlisted_file_gets_a_sentence(shelf):
    (shelf / "other.bin").write_bytes(b"?")
    with pytest.raises(FileNotFoundError, match="its line in SHA256SUMS, found the file only"):
        assets.verified("other.bin")


def test_an_empty_folder_lists_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFCLASS_ASSETS", str(tmp_path))
    assert assets.checksums() == {}
    with pytest.raises(FileNotFoundError, match="found no such file"):
        assets.verified("net.safetensors")


def test_without_the_variable_it_is_the_folder_of_the_checkout(monkeypatch):
    monkeypatch.delenv("DIFFCLASS_ASSETS", raising=False)
    assert assets.folder().name == "assets" and (assets.folder().parent / "pyproject.toml").exists()
