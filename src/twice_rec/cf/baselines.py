"""Models that need no gradient: random, popularity, item-kNN, EASE, and the scores of any model outside.

All score the whole catalogue for a user's history (`CFScorer`), so they meet the same lists and metrics as every
other model. They are fitted on training parts; the few settings of item-kNN and EASE are chosen on validation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, sparse

from twice_rec.errors import InputError

logger = logging.getLogger(__name__)

FloatMatrix = NDArray[np.floating]


class CFScorer(Protocol):
    """Anything that scores the catalogue for users."""

    def scores(self, users: NDArray[np.int64], histories: Sequence[Sequence[int]]) -> FloatMatrix:
        """Scores of all items.

        Args:
            users: int64 [B], positions in `sequences.jsonl`.
            histories: their item indices, 1..N, oldest first.

        Returns:
            float [B, N], column j for item index j + 1.
        """
        ...


class RandomScorer:
    """Uniform random scores, the same for a user whenever asked."""

    def __init__(self, num_items: int, seed: int):
        self._num_items = num_items
        self._seed = seed

    def scores(self, users: NDArray[np.int64], histories: Sequence[Sequence[int]]) -> FloatMatrix:
        """See `CFScorer`."""
        return np.stack([np.random.default_rng([self._seed, int(user)]).random(self._num_items) for user in users])


class PopularityScorer:
    """Number of training interactions of each item."""

    def __init__(self, training: Sequence[Sequence[int]], num_items: int):
        indices = [index for history in training for index in history]
        self._counts = np.bincount(indices, minlength=num_items + 1)[1:].astype(np.float64)

    def scores(self, users: NDArray[np.int64], histories: Sequence[Sequence[int]]) -> FloatMatrix:
        """See `CFScorer`."""
        return np.broadcast_to(self._counts, (len(histories), len(self._counts)))


class ItemSimilarityScorer:
    """Item-to-item weights summed over the history, the k-th most recent item weighted by decay ** (k - 1).

    Args:
        similarity: [N, N], from the history's item (row) to the scored item; sparse or dense.
        decay: 1 forgets nothing.
    """

    def __init__(self, similarity: sparse.csr_matrix | FloatMatrix, decay: float):
        self._similarity = similarity
        self._decay = decay

    def scores(self, users: NDArray[np.int64], histories: Sequence[Sequence[int]]) -> FloatMatrix:
        """See `CFScorer`."""
        summed = weighted_histories(histories, self._similarity.shape[0], self._decay) @ self._similarity
        return summed.toarray() if sparse.issparse(summed) else summed


def knn_similarity(interactions: sparse.csr_matrix, shrink: float) -> sparse.csr_matrix:
    """Cosine of co-occurrence with shrinkage: n_ij / (sqrt(n_i n_j) + shrink), 0 on the diagonal. Sparse [N, N]."""
    together = (interactions.T @ interactions).tocoo()
    counts = together.tocsr().diagonal()
    different = together.row != together.col
    row, column, value = together.row[different], together.col[different], together.data[different]
    return sparse.csr_matrix(
        (value / (np.sqrt(counts[row] * counts[column]) + shrink), (row, column)), shape=together.shape
    )


def ease_weights(interactions: sparse.csr_matrix, regularisation: float, max_bytes: float = 16e9) -> FloatMatrix:
    """EASE (Steck, 2019): the closed-form item-item regression with a zero diagonal. Dense float64 [N, N].

    Raises:
        InputError: where its dense matrix and the inverse would not fit into `max_bytes`.
    """
    num_items = interactions.shape[1]
    need = 2 * 8 * num_items**2
    if need > max_bytes:
        raise InputError(
            f"EASE inverts a dense matrix of {num_items:,} x {num_items:,} items, {need / 1e9:.0f} GB with its copy; "
            "leave ease out of baselines"
        )
    gram = (interactions.T @ interactions).toarray().astype(np.float64)
    gram[np.diag_indices(num_items)] += regularisation
    inverse = linalg.inv(gram, overwrite_a=True, check_finite=False)
    weights = inverse / -np.diag(inverse)
    np.fill_diagonal(weights, 0.0)
    return weights


class OutsideScorer:
    """Test scores of any other model, from an `.npz` with `scores` float [users, items] in the files' order.

    Raises:
        InputError: for a missing file, a missing array, another shape, or NaN.
    """

    def __init__(self, path: Path, num_users: int, num_items: int):
        if not path.exists():
            raise InputError(f"{path}: no such file; outside_scores expects an .npz with an array `scores`")
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

    def scores(self, users: NDArray[np.int64], histories: Sequence[Sequence[int]]) -> FloatMatrix:
        """See `CFScorer`."""
        return self._scores[users]


def interaction_matrix(histories: Sequence[Sequence[int]], num_items: int) -> sparse.csr_matrix:
    """0/1 matrix [users, items] of item index sequences, column j for index j + 1."""
    return weighted_histories(histories, num_items, 1.0)


def weighted_histories(histories: Sequence[Sequence[int]], num_items: int, decay: float) -> sparse.csr_matrix:
    """Sparse [B, N]: decay ** (number of later items) at each item of each history."""
    lengths = [len(history) for history in histories]
    rows = np.repeat(np.arange(len(histories)), lengths)
    columns = np.fromiter((index - 1 for history in histories for index in history), dtype=np.int64, count=sum(lengths))
    age = np.concatenate([np.arange(length - 1, -1, -1) for length in lengths]) if lengths else np.empty(0)
    return sparse.csr_matrix((decay**age, (rows, columns)), shape=(len(histories), num_items))


DECAYS = (1.0, 0.9, 0.8)
SHRINKS = (0.0, 20.0, 60.0)
REGULARISATIONS = (100.0, 300.0, 1000.0)


def choose_item_similarity(
    kind: str, interactions: sparse.csr_matrix, validate: Callable[[CFScorer], float]
) -> tuple[ItemSimilarityScorer, dict[str, float], float]:
    """Fit item-kNN or EASE with each of its settings and keep the best on validation; the earlier one wins a tie.

    Args:
        kind: `itemknn` or `ease`.
        interactions: training 0/1 matrix [users, N].
        validate: larger is better.

    Returns:
        The model, its settings, and its validation value.
    """
    fit, name, values = (knn_similarity, "shrink", SHRINKS) if kind == "itemknn" else (
        ease_weights, "regularisation", REGULARISATIONS
    )  # fmt: skip
    best: tuple[ItemSimilarityScorer, dict[str, float], float] | None = None
    for value in values:
        similarity = fit(interactions, value)
        for decay in DECAYS:
            model = ItemSimilarityScorer(similarity, decay)
            reached = validate(model)
            logger.info("  %s with %s %g, decay %g: validation %.4f", kind, name, value, decay, reached)
            if best is None or reached > best[2]:
                best = (model, {name: value, "decay": decay}, reached)
    assert best is not None
    return best


def fit_baseline(
    kind: str, training: Sequence[Sequence[int]], num_items: int, seed: int, validate: Callable[[CFScorer], float]
) -> CFScorer:
    """One of `config.Baseline`, fitted on training histories; `validate` and `seed` are used where it needs them."""
    if kind == "random":
        return RandomScorer(num_items, seed)
    if kind == "popularity":
        return PopularityScorer(training, num_items)
    model, chosen, reached = choose_item_similarity(kind, interaction_matrix(training, num_items), validate)
    logger.info("%s: %s chosen, validation %.4f", kind, chosen, reached)
    return model


BASELINES = ("random", "popularity", "itemknn", "ease")  # stand-in until the registry of the cf room is merged
