"""The RecTools side of `sasrec.py`: trains its SASRecModel, prints the seconds of all epochs but the first.

Run by `sasrec.py` in RecTools' own environment: FOLDER (with sequences.json) SETTINGS THREADS.
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


def main():
    """Train and print."""
    warnings.filterwarnings("ignore")
    folder, settings, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    settings = json.loads(settings)
    sequences = json.loads((Path(folder) / "sequences.json").read_text())
    rows = [
        (user, item, 1.0, pd.Timestamp(2020, 1, 1) + pd.Timedelta(minutes=position))
        for user, sequence in enumerate(sequences)
        for position, item in enumerate(sequence)
    ]
    frame = pd.DataFrame(rows, columns=[Columns.User, Columns.Item, Columns.Weight, Columns.Datetime])
    epochs = settings.pop("epochs")

    def trainer(**_):
        return Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[Clock()],
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip

    model = SASRecModel(n_blocks=2, loss="softmax", train_min_user_interactions=2, get_trainer_func=trainer, **settings)
    model.fit(Dataset.construct(frame))
    print(Clock.ends[-1] - Clock.ends[0])


if __name__ == "__main__":
    main()
