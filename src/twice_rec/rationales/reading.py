"""What a history says when it is read line by line, in plain sentences.

Rationales that are written by rule (`rationales/offline.py`) argue in these steps, and the tiny base practises each of
them alone (`tiny_base/exercises.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from twice_rec.records import Interaction, Item

_DETAIL = re.compile(r'"([^"]+)": "([^"]+)"')
LIKED = 3.0  # a review that names an attribute speaks for it from this rating up


def attributes(item: Item) -> tuple[str, ...]:
    """Return short attribute values, each once: details, brand, narrowest category. Measures (digits) are left out."""
    found = [value for _, value in _DETAIL.findall(item.details)]
    found += [item.brand, *item.categories[-1:]]
    return tuple(dict.fromkeys(value for value in found if value and len(value) <= 30 and not re.search(r"\d", value)))


def opinion(interaction: Interaction, item: Item) -> tuple[str, bool] | None:
    """Return the attribute that the review's title names, and whether it is liked; None without one or a rating."""
    if interaction.rating is None:
        return None
    named = [name for name in attributes(item) if name in interaction.review_title]
    return (max(named, key=len), interaction.rating >= LIKED) if named else None


def review_note(number: int, opinion: tuple[str, bool] | None) -> str:
    """Return `3 likes Keto.`"""
    if opinion is None:
        return f"{number} says nothing."
    name, liked = opinion
    return f"{number} {'likes' if liked else 'dislikes'} {name}."


def review_notes(opinions: Sequence[tuple[str, bool] | None]) -> str:
    """Return one note per interaction, numbered as prompts number them."""
    return " ".join(review_note(number, entry) for number, entry in enumerate(opinions, start=1))


def called_for(item: Item, categories: Sequence[str]) -> list[str]:
    """Return the categories that the item's description names, in its order."""
    named = [name for name in categories if name not in item.categories and name in item.description]
    return sorted(named, key=item.description.index)


def last_note(last: Item, calls_for: Sequence[str]) -> str:
    """Return `Last was Tea, so Crackers or Chocolate.`"""
    what = last.categories[-1] if last.categories else last.title
    return f"Last was {what}, so {' or '.join(calls_for)}." if calls_for else f"Last was {what}."
