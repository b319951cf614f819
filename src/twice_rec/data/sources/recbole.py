"""RecBole files: tab-separated, with typed headers (`user_id:token`, `timestamp:float`).

`NAME.inter` holds one interaction per row, or with an `item_id_list:token_seq` column one history per row. If it does
not exist, `NAME.train.inter`, `NAME.valid.inter` and `NAME.test.inter` are read together (`benchmark_filename` of
RecBole). `NAME.item` is optional: its title, brand, categories, price and description are recognised, every other
column becomes a detail.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

from twice_rec.data.sources.base import Problems, Row, Source, clean_text
from twice_rec.errors import InputError
from twice_rec.records import SPLITS, Item

_TITLES = ("title", "item_title", "item_name", "name", "movie_title")
_KNOWN = {"item_id", "description", "brand", "categories", "price", *_TITLES}
_FEATURE_TYPES = ("token", "token_seq", "float", "float_seq")


class RecBoleSource(Source, name="recbole"):
    """One data set `NAME.inter` / `NAME.item` in one folder; `domain` is NAME."""

    def find_files(self) -> None:
        """Find `NAME.inter` or its three parts, and `NAME.item` if it exists."""
        names, item_file = [f"{self.domain}.inter"], f"{self.domain}.item"
        parts = [f"{self.domain}.{part}.inter" for part in SPLITS]
        if not (self.reviews_file or (self.folder / names[0]).exists()) and (self.folder / parts[0]).exists():
            names = parts
        self.interaction_files = [self.find_file(self.reviews_file, [name], "interactions") for name in names]
        if self.metadata_file or (self.folder / item_file).exists():
            self.item_files = [self.find_file(self.metadata_file, [item_file], "items")]
        else:
            self.without_title = "item without title (there is no .item file)"

    def rows(self) -> Iterator[Row]:
        """Yield the interactions; InputError if there is none, or a header is wrong.

        Of several histories of a user the longest counts, in its own order.
        """
        longest = dict[str, tuple[int, list[str]]]()
        usable = 0
        for number, (where, row) in enumerate(_rows(self.interaction_files, self.problems, "user_id"), start=1):
            user_id, item_id, history = row["user_id"], row.get("item_id"), row.get("item_id_list")
            if history is not None:
                sequence = history.split() + ([item_id] if item_id else [])
                if len(sequence) > len(longest.get(user_id, (0, []))[1]):
                    longest[user_id] = (number, sequence)
                continue
            time = self._number(row, "timestamp", where) or 0
            rating = self._number(row, "rating", where)
            if user_id and item_id:
                usable += 1
                # Files count time in seconds or milliseconds, and 1e11 s is the year 5138.
                yield user_id, item_id, int(time * 1000) if time < 1e11 else int(time), rating, number
            else:
                self.problems.add("row without user_id or item_id", where)
        for user_id, (number, sequence) in longest.items():
            yield from ((user_id, item_id, 0, None, number) for item_id in sequence)
        if not usable and not longest:
            raise InputError(
                f"{', '.join(map(str, self.interaction_files))}: no interaction; a RecBole file has a header like "
                "`user_id:token<TAB>item_id:token<TAB>timestamp:float` and one row per interaction"
            )

    def _number(self, row: dict[str, str], column: str, where: str) -> float | None:
        """Return the number in a column; None if it is missing, or counted as no number."""
        if not (text := row.get(column)):
            return None
        with contextlib.suppress(ValueError):
            if math.isfinite(value := float(text)):
                return value
        self.problems.add(f"{column} that is not a number, left out", f"{where}: {text!r}")
        return None

    def described(self, wanted: set[str], problems: Problems) -> Iterator[Item]:
        """Yield the wanted items of `NAME.item`, the first row of each."""
        seen: set[str] = set()
        for _, row in _rows(self.item_files, problems, "item_id"):
            item_id = row["item_id"]
            if item_id in wanted and item_id not in seen:
                seen.add(item_id)
                yield _item(item_id, row)


def _item(item_id: str, row: dict[str, str]) -> Item:
    others = {name: clean_text(value) for name, value in row.items() if name not in _KNOWN and value}
    return Item(
        item_id=item_id,
        title=clean_text(next((row[name] for name in _TITLES if row.get(name)), "")),
        description=clean_text(row.get("description", "")),
        details=json.dumps(others, ensure_ascii=False)[1:-1],
        brand=clean_text(row.get("brand", "")),
        categories=tuple(row.get("categories", "").split(", ")) if row.get("categories") else (),
        price=row.get("price", ""),
    )


def _rows(paths: Iterable[Path], problems: Problems, required: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (file and line, column -> text), counting rows that do not fit; InputError for a header that is none."""
    for path in paths:
        with open(path, encoding="utf-8", errors="replace") as file:
            header = file.readline().rstrip("\r\n").split("\t")
            columns = [name.partition(":")[0] for name in header]
            if required not in columns or not {name.partition(":")[2] for name in header} <= set(_FEATURE_TYPES):
                raise InputError(
                    f"{path}, line 1: not the header of a RecBole file: {header[:6]}; expected tab-separated "
                    f"`name:type`, type one of {', '.join(_FEATURE_TYPES)}, with the columns {required}"
                )
            for line, text in enumerate(file, start=2):
                values, where = text.rstrip("\r\n").split("\t"), f"{path.name}, line {line}"
                if len(values) == len(columns):
                    yield where, dict(zip(columns, values, strict=True))
                elif text.strip():
                    problems.add("row with another number of columns than the header", where)
