"""Files are whole or absent: a failed write leaves the old one, a half line is mended only where it is ours."""

import errno
import os
import stat
import subprocess
import sys

import pytest
import torch
from diffclass.denoisers import nets
from diffclass.storage import files, weights
from safetensors.torch import load_file, save_file


def full(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_text_and_bytes_are_written_as_they_are(tmp_path):
    path = tmp_path / "a.txt"
    for content in ("first µ\nline\n", b"\x00\xff", "", "last\r\n"):
        files.write(path, content)
        expected = content.encode() if isinstance(content, str) else content
        assert path.read_bytes() == expected
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    calls = []
    fsync = os.fsync
    replace = type(tmp_path).replace
    monkeypatch.setattr(os, "fsync", lambda handle: calls.append("fsync") or fsync(handle))
    monkeypatch.setattr(
        type(tmp_path), "replace", lambda *paths: calls.append("replace") or replace(*paths)
    )
    files.write(tmp_path / "a", "content")
    assert calls[:2] == ["fsync", "replace"]


def test_permissions_and_links_stay(tmp_path):
    target = tmp_path / "target"
    target.write_text("old")
    target.chmod(0o640)
    (tmp_path / "link").symlink_to(target)
    files.write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_a_name_as_long_as_names_may_be_is_written(tmp_path):
    path = tmp_path / ("n" * 255)
    files.write(path, "content")
    assert path.read_text() == "content"
    with pytest.raises(OSError) as caught:
        files.write(tmp_path / ("n" * 256), "content")
    assert caught.value.errno == errno.ENAMETOOLONG and len(os.listdir(tmp_path)) == 1


@pytest.mark.parametrize("broken", ["fsync", "replace", "interrupt"])
def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch, broken):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_text(f"old {path.name}")

    def interrupted(*arguments):
        raise KeyboardInterrupt

    if broken == "replace":
        monkeypatch.setattr(type(tmp_path), "replace", full)
    else:
        monkeypatch.setattr(os, "fsync", full if broken == "fsync" else interrupted)
    with pytest.raises(BaseException) as caught:
        files.write_all({path: "new" for path in paths})
    if broken != "interrupt":
        assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(paths[0])
    assert [path.read_text() for path in paths] == ["old a", "old b"]
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    with pytest.raises(BaseException, match=None if broken == "interrupt" else "No space left"):
        files.write(tmp_path / "new", "content")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_several_files_change_only_when_all_are_on_the_disk(tmp_path, monkeypatch):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_text("old")
    fsync = os.fsync
    calls = []

    def second(handle):
        calls.append(handle)
        return full() if len(calls) == 2 else fsync(handle)

    monkeypatch.setattr(os, "fsync", second)
    with pytest.raises(OSError, match="/b"):
        files.write_all({path: "new" for path in paths})
    assert [path.read_text() for path in paths] == ["old", "old"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_write_that_the_system_cuts_off_leaves_the_old_file(tmp_path):
    """A real failure of write(), in a process that may only write small files."""
    code = (
        "import resource, sys; from pathlib import Path; from diffclass.storage import files\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "for call in (lambda p: files.write(p, 'x' * 5000), lambda p: files.append(p, b'x' * 5000)):\n"
        "    try:\n        call(Path(sys.argv[1]))\n"
        "    except OSError as error:\n        print(error)\n"
    )
    (tmp_path / "a").write_text("old")
    command = [sys.executable, "-c", code, tmp_path / "a"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert "File too large" in first and "is the disk full?" in second
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    "write", [lambda path: files.write(path, "x"), lambda p: files.append(p, b"x")]
)
def test_what_is_no_file_is_left_alone(tmp_path, write):
    with pytest.raises(ValueError, match="which is a folder; name a file"):
        write(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="which is a device or a pipe"):
        write(tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert os.path.exists(os.devnull) and not os.path.isfile(os.devnull)


def test_tensors_are_written_as_safetensors_writes_them(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(0, dtype=torch.long)}
    save_file(tensors, tmp_path / "theirs", {"run": "1"})
    files.write_tensors(tmp_path / "ours", tensors, {"run": "1"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert load_file(tmp_path / "ours")["a"].equal(tensors["a"])


def test_weights_in_several_files_change_together(tmp_path, monkeypatch):
    module = torch.nn.Linear(4, 4)
    monkeypatch.setattr(weights, "SHARD_BYTES", 64)
    path = tmp_path / "net.safetensors"
    weights.save_weights(module, {}, path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert sorted(before) == ["net-1-of-2.safetensors", "net-2-of-2.safetensors"]
    torch.nn.init.zeros_(module.weight)
    fsync = os.fsync
    calls = []

    def second(handle):
        calls.append(handle)
        return full() if len(calls) == 2 else fsync(handle)

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "fsync", second)
        weights.save_weights(module, {}, path)
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    weights.save_weights(module, {}, path)
    assert sorted(before) == sorted(os.listdir(tmp_path))
    assert not weights.load_weights(path)[0]["weight"].any()


# ---------------------------------------------------------------------------------------------------------------------
# Lines


@pytest.mark.parametrize("tail", [b"", b'{"index": 3, "los', b'{"in', b"{"])
def test_half_a_line_of_ours_is_removed(tmp_path, tail):
    path = tmp_path / "l.jsonl"
    whole = b'{"index": 1}\n{"index": 2}\n'
    path.write_bytes(whole + tail)
    files.mend(path, b'{"index": ')
    assert path.read_bytes() == whole
    files.mend(tmp_path / "absent")
    assert os.listdir(tmp_path) == ["l.jsonl"]


@pytest.mark.parametrize("content", [b"my only copy", b"a\nb", b'{"index": 1}\nnotes'])
def test_half_a_line_that_is_not_ours_stays(tmp_path, content):
    path = tmp_path / "l.jsonl"
    path.write_bytes(content)
    for begins in (b'{"', b'{"index": '):
        with pytest.raises(ValueError, match="nothing was changed"):
            files.mend(path, begins)
    assert path.read_bytes() == content


def test_a_line_that_another_process_added_meanwhile_stays(tmp_path, monkeypatch):
    path = tmp_path / "l.jsonl"
    path.write_bytes(b"first\n")

    def overtaken(handle):
        with open(path, "ab") as other:
            other.write(b"of another\n")
        full()

    monkeypatch.setattr(os, "fsync", overtaken)
    with pytest.raises(OSError, match="l.jsonl"):
        files.append(path, b"mine\n")
    assert path.read_bytes() == b"first\nmine\nof another\n"


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def test_a_folder_with_files_that_no_run_has_begun_is_left_alone(tmp_path):
    (tmp_path / "rows.jsonl").write_text("of the reader")
    with pytest.raises(ValueError, match="holds rows.jsonl without it; nothing was changed"):
        files.settle(tmp_path, {"a": 1}, "losses")
    assert os.listdir(tmp_path) == ["rows.jsonl"]
    (tmp_path / "rows.jsonl").unlink()
    (tmp_path / "notes.txt").write_text("of the reader")
    files.settle(tmp_path, {"a": 1}, "losses")
    files.settle(tmp_path, {"a": 1}, "losses")
    with pytest.raises(ValueError, match=r"\['a'\] differ"):
        files.settle(tmp_path, {"a": 2}, "losses")


@pytest.mark.parametrize(
    "content, words",
    [
        (b"[1]", "expected the settings of a run in .*, got list"),
        (b"null", "expected the settings of a run in .*, got NoneType"),
        (b"{", "expected JSON in"),
        (b"\xff", "expected JSON in"),
        (b"[" * 100_000, "expected JSON in"),
    ],
)
def test_damaged_settings_get_a_sentence(tmp_path, content, words):
    (tmp_path / files.SETTINGS).write_bytes(content)
    for use in (lambda: files.settings_of(tmp_path), lambda: files.settle(tmp_path, {}, "x")):
        with pytest.raises(ValueError, match=words):
            use()
    assert (tmp_path / files.SETTINGS).read_bytes() == content


def test_a_second_writer_is_refused(tmp_path):
    with files.locked(tmp_path):
        with pytest.raises(files.Busy, match="another run holds its lock"), files.locked(tmp_path):
            pass
        with files.locked(tmp_path, rank=1):
            pass
    with files.locked(tmp_path):
        pass


@pytest.mark.parametrize(
    "error", [KeyError("a"), TypeError("b"), RuntimeError("c"), AttributeError()]
)
def test_whatever_a_reader_raises_becomes_a_sentence(error):
    with pytest.raises(
        ValueError, match=rf"expected a run, .*\({type(error).__name__}.*is damaged"
    ):
        with files.reading("a run"):
            raise error


@pytest.mark.parametrize(
    "error", [ValueError("a"), FileNotFoundError("b"), MemoryError(), SystemExit()]
)
def test_what_is_a_sentence_already_passes_through_reading(error):
    with pytest.raises(type(error)) as caught, files.reading("a run"):
        raise error
    assert caught.value is error


def test_the_checkpoint_of_a_network_survives_a_full_disk(tmp_path, monkeypatch):
    net = nets.SongUNet(size=8, labels=2, augment=0, width=4, multiples=(1,), depth=1, attention=())
    path = tmp_path / "net.safetensors"
    weights.save_weights(net, {"a": 1}, path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="net.safetensors"):
        weights.save_weights(net, {"a": 2}, path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["net.safetensors"]
