"""Amazon reviews in the raw 2023 schema and in the older one of 2014 and 2018.

Files are JSON lines, plain or gzip, read as a stream. What cannot be used is counted by kind and reported; only a
file in which nothing fits the schema is an error. A gzip stream that ends early is read up to its end.
"""

from __future__ import annotations

import ast
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twice_rec.data.sources.base import Problems, PurchaseTable, TableBuilder, clean_text, find_file, titled_among
from twice_rec.errors import InputError
from twice_rec.progress import progress
from twice_rec.records import Item

Record = dict[str, Any]


@dataclass(frozen=True)
class Schema:
    """The keys of one generation of the data set, and its usual file names."""

    name: str
    user: str
    item: str
    time: str
    rating: str
    review_title: str
    review_text: str
    milliseconds: int  # per unit of `time`
    reviews: tuple[str, ...]
    metadata: tuple[str, ...]
    read_item: Callable[[Record], Item]


class AmazonSource:
    """Reviews and item metadata of one domain in one folder.

    Args:
        folder: where the files are.
        domain: fills the usual file names, `Grocery_and_Gourmet_Food`.
        schema: `SCHEMA_2023` or `SCHEMA_2014`.
        reviews_file, metadata_file: other names; without a metadata file no item has a title.
        metadata_required: whether a missing metadata file is an error (it is where untitled items are dropped).
    """

    def __init__(
        self,
        folder: Path,
        domain: str,
        schema: Schema,
        reviews_file: str | None = None,
        metadata_file: str | None = None,
        metadata_required: bool = True,
    ):
        self.problems = Problems()
        self._schema = schema
        names = [reviews_file] if reviews_file else [name.format(domain=domain) for name in schema.reviews]
        self._reviews = find_file(folder, names, "reviews")
        names = [metadata_file] if metadata_file else [name.format(domain=domain) for name in schema.metadata]
        try:
            self._metadata: Path | None = find_file(folder, names, "item metadata")
        except InputError:
            if metadata_required or metadata_file:
                raise
            self._metadata = None

    @property
    def files(self) -> list[Path]:
        """The files that are read."""
        return [self._reviews] + ([self._metadata] if self._metadata else [])

    def purchases(self) -> PurchaseTable:
        """Read the reviews without their texts; `line` counts from 0."""
        schema, table, usable = self._schema, TableBuilder(), 0
        keys_seen: set[str] = set()
        for line, record in _records(self._reviews, self.problems):
            keys_seen.update(record.keys() if len(keys_seen) < 50 else ())
            user, item, time = record.get(schema.user), record.get(schema.item), record.get(schema.time)
            fault = _fault(user, item, time, schema)
            if fault is not None:
                self.problems.add(fault, f"{self._reviews.name}, line {line + 1}")
                continue
            usable += 1
            rating = record.get(schema.rating)
            if not isinstance(rating, (int, float)) or not 1 <= rating <= 5:
                self.problems.add(
                    "review with a rating that is not 1 to 5, kept without", f"line {line + 1}: {rating!r}"
                )
                rating = None
            table.add(user, item, int(time * schema.milliseconds), rating, line)
        if not usable:
            raise InputError(
                f"{self._reviews}: no record fits the {schema.name} schema; expected the keys {schema.user}, "
                f"{schema.item}, {schema.time}; found {', '.join(sorted(keys_seen)[:12]) or 'no JSON object'}. "
                f"Another generation of the data? Sources are amazon2023 and amazon2014"
            )
        return table.build()

    def titled(self, wanted: set[str]) -> set[str]:
        """Which of the wanted ids the metadata give a title; the others are counted."""
        described = self._described(wanted, self.problems)
        kind = "item without title" if self._metadata else "item without title (there is no metadata file)"
        return titled_among(wanted, described, self.problems, kind)

    def items(self, wanted: set[str]) -> list[Item]:
        """The wanted items that have metadata, sorted by id; titles may be empty."""
        return sorted(self._described(wanted, Problems()), key=lambda item: item.item_id)

    def _described(self, wanted: set[str], problems: Problems) -> Iterator[Item]:
        """Wanted items as they stand in the metadata, the first record of an id only."""
        seen: set[str] = set()
        for line, record in _records(self._metadata, problems) if self._metadata else ():
            item_id = record.get(self._schema.item)
            if not isinstance(item_id, str) or not item_id:
                problems.add("item without id", f"{self._metadata.name}, line {line + 1}")  # type: ignore[union-attr]
            elif item_id in wanted:
                if item_id in seen:
                    problems.add("item described twice, first kept", f"line {line + 1}: {item_id}")
                    continue
                seen.add(item_id)
                yield self._schema.read_item(record)

    def reviews(self, lines: set[int]) -> Mapping[int, tuple[str, str]]:
        """Read the reviews again for the texts of the wanted lines."""
        schema = self._schema
        wanted = _records(self._reviews, Problems(), lines)
        return {
            line: (_text(record.get(schema.review_title)), _text(record.get(schema.review_text)))
            for line, record in wanted
        }


def _fault(user: object, item: object, time: object, schema: Schema) -> str | None:
    for name, value in ((schema.user, user), (schema.item, item)):
        if value is None or value == "":
            return f"review without {name}"
        if not isinstance(value, str) or not value.isprintable():
            return f"review whose {name} is not plain text"
    if time is None:
        return f"review without {schema.time}"
    if isinstance(time, bool) or not isinstance(time, (int, float)) or not 0 <= time < 1e15:
        return f"review whose {schema.time} is not a time"
    return None


def _records(path: Path, problems: Problems, only: set[int] | None = None) -> Iterator[tuple[int, Record]]:
    """Yield (line from 0, object), counting lines that are not objects. `only` skips the parsing of other lines."""
    for line, text in enumerate(_lines(path, problems)):
        if only is not None and line not in only:
            continue
        if not text.strip():
            continue
        try:
            record = _parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            problems.add("line that does not parse", f"{path.name}, line {line + 1}")
            continue
        if isinstance(record, dict):
            yield line, record
        else:
            problems.add("line that is no object", f"{path.name}, line {line + 1}")


def _parse(text: bytes) -> object:
    try:
        return json.loads(text)
    except ValueError:
        if text.lstrip()[:2] != b"{'":  # the 2014 metadata are Python literals
            raise
        return ast.literal_eval(text.decode("utf-8"))


def _lines(path: Path, problems: Problems) -> Iterator[bytes]:
    """The lines of a plain or gzip file; a damaged end is counted, not raised."""
    with open(path, "rb") as raw:
        magic = raw.read(2)
        raw.seek(0)
        stream = gzip.GzipFile(fileobj=raw) if magic == b"\x1f\x8b" else raw
        with progress(desc=f"reading {path.name}", total=os.path.getsize(path), unit="B", unit_scale=True) as bar:
            try:
                for number, line in enumerate(stream):
                    if number % 1000 == 0:
                        bar.update(raw.tell() - bar.n)
                    yield line
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                problems.add("file that is cut off or damaged, read up to there", f"{path.name}: {error}")


def _text(value: object) -> str:
    """Clean text of a string or a list of strings; anything else is empty."""
    if isinstance(value, list):
        value = " ".join(part for part in value if isinstance(part, str))
    return clean_text(value) if isinstance(value, str) else ""


def _details(value: object) -> str:
    """Details as JSON members; the 2023 set has them as an object or as JSON text of one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return _text(value)
    return clean_text(json.dumps(value, ensure_ascii=False)[1:-1]) if isinstance(value, dict) else ""


def _price(value: object) -> str:
    return str(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else ""


def _item_2023(record: Record) -> Item:
    categories = record.get("categories")
    return Item(
        item_id=record["parent_asin"],
        title=_text(record.get("title")),
        description=_text(record.get("description")) or _text(record.get("features")),
        details=_details(record.get("details")),
        brand=_text(record.get("store")),
        categories=tuple(map(_text, categories)) if isinstance(categories, list) else (),
        price=_price(record.get("price")),
    )


def _item_2014(record: Record) -> Item:
    categories = record.get("categories") or record.get("category") or []
    if categories and isinstance(categories[0], list):
        categories = categories[0]  # 2014 lists several paths; the first is the main one
    return Item(
        item_id=record["asin"],
        title=_text(record.get("title")),
        description=_text(record.get("description")) or _text(record.get("feature")),
        details=_details(record.get("details")),
        brand=_text(record.get("brand")),
        categories=tuple(map(_text, categories)) if isinstance(categories, list) else (),
        price=_price(record.get("price")),
    )


SCHEMA_2023 = Schema(
    name="Amazon Reviews 2023",
    user="user_id",
    item="parent_asin",
    time="timestamp",
    rating="rating",
    review_title="title",
    review_text="text",
    milliseconds=1,
    reviews=("{domain}.jsonl", "{domain}.jsonl.gz"),
    metadata=("meta_{domain}.jsonl", "meta_{domain}.jsonl.gz"),
    read_item=_item_2023,
)

SCHEMA_2014 = Schema(
    name="Amazon 2014/2018",
    user="reviewerID",
    item="asin",
    time="unixReviewTime",
    rating="overall",
    review_title="summary",
    review_text="reviewText",
    milliseconds=1000,
    reviews=("reviews_{domain}_5.json.gz", "reviews_{domain}.json.gz", "{domain}_5.json.gz", "{domain}.json.gz"),
    metadata=("meta_{domain}.json.gz", "meta_{domain}.json"),
    read_item=_item_2014,
)
