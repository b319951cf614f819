"""The paper's claims: verdicts come from intervals, and what was not run is named with what makes it."""

import json
from pathlib import Path

import pytest

from reported import ALONE, ASKED, VOTES, clicked, evaluated, judged, prepared
from twice_rec.evaluation.claims import CLAIMS, claims_of, counts, verdict
from twice_rec.evaluation.recipe import ReportRecipe
from twice_rec.evaluation.report import read_variants, results_of
from twice_rec.evaluation.sheets import claim_rows
from twice_rec.files import hash_file
from twice_rec.manifest import Hashes, Manifest, making_command


def claims(run_dir, **settings):
    recipe = ReportRecipe(run_dir=str(run_dir), domain="D", seed=0, bootstrap_samples=200, **settings)
    variants, _ = read_variants([run_dir])
    return {row["id"]: row for row in claims_of(variants, recipe, Hashes())}


@pytest.fixture
def run_dir(tmp_path):
    prepared(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("low", "high", "or_equal", "says"),
    [
        (0.01, 0.2, False, "shown"),
        (0.0, 0.2, False, "not shown"),
        (0.0, 0.2, True, "shown"),
        (-0.1, 0.2, False, "not shown"),
        (-0.1, 0.0, True, "not shown"),
        (-0.2, -0.1, False, "contradicted"),
        (-0.2, -0.1, True, "contradicted"),
        (0.0, 0.0, False, "not shown"),
    ],
)
def test_the_verdict_is_where_the_interval_lies(low, high, or_equal, says):
    assert verdict(low, high, or_equal) == says


@pytest.mark.parametrize(
    ("low", "high", "by_seed", "says"),
    [
        (0.01, 0.2, [0.1, 0.2, 0.01], "shown"),
        (0.01, 0.2, [0.3, 0.2, -0.01], "not shown"),
        (-0.2, -0.01, [-0.3, -0.2, 0.01], "not shown"),
        (-0.2, -0.01, [-0.3, -0.2, -0.1], "contradicted"),
    ],
)
def test_each_seed_must_lie_on_that_side(low, high, by_seed, says):
    assert verdict(low, high, by_seed=by_seed) == says


def test_seeds_that_disagree_show_nothing(tmp_path):
    """Over users the mean of the seeds is +1/4 for each, so its interval is a point; but one seed is worse."""
    runs = [tmp_path / name for name in ("one", "two")]
    for run_dir, of_stage3 in zip(runs, ([1] * 8, [2] * 8), strict=True):
        prepared(run_dir)
        evaluated(run_dir, "stage3", of_stage3, ASKED)
    evaluated(runs[0], "stage2", [2] * 8, ASKED)  # in the first run only: both seeds are held against it
    evaluated(runs[0], "sasrec", [1, 2] * 4)
    evaluated(runs[1], "sasrec", [2, 2] * 4)
    recipe = ReportRecipe(run_dir=str(runs[0]), domain="D", seed=0, bootstrap_samples=200)
    variants, _ = read_variants(runs)
    found = {row["id"]: row for row in claims_of(variants, recipe, Hashes())}
    assert found["rq3_e_b"]["by_seed"] == [1.0, 0.0]
    assert found["rq3_e_b"]["runs"] == 2  # stage 2 has one, held against both
    assert (found["rq3_e_b"]["difference"], found["rq3_e_b"]["verdict"]) == (0.5, "not shown")
    assert found["table1_sasrec"]["by_seed"] == [0.5, 0.0]
    cells = {row[0]: row[-1] for row in claim_rows(list(found.values()))[1]}
    assert cells["RQ3: E > B, by likelihood"] == "1 of 2"
    assert cells["RQ3: E > D"] == "-"


def test_claims_are_compared_user_by_user(run_dir):
    good, poor = [1] * 8, [2] * 8
    evaluated(run_dir, "sasrec", good)
    evaluated(run_dir, "base", good, ASKED)
    evaluated(run_dir, "stage2", poor, ASKED)
    evaluated(run_dir, "stage3", [1] * 7 + [2], ASKED)
    found = claims(run_dir)
    assert found["rq3_b_a"]["verdict"] == "contradicted"
    assert found["rq3_b_a"]["difference"] == -1.0
    assert found["rq3_b_a"]["ci95"] == [-1.0, -1.0] or tuple(found["rq3_b_a"]["ci95"]) == (-1.0, -1.0)
    assert found["rq3_e_b"]["verdict"] == "shown"
    assert found["rq3_e_b"]["difference"] == 7 / 8
    assert found["table1_sasrec"]["verdict"] == "not shown"  # -1/8, with 0 in the interval
    assert (found["rq3_e_b"]["n"], found["rq3_e_b"]["runs"], found["rq3_e_b"]["way"]) == (8, 1, "by likelihood")
    # Holm over the three that were run: p of the two certain ones is 2 / 201, times 3, and times 2 but not below that.
    assert found["rq3_b_a"]["p_holm"] == pytest.approx(3 * 2 / 201)
    assert found["rq3_e_b"]["p_holm"] == pytest.approx(3 * 2 / 201)
    assert found["rq3_e_d"]["p_holm"] is None


def test_what_is_missing_is_named_with_the_command_that_makes_it(run_dir):
    evaluated(run_dir, "stage3", [1] * 8, ASKED)
    found = claims(run_dir)
    assert len(found) == len(CLAIMS) + 3
    assert counts(list(found.values())) == {"shown": 0, "not shown": 0, "contradicted": 0, "not run": len(found)}
    assert found["rq3_e_d"]["why"] == "stage3_D not evaluated"
    assert found["rq3_e_d"]["commands"] == [f"bash study.sh RECIPE --run_dir {run_dir}"]
    assert found["table1_sasrec"]["commands"] == [f"bash sasrec.sh RECIPE --run_dir {run_dir}"]
    assert found["rq3_b_a"]["why"] == "stage2 and base not evaluated"
    assert found["rq5_full_ml"]["commands"] == [f"bash ab_test.sh RECIPE --run_dir {run_dir}"]
    assert all(row["difference"] is None and row["p_holm"] is None for row in found.values())


def test_the_command_of_a_run_with_an_odd_name_can_be_pasted():
    command = making_command(Path("/runs/$(touch x) y"), "judge")
    assert command == "bash judge.sh RECIPE --run_dir '/runs/$(touch x) y'"


def test_a_second_ranking_has_a_row_of_its_own(run_dir):
    evaluated(run_dir, "sasrec", [2] * 8)
    for name, ranks in (("stage2", [2] * 8), ("stage3", [1] * 8)):
        evaluated(run_dir, name, ranks, ASKED)
        evaluated(run_dir, f"{name}_sampled", [1] * 8, VOTES)
    found = claims(run_dir)
    assert found["rq3_e_b"]["verdict"] == "shown"
    assert found["rq3_e_b_sampled"]["verdict"] == "not shown"
    assert found["rq3_e_b_sampled"]["way"] == "by votes"
    assert found["rq3_e_b_sampled"]["claim"] == "rq3_e_b"
    assert (found["table1_sasrec_sampled"]["a"], found["table1_sasrec_sampled"]["b"]) == ("stage3_sampled", "sasrec")
    assert "rq3_e_d_sampled" not in found


def test_only_rq6_compares_across_prompt_forms(run_dir):
    evaluated(run_dir, "stage2", [1] * 8, ASKED)
    evaluated(run_dir, "stage2_item_only", [2] * 8, ALONE)
    evaluated(run_dir, "stage2_no_rationale", [2] * 8, ALONE)
    evaluated(run_dir, "base", [2] * 8, ALONE)
    found = claims(run_dir)
    assert found["rq6_a_b_stage2"]["verdict"] == "shown"
    assert found["rq6_b_c"]["verdict"] == "not shown"
    assert found["rq3_b_a"]["verdict"] == "not run"
    assert "different with_rationale (True and False)" in found["rq3_b_a"]["why"]
    recipe = ReportRecipe(run_dir=str(run_dir), domain="D", seed=0, comparisons=[["stage2", "stage2_item_only"]])
    assert results_of(read_variants([run_dir])[0], recipe)["comparisons"] == []


def test_the_papers_claims_are_of_prompts_without_hints(run_dir):
    evaluated(run_dir, "sasrec", [2] * 8)
    evaluated(run_dir, "stage3", [1] * 8, ASKED | {"cf_hints": "3 of sasrec"})
    row = claims(run_dir)["table1_sasrec"]
    assert row["verdict"] == "not run"
    assert row["why"] == "stage3 was asked with cf_hints 3 of sasrec, and the paper's prompts have none"


@pytest.mark.parametrize(
    ("of_stage3", "of_lambda0", "why"),
    [
        ({}, {"reward_lambda": 0.0}, None),
        ({}, {"reward_lambda": 3.0}, "stage3_lambda0 of RUN was trained with reward_lambda 3.0, not 0.0"),
        ({"reward_lambda": 2.0}, {"reward_lambda": 0.0}, "stage3 of RUN was trained with reward_lambda 2.0, not 3.0"),
        ({}, {"reward_lambda": 0.0, "max_steps": 4}, "they were trained with different max_steps (128 and 4) in RUN"),
        ({}, {"reward_lambda": 0.0, "save_steps": 4}, None),
        ({}, {"reward_lambda": 0.0, "cf_hints": 0}, None),  # what the other did, whose version had no such key
        ({}, {"reward_lambda": 0.0, "cf_hints": 3}, "they were trained with different cf_hints (0 and 3) in RUN"),
    ],
)
def test_a_variant_is_what_it_was_trained_as_not_what_it_is_called(run_dir, of_stage3, of_lambda0, why):
    for name, folder, keys in (("stage3", "grpo", of_stage3), ("stage3_lambda0", "grpo_lambda0", of_lambda0)):
        model = run_dir / folder / "merged"
        model.mkdir(parents=True)
        (model / "model").write_text(name)
        hashed = hash_file(model)
        config = {"reward_lambda": 3.0, "max_steps": 128, "save_steps": 32, **keys}
        Manifest("grpo", config, {}, {f"{folder}/merged": hashed}).save(run_dir / folder)
        evaluated(run_dir, name, [1] * 8 if name == "stage3" else [2] * 8, ASKED, **{f"{folder}/merged": hashed})
    row = claims(run_dir)["rq4_3_0"]
    assert (row["verdict"], row.get("why")) == (("shown", None) if why is None else ("not run", row["why"]))
    assert why is None or row["why"] == why.replace("RUN", str(run_dir))


def test_c_starts_from_the_base_and_d_has_other_rewards(run_dir):
    for name, folder in (("stage3", "grpo"), ("stage3_C", "grpo_C"), ("stage3_D", "grpo_D")):
        model = run_dir / folder / "merged"
        model.mkdir(parents=True)
        (model / "model").write_text(name)
        config = {"model_name_or_path": None, "reward_funcs": ["collaborative"], "reward_weights": [4.0]}
        Manifest("grpo", config, {}, {f"{folder}/merged": hash_file(model)}).save(run_dir / folder)
        evaluated(run_dir, name, [1] * 8, ASKED, **{f"{folder}/merged": hash_file(model)})
    evaluated(run_dir, "base", [2] * 8, ASKED)
    found = claims(run_dir)
    says = "was trained without model_name_or_path, so it started from stage 2"
    assert found["rq3_c_a"]["why"] == f"stage3_C of {run_dir} {says}"
    same = "reward_funcs, reward_weights, reward_lambda"
    assert found["rq3_e_d"]["why"] == f"they were trained with the same {same} in {run_dir}"


def test_not_below_is_shown_by_equals(run_dir):
    evaluated(run_dir, "stage3", [1, 2] * 4, ASKED)
    for value in (0, 5):
        evaluated(run_dir, f"stage3_lambda{value}", [1, 2] * 4, ASKED)
    found = claims(run_dir)
    assert found["rq4_3_0"]["verdict"] == "not shown"
    assert found["rq4_3_5"]["verdict"] == "shown"


@pytest.mark.parametrize(
    ("share", "says"), [(0.60, "contradicted"), (0.76, "not shown"), (0.82, "shown"), (0.8071, "shown")]
)
def test_rationales_are_held_against_the_papers_share(run_dir, share, says):
    evaluated(run_dir, "stage3", [1] * 8, ASKED)
    judged(run_dir, share=share)
    row = claims(run_dir)["rq2_share3_rules"]
    assert row["verdict"] == says
    assert row["difference"] == pytest.approx(share - 0.7571)
    assert (row["value"], row["paper"], row["n"], row["way"]) == (share, 0.7571, 300, "judge rules")


def test_clicks_are_compared_in_the_papers_direction(run_dir):
    evaluated(run_dir, "stage3", [1] * 8, ASKED)
    clicked(run_dir, "sasrec", "stage3", -0.02)
    row = claims(run_dir)["rq5_full_ml"]
    assert (row["a"], row["b"], row["verdict"], row["n"]) == ("stage3", "sasrec", "shown", 2000)
    assert row["difference"] == pytest.approx(0.02)
    assert row["ci95"] == pytest.approx([0.01, 0.04])
    assert claims(run_dir)["rq5_ml_random"]["why"] == "the test has no such arms"
    assert claim_rows([row])[1][0][5] == "2,000 impressions"  # the column's name is Users


def test_a_simulation_is_judged_over_its_users_not_over_its_visits(run_dir):
    evaluated(run_dir, "stage3", [1] * 8, ASKED)
    of_users = {"difference": -0.02, "ci95": [-0.1, 0.05], "p": 0.4, "n": 8}
    clicked(run_dir, "sasrec", "stage3", -0.02, over_users=of_users)
    row = claims(run_dir)["rq5_full_ml"]
    assert (row["verdict"], row["n"], row["p"], row["difference"]) == ("not shown", 8, 0.4, 0.02)
    assert row["ci95"] == [-0.05, 0.1]
    assert claim_rows([row])[1][0][5] == "8"


def test_a_changed_judgement_is_no_verdict(run_dir):
    evaluated(run_dir, "stage3", [1] * 8, ASKED)
    judged(run_dir)
    folder = run_dir / "judge" / "stage3"
    Manifest("judge", {}, {}, {"judge/stage3/scores.json": "other"}).save(folder)
    row = claims(run_dir)["rq2_share3"]
    assert row["verdict"] == "not run"
    assert "scores.json was changed since the judge stage finished" in row["why"]
    (folder / "manifest.json").unlink()
    (folder / "scores.json").write_text("[]")
    assert "holds no JSON object" in claims(run_dir)["rq2_share3"]["why"]


def test_rows_are_json(run_dir):
    evaluated(run_dir, "stage3", [1] * 8, ASKED)
    assert json.loads(json.dumps(list(claims(run_dir).values()), allow_nan=False))
