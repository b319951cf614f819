"""The sources of interactions. Every module of this folder is imported here, so a new source is one new module."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping

from twice_rec.data.sources.base import REGISTERED, Source

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

# Name in the recipe -> class; those that need no folder come first.
SOURCES: Mapping[str, type[Source]] = dict(sorted(REGISTERED.items(), key=lambda pair: pair[1].reads_folder))
