"""SASRec: item and position embeddings, causal self-attention blocks, dot products with the item embeddings.

The architecture is the release's: GELU, post-LayerNorm, one shared item embedding for input and
output. Pre-LayerNorm is a setting. Sequences are padded on the right with 0, so that a causal mask alone keeps padding
out of every real position. Everything but the attention itself works on the real positions only, laid end to end: with
histories of 5 to 18 items that is a third of the padded work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class SasRecSettings:
    """Shape of the model; see `config.SasrecRecipe`."""

    num_items: int
    hidden_size: int
    inner_size: int
    num_layers: int
    num_heads: int
    dropout: float
    norm: Literal["post", "pre"]
    max_length: int


class Block(nn.Module):
    """Causal self-attention, then a feed-forward layer, each with a residual connection and LayerNorm."""

    def __init__(self, settings: SasRecSettings):
        super().__init__()
        width = settings.hidden_size
        self.heads = settings.num_heads
        self.pre = settings.norm == "pre"
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.inner = nn.Linear(width, settings.inner_size)
        self.outer = nn.Linear(settings.inner_size, width)
        self.attention_norm = nn.LayerNorm(width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, x: Tensor, real: Tensor, shape: tuple[int, int]) -> Tensor:
        """Real positions end to end, [T, D] -> [T, D].

        Args:
            real: int64 [T], where each stands in the flattened [B * L] batch.
            shape: (B, L).
        """
        if self.pre:
            x = x + self.dropout(self._attend(self.attention_norm(x), real, shape))
            return x + self.dropout(self._feed_forward(self.feed_forward_norm(x)))
        x = self.attention_norm(x + self.dropout(self._attend(x, real, shape)))
        return self.feed_forward_norm(x + self.dropout(self._feed_forward(x)))

    def _attend(self, x: Tensor, real: Tensor, shape: tuple[int, int]) -> Tensor:
        batch, length = shape
        width = x.shape[-1]
        padded = x.new_zeros(batch * length, 3 * width).index_copy(0, real, self.query_key_value(x))
        q, k, v = padded.view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        dropout = self.dropout.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        return self.output(mixed.transpose(1, 2).reshape(batch * length, width).index_select(0, real))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.outer(self.dropout(F.gelu(self.inner(x))))


class SasRec(nn.Module):
    """The sequence model. Items are indices 1..N, 0 is padding."""

    def __init__(self, settings: SasRecSettings):
        super().__init__()
        self.settings = settings
        self.item_embedding = nn.Embedding(settings.num_items + 1, settings.hidden_size, padding_idx=0)
        self.position_embedding = nn.Embedding(settings.max_length, settings.hidden_size)
        self.input_norm = nn.LayerNorm(settings.hidden_size)
        self.dropout = nn.Dropout(settings.dropout)
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.num_layers))
        self.final_norm = nn.LayerNorm(settings.hidden_size) if settings.norm == "pre" else nn.Identity()
        self.apply(_initialise)

    def forward(self, items: Tensor) -> Tensor:
        """States after every real item, end to end: int64 [B, L], 0 behind the shorter sequences -> float [T, D]."""
        real = (items.reshape(-1) > 0).nonzero().squeeze(1)
        embedded = self.item_embedding(items.reshape(-1)[real]) + self.position_embedding(real % items.shape[1])
        x = self.dropout(embedded if self.settings.norm == "pre" else self.input_norm(embedded))
        for block in self.blocks:
            x = block(x, real, tuple(items.shape))
        return self.final_norm(x)

    def user_states(self, histories: Sequence[Sequence[int]]) -> Tensor:
        """The state after each history's last item: float [B, D]. Only the most recent `max_length` items count.

        Raises:
            ValueError: for an empty history.
        """
        if not all(len(history) for history in histories):
            raise ValueError("SASRec needs at least one item of history")
        recent = [history[-self.settings.max_length :] for history in histories]
        device = self.item_embedding.weight.device
        last = torch.tensor([len(history) for history in recent], device=device).cumsum(0) - 1
        return self(pad_right(recent).to(device))[last]


def _initialise(module: nn.Module) -> None:
    """Normal weights with standard deviation 0.02, zero biases and padding (as BERT, and as RecBole)."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.weight[module.padding_idx].zero_()


def pad_right(sequences: Sequence[Sequence[int]]) -> Tensor:
    """int64 [B, L] with 0 behind the shorter sequences; L is the longest one's length."""
    length = max(len(sequence) for sequence in sequences)
    return torch.tensor([[*sequence, *[0] * (length - len(sequence))] for sequence in sequences], dtype=torch.int64)
