"""Quality and training time of our SASRec recipe, beside item-kNN, RecTools' SASRec and our recipe of before.

    python benchmarks/sasrec_quality.py --data runs/grocery/data runs/ml-100k/data

Every data set is trained with one and the same recipe, `recipes/grocery/sasrec.yaml`, one training; RecTools 0.19.0
(an environment of its own, see requirements-rectools.txt) with its own defaults; "before" is the recipe that this one
replaced, tuned on the Grocery set. All see the same training parts, and rank the same test users, at most 10,000, in
the lists `uniform` and in the whole catalogue. Seconds are those of training, ours with all its validations.

Prints a table, and one line of JSON per data set, whose ratio is RecTools' seconds over ours.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from reporting import ROOT, report
from twice_rec.cf.ranking import CFQuestions, fit_baseline
from twice_rec.cf.recipe import SASRecRecipe
from twice_rec.cf.sasrec import SASRecScorer
from twice_rec.cf.sasrec_variant import SASRecVariant
from twice_rec.data.dataset import PreparedData
from twice_rec.markdown import markdown_table
from twice_rec.metrics import per_user
from twice_rec.recipe_reader import load_recipe

RECIPE = ROOT / "recipes" / "grocery" / "sasrec.yaml"
BEFORE = {
    "dropout": 0.2, "loss": "softmax", "epochs": 12, "batch_size": 128, "lr_scheduler_type": "cosine", "ema_decay": 0.0,
    "item_dropout": 0.0, "patience": None, "validation_users": None,
}  # fmt: skip
METRICS = ("uniform/hr@1", "uniform/hr@5", "uniform/ndcg@5", "full/ndcg@10")


def means(ranks: dict[str, np.ndarray]) -> list[float]:
    """The metrics of the table."""
    return [float(per_user(name.split("/")[1], ranks[name.split("/")[0]]).mean()) for name in METRICS]


def ours(data: PreparedData, test: CFQuestions, seed: int, changed: dict[str, object]) -> tuple[list[float], float]:
    """Train by the recipe; metrics and seconds."""
    recipe = load_recipe(RECIPE, SASRecRecipe, []).model_copy(update={"held_out_prompts": 0.0, "seed": seed, **changed})
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        (figures,) = SASRecVariant(recipe, data, "cpu", lambda figures: None).train({seed: Path(folder)})
        log = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
        first = f"after {log[0]['step']} steps, {log[0]['seconds']:.0f} s, validation was {log[0]['validation']:.4f}"
        print(f"{data.folder}: {figures}; {first}; {time.perf_counter() - start:.0f} s with its checks", flush=True)
        scorer = SASRecScorer.load(Path(folder) / "model.safetensors", data.catalog)
    return means(test.ranks(scorer)), figures["train_seconds"]


def rectools(data: PreparedData, test: CFQuestions, python: Path) -> tuple[list[float], float]:
    """Train RecTools' SASRecModel() in its own interpreter; metrics and seconds."""
    asked = test.asked
    with tempfile.TemporaryDirectory() as folder:
        given = {
            "training": [history.tolist() for history in data.training_histories()],
            "histories": [history.tolist() for history in asked.histories],
            "users": asked.users.tolist(),
            "targets": asked.targets.tolist(),
            "candidates": asked.candidates["uniform"].tolist(),
            "items": len(data.catalog),
        }
        (Path(folder) / "questions.json").write_text(json.dumps(given))
        script = str(ROOT / "benchmarks" / "rectools_sasrec.py")
        words = [str(python), script, folder, "defaults", str(torch.get_num_threads())]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        found = json.loads((Path(folder) / "ranks.json").read_text())
    return means({kind: np.array(found[kind]) for kind in ("uniform", "full")}), found["seconds"]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", default=[ROOT / "runs/tiny/data"], help="prepared data")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--quick", action="store_true", help="ours of one epoch, and no RecTools")
    arguments = parser.parse_args()
    environment, python = ROOT / ".venv-rectools", ROOT / ".venv-rectools" / "bin" / "python"
    if not arguments.quick:
        install = ["bash", str(ROOT / "install.sh"), "benchmarks/requirements-rectools.txt"]
        subprocess.run(["env", f"VENV={environment}", *install], check=True)
    for folder in arguments.data:
        data = PreparedData(folder)
        test = CFQuestions(data, "test", ["uniform", "full"], 10_000)
        changed = {"epochs": 1} if arguments.quick else {}
        rows = {"sasrec": ours(data, test, arguments.seed, changed)}
        an_epoch = {"validation_steps": -(-len(data.training_histories()) // 128)}
        rows["before"] = ours(data, test, arguments.seed, {**BEFORE, **an_epoch, **changed})
        start = time.perf_counter()
        knn = fit_baseline("itemknn", data, arguments.seed, 10_000)
        rows["itemknn"] = (means(test.ranks(knn)), time.perf_counter() - start)
        if not arguments.quick:
            rows["RecTools"] = rectools(data, test, python)
        lines = [[name, *(f"{value:.4f}" for value in of), f"{s:.0f}"] for name, (of, s) in rows.items()]
        print(markdown_table([str(folder), *METRICS, "seconds"], lines), flush=True)
        peer = "before" if arguments.quick else "RecTools"
        more = {"data": str(folder), "users": len(data.training_histories()), "items": len(data.catalog)}
        more |= {name: dict(zip(METRICS, of, strict=True)) for name, (of, _) in rows.items()}
        report("sasrec_quality", peer, rows["sasrec"][1], rows[peer][1], "s", False, **more)


if __name__ == "__main__":
    main()
