"""What a result rests on: a chain of three stages, and what each change in it makes stale."""

import json
import os
import shutil
import sys
from types import SimpleNamespace

import pytest

from twice_rec.errors import InputError
from twice_rec.llm.hub import at_commit, model_input
from twice_rec.llm.recipe import ModelConfig
from twice_rec.manifest import Hashes, HubModel, Manifest, check_fresh, names_of, redo_command, stale_because
from twice_rec.recipe import Recipe, key
from twice_rec.run import StageRun


class KRecipe(Recipe):
    """A recipe with one setting that changes the result and one that does not."""

    k: int = key(5, "a setting")
    speed: int = key(1, "another", changes_result=False)


def stage(run_dir, name, inputs, text, **settings):
    """Run a stage that writes one file, unless it is finished."""
    recipe = KRecipe(run_dir=str(run_dir), domain="D", seed=0, **settings)
    with StageRun(recipe, name, name, inputs) as run:
        if run.is_finished():
            return run.path / "out.txt"
        run.begin()
        (run.path / "out.txt").write_text(text)
        run.finish([run.path / "out.txt"], {})
    return run.path / "out.txt"


@pytest.fixture
def made(tmp_path):
    """raw file -> data -> sft -> grpo; (run folder, raw file)."""
    raw = tmp_path / "raw.txt"
    raw.write_text("reviews")
    run_dir = tmp_path / "run"
    data = stage(run_dir, "prepare", [raw], "data")
    sft = stage(run_dir, "sft", [data], "stage 2")
    stage(run_dir, "grpo", [data, sft], "stage 3")
    return run_dir, raw


def reason(folder):
    return stale_because(folder, Hashes())


def test_a_manifest_has_everything_back_to_the_data(made):
    run_dir, raw = made
    manifest = Manifest.load(run_dir / "grpo")
    assert list(manifest.rests_on) == [str(raw), "prepare/out.txt", "sft/out.txt"]
    assert list(manifest.inputs) == ["prepare/out.txt", "sft/out.txt"]
    assert reason(run_dir / "grpo") is None


def test_a_result_of_a_redone_one_is_stale_and_is_not_read(made):
    run_dir, _ = made
    stage(run_dir, "sft", [run_dir / "prepare" / "out.txt"], "another stage 2", k=6, overwrite=True)
    assert reason(run_dir / "sft") is None
    assert "it rests on sft/out.txt, which has changed since (was " in reason(run_dir / "grpo")
    with pytest.raises(
        InputError, match=r"run/grpo is stale: it rests on sft/out.txt.*first: bash grpo_step2.sh --over"
    ):
        stage(run_dir, "evaluate", [run_dir / "grpo" / "out.txt"], "metrics")
    assert not (run_dir / "evaluate").exists()


def test_a_setting_that_changes_nothing_makes_nothing_stale(made):
    run_dir, _ = made
    stage(run_dir, "sft", [run_dir / "prepare" / "out.txt"], "never written", speed=2)
    shutil.rmtree(run_dir / "sft")
    stage(run_dir, "sft", [run_dir / "prepare" / "out.txt"], "stage 2", speed=3)  # the same result
    assert reason(run_dir / "grpo") is None


def test_the_deepest_change_is_named(made):
    run_dir, raw = made
    raw.write_text("other reviews")
    for name in ("prepare", "sft", "grpo"):
        assert f"it rests on {raw}, which has changed" in reason(run_dir / name)
    raw.unlink()
    assert reason(run_dir / "grpo") is None  # what is gone cannot differ


def test_what_is_only_removed_makes_nothing_stale_but_what_is_no_longer_made_does(made):
    run_dir, _ = made
    (run_dir / "sft" / "out.txt").unlink()
    assert reason(run_dir / "grpo") is None
    path = run_dir / "sft" / "manifest.json"
    path.write_text(path.read_text().replace('"sft/out.txt"', '"sft/other.txt"'))
    assert reason(run_dir / "grpo") == "it rests on sft/out.txt, which is no longer made"
    shutil.rmtree(run_dir / "sft")
    assert reason(run_dir / "grpo") is None


def test_what_is_being_made_is_not_read(made):
    run_dir, _ = made
    os.rename(run_dir / "sft" / "manifest.json", run_dir / "sft" / ".begun.json")
    assert reason(run_dir / "grpo") == "it rests on sft/out.txt, which is being made anew"
    with pytest.raises(InputError, match=r"run/sft is unfinished; finish it first: bash sft\.sh"):
        stage(run_dir, "grpo", [run_dir / "sft" / "out.txt"], "x")


def test_what_was_changed_by_hand_is_not_read(made):
    run_dir, _ = made
    (run_dir / "sft" / "out.txt").write_text("by hand")
    with pytest.raises(InputError, match=r"sft/out.txt was changed since the sft stage finished; restore it, or make"):
        stage(run_dir, "grpo", [run_dir / "sft" / "out.txt"], "x")


def test_results_of_an_earlier_version_are_judged_by_their_inputs(made):
    run_dir, _ = made
    for name in ("prepare", "sft", "grpo"):
        path = run_dir / name / "manifest.json"
        row = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("rests_on", "stamps")}
        path.write_text(json.dumps(row))
    assert reason(run_dir / "grpo") is None
    (run_dir / "prepare" / "out.txt").write_text("other")
    assert "it rests on prepare/out.txt" in reason(run_dir / "grpo")


def test_a_model_of_another_run_brings_its_chain(made, tmp_path):
    run_dir, _ = made
    other = tmp_path / "other"
    stage(other, "grpo", [run_dir / "sft" / "out.txt"], "x")
    manifest = Manifest.load(other / "grpo")
    assert list(manifest.inputs) == ["source/out.txt"]
    assert str(run_dir / "prepare" / "out.txt") in manifest.rests_on
    (run_dir / "prepare" / "out.txt").write_text("other")
    assert str(run_dir / "prepare" / "out.txt") in reason(other / "grpo")


def test_a_copy_under_another_name_is_no_result(made):
    run_dir, _ = made
    shutil.copytree(run_dir / "grpo", run_dir / "grpo_best")
    with pytest.raises(InputError, match="grpo_best is stale: it is a copy of what the grpo stage wrote to"):
        check_fresh(run_dir / "grpo_best", Hashes())
    assert reason(run_dir / "grpo") is None


def test_commands_name_the_run_where_a_result_lies_now(made, monkeypatch):
    run_dir, raw = made
    monkeypatch.setattr(sys, "argv", ["python -m twice_rec", "prepare", "r.yaml", "--run_dir", str(run_dir)])
    raw.write_text("other reviews")
    stage(run_dir, "prepare", [raw], "data", overwrite=True)
    copy = run_dir.with_name("copy")
    shutil.copytree(run_dir, copy)
    assert redo_command(run_dir / "prepare", Manifest.load(run_dir / "prepare")).split()[2:5] == [
        "r.yaml", "--run_dir", str(run_dir),
    ]  # fmt: skip
    assert redo_command(copy / "prepare", Manifest.load(copy / "prepare")).split()[2:5] == [
        "r.yaml", "--run_dir", str(copy),
    ]  # fmt: skip


def test_the_run_may_be_moved(made, tmp_path):
    run_dir, _ = made
    run_dir.rename(tmp_path / "moved")
    assert reason(tmp_path / "moved" / "grpo") is None


def test_no_stage_replaces_the_results_of_another(made):
    run_dir, _ = made
    recipe = KRecipe(run_dir=str(run_dir), domain="D", seed=0, overwrite=True)
    with pytest.raises(InputError, match="sft holds results of the sft stage; choose another name or --run_dir"):
        StageRun(recipe, "sasrec", "sft", []).begin()
    assert (run_dir / "sft" / "out.txt").exists()


def test_damaged_results_can_be_overwritten(made):
    run_dir, _ = made
    (run_dir / "sft" / "out.txt").write_text("damaged")
    stage(run_dir, "sft", [run_dir / "prepare" / "out.txt"], "again", overwrite=True)
    assert (run_dir / "sft" / "out.txt").read_text() == "again"


def test_inputs_have_names_of_their_own(tmp_path):
    paths = [tmp_path / "a" / "merged", tmp_path / "b" / "merged", tmp_path / "run" / "x"]
    named = names_of(tmp_path / "run", [*paths, paths[0]])
    assert named == {"source/merged": paths[0], "source/b/merged": paths[1], "x": paths[2]}
    (tmp_path / "run").mkdir()
    (tmp_path / "shared").mkdir()
    (tmp_path / "run" / "data").symlink_to(tmp_path / "shared")
    link = tmp_path / "run" / "data" / "catalog.jsonl"
    assert names_of(tmp_path / "run", [link]) == {"data/catalog.jsonl": link}


def test_models_of_the_hub_are_inputs(made, monkeypatch):
    run_dir, _ = made
    commits = {"main": "c1", None: "c1", "v2": "c2"}

    def from_pretrained(name, revision=None):
        return SimpleNamespace(_commit_hash=commits[revision])

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", from_pretrained)
    model = model_input("owner/a", None)
    assert (model.key, model.commit) == ("hub/owner/a", "c1")
    stage(run_dir, "evaluate", [model], "numbers of a")
    for other in (model_input("owner/b", None), model_input("owner/a", "v2"), HubModel("owner/a", None, "c9")):
        with pytest.raises(InputError, match=f"evaluate holds results: .*input {other.key} "):
            stage(run_dir, "evaluate", [other], "numbers of b")
    assert Manifest.load(run_dir / "evaluate").rests_on == {"hub/owner/a": "c1"}
    assert reason(run_dir / "evaluate") is None
    assert at_commit(ModelConfig(), model).model_revision == "c1"
    assert at_commit(ModelConfig(), run_dir).model_revision is None
    assert model_input(run_dir, None) == run_dir
    with pytest.raises(InputError, match="no such model folder"):
        model_input("./nowhere", None)


def test_commands_show_recipe_and_flags_and_no_secrets(made, monkeypatch):
    run_dir, _ = made
    words = ["/x/twice_rec/__main__.py", "sft", "r.yaml", "--k", "6", "--overwrite", "true", "--hub_token", "hf_SECRET"]
    monkeypatch.setattr(sys, "argv", words)
    stage(run_dir, "sft", [run_dir / "prepare" / "out.txt"], "x", k=6, overwrite=True)
    (run_dir / "sft" / "out.txt").write_text("by hand")
    with pytest.raises(InputError) as found:
        stage(run_dir, "grpo", [run_dir / "sft" / "out.txt"], "x", overwrite=True)
    assert str(found.value).endswith("bash sft.sh r.yaml --k 6 --hub_token [hidden] --overwrite true")
