"""Duplicates, order, limits and splits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twice_rec.catalog import ItemCatalog
from twice_rec.data.sequences import (
    SequenceConfig,
    assemble,
    core,
    in_time_order,
    leave_one_out,
    statistics,
    temporal,
    temporal_cuts,
    without_duplicates,
)
from twice_rec.data.sources import base
from twice_rec.data.sources.base import Problems
from twice_rec.errors import InputError
from twice_rec.records import SPLITS, Interaction, Item, UserSequence

rows = st.lists(
    st.tuples(st.sampled_from("uvwxyz"), st.sampled_from("ABCDEFGH"), st.integers(1, 20)), min_size=1, max_size=80
)


def table_of(given_rows):
    return base.table_of((user, item, time, None, line) for line, (user, item, time) in enumerate(given_rows))


def config_of(untitled_items="drop", min_history=3, **others):
    return SequenceConfig(untitled_items=untitled_items, k_core=1, min_history=min_history, max_history=None, **others)


def listed(table):
    return [
        (table.users[u], table.items[i], t) for u, i, t in zip(table.user, table.item, table.timestamp, strict=True)
    ]


class MemorySource:
    """Interactions and items from lists, for tests of what comes after a source."""

    def __init__(self, given_rows, titles=None):
        self.problems = Problems()
        self._table = table_of(given_rows)
        self._titles = titles

    def interactions(self):
        return self._table

    def titled(self, wanted):
        return {item for item in wanted if self._titles is None or item in self._titles}

    def items(self, wanted):
        return [Item(item, f"item {item}") for item in sorted(wanted) if self._titles is None or item in self._titles]

    def reviews(self, lines):
        return {line: (f"review {line}", "") for line in lines}


def test_order_is_user_then_time_then_item_id():
    table = in_time_order(table_of([("v", "B", 5), ("u", "C", 3), ("v", "A", 5), ("u", "D", 1), ("v", "Z", 4)]))
    assert listed(table) == [("v", "Z", 4), ("v", "A", 5), ("v", "B", 5), ("u", "D", 1), ("u", "C", 3)]


def test_without_times_the_source_order_stands():
    table = in_time_order(table_of([("u", "C", 0), ("v", "B", 0), ("u", "A", 0)]))
    assert listed(table) == [("u", "C", 0), ("u", "A", 0), ("v", "B", 0)]


def test_first_interaction_with_an_item_counts():
    problems = Problems()
    table = without_duplicates(
        in_time_order(table_of([("u", "A", 9), ("u", "B", 5), ("u", "A", 1), ("v", "A", 2)])), problems
    )
    assert listed(table) == [("u", "A", 1), ("u", "B", 5), ("v", "A", 2)]
    assert problems.counts == {"repeated purchase of an item, first kept": 1}
    assert problems.first["repeated purchase of an item, first kept"] == "user u, item A"


def test_long_histories_keep_their_most_recent_part():
    table = core(in_time_order(table_of([("u", item, time) for time, item in enumerate("ABCDE", 1)])), 1, 2, 3)
    assert [item for _, item, _ in listed(table)] == ["C", "D", "E"]


def test_core_drops_until_all_limits_hold():
    # D has one user; without it w has one item left; without w, C has one user; u and v remain on A and B.
    given_rows = [
        ("u", "A", 1),
        ("u", "B", 2),
        ("v", "A", 1),
        ("v", "B", 2),
        ("w", "C", 1),
        ("w", "D", 2),
        ("u", "C", 3),
    ]
    assert listed(core(in_time_order(table_of(given_rows)), 2, 2, None)) == [
        ("u", "A", 1), ("u", "B", 2), ("v", "A", 1), ("v", "B", 2),
    ]  # fmt: skip


def test_nobody_left_says_the_limits():
    with pytest.raises(InputError, match=r"no user is left of 2 interactions.*lower k_core \(3\) or min_history \(5\)"):
        core(table_of([("u", "A", 1), ("u", "B", 2)]), 3, 5, None)


@given(rows, st.integers(1, 3), st.integers(1, 4), st.none() | st.integers(4, 6))
def test_core_holds_all_limits(given_rows, k_core, min_history, max_history):
    table = without_duplicates(in_time_order(table_of(given_rows)), Problems())
    try:
        kept = core(table, k_core, min_history, max_history)
    except InputError:
        return
    users = np.bincount(kept.user)
    items = np.bincount(kept.item)
    assert users[users > 0].min() >= max(k_core, min_history)
    assert items[items > 0].min() >= k_core
    assert max_history is None or users.max() <= max_history
    pairs = list(zip(kept.user.tolist(), kept.item.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)


@given(rows)
def test_leave_one_out_has_no_target_in_its_own_history(given_rows):
    try:
        _, sequences = assemble(MemorySource(given_rows), config_of())
    except InputError:
        return
    for sequence in sequences:
        times = [entry.timestamp for entry in sequence.interactions]
        assert times == sorted(times)
        for split in SPLITS:
            if sequence.target_position(split) is not None:
                history = [entry.item_id for entry in sequence.history(split)]
                assert sequence.target(split).item_id not in history
                assert history
        assert sequence.history("test") == (*sequence.history("valid"), sequence.target("valid"))
        assert sequence.target("test") == sequence.interactions[-1]
        assert sequence.num_train == len(sequence.interactions) - 2


@given(rows, st.floats(0.05, 0.4), st.floats(0.05, 0.4))
def test_temporal_split_trains_on_nothing_later_than_a_target(given_rows, valid_share, test_share):
    try:
        config = config_of(min_history=2, split="temporal", temporal_valid=valid_share, temporal_test=test_share)
        _, sequences = assemble(MemorySource(given_rows), config)
    except InputError:
        return
    trained = [e.timestamp for s in sequences for e in s.interactions[: s.num_train]]
    for sequence in sequences:
        for split in ("valid", "test"):
            if sequence.target_position(split) is not None:
                target = sequence.target(split)
                assert all(time < target.timestamp for time in trained)
                assert all(entry.timestamp <= target.timestamp for entry in sequence.history(split))
                assert sequence.history(split)
        if sequence.valid is not None and sequence.test is not None:
            assert sequence.valid < sequence.test


def test_too_short_for_leave_one_out():
    with pytest.raises(InputError, match="leave-one-out needs 3 interactions .* found 2"):
        leave_one_out(2)


def test_temporal_points():
    times = np.array([1, 2, 5, 6, 9])
    assert temporal(times, valid_from=5, test_from=9) == (2, 2, 4)
    assert temporal(times[[0, 4]], valid_from=5, test_from=9) == (1, None, 1)  # no interaction in between
    assert temporal(times[[4]], valid_from=5, test_from=9) == (0, None, None)  # a new user


def test_temporal_needs_times_that_differ():
    with pytest.raises(InputError, match="split temporal needs times"):
        temporal_cuts(np.zeros(10, dtype=np.int64), 0.1, 0.1)
    with pytest.raises(InputError, match="same moment"):
        temporal_cuts(np.array([1, 7, 7, 7, 7]), 0.2, 0.2)


def test_items_without_title_are_dropped_or_kept_by_id():
    given_rows = [(u, i, t) for u in "uv" for t, i in enumerate("ABCD", 1)]
    source = MemorySource(given_rows, titles={"A", "B", "C"})
    catalog, sequences = assemble(source, config_of())
    assert catalog.ids == ("A", "B", "C")
    assert [len(sequence.interactions) for sequence in sequences] == [3, 3]
    assert source.problems.counts == {"purchase of an item without title, dropped": 2}
    catalog, sequences = assemble(MemorySource(given_rows, titles={"A", "B", "C"}), config_of("keep"))
    assert catalog["D"].title == "D"
    assert sequences[0].interactions[3] == Interaction("D", 4, None, "review 3", "")


def test_statistics():
    catalog = ItemCatalog([Item("A", "x"), Item("B", "x"), Item("C", "y"), Item("D", "z")])
    sequences = [
        UserSequence("u", tuple(map(Interaction, "ABCD")), 2, 2, 3),
        UserSequence("v", tuple(map(Interaction, "BAC")), 1, 1, 2),
    ]
    assert statistics(sequences, catalog) == {
        "users": 2,
        "items": 4,
        "interactions": 7,
        "length_min": 3,
        "length_mean": 3.5,
        "length_max": 4,
        "density": 7 / 8,
        "ambiguous_titles": 1,
        "train_targets": 1,
        "valid_targets": 2,
        "valid_cold_targets": 1,
        "test_targets": 2,
        "test_cold_targets": 2,
    }
