"""Candidate lists: the target among negatives the user never interacted with, drawn once and stored.

The random numbers of a list depend only on the seed, the user, the split and the kind of list: not on other users, nor
on the order in which they are drawn. (What popularity and hard lists draw from does depend on the training parts of
others.) The position of the target is uniform. To add a kind of list, add its draw to
`CANDIDATE_LISTS`, and what the report says of it to `records.RANKED_LISTS`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from twice_rec.catalog import ItemCatalog
from twice_rec.errors import InputError
from twice_rec.random_streams import random_stream
from twice_rec.recipe import Settings, key, one_of, rule
from twice_rec.records import CandidateLists, Split, UserSequence

# Scores of the whole catalogue for some histories (item indices, 1..N): float [B, N], column j for index j + 1.
ScoreHistories = Callable[[Sequence[Sequence[int]]], NDArray[np.floating]]

_BATCH = 512  # users whose scores are computed together


@dataclass(frozen=True, slots=True)
class Choice:
    """What one user's negatives are drawn from."""

    count: int  # number of negatives
    own: set[int]  # indices of the items that the user interacted with
    cumulative: NDArray[np.float64]  # [N], running sum of the items' counts in the training parts
    scores: NDArray[np.floating] | None  # [N], of a CF model for this user
    hard_pool: int
    tied: Counter[str]  # counts of hard negatives: `drawn`, and `tied`, see `hard`


def uniform(rng: np.random.Generator, choice: Choice) -> list[int]:
    """Draw from the whole catalogue."""
    return _draw(rng, choice, None)


def popularity(rng: np.random.Generator, choice: Choice) -> list[int]:
    """Draw in proportion to the training counts; items without any are taken last."""
    return _draw(rng, choice, choice.cumulative)


def hard(rng: np.random.Generator, choice: Choice) -> list[int]:
    """Draw uniformly from the items that a CF model scores highest for the user; ValueError without scores.

    If items of one score fit into the pool only in part, those that enter are drawn per user; negatives from among them
    are counted as tied: the CF model did not choose them.
    """
    if choice.scores is None:
        raise ValueError("hard candidates need score_histories")
    free = np.setdiff1d(np.arange(1, len(choice.scores) + 1), list(choice.own))  # [F], indices of items
    scores = choice.scores[free - 1]  # [F]
    size = min(max(choice.hard_pool, choice.count), len(free))
    lowest = np.partition(scores, len(free) - size)[len(free) - size]  # in the pool
    best, edge = free[scores > lowest], free[scores == lowest]
    tied = len(best) + len(edge) > size
    if tied:
        edge = rng.choice(edge, size=size - len(best), replace=False)
    pool = np.sort(np.concatenate([best, edge]))  # [size]
    drawn = rng.choice(pool, size=choice.count, replace=False)
    choice.tied.update(drawn=len(drawn), tied=int(np.isin(drawn, edge).sum()) if tied else 0)
    return drawn.tolist()


def _draw(rng: np.random.Generator, choice: Choice, cumulative: NDArray[np.float64] | None) -> list[int]:
    """Return distinct indices that are not the user's own, one after another in proportion to their weight.

    `cumulative` is the running sum of the weights, float64 [N], None for uniform ones. Draws of taken or own items are
    repeated. If that goes on for long (few items hold nearly all the weight), the rest is drawn exactly.
    """
    chosen, own, num_items = dict[int, None](), choice.own, len(choice.cumulative)
    for _ in range(20):
        if cumulative is None:
            drawn = rng.integers(1, num_items + 1, size=2 * choice.count)  # [2 * count]
        else:
            at = np.searchsorted(cumulative, rng.random(2 * choice.count) * cumulative[-1], side="right")
            drawn = 1 + np.minimum(at, num_items - 1)  # [2 * count]
        for index in drawn.tolist():
            if index not in own and index not in chosen:
                chosen[index] = None
                if len(chosen) == choice.count:
                    return list(chosen)
    left = np.array([i for i in range(1, num_items + 1) if i not in own and i not in chosen])
    weights = np.ones(len(left)) if cumulative is None else np.diff(cumulative, prepend=0.0)[left - 1]
    keys = rng.exponential(size=len(left)) / np.maximum(weights, 1e-12)  # the smallest keys are a weighted draw
    return [*chosen, *left[np.argsort(keys)[: choice.count - len(chosen)]].tolist()]


# Name in the recipe -> how negatives are drawn.
CANDIDATE_LISTS = {"uniform": uniform, "popularity": popularity, "hard": hard}
ListKind = one_of(CANDIDATE_LISTS)


class CandidateConfig(Settings):
    """Which candidate lists are drawn."""

    num_candidates: int = key(30, "length of every candidate list, the target included", ge=2)
    candidate_lists: list[ListKind] = key(["uniform"], "how negatives are drawn; one stored list for each")
    hard_pool: int = key(100, "number of items with the highest item-kNN scores that hard negatives come from", ge=1)
    prompt_list: ListKind = key("uniform", "list that training prompts show")

    @rule
    def hard_pool_is_large_enough(self) -> str | None:
        """The pool holds all hard negatives of a list."""
        size, needed = self.hard_pool, self.num_candidates - 1
        if "hard" not in self.candidate_lists or size >= needed:
            return None
        return f"hard_pool is {size}; num_candidates {self.num_candidates} draws {needed} negatives from it"

    @rule
    def prompts_show_a_stored_list(self) -> str | None:
        """Prompts show one of the lists."""
        if self.prompt_list in self.candidate_lists:
            return None
        return f"prompt_list is {self.prompt_list}; candidate_lists has only {', '.join(self.candidate_lists)}"


def draw_candidates(
    config: CandidateConfig,
    sequences: Sequence[UserSequence],
    catalog: ItemCatalog,
    split: Split,
    seed: int,
    score_histories: ScoreHistories | None = None,
    tied: Counter[str] | None = None,
) -> Iterator[CandidateLists]:
    """Draw the lists of every user who has a target in the split, in the order of `sequences`.

    For training, only the list that prompts show is drawn. `hard` needs `score_histories`, of a model that is fitted on
    training parts only. `tied` counts hard negatives, see `Choice`.

    Raises:
        InputError: if a user leaves fewer negatives than are needed, with the numbers.
    """
    kinds = [config.prompt_list] if split == "train" else config.candidate_lists
    tied = Counter() if tied is None else tied
    cumulative = np.cumsum(training_counts(sequences, catalog), dtype=np.float64)  # [N]
    with_target = [sequence for sequence in sequences if sequence.target_position(split) is not None]
    for start in range(0, len(with_target), _BATCH):
        part = with_target[start : start + _BATCH]
        histories = [catalog.indices(entry.item_id for entry in sequence.history(split)) for sequence in part]
        scores = score_histories(histories) if "hard" in kinds and score_histories else [None] * len(part)  # [B, N]
        for sequence, own_scores in zip(part, scores, strict=True):
            own = {catalog.index(entry.item_id) for entry in sequence.interactions}
            choice = Choice(config.num_candidates - 1, own, cumulative, own_scores, config.hard_pool, tied)
            if len(catalog) - len(own) < choice.count:
                raise InputError(
                    f"user {sequence.user_id} interacted with {len(own)} of {len(catalog)} items, which leaves "
                    f"{len(catalog) - len(own)} possible negatives; num_candidates {config.num_candidates} needs "
                    f"{choice.count}: lower num_candidates"
                )
            target = sequence.target(split).item_id
            lists = {}
            for kind in kinds:
                rng = random_stream(seed, sequence.user_id, split, kind)
                ids = [target, *(catalog.at(index).item_id for index in CANDIDATE_LISTS[kind](rng, choice))]
                lists[kind] = tuple(ids[position] for position in rng.permutation(len(ids)))
            yield CandidateLists(sequence.user_id, target, lists)


def training_counts(sequences: Sequence[UserSequence], catalog: ItemCatalog) -> NDArray[np.int64]:
    """Return how often each item occurs in the training parts: int64 [N], position j for index j + 1."""
    trained = (entry.item_id for sequence in sequences for entry in sequence.interactions[: sequence.num_train])
    return np.bincount(np.array(catalog.indices(trained), dtype=np.int64), minlength=len(catalog) + 1)[1:]
