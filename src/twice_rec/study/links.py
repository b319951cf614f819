"""What the seeds of a study share: links in a seed's run folder to results of the first seed's.

A link shares the lock of what it points to (`locks`), and the manifest there names its files by their place in the run
folder, so a result behind a link is fresh or stale like the one that it is.
"""

from __future__ import annotations

import os
from pathlib import Path

from twice_rec.errors import InputError
from twice_rec.manifest import Manifest


def check_link(link: Path, target: Path) -> list[str]:
    """Return a line if `link` is there and holds other results than `target`; an equal copy will do."""
    if link.is_symlink():
        points_to = Path(os.path.realpath(link))
        return [] if points_to == Path(os.path.realpath(target)) else [f"{link} is a link to {points_to}; remove it"]
    if not link.exists() or not target.exists():
        return [f"{link} is there, but {target} is not; remove it"] if link.exists() else []
    own, others = Manifest.load(link), Manifest.load(target)
    if own is not None and others is not None and own.outputs == others.outputs:
        return []
    return [f"{link} and {target} hold different results, but all seeds of a study share them; remove the former"]


def make_link(link: Path, target: Path) -> None:
    """Make `link` point to `target`, by a relative path; InputError if it holds other results."""
    if lines := check_link(link, target):
        raise InputError("\n".join(lines))
    if not link.is_symlink() and not link.exists():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)
