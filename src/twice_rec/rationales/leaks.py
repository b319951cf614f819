"""What a rationale gives away of its target. A post-hoc text that names the item it explains leaks the answer.

The rules read words, not meaning: they are for shares over many rationales and for comparing two sets, and a text that
describes the product without a word of its title passes them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from twice_rec.records import Item

LEAKS = ("title", "brand", "id", "purchase")

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_BRAND = re.compile(r'"(?:Brand|Manufacturer)": "([^"]+)"')
_TITLE_WORDS = 3  # so many of a title's words in a row name it, or all of them where it has fewer
_SIZES = {"oz", "ounce", "ounces", "lb", "lbs", "pound", "pounds", "pack", "count", "ct", "g", "kg", "ml", "fl", "x"}
_COMMON = {"a", "an", "and", "by", "for", "from", "in", "of", "on", "or", "the", "to", "with", "w"}

# Words for a purchase of the target, as opposed to purchases in the history.
_BOUGHT_NEXT = re.compile(
    r"\b(?:the|this|their|that|his|her|a|an) (?:\w+ )?(?:next|subsequent|final|new|current)"
    r" (?:\w+ )?(?:purchase|choice|selection|order|buy)\b"
    r"|\b(?:this|that) (?:purchase|choice|selection|decision)\b"
    r"|\bnext (?:purchased|bought|chose|ordered|selected|picked)\b"
    r"|\b(?:decided|decision) (?:to (?:buy|purchase|order|choose|try)|on)\b"
)
_BOUGHT = re.compile(r"\b(?:purchased?|bought|chose|chosen|choice|ordered|selected|selection|picked|acquired)\b")


def words_of(text: str) -> list[str]:
    """Lower-case words and numbers."""
    return _WORD.findall(text.lower().replace("’", "'"))


def leaks_of(text: str, target: Item) -> tuple[str, ...]:
    """Which of `LEAKS` a rationale has: the target's title, brand or id, or its purchase as something that happened."""
    words = words_of(text)
    brand = words_of(brand_of(target))
    found = {
        "title": names_title(words, target.title),
        "brand": bool(brand) and contains(words, brand),
        "id": bool(target.item_id) and target.item_id.lower() in text.lower(),
        "purchase": speaks_of_purchase(text, target),
    }
    return tuple(name for name in LEAKS if found[name])


def brand_of(item: Item) -> str:
    """The item's brand, or what its details give as brand or manufacturer; empty where neither is there."""
    if item.brand:
        return item.brand
    found = _BRAND.search(item.details)
    return found.group(1) if found else ""


def names_title(words: Sequence[str], title: str, at_least: int = _TITLE_WORDS) -> bool:
    """Whether `at_least` words of a title, sizes and counts aside, stand in a row among these words.

    A title with fewer words is named by all of them. Runs of only small words do not count.
    """
    own = _telling(title)
    size = min(at_least, len(own))
    if size == 0:
        return False
    runs = {tuple(own[i : i + size]) for i in range(len(own) - size + 1)}
    kept = [word for word in words if _tells(word)]
    return any(tuple(kept[i : i + size]) in runs for i in range(len(kept) - size + 1))


def speaks_of_purchase(text: str, target: Item) -> bool:
    """Whether some sentence says that the target was bought or chosen.

    That is a phrase for the next purchase, or a word of buying beside two words in a row of the target's title.
    """
    for sentence in _SENTENCE_END.split(text.lower()):
        if _BOUGHT_NEXT.search(sentence):
            return True
        if _BOUGHT.search(sentence) and names_title(words_of(sentence), target.title, 2):
            return True
    return False


def contains(words: Sequence[str], phrase: Sequence[str]) -> bool:
    """Whether the phrase's words stand among the words in a row."""
    size = len(phrase)
    return any(list(words[i : i + size]) == list(phrase) for i in range(len(words) - size + 1))


def _telling(title: str) -> list[str]:
    return [word for word in words_of(title) if _tells(word)]


def _tells(word: str) -> bool:
    return word not in _SIZES and word not in _COMMON and not word[0].isdigit()
