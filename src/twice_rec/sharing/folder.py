"""The folder that is shared: the model's files, its card and its results."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twice_rec.errors import InputError
from twice_rec.files import atomic_path, read_json, write_json, write_text
from twice_rec.sharing.card import card_of
from twice_rec.sharing.facts import Facts
from twice_rec.sharing.recipe import ShareRecipe
from twice_rec.sharing.scores import Evaluation

_ADAPTER = ("adapter_model.safetensors", "adapter_config.json")
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt",
)  # fmt: skip
_WEIGHTS = (".safetensors", ".bin")


def model_files(recipe: ShareRecipe, facts: Facts) -> list[Path]:
    """Return the files of the model that are shared.

    Raises:
        InputError: if an adapter is asked for and there is none, or if nobody could tell which model it belongs to.
    """
    trained = recipe.run_path / facts.folder
    if recipe.weights == "merged":
        return sorted(path for path in (trained / "merged").iterdir() if path.is_file())
    if not (trained / _ADAPTER[0]).exists():
        raise InputError(f"weights is adapter, but {trained} has none: all weights were trained; use --weights merged")
    if facts.sft is not None and recipe.base_model_id is None:
        raise InputError(
            f"weights is adapter: that of {facts.folder} belongs to the stage-2 model of this run; share that first "
            "(--variant stage2), and give its name on the hub as base_model_id"
        )
    if recipe.base_model_id is None and facts.base.hub_id is None:
        raise InputError(
            f"weights is adapter, and its base {facts.base.name} is a folder of this machine; give the base's name on "
            "the hub as base_model_id"
        )
    return [path for name in (*_ADAPTER, *_TOKENIZER) if (path := trained / name).exists()]


def assemble(
    folder: Path, recipe: ShareRecipe, facts: Facts, files: Sequence[Path], found: Sequence[Evaluation]
) -> list[Path]:
    """Write the model's files, `results.json` and the card; return them.

    Weights are linked, not copied, where the file system can: a stage never changes a file in place.
    """
    written = [_put(path, folder / path.name) for path in files]
    if recipe.weights == "adapter":
        _name_the_base(folder / _ADAPTER[1], str(recipe.base_model_id or facts.base.hub_id))
    notes = Path(recipe.card_notes).read_text(encoding="utf-8") if recipe.card_notes else ""
    write_json(folder / "results.json", {evaluation.name: evaluation.as_row() for evaluation in found})
    write_text(folder / "README.md", card_of(recipe, facts, found, notes))
    return [*written, folder / "results.json", folder / "README.md"]


def _put(source: Path, target: Path) -> Path:
    target.unlink(missing_ok=True)
    if source.suffix in _WEIGHTS:
        try:
            os.link(source, target)
            return target
        except OSError:  # another disk, or no links there
            pass
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)
    return target


def _name_the_base(path: Path, hub_id: str) -> None:
    """Let an adapter's settings name its base on the hub, not a folder of this machine."""
    settings: dict[str, Any] = read_json(path)
    settings["base_model_name_or_path"] = hub_id
    settings.pop("revision", None)
    write_text(path, json.dumps(settings, indent=2) + "\n")


def check_notes(recipe: ShareRecipe) -> list[Path]:
    """Return the file of the card's notes, none if there is none; InputError if it is not a text."""
    if recipe.card_notes is None:
        return []
    path = Path(recipe.card_notes)
    try:
        path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"card_notes is {path}, which cannot be read as text: {error}") from None
    return [path]
