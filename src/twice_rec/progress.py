"""The progress bar: rate and time left of everything that takes long; few lines if the output is a file."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress(iterable: Any = None, *, desc: str, **options: Any) -> Any:
    """Return a tqdm bar: it appears after two seconds and goes at the end; a log file gets a line every 15 seconds."""
    interval = 0.5 if sys.stderr.isatty() else 15.0
    return tqdm(iterable, desc=desc, delay=2, mininterval=interval, maxinterval=interval, leave=False, **options)
