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
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from twice_rec.cf.baselines import CFScorer
from twice_rec.cf.ranking import CHOSEN_ON, CFQuestions, fit_baseline
from twice_rec.cf.recipe import SASRecConfig, SASRecTrainerConfig
from twice_rec.cf.sasrec import SASRecScorer
from twice_rec.cf.sasrec_training import SASRecTrainer
from twice_rec.config import SasrecRecipe, load_recipe
from twice_rec.data import dataset
from twice_rec.data.dataset import PreparedData
from twice_rec.evaluation.cf_ranking import export_scores
from twice_rec.evaluation.tables import read_metrics, show_metrics
from twice_rec.files import write_jsonl
from twice_rec.run import Work
from twice_rec.stages.command_line import run_stage
from twice_rec.stages.lifecycle import about, evaluate_variant, need, say_finished, torch_device, wandb_run

logger = logging.getLogger("sasrec")


def sasrec(recipe: SasrecRecipe) -> None:
    """Train, evaluate, compare."""
    run, names = (
        recipe.run_path,
        (dataset.CATALOG, dataset.SEQUENCES, "candidates.valid.jsonl", "candidates.test.jsonl"),
    )
    files = [need(run / "data" / name, "prepare.sh") for name in names]
    data = PreparedData(run / "data")
    settings = {k: v for k, v in recipe.settings().items() if k not in ("baselines", "lists", "variant")}
    work = Work(run, recipe.variant, "sasrec", settings, files)
    folders = [work.path, *(work.path / f"seed-{recipe.seed + i}" for i in range(1, recipe.num_seeds))]
    models = [folder / "model.safetensors" for folder in folders]
    if work.is_finished():
        say_finished(work.path)
    else:
        work.begin(recipe.overwrite)
        figures = [_train(recipe, data, folder, recipe.seed + i) for i, folder in enumerate(folders)]
        work.finish([*models, *(folder / "log.jsonl" for folder in folders)], {"runs": figures}, about(recipe))

    def trained() -> list[SASRecScorer]:
        return [SASRecScorer.load(model, data.catalog, torch_device(recipe.device)) for model in models]

    def baseline(name: str) -> list[CFScorer]:
        return [fit_baseline(name, data, recipe.seed)]

    evaluate_variant(recipe, "sasrec", recipe.variant, data, recipe.lists, trained, [*files, *models])
    for name in recipe.baselines:
        seed = {"seed": recipe.seed} if name == "random" else {}
        evaluate_variant(recipe, "sasrec", name, data, recipe.lists, partial(baseline, name), files, seed)
    if recipe.export_scores:
        export_scores(Path(recipe.export_scores), trained()[0], data)
        logger.info("%s: test scores of the first seed", recipe.export_scores)
    show_metrics(read_metrics(run))


def _train(recipe: SasrecRecipe, data: PreparedData, folder: Path, seed: int) -> dict[str, float]:
    """One training run; returns what it measured."""
    valid = CFQuestions.of(data, "valid", ["uniform", "full"])
    shape, settings = (  # the recipe itself will be both
        group(**{name: getattr(recipe, name) for name in group.model_fields})
        for group in (SASRecConfig, SASRecTrainerConfig)
    )
    state, device = folder / "training_state.safetensors", torch_device(recipe.device)
    validate = lambda model: valid.mean(SASRecScorer(model))
    histories = data.training_histories()
    training = SASRecTrainer(shape, settings, len(data.catalog), histories, validate, seed, state, device)
    with wandb_run(recipe) as log:
        model = training.run(lambda e: log({"loss": e.loss, f"valid/{CHOSEN_ON}": e.validation, "epoch": e.number}))
    scorer = SASRecScorer(model)
    scorer.calibrate(valid.histories, valid.candidates["uniform"], valid.targets)
    scorer.save(folder / "model.safetensors", data.catalog)
    write_jsonl(folder / "log.jsonl", (asdict(epoch) for epoch in training.log))
    state.unlink()
    figures = {
        "seed": seed,
        "best_epoch": training.best_epoch.number,
        "epochs": len(training.log),
        f"valid/{CHOSEN_ON}": training.best_epoch.validation,
        "train_seconds": round(sum(epoch.seconds for epoch in training.log), 1),
        "popularity_share": scorer.popularity_share(valid.histories),
    }
    logger.info("%s", ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_stage(
        "sasrec", SasrecRecipe, lambda path, flags: load_recipe(path, SasrecRecipe, flags), sasrec, arguments
    )


if __name__ == "__main__":
    sys.exit(main())
