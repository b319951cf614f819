"""The RecTools side of `sasrec.py` and `sasrec_quality.py`, run in RecTools' own environment.

FOLDER SETTINGS THREADS    trains on FOLDER/sequences.json, prints the seconds of all epochs but the first
FOLDER defaults THREADS    trains SASRecModel() on FOLDER/questions.json, writes its ranks to FOLDER/ranks.json
"""

import json
import sys
import time
import warnings
from pathlib import Path
from typing import ClassVar

import pandas as pd
import torch
from pytorch_lightning import Callback, Trainer
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel


class Clock(Callback):
    """Notes when each epoch ends; for all instances, since RecTools trains with a copy of its trainer."""

    ends: ClassVar[list[float]] = []

    def on_train_epoch_end(self, trainer, module):
        """Called by Lightning."""
        Clock.ends.append(time.perf_counter())


def data_set(users, sequences):
    """Sequences as RecTools takes them."""
    rows = [
        (user, item, 1.0, pd.Timestamp(2020, 1, 1) + pd.Timedelta(minutes=position))
        for user, sequence in zip(users, sequences, strict=True)
        for position, item in enumerate(sequence)
    ]
    return Dataset.construct(pd.DataFrame(rows, columns=[Columns.User, Columns.Item, Columns.Weight, Columns.Datetime]))


def timed(folder, settings):
    """Train with the settings and print the seconds."""
    sequences, epochs = json.loads((folder / "sequences.json").read_text()), settings.pop("epochs")

    def trainer(**_):
        return Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[Clock()],
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip

    model = SASRecModel(n_blocks=2, loss="softmax", train_min_user_interactions=2, get_trainer_func=trainer, **settings)
    model.fit(data_set(range(len(sequences)), sequences))
    print(Clock.ends[-1] - Clock.ends[0])


def ranked(folder):
    """Train with RecTools' defaults and rank the targets; an item that is not recommended is behind all that are."""
    given = json.loads((folder / "questions.json").read_text())
    training = data_set(range(len(given["training"])), given["training"])
    start = time.perf_counter()
    model = SASRecModel().fit(training)
    seconds = time.perf_counter() - start
    ranks = {"uniform": [], "full": [], "seconds": seconds}
    for at in range(0, len(given["users"]), 500):  # the whole catalogue is recommended, so a few users at a time
        rows = slice(at, at + 500)
        users, last = given["users"][rows], given["items"]
        found = model.recommend(users, data_set(users, given["histories"][rows]), k=last, filter_viewed=True)
        places = {user: {} for user in users}
        for user, item, rank in found[[Columns.User, Columns.Item, Columns.Rank]].itertuples(index=False):
            places[user][item] = rank
        for user, target, shown in zip(users, given["targets"][rows], given["candidates"][rows], strict=True):
            own = places[user].get(target, last)
            ranks["full"].append(int(own))
            ranks["uniform"].append(sum(places[user].get(item, last) <= own for item in shown))
    (folder / "ranks.json").write_text(json.dumps(ranks))


def main():
    """Train and print or write."""
    warnings.filterwarnings("ignore")
    folder, settings, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    if settings == "defaults":
        ranked(Path(folder))
    else:
        timed(Path(folder), json.loads(settings))


if __name__ == "__main__":
    main()
