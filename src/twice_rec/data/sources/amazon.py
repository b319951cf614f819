"""Amazon reviews in the raw schema of 2023, and in the older one of 2014 and 2018.

Files are JSON lines, plain or gzip, read as a stream. What cannot be used is counted by kind and reported. Only a file
in which nothing fits the schema is an error. A gzip stream that ends early is read up to its end.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from twice_rec.data.sources.base import Problems, Row, Source
from twice_rec.data.sources.lines import LineReader
from twice_rec.data.sources.values import (
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
        for line, record in self._records(path, self.problems):
            keys_seen.update(record.keys() if len(keys_seen) < 50 else ())
            where, time = f"{path.name}, line {line + 1}", as_time(record.get(self.time_key), self.milliseconds)
            if fault := self._fault(record, time):
                self.problems.add(fault, where)
                continue
            usable += 1
            yield (
                record[self.user_key],
                record[self.item_key],
                time,
                self.rating(record.get(self.rating_key), where),
                line,
            )
        if not usable:
            found = f"found {', '.join(sorted(keys_seen)[:12]) or 'no JSON object (an array? jq -c .[] splits it)'}"
            raise InputError(
                f"{path}: no record fits the {self.schema} schema, one JSON object per line with the keys "
                f"{self.user_key}, {self.item_key}, {self.time_key}; {found}; {'; '.join(self.problems.lines()[:3])}. "
                f"Another generation of the data? Sources are amazon2023 and amazon2014"
            )

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
        seen: set[str] = set()
        for path in self.item_files:
            for line, record in self._records(path, problems):
                where, item_id = f"{path.name}, line {line + 1}", record.get(self.item_key)
                if not isinstance(item_id, str) or not (item_id := tidy_id(item_id)):
                    problems.add("item without id", where)
                elif item_id in seen:
                    problems.add("item described twice, first kept", f"{where}: {item_id}")
                elif item_id in wanted:
                    seen.add(item_id)
                    yield _ItemReader(problems, f"{where}: {item_id}").item(item_id, record, self)

    def reviews(self, lines: set[int]) -> Mapping[int, tuple[str, str]]:
        """Read the reviews again for the texts of the wanted lines."""
        (path,), keys = self.interaction_files, (self.review_title_key, self.review_text_key)
        wanted = self._records(path, Problems(), lines)
        return {line: (_text(record.get(keys[0])), _text(record.get(keys[1]))) for line, record in wanted}

    def _records(self, path: Path, problems: Problems, only: set[int] | None = None) -> Iterator[tuple[int, Record]]:
        """Yield (line from 0, object), counting lines that are not objects. `only` skips the parsing of other lines."""
        reader = LineReader(path, self.form.encoding, problems)
        for line, text in reader:
            if (only is not None and line not in only) or not text.strip():
                continue
            where = f"{path.name}, line {line + 1}"
            try:
                record = _parse(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                problems.add("line that does not parse", where)
                continue
            if not isinstance(record, dict):
                problems.add("line that is no object", where)
            elif not reader.is_foreign(line, text):
                yield line, record
        reader.finish()


class Amazon2014(Amazon2023, name="amazon2014"):
    """The same of the data sets of 2014 and 2018."""

    schema = "Amazon 2014/2018"
    usual_reviews = tuple(
        f"{name}.json{end}"
        for end in (".gz", "")
        for name in ("reviews_{domain}_5", "reviews_{domain}", "{domain}_5", "{domain}")
    )
    usual_metadata = ("meta_{domain}.json.gz", "meta_{domain}.json")
    user_key, item_key, time_key, rating_key = "reviewerID", "asin", "unixReviewTime", "overall"
    milliseconds = 1000
    review_title_key, review_text_key = "summary", "reviewText"
    brand_key, features_key, category_keys = "brand", "feature", ["categories", "category"]


class _ItemReader:
    """Reads the fields of one item; those that cannot be used are empty and counted."""

    def __init__(self, problems: Problems, where: str):
        self._problems, self._where = problems, where

    def item(self, item_id: str, record: Record, keys: Amazon2023) -> Item:
        """Return the item of a record."""
        title, price = self._text(record, "title"), record.get("price")
        if is_program(title) or (not title and has_text(record.get("title"))):
            self._add(PROGRAM_AS_TITLE, record["title"])
            title = ""
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


def _text(value: object) -> str:
    """Return the clean text of a string or a list of strings; empty for anything else."""
    if isinstance(value, list):
        value = " ".join(part for part in value if isinstance(part, str))
    return clean_text(value) if isinstance(value, str) else ""
