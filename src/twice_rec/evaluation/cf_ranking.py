"""Evaluation of models that score the catalogue: SASRec, the baselines, the oracle, precomputed scores."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from twice_rec.cf.baselines import CFScorer
from twice_rec.cf.ranking import CFQuestions, blocks
from twice_rec.cf.recipe import SASRecRecipe
from twice_rec.data.dataset import PreparedData
from twice_rec.errors import InputError
from twice_rec.evaluation.predictions import METRICS_FILE, PREDICTIONS, metrics_of
from twice_rec.files import atomic_path, write_json, write_records
from twice_rec.recipe import Recipe
from twice_rec.run import StageRun

logger = logging.getLogger(__name__)


def evaluate_scorer_variant(
    recipe: Recipe,
    stage: str,
    name: str,
    data: PreparedData,
    lists: Sequence[str],
    scorers: Callable[[], Iterable[CFScorer]],
    inputs: Iterable[Path],
    **settings: Any,
) -> None:
    """Write eval/<name>/ of a CF model on the test targets, unless it is there already.

    Args:
        scorers: makes one model, or one per training: the first has the recipe's seed, the others count on from it.
        inputs: files that the result depends on.
        settings: what else it depends on, beside the lists.
    """
    with StageRun(recipe, stage, f"eval/{name}", inputs, {"lists": list(lists), **settings}) as run:
        if run.is_finished():
            return
        run.begin()
        questions = CFQuestions(data, "test", lists)
        rows = [row for i, scorer in enumerate(scorers()) for row in questions.predictions(scorer, recipe.seed + i)]
        metrics = metrics_of(rows)
        files = [run.path / PREDICTIONS, run.path / METRICS_FILE]
        write_records(files[0], rows)
        write_json(files[1], metrics)
        run.finish(files, metrics)


def export_scores(recipe: SASRecRecipe, scorer: CFScorer, data: PreparedData) -> None:
    """Write a model's test scores to the recipe's `.npz`, block by block.

    Users are in the files' order, items in the catalogue's. Without `export_top`: `scores`, float32 [users, items]; a
    user without a test target gets zeros. With it: `items`, int32 [users, top], indices from 1 of each user's best
    items, the best first (0 without a test target), and `scores`, float32 [users, top]. `PrecomputedScorer` reads both.
    """
    path, top = Path(recipe.export_scores or ""), recipe.export_top
    asked, num_users, num_items = data.questions("test"), len(data.training_histories()), len(data.catalog)
    width = min(top or num_items, num_items)
    with atomic_path(path) as temporary, tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        scores = np.lib.format.open_memmap(f"{folder}/scores.npy", "w+", np.float32, (num_users, width))
        items = np.lib.format.open_memmap(f"{folder}/items.npy", "w+", np.int32, (num_users, width)) if top else None
        for rows in blocks(len(asked.users), num_items):
            block = torch.as_tensor(scorer.scores(asked.users[rows], asked.histories[rows])).float()  # [B, N]
            if items is not None:
                block, best = block.topk(width)  # [B, width]
                items[asked.users[rows]] = best.cpu().numpy() + 1
            scores[asked.users[rows]] = block.cpu().numpy()
        with zipfile.ZipFile(temporary, "w") as archive:
            for name, array in {"scores": scores, "items": items}.items():
                if array is not None:
                    array.flush()
                    archive.write(f"{folder}/{name}.npy", f"{name}.npy")
    logger.info("%s: test scores of the first seed", path)


def require_space(recipe: SASRecRecipe, data: PreparedData) -> None:
    """Raise an InputError if the recipe's export of scores cannot be a file, or would not fit on its disk."""
    if recipe.export_scores is None:
        return
    path = Path(recipe.export_scores).absolute()
    folder = next(parent for parent in path.parents if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"export_scores is {recipe.export_scores!r}, where no file can be written; name an .npz file")
    num_users, num_items, top = len(data.training_histories()), len(data.catalog), recipe.export_top
    needed = 2 * num_users * (8 * min(top, num_items) if top else 4 * num_items)
    if needed > (free := shutil.disk_usage(folder).free):
        raise InputError(
            f"export_scores: the scores of {num_users:,} users and {num_items:,} items take {needed / 1e9:,.1f} GB "
            f"while they are written, and {folder} has {free / 1e9:,.1f} GB free; set export_top, or name another disk"
        )
