"""How much a language model's choice depends on the order in which it is shown the candidates.

A question that is asked with K orders of its candidates has K first choices. A model that reads the candidates chooses
the same item each time, and finds it at every place of the list as often.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from twice_rec.records import Prediction


def order_metrics(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Return `position/...` for metrics.json; empty if every question was asked with one order.

    - `position/changes`: share of the questions whose first choice is not the same in all orders;
    - `position/choice_variance`: chance that two of a question's orders, drawn with replacement, choose differently,
      the mean over questions: 1 - sum of squared shares of its choices;
    - `position/hr@1_std`: standard deviation of HR@1 over the orders.
    """
    if not predictions or max(len(p.choices) for p in predictions) < 2:
        return {}
    counts = [np.unique(np.array(p.choices), return_counts=True)[1] / len(p.choices) for p in predictions]
    hits = np.array([[choice == p.target for choice in p.choices] for p in predictions])  # [U, K]
    return {
        "position/changes": float(np.mean([len(shares) > 1 for shares in counts])),
        "position/choice_variance": float(np.mean([1 - (shares**2).sum() for shares in counts])),
        "position/hr@1_std": float(hits.mean(axis=0).std()),
    }


def position_of(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Return what the report shows of one variant, for results.json; the metrics above are in it if there are orders.

    `by_place`: share of the first choices at each place of the list as shown, 1/C each if the place has no part in
    them; `none`: share of the orders in which no candidate was named.
    """
    places = np.array([place for p in predictions for place in p.places])  # [U * K]
    length = max(len(p.ranking) for p in predictions)
    chosen = places[places >= 0]
    return {
        "k": max(len(p.choices) for p in predictions),
        "n": len(predictions),
        "by_place": (np.bincount(chosen, minlength=length) / max(1, len(chosen))).tolist(),
        "none": float((places < 0).mean()),
        **{name.removeprefix("position/"): value for name, value in order_metrics(predictions).items()},
    }
