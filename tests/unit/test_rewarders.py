"""The CF models that give confidences, with scores worked out by hand."""

from math import exp, log, sqrt

import numpy as np
import pytest
import torch

from twice_rec.catalog import ItemCatalog
from twice_rec.cf.baselines import BASELINES, baseline
from twice_rec.cf.held_out import NOTHING
from twice_rec.cf.hints import CFHints, make_hints
from twice_rec.cf.recipe import ConfidenceConfig, SASRecConfig
from twice_rec.cf.rewarders import load_rewarder, rewarder_inputs
from twice_rec.cf.sasrec import SASRec, SASRecScorer
from twice_rec.data import dataset
from twice_rec.data.dataset import PreparedData
from twice_rec.errors import InputError
from twice_rec.files import write_records
from twice_rec.records import CandidateLists, Example, Interaction, Item, UserSequence

CATALOG = ItemCatalog([Item(f"I{i}", f"item {i}") for i in range(1, 5)])


def prepared(folder, users, shown, kind="uniform"):
    """Prepared data of users given as (training part, validation target or None); every list shows the same items."""
    CATALOG.save(folder / dataset.CATALOG)
    sequences = [
        UserSequence(
            f"u{row}",
            tuple(Interaction(f"I{i}") for i in [*training, *([target] if target else [])]),
            num_train=len(training),
            valid=len(training) if target else None,
            test=None,
        )
        for row, (training, target) in enumerate(users)
    ]
    write_records(folder / dataset.SEQUENCES, sequences)
    for split in ("train", "valid"):
        lists = [
            CandidateLists(s.user_id, s.target(split).item_id, {kind: tuple(f"I{i}" for i in shown)})
            for s in sequences
            if s.target_position(split) is not None
        ]
        write_records(folder / dataset.candidates_file(split), lists)
    return PreparedData(folder)


# Items 1, 2, 3, 4 occur 4, 2, 1, 3 times. Together occur 1 and 4 twice; 1 and 3, 1 and 2, 2 and 4 once.
USERS = [([1, 4], 2), ([4, 1], 2), ([3, 1], 2), ([1, 2], 3), ([2, 4], None)]


def loaded(tmp_path, users=USERS, shown=(2, 3), kind="uniform", **config):
    return load_rewarder(ConfidenceConfig(**config), tmp_path, prepared(tmp_path / "data", users, shown, kind), NOTHING)


def sigmoid(z):
    return 1 / (1 + exp(-z))


def test_popularity(tmp_path):
    model = loaded(tmp_path, cf_model="popularity")
    histories, items = [[1], [4, 2]], np.array([[1, 4], [2, 3]])
    assert model.logits(histories, items).tolist() == [[4, 3], [2, 1]]
    assert model.logits(histories, items).dtype == np.float32
    assert model.confidences([[1]], np.array([[2, 3]]), "sigmoid")[0] == pytest.approx([sigmoid(2), sigmoid(1)])
    assert model.confidences([[1]], np.array([[2, 3]]), "softmax")[0] == pytest.approx([sigmoid(1), sigmoid(-1)])
    # Of the four validation lists, item 2 (score 2) is the target of three, item 3 (score 1) of one: a = 2 ln 3.
    calibrated = model.confidences([[1]], np.array([[2, 3, 1, 4]]), "calibrated")[0]
    assert calibrated == pytest.approx([3 / 4, 1 / 4, 243 / 244, 27 / 28], rel=1e-5)
    assert list(model.calibration) == ["raw"]


def test_item_knn(tmp_path):
    model = loaded(tmp_path, cf_model="itemknn")  # all settings tie, so it is without shrinkage and decay
    both = [1 / sqrt(8) + 1 / sqrt(6), 1 / sqrt(4)]  # n_12 / sqrt(n_1 n_2) + n_42 / sqrt(n_4 n_2); n_13 / sqrt(n_1 n_3)
    assert model.logits([[1, 4]], np.array([[2, 3]]))[0] == pytest.approx(both)
    assert model.confidences([[1, 4]], np.array([[2, 3]]))[0] == pytest.approx([sigmoid(z) for z in both])
    # Item 2 scores `both` for the first two users, 1 / sqrt(8) for the others.
    debiased = model.confidences([[1, 4]], np.array([[2]]), debiased=True)
    assert debiased[0, 0] == pytest.approx(sigmoid(1 / (2 * sqrt(6))))
    assert list(model.calibration) == ["raw", "debiased"]


def test_ease(tmp_path):
    # 1 occurs five times, twice with 2; 3 and 4 occur with each other only, so the regression falls into two pairs.
    users = [([1, 2], None), ([1, 2], None), ([1], 2), ([1], 2), ([1], 3), ([3, 4], None)]
    model = loaded(tmp_path, users, cf_model="ease")
    logits = model.logits([[1], [2], [1, 4]], np.array([[2, 3], [1, 4], [2, 3]]))
    assert logits == pytest.approx(np.array([[2 / 105, 0], [2 / 102, 0], [2 / 105, 1 / 101]]))
    # Item 2 is the target of two of the three validation lists, item 3 of one.
    assert model.confidences([[1]], np.array([[2, 3]]), "calibrated")[0] == pytest.approx([2 / 3, 1 / 3], rel=1e-5)


def test_sasrec_is_the_saved_model(tmp_path):
    torch.manual_seed(0)
    model = SASRec(SASRecConfig(hidden_size=4, inner_size=4, num_layers=1, max_length=3), 4).eval()
    torch.nn.init.normal_(model.item_embedding.weight)
    scorer = SASRecScorer(model)
    scorer.calibrate([[1, 4], [2]], np.array([[2, 3], [1, 4]]), np.array([2, 4]))
    scorer.save(tmp_path / "sasrec_other" / "model.safetensors", CATALOG)
    found = loaded(tmp_path, cf_model="sasrec_other")
    state = model.user_states([[1, 4]])[0].tolist()
    embedding = model.item_embedding.weight[3].tolist()
    z = sum(x * y for x, y in zip(state, embedding, strict=True))
    assert found.confidences([[1, 4]], np.array([[2, 3]]))[0, 1] == pytest.approx(sigmoid(z), rel=1e-5)
    assert found.calibration == scorer.calibration


def test_sasrec_must_be_there(tmp_path):
    config = ConfidenceConfig()
    with pytest.raises(InputError, match=r"sasrec/model\.safetensors: no such .* made by sasrec\.sh, which must run"):
        rewarder_inputs(config, tmp_path)
    with pytest.raises(InputError, match="popularity, itemknn, ease need no file"):
        load_rewarder(config, tmp_path, prepared(tmp_path / "data", USERS, (2, 3)), NOTHING)
    path = tmp_path / "sasrec" / "model.safetensors"
    path.parent.mkdir()
    path.touch()
    assert rewarder_inputs(config, tmp_path) == [path]


@pytest.mark.parametrize("name", BASELINES)
def test_what_is_fitted_has_no_input(tmp_path, name):
    assert rewarder_inputs(ConfidenceConfig(cf_model=name), tmp_path) == [tmp_path / "data" / "candidates.valid.jsonl"]


def test_a_confidence_does_not_depend_on_who_else_is_asked_about(tmp_path):
    for name in BASELINES:
        model = loaded(tmp_path, cf_model=name)
        histories, items = [[1, 4], [2], [1, 4]], np.array([[2, 3], [1, 4], [2, 3]])
        together = model.logits(histories, items)
        model._batch_size = 1
        assert np.array_equal(model.logits(histories, items), together)
        assert np.array_equal(together[0], together[2])


def test_without_uniform_lists_the_prompts_list_calibrates(tmp_path):
    model = loaded(tmp_path, kind="hard", cf_model="popularity")
    assert model.calibration["raw"] == (pytest.approx(2 * log(3)), pytest.approx(-3 * log(3)))


def test_hints_are_the_first_candidates_with_their_chances(tmp_path):
    """By popularity items 4 and 3 have the scores 3 and 1; the chance is the softmax of the calibrated scores."""
    model = loaded(tmp_path, cf_model="popularity")
    scale, _ = model.calibration["raw"]
    asked = Example("u", (Interaction("I1"),), ("I3", "I2", "I4"), "I2")
    weights = {"I4": exp(3 * scale), "I2": exp(2 * scale), "I3": exp(scale)}
    chances = [(item, pytest.approx(weight / sum(weights.values()))) for item, weight in weights.items()]
    assert CFHints(model, CATALOG, 2)(asked) == chances[:2]
    assert CFHints(model, CATALOG, 9)(asked) == chances
    assert make_hints(ConfidenceConfig(), model, CATALOG) is None


def test_a_new_rewarder_is_one_class(tmp_path):

    @baseline("toy")
    class Toy:
        def __init__(self, training):
            self.num_items = training.num_items

        def scores(self, users, histories):
            return np.array([[history[-1] - j for j in range(self.num_items)] for history in histories])

    try:
        model = loaded(tmp_path, cf_model="toy", confidence_debiased=True)
        assert model.logits([[1, 4], [2]], np.array([[1, 3], [4, 2]])).tolist() == [[4, 2], [-1, 1]]
        Toy.scores = lambda self, users, histories: np.ones((len(histories), self.num_items)) * 0.1
        with pytest.raises(InputError, match="cf_model toy scores an item alike for all users"):
            loaded(tmp_path, cf_model="toy", confidence_debiased=True)
    finally:
        del BASELINES["toy"]


def test_popularity_is_not_debiased():
    with pytest.raises(ValueError, match="cf_model is popularity with confidence_debiased true"):
        ConfidenceConfig(cf_model="popularity", confidence_debiased=True)
