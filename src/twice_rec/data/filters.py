"""Which interactions are kept: titles, repeats, k-core, length limits, one after another, each with its counts.

1. `untitled_items: drop` drops the interactions with items that have no title.
2. `repeats: drop` keeps the first of a user's interactions with one item.
3. `k_core` drops rare items and short users until every item has at least k interactions, and every user too.
4. `min_history` drops shorter users. `longer_histories` says what becomes of users longer than `max_history`: `drop`
   them, as the release does, or `cut` them to their latest interactions. No k-core follows, as in the release, so items
   may then be rarer than `k_core`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from twice_rec.data.sources.base import Problems, Source
from twice_rec.data.sources.interactions import InteractionTable
from twice_rec.errors import InputError
from twice_rec.recipe import Settings, key, rule

logger = logging.getLogger("prepare")


class FilterConfig(Settings):
    """Which interactions are kept."""

    untitled_items: Literal["drop", "keep"] = key("drop", "items without a title: drop them, or keep the id as title")
    repeats: Literal["drop", "keep"] = key("drop", "a user's further interactions with the same item: drop or keep")
    k_core: int = key(5, "fewest interactions per item and per user, before the limits of length", ge=1)
    min_history: int = key(5, "fewest interactions per user, targets included; others are dropped after the k-core")
    max_history: int | None = key(20, "most interactions per user; null for any number")
    longer_histories: Literal["drop", "cut"] = key(
        "cut",
        "users of more than max_history interactions: drop them (the release), or cut them to their latest; no k-core "
        "follows, so items may then be rarer than k_core",
    )

    @rule
    def limits_leave_a_length(self) -> str | None:
        """The longest history is no shorter than the shortest."""
        if self.max_history is None or self.max_history >= max(self.min_history, self.k_core):
            return None
        says = f"max_history is {self.max_history}; it must be at least min_history ({self.min_history})"
        return f"{says} and k_core ({self.k_core})"


@dataclass(frozen=True)
class Step:
    """What one filter left."""

    filter: str
    users: int
    items: int
    interactions: int


def filtered(source: Source, config: FilterConfig) -> tuple[InteractionTable, list[Step]]:
    """Return the kept interactions, by user and in order, and what each filter left; InputError if that is nothing."""
    problems, table = source.problems, source.interactions()
    steps = [_step("read", table)]
    titled = source.titled(set(table.items.to_list()))  # in either case: it counts what is wrong with the metadata
    if config.untitled_items == "drop":
        keep = table.items.is_in(list(titled)).to_numpy()[table.item]  # bool [n]
        if dropped := int((~keep).sum()):
            example = table.items[int(table.item[np.argmin(keep)])]
            problems.add("purchase of an item without title, dropped", example, dropped)
        table = table.take(keep)
        steps.append(_step("untitled_items: drop", table))
    if config.repeats == "drop":
        table = without_repeats(table, problems)
        steps.append(_step("repeats: drop", table))
    table = core(table, config.k_core)
    steps.append(_step(f"k_core: {config.k_core}", table))
    table = in_time_order(table, source.ties_in_file_order)
    table = long_enough(table, config.min_history)
    steps.append(_step(f"min_history: {config.min_history}", table))
    if config.max_history is not None:
        table = short_enough(table, config.max_history, config.longer_histories)
        steps.append(_step(f"max_history: {config.max_history}, longer_histories: {config.longer_histories}", table))
    logger.info("what each filter left:\n%s", "\n".join(lines_of(steps)))
    for line in problems.lines():
        logger.warning("%s", line)
    return table, steps


def _step(name: str, table: InteractionTable) -> Step:
    users, items = (int(np.count_nonzero(np.bincount(codes))) for codes in (table.user, table.item))
    return Step(name, users, items, len(table))


def lines_of(steps: list[Step]) -> list[str]:
    """Return the steps as the lines of a table."""
    width = max(len(step.filter) for step in steps)
    head = f"{'':{width}} {'users':>13} {'items':>13} {'interactions':>13}"
    return [head, *(f"{s.filter:{width}} {s.users:13,} {s.items:13,} {s.interactions:13,}" for s in steps)]


def without_repeats(table: InteractionTable, problems: Problems) -> InteractionTable:
    """Keep the first interaction in time of each user with each item; the others are counted."""
    pairs = table.user.astype(np.int64) * max(1, len(table.items)) + table.item  # [n]
    ordered = np.sort(pairs)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not len(repeated):
        return table
    users = np.zeros(len(table.users), dtype=bool)
    users[repeated // len(table.items)] = True
    rows = np.flatnonzero(users[table.user])  # of users who repeat something
    rows = rows[np.isin(pairs[rows], repeated)]
    rows = rows[_time_order(table.take(rows))]
    first = np.zeros(len(rows), dtype=bool)
    first[np.unique(pairs[rows], return_index=True)[1]] = True
    keep = np.ones(len(table), dtype=bool)
    keep[again := rows[~first]] = False
    example = f"user {table.users[int(table.user[again[0]])]}, item {table.items[int(table.item[again[0]])]}"
    problems.add("repeated purchase of an item, first kept", example, len(again))
    return table.take(keep)


def core(table: InteractionTable, k_core: int) -> InteractionTable:
    """Drop rare items and short users until every one left has `k_core` interactions; InputError if none is left."""
    user, item, rows = table.user, table.item, np.arange(len(table))
    while len(rows):
        users = np.bincount(user, minlength=len(table.users))  # interactions per user
        items = np.bincount(item, minlength=len(table.items))  # interactions per item
        keep = (users[user] >= k_core) & (items[item] >= k_core)  # bool [n]
        if keep.all():
            return table.take(rows) if len(rows) < len(table) else table
        user, item, rows = user[keep], item[keep], rows[keep]
    raise InputError(
        f"no user is left of {len(table):,} interactions: no group of users with at least {k_core} items each and "
        f"items with at least {k_core} users each; lower k_core ({k_core})"
    )


def in_time_order(table: InteractionTable, ties_in_file_order: bool = False) -> InteractionTable:
    """Sort by user (in order of first appearance), then time; without times, by the source's order.

    Interactions of one moment are ordered by item id, or in the source's order.
    """
    return table.take(_time_order(table, ties_in_file_order))


def _time_order(table: InteractionTable, ties_in_file_order: bool = False) -> NDArray[np.int64]:
    """Return the rows of a table in order, see `in_time_order`: int64 [n]."""
    if not table.timestamp.any():
        return np.argsort(table.user, kind="stable")
    if ties_in_file_order:
        return np.lexsort((table.timestamp, table.user))
    by_id = np.zeros(len(table.items), dtype=np.int32)  # [items], place of an id in the order of those that occur
    occur = np.unique(table.item)
    by_id[occur] = table.items.gather(occur).rank("ordinal").to_numpy()
    return np.lexsort((by_id[table.item], table.timestamp, table.user))


def long_enough(table: InteractionTable, min_history: int) -> InteractionTable:
    """Drop the users with fewer interactions; InputError if none is left."""
    lengths = np.bincount(table.user)  # [users]
    keep = lengths[table.user] >= min_history
    if not keep.any():
        raise InputError(
            f"no user is left of {len(table):,} interactions: none has at least {min_history} items, the longest has "
            f"{lengths.max()}; lower min_history ({min_history}), or k_core if items were too rare"
        )
    return table if keep.all() else table.take(keep)


def short_enough(
    table: InteractionTable, max_history: int, longer_histories: Literal["drop", "cut"]
) -> InteractionTable:
    """Cut the longer users of an ordered table to their latest interactions, or drop them; InputError if all are."""
    if longer_histories == "cut":
        end = np.searchsorted(table.user, table.user, side="right")  # [n], where the user's rows end
        return table.take(end - np.arange(len(table)) <= max_history)
    lengths = np.bincount(table.user)  # [users]
    keep = lengths[table.user] <= max_history
    if not keep.any():
        raise InputError(
            f"no user is left of {len(table):,} interactions: all have more than {max_history} items; raise "
            f"max_history ({max_history}), or set longer_histories to cut"
        )
    return table.take(keep)
