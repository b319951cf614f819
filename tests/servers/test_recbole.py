"""The real RecBole, in the environment that test.sh makes: every model, and a stage that is killed.

The domain is one in which item i is followed by i + 1: a model of sequences that learns it puts the target first.
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
from twice_rec.cf.ranking import CFQuestions
from twice_rec.cf.recbole import RecBoleVariant
from twice_rec.cf.recbole_models import RECBOLE_MODELS
from twice_rec.cf.recipe import BaselinesRecipe
from twice_rec.data.dataset import PreparedData
from twice_rec.stages import stage3a_baselines

pytestmark = pytest.mark.slow
PYTHON = ROOT / ".venv-recbole" / "bin" / "python"
RECIPE = str(ROOT / "recipes" / "tiny" / "baselines.yaml")

# Trains each model for an epoch, with every setting that is tried; prints name -> setting -> what was found.
EVERY_MODEL = """
import json, sys, warnings
from pathlib import Path
warnings.filterwarnings("ignore")
folder, models = Path(sys.argv[1]), json.loads(sys.argv[2])
sys.path.append(sys.argv[3])
sys.argv[1:] = []
import numpy as np, torch
import recbole_runner as runner
runner.say = lambda **what: None
data, found = np.load(folder / "data.npz"), {}
users = data["valid_users"].astype(np.int64)
for name, (kind, settings) in models.items():
    work = json.loads((folder / "work.json").read_text())
    work |= {"class": kind, "device": "cpu", "epochs": 1, "settings": settings}
    found[name] = []
    for number in range(len(settings)):
        training = runner.Training(work, data, number, 4.0, folder / "state.pt")
        first = [one.detach().clone() for one in training.model.module.parameters()]
        ended = training.run()
        (folder / "state.pt").unlink()
        scores = training.model.scores(users, training._valid, np.arange(len(users)))
        moved = sum(not torch.equal(a, b) for a, b in zip(first, training.model.module.parameters()))
        found[name].append({
            "ended": ended, "shape": list(scores.shape), "finite": bool(torch.isfinite(scores).all()), "moved": moved,
            "anomaly": torch.is_anomaly_enabled(), "pretrained": training.progress.pretrain_epochs,
            "same": len(set(scores[:, 0].tolist())) == 1,
        })
print(json.dumps(found))
"""


def test_every_model_trains_and_scores_with_every_setting(tmp_path):
    write_circle(tmp_path / "data", users=60)
    data = PreparedData(tmp_path / "data")
    recipe = BaselinesRecipe(run_dir=str(tmp_path), domain="D", seed=1)
    variant = RecBoleVariant(recipe, "s3rec", data, CFQuestions(data, "valid", ["full"]))
    variant._exchange = tmp_path
    variant._write_work(trains=True)
    models = {name: (model.recbole_class, model.settings) for name, model in RECBOLE_MODELS.items()}
    models["stamp"] = ("STAMP", [{}])  # CONTRIBUTING says that further ones are a line each
    words = [str(PYTHON), "-c", EVERY_MODEL, str(tmp_path), json.dumps(models), str(ROOT / "src/twice_rec/cf")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, of_settings in json.loads(done.stdout).items():
        assert len(of_settings) == len(models[name][1]), name
        for found in of_settings:
            assert (found["ended"], found["shape"], found["finite"]) == ("epochs", [60, 20], True), name
            assert found["moved"] > 0, name
            assert (found["anomaly"], found["same"]) == (False, False), name
            assert (found["pretrained"] > 0) == (name == "s3rec"), name


def words(run_dir, *flags):
    flags = ["--recbole_python", str(PYTHON), "--lists", "uniform", "full", "--device", "cpu", *flags]
    return [RECIPE, "--run_dir", str(run_dir), *flags]


def test_a_killed_stage_leaves_no_process_and_goes_on(tmp_path, capfd):
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
    assert stage3a_baselines.main(flags) == 0
    assert capfd.readouterr().err.count("is finished already") == 2
    rows = [json.loads(line) for line in (tmp_path / "gru4rec" / "tuning.jsonl").read_text().splitlines()]
    assert [row["settings"] for row in rows] == [{}, small]
    assert all(row["epochs"] == len(row["validations"]) for row in rows)
    assert json.loads((tmp_path / "eval/gru4rec/metrics.json").read_text())["full/ndcg@10"] > 0.9
    assert not state.exists()
    figures = json.loads((tmp_path / "gru4rec" / "manifest.json").read_text())["figures"]
    assert figures["valid/full/ndcg@10"] == pytest.approx(max(row["validation"] for row in rows), abs=1e-4)


def _children(pid):
    with open(f"/proc/{pid}/task/{pid}/children", encoding="utf-8") as file:
        return file.read().split()


def _is_running(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
