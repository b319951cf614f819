"""Odd records: each is counted by kind and skipped or cleaned, none ends or misleads the reading of the others."""

import gzip
import json
import math

import pytest

from prepared import assemble
from twice_rec import prompts
from twice_rec.answer_format import parse
from twice_rec.catalog import Outcome
from twice_rec.data.recipe import PrepareRecipe
from twice_rec.data.sequences import SequenceConfig
from twice_rec.data.sources import lines
from twice_rec.data.sources.amazon import Amazon2014, Amazon2023
from twice_rec.data.sources.base import SourceFormat, clean_text
from twice_rec.data.sources.recbole import RecBoleSource
from twice_rec.data.sources.values import as_number, as_time, clean_price, is_program
from twice_rec.errors import InputError

KEEP_ALL = SequenceConfig(untitled_items="keep", k_core=1, min_history=3, max_history=None)
TITLES = {f"B{i}": f"Tea number {i}" for i in range(6)}
REVIEWS = [
    {"user_id": f"U{user}", "parent_asin": item, "timestamp": 1_600_000_000_000 + time, "rating": 4.0}
    for user in range(5)
    for time, item in enumerate(TITLES)
]
ITEMS = [{"parent_asin": item, "title": title, "price": 9.99} for item, title in TITLES.items()]


def write_json_lines(path, rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")


def amazon(folder, reviews=REVIEWS, items=ITEMS, **options):
    write_json_lines(folder / "D.jsonl", reviews)
    write_json_lines(folder / "meta_D.jsonl", items)
    return Amazon2023(folder, "D", **options)


def recbole(folder, change=lambda row: row, item=lambda row: row, encoding="utf-8", end="\n", **options):
    """RecBole files of the same; `change` and `item` change a row, a list of texts."""
    rows = [change([r["user_id"], r["parent_asin"], "4", str(r["timestamp"] / 1000)]) for r in REVIEWS]
    items = [item([i["parent_asin"], i["title"], "9.99"]) for i in ITEMS]
    for name, header, table in (
        ("D.inter", "user_id:token\titem_id:token\trating:float\ttimestamp:float", rows),
        ("D.item", "item_id:token\ttitle:token_seq\tprice:float", items),
    ):
        text = end.join([header, *("\t".join(row) for row in table)]) + end
        (folder / name).write_bytes(text.encode(encoding))
    return RecBoleSource(folder, "D", **options)


def first(value, column):
    """A change of the first user's first row only."""
    done = []

    def change(row):
        if not done:
            done.append(True)
            return [*row[:column], value, *row[column + 1 :]]
        return row

    return change


def in_every_row(column, change):
    return lambda row: [*row[:column], change(row[column]), *row[column + 1 :]]


class TestIds:
    @pytest.mark.parametrize("written", ["{} ", " {}", "\t{}", "\u00a0{}\u3000", "{}\n"])
    def test_blanks_around_ids_go_in_both_files(self, tmp_path, written):
        reviews = [{**row, "parent_asin": written.format(row["parent_asin"])} for row in REVIEWS]
        items = [{**row, "parent_asin": written.format(row["parent_asin"])} for row in ITEMS]
        source = amazon(tmp_path, reviews, items)
        catalog, sequences = assemble(source, KEEP_ALL)
        assert {item.item_id: item.title for item in catalog} == TITLES
        assert len(sequences) == 5
        assert source.problems.counts["item id with blanks around it or another Unicode form, put right"] == 6

    def test_every_right_answer_is_a_hit(self, tmp_path):
        source = recbole(tmp_path, in_every_row(1, "{} [x] (2".format), in_every_row(0, "{} [x] (2".format))
        catalog, _ = assemble(source, KEEP_ALL)
        for item in catalog:
            answer = parse(prompts.item_answer(item))
            assert catalog.outcome(answer, catalog.ids, item.item_id) is Outcome.HIT

    @pytest.mark.parametrize("odd", ["<item_id>", "B</item_id>", "a <think> b", "B\u200b0", "B\x000"])
    def test_an_item_id_that_does_not_come_back_is_refused_and_counted(self, tmp_path, odd):
        source = recbole(tmp_path, first(odd, 1))
        catalog, sequences = assemble(source, KEEP_ALL)
        assert odd not in catalog
        assert [len(sequence.interactions) for sequence in sequences] == [5, 6, 6, 6, 6]
        assert source.problems.counts["item id that an answer does not give back"] == 1
        assert source.problems.counts["interaction dropped because of its ids"] == 1

    def test_ids_that_become_the_same_are_one_and_named(self, tmp_path):
        source = recbole(tmp_path, first("B0 ", 1))
        table = source.interactions()
        assert table.items.to_list() == list(TITLES)
        assert source.problems.first["item ids that are the same once put right"] == "'B0 ' and 'B0'"

    def test_an_item_described_twice_is_named(self, tmp_path):
        source = recbole(tmp_path, item=first("B1 ", 0))
        assert source.titled(set(TITLES)) == set(TITLES) - {"B0"}
        assert source.problems.first["item described twice, first kept"] == "D.item, line 3: B1"

    @pytest.mark.parametrize("odd", [7, 1.0, True, ["U0"], {"id": "U0"}])
    @pytest.mark.parametrize("key", ["user_id", "parent_asin"])
    def test_an_id_that_is_no_text_is_no_other_id(self, tmp_path, key, odd):
        source = amazon(tmp_path, [*REVIEWS, {**REVIEWS[0], key: odd}])
        assert len(source.interactions()) == len(REVIEWS)
        assert source.problems.counts == {f"review whose {key} is not plain text": 1}

    def test_ids_in_composed_letters_because_tokenizers_compose_them(self, tmp_path):
        source = recbole(tmp_path, in_every_row(1, "{}e\u0301".format), in_every_row(0, "{}\u00e9".format))
        catalog, _ = assemble(source, KEEP_ALL)
        assert {item.item_id: item.title for item in catalog} == {f"{i}\u00e9": title for i, title in TITLES.items()}


class TestTexts:
    @pytest.mark.parametrize(
        "text",
        [
            "I <3 tea and coffee > water",
            "a < b > c",
            "x <y and z> w",
            "<name> [INST] <|im_end|> <eos>",
            "if a<b and b>c",
            "<i and b>",
            "see <http://a.b>",
            "<w/Michael Jackson>",
        ],
    )
    def test_text_between_angle_brackets_is_kept(self, text):
        assert clean_text(text) == text

    @pytest.mark.parametrize(
        ("text", "clean"),
        [
            ("a<br />b <B>c</B>", "a b c"),
            ("<a href='x' target=_blank>tea</a> &amp; <td nowrap>c", "tea & c"),
            ("a &lt;b&gt; c", "a c"),
            ("<script>var x = 1 < 2;</script>Tea<style>.a{b:c}</style>", "Tea"),
            ("a<!-- no -->b", "a b"),
            ("a<think>b</item_id>c &lt;item_nm&gt;", "a b c"),
            ("\u200b\u200b", ""),
            ("\u200f \ufeff", ""),
            ("te\u200da \U0001f468\u200d\U0001f373", "te\u200da \U0001f468\u200d\U0001f373"),
            ("a\x00b\x07c\n\td \ud83d", "a b c d ?"),
        ],
    )
    def test_markup_answer_tags_and_control_characters_go(self, text, clean):
        assert clean_text(text) == clean

    def test_no_nesting_makes_an_answer_tag(self):
        for text in ("<<b>think>", "<th<br>ink>", "<item_<think>id>", "&lt;think&amp;gt;"):
            assert parse(clean_text(text)).counts == {}

    def test_a_title_with_brackets_earns_full_marks(self, tmp_path):
        source = amazon(tmp_path, items=[{**item, "title": f"{item['title']} <new> <eos>"} for item in ITEMS])
        catalog, _ = assemble(source, KEEP_ALL)
        answer = parse(prompts.rationale_answer("they like tea", catalog["B0"]))
        assert (answer.title, answer.other_tags) == ("Tea number 0 <new> <eos>", 0)
        assert parse("<b> <item_nm> <eos> </item_nm> <c>").other_tags == 2

    @pytest.mark.parametrize(
        "title",
        [
            "<script>var aPageStart = (new Date()).getTime();</script> ",
            "var aPageStart = (new Date()).getTime();",
            ".a-box-inner{background-color:#fff}#alohaBuyBoxWidget .selected{color:#111}",
            "<br/>",
            '(function(f) {var _np=(window.P._namespace("x"));',
            "<style>.a{}</style>",
        ],
    )
    def test_a_script_or_style_sheet_is_no_title(self, tmp_path, title):
        source = amazon(tmp_path, items=[{**ITEMS[0], "title": title}, *ITEMS[1:]])
        assert source.titled(set(TITLES)) == set(TITLES) - {"B0"}
        kind = "item whose title is only markup, a page script or a style sheet, taken as none"
        assert source.problems.counts == {kind: 1, "item without title": 1}

    @pytest.mark.parametrize(
        "title", ["Set {3 pieces: red}", "C# in .NET; a guide", "Window.com: the book", "#1 Dad; mug"]
    )
    def test_other_titles_are_no_scripts(self, title):
        assert not is_program(title)

    @pytest.mark.parametrize(
        ("price", "clean"),
        [
            (9.5, "9.5"),
            (7, "7"),
            ("$9.99", "$9.99"),
            ("$5 - $7", "$5 - $7"),
            ("from 7", "from 7"),
            ("\u20ac 3,50", "\u20ac 3,50"),
            ("None", None),
            ("nan", None),
            (math.nan, None),
            (math.inf, None),
            ("-", None),
            ("\u2014", None),
            ("", None),
            (None, None),
            (True, None),
            (["9"], None),
            ({"a": 9}, None),
            ("-1", None),
            (-1.0, None),
            ("N/A", None),
            (".a-box-inner{background-color:#fff}", None),
            (".x{width:1px} $5", None),
            ("<b>9", "9"),
            ("9" * 50, None),
        ],
    )
    def test_prices(self, price, clean):
        assert clean_price(price) == clean

    def test_prices_that_are_none_are_counted(self, tmp_path):
        source = recbole(tmp_path, item=first("None", 2))
        assert [item.price for item in source.described({"B0", "B1"}, source.problems)] == ["", "9.99"]
        assert source.problems.first == {"item with a price that is none, left out": "D.item, line 2: 'None'"}

    @pytest.mark.parametrize(
        ("key", "odd"),
        [
            ("title", 7),
            ("title", {"a": 1}),
            ("categories", {"a": 1}),
            ("categories", [{"a": 1}]),
            ("categories", 7),
            ("categories", [[], 3]),
            ("description", {"a": 1}),
            ("features", 7.5),
            ("store", {"a": 1}),
            ("details", [1]),
            ("details", json.dumps([1])),
            ("price", {"a": 1}),
        ],
    )
    def test_an_odd_field_of_an_item_costs_that_field_only(self, tmp_path, key, odd):
        source = amazon(tmp_path, items=[{**ITEMS[0], key: odd}, *ITEMS[1:]])
        found = {item.item_id: item for item in source.described(set(TITLES), source.problems)}
        assert set(found) == set(TITLES)
        assert found["B0"].title == ("" if key == "title" else TITLES["B0"])
        assert found["B0"].categories == ()
        assert len(source.problems.counts) == (0 if odd == [[], 3] else 1)

    def test_a_category_that_is_a_text_is_one_category(self, tmp_path):
        source = amazon(tmp_path, items=[{**ITEMS[0], "categories": "Tea &amp; Coffee"}])
        assert [item.categories for item in source.items({"B0"})] == [("Tea & Coffee",)]


class TestNumbers:
    @pytest.mark.parametrize(
        ("scale", "rating", "read"),
        [
            ([1, 5], "4", 4.0),
            ([1, 5], "0", None),
            ([1, 5], "-1", None),
            ([1, 5], "6", None),
            ([1, 5], "10", None),
            ([1, 5], "nan", None),
            ([1, 5], "inf", None),
            ([1, 5], "1e400", None),
            ([1, 5], "four", None),
            ([1, 5], "1_0", None),
            ([1, 10], "10", 5.0),
            ([1, 10], "1", 1.0),
            ([1, 10], "5.5", 3.0),
            ([1, 10], "11", None),
            ([0, 100], "75", 4.0),
        ],
    )
    def test_ratings_on_the_scale_of_the_recipe(self, tmp_path, scale, rating, read):
        source = recbole(tmp_path, first(rating, 2), form=SourceFormat(rating_scale=scale))
        _, sequences = assemble(source, KEEP_ALL)
        assert sequences[0].interactions[0].rating == read
        kind = f"review with a rating that is not {scale[0]} to {scale[1]}, kept without"
        if read is None:
            assert source.problems.first[kind] == f"D.inter, line 2: {rating!r}; see rating_scale"

    @pytest.mark.parametrize("time", ["1e300", "-5", "nan", "inf", "", "yesterday", "2020-09-13", "1600000000000000"])
    def test_a_row_without_a_time_is_dropped_not_put_first(self, tmp_path, time):
        source = recbole(tmp_path, first(time, 3))
        _, sequences = assemble(source, KEEP_ALL)
        assert [entry.item_id for entry in sequences[0].interactions] == ["B1", "B2", "B3", "B4", "B5"]
        assert source.problems.counts == {"row whose timestamp is not a time, dropped": 1}

    def test_a_file_in_which_no_time_can_be_read_is_refused(self, tmp_path):
        with pytest.raises(InputError, match=r"30 x row whose timestamp is not a time.*line 2: '2020-09-13 12:26'"):
            recbole(tmp_path, in_every_row(3, lambda _: "2020-09-13 12:26")).interactions()

    @pytest.mark.parametrize("time", [1e300, -1, math.nan, math.inf, True, [1], {"a": 1}, "yesterday", 10**400])
    def test_times_of_amazon(self, tmp_path, time):
        source = amazon(tmp_path, [{**REVIEWS[0], "timestamp": time}, *REVIEWS[1:]])
        assert len(source.interactions()) == len(REVIEWS) - 1
        assert source.problems.counts == {"review whose timestamp is not a time": 1}

    def test_numbers_that_are_written_as_text(self, tmp_path):
        reviews = [{**row, "timestamp": str(row["timestamp"]), "rating": str(row["rating"])} for row in REVIEWS]
        table, plain = amazon(tmp_path, reviews).interactions(), amazon(tmp_path).interactions()
        assert table.timestamp.tolist() == plain.timestamp.tolist()
        assert table.rating.tolist() == plain.rating.tolist()
        assert (as_number("\u0661"), as_number("1e400"), as_number(" 2.5 "), as_time("2", 1000)) == (
            None,
            None,
            2.5,
            2000,
        )


class TestFiles:
    @pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "gbk", "utf-16", "utf-16-le"])
    def test_another_encoding_is_stated_or_refused(self, tmp_path, encoding):
        text = "Th\u00e9 cr\u00e8me" if encoding != "gbk" else "\u7eff\u8336"
        change = in_every_row(1, f"{text} {{}}".format)
        with pytest.raises(InputError, match=r"(not utf-8|UTF-16).*--encoding latin-1, gbk, utf-16") as caught:
            source = recbole(tmp_path, item=change, encoding=encoding)
            source.titled(set(source.interactions().items))
        assert "\n" not in str(caught.value)
        source.form = SourceFormat(encoding=encoding)
        catalog, _ = assemble(source, KEEP_ALL)
        assert catalog["B0"].title == f"{text} Tea number 0"

    def test_amazon_in_another_encoding(self, tmp_path):
        source = amazon(tmp_path)
        rows = [json.dumps({**item, "title": "Th\u00e9"}, ensure_ascii=False) for item in ITEMS]
        (tmp_path / "meta_D.jsonl").write_bytes("\n".join(rows).encode("latin-1"))
        with pytest.raises(InputError, match=r"meta_D.jsonl, line 1: not utf-8, like 6 of its 6 lines"):
            source.titled(set(TITLES))

    def test_another_encoding_than_the_stated_one(self, tmp_path):
        with pytest.raises(InputError, match=r"D.inter: not utf-16: .*tream does not start with BOM; state the"):
            recbole(tmp_path, form=SourceFormat(encoding="utf-16")).interactions()

    def test_a_single_damaged_line_is_dropped(self, tmp_path):
        source = recbole(tmp_path)
        whole = (tmp_path / "D.inter").read_bytes()
        (tmp_path / "D.inter").write_bytes(whole.replace(b"U0\tB0", b"U0\tB\xff", 1))
        assert len(source.interactions()) == len(REVIEWS) - 1
        assert source.problems.counts == {"line that is not utf-8, dropped": 1}

    def test_byte_order_marks_and_line_ends(self, tmp_path):
        plain = assemble(recbole(tmp_path), KEEP_ALL)[1]
        assert assemble(recbole(tmp_path, encoding="utf-8-sig", end="\r\n"), KEEP_ALL)[1] == plain
        source = amazon(tmp_path, ["\ufeff" + json.dumps(REVIEWS[0]), *REVIEWS[1:]])
        assert len(source.interactions()) == len(REVIEWS)
        assert source.problems.counts == {}

    def test_a_line_without_end_is_skipped(self, tmp_path, monkeypatch):
        monkeypatch.setattr(lines, "LONGEST_LINE", 1000)
        source = amazon(tmp_path, [*REVIEWS[:3], '{"user_id": "' + "x" * 5000, *REVIEWS[3:]])
        assert len(source.interactions()) == len(REVIEWS)
        assert source.problems.counts == {"line of more than 1,000 characters, skipped": 1}

    def test_null_bytes_and_cut_lines(self, tmp_path):
        source = amazon(tmp_path, [REVIEWS[0], "\0" * 50, json.dumps(REVIEWS[1])[:40], "[[" * 99999, *REVIEWS[2:]])
        assert len(source.interactions()) == len(REVIEWS) - 1
        assert source.problems.counts == {"line that does not parse": 3}

    def test_a_cut_gzip_of_recbole_loses_its_last_line_only(self, tmp_path):
        source = recbole(tmp_path)
        whole = (tmp_path / "D.inter").read_bytes()
        (tmp_path / "D.inter").write_bytes(gzip.compress(whole, 0)[:-200])
        table = source.interactions()
        assert 15 < len(table) < len(REVIEWS)
        assert table.timestamp.tolist() == [row["timestamp"] for row in REVIEWS][: len(table)]
        assert list(source.problems.counts) == ["file that is cut off or damaged, read up to there"]

    def test_an_array_is_no_file_of_lines(self, tmp_path):
        with pytest.raises(InputError, match=r"no JSON object \(an array\? jq -c"):
            amazon(tmp_path, [json.dumps(REVIEWS, indent=1)]).interactions()

    def test_a_file_in_which_every_id_is_a_number_is_refused_with_the_reason(self, tmp_path):
        with pytest.raises(InputError, match=r"30 x review whose user_id is not plain text \(first: D.jsonl, line 1\)"):
            amazon(tmp_path, [{**row, "user_id": 7} for row in REVIEWS]).interactions()

    def test_plain_files_of_2014(self, tmp_path):
        row = {"reviewerID": "U", "asin": "A", "unixReviewTime": 10, "overall": 4}
        write_json_lines(tmp_path / "D_5.json", [row])
        write_json_lines(tmp_path / "meta_D.json", [{"asin": "A", "title": "Tea"}])
        assert len(Amazon2014(tmp_path, "D").interactions()) == 1

    def test_a_column_twice_in_a_header(self, tmp_path):
        recbole(tmp_path)
        (tmp_path / "D.inter").write_text("user_id:token\titem_id:token\titem_id:token\nu\ta\tb\n")
        with pytest.raises(InputError, match="has the column item_id twice"):
            RecBoleSource(tmp_path, "D").interactions()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"encoding": "utf-99"}, "encoding is 'utf-99', which Python does not know"),
        ({"encoding": "base64"}, "which Python does not know"),
        ({"rating_scale": [5.0, 1.0]}, "rating_scale is"),
        ({"rating_scale": [1.0]}, "rating_scale is"),
    ],
)
def test_recipes_refuse_what_cannot_work(values, message):
    with pytest.raises(ValueError, match=message):
        PrepareRecipe(run_dir="x", domain="D", seed=1, source="recbole", source_dir="x", **values)
