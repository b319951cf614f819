"""Models that need no gradient: random, popularity, item-kNN, EASE, and precomputed scores of any other model.

All score the whole catalogue for a user's history (`CFScorer`), so they are ranked on the same lists, with the same
metrics, as every other model. They are fitted on training parts; the few settings of item-kNN and EASE are chosen on
validation.

To add one, write a class here that takes `TrainingData` and has `scores`, and register it with `@baseline`: recipes,
tables and stage 3's `cf_model` take its name from `BASELINES`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, sparse

from twice_rec.cf.confidence import Floats, Histories
from twice_rec.errors import InputError
from twice_rec.random_streams import random_stream

logger = logging.getLogger(__name__)


class CFScorer(Protocol):
    """Anything that scores the catalogue for users."""

    def scores(self, users: NDArray[np.int64], histories: Histories) -> Floats:
        """Return the scores of all items: float [B, N], column j for item index j + 1.

        `users` is int64 [B], a number per user: in evaluation the position in `sequences.jsonl`.
        """


@dataclass(frozen=True)
class TrainingData:
    """What a baseline is fitted on."""

    histories: Histories  # item indices of each user's training part
    num_items: int  # N
    seed: int
    validate: Callable[[CFScorer], float]  # measures a model on validation; larger is better


BASELINES: dict[str, Callable[[TrainingData], CFScorer]] = {}  # name in recipes -> class, in the order of tables
Fit = TypeVar("Fit", bound=Callable[[TrainingData], CFScorer])


def baseline(name: str) -> Callable[[Fit], Fit]:
    """Register a class, or a function that makes one, in `BASELINES`."""

    def register(fit: Fit) -> Fit:
        BASELINES[name] = fit
        return fit

    return register


@baseline("random")
class RandomScorer:
    """Uniform random scores, the same for a user at every call."""

    def __init__(self, training: TrainingData):
        self._training = training

    def scores(self, users: NDArray[np.int64], histories: Histories) -> Floats:
        """See `CFScorer`."""
        seed, num_items = self._training.seed, self._training.num_items
        return np.stack([random_stream(seed, "random scores", int(user)).random(num_items) for user in users])


@baseline("popularity")
class PopularityScorer:
    """Number of training interactions of each item."""

    def __init__(self, training: TrainingData):
        indices = [index for history in training.histories for index in history]
        self._counts = np.bincount(indices, minlength=training.num_items + 1)[1:].astype(np.float64)  # [N]

    def scores(self, users: NDArray[np.int64], histories: Histories) -> Floats:
        """See `CFScorer`."""
        return np.broadcast_to(self._counts, (len(histories), len(self._counts)))


def interaction_matrix(histories: Histories, num_items: int, decay: float = 1.0) -> sparse.csr_matrix:
    """Return a sparse [B, N], column j for item index j + 1, with decay ** (number of later items) at each item."""
    lengths = [len(history) for history in histories]
    rows = np.repeat(np.arange(len(histories)), lengths)
    columns = np.fromiter((index - 1 for history in histories for index in history), dtype=np.int64, count=sum(lengths))
    age = np.concatenate([np.arange(length)[::-1] for length in lengths])
    return sparse.csr_matrix((decay**age, (rows, columns)), shape=(len(histories), num_items))


class ItemSimilarityScorer:
    """Item-to-item weights summed over the history, the k-th most recent item weighted by decay ** (k - 1).

    `similarity` is [N, N], from the history's item (row) to the scored item; sparse or dense.
    """

    def __init__(self, similarity: sparse.csr_matrix | Floats, decay: float):
        self._similarity = similarity
        self._decay = decay

    def scores(self, users: NDArray[np.int64], histories: Histories) -> Floats:
        """See `CFScorer`."""
        summed = interaction_matrix(histories, self._similarity.shape[0], self._decay) @ self._similarity  # [B, N]
        return summed.toarray() if sparse.issparse(summed) else summed


def choose_similarity(
    training: TrainingData, fit: Callable[[sparse.csr_matrix, float], Any], setting: str, values: Sequence[float]
) -> ItemSimilarityScorer:
    """Fit a similarity with each setting and decay, and keep the best on validation; the earlier one wins a tie."""
    interactions = interaction_matrix(training.histories, training.num_items)  # [users, N]

    def tried() -> Iterator[tuple[float, str, ItemSimilarityScorer]]:
        for value in values:
            similarity = fit(interactions, value)  # [N, N]
            for decay in (1.0, 0.9, 0.8):
                model, chosen = ItemSimilarityScorer(similarity, decay), f"{setting} {value:g}, decay {decay:g}"
                reached = training.validate(model)
                logger.info("  %s: validation %.4f", chosen, reached)
                yield reached, chosen, model

    reached, chosen, model = max(tried(), key=lambda one: one[0])
    logger.info("chose %s: validation %.4f", chosen, reached)
    return model


def knn_similarity(interactions: sparse.csr_matrix, shrink: float) -> sparse.csr_matrix:
    """Return the cosine of co-occurrence with shrinkage, n_ij / (sqrt(n_i n_j) + shrink), 0 on the diagonal.

    Sparse 0/1 [users, N] -> sparse [N, N].
    """
    together = (interactions.T @ interactions).tocoo()  # [N, N]
    counts, row, column = together.diagonal(), together.row, together.col  # [N], [pairs], [pairs]
    cosine = together.data / (np.sqrt(counts[row] * counts[column]) + shrink)  # [pairs]
    return sparse.csr_matrix((np.where(row == column, 0.0, cosine), (row, column)), shape=together.shape)


@baseline("itemknn")
def item_knn(training: TrainingData) -> ItemSimilarityScorer:
    """Fit item-kNN with the shrinkage and decay that are best on validation."""
    return choose_similarity(training, knn_similarity, "itemknn with shrink", (0.0, 20.0, 60.0))


def ease_weights(interactions: sparse.csr_matrix, regularisation: float, max_bytes: float = 16e9) -> Floats:
    """Return EASE (Steck, 2019), the item-item regression with a zero diagonal in closed form.

    Sparse 0/1 [users, N] -> dense float64 [N, N].

    Raises:
        InputError: if its dense matrix and the inverse would not fit into `max_bytes`.
    """
    num_items = interactions.shape[1]
    size = 2 * 8 * num_items**2
    if size > max_bytes:
        raise InputError(
            f"EASE inverts a dense matrix of {num_items:,} x {num_items:,} items, {size / 1e9:.0f} GB with its copy; "
            "leave ease out of baselines, or choose another cf_model"
        )
    gram = (interactions.T @ interactions).toarray().astype(np.float64)  # [N, N]
    gram[np.diag_indices(num_items)] += regularisation
    inverse = linalg.inv(gram, overwrite_a=True, check_finite=False)  # [N, N]
    weights = inverse / -np.diag(inverse)
    np.fill_diagonal(weights, 0.0)
    return weights


@baseline("ease")
def ease(training: TrainingData) -> ItemSimilarityScorer:
    """Fit EASE with the regularisation and decay that are best on validation."""
    return choose_similarity(training, ease_weights, "ease with regularisation", (100.0, 300.0, 1000.0))


class PrecomputedScorer:
    """Test scores of any other model, from an `.npz` with `scores` float [users, N] in the files' order.

    Raises:
        InputError: for a missing file, a missing array, another shape, or NaN.
    """

    def __init__(self, path: Path, num_users: int, num_items: int):
        if not path.exists():
            raise InputError(f"{path}: no such file; precomputed scores are an .npz with an array `scores`")
        try:
            with np.load(path, allow_pickle=False) as file:
                if "scores" not in file:
                    raise InputError(f"{path}: no array `scores`; it holds {', '.join(file.files) or 'nothing'}")
                self._scores = file["scores"]
        except (ValueError, OSError) as error:
            raise InputError(f"{path}: not an .npz file: {error}") from None
        if self._scores.shape != (num_users, num_items):
            raise InputError(
                f"{path}: scores have the shape {self._scores.shape}, expected [users, items] = "
                f"({num_users}, {num_items}), in the order of sequences.jsonl and catalog.jsonl"
            )
        if np.isnan(self._scores).any():
            raise InputError(f"{path}: {int(np.isnan(self._scores).sum())} scores are NaN")

    def scores(self, users: NDArray[np.int64], histories: Histories) -> Floats:
        """See `CFScorer`."""
        return self._scores[users]
