"""What the authors' test lists have in common, on lists whose answer is known."""

import json
from collections import Counter

import pytest

from twice_rec.data.released_lists import diagnose
from twice_rec.stages.command_line import main

SHARED = ["A", "B", "C"]


def test_targets_that_no_other_list_has():
    """Three lists share A, B and C; two targets are outside, one is among them."""
    lists = [([*SHARED, "X"], "X"), (["Y", *SHARED], "Y"), ([*SHARED, "Z"], "B")]
    found = diagnose(lists, Counter(A=9, B=5, C=1, X=6, Y=1))
    assert (found.num_lists, found.num_candidates, found.in_all, found.targets_in_pool) == (3, (4, 4), 3, 1)
    assert found.pool == {"A", "B", "C"}
    assert (found.pool_count, found.catalog_count) == (5.0, 4.4)
    hit_rates = {name: value[0] for name, value in found.hit_rates.items()}
    # A has 9 interactions, so popularity never puts a target first; Y ties with C behind A and B.
    expected = {"random, expected": 1 / 4, "not in the shared pool": 2 / 3, "popularity in training": 0.0}
    assert hit_rates == pytest.approx(expected)
    for mean, low, high in found.hit_rates.values():
        assert low <= mean <= high


def test_lists_that_share_nothing():
    found = diagnose([(["A", "B"], "A"), (["C", "D"], "D")], Counter(A=2, C=1))
    assert found.pool == frozenset()
    # All candidates are equally outside: ties count against the target.
    assert found.hit_rates["not in the shared pool"][0] == 0.0
    assert found.hit_rates["popularity in training"][0] == 0.5


def test_one_list_shares_nothing_with_others():
    assert diagnose([(["A", "B"], "A")], Counter(A=1)).pool == frozenset()


@pytest.mark.parametrize(
    ("words", "names", "message"),
    [
        ([], [], "expected FOLDER [DOMAIN], found nothing"),
        (["FOLDER"], [], "no amazon_*_llm_test*.json; expected: twice-rec released_lists FOLDER [DOMAIN]"),
        (["FOLDER"], ["A", "B"], "test prompts of A, B; name one domain"),
        (["FOLDER"], ["A"], "no file named amazon_A_sasrec_train*.json"),
    ],
)
def test_folders_without_released_lists(tmp_path, capfd, words, names, message):
    for name in names:
        (tmp_path / f"amazon_{name}_llm_test_sample.json").write_text(json.dumps([]))
    assert main(["released_lists", *(str(tmp_path) if word == "FOLDER" else word for word in words)]) == 2
    assert message in capfd.readouterr().err
