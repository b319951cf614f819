"""From the kept interactions to user sequences: catalogue, order, splits, statistics, and their file.

Order: by time; ties by item id; the source's own order if it has no times at all.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twice_rec.catalog import ItemCatalog
from twice_rec.data.filters import FilterConfig, Step, filtered
from twice_rec.data.sources.base import Source
from twice_rec.data.sources.interactions import InteractionTable
from twice_rec.errors import InputError
from twice_rec.files import atomic_path
from twice_rec.progress import progress
from twice_rec.recipe import key, rule
from twice_rec.records import SPLITS, Interaction, Item, Split, UserSequence

Ints = NDArray[np.int64]
SplitPoints = tuple[Ints, Ints, Ints]  # [users] each: num_train, valid, test; -1 for none; see `records.UserSequence`

logger = logging.getLogger("prepare")

_MANY_TIED = 0.05  # share of the targets
_BATCH = 2_000_000  # interactions whose texts are in memory together


class SequenceConfig(FilterConfig):
    """Which interactions are kept, how they are split, and how long titles are."""

    title_chars: int | None = key(None, "longest title in characters, cut behind a word; null for no cut", ge=10)
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
    def periods_leave_training(self) -> str | None:
        """Both later periods are not empty, nor is the training period."""
        valid, test = self.temporal_valid, self.temporal_test
        if valid > 0 and test > 0 and valid + test < 1:
            return None
        return f"temporal_valid {valid} and temporal_test {test} must be above 0 and leave a share for training"


@dataclass(frozen=True)
class SequenceTable:
    """All sequences as columns: U users with n interactions in all, in the order of `sequences.jsonl`."""

    user_ids: pl.Series  # String [U]
    begins: Ints  # [U + 1], a user's interactions are begins[i]:begins[i + 1]
    item: NDArray[np.int32]  # [n], index in the catalogue, 1..N
    timestamp: Ints  # [n], milliseconds, 0 if unknown
    rating: NDArray[np.float32]  # [n], NaN if unknown
    line: Ints  # [n], by which the source finds the review
    num_train: Ints  # [U]
    valid: Ints  # [U], -1 for none
    test: Ints  # [U]

    def __len__(self) -> int:
        return len(self.num_train)

    @cached_property
    def user(self) -> NDArray[np.int32]:
        """The user of each interaction: [n], 0..U-1."""
        return np.repeat(np.arange(len(self), dtype=np.int32), np.diff(self.begins))

    @cached_property
    def is_training(self) -> NDArray[np.bool_]:
        """Whether an interaction may be trained on: [n]."""
        return np.arange(len(self.item)) < (self.begins[:-1] + self.num_train)[self.user]

    def target_position(self, split: Split) -> Ints:
        """Return the position of each user's target, -1 without one: [U]; see `UserSequence.target_position`."""
        if split == "train":
            return np.where(self.num_train >= 2, self.num_train - 1, -1)
        return self.valid if split == "valid" else self.test

    def targets(self, split: Split) -> Ints:
        """Return where in the n interactions the targets of the users with one are: [users with a target]."""
        position = self.target_position(split)
        return (self.begins[:-1] + position)[position >= 0]

    def records(self, catalog: ItemCatalog) -> Iterator[UserSequence]:
        """Yield the sequences, without the texts of the reviews."""
        ids, points = catalog.ids, (column.tolist() for column in (self.num_train, self.valid, self.test))
        bounds = zip(self.user_ids, self.begins.tolist(), self.begins[1:].tolist(), *points, strict=False)
        for user_id, begin, end, num_train, valid, test in bounds:
            columns = zip(*(c[begin:end].tolist() for c in (self.item, self.timestamp, self.rating)), strict=True)
            interactions = tuple(
                Interaction(ids[item - 1], time, None if rating != rating else rating) for item, time, rating in columns
            )
            yield UserSequence(
                user_id, interactions, num_train, None if valid < 0 else valid, None if test < 0 else test
            )


def assemble(source: Source, config: SequenceConfig) -> tuple[ItemCatalog, SequenceTable, list[Step]]:
    """Return the catalogue, all sequences in the source's order, and the counts after each filter.

    Raises:
        InputError: if nothing is left or no split fits.
    """
    table, steps = filtered(source, config)
    codes = np.unique(table.item)  # of the kept items
    ids = table.items.gather(codes).to_list()
    catalog = _catalog(source, set(ids), config.title_chars)
    index = np.zeros(len(table.items), dtype=np.int32)  # [items]
    index[codes] = catalog.indices(ids)
    begins = np.r_[0, np.flatnonzero(np.diff(table.user)) + 1, len(table)]  # [U + 1]
    points = _split(table, begins, config)
    users = table.users.gather(table.user[begins[:-1]])
    columns = (table.timestamp, table.rating, table.line)
    return catalog, SequenceTable(users, begins, index[table.item], *columns, *points), steps


def _catalog(source: Source, wanted: set[str], title_chars: int | None) -> ItemCatalog:
    """Return the items in the source's order, then those it does not describe; an item without title gets its id."""
    described = source.items(wanted)
    undescribed = sorted(wanted - {item.item_id for item in described})
    items = [*described, *(Item(item_id, item_id) for item_id in undescribed)]
    return ItemCatalog(replace(item, title=_short(item.title, title_chars) or item.item_id) for item in items)


def _short(title: str, limit: int | None) -> str:
    """Return a title, without its last words and the marks before them if it is too long."""
    if limit is None or len(title) <= limit:
        return title
    words = title[: limit + 1].rpartition(" ")[0] or title[:limit]
    return re.sub(r"[^\w)\]]+$", "", words) or words


def _split(table: InteractionTable, begins: Ints, config: SequenceConfig) -> SplitPoints:
    if config.split == "leave_one_out":
        return leave_one_out(np.diff(begins))
    return temporal(
        table.timestamp, begins, *temporal_cuts(table.timestamp, config.temporal_valid, config.temporal_test)
    )


def leave_one_out(lengths: Ints) -> SplitPoints:
    """Take the last item as test target, the one before as validation target; InputError for less than 3 items.

    Args:
        lengths: int64 [U], interactions per user.
    """
    if (least := int(lengths.min())) < 3:
        raise InputError(f"leave-one-out needs 3 interactions (history, validation and test target), found {least}")
    return lengths - 2, lengths - 2, lengths - 1


def temporal(timestamps: Ints, begins: Ints, valid_from: int, test_from: int) -> SplitPoints:
    """Split at times that hold for everyone; the first interaction of each later period is a target.

    Args:
        timestamps: int64 [n], ascending within each user.
        begins: int64 [U + 1], where each user's interactions begin.
        valid_from, test_from: start of the validation and of the test period; what is before is for training.
    """
    num_train, first_test = (
        np.add.reduceat(timestamps < start, begins[:-1], dtype=np.int64) for start in (valid_from, test_from)
    )  # [U]
    valid = np.where((num_train > 0) & (num_train < first_test), num_train, -1)
    test = np.where((first_test > 0) & (first_test < np.diff(begins)), first_test, -1)
    return num_train, valid, test


def temporal_cuts(timestamps: NDArray[np.int64], valid_share: float, test_share: float) -> tuple[int, int]:
    """Return the starts of the validation and of the test period, which hold these shares of all interactions.

    Raises:
        InputError: if the source has no times, or one moment holds so many interactions that a period is empty.
    """
    if not timestamps.any():
        raise InputError("split temporal needs times, and this source has none; use split: leave_one_out")
    ordered = np.sort(timestamps)
    valid_from, test_from = (
        int(ordered[min(int(len(ordered) * before), len(ordered) - 1)])  # a tiny share has one interaction
        for before in (1 - valid_share - test_share, 1 - test_share)
    )
    if not ordered[0] < valid_from < test_from:
        raise InputError(
            f"the temporal cuts fall on the same moment ({valid_from} and {test_from} ms, the first "
            f"interaction at {ordered[0]}); use larger shares in temporal_valid and temporal_test"
        )
    return valid_from, test_from


def statistics(table: SequenceTable, catalog: ItemCatalog) -> dict[str, float | int]:
    """Count users, items, interactions, lengths, targets per split, cold targets, ambiguous titles; and the density.

    A target is cold if its item occurs in nobody's training part. `targets_at_the_time_of_their_history` is the share
    of all targets that have the time of an interaction before them, so that their order is not known; it is left out
    if the source has no times.
    """
    lengths, trained = np.diff(table.begins), np.zeros(len(catalog) + 1, dtype=bool)  # [U], [N + 1]
    trained[table.item[table.is_training]] = True
    figures: dict[str, float | int] = {
        "users": len(table),
        "items": len(catalog),
        "interactions": int(lengths.sum()),
        "length_min": int(lengths.min()),
        "length_mean": float(lengths.mean()),
        "length_max": int(lengths.max()),
        "density": float(lengths.sum() / (len(table) * len(catalog))),
        "ambiguous_titles": catalog.ambiguous_titles,
    }
    for split in SPLITS:
        targets = table.targets(split)
        figures[f"{split}_targets"] = len(targets)
        if split != "train":
            figures[f"{split}_cold_targets"] = int((~trained[table.item[targets]]).sum())
    everywhere = np.concatenate([table.targets(split) for split in SPLITS])  # each has an interaction before it
    if table.timestamp.any() and len(everywhere):
        tied = table.timestamp[everywhere] == table.timestamp[everywhere - 1]
        figures["targets_at_the_time_of_their_history"] = float(tied.mean())
    return figures


def log_figures(figures: Mapping[str, Any]) -> None:
    """Log the statistics, but for the filters' steps, and whether the order of many targets is not known."""
    for name, value in figures.items():
        if name != "steps":
            logger.info("  %-20s %s", name, f"{value:,.6g}" if isinstance(value, float) else value)
    if (tied := figures.get("targets_at_the_time_of_their_history", 0)) >= _MANY_TIED:
        logger.warning("%.0f %% of the targets have the time of an interaction before them: their order is by item id "
                       "or the file's, and a model may seem to see the future", 100 * tied)  # fmt: skip


def write_sequences(path: Path, table: SequenceTable, catalog: ItemCatalog, source: Source) -> None:
    """Write `sequences.jsonl`, records of `UserSequence` with the texts of the reviews, some users at a time."""
    ids = pl.Series(catalog.ids, dtype=pl.String)
    places = np.searchsorted(table.begins, np.arange(_BATCH, table.begins[-1] + _BATCH, _BATCH), side="right") - 1
    bounds = np.unique(np.r_[0, np.maximum(places, 1), len(table)])  # of the batches, in users
    with atomic_path(path) as temporary, open(temporary, "wb") as out:
        for first, end in progress(list(pairwise(bounds.tolist())), desc="writing sequences", unit="batch"):
            users, rows = slice(first, end), slice(table.begins[first], table.begins[end])
            texts = source.review_texts(table.line[rows])
            interactions = pl.DataFrame(
                {
                    "item_id": ids.gather(table.item[rows] - 1),
                    "timestamp": table.timestamp[rows],
                    "rating": pl.Series(table.rating[rows]).cast(pl.Float64).fill_nan(None),
                    "review_title": texts["title"],
                    "review_text": texts["text"],
                }
            ).to_struct("interactions")
            frame = pl.DataFrame({"user": table.user[rows], "interactions": interactions})
            points = (("num_train", table.num_train), ("valid", table.valid), ("test", table.test))
            frame.group_by("user", maintain_order=True).agg("interactions").select(
                table.user_ids[users].alias("user_id"),
                "interactions",
                *(pl.Series(name, values[users]).replace(-1, None) for name, values in points),
            ).write_ndjson(out)
