"""How far two judges agree: Cohen's kappa with quadratic weights, and its bootstrap interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from twice_rec.prompts import LEVELS
from twice_rec.random_streams import random_stream

Floats = NDArray[np.float64]
_APART = np.subtract.outer(np.arange(len(LEVELS)), np.arange(len(LEVELS))) ** 2.0  # [L, L], squared distances


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of two judges on the same n rows; without kappa if chance alone would make them agree wholly, or n is 0.

    Args:
        same: share of rows with equal scores.
    """

    n: int
    same: float | None
    kappa: float | None
    ci95: tuple[float, float] | None


def agreement(a: Sequence[int], b: Sequence[int], seed: int = 0, samples: int = 1000) -> Agreement:
    """Compare two judges' scores of the same rows, in the same order; the interval is over rows.

    Resamples in which kappa is not defined are left out of the interval.

    Raises:
        ValueError: if there are not as many of one as of the other.
    """
    if len(a) != len(b):
        raise ValueError(f"agreement needs the same rows on both sides, got {len(a)} and {len(b)}")
    n, size = len(a), len(LEVELS)
    if n == 0:
        return Agreement(0, None, None, None)
    codes = np.asarray(a, dtype=np.int64) * size + np.asarray(b, dtype=np.int64)  # [n]
    table = np.bincount(codes, minlength=size * size) / n  # [L * L], shares
    # Rows that are drawn with replacement fall into the cells of the table by these shares.
    drawn = random_stream(seed, "agreement of judges").multinomial(n, table, size=samples) / n  # [samples, L * L]
    (kappa,), resampled = _kappas(table[None]), _kappas(drawn)
    known = resampled[~np.isnan(resampled)]
    if np.isnan(kappa) or not len(known):
        return Agreement(n, float(np.trace(table.reshape(size, size))), None, None)
    low, high = np.quantile(known, [0.025, 0.975])
    return Agreement(n, float(np.trace(table.reshape(size, size))), float(kappa), (float(low), float(high)))


def _kappas(tables: Floats) -> Floats:
    """Return kappa of each table of shares, NaN if it is not defined: [S, L * L] -> [S]."""
    size = len(LEVELS)
    shares = tables.reshape(-1, size, size)  # [S, L, L], rows are the first judge's scores
    first, second = shares.sum(axis=2), shares.sum(axis=1)  # [S, L] each
    apart = (shares * _APART).sum(axis=(1, 2))  # [S], mean squared distance
    by_chance = np.einsum("si,ij,sj->s", first, _APART, second)  # [S], the same of independent judges
    return np.where(by_chance > 1e-12, 1 - apart / np.where(by_chance > 1e-12, by_chance, 1), np.nan)
