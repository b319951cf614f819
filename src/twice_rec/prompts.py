"""Every prompt text. Stages 2, 3 and 4 ask their tasks in the same words.

Task 1: title -> id, description, details. Task 2: history + candidates -> item. Task 3: the same -> rationale, item.
Stage 1 asks a strong model for rationales and for checks of them, and the judge of rationales another. Stage 0 fixes
once, as a `PromptFormat`, how much of an item and a review a prompt shows, so that a rationale rests on nothing that
the trained model will not see.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from twice_rec import answer_format
from twice_rec.catalog import ItemCatalog
from twice_rec.recipe import Settings, key, one_of, rule
from twice_rec.records import Example, Interaction, Item

# Ratings 1 to 5 in words, from the release.
RATING_WORDS = ("Terrible", "Bad", "Okay", "Good", "Excellent")


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


# What a prompt shows of a history, oldest first.
History = Sequence[tuple[Interaction, Item]]

# Candidates that a CF model ranks first, each with its chance.
Hints = Sequence[tuple[str, float]]

# Field of an item, field of a review -> (its label in a prompt, its text).
ITEM_FIELDS: Mapping[str, tuple[str, Callable[[Item, PromptFormat], str]]] = {
    "title": ("title", lambda item, _: item.title),
    "item_id": ("id", lambda item, _: item.item_id),
    "brand": ("brand", lambda item, _: item.brand),
    "category": ("category", lambda item, _: item.categories[-1] if item.categories else ""),
    "price": ("price", lambda item, _: item.price),
    "description": ("description", lambda item, shown: _cut(item.description, shown.prompt_description_chars)),
    "details": ("details", lambda item, shown: _cut(item.details, shown.prompt_details_chars)),
}
REVIEW_FIELDS: Mapping[str, tuple[str, Callable[[Interaction, PromptFormat], str]]] = {
    "rating": ("rating", lambda review, _: rating_word(review.rating)),
    "review_title": ("review", lambda review, shown: _cut(review.review_title, shown.prompt_review_chars)),
    "review_text": ("review text", lambda review, shown: _cut(review.review_text, shown.prompt_review_chars)),
}

ItemField, ReviewField = one_of(ITEM_FIELDS), one_of(REVIEW_FIELDS)
_DEFAULT_FIELDS = ["title", "item_id", "description", "details"]


class PromptFormat(Settings):
    """What prompts show."""

    prompt_history_items: int | None = key(None, "most recent interactions that prompts show; null for all", ge=1)
    prompt_history_fields: list[ItemField] = key(_DEFAULT_FIELDS, "fields of a past item that prompts show")
    prompt_review_fields: list[ReviewField] = key(["review_title", "rating"], "fields of a review that prompts show")
    prompt_candidate_fields: list[ItemField] = key(_DEFAULT_FIELDS, "fields of a candidate that prompts show")
    prompt_description_chars: int | None = key(300, "longest description in characters; null for no cut", ge=1)
    prompt_details_chars: int | None = key(300, "longest details in characters; null for no cut", ge=1)
    prompt_review_chars: int | None = key(300, "longest review title or text in characters; null for no cut", ge=1)

    @rule
    def candidates_can_be_named(self) -> str | None:
        """An answer names a candidate by title and id."""
        if {"title", "item_id"} <= set(self.prompt_candidate_fields):
            return None
        found = f"prompt_candidate_fields is {self.prompt_candidate_fields}"
        return f"{found}; answers name a candidate by title and item_id, so both must be shown"


# What an annotator writes: key of the JSON object -> what it holds. `rationales/answers.py` has the schema.
ANNOTATION_FIELDS: Mapping[str, str] = {
    "rationale": "the reasoning, as one plain paragraph",
    "verdict": "relevant, weak or irrelevant",
    "evidence": "the numbers of the past purchases the reasoning rests on, as a list",
    "confidence": "how sure you are of the verdict, from 0 to 1 in tenths",
}

# The rubric of the self-check: key of the JSON object -> what must hold for `true`.
RUBRIC: Mapping[str, str] = {
    "grounded": "every claim about the customer can be read off the purchases, ratings and reviews shown",
    "causal": "it says why the history leads to the next product, not only that the two resemble each other",
    "specific": "it would not fit just any customer or just any product",
    "nothing_invented": "it uses nothing the customer has not given: no age, household, income, place or plan",
    "consistent": "it says nothing that the next product's title or details contradict",
}

PICK = "choice"  # key of the JSON object in which a self-check by picking answers

_ANALYST = (
    "You study why customers of an online shop buy what they buy. You are shown a customer's past purchases, with a "
    "rating and a review where the customer left one, and the product that came next. Find out what led from the one "
    "to the other: a need that earlier purchases opened, a taste that keeps returning, a product that completes "
    "another, or a disappointment that made the customer look for something else. Bad ratings tell as much as good "
    "ones. Rest on what is written and on nothing else."
)
_VERDICTS = (
    "Then judge, as strictly as you would judge somebody else's explanation, whether the history and the next product "
    "are causally connected. relevant: past purchases or reviews clearly call for it. weak: it fits in a general way, "
    "as it would fit many customers. irrelevant: nothing in the history leads to it. For an irrelevant product say so "
    "in the rationale; an honest irrelevant is worth more than an invented link."
)
_LOOKING_BACK = "Explain in about {words} words what in the history led the customer to this product."
_LOOKING_FORWARD = (
    "Write about {words} words as though the next purchase were still open. Start from the history, work out which "
    "needs, tastes and dislikes it shows, and arrive at the kind of product that answers them. Never give the "
    "product's title, brand or id, and never write that it was bought, chosen or preferred."
)
_AS_JSON = "Answer with one JSON object and nothing around it:"
_CHECKER = (
    "You check explanations of purchases before a model learns from them. Hold each one against the customer's "
    "history line by line. When in doubt, a point does not hold."
)
_READER = (
    "You are given a customer's past purchases, a list of products, and somebody's explanation of what the customer "
    "buys next, which may be good or bad. Choose the one product of the list that the purchases and the explanation "
    "together call for most."
)

# The four levels of a judge of rationales -> what they mean. The first is looked up in the catalogue, never asked for.
LEVELS: Mapping[int, str] = {
    0: "incorrect: what is recommended is no product of the catalogue",
    1: "insufficient: the product exists, but the reasons are missing, would fit just any customer or product, or are "
    "mostly contradicted by what this customer bought and said",
    2: "acceptable: at least one reason can be read off this customer's purchases and speaks for this product, but "
    "reasons that matter are missing, or one of them is wrong or has nothing to do with the product",
    3: "satisfying: every reason can be read off this customer's purchases, none is wrong, and together they make "
    "clear why this very product answers what the customer needs or likes",
}
JUDGED_LEVELS = tuple(level for level in LEVELS if level)

# What a judge writes: key of the JSON object -> what it holds.
SCORE_FIELDS: Mapping[str, str] = {
    "why": "what decides, in one sentence",
    "score": f"a whole number from {JUDGED_LEVELS[0]} to {JUDGED_LEVELS[-1]}",
}
CHOICE_FIELDS: Mapping[str, str] = {
    "why": "what decides, in one sentence",
    "candidate": "the number of the product in the list",
}
HIDDEN_ITEM = "[the product]"  # stands for its title and id

_JUDGE = (
    "You judge the reasons that an online shop gives with a recommendation. You are shown what a customer bought and "
    "said, oldest first, the product that was recommended, which exists, and the reasons. Whether the customer would "
    "buy it does not matter; judge what the reasons are worth. Hold each of them against the purchases, ratings and "
    "reviews, and against the product. Neither length nor style counts."
)
_JUDGE_OF_HIDDEN = (
    "You read the reasons that an online shop gave with a recommendation and find out which product they were given "
    "for. You are shown what a customer bought and said, oldest first, a list of products, one of which was "
    f"recommended, and the reasons, in which {HIDDEN_ITEM} stands for its name. Choose the product that the reasons "
    "fit best. Go by the reasons alone, not by what you would recommend; if several fit equally, choose one of them."
)

_RECOMMENDER = "You recommend the product a customer buys next, judging by their purchases and reviews."
EXPERT = "You know the products of an online shop."

_CHOOSE = "Choose the one candidate this customer buys next."
_REASON_FIRST = (
    "Reason first: what do the purchases, the good and the bad ratings and the reviews show, what do they call for "
    "next, and which candidate answers that?"
)
_REASON_LAST = (
    "Name it first, then give your reasons: what the purchases, the good and the bad ratings and the reviews show, "
    "what they call for next, and how this candidate answers that."
)
_HINTS = "A model that knows who buys what expects, the likeliest first:"
ANSWER_IN_THIS_FORM = "Answer in this form:"


def rating_word(rating: float | None) -> str:
    """Return the rating in words, `Good` for 4; empty if it is unknown. Halves round up."""
    return "" if rating is None else RATING_WORDS[min(5, max(1, int(rating + 0.5))) - 1]


def describe_item(item: Item, fields: Sequence[str], shown: PromptFormat) -> str:
    """Return one line, `title: ... | id: ... | details: ...`; fields without text are left out."""
    labelled = [(label, text(item, shown)) for label, text in map(ITEM_FIELDS.__getitem__, fields)]
    return " | ".join(f"{label}: {text}" for label, text in labelled if text)


def describe_interaction(interaction: Interaction, item: Item, shown: PromptFormat) -> str:
    """Return the item's line with what the user said of it."""
    labels = map(REVIEW_FIELDS.__getitem__, shown.prompt_review_fields)
    said = [f"{label}: {text}" for label, read in labels if (text := read(interaction, shown))]
    return " | ".join([describe_item(item, shown.prompt_history_fields, shown), *said])


def show_lists(example: Example, catalog: ItemCatalog, shown: PromptFormat) -> list[str]:
    """Return the lines of the history and of the candidates, each numbered from 1, as every prompt shows them."""
    history = example.history[-shown.prompt_history_items :] if shown.prompt_history_items else example.history
    past = [describe_interaction(entry, catalog[entry.item_id], shown) for entry in history]
    ahead = [describe_item(catalog[item_id], shown.prompt_candidate_fields, shown) for item_id in example.candidates]
    return ["Purchase history, oldest first:", *_numbered(past), "", "Candidates:", *_numbered(ahead)]


def recommend(
    example: Example,
    catalog: ItemCatalog,
    shown: PromptFormat,
    with_rationale: bool,
    item_first: bool = False,
    hints: Hints = (),
) -> list[Message]:
    """Return the prompt for one user: task 3, its rationale asked for before or after the item, or task 2.

    `hints` are ids of candidates.
    """
    expected, instruction = answer_format.ITEM_ONLY, _CHOOSE
    if with_rationale:
        expected = answer_format.ITEM_FIRST if item_first else answer_format.WITH_RATIONALE
        instruction = f"{_CHOOSE} {_REASON_LAST if item_first else _REASON_FIRST}"
    expects = [
        f"chance: {chance:.0%} | {describe_item(catalog[item_id], ('title', 'item_id'), shown)}"
        for item_id, chance in hints
    ]
    said = ["", _HINTS, *_numbered(expects)] if expects else []
    lines = [*show_lists(example, catalog, shown), *said, "", instruction]
    return _conversation(_RECOMMENDER, "\n".join([*lines, ANSWER_IN_THIS_FORM, answer_format.describe(expected)]))


def item_info(item: Item) -> list[Message]:
    """Return the prompt of task 1 for one item."""
    lines = [f"Product: {item.title}", "", "Give its id, description and details.", ANSWER_IN_THIS_FORM]
    return _conversation(EXPERT, "\n".join([*lines, answer_format.describe(answer_format.ITEM_INFO)]))


def item_answer(item: Item) -> str:
    """Return the right completion of task 2."""
    return answer_format.render({"item_nm": item.title, "item_id": item.item_id})


def rationale_answer(rationale: str, item: Item, item_first: bool = False) -> str:
    """Return the right completion of task 3."""
    values: dict[answer_format.Field, str] = {"think": rationale, "item_nm": item.title, "item_id": item.item_id}
    fields = answer_format.ITEM_FIRST if item_first else answer_format.WITH_RATIONALE
    return answer_format.render({field: values[field] for field in fields})


def item_info_answer(item: Item, shown: PromptFormat) -> str:
    """Return the right completion of task 1."""
    return answer_format.render({"item_info": describe_item(item, ("item_id", "description", "details"), shown)})


@dataclass(frozen=True, slots=True)
class Exemplar:
    """One worked annotation that the prompt shows; `rationales/exemplars.py` reads them from a file."""

    history: tuple[tuple[Interaction, Item], ...]
    target: Item
    rationale: str  # the text that looks back
    forward_rationale: str  # the text that leaves the target unnamed
    verdict: str
    evidence: tuple[int, ...]  # numbers of the interactions, counted from 1 as prompts show them
    confidence: float


def annotation_instructions(
    shown: PromptFormat, exemplars: Sequence[Exemplar], words: int, forward_looking: bool
) -> list[Message]:
    """Return what every request for a rationale begins with: the task and the exemplars.

    Args:
        words: length to aim at.
        forward_looking: ask for a text that argues from the history to the product without naming it.
    """
    task = (_LOOKING_FORWARD if forward_looking else _LOOKING_BACK).format(words=words)
    form = json.dumps(ANNOTATION_FIELDS, indent=1)
    messages: list[Message] = [{"role": "system", "content": "\n\n".join([_ANALYST, task, _VERDICTS, _AS_JSON, form])}]
    for exemplar in exemplars:
        text = exemplar.forward_rationale if forward_looking else exemplar.rationale
        values = (text, exemplar.verdict, list(exemplar.evidence), exemplar.confidence)
        answer = json.dumps(dict(zip(ANNOTATION_FIELDS, values, strict=True)), ensure_ascii=False)
        messages.append(annotation_question(exemplar.history, exemplar.target, shown))
        messages.append({"role": "assistant", "content": answer})
    return messages


def annotation_question(history: History, target: Item, shown: PromptFormat) -> Message:
    """Return the question for a rationale. It shows no ids, because they explain nothing."""
    return {"role": "user", "content": _history_and_target(history, target, shown)}


def self_check(history: History, target: Item, shown: PromptFormat, rationale: str) -> list[Message]:
    """Return the prompt that asks whether a rationale meets each point of the rubric."""
    rubric = "\n".join(f"{name}: {meaning}." for name, meaning in RUBRIC.items())
    form = json.dumps(dict.fromkeys(RUBRIC, "true or false"), indent=1)
    parts = [_history_and_target(history, target, shown), f"Explanation:\n{rationale}", f"Points:\n{rubric}"]
    return _conversation(_CHECKER, "\n\n".join([*parts, _AS_JSON, form]))


def judge_score(history: History, item: Item, shown: PromptFormat, rationale: str) -> list[Message]:
    """Return the prompt that asks for the level of a rationale. It shows no ids, because they explain nothing."""
    levels = "\n".join(f"{level}: {LEVELS[level]}." for level in JUDGED_LEVELS)
    product = _history_and_target(history, item, shown, "Recommended product:")
    parts = [product, f"Reasons:\n{rationale}", f"Scores:\n{levels}", _AS_JSON, json.dumps(SCORE_FIELDS, indent=1)]
    return _conversation(_JUDGE, "\n\n".join(parts))


def judge_choice(history: History, candidates: Sequence[Item], shown: PromptFormat, rationale: str) -> list[Message]:
    """Return the prompt that asks which candidate a rationale was given for; `rationale` does not name it."""
    fields = [name for name in shown.prompt_candidate_fields if name != "item_id"]
    products = "\n".join(["Products:", *_numbered([describe_item(item, fields, shown) for item in candidates])])
    past = "\n".join(_past(history, shown))
    parts = [past, products, f"Reasons:\n{rationale}", _AS_JSON, json.dumps(CHOICE_FIELDS, indent=1)]
    return _conversation(_JUDGE_OF_HIDDEN, "\n\n".join(parts))


def self_pick(history: History, candidates: Sequence[Item], shown: PromptFormat, rationale: str) -> list[Message]:
    """Return the prompt that asks which of the candidates a rationale leads to; it does not tell which one is right."""
    fields = [name for name in shown.prompt_candidate_fields if name != "item_id"]
    ahead = ["Candidates:", *_numbered([describe_item(item, fields, shown) for item in candidates])]
    form = json.dumps({PICK: "the number of the candidate"}, indent=1)
    parts = ["\n".join(_past(history, shown)), "\n".join(ahead), f"Explanation:\n{rationale}", _AS_JSON, form]
    return _conversation(_READER, "\n\n".join(parts))


def ask_again(messages: Sequence[Message], completion: str, fault: str) -> list[Message]:
    """Return the same question once more, with the completion that could not be used and what is wrong with it."""
    complaint = f"This answer cannot be used: {fault}. Give the whole JSON object again, with that put right."
    return [*messages, {"role": "assistant", "content": completion}, {"role": "user", "content": complaint}]


def _history_and_target(history: History, target: Item, shown: PromptFormat, label: str = "Next product:") -> str:
    """Return the history, numbered from 1 as the evidence counts it, and the next product, without ids."""
    next_fields = [name for name in shown.prompt_candidate_fields if name != "item_id"]
    return "\n".join([*_past(history, shown), "", label, describe_item(target, next_fields, shown)])


def _past(history: History, shown: PromptFormat) -> list[str]:
    """Return the lines of the history, numbered from 1, without ids."""
    past_fields = [name for name in shown.prompt_history_fields if name != "item_id"]
    without_ids = shown.model_copy(update={"prompt_history_fields": past_fields})
    past = [describe_interaction(interaction, item, without_ids) for interaction, item in history]
    return ["Past purchases, oldest first:", *_numbered(past)]


def _conversation(system: str, user: str) -> list[Message]:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def _numbered(lines: Sequence[str]) -> list[str]:
    return [f"{number}. {line}" for number, line in enumerate(lines, start=1)]


def _cut(text: str, limit: int | None) -> str:
    return text if limit is None or len(text) <= limit else text[:limit].rstrip()
