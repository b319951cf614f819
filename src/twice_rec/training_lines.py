"""The progress of a trainer in a log: a line every ten seconds in the place of its bar and its printed metrics.

All metrics of all steps are in `trainer_state.json` of the results.
"""

from __future__ import annotations

from typing import Any

from transformers import PrinterCallback, TrainerCallback

from twice_rec.progress import progress

_SHOWN = ("loss", "reward")


class TrainingLines(TrainerCallback):
    """Writes the lines."""

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
            shown = {name: f"{float(logs[name]):.3g}" for name in _SHOWN if name in (logs or {})}
            self._bar.set_postfix(shown, refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """End."""
        if self._bar is not None:
            self._bar.close()


def write_lines(trainer: Any, name: str) -> None:
    """Let a trainer whose bar is off (`disable_tqdm`) write lines instead of printing the metrics of each step."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(TrainingLines(name))
