"""The lines of a source's text file, plain or gzip, in a stated encoding.

A line that does not fit is counted; the file is refused if it is plainly in another encoding.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twice_rec.data.sources.base import Problems
from twice_rec.errors import InputError
from twice_rec.progress import progress

LONGEST_LINE = 10_000_000  # characters; a longer one is damage
_REMEDY = "state the encoding of the source's files (--encoding latin-1, gbk, utf-16, ...), or convert them to UTF-8"


class LineReader:
    """Reads the lines of one file; the reader of their contents says which of them are records.

    Raises:
        InputError: if the file begins as UTF-16 or UTF-32, and that is not the encoding.
    """

    def __init__(self, path: Path, encoding: str, problems: Problems):
        self.path = path
        self._encoding = encoding
        self._problems = problems
        self._lines = 0
        self._fit = 0  # records with characters beyond ASCII
        self._foreign: list[int] = []  # lines (from 1) of records that are not in the encoding

    def __iter__(self) -> Iterator[tuple[int, str]]:
        """Yield (line from 0, text without its end); a damaged end of the file is counted, not raised."""
        bar = progress(desc=f"reading {self.path.name}", total=self.path.stat().st_size, unit="B", unit_scale=True)
        with open(self.path, "rb") as raw, bar:
            stream = gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
            try:
                self.refuse_wide_characters(stream.peek(4)[:4])
                text = io.TextIOWrapper(stream, self._encoding, "surrogateescape", newline="\n")
                for line, whole in enumerate(self._whole_lines(text)):
                    if line % 1000 == 0:
                        bar.update(raw.tell() - bar.n)
                    self._lines = line + 1
                    yield line, whole
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                self._problems.add("file that is cut off or damaged, read up to there", f"{self.path.name}: {error}")
            except UnicodeError as error:  # a file in UTF-16 without its mark raises one without `reason`
                reason = getattr(error, "reason", error)
                raise InputError(f"{self.path}: not {self._encoding}: {reason}; {_REMEDY}") from None

    def _whole_lines(self, file: io.TextIOWrapper) -> Iterator[str]:
        """Yield the lines without their ends; one that is too long is counted and empty."""
        for line in iter(lambda: file.readline(LONGEST_LINE), ""):
            text = line.removeprefix("\ufeff") if line[0] == "\ufeff" else line
            if len(line) == LONGEST_LINE and line[-1] != "\n":
                self._problems.add(f"line of more than {LONGEST_LINE:,} characters, skipped", self.path.name)
                text = ""
                while line and line[-1] != "\n":
                    line = file.readline(LONGEST_LINE)
            yield text.rstrip("\r\n")

    def refuse_wide_characters(self, start: bytes) -> None:
        """Refuse a file by its first bytes if it is UTF-16 or UTF-32 and ought not to be."""
        name = codecs.lookup(self._encoding).name
        if (start[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in start) and not name.startswith(("utf-16", "utf-32")):
            raise InputError(f"{self.path}: begins as a file in UTF-16 does, not {self._encoding}; {_REMEDY}")

    def is_foreign(self, line: int, text: str) -> bool:
        """Return whether a record has bytes that are not in the encoding; such a record is counted."""
        if text.isascii():
            return False
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # these bytes were read by `surrogateescape`
            self._foreign.append(line + 1)
            if len(self._foreign) >= 1000:
                self.finish()
            self._problems.add(f"line that is not {self._encoding}, dropped", f"{self.path.name}, line {line + 1}")
            return True
        self._fit += 1
        return False

    def finish(self) -> None:
        """Refuse the file if more of its records are in another encoding than are not; a single one is only damage."""
        foreign = len(self._foreign)
        if foreign > self._fit and (foreign > 1 or foreign * 20 > self._lines):
            found = f"not {self._encoding}, like {foreign:,} of its {self._lines:,} lines"
            raise InputError(f"{self.path}, line {self._foreign[0]}: {found}; {_REMEDY}")


def read_whole_json(path: Path, encoding: str) -> Any:
    """Return what a JSON file holds; InputError if it is in another encoding or does not parse."""
    reader = LineReader(path, encoding, Problems())
    content = path.read_bytes()
    reader.refuse_wide_characters(content[:4])
    try:
        return json.loads(content.decode(encoding).removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not {encoding}: {error.reason}; {_REMEDY}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None
