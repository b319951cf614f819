"""Candidate lists: the target among negatives the user never interacted with, drawn once and stored.

The draw of a list depends only on the seed, the user, the split and the kind of list: not on other users, nor on the
order in which they are drawn. Negatives come from the whole catalogue (`uniform`), in proportion to training
popularity (`popularity`), or uniformly from the items a CF model scores highest for the user (`hard`). The target's
position is uniform.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from twice_rec.catalog import ItemCatalog
from twice_rec.errors import InputError
from twice_rec.records import CandidateLists, Split, UserSequence

# Scores of the whole catalogue for some histories (item indices, 1..N): float [B, N], column j for index j + 1.
ScoreHistories = Callable[[Sequence[Sequence[int]]], NDArray[np.floating]]


def draw_candidates(
    sequences: Sequence[UserSequence],
    catalog: ItemCatalog,
    split: Split,
    kinds: Sequence[str],
    num_candidates: int,
    seed: int,
    hard_pool: int,
    score_histories: ScoreHistories | None = None,
) -> Iterator[CandidateLists]:
    """Draw the lists of every user who has a target in the split, in the order of `sequences`.

    Args:
        kinds: of `uniform`, `popularity`, `hard`.
        num_candidates: length of each list, the target included.
        hard_pool: how many of the highest-scored items hard negatives are drawn from.
        score_histories: needed for `hard`; should be fitted on training parts only.

    Raises:
        InputError: where a user leaves fewer negatives than asked for, with the numbers.
    """
    popularity = training_counts(sequences, catalog)
    cumulative = np.cumsum(popularity, dtype=np.float64)
    batch = 512
    with_target = [sequence for sequence in sequences if sequence.target_position(split) is not None]
    for start in range(0, len(with_target), batch):
        part = with_target[start : start + batch]
        histories = [catalog.indices(entry.item_id for entry in sequence.history(split)) for sequence in part]
        scores = score_histories(histories) if "hard" in kinds and score_histories else None
        for row, sequence in enumerate(part):
            own = {catalog.index(entry.item_id) for entry in sequence.interactions}
            need = num_candidates - 1
            if len(catalog) - len(own) < need:
                raise InputError(
                    f"user {sequence.user_id} interacted with {len(own)} of {len(catalog)} items, which leaves "
                    f"{len(catalog) - len(own)} possible negatives; num_candidates {num_candidates} needs {need}: "
                    "lower num_candidates"
                )
            target = sequence.target(split).item_id
            lists = {}
            for kind in kinds:
                rng = np.random.default_rng(_user_seed(seed, sequence.user_id, split, kind))
                if kind == "uniform":
                    negatives = _draw(rng, need, own, len(catalog), None)
                elif kind == "popularity":
                    negatives = _draw(rng, need, own, len(catalog), cumulative)
                else:
                    if scores is None:
                        raise ValueError("hard candidates need score_histories")
                    negatives = _draw_hard(rng, need, own, scores[row], hard_pool)
                order = rng.permutation(num_candidates)
                ids = [target, *(catalog.at(index).item_id for index in negatives)]
                lists[kind] = tuple(ids[position] for position in order)
            yield CandidateLists(sequence.user_id, target, lists)


def training_counts(sequences: Sequence[UserSequence], catalog: ItemCatalog) -> NDArray[np.int64]:
    """How often each item occurs in the training parts: int64 [N], position j for index j + 1."""
    counts = np.zeros(len(catalog), dtype=np.int64)
    for sequence in sequences:
        for entry in sequence.interactions[: sequence.num_train]:
            counts[catalog.index(entry.item_id) - 1] += 1
    return counts


def _user_seed(seed: int, user_id: str, split: str, kind: str) -> int:
    digest = hashlib.blake2b(f"{seed}\0{user_id}\0{split}\0{kind}".encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little")


def _draw(
    rng: np.random.Generator, need: int, own: set[int], num_items: int, cumulative: NDArray[np.float64] | None
) -> list[int]:
    """`need` distinct indices outside `own`, one after another in proportion to their weight (uniform without one).

    Draws that were taken or are the user's own are drawn again. Where that goes on for long (few items hold nearly all
    the weight), the rest is drawn from the exact distribution, and weightless items are taken last.
    """
    chosen: dict[int, None] = {}
    for _ in range(20):
        if cumulative is None:
            drawn = rng.integers(1, num_items + 1, size=2 * need)
        else:
            at = np.searchsorted(cumulative, rng.random(2 * need) * cumulative[-1], side="right")
            drawn = 1 + np.minimum(at, num_items - 1)
        for index in drawn.tolist():
            if index not in own and index not in chosen:
                chosen[index] = None
                if len(chosen) == need:
                    return list(chosen)
    left = np.array([i for i in range(1, num_items + 1) if i not in own and i not in chosen])
    weights = np.ones(len(left)) if cumulative is None else np.diff(cumulative, prepend=0.0)[left - 1]
    keys = rng.exponential(size=len(left)) / np.maximum(weights, 1e-12)  # the smallest keys are a weighted draw
    return [*chosen, *left[np.argsort(keys)[: need - len(chosen)]].tolist()]


def _draw_hard(
    rng: np.random.Generator, need: int, own: set[int], scores: NDArray[np.floating], pool: int
) -> list[int]:
    """`need` distinct indices, uniform over the `pool` items outside `own` with the highest scores."""
    masked = scores.astype(np.float64)
    masked[np.array(sorted(own)) - 1] = -np.inf
    size = min(max(pool, need), len(masked) - len(own))
    best = np.sort(np.argpartition(-masked, size - 1)[:size]) + 1
    return rng.choice(best, size=need, replace=False).tolist()
