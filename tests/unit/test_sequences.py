"""Duplicates, order, limits and splits."""

import logging

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

import prepared
from twice_rec.catalog import ItemCatalog
from twice_rec.data.filters import core, filtered, in_time_order, lines_of, long_enough, short_enough, without_repeats
from twice_rec.data.sequences import SequenceConfig, leave_one_out, log_figures, statistics, temporal, temporal_cuts
from twice_rec.data.sources.base import Problems
from twice_rec.data.sources.interactions import TableBuilder
from twice_rec.errors import InputError
from twice_rec.records import SPLITS, Interaction, Item, UserSequence

rows = st.lists(
    st.tuples(st.sampled_from("uvwxyz"), st.sampled_from("ABCDEFGH"), st.integers(1, 20)), min_size=1, max_size=80
)


def table_of(given_rows):
    builder = TableBuilder()
    builder.add_rows((user, item, time, None, line) for line, (user, item, time) in enumerate(given_rows))
    return builder.table()


def config_of(untitled_items="drop", min_history=3, k_core=1, max_history=None, **others):
    limits = {"k_core": k_core, "min_history": min_history, "max_history": max_history}
    return SequenceConfig(untitled_items=untitled_items, **limits, **others)


def listed(table):
    columns = (table.user.tolist(), table.item.tolist(), table.timestamp.tolist())
    return [(table.users[u], table.items[i], t) for u, i, t in zip(*columns, strict=True)]


class MemorySource:
    """Interactions and items from lists, for tests of what comes after a source."""

    ties_in_file_order = False

    def __init__(self, given_rows, titles=None):
        self.problems = Problems()
        self._table = table_of(given_rows)
        self._titles = titles

    def interactions(self):
        return self._table

    def titled(self, wanted):
        return {item for item in wanted if self._titles is None or item in self._titles}

    def items(self, wanted):
        titles = self._titles or {item: f"item {item}" for item in wanted}
        return [Item(item, titles[item]) for item in sorted(wanted) if item in titles]

    def review_texts(self, lines):
        return pl.DataFrame({"title": [f"review {line}" for line in lines.tolist()], "text": [""] * len(lines)})


def test_order_is_user_then_time_then_item_id():
    table = in_time_order(table_of([("v", "B", 5), ("u", "C", 3), ("v", "A", 5), ("u", "D", 1), ("v", "Z", 4)]))
    assert listed(table) == [("v", "Z", 4), ("v", "A", 5), ("v", "B", 5), ("u", "D", 1), ("u", "C", 3)]


def test_without_times_the_source_order_stands():
    table = in_time_order(table_of([("u", "C", 0), ("v", "B", 0), ("u", "A", 0)]))
    assert listed(table) == [("u", "C", 0), ("u", "A", 0), ("v", "B", 0)]


def test_first_interaction_with_an_item_counts():
    problems = Problems()
    given_rows = [("u", "A", 9), ("u", "B", 5), ("u", "A", 1), ("v", "A", 2)]
    table = without_repeats(table_of(given_rows), problems)
    assert listed(in_time_order(table)) == [("u", "A", 1), ("u", "B", 5), ("v", "A", 2)]
    assert problems.counts == {"repeated purchase of an item, first kept": 1}
    assert problems.first["repeated purchase of an item, first kept"] == "user u, item A"


def test_of_repeats_at_one_moment_the_first_row_counts():
    table = without_repeats(table_of([("u", "A", 2), ("u", "A", 1), ("u", "A", 1)]), Problems())
    assert table.line.tolist() == [1]


def test_long_histories_are_cut_to_their_latest_or_dropped():
    table = in_time_order(table_of([*(("u", item, time) for time, item in enumerate("ABCDE", 1)), ("v", "A", 1)]))
    assert listed(short_enough(table, 3, "cut")) == [("u", "C", 3), ("u", "D", 4), ("u", "E", 5), ("v", "A", 1)]
    assert listed(short_enough(table, 3, "drop")) == [("v", "A", 1)]


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
    assert listed(core(table_of(given_rows), 2)) == [
        ("u", "A", 1), ("u", "B", 2), ("v", "A", 1), ("v", "B", 2),
    ]  # fmt: skip


def test_nobody_left_names_the_limit_to_blame():
    table = table_of([("u", "A", 1), ("u", "B", 2)])
    with pytest.raises(InputError, match=r"no user is left of 2 interactions: no group .* lower k_core \(3\)"):
        core(table, 3)
    with pytest.raises(InputError, match=r"none has at least 5 items, the longest has 2; lower min_history \(5\)"):
        long_enough(table, 5)
    with pytest.raises(InputError, match=r"all have more than 1 items; raise max_history \(1\), or set longer_hist"):
        short_enough(table, 1, "drop")


def test_the_core_comes_before_the_length_limits():
    """As in ../shared/cases/order/truncate: cutting first would leave everybody nothing but unique items."""
    given_rows = [(f"u{u}", f"common{t}", t) for u in range(8) for t in range(6)]
    given_rows += [(f"u{u}", f"own{u}.{t}", 6 + t) for u in range(8) for t in range(9)]
    source = MemorySource(given_rows)
    table, steps = filtered(source, config_of(k_core=5, max_history=6))
    assert {item for _, item, _ in listed(table)} == {f"common{t}" for t in range(6)}
    assert [(step.filter, step.users, step.items, step.interactions) for step in steps] == [
        ("read", 8, 78, 120),
        ("untitled_items: drop", 8, 78, 120),
        ("repeats: drop", 8, 78, 120),
        ("k_core: 5", 8, 6, 48),
        ("min_history: 3", 8, 6, 48),
        ("max_history: 6, longer_histories: cut", 8, 6, 48),
    ]
    assert lines_of(steps)[4] == "k_core: 5                                         8             6            48"


def plainly_filtered(given_rows, config):
    """The same filters on a list, one row at a time: [(user, item, time)] by user and in order."""
    first_seen = list(dict.fromkeys(user for user, _, _ in given_rows))
    ordered = sorted(
        enumerate(given_rows), key=lambda pair: (first_seen.index(pair[1][0]), pair[1][2], pair[1][1], pair[0])
    )
    left, seen = [], set()
    for _, row in ordered:
        if config.repeats == "keep" or row[:2] not in seen:
            left.append(row)
        seen.add(row[:2])
    of = lambda column, value: sum(row[column] == value for row in left)
    while rare := [row for row in left if of(0, row[0]) < config.k_core or of(1, row[1]) < config.k_core]:
        left = [row for row in left if row not in rare]
    left = [row for row in left if of(0, row[0]) >= config.min_history]
    if config.max_history is None:
        return left
    if config.longer_histories == "drop":
        return [row for row in left if of(0, row[0]) <= config.max_history]
    place = [of(0, user) - sum(other[0] == user for other in left[:at]) for at, (user, _, _) in enumerate(left)]
    return [row for row, from_the_end in zip(left, place, strict=True) if from_the_end <= config.max_history]


@given(
    rows, st.integers(1, 3), st.integers(3, 4), st.none() | st.integers(4, 6), st.sampled_from(["drop", "cut"]),
    st.sampled_from(["drop", "keep"]),
)  # fmt: skip
def test_filters_agree_with_plain_ones(given_rows, k_core, min_history, max_history, longer, repeats):
    limits = {"k_core": k_core, "min_history": min_history, "max_history": max_history}
    config = config_of(**limits, longer_histories=longer, repeats=repeats)
    expected = plainly_filtered(given_rows, config)
    try:
        table, steps = filtered(MemorySource(given_rows), config)
    except InputError:
        assert not expected
        return
    assert listed(table) == expected
    last = (steps[-1].users, steps[-1].items, steps[-1].interactions)
    assert last == (len({row[0] for row in expected}), len({row[1] for row in expected}), len(expected))


@given(rows)
def test_leave_one_out_has_no_target_in_its_own_history(given_rows):
    try:
        _, sequences = prepared.assemble(MemorySource(given_rows), config_of())
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
        _, sequences = prepared.assemble(MemorySource(given_rows), config)
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


def test_leave_one_out_points():
    assert [points.tolist() for points in leave_one_out(np.array([3, 5]))] == [[1, 3], [1, 3], [2, 4]]
    with pytest.raises(InputError, match="leave-one-out needs 3 interactions .* found 2"):
        leave_one_out(np.array([4, 2]))


def test_temporal_points():
    # The second user has no interaction in the validation period, the third is new in the test period.
    times, begins = np.array([1, 2, 5, 6, 9, 1, 9, 9]), np.array([0, 5, 7, 8])
    num_train, valid, test = temporal(times, begins, valid_from=5, test_from=9)
    assert (num_train.tolist(), valid.tolist(), test.tolist()) == ([2, 1, 0], [2, -1, -1], [4, 1, -1])


def test_temporal_needs_times_that_differ():
    with pytest.raises(InputError, match="split temporal needs times"):
        temporal_cuts(np.zeros(10, dtype=np.int64), 0.1, 0.1)
    with pytest.raises(InputError, match="same moment"):
        temporal_cuts(np.array([1, 7, 7, 7, 7]), 0.2, 0.2)


def test_a_tiny_temporal_share_has_the_last_interaction():
    assert temporal_cuts(np.arange(1, 11), 0.2, 1e-17) == (9, 10)


def test_items_without_title_are_dropped_or_kept_by_id():
    given_rows = [(u, i, t) for u in "uv" for t, i in enumerate("ABCD", 1)]
    source = MemorySource(given_rows, titles=dict.fromkeys("ABC", "a title"))
    catalog, sequences = prepared.assemble(source, config_of())
    assert catalog.ids == ("A", "B", "C")
    assert [len(sequence.interactions) for sequence in sequences] == [3, 3]
    assert source.problems.counts == {"purchase of an item without title, dropped": 2}
    catalog, sequences = prepared.assemble(
        MemorySource(given_rows, titles=dict.fromkeys("ABC", "a title")), config_of("keep")
    )
    assert catalog["D"].title == "D"
    assert sequences[0].interactions[3] == Interaction("D", 4, None, "review 3", "")


def test_long_titles_are_cut_behind_a_word():
    titles = {
        "A": "green tea, 20 bags",
        "B": "green tea, 20 bags of it",
        "C": "tea - (pack of 6), organic - and more",
        "D": "Donaudampfschiff",
        "E": "tea (organic) | with a flower",
    }
    source = MemorySource([("u", item, time) for time, item in enumerate("ABCDE", 1)], titles)
    catalog, _ = prepared.assemble(source, config_of(title_chars=18))
    assert [item.title for item in catalog] == [
        "green tea, 20 bags",
        "green tea, 20 bags",
        "tea - (pack of 6)",
        "Donaudampfschiff",
        "tea (organic)",
    ]
    assert catalog.ambiguous_titles == 1
    catalog, _ = prepared.assemble(source, config_of(title_chars=10))
    assert [item.title for item in catalog] == ["green tea", "green tea", "tea", "Donaudampf", "tea"]
    assert [item.title for item in prepared.assemble(source, config_of())[0]] == list(titles.values())


def test_statistics():
    catalog = ItemCatalog([Item("A", "x"), Item("B", "x"), Item("C", "y"), Item("D", "z")])
    sequences = [
        UserSequence("u", tuple(map(Interaction, "ABCD")), 2, 2, 3),
        UserSequence("v", tuple(map(Interaction, "BAC")), 1, 1, 2),
    ]
    assert statistics(prepared.table_of(catalog, sequences), catalog) == {
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


def test_targets_that_share_their_time_with_their_history_are_counted():
    catalog = ItemCatalog([Item("A", "x"), Item("B", "x"), Item("C", "y"), Item("D", "z")])
    times = [(1, 2, 3, 3), (1, 1, 2, 3), (5, 6, 7, 8), (5, 6, 7, 9)]
    records = [
        UserSequence(f"u{n}", tuple(map(Interaction, "ABCD", stamps)), 2, 2, 3) for n, stamps in enumerate(times)
    ]
    figures = statistics(prepared.table_of(catalog, records), catalog)
    assert figures["targets_at_the_time_of_their_history"] == 2 / 12  # the first one's test, the second one's training


@pytest.mark.parametrize(("tied", "said"), [(0.04, 0), (0.05, 1)])
def test_many_targets_without_a_known_order_are_said_in_one_line(caplog, tied, said):
    with caplog.at_level(logging.INFO, "prepare"):
        log_figures({"users": 3, "targets_at_the_time_of_their_history": tied, "steps": ["no"]})
    assert [record.levelname for record in caplog.records].count("WARNING") == said
    assert "no" not in [record.getMessage() for record in caplog.records]
