"""Models that need no gradient: random, popularity, item-kNN, EASE, and precomputed scores of any other model.

All score the whole catalogue for a user's history (`CFScorer`), so they are ranked on the same lists, with the same
metrics, as every other model. They are fitted on training parts; the few settings of item-kNN and EASE are chosen on
validation.

To add one, write a class here that takes `TrainingData` and has `scores`, and register it with `@baseline`: recipes,
tables and stage 3's `cf_model` take its name from `BASELINES`. If its memory grows faster than the data, register
`memory` too: if it does not fit, it is then refused before any work.
"""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import psutil
from numpy.typing import NDArray
from scipy import linalg, sparse

from twice_rec.cf.confidence import Floats, Histories
from twice_rec.errors import InputError
from twice_rec.item_sequences import ItemSequences
from twice_rec.random_streams import random_stream

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)


class CFScorer(Protocol):
    """Anything that scores the catalogue for users."""

    def scores(self, users: NDArray[np.int64], histories: Histories) -> Floats | Tensor:
        """Return the scores of all items: float [B, N], column j for item index j + 1; SASRec's stay on its device.

        `users` is int64 [B], a number per user: in evaluation the position in `sequences.jsonl`.
        """


@dataclass(frozen=True)
class TrainingData:
    """What a baseline is fitted on."""

    histories: Histories  # item indices of each user's training part
    num_items: int  # N
    seed: int
    validate: Callable[[CFScorer], float]  # measures a model on validation; larger is better


Memory = Callable[[ItemSequences, int], float]  # training parts, number of items -> bytes
BASELINES: dict[str, Callable[[TrainingData], CFScorer]] = {}  # name in recipes -> class, in the order of tables
MEMORY: dict[str, Memory] = {}  # what fitting some of them takes
Fit = TypeVar("Fit", bound=Callable[[TrainingData], CFScorer])


def baseline(name: str, memory: Memory | None = None) -> Callable[[Fit], Fit]:
    """Register a class, or a function that makes one, in `BASELINES`, and what fitting it takes in `MEMORY`."""

    def register(fit: Fit) -> Fit:
        BASELINES[name] = fit
        if memory is not None:
            MEMORY[name] = memory
        return fit

    return register


def fits(name: str, histories: ItemSequences, num_items: int) -> bool:
    """Return whether the memory that is free now suffices to fit a baseline."""
    return name not in MEMORY or MEMORY[name](histories, num_items) <= psutil.virtual_memory().available


def require_memory(names: Iterable[str], histories: ItemSequences, num_items: int) -> None:
    """Raise an InputError if a baseline does not fit into the memory that is free now."""
    for name in names:
        if not fits(name, histories, num_items):
            needed, free = MEMORY[name](histories, num_items), psutil.virtual_memory().available
            raise InputError(
                f"{name} would take {needed / 1e9:,.1f} GB for {num_items:,} items and {len(histories):,} users, and "
                f"{free / 1e9:,.1f} GB are free; leave {name} out of baselines, or choose another cf_model"
            )


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
        _, items = ItemSequences.of(training.histories).flat()
        self._counts = np.bincount(items, minlength=training.num_items + 1)[1:].astype(np.float64)  # [N]

    def scores(self, users: NDArray[np.int64], histories: Histories) -> Floats:
        """See `CFScorer`."""
        return np.tile(self._counts, (len(histories), 1))


def interaction_matrix(histories: Histories, num_items: int, decay: float = 1.0) -> sparse.csr_matrix:
    """Return a sparse [B, N], column j for item index j + 1, with decay ** (number of later items) at each item."""
    sequences = ItemSequences.of(histories)
    rows, items = sequences.flat()  # [T], [T]
    age = sequences.lengths.cumsum()[rows] - 1 - np.arange(len(rows))  # [T]
    return sparse.csr_matrix((decay**age, (rows, items - 1)), shape=(len(sequences), num_items))


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


def knn_memory(histories: ItemSequences, num_items: int) -> float:
    """Return about how many bytes item-kNN takes: 56 per pair of items that a user has both of."""
    pairs = float((histories.lengths.astype(np.float64) ** 2).sum())
    return 56 * min(pairs, float(num_items) ** 2)


@baseline("itemknn", knn_memory)
def item_knn(training: TrainingData) -> ItemSimilarityScorer:
    """Fit item-kNN with the shrinkage and decay that are best on validation."""
    return choose_similarity(training, knn_similarity, "itemknn with shrink", (0.0, 20.0, 60.0))


def ease_weights(interactions: sparse.csr_matrix, regularisation: float) -> Floats:
    """Return EASE (Steck, 2019), the item-item regression with a zero diagonal in closed form.

    Sparse 0/1 [users, N] -> dense float64 [N, N].
    """
    gram = (interactions.T @ interactions).toarray().astype(np.float64)  # [N, N]
    gram[np.diag_indices(len(gram))] += regularisation
    inverse = linalg.inv(gram, overwrite_a=True, check_finite=False)  # [N, N]
    weights = inverse / -np.diag(inverse)
    np.fill_diagonal(weights, 0.0)
    return weights


def ease_memory(histories: ItemSequences, num_items: int) -> float:
    """Return about how many bytes EASE takes: a dense matrix, its inverse, and the weights kept so far."""
    return 3 * 8 * float(num_items) ** 2


@baseline("ease", ease_memory)
def ease(training: TrainingData) -> ItemSimilarityScorer:
    """Fit EASE with the regularisation and decay that are best on validation."""
    return choose_similarity(training, ease_weights, "ease with regularisation", (100.0, 300.0, 1000.0))


class PrecomputedScorer:
    """Test scores of any other model, from an `.npz` in the files' order of users.

    It holds `scores`, float [users, items], or of each user's best items only: `items`, int [users, top], indices from
    1, and `scores`, float [users, top]. Items that are not among them score below all others.

    Raises:
        InputError: for a missing file, a missing array, another shape, an unknown item, or NaN.
    """

    def __init__(self, path: Path, num_users: int, num_items: int):
        if not path.exists():
            raise InputError(f"{path}: no such file; precomputed scores are an .npz with an array `scores`")
        try:
            with np.load(path, allow_pickle=False) as file:
                if "scores" not in file:
                    raise InputError(f"{path}: no array `scores`; it holds {', '.join(file.files) or 'nothing'}")
                self._scores = file["scores"]
                self._items = file.get("items")  # [users, top]
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            raise InputError(f"{path}: not an .npz file: {error}") from None
        self._num_items = num_items
        expected = (num_users, num_items) if self._items is None else (num_users, *self._items.shape[1:])
        if self._scores.shape != expected or (self._items is not None and self._items.shape != expected):
            raise InputError(
                f"{path}: scores have the shape {self._scores.shape}, expected [users, items] = "
                f"({num_users}, {num_items}), in the order of sequences.jsonl and catalog.jsonl; or [users, top] and "
                "an array `items` of that shape"
            )
        if self._items is not None and not (self._items.min() >= 0 and self._items.max() <= num_items):
            raise InputError(f"{path}: items are {self._items.min()} to {self._items.max()} of {num_items}")
        if np.isnan(self._scores).any():
            raise InputError(f"{path}: {int(np.isnan(self._scores).sum())} scores are NaN")

    def scores(self, users: NDArray[np.int64], histories: Histories) -> Floats:
        """See `CFScorer`."""
        if self._items is None:
            return self._scores[users]
        scores = np.full((len(users), self._num_items + 1), -np.inf)  # [B, N + 1]
        np.put_along_axis(scores, self._items[users].astype(np.int64), self._scores[users], axis=1)
        return scores[:, 1:]
