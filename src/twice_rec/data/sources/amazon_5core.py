"""The published 5-core of a domain of Amazon Reviews 2023: `benchmark/5core/last_out/NAME.{train,valid,test}.csv`.

The three files are joined back into one sequence per user. Their columns are user_id, parent_asin, rating, timestamp; a
further one, as in `last_out_w_his`, is not read. They hold no texts: if the raw reviews are in the folder, each
interaction's review is taken from there, by user, item and time.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twice_rec.data.sources.amazon import Amazon2023, Record
from twice_rec.data.sources.base import Problems
from twice_rec.data.sources.interactions import InteractionTable
from twice_rec.data.sources.lines import Block, LineReader
from twice_rec.errors import InputError
from twice_rec.records import SPLITS


class Amazon5Core(Amazon2023, name="amazon2023_5core"):
    """The published split of a domain, and its metadata and raw reviews as `amazon2023` reads them."""

    schema = "Amazon Reviews 2023 5-core"
    record_form = ("row with a header", "a header and one comma-separated row per interaction with the columns")
    ties_in_file_order = True  # so that the last two interactions stay those of the published split

    def find_files(self) -> None:
        """Find the three files, and the raw reviews and the metadata if they are there."""
        self.interaction_files = [self.find_file(None, [f"{{domain}}.{part}.csv"], "interactions") for part in SPLITS]
        self._find_metadata()
        names = [name.replace("{domain}", self.domain) for name in self.usual_reviews]
        has_raw = self.reviews_file or any((self.folder / name).is_file() for name in names)
        self._raw = Amazon2023(self.folder, self.domain, self.reviews_file, None, False, self.form) if has_raw else None

    @property
    def files(self) -> list[Path]:
        """See `Source`."""
        return [*super().files, *(self._raw.interaction_files if self._raw else [])]

    def interactions(self) -> InteractionTable:
        """Read the three files, and find each interaction's review among the raw ones; see `Amazon2023`."""
        table = super().interactions()
        if self._raw:
            self._raw.scratch, self._raw.problems = self.scratch, self.problems
            raw = self._raw.interactions()
            self._review = np.full(int(table.line.max(initial=0)) + 1, -1)  # [rows that can be used], -1 for none
            self._review[table.line] = _lines_of_the_same(table, raw)
            if missing := int((self._review[table.line] < 0).sum()):
                name = self._raw.interaction_files[0].name
                self.problems.add("interaction without a review in the raw file, kept without text", name, missing)
        return table

    def review_texts(self, lines: NDArray[np.int64]) -> pl.DataFrame:
        """See `Source`."""
        return self._raw.review_texts(self._review[lines]) if self._raw else super().review_texts(lines)

    def _frame(self, block: Block) -> pl.DataFrame | None:
        """Return the rows of a block as columns; None if anything in it is odd, or it has the header."""
        if block.first_line == 0 or b'"' in block.data or b"\r" in block.data:
            return None
        try:
            frame = pl.read_csv(io.BytesIO(block.data), has_header=False, infer_schema=False, quote_char=None)
        except pl.exceptions.PolarsError:
            return None
        if len(frame) != block.lines or frame.width != len(self._columns) or any(c.null_count() for c in frame):
            return None
        named = dict(zip(self._columns, frame, strict=True))
        user, item, time, rating = (named[n] for n in (self.user_key, self.item_key, self.time_key, self.rating_key))
        if not (time.str.contains(r"^\d{1,18}$").all() and rating.str.contains(r"^\d{1,9}(\.\d{1,9})?$").all()):
            return None
        nothing = pl.repeat("", len(frame), eager=True)
        return self._plain(user, item, nothing, nothing, time.cast(pl.Int64), rating.cast(pl.Float64))

    def _objects(
        self, reader: LineReader, lines: Iterable[tuple[int, str]], problems: Problems
    ) -> Iterator[tuple[int, Record]]:
        """Yield (line from 0, column -> text) of the three files; of the metadata, objects."""
        if reader.path not in self.interaction_files:
            yield from super()._objects(reader, lines, problems)
            return
        for line, text in lines:
            values = _values(text)
            if line == 0:
                self._columns = self._header(reader.path, values)
            elif len(values) != len(self._columns):
                if text.strip():
                    where = f"{reader.path.name}, line {line + 1}"
                    problems.add("row with another number of columns than the header", where)
            elif not reader.is_foreign(line, text):
                yield line, dict(zip(self._columns, values, strict=True))

    def _header(self, path: Path, header: list[str]) -> list[str]:
        """Return the names in a header; InputError if it is none."""
        required = [self.user_key, self.item_key, self.rating_key, self.time_key]
        if set(required) <= set(header) and len(set(header)) == len(header):
            return header
        raise InputError(
            f"{path}, line 1: not the header of a published 5-core: {header[:6]!r:.300}; expected the columns "
            f"{', '.join(required)} once each, separated by commas"
        )


def _values(text: str) -> list[str]:
    """Return the values of a row; none if it cannot be read as one, such as for a carriage return within."""
    try:
        return next(csv.reader([text]), [])
    except csv.Error:
        return []


def _lines_of_the_same(table: InteractionTable, raw: InteractionTable) -> NDArray[np.int64]:
    """Return the line of the first raw review of the same user, item and time, -1 for none: int64 [n]."""
    keys = ["user", "item", "timestamp"]
    codes = {"user": _codes(raw.users, table.users)[raw.user], "item": _codes(raw.items, table.items)[raw.item]}
    reviews = pl.DataFrame({**codes, "timestamp": raw.timestamp, "line": raw.line})
    reviews = reviews.filter((pl.col("user") >= 0) & (pl.col("item") >= 0)).unique(keys, keep="first")
    wanted = pl.DataFrame({"user": table.user, "item": table.item, "timestamp": table.timestamp})
    return wanted.join(reviews, on=keys, how="left", maintain_order="left")["line"].fill_null(-1).to_numpy()


def _codes(ids: pl.Series, known: pl.Series) -> NDArray[np.int32]:
    """Return the position of each id among known ones, -1 if it is not known: int32 [ids]."""
    places = pl.DataFrame({"id": known, "place": np.arange(len(known), dtype=np.int32)})
    found = pl.DataFrame({"id": ids}).join(places, on="id", how="left", maintain_order="left")
    return found["place"].fill_null(-1).to_numpy()
