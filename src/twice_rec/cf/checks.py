"""Signs that a SASRec was not trained well, which a table does not show. Stage 3a logs them, and stage 3c once more."""

from __future__ import annotations

from collections.abc import Mapping

from twice_rec.cf import baselines
from twice_rec.item_sequences import ItemSequences

MOST_POPULARITY = 0.9  # share of a model's variance beyond which it ranks nearly the same items first for everybody


def simple_models(histories: ItemSequences, num_items: int) -> dict[str, baselines.CFScorer]:
    """Return models without training: popularity, and item-kNN (shrinkage 20, decay .9) if it fits into memory."""
    training = baselines.TrainingData(histories, num_items, seed=0, validate=lambda scorer: 0.0)
    models: dict[str, baselines.CFScorer] = {"popularity": baselines.PopularityScorer(training)}
    if baselines.fits("itemknn", histories, num_items):
        similarity = baselines.knn_similarity(baselines.interaction_matrix(histories, num_items), shrink=20.0)
        models["itemknn"] = baselines.ItemSimilarityScorer(similarity, decay=0.9)
    return models


def signs_of_poor_training(
    ended_by_patience: bool, best_is_last: bool, popularity_share: float, validation: Mapping[str, Mapping[str, float]]
) -> list[str]:
    """Return one sentence per sign.

    Args:
        validation: name of a model (`sasrec`, and those it is compared with) -> metric -> value on validation.
    """
    signs = []
    if best_is_last and not ended_by_patience:
        signs.append("its last validation is its best: it was still learning when epochs ended; raise epochs")
    for name, reached in validation.items():
        for metric, value in reached.items():
            if (own := validation["sasrec"][metric]) < value:
                signs.append(f"on validation it is below {name} in {metric}: {own:.4f} against {value:.4f}")
    if popularity_share > MOST_POPULARITY:
        signs.append(
            f"its popularity share is {popularity_share:.2f}: it ranks nearly the same items first for everybody"
        )
    return signs
