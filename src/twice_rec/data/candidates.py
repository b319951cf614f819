"""Candidate lists: the target among negatives the user never interacted with, drawn once and stored.

The random numbers of a list depend only on the seed, the user, the split and the kind of list: not on other users, nor
on how many are drawn together. (What popularity and hard lists draw from does depend on the training parts of others.)
The position of the target is uniform. To add a kind of list, add its draw to `CANDIDATE_LISTS`, and what the report
says of it to `records.RANKED_LISTS`. A draw takes a `Batch` of users and returns their negatives, int [B, count].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import sparse

from twice_rec.catalog import ItemCatalog
from twice_rec.data.hard import SimilarItems, hard_pools
from twice_rec.data.sequences import SequenceTable
from twice_rec.errors import InputError
from twice_rec.files import atomic_path
from twice_rec.progress import progress
from twice_rec.random_streams import RandomStreams, id_hashes, random_streams
from twice_rec.recipe import Settings, key, one_of, rule
from twice_rec.records import Split

Ints = NDArray[np.int64]

_BATCH = 1024  # users whose lists are drawn, and whose item-kNN scores are held, together
_REPEATED = 40  # times the number of negatives, so many items are drawn before the rest is drawn exactly
_EXACTLY, _EDGE, _FILL = 1, 2, 3  # further parts of a draw, each with streams of its own


@dataclass(frozen=True)
class Batch:
    """What the negatives of B users are drawn from; items are indices of the catalogue, 1..N."""

    count: int  # number of negatives per user
    num_items: int  # N
    begins: Ints  # [B + 1], where in `own` the items of each user begin
    own: Ints  # items that may not be drawn: those of the user's interactions, ascending and each once per user
    trained: NDArray[np.int32]  # [training interactions of all users], their items
    streams: RandomStreams  # of the users and this kind of list
    scores: sparse.csr_matrix | None  # [B, N], of item-kNN, column j for index j + 1; nothing stored for 0
    hard_pool: int
    tied: Counter[str]  # counts of hard negatives: `drawn`, and `tied`, see `hard`

    def __len__(self) -> int:
        return len(self.begins) - 1

    @cached_property
    def _own_keys(self) -> Ints:
        rows = np.repeat(np.arange(len(self)), np.diff(self.begins))
        return np.r_[rows * (self.num_items + 1) + self.own, np.iinfo(np.int64).max]  # ascending

    def may_not(self, rows: Ints, items: Ints) -> NDArray[np.bool_]:
        """Return whether an item may not be drawn for its user: bool [R, M].

        Args:
            rows: int [R], users of the batch.
            items: int [R, M].
        """
        keys = rows[:, None] * (self.num_items + 1) + items
        return self._own_keys[np.searchsorted(self._own_keys, keys)] == keys


def uniform(batch: Batch) -> Ints:
    """Draw from the whole catalogue."""
    return _draw(batch, lambda numbers: 1 + (numbers * batch.num_items).astype(np.int64), None)


def popularity(batch: Batch) -> Ints:
    """Draw in proportion to the training counts; items without any are taken last."""
    trained = batch.trained
    if not len(trained):
        return uniform(batch)
    return _draw(batch, lambda numbers: trained[(numbers * len(trained)).astype(np.int64)].astype(np.int64), trained)


def hard(batch: Batch) -> Ints:
    """Draw uniformly from the `hard_pool` items that item-kNN scores highest for the user; ValueError without scores.

    If items of one score fit into the pool only in part, those that enter are drawn per user; negatives from among them
    are counted as tied: the CF model did not choose them. Items without a score are such items.
    """
    if batch.scores is None:
        raise ValueError("hard candidates need the similarity of items")
    free = batch.num_items - np.diff(batch.begins)  # [B]
    sizes = np.minimum(max(batch.hard_pool, batch.count), free)
    pools = hard_pools(batch.scores, batch.begins, batch.own, sizes, batch.streams.apart(_EDGE))
    numbers = batch.streams.random(0, pools.items.shape[1])  # [B, P]
    numbers[np.arange(pools.items.shape[1]) >= sizes[:, None]] = 2.0  # no place of this user's pool
    places = np.argsort(numbers, axis=1)[:, : batch.count]  # [B, count]
    drawn = np.take_along_axis(pools.items, places, axis=1)  # [B, count], 0 for one of the items without a score
    tied = np.take_along_axis(pools.tied, places, axis=1)
    short = np.flatnonzero((drawn == 0).any(axis=1))  # [S]
    if len(short):
        fill = uniform(_without_scored(batch, pools.scored, short))  # [S, count]
        rows = drawn[short]
        missing = rows == 0
        rows[missing] = fill[np.arange(batch.count) < missing.sum(axis=1)[:, None]]
        drawn[short] = rows
    batch.tied.update(drawn=drawn.size, tied=int(tied.sum()))
    return drawn


def _without_scored(batch: Batch, scored: list[Ints], rows: Ints) -> Batch:
    """Return the batch of some users whose own items are joined by all items with a score for them.

    As many are drawn as fit, if that is less than the number of negatives; see `_draw`.
    """
    taken = [np.union1d(batch.own[batch.begins[row] : batch.begins[row + 1]], scored[row]) for row in rows]
    begins = np.r_[0, np.cumsum([len(items) for items in taken])]
    return replace(batch, begins=begins, own=np.concatenate(taken), streams=batch.streams.take(rows).apart(_FILL))


def _draw(batch: Batch, item_of: Callable[[NDArray[np.float64]], Ints], trained: NDArray[np.int32] | None) -> Ints:
    """Return distinct items that the users may get, one after another in proportion to their weight: int [B, count].

    Items that are taken or own are drawn again. If that goes on for long (few items hold nearly all the weight), the
    rest is drawn exactly. If fewer than `count` are left for a user, the row ends with zeros.

    Args:
        item_of: from uniform numbers [R, M] to items [R, M].
        trained: see `Batch`; None for uniform weights.
    """
    count = batch.count
    chosen = np.zeros((len(batch), count), dtype=np.int64)
    rows, drawn = np.arange(len(batch)), np.empty((len(batch), 0), dtype=np.int64)
    more = count + count // 4 + 4
    while len(rows) and drawn.shape[1] < _REPEATED * count:
        drawn = np.hstack([drawn, item_of(batch.streams.take(rows).random(drawn.shape[1], more))])  # [R, M]
        keep = _is_first(drawn) & ~batch.may_not(rows, drawn)
        place = np.cumsum(keep, axis=1)  # of a kept item among the row's, from 1
        done = place[:, -1] >= count
        chosen[rows[done]] = drawn[done][(keep & (place <= count))[done]].reshape(-1, count)
        left, rows, drawn, more = keep[~done], rows[~done], drawn[~done], drawn.shape[1]
    if len(rows):
        weights = None if trained is None else np.bincount(trained, minlength=batch.num_items + 1)
        for row, items, kept in zip(rows.tolist(), drawn, left, strict=True):
            _draw_exactly(batch, row, items[kept], weights, chosen[row])
    return chosen


def _is_first(items: Ints) -> NDArray[np.bool_]:
    """Return whether an item is the first of its kind in its row: bool [R, M]."""
    order = np.argsort(items, axis=1, kind="stable")
    ordered = np.take_along_axis(items, order, axis=1)
    first = np.ones(items.shape, dtype=bool)
    np.put_along_axis(first, order[:, 1:], ordered[:, 1:] != ordered[:, :-1], axis=1)
    return first


def _draw_exactly(batch: Batch, row: int, begun: Ints, weights: Ints | None, chosen: Ints) -> None:
    """Fill `chosen` [count] of one user, whose draw has begun with these items."""
    left = np.ones(batch.num_items + 1, dtype=bool)
    left[0] = left[begun] = left[batch.own[batch.begins[row] : batch.begins[row + 1]]] = False
    items = np.flatnonzero(left)
    numbers = batch.streams.take(np.array([row])).apart(_EXACTLY).random_at(items)[0]
    weight = 1.0 if weights is None else np.maximum(weights[items], 1e-12)
    keys = -np.log1p(-numbers) / weight  # the smallest keys are a weighted draw
    whole = np.r_[begun, items[np.argsort(keys)[: batch.count - len(begun)]]]
    chosen[: len(whole)] = whole


# Name in the recipe -> how negatives are drawn.
CANDIDATE_LISTS: dict[str, Callable[[Batch], Ints]] = {"uniform": uniform, "popularity": popularity, "hard": hard}
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


@dataclass(frozen=True)
class DrawnLists:
    """The lists of some users in one split; items are indices of the catalogue."""

    users: Ints  # [B], positions in the sequences
    targets: Ints  # [B]
    lists: dict[str, Ints]  # kind -> [B, num_candidates]


class CandidateDraw:
    """Draws the lists of a data set, users in the order of their sequences.

    Args:
        similar: item-kNN, fitted on training parts only; needed for hard lists. `tied` counts hard negatives, see
            `Batch`.

    Raises:
        InputError: if a user leaves fewer negatives than are needed, with the numbers.
    """

    def __init__(
        self, config: CandidateConfig, table: SequenceTable, num_items: int, seed: int, similar: SimilarItems | None
    ):
        self._config, self._table, self._num_items, self._seed, self._similar = config, table, num_items, seed, similar
        self.tied: Counter[str] = Counter()
        self._hashes = id_hashes(table.user_ids)
        self._trained = table.item[table.is_training]
        pairs = np.unique(table.user.astype(np.int64) * (num_items + 1) + table.item)  # [distinct (user, item)]
        self._own = pairs % (num_items + 1)
        self._begins = np.searchsorted(pairs, np.arange(len(table) + 1) * (num_items + 1))  # [U + 1], in `_own`
        counts = np.diff(self._begins)  # [U]
        most = int(counts.argmax())
        if (left := num_items - int(counts[most])) < config.num_candidates - 1:
            raise InputError(
                f"user {table.user_ids[most]} interacted with {counts[most]} of {num_items} items, which leaves {left} "
                f"possible negatives; num_candidates {config.num_candidates} needs {config.num_candidates - 1}: lower "
                "num_candidates, or keep more items (k_core)"
            )

    def batches(self, split: Split, size: int = _BATCH) -> Iterator[DrawnLists]:
        """Yield the lists of all users with a target in the split; for training, only the list that prompts show."""
        users = np.flatnonzero(self._table.target_position(split) >= 0)
        for start in range(0, len(users), size):
            yield self._drawn(split, users[start : start + size])

    def _drawn(self, split: Split, users: Ints) -> DrawnLists:
        config, table = self._config, self._table
        kinds = [config.prompt_list] if split == "train" else config.candidate_lists
        at = (table.begins[:-1] + table.target_position(split))[users]  # [B]
        targets = table.item[at].astype(np.int64)
        sizes = (self._begins[1:] - self._begins[:-1])[users]
        begins = np.r_[0, np.cumsum(sizes)]
        own = self._own[np.repeat(self._begins[:-1][users] - begins[:-1], sizes) + np.arange(begins[-1])]
        scores = self._similar.scores(table, users, at) if "hard" in kinds and self._similar else None  # [B, N]
        lists = {}
        for kind in kinds:
            streams = random_streams(self._seed, self._hashes[users], split, kind)
            batch = Batch(
                config.num_candidates - 1, self._num_items, begins, own, self._trained, streams, scores,
                config.hard_pool, self.tied,
            )  # fmt: skip
            shown = np.hstack([targets[:, None], CANDIDATE_LISTS[kind](batch)])  # [B, num_candidates]
            order = random_streams(self._seed, self._hashes[users], split, kind, "order").random(0, shown.shape[1])
            lists[kind] = np.take_along_axis(shown, np.argsort(order, axis=1), axis=1)
        return DrawnLists(users, targets, lists)

    def write(self, path: Path, split: Split, catalog: ItemCatalog) -> None:
        """Write the lists of a split, records of `CandidateLists`."""
        ids = pl.Series(catalog.ids, dtype=pl.String)
        bar = progress(desc=f"candidates ({split})", unit="user", total=len(self._table))
        with atomic_path(path) as temporary, open(temporary, "wb") as out, bar:
            for drawn in self.batches(split):
                listed = {
                    kind: ids.gather(shown.ravel() - 1).reshape(shown.shape).arr.to_list()
                    for kind, shown in drawn.lists.items()
                }
                pl.DataFrame(
                    {
                        "user_id": self._table.user_ids.gather(drawn.users),
                        "target": ids.gather(drawn.targets - 1),
                        "lists": pl.DataFrame(listed).to_struct(),
                    }
                ).write_ndjson(out)
                bar.update(len(drawn.users))
