"""Many continuations of one prompt, each of their beginnings computed once: log-probabilities, and training batches.

A prompt and its continuations stand in one row as a tree: behind a beginning that several have in common come their
different ends, one after another. Positions count from the prompt's first token along each branch, and the attention
mask lets a token see its own branch only, so every token gets exactly the value it would have in a row of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedModel

from twice_rec.config import TAKES_MASKS

Mask = Tensor | BlockMask
MaskMod = Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class SharedRows:
    """G prompts with their continuations, a prompt a row, padded on the right to the longest row's length L.

    Args:
        input_ids: int64 [G, L].
        position_ids: int64 [G, L], along each branch.
        ends: int64 [G, L], the first column behind the last branch through a token; from there on it is not seen.
        row, column: int64 [M], where the logits that predict the M different tokens of the continuations stand.
        targets: int64 [M], those tokens.
        places: int64 [N], for each token of the continuations, one continuation after another, which of the M it is.
    """

    input_ids: Tensor
    position_ids: Tensor
    ends: Tensor
    row: Tensor
    column: Tensor
    targets: Tensor
    places: Tensor

    @classmethod
    def of(
        cls, groups: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]], device: torch.device | str
    ) -> SharedRows:
        """Rows of (prompt, its continuations), token ids; prompts hold at least one, continuations may be empty."""
        trees = [_tree(prompt, continuations) for prompt, continuations in groups]
        length, ids, positions, ends = max(len(tree.tokens) for tree in trees), [], [], []
        rows, columns, targets, places = [], [], [], []
        for number, ((prompt, _), tree) in enumerate(zip(groups, trees, strict=True)):
            padding = range(len(tree.tokens), length)
            ids.append(tree.tokens + [0] * len(padding))
            positions.append(tree.positions + [0] * len(padding))
            ends.append(tree.ends + [column + 1 for column in padding])
            places += [len(targets) + column - len(prompt) for path in tree.paths for column in path]
            rows += [number] * len(tree.before)
            columns += tree.before
            targets += tree.tokens[len(prompt) :]
        layout = (ids, positions, ends, rows, columns, targets, places)
        return cls(*(torch.tensor(values, dtype=torch.long, device=device) for values in layout))

    def inputs(self, model: PreTrainedModel) -> dict[str, Any]:
        """What a model's forward takes."""
        masks = attention_masks(model, self.ends, self.position_ids)
        return {"input_ids": self.input_ids, "position_ids": self.position_ids, "attention_mask": masks}


class _Tree(NamedTuple):
    """One row: for each of its tokens position and end, and behind the prompt the column of the token before it in its
    branch; for each continuation the columns of its tokens.
    """

    tokens: list[int]
    positions: list[int]
    ends: list[int]
    before: list[int]
    paths: list[list[int]]


def _tree(prompt: Sequence[int], continuations: Sequence[Sequence[int]]) -> _Tree:
    """In alphabetical order, continuations with a common beginning are neighbours."""
    tokens, positions, ends, before = list(prompt), list(range(len(prompt))), [0] * len(prompt), list[int]()
    paths, previous, path = dict[tuple[int, ...], list[int]](), (), list[int]()
    for continuation in sorted(set(map(tuple, continuations))):
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(previous, continuation, strict=False)))
        for column in path[common:]:
            ends[column] = len(tokens)
        new = range(len(tokens), len(tokens) + len(continuation) - common)
        path = [*path[:common], *new]
        before += [path[depth - 1] if depth else len(prompt) - 1 for depth in range(common, len(path))]
        tokens += continuation[common:]
        positions += range(len(prompt) + common, len(prompt) + len(path))
        ends += [0] * len(new)
        paths[continuation], previous = path, continuation
    for column in (*range(len(prompt)), *path):
        ends[column] = len(tokens)
    return _Tree(tokens, positions, ends, before, [paths[tuple(continuation)] for continuation in continuations])


def continuation_log_probabilities(
    model: PreTrainedModel, prompt: Sequence[int], continuations: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Log-probability of every token of every continuation, given the prompt and the tokens before it.

    Args:
        model: a causal language model with full or sliding-window attention, of `config.TAKES_MASKS` or
            flex_attention.
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
    return list(values[rows.places].split([len(continuation) for continuation in continuations]))


def token_scores(model: torch.nn.Module, rows: SharedRows) -> tuple[Tensor, Tensor | None]:
    """Log-probability and entropy of every token of the continuations, with gradients.

    TRL's fused head computes them from the hidden states in tiles, forward and backward, so that [N, V] logits never
    stand whole; a hook hands it the M positions that matter, the end of a prompt once for each different first token.
    All happens within one forward of the wrapped model, as data-parallel and ZeRO wrappers need it.

    Args:
        model: with the head that TRL's trainers add (`trl.trainer.utils.add_fused_lm_head`, which holds the
            temperature), bare or wrapped by PEFT, accelerate or both.

    Returns:
        float32 [N] each, in the order of `rows.places`; the entropies are None where the head has none.
    """
    from accelerate.utils import extract_model_from_parallel

    bare = extract_model_from_parallel(model)
    bare = bare.get_base_model() if isinstance(bare, PeftModel) else bare

    def keep_what_predicts(module: torch.nn.Module, arguments: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state[rows.row, rows.column][None]
        return output

    with bare.base_model.register_forward_hook(keep_what_predicts):
        scores = model(**rows.inputs(bare), shift_labels=rows.targets[None], fused_lm_head=True)
    values = (scores.log_probs, scores.entropy)
    return tuple(None if of_all is None else of_all[0, rows.places] for of_all in values)


def attention_masks(model: PreTrainedModel, ends: Tensor, positions: Tensor) -> Mask | dict[str, Mask]:
    """The mask of each kind of layer: a token sees those before it whose branches have not ended.

    Args:
        ends: int64 [B, L], the column at which the branches through a token end.
        positions: int64 [B, L], for sliding windows.

    Returns:
        One mask, [B, 1, L, L] or a block mask, or one a kind of layer where the model's configuration tells them apart.
    """
    windows = layer_windows(model.config.get_text_config())
    masks = {kind: _as_mask(model, mask_mod(ends, positions, window), ends) for kind, window in windows.items()}
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


def mask_mod(ends: Tensor, positions: Tensor, window: int | None = None) -> MaskMod:
    """The rule of a mask as FlexAttention wants it: (row, head, query, key) -> whether the query sees the key.

    Args:
        ends, positions: int64 [B, L], see `attention_masks`.
        window: of a sliding-window layer, in positions.
    """

    def sees(row: Tensor, head: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
        seen = (key <= query) & (query < ends[row, key])
        return seen if window is None else seen & (positions[row, query] - positions[row, key] < window)

    return sees


class Masks(dict):
    """Kind of layer -> mask."""

    def sum(self) -> Tensor:
        """Number of tokens, which TRL's log takes from the sum of a plain attention mask."""
        return torch.tensor(next(iter(self.values())).shape[-1])


def _as_mask(model: PreTrainedModel, sees: MaskMod, like: Tensor) -> Mask:
    implementation, (rows, length), device = model.config._attn_implementation, like.shape, like.device
    if implementation == "flex_attention":
        return create_block_mask(sees, rows, None, length, length, device, _compile=device.type == "cuda")
    if implementation not in TAKES_MASKS:
        raise ValueError(
            f"attention {implementation!r} takes no mask of its own; use {', '.join(TAKES_MASKS)} or flex_attention"
        )
    row, order = torch.arange(rows, device=device), torch.arange(length, device=device)
    return as_attention_mask(model, sees(row[:, None, None], None, order[:, None], order)[:, None])


def as_attention_mask(model: PreTrainedModel, sees: Tensor) -> Tensor:
    """A mask [B, 1, queries, keys], true where a query sees a key, as attention of `config.TAKES_MASKS` takes it."""
    if model.config._attn_implementation != "eager":
        return sees
    bias = torch.zeros(sees.shape, dtype=model.dtype, device=sees.device)
    return bias.masked_fill(~sees, torch.finfo(model.dtype).min)


class SharedPrefixCollator:
    """Puts groups of rows that share a beginning into one row of a batch; the loss is that of the rows one by one.

    Args:
        model: with attention of `config.TAKES_MASKS`.
    """

    def __init__(self, model: PreTrainedModel):
        self._model = model

    def __call__(self, groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Groups as `llm.encoding.share_prefixes` makes them -> `input_ids`, `labels`, `position_ids`, masks."""
        ends, positions = list[int](), list[int]()
        for group in groups:
            start, *lengths = group["lengths"]
            _, *behind = accumulate(group["lengths"], initial=len(ends))
            positions += [*range(start), *(p for n in lengths for p in range(start, start + n))]
            ends += [behind[-1]] * start
            ends += [end for n, end in zip(lengths, behind[1:], strict=True) for _ in range(n)]
        masks = attention_masks(self._model, *(torch.tensor([values]) for values in (ends, positions)))
        flat = {name: [token for group in groups for token in group[name]] for name in ("input_ids", "labels")}
        rows = {**flat, "position_ids": positions}
        return {**{name: torch.tensor([values]) for name, values in rows.items()}, "attention_mask": masks}
