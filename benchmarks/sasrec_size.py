"""SASRec on a catalogue of the size of the largest Grocery 5-core: 130,000 items, 400,000 users, generated.

    python benchmarks/sasrec_size.py
    python benchmarks/sasrec_size.py --quick

Writes prepared data as stage 0 leaves them (histories of 5 to 20 items; items of a power law, in groups that a user
prefers), and runs stage 3a on them in a process of its own: reading, one epoch, one validation on 10,000 users, the
test ranking of all users in the whole catalogue. Prints their seconds and the process's largest memory.

The ratio is that of seconds per step, full softmax over those of the sampled one that `loss: auto` takes.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl

from reporting import report
from twice_rec.cf.recipe import SASRecConfig, SASRecTrainerConfig
from twice_rec.cf.sasrec_training import SASRecTrainer
from twice_rec.data.dataset import PreparedData

ROOT = Path(__file__).parents[1]
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


def seconds_per_step(folder: Path, loss: str, steps: int) -> float:
    """Train some steps with a loss, after as many to warm up."""
    data, worse = PreparedData(folder), iter([0.0, -1.0])
    config = SASRecTrainerConfig(loss=loss, validation_steps=steps, patience=1)
    histories, validate = data.training_histories(), lambda model: next(worse)
    trainer = SASRecTrainer(SASRecConfig(), config, len(data.catalog), histories, validate, seed=0)
    trainer.run()
    return trainer.log[1].seconds / steps


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=400_000)
    parser.add_argument("--items", type=int, default=130_000)
    parser.add_argument("--quick", action="store_true", help="20,000 users, 25,000 items")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.users, arguments.items = 20_000, 25_000
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        write_data(data, arguments.users, arguments.items)
        sampled, full = (seconds_per_step(data, loss, 5) for loss in ("sampled_softmax", "softmax"))
        words = ["sasrec", str(ROOT / "recipes/amazon/sasrec.yaml"), "--run_dir", folder, "--domain", "Generated"]
        flags = ["--epochs", "1", "--num_seeds", "1", "--baselines", "popularity", "--lists", "uniform", "full"]
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "twice_rec", *words, *flags], check=True)
        whole = time.perf_counter() - start
        (log,) = map(json.loads, (Path(folder) / "sasrec" / "log.jsonl").read_text().splitlines())
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # GiB
    more = {"users": arguments.users, "items": arguments.items, "steps": log["step"]}
    more |= {"epoch_and_validation_s": round(log["seconds"], 1), "stage_s": round(whole, 1), "gib": round(memory, 2)}
    report("sasrec_size", "full softmax", 1 / sampled, 1 / full, "steps/s", True, **more)


if __name__ == "__main__":
    main()
