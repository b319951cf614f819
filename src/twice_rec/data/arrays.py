"""The prepared files as arrays of item indices, for CF models: no record per interaction, and no texts.

A file that cannot be read this way is read again record by record, which names the line and what is wrong with it.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twice_rec.catalog import ItemCatalog
from twice_rec.errors import InputError
from twice_rec.item_sequences import ItemSequences
from twice_rec.records import Split

_SEQUENCE = {
    "user_id": pl.String,
    "interactions": pl.List(pl.Struct({"item_id": pl.String})),
    "num_train": pl.Int64,
    "valid": pl.Int64,
    "test": pl.Int64,
}


@dataclass(frozen=True, eq=False)
class InteractionArrays:
    """All users, in the order of `sequences.jsonl`."""

    user_ids: list[str]
    sequences: ItemSequences
    num_train: NDArray[np.int64]  # [users], see `records.UserSequence`
    valid: NDArray[np.int64]  # [users], -1 if the user has no such target
    test: NDArray[np.int64]

    def target_position(self, split: Split) -> NDArray[np.int64]:
        """Return the position of every user's target in the user's sequence, int64 [users]; -1 if there is none."""
        if split == "train":
            return np.where(self.num_train >= 2, self.num_train - 1, -1)
        return self.valid if split == "valid" else self.test


def read_interactions(path: Path, catalog: ItemCatalog, read_records: Callable[[], object]) -> InteractionArrays:
    """Read `sequences.jsonl`.

    Args:
        read_records: reads the file record by record, and raises an InputError if one is wrong.
    """
    try:
        rows = _scanned(path, _SEQUENCE)
        required = rows.select("user_id", "interactions", "num_train")
        lengths = rows["interactions"].list.len().cast(pl.Int64).to_numpy()  # [users]
        codes = _codes(rows["interactions"].explode(empty_as_null=False).struct.field("item_id"), catalog)  # [T]
        num_train, valid, test = (rows[name].fill_null(-1).to_numpy() for name in ("num_train", "valid", "test"))
        last = np.stack([num_train - 1, valid, test]).max(axis=0)  # [users]
        whole = not required.null_count().sum_horizontal().item() and len(rows) and bool((last < lengths).all())
    except (pl.exceptions.PolarsError, OSError):
        whole = False
    if not whole:
        read_records()
        raise InputError(f"{path}: a user's targets lie beyond the user's interactions; run prepare.sh again")
    ends = lengths.cumsum()
    sequences = ItemSequences(codes, ends - lengths, ends)
    return InteractionArrays(rows["user_id"].to_list(), sequences, num_train, valid, test)


def stored_kinds(path: Path, read_records: Callable[[], object]) -> list[str]:
    """Return the names of the lists in a file of candidates, as its first line has them."""
    try:
        with open(path, encoding="utf-8") as file:
            return list(json.loads(file.readline())["lists"])
    except (OSError, ValueError, KeyError, TypeError):
        read_records()
        raise


def require_kinds(path: Path, kinds: Sequence[str], read_records: Callable[[], object]) -> None:
    """Raise an InputError if a file of candidates lacks a kind of lists."""
    stored = stored_kinds(path, read_records)
    for kind in kinds:
        if kind not in stored:
            raise InputError(
                f"{path} has the lists {', '.join(stored)}, not {kind}; add it to candidate_lists in prepare.yaml and "
                "run prepare.sh again, or leave it out of lists"
            )


def read_lists(
    path: Path, user_ids: Sequence[str], kinds: Sequence[str], catalog: ItemCatalog, read_records: Callable[[], object]
) -> dict[str, NDArray[np.int32]]:
    """Read some kinds of the candidate lists of some users: kind -> int32 [users, C].

    Raises:
        InputError: if a kind is not stored, or a user has no lists.
    """
    require_kinds(path, kinds, read_records)
    schema = {"user_id": pl.String, "lists": pl.Struct({kind: pl.List(pl.String) for kind in kinds})}
    try:
        rows = _scanned(path, schema)
        lists = {kind: rows["lists"].struct.field(kind) for kind in kinds}
        found = {kind: _codes(of.explode(empty_as_null=False), catalog) for kind, of in lists.items()}  # [users * C]
        sizes = {kind: of.list.len().unique().to_list() for kind, of in lists.items()}
        whole = not rows["user_id"].null_count() and all(len(size) == 1 and size[0] for size in sizes.values())
    except (pl.exceptions.PolarsError, OSError):
        whole = False
    if not whole:
        read_records()
        raise InputError(f"{path}: candidate lists of different lengths, or of unknown items; run prepare.sh again")
    row_of = {user_id: row for row, user_id in enumerate(rows["user_id"])}
    if missing := next((user_id for user_id in user_ids if user_id not in row_of), None):
        raise InputError(f"{path}: user {missing} has no stored candidates; run prepare.sh again")
    positions = np.array([row_of[user_id] for user_id in user_ids], dtype=np.int64)
    return {kind: found[kind].reshape(len(rows), -1)[positions] for kind in kinds}


def _scanned(path: Path, schema: Mapping[str, Any]) -> pl.DataFrame:
    """Return some keys of a file's records as columns; a PolarsError if it does not fit."""
    one = glob.escape(str(path))  # polars would take the name for a pattern
    return pl.scan_ndjson(one, schema=schema, low_memory=True).collect(engine="streaming")


def _codes(item_ids: pl.Series, catalog: ItemCatalog) -> NDArray[np.int32]:
    """Return the indices of items, int32 [T]; a PolarsError if one is not in the catalogue."""
    if item_ids.null_count():
        raise pl.exceptions.InvalidOperationError("an item without id")
    return item_ids.cast(pl.Enum(list(catalog.ids))).to_physical().to_numpy().astype(np.int32) + 1
