"""A trainer's clock, and what a GPU does in a step."""

from __future__ import annotations

import time
from collections.abc import Iterable
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
        self.kinds: dict[str, float] = {}  # of the profiled step, milliseconds: the whole, and kernels by what they do

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
        device = torch.autograd.DeviceType.CUDA if torch.cuda.is_available() else torch.autograd.DeviceType.CPU
        events = [event for event in self._profiler.key_averages() if event.device_type == device]
        self.kinds = {"profiled_ms": 1000 * seconds, **by_kind((e.key, _own_time(e) / 1000) for e in events)}
        lines = [", ".join(f"{name} {value:.1f}" for name, value in self.kinds.items()), "milliseconds, calls, what"]
        for event in sorted(events, key=_own_time, reverse=True)[:60]:
            lines.append(f"{_own_time(event) / 1000:9.3f} {event.count:6d} {event.key[:150]}")
        Path(self._path).write_text("\n".join(lines) + "\n")


_ATTENTION, _MATRIX = ("flash", "fmha", "attention"), ("gemm", "nvjet", "cutlass", "xmma", "::mm", "addmm", "bmm")


def by_kind(kernels: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return the milliseconds of attention, of matrix products, and of all else, from kernels' names and times."""
    found = {"attention_ms": 0.0, "matrix_ms": 0.0, "other_ms": 0.0}
    for name, milliseconds in kernels:
        words = name.lower()
        is_attention = any(word in words for word in _ATTENTION)  # first, for its kernels are made with cutlass too
        kind = "attention_ms" if is_attention else "matrix_ms" if any(word in words for word in _MATRIX) else "other_ms"
        found[kind] += milliseconds
    return found


def _own_time(event) -> float:
    """Microseconds."""
    return event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total
