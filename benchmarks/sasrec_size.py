"""SASRec on a catalogue of the size of the largest Grocery 5-core: 130,000 items, 400,000 users, generated.

    python benchmarks/sasrec_size.py
    python benchmarks/sasrec_size.py --quick

Writes prepared data as stage 0 leaves them (histories of 6 to 20 items; items of a power law, in groups that a user
prefers), reads them, and trains one epoch by `recipes/amazon/sasrec.yaml` with one validation on 10,000 users, in a
process of its own. Prints the seconds, of the validation alone as well, and the process's largest memory.

The ratio is that of the seconds per step: the full softmax's over those of the sampled one that `loss: auto` takes.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl

from reporting import ROOT, add_measure, in_a_process, report
from twice_rec.cf.ranking import CFQuestions
from twice_rec.cf.recipe import SASRecConfig, SASRecRecipe, SASRecTrainerConfig
from twice_rec.cf.sasrec import SASRecScorer
from twice_rec.cf.sasrec_training import SASRecTrainer
from twice_rec.cf.sasrec_variant import SASRecVariant
from twice_rec.data.dataset import PreparedData
from twice_rec.recipe_reader import load_recipe

RECIPE = ROOT / "recipes" / "amazon" / "sasrec.yaml"
GROUPS, SHOWN = 200, 30


def write_data(folder: Path, num_users: int, num_items: int, seed: int = 0) -> None:
    """Write catalogue, sequences and candidate lists of made-up users."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    ids = np.array([f"B{item:09d}" for item in range(num_items)])
    pl.DataFrame({"item_id": ids, "title": [f"item {item}" for item in range(num_items)]}).write_ndjson(
        folder / "catalog.jsonl"
    )
    lengths = np.minimum(5 + rng.geometric(0.25, num_users), 20)  # [users]
    user = np.repeat(np.arange(num_users), lengths)  # [T]
    # The popularity of an item falls with its number; its group is the number modulo GROUPS.
    rank = np.minimum((num_items // GROUPS) * rng.random(len(user)) ** 3, num_items // GROUPS - 1).astype(np.int64)
    preferred, other = rng.integers(0, GROUPS, num_users)[user], rng.integers(0, GROUPS, len(user))  # [T], [T]
    group = np.where(rng.random(len(user)) < 0.8, preferred, other)
    item = rank * GROUPS + group  # [T]
    rows = pl.DataFrame({"user": user, "item_id": ids[item], "timestamp": np.arange(len(user))})
    sequences = rows.group_by("user", maintain_order=True).agg(interactions=pl.struct("item_id", "timestamp"))
    names = pl.format("U{}", "user").alias("user_id")
    count = pl.col("interactions").list.len()
    sequences.select(names, "interactions", num_train=count - 2, valid=count - 2, test=count - 1).write_ndjson(
        folder / "sequences.jsonl"
    )
    for split, before in {"train": 3, "valid": 2, "test": 1}.items():
        target = sequences.select(names, target=pl.col("interactions").list.get(-before).struct.field("item_id"))
        others = ids[rng.integers(0, num_items, (num_users, SHOWN - 1))]
        shown = pl.Series("uniform", np.column_stack([target["target"].to_numpy(), others]))
        target.with_columns(lists=pl.struct(shown.arr.to_list())).write_ndjson(folder / f"candidates.{split}.jsonl")


def seconds_per_step(data: PreparedData, loss: str, steps: int) -> float:
    """Train some steps with a loss, after as many to warm up."""
    worse = iter([0.0, -1.0])  # ends the training
    config = SASRecTrainerConfig(loss=loss, validation_steps=steps, patience=1)
    histories, validate = data.training_histories(), lambda model: next(worse)
    trainer = SASRecTrainer(SASRecConfig(), config, len(data.catalog), histories, validate, seed=0)
    trainer.run()
    return trainer.log[1].seconds / steps


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Read the data, train one epoch and validate as the recipe says; in a process of its own, for its memory."""
    start, data, folder = time.perf_counter(), PreparedData(Path(options.data)), Path(options.data).parent
    found = {"seconds_per_step": seconds_per_step(data, "softmax", 3)} if options.full else {}
    if not options.full:
        recipe = load_recipe(RECIPE, SASRecRecipe, ["--run_dir", str(folder), "--domain", "Generated", "--epochs", "1"])
        variant = SASRecVariant(recipe, data, "cpu", lambda figures: None)
        found["reading_s"] = time.perf_counter() - start
        (figures,) = variant.train({0: folder / "sasrec"})
        (row,) = map(json.loads, (folder / "sasrec" / "log.jsonl").read_text().splitlines())
        found |= {"epoch_and_validation_s": row["seconds"], "steps": row["step"], **figures}
        asked = CFQuestions(data, "valid", ["uniform", "full"], 10_000)
        start = time.perf_counter()
        asked.ranks(SASRecScorer.load(folder / "sasrec" / "model.safetensors", data.catalog))
        found["validation_s"] = time.perf_counter() - start
        found["seconds_per_step"] = seconds_per_step(data, "auto", 10)
    return found | {"gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=400_000)
    parser.add_argument("--items", type=int, default=130_000)
    parser.add_argument("--quick", action="store_true", help="20,000 users, 25,000 items")
    options = add_measure(parser, measure)
    if options.quick:
        options.users, options.items = 20_000, 25_000
    with tempfile.TemporaryDirectory() as folder:
        options.data, options.full = f"{folder}/data", False
        write_data(Path(options.data), options.users, options.items)
        ours = in_a_process(__file__, options)
        options.full = True
        theirs = in_a_process(__file__, options)
    more = {name: round(value, 4) for name, value in ours.items()} | {"users": options.users, "items": options.items}
    report("sasrec_size", "full softmax", ours["seconds_per_step"], theirs["seconds_per_step"], "s/step", False, **more)


if __name__ == "__main__":
    main()
