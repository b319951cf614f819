"""SASRec as a recipe asks for it: files, what is held out, the search for settings, the signs of poor training."""

import json
import shutil

import numpy as np
import pytest

from twice_rec.catalog import ItemCatalog
from twice_rec.cf import sasrec_variant
from twice_rec.cf.held_out import HeldOut, prompted
from twice_rec.cf.recipe import ConfidenceConfig, SASRecRecipe
from twice_rec.cf.rewarders import load_rewarder
from twice_rec.cf.sasrec import SASRecScorer
from twice_rec.cf.sasrec_training import SASRecTrainer
from twice_rec.cf.sasrec_variant import STATE, TUNING, SASRecVariant
from twice_rec.data import dataset
from twice_rec.data.dataset import PreparedData
from twice_rec.errors import InputError
from twice_rec.files import write_records
from twice_rec.records import SPLITS, CandidateLists, Interaction, Item, UserSequence

USERS, ITEMS = 200, 20
CATALOG = ItemCatalog([Item(f"I{i:02}", f"item {i}") for i in range(1, ITEMS + 1)])
PLAIN = {"hidden_size": 16, "inner_size": 16, "epochs": 6, "batch_size": 50, "validation_steps": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Item i is followed by i + 1, in a circle."""
    folder, rng = tmp_path_factory.mktemp("run") / "data", np.random.default_rng(0)
    sequences, lists = [], {split: [] for split in SPLITS}
    for user, start in enumerate(rng.integers(0, ITEMS, USERS)):
        items = [f"I{(start + k) % ITEMS + 1:02}" for k in range(6)]
        sequence = UserSequence(f"u{user}", tuple(map(Interaction, items)), 4, 4, 5)
        sequences.append(sequence)
        for split in SPLITS:
            target = sequence.target(split).item_id
            others = [item for item in CATALOG.ids if item != target]
            shown = rng.permutation([target, *rng.permutation(others)[:4].tolist()])
            lists[split].append(CandidateLists(f"u{user}", target, {"uniform": tuple(shown.tolist())}))
    CATALOG.save(folder / dataset.CATALOG)
    write_records(folder / dataset.SEQUENCES, sequences)
    for split in SPLITS:
        write_records(folder / dataset.candidates_file(split), lists[split])
    return PreparedData(folder)


def variant_of(data, **keys):
    recipe = SASRecRecipe(run_dir=str(data.folder.parent), domain="D", seed=3, **{**PLAIN, **keys})
    return SASRecVariant(recipe, data, "cpu", lambda figures: None)


def test_data_is_read_from_a_folder_whose_name_looks_like_a_pattern(data, tmp_path):
    other = PreparedData(shutil.copytree(data.folder, tmp_path / "a[1]*"))
    assert other.training_histories().padded().tolist() == data.training_histories().padded().tolist()
    shown = [one.questions("test", ["uniform"]).candidates["uniform"].tolist() for one in (other, data)]
    assert shown[0] == shown[1]


def test_a_training_leaves_a_calibrated_model_and_says_what_it_measured(data, tmp_path):
    (figures,) = variant_of(data, held_out_prompts=0.25, learning_rate=0.01).train({3: tmp_path})
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert figures["steps"] == log[-1]["step"]
    assert figures["valid/full/ndcg@10"] == max(row["validation"] for row in log)
    assert figures["valid/uniform/ndcg@5"] > 0.8
    scorer = SASRecScorer.load(tmp_path / "model.safetensors", CATALOG)
    assert scorer.held_out == HeldOut(0.25, 3)
    assert set(scorer.calibration) == {"raw", "debiased"}


def test_the_prompts_targets_are_kept_from_the_training(data, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        SASRecTrainer, "__init__", lambda self, c, t, n, sequences, *rest: seen.extend(map(len, sequences))
    )
    variant_of(data, held_out_prompts=0.25)._trainer(variant_of(data)._recipe, 3, tmp_path / STATE)
    asked = set(prompted(USERS, 0.25, 3).tolist())
    assert seen == [3 if user in asked else 4 for user in range(USERS)]


def test_tune_takes_what_is_best_on_validation_and_goes_on_after_a_kill(data, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    search = ({}, {"learning_rate": 1e-2}, {"learning_rate": 1e-5})
    monkeypatch.setattr(sasrec_variant, "SEARCH", search)
    variant, begun, original = variant_of(data, tune=True), [], SASRecTrainer.run

    def killed_in_the_third(self, *arguments):
        begun.append(self.config.learning_rate)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(SASRecTrainer, "run", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        variant.tuned(tmp_path)
    assert variant.tuned(tmp_path).learning_rate == 1e-2
    assert begun == [1e-3, 1e-2, 1e-5, 1e-5]
    rows = [json.loads(line) for line in (tmp_path / TUNING).read_text().splitlines()]
    assert [row["settings"] for row in rows] == list(search)
    assert max(rows, key=lambda row: row["validation"])["settings"] == {"learning_rate": 1e-2}
    assert "chose {'learning_rate': 0.01}" in caplog.text
    assert not (tmp_path / STATE).exists()


def test_tune_ends_with_its_time(data, tmp_path, caplog):
    variant = variant_of(data, tune=True, tune_minutes=1e-4)
    assert variant.tuned(tmp_path).values_of(SASRecRecipe) == variant._recipe.values_of(SASRecRecipe)
    assert "tune_minutes are over: 3 of 4 settings were not tried" in caplog.text
    variant.tuned(tmp_path)  # as after a kill later on
    assert len((tmp_path / TUNING).read_text().splitlines()) == 1


def test_tune_needs_heads_that_divide_what_it_tries(data):
    with pytest.raises(InputError, match="tune tries hidden_size 128, which does not divide by num_heads 3"):
        variant_of(data, tune=True, hidden_size=48, num_heads=3)


def test_signs_of_poor_training_are_logged_and_told_again_in_stage_3(data, tmp_path, caplog):
    variant_of(data, epochs=1, learning_rate=1e-6).train({3: tmp_path / "sasrec"})
    assert "sasrec: its last validation is its best: it was still learning" in caplog.text
    assert "on validation it is below itemknn in full/ndcg@10" in caplog.text
    caplog.clear()
    load_rewarder(ConfidenceConfig(), tmp_path, data, HeldOut(0.2, 3))
    assert "cf_model sasrec: on validation it is below itemknn in full/ndcg@10" in caplog.text
    assert "cf_model sasrec was trained on targets of these prompts (it held out those of a share of 0, seed 3; " in (
        caplog.text
    )
    with pytest.raises(InputError, match=r"was trained on targets .*, or cf_hints to 0: .* copy that memory$"):
        load_rewarder(ConfidenceConfig(cf_hints=3), tmp_path, data, HeldOut(0.2, 3))
    load_rewarder(ConfidenceConfig(cf_hints=3), tmp_path, data, HeldOut(0.0, 3))  # an evaluation's


def test_a_model_that_held_the_prompts_out_is_not_named(data, tmp_path, caplog):
    variant_of(data, held_out_prompts=0.2, learning_rate=0.01).train({3: tmp_path / "sasrec"})
    load_rewarder(ConfidenceConfig(), tmp_path, data, HeldOut(0.1, 3))
    assert "was trained on targets" not in caplog.text
