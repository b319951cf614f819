"""Training curves of stage 3: what its trainer logged at each step, averaged over the trainings of a variant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from twice_rec.errors import InputError
from twice_rec.evaluation.report import Variant
from twice_rec.files import read_json
from twice_rec.grpo.recipe import grpo_folder, is_grpo_variant
from twice_rec.locks import run_folder

# Key of the trainer's log -> what readers see, in the order of the panels.
LOGGED: Mapping[str, str] = {
    "reward": "reward",
    "outcome/hit": "completions that hit",
    "groups/without_variance": "groups without variance",
    "kl": "KL from the start",
    "entropy": "entropy per token",
    "completions/mean_length": "tokens per completion",
}


@dataclass(frozen=True)
class Curves:
    """What one variant's trainings logged: key of `LOGGED` -> its mean over trainings, per step."""

    steps: NDArray[np.int64]  # [S]
    values: Mapping[str, NDArray[np.float64]]  # [S] each
    runs: int


def training_curves(variants: Mapping[str, Variant]) -> dict[str, Curves]:
    """Return the curves of every stage-3 variant among those of the report; others have none.

    The variants of the report are fresh, so the log beside the model is that of the model that was evaluated.
    """
    curves = {}
    for name, variant in variants.items():
        if is_grpo_variant(name):
            paths = [run_folder(terms.folder) / grpo_folder(name) / "trainer_state.json" for terms in variant.terms]
            logs = [log for path in paths if (log := logged_steps(path))]
            if logs:
                curves[name] = averaged(logs)
    return curves


def logged_steps(path: Path) -> dict[int, dict[str, float]]:
    """Return step -> what a trainer logged of a step of stage 3; empty if there is no such log."""
    if not path.exists():
        return {}
    try:
        rows = read_json(path)["log_history"]
        return {int(row["step"]): row for row in rows if "reward" in row}
    except (InputError, KeyError, TypeError, ValueError):
        return {}  # a file of another kind; the model is what it is all the same


def averaged(logs: Sequence[Mapping[int, Mapping[str, float]]]) -> Curves:
    """Return the means over trainings, for the steps that all of them logged, and the keys that all steps have."""
    steps = sorted(set.intersection(*(set(log) for log in logs)))
    keys = [key for key in LOGGED if all(key in log[step] for log in logs for step in steps)]
    values = {key: np.array([[log[step][key] for step in steps] for log in logs]).mean(axis=0) for key in keys}
    return Curves(np.array(steps, dtype=np.int64), values, len(logs))


def smoothed(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Return the mean of each value and its neighbours, `width` in all, fewer at the ends: [S] -> [S]."""
    before, after = (width - 1) // 2, width // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    low, high = np.maximum(0, places - before), np.minimum(len(values), places + after + 1)
    return (sums[high] - sums[low]) / (high - low)
