"""Files are whole or not there; what is wrong is said in one message."""

import errno
import os

import pytest

from twice_rec.errors import InputError
from twice_rec.files import (
    atomic_path,
    hash_file,
    read_json,
    read_jsonl,
    read_records,
    records_of_users,
    scratch_folder,
    write_json,
    write_jsonl,
    write_records,
)
from twice_rec.records import Interaction, Prediction, UserSequence


def test_atomic_write_replaces_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_scratch_folder_is_empty_at_first_and_gone_at_last(tmp_path):
    (tmp_path / ".scratch").mkdir()
    (tmp_path / ".scratch" / "left by a killed process").touch()
    with pytest.raises(RuntimeError), scratch_folder(tmp_path) as scratch:
        assert list(scratch.iterdir()) == []
        (scratch / "a").touch()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"a": 1}])

    def no_space(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_jsonl(path, [{"a": 2}, {"a": 3}])
    assert path.read_text() == '{"a": 1}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_nan_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "rows.jsonl: no such file"),
        ("", "rows.jsonl: the file is empty"),
        ('{"a": 1}\n{"a": \n', r"rows.jsonl, line 2: broken JSON .*run the stage that makes it again"),
        ('{"a": 1}\n[1]\n', "rows.jsonl, line 2: expected a JSON object, found list"),
    ],
)
def test_bad_json_lines(tmp_path, text, message):
    path = tmp_path / "rows.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message):
        list(read_jsonl(path))


def test_bytes_that_are_not_utf8(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "\xff"}\n')
    with pytest.raises(InputError, match="not UTF-8"):
        list(read_jsonl(path))
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(InputError, match=r"x.json: not JSON"):
        read_json(tmp_path / "x.json")


def test_records_round_trip(tmp_path):
    rows = [
        UserSequence("u", (Interaction("A", 5, 4.0, "ok", "é"), Interaction("B")), 1, None, 1),
        UserSequence("v", (Interaction("B"),), 0, None, None),
    ]
    write_records(tmp_path / "s.jsonl", rows)
    assert list(read_records(tmp_path / "s.jsonl", UserSequence)) == rows
    predictions = [Prediction("u", "A", {"uniform": 3}, 7, ("A", "B"), ("text",)), Prediction("v", "B", {})]
    write_records(tmp_path / "p.jsonl", predictions)
    assert list(read_records(tmp_path / "p.jsonl", Prediction)) == predictions


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"user_id": "u", "interactions": [], "num_train": 1, "valid": 1}, "test: Field required"),
        (
            {"user_id": 3, "interactions": [], "num_train": 1, "valid": 1, "test": 2},
            "user_id: Input should be a valid string, found 3",
        ),
        (
            {"user_id": "u", "interactions": [], "num_train": True, "valid": 1, "test": 2},
            "num_train: Input should be a valid integer, found True",
        ),
        (
            {"user_id": "u", "interactions": [{}], "num_train": 1, "valid": 1, "test": 2},
            "interactions.0.item_id: Field required",
        ),
        (
            {"user_id": "u", "interactions": 1, "num_train": 1, "valid": 1, "test": 2},
            "interactions: Input should be a valid (?:tuple|array), found 1",
        ),
        (
            {"user_id": "u", "interactions": [], "num_train": 1, "valid": 1, "test": 2, "x": 1},
            "x: Unexpected keyword argument",
        ),
    ],
)
def test_wrong_records_name_line_and_key(tmp_path, row, message):
    write_jsonl(tmp_path / "s.jsonl", [row])
    with pytest.raises(InputError, match=rf"s.jsonl, line 1: not a UserSequence: {message}"):
        list(read_records(tmp_path / "s.jsonl", UserSequence))


def test_records_of_some_users_are_read_however_their_lines_begin(tmp_path):
    path = tmp_path / "p.jsonl"
    rows = [Prediction(user, "B1", {"uniform": 1}) for user in ("a", "b", 'with "quotes"', "c")]
    write_records(path, rows)
    turned = '{"target": "B1", "ranks": {"uniform": 2}, "user_id": "d"}\n'  # the user is not the first key
    tight = '{"user_id":"e","target":"B1","ranks":{"uniform":3}}\n'
    path.write_text(path.read_text() + turned + tight)
    found = list(records_of_users(path, Prediction, {"b", 'with "quotes"', "d", "e"}))
    assert [row.user_id for row in found] == ["b", 'with "quotes"', "d", "e"]
    assert found[0] == rows[1]
    path.write_text(path.read_text() + '{"user_id": "b", "target": 1}\n')
    with pytest.raises(InputError, match=r"p.jsonl, line 7: not a Prediction: target"):
        list(records_of_users(path, Prediction, {"b"}))
    assert [row.user_id for row in records_of_users(path, Prediction, {"a"})] == ["a"]


def test_folder_hash_sees_names_and_contents_but_not_the_manifest(tmp_path):
    (tmp_path / "a").write_text("1")
    before = hash_file(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    assert hash_file(tmp_path) == before
    (tmp_path / "a").rename(tmp_path / "b")
    assert hash_file(tmp_path) != before
