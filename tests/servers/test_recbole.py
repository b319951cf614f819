"""The real RecBole, in the environment that test.sh makes: every model on a small domain, one of them killed.

A domain in which item i is followed by i + 1, so a model of sequences that learns anything puts the target first.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from recbole_data import write_circle
from servers.processes import ROOT
from twice_rec.cf.recbole_models import RECBOLE_MODELS
from twice_rec.stages import stage3a_baselines

pytestmark = pytest.mark.slow
PYTHON = ROOT / ".venv-recbole" / "bin" / "python"
RECIPE = str(ROOT / "recipes" / "tiny" / "baselines.yaml")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    write_circle(path / "data", users=300)
    return path


def words(run_dir, *flags):
    flags = ["--recbole_python", str(PYTHON), "--lists", "uniform", "full", "--device", "cpu", *flags]
    return [RECIPE, "--run_dir", str(run_dir), *flags]


def metrics_of(run_dir, name):
    return json.loads((run_dir / "eval" / name / "metrics.json").read_text())


def test_every_model_trains_scores_and_resumes(run_dir, capfd):
    """A step or two of each; the scores of RecBole's process give the validation that it measured itself."""
    few = ["--minutes", "0.001", "--epochs", "2", "--validation_users", "100"]
    assert stage3a_baselines.main(words(run_dir, *few)) == 0
    said = capfd.readouterr().err
    for name in RECBOLE_MODELS:
        assert metrics_of(run_dir, name)["n"] == 300, name
        (row,) = [json.loads(line) for line in (run_dir / name / "tuning.jsonl").read_text().splitlines()]
        measured = json.loads((run_dir / name / "manifest.json").read_text())["figures"]["valid/full/ndcg@10"]
        assert measured == pytest.approx(row["validation"], abs=1e-4), name
        assert (row["ended"], row["settings"]) == ("minutes", {}), name
    assert " there\n" not in said  # no two validations that differ
    capfd.readouterr()
    assert stage3a_baselines.main(words(run_dir, *few)) == 0
    assert capfd.readouterr().err.count("is finished already") == 2 * len(RECBOLE_MODELS)


def test_a_killed_stage_leaves_no_process_and_goes_on(run_dir, tmp_path):
    """Killed in its first setting, it goes on there, and in the end knows the circle."""
    write_circle(tmp_path / "data", users=300)
    small = {"train_batch_size": 256}
    flags = words(tmp_path, "--models", "gru4rec", "--minutes", "5", "--epochs", "60", "--num_settings", "2")
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "twice_rec", "baselines", *flags]
    process = subprocess.Popen(command, env=variables, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline, state = time.monotonic() + 300, tmp_path / "gru4rec" / "state.pt"
    while not state.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (runner,) = [int(pid) for pid in _children(process.pid)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    while _is_running(runner):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (tmp_path / "gru4rec" / "manifest.json").exists()
    assert stage3a_baselines.main(flags) == 0
    rows = [json.loads(line) for line in (tmp_path / "gru4rec" / "tuning.jsonl").read_text().splitlines()]
    assert [row["settings"] for row in rows] == [{}, small]
    assert all(row["epochs"] == len(row["validations"]) for row in rows)
    assert metrics_of(tmp_path, "gru4rec")["full/ndcg@10"] > 0.9
    assert not state.exists()


def _children(pid):
    with open(f"/proc/{pid}/task/{pid}/children", encoding="utf-8") as file:
        return file.read().split()


def _is_running(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
