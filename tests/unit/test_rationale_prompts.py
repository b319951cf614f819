"""What stage 1 asks, and the dialogues about it, without a server."""

import json
from dataclasses import replace

import pytest

from twice_rec import prompts
from twice_rec.catalog import ItemCatalog
from twice_rec.prompts import Exemplar, PromptFormat
from twice_rec.rationales.cache import CompletionCache
from twice_rec.rationales.completions import Completion, Request
from twice_rec.rationales.curate import Checks, NotAnnotated
from twice_rec.rationales.generate import Collected, NotCollected, Questions, estimate
from twice_rec.rationales.recipe import ClientConfig, CurationConfig, SamplingConfig
from twice_rec.records import Example, Interaction, Item, Rationale

TEA = Item("B1", "Quiet Chamomile", "Mild.", brand="Quiet", categories=("Food", "Tea"))
HONEY = Item("B2", "Clover Honey", categories=("Food", "Honey"))
CATALOG = ItemCatalog([TEA, HONEY])
SHOWN = PromptFormat(
    prompt_history_items=2, prompt_history_fields=["title", "item_id"], prompt_review_fields=["rating"],
    prompt_candidate_fields=["title", "item_id", "category"], prompt_description_chars=None,
    prompt_details_chars=None, prompt_review_chars=None,
)  # fmt: skip
HISTORY = (Interaction("B2", rating=1.0), Interaction("B1", rating=5.0), Interaction("B1"))
EXAMPLE = Example("u", HISTORY, ("B1", "B2"), "B2")
EXEMPLAR = Exemplar(((Interaction("", rating=2.0), TEA),), HONEY, "looking back", "looking ahead", "weak", (1,), 0.5)
SAMPLING = SamplingConfig(model="m", temperature=0.7, max_tokens=100)
GOOD = {"rationale": "Tea calls for honey.", "verdict": "relevant", "evidence": [1], "confidence": 0.8}


def questions(**changes):
    return replace(Questions(CATALOG, SHOWN, annotation(), SAMPLING), **changes)


def annotation(forward_looking=False):
    return prompts.annotation_instructions(SHOWN, [EXEMPLAR], 120, forward_looking)


def said(text, finish="stop", refusal=""):
    return Completion(text, finish, refusal, 10, 5)


def play(dialogue, *completions):
    """Send the completions one by one; returns (requests, result)."""
    asked = [next(dialogue)]
    for completion in completions:
        try:
            asked.append(dialogue.send(completion))
        except StopIteration as end:
            return asked, end.value
    raise AssertionError("the dialogue wants more completions")


def messages(request):
    return json.loads(request.body)["messages"]


def test_annotation_prompt():
    system, shown, example_answer = annotation()
    asked = prompts.annotation_question([(HISTORY[1], TEA)], HONEY, SHOWN)
    assert "about 120 words" in system["content"]
    assert all(verdict in system["content"] for verdict in ("relevant:", "weak:", "irrelevant:"))
    assert all(f'"{name}"' in system["content"] for name in prompts.ANNOTATION_FIELDS)
    assert shown["content"].splitlines() == [
        "Past purchases, oldest first:",
        "1. title: Quiet Chamomile | rating: Bad",
        "",
        "Next product:",
        "title: Clover Honey | category: Honey",
    ]
    assert json.loads(example_answer["content"]) == {
        "rationale": "looking back",
        "verdict": "weak",
        "evidence": [1],
        "confidence": 0.5,
    }
    assert [m["role"] for m in (system, shown, example_answer, asked)] == ["system", "user", "assistant", "user"]
    assert "id: B" not in asked["content"]


def test_looking_forward_asks_for_texts_that_name_nothing():
    back, forward = annotation(), annotation(forward_looking=True)
    assert "Never give the product's title" in forward[0]["content"]
    assert "Never give the product's title" not in back[0]["content"]
    assert "looking ahead" in forward[2]["content"]


def test_self_check_prompt_has_the_whole_rubric():
    system, asked = prompts.self_check([(HISTORY[1], TEA)], HONEY, SHOWN, "Because.")
    assert all(f"{name}: {meaning}" in asked["content"] for name, meaning in prompts.RUBRIC.items())
    assert "Explanation:\nBecause." in asked["content"]
    assert system["role"] == "system"


def test_a_self_check_by_picking_does_not_tell_the_target():
    """The prompts for two targets are the same, and the candidates come in the stored order, without ids."""
    rationale = Rationale("u", "B2", "It calls for something sweet.", "relevant", (1,), 0.8, "m")
    picking = questions(picks=True)
    (request,), kept = play(picking.review(EXAMPLE, rationale), said('{"choice": 2}'))
    (other,), rejected = play(picking.review(replace(EXAMPLE, target="B1"), rationale), said('{"choice": 2}'))
    assert kept is None
    assert rejected == "self-check: another candidate is picked"
    assert request.body == other.body
    asked = messages(request)[-1]["content"]
    assert "Candidates:\n1. title: Quiet Chamomile | category: Tea\n2. title: Clover Honey | category: Honey\n" in asked
    assert "Explanation:\nIt calls for something sweet." in asked
    assert "id: B" not in asked
    assert "Next product" not in asked
    schema = json.loads(request.body)["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["choice"]["enum"] == [1, 2]


def test_a_pick_that_is_no_candidate_is_asked_for_again():
    rationale = Rationale("u", "B2", "Sweet.", "relevant", (1,), 0.8, "m")
    asked, kept = play(questions(picks=True).review(EXAMPLE, rationale), said('{"choice": 9}'), said('{"choice": 2}'))
    assert kept is None
    assert "choice must be the number of a candidate, 1 to 2, not 9" in messages(asked[1])[-1]["content"]


def test_evidence_points_into_the_whole_history():
    """Prompts show the last two of three purchases, so purchase 1 there is position 1 of the history."""
    (request,), rationale = play(questions().annotate(EXAMPLE), said(json.dumps(GOOD)))
    assert rationale == Rationale("u", "B2", "Tea calls for honey.", "relevant", (1,), 0.8, "m")
    body = json.loads(request.body)
    assert body["response_format"]["json_schema"]["strict"] is True
    assert (body["model"], body["temperature"], body["max_completion_tokens"]) == ("m", 0.7, 100)
    assert len(messages(request)[-1]["content"].splitlines()) == 6


def test_malformed_answers_are_asked_again_with_the_fault_named():
    bad = json.dumps({**GOOD, "evidence": [7]})
    asked, rationale = play(questions().annotate(EXAMPLE), said("no"), said(bad), said(json.dumps(GOOD)))
    assert rationale.verdict == "relevant"
    assert len({request.key for request in asked}) == 3
    assert "no complete JSON object" in messages(asked[1])[-1]["content"]
    assert "evidence holds 7, but the purchases are numbered 1 to 2" in messages(asked[2])[-1]["content"]
    assert messages(asked[2])[-2] == {"role": "assistant", "content": bad}


@pytest.mark.parametrize(
    ("completions", "reason"),
    [
        ([said("no")] * 3, "malformed answer: there is no complete JSON object in it"),
        ([said("")] * 3, "malformed answer"),
        ([said('{"rationale": "long', "length")] * 3, "cut off: it was cut off at 100 tokens"),
        ([said("", refusal="I will not.")], "refused by the model: I will not."),
        ([said("half", "content_filter")], "refused by the model: content filter"),
        ([said("no"), said("", refusal="No.")], "refused by the model: No."),
    ],
)
def test_completions_that_cannot_be_used_give_a_reason(completions, reason):
    with pytest.raises(NotAnnotated, match=reason):
        play(questions().annotate(EXAMPLE), *completions)


def test_a_long_cut_off_answer_is_not_sent_back_whole():
    asked, _ = play(questions().annotate(EXAMPLE), said("x" * 5000, "length"), said(json.dumps(GOOD)))
    assert len(messages(asked[1])[-2]["content"]) < 300
    assert "be much shorter" in messages(asked[1])[-1]["content"]


def test_an_answer_that_is_complete_though_cut_off_counts():
    _, rationale = play(questions().annotate(EXAMPLE), said(json.dumps(GOOD) + "\n\n", "length"))
    assert rationale.confidence == 0.8


def test_review():
    rationale = Rationale("u", "B2", "x", "relevant", (1,), 1.0, "m")
    held = dict.fromkeys(prompts.RUBRIC, True)
    review = lambda *completions: play(questions().review(EXAMPLE, rationale), *completions)[1]
    assert review(said(json.dumps(held))) is None
    assert review(said(json.dumps({**held, "causal": False}))) == "self-check: not causal"
    with pytest.raises(NotAnnotated, match="malformed answer"):
        review(*[said("yes")] * 3)


def test_the_key_of_a_request_never_changes():
    """Users have paid for the completions that are stored under these keys."""
    request = Request.of([{"role": "user", "content": "hi"}], SAMPLING, {"type": "object"}, "x")
    assert request.key == "6f0d1f776ab1e297209e47a8ca1476b8dd7d7f9a4bcd229d92b567d622f1a3f4"


def test_requests_differ_if_completions_may():
    of = lambda sampling: Request.of([{"role": "user", "content": "hi"}], sampling, {}, "x")
    changes = [{"model": "n"}, {"temperature": 0.0}, {"max_tokens": 9}, {"structured_outputs": False}]
    others = [of(SAMPLING.model_copy(update=change)).key for change in [*changes, {"extra_body": {"a": 1}}]]
    assert len({of(SAMPLING).key, *others}) == 6
    assert of(SAMPLING) == of(SAMPLING)
    assert "response_format" not in json.loads(of(SAMPLING.model_copy(update={"structured_outputs": False})).body)


class TestCache:
    def test_completions_outlive_the_process_and_a_torn_line(self, tmp_path):
        path = tmp_path / "a" / "cache.jsonl"
        keys = [f"{i}" * 64 for i in range(1, 4)]
        with CompletionCache(path) as cache:
            cache.put(keys[0], said("one \ud83d ünïcode"))
            cache.put(keys[1], said("two"))
            cache.put(keys[1], said("not stored again"))
        whole = path.read_bytes()
        for cut in range(1, 60):
            path.write_bytes(whole[:-cut])
            with CompletionCache(path) as cache:
                assert cache.get(keys[0]).text == "one \ud83d ünïcode"
                assert cache.get(keys[1]) is None
                assert (len(cache), cache.prompt_tokens, cache.completion_tokens) == (1, 10, 5)
                cache.put(keys[2], said("three"))
            with CompletionCache(path) as cache:
                assert cache.get(keys[2]).text == "three"
                assert cache.get(keys[0]).text == "one \ud83d ünïcode"

    def test_damaged_lines_are_left_out_and_said(self, tmp_path, caplog):
        path = tmp_path / "cache.jsonl"
        with CompletionCache(path) as cache:
            cache.put("1" * 64, said("one"))
        path.write_bytes(b'{"broken\n' + path.read_bytes())
        with CompletionCache(path) as cache:
            assert cache.get("1" * 64).text == "one"
        assert "line 1: not a completion; left out" in caplog.text

    def test_two_at_once_are_refused(self, tmp_path):
        path = tmp_path / "cache.jsonl"
        with CompletionCache(path), pytest.raises(Exception, match="another process is collecting completions into it"):
            CompletionCache(path)


def test_dry_run_and_what_is_missing(tmp_path):
    prices = ClientConfig(price_per_million_input=1e6, price_per_million_output=2e6)
    examples = [replace(EXAMPLE, user_id=f"u{i}", target=f"B{1 + i % 2}") for i in range(4)]
    with CompletionCache(tmp_path / "c.jsonl") as cache:
        collected = Collected(questions(), cache)
        text = estimate(examples, collected, prices)
        request = next(questions().annotate(examples[0]))
        assert "calls to make: 4\n" in text
        assert "at most 400 out" in text
        assert "at most 800.00 out" in text
        assert "[system]\nYou study why customers" in text
        assert len(cache) == 0
        cache.put(request.key, said(json.dumps(GOOD)))
        rationale = collected.annotate(examples[0])
        assert rationale.user_id == "u0"
        assert collected.review(examples[0], rationale) == "self-check without result: no answer: never asked"
        with pytest.raises(NotCollected, match="no answer: never asked"):
            collected.annotate(examples[1])
        # Users with the same history and target ask the same.
        other = next(questions().annotate(examples[1]))
        assert list(collected.missing(examples)) == [other, other]
        assert "completions stored already: 1, which cost 20.00" in estimate(examples, collected, prices)
        # With self-checks, annotated examples need one.
        checked = Collected(questions(checks=Checks(CurationConfig(min_words=1), CATALOG)), cache)
        assert len(list(checked.missing(examples))) == 4
        with pytest.raises(NotAnnotated, match="no answer: HTTP 400"):
            Collected(questions(), cache, {other.key: "HTTP 400"}).annotate(examples[1])
        assert list(Collected(questions(), cache, {other.key: "HTTP 400"}).missing(examples)) == []
