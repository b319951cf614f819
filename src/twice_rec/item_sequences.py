"""Sequences of item indices as arrays: millions of users fit in memory, and a batch is one indexing operation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import overload

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class ItemSequences(Sequence[NDArray[np.int32]]):
    """U sequences of item indices 1..N, oldest first; each is a piece of one long array, and pieces may overlap.

    So a user's training part and the histories of both targets are views of the same numbers. It is read like a list of
    arrays; a slice or an array of positions gives the sequences of some users, without a copy of their items.
    """

    items: NDArray[np.int32]  # [T]
    starts: NDArray[np.int64]  # [U], where each sequence begins in `items`
    ends: NDArray[np.int64]  # [U], where it ends

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]] | ItemSequences) -> ItemSequences:
        """Return sequences as arrays; what is in arrays already comes back as it is."""
        if isinstance(sequences, ItemSequences):
            return sequences
        lengths = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences))  # [U]
        ends = lengths.cumsum()  # [U]
        items = np.fromiter(chain.from_iterable(sequences), dtype=np.int32, count=int(lengths.sum()))  # [T]
        return cls(items, ends - lengths, ends)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The number of items of each sequence: int64 [U]."""
        return self.ends - self.starts

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, users: int) -> NDArray[np.int32]: ...
    @overload
    def __getitem__(self, users: slice | NDArray[np.integer] | NDArray[np.bool_]) -> ItemSequences: ...
    def __getitem__(self, users):  # type: ignore[no-untyped-def]
        """Return one sequence as int32 [length], or those of a slice, of positions or of a mask."""
        if isinstance(users, (int, np.integer)):
            return self.items[self.starts[users] : self.ends[users]]
        return ItemSequences(self.items, self.starts[users], self.ends[users])

    def __iter__(self) -> Iterator[NDArray[np.int32]]:
        return (self.items[start:end] for start, end in zip(self.starts.tolist(), self.ends.tolist(), strict=True))

    def latest(self, count: int) -> ItemSequences:
        """Return the last `count` items of each sequence."""
        return ItemSequences(self.items, np.maximum(self.starts, self.ends - count), self.ends)

    def windows(self, length: int) -> ItemSequences:
        """Cut longer sequences into windows of at most `length` items, from their ends on: as many or more sequences.

        A window begins with the last item of the one before, so every item but a sequence's first follows another.
        """
        count = np.maximum(1, -(-(self.lengths - 1) // (length - 1)))  # [U]
        users = np.repeat(np.arange(len(self)), count)  # [W]
        number = np.arange(len(users)) - (count.cumsum() - count)[users]  # [W], from the end of a sequence
        ends = self.ends[users] - number * (length - 1)
        return ItemSequences(self.items, np.maximum(self.starts[users], ends - length), ends)

    def without_last(self, users: NDArray[np.bool_]) -> ItemSequences:
        """Return the sequences, those of some users (a mask, [U]) without their last item."""
        return ItemSequences(self.items, self.starts, self.ends - users)

    def flat(self) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Return all items one after another and whose they are: users int64 [T], items int32 [T]."""
        lengths = self.lengths
        users = np.repeat(np.arange(len(self)), lengths)  # [T]
        offset = self.starts - (lengths.cumsum() - lengths)  # [U], from a place in the result to one in `items`
        return users, self.items[np.arange(len(users)) + offset[users]]

    def padded(self) -> NDArray[np.int64]:
        """Return int64 [U, L], with 0 behind the shorter sequences; L is the longest one's length."""
        users, items = self.flat()
        lengths = self.lengths
        table = np.zeros((len(self), int(lengths.max(initial=0))), dtype=np.int64)  # [U, L]
        table[users, np.arange(len(users)) - (lengths.cumsum() - lengths)[users]] = items
        return table


@dataclass(frozen=True, eq=False)
class Questions:
    """The questions of one split as indices, one row per user who has a target in it: which item follows the history?

    Attributes:
        users: int64 [U], positions in `sequences.jsonl`.
        user_ids: U ids.
        histories: what is before the target.
        targets: int32 [U].
        candidates: name of a list -> int32 [U, C], the target among them.
    """

    users: NDArray[np.int64]
    user_ids: Sequence[str]
    histories: ItemSequences
    targets: NDArray[np.int32]
    candidates: Mapping[str, NDArray[np.int32]]

    def take(self, rows: NDArray[np.integer]) -> Questions:
        """Return the questions at some positions."""
        candidates = {kind: shown[rows] for kind, shown in self.candidates.items()}
        ids = [self.user_ids[row] for row in rows.tolist()]
        return Questions(self.users[rows], ids, self.histories[rows], self.targets[rows], candidates)
