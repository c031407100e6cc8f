"""Records survive a round trip and an interrupted write, and refuse what is not a result."""

import errno
import hashlib
import json
import math
import os
from dataclasses import asdict, fields

import pytest
from diffclass import intervals
from diffclass.evaluation import claims, protocols, tables
from diffclass.storage import results
from diffclass.storage.results import Record

HASH = "ab" * 32


def accuracy(correct: int = 395, n: int = 400, **more) -> Record:
    own = dict(world="digits", classifier="dc", source="a test")
    return results.accuracy_record(correct, n, **{**own, **more})


def cost(**changes) -> Record:
    content = dict(
        metric="time for an image",
        world="digits",
        classifier="dc",
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
    mean = accuracy(method=claims.MEAN)
    assert str(mean) == "98.8 % [97.1, 99.6] (n = 400, 95 % Korn-Graubard over images)"


def test_an_accuracy_is_a_share_with_its_interval():
    record = accuracy(3, 8)
    assert (record.metric, record.unit, record.statistic) == ("accuracy", "share", "single")
    assert (record.value, record.n, record.level) == (3 / 8, 8, 0.95)
    assert (record.low, record.high) == intervals.interval(3, 8, 0.95)
    assert (record.seed, record.checkpoint, record.attack, record.part) == (None,) * 4
    assert record.settings == {} and record.schema == results.SCHEMA == 2
    wider = accuracy(3, 8, level=0.99, seed=4)
    assert (wider.low, wider.high) == intervals.interval(3, 8, 0.99) and wider.seed == 4


ATTACKED = dict(
    attack="honest-1",
    settings={"protocol": {"norm": "linf", "epsilon": 8 / 255}, "draws": 10},
)
IN_WORDS = [
    ({}, "accuracy of dc on 400 images of digits"),
    (dict(detail="ELBO weights"), "accuracy of dc on 400 images of digits (ELBO weights)"),
    (
        dict(world="digits:noise-3", classifier="idc"),
        "accuracy of idc on 400 images of digits:noise-3",
    ),
    (
        dict(statistic="worst", settings={"draws": 10}),
        "accuracy of dc on 400 images of digits, worst of 10 draws",
    ),
    (
        dict(statistic="mean"),
        "accuracy of dc on 400 images of digits, mean of several draws",
    ),
    (
        ATTACKED,
        "upper bound of the robust accuracy of dc on 400 images of digits under honest-1, linf 0.03137",
    ),
    (
        dict(attack="paper-rdc-1"),
        "upper bound of the robust accuracy of dc on 400 images of digits under paper-rdc-1",
    ),
    (
        {**ATTACKED, "part": "pgd CE 20", "statistic": "mean"},
        "upper bound of the robust accuracy of dc on 400 images of digits under honest-1, linf 0.03137, only pgd CE 20, "
        "mean of 10 draws",
    ),
]


@pytest.mark.parametrize("changes, words", IN_WORDS)
def test_a_record_in_words(changes, words):
    assert accuracy(**changes).what == words


def test_words_are_for_display_and_no_key():
    names = {field.name for field in fields(Record)}
    assert "what" not in names
    assert {"metric", "world", "classifier", "attack", "part", "statistic", "schema"} <= names


def test_round_trip_appends(tmp_path):
    path = tmp_path / "new folder" / "records.jsonl"
    written = [
        accuracy(seed=3, checkpoint=HASH, settings={"weighting": "ELBO", "levels": 64}),
        cost(metric="Zeit µs"),
        accuracy(**ATTACKED, part="pgd CE 20", statistic="worst", detail="a detail"),
    ]
    for record in written:
        assert record.append(path) == path
    assert results.read(path) == written
    assert path.read_bytes().count(b"\n") == 3


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


@pytest.mark.parametrize(
    "content",
    [
        b"my only copy of these notes",
        b'{"mine": 1}',
        b"{",
        b"notes\n",
        b'{"attack": null}\n',
        b"\xff\xfe\n",
        b"[" * 100_000 + b"\n",
        b"a\r\nb\r\n",
    ],
)
def test_a_file_that_is_not_ours_keeps_every_byte(tmp_path, content):
    path = tmp_path / "notes.txt"
    for before in (b"", line_of(accuracy(1))):
        path.write_bytes(before + content)
        with pytest.raises(ValueError, match="expected a file of records .* nothing was changed"):
            accuracy(2).append(path)
        assert path.read_bytes() == before + content


def line_of(record) -> bytes:
    return json.dumps(asdict(record), sort_keys=True).encode() + b"\n"


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    accuracy(1).append(path)
    before = path.read_bytes()

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    write = os.write
    half = [lambda handle, data: write(handle, data[:20]), full]
    for broken in half:
        with monkeypatch.context() as patch, pytest.raises(OSError):
            patch.setattr(os, "write", broken)
            accuracy(2).append(path)
        assert path.read_bytes() == before
        with monkeypatch.context() as patch, pytest.raises(OSError):
            patch.setattr(os, "write", broken)
            accuracy(2).append(tmp_path / "new.jsonl")
        assert not (tmp_path / "new.jsonl").exists()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="r.jsonl"):
        patch.setattr(os, "fsync", full)
        accuracy(2).append(path)
    assert path.read_bytes() == before


def test_missing_line_end_is_mended_without_loss(tmp_path, recwarn):
    path = tmp_path / "r.jsonl"
    accuracy(1).append(path)
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    accuracy(2).append(path)
    assert len(results.read(path)) == 2 and not recwarn.list


@pytest.mark.parametrize(
    "line",
    [
        b'{"schema": 2, "metric": "half a rec',
        b'{"schema": 2, "metric": "no value"}',
        b"[1, 2]",
        b'{"schema": 2, "surprise": 1}',
        b"\xff",
    ],
)
def test_corrupt_line_is_named(tmp_path, line):
    path = tmp_path / "r.jsonl"
    accuracy(1).append(path)
    path.write_bytes(path.read_bytes() + line + b"\n" + path.read_bytes())
    with pytest.raises(ValueError, match=r"line 2 of .*r\.jsonl is not a record"):
        results.read(path)


OLD = {  # as version 0.1 wrote an accuracy: prose in place of keys, and no schema
    "what": "clean accuracy of dc on 400 images of digits",
    "value": 0.9875,
    "n": 400,
    "low": 0.97,
    "high": 0.997,
    "level": 0.95,
    "settings": {"weighting": "ELBO"},
    "seed": 0,
    "checkpoint": HASH,
    "source": "diffclass evaluate",
    "when": "2026-11-21T17:24:51+00:00",
    "unit": "share",
    "method": "Clopper-Pearson",
}


@pytest.mark.parametrize(
    "content, said",
    [
        (OLD, "expected a record of schema 2, got 'one without a schema'; it was written by"),
        ({**OLD, "schema": 1}, "expected a record of schema 2, got 1; it was written by"),
        ({**asdict(cost()), "schema": 3}, "expected a record of schema 2, got 3; it was written"),
        ({**OLD, "schema": 2}, r"expected the fields of a Record, got also \['what'\]"),
    ],
)
def test_a_record_of_another_version_gets_a_sentence(tmp_path, content, said):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(content) + "\n")
    with pytest.raises(ValueError, match=f"line 1 of .* is not a record: {said}"):
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
        ({"source": ""}, "by whom, got no source"),
        ({"metric": ""}, "what was measured.*got no metric"),
        ({"world": None, "classifier": 3}, "got no world and no classifier"),
        ({"statistic": "best"}, "expected a statistic of single, mean, worst, got 'best'"),
        ({"schema": 1}, "expected a record of schema 2, got 1"),
        ({"value": True}, "finite"),
        ({"n": True}, "n, the number"),
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


@pytest.mark.parametrize("correct, n", [(5, 4), (-1, 4), (0, 0)])
def test_impossible_counts_are_refused(correct, n):
    with pytest.raises(ValueError, match="0 <= correct <= n"):
        accuracy(correct, n)


def test_records_name_protocols_as_the_library_does():
    for folder in (*tables.folders("digits"), *tables.folders("cifar10")):
        for record in claims.kept(folder):
            protocol = protocols.Protocol.of_json(record.settings["protocol"])
            assert record.attack in (None, protocol.key)
            assert record.schema == results.SCHEMA


def test_sha256_of(tmp_path):
    (tmp_path / "w").write_bytes(b"weights")
    assert results.sha256_of(tmp_path / "w") == hashlib.sha256(b"weights").hexdigest()
