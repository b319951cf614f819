"""Sequences of item indices as arrays do what lists of lists do."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from twice_rec.item_sequences import ItemSequences, Questions

LISTS = st.lists(st.lists(st.integers(1, 50), max_size=9), max_size=8)


def lists_of(sequences):
    return [sequence.tolist() for sequence in sequences]


@given(LISTS, st.integers(1, 5))
def test_as_lists(lists, count):
    sequences = ItemSequences.of(lists)
    assert lists_of(sequences) == lists
    assert len(sequences) == len(lists)
    assert sequences.lengths.tolist() == [len(one) for one in lists]
    assert lists_of(sequences.latest(count)) == [one[-count:] for one in lists]
    assert lists_of(sequences[1:3]) == lists[1:3]
    assert lists_of(sequences[np.arange(len(lists))[::-1]]) == lists[::-1]
    users, items = sequences[1:].flat()
    assert list(zip(users.tolist(), items.tolist(), strict=True)) == [
        (user, item) for user, one in enumerate(lists[1:]) for item in one
    ]
    longest = max(map(len, lists[1:]), default=0)
    assert sequences[1:].padded().tolist() == [one + [0] * (longest - len(one)) for one in lists[1:]]


@given(st.lists(st.lists(st.integers(1, 50), min_size=2, max_size=20), max_size=6), st.integers(2, 6))
def test_windows_predict_every_item_but_the_first_once(lists, length):
    windows = lists_of(ItemSequences.of(lists).windows(length))
    assert all(2 <= len(window) <= length for window in windows)
    at = 0
    for one in lists:
        pieces, predicted = [], []
        while sorted(predicted) != sorted(one[1:]):
            pieces.append(windows[at])
            predicted += windows[at][1:]
            at += 1
        assert pieces[0] == one[-length:]  # from the end on
    assert at == len(windows)


def test_a_short_sequence_is_one_window():
    assert lists_of(ItemSequences.of([[1], [2, 3], [4, 5, 6]]).windows(3)) == [[1], [2, 3], [4, 5, 6]]


def test_without_last():
    sequences = ItemSequences.of([[1, 2], [3, 4], [5]])
    assert lists_of(sequences.without_last(np.array([True, False, True]))) == [[1], [3, 4], []]


def test_questions_of_some_users():
    histories = ItemSequences.of([[1], [2, 3], [4]])
    asked = Questions(
        np.array([0, 2, 5]), ["a", "b", "c"], histories, np.array([7, 8, 9]), {"uniform": np.arange(6).reshape(3, 2)}
    )
    some = asked.take(np.array([2, 0]))
    assert (some.users.tolist(), some.user_ids, some.targets.tolist()) == ([5, 0], ["c", "a"], [9, 7])
    assert lists_of(some.histories) == [[4], [1]]
    assert some.candidates["uniform"].tolist() == [[4, 5], [0, 1]]
