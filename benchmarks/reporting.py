"""What all benchmarks share: the median of paired runs, and the last line they print."""

from __future__ import annotations

import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]  # the package, and the toy base model's code


def paired(ours: Callable[[], float], theirs: Callable[[], float], rounds: int) -> tuple[float, float]:
    """Measure both in turn, `rounds` times, so that a slow moment of the machine meets both; returns the medians."""
    pairs = []
    for number in range(1, rounds + 1):
        pairs.append((ours(), theirs()))
        print(f"round {number}: ours {pairs[-1][0]:,.4g}, theirs {pairs[-1][1]:,.4g}", flush=True)
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


def report(name: str, peer: str, ours: float, theirs: float, unit: str, larger_is_better: bool, **more: object) -> None:
    """Print the result as one line of JSON; `ratio` is above 1 where ours is better."""
    ratio = ours / theirs if larger_is_better else theirs / ours
    threads = torch.get_num_threads()
    machine = f"{platform.machine()}, {threads} threads, torch {torch.__version__}"
    row = {"name": name, "peer": peer, "ratio": round(ratio, 2), "ours": ours, "theirs": theirs, "unit": unit}
    print(json.dumps({**row, "machine": machine, **more}))
