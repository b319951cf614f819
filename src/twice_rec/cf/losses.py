"""The losses of SASRec: each position predicts the next item, against the whole catalogue or a sample of it.

Shapes: T positions that predict, D = hidden_size, N items, n sampled negatives.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from twice_rec.errors import InputError
from twice_rec.item_sequences import ItemSequences


def softmax_loss(states: Tensor, targets: Tensor, item_embedding: Tensor) -> Tensor:
    """Return the cross-entropy over the whole catalogue.

    Takes states [T, D], target items 1..N [T], and item embeddings [N + 1, D], whose row 0 is padding.
    """
    return F.cross_entropy(states @ item_embedding[1:].T, targets - 1)


class NegativeSampler:
    """Draws items for the sampled softmax: half of them uniformly, half in proportion to their training counts.

    Uniform draws alone leave popular items too high for long, popular ones alone say nothing of the long tail.
    """

    def __init__(self, sequences: ItemSequences, num_items: int):
        _, items = sequences.flat()
        counts = np.bincount(items, minlength=num_items + 1)[1:]  # [N]
        self._cumulative = torch.from_numpy(counts.cumsum())  # [N]
        probability = 0.5 / num_items + 0.5 * counts / counts.sum()  # [N]
        self.log_probability = torch.from_numpy(np.log(probability)).float()  # [N], of one draw

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Return items 1..N, int64 [count], with replacement."""
        num_items = len(self._cumulative)
        uniform = torch.randint(1, num_items + 1, (count - count // 2,), generator=generator)
        at = torch.randint(int(self._cumulative[-1]), (count // 2,), generator=generator)
        return torch.cat([uniform, 1 + torch.searchsorted(self._cumulative, at, right=True)])


def sampled_softmax_loss(
    states: Tensor, targets: Tensor, negatives: Tensor, log_probability: Tensor, item_embedding: Tensor
) -> Tensor:
    """Return the cross-entropy of the target against negatives that all positions share, corrected for their drawing.

    A negative's logit is lowered by the logarithm of how often it is expected among n draws, so that the sum over the
    sample estimates the sum over the catalogue (Bengio and Senecal, 2008). A draw of the position's own target is left
    out. `negatives` is int64 [n], `log_probability` float [n] that of one draw; see `softmax_loss`.
    """
    expected = log_probability + math.log(len(negatives))  # [n]
    logits = states @ F.embedding(negatives, item_embedding).T - expected  # [T, n]
    logits = logits.masked_fill(negatives == targets[:, None], -torch.inf)
    positive = (states * F.embedding(targets, item_embedding)).sum(-1)  # [T]
    return (torch.cat([positive[:, None], logits], dim=1).logsumexp(1) - positive).mean()


def sampled_loss(states: Tensor, targets: Tensor, negatives: Tensor, item_embedding: Tensor, beta: float) -> Tensor:
    """Return the binary cross-entropy of the target and its n sampled negatives, their sum averaged over positions.

    With beta < 1 it is gBCE (Petrov and Macdonald, 2023): the target's probability is raised to the power beta, which
    undoes the overconfidence of sampling. beta = 1 is plain BCE. `negatives` is int64 [T, n]; see `softmax_loss`.
    """
    # F.embedding, since the backward pass of plain indexing sorts and is many times slower on a CPU.
    positive = (states * F.embedding(targets, item_embedding)).sum(-1)  # [T]
    negative = (F.embedding(negatives, item_embedding) @ states[:, :, None]).squeeze(-1)  # [T, n]
    total = beta * F.softplus(-positive) + F.softplus(negative).sum(-1)  # [T]
    return total.mean()


def gbce_beta(num_negatives: int, num_items: int, t: float) -> float:
    """Return gBCE's exponent alpha (t (1 - 1/alpha) + 1/alpha); alpha is the share of the other items sampled.

    As many negatives as there are other items, or more, leave nothing to calibrate: alpha is at most 1, and so is beta.
    """
    alpha = min(1.0, num_negatives / (num_items - 1))
    return alpha * (t * (1 - 1 / alpha) + 1 / alpha)


def sample_negatives(
    sequences: Tensor, num_negatives: int, num_items: int, generator: torch.Generator, positions: int | None = None
) -> Tensor:
    """Draw uniform items that do not occur in the same row: int64 [B, L] (0 is padding) -> int64 [B, positions, n].

    Args:
        positions: per row that get negatives; None for L - 1.

    Raises:
        InputError: if a sequence holds the whole catalogue.
    """
    batch, length = sequences.shape
    positions = length - 1 if positions is None else positions
    may_hold_all = sequences[(sequences > 0).sum(1) >= num_items]  # with repeats they need not
    if any(len({*row} - {0}) >= num_items for row in may_hold_all.tolist()):
        raise InputError(f"a sequence holds all {num_items} items, which leaves no negative; use loss: softmax")
    negatives = torch.randint(1, num_items + 1, (batch, positions * num_negatives), generator=generator)
    # A small catalogue is looked up in a [B, N + 1] table of the user's own items, a large one compared item by item.
    own = torch.zeros(batch, num_items + 1, dtype=torch.bool).scatter_(1, sequences, True) if num_items < 4096 else None
    while True:
        clash = own.gather(1, negatives) if own is not None else (negatives[:, :, None] == sequences[:, None]).any(-1)
        if not (count := int(clash.sum())):
            return negatives.view(batch, positions, num_negatives)
        negatives[clash] = torch.randint(1, num_items + 1, (count,), generator=generator)
