"""Many continuations of one prompt, the prompt computed once: their log-probabilities, and batches to train on.

All continuations stand behind the prompt in one row, [prompt, continuation 1, ..., continuation K]. Positions restart
after the prompt for each, and the attention mask lets a continuation see the prompt and itself only, so every token
gets exactly the value it would have in a row of its own. A row may hold several such groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def continuation_log_probabilities(
    model: PreTrainedModel, prompt: Sequence[int], continuations: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Log-probability of every token of every continuation, given the prompt and the tokens before it.

    Args:
        model: a causal language model with full or sliding-window attention (sdpa or eager).
        prompt: token ids, at least one.
        continuations: K sequences of token ids, each at least one long.

    Returns:
        K float32 tensors, one value a token, on the model's device; with gradients where the caller allows them.
    """
    if not prompt or not all(continuations):
        raise ValueError("the prompt and every continuation need at least one token")
    device = model.device
    lengths = [len(continuation) for continuation in continuations]
    start = len(prompt)
    ids = torch.tensor([*prompt, *(token for c in continuations for token in c)], device=device)
    positions = torch.cat([torch.arange(start), *(torch.arange(start, start + n) for n in lengths)]).to(device)
    segment = torch.repeat_interleave(torch.arange(len(lengths) + 1), torch.tensor([start, *lengths])).to(device)
    offsets = torch.tensor([start, *lengths[:-1]]).cumsum(0).tolist()
    # The logits that predict a continuation stand at the prompt's last token and at all its own tokens but the last.
    needed = torch.cat(
        [torch.tensor([start - 1, *range(offset, offset + n - 1)]) for offset, n in zip(offsets, lengths, strict=True)]
    ).to(device)
    logits = model(
        input_ids=ids[None],
        position_ids=positions[None],
        attention_mask=attention_masks(model, segment, torch.zeros_like(segment), positions),
        logits_to_keep=needed,
        use_cache=False,
    ).logits[0]
    values = torch.log_softmax(logits.float(), dim=-1).gather(1, ids[start:, None]).squeeze(1)
    return list(values.split(lengths))


def attention_masks(
    model: PreTrainedModel, segment: Tensor, prefix: Tensor, positions: Tensor
) -> Tensor | dict[str, Tensor]:
    """The mask of each kind of layer, [1, 1, L, L]: a token sees its own segment and its prefix, never the future.

    Args:
        segment: int64 [L], which prompt or continuation a token belongs to.
        prefix: int64 [L], the segment of its prompt; its own for a prompt's tokens.
        positions: int64 [L], for sliding windows.

    Returns:
        One mask, or one a kind of layer where the model's configuration tells them apart.
    """
    config = model.config.get_text_config()
    order = torch.arange(len(segment), device=segment.device)
    seen = (order[None, :] <= order[:, None]) & (
        (segment[None, :] == segment[:, None]) | (segment[None, :] == prefix[:, None])
    )
    kinds = set(getattr(config, "layer_types", None) or [])
    if not kinds:
        return _as_mask(model, seen)
    masks = Masks({"full_attention": seen})
    if "sliding_attention" in kinds:
        masks["sliding_attention"] = seen & (positions[:, None] - positions[None, :] < config.sliding_window)
    if unknown := kinds - masks.keys():
        raise ValueError(f"no mask for layers of the kind {', '.join(sorted(unknown))}")
    return Masks({kind: _as_mask(model, mask) for kind, mask in masks.items()})


class Masks(dict):
    """Kind of layer -> mask."""

    def sum(self) -> Tensor:
        """Number of tokens, which TRL's log takes from the sum of a plain attention mask."""
        return torch.tensor(next(iter(self.values())).shape[-1])


def _as_mask(model: PreTrainedModel, seen: Tensor) -> Tensor:
    implementation = model.config._attn_implementation
    if implementation == "sdpa":
        return seen[None, None]
    if implementation == "eager":
        return torch.zeros(seen.shape, dtype=model.dtype, device=seen.device).masked_fill(
            ~seen, torch.finfo(model.dtype).min
        )[None, None]
    raise ValueError(f"attention {implementation!r} takes no mask of its own; use sdpa or eager")


class SharedPrefixCollator:
    """Puts groups of rows that share a beginning into one row of a batch; the loss is that of the rows one by one.

    Args:
        model: sdpa or eager attention.
    """

    def __init__(self, model: PreTrainedModel):
        self._model = model

    def __call__(self, groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Groups as `llm.encoding.share_prefixes` makes them -> `input_ids`, `labels`, `position_ids`, masks."""
        segment, prefix, positions, first = [], [], [], 0
        for group in groups:
            start, *lengths = group["lengths"]
            positions += [*range(start), *(p for n in lengths for p in range(start, start + n))]
            for number, length in enumerate(group["lengths"]):
                segment += [first + number] * length
            prefix += [first] * (start + sum(lengths))
            first += len(group["lengths"])
        masks = attention_masks(self._model, *map(torch.tensor, (segment, prefix, positions)))
        flat = {name: [token for group in groups for token in group[name]] for name in ("input_ids", "labels")}
        rows = {**flat, "position_ids": positions}
        return {**{name: torch.tensor([values]) for name, values in rows.items()}, "attention_mask": masks}
