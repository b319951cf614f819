"""TRL's SFTTrainer over encoded rows. This module imports TRL; import it late."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trl
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from twice_rec.llm import models
from twice_rec.llm.fused import fuse_on_gpu
from twice_rec.llm.shared_prefix import bare_model, predicting_at
from twice_rec.llm.throughput import Metered
from twice_rec.markdown import markdown_table
from twice_rec.sft import encoding
from twice_rec.sft.collator import PackedCollator
from twice_rec.sft.dataset import Row
from twice_rec.sft.recipe import SFTRecipe
from twice_rec.sft.samples import SampleCompletions

logger = logging.getLogger(__name__)


class SFTTrainer(Metered, trl.SFTTrainer):
    """TRL's trainer; its log says how fast it trains."""

    def get_batch_samples(self, *arguments: Any, **keywords: Any) -> Any:
        """Load the batches of a step and count what they hold; see `Trainer`."""
        batches, items = super().get_batch_samples(*arguments, **keywords)
        for batch in batches:
            self.meter.count_batch(batch)
        return batches, items

    def compute_loss(self, model: Any, inputs: dict[str, Any], *arguments: Any, **keywords: Any) -> Any:
        """Return TRL's loss; on CPUs, too, the head is computed only where a token is predicted."""
        if self.args.device.type != "cpu" or self.label_smoother is not None:
            return super().compute_loss(model, inputs, *arguments, **keywords)
        labels = inputs["labels"][:, 1:]  # [R, L - 1]
        row, column = (labels != -100).nonzero(as_tuple=True)  # [M] each
        others = {name: value for name, value in inputs.items() if name != "labels"}
        with predicting_at(bare_model(model), row, column):
            others["shift_labels"] = labels[row, column][None]  # [1, M]
            return super().compute_loss(model, others, *arguments, **keywords)


def sft_trainer(recipe: SFTRecipe, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, folder: Path) -> SFTTrainer:
    """Encode the rows, load the base model, and return the trainer of its adapter, or of all its weights."""
    arguments = recipe.trainer_arguments(folder)
    if recipe.curriculum:
        arguments.train_sampling_strategy = "sequential"
    encoded = encoding.encode_rows(tokenizer, rows, arguments.max_length)
    logger.info("tokens, by task:\n%s", markdown_table(encoding.LENGTH_HEADER, encoding.length_table(rows, encoded)))
    base, quantization = recipe.model_name_or_path, recipe.quantization
    model = models.load_for_training(base, recipe, recipe, quantization=quantization)
    more: dict[str, Any] = {}
    if recipe.share_prefixes or recipe.pack_tokens:
        encoded = encoding.share_prefixes(rows, encoded) if recipe.share_prefixes else encoding.alone(encoded)
        if recipe.share_prefixes:
            logger.info("%s groups of rows with a common beginning", f"{len(encoded):,}")
        if recipe.pack_tokens:
            encoded = encoding.pack(encoded, recipe.pack_tokens, recipe.seed)
            logger.info("%s packs of at most %s tokens", f"{len(encoded):,}", f"{recipe.pack_tokens:,}")
        arguments.dataset_kwargs = {"skip_prepare_dataset": True}
        arguments.remove_unused_columns, more["data_collator"] = False, PackedCollator(model)
    if recipe.sample_every:
        asked = [row for row in rows if row.task != "item_info"][: recipe.sample_prompts]
        more["callbacks"] = [SampleCompletions(asked, recipe.sample_every, folder / "samples.jsonl")]
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(encoded),
        processing_class=tokenizer,
        peft_config=models.lora_config(recipe),
        **more,
    )
    fuse_on_gpu(trainer.model, trainer.args.device)
    return trainer
