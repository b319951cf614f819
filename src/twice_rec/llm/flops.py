"""How many floating-point operations training takes: the arithmetic of the model, not what a program happens to do.

Counted are matrix products, two operations for each multiplication with its addition. A forward uses each weight once
per token. The backward of a frozen weight is one more such product, that of a trained one two. An adapter's own
products, below 1 %, norms and activations are left out, and so is what gradient checkpointing computes again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel

from twice_rec.llm.attention import layer_windows


@dataclass(frozen=True, slots=True)
class Work:
    """The tokens of rows: how many there are, how many are predicted, and how many pairs attention looks at.

    Args:
        pairs: sliding window (None for full attention) -> number of (query, key) pairs in one layer.
    """

    tokens: int
    predicted: int
    pairs: dict[int | None, int]

    @classmethod
    def of(cls, segments: Iterable[tuple[int, int]], predicted: int, windows: Iterable[int | None]) -> Work:
        """Count from each segment's (tokens seen before it, its own tokens), see `varlen`."""
        parts = np.array(list(segments), dtype=np.int64).reshape(-1, 2)
        tokens = int(parts[:, 1].sum())
        pairs = {window: int(sum(_pairs(*part, window) for part in parts.tolist())) for window in set(windows)}
        return cls(tokens, predicted, pairs)


def _pairs(seen: int, own: int, window: int | None) -> int:
    """Return the sum of min(position, window) over the positions seen + 1, ..., seen + own."""
    full = own if window is None else min(max(window - seen, 0), own)  # tokens that see all before them
    return full * seen + full * (full + 1) // 2 + (own - full) * (window or 0)


def used_matrices(model: PreTrainedModel) -> list[tuple[int, int]]:
    """Return the two sides of each matrix of the decoder layers that a token goes through, without an adapter's.

    Raises:
        ValueError: if there are experts, and the configuration does not say how many of them a token goes through.
    """
    sides, config = [], model.config.get_text_config()
    chosen = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None)
    for name, parameter in model.base_model.layers.named_parameters():
        if "lora_" in name or name.endswith("bias"):
            continue
        if parameter.ndim == 3:  # [experts, one side, other side]
            if not isinstance(chosen, int):
                raise ValueError(f"it has experts, {name}, and its config.json no num_experts_per_tok")
            sides += [(parameter.shape[1], parameter.shape[2])] * min(chosen, parameter.shape[0])
        elif parameter.ndim == 2:
            sides.append((parameter.shape[0], parameter.shape[1]))
    return sides


@dataclass(frozen=True, slots=True)
class ModelArithmetic:
    """What decides a model's operations.

    Args:
        layers: weights of all decoder layers' matrices; of experts, those that a token goes through.
        head: weights of the matrix that gives the logits.
        attention: numbers in all query heads of a layer.
        windows: sliding window of each layer, None for full attention.
    """

    layers: int
    head: int
    attention: int
    windows: tuple[int | None, ...]

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelArithmetic:
        """Read a model, also one without values, on the meta device; an adapter's weights do not count."""
        config = model.config.get_text_config()
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        windows = layer_windows(config)
        kinds = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
        return cls(
            sum(inputs * outputs for inputs, outputs in used_matrices(model)),
            model.get_output_embeddings().weight.numel(),
            config.num_attention_heads * head_size,
            tuple(windows[kind] for kind in kinds),
        )

    def forward(self, work: Work) -> int:
        """Return the operations of a forward."""
        looked_at = sum(work.pairs[window] for window in self.windows)
        return 2 * (self.layers * work.tokens + self.head * work.predicted) + 4 * self.attention * looked_at

    def training(self, work: Work, adapter: bool = True) -> int:
        """Return the operations of a forward and backward, with all weights but an adapter's frozen, or all trained."""
        weights = 2 * (self.layers * work.tokens + self.head * work.predicted)
        looked_at = sum(work.pairs[window] for window in self.windows)
        return (2 if adapter else 3) * weights + 3 * 4 * self.attention * looked_at
