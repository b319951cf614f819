"""Stage 3a: train SASRec, evaluate it and the CF baselines -> sasrec/ and eval/<variant>/.

SASRec is fitted on the training parts and chosen on validation (NDCG@10 over the whole catalogue); validation and test
targets never train anything. Item-kNN and EASE choose their settings the same way. Writes `<variant>/model.safetensors`
(the first seed's: what stage 3 asks for confidences), `<variant>/seed-N/` for further seeds, `log.jsonl`, and
`eval/<name>/` for SASRec and every baseline.

Deviations from the release: padding is index 0, so items 1 and 2 train; negatives are never the user's own training
items; the epoch is chosen on validation. The release's own settings are `recipes/grocery/sasrec_release.yaml`.
Limits: one device. `loss: softmax` needs memory for [tokens of a batch, items] floats.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch

from twice_rec.artifacts import Work, atomic_path, write_jsonl
from twice_rec.config import SasrecRecipe, load_recipe
from twice_rec.data import dataset
from twice_rec.data.dataset import PreparedData
from twice_rec.evaluation.baselines import (
    CFScorer, PopularityScorer, RandomScorer, choose_item_similarity, interaction_matrix,
)  # fmt: skip
from twice_rec.evaluation.predict import CFQuestions, write_evaluation
from twice_rec.evaluation.tables import read_metrics, show_metrics
from twice_rec.sasrec.model import SasRec, SasRecSettings
from twice_rec.sasrec.scorer import SasRecScorer, fit_calibration, item_means, item_only_share
from twice_rec.sasrec.train import Training, TrainSettings
from twice_rec.stages.lifecycle import about, need, run_stage, say_finished, torch_device, wandb_run

logger = logging.getLogger("sasrec")
CHOSEN_ON = "full/ndcg@10"


def sasrec(recipe: SasrecRecipe) -> None:
    """Train, evaluate, compare."""
    run, names = recipe.run_path, (dataset.CATALOG, dataset.SEQUENCES, "candidates.valid.jsonl", "candidates.test.jsonl")
    files = [need(run / "data" / name, "prepare.sh") for name in names]
    data = PreparedData(run / "data")
    untrained = ("baselines", "lists", "variant")
    settings = {name: value for name, value in recipe.settings().items() if name not in untrained}
    work = Work(run, recipe.variant, "sasrec", settings, files)
    folders = [work.path, *(work.path / f"seed-{recipe.seed + i}" for i in range(1, recipe.num_seeds))]
    if work.is_finished():
        say_finished(work.path)
    else:
        work.begin(recipe.overwrite)
        figures = [_train(recipe, data, folder, recipe.seed + i) for i, folder in enumerate(folders)]
        outputs = [folder / name for folder in folders for name in ("model.safetensors", "log.jsonl")]
        work.finish(outputs, {"runs": figures}, about(recipe))

    models = [folder / "model.safetensors" for folder in folders]
    scorers = lambda: [SasRecScorer.load(model, data.catalog, torch_device(recipe.device)) for model in models]  # noqa: E731
    _evaluate(recipe, data, recipe.variant, scorers, {}, [*files, *models])
    counts = np.bincount(np.concatenate(data.training_histories()), minlength=len(data.catalog) + 1)[1:]
    for name in recipe.baselines:
        if name == "random":
            _evaluate(recipe, data, name, lambda: [RandomScorer(len(data.catalog), recipe.seed)], {"seed": recipe.seed}, files)
        elif name == "popularity":
            _evaluate(recipe, data, name, lambda: [PopularityScorer(counts)], {}, files)
        else:
            _evaluate(recipe, data, name, lambda kind=name: [_item_similarity(data, kind)], {}, files)
    if recipe.export_scores:
        path = Path(recipe.export_scores)
        everyone = CFQuestions(data.sequences, data.candidates("test"), data.catalog, "test", ["full"])
        scores = np.zeros((len(data.sequences), len(data.catalog)), dtype=np.float32)
        scores[everyone.users] = scorers()[0].scores(everyone.users, everyone.histories)
        with atomic_path(path) as temporary:
            np.savez(temporary, scores=scores)
        logger.info("%s: scores %s of the first seed", path, scores.shape)
    show_metrics(read_metrics(run))


def _train(recipe: SasrecRecipe, data: PreparedData, folder: Path, seed: int) -> dict[str, float | int]:
    """One training run; returns what it measured."""
    valid = CFQuestions(data.sequences, data.candidates("valid"), data.catalog, "valid", ["uniform", "full"])
    shape = SasRecSettings(
        num_items=len(data.catalog),
        **{f.name: getattr(recipe, f.name) for f in fields(SasRecSettings) if f.name != "num_items"},
    )
    settings = TrainSettings(seed=seed, **{f.name: getattr(recipe, f.name) for f in fields(TrainSettings) if f.name != "seed"})
    validate = lambda model: valid.mean(SasRecScorer(model), CHOSEN_ON)  # noqa: E731
    state, device = folder / "training_state.safetensors", torch_device(recipe.device)
    training = Training(shape, settings, data.training_histories(), validate, state, device)
    with wandb_run(recipe) as log:
        model = training.run(
            lambda epoch: log({"loss": epoch.loss, f"valid/{CHOSEN_ON}": epoch.validation, "epoch": epoch.number})
        )
    for epoch in training.log:
        logger.debug("epoch %d: loss %.4f, %s %.4f, %.1f s", epoch.number, epoch.loss, CHOSEN_ON, epoch.validation, epoch.seconds)
    scorer = _calibrated(model, valid)
    scorer.save(folder / "model.safetensors", data.catalog)
    write_jsonl(folder / "log.jsonl", (asdict(epoch) for epoch in training.log))
    os.unlink(state)
    figures = {
        "seed": seed,
        "best_epoch": training.best_epoch.number,
        "epochs": len(training.log),
        f"valid/{CHOSEN_ON}": training.best_epoch.validation,
        "train_seconds": round(sum(epoch.seconds for epoch in training.log), 1),
        "item_only_share": item_only_share(scorer, valid.histories),
    }
    logger.info("seed %d: %s", seed, ", ".join(f"{k} {v:.4g}" for k, v in figures.items() if k != "seed"))
    return figures


def _calibrated(model: SasRec, valid: CFQuestions) -> SasRecScorer:
    """The model with its item means, and calibrations on the validation candidates."""
    means = item_means(SasRecScorer(model), valid.histories)
    shown = valid.candidates["uniform"]
    z = SasRecScorer(model).logits(valid.histories, shown)
    is_target = shown == valid.targets[:, None]
    calibration = {
        "raw": fit_calibration(z.ravel(), is_target.ravel()),
        "debiased": fit_calibration((z - means.cpu().numpy()[shown]).ravel(), is_target.ravel()),
    }
    return SasRecScorer(model, means, calibration)


def _item_similarity(data: PreparedData, kind: str) -> CFScorer:
    valid = CFQuestions(data.sequences, data.candidates("valid"), data.catalog, "valid", ["full"])
    interactions = interaction_matrix(data.training_histories(), len(data.catalog))
    model, settings, reached = choose_item_similarity(kind, interactions, lambda m: valid.mean(m, CHOSEN_ON))
    logger.info("%s: %s chosen, validation %s %.4f", kind, settings, CHOSEN_ON, reached)
    return model


def _evaluate(recipe: SasrecRecipe, data: PreparedData, name: str, models, settings: dict, inputs: list[Path]) -> None:
    """Rank every test target with the models (one a seed) and write eval/<name>/, unless that is there already."""
    work = Work(recipe.run_path, f"eval/{name}", "sasrec", {"lists": recipe.lists, **settings}, inputs)
    if work.is_finished():
        return say_finished(work.path)
    work.begin(recipe.overwrite)
    test = CFQuestions(data.sequences, data.candidates("test"), data.catalog, "test", recipe.lists)
    rows = [
        prediction
        for i, model in enumerate(models())
        for prediction in test.predictions(test.ranks(model), recipe.seed + i)
    ]
    metrics = write_evaluation(work.path, rows)
    work.finish([work.path / "predictions.jsonl", work.path / "metrics.json"], metrics, about(recipe))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_stage("sasrec", SasrecRecipe, lambda path, flags: load_recipe(path, SasrecRecipe, flags), sasrec, arguments)


if __name__ == "__main__":
    sys.exit(main())
