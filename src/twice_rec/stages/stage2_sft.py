"""Stage 2: multi-task SFT of the base model -> sft/ (adapter, checkpoints, log) and sft/merged/ (plain model).

Three tasks are mixed (see `sft/dataset.py`); TRL's SFTTrainer trains a LoRA adapter, or all weights, with the loss on
the completions only. The merged model is made from a fresh copy of the base.

Deviations from the release: by default the base is not in 8 bit (`quantization`), since an adapter
trained on a quantised base and merged into the plain one is not the model that was trained.
Resumes from the newest complete checkpoint. `variant` stage2_NAME goes to sft_NAME/.
"""

from __future__ import annotations

import logging
import sys

from twice_rec.data import dataset
from twice_rec.data.dataset import PreparedData
from twice_rec.files import read_records
from twice_rec.llm.hub import at_commit, model_input
from twice_rec.records import Rationale
from twice_rec.run import StageRun, require
from twice_rec.sft.dataset import training_rows
from twice_rec.sft.recipe import SFTRecipe
from twice_rec.stages.command_line import command
from twice_rec.stages.plan import plan_training

logger = logging.getLogger("sft")


def sft(recipe: SFTRecipe) -> None:
    """Train, save, merge."""
    from twice_rec.llm import model_check, models
    from twice_rec.llm.prompt_builder import PromptBuilder
    from twice_rec.sft.trainer import sft_trainer

    with_variant = "" if recipe.rationales == "rationales" else f" with --variant {recipe.rationales}"
    accepted = require(recipe.run_path / recipe.rationales / "accepted.jsonl", f"rationales.sh{with_variant}")
    base = model_input(recipe.model_name_or_path, recipe.model_revision)
    inputs = [*dataset.training_files(recipe.run_path), accepted, base]
    with StageRun(recipe, "sft", recipe.folder, inputs) as run:
        if run.is_finished():
            return
        recipe = at_commit(recipe, base)
        tokenizer = model_check.checked_tokenizer(recipe.model_name_or_path, recipe)
        run.begin()
        data = PreparedData(recipe.run_path / "data")
        builder = PromptBuilder(data.catalog, data.prompt_format, tokenizer, recipe)
        examples, rationales = list(data.training_examples()), read_records(accepted, Rationale)
        rows = training_rows(builder, examples, rationales, recipe, recipe.seed)
        logger.info("prompts: %s", ", ".join(f"{count:,} {how}" for how, count in builder.truncated.items()))
        trainer = sft_trainer(recipe, rows, tokenizer, run.path)
        figures = run.train(trainer)
        if trainer.is_world_process_zero():
            run.finish(models.save_merged(recipe.model_name_or_path, run.path, recipe), figures)


main = command("sft", SFTRecipe, sft, plan_training)

if __name__ == "__main__":
    sys.exit(main())
