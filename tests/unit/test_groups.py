"""Means by groups of users, and what is recommended, from a few users worked out by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from twice_rec.catalog import ItemCatalog
from twice_rec.data import dataset
from twice_rec.data.dataset import PreparedData
from twice_rec.evaluation.equals import Terms
from twice_rec.evaluation.groups import details_of, groups_of
from twice_rec.evaluation.recipe import ReportRecipe
from twice_rec.evaluation.report import Variant
from twice_rec.files import write_records
from twice_rec.records import CandidateLists, Interaction, Item, UserSequence

RECIPE = ReportRecipe(run_dir="runs/x", domain="D", seed=0, bootstrap_samples=100)


def variant(hits, first=None):
    """One that hits where `hits` says so: user -> 0 or 1."""
    values = {f"uniform/{name}": np.array(list(hits.values()), dtype=float) for name in ("hr@1", "hr@5", "ndcg@5")}
    return Variant({user: row for row, user in enumerate(hits)}, values, 1, (SimpleNamespace(asked={}),), first or {})


def test_groups_are_quarters_of_the_users():
    users = [f"u{i}" for i in range(8)]
    values = np.array([7, 1, 2, 3, 4, 5, 6, 8])
    hits = {user: float(value > 4) for user, value in zip(users, values, strict=True)}
    groups = groups_of(values, users, {"a": variant(hits)}, "uniform", RECIPE)
    assert [(group["label"], group["n"]) for group in groups] == [
        ("1 to 2", 2), ("3 to 4", 2), ("5 to 6", 2), ("7 to 8", 2),
    ]  # fmt: skip
    assert [group["variants"]["a"]["hr@1"]["mean"] for group in groups] == [0, 0, 1, 1]
    assert groups[0]["variants"]["a"]["hr@1"]["ci95"] == [0, 0]


def test_equal_values_are_never_parted():
    users = [f"u{i}" for i in range(8)]
    hits = dict.fromkeys(users, 1.0)
    groups = groups_of(np.array([5, 5, 5, 5, 5, 5, 9, 12]), users, {"a": variant(hits)}, "uniform", RECIPE)
    assert [(group["label"], group["n"]) for group in groups] == [("5", 6), ("9 to 12", 2)]
    assert [group["label"] for group in groups_of(np.full(8, 3), users, {"a": variant(hits)}, "uniform", RECIPE)] == [
        "3"
    ]
    assert groups_of(np.full(8, 3), users, {"a": variant(hits)}, "hard", RECIPE)[0]["variants"] == {}


@pytest.fixture
def data(tmp_path):
    """I1 is bought by all in training, I2 by one; the targets are I3, which nobody trains on, and I1."""
    catalog = ItemCatalog([Item(f"I{i}", f"item {i}") for i in range(1, 6)])
    catalog.save(tmp_path / dataset.CATALOG)
    bought = [["I1", "I2", "I5", "I3"], ["I1", "I4", "I1"]]
    sequences = [
        UserSequence(f"u{i}", tuple(map(Interaction, of)), len(of) - 2, len(of) - 2, len(of) - 1)
        for i, of in enumerate(bought)
    ]
    write_records(tmp_path / dataset.SEQUENCES, sequences)
    lists = [CandidateLists(f"u{i}", of[-1], {"uniform": (of[-1], "I2")}) for i, of in enumerate(bought)]
    write_records(tmp_path / dataset.candidates_file("test"), lists)
    return PreparedData(tmp_path)


def test_what_is_recommended(data):
    first = {"uniform": {"u0": ["I1", "I3"], "u1": ["I1", "I1"]}}  # of two trainings
    terms = (Terms(data.folder, {}, {}),)
    model = Variant({"u0": 0, "u1": 1}, {"uniform/hr@1": np.array([0.5, 1.0])}, 2, terms, first)
    details = details_of({"a": model, "old": variant({"u0": 1, "u1": 0})}, data, RECIPE)
    # Two training interactions with I1, one with I2. The first training recommends I1 twice, the other I3 and I1.
    assert details["recommended"] == {
        "targets": {"targets": {"coverage": 2 / 5, "popularity": 1.0}},
        "a": {"uniform": {"coverage": pytest.approx(1.5 / 5), "popularity": pytest.approx(1.5)}},
    }
    lengths, popularity = details["groups"]["history_length"], details["groups"]["target_popularity"]
    assert [(group["label"], group["variants"]["a"]["hr@1"]["mean"]) for group in lengths] == [("2", 1.0), ("3", 0.5)]
    assert [group["label"] for group in popularity] == ["0", "2"]
    assert details["position"] == {}
