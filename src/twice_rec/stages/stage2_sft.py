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
from pathlib import Path

from twice_rec.data import dataset
from twice_rec.data.dataset import PreparedData
from twice_rec.files import read_records
from twice_rec.markdown import markdown_table
from twice_rec.records import Rationale
from twice_rec.run import StageRun, require
from twice_rec.sft.dataset import Row, training_rows
from twice_rec.sft.recipe import SFTRecipe
from twice_rec.stages.command_line import command

logger = logging.getLogger("sft")


def sft(recipe: SFTRecipe) -> None:
    """Train, save, merge."""
    from twice_rec.llm import models, tokens
    from twice_rec.llm.prompt_builder import PromptBuilder

    accepted = require(recipe.run_path / "rationales" / "accepted.jsonl", "rationales.sh")
    base = Path(recipe.model_name_or_path)
    inputs = [*dataset.training_files(recipe.run_path), accepted, *([base] if base.is_dir() else [])]
    with StageRun(recipe, "sft", "sft", inputs) as run:
        if run.is_finished():
            return
        run.begin()
        data = PreparedData(recipe.run_path / "data")
        tokenizer = tokens.load_tokenizer(recipe.model_name_or_path, recipe.model_revision)
        builder = PromptBuilder(data.catalog, data.prompt_format, tokenizer, recipe)
        examples, rationales = list(data.training_examples()), read_records(accepted, Rationale)
        rows = training_rows(builder, examples, rationales, recipe, recipe.seed)
        logger.info("prompts: %s", ", ".join(f"{count:,} {how}" for how, count in builder.truncated.items()))
        trainer = _trainer(recipe, rows, tokenizer, run)
        figures = run.train(trainer)
        if trainer.is_world_process_zero():
            merged = run.path / "merged"
            models.write_merged(recipe.model_name_or_path, run.path, merged, recipe)
            run.finish([*models.saved_weights(run.path), run.path / "trainer_state.json", merged], figures)


def _trainer(recipe: SFTRecipe, rows: list[Row], tokenizer, run: StageRun):
    """TRL's SFTTrainer over the encoded rows."""
    import torch
    from datasets import Dataset
    from trl import SFTTrainer

    from twice_rec.llm import models
    from twice_rec.sft import encoding
    from twice_rec.sft.collator import SharedPrefixCollator
    from twice_rec.sft.samples import SampleCompletions

    arguments = recipe.trainer_arguments(run.path)
    if recipe.curriculum:
        arguments.train_sampling_strategy = "sequential"
    encoded = encoding.encode_rows(tokenizer, rows, arguments.max_length)
    logger.info("tokens, by task:\n%s", markdown_table(encoding.LENGTH_HEADER, encoding.length_table(rows, encoded)))
    model = models.load_model(recipe.model_name_or_path, recipe, quantization=recipe.quantization)
    sharing = {}
    if recipe.share_prefixes:
        encoded, arguments.dataset_kwargs = encoding.share_prefixes(rows, encoded), {"skip_prepare_dataset": True}
        arguments.remove_unused_columns, sharing = False, {"data_collator": SharedPrefixCollator(model)}
        logger.info("%s groups of rows with a common beginning", f"{len(encoded):,}")
    shown = [row for row in rows if row.task != "item_info"][: recipe.sample_prompts if recipe.sample_every else 0]
    samples = [SampleCompletions(shown, recipe.sample_every, run.path / "samples.jsonl")] if shown else None
    torch.manual_seed(recipe.seed)  # the adapter's first weights
    return SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(encoded),
        processing_class=tokenizer,
        peft_config=models.lora_config(recipe),
        callbacks=samples,
        **sharing,
    )


main = command("sft", SFTRecipe, sft)

if __name__ == "__main__":
    sys.exit(main())
