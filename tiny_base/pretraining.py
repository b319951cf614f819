"""Pretraining of the tiny base model on conversations whose answers can be read off their prompts.

The loss is on the answers and on the ends of the model's turns; each token counts the same. Documents are sorted into
batches of about the same number of tokens. A batch is padded on the right, which a causal model does not see. On CPUs
several processes (torchrun, gloo) share the documents of a step and add up their gradients. On a GPU other processes
write the documents ahead of the training.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import distributed
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tiny_base.model import END_OF_TURN, START_OF_TURN
from tiny_base.recipe import PretrainingConfig
from twice_rec.files import atomic_path
from twice_rec.llm.tokens import encode_chat, encode_text
from twice_rec.prompts import Message
from twice_rec.sft.encoding import IGNORED

logger = logging.getLogger(__name__)

Encoded = tuple[list[int], list[int]]  # token ids, labels
Batch = tuple[torch.Tensor, torch.Tensor]  # token ids, labels [rows, longest]
STATE = "training_state.pt"

_ADAM_SHARE = 0.25  # of the learning rate, for embeddings and norms; at the whole rate 7 of 1,296 id tokens died


class Muon(torch.optim.Optimizer):
    """Momentum whose update of every matrix is made orthogonal (Jordan et al., 2024), at AdamW's scale of updates.

    torch's own Muon iterates in bfloat16, one matrix at a time, which takes ten times as long on CPUs without bfloat16
    instructions. This one takes float32, and all matrices of a shape together.
    """

    def __init__(
        self, parameters: Sequence[torch.nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95
    ):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all parameters once."""
        for group in self.param_groups:
            of_shape: dict[torch.Size, list[tuple[torch.Tensor, torch.Tensor]]] = {}
            for parameter in group["params"]:
                mean = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                mean.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(mean, group["momentum"])
                of_shape.setdefault(parameter.shape, []).append((parameter, update))
            for shape, pairs in of_shape.items():
                updates = orthogonalised(torch.stack([update for _, update in pairs])) * 0.2 * max(shape) ** 0.5
                for (parameter, _), update in zip(pairs, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])


def orthogonalised(matrices: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Bring the singular values of matrices [B, m, n] near 1 by a quintic Newton-Schulz iteration."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT  # [B, short, long]
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        square = x @ x.mT  # [B, short, short]
        x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
    return x if wide else x.mT


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], turns: Sequence[tuple[str, str]]
) -> Encoded:
    """Return token ids and labels of a prompt and (question, answer) turns; the first question is in the prompt."""
    ids = encode_chat(tokenizer, prompt)
    labels = [IGNORED] * len(ids)
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    for number, (question, answer) in enumerate(turns):
        if number:
            asked = f"\n{START_OF_TURN}user\n{question}{END_OF_TURN}\n{START_OF_TURN}model\n"
            tokens = encode_text(tokenizer, asked)
            ids += tokens
            labels += [IGNORED] * len(tokens)
        tokens = [*encode_text(tokenizer, answer), end]
        ids += tokens
        labels += tokens
    return ids, labels


def pretrain(
    model: PreTrainedModel, batch: Callable[[int], Sequence[Encoded]], config: PretrainingConfig, folder: Path
) -> list[tuple[int, float]]:
    """Train all weights on the model's device; goes on from the training state in `folder` if there is one.

    Args:
        batch: step -> documents. The step alone decides, so that a resumed run sees the same ones.
        folder: gets the training state every `save_steps`.

    Returns:
        (step, mean loss since the last entry) every hundred steps.
    """
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed" in name]
    optimizers = [
        Muon(matrices, lr=config.learning_rate, weight_decay=config.weight_decay),
        torch.optim.AdamW(others, lr=_ADAM_SHARE * config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    path, first, losses = folder / STATE, 0, list[tuple[int, float]]()
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=model.device)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, losses = state["step"], [tuple(entry) for entry in state["losses"]]
        logger.info("going on at step %d", first)
    model.train()
    recent, tokens, start = list[float](), 0, time.monotonic()
    ahead = _ahead(batch, first, config, model.device)
    for step, (batches, labelled, seen) in enumerate(ahead, start=first):
        for optimizer, share in zip(optimizers, (1.0, _ADAM_SHARE), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = share * config.learning_rate * schedule(step, config)
        loss = _added_up(model, _step(model, batches, labelled))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        recent.append(loss)
        tokens += seen
        if (step + 1) % 100 == 0 or step + 1 == config.steps:
            losses.append((step + 1, float(np.mean(recent))))
            rate = tokens / (time.monotonic() - start)
            logger.info("step %d of %d: loss %.4f, %.0f tokens/s", step + 1, config.steps, losses[-1][1], rate)
            recent = []
        if (step + 1) % config.save_steps == 0 and rank() == 0:
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
            with atomic_path(path) as temporary:
                torch.save({**state, "step": step + 1, "losses": losses}, temporary)
    model.eval()
    return losses


def schedule(step: int, config: PretrainingConfig) -> float:
    """Return the share of the learning rate: linear warm-up, plateau, linear decay to 0 over `decay_fraction`."""
    decay = max(1, math.ceil(config.decay_fraction * config.steps))
    return min(1.0, (step + 1) / config.warmup_steps, (config.steps - step) / decay)


class _Steps:
    """Step -> the batches of this process, and the numbers of labels and of tokens of all processes."""

    def __init__(self, documents: Callable[[int], Sequence[Encoded]], tokens: int):
        self._documents, self._tokens = documents, tokens

    def __getitem__(self, step: int) -> tuple[list[Batch], int, int]:
        documents = sorted(self._documents(step), key=lambda entry: len(entry[0]))
        labelled = sum(sum(label != IGNORED for label in labels) for _, labels in documents)
        processes = distributed.get_world_size() if distributed.is_initialized() else 1
        own = _in_batches(documents[rank() :: processes], self._tokens)
        return [_padded(part) for part in own], labelled, sum(len(ids) for ids, _ in documents)


def _ahead(
    documents: Callable[[int], Sequence[Encoded]], first: int, config: PretrainingConfig, device: torch.device
) -> Iterable[tuple[list[Batch], int, int]]:
    """Return the steps from `first` on, in order; for a GPU other processes prepare them."""
    gpu = device.type == "cuda"
    return torch.utils.data.DataLoader(
        _Steps(documents, sys.maxsize if gpu else max(1, config.tokens_per_step // 2)),  # type: ignore[arg-type]
        sampler=range(first, config.steps),
        batch_size=None,
        collate_fn=lambda step: step,
        num_workers=max(1, len(os.sched_getaffinity(0)) - 2) if gpu else 0,
        prefetch_factor=4 if gpu else None,
    )


def _step(model: PreTrainedModel, batches: Sequence[Batch], labelled: int) -> float:
    """Add the gradients of the loss over all labels of these batches, divided by `labelled`; return that loss."""
    total = torch.zeros((), device=model.device)
    for ids, labels in batches:
        labels = labels[:, 1:].to(model.device)  # [B, T - 1]
        hidden = model.model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state[:, :-1]  # [B, T - 1, H]
        wanted = labels != IGNORED  # [B, T - 1]
        logits = model.lm_head(hidden[wanted]).float()  # [number of labels, vocabulary]
        loss = torch.nn.functional.cross_entropy(logits, labels[wanted], reduction="sum") / labelled
        loss.backward()
        total += loss.detach()
    return float(total)


def rank() -> int:
    """Return the number of this process."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def _added_up(model: PreTrainedModel, loss: float) -> float:
    """Return the sum of the processes' losses; their gradients are added up in place."""
    if not distributed.is_initialized():
        return loss
    parameters = list(model.parameters())
    own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]  # None: a process without documents
    flat = torch.cat([torch.tensor([loss]), *(gradient.flatten() for gradient in own)])  # [1 + parameters]
    distributed.all_reduce(flat)
    for parameter, part in zip(parameters, flat[1:].split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)
    return float(flat[0])


def _padded(documents: Sequence[Encoded]) -> Batch:
    longest = max(len(ids) for ids, _ in documents)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in documents])
    return ids, torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in documents])


def _in_batches(documents: Sequence[Encoded], tokens: int) -> Iterator[list[Encoded]]:
    """Yield batches of documents, sorted by length, of at most about `tokens` each, padding included."""
    batch: list[Encoded] = []
    for document in documents:
        if batch and (len(batch) + 1) * len(document[0]) > tokens:
            yield batch
            batch = []
        batch.append(document)
    if batch:
        yield batch
