"""What stage 0 will need, told before the work: rows, memory and disk."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from twice_rec.data.recipe import PrepareRecipe
from twice_rec.data.sources.base import Source
from twice_rec.data.sources.lines import beginning
from twice_rec.errors import InputError

logger = logging.getLogger("prepare")

# Measured on generated raw files of 1 to 16 million reviews (benchmarks/prepare.py), a little more than they took.
_MEMORY, _MEMORY_PER_ROW = 0.75e9, 180.0  # bytes
_SCRATCH = 0.25  # bytes of texts on the way per byte of reviews
_KEPT = 0.35  # share of the interactions that a k-core of 5 or more leaves at most, on Amazon's domains
_ID = 15  # bytes of an item id with its quotes, in a list of candidates
_SAFETY = 1.1


@dataclass(frozen=True)
class Estimate:
    """What is needed for the interactions of some files."""

    rows: int
    memory: float  # bytes
    disk: float


def estimate(source: Source, config: PrepareRecipe) -> Estimate:
    """Estimate from the beginnings of the files of interactions; InputError if one cannot be read."""
    rows, size = 0.0, 0.0
    for path in source.interaction_files:
        start, ratio = beginning(path)
        unpacked = path.stat().st_size * ratio
        rows, size = rows + unpacked * (start.count(b"\n") + 1) / len(start), size + unpacked
    kept = _KEPT if config.k_core >= 5 else 1.0
    catalogue = sum(path.stat().st_size * beginning(path)[1] for path in source.item_files)
    users = rows * kept / max(config.min_history, config.k_core)
    lists = users * (1 + 2 * len(config.candidate_lists)) * config.num_candidates * _ID
    disk = _SAFETY * (size * (_SCRATCH + kept) + catalogue * kept + lists)
    return Estimate(round(rows), _MEMORY + _MEMORY_PER_ROW * rows, disk)


def check_room(source: Source, config: PrepareRecipe, folder: Path) -> None:
    """Log the estimate for results below `folder`; InputError if its disk is too small."""
    if not source.interaction_files:
        return  # they are made first
    needed = estimate(source, config)
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    memory, disk = _size(needed.memory), _size(needed.disk)
    says = f"about {needed.rows:,} interactions, which need about {memory} of memory and {disk} of disk"
    if needed.disk > free:
        raise InputError(
            f"{source.folder} has {says}, but {there} has {_size(free)} free; make room, choose another "
            "--run_dir, or draw fewer candidate_lists"
        )
    logger.info("%s has %s (%s are free)", source.folder, says, _size(free))


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
