"""Models as inputs of a stage: a folder, or a model of the hub with the commit that its revision means now."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from twice_rec.llm.recipe import ModelConfig
from twice_rec.llm.tokens import from_pretrained
from twice_rec.manifest import HubModel

C = TypeVar("C", bound=ModelConfig)


def model_input(name: str | Path, revision: str | None) -> Path | HubModel:
    """Return what a manifest names a model by: its folder, or its name, revision and commit on the hub.

    Without a connection it is the commit in the cache, as it is for transformers.

    Raises:
        InputError: if there is no such folder, or no such model on the hub.
    """
    if Path(name).is_dir():
        return Path(name)
    import transformers

    config = from_pretrained(transformers.AutoConfig, name, revision=revision)
    return HubModel(str(name), revision, config._commit_hash or "unknown")


def at_commit(recipe: C, model: Path | HubModel) -> C:
    """Return the recipe with a model's revision as its commit, so that whatever is loaded later is the same model."""
    if not isinstance(model, HubModel) or model.commit == "unknown":
        return recipe
    return recipe.model_copy(update={"model_revision": model.commit})
