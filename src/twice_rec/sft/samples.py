"""Sample completions while a model trains, so that a user sees what it writes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from twice_rec.files import read_jsonl, write_jsonl
from twice_rec.llm.generation import TransformersGenerator
from twice_rec.sft.dataset import Row
from twice_rec.training_log import is_last, shortened

logger = logging.getLogger(__name__)


class SampleCompletions(TrainerCallback):
    """Writes greedy completions of a few training prompts, beside the completions that are trained on.

    They go to the log, to wandb as a table if it is on, and to a file.

    Args:
        every: steps between two samples; there are also some at the last step.
        path: JSON lines with `step`, `task`, `answer`, `expected`; a resumed run replaces those of repeated steps.
    """

    def __init__(self, rows: Sequence[Row], every: int, path: Path, max_new_tokens: int = 300):
        self._rows = rows
        self._every = every
        self._path = path
        self._max_new_tokens = max_new_tokens

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        """Sample, if it is time; the trainer calls this."""
        is_time = state.global_step % self._every == 0 or is_last(state)
        if not is_time or not state.is_world_process_zero or is_deepspeed_zero3_enabled():
            return  # under ZeRO-3 no process has the whole model
        training = model.training
        generator = TransformersGenerator(model, others["processing_class"], self._max_new_tokens)
        groups = generator.generate([row.prompt for row in self._rows])
        model.train(training)
        lines = [
            {"step": state.global_step, "task": row.task, "answer": completion.text, "expected": row.completion}
            for row, (completion,) in zip(self._rows, groups, strict=True)
        ]
        earlier = [row for _, row in read_jsonl(self._path)] if self._path.exists() else []
        write_jsonl(self._path, [*(row for row in earlier if row["step"] < state.global_step), *lines])
        for line in lines:
            logger.info("step %d, %s: %s", state.global_step, line["task"], line["answer"])
        if "wandb" in args.report_to:
            import wandb

            prompts = [shortened(row.prompt) for row in self._rows]
            data = [[*line.values(), prompt] for line, prompt in zip(lines, prompts, strict=True)]
            table = wandb.Table(columns=[*lines[0], "prompt"], data=data)
            wandb.log({"samples": table}, commit=False)
