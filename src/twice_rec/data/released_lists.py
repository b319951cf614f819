"""What the authors' released test lists measure: does a model need to know anything of a user to rank them?

If all lists share their distractors, the target is the one candidate that other lists do not have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from twice_rec.metrics import bootstrap_intervals, per_user, ranks_from_scores

SHARED = 0.5  # an item is in the shared pool if more than this share of the lists have it


@dataclass(frozen=True)
class Diagnosis:
    """What was counted, and the HR@1 of scores that know no user: name -> mean and 95 % interval."""

    num_lists: int
    num_candidates: tuple[int, int]  # least and most per list
    pool: frozenset[str]
    in_all: int  # items that every list has
    targets_in_pool: int
    pool_count: float  # mean number of training interactions of the pool's items
    catalog_count: float  # of all items that occur
    hit_rates: dict[str, tuple[float, float, float]]


def diagnose(lists: Sequence[tuple[Sequence[str], str]], counts: Counter[str], seed: int = 0) -> Diagnosis:
    """Count what lists share, and rank their targets by scores that know no user; ties count against the target.

    Args:
        lists: candidates and target of each.
        counts: training interactions of each item.
    """
    shared = Counter(item for candidates, _ in lists for item in set(candidates))
    pool = frozenset(item for item, count in shared.items() if count > SHARED * len(lists) and len(lists) > 1)
    scores = {
        "not in the shared pool": lambda item: float(item not in pool),
        "popularity in training": lambda item: float(counts[item]),
    }
    sizes = [len(candidates) for candidates, _ in lists]
    hits = {"random, expected": np.array([1 / size for size in sizes])}
    for name, of in scores.items():
        table = [[of(item) for item in candidates] for candidates, _ in lists]
        places = [candidates.index(target) for candidates, target in lists]
        ranks = [ranks_from_scores([row], [place])[0] for row, place in zip(table, places, strict=True)]
        hits[name] = per_user("hr@1", ranks)
    intervals = {name: bootstrap_intervals(values[:, None], seed=seed)[0] for name, values in hits.items()}
    return Diagnosis(
        num_lists=len(lists),
        num_candidates=(min(sizes), max(sizes)),
        pool=pool,
        in_all=sum(count == len(lists) for count in shared.values()),
        targets_in_pool=sum(target in pool for _, target in lists),
        pool_count=float(np.mean([counts[item] for item in pool])) if pool else 0.0,
        catalog_count=float(np.mean(list(counts.values()))),
        hit_rates={name: (float(values.mean()), *map(float, intervals[name])) for name, values in hits.items()},
    )
