"""The A/B test: intervals and tests against values by hand, the simulation, and what cannot be used."""

import json
import math

import numpy as np
import pytest

from twice_rec.catalog import ItemCatalog
from twice_rec.errors import InputError
from twice_rec.evaluation.ab_test import Traffic, analyse, expected_rate, over_users, read_log, simulate
from twice_rec.evaluation.proportions import false_alarms, two_proportions, wilson
from twice_rec.evaluation.recipe import AbTestRecipe
from twice_rec.files import write_json, write_jsonl, write_records
from twice_rec.records import CandidateLists, Interaction, Item, Prediction, UserSequence
from twice_rec.stages import stage4c_ab_test


def recipe_of(run_dir="r", **keys):
    known = {"run_dir": str(run_dir), "domain": "D", "seed": 1, "latency_calls": 0, "aa_tests": 200, "device": "cpu"}
    return AbTestRecipe(**{**known, **keys})


def test_wilson_by_hand():
    """Of 10 clicks of 100: (.1 + z²/200 ± z √(.09/100 + z²/40,000)) / (1 + z²/100), with z² = 3.8415."""
    low, high = wilson(10, 100)
    middle, half = 0.1 + 0.0192073, 1.959964 * math.sqrt(0.0009 + 0.00009603647)
    assert (low, high) == pytest.approx(((middle - half) / 1.0384146, (middle + half) / 1.0384146), abs=1e-6)
    assert (round(low, 4), round(high, 4)) == (0.0552, 0.1744)


def test_wilson_at_the_ends():
    assert wilson(0, 10) == pytest.approx((0, 3.841459 / 13.841459), abs=1e-6)  # z² / (n + z²)
    assert wilson(10, 10) == pytest.approx((10 / 13.841459, 1), abs=1e-6)
    for clicks, impressions in ((1, 0), (-1, 5), (6, 5)):
        with pytest.raises(ValueError, match=f"{clicks} clicks of {impressions} impressions"):
            wilson(clicks, impressions)


def test_two_proportions_by_hand():
    """45 of 300 against 30 of 300: pooled 1/8, error √(1/8 · 7/8 · 2/300) = .0270031, z = .05 / .0270031 = 1.8516."""
    found = two_proportions(45, 300, 30, 300)
    assert found.difference == pytest.approx(0.05)
    assert found.z == pytest.approx(1.85164, abs=1e-5)
    assert found.p == pytest.approx(0.06408, abs=1e-5)  # twice the tail of a standard normal beyond 1.85164
    (low_a, high_a), (low_b, high_b) = wilson(45, 300), wilson(30, 300)
    assert found.ci95[0] == pytest.approx(0.05 - math.sqrt((0.15 - low_a) ** 2 + (high_b - 0.1) ** 2))
    assert found.ci95[1] == pytest.approx(0.05 + math.sqrt((high_a - 0.15) ** 2 + (0.1 - low_b) ** 2))
    assert two_proportions(30, 300, 45, 300).z == -found.z


def test_many_visits_of_few_users_do_not_make_more_users():
    """Of 4 users arm a is sure of a click for two and has none of the others; arm b has 1/4 everywhere."""
    clicks = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    found = over_users(np.array([0, 0, 0, 0]), None, clicks, seed=1)  # a less an arm that draws: +-1/2 for two each
    assert (found["difference"], found["n"]) == (0.0, 4)
    assert found["ci95"] == (-0.5, 0.5)  # all four alike has probability 1/8 > .05
    traffic = simulate({"a": np.array([0, 0, 0, 0]), "b": None}, clicks, recipe_of(arms={"a": 0.5, "b": 0.5}))
    low, high = analyse(traffic, recipe_of())["comparisons"][0]["ci95"]
    assert high - low < 0.01  # over 355,150 visits


def test_if_nobody_or_everybody_clicked_nothing_differs():
    assert two_proportions(0, 10, 0, 20).p == 1
    assert two_proportions(10, 10, 20, 20).z == 0


def test_one_look_keeps_five_percent_and_peeking_does_not():
    once, peeking = false_alarms(4000, 4000, 0.1, looks=20, tests=4000, seed=1)
    assert once == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / 4000))
    assert 0.2 < peeking < 0.3  # Armitage, McPherson and Rowe (1969): .25 for 20 looks
    assert false_alarms(4000, 4000, 0.1, 1, 500, 1)[0] == false_alarms(4000, 4000, 0.1, 1, 500, 1)[1]


CLICKS = np.array([[0.9, 0.1], [0.3, 0.7]])  # [U, C]


def test_visits_follow_shares_and_probabilities():
    recipe = recipe_of(visits=40_000, arms={"random": 0.25, "good": 0.75})
    good = np.array([0, 1])
    drawn, better = simulate({"random": None, "good": good}, CLICKS, recipe)
    assert drawn.impressions + better.impressions == 40_000
    assert better.impressions == pytest.approx(30_000, abs=5 * math.sqrt(40_000 * 0.25 * 0.75))
    assert expected_rate(None, CLICKS) == 0.5
    assert expected_rate(good, CLICKS) == 0.8
    assert drawn.clicks / drawn.impressions == pytest.approx(0.5, abs=5 * 0.5 / 100)
    assert better.clicks / better.impressions == pytest.approx(0.8, abs=5 * 0.4 / math.sqrt(30_000))
    assert simulate({"random": None, "good": good}, CLICKS, recipe) == [drawn, better]
    other = recipe.model_copy(update={"seed": 2})
    assert simulate({"random": None, "good": good}, CLICKS, other) != [drawn, better]


def test_an_arm_without_a_visit_is_refused():
    recipe = recipe_of(visits=3, arms={"random": 1e-9, "good": 1 - 1e-9})
    with pytest.raises(InputError, match="arm random got none of 3 visits; raise visits"):
        simulate({"random": None, "good": np.array([0, 1])}, CLICKS, recipe)


def test_all_pairs_are_compared_the_later_arm_first():
    traffic = [Traffic("a", 300, 30), Traffic("b", 300, 45), Traffic("c", 100, 10)]
    result = analyse(traffic, recipe_of())
    assert [(row["a"], row["b"]) for row in result["comparisons"]] == [("b", "a"), ("c", "a"), ("c", "b")]
    assert result["comparisons"][0]["z"] == pytest.approx(1.85164, abs=1e-5)
    assert result["arms"][1]["ctr"] == 0.15


def test_a_log_is_counted(tmp_path):
    log = tmp_path / "log.jsonl"
    write_jsonl(log, [{"arm": "old", "clicked": x, "user": 3} for x in (True, 0, 0)] + [{"arm": "new", "clicked": 1}])
    assert read_log(log) == [Traffic("old", 3, 1), Traffic("new", 1, 1)]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"arm": "a"}, "line 2: expected arm .text. and clicked .*found arm 'a' and clicked None"),
        ({"arm": "a", "clicked": 2}, "clicked 2"),
        ({"arm": "a", "clicked": "yes"}, "clicked 'yes'"),
        ({"arm": "", "clicked": 1}, "found arm ''"),
        ({"arm": "b", "clicked": 1}, "expected at least two arms, found b"),
    ],
)
def test_a_log_that_cannot_be_used(tmp_path, row, says):
    write_jsonl(tmp_path / "log.jsonl", [{"arm": "b", "clicked": 0}, row])
    with pytest.raises(InputError, match=says):
        read_log(tmp_path / "log.jsonl")


@pytest.mark.parametrize(
    ("arms", "says"),
    [
        ({"random": 1.0}, "arms has random; a test needs at least two arms"),
        ({"random": 0.5, "sasrec": 0.4}, "arms has the shares 0.5 \\+ 0.4; they must be above 0 and sum to 1"),
        ({"random": 1.2, "sasrec": -0.2}, "above 0"),
        ({"random": 0.5, "../x": 0.5}, "it names a folder under eval/"),
    ],
)
def test_arms_that_cannot_be_used(arms, says):
    with pytest.raises(ValueError, match=says):
        recipe_of(arms=arms)


# Two items each, utilities ln 3 and 0 of the first, so softmax gives 3/4 and 1/4.
ITEMS = ["i1", "i2", "i3"]


@pytest.fixture
def run_dir(tmp_path):
    """A run with two users, the oracle, and a language model that was asked about the first user only."""
    data = tmp_path / "data"
    data.mkdir()
    ItemCatalog([Item(item_id, f"Title {item_id}") for item_id in ITEMS]).save(data / "catalog.jsonl")
    past = (Interaction("i3"), Interaction("i3"))
    write_records(
        data / "sequences.jsonl", [UserSequence(u, (*past, Interaction("i1")), 1, 1, 2) for u in ("u1", "u2")]
    )
    lists = [CandidateLists(user, "i1", {"uniform": ("i2", "i1")}) for user in ("u1", "u2")]
    write_records(data / "candidates.test.jsonl", lists)
    write_json(data / "prompt.json", {})
    np.savez(data / "oracle.npz", scores=np.log(np.array([[3.0, 1.0, 9.0], [1.0, 3.0, 9.0]], dtype=np.float32)))
    for name in ("stage3", "oracle"):
        (tmp_path / "eval" / name).mkdir(parents=True)
        ranking = {"ranking": ("i1", "i2")} if name == "stage3" else {}
        rows = [Prediction(user, "i1", {"uniform": 1}, **ranking) for user in ("u1", "u2")[: 1 + (name == "oracle")]]
        write_records(tmp_path / "eval" / name / "predictions.jsonl", rows)
    return tmp_path


def test_the_stage_simulates_on_the_users_that_the_language_model_answered(run_dir, capsys):
    arms = {"random": 0.5, "stage3": 0.25, "oracle": 0.25}
    stage4c_ab_test.ab_test(recipe_of(run_dir, arms=arms, visits=2000))
    result = json.loads((run_dir / "ab_test" / "ab_test.json").read_text())
    assert (result["kind"], result["users"], result["visits"]) == ("simulation", 1, 2000)
    assert [arm["expected_ctr"] for arm in result["arms"]] == pytest.approx([0.5, 0.75, 0.75], abs=1e-6)
    assert sum(arm["impressions"] for arm in result["arms"]) == 2000
    assert [arm["latency_ms"] for arm in result["arms"]] == [None] * 3
    assert "Simulation, not a real test" in capsys.readouterr().out
    before = (run_dir / "ab_test" / "ab_test.json").read_bytes()
    stage4c_ab_test.ab_test(recipe_of(run_dir, arms=arms, visits=2000))  # finished: shown again, made by nobody
    again = recipe_of(run_dir, arms=arms, visits=2000, overwrite=True, looks=19)
    stage4c_ab_test.ab_test(again)
    stage4c_ab_test.ab_test(recipe_of(run_dir, arms=arms, visits=2000, overwrite=True))
    assert (run_dir / "ab_test" / "ab_test.json").read_bytes() == before


def test_calls_are_timed(run_dir):
    stage4c_ab_test.ab_test(recipe_of(run_dir, arms={"random": 0.5, "oracle": 0.5}, visits=100, latency_calls=7))
    result = json.loads((run_dir / "ab_test" / "ab_test.json").read_text())
    assert result["users"] == 2  # no language model, so all
    for arm in result["arms"]:
        assert arm["latency_ms"]["calls"] == 7
        assert 0 < arm["latency_ms"]["mean"] <= 1000
    assert result["machine"]["device"] == "cpu"


def test_a_real_domain_has_no_click_probabilities(run_dir):
    (run_dir / "data" / "oracle.npz").unlink()
    with pytest.raises(
        InputError, match="click probabilities, which only the synthetic domain has; for the log of a real"
    ):
        stage4c_ab_test.ab_test(recipe_of(run_dir))


def test_an_arm_that_is_not_evaluated_is_named(run_dir):
    arms = {"random": 0.5, "stage3_D": 0.5}
    with pytest.raises(InputError, match="arm stage3_D is not evaluated: run evaluate.sh with --variants stage3_D"):
        stage4c_ab_test.ab_test(recipe_of(run_dir, arms=arms))
    assert not (run_dir / "ab_test").exists()


def test_a_list_that_the_language_model_did_not_rank_is_named(run_dir):
    with pytest.raises(InputError, match="arm stage3 ranked no list hard; evaluate it with --lists hard"):
        stage4c_ab_test.ab_test(recipe_of(run_dir, arms={"random": 0.5, "stage3": 0.5}, shown_list="hard"))


def test_a_log_takes_the_place_of_the_simulation(run_dir, tmp_path):
    log = tmp_path / "shop.jsonl"
    write_jsonl(log, [{"arm": arm, "clicked": i % 3 == 0} for arm in ("x", "y") for i in range(30)])
    stage4c_ab_test.ab_test(recipe_of(run_dir, impressions_file=str(log)))
    result = json.loads((run_dir / "ab_test" / "ab_test.json").read_text())
    assert result["kind"] == "log"
    assert [(arm["arm"], arm["impressions"], arm["clicks"]) for arm in result["arms"]] == [("x", 30, 10), ("y", 30, 10)]
    with pytest.raises(InputError, match="no such file or folder"):
        stage4c_ab_test.ab_test(recipe_of(run_dir, impressions_file=str(tmp_path / "none.jsonl")))
