"""Amazon reviews in the raw schema of 2023, and in the older one of 2014 and 2018.

Files are JSON lines, plain, gzip or Zstandard. What cannot be used is counted by kind and reported. Only a file in
which nothing fits the schema is an error. A packed file that ends early is read up to its end.

Reviews are read once, in blocks of lines. A block in which nothing is odd becomes columns at once; any other is read
line by line, in small parts. Both ways give the same rows. Texts wait in files until it is known which are kept.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twice_rec.data.sources.base import Problems, Source
from twice_rec.data.sources.blocks import TextStore, strict_frame, text_frame
from twice_rec.data.sources.interactions import InteractionTable, Row, TableBuilder, frame_of, with_tidy_ids
from twice_rec.data.sources.lines import Block, LineReader
from twice_rec.data.sources.values import (
    LATEST_TIME,
    PROGRAM_AS_TITLE,
    as_time,
    clean_price,
    clean_text,
    has_text,
    is_program,
    tidy_id,
)
from twice_rec.errors import InputError
from twice_rec.records import Item

Record = dict[str, Any]

_FEW_LINES = 250  # that are read one by one
_ROWS = 50_000  # that are Python objects at the same time
_PLAIN_ID = r"^[!-~]+$"
_TEXTS = (str, list, type(None))


class Amazon2023(Source, name="amazon2023"):
    """Reviews and item metadata of one domain of Amazon Reviews 2023, `Grocery_and_Gourmet_Food`."""

    schema = "Amazon Reviews 2023"
    or_else = ", or --download true to fetch the files"
    usual_reviews: tuple[str, ...] = ("{domain}.jsonl", "{domain}.jsonl.gz", "{domain}.jsonl.zst")
    usual_metadata: tuple[str, ...] = ("meta_{domain}.jsonl", "meta_{domain}.jsonl.gz", "meta_{domain}.jsonl.zst")
    # The keys of a review, and of an item.
    user_key, item_key, time_key, rating_key = "user_id", "parent_asin", "timestamp", "rating"
    milliseconds = 1  # per unit of time
    # What errors call a record, and say before its keys.
    record_form = ("JSON object (an array? jq -c .[] splits it)", "one JSON object per line with the keys")
    review_title_key, review_text_key = "title", "text"
    brand_key, features_key, category_keys = "store", "features", ["categories"]

    def find_files(self) -> None:
        """Find the reviews, and the metadata if there are any or they are required."""
        self.interaction_files = [self.find_file(self.reviews_file, self.usual_reviews, "reviews")]
        self._find_metadata()

    def _find_metadata(self) -> None:
        try:
            self.item_files = [self.find_file(self.metadata_file, self.usual_metadata, "item metadata")]
        except InputError:
            if self.metadata_required or self.metadata_file:
                raise
            self.without_title = "item without title (there is no metadata file)"

    def interactions(self) -> InteractionTable:
        """Read the reviews; `line` is their number among those that can be used. InputError if a file has none."""
        builder, self._texts = TableBuilder(), TextStore(self.scratch)
        for path in self.interaction_files:
            before, self._keys_seen = builder.rows, set[str]()
            reader = LineReader(path, self.form.encoding, self.problems)
            if reader.has_blocks:
                for block in reader.blocks():
                    self._add_block(block, reader, builder)
            else:
                rows = self._reviews(reader, reader)
                while part := list(islice(rows, _ROWS)):
                    self._add_rows(part, builder)
            reader.finish()
            if builder.rows == before:
                keys = ", ".join(sorted(self._keys_seen)[:12])
                found = f"found {keys or f'no {self.record_form[0]}'}; {'; '.join(self.problems.lines()[:3])}"
                raise InputError(
                    f"{path}: no record fits the {self.schema} schema, {self.record_form[1]} {self.user_key}, "
                    f"{self.item_key}, {self.time_key}; {found}. Another generation of the data? Sources are "
                    "amazon2023 and amazon2014"
                )
        return with_tidy_ids(builder.table(), self.problems)

    def review_texts(self, lines: NDArray[np.int64]) -> pl.DataFrame:
        """See `Source`."""
        return self._texts.read(lines)

    def _add_block(self, block: Block, reader: LineReader, builder: TableBuilder) -> None:
        """Add the reviews of a block, at once or, if anything is odd, part by part and at last line by line."""
        if (frame := self._frame(block)) is not None:
            reader.pass_over(block)
            lines = pl.int_range(builder.rows, builder.rows + len(frame), eager=True)
            builder.add(frame.select("user", "item", "timestamp", "rating", lines.alias("line")))
            self._texts.add(frame.select("title", "text"))
        elif block.lines > _FEW_LINES and len(parts := list(block.parts(16))) > 1:
            for part in parts:
                self._add_block(part, reader, builder)
        else:
            self._add_rows(list(self._reviews(reader, reader.lines_of(block))), builder)

    def _frame(self, block: Block) -> pl.DataFrame | None:
        """Return the reviews of a block as columns; None if anything in it is odd."""
        texts = (self.user_key, self.item_key, self.review_title_key, self.review_text_key)
        schema = {**dict.fromkeys(texts, pl.String), self.time_key: pl.Int64, self.rating_key: pl.Float64}
        frame = strict_frame(block, schema)
        return None if frame is None else self._plain(*(frame[name] for name in schema))

    def _plain(
        self, user: pl.Series, item: pl.Series, title: pl.Series, text: pl.Series, time: pl.Series, rating: pl.Series
    ) -> pl.DataFrame | None:
        """Return the columns of a table of these reviews, and their texts; None if a value is odd."""
        low, high = self.form.rating_scale
        is_plain = (
            time.is_between(0, LATEST_TIME // self.milliseconds).all()
            and rating.is_between(low, high).all()
            and user.str.contains(_PLAIN_ID).all()
            and item.str.contains(_PLAIN_ID).all()
        )
        scaled = rating if (low, high) == (1, 5) else 1 + 4 * (rating - low) / (high - low)
        columns = {"user": user, "item": item, "timestamp": time * self.milliseconds, "rating": scaled}
        return pl.DataFrame({**columns, "title": title, "text": text}) if is_plain else None

    def _add_rows(self, reviews: Sequence[tuple[Row, tuple[str, str]]], builder: TableBuilder) -> None:
        numbered = enumerate((row for row, _ in reviews), start=builder.rows)
        builder.add(frame_of([(*row[:4], number) for number, row in numbered]))
        self._texts.add(text_frame([texts for _, texts in reviews]))

    def _reviews(self, reader: LineReader, lines: Iterable[tuple[int, str]]) -> Iterator[tuple[Row, tuple[str, str]]]:
        """Yield (row, title and text) of the reviews that can be used in a reader's lines; `line` from 0."""
        for line, record in self._objects(reader, lines, self.problems):
            if len(self._keys_seen) < 50:
                self._keys_seen.update(record)
            where = f"{reader.path.name}, line {line + 1}"
            time = as_time(record.get(self.time_key), self.milliseconds)
            if fault := self._fault(record, time):
                self.problems.add(fault, where)
                continue
            rating = self.rating(record.get(self.rating_key), where)
            texts = (_joined(record.get(self.review_title_key)), _joined(record.get(self.review_text_key)))
            yield (record[self.user_key], record[self.item_key], time, rating, line), texts

    def _fault(self, record: Record, time: int | None) -> str | None:
        """Return why a review cannot be used, None if it can."""
        for name in (self.user_key, self.item_key):
            value = record.get(name)
            if value is None or value == "":
                return f"review without {name}"
            if not isinstance(value, str) or not value.strip().isprintable():
                return f"review whose {name} is not plain text"
        if time is None:
            missing = record.get(self.time_key) is None
            return f"review without {self.time_key}" if missing else f"review whose {self.time_key} is not a time"
        return None

    def described(self, wanted: set[str], problems: Problems) -> Iterator[Item]:
        """Yield the wanted items of the metadata, the first record of each."""
        for item_id, record, where in self._items(wanted, problems):
            yield _ItemReader(problems, f"{where}: {item_id}").item(item_id, record, self)

    def described_ids(self, wanted: set[str]) -> tuple[int, set[str]]:
        """See `Source`; makes no texts but titles."""
        described, titled = 0, set()
        for item_id, record, where in self._items(wanted, self.problems):
            described += 1
            if _ItemReader(self.problems, f"{where}: {item_id}").has_title(item_id, record, self):
                titled.add(item_id)
        return described, titled

    def _items(self, wanted: set[str], problems: Problems) -> Iterator[tuple[str, Record, str]]:
        """Yield (id, record, file and line) of the wanted items, the first record of each."""
        seen: set[str] = set()
        for path in self.item_files:
            reader = LineReader(path, self.form.encoding, problems)
            for line, record in self._objects(reader, reader, problems):
                where, item_id = f"{path.name}, line {line + 1}", record.get(self.item_key)
                if not isinstance(item_id, str) or not (item_id := tidy_id(item_id)):
                    problems.add("item without id", where)
                elif item_id in seen:
                    problems.add("item described twice, first kept", f"{where}: {item_id}")
                elif item_id in wanted:
                    seen.add(item_id)
                    yield item_id, record, where
            reader.finish()

    def _objects(
        self, reader: LineReader, lines: Iterable[tuple[int, str]], problems: Problems
    ) -> Iterator[tuple[int, Record]]:
        """Yield (line from 0, object) of a reader's lines; lines that are no objects are counted."""
        for line, text in lines:
            if not text.strip():
                continue
            where = f"{reader.path.name}, line {line + 1}"
            try:
                record = _parse(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                problems.add("line that does not parse", where)
                continue
            if not isinstance(record, dict):
                problems.add("line that is no object", where)
            elif not reader.is_foreign(line, text):
                yield line, record


class Amazon2014(Amazon2023, name="amazon2014"):
    """The same of the data sets of 2014 and 2018."""

    schema = "Amazon 2014/2018"
    usual_reviews = tuple(
        f"{name}.json{end}"
        for end in (".gz", "", ".zst")
        for name in ("reviews_{domain}_5", "reviews_{domain}", "{domain}_5", "{domain}")
    )
    usual_metadata = ("meta_{domain}.json.gz", "meta_{domain}.json", "meta_{domain}.json.zst")
    user_key, item_key, time_key, rating_key = "reviewerID", "asin", "unixReviewTime", "overall"
    milliseconds = 1000
    review_title_key, review_text_key = "summary", "reviewText"
    brand_key, features_key, category_keys = "brand", "feature", ["categories", "category"]


class _ItemReader:
    """Reads the fields of one item; those that cannot be used are empty and counted."""

    def __init__(self, problems: Problems, where: str):
        self._problems, self._where = problems, where

    def has_title(self, item_id: str, record: Record, keys: Amazon2023) -> bool:
        """Return whether an item has a title, and count what `item` counts."""
        price, categories = (
            record.get("price"),
            next((record[name] for name in keys.category_keys if record.get(name)), []),
        )
        is_plain = (
            all(isinstance(record.get(name, ""), _TEXTS) for name in ("description", keys.features_key, keys.brand_key))
            and (price is None or (type(price) in (int, float) and 0 < price < math.inf))
            and (isinstance(categories, list) and all(isinstance(part, str) for part in categories))
            and _is_flat(record.get("details"))
        )
        return bool(self._title(record) if is_plain else self.item(item_id, record, keys).title)

    def _title(self, record: Record) -> str:
        title = self._text(record, "title")
        if is_program(title) or (not title and has_text(record.get("title"))):
            self._add(PROGRAM_AS_TITLE, record["title"])
            return ""
        return title

    def item(self, item_id: str, record: Record, keys: Amazon2023) -> Item:
        """Return the item of a record."""
        title, price = self._title(record), record.get("price")
        if (shown := clean_price(price)) is None and price not in (None, ""):
            self._add("item with a price that is none, left out", price)
        description = self._text(record, "description")
        return Item(
            item_id=item_id,
            title=title,
            description=description or self._text(record, keys.features_key),
            details=self._details(record.get("details")),
            brand=self._text(record, keys.brand_key),
            categories=self._categories(record, keys.category_keys),
            price=shown or "",
        )

    def _add(self, kind: str, value: object) -> None:
        self._problems.add(kind, f"{self._where}: {value!r:.100}")

    def _text(self, record: Record, key: str) -> str:
        value = record.get(key)
        if value is not None and not isinstance(value, (str, list)):
            self._add(f"item whose {key} is not text, left out", value)
        return _text(value)

    def _categories(self, record: Record, keys: Sequence[str]) -> tuple[str, ...]:
        key = next((name for name in keys if record.get(name)), None)
        value = record[key] if key else []
        if isinstance(value, list) and value and isinstance(value[0], list):
            value = value[0]  # 2014 lists several paths; the first is the main one
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
            self._add(f"item whose {key} are not text, left out", value)
            value = [part for part in value if isinstance(part, str)] if isinstance(value, list) else []
        return tuple(filter(None, map(_text, value)))

    def _details(self, value: object) -> str:
        """Return details as JSON members; the 2023 set has them as an object or as the JSON text of one."""
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                return _text(value)
        if value is not None and not isinstance(value, dict):
            self._add("item whose details are no object, left out", value)
        try:
            return clean_text(json.dumps(value, ensure_ascii=False)[1:-1]) if isinstance(value, dict) else ""
        except (RecursionError, ValueError):
            self._add("item whose details are nested too deeply, left out", "")
            return ""


def _parse(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        if text.lstrip()[:2] != "{'":  # the metadata of 2014 are Python literals
            raise
        return ast.literal_eval(text)


def _is_flat(details: object) -> bool:
    """Return whether details are none, or an object whose values are not nested further than by one level."""
    if not isinstance(details, dict):
        return details is None
    inner = [value for value in details.values() if isinstance(value, (dict, list))]
    return not any(
        isinstance(v, (dict, list)) for one in inner for v in (one.values() if isinstance(one, dict) else one)
    )


def _joined(value: object) -> str:
    """Return the text of a string or a list of strings; empty for anything else."""
    if isinstance(value, list):
        return " ".join(part for part in value if isinstance(part, str))
    return value if isinstance(value, str) else ""


def _text(value: object) -> str:
    return clean_text(_joined(value))
