"""Confidences: scores of a CF model as numbers in [0, 1], for the reward of stage 3.

Let z be a model's score of an item for a user; for SASRec it is the user's state times the item's embedding.
`CONFIDENCES` names the ways from z to a confidence. Each can take debiased scores instead: z minus the item's mean z
over users. 93 to 99 % of the variance of the release's z is such item means, that is popularity (see REPRODUCTION.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from twice_rec.cf.held_out import NOTHING, HeldOut
from twice_rec.item_sequences import ItemSequences

Floats = NDArray[np.floating]
Histories = Sequence[Sequence[int]] | ItemSequences  # item indices 1..N, oldest first
Calibration = tuple[float, float]


def sigmoid(z: Floats) -> Floats:
    """Return the sigmoid of z, the paper's confidence."""
    return 1 / (1 + np.exp(-z))


def softmax(z: Floats) -> Floats:
    """Return the softmax of z over the candidate list."""
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


# Name in recipes -> the function from z, float [B, C], to confidences [B, C]. `calibrated` takes a z + b instead of z:
# the chance that a candidate is the target, as fitted on validation.
CONFIDENCES: Mapping[str, Callable[[Floats], Floats]] = {"sigmoid": sigmoid, "calibrated": sigmoid, "softmax": softmax}


class ConfidenceModel(ABC):
    """A CF model that judges recommended items.

    Attributes:
        item_mean: float32 [N + 1], the mean z of each item over users; None before `calibrate`.
        calibration: `raw` and `debiased` -> the (a, b) with which such scores are `calibrated`.
        held_out: which targets of stage 3's prompts it was not trained on.
    """

    item_mean: NDArray[np.float32] | None = None
    calibration: Mapping[str, Calibration] = MappingProxyType({})
    held_out: HeldOut = NOTHING

    @abstractmethod
    def logits(self, histories: Histories, items: NDArray[np.integer]) -> NDArray[np.float32]:
        """Return z of some items per history: B histories and item indices [B, C] -> float32 [B, C]."""

    @abstractmethod
    def item_means(self, histories: Histories) -> NDArray[np.float32]:
        """Return the mean z of each item over the histories: float32 [N + 1], the first one for padding."""

    def confidences(
        self, histories: Histories, candidates: NDArray[np.integer], kind: str = "sigmoid", debiased: bool = False
    ) -> NDArray[np.float32]:
        """Return the confidence in each candidate: B histories and item indices [B, C] -> float32 [B, C] in [0, 1].

        Args:
            kind: name in `CONFIDENCES`.
            debiased: subtract each item's mean z first.

        Raises:
            ValueError: if the model lacks the item means or the calibration that this needs.
        """
        z = self.logits(histories, candidates)  # [B, C]
        if debiased:
            if self.item_mean is None:
                raise ValueError("this CF model has no item means; call `calibrate` before saving it")
            z = z - self.item_mean[candidates]
        if kind == "calibrated":
            scores = "debiased" if debiased else "raw"
            if scores not in self.calibration:
                raise ValueError("this CF model has no calibration of these scores; call `calibrate` before saving it")
            a, b = self.calibration[scores]
            z = a * z + b
        return CONFIDENCES[kind](z).astype(np.float32)

    def scaled_logits(self, histories: Histories, items: NDArray[np.integer]) -> NDArray[np.float32]:
        """Return z times the scale of its calibration: as `logits`; their softmax is a distribution over candidates."""
        scale, _ = self.calibration["raw"]
        return (scale * self.logits(histories, items)).astype(np.float32)

    def calibrate(self, histories: Histories, shown: NDArray[np.integer], targets: NDArray[np.integer]) -> None:
        """Fit item means over B validation users, and calibrations of raw and debiased scores on their candidates.

        A model that scores an item alike for all users gets no calibration of debiased scores: all of them are 0.
        `shown` is int [B, C], `targets` int [B].
        """
        self.item_mean = self.item_means(histories)
        z = self.logits(histories, shown)  # [B, C]
        debiased = z - self.item_mean[shown]  # [B, C]
        is_target = (shown == targets[:, None]).ravel()  # [B * C]
        self.calibration = {"raw": fit_calibration(z.ravel(), is_target)}
        if debiased.std() > 1e-6 * z.std():
            self.calibration["debiased"] = fit_calibration(debiased.ravel(), is_target)


def fit_calibration(logits: Floats, is_target: NDArray[np.bool_], steps: int = 50) -> Calibration:
    """Fit a and b that maximise the likelihood of `is_target` under sigmoid(a z + b) (Platt scaling, Newton's method).

    Raises:
        ValueError: if `is_target` is the same everywhere.
    """
    z, y = np.asarray(logits, dtype=np.float64), np.asarray(is_target, dtype=np.float64)  # [n], [n]
    if not 0 < y.sum() < y.size:
        raise ValueError(f"calibration needs targets and other items, got {y.sum():.0f} targets among {y.size} items")
    scale = max(float(z.std()), 1e-12)
    design = np.stack([(z - z.mean()) / scale, np.ones_like(z)], axis=1)  # [n, 2]
    weights = np.array([0.0, np.log(y.mean() / (1 - y.mean()))])
    for _ in range(steps):
        p = 1 / (1 + np.exp(-design @ weights))  # [n]
        hessian = (design * (p * (1 - p))[:, None]).T @ design + 1e-9 * np.eye(2)
        step = np.linalg.solve(hessian, design.T @ (p - y))
        weights -= step
        if np.abs(step).max() < 1e-10:
            break
    a = weights[0] / scale
    return float(a), float(weights[1] - a * z.mean())
