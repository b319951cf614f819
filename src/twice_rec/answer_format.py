"""The answer format: rendering, parsing and the describing text all come from one list of fields.

A complete answer is `<think> rationale </think> <item_nm> title </item_nm> <item_id> id </item_id>`, as in the release.
Task 2 leaves the rationale out, task 1 has `<item_info> ... </item_info>`. Only this module knows the tags.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Literal

Field = Literal["think", "item_nm", "item_id", "item_info"]

# Field -> what is between its tags, as prompts describe it.
FIELDS: Mapping[Field, str] = {
    "think": "your reasoning",
    "item_nm": "title of the recommended item",
    "item_id": "id of the recommended item",
    "item_info": "id, description and details of the item",
}

# The fields of each kind of answer, in order.
WITH_RATIONALE: tuple[Field, ...] = ("think", "item_nm", "item_id")
ITEM_FIRST: tuple[Field, ...] = ("item_nm", "item_id", "think")
ITEM_ONLY: tuple[Field, ...] = ("item_nm", "item_id")
ITEM_INFO: tuple[Field, ...] = ("item_info",)

_TAG = re.compile(r"</?[A-Za-z_][A-Za-z0-9_]{0,31}>")


def opening(field: Field) -> str:
    """Return the opening tag, `<think>` for `think`."""
    return f"<{field}>"


def closing(field: Field) -> str:
    """Return the closing tag, `</think>` for `think`."""
    return f"</{field}>"


TAGS = tuple(tag for field in FIELDS for tag in (opening(field), closing(field)))


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """What a completion holds of the answer format."""

    fields: Mapping[Field, str]  # the text inside each complete element (opened once, then closed once), stripped
    counts: Mapping[str, int]  # tag -> how often it occurs (`<think>` and `</think>` apart), for the tags that occur
    other_tags: int  # number of tags with other names outside the title and the id, which hold what the item is called

    @property
    def rationale(self) -> str | None:
        """The rationale, None if it has no complete element."""
        return self.fields.get("think")

    @property
    def title(self) -> str | None:
        """The title of the recommended item, None if it has no complete element."""
        return self.fields.get("item_nm")

    @property
    def item_id(self) -> str | None:
        """The id of the recommended item, None if it has no complete element."""
        return self.fields.get("item_id")

    def is_complete(self, expected: tuple[Field, ...]) -> bool:
        """Return whether every expected element occurs once, complete and not empty."""
        return all(self.fields.get(field) for field in expected)


def render(values: Mapping[Field, str]) -> str:
    """Write an answer, its elements in the given order; `parse(render(values)).fields` equals the values, stripped.

    Raises:
        ValueError: if a value contains one of the tags, so that no parser could tell them apart.
    """
    for (field, value), tag in product(values.items(), TAGS):
        if tag in value:
            raise ValueError(f"the text for {opening(field)} contains the tag {tag}: {value[:80]!r}")
    return " ".join(f"{opening(field)} {value.strip()} {closing(field)}" for field, value in values.items())


def parse(text: str) -> ParsedAnswer:
    """Read whatever a model wrote. Never raises; takes time linear in the text."""
    tags = [(match[0], match.start()) for match in _TAG.finditer(text)]
    counts = {tag: count for tag, count in Counter(tag for tag, _ in tags).items() if tag in TAGS}
    fields: dict[Field, str] = {}
    names: list[tuple[int, int]] = []  # where the title and the id are
    for field in FIELDS:
        start, end = text.find(opening(field)), text.find(closing(field))
        if counts.get(opening(field)) == 1 == counts.get(closing(field)) and start < end:
            fields[field] = text[start + len(opening(field)) : end].strip()
            names += [(start, end)] if field in ITEM_ONLY else []
    others = [place for tag, place in tags if tag not in TAGS and not any(a < place < b for a, b in names)]
    return ParsedAnswer(fields=fields, counts=counts, other_tags=len(others))


def without_tags(text: str) -> str:
    """Remove everything that looks like a tag, so that the text can be rendered."""
    while (plain := _TAG.sub("", text)) != text:
        text = plain
    return text.strip()


def describe(expected: tuple[Field, ...]) -> str:
    """Return the format as prompts show it, one element per line."""
    return "\n".join(f"{opening(field)} {FIELDS[field]} {closing(field)}" for field in expected)
