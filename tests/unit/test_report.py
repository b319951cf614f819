"""The report: runs of other seeds are averaged user by user; only fresh results, and only equals, are compared."""

import hashlib
import json

import numpy as np
import pytest

from twice_rec.errors import InputError
from twice_rec.evaluation.equals import Terms, labels
from twice_rec.evaluation.recipe import ReportRecipe
from twice_rec.evaluation.report import compare, read_variants, results_of, summarise_variants
from twice_rec.evaluation.sections import sections_of
from twice_rec.evaluation.tables import list_table, show_metrics
from twice_rec.manifest import Manifest

ASKED = {"ranking": "likelihood", "with_rationale": True, "max_prompt_tokens": None, "max_new_tokens": 100}
PREPARED = {"data/candidates.test.jsonl": "same"}


def evaluated(run_dir, variant, ranks, seed=42, asked=None, **rests_on):
    """An evaluation as stage 4 leaves it, of a language model if `asked` is given; `ranks`: user -> rank."""
    folder = run_dir / "eval" / variant
    folder.mkdir(parents=True)
    rows = [{"user_id": u, "target": "B1", "ranks": {"uniform": rank}, "seed": seed} for u, rank in ranks.items()]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "predictions.jsonl").write_text(text)
    (folder / "metrics.json").write_text(json.dumps({"uniform/hr@1": 0.5, "n": len(ranks)}))
    inputs = {**PREPARED, **{name.replace("__", "/"): value for name, value in rests_on.items()}}
    if "candidates" in inputs:
        inputs["data/candidates.test.jsonl"] = inputs.pop("candidates")
    outputs = {f"eval/{variant}/predictions.jsonl": hashlib.sha256(text.encode()).hexdigest()}
    Manifest("evaluate", asked or {}, inputs, outputs, {}, {}, inputs).save(folder)


def report(*run_dirs, **settings):
    """What report.sh makes of some runs."""
    recipe = ReportRecipe(run_dir=str(run_dirs[0]), domain="D", seed=0, bootstrap_samples=100, **settings)
    variants, left_out = read_variants(run_dirs)
    return results_of(variants, recipe, left_out)


USERS = {"a": 1, "b": 2, "c": 3}


def test_runs_of_other_seeds_are_averaged_user_by_user(tmp_path):
    runs = [tmp_path / name for name in ("tiny", "tiny_1")]
    evaluated(runs[0], "stage2", USERS, asked=ASKED, sft__merged="one")
    evaluated(runs[1], "stage2", {"c": 1, "a": 1, "b": 5}, asked=ASKED, sft__merged="other")
    evaluated(runs[0], "popularity", {"a": 2, "b": 1, "c": 2})
    evaluated(runs[1], "stage3", {"a": 1, "b": 1, "c": 1}, asked=ASKED, sft__merged="other")
    variants, left_out = read_variants(runs)
    assert left_out == []
    assert list(variants) == ["popularity", "stage2", "stage3"]
    assert variants["stage2"].column("uniform/hr@1", ["a", "b", "c"]).tolist() == [1, 0, 0.5]
    assert {name: row["runs"] for name, row in summarise_variants(variants, None, 100).items()} == {
        "popularity": 1, "stage2": 2, "stage3": 1,
    }  # fmt: skip
    difference = compare(variants, "stage3", "stage2", "uniform/hr@1", 100)["difference"]
    assert difference == pytest.approx(np.mean([0, 1, 0.5]))


def test_a_copied_run_is_no_second_training(tmp_path):
    runs = [tmp_path / name for name in ("tiny", "copy", "tiny_1")]
    for run, model in zip(runs, ("one", "one", "other"), strict=True):
        evaluated(run, "stage2", USERS, asked=ASKED, sft__merged=model)
        evaluated(run, "popularity", USERS)
    variants, left_out = read_variants(runs)
    assert {name: variant.runs for name, variant in variants.items()} == {"popularity": 1, "stage2": 2}
    assert left_out == [
        f"{runs[1] / 'eval' / 'stage2'} left out: it is the same evaluation as {runs[0] / 'eval' / 'stage2'}, of the "
        "same training"
    ]


def test_trainings_within_one_folder_count_too(tmp_path):
    evaluated(tmp_path, "sasrec", {"a": 1, "b": 2})
    folder = tmp_path / "eval" / "sasrec"
    text = (folder / "predictions.jsonl").read_text()
    (folder / "predictions.jsonl").write_text(text + text.replace('"seed": 42', '"seed": 43'))
    digest = hashlib.sha256((folder / "predictions.jsonl").read_bytes()).hexdigest()
    Manifest("sasrec", {}, PREPARED, {"eval/sasrec/predictions.jsonl": digest}).save(folder)
    assert read_variants([tmp_path])[0]["sasrec"].runs == 2


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"ranks": {"a": 1}}, "evaluate all of them on the same users and lists"),
        ({"ranks": {"a": 1, "d": 1}}, "some users have no rank for uniform in some of the 2 runs"),
        ({"ranks": {"a": 1, "b": 1}, "candidates": "others"}, "different data/candidates.test.jsonl"),
        ({"ranks": {"a": 1, "b": 1}, "asked": {**ASKED, "ranking": "sampled"}}, "ranking (likelihood and sampled)"),
        ({"ranks": {"a": 1, "b": 1}, "asked": {**ASKED, "with_rationale": False}}, "with_rationale (True and False)"),
    ],
)
def test_runs_that_were_asked_something_else_are_not_averaged(tmp_path, other, says):
    runs = [tmp_path / name for name in ("tiny", "tiny_1")]
    evaluated(runs[0], "popularity", {"a": 1, "b": 2})
    evaluated(runs[0], "stage2", {"a": 1, "b": 2}, asked=ASKED)
    evaluated(runs[1], "stage2", **{"asked": ASKED, **other})
    results = report(*runs, comparisons=[["stage2", "popularity"]])
    assert list(results["variants"]) == ["popularity"]
    assert results["comparisons"] == []
    line, comparison = results["left_out"]
    assert line.startswith("stage2 left out: ")
    assert says in line
    assert comparison == "stage2 - popularity left out: stage2 is not evaluated; popularity are"


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"asked": {**ASKED, "ranking": "sampled"}}, "different ranking (likelihood and sampled)"),
        ({"asked": {**ASKED, "max_prompt_tokens": 900}}, "different max_prompt_tokens (None and 900)"),
        ({"asked": {**ASKED, "vote_ties": "listed"}}, "different vote_ties (None and listed)"),
        ({"asked": {**ASKED, "cf_hints": "3 of sasrec"}}, "different cf_hints (0 and 3 of sasrec)"),
        ({"ranks": {"a": 1, "b": 1}}, "different users (3 and 2, of which both have 2)"),
        ({"sft__merged": "other"}, "different sft/merged (hashes one and other)"),
    ],
)
def test_unequals_are_not_compared(tmp_path, other, says):
    evaluated(tmp_path, "stage2", USERS, asked=ASKED, sft__merged="one")
    evaluated(tmp_path, "stage3", **{"ranks": USERS, "asked": ASKED, "sft__merged": "one", **other})
    results = report(tmp_path, comparisons=[["stage2", "stage3"]])
    assert results["comparisons"] == []
    assert results["left_out"][0].startswith("stage2 - stage3 left out: ")
    assert says in results["left_out"][0]


def test_hints_are_named_in_the_table(tmp_path):
    hinted = labels({"stage3": Terms(tmp_path, {**ASKED, "cf_hints": "3 of sasrec"}, {})})
    assert hinted == {"stage3": "cf_hints 3 of sasrec"}
    without = {name: Terms(tmp_path, {**ASKED, "cf_hints": 0}, {}) for name in ("stage2", "stage3")}
    assert labels(without) == {}
    both = {**without, "stage3_hinted": Terms(tmp_path, {**ASKED, "cf_hints": "3 of sasrec"}, {})}
    assert labels(both)["stage2"] == "cf_hints 0"


def test_equals_are_compared_and_a_language_model_may_answer_for_some_users(tmp_path):
    evaluated(tmp_path, "sasrec", {**USERS, "d": 1})
    evaluated(tmp_path, "popularity", {"a": 1, "b": 1, "c": 1})
    evaluated(tmp_path, "stage2", USERS, asked=ASKED)
    evaluated(tmp_path, "stage3", {"a": 1, "b": 1, "x": 1}, asked=ASKED)
    pairs = [["sasrec", "stage2"], ["stage2", "sasrec"], ["sasrec", "popularity"], ["sasrec", "stage3"]]
    results = report(tmp_path, comparisons=pairs)
    assert [(c["a"], c["b"], c["n"]) for c in results["comparisons"]] == [
        ("sasrec", "stage2", 3), ("stage2", "sasrec", 3),
    ]  # fmt: skip
    assert len([line for line in results["left_out"] if "different users" in line]) == 2


def test_a_comparison_may_be_about_how_the_models_were_asked(tmp_path):
    evaluated(tmp_path, "stage2", {"a": 1, "b": 1, "c": 2, "d": 1}, asked=ASKED)
    evaluated(tmp_path, "stage2_item_only", {"a": 1, "b": 2, "c": 2, "d": 3}, asked={**ASKED, "with_rationale": False})
    pair = ["stage2", "stage2_item_only"]
    assert report(tmp_path, comparisons=[pair])["comparisons"] == []
    assert report(tmp_path, comparisons=[[*pair, "max_prompt_tokens"]])["comparisons"] == []
    (found,) = report(tmp_path, comparisons=[[*pair, "with_rationale"]])["comparisons"]
    assert (found["n"], found["difference"]) == (4, 0.5)  # three of four hit, and one of four


def test_what_a_comparison_is_about_is_a_term(tmp_path):
    with pytest.raises(ValueError, match="names with_rational behind a pair"):
        report(tmp_path, comparisons=[["stage2", "stage3", "with_rational"]])


def test_a_run_on_other_data_is_left_out(tmp_path):
    evaluated(tmp_path / "one", "stage2", USERS, asked=ASKED)
    evaluated(tmp_path / "two", "stage3", USERS, asked=ASKED, candidates="others")
    results = report(tmp_path / "one", tmp_path / "two")
    assert list(results["variants"]) == ["stage2"]
    assert "two/eval/stage3 left out: it was evaluated on different data/cand" in results["left_out"][0]


def test_a_small_evaluation_does_not_shrink_the_shared_table(tmp_path):
    users = {f"u{i}": 1 for i in range(20)}
    evaluated(tmp_path, "popularity", {**users, "v": 1})
    for variant in ("base", "stage2"):
        evaluated(tmp_path, variant, users, asked=ASKED)
    evaluated(tmp_path, "stage3_quick", {"u0": 1}, asked=ASKED)
    results = report(tmp_path)
    assert results["common_users"]["n"] == 20
    assert list(results["common_users"]["variants"]) == ["popularity", "base", "stage2"]
    assert results["left_out"] == [
        "stage3_quick left out of the table of shared users: it was evaluated on 1 users, which are not all of the 20 "
        "of the others"
    ]
    assert results["variants"]["stage3_quick"]["n"] == 1
    evaluated(tmp_path, "stage3", {**users, "v": 1}, asked=ASKED)
    results = report(tmp_path)
    assert results["common_users"]["n"] == 20
    assert "stage3: the table of shared users has 20 of its 21 users" in results["left_out"][1]
    assert sections_of(results, "uniform/hr@1", "D")[-1].heading == "Left out"


def test_tables_say_how_models_were_asked_only_if_it_differs(tmp_path):
    evaluated(tmp_path, "popularity", USERS)
    evaluated(tmp_path, "base", USERS, asked=ASKED)
    evaluated(tmp_path, "stage2", USERS, asked=ASKED)
    assert list_table(report(tmp_path)["variants"], "uniform")[0][:2] == ["variant", "users"]
    evaluated(tmp_path, "stage2_sampled", USERS, asked={**ASKED, "ranking": "sampled", "num_samples": 5})
    header, rows = list_table(report(tmp_path)["variants"], "uniform")
    assert header[:3] == ["variant", "asked", "users"]
    assert [row[1] for row in rows] == ["-", "likelihood", "likelihood", "sampled"]


def test_stale_unfinished_and_changed_results_are_in_no_table(tmp_path, capsys, caplog):
    for variant in ("base", "stage2", "stage3", "oracle"):
        evaluated(tmp_path, variant, USERS, asked=ASKED, **({"sft__merged": "old"} if variant == "stage2" else {}))
    (tmp_path / "sft" / "merged").mkdir(parents=True)
    folder = tmp_path / "eval" / "stage3"
    (folder / "predictions.jsonl").write_text("changed")
    (tmp_path / "eval" / "oracle" / "manifest.json").rename(tmp_path / "eval" / "oracle" / ".begun.json")
    results = report(tmp_path, comparisons=[["stage2", "base"]])
    assert list(results["variants"]) == ["base"]
    assert results["comparisons"] == []
    text = "\n".join(results["left_out"])
    assert "eval/stage2 is stale: it rests on sft/merged, which has changed since (was old" in text
    assert "eval/stage3/predictions.jsonl was changed since" in text
    assert "eval/oracle is unfinished" in text
    show_metrics(tmp_path)
    shown = capsys.readouterr().out
    assert "base" in shown
    assert "stage2" not in shown
    assert "stage2 left out: " in caplog.text


def test_a_run_without_evaluations_is_named(tmp_path):
    evaluated(tmp_path / "tiny", "stage2", {"a": 1})
    with pytest.raises(InputError, match="tiny_1: no such folder of a run"):
        read_variants([tmp_path / "tiny", tmp_path / "tiny_1"])
    (tmp_path / "tiny_1").mkdir()
    with pytest.raises(InputError, match="tiny_1/eval: nothing was evaluated yet"):
        read_variants([tmp_path / "tiny", tmp_path / "tiny_1"])
    with pytest.raises(InputError, match="comparison_metric is uniform/hr@9; no variant was evaluated on it"):
        report(tmp_path / "tiny", comparison_metric="uniform/hr@9")
