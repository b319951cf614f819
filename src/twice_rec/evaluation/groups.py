"""Where the variants differ: users by the length of their history, by how popular their target is, and what is
recommended to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twice_rec.data.dataset import PreparedData
from twice_rec.evaluation.position import position_of
from twice_rec.evaluation.predictions import PREDICTIONS
from twice_rec.evaluation.recipe import ReportRecipe
from twice_rec.evaluation.report import Variant, shared_users
from twice_rec.files import read_records
from twice_rec.metrics import bootstrap_intervals
from twice_rec.records import Prediction

GROUP_METRICS = ("hr@1", "hr@5", "ndcg@5")


def details_of(variants: Mapping[str, Variant], data: PreparedData, recipe: ReportRecipe) -> dict[str, Any]:
    """Return `groups`, `recommended` and `position` of results.json, the first two of the users that variants share.

    `groups`: for `history_length` (interactions before the target) and `target_popularity` (training interactions with
    the target), four groups of about as many users, each with means and 95 % intervals of every variant.
    `recommended`: per variant and kind of list, what it puts first: `coverage`, the share of the catalogue that some
    user is recommended, and `popularity`, the mean number of training interactions with it; `targets` has both of the
    targets themselves. Means over a variant's trainings. `position`: see `position_of`, of each language model.
    """
    shared, together, _ = shared_users(variants)
    if not shared:
        return {}
    asked = data.questions("test")
    place_of = {user: place for place, user in enumerate(asked.user_ids)}
    places = np.array([place_of[user] for user in shared])  # [U]
    counts = np.bincount(data.training_histories().flat()[1], minlength=len(data.catalog) + 1)  # [N + 1]
    of_users = {"history_length": asked.histories.lengths[places], "target_popularity": counts[asked.targets[places]]}
    kind = recipe.comparison_metric.partition("/")[0]
    groups = {name: groups_of(values, shared, together, kind, recipe) for name, values in of_users.items()}
    popularity = dict(zip(data.catalog.ids, counts[1:].tolist(), strict=True))
    targets = [data.catalog.ids[target - 1] for target in asked.targets[places].tolist()]
    about_targets = {"targets": {"targets": _about([targets], popularity)}}
    position = {}
    for name, variant in variants.items():
        folders = [terms.folder for terms in variant.terms if terms.asked]
        if rows := [row for folder in folders for row in read_records(folder / PREDICTIONS, Prediction) if row.places]:
            position[name] = position_of(rows)
    first = about_targets | recommended(together, shared, popularity)
    return {"groups": groups, "recommended": first, "position": position}


def groups_of(
    values: NDArray[np.int64], users: Sequence[str], variants: Mapping[str, Variant], kind: str, recipe: ReportRecipe
) -> list[dict[str, Any]]:
    """Return four groups of users of about equal size by their value, fewer if many users have the same.

    Args:
        values: [U], of each user.
        kind: of the lists whose metrics are given.
    """
    edges = np.unique(np.quantile(values, [0.25, 0.5, 0.75], method="lower"))  # each the last of its group
    group = np.searchsorted(edges, values, side="left")  # [U]
    found = []
    for number in np.unique(group):
        own = group == number  # [U]
        low, high = int(values[own].min()), int(values[own].max())
        members = [user for user, is_own in zip(users, own.tolist(), strict=True) if is_own]
        means = {
            name: row
            for name, variant in variants.items()
            if (row := _means(variant, members, kind, recipe.bootstrap_samples, recipe.seed))
        }
        label = f"{low}" if low == high else f"{low} to {high}"
        found.append({"label": label, "n": len(members), "variants": means})
    return found


def _means(variant: Variant, users: Sequence[str], kind: str, samples: int, seed: int) -> dict[str, dict[str, Any]]:
    keys = {name: key for name in GROUP_METRICS if (key := f"{kind}/{name}") in variant.values}
    if not keys:
        return {}
    columns = np.stack([variant.column(key, users) for key in keys.values()], axis=1)  # [users, metrics]
    intervals = bootstrap_intervals(columns, samples, seed)  # [metrics, 2]
    means = columns.mean(axis=0)  # [metrics]
    return {name: {"mean": float(means[i]), "ci95": intervals[i].tolist()} for i, name in enumerate(keys)}


def recommended(
    variants: Mapping[str, Variant], users: Sequence[str], popularity: Mapping[str, int]
) -> dict[str, dict[str, Any]]:
    """Return what each variant puts first for some users: variant -> kind of list -> figures; see `details_of`.

    Args:
        popularity: item id -> its training interactions, for the whole catalogue.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, variant in variants.items():
        for kind, first in variant.first.items():
            if all(user in first for user in users):
                trainings = zip(*(first[user] for user in users), strict=True)
                found.setdefault(name, {})[kind] = _about(list(trainings), popularity)
    return found


def _about(trainings: Sequence[Sequence[str]], popularity: Mapping[str, int]) -> dict[str, float]:
    coverage = [len(set(items)) / len(popularity) for items in trainings]
    popular = [np.mean([popularity[item] for item in items]) for items in trainings]
    return {"coverage": float(np.mean(coverage)), "popularity": float(np.mean(popular))}
