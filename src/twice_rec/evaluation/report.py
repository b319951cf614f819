"""The report: everything under eval/ summed up with intervals, compared, and written as a page, tables and JSON.

Two views are given: every variant on all its users, and all variants on the users they share, since language models may
answer for fewer users. What is stale, or differs from the rest in data, users, lists, ranking or prompt form, is left
out, and a line says so.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twice_rec.errors import InputError
from twice_rec.evaluation.equals import (
    Terms,
    difference,
    difference_of_users,
    fresh_evaluations,
    labels,
    reference_users,
)
from twice_rec.evaluation.predictions import PREDICTIONS
from twice_rec.evaluation.recipe import ReportRecipe
from twice_rec.evaluation.tables import Summary, in_order
from twice_rec.files import hash_file, read_records
from twice_rec.locks import run_folder
from twice_rec.metrics import METRICS, bootstrap_intervals, holm, paired_bootstrap, per_user
from twice_rec.records import Prediction

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Variant:
    """All predictions of one variant."""

    users: Mapping[str, int]  # those it was evaluated on -> their row, in the files' order
    values: Mapping[str, NDArray[np.float64]]  # metric key -> [users], averaged over the variant's trainings
    runs: int  # how many trainings these are
    terms: tuple[Terms, ...]  # of each evaluation that is averaged
    first: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)  # list kind -> user -> first items
    of_runs: Mapping[str, Mapping[Path, NDArray[np.float64]]] = field(default_factory=dict)  # key -> run -> as `values`

    def column(self, key: str, users: Sequence[str]) -> NDArray[np.float64]:
        """Return one metric of some users: float64 [len(users)]."""
        return self.values[key][[self.users[user] for user in users]]

    def mean_of(self, run: Path, key: str, users: Sequence[str]) -> float:
        """Return one metric's mean over some users in one run folder; over all runs if it was not evaluated there."""
        values = self.of_runs.get(key, {}).get(run, self.values[key])
        return float(values[[self.users[user] for user in users]].mean())


def read_variants(run_dirs: Sequence[Path]) -> tuple[dict[str, Variant], list[str]]:
    """Read every fresh evaluation of some runs, in table order; those of one name are trainings of one variant.

    Returns:
        The variants, and a line about whatever is left out.

    Raises:
        InputError: if a run has no evaluation, or none can be used.
    """
    folders: dict[str, list[Path]] = {}
    lines: list[str] = []
    for run_dir in run_dirs:
        fresh, others = fresh_evaluations(run_dir)
        lines += others
        for folder in fresh:
            folders.setdefault(folder.name, []).append(folder)
    variants: dict[str, Variant] = {}
    data: dict[str, str] = {}  # file of stage 0 -> hash, as the first variants have it
    for name, of_name in folders.items():
        try:
            of_name, twins = _without_twins(of_name)
            lines += twins
            variant = _read(of_name)
        except InputError as error:
            lines.append(f"{name} left out: {error}")
            continue
        own = variant.terms[0].data()
        if other := next((file for file in own if data.get(file, own[file]) != own[file]), None):
            lines.append(f"{of_name[0]} left out: it was evaluated on different {other} than the others")
            continue
        data |= own
        variants[name] = variant
    if not variants:
        raise InputError(f"there is nothing to report: {'; '.join(lines)}")
    return {name: variants[name] for name in in_order(list(variants))}, lines


def _without_twins(folders: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Return evaluations without those that another run's is a copy of, and a line about each language model's."""
    first: dict[tuple[str, str], Path] = {}
    lines = []
    for folder in folders:
        terms = Terms.of(folder)
        known = first.setdefault(
            (hash_file(folder / PREDICTIONS), json.dumps(dict(terms.rests_on), sort_keys=True)), folder
        )
        if known != folder and terms.asked:
            lines.append(f"{folder} left out: it is the same evaluation as {known}, of the same training")
    return list(first.values()), lines


def _read(folders: Sequence[Path]) -> Variant:
    terms = tuple(Terms.of(folder) for folder in folders)
    for other in terms[1:]:
        if differs := difference(terms[0], other):
            raise InputError(f"{terms[0].folder} and {other.folder} have {differs}")
    users: dict[str, int] = {}
    trainings: dict[tuple[Path, int], None] = {}
    found: dict[str, list[tuple[int, int, int]]] = {}  # kind of list -> (run, row of the user, rank)
    first: dict[str, dict[str, list[str]]] = {}
    places: dict[Path, int] = {}  # run folder -> its place among them
    for folder in folders:
        place = places.setdefault(run_folder(folder), len(places))
        for prediction in read_records(folder / PREDICTIONS, Prediction):
            trainings[folder, prediction.seed] = None
            row = users.setdefault(prediction.user_id, len(users))
            for kind, rank in prediction.ranks.items():
                found.setdefault(kind, []).append((place, row, rank))
            for kind, item_id in prediction.first.items():
                first.setdefault(kind, {}).setdefault(prediction.user_id, []).append(item_id)
    values, of_runs = {}, {}
    for kind, triples in found.items():
        runs, rows, ranks = np.array(triples).T
        if not (np.bincount(rows, minlength=len(users)) == len(trainings)).all():
            raise InputError(
                f"{', '.join(map(str, folders))}: some users have no rank for {kind} in some of the "
                f"{len(trainings)} runs; evaluate all of them on the same users and lists"
            )
        for name in METRICS:
            of_rows = per_user(name, ranks)
            values[f"{kind}/{name}"] = np.bincount(rows, weights=of_rows) / len(trainings)
            of_runs[f"{kind}/{name}"] = {
                run: np.bincount(rows[own], weights=of_rows[own]) / np.bincount(rows[own])
                for run, place in places.items()
                if (own := runs == place).any()
            }
    return Variant(users, values, len(trainings), terms, first, of_runs)


def results_of(variants: Mapping[str, Variant], recipe: ReportRecipe, left_out: Sequence[str] = ()) -> dict[str, Any]:
    """Return summaries and comparisons, for results.json; a pair of unequals is left out with a line that says why."""
    samples, metric, lines = recipe.bootstrap_samples, recipe.comparison_metric, list(left_out)
    if variants and not any(metric in variant.values for variant in variants.values()):
        raise InputError(f"comparison_metric is {metric}; no variant was evaluated on it")
    comparisons = []
    for a, b, *but_for in recipe.comparisons:
        if differs := unequal(variants, a, b, metric, but_for):
            lines.append(f"{a} - {b} left out: {differs}")
        else:
            comparisons.append(compare(variants, a, b, metric, samples, recipe.seed))
    for row, adjusted in zip(comparisons, holm([row["p"] for row in comparisons]), strict=True):
        row["p_holm"] = float(adjusted)
    shared, together, others = shared_users(variants)
    of_shared = summarise_variants(together, shared, samples, recipe.seed) if shared else {}
    return {
        "variants": summarise_variants(variants, None, samples, recipe.seed),
        "common_users": {"n": len(shared), "variants": of_shared},
        "comparisons": comparisons,
        "left_out": [*lines, *others],
    }


def unequal(variants: Mapping[str, Variant], a: str, b: str, metric: str, but_for: Collection[str] = ()) -> str | None:
    """Return why two variants cannot be compared, in words; None if they can. `but_for`: see `difference`."""
    if missing := [name for name in (a, b) if name not in variants]:
        return f"{missing[0]} is not evaluated" + (f"; {', '.join(variants)} are" if variants else "")
    for name in (a, b):
        if metric not in variants[name].values:
            return f"{name} was not evaluated on {metric}; it has {', '.join(variants[name].values)}"
    left, right = variants[a], variants[b]
    for one, other in itertools.product(left.terms, right.terms):
        if differs := difference(one, other, but_for):
            return f"{one.folder} and {other.folder} have {differs}"
    return difference_of_users(left.terms[0], left.users, right.terms[0], right.users)


def shared_users(variants: Mapping[str, Variant]) -> tuple[list[str], dict[str, Variant], list[str]]:
    """Return the users of the table of shared users, its variants, and a line about each that has others."""
    chosen = reference_users({name: (variant.terms[0], variant.users) for name, variant in variants.items()})
    together = {name: variant for name, variant in variants.items() if chosen <= variant.users.keys()}
    lines = [
        f"{name} left out of the table of shared users: it was evaluated on {len(variant.users):,} users, which are "
        f"not all of the {len(chosen):,} of the others"
        for name, variant in variants.items()
        if name not in together
    ]
    lines += [
        f"{name}: the table of shared users has {len(chosen):,} of its {len(variant.users):,} users; the other "
        "language models were asked about no more"
        for name, variant in together.items()
        if variant.terms[0].asked and len(variant.users) > len(chosen)
    ]
    return [user for user in next(iter(together.values())).users if user in chosen] if chosen else [], together, lines


def summarise_variants(
    variants: Mapping[str, Variant], users: Sequence[str] | None, bootstrap_samples: int, seed: int = 0
) -> Summary:
    """Return means, 95 % intervals, users and trainings of each variant, on the given users or else on all its own."""
    summary: dict[str, dict[str, Any]] = {}
    asked = labels({name: variant.terms[0] for name, variant in variants.items()})
    for name, variant in variants.items():
        of = list(variant.users) if users is None else users
        columns = np.stack([variant.column(key, of) for key in variant.values], axis=1)  # [users, metrics]
        intervals = bootstrap_intervals(columns, bootstrap_samples, seed)  # [metrics, 2]
        summary[name] = {
            "metrics": dict(zip(variant.values, columns.mean(axis=0).tolist(), strict=True)),
            "ci95": dict(zip(variant.values, intervals.tolist(), strict=True)),
            "n": len(of),
            "runs": variant.runs,
            **({"asked": asked[name]} if name in asked else {}),
        }
    return summary


def compare(
    variants: Mapping[str, Variant], a: str, b: str, metric: str, bootstrap_samples: int, seed: int = 0
) -> dict[str, Any]:
    """Compare two variants, which are not `unequal`, on the users both have, user by user.

    `by_seed` has the difference in each run folder, if there are several: against the other variant of the same run,
    or against its mean if it was evaluated in another one only.
    """
    one, other = variants[a], variants[b]
    users = [user for user in one.users if user in other.users]
    left, right = (variant.column(metric, users) for variant in (one, other))
    found = paired_bootstrap(left, right, bootstrap_samples, seed)
    runs = list(dict.fromkeys([*one.of_runs.get(metric, {}), *other.of_runs.get(metric, {})]))
    by_seed = [one.mean_of(run, metric, users) - other.mean_of(run, metric, users) for run in runs]
    return {
        "a": a, "b": b, "metric": metric, "n": len(users), **asdict(found), "by_seed": by_seed if len(runs) > 1 else [],
    }  # fmt: skip
