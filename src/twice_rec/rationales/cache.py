"""The append-only file of everything a language model has answered and been paid for.

One JSON line an answer, written and flushed before the answer is used, keyed by the SHA-256 of the request. A process
that is killed loses at most the answers under way; a line it left half-written is cut off when the file is opened
again. In memory there is one integer pair an answer; texts stay in the file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from twice_rec.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Answer:
    """One completion.

    Args:
        finish: why it ended, as the server says: `stop`, `length`, `content_filter`, ...
        refusal: the model's refusal, empty if it did not refuse.
        prompt_tokens, completion_tokens: as the server counted them.
    """

    text: str
    finish: str
    refusal: str
    prompt_tokens: int
    completion_tokens: int


class AnswerCache:
    """Answers by request key.

    Args:
        path: the file; it is made with its folder if there is none.

    Raises:
        InputError: where another process has it open.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115 - closed by close()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise InputError(
                f"{path}: another process is collecting answers into it; let it finish or end it"
            ) from None
        self._offsets: dict[int, int] = {}  # first 64 bits of the key -> where its line begins
        self.prompt_tokens = self.completion_tokens = 0
        self._end = 0
        self._scan()

    def __enter__(self) -> AnswerCache:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._offsets)

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None

    def get(self, key: str) -> Answer | None:
        """The stored answer; None if there is none."""
        offset = self._offsets.get(_short(key))
        if offset is None:
            return None
        self._file.seek(offset)
        row = json.loads(self._file.readline())
        return Answer(**row["answer"]) if row["key"] == key else None

    def put(self, key: str, answer: Answer) -> None:
        """Append an answer; what is stored already stays."""
        if _short(key) in self._offsets:
            return
        line = json.dumps({"key": key, "answer": asdict(answer)}).encode() + b"\n"
        self._file.seek(self._end)
        self._file.write(line)
        self._file.flush()
        self._count(key, answer, self._end)
        self._end += len(line)

    def close(self) -> None:
        """Write through to the disk and let go of the file."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def _scan(self) -> None:
        self._file.seek(0)
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                self._file.truncate(self._end)
                break
            with contextlib.suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                self._count(row["key"], Answer(**row["answer"]), self._end)
                self._end += len(line)
                continue
            logger.warning("%s, line %d: not an answer; left out", self.path, number)
            self._end += len(line)

    def _count(self, key: str, answer: Answer, offset: int) -> None:
        self._offsets[_short(key)] = offset
        self.prompt_tokens += answer.prompt_tokens
        self.completion_tokens += answer.completion_tokens


def _short(key: str) -> int:
    return int(key[:16], 16)
