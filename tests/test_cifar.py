"""CIFAR-10 in its three layouts, small ones made here, the damage that can befall them, and the download."""

import hashlib
import io
import os
import pickle
import socket
import struct
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from diffclass.data import cifar

NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
COUNT = 8  # images in each small batch
REAL = os.environ.get("DIFFCLASS_CIFAR10")


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """No data folder and an empty cache: a test sees only what it makes."""
    monkeypatch.delenv("DIFFCLASS_CIFAR10", raising=False)
    monkeypatch.setenv("DIFFCLASS_CACHE", str(tmp_path / "cache"))


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes as Python 2 did, which is how the official batches were made."""

    def save_old_string(self, text):
        content = text.encode("latin1") if isinstance(text, str) else text
        self.write(b"T" + struct.pack("<i", len(content)) + content)

    dispatch = {**pickle._Pickler.dispatch, bytes: save_old_string, str: save_old_string}


def pickled(value) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def pictures(name):
    """Random pictures and labels, different for every batch."""
    rng = np.random.default_rng(NAMES.index(name))
    return rng.integers(0, 256, (COUNT, 3, 32, 32), dtype=np.uint8), rng.integers(0, 10, COUNT)


def of_split(split):
    images, labels = zip(*map(pictures, NAMES[5:] if split == "test" else NAMES[:5]), strict=True)
    return torch.from_numpy(np.concatenate(images)).float() / 255, torch.from_numpy(
        np.concatenate(labels)
    )


def write_batches(folder, monkeypatch) -> Path:
    folder = folder / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in NAMES:
        images, labels = pictures(name)
        content = pickled(
            {"batch_label": name, "labels": labels.tolist(), "data": images.reshape(COUNT, -1)}
        )
        (folder / name).write_bytes(content)
        monkeypatch.setitem(cifar.BATCH_MD5, name, hashlib.md5(content).hexdigest())
    return folder


def write_archive(folder, monkeypatch) -> Path:
    batches = write_batches(folder / "unpacked", monkeypatch)
    with tarfile.open(folder / cifar.ARCHIVE, "w:gz") as archive:
        for name in reversed(NAMES):
            archive.add(batches / name, f"cifar-10-batches-py/{name}")
    monkeypatch.setattr(
        cifar, "ARCHIVE_MD5", hashlib.md5((folder / cifar.ARCHIVE).read_bytes()).hexdigest()
    )
    return folder / cifar.ARCHIVE


def write_sums(folder):
    files = sorted(path for path in folder.iterdir() if path.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (folder / "SHA256SUMS").write_text("".join(lines))


def write_tiles(folder, monkeypatch) -> Path:
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        images, labels = of_split(split)
        tiles = (
            images.mul(255).round().byte().numpy().reshape(-1, COUNT, 3, 32, 32)
        )  # [rows,columns,3,32,32]
        sheet = tiles.transpose(0, 3, 1, 4, 2).reshape(len(tiles) * 32, COUNT * 32, 3)
        Image.fromarray(sheet).save(folder / f"{split}-00.webp", lossless=True, exact=True)
        np.save(folder / f"{split}-labels.npy", labels.numpy().astype(np.uint8))
    write_sums(folder)
    return folder


WRITERS = {"batches": write_batches, "archive": write_archive, "tiles": write_tiles}
every_layout = pytest.mark.parametrize("layout", WRITERS)


@pytest.fixture
def home(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv("DIFFCLASS_CIFAR10", str(folder))
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@every_layout
@pytest.mark.parametrize(
    "split, limit", [("test", None), ("train", None), ("train", 2 * COUNT + 3), ("test", 3)]
)
def test_every_layout_gives_the_same_pictures(home, monkeypatch, layout, split, limit):
    WRITERS[layout](home, monkeypatch)
    images, labels = cifar.cifar10(split, limit, progress=False)
    expected_images, expected_labels = of_split(split)
    assert images.dtype == torch.float32 and labels.dtype == torch.int64
    assert torch.equal(images, expected_images[:limit]) and torch.equal(
        labels, expected_labels[:limit]
    )
    assert cifar.cifar10_available()[0] and str(home) in cifar.cifar10_available()[1]


@every_layout
def test_the_official_files_may_be_named_directly_or_lie_in_the_cache(
    tmp_path, monkeypatch, layout
):
    cifar.cifar10_cache().mkdir(parents=True)
    place = WRITERS[layout](cifar.cifar10_cache(), monkeypatch)
    assert len(cifar.cifar10(limit=2, progress=False)[0]) == 2  # read from the cache
    monkeypatch.setenv("DIFFCLASS_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("DIFFCLASS_CIFAR10", str(place))
    assert len(cifar.cifar10(limit=2, progress=False)[0]) == 2


def test_only_the_files_that_are_needed_are_read(home, monkeypatch):
    folder = write_batches(home, monkeypatch)
    (folder / "data_batch_2").unlink()
    assert len(cifar.cifar10("train", COUNT, progress=False)[0]) == COUNT
    with pytest.raises(FileNotFoundError, match="data_batch_2"):
        cifar.cifar10("train", COUNT + 1, progress=False)


def test_sheets_of_a_thousand_follow_each_other(home):
    from PIL import Image

    rng = np.random.default_rng(0)
    images = np.repeat(
        np.repeat(rng.integers(0, 256, (1003, 3, 1, 1), dtype=np.uint8), 32, 2), 32, 3
    )
    for sheet, (rows, columns, part) in enumerate([(25, 40, images[:1000]), (1, 3, images[1000:])]):
        tiles = (
            part.reshape(rows, columns, 3, 32, 32)
            .transpose(0, 3, 1, 4, 2)
            .reshape(rows * 32, columns * 32, 3)
        )
        Image.fromarray(tiles).save(
            home / f"test-{sheet:02d}.webp", lossless=True, exact=True, method=0
        )
    np.save(home / "test-labels.npy", (np.arange(1003) % 10).astype(np.uint8))
    write_sums(home)
    images_read, labels = cifar.cifar10(progress=False)
    assert (
        torch.equal((images_read * 255).round().byte(), torch.from_numpy(images))
        and labels[-1] == 2
    )


def test_missing_data_say_what_to_do(home):
    available, sentence = cifar.cifar10_available()
    with pytest.raises(FileNotFoundError) as caught:
        cifar.cifar10(progress=False)
    for text in (sentence, str(caught.value)):
        for word in (
            str(home),
            str(cifar.cifar10_cache()),
            cifar.OFFICIAL_URL,
            "DIFFCLASS_CIFAR10",
        ):
            assert word in text
    assert not available


@pytest.mark.parametrize("arguments", [dict(split="validation"), dict(limit=0)])
def test_wrong_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="expected"):
        cifar.cifar10(**arguments)


def test_asking_for_more_than_there_is_is_refused(home, monkeypatch):
    write_batches(home, monkeypatch)
    with pytest.raises(ValueError, match=f"expected {COUNT + 1} images"):
        cifar.cifar10(limit=COUNT + 1, progress=False)


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 12] ^= (
        1  # in the archive: inside the first of six members, the test batch
    )
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 12])


@pytest.mark.parametrize("damage", [flip, cut])
@pytest.mark.parametrize(
    "layout, file",
    [
        ("batches", "cifar-10-batches-py/test_batch"),
        ("archive", cifar.ARCHIVE),
        ("tiles", "test-00.webp"),
        ("tiles", "test-labels.npy"),
    ],
)
def test_damaged_files_are_named_and_refused(home, monkeypatch, damage, layout, file):
    WRITERS[layout](home, monkeypatch)
    damage(home / file)
    with pytest.raises(ValueError, match=rf"expected .*({Path(file).name}|test_batch).* got "):
        cifar.cifar10(progress=False)


def test_unlisted_or_missing_tiles_are_refused(home, monkeypatch):
    write_tiles(home, monkeypatch)
    sums = (home / "SHA256SUMS").read_text()
    (home / "SHA256SUMS").write_text(
        "".join(line for line in sums.splitlines(True) if "test-00" not in line)
    )
    with pytest.raises(ValueError, match="test-00.webp with sha256 listed in SHA256SUMS"):
        cifar.cifar10(progress=False)
    (home / "SHA256SUMS").unlink()
    with pytest.raises(FileNotFoundError, match="SHA256SUMS"):
        cifar.cifar10(progress=False)


def test_labels_of_other_pictures_are_refused(home, monkeypatch):
    write_tiles(home, monkeypatch)
    for labels, message in (
        (np.zeros(3, np.uint8), "expected 3 tiles"),
        (np.full(COUNT, 10, np.uint8), "0 to 9"),
    ):
        np.save(home / "test-labels.npy", labels)
        write_sums(home)
        with pytest.raises(ValueError, match=message):
            cifar.cifar10(progress=False)


class Payload:
    """Unpickled by an ordinary unpickler, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_malicious_pickle_runs_nothing(home, tmp_path, monkeypatch, protocol):
    folder = write_batches(home, monkeypatch)
    victim = tmp_path / "victim"
    content = pickle.dumps({b"data": Payload(str(victim)), b"labels": []}, protocol=protocol)
    (folder / "test_batch").write_bytes(content)
    monkeypatch.setitem(
        cifar.BATCH_MD5, "test_batch", hashlib.md5(content).hexdigest()
    )  # the worst case: md5 forged
    with pytest.raises(ValueError, match=r"refused .*mkdir|refused .*_codecs"):
        cifar.cifar10(progress=False)
    assert not victim.exists()
    pickle.loads(content)
    assert victim.exists()  # the payload was live


@pytest.mark.parametrize(
    "value",
    [
        {"data": np.zeros((2, 5), np.uint8), "labels": [0, 0]},
        {"data": np.zeros((2, 3072), np.uint8), "labels": [0]},
        {"labels": [0]},
        [1, 2],
    ],
)
def test_a_pickle_of_something_else_is_refused(home, monkeypatch, value):
    folder = write_batches(home, monkeypatch)
    content = pickled(value)
    (folder / "test_batch").write_bytes(content)
    monkeypatch.setitem(cifar.BATCH_MD5, "test_batch", hashlib.md5(content).hexdigest())
    with pytest.raises(ValueError, match="expected test_batch to"):
        cifar.cifar10(progress=False)


def test_an_archive_without_the_batch_is_refused(home):
    with tarfile.open(home / cifar.ARCHIVE, "w:gz"):
        pass
    with pytest.raises(ValueError, match="it holds no test_batch"):
        cifar.cifar10(progress=False)


def test_an_archive_member_that_is_a_link_is_refused(home):
    with tarfile.open(home / cifar.ARCHIVE, "w:gz") as archive:
        link = tarfile.TarInfo("cifar-10-batches-py/test_batch")
        link.type = tarfile.SYMTYPE
        link.linkname = "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(ValueError, match="no ordinary file"):
        cifar.cifar10(progress=False)


# ---------------------------------------------------------------------------------------------------------------------
# Download


class RangeHandler(BaseHTTPRequestHandler):
    """Serves `server.content` with ranges; `server.stop_after` closes the line early, `server.ranges` logs requests."""

    def do_GET(self):
        content = self.server.content
        wanted = self.headers.get("Range")
        self.server.ranges.append(wanted)
        start = (
            int(wanted.removeprefix("bytes=").rstrip("-"))
            if wanted and self.server.knows_ranges
            else 0
        )
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][: self.server.stop_after])
        self.close_connection = True

    def log_message(self, *_):
        """Quiet."""


@pytest.fixture
def server(tmp_path, monkeypatch):
    (tmp_path / "origin").mkdir()
    archive = write_archive(tmp_path / "origin", monkeypatch)
    with ThreadingHTTPServer(("127.0.0.1", 0), RangeHandler) as server:
        server.content = archive.read_bytes()
        server.stop_after = None
        server.ranges = []
        server.knows_ranges = True
        server.url = f"http://127.0.0.1:{server.server_port}/{cifar.ARCHIVE}"
        thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def interrupted(server, tmp_path):
    """A download that breaks half way; returns the .part file."""
    server.stop_after = len(server.content) // 2
    with pytest.raises(
        ConnectionError, match=f"{server.stop_after} bytes are kept and the next call resumes"
    ):
        cifar.download_cifar10(tmp_path / "new", server.url, progress=False)
    server.stop_after = None
    return tmp_path / "new" / (cifar.ARCHIVE + ".part")


def test_download_then_read(server, monkeypatch):
    monkeypatch.setattr(cifar.download_cifar10, "__defaults__", (None, server.url, True))
    images, _ = cifar.cifar10(download=True, progress=False)
    assert torch.equal(images, of_split("test")[0])
    assert cifar.download_cifar10(progress=False).parent == cifar.cifar10_cache()
    assert server.ranges == [None]  # a complete archive is verified, not fetched again


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_an_interrupted_download_resumes(server, tmp_path, knows_ranges):
    server.knows_ranges = knows_ranges
    part = interrupted(server, tmp_path)
    half = part.stat().st_size
    target = cifar.download_cifar10(tmp_path / "new", server.url, progress=False)
    assert target.read_bytes() == server.content and not part.exists()
    assert 0 < half < len(server.content) and server.ranges == [None, f"bytes={half}-"]


def test_a_complete_part_is_only_verified(server, tmp_path):
    part = interrupted(server, tmp_path)
    part.write_bytes(server.content)
    assert (
        cifar.download_cifar10(tmp_path / "new", server.url, progress=False).read_bytes()
        == server.content
    )


def test_an_interrupted_download_is_mentioned(server, tmp_path, monkeypatch):
    interrupted(server, tmp_path).parent.rename(tmp_path / "cifar10")
    monkeypatch.setenv("DIFFCLASS_CACHE", str(tmp_path))
    assert "can be resumed" in cifar.cifar10_available()[1]


def test_a_wrong_checksum_is_refused_and_not_resumed(server, tmp_path):
    server.content = b"x" * len(server.content)
    with pytest.raises(ValueError, match=f"with md5 {cifar.ARCHIVE_MD5}, got "):
        cifar.download_cifar10(tmp_path / "new", server.url, progress=False)
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "new" / cifar.ARCHIVE).write_bytes(b"something else")
    with pytest.raises(ValueError, match="delete it and download again"):
        cifar.download_cifar10(tmp_path / "new", server.url, progress=False)


def test_offline_says_what_to_do(tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/{cifar.ARCHIVE}"  # bound, but nobody listens
        with pytest.raises(ConnectionError) as caught:
            cifar.download_cifar10(tmp_path, url, progress=False)
    for word in (url, cifar.OFFICIAL_URL, str(tmp_path), "by hand", "DIFFCLASS_CIFAR10"):
        assert word in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# The real thing, where there is one


@pytest.mark.skipif(
    not REAL, reason="set DIFFCLASS_CIFAR10 to a folder with CIFAR-10 to test the real files"
)
def test_the_real_files(monkeypatch):
    monkeypatch.setenv("DIFFCLASS_CIFAR10", REAL or "")
    images, labels = cifar.cifar10("test", progress=False)
    assert images.shape == (10_000, 3, 32, 32) and torch.bincount(labels).tolist() == [1000] * 10
    assert [cifar.CIFAR10_CLASSES[k] for k in labels[:5]] == [
        "cat",
        "ship",
        "ship",
        "airplane",
        "frog",
    ]
    images, labels = cifar.cifar10("train", 10_000, progress=False)
    assert labels[:5].tolist() == [
        6,
        9,
        9,
        4,
        1,
    ]  # the published means and deviations are those of all 50 000
    assert torch.allclose(
        images.mean((0, 2, 3)), torch.tensor([0.4914, 0.4822, 0.4465]), atol=0.005
    )
    assert torch.allclose(images.std((0, 2, 3)), torch.tensor([0.2470, 0.2435, 0.2616]), atol=0.005)


# ---------------------------------------------------------------------------------------------------------------------
# CIFAR-100: a local folder, or a sentence


def write_hundred(folder, monkeypatch, labels=None, key="fine_labels"):
    """A small CIFAR-100 whose checksums are taken for the official ones."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (COUNT, 3072), dtype=np.uint8)
    labels = rng.integers(0, 100, COUNT).tolist() if labels is None else labels
    folder = folder / cifar.FOLDER_100
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        content = pickled({key: labels, "coarse_labels": [0] * COUNT, "data": images})
        (folder / split).write_bytes(content)
        monkeypatch.setitem(cifar.MD5_100, split, hashlib.md5(content).hexdigest())
    return folder, torch.from_numpy(images).reshape(-1, 3, 32, 32) / 255, labels


def test_a_local_cifar100_is_read_from_its_folder_or_the_one_above(tmp_path, monkeypatch):
    folder, images, labels = write_hundred(tmp_path, monkeypatch)
    for named in (folder, tmp_path):
        monkeypatch.setenv("DIFFCLASS_CIFAR100", str(named))
        read, fine = cifar.cifar100("test", 5)
        assert torch.equal(read, images[:5]) and fine.tolist() == labels[:5]
        assert len(cifar.cifar100("train")[0]) == COUNT
    assert max(labels) > 9 and fine.dtype == torch.int64


def test_without_a_folder_cifar100_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv("DIFFCLASS_CIFAR100", raising=False)
    with pytest.raises(FileNotFoundError, match="DIFFCLASS_CIFAR100 names.*'hundred'"):
        cifar.cifar100()
    monkeypatch.setenv("DIFFCLASS_CIFAR100", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="the file test of CIFAR-100 in"):
        cifar.cifar100()


def test_a_cifar100_that_is_not_the_official_one_is_refused(tmp_path, monkeypatch):
    folder, *_ = write_hundred(tmp_path, monkeypatch)
    monkeypatch.setenv("DIFFCLASS_CIFAR100", str(folder))
    for arguments in (("valid",), ("test", 0), ("test", COUNT + 1)):
        with pytest.raises(ValueError, match="expected"):
            cifar.cifar100(*arguments)
    with open(folder / "test", "ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match="cut short or altered"):
        cifar.cifar100()
    for number, options in enumerate((dict(labels=[100] * COUNT), dict(key="labels"))):
        other, *_ = write_hundred(tmp_path / str(number), monkeypatch, **options)
        monkeypatch.setenv("DIFFCLASS_CIFAR100", str(other))
        with pytest.raises(ValueError, match="labels from 0 to 99|a CIFAR-100 batch"):
            cifar.cifar100()
