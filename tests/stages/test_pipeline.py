"""Every stage end to end on the synthetic domain; what is finished stays, what was killed goes on."""

import itertools
import json
import re
import shutil
import signal
import time

import numpy as np
import pytest
from pyarrow import parquet
from safetensors.torch import load_file

from stages.pipeline import ROOT, STAGES, run, start
from twice_rec.data.dataset import KNOWN_SCORES
from twice_rec.files import MANIFEST
from twice_rec.manifest import Manifest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run; (run folder, base model)."""
    run_dir = tmp_path_factory.mktemp("runs") / "tiny"
    for stage in STAGES:
        assert run(stage, run_dir, run_dir / "base") == 0, stage
    return run_dir, run_dir / "base"


def files_of(run_dir):
    """Every result and when it was written; logs, locks and the report are made anew."""
    paths = (path for path in run_dir.rglob("*") if path.is_file())
    return {
        str(path.relative_to(run_dir)): path.stat().st_mtime_ns
        for path in paths
        if path.relative_to(run_dir).parts[0] not in ("logs", "report", ".locks")
    }


def test_every_variant_has_metrics(finished):
    run_dir, _ = finished
    results = json.loads((run_dir / "report" / "results.json").read_text())
    expected = ["random", "popularity", "itemknn", "sasrec", "base", "stage2", "stage3", *KNOWN_SCORES]
    assert list(results["variants"]) == expected
    for name in expected:
        row = results["variants"][name]
        low, high = row["ci95"]["uniform/ndcg@10"]
        assert low <= row["metrics"]["uniform/ndcg@10"] <= high
    assert results["variants"]["sasrec"]["n"] == 250
    assert results["variants"]["stage3"]["n"] == 6
    assert results["common_users"]["n"] == 6
    assert "full/ndcg@10" in results["variants"]["oracle"]["metrics"]
    assert [(c["a"], c["b"]) for c in results["comparisons"]] == [
        ("stage2", "base"),
        ("stage3", "stage2"),
        ("sasrec", "stage3"),
    ]


def test_what_earns_reward_is_learned(finished):
    run_dir, _ = finished
    base = ROOT / "assets" / "tiny_base"
    four_prompts = ["--train_fraction", "0.016", "--num_train_epochs", "100", "--max_steps", "14"]
    only_hits = ["--reward_funcs", "match", "--reward_weights", "1.0", "--beta", "0.0", "--learning_rate", "4e-3"]
    samples = ["--num_generations", "16", "--per_device_train_batch_size", "64", "--max_completion_length", "100"]
    samples += ["--temperature", "1.3", "--seed", "1"]
    flags = ["--variant", "stage3_hits", "--model_name_or_path", str(base), *four_prompts, *only_hits, *samples]
    assert run("grpo", run_dir, base, *flags) == 0
    steps = sorted((run_dir / "grpo_hits" / "completions").glob("*.parquet"))
    hit_rates = [(parquet.read_table(step)["outcome"].to_numpy() == "hit").mean() for step in steps]
    assert len(hit_rates) == 14
    assert np.mean(hit_rates[-3:]) > hit_rates[0] + 0.3, hit_rates


def test_oracle_is_above_everything(finished):
    metrics = json.loads((finished[0] / "report" / "results.json").read_text())["variants"]
    best = metrics["oracle"]["metrics"]["uniform/ndcg@10"]
    assert all(
        row["metrics"]["uniform/ndcg@10"] < best
        for name, row in metrics.items()
        if name != "oracle" and row["n"] == 250
    )


def test_report_is_one_whole_page(finished):
    page = (finished[0] / "report" / "index.html").read_text()
    assert page.startswith("<!doctype html>")
    assert page.count("<table>") == page.count("</table>") >= 5
    assert "http" not in page.replace("http-equiv", "")
    assert (finished[0] / "report" / "tables.md").read_text().startswith("# TWiCE-Rec on Synthetic")


def test_adapters_and_merged_models_are_there(finished):
    run_dir, base = finished
    assert (run_dir / "grpo" / "adapter_model.safetensors").exists()
    for name in ("sft", "grpo"):
        assert (run_dir / name / "merged" / "model.safetensors").exists()
        assert (run_dir / name / "merged" / "tokenizer.json").exists()
        assert (run_dir / name / "train_results.json").exists()
    models = [base, run_dir / "sft" / "merged", run_dir / "grpo" / "merged"]
    steps = json.loads((run_dir / "grpo" / "trainer_state.json").read_text())["log_history"]
    # This hardly trained model may earn the same reward everywhere, and then there is nothing to learn in stage 3.
    learns = [True, any(step.get("grad_norm", 0) > 0 for step in steps)]
    pairs = itertools.pairwise(load_file(folder / "model.safetensors") for folder in models)
    for learned, (before, after) in zip(learns, pairs, strict=True):
        assert any((before[name] != after[name]).any() for name in before) == learned


def test_run_again_it_redoes_nothing_and_says_so(finished, capfd):
    run_dir, base = finished
    before = files_of(run_dir)
    for stage in STAGES:
        assert run(stage, run_dir, base) == 0
    assert files_of(run_dir) == before
    assert capfd.readouterr().err.count("is finished already; nothing to do") == len(
        ["data", "base", "rationales", "sft", "sasrec", "grpo", "ab_test", "share"]
    ) + len(["sasrec", "random", "popularity", "itemknn", "base", "stage2", "stage3", *KNOWN_SCORES]) + len(
        ["judge/base", "judge/stage2", "judge/stage3"]
    )


def test_other_settings_need_a_word(finished, capfd):
    run_dir, base = finished
    before = files_of(run_dir)
    assert run("sasrec", run_dir, base, "--dropout", "0.3") == 2
    assert "dropout was 0.4, is 0.3. Keep them and choose another --run_dir" in capfd.readouterr().err
    assert files_of(run_dir) == before


# What a killed stage must have written before it is killed, and the results to compare.
KILLED = {
    "prepare": (
        "data/sequences.jsonl",
        ["data/catalog.jsonl", "data/candidates.test.jsonl", "data/oracle.npz", "data/ceiling_text.npz"],
    ),
    "base": ("base/training_state.pt", ["base/model.safetensors", "base/exam.json", "base/tokenizer.json"]),
    "sft": ("sft/samples.jsonl", ["sft/merged/model.safetensors", "sft/samples.jsonl"]),  # sampled behind a checkpoint
    "sasrec": ("sasrec/training_state.safetensors", ["sasrec/model.safetensors", "eval/sasrec/predictions.jsonl"]),
    "grpo": (
        "grpo/checkpoint-2/trainer_state.json",
        ["grpo/merged/model.safetensors", *(f"grpo/completions/completions_0000{step}.parquet" for step in (1, 2, 3))],
    ),
    "evaluate": (
        "eval/stage2/predictions.partial.jsonl",
        ["eval/stage2/predictions.jsonl", "eval/stage3/metrics.json"],
    ),
    "judge": ("judge/base/verdicts.jsonl", ["judge/base/scores.json", "judge/stage3/verdicts.jsonl"]),
}


@pytest.mark.parametrize("stage", KILLED)
def test_killed_and_started_again_it_ends_with_the_same_results(finished, tmp_path, stage):
    whole, base = finished
    sign, results = KILLED[stage]
    killed = tmp_path / "tiny"
    shutil.copytree(whole, killed)
    own = {"sasrec": ["sasrec", "eval"], "evaluate": ["eval"], "prepare": ["data"]}.get(stage, [stage])
    for folder in own:
        shutil.rmtree(killed / folder)
    process = start(stage, killed, base)
    try:
        deadline = time.monotonic() + 240
        while not (killed / sign).exists():
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline, "the stage did not get that far"
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    finished_before_kill = (killed / own[0] / MANIFEST).exists()
    assert not finished_before_kill or stage == "evaluate"
    assert run(stage, killed, base) == 0
    assert not [path for folder in own for path in (killed / folder).rglob(".*")]
    for name in results:
        if name.endswith(".safetensors"):
            expected, found = load_file(whole / name), load_file(killed / name)
            assert all((expected[key] == found[key]).all() for key in expected), name
        else:
            assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    if stage == "grpo":
        assert steps_of(killed) == steps_of(whole)


@pytest.mark.parametrize("stage", ["sft", "grpo", "sasrec"])
def test_killed_behind_the_last_step_nothing_is_trained(finished, tmp_path, monkeypatch, stage):
    whole, base = finished
    run_dir = tmp_path / "tiny"
    for folder in {"data", "rationales", "sft", "sasrec"} - {stage}:
        shutil.copytree(whole / folder, run_dir / folder)

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("twice_rec.run.StageRun.finish", killed)
        assert run(stage, run_dir, base) == 130
    assert not (run_dir / stage / MANIFEST).exists()
    for path in [*(run_dir / stage).glob("model*"), *(run_dir / stage).glob("adapter_model*")]:
        path.unlink()
    monkeypatch.setattr("transformers.Trainer.train", killed)
    monkeypatch.setattr("twice_rec.cf.sasrec_training.SASRecTrainer._until_validation", killed)
    assert run(stage, run_dir, base) == 0
    name = "model.safetensors" if stage == "sasrec" else "merged/model.safetensors"
    expected, found = load_file(whole / stage / name), load_file(run_dir / stage / name)
    assert all((expected[key] == found[key]).all() for key in expected)
    assert not (run_dir / "sasrec" / "training_state.safetensors").exists()


def test_what_rests_on_a_redone_stage_is_neither_evaluated_nor_reported(finished, tmp_path, capfd):
    whole, base = finished
    run_dir = tmp_path / "tiny"
    shutil.copytree(whole, run_dir)
    assert run("sft", run_dir, base, "--seed", "7", "--overwrite", "true") == 0
    before = files_of(run_dir)
    capfd.readouterr()
    assert run("evaluate", run_dir, base, "--overwrite", "true") == 2
    assert "tiny/grpo is stale: it rests on sft/merged, which has changed since" in capfd.readouterr().err
    assert run("evaluate", run_dir, base, "--variants", "stage2") == 2
    assert "eval/stage2 holds results: input sft/merged was" in capfd.readouterr().err
    assert files_of(run_dir) == before
    assert run("report", run_dir, base) == 0
    captured = capfd.readouterr()
    assert "eval/stage3 is stale: it rests on sft/merged" in captured.err
    assert "stage3 - stage2 left out: stage3 is not evaluated" in captured.err
    # the column of the words depends on what other results the run has
    assert re.search(r"^ {8}grpo +stale: it rests on sft/merged", captured.out, re.MULTILINE)
    assert "| stage2 " not in captured.out
    results = json.loads((run_dir / "report" / "results.json").read_text())
    assert not results["variants"].keys() & {"stage2", "stage3"}
    assert results["comparisons"] == []
    assert run("evaluate", run_dir, base, "--variants", "stage2", "--overwrite", "true") == 0
    assert run("report", run_dir, base) == 0
    assert [row["a"] for row in json.loads((run_dir / "report" / "results.json").read_text())["comparisons"]] == [
        "stage2"
    ]


def start_sasrec(run_dir, base, epochs):
    """A process that has trained to a validation or more, and goes on."""
    flags = ["--validation_steps", "20", "--patience", "null", "--epochs", str(epochs)]
    process = start("sasrec", run_dir, base, *flags)
    while not (run_dir / "sasrec" / "training_state.safetensors").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    return process


def test_data_that_are_read_are_not_replaced(finished, tmp_path):
    """A second prepare.sh is refused while a stage reads, and that stage finishes as if alone."""
    whole, base = finished
    run_dir = tmp_path / "tiny"
    shutil.copytree(whole / "data", run_dir / "data")
    process = start_sasrec(run_dir, base, 1500)
    second = start("prepare", run_dir, base, "--seed", "1", "--overwrite", "true")
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 2
    assert f"data is being read by process {process.pid} on " in output
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output


def steps_of(run_dir):
    """What each step of stage 3 was: its answers' rewards and lengths, its policy, its loss and gradient."""
    rows = json.loads((run_dir / "grpo" / "trainer_state.json").read_text())["log_history"]
    same = ("step", "rollout/policy_version", "reward", "reward_std", "completions/mean_length", "loss", "grad_norm")
    found = [[row[name] for name in same] for row in rows if "reward" in row]
    assert [step for step, *_ in found] == [1, 2, 3]
    return found


def test_ctrl_c_is_one_line_and_loses_nothing(finished, tmp_path):
    whole, base = finished
    run_dir = tmp_path / "tiny"
    shutil.copytree(whole / "data", run_dir / "data")
    process = start_sasrec(run_dir, base, 1500)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "sasrec: interrupted; nothing is lost: the same command goes on where it stopped" in output
    assert "Traceback" not in output


def test_cf_only_run_needs_no_language_model(finished, tmp_path, capfd):
    whole, base = finished
    run_dir = tmp_path / "tiny"
    shutil.copytree(whole / "data", run_dir / "data")
    scores = tmp_path / "scores.npz"
    assert run("sasrec", run_dir, base, "--num_seeds", "2", "--export_scores", str(scores)) == 0
    metrics = json.loads((run_dir / "eval" / "sasrec" / "metrics.json").read_text())
    assert metrics["n"] == 250
    # The exported scores, read back as an outside model, rank like the first seed.
    flags = ["--variants", "outside", "--outside_scores", f"{{outside: {scores}}}"]
    assert run("evaluate", run_dir, base, *flags) == 0
    rows = [json.loads(line) for line in (run_dir / "eval" / "sasrec" / "predictions.jsonl").read_text().splitlines()]
    first = {row["user_id"]: row["ranks"] for row in rows if row["seed"] == 42}
    outside = [
        json.loads(line) for line in (run_dir / "eval" / "outside" / "predictions.jsonl").read_text().splitlines()
    ]
    assert {row["user_id"]: row["ranks"] for row in outside} == first
    assert len(rows) == 500
    capfd.readouterr()
    assert run("report", run_dir, base, "--comparisons", "[[sasrec, random], [stage2, base]]") == 0
    assert "warning: stage2 - base left out: stage2 is not evaluated; random, " in capfd.readouterr().err
    results = json.loads((run_dir / "report" / "results.json").read_text())
    assert [(row["a"], row["b"]) for row in results["comparisons"]] == [("sasrec", "random")]


def test_sft_of_an_adapter_leaves_adapter_and_merged_model(finished, tmp_path):
    whole, base = finished
    run_dir = tmp_path / "tiny"
    for folder in ("data", "rationales"):
        shutil.copytree(whole / folder, run_dir / folder)
    before = {path: path.read_bytes() for path in base.iterdir() if path.is_file()}
    assert run("sft", run_dir, base, "--use_peft", "true", "--max_steps", "2") == 0
    assert (run_dir / "sft" / "adapter_model.safetensors").exists()
    plain, merged = load_file(base / "model.safetensors"), load_file(run_dir / "sft" / "merged" / "model.safetensors")
    assert plain.keys() == merged.keys()
    changed = {name for name in plain if (plain[name] != merged[name]).any()}
    assert changed
    assert all("_proj" in name for name in changed)
    assert {path: path.read_bytes() for path in before} == before


def test_variants_of_stage_3_stand_beside_each_other(finished, tmp_path):
    """Like Rec-R1, and from the base model: rewards, start, folder and name in the evaluation are recipe values."""
    whole, base = finished
    start_model = ROOT / "assets" / "tiny_base"  # its completions earn different rewards
    run_dir = tmp_path / "tiny"
    for folder in ("data", "sasrec", "grpo", "eval"):
        shutil.copytree(whole / folder, run_dir / folder)
    before = files_of(run_dir)
    rewards = ["--reward_funcs", "rank", "structure", "tags", "only_expected_tags"]
    start_from = ["--model_name_or_path", str(start_model), "--max_completion_length", "100"]
    assert run("grpo", run_dir, base, "--variant", "stage3_C.rank", *start_from, *rewards) == 0
    assert run("evaluate", run_dir, base, "--variants", "stage3_C.rank") == 0
    assert json.loads((run_dir / "eval" / "stage3_C.rank" / "metrics.json").read_text())["n"] == 6
    logged = json.loads((run_dir / "grpo_C.rank" / "trainer_state.json").read_text())["log_history"][0]
    assert {name.split("/")[1] for name in logged if name.startswith("rewards/")} == set(rewards[1:])
    merged = load_file(run_dir / "grpo_C.rank" / "merged" / "model.safetensors")
    plain = load_file(start_model / "model.safetensors")
    changed = {name for name in plain if (plain[name] != merged[name]).any()}
    assert changed
    assert all("_proj" in name for name in changed)
    after = files_of(run_dir)
    assert {name: after[name] for name in before} == before


def test_a_policy_is_shown_what_the_cf_model_expects(finished, tmp_path, caplog):
    """Stage 3 and evaluation put it into the prompts; an evaluation without it is another one, and says so."""
    whole, base = finished
    run_dir = tmp_path / "tiny"
    for folder in ("data", "sft", "sasrec"):
        shutil.copytree(whole / folder, run_dir / folder)
    assert run("grpo", run_dir, base, "--variant", "stage3_hinted", "--cf_hints", "2") == 0
    assert run("evaluate", run_dir, base, "--variants", "stage3_hinted", "--cf_hints", "2") == 0
    assert "its prompts are not" not in caplog.text
    assert run("evaluate", run_dir, base, "--variants", "stage3_hinted", "--suffix", "unaided") == 0
    assert "stage3_hinted: its prompts are not those of its training: cf_hints was 2, is 0" in caplog.text
    rows = parquet.read_table(run_dir / "grpo_hinted" / "completions" / "completions_00001.parquet").to_pylist()
    assert all("A model that knows who buys what expects" in str(row["prompt"]) for row in rows)
    elsewhere = ["--cf_model", "../tiny/sasrec", "--suffix", "elsewhere"]  # the same folder by another path
    assert run("evaluate", run_dir, base, "--variants", "stage3_hinted", "--cf_hints", "2", *elsewhere) == 0
    asked = Manifest.load(run_dir / "eval" / "stage3_hinted")
    assert asked.config["cf_hints"] == "2 of sasrec"
    assert "sasrec/model.safetensors" in asked.inputs
    unaided = Manifest.load(run_dir / "eval" / "stage3_hinted_unaided")
    assert "sasrec/model.safetensors" not in unaided.inputs
    arms = '{"stage3_hinted": 0.4, "stage3_hinted_elsewhere": 0.4, "random": 0.2}'
    assert run("sasrec", run_dir, base) == 0  # evaluates random
    assert run("ab_test", run_dir, base, "--arms", arms) == 0


def test_both_rankings_beside_each_other(finished, tmp_path):
    """By likelihood under the variant's name, by votes under a name of its own; the same answers when asked again."""
    whole, base = finished
    run_dir = tmp_path / "tiny"
    for folder in ("data", "sft"):
        shutil.copytree(whole / folder, run_dir / folder)
    flags = ["--variants", "stage2", "--rankings", "likelihood", "sampled", "--num_samples", "3", "--top_p", "0.95"]
    flags += ["--vote_ties", "listed"]
    assert run("evaluate", run_dir, base, *flags) == 0
    sampled = run_dir / "eval" / "stage2_sampled" / "predictions.jsonl"
    rows = [json.loads(line) for line in sampled.read_text().splitlines()]
    assert len(rows) == 6
    for row in rows:
        assert len(row["answers"]) == 3
        assert row["ranks"] == {"uniform": 1 + row["ranking"].index(row["target"])}
    assert len({answer for row in rows for answer in row["answers"]}) > 6, "nothing was sampled"
    assert json.loads((run_dir / "eval" / "stage2" / "metrics.json").read_text())["n"] == 6
    before = sampled.read_bytes()
    assert run("evaluate", run_dir, base, *flags, "--overwrite", "true") == 0
    assert sampled.read_bytes() == before


def test_a_stage_2_of_its_own_and_models_that_are_asked_for_the_item_alone(finished, tmp_path):
    """RQ6: trained without rationales, and asked without, beside the stage 2 of the run."""
    whole, base = finished
    run_dir = tmp_path / "tiny"
    for folder in ("data", "rationales", "sft", "eval"):
        shutil.copytree(whole / folder, run_dir / folder)
    before = files_of(run_dir)
    assert run("sft", run_dir, base, "--variant", "stage2_no_rationale", "--rationale_rows", "0") == 0
    item_only = ["--with_rationale", "false"]
    assert run("evaluate", run_dir, base, "--variants", "stage2_no_rationale", *item_only) == 0
    assert run("evaluate", run_dir, base, "--variants", "stage2", "oracle", *item_only, "--suffix", "item_only") == 0
    assert run("report", run_dir, base, "--comparisons", "[[stage2, stage2_item_only, with_rationale]]") == 0
    results = json.loads((run_dir / "report" / "results.json").read_text())
    assert {"stage2", "stage2_item_only", "stage2_no_rationale"} <= results["variants"].keys()
    assert "oracle_item_only" not in results["variants"]
    assert [row["n"] for row in results["comparisons"]] == [6]
    after = {name: time for name, time in files_of(run_dir).items() if name in before}
    assert after == before
