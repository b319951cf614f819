"""Stage 3c: confidence-weighted GRPO of the stage-2 model -> grpo/ (adapter, checkpoints, completions), grpo/merged/.

A share of the training examples is prompted as in task 3; the policy samples a group of answers to each; rewards are
those of `rewards.py`, the CF model asked once a step. A new LoRA adapter is trained on the merged stage-2 model,
or on the one that `model_name_or_path` names.

Deviations from the release: one item decides an answer (its id); items outside the candidate list earn nothing; a
failure of the infrastructure stops the run instead of counting as reward 0.
Resumes from the newest complete checkpoint in grpo/. Another `variant`, stage3_NAME, goes to grpo_NAME/.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from twice_rec.cf.confidence import SasRecScorer
from twice_rec.config import GrpoRecipe
from twice_rec.data import dataset
from twice_rec.data.dataset import PreparedData
from twice_rec.grpo.dataset import prompt_rows
from twice_rec.grpo.recipe import GRPORecipe
from twice_rec.grpo.scoring import StepRewards
from twice_rec.llm import models
from twice_rec.run import Work
from twice_rec.stages.command_line import IS_MAIN, run_stage
from twice_rec.stages.lifecycle import (
    about,
    grpo_start,
    need,
    owned_arguments,
    prompt_writer,
    say_finished,
    torch_device,
    train_and_save,
    trainer_figures,
)
from twice_rec.stages.stage3b_serve import load

logger = logging.getLogger("grpo")


def grpo(loaded: tuple[GrpoRecipe, dict]) -> None:
    """Train, save, merge."""
    import torch
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from twice_rec.grpo.completion_log import CompletionLog
    from twice_rec.grpo.rollout import make_rollouts, trl_arguments
    from twice_rec.grpo.trainer import SharedPrefixGRPOTrainer
    from twice_rec.llm.generation import Policy

    recipe, trainer_keys = loaded
    run, names = recipe.run_path, (dataset.CATALOG, dataset.SEQUENCES, dataset.PROMPT, "candidates.train.jsonl")
    files = [need(run / "data" / name, "prepare.sh") for name in names]
    start = grpo_start(recipe)
    cf_model = need(run / recipe.cf_variant / "model.safetensors", "sasrec.sh")
    files += [cf_model, *([start] if start.is_dir() else [])]
    work = Work(run, recipe.folder, "grpo", {**recipe.settings(), **trainer_keys}, files)
    if work.is_finished():
        say_finished(work.path)
        return
    config = as_new_recipe(recipe)
    data = PreparedData(run / "data")
    scorer = SasRecScorer.load(cf_model, data.catalog, torch_device("auto"))
    trainer_keys |= trl_arguments(config, start)
    if IS_MAIN:
        work.begin(recipe.overwrite)
    tokenizer = models.load_tokenizer(start, recipe.model_revision)
    rollouts = make_rollouts(config, tokenizer, start)
    model = models.load_model(start, recipe.dtype, recipe.attn_implementation, recipe.model_revision)
    rewards = StepRewards(config, data, scorer, Policy(model, tokenizer))
    writer = prompt_writer(data, recipe, tokenizer)
    rows = prompt_rows(writer, list(data.training_examples()), recipe.train_fraction, recipe.seed)
    logger.info("%s prompts, tau %.4g", f"{len(rows):,}", rewards.config.reward_tau)
    torch.manual_seed(recipe.seed)  # the adapter's first weights
    trainer_class = SharedPrefixGRPOTrainer if recipe.share_prefixes else GRPOTrainer
    trainer = trainer_class(
        rollout_func=rollouts,
        model=model,
        reward_funcs=rewards.functions,
        args=GRPOConfig(**owned_arguments(recipe, work.path), reward_weights=recipe.reward_weights, **trainer_keys),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=models.lora_config(recipe),
    )
    if rollouts is not None:
        rollouts.attach(trainer)
    trainer.add_callback(CompletionLog(trainer, recipe.sample_every, recipe.sample_completions))
    train_and_save(trainer, work.path, models.last_checkpoint(work.path))
    if trainer.is_world_process_zero():
        merged = work.path / "merged"
        models.write_merged(start, work.path, merged, recipe.dtype, recipe.model_revision)
        outputs = [*models.saved_weights(work.path), work.path / "trainer_state.json", merged]
        work.finish(
            outputs, {"tau": rewards.config.reward_tau, **trainer_figures(trainer)}, about(recipe, trainer_keys)
        )


def as_new_recipe(recipe: GrpoRecipe) -> GRPORecipe:
    """Copy a recipe of config.py; goes with config.py."""
    values = {name: getattr(recipe, name) for name in GRPORecipe.model_fields if hasattr(recipe, name)}
    return GRPORecipe(**values, cf_model=recipe.cf_variant)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_stage("grpo", GrpoRecipe, load, grpo, arguments)


if __name__ == "__main__":
    sys.exit(main())
