"""Training of SASRec: losses, the loop, early stopping on validation, resuming after any epoch.

Only the training parts of the sequences are used for gradients. Only the user's training items are excluded from the
negatives: to exclude later items would tell the model which ones they are. Every epoch draws its order, negatives and
dropout from (seed, epoch), so a run that is killed and resumed ends with the same weights.

Shapes: B sequences of at most L items, T real positions that predict, n negatives per position, D = hidden_size.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from twice_rec.cf.ranking import CHOSEN_ON, CFQuestions, Data
from twice_rec.cf.recipe import SASRecConfig, SASRecRecipe, SASRecTrainerConfig
from twice_rec.cf.sasrec import SASRec, SASRecScorer, pad_right
from twice_rec.errors import InputError
from twice_rec.files import atomic_path, set_aside, write_jsonl
from twice_rec.progress import progress
from twice_rec.random_streams import stream_seed

logger = logging.getLogger(__name__)

STATE = "training_state.safetensors"  # beside a model that is being trained; whoever finishes the stage removes it


@dataclass(frozen=True, slots=True)
class Epoch:
    """One line of the training log; `validation` is what the caller measures, larger is better."""

    number: int
    loss: float
    validation: float
    seconds: float


def softmax_loss(states: Tensor, targets: Tensor, item_embedding: Tensor) -> Tensor:
    """Return the cross-entropy over the whole catalogue.

    Takes states [T, D], target items 1..N [T], and item embeddings [N + 1, D], whose row 0 is padding.
    """
    return F.cross_entropy(states @ item_embedding[1:].T, targets - 1)


def sampled_loss(states: Tensor, targets: Tensor, negatives: Tensor, item_embedding: Tensor, beta: float) -> Tensor:
    """Return the binary cross-entropy of the target against sampled negatives, averaged over all of them.

    With beta < 1 it is gBCE (Petrov and Macdonald, 2023): the target's probability is raised to the power beta, which
    undoes the overconfidence of sampling. beta = 1 is plain BCE. `negatives` is int64 [T, n]; see `softmax_loss`.
    """
    # F.embedding, since the backward pass of plain indexing sorts and is many times slower on a CPU.
    positive = (states * F.embedding(targets, item_embedding)).sum(-1)  # [T]
    negative = (F.embedding(negatives, item_embedding) @ states[:, :, None]).squeeze(-1)  # [T, n]
    total = beta * F.softplus(-positive) + F.softplus(negative).sum(-1)  # [T]
    return total.mean() / (1 + negatives.shape[1])


def gbce_beta(num_negatives: int, num_items: int, t: float) -> float:
    """Return gBCE's exponent alpha (t (1 - 1/alpha) + 1/alpha); alpha is the share of the other items sampled."""
    alpha = num_negatives / (num_items - 1)
    return alpha * (t * (1 - 1 / alpha) + 1 / alpha)


def sample_negatives(sequences: Tensor, num_negatives: int, num_items: int, generator: torch.Generator) -> Tensor:
    """Draw uniform items that do not occur in the same row: int64 [B, L] (0 is padding) -> int64 [B, L - 1, n].

    Raises:
        InputError: if a sequence holds the whole catalogue.
    """
    batch, length = sequences.shape
    if int((sequences > 0).sum(1).max()) >= num_items:
        raise InputError(f"a sequence holds all {num_items} items, which leaves no negative; use loss: softmax")
    negatives = torch.randint(1, num_items + 1, (batch, (length - 1) * num_negatives), generator=generator)
    # A small catalogue is looked up in a [B, N + 1] table of the user's own items, a large one compared item by item.
    own = torch.zeros(batch, num_items + 1, dtype=torch.bool).scatter_(1, sequences, True) if num_items < 4096 else None
    while True:
        clash = own.gather(1, negatives) if own is not None else (negatives[:, :, None] == sequences[:, None]).any(-1)
        if not (count := int(clash.sum())):
            return negatives.view(batch, length - 1, num_negatives)
        negatives[clash] = torch.randint(1, num_items + 1, (count,), generator=generator)


def training_table(sequences: Sequence[Sequence[int]], max_length: int) -> Tensor:
    """Return the last `max_length + 1` items of each sequence of two or more: int64 [users, longest], 0 is padding."""
    recent = [sequence[-(max_length + 1) :] for sequence in sequences if len(sequence) >= 2]
    if not recent:
        raise InputError("no user has two training interactions; SASRec has nothing to learn from")
    return pad_right(recent)


def batches(table: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield all rows in a new order: int64 [B, L], as long as their longest sequence; the last batch may be smaller."""
    lengths = (table > 0).sum(1)  # [users]
    for rows in torch.randperm(len(table), generator=generator).split(batch_size):
        yield table[rows, : int(lengths[rows].max())]


def training_loss(model: SASRec, sequences: Tensor, config: SASRecTrainerConfig, generator: torch.Generator) -> Tensor:
    """Return the loss of one batch of sequences, int64 [B, L]; each position predicts the next item."""
    inputs, following = sequences[:, :-1], sequences[:, 1:]  # [B, L - 1]
    real = following > 0  # [B, L - 1], T of them
    device = model.item_embedding.weight.device
    states = model((inputs * real).to(device))  # [T, D]
    targets = following[real].to(device)  # [T]
    if config.loss == "softmax":
        return softmax_loss(states, targets, model.item_embedding.weight)
    negatives = sample_negatives(sequences, config.num_negatives, model.num_items, generator)[real].to(device)  # [T, n]
    beta = gbce_beta(config.num_negatives, model.num_items, config.gbce_t) if config.loss == "gbce" else 1.0
    return sampled_loss(states, targets, negatives, model.item_embedding.weight, beta)


class SASRecTrainer:
    """One training of SASRec, and everything it needs to go on after a kill.

    Args:
        config, trainer_config: one recipe may be both.
        sequences: item indices of each user's training part.
        validate: measures a model in evaluation mode, larger is better.
        seed: of the first weights, the order, the negatives and the dropout.
        state_file: written after each epoch; a training that was killed goes on from it.
    """

    def __init__(
        self,
        config: SASRecConfig,
        trainer_config: SASRecTrainerConfig,
        num_items: int,
        sequences: Sequence[Sequence[int]],
        validate: Callable[[SASRec], float],
        seed: int,
        state_file: Path | None = None,
        device: torch.device | str = "cpu",
    ):
        self._gpus = [torch.device(device)] if torch.device(device).type == "cuda" else []
        with torch.random.fork_rng(devices=self._gpus):
            torch.manual_seed(stream_seed(seed, "first weights of SASRec"))
            self.model = SASRec(config, num_items).to(device)
        self.config = trainer_config
        self.seed = seed
        self.table = training_table(sequences, config.max_length)  # [users, longest]
        self.steps_per_epoch = math.ceil(len(self.table) / trainer_config.batch_size)
        self.optimizer = torch.optim.Adam(self.model.parameters(), weight_decay=trainer_config.weight_decay, fused=True)
        self.log: list[Epoch] = []
        self.best = deepcopy(self.model)
        self._validate = validate
        self._state_file = state_file

    def run(self, on_epoch: Callable[[Epoch], None] = lambda epoch: None) -> SASRec:
        """Train to the last epoch or the end of patience, and return the model of the best epoch on validation."""
        if self._state_file is not None and self._state_file.exists():
            self._restore(self._state_file)
        epochs, patience = self.config.epochs, self.config.patience or math.inf
        with progress(desc="SASRec", total=epochs, initial=len(self.log), unit="epoch") as bar:
            while len(self.log) < epochs and (not self.log or len(self.log) - self.best_epoch.number < patience):
                epoch = self._epoch(len(self.log) + 1)
                bar.set_postfix(loss=f"{epoch.loss:.4f}", validation=f"{epoch.validation:.4f}", refresh=False)
                bar.update()
                on_epoch(epoch)
        return self.best.eval()

    @property
    def best_epoch(self) -> Epoch:
        """Return the first epoch with the best validation."""
        return max(self.log, key=lambda epoch: epoch.validation)

    def _epoch(self, number: int) -> Epoch:
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(stream_seed(self.seed, "order and negatives of SASRec", number))
        total = 0.0
        self.model.train()
        with torch.random.fork_rng(devices=self._gpus):
            torch.manual_seed(stream_seed(self.seed, "dropout of SASRec", number))
            for step, sequences in enumerate(batches(self.table, self.config.batch_size, generator)):
                self._set_learning_rate((number - 1) * self.steps_per_epoch + step)
                loss = training_loss(self.model, sequences, self.config, generator)
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self.optimizer.step()
                total += float(loss.detach()) * len(sequences)
        if not math.isfinite(total):
            raise InputError(f"SASRec's loss is {total} in epoch {number}; lower learning_rate")
        self.model.eval()
        epoch = Epoch(number, total / len(self.table), self._validate(self.model), time.perf_counter() - start)
        self.log.append(epoch)
        if self.best_epoch is epoch:
            self.best = deepcopy(self.model)
        if self._state_file is not None:
            self._save(self._state_file)
        return epoch

    def _set_learning_rate(self, step: int) -> None:
        rate = self.config.learning_rate
        if self.config.lr_scheduler_type == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * step / (self.config.epochs * self.steps_per_epoch)))
        self.optimizer.param_groups[0]["lr"] = rate  # there is one group

    def _save(self, path: Path) -> None:
        groups = {"model": self.model.state_dict(), "best": self.best.state_dict()}
        groups |= {f"optimizer.{index}": state for index, state in self.optimizer.state_dict()["state"].items()}
        tensors = {f"{group}.{name}": tensor.contiguous() for group in groups for name, tensor in groups[group].items()}
        metadata = {"log": json.dumps([asdict(epoch) for epoch in self.log]), "settings": self._fingerprint()}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata)

    def _restore(self, path: Path) -> None:
        """Take up a saved state if it is whole and one of these settings; a damaged one is set aside."""
        try:
            with safe_open(path, framework="pt") as file:
                if file.metadata()["settings"] != self._fingerprint():
                    logger.warning("%s was left by a run with other settings; starting afresh", path)
                    return
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
                log = [Epoch(**row) for row in json.loads(file.metadata()["log"])]
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            logger.warning(
                "%s is damaged (%s) and now %s; training starts anew", path, error or "empty", set_aside(path)
            )
            return
        self.log = log
        self.model.load_state_dict(_under("model.", tensors))
        self.best.load_state_dict(_under("best.", tensors))
        optimizer = self.optimizer.state_dict()
        parameters = optimizer["param_groups"][0]["params"]
        optimizer["state"] = {index: _under(f"optimizer.{index}.", tensors) for index in parameters}
        self.optimizer.load_state_dict(optimizer)
        logger.info("resuming after epoch %d of at most %d", len(self.log), self.config.epochs)

    def _fingerprint(self) -> str:
        training = {**self.config.values_of(SASRecTrainerConfig), "seed": self.seed}
        return json.dumps([self.model.settings(), training, len(self.table), int(self.table.sum())])


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def train_and_save(
    recipe: SASRecRecipe, data: Data, folder: Path, seed: int, device: str, log: Callable[[dict[str, float]], None]
) -> dict[str, float]:
    """Train once, write `model.safetensors`, calibrated on validation, and `log.jsonl`, and return what was measured.

    A killed training goes on after its last epoch. `log` is told loss and validation after each one.
    """
    valid = CFQuestions(data, "valid", ["uniform", "full"])
    state, histories = folder / STATE, data.training_histories()
    validate = lambda model: valid.mean(SASRecScorer(model))
    trainer = SASRecTrainer(recipe, recipe, len(data.catalog), histories, validate, seed, state, device)
    model = trainer.run(lambda e: log({"loss": e.loss, f"valid/{CHOSEN_ON}": e.validation, "epoch": e.number}))
    scorer = SASRecScorer(model)
    scorer.calibrate(valid.histories, valid.candidates["uniform"], valid.targets)
    scorer.save(folder / "model.safetensors", data.catalog)
    write_jsonl(folder / "log.jsonl", map(asdict, trainer.log))
    figures = {
        "seed": seed,
        "best_epoch": trainer.best_epoch.number,
        "epochs": len(trainer.log),
        f"valid/{CHOSEN_ON}": trainer.best_epoch.validation,
        "train_seconds": round(sum(epoch.seconds for epoch in trainer.log), 1),
        "popularity_share": scorer.popularity_share(valid.histories),
    }
    logger.info("%s", ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    return figures
