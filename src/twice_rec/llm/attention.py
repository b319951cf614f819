"""Kinds of layers, and `attn_implementation: chunked_sdpa`: sdpa that skips what its mask hides, for CPUs.

torch's sdpa computes all of a masked square, although a causal mask hides half of it, a sliding window more, and a tree
of continuations most of what follows the prompt. Here queries are taken in chunks, each with the keys that one of its
queries sees; in bfloat16 those at the beginning that see all before them, a prompt, go without a mask, since masks
slow its gradients down. Heads of grouped keys are not copied. The values are those of sdpa. Importing this module
registers the name with transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from twice_rec.llm.recipe import CHUNKED_SDPA

_CHUNK = 128  # queries; training documents of 1,240 tokens is 20 % faster than with sdpa (with 256: 10 %)
_SPARSE = 1.5  # times as many keys from the first to the last that is seen as are seen
_FEW = 16  # queries; sdpa takes one bfloat16 query of 9 heads over 1,900 keys 5 times as long as 3 of 3 heads


def chunked_sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return a decoder's attention, [B, L, H, D], and no weights; the arguments are those that transformers passes.

    Args:
        query: [B, H, L, D]; key and value: [B, key heads, S, D].
        attention_mask: bool [B, 1, L, S]; if L = S, no token sees a later one. None: all earlier ones are seen.
    """
    length, options = query.shape[2], {"dropout_p": dropout, "scale": scaling}
    if attention_mask is None:
        causal = {"is_causal": length > 1, "enable_gqa": True}
        return scaled_dot_product_attention(query, key, value, **causal, **options).transpose(1, 2).contiguous(), None
    if length <= _FEW:
        return _few_queries(query, key, value, attention_mask, options).transpose(1, 2).contiguous(), None
    parts, start = [], 0
    if query.dtype != torch.float32 and (start := _causal_beginning(attention_mask)):
        beginning = (states[:, :, :start] for states in (query, key, value))
        parts.append(scaled_dot_product_attention(*beginning, is_causal=True, enable_gqa=True, **options))
    for first in range(start, length, _CHUNK):
        mask = attention_mask[:, :, first : first + _CHUNK]  # [B, 1, chunk, S]
        seen = mask.any(dim=2).flatten(0, 1).any(dim=0).nonzero()[:, 0]  # [keys]
        if len(seen) == 0:  # padding
            seen = seen.new_zeros(1)
        span = slice(int(seen[0]), int(seen[-1]) + 1)
        keys = span if span.stop - span.start < _SPARSE * len(seen) else seen  # a copy costs, too
        chunk = (query[:, :, first : first + _CHUNK], key[:, :, keys], value[:, :, keys])
        parts.append(scaled_dot_product_attention(*chunk, attn_mask=mask[..., keys], enable_gqa=True, **options))
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1), None  # [B, L, H, D]


def _few_queries(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, options: dict[str, Any]) -> Tensor:
    """Take the heads that share keys as queries of one head."""
    (batch, heads, length, size), groups = query.shape, key.shape[1]  # values may have another size
    mask = mask[:, :, None].expand(-1, -1, heads // groups, -1, -1).flatten(2, 3)  # [B, 1, H / groups * L, S]
    together = query.reshape(batch, groups, heads // groups * length, size)
    attended = scaled_dot_product_attention(together, key, value, attn_mask=mask, **options)
    return attended.reshape(batch, heads, length, value.shape[-1])


def _causal_beginning(mask: Tensor) -> int:
    """Return how many of the first queries, in all rows, see all before them."""
    length = mask.shape[2]
    if length != mask.shape[3]:
        return 0
    order = torch.arange(length, device=mask.device)
    differs = (mask != (order <= order[:, None])).any(dim=-1).flatten(0, 1).any(dim=0)  # [L]
    return int(differs.int().argmax()) if bool(differs.any()) else length


def layer_windows(config: Any) -> dict[str, int | None]:
    """Return kind of layer -> its sliding window, None for full attention; the only kind is `""` if it has no kinds.

    Raises:
        ValueError: if no mask here fits a kind.
    """
    windows = {"full_attention": None, "sliding_attention": getattr(config, "sliding_window", None)}
    kinds = set(getattr(config, "layer_types", None) or [])
    if unknown := kinds - windows.keys():
        raise ValueError(f"no mask for layers of the kind {', '.join(sorted(unknown))}")
    if not kinds:
        return {"": windows["sliding_attention"]}
    return {kind: windows[kind] for kind in windows if kind in kinds or kind == "full_attention"}


AttentionInterface.register(CHUNKED_SDPA, chunked_sdpa)
AttentionMaskInterface.register(CHUNKED_SDPA, sdpa_mask)
