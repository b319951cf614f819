"""The table of all interactions of a source: numbers beside the ids that they stand for.

It takes 28 bytes per interaction, and each id once, so tens of millions of interactions fit in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twice_rec.data.sources.problems import Problems
from twice_rec.data.sources.values import comes_back, tidy_id

Row = tuple[str, str, int, float | None, int]  # user id, item id, timestamp, rating, line

_ROWS = 100_000  # that are Python objects at the same time
_SCHEMA = {"user": pl.String, "item": pl.String, "timestamp": pl.Int64, "rating": pl.Float32, "line": pl.Int64}

# Ids of these letters alone are tidy, and an answer gives them back; all others are looked at one by one.
_PLAIN_USER, _PLAIN_ITEM = r"^[!-~]+$", r"^[0-9A-Za-z_.:-]+$"


@dataclass(frozen=True)
class InteractionTable:
    """One row per interaction, in the order of the source."""

    users: pl.Series  # String [users], the ids behind the codes in `user`
    items: pl.Series  # String [items]
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


class _Codes:
    """Numbers for ids, in the order in which they are first seen."""

    def __init__(self) -> None:
        self._categories = pl.Categories.random()
        self._held = pl.Series(dtype=pl.Categorical(self._categories))  # the numbers live as long as a series of them
        self._known = 0

    def of(self, ids: pl.Series) -> NDArray[np.uint32]:
        """Return the numbers of ids: [n]."""
        codes = ids.cast(pl.Categorical(self._categories)).to_physical().to_numpy()
        self._known = max(self._known, int(codes.max()) + 1 if len(codes) else 0)
        return codes

    def ids(self) -> pl.Series:
        """Return the ids in the order of their numbers."""
        numbers = pl.Series(np.arange(self._known, dtype=np.uint32))
        return numbers.cat.to(self._held.dtype).cast(pl.String)


class TableBuilder:
    """Collects interactions piece by piece; ids are numbered in the order of their first row."""

    def __init__(self) -> None:
        self._users, self._items = _Codes(), _Codes()
        self._parts: list[tuple[NDArray[Any], ...]] = []
        self.rows = 0  # so far

    def add(self, frame: pl.DataFrame) -> None:
        """Add a frame of the columns user, item (String), timestamp, rating and line."""
        numbers = (frame["timestamp"], frame["rating"].cast(pl.Float32).fill_null(np.nan), frame["line"])
        codes = (self._users.of(frame["user"]), self._items.of(frame["item"]))
        self._parts.append((*codes, *(column.to_numpy() for column in numbers)))
        self.rows += len(frame)

    def add_rows(self, rows: Iterable[Row]) -> None:
        """Add rows that are Python objects."""
        part: list[Row] = []
        for row in rows:
            part.append(row)
            if len(part) == _ROWS:
                self.add(frame_of(part))
                part = []
        self.add(frame_of(part))

    def table(self) -> InteractionTable:
        """Return the table, and forget the parts."""
        types = (np.int32, np.int32, np.int64, np.float32, np.int64)
        columns = []
        for at, kind in enumerate(types):
            column = np.empty(self.rows, dtype=kind)
            np.concatenate([part[at] for part in self._parts], out=column, casting="unsafe")
            columns.append(column)
        self._parts = []
        return InteractionTable(self._users.ids(), self._items.ids(), *columns)


def frame_of(rows: Sequence[Row]) -> pl.DataFrame:
    """Return the frame of some rows, as `TableBuilder.add` takes it."""
    try:
        return pl.DataFrame(rows, schema=_SCHEMA, orient="row")
    except UnicodeEncodeError:  # half a surrogate pair is no text; as an id it is one that cannot be printed
        return pl.DataFrame([(_text(user), _text(item), *rest) for user, item, *rest in rows], _SCHEMA, orient="row")


def _text(raw: str) -> str:
    whole = raw.encode("utf-8", "ignore").decode("utf-8")
    return whole if whole == raw else f"{whole}\0"


def with_tidy_ids(table: InteractionTable, problems: Problems) -> InteractionTable:
    """Tidy the ids of a table; ids that become the same are one. Rows with an id that cannot be used are dropped.

    An item id must be readable from an answer, and any id printable; the others are counted, and so are changed ones.
    """
    users, user = _tidied("user", table.users, _PLAIN_USER, str.isprintable, "cannot be printed", problems)
    items, item = _tidied("item", table.items, _PLAIN_ITEM, comes_back, "an answer does not give back", problems)
    coded = replace(
        table,
        users=users,
        items=items,
        user=table.user if user is None else user[table.user],
        item=table.item if item is None else item[table.item],
    )
    fits = (coded.user >= 0) & (coded.item >= 0)  # bool [n]
    if dropped := int((~fits).sum()):
        first = int(np.argmin(fits))
        example = f"user {table.users[int(table.user[first])]!r}, item {table.items[int(table.item[first])]!r}"
        problems.add("interaction dropped because of its ids", example, dropped)
        coded = coded.take(fits)
    return coded


def _tidied(
    what: str, ids: pl.Series, plain: str, usable: Callable[[str], bool], fault: str, problems: Problems
) -> tuple[pl.Series, NDArray[np.int32] | None]:
    """Return the tidy ids, each once, and for each old id the position of its tidy one (-1 if it cannot be used).

    If all ids are tidy, the positions are None.
    """
    odd = np.flatnonzero(~ids.str.contains(plain).to_numpy())  # [odd]
    if not len(odd):
        return ids, None
    raws = ids.gather(odd).to_list()
    tidy: list[str | None] = []
    for raw in raws:
        better = tidy_id(raw)
        if not better or not usable(better):
            problems.add(f"{what} id that {fault if better else 'is blank'}", repr(raw))
            tidy.append(None)
            continue
        if better != raw:
            problems.add(f"{what} id with blanks around it or another Unicode form, put right", repr(raw))
        tidy.append(better)
    frame = pl.DataFrame({"raw": ids, "tidy": ids.clone().scatter(odd, pl.Series(tidy, dtype=pl.String))})
    codes, places = np.full(len(ids), -1, dtype=np.int32), _Codes()  # [ids]
    codes[frame["tidy"].is_not_null().to_numpy()] = places.of(frame["tidy"].drop_nulls())
    again = frame.drop_nulls().filter(~pl.col("tidy").is_first_distinct())
    if len(again):
        raw, better = again.row(0)
        first = frame.filter(pl.col("tidy") == better)["raw"][0]
        problems.add(f"{what} ids that are the same once put right", f"{first!r} and {raw!r}", len(again))
    return places.ids(), codes
