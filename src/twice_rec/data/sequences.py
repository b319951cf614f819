"""From a table of interactions to user sequences: duplicates, order, length limits, k-core, splits, statistics.

Order: by time; ties by item id; the source's own order if it has no times at all. The first of several interactions of
a user with one item counts. What remains satisfies all limits at once: every user has between `min_history` (at least
`k_core`) and `max_history` interactions, every item at least `k_core` users.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from twice_rec.catalog import ItemCatalog
from twice_rec.data.sources.base import InteractionTable, Problems, Source
from twice_rec.errors import InputError
from twice_rec.recipe import Settings, key, rule
from twice_rec.records import SPLITS, Interaction, Item, UserSequence

SplitPoints = tuple[int, int | None, int | None]  # num_train, valid, test; see `records.UserSequence`


class SequenceConfig(Settings):
    """Which interactions are kept, and how they are split."""

    untitled_items: Literal["drop", "keep"] = key("drop", "items without a title: drop them, or keep the id as title")
    k_core: int = key(5, "fewest users per item and fewest items per user", ge=1)
    min_history: int = key(5, "fewest interactions per user, targets included")
    max_history: int | None = key(20, "most recent interactions that are kept per user; null for all")
    split: Literal["leave_one_out", "temporal"] = key("leave_one_out", "how targets are chosen")
    temporal_valid: float = key(0.1, "temporal split: share of the interactions in the validation period")
    temporal_test: float = key(0.1, "temporal split: share of the interactions in the test period")

    @rule
    def histories_have_every_target(self) -> str | None:
        """A user needs a history and a target per split."""
        needed = 3 if self.split == "leave_one_out" else 2
        if self.min_history >= needed:
            return None
        says = f"min_history is {self.min_history}; {self.split} needs at least {needed}"
        return f"{says}: a history, and a target for each split"

    @rule
    def limits_leave_a_length(self) -> str | None:
        """The longest history is no shorter than the shortest."""
        if self.max_history is None or self.max_history >= max(self.min_history, self.k_core):
            return None
        says = f"max_history is {self.max_history}; it must be at least min_history ({self.min_history})"
        return f"{says} and k_core ({self.k_core})"

    @rule
    def periods_leave_training(self) -> str | None:
        """Both later periods are not empty, nor is the training period."""
        valid, test = self.temporal_valid, self.temporal_test
        if valid > 0 and test > 0 and valid + test < 1:
            return None
        return f"temporal_valid {valid} and temporal_test {test} must be above 0 and leave a share for training"


def assemble(source: Source, config: SequenceConfig) -> tuple[ItemCatalog, list[UserSequence]]:
    """Return the catalogue and all sequences in the source's order; InputError if nothing is left or no split fits."""
    problems, table = source.problems, source.interactions()
    titled = source.titled(set(table.items))  # in either case, because it counts what is wrong with the metadata
    if config.untitled_items == "drop":
        keep = np.array([item_id in titled for item_id in table.items])[table.item]  # bool [n]
        if dropped := int((~keep).sum()):
            problems.add("purchase of an item without title, dropped", table.items[table.item[~keep][0]], dropped)
        table = table.take(keep)
    table = without_duplicates(in_time_order(table), problems)
    table = core(table, config.k_core, config.min_history, config.max_history)
    catalog = _catalog(source, {table.items[code] for code in np.unique(table.item)})
    return catalog, _sequences(table, source.reviews(set(table.line.tolist())), config)


def _catalog(source: Source, wanted: set[str]) -> ItemCatalog:
    """Return the items in the source's order, then those it does not describe; an item without title gets its id."""
    described = source.items(wanted)
    undescribed = sorted(wanted - {item.item_id for item in described})
    items = [*described, *(Item(item_id, item_id) for item_id in undescribed)]
    return ItemCatalog(item if item.title else replace(item, title=item.item_id) for item in items)


def _sequences(
    table: InteractionTable, reviews: Mapping[int, tuple[str, str]], config: SequenceConfig
) -> list[UserSequence]:
    """Return one sequence per user of a table that is grouped by user and ordered by time."""
    temporal_split = config.split == "temporal"
    cuts = temporal_cuts(table.timestamp, config.temporal_valid, config.temporal_test) if temporal_split else None
    sequences = []
    for rows in np.split(np.arange(len(table)), np.flatnonzero(np.diff(table.user)) + 1):
        user = table.take(rows)
        points = temporal(user.timestamp, *cuts) if cuts else leave_one_out(len(user))
        columns = (column.tolist() for column in (user.item, user.timestamp, user.rating, user.line))
        interactions = tuple(
            Interaction(table.items[item], time, None if rating != rating else rating, *reviews.get(line, ("", "")))
            for item, time, rating, line in zip(*columns, strict=True)
        )
        sequences.append(UserSequence(table.users[user.user[0]], interactions, *points))
    return sequences


def in_time_order(table: InteractionTable) -> InteractionTable:
    """Sort by user (in order of first appearance), then time, then item id; without times, by the source's order."""
    if table.timestamp.any():
        by_id = np.argsort(np.argsort(np.array(table.items, dtype=object)))  # [items], place of an id in their order
        return table.take(np.lexsort((by_id[table.item], table.timestamp, table.user)))
    return table.take(np.argsort(table.user, kind="stable"))


def without_duplicates(table: InteractionTable, problems: Problems) -> InteractionTable:
    """Keep the first interaction of each (user, item) of an ordered table; the others are counted."""
    pairs = table.user.astype(np.int64) * len(table.items) + table.item  # [n]
    _, first = np.unique(pairs, return_index=True)
    if repeats := len(table) - len(first):
        again = np.setdiff1d(np.arange(len(table)), first, assume_unique=True)[0]
        example = f"user {table.users[table.user[again]]}, item {table.items[table.item[again]]}"
        problems.add("repeated purchase of an item, first kept", example, repeats)
    return table.take(np.sort(first))


def core(table: InteractionTable, k_core: int, min_history: int, max_history: int | None) -> InteractionTable:
    """Cut an ordered table to each user's latest rows, drop rare items and short users; InputError if none is left."""
    found = len(table)
    if max_history is not None:
        end = np.searchsorted(table.user, table.user, side="right")  # [n], where the user's rows end
        table = table.take(end - np.arange(found) <= max_history)
    shortest = max(k_core, min_history)
    while len(table):
        users = np.bincount(table.user, minlength=len(table.users))  # interactions per user
        items = np.bincount(table.item, minlength=len(table.items))  # interactions per item
        keep = (users[table.user] >= shortest) & (items[table.item] >= k_core)  # bool [n]
        if keep.all():
            return table
        table = table.take(keep)
    raise InputError(
        f"no user is left of {found:,} interactions: no group of users with at least {shortest} items each and items "
        f"with at least {k_core} users each; lower k_core ({k_core}) or min_history ({min_history})"
    )


def leave_one_out(length: int) -> SplitPoints:
    """Take the last item as test target, the one before as validation target; InputError for less than 3 items."""
    if length < 3:
        raise InputError(f"leave-one-out needs 3 interactions (history, validation and test target), found {length}")
    return length - 2, length - 2, length - 1


def temporal(timestamps: NDArray[np.int64], valid_from: int, test_from: int) -> SplitPoints:
    """Split at times that hold for everyone; the first interaction of each later period is a target.

    Args:
        timestamps: int64 [n] of one user, ascending.
        valid_from, test_from: start of the validation and of the test period; what is before is for training.
    """
    num_train = int(np.searchsorted(timestamps, valid_from, side="left"))
    first_test = int(np.searchsorted(timestamps, test_from, side="left"))
    valid = num_train if 0 < num_train < first_test else None
    test = first_test if 0 < first_test < len(timestamps) else None
    return num_train, valid, test


def temporal_cuts(timestamps: NDArray[np.int64], valid_share: float, test_share: float) -> tuple[int, int]:
    """Return the starts of the validation and of the test period, which hold these shares of all interactions.

    Raises:
        InputError: if the source has no times, or one moment holds so many interactions that a period is empty.
    """
    if not timestamps.any():
        raise InputError("split temporal needs times, and this source has none; use split: leave_one_out")
    ordered = np.sort(timestamps)
    valid_from = int(ordered[int(len(ordered) * (1 - valid_share - test_share))])
    test_from = int(ordered[int(len(ordered) * (1 - test_share))])
    if not ordered[0] < valid_from < test_from:
        raise InputError(
            f"the temporal cuts fall on the same moment ({valid_from} and {test_from} ms, the first "
            f"interaction at {ordered[0]}); use larger shares in temporal_valid and temporal_test"
        )
    return valid_from, test_from


def statistics(sequences: Sequence[UserSequence], catalog: ItemCatalog) -> dict[str, float | int]:
    """Count users, items, interactions, lengths, targets per split, cold targets, ambiguous titles; and the density.

    A target is cold if its item occurs in nobody's training part.
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
