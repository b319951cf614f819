"""JSON lines as columns, many at once, and the texts of reviews in files beside.

`strict_frame` reads a block of lines with polars only if that gives what the json module gives for each line. polars
alone would take a number for a text, the first of two equal keys, and half a surrogate pair for something else.
"""

from __future__ import annotations

import io
import re
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twice_rec.data.sources import lines
from twice_rec.data.sources.lines import Block
from twice_rec.data.sources.values import clean_text
from twice_rec.progress import progress

# The first half of a surrogate pair as an escape, and no second half behind it.
_HALF_PAIR = r"\\u[dD][89abAB][0-9a-fA-F]{2}(?:[^\\]|\\[^u]|\\u[^dD]|\\u[dD][^c-fC-F])"
_NOT_CLEAN = r"[^ -~]|[&<]|  |^ | $"  # what `clean_text` may change
_PART = 1 << 26  # bytes of texts per file


def strict_frame(block: Block, schema: Mapping[str, type[pl.DataType]]) -> pl.DataFrame | None:
    """Return the keys of a block's records as columns; None if any line is odd.

    In a block that is not odd each line is one JSON object in UTF-8 that has each key once, with a value of its type.

    Args:
        schema: key -> String, Int64 or Float64.
    """
    try:
        whole = pl.Series([block.data.decode("utf-8")])
    except UnicodeDecodeError:
        return None
    names = "|".join(map(re.escape, schema))
    texts = "|".join(re.escape(name) for name, kind in schema.items() if kind is pl.String)
    expected = {f'"(?:{names})"': len(schema), f'"(?:{texts})"\\s*:\\s*"': texts.count("|") + 1}
    if whole.str.contains(_HALF_PAIR).item() or _has_long_line(block.data):
        return None
    if any(whole.str.count_matches(key).item() != times * block.lines for key, times in expected.items()):
        return None
    try:
        frame = pl.read_ndjson(io.BytesIO(block.data), schema=schema)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException):
        return None
    return None if len(frame) != block.lines or any(column.null_count() for column in frame) else frame


def _has_long_line(data: bytes) -> bool:
    """Return whether a line may have `LONGEST_LINE` characters."""
    end = -1
    while end + lines.LONGEST_LINE < len(data):
        end = data.rfind(b"\n", end + 1, end + 1 + lines.LONGEST_LINE)
        if end < 0:
            return True
    return False


class TextStore:
    """Titles and texts of reviews in Parquet files, by their number, for as long as this object lives.

    Args:
        folder: where the files go; None for the system's temporary folder.
    """

    def __init__(self, folder: Path | None):
        self._folder = Path(tempfile.mkdtemp(prefix="reviews-", dir=folder))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._begins = [0]  # number of the first review of each file, and of the next
        self._waiting: list[pl.DataFrame] = []

    def add(self, texts: pl.DataFrame) -> None:
        """Add the next reviews: columns title and text, as they are in the source."""
        self._waiting.append(texts)
        if sum(part.estimated_size() for part in self._waiting) >= _PART:
            self._write()

    def _write(self) -> None:
        if self._waiting:
            whole, self._waiting = pl.concat(self._waiting), []
            whole.write_parquet(self._path(len(self._begins) - 1), compression="zstd", compression_level=1)
            self._begins.append(self._begins[-1] + len(whole))

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:05d}.parquet"

    def read(self, numbers: NDArray[np.int64]) -> pl.DataFrame:
        """Return the clean titles and texts of these reviews, in their order; empty ones for a number below 0."""
        self._write()
        order = np.argsort(numbers, kind="stable")
        ordered = numbers[order]
        found = [
            pl.DataFrame({"title": [""], "text": [""]}).select(pl.all().repeat_by(int((ordered < 0).sum())).explode())
        ]
        bounds = np.searchsorted(ordered, self._begins)
        for number in progress(range(len(self._begins) - 1), desc="reading reviews", unit="file"):
            wanted = ordered[bounds[number] : bounds[number + 1]] - self._begins[number]
            if len(wanted):
                part = pl.read_parquet(self._path(number), glob=False)[wanted]
                found.append(part.select(clean_texts(part["title"]), clean_texts(part["text"])))
        places = np.empty(len(order), dtype=np.int64)
        places[order] = np.arange(len(order))
        return pl.concat(found)[places]


def clean_texts(texts: pl.Series) -> pl.Series:
    """Return the clean text of each; most are clean already, which polars sees."""
    odd = np.flatnonzero(texts.str.contains(_NOT_CLEAN).to_numpy())
    if not len(odd):
        return texts
    return texts.clone().scatter(odd, pl.Series([clean_text(text) for text in texts.gather(odd).to_list()]))


def text_frame(rows: list[tuple[str, str]]) -> pl.DataFrame:
    """Return (title, text) pairs as `TextStore.add` takes them; half a surrogate pair becomes a question mark."""
    try:
        return pl.DataFrame(rows, schema={"title": pl.String, "text": pl.String}, orient="row")
    except UnicodeEncodeError:
        return text_frame([tuple(text.encode("utf-8", "replace").decode() for text in row) for row in rows])
