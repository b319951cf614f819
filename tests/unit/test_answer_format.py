"""The answer format: what goes in comes out, and nothing crashes the parser."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from twice_rec import answer_format

# Any text that holds none of the tags, so that it can be rendered.
free_text = st.text().filter(
    lambda text: not any(t in text for f in answer_format.FIELDS for t in (f"<{f}>", f"</{f}>"))
)


@given(st.dictionaries(st.sampled_from(sorted(answer_format.FIELDS)), free_text))
@example({"think": "a < b and </ b", "item_nm": "<b>bold</b>", "item_id": ""})
def test_render_then_parse_returns_what_went_in(values):
    parsed = answer_format.parse(answer_format.render(values))
    assert parsed.fields == {field: text.strip() for field, text in values.items()}


@given(st.text(alphabet="<>/thinkem_dfo anmi", max_size=300) | st.text())
@example("<think>" * 3 + "</think>")
@example("</think><think>")
@example("<" * 5000)
def test_parser_takes_any_text(text):
    parsed = answer_format.parse(text)
    assert set(parsed.fields) <= set(answer_format.FIELDS)
    assert parsed.other_tags >= 0


@given(free_text)
def test_without_tags_can_be_rendered(text):
    noisy = f"<think>{text}</think></item_id><b>"
    assert answer_format.render({"think": answer_format.without_tags(noisy)})


def test_complete_answer():
    parsed = answer_format.parse("<think> likes tea </think> <item_nm> Green Tea </item_nm> <item_id> B01 </item_id>")
    assert (parsed.rationale, parsed.title, parsed.item_id) == ("likes tea", "Green Tea", "B01")
    assert parsed.is_complete(answer_format.WITH_RATIONALE)
    assert parsed.other_tags == 0
    assert set(parsed.counts.values()) == {1}


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("<think> cut off", "think"),
        ("<think> a </think> <think> b </think>", "think"),
        ("</item_id> B01 <item_id>", "item_id"),
        ("<item_id> B01 </item_id> <item_id> B02 </item_id>", "item_id"),
        ("<ITEM_ID> B01 </ITEM_ID>", "item_id"),
    ],
)
def test_incomplete_elements_are_not_fields(text, missing):
    assert missing not in answer_format.parse(text).fields


def test_empty_element_is_not_complete():
    assert not answer_format.parse("<item_nm> Tea </item_nm> <item_id>  </item_id>").is_complete(
        answer_format.ITEM_ONLY
    )


def test_other_tags_are_counted():
    parsed = answer_format.parse("<answer> <b> <item_id> B01 </item_id> </answer> 3 < 4 > 2")
    assert parsed.other_tags == 3


def test_render_refuses_a_tag_in_the_text():
    with pytest.raises(ValueError, match="contains the tag </think>"):
        answer_format.render({"think": "so </think> then"})


def test_description_parses_as_the_format():
    assert answer_format.parse(answer_format.describe(answer_format.WITH_RATIONALE)).is_complete(
        answer_format.WITH_RATIONALE
    )
