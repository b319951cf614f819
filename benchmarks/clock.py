"""A trainer's clock, and what a GPU does in a step."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from transformers import TrainerCallback


class StepClock(TrainerCallback):
    """When each step began and ended, and its seconds of this process's CPU; the GPU's work is waited for.

    Args:
        profile: file for the kernels that take most of the time in the last step, which is then not timed; or None.
    """

    def __init__(self, profile: str | None = None):
        self.begins, self.ends, self.cpu_seconds = list[float](), list[float](), list[float]()
        self._path, self._profiler = profile, None

    @property
    def seconds(self) -> list[float]:
        """Of each step, without what lies between two."""
        return [end - begin for begin, end in zip(self.begins, self.ends, strict=True)]

    def on_step_begin(self, args, state, control, **others):
        """Start the clock, and the profiler before the last step; the trainer calls this."""
        if self._path and state.global_step == state.max_steps - 1:
            activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
            self._profiler = torch.profiler.profile(activities=activities)
            self._profiler.start()
        self._begun, self._cpu = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **others):
        """Note the time; the trainer calls this."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ended = time.perf_counter()
        if self._profiler:
            self._write(ended - self._begun)
            return
        self.begins.append(self._begun)
        self.ends.append(ended)
        self.cpu_seconds.append(time.process_time() - self._cpu)

    def _write(self, seconds: float) -> None:
        self._profiler.stop()
        lines = [f"a step of {seconds:.3f} s: milliseconds, calls, what"]
        for event in sorted(self._profiler.key_averages(), key=_own_time, reverse=True)[:60]:
            lines.append(f"{_own_time(event) / 1000:9.3f} {event.count:6d} {event.key[:150]}")
        Path(self._path).write_text("\n".join(lines) + "\n")


def _own_time(event) -> float:
    """Microseconds."""
    return event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total
