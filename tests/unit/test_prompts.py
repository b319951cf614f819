"""Prompts, training rows and the gold test: every training target parses, hits and earns the full format reward."""

import dataclasses
import itertools

import pytest

from prompt_formats import prompt_format
from twice_rec import answer_format, prompts
from twice_rec.catalog import ItemCatalog, Outcome
from twice_rec.errors import InputError
from twice_rec.grpo import rewards
from twice_rec.grpo.dataset import prompt_rows
from twice_rec.llm.prompt_builder import PromptBuilder
from twice_rec.llm.recipe import PromptConfig
from twice_rec.prompts import PromptFormat
from twice_rec.rationales.curate import Checks
from twice_rec.rationales.offline import OfflineAnnotator
from twice_rec.rationales.reading import attributes
from twice_rec.rationales.recipe import CurationConfig
from twice_rec.records import Example, Interaction, Item, Rationale
from twice_rec.sft.dataset import training_rows
from twice_rec.sft.recipe import TaskMixConfig

PASTA = Item(
    "B1",
    "Alder Vegan Penne",
    "Goes well with Sauces.",
    '"Brand": "Alder", "Diet": "Vegan", "Size": "8 oz"',
    "Alder",
    ("Food", "Pasta"),
)
SAUCE = Item(
    "B2", "Alder Vegan Pesto", "Fine.", '"Brand": "Alder", "Diet": "Vegan"', "Alder", ("Food", "Sauces"), "3.99"
)
TEA = Item("B3", "Birch Keto Chai", "", '"Brand": "Birch", "Diet": "Keto"', "Birch", ("Food", "Tea"))
CATALOG = ItemCatalog([PASTA, SAUCE, TEA])
SHOWN = PromptFormat(
    prompt_history_items=2, prompt_history_fields=["title", "category"],
    prompt_review_fields=["review_title", "rating"],
    prompt_candidate_fields=["title", "item_id", "price"], prompt_description_chars=10, prompt_details_chars=12,
    prompt_review_chars=8,
)  # fmt: skip
HISTORY = (
    Interaction("B3", 1, 1.0, "Never again, truly"),
    Interaction("B1", 2, 5.0, "Great"),
    Interaction("B1", 3, None),
)
EXAMPLE = Example("u", HISTORY, ("B3", "B2"), "B2")


@pytest.mark.parametrize(
    ("rating", "word"),
    [
        (1.0, "Terrible"),
        (2.0, "Bad"),
        (3.0, "Okay"),
        (4.0, "Good"),
        (5.0, "Excellent"),
        (3.5, "Good"),
        (None, ""),
        (0.0, "Terrible"),
    ],
)
def test_rating_words(rating, word):
    assert prompts.rating_word(rating) == word


def test_item_line_leaves_out_what_is_empty_and_cuts():
    assert prompts.describe_item(TEA, ("title", "description", "item_id"), SHOWN) == "title: Birch Keto Chai | id: B3"
    assert (
        prompts.describe_item(PASTA, ("description", "details"), SHOWN)
        == 'description: Goes well | details: "Brand": "Al'
    )


def test_recommendation_prompt():
    system, user = prompts.recommend(EXAMPLE, CATALOG, SHOWN, with_rationale=True)
    assert system["role"] == "system"
    lines = user["content"].splitlines()
    assert lines[:7] == [
        "Purchase history, oldest first:",
        "1. title: Alder Vegan Penne | category: Pasta | review: Great | rating: Excellent",
        "2. title: Alder Vegan Penne | category: Pasta",
        "",
        "Candidates:",
        "1. title: Birch Keto Chai | id: B3",
        "2. title: Alder Vegan Pesto | id: B2 | price: 3.99",
    ]
    assert lines[-3:] == answer_format.describe(answer_format.WITH_RATIONALE).splitlines()
    assert "<think>" not in prompts.recommend(EXAMPLE, CATALOG, SHOWN, with_rationale=False)[1]["content"]


def test_hints_stand_behind_the_candidates_in_the_words_of_the_answer():
    asked = []

    def hints(example):
        asked.append(example)
        return [("B2", 0.625), ("B3", 0.004)]

    builder = PromptBuilder(CATALOG, SHOWN, None, PromptConfig(), hints)
    with_hints = builder.recommend(EXAMPLE, True)[1]["content"].splitlines()
    said = [
        "",
        "A model that knows who buys what expects, the likeliest first:",
        "1. chance: 62% | title: Alder Vegan Pesto | id: B2",
        "2. chance: 0% | title: Birch Keto Chai | id: B3",
    ]
    without = BUILDER.recommend(EXAMPLE, True)[1]["content"].splitlines()
    assert with_hints == [*without[:7], *said, *without[7:]]
    other = dataclasses.replace(EXAMPLE, candidates=("B2", "B3"))
    builder.recommend(other, True)
    assert asked == [EXAMPLE, other]


def test_review_text_and_long_reviews_are_cut():
    shown = prompt_format(prompt_review_fields=["review_title"], prompt_review_chars=8)
    content = prompts.recommend(EXAMPLE, CATALOG, shown, with_rationale=False)[1]["content"]
    assert "1. title: Birch Keto Chai | review: Never ag\n" in content


RATIONALES = [Rationale("u", "B2", "They like Alder.", "relevant", (1,), 0.9, "offline")]


BUILDER = PromptBuilder(CATALOG, SHOWN, None, PromptConfig())


def mix(curriculum=False, **rows):
    return TaskMixConfig(curriculum=curriculum, **{f"{task}_rows": count for task, count in rows.items()})


def rows(**limits):
    return training_rows(BUILDER, [EXAMPLE], RATIONALES, mix(**limits), seed=0)


def test_gold_answers_parse_hit_and_earn_the_full_format_reward():
    for row in rows():
        answer = answer_format.parse(row.completion)
        if row.task == "item_info":
            assert answer.is_complete(answer_format.ITEM_INFO)
            continue
        assert CATALOG.outcome(answer, EXAMPLE.candidates, EXAMPLE.target) is Outcome.HIT
        if row.task == "rationale":
            scored = rewards.ScoredCompletion(row.completion, answer, Outcome.HIT, 0.5)
            settings = rewards.RewardConfig()
            assert [
                reward(scored, settings)
                for reward in (rewards.structure, rewards.tags, rewards.tags_release, rewards.only_expected_tags)
            ] == [1, 1, 1.5, 1]


def test_tasks_and_limits():
    count = lambda **limits: sorted(row.task for row in rows(**limits))
    assert count() == ["direct", "item_info", "item_info", "item_info", "rationale"]
    assert count(item_info=1, direct=0) == ["item_info", "rationale"]
    assert rows() == rows()


def test_weights_repeat_rows_and_draw_the_fraction():
    heavier = TaskMixConfig(item_info_weight=2.4, direct_weight=0.0)
    drawn = [row.task for row in training_rows(BUILDER, [EXAMPLE], RATIONALES, heavier, 0)]
    assert sorted(drawn) == ["item_info"] * (2 * 3 + round(0.4 * 3)) + ["rationale"]


def test_curriculum_keeps_the_tasks_apart():
    assert [row.task for row in rows(curriculum=True)] == ["item_info"] * 3 + ["direct", "rationale"]


def test_item_first_turns_prompt_and_answer_around():
    builder = PromptBuilder(CATALOG, SHOWN, None, PromptConfig(item_first=True))
    rows = training_rows(builder, [EXAMPLE], RATIONALES, mix(item_info=0, direct=0), 0)
    assert rows[0].completion == f"{prompts.item_answer(SAUCE)} <think> They like Alder. </think>"
    assert rows[0].prompt[1]["content"].endswith(answer_format.describe(answer_format.ITEM_FIRST))
    assert prompt_rows(builder, [EXAMPLE], 1.0, 0)[0]["prompt"] == rows[0].prompt
    assert CATALOG.outcome(answer_format.parse(rows[0].completion), EXAMPLE.candidates, EXAMPLE.target) is Outcome.HIT


def test_a_task_without_rows_is_an_error():
    with pytest.raises(InputError, match=r"task rationale has no rows; set rationale_rows to 0"):
        training_rows(BUILDER, [EXAMPLE], [], mix(), 0)


def words(prompt):
    return sum(len(message["content"].split()) for message in prompt)


class Words:
    """A tokenizer whose tokens are words."""

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return " ".join(message["content"] for message in messages)

    def __call__(self, text, add_special_tokens):
        return {"input_ids": text.split()}


class TestPromptTruncation:
    shown = prompt_format(
        prompt_history_fields=["title", "description"], prompt_review_fields=["review_title"],
        prompt_candidate_fields=["title", "item_id", "description", "details"],
    )  # fmt: skip
    whole = prompts.recommend(EXAMPLE, CATALOG, shown, with_rationale=True)

    def write(self, limit):
        builder = PromptBuilder(CATALOG, self.shown, Words(), PromptConfig(max_prompt_tokens=limit))
        return builder, builder.recommend(EXAMPLE, with_rationale=True)

    def shorter(self, **limits):
        shown = self.shown.model_copy(update={f"prompt_{name}": limit for name, limit in limits.items()})
        return prompts.recommend(EXAMPLE, CATALOG, shown, with_rationale=True)

    def test_a_prompt_that_fits_stays_as_it_is(self):
        builder, prompt = self.write(words(self.whole))
        assert prompt == self.whole
        assert builder.truncated == {"whole": 1}

    def test_the_oldest_interactions_go_first(self):
        builder, prompt = self.write(words(self.whole) - 1)
        assert prompt == self.shorter(history_items=2)
        assert builder.truncated == {"interactions dropped": 1}

    def test_descriptions_go_next_and_candidates_and_instructions_never(self):
        builder, prompt = self.write(words(self.shorter(history_items=1)) - 1)
        assert builder.truncated == {"descriptions cut": 1}
        bare = self.shorter(history_items=1, description_chars=0, details_chars=0)
        assert words(bare) <= words(prompt) < words(self.shorter(history_items=1))
        assert self.write(words(bare))[1] == bare
        for item_id in EXAMPLE.candidates:
            assert f"title: {CATALOG[item_id].title} | id: {item_id}" in prompt[1]["content"]
        assert answer_format.describe(answer_format.WITH_RATIONALE) in prompt[1]["content"]

    def test_a_prompt_that_cannot_fit_is_an_error(self):
        with pytest.raises(
            InputError, match=r"prompt of user u has \d+ tokens .* but max_prompt_tokens is 5; raise it"
        ):
            self.write(5)


def test_rationale_of_other_data_is_refused():
    other = Rationale("u", "B3", "x", "relevant", (), 0.5, "offline")
    with pytest.raises(InputError, match=r"user u is about item B3, but .* target is B2.*rationales.sh"):
        training_rows(BUILDER, [EXAMPLE], [other], mix(item_info=0, direct=0), 0)
    stranger = Rationale("w", "B2", "x", "relevant", (), 0.5, "offline")
    with pytest.raises(InputError, match="not among the examples"):
        training_rows(BUILDER, [EXAMPLE], [stranger], mix(item_info=0, direct=0), 0)


def test_task_2_is_drawn_first_among_the_users_of_task_3():
    examples = [dataclasses.replace(EXAMPLE, user_id=f"u{i}") for i in range(30)]
    argued = [Rationale(f"u{i}", "B2", "x", "relevant", (), 0.5, "offline") for i in range(10)]
    drawn = training_rows(BUILDER, examples, argued, mix(item_info=0, direct=8, rationale=8), 3)
    users = {task: {row.user_id for row in drawn if row.task == task} for task in ("direct", "rationale")}
    assert users["direct"] == users["rationale"]
    drawn = training_rows(BUILDER, examples, argued, mix(item_info=0, direct=12, rationale=8), 3)
    direct = [row.user_id for row in drawn if row.task == "direct"]
    assert len(direct) == len(set(direct)) == 12
    assert {row.user_id for row in drawn if row.task == "rationale"} < set(direct)


def test_stage_3_asks_word_for_word_what_stage_2_taught():
    (row,) = prompt_rows(BUILDER, [EXAMPLE], 1.0, 0)
    taught = next(row for row in rows() if row.task == "rationale")
    assert row["prompt"] == taught.prompt
    assert (row["candidates"], row["target"], row["history"]) == (["B3", "B2"], "B2", ["B3", "B1", "B1"])


def test_a_share_of_the_examples_is_prompted():
    examples = [Example(f"u{i}", HISTORY, ("B3", "B2"), "B2") for i in range(40)]
    drawn = prompt_rows(BUILDER, examples, 0.15, 1)
    assert len(drawn) == 6
    assert drawn == prompt_rows(BUILDER, examples, 0.15, 1)


class TestOfflineAnnotator:
    annotate = staticmethod(lambda *args: OfflineAnnotator(CATALOG).annotate(Example("u", *args)))

    def test_attributes_are_short_and_without_measures(self):
        assert attributes(PASTA) == ("Alder", "Vegan", "Pasta")

    def test_shared_attributes_and_a_complement_are_relevant(self):
        found = self.annotate(HISTORY, ("B3", "B2"), "B2")
        assert found.verdict == "relevant"
        assert found.evidence == (1, 2)
        assert found.text.endswith("Last was Pasta, so Sauces.")
        assert found.annotator == "offline"

    def test_nothing_in_common_is_irrelevant(self):
        assert self.annotate((Interaction("B3", 1, 5.0),), ("B3", "B2"), "B2").verdict == "irrelevant"

    def test_disliked_attributes_count_against(self):
        disliked = (Interaction("B1", 1, 1.0),)
        assert self.annotate(disliked, ("B3", "B2"), "B2").verdict == "irrelevant"

    @pytest.mark.parametrize(
        ("text", "kept"),
        [
            ("1 likes Vegan. Last was Tea, so Sauces.", True),  # sauce 2, pasta 1, tea 0
            ("1 likes Vegan. Last was Tea.", False),  # sauce and pasta 1
            ("1 likes Vegan. 2 likes Keto. Last was Sauces, so Pasta.", False),  # pasta 2; the last item's is no call
            ("1 likes Keto. 2 dislikes Alder. Last was Tea, so Sauces.", False),  # tea 1, sauce 0
            ("1 likes Alder. 2 dislikes Pasta. Last was Tea.", True),  # sauce 1, pasta 0
            ("1 says nothing. Last was Tea.", False),
        ],
    )
    def test_a_rationale_is_kept_if_it_leads_to_the_target_alone(self, text, kept):
        rationale = Rationale("u", "B2", text, "relevant", (), 0.5, "offline")
        found = OfflineAnnotator(CATALOG).review(Example("u", HISTORY, ("B1", "B2", "B3"), "B2"), rationale)
        assert found == (None if kept else "self-check: another candidate is picked")

    def test_texts_can_be_rendered(self):
        for history in itertools.product([1.0, 3.0, 5.0, None], repeat=2):
            entries = tuple(Interaction(item, 1, rating) for item, rating in zip(("B3", "B1"), history, strict=True))
            answer_format.render({"think": self.annotate(entries, ("B3", "B2"), "B2").text})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"verdict": "weak"}, "verdict weak"),
        ({"evidence": (0, 3)}, "evidence outside the history: 3"),
        ({"text": "one two"}, "too short"),
        ({"text": "word " * 11}, "too long"),
    ],
)
def test_curation(changes, reason):
    values = {"user_id": "u", "target": "B2", "text": "one two three", "verdict": "relevant", "evidence": (0, 2)}
    rationale = Rationale(**{**values, "confidence": 0.5, "annotator": "offline", **changes})
    checks = Checks(CurationConfig(min_words=3, max_words=10), CATALOG)
    assert checks.reason(Example("u", HISTORY, ("B2",), "B2"), rationale) == reason
