"""RecBole files: tab-separated, with typed headers (`user_id:token`, `timestamp:float`).

`NAME.inter` holds one interaction per row, or with an `item_id_list:token_seq` column one history per row. If it does
not exist, `NAME.train.inter`, `NAME.valid.inter` and `NAME.test.inter` are read together (`benchmark_filename` of
RecBole). `NAME.item` is optional: its title, brand, categories, price and description are recognised, every other
column becomes a detail.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from twice_rec.data.sources.base import Problems, Row, Source
from twice_rec.data.sources.lines import LineReader
from twice_rec.data.sources.values import (
    PROGRAM_AS_TITLE,
    as_number,
    as_time,
    clean_price,
    clean_text,
    has_text,
    is_program,
    tidy_id,
)
from twice_rec.errors import InputError
from twice_rec.records import SPLITS, Item

_TITLES = ("title", "item_title", "item_name", "name", "movie_title")
_KNOWN = {"item_id", "description", "brand", "categories", "price", *_TITLES}
_FEATURE_TYPES = ("token", "token_seq", "float", "float_seq")


class RecBoleSource(Source, name="recbole"):
    """One data set `NAME.inter` / `NAME.item` in one folder; `domain` is NAME."""

    def find_files(self) -> None:
        """Find `NAME.inter` or its three parts, and `NAME.item` if it exists."""
        names, item_file = ["{domain}.inter"], f"{self.domain}.item"
        parts = [f"{{domain}}.{part}.inter" for part in SPLITS]
        there = [(self.folder / name.replace("{domain}", self.domain)).exists() for name in (names[0], parts[0])]
        if not (self.reviews_file or there[0]) and there[1]:
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
        for number, (where, row) in enumerate(self._rows(self.interaction_files, self.problems, "user_id"), start=1):
            user_id, item_id, history = row["user_id"], row.get("item_id", ""), row.get("item_id_list")
            if not user_id.strip() or not (item_id.strip() or history):
                self.problems.add("row without user_id or item_id", where)
            elif history is not None:
                sequence = history.split() + ([item_id] if item_id.strip() else [])
                if len(sequence) > len(longest.get(user_id, (0, []))[1]):
                    longest[user_id] = (number, sequence)
            elif (time := self._time(row)) is None:
                self.problems.add("row whose timestamp is not a time, dropped", f"{where}: {row['timestamp']!r}")
            else:
                usable += 1
                rating = self.rating(text, where) if (text := row.get("rating")) else None
                yield user_id, item_id, time, rating, number
        for user_id, (number, sequence) in longest.items():
            yield from ((user_id, item_id, 0, None, number) for item_id in sequence)
        if not usable and not longest:
            found = "; ".join(self.problems.lines()[:3]) or "found only a header"
            raise InputError(
                f"{', '.join(map(str, self.interaction_files))}: no interaction can be used; {found}. A RecBole file "
                "has a header like `user_id:token<TAB>item_id:token<TAB>timestamp:float` and one row per interaction; "
                "times are seconds or milliseconds since 1970; without that column the order of the file counts"
            )

    def _time(self, row: dict[str, str]) -> int | None:
        """Return the time of a row in milliseconds, 0 if the file has none, None if it cannot be read."""
        if "timestamp" not in row:
            return 0
        # Files count time in seconds or milliseconds, and 1e11 s is the year 5138.
        in_seconds = (as_number(row["timestamp"]) or 0) < 1e11
        return as_time(row["timestamp"], 1000 if in_seconds else 1)

    def described(self, wanted: set[str], problems: Problems) -> Iterator[Item]:
        """Yield the wanted items of `NAME.item`, the first row of each."""
        seen: set[str] = set()
        for where, row in self._rows(self.item_files, problems, "item_id"):
            item_id = tidy_id(row["item_id"])
            if item_id in seen:
                problems.add("item described twice, first kept", f"{where}: {item_id}")
            elif item_id in wanted:
                seen.add(item_id)
                yield _item(item_id, row, problems, where)

    def _rows(self, paths: Iterable[Path], problems: Problems, required: str) -> Iterator[tuple[str, dict[str, str]]]:
        """Yield (file and line, column -> text), counting rows that do not fit; InputError for a wrong header."""
        for path in paths:
            reader, columns = LineReader(path, self.form.encoding, problems), list[str]()
            for line, text in reader:
                values, where = text.split("\t"), f"{path.name}, line {line + 1}"
                if line == 0:
                    columns = _columns(path, values, required)
                elif len(values) != len(columns):
                    if text.strip():
                        problems.add("row with another number of columns than the header", where)
                elif not reader.is_foreign(line, text):
                    yield where, dict(zip(columns, values, strict=True))
            reader.finish()


def _columns(path: Path, header: list[str], required: str) -> list[str]:
    """Return the names in a header; InputError if it is none."""
    columns = [name.partition(":")[0] for name in header]
    if required not in columns or not {name.partition(":")[2] for name in header} <= set(_FEATURE_TYPES):
        raise InputError(
            f"{path}, line 1: not the header of a RecBole file: {header[:6]!r:.300}; expected tab-separated "
            f"`name:type`, type one of {', '.join(_FEATURE_TYPES)}, with the columns {required}"
        )
    if twice := next((name for name in columns if columns.count(name) > 1), None):
        raise InputError(f"{path}, line 1: the header has the column {twice} twice; remove or rename one")
    return columns


def _item(item_id: str, row: dict[str, str], problems: Problems, where: str) -> Item:
    others = {name: clean_text(value) for name, value in row.items() if name not in _KNOWN and value}
    raw = next((row[name] for name in _TITLES if row.get(name)), "")
    title = clean_text(raw)
    if is_program(title) or (not title and has_text(raw)):
        problems.add(PROGRAM_AS_TITLE, f"{where}: {raw!r}")
        title = ""
    price = row.get("price", "").strip()
    if price and clean_price(price) is None:
        problems.add("item with a price that is none, left out", f"{where}: {price!r}")
    return Item(
        item_id=item_id,
        title=title,
        description=clean_text(row.get("description", "")),
        details=json.dumps(others, ensure_ascii=False)[1:-1],
        brand=clean_text(row.get("brand", "")),
        categories=tuple(filter(None, map(clean_text, row.get("categories", "").split(", ")))),
        price=clean_price(price) or "",
    )
