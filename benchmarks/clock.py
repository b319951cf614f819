"""A trainer's clock, and what a GPU does in a step."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from transformers import TrainerCallback


class StepClock(TrainerCallback):
    """Seconds of each step, by the clock and of this process's CPU; the GPU's work is waited for.

    Args:
        profile: file for the kernels that take most of the GPU's time in step `profiled`; None for none.
    """

    def __init__(self, profile: str | None = None, profiled: int = 3):
        self.begins, self.ends, self.cpu_seconds = list[float](), list[float](), list[float]()
        self._path, self._profiled, self._profiler = profile, profiled, None

    @property
    def seconds(self) -> list[float]:
        """Of each step."""
        return [end - begin for begin, end in zip(self.begins, self.ends, strict=True)]

    def on_step_begin(self, *arguments, **others):
        if self._path and len(self.begins) == self._profiled:
            activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
            self._profiler = torch.profiler.profile(activities=activities)
            self._profiler.start()
        self.begins.append(time.perf_counter())
        self._cpu = time.process_time()

    def on_step_end(self, *arguments, **others):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        self.cpu_seconds.append(time.process_time() - self._cpu)
        if self._profiler:
            self._profiler.stop()
            sort = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            table = self._profiler.key_averages().table(sort_by=sort, row_limit=40, max_name_column_width=80)
            Path(self._path).write_text(f"step {self._profiled}: {self.seconds[-1]:.3f} s\n{table}\n")
            self._profiler = None
