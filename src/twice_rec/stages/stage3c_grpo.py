"""Stage 3c: confidence-weighted GRPO of the stage-2 model -> grpo/ (adapter, checkpoints) and grpo/merged/.

A share of the training examples is prompted as in task 3; the policy samples a group of answers to each; rewards are
those of `rewards.py`, the CF model asked once a step. A new LoRA adapter is trained on the merged stage-2 model.

Deviations from the release: one item decides an answer (its id); items outside the candidate list earn nothing; a
failure of the infrastructure stops the run instead of counting as reward 0.
Resumes from the newest complete checkpoint in grpo/.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

import numpy as np

from twice_rec.artifacts import Work
from twice_rec.config import GrpoRecipe
from twice_rec.data import dataset
from twice_rec.data.dataset import PreparedData
from twice_rec.data.grpo import prompt_rows
from twice_rec.rewards import RewardSettings, StepRewards
from twice_rec.sasrec.scorer import SasRecScorer
from twice_rec.stages.lifecycle import (
    IS_MAIN,
    about,
    need,
    owned_arguments,
    prompt_writer,
    run_stage,
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

    from twice_rec.llm.modeling import (
        last_checkpoint,
        load_model,
        load_tokenizer,
        lora_config,
        saved_weights,
        write_merged,
    )
    from twice_rec.llm.rollout import attach_rollouts, make_rollouts, trl_arguments

    recipe, trainer_keys = loaded
    run, names = recipe.run_path, (dataset.CATALOG, dataset.SEQUENCES, dataset.PROMPT, "candidates.train.jsonl")
    files = [need(run / "data" / name, "prepare.sh") for name in names]
    model_folder = need(run / "sft" / "merged", "sft.sh")
    cf_model = need(run / recipe.cf_variant / "model.safetensors", "sasrec.sh")
    work = Work(run, "grpo", "grpo", {**recipe.settings(), **trainer_keys}, [*files, model_folder, cf_model])
    if work.is_finished():
        say_finished(work.path)
        return
    data = PreparedData(run / "data")
    scorer = SasRecScorer.load(cf_model, data.catalog, torch_device("auto"))
    settings = RewardSettings(recipe.reward_lambda, _tau(recipe, data, scorer))
    trainer_keys |= trl_arguments(recipe, model_folder)
    if IS_MAIN:
        work.begin(recipe.overwrite)
    rewards = StepRewards(
        recipe.reward_funcs, settings, data.catalog, scorer, recipe.confidence, recipe.confidence_debiased
    )
    tokenizer = load_tokenizer(model_folder)
    writer = prompt_writer(data, recipe, tokenizer)
    rows = prompt_rows(writer, list(data.training_examples()), recipe.train_fraction, recipe.seed)
    logger.info("%s prompts, tau %.4g", f"{len(rows):,}", settings.tau)
    torch.manual_seed(recipe.seed)  # the adapter's first weights
    trainer = GRPOTrainer(
        rollout_func=make_rollouts(recipe, tokenizer, model_folder),
        model=load_model(model_folder, recipe.dtype, recipe.attn_implementation),
        reward_funcs=rewards.functions,
        args=GRPOConfig(**owned_arguments(recipe, work.path), reward_weights=recipe.reward_weights, **trainer_keys),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora_config(recipe),
    )
    attach_rollouts(trainer)
    train_and_save(trainer, work.path, last_checkpoint(work.path))
    if trainer.is_world_process_zero():
        merged = work.path / "merged"
        write_merged(model_folder, work.path, merged, recipe.dtype)
        outputs = [*saved_weights(work.path), work.path / "trainer_state.json", merged]
        work.finish(outputs, {"tau": settings.tau, **trainer_figures(trainer)}, about(recipe, trainer_keys))


def _tau(recipe: GrpoRecipe, data: PreparedData, scorer: SasRecScorer) -> float:
    """Tau as given, or as a quantile of the confidences of all validation candidates."""
    if recipe.reward_tau is not None:
        return recipe.reward_tau
    (kind,) = data.candidates("train")[0].lists
    examples = list(data.examples("valid", kind))
    histories = [data.catalog.indices(entry.item_id for entry in example.history) for example in examples]
    shown = np.array([data.catalog.indices(example.candidates) for example in examples])
    confidences = scorer.confidences(histories, shown, recipe.confidence, recipe.confidence_debiased)
    return float(np.quantile(confidences, recipe.reward_tau_quantile))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_stage("grpo", GrpoRecipe, load, grpo, arguments)


if __name__ == "__main__":
    sys.exit(main())
