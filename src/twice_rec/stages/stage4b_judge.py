"""Stage 4b: what the rationales of evaluated models are worth -> judge/<variant>/ (verdicts and scores).

Of each variant the same users, drawn by seed, are judged under the conditions of `evaluation.judge`, by a rule that
knows the synthetic domain's true reasons, or by language models behind an API. What a model has answered is kept under
answers/, so that a killed stage asks for nothing twice. `human_labels` adds the scores of humans, for whom
`export_for_labels` writes the file.

Deviations from the paper: the rubric's words are ours, since the release has none; the level "incorrect" is looked up
in the catalogue and never asked for; judging without the item, and with another user's rationale, is ours.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from twice_rec.data import dataset
from twice_rec.data.dataset import PreparedData
from twice_rec.evaluation import human_labels, judges
from twice_rec.evaluation.judge import questions_of
from twice_rec.evaluation.judge_scores import SCORES, table_of
from twice_rec.evaluation.recipe import JudgeRecipe
from twice_rec.evaluation.tables import show
from twice_rec.files import read_json
from twice_rec.manifest import held
from twice_rec.run import StageRun
from twice_rec.stages.command_line import command

logger = logging.getLogger("judge")


def judge(recipe: JudgeRecipe) -> None:
    """Judge every variant of the recipe that is not judged yet."""
    names = (dataset.CATALOG, dataset.SEQUENCES, dataset.PROMPT, dataset.candidates_file("test"))
    inputs = dataset.required_files(recipe.run_path, *names)
    if not all(config.asks_a_model for config in recipe.configs.values()):
        inputs.append(judges.true_reasons_file(recipe))
    files = {variant: judges.evaluated(recipe, variant) for variant in recipe.variants}
    with held([*inputs, *files.values()]):  # before any work
        data = PreparedData(recipe.run_path / "data")
        given = judges.read_answers(recipe, data, files)
        asked = {v: questions_of(answers, recipe.conditions, recipe.seed) for v, answers in given.items()}
        if recipe.export_for_labels:
            StageRun.end_check()
            path = Path(recipe.export_for_labels)
            lines = human_labels.export(path, asked, data.catalog, data.prompt_format, recipe.seed)
            logger.info("%s: %s lines to fill in", path, f"{lines:,}")
            return
        if recipe.dry_run:
            logger.info("%s", judges.estimate(recipe, asked, data))
            return
        judges.require_keys(recipe)
        labels = human_labels.read(Path(recipe.human_labels), asked, list(recipe.judges)) if recipe.human_labels else {}
        inputs += [Path(recipe.human_labels)] if recipe.human_labels else []
        for variant in recipe.variants:
            of = (asked[variant], labels.get(variant, {}), [*inputs, files[variant]])
            judges.judge_variant(recipe, data, variant, *of)
    for variant in recipe.variants:
        show(table_of(variant, read_json(recipe.run_path / "judge" / variant / SCORES)))


main = command("judge", JudgeRecipe, judge)

if __name__ == "__main__":
    sys.exit(main())
