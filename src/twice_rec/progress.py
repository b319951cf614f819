"""The progress of everything that takes long: a bar with rate and time left, in a log a line every ten seconds."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

_SECONDS = 10.0  # between the lines of a log
_LINE = "{desc}: {unit} {n_fmt} of {total_fmt}, {elapsed} taken, {remaining} left{postfix}"


class _Lines(tqdm):  # type: ignore[type-arg]
    """A bar in a log: each state of it is a line of its own."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Write the state; nothing when the bar is to go."""
        if msg is None:
            self.fp.write(f"{self}\n")
            self.fp.flush()
        return False


def is_log() -> bool:
    """Whether what is written goes to a file or a pipe, where no line can be replaced."""
    return not sys.stderr.isatty()


def progress(iterable: Any = None, *, desc: str, **options: Any) -> Any:
    """Return a tqdm bar: it appears after two seconds and goes at the end; a log gets a line every ten seconds."""
    if is_log():
        options = {"bar_format": _LINE, **options}
        return _Lines(iterable, desc=desc, delay=2, mininterval=_SECONDS, maxinterval=_SECONDS, leave=False, **options)
    return tqdm(iterable, desc=desc, delay=2, mininterval=0.5, maxinterval=0.5, leave=False, **options)
