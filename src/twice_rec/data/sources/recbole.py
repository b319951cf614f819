"""RecBole's atomic files: tab-separated, with typed headers (`user_id:token`, `timestamp:float`).

`NAME.inter` holds one purchase a row, or with an `item_id_list:token_seq` column one history a row; where there is no
`NAME.inter`, `NAME.train.inter`, `NAME.valid.inter` and `NAME.test.inter` are read together (RecBole's
`benchmark_filename`). `NAME.item` is optional: its title, brand, categories, price and description are recognised,
every other column becomes a detail.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from twice_rec.data.sources.base import Problems, PurchaseTable, TableBuilder, clean_text, find_file, titled_among
from twice_rec.errors import InputError
from twice_rec.records import Item

_TITLES = ("title", "item_title", "item_name", "name", "movie_title")
_FEATURE_TYPES = ("token", "token_seq", "float", "float_seq")


class AtomicSource:
    """One data set `NAME.inter` / `NAME.item` in one folder; `domain` is NAME."""

    def __init__(self, folder: Path, domain: str, reviews_file: str | None = None, metadata_file: str | None = None):
        self.problems = Problems()
        if reviews_file:
            self._inter = [find_file(folder, [reviews_file], "interactions")]
        elif (folder / f"{domain}.inter").exists() or not (folder / f"{domain}.train.inter").exists():
            self._inter = [find_file(folder, [f"{domain}.inter"], "interactions")]
        else:
            self._inter = [
                find_file(folder, [f"{domain}.{part}.inter"], "interactions") for part in ("train", "valid", "test")
            ]
        item_file = folder / (metadata_file or f"{domain}.item")
        self._item = find_file(folder, [item_file.name], "items") if metadata_file or item_file.exists() else None

    @property
    def files(self) -> list[Path]:
        """The files that are read."""
        return self._inter + ([self._item] if self._item else [])

    def purchases(self) -> PurchaseTable:
        """Read the interactions. Of list-valued rows each user's longest counts, in its own order."""
        table, longest = TableBuilder(), dict[str, tuple[int, list[str]]]()
        number, usable = 0, 0
        for path in self._inter:
            for line, row in _rows(path, self.problems, required=("user_id",)):
                number += 1
                where = f"{path.name}, line {line}"
                history = row.get("item_id_list")
                if history is None:
                    time = self._number(row.get("timestamp"), "timestamp", where)
                    rating = self._number(row.get("rating"), "rating", where)
                    if not row.get("user_id") or not row.get("item_id"):
                        self.problems.add("row without user_id or item_id", where)
                        continue
                    usable += 1
                    table.add(row["user_id"], row["item_id"], _milliseconds(time), rating, number)
                else:
                    sequence = history.split() + ([row["item_id"]] if row.get("item_id") else [])
                    if len(sequence) > len(longest.get(row["user_id"], (0, []))[1]):
                        longest[row["user_id"]] = (number, sequence)
        for user_id, (line, sequence) in longest.items():
            for item_id in sequence:
                usable += 1
                table.add(user_id, item_id, 0, None, line)
        if not usable:
            raise InputError(
                f"{', '.join(str(path) for path in self._inter)}: no interaction; an atomic file has a header like "
                "`user_id:token<TAB>item_id:token<TAB>timestamp:float` and a row a purchase"
            )
        return table.build()

    def _number(self, text: str | None, column: str, where: str) -> float | None:
        """A float column's value; None where it is missing, counted where it is not a number."""
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            self.problems.add(f"{column} that is not a number, left out", f"{where}: {text!r}")
            return None
        return value

    def titled(self, wanted: set[str]) -> set[str]:
        """Which of the wanted ids have a title in `NAME.item`."""
        described = self._described(wanted, self.problems)
        kind = "item without title" if self._item else "item without title (there is no .item file)"
        return titled_among(wanted, described, self.problems, kind)

    def items(self, wanted: set[str]) -> list[Item]:
        """The wanted items that `NAME.item` describes, sorted by id; titles may be empty."""
        return sorted(self._described(wanted, Problems()), key=lambda item: item.item_id)

    def _described(self, wanted: set[str], problems: Problems) -> Iterator[Item]:
        seen: set[str] = set()
        for _, row in _rows(self._item, problems, required=("item_id",)) if self._item else ():
            item_id = row["item_id"]
            title = clean_text(next((row[name] for name in _TITLES if row.get(name)), ""))
            if item_id in wanted and item_id not in seen:
                seen.add(item_id)
                known = {"item_id", "description", "brand", "categories", "price", *_TITLES}
                others = {name: clean_text(value) for name, value in row.items() if name not in known and value}
                yield Item(
                    item_id=item_id,
                    title=title,
                    description=clean_text(row.get("description", "")),
                    details=json.dumps(others, ensure_ascii=False)[1:-1],
                    brand=clean_text(row.get("brand", "")),
                    categories=tuple(row.get("categories", "").split(", ")) if row.get("categories") else (),
                    price=row.get("price", ""),
                )

    def reviews(self, lines: set[int]) -> Mapping[int, tuple[str, str]]:
        """Atomic files hold no reviews."""
        return {}


def _milliseconds(time: float | None) -> int:
    """Atomic files count time in seconds or milliseconds; 1e11 s is the year 5138."""
    if time is None:
        return 0
    return int(time * 1000) if time < 1e11 else int(time)


def _rows(path: Path, problems: Problems, required: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line from 1, column -> text); rows of another width are counted.

    Raises:
        InputError: for a header without types or without the required columns.
    """
    with open(path, encoding="utf-8", errors="replace") as file:
        header = file.readline().rstrip("\r\n").split("\t")
        columns = [name.partition(":")[0] for name in header]
        kinds = [name.partition(":")[2] for name in header]
        if not set(required) <= set(columns) or not set(kinds) <= set(_FEATURE_TYPES):
            raise InputError(
                f"{path}, line 1: not the header of an atomic file: {header[:6]}; expected tab-separated "
                f"`name:type`, type one of {', '.join(_FEATURE_TYPES)}, with the columns {', '.join(required)}"
            )
        for line, text in enumerate(file, start=2):
            values = text.rstrip("\r\n").split("\t")
            if len(values) == len(columns):
                yield line, dict(zip(columns, values, strict=True))
            elif text.strip():
                problems.add("row with another number of columns than the header", f"{path.name}, line {line}")
