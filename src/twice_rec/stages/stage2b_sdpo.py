"""Stage 2b: S-DPO on the stage-2 model -> sft_sdpo/ (adapter, checkpoints, log) and sft_sdpo/merged/ (plain model).

A baseline of Table 1, our re-creation of its idea, not a stage of the paper: the question of task 2 with the target's
answer as the chosen one and `num_negatives` other candidates of the user's training list as rejected ones (see
`sft/sdpo.py`). A new adapter is trained on the merged stage-2 model, which without the adapter is the reference.

Limits: no ZeRO-3. Resumes from the newest whole checkpoint. `variant` stage2_NAME goes to sft_NAME/.
"""

from __future__ import annotations

import logging
import sys

from twice_rec.data import dataset
from twice_rec.data.dataset import PreparedData
from twice_rec.llm.hub import at_commit, model_input
from twice_rec.run import StageRun
from twice_rec.sft.recipe import SDPORecipe, preferred_model
from twice_rec.stages.command_line import command
from twice_rec.stages.plan import plan_training

logger = logging.getLogger("sdpo")


def sdpo(recipe: SDPORecipe) -> None:
    """Train, save, merge."""
    from twice_rec.llm import model_check, models
    from twice_rec.llm.prompt_builder import PromptBuilder
    from twice_rec.sft.sdpo import preference_rows, sdpo_trainer

    start = preferred_model(recipe)
    origin = model_input(start, recipe.model_revision)
    with StageRun(recipe, "sdpo", recipe.folder, [*dataset.training_files(recipe.run_path), origin]) as run:
        if run.is_finished():
            return
        recipe = at_commit(recipe, origin)
        tokenizer = model_check.checked_tokenizer(start, recipe)
        run.begin()
        data = PreparedData(recipe.run_path / "data")
        builder = PromptBuilder(data.catalog, data.prompt_format, tokenizer, recipe)
        rows = preference_rows(builder, list(data.training_examples()), tokenizer, recipe)
        logger.info("%s users, %d rejected answers each", f"{len(rows):,}", recipe.num_negatives)
        trainer = sdpo_trainer(recipe, rows, tokenizer, start, run.path)
        figures = run.train(trainer)
        if trainer.is_world_process_zero():
            run.finish(models.save_merged(start, run.path, recipe), figures)


main = command("sdpo", SDPORecipe, sdpo, plan_training)

if __name__ == "__main__":
    sys.exit(main())
