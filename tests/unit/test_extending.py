"""CONTRIBUTING.md, followed to the letter in a copy: each addition touches the files it says, and works."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text()


def blocks(title, language="python"):
    """The code of one section of the guide."""
    section = re.search(rf"^### {title}\n(.*?)^##", GUIDE, re.MULTILINE | re.DOTALL)[1]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


def touched(thing):
    """The files that the guide's table names for an addition."""
    return re.findall(r"`(\S+)`", re.search(rf"^\| {thing} \|(.*)$", GUIDE, re.MULTILINE)[1])


@pytest.fixture
def copy(tmp_path):
    """A copy of the package and the recipes, to which things are added."""
    for name in ("src", "recipes"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for top in ("src", "recipes")
        for path in (folder / top).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def add(copy, path, code):
    """Append code to a file, or make it."""
    target = copy / path
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "a", encoding="utf-8") as file:
        file.write(f"\n\n{code}" if target.stat().st_size else code)


def python(copy, *words):
    environment = {**os.environ, "PYTHONPATH": str(copy / "src")}
    return subprocess.run(
        [sys.executable, *words], cwd=copy, env=environment, capture_output=True, text=True, check=False
    )


def succeeds(copy, *words):
    done = python(copy, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def prepare(copy):
    sizes = ["--synthetic_users", "120", "--synthetic_items", "60", "--k_core", "2", "--candidate_lists", "uniform"]
    succeeds(copy, "-m", "twice_rec", "prepare", "recipes/tiny/prepare.yaml", *sizes)


def test_a_reward(copy):
    before = files(copy)
    (path,) = touched("a reward")
    add(copy, path, blocks("A reward")[0])
    script = """
from twice_rec.answer_format import parse
from twice_rec.catalog import Outcome
from twice_rec.grpo.recipe import GRPORecipe
from twice_rec.grpo.rewards import REWARDS, ScoredCompletion
config = GRPORecipe(run_dir="r", domain="D", seed=0, reward_funcs=["brief"], reward_weights=[1.0])
one = lambda tokens: ScoredCompletion("a b c", parse("a b c"), Outcome.MALFORMED, 0.0, num_tokens=tokens)
print([REWARDS["brief"].function(one(tokens), config) for tokens in (None, 60, 90, 120, 200)])
"""
    assert succeeds(copy, "-c", script) == "[1.0, 1.0, 0.5, 0.0, 0.0]\n"
    assert "brief" in succeeds(copy, "-m", "twice_rec", "grpo", "--help")
    assert {name for name, text in files(copy).items() if text != before.get(name)} == {path}


def test_a_rewarder_and_a_baseline(copy):
    before = files(copy)
    (path,) = touched("a CF rewarder")
    assert [path] == touched("a baseline")
    add(copy, path, blocks("A CF rewarder")[0])
    add(copy, path, blocks("A baseline")[0])
    prepare(copy)
    flags = [
        "--epochs",
        "1",
        "--hidden_size",
        "16",
        "--num_seeds",
        "1",
        "--baselines",
        "popularity",
        "latest",
        "markov",
        "--lists",
        "uniform",
    ]
    table = succeeds(copy, "-m", "twice_rec", "sasrec", "recipes/tiny/sasrec.yaml", *flags)
    assert "| latest " in table
    assert "| markov " in table
    script = """
from pathlib import Path
import numpy as np
from twice_rec.cf.recipe import ConfidenceConfig
from twice_rec.cf.rewarders import load_rewarder
from twice_rec.data.dataset import PreparedData
data = PreparedData(Path("runs/tiny/data"))
model = load_rewarder(ConfidenceConfig(cf_model="markov", confidence="calibrated"), Path("runs/tiny"), data)
first, second = data.training_histories()[0][:2]
pairs = [pair for history in data.training_histories() for pair in zip(history, history[1:])]
assert model.logits([[first]], np.array([[second]])) == pairs.count((first, second))
assert 0 <= model.confidences([[first]], np.array([[second]]), "calibrated", False) <= 1
"""
    succeeds(copy, "-c", script)
    changed = {name for name, text in files(copy).items() if text != before.get(name)}
    assert changed == {path}


def test_a_data_source(copy):
    before = files(copy)
    module, recipe = (name.replace("NAME", "csv") for name in touched("a data source"))
    add(copy, module, blocks("A data source")[0])
    add(copy, recipe, blocks("A data source", "yaml")[0])
    rows = [
        f"u{u},i{(u * 7 + t * (u % 3 + 1)) % 40},{1000 + t},{3 + t % 3},Title {u}" for u in range(80) for t in range(8)
    ]
    (copy / "MyShop.csv").write_text("\n".join(["user,item,time,rating,title", *rows]))
    flags = ["--source_dir", ".", "--num_candidates", "8", "--hard_pool", "10"]
    succeeds(copy, "-m", "twice_rec", "prepare", recipe, *flags)
    statistics = json.loads((copy / "runs" / "myshop" / "data" / "statistics.json").read_text())
    assert (statistics["users"], statistics["items"]) == (80, 40)
    changed = {name for name, text in files(copy).items() if text != before.get(name)}
    assert changed == {module, recipe}


def test_a_stage(copy):
    """The stage of the guide, with its work filled in, is begun, finished, and found finished again."""
    code = blocks("A stage")[0].replace("titles = ...  # the work: functions of a room", "titles = ['a']")
    add(copy, "src/twice_rec/stages/stage6_audit.py", code)
    recipe = re.search(r"`(class AuditRecipe\(Recipe\))` with `(variant: .*?)`", GUIDE, re.DOTALL)
    add(copy, "src/twice_rec/evaluation/recipe.py", f'{recipe[1]}:\n    """Stage 6."""\n\n    {recipe[2]}\n')
    stages = copy / "src" / "twice_rec" / "stages" / "command_line.py"
    entry = re.search(r'`("audit": \(.*?\))`', GUIDE, re.DOTALL)[1].replace("\n", " ")
    stages.write_text(stages.read_text().replace("STAGES = {\n", f"STAGES = {{\n    {entry},\n"))
    (copy / "audit.yaml").write_text("run_dir: runs/x\ndomain: D\nseed: 0\n")
    (copy / "runs" / "x" / "eval" / "stage3").mkdir(parents=True)
    missing = python(copy, "-m", "twice_rec", "audit", "audit.yaml")
    assert missing.returncode == 2
    assert "it is made by evaluate.sh, which must run first" in missing.stderr
    (copy / "runs" / "x" / "eval" / "stage3" / "predictions.jsonl").write_text("{}\n")
    succeeds(copy, "-m", "twice_rec", "audit", "audit.yaml")
    assert json.loads((copy / "runs" / "x" / "audit" / "titles.json").read_text()) == ["a"]
    assert "is finished already" in python(copy, "-m", "twice_rec", "audit", "audit.yaml").stderr
    assert "audit.sh" in succeeds(copy, "-m", "twice_rec", "--help")
