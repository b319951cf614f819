"""The CF baselines by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy import sparse

from twice_rec.cf.baselines import (
    BASELINES,
    ItemSimilarityScorer,
    PopularityScorer,
    PrecomputedScorer,
    RandomScorer,
    TrainingData,
    ease_weights,
    fits,
    interaction_matrix,
    knn_similarity,
    require_memory,
)
from twice_rec.errors import InputError
from twice_rec.item_sequences import ItemSequences

TRAINING = [[1, 2], [1, 2, 3], [2, 3], [4]]


def training(histories=TRAINING, num_items=5, seed=0, validate=lambda model: 0.0):
    return TrainingData(histories, num_items, seed, validate)


def test_popularity_counts_training():
    scores = PopularityScorer(training()).scores(np.arange(2), [[1], [2]])
    assert scores.tolist() == [[2, 3, 2, 1, 0]] * 2


def test_random_is_the_same_for_a_user_whenever_asked():
    scorer = RandomScorer(training(num_items=6, seed=1))
    both = scorer.scores(np.array([3, 5]), [[1], [1]])
    assert np.array_equal(scorer.scores(np.array([5]), [[2]])[0], both[1])
    assert not np.array_equal(both[0], both[1])


def test_interactions_decay_with_age():
    assert interaction_matrix([[3, 1], [2]], 3, 0.5).toarray().tolist() == [[1.0, 0.0, 0.5], [0.0, 1.0, 0.0]]


def test_knn_similarity_by_hand():
    similarity = knn_similarity(interaction_matrix(TRAINING, 5), shrink=1.0).toarray()
    assert similarity[0, 1] == pytest.approx(2 / (np.sqrt(2 * 3) + 1))
    assert similarity[1, 2] == pytest.approx(2 / (np.sqrt(3 * 2) + 1))
    assert similarity[0, 2] == pytest.approx(1 / (np.sqrt(2 * 2) + 1))
    assert np.diag(similarity).tolist() == [0.0] * 5
    assert similarity[3].tolist() == [0.0] * 5


def test_scores_sum_similarities_over_the_history():
    similarity = np.arange(9.0).reshape(3, 3)
    for form in (similarity, sparse.csr_matrix(similarity)):
        scores = ItemSimilarityScorer(form, 0.5).scores(np.arange(1), [[1, 3]])
        assert np.asarray(scores).tolist() == [(0.5 * similarity[0] + similarity[2]).tolist()]


def test_ease_solves_the_ridge_regression_with_a_zero_diagonal():
    rng = np.random.default_rng(0)
    histories = [list(1 + rng.choice(6, 3, replace=False)) for _ in range(40)]
    interactions = interaction_matrix(histories, 6)
    weights = ease_weights(interactions, 5.0)
    x = interactions.toarray()
    assert np.diag(weights).tolist() == [0.0] * 6
    for j in range(6):  # each column: ridge regression of item j on the other items
        others = [i for i in range(6) if i != j]
        expected = np.linalg.solve(x[:, others].T @ x[:, others] + 5.0 * np.eye(5), x[:, others].T @ x[:, j])
        assert weights[others, j] == pytest.approx(expected)


def test_what_does_not_fit_into_memory_is_refused_before_the_work(monkeypatch):
    histories = ItemSequences.of([[1, 2, 3]] * 100)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10_000))
    require_memory(["random", "popularity"], histories, 1000)
    with pytest.raises(
        InputError, match=r"ease would take 0\.0 GB for 1,000 items and 100 users, .* leave ease out of"
    ):
        require_memory(["popularity", "ease"], histories, 1000)
    assert not fits("itemknn", histories, 1000)  # 900 pairs of 56 bytes
    assert fits("itemknn", histories[:10], 1000)


@pytest.mark.parametrize(("kind", "setting"), [("itemknn", "shrink 0"), ("ease", "regularisation 100")])
def test_settings_are_chosen_on_validation(kind, setting, caplog):
    caplog.set_level("INFO")
    seen = []

    def validate(model):
        seen.append(model)
        return {3: 0.9}.get(len(seen), 0.5)

    assert BASELINES[kind](training(validate=validate)) is seen[2]
    assert len(seen) == 9
    assert f"chose {kind} with {setting}, decay 0.8: validation 0.9000" in caplog.text


def test_baselines_in_the_order_of_tables():
    assert list(BASELINES) == ["random", "popularity", "itemknn", "ease"]


@pytest.mark.parametrize("kind", BASELINES)
def test_every_baseline_scores_the_catalogue(kind):
    model = BASELINES[kind](training())
    assert model.scores(np.arange(2), [[1], [2, 3]]).shape == (2, 5)


class TestPrecomputed:
    def test_rows_are_the_users(self, tmp_path):
        scores = np.arange(6, dtype=np.float32).reshape(2, 3)
        np.savez(tmp_path / "s.npz", scores=scores)
        assert PrecomputedScorer(tmp_path / "s.npz", 2, 3).scores(np.array([1]), [[1]]).tolist() == [[3, 4, 5]]

    def test_errors(self, tmp_path):
        path = tmp_path / "s.npz"
        with pytest.raises(InputError, match="no such file; precomputed scores are an .npz"):
            PrecomputedScorer(path, 2, 3)
        path.write_bytes(b"zip?")
        with pytest.raises(InputError, match="not an .npz file"):
            PrecomputedScorer(path, 2, 3)
        np.savez(path, other=np.zeros(1))
        with pytest.raises(InputError, match="no array `scores`; it holds other"):
            PrecomputedScorer(path, 2, 3)
        np.savez(path, scores=np.zeros((3, 2)))
        with pytest.raises(InputError, match=r"shape \(3, 2\), expected \[users, items\] = \(2, 3\)"):
            PrecomputedScorer(path, 2, 3)
        np.savez(path, scores=np.array([[0, np.nan, 1], [0, 0, 0]]))
        with pytest.raises(InputError, match="1 scores are NaN"):
            PrecomputedScorer(path, 2, 3)
