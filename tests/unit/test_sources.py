"""Every source of interactions, with what real files throw at it."""

import gzip
import json

import numpy as np
import pytest

from prepared import assemble
from twice_rec.data.sequences import SequenceConfig
from twice_rec.data.sources import amazon as amazon_module
from twice_rec.data.sources.amazon import Amazon2014, Amazon2023
from twice_rec.data.sources.amazon_5core import Amazon5Core
from twice_rec.data.sources.base import REGISTERED, Source
from twice_rec.data.sources.recbole import RecBoleSource
from twice_rec.data.sources.release import ReleasedPrompt, ReleaseSource
from twice_rec.errors import InputError

KEEP_ALL = SequenceConfig(untitled_items="keep", k_core=1, min_history=3, max_history=None)


def review(user="U1", item="A", time=1000, rating=5.0, **others):
    return {
        "user_id": user,
        "parent_asin": item,
        "timestamp": time,
        "rating": rating,
        "title": "t",
        "text": "x",
        **others,
    }


def meta(item="A", title="Tea", **others):
    return {"parent_asin": item, "title": title, **others}


def write_lines(path, rows):
    lines = [row if isinstance(row, (str, bytes)) else json.dumps(row) for row in rows]
    data = b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def amazon(tmp_path, reviews, metadata=(), kind=Amazon2023, **options):
    write_lines(tmp_path / ("D.jsonl" if kind is Amazon2023 else "reviews_D.json.gz"), reviews)
    if metadata:
        write_lines(tmp_path / ("meta_D.jsonl" if kind is Amazon2023 else "meta_D.json.gz"), metadata)
    return kind(tmp_path, "D", **options)


class TestAmazon2023:
    def test_fields(self, tmp_path):
        details = {"Brand": "Yogi", "Unit Count": 96.0, "Diet": ["Vegan", "Organic"]}
        item = meta(
            title="Tea &amp; <b>Honey</b>",
            description=["One.", "Two.<br />"],
            details=details,
            store="Yogi",
            categories=["Grocery", "Tea"],
            price=7.5,
        )
        source = amazon(tmp_path, [review(title="So &quot;good&quot;", text="a<br />b")], [item])
        table = source.interactions()
        users, items = table.users.to_list(), table.items.to_list()
        assert (users, items, table.timestamp.tolist(), table.rating.tolist()) == (["U1"], ["A"], [1000], [5.0])
        assert source.review_texts(table.line).rows() == [('So "good"', "a b")]
        (found,) = source.items({"A"})
        assert found.title == "Tea & Honey"
        assert found.description == "One. Two."
        assert found.details == '"Brand": "Yogi", "Unit Count": 96.0, "Diet": ["Vegan", "Organic"]'
        assert (found.brand, found.categories, found.price) == ("Yogi", ("Grocery", "Tea"), "7.5")

    def test_details_as_json_text_and_odd_types(self, tmp_path):
        items = [
            meta("A", details='{"Brand": "Yogi"}', price=None, description="plain"),
            meta("B", details="not json", price="from 7", store=None, categories=None, description=[None, 3]),
            meta("C", details=None, description=[], features=["Organic"]),
        ]
        source = amazon(tmp_path, [review()], items)
        a, b, c = source.items({"A", "B", "C"})
        assert (a.details, a.price, a.description) == ('"Brand": "Yogi"', "", "plain")
        assert (b.details, b.price, b.brand, b.categories, b.description) == ("not json", "from 7", "", (), "")
        assert (c.details, c.description) == ("", "Organic")

    def test_what_cannot_be_used_is_counted_by_kind(self, tmp_path):
        rows = [
            review(),
            '{"user_id": "U1", "parent_',
            "[1, 2]",
            "",
            review(user=None),
            review(item=""),
            review(item=7),
            review(time="yesterday"),
            review(time=None),
            review(time=True),
            review(user="U\ud800"),
            review(item="B", rating=0.0),
            review(item="C", rating="five"),
            review(item="D", title=None, text=["x"]),
        ]
        source = amazon(tmp_path, rows, [meta()])
        table = source.interactions()
        assert table.items.to_list() == ["A", "B", "C", "D"]
        assert np.isnan(table.rating).tolist() == [False, True, True, False]
        assert source.problems.counts == {
            "line that does not parse": 1,
            "line that is no object": 1,
            "review without user_id": 1,
            "review without parent_asin": 1,
            "review whose parent_asin is not plain text": 1,
            "review whose timestamp is not a time": 2,
            "review without timestamp": 1,
            "review whose user_id is not plain text": 1,
            "review with a rating that is not 1 to 5, kept without": 2,
        }
        assert source.problems.first["line that does not parse"] == "D.jsonl, line 2"
        assert source.review_texts(table.line[[3, 0, 3]]).rows() == [("", "x"), ("t", "x"), ("", "x")]

    def test_items_without_title(self, tmp_path):
        source = amazon(tmp_path, [review()], [meta("A"), meta("B", ""), {"title": "no id"}, meta("A", "again")])
        assert source.titled({"A", "B", "C"}) == {"A"}
        assert source.problems.counts == {
            "item without id": 1,
            "item described twice, first kept": 1,
            "item without title": 2,
        }
        assert [item.title for item in source.items({"A"})] == ["Tea"]

    def test_other_schema_is_named(self, tmp_path):
        with pytest.raises(InputError, match=r"no record fits the Amazon Reviews 2023 schema.*reviewerID.*amazon2014"):
            amazon(tmp_path, [{"reviewerID": "U", "asin": "A", "unixReviewTime": 1}], [meta()]).interactions()

    def test_missing_and_empty_files(self, tmp_path):
        with pytest.raises(InputError, match=r"no file with reviews; looked for D.jsonl, D.jsonl.gz"):
            Amazon2023(tmp_path, "D")
        (tmp_path / "D.jsonl").touch()
        with pytest.raises(InputError, match=r"D.jsonl: the file is empty"):
            Amazon2023(tmp_path, "D")
        write_lines(tmp_path / "D.jsonl", [review()])
        with pytest.raises(InputError, match=r"no file with item metadata; looked for meta_D.jsonl"):
            Amazon2023(tmp_path, "D")
        with pytest.raises(InputError, match=r"nowhere: no such folder; pass --source_dir"):
            Amazon2023(tmp_path / "nowhere", "D")

    def test_without_metadata_ids_become_titles(self, tmp_path):
        rows = [review(f"U{u}", item, time) for u in range(5) for time, item in enumerate("ABC")]
        source = amazon(tmp_path, rows, metadata_required=False)
        catalog, sequences = assemble(source, KEEP_ALL)
        assert [item.title for item in catalog] == ["A", "B", "C"]
        assert len(sequences) == 5

    def test_truncated_gzip_is_read_up_to_its_end(self, tmp_path):
        whole = gzip.compress("".join(json.dumps(review(f"U{i}", f"I{i}")) + "\n" for i in range(2000)).encode())
        (tmp_path / "D.jsonl.gz").write_bytes(whole[: len(whole) // 2])
        write_lines(tmp_path / "meta_D.jsonl", [meta()])
        source = Amazon2023(tmp_path, "D")
        assert 100 < len(source.interactions()) < 2000
        assert source.problems.counts == {"file that is cut off or damaged, read up to there": 1}

    def test_damaged_gzip(self, tmp_path):
        whole = bytearray(gzip.compress(json.dumps(review()).encode() * 50))
        whole[len(whole) // 2] ^= 0xFF
        (tmp_path / "D.jsonl.gz").write_bytes(whole)
        write_lines(tmp_path / "meta_D.jsonl", [meta()])
        with pytest.raises(InputError, match="no record fits"):
            Amazon2023(tmp_path, "D").interactions()


def test_amazon_2014(tmp_path):
    reviews = [
        {"reviewerID": "U1", "asin": "A", "unixReviewTime": 10, "overall": 4.0, "summary": "s", "reviewText": "r"}
    ]
    items = [
        "{'asin': 'A', 'title': \"Memory o' Trees\", 'price': 9.49, 'categories': [['Music', 'New Age'], ['X']]}",
        b"{'as",
    ]
    source = amazon(tmp_path, reviews, items, Amazon2014)
    table = source.interactions()
    assert (table.timestamp.tolist(), source.review_texts(table.line).rows()) == ([10_000], [("s", "r")])
    assert source.titled({"A"}) == {"A"}
    (item,) = source.items({"A"})
    assert (item.title, item.price, item.categories) == ("Memory o' Trees", "9.49", ("Music", "New Age"))
    assert source.problems.counts == {"line that does not parse": 1}


def test_python_literals_are_never_run(tmp_path):
    source = amazon(tmp_path, [review()], ["{'parent_asin': __import__('os').system('true')}", meta()])
    assert source.titled({"A"}) == {"A"}
    assert source.problems.counts == {"line that does not parse": 1}


class TestRecBole:
    def source(self, tmp_path, inter, item=None, name="ml.inter"):
        (tmp_path / name).write_text(inter)
        if item is not None:
            (tmp_path / "ml.item").write_text(item)
        return RecBoleSource(tmp_path, "ml")

    def test_one_interaction_per_row(self, tmp_path):
        source = self.source(
            tmp_path,
            "user_id:token\titem_id:token\trating:float\ttimestamp:float\nu\ta\t4\t881250949\nu\tb\t\tx\nbroken\nu\t\t1\t1\n",
            "item_id:token\tmovie_title:token_seq\tgenre:token_seq\na\tToy Story\tComedy Drama\nb\t\t\n",
        )
        table = source.interactions()
        assert table.timestamp.tolist() == [881250949000]  # a time of 0 would put b first
        assert source.titled({"a", "b"}) == {"a"}
        (item,) = (i for i in source.items({"a"}))
        assert (item.title, item.details) == ("Toy Story", '"genre": "Comedy Drama"')
        assert source.problems.counts == {
            "row with another number of columns than the header": 1,
            "row whose timestamp is not a time, dropped": 1,
            "row without user_id or item_id": 1,
            "item without title": 1,
        }

    def test_list_valued_histories_in_three_files(self, tmp_path):
        header = "user_id:token\titem_id_list:token_seq\titem_id:token\n"
        for part, rows in (("train", "u\ta b\tc\nv\tb\tc\n"), ("valid", "u\ta b c\td\n"), ("test", "u\ta b c d\te\n")):
            (tmp_path / f"ml.{part}.inter").write_text(header + rows)
        table = RecBoleSource(tmp_path, "ml").interactions()
        users, items = table.users.to_list(), table.items.to_list()
        by_user = {u: [items[i] for i, w in zip(table.item, table.user, strict=True) if users[w] == u] for u in "uv"}
        assert by_user == {"u": list("abcde"), "v": list("bc")}

    @pytest.mark.parametrize(
        ("inter", "message"),
        [
            ("user_id,item_id\n1,2\n", "ml.inter, line 1: not the header of a RecBole file"),
            ("item_id:token\n1\n", "with the columns user_id"),
            ("user_id:token\titem_id:token\n", "no interaction"),
        ],
    )
    def test_wrong_files(self, tmp_path, inter, message):
        with pytest.raises(InputError, match=message):
            self.source(tmp_path, inter).interactions()

    def test_missing_file(self, tmp_path):
        with pytest.raises(InputError, match=r"looked for ml.inter"):
            RecBoleSource(tmp_path, "ml")


def row(user, history="1,2,3", target="4"):
    """A row of the released sequences."""
    return {"user_id": user, "output_id": history, "positive_item_id": target}


class TestRelease:
    def write(self, folder, train=None, test=None, titles=("tea", "rice", "salt", "soap"), meta_titles=None):
        def save(name, value):
            (folder / name).write_text(json.dumps(value))

        save("amazon_vocab_D.json", {str(i): title for i, title in enumerate(titles, start=1)})
        save(
            "amazon_D_llm_meta_1.json",
            [
                {
                    "input": f"[Item Title] : {title}\n\n        ***Instruction***\n x",
                    "output": f"<item_info> item_id:B{i}\n- description:about {title}\n"
                    '- details:"Brand": "X" </item_info>',
                }
                for i, title in enumerate(meta_titles or titles, start=1)
            ],
        )
        rows = train or [{"user_id": "u", "output_id": "1", "positive_item_id": "2"}]
        save("amazon_D_sasrec_train_1.json", rows)
        save("amazon_D_sasrec_test_1.json", test or [{"user_id": "u", "output_id": "1,2,3", "positive_item_id": "4"}])
        purchase = (
            "title:tea\n- item_id:B1\n- description:two\nlines\n- details:\n- review:nice & warm\n- rating:Good\n\n"
        )
        save(
            "amazon_D_llm_train_case_1.json",
            [
                {
                    "input": f"[Purchase History] : {purchase}[Candidate List]: ...",
                    "output_id": "1",
                    "positive_item_id": "2",
                }
            ],
        )

    def test_sequences_items_and_reviews(self, tmp_path):
        self.write(tmp_path)
        catalog, (sequence,) = assemble(ReleaseSource(tmp_path, "D"), KEEP_ALL)
        assert catalog.ids == ("B1", "B2", "B3", "B4")
        assert (catalog["B2"].title, catalog["B2"].description, catalog["B2"].details) == (
            "rice",
            "about rice",
            '"Brand": "X"',
        )
        assert [entry.item_id for entry in sequence.interactions] == ["B1", "B2", "B3", "B4"]
        assert (sequence.interactions[0].review_title, sequence.interactions[0].rating) == ("nice & warm", 4.0)
        assert sequence.target("train").item_id == "B2"
        assert sequence.target("valid").item_id == "B3"
        assert sequence.target("test").item_id == "B4"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"test": [{"user_id": "u", "output_id": "2,1", "positive_item_id": "4"}]}, "does not begin with its row"),
            ({"test": [{"user_id": "w", "output_id": "1,2", "positive_item_id": "4"}]}, "do not list the same users"),
            ({"test": [{"user_id": "u", "output_id": "1,x", "positive_item_id": "4"}]}, "row 1: expected item indices"),
            ({"test": [{"user_id": "u", "output_id": "1,9", "positive_item_id": "4"}]}, r"outside 1\.\.4"),
            ({"meta_titles": ("tea", "rice", "salt", "sand")}, "row 4: title 'sand', but item 4 .* is 'soap'"),
        ],
    )
    def test_files_that_do_not_fit(self, tmp_path, options, message):
        self.write(tmp_path, **options)
        with pytest.raises(InputError, match=message):
            ReleaseSource(tmp_path, "D").interactions()

    def test_released_prompts_and_sequences(self, tmp_path):
        train = [row("u", "1", "2"), row("v", "1,x", "1")]
        self.write(tmp_path, train=train, test=[row("u"), row("v", "1,3,1", "4")])
        shown = "title:a\n- item_id:B4\n- details:- item_id:B2\n\ntitle:b\n- item_id:B1\n"
        prompt = {"input": f"[Purchase History] : - item_id:B3\n[Candidate List]: {shown}", **row("u"), "output": "x"}
        (tmp_path / "amazon_D_llm_test_1.json").write_text(json.dumps([prompt]))
        source = ReleaseSource(tmp_path, "D")
        assert source.prompts("llm_test") == [ReleasedPrompt(("B1", "B2", "B3"), ("B4", "B1"), "B4", "x")]
        assert source.sequences("train") == [("B1", "B2"), ()]
        assert source.sequences("test") == [("B1", "B2", "B3", "B4"), ("B1", "B3", "B1", "B4")]
        (tmp_path / "amazon_D_llm_test_1.json").write_text(json.dumps([{**prompt, "positive_item_id": "2"}]))
        with pytest.raises(InputError, match="2 candidates in `input`, and the target is none of them"):
            ReleaseSource(tmp_path, "D").prompts("llm_test")
        (tmp_path / "amazon_D_llm_test_1.json").unlink()
        with pytest.raises(InputError, match=r"no file amazon_D_llm_test\*\.json"):
            ReleaseSource(tmp_path, "D").prompts("llm_test")

    def test_a_folder_is_no_file(self, tmp_path):
        self.write(tmp_path)
        (tmp_path / "amazon_vocab_D.json").unlink()
        (tmp_path / "amazon_vocab_D.json").mkdir()
        with pytest.raises(InputError, match=r"no file named amazon_vocab_D\*.json"):
            ReleaseSource(tmp_path, "D")

    @pytest.mark.parametrize(
        ("odd", "kind"),
        [
            ("x", "row that is no object"),
            (row(None), "row whose user_id is not text, skipped"),
            (row(1.0), "row whose user_id is not text, skipped"),
            (row("u"), "user with several rows, first kept"),
            (row("v", "1_0"), "row without a history and a target, skipped"),
            ({"user_id": "v", "output_id": [1], "positive_item_id": {}}, "row without a history and a target, skipped"),
            (row("v", "2,3"), "row that does not continue its training row, skipped"),
            (row("w"), "row of another user than its training row, skipped"),
        ],
    )
    def test_one_odd_row_is_counted_and_the_others_are_read(self, tmp_path, odd, kind):
        train = [{"user_id": user, "output_id": "1", "positive_item_id": "2"} for user in "uv"]
        if isinstance(odd, dict) and odd["user_id"] == "u":
            train[1]["user_id"] = "u"
        test = [{"user_id": "u", "output_id": "1,2,3", "positive_item_id": "4"}, odd]
        self.write(tmp_path, train=train, test=test)
        source = ReleaseSource(tmp_path, "D")
        table = source.interactions()
        assert (table.users.to_list(), len(table)) == (["u"], 4)
        assert source.problems.counts[kind] == 1

    def test_an_odd_prompt_loses_its_reviews_only(self, tmp_path):
        self.write(tmp_path)
        (tmp_path / "amazon_D_llm_train_case_1.json").write_text('[7, {"input": {}, "output_id": "1"}]')
        source = ReleaseSource(tmp_path, "D")
        assert len(source.interactions()) == 4
        assert source.problems.counts["prompt without a history and a target, its reviews left out"] == 2

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("vocab_D", {str(i): 7 for i in range(1, 5)}, "row 1: expected an object, and a title"),
            ("D_llm_meta_1", [1, 2, 3, 4], "row 1: expected an object, and a title"),
            ("D_sasrec_test_1", {"a": 1}, "expected a list of objects"),
        ],
    )
    def test_files_of_another_kind(self, tmp_path, name, value, message):
        self.write(tmp_path)
        (tmp_path / f"amazon_{name}.json").write_text(json.dumps(value))
        with pytest.raises(InputError, match=message):
            ReleaseSource(tmp_path, "D").interactions()

    def test_encodings(self, tmp_path):
        self.write(tmp_path)
        vocab = tmp_path / "amazon_vocab_D.json"
        vocab.write_text(vocab.read_text(), encoding="utf-8-sig")
        assert len(ReleaseSource(tmp_path, "D").interactions()) == 4
        vocab.write_bytes('{"1": "thé"}'.encode("latin-1"))
        with pytest.raises(InputError, match=r"amazon_vocab_D.json, line 1: not utf-8.*--encoding"):
            ReleaseSource(tmp_path, "D")

    def test_user_with_too_few_items(self, tmp_path):
        self.write(
            tmp_path,
            train=[{"user_id": "u", "output_id": "1", "positive_item_id": "2"}],
            test=[{"user_id": "u", "output_id": "1", "positive_item_id": "2"}],
        )
        with pytest.raises(
            InputError, match=r"no user is left of 2 interactions: none has at least 3 items.*lower min_history"
        ):
            assemble(ReleaseSource(tmp_path, "D"), KEEP_ALL)

    def test_missing_and_doubled_files(self, tmp_path):
        with pytest.raises(InputError, match=r"no file named amazon_D_sasrec_train\*.json"):
            ReleaseSource(tmp_path, "D")
        self.write(tmp_path)
        (tmp_path / "amazon_D_sasrec_train_2.json").write_text("[]")
        with pytest.raises(InputError, match="2 files"):
            ReleaseSource(tmp_path, "D")


class TestAmazon5Core:
    def write(self, folder, change=lambda rows: rows, end="\n"):
        """Ten users with six interactions each, the last two at one moment; returns the rows in their order."""
        rows = [[f"U{u}", f"B{(u + t * 3) % 7}", "4.0", str(1000 + min(t, 4))] for u in range(10) for t in range(6)]
        parts = {"train": [r for n, r in enumerate(rows) if n % 6 < 4], "valid": rows[4::6], "test": rows[5::6]}
        for part, part_rows in parts.items():
            listed = ["user_id,parent_asin,rating,timestamp", *(",".join(row) for row in change(part_rows))]
            (folder / f"D.{part}.csv").write_text(end.join(listed) + end, newline="")
        write_lines(folder / "meta_D.jsonl", [meta(f"B{i}", f"Tea {i}") for i in range(7)])
        return rows

    @pytest.mark.parametrize(("few", "end"), [(1, "\n"), (250, "\n"), (1, "\r\n")])
    def test_the_three_files_are_one_sequence_per_user(self, tmp_path, monkeypatch, few, end):
        monkeypatch.setattr(amazon_module, "_FEW_LINES", few)
        rows = self.write(tmp_path, end=end)
        source = Amazon5Core(tmp_path, "D")
        catalog, sequences = assemble(source, KEEP_ALL)
        assert source.problems.counts == {}
        assert len(catalog) == 7
        for user, sequence in enumerate(sequences):
            expected = [(row[1], int(row[3]), 4.0) for row in rows[6 * user : 6 * user + 6]]
            assert [(e.item_id, e.timestamp, e.rating) for e in sequence.interactions] == expected

    def test_texts_come_from_the_raw_reviews(self, tmp_path):
        rows = self.write(tmp_path)
        reviews = [review(u, i, int(t), text=f"{u} likes {i}") for u, i, _, t in rows if u != "U3"]
        others = [review("U1", "B1", 77), review("V", "B1", 1000), *reviews, {**reviews[0], "text": "again"}]
        write_lines(tmp_path / "D.jsonl.gz", others)
        source = Amazon5Core(tmp_path, "D")
        assert tmp_path / "D.jsonl.gz" in source.files
        _, sequences = assemble(source, KEEP_ALL)
        for sequence in sequences:
            for entry in sequence.interactions:
                likes = f"{sequence.user_id} likes {entry.item_id}"
                assert entry.review_text == (likes if sequence.user_id != "U3" else "")
        assert source.problems.counts == {"interaction without a review in the raw file, kept without text": 6}

    @pytest.mark.parametrize("few", [1, 250])
    def test_damaged_rows_are_counted(self, tmp_path, monkeypatch, few):
        monkeypatch.setattr(amazon_module, "_FEW_LINES", few)
        odd = ["U0,B1", "U0,B1,4.0,soon", "", ",B1,4.0,1000", "U0,B1,9,1000", 'U0,"B1",3.0,2000', "U0,B1,4.0,1,x"]
        odd += ["U0,B\r1,4.0,1000", "U0,B1,4.0," + "7" * 200_000]
        self.write(tmp_path, lambda rows: [*rows[:5], *(line.split(",") for line in odd), *rows[5:]])
        source = Amazon5Core(tmp_path, "D")
        assert len(source.interactions()) == 60 + 3 * 2
        assert source.problems.counts == {
            "row with another number of columns than the header": 12,
            "review whose timestamp is not a time": 3,
            "review without user_id": 3,
            "review with a rating that is not 1 to 5, kept without": 3,
        }
        assert source.problems.first["review without user_id"] == "D.train.csv, line 10"

    def test_a_further_column_is_not_read(self, tmp_path):
        self.write(tmp_path)
        for path in tmp_path.glob("*.csv"):
            header, *rows = path.read_text().splitlines()
            path.write_text("\n".join([f"{header},history", *(f"{row},B1 B2" for row in rows)]))
        assert len(Amazon5Core(tmp_path, "D").interactions()) == 60

    def test_wrong_files(self, tmp_path):
        self.write(tmp_path)
        with pytest.raises(InputError, match=r"looked for Tea.train.csv; the folder has the domain D$"):
            Amazon5Core(tmp_path, "Tea")
        (tmp_path / "D.valid.csv").write_text("user_id,parent_asin,rating,timestamp\n")
        with pytest.raises(InputError, match=r"D.valid.csv: no record fits the Amazon Reviews 2023 5-core schema"):
            Amazon5Core(tmp_path, "D").interactions()
        (tmp_path / "D.valid.csv").write_text("user,item\n1,2\n")
        with pytest.raises(InputError, match=r"D.valid.csv, line 1: not the header of a published 5-core.*expected"):
            Amazon5Core(tmp_path, "D").interactions()


def test_a_source_without_interactions_cannot_be_defined():
    with pytest.raises(TypeError, match="source empty: Empty needs rows, or interactions"):

        class Empty(Source, name="empty"):
            pass

    assert "empty" not in REGISTERED
