"""Every template. The three tasks of stage 2 are also what stages 3 and 4 ask, word for word.

Task 1: title -> id, description, details. Task 2: history + candidates -> item. Task 3: the same -> rationale, item.
Stage 1 asks a strong model for rationales and for checks of them; `rationales/answers.py` reads what it answers.
How much of an item and a review a prompt shows is a `PromptFormat`, fixed once by stage 0, so that a rationale rests on
nothing the trained model will not see.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypedDict

from twice_rec import answer_format
from twice_rec.records import Example, Interaction, Item

# Ratings 1 to 5 in words (the release's scale).
RATING_WORDS = ("Terrible", "Bad", "Okay", "Good", "Excellent")


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


class ItemLookup(Protocol):
    """Items by id; `catalog.ItemCatalog` is one."""

    def __getitem__(self, item_id: str) -> Item: ...


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """What prompts show; see the `prompt_*` keys of `config.PrepareRecipe`. None means no limit."""

    history_items: int | None
    history_fields: tuple[str, ...]
    review_fields: tuple[str, ...]
    candidate_fields: tuple[str, ...]
    description_chars: int | None
    details_chars: int | None
    review_chars: int | None

    @classmethod
    def of(cls, recipe: Any) -> PromptFormat:
        """The format that the `prompt_*` keys of a `config.PrepareRecipe` describe."""
        values = {name: getattr(recipe, f"prompt_{name}") for name in cls.__slots__}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


_LABELS = {
    "title": "title",
    "item_id": "id",
    "brand": "brand",
    "category": "category",
    "price": "price",
    "description": "description",
    "details": "details",
    "rating": "rating",
    "review_title": "review",
    "review_text": "review text",
}

# What an annotator answers: key of the JSON object -> what it holds. `rationales/answers.py` has the schema.
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
ANSWER_IN_THIS_FORM = "Answer in this form:"


def rating_word(rating: float | None) -> str:
    """`Good` for 4; empty where the rating is unknown. Halves round up."""
    if rating is None:
        return ""
    return RATING_WORDS[min(5, max(1, int(rating + 0.5))) - 1]


def describe_item(item: Item, fields: Sequence[str], shown: PromptFormat) -> str:
    """One line: `title: ... | id: ... | details: ...`; fields without content are left out."""
    values = {
        "title": item.title,
        "item_id": item.item_id,
        "brand": item.brand,
        "category": item.categories[-1] if item.categories else "",
        "price": item.price,
        "description": _cut(item.description, shown.description_chars),
        "details": _cut(item.details, shown.details_chars),
    }
    return " | ".join(f"{_LABELS[name]}: {values[name]}" for name in fields if values[name])


def describe_purchase(purchase: Interaction, item: Item, shown: PromptFormat) -> str:
    """The item's line with what the user said of it."""
    values = {
        "rating": rating_word(purchase.rating),
        "review_title": _cut(purchase.review_title, shown.review_chars),
        "review_text": _cut(purchase.review_text, shown.review_chars),
    }
    said = [f"{_LABELS[name]}: {values[name]}" for name in shown.review_fields if values[name]]
    return " | ".join([describe_item(item, shown.history_fields, shown), *said])


def show_lists(example: Example, catalog: ItemLookup, shown: PromptFormat) -> list[str]:
    """The lines of the history and of the candidates, each numbered from 1, as every prompt about a user shows them."""
    history = example.history[-shown.history_items :] if shown.history_items else example.history
    purchases = [
        f"{number}. {describe_purchase(purchase, catalog[purchase.item_id], shown)}"
        for number, purchase in enumerate(history, start=1)
    ]
    candidates = [
        f"{number}. {describe_item(catalog[item_id], shown.candidate_fields, shown)}"
        for number, item_id in enumerate(example.candidates, start=1)
    ]
    return ["Purchase history, oldest first:", *purchases, "", "Candidates:", *candidates]


def recommend(
    example: Example, catalog: ItemLookup, shown: PromptFormat, with_rationale: bool, item_first: bool = False
) -> list[Message]:
    """The prompt of task 3 (`with_rationale`, asked for before or after the item) or task 2 for one user."""
    expected, instruction = answer_format.ITEM_ONLY, _CHOOSE
    if with_rationale:
        expected = answer_format.ITEM_FIRST if item_first else answer_format.WITH_RATIONALE
        instruction = f"{_CHOOSE} {_REASON_LAST if item_first else _REASON_FIRST}"
    content = "\n".join(
        [*show_lists(example, catalog, shown), "", instruction, ANSWER_IN_THIS_FORM, answer_format.describe(expected)]
    )
    return [{"role": "system", "content": _RECOMMENDER}, {"role": "user", "content": content}]


def item_info(item: Item) -> list[Message]:
    """The prompt of task 1 for one item."""
    content = "\n".join(
        [
            f"Product: {item.title}",
            "",
            "Give its id, description and details.",
            ANSWER_IN_THIS_FORM,
            answer_format.describe(answer_format.ITEM_INFO),
        ]
    )
    return [{"role": "system", "content": EXPERT}, {"role": "user", "content": content}]


def item_answer(item: Item) -> str:
    """The answer of task 2."""
    return answer_format.render({"item_nm": item.title, "item_id": item.item_id})


def rationale_answer(rationale: str, item: Item, item_first: bool = False) -> str:
    """The answer of task 3."""
    values: dict[answer_format.Field, str] = {"think": rationale, "item_nm": item.title, "item_id": item.item_id}
    return answer_format.render(
        {field: values[field] for field in (answer_format.ITEM_FIRST if item_first else answer_format.WITH_RATIONALE)}
    )


def item_info_answer(item: Item, shown: PromptFormat) -> str:
    """The answer of task 1."""
    return answer_format.render({"item_info": describe_item(item, ("item_id", "description", "details"), shown)})


@dataclass(frozen=True, slots=True)
class Exemplar:
    """One worked annotation for the prompt; `rationales/exemplars.py` reads them from a file.

    Args:
        rationale, forward_rationale: the text when looking back, and the one that leaves the target unnamed.
        evidence: numbers of the purchases, counted from 1 as prompts show them.
    """

    history: tuple[tuple[Interaction, Item], ...]
    target: Item
    rationale: str
    forward_rationale: str
    verdict: str
    evidence: tuple[int, ...]
    confidence: float


def annotation_instructions(
    shown: PromptFormat, exemplars: Sequence[Exemplar], words: int, forward_looking: bool
) -> list[Message]:
    """What every request for a rationale begins with: the task and the exemplars.

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


def annotation_question(history: Sequence[tuple[Interaction, Item]], target: Item, shown: PromptFormat) -> Message:
    """The purchase a rationale is asked for. Ids are shown to nobody: they explain nothing.

    Args:
        history: what the prompt shows, oldest first; the answer's evidence counts it from 1.
    """
    return {"role": "user", "content": _purchases(history, target, shown)}


def self_check(
    history: Sequence[tuple[Interaction, Item]], target: Item, shown: PromptFormat, rationale: str
) -> list[Message]:
    """Ask whether a rationale meets each point of the rubric."""
    rubric = "\n".join(f"{name}: {meaning}." for name, meaning in RUBRIC.items())
    form = json.dumps(dict.fromkeys(RUBRIC, "true or false"), indent=1)
    content = "\n\n".join(
        [_purchases(history, target, shown), f"Explanation:\n{rationale}", f"Points:\n{rubric}", _AS_JSON, form]
    )
    return [{"role": "system", "content": _CHECKER}, {"role": "user", "content": content}]


def ask_again(messages: Sequence[Message], answer: str, fault: str) -> list[Message]:
    """The same question once more, with the answer that could not be used and what is wrong with it."""
    complaint = f"This answer cannot be used: {fault}. Give the whole JSON object again, with that put right."
    return [*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": complaint}]


def _purchases(history: Sequence[tuple[Interaction, Item]], target: Item, shown: PromptFormat) -> str:
    """The history, numbered from 1, and the next product, without ids."""
    past = tuple(name for name in shown.history_fields if name != "item_id")
    ahead = tuple(name for name in shown.candidate_fields if name != "item_id")
    without_ids = replace(shown, history_fields=past)
    lines = [
        f"{number}. {describe_purchase(purchase, item, without_ids)}"
        for number, (purchase, item) in enumerate(history, start=1)
    ]
    return "\n".join(
        ["Past purchases, oldest first:", *lines, "", "Next product:", describe_item(target, ahead, shown)]
    )


def _cut(text: str, limit: int | None) -> str:
    return text if limit is None or len(text) <= limit else text[:limit].rstrip()
