"""Every template. The three tasks of stage 2 are also what stages 3 and 4 ask, word for word.

Task 1: title -> id, description, details. Task 2: history + candidates -> item. Task 3: the same -> rationale, item.
How much of an item and a review a prompt shows is a `PromptFormat`, fixed once by stage 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

from twice_rec import tags
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

_RECOMMENDER = "You recommend the product a customer buys next, judging by their purchases and reviews."
_EXPERT = "You know the products of an online shop."

_CHOOSE = "Choose the one candidate this customer buys next."
_REASON_FIRST = (
    "Reason first: what do the purchases, the good and the bad ratings and the reviews show, what do they call for "
    "next, and which candidate answers that?"
)
_ANSWER_IN_THIS_FORM = "Answer in this form:"


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


def recommend(example: Example, catalog: ItemLookup, shown: PromptFormat, with_rationale: bool) -> list[Message]:
    """The prompt of task 3 (`with_rationale`) or task 2 for one user."""
    history = example.history[-shown.history_items :] if shown.history_items else example.history
    purchases = [
        f"{number}. {describe_purchase(purchase, catalog[purchase.item_id], shown)}"
        for number, purchase in enumerate(history, start=1)
    ]
    candidates = [
        f"{number}. {describe_item(catalog[item_id], shown.candidate_fields, shown)}"
        for number, item_id in enumerate(example.candidates, start=1)
    ]
    expected = tags.WITH_RATIONALE if with_rationale else tags.ITEM_ONLY
    instruction = f"{_CHOOSE} {_REASON_FIRST}" if with_rationale else _CHOOSE
    content = "\n".join(
        [
            "Purchase history, oldest first:",
            *purchases,
            "",
            "Candidates:",
            *candidates,
            "",
            instruction,
            _ANSWER_IN_THIS_FORM,
            tags.describe(expected),
        ]
    )
    return [{"role": "system", "content": _RECOMMENDER}, {"role": "user", "content": content}]


def item_info(item: Item) -> list[Message]:
    """The prompt of task 1 for one item."""
    content = "\n".join(
        [
            f"Product: {item.title}",
            "",
            "Give its id, description and details.",
            _ANSWER_IN_THIS_FORM,
            tags.describe(tags.ITEM_INFO),
        ]
    )
    return [{"role": "system", "content": _EXPERT}, {"role": "user", "content": content}]


def item_answer(item: Item) -> str:
    """The answer of task 2."""
    return tags.render({"item_nm": item.title, "item_id": item.item_id})


def rationale_answer(rationale: str, item: Item) -> str:
    """The answer of task 3, rationale first."""
    return tags.render({"think": rationale, "item_nm": item.title, "item_id": item.item_id})


def item_info_answer(item: Item, shown: PromptFormat) -> str:
    """The answer of task 1."""
    return tags.render({"item_info": describe_item(item, ("item_id", "description", "details"), shown)})


def _cut(text: str, limit: int | None) -> str:
    return text if limit is None or len(text) <= limit else text[:limit].rstrip()
