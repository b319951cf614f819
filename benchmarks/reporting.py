"""What all benchmarks share: the median of paired runs, and the lines they print."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import date
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
    show_line(name, peer=peer, ratio=round(ratio, 2), ours=ours, theirs=theirs, unit=unit, **more)


def show_line(name: str, **found: object) -> None:
    """Print what was found as one line of JSON, with the machine, the GPU (null for none), the day and the command."""
    script = Path(sys.argv[0]).resolve()
    shown = str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name
    where = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "date": f"{date.today()}",
        "command": shlex.join([shown, *sys.argv[1:]]),
    }
    print(json.dumps({"name": name, **found, **where}), flush=True)


def add_measure(parser: argparse.ArgumentParser, measure: Callable[[argparse.Namespace], dict[str, float]]):
    """Parse the command line; if it is `in_a_process` that calls, print what `measure` finds, and end."""
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(argparse.Namespace(**json.loads(options.measure)))), flush=True)
        os._exit(0)  # a compiler's helpers may hang at the end of a process
    return options


def in_a_process(script: str, options: argparse.Namespace) -> dict[str, float]:
    """What a benchmark's `measure` finds in a process of its own; its output is shown if it fails."""
    command = [sys.executable, script, "--measure", json.dumps(vars(options))]
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:  # a helper may keep pipes open
        done = subprocess.run(command, stdout=output, stderr=errors, check=False)
        texts = [(file.seek(0), file.read())[1] for file in (output, errors)]
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{texts[0][-2000:]}{texts[1][-6000:]}")
    return json.loads(texts[0].splitlines()[-1])
