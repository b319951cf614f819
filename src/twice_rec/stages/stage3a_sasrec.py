"""Stage 3a: train SASRec, evaluate it and the CF baselines -> sasrec/ and eval/<variant>/.

SASRec is fitted on the training parts and chosen on validation; validation and test targets never train anything.
Item-kNN and EASE choose their settings on validation too. Writes `<variant>/model.safetensors` (the first seed's: what
stage 3 asks for confidences), `<variant>/seed-N/` for further seeds, `log.jsonl`, `tuning.jsonl` with `tune: true`, and
`eval/<name>/` for SASRec and every baseline.

Deviations from the release: padding is index 0, so items 1 and 2 train; negatives are never the user's own training
items; the weights are chosen on validation. The release's own settings are `recipes/grocery/sasrec_release.yaml`.
Several GPUs: ACCELERATE_CONFIG=recipes/accelerate_configs/ddp.yaml bash sasrec.sh; validation is the first one's.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from twice_rec.cf.baselines import require_memory
from twice_rec.cf.ranking import fit_baseline
from twice_rec.cf.recipe import SASRecRecipe
from twice_rec.cf.sasrec import SASRecScorer
from twice_rec.cf.sasrec_variant import STATE, SASRecVariant
from twice_rec.data import dataset
from twice_rec.data.dataset import PreparedData
from twice_rec.evaluation.cf_ranking import evaluate_scorer_variant, export_scores, require_space
from twice_rec.evaluation.tables import show_metrics
from twice_rec.manifest import held
from twice_rec.records import SPLITS
from twice_rec.run import IS_MAIN, StageRun, wandb_run
from twice_rec.stages.command_line import command

logger = logging.getLogger("sasrec")


def sasrec(recipe: SASRecRecipe) -> None:
    """Train, evaluate, compare."""
    lists = map(dataset.candidates_file, SPLITS)
    inputs = dataset.required_files(recipe.run_path, dataset.CATALOG, dataset.SEQUENCES, *lists)
    with held(inputs):
        _train_and_compare(recipe, inputs)
    if IS_MAIN:
        show_metrics(recipe.run_path)


def _train_and_compare(recipe: SASRecRecipe, inputs: list[Path]) -> None:
    data = PreparedData(recipe.run_path / "data")
    device = recipe.torch_device()
    settings = {k: v for k, v in recipe.settings().items() if k not in ("baselines", "lists", "variant")}
    with StageRun(recipe, "sasrec", recipe.variant, inputs, settings) as run:
        seeds = range(recipe.seed, recipe.seed + recipe.num_seeds)
        folders = [run.path if seed == recipe.seed else run.path / f"seed-{seed}" for seed in seeds]
        models = [folder / "model.safetensors" for folder in folders]
        require_space(recipe, data)
        if not run.is_finished():
            require_memory(recipe.baselines, data.training_histories(), len(data.catalog))
            data.require_lists("test", [kind for kind in recipe.lists if kind != "full"])
            run.begin()
            with wandb_run(recipe) as log:
                figures = SASRecVariant(recipe, data, device, log).train(dict(zip(seeds, folders, strict=True)))
            if not IS_MAIN:
                return
            run.finish([*models, *(folder / "log.jsonl" for folder in folders)], {"runs": figures})
        if not run.check_only:
            for folder in folders:
                (folder / STATE).unlink(missing_ok=True)

    def trained() -> list[SASRecScorer]:
        return [SASRecScorer.load(model, data.catalog, device) for model in models]

    evaluate_scorer_variant(recipe, "sasrec", recipe.variant, data, recipe.lists, trained, [*inputs, *models])
    for name in recipe.baselines:
        seed = {"seed": recipe.seed} if name == "random" else {}
        fitted = lambda name=name: [fit_baseline(name, data, recipe.seed, recipe.validation_users)]
        evaluate_scorer_variant(recipe, "sasrec", name, data, recipe.lists, fitted, inputs, **seed)
    StageRun.end_check()
    if recipe.export_scores:
        export_scores(recipe, trained()[0], data)


main = command("sasrec", SASRecRecipe, sasrec)

if __name__ == "__main__":
    sys.exit(main())
