"""What every source of interactions offers, so that filters and splits are written once.

A source is read twice: first as a table of integers (users, items, times, ratings), which fits in memory for tens of
millions of interactions, then for the texts of the few that the filters keep.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from twice_rec.catalog import ItemCatalog
from twice_rec.data.sources.values import as_number, comes_back, tidy_id
from twice_rec.data.sources.values import clean_text as clean_text  # every source needs it
from twice_rec.errors import InputError
from twice_rec.recipe import Settings, key, rule
from twice_rec.records import Item, UserSequence

_LONGEST_EXAMPLE = 160  # characters


class SourceFormat(Settings):
    """How the files of a source are written."""

    encoding: str = key("utf-8", "encoding of the source's files: utf-8, latin-1, gbk, utf-16, ...")
    rating_scale: list[float] = key([1, 5], "lowest and highest rating of the source; mapped to 1 to 5, others dropped")

    @rule
    def encoding_is_known(self) -> str | None:
        """Python can read the encoding."""
        try:
            "a".encode(self.encoding).decode(self.encoding)
        except (LookupError, ValueError):
            return (
                f"encoding is {self.encoding!r}, which Python does not know; use utf-8, latin-1, cp1252, gbk or utf-16"
            )
        return None

    @rule
    def rating_scale_has_two_ends(self) -> str | None:
        """A scale has a lowest and a highest rating."""
        if len(self.rating_scale) == 2 and self.rating_scale[0] < self.rating_scale[1]:
            return None
        return f"rating_scale is {self.rating_scale}; give the lowest and the highest rating, such as 1 5 or 1 10"


@dataclass
class Problems:
    """Records that could not be used as they are: counted by kind, with the first of each kind as an example."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, example: str, count: int = 1) -> None:
        """Count `count` more records of this kind."""
        self.counts[kind] = self.counts.get(kind, 0) + count
        if kind not in self.first:
            whole = example.encode("utf-8", "replace").decode("utf-8")
            self.first[kind] = whole if len(whole) <= _LONGEST_EXAMPLE else f"{whole[:_LONGEST_EXAMPLE]}..."

    def lines(self) -> list[str]:
        """Return one readable line per kind, the most frequent first."""
        ordered = sorted(self.counts.items(), key=lambda pair: -pair[1])
        return [f"{count:,} x {kind} (first: {self.first[kind]})" for kind, count in ordered]


@dataclass(frozen=True)
class InteractionTable:
    """One row per interaction, in the order of the source."""

    users: list[str]  # the ids behind the codes in `user`
    items: list[str]
    user: NDArray[np.int32]  # [n], position in `users`
    item: NDArray[np.int32]  # [n], position in `items`
    timestamp: NDArray[np.int64]  # [n], milliseconds; all 0 if the source has no times
    rating: NDArray[np.float32]  # [n], NaN if unknown
    line: NDArray[np.int64]  # [n], the key by which the source finds the review again

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: NDArray[Any]) -> InteractionTable:
        """Return the table of some rows (positions or a mask), with the same codes."""
        columns = (self.user, self.item, self.timestamp, self.rating, self.line)
        return InteractionTable(self.users, self.items, *(column[rows] for column in columns))


Row = tuple[str, str, int, float | None, int]  # user id, item id, timestamp, rating, line
_COLUMNS = np.dtype([("user", "i4"), ("item", "i4"), ("timestamp", "i8"), ("rating", "f4"), ("line", "i8")])


def table_of(rows: Iterable[Row]) -> InteractionTable:
    """Collect rows into compact columns; ids are numbered in the order of their first row."""
    users, items = dict[str, int](), dict[str, int]()
    coded = (
        (users.setdefault(user, len(users)), items.setdefault(item, len(items)), *rest) for user, item, *rest in rows
    )
    table = np.fromiter(coded, dtype=_COLUMNS)  # [n]; a rating of None becomes NaN
    return InteractionTable(list(users), list(items), *(table[name].copy() for name in _COLUMNS.names or ()))


def with_tidy_ids(table: InteractionTable, problems: Problems) -> InteractionTable:
    """Tidy the ids of a table; ids that become the same are one. Rows with an id that cannot be used are dropped.

    An item id must be readable from an answer, and any id printable; the others are counted, and so are changed ones.
    """
    users, user = _tidied("user", table.users, str.isprintable, "cannot be printed", problems)
    items, item = _tidied("item", table.items, comes_back, "an answer does not give back", problems)
    coded = replace(table, users=users, items=items, user=user[table.user], item=item[table.item])
    fits = (coded.user >= 0) & (coded.item >= 0)  # bool [n]
    if dropped := int((~fits).sum()):
        example = f"user {table.users[table.user[~fits][0]]!r}, item {table.items[table.item[~fits][0]]!r}"
        problems.add("interaction dropped because of its ids", example, dropped)
        coded = coded.take(fits)
    return coded


def _tidied(
    what: str, ids: Sequence[str], usable: Callable[[str], bool], fault: str, problems: Problems
) -> tuple[list[str], NDArray[np.int32]]:
    """Return the tidy ids, each once, and for each old id the position of its tidy one (-1 if it cannot be used)."""
    positions, sources = dict[str, int](), dict[str, str]()
    codes = np.full(len(ids), -1, dtype=np.int32)  # [ids]
    for old, raw in enumerate(ids):
        tidy = tidy_id(raw)
        if not tidy or not usable(tidy):
            problems.add(f"{what} id that {fault if tidy else 'is blank'}", repr(raw))
            continue
        if tidy != raw:
            problems.add(f"{what} id with blanks around it or another Unicode form, put right", repr(raw))
        if tidy in positions:
            problems.add(f"{what} ids that are the same once put right", f"{sources[tidy]!r} and {raw!r}")
        codes[old] = positions.setdefault(tidy, len(positions))
        sources.setdefault(tidy, raw)
    return list(positions), codes


REGISTERED: dict[str, type[Source]] = {}  # name in the recipe -> class


@dataclass(eq=False)
class Source(ABC):
    """A place that interactions come from. `class CsvSource(Source, name="csv")` is the source that recipes call csv.

    Raises:
        InputError: if there is no such folder, or a file in it is missing or empty.
    """

    folder: Path
    domain: str  # what the usual names of the files hold
    reviews_file: str | None = None  # another name
    metadata_file: str | None = None
    metadata_required: bool = True  # whether a missing file is an error; without one no item has a title
    form: SourceFormat = field(default_factory=SourceFormat)

    reads_folder: ClassVar[bool] = True  # whether a recipe must set source_dir
    without_title = "item without title"  # what `problems` calls an item without title

    def __init_subclass__(cls, name: str) -> None:
        REGISTERED[name] = cls

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise InputError(f"source_dir {self.folder.resolve()}: no such folder; pass --source_dir FOLDER")
        self.problems = Problems()  # what could not be used as it is
        self.interaction_files: list[Path] = []
        self.item_files: list[Path] = []
        self.find_files()

    @abstractmethod
    def find_files(self) -> None:
        """Set `interaction_files` and `item_files`."""

    def find_file(self, given: str | None, usual: Sequence[str], what: str) -> Path:
        """Return the given file or the first usual one (`{domain}` is filled in); InputError if missing or empty."""
        names = [given] if given else [name.replace("{domain}", self.domain) for name in usual]
        for path in (self.folder / name for name in names):
            if path.is_file():
                if path.stat().st_size == 0:
                    raise InputError(f"{path}: the file is empty; fetch it again")
                return path
        raise InputError(f"{self.folder}: no file with {what}; looked for {', '.join(names)}")

    @property
    def files(self) -> list[Path]:
        """The files that are read, for the manifest."""
        return [*self.interaction_files, *self.item_files]

    def generate(self, folder: Path) -> None:  # noqa: B027 - an optional step
        """Write the raw files of made-up data to `folder`, before anything is read. Other sources do nothing."""

    @abstractmethod
    def rows(self) -> Iterator[Row]:
        """Yield the interactions in the order of the source; records that cannot be used go to `problems`."""

    @abstractmethod
    def described(self, wanted: set[str], problems: Problems) -> Iterable[Item]:
        """Yield what the source says of the wanted items, each once; titles may be empty."""

    def interactions(self) -> InteractionTable:
        """Read all interactions, their ids tidied."""
        return with_tidy_ids(table_of(self.rows()), self.problems)

    def rating(self, value: object, where: str) -> float | None:
        """Return a rating on the scale of 1 to 5; None, and counted, if it is no number on the source's scale."""
        low, high = self.form.rating_scale
        number = as_number(value)
        if number is None or not low <= number <= high:
            kind = f"review with a rating that is not {low:g} to {high:g}, kept without"
            self.problems.add(kind, f"{where}: {value!r}; see rating_scale")
            return None
        return 1 + 4 * (number - low) / (high - low) if (low, high) != (1, 5) else number

    def titled(self, wanted: set[str]) -> set[str]:
        """Return the ids that have a title; the wanted ones without are counted in `problems`."""
        titled = {item.item_id for item in self.described(wanted, self.problems) if item.title}
        if missing := wanted - titled:
            self.problems.add(self.without_title, min(missing), len(missing))
        return titled

    def items(self, wanted: set[str]) -> list[Item]:
        """Return the described items in the order of the catalogue, by id; titles may be empty.

        A source with its own numbering returns all its items, wanted or not, so that indices agree with it.
        """
        return sorted(self.described(wanted, Problems()), key=lambda item: item.item_id)

    def reviews(self, lines: set[int]) -> Mapping[int, tuple[str, str]]:
        """Return (review title, review text) by `line`, for the wanted lines that have a review."""
        return {}

    def oracle_scores(self, sequences: Sequence[UserSequence], catalog: ItemCatalog) -> NDArray[np.float32] | None:
        """Return the true log-probabilities of the test targets [users, items], None if nobody knows them."""
        return None
