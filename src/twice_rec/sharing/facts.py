"""What a model's card can know: the manifests of what the model rests on, its base, and its licence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from twice_rec.files import MANIFEST
from twice_rec.manifest import HUB, Manifest
from twice_rec.run import require
from twice_rec.sharing.recipe import ShareRecipe


@dataclass(frozen=True)
class Base:
    """The model that a training started from."""

    name: str  # on the hub, or the last part of its folder's path
    hub_id: str | None
    commit: str | None
    folder: Path | None


@dataclass(frozen=True)
class License:
    """A licence as the hub's cards write it; `name` and `link` are those of one that the hub has no word for."""

    license: str
    name: str | None
    link: str | None
    source: str  # where it was read


@dataclass(frozen=True)
class Facts:
    """What is known of a model. A manifest is None if its results are not in the run any more."""

    training: Manifest
    folder: str  # of the training, relative to the run's
    data: Manifest | None
    rationales: Manifest | None
    sft: Manifest | None  # the stage 2 that a stage 3 starts from
    base: Base  # of the first training
    license: License | None

    @property
    def source(self) -> str | None:
        """The data source's name."""
        return self.data.config.get("source") if self.data else None

    def setting(self, name: str) -> Any:
        """Return a setting of the training, None if it has no such one."""
        return self.training.config.get(name)


def facts_of(recipe: ShareRecipe) -> Facts:
    """Read what is known of the model of a recipe; InputError if it is not trained yet."""
    run_dir, folder = recipe.run_path, recipe.model_folder
    launcher = "sft.sh" if folder.startswith("sft") else f"grpo_step2.sh with --variant {recipe.variant}"
    require(run_dir / folder / MANIFEST, launcher)
    training = Manifest.load(run_dir / folder)
    assert training is not None
    sft = next((name.partition("/")[0] for name in training.inputs if name.endswith("/merged")), None)
    before = Manifest.load(run_dir / sft) if sft else None
    first = before or training
    base = _base_of(first, recipe.base_model_id)
    rationales = next((name.partition("/")[0] for name in first.inputs if name.endswith("/accepted.jsonl")), None)
    return Facts(
        training=training,
        folder=folder,
        data=Manifest.load(run_dir / "data"),
        rationales=Manifest.load(run_dir / rationales) if rationales else None,
        sft=before,
        base=base,
        license=License(recipe.license, None, None, "the recipe") if recipe.license else license_of(base),
    )


def _base_of(training: Manifest, hub_id: str | None) -> Base:
    path = Path(training.config.get("model_name_or_path") or "unknown")
    for name, commit in training.inputs.items():
        if name.startswith(HUB):
            return Base(str(path), hub_id or str(path), commit, None)
    return Base(hub_id or path.name, hub_id, None, path)


def license_of(base: Base) -> License | None:
    """Return the licence that the base's own card names; None if there is no card, or none in it."""
    from huggingface_hub import ModelCard, hf_hub_download

    try:
        if base.folder is not None:
            card = base.folder / "README.md"
        else:
            card = Path(hf_hub_download(base.name, "README.md", revision=base.commit))
        data = ModelCard.load(card, ignore_metadata_errors=True).data
    except (OSError, ValueError, TypeError, yaml.YAMLError):  # not there, not reachable, or not a card
        return None
    if not isinstance(data.license, str):
        return None
    return License(data.license, data.get("license_name"), data.get("license_link"), f"the card of {base.name}")
