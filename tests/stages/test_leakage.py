"""What stage 0 leaves holds no answer: looked for by brute force in the files of every source and both splits."""

import itertools
from collections import Counter

import numpy as np
import pytest

from stages import odd_inputs
from twice_rec.data.dataset import PreparedData
from twice_rec.data.sources import SOURCES
from twice_rec.records import SPLITS
from twice_rec.stages import stage0_prepare

USERS, ITEMS, LISTS = 400, 120, ("uniform", "popularity", "hard")
SIX = 6  # interactions of each user


@pytest.fixture(autouse=True, scope="module")
def more_users():
    """The small data sets of `odd_inputs`, of more users and items; buying times overlap between users."""
    with pytest.MonkeyPatch.context() as patch:
        rng = np.random.default_rng(0)
        weights = 1 / np.arange(1, ITEMS + 1) ** 0.7
        bought = [
            (f"U{user:03d}", int(item), int(user % 50) + 7 * time)
            for user in range(USERS)
            for time, item in enumerate(rng.choice(ITEMS, SIX, replace=False, p=weights / weights.sum()))
        ]
        patch.setattr(odd_inputs, "ITEMS", [f"B{number:03d}" for number in range(ITEMS)])
        patch.setattr(odd_inputs, "PURCHASES", bought)
        yield


def prepared(tmp_path, source, split):
    """Stage 0 on a source."""
    flags = ["--source", source, "--split", split, "--domain", "D", "--run_dir", str(tmp_path / "run"), "--seed", "3"]
    flags += ["--k_core", "1", "--min_history", "3", "--max_history", "null", "--num_candidates", "10"]
    flags += ["--candidate_lists", *LISTS, "--hard_pool", "20"]
    if SOURCES[source].reads_folder:
        for name, rows in odd_inputs.DATA[source]().items():
            (tmp_path / name).write_bytes(odd_inputs.rendered(name, rows))
        flags += ["--source_dir", str(tmp_path)]
    else:
        flags += ["--synthetic_users", str(USERS), "--synthetic_items", str(ITEMS), "--longer_histories", "cut"]
    assert stage0_prepare.main(["recipes/tiny/prepare.yaml", *flags]) == 0
    return PreparedData(tmp_path / "run" / "data")


CASES = [
    (source, split)
    for source, split in itertools.product(SOURCES, ("leave_one_out", "temporal"))
    if (source, split) != ("release", "temporal")  # the authors' files have no times
]


@pytest.mark.parametrize(("source", "split"), CASES)
def test_nothing_leaks(tmp_path, source, split):
    data = prepared(tmp_path, source, split)
    by_user = {sequence.user_id: sequence for sequence in data.sequences}
    trained = [entry for s in data.sequences for entry in s.interactions[: s.num_train]]
    times = {"valid": [], "test": []}
    places, drawn = Counter(), {kind: Counter() for kind in LISTS}
    for at in SPLITS:
        for entry in data.candidates(at):
            sequence = by_user[entry.user_id]
            position, own = sequence.target_position(at), {e.item_id for e in sequence.interactions}
            assert entry.target == sequence.interactions[position].item_id
            if at == "train":
                assert position < sequence.num_train
            else:
                assert position >= sequence.num_train
                times[at].append(sequence.interactions[position].timestamp)
            assert entry.target not in {e.item_id for e in sequence.history(at)}
            for kind, shown in entry.lists.items():
                assert len(set(shown)) == len(shown) == 10
                assert set(shown) & own == {entry.target}
                places[shown.index(entry.target)] += 1
                drawn[kind].update(set(shown) - own)
        stamps = [e.timestamp for s in data.sequences for e in s.interactions]
        assert stamps == [
            e.timestamp for s in data.sequences for e in sorted(s.interactions, key=lambda e: e.timestamp)
        ]
    if split == "temporal":
        assert (
            max(entry.timestamp for entry in trained) < min(times["valid"]) <= max(times["valid"]) < min(times["test"])
        )
    assert chi_square(places, range(10)) < 30  # 9 degrees of freedom: 1 in 2,000
    # Uniform negatives know nothing of popularity; the others do.
    counts, ids = Counter(entry.item_id for entry in trained), data.catalog.ids
    leaning = {k: np.corrcoef([counts[i] for i in ids], [drawn[k][i] for i in ids])[0, 1] for k in LISTS}
    assert leaning["uniform"] < 0.2
    assert leaning["popularity"] > 0.7


def chi_square(found, places):
    """How far counts are from being even."""
    expected = sum(found.values()) / len(places)
    return sum((found[place] - expected) ** 2 / expected for place in places)
