"""Trains one model of RecBole 1.2.1 and gives its scores, in RecBole's own environment (numpy below 2).

    PYTHON recbole_runner.py EXCHANGE RESULTS

First it tries the settings of EXCHANGE/work.json, if that says so, and keeps the best weights in RESULTS. Then it
answers each character of its input: it reads EXCHANGE/questions.npz and writes EXCHANGE/scores.npy. It tells what it
does in lines of JSON, and ends when its input does. `cf/recbole.py` starts it.

It is run as a script by another interpreter, so it imports nothing of this package, and nothing of the package imports
it. From RecBole it takes the models, their losses, their default settings and their batch transforms. Data and loop are
its own: RecBole's filters, splits and evaluation never see the data, users and items keep their indices, and the test
targets never come here.

A training sees the training parts, each position as RecBole's augmentation makes it: the items before it, and it. After
each epoch it is validated: NDCG@10 in the whole catalogue without the seen items, ties against the target.

Deviations from RecBole: histories are padded to the longest one, not always to 50; BERT4Rec's sequences have their last
item too (RecBole's augmentation would never train on it); S3Rec is pretrained on whole training parts, for at most
`PRETRAINING` of the time left, not 500 epochs; SINE's module turns anomaly detection on for all, which is turned off.
"""

from __future__ import annotations

import json
import math
import os
import queue
import random
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

PRETRAINING = 0.25  # of the time that is left: the most that S3Rec's pretraining takes
SCORED = 512  # users per block of a validation
PRETRAINED, MASKED, TRANSLATED = "S3Rec", "BERT4Rec", "TransRec"  # models that are treated in a way of their own


@dataclass(frozen=True)
class Sequences:
    """Item sequences as `item_sequences.ItemSequences` has them."""

    items: np.ndarray  # [T]
    starts: np.ndarray  # [U]
    ends: np.ndarray  # [U]

    @classmethod
    def of(cls, arrays: Any, prefix: str) -> Sequences:
        """Read three arrays of an `.npz`."""
        return cls(*(arrays[f"{prefix}_{name}"].astype(np.int64) for name in ("items", "starts", "ends")))

    def padded(self, rows: np.ndarray, ends: np.ndarray, length: int) -> tuple[Tensor, Tensor]:
        """Return the last `length` items before `ends` in some sequences, 0 behind them: int64 [B, L] and lengths [B].

        An empty history becomes one padding item.
        """
        starts = np.maximum(self.starts[rows], ends - length)  # [B]
        lengths = ends - starts  # [B]
        columns = np.arange(length)  # [L]
        places = np.minimum(starts[:, None] + columns, max(len(self.items) - 1, 0))  # [B, L]
        table = np.where(columns < lengths[:, None], self.items[places], 0)  # [B, L]
        return torch.from_numpy(table), torch.from_numpy(np.maximum(lengths, 1))


class Shapes:
    """What RecBole's models ask of a data set: how many users, items and attributes there are, 0 for padding."""

    def __init__(self, num_users: int, num_items: int, attributes: np.ndarray, num_attributes: int):
        self.user_num, self.item_num = num_users + 1, num_items + 1
        self._attributes = torch.from_numpy(attributes.astype(np.int64))  # [N + 1, A], 0 is none
        self._numbers = {"user_id": self.user_num, "item_id": self.item_num, "class": num_attributes + 1}

    def num(self, name: str) -> int:
        """Return the number of values of a field."""
        return self._numbers[name]

    def get_item_feature(self) -> dict[str, Tensor]:
        """Return each item's attributes."""
        return {"class": self._attributes}


class Model:
    """A model of RecBole with some settings: its loss of a batch, and its scores of the catalogue."""

    def __init__(self, work: dict[str, Any], changed: dict[str, Any], shapes: Shapes):
        from recbole.config import Config
        from recbole.data.interaction import Interaction
        from recbole.data.transform import construct_transform
        from recbole.utils import get_model

        self.length, self._shapes, self._interaction = work["max_length"], shapes, Interaction
        self.name, self.device = work["class"], torch.device(work["device"])
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        fixed = {"MAX_ITEM_LIST_LENGTH": self.length, "train_neg_sample_args": None, "gpu_id": ""}
        config = Config(model=self.name, dataset="sequences", config_dict={**fixed, **changed})
        os.environ.pop("CUDA_VISIBLE_DEVICES")  # Config has set it
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
        config["device"] = self.device
        self._transform = construct_transform(config)
        self.batch_size, self.learning_rate = config["train_batch_size"], config["learning_rate"]
        self.weight_decay, self.pretrain_epochs = config["weight_decay"], config["pretrain_epochs"] or 0
        self.module = get_model(self.name)(config, shapes).to(self.device)
        torch.autograd.set_detect_anomaly(False)  # the import of SINE has turned it on

    def finetune(self) -> None:
        """Go from S3Rec's pretraining to its training, as RecBole does when it loads the pretrained weights."""
        if self.name == PRETRAINED:
            self.module.train_stage, self.module.loss_fct = "finetune", torch.nn.CrossEntropyLoss()

    def _batch(self, users: np.ndarray, items: Tensor, lengths: Tensor, **more: Tensor) -> Any:
        fields = {"user_id": torch.from_numpy(users + 1), "item_id_list": items, "item_length": lengths, **more}
        return self._interaction({name: tensor.to(self.device) for name, tensor in fields.items()})

    def loss(self, sequences: Sequences, users: np.ndarray, places: np.ndarray) -> Tensor:
        """Return the loss of predicting the items at some places of `sequences.items`, from what is before them."""
        ends = places + 1 if self.name == MASKED else places
        targets = torch.from_numpy(sequences.items[places])  # [B]
        negatives = torch.from_numpy(np.random.randint(1, self._shapes.item_num - 1, len(places)))  # [B]
        negatives += negatives >= targets  # uniform over all items but the target, as RecBole draws them
        history = sequences.padded(users, ends, self.length)
        batch = self._batch(users, *history, item_id=targets, neg_item_id=negatives)
        return self.module.calculate_loss(self._transform(self._shapes, batch))

    def pretraining_loss(self, sequences: Sequences, users: np.ndarray) -> Tensor:
        """Return the loss of S3Rec's pretraining on whole sequences."""
        return self.module.calculate_loss(
            self._batch(users, *sequences.padded(users, sequences.ends[users], self.length))
        )

    @torch.no_grad()
    def scores(self, users: np.ndarray, sequences: Sequences, rows: np.ndarray) -> Tensor:
        """Return the scores of all items for some histories: float [B, N], column j for item j + 1."""
        self.module.eval()
        batch = self._batch(users, *sequences.padded(rows, sequences.ends[rows], self.length))
        if self.name == TRANSLATED:  # RecBole's own way takes B x N x D numbers
            state = self.module.forward(batch["user_id"], batch["item_id_list"], batch["item_length"])  # [B, D]
            items = self.module.item_embedding.weight  # [N + 1, D]
            scores = self.module.bias.weight.T - torch.cdist(state, items)  # [B, N + 1]
        else:
            scores = self.module.full_sort_predict(batch)  # [B, N + 1]
        return scores[:, 1 : self._shapes.item_num].float()


class Clock:
    """Counts seconds of work: on a CPU at most those that this process computed, on a GPU those that passed.

    So other work on the same cores takes nothing from a training's time.
    """

    def __init__(self, device: torch.device):
        self._is_cpu, self._passed, self._computed = device.type == "cpu", time.monotonic(), time.process_time()

    def passed(self) -> float:
        """Return the seconds since this clock was made."""
        return time.monotonic() - self._passed

    def seconds(self) -> float:
        """Return the seconds of work since then."""
        return min(self.passed(), time.process_time() - self._computed) if self._is_cpu else self.passed()


@dataclass
class Progress:
    """How far the training with one setting is."""

    epochs: int = 0
    pretrain_epochs: int = 0
    seconds: float = 0.0  # of work, see `Clock`
    passed_seconds: float = 0.0
    validations: list[float] = field(default_factory=list)

    @property
    def best_epoch(self) -> int:
        """The first of the best epochs, from 1; 0 before the first validation."""
        return self.validations.index(max(self.validations)) + 1 if self.validations else 0


class Training:
    """The training of one model with one setting.

    Args:
        seconds: it ends soon after so many of work, in the middle of an epoch if need be.
    """

    def __init__(self, work: dict[str, Any], data: Any, number: int, seconds: float, state: Path):
        self._work, self._number, self._seconds, self._state = work, number, seconds, state
        self.changed = work["settings"][number]
        self._train, self._valid = Sequences.of(data, "train"), Sequences.of(data, "valid")
        self._users, self._targets = data["valid_users"].astype(np.int64), data["valid_targets"].astype(np.int64)
        self._seed(0)
        self.model = Model(work, self.changed, shapes_of(data))
        self._optimizer = self._new_optimizer()
        self.progress, self.best = Progress(), dict[str, Tensor]()
        lengths = self._train.ends - self._train.starts  # [U]
        self._owners = np.repeat(np.arange(len(lengths)), np.maximum(lengths - 1, 0))  # [S], whose each position is
        firsts = np.repeat((lengths - 1).clip(0).cumsum() - (lengths - 1).clip(0), (lengths - 1).clip(0))  # [S]
        self._places = self._train.starts[self._owners] + 1 + np.arange(len(self._owners)) - firsts  # [S], in items
        self._clock, self._before = Clock(self.model.device), (0.0, 0.0)

    def run(self) -> str:
        """Train to the end of patience, epochs or time; return which it was."""
        self._restore()
        self._before = self.progress.seconds, self.progress.passed_seconds
        if not self.progress.epochs:
            self._pretrain()
        self.model.finetune()
        while self.progress.epochs < self._work["epochs"]:
            if self._left() <= 0 and self.progress.epochs:
                return "minutes"
            if self.progress.epochs - self.progress.best_epoch >= self._work["patience"]:
                return "patience"
            loss = self._epoch()
            if not math.isfinite(loss):
                return f"the loss is {loss}"
            self._after_epoch(loss)
        return "epochs"

    def _left(self) -> float:
        return self._seconds - self._before[0] - self._clock.seconds()

    def _new_optimizer(self) -> torch.optim.Optimizer:
        model = self.model
        return torch.optim.Adam(model.module.parameters(), lr=model.learning_rate, weight_decay=model.weight_decay)

    def _seed(self, *place: int) -> None:
        """Seed all generators by the place in the training, so that one that was killed goes on as it would have."""
        seed = np.random.SeedSequence([self._work["seed"], self._number, *place]).generate_state(1)[0]
        random.seed(int(seed))
        np.random.seed(seed)
        torch.manual_seed(int(seed))

    def _steps(self, count: int) -> Iterator[np.ndarray]:
        """Yield the rows of each batch of an epoch over `count` rows."""
        order = np.random.permutation(count)
        self.model.module.train()
        for start in range(0, count, self.model.batch_size):
            yield order[start : start + self.model.batch_size]

    def _step(self, loss: Tensor) -> float:
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        return loss.item()

    def _pretrain(self) -> None:
        if self.model.name != PRETRAINED:
            return
        users, end = np.flatnonzero(self._train.ends > self._train.starts), (1 - PRETRAINING) * self._left()
        while self.progress.pretrain_epochs < self.model.pretrain_epochs and self._left() > end:
            self._seed(1, self.progress.pretrain_epochs)
            for rows in self._steps(len(users)):
                self._step(self.model.pretraining_loss(self._train, users[rows]))
                if self._left() <= end:
                    break
            self.progress.pretrain_epochs += 1
        self._optimizer = self._new_optimizer()

    def _epoch(self) -> float:
        """Train an epoch, or as much of it as there is time for, and return the mean loss."""
        self._seed(2, self.progress.epochs)
        losses = []
        for rows in self._steps(len(self._owners)):
            losses.append(self._step(self.model.loss(self._train, self._owners[rows], self._places[rows])))
            if not math.isfinite(losses[-1]) or self._left() <= 0:
                break
        return sum(losses) / len(losses)

    def _after_epoch(self, loss: float) -> None:
        """Validate, keep the best weights, and write what is needed to go on from here."""
        progress = self.progress
        progress.epochs += 1
        progress.validations.append(self.validation())
        if progress.best_epoch == progress.epochs:
            self.best = {name: tensor.cpu().clone() for name, tensor in self.model.module.state_dict().items()}
        progress.seconds = self._before[0] + self._clock.seconds()
        progress.passed_seconds = self._before[1] + self._clock.passed()
        state = {
            "number": self._number,
            "progress": dict(vars(progress)),
            "best": self.best,
            "weights": self.model.module.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }
        temporary = self._state.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self._state)
        say(setting=self._number, epoch=progress.epochs, loss=loss, validation=progress.validations[-1])

    def _restore(self) -> None:
        if not self._state.exists():
            return
        state = torch.load(self._state, map_location=self.model.device, weights_only=True)
        if state["number"] == self._number:
            self.progress, self.best = Progress(**state["progress"]), state["best"]
            self.model.module.load_state_dict(state["weights"])
            self._optimizer.load_state_dict(state["optimizer"])

    def validation(self) -> float:
        """Return NDCG@10 in the whole catalogue without the seen items; ties count against the target."""
        total = 0.0
        for start in range(0, len(self._users), SCORED):
            rows = np.arange(start, min(start + SCORED, len(self._users)))
            scores = self.model.scores(self._users[rows], self._valid, rows)  # [B, N]
            targets = torch.from_numpy(self._targets[rows]).to(scores.device)[:, None] - 1  # [B, 1]
            longest = int((self._valid.ends - self._valid.starts)[rows].max())
            histories, _ = self._valid.padded(rows, self._valid.ends[rows], max(longest, 1))  # [B, H]
            seen = torch.zeros(len(rows), scores.shape[1] + 1, dtype=torch.bool, device=scores.device)
            seen = seen.scatter(1, histories.to(scores.device), True)[:, 1:].scatter(1, targets, False)  # [B, N]
            ranks = ((scores >= scores.gather(1, targets)) & ~seen).sum(1)  # [B]
            total += float(torch.where(ranks <= 10, 1 / torch.log2(1.0 + ranks), 0.0).sum())
        return total / len(self._users)


def shapes_of(data: Any) -> Shapes:
    """Return what the models ask of the data."""
    return Shapes(int(data["num_users"]), int(data["num_items"]), data["attributes"], int(data["num_attributes"]))


def train(work: dict[str, Any], data: Any, results: Path) -> None:
    """Try the settings until the minutes are over; RESULTS gets `tuning.jsonl` and the best one's weights.

    A setting gets at most half of the time that is left, the last one all of it.
    """
    log, state = results / "tuning.jsonl", results / "state.pt"
    tried = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    for number in range(len(tried), len(work["settings"])):
        left = 60 * work["minutes"] - sum(row["seconds"] for row in tried)  # also of before a kill
        if tried and left <= 0:
            break
        share = left if number == len(work["settings"]) - 1 else left / 2
        training = Training(work, data, number, share, state)
        ended, progress = training.run(), training.progress
        reached = max(progress.validations, default=-1.0)
        if training.best and reached > max((row["validation"] for row in tried), default=-1.0):
            metadata = {"settings": json.dumps(training.changed), "validation": repr(reached)}
            save_file(training.best, results / "model.tmp", metadata)
            os.replace(results / "model.tmp", results / "model.safetensors")
        numbers = {name: value for name, value in vars(progress).items() if name != "validations"}
        numbers |= {"seconds": round(progress.seconds, 3), "passed_seconds": round(progress.passed_seconds, 3)}
        row = {"settings": training.changed, "validation": reached, "best_epoch": progress.best_epoch, **numbers}
        tried.append({**row, "ended": ended, "validations": [round(one, 6) for one in progress.validations]})
        (results / "tuning.tmp").write_text("".join(json.dumps(one) + "\n" for one in tried))
        os.replace(results / "tuning.tmp", log)
        state.unlink(missing_ok=True)
        say(tried=tried[-1])
    if not (results / "model.safetensors").exists():
        sys.exit(f"no setting could be trained: {tried[-1]['ended']}")


def score(work: dict[str, Any], data: Any, exchange: Path, results: Path, asked: Iterator[str]) -> None:
    """Answer questions: write the scores of the histories in `questions.npz` to `scores.npy`."""
    weights = results / "model.safetensors"
    with safe_open(weights, framework="pt") as file:
        chosen = json.loads(file.metadata()["settings"])
    model = Model(work, chosen, shapes_of(data))
    model.finetune()
    model.module.load_state_dict(load_file(weights, str(model.device)))
    say(ready=True)
    for _ in asked:
        questions = np.load(exchange / "questions.npz")
        histories = Sequences.of(questions, "history")
        scores = model.scores(questions["users"].astype(np.int64), histories, np.arange(len(questions["users"])))
        np.save(exchange / "scores.npy", scores.cpu().numpy())
        say(scored=len(scores))


class Input:
    """The characters of this process's input. Its end ends the process in the midst of a training too.

    It is the end of the process that started this one, however that ended.
    """

    def __init__(self) -> None:
        self.trained = False
        self._asked = queue.SimpleQueue[str]()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while character := os.read(0, 1):  # not sys.stdin, whose lock would be held when this process ends
            self._asked.put(character.decode())
        self._asked.put("")
        if not self.trained:
            os._exit(1)

    def __iter__(self) -> Iterator[str]:
        return iter(self._asked.get, "")


def say(**what: Any) -> None:
    """Tell the process that started this one, in a line of JSON."""
    OUT.write(json.dumps(what) + "\n")
    OUT.flush()


def main() -> None:
    """The command line."""
    global OUT
    exchange, results = map(Path, sys.argv[1:])
    OUT = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to the log
    sys.argv[1:] = []  # RecBole reads it
    work = json.loads((exchange / "work.json").read_text(encoding="utf-8"))
    if work["device"] == "auto":
        work["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.deterministic = True
    os.chdir(exchange)  # for whatever RecBole writes
    data = np.load(exchange / "data.npz")
    asked = Input()
    if work["trains"]:
        train(work, data, results)
    asked.trained = True
    score(work, data, exchange, results, iter(asked))


OUT = sys.stdout

if __name__ == "__main__":
    main()
