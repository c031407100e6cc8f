"""Records survive a round trip and an interrupted write, and refuse what is not a result."""

import hashlib
import math
import os

import pytest
from diffclass import intervals
from diffclass.storage import results
from diffclass.storage.results import Record

HASH = "ab" * 32


def accuracy(correct: int = 395, n: int = 400, **more) -> Record:
    bounds = intervals.interval(correct, n)
    return results.accuracy_record(
        correct, n, "accuracy on digits", bounds, source="a test", **more
    )


def cost(**changes) -> Record:
    content = dict(
        what="time for an image",
        value=2.5,
        n=10,
        low=2.0,
        high=3.0,
        level=0.9,
        settings={"levels": 64},
        seed=None,
        checkpoint=None,
        source="a test",
        unit="s",
        method="bootstrap",
    )
    return Record(**(content | changes))


def test_shown_with_interval_and_counts():
    assert str(accuracy()) == "98.8 % [97.1, 99.6] (395 of 400, 95 % Clopper-Pearson)"
    assert str(cost()) == "2.5 s [2, 3] (n = 10, 90 % bootstrap)"


def test_round_trip_appends(tmp_path):
    path = tmp_path / "new folder" / "records.jsonl"
    written = [
        accuracy(seed=3, checkpoint=HASH, settings={"weighting": "ELBO", "levels": 64}),
        cost(what="Zeit µs"),
    ]
    for record in written:
        assert record.append(path) == path
    assert results.read(path) == written
    assert path.read_bytes().count(b"\n") == 2


def test_write_is_one_piece_and_flushed(tmp_path, monkeypatch):
    calls = []
    write = os.write
    fsync = os.fsync
    monkeypatch.setattr(
        os, "write", lambda handle, data: calls.append("write") or write(handle, data)
    )
    monkeypatch.setattr(os, "fsync", lambda handle: calls.append("fsync") or fsync(handle))
    accuracy().append(tmp_path / "r.jsonl")
    assert calls == ["write", "fsync"]


def test_short_write_is_an_error(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:20]))
    with pytest.raises(OSError, match="wrote 20"):
        accuracy().append(tmp_path / "r.jsonl")


@pytest.mark.parametrize("cut", [1, 5, 60])
def test_interrupted_write_loses_only_itself(tmp_path, cut):
    path = tmp_path / "r.jsonl"
    for correct in (1, 2, 3):
        accuracy(correct).append(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 1 - cut])
    with pytest.warns(UserWarning, match="line 3 .* interrupted write"):
        assert [r.value * 400 for r in results.read(path)] == pytest.approx([1, 2])
    with pytest.warns(UserWarning, match="was removed"):
        accuracy(4).append(path)
    assert [r.value * 400 for r in results.read(path)] == pytest.approx([1, 2, 4])


def test_missing_line_end_is_mended_without_loss(tmp_path, recwarn):
    path = tmp_path / "r.jsonl"
    accuracy(1).append(path)
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    accuracy(2).append(path)
    assert len(results.read(path)) == 2 and not recwarn.list


@pytest.mark.parametrize(
    "line",
    [b'{"what": "half a rec', b'{"what": "no value"}', b"[1, 2]", b'{"surprise": 1}', b"\xff"],
)
def test_corrupt_line_is_named(tmp_path, line):
    path = tmp_path / "r.jsonl"
    accuracy(1).append(path)
    path.write_bytes(path.read_bytes() + line + b"\n" + path.read_bytes())
    with pytest.raises(ValueError, match=r"line 2 of .*r\.jsonl is not a record"):
        results.read(path)


def test_corrupt_last_line_with_its_end_is_no_interrupted_write(tmp_path):
    path = tmp_path / "r.jsonl"
    accuracy(1).append(path)
    path.write_bytes(path.read_bytes() + b"oops\n")
    with pytest.raises(ValueError, match="line 2"):
        results.read(path)


def test_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the command"):
        results.read(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value": math.nan}, "finite"),
        ({"high": math.inf}, "finite"),
        ({"value": "2.5"}, "finite"),
        ({"value": 4.0}, "low <= value <= high"),
        ({"level": 95}, "level"),
        ({"n": 0}, "n, the number"),
        ({"n": 2.5}, "n, the number"),
        ({"source": ""}, "by whom"),
        ({"checkpoint": "v3-final"}, "64 hexadecimal"),
        ({"settings": {"loss": math.nan}}, "JSON"),
        ({"settings": {"f": print}}, "JSON"),
        ({"unit": "share"}, r"in \[0,1\]"),
        (
            {
                "unit": "share",
                "value": 0.7567,
                "low": 0.7,
                "high": 0.8,
                "n": 512,
                "method": "Clopper-Pearson",
            },
            "whole number of 512",
        ),
    ],
)
def test_what_is_no_result_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        cost(**changes)


def test_impossible_counts_are_refused():
    with pytest.raises(ValueError, match="0 <= correct <= n"):
        results.accuracy_record(5, 4, "x", (0.0, 1.0), source="a test")


def test_sha256_of(tmp_path):
    (tmp_path / "w").write_bytes(b"weights")
    assert results.sha256_of(tmp_path / "w") == hashlib.sha256(b"weights").hexdigest()
