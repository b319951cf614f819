"""The id map, and the one notion of a hit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twice_rec.answer_format import parse
from twice_rec.catalog import ItemCatalog, Outcome
from twice_rec.errors import InputError
from twice_rec.records import Item

words = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
items = st.lists(
    st.builds(Item, item_id=words, title=words, description=st.just("d"), categories=st.lists(words).map(tuple)),
    min_size=1,
    unique_by=lambda item: item.item_id,
)


@given(items)
def test_index_round_trip(given_items):
    catalog = ItemCatalog(given_items)
    assert [catalog.at(index).item_id for index in range(1, len(catalog) + 1)] == list(catalog.ids)
    assert catalog.indices(catalog.ids) == list(range(1, len(catalog) + 1))
    assert all(catalog[item.item_id] is item for item in given_items)


@given(items)
def test_file_round_trip(tmp_path_factory, given_items):
    path = tmp_path_factory.mktemp("catalog") / "catalog.jsonl"
    ItemCatalog(given_items).save(path)
    again = ItemCatalog.load(path)
    assert list(again) == given_items
    assert again.fingerprint == ItemCatalog(given_items).fingerprint


def test_padding_is_no_item():
    with pytest.raises(IndexError, match=r"1\.\.1, got 0"):
        ItemCatalog([Item("A", "Tea")]).at(0)


def test_fingerprint_depends_on_order():
    a, b = Item("A", "Tea"), Item("B", "Rice")
    assert ItemCatalog([a, b]).fingerprint != ItemCatalog([b, a]).fingerprint


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no items"),
        ([Item("", "Tea")], "row 1: an item needs an id and a title"),
        ([Item("A", "")], "row 1: an item needs an id and a title"),
        ([Item("A", "Tea"), Item("A", "Rice")], "row 2: id A is in row 1 too"),
    ],
)
def test_bad_catalogues(rows, message):
    with pytest.raises(InputError, match=message):
        ItemCatalog(rows)


def test_item_without_id_in_a_file_names_file_and_line(tmp_path):
    path = tmp_path / "catalog.jsonl"
    path.write_text('{"item_id": "A", "title": "Tea"}\n{"title": "Rice"}\n')
    with pytest.raises(InputError, match=r"catalog.jsonl, line 2: not a Item: item_id: Field required"):
        ItemCatalog.load(path)


def test_ambiguous_titles():
    catalog = ItemCatalog([Item("A", "Green  Tea"), Item("B", "green tea"), Item("C", "Rice")])
    assert catalog.ambiguous_titles == 1


CATALOG = ItemCatalog([Item("A", "Green Tea"), Item("B", "Rice"), Item("C", "Rice"), Item("D", "Salt")])


@pytest.mark.parametrize(
    ("title", "item_id", "outcome"),
    [
        ("Green Tea", "A", Outcome.HIT),
        ("green  TEA", "A", Outcome.HIT),
        ("Rice", "B", Outcome.MISS),
        ("Rice", "C", Outcome.OUTSIDE),  # the same title as B, but C was not asked about
        ("Salt", "D", Outcome.OUTSIDE),
        ("Rice", "A", Outcome.MALFORMED),  # the title is another item's
        ("Gren Te", "A", Outcome.HIT),  # nobody's title: the id decides
        ("Green Tea", "Z", Outcome.OUTSIDE),
        ("Green Tea", "", Outcome.MALFORMED),
    ],
)
def test_outcome(title, item_id, outcome):
    answer = parse(f"<item_nm> {title} </item_nm> <item_id> {item_id} </item_id>")
    assert CATALOG.outcome(answer, ["A", "B"], "A") is outcome


def test_two_ids_are_malformed():
    answer = parse("<item_id> A </item_id> <item_id> A </item_id>")
    assert CATALOG.outcome(answer, ["A", "B"], "A") is Outcome.MALFORMED
