"""A trained SASRec as a scorer: rankings for evaluation, confidences for the reward of stage 3.

Raw scores are z = state . item embedding. A confidence in [0, 1] is one of

- `sigmoid`: sigmoid(z), the paper's;
- `calibrated`: sigmoid(a z + b), a and b fitted on validation so that it is the chance that a candidate is the target;
- `softmax`: softmax of z over the candidate list.

Each can be taken of debiased scores, z minus the item's mean z over users: 93 to 99 % of the variance of the
release's z is such item means, that is popularity (see REPRODUCTION.md).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from twice_rec.catalog import ItemCatalog
from twice_rec.cf.sasrec import SasRec, SasRecSettings
from twice_rec.errors import InputError
from twice_rec.files import atomic_path

ConfidenceKind = Literal["sigmoid", "calibrated", "softmax"]
Calibration = tuple[float, float]


class SasRecScorer:
    """Scores and confidences of one trained model.

    Args:
        model: in evaluation mode.
        item_mean: float32 [N + 1], every item's mean z over users; see `item_means`.
        calibration: (a, b) for raw and for debiased scores; see `fit_calibration`.
    """

    def __init__(
        self, model: SasRec, item_mean: Tensor | None = None, calibration: dict[str, Calibration] | None = None
    ):
        self.model = model.eval()
        self.item_mean = item_mean
        self.calibration = calibration or {}

    @torch.inference_mode()
    def states(self, histories: Sequence[Sequence[int]], batch_size: int = 1024) -> Tensor:
        """User states, float32 [B, D]."""
        parts = [
            self.model.user_states(histories[start : start + batch_size])
            for start in range(0, len(histories), batch_size)
        ]
        return torch.cat(parts)

    @torch.inference_mode()
    def scores(self, users: NDArray[np.int64], histories: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Z of the whole catalogue: float32 [B, N], column j for index j + 1. `users` is not used."""
        return (self.states(histories) @ self.model.item_embedding.weight[1:].T).cpu().numpy()

    @torch.inference_mode()
    def logits(self, histories: Sequence[Sequence[int]], items: NDArray[np.int64]) -> NDArray[np.float32]:
        """Z of some items for each history, in one forward pass over the different histories.

        Args:
            histories: B item index sequences; equal ones are computed once.
            items: int64 [B, C] item indices.

        Returns:
            float32 [B, C].
        """
        rows: dict[tuple[int, ...], int] = {}
        row_of = [rows.setdefault(tuple(history), len(rows)) for history in histories]
        states = self.states(list(rows))[torch.tensor(row_of)]
        embeddings = self.model.item_embedding.weight[torch.from_numpy(items).to(states.device)]
        return torch.einsum("bd,bcd->bc", states, embeddings).cpu().numpy()

    def confidences(
        self,
        histories: Sequence[Sequence[int]],
        candidates: NDArray[np.int64],
        kind: ConfidenceKind = "sigmoid",
        debiased: bool = False,
    ) -> NDArray[np.float32]:
        """How confident SASRec is in each candidate: float32 [B, C] in [0, 1], see the module's text.

        Raises:
            ValueError: where the model was saved without the item means or the calibration that this needs.
        """
        z = self.logits(histories, candidates)
        if debiased:
            if self.item_mean is None:
                raise ValueError("this SASRec was saved without item means; they are made by the sasrec stage")
            z = z - self.item_mean.cpu().numpy()[candidates]
        if kind == "softmax":
            e = np.exp(z - z.max(axis=1, keepdims=True))
            return (e / e.sum(axis=1, keepdims=True)).astype(np.float32)
        if kind == "calibrated":
            name = "debiased" if debiased else "raw"
            if name not in self.calibration:
                raise ValueError(f"this SASRec was saved without a calibration of {name} scores")
            a, b = self.calibration[name]
            z = a * z + b
        return (1 / (1 + np.exp(-z))).astype(np.float32)

    def save(self, path: Path, catalog: ItemCatalog) -> None:
        """Write one safetensors file: weights, item means, settings, calibration, the catalogue's fingerprint."""
        tensors = {f"model.{name}": tensor.contiguous() for name, tensor in self.model.state_dict().items()}
        if self.item_mean is not None:
            tensors["item_mean"] = self.item_mean
        metadata = {
            "settings": json.dumps(asdict(self.model.settings)),
            "calibration": json.dumps(self.calibration),
            "catalog": catalog.fingerprint,
        }
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata)

    @classmethod
    def load(cls, path: Path, catalog: ItemCatalog, device: str | torch.device = "cpu") -> SasRecScorer:
        """Read what `save` wrote.

        Raises:
            InputError: for a missing or damaged file, and for a model of another catalogue, naming both.
        """
        if not path.exists():
            raise InputError(f"{path}: no such file; train SASRec first (sasrec.sh)")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            settings = SasRecSettings(**json.loads(metadata["settings"]))
            calibration = {name: tuple(pair) for name, pair in json.loads(metadata["calibration"]).items()}
            trained_on = metadata["catalog"]
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: not a SASRec of this project ({error}); train it again (sasrec.sh)") from None
        if trained_on != catalog.fingerprint:
            raise InputError(
                f"{path} was trained on another catalogue: {settings.num_items} items with fingerprint "
                f"{trained_on[:12]}, but this run's catalogue has {len(catalog)} items with fingerprint "
                f"{catalog.fingerprint[:12]}; train SASRec on this run's data (sasrec.sh), or use the run_dir it "
                "belongs to"
            )
        with torch.random.fork_rng(devices=[]):
            model = SasRec(settings)
        item_mean = tensors.pop("item_mean", None)
        model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in tensors.items()})
        return cls(model.to(device), None if item_mean is None else item_mean.to(device), calibration)


def calibrated_scorer(
    model: SasRec, histories: Sequence[Sequence[int]], shown: NDArray[np.int64], targets: NDArray[np.int64]
) -> SasRecScorer:
    """A model with its item means over these users, and calibrations of raw and debiased scores on their candidates.

    Args:
        histories: the validation histories.
        shown: int64 [B, C], their candidates.
        targets: int64 [B].
    """
    means = item_means(SasRecScorer(model), histories)
    z = SasRecScorer(model).logits(histories, shown)
    is_target = (shown == targets[:, None]).ravel()
    calibration = {
        "raw": fit_calibration(z.ravel(), is_target),
        "debiased": fit_calibration((z - means.cpu().numpy()[shown]).ravel(), is_target),
    }
    return SasRecScorer(model, means, calibration)


@torch.inference_mode()
def item_means(scorer: SasRecScorer, histories: Sequence[Sequence[int]]) -> Tensor:
    """Mean z of every item over the users: float32 [N + 1]. z is linear in the state, so the mean state gives it."""
    return scorer.model.item_embedding.weight @ scorer.states(histories).mean(0)


@torch.inference_mode()
def item_only_share(scorer: SasRecScorer, histories: Sequence[Sequence[int]]) -> float:
    """Share of the variance of z over users and items that the item alone explains, in [0, 1].

    Var over items of (mean over users of z), divided by the variance of all z. Near 1, the model ranks the same items
    first for everybody. Computed from the second moments of states and embeddings, without the [users, items] matrix.
    """
    states = scorer.states(histories).double()
    items = scorer.model.item_embedding.weight[1:].double()
    mean = states.mean(0) @ items.mean(0)
    second_moment = torch.trace((states.T @ states) @ (items.T @ items)) / (len(states) * len(items))
    total = second_moment - mean**2
    by_item = (items @ states.mean(0)).var(correction=0)
    return float(by_item / total)


def fit_calibration(logits: NDArray[np.floating], is_target: NDArray[np.bool_], steps: int = 50) -> Calibration:
    """Platt scaling: a and b that maximise the likelihood of is_target under sigmoid(a z + b), by Newton's method.

    Args:
        logits: float [n].
        is_target: bool [n], both values must occur.
    """
    z, y = np.asarray(logits, dtype=np.float64), np.asarray(is_target, dtype=np.float64)
    if not 0 < y.sum() < y.size:
        raise ValueError("calibration needs targets and other items")
    scale = max(float(z.std()), 1e-12)
    design = np.stack([(z - z.mean()) / scale, np.ones_like(z)], axis=1)
    weights = np.array([0.0, np.log(y.mean() / (1 - y.mean()))])
    for _ in range(steps):
        p = 1 / (1 + np.exp(-design @ weights))
        gradient = design.T @ (p - y)
        hessian = (design * (p * (1 - p))[:, None]).T @ design + 1e-9 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        weights -= step
        if np.abs(step).max() < 1e-10:
            break
    a = weights[0] / scale
    return float(a), float(weights[1] - a * z.mean())


CONFIDENCES = ("sigmoid", "calibrated", "softmax")  # stand-in until the registry of the cf room is merged
