"""Amazon reviews in the raw schema of 2023, and in the older one of 2014 and 2018.

Files are JSON lines, plain or gzip, read as a stream. What cannot be used is counted by kind and reported. Only a file
in which nothing fits the schema is an error. A gzip stream that ends early is read up to its end.
"""

from __future__ import annotations

import ast
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from twice_rec.data.sources.base import Problems, Row, Source, clean_text
from twice_rec.errors import InputError
from twice_rec.progress import progress
from twice_rec.records import Item

Record = dict[str, Any]


class Amazon2023(Source, name="amazon2023"):
    """Reviews and item metadata of one domain of Amazon Reviews 2023, `Grocery_and_Gourmet_Food`."""

    schema = "Amazon Reviews 2023"
    usual_reviews: tuple[str, ...] = ("{domain}.jsonl", "{domain}.jsonl.gz")
    usual_metadata: tuple[str, ...] = ("meta_{domain}.jsonl", "meta_{domain}.jsonl.gz")
    # The keys of a review, and of an item.
    user_key, item_key, time_key, rating_key = "user_id", "parent_asin", "timestamp", "rating"
    milliseconds = 1  # per unit of time
    review_title_key, review_text_key = "title", "text"
    brand_key, features_key, category_keys = "store", "features", ["categories"]

    def find_files(self) -> None:
        """Find the reviews, and the metadata if there are any or they are required."""
        self.interaction_files = [self.find_file(self.reviews_file, self.usual_reviews, "reviews")]
        try:
            self.item_files = [self.find_file(self.metadata_file, self.usual_metadata, "item metadata")]
        except InputError:
            if self.metadata_required or self.metadata_file:
                raise
            self.without_title = "item without title (there is no metadata file)"

    def rows(self) -> Iterator[Row]:
        """Yield the reviews without their texts, `line` from 0; InputError if no record fits the schema."""
        (path,), usable = self.interaction_files, 0
        keys_seen: set[str] = set()
        for line, record in _records(path, self.problems):
            keys_seen.update(record.keys() if len(keys_seen) < 50 else ())
            if fault := self._fault(record):
                self.problems.add(fault, f"{path.name}, line {line + 1}")
                continue
            usable += 1
            rating = record.get(self.rating_key)
            if not isinstance(rating, (int, float)) or not 1 <= rating <= 5:
                kind = "review with a rating that is not 1 to 5, kept without"
                self.problems.add(kind, f"line {line + 1}: {rating!r}")
                rating = None
            time = int(record[self.time_key] * self.milliseconds)
            yield record[self.user_key], record[self.item_key], time, rating, line
        if not usable:
            raise InputError(
                f"{path}: no record fits the {self.schema} schema; expected the keys {self.user_key}, "
                f"{self.item_key}, {self.time_key}; found {', '.join(sorted(keys_seen)[:12]) or 'no JSON object'}. "
                f"Another generation of the data? Sources are amazon2023 and amazon2014"
            )

    def _fault(self, record: Record) -> str | None:
        """Return why a review cannot be used, None if it can."""
        for name in (self.user_key, self.item_key):
            value = record.get(name)
            if value is None or value == "":
                return f"review without {name}"
            if not isinstance(value, str) or not value.isprintable():
                return f"review whose {name} is not plain text"
        time = record.get(self.time_key)
        if time is None:
            return f"review without {self.time_key}"
        if isinstance(time, bool) or not isinstance(time, (int, float)) or not 0 <= time < 1e15:
            return f"review whose {self.time_key} is not a time"
        return None

    def described(self, wanted: set[str], problems: Problems) -> Iterator[Item]:
        """Yield the wanted items of the metadata, the first record of each."""
        seen: set[str] = set()
        for path in self.item_files:
            for line, record in _records(path, problems):
                item_id = record.get(self.item_key)
                if not isinstance(item_id, str) or not item_id:
                    problems.add("item without id", f"{path.name}, line {line + 1}")
                elif item_id in seen:
                    problems.add("item described twice, first kept", f"line {line + 1}: {item_id}")
                elif item_id in wanted:
                    seen.add(item_id)
                    yield self._item(item_id, record)

    def _item(self, item_id: str, record: Record) -> Item:
        price = record.get("price")
        categories = next((record[name] for name in self.category_keys if record.get(name)), None)
        if isinstance(categories, list) and isinstance(categories[0], list):
            categories = categories[0]  # 2014 lists several paths; the first is the main one
        return Item(
            item_id=item_id,
            title=_text(record.get("title")),
            description=_text(record.get("description")) or _text(record.get(self.features_key)),
            details=_details(record.get("details")),
            brand=_text(record.get(self.brand_key)),
            categories=tuple(map(_text, categories)) if isinstance(categories, list) else (),
            price=str(price) if isinstance(price, (str, int, float)) and not isinstance(price, bool) else "",
        )

    def reviews(self, lines: set[int]) -> Mapping[int, tuple[str, str]]:
        """Read the reviews again for the texts of the wanted lines."""
        (path,), keys = self.interaction_files, (self.review_title_key, self.review_text_key)
        wanted = _records(path, Problems(), lines)
        return {line: (_text(record.get(keys[0])), _text(record.get(keys[1]))) for line, record in wanted}


class Amazon2014(Amazon2023, name="amazon2014"):
    """The same of the data sets of 2014 and 2018."""

    schema = "Amazon 2014/2018"
    usual_reviews = ("reviews_{domain}_5.json.gz", "reviews_{domain}.json.gz", "{domain}_5.json.gz", "{domain}.json.gz")
    usual_metadata = ("meta_{domain}.json.gz", "meta_{domain}.json")
    user_key, item_key, time_key, rating_key = "reviewerID", "asin", "unixReviewTime", "overall"
    milliseconds = 1000
    review_title_key, review_text_key = "summary", "reviewText"
    brand_key, features_key, category_keys = "brand", "feature", ["categories", "category"]


def _records(path: Path, problems: Problems, only: set[int] | None = None) -> Iterator[tuple[int, Record]]:
    """Yield (line from 0, object), counting lines that are not objects. `only` skips the parsing of other lines."""
    for line, text in enumerate(_lines(path, problems)):
        if (only is not None and line not in only) or not text.strip():
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
        if text.lstrip()[:2] != b"{'":  # the metadata of 2014 are Python literals
            raise
        return ast.literal_eval(text.decode("utf-8"))


def _lines(path: Path, problems: Problems) -> Iterator[bytes]:
    """Yield the lines of a plain or gzip file; a damaged end is counted, not raised."""
    bar = progress(desc=f"reading {path.name}", total=path.stat().st_size, unit="B", unit_scale=True)
    with open(path, "rb") as raw, bar:
        stream = gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
        try:
            for number, line in enumerate(stream):
                if number % 1000 == 0:
                    bar.update(raw.tell() - bar.n)
                yield line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            problems.add("file that is cut off or damaged, read up to there", f"{path.name}: {error}")


def _text(value: object) -> str:
    """Return the clean text of a string or a list of strings; empty for anything else."""
    if isinstance(value, list):
        value = " ".join(part for part in value if isinstance(part, str))
    return clean_text(value) if isinstance(value, str) else ""


def _details(value: object) -> str:
    """Return details as JSON members; the 2023 set has them as an object or as the JSON text of one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return _text(value)
    return clean_text(json.dumps(value, ensure_ascii=False)[1:-1]) if isinstance(value, dict) else ""
