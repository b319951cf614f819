"""What a rationale gives away of its target. A post-hoc text that names the item it explains leaks the answer.

The rules read words, not meaning. They are for shares over many rationales and for comparing two sets: a text that
describes the product without a word of its title passes them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

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


def hide_item(text: str, item: Item, by: str) -> str:
    """Return a text with the item's id, and every part of its title, replaced by other words.

    A part is at least three words of the title in a row, or all of them if it has fewer, whatever is between them.
    """
    found = list(_WORD.finditer(text.replace("’", "'")))
    words, title = [match[0].lower() for match in found], words_of(item.title)
    spans = [match.span() for match in re.finditer(rf"(?i)(?<!\w){re.escape(item.item_id)}(?!\w)", text)]
    start = 0
    while start < len(words):
        length = max((_in_common(words[start:], title[place:]) for place in range(len(title))), default=0)
        is_named = length > 0 and length >= min(_TITLE_WORDS, len(title))
        if is_named:
            spans.append((found[start].start(), found[start + length - 1].end()))
        start += length if is_named else 1
    for begin, end in sorted(_joined(spans), reverse=True):
        text = text[:begin] + by + text[end:]
    return text


def _in_common(words: Sequence[str], others: Sequence[str]) -> int:
    """Return with how many equal words two lists begin."""
    return next(
        (i for i, (a, b) in enumerate(zip(words, others, strict=False)) if a != b), min(len(words), len(others))
    )


def _joined(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the same places with those that overlap made one."""
    joined: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if joined and begin < joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined


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
