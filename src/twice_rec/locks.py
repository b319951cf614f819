"""Locks of results folders: one process writes a folder, and nobody writes what others read.

A lock is the system's own (`flock`), so it ends with its owner, however the owner ends. The files in `.locks/` of the
run's folder tell who holds what: `NAME` is held by whoever writes the folder NAME, or shared by those who read it, and
each reader has a file `NAME.reader.*` of its own, so that it can be named.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from twice_rec.errors import InputError

logger = logging.getLogger(__name__)

_TRIES, _PAUSE_SECONDS = 4, 0.1  # `owner_of` holds a lock for a moment; nobody is to be refused because of that


def run_folder(results: Path) -> Path:
    """Return the run's folder that a stage's folder lies in: all lie right in it, but `eval/NAME` and
    `judge/NAME`.
    """
    return results.parent.parent if results.parent.name in ("eval", "judge") else results.parent


@contextlib.contextmanager
def writing(results: Path) -> Iterator[None]:
    """Hold a results folder that this process writes; it need not be there yet.

    Raises:
        InputError: if another process writes or reads it; names the process, its machine and since when.
    """
    path = _lock_file(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        if not _lock(file, fcntl.LOCK_EX):
            if not _lock(file, fcntl.LOCK_SH):
                raise _refusal(results, _owner(file), "in use")
            if not _lock(file, fcntl.LOCK_EX):  # else the owner ended just now
                raise _refusal(results, " and ".join(_readers(path)), "being read")
        _write_owner(file)
        with _until_end(file):
            yield


@contextlib.contextmanager
def reading(results: Path) -> Iterator[None]:
    """Keep others from writing a results folder while this process reads it; a folder that is read-only needs no lock.

    Raises:
        InputError: if another process writes it; names the process, its machine and since when.
    """
    path = _lock_file(results)
    note = path.with_name(f"{path.name}.reader.{uuid.uuid4().hex[:12]}")
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(path, "a+b"))
            own = stack.enter_context(open(note, "a+b"))
        except OSError as error:
            logger.debug("no lock for reading %s: %s", results, error)
            yield
            return
        stack.callback(note.unlink, missing_ok=True)
        _lock(own, fcntl.LOCK_EX)
        _write_owner(own)
        if not _lock(file, fcntl.LOCK_SH):
            raise _refusal(results, _owner(file), "in use")
        with _until_end(file):
            yield


def owner_of(results: Path) -> str | None:
    """Return who writes a results folder now, in words; None if nobody does."""
    try:
        with open(_lock_file(results), "rb") as file:
            return None if _lock(file, fcntl.LOCK_SH, tries=1) else _owner(file)
    except OSError:
        return None


def _lock_file(results: Path) -> Path:
    folder = results.resolve()  # runs that share a folder by a link share its lock
    run_dir = run_folder(folder)
    return run_dir / ".locks" / folder.relative_to(run_dir).as_posix().replace("/", "__")


def _lock(file: BinaryIO, kind: int, tries: int = _TRIES) -> bool:
    """Lock a file, exclusively or shared; return False if others hold it."""
    for left in reversed(range(tries)):
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(_PAUSE_SECONDS if left else 0)
        except OSError as error:
            logger.warning(
                "%s: this file system has no locks (%s); see to it that one process at a time uses a results folder",
                file.name,
                error.strerror,
            )
            return True
    return False


@contextlib.contextmanager
def _until_end(file: BinaryIO) -> Iterator[None]:
    """Unlock at the end, also for child processes that have inherited the file."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)


def _write_owner(file: BinaryIO) -> None:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}\n".encode())
    file.flush()


def _owner(file: BinaryIO) -> str:
    file.seek(0)
    return file.read().decode(errors="replace").strip() or "another process"


def _readers(path: Path) -> list[str]:
    """Name those who read the folder of a lock; the notes of readers that were killed are removed."""
    found = []
    for note in sorted(path.parent.glob(f"{path.name}.reader.*")):
        with contextlib.suppress(OSError), open(note, "rb") as file:
            if _lock(file, fcntl.LOCK_SH, tries=1):
                note.unlink(missing_ok=True)
            else:
                found.append(_owner(file))
    return list(dict.fromkeys(found)) or ["another process"]  # one process may read for several purposes


def _refusal(results: Path, owner: str, how: str) -> InputError:
    return InputError(f"{results} is {how} by {owner}; let it finish or end it, then run this again")
