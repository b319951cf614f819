"""The plan of a study: what is run, in which order, what is shared, and what is expected; nothing is run here."""

import json
from pathlib import Path

import pytest

from twice_rec.errors import InputError
from twice_rec.evaluation.claims import CLAIMS
from twice_rec.manifest import Manifest
from twice_rec.recipe_reader import load_recipe
from twice_rec.study.expected import ALIKE, MEASURED, THERE, UNKNOWN, Expected, expected_of, total_seconds
from twice_rec.study.links import check_link, make_link
from twice_rec.study.places import Places
from twice_rec.study.plan import flags_of, make_plan, waits_for
from twice_rec.study.recipe import StudyRecipe

ROOT = Path(__file__).parents[2]
TINY = ROOT / "recipes" / "tiny"
# The pipeline of one variant, and one more variant as a part.
RUNS = [
    {"stage": "prepare", "once": True},
    {"stage": "rationales", "once": True},
    {"stage": "sasrec", "others": {"baselines": []}},
    {"stage": "sft"},
    {"stage": "grpo"},
    {"stage": "evaluate", "variants": ["base", "oracle"], "once": True},
    {"stage": "evaluate", "variants": ["stage2", "stage3"]},
    {"part": "lambda", "stage": "grpo", "variant": "stage3_lambda0", "reward_lambda": 0.0},
    {"part": "lambda", "stage": "evaluate", "variants": ["stage3_lambda0"]},
    {"stage": "report"},
]


def study(run_dir, runs=RUNS, **keys):
    """A study of the tiny recipes."""
    values = {"domain": "Synthetic", "seed": 42, "seeds": 2, "recipes_dir": str(TINY), "parts": ["lambda"], **keys}
    return StudyRecipe(run_dir=str(run_dir), runs=runs, **values)


def told(runs):
    return [run.name for run in runs]


def words_of(run):
    """The flags of a run, key -> text."""
    flags = iter(run.words[1:])
    return {name.removeprefix("--"): text for name, text in zip(flags, flags, strict=True)}


def test_seed_by_seed_and_what_all_seeds_share_once(tmp_path):
    runs = make_plan(study(tmp_path / "tiny"))
    of_each = ["sasrec sasrec", "sft stage2", "grpo stage3", "evaluate stage2", "evaluate stage3"]
    of_each += ["grpo stage3_lambda0", "evaluate stage3_lambda0"]
    once = ["prepare", "rationales rationales", "evaluate base", "evaluate oracle"]
    assert sorted(told(runs)) == sorted(
        [f"seed 42 {name}" for name in [*of_each, *once, "report"]] + [f"seed 43 {name}" for name in of_each]
    )
    assert told(runs)[:2] == ["seed 42 prepare", "seed 42 rationales rationales"]
    assert told(runs)[-1] == "seed 42 report"
    assert [run.seed for run in runs[:-1]] == sorted(run.seed for run in runs[:-1])
    other = next(run for run in runs if run.name == "seed 43 sft stage2")
    first = tmp_path / "tiny"
    assert other.run_dir == tmp_path / "tiny_seed43"
    assert dict(other.links) == {"data": first / "data", "rationales": first / "rationales"}
    assert not next(run for run in runs if run.name == "seed 42 sft stage2").links


def test_trainings_have_their_seed_and_test_users_those_of_the_first(tmp_path):
    runs = {run.name: words_of(run) for run in make_plan(study(tmp_path / "tiny"))}
    assert {name: runs[f"seed 43 {name}"]["seed"] for name in ("sft stage2", "grpo stage3", "evaluate stage3")} == {
        "sft stage2": "43", "grpo stage3": "43", "evaluate stage3": "42",
    }  # fmt: skip
    assert runs["seed 43 sasrec sasrec"]["baselines"] == "[]"
    assert "baselines" not in runs["seed 42 sasrec sasrec"]
    assert runs["seed 42 grpo stage3_lambda0"]["reward_lambda"] == "0.0"


def test_a_run_waits_for_what_it_reads_also_behind_links(tmp_path):
    runs = make_plan(study(tmp_path / "tiny"))
    of = {run.name: run for run in runs}

    def waits(name):
        return told(waits_for(of[name], runs))

    assert waits("seed 43 sft stage2") == ["seed 42 prepare", "seed 42 rationales rationales"]
    assert waits("seed 43 grpo stage3") == ["seed 42 prepare", "seed 43 sft stage2", "seed 43 sasrec sasrec"]
    assert waits("seed 43 evaluate stage3_lambda0") == ["seed 42 prepare", "seed 43 grpo stage3_lambda0"]
    assert waits("seed 42 evaluate base") == ["seed 42 prepare"]
    assert set(waits("seed 42 report")) == set(told(runs)) - {"seed 42 report"}
    for number, run in enumerate(runs):
        assert all(runs.index(other) < number for other in waits_for(run, runs)), run.name


def test_variant_c_needs_no_stage_2_and_a_baseline_as_cf_model_no_sasrec(tmp_path):
    c = {"stage": "grpo", "variant": "stage3_C", "model_name_or_path": "assets/tiny_base", "cf_model": "itemknn"}
    runs = make_plan(study(tmp_path / "tiny", [{"stage": "prepare", "once": True}, c], parts=[], seeds=1))
    assert told(waits_for(runs[1], runs)) == ["seed 42 prepare"]


def test_overrides_reach_all_runs_of_a_stage_and_an_entry_wins(tmp_path):
    overrides = {"grpo": {"max_steps": 4, "reward_lambda": 2.0}, "evaluate": {"num_users": 50}}
    runs = {run.name: run for run in make_plan(study(tmp_path / "tiny", overrides=overrides))}
    assert runs["seed 43 grpo stage3"].recipe.trainer_keys["max_steps"] == 4
    assert runs["seed 43 grpo stage3"].recipe.reward_lambda == 2.0
    assert runs["seed 43 grpo stage3_lambda0"].recipe.reward_lambda == 0.0
    assert runs["seed 42 evaluate base"].recipe.num_users == 50


def test_each_domain_has_a_folder_and_a_report(tmp_path):
    recipe = study(tmp_path / "{domain}", domains=["Beauty", "Toys"], seeds=1, parts=[])
    assert recipe.run_path == tmp_path / "Beauty"
    runs = make_plan(recipe)
    assert {run.run_dir for run in runs} == {tmp_path / "Beauty", tmp_path / "Toys"}
    assert told(runs)[-2:] == ["Toys seed 42 report", "Beauty seed 42 report"]
    of = {run.name: run for run in runs}
    assert all(run.domain == "Toys" for run in waits_for(of["Toys seed 42 report"], runs))
    assert [run.name for run in runs if run.sums_up] == ["Beauty seed 42 report"]  # it has the table over both
    waiting = waits_for(of["Beauty seed 42 report"], runs)
    assert [run.name for run in waiting if run.domain == "Toys"] == ["Toys seed 42 report"]
    assert not any(run.sums_up for run in make_plan(study(tmp_path / "{domain}", domains=["Beauty"], parts=[])))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"parts": ["lamda"]}, "parts names lamda; runs has lambda"),
        ({"runs": [{"stage": "sfy"}], "parts": []}, "entry 1 of runs has the stage 'sfy'; it must be one of prepare, "),
        ({"runs": [{"stage": "sft", "once": 1}], "parts": []}, "entry 1 of runs has once 1; it must be a bool"),
        ({"runs": [{"stage": "sft", "seed": 1}], "parts": []}, "has seed, which the study sets itself"),
        ({"runs": [], "parts": []}, "runs is empty"),
        ({"overrides": {"grop": {}}}, "overrides names 'grop'"),
        ({"overrides": {"grpo": {"run_dir": "x"}}}, "overrides of grpo has run_dir"),
        ({"overrides": {"report": {"missing_domains": []}}}, "overrides of report has missing_domains"),
        ({"domains": ["A", "B"]}, "put {domain} into it"),
        ({"domains": []}, "domains is empty"),
        ({"seeds": 0}, "greater than or equal to 1"),
    ],
)
def test_a_wrong_study_is_named(tmp_path, keys, says):
    with pytest.raises(ValueError, match=r"(?s).*" + says.replace("{", r"\{").replace("}", r"\}")):
        study(tmp_path / "tiny", **keys)


def test_all_wrong_recipes_are_told_at_once_before_anything_runs(tmp_path):
    runs = [
        {"stage": "prepare", "recipe": "nowhere.yaml", "once": True},
        {"stage": "sft", "rationale_rows": -1},
        {"stage": "grpo", "reward_lamda": 1.0},
    ]
    with pytest.raises(InputError) as caught:
        make_plan(study(tmp_path / "tiny", runs, parts=[]))
    text = str(caught.value)
    assert "nowhere.yaml: no such recipe" in text
    assert "rationale_rows is -1; it must be at least 0" in text
    assert "unknown key reward_lamda; did you mean reward_lambda?" in text
    assert not (tmp_path / "tiny").exists()


def test_what_no_run_makes_must_be_there(tmp_path):
    runs = [{"stage": "prepare", "once": True}, {"stage": "evaluate", "variants": ["stage2_x"]}]
    with pytest.raises(InputError, match="evaluate stage2_x needs .*tiny/sft_x, which is not there, and no run"):
        make_plan(study(tmp_path / "tiny", runs, parts=[], seeds=1))
    (tmp_path / "tiny" / "sft_x").mkdir(parents=True)
    assert len(make_plan(study(tmp_path / "tiny", runs, parts=[], seeds=1))) == 2


def test_two_runs_do_not_write_the_same_results(tmp_path):
    twice = [*RUNS, {"stage": "grpo"}]
    assert len(make_plan(study(tmp_path / "tiny", twice))) == len(make_plan(study(tmp_path / "tiny")))
    different = [*RUNS, {"stage": "grpo", "reward_lambda": 1.0}]
    with pytest.raises(InputError, match="grpo is written by two different runs"):
        make_plan(study(tmp_path / "tiny", different))


def test_a_sasrec_that_holds_out_the_prompts_of_one_seed_is_not_shared(tmp_path):
    shared = [{"stage": "prepare", "once": True}, {"stage": "sasrec", "once": True}]
    with pytest.raises(InputError, match=r"held_out_prompts of 0.2 keeps the prompts of seed 42"):
        make_plan(study(tmp_path / "tiny", shared, parts=[]))
    shared[1]["held_out_prompts"] = 0.0
    assert len(make_plan(study(tmp_path / "tiny", shared, parts=[]))) == 2
    assert len(make_plan(study(tmp_path / "tiny", [*shared[:1], {"stage": "sasrec"}], parts=[]))) == 3


def results(folder, stage, config, seconds, outputs=None):
    folder.mkdir(parents=True)
    Manifest(stage, config, {}, outputs or {}, {}, {"seconds": seconds}).save(folder)


def test_seconds_are_those_of_equal_results_whatever_their_seed(tmp_path):
    recipe = study(tmp_path / "tiny")
    of = {run.name: run for run in make_plan(recipe)}
    known = of["seed 42 grpo stage3"].recipe.settings()
    results(tmp_path / "tiny" / "grpo", "grpo", known, 200.0)
    results(tmp_path / "tiny" / "sft", "sft", {**of["seed 42 sft stage2"].recipe.settings(), "direct_rows": 9}, 60.0)
    expected = expected_of(list(of.values()), recipe)
    assert expected[of["seed 42 grpo stage3"]] == Expected(0.0, THERE)
    assert expected[of["seed 43 grpo stage3"]] == Expected(200.0, MEASURED)
    assert expected[of["seed 42 grpo stage3_lambda0"]] == Expected(200.0, ALIKE)  # the study varies reward_lambda
    assert expected[of["seed 43 sft stage2"]] == Expected(None, UNKNOWN)  # it does not vary direct_rows
    assert expected[of["seed 42 prepare"]].how == UNKNOWN


def test_seconds_of_an_evaluation_are_those_of_all_its_rankings(tmp_path):
    recipe = study(tmp_path / "tiny", overrides={"evaluate": {"rankings": ["likelihood", "sampled"]}})
    of = {run.name: run for run in make_plan(recipe)}
    asked = {
        ranking: of["seed 42 evaluate stage2"].recipe.ranking_settings(ranking) for ranking in ("likelihood", "sampled")
    }
    del asked["likelihood"]["cf_hints"], asked["likelihood"]["permutations"]  # as an earlier version left it
    results(tmp_path / "tiny" / "eval" / "base", "evaluate", asked["likelihood"], 30.0)
    expected = expected_of(list(of.values()), recipe)
    assert expected[of["seed 43 evaluate stage2"]].how == UNKNOWN  # nobody knows of the sampled one
    results(tmp_path / "tiny" / "eval" / "base_sampled", "evaluate", asked["sampled"], 50.0)
    expected = expected_of(list(of.values()), recipe)
    assert expected[of["seed 43 evaluate stage2"]] == Expected(80.0, MEASURED)
    assert expected[of["seed 42 evaluate base"]] == Expected(0.0, THERE)
    assert expected[of["seed 42 evaluate oracle"]].how == UNKNOWN  # a score file is not asked
    score_lists = {"lists": of["seed 42 evaluate oracle"].recipe.lists_of("oracle")}
    results(tmp_path / "tiny_seed43" / "eval" / "oracle", "evaluate", score_lists, 2.0)
    assert expected_of(list(of.values()), recipe)[of["seed 42 evaluate oracle"]] == Expected(2.0, MEASURED)


def test_an_evaluation_with_hints_waits_for_their_model_and_is_another_one(tmp_path):
    asked = {"variants": ["base"], "cf_hints": 3, "suffix": "hinted", "rankings": ["likelihood"]}
    runs = [*RUNS, {"stage": "evaluate", **asked}]
    recipe = study(tmp_path / "tiny", runs, seeds=1, parts=[])
    plan = make_plan(recipe)
    (hinted,) = (run for run in plan if run.recipe.everything().get("suffix") == "hinted")
    assert tmp_path / "tiny" / "sasrec" in hinted.reads
    results(tmp_path / "tiny" / "eval" / "base_hinted", "evaluate", hinted.recipe.ranking_settings("likelihood"), 200.0)
    assert expected_of(plan, recipe)[hinted] == Expected(0.0, THERE)
    without = hinted.recipe.ranking_settings("likelihood") | {"cf_hints": 0}
    Manifest("evaluate", without, {}, {}, {}, {"seconds": 200.0}).save(tmp_path / "tiny" / "eval" / "base_hinted")
    assert expected_of(plan, recipe)[hinted].how != THERE


def test_ceilings_are_score_files_which_have_one_result_whatever_the_rankings(tmp_path):
    runs = [{"stage": "prepare"}, {"stage": "evaluate", "variants": ["ceiling_text", "oracle"]}]
    _, *asked = make_plan(study(tmp_path, runs, seeds=1, parts=[]))
    assert asked[0].recipe.rankings == ["likelihood", "sampled"]
    assert [run.makes for run in asked] == [(tmp_path / "eval" / name,) for name in ("ceiling_text", "oracle")]


def test_the_time_of_all_is_that_of_the_longest_way(tmp_path):
    runs = make_plan(study(tmp_path / "tiny", seeds=1, parts=[]))
    seconds = {"prepare": 10, "rationales": 5, "sasrec": 60, "sft": 40, "grpo": 100, "evaluate": 20, "report": 1}
    expected = {run: Expected(float(seconds[run.stage]), MEASURED) for run in runs}
    alone = sum(seconds[run.stage] for run in runs)
    assert alone == 10 + 5 + 60 + 40 + 100 + 4 * 20 + 1
    assert total_seconds(runs, expected, Places((), 1, 1)) == alone
    # prepare, then sasrec beside rationales and sft; 100 of grpo from 70 on, beside it the others, stage3, report
    assert total_seconds(runs, expected, Places((), 2, 1)) == 10 + 60 + 100 + 20 + 1


def test_seeds_share_by_links_and_differing_results_are_not_taken_for_shared(tmp_path):
    first, link = tmp_path / "tiny" / "data", tmp_path / "tiny_seed43" / "data"
    make_link(link, first)  # before it is there
    assert link.is_symlink()
    results(first, "prepare", {}, 1.0, {"data/catalog.jsonl": "one"})
    assert Manifest.load(link).outputs == {"data/catalog.jsonl": "one"}
    make_link(link, first)
    copy = tmp_path / "tiny_seed44" / "data"
    results(copy, "prepare", {}, 1.0, {"data/catalog.jsonl": "one"})
    make_link(copy, first)
    assert not copy.is_symlink()
    other = tmp_path / "tiny_seed45" / "data"
    results(other, "prepare", {}, 1.0, {"data/catalog.jsonl": "other"})
    with pytest.raises(InputError, match="hold different results"):
        make_link(other, first)
    elsewhere = tmp_path / "tiny_seed46" / "data"
    elsewhere.parent.mkdir()
    elsewhere.symlink_to(other)
    assert "is a link to" in check_link(elsewhere, first)[0]


def test_flags_are_read_back_as_the_same_values(tmp_path):
    values = {"a": 1e-5, "b": None, "c": True, "d": ["x", "y"], "e": [["a", "b"]], "f": "null", "g": {"k": 1}, "h": []}
    words = flags_of(values)
    assert words[:4] == ["--a", "1e-05", "--b", "null"]
    assert words[words.index("--f") + 1] == "null"
    assert json.loads(words[words.index("--e") + 1]) == [["a", "b"]]


@pytest.mark.parametrize(("gpus", "processes", "shares", "needed"), [
    ((), 2, False, 2), ((), 1, False, 1), (("0", "1"), 2, False, 2), (("0",), 1, True, 1),
])  # fmt: skip
def test_stage_3_takes_the_places_of_its_servers_too(tmp_path, gpus, processes, shares, needed):
    runs = [{"stage": "prepare", "once": True}, {"stage": "sasrec"}, {"stage": "sft"}]
    served = {"stage": "grpo", "recipe": "grpo_server.yaml", "rollout_shares_gpu": shares}
    runs += [{"stage": "rationales", "once": True}, served]
    plan = make_plan(study(tmp_path / "tiny", runs, parts=[], seeds=1))
    places = Places(gpus, processes, 1)
    served = next(run for run in plan if run.stage == "grpo")
    assert places.needed(served) == needed
    assert places.needed(plan[0]) == 1
    places.check(plan)
    if gpus:
        taken = list(gpus)[:needed]
        assert places.environment(taken)["CUDA_VISIBLE_DEVICES"] == "0"
        assert places.environment_of_servers(taken)["CUDA_VISIBLE_DEVICES"] == taken[-1]


def test_too_few_gpus_and_servers_elsewhere_are_named(tmp_path):
    runs = [{"stage": "grpo", "recipe": "grpo_server.yaml", "needs": ["data"]}]
    for name in ("data", "sft", "sasrec"):
        (tmp_path / "tiny" / name).mkdir(parents=True)
    plan = make_plan(study(tmp_path / "tiny", runs, parts=[], seeds=1))
    with pytest.raises(InputError, match="takes 2 GPUs, a trainer's and 1 of rollout servers, and this machine has 1"):
        Places(("0",), 1, 1).check(plan)
    runs[0] |= {"rollout_timeout_seconds": 5.0}
    far = study(tmp_path / "tiny", runs, parts=[], seeds=1, overrides={})
    (plan,) = make_plan(far)
    object.__setattr__(plan.recipe, "rollout_servers", ["node7:8000"])
    with pytest.raises(InputError, match="node7:8000, but a study starts the servers itself"):
        Places((), 2, 1).check([plan])


@pytest.mark.parametrize("name", ["tiny", "grocery", "amazon"])
def test_the_studies_of_the_repository_can_be_planned(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    folder = str(tmp_path / "{domain}")
    recipe = load_recipe(f"recipes/{name}/study.yaml", StudyRecipe, ["--run_dir", folder, "--seeds", "2"])
    runs = make_plan(recipe, here=False)
    made = {path.name for run in runs for path in run.makes if path.parent.name == "eval"}
    variants = ["base", "stage2", "stage3", "stage3_C", "stage3_D", "stage3_improved", "sasrec", "stage2_no_rationale"]
    variants += [f"stage3_lambda{value}" for value in (0, 1, 2, 4, 5)] + ["stage2_item_only", "stage3_item_only"]
    assert made >= set(variants)
    samples = next(run.recipe.bootstrap_samples for run in runs if run.stage == "report")
    claims = 2 * (len(CLAIMS) + 1)  # by two rankings, and two of click-through rates
    assert claims * 2 / (samples + 1) < 0.05 / 2 or name == "amazon"  # or no claim could ever be significant
