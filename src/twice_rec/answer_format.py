"""The answer format: one list of fields, from which rendering, parsing and the describing text all come.

A complete answer is `<think> rationale </think> <item_nm> title </item_nm> <item_id> id </item_id>` (the release's
form). Task 2 leaves the rationale out, task 1 answers with `<item_info> ... </item_info>`. This is the only module
that knows the tags.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Field = Literal["think", "item_nm", "item_id", "item_info"]

# Field -> what stands between its tags, as prompts describe it.
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
    """`<think>` for `think`."""
    return f"<{field}>"


def closing(field: Field) -> str:
    """`</think>` for `think`."""
    return f"</{field}>"


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """What a text holds of the answer format.

    Args:
        fields: the text inside each complete element (opened once, closed once, in this order), stripped.
        counts: how often each known tag occurs, `<think>` and `</think>` apart; tags that do not occur are missing.
        other_tags: how many tags of other names occur.
    """

    fields: Mapping[Field, str]
    counts: Mapping[str, int]
    other_tags: int

    @property
    def rationale(self) -> str | None:
        """The text of the think element, None if there is no complete one."""
        return self.fields.get("think")

    @property
    def title(self) -> str | None:
        """The title of the recommended item, None if there is no complete element."""
        return self.fields.get("item_nm")

    @property
    def item_id(self) -> str | None:
        """The id of the recommended item, None if there is no complete element."""
        return self.fields.get("item_id")

    def is_complete(self, expected: tuple[Field, ...]) -> bool:
        """Whether every expected element is there once, complete and not empty."""
        return all(self.fields.get(field) for field in expected)


def render(values: Mapping[Field, str]) -> str:
    """Write an answer, its elements in the order given; `parse(render(values)).fields` equals the values, stripped.

    Raises:
        ValueError: where a value itself contains one of the tags, so that no parser could tell them apart.
    """
    for field, value in values.items():
        for known in FIELDS:
            for tag in (opening(known), closing(known)):
                if tag in value:
                    raise ValueError(f"the text for {opening(field)} contains the tag {tag}: {value[:80]!r}")
    return " ".join(f"{opening(field)} {value.strip()} {closing(field)}" for field, value in values.items())


def parse(text: str) -> ParsedAnswer:
    """Read whatever a model wrote. Never raises, takes time linear in the text."""
    counts: dict[str, int] = {}
    other_tags = 0
    known = {tag for field in FIELDS for tag in (opening(field), closing(field))}
    for match in _TAG.finditer(text):
        tag = match.group()
        if tag in known:
            counts[tag] = counts.get(tag, 0) + 1
        else:
            other_tags += 1
    fields: dict[Field, str] = {}
    for field in FIELDS:
        if counts.get(opening(field)) == 1 and counts.get(closing(field)) == 1:
            start = text.index(opening(field)) + len(opening(field))
            end = text.index(closing(field))
            if start <= end:
                fields[field] = text[start:end].strip()
    return ParsedAnswer(fields=fields, counts=counts, other_tags=other_tags)


def without_tags(text: str) -> str:
    """The text with everything that looks like a tag removed, so that it can be rendered again."""
    while (plain := _TAG.sub("", text)) != text:
        text = plain
    return text.strip()


def describe(expected: tuple[Field, ...]) -> str:
    """The format as prompts show it, one element a line."""
    return "\n".join(f"{opening(field)} {FIELDS[field]} {closing(field)}" for field in expected)
