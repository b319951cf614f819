"""The tiny base model -> base/ (model, tokenizer, chat template, exam, model card), and a copy in `publish_dir`.

It stands in for gemma-3-1b-it where no weights can be downloaded: it reads prompts and answers questions about what
they show. It is trained on the texts of the catalogue and on made-up lists (see `exercises.py`), never on an
interaction. If it is killed and started again, it goes on from the last training state. On CPUs the processes of
torchrun share the work, one thread each.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tiny_base import pretraining
from tiny_base.exercises import ExerciseWriter, Lengths
from tiny_base.model import build_model, model_card, train_tokenizer
from tiny_base.pretraining import Encoded, encode_conversation
from tiny_base.probe import examine
from tiny_base.recipe import BaseModelRecipe
from twice_rec.data import dataset
from twice_rec.data.dataset import PreparedData
from twice_rec.files import write_json, write_text
from twice_rec.llm.attention import CHUNKED_SDPA
from twice_rec.llm.tokens import load_tokenizer
from twice_rec.recipe import DeviceConfig
from twice_rec.run import IS_MAIN, StageRun
from twice_rec.stages.command_line import command

logger = logging.getLogger("base")

_TRAINING, _EXAM, _TEXTS = 1, 2, 3  # streams of random numbers


def base(recipe: BaseModelRecipe) -> None:
    """Train the tokenizer and the model, examine the model, save everything."""
    inputs = dataset.required_files(recipe.run_path, dataset.CATALOG, dataset.PROMPT)
    with StageRun(recipe, "base", "base", inputs) as run:
        if run.is_finished():
            return
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            torch.distributed.init_process_group("gloo")
        run.begin()
        data = PreparedData(recipe.run_path / "data")
        tokenizer = _tokenizer(recipe, data, run.path)
        model = build_model(tokenizer, recipe, recipe.seed)
        logger.info("%s parameters, %s tokens", f"{model.num_parameters():,}", f"{len(tokenizer):,}")
        losses = _pretrain(recipe, data, tokenizer, model, run.path)
        if not IS_MAIN:
            return
        exam = _exam(recipe, data, tokenizer, model)
        logger.info("exam: %s", ", ".join(f"{kind} {entry['right']:.3f}" for kind, entry in sorted(exam.items())))
        figures = {"parameters": model.num_parameters(), "vocabulary": len(tokenizer), "exam": exam}
        model.save_pretrained(run.path)
        write_json(run.path / "exam.json", exam)
        write_text(run.path / "README.md", model_card(recipe, figures, losses))
        outputs = sorted(path for path in run.path.iterdir() if path.name[0] != "." and path.name != pretraining.STATE)
        run.finish(outputs, figures)
        (run.path / pretraining.STATE).unlink(missing_ok=True)
    if recipe.publish_dir:
        _publish(outputs, Path(recipe.publish_dir))


def _longest(recipe: BaseModelRecipe) -> Lengths:
    return Lengths(recipe.max_purchases, recipe.max_candidates)


def _tokenizer(recipe: BaseModelRecipe, data: PreparedData, folder: Path) -> PreTrainedTokenizerBase:
    """Train the tokenizer if it is not there, and load it; the other processes wait for the first."""
    if IS_MAIN and not (folder / "tokenizer.json").exists():
        rng = np.random.default_rng([recipe.seed, _TEXTS])
        writer = ExerciseWriter(data.catalog, data.prompt_format)
        texts = writer.texts(rng, _longest(recipe), recipe.item_share, recipe.questions)
        train_tokenizer(texts, recipe.vocab_size).save_pretrained(folder)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return load_tokenizer(folder)


def _pretrain(
    recipe: BaseModelRecipe,
    data: PreparedData,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    folder: Path,
) -> list[tuple[int, float]]:
    """Train on documents that are drawn per step; return (step, loss)."""
    writer, longest = ExerciseWriter(data.catalog, data.prompt_format), _longest(recipe)

    def batch(step: int) -> list[Encoded]:
        rng, documents, tokens = np.random.default_rng([recipe.seed, _TRAINING, step]), list[Encoded](), 0
        while tokens < recipe.tokens_per_step:
            lengths = longest.at(step / recipe.curriculum_steps)
            document = writer.draw(rng, lengths, recipe.item_share, recipe.questions)
            turns = [(turn.question, turn.answer) for turn in document.turns]
            documents.append(encode_conversation(tokenizer, document.prompt, turns))
            tokens += len(documents[-1][0])
        return documents

    several = torch.distributed.is_initialized()  # several processes: CPUs alone
    device = "cpu" if several else DeviceConfig().torch_device()
    if device == "cpu":
        model.set_attn_implementation(CHUNKED_SDPA)
    torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")
    return pretraining.pretrain(model.to(device), batch, recipe, folder)


def _exam(
    recipe: BaseModelRecipe, data: PreparedData, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> dict[str, dict[str, float]]:
    """Examine the model on the longest lists of held-out items."""
    examiner = ExerciseWriter(data.catalog, data.prompt_format, held_out=True)
    rng, longest = np.random.default_rng([recipe.seed, _EXAM]), _longest(recipe)
    lists = (longest.interactions, longest.candidates, recipe.questions)
    return examine(model.cpu(), tokenizer, [examiner.document(rng, *lists) for _ in range(recipe.exam_documents)])


def _publish(paths: Sequence[Path], folder: Path) -> None:
    """Replace a folder by copies of these files."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in paths:
        shutil.copy(path, folder)
    logger.info("copied to %s", folder)


main = command("base", BaseModelRecipe, base)

if __name__ == "__main__":
    sys.exit(main())
