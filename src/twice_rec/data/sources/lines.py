"""The lines of a source's text file, plain, gzip or Zstandard, in a stated encoding.

A line that does not fit is counted; the file is refused if it is plainly in another encoding.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from twice_rec.data.sources.base import Problems
from twice_rec.errors import InputError
from twice_rec.progress import progress

LONGEST_LINE = 10_000_000  # characters; a longer one is damage
_BLOCK = 1 << 25  # bytes that are read at once
_CHUNK = 1 << 20
_CUT_OFF = (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError)
_REMEDY = "state the encoding of the source's files (--encoding latin-1, gbk, utf-16, ...), or convert them to UTF-8"


@dataclass(frozen=True)
class Block:
    """Whole lines of a file, one after another, with their ends."""

    first_line: int  # from 0
    data: bytes
    lines: int

    def parts(self, number: int) -> Iterator[Block]:
        """Yield the same lines in about so many smaller blocks."""
        begin, first, step = 0, self.first_line, len(self.data) // number + 1
        while begin < len(self.data):
            end = self.data.find(b"\n", min(begin + step, len(self.data)) - 1) + 1 or len(self.data)
            part = _block(first, self.data[begin:end])
            yield part
            begin, first = end, first + part.lines


def _block(first_line: int, data: bytes) -> Block:
    return Block(first_line, data, data.count(b"\n") + (data[-1:] != b"\n"))


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

    @property
    def has_blocks(self) -> bool:
        """Whether the file can be read in blocks, which is faster: lines of UTF-8 end at a byte."""
        return codecs.lookup(self._encoding).name == "utf-8"

    def __iter__(self) -> Iterator[tuple[int, str]]:
        """Yield (line from 0, text without its end); a damaged end of the file is counted, not raised."""
        if self.has_blocks:
            for block in self.blocks():
                yield from self.lines_of(block)
            return
        with self._opened() as stream:
            try:
                text = io.TextIOWrapper(stream, self._encoding, "surrogateescape", newline="\n")
                for line, whole in enumerate(iter(lambda: text.readline(LONGEST_LINE), "")):
                    longer = len(whole) == LONGEST_LINE and whole[-1] != "\n"
                    while whole and longer and whole[-1] != "\n":
                        whole = text.readline(LONGEST_LINE)
                    self._lines = line + 1
                    yield line, self._tidy(whole, longer)
            except _CUT_OFF as error:
                self._add_cut_off(error)
            except UnicodeError as error:  # a file in UTF-16 without its mark raises one without `reason`
                reason = getattr(error, "reason", error)
                raise InputError(f"{self.path}: not {self._encoding}: {reason}; {_REMEDY}") from None

    def blocks(self) -> Iterator[Block]:
        """Yield all lines in blocks of about `_BLOCK` bytes; a damaged end of the file is counted, not raised.

        A line that is far too long keeps only its beginning, so that it is still seen as too long.
        """
        first, waiting, size, has_end = 0, list[bytes](), 0, False
        cut_off: Exception | None = None
        with self._opened() as stream:
            while True:
                try:
                    chunk = stream.read1(_CHUNK)
                except _CUT_OFF as error:
                    chunk, cut_off = b"", error
                if b"\n" in chunk or size <= _BLOCK + 4 * LONGEST_LINE:
                    waiting.append(chunk)
                    size, has_end = size + len(chunk), has_end or b"\n" in chunk
                if chunk and (size < _BLOCK or not has_end):
                    continue
                whole = b"".join(waiting)
                end = whole.rfind(b"\n") + 1 if chunk or cut_off else len(whole)  # what is cut off has no last line
                if end:
                    yield (block := _block(first, whole[:end]))
                    first += block.lines
                if not chunk:
                    break
                waiting, size, has_end = [whole[end:]], len(whole) - end, False
        if cut_off:
            self._add_cut_off(cut_off)

    def lines_of(self, block: Block) -> Iterator[tuple[int, str]]:
        """Yield (line from 0, text without its end) of a block."""
        lines = block.data.split(b"\n")[: block.lines]
        for line, raw in enumerate(lines, start=block.first_line):
            self._lines = line + 1
            yield line, self._tidy(raw.decode("utf-8", "surrogateescape"))

    def pass_over(self, block: Block) -> None:
        """Note that all lines of a block are records in the encoding."""
        self._lines = block.first_line + block.lines
        if not block.data.isascii():
            codes = np.frombuffer(block.data, dtype=np.uint8)
            ends, beyond = np.flatnonzero(codes == 10), np.flatnonzero(codes >= 128)
            self._fit += len(np.unique(np.searchsorted(ends, beyond)))

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        """Open the file, unpacked, with a progress bar."""
        bar = progress(desc=f"reading {self.path.name}", total=self.path.stat().st_size, unit="B", unit_scale=True)
        with open(self.path, "rb") as file, bar:
            stream = _unpacked(file, bar.update)
            with contextlib.suppress(*_CUT_OFF):
                self.refuse_wide_characters(stream.peek(4)[:4])
            yield stream

    def _tidy(self, line: str, longer: bool = False) -> str:
        """Return a line without its end and mark; one that is too long, or goes on, is counted and empty."""
        text = line.removeprefix("\ufeff").rstrip("\r\n")
        if longer or len(text) >= LONGEST_LINE:
            self._problems.add(f"line of more than {LONGEST_LINE:,} characters, skipped", self.path.name)
            return ""
        return text

    def _add_cut_off(self, error: Exception) -> None:
        self._problems.add("file that is cut off or damaged, read up to there", f"{self.path.name}: {error}")

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


def beginning(path: Path) -> tuple[bytes, float]:
    """Return the first megabytes of a file, unpacked, and how many times larger it is unpacked; InputError if empty."""
    counts: list[int] = []
    found = b""
    with open(path, "rb") as file:
        stream = _unpacked(file, counts.append)
        with contextlib.suppress(*_CUT_OFF):
            while len(found) < 4 * _CHUNK and (chunk := stream.read1(_CHUNK)):
                found += chunk
    if not found:
        raise InputError(f"{path}: nothing can be unpacked; fetch it again")
    return found, max(1.0, len(found) / sum(counts))


def _unpacked(file: io.BufferedReader, count: Callable[[int], object]) -> Any:
    """Return a buffered stream of what a file holds, unpacked; `count` is told how many bytes are read of the file."""
    raw, start = _Counted(file, count), file.peek(4)[:4]
    if start[:2] == b"\x1f\x8b":
        return gzip.GzipFile(fileobj=raw)
    return io.BufferedReader(_Zstandard(raw) if start == b"\x28\xb5\x2f\xfd" else raw, _CHUNK)


class _Counted(io.RawIOBase):
    """A file of bytes that tells how many are read."""

    def __init__(self, file: io.BufferedReader, count: Callable[[int], object]):
        self._file, self._count = file, count

    def readable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def readinto(self, buffer: Any) -> int:
        """See `io.RawIOBase`."""
        count = self._file.readinto(buffer)
        self._count(count)
        return count


class _Zstandard(io.RawIOBase):
    """The unpacked bytes of a Zstandard file, of one frame after another; EOFError if the last one is cut off."""

    def __init__(self, packed: io.RawIOBase):
        self._packed = packed
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._rest, self._is_inside = memoryview(b""), False

    def readable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def readinto(self, buffer: Any) -> int:
        """See `io.RawIOBase`."""
        while not self._rest:
            if self._frame.eof:
                packed, self._is_inside = self._frame.unused_data, False
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            else:
                packed = b""
            packed = packed or self._packed.read(_CHUNK // 8)
            if not packed:
                if self._is_inside:
                    raise EOFError("the Zstandard frame ended before its end marker was reached")
                return 0
            self._is_inside = True
            self._rest = memoryview(self._frame.decompress(packed))
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


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
