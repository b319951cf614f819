"""From a table of purchases to user sequences: duplicates, order, length limits, k-core, splits, statistics.

Order: by time; ties by item id; where the source has no times at all, by its own order. Of a user's purchases of one
item the first counts. What remains satisfies all limits at once: every user has between `min_history` (at least
`k_core`) and `max_history` interactions, every item at least `k_core` users.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from twice_rec.catalog import ItemCatalog
from twice_rec.data.sources.base import Problems, PurchaseTable, Source
from twice_rec.errors import InputError
from twice_rec.records import SPLITS, Interaction, Item, UserSequence


def in_time_order(table: PurchaseTable) -> PurchaseTable:
    """Sort by user (in order of first appearance), then time, then item id; without times, by the source's order."""
    if table.timestamp.any():
        by_id = np.empty(len(table.items), dtype=np.int64)
        by_id[np.argsort(np.array(table.items, dtype=object), kind="stable")] = np.arange(len(table.items))
        return table.take(np.lexsort((by_id[table.item], table.timestamp, table.user)))
    return table.take(np.argsort(table.user, kind="stable"))


def without_duplicates(table: PurchaseTable, problems: Problems) -> PurchaseTable:
    """Keep the first purchase of each (user, item) of an ordered table; the others are counted."""
    pairs = table.user.astype(np.int64) * len(table.items) + table.item
    _, first = np.unique(pairs, return_index=True)
    if repeats := len(table) - len(first):
        again = np.setdiff1d(np.arange(len(table)), first, assume_unique=True)[0]
        example = f"user {table.users[table.user[again]]}, item {table.items[table.item[again]]}"
        problems.add("repeated purchase of an item, first kept", example, repeats)
    return table.take(np.sort(first))


def core(table: PurchaseTable, k_core: int, min_history: int, max_history: int | None) -> PurchaseTable:
    """Cut long histories to their most recent part, then drop rare items and short users until none is left.

    Args:
        table: ordered, without duplicates.
        k_core: items need this many users, users this many items.
        min_history: users need this many interactions, if that is more.
        max_history: users keep this many most recent interactions; None for all.

    Raises:
        InputError: where nobody is left.
    """
    found = len(table)
    if max_history is not None:
        table = table.take(_position_from_end(table.user) < max_history)
    need = max(k_core, min_history)
    while len(table):
        users = np.bincount(table.user, minlength=len(table.users))
        items = np.bincount(table.item, minlength=len(table.items))
        keep = (users[table.user] >= need) & (items[table.item] >= k_core)
        if keep.all():
            return table
        table = table.take(keep)
    raise InputError(
        f"no user is left of {found:,} purchases: no group of users with at least {need} items each and items with at "
        f"least {k_core} users each; lower k_core ({k_core}) or min_history ({min_history})"
    )


def _position_from_end(user: NDArray[np.int32]) -> NDArray[np.int64]:
    """For rows grouped by user: how many rows of the same user follow."""
    n = len(user)
    last = np.flatnonzero(np.append(user[1:] != user[:-1], True)) if n else np.empty(0, dtype=np.int64)
    return np.repeat(last, np.diff(np.concatenate(([-1], last)))) - np.arange(n)


def assemble(
    source: Source,
    untitled_items: Literal["drop", "keep"],
    k_core: int,
    min_history: int,
    max_history: int | None,
    temporal_shares: tuple[float, float] | None = None,
) -> tuple[ItemCatalog, list[UserSequence]]:
    """Read a source and make the catalogue and every user's sequence, in the source's order of users.

    Args:
        untitled_items: drop purchases of items without a title before the limits apply, or keep the id as title.
        k_core, min_history, max_history: see `core`.
        temporal_shares: (validation, test) shares of a temporal split; None for leave-one-out.

    Raises:
        InputError: where nothing is left, or the split is not possible.
    """
    problems = source.problems
    table = source.purchases()
    titled = source.titled(set(table.items))  # in either case, since it counts what is wrong with the metadata
    if untitled_items == "drop":
        keep = np.array([item_id in titled for item_id in table.items])[table.item]
        if dropped := int((~keep).sum()):
            problems.add("purchase of an item without title, dropped", table.items[table.item[~keep][0]], dropped)
        table = table.take(keep)
    table = core(without_duplicates(in_time_order(table), problems), k_core, min_history, max_history)
    catalog = _catalog(source, {table.items[code] for code in np.unique(table.item)})
    reviews = source.reviews(set(table.line.tolist()))
    cuts = temporal_cuts(table.timestamp, *temporal_shares) if temporal_shares else None
    sequences = []
    for rows in np.split(np.arange(len(table)), np.flatnonzero(np.diff(table.user)) + 1):
        points = temporal(table.timestamp[rows], *cuts) if cuts else leave_one_out(len(rows))
        interactions = tuple(
            Interaction(table.items[item], time, None if rating != rating else rating, *reviews.get(line, ("", "")))
            for item, time, rating, line in zip(
                table.item[rows].tolist(),
                table.timestamp[rows].tolist(),
                table.rating[rows].tolist(),
                table.line[rows].tolist(),
                strict=True,
            )
        )
        user_id = table.users[table.user[rows[0]]]
        sequences.append(UserSequence(user_id, interactions, points.num_train, points.valid, points.test))
    return catalog, sequences


def _catalog(source: Source, wanted: set[str]) -> ItemCatalog:
    described = source.items(wanted)
    undescribed = sorted(wanted - {item.item_id for item in described})
    items = [*described, *(Item(item_id, item_id) for item_id in undescribed)]
    return ItemCatalog(item if item.title else replace(item, title=item.item_id) for item in items)


@dataclass(frozen=True, slots=True)
class SplitPoints:
    """Where a user's splits fall: see `records.UserSequence`."""

    num_train: int
    valid: int | None
    test: int | None


def leave_one_out(length: int) -> SplitPoints:
    """The last item is the test target, the one before it the validation target, the rest for training.

    Raises:
        InputError: for fewer than 3 interactions.
    """
    if length < 3:
        raise InputError(f"leave-one-out needs 3 interactions (history, validation and test target), found {length}")
    return SplitPoints(length - 2, length - 2, length - 1)


def temporal(timestamps: NDArray[np.int64], valid_from: int, test_from: int) -> SplitPoints:
    """A global split in time: train before `valid_from`; each user's first purchase of each later period is a target.

    Args:
        timestamps: int64 [n], ascending, one user's.
        valid_from, test_from: start of the validation and of the test period.
    """
    num_train = int(np.searchsorted(timestamps, valid_from, side="left"))
    first_test = int(np.searchsorted(timestamps, test_from, side="left"))
    valid = num_train if 0 < num_train < first_test else None
    test = first_test if 0 < first_test < len(timestamps) else None
    return SplitPoints(num_train, valid, test)


def temporal_cuts(timestamps: NDArray[np.int64], valid_share: float, test_share: float) -> tuple[int, int]:
    """The times from which the last `test_share` and the `valid_share` before it of all purchases happened.

    Raises:
        InputError: where the source has no times, or one moment holds so many purchases that a period is empty.
    """
    if not timestamps.any():
        raise InputError("split temporal needs times, and this source has none; use split: leave_one_out")
    ordered = np.sort(timestamps)
    valid_from = int(ordered[int(len(ordered) * (1 - valid_share - test_share))])
    test_from = int(ordered[int(len(ordered) * (1 - test_share))])
    if not ordered[0] < valid_from < test_from:
        raise InputError(
            f"the temporal cuts fall on the same moment ({valid_from} and {test_from} ms, the first "
            f"purchase at {ordered[0]}); use larger shares in temporal_valid and temporal_test"
        )
    return valid_from, test_from


def statistics(sequences: Sequence[UserSequence], catalog: ItemCatalog) -> dict[str, float | int]:
    """Users, items, interactions, lengths, density, targets per split, cold targets, ambiguous titles.

    A target is cold if its item never occurs in anyone's training part.
    """
    lengths = np.array([len(sequence.interactions) for sequence in sequences])
    trained = {entry.item_id for sequence in sequences for entry in sequence.interactions[: sequence.num_train]}
    figures: dict[str, float | int] = {
        "users": len(sequences),
        "items": len(catalog),
        "interactions": int(lengths.sum()),
        "length_min": int(lengths.min()),
        "length_mean": float(lengths.mean()),
        "length_max": int(lengths.max()),
        "density": float(lengths.sum() / (len(sequences) * len(catalog))),
        "ambiguous_titles": catalog.ambiguous_titles,
    }
    for split in SPLITS:
        targets = [s.target(split).item_id for s in sequences if s.target_position(split) is not None]
        figures[f"{split}_targets"] = len(targets)
        if split != "train":
            figures[f"{split}_cold_targets"] = sum(target not in trained for target in targets)
    return figures
