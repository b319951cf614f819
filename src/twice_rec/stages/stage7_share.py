"""Sharing: a model of stage 2 or 3 with its card and results -> share/<variant>/, and to the hub if the recipe says so.

The card tells what the manifests know: method, data, metrics with intervals, limits, licence. It lies outside the
model's own folder, whose hash other stages rest on. Call it behind the evaluation, and again with `--overwrite true`
behind another one. A push that was cut off goes on with the same command.
"""

from __future__ import annotations

import logging
import sys

from twice_rec.evaluation.predictions import PREDICTIONS
from twice_rec.run import StageRun
from twice_rec.sharing.facts import facts_of
from twice_rec.sharing.folder import assemble, check_notes, model_files
from twice_rec.sharing.hub import check_token, push
from twice_rec.sharing.recipe import ShareRecipe
from twice_rec.sharing.scores import evaluations_of, scored
from twice_rec.stages.command_line import command

logger = logging.getLogger("share")


def share(recipe: ShareRecipe) -> None:
    """Assemble the folder, and upload it."""
    check_token(recipe)
    facts = facts_of(recipe)
    files, notes = model_files(recipe, facts), check_notes(recipe)
    own, others, left_out = evaluations_of(recipe.run_path, facts.folder)
    evaluated = [path / PREDICTIONS for path in (*own, *others)] if own else []
    model = [recipe.run_path / facts.folder / "merged"] if recipe.weights == "merged" else files
    with StageRun(recipe, "share", f"share/{recipe.variant}", [*model, *notes, *evaluated]) as run:
        if not run.is_finished():
            run.begin(resumes=False)
            for line in left_out:
                logger.warning("%s", line)
            found = scored(own, others, recipe.bootstrap_samples, recipe.seed)
            written = assemble(run.path, recipe, facts, files, found)
            if facts.license is None:
                logger.warning("the licence of %s is not known; if you know it, give it as license", facts.base.name)
            run.finish(written, {"evaluations": [evaluation.name for evaluation in found]})
            logger.info("the model, its card and its results are in %s", run.path)
        run.end_check()
        if recipe.hub_model_id is not None:
            logger.info("uploaded: %s", push(run.path, recipe))


main = command("share", ShareRecipe, share)

if __name__ == "__main__":
    sys.exit(main())
