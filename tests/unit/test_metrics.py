"""Metrics against fractions written out by hand."""

import math

import ir_measures
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twice_rec import metrics


def test_rank_counts_columns_at_least_as_high():
    scores = [[0.1, 0.9, 0.5], [0.3, 0.2, 0.1], [0.0, 1.0, 2.0]]
    assert metrics.ranks_from_scores(scores, [1, 2, 0]).tolist() == [1, 3, 3]


def test_ties_count_against_the_target():
    assert metrics.ranks_from_scores([[1.0, 1.0, 1.0, 0.0]], [0]).tolist() == [3]
    assert metrics.ranks_from_scores(np.zeros((1, 30)), [4]).tolist() == [30]


def test_an_independent_library_agrees():
    """ir-measures, which is trec_eval: names break its ties, the last one first, so the target is called "a"."""
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 10, size=(400, 30)).astype(float)  # about three items of each score
    target = rng.integers(30, size=400)
    run = {
        str(user): {("a" if item == target[user] else f"b{item}"): score for item, score in enumerate(row)}
        for user, row in enumerate(scores.tolist())
    }
    peers = {f"hr@{k}": ir_measures.Success @ k for k in (1, 5, 10)}
    peers |= {f"ndcg@{k}": ir_measures.nDCG @ k for k in (5, 10)} | {"mrr": ir_measures.RR}
    names = {str(peer): name for name, peer in peers.items()}
    assert set(peers) == set(metrics.METRICS)
    truth = {str(user): {"a": 1} for user in range(400)}
    theirs = {name: np.zeros(400) for name in peers}
    for row in ir_measures.iter_calc(list(peers.values()), truth, run):
        theirs[names[str(row.measure)]][int(row.query_id)] = row.value
    ranks = metrics.ranks_from_scores(scores, target)
    for name, values in theirs.items():
        assert np.abs(values - metrics.per_user(name, ranks)).max() < 1e-12, name
    assert 0 < theirs["hr@1"].mean() < theirs["hr@10"].mean() < 1


def test_masked_columns_do_not_count():
    assert metrics.ranks_from_scores([[-np.inf, 0.5, -np.inf]], [1]).tolist() == [1]


def test_nan_scores_are_refused():
    with pytest.raises(ValueError, match="1 of 3 scores are NaN"):
        metrics.ranks_from_scores([[0.1, float("nan"), 0.2]], [0])


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"\[B, C\] and \[B\]"):
        metrics.ranks_from_scores([[0.1, 0.2]], [0, 1])


@pytest.mark.parametrize(
    ("name", "rank", "value"),
    [
        ("hr@1", 1, 1.0),
        ("hr@1", 2, 0.0),
        ("hr@5", 5, 1.0),
        ("hr@5", 6, 0.0),
        ("ndcg@5", 1, 1.0),
        ("ndcg@5", 2, 1 / math.log2(3)),
        ("ndcg@5", 5, 1 / math.log2(6)),
        ("ndcg@5", 6, 0.0),
        ("ndcg@10", 10, 1 / math.log2(11)),
        ("mrr", 4, 1 / 4),
    ],
)
def test_one_user(name, rank, value):
    assert metrics.per_user(name, [rank]).tolist() == pytest.approx([value])


def test_means_are_over_all_users():
    assert metrics.summarise([1, 2, 7], ["hr@1", "hr@5", "mrr"]) == pytest.approx(
        {"hr@1": 1 / 3, "hr@5": 2 / 3, "mrr": (1 + 1 / 2 + 1 / 7) / 3}
    )


def test_random_order_of_thirty():
    expected = metrics.summarise(range(1, 31))
    assert expected["hr@1"] == pytest.approx(1 / 30)
    assert expected["hr@5"] == pytest.approx(5 / 30)
    assert expected["ndcg@5"] == pytest.approx(sum(1 / math.log2(1 + r) for r in range(1, 6)) / 30)


@pytest.mark.parametrize("name", ["hr", "hr@0", "hr@x", "recall@5", "ndcg@-1", ""])
def test_unknown_metrics(name):
    with pytest.raises(ValueError, match="unknown metric"):
        metrics.per_user(name, [1])


def test_ranks_start_at_one():
    with pytest.raises(ValueError, match="ranks start at 1"):
        metrics.per_user("mrr", [0])


def test_no_user_is_no_mean():
    with pytest.raises(ValueError, match="no user"):
        metrics.summarise([])


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40))
def test_hr_grows_with_k_and_bounds_ndcg(ranks):
    values = [metrics.per_user(f"hr@{k}", ranks).mean() for k in (1, 5, 10)]
    assert values == sorted(values)
    assert (metrics.per_user("ndcg@5", ranks) <= metrics.per_user("hr@5", ranks)).all()


def test_interval_holds_the_mean_and_narrows_with_users():
    rng = np.random.default_rng(0)
    few, many = rng.random((50, 2)), rng.random((5000, 2))
    wide, tight = metrics.bootstrap_intervals(few), metrics.bootstrap_intervals(many)
    assert (wide[:, 0] < few.mean(axis=0)).all()
    assert (few.mean(axis=0) < wide[:, 1]).all()
    assert (np.diff(tight) < np.diff(wide) / 5).all()
    # 1.96 standard errors of a uniform draw: sqrt(1/12) / sqrt(5000)
    assert np.diff(tight) == pytest.approx(2 * 1.96 * math.sqrt(1 / 12 / 5000), rel=0.1)


def test_paired_bootstrap_sees_a_small_constant_gain():
    rng = np.random.default_rng(1)
    b = rng.random(200)
    found = metrics.paired_bootstrap(b + 0.01 + 0.01 * rng.random(200), b)
    assert found.ci95[0] > 0
    assert found.p < 0.01
    same = metrics.paired_bootstrap(b, b)
    assert (same.difference, same.ci95, same.p) == (0.0, (0.0, 0.0), 1.0)


def test_paired_bootstrap_needs_the_same_users():
    with pytest.raises(ValueError, match="same users"):
        metrics.paired_bootstrap([1.0, 0.0], [1.0])


def test_holm_multiplies_by_the_number_that_is_left():
    # in order: .005 * 4, .01 * 3, .03 * 2, then .04 * 1, which is not below the one before
    assert metrics.holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert metrics.holm([0.4, 0.9]).tolist() == [0.8, 0.9]
    assert metrics.holm([0.7, 0.8]).tolist() == [1.0, 1.0]
    assert metrics.holm([]).tolist() == []
    with pytest.raises(ValueError, match=r"p-values in \[0, 1\]"):
        metrics.holm([0.5, 1.5])
