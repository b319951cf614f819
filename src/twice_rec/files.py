"""Files that other stages rely on: atomic writes, JSON, records, hashes.

Whatever goes wrong with a user's input is raised as `InputError`, whose one message
names the file, the line or key, what was found, what was expected, and what to do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from twice_rec.errors import InputError

R = TypeVar("R")

MANIFEST = "manifest.json"  # what a finished stage writes last; see `run.Manifest`

_REMEDY = "restore it, or run the stage that makes it again with --overwrite true"


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes `path`'s place, on failure it is removed.

    What was at `path` before stays whole until the moment it is replaced.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=f".tmp{target.suffix}")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes private files
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Yield an empty folder under `parent`, which no other process writes, for large files on the way.

    It goes at the end; what a killed process left of it goes first.
    """
    path = parent / ".scratch"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def remove_temporaries(folder: Path) -> None:
    """Remove what killed processes left of their `atomic_path`; for a folder that no other process writes."""
    for path in folder.rglob(".*.tmp*"):
        with contextlib.suppress(OSError):
            path.unlink()


def set_aside(path: Path) -> Path:
    """Rename a damaged file or folder to `damaged-NAME`, under which nobody looks for it; return its new path."""
    number, new = 1, path.with_name(f"damaged-{path.name}")
    while new.exists():
        number += 1
        new = path.with_name(f"damaged-{number}-{path.name}")
    path.rename(new)
    return new


def write_text(path: Path | str, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: object) -> None:
    """Write an indented JSON file atomically; floats that are not finite are an error, not `NaN`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path | str, rows: Iterable[Mapping[str, object]]) -> int:
    """Write one JSON object per line atomically; return the number of lines."""
    count = 0
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count


def read_json(path: Path | str) -> Any:
    """Read a JSON file; InputError if it is missing or does not parse."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None


def read_jsonl(path: Path | str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) of a file this project wrote.

    Raises:
        InputError: if the file is missing or empty, or a line is not a JSON object; names the line.
    """
    for number, line in _lines(path):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise _damaged(path, number, f"{error.msg}, column {error.colno}") from None
        if not isinstance(value, dict):
            raise InputError(f"{path}, line {number}: expected a JSON object, found {type(value).__name__}")
        yield number, value


def _lines(path: Path | str) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                yield number, line
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}, line {number + 1}: not UTF-8: {error}") from None
    if number == 0:
        raise InputError(f"{path}: the file is empty; {_REMEDY}")


def _damaged(path: Path | str, number: int, reason: str) -> InputError:
    return InputError(f"{path}, line {number}: broken JSON ({reason}); the file is damaged: {_REMEDY}")


def write_records(path: Path | str, records: Iterable[Any]) -> int:
    """Write dataclass records (see `records`) as JSON lines; fields that hold their default are left out."""
    return write_jsonl(path, (to_row(record) for record in records))


def to_row(record: Any) -> dict[str, object]:
    """Return a record as a JSON object; fields that hold their default are left out."""
    row: dict[str, object] = {}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if field.default is not dataclasses.MISSING and value == field.default:
            continue
        if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            value = [to_row(entry) for entry in value]
        row[field.name] = value
    return row


def read_records(path: Path | str, record: type[R]) -> Iterator[R]:
    """Read what `write_records` wrote; InputError names the line and the key that does not fit the record."""
    adapter = _adapter(record)
    for number, line in _lines(path):
        yield _parsed(adapter, record, path, number, line)


_USER_FIRST = re.compile(r'\{"user_id": ?"([^"\\]*)"')


def records_of_users(path: Path | str, record: type[R], users: Collection[str]) -> Iterator[R]:
    """Read the records of some users, see `read_records`; other lines are passed over, mostly without a parse."""
    adapter = _adapter(record)
    for number, line in _lines(path):
        first = _USER_FIRST.match(line)
        if first is None or first[1] in users:
            found = _parsed(adapter, record, path, number, line)
            if getattr(found, "user_id") in users:  # noqa: B009 - records of users have one
                yield found


def _adapter(record: type[R]) -> TypeAdapter[R]:
    return TypeAdapter(with_config(ConfigDict(strict=True, extra="forbid"))(record))


def _parsed(adapter: TypeAdapter[R], record: type[R], path: Path | str, number: int, line: str) -> R:
    try:
        return adapter.validate_json(line)
    except ValidationError as error:
        fault = error.errors()[0]
        if fault["type"] == "json_invalid":
            raise _damaged(path, number, fault["msg"]) from None
        where = ".".join(map(str, fault["loc"]))
        names = ", ".join(field.name for field in dataclasses.fields(record))  # type: ignore[arg-type]
        raise InputError(
            f"{path}, line {number}: not a {record.__name__}: {where}: {fault['msg']}, found "
            f"{fault['input']!r:.80}; expected the keys {names}"
        ) from None


def hash_file(path: Path | str) -> str:
    """Return the SHA-256 of a file's bytes, or of the names and hashes of a folder's files (but `manifest.json`)."""
    source = Path(path)
    digest = hashlib.sha256()
    if source.is_dir():
        for child in sorted(p for p in source.rglob("*") if p.is_file() and p.name != MANIFEST):
            digest.update(f"{child.relative_to(source).as_posix()}\0{hash_file(child)}\n".encode())
    else:
        with open(source, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
