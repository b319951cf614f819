"""What annotators answer: anything may come, and only what is complete and points at what is there gets through."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twice_rec import answer_format
from twice_rec.prompts import ANNOTATION_FIELDS, RUBRIC
from twice_rec.rationales.answers import (
    CHECK_SCHEMA,
    Malformed,
    annotation_schema,
    parse_annotation,
    parse_check,
    parse_pick,
    pick_schema,
)
from twice_rec.records import VERDICTS

GOOD = {"rationale": "They liked the tea.", "verdict": "relevant", "evidence": [2, 1, 2], "confidence": 0.5}


def answer(**changes):
    return json.dumps({**GOOD, **changes})


def test_a_complete_answer():
    found = parse_annotation(answer(), 3)
    assert (found.rationale, found.verdict, found.evidence, found.confidence) == (
        "They liked the tea.",
        "relevant",
        (1, 2),
        0.5,
    )


@pytest.mark.parametrize(
    "text",
    [
        f"```json\n{answer()}\n```",
        f"<think>The set {{1, 2}} matters.</think> Sure! {answer()} Anything else?",
        f"{answer()}\n{answer()}",
        answer(verdict=" Relevant "),
        answer(rationale="They\nliked\t the tea."),
        answer(rationale="They <b>liked</b> the <think>tea.</think>"),
    ],
)
def test_what_models_put_around_an_answer_does_not_matter(text):
    assert parse_annotation(text, 3).rationale == "They liked the tea."


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "no complete JSON object"),
        ("I cannot say.", "no complete JSON object"),
        (answer()[:-9], "no complete JSON object"),
        ("[1, 2]", "no complete JSON object"),
        ('{"rationale": "x", "verdict": "weak", "evidence": []}', "no key confidence"),
        (answer() + answer(confidence=0.6), "several JSON objects that differ"),
        (answer(verdict="maybe"), 'verdict must be one of relevant, weak, irrelevant, not "maybe"'),
        (answer(verdict=["relevant"]), "verdict must be one of"),
        (answer(rationale=["x"]), "rationale must be text"),
        (answer(rationale="  \n "), "rationale is empty"),
        (answer(rationale="<b></b>"), "rationale is empty"),
        (answer(confidence=1.01), "confidence must be a number from 0 to 1, not 1.01"),
        (answer(confidence=True), "confidence must be a number"),
        (answer(confidence="high"), "confidence must be a number"),
        (answer(confidence=float("nan")), "confidence must be a number"),
        (answer(evidence=[0]), "evidence holds 0, but the purchases are numbered 1 to 3"),
        (answer(evidence=[4]), "evidence holds 4, but the purchases are numbered 1 to 3"),
        (answer(evidence=[True]), "evidence holds true"),
        (answer(evidence=["1"]), 'evidence holds "1"'),
        (answer(evidence=[1.5]), "evidence holds 1.5"),
        (answer(evidence=2), "evidence must be a list"),
        (answer(evidence=[]), "a relevant verdict needs the number of at least one purchase"),
        ('{"a": ' * 5000, "no complete JSON object"),
        ("[" * 100_000, "no complete JSON object"),
        (answer().replace("0.5", "9" * 5000), "no complete JSON object"),
    ],
)
def test_the_fault_is_named(text, fault):
    with pytest.raises(Malformed, match=".*") as caught:
        parse_annotation(text, 3)
    assert fault in str(caught.value)


def test_other_verdicts_need_no_evidence():
    assert parse_annotation(answer(verdict="irrelevant", evidence=[]), 3).evidence == ()


def test_halves_of_surrogate_pairs_can_be_stored():
    parse_annotation(
        '{"rationale": "a \\ud83d b", "verdict": "weak", "evidence": [], "confidence": 1}', 1
    ).rationale.encode()


def test_check():
    held = dict.fromkeys(RUBRIC, True)
    assert parse_check(json.dumps(held)) == ()
    assert parse_check(json.dumps({**held, "causal": False, "grounded": False})) == ("grounded", "causal")
    with pytest.raises(Malformed, match="causal must be true or false, not 1"):
        parse_check(json.dumps({**held, "causal": 1}))
    with pytest.raises(Malformed, match="no key specific"):
        parse_check(json.dumps({name: True for name in RUBRIC if name != "specific"}))


def test_pick():
    assert parse_pick('{"choice": 3}', 3) == 2
    assert parse_pick('```json\n{"choice": 1}\n```', 3) == 0
    for text in ('{"choice": 0}', '{"choice": 4}', '{"choice": "2"}', '{"choice": true}', '{"choice": 1.0}'):
        with pytest.raises(Malformed, match="choice must be the number of a candidate, 1 to 3"):
            parse_pick(text, 3)
    with pytest.raises(Malformed, match="no key choice"):
        parse_pick('{"pick": 1}', 3)
    assert pick_schema(3)["properties"] == {"choice": {"type": "integer", "enum": [1, 2, 3]}}


def test_schemas_ask_for_what_the_parser_wants():
    for schema, fields in ((annotation_schema(3), ANNOTATION_FIELDS), (CHECK_SCHEMA, RUBRIC)):
        assert list(schema["properties"]) == schema["required"] == list(fields)
        assert schema["additionalProperties"] is False
    assert annotation_schema(3)["properties"]["evidence"]["items"]["enum"] == [1, 2, 3]


def usable(text, shown):
    """Parse; whatever gets through must keep the promises."""
    try:
        found = parse_annotation(text, shown)
    except Malformed as fault:
        str(fault).encode()
        return
    assert found.verdict in VERDICTS
    assert all(1 <= number <= shown for number in found.evidence)
    assert list(found.evidence) == sorted(set(found.evidence))
    assert 0 <= found.confidence <= 1
    assert found.rationale.strip() == found.rationale != ""
    answer_format.render({"think": found.rationale})
    found.rationale.encode()


@given(st.text(), st.integers(0, 5))
def test_the_parser_takes_any_text(text, shown):
    usable(text, shown)
    usable(answer() + text, shown)
    usable(text + answer(), shown)
    with pytest.raises(Malformed):
        parse_check(text + "x")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(VERDICTS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "rationale": VALUES | st.text(min_size=1),
            "verdict": VALUES | st.sampled_from(VERDICTS),
            "evidence": VALUES | st.lists(st.integers(-2, 8) | st.booleans() | st.floats(0, 5)),
            "confidence": VALUES | st.floats(-1, 2),
        },
    ),
    st.integers(0, 5),
    st.integers(0, 200),
)
def test_evidence_that_does_not_exist_never_gets_through(values, shown, cut):
    text = json.dumps(values)
    usable(text, shown)
    usable(text[:cut], shown)


@given(st.text(alphabet='{}[]":,0123456789.eE-truefalsn \\u', max_size=300), st.integers(0, 3))
def test_the_parser_takes_anything_like_json(text, shown):
    usable(text, shown)


@given(st.lists(st.integers(1, 9), min_size=1), st.integers(1, 9))
def test_all_evidence_that_exists_gets_through(numbers, shown):
    text = answer(evidence=numbers)
    if max(numbers) <= shown:
        assert parse_annotation(text, shown).evidence == tuple(sorted(set(numbers)))
    else:
        with pytest.raises(Malformed, match="evidence holds"):
            parse_annotation(text, shown)
