"""What a prompt says of the CF model's ranking. The paper has no such hints.

The paper lets a CF model only judge what the policy recommends. A hint shows what it expects in the question itself, so
that the policy can weigh it against what it reads there.
"""

from __future__ import annotations

import numpy as np

from twice_rec.catalog import ItemCatalog
from twice_rec.cf.confidence import ConfidenceModel, softmax
from twice_rec.cf.recipe import HintConfig
from twice_rec.records import Example


def make_hints(config: HintConfig, model: ConfidenceModel, catalog: ItemCatalog) -> CFHints | None:
    """Return the hints that the recipe asks for, None if it asks for none."""
    return CFHints(model, catalog, config.cf_hints) if config.cf_hints else None


class CFHints:
    """The candidates that a CF model ranks first.

    Args:
        model: calibrated.
        count: how many of them; all if there are fewer.
    """

    def __init__(self, model: ConfidenceModel, catalog: ItemCatalog, count: int):
        self._model, self._catalog, self._count = model, catalog, count

    def __call__(self, example: Example) -> list[tuple[str, float]]:
        """Return item ids, best first, each with its chance of being the target if one candidate is.

        The chance is the softmax over the candidates of the calibrated scores.
        """
        history = self._catalog.indices([interaction.item_id for interaction in example.history])
        candidates = np.array([self._catalog.indices(example.candidates)])  # [1, C]
        chances = softmax(self._model.scaled_logits([history], candidates))[0]  # [C]
        best = np.argsort(-chances, kind="stable")[: self._count]
        return [(example.candidates[place], float(chances[place])) for place in best]
