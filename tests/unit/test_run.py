"""One folder of results: finished, unfinished, foreign, damaged, and held by one process at a time."""

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from twice_rec.errors import InputError
from twice_rec.files import MANIFEST, atomic_path
from twice_rec.manifest import BEGUN
from twice_rec.recipe import Recipe, key
from twice_rec.run import Manifest, StageRun


class KRecipe(Recipe):
    """A recipe with one setting."""

    k: int = key(5, "a setting")


def make(run_dir, **settings):
    source = run_dir / "in.txt"
    if not source.exists():
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text("input")
    return StageRun(KRecipe(run_dir=str(run_dir), domain="D", seed=0, **settings), "stage", "out", [source])


def finish(run):
    run.begin()
    (run.path / "result.txt").write_text("result")
    run.finish([run.path / "result.txt"], {"n": 1})


def test_finished_work_is_known_again(tmp_path):
    assert not make(tmp_path).is_finished()
    finish(make(tmp_path))
    assert make(tmp_path).is_finished()
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.figures == {"n": 1}
    assert set(manifest.inputs) == {"in.txt"}
    assert set(manifest.outputs) == {"out/result.txt"}
    assert "torch" in manifest.about["versions"]


def test_results_of_before_a_key_existed_have_its_default(tmp_path):
    finish(make(tmp_path))
    path = tmp_path / "out" / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["config"]["k"]
    path.write_text(json.dumps(manifest))
    assert make(tmp_path).is_finished()
    with pytest.raises(InputError, match="out holds results: k was 5, is 7"):
        make(tmp_path, k=7).begin()


def test_other_settings_are_refused_with_both_values(tmp_path):
    finish(make(tmp_path))
    other = make(tmp_path, k=7)
    assert not other.is_finished()
    with pytest.raises(InputError, match=r"out holds results: k was 5, is 7\..*--overwrite true"):
        other.begin()
    assert (tmp_path / "out" / "result.txt").read_text() == "result"
    make(tmp_path, k=7, overwrite=True).begin()
    assert not (tmp_path / "out" / "result.txt").exists()


def test_other_inputs_are_refused(tmp_path):
    finish(make(tmp_path))
    (tmp_path / "in.txt").write_text("changed")
    with pytest.raises(InputError, match=r"input in.txt was [0-9a-f]{12}, is [0-9a-f]{12}"):
        make(tmp_path).begin()


def test_unfinished_work_is_taken_up(tmp_path):
    make(tmp_path).begin()
    (tmp_path / "out" / "half.txt").write_text("half")
    make(tmp_path).begin()
    assert (tmp_path / "out" / "half.txt").exists()
    with pytest.raises(InputError, match="out holds unfinished results: k was 5, is 6"):
        make(tmp_path, k=6).begin()


def test_what_a_killed_process_was_writing_goes(tmp_path):
    with make(tmp_path) as run:
        run.begin()
        (run.path / "half.txt").write_text("half")
        writing = atomic_path(run.path / "rows.jsonl")
        writing.__enter__().write_text("{")  # killed here
    with make(tmp_path) as run:
        assert [path.name for path in run.path.iterdir() if path.name != BEGUN] == ["half.txt"]


@pytest.mark.parametrize(("work", "resumes", "left"), [(False, True, False), (True, True, True), (True, False, False)])
def test_an_input_that_is_refused_late_needs_no_overwrite_once_it_is_mended(tmp_path, work, resumes, left):
    """Only work that the stage can go on with stays."""
    with pytest.raises(InputError, match="wrong"), make(tmp_path) as run:
        run.begin(resumes=resumes)
        if work:
            (run.path / "half.txt").write_text("half")
        raise InputError("wrong")
    assert (tmp_path / "out").exists() == left
    if not left:
        make(tmp_path, k=7).begin()


def test_what_was_to_be_replaced_comes_back_if_the_new_input_is_refused(tmp_path):
    finish(make(tmp_path))
    with pytest.raises(InputError, match="wrong"), make(tmp_path, k=7, overwrite=True) as run:
        run.begin()
        assert not (run.path / "result.txt").exists()
        raise InputError("wrong")
    assert make(tmp_path).is_finished()
    with make(tmp_path, k=7, overwrite=True) as run:
        finish(run)
    assert make(tmp_path, k=7).is_finished()
    assert not [path for path in (tmp_path / ".replaced").rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", [f".{BEGUN}.x1.tmp.json", ".result.txt.x2.tmp.txt"])
def test_what_a_killed_process_was_writing_is_no_result(tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("{")
    with make(tmp_path) as run:
        finish(run)
    assert sorted(path.name for path in run.path.iterdir()) == ["manifest.json", "result.txt"]


def test_a_process_killed_right_behind_its_manifest_has_finished(tmp_path):
    finish(make(tmp_path))
    (tmp_path / "out" / BEGUN).write_text("{}")
    assert make(tmp_path).is_finished()
    assert not (tmp_path / "out" / BEGUN).exists()


def test_foreign_files_are_not_touched(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="out holds files of another origin"):
        make(tmp_path).begin()


@pytest.mark.parametrize(("damage", "message"), [("change", "was changed"), ("remove", "is missing")])
def test_damaged_output(tmp_path, damage, message):
    finish(make(tmp_path))
    result = tmp_path / "out" / "result.txt"
    result.write_text("x") if damage == "change" else result.unlink()
    with pytest.raises(InputError, match=rf"result.txt {message} since the stage stage finished"):
        make(tmp_path).is_finished()


def test_manifest_of_another_version(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text(json.dumps({"old": 1}))
    with pytest.raises(InputError, match="not a manifest of this version.*run the stage again with --overwrite true"):
        make(tmp_path).is_finished()
    run = make(tmp_path, overwrite=True)
    assert not run.is_finished()
    finish(run)
    assert make(tmp_path).is_finished()


@pytest.mark.parametrize("note", ["", "{", "[]", "{}"])
@pytest.mark.parametrize("name", [BEGUN, MANIFEST])
def test_a_damaged_note_is_no_trap(tmp_path, name, note):
    make(tmp_path).begin()
    (tmp_path / "out" / name).write_text(note)
    with pytest.raises(InputError, match="with --overwrite true"):
        make(tmp_path).is_finished() or make(tmp_path).begin()
    run = make(tmp_path, overwrite=True)
    assert not run.is_finished()
    finish(run)
    assert make(tmp_path).is_finished()


def test_results_of_a_version_with_other_names_are_known_again(tmp_path, monkeypatch):
    finish(make(tmp_path, k=6))
    path = tmp_path / "out" / "manifest.json"
    path.write_text(path.read_text().replace('"k": 6', '"old_k": 6'))
    assert not make(tmp_path, k=6).is_finished()
    monkeypatch.setattr(KRecipe, "RENAMED", {"old_k": "k"})
    assert make(tmp_path, k=6).is_finished()


def test_a_folder_and_one_within_it_have_locks_of_their_own(tmp_path):
    recipe = KRecipe(run_dir=str(tmp_path), domain="D", seed=0)
    with StageRun(recipe, "stage", "eval"), StageRun(recipe, "stage", "eval/x"):
        pass


def test_the_manifest_tells_the_whole_recipe(tmp_path):
    finish(make(tmp_path, k=6))
    about = Manifest.load(tmp_path / "out").about
    assert about["recipe"]["k"] == 6
    assert about["recipe"]["overwrite"] is False


def test_a_machine_without_git_finishes_too(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    finish(make(tmp_path))
    assert Manifest.load(tmp_path / "out").about["commit"] is None


def test_a_second_process_is_refused_in_one_line(tmp_path):
    with make(tmp_path), pytest.raises(InputError, match=rf"out is in use by process {os.getpid()} on \S+, since"):
        make(tmp_path, k=7).__enter__()
    with make(tmp_path):
        pass  # free again


HOLDER = """
import sys, time
from unit.test_run import make
from pathlib import Path
with make(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=f"in use by process {process.pid}"):
        make(tmp_path).__enter__()
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    process.stdout.close()
    with make(tmp_path) as run:
        finish(run)


class FakeTrainer:
    """A trainer that cannot train."""

    args = SimpleNamespace(disable_tqdm=False)

    def __init__(self, folder):
        self.folder, self.accelerator, self.metrics = folder, SimpleNamespace(wait_for_everyone=lambda: None), {}

    def is_world_process_zero(self):
        return True

    def add_callback(self, callback):
        self.callback = callback

    def save_metrics(self, split, metrics):
        self.metrics = metrics

    def save_state(self):
        (self.folder / "trainer_state.json").write_text(json.dumps({"global_step": self.state.global_step}))

    def train(self, resume_from_checkpoint):
        self.state = SimpleNamespace(global_step=3, max_steps=4, log_history=[])


def checkpoint_of(run, step):
    folder = run.path / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    state = {
        "global_step": step,
        "max_steps": 4,
        "total_flos": 7.0,
        "epoch": 2.0,
        "log_history": [{"loss": 0.5, "step": step}],
    }
    (folder / "trainer_state.json").write_text(json.dumps(state))
    (folder / "adapter_config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    save_file({"step": torch.tensor([step])}, folder / "adapter_model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth"):
        torch.save({}, folder / name)


def test_at_the_last_step_nothing_is_trained(tmp_path):
    run = make(tmp_path)
    checkpoint_of(run, 2)
    checkpoint_of(run, 4)
    assert run.train(FakeTrainer(run.path)) == {"steps": 4, "total_flos": 7.0, "epoch": 2.0, "step": 4}
    assert load_file(run.path / "adapter_model.safetensors")["step"].item() == 4
    assert {path.name for path in run.path.iterdir() if path.is_file()} == {
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "trainer_state.json", "log.jsonl",
    }  # fmt: skip
    assert json.loads((run.path / "log.jsonl").read_text()) == {"step": 4, "loss": 0.5}


def test_a_resumed_training_has_no_mean_loss_since_the_trainer_knows_only_its_own_steps(tmp_path):
    def trained(run):
        trainer = FakeTrainer(run.path)
        trainer.save_model = lambda folder: None
        logged = [{"loss": 0.5, "step": 2}, {"train_loss": 0.3, "train_runtime": 1.0, "epoch": 1.0, "step": 4}]

        def train(resume_from_checkpoint):
            trainer.state = SimpleNamespace(global_step=4, max_steps=4, log_history=logged)
            return SimpleNamespace(metrics={"train_loss": 0.3, "train_runtime": 1.0, "epoch": 1.0})

        trainer.train = train
        return run.train(trainer), trainer.metrics

    run = make(tmp_path)
    run.path.mkdir(parents=True)
    figures, metrics = trained(run)
    assert figures == {"steps": 4, "train_loss": 0.3, "train_runtime": 1.0, "epoch": 1.0, "step": 4}
    assert metrics == {"train_loss": 0.3, "train_runtime": 1.0, "epoch": 1.0}
    checkpoint_of(run, 2)
    figures, metrics = trained(run)
    assert figures == {"steps": 4, "epoch": 1.0, "step": 4}
    assert metrics == {"epoch": 1.0}


def test_a_training_that_ends_early_is_not_finished(tmp_path):
    run = make(tmp_path)
    checkpoint_of(run, 2)
    with pytest.raises(InputError, match="the training ended after 3 of 4 steps; the same command goes on"):
        run.train(FakeTrainer(run.path))
