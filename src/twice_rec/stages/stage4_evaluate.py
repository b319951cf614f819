"""Stage 4: the same test questions to every variant -> eval/<variant>/ (predictions and metrics).

`base`, `stage2`, `stage3`, `stage2_NAME` and `stage3_NAME` are language models, asked about stored candidate lists, and
`suffix` names those that are asked in another way (`with_rationale: false`). `oracle`, the ceilings and the models in
`precomputed_scores` are score files that rank whatever lists are asked for; the oracle and the ceilings only those in
which every other item has the same chance to be beside the target, for only there are they the best rankings. CF
models are evaluated by their own stage. Killed and started again, it goes on behind the last whole batch.
"""

from __future__ import annotations

import sys
from pathlib import Path

from twice_rec.cf.baselines import PrecomputedScorer
from twice_rec.cf.rewarders import rewarder_inputs
from twice_rec.data import dataset
from twice_rec.data.dataset import PreparedData
from twice_rec.errors import InputError
from twice_rec.evaluation.cf_ranking import evaluate_scorer_variant
from twice_rec.evaluation.llm_ranking import evaluate_llm_variant
from twice_rec.evaluation.recipe import EvaluateRecipe
from twice_rec.evaluation.tables import show_metrics
from twice_rec.grpo.recipe import grpo_folder
from twice_rec.llm.hub import model_input
from twice_rec.manifest import HubModel, held
from twice_rec.run import require
from twice_rec.sft.recipe import is_sft_variant, sft_folder
from twice_rec.stages.command_line import command


def evaluate(recipe: EvaluateRecipe) -> None:
    """Evaluate every variant of the recipe that is not finished."""
    names = (dataset.CATALOG, dataset.SEQUENCES, dataset.PROMPT, dataset.candidates_file("test"))
    inputs = dataset.required_files(recipe.run_path, *names)
    models = {name: _model_of(recipe, name) for name in recipe.variants if not _is_score_file(recipe, name)}
    of_hints = rewarder_inputs(recipe, recipe.run_path) if recipe.cf_hints and models else []
    folders = [model for model in models.values() if isinstance(model, Path)]
    with held([*inputs, *of_hints, *folders]):  # before any work
        data = PreparedData(recipe.run_path / "data")
        for variant in recipe.variants:
            if variant not in models:
                _score_file(recipe, data, variant, inputs)
            else:
                evaluate_llm_variant(recipe, data, variant, models[variant], [*inputs, *of_hints])
    show_metrics(recipe.run_path)


def _is_score_file(recipe: EvaluateRecipe, variant: str) -> bool:
    return variant in dataset.KNOWN_SCORES or variant in recipe.precomputed_scores


def _score_file(recipe: EvaluateRecipe, data: PreparedData, variant: str, inputs: list[Path]) -> None:
    path = Path(recipe.precomputed_scores.get(variant, recipe.run_path / "data" / dataset.score_file(variant)))
    if variant in dataset.KNOWN_SCORES and not path.exists():
        raise InputError(
            f"{path}: no such file; only the synthetic domain has an oracle and ceilings: leave {variant} out of "
            "variants; if an earlier version prepared that domain, remove that folder and run prepare.sh again"
        )
    scorers = lambda: [PrecomputedScorer(path, len(data.sequences), len(data.catalog))]
    if not path.exists():
        raise InputError(f"{path}: no such file; precomputed_scores names it for {variant}")
    evaluate_scorer_variant(recipe, "evaluate", variant, data, recipe.lists_of(variant), scorers, [*inputs, path])


def _model_of(recipe: EvaluateRecipe, variant: str) -> Path | HubModel:
    """The model of a variant: its folder, or which one of the hub."""
    if variant == "base":
        return model_input(recipe.model_name_or_path or "", recipe.model_revision)
    if is_sft_variant(variant):
        made_by = "sft.sh" if variant == "stage2" else f"sft.sh with --variant {variant}"
        return require(recipe.run_path / sft_folder(variant) / "merged", made_by)
    return require(recipe.run_path / grpo_folder(variant) / "merged", f"grpo_step2.sh with --variant {variant}")


main = command("evaluate", EvaluateRecipe, evaluate)

if __name__ == "__main__":
    sys.exit(main())
