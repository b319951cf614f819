"""Candidate lists: never an own item, each item once, the same seed the same list."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

import prepared
from twice_rec.catalog import ItemCatalog
from twice_rec.data.candidates import CANDIDATE_LISTS, CandidateConfig, CandidateDraw
from twice_rec.data.hard import SimilarItems, training_matrix
from twice_rec.errors import InputError
from twice_rec.files import read_records
from twice_rec.records import CandidateLists, Interaction, Item, UserSequence

KINDS = list(CANDIDATE_LISTS)
CATALOG = ItemCatalog([Item(f"I{i}", f"item {i}") for i in range(40)])
HIGHER_IS_BETTER = np.tile(np.arange(40.0), (40, 1))  # similarity [N, N]: the higher the index, the higher the score


def sequence(user_id, item_ids):
    n = len(item_ids)
    return UserSequence(user_id, tuple(map(Interaction, item_ids)), n - 2, n - 2, n - 1)


def drawer(
    sequences, kinds=KINDS, num_candidates=10, seed=0, hard_pool=15, similarity=HIGHER_IS_BETTER, catalog=CATALOG
):
    lists = {"candidate_lists": list(kinds), "prompt_list": kinds[0]}
    config = CandidateConfig(num_candidates=num_candidates, hard_pool=hard_pool, **lists)
    similar = SimilarItems(sparse.csr_matrix(similarity), 0.9)
    return CandidateDraw(config, prepared.table_of(catalog, sequences), len(catalog), seed, similar)


def draw(sequences, split="test", size=3, catalog=CATALOG, **options):
    """The lists of all users, as they are in the file; `size` users are drawn together."""
    found = []
    for drawn in drawer(sequences, catalog=catalog, **options).batches(split, size):
        for row, (user, target) in enumerate(zip(drawn.users, drawn.targets, strict=True)):
            lists = {kind: tuple(catalog.ids[i - 1] for i in shown[row]) for kind, shown in drawn.lists.items()}
            found.append(CandidateLists(sequences[user].user_id, catalog.ids[target - 1], lists))
    return found


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
    options = {"kinds": kinds, "num_candidates": num_candidates, "seed": seed, "hard_pool": num_candidates}
    drawn = draw(sequences, split, **options)
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
    assert draw(sequences, split, size=100, **options) == drawn


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


def test_popular_items_are_drawn_one_after_another_in_proportion():
    """Of items of weight 1, 2 and 4 the first negative is the heaviest in 4 of 7 draws; two of them without repeats."""
    crowd = [sequence(f"c{i}", [item, "I30", "I31"]) for i, item in enumerate(["I4", "I3", "I3", *["I2"] * 4])]
    users = [sequence(f"u{i}", [f"I{10 + i % 4}", "I14", "I15"]) for i in range(7000)]
    table = drawer([*crowd, *users], kinds=["popularity"], num_candidates=3)
    pairs = Counter()
    for drawn in table.batches("test"):
        for user, target, shown in zip(drawn.users, drawn.targets, drawn.lists["popularity"], strict=True):
            if user >= len(crowd):
                pairs[tuple(sorted(set(shown.tolist()) - {int(target)}))] += 1
    weight = {5: 1, 4: 2, 3: 4} | {11 + i: 1750 for i in range(4)}
    total = sum(weight.values())
    for one, other in [(11, 12), (13, 14)]:
        per_user = [u for u in range(4) if 11 + u not in (one, other)]  # users who own neither
        w, v = weight[one], weight[other]
        chances = []
        for user in per_user:
            rest = total - weight[11 + user]
            chances.append(w / rest * v / (rest - w) + v / rest * w / (rest - v))
        expected = 1750 * sum(chances)
        assert abs(pairs[one, other] - expected) < 5 * np.sqrt(expected)


def test_uniform_negatives_are_uniform():
    users = [sequence(f"u{i}", CATALOG.ids[:4]) for i in range(3000)]
    counts = Counter(item for entry in draw(users, kinds=["uniform"], size=512) for item in entry.lists["uniform"])
    others = [counts[item_id] for item_id in CATALOG.ids[4:]]  # 9 of 36, 3,000 times
    assert all(abs(count - 750) < 5 * np.sqrt(750 * 0.75) for count in others)
    assert np.var(others) < 2 * 750


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
    for without_score in (0.0, 0.5):  # stored nowhere; stored like any score
        few = np.tile([without_score] * 36 + [1.0] * 4, (40, 1))  # 4 neighbours, 32 others tie
        table = drawer(users, kinds=["hard"], hard_pool=10, similarity=few)
        drawn = np.concatenate([part.lists["hard"] for part in table.batches("test", 64)])
        counts = np.bincount(drawn.ravel(), minlength=41)[1:]
        assert (counts[[0, 1, 2]] == 0).all()  # own items that are no target
        assert counts[4:36].max() < 2 * counts[4:36].min()
        assert (counts[36:] > 230).all()  # in the pool of 10 for everybody, of which 9 are drawn
        assert table.tied == {"drawn": 2700, "tied": 2700 - counts[36:].sum()}


def test_without_ties_no_draw_is_spent_on_them():
    table = drawer([sequence("u", ["I0", "I39", "I1", "I2"])], kinds=["hard"], hard_pool=12)
    list(table.batches("test"))
    assert table.tied == {"drawn": 9, "tied": 0}


def test_a_pool_of_all_items_without_a_score_is_not_tied():
    table = drawer([sequence("u", CATALOG.ids[:12])], kinds=["hard"], num_candidates=29, hard_pool=28,
                   similarity=np.zeros((40, 40)))  # fmt: skip
    (drawn,) = table.batches("test")
    assert set(drawn.lists["hard"][0]) == {12, *range(13, 41)}
    assert table.tied == {"drawn": 28, "tied": 0}


@settings(max_examples=50)
@given(histories, st.integers(1, 20), st.floats(0, 1), st.integers(0, 3))
def test_hard_pools_are_those_of_dense_scores(item_lists, hard_pool, density, seed):
    """Every item with a higher score than one that was drawn is in the pool."""
    rng = np.random.default_rng(seed)
    similarity = rng.integers(1, 4, (40, 40)) * (rng.random((40, 40)) < density)  # many ties
    sequences = [sequence(f"u{i}", item_ids) for i, item_ids in enumerate(item_lists)]
    for entry, user in zip(
        draw(sequences, kinds=["hard"], num_candidates=hard_pool + 1, hard_pool=hard_pool, similarity=similarity),
        sequences,
        strict=True,
    ):
        scores = sum(
            0.9**age * similarity[CATALOG.index(e.item_id) - 1] for age, e in enumerate(user.history("test")[::-1])
        )
        own = {e.item_id for e in user.interactions}
        free = [scores[CATALOG.index(item_id) - 1] for item_id in CATALOG.ids if item_id not in own]
        got = [scores[CATALOG.index(item_id) - 1] for item_id in entry.lists["hard"] if item_id not in own]
        assert np.allclose(sorted(got), sorted(free)[len(free) - hard_pool :])


def test_repeated_interactions_are_own_items_once():
    sequences = [sequence("u", ["I0", "I1", "I0", "I2", "I0"]), sequence("v", CATALOG.ids[:3])]
    for kind in KINDS:
        (entry, _) = draw(sequences, kinds=[kind], num_candidates=38, hard_pool=37)
        assert set(entry.lists[kind]) == {"I0", *CATALOG.ids[3:]}
    assert training_matrix(prepared.table_of(CATALOG, sequences), 40).toarray().max() == 1


def test_the_file_holds_the_records(tmp_path):
    sequences = [sequence("u", CATALOG.ids[:5]), sequence("v", CATALOG.ids[3:9])]
    drawer(sequences).write(tmp_path / "lists.jsonl", "valid", CATALOG)
    assert list(read_records(tmp_path / "lists.jsonl", CandidateLists)) == draw(sequences, "valid")
