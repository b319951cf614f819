"""Whether two variants were trained as a claim says: they differ in what it is about, and in nothing else.

A variant's name is what its user gave it: `--variant stage3_lambda0` without `--reward_lambda 0` is lambda 3 by another
name. Its manifest says what was trained.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from twice_rec.evaluation.report import Variant
from twice_rec.grpo.recipe import GRPORecipe
from twice_rec.locks import run_folder
from twice_rec.manifest import Manifest
from twice_rec.recipe import Recipe
from twice_rec.sft.recipe import SDPORecipe, SFTRecipe

ANY = "any"  # of a key that must be set
_RECIPES: Mapping[str, type[Recipe]] = {"sft": SFTRecipe, "sdpo": SDPORecipe, "grpo": GRPORecipe}
_NO_PART = ("logging_steps", "save_steps", "save_strategy", "save_total_limit")  # keys that change no weights


def trainings_of(variant: Variant) -> dict[Path, Manifest]:
    """Return run folder -> the training of the model that was evaluated there, of those that are known."""
    found = {}
    for terms in variant.terms:
        run_dir, manifest = run_folder(terms.folder), Manifest.load(terms.folder)
        for name in manifest.inputs if manifest else ():
            if name.endswith("/merged") and (training := Manifest.load(run_dir / name.partition("/")[0])):
                found[run_dir] = training
    return found


def other_than_promised(name: str, variant: Variant, promised: Mapping[str, Any]) -> str | None:
    """Return which key a variant was not trained with as it should be, in words; None if it was, or is not known."""
    for run_dir, training in trainings_of(variant).items():
        for key, value in promised.items():
            if (was := training.config.get(key, value)) is None and value is ANY:
                return f"{name} of {run_dir} was trained without {key}, so it started from stage 2"
            if value not in (was, ANY):
                return f"{name} of {run_dir} was trained with {key} {was}, not {value}"
    return None


def trained_otherwise(a: Variant, b: Variant, apart: Collection[str]) -> str | None:
    """Return which key two variants were trained with differently in one run, or that none was; None if all is well.

    Args:
        apart: keys in which they are to differ, in one at least. Trainings of different stages are not compared.
    """
    for (run_a, one), (run_b, other) in itertools.product(trainings_of(a).items(), trainings_of(b).items()):
        if run_a.resolve() != run_b.resolve() or one.stage != other.stage:
            continue
        keys = one.config.keys() | other.config.keys()
        later = _RECIPES[one.stage].defaults(keys) if one.stage in _RECIPES else {}  # what one did that has no such key
        left, right = later | one.config, later | other.config
        for key in sorted(keys):
            if (was := left.get(key)) != (now := right.get(key)) and key not in (*apart, *_NO_PART):
                return f"they were trained with different {key} ({was} and {now}) in {run_a}"
        if apart and all(left.get(key) == right.get(key) for key in apart):
            return f"they were trained with the same {', '.join(apart)} in {run_a}"
    return None
