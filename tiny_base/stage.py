"""The tiny base model -> base/ (model, tokenizer, chat template, exam, model card), and a copy in `publish_dir`.

It plays the part of gemma-3-1b-it where no weights can be downloaded: it reads the prompts' form and answers questions
about what stands there. It reads the catalogue's texts and made-up lists (see `exercises.py`), never a purchase.
Killed and started again, it goes on from the last training state. On CPUs torchrun's processes share the work, one
thread each.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from tiny_base import pretraining
from tiny_base.exercises import Document, ExerciseWriter, Lengths
from tiny_base.model import BaseSettings, build_model, model_card, train_tokenizer
from tiny_base.pretraining import PretrainSettings, encode_conversation
from tiny_base.probe import examine
from tiny_base.recipe import BaseModelRecipe
from twice_rec.config import load_recipe
from twice_rec.data import dataset
from twice_rec.data.dataset import PreparedData
from twice_rec.files import write_json, write_text
from twice_rec.llm.attention import CHUNKED_SDPA
from twice_rec.llm.tokens import load_tokenizer
from twice_rec.run import Work
from twice_rec.stages.command_line import IS_MAIN, run_stage
from twice_rec.stages.lifecycle import about, need, say_finished, torch_device

logger = logging.getLogger("base")

_TRAINING, _EXAM, _TEXTS = 1, 2, 3  # streams of random numbers


def base(recipe: BaseModelRecipe) -> None:
    """Train the tokenizer and the model, examine it, save everything."""
    files = [need(recipe.run_path / "data" / name, "prepare.sh") for name in (dataset.CATALOG, dataset.PROMPT)]
    work = Work(recipe.run_path, "base", "base", recipe.settings(), files)
    if work.is_finished():
        say_finished(work.path)
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        torch.distributed.init_process_group("gloo")
    if IS_MAIN:
        work.begin(recipe.overwrite)
    data = PreparedData(recipe.run_path / "data")
    writer = ExerciseWriter(data.catalog, data.prompt_format)
    longest = Lengths(recipe.max_purchases, recipe.max_candidates)
    if IS_MAIN and not (work.path / "tokenizer.json").exists():
        rng = np.random.default_rng([recipe.seed, _TEXTS])
        texts = writer.texts(rng, longest, recipe.item_share, recipe.questions)
        train_tokenizer(texts, recipe.vocab_size).save_pretrained(work.path)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    tokenizer = load_tokenizer(work.path)
    own = {f.name: getattr(recipe, f.name) for f in fields(recipe)}
    model = build_model(tokenizer, BaseSettings(**{f.name: own[f.name] for f in fields(BaseSettings)}))
    logger.info("%s parameters, %s tokens", f"{model.num_parameters():,}", f"{len(tokenizer):,}")

    def encoded(document: Document) -> pretraining.Encoded:
        turns = [(turn.question, turn.answer) for turn in document.turns]
        return encode_conversation(tokenizer, document.prompt, turns)

    def batch(step: int) -> list[pretraining.Encoded]:
        rng, documents, tokens = np.random.default_rng([recipe.seed, _TRAINING, step]), [], 0
        while tokens < recipe.tokens_per_step:
            lengths = longest.at(step / recipe.curriculum_steps)
            documents.append(encoded(writer.draw(rng, lengths, recipe.item_share, recipe.questions)))
            tokens += len(documents[-1][0])
        return documents

    settings = PretrainSettings(**{f.name: own[f.name] for f in fields(PretrainSettings)})
    device = "cpu" if torch.distributed.is_initialized() else torch_device("auto")  # several processes: CPUs alone
    if device == "cpu":
        model.set_attn_implementation(CHUNKED_SDPA)
    torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")
    losses = pretraining.pretrain(model.to(device), batch, settings, work.path)
    if not IS_MAIN:
        return
    examiner = ExerciseWriter(data.catalog, data.prompt_format, held_out=True)
    rng = np.random.default_rng([recipe.seed, _EXAM])
    lists = (longest.purchases, longest.candidates, recipe.questions)
    exam = examine(model.cpu(), tokenizer, [examiner.document(rng, *lists) for _ in range(recipe.exam_documents)])
    logger.info("exam: %s", ", ".join(f"{kind} {entry['right']:.3f}" for kind, entry in sorted(exam.items())))
    figures = {"parameters": model.num_parameters(), "vocabulary": len(tokenizer), "exam": exam}
    model.save_pretrained(work.path)
    write_json(work.path / "exam.json", exam)
    write_text(work.path / "README.md", model_card(recipe, figures, losses))
    (work.path / pretraining.STATE).unlink(missing_ok=True)
    outputs = sorted(path for path in work.path.iterdir() if path.name[0] != ".")
    work.finish(outputs, figures, about(recipe))
    if recipe.publish_dir:
        target = Path(recipe.publish_dir)
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for path in outputs:
            shutil.copy(path, target)
        logger.info("copied to %s", target)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_stage(
        "base", BaseModelRecipe, lambda path, flags: load_recipe(path, BaseModelRecipe, flags), base, arguments
    )


if __name__ == "__main__":
    sys.exit(main())
