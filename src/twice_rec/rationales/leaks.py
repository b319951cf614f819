"""What a rationale gives away of its target. A post-hoc text that names the item it explains leaks the answer.

The rules read words, not meaning. They are for shares over many rationales and for comparing two sets: a text that
describes the product without a word of its title passes them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from twice_rec.records import Item

LEAKS = {  # what a text can have of its target -> what reports say of it
    "title": "names the target's title",
    "brand": "names its brand",
    "id": "names its id",
    "purchase": "speaks of its purchase as having happened",
}

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_BRAND = re.compile(r'"(?:Brand|Manufacturer)": "([^"]+)"')
_TITLE_WORDS = 3  # a title is named by this many of its words in a row, or by all of them if it has fewer
_SIZES = {"oz", "ounce", "ounces", "lb", "lbs", "pound", "pounds", "pack", "count", "ct", "g", "kg", "ml", "fl", "x"}
_COMMON = {"a", "an", "and", "by", "for", "from", "in", "of", "on", "or", "the", "to", "with", "w"}

# Words for the purchase of the target, as opposed to purchases in the history.
_BOUGHT_NEXT = re.compile(
    r"\b(?:the|this|their|that|his|her|a|an) (?:\w+ )?(?:next|subsequent|final|new|current)"
    r" (?:\w+ )?(?:purchase|choice|selection|order|buy)\b"
    r"|\b(?:this|that) (?:purchase|choice|selection|decision)\b"
    r"|\bnext (?:purchased|bought|chose|ordered|selected|picked)\b"
    r"|\b(?:decided|decision) (?:to (?:buy|purchase|order|choose|try)|on)\b"
)
_BOUGHT = re.compile(r"\b(?:purchased?|bought|chose|chosen|choice|ordered|selected|selection|picked|acquired)\b")


def words_of(text: str) -> list[str]:
    """Return the words and numbers of a text in lower case."""
    return _WORD.findall(text.lower().replace("’", "'"))


def leaks_of(text: str, target: Item) -> tuple[str, ...]:
    """Return which of `LEAKS` a text has, in their order."""
    branded = _BRAND.search(target.details)
    words, brand = words_of(text), words_of(target.brand or (branded[1] if branded else ""))
    places = range(len(words) - len(brand) + 1)
    found = {
        "title": names_title(words, target.title),
        "brand": bool(brand) and any(words[i : i + len(brand)] == brand for i in places),
        "id": bool(target.item_id) and target.item_id.lower() in text.lower(),
        "purchase": speaks_of_purchase(text, target),
    }
    return tuple(name for name in LEAKS if found[name])


def names_title(words: Sequence[str], title: str, at_least: int = _TITLE_WORDS) -> bool:
    """Return whether these words have `at_least` words of a title in a row; sizes, counts and small words are ignored.

    A title with fewer words is named by all of them.
    """
    own = _telling(words_of(title))
    size = min(at_least, len(own))
    if size == 0:
        return False
    runs = {tuple(own[i : i + size]) for i in range(len(own) - size + 1)}
    kept = _telling(words)
    return any(tuple(kept[i : i + size]) in runs for i in range(len(kept) - size + 1))


def speaks_of_purchase(text: str, target: Item) -> bool:
    """Return whether some sentence says that the target was bought or chosen.

    It has a phrase for the next purchase, or a word of buying together with two words in a row of the target's title.
    """
    return any(
        _BOUGHT_NEXT.search(sentence)
        or (_BOUGHT.search(sentence) and names_title(words_of(sentence), target.title, at_least=2))
        for sentence in _SENTENCE_END.split(text.lower())
    )


def _telling(words: Sequence[str]) -> list[str]:
    return [word for word in words if word not in _SIZES and word not in _COMMON and not word[0].isdigit()]
