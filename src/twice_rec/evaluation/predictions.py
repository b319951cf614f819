"""Predictions on disk, and what is counted in them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from twice_rec.answer_format import parse
from twice_rec.catalog import ItemCatalog, Outcome
from twice_rec.files import to_row
from twice_rec.metrics import summarise
from twice_rec.records import Prediction

PREDICTIONS = "predictions.jsonl"
METRICS_FILE = "metrics.json"


def metrics_of(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Return the flat map `<lists>/<metric>@<k>` -> mean over users and trainings, and `n`, the number of users."""
    ranks: dict[str, list[int]] = {}
    for prediction in predictions:
        for kind, rank in prediction.ranks.items():
            ranks.setdefault(kind, []).append(rank)
    metrics = {f"{kind}/{name}": value for kind, of in ranks.items() for name, value in summarise(of).items()}
    return {**metrics, "n": len({prediction.user_id for prediction in predictions})}


def answer_rates(predictions: Sequence[Prediction], catalog: ItemCatalog) -> dict[str, float]:
    """Return the share of completions with each outcome (hit, miss, outside, malformed), as `answers/<outcome>`."""
    outcomes = [
        catalog.outcome(parse(text), prediction.ranking, prediction.target)
        for prediction in predictions
        for text in prediction.answers
    ]
    return {f"answers/{o.value}": outcomes.count(o) / len(outcomes) for o in Outcome} if outcomes else {}


def append(path: Path, predictions: Iterable[Prediction]) -> None:
    """Append a batch to a file; it is on disk when this returns."""
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(to_row(prediction), ensure_ascii=False) + "\n" for prediction in predictions))
        file.flush()
        os.fsync(file.fileno())


def whole_batches(path: Path, sizes: Sequence[int]) -> int:
    """Return how many whole batches an interrupted run has appended, and cut off what follows them in the file."""
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    rows = sum(line.endswith(b"\n") for line in lines)
    done = int(np.searchsorted(np.cumsum(sizes), rows, side="right"))
    os.truncate(path, sum(map(len, lines[: sum(sizes[:done])])))
    return done
