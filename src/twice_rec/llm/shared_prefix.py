"""Log-probabilities of many continuations of one prompt, the prompt computed once.

All continuations stand behind the prompt in one row, [prompt, continuation 1, ..., continuation K]. Positions restart
after the prompt for each, and the attention mask lets a continuation see the prompt and itself only, so every token
gets exactly the value it would have in a row of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

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
        attention_mask=_masks(model, segment, positions),
        logits_to_keep=needed,
        use_cache=False,
    ).logits[0]
    values = torch.log_softmax(logits.float(), dim=-1).gather(1, ids[start:, None]).squeeze(1)
    return list(values.split(lengths))


def _masks(model: PreTrainedModel, segment: Tensor, positions: Tensor) -> Tensor | dict[str, Tensor]:
    """The mask of each kind of layer, [1, 1, L, L]: own segment and the prompt (segment 0), never the future."""
    config = model.config.get_text_config()
    order = torch.arange(len(segment), device=segment.device)
    seen = (order[None, :] <= order[:, None]) & ((segment[None, :] == segment[:, None]) | (segment[None, :] == 0))
    kinds = set(getattr(config, "layer_types", None) or [])
    if not kinds:
        return _as_mask(model, seen)
    masks = {"full_attention": seen}
    if "sliding_attention" in kinds:
        masks["sliding_attention"] = seen & (positions[:, None] - positions[None, :] < config.sliding_window)
    if unknown := kinds - masks.keys():
        raise ValueError(f"no mask for layers of the kind {', '.join(sorted(unknown))}")
    return {kind: _as_mask(model, mask) for kind, mask in masks.items()}


def _as_mask(model: PreTrainedModel, seen: Tensor) -> Tensor:
    implementation = model.config._attn_implementation
    if implementation == "sdpa":
        return seen[None, None]
    if implementation == "eager":
        return torch.zeros(seen.shape, dtype=model.dtype, device=seen.device).masked_fill(
            ~seen, torch.finfo(model.dtype).min
        )[None, None]
    raise ValueError(f"attention {implementation!r} takes no mask of its own; use sdpa or eager")
