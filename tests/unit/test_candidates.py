"""Candidate lists: never an own item, each item once, the same seed the same list."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twice_rec.catalog import ItemCatalog
from twice_rec.data.candidates import CANDIDATE_LISTS, CandidateConfig, draw_candidates, training_counts
from twice_rec.data.sequences import leave_one_out
from twice_rec.errors import InputError
from twice_rec.records import Interaction, Item, UserSequence

KINDS = list(CANDIDATE_LISTS)
CATALOG = ItemCatalog([Item(f"I{i}", f"item {i}") for i in range(40)])


def sequence(user_id, item_ids):
    return UserSequence(user_id, tuple(map(Interaction, item_ids)), *leave_one_out(len(item_ids)))


def score(histories):
    """Higher index, higher score, for everybody."""
    return np.tile(np.arange(40.0), (len(histories), 1))


def draw(sequences, split="test", kinds=KINDS, num_candidates=10, seed=0, hard_pool=15):
    lists = {"candidate_lists": list(kinds), "prompt_list": kinds[0]}
    config = CandidateConfig(num_candidates=num_candidates, hard_pool=hard_pool, **lists)
    return list(draw_candidates(config, sequences, CATALOG, split, seed, score))


histories = st.lists(
    st.lists(st.sampled_from(CATALOG.ids), min_size=3, max_size=12, unique=True), min_size=1, max_size=6
)


@settings(max_examples=50)
@given(histories, st.integers(0, 5), st.sampled_from(["train", "valid", "test"]), st.integers(2, 25))
def test_lists_are_sound(item_lists, seed, split, num_candidates):
    sequences = [sequence(f"u{i}", item_ids) for i, item_ids in enumerate(item_lists)]
    for kinds in [[kind] for kind in KINDS] if split == "train" else [KINDS]:
        lists_are_sound(sequences, seed, split, num_candidates, kinds)


def lists_are_sound(sequences, seed, split, num_candidates, kinds):
    drawn = draw(sequences, split, kinds, num_candidates, seed, hard_pool=num_candidates)
    with_target = [s for s in sequences if s.target_position(split) is not None]
    assert [entry.user_id for entry in drawn] == [s.user_id for s in with_target]
    for entry, user in zip(drawn, with_target, strict=True):
        own = {interaction.item_id for interaction in user.interactions}
        assert entry.target == user.target(split).item_id
        assert list(entry.lists) == kinds
        for shown in entry.lists.values():
            assert len(shown) == len(set(shown)) == num_candidates
            assert shown.count(entry.target) == 1
            assert own & set(shown) == {entry.target}
    assert draw(sequences, split, kinds, num_candidates, seed, hard_pool=num_candidates) == drawn


def test_training_draws_the_list_that_prompts_show():
    (entry,) = draw([sequence("u", CATALOG.ids[:5])], split="train", kinds=["popularity", "uniform"])
    assert list(entry.lists) == ["popularity"]


def test_a_list_depends_on_its_own_user_only():
    one, two = sequence("u", CATALOG.ids[:5]), sequence("v", CATALOG.ids[3:9])
    alone = draw([one], kinds=["uniform"])[0]
    assert draw([two, one], kinds=["uniform"])[1] == alone
    assert draw([one], seed=1, kinds=["uniform"])[0] != alone
    assert draw([one], split="valid", kinds=["uniform"])[0].lists != alone.lists


def test_positions_of_the_target_are_uniform():
    users = [sequence(f"u{i}", CATALOG.ids[i % 30 : i % 30 + 4]) for i in range(2000)]
    positions = Counter(entry.lists["uniform"].index(entry.target) for entry in draw(users, kinds=["uniform"]))
    assert len(positions) == 10
    assert all(abs(count - 200) < 5 * np.sqrt(200) for count in positions.values())


def test_popular_items_are_drawn_more_often():
    # I0 and I1 are everybody's history; I2 and I3 are the training items of the crowd, the rest is never trained.
    crowd = [sequence(f"c{i}", ["I2", "I3", "I30", "I31"]) for i in range(50)]
    user = [sequence(f"u{i}", ["I0", "I1", "I20", f"I{10 + i % 5}"]) for i in range(200)]
    drawn = draw([*crowd, *user], kinds=["popularity"], num_candidates=5)
    counts = Counter(item for entry in drawn if entry.user_id[0] == "u" for item in entry.lists["popularity"])
    assert counts["I2"] == counts["I3"] == 200
    assert training_counts(crowd, CATALOG)[2] == 50


def test_hard_negatives_come_from_the_pool():
    (entry,) = draw([sequence("u", ["I0", "I39", "I1", "I2"])], kinds=["hard"], num_candidates=10, hard_pool=12)
    assert set(entry.lists["hard"]) - {"I2"} <= {f"I{i}" for i in range(27, 39)}


def test_too_few_negatives_say_the_numbers():
    with pytest.raises(InputError, match=r"user u interacted with 12 of 40 items, which leaves 28 .* 30 needs 29"):
        draw([sequence("u", CATALOG.ids[:12])], num_candidates=30, hard_pool=40)


def test_exactly_enough_negatives():
    (entry,) = draw([sequence("u", CATALOG.ids[:12])], num_candidates=29, hard_pool=28)
    for kind in KINDS:
        assert set(entry.lists[kind]) == {entry.target, *CATALOG.ids[12:]}


def test_tied_items_enter_the_pool_at_random_per_user():
    users = [sequence(f"u{i}", CATALOG.ids[:4]) for i in range(300)]
    config = CandidateConfig(num_candidates=10, hard_pool=10, candidate_lists=["hard"], prompt_list="hard")
    few = lambda histories: np.tile([0.0] * 36 + [1.0] * 4, (len(histories), 1))  # 4 neighbours, 32 others tie
    tied = Counter()
    lists = [set(e.lists["hard"]) - {e.target} for e in draw_candidates(config, users, CATALOG, "test", 0, few, tied)]
    counts = Counter(item_id for items in lists for item_id in items)
    assert len(counts) == 36  # all but the own ones
    others = [counts[f"I{i}"] for i in range(4, 36)]
    neighbours = sum(counts[f"I{i}"] for i in range(36, 40))
    assert max(others) < 2 * min(others)
    assert tied == {"drawn": 2700, "tied": 2700 - neighbours}


def test_without_ties_no_draw_is_spent_on_them():
    tied = Counter()
    config = CandidateConfig(num_candidates=10, hard_pool=12, candidate_lists=["hard"], prompt_list="hard")
    list(draw_candidates(config, [sequence("u", ["I0", "I39", "I1", "I2"])], CATALOG, "test", 0, score, tied))
    assert tied == {"drawn": 9, "tied": 0}
