"""Evaluation of models that score the catalogue: SASRec, the baselines, the oracle, precomputed scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from twice_rec.cf.baselines import CFScorer
from twice_rec.cf.ranking import CFQuestions
from twice_rec.data.dataset import PreparedData
from twice_rec.evaluation.predictions import METRICS_FILE, PREDICTIONS, metrics_of
from twice_rec.files import atomic_path, write_json, write_records
from twice_rec.recipe import Recipe
from twice_rec.run import StageRun


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


def export_scores(path: Path, scorer: CFScorer, data: PreparedData) -> None:
    """Write a model's test scores as `.npz` with `scores`, float32 [users, items] in the files' order.

    A user without a test target gets zeros.
    """
    test = CFQuestions(data, "test", [])
    scores = np.zeros((len(data.sequences), len(data.catalog)), dtype=np.float32)  # [users, N]
    scores[test.users] = scorer.scores(test.users, test.histories)
    with atomic_path(path) as temporary:
        np.savez(temporary, scores=scores)
