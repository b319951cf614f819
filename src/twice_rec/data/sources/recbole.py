"""RecBole files: tab-separated, with typed headers (`user_id:token`, `timestamp:float`).

`NAME.inter` holds one interaction per row, or with an `item_id_list:token_seq` column one history per row. If it does
not exist, `NAME.train.inter`, `NAME.valid.inter` and `NAME.test.inter` are read together (`benchmark_filename` of
RecBole). `NAME.item` is optional: its title, brand, categories, price and description are recognised, every other
column becomes a detail.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from twice_rec.data.sources.base import Problems, Row, Source, clean_text, find_file, source
from twice_rec.errors import InputError
from twice_rec.records import Item

if TYPE_CHECKING:
    from twice_rec.data.recipe import PrepareRecipe

_TITLES = ("title", "item_title", "item_name", "name", "movie_title")
_KNOWN = {"item_id", "description", "brand", "categories", "price", *_TITLES}
_FEATURE_TYPES = ("token", "token_seq", "float", "float_seq")


@source("recbole")
class RecBoleSource(Source):
    """One data set `NAME.inter` / `NAME.item` in one folder; `domain` is NAME."""

    def __init__(self, folder: Path, domain: str, reviews_file: str | None = None, metadata_file: str | None = None):
        super().__init__(folder, domain)
        names = [reviews_file or f"{domain}.inter"]
        if not reviews_file and not (folder / names[0]).exists() and (folder / f"{domain}.train.inter").exists():
            names = [f"{domain}.{part}.inter" for part in ("train", "valid", "test")]
        self.interaction_files = [find_file(folder, [name], "interactions") for name in names]
        item_file = metadata_file or f"{domain}.item"
        if metadata_file or (folder / item_file).exists():
            self.item_files = [find_file(folder, [item_file], "items")]
        else:
            self.without_title = "item without title (there is no .item file)"

    @classmethod
    def open(cls, recipe: PrepareRecipe) -> Source:
        """Find the files."""
        return cls(Path(recipe.source_dir or "."), recipe.domain, recipe.reviews_file, recipe.metadata_file)

    def rows(self) -> Iterator[Row]:
        """Yield the interactions. Of several histories of a user the longest counts, in its own order.

        Raises:
            InputError: if there is no interaction, or a header is wrong.
        """
        longest = dict[str, tuple[int, list[str]]]()
        number, usable = 0, 0
        for path in self.interaction_files:
            for line, row in _rows(path, self.problems, required=("user_id",)):
                number += 1
                history = row.get("item_id_list")
                if history is None:
                    interaction = self._interaction(row, number, f"{path.name}, line {line}")
                    usable += interaction is not None
                    yield from [interaction] if interaction else []
                else:
                    sequence = history.split() + ([row["item_id"]] if row.get("item_id") else [])
                    if len(sequence) > len(longest.get(row["user_id"], (0, []))[1]):
                        longest[row["user_id"]] = (number, sequence)
        for user_id, (line, sequence) in longest.items():
            yield from ((user_id, item_id, 0, None, line) for item_id in sequence)
        if not usable and not longest:
            raise InputError(
                f"{', '.join(map(str, self.interaction_files))}: no interaction; a RecBole file has a header like "
                "`user_id:token<TAB>item_id:token<TAB>timestamp:float` and one row per interaction"
            )

    def _interaction(self, row: dict[str, str], number: int, where: str) -> Row | None:
        time = self._number(row.get("timestamp"), "timestamp", where)
        rating = self._number(row.get("rating"), "rating", where)
        if not row.get("user_id") or not row.get("item_id"):
            self.problems.add("row without user_id or item_id", where)
            return None
        return row["user_id"], row["item_id"], _milliseconds(time), rating, number

    def _number(self, text: str | None, column: str, where: str) -> float | None:
        """Return the number in a column; None if it is missing, or counted as no number."""
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

    def described(self, wanted: set[str], problems: Problems) -> Iterator[Item]:
        """Yield the wanted items of `NAME.item`, the first row of each."""
        seen: set[str] = set()
        for path in self.item_files:
            for _, row in _rows(path, problems, required=("item_id",)):
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


def _milliseconds(time: float | None) -> int:
    """Return milliseconds; RecBole files count time in seconds or milliseconds, and 1e11 s is the year 5138."""
    if time is None:
        return 0
    return int(time * 1000) if time < 1e11 else int(time)


def _rows(path: Path, problems: Problems, required: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line from 1, column -> text); rows with another number of columns are counted.

    Raises:
        InputError: if the header has no types, or not the required columns.
    """
    with open(path, encoding="utf-8", errors="replace") as file:
        header = file.readline().rstrip("\r\n").split("\t")
        columns = [name.partition(":")[0] for name in header]
        kinds = {name.partition(":")[2] for name in header}
        if not set(required) <= set(columns) or not kinds <= set(_FEATURE_TYPES):
            raise InputError(
                f"{path}, line 1: not the header of a RecBole file: {header[:6]}; expected tab-separated "
                f"`name:type`, type one of {', '.join(_FEATURE_TYPES)}, with the columns {', '.join(required)}"
            )
        for line, text in enumerate(file, start=2):
            values = text.rstrip("\r\n").split("\t")
            if len(values) == len(columns):
                yield line, dict(zip(columns, values, strict=True))
            elif text.strip():
                problems.add("row with another number of columns than the header", f"{path.name}, line {line}")
