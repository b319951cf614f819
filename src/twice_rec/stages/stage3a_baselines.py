"""Stage 3a, the CF models of Table 1: train them through RecBole, evaluate them -> <model>/ and eval/<model>/.

Each model is fitted on the training parts by RecBole 1.2.1, in an environment of its own, with RecBole's default
settings first and then those of `cf/recbole_models.py`, for at most `minutes`. Settings and weights are chosen as
SASRec's are: NDCG@10 in the whole catalogue, on validation users of the same draw. RecBole's process never has a test
target; it gives scores, and this stage ranks them. Writes `<model>/model.safetensors`, `<model>/tuning.jsonl` and
`eval/<model>/`.

Deviations from RecBole: `cf/recbole_runner.py`. Limits: one training per setting and seed; DFM is not in RecBole.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from twice_rec.cf.ranking import CFQuestions
from twice_rec.cf.recbole import MODEL, TUNING, RecBoleVariant, require_environment
from twice_rec.cf.recbole_models import NOT_IN_RECBOLE
from twice_rec.cf.recipe import BaselinesRecipe
from twice_rec.data import dataset
from twice_rec.data.dataset import PreparedData
from twice_rec.errors import Unfinished
from twice_rec.evaluation.cf_ranking import evaluate_scorer_variant
from twice_rec.evaluation.tables import show_metrics
from twice_rec.manifest import held
from twice_rec.run import StageRun, wandb_run
from twice_rec.stages.command_line import command

logger = logging.getLogger("baselines")


def baselines(recipe: BaselinesRecipe) -> None:
    """Train and evaluate every model; if one fails, the others are made all the same."""
    lists = [dataset.candidates_file("test")] if set(recipe.lists) != {"full"} else []
    inputs = dataset.required_files(recipe.run_path, dataset.CATALOG, dataset.SEQUENCES, *lists)
    require_environment(recipe.python_path)
    failed = []
    with held(inputs):
        data = PreparedData(recipe.run_path / "data")
        data.require_lists("test", [kind for kind in recipe.lists if kind != "full"])
        valid = CFQuestions(data, "valid", ["full"], recipe.validation_users, recipe.seed)
        for why in NOT_IN_RECBOLE.values():
            logger.info("%s: no row", why)
        for name in recipe.models:
            try:
                _train_and_evaluate(recipe, name, data, valid, inputs)
            except Unfinished as error:
                logger.error("%s", error)
                failed.append(name)
    StageRun.end_check()
    if failed:
        raise Unfinished(f"no row of {', '.join(failed)}, whose processes died; the other models are done")
    show_metrics(recipe.run_path)


def _train_and_evaluate(
    recipe: BaselinesRecipe, name: str, data: PreparedData, valid: CFQuestions, inputs: list[Path]
) -> None:
    own = ("models", "lists", "num_settings")
    settings = {key: value for key, value in recipe.settings().items() if key not in own}
    with RecBoleVariant(recipe, name, data, valid) as variant:
        settings["tried"] = variant.settings()
        with StageRun(recipe, "baselines", name, inputs[:2], settings) as run:
            if not run.is_finished():
                run.begin()
                with wandb_run(recipe) as log:
                    figures = variant.train(log)
                logger.info("%s: %s", name, ", ".join(f"{key} {value}" for key, value in figures.items()))
                run.finish([run.path / MODEL, run.path / TUNING], figures)
        files = [*inputs, variant.folder / MODEL]
        evaluate_scorer_variant(recipe, "baselines", name, data, recipe.lists, lambda: [variant], files)


main = command("baselines", BaselinesRecipe, baselines)

if __name__ == "__main__":
    sys.exit(main())
