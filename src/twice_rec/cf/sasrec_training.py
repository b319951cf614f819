"""Training of SASRec: the loop, its early end on validation, resuming after any validation.

Only the training parts of the sequences are used for gradients. Only the user's training items are excluded from the
negatives: to exclude later items would tell the model which ones they are. Each epoch draws its order, and each step
its negatives and dropout, from the seed and its number, so a run that is killed and resumed ends with the same weights.

Shapes: B sequences of at most L items, T real positions in them that predict, D = hidden_size, N items.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, reduce
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from twice_rec.cf import losses
from twice_rec.cf.confidence import Histories
from twice_rec.cf.recipe import POSITIONS, SOFTMAX_ITEMS, VALIDATION_STEPS, SASRecConfig, SASRecTrainerConfig
from twice_rec.cf.sasrec import SASRec
from twice_rec.errors import InputError
from twice_rec.files import atomic_path, set_aside
from twice_rec.item_sequences import ItemSequences
from twice_rec.progress import progress
from twice_rec.random_streams import random_stream, stream_seed
from twice_rec.run import IS_MAIN

logger = logging.getLogger(__name__)


GAIN = 0.01  # the share by which a validation must exceed the best so far to prolong the training


@dataclass(frozen=True, slots=True)
class Validation:
    """One line of the training log; `validation` is what the caller measures, larger is better."""

    step: int
    epochs: float  # passes over the training data so far
    loss: float  # mean over the steps since the last validation
    validation: float
    seconds: float  # of the steps and the validation


class SASRecTrainer:
    """One training of SASRec, and everything it needs to go on after a kill.

    Args:
        config, trainer_config: one recipe may be both.
        sequences: item indices of each user's training part; users with fewer than two are left out.
        validate: measures a model in evaluation mode, larger is better.
        seed: of the first weights, the order, the negatives and the dropout.
        device: where it is trained; of several processes (`accelerate launch`) each has its own.
        state_file: written after each validation; a training that was killed goes on from it.

    Raises:
        InputError: if no user has two interactions.
    """

    def __init__(
        self,
        config: SASRecConfig,
        trainer_config: SASRecTrainerConfig,
        num_items: int,
        sequences: Histories,
        validate: Callable[[SASRec], float],
        seed: int,
        state_file: Path | None = None,
        device: torch.device | str = "cpu",
    ):
        self.device = torch.device(device)
        self._processes = PartialState(cpu=self.device.type == "cpu")  # else processes on CPUs do not find each other
        if self._processes.num_processes > 1:
            self.device = self._processes.device  # each has its own GPU
        self._gpus = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=self._gpus):
            torch.manual_seed(stream_seed(seed, "first weights of SASRec"))
            self.model = SASRec(config, num_items).to(self.device)
        self.config = trainer_config
        self.seed = seed
        of_users = ItemSequences.of(sequences)
        self.sequences = of_users[of_users.lengths >= 2].windows(config.max_length + 1)  # one per user, or several
        if not len(self.sequences):
            raise InputError("no user has two training interactions; SASRec has nothing to learn from")
        positions = float((self.sequences.lengths - 1).mean())  # that a user's sequence predicts
        self.batch_size = trainer_config.batch_size or max(1, round(POSITIONS / positions))
        self.steps_per_epoch = math.ceil(len(self.sequences) / self.batch_size)
        self.last_step = trainer_config.epochs * self.steps_per_epoch
        self.validation_steps = trainer_config.validation_steps or max(self.steps_per_epoch, VALIDATION_STEPS)
        self.loss = trainer_config.loss
        if self.loss == "auto":
            self.loss = "softmax" if num_items <= SOFTMAX_ITEMS else "sampled_softmax"
        betas, decay = (0.9, trainer_config.adam_beta2), trainer_config.weight_decay
        self.optimizer = torch.optim.Adam(self.model.parameters(), betas=betas, weight_decay=decay, fused=True)
        self.log: list[Validation] = []
        self.average = deepcopy(self.model).eval()
        self.best = deepcopy(self.average)
        self._validate = validate
        self._state_file = state_file

    def run(self, on_validation: Callable[[Validation], None] = lambda validation: None) -> SASRec:
        """Train to the last step or the end of patience, and return the model that was best on validation."""
        if self._state_file is not None and self._state_file.exists():
            self._restore(self._state_file)
        with progress(desc="SASRec", total=self.last_step, initial=self.step, unit="step") as bar:
            while self.step < self.last_step and not self._patience_ended():
                done = self._until_validation()
                bar.set_postfix(loss=f"{done.loss:.4f}", validation=f"{done.validation:.4f}", refresh=False)
                bar.update(done.step - bar.n)
                on_validation(done)
        return self.best

    @property
    def step(self) -> int:
        """Return the number of steps until the last validation."""
        return self.log[-1].step if self.log else 0

    @property
    def best_validation(self) -> Validation:
        """Return the first of the best validations."""
        return max(self.log, key=lambda one: one.validation)

    def batches(self, start: int) -> Iterator[Tensor]:
        """Yield the batches of step `start` and of all after it: int64 [B, L], as long as their longest sequence.

        In an epoch every sequence comes once; its last batch may be smaller.
        """
        while True:
            epoch, first = divmod(start, self.steps_per_epoch)
            order = random_stream(self.seed, "order of SASRec", epoch).permutation(len(self.sequences))
            for place in range(first * self.batch_size, len(order), self.batch_size):
                yield torch.from_numpy(self.sequences[order[place : place + self.batch_size]].padded())
                start += 1

    def training_loss(self, sequences: Tensor, generator: torch.Generator, whole: Tensor | None = None) -> Tensor:
        """Return the loss of one batch of sequences, int64 [B, L]; each position predicts the next item.

        Args:
            whole: the same sequences before item dropout, whose items are no negatives either; None without it.
        """
        inputs, following = sequences[:, :-1], sequences[:, 1:]  # [B, L - 1]
        real = following > 0  # [B, L - 1], T of them
        items, num_items = self.model.item_embedding.weight, self.model.num_items
        states = self.model((inputs * real).to(items.device))  # [T, D]
        targets = following[real].to(items.device)  # [T]
        count = self.config.num_negatives
        if self.loss == "softmax":
            return losses.softmax_loss(states, targets, items)
        if self.loss == "sampled_softmax":
            shared = self._sampler.draw(count, generator)  # [n]
            log_probability = self._sampler.log_probability[shared - 1].to(items.device)  # [n]
            return losses.sampled_softmax_loss(states, targets, shared.to(items.device), log_probability, items)
        own, length = sequences if whole is None else whole, following.shape[1]
        negatives = losses.sample_negatives(own, count, num_items, generator, length)[real].to(items.device)  # [T, n]
        beta = losses.gbce_beta(count, num_items, self.config.gbce_t) if self.loss == "gbce" else 1.0
        return losses.sampled_loss(states, targets, negatives, items, beta)

    def _without_some_items(self, sequences: Tensor, generator: torch.Generator) -> Tensor:
        """Leave items of each sequence but the last out, and close the gaps: int64 [B, L] -> [B, L]."""
        real = sequences > 0  # [B, L]
        kept = real & (torch.rand(sequences.shape, generator=generator) >= self.config.item_dropout)
        last = real.sum(1, keepdim=True) - 1  # [B, 1]
        kept.scatter_(1, last, True)
        kept.scatter_(1, torch.where(kept.sum(1, keepdim=True) > 1, last, last - 1), True)  # one at least before it
        order = torch.argsort(kept.int(), dim=1, descending=True, stable=True)  # [B, L], the kept ones first
        return torch.where(kept, sequences, 0).gather(1, order)[:, : int(kept.sum(1).max())]

    @cached_property
    def _sampler(self) -> losses.NegativeSampler:
        return losses.NegativeSampler(self.sequences, self.model.num_items)

    def _patience_ended(self) -> bool:
        """Return whether the last `patience` validations did not raise the best one before them by `GAIN`."""
        patience, values = self.config.patience, [one.validation for one in self.log]
        if patience is None or len(values) <= patience:
            return False
        return max(values[-patience:]) <= (1 + GAIN) * max(values[:-patience])  # both may be 0

    def _until_validation(self) -> Validation:
        """Train to the next validation, measure, and keep what is needed to go on from there."""
        began, start = time.perf_counter(), self.step
        end = min(start + self.validation_steps, self.last_step)
        total = torch.zeros((), device=self.device)
        self.model.train()
        with torch.random.fork_rng(devices=self._gpus):
            torch.manual_seed(stream_seed(self.seed, "dropout of SASRec", start, self._processes.process_index))
            for step, sequences in zip(range(start, end), self.batches(start), strict=False):
                self.optimizer.param_groups[0]["lr"] = self._learning_rate(step)  # there is one group
                self.optimizer.zero_grad(set_to_none=True)
                total += self._backward(step, sequences)
                self.optimizer.step()
                self._average_weights(step)
        if not math.isfinite(loss := float(reduce(total, reduction="sum")) / (end - start)):
            raise InputError(f"SASRec's loss is {loss} before step {end}; lower learning_rate")
        if not all(bool(torch.isfinite(weights).all()) for weights in self.average.parameters()):
            raise InputError(f"SASRec's weights are not finite at step {end}; lower learning_rate")
        (measured,) = broadcast_object_list([self._validate(self.average) if IS_MAIN else 0.0])
        epochs = round(end / self.steps_per_epoch, 2)
        self.log.append(Validation(end, epochs, loss, measured, time.perf_counter() - began))
        if self.best_validation is self.log[-1]:
            self.best = deepcopy(self.average)
        if self._state_file is not None and IS_MAIN:
            self._save(self._state_file)
        return self.log[-1]

    def _backward(self, step: int, sequences: Tensor) -> Tensor:
        """Make the gradients of a step's batch, int64 [B, L], and return this process's part of the loss.

        Each process takes its part of the rows; the gradients are summed, so several do what one would do.
        """
        generator = torch.Generator().manual_seed(stream_seed(self.seed, "negatives of SASRec", step))
        whole = sequences
        if self.config.item_dropout:
            sequences = self._without_some_items(sequences, generator)
        rows = slice(self._processes.process_index, None, self._processes.num_processes)
        own = sequences[rows]  # [b, L]
        positions, of_all = (int((rows[:, 1:] > 0).sum()) for rows in (own, sequences))
        loss = torch.zeros((), device=self.device)
        if positions:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16):
                loss = self.training_loss(own, generator, whole[rows]) * (positions / of_all)
            loss.backward()
        if self._processes.num_processes > 1:
            for parameter in self.model.parameters():
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = reduce(gradient, reduction="sum")
        return loss.detach()

    @torch.no_grad()
    def _average_weights(self, step: int) -> None:
        """Move the average towards the weights; early on faster, so that it does not remember the first weights."""
        decay = min(self.config.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)

    def _learning_rate(self, step: int) -> float:
        rate = self.config.learning_rate
        if self.config.lr_scheduler_type == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * step / self.last_step))
        return rate

    def _save(self, path: Path) -> None:
        models = {"model": self.model, "average": self.average, "best": self.best}
        groups = {name: model.state_dict() for name, model in models.items()}
        groups |= {f"optimizer.{index}": state for index, state in self.optimizer.state_dict()["state"].items()}
        tensors = {f"{group}.{name}": tensor.contiguous() for group in groups for name, tensor in groups[group].items()}
        metadata = {"log": json.dumps([asdict(one) for one in self.log]), "settings": self._fingerprint()}
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
                log = [Validation(**row) for row in json.loads(file.metadata()["log"])]
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            logger.warning(
                "%s is damaged (%s) and now %s; training starts anew", path, error or "empty", set_aside(path)
            )
            return
        self.log = log
        self.model.load_state_dict(_under("model.", tensors))
        self.average.load_state_dict(_under("average.", tensors))
        self.best.load_state_dict(_under("best.", tensors))
        optimizer = self.optimizer.state_dict()
        parameters = optimizer["param_groups"][0]["params"]
        optimizer["state"] = {index: _under(f"optimizer.{index}.", tensors) for index in parameters}
        self.optimizer.load_state_dict(optimizer)
        logger.info("resuming after step %d of at most %d", self.step, self.last_step)

    def _fingerprint(self) -> str:
        training = {**self.config.values_of(SASRecTrainerConfig), "seed": self.seed}
        items = self.sequences.flat()[1]
        return json.dumps([self.model.settings(), training, len(self.sequences), int(items.sum(dtype="int64"))])


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
