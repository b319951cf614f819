"""Scores as confidences, and SASRec's checkpoint."""

import numpy as np
import pytest
import torch

from twice_rec.catalog import ItemCatalog
from twice_rec.cf.confidence import CONFIDENCES, fit_calibration
from twice_rec.cf.recipe import SASRecConfig
from twice_rec.cf.sasrec import SASRec, SASRecScorer
from twice_rec.errors import InputError
from twice_rec.records import Item

CATALOG = ItemCatalog([Item(f"I{i}", f"item {i}") for i in range(20)])
HISTORIES = [[1, 2, 3], [4], [5, 6, 7, 8], [1, 2, 3]]
SHOWN = np.array([[4, 5, 6], [1, 2, 3], [9, 10, 11], [12, 13, 14]])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = SASRec(SASRecConfig(hidden_size=16, inner_size=16, dropout=0.2, max_length=5), 20).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def scorer(model):
    scorer = SASRecScorer(model)
    scorer.calibrate(HISTORIES, SHOWN, SHOWN[:, 0])
    return scorer


def test_scores_are_dot_products(model, scorer):
    scores = scorer.scores(np.arange(4), HISTORIES)
    assert scores.shape == (4, 20)
    expected = model.user_states([HISTORIES[2]])[0] @ model.item_embedding.weight[9]
    assert scores[2, 8] == pytest.approx(expected.item(), rel=1e-4)


def test_logits_are_scores_of_the_named_items(scorer):
    logits = scorer.logits(HISTORIES, SHOWN)
    assert logits == pytest.approx(np.take_along_axis(scorer.scores(np.arange(4), HISTORIES), SHOWN - 1, 1), rel=1e-4)


def test_equal_histories_are_computed_once(scorer, monkeypatch):
    seen = []
    original = SASRec.user_states
    monkeypatch.setattr(
        SASRec, "user_states", lambda self, histories: seen.append(len(histories)) or original(self, histories)
    )
    scorer.confidences(HISTORIES * 5, np.tile(SHOWN, (5, 1)))
    assert seen == [3]


def test_sigmoid(scorer):
    z = scorer.logits(HISTORIES, SHOWN)
    assert scorer.confidences(HISTORIES, SHOWN) == pytest.approx(1 / (1 + np.exp(-z)), rel=1e-5)


def test_softmax_sums_to_one_over_the_list(scorer):
    assert scorer.confidences(HISTORIES, SHOWN, "softmax").sum(axis=1) == pytest.approx(np.ones(4), rel=1e-5)


def test_debiased_scores_have_no_item_mean(scorer):
    everything = np.tile(np.arange(1, 21), (4, 1))
    probability = scorer.confidences(HISTORIES, everything, "sigmoid", debiased=True).astype(np.float64)
    z = np.log(probability / (1 - probability))
    assert z.mean(axis=0) == pytest.approx(np.zeros(20), abs=1e-4)


def test_item_means_by_brute_force(scorer):
    assert scorer.item_mean[1:] == pytest.approx(
        scorer.scores(np.arange(4), HISTORIES).mean(axis=0), rel=1e-4, abs=1e-5
    )


def test_popularity_share_by_brute_force(scorer):
    z = scorer.scores(np.arange(4), HISTORIES).numpy().astype(np.float64)
    assert scorer.popularity_share(HISTORIES) == pytest.approx(z.mean(axis=0).var() / z.var(), rel=1e-4)


def test_popularity_share_is_one_without_users_in_it(model):
    assert SASRecScorer(model).popularity_share([[3, 4]] * 5) == pytest.approx(1.0)


def test_calibration_finds_the_generating_line():
    rng = np.random.default_rng(0)
    z = rng.normal(2.0, 3.0, 40_000)
    hit = rng.random(40_000) < 1 / (1 + np.exp(-(0.7 * z - 2.5)))
    a, b = fit_calibration(z, hit)
    assert (a, b) == (pytest.approx(0.7, abs=0.03), pytest.approx(-2.5, abs=0.08))


def test_calibrated_confidences_match_the_rate_of_targets():
    z = np.concatenate([np.full(90, -1.0), np.full(10, 3.0)])
    hit = np.concatenate([np.arange(90) < 9, np.arange(10) < 8])
    a, b = fit_calibration(z, hit)
    assert 1 / (1 + np.exp(-(a * -1.0 + b))) == pytest.approx(0.1, abs=1e-3)
    assert 1 / (1 + np.exp(-(a * 3.0 + b))) == pytest.approx(0.8, abs=1e-3)


def test_calibration_needs_both_kinds():
    with pytest.raises(ValueError, match="needs targets and other items"):
        fit_calibration(np.ones(3), np.ones(3, dtype=bool))


def test_file_round_trip(scorer, tmp_path):
    path = tmp_path / "model.safetensors"
    scorer.save(path, CATALOG)
    again = SASRecScorer.load(path, CATALOG)
    assert list(CONFIDENCES) == ["sigmoid", "calibrated", "softmax"]
    for kind in CONFIDENCES:
        for debiased in (False, True):
            before = scorer.confidences(HISTORIES, SHOWN, kind, debiased)
            assert np.array_equal(again.confidences(HISTORIES, SHOWN, kind, debiased), before)


def test_one_model_is_one_file_byte_for_byte(scorer, tmp_path):
    """What rests on it would be stale otherwise, if it is trained again."""
    files = [tmp_path / f"{number}.safetensors" for number in range(8)]
    for path in files:
        scorer.save(path, CATALOG)
    assert len({path.read_bytes() for path in files}) == 1


def test_checkpoint_of_another_catalogue_names_both(scorer, tmp_path):
    path = tmp_path / "model.safetensors"
    scorer.save(path, CATALOG)
    other = ItemCatalog([Item("X", "x"), Item("Y", "y")])
    with pytest.raises(InputError) as caught:
        SASRecScorer.load(path, other)
    message = str(caught.value)
    assert "trained on another catalogue: 20 items" in message
    assert "has 2 items" in message
    assert CATALOG.fingerprint[:12] in message
    assert other.fingerprint[:12] in message
    assert "sasrec.sh" in message


def test_checkpoint_whose_weights_are_not_those_of_its_settings(model, tmp_path, monkeypatch):
    path, settings = tmp_path / "model.safetensors", {**model.settings(), "num_layers": 3}
    monkeypatch.setattr(model, "settings", lambda: settings)
    SASRecScorer(model).save(path, CATALOG)
    with pytest.raises(InputError, match=r"its weights are not those of its settings: .* train it again"):
        SASRecScorer.load(path, CATALOG)


@pytest.mark.parametrize("content", [None, b"", b"not a model", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_missing_or_damaged_checkpoint(tmp_path, content):
    path = tmp_path / "model.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"no such file; train SASRec first|not a SASRec of this project"):
        SASRecScorer.load(path, CATALOG)


def test_confidences_need_what_was_saved(model):
    bare = SASRecScorer(model)
    with pytest.raises(ValueError, match="no item means"):
        bare.confidences(HISTORIES, SHOWN, "sigmoid", debiased=True)
    with pytest.raises(ValueError, match="no calibration of these scores"):
        bare.confidences(HISTORIES, SHOWN, "calibrated")
