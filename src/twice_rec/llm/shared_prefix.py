"""Many continuations of one prompt, the prompt computed once: their log-probabilities, and batches to train on.

All continuations stand behind the prompt in one row, [prompt, continuation 1, ..., continuation K]. Positions restart
after the prompt for each, and the attention mask lets a continuation see the prompt and itself only, so every token
gets exactly the value it would have in a row of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedModel

Mask = Tensor | BlockMask
MaskMod = Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class SharedRows:
    """G prompts with their continuations, a prompt a row, padded on the right to the longest row's length L.

    Args:
        input_ids: int64 [G, L].
        position_ids: int64 [G, L], from 0 in a prompt and on from its end in each of its continuations.
        segment: int64 [G, L], 0 for the prompt, 1 to K for its continuations, -1 for padding.
        row, column: int64 [N], where the logits that predict the tokens of the continuations stand: a first token's at
            the end of the prompt.
        targets: int64 [N], those tokens, one continuation after another.
    """

    input_ids: Tensor
    position_ids: Tensor
    segment: Tensor
    row: Tensor
    column: Tensor
    targets: Tensor

    @classmethod
    def of(
        cls, groups: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]], device: torch.device | str
    ) -> SharedRows:
        """Rows of (prompt, its continuations), token ids; prompts hold at least one, continuations may be empty."""
        length = max(len(prompt) + sum(map(len, continuations)) for prompt, continuations in groups)
        ids, positions, segments, rows, columns, targets = [], [], [], [], [], []
        for number, (prompt, continuations) in enumerate(groups):
            start, lengths = len(prompt), [len(continuation) for continuation in continuations]
            tokens = [token for continuation in continuations for token in continuation]
            padding = [0] * (length - start - len(tokens))
            ids.append([*prompt, *tokens, *padding])
            positions.append([*range(start), *(start + i for n in lengths for i in range(n)), *padding])
            behind = [k for k, n in enumerate(lengths, start=1) for _ in range(n)]
            segments.append([0] * start + behind + [-1] * len(padding))
            for offset, n in zip(accumulate(lengths, initial=start), lengths, strict=False):
                columns += [start - 1, *range(offset, offset + n - 1)] if n else []
            rows += [number] * len(tokens)
            targets += tokens
        layout = (ids, positions, segments, rows, columns, targets)
        return cls(*(torch.tensor(values, dtype=torch.long, device=device) for values in layout))

    def inputs(self, model: PreTrainedModel) -> dict[str, Any]:
        """What a model's forward takes."""
        masks = attention_masks(model, self.segment, self.segment.clamp(max=0), self.position_ids)
        return {"input_ids": self.input_ids, "position_ids": self.position_ids, "attention_mask": masks}


def continuation_log_probabilities(
    model: PreTrainedModel, prompt: Sequence[int], continuations: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Log-probability of every token of every continuation, given the prompt and the tokens before it.

    Args:
        model: a causal language model with full or sliding-window attention (sdpa, eager or flex_attention).
        prompt: token ids, at least one.
        continuations: K sequences of token ids, each at least one long.

    Returns:
        K float32 tensors, one value a token, on the model's device; with gradients where the caller allows them.
    """
    if not prompt or not all(continuations):
        raise ValueError("the prompt and every continuation need at least one token")
    rows = SharedRows.of([(prompt, continuations)], model.device)
    logits = model(**rows.inputs(model), logits_to_keep=rows.column, use_cache=False).logits[0]
    values = torch.log_softmax(logits.float(), dim=-1).gather(1, rows.targets[:, None]).squeeze(1)
    return list(values.split([len(continuation) for continuation in continuations]))


def token_scores(model: torch.nn.Module, rows: SharedRows) -> tuple[Tensor, Tensor | None]:
    """Log-probability and entropy of every token of the continuations, with gradients.

    TRL's fused head computes them from the hidden states in tiles, forward and backward, so that [N, V] logits never
    stand whole; a hook hands it the N positions that matter, the end of a prompt once for each of its continuations.
    All happens within one forward of the wrapped model, as data-parallel and ZeRO wrappers need it.

    Args:
        model: with the head that TRL's trainers add (`trl.trainer.utils.add_fused_lm_head`, which holds the
            temperature), bare or wrapped by PEFT, accelerate or both.

    Returns:
        float32 [N] each, in the order of `rows.targets`; the entropies are None where the head has none.
    """
    from accelerate.utils import extract_model_from_parallel

    bare = extract_model_from_parallel(model)
    bare = bare.get_base_model() if isinstance(bare, PeftModel) else bare

    def keep_what_predicts(module: torch.nn.Module, arguments: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state[rows.row, rows.column][None]
        return output

    with bare.base_model.register_forward_hook(keep_what_predicts):
        scores = model(**rows.inputs(bare), shift_labels=rows.targets[None], fused_lm_head=True)
    return scores.log_probs[0], None if scores.entropy is None else scores.entropy[0]


def attention_masks(
    model: PreTrainedModel, segment: Tensor, prefix: Tensor, positions: Tensor
) -> Mask | dict[str, Mask]:
    """The mask of each kind of layer: a token sees its own segment and its prefix, never the future.

    Args:
        segment: int64 [B, L], which prompt or continuation a token belongs to.
        prefix: int64 [B, L], the segment of its prompt; its own for a prompt's tokens.
        positions: int64 [B, L], for sliding windows.

    Returns:
        One mask, [B, 1, L, L] or a block mask, or one a kind of layer where the model's configuration tells them apart.
    """
    windows = layer_windows(model.config.get_text_config())
    masks = {kind: _as_mask(model, mask_mod(segment, prefix, positions, w), segment) for kind, w in windows.items()}
    return masks[""] if "" in masks else Masks(masks)


def layer_windows(config: Any) -> dict[str, int | None]:
    """Kind of layer -> its sliding window, None for full attention; the one kind `""` where the model has no kinds.

    Raises:
        ValueError: for kinds that no mask here fits.
    """
    kinds = set(getattr(config, "layer_types", None) or [])
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(f"no mask for layers of the kind {', '.join(sorted(unknown))}")
    if not kinds:
        return {"": getattr(config, "sliding_window", None)}
    windows: dict[str, int | None] = {"full_attention": None}
    return windows | ({"sliding_attention": config.sliding_window} if "sliding_attention" in kinds else {})


def mask_mod(segment: Tensor, prefix: Tensor, positions: Tensor, window: int | None = None) -> MaskMod:
    """The rule of a mask as FlexAttention wants it: (row, head, query, key) -> whether the query sees the key.

    Args:
        segment, prefix, positions: int64 [B, L], see `attention_masks`.
        window: of a sliding-window layer, in positions.
    """

    def sees(row: Tensor, head: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
        same = (segment[row, key] == segment[row, query]) | (segment[row, key] == prefix[row, query])
        seen = (key <= query) & same
        return seen if window is None else seen & (positions[row, query] - positions[row, key] < window)

    return sees


class Masks(dict):
    """Kind of layer -> mask."""

    def sum(self) -> Tensor:
        """Number of tokens, which TRL's log takes from the sum of a plain attention mask."""
        return torch.tensor(next(iter(self.values())).shape[-1])


def _as_mask(model: PreTrainedModel, sees: MaskMod, segment: Tensor) -> Mask:
    implementation, (rows, length), device = model.config._attn_implementation, segment.shape, segment.device
    if implementation == "flex_attention":
        return create_block_mask(sees, rows, None, length, length, device, _compile=device.type == "cuda")
    if implementation not in ("sdpa", "eager"):
        raise ValueError(f"attention {implementation!r} takes no mask of its own; use sdpa, eager or flex_attention")
    row, order = torch.arange(rows, device=device), torch.arange(length, device=device)
    return as_attention_mask(model, sees(row[:, None, None], None, order[:, None], order)[:, None])


def as_attention_mask(model: PreTrainedModel, sees: Tensor) -> Tensor:
    """A mask [B, 1, queries, keys], true where a query sees a key, as the model's attention (sdpa, eager) takes it."""
    if model.config._attn_implementation == "sdpa":
        return sees
    bias = torch.zeros(sees.shape, dtype=model.dtype, device=sees.device)
    return bias.masked_fill(~sees, torch.finfo(model.dtype).min)


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
        masks = attention_masks(self._model, *(torch.tensor([values]) for values in (segment, prefix, positions)))
        flat = {name: [token for group in groups for token in group[name]] for name in ("input_ids", "labels")}
        rows = {**flat, "position_ids": positions}
        return {**{name: torch.tensor([values]) for name, values in rows.items()}, "attention_mask": masks}
