"""How well the CF model's confidence says what happens: before and after calibration, on test candidates.

Calibration is fitted on validation (`cf.confidence`), so the test candidates were not seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from twice_rec.cf.confidence import ConfidenceModel
from twice_rec.data.dataset import PreparedData
from twice_rec.random_streams import random_stream

BINS = 10


@dataclass(frozen=True)
class Reliability:
    """Candidates in bins of their confidence, and how far confidences and shares of targets are apart."""

    confidence: NDArray[np.float64]  # [bins], the mean in each bin
    share: NDArray[np.float64]  # [bins], of the candidates that are the target
    count: NDArray[np.int64]  # [bins]
    error: float  # mean distance of confidence and share, weighted by count


@dataclass(frozen=True)
class Calibration:
    """The confidences of a CF model, as the paper has them and as calibrated."""

    model: str
    before: Reliability
    after: Reliability
    users: int
    kind: str  # of the lists


def calibration_of(
    model: ConfidenceModel, name: str, data: PreparedData, debiased: bool, seed: int, max_users: int = 2000
) -> Calibration:
    """Return the reliability of sigmoid and calibrated confidences in the candidates of some test users.

    Raises:
        ValueError: if the model has no calibration of these scores.
    """
    kind = data.list_kinds("test")[0]
    asked = data.questions("test", [kind])
    drawn = random_stream(seed, "users of the calibration figure").permutation(len(asked.users))[:max_users]
    asked = asked.take(np.sort(drawn))
    shown = asked.candidates[kind].astype(np.int64)  # [U, C]
    is_target = shown == asked.targets[:, None]  # [U, C]

    def of(confidence: str) -> Reliability:
        return reliability(model.confidences(asked.histories, shown, confidence, debiased), is_target)

    return Calibration(name, of("sigmoid"), of("calibrated"), len(asked.users), kind)


def reliability(confidences: NDArray[np.floating], is_target: NDArray[np.bool_]) -> Reliability:
    """Sort candidates into bins of equal width by confidence; empty bins are left out."""
    values, hits = confidences.ravel().astype(np.float64), is_target.ravel()  # [n], [n]
    bins = np.minimum((values * BINS).astype(np.int64), BINS - 1)  # [n]
    count = np.bincount(bins, minlength=BINS)
    kept = count > 0
    mean = np.bincount(bins, weights=values, minlength=BINS)[kept] / count[kept]
    share = np.bincount(bins, weights=hits, minlength=BINS)[kept] / count[kept]
    error = float((np.abs(mean - share) * count[kept]).sum() / len(values))
    return Reliability(mean, share, count[kept], error)
