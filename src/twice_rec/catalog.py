"""The one map between item ids, indices and items. Index 0 is padding; items are 1..N in the order of the file."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from pathlib import Path

from twice_rec.answer_format import ParsedAnswer
from twice_rec.errors import InputError
from twice_rec.files import read_records, write_records
from twice_rec.records import Item


class Outcome(Enum):
    """What an answer recommends, judged by the candidate list of its prompt."""

    HIT = "hit"  # the target
    MISS = "miss"  # another candidate
    OUTSIDE = "outside"  # an id that is not among the candidates
    MALFORMED = "malformed"  # no single complete id, or a title that is another item's


class ItemCatalog:
    """A frozen, ordered set of N items; its length is N, padding not counted.

    Args:
        items: in index order; the first gets index 1.

    Raises:
        InputError: for an empty catalogue, an item without id or title, or an id that occurs twice.
    """

    def __init__(self, items: Iterable[Item]):
        self._items: tuple[Item, ...] = tuple(items)
        self._index: dict[str, int] = {}
        for index, item in enumerate(self._items, start=1):
            if not item.item_id or not item.title:
                found = f"found id {item.item_id!r}, title {item.title!r}"
                raise InputError(f"catalogue row {index}: an item needs an id and a title, {found}")
            if first := self._index.get(item.item_id):
                raise InputError(f"catalogue row {index}: id {item.item_id} is in row {first} too")
            self._index[item.item_id] = index
        if not self._items:
            raise InputError("the catalogue has no items")
        self._titles = Counter(normalised(item.title) for item in self._items)

    @classmethod
    def load(cls, path: Path | str) -> ItemCatalog:
        """Read `catalog.jsonl`; an InputError names the file."""
        try:
            return cls(read_records(path, Item))
        except InputError as error:
            raise error if str(path) in str(error) else InputError(f"{path}: {error}") from None

    def save(self, path: Path | str) -> None:
        """Write `catalog.jsonl`; line i holds the item of index i."""
        write_records(path, self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items)

    def __contains__(self, item_id: object) -> bool:
        return item_id in self._index

    def __getitem__(self, item_id: str) -> Item:
        """Return the item of an id; KeyError if it is unknown."""
        return self._items[self._index[item_id] - 1]

    def index(self, item_id: str) -> int:
        """Return the index of an id, 1..N; KeyError if it is unknown."""
        return self._index[item_id]

    def indices(self, item_ids: Iterable[str]) -> list[int]:
        """Return the indices of several ids, in their order."""
        return [self._index[item_id] for item_id in item_ids]

    def at(self, index: int) -> Item:
        """Return the item of an index 1..N; IndexError for padding and beyond."""
        if not 1 <= index <= len(self._items):
            raise IndexError(f"item indices are 1..{len(self._items)}, got {index}")
        return self._items[index - 1]

    @property
    def ids(self) -> tuple[str, ...]:
        """All ids in index order; `ids[j]` has index j + 1."""
        return tuple(item.item_id for item in self._items)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the ids in order: catalogues that share it give every id the same index."""
        return hashlib.sha256("\n".join(self.ids).encode()).hexdigest()

    @property
    def ambiguous_titles(self) -> int:
        """The number of titles that several items share, compared without case and spacing."""
        return sum(count > 1 for count in self._titles.values())

    def outcome(self, answer: ParsedAnswer, candidates: Sequence[str], target: str) -> Outcome:
        """Judge an answer. The id decides; a title that belongs to other items only makes the answer malformed.

        The same rule serves rewards, evaluation and data checks. (The release decides a hit by id, but looks the
        confidence up by title, which 15 pairs of items share.)
        """
        item_id = answer.item_id
        if not item_id:
            return Outcome.MALFORMED
        if item_id not in candidates:
            return Outcome.OUTSIDE
        title = normalised(answer.title or "")
        if title != normalised(self[item_id].title) and title in self._titles:
            return Outcome.MALFORMED
        return Outcome.HIT if item_id == target else Outcome.MISS


def normalised(title: str) -> str:
    """Return a title without differences in case and spacing."""
    return " ".join(title.casefold().split())
