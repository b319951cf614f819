"""What a trainer logged, in files: `log.jsonl` of the results has all of it, the stage's log a line per logged step."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from twice_rec.files import write_jsonl
from twice_rec.progress import progress

logger = logging.getLogger(__name__)

LOG = "log.jsonl"
_IN_LINES = {"loss": "loss", "reward": "reward", "tokens_per_second": "tokens/s", "mfu": "MFU"}  # key -> word
_SHOWN = {**_IN_LINES, "learning_rate": "learning rate"}  # as above, in the file of the log
_BEGIN, _END = 200, 600  # characters of a prompt that tables show


class TrainingLog(TrainerCallback):
    """Writes the files while the trainer works.

    A line of `log.jsonl` has the trainer's own names and `step`; a value that is not finite is null. A resumed run
    drops the lines behind the checkpoint from which it goes on, since it writes them again.
    """

    def __init__(self, path: Path):
        self._path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Begin with what the checkpoint knows, of a resumed training; else with nothing."""
        if state.is_world_process_zero:
            write_log(self._path, state.log_history)

    def on_log(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Add the step that was logged just now."""
        if not state.is_world_process_zero:
            return
        for row in logged_steps(state.log_history[-1:]):
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
            values = ", ".join(f"{word} {_short(row[key])}" for key, word in _SHOWN.items() if row.get(key) is not None)
            logger.debug("step %d of %d: %s", row["step"], state.max_steps, values)


def write_log(path: Path, log_history: Iterable[Mapping[str, Any]]) -> None:
    """Write all lines of `log.jsonl` anew; no file if there are none."""
    if rows := list(logged_steps(log_history)):
        write_jsonl(path, rows)
    else:
        path.unlink(missing_ok=True)


def logged_steps(log_history: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the steps of a trainer's history, without what it says of a whole training at its end."""
    for row in log_history:
        if "loss" in row:
            yield {"step": row["step"], **{name: _plain(value) for name, value in row.items() if name != "step"}}


def is_last(state: Any) -> bool:
    """Whether a trainer has reached its last step."""
    return bool(state.global_step >= state.max_steps)


def shortened(prompt: Sequence[Mapping[str, str]]) -> str:
    """Return the messages of a prompt as one text for a table, of which the middle is left out if it is long."""
    text = "\n".join(message["content"] for message in prompt)
    return text if len(text) <= _BEGIN + _END else f"{text[:_BEGIN]} ... {text[-_END:]}"


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


class TrainingLines(TrainerCallback):
    """Writes the progress of a trainer to a log: a line per ten seconds in place of bar and metrics."""

    def __init__(self, name: str):
        self._name = name
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Begin at the step of a resumed training."""
        if state.is_world_process_zero:
            self._bar = progress(desc=self._name, total=state.max_steps, initial=state.global_step, unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Count the step."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        """Keep what the next line shows."""
        if self._bar is not None:
            shown = {word: _short(float(logs[name])) for name, word in _IN_LINES.items() if name in (logs or {})}
            self._bar.set_postfix(shown, refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """End."""
        if self._bar is not None:
            self._bar.close()


def write_lines(trainer: Any, name: str) -> None:
    """Let a trainer whose bar is off (`disable_tqdm`) write lines instead of printing the metrics of each step."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(TrainingLines(name))
