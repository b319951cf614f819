"""A study with real stages: two seeds that share what is equal, run again, and with a run that cannot be."""

import json
import shutil

import pytest
import yaml

from stages.pipeline import ROOT, STAGES, run
from twice_rec.files import MANIFEST
from twice_rec.stages import stage6_study

pytestmark = pytest.mark.slow


def overrides(base):
    """Stage -> the keys that the tiny recipes have in tests."""
    found = {}
    for stage in ("prepare", "rationales", "sft", "sasrec", "grpo", "evaluate", "report"):
        keys = [part.split() for part in STAGES[stage][2].split("--")[1:]]
        found[stage] = {
            name: [*map(yaml.safe_load, v)] if name == "baselines" else yaml.safe_load(v[0]) for name, *v in keys
        }
    found["evaluate"]["rankings"] = ["likelihood"]
    found["sft"]["model_name_or_path"] = found["evaluate"]["model_name_or_path"] = str(base)
    return found


def study(run_dir, base, *more):
    """Run a study of the tiny pipeline; its exit status, and state by name of each run."""
    words = [str(ROOT / "recipes" / "tiny" / "study.yaml"), "--run_dir", str(run_dir), "--seeds", "2", "--parts", "[]"]
    words += ["--recipes_dir", str(ROOT / "recipes" / "tiny"), "--overrides", json.dumps(overrides(base)), *more]
    status = stage6_study.main(words)
    rows = json.loads((run_dir / "study" / "study.json").read_text())["runs"]
    return status, {(row["seed"], row["stage"], row["what"]): row["state"] for row in rows}


def test_two_seeds_once_again_and_with_one_run_that_fails(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'src'}")
    run_dir, other = tmp_path / "tiny", tmp_path / "tiny_seed43"
    base = tmp_path / "base_run" / "base"
    assert run("prepare", base.parent, None) == run("base", base.parent, base) == 0

    status, states = study(run_dir, base)
    assert status == 0, capfd.readouterr().err
    assert set(states.values()) == {"done"}
    assert (other / "data").is_symlink()
    assert (other / "rationales").is_symlink()
    assert not (other / "sasrec").is_symlink()
    variants = json.loads((run_dir / "report" / "results.json").read_text())["variants"]
    runs = {name: variants[name]["runs"] for name in ("base", "popularity", "sasrec", "stage2", "stage3", "oracle")}
    assert runs == {"base": 1, "popularity": 1, "sasrec": 2, "stage2": 2, "stage3": 2, "oracle": 1}

    seeds = [json.loads((folder / "sft" / MANIFEST).read_text())["config"]["seed"] for folder in (run_dir, other)]
    assert seeds == [42, 43]
    users = [(folder / "eval" / "stage2" / "predictions.jsonl").read_text() for folder in (run_dir, other)]
    asked = [[json.loads(line)["user_id"] for line in text.splitlines()] for text in users]
    assert asked[0] == asked[1]

    status, states = study(run_dir, base)
    assert status == 0
    assert {state for (_, stage, _), state in states.items() if stage != "report"} == {"was there"}

    shutil.rmtree(other / "grpo")
    shutil.rmtree(other / "eval" / "stage3")
    (other / "grpo").mkdir()
    (other / "grpo" / "notes.txt").write_text("mine")
    capfd.readouterr()
    status, states = study(run_dir, base)
    assert status == 1
    assert (states[43, "grpo", "stage3"], states[43, "evaluate", "stage3"]) == ("failed", "skipped")
    assert states[42, "report", ""] == "done"
    told = capfd.readouterr()
    assert "seed 43 grpo stage3 failed" in told.err
    assert "holds files of another origin" in told.out
    assert "2 of 18 runs are not done" in told.err
    variants = json.loads((run_dir / "report" / "results.json").read_text())["variants"]
    assert (variants["stage2"]["runs"], variants["stage3"]["runs"]) == (2, 1)
    assert (other / "grpo" / "notes.txt").read_text() == "mine"
