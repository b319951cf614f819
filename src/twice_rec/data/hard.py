"""Item-kNN scores of many users at once, and the pools of items with the highest ones; all of it sparse."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from twice_rec.data.sequences import SequenceTable
from twice_rec.random_streams import RandomStreams

Ints = NDArray[np.int64]


def training_matrix(table: SequenceTable, num_items: int) -> sparse.csr_matrix:
    """Return which items each user's training part has: 0/1, float64 [U, N], column j for index j + 1."""
    rows, columns = table.user[table.is_training], table.item[table.is_training] - 1
    whole = sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(table), num_items))
    whole.data[:] = 1.0  # repeated interactions were summed
    return whole


@dataclass(frozen=True)
class SimilarItems:
    """Item-to-item weights summed over the history, the k-th most recent item weighted by decay ** (k - 1)."""

    similarity: sparse.csr_matrix  # [N, N], from the history's item (row) to the scored item; without negative values
    decay: float

    def scores(self, table: SequenceTable, users: Ints, ends: Ints) -> sparse.csr_matrix:
        """Return the scores of the catalogue: sparse [B, N], column j for index j + 1.

        Args:
            users: [B], positions in the table.
            ends: [B], where among all interactions the history of each user ends.
        """
        begins = table.begins[:-1][users]
        lengths = ends - begins  # [B]
        bounds = np.r_[0, np.cumsum(lengths)]  # [B + 1]
        rows = np.repeat(np.arange(len(users)), lengths)
        at = np.arange(bounds[-1]) - bounds[rows] + begins[rows]  # [history items], among all interactions
        weights = self.decay ** (ends[rows] - 1 - at).astype(np.float64)
        shape = (len(users), self.similarity.shape[0])
        return sparse.csr_matrix((weights, table.item[at] - 1, bounds), shape=shape) @ self.similarity


@dataclass(frozen=True)
class Pools:
    """The items with the highest scores per user: P places, as many of them used as the user's pool is large."""

    items: Ints  # [B, P], index; 0 for one of the items without a score, which are all tied
    tied: NDArray[np.bool_]  # [B, P], whether the item entered the pool by a draw among equal scores
    scored: list[Ints]  # [B] lists of the items that have a score, if those do not fill the pool; else empty


def hard_pools(scores: sparse.csr_matrix, begins: Ints, own: Ints, sizes: Ints, streams: RandomStreams) -> Pools:
    """Return the pools of B users.

    Args:
        scores: [B, N].
        begins: [B + 1], where in `own` the items of each user begin, which are in no pool.
        sizes: [B], of the pools; no more than there are items left.
        streams: [B], by which equal scores are told apart.
    """
    items = np.zeros((len(sizes), max(1, int(sizes.max()))), dtype=np.int64)
    tied = np.zeros(items.shape, dtype=bool)
    scored = [np.empty(0, dtype=np.int64)] * len(sizes)
    rows = zip(sizes.tolist(), begins.tolist(), begins[1:].tolist(), scores.indptr.tolist(), strict=False)
    for row, (size, begin, end, first) in enumerate(rows):
        mine, last = own[begin:end], scores.indptr[row + 1]
        values, indices = scores.data[first:last], scores.indices[first:last]
        if (rest := len(values) - size - len(mine)) > 0:  # what is too low even if all own items are higher
            high = np.flatnonzero(values >= np.partition(values, rest)[rest])
            values, indices = values[high], indices[high]
        indices = indices + np.int64(1)
        free = (values > 0) & ~_among(indices, mine)
        values, indices = values[free], indices[free]  # [F]
        if (rest := len(values) - size) < 0:
            scored[row] = indices
            items[row, : len(indices)] = indices
            without = scores.shape[1] - len(mine) - len(indices)
            tied[row, len(indices) : size] = without > -rest
            continue
        lowest = np.partition(values, rest)[rest]  # in the pool
        best, edge = indices[values > lowest], indices[values == lowest]
        if len(best) + len(edge) > size:
            numbers = streams.take(np.array([row])).random_at(edge)[0]  # [E]
            edge = edge[np.argsort(numbers)[: size - len(best)]]
            tied[row, len(best) : size] = True
        items[row, : len(best)], items[row, len(best) : size] = best, edge
    return Pools(items, tied, scored)


def _among(items: Ints, few: Ints) -> NDArray[np.bool_]:
    """Return whether items are among some ascending ones, of which there is at least one: bool [F]."""
    return few[np.minimum(np.searchsorted(few, items), len(few) - 1)] == items
