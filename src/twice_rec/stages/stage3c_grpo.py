"""Stage 3c: confidence-weighted GRPO of the stage-2 model -> grpo/ (adapter, checkpoints, completions), grpo/merged/.

A share of the training examples is prompted as in task 3; the policy samples a group of completions for each, and
`grpo/rewards.py` judges them. A new LoRA adapter is trained on the merged stage-2 model, or on `model_name_or_path`.
Deviations from the release: the id alone decides an answer; items outside the candidate list earn nothing; a failure of
the infrastructure ends the run. Resumes from the newest whole checkpoint. `variant` stage3_NAME goes to grpo_NAME/.
"""

from __future__ import annotations

import logging
import sys

from twice_rec.cf.held_out import HeldOut
from twice_rec.cf.hints import make_hints
from twice_rec.cf.rewarders import load_rewarder, rewarder_inputs
from twice_rec.data import dataset
from twice_rec.data.dataset import PreparedData
from twice_rec.grpo.dataset import prompt_rows
from twice_rec.grpo.recipe import GRPORecipe, start_model
from twice_rec.grpo.scoring import StepRewards, targets_first
from twice_rec.llm.hub import at_commit, model_input
from twice_rec.run import StageRun
from twice_rec.stages.command_line import command
from twice_rec.stages.plan import plan_training

logger = logging.getLogger("grpo")


def grpo(recipe: GRPORecipe) -> None:
    """Train, save, merge."""
    from datasets import Dataset

    from twice_rec.grpo.candidate_loss import make_candidate_loss
    from twice_rec.grpo.completion_log import CompletionLog
    from twice_rec.grpo.one_gpu import check_one_gpu
    from twice_rec.grpo.rollout import make_rollouts, trl_arguments
    from twice_rec.grpo.trainer import make_trainer
    from twice_rec.llm import model_check, models
    from twice_rec.llm.generation import PolicyScorer
    from twice_rec.llm.prompt_builder import PromptBuilder

    start = start_model(recipe)
    origin = model_input(start, recipe.model_revision)
    inputs = [*dataset.training_files(recipe.run_path), *rewarder_inputs(recipe, recipe.run_path)]
    with StageRun(recipe, "grpo", recipe.folder, [*inputs, origin]) as run:
        if run.is_finished():
            return
        recipe = at_commit(recipe, origin)
        tokenizer = model_check.checked_tokenizer(start, recipe)
        data = PreparedData(recipe.run_path / "data")
        rewarder = load_rewarder(recipe, recipe.run_path, data, HeldOut(recipe.train_fraction, recipe.seed))
        of_trl = trl_arguments(recipe, start)
        run.begin()
        rollouts = make_rollouts(recipe, tokenizer, start)
        model = models.load_for_training(start, recipe, recipe)
        rewards = StepRewards(recipe, data, rewarder, PolicyScorer(model, tokenizer))
        hints = make_hints(recipe, rewarder, data.catalog)
        builder = PromptBuilder(data.catalog, data.prompt_format, tokenizer, recipe, hints)
        rows = prompt_rows(builder, list(data.training_examples()), recipe.train_fraction, recipe.seed)
        check_one_gpu(recipe, model.config, rows, tokenizer)
        first = targets_first(recipe, data, rewarder)
        shares = ", ".join(f"{name} {share:.3f}" for name, share in first.items())
        logger.info("%s prompts, tau %.4g, %s", f"{len(rows):,}", rewards.config.reward_tau, shares)
        trainer = make_trainer(
            recipe,
            rollouts,
            make_candidate_loss(rewards.config, rows, data.catalog, rewarder, tokenizer),
            model=model,
            reward_funcs=rewards.functions,
            args=recipe.trainer_arguments(run.path, reward_weights=recipe.reward_weights, **of_trl),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=models.lora_config(recipe),
        )
        trainer.add_callback(CompletionLog(trainer, recipe.sample_every, recipe.sample_completions))
        figures = run.train(trainer) | {"tau": rewards.config.reward_tau, **first}
        if trainer.is_world_process_zero():
            run.finish(models.save_merged(start, run.path, recipe), figures)


main = command("grpo", GRPORecipe, grpo, plan_training)

if __name__ == "__main__":
    sys.exit(main())
