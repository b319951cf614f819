"""Files are whole or not there; what is wrong is said in one message."""

import errno
import json
import os

import pytest

from twice_rec.errors import InputError
from twice_rec.files import (
    atomic_path,
    hash_file,
    read_json,
    read_jsonl,
    read_records,
    write_json,
    write_jsonl,
    write_records,
)
from twice_rec.records import Interaction, Prediction, UserSequence
from twice_rec.run import Manifest, Work


def test_atomic_write_replaces_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


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
        ({"user_id": "u", "interactions": [], "num_train": 1, "valid": 1}, "no key 'test'"),
        ({"user_id": 3, "interactions": [], "num_train": 1, "valid": 1, "test": 2}, "expected str, found 3"),
        ({"user_id": "u", "interactions": [], "num_train": True, "valid": 1, "test": 2}, "expected int, found True"),
        ({"user_id": "u", "interactions": [{}], "num_train": 1, "valid": 1, "test": 2}, "no key 'item_id'"),
        ({"user_id": "u", "interactions": 1, "num_train": 1, "valid": 1, "test": 2}, "expected list, found 1"),
        ({"user_id": "u", "interactions": [], "num_train": 1, "valid": 1, "test": 2, "x": 1}, "unknown key 'x'"),
    ],
)
def test_wrong_records_name_line_and_key(tmp_path, row, message):
    write_jsonl(tmp_path / "s.jsonl", [row])
    with pytest.raises(InputError, match=rf"s.jsonl, line 1: not a UserSequence: {message}"):
        list(read_records(tmp_path / "s.jsonl", UserSequence))


def test_folder_hash_sees_names_and_contents_but_not_the_manifest(tmp_path):
    (tmp_path / "a").write_text("1")
    before = hash_file(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    assert hash_file(tmp_path) == before
    (tmp_path / "a").rename(tmp_path / "b")
    assert hash_file(tmp_path) != before


class TestWork:
    """The folder of one result."""

    def make(self, run_dir, **settings):
        source = run_dir / "in.txt"
        if not source.exists():
            source.parent.mkdir(parents=True, exist_ok=True)
            source.write_text("input")
        return Work(run_dir, "out", "stage", {"k": 5, **settings}, [source])

    def finish(self, work):
        work.begin(overwrite=False)
        (work.path / "result.txt").write_text("result")
        work.finish([work.path / "result.txt"], {"n": 1}, {"command": []})

    def test_finished_work_is_known_again(self, tmp_path):
        assert not self.make(tmp_path).is_finished()
        self.finish(self.make(tmp_path))
        assert self.make(tmp_path).is_finished()
        manifest = Manifest.load(tmp_path / "out")
        assert manifest.figures == {"n": 1}
        assert set(manifest.inputs) == {"in.txt"}
        assert set(manifest.outputs) == {"out/result.txt"}
        assert "torch" in manifest.about["versions"]

    def test_other_settings_are_refused_with_both_values(self, tmp_path):
        self.finish(self.make(tmp_path))
        other = self.make(tmp_path, k=7)
        assert not other.is_finished()
        with pytest.raises(InputError, match=r"out holds results: k was 5, is 7\..*--overwrite true"):
            other.begin(overwrite=False)
        assert (tmp_path / "out" / "result.txt").read_text() == "result"
        other.begin(overwrite=True)
        assert not (tmp_path / "out" / "result.txt").exists()

    def test_other_inputs_are_refused(self, tmp_path):
        self.finish(self.make(tmp_path))
        (tmp_path / "in.txt").write_text("changed")
        with pytest.raises(InputError, match=r"input in.txt was [0-9a-f]{12}, is [0-9a-f]{12}"):
            self.make(tmp_path).begin(overwrite=False)

    def test_unfinished_work_is_taken_up(self, tmp_path):
        self.make(tmp_path).begin(overwrite=False)
        (tmp_path / "out" / "half.txt").write_text("half")
        self.make(tmp_path).begin(overwrite=False)
        assert (tmp_path / "out" / "half.txt").exists()
        with pytest.raises(InputError, match="out holds unfinished results: k was 5, is 6"):
            self.make(tmp_path, k=6).begin(overwrite=False)

    def test_foreign_files_are_not_touched(self, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("x")
        with pytest.raises(InputError, match="out holds files of another origin"):
            self.make(tmp_path).begin(overwrite=False)

    @pytest.mark.parametrize(("damage", "message"), [("change", "was changed"), ("remove", "is missing")])
    def test_damaged_output(self, tmp_path, damage, message):
        self.finish(self.make(tmp_path))
        result = tmp_path / "out" / "result.txt"
        result.write_text("x") if damage == "change" else result.unlink()
        with pytest.raises(InputError, match=rf"result.txt {message} since the stage stage finished"):
            self.make(tmp_path).is_finished()

    def test_manifest_of_another_version(self, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "manifest.json").write_text(json.dumps({"old": 1}))
        with pytest.raises(InputError, match="not a manifest of this version"):
            self.make(tmp_path).is_finished()
