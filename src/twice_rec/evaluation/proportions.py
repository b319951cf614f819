"""Click rates of an A/B test: intervals, the test of two proportions, and what peeking at it costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from twice_rec.random_streams import random_stream

_Z = 1.959963984540054  # of a two-sided test at 5 %, and of a 95 % interval


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two arms: rate of a less rate of b, its 95 % interval, z and the two-sided p-value."""

    difference: float
    ci95: tuple[float, float]
    z: float
    p: float


def wilson(clicks: int, impressions: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a rate (1927): it stays within 0 and 1, also at 0 clicks.

    Raises:
        ValueError: without impressions, or for clicks that are not 0 to all of them.
    """
    if impressions < 1 or not 0 <= clicks <= impressions:
        raise ValueError(f"{clicks} clicks of {impressions} impressions")
    rate, share = clicks / impressions, _Z**2 / impressions
    middle = (rate + share / 2) / (1 + share)
    half = _Z * math.sqrt(rate * (1 - rate) / impressions + share / impressions / 4) / (1 + share)
    return max(0.0, middle - half), min(1.0, middle + half)


def two_proportions(clicks_a: int, impressions_a: int, clicks_b: int, impressions_b: int) -> Comparison:
    """Compare two rates: z of the pooled test, and Newcombe's interval of the difference, made of Wilson's (1998)."""
    a, b = clicks_a / impressions_a, clicks_b / impressions_b
    (low_a, high_a), (low_b, high_b) = wilson(clicks_a, impressions_a), wilson(clicks_b, impressions_b)
    low = a - b - math.hypot(a - low_a, high_b - b)
    high = a - b + math.hypot(high_a - a, b - low_b)
    z = float(z_scores(clicks_a, impressions_a, clicks_b, impressions_b))
    return Comparison(a - b, (low, high), z, math.erfc(abs(z) / math.sqrt(2)))


def z_scores(
    clicks_a: ArrayLike, impressions_a: ArrayLike, clicks_b: ArrayLike, impressions_b: ArrayLike
) -> NDArray[np.float64]:
    """Return z of the pooled two-proportion test, for numbers or arrays; 0 if nobody or everybody clicked."""
    x, n, y, m = (np.asarray(one, dtype=np.float64) for one in (clicks_a, impressions_a, clicks_b, impressions_b))
    pooled = (x + y) / (n + m)
    error = np.sqrt(pooled * (1 - pooled) * (1 / n + 1 / m))
    return np.divide(x / n - y / m, error, out=np.zeros_like(error), where=error > 0)


def false_alarms(
    impressions_a: int, impressions_b: int, rate: float, looks: int, tests: int, seed: int
) -> tuple[float, float]:
    """Simulate A/A tests, whose arms have the same click rate, and return the shares that p < .05 calls different.

    The first is that of tests which are judged once, at their end; the second that of tests which are judged after each
    of `looks` equal parts of their traffic and end when p is below .05. Both should be .05, but only the first is.
    """
    rng = random_stream(seed, "A/A tests", impressions_a, impressions_b, looks)
    seen = np.ceil(np.outer(np.arange(1, looks + 1) / looks, [impressions_a, impressions_b])).astype(np.int64)  # [L, 2]
    parts = np.diff(seen, axis=0, prepend=0)  # [L, 2], impressions between two looks
    clicks = rng.binomial(parts, rate, size=(tests, *parts.shape)).cumsum(axis=1)  # [tests, L, 2]
    z = z_scores(clicks[..., 0], seen[:, 0], clicks[..., 1], seen[:, 1])  # [tests, L]
    alarms = np.abs(z) > _Z
    return float(alarms[:, -1].mean()), float(alarms.any(axis=1).mean())
