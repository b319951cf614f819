"""Ranking metrics from ranks, the bootstrap, and Holm's correction.

Everything here takes ranks, so a hit means the same for a CF model, an LLM's votes and likelihoods. Rank 1 is best.
Ties count against the target. Every user counts: nothing is dropped, capped or averaged twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from twice_rec.random_streams import random_stream

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

# What every evaluation reports, in the order of the tables.
METRICS: tuple[str, ...] = ("hr@1", "hr@5", "hr@10", "ndcg@5", "ndcg@10", "mrr")


def ranks_from_scores(scores: ArrayLike, target: ArrayLike) -> IntArray:
    """Return the rank of each row's target, int64 [B]: the number of columns that score at least as high as it.

    So 1 is best, and a target tied with m others ranks behind all m of them.

    Args:
        scores: float [B, C]; `-inf` marks columns that must not be recommended.
        target: int [B], the column of each row's target.

    Raises:
        ValueError: if a score is NaN, which would compare as if it were low.
    """
    matrix, columns = np.asarray(scores), np.asarray(target)  # [B, C], [B]
    if matrix.ndim != 2 or columns.shape != (matrix.shape[0],):
        raise ValueError(f"scores {matrix.shape} and target {columns.shape} are not [B, C] and [B]")
    if np.isnan(matrix).any():
        raise ValueError(f"{int(np.isnan(matrix).sum())} of {matrix.size} scores are NaN")
    of_target = matrix[np.arange(len(columns)), columns]  # [B]
    return (matrix >= of_target[:, None]).sum(axis=1).astype(np.int64)


def hit_rate(ranks: ArrayLike, k: int) -> FloatArray:
    """Return HR@k per user, float64 [B]: 1 if the target is among the first k, else 0."""
    return (np.asarray(ranks) <= k).astype(np.float64)


def ndcg(ranks: ArrayLike, k: int) -> FloatArray:
    """Return NDCG@k per user with one relevant item, float64 [B]: 1 / log2(1 + rank) within the first k, else 0."""
    r = np.asarray(ranks, dtype=np.float64)
    return np.where(r <= k, 1.0 / np.log2(1.0 + r), 0.0)


def reciprocal_rank(ranks: ArrayLike) -> FloatArray:
    """Return 1 / rank per user, float64 [B]; its mean is MRR."""
    return 1.0 / np.asarray(ranks, dtype=np.float64)


_WITH_CUTOFF: Mapping[str, Callable[[ArrayLike, int], FloatArray]] = {"hr": hit_rate, "ndcg": ndcg}


def per_user(name: str, ranks: ArrayLike) -> FloatArray:
    """Return the named metric of each user, float64 [B]; `name` is `hr@k`, `ndcg@k` or `mrr`.

    Raises:
        ValueError: for another name, or a rank below 1.
    """
    r = np.asarray(ranks)
    if r.size and r.min() < 1:
        raise ValueError(f"ranks start at 1, found {r.min()}")
    if name == "mrr":
        return reciprocal_rank(r)
    metric, _, cutoff = name.partition("@")
    if metric not in _WITH_CUTOFF or not cutoff.isdigit() or int(cutoff) < 1:
        raise ValueError(f"unknown metric {name!r}; there are mrr, hr@k and ndcg@k with k of at least 1")
    return _WITH_CUTOFF[metric](r, int(cutoff))


def summarise(ranks: ArrayLike, names: Sequence[str] = METRICS) -> dict[str, float]:
    """Return the named metrics' means over users; ValueError if there is no user."""
    if np.asarray(ranks).size == 0:
        raise ValueError("no user to average over")
    return {name: float(per_user(name, ranks).mean()) for name in names}


@dataclass(frozen=True, slots=True)
class Difference:
    """A paired comparison: mean of a - b, its 95 % interval, and the two-sided bootstrap p-value."""

    difference: float
    ci95: tuple[float, float]
    p: float


def _bootstrap_means(values: FloatArray, samples: int, seed: int) -> FloatArray:
    """Resample the users with replacement and return the means: [n, M] -> [samples, M].

    All M columns see the same resamples, as counts of how often each user was drawn.
    """
    n = len(values)
    if values.ndim != 2 or n == 0:
        raise ValueError(f"the bootstrap takes one row per user, got an array of shape {values.shape}")
    rng = random_stream(seed, "bootstrap")
    means = np.empty((samples, values.shape[1]))  # [samples, M]
    chunk = max(1, 2_000_000 // n)  # bounds the memory of the counts
    for start in range(0, samples, chunk):
        rows = min(chunk, samples - start)
        drawn = rng.integers(0, n, size=(rows, n)) + n * np.arange(rows)[:, None]  # [rows, n], row r from n * r on
        counts = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
        means[start : start + rows] = counts @ values / n
    return means


def bootstrap_intervals(values: ArrayLike, samples: int = 1000, seed: int = 0) -> FloatArray:
    """Return 95 % percentile intervals of the means over users: float [n, M] -> float64 [M, 2], low and high."""
    means = _bootstrap_means(np.asarray(values, dtype=np.float64), samples, seed)
    return np.quantile(means, [0.025, 0.975], axis=0).T


def paired_bootstrap(a: ArrayLike, b: ArrayLike, samples: int = 1000, seed: int = 0) -> Difference:
    """Compare two models on the same users, resampling users.

    Args:
        a, b: float [n], one value per user, in the same order.
    """
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if left.shape != right.shape:
        raise ValueError(f"a paired comparison needs the same users on both sides, got {left.shape} and {right.shape}")
    means = _bootstrap_means((left - right)[:, None], samples, seed)[:, 0]
    low, high = np.quantile(means, [0.025, 0.975])
    tail = min(int((means <= 0).sum()), int((means >= 0).sum()))
    p = min(1.0, 2 * (tail + 1) / (samples + 1))
    return Difference(float((left - right).mean()), (float(low), float(high)), p)


def holm(p: ArrayLike) -> FloatArray:
    """Return the p-values of several comparisons, corrected for their number by Holm's method: float64 [m].

    The smallest is multiplied by m, the next by m - 1, and so on; each is at least the one before, and at most 1.

    Raises:
        ValueError: if one is not in [0, 1].
    """
    values = np.asarray(p, dtype=np.float64)  # [m]
    if values.ndim != 1 or not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"expected p-values in [0, 1], got {values.tolist()}")
    order = np.argsort(values, kind="stable")
    times = np.arange(len(values), 0, -1)  # m, m - 1, ..., 1
    adjusted = np.empty(len(values))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(values[order] * times))
    return adjusted
