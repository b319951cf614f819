"""The files of an evaluation, and the metrics in them."""

from __future__ import annotations

from collections.abc import Sequence

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
