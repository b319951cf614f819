"""The sources of interactions. Every module of this folder is imported here, so a new source is one new module."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING

from twice_rec.data.sources.base import REGISTERED, Source

if TYPE_CHECKING:
    from twice_rec.data.recipe import PrepareRecipe

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

# Name in the recipe -> class; those that need no folder come first.
SOURCES: Mapping[str, type[Source]] = dict(sorted(REGISTERED.items(), key=lambda pair: pair[1].reads_folder))


def open_source(recipe: PrepareRecipe) -> Source:
    """Return the source that the recipe names; InputError if a file of it is missing or empty."""
    return SOURCES[recipe.source].open(recipe)
