"""The append-only file of every completion that a language model has written and been paid for.

One JSON line per completion, under the key of its request. A line is written and flushed before the completion is used:
a process that is killed loses at most the completions under way, and a line it left half-written is cut off when the
file is opened again. Memory holds two integers per completion; the texts stay in the file.

What a response without a completion cost is noted in a file beside it, so that the budget counts everything.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from twice_rec.errors import InputError
from twice_rec.rationales.completions import Completion

logger = logging.getLogger(__name__)


class CompletionCache:
    """Completions by request key, in a file that is made with its folder if there is none.

    Raises:
        InputError: if another process has it open.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115 - closed by __exit__
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise InputError(
                f"{path}: another process is collecting completions into it; let it finish or end it"
            ) from None
        self._offsets: dict[int, int] = {}  # first 64 bits of the key -> where its line begins
        self.prompt_tokens = self.completion_tokens = self.unusable = 0
        self._spent = path.with_suffix(".unusable.jsonl")
        self._origins: set[str] = set()  # of what was spent on responses in files, which are read again and again
        self._scan()
        self._scan_spent()

    def __enter__(self) -> CompletionCache:
        return self

    def __exit__(self, *error: object) -> None:
        """Write everything to the disk and release the file."""
        os.fsync(self._file.fileno())
        self._file.close()

    def __len__(self) -> int:
        return len(self._offsets)

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None

    def get(self, key: str) -> Completion | None:
        """Return the stored completion, or None if there is none."""
        offset = self._offsets.get(_short(key))
        if offset is None:
            return None
        self._file.seek(offset)
        row = json.loads(self._file.readline())
        return Completion(**row["answer"]) if row["key"] == key else None

    def put(self, key: str, completion: Completion) -> None:
        """Append a completion; one that is stored already stays."""
        if _short(key) in self._offsets:
            return
        line = json.dumps({"key": key, "answer": asdict(completion)}).encode() + b"\n"
        offset = self._file.seek(0, os.SEEK_END)
        self._file.write(line)
        self._file.flush()
        self._count(key, completion, offset)

    def spend(self, prompt_tokens: int, completion_tokens: int, why: str, origin: str = "") -> None:
        """Count a response that was paid for and holds no completion; one from the same `origin` counts once."""
        if origin and origin in self._origins:
            return
        row = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "why": why, "origin": origin}
        with open(self._spent, "ab") as file:
            file.write(json.dumps(row).encode() + b"\n")
        self._count_spent(row)

    def _scan_spent(self) -> None:
        for line in self._spent.read_bytes().splitlines() if self._spent.exists() else ():
            try:
                self._count_spent(json.loads(line))
            except (ValueError, KeyError, TypeError):
                logger.warning("%s: a line is damaged; what it cost is not counted", self._spent)

    def _count_spent(self, row: Mapping[str, Any]) -> None:
        tokens = int(row["prompt_tokens"]), int(row["completion_tokens"])
        self.prompt_tokens += tokens[0]
        self.completion_tokens += tokens[1]
        self.unusable += 1
        self._origins.add(row["origin"])

    def _scan(self) -> None:
        offset = self._file.seek(0)
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                self._file.truncate(offset)
                break
            try:
                row = json.loads(line)
                self._count(row["key"], Completion(**row["answer"]), offset)
            except (ValueError, KeyError, TypeError):
                logger.warning("%s, line %d: not a completion; left out", self.path, number)
            offset += len(line)

    def _count(self, key: str, completion: Completion, offset: int) -> None:
        self._offsets[_short(key)] = offset
        self.prompt_tokens += completion.prompt_tokens
        self.completion_tokens += completion.completion_tokens


def _short(key: str) -> int:
    return int(key[:16], 16)
