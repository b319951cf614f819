"""Stage 2: multi-task SFT of the base model -> sft/ (adapter, checkpoints, log) and sft/merged/ (plain model).

Three tasks are mixed (see `sft/dataset.py`); TRL's SFTTrainer trains a LoRA adapter, or all weights, with the loss on
the completions only. The merged model is made from a fresh copy of the base.

Deviations from the release: by default the base is not in 8 bit (`quantization`), since an adapter
trained on a quantised base and merged into the plain one is not the model that was trained.
Resumes from the newest complete checkpoint in sft/.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from twice_rec.config import SftRecipe, load_training_recipe
from twice_rec.data import dataset
from twice_rec.data.dataset import PreparedData
from twice_rec.files import read_records
from twice_rec.llm import models
from twice_rec.llm.prompt_builder import PromptBuilder
from twice_rec.llm.tokens import load_tokenizer
from twice_rec.markdown import markdown_table
from twice_rec.records import Rationale
from twice_rec.run import Work
from twice_rec.sft.dataset import training_rows
from twice_rec.sft.recipe import TaskMixConfig
from twice_rec.stages.command_line import IS_MAIN, run_stage
from twice_rec.stages.lifecycle import (
    OWNED_BY_STAGES,
    about,
    need,
    owned_arguments,
    say_finished,
    train_and_save,
    trainer_figures,
)

logger = logging.getLogger("sft")


def sft(loaded: tuple[SftRecipe, dict]) -> None:
    """Train, save, merge."""
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from twice_rec.sft import encoding
    from twice_rec.sft.collator import SharedPrefixCollator
    from twice_rec.sft.samples import SampleCompletions

    recipe, trainer_keys = loaded
    run, names = recipe.run_path, (dataset.CATALOG, dataset.SEQUENCES, dataset.PROMPT, "candidates.train.jsonl")
    files = [need(run / "data" / name, "prepare.sh") for name in names]
    files.append(need(run / "rationales" / "accepted.jsonl", "rationales.sh"))
    if Path(recipe.model_name_or_path).is_dir():
        files.append(Path(recipe.model_name_or_path))
    work = Work(run, "sft", "sft", {**recipe.settings(), **trainer_keys}, files)
    if work.is_finished():
        say_finished(work.path)
        return
    if IS_MAIN:
        work.begin(recipe.overwrite)
    data = PreparedData(run / "data")
    tokenizer = load_tokenizer(recipe.model_name_or_path, recipe.model_revision)
    builder = PromptBuilder(data.catalog, data.prompt_format, tokenizer, recipe)
    mix = TaskMixConfig(**{name: getattr(recipe, name) for name in TaskMixConfig.model_fields})
    accepted = read_records(run / "rationales" / "accepted.jsonl", Rationale)
    rows = training_rows(builder, list(data.training_examples()), accepted, mix, recipe.seed)
    arguments = SFTConfig(**owned_arguments(recipe, work.path), **trainer_keys)
    if recipe.curriculum:
        arguments.train_sampling_strategy = "sequential"
    encoded = encoding.encode_rows(tokenizer, rows, arguments.max_length)
    logger.info("tokens, by task:\n%s", markdown_table(encoding.LENGTH_HEADER, encoding.length_table(rows, encoded)))
    logger.info("prompts: %s", ", ".join(f"{count:,} {how}" for how, count in builder.truncated.items()))
    model = models.load_model(recipe.model_name_or_path, recipe, quantization=recipe.quantization)
    sharing = {}
    if recipe.share_prefixes:
        encoded, arguments.dataset_kwargs = encoding.share_prefixes(rows, encoded), {"skip_prepare_dataset": True}
        arguments.remove_unused_columns, sharing = False, {"data_collator": SharedPrefixCollator(model)}
        logger.info("%s groups of rows with a common beginning", f"{len(encoded):,}")
    samples = [row for row in rows if row.task != "item_info"][: recipe.sample_prompts if recipe.sample_every else 0]
    torch.manual_seed(recipe.seed)  # the adapter's first weights
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(encoded),
        processing_class=tokenizer,
        peft_config=models.lora_config(recipe),
        callbacks=[SampleCompletions(samples, recipe.sample_every, work.path / "samples.jsonl")] if samples else None,
        **sharing,
    )
    train_and_save(trainer, work.path, models.last_checkpoint(work.path))
    if trainer.is_world_process_zero():
        merged = work.path / "merged"
        models.write_merged(recipe.model_name_or_path, work.path, merged, recipe)
        outputs = [*models.saved_weights(work.path), work.path / "trainer_state.json", merged]
        work.finish(outputs, trainer_figures(trainer), about(recipe, trainer_keys))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""

    def load(path: str, flags: Sequence[str]) -> tuple[SftRecipe, dict]:
        from trl import SFTConfig

        return load_training_recipe(path, SftRecipe, SFTConfig, flags, OWNED_BY_STAGES)

    return run_stage("sft", SftRecipe, load, sft, arguments)


if __name__ == "__main__":
    sys.exit(main())
