"""`attn_implementation: varlen`: attention over many sequences in one row, without padding and without a mask, on GPUs.

A row is cut into segments: a prompt, and then each new part of a tree of continuations (see `shared_prefix`), or simply
one sequence after another. The tokens of a segment attend to its path, the tokens before it in its branch and its own.
Keys and values of all paths are gathered and given to torch's flash attention for sequences of various lengths, which
aligns the ends of queries and keys; so causality, positions and sliding windows come out as in a row of its own.
Everything but attention is computed once per token. Importing this module registers the name with transformers.

Shapes: L tokens of the row, S segments, N keys of all paths, H query heads, h key heads, D their size.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import embedding_bag, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from twice_rec.errors import InputError
from twice_rec.llm.attention import layer_windows
from twice_rec.llm.recipe import VARLEN

# torch 2.12 has both arguments; before it, the kernel itself is called
_PUBLIC = {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys()

_PREFIX = "segment_"  # of their names among a forward's keywords
_SDPA = "use attn_implementation sdpa"
_DROPOUT = re.compile(r"^att(n|ention).*_p?drop")  # its names in configurations


class Segments(NamedTuple):
    """How a row is cut; tensors on the row's device.

    Args:
        queries, keys: int32 [S + 1], where each segment's tokens and each path's keys begin; the last is the end.
        places: int64 [N], the token in the row that each key is of; None if paths are the segments themselves.
        uses: int64 [N], the keys in the order of their tokens; None as places.
        first_uses: int64 [L], where each token's keys begin in `uses`; None as places.
        longest: number of tokens of the longest segment, of keys of the longest path.
    """

    queries: Tensor
    keys: Tensor
    places: Tensor | None
    uses: Tensor | None
    first_uses: Tensor | None
    longest: tuple[int, int]

    @classmethod
    def of(cls, parts: Iterable[tuple[Sequence[int], int]], device: torch.device | str = "cpu") -> Segments:
        """Build from (the places seen before it, its number of tokens) of each segment, in the order of the row."""
        tokens, paths, start = list[int](), list[np.ndarray](), 0
        for seen, count in parts:
            if count:
                tokens.append(count)
                paths.append(np.concatenate([np.asarray(seen, dtype=np.int64), np.arange(start, start + count)]))
            start += count
        places, lengths = np.concatenate(paths), [len(path) for path in paths]
        first_uses = np.concatenate([[0], np.bincount(places, minlength=start).cumsum()[:-1]])
        ends = (np.cumsum([0, *tokens], dtype=np.int32), np.cumsum([0, *lengths], dtype=np.int32))
        gathered = (places, places.argsort(kind="stable"), first_uses) if len(places) > start else (None, None, None)
        columns = (None if c is None else torch.from_numpy(c).to(device) for c in (*ends, *gathered))
        return cls(*columns, (max(tokens), max(lengths)))  # type: ignore[arg-type]

    def keywords(self) -> dict[str, Any]:
        """Return them as a model's forward takes them, one by one, since trainers move only plain values to a GPU."""
        return {_PREFIX + name: value for name, value in self._asdict().items() if value is not None}

    @classmethod
    def among(cls, keywords: Mapping[str, Any]) -> Segments | None:
        """Return those among the keywords that reach a layer: ours, or TRL's of packed rows; None if there are none."""
        if _PREFIX + "queries" in keywords:
            return cls(*(keywords.get(_PREFIX + name) for name in cls._fields))  # type: ignore[arg-type]
        if "cu_seq_lens_q" in keywords:
            ends, longest = keywords["cu_seq_lens_q"], int(keywords["max_length_q"])
            return cls(ends, ends, None, None, None, (longest, longest))
        return None


@torch.library.custom_op("twice_rec::gather_rows", mutates_args=())
def gather_rows(values: Tensor, places: Tensor, uses: Tensor, first_uses: Tensor) -> Tensor:
    """Return `values[places]`, [N, ...] of [L, ...]; gradients of a token's copies are added up in a fixed order."""
    return values.index_select(0, places)


@gather_rows.register_fake
def _(values: Tensor, places: Tensor, uses: Tensor, first_uses: Tensor) -> Tensor:
    return values.new_empty((places.shape[0], *values.shape[1:]))


@torch.library.custom_op("twice_rec::add_rows", mutates_args=())
def _add_rows(gradient: Tensor, uses: Tensor, first_uses: Tensor) -> Tensor:
    summed = embedding_bag(uses, gradient.flatten(1), first_uses, mode="sum")  # [L, all else]
    return summed.view(-1, *gradient.shape[1:])


@_add_rows.register_fake
def _(gradient: Tensor, uses: Tensor, first_uses: Tensor) -> Tensor:
    return gradient.new_empty((first_uses.shape[0], *gradient.shape[1:]))


def _keep_uses(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[2:])


def _gradient_of_values(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    return _add_rows(gradient.contiguous(), *ctx.saved_tensors), None, None, None


gather_rows.register_autograd(_gradient_of_values, setup_context=_keep_uses)


def varlen_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return a decoder's attention, [1, L, H, D], and no weights; the arguments are those that transformers passes.

    Without segments (see `Segments.among`), as when a model samples, this is sdpa.

    Args:
        query: [1, H, L, D]; key and value: [1, h, L, D].

    Raises:
        InputError: if the mask is `unread_mask`, so that the layer was to have segments; or if there is dropout.
    """
    segments = Segments.among(others)
    if segments is None:
        if attention_mask is not None and attention_mask.shape[-2] < query.shape[-2]:
            raise InputError(f"attn_implementation {VARLEN}: no segments reach the model's attention; {_SDPA}")
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **others)
    if dropout:
        raise InputError(f"attn_implementation {VARLEN} has no dropout, the model's attention has; {_SDPA}")
    queries, keys, values = (states[0].transpose(0, 1) for states in (query, key, value))  # [L, heads, D]
    if segments.places is not None:
        how = (segments.places, segments.uses, segments.first_uses)
        keys, values = gather_rows(keys, *how), gather_rows(values, *how)  # [N, h, D]
    attend = flash_segments if query.is_cuda else sdpa_segments
    return attend(queries, keys, values, segments, scaling, sliding_window)[None], None  # [1, L, H, D]


def flash_segments(
    queries: Tensor, keys: Tensor, values: Tensor, segments: Segments, scale: float | None, window: int | None
) -> Tensor:
    """Return attention [L, H, D] by the flash kernel; the shapes are those of `varlen_attention` after the gather."""
    ends, left = (segments.queries, segments.keys, *segments.longest), -1 if window is None else window - 1
    if _PUBLIC:
        return varlen_attn(queries, keys, values, *ends, scale=scale, window_size=(left, 0), enable_gqa=True)
    kernel = torch.ops.aten._flash_attention_forward
    return kernel(queries, keys, values, *ends, 0.0, True, False, scale=scale, window_size_left=left)[0]


@torch.compiler.disable
def sdpa_segments(
    queries: Tensor, keys: Tensor, values: Tensor, segments: Segments, scale: float | None, window: int | None
) -> Tensor:
    """Do what `flash_segments` does, one segment after another: the reference, for CPUs and any dtype."""
    parts, ends = [], zip(segments.queries.tolist(), segments.keys.tolist(), strict=True)
    start, first_key = next(ends)
    for end, last_key in ends:
        q, k = end - start, last_key - first_key
        age = torch.arange(k - q, k, device=queries.device)[:, None] - torch.arange(k, device=queries.device)  # [q, k]
        seen = (age >= 0) if window is None else (age >= 0) & (age < window)
        of_one = (queries[start:end], keys[first_key:last_key], values[first_key:last_key])
        heads_first = (states.transpose(0, 1)[None] for states in of_one)  # [1, heads, q or k, D]
        attended = scaled_dot_product_attention(*heads_first, attn_mask=seen, scale=scale, enable_gqa=True)
        parts.append(attended[0].transpose(0, 1))  # [q, H, D]
        start, first_key = end, last_key
    return torch.cat(parts)


def unread_mask(length: int, device: torch.device) -> Tensor:
    """Return the mask that goes with segments, which no layer reads: bool [1, 1, 1, L], of one query for L tokens."""
    return torch.ones((1, 1, 1, length), dtype=torch.bool, device=device)


def _drops(values: Mapping[str, Any]) -> bool:
    """Return whether a configuration, or a part of it, has dropout in its attention, which has several names."""
    parts = (_drops(value) for value in values.values() if isinstance(value, Mapping))
    return any(value for name, value in values.items() if _DROPOUT.search(str(name))) or any(parts)


def check_varlen(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device | str) -> None:
    """Look whether the kernel takes a model.

    Raises:
        InputError: if it does not, with the setting that works.
    """
    config, device = config.get_text_config(), torch.device(device)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    of_card = f"needs a GPU of compute capability 8.0 (A100) or later, found {'.'.join(map(str, capability))}"
    found = [
        (device.type != "cuda", "needs a GPU that torch can use", "chunked_sdpa"),
        (torch.version.hip is None and capability < (8, 0), of_card, "sdpa"),
        (dtype not in (torch.bfloat16, torch.float16), f"takes bfloat16 and float16, found dtype {dtype}", "sdpa"),
        (head > 256 or head % 8 != 0, f"takes heads of 8, 16, ... 256 numbers, the model's have {head}", "sdpa"),
        (_drops(config.to_dict()), "has no dropout, the model's attention has", "sdpa"),
        (bool(getattr(config, "attn_logit_softcapping", None)), "has no soft cap, the model's attention has", "eager"),
        (config.model_type == "gpt_oss", "has no sinks, the model's attention has", "eager"),
    ]
    for wrong, what, instead in found:
        if wrong:
            raise InputError(f"attn_implementation {VARLEN} {what}; use attn_implementation {instead}")
    try:
        layer_windows(config)
    except ValueError as error:
        raise InputError(f"attn_implementation {VARLEN} does not take this model: {error}; use sdpa") from error


AttentionInterface.register(VARLEN, varlen_attention)
AttentionMaskInterface.register(VARLEN, sdpa_mask)
