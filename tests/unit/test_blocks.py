"""Blocks of lines that polars reads give what the json module gives line by line; or they are not read by polars."""

import gzip
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import event, given, settings
from hypothesis import strategies as st

from prepared import assemble
from twice_rec.data.estimate import check_room, estimate
from twice_rec.data.recipe import PrepareRecipe
from twice_rec.data.sources import amazon, lines
from twice_rec.data.sources.amazon import Amazon2014, Amazon2023
from twice_rec.data.sources.base import SourceFormat
from twice_rec.data.sources.blocks import TextStore, clean_texts, strict_frame, text_frame
from twice_rec.data.sources.interactions import _PLAIN_ITEM
from twice_rec.data.sources.lines import _block
from twice_rec.data.sources.values import clean_text, comes_back
from twice_rec.errors import InputError

GOOD = {
    "rating": 4.0, "title": "fine", "text": "so \"good\" caf\u00e9", "images": [], "asin": "B1", "parent_asin": "B1",
    "user_id": "U1", "timestamp": 1_600_000_000_000, "helpful_vote": 0, "verified_purchase": True,
}  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(
        [
            None, True, False, 0, -0.0, 3, 5, 6, 2.5, 1e300, 10**18, 10**19, 10**30, 10**400, float("nan"),
            float("inf"), "", " ", "7", "true", "null", "B1 ", " B1", "e\u0301", "\u00e9", "\u200b", "\x00", "\x7f",
            "a\tb", "\ud800", "\udc00x",
            "\ud83d\ude00", "\\ud83d", "\\", "\"", "title", "text", "\"title\": \"x\"", "\u2028", "A_B-1",
            "1600000000000",
            [], ["a", None, 3, "b"], [[]], {"title": "x"}, {"a": {"user_id": "U"}}, "<br />x", "&amp;",
        ]
    ),
    st.text(max_size=5),
    st.integers(-5, 7),
)  # fmt: skip
CHANGES = st.lists(st.tuples(st.sampled_from([*GOOD, "other"]), VALUES), max_size=2)
RAW = st.sampled_from(
    [
        "", " ", "\r", "{}", "[]", "7", "null", '{"user_id": "U1"', '{"user_id": "U2", "user_id": 3}', "\ufeff{}",
        "\x00",
        json.dumps(GOOD)[:-1] + ', "rating": 1.0}', json.dumps(GOOD)[:-1] + ', "title": "again"}',
        json.dumps(GOOD) + json.dumps(GOOD), json.dumps(GOOD) + "\r", "\ufeff" + json.dumps(GOOD),
        json.dumps(GOOD, indent=1),
        json.dumps(GOOD, separators=(",", ":")), json.dumps(GOOD).replace('"title"', '"ti\\u0074le"'),
        "\x0c" + json.dumps(GOOD),
        json.dumps(GOOD).replace("fine", "\\ud83d"), json.dumps(GOOD).replace("fine", "\\ud83d\\ude00"), "x" * 5000,
        json.dumps(GOOD).replace("fine", "\\\\ud83d\\ude00"), json.dumps(GOOD).replace("fine", "a\tb"),
        json.dumps(GOOD).replace("4.0", "4"), json.dumps(GOOD).replace("4.0", "04"),
        json.dumps(GOOD).replace("4.0", "NaN"),
        json.dumps({**GOOD, "images": [[[[]]]]}), '{"a":' * 1500 + "1" + "}" * 1500,
    ]
)  # fmt: skip


@st.composite
def raw_lines(draw):
    """Bytes of some lines, most of them good."""
    found = []
    for _ in range(draw(st.integers(1, 8))):
        record = {**GOOD, "user_id": f"U{draw(st.integers(0, 3))}", "parent_asin": f"B{draw(st.integers(0, 3))}"}
        record.update(draw(CHANGES) if draw(st.booleans()) else [])
        without = draw(st.sampled_from([None, None, None, None, *GOOD]))
        record = {key: value for key, value in record.items() if key != without}
        line = json.dumps(record, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
        found.append(draw(RAW).encode() if draw(st.integers(0, 9)) == 0 else line)
    end = draw(st.sampled_from([b"\n", b"\n", b"\r\n"]))
    damage = draw(st.sampled_from([b"", b"", b"", b"\xff", b"\xc3"]))
    return end.join(found) + damage + draw(st.sampled_from([b"\n", b""]))


def read(path, form):
    """All that a source makes of a file: columns, texts, problems."""
    source = Amazon2023(path.parent, "D", metadata_required=False, form=form)
    try:
        table = source.interactions()
    except InputError as error:
        return str(error), source.problems
    texts = source.review_texts(table.line)
    columns = (table.users, table.items, table.user, table.item, table.timestamp, table.rating, table.line)
    return [
        *(str(column.tolist() if hasattr(column, "tolist") else column.to_list()) for column in columns),
        texts.rows(),
    ], source.problems


@settings(max_examples=400, deadline=None)
@given(raw_lines(), st.sampled_from([[1, 5], [0, 10]]), st.integers(1, 4))
def test_blocks_give_what_lines_give(data, scale, few):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder) / "D.jsonl"
        path.write_bytes(data or b"\n")
        patch.setattr(lines, "LONGEST_LINE", 4000)
        patch.setattr(amazon, "_FEW_LINES", few)
        frames = []
        patch.setattr(amazon, "strict_frame", lambda *given: frames.append(strict_frame(*given)) or frames[-1])
        fast = read(path, SourceFormat(rating_scale=scale))
        event(f"a block is read at once: {any(frame is not None for frame in frames)}")
        patch.setattr(amazon, "strict_frame", lambda *given: None)
        assert fast == read(path, SourceFormat(rating_scale=scale))


@pytest.mark.parametrize("times", [1, 40])
def test_good_lines_are_read_at_once(times):
    data = b"".join(json.dumps({**GOOD, "user_id": f"U{n}"}).encode() + b"\n" for n in range(times))
    schema = {"user_id": amazon.pl.String, "title": amazon.pl.String, "rating": amazon.pl.Float64}
    assert len(strict_frame(_block(0, data), schema)) == times


@given(st.text(st.sampled_from(" a<b>&;x\t\u00a0\x7f\u200b{=(.\u00e9"), max_size=12))
def test_texts_that_are_left_alone_are_clean(text):
    (cleaned,) = clean_texts(amazon.pl.Series([text]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("twice_rec.data.sources.values.is_clean", lambda text: False)
        assert cleaned == clean_text(text)


@given(st.from_regex(_PLAIN_ITEM, fullmatch=True))
def test_plain_ids_come_back(item_id):
    assert item_id.endswith("\n") or comes_back(item_id)


@pytest.mark.parametrize("size", [1, 700, 1 << 25])
def test_blocks_hold_every_line_once(tmp_path, monkeypatch, size):
    monkeypatch.setattr(lines, "_BLOCK", size)
    monkeypatch.setattr(lines, "_CHUNK", 64)
    (tmp_path / "D.jsonl").write_text("".join(f"{n} {'x' * (n * 37 % 300)}\n" for n in range(200)) + "\nlast")
    reader = lines.LineReader(tmp_path / "D.jsonl", "utf-8", lines.Problems())
    blocks = list(reader.blocks())
    assert [line for block in blocks for line, _ in reader.lines_of(block)] == list(range(202))
    assert [text for block in blocks for _, text in reader.lines_of(block)][-2:] == ["", "last"]
    parts = [part for block in blocks for part in block.parts(7)]
    assert b"".join(part.data for part in parts) == (tmp_path / "D.jsonl").read_bytes()
    assert [line for part in parts for line, _ in reader.lines_of(part)] == list(range(202))


def many(number=4000):
    return "".join(
        json.dumps({**GOOD, "user_id": f"U{n}", "text": f"{n} {'z' * 90}"}) + "\n" for n in range(number)
    ).encode()


def zstd(data, frames=1):
    step = len(data) // frames + 1
    return b"".join(zstandard.compress(data[at : at + step], 1) for at in range(0, len(data), step))


@pytest.mark.parametrize(
    ("name", "pack"), [("D.jsonl.gz", gzip.compress), ("D.jsonl.zst", zstd), ("D.jsonl.zst", lambda d: zstd(d, 3))]
)
def test_packed_files_are_read_to_where_they_are_cut_off(tmp_path, name, pack):
    packed = pack(many())
    (tmp_path / name).write_bytes(packed)
    source = Amazon2023(tmp_path, "D", metadata_required=False)
    table = source.interactions()
    assert (len(table), source.problems.counts) == (4000, {})
    assert source.review_texts(table.line[-1:]).rows() == [("fine", f"3999 {'z' * 90}")]
    (tmp_path / name).write_bytes(packed[: len(packed) * 2 // 3])
    source = Amazon2023(tmp_path, "D", metadata_required=False)
    assert 100 < len(source.interactions()) < 4000
    assert source.problems.counts == {"file that is cut off or damaged, read up to there": 1}


def test_a_file_of_one_endless_line_is_not_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "LONGEST_LINE", 1000)
    monkeypatch.setattr(lines, "_BLOCK", 500)
    monkeypatch.setattr(lines, "_CHUNK", 100)
    (tmp_path / "D.jsonl").write_bytes(b"x" * 100_000 + b"\n" + many(5))
    reader = lines.LineReader(tmp_path / "D.jsonl", "utf-8", lines.Problems())
    assert max(len(block.data) for block in reader.blocks()) < 5000
    source = Amazon2023(tmp_path, "D", metadata_required=False)
    assert len(source.interactions()) == 5
    assert source.problems.counts == {"line of more than 1,000 characters, skipped": 1}


def test_texts_wait_in_a_folder_whose_name_looks_like_a_pattern(tmp_path):
    (folder := tmp_path / "a[1]*").mkdir()
    store = TextStore(folder)
    store.add(text_frame([("tea", "good"), ("rice", "bad")]))
    assert store.read(np.array([1, -1, 0])).rows() == [("rice", "bad"), ("", ""), ("tea", "good")]


def prepare_recipe(**keys):
    return PrepareRecipe(run_dir="x", domain="D", seed=1, source="amazon2023", source_dir="x", **keys)


class TestEstimate:
    def test_rows_and_disk(self, tmp_path):
        (tmp_path / "D.jsonl").write_bytes(many(20_000))
        source = Amazon2023(tmp_path, "D", metadata_required=False)
        plain = estimate(source, prepare_recipe())
        assert 19_000 < plain.rows < 21_000
        assert estimate(source, prepare_recipe(k_core=1)).disk > plain.disk > 1e6
        (tmp_path / "D.jsonl").unlink()
        (tmp_path / "D.jsonl.gz").write_bytes(gzip.compress(many(20_000)))
        assert abs(estimate(Amazon2023(tmp_path, "D", metadata_required=False), prepare_recipe()).rows - 20_000) < 2000

    def test_a_disk_that_is_too_small_is_told_before_the_work(self, tmp_path, monkeypatch):
        (tmp_path / "D.jsonl").write_bytes(many(20_000))
        source = Amazon2023(tmp_path, "D", metadata_required=False)
        check_room(source, prepare_recipe(), tmp_path / "runs" / "x")
        monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1_000_000}))
        says = r"about 20,\d+ interactions, .* and 5\.\d MB of disk, but .* has 1.0 MB free; make room"
        with pytest.raises(InputError, match=says):
            check_room(source, prepare_recipe(), tmp_path / "runs" / "x")


class TestWrongFiles:
    def test_the_domains_of_the_folder_are_named(self, tmp_path):
        for name in ("Tea.jsonl", "Coffee.jsonl.gz", "meta_Tea.jsonl", "notes.txt"):
            (tmp_path / name).write_bytes(many(1))
        with pytest.raises(InputError, match=r"looked for Te.jsonl, .*; the folder has the domains Coffee, Tea$"):
            Amazon2023(tmp_path, "Te")
        (tmp_path / "reviews_Rice_5.json.gz").write_bytes(b"x")
        with pytest.raises(InputError, match=r"; the folder has the domain Rice$"):
            Amazon2014(tmp_path, "Te")

    @pytest.mark.parametrize("untitled", ["keep", "drop"])
    def test_reviews_and_metadata_of_two_domains(self, tmp_path, untitled):
        (tmp_path / "D.jsonl").write_bytes(many(50))
        (tmp_path / "meta_D.jsonl").write_text(json.dumps({"parent_asin": "C7", "title": "Tea"}))
        config = prepare_recipe(untitled_items=untitled, k_core=1, min_history=3)
        with pytest.raises(
            InputError, match=r"of the 1 items of D.jsonl, meta_D.jsonl describes 0; are they files of two"
        ):
            assemble(Amazon2023(tmp_path, "D"), config)
