"""`attn_implementation: chunked_sdpa`: sdpa that leaves out what its mask leaves out, for CPUs.

torch's sdpa computes all of a masked square, although a causal mask hides half of it, and a sliding window more. Here
the queries are taken a chunk at a time, each with the keys between the first and the last that one of its queries may
see. Nor are the heads of grouped keys copied for each of their queries, as transformers does where there is a mask. The
values are those of sdpa. Import this module before a model is told to use it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

CHUNKED = "chunked_sdpa"

_CHUNK = 128  # queries; the base model trains 20 % faster than with sdpa, with 256 10 % (documents of 1,240 tokens)


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
    """Attention of a decoder as transformers calls it.

    Args:
        query: [B, heads, L, size]; key and value: [B, key heads, S, size].
        attention_mask: bool [B, 1, L, S], where L = S no token sees a later one; None: all earlier ones are seen.

    Returns:
        [B, L, heads, size], and no weights.
    """
    length = query.shape[2]

    def attend(queries: slice, keys: slice) -> Tensor:
        return scaled_dot_product_attention(
            query[:, :, queries],
            key[:, :, keys],
            value[:, :, keys],
            attn_mask=None if attention_mask is None else attention_mask[:, :, queries, keys],
            dropout_p=dropout,
            scale=scaling,
            is_causal=attention_mask is None and length > 1,
            enable_gqa=True,
        ).transpose(1, 2)

    if attention_mask is None or length != key.shape[2] or length <= _CHUNK:
        return attend(slice(None), slice(None)).contiguous(), None
    chunks = []
    for start in range(0, length, _CHUNK):
        end = min(length, start + _CHUNK)
        seen = attention_mask[:, :, start:end, :end].any(dim=2).flatten(0, 1).any(dim=0)
        chunks.append(attend(slice(start, end), slice(int(seen.int().argmax()), end)))
    return torch.cat(chunks, dim=1), None


AttentionInterface.register(CHUNKED, chunked_sdpa)
AttentionMaskInterface.register(CHUNKED, sdpa_mask)
