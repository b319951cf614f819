"""Files that other stages rely on: JSON lines, manifests, hashes, atomic writes.

Standard library and numpy only. Whatever goes wrong with a user's input is raised as `InputError`, whose one message
names the file, the line or key, what was found, what was expected, and what to do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

R = TypeVar("R")


class InputError(Exception):
    """Something the user gave cannot be used. The message says what, where, and what to do about it."""


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes `path`'s place, on failure it is removed.

    What stood at `path` before stays whole until the moment it is replaced.
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


def write_text(path: Path | str, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: object) -> None:
    """Write an indented JSON file atomically; floats that are not finite are an error, not `NaN`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path | str, rows: Iterable[Mapping[str, object]]) -> int:
    """Write one JSON object a line atomically; returns the number of lines."""
    count = 0
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count


def read_json(path: Path | str) -> Any:
    """Read a JSON file; InputError where it is missing or does not parse."""
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
        InputError: for a missing or empty file, and for a line that is not a JSON object, with its number.
    """
    try:
        file = open(path, encoding="utf-8")  # noqa: SIM115 - closed below
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    number = 0
    with file:
        try:
            for number, line in enumerate(file, start=1):
                value = json.loads(line)
                if not isinstance(value, dict):
                    raise InputError(f"{path}, line {number}: expected a JSON object, found {type(value).__name__}")
                yield number, value
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}, line {number}: broken JSON ({error.msg}, column {error.colno}); the file is damaged: "
                "delete it and run the stage that makes it again"
            ) from None
        except UnicodeDecodeError as error:
            raise InputError(f"{path}, line {number + 1}: not UTF-8: {error}") from None
    if number == 0:
        raise InputError(f"{path}: the file is empty; delete it and run the stage that makes it again")


def write_records(path: Path | str, records: Iterable[Any]) -> int:
    """Write dataclass records (see `records`) as JSON lines; fields that hold their default are left out."""
    return write_jsonl(path, (to_row(record) for record in records))


def to_row(record: Any) -> dict[str, object]:
    """A record as a JSON object; fields that hold their default are left out."""
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
    build = _builder(record)
    for number, row in read_jsonl(path):
        try:
            yield build(row)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"no key {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(
                f"{path}, line {number}: not a {record.__name__}: {reason}; expected the keys "
                f"{', '.join(field.name for field in dataclasses.fields(record))}"  # type: ignore[arg-type]
            ) from None


def _builder(record: type[R]) -> typing.Callable[[dict[str, Any]], R]:
    """A function from a row to the record; the conversions are worked out once, not once a row."""
    hints = typing.get_type_hints(record)
    convert = {name: _converter(hint) for name, hint in hints.items()}
    fields = dataclasses.fields(record)  # type: ignore[arg-type]
    required = [f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]

    def build(row: dict[str, Any]) -> R:
        for name in required:
            if name not in row:
                raise KeyError(name)
        unknown = row.keys() - convert.keys()
        if unknown:
            raise TypeError(f"unknown key {min(unknown)!r}")
        return record(**{name: convert[name](value) for name, value in row.items()})

    return build


def _converter(hint: Any) -> typing.Callable[[Any], Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _builder(hint)
    if origin is tuple:
        inner = _converter(arguments[0])
        return lambda value: tuple(map(inner, _checked(value, (list,))))
    if origin is dict:
        inner = _converter(arguments[1])
        return lambda value: {key: inner(entry) for key, entry in _checked(value, (dict,)).items()}
    if origin is typing.Literal:
        return lambda value: _one_of(value, arguments)
    alternatives = arguments if origin in (typing.Union, types.UnionType) else (hint,)
    allowed = tuple(alternatives) + ((int,) if float in alternatives else ())
    return lambda value: _checked(value, allowed)


def _checked(value: Any, allowed: tuple[type, ...]) -> Any:
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        names = " or ".join(kind.__name__ for kind in allowed)
        raise TypeError(f"expected {names}, found {value!r:.80}")
    return value


def _one_of(value: Any, allowed: tuple[Any, ...]) -> Any:
    if value not in allowed:
        raise ValueError(f"expected one of {', '.join(map(str, allowed))}, found {value!r:.80}")
    return value


def hash_file(path: Path | str) -> str:
    """SHA-256 of a file's bytes, or of the names and hashes of a folder's files (without `manifest.json`)."""
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


MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a finished stage writes beside its outputs, last of all: without it the stage is not finished.

    Args:
        stage: name of the stage.
        config: the settings that change the result.
        inputs: path -> hash of what the stage read. Paths inside the run folder are relative to it.
        outputs: path -> hash of what the stage wrote, relative to the run folder.
        figures: what the stage measured.
        about: command, commit, versions, machine, times: to read, never compared.
    """

    stage: str
    config: dict[str, Any]
    inputs: dict[str, str]
    outputs: dict[str, str]
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    about: dict[str, Any] = dataclasses.field(default_factory=dict)

    def save(self, folder: Path | str) -> None:
        """Write `folder/manifest.json`."""
        write_json(Path(folder) / MANIFEST, dataclasses.asdict(self))

    @classmethod
    def load(cls, folder: Path | str) -> Manifest | None:
        """Read `folder/manifest.json`; None where there is none."""
        path = Path(folder) / MANIFEST
        if not path.exists():
            return None
        row = read_json(path)
        try:
            return cls(**row)
        except TypeError as error:
            raise InputError(f"{path}: not a manifest of this version ({error}); delete it to redo the stage") from None


def environment() -> dict[str, Any]:
    """Commit, package versions and machine, for a manifest."""
    root = Path(__file__).resolve().parent
    git = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run(
        ["git", "-C", str(root), "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False
    )
    names = ("numpy", "scipy", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "openai", "vllm")
    versions = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "commit": git.stdout.strip() or None,
        "uncommitted_changes": bool(dirty.stdout.strip()),
        "python": platform.python_version(),
        "versions": versions,
        "machine": {"system": platform.platform(), "cpus": os.cpu_count()},
    }


class Work:
    """One folder of results: finished, unfinished, or not begun.

    A folder is begun with `begin`, which notes the settings and inputs, and finished with `finish`, which writes the
    manifest. A stage that is run again finds finished work and leaves it; unfinished work of the same settings it may
    take up where it stopped. Work of other settings or inputs is never touched unasked.

    Args:
        run_dir: the run's folder.
        folder: the results' folder, relative to it.
        stage: who makes them.
        settings: what changes the result.
        inputs: what is read. Files under `run_dir` are named relative to it, others by their name.
    """

    _BEGUN = ".begun.json"

    def __init__(
        self, run_dir: Path, folder: str, stage: str, settings: Mapping[str, Any], inputs: Iterable[Path] = ()
    ):
        self.run_dir = run_dir
        self.path = run_dir / folder
        self.stage = stage
        self.settings = json.loads(json.dumps(settings))  # as it will be read back
        self.inputs = {self._name(path): hash_file(path) for path in inputs}
        self._started = time.time()

    def _name(self, path: Path) -> str:
        absolute, root = Path(path).resolve(), self.run_dir.resolve()
        return absolute.relative_to(root).as_posix() if absolute.is_relative_to(root) else f"source/{absolute.name}"

    def is_finished(self) -> bool:
        """Whether these very results are there, whole.

        Raises:
            InputError: where an output of theirs was changed or removed since.
        """
        manifest = Manifest.load(self.path)
        if manifest is None or self._differences(manifest.config, manifest.inputs):
            return False
        for name, expected in manifest.outputs.items():
            path = self.run_dir / name
            if not path.exists() or hash_file(path) != expected:
                what = "is missing" if not path.exists() else "was changed"
                raise InputError(
                    f"{path} {what} since the {self.stage} stage finished; restore it, or make it again with "
                    "--overwrite true"
                )
        return True

    def begin(self, overwrite: bool) -> None:
        """Prepare the folder for making the results, keeping unfinished work of the same settings and inputs.

        Raises:
            InputError: where the folder holds other results and `overwrite` is false; says what differs.
        """
        begun = self.path / self._BEGUN
        if self.path.exists() and any(self.path.iterdir()):
            manifest = Manifest.load(self.path)
            if manifest is not None:
                kind, was = "results", (manifest.config, manifest.inputs)
            elif begun.exists():
                note = read_json(begun)
                kind, was = "unfinished results", (note["settings"], note["inputs"])
            else:
                kind, was = "files of another origin", ({}, {})
            differences = self._differences(*was)
            if manifest is None and begun.exists() and not differences:
                return
            if not overwrite:
                raise InputError(
                    f"{self.path} holds {kind}: {'; '.join(differences) or 'damaged'}. Keep them and choose another "
                    "--run_dir, or replace them with --overwrite true"
                )
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(begun, {"settings": self.settings, "inputs": self.inputs})

    def finish(self, outputs: Iterable[Path], figures: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Write the manifest, last of all."""
        seconds = round(time.time() - self._started, 1)
        Manifest(
            stage=self.stage,
            config=self.settings,
            inputs=self.inputs,
            outputs={self._name(path): hash_file(path) for path in outputs},
            figures=dict(figures),
            about={**about, "seconds": seconds, **environment()},
        ).save(self.path)
        (self.path / self._BEGUN).unlink(missing_ok=True)

    def _differences(self, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> list[str]:
        found = [
            f"{name} was {settings.get(name)!r}, is {self.settings.get(name)!r}"
            for name in sorted(settings.keys() | self.settings.keys())
            if settings.get(name) != self.settings.get(name)
        ]
        for name in sorted(inputs.keys() | self.inputs.keys()):
            was, now = inputs.get(name), self.inputs.get(name)
            if was != now:
                found.append(f"input {name} was {was and was[:12]}, is {now and now[:12]}")
        return found
