"""What every source of purchases offers, so that filtering and splitting are written once.

A source is read twice: first as a table of integers (users, items, times, ratings), which fits in memory for tens of
millions of purchases, then for the texts of the few that the filters keep.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from twice_rec.errors import InputError
from twice_rec.records import Item

_MARKUP = re.compile(r"<[^<>]{1,200}>")


def clean_text(text: str) -> str:
    """Unescape HTML, drop its elements (Amazon texts hold `<br />`), fold white space.

    What is left cannot contain an answer tag, so no title or review can break the answer format.
    """
    plain = html.unescape(text).encode("utf-8", "replace").decode("utf-8")  # JSON may hold half a surrogate pair
    while (without := _MARKUP.sub(" ", plain)) != plain:
        plain = without
    return " ".join(plain.split())


@dataclass
class Problems:
    """Records that could not be used as they are: counted by kind, with the first of each kind as an example."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, example: str, count: int = 1) -> None:
        """Count `count` more records of this kind."""
        self.counts[kind] = self.counts.get(kind, 0) + count
        self.first.setdefault(kind, example)

    def lines(self) -> list[str]:
        """One readable line a kind, the most frequent first."""
        ordered = sorted(self.counts.items(), key=lambda pair: -pair[1])
        return [f"{count:,} x {kind} (first: {self.first[kind]})" for kind, count in ordered]


@dataclass(frozen=True)
class PurchaseTable:
    """One row a purchase, in the source's order.

    Args:
        users, items: the ids behind the codes.
        user, item: int32 [n], positions in `users` and `items`.
        timestamp: int64 [n], milliseconds; all 0 where the source has no times.
        rating: float32 [n], NaN where unknown.
        line: int64 [n], the key by which the source finds the row's review again.
    """

    users: list[str]
    items: list[str]
    user: NDArray[np.int32]
    item: NDArray[np.int32]
    timestamp: NDArray[np.int64]
    rating: NDArray[np.float32]
    line: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: NDArray[np.int64]) -> PurchaseTable:
        """The table of some rows (positions or a mask), with the same codes."""
        return PurchaseTable(
            self.users,
            self.items,
            self.user[rows],
            self.item[rows],
            self.timestamp[rows],
            self.rating[rows],
            self.line[rows],
        )


class TableBuilder:
    """Collects purchases row by row into compact arrays."""

    def __init__(self) -> None:
        self._users: dict[str, int] = {}
        self._items: dict[str, int] = {}
        self._blocks: list[np.ndarray] = []
        self._rows: list[tuple[int, int, int, float, int]] = []

    _DTYPE = np.dtype([("user", "i4"), ("item", "i4"), ("timestamp", "i8"), ("rating", "f4"), ("line", "i8")])

    def add(self, user_id: str, item_id: str, timestamp: int, rating: float | None, line: int) -> None:
        """Append one purchase."""
        user = self._users.setdefault(user_id, len(self._users))
        item = self._items.setdefault(item_id, len(self._items))
        self._rows.append((user, item, timestamp, float("nan") if rating is None else rating, line))
        if len(self._rows) == 200_000:
            self._flush()

    def _flush(self) -> None:
        self._blocks.append(np.array(self._rows, dtype=self._DTYPE))
        self._rows = []

    def build(self) -> PurchaseTable:
        """The table of everything added."""
        self._flush()
        rows = np.concatenate(self._blocks)
        return PurchaseTable(
            list(self._users),
            list(self._items),
            *(np.ascontiguousarray(rows[name]) for name in self._DTYPE.names or ()),
        )


def titled_among(
    wanted: set[str], described: Iterable[Item], problems: Problems, without_title: str = "item without title"
) -> set[str]:
    """The wanted ids that the metadata's items give a title; the others are counted under `without_title`."""
    titled = {item.item_id for item in described if item.title}
    if missing := wanted - titled:
        problems.add(without_title, min(missing), len(missing))
    return titled


class Source(Protocol):
    """A folder of files in one of the known forms."""

    problems: Problems

    def purchases(self) -> PurchaseTable:
        """Read all purchases; records that cannot be used are counted in `problems`."""
        ...

    @property
    def files(self) -> list[Path]:
        """The files that are read, for the manifest."""
        ...

    def titled(self, wanted: set[str]) -> set[str]:
        """Which of the wanted ids have a title; the others are counted in `problems`."""
        ...

    def items(self, wanted: set[str]) -> list[Item]:
        """The wanted items that the source describes, in the order the catalogue is to have; titles may be empty.

        A source with a numbering of its own returns all its items, wanted or not, so that indices agree with it.
        """
        ...

    def reviews(self, lines: set[int]) -> Mapping[int, tuple[str, str]]:
        """(review title, review text) by `line`, for the wanted lines that have a review."""
        ...


def find_file(folder: Path, names: Iterable[str], what: str) -> Path:
    """The first of `names` that exists in `folder` and is not empty.

    Raises:
        InputError: naming the folder, every name that was tried, and the remedy.
    """
    if not folder.is_dir():
        raise InputError(f"source_dir {folder.resolve()}: no such folder; pass --source_dir FOLDER")
    tried = list(names)
    for name in tried:
        if (folder / name).is_file():
            if (folder / name).stat().st_size == 0:
                raise InputError(f"{folder / name}: the file is empty; fetch it again")
            return folder / name
    raise InputError(f"{folder}: no file with {what}; looked for {', '.join(tried)}")
