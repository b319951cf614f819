"""Sample answers while a model trains, so that a user sees what it writes."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from twice_rec.llm.generation import TransformersGenerator
from twice_rec.sft.encoding import TrainingRow

logger = logging.getLogger(__name__)


class SampleAnswers(TrainerCallback):
    """Every so many steps: greedy answers to a few training prompts, beside the answers that are trained on.

    They go to the log, to a file of JSON lines (`step`, `task`, `answer`, `expected`), and to wandb as a table where
    that is on.

    Args:
        rows: whose prompts are asked.
        every: steps.
        path: of the file, which is appended to.
        max_new_tokens: longest answer.
    """

    def __init__(self, rows: Sequence[TrainingRow], every: int, path: Path, max_new_tokens: int = 300):
        self._rows = rows
        self._every = every
        self._path = path
        self._max_new_tokens = max_new_tokens

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        """Called by the trainer."""
        if state.global_step % self._every or not state.is_world_process_zero or is_deepspeed_zero3_enabled():
            return  # under ZeRO-3 no process has the whole model
        training = model.training
        generator = TransformersGenerator(model, others["processing_class"], self._max_new_tokens)
        answers = [given[0].text for given in generator.generate([row.prompt for row in self._rows])]
        model.train(training)
        lines = [
            {"step": state.global_step, "task": row.task, "answer": answer, "expected": row.answer}
            for row, answer in zip(self._rows, answers, strict=True)
        ]
        with open(self._path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        for line in lines:
            logger.info("step %d, %s: %s", state.global_step, line["task"], line["answer"])
        if "wandb" in args.report_to:
            import wandb

            columns = list(lines[0])
            table = wandb.Table(columns=columns, data=[[line[c] for c in columns] for line in lines])
            wandb.log({"samples": table}, commit=False)
