"""The metrics of a model for its card, with intervals, beside those of the run's other models on the same users."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from twice_rec.errors import InputError
from twice_rec.evaluation.equals import Terms, difference, fresh_evaluations
from twice_rec.evaluation.predictions import PREDICTIONS
from twice_rec.files import read_records
from twice_rec.manifest import Manifest
from twice_rec.metrics import METRICS, bootstrap_intervals, per_user
from twice_rec.records import RANKED_LISTS, Prediction

Ranks = Mapping[str, Mapping[str, Sequence[int]]]  # kind of list -> user -> ranks, one per training
Summary = dict[str, dict[str, Any]]  # metric key -> value, ci95


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation of the model: `asked` says how, `others` has the same users' metrics of other models."""

    name: str
    asked: Mapping[str, Any]
    users: int
    metrics: Summary
    others: Mapping[str, Summary]

    def as_row(self) -> dict[str, Any]:
        """Return it for a file of JSON."""
        return {
            "asked": dict(self.asked), "n": self.users, "metrics": self.metrics, "others": dict(self.others),
        }  # fmt: skip


def evaluations_of(run_dir: Path, folder: str) -> tuple[list[Path], list[Path], list[str]]:
    """Return the fresh evaluations of the model in `folder`/merged, those of others, and lines about what is left out.

    They are told apart by what they read, so that every way of asking the model counts, whatever its name.
    """
    try:
        found, lines = fresh_evaluations(run_dir)
    except InputError:  # nothing was evaluated yet
        return [], [], []
    manifests = {path: Manifest.load(path) for path in found}
    own = [path for path, manifest in manifests.items() if manifest and f"{folder}/merged" in manifest.inputs]
    return own, [path for path in found if path not in own], lines


def scored(own: Sequence[Path], others: Sequence[Path], samples: int, seed: int) -> list[Evaluation]:
    """Return the metrics of each evaluation; other models count if they were asked alike about all of its users."""
    ranks = {path: ranks_of(read_records(path / PREDICTIONS, Prediction)) for path in (*own, *others)}
    found = []
    for path in own:
        terms, users = Terms.of(path), _users(ranks[path])
        alike = [
            other for other in others
            if difference(terms, Terms.of(other)) is None and set(users) <= set(_users(ranks[other]))
        ]  # fmt: skip
        others_of = {other.name: summary(ranks[other], users, list(ranks[path]), samples, seed) for other in alike}
        own_of = summary(ranks[path], users, list(ranks[path]), samples, seed)
        found.append(Evaluation(path.name, terms.asked, len(users), own_of, others_of))
    return found


def ranks_of(predictions: Iterable[Prediction]) -> Ranks:
    """Return the ranks of predictions, by kind of list and user."""
    ranks: dict[str, dict[str, list[int]]] = {}
    for prediction in predictions:
        for kind, rank in prediction.ranks.items():
            ranks.setdefault(kind, {}).setdefault(prediction.user_id, []).append(rank)
    return {kind: ranks[kind] for kind in RANKED_LISTS if kind in ranks}


def summary(ranks: Ranks, users: Sequence[str], kinds: Sequence[str], samples: int, seed: int) -> Summary:
    """Return means over users and their 95 % bootstrap intervals; a user counts once, by the mean of its trainings."""
    keys, columns = [], []
    for kind in kinds:
        if any(user not in ranks.get(kind, {}) for user in users):
            continue
        of_users = [ranks[kind][user] for user in users]
        counts = [len(of_user) for of_user in of_users]
        rows = np.repeat(np.arange(len(users)), counts)  # [users and trainings]
        flat = np.concatenate(of_users)  # [users and trainings]
        keys += [f"{kind}/{name}" for name in METRICS]
        columns += [np.bincount(rows, weights=per_user(name, flat)) / counts for name in METRICS]  # [users] each
    if not columns:
        return {}
    values = np.stack(columns, axis=1)  # [users, metrics]
    intervals = bootstrap_intervals(values, samples, seed)  # [metrics, 2]
    found = zip(keys, values.mean(axis=0).tolist(), intervals.tolist(), strict=True)
    return {key: {"value": value, "ci95": interval} for key, value, interval in found}


def _users(ranks: Ranks) -> list[str]:
    """The users in the order of the file."""
    return list(dict.fromkeys(user for of_kind in ranks.values() for user in of_kind))
